// taskvec run: a configuration makes what the command line that says the same makes, and gradients are as by hand.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include "../capture.hpp"
#include "../skip.hpp"

#include <nlohmann/json.hpp>

#include <chrono>
#include <fstream>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <tuple>

using namespace tools_test;

namespace {

struct configured {
    scratch folder;
    values_model base, a, b;

    configured()
    {
        std::mt19937 random(5);
        std::normal_distribution<float> normal;
        for (const auto* name : {"embed.weight", "layers.0.attn.weight", "layers.0.mlp.weight", "layers.1.attn.weight",
                 "layers.1.mlp.weight", "layers.2.attn.weight", "layers.2.mlp.weight", "norm.weight"}) {
            values_tensor tensor{taskvec::dtype::f32, {6, 7}, std::vector<float>(42)};
            for (auto& value : tensor.values) { value = normal(random); }
            base[name] = tensor;
        }
        a = sample_task(base, 6);
        b = sample_task(base, 7);
        for (const auto& [name, model] : {std::pair{"base", &base}, {"a", &a}, {"b", &b}}) {
            std::filesystem::create_directories(folder / name);
            write_values(folder / name / "model.safetensors", *model);
        }
    }
    void write(const std::string& text) const { std::ofstream(folder / "config.yml", std::ios::binary) << text; }
    [[nodiscard]] outcome run_it(const std::vector<std::string>& more = {}) const
    {
        std::vector<std::string> words{"run", "config.yml", "--out", "out"};
        words.insert(words.end(), more.begin(), more.end());
        return run(folder, words);
    }
    [[nodiscard]] values_model result(const std::string& text, const std::vector<std::string>& more = {}) const
    {
        std::filesystem::remove_all(folder / "out");
        write(text);
        const auto done = run_it(more);
        CAPTURE(text);
        CAPTURE(done.err);
        REQUIRE(done.code == 0);
        return read_values(folder / "out/model.safetensors");
    }
    [[nodiscard]] values_model merged(std::vector<std::string> words) const
    {
        words.insert(words.begin(), "merge");
        words.insert(words.end(), {"--out", "merged.safetensors"});
        const auto done = run(folder, words);
        CAPTURE(done.err);
        REQUIRE(done.code == 0);
        return read_values(folder / "merged.safetensors");
    }
    /// A model with a tokenizer and an embedding, the row of whose tokens is the token's byte and the shift; and with
    /// rows that pad.
    void give(const std::string& name, const std::vector<std::string>& tokens, float shift, int padding = 0) const
    {
        std::filesystem::create_directories(folder / name);
        std::vector<float> rows;
        nlohmann::json vocabulary = nlohmann::json::object();
        for (std::size_t i = 0; i < tokens.size(); ++i) {
            vocabulary[tokens[i]] = i;
            rows.insert(rows.end(), {static_cast<float>(tokens[i][0]) + shift, shift});
        }
        rows.insert(rows.end(), static_cast<std::size_t>(2 * padding), 7.0F);
        const auto count = static_cast<std::int64_t>(rows.size() / 2);
        write_values(folder / name / "model.safetensors",
            {{"model.embed_tokens.weight", {taskvec::dtype::f32, {count, 2}, rows}}});
        spill(folder / name / "config.json", nlohmann::json{{"vocab_size", count}, {"of", name}}.dump());
        spill(folder / name / "tokenizer_config.json", R"({"added_tokens_decoder": {}})");
        spill(folder / name / "tokenizer.json",
            nlohmann::json{{"version", "1.0"}, {"added_tokens", nlohmann::json::array()},
                {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", tokens[0]}}}}
                .dump());
    }
    /// An adapter, 'lora', that adds 0.125 to each entry of a weight.
    void give_adapter() const
    {
        const std::string module = "base_model.model.layers.1.mlp";
        std::filesystem::create_directories(folder / "lora");
        write_values(folder / "lora/adapter_model.safetensors",
            {{module + ".lora_A.weight", {taskvec::dtype::f32, {1, 7}, std::vector<float>(7, 0.5F)}},
                {module + ".lora_B.weight", {taskvec::dtype::f32, {6, 1}, std::vector<float>(6, 0.25F)}}});
        spill(folder / "lora/adapter_config.json", R"({"peft_type": "LORA", "r": 1, "lora_alpha": 1})");
    }
    /// The embedding of a result has these rows of two, and its configuration counts them.
    void check_rows(
        const std::string& text, const std::vector<float>& expected, const std::vector<std::string>& more = {}) const
    {
        CAPTURE(text);
        const auto made = result(text + "\n", more).at("model.embed_tokens.weight");
        CHECK(made.shape == std::vector<std::int64_t>{static_cast<std::int64_t>(expected.size() / 2), 2});
        REQUIRE(made.values.size() == expected.size());
        for (std::size_t i = 0; i < expected.size(); ++i) {
            CAPTURE(i);
            CHECK(made.values[i] == doctest::Approx(expected[i]).epsilon(1e-6));
        }
        CHECK(nlohmann::json::parse(slurp(folder / "out/config.json"))["vocab_size"] == expected.size() / 2);
    }
    /// What a configuration is refused for: one line with the place, nothing written.
    [[nodiscard]] std::string refusal(const std::string& text) const
    {
        std::filesystem::remove_all(folder / "out");
        write(text);
        const auto begin = std::chrono::steady_clock::now();
        const auto done = run_it();
        CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(10));
        CAPTURE(text);
        CAPTURE(done.err);
        CHECK(done.code == 1);
        CHECK(is_error_line(done.err));
        CHECK_FALSE(std::filesystem::exists(folder / "out"));
        return done.err;
    }
};

/// Whether the tool reads configurations; where it does not, the verb names the package.
bool reads_yaml(const configured& m)
{
    m.write("merge_method: linear\n");
    const auto done = m.run_it();
    CHECK(done.code == 1);
    if (done.err.find("libyaml-cpp-dev") == std::string::npos) { return true; }
    CHECK(is_error_line(done.err));
    testing::skip("the taskvec tool was built without yaml-cpp");
    return false;
}

bool has(const std::string& text, const std::string& part)
{
    INFO(text);
    const bool found = text.find(part) != std::string::npos;
    CHECK_MESSAGE(found, part);
    return found;
}

const std::string tasks = "models:\n  - model: a\n    parameters: {weight: 0.75}\n  - model: b\n"
                          "    parameters: {weight: 0.5}\n";

} // namespace

TEST_CASE("a configuration is the command line that says the same, bit for bit")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const std::vector<std::string> base{"--base", "base"}, two{"--task", "a=0.75", "--task", "b=0.5"};
    const auto line = [&](const std::string& method, const std::vector<std::string>& more, bool with_base = true) {
        std::vector<std::string> words{"--method", method};
        if (with_base) { words.insert(words.end(), base.begin(), base.end()); }
        words.insert(words.end(), two.begin(), two.end());
        words.insert(words.end(), more.begin(), more.end());
        return m.merged(words);
    };
    const auto config = [&](const std::string& method, const std::string& parameters) {
        return m.result("merge_method: " + method + "\nbase_model: base\n" + tasks + parameters);
    };
    CHECK(same(m.result("merge_method: linear\n" + tasks), line("average", {}, false)));
    CHECK(same(m.result("merge_method: average\n" + tasks), line("average", {}, false)));
    CHECK(same(m.result("merge_method: dare-linear\nbase_model: base\n" + tasks),
        m.result("merge_method: dare_linear\nbase_model: base\n" + tasks)));
    CHECK(same(m.result("merge_method: linear\n" + tasks + "parameters:\n  normalize: false\n"),
        line("average", {"--unnormalized"}, false)));
    CHECK(same(config("task_arithmetic", "parameters: {lambda: 0.6, int8_mask: true}\n"),
        line("task-arithmetic", {"--semantics", "mergekit", "--lambda", "0.6"})));
    CHECK(same(config("ties", "parameters: {density: 0.4, normalize: false}\n"),
        line("ties", {"--semantics", "mergekit", "--density", "0.4", "--merge-weights", "sum"})));
    CHECK(same(config("ties", ""), line("ties", {"--semantics", "mergekit", "--density", "1"})));
    CHECK(same(config("dare_ties", "parameters: {density: 0.4, normalize: true, rescale: false}\n"),
        line("dare-ties",
            {"--semantics", "mergekit", "--density", "0.4", "--merge-weights", "mean", "--rescale-by", "none"})));
    CHECK(same(config("dare_linear", "parameters: {density: 0.4}\n"),
        line("dare", {"--semantics", "mergekit", "--density", "0.4"})));
    CHECK(same(config("breadcrumbs", "parameters: {density: 0.7, gamma: 0.1, rescale: true}\n"),
        line("breadcrumbs", {"--semantics", "mergekit", "--density", "0.7", "--gamma", "0.1", "--rescale"})));
    CHECK(same(config("breadcrumbs_ties", "parameters: {density: 0.7}\n"),
        line("breadcrumbs-ties", {"--semantics", "mergekit", "--density", "0.7"})));
    CHECK(same(config("della", "parameters: {density: 0.6, epsilon: 0.2}\n"),
        line("della", {"--semantics", "mergekit", "--density", "0.6", "--epsilon", "0.2"})));
    CHECK(same(config("della_linear", "parameters: {density: 0.6, normalize: true, rescale: false}\n"),
        line("della-linear",
            {"--semantics", "mergekit", "--density", "0.6", "--normalize-weights", "--rescale-by", "none"})));
    CHECK(same(config("della_linear", "parameters: {density: 0.6, rescale: false}\n"),
        config("della_linear", "parameters: {density: 0.6, epsilon: 0.15, rescale: false}\n")));
    CHECK(same(config("nuslerp", ""), line("nuslerp", {})));
    const auto rows = line("nuslerp", {"--angles-between", "rows"}),
               columns = line("nuslerp", {"--angles-between", "columns"});
    CHECK_FALSE(same(rows, columns));
    CHECK_FALSE(same(rows, line("nuslerp", {})));
    CHECK(same(config("nuslerp", "parameters: {nuslerp_flatten: false}\n"), rows));
    CHECK(same(config("nuslerp", "parameters: {nuslerp_flatten: false, nuslerp_row_wise: false}\n"), rows));
    CHECK(same(config("nuslerp", "parameters: {nuslerp_row_wise: true, nuslerp_flatten: false}\n"), columns));
    CHECK(same(config("nuslerp", "parameters: {nuslerp_row_wise: true}\n"), line("nuslerp", {})));
    CHECK(
        same(config("nuslerp", "parameters: {nuslerp_row_wise: true, nuslerp_flatten: true}\n"), line("nuslerp", {})));
    CHECK(same(m.result("merge_method: nuslerp\nbase_model: base\n" + tasks + "parameters: {nuslerp_flatten: false}\n",
                   {"--semantics", "paper"}),
        rows));
    CHECK(same(m.result("merge_method: multislerp\n" + tasks), line("multi-slerp", {}, false)));
    const std::vector<std::string> plain{"--base", "base", "--task", "a", "--task", "b"};
    const auto bare = [&](const std::string& method, std::vector<std::string> words) {
        words.insert(words.begin(), {"--method", method});
        return m.merged(words);
    };
    const auto with = [&](std::vector<std::string> more) {
        more.insert(more.begin(), plain.begin(), plain.end());
        return more;
    };
    const std::string names = "\nmodels: [{model: a}, {model: b}]\n";
    CHECK(same(m.result("merge_method: karcher\nparameters: {max_iter: 3}" + names),
        bare("karcher", {"--task", "a", "--task", "b", "--steps", "3"})));
    CHECK(same(
        m.result("merge_method: model_stock\nbase_model: base" + names), bare("model-stock", with({"--unclamped"}))));
    CHECK(same(m.result("merge_method: model_stock\nbase_model: base\nparameters: {filter_wise: true}" + names),
        bare("model-stock", with({"--unclamped", "--angles-between", "rows"}))));
    CHECK(same(m.result("merge_method: model_stock\nbase_model: base\nparameters: {filter_wise: false}" + names),
        bare("model-stock", with({"--unclamped"}))));
    CHECK(same(m.result("merge_method: sce\nbase_model: base\nparameters: {select_topk: 0.3}" + names),
        bare("sce", with({"--semantics", "mergekit", "--density", "0.3"}))));
    CHECK(same(m.result("merge_method: ram\nbase_model: base\nparameters: {epsilon: 0.05}" + names),
        bare("ram", with({"--epsilon", "0.05"}))));
    CHECK(same(m.result("merge_method: ramplus_tl\nbase_model: base\nparameters: {r: 0.3}" + names),
        bare("ram-plus", with({"--semantics", "mergekit", "--r", "0.3"}))));
    CHECK(same(m.result("merge_method: arcee_fusion\nbase_model: base\nmodels: [{model: base}, {model: a}]\n"),
        bare("arcee-fusion", {"--base", "base", "--task", "a"})));
    CHECK(same(m.result("merge_method: nearswap\nbase_model: base\nmodels: [{model: base}, {model: a}]\n"
                        "parameters: {t: 0.01}\n"),
        bare("nearswap", {"--base", "base", "--task", "a", "--t", "0.01"})));
    CHECK(same(m.result("merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 0.5}}]\n"),
        bare("passthrough", {"--task", "a", "--scale", "0.5"})));
    CHECK(same(m.result("merge_method: ties\nbase_model: base\n" + tasks + "parameters: {density: 0.4}\n",
                   {"--semantics", "paper"}),
        line("ties", {"--density", "0.4"})));
    CHECK(same(m.result("merge_method: linear\ndtype: bfloat16\nout_dtype: float16\n" + tasks),
        line("average", {"--dtype", "f16"}, false)));
}

TEST_CASE("models of a Hub's cache, slices of all layers, values of each model, and a base among the models")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto expected = m.merged({"--method", "slerp", "--base", "base", "--task", "a", "--t", "0.3"});
    const auto slices = [](const std::string& range) {
        return "slices:\n  - sources:\n      - {model: base, layer_range: [0, 3]}\n      - {model: a, layer_range: "
            + range + "}\nmerge_method: slerp\nbase_model: base\nparameters:\n  t: [0.3]\n";
    };
    CHECK(same(m.result(slices("[0, 3]")), expected));
    has(m.refusal(slices("[0, 2]")), "config.yml:4:33: 'a' gives 2 layers and 'base' 3");
    has(m.refusal(slices("[1, 4]")), "config.yml:4:33: layer_range [1, 4]: 'a' has the layers [0, 3]");
    has(m.refusal(slices("[2, 2]")), "config.yml:4:33: 'a' gives 0 layers and 'base' 3");
    has(m.refusal(slices("[2, 1]")), "config.yml:4:33: layer_range [2, 1]: ");
    has(m.refusal(slices("[0, 2.5]")), "config.yml:4:33: layer_range [0, 2.5]: ");

    const auto snapshot = m.folder / "hub/models--some--tune/snapshots/0123abcd";
    std::filesystem::create_directories(snapshot);
    std::filesystem::create_directories(m.folder / "hub/models--some--tune/refs");
    std::ofstream(m.folder / "hub/models--some--tune/refs/main") << "0123abcd\n";
    std::filesystem::copy(m.folder / "a/model.safetensors", snapshot / "model.safetensors");
    m.write("merge_method: slerp\nbase_model: base\nmodels: [{model: some/tune}]\nparameters: {t: 0.3}\n");
    std::filesystem::remove_all(m.folder / "out");
    const auto done = run(m.folder, {"run", "config.yml", "--out", "out"}, {"HF_HUB_CACHE=hub"});
    CHECK(done.code == 0);
    CHECK(same(read_values(m.folder / "out/model.safetensors"), expected));

    // What each model says of itself wins; equal densities are one.
    CHECK(same(m.result("merge_method: ties\nbase_model: base\nmodels:\n"
                        "  - model: base\n"
                        "  - {model: a, parameters: {density: 0.3, weight: 0.75}}\n"
                        "  - {model: b, parameters: {density: 0.3}}\n"
                        "parameters: {weight: 0.5, density: 0.9}\n"),
        m.merged({"--method", "ties", "--semantics", "mergekit", "--base", "base", "--task", "a=0.75", "--task",
            "b=0.5", "--density", "0.3"})));
}

TEST_CASE("filters and gradients give each tensor the number that mergekit gives it")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    // Three layers over [0, 1, 0.5]: 0, 1, 0.5 themselves; over [1, 0]: 1, 0.5, 0. No layer: the first number.
    const std::string text = "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
                             "  - model: a\n    parameters:\n      weight:\n"
                             "        - {filter: attn, value: [0, 1, 0.5]}\n"
                             "        - {filter: 'layers.1', value: 0.125}\n"
                             "        - {filter: 'layers*', value: 77}\n" // a text, no pattern
                             "        - value: [1, 0]\n"
                             "  - model: b\n    parameters: {weight: 0}\n";
    const auto found = m.result(text);
    const std::map<std::string, float> factors{{"embed.weight", 1.0f}, {"norm.weight", 1.0f},
        {"layers.0.attn.weight", 0.0f}, {"layers.1.attn.weight", 1.0f}, {"layers.2.attn.weight", 0.5f},
        {"layers.0.mlp.weight", 1.0f}, {"layers.1.mlp.weight", 0.125f}, {"layers.2.mlp.weight", 0.0f}};
    for (const auto& one : factors) {
        const auto& name = one.first;
        CAPTURE(name);
        for (std::size_t i = 0; i < 42; ++i) {
            REQUIRE(found.at(name).values[i] == one.second * m.a.at(name).values[i]);
        }
    }
    const auto explained = m.run_it({"--explain"});
    CHECK(explained.code == 0);
    has(explained.out, "layers.1.mlp.weight: weights 0.125 0\n");
    has(explained.err, "config.yml:9:38: weight: the filter matches no tensor that takes part");
    // Two values between three layers, of an option of all models.
    const auto along = m.result("merge_method: slerp\nbase_model: base\nmodels: [{model: a}]\n"
                                "parameters: {t: [0.2, 0.4]}\n");
    for (const auto& [name, t] : {std::pair{"layers.0.mlp.weight", "0.2"}, {"norm.weight", "0.2"},
             {"layers.2.attn.weight", "0.4"}, {"layers.1.attn.weight", "0.30000000000000004"}}) {
        const auto alone = m.merged({"--method", "slerp", "--base", "base", "--task", "a", "--t", t});
        CHECK(along.at(name).values == alone.at(name).values);
    }
}

TEST_CASE("slices put layers of several models together, numbered anew")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    std::ofstream(m.folder / "a/config.json")
        << R"({"model_type": "x", "num_hidden_layers": 3, "layer_types": ["full", "sliding", "linear"]})";
    std::ofstream(m.folder / "b/config.json") << R"({"num_hidden_layers": 3, "layer_types": ["p", "q", "r"]})";
    const auto out = m.result("slices:\n"
                              "  - sources: [{model: a, layer_range: [0, 2]}]\n"
                              "  - sources: [{model: a, layer_range: [1, 3]}]\n"
                              "  - sources: [{model: b, layer_range: [2, 3], parameters: {scale: 0.5}}]\n"
                              "merge_method: passthrough\n");
    CHECK(out.size() == 12);
    for (const auto& [to, model, from] : std::vector<std::tuple<int, const values_model*, int>>{
             {0, &m.a, 0}, {1, &m.a, 1}, {2, &m.a, 1}, {3, &m.a, 2}}) {
        for (const std::string part : {".attn.weight", ".mlp.weight"}) {
            CHECK(out.at("layers." + std::to_string(to) + part).values
                == model->at("layers." + std::to_string(from) + part).values);
        }
    }
    auto halves = m.b.at("layers.2.mlp.weight").values;
    for (auto& value : halves) { value *= 0.5f; }
    CHECK(out.at("layers.4.mlp.weight").values == halves);
    CHECK(out.at("embed.weight").values == m.a.at("embed.weight").values); // the first slice's
    halves = m.b.at("norm.weight").values; // the last slice's, parameters too
    for (auto& value : halves) { value *= 0.5f; }
    CHECK(out.at("norm.weight").values == halves);
    const auto config = nlohmann::json::parse(slurp(m.folder / "out/config.json"));
    CHECK(config["num_hidden_layers"] == 5);
    CHECK(config["layer_types"] == std::vector<std::string>{"full", "sliding", "sliding", "linear", "r"});

    // A merge in slices that come to the whole is the merge of the whole, where values are one for all.
    const std::string end = "merge_method: ties\nbase_model: base\nparameters: {weight: 0.5, density: 0.4}\n";
    const auto slice = [](const std::string& range) {
        std::string text = "  - sources:\n";
        for (const auto* name : {"a", "base", "b"}) {
            text += "      - {model: " + std::string(name) + ", layer_range: " + range + "}\n";
        }
        return text;
    };
    CHECK(same(m.result("slices:\n" + slice("[0, 1]") + slice("[1, 3]") + end),
        m.result("slices:\n" + slice("[0, 3]") + end)));

    has(m.refusal("slices:\n  - sources: [{model: a, layer_range: [0, 2]}, {model: base, layer_range: [0, 2]}]\n"
                  "  - sources: [{model: a, layer_range: [2, 3]}]\n"
            + end),
        "config.yml:3:23: the base 'base' is not among the sources of the slice");
    has(m.refusal("slices:\n" + slice("[0, 2]")
            + "  - sources: [{model: a, layer_range: [2, 3]}, {model: base, "
              "layer_range: [2, 3]}]\n"
            + end),
        "this slice merges 1 model and the first 2");
}

TEST_CASE("config.json says of slices of which kind each layer is, or a note says that it cannot")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    using nlohmann::json;
    // Layers 0, 1, 1, 2, or those of `slices`. Returns what config.json says then, and the notes.
    const auto sliced = [&](json config, const std::vector<std::string>& slices = {"[0, 2]", "[1, 3]"},
                            const std::string& model = "a") {
        config["num_hidden_layers"] = 3;
        spill(m.folder / model / "config.json", config.dump());
        std::string text = "merge_method: passthrough\nslices:\n";
        for (const auto& range : slices) {
            text += "  - sources: [{model: " + model + ", layer_range: " + range + "}]\n";
        }
        std::filesystem::remove_all(m.folder / "out");
        m.write(text);
        const auto done = m.run_it();
        REQUIRE(done.code == 0);
        return std::pair(json::parse(slurp(m.folder / "out/config.json")), done.err);
    };
    const auto becomes = [&](const json& before, const json& after,
                             const std::vector<std::string>& slices = {"[0, 2]", "[1, 3]"}) {
        const auto [config, notes] = sliced(before, slices);
        CAPTURE(before.dump());
        for (const auto& [key, value] : after.items()) { CHECK(config[key] == value); }
        CHECK(notes.find("config.json: ") == notes.npos);
    };
    // Numbers of layers, one word for each, and patterns of words.
    becomes({{"mlp_only_layers", {1}}}, {{"mlp_only_layers", {1, 2}}, {"num_hidden_layers", 4}});
    becomes({{"moe_layers", {0, 1, 2}}}, {{"moe_layers", {0, 1, 2, 3}}});
    becomes({{"attn_layer_indices", {0, 2}}}, {{"attn_layer_indices", {0, 3}}});
    becomes({{"activation_sparsity_pattern", {0.5, 0.25, 0}}}, {{"activation_sparsity_pattern", {0.5, 0.25, 0.25, 0}}});
    becomes({{"hybrid_override_pattern", "M*-"}}, {{"hybrid_override_pattern", "M**-"}});
    becomes({{"block_types", {"r", "a"}}}, {{"block_types", {"r", "a", "a", "r"}}});
    becomes({{"block_types", {"r", "r", "a"}}}, {{"block_types", {"r", "r", "a"}}}, {"[0, 3]", "[0, 1]"});
    becomes(json::parse(R"({"attention_types": [[["global", "local"], 1], [["global"], 1]]})"),
        json::parse(R"({"attention_types": [[["global"], 1], [["local"], 1], [["local"], 1], [["global"], 1]]})"));
    // Numbers that layers are compared with: those that say it, as few of them as will do other than they were.
    becomes({{"first_k_dense_replace", 1}}, {{"first_k_dense_replace", 1}});
    becomes({{"first_k_dense_replace", 2}}, {{"first_k_dense_replace", 3}});
    becomes({{"first_k_dense_replace", 1}}, {{"first_k_dense_replace", 0}}, {"[1, 3]"});
    becomes({{"moe_layer_start_index", 1}, {"moe_layer_end_index", 1}, {"moe_layer_interval", 1}},
        {{"moe_layer_start_index", 1}, {"moe_layer_end_index", 2}, {"moe_layer_interval", 1}});
    becomes({{"attn_layer_period", 3}, {"attn_layer_offset", 2}}, {{"attn_layer_period", 4}, {"attn_layer_offset", 3}});
    becomes({{"expert_layer_period", 2}, {"expert_layer_offset", 1}},
        {{"expert_layer_period", 2}, {"expert_layer_offset", 0}}, {"[1, 3]"});
    becomes({{"sliding_window_pattern", 2}, {"layer_types", {"s", "f", "s"}}},
        {{"sliding_window_pattern", 2}, {"layer_types", {"s", "f", "f", "s"}}});
    for (const auto& [key, before] : std::map<std::string, json>{
             {"attn_layer_period and attn_layer_offset", {{"attn_layer_period", 2}, {"attn_layer_offset", 1}}},
             {"sliding_window_pattern", {{"sliding_window_pattern", 2}}},
             {"sliding_window_pattern ", {{"model_type", "gemma2"}}}}) {
        const auto [config, notes] = sliced(before);
        has(notes, "config.json: " + key.substr(0, key.find_last_not_of(' ') + 1) + " tell");
        for (const auto& [name, value] : before.items()) { CHECK(config[name] == value); }
    }
    // The first layer has tensors that others have not, and nothing tells it.
    std::filesystem::create_directories(m.folder / "mixed");
    auto mixed = m.a;
    mixed.erase("layers.0.mlp.weight");
    write_values(m.folder / "mixed/model.safetensors", mixed);
    const auto notes_of = [&](const json& config, const std::vector<std::string>& slices) {
        return sliced(config, slices, "mixed").second;
    };
    const std::string differ = "config.json: layers 0 and 2 of the result hold different tensors";
    has(notes_of(json::object(), {"[0, 1]", "[0, 3]"}), differ);
    CHECK(notes_of(json::object(), {"[0, 2]", "[2, 3]"}).find("hold different") == std::string::npos);
    CHECK(notes_of({{"layer_types", {"p", "q", "q"}}}, {"[0, 1]", "[0, 3]"}).find("different") == std::string::npos);
    CHECK(notes_of({{"first_k_dense_replace", 1}}, {"[0, 1]", "[0, 3]"}).find("different") == std::string::npos);
    has(notes_of({{"layer_types", {"p", "p", "q"}}}, {"[0, 1]", "[0, 3]"}), differ);
}

TEST_CASE("lists of config.json over layers follow them, whatever they are called, or are noted")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    using nlohmann::json;
    values_model deep;
    for (int i = 0; i < 8; ++i) { deep["layers." + std::to_string(i) + ".mlp.weight"] = m.a.at("layers.0.mlp.weight"); }
    std::filesystem::create_directories(m.folder / "deep");
    write_values(m.folder / "deep/model.safetensors", deep);
    const auto sliced = [&](const json& config, const std::string& last) { // layers 0 and 1, and those from `last` on
        spill(m.folder / "deep/config.json", config.dump());
        (void)m.result("merge_method: passthrough\nslices:\n  - sources: [{model: deep, layer_range: [0, 2]}]\n"
                       "  - sources: [{model: deep, layer_range: ["
            + last + ", 8]}]\n");
        return json::parse(slurp(m.folder / "out/config.json"));
    };
    const json before{{"num_hidden_layers", 8}, {"activation_sparsity_pattern", {.5, .5, .5, .25, 0, 0, 0, 0}},
        {"intermediate_size", {10, 20, 30, 40, 50, 60, 70, 80}}, {"num_attention_heads", 4},
        {"value_embedding_layers", {0, 2, 7}}, {"rope_scaling_layers", {0, 1, 2, 3, 4, 5, 6, 7}},
        {"no_rope_layers", {1, 1, 1, 0, 1, 1, 1, 0}}, {"layer_scales", {3, 2, 1, 1, 1, 1, 1, 1}},
        {"mrope_section", {16, 24, 24}}, {"widths", {1, 2, 3, 4, 5, 6, 7, 8}}};
    const auto after = sliced(before, "1");
    const json expected{{"num_hidden_layers", 9}, {"activation_sparsity_pattern", {.5, .5, .5, .5, .25, 0, 0, 0, 0}},
        {"intermediate_size", {10, 20, 20, 30, 40, 50, 60, 70, 80}}, {"num_attention_heads", 4},
        {"value_embedding_layers", {0, 3, 8}}, {"rope_scaling_layers", {0, 1, 2, 3, 4, 5, 6, 7, 8}},
        {"no_rope_layers", {1, 1, 1, 1, 0, 1, 1, 1, 0}}, {"layer_scales", {3, 2, 2, 1, 1, 1, 1, 1, 1}},
        {"mrope_section", {16, 24, 24}}, {"widths", before["widths"]}};
    for (const auto& one : expected.items()) {
        const auto& key = one.key();
        CHECK_MESSAGE(after[key] == one.value(), key);
    }
    std::filesystem::remove_all(m.folder / "out");
    const auto done = m.run_it();
    has(done.err, "config.json: widths has an entry for each of 8 layers as it seems, and is not known here");
    CHECK(done.err.find("config.json: mrope_section") == done.err.npos);
    (void)sliced(before, "2"); // the model as it was
    std::filesystem::remove_all(m.folder / "out");
    CHECK(m.run_it().err.find("config.json: widths") == std::string::npos);
}

TEST_CASE("lists are spread over the layers of a model, not over those for predicting further tokens")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto spread = [&](bool own) { // whether the last layer has a tensor of its own
        for (const auto& [name, model] : {std::pair{"base", &m.base}, {"a", &m.a}}) {
            auto further = *model;
            for (const auto* part : {".attn.weight", ".mlp.weight"}) {
                further[std::string("layers.3") + part] = model->at(std::string("layers.2") + part);
            }
            if (own) { further["layers.3.eh_proj.weight"] = model->at("layers.0.mlp.weight"); }
            write_values(m.folder / name / "model.safetensors", further);
            spill(m.folder / name / "config.json", R"({"num_hidden_layers": 3})");
        }
        const auto out = m.result("merge_method: task_arithmetic\nbase_model: base\n"
                                  "models: [{model: a, parameters: {weight: [0, 1]}}]\n");
        const auto along = m.merged({"--method", "slerp", "--base", "base", "--task", "a", "--t", "0,1"});
        for (const auto& [name, t] : std::map<std::string, double>{{"layers.0.mlp.weight", 0},
                 {"layers.1.attn.weight", own ? 1.0 / 2 : 1.0 / 3}, {"layers.2.mlp.weight", own ? 1 : 2.0 / 3},
                 {"layers.3.mlp.weight", 1}, {"layers.3.attn.weight", 1}, {"norm.weight", 0}}) {
            CAPTURE_BOUND(name);
            const bool further = name.starts_with("layers.3");
            const auto of = further ? "layers.2" + name.substr(8) : name;
            for (std::size_t i = 0; i < 42; ++i) {
                const double from = m.base.at(of).values[i], to = m.a.at(of).values[i];
                CHECK(out.at(name).values[i] == doctest::Approx(from + t * (to - from)).epsilon(1e-5));
            }
            if (name == "norm.weight") { continue; } // it has --t's default
            std::ostringstream number;
            number.precision(17);
            number << t;
            const auto alone = m.merged({"--method", "slerp", "--base", "base", "--task", "a", "--t", number.str()});
            CHECK(along.at(name).values == alone.at(name).values);
        }
    };
    spread(true);
    spread(false); // a fourth layer as the others are, which config.json does not know
}

TEST_CASE("the norm and the head of linear slices are of as many models as the first slice has")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto slices = [](const std::string& semantics) {
        return "merge_method: linear\nparameters: {weight: 1}\ntaskvec: {semantics: " + semantics
            + "}\nslices:\n  - sources: [{model: b, layer_range: [0, 2]}]\n"
              "  - sources: [{model: a, layer_range: [2, 3]}, {model: b, layer_range: [2, 3]}]\n";
    };
    const auto half = [&](const std::string& name, std::size_t i) {
        return (m.a.at(name).values[i] + m.b.at(name).values[i]) / 2;
    };
    const auto theirs = m.result(slices("mergekit")), ours = m.result(slices("paper"));
    CHECK(theirs.at("norm.weight").values == m.a.at("norm.weight").values);
    CHECK(theirs.at("embed.weight").values == m.b.at("embed.weight").values);
    for (std::size_t i = 0; i < 42; ++i) {
        CHECK(ours.at("norm.weight").values[i] == doctest::Approx(half("norm.weight", i)));
        CHECK(theirs.at("layers.2.mlp.weight").values[i] == doctest::Approx(half("layers.2.mlp.weight", i)));
    }
}

TEST_CASE("models that are none are refused with their place")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    for (const auto* folder : {"empty", "cut", "lora"}) { std::filesystem::create_directories(m.folder / folder); }
    const auto whole = slurp(m.folder / "a/model.safetensors");
    spill(m.folder / "cut/model.safetensors", whole.substr(0, whole.size() - 100));
    spill(m.folder / "text", "x");
    spill(m.folder / "lora/adapter_model.safetensors", slurp(m.folder / "a/model.safetensors"));
    for (const auto* model : {"empty", "empty/", "cut", "text", "lora", "a+b", "a+empty"}) {
        CAPTURE(model);
        has(m.refusal(
                std::string("merge_method: linear\nmodels:\n  - {model: b, parameters: {weight: 1}}\n  - {model: ")
                + model + ", parameters: {weight: 1}}\n"),
            "error: config.yml:4:13: ");
    }
    has(m.refusal("merge_method: ties\nbase_model: empty\n" + tasks), "error: config.yml:2:13: empty: ");
    has(m.refusal("merge_method: passthrough\nslices:\n  - sources: [{model: cut, layer_range: [0, 2]}]\n"),
        "error: config.yml:3:23: cut/model.safetensors: ");
}

TEST_CASE("options and configurations of mergekit's other commands are refused with what to do instead")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    has(m.refusal("base_model: base\ngate_mode: hidden\nexperts: [{source_model: a}]\n"),
        "config.yml:2:1: 'gate_mode' is a key of mergekit's other command mergekit-moe");
    has(m.refusal("genome:\n  models: [a, b]\n"), "config.yml:1:1: 'genome' is a key of");
    has(m.refusal("layer_slices:\n  - {model: a, start: 0, end: 2}\n"), "passthrough with slices: [");
    m.write("merge_method: linear\n" + tasks);
    for (const auto& [word, instead] : std::map<std::string, std::string>{{"--lazy-unpickle", "always so"},
             {"--no-cuda", "--device cuda"}, {"--out-shard-size=5B", "--shard-size 5GB"}, {"-j", "--threads"}}) {
        const auto done = m.run_it({word});
        CHECK(done.code == 2);
        CHECK(is_error_line(done.err));
        has(done.err, "is an option of mergekit-yaml: ");
        has(done.err, instead);
        has(done.err, "(docs/migrate.md)");
    }
    const auto other = m.run_it({"--such-as-this"});
    CHECK(other.code == 2);
    CHECK(other.err.find("mergekit") == std::string::npos);
}

TEST_CASE("heads that are tied in one of the models of slices come out as the last model's")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto tensor = [](float first) {
        values_tensor made{taskvec::dtype::f32, {4, 3}, std::vector<float>(12)};
        for (auto& value : made.values) { value = first++; }
        return made;
    };
    const values_model tied{{"model.embed_tokens.weight", tensor(1)}, {"model.layers.0.w", tensor(2)}};
    const values_model own{
        {"model.embed_tokens.weight", tensor(3)}, {"model.layers.0.w", tensor(4)}, {"lm_head.weight", tensor(5)}};
    for (const auto& [name, model, says] : std::vector<std::tuple<std::string, const values_model*, const char*>>{
             {"tied", &tied, "true"}, {"own", &own, "false"}}) {
        std::filesystem::create_directories(m.folder / name);
        write_values(m.folder / name / "model.safetensors", *model);
        std::ofstream(m.folder / name / "config.json")
            << R"({"num_hidden_layers": 1, "tie_word_embeddings": )" << says << "}";
    }
    const auto made = [&](const std::string& first, const std::string& last) {
        return m.result("slices:\n  - sources: [{model: " + first + ", layer_range: [0, 1]}]\n  - sources: [{model: "
            + last + ", layer_range: [0, 1]}]\nmerge_method: passthrough\n");
    };
    const auto says_tied = [&] {
        return nlohmann::json::parse(slurp(m.folder / "out/config.json"))["tie_word_embeddings"].get<bool>();
    };
    CHECK(made("tied", "own").at("lm_head.weight").values == tensor(5).values);
    CHECK_FALSE(says_tied());
    CHECK(made("own", "tied").at("lm_head.weight").values == tensor(1).values);
    CHECK_FALSE(says_tied());
    CHECK_FALSE(made("tied", "tied").contains("lm_head.weight"));
    CHECK(says_tied());
    const auto explained = m.run_it({"--explain"});
    CHECK(explained.code == 0);
    has(explained.out, "model.layers.1.w: ");
}

TEST_CASE("models have densities of their own, as options of their tasks")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const std::vector<std::string> head{"--method", "ties", "--semantics", "mergekit", "--base", "base"};
    auto words = head;
    words.insert(words.end(),
        {"--task", "a=0.5", "--task-density", "0.3", "--task", "b=0.5", "--task-density", "1", "--task-density",
            "attn=0.6"});
    const auto expected = m.merged(words);
    CHECK(same(m.result("merge_method: ties\nbase_model: base\nmodels:\n"
                        "  - {model: a, parameters: {density: 0.3}}\n"
                        "  - {model: b, parameters: {density: [{filter: attn, value: 0.6}]}}\n"
                        "parameters: {weight: 0.5}\n"),
        expected));
    words = head;
    words.insert(words.end(), {"--density", "0.3", "--task", "a=0.5", "--task", "b=0.5"});
    const auto one = m.merged(words);
    words.insert(words.end(), {"--task-density", "0.3"});
    CHECK(same(m.merged(words), one)); // a has the density of all
    CHECK_FALSE(same(expected, one));

    const auto wrong = [&](std::vector<std::string> more, const std::string& part) {
        more.insert(more.begin(), "merge");
        more.insert(more.end(), {"--base", "base", "--out", "never"});
        const auto done = run(m.folder, more);
        CHECK(done.code == 2);
        has(done.err, part);
    };
    wrong({"--method", "ties", "--task", "a", "--task-density", "1.5"}, "--task-density");
    wrong({"--method", "ties", "--task-density", "0.5", "--task", "a"}, "stands before every --task");
    wrong({"--method", "ties", "--task", "a", "--task-gamma", "0.5"}, "--method ties takes no gamma of each task");
    wrong({"--method", "sce", "--task", "a", "--task-density", "0.5"},
        "--method sce takes no density of each task: give one for all");
}

TEST_CASE("what is wrong with a configuration is said with its place")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const std::string head = "merge_method: ties\nbase_model: base\n";
    has(m.refusal("merge_metod: ties\n"),
        "config.yml:1:1: 'merge_metod' is no key of a configuration; did you mean 'merge_method'?");
    has(m.refusal(head + tasks + "parameters:\n  densty: 0.5\n"),
        "config.yml:9:3: 'densty' is no key of parameters; did you mean 'density'?");
    has(m.refusal(head + tasks + "parameters:\n  density: much\n"),
        "config.yml:9:12: density is 'much'; expected a number");
    has(m.refusal(head + tasks + "parameters:\n  density: -1\n"), "config.yml:9:12: density");
    has(m.refusal(head + tasks + "parameters:\n  lambda: {filter: attn}\n"),
        "config.yml:9:11: 'lambda': a filter without a 'value'");
    has(m.refusal(head + tasks + "parameters: 3\n"), "config.yml:8:13: parameters is '3'; expected a mapping");
    has(m.refusal(head + tasks + "dtype: float8\n"), "config.yml:8:8: dtype is 'float8'");
    has(m.refusal(head + tasks + "merge_method: ties\n"), "config.yml:8:1: 'merge_method' stands twice");
    has(m.refusal(head + "models: [{model: a}]\n"), "config.yml:3:18: 'weight' of 'a' is missing");
    has(m.refusal(head + "models: [{model: a, parameters: {weight: [{filter: attn, value: 1}]}}]\n"),
        "add one without a filter");
    has(m.refusal(head + "models: [{model: some/where}]\n"), "config.yml:3:18: there is no model 'some/where'");
    has(m.refusal(head + "models: [{model: a}, {model: a}]\n"), "config.yml:3:30: 'a' stands twice");
    has(m.refusal("merge_method: ties\n" + tasks), "config.yml:1:15: merge_method 'ties' needs a 'base_model'");
    has(m.refusal("merge_method: arcee_fusion\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"),
        "config.yml:3:30: merge_method 'arcee_fusion' takes 1 model beside the base; here are 2");
    has(m.refusal("merge_method: della\nbase_model: base\n" + tasks + "parameters: {density: 0.2, epsilon: 0.3}\n"),
        "config.yml:8:37: epsilon is 0.3 and density 0.2; expected an epsilon from 0 to below 0.2");
    // How many models a method takes.
    const std::string three = "models: [{model: a}, {model: b}, {model: base}]\n",
                      both = "models: [{model: a}, {model: b}]\n";
    has(m.refusal("merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\n" + both),
        "config.yml:4:30: merge_method 'slerp' takes 1 model beside the base; here are 2");
    has(m.refusal("merge_method: nearswap\nbase_model: base\nparameters: {t: 0.5}\n" + both),
        "config.yml:4:30: merge_method 'nearswap' takes 1 model");
    has(m.refusal("merge_method: passthrough\n" + both), "config.yml:2:30: merge_method 'passthrough' takes 1 model; ");
    has(m.refusal("merge_method: passthrough\nslices:\n"
                  "  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]\n"),
        "config.yml:3:56: merge_method 'passthrough' takes 1 model; here are 2");
    has(m.refusal("merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]\n"),
        "config.yml:1:15: merge_method 'model_stock' takes 2 models beside the base or more; here is 1");
    has(m.refusal("merge_method: nuslerp\nparameters: {weight: 1}\n" + three),
        "config.yml:3:42: merge_method 'nuslerp' takes 2 models; here are 3");
    has(m.refusal("merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nslices:\n  - sources:\n"
                  "      - {model: base, layer_range: [0, 2]}\n      - {model: a, layer_range: [0, 2]}\n"
                  "      - {model: b, layer_range: [0, 2]}\n"),
        "config.yml:8:17: merge_method 'slerp' takes 1 model beside the base; here are 2");
    // What is wrong in the models, and in what values do together, is said with the method.
    m.write("merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
            "  - {model: b, parameters: {weight: -1}}\n");
    const auto cancelled = m.run_it();
    CHECK(cancelled.code == 1);
    has(cancelled.err, "error: config.yml:1:15: the weights of an average sum to 0");
    // Of several documents it is that of the one whose merge it is.
    const auto zero = [](const std::string& model) {
        return "merge_method: linear\nmodels:\n  - {model: " + model + ", parameters: {weight: 1}}\n"
            + "  - {model: b, parameters: {weight: -1}}\n";
    };
    const std::string fine = "merge_method: passthrough\nmodels: [{model: ";
    for (const auto& [text, place] : {std::pair("name: mixed\n" + zero("a") + "---\n" + fine + "mixed}]\n", "2:15"),
             std::pair("name: mixed\n" + fine + "a}]\n---\n" + zero("mixed"), "5:15")}) {
        m.write(text);
        const auto done = m.run_it();
        CHECK(done.code == 1);
        has(done.err, "error: config.yml:" + std::string(place) + ": the weights of an average sum to 0");
    }
    has(m.refusal("merge_method: linear\nmodels: []\n"), "config.yml:2:9: 'models' is an empty list");
    has(m.refusal("merge_method: linear\nmodules: {}\n"), "config.yml:2:1: 'modules' is empty");
    has(m.refusal(head + tasks + "parameters: {int8_mask: maybe}\n"), "config.yml:8:25: int8_mask is 'maybe'");
    has(m.refusal(head + tasks + "parameters: {normalize: [true, false]}\n"),
        "config.yml:8:25: 'normalize' has one value over the layers");
    has(m.refusal("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 0]}]}]\n"),
        "all of the slices are empty");
    const std::string slerps = "merge_method: nuslerp\nbase_model: base\n" + tasks;
    has(m.refusal(slerps + "parameters: {nuslerp_flatten: maybe}\n"),
        "config.yml:8:31: nuslerp_flatten is 'maybe'; expected true or false");
    has(m.refusal(slerps + "parameters: {nuslerp_row_wise: [true, false]}\n"),
        "config.yml:8:32: 'nuslerp_row_wise' has one value for all tensors");
    has(m.refusal("merge_method: multislerp\n" + tasks + "parameters: {eps: 0.25}\n"),
        "config.yml:7:19: eps is '0.25', and no eps above 1e-6 is supported");
    has(m.refusal("merge_method: multislerp\n" + tasks + "parameters: {eps: [1e-8, .inf]}\n"), "config.yml:7:26: eps");
    has(m.refusal("merge_method: tie\n" + tasks), "did you mean 'ties'?");
    for (const std::string other : {"ema", "moe"}) { // like none of them
        has(m.refusal("merge_method: " + other + "\n" + tasks), "'" + other + "' is unknown; expected linear, ");
    }
    has(m.refusal("merge_method: fisher\n" + tasks),
        "config.yml:1:15: merge_method 'fisher' is none of mergekit's, and no configuration can say it; 'taskvec merge "
        "--method fisher' has it");
    has(m.refusal("name: \"a\\0b\"\nmerge_method: linear\n" + tasks + "---\nmerge_method: linear\n" + tasks),
        "config.yml:1:7: name is 'a\\x00b', which has a NUL in it");
    // What has no say is looked at all the same.
    has(m.refusal(head + tasks + "parameters: {weight: foo}\n"), "config.yml:8:22: weight is 'foo'; expected a number");
    has(m.refusal(head + tasks + "parameters: {lambda: [{value: 1}, {filter: mlp, value: foo}]}\n"),
        "config.yml:8:56: lambda is 'foo'; expected a number");
    has(m.refusal(head + tasks + "parameters: {t: foo}\n"), "config.yml:8:17: t is 'foo'; expected a number");
    has(m.refusal(head + "models: [{model: a, parameters: {weight: 1, normalize: maybe}}]\n"),
        "config.yml:3:56: normalize is 'maybe'; expected true or false");
    has(m.refusal(head + tasks + "tokenizer_source: union\n"), "config.yml:8:1: 'tokenizer_source: union'");
    has(m.refusal(head + tasks + "---\n" + head), "config.yml:1:1: 'name' is missing");
    has(m.refusal(head + "models: [\n"), "this is no YAML");
    // A token that may not stand there, of which yaml-cpp makes documents without an end.
    for (const std::string text : {",", "--- ,", "[a], b", "!!str ,", "&a ,"}) {
        CAPTURE(text);
        has(m.refusal(text), "this is no YAML: nothing can begin with what stands here");
    }
    has(m.refusal(""), "is empty");
    has(m.refusal("[]"), "config.yml:1:1: a configuration is a list; expected a mapping");
}

TEST_CASE("configurations that are bombs are answered at once")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n";
    for (int i = 1; i < 40; ++i) {
        const auto last = "*a" + std::to_string(i - 1);
        bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + last;
        for (int k = 0; k < 8; ++k) { bomb += ", " + last; }
        bomb += "]\n";
    }
    has(m.refusal(bomb), "config.yml:1:1: 'a0' is no key");
    has(m.refusal(bomb + "models: *a39\n"), "is no key");
    std::string lines = "merge_method: ties\nbase_model: base\nmodels:\n";
    for (int i = 0; i < 100000; ++i) { lines += "- b\n"; }
    has(m.refusal(lines), "there are more than 1000 models");
    const std::string deep = "more than 50 lists and mappings stand in each other here";
    has(m.refusal("x: " + std::string(600, '[') + std::string(600, ']')), "config.yml:1:53: " + deep); // 1 and 50
    for (const std::size_t depth : {600u, 200000u}) { has(m.refusal("x: " + std::string(depth, '[')), deep); }
    has(m.refusal(std::string(2 << 20, '#')), "more than 1 MiB");

    // Mappings that take each other over again and again: what each says counts once.
    const auto other_name = [](int i) { // of a model that is given already
        std::string name = "a";
        for (; i > 0; --i) { name = "./" + name; }
        return name;
    };
    std::string merges = "merge_method: linear\nmodels:\n  - model: a\n    parameters: &a0 {weight: 0.5}\n",
                plain = "merge_method: linear\nparameters: {weight: 0.5}\nmodels:\n  - model: a\n";
    for (int i = 1; i < 13; ++i) {
        merges += "  - model: " + other_name(i) + "\n    parameters: &a" + std::to_string(i) + " {<<: [";
        for (int k = 0; k < 9; ++k) { merges += (k == 0 ? "*a" : ", *a") + std::to_string(i - 1); }
        merges += "]}\n";
        plain += "  - model: " + other_name(i) + "\n";
    }
    CHECK(same(m.result(merges), m.result(plain)));
    std::string wide = "merge_method: linear\nmodels:\n  - model: a\n    parameters: &a0 {weight: 1}\n"
                       "  - model: b\n    parameters: {<<: [*a0";
    for (int i = 0; i < 100000; ++i) { wide += ",*a0"; }
    has(m.refusal(wide + "]}\n"), "config.yml:6:17: parameters takes over too many others ('<<')");

    // Aliases that make many values of few.
    const auto sliced = [](const std::string& parameters, int slices, const std::string& sources) {
        std::string text = "merge_method: passthrough\nparameters: &p " + parameters + "\nslices:\n" + sources;
        for (int i = 0; i < slices; ++i) { text += "- {sources: *s, parameters: *p}\n"; }
        return text;
    };
    const std::string source = "- sources: &s [{model: a, layer_range: [0, 1]}]\n";
    std::string numbers = "{scale: [1", filters = "{scale: [";
    for (int i = 0; i < 20000; ++i) { numbers += ",1"; }
    has(m.refusal(sliced(numbers + "]}", 3000, source)),
        "config.yml:2:24: 'scale' is a list of 20001 numbers over the layers; expected at most 1000");
    for (int i = 0; i < 10000; ++i) { filters += "{filter: mlp, value: 1},"; }
    has(m.refusal(sliced(filters + "{value: 1}]}", 9000, source)), "have too many values over all slices and models");
    std::string many = "- sources: &s [";
    for (int i = 0; i < 300; ++i) { many += "{model: " + other_name(i) + ", layer_range: [0, 1]},"; }
    has(m.refusal(sliced("{scale: 1}", 9000, many + "]\n")), "there are more than 100000 models in all slices");

    // One filter, one value, one token, again and again.
    std::string list = "1";
    for (int i = 1; i < 1000; ++i) { list += ",1"; }
    std::string same_filter = "merge_method: linear\n" + tasks + "parameters:\n  weight:\n", same_value = same_filter;
    same_filter += "  - &f {filter: x, value: [" + list + "]}\n";
    same_value += "  - {filter: x, value: &v [" + list + "]}\n";
    for (int i = 0; i < 90000; ++i) { same_filter += "  - *f\n"; }
    for (int i = 0; i < 30000; ++i) { same_value += "  - {filter: " + std::to_string(i) + ", value: *v}\n"; }
    const auto without_own = [](std::string text) { // the weights of the models, which count first
        for (const std::string own : {"    parameters: {weight: 0.75}\n", "    parameters: {weight: 0.5}\n"}) {
            text.erase(text.find(own), own.size());
        }
        return text;
    };
    has(m.refusal(without_own(same_filter)), "'weight' and other parameters have too many values");
    has(m.refusal(without_own(same_value)), "'weight' and other parameters have too many values");
    std::string tokens = "merge_method: linear\n" + tasks
        + "tokenizer:\n  tokens:\n    t: &t {source: {model: a, token_id: 0, <<: [&k {kind: model_token}";
    for (int i = 0; i < 150; ++i) { tokens += ",*k"; }
    tokens += "]}}\n";
    for (int i = 0; i < 50000; ++i) { tokens += "    t" + std::to_string(i) + ": *t\n"; }
    has(m.refusal(tokens), "'a' has no tokenizer.json, by which tokens are told apart");
    std::string uneven = "merge_method: linear\nparameters: {weight: 1}\nslices:\n" + many + "]\n- sources: &o [";
    uneven += "{model: a, layer_range: [0, 1]}]\n";
    for (int i = 0; i < 9000; ++i) { uneven += "- {sources: *o}\n"; }
    has(m.refusal(uneven), "there are more than 100000 models in all slices");

    // As many filters as a file has lines: those that match nothing are counted.
    std::string lines_of_filters =
        "merge_method: task_arithmetic\nbase_model: base\n" + tasks + "parameters:\n  lambda:\n";
    for (int i = 0; i < 25000; ++i) { lines_of_filters += "    - {filter: f" + std::to_string(i) + ", value: 3}\n"; }
    m.write(lines_of_filters + "    - value: 0.5\n");
    const auto done = m.run_it();
    CHECK(done.code == 0);
    has(done.err, "config.yml:10:27: lambda: the filter matches no tensor that takes part");
    has(done.err, "24,995 more filters match no tensor that takes part");
    CHECK(same(read_values(m.folder / "out/model.safetensors"),
        m.result("merge_method: task_arithmetic\nbase_model: base\n" + tasks + "parameters: {lambda: 0.5}\n")));
}

TEST_CASE("a merge writes the configuration that makes it again, bit for bit")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    using words = std::vector<std::string>;
    const words with_base{"--base", "base"}, two{"--task", "a=0.75", "--task", "b=0.5"}, one{"--task", "a"};
    const auto joined = [](std::initializer_list<words> parts) {
        words all;
        for (const auto& part : parts) { all.insert(all.end(), part.begin(), part.end()); }
        return all;
    };
    for (const auto& line : {joined({{"--method", "average", "--unnormalized"}, two}),
             joined({{"--method", "task-arithmetic"}, with_base, two}),
             joined({{"--method", "task-arithmetic", "--semantics", "mergekit", "--lambda", "mlp=0.5", "--lambda",
                         "layers.1.mlp=0.25", "--lambda", "0.75"},
                 with_base, two}),
             joined({{"--method", "ties", "--density", "0.4", "--scope", "tensor", "--zero-sign", "positive"},
                 with_base, two}),
             joined({{"--method", "ties", "--semantics", "ties-merging", "--merge-weights", "max", "--dtype", "bf16"},
                 with_base, {"--task", "a", "--task-density", "0.5", "--task", "b", "--weight", "attn=0.25"}}),
             joined({{"--method", "ties", "--semantics", "mergekit", "--rescale"}, with_base, two}),
             joined({{"--method", "dare-ties", "--seed", "11"}, with_base, two}),
             joined({{"--method", "dare", "--rescale-by", "l1"}, with_base, two}),
             joined({{"--method", "breadcrumbs", "--gamma", "0.02"}, with_base, two}),
             joined({{"--method", "slerp", "--t", "0.3"}, with_base, one}),
             joined({{"--method", "nuslerp"}, with_base, two}),
             joined({{"--method", "nuslerp", "--angles-between", "rows"}, with_base, two}),
             joined({{"--method", "nuslerp", "--angles-between", "columns"}, two}),
             joined({{"--method", "model-stock"}, with_base, {"--task", "a", "--task", "b"}}),
             joined(
                 {{"--method", "model-stock", "--angles-between", "rows"}, with_base, {"--task", "a", "--task", "b"}}),
             joined({{"--method", "model-stock", "--angles-between", "columns"}, with_base,
                 {"--task", "a", "--task", "b"}}),
             joined({{"--method", "karcher", "--steps", "30", "--tolerance", "1e-9"}, {"--task", "a", "--task", "b"}}),
             joined({{"--method", "multi-slerp"}, two}),
             joined({{"--method", "sce", "--density", "0.3"}, with_base, {"--task", "a", "--task", "b"}})}) {
        auto given = line;
        given.insert(given.end(), {"--as-config", "written.yml"});
        const auto expected = m.merged(given);
        std::ifstream file(m.folder / "written.yml");
        const std::string text(std::istreambuf_iterator<char>(file), {});
        CHECK(same(m.result(text), expected));
    }
}

TEST_CASE("the configuration that a merge of several dtypes writes gives each tensor the same one")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    using taskvec::dtype;
    const auto give = [&](const std::string& name, const values_model& like, dtype of_weights, dtype of_norms) {
        auto model = like;
        for (auto& [tensor, values] : model) {
            values.dtype = tensor == "norm.weight" ? of_norms : of_weights;
            for (auto& value : values.values) { value = rounded(values.dtype, value); }
        }
        std::filesystem::create_directories(m.folder / name);
        write_values(m.folder / name / "model.safetensors", model);
    };
    give("base16", m.base, dtype::bf16, dtype::bf16);
    give("mixed", m.base, dtype::bf16, dtype::f32);
    give("half", m.b, dtype::f16, dtype::f16);
    struct expectation {
        std::string base, said;
        dtype of_weights, of_norms;
    };
    for (const auto& [base, said, of_weights, of_norms] :
        {expectation{"base16", "\nout_dtype: bfloat16\n", dtype::bf16, dtype::bf16},
            expectation{"mixed", "\n  dtype: keep", dtype::bf16, dtype::f32},
            expectation{"base", "\nout_dtype: float32\n", dtype::f32, dtype::f32}}) {
        for (const std::vector<std::string>& more :
            {std::vector<std::string>{}, std::vector<std::string>{"--dtype", "keep"}}) {
            std::vector<std::string> words{"--method", "task-arithmetic", "--base", base, "--task", "a=0.5", "--task",
                "half=0.25", "--as-config", "written.yml"};
            words.insert(words.end(), more.begin(), more.end());
            const auto expected = m.merged(words);
            CHECK(expected.at("layers.1.mlp.weight").dtype == of_weights);
            CHECK(expected.at("norm.weight").dtype == of_norms);
            const auto text = slurp(m.folder / "written.yml");
            CHECK(has(text, said));
            CHECK(same(m.result(text), expected));
        }
    }
    has(m.refusal("merge_method: linear\nout_dtype: float32\n" + tasks + "taskvec: {dtype: keep}\n"),
        "config.yml:8:11: 'dtype: keep' is given beside 'out_dtype' of config.yml:2:1; expected one of them");
    has(m.refusal("merge_method: linear\n" + tasks + "taskvec: {dtype: bf16}\n"),
        "config.yml:7:18: dtype under 'taskvec' is 'bf16'; expected keep");
}

TEST_CASE("what no configuration can say is refused before anything is written")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto refused = [&](std::vector<std::string> line) {
        line.insert(line.begin(), "merge");
        line.insert(line.end(), {"--out", "merged", "--as-config", "written.yml"});
        const auto done = run(m.folder, line);
        CHECK(done.code == 2);
        CHECK_FALSE(std::filesystem::exists(m.folder / "merged"));
        CHECK_FALSE(std::filesystem::exists(m.folder / "written.yml"));
        return done.err;
    };
    CHECK(has(refused({"--method", "ties", "--base", "base", "--task", "a", "--include", "mlp"}), "--include"));
    CHECK(has(refused({"--method", "ties", "--base", "base", "--task", "a", "--density", "mlp.weight$=0.1"}),
        "'mlp.weight$'"));
    CHECK(has(refused({"--method", "ties", "--base", "base", "--task", "a", "--density", "0.1,0.2"}), "layers"));
    CHECK(has(refused({"--method", "average", "--base", "base", "--task", "a", "--task", "b"}), "--base"));
    CHECK(has(refused({"--method", "task-arithmetic", "--base", "base", "--task", "a", "--task", "a"}), "twice"));
    CHECK(has(refused({"--method", "slerp", "--base", "base", "--task", "a", "--task", "b"}), "2 tasks of slerp"));
    // Weights of a method whose models mergekit weighs alike.
    CHECK(has(refused({"--method", "karcher", "--task", "a=0.3", "--task", "b=0.6"}),
        "--as-config: a configuration cannot say the weight of 'a' with --method karcher; mergekit's 'karcher' "
        "weighs"));
    CHECK(has(refused({"--method", "karcher", "--task", "a", "--task", "b", "--weight", "attn=0.25"}),
        "the weight of 'b' with --method karcher"));
    std::filesystem::create_directories(m.folder / "lora");
    write_values(m.folder / "lora/adapter_model.safetensors",
        {{"base_model.model.layers.0.mlp.lora_A.weight", {taskvec::dtype::f32, {1, 7}, std::vector<float>(7, 0.5F)}},
            {"base_model.model.layers.0.mlp.lora_B.weight",
                {taskvec::dtype::f32, {6, 1}, std::vector<float>(6, 0.5F)}}});
    spill(m.folder / "lora/adapter_config.json", R"({"peft_type": "LORA", "r": 1, "lora_alpha": 1})");
    CHECK(has(refused({"--method", "ties", "--base", "base", "--task", "a", "--task-adapter", "lora=0.5"}),
        "0.5 times the update of 'lora'"));
}

TEST_CASE("options of taskvec's own in a configuration are checked as mergekit's are")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto with = [&](const std::string& own) {
        return "merge_method: ties\nbase_model: base\n" + tasks + "taskvec: " + own + "\n";
    };
    CHECK(has(m.refusal(with("{scop: tensor}")), "config.yml:8:11: 'scop' is no key of 'taskvec'"));
    CHECK(has(m.refusal(with("{scope: row}")), "scope"));
    CHECK(has(m.refusal(with("{semantics: peft}")), "'peft'"));
    CHECK(has(m.refusal(with("[semantics]")), "expected a mapping"));
    CHECK(same(m.result(with("{semantics: paper, density: 0.5}")),
        m.merged({"--method", "ties", "--density", "0.5", "--base", "base", "--task", "a=0.75", "--task", "b=0.5"})));
    CHECK(same(m.result(with("{semantics: paper}"), {"--semantics", "mergekit"}),
        m.result("merge_method: ties\nbase_model: base\n" + tasks)));
}

TEST_CASE("a configuration's tokenizer_source is --vocabulary")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give("first", {"a", "b", "c"}, 0);
    m.give("second", {"c", "d", "a"}, 0.5F);
    const std::string head = "merge_method: task_arithmetic\nbase_model: first\nmodels:\n  - model: second\n"
                             "    parameters: {weight: 0.5}\n";
    for (const auto* word : {"base", "union"}) {
        const auto expected = m.merged({"--method", "task-arithmetic", "--semantics", "mergekit", "--base", "first",
            "--task", "second=0.5", "--vocabulary", word});
        CHECK(expected.at("model.embed_tokens.weight").shape[0] == (*word == 'b' ? 3 : 4));
        CHECK(same(m.result(head + "tokenizer_source: " + word + "\n"), expected));
        CHECK(same(m.result(head + "tokenizer: {source: " + word + "}\n"), expected));
    }
    CHECK(same(m.result(head + "tokenizer_source: first\n"), m.result(head + "tokenizer_source: base\n")));
    has(m.refusal(head + "tokenizer_source: second\n"), "config.yml:6:19: 'tokenizer_source: second'");
    CHECK(same(m.result(head + "tokenizer: {source: {model: {path: first}}, tokens: {}}\n"),
        m.result(head + "tokenizer: {source: base, pad_to_multiple_of: 0}\n")));
    CHECK(same(m.result(head + "tokenizer: {tokens: {}}\n"), m.result(head + "tokenizer_source: union\n")));
}

TEST_CASE("tokens of a configuration's tokenizer have the rows that it says, and rows go up to a multiple")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give("first", {"a", "b", "c"}, 0, 1); // a is 97
    m.give("second", {"c", "d", "a"}, 0.5F);
    m.give("third", {"b", "d"}, 2);
    const std::string head = "merge_method: task_arithmetic\nbase_model: first\nmodels:\n  - model: second\n"
                             "    parameters: {weight: 0.5}\ntokenizer: ";
    const auto check = [&](const std::string& text, const std::vector<float>& expected) {
        m.check_rows(text, expected);
    };

    // Behind the five tokens is the mean of their rows: 78.9 and 0.1 in the first model, 79.1 and 0.3 in the second.
    check(head + "{source: union, tokens: {d: {source: second}, n: {source: {kind: zero}}}, pad_to_multiple_of: 4}",
        {97.25F, 0.25F, 98, 0, 99.25F, 0.25F, 100.5F, 0.5F, 0, 0, 79, 0.2F, 79, 0.2F, 79, 0.2F});
    const auto tokenizer = nlohmann::json::parse(slurp(m.folder / "out/tokenizer.json"));
    CHECK(tokenizer["model"]["vocab"] == nlohmann::json{{"a", 0}, {"b", 1}, {"c", 2}, {"d", 3}});
    const nlohmann::json plain{{"content", "n"}, {"lstrip", false}, {"rstrip", false}, {"normalized", true},
        {"single_word", false}, {"special", false}};
    auto entry = plain;
    entry["id"] = 4;
    CHECK(tokenizer["added_tokens"] == nlohmann::json::array({entry}));
    CHECK(nlohmann::json::parse(slurp(m.folder / "out/tokenizer_config.json"))["added_tokens_decoder"]["4"] == plain);

    // What a model has stays unless it is forced; a row by its index need not be a token's.
    check(head
            + "{source: base, tokens: {a: {source: {kind: model_token, model: second, token: d}, force: true},"
              " b: {source: {kind: model_token, model: first, token_id: 3}}, c: {source: {kind: zero}}}}",
        {100.5F, 0.5F, 102 - 49.5F, 3.5F, 99.25F, 0.25F});
    // Without a base, a row that a model lacks is the mean of those that have it; of one model, there are rows to add.
    check("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: first}, {model: second}, {model: third}]\n"
          "tokenizer: {tokens: {c: {source: {kind: zero}}}}",
        {97.25F, 0.25F, 99, 1, (99 + 99.5F) / 3, 0.5F / 3, (100.5F + 102 + 101.25F) / 3, (0.5F + 2 + 1.25F) / 3});
    check("merge_method: passthrough\nmodels: [{model: first}]\ntokenizer: {source: base, pad_to_multiple_of: 5}",
        {97, 0, 98, 0, 99, 0, 98, 0, 98, 0});

    const auto refused = [&](const std::string& block, const std::string& expected) {
        const auto said = m.refusal(head + block + "\n");
        CAPTURE(said);
        CHECK(said.find(expected) != std::string::npos);
    };
    refused("{source: base, token: {}}", "config.yml:6:27: 'token' is no key of 'tokenizer'; did you mean 'tokens'?");
    refused("{source: base, tokens: {a: {sorce: first}}}",
        "config.yml:6:40: 'sorce' is no key of token 'a'; did you mean 'source'?");
    refused("{source: base, tokens: [a]}", "config.yml:6:35: 'tokens' is a list");
    refused("{source: base, tokens: {a: first}}", "config.yml:6:39: token 'a' is 'first'; expected a mapping");
    refused("{source: base, tokens: {a: {source: fourth}}}", "config.yml:6:48: there is no model 'fourth'");
    refused("{source: base, tokens: {a: {source: third}}}",
        "config.yml:6:48: the source of token 'a' is 'third', which is not merged");
    refused("{source: base, tokens: {a: {source: zero}}}", "config.yml:6:48: the source of token 'a' is 'zero'");
    refused("{source: base, tokens: {e: {source: second}}}", "config.yml:6:48: 'second' has no token 'e'");
    refused("{source: base, tokens: {e: {force: true}}}", "config.yml:6:36: token 'e' has no 'source'");
    refused(
        "{source: base, tokens: {b: {}}}", "config.yml:6:36: token 'b' has no 'source', and not every model has it");
    refused("{source: base, tokens: {b: {source: {kind: zeros}}}}",
        "config.yml:6:55: kind is 'zeros'; did you mean 'zero'?");
    refused(
        "{source: base, tokens: {b: {source: {kind: model_token, model: first}}}}", "neither 'token' nor 'token_id'");
    refused("{source: base, tokens: {b: {source: {kind: model_token, model: first, token: a, token_id: 1}}}}",
        "both 'token' and 'token_id'");
    refused("{source: base, tokens: {b: {source: {kind: model_token, model: second, token: b}}}}",
        "'second' has no token 'b'");
    refused("{source: base, tokens: {b: {source: {kind: model_token, model: second, token_id: 3}}}}", "token_id is 3");
    refused("{source: base, tokens: {b: {source: {kind: model_token, model: second, token_id: -1}}}}",
        "config.yml:6:93: token_id is -1");
    refused("{source: base, pad_to_multiple_of: 1.5}",
        "config.yml:6:47: pad_to_multiple_of is 1.5; expected a whole number");
    refused(
        "{source: base, pad_to_multiple_of: many}", "config.yml:6:47: pad_to_multiple_of is 'many'; expected a number");
    refused("{source: fourth}", "config.yml:6:21: there is no model 'fourth'");
    refused("{source: second, pad_to_multiple_of: 8}", "config.yml:6:21: 'source: second'");
}

TEST_CASE("adapters on any model, and on the base, are what fuse stores in F32")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    std::filesystem::create_directories(m.folder / "lora");
    values_model factors;
    for (const auto* module : {"layers.0.mlp", "layers.2.attn"}) {
        const auto prefix = "base_model.model." + std::string(module);
        values_tensor down{taskvec::dtype::f32, {2, 7}, std::vector<float>(14)}, up{taskvec::dtype::f32, {6, 2}, {}};
        for (std::size_t i = 0; i < 14; ++i) { down.values[i] = 0.25F * static_cast<float>(i % 5) - 0.3F; }
        for (std::size_t i = 0; i < 12; ++i) { up.values.push_back(0.5F - 0.125F * static_cast<float>(i % 7)); }
        factors[prefix + ".lora_A.weight"] = down;
        factors[prefix + ".lora_B.weight"] = up;
    }
    write_values(m.folder / "lora/adapter_model.safetensors", factors);
    spill(m.folder / "lora/adapter_config.json", R"({"peft_type": "LORA", "r": 2, "lora_alpha": 3})");
    for (const std::string model : {"base", "a", "b"}) {
        REQUIRE(
            run(m.folder, {"fuse", "--base", model, "--adapter", "lora", "--dtype", "f32", "--out", model + "-fused"})
                .code
            == 0);
    }
    const auto with = [&](const std::string& method, const std::string& base, const std::string& one,
                          const std::string& other) {
        return m.result("merge_method: " + method + "\n" + (base.empty() ? "" : "base_model: " + base + "\n")
            + "models:\n  - model: " + one + "\n    parameters: {weight: 0.75}\n  - model: " + other
            + "\n    parameters: {weight: 0.5}\n");
    };
    CHECK(same(with("ties", "base", "a+lora", "b"), with("ties", "base", "a-fused", "b")));
    CHECK(same(with("linear", "", "a+lora", "b"), with("linear", "", "a-fused", "b")));
    CHECK(same(with("linear", "", "a+lora", "b+lora"), with("linear", "", "a-fused", "b-fused"))); // twice
    CHECK(same(with("task_arithmetic", "base", "base+lora", "a+lora"),
        with("task_arithmetic", "base", "base-fused", "a-fused")));
    CHECK(same(with("task_arithmetic", "base+lora", "a", "b"), with("task_arithmetic", "base-fused", "a", "b")));
    CHECK(same(with("ties", "base+lora", "base+lora", "a"),
        m.result("merge_method: ties\nbase_model: base-fused\n"
                 "models:\n  - model: a\n    parameters: {weight: 0.5}\n")));
    const auto card = slurp(m.folder / "out/README.md");
    CHECK(card.find("ties") != std::string::npos);
    (void)with("linear", "", "a+lora", "b");
    has(slurp(m.folder / "out/README.md"), "adapter on 'a'");
    has(m.refusal("merge_method: passthrough\nslices:\n  - sources: [{model: a+lora, layer_range: [0, 2]}]\n"),
        "layers of a model with an adapter");
    has(m.refusal("merge_method: linear\nmodels: [{model: a+nowhere}, {model: b}]\n"), "there is no model 'nowhere'");
}

TEST_CASE("models in F64 with adapters on them are merged as F64")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    constexpr std::size_t side = 40; // more entries than are compared at a time
    const std::string name = "layers.0.attn.weight";
    const auto values_of = [](int step) {
        std::vector<double> values(side * side);
        for (std::size_t i = 0; i < values.size(); ++i) {
            values[i] = 0.125 * static_cast<double>(static_cast<int>(i) * step % 31 - 15) + 0x1p-40;
        }
        return values;
    };
    const auto base = values_of(3), tuned = values_of(7);
    for (const auto& [folder, values] : {std::pair("wide", &base), std::pair("tuned", &tuned)}) {
        std::filesystem::create_directories(m.folder / folder);
        const std::vector<taskvec::tensor_spec> specs{{name, taskvec::dtype::f64, {side, side}}};
        taskvec::safetensors_writer writer(
            m.folder / folder / "model.safetensors", specs, taskvec::metadata_map(), taskvec::durability::process);
        writer.write(0, 0, values->data(), values->size() * sizeof(double));
        writer.commit();
    }
    std::filesystem::create_directories(m.folder / "lora");
    const std::string module = "base_model.model.layers.0.attn";
    write_values(m.folder / "lora/adapter_model.safetensors",
        {{module + ".lora_A.weight", {taskvec::dtype::f32, {1, side}, std::vector<float>(side, 0.5F)}},
            {module + ".lora_B.weight", {taskvec::dtype::f32, {side, 1}, std::vector<float>(side, 0.25F)}}});
    spill(m.folder / "lora/adapter_config.json", R"({"peft_type": "LORA", "r": 1, "lora_alpha": 1})");
    std::filesystem::remove_all(m.folder / "out");
    m.write("merge_method: task_arithmetic\nbase_model: wide+lora\nmodels:\n  - model: tuned+lora\n"
            "    parameters: {weight: 0.5}\n");
    const auto done = m.run_it();
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    const auto merged = taskvec::open_model(m.folder / "out");
    const auto found = taskvec::flat_view<double>(*merged.model().find(name), name);
    for (std::size_t i = 0; i < base.size(); ++i) {
        REQUIRE(found.data()[i] == 0.5 * (base[i] + tuned[i]) + 0.125); // every sum is exact
    }
}

TEST_CASE("numbers, truths, mappings and merge keys are those of YAML 1.1 and of old configurations")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto weights = [&](const std::string& first, const std::string& second) {
        return m.result("merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: " + first
            + "}}\n  - {model: b, parameters: {weight: " + second + "}}\n");
    };
    const auto expected = weights("8", "16");
    CHECK(same(weights("010", "0x10"), expected));
    CHECK(same(weights("0b1000", "1_6"), expected));
    CHECK(same(weights("+8.0", "'16'"), expected));
    CHECK(same(weights("'010'", "20"), weights("10", "20"))); // a text there, which is read in tens
    CHECK(same(weights("089", "-1"), weights("89", "-1")));
    CHECK(same(weights("!!str 010", "!!float 020"), weights("10", "20")));
    CHECK(same(weights("!!int '010'", "' 16 '"), expected));
    CHECK(same(weights("[true, 0.5]", "[false, 1]"), weights("[1, 0.5]", "[0, 1]")));
    CHECK(same(m.result("merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      weight: |\n        8\n"
                        "  - model: b\n    parameters: {weight: 16}\n"),
        expected));
    for (const auto* wrong : {"0x", "0xg", "1__0", "_1", "--1", "1:30", ".inf"}) {
        has(m.refusal(std::string("merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: ") + wrong
                + "}}\n  - {model: b, parameters: {weight: 1}}\n"),
            "expected a number");
    }
    const std::string head = "merge_method: task_arithmetic\nbase_model: base\n" + tasks;
    CHECK(same(m.result(head + "parameters: {normalize: 1.0, int8_mask: 0.0}\n"),
        m.result(head + "parameters: {normalize: true}\n")));
    CHECK(same(m.result(head + "parameters: {normalize: 0.0}\n"), m.result(head + "parameters: {normalize: false}\n")));
    CHECK(same(m.result(head + "dtype: torch.bfloat16\n"), m.result(head + "dtype: bfloat16\n")));
    CHECK(same(m.result("merge_method: task_arithmetic\nbase_model: {model: {path: base}}\nmodels:\n  - model:\n"
                        "      model: {path: a}\n    parameters: {weight: 0.75}\n  - model: {path: b}\n"
                        "    parameters: {weight: 0.5}\n"),
        m.result(head)));
    has(m.refusal("merge_method: linear\nmodels: [{model: {model: {revision: x}}}]\n"), "without a 'path'");
    CHECK(same(m.result("merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - model: a\n    parameters: &p\n"
                        "      weight: 0.75\n  - model: b\n    parameters:\n      <<: *p\n      weight: 0.5\n"),
        m.result(head)));
    CHECK(same(m.result("merge_method: linear\nmodels:\n  - model: a\n    parameters: &p {weight: 3}\n  - model: b\n"
                        "    parameters: {<<: [*p, {weight: 5}]}\n"),
        weights("3", "3")));
    has(m.refusal("merge_method: linear\nmodels: [{model: a, parameters: {<<: 3}}]\n"), "expected a mapping");
    const auto ties = [&](const std::string& density, const std::string& weight) {
        return m.result("merge_method: ties\nbase_model: base\nmodels:\n  - {model: a, parameters: {density: " + density
            + ", weight: " + weight + "}}\n  - {model: b, parameters: {density: 1, weight: 0.5}}\n");
    };
    CHECK(same(ties("0", "0.5"), ties("1", "0")));
    CHECK(same(ties("2", "0.5"), ties("1", "0.5")));
    CHECK_FALSE(same(ties("[0, 1]", "0.5"), ties("1", "0.5")));
    has(m.refusal(head + "dtype: float64\n"), "dtype is 'float64', and sums are f64 only where a model is");
    has(m.refusal(head + "out_dtype: f64\n"), "out_dtype is 'f64'");
    (void)m.result(head + "dtype: float32\nout_dtype: float64\n");
    has(slurp(m.folder / "out/model.safetensors").substr(0, 1000), "\"F64\"");
}

TEST_CASE("the chat template is that of most models, a known one, or the text that is given")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto give = [&](const std::string& model, const nlohmann::json& value) {
        spill(m.folder / model / "tokenizer_config.json",
            nlohmann::json{{"model_max_length", 512}, {"chat_template", value}}.dump());
    };
    const auto template_of = [&](const std::string& word) {
        (void)m.result("merge_method: ties\nbase_model: base\n" + tasks + "chat_template: " + word + "\n");
        const auto config = nlohmann::json::parse(slurp(m.folder / "out/tokenizer_config.json"));
        CHECK(config["model_max_length"] == 512);
        return config["chat_template"].get<std::string>();
    };
    const std::string config = "merge_method: ties\nbase_model: base\n" + tasks;
    has(m.refusal(config + "chat_template: auto\n"), "config.yml:8:16: chat_template: auto, and no model has");
    has(m.refusal(config + "chat_template: llama3\n"), "config.yml:8:16: chat_template is 'llama3'; expected auto");
    give("base", "{{ base }}");
    give("a", "{{ tasks }}");
    give("b",
        nlohmann::json::array(
            {{{"name", "tool"}, {"template", "x"}}, {{"name", "default"}, {"template", "{{ tasks }}"}}}));
    CHECK(template_of("auto") == "{{ tasks }}");
    CHECK(template_of("chatml").starts_with("{% for message in messages %}"));
    CHECK(template_of("'{{ own }}'") == "{{ own }}");
    spill(m.folder / "base/chat_template.jinja", "{{ tasks }}");
    CHECK(template_of("'{{ own }}'") == "{{ own }}");
    CHECK(slurp(m.folder / "out/chat_template.jinja") == "{{ own }}");
    std::filesystem::remove(m.folder / "base/tokenizer_config.json");
    std::filesystem::remove(m.folder / "base/chat_template.jinja");
    spill(m.folder / "base/config.json", "{}");
    (void)m.result(config + "chat_template: chatml\n");
    has(slurp(m.folder / "out/chat_template.jinja"), "im_start");
    // One module is the model.
    CHECK(same(m.result("merge_method: karcher\nmodules:\n  text:\n    models: [{model: a}, {model: b}]\n"),
        m.result("merge_method: karcher\nmodels: [{model: a}, {model: b}]\n")));
    has(m.refusal("merge_method: linear\nmodules: {x: {models: []}, y: {models: []}}\n"), "'modules' has several");
}

TEST_CASE("several documents are stages, whose results later ones take by name")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const std::string first =
                          "name: mixed\nmerge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 0.75}\n"
                          "  - model: b\n    parameters: {weight: 0.5}\n",
                      second = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - model: mixed\n"
                               "    parameters: {weight: 0.5}\n";
    const auto found = m.result(first + "---\n" + second);
    const auto mixed = m.merged({"--method", "average", "--task", "a=0.75", "--task", "b=0.5"});
    std::filesystem::create_directories(m.folder / "mixed");
    std::filesystem::rename(m.folder / "merged.safetensors", m.folder / "mixed/model.safetensors");
    CHECK(same(found, m.result(second)));
    const auto names = [&] {
        std::vector<std::string> all;
        for (const auto& entry : std::filesystem::directory_iterator(m.folder / "")) {
            all.push_back(entry.path().filename().string());
        }
        return all;
    };
    for (const auto& name : names()) { CHECK_FALSE(name.starts_with(".taskvec")); }
    std::filesystem::remove_all(m.folder / "mixed");
    // What is wrong with any of them is said before the first is made.
    has(m.refusal(first + "---\nmerge_method: tie\n"), "config.yml:9:15: merge_method 'tie' is unknown");
    has(m.refusal("merge_method: linear\n" + tasks + "---\n" + second), "'name' is missing");
    has(m.refusal(first + "---\nname: last\n" + second), "config.yml:9:1: every document has a 'name'");
    // They may stand in any order; a name is the document's even where a model beside has it.
    CHECK(same(m.result(second + "---\n" + first), found));
    const auto taking = [](const std::string& name, const std::string& model) {
        return "---\nname: " + name + "\nmerge_method: linear\nmodels: [{model: " + model
            + ", parameters: {weight: 1}}]\n";
    };
    const auto three = "merge_method: passthrough\nmodels: [{model: z}]\n" + taking("z", "y") + taking("y", "a");
    CHECK(same(m.result(three), m.result("merge_method: passthrough\nmodels: [{model: a}]\n")));
    has(m.refusal(second + taking("mixed", "x") + taking("x", "y") + taking("y", "x")),
        "config.yml:13:18: documents wait for each other: 'x' takes 'y', which takes 'x'");
    has(m.refusal(second + taking("mixed", "mixed")), "documents wait for each other: 'mixed' takes 'mixed'");
    has(m.refusal(first + "---\n" + first + "---\n" + second), "the name of two documents");
    has(m.refusal("name: a/b\n" + first.substr(first.find('\n') + 1) + "---\n" + second), "'a/b'");
    for (const auto& name : names()) { CHECK_FALSE(name.starts_with(".taskvec")); }
    // A result whose dtypes are kept is stored.
    CHECK(same(m.result(first + "taskvec: {dtype: keep}\n---\n" + second), found));
    has(m.run_it({"--explain"}).out, "into 'mixed', which is stored until the last merge is done: layers that are");
    for (const auto& name : names()) { CHECK_FALSE(name.starts_with(".taskvec")); }
    m.write(first + "---\n" + second);
    CHECK(m.run_it({"--dry-run"}).code == 2);
}

TEST_CASE("--explain of several documents says of each what would be done, in order, and leaves nothing")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    std::filesystem::create_directories(m.folder / "temporary");
    // The last is the first to stand; 'mixed' has two layers, 0 and 2 of a, so that 0.25 is for the first of them and
    // 0.75 for the second.
    m.write("merge_method: task_arithmetic\nbase_model: short\nmodels:\n  - model: mixed\n"
            "    parameters: {weight: [0.25, 0.75]}\n---\n"
            "name: mixed\nmerge_method: passthrough\ndtype: bfloat16\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 1]}]\n  - sources: [{model: a, layer_range: [2, 3]}]\n---\n"
            "name: short\nmerge_method: linear\nparameters: {weight: 0.5}\nslices:\n"
            "  - sources: [{model: base, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]\n");
    const auto done = run(
        m.folder, {"run", "config.yml", "--out", "out", "--explain"}, {"TMPDIR=" + (m.folder / "temporary").string()});
    CAPTURE(done.err);
    CHECK(done.code == 0);
    const auto mixed = done.out.find("would merge 1 task by passthrough into 'mixed'"),
               base = done.out.find("would merge 2 tasks by average into 'short'"),
               last = done.out.find("would merge 1 task by task-arithmetic into 'out/'");
    CHECK(mixed < base);
    CHECK(base < last);
    REQUIRE(last != done.out.npos);
    const auto end = done.out.substr(last);
    has(end, "  base  short  ");
    has(end, "  task  mixed  ");
    CHECK(done.out.find("temporary") == done.out.npos);
    has(end, "layers.0.mlp.weight: weights 0.25\n");
    has(end, "layers.1.mlp.weight: weights 0.75\n");
    CHECK(end.find("layers.2.") == end.npos);
    CHECK_FALSE(std::filesystem::exists(m.folder / "out"));
    CHECK(std::filesystem::is_empty(m.folder / "temporary"));
    CHECK(m.run_it({}).code == 0);
}

TEST_CASE("--explain and dry runs refuse weights that cannot be divided by, as the merge does")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto linear = [](const std::string& name, const std::string& first, const std::string& second) {
        return "name: " + name + "\nmerge_method: linear\nmodels:\n  - {model: a, parameters: {weight: " + first
            + "}}\n  - {model: b, parameters: {weight: " + second + "}}\n";
    };
    const std::string last = "---\nmerge_method: passthrough\nmodels: [{model: mixed}]\n",
                      by_filter = "[{filter: mlp, value: -1}, {value: 1}]";
    for (const auto& text : {linear("mixed", "1", "-1") + last, linear("mixed", "1", by_filter) + last,
             linear("alone", "1", "-1"), linear("alone", "1", by_filter)}) {
        m.write(text);
        for (const std::vector<std::string>& more :
            {std::vector<std::string>{}, std::vector<std::string>{"--explain"}}) {
            const auto done = m.run_it(more);
            CAPTURE(text);
            CHECK(done.code == 1);
            has(done.err, "error: config.yml:2:15: the weights of an average sum to 0");
            CHECK_FALSE(std::filesystem::exists(m.folder / "out"));
        }
    }
    m.write(linear("alone", "1", "[{filter: mlp, value: 0.5}, {value: 1}]"));
    CHECK(m.run_it({"--explain"}).code == 0);
    const auto dry =
        run(m.folder, {"merge", "--method", "average", "--task", "a=1", "--task", "b=-1", "--out", "x", "--dry-run"});
    CHECK(dry.code == 1);
    has(dry.err, "the weights of an average sum to 0");
}

TEST_CASE("what is said of a document's result calls it by its name")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const std::string base = "merge_method: passthrough\nmodels: [{model: base}]\n---\n";
    m.write("name: copy\n" + base + "name: twin\n" + base + "merge_method: task_arithmetic\nbase_model: copy\n"
        + "models: [{model: twin, parameters: {weight: 1}}]\n");
    const auto done = m.run_it();
    CHECK(done.code == 0);
    has(done.err, "note: 'twin' has the base's bytes in all 8 tensors that take part");
    CHECK(done.err.find(".taskvec") == done.err.npos);
}

TEST_CASE("results that would be worked out again and again are stored once")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    // Each takes the two before it; of the last, which n11 goes into, n10 and n11 are worked out once, n9 twice …
    const auto merge = [](const std::string& base, const std::string& task) {
        return "merge_method: task_arithmetic\nbase_model: " + base + "\nmodels:\n  - {model: " + task
            + ", parameters: {weight: 0.4}}\n  - {model: b, parameters: {weight: 0.3}}\n";
    };
    const auto name = [](int i) { return "n" + std::to_string(i); };
    std::vector<std::string> documents;
    std::string all;
    for (int i = 0; i <= 12; ++i) {
        documents.push_back(merge(i < 2 ? "base" : i == 12 ? "base" : name(i - 2), i == 0 ? "a" : name(i - 1)));
        all += i == 12 ? documents.back() : "name: " + name(i) + "\n" + documents.back() + "---\n";
    }
    const auto found = m.result(all);
    const auto done = m.run_it({"--explain"});
    CHECK(done.code == 0);
    for (int i = 0; i < 12; ++i) {
        has(done.out,
            "into '" + name(i) + "', which is "
                + (i == 5        ? "stored until the last merge is done: it would be worked out 13 times"
                        : i == 4 ? "stored until the last merge is done: it would be worked out 9 times"
                                 : "worked out while it is read"));
    }
    for (const auto& entry : std::filesystem::directory_iterator(m.folder / "")) {
        CHECK_FALSE(entry.path().filename().string().starts_with(".taskvec"));
    }
    for (int i = 0; i < 12; ++i) { // one after the other, each stored
        m.write(documents[static_cast<std::size_t>(i)]);
        REQUIRE(run(m.folder, {"run", "config.yml", "--out", name(i)}).code == 0);
    }
    CHECK(same(found, m.result(documents.back())));
}

TEST_CASE("the configurations that the fuzzer of run begins with are merged or refused")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    std::size_t merged = 0, inputs = 0;
    for (const auto& entry : std::filesystem::directory_iterator(TASKVEC_TEST_DIR "/fuzz/corpus/run_config")) {
        CAPTURE(entry.path());
        std::filesystem::remove_all(m.folder / "out");
        m.write(slurp(entry.path()));
        const auto done = m.run_it({"--quiet"});
        CAPTURE(done.err);
        CHECK((done.code == 0 || (done.code == 1 && is_error_line(done.err))));
        CHECK(std::filesystem::exists(m.folder / "out") == (done.code == 0));
        merged += done.code == 0;
        ++inputs;
    }
    CHECK(merged >= 4);
    CHECK(inputs >= 10);
}

namespace {

/// Models of a family with a tokenizer, a tied head and a configuration each, two of them with a token more.
struct family : configured {
    family()
    {
        std::mt19937 random(31);
        std::normal_distribution<float> normal;
        const auto make = [&](const std::string& name, taskvec::dtype type, const std::vector<std::string>& tokens) {
            const auto place = folder / name;
            std::filesystem::create_directories(place);
            const auto values = [&](std::size_t count) {
                std::vector<float> list(count);
                for (float& x : list) { x = rounded(type, normal(random)); }
                return list;
            };
            const auto count = static_cast<std::int64_t>(tokens.size());
            values_model model{{"model.embed_tokens.weight", {type, {count, 16}, values(tokens.size() * 16)}}};
            for (const std::string layer : {"0", "1", "2"}) {
                model["model.layers." + layer + ".mlp.weight"] = {type, {90, 100}, values(9000)};
                model["model.layers." + layer + ".norm.weight"] = {type, {16}, values(16)};
            }
            model["lm_head.weight"] = model["model.embed_tokens.weight"];
            write_values(place / "model.safetensors", model, {{"format", "pt"}, {"of", name}});
            nlohmann::json vocabulary = nlohmann::json::object();
            for (std::size_t i = 0; i < tokens.size(); ++i) { vocabulary[tokens[i]] = i; }
            spill(place / "config.json",
                nlohmann::json{{"model_type", "llama"}, {"num_hidden_layers", 3}, {"vocab_size", count},
                    {"torch_dtype", type == taskvec::dtype::f32 ? "float32" : "bfloat16"}}
                    .dump());
            spill(place / "generation_config.json", nlohmann::json{{"of", name}}.dump());
            spill(place / "tokenizer.json",
                nlohmann::json{{"version", "1.0"}, {"added_tokens", nlohmann::json::array()},
                    {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", tokens[0]}}}}
                    .dump());
            spill(place / "tokenizer_config.json", nlohmann::json{{"chat_template", "{{ " + name + " }}"}}.dump());
        };
        const std::vector<std::string> common{"a", "b", "c", "d"}, more{"c", "e", "a", "b", "d"};
        make("base", taskvec::dtype::bf16, common);
        make("a", taskvec::dtype::bf16, common);
        make("b", taskvec::dtype::f32, common);
        make("c", taskvec::dtype::bf16, common);
        make("wide", taskvec::dtype::bf16, more);
    }
    /// A run of a configuration, and its error.
    void run_to(const std::string& name, const std::string& text, std::string* said = nullptr,
        const std::vector<std::string>& more = {}) const
    {
        spill(folder / "it.yml", text);
        std::vector<std::string> words{"run", "it.yml", "--out", name};
        words.insert(words.end(), more.begin(), more.end());
        const auto done = run(folder, words);
        CAPTURE(text);
        CAPTURE(done.err);
        REQUIRE(done.code == 0);
        if (said) { *said = done.err; }
    }
    /// The files of a directory by their names; of the card no more than the models and their fingerprints.
    [[nodiscard]] std::map<std::string, std::string> files(const std::string& name) const
    {
        std::map<std::string, std::string> all;
        for (const auto& entry : std::filesystem::directory_iterator(folder / name)) {
            auto text = slurp(entry.path());
            if (const auto table = text.find("| model |"); table != text.npos) {
                text = text.substr(table, text.find("\n\n", table) - table);
            }
            all[entry.path().filename().string()] = text;
        }
        return all;
    }
    /// What several documents give is, file for file, what they give one after the other, each stored under its name.
    /// `times`: of those that are stored, how often they would be worked out.
    void check_as_stored(const std::vector<std::pair<std::string, std::string>>& documents,
        const std::map<std::string, int>& times = {}) const
    {
        std::string all, said;
        for (const auto& [name, text] : documents) {
            all += (all.empty() ? "" : "---\n") + (name.empty() ? "" : "name: " + name + "\n") + text;
        }
        run_to("together", all, &said);
        std::vector<std::string> stored;
        for (const auto& [name, text] : documents) {
            const auto often = times.find(name);
            const auto fate = often == times.end() ? std::string("worked out while it is read\n")
                                                   : "stored until the last merge is done: it would be worked out "
                    + std::to_string(often->second) + " times\n";
            if (!name.empty()) { has(said, "taskvec: note: '" + name + "' is " + fate); }
            run_to(name.empty() ? "apart" : name, text);
            if (!name.empty()) { stored.push_back(name); }
        }
        const auto together = files("together"), apart = files("apart");
        for (const auto& file : apart) {
            CAPTURE(file.first);
            const auto found = together.find(file.first);
            REQUIRE(found != together.end());
            CHECK(found->second == file.second);
        }
        CHECK(together.size() == apart.size());
        CHECK(together.contains("README.md"));
        CHECK(together.contains("generation_config.json"));
        for (const auto& name : stored) { std::filesystem::remove_all(folder / name); }
        std::filesystem::remove_all(folder / "together");
        std::filesystem::remove_all(folder / "apart");
    }
};

/// `models:` with a weight each.
std::string weighted(const std::string& method, const std::vector<std::pair<std::string, std::string>>& models,
    const std::string& base = "", const std::string& more = "")
{
    std::string text =
        "merge_method: " + method + "\n" + (base.empty() ? "" : "base_model: " + base + "\n") + more + "models:\n";
    for (const auto& [name, weight] : models) {
        text += "  - {model: " + name + ", parameters: {weight: " + weight + "}}\n";
    }
    return text;
}

} // namespace

TEST_CASE("stages that are worked out while they are read give every file that stored ones give")
{
    const family m;
    if (!reads_yaml(m)) { return; }
    const auto mixed = weighted("linear", {{"a", "0.75"}, {"c", "0.5"}});
    // A task and a base; the dtype, configuration, template and metadata of the result are the stage's then.
    m.check_as_stored({{"mixed", mixed}, {"", weighted("task_arithmetic", {{"mixed", "0.5"}}, "base")}});
    m.check_as_stored({{"mixed", weighted("linear", {{"b", "0.75"}, {"a", "0.5"}}, "", "dtype: float16\n")},
        {"", weighted("task_arithmetic", {{"a", "0.5"}, {"c", "1"}}, "mixed")}});
    // Draws, whole models' thresholds, elections and ranks of rows, in the stage and in what takes it.
    m.check_as_stored(
        {{"drawn", weighted("dare_ties", {{"a", "1"}, {"b", "0.5"}}, "base", "parameters: {density: 0.4}\n")},
            {"", weighted("ties", {{"drawn", "1"}, {"c", "0.5"}}, "base", "parameters: {density: 0.3}\n")}});
    m.check_as_stored(
        {{"ranked",
             weighted("della", {{"a", "1"}, {"b", "0.5"}}, "base", "parameters: {density: 0.5, epsilon: 0.1}\n")},
            {"", weighted("dare_linear", {{"ranked", "1"}, {"c", "0.5"}}, "base", "parameters: {density: 0.5}\n")}});
    // A chain, a stage in two others and in the last one, values by filter.
    m.check_as_stored({{"first", mixed},
                          {"second",
                              "merge_method: slerp\nbase_model: first\nmodels: [{model: first}, {model: b}]\n"
                              "parameters:\n  t:\n    - {filter: mlp, value: [0.2, 0.8]}\n    - value: 0.5\n"},
                          {"third", weighted("nuslerp", {{"second", "0.6"}, {"first", "0.4"}})},
                          {"",
                              weighted("breadcrumbs", {{"third", "1"}, {"first", "0.5"}, {"second", "0.25"}}, "first",
                                  "parameters: {density: 0.6}\n")}},
        {{"first", 11}, {"second", 9}}); // breadcrumbs reads its models 4 times, nuslerp and slerp twice
    // An adapter on a stage.
    std::filesystem::create_directories(m.folder / "lora");
    const std::string module = "base_model.model.model.layers.1.mlp";
    write_values(m.folder / "lora/adapter_model.safetensors",
        {{module + ".lora_A.weight", {taskvec::dtype::f32, {1, 100}, std::vector<float>(100, 0.03F)}},
            {module + ".lora_B.weight", {taskvec::dtype::f32, {90, 1}, std::vector<float>(90, 0.7F)}}});
    spill(m.folder / "lora/adapter_config.json", R"({"peft_type": "LORA", "r": 1, "lora_alpha": 2})");
    m.check_as_stored({{"mixed", mixed}, {"", weighted("ties", {{"mixed+lora", "0.5"}, {"b", "1"}}, "base")}});
    // Layers of a stage; a stage made of layers.
    m.check_as_stored({{"mixed", mixed},
        {"deep",
            "merge_method: passthrough\nslices:\n  - sources: [{model: mixed, layer_range: [0, 2]}]\n"
            "  - sources: [{model: a, layer_range: [1, 3]}]\n"},
        {"", weighted("linear", {{"deep", "0.5"}})}});
}

TEST_CASE("stages with another vocabulary are lined up as stored ones are")
{
    const family m;
    if (!reads_yaml(m)) { return; }
    const std::string all = "tokenizer_source: union\n";
    m.check_as_stored({{"larger", weighted("linear", {{"base", "0.5"}, {"wide", "0.5"}}, "", all)},
        {"", weighted("task_arithmetic", {{"larger", "0.5"}, {"a", "1"}}, "base", all)}});
    m.check_as_stored({{"larger", weighted("linear", {{"base", "0.5"}, {"wide", "0.5"}}, "", all)},
        {"", weighted("task_arithmetic", {{"a", "0.5"}, {"wide", "1"}}, "larger", all)}});
}

TEST_CASE("stages that are worked out take no room, and what is wrong in them leaves no output")
{
    const family m;
    if (!reads_yaml(m)) { return; }
    const auto last = weighted("task_arithmetic", {{"mixed", "0.5"}}, "base");
    std::string said;
    m.run_to("out", "name: mixed\n" + weighted("linear", {{"a", "1"}}) + "---\n" + last, &said, {"--quiet"});
    CHECK(said.empty());
    std::filesystem::remove_all(m.folder / "out");
    // Values that only the stage cannot hold.
    auto large = read_values(m.folder / "a/model.safetensors");
    large["model.layers.1.mlp.weight"].values[4321] = rounded(taskvec::dtype::bf16, 1e6F);
    write_values(m.folder / "a/model.safetensors", large);
    const auto refused = [&](const std::string& document, const std::string& because) {
        spill(m.folder / "it.yml", "name: mixed\n" + document + "---\n" + last);
        const auto done = run(m.folder, {"run", "it.yml", "--out", "out", "--quiet"});
        CAPTURE(done.err);
        CHECK(done.code == 1);
        CHECK(is_error_line(done.err));
        has(done.err, because);
        CHECK_FALSE(std::filesystem::exists(m.folder / "out"));
        for (const auto& name : m.folder.names()) { CHECK_FALSE(name.starts_with(".taskvec")); }
    };
    const auto half = weighted("linear", {{"a", "1"}}, "", "dtype: float16\n");
    refused(half, "error: the result of 'mixed': tensor 'model.layers.1.mlp.weight' would hold infinity at index 4321");
    refused("merge_method: passthrough\nmodels: [{model: halved}]\n---\nname: halved\n" + half,
        "error: the result of 'halved': tensor 'model.layers.1.mlp.weight' would hold infinity at index 4321");
    m.run_to("saturated", "name: mixed\n" + half + "---\n" + last, nullptr, {"--overflow", "saturate"});
    large["model.layers.1.mlp.weight"].values[77] = std::numeric_limits<float>::quiet_NaN();
    write_values(m.folder / "a/model.safetensors", large);
    refused(weighted("linear", {{"a", "1"}}), "tensor 'model.layers.1.mlp.weight' of 'a' holds NaN at index 77");
}

TEST_CASE("filters of a model's own parameters mean its names, those of shared ones the result's")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto scaled = [](const std::vector<float>& values, float factor) {
        auto result = values;
        for (auto& value : result) { value *= factor; }
        return result;
    };
    // Layer 0 of the result is layer 1 of the models.
    const auto source = [](const std::string& model, const std::string& more = "") {
        return "{model: " + model + ", layer_range: [1, 3]" + more + "}";
    };
    const std::string half_of_1 = "[{filter: layers.1., value: 0.5}, {value: 1}]";
    const auto weighted =
        m.result("merge_method: linear\nparameters: {normalize: false}\nslices:\n  - sources:\n      - "
            + source("a", ", parameters: {weight: " + half_of_1 + "}") + "\n      - "
            + source("b", ", parameters: {weight: 0}") + "\n");
    CHECK(weighted.at("layers.0.mlp.weight").values == scaled(m.a.at("layers.1.mlp.weight").values, 0.5F));
    CHECK(weighted.at("layers.1.mlp.weight").values == m.a.at("layers.2.mlp.weight").values);
    const auto own = m.result("merge_method: passthrough\nslices:\n  - sources: ["
        + source("a", ", parameters: {scale: " + half_of_1 + "}")
        + "]\n  - sources: [{model: b, layer_range: [0, 2]}]\n");
    CHECK(own.at("layers.0.attn.weight").values == scaled(m.a.at("layers.1.attn.weight").values, 0.5F));
    for (const auto& [to, from] :
        {std::pair{"layers.2.attn.weight", "layers.0.attn.weight"}, {"layers.3.attn.weight", "layers.1.attn.weight"}}) {
        CHECK(own.at(to).values == m.b.at(from).values);
    }
    CHECK(own.at("layers.1.attn.weight").values == m.a.at("layers.2.attn.weight").values);
    const auto merged = [&](const std::string& parameters) {
        return m.result("merge_method: breadcrumbs\nbase_model: base\nparameters: {weight: 1, gamma: 0, " + parameters
            + "}\nslices:\n  - sources: [" + source("base") + ", " + source("a") + "]\n");
    };
    // A density that all models have is each one's own; nothing of layer 1 is kept.
    const auto kept = merged("density: [{filter: layers.1., value: 0}, {value: 1}]");
    CHECK(kept.at("layers.0.mlp.weight").values == m.base.at("layers.1.mlp.weight").values);
    CHECK_FALSE(kept.at("layers.1.mlp.weight").values == m.base.at("layers.2.mlp.weight").values);
    // A lambda is the merge's: layer 1 of the result.
    const auto shared = merged("lambda: [{filter: layers.1., value: 0}, {value: 1}]");
    CHECK(shared.at("layers.1.mlp.weight").values == m.base.at("layers.2.mlp.weight").values);
    CHECK_FALSE(shared.at("layers.0.mlp.weight").values == m.base.at("layers.1.mlp.weight").values);
}

TEST_CASE("filters call experts what mergekit calls them")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const std::string mixtral = "layers.0.block_sparse_moe.", qwen = "layers.1.mlp.",
                      granite = "layers.2.block_sparse_moe.", nemotron = "layers.3.mixer.experts.4.";
    values_model model;
    for (const auto& name : {mixtral + "gate", mixtral + "experts.0.w1", mixtral + "experts.0.w2",
             mixtral + "experts.10.w3", qwen + "gate", qwen + "experts.0.gate_proj", qwen + "experts.1.down_proj",
             qwen + "shared_expert.gate_proj", granite + "input_linear", granite + "router.layer", nemotron + "up_proj",
             std::string("layers.0.self_attn.q_proj")}) {
        model[name + ".weight"] = {taskvec::dtype::f32, {2}, {1, 3}};
    }
    std::filesystem::create_directories(m.folder / "moe");
    write_values(m.folder / "moe/model.safetensors", model);
    const auto scaled = [&](const std::string& filter) {
        std::set<std::string> found;
        for (const auto& [name, tensor] :
            m.result("merge_method: passthrough\nmodels:\n  - model: moe\n    parameters:\n"
                     "      scale: [{filter: "
                + filter + ", value: 2}, {value: 1}]\n")) {
            const bool is_scaled = tensor.values == std::vector<float>{2, 6};
            CHECK((is_scaled || tensor.values == std::vector<float>{1, 3}));
            if (is_scaled) { found.insert(name.substr(0, name.rfind('.'))); }
        }
        return found;
    };
    using names = std::set<std::string>;
    CHECK(scaled("mlp")
        == names{mixtral + "gate", mixtral + "experts.0.w1", mixtral + "experts.0.w2", mixtral + "experts.10.w3",
            qwen + "gate", qwen + "experts.0.gate_proj", qwen + "experts.1.down_proj",
            qwen + "shared_expert.gate_proj"});
    CHECK(scaled("gate_proj") == names{qwen + "shared_expert.gate_proj"});
    CHECK(scaled("up_proj")
        == names{
            mixtral + "experts.0.w1", mixtral + "experts.10.w3", qwen + "experts.0.gate_proj", nemotron + "up_proj"});
    CHECK(scaled("experts.down_proj") == names{mixtral + "experts.0.w2", qwen + "experts.1.down_proj"});
    CHECK(scaled("mixer.experts.up_proj") == names{nemotron + "up_proj"});
    CHECK(scaled("block_sparse_moe") == names{granite + "input_linear", granite + "router.layer"});
    CHECK(scaled("w2").empty());
    has(m.run_it({"--explain"}).err,
        "config.yml:5:35: scale: the filter matches no tensor that takes part; filters call "
        "'layers.0.block_sparse_moe.experts.0.w2.weight' 'layers.0.mlp.experts.down_proj'");
    // What a merge writes as a filter is what its pattern matched.
    std::filesystem::copy(m.folder / "moe", m.folder / "moe2");
    const auto written = run(m.folder,
        {"merge", "--method", "slerp", "--base", "moe", "--task", "moe2", "--out", "x", "--as-config", "x.yml", "--t",
            "0.5", "--t", "up_proj=0.25"});
    CHECK(written.code == 2); // gate_up_proj has it too
    CAPTURE(written.err);
    has(written.err, "filters are plain text that occurs in a tensor's name, and call 'layers.");
}

TEST_CASE("a base that is none of the sources of slices gives the result its files and no numbers")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    for (const std::string name : {"base", "a", "b"}) {
        spill(m.folder / name / "config.json", nlohmann::json{{"num_hidden_layers", 3}, {"of", name}}.dump());
    }
    const auto slice = [](const std::string& range, const std::vector<std::string>& models) {
        std::string text = "  - sources:\n";
        for (const auto& model : models) { text += "      - {model: " + model + ", layer_range: " + range + "}\n"; }
        return text;
    };
    const auto whose = [&] { return nlohmann::json::parse(slurp(m.folder / "out/config.json"))["of"]; };
    const auto mean = [](const std::vector<const values_model*>& models) {
        values_model result = *models.front();
        for (auto& [name, tensor] : result) {
            for (std::size_t i = 0; i < tensor.values.size(); ++i) {
                double sum = 0;
                for (const auto* const one : models) { sum += static_cast<double>(one->at(name).values[i]); }
                tensor.values[i] = static_cast<float>(sum / static_cast<double>(models.size()));
            }
        }
        return result;
    };
    const auto check_near = [](const values_model& found, const values_model& expected) {
        REQUIRE(found.size() == expected.size());
        for (const auto& one : expected) {
            const auto& name = one.first;
            CAPTURE(name);
            for (std::size_t i = 0; i < one.second.values.size(); ++i) {
                REQUIRE(found.at(name).values[i] == doctest::Approx(one.second.values[i]).epsilon(1e-5));
            }
        }
    };
    const std::string linear = "merge_method: linear\nparameters: {weight: 1}\n", beside = "base_model: base\n",
                      stage = "name: a_again\nmerge_method: passthrough\nmodels: [{model: a}]\n---\n";
    const std::vector<std::string> both{"a", "b"}, of_stage{"a_again", "b"};
    for (const auto& slices : {slice("[0, 3]", both), slice("[0, 1]", both) + slice("[1, 3]", both)}) {
        check_near(m.result(linear + beside + "slices:\n" + slices), mean({&m.a, &m.b}));
        CHECK(whose() == "base");
        const std::string karcher = "merge_method: karcher\nslices:\n" + slices;
        const auto alone = m.result(karcher);
        CHECK(whose() == "a");
        CHECK(same(m.result(beside + karcher), alone));
        CHECK(whose() == "base");
    }
    check_near(m.result(stage + linear + beside + "slices:\n" + slice("[0, 3]", of_stage)), mean({&m.a, &m.b}));
    CHECK(whose() == "base");
    const std::string alone = "merge_method: passthrough\n" + beside + "slices:\n";
    CHECK(same(m.result(alone + slice("[0, 3]", {"a"})), m.a));
    CHECK(whose() == "base");
    CHECK(m.result(stage + alone + slice("[0, 2]", {"a_again"})).at("layers.1.mlp.weight").values
        == m.a.at("layers.1.mlp.weight").values);
    // Among the sources it is one of them; a slice's own is for methods that take it out of the models.
    check_near(
        m.result(linear + beside + "slices:\n" + slice("[0, 3]", {"a", "base", "b"})), mean({&m.a, &m.base, &m.b}));
    check_near(m.result(linear + "slices:\n" + slice("[0, 3]", both) + "    base_model: base\n"), mean({&m.a, &m.b}));
    // Where all models are whole it is merged.
    check_near(m.result(linear + beside + "models: [{model: a}, {model: b}]\n"), mean({&m.a, &m.b, &m.base}));

    const auto tokenizer = [&](const std::string& name, const std::string& last) {
        spill(m.folder / name / "tokenizer.json",
            nlohmann::json{{"version", "1.0"}, {"added_tokens", nlohmann::json::array()},
                {"model",
                    {{"type", "WordLevel"}, {"vocab", {{"x", 0}, {"p", 1}, {"q", 2}, {"r", 3}, {"s", 4}, {last, 5}}},
                        {"unk_token", "x"}}}}
                .dump());
    };
    tokenizer("a", "y");
    tokenizer("b", "y");
    tokenizer("base", "y");
    const auto rows = linear + beside + "slices:\n" + slice("[0, 3]", both) + "tokenizer_source: base\n";
    check_near(m.result(rows), mean({&m.a, &m.b}));
    tokenizer("base", "z");
    has(m.refusal(rows),
        "the result has the tokenizer of the base_model 'base', which is not among the sources of the "
        "slices, and the tokens of 'a' are others; leave base_model out");
    std::filesystem::remove(m.folder / "base/tokenizer.json");
    has(m.refusal(rows), "and it has no tokenizer.json");
}

TEST_CASE("truths differ by filter and by slice, and weights that cancel divide by 1")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const std::string head = "merge_method: task_arithmetic\nbase_model: base\n" + tasks;
    const auto divided = m.result(head + "parameters: {normalize: true}\n"),
               plain = m.result(head + "parameters: {normalize: false}\n"),
               some = m.result(head + "parameters: {normalize: [{filter: mlp, value: true}, {value: false}]}\n");
    for (const auto& [name, tensor] : some) {
        CAPTURE_BOUND(name);
        const bool mlp = name.find("mlp") != name.npos;
        CHECK(tensor.values == (mlp ? divided : plain).at(name).values);
        CHECK_FALSE(tensor.values == (mlp ? plain : divided).at(name).values);
    }
    const auto slice = [](const std::string& range, const std::string& normalize) {
        std::string text = "  - sources:\n";
        for (const auto* model : {"base", "a", "b"}) {
            text += "      - {model: " + std::string(model) + ", layer_range: " + range + "}\n";
        }
        return text + "    parameters: {normalize: " + normalize + "}\n";
    };
    const auto ties = [&](const std::string& slices) {
        return m.result(
            "merge_method: ties\nbase_model: base\nparameters: {weight: 0.5, density: 0.6}\nslices:\n" + slices);
    };
    const auto mean = ties(slice("[0, 3]", "true")), sum = ties(slice("[0, 3]", "false")),
               both = ties(slice("[0, 1]", "true") + slice("[1, 3]", "false"));
    for (const auto& [name, tensor] : both) {
        const bool first = name.starts_with("layers.0.") || name.starts_with("embed");
        CHECK(tensor.values == (first ? mean : sum).at(name).values);
    }
    CHECK_FALSE(same(mean, sum));

    // mergekit divides by 1 where weights come to less than 1e-8.
    const auto opposed = [&](const std::string& first, const std::string& normalize) {
        return m.result("merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - {model: a, parameters: {weight: "
            + first + "}}\n  - {model: b, parameters: {weight: -1}}\nparameters: {normalize: " + normalize + "}\n");
    };
    CHECK(same(opposed("1", "true"), opposed("1", "false")));
    const auto in_mlp = opposed("[{filter: mlp, value: 1}, {value: 3}]", "true"),
               undivided = opposed("[{filter: mlp, value: 1}, {value: 3}]", "false");
    for (const auto& [name, tensor] : in_mlp) {
        CHECK((tensor.values == undivided.at(name).values) == (name.find("mlp") != name.npos));
    }
    m.write("merge_method: task_arithmetic\nbase_model: base\ntaskvec: {semantics: paper}\nmodels:\n"
            "  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: -1}}\n"
            "parameters: {normalize: true}\n");
    const auto refused = m.run_it();
    CHECK(refused.code == 1);
    has(refused.err, "error: config.yml:1:15: the weights sum to 0");
}

TEST_CASE("slices of linear merge different numbers of models, may be empty, and take one stage twice")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto slice = [](const std::string& range, const std::string& first, const std::string& second = "") {
        std::string text = "  - sources:\n      - {model: " + first + ", layer_range: " + range + "}\n";
        if (!second.empty()) {
            text += "      - {model: " + second + ", layer_range: " + range + ", parameters: {weight: 0}}\n";
        }
        return text;
    };
    const std::string linear = "merge_method: linear\nparameters: {weight: 1}\nslices:\n",
                      apart = "merge_method: passthrough\nslices:\n";
    const auto expected = m.result(apart + slice("[0, 2]", "a") + slice("[0, 3]", "b") + slice("[2, 3]", "a"));
    CHECK(same(m.result(linear + slice("[0, 1]", "a", "b") + slice("[1, 2]", "a") + slice("[0, 3]", "b")
                   + slice("[2, 3]", "a", "b")),
        expected));
    CHECK(same(m.result(linear + slice("[0, 2]", "a") + slice("[0, 3]", "b") + slice("[2, 3]", "a", "b")), expected));
    CHECK(same(
        m.result(apart + slice("[0, 2]", "a") + slice("[1, 1]", "base") + slice("[0, 3]", "b") + slice("[2, 3]", "a")),
        expected));
    // The later slice goes deeper.
    CHECK(same(m.result("name: copy\nmerge_method: passthrough\nmodels: [{model: a}]\n---\n" + apart
                   + slice("[0, 2]", "copy") + slice("[1, 3]", "copy")),
        m.result(apart + slice("[0, 2]", "a") + slice("[1, 3]", "a"))));
    m.write("name: copy\nmerge_method: passthrough\nmodels: [{model: a}]\n---\n" + apart + slice("[0, 2]", "copy")
        + slice("[1, 4]", "copy"));
    const auto beyond = m.run_it();
    CHECK(beyond.code == 1);
    has(beyond.err, "config.yml:10:36: layer_range [1, 4]: 'copy' has the layers [0, 3]");
    CHECK(same(m.result("merge_method: ties\nbase_model: base\nmodels: [{model: base}]\n"), m.base));
    CHECK(same(m.result("merge_method: linear\nmodels: [{model: a, parameters: {weight: true}}]\n"), m.a));
    CHECK(same(
        m.result("merge_method: breadcrumbs\nbase_model: base\n" + tasks + "parameters: {density: 0.5, gamma: 1}\n"),
        m.result(
            "merge_method: breadcrumbs\nbase_model: base\n" + tasks + "parameters: {density: 0.5, gamma: 0.75}\n")));
}

TEST_CASE("--explain and reports of slices name the layers that each tensor is merged of")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.write("merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n"
            "  - sources: [{model: b, layer_range: [1, 3]}]\n");
    const auto explained = m.run_it({"--explain"});
    CHECK(explained.code == 0);
    has(explained.out, "\nlayers.1.mlp.weight: layer 1 of a: ");
    has(explained.out, "\nlayers.2.mlp.weight: layer 1 of b: ");
    has(explained.out, "\nembed.weight: a: ");
    has(explained.out, "\nnorm.weight: b: ");
    has(explained.out, "  layers of  b  ");
    CHECK(m.run_it({"--report", "report.json"}).code == 0);
    const auto report = nlohmann::json::parse(slurp(m.folder / "report.json"));
    CHECK(report["tasks"][0]["layers"]
        == nlohmann::json::parse(R"([{"path": "a", "first": 0, "last": 2}, {"path": "b", "first": 1, "last": 3}])"));
}

TEST_CASE("without a dtype a result has one that holds the numbers of all models")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto give = [&](const std::string& name, const values_model& like, taskvec::dtype dtype) {
        auto model = like;
        for (auto& [tensor, values] : model) {
            values.dtype = dtype;
            for (auto& value : values.values) { value = rounded(dtype, value); }
        }
        std::filesystem::create_directories(m.folder / name);
        write_values(m.folder / name / "model.safetensors", model);
        return model;
    };
    using taskvec::dtype;
    const auto base = give("base16", m.base, dtype::bf16);
    (void)give("a16", m.a, dtype::bf16);
    const auto dtype_of = [&](const std::string& text) { return m.result(text).at("layers.1.mlp.weight").dtype; };
    const auto merge = [](const std::string& of, const std::string& task, const std::string& more = "") {
        return "merge_method: task_arithmetic\nbase_model: " + of + "\nmodels: [{model: " + task
            + ", parameters: {weight: 1}}]\n" + more;
    };
    const auto found = m.result(merge("base16", "a"));
    for (const auto& [name, tensor] : found) {
        CHECK(tensor.dtype == dtype::f32);
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            const float from = base.at(name).values[i];
            REQUIRE(tensor.values[i] == from + (m.a.at(name).values[i] - from));
        }
    }
    CHECK(dtype_of(merge("base", "a16")) == dtype::f32);
    CHECK(dtype_of(merge("base16", "a16")) == dtype::bf16);
    CHECK(dtype_of(merge("base16", "a", "dtype: bfloat16\n")) == dtype::bf16);
    CHECK(
        dtype_of("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a16}, {model: b}]\n") == dtype::f32);
    // Slices of models that differ have each one's own, as there.
    const auto apart = m.result("merge_method: passthrough\nslices:\n  - sources: [{model: a16, layer_range: [0, 1]}]\n"
                                "  - sources: [{model: b, layer_range: [1, 3]}]\n");
    CHECK(apart.at("layers.0.mlp.weight").dtype == dtype::bf16);
    CHECK(apart.at("layers.1.mlp.weight").dtype == dtype::f32);
}

TEST_CASE("buffers that one model lacks take no part, and names are matched with and without their prefix")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto give = [&](const std::string& name, const values_model& like, bool buffers, const std::string& prefix) {
        values_model model;
        for (const auto& [tensor, values] : like) { model[prefix + tensor] = values; }
        for (const auto* layer : {"layers.0.", "layers.1.", "layers.2."}) {
            if (!buffers) { break; }
            model[prefix + layer + "self_attn.rotary_emb.inv_freq"] = {taskvec::dtype::f32, {2}, {1, 0.5F}};
            model[prefix + layer + "attn.bias"] = {taskvec::dtype::f32, {1, 1, 2, 2}, {1, 0, 1, 1}};
        }
        std::filesystem::create_directories(m.folder / name);
        write_values(m.folder / name / "model.safetensors", model);
    };
    give("base-more", m.base, true, "");
    give("a-more", m.a, true, "");
    give("a-prefixed", m.a, false, "transformer.");
    give("b-prefixed", m.b, false, "transformer.");
    const auto merge = [](const std::string& base, const std::string& one, const std::string& other) {
        return "merge_method: ties\nbase_model: " + base
            + "\nparameters: {weight: 0.5, density: 0.5}\nmodels: [{model: " + one + "}, {model: " + other + "}]\n";
    };
    const auto expected = m.result(merge("base", "a", "b"));
    CHECK(same(m.result(merge("base", "a-more", "b")), expected));
    auto more = m.result(merge("base-more", "a", "b"));
    CHECK(more.size() == expected.size() + 6); // the base's buffers
    std::erase_if(more, [&](const auto& one) { return !expected.contains(one.first); });
    CHECK(same(more, expected));
    auto matched = m.result(merge("base-more", "a-prefixed", "b-prefixed"));
    std::erase_if(matched, [&](const auto& one) { return !expected.contains(one.first); });
    CHECK(same(matched, expected));
    const auto slices = [](const std::string& one, const std::string& other) {
        return "merge_method: passthrough\nslices:\n  - sources: [{model: " + one
            + ", layer_range: [0, 2]}]\n  - sources: [{model: " + other + ", layer_range: [1, 3]}]\n";
    };
    CHECK(same(m.result(slices("a", "b-prefixed")), m.result(slices("a", "b"))));
    // What no buffer is stays an error, with options that go on.
    give("a-stray", m.a, false, "");
    auto stray = m.a;
    stray["score.weight"] = {taskvec::dtype::f32, {2}, {1, 2}};
    write_values(m.folder / "a-stray/model.safetensors", stray);
    has(m.refusal(merge("base", "a-stray", "b")), "score.weight");
    CHECK(same(m.result(merge("base", "a-stray", "b"), {"--exclude", "score"}), expected));
}

TEST_CASE("a tokenizer_source with the tokens of all gives the result its tokenizer, and rows that pad are lined up")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const auto give = [&](const std::string& name, float shift, int padding, const nlohmann::json& truncation) {
        std::filesystem::create_directories(m.folder / name);
        std::vector<float> rows{shift, 1, shift, 2, shift, 3};
        rows.insert(rows.end(), static_cast<std::size_t>(2 * padding), 7.0F);
        const auto count = static_cast<std::int64_t>(rows.size() / 2);
        write_values(m.folder / name / "model.safetensors",
            {{"model.embed_tokens.weight", {taskvec::dtype::f32, {count, 2}, rows}}});
        spill(m.folder / name / "config.json", nlohmann::json{{"vocab_size", count}}.dump());
        spill(m.folder / name / "tokenizer_config.json", nlohmann::json{{"eos_token", name}}.dump());
        spill(m.folder / name / "tokenizer.json",
            nlohmann::json{{"version", "1.0"}, {"truncation", truncation}, {"added_tokens", nlohmann::json::array()},
                {"model", {{"type", "WordLevel"}, {"vocab", {{"x", 0}, {"y", 1}, {"z", 2}}}, {"unk_token", "x"}}}}
                .dump());
    };
    give("first", 0, 0, nullptr);
    give("second", 1, 0, {{"max_length", 64}});
    give("padded", 1, 2, nullptr);
    spill(m.folder / "second/chat_template.jinja", "{{ second }}");
    const auto config = [](const std::string& model, const std::string& source) {
        return "merge_method: task_arithmetic\nbase_model: first\nmodels:\n  - {model: " + model
            + ", parameters: {weight: 0.5}}\n" + source;
    };
    const auto eos = [&] {
        return nlohmann::json::parse(slurp(m.folder / "out/tokenizer_config.json"))["eos_token"].get<std::string>();
    };
    const auto plain = m.result(config("second", ""));
    CHECK(eos() == "first");
    CHECK(same(m.result(config("second", "tokenizer_source: second\n")), plain));
    CHECK(eos() == "second");
    CHECK(slurp(m.folder / "out/tokenizer.json") == slurp(m.folder / "second/tokenizer.json"));
    CHECK(slurp(m.folder / "out/chat_template.jinja") == "{{ second }}");
    CHECK(same(m.result(config("second", "tokenizer_source: base\n")), plain));
    CHECK(eos() == "first");
    (void)m.result(config("second", "tokenizer_source: second\n"), {"--copy-from", "first"});
    CHECK(eos() == "first");
    (void)m.result(config("second", "tokenizer: {source: second}\nchat_template: '{{ own }}'\n"));
    CHECK(slurp(m.folder / "out/chat_template.jinja") == "{{ own }}");
    for (const std::string source :
        {"tokenizer_source: base\n", "tokenizer: {source: union}\n", "tokenizer_source: padded\n"}) {
        CHECK(same(m.result(config("padded", source)), plain));
    }
    has(m.refusal(config("padded", "")), "--vocabulary base");
    CHECK(same(m.result(config("padded", ""), {"--vocabulary", "base"}), plain));
}

TEST_CASE("a base that is merged as well gives the result its vocabulary and files, wherever it stands")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give("first", {"a", "b", "c"}, 0); // a is 97
    m.give("second", {"c", "d", "a"}, 0.5F);
    const auto whose = [&] {
        return nlohmann::json::parse(slurp(m.folder / "out/config.json"))["of"].get<std::string>();
    };
    const std::string models = "models: [{model: first}, {model: second}]\nparameters: {weight: 1}\n";
    for (const std::string method : {"linear", "karcher"}) {
        const auto head = "merge_method: " + method + "\nmodels: [{model: first}, {model: second}]\n"
            + (method == "linear" ? "parameters: {weight: 1}\n" : "");
        for (const std::string base : {"first", "second"}) {
            for (const std::string source : {"", "tokenizer_source: base\n", "tokenizer_source: union\n"}) {
                const auto made = m.result(head + "base_model: " + base + "\n" + source);
                CHECK(whose() == base);
                const auto rows = made.at("model.embed_tokens.weight").shape[0];
                CHECK(rows == (source.find("union") == source.npos ? 3 : 4));
                if (rows == 3) {
                    CHECK(slurp(m.folder / "out/tokenizer.json") == slurp(m.folder / base / "tokenizer.json"));
                }
            }
        }
    }
    const std::string linear = "merge_method: linear\nbase_model: second\n" + models;
    const std::vector<float> own{99.25F, 0.25F, 100.5F, 0.5F, 97.25F, 0.25F}; // c, d, a; d is the base's
    m.check_rows(linear + "tokenizer_source: base", own);
    m.check_rows(linear + "tokenizer_source: second", own);
    auto with_b = own;
    with_b.insert(with_b.end(), {98, 0});
    m.check_rows(linear + "tokenizer_source: union", with_b);
    // What is not among the models is merged as well, and comes first.
    m.check_rows("merge_method: linear\nbase_model: second\nmodels: [{model: first}]\nparameters: {weight: 1}\n"
                 "tokenizer_source: base",
        own);
}

TEST_CASE("without a base a row that a model lacks is the mean of those that have it")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give("first", {"a", "c"}, 0);
    m.give("second", {"a"}, 1);
    m.give("third", {"c", "a"}, 2);
    for (const std::string source :
        {"tokenizer_source: union", "tokenizer: {}", "tokenizer: {source: union, pad_to_multiple_of: 2}"}) {
        // c is 99, its stand-in (99 + 101) / 2, and 101.
        m.check_rows("merge_method: linear\nmodels:\n  - {model: first, parameters: {weight: 1}}\n"
                     "  - {model: second, parameters: {weight: 0.5}}\n  - {model: third, parameters: {weight: 0.5}}\n"
                + source,
            {(97 + 49 + 49.5F) / 2, (0.5F + 1) / 2, (99 + 50 + 50.5F) / 2, (0.5F + 1) / 2});
    }
}

TEST_CASE("with a tokenizer_source rows that pad take no part, and the result has none")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give("first", {"a", "b", "c"}, 0, 4);
    m.give("second", {"a", "b", "c"}, 9, 4);
    m.give("more", {"b", "a", "d", "c"}, 5, 2);
    m.give("first-alone", {"a", "b", "c"}, 0);
    m.give("second-alone", {"a", "b", "c"}, 9);
    m.give("more-alone", {"b", "a", "d", "c"}, 5);
    const auto slerp = [&](const std::string& base, const std::string& task, const std::string& more) {
        return "merge_method: slerp\nbase_model: " + base + "\nmodels: [{model: " + task + "}]\nparameters: {t: 0.3}\n"
            + more;
    };
    for (const std::string source : {"tokenizer_source: base\n", "tokenizer_source: union\n",
             "tokenizer: {source: base, pad_to_multiple_of: 1}\n"}) {
        CAPTURE(source);
        for (const std::string task : {"second", "more"}) {
            const auto expected = m.result(slerp("first-alone", task + "-alone", source));
            CHECK(same(m.result(slerp("first", task, source)), expected));
        }
    }
    CHECK(same(m.result(slerp("first", "second", "tokenizer_source: base\n")),
        m.result(slerp("first-alone", "second-alone", ""))));
    CHECK(m.result(slerp("first", "second", "")).at("model.embed_tokens.weight").shape[0] == 7); // by their numbers
    m.check_rows("merge_method: passthrough\nmodels: [{model: first}]\ntokenizer_source: base", {97, 0, 98, 0, 99, 0});
}

TEST_CASE("a model without a tokenizer has the tokens of the base, and one that is not read is named")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give("first", {"a", "b", "c"}, 0);
    m.give("second", {"a", "b", "c"}, 1, 1);
    m.give("short", {"a", "b"}, 1);
    const auto merge = [](const std::string& base, const std::string& task, const std::string& source) {
        return "merge_method: task_arithmetic\nbase_model: " + base + "\nmodels:\n  - {model: " + task
            + ", parameters: {weight: 0.5}}\ntokenizer_source: " + source;
    };
    for (const auto* name : {"second/tokenizer.json", "second/tokenizer_config.json", "short/tokenizer.json"}) {
        std::filesystem::remove(m.folder / name);
    }
    for (const std::string source : {"base", "union"}) {
        m.check_rows(merge("first", "second", source), {97.5F, 0.5F, 98.5F, 0.5F, 99.5F, 0.5F});
    }
    has(m.refusal(merge("first", "short", "base")),
        "'short' has no tokenizer.json, and its 'model.embed_tokens.weight' has 2 rows for the 3 tokens of 'first'");
    has(m.refusal(merge("second", "first", "base")),
        "config.yml:5:1: 'tokenizer_source: base': 'second' has no tokenizer.json");
    has(m.refusal(merge("first", "first", "second")), "'second' has no tokenizer.json");
    spill(m.folder / "second/tokenizer.model", "pieces");
    const auto said = m.refusal(merge("first", "second", "base"));
    has(said, "'second' has no tokenizer.json, by which tokens are told apart, and its 'tokenizer.model' is not read");
    has(said, "leave 'tokenizer_source' out");
}

TEST_CASE("adapters on models in 16 bits leave the result in them")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give_adapter();
    for (const std::string name : {"base", "a"}) {
        auto half = name == "base" ? m.base : m.a;
        for (auto& [tensor, its] : half) { its.dtype = taskvec::dtype::bf16; }
        std::filesystem::create_directories(m.folder / (name + "16"));
        write_values(m.folder / (name + "16") / "model.safetensors", half);
    }
    REQUIRE(run(m.folder, {"fuse", "--base", "base16", "--adapter", "lora", "--out", "fused16"}).code == 0);
    const auto fused = read_values(m.folder / "fused16/model.safetensors");
    CHECK(same(m.result("merge_method: passthrough\nmodels: [{model: base16+lora}]\n"), fused));
    for (const std::string text :
        {"merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: base16+lora}, {model: a16}]\n",
            "merge_method: task_arithmetic\nparameters: {weight: 1}\nbase_model: base16+lora\nmodels: [{model: a16}]\n",
            "merge_method: task_arithmetic\nparameters: {weight: 1}\nbase_model: a16\nmodels: [{model: "
            "base16+lora}]\n"}) {
        for (const auto& [name, tensor] : m.result(text)) {
            CAPTURE_BOUND(name);
            CHECK(tensor.dtype == taskvec::dtype::bf16);
        }
    }
}

TEST_CASE("one slice of all layers takes models with adapters, others refuse them")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give_adapter();
    const auto sources = [](const std::string& first, const std::string& second, const std::string& range) {
        return "merge_method: slerp\nbase_model: " + first + "\nslices:\n  - sources: [{model: " + first
            + ", layer_range: " + range + "}, {model: " + second + ", layer_range: " + range
            + "}]\nparameters: {t: 0.5}\n";
    };
    const auto whole = [](const std::string& first, const std::string& second) {
        return "merge_method: slerp\nbase_model: " + first + "\nmodels: [{model: " + second
            + "}]\nparameters: {t: 0.5}\n";
    };
    CHECK(same(m.result(sources("a", "base+lora", "[0, 3]")), m.result(whole("a", "base+lora"))));
    CHECK(same(m.result(sources("base+lora", "a", "[0, 3]")), m.result(whole("base+lora", "a"))));
    has(m.refusal(sources("a", "base+lora", "[0, 2]")), "'base+lora': layers of a model with an adapter");
    has(m.refusal("merge_method: slerp\nbase_model: base+lora\nslices:\n  - sources: [{model: base, layer_range: "
                  "[0, 2]}, {model: a, layer_range: [0, 2]}]\nparameters: {t: 0.5}\n"),
        "'base+lora': layers of a model with an adapter"); // not the base without its adapter
}

TEST_CASE("an adapter that adds tokens is refused with what stores its model")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give("first", {"a", "b", "c"}, 0);
    std::filesystem::create_directories(m.folder / "grown");
    auto first = read_values(m.folder / "first/model.safetensors");
    first["model.layers.0.mlp.weight"] = {taskvec::dtype::f32, {1, 1}, {2}};
    write_values(m.folder / "first/model.safetensors", first);
    const std::string module = "base_model.model.model.layers.0.mlp";
    write_values(m.folder / "grown/adapter_model.safetensors",
        {{module + ".lora_A.weight", {taskvec::dtype::f32, {1, 1}, {1}}},
            {module + ".lora_B.weight", {taskvec::dtype::f32, {1, 1}, {1}}},
            {"base_model.model.model.embed_tokens.weight", {taskvec::dtype::f32, {4, 2}, {1, 2, 3, 4, 5, 6, 7, 8}}}});
    spill(m.folder / "grown/adapter_config.json",
        R"({"peft_type": "LORA", "r": 1, "lora_alpha": 1, "modules_to_save": ["embed_tokens"]})");
    m.give("tokens", {"a", "b", "c", "d"}, 0);
    std::filesystem::copy(m.folder / "tokens/tokenizer.json", m.folder / "grown/tokenizer.json");
    const auto said = m.refusal("merge_method: passthrough\nmodels: [{model: first+grown}]\n");
    has(said, "'model.embed_tokens.weight' has 4 rows in 'grown' and 3 in 'first'");
    has(said, "taskvec fuse --base first --adapter grown --copy-from grown");
    REQUIRE(
        run(m.folder, {"fuse", "--base", "first", "--adapter", "grown", "--copy-from", "grown", "--out", "stored"}).code
        == 0);
    CHECK(slurp(m.folder / "stored/tokenizer.json") == slurp(m.folder / "grown/tokenizer.json"));
    m.check_rows(
        "merge_method: passthrough\nmodels: [{model: stored}]\ntokenizer_source: base", {1, 2, 3, 4, 5, 6, 7, 8});
}

TEST_CASE("names of models may hold a plus, and what is read so is written so")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    m.give_adapter();
    std::filesystem::rename(m.folder / "base", m.folder / "b+c");
    auto expected = m.base;
    for (auto& value : expected.at("layers.1.mlp.weight").values) { value += 0.125F; }
    for (const std::string name : {"b+c+lora", "{model: {path: b+c}, lora: {path: lora}}"}) {
        CHECK(same(m.result("merge_method: passthrough\nmodels: [{model: " + name + "}]\n"), expected));
    }
    const auto merged = m.merged({"--method", "task-arithmetic", "--base", "b+c", "--task", "a=0.5", "--task-adapter",
        "lora", "--as-config", "written.yml"});
    CHECK(same(m.result(slurp(m.folder / "written.yml")), merged));
    has(m.refusal("merge_method: passthrough\nmodels: [{model: nowhere+lora}]\n"), "there is no model 'nowhere'");
}

TEST_CASE("the card of a merge in stages names the models that the stages were made of")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    (void)m.result(
        "name: one\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n---\n"
        "name: two\nmerge_method: passthrough\nmodels: [{model: one}]\n---\n"
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: two, parameters: {weight: 0.3}}]\n");
    const auto card = slurp(m.folder / "out/README.md");
    CHECK(card.substr(0, card.find("tags:")) == "---\nbase_model:\n- base\n- a\n- b\n");
    has(card, "| a | task of 'one' | 1 | `xxh64:");
    for (const std::string model : {"base", "a", "b"}) {
        CHECK(run(m.folder, {"inspect", model, "--verify", "out/README.md"}).code == 0);
    }
}

TEST_CASE("a tolerance of 0 is never reached, as in mergekit")
{
    const configured m;
    if (!reads_yaml(m)) { return; }
    const std::string head = "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: ";
    const auto made = m.result(head + "{tol: 0, max_iter: 40}\n");
    CHECK(same(made,
        m.merged({"--method", "karcher", "--task", "a", "--task", "b", "--steps", "40", "--tolerance", "1e-300"})));
    has(m.refusal(head + "{tol: -1}\n"), "config.yml:3:");
}
