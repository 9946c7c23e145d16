// Checkpoints as people have them: names that differ, ties, indexes, results that overflow, filters and tasks that do
// nothing, places that are no files. Each ends in the right values, or in a sentence with the way on.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include "../capture.hpp"

#include <nlohmann/json.hpp>

#include <cstdlib>
#include <random>

using namespace tools_test;

namespace {

using words = std::vector<std::string>;

values_tensor f32(taskvec::extents shape, std::vector<float> values)
{
    return {taskvec::dtype::f32, std::move(shape), std::move(values)};
}
values_tensor f16(taskvec::extents shape, std::vector<float> values)
{
    return {taskvec::dtype::f16, std::move(shape), std::move(values)};
}

outcome merge(const scratch& folder, words more)
{
    words all{"merge", "--method", "task-arithmetic", "--lambda", "1"};
    all.insert(all.end(), more.begin(), more.end());
    return run(folder, all);
}

bool has(const std::string& text, const std::string& part)
{
    return text.find(part) != std::string::npos;
}

/// An error of one line with all of these parts.
bool refused(const outcome& result, const words& parts, int code = 1)
{
    bool all = result.code == code && is_error_line(result.err);
    for (const auto& part : parts) { all = all && has(result.err, part); }
    if (!all) { MESSAGE("exit ", result.code, ": ", result.err); }
    return all;
}

const words base_names{"model.embed_tokens.weight", "model.layers.0.w", "model.layers.1.w", "lm_head.weight"};

values_model language_model(float value)
{
    values_model model;
    for (std::size_t i = 0; i < base_names.size(); ++i) {
        const float x = value + static_cast<float>(i);
        model[base_names[i]] = i == 1 || i == 2 ? f32({2, 2}, {x, x, x, x}) : f32({3, 2}, {x, x, x, x, x, x});
    }
    return model;
}

} // namespace

TEST_CASE("finite results that f16 cannot hold: an error, the largest number, or infinity, in every verb")
{
    const scratch folder;
    write_values(folder / "a.safetensors", {{"w", f32({2}, {1e5f, 1})}});
    write_values(folder / "b.safetensors", {{"w", f32({2}, {1.1e5f, 2})}});
    write_values(folder / "h0.safetensors", {{"w", f16({2}, {30000, 1})}});
    write_values(folder / "h1.safetensors", {{"w", f16({2}, {60000, 1})}});
    REQUIRE(run(folder,
                {"prune", "--base", "h0.safetensors", "--task", "h1.safetensors", "--density", "1", "--out",
                    "d.safetensors"})
                .code
        == 0);
    const std::vector<words> verbs{
        {"merge", "--method", "average", "--task", "a.safetensors", "--task", "b.safetensors", "--dtype", "f16"},
        {"merge", "--method", "task-arithmetic", "--lambda", "2", "--base", "h0.safetensors", "--task",
            "h1.safetensors"},
        {"merge", "--method", "ties", "--density", "1", "--lambda", "2", "--base", "h0.safetensors", "--task",
            "h1.safetensors"},
        {"apply", "--base", "h0.safetensors", "--delta", "d.safetensors", "--scale", "2"}};
    for (const auto& verb : verbs) {
        CAPTURE(verb[0]);
        auto all = verb;
        all.insert(all.end(), {"--out", "o.safetensors"});
        CHECK(refused(run(folder, all), {"tensor 'w'", "index 0", "F16", "65504", "saturate"}));
        CHECK_FALSE(std::filesystem::exists(folder / "o.safetensors"));
        all.insert(all.end(), {"--overflow", "saturate", "--report", "r.json"});
        REQUIRE(run(folder, all).code == 0);
        CHECK(read_values(folder / "o.safetensors").at("w").values[0] == 65504.0f);
        CHECK(nlohmann::json::parse(slurp(folder / "r.json"))["saturated"] == 1);
        all[all.size() - 3] = "propagate";
        REQUIRE(run(folder, all).code == 0);
        CHECK(std::isinf(read_values(folder / "o.safetensors").at("w").values[0]));
        std::filesystem::remove(folder / "o.safetensors");
    }
}

TEST_CASE("filters that match nothing are errors, with what may have been meant")
{
    const scratch folder;
    write_values(folder / "a.safetensors", language_model(1));
    write_values(folder / "b.safetensors", language_model(2));
    for (const std::string option : {"--include", "--exclude"}) {
        for (const words& verb :
            {words{"merge", "--method", "ties", "--out", "o.safetensors"}, words{"prune", "--out", "o.safetensors"},
                words{"similarity"}, words{"peru-fft", "--method", "ties", "--out", "o"}}) {
            auto all = verb;
            all.insert(all.end(), {"--base", "a.safetensors", "--task", "b.safetensors", option, "lm_haed"});
            CHECK(refused(run(folder, all),
                {option + " 'lm_haed' matches no tensor of 'a.safetensors'", "did you mean 'lm_head.weight'"}));
        }
    }
    CHECK(refused(merge(folder,
                      {"--base", "a.safetensors", "--task", "b.safetensors", "--out", "o.safetensors", "--include",
                          "lm_head", "--exclude", "weight"}),
        {"no floating tensor of 'a.safetensors' is left by --include and --exclude"}));
}

TEST_CASE("a task that lacks everything is an error, one that lacks something a counted note")
{
    const scratch folder;
    write_values(folder / "base.safetensors", language_model(1));
    write_values(folder / "other.safetensors", {{"embed.q", f32({1}, {1})}});
    auto part = language_model(3);
    part.erase("model.layers.1.w");
    write_values(folder / "part.safetensors", part);
    CHECK(refused(merge(folder,
                      {"--base", "base.safetensors", "--task", "other.safetensors", "--include", "^model|^lm",
                          "--missing", "base", "--out", "o.safetensors"}),
        {"'other.safetensors' has none of the tensors that take part", "it gives nothing"}));
    const auto two = merge(folder,
        {"--base", "base.safetensors", "--task", "part.safetensors", "--task", "base.safetensors=2", "--missing",
            "base", "--out", "o.safetensors", "--report", "r.json"});
    REQUIRE(two.code == 0);
    CHECK(has(two.err,
        "'part.safetensors' lacks 1 tensor ('model.layers.1.w'): the base's stand for it, 4 of the 20 entries"));
    CHECK(has(two.err, "'base.safetensors' is the base itself"));
    const auto report = nlohmann::json::parse(slurp(folder / "r.json"));
    CHECK(report["tasks"][0]["missing"] == 1);
    CHECK(report["notes"].size() == 2);
    // What no task has is no part of a share: of 16 entries a half is 8, not 10.
    REQUIRE(run(folder,
                {"prune", "--base", "base.safetensors", "--task", "part.safetensors", "--missing", "base", "--density",
                    "0.5", "--out", "d.safetensors", "--report", "r.json"})
                .code
        == 0);
    CHECK(nlohmann::json::parse(slurp(folder / "r.json"))["tasks"][0]["kept"] == 8);
}

TEST_CASE("an integer tensor that a task lacks is the base's, unless --missing error is given")
{
    const scratch folder;
    const auto write = [&](const char* name, bool whole) {
        std::vector<taskvec::tensor_spec> specs{{"w", taskvec::dtype::f32, {1}}};
        if (whole) { specs.insert(specs.begin(), {"ids", taskvec::dtype::i64, {1}}); }
        taskvec::safetensors_writer writer(folder / name, specs, taskvec::metadata_map(), taskvec::durability::process);
        const std::int64_t ids = 5;
        const float w = whole ? 1 : 2;
        if (whole) { writer.write(0, 0, &ids, sizeof ids); }
        writer.write(specs.size() - 1, 0, &w, sizeof w);
        writer.commit();
    };
    write("base.safetensors", true);
    write("task.safetensors", false);
    const std::vector<words> verbs{{"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task",
                                       "task.safetensors", "--out", "o.safetensors"},
        {"prune", "--base", "base.safetensors", "--task", "task.safetensors", "--out", "d.safetensors"},
        {"similarity", "--base", "base.safetensors", "--task", "task.safetensors"}};
    for (const auto& verb : verbs) {
        CAPTURE(verb[0]);
        auto strict = verb;
        strict.insert(strict.end(), {"--missing", "error"});
        CHECK(refused(run(folder, strict),
            {"tensor 'ids' of 'base.safetensors' is missing in 'task.safetensors'", "leave --missing error out",
                "[tensor-missing]"}));
        strict.insert(strict.end(), {"--exclude", "ids"});
        CHECK(run(folder, strict).code == 0);
        const auto as_it_is = run(folder, verb);
        CHECK(as_it_is.code == 0);
        CHECK(has(as_it_is.err, "'task.safetensors' lacks 1 tensor ('ids'): the base's stand for it"));
    }
}

TEST_CASE("a task with the base's bytes is noted in every verb, whatever its path")
{
    const scratch folder;
    values_model base = language_model(1);
    base["wide"] = f32({3000}, std::vector<float>(3000, 2));
    auto good = language_model(2), near = base;
    good["wide"] = base["wide"];
    near["wide"].values[1500] = 3; // neither end of the tensor shows it
    write_values(folder / "base.safetensors", base);
    write_values(folder / "copy.safetensors", base);
    write_values(folder / "good.safetensors", good);
    write_values(folder / "near.safetensors", near);
    const std::string said =
        "'copy.safetensors' has the base's bytes in all 5 tensors that take part: its task vector is 0";
    for (const words& verb :
        {words{"merge", "--method", "ties", "--out", "o.safetensors"}, words{"prune", "--out", "d.safetensors"},
            words{"peru-fft", "--method", "average", "--out", "p"}, words{"similarity"}}) {
        CAPTURE(verb[0]);
        auto all = verb;
        all.insert(all.end(), {"--base", "base.safetensors", "--task", "copy.safetensors", "--report", "r.json"});
        if (verb[0] != "prune") { all.insert(all.end(), {"--task", "good.safetensors", "--task", "near.safetensors"}); }
        const auto result = run(folder, all);
        CHECK(result.code == 0);
        CHECK_MESSAGE(has(result.err, said), result.err);
        CHECK_FALSE(has(result.err, "'good"));
        CHECK_FALSE(has(result.err, "'near"));
        const auto report = nlohmann::json::parse(slurp(folder / "r.json"));
        REQUIRE(report["notes"].size() == 1);
        CHECK(report["notes"][0] == said);
    }
    // Of the tensors that take part; the same path is said as before, once.
    const auto part = merge(folder,
        {"--base", "base.safetensors", "--task", "good.safetensors", "--task", "base.safetensors", "--include", "wide",
            "--out", "o.safetensors"});
    CHECK(has(part.err, "'good.safetensors' has the base's bytes in the tensor that takes part"));
    CHECK(has(part.err, "'base.safetensors' is the base itself"));
    CHECK_FALSE(has(part.err, "'base.safetensors' has the base's bytes"));
}

TEST_CASE("models without any tensor are errors")
{
    const scratch folder;
    write_values(folder / "none.safetensors", {});
    write_values(folder / "base.safetensors", language_model(1));
    for (const words& verb : {words{"merge", "--method", "average", "--out", "o.safetensors"},
             words{"merge", "--method", "ties", "--base", "none.safetensors", "--out", "o.safetensors"},
             words{"merge", "--method", "ties", "--base", "base.safetensors", "--missing", "base", "--out",
                 "o.safetensors"},
             words{"prune", "--base", "none.safetensors", "--out", "d.safetensors"},
             words{"peru-fft", "--method", "ties", "--base", "none.safetensors", "--out", "p"},
             words{"similarity", "--base", "none.safetensors"}}) {
        CAPTURE(verb[0]);
        auto all = verb;
        all.insert(all.end(), {"--task", "none.safetensors"});
        CHECK(refused(run(folder, all), {"none.safetensors", "holds no tensors"}));
        CHECK_FALSE(std::filesystem::exists(folder / "o.safetensors"));
    }
    CHECK(run(folder, {"inspect", "none.safetensors"}).code == 0);
}

TEST_CASE("an integer tensor that a task saves no more is the base's")
{
    const scratch folder;
    const std::int64_t positions[] = {0, 1};
    const float weights[] = {1, 2};
    taskvec::const_model_ref base, task;
    base.insert("position_ids", {positions, taskvec::dtype::i64, {2}, {}});
    for (auto* model : {&base, &task}) { model->insert("w", {weights, taskvec::dtype::f32, {2}, {}}); }
    taskvec::write_safetensors(folder / "base.safetensors", base);
    taskvec::write_safetensors(folder / "task.safetensors", task);
    const auto result =
        merge(folder, {"--base", "base.safetensors", "--task", "task.safetensors", "--out", "o.safetensors"});
    REQUIRE(result.code == 0);
    CHECK(has(result.err, "lacks 1 tensor ('position_ids')"));
    CHECK(taskvec::safetensors_file(folder / "o.safetensors").entries().size() == 2);
}

TEST_CASE("factors of adapters are refused by the verb that merges models")
{
    const scratch folder;
    const std::vector<std::pair<std::string, std::string>> kinds{{"lora_unet_x.lora_up.weight", "LoRA"},
        {"base_model.model.q.lora_A.weight", "LoRA"}, {"q.lora_B.default.weight", "LoRA"},
        {"unet.q.lora.down.weight", "LoRA"}, {"text_encoder.q_lora.up.weight", "LoRA"},
        {"emb.lora_embedding_A", "LoRA"}, {"x.hada_w1_a", "LoHa"}, {"x.lokr_w2_b", "LoKr"},
        {"q.lora_magnitude_vector", "DoRA"}, {"x.dora_scale", "DoRA"}};
    for (const auto& [name, kind] : kinds) {
        write_values(folder / "k.safetensors", {{name, f32({2}, {1, 2})}, {"plain", f32({1}, {1})}});
        for (const words& verb : {words{"merge", "--method", "average", "--out", "o.safetensors"},
                 words{"merge", "--method", "ties", "--base", "k.safetensors", "--out", "o.safetensors"}}) {
            auto all = verb;
            all.insert(all.end(), {"--task", "k.safetensors"});
            const auto result = run(folder, all);
            CHECK(result.code == 1);
            CHECK(has(result.err, "holds factors of an adapter (" + kind + ": '" + name + "')"));
            CHECK(has(result.err, "merge-lora"));
        }
        CHECK(run(folder,
                  {"merge", "--method", "slerp", "--task", "k.safetensors", "--task", "k.safetensors", "--exclude",
                      "lora|hada|lokr|dora", "--out", "o.safetensors"})
                  .code
            == 0);
    }
}

TEST_CASE("parts of adapters that no verb reads are refused as such, and what excludes them does")
{
    const scratch folder;
    const std::vector<std::pair<words, std::string>> kinds{
        {{"double_blocks.0.processor.qkv_lora1.down.weight", "double_blocks.0.processor.qkv_lora1.up.weight",
             "single_blocks.0.processor.qkv_lora.up.weight"},
            "XLabs' LoRA"},
        {{"lora_unet_q.a1.weight", "lora_unet_q.a2.weight", "lora_unet_q.b1.weight", "lora_unet_q.b2.weight"}, "GLoRA"},
        {{"m.q.a1.weight", "m.q.a2.weight", "m.q.b1.weight", "m.q.b2.weight", "m.q.bm.weight"}, "GLoRA"},
        {{"base_model.model.q.glora_A", "base_model.model.q.glora_E"}, "GLoRA"}, {{"base_model.model.q.oft_r"}, "OFT"},
        {{"base_model.model.q.oft_R.weight"}, "OFT"}, {{"lora_unet_q.oft_blocks", "lora_unet_q.alpha"}, "OFT"},
        {{"base_model.model.q.boft_R", "base_model.model.q.boft_s"}, "BOFT"}, {{"base_model.model.q.ia3_l"}, "IA3"},
        {{"base_model.model.q.ia3_l.default"}, "IA3"},
        {{"base_model.model.q.vera_lambda_b", "base_model.model.q.vera_lambda_d", "base_model.vera_A"}, "VeRA"},
        {{"base_model.model.q.hra_u"}, "HRA"}, {{"base_model.model.q.randlora_lambda"}, "RandLoRA"},
        {{"base_model.model.q.fourierft_spectrum"}, "FourierFT"}, {{"base_model.model.q.c3a_kernel"}, "C3A"},
        {{"base_model.model.q.miss_block"}, "MiSS"}, {{"base_model.model.q.road_theta"}, "RoAd"},
        {{"base_model.model.q.shira_weight"}, "SHiRA"}, {{"base_model.model.q.hira_A.weight"}, "HiRA"},
        {{"base_model.model.e.trainable_tokens_delta"}, "trainable tokens"},
        {{"lora_unet_q.weight", "lora_unet_q.on_input"}, "LyCORIS"}, {{"lycoris_q.rescale"}, "LyCORIS"}};
    for (const auto& [names, kind] : kinds) {
        CAPTURE_BOUND(kind);
        const auto& first = names.front();
        CAPTURE(first);
        values_model model{{"plain", f32({1}, {1})}, {"lora_unet_x.diff", f32({1}, {2})}};
        for (const auto& name : names) { model[name] = f32({2}, {1, 2}); }
        write_values(folder / "k.safetensors", model);
        words line{"merge", "--method", "average", "--task", "k.safetensors", "--out", "o.safetensors"};
        const auto result = run(folder, line);
        CHECK(refused(result, {"holds factors of an adapter (" + kind + ": '", "no verb reads this kind"}));
        CHECK_FALSE(has(result.err, "merge-lora"));
        const std::string flag = "--exclude '";
        const auto from = result.err.find(flag) + flag.size();
        REQUIRE(from > flag.size());
        line.insert(line.end(), {"--exclude", result.err.substr(from, result.err.find('\'', from) - from)});
        CHECK(run(folder, line).code == 0);
    }
    // Factors of two kinds in one file are left out by one pattern, and names that only resemble them are models'.
    write_values(folder / "k.safetensors",
        {{"q.lora_A.weight", f32({1}, {1})}, {"q.lora_magnitude_vector", f32({1}, {1})},
            {"x.dora_scale", f32({1}, {1})}, {"x.hada_w1_a", f32({1}, {1})}, {"plain", f32({1}, {1})}});
    CHECK(refused(run(folder, {"merge", "--method", "average", "--task", "k.safetensors", "--out", "o.safetensors"}),
        {"merge-lora", "--exclude 'dora_scale|hada_|lora'"}));
    write_values(folder / "k.safetensors",
        {{"flora.up.weight", f32({1}, {1})}, {"encoder.block.up.0.weight", f32({1}, {1})}, {"a1.weight", f32({1}, {1})},
            {"b.a1.weight", f32({1}, {1})}, {"oft_router.weight", f32({1}, {1})}, {"vera_model.w", f32({1}, {1})},
            {"lora_unet_x.diff", f32({1}, {1})}, {"lora_unet_x.diff_b", f32({1}, {1})}});
    const auto plain =
        run(folder, {"merge", "--method", "average", "--task", "k.safetensors", "--out", "o.safetensors"});
    CHECK_MESSAGE(plain.code == 0, plain.err);
}

TEST_CASE("without a base a tensor that a task lacks can be left out, as the message says")
{
    const scratch folder;
    write_values(folder / "a.safetensors", {{"w", f32({2}, {1, 2})}, {"buffer", f32({1}, {7})}});
    write_values(folder / "b.safetensors", {{"w", f32({2}, {3, 4})}});
    words line{
        "merge", "--method", "average", "--task", "a.safetensors", "--task", "b.safetensors", "--out", "o.safetensors"};
    CHECK(refused(run(folder, line),
        {"tensor 'buffer' of 'a.safetensors' is missing in 'b.safetensors'", "leave it out by --exclude"}));
    line.insert(line.end(), {"--exclude", "^buffer$"});
    REQUIRE(run(folder, line).code == 0);
    CHECK(same(read_values(folder / "o.safetensors"), {{"w", f32({2}, {2, 3})}, {"buffer", f32({1}, {7})}}));
}

TEST_CASE("a file that bears the name of the directory to be is in its way, and stays")
{
    const scratch folder;
    for (const std::string name : {"a", "b"}) {
        std::filesystem::create_directory(folder / name);
        write_values(folder / name / "model.safetensors", {{"w", f32({2}, {1, 2})}});
    }
    spill(folder / "notes", "mine");
    const words line{"merge", "--method", "average", "--task", "a", "--task", "b", "--out", "notes"};
    CHECK(refused(run(folder, line), {"notes", "exists and is not a directory"}));
    CHECK(slurp(folder / "notes") == "mine");
    // A model's file of that name is replaced where files are merged.
    CHECK(run(folder, {"merge", "--method", "average", "--task", "a/model.safetensors", "--out", "notes"}).code == 0);
    CHECK(read_values(folder / "notes").at("w").values == std::vector<float>{1, 2});
}

TEST_CASE("a model in the Hub's cache is named by its snapshot")
{
    const scratch folder;
    const auto model = folder.path() / "models--org--a";
    for (const std::string revision : {"abc", "def"}) {
        std::filesystem::create_directories(model / "snapshots" / revision);
        write_values(model / "snapshots" / revision / "model.safetensors", {{"w", f32({2}, {1, 2})}});
    }
    const auto told = [&](const std::string& revision) {
        const words parts{"models--org--a: is a model in the Hub's cache", "models--org--a/snapshots/" + revision};
        return refused(run(folder, {"inspect", "models--org--a"}), parts)
            && refused(
                run(folder, {"merge", "--method", "average", "--task", "models--org--a", "--out", "o.safetensors"}),
                parts)
            && refused(run(folder, {"merge-lora", "--method", "linear", "--adapter", "models--org--a/", "--out", "o"}),
                {"is a model in the Hub's cache", "snapshots/" + revision});
    };
    CHECK(told("abc"));
    std::filesystem::create_directories(model / "refs");
    spill(model / "refs/main", "def\n");
    CHECK(told("def"));
    CHECK(run(folder, {"inspect", "models--org--a/snapshots/def"}).code == 0);
    std::filesystem::remove_all(model / "snapshots");
    std::filesystem::create_directories(model / "snapshots");
    CHECK(refused(run(folder, {"inspect", "models--org--a"}), {"fetch it again"}));
}

TEST_CASE("places that are no plain files are written through or refused, and stay what they are")
{
    const scratch folder;
    write_values(folder / "a.safetensors", {{"w", f32({2}, {1, 2})}});
    write_values(folder / "b.safetensors", {{"w", f32({2}, {2, 1})}});
    std::filesystem::create_directory(folder / "dev");
    std::filesystem::create_symlink("/proc/self/fd/1", folder / "dev/stdout");
    std::filesystem::create_symlink("stdout", folder / "dev/again");
    std::filesystem::create_symlink("/dev/null", folder / "dev/none");
    for (const std::string place : {"dev/stdout", "dev/again", "dev/none"}) {
        CAPTURE(place);
        CHECK(refused(run(folder, {"merge", "--method", "average", "--task", "a.safetensors", "--out", place}),
            {place, "is not a regular file"}));
        CHECK(std::filesystem::is_symlink(folder / place));
        const auto result = run(folder,
            {"merge", "--method", "average", "--task", "a.safetensors", "--out", "o.safetensors", "--report", place});
        CHECK(result.code == 0);
        CHECK(std::filesystem::is_symlink(folder / place));
        CHECK(has(result.out, "merged 1 task"));
        CHECK(has(result.out, "\"method\": \"average\"") == (place != "dev/none"));
    }
    const auto table =
        run(folder, {"similarity", "--base", "a.safetensors", "--task", "b.safetensors", "--csv", "dev/stdout"});
    CHECK(table.code == 0);
    CHECK(has(table.out, "task,b"));
}

TEST_CASE("a link that leads nowhere is no place for an output")
{
    const scratch folder;
    write_values(folder / "a.safetensors", {{"w", f32({2}, {1, 2})}});
    write_values(folder / "b.safetensors", {{"w", f32({2}, {2, 1})}});
    const auto lost = folder.path() / "not-mounted" / "there";
    std::filesystem::create_symlink(lost, folder / "link");
    std::filesystem::create_symlink("round", folder / "round");
    for (const std::string place : {"link", "link/", "round"}) {
        for (const words& verb : {words{"merge", "--method", "average", "--out", place},
                 words{"merge", "--method", "average", "--shard-size", "1GB", "--out", place},
                 words{"peru-fft", "--method", "ties", "--base", "b.safetensors", "--out", place},
                 words{"similarity", "--base", "b.safetensors", "--csv", place},
                 words{"merge", "--method", "average", "--out", "o.safetensors", "--report", place}}) {
            CAPTURE(verb[0]);
            auto all = verb;
            all.insert(all.end(), {"--task", "a.safetensors"});
            CHECK(refused(run(folder, all),
                {place == "round" ? "round: is a link to 'round'" : "link: is a link to '" + lost.string() + "'",
                    "which is not there"}));
            CHECK_FALSE(std::filesystem::exists(folder / "o.safetensors"));
        }
        CHECK(std::filesystem::is_symlink(folder / (place == "link/" ? "link" : place)));
    }
    for (const std::string place : {"link", "round"}) { // what takes no model
        CHECK(refused(run(folder, {"completion", "bash", "--out", place}), {place + ": is a link to '"}));
        CHECK(std::filesystem::is_symlink(folder / place));
    }
    std::filesystem::create_directories(lost);
    CHECK(run(folder, {"merge", "--method", "average", "--task", "a.safetensors", "--out", "link/o.safetensors"}).code
        == 0);
}

TEST_CASE("an existing path wins over PATH=WEIGHT, and a weight that is none says so")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "lr=0.5");
    std::filesystem::create_directory(folder / "lr");
    write_values(folder / "lr=0.5/model.safetensors", {{"w", f32({1}, {1})}});
    write_values(folder / "lr/model.safetensors", {{"w", f32({1}, {100})}});
    write_values(folder / "other.safetensors", {{"w", f32({1}, {3})}});
    const auto average = [&](const std::string& first) {
        return run(folder,
            {"merge", "--method", "average", "--task", first, "--task", "other.safetensors", "--out", "o.safetensors"});
    };
    REQUIRE(average("lr=0.5").code == 0);
    CHECK(read_values(folder / "o.safetensors").at("w").values[0] == 2);
    REQUIRE(average("lr=0.5=3").code == 0);
    CHECK(read_values(folder / "o.safetensors").at("w").values[0] == 1.5f);
    REQUIRE(average("lr=3").code == 0);
    CHECK(read_values(folder / "o.safetensors").at("w").values[0] == 75.75f);
    for (const std::string weight : {"half", "0,5", "", "nan"}) {
        const auto result = average("other.safetensors=" + weight); // a path then, and nothing is there
        CHECK(result.code == 1);
        CHECK(has(result.err, "taskvec: error: other.safetensors=" + weight + ": is not there"));
        CHECK(has(result.err, "'" + weight + "' is no number"));
        CHECK(has(result.err, "'other.safetensors=0.5' [file-not-found]"));
    }
    std::filesystem::copy(folder / "other.safetensors", folder / "other.safetensors=half");
    CHECK(average("other.safetensors=half").code == 0);
}

TEST_CASE("tasks of one name are told apart by their folders, and one model may come twice")
{
    const scratch folder;
    write_values(folder / "base.safetensors", {{"w", f32({2}, {0, 0})}});
    int number = 0;
    for (const std::string place : {"math/checkpoint-500", "code/checkpoint-500"}) {
        std::filesystem::create_directories(folder / place);
        write_values(folder / place / "model.safetensors", {{"w", f32({2}, {1, number == 0 ? 0.0f : 1.0f})}});
        ++number;
    }
    const auto table = run(folder,
        {"similarity", "--base", "base.safetensors", "--task", "math/checkpoint-500", "--task",
            "code/checkpoint-500/"});
    CHECK(table.code == 0);
    CHECK(has(table.out, "math-checkpoint-500"));
    CHECK(has(table.out, "code-checkpoint-500"));
    const auto twice = run(folder,
        {"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "math/checkpoint-500", "--task",
            "math/checkpoint-500", "--out", "p"});
    CHECK(twice.code == 0);
    CHECK(has(twice.err, "is given twice"));
    CHECK(std::filesystem::exists(folder / "p/checkpoint-500.delta.safetensors"));
    CHECK(std::filesystem::exists(folder / "p/checkpoint-500-2.delta.safetensors"));
}

TEST_CASE("names that differ by prefixes are found, proposed, and lined up")
{
    const auto base = language_model(1);
    for (const auto& [off, on] : std::vector<std::pair<std::string, std::string>>{{"", "base_model.model."},
             {"", "_orig_mod."}, {"", "module."}, {"model.", "model.language_model."}, {"model.", ""}}) {
        CAPTURE_BOUND(off);
        CAPTURE_BOUND(on);
        const scratch folder;
        write_values(folder / "base.safetensors", base);
        values_model task;
        for (const auto& [name, tensor] : language_model(3)) {
            task[name.starts_with(off) ? on + name.substr(off.size()) : name] = tensor;
        }
        write_values(folder / "task.safetensors", task);
        const words plain{"--base", "base.safetensors", "--task", "task.safetensors", "--out", "o.safetensors"};
        const auto refusal = merge(folder, plain);
        CHECK(refused(refusal, {"call tensors differently", "--match-prefixes", "--rename"}));
        auto matched = plain;
        matched.emplace_back("--match-prefixes");
        const auto result = merge(folder, matched);
        REQUIRE(result.code == 0);
        CHECK(has(result.err, "note: names of 'task.safetensors'"));
        CHECK(same(read_values(folder / "o.safetensors"), language_model(3)));
        // The proposed --rename does the same.
        auto renamed = plain;
        const auto from = refusal.err.find("--rename '") + 10;
        REQUIRE(from > 10);
        renamed.insert(renamed.end(), {"--rename", refusal.err.substr(from, refusal.err.find('\'', from) - from)});
        // (Options after --out: the last model named before is the task.)
        REQUIRE(merge(folder, renamed).code == 0);
        CHECK(same(read_values(folder / "o.safetensors"), language_model(3)));
    }
}

TEST_CASE("segments that wrappers put within names are found, proposed, and left out")
{
    const auto base = language_model(1), tuned = language_model(3);
    const auto wrapped = [](const values_model& model, const std::string& before, const std::string& segment) {
        values_model result;
        for (const auto& [name, tensor] : model) {
            auto inner = name;
            if (const auto at = name.find("layers."); at != name.npos) { inner.insert(at + 8, "." + segment); }
            result[before + inner] = tensor;
        }
        return result;
    };
    REQUIRE_FALSE(same(wrapped(base, "", "x"), base));
    for (const std::string segment :
        {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "base_layer"}) {
        for (const std::string before : {"", "_fsdp_wrapped_module."}) {
            CAPTURE(segment);
            CAPTURE(before);
            const scratch folder;
            write_values(folder / "base.safetensors", base);
            write_values(folder / "task.safetensors", wrapped(tuned, before, segment));
            const words plain{"--base", "base.safetensors", "--task", "task.safetensors", "--out", "o.safetensors"};
            const auto refusal = merge(folder, plain);
            CHECK(refused(
                refusal, {"call tensors differently", "'" + segment + ".' within names taken out", "--rename"}));
            auto matched = plain;
            matched.emplace_back("--match-prefixes");
            REQUIRE(merge(folder, matched).code == 0);
            CHECK(same(read_values(folder / "o.safetensors"), tuned));
            // The proposed --renames do the same.
            auto renamed = plain;
            const std::string flag = "--rename '";
            for (auto at = refusal.err.find(flag); at != refusal.err.npos; at = refusal.err.find(flag, at + 1)) {
                const auto from = at + flag.size();
                renamed.insert(
                    renamed.end(), {"--rename", refusal.err.substr(from, refusal.err.find('\'', from) - from)});
            }
            REQUIRE(renamed.size() > plain.size());
            REQUIRE(merge(folder, renamed).code == 0);
            CHECK(same(read_values(folder / "o.safetensors"), tuned));
        }
    }
    // The base's own: the result has its names.
    const scratch folder;
    write_values(folder / "base.safetensors", wrapped(base, "", "_orig_mod"));
    write_values(folder / "task.safetensors", tuned);
    const words plain{"--base", "base.safetensors", "--task", "task.safetensors", "--out", "o.safetensors"};
    CHECK(refused(merge(folder, plain), {"'_orig_mod.' put within names", "--match-prefixes"}));
    auto matched = plain;
    matched.emplace_back("--match-prefixes");
    REQUIRE(merge(folder, matched).code == 0);
    CHECK(same(read_values(folder / "o.safetensors"), wrapped(tuned, "", "_orig_mod")));
}

TEST_CASE("--rename and --map belong to the model before them, or to the first")
{
    const scratch folder;
    write_values(folder / "base.safetensors", {{"a", f32({1}, {1})}, {"b.x", f32({2}, {1, 1})}});
    write_values(folder / "task.safetensors", {{"A", f32({1}, {2})}, {"x.b", f32({2}, {3, 3})}});
    spill(folder / "map.json", R"({"A": "a", "x.b": "b.x"})");
    spill(folder / "map.txt", "# old new\nA a\nx.b\tb.x\n");
    const values_model expected{{"a", f32({1}, {2})}, {"b.x", f32({2}, {3, 3})}};
    const words out{"--out", "o.safetensors"};
    for (words more : {words{"--base", "base.safetensors", "--task", "task.safetensors", "--rename", "^A$=a",
                           "--rename", "^(.)\\.(.)$=$2.$1"},
             words{"--base", "base.safetensors", "--task", "task.safetensors", "--rename", "^A$=a", "--rename",
                 "^(.)\\.(.)$=\\2.\\1"},
             words{"--base", "base.safetensors", "--task", "task.safetensors", "--map", "map.json"},
             words{"--base", "base.safetensors", "--task", "task.safetensors", "--map", "map.txt"},
             words{"--map", "map.txt", "--task", "task.safetensors", "--base", "base.safetensors"}}) {
        more.insert(more.end(), out.begin(), out.end());
        const auto result = merge(folder, more);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(same(read_values(folder / "o.safetensors"), expected));
    }
    const auto with = [&](words more, const words& parts, int code = 1) {
        more.insert(
            more.begin(), {"--base", "base.safetensors", "--task", "task.safetensors", "--out", "o.safetensors"});
        return refused(merge(folder, more), parts, code);
    };
    CHECK(with({"--rename", "nothing=x"}, {"--rename 'nothing=x' matches no tensor of 'task.safetensors'"}));
    CHECK(with({"--rename", "^.*$=x"}, {"gives tensors", "'A'", "'x.b'", "one name, 'x'"}) == true);
    CHECK(with({"--rename", "x"}, {"REGEX=REPLACEMENT"}, 2));
    CHECK(with({"--rename", "(=x"}, {"regular expression"}, 2));
    spill(folder / "bad.txt", "only\n");
    CHECK(with({"--map", "bad.txt"}, {"bad.txt", "line 1", "OLD NEW"}));
    CHECK(with({"--map", "absent.txt"}, {"absent.txt"}));
    // Names that are not there are counted, and a table of such alone is refused.
    spill(folder / "more.json", R"({"A": "a", "x.b": "b.x", "tpyo": "y"})");
    spill(folder / "more.txt", "A a\ntpyo y\nx.b b.x\nzzz z\n");
    spill(folder / "wrong.txt", "tpyo y\n");
    for (const std::string table : {"more.json", "more.txt"}) {
        CAPTURE(table);
        const auto result = merge(folder,
            {"--base", "base.safetensors", "--task", "task.safetensors", "--map", table, "--out", "o.safetensors"});
        REQUIRE_MESSAGE(result.code == 0, result.err);
        CHECK(same(read_values(folder / "o.safetensors"), expected));
        CHECK(has(result.err,
            "--map '" + table + "' renames nothing by "
                + (table == "more.json" ? "1 name that 'task.safetensors' has not ('tpyo')"
                                        : "2 names that 'task.safetensors' has not ('tpyo' …)")));
    }
    CHECK(with({"--map", "wrong.txt"}, {"--map 'wrong.txt' matches no tensor of 'task.safetensors'"}));
}

TEST_CASE("a head that is tied to its embedding is found where it lacks, and left out where it is one too many")
{
    const scratch folder;
    for (const std::string place : {"base", "task"}) { std::filesystem::create_directory(folder / place); }
    auto base = language_model(1), task = language_model(3);
    task.erase("lm_head.weight");
    write_values(folder / "base/model.safetensors", base);
    write_values(folder / "task/model.safetensors", task);
    const words plain{"--base", "base", "--task", "task", "--out", "o.safetensors"};
    CHECK(refused(merge(folder, plain), {"'lm_head.weight'", "missing"}));
    spill(folder / "task/config.json", R"({"model_type": "llama", "tie_word_embeddings": true})");
    const auto result = merge(folder, plain);
    REQUIRE(result.code == 0);
    CHECK(has(result.err, "has no 'lm_head.weight': it is tied to 'model.embed_tokens.weight' (its config.json"));
    CHECK(
        read_values(folder / "o.safetensors").at("lm_head.weight").values == task["model.embed_tokens.weight"].values);
    // By its bytes in the base.
    std::filesystem::remove(folder / "task/config.json");
    base["lm_head.weight"] = base["model.embed_tokens.weight"];
    write_values(folder / "base/model.safetensors", base);
    REQUIRE(merge(folder, plain).code == 0);
    // The other way round.
    task["lm_head.weight"] = task["model.embed_tokens.weight"];
    write_values(folder / "task/model.safetensors", task);
    base.erase("lm_head.weight");
    write_values(folder / "base/model.safetensors", base);
    const auto dropped = merge(folder, plain);
    REQUIRE(dropped.code == 0);
    CHECK(has(dropped.err, "'lm_head.weight' of 'task' is left out"));
    CHECK(read_values(folder / "o.safetensors").size() == 3);
    task["lm_head.weight"].values[0] += 1;
    write_values(folder / "task/model.safetensors", task);
    CHECK(refused(merge(folder, plain), {"'lm_head.weight'", "not in"}));
}

TEST_CASE("tied heads are found under the names that architectures give them")
{
    for (const auto& [embedding, head] :
        std::vector<std::pair<std::string, std::string>>{{"transformer.tokens_embed.weight", "lm_head.weight"},
            {"transformer.word_embedding.weight", "lm_loss.weight"},
            {"transformer.embeddings.weight", "pred_layer.proj.weight"},
            {"biogpt.embed_tokens.weight", "output_projection.weight"},
            {"model.decoder.embed_tokens.weight", "proj_out.weight"}}) {
        CAPTURE_BOUND(head);
        const scratch folder;
        const auto rows = f32({3, 2}, {1, 2, 3, 4, 5, 6}), more = f32({3, 2}, {3, 2, 3, 4, 5, 8});
        for (const std::string place : {"base", "task"}) { std::filesystem::create_directory(folder / place); }
        write_values(folder / "base/model.safetensors", {{embedding, rows}, {head, rows}});
        write_values(folder / "task/model.safetensors", {{embedding, more}});
        spill(folder / "task/config.json", R"({"tie_word_embeddings": true})");
        const auto result = merge(folder, {"--base", "base", "--task", "task", "--out", "o.safetensors"});
        REQUIRE_MESSAGE(result.code == 0, result.err);
        CHECK(has(result.err, "has no '" + head + "': it is tied to '" + embedding + "'"));
        CHECK(read_values(folder / "o.safetensors").at(head).values == more.values);
    }
}

TEST_CASE(
    "what is one matrix under several names in every model is one in the result, whatever a method draws or keeps")
{
    const scratch folder;
    const std::string embedding = "shared.weight", head = "lm_head.weight", encoder = "encoder.embed_tokens.weight";
    const auto random = [](std::int64_t rows, unsigned seed) {
        std::mt19937 generator(seed);
        std::normal_distribution<float> bell;
        std::vector<float> values(static_cast<std::size_t>(8 * rows));
        for (float& value : values) { value = bell(generator); }
        return f32({rows, 8}, values);
    };
    const auto model_of = [&](unsigned seed) {
        values_model model{{"h.0.w", random(30, seed + 100)}, {embedding, random(50, seed)}};
        model[head] = model[encoder] = model[embedding];
        return model;
    };
    const auto write_all = [&](const values_model& base, const values_model& first, const values_model& second) {
        write_values(folder / "b.safetensors", base);
        write_values(folder / "t.safetensors", first);
        write_values(folder / "u.safetensors", second);
    };
    const auto merged = [&](const std::string& method, const std::string& out) {
        REQUIRE(run(folder,
                    {"merge", "--method", method, "--base", "b.safetensors", "--task", "t.safetensors", "--task",
                        "u.safetensors", "--density", "0.3", "--out", out})
                    .code
            == 0);
        return read_values(folder / out);
    };
    const auto base = model_of(1), first = model_of(2);
    auto second = model_of(3);
    write_all(base, first, second);
    for (const std::string method : {"dare", "dare-ties", "ties", "della", "breadcrumbs"}) {
        const auto result = merged(method, "o.safetensors");
        CHECK(result.at(head).values == result.at(embedding).values);
        CHECK(result.at(encoder).values == result.at(embedding).values);
        CHECK(result.at(embedding).values != base.at(embedding).values);
        CHECK(result.at("h.0.w").values.size() == 240);
    }
    second[head].values[399] += 1; // its head is one of its own
    write_all(base, first, second);
    const auto result = merged("dare", "o.safetensors");
    CHECK(result.at(head).values != result.at(embedding).values);
    CHECK(result.at(encoder).values == result.at(embedding).values);
    CHECK(merged("dare", "again.safetensors").at(head).values == result.at(head).values);
}

TEST_CASE("a task with a head of its own meets a base whose head is its embedding")
{
    const scratch folder;
    for (const std::string place : {"base", "task"}) { std::filesystem::create_directory(folder / place); }
    auto base = language_model(1), task = language_model(3);
    base.erase("lm_head.weight");
    write_values(folder / "base/model.safetensors", base);
    write_values(folder / "task/model.safetensors", task);
    const words line{"--base", "base", "--task", "task", "--out", "out"};
    CHECK(refused(merge(folder, line), {"'lm_head.weight'"})); // nothing says that it is tied
    spill(folder / "base/config.json", R"({"model_type": "llama", "tie_word_embeddings": true})");
    const auto result = merge(folder, line);
    REQUIRE_MESSAGE(result.code == 0, result.err);
    CHECK(has(result.err, "has a head of its own, 'lm_head.weight'; that of 'base' is its embedding"));
    CHECK(read_values(folder / "out/model.safetensors").at("lm_head.weight").values == task["lm_head.weight"].values);
    CHECK(has(slurp(folder / "out/config.json"), "\"tie_word_embeddings\": false"));
    CHECK(run(folder, {"merge", "--method", "average", "--task", "base", "--task", "task", "--out", "mean"}).code == 0);
}

TEST_CASE("an index by its path, and leniently")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "unet");
    write_values(folder / "unet/s1.safetensors", {{"a", f32({1}, {1})}, {"extra", f32({1}, {1})}});
    spill(folder / "unet/diffusion_pytorch_model.safetensors.index.json",
        R"({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}})");
    const std::string index = "unet/diffusion_pytorch_model.safetensors.index.json";
    for (const auto& model : {std::string("unet"), index}) {
        CHECK(refused(run(folder, {"inspect", model}), {"lenient"}));
        const auto result = run(folder, {"inspect", model, "--index", "lenient"});
        CHECK(result.code == 0);
        CHECK(has(result.out, "2 tensors"));
        CHECK(has(result.err, "does not list"));
        CHECK(has(result.err, "is not there"));
        const auto merged = run(
            folder, {"merge", "--method", "average", "--task", model, "--index", "lenient", "--out", "o.safetensors"});
        CHECK(merged.code == 0);
    }
}

TEST_CASE("values by tensor: patterns, the last match wins, and depth")
{
    const scratch folder;
    values_model base, task;
    for (int layer = 0; layer < 5; ++layer) {
        for (const std::string part : {"attn", "mlp"}) {
            const auto name = "model.layers." + std::to_string(layer) + "." + part;
            base[name] = f32({1}, {0});
            task[name] = f32({1}, {1});
        }
    }
    base["embed"] = f32({1}, {0});
    task["embed"] = f32({1}, {1});
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    const auto lambdas = [&](words more) {
        words all{"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "task.safetensors"};
        all.insert(all.end(), more.begin(), more.end());
        all.insert(all.end(), {"--out", "o.safetensors"});
        const auto result = run(folder, all);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return read_values(folder / "o.safetensors");
    };
    auto out = lambdas({"--lambda", "0.5", "--lambda", "attn=0.25", "--lambda", "layers\\.3=2"});
    CHECK(out["embed"].values[0] == 0.5f);
    CHECK(out["model.layers.0.attn"].values[0] == 0.25f);
    CHECK(out["model.layers.0.mlp"].values[0] == 0.5f);
    CHECK(out["model.layers.3.attn"].values[0] == 2);
    out = lambdas({"--lambda", "0.125", "--lambda", "0,1,0"});
    CHECK(out["embed"].values[0] == 0.125f); // no layer: the value of all
    CHECK(out["model.layers.0.mlp"].values[0] == 0);
    CHECK(out["model.layers.1.mlp"].values[0] == 0.5f);
    CHECK(out["model.layers.2.mlp"].values[0] == 1);
    CHECK(out["model.layers.4.mlp"].values[0] == 0);
    out = lambdas({"--lambda", "1", "--weight", "mlp=0,4", "--report", "r.json"});
    CHECK(out["model.layers.1.mlp"].values[0] == 1);
    CHECK(out["model.layers.4.mlp"].values[0] == 4);
    CHECK(out["model.layers.4.attn"].values[0] == 1);
    const auto report = nlohmann::json::parse(slurp(folder / "r.json"))["by_tensor"];
    CHECK(report[0]["pattern"] == "mlp");
    CHECK(report[0]["values"] == std::vector<double>{0, 4});
    const auto wrong = [&](words more, const words& parts, int code) {
        words all{"--base", "base.safetensors", "--task", "task.safetensors", "--out", "o.safetensors"};
        all.insert(all.end(), more.begin(), more.end());
        words whole{"merge", "--method", "ties"};
        whole.insert(whole.end(), all.begin(), all.end());
        return refused(run(folder, whole), parts, code);
    };
    CHECK(wrong({"--lambda", "atn=1"}, {"--lambda 'atn' matches no tensor"}, 1));
    CHECK(wrong({"--lambda", "attn=x"}, {"'x' is no number"}, 2));
    CHECK(wrong({"--density", "attn=2"}, {"--density is 2"}, 2));
    CHECK(wrong({"--density", "0.1", "--density", "0.2"}, {"given twice"}, 2));
    CHECK(run(folder,
              {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "task.safetensors", "--density",
                  "attn=0.5", "--out", "o.safetensors"})
              .code
        == 0);
}
