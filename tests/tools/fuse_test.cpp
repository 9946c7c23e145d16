// taskvec fuse, against plain loops over the files.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_files.hpp"

#include "../capture.hpp"

#include <nlohmann/json.hpp>

using namespace tools_test;

namespace {

values_model two_layers(taskvec::dtype type = taskvec::dtype::f32)
{
    return {{"layers.0.bias", random_tensor({9}, 1, type)}, {"layers.0.weight", random_tensor({9, 20}, 2, type)},
        {"layers.1.weight", random_tensor({20, 20}, 3, type)}};
}

const std::vector<std::string> fuse_one{
    "fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "out.safetensors"};

} // namespace

TEST_CASE("fuse adds adapters by weight, rounds once, and copies the rest")
{
    const scratch folder;
    const auto base = two_layers(taskvec::dtype::bf16);
    write_values(folder / "base.safetensors", base);
    const auto first = factors("layers.0", 9, 20, 10), second = factors("layers.1", 20, 20, 20);
    write_adapter_as(folder / "a", first);
    write_adapter_as(folder / "b", second, {{"use_rslora", true}, {"lora_alpha", 4}});
    for (const std::string threads : {"1", "3"}) {
        const auto result = run(folder,
            {"fuse", "--base", "base.safetensors", "--adapter", "a=0.5", "--adapter", "b=-2", "--out",
                "out.safetensors", "--threads", threads, "--report", "report.json"});
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(result.out.find("2 tensors of 3 changed") != std::string::npos);
        const auto fused = read_values(folder / "out.safetensors");
        auto expected = base;
        expected["layers.0.weight"] = added(base.at("layers.0.weight"), first.at("layers.0.lora_A.weight"),
            first.at("layers.0.lora_B.weight"), 0.5 * 0.5);
        expected["layers.1.weight"] = added(base.at("layers.1.weight"), second.at("layers.1.lora_A.weight"),
            second.at("layers.1.lora_B.weight"), -2 * (4 / std::sqrt(2.0)));
        CHECK(same(fused, expected));
        const auto report = nlohmann::json::parse(slurp(folder / "report.json"));
        CHECK(report["adapters"][1]["weight"] == -2);
        CHECK(report["adapters"][0]["dialect"] == "PEFT");
        CHECK(report["changed"] == 2);
        CHECK(report["tensors"][0]["change"] == 0);
    }
    // What was put in comes out again, up to the rounding of the dtype; in f32 nearly exactly.
    REQUIRE(run(folder,
                {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "wide.safetensors", "--dtype", "f32"})
                .code
        == 0);
    REQUIRE(
        run(folder, {"fuse", "--base", "wide.safetensors", "--adapter", "a", "--out", "back.safetensors", "--subtract"})
            .code
        == 0);
    const auto back = read_values(folder / "back.safetensors");
    for (std::size_t i = 0; i < 180; ++i) {
        CHECK(std::abs(back.at("layers.0.weight").values[i] - base.at("layers.0.weight").values[i]) < 2e-6);
    }
    const auto dry =
        run(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "dry.safetensors", "--dry-run"});
    CHECK(dry.out.find("would fold 1 adapter into") != std::string::npos);
    CHECK(!std::filesystem::exists(folder / "dry.safetensors"));
}

TEST_CASE("fuse writes a directory that loads: configuration, tokenizer, card, and a head that comes apart from its "
          "embedding")
{
    const scratch folder;
    values_model base{{"model.embed_tokens.weight", random_tensor({11, 6}, 1)},
        {"model.layers.0.q_proj.weight", random_tensor({6, 6}, 2)}};
    std::filesystem::create_directories(folder / "base");
    write_values(folder / "base/model.safetensors", base);
    write_text(folder / "base/config.json", R"({"model_type": "llama", "tie_word_embeddings": true})");
    write_text(folder / "base/tokenizer.json", "{}");
    auto tensors = factors("model.layers.0.q_proj", 6, 6, 5);
    write_adapter_as(folder / "plain", tensors);
    auto result = run(folder, {"fuse", "--base", "base", "--adapter", "plain", "--out", "fused"});
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    CHECK(read_values(folder / "fused/model.safetensors").size() == 2);
    CHECK(slurp(folder / "fused/tokenizer.json") == "{}");
    CHECK(slurp(folder / "fused/README.md").find("| plain | adapter | 1 |") != std::string::npos);
    CHECK(nlohmann::json::parse(slurp(folder / "fused/config.json"))["tie_word_embeddings"] == true);

    const auto head = factors("lm_head", 11, 6, 7);
    tensors.insert(head.begin(), head.end());
    write_adapter_as(folder / "head", tensors);
    result = run(folder, {"fuse", "--base", "base", "--adapter", "head", "--out", "untied"});
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    CHECK(result.err.find("tie_word_embeddings: false") != std::string::npos);
    const auto untied = read_values(folder / "untied/model.safetensors");
    CHECK(untied.at("model.embed_tokens.weight").values == base.at("model.embed_tokens.weight").values);
    CHECK(untied.at("lm_head.weight").values
        == added(base.at("model.embed_tokens.weight"), head.at("lm_head.lora_A.weight"),
            head.at("lm_head.lora_B.weight"), 0.5)
            .values);
    CHECK(nlohmann::json::parse(slurp(folder / "untied/config.json"))["tie_word_embeddings"] == false);

    // An embedding's factors lie the other way round; the head keeps what it had.
    const values_model embedding{{"model.embed_tokens.lora_embedding_A", random_tensor({2, 11}, 8)},
        {"model.embed_tokens.lora_embedding_B", random_tensor({6, 2}, 9)}};
    write_adapter_as(folder / "words", embedding);
    REQUIRE(run(folder, {"fuse", "--base", "base", "--adapter", "words", "--out", "words-fused"}).code == 0);
    const auto words = read_values(folder / "words-fused/model.safetensors");
    const auto expected =
        added(base.at("model.embed_tokens.weight"), embedding.at("model.embed_tokens.lora_embedding_A"),
            embedding.at("model.embed_tokens.lora_embedding_B"), 0.5, true);
    CHECK(words.at("model.embed_tokens.weight").values == expected.values);
    CHECK(words.at("lm_head.weight").values == base.at("model.embed_tokens.weight").values);
    // Tied on purpose, they stay one matrix.
    write_adapter_as(folder / "tied", embedding, {{"ensure_weight_tying", true}});
    REQUIRE(run(folder, {"fuse", "--base", "base", "--adapter", "tied", "--out", "tied-fused"}).code == 0);
    const auto tied = read_values(folder / "tied-fused/model.safetensors");
    CHECK(tied.size() == 2);
    CHECK(tied.at("model.embed_tokens.weight").values == expected.values);
}

TEST_CASE("fuse takes square weights of Conv1D models the other way round, by flag, configuration or the adapter")
{
    const scratch folder;
    const values_model base{
        {"h.0.attn.c_attn.weight", random_tensor({6, 18}, 1)}, {"h.0.attn.c_proj.weight", random_tensor({6, 6}, 2)}};
    std::filesystem::create_directories(folder / "gpt2");
    write_values(folder / "gpt2/model.safetensors", base);
    write_values(folder / "alone.safetensors", base);
    write_text(folder / "gpt2/config.json", R"({"model_type": "gpt2"})");
    auto tensors = factors("transformer.h.0.attn.c_attn", 18, 6, 3);
    tensors.merge(factors("transformer.h.0.attn.c_proj", 6, 6, 5));
    write_adapter_as(folder / "unsaid", tensors);
    write_adapter_as(folder / "said", tensors, {{"fan_in_fan_out", true}});
    const auto part = [&](const std::string& name, const std::string& which) {
        return tensors.at("transformer.h.0.attn." + name + ".lora_" + which + ".weight");
    };
    auto expected = base;
    for (const std::string name : {"c_attn", "c_proj"}) {
        auto& weight = expected["h.0.attn." + name + ".weight"];
        weight = added(weight, part(name, "A"), part(name, "B"), 0.5, true);
    }
    const auto check = [&](const std::vector<std::string>& arguments) {
        const auto result = run(folder, arguments);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(result.err.find("names of components and processors left out") != std::string::npos);
        CHECK(same(read_values(folder / "out.safetensors"), expected));
    };
    check({"fuse", "--base", "gpt2", "--adapter", "unsaid", "--out", "out.safetensors"});
    check({"fuse", "--base", "alone.safetensors", "--adapter", "said", "--out", "out.safetensors"});
    check(
        {"fuse", "--base", "alone.safetensors", "--adapter", "unsaid", "--out", "out.safetensors", "--fan-in-fan-out"});
}

TEST_CASE("fuse rescales by DoRA, replaces what was trained whole, and adds biases of lora_B")
{
    const scratch folder;
    const auto base = two_layers();
    write_values(folder / "base.safetensors", base);
    auto tensors = factors("layers.0", 9, 20, 10);
    tensors["layers.0.lora_magnitude_vector"] = random_tensor({9}, 30);
    tensors["layers.0.lora_B.bias"] = random_tensor({9}, 31);
    tensors["layers.1.weight"] = random_tensor({20, 20}, 32);
    write_adapter_as(
        folder / "a", tensors, {{"use_dora", true}, {"lora_bias", true}, {"modules_to_save", {"layers.1"}}});
    const auto result = run(folder, fuse_one);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    const auto fused = read_values(folder / "out.safetensors");
    CHECK(fused.at("layers.1.weight").values == tensors.at("layers.1.weight").values);
    const auto& w = base.at("layers.0.weight").values;
    const auto &a = tensors.at("layers.0.lora_A.weight").values, &b = tensors.at("layers.0.lora_B.weight").values;
    for (std::size_t o = 0; o < 9; ++o) {
        std::vector<double> row;
        double squares = 0;
        for (std::size_t i = 0; i < 20; ++i) {
            row.push_back(double{w[o * 20 + i]}
                + 0.5 * (double{b[o * 2]} * double{a[i]} + double{b[o * 2 + 1]} * double{a[20 + i]}));
            squares += row.back() * row.back();
        }
        const double gain = double{tensors.at("layers.0.lora_magnitude_vector").values[o]} / std::sqrt(squares);
        for (std::size_t i = 0; i < 20; ++i) {
            CHECK(std::abs(double{fused.at("layers.0.weight").values[o * 20 + i]} - gain * row[i]) < 2e-6);
        }
        CHECK(fused.at("layers.0.bias").values[o]
            == doctest::Approx(
                base.at("layers.0.bias").values[o] + 0.5f * tensors.at("layers.0.lora_B.bias").values[o]));
    }
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "no.safetensors", "--subtract"},
        1, "DoRA");
}

TEST_CASE("fuse reads the dialects of kohya, diffusers and MLX, and keys with an adapter's name, as the same update")
{
    const scratch folder;
    const values_model base{{"down_blocks.0.attn1.to_q.weight", random_tensor({8, 6}, 1)},
        {"down_blocks.0.attn1.to_out.0.weight", random_tensor({6, 8}, 2)},
        {"conv_in.weight", random_tensor({4, 3, 3, 3}, 3)}};
    write_values(folder / "base.safetensors", base);
    const auto qa = random_tensor({2, 6}, 4), qb = random_tensor({8, 2}, 5), oa = random_tensor({2, 8}, 6),
               ob = random_tensor({6, 2}, 7);
    const auto conv_a = random_tensor({2, 3, 3, 3}, 8), conv_b = random_tensor({4, 2, 1, 1}, 9);
    auto expected = base;
    expected["down_blocks.0.attn1.to_q.weight"] = added(base.at("down_blocks.0.attn1.to_q.weight"), qa, qb, 0.5);
    expected["down_blocks.0.attn1.to_out.0.weight"] =
        added(base.at("down_blocks.0.attn1.to_out.0.weight"), oa, ob, 0.5);
    auto with_conv = expected;
    with_conv["conv_in.weight"] = added(base.at("conv_in.weight"), conv_a, conv_b, 0.5);
    const values_tensor one{taskvec::dtype::f32, {}, {1}};
    const auto turned = [](const values_tensor& x) {
        values_tensor y{x.dtype, {x.shape[1], x.shape[0]}, {}};
        for (std::int64_t j = 0; j < x.shape[1]; ++j) {
            for (std::int64_t i = 0; i < x.shape[0]; ++i) {
                y.values.push_back(x.values[static_cast<std::size_t>(i * x.shape[1] + j)]);
            }
        }
        return y;
    };
    const auto fused_by = [&](const std::string& adapter, const values_model& model, const std::string& dialect) {
        CAPTURE(adapter);
        const auto result = run(folder,
            {"fuse", "--base", "base.safetensors", "--adapter", adapter, "--out", "out.safetensors", "--report",
                "r.json"});
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(same(read_values(folder / "out.safetensors"), model));
        CHECK(nlohmann::json::parse(slurp(folder / "r.json"))["adapters"][0]["dialect"] == dialect);
        return result.err;
    };
    const std::string q = "down_blocks.0.attn1.to_q", o = "down_blocks.0.attn1.to_out.0";
    write_values(folder / "kohya.safetensors",
        {{"lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", qa},
            {"lora_unet_down_blocks_0_attn1_to_q.lora_up.weight", qb},
            {"lora_unet_down_blocks_0_attn1_to_q.alpha", one},
            {"lora_unet_down_blocks_0_attn1_to_out_0.lora_down.weight", oa},
            {"lora_unet_down_blocks_0_attn1_to_out_0.lora_up.weight", ob},
            {"lora_unet_down_blocks_0_attn1_to_out_0.alpha", one}, {"lora_unet_conv_in.lora_down.weight", conv_a},
            {"lora_unet_conv_in.lora_up.weight", conv_b}, {"lora_unet_conv_in.alpha", one}});
    fused_by("kohya.safetensors", with_conv, "kohya");
    auto half_up = qb, half_out = ob;
    for (auto* x : {&half_up, &half_out}) {
        for (auto& value : x->values) { value *= 0.5f; }
    }
    std::filesystem::create_directories(folder / "diffusers");
    write_values(folder / "diffusers/pytorch_lora_weights.safetensors",
        {{"unet.down_blocks.0.attn1.processor.to_q_lora.down.weight", qa},
            {"unet.down_blocks.0.attn1.processor.to_q_lora.up.weight", half_up},
            {"unet.down_blocks.0.attn1.processor.to_out_lora.down.weight", oa},
            {"unet.down_blocks.0.attn1.processor.to_out_lora.up.weight", half_out}});
    CHECK(fused_by("diffusers", expected, "diffusers").find("gives no alpha") != std::string::npos);
    std::filesystem::create_directories(folder / "mlx");
    write_values(folder / "mlx/adapters.safetensors",
        {{q + ".lora_a", turned(qa)}, {q + ".lora_b", turned(qb)}, {o + ".lora_a", turned(oa)},
            {o + ".lora_b", turned(ob)}});
    write_text(folder / "mlx/adapter_config.json",
        R"({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 0.5}})");
    fused_by("mlx", expected, "MLX");
    values_model named;
    for (const auto& [name, tensor] :
        values_model{{q + ".lora_A.default.weight", qa}, {q + ".lora_B.default.weight", qb},
            {o + ".lora_A.default.weight", oa}, {o + ".lora_B.default.weight", ob}}) {
        named[name] = tensor;
    }
    write_adapter_as(folder / "named", named);
    fused_by("named", expected, "PEFT");

    write_values(folder / "mixed.safetensors",
        {{q + ".lora_A.weight", qa}, {q + ".lora_B.weight", qb}, {o + ".lora.down.weight", oa},
            {o + ".lora.up.weight", ob}});
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "mixed.safetensors", "--out", "no.safetensors"},
        1, "mixes dialects");
    named.erase(o + ".lora_A.default.weight");
    named[o + ".lora_A.other.weight"] = oa;
    write_adapter_as(folder / "several", named);
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "several", "--out", "no.safetensors"}, 1,
        "holds the adapters 'other' and 'default'");
}

TEST_CASE("fuse reads LoHa and LoKr")
{
    const scratch folder;
    const values_model base{{"w.weight", random_tensor({6, 8}, 1)}};
    write_values(folder / "base.safetensors", base);
    const auto product = [](const values_tensor& x, const values_tensor& y) {
        std::vector<double> z(static_cast<std::size_t>(x.shape[0] * y.shape[1]));
        for (std::int64_t i = 0; i < x.shape[0]; ++i) {
            for (std::int64_t j = 0; j < y.shape[1]; ++j) {
                for (std::int64_t k = 0; k < x.shape[1]; ++k) {
                    z[static_cast<std::size_t>(i * y.shape[1] + j)] +=
                        double{x.values[static_cast<std::size_t>(i * x.shape[1] + k)]}
                        * double{y.values[static_cast<std::size_t>(k * y.shape[1] + j)]};
                }
            }
        }
        return z;
    };
    const auto check = [&](const std::vector<double>& delta) {
        const auto result = run(
            folder, {"fuse", "--base", "base.safetensors", "--adapter", "a.safetensors", "--out", "out.safetensors"});
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        const auto fused = read_values(folder / "out.safetensors").at("w.weight").values;
        for (std::size_t i = 0; i < fused.size(); ++i) {
            CHECK(std::abs(double{fused[i]} - (double{base.at("w.weight").values[i]} + delta[i])) < 1e-5);
        }
    };
    const values_tensor alpha{taskvec::dtype::f32, {}, {3}};
    const auto w1a = random_tensor({6, 2}, 2), w1b = random_tensor({2, 8}, 3), w2a = random_tensor({6, 2}, 4),
               w2b = random_tensor({2, 8}, 5);
    write_values(folder / "a.safetensors",
        {{"lycoris_w.hada_w1_a", w1a}, {"lycoris_w.hada_w1_b", w1b}, {"lycoris_w.hada_w2_a", w2a},
            {"lycoris_w.hada_w2_b", w2b}, {"lycoris_w.alpha", alpha}});
    auto delta = product(w1a, w1b);
    const auto other = product(w2a, w2b);
    for (std::size_t i = 0; i < delta.size(); ++i) { delta[i] *= other[i] * 1.5; }
    check(delta);

    const auto small = random_tensor({2, 2}, 6), left = random_tensor({3, 1}, 7), right = random_tensor({1, 4}, 8),
               full = random_tensor({3, 4}, 9);
    const auto kron = [&](const std::vector<double>& y, double scale) {
        std::vector<double> z(48);
        for (std::size_t i = 0; i < 6; ++i) {
            for (std::size_t j = 0; j < 8; ++j) {
                z[i * 8 + j] = scale * double{small.values[i / 3 * 2 + j / 4]} * y[i % 3 * 4 + j % 4];
            }
        }
        return z;
    };
    write_values(folder / "a.safetensors",
        {{"lycoris_w.lokr_w1", small}, {"lycoris_w.lokr_w2_a", left}, {"lycoris_w.lokr_w2_b", right},
            {"lycoris_w.alpha", alpha}});
    check(kron(product(left, right), 3));
    write_values(folder / "a.safetensors",
        {{"lycoris_w.lokr_w1", small}, {"lycoris_w.lokr_w2", full}, {"lycoris_w.alpha", alpha}});
    check(kron(std::vector<double>(full.values.begin(), full.values.end()), 1));
}

TEST_CASE("fuse reads AdaLoRA, which scales by the rank that it began with, and cuts modules to nothing")
{
    const scratch folder;
    const auto base = two_layers();
    write_values(folder / "base.safetensors", base);
    const nlohmann::json config{{"peft_type", "ADALORA"}, {"init_r", 5}, {"r", 8}, {"lora_alpha", 4},
        {"rank_pattern", {{"layers.0.lora_E", {true, false, true}}}}};
    const auto e = random_tensor({2, 1}, 6);
    const values_model tensors{{"layers.0.lora_A", random_tensor({2, 20}, 4)},
        {"layers.0.lora_B", random_tensor({9, 2}, 5)}, {"layers.0.lora_E", e},
        {"layers.1.lora_A", random_tensor({0, 20}, 4)}, {"layers.1.lora_B", random_tensor({20, 0}, 5)},
        {"layers.1.lora_E", random_tensor({0, 1}, 6)}};
    write_adapter_as(folder / "a", tensors, config);
    const auto result = run(folder, fuse_one);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    CHECK(result.err.find("'a' has 1 of 2 modules at rank 0") != std::string::npos);
    auto a = tensors.at("layers.0.lora_A");
    for (std::size_t i = 0; i < 40; ++i) { a.values[i] *= e.values[i / 20]; }
    auto expected = base;
    expected["layers.0.weight"] = added(base.at("layers.0.weight"), a, tensors.at("layers.0.lora_B"), 4 / (5 + 1e-5));
    CHECK(same(read_values(folder / "out.safetensors"), expected));
    const auto converted = run(folder, {"convert", "a", "--as", "peft", "--out", "plain"});
    CHECK(converted.code == 0);
    CHECK(run(folder, {"inspect", "a"}).out.find("AdaLoRA") != std::string::npos);
    const auto lower = run(folder, {"peru-lora", "--adapter", "plain", "--rank", "1", "--out", "lower"});
    CAPTURE(lower.err);
    CHECK(lower.code == 0);

    std::filesystem::remove(folder / "out.safetensors");
    const auto with = [&](const std::function<void(values_model&, nlohmann::json&)>& change) {
        auto changed = tensors;
        auto settings = config;
        change(changed, settings);
        std::filesystem::remove_all(folder / "a");
        write_adapter_as(folder / "a", changed, settings);
    };
    with([](auto& all, auto&) { all["layers.0.lora_E"] = random_tensor({3, 1}, 6); });
    refused(folder, fuse_one, 1, "has shape [3, 1], and module 'layers.0' has rank 2");
    with([](auto& all, auto&) { all.erase("layers.0.lora_E"); });
    refused(folder, fuse_one, 1, "has no lora_E");
    with([](auto&, auto& settings) {
        settings["peft_type"] = "LORA";
        settings.erase("rank_pattern");
    });
    refused(folder, fuse_one, 1, "says peft_type LORA");
    with([](auto&, auto& settings) { settings["init_r"] = 0; });
    refused(folder, fuse_one, 1, "init_r is 0");
    with([](auto&, auto&) { });
    std::filesystem::remove(folder / "a/adapter_config.json");
    refused(folder, fuse_one, 1, "whose scaling is in adapter_config.json");
    write_adapter_as(folder / "pissa", factors("layers.0", 9, 20, 10), {{"init_lora_weights", "pissa"}});
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "pissa", "--out", "out.safetensors"}, 1,
        "path_initial_model_for_weight_conversion");
    // LoftQ's rounding is none of the products that PEFT converts.
    write_adapter_as(folder / "loftq", factors("layers.0", 9, 20, 10), {{"init_lora_weights", "loftq"}});
    const std::vector<std::string> loftq{
        "fuse", "--base", "base.safetensors", "--adapter", "loftq", "--out", "out.safetensors"};
    refused(folder, loftq, 1, "quantises the base weights");
    CHECK(run(folder, loftq).err.find("path_initial_model_for_weight_conversion") == std::string::npos);
}

TEST_CASE("fuse names what is wrong with an adapter, and writes nothing")
{
    const scratch folder;
    write_values(folder / "base.safetensors", two_layers());
    auto tensors = factors("layers.0", 9, 20, 10);
    const auto with = [&](const values_model& more, const nlohmann::json& config = {}) {
        std::filesystem::remove_all(folder / "a");
        std::filesystem::create_directories(folder / "a");
        auto all = tensors;
        for (const auto& [name, tensor] : more) { all[name] = tensor; }
        write_adapter_as(folder / "a", all, config);
    };
    with({});
    auto wrong = fuse_one;
    wrong.insert(wrong.end(), {"--include", "zzz"});
    refused(folder, wrong, 1, "--include 'zzz' matches no tensor of 'base.safetensors'");
    with({{"layers.1.lora_A.weight", random_tensor({2, 20}, 1)}});
    refused(folder, fuse_one, 1, "module 'layers.1' has lora_A but no lora_B");
    with(factors("layers.7", 9, 20, 1));
    refused(folder, fuse_one, 1, "module 'layers.7' of 'a' is no module of 'base.safetensors'");
    with(factors("layers.1", 20, 21, 1));
    refused(folder, fuse_one, 1, "its update in 'a' is 20×21");
    with({{"layers.0.alpha", {taskvec::dtype::f32, {}, {7}}}});
    refused(folder, fuse_one, 1, "has the alpha 7 but adapter_config.json says 1");
    with({{"layers.0.lora_A.weight", random_tensor({0, 20}, 1)}, {"layers.0.lora_B.weight", random_tensor({9, 0}, 1)}});
    refused(folder, fuse_one, 1, "rank 0");
    // As DeepSpeed's ZeRO-3 saves what it has not gathered.
    with({{"layers.0.lora_A.weight", random_tensor({0}, 1)}, {"layers.0.lora_B.weight", random_tensor({0}, 1)}});
    refused(folder, fuse_one, 1, "'base_model.model.layers.0.lora_A.weight' is empty, as DeepSpeed's ZeRO-3");
    refused(folder, {"merge-lora", "--adapter", "a", "--out", "no"}, 1, ".weight' is empty, as DeepSpeed's");
    with({});
    auto two = read_values(folder / "a/adapter_model.safetensors");
    two.emplace("lora_unet_layers_0.lora_up.weight", random_tensor({9, 2}, 1));
    write_values(folder / "a/adapter_model.safetensors", two);
    refused(folder, fuse_one, 1, "this one is kohya's, and an adapter has names of one dialect");
    with({});
    std::filesystem::remove_all(folder / "both");
    std::filesystem::create_directories(folder / "both");
    std::filesystem::rename(folder / "a", folder / "both/style");
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "both", "--out", "o.safetensors"}, 1,
        "holds no adapter, but 'style' in it does: name that");
    with({}, {{"layer_replication", {{0, 1}}}});
    refused(folder, fuse_one, 1, "layer_replication");
    with({}, {{"target_parameters", {"experts.w"}}});
    refused(folder, fuse_one, 1, "target_parameters");
    with({{"layers.1.oft_r", random_tensor({2, 20}, 1)}});
    refused(folder, fuse_one, 1, "'base_model.model.layers.1.oft_r'");
    with({{"layers.0.lora_A.weight", {taskvec::dtype::f32, {2, 20}, std::vector<float>(40, std::nanf(""))}}});
    refused(folder, fuse_one, 1, "NaN");
    with({}, {{"use_dora", true}});
    refused(
        folder, fuse_one, 1, "module 'layers.0' has no lora_magnitude_vector, but adapter_config.json says use_dora");
    with({{"layers.0.lora_magnitude_vector", random_tensor({9}, 1)}}, {{"use_dora", false}});
    refused(folder, fuse_one, 1, "has a lora_magnitude_vector, but adapter_config.json says use_dora false");
    with({}, {{"peft_type", "LOHA"}});
    refused(
        folder, fuse_one, 1, "has the factors of LoRA, but adapter_config.json says peft_type LOHA, and its hada_w1_a");
    with({}, {{"peft_type", "LOKR"}});
    refused(folder, fuse_one, 1, "says peft_type LOKR, and its lokr_w1 and lokr_w2 are missing");
    std::filesystem::remove_all(folder / "a");
    write_adapter_as(folder / "a",
        {{"layers.1.lokr_w1", random_tensor({2, 2}, 1)}, {"layers.1.lokr_w2", random_tensor({10, 10}, 2)}});
    refused(folder, fuse_one, 1, "has the factors of LoKr, but adapter_config.json says peft_type LORA");
    with({{"layers.0.base_layer.weight", random_tensor({9, 20}, 77)}});
    refused(folder, fuse_one, 1, "a copy of the weight 'layers.0.weight'");
    refused(folder, {"fuse", "--base", "base.safetensors", "--out", "o.safetensors"}, 2, "--adapter");
    refused(
        folder, {"fuse", "--base", "base.safetensors", "--adapter", "nothing", "--out", "o.safetensors"}, 1, "nothing");
    // What the base lacks may be left out on purpose.
    with(factors("layers.7", 9, 20, 1));
    auto left_out = fuse_one;
    left_out.insert(left_out.end(), {"--exclude", "layers.7"});
    const auto result = run(folder, left_out);
    CAPTURE(result.err);
    CHECK(result.code == 0);
    CHECK(result.out.find("1 tensor of 3 changed") != std::string::npos);
}

TEST_CASE("what an adapter's configuration says and its file denies is an error, or what PEFT takes it for")
{
    const scratch folder;
    write_values(folder / "base.safetensors", two_layers());
    const auto fused = [&](const nlohmann::json& config, const values_model& more = {}) {
        std::filesystem::remove_all(folder / "a");
        auto tensors = factors("layers.0", 9, 20, 10);
        tensors.merge(factors("layers.1", 20, 20, 20));
        for (const auto& [name, tensor] : more) { tensors[name] = tensor; }
        write_adapter_as(folder / "a", tensors, config);
        return run(folder, fuse_one);
    };
    REQUIRE(fused(nlohmann::json::object()).code == 0);
    const auto plain = slurp(folder / "out.safetensors");
    // layers.0 is not square, and lies out×in.
    const auto turned = fused({{"fan_in_fan_out", true}});
    CHECK(turned.code == 0);
    CHECK(turned.err.find("says fan_in_fan_out, and linear layers of 'base.safetensors' lie out×in")
        != std::string::npos);
    CHECK(slurp(folder / "out.safetensors") == plain);
    const auto denied = [&](const nlohmann::json& config, const values_model& more, const std::string& part) {
        const auto result = fused(config, more);
        CAPTURE(result.err);
        CHECK(result.code == 1);
        CHECK(is_error_line(result.err));
        CHECK(result.err.find(part) != std::string::npos);
    };
    const auto list = [](const char* name) { return nlohmann::json::array({name}); };
    denied({{"modules_to_save", list("layers.1")}}, {}, "modules_to_save of adapter_config.json names 'layers.1'");
    CHECK(fused({{"modules_to_save", list("score")}}).code == 0); // no module of this base
    denied({{"lora_bias", false}}, {{"layers.0.lora_B.bias", random_tensor({9}, 3)}}, "says lora_bias false");
    CHECK(fused({{"bias", "all"}}).err.find("says bias all, and holds no bias") != std::string::npos);
    denied({{"peft_type", "IA3"}}, {}, "merge_and_unload");
    // A square module that lies in×out has no word in other dialects.
    write_adapter_as(folder / "g", factors("layers.1", 20, 20, 20), {{"fan_in_fan_out", true}});
    for (const std::string dialect : {"diffusers", "mlx"}) {
        const auto result = run(folder, {"convert", "g", "--as", dialect, "--out", "converted"});
        CHECK(result.code == 1);
        CHECK(result.err.find("fan_in_fan_out") != std::string::npos);
    }
    // MLX's DoRA.
    std::filesystem::create_directories(folder / "m");
    const auto a = random_tensor({20, 2}, 1), b = random_tensor({2, 9}, 2), m = random_tensor({9}, 4);
    const auto fused_mlx = [&](bool whole) {
        values_model tensors{{"layers.0.lora_a", a}, {"layers.0.lora_b", b}};
        if (whole) { tensors["layers.0.m"] = m; }
        write_values(folder / "m/adapters.safetensors", tensors);
        write_text(folder / "m/adapter_config.json",
            R"({"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 3.0}})");
        return run(folder, {"fuse", "--base", "base.safetensors", "--adapter", "m", "--out", "m.safetensors"});
    };
    CHECK(fused_mlx(false).err.find("has no magnitudes") != std::string::npos);
    REQUIRE(fused_mlx(true).code == 0);
    const auto base = two_layers().at("layers.0.weight");
    const auto found = read_values(folder / "m.safetensors").at("layers.0.weight");
    for (std::size_t o = 0; o < 9; ++o) {
        std::vector<double> row(20);
        double squares = 0;
        for (std::size_t i = 0; i < 20; ++i) {
            row[i] = double{base.values[o * 20 + i]};
            for (std::size_t k = 0; k < 2; ++k) {
                row[i] += 3.0 * double{a.values[i * 2 + k]} * double{b.values[k * 9 + o]};
            }
            squares += row[i] * row[i];
        }
        for (std::size_t i = 0; i < 20; ++i) {
            CHECK(double{found.values[o * 20 + i]}
                == doctest::Approx(row[i] * double{m.values[o]} / std::sqrt(squares)).epsilon(1e-5).scale(1e-3));
        }
    }
}

TEST_CASE("embeddings and heads of an adapter with more rows than the base take its place")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "base");
    write_values(folder / "base/model.safetensors",
        {{"lm_head.weight", random_tensor({6, 4}, 1)}, {"model.embed_tokens.weight", random_tensor({6, 4}, 2)},
            {"model.layers.0.q.weight", random_tensor({4, 4}, 3)}});
    write_text(folder / "base/config.json", R"({"model_type": "llama", "vocab_size": 6})");
    auto tensors = factors("model.layers.0.q", 4, 4, 10);
    const auto head = random_tensor({8, 4}, 5), embedding = random_tensor({8, 4}, 6);
    tensors["model.embed_tokens.weight"] = embedding;
    const std::vector<std::string> line{"fuse", "--base", "base", "--adapter", "a", "--out", "out"};
    write_adapter_as(folder / "a", tensors);
    const auto half = run(folder, line);
    CHECK(half.code == 1);
    CHECK(half.err.find("one of the two would lack rows") != std::string::npos);
    tensors["lm_head.weight"] = head;
    write_adapter_as(folder / "a", tensors);
    const auto done = run(folder, line);
    REQUIRE_MESSAGE(done.code == 0, done.err);
    CHECK(done.err.find("has 8 rows, more than 'base': it takes the place of that") != std::string::npos);
    const auto found = read_values(folder / "out/model.safetensors");
    CHECK(found.at("lm_head.weight").values == head.values);
    CHECK(found.at("model.embed_tokens.weight").values == embedding.values);
    CHECK(nlohmann::json::parse(slurp(folder / "out/config.json"))["vocab_size"] == 8);
}

TEST_CASE("an adapter on the base is a task of every verb, with the bits of the fused model stored as F32")
{
    const scratch folder;
    const auto base = two_layers(taskvec::dtype::bf16);
    write_values(folder / "base.safetensors", base);
    write_values(folder / "other.safetensors", sample_task(base, 5, 0.2f));
    auto tensors = factors("layers.0", 9, 20, 10);
    tensors.merge(factors("layers.1", 20, 20, 20));
    tensors["layers.0.lora_magnitude_vector"] = random_tensor({9}, 29);
    tensors["layers.1.lora_magnitude_vector"] = random_tensor({20}, 30);
    write_adapter_as(folder / "a", tensors, {{"use_dora", true}});
    const auto must = [&](const std::vector<std::string>& arguments) {
        const auto result = run(folder, arguments);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return result.out;
    };
    must({"fuse", "--base", "base.safetensors", "--adapter", "a=0.5", "--out", "a.safetensors", "--dtype", "f32"});
    const std::vector<std::vector<std::string>> methods{{"ties", "--density", "0.3"}, {"task-arithmetic"},
        {"dare-ties", "--seed", "3"}, {"model-stock"}, {"average"}, {"breadcrumbs"}};
    for (const auto& method : methods) {
        std::vector<std::string> merge{"merge", "--method"};
        merge.insert(merge.end(), method.begin(), method.end());
        merge.insert(merge.end(), {"--base", "base.safetensors", "--task", "other.safetensors", "--report", "r.json"});
        auto stored = merge, worked_out = merge;
        stored.insert(stored.end(), {"--task", "a.safetensors", "--out", "stored.safetensors"});
        worked_out.insert(
            worked_out.end(), {"--task-adapter", "a=0.5", "--out", "worked.safetensors", "--threads", "3"});
        CAPTURE(method[0]);
        must(stored);
        must(worked_out);
        CHECK(slurp(folder / "stored.safetensors") == slurp(folder / "worked.safetensors"));
        const auto report = nlohmann::json::parse(slurp(folder / "r.json"));
        CHECK(report["tasks"][1]["adapter_weight"] == 0.5);
    }
    must({"prune", "--base", "base.safetensors", "--task", "a.safetensors", "--density", "0.2", "--out",
        "stored.delta"});
    must({"prune", "--base", "base.safetensors", "--task-adapter", "a=0.5", "--density", "0.2", "--out",
        "worked.delta"});
    CHECK(slurp(folder / "stored.delta") == slurp(folder / "worked.delta"));
    const auto cosines =
        must({"similarity", "--base", "base.safetensors", "--task", "a.safetensors", "--task", "other.safetensors"});
    CHECK(must({"similarity", "--base", "base.safetensors", "--task-adapter", "a=0.5", "--task", "other.safetensors"})
        == cosines);
    must({"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--task",
        "other.safetensors", "--out", "stored"});
    must({"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task-adapter", "a=0.5", "--task",
        "other.safetensors", "--out", "worked"});
    for (const std::string file : {"merged.safetensors", "other.delta.safetensors", "a.delta.safetensors"}) {
        CHECK(slurp(folder / "stored" / file) == slurp(folder / "worked" / file));
    }
    must({"extract-lora", "--base", "base.safetensors", "--task", "a.safetensors", "--rank", "4", "--out",
        "stored-lora"});
    must({"extract-lora", "--base", "base.safetensors", "--task-adapter", "a=0.5", "--rank", "4", "--out",
        "worked-lora", "--report", "r.json"});
    const std::string weights = "adapter_model.safetensors", config = "adapter_config.json";
    CHECK(slurp(folder / "stored-lora" / weights) == slurp(folder / "worked-lora" / weights));
    auto said = nlohmann::json::parse(slurp(folder / "stored-lora" / config));
    said["base_model_name_or_path"] = "base"; // as the adapter says
    CHECK(said == nlohmann::json::parse(slurp(folder / "worked-lora" / config)));
    CHECK(nlohmann::json::parse(slurp(folder / "r.json"))["task_adapter"] == "a=0.5");
    for (const auto& both : {std::vector<std::string>{}, {"--task", "a.safetensors", "--task-adapter", "a"}}) {
        std::vector<std::string> extract{"extract-lora", "--base", "base.safetensors", "--rank", "4", "--out", "no"};
        extract.insert(extract.end(), both.begin(), both.end());
        refused(folder, extract, 2, both.empty() ? "--task or --task-adapter is required" : "give one of the two");
    }
    refused(folder,
        {"extract-lora", "--base", "base.safetensors", "--task-adapter", "other.safetensors", "--rank", "4", "--out",
            "no"},
        1, "holds no factors");
    const auto dry = must({"merge", "--method", "ties", "--base", "base.safetensors", "--task-adapter", "a=2", "--out",
        "no.safetensors", "--dry-run"});
    CHECK(dry.find("adapter on the base, times 2") != std::string::npos);
    refused(folder, {"merge", "--method", "average", "--task-adapter", "a", "--out", "no.safetensors"}, 2,
        "--base is required by --task-adapter");
    refused(folder, {"merge", "--method", "ties", "--base", "base.safetensors", "--out", "no.safetensors"}, 2,
        "--task is required");
    refused(folder,
        {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "other.safetensors", "--task-adapter",
            "other.safetensors", "--out", "no.safetensors"},
        2, "by --task and by --task-adapter");
    refused(folder,
        {"merge", "--method", "ties", "--base", "base.safetensors", "--task-adapter", "base.safetensors", "--out",
            "no.safetensors"},
        1, "holds no factors");
}

TEST_CASE("modules of an adapter, and its whole tensors, take the names that --rename and --map give them")
{
    const scratch folder;
    write_values(folder / "base.safetensors", two_layers(taskvec::dtype::bf16));
    const auto must = [&](const std::vector<std::string>& arguments) {
        const auto result = run(folder, arguments);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return result.out;
    };
    // Modules that are called otherwise, and whole tensors.
    auto others = factors("old.0", 9, 20, 10);
    others["old.0.bias"] = random_tensor({9}, 8);
    write_adapter_as(folder / "old", others);
    const auto named = factors("layers.0", 9, 20, 10);
    values_model with_bias = named;
    with_bias["layers.0.bias"] = others.at("old.0.bias");
    write_adapter_as(folder / "new", with_bias);
    must({"fuse", "--base", "base.safetensors", "--adapter", "new=0.5", "--out", "expected.safetensors"});
    write_text(folder / "table.json", R"({"old.0":"layers.0","old.0.bias":"layers.0.bias"})");
    for (const std::vector<std::string>& rule :
        {std::vector<std::string>{"--rename", "^old=layers"}, {"--map", "table.json"}}) {
        std::vector<std::string> fuse{
            "fuse", "--base", "base.safetensors", "--adapter", "old=0.5", "--out", "r.safetensors"};
        fuse.insert(fuse.end(), rule.begin(), rule.end());
        must(fuse);
        CHECK(slurp(folder / "r.safetensors") == slurp(folder / "expected.safetensors"));
    }
    CHECK(must({"similarity", "--base", "base.safetensors", "--task-adapter", "old", "--rename", "^old=layers",
                   "--task-adapter", "new"})
              .find("0.")
        == std::string::npos);
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "old", "--out", "no.safetensors"}, 1,
        "is no module of");
    refused(folder,
        {"fuse", "--base", "base.safetensors", "--adapter", "old", "--rename", "^older=x", "--out", "no.safetensors"},
        1, "matches no tensor of 'old'");
}

TEST_CASE("convert writes the same update in every dialect, and inspect shows its modules")
{
    const scratch folder;
    const values_model base{{"down.0.to_q.weight", random_tensor({8, 6}, 1, taskvec::dtype::bf16)},
        {"conv_in.weight", random_tensor({4, 3, 3, 3}, 2)}};
    write_values(folder / "base.safetensors", base);
    auto tensors = factors("down.0.to_q", 8, 6, 3);
    const auto conv = values_model{{"conv_in.lora_A.weight", random_tensor({2, 3, 3, 3}, 5)},
        {"conv_in.lora_B.weight", random_tensor({4, 2, 1, 1}, 6)}};
    const auto must = [&](const std::vector<std::string>& arguments) {
        const auto result = run(folder, arguments);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return result.out;
    };
    write_adapter_as(folder / "linear", tensors);
    tensors.insert(conv.begin(), conv.end());
    write_adapter_as(folder / "all", tensors);
    const auto fused = [&](const std::string& adapter) {
        must({"fuse", "--base", "base.safetensors", "--adapter", adapter, "--out", "out.safetensors"});
        return read_values(folder / "out.safetensors");
    };
    const auto whole = fused("all"), linear = fused("linear");
    CHECK(!same(whole, linear));
    must({"convert", "all", "--as", "kohya", "--out", "kohya.safetensors"});
    CHECK(read_values(folder / "kohya.safetensors").contains("lora_unet_down_0_to_q.lora_down.weight"));
    CHECK(same(fused("kohya.safetensors"), whole));
    must({"convert", "all", "--as", "diffusers", "--out", "diffusers.safetensors"});
    CHECK(same(fused("diffusers.safetensors"), whole));
    must({"convert", "linear", "--as", "mlx", "--out", "mlx"});
    CHECK(same(fused("mlx"), linear));
    CHECK(nlohmann::json::parse(slurp(folder / "mlx/adapter_config.json"))["lora_parameters"]["scale"] == 0.5);
    // And back: kohya's underscores need the base.
    must({"convert", "kohya.safetensors", "--as", "peft", "--base", "base.safetensors", "--out", "back"});
    const auto back = read_values(folder / "back/adapter_model.safetensors");
    CHECK(back.size() == 4);
    for (const auto& [name, tensor] : tensors) {
        REQUIRE(back.contains("base_model.model." + name));
        CHECK(back.at("base_model.model." + name).values == tensor.values);
        CHECK(back.at("base_model.model." + name).shape == tensor.shape);
    }
    CHECK(same(fused("back"), whole));
    must({"convert", "mlx", "--as", "diffusers", "--out", "folder", "--dtype", "bf16"});
    CHECK(
        read_values(folder / "folder/pytorch_lora_weights.safetensors").begin()->second.dtype == taskvec::dtype::bf16);
    refused(folder, {"convert", "kohya.safetensors", "--as", "peft", "--out", "no"}, 1, "its dots are underscores");
    refused(folder, {"convert", "all", "--as", "mlx", "--out", "no"}, 1, "it is a convolution");
    refused(folder, {"convert", "all", "--as", "onnx", "--out", "no"}, 2, "--as");
    refused(folder, {"convert", "all", "--as", "gguf", "--out", "no"}, 1, "GGUF needs the architecture");
    tensors["down.0.to_q.lora_magnitude_vector"] = random_tensor({8}, 30);
    write_adapter_as(folder / "mixed", tensors, {{"use_dora", true}});
    refused(folder, {"convert", "mixed", "--as", "kohya", "--out", "no"}, 1, "'conv_in' has no lora_magnitude_vector");
    tensors["conv_in.lora_magnitude_vector"] = random_tensor({1, 4, 1, 1}, 31);
    write_adapter_as(folder / "dora", tensors, {{"use_dora", true}});
    must({"convert", "dora", "--as", "diffusers", "--out", "dora-diffusers"});
    CHECK(same(fused("dora-diffusers"), fused("dora")));
    refused(folder, {"convert", "dora", "--as", "mlx", "--out", "no"}, 1, "it is a convolution");
    must({"convert", "dora", "--as", "kohya", "--out", "dora.safetensors"});
    CHECK(same(fused("dora.safetensors"), fused("dora")));
    must({"convert", "dora.safetensors", "--as", "peft", "--base", "base.safetensors", "--out", "dora-back"});
    CHECK(same(fused("dora-back"), fused("dora")));
    auto some = read_values(folder / "dora.safetensors");
    some.erase("lora_unet_conv_in.dora_scale");
    write_values(folder / "some.safetensors", some);
    refused(folder, {"convert", "some.safetensors", "--as", "peft", "--base", "base.safetensors", "--out", "no"}, 1,
        "it has no magnitudes, and use_dora");

    const auto shown = must({"inspect", "dora"});
    CHECK(shown.find("DoRA") != std::string::npos);
    CHECK(shown.find("PEFT: 2 modules") != std::string::npos);
    const auto json = nlohmann::json::parse(must({"inspect", "kohya.safetensors", "--adapter", "--json"}));
    CHECK(json["dialect"] == "kohya");
    REQUIRE(json["modules"].size() == 2);
    CHECK(json["modules"][1]["scaling"] == 0.5);
    CHECK(json["modules"][1]["rank"] == 2);
    const auto &a = tensors.at("down.0.to_q.lora_A.weight"), &b = tensors.at("down.0.to_q.lora_B.weight");
    double squares = 0;
    for (std::size_t o = 0; o < 8; ++o) {
        for (std::size_t i = 0; i < 6; ++i) {
            const double x = 0.5
                * (double{b.values[2 * o]} * double{a.values[i]}
                    + double{b.values[2 * o + 1]} * double{a.values[6 + i]});
            squares += x * x;
        }
    }
    CHECK(json["modules"][1]["norm"].get<double>() == doctest::Approx(std::sqrt(squares)));
    CHECK(must({"inspect", "kohya.safetensors"}).find("6 tensors") != std::string::npos);

    // Singular values: their squares sum to the squared norm, and their first ones bound it.
    const auto spectra = nlohmann::json::parse(must({"inspect", "linear", "--singular-values", "--json"}));
    const auto values = spectra["modules"][0]["singular_values"].get<std::vector<double>>();
    REQUIRE(values.size() == 2);
    CHECK(values[0] >= values[1]);
    CHECK(values[0] * values[0] + values[1] * values[1] == doctest::Approx(squares));
    const auto table = must({"inspect", "linear", "--singular-values"});
    for (const char* word : {"σ1", "σr", "90%"}) { CHECK(table.find(word) != std::string::npos); }
    refused(folder, {"inspect", "base.safetensors", "--svg", "x.svg"}, 2, "are of adapters");
    if (std::system("command -v gnuplot > /dev/null 2>&1") == 0) {
        must({"inspect", "all", "--svg", "x.svg"});
        CHECK(slurp(folder / "x.svg").find("down.0.to") != std::string::npos);
    }
    else {
        refused(folder, {"inspect", "all", "--svg", "x.svg"}, 1, "install gnuplot");
    }
}

TEST_CASE("a GGUF adapter is written for the base's architecture, and folds as the adapter that it was")
{
    const scratch folder;
    const std::string layer = "model.layers.0.", q = layer + "self_attn.q_proj", k = layer + "self_attn.k_proj";
    const std::string config =
        R"({"architectures":["LlamaForCausalLM"],"num_attention_heads":2,"num_key_value_heads":1,"model_type":"llama"})";
    write_text(folder / "base/config.json", config);
    write_values(folder / "base/model.safetensors",
        {{q + ".weight", random_tensor({8, 6}, 1)}, {k + ".weight", random_tensor({4, 6}, 2)},
            {layer + "mlp.up_proj.weight", random_tensor({10, 6}, 3)}});
    auto tensors = factors(q, 8, 6, 10);
    tensors.merge(factors(k, 4, 6, 20));
    tensors.merge(factors(layer + "mlp.up_proj", 10, 6, 30));
    write_adapter_as(folder / "a", tensors);
    const auto must = [&](const std::vector<std::string>& arguments) {
        const auto result = run(folder, arguments);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return result.out;
    };
    const auto fused = [&](const std::string& adapter) {
        must({"fuse", "--base", "base", "--adapter", adapter, "--out", "out.safetensors"});
        return read_values(folder / "out.safetensors");
    };
    CHECK(must({"convert", "a", "--as", "gguf", "--out", "a.gguf"}).find("as GGUF into 'a.gguf'") != std::string::npos);
    // The adapter's own base_model_name_or_path led to the configuration; --base does the same.
    must({"convert", "a", "--as", "gguf", "--base", "base", "--out", "b.gguf"});
    CHECK(slurp(folder / "a.gguf") == slurp(folder / "b.gguf"));
    // A base that has weights holds the factors to them; a directory with a configuration alone does not.
    write_adapter_as(folder / "wide", factors(q, 8, 9, 40));
    refused(folder, {"convert", "wide", "--as", "gguf", "--base", "base", "--out", "no.gguf"}, 1, "8×9");
    write_text(folder / "bare/config.json", config);
    must({"convert", "wide", "--as", "gguf", "--base", "bare", "--out", "wide.gguf"});
    refused(folder, {"convert", "wide.gguf", "--as", "peft", "--base", "base", "--out", "no"}, 1, "8×9");
    CHECK(same(fused("a.gguf"), fused("a")));
    must({"convert", "a.gguf", "--as", "peft", "--out", "back"});
    const auto back = read_values(folder / "back/adapter_model.safetensors");
    REQUIRE(back.size() == tensors.size());
    for (const auto& [name, tensor] : tensors) { CHECK(back.at("base_model.model." + name).values == tensor.values); }
    must({"convert", "a.gguf", "--as", "gguf", "--dtype", "bf16", "--out", "half.gguf"});
    const auto json = nlohmann::json::parse(must({"inspect", "half.gguf", "--json"}));
    CHECK(json["dialect"] == "GGUF");
    REQUIRE(json["modules"].size() == 3);
    CHECK(json["modules"][0]["dtype"] == "BF16");
    CHECK(json["modules"][0]["scaling"] == 0.5);
    CHECK(must({"inspect", "a.gguf"}).find("GGUF: 3 modules") != std::string::npos);
    const auto cosine = must({"similarity", "--base", "base", "--task-adapter", "a.gguf", "--task-adapter", "a"});
    CHECK(cosine.find("0.") == std::string::npos);
    CHECK(cosine.find("1.0000") != std::string::npos);

    write_text(folder / "base/config.json", R"({"architectures":["Qwen2ForCausalLM"]})");
    refused(folder, {"fuse", "--base", "base", "--adapter", "a.gguf", "--out", "no.safetensors"}, 1,
        "is an adapter for llama.cpp's architecture llama, and 'base' is qwen2");
    write_text(folder / "base/config.json", R"({"architectures":["BertModel"]})");
    refused(folder, {"convert", "a", "--as", "gguf", "--out", "no.gguf"}, 1, "names the architecture BertModel");
    write_text(folder / "base/config.json", R"({"architectures":["LlamaForCausalLM"]})");
    refused(folder, {"convert", "a", "--as", "gguf", "--out", "no.gguf"}, 1, "num_attention_heads");
    std::filesystem::remove(folder / "base/config.json");
    refused(folder, {"convert", "a", "--as", "gguf", "--out", "no.gguf"}, 1, "there is no config.json beside 'base'");
    refused(folder, {"convert", "a", "--as", "gguf", "--base", "none", "--out", "no.gguf"}, 1, "none: cannot open");
    const std::string data = TASKVEC_TEST_DIR "/data/gguf/llama/";
    refused(folder, {"convert", data + "expected.gguf", "--as", "peft", "--out", "no"}, 1, "how many heads there are");
    must({"convert", data + "expected.gguf", "--as", "peft", "--base", data, "--out", "from-peer"});
    CHECK(same(
        read_values(folder / "from-peer/adapter_model.safetensors"), read_values(data + "adapter_model.safetensors")));
    const auto whole = slurp(folder / "a.gguf");
    write_text(folder / "cut.gguf", whole.substr(0, whole.size() - 200));
    refused(folder, {"fuse", "--base", "base", "--adapter", "cut.gguf", "--out", "no.safetensors"}, 1, "it was cut");
    refused(folder, {"inspect", "cut.gguf"}, 1, "it was cut");
}

TEST_CASE("merge-lora joins what adapters carry whole by the policy that it is told")
{
    const scratch folder;
    const auto head = random_tensor({3, 6}, 40), other = random_tensor({3, 6}, 41), bias = random_tensor({3}, 42);
    auto first = factors("q", 6, 6, 1), second = factors("q", 6, 6, 3);
    first["head.weight"] = head;
    second["head.weight"] = other;
    second["head.bias"] = bias;
    write_adapter_as(folder / "a", first, {{"modules_to_save", {"head"}}});
    write_adapter_as(folder / "b", second, {{"modules_to_save", {"head"}}});
    const auto merge = [&](const std::vector<std::string>& more) {
        std::vector<std::string> all{"merge-lora", "--adapter", "a=3", "--adapter", "b=1", "--out", "out"};
        all.insert(all.end(), more.begin(), more.end());
        return all;
    };
    const auto merged = [&](const std::string& policy) {
        const auto result = run(folder, merge({"--modules-to-save", policy}));
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return read_values(folder / "out/adapter_model.safetensors");
    };
    refused(folder, merge({}), 1, "modules_to_save");
    refused(folder, merge({"--modules-to-save", "error"}), 1, "modules_to_save");
    refused(folder, merge({"--modules-to-save"}), 1, "average, first or drop");
    refused(folder, merge({"--modules-to-save", "equal"}), 1, "average, first or drop");
    refused(folder, merge({"--modules-to-save", "both"}), 2, "'both' is none of");
    const auto mean = merged("average");
    for (std::size_t i = 0; i < 18; ++i) {
        CHECK(mean.at("base_model.model.head.weight").values[i]
            == static_cast<float>((3 * double{head.values[i]} + double{other.values[i]}) / 4));
    }
    CHECK(mean.at("base_model.model.head.bias").values == bias.values);
    CHECK(merged("first").at("base_model.model.head.weight").values == head.values);
    CHECK(nlohmann::json::parse(slurp(folder / "out/adapter_config.json"))["modules_to_save"][0] == "head");
    CHECK(merged("drop").size() == 2);
    CHECK(nlohmann::json::parse(slurp(folder / "out/adapter_config.json"))["modules_to_save"].is_null());
    second["head.weight"] = random_tensor({4, 6}, 43);
    write_adapter_as(folder / "b", second, {{"modules_to_save", {"head"}}});
    refused(folder, merge({"--modules-to-save", "average"}), 1, "they have no mean");
}

TEST_CASE("extract-lora reads a configuration: Conv1D layers, and heads that are tied to embeddings")
{
    const scratch folder;
    values_model base{{"h.0.c_proj.weight", random_tensor({6, 6}, 1)}, {"wte.weight", random_tensor({9, 6}, 2)}};
    auto tuned = base;
    for (auto& [name, tensor] : tuned) {
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            tensor.values[i] += 0.25f * static_cast<float>(i / 6 + 1) * static_cast<float>(i % 6 + 1); // of rank 1
        }
    }
    tuned["h.0.c_proj.weight"].values[1] += 1;
    for (const std::string name : {"base", "tuned"}) {
        std::filesystem::create_directories(folder / name);
        write_values(folder / name / "model.safetensors", name == "base" ? base : tuned);
        write_text(folder / name / "config.json", R"({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})");
    }
    const auto result =
        run(folder, {"extract-lora", "--base", "base", "--task", "tuned", "--rank", "2", "--out", "out"});
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    const auto config = nlohmann::json::parse(slurp(folder / "out/adapter_config.json"));
    CHECK(config["fan_in_fan_out"] == true);
    CHECK(config["ensure_weight_tying"] == true);
    CHECK(config["target_modules"] == nlohmann::json{"h.0.c_proj", "wte", "lm_head"});
    REQUIRE(run(folder, {"fuse", "--base", "base", "--adapter", "out", "--out", "fused"}).code == 0);
    const auto fused = read_values(folder / "fused/model.safetensors");
    REQUIRE(fused.size() == 2);
    for (const auto& [name, tensor] : tuned) {
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            CHECK(std::abs(fused.at(name).values[i] - tensor.values[i]) < 2e-5);
        }
    }
}

TEST_CASE("fuse rescales an embedding under DoRA by the norms of its dimensions")
{
    const scratch folder;
    const auto w = random_tensor({7, 3}, 1); // entries×dimensions
    write_values(folder / "base.safetensors", {{"words.weight", w}});
    const values_model tensors{{"words.lora_embedding_A", random_tensor({2, 7}, 2)},
        {"words.lora_embedding_B", random_tensor({3, 2}, 3)}, {"words.lora_magnitude_vector", random_tensor({3}, 4)}};
    write_adapter_as(folder / "a", tensors, {{"use_dora", true}});
    const auto result = run(folder, fuse_one);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    const auto fused = read_values(folder / "out.safetensors").at("words.weight");
    const auto &a = tensors.at("words.lora_embedding_A").values, &b = tensors.at("words.lora_embedding_B").values;
    for (std::size_t d = 0; d < 3; ++d) {
        std::vector<double> column;
        double squares = 0;
        for (std::size_t e = 0; e < 7; ++e) {
            column.push_back(double{w.values[e * 3 + d]}
                + 0.5 * (double{b[d * 2]} * double{a[e]} + double{b[d * 2 + 1]} * double{a[7 + e]}));
            squares += column.back() * column.back();
        }
        const double gain = double{tensors.at("words.lora_magnitude_vector").values[d]} / std::sqrt(squares);
        for (std::size_t e = 0; e < 7; ++e) {
            CHECK(std::abs(double{fused.values[e * 3 + d]} - gain * column[e]) < 2e-6);
        }
    }
    // PEFT, where it saves the embedding whole, has the magnitudes twice.
    auto twice = tensors;
    twice["words.lora_magnitude_vector.weight"] = tensors.at("words.lora_magnitude_vector");
    write_adapter_as(folder / "a", twice, {{"use_dora", true}});
    REQUIRE(run(folder, fuse_one).code == 0);
    CHECK(read_values(folder / "out.safetensors").at("words.weight").values == fused.values);
    twice["words.lora_magnitude_vector.weight"].values[0] += 1;
    write_adapter_as(folder / "b", twice, {{"use_dora", true}});
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "b", "--out", "no.safetensors"}, 1,
        "is the second such factor");
    const values_model other{{"words.lora_embedding_A", random_tensor({2, 7}, 2)},
        {"words.lora_embedding_B", random_tensor({3, 2}, 3)}, {"words.lora_magnitude_vector", random_tensor({7}, 4)}};
    write_adapter_as(folder / "a", other, {{"use_dora", true}});
    std::filesystem::remove(folder / "out.safetensors");
    refused(folder, fuse_one, 1, "3 outputs");
}

TEST_CASE("fuse gives a head that comes apart from its embedding the name that its architecture has")
{
    struct example {
        std::string type, architecture, embedding, beside, head, bias;
    };
    for (const auto& one : {example{"bert", "BertForMaskedLM", "bert.embeddings.word_embeddings",
                                "cls.predictions.transform.dense", "cls.predictions.decoder", "cls.predictions.bias"},
             example{"roberta", "RobertaForMaskedLM", "roberta.embeddings.word_embeddings", "lm_head.dense",
                 "lm_head.decoder", "lm_head.bias"},
             example{"modernbert", "ModernBertForMaskedLM", "model.embeddings.tok_embeddings", "head.dense", "decoder",
                 "decoder.bias"},
             example{"distilbert", "DistilBertForMaskedLM", "distilbert.embeddings.word_embeddings", "vocab_transform",
                 "vocab_projector", "vocab_projector.bias"},
             example{"gpt2", "GPT2LMHeadModel", "transformer.wte", "transformer.h.0.mlp.c_fc", "lm_head", ""}}) {
        CAPTURE(one.type);
        const scratch folder;
        values_model base{
            {one.embedding + ".weight", random_tensor({9, 4}, 1)}, {one.beside + ".weight", random_tensor({4, 4}, 2)}};
        if (!one.bias.empty()) { base[one.bias] = random_tensor({9}, 3); }
        write_text(folder / "base/config.json",
            nlohmann::json{{"model_type", one.type}, {"architectures", {one.architecture}}}.dump());
        write_values(folder / "base/model.safetensors", base);
        const auto fuse = [&](const values_model& tensors) {
            write_adapter_as(folder / "a", tensors);
            const auto result = run(folder, {"fuse", "--base", "base", "--adapter", "a", "--out", "out"});
            CAPTURE(result.err);
            REQUIRE(result.code == 0);
            CHECK(nlohmann::json::parse(slurp(folder / "out/config.json"))["tie_word_embeddings"] == false);
            return read_values(folder / "out/model.safetensors");
        };
        const auto tensors = factors(one.head, 9, 4, 5);
        const auto of_head = fuse(tensors);
        const auto& embedding = base.at(one.embedding + ".weight");
        CHECK(of_head.at(one.embedding + ".weight").values == embedding.values);
        CHECK(of_head.at(one.head + ".weight").values
            == added(embedding, tensors.at(one.head + ".lora_A.weight"), tensors.at(one.head + ".lora_B.weight"), 0.5)
                .values);
        // A bias that is tied as the head is, to one beside it.
        const bool tied_bias = one.bias == "cls.predictions.bias" || one.bias == "lm_head.bias";
        CHECK(of_head.size() == base.size() + (tied_bias ? 2 : 1));
        if (tied_bias) { CHECK(of_head.at(one.head + ".bias").values == base.at(one.bias).values); }
        const auto of_embedding = fuse({{one.embedding + ".lora_embedding_A", random_tensor({2, 9}, 7)},
            {one.embedding + ".lora_embedding_B", random_tensor({4, 2}, 8)}});
        CHECK(of_embedding.at(one.head + ".weight").values == embedding.values);
        CHECK(of_embedding.at(one.embedding + ".weight").values != embedding.values);
    }
    // GPT-NeoX's head is embed_out in files, and lm_head to transformers 5.
    const scratch folder;
    const values_model base{
        {"embed_out.weight", random_tensor({9, 4}, 1)}, {"gpt_neox.embed_in.weight", random_tensor({9, 4}, 2)}};
    write_text(folder / "base/config.json",
        R"({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "tie_word_embeddings": false})");
    write_values(folder / "base/model.safetensors", base);
    const auto tensors = factors("lm_head", 9, 4, 5);
    write_adapter_as(folder / "a", tensors);
    const auto result = run(folder, {"fuse", "--base", "base", "--adapter", "a", "--out", "out"});
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    const auto found = read_values(folder / "out/model.safetensors");
    CHECK(found.size() == 2);
    CHECK(found.at("embed_out.weight").values
        == added(
            base.at("embed_out.weight"), tensors.at("lm_head.lora_A.weight"), tensors.at("lm_head.lora_B.weight"), 0.5)
            .values);
    auto whole = factors("gpt_neox.embed_in", 9, 4, 7);
    whole["lm_head.weight"] = random_tensor({9, 4}, 8);
    write_adapter_as(folder / "a", whole, {{"modules_to_save", {"lm_head"}}});
    REQUIRE(run(folder, {"fuse", "--base", "base", "--adapter", "a", "--out", "out"}).code == 0);
    CHECK(read_values(folder / "out/model.safetensors").at("embed_out.weight").values
        == whole.at("lm_head.weight").values);
}

TEST_CASE("what is left out of a tied head or embedding takes nothing apart")
{
    const scratch folder;
    const auto words = random_tensor({11, 6}, 1), q = random_tensor({6, 6}, 2);
    std::filesystem::create_directories(folder / "base");
    write_values(
        folder / "base/model.safetensors", {{"model.embed_tokens.weight", words}, {"model.layers.0.q_proj.weight", q}});
    write_text(folder / "base/config.json", R"({"model_type": "llama", "tie_word_embeddings": true})");
    const auto of_q = factors("model.layers.0.q_proj", 6, 6, 5), of_head = factors("lm_head", 11, 6, 7);
    const values_model of_words{{"model.embed_tokens.lora_embedding_A", random_tensor({2, 11}, 9)},
        {"model.embed_tokens.lora_embedding_B", random_tensor({6, 2}, 10)}};
    const auto changed_q =
        added(q, of_q.at("model.layers.0.q_proj.lora_A.weight"), of_q.at("model.layers.0.q_proj.lora_B.weight"), 0.5);
    const auto changed_words = added(words, of_words.at("model.embed_tokens.lora_embedding_A"),
        of_words.at("model.embed_tokens.lora_embedding_B"), 0.5, true);
    const auto fuse = [&](const std::string& exclude) {
        const auto result =
            run(folder, {"fuse", "--base", "base", "--adapter", "a", "--out", "out", "--exclude", exclude});
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return read_values(folder / "out/model.safetensors");
    };
    const auto tied = [&] {
        return nlohmann::json::parse(slurp(folder / "out/config.json"))["tie_word_embeddings"].get<bool>();
    };
    for (const bool whole : {false, true}) {
        CAPTURE(whole);
        auto tensors = of_q;
        if (whole) { tensors["lm_head.weight"] = random_tensor({11, 6}, 12); }
        else {
            tensors.insert(of_head.begin(), of_head.end());
        }
        write_adapter_as(
            folder / "a", tensors, whole ? nlohmann::json{{"modules_to_save", {"lm_head"}}} : nlohmann::json());
        const auto without_head = fuse("lm_head");
        CHECK(without_head.size() == 2);
        CHECK(tied());
        CHECK(without_head.at("model.embed_tokens.weight").values == words.values);
        CHECK(without_head.at("model.layers.0.q_proj.weight").values == changed_q.values);
    }
    auto tensors = of_q;
    tensors.insert(of_words.begin(), of_words.end());
    write_adapter_as(folder / "a", tensors);
    CHECK(fuse("embed_tokens").size() == 2);
    CHECK(tied());
    // Of both, the one that is left is changed, and the other stays what it was: a tensor of its own.
    tensors.insert(of_head.begin(), of_head.end());
    write_adapter_as(folder / "a", tensors);
    const auto of_both = fuse("lm_head");
    CHECK_FALSE(tied());
    CHECK(of_both.at("model.embed_tokens.weight").values == changed_words.values);
    CHECK(of_both.at("lm_head.weight").values == words.values);
    const auto head_alone = fuse("embed_tokens");
    CHECK(head_alone.at("model.embed_tokens.weight").values == words.values);
    CHECK(head_alone.at("lm_head.weight").values
        == added(words, of_head.at("lm_head.lora_A.weight"), of_head.at("lm_head.lora_B.weight"), 0.5).values);
    CHECK(fuse("embed_tokens|lm_head").size() == 2);
    CHECK(tied());
    // As a task, which cannot come apart, it goes by the same rule.
    const auto task = run(folder,
        {"merge", "--method", "task-arithmetic", "--base", "base", "--task-adapter", "a", "--exclude",
            "embed_tokens|lm_head", "--out", "merged"});
    CHECK_MESSAGE(task.code == 0, task.err);
}

TEST_CASE("fuse --subtract takes an adapter out that carries the weights from before it")
{
    const scratch folder;
    const auto base = two_layers();
    write_values(folder / "base.safetensors", base);
    auto tensors = factors("layers.0", 9, 20, 10);
    tensors["layers.0.base_layer.weight"] = base.at("layers.0.weight");
    write_adapter_as(folder / "a", tensors);
    REQUIRE(run(folder, fuse_one).code == 0);
    const auto result = run(
        folder, {"fuse", "--base", "out.safetensors", "--adapter", "a", "--subtract", "--out", "before.safetensors"});
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    const auto before = read_values(folder / "before.safetensors");
    for (const auto& [name, x] : base) {
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            CHECK(std::abs(before.at(name).values[i] - x.values[i]) < 2e-6);
        }
    }
    // What it holds whole cannot be taken out; --exclude leaves it where it is.
    auto more = tensors;
    more["layers.1.weight"] = random_tensor({20, 20}, 12);
    write_adapter_as(folder / "b", more, {{"modules_to_save", {"layers.1"}}});
    std::vector<std::string> subtract{
        "fuse", "--base", "out.safetensors", "--adapter", "b", "--subtract", "--out", "again.safetensors"};
    refused(folder, subtract, 1, "leave it out by --exclude");
    subtract.insert(subtract.end(), {"--exclude", "layers.1"});
    REQUIRE(run(folder, subtract).code == 0);
    CHECK(
        read_values(folder / "again.safetensors").at("layers.0.weight").values == before.at("layers.0.weight").values);
    // Without it, a base that holds the adapter is another one; and factors beside weights are no base.
    refused(folder, {"fuse", "--base", "out.safetensors", "--adapter", "a", "--out", "no.safetensors"}, 1,
        "carries a copy of the weight 'layers.0.weight'");
    auto wrapped = base;
    wrapped["layers.0.lora_A.default.weight"] = tensors.at("layers.0.lora_A.weight");
    write_values(folder / "wrapped.safetensors", wrapped);
    refused(folder, {"fuse", "--base", "wrapped.safetensors", "--adapter", "a", "--out", "no.safetensors"}, 1,
        "holds factors of an adapter");
}

TEST_CASE("segments that wrappers put within names are left out of an adapter's, and of the base's")
{
    const scratch folder;
    const auto base = two_layers();
    write_values(folder / "base.safetensors", base);
    const auto plain = factors("layers.0", 9, 20, 10);
    write_adapter_as(folder / "a", plain);
    REQUIRE(run(folder, fuse_one).code == 0);
    const auto expected = read_values(folder / "out.safetensors");
    values_model inner, outer;
    for (const auto& [name, x] : plain) {
        inner["layers._checkpoint_wrapped_module." + name.substr(7)] = x;
        outer["_orig_mod.layers.0._fsdp_wrapped_module" + name.substr(8)] = x;
    }
    for (const auto& names : {inner, outer}) {
        write_adapter_as(folder / "a", names);
        const auto result = run(folder, fuse_one);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(result.err.find("segments of wrappers") != std::string::npos);
        CHECK(read_values(folder / "out.safetensors").at("layers.0.weight").values
            == expected.at("layers.0.weight").values);
    }
    values_model wrapped;
    for (const auto& [name, x] : base) { wrapped[name.substr(0, 8) + "._fsdp_wrapped_module" + name.substr(8)] = x; }
    write_values(folder / "base.safetensors", wrapped);
    write_adapter_as(folder / "a", plain);
    REQUIRE(run(folder, fuse_one).code == 0);
    CHECK(read_values(folder / "out.safetensors").at("layers.0._fsdp_wrapped_module.weight").values
        == expected.at("layers.0.weight").values);
    // What nothing matches is said with the flags that name it.
    write_adapter_as(folder / "a", factors("blocks.7", 9, 20, 10));
    std::filesystem::remove(folder / "out.safetensors");
    refused(folder, fuse_one, 1, "say what it is called there (--rename, --map)");
}

TEST_CASE("modules of another layer or tower than the base has are no modules of it, whatever stands before them")
{
    const scratch folder;
    const std::string q = "self_attn.q_proj";
    const auto attempt = [&](const std::vector<std::string>& tensors, const std::vector<std::string>& modules) {
        values_model base, adapter;
        for (const auto& name : tensors) { base[name + ".weight"] = random_tensor({6, 6}, 1); }
        for (const auto& module : modules) { adapter.merge(factors(module, 6, 6, 3)); }
        std::filesystem::remove_all(folder / "a");
        write_values(folder / "base.safetensors", base);
        write_adapter_as(folder / "a", adapter);
        return run(folder, fuse_one);
    };
    struct pair {
        std::string tensor, module;
    };
    for (const auto& [tensor, module] :
        {pair{"model.layers.0." + q, "model.layers.1." + q}, pair{"model.layers.0." + q, "model.layers.5." + q},
            pair{"encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"},
            pair{"model.decoder.layers.0." + q, "model.encoder.layers.0." + q},
            pair{"model.layers.0." + q, "model.vision_tower.layers.0." + q},
            pair{"layers.0." + q, "vision_tower.layers.0." + q},
            pair{"model.layers.0.mlp.down_proj", "visual.blocks.0.mlp.down_proj"}}) {
        CAPTURE_BOUND(module);
        const auto result = attempt({tensor}, {module});
        CHECK(result.code == 1);
        CHECK(
            result.err.find("module '" + module + "' of 'a' is no module of 'base.safetensors'") != std::string::npos);
        refused(folder,
            {"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task-adapter", "a", "--out",
                "merged.safetensors"},
            1, "is no module of");
    }
    // Words that say nothing are left out, put before and replaced.
    for (const auto& [tensor, module] : {pair{"model.layers.0." + q, "language_model.model.layers.0." + q},
             pair{"language_model.model.layers.0." + q, "model.language_model.layers.0." + q},
             pair{"encoder.layer.0.query", "0.auto_model.encoder.layer.0.query"},
             pair{"encoder.layer.0.query", "vit.encoder.layer.0.query"},
             pair{"bert.encoder.layer.0.query", "roberta.encoder.layer.0.query"},
             pair{"decoder.layers.0." + q, "model.decoder.layers.0." + q},
             pair{"vision_tower.vision_model.encoder.layers.0." + q, "model.vision_tower.encoder.layers.0." + q},
             pair{"vision_model.encoder.layers.0." + q, "encoder.layers.0." + q}}) {
        CAPTURE_BOUND(module);
        const auto result = attempt({tensor}, {module});
        CAPTURE(result.err);
        CHECK(result.code == 0);
    }
}

TEST_CASE("names that two tensors have are decided by towers, and by the prefixes of other modules")
{
    const scratch folder;
    const std::string q = "self_attn.q_proj";
    const auto changed = [&](const values_model& base, const std::vector<std::string>& modules) {
        values_model adapter;
        for (const auto& module : modules) { adapter.merge(factors(module, 6, 6, 3)); }
        std::filesystem::remove_all(folder / "a");
        write_values(folder / "base.safetensors", base);
        write_adapter_as(folder / "a", adapter);
        const auto result = run(folder, fuse_one);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        std::vector<std::string> names;
        for (const auto& [name, tensor] : read_values(folder / "out.safetensors")) {
            if (tensor.values != base.at(name).values) { names.push_back(name); }
        }
        return names;
    };
    const auto tensor = [](unsigned seed) { return random_tensor({6, 6}, seed); };
    const std::string text = "language_model.model.layers.0." + q + ".weight",
                      vision = "vision_tower.encoder.layers.0." + q + ".weight";
    const values_model sees{{text, tensor(1)}, {vision, tensor(2)}};
    CHECK(changed(sees, {"model.language_model.layers.0." + q}) == std::vector<std::string>{text});
    CHECK(changed(sees, {"model.vision_tower.encoder.layers.0." + q}) == std::vector<std::string>{vision});
    CHECK(changed(sees, {"model.language_model.layers.0." + q, "model.vision_tower.encoder.layers.0." + q})
        == std::vector<std::string>{text, vision});
    // The first of two alike lists has no layer 1: layer 0 is in the other one too.
    const values_model lists{{"first.layers.0.q.weight", tensor(1)}, {"second.layers.0.q.weight", tensor(2)},
        {"second.layers.1.q.weight", tensor(3)}};
    CHECK(changed(lists, {"layers.0.q", "layers.1.q"})
        == std::vector<std::string>{"second.layers.0.q.weight", "second.layers.1.q.weight"});
    write_adapter_as(folder / "b", factors("layers.0.q", 6, 6, 3));
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "b", "--out", "no.safetensors"}, 1,
        "may mean 'first.layers.0.q.weight' or 'second.layers.0.q.weight'");
}

TEST_CASE("whether square weights lie in×out is told by others of the model, whatever its configuration is called")
{
    const scratch folder;
    values_model base{{"c_attn.weight", random_tensor({6, 18}, 1)}, {"c_attn.bias", random_tensor({18}, 2)},
        {"c_proj.weight", random_tensor({6, 6}, 3)}, {"c_proj.bias", random_tensor({6}, 4)}};
    const auto square = factors("c_proj", 6, 6, 5);
    auto both = factors("c_attn", 18, 6, 7);
    both.insert(square.begin(), square.end());
    write_adapter_as(folder / "square", square, {{"fan_in_fan_out", true}});
    write_adapter_as(folder / "both", both, {{"fan_in_fan_out", true}});
    const auto fused = [&](const std::string& type, const std::string& adapter) {
        std::filesystem::create_directories(folder / "base");
        write_values(folder / "base/model.safetensors", base);
        write_text(folder / "base/config.json", nlohmann::json{{"model_type", type}}.dump());
        const auto result = run(folder, {"fuse", "--base", "base", "--adapter", adapter, "--out", "out.safetensors"});
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return read_values(folder / "out.safetensors").at("c_proj.weight").values;
    };
    const auto is = [&](bool turned) {
        return added(
            base.at("c_proj.weight"), square.at("c_proj.lora_A.weight"), square.at("c_proj.lora_B.weight"), 0.5, turned)
            .values;
    };
    for (const std::string type : {"clvp", "backpack-gpt2", "gpt2"}) {
        CHECK(fused(type, "both") == is(true));
        CHECK(fused(type, "square") == is(true)); // the bias of c_attn has 18 entries, its weight 18 columns
    }
    base["c_attn.weight"].shape = {18, 6}; // as linear layers lie
    CHECK(fused("backpack-gpt2", "square") == is(false));
    // CTRL has linear layers, though it is GPT-2's kin.
    write_adapter_as(folder / "plain", square);
    CHECK(fused("ctrl", "plain") == is(false));
}

TEST_CASE("tied heads are known of architectures that call them, or the embedding, by names of their own")
{
    struct example {
        std::string type, architecture, embedding, head;
        bool in_configuration = false; ///< says how many words there are
    };
    for (const auto& one : {example{"openai-gpt", "OpenAIGPTLMHeadModel", "transformer.tokens_embed", "lm_head"},
             example{"xlnet", "XLNetLMHeadModel", "transformer.word_embedding", "lm_loss"},
             example{"xlm", "XLMWithLMHeadModel", "transformer.embeddings", "pred_layer.proj"},
             example{"flaubert", "FlaubertWithLMHeadModel", "transformer.embeddings", "pred_layer.proj"},
             example{"mamba", "MambaForCausalLM", "backbone.embeddings", "lm_head"},
             example{"rwkv", "RwkvForCausalLM", "rwkv.embeddings", "head"},
             example{"ctrl", "CTRLLMHeadModel", "transformer.w", "lm_head", true}}) {
        CAPTURE(one.type);
        const scratch folder;
        const values_model base{{one.embedding + ".weight", random_tensor({9, 4}, 1)},
            {"transformer.layers.0.q.weight", random_tensor({4, 4}, 2)}};
        nlohmann::json config{{"model_type", one.type}, {"architectures", {one.architecture}}};
        if (one.in_configuration) { config["vocab_size"] = 9; }
        write_text(folder / "base/config.json", config.dump());
        write_values(folder / "base/model.safetensors", base);
        const auto fuse = [&](const values_model& tensors) {
            write_adapter_as(folder / "a", tensors);
            const auto result = run(folder, {"fuse", "--base", "base", "--adapter", "a", "--out", "out"});
            CAPTURE(result.err);
            REQUIRE(result.code == 0);
            CHECK(nlohmann::json::parse(slurp(folder / "out/config.json"))["tie_word_embeddings"] == false);
            return read_values(folder / "out/model.safetensors");
        };
        const auto& embedding = base.at(one.embedding + ".weight");
        const auto tensors = factors(one.head, 9, 4, 5);
        const auto of_head = fuse(tensors);
        CHECK(of_head.at(one.embedding + ".weight").values == embedding.values);
        CHECK(of_head.at(one.head + ".weight").values
            == added(embedding, tensors.at(one.head + ".lora_A.weight"), tensors.at(one.head + ".lora_B.weight"), 0.5)
                .values);
        const values_model words{{one.embedding + ".lora_embedding_A", random_tensor({2, 9}, 7)},
            {one.embedding + ".lora_embedding_B", random_tensor({4, 2}, 8)}};
        const auto of_embedding = fuse(words);
        CHECK(of_embedding.at(one.head + ".weight").values == embedding.values);
        CHECK(of_embedding.at(one.embedding + ".weight").values
            == added(embedding, words.at(one.embedding + ".lora_embedding_A"),
                words.at(one.embedding + ".lora_embedding_B"), 0.5, true)
                .values);
    }
}

TEST_CASE("factors of an embedding and a head that have grown are added to the weights that come with them")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "base");
    write_values(folder / "base/model.safetensors",
        {{"lm_head.weight", random_tensor({6, 4}, 1)}, {"model.embed_tokens.weight", random_tensor({6, 4}, 2)},
            {"model.layers.0.q.weight", random_tensor({4, 4}, 3)}});
    write_text(folder / "base/config.json", R"({"model_type": "llama", "vocab_size": 6})");
    auto tensors = factors("lm_head", 8, 4, 10);
    const auto head = random_tensor({8, 4}, 5), embedding = random_tensor({8, 4}, 6);
    tensors["model.embed_tokens.lora_embedding_A"] = random_tensor({2, 8}, 20);
    tensors["model.embed_tokens.lora_embedding_B"] = random_tensor({4, 2}, 21);
    tensors["model.embed_tokens.base_layer.weight"] = embedding;
    const std::vector<std::string> line{"fuse", "--base", "base", "--adapter", "a", "--out", "out"};
    write_adapter_as(folder / "a", tensors);
    refused(folder, line, 1, "one of the two would lack rows");
    tensors["lm_head.base_layer.weight"] = head;
    write_adapter_as(folder / "a", tensors);
    const auto done = run(folder, line);
    REQUIRE_MESSAGE(done.code == 0, done.err);
    const auto found = read_values(folder / "out/model.safetensors");
    CHECK(found.at("lm_head.weight").values
        == added(head, tensors.at("lm_head.lora_A.weight"), tensors.at("lm_head.lora_B.weight"), 0.5).values);
    CHECK(found.at("model.embed_tokens.weight").values
        == added(embedding, tensors.at("model.embed_tokens.lora_embedding_A"),
            tensors.at("model.embed_tokens.lora_embedding_B"), 0.5, true)
            .values);
    CHECK(nlohmann::json::parse(slurp(folder / "out/config.json"))["vocab_size"] == 8);
}

TEST_CASE(
    "adapters that change a tied embedding and its head as one, and others that part the two, add up in any order")
{
    const scratch folder;
    const auto words = random_tensor({11, 6}, 1);
    const auto entries_of = [](const values_tensor& x) {
        return std::vector<double>(x.values.begin(), x.values.end());
    };
    /// Σ_k down[k, i]·up[j, k] at (i, j), halved as α = 1 of rank 2 has it.
    const auto product = [](const values_tensor& down, const values_tensor& up) {
        std::vector<double> made(66);
        for (std::size_t i = 0; i < 11; ++i) {
            for (std::size_t j = 0; j < 6; ++j) {
                for (std::size_t k = 0; k < 2; ++k) {
                    made[i * 6 + j] += 0.5 * double{down.values[k * 11 + i]} * double{up.values[j * 2 + k]};
                }
            }
        }
        return made;
    };
    const auto less_words = [&](const values_tensor& whole) {
        auto made = entries_of(whole);
        for (std::size_t i = 0; i < 66; ++i) { made[i] -= double{words.values[i]}; }
        return made;
    };
    const auto turned = [](const values_tensor& x) {
        values_tensor y{x.dtype, {x.shape[1], x.shape[0]}, x.values};
        const auto rows = static_cast<std::size_t>(x.shape[0]), columns = static_cast<std::size_t>(x.shape[1]);
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t j = 0; j < columns; ++j) { y.values[j * rows + i] = x.values[i * columns + j]; }
        }
        return y;
    };
    struct change {
        std::string name;
        std::vector<double> embedding, head;
    };
    std::vector<change> changes;
    const std::vector<double> nothing(66);
    const std::string a = "model.embed_tokens.lora_embedding_A", b = "model.embed_tokens.lora_embedding_B";
    const auto of_words = [&](unsigned seed) {
        return values_model{{a, random_tensor({2, 11}, seed)}, {b, random_tensor({6, 2}, seed + 1)}};
    };
    auto tensors = of_words(10);
    write_adapter_as(folder / "says", tensors, {{"ensure_weight_tying", true}});
    changes.push_back({"says", product(tensors.at(a), tensors.at(b)), product(tensors.at(a), tensors.at(b))});
    tensors = of_words(20);
    tensors["lm_head.lora_A.weight"] = turned(tensors.at(b));
    tensors["lm_head.lora_B.weight"] = turned(tensors.at(a));
    write_adapter_as(folder / "alike", tensors);
    changes.push_back({"alike", product(tensors.at(a), tensors.at(b)), product(tensors.at(a), tensors.at(b))});
    tensors = factors("model.layers.0.q_proj", 6, 6, 30);
    const auto whole = random_tensor({11, 6}, 32);
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] = whole;
    write_adapter_as(folder / "whole", tensors,
        {{"ensure_weight_tying", true}, {"modules_to_save", {"embed_tokens"}}, {"target_modules", {"q_proj"}}});
    changes.push_back({"whole", less_words(whole), less_words(whole)});
    tensors = of_words(40);
    write_adapter_as(folder / "embedding", tensors);
    changes.push_back({"embedding", product(tensors.at(a), tensors.at(b)), nothing});
    tensors = factors("lm_head", 11, 6, 50);
    write_adapter_as(folder / "head", tensors);
    changes.push_back({"head", nothing,
        product(turned(tensors.at("lm_head.lora_B.weight")), turned(tensors.at("lm_head.lora_A.weight")))});
    tensors = factors("model.layers.0.q_proj", 6, 6, 60);
    const auto saved = random_tensor({11, 6}, 62);
    tensors["lm_head.weight"] = saved;
    write_adapter_as(folder / "saved", tensors, {{"modules_to_save", {"lm_head"}}, {"target_modules", {"q_proj"}}});
    changes.push_back({"saved", nothing, less_words(saved)});
    // MLX's embedding is the head too.
    const auto mlx_a = random_tensor({11, 2}, 70), mlx_b = random_tensor({2, 6}, 71);
    std::filesystem::create_directories(folder / "mlx");
    write_values(folder / "mlx/adapters.safetensors",
        {{"model.embed_tokens.lora_a", mlx_a}, {"model.embed_tokens.lora_b", mlx_b}});
    write_text(folder / "mlx/adapter_config.json", R"({"lora_parameters": {"rank": 2, "scale": 0.5}})");
    changes.push_back({"mlx", product(turned(mlx_a), turned(mlx_b)), product(turned(mlx_a), turned(mlx_b))});

    for (const bool head_stored : {false, true}) {
        values_model base{
            {"model.embed_tokens.weight", words}, {"model.layers.0.q_proj.weight", random_tensor({6, 6}, 2)}};
        if (head_stored) { base["lm_head.weight"] = words; }
        std::filesystem::create_directories(folder / "base");
        write_values(folder / "base/model.safetensors", base);
        write_text(folder / "base/config.json", R"({"model_type": "llama", "tie_word_embeddings": true})");
        for (const auto& first : changes) {
            for (const auto& second : changes) {
                if (first.name == second.name) { continue; }
                CAPTURE(first.name);
                CAPTURE(second.name);
                const auto done = run(folder,
                    {"fuse", "--base", "base", "--adapter", first.name, "--adapter", second.name, "--out", "out"});
                REQUIRE_MESSAGE(done.code == 0, done.err);
                const auto found = read_values(folder / "out/model.safetensors");
                const auto& embedding = found.at("model.embed_tokens.weight");
                const auto& head = found.contains("lm_head.weight") ? found.at("lm_head.weight") : embedding;
                double off = 0;
                for (std::size_t i = 0; i < 66; ++i) {
                    const double plain = double{words.values[i]};
                    off = std::max({off,
                        std::abs(double{embedding.values[i]} - (plain + first.embedding[i] + second.embedding[i])),
                        std::abs(double{head.values[i]} - (plain + first.head[i] + second.head[i]))});
                }
                CHECK(off < 1e-5);
                const bool parted =
                    first.embedding != first.head || second.embedding != second.head; // a tensor of its own
                CHECK(nlohmann::json::parse(slurp(folder / "out/config.json"))["tie_word_embeddings"] == !parted);
            }
        }
    }

    // DoRA's norms are those of dimensions in an embedding, and of entries in its head: not one change.
    write_values(folder / "base/model.safetensors",
        {{"model.embed_tokens.weight", words}, {"model.layers.0.q_proj.weight", random_tensor({6, 6}, 2)}});
    tensors = of_words(80);
    tensors["lm_head.lora_A.weight"] = turned(tensors.at(b));
    tensors["lm_head.lora_B.weight"] = turned(tensors.at(a));
    tensors["model.embed_tokens.lora_magnitude_vector"] = random_tensor({6}, 82);
    tensors["lm_head.lora_magnitude_vector"] = random_tensor({11}, 83);
    write_adapter_as(folder / "rescaled", tensors, {{"ensure_weight_tying", true}, {"use_dora", true}});
    const auto done = run(folder, {"fuse", "--base", "base", "--adapter", "rescaled", "--out", "out"});
    REQUIRE_MESSAGE(done.code == 0, done.err);
    const auto found = read_values(folder / "out/model.safetensors");
    auto direction = product(tensors.at(a), tensors.at(b));
    for (std::size_t i = 0; i < 66; ++i) { direction[i] += double{words.values[i]}; }
    for (std::size_t i = 0; i < 66; ++i) {
        double of_column = 0, of_row = 0;
        for (std::size_t k = 0; k < 11; ++k) { of_column += std::pow(direction[k * 6 + i % 6], 2); }
        for (std::size_t k = 0; k < 6; ++k) { of_row += std::pow(direction[i / 6 * 6 + k], 2); }
        const double embedding = double{tensors.at("model.embed_tokens.lora_magnitude_vector").values[i % 6]}
            * direction[i] / std::sqrt(of_column),
                     head = double{tensors.at("lm_head.lora_magnitude_vector").values[i / 6]} * direction[i]
            / std::sqrt(of_row);
        CHECK(std::abs(double{found.at("model.embed_tokens.weight").values[i]} - embedding) < 1e-5);
        CHECK(std::abs(double{found.at("lm_head.weight").values[i]} - head) < 1e-5);
    }
    write_adapter_as(folder / "rescaled", tensors,
        {{"ensure_weight_tying", true}, {"use_dora", true}, {"target_modules", {"embed_tokens"}}});
    refused(folder, {"fuse", "--base", "base", "--adapter", "rescaled", "--out", "no", "--quiet"}, 1,
        "add 'lm_head' to target_modules");
}

TEST_CASE("where a head comes apart from T5's embedding, every name of that has what was done to it")
{
    const scratch folder;
    const auto shared = random_tensor({11, 6}, 1);
    std::filesystem::create_directories(folder / "base");
    write_values(folder / "base/model.safetensors",
        {{"shared.weight", shared}, {"encoder.block.0.q.weight", random_tensor({6, 6}, 2)},
            {"decoder.block.0.q.weight", random_tensor({6, 6}, 3)}});
    write_text(folder / "base/config.json",
        R"({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": true})");
    const values_model of_words{
        {"shared.lora_embedding_A", random_tensor({2, 11}, 4)}, {"shared.lora_embedding_B", random_tensor({6, 2}, 5)}};
    const auto of_head = factors("lm_head", 11, 6, 6);
    write_adapter_as(folder / "words", of_words);
    write_adapter_as(folder / "head", of_head);
    const auto changed =
        added(shared, of_words.at("shared.lora_embedding_A"), of_words.at("shared.lora_embedding_B"), 0.5, true);
    for (const bool turned : {false, true}) {
        const auto done = run(folder,
            {"fuse", "--base", "base", "--adapter", turned ? "head" : "words", "--adapter", turned ? "words" : "head",
                "--out", "out"});
        REQUIRE_MESSAGE(done.code == 0, done.err);
        const auto found = read_values(folder / "out/model.safetensors");
        for (const std::string name : {"shared", "encoder.embed_tokens", "decoder.embed_tokens"}) {
            CHECK(found.at(name + ".weight").values == changed.values);
        }
        // The embedding changed under all its names, of which the head was one.
        const auto head = added(changed, of_head.at("lm_head.lora_A.weight"), of_head.at("lm_head.lora_B.weight"), 0.5);
        for (std::size_t i = 0; i < 66; ++i) {
            CHECK(std::abs(found.at("lm_head.weight").values[i] - head.values[i]) < 1e-5F);
        }
    }
}

TEST_CASE("beside an embedding that grew others change the rows that they know, and no second one grows it")
{
    const scratch folder;
    std::filesystem::create_directories(folder / "base");
    const auto words = random_tensor({6, 4}, 2);
    write_values(folder / "base/model.safetensors",
        {{"lm_head.weight", random_tensor({6, 4}, 1)}, {"model.embed_tokens.weight", words},
            {"model.layers.0.q.weight", random_tensor({4, 4}, 3)}});
    write_text(
        folder / "base/config.json", R"({"model_type": "llama", "vocab_size": 6, "tie_word_embeddings": false})");
    auto tensors = factors("model.layers.0.q", 4, 4, 10);
    const auto head = random_tensor({8, 4}, 5), embedding = random_tensor({8, 4}, 6);
    tensors["model.embed_tokens.weight"] = embedding;
    tensors["lm_head.weight"] = head;
    write_adapter_as(folder / "grown", tensors);
    const auto of_head = factors("lm_head", 6, 4, 20);
    values_model plain = of_head;
    plain["model.embed_tokens.lora_embedding_A"] = random_tensor({2, 6}, 22);
    plain["model.embed_tokens.lora_embedding_B"] = random_tensor({4, 2}, 23);
    plain["model.embed_tokens.base_layer.weight"] = words; // as PEFT keeps it
    write_adapter_as(folder / "plain", plain);
    const auto first_rows = [](values_tensor x) {
        x.shape[0] = 6;
        x.values.resize(24);
        return x;
    };
    const auto changed_words = added(first_rows(embedding), plain.at("model.embed_tokens.lora_embedding_A"),
        plain.at("model.embed_tokens.lora_embedding_B"), 0.5, true);
    const auto changed_head =
        added(first_rows(head), plain.at("lm_head.lora_A.weight"), plain.at("lm_head.lora_B.weight"), 0.5);
    const auto line = [](const std::string& first, const std::string& second) {
        return std::vector<std::string>{
            "fuse", "--base", "base", "--adapter", first, "--adapter", second, "--out", "out", "--quiet"};
    };
    for (const bool turned : {false, true}) {
        const auto done = run(folder, turned ? line("grown", "plain") : line("plain", "grown"));
        REQUIRE_MESSAGE(done.code == 0, done.err);
        const auto found = read_values(folder / "out/model.safetensors");
        const auto is = [&](const std::string& name, const values_tensor& known, const values_tensor& whole) {
            auto expected = whole;
            std::copy(known.values.begin(), known.values.end(), expected.values.begin());
            CHECK(found.at(name).values == expected.values);
        };
        is("model.embed_tokens.weight", changed_words, embedding);
        is("lm_head.weight", changed_head, head);
    }
    const std::string both = "fold each adapter into the base by itself";
    tensors["model.embed_tokens.weight"] = random_tensor({8, 4}, 30);
    write_adapter_as(folder / "other", tensors);
    tensors["model.embed_tokens.weight"] = random_tensor({9, 4}, 31);
    tensors["lm_head.weight"] = random_tensor({9, 4}, 32);
    write_adapter_as(folder / "longer", tensors);
    tensors.erase("lm_head.weight");
    tensors["model.embed_tokens.weight"] = random_tensor({6, 4}, 33);
    write_adapter_as(folder / "saved", tensors);
    for (const std::string second : {"other", "longer", "saved"}) {
        CAPTURE(second);
        refused(folder, line("grown", second), 1, both);
        refused(folder, line(second, "grown"), 1, both);
    }
    refused(folder, line("grown", "grown"), 1, both); // its rows of the base were trained
    auto rescaled = of_head;
    rescaled["lm_head.lora_magnitude_vector"] = random_tensor({6}, 40);
    write_adapter_as(folder / "rescaled", rescaled, {{"use_dora", true}});
    refused(folder, line("rescaled", "grown"), 1, "whose norms are those of 6 rows");
    // What PEFT keeps of a vocabulary that was resized before training is one for all: nothing of it was trained.
    const auto base_head = read_values(folder / "base/model.safetensors").at("lm_head.weight");
    const auto resized = [](const values_tensor& x, unsigned seed) {
        auto made = random_tensor({8, 4}, seed);
        std::copy(x.values.begin(), x.values.end(), made.values.begin());
        return made;
    };
    const auto resized_words = resized(words, 50), resized_head = resized(base_head, 51);
    for (const std::string name : {"one", "two"}) {
        auto own = factors("model.layers.0.q", 4, 4, name == "one" ? 60 : 70);
        own["model.embed_tokens.weight"] = resized_words;
        own["lm_head.weight"] = resized_head;
        write_adapter_as(folder / name, own);
    }
    const auto done = run(folder, line("one", "two"));
    REQUIRE_MESSAGE(done.code == 0, done.err);
    const auto found = read_values(folder / "out/model.safetensors");
    CHECK(found.at("model.embed_tokens.weight").values == resized_words.values);
    CHECK(found.at("lm_head.weight").values == resized_head.values);
}

TEST_CASE("what an adapter calls otherwise than the base is left out by its own name")
{
    const scratch folder;
    const std::string module = "text_model.encoder.layers.0.mlp.fc1";
    const auto weight = random_tensor({6, 4}, 1);
    write_values(folder / "base.safetensors", {{module + ".weight", weight}});
    for (const bool kohya : {false, true}) {
        values_model tensors;
        const auto first = factors(module, 6, 4, 10), second = factors(module, 6, 4, 20);
        const auto add = [&](const values_model& pair, const std::string& component, const std::string& number) {
            const auto stem = kohya ? "lora_te" + number + "_text_model_encoder_layers_0_mlp_fc1" : component + module;
            tensors[stem + (kohya ? ".lora_down.weight" : ".lora_A.weight")] = pair.at(module + ".lora_A.weight");
            tensors[stem + (kohya ? ".lora_up.weight" : ".lora_B.weight")] = pair.at(module + ".lora_B.weight");
        };
        add(first, "text_encoder.", "1");
        add(second, "text_encoder_2.", "2");
        write_values(folder / "a.safetensors", tensors);
        std::vector<std::string> line{
            "fuse", "--base", "base.safetensors", "--adapter", "a.safetensors", "--out", "out.safetensors", "--quiet"};
        refused(folder, line, 1, "may both mean");
        for (const bool other : {false, true}) {
            auto excluding = line;
            excluding.insert(excluding.end(),
                {"--exclude",
                    kohya ? (other ? "^lora_te2_" : "^lora_te1_")
                          : (other ? "^text_encoder_2\\." : "^text_encoder\\.")});
            const auto done = run(folder, excluding);
            REQUIRE_MESSAGE(done.code == 0, done.err);
            const auto& kept = other ? first : second;
            CHECK(read_values(folder / "out.safetensors").at(module + ".weight").values
                == added(weight, kept.at(module + ".lora_A.weight"), kept.at(module + ".lora_B.weight"), 1).values);
        }
    }
}

TEST_CASE("one adapter with two namings is two adapters, which are written differently")
{
    const scratch folder;
    const auto base = two_layers();
    write_values(folder / "base.safetensors",
        {{"layers.0.weight", base.at("layers.1.weight")}, {"layers.1.weight", base.at("layers.1.weight")}});
    const auto pair = factors("layers.0", 20, 20, 10);
    write_adapter_as(folder / "a", pair);
    std::vector<std::string> line{"fuse", "--base", "base.safetensors", "--adapter", "a", "--adapter", "a", "--rename",
        R"(layers\.0=layers.1)", "--out", "out.safetensors"};
    refused(folder, line, 2, "write them differently, as 'a' and './a'");
    line[6] = "./a";
    const auto done = run(folder, line);
    REQUIRE_MESSAGE(done.code == 0, done.err);
    const auto changed =
        added(base.at("layers.1.weight"), pair.at("layers.0.lora_A.weight"), pair.at("layers.0.lora_B.weight"), 0.5);
    const auto found = read_values(folder / "out.safetensors");
    CHECK(found.at("layers.0.weight").values == changed.values);
    CHECK(found.at("layers.1.weight").values == changed.values);
}
