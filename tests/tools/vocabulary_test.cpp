// Models whose vocabularies differ: rows of embeddings and heads lined up by the text of tokens, or by index, and the
// tokenizer and configuration that fit the result.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include "../capture.hpp"

#include <taskvec/models/selected_rows.hpp>

#include <nlohmann/json.hpp>

#include <map>
#include <optional>

namespace vocabulary_test {

using namespace tools_test;
using words = std::vector<std::string>;

bool says(const std::string& text, const std::string& part)
{
    return text.find(part) != std::string::npos;
}

/// A model's directory: tokens of the model's vocabulary, added tokens behind them, and rows past all of them.
struct vocabulary {
    words own{}, added{};
    std::size_t padding = 0;
    float shift = 0; ///< of all rows
    bool tokenizer = true;
    words merges{};
};
/// A token's row in a model without a shift.
float value_of(const std::string& token)
{
    float sum = 0;
    for (const char c : token) { sum = 2 * sum + static_cast<float>(c); }
    return sum;
}
float padding_value(std::size_t row)
{
    return 5000 + static_cast<float>(row);
}
void write_directory(const std::filesystem::path& folder, const vocabulary& v, bool tied = false)
{
    std::vector<float> rows;
    auto all = v.own;
    all.insert(all.end(), v.added.begin(), v.added.end());
    for (const auto& token : all) { rows.insert(rows.end(), {value_of(token) + v.shift, -value_of(token)}); }
    for (std::size_t i = 0; i < v.padding; ++i) {
        rows.insert(rows.end(), {padding_value(all.size() + i) + v.shift, 0});
    }
    const auto count = static_cast<std::int64_t>(rows.size() / 2);
    std::filesystem::create_directories(folder);
    values_model model{{"model.embed_tokens.weight", {taskvec::dtype::f32, {count, 2}, rows}},
        {"lm_head.weight", {taskvec::dtype::f32, {count, 2}, rows}},
        {"model.norm.weight", {taskvec::dtype::f32, {2}, {1, 2}}}};
    if (tied) { model.erase("lm_head.weight"); }
    write_values(folder / "model.safetensors", model);
    nlohmann::json config{{"model_type", "llama"}, {"vocab_size", count}, {"pad_token_id", all.size() - 1},
        {"eos_token_id", {0, all.size() - 1}}};
    if (tied) { config["tie_word_embeddings"] = true; }
    spill(folder / "config.json", config.dump());
    if (!v.tokenizer) { return; }
    nlohmann::json tokenizer{{"version", "1.0"}, {"added_tokens", nlohmann::json::array()},
        {"model", {{"type", "BPE"}, {"vocab", nlohmann::json::object()}, {"merges", v.merges}}}};
    nlohmann::json settings{{"pad_token", all.back()}, {"added_tokens_decoder", nlohmann::json::object()}};
    for (std::size_t i = 0; i < all.size(); ++i) {
        if (i < v.own.size()) { tokenizer["model"]["vocab"][all[i]] = i; }
        else {
            nlohmann::json entry{{"content", all[i]}, {"lstrip", true}, {"rstrip", false}, {"normalized", false},
                {"single_word", false}, {"special", true}};
            settings["added_tokens_decoder"][std::to_string(i)] = entry;
            entry["id"] = i;
            tokenizer["added_tokens"].push_back(entry);
        }
    }
    spill(folder / "tokenizer.json", tokenizer.dump());
    spill(folder / "tokenizer_config.json", settings.dump());
}
/// The first column of a tensor of a directory.
std::vector<float> column(const std::filesystem::path& folder, const std::string& name = "model.embed_tokens.weight")
{
    std::vector<float> result;
    const auto model = read_values(folder / "model.safetensors");
    const auto& values = model.at(name).values;
    for (std::size_t i = 0; i < values.size(); i += 2) { result.push_back(values[i]); }
    return result;
}
nlohmann::json json_of(const std::filesystem::path& file)
{
    return nlohmann::json::parse(slurp(file));
}
std::vector<float> values_of(const words& tokens, float shift)
{
    std::vector<float> result;
    for (const auto& token : tokens) { result.push_back(value_of(token) + shift); }
    return result;
}

struct models {
    scratch folder;
    models()
    {
        write_directory(folder / "base", {.own = {"a", "b", "c"}, .added = {"<s>"}});
        write_directory(folder / "more", {.own = {"a", "b", "c"}, .added = {"<s>", "<x>"}, .shift = 1});
        write_directory(folder / "other",
            {.own = {"c", "a", "b", "ab"}, .added = {"<y>", "<s>"}, .padding = 2, .shift = 2, .merges = {"a b"}});
        write_directory(folder / "padded", {.own = {"a", "b", "c"}, .added = {"<s>"}, .padding = 3, .shift = 4});
        write_directory(
            folder / "bare", {.own = {"a", "b", "c"}, .added = {"<s>", "<x>"}, .shift = 1, .tokenizer = false});
    }
    outcome merge(const words& tasks, const words& more, const std::string& base = "base") const
    {
        words line{"merge", "--method", "task-arithmetic", "--lambda", "1", "--base", base, "--out", "out"};
        for (const auto& task : tasks) { line.insert(line.end(), {"--task", task}); }
        line.insert(line.end(), more.begin(), more.end());
        std::filesystem::remove_all(folder / "out");
        return run(folder, line);
    }
};

TEST_CASE("vocabularies that differ are refused by default, and the message names the option")
{
    const models m;
    for (const std::string task : {"more", "other", "padded", "bare"}) {
        refused(m.folder, {"merge", "--method", "ties", "--base", "base", "--task", task, "--out", "new"}, 1,
            "--vocabulary base, union or truncate lines the rows up");
    }
    refused(m.folder, {"merge", "--method", "slerp", "--task", "base", "--task", "more", "--out", "new"}, 1,
        "tensor 'lm_head.weight' has 5 rows in 'more' and 4 in 'base'");
    // What takes no part may differ.
    CHECK(m.merge({"more"}, {"--exclude", "embed_tokens|lm_head"}).code == 0);
    // Equal numbers of rows are merged by index, and it is said where the texts differ.
    write_directory(m.folder / "turned", {.own = {"b", "a", "c"}, .added = {"<s>"}, .shift = 1});
    const auto turned = m.merge({"turned"}, {});
    CHECK(turned.code == 0);
    CHECK(says(turned.err,
        "the tokenizers of 'turned' and 'base' give the ids of 2 tokens ('b', 'a') of the former to others in the "
        "latter: their rows are merged by index"));
    CHECK(column(m.folder / "out")[0] == value_of("b") + 1);
    CHECK(m.merge({"turned"}, {"--vocabulary", "base"}).code == 0);
    CHECK(column(m.folder / "out") == values_of({"a", "b", "c", "<s>"}, 1));
}

TEST_CASE("--vocabulary base keeps the base's rows and files")
{
    const models m;
    const auto done = m.merge({"more", "other"}, {"--vocabulary", "base", "--report", "report.json"});
    REQUIRE_MESSAGE(done.code == 0, done.err);
    CHECK(column(m.folder / "out") == values_of({"a", "b", "c", "<s>"}, 3));
    CHECK(column(m.folder / "out", "lm_head.weight") == values_of({"a", "b", "c", "<s>"}, 3));
    CHECK(says(done.err, "'more' has 1 token ('<x>') that 'base' lacks: left out"));
    CHECK(says(done.err, "'other' has 2 tokens ('ab', '<y>') that 'base' lacks: left out"));
    CHECK(slurp(m.folder / "out/tokenizer.json") == slurp(m.folder / "base/tokenizer.json"));
    CHECK(json_of(m.folder / "out/config.json")["vocab_size"] == 4);
    // A token that the task lacks, and padding that it lacks, are the base's.
    REQUIRE(m.merge({"base"}, {"--vocabulary", "base"}, "other").code == 0);
    CHECK(column(m.folder / "out")
        == std::vector<float>{value_of("c"), value_of("a"), value_of("b"), value_of("ab") + 2, value_of("<y>") + 2,
            value_of("<s>"), padding_value(6) + 2, padding_value(7) + 2});
    // Padding that both have is merged.
    write_directory(m.folder / "padded2", {.own = {"a", "b", "c"}, .added = {"<s>", "<x>"}, .padding = 2, .shift = 1});
    REQUIRE(m.merge({"padded2"}, {"--vocabulary", "base"}, "padded").code == 0);
    CHECK(column(m.folder / "out")
        == std::vector<float>{value_of("a") + 1, value_of("b") + 1, value_of("c") + 1, value_of("<s>") + 1,
            padding_value(4) + 4, padding_value(5) + 1, padding_value(6) + 1});
}

TEST_CASE("--vocabulary union adds the rows of the models that have them, and their tokens")
{
    const models m;
    const auto done = m.merge({"more", "other"}, {"--vocabulary", "union", "--report", "report.json"});
    REQUIRE_MESSAGE(done.code == 0, done.err);
    auto expected = values_of({"a", "b", "c", "<s>"}, 3);
    for (const auto& [token, shift] : std::vector<std::pair<std::string, float>>{{"<x>", 1}, {"ab", 2}, {"<y>", 2}}) {
        expected.push_back(value_of(token) + shift);
    }
    CHECK(column(m.folder / "out") == expected);
    CHECK(says(done.err, "the vocabulary of the result has 7 rows, that of 'base' has 4"));
    CHECK(json_of(m.folder / "out/config.json")["vocab_size"] == 7);
    const auto tokenizer = json_of(m.folder / "out/tokenizer.json");
    // All are in there: tokenizers gives an added token that is not the next id behind the others.
    CHECK(tokenizer["model"]["vocab"]
        == nlohmann::json{{"a", 0}, {"b", 1}, {"c", 2}, {"<s>", 3}, {"<x>", 4}, {"ab", 5}, {"<y>", 6}});
    CHECK(tokenizer["model"]["merges"] == nlohmann::json::parse(R"([["a", "b"]])"));
    REQUIRE(tokenizer["added_tokens"].size() == 3);
    CHECK(tokenizer["added_tokens"][1]["content"] == "<x>");
    CHECK(tokenizer["added_tokens"][1]["id"] == 4);
    CHECK(tokenizer["added_tokens"][1]["lstrip"] == true);
    CHECK(tokenizer["added_tokens"][2]["id"] == 6);
    const auto settings = json_of(m.folder / "out/tokenizer_config.json");
    CHECK(settings["added_tokens_decoder"]["4"]["content"] == "<x>");
    CHECK(settings["added_tokens_decoder"]["6"]["content"] == "<y>");
    CHECK(settings["pad_token"] == "<s>");
    // The result is a model to go on with: nothing is new to it.
    const auto again = run(m.folder,
        {"merge", "--method", "slerp", "--t", "1", "--task", "more", "--task", "out", "--vocabulary", "union", "--out",
            "again"});
    REQUIRE_MESSAGE(again.code == 0, again.err);
    CHECK(column(m.folder / "again").size() == 7);
    // A token that two models have and the base lacks is their mean, by equal weights.
    write_directory(m.folder / "more2", {.own = {"a", "b", "c"}, .added = {"<s>", "<z>", "<x>"}, .shift = 3});
    REQUIRE(m.merge({"more", "more2"}, {"--vocabulary", "union"}).code == 0);
    CHECK(column(m.folder / "out")[4] == value_of("<x>") + 2);
    CHECK(column(m.folder / "out")[5] == value_of("<z>") + 3);
    // New tokens take the place of padding; what is excluded is lined up all the same.
    REQUIRE(m.merge({"more"}, {"--vocabulary", "union", "--exclude", "lm_head"}, "padded").code == 0);
    CHECK(column(m.folder / "out").size() == 7);
    CHECK(column(m.folder / "out")[4] == value_of("<x>") + 1);
    CHECK(column(m.folder / "out")[5] == padding_value(5) + 4);
    CHECK(column(m.folder / "out", "lm_head.weight")[4] == value_of("<x>") + 1);
    CHECK(column(m.folder / "out", "lm_head.weight")[0] == value_of("a") + 4);
    // A tied head of another length is found.
    write_directory(m.folder / "tied", {.own = {"a", "b", "c"}, .added = {"<s>", "<x>"}, .shift = 1}, true);
    REQUIRE(m.merge({"tied"}, {"--vocabulary", "union"}).code == 0);
    CHECK(column(m.folder / "out", "lm_head.weight") == values_of({"a", "b", "c", "<s>", "<x>"}, 1));
    // Deltas of what a merge loses belong to the merged model, rows and all.
    const auto reuse = run(m.folder,
        {"peru-fft", "--method", "task-arithmetic", "--base", "base", "--task", "more", "--density", "0.5", "--out",
            "reuse", "--vocabulary", "union"});
    CHECK_MESSAGE(reuse.code == 0, reuse.err);
    CHECK(run(m.folder,
              {"apply", "--base", "reuse/merged.safetensors", "--delta", "reuse/more.delta.safetensors", "--out",
                  "whole"})
              .code
        == 0);
}

/// The ids that the tokenizers library reads: those of model.vocab, and of added tokens that are not in there one after
/// another behind it, whatever the file says. scripts/peers/tool_tokens.py asks the library itself.
std::map<std::string, std::size_t> ids_as_read(const nlohmann::json& tokenizer)
{
    std::map<std::string, std::size_t> ids;
    const auto& vocabulary = tokenizer["model"]["vocab"];
    for (const auto& [text, id] : vocabulary.items()) { ids[text] = id.get<std::size_t>(); }
    auto next = vocabulary.size();
    for (const auto& entry : tokenizer["added_tokens"]) {
        if (ids.emplace(entry["content"].get<std::string>(), next).second) { ++next; }
    }
    return ids;
}

TEST_CASE("the row of every token is that of the id that tokenizers reads")
{
    const scratch folder;
    const auto merged = [&](const words& tasks) {
        std::filesystem::remove_all(folder / "out");
        words line{"merge", "--method", "task-arithmetic", "--lambda", "1", "--base", "base", "--out", "out",
            "--vocabulary", "union"};
        for (const auto& task : tasks) { line.insert(line.end(), {"--task", task}); }
        return run(folder, line);
    };
    const auto check = [&](const words& tasks, const words& tokens, float shift) {
        const auto done = merged(tasks);
        REQUIRE_MESSAGE(done.code == 0, done.err);
        const auto ids = ids_as_read(json_of(folder / "out/tokenizer.json"));
        const auto rows = column(folder / "out");
        for (const auto& token : tokens) {
            CAPTURE(token);
            REQUIRE(ids.contains(token));
            CHECK(rows.at(ids.at(token)) == value_of(token) + shift);
        }
        return ids;
    };
    write_directory(folder / "base", {.own = {"a", "b", "c"}, .added = {"<s>", "</s>"}, .padding = 3});
    // A token of the vocabulary behind added ones, which are not in it.
    write_directory(
        folder / "own", {.own = {"a", "b", "c", "ab"}, .added = {"<s>", "</s>"}, .shift = 1, .merges = {"a b"}});
    check({"own"}, {"a", "b", "c", "ab", "<s>", "</s>"}, 1);
    write_directory(folder / "mixed",
        {.own = {"a", "b", "c", "ab", "bc"}, .added = {"<x>", "<s>", "</s>"}, .shift = 1, .merges = {"a b", "b c"}});
    check({"mixed"}, {"a", "b", "c", "ab", "bc", "<s>", "</s>", "<x>"}, 1);
    // Added tokens alone: the model's vocabulary stays as it is.
    write_directory(folder / "added", {.own = {"a", "b", "c"}, .added = {"<x>", "<s>", "</s>", "<y>"}, .shift = 1});
    check({"added"}, {"a", "b", "c", "<s>", "</s>", "<x>", "<y>"}, 1);
    CHECK(json_of(folder / "out/tokenizer.json")["model"]["vocab"].size() == 3);
    // What is found among added tokens and in the vocabulary is the same token to the next merge.
    REQUIRE(merged({"mixed"}).code == 0);
    std::filesystem::remove_all(folder / "base");
    std::filesystem::rename(folder / "out", folder / "base");
    check({"added"}, {"<y>"}, 1);
    // An id that tokenizers would not read in the base's own file: what is new would move with it.
    write_directory(folder / "gap", {.own = {"a", "b", "c"}, .added = {"<s>"}, .padding = 3});
    auto tokenizer = json_of(folder / "gap/tokenizer.json");
    tokenizer["added_tokens"][0]["id"] = 5;
    spill(folder / "gap/tokenizer.json", tokenizer.dump());
    std::filesystem::remove_all(folder / "base");
    std::filesystem::copy(folder / "gap", folder / "base");
    const auto ids = check({"added"}, {"a", "b", "c"}, 1);
    CHECK(ids.at("<s>") == 5);
    CHECK(column(folder / "out").at(ids.at("<x>")) == value_of("<x>") + 1);
    // A list of pieces has no place for it.
    tokenizer["model"] = nlohmann::json::parse(R"({"type": "Unigram", "vocab": [["a", 0], ["b", -1], ["c", -2]]})");
    spill(folder / "base/tokenizer.json", tokenizer.dump());
    const auto refusal = merged({"added"});
    CHECK(refusal.code == 1);
    CHECK(says(refusal.err, "tokenizers would read '<s>' of"));
    CHECK(says(refusal.err, "--vocabulary base"));
}

TEST_CASE("a row that is that of different tokens is noted, whichever models they are of")
{
    const scratch folder;
    write_directory(folder / "base", {.own = {"a", "b", "c"}, .added = {"<s>"}, .padding = 2});
    write_directory(folder / "x", {.own = {"a", "b", "c"}, .added = {"<s>", "<x>"}, .padding = 1, .shift = 1});
    write_directory(folder / "y", {.own = {"a", "b", "c"}, .added = {"<s>", "<y>"}, .padding = 1, .shift = 2});
    write_directory(folder / "z", {.own = {"a", "b", "c"}, .added = {"<s>", "<x>"}, .padding = 1, .shift = 3});
    const std::string said = "the tokenizers of 'y' and 'x' give the id of 1 token ('<y>') of the former to another in "
                             "the latter: their rows are merged by index";
    const auto merged = [&](words line) {
        line.insert(line.begin(), {"merge", "--out", "out.safetensors"});
        const auto done = run(folder, line);
        CHECK_MESSAGE(done.code == 0, done.err);
        return done.err;
    };
    for (const bool tokenizer : {true, false}) {
        if (!tokenizer) { std::filesystem::remove(folder / "base/tokenizer.json"); }
        for (const std::string method : {"ties", "task-arithmetic", "average"}) {
            CAPTURE(method);
            const words two{"--method", method, "--base", "base", "--task", "x", "--task", "y"};
            const auto noted = merged(two);
            CHECK(says(noted, said));
            CHECK(says(noted, "with a tokenizer.json beside 'base', --vocabulary base or union") != tokenizer);
            auto three = two;
            three.insert(three.end(), {"--task", "z"});
            CHECK(says(merged(three), said));
        }
        CHECK_FALSE(
            says(merged({"--method", "ties", "--base", "base", "--task", "x", "--task", "z"}), "are merged by index"));
        // Rows that take no part are not merged.
        CHECK_FALSE(says(merged({"--method", "ties", "--base", "base", "--task", "x", "--task", "y", "--exclude",
                             "embed_tokens|lm_head"}),
            "are merged by index"));
    }
    CHECK(says(merged({"--method", "average", "--task", "x", "--task", "y"}), said));
}

TEST_CASE("a tokenizer with more tokens than there are rows is refused without --vocabulary too")
{
    const scratch folder;
    for (const std::string name : {"a", "b"}) {
        write_directory(folder / name, {.own = {"p", "q", "r"}, .shift = name == "a" ? 0.0F : 1.0F});
    }
    nlohmann::json tokenizer{{"model", {{"type", "BPE"}, {"vocab", nlohmann::json::object()}}}};
    for (int id = 0; id < 5; ++id) { tokenizer["model"]["vocab"]["t" + std::to_string(id)] = id; }
    const std::string because = "has 5 tokens and gives token 't4' the id 4, but 'lm_head.weight' of 'b' has 3 rows: "
                                "they contradict each other; use the tokenizer of this model, or move this file away";
    spill(folder / "b/tokenizer.json", tokenizer.dump());
    for (const words& line : {words{"--method", "average", "--task", "a", "--task", "b"},
             words{"--method", "ties", "--base", "a", "--task", "b"},
             words{"--method", "task-arithmetic", "--base", "b", "--task", "a"},
             words{"--method", "passthrough", "--task", "b"},
             words{"--method", "ties", "--base", "a", "--task", "b", "--vocabulary", "base"},
             words{"--method", "average", "--task", "b", "--task", "b", "--vocabulary", "union", "--quiet"}}) {
        auto all = line;
        all.insert(all.begin(), {"merge", "--out", "new"});
        refused(folder, all, 1, because);
    }
    // In both models, as in one.
    spill(folder / "a/tokenizer.json", tokenizer.dump());
    refused(folder, {"merge", "--method", "average", "--task", "a", "--task", "b", "--out", "new"}, 1, "of 'a' has 3");
    // Equal files, which are not read whole where a glance at their numbers is enough.
    const words line{"merge", "--method", "average", "--task", "a", "--task", "b", "--out", "new"};
    const auto both = [&](const std::string& text) {
        for (const std::string name : {"a", "b"}) { spill(folder / name / "tokenizer.json", text); }
    };
    for (const std::string text : {R"({"model": {"vocab": [["p", -1.5], ["q", -2], ["r", 0.0], ["s" , -3e-1]]}})",
             R"({"added_tokens": [{"content": "p\\", "id" :3}], "model": {"vocab": {"q": 0}}})"}) {
        both(text);
        refused(folder, line, 1, "of 'a' has 3 rows");
    }
    for (const std::string text : {R"({"model": {"vocab": [["\": 7", -1.5], ["q", -2], ["[", 0.0]]}})",
             R"({"model": {"vocab": {"p\\": 0, "1": 1, "\", 9": 2}, "merges": [["7", "8"], ["a", "b"]]}})",
             R"({"truncation": {"max_length": 512}, "model": {"vocab": {"p": 0, "q": 1, "r": 2}}})"}) {
        both(text);
        const auto done = run(folder, line);
        CHECK_MESSAGE(done.code == 0, done.err);
        std::filesystem::remove_all(folder / "new");
    }
    // The way on.
    for (const std::string name : {"a", "b"}) { std::filesystem::remove(folder / name / "tokenizer.json"); }
    CHECK(run(folder, line).code == 0);
}

TEST_CASE("a bias with an entry for each token along its last side is lined up as the rows are")
{
    const scratch folder;
    const auto write = [&](const std::string& name, const vocabulary& v) {
        std::filesystem::remove_all(folder / name);
        write_directory(folder / name, v);
        auto model = read_values(folder / name / "model.safetensors");
        std::vector<float> bias;
        for (const auto& row : column(folder / name)) { bias.push_back(row); }
        const auto count = static_cast<std::int64_t>(bias.size());
        model["final_logits_bias"] = {taskvec::dtype::f32, {1, count}, bias};
        write_values(folder / name / "model.safetensors", model);
    };
    const auto bias = [&] { return read_values(folder / "out/model.safetensors").at("final_logits_bias"); };
    const auto merged = [&](const std::string& policy) {
        std::filesystem::remove_all(folder / "out");
        return run(folder,
            {"merge", "--method", "task-arithmetic", "--lambda", "1", "--base", "base", "--task", "task",
                "--vocabulary", policy, "--out", "out"});
    };
    for (const bool tokenizer : {true, false}) {
        CAPTURE(tokenizer);
        write("base", {.own = {"a", "b"}, .added = {"c"}, .tokenizer = tokenizer});
        const words own = tokenizer ? words{"b", "d", "a"} : words{"a", "b", "c", "d"};
        write("task", {.own = own, .added = tokenizer ? words{"c"} : words{"e"}, .shift = 1, .tokenizer = tokenizer});
        refused(folder,
            {"merge", "--method", "ties", "--base", "base", "--task", "task", "--include", "final_logits_bias", "--out",
                "new"},
            1,
            tokenizer ? "tensor 'final_logits_bias' has 4 rows in 'task' and 3 in 'base'"
                      : "tensor 'final_logits_bias' has 5 rows in 'task' and 3 in 'base'");
        auto done = merged("union");
        REQUIRE_MESSAGE(done.code == 0, done.err);
        auto expected = values_of(tokenizer ? words{"a", "b", "c", "d"} : words{"a", "b", "c", "d", "e"}, 1);
        CHECK(bias().shape == taskvec::extents{1, tokenizer ? 4 : 5});
        CHECK(bias().values == expected);
        CHECK(column(folder / "out") == expected);
        for (const std::string policy : {"base", "truncate"}) {
            CAPTURE(policy);
            done = merged(policy);
            REQUIRE_MESSAGE(done.code == 0, done.err);
            CHECK(bias().shape == taskvec::extents{1, 3});
            CHECK(bias().values == values_of({"a", "b", "c"}, 1));
        }
    }
}

TEST_CASE("--vocabulary truncate ends at the last token that all have")
{
    const models m;
    const auto done = m.merge({"base"}, {"--vocabulary", "truncate"}, "more");
    REQUIRE_MESSAGE(done.code == 0, done.err);
    CHECK(column(m.folder / "out") == values_of({"a", "b", "c", "<s>"}, 0));
    CHECK(says(done.err, "1 token ('<x>') of 'more' are left out") == false);
    CHECK(says(done.err, "1 token ('<x>') of 'more' is left out"));
    const auto config = json_of(m.folder / "out/config.json");
    CHECK(config["vocab_size"] == 4);
    CHECK(config["pad_token_id"] == nullptr);
    CHECK(config["eos_token_id"] == nlohmann::json::array({0}));
    CHECK(json_of(m.folder / "out/tokenizer.json")["added_tokens"].size() == 1);
    const auto settings = json_of(m.folder / "out/tokenizer_config.json");
    CHECK_FALSE(settings.contains("pad_token"));
    CHECK(settings["added_tokens_decoder"].size() == 1);
    // Padding goes, tokens do not.
    REQUIRE(m.merge({"base"}, {"--vocabulary", "truncate"}, "padded").code == 0);
    CHECK(column(m.folder / "out") == values_of({"a", "b", "c", "<s>"}, 0));
}

TEST_CASE("without a tokenizer rows are lined up by index, and it is said")
{
    const models m;
    for (const auto& [policy, rows] : std::map<std::string, std::size_t>{{"base", 4}, {"union", 5}, {"truncate", 4}}) {
        CAPTURE_BOUND(policy);
        const auto done = m.merge({"bare"}, {"--vocabulary", policy});
        REQUIRE_MESSAGE(done.code == 0, done.err);
        CHECK(says(done.err, "no tokenizer.json beside 'bare': rows of the vocabulary are lined up by index"));
        CHECK(column(m.folder / "out").size() == rows);
        CHECK(column(m.folder / "out")[3] == value_of("<s>") + 1);
        if (rows == 5) { CHECK(column(m.folder / "out")[4] == value_of("<x>") + 1); }
        CHECK(json_of(m.folder / "out/config.json")["vocab_size"] == rows);
    }
    refused(m.folder,
        {"merge", "--method", "average", "--base", "base", "--task", "more", "--task", "bare", "--vocabulary", "union",
            "--out", "new"},
        1, "no tokenizer.json says of which tokens");
}

TEST_CASE("vocab_size follows the embedding, whatever architectures call it")
{
    const scratch folder;
    for (const std::string embedding : {"shared.weight", "transformer.tokens_embed.weight",
             "transformer.word_embedding.weight", "gpt_neox.embed_in.weight"}) {
        CAPTURE(embedding);
        for (const std::int64_t rows : {3, 4}) {
            const auto model = folder / (rows == 3 ? "base" : "task");
            std::filesystem::create_directories(model);
            write_values(model / "model.safetensors",
                {{embedding,
                     {taskvec::dtype::f32, {rows, 2}, std::vector<float>(static_cast<std::size_t>(2 * rows), 1)}},
                    {"norm.weight", {taskvec::dtype::f32, {2}, {1, 2}}}});
            spill(model / "config.json", nlohmann::json{{"model_type", "t5"}, {"vocab_size", rows}}.dump());
        }
        const auto done = run(folder,
            {"merge", "--method", "average", "--base", "base", "--task", "task", "--vocabulary", "union", "--out",
                "out"});
        REQUIRE_MESSAGE(done.code == 0, done.err);
        CHECK(json_of(folder / "out/config.json")["vocab_size"] == 4);
    }
}

TEST_CASE("tokenizers that contradict are refused by name")
{
    const models m;
    const auto refuses = [&](const std::string& because, const std::string& task = "wrong") {
        refused(m.folder,
            {"merge", "--method", "average", "--base", "base", "--task", task, "--vocabulary", "union", "--out", "new",
                "--quiet"},
            1, because);
    };
    write_directory(m.folder / "wrong", {.own = {"a", "b"}, .added = {"<s>"}});
    const auto file = m.folder / "wrong/tokenizer.json";
    spill(file, R"({"model": {"vocab": {"a": 0, "b": 1, "c": 9}}})");
    refuses("gives token 'c' the id 9, but 'lm_head.weight' of 'wrong' has 3 rows: they contradict each other");
    spill(file, R"({"model": {"vocab": {"a": 0, "b": 0}}})");
    refuses("gives the id 0 to two tokens, 'a' and 'b'");
    spill(file, R"({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "a"}]})");
    refuses("gives token 'a' two ids, 0 and 1");
    spill(file, R"({"model": {"vocab": {"a": -1}}})");
    refuses("the id -1; ids count from 0");
    spill(file, R"({"model": {"vocab": {"a": 999999999999}}})");
    refuses("which no embedding has");
    spill(file, R"({"added_tokens": [{"content": "a"}]})");
    refuses("without an id");
    spill(file, R"({"version": "1.0"})");
    refuses("names no token");
    spill(file, R"({"model": {"vocab": {"a": 0)");
    refuses("invalid JSON");
    spill(file, std::string(1000, '['));
    refuses("nested");
    // A list of pieces has no place for a token behind added ones.
    spill(m.folder / "base/tokenizer.json",
        R"({"model": {"type": "Unigram", "vocab": [["a", 0], ["b", -1], ["c", -2]]}, "added_tokens": [{"id": 3, "content": "<s>"}]})");
    refuses("token 'ab' of", "other");
    for (const words& wrong : {words{"prune", "--base", "base", "--task", "more"}}) {
        auto line = wrong;
        line.insert(line.end(), {"--out", "new.safetensors", "--vocabulary", "union"});
        refused(m.folder, line, 2, "has no meaning for prune");
    }
    CHECK(run(m.folder,
              {"prune", "--base", "base", "--task", "bare", "--vocabulary", "base", "--density", "1", "--out",
                  "d.safetensors"})
              .code
        == 0);
}

TEST_CASE("selected_rows reads any run of any rows, and means")
{
    using namespace taskvec;
    std::vector<float> a(5 * 3000), b(4 * 3000);
    for (std::size_t i = 0; i < a.size(); ++i) { a[i] = static_cast<float>(i % 977); }
    for (std::size_t i = 0; i < b.size(); ++i) { b[i] = static_cast<float>(i % 121) - 7; }
    std::vector<std::uint16_t> halves;
    for (const float value : b) { halves.push_back(f32_to_bf16(value)); }
    const const_tensor_ref first{a.data(), dtype::f32, {5, 3000}}, second{halves.data(), dtype::bf16, {4, 3000}};
    const selected_rows rows({first, second}, {{0, 2, {{0, 3}}}, {2, 1, {{1, 1}}}, {3, 1, {{0, 0}, {1, 3}}}});
    CHECK(rows.tensor(dtype::bf16).shape == extents{4, 3000});
    std::vector<float> expected;
    expected.insert(expected.end(), a.begin() + 9000, a.end());
    expected.insert(expected.end(), b.begin() + 3000, b.begin() + 6000);
    for (std::size_t i = 0; i < 3000; ++i) { expected.push_back((a[i] + b[9000 + i]) / 2); }
    for (const auto& [offset, count] : std::vector<std::pair<std::size_t, std::size_t>>{
             {0, 12000}, {1, 1}, {2999, 2}, {5999, 4097}, {8990, 3010}, {11999, 1}, {3, 0}}) {
        std::vector<float> found(count);
        rows.read(offset, count, found.data());
        CHECK(std::equal(found.begin(), found.end(), expected.begin() + static_cast<std::ptrdiff_t>(offset)));
    }
    CHECK_THROWS_AS(selected_rows({first}, {{0, 6, {{0, 0}}}}), shape_mismatch);
    CHECK_THROWS_AS(selected_rows({first}, {{1, 2, {{0, 0}}}}), shape_mismatch);
    CHECK_THROWS_AS(selected_rows({first}, {{0, 1, {{1, 0}}}}), shape_mismatch);
    CHECK_THROWS_AS(selected_rows({first, {halves.data(), dtype::bf16, {3, 4000}}}, {}), shape_mismatch);
}

TEST_CASE("the tokenizers that the fuzzer of vocabularies begins with are lined up or refused")
{
    const scratch folder;
    write_directory(folder / "a", {.own = {"a", "b", "c", "d"}});
    write_directory(folder / "b", {.own = {"a", "b", "c", "d", "e", "f"}});
    std::size_t merged = 0, tried = 0;
    for (const auto& entry : std::filesystem::directory_iterator(TASKVEC_TEST_DIR "/fuzz/corpus/vocabulary")) {
        CAPTURE(entry.path());
        const auto text = slurp(entry.path());
        const auto end = std::min(text.find('\0'), text.size());
        spill(folder / "a/tokenizer.json", text.substr(0, end));
        spill(folder / "b/tokenizer.json", text.substr(std::min(end + 1, text.size())));
        for (const char* policy : {"base", "union", "truncate"}) {
            CAPTURE(policy);
            std::filesystem::remove_all(folder / "out");
            const auto done = run(folder,
                {"merge", "--method", "average", "--task", "a", "--task", "b", "--vocabulary", policy, "--quiet",
                    "--out", "out"});
            CAPTURE(done.err);
            CHECK((done.code == 0 || (done.code == 1 && is_error_line(done.err))));
            CHECK(std::filesystem::exists(folder / "out") == (done.code == 0));
            merged += done.code == 0;
            ++tried;
        }
    }
    CHECK(merged >= 6);
    CHECK(tried >= 24);
}

} // namespace vocabulary_test
