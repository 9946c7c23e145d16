// What dialects of adapters say beside their factors, and shapes that few of them have, against plain loops.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_files.hpp"

#include "../capture.hpp"

using namespace tools_test;

namespace {

/// Runs the tool, which has to succeed.
outcome must_run(const scratch& folder, const std::vector<std::string>& arguments)
{
    auto result = run(folder, arguments);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    return result;
}

values_model fused_model(const scratch& folder, const std::string& adapter)
{
    must_run(folder, {"fuse", "--base", "base.safetensors", "--adapter", adapter, "--out", "out.safetensors"});
    return read_values(folder / "out.safetensors");
}

/// Entry (i, j) of a matrix that a tensor is, its further sides counted as columns.
double entry(const values_tensor& x, std::size_t i, std::size_t j)
{
    return double{x.values[i * (x.values.size() / static_cast<std::size_t>(x.shape[0])) + j]};
}

/// Entries of `fused` are those of `base` and delta(index).
template <class Delta>
void check_changed(const values_tensor& fused, const values_tensor& base, const Delta& delta)
{
    REQUIRE(fused.shape == base.shape);
    for (std::size_t i = 0; i < base.values.size(); ++i) {
        CHECK(std::abs(double{fused.values[i]} - (double{base.values[i]} + delta(i))) < 1e-5);
    }
}

/// A Tucker product: Σ core[i, j, cell]·left[i, out]·right[j, in].
double tucker(const values_tensor& core, const values_tensor& left, const values_tensor& right, std::size_t out,
    std::size_t in, std::size_t cell, std::size_t cells)
{
    double sum = 0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(core.shape[0]); ++i) {
        for (std::size_t j = 0; j < static_cast<std::size_t>(core.shape[1]); ++j) {
            sum += entry(core, i, j * cells + cell) * entry(left, i, out) * entry(right, j, in);
        }
    }
    return sum;
}

values_tensor scaled(values_tensor x, float factor)
{
    for (auto& value : x.values) { value *= factor; }
    return x;
}

} // namespace

TEST_CASE("a file of diffusers has the alphas of the configurations in its header, and names of two kinds")
{
    const scratch folder;
    const std::string q = "down.0.attn1.to_q", t = "text_model.encoder.layers.0.self_attn.q_proj";
    const values_model base{{q + ".weight", random_tensor({8, 6}, 1)},
        {"conv_in.weight", random_tensor({4, 3, 3, 3}, 2)}, {t + ".weight", random_tensor({6, 6}, 3)}};
    write_values(folder / "base.safetensors", base);
    const auto qa = random_tensor({2, 6}, 4), qb = random_tensor({8, 2}, 5), ca = random_tensor({1, 3, 3, 3}, 6),
               cb = random_tensor({4, 1, 1, 1}, 7), ta = random_tensor({2, 6}, 8), tb = random_tensor({6, 2}, 9);
    const values_model tensors{{"unet." + q + ".lora.down.weight", qa}, {"unet." + q + ".lora.up.weight", qb},
        {"unet.conv_in.lora_A.weight", ca}, {"unet.conv_in.lora_B.weight", cb},
        {"text_encoder." + t + ".lora_linear_layer.down.weight", ta},
        {"text_encoder." + t + ".lora_linear_layer.up.weight", tb}};
    const nlohmann::json said{{"unet.r", 2}, {"unet.lora_alpha", 5}, {"unet.rank_pattern", {{"conv_in", 1}}},
        {"unet.alpha_pattern", {{"conv_in", 3}}}, {"text_encoder.r", 2}, {"text_encoder.lora_alpha", 8},
        {"text_encoder.use_rslora", false}};
    const auto write = [&](const nlohmann::json& header) {
        write_values(folder / "a.safetensors", tensors, {{"lora_adapter_metadata", header.dump()}});
    };
    write(said);
    auto expected = base;
    expected[q + ".weight"] = added(base.at(q + ".weight"), qa, qb, 2.5);
    expected["conv_in.weight"] = added(base.at("conv_in.weight"), ca, cb, 3);
    expected[t + ".weight"] = added(base.at(t + ".weight"), ta, tb, 4);
    CHECK(same(fused_model(folder, "a.safetensors"), expected));

    // What is written has the scaling in its up factors, for readers that know nothing of the header.
    must_run(folder, {"convert", "a.safetensors", "--as", "diffusers", "--out", "written"});
    const auto written = read_values(folder / "written/pytorch_lora_weights.safetensors");
    REQUIRE(written.size() == 6);
    CHECK(written.at("unet." + q + ".lora.down.weight").values == qa.values);
    CHECK(written.at("unet." + q + ".lora.up.weight").values == scaled(qb, 2.5f).values);
    CHECK(written.at("text_encoder." + t + ".lora_linear_layer.up.weight").values == scaled(tb, 4).values);
    CHECK(same(fused_model(folder, "written"), expected));
    const auto file = taskvec::open_model(folder / "written/pytorch_lora_weights.safetensors");
    const auto header = nlohmann::json::parse(file.metadata().at("lora_adapter_metadata"));
    CHECK(header["unet.r"] == 2);
    CHECK(header["unet.lora_alpha"] == 2);
    CHECK(header["unet.rank_pattern"]["conv_in"] == 1);
    CHECK(header["unet.alpha_pattern"]["conv_in"] == 1);
    CHECK(header["unet.use_dora"] == false);
    CHECK(header["unet.target_modules"] == nlohmann::json{"conv_in", q});
    // Some versions of transformers have no "text_model." before a text encoder's names.
    CHECK(header["text_encoder.target_modules"] == nlohmann::json{"encoder.layers.0.self_attn.q_proj"});

    // From PEFT's names: a text encoder is no UNet.
    write_adapter_as(folder / "encoder", {{t + ".lora_A.weight", ta}, {t + ".lora_B.weight", tb}}, {{"lora_alpha", 2}});
    must_run(folder, {"convert", "encoder", "--as", "diffusers", "--out", "encoder.safetensors"});
    CHECK(read_values(folder / "encoder.safetensors").contains("text_encoder." + t + ".lora_linear_layer.down.weight"));
    // From kohya's, whose components go over.
    const std::string underscored = "text_model_encoder_layers_0_self_attn_q_proj";
    write_values(folder / "te2.safetensors",
        {{"lora_te2_" + underscored + ".lora_down.weight", ta}, {"lora_te2_" + underscored + ".lora_up.weight", tb}});
    must_run(folder,
        {"convert", "te2.safetensors", "--as", "diffusers", "--base", "base.safetensors", "--out", "te2-diffusers"});
    CHECK(read_values(folder / "te2-diffusers/pytorch_lora_weights.safetensors")
            .contains("text_encoder_2." + t + ".lora_linear_layer.down.weight"));
    // The names of old: processors, and a text encoder's attention as a UNet's.
    write_values(folder / "old.safetensors",
        {{"unet.down.0.attn1.processor.to_q_lora.down.weight", qa},
            {"unet.down.0.attn1.processor.to_q_lora.up.weight", qb},
            {"text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight", ta},
            {"text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight", tb}});
    auto plain = base;
    plain[q + ".weight"] = added(base.at(q + ".weight"), qa, qb, 1);
    plain[t + ".weight"] = added(base.at(t + ".weight"), ta, tb, 1);
    CHECK(same(fused_model(folder, "old.safetensors"), plain));

    const auto no = [&](const std::string& words) {
        refused(folder,
            {"fuse", "--base", "base.safetensors", "--adapter", "a.safetensors", "--out", "no.safetensors", "--quiet"},
            1, words);
    };
    auto other = said;
    other["unet.r"] = 3;
    write(other);
    no("has rank 2 but lora_adapter_metadata says 3");
    other = said;
    other["unet.alpha_pattern"] = {{"no_such", 3}};
    write(other);
    no("has the key 'no_such'");
    other = said;
    other["unet.use_dora"] = true;
    write(other);
    no("lora_adapter_metadata says use_dora");
    write(nlohmann::json("text"));
    no("lora_adapter_metadata: is not a JSON object");
    // Two components of one base's name are not added up.
    write_values(folder / "a.safetensors",
        {{"text_encoder." + t + ".lora_A.weight", ta}, {"text_encoder." + t + ".lora_B.weight", tb},
            {"text_encoder_2." + t + ".lora_A.weight", ta}, {"text_encoder_2." + t + ".lora_B.weight", tb}});
    no("may both mean '" + t + ".weight'");
}

TEST_CASE("diffusers and MLX hold DoRA, by PEFT's name and as MODULE.m")
{
    const scratch folder;
    const values_model base{
        {"layers.0.q.weight", random_tensor({8, 6}, 1)}, {"layers.1.q.weight", random_tensor({5, 6}, 2)}};
    write_values(folder / "base.safetensors", base);
    auto tensors = factors("layers.0.q", 8, 6, 3);
    tensors.merge(factors("layers.1.q", 5, 6, 5));
    tensors["layers.0.q.lora_magnitude_vector"] = random_tensor({8}, 7);
    tensors["layers.1.q.lora_magnitude_vector"] = random_tensor({5}, 8);
    write_adapter_as(folder / "dora", tensors, {{"use_dora", true}});
    const auto whole = fused_model(folder, "dora");
    must_run(folder, {"convert", "dora", "--as", "mlx", "--out", "mlx"});
    CHECK(read_values(folder / "mlx/adapters.safetensors").at("layers.0.q.m").values
        == tensors.at("layers.0.q.lora_magnitude_vector").values);
    const auto config = nlohmann::json::parse(slurp(folder / "mlx/adapter_config.json"));
    CHECK(config["fine_tune_type"] == "dora");
    CHECK(config["num_layers"] == -1);
    CHECK(config["lora_parameters"]["keys"] == nlohmann::json{"q"});
    CHECK(config["model"] == "base");
    CHECK(same(fused_model(folder, "mlx"), whole));
    must_run(folder, {"convert", "dora", "--as", "diffusers", "--out", "diffusers"});
    CHECK(read_values(folder / "diffusers/pytorch_lora_weights.safetensors")
            .contains("unet.layers.0.q.lora_magnitude_vector"));
    CHECK(same(fused_model(folder, "diffusers"), whole));
    must_run(folder, {"convert", "mlx", "--as", "peft", "--out", "back"});
    const auto back = read_values(folder / "back/adapter_model.safetensors");
    for (const auto& [name, tensor] : tensors) { CHECK(back.at("base_model.model." + name).values == tensor.values); }
    // Of a kohya file some modules may lack one, which neither can say.
    must_run(folder, {"convert", "dora", "--as", "kohya", "--out", "some.safetensors"});
    auto some = read_values(folder / "some.safetensors");
    some.erase("lora_unet_layers_1_q.dora_scale");
    write_values(folder / "some.safetensors", some);
    for (const std::string as : {"mlx", "diffusers"}) {
        refused(folder, {"convert", "some.safetensors", "--as", as, "--base", "base.safetensors", "--out", "no"}, 1,
            "it has no magnitudes");
    }
}

TEST_CASE("an alpha may be stored as a whole number")
{
    const scratch folder;
    const auto up = scaled(random_tensor({4, 2}, 1), 1e-3f), down = random_tensor({2, 6}, 2);
    const values_model base{{"w.weight", random_tensor({4, 6}, 3)}};
    write_values(folder / "base.safetensors", base);
    const auto fuse = [&]<class N>(taskvec::dtype type, const taskvec::extents& shape, N alpha) {
        const N stored[2] = {alpha, alpha};
        taskvec::write_safetensors(folder / "a.safetensors",
            {{"lora_unet_w.lora_up.weight", {up.values.data(), taskvec::dtype::f32, up.shape}},
                {"lora_unet_w.lora_down.weight", {down.values.data(), taskvec::dtype::f32, down.shape}},
                {"lora_unet_w.alpha", {stored, type, shape}}});
        return std::vector<std::string>{
            "fuse", "--base", "base.safetensors", "--adapter", "a.safetensors", "--out", "out.safetensors"};
    };
    const auto scaled_by = [&](double scaling, const std::vector<std::string>& arguments) {
        must_run(folder, arguments);
        check_changed(read_values(folder / "out.safetensors").at("w.weight"), base.at("w.weight"), [&](std::size_t i) {
            const std::size_t row = i / 6, column = i % 6;
            return scaling * (entry(up, row, 0) * entry(down, 0, column) + entry(up, row, 1) * entry(down, 1, column));
        });
    };
    using taskvec::dtype;
    scaled_by(1.5, fuse(dtype::i8, {}, std::int8_t{3}));
    scaled_by(100, fuse(dtype::u8, {1}, std::uint8_t{200}));
    scaled_by(-1.5, fuse(dtype::i16, {1, 1}, std::int16_t{-3}));
    scaled_by(20000, fuse(dtype::u16, {}, std::uint16_t{40000}));
    scaled_by(-0.5, fuse(dtype::i32, {}, std::int32_t{-1}));
    scaled_by(1.5, fuse(dtype::u32, {}, std::uint32_t{3}));
    scaled_by(8, fuse(dtype::i64, {}, std::int64_t{16}));
    scaled_by(8, fuse(dtype::u64, {1}, std::uint64_t{16}));
    refused(folder, fuse(dtype::i64, {2}, std::int64_t{16}), 1, "no finite number");
    refused(folder, fuse(dtype::boolean, {}, std::uint8_t{1}), 1, "BOOL");
}

TEST_CASE("factors of a convolution are refused on another kernel with as many entries")
{
    const scratch folder;
    write_adapter_as(folder / "a",
        {{"conv.lora_A.weight", random_tensor({2, 3, 3, 1}, 1)},
            {"conv.lora_B.weight", random_tensor({4, 2, 1, 1}, 2)}});
    write_adapter_as(folder / "one",
        {{"conv.lora_A.weight", random_tensor({2, 9, 1, 1}, 1)},
            {"conv.lora_B.weight", random_tensor({4, 2, 1, 1}, 2)}});
    write_adapter_as(folder / "linear", factors("conv", 4, 9, 1));
    const auto fuse = [](const std::string& adapter) {
        return std::vector<std::string>{
            "fuse", "--base", "base.safetensors", "--adapter", adapter, "--out", "out.safetensors"};
    };
    for (const taskvec::extents& shape :
        std::vector<taskvec::extents>{{4, 3, 1, 3}, {4, 9, 1, 1}, {4, 9}, {4, 1, 3, 3}}) {
        write_values(folder / "base.safetensors", {{"conv.weight", random_tensor(shape, 3)}});
        refused(folder, fuse("a"), 1, "is of shape [4, 3, 3, 1]");
    }
    write_values(folder / "base.safetensors", {{"conv.weight", random_tensor({4, 3, 3, 1}, 3)}});
    must_run(folder, fuse("a"));
    refused(folder, fuse("one"), 1, "is of shape [4, 9, 1, 1]");
    refused(folder, fuse("linear"), 1, "is of shape [4, 9], a linear layer's");
    // A kernel of 1×1 and a linear layer are one matrix.
    for (const taskvec::extents& shape : std::vector<taskvec::extents>{{4, 9, 1, 1}, {4, 9}}) {
        write_values(folder / "base.safetensors", {{"conv.weight", random_tensor(shape, 3)}});
        must_run(folder, fuse("one"));
        must_run(folder, fuse("linear"));
    }
}

TEST_CASE("Tucker's forms of LoHa, LoKr and LoCon are folded as the products that they are")
{
    const scratch folder;
    const std::size_t in = 4, cells = 6;
    const values_model base{{"w.weight", random_tensor({6, 4, 3, 2}, 1)}};
    write_values(folder / "base.safetensors", base);
    const auto& weight = base.at("w.weight");
    const values_tensor alpha{taskvec::dtype::f32, {}, {3}};
    const auto place = [&](std::size_t index) {
        return std::array<std::size_t, 3>{index / (in * cells), index / cells % in, index % cells};
    };
    const auto t1 = random_tensor({2, 2, 3, 2}, 2), t2 = random_tensor({2, 2, 3, 2}, 3), w1a = random_tensor({2, 6}, 4),
               w1b = random_tensor({2, 4}, 5), w2a = random_tensor({2, 6}, 6), w2b = random_tensor({2, 4}, 7);
    values_model loha{{"lycoris_w.hada_w1_a", w1a}, {"lycoris_w.hada_w1_b", w1b}, {"lycoris_w.hada_w2_a", w2a},
        {"lycoris_w.hada_w2_b", w2b}, {"lycoris_w.hada_t1", t1}, {"lycoris_w.hada_t2", t2}, {"lycoris_w.alpha", alpha}};
    write_values(folder / "a.safetensors", loha);
    check_changed(fused_model(folder, "a.safetensors").at("w.weight"), weight, [&](std::size_t index) {
        const auto [o, i, cell] = place(index);
        return 1.5 * tucker(t1, w1a, w1b, o, i, cell, cells) * tucker(t2, w2a, w2b, o, i, cell, cells);
    });
    // Converted, it is a convolution's LoRA of the same update.
    must_run(folder, {"convert", "a.safetensors", "--as", "peft", "--base", "base.safetensors", "--out", "lora"});
    CHECK(read_values(folder / "lora/adapter_model.safetensors").at("base_model.model.w.lora_A.weight").shape
        == taskvec::extents{4, 4, 3, 2});
    check_changed(fused_model(folder, "lora").at("w.weight"), fused_model(folder, "a.safetensors").at("w.weight"),
        [](std::size_t) { return 0.0; });
    const auto no = [&](const std::string& words) {
        refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a.safetensors", "--out", "no.safetensors"},
            1, words);
    };
    loha["lycoris_w.dora_scale"] = random_tensor({6, 1, 1, 1}, 8);
    write_values(folder / "a.safetensors", loha);
    no("'lycoris_w.dora_scale' stands beside the factors of LoHa");
    loha.erase("lycoris_w.dora_scale");
    loha["lycoris_w.hada_t2"] = random_tensor({2, 3, 3, 2}, 3);
    write_values(folder / "a.safetensors", loha);
    no("'lycoris_w.hada_t2' has shape [2, 3, 3, 2]");
    loha.erase("lycoris_w.hada_t2");
    write_values(folder / "a.safetensors", loha);
    no("has hada_t1 but no hada_t2");

    const auto small = random_tensor({2, 2}, 9), left = random_tensor({2, 3}, 10), right = random_tensor({2, 2}, 11);
    values_model lokr{{"lycoris_w.lokr_w1", small}, {"lycoris_w.lokr_w2_a", left}, {"lycoris_w.lokr_w2_b", right},
        {"lycoris_w.lokr_t2", t1}, {"lycoris_w.alpha", alpha}};
    write_values(folder / "a.safetensors", lokr);
    check_changed(fused_model(folder, "a.safetensors").at("w.weight"), weight, [&](std::size_t index) {
        const auto [o, i, cell] = place(index);
        return 1.5 * entry(small, o / 3, i / 2) * tucker(t1, left, right, o % 3, i % 2, cell, cells);
    });

    const auto up = random_tensor({6, 2, 1, 1}, 12), down = random_tensor({3, 4, 1, 1}, 13),
               mid = random_tensor({2, 3, 3, 2}, 14);
    values_model locon{{"lora_unet_w.lora_up.weight", up}, {"lora_unet_w.lora_down.weight", down},
        {"lora_unet_w.lora_mid.weight", mid}, {"lora_unet_w.alpha", alpha}};
    write_values(folder / "a.safetensors", locon);
    check_changed(fused_model(folder, "a.safetensors").at("w.weight"), weight, [&](std::size_t index) {
        const auto [o, i, cell] = place(index);
        double sum = 0;
        for (std::size_t p = 0; p < 2; ++p) {
            for (std::size_t q = 0; q < 3; ++q) {
                sum += entry(up, o, p) * entry(mid, p, q * cells + cell) * entry(down, q, i);
            }
        }
        return 1.5 * sum;
    });
    locon["lora_unet_w.lora_down.weight"] = random_tensor({3, 4, 3, 2}, 13);
    write_values(folder / "a.safetensors", locon);
    no("only that has a kernel");

    // PEFT's order of a product over one side is not the weight's.
    write_values(folder / "base.safetensors", {{"w.weight", random_tensor({6, 4, 3}, 1)}});
    std::filesystem::remove(folder / "a.safetensors");
    write_adapter_as(folder / "a.safetensors",
        {{"w.lokr_w1", random_tensor({2, 2}, 2)}, {"w.lokr_w2", random_tensor({3, 2, 3}, 3)}},
        {{"peft_type", "LOKR"}, {"alpha", 2}});
    no("in another order");
}

TEST_CASE("MLX's embeddings are PEFT's, its layers and ranks are looked at, and experts are refused")
{
    const scratch folder;
    for (const std::int64_t rows : {11, 6}) { // of as many rows as columns it could be a linear layer's
        std::filesystem::remove_all(folder / "mlx");
        std::filesystem::remove_all(folder / "peft");
        std::filesystem::remove_all(folder / "back");
        const values_model base{{"model.embed_tokens.weight", random_tensor({rows, 6}, 1)}};
        write_values(folder / "base.safetensors", base);
        const auto a = random_tensor({rows, 2}, 2), b = random_tensor({2, 6}, 3);
        std::filesystem::create_directories(folder / "mlx");
        write_values(
            folder / "mlx/adapters.safetensors", {{"model.embed_tokens.lora_a", a}, {"model.embed_tokens.lora_b", b}});
        write_text(folder / "mlx/adapter_config.json",
            R"({"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {"rank": 2, "scale": 3.0}})");
        const auto fused = fused_model(folder, "mlx");
        check_changed(
            fused.at("model.embed_tokens.weight"), base.at("model.embed_tokens.weight"), [&](std::size_t index) {
                return 3
                    * (entry(a, index / 6, 0) * entry(b, 0, index % 6)
                        + entry(a, index / 6, 1) * entry(b, 1, index % 6));
            });
        must_run(folder, {"convert", "mlx", "--as", "peft", "--out", "peft"});
        const auto peft = read_values(folder / "peft/adapter_model.safetensors");
        REQUIRE(peft.contains("base_model.model.model.embed_tokens.lora_embedding_A"));
        CHECK(peft.at("base_model.model.model.embed_tokens.lora_embedding_A").shape == taskvec::extents{2, rows});
        CHECK(peft.at("base_model.model.model.embed_tokens.lora_embedding_B").shape == taskvec::extents{6, 2});
        CHECK(same(fused_model(folder, "peft"), fused));
        must_run(folder, {"convert", "peft", "--as", "mlx", "--out", "back"});
        const auto back = read_values(folder / "back/adapters.safetensors");
        CHECK(back.at("model.embed_tokens.lora_a").values == a.values);
        CHECK(back.at("model.embed_tokens.lora_b").values == b.values);
        CHECK(nlohmann::json::parse(slurp(folder / "back/adapter_config.json"))["lora_parameters"]["keys"]
            == nlohmann::json{"model.embed_tokens"});
    }

    const std::string first = "model.layers.0.q", last = "model.layers.3.q";
    write_values(folder / "base.safetensors",
        {{first + ".weight", random_tensor({5, 6}, 1)}, {last + ".weight", random_tensor({5, 6}, 2)}});
    auto tensors = factors(first, 5, 6, 10, 3);
    tensors.merge(factors(last, 5, 6, 20, 2));
    write_adapter_as(folder / "ranks", tensors, {{"rank_pattern", {{first, 3}}}, {"alpha_pattern", {{first, 1.5}}}});
    const auto whole = fused_model(folder, "ranks");
    must_run(folder, {"convert", "ranks", "--as", "mlx", "--out", "mlx"});
    const auto written = read_values(folder / "mlx/adapters.safetensors");
    CHECK(written.at(last + ".lora_a").shape == taskvec::extents{6, 3}); // filled up with zeros
    CHECK(written.at(last + ".lora_b").shape == taskvec::extents{3, 5});
    CHECK(same(fused_model(folder, "mlx"), whole));
    const auto configured = [&](const std::string& text) { write_text(folder / "mlx/adapter_config.json", text); };
    configured(R"({"num_layers": 4, "lora_parameters": {"rank": 8, "scale": 0.5}})");
    const auto noted =
        must_run(folder, {"fuse", "--base", "base.safetensors", "--adapter", "mlx", "--out", "out.safetensors"});
    CHECK(noted.err.find("2 of 2 modules of another rank than the 8") != std::string::npos);
    CHECK(same(read_values(folder / "out.safetensors"), whole));
    const auto no = [&](const std::string& words) {
        refused(
            folder, {"fuse", "--base", "base.safetensors", "--adapter", "mlx", "--out", "no.safetensors"}, 1, words);
    };
    configured(R"({"num_layers": 3, "lora_parameters": {"rank": 3, "scale": 0.5}})");
    no("num_layers is 3, and the adapter has modules of layers 0 to 3");
    configured(R"({"num_layers": "all", "lora_parameters": {"rank": 3, "scale": 0.5}})");
    no("num_layers is \"all\"");
    configured(R"({"lora_parameters": {"rank": 2, "scale": 1.0}})");
    write_values(folder / "mlx/adapters.safetensors",
        {{first + ".lora_a", random_tensor({4, 2, 6}, 1)}, {first + ".lora_b", random_tensor({4, 5, 2}, 2)}});
    no("updates of experts");
}

TEST_CASE("what MLX's configuration says of layers and keys is held against the file and the base")
{
    const scratch folder;
    values_model base, tensors;
    for (unsigned layer = 0; layer < 4; ++layer) {
        const auto name = "model.layers." + std::to_string(layer) + ".";
        base[name + "q.weight"] = random_tensor({5, 6}, layer);
        base[name + "v.weight"] = random_tensor({5, 6}, 10 + layer);
        if (layer < 2) { continue; }
        tensors[name + "q.lora_a"] = random_tensor({6, 2}, 20 + layer);
        tensors[name + "q.lora_b"] = random_tensor({2, 5}, 30 + layer);
    }
    write_values(folder / "base.safetensors", base);
    std::filesystem::create_directories(folder / "mlx");
    write_values(folder / "mlx/adapters.safetensors", tensors);
    const auto configured = [&](const std::string& layers, const std::string& keys) {
        write_text(folder / "mlx/adapter_config.json",
            "{\"num_layers\": " + layers + ", \"lora_parameters\": {\"rank\": 2, \"scale\": 3.0" + keys + "}}");
    };
    const auto no = [&](const std::string& words) {
        refused(
            folder, {"fuse", "--base", "base.safetensors", "--adapter", "mlx", "--out", "no.safetensors"}, 1, words);
        refused(folder,
            {"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task-adapter", "mlx", "--out",
                "no.safetensors"},
            1, words);
    };
    for (const std::string layers : {"2", "3", "4", "-1"}) {
        for (const std::string keys : {"", R"(, "keys": null)", R"(, "keys": ["q"])"}) {
            configured(layers, keys);
            const auto fused = fused_model(folder, "mlx");
            CHECK(fused.at("model.layers.1.q.weight").values == base.at("model.layers.1.q.weight").values);
            const auto &a = tensors.at("model.layers.3.q.lora_a"), &b = tensors.at("model.layers.3.q.lora_b");
            check_changed(
                fused.at("model.layers.3.q.weight"), base.at("model.layers.3.q.weight"), [&](std::size_t index) {
                    return 3
                        * (entry(a, index % 6, 0) * entry(b, 0, index / 6)
                            + entry(a, index % 6, 1) * entry(b, 1, index / 6));
                });
        }
    }
    configured("5", "");
    no("num_layers is 5, and 'base.safetensors' has 4 layers");
    configured("2", R"(, "keys": ["v"])");
    no("lora_parameters.keys does not name 'q', and the adapter has factors of 'model.layers.2.q'");
    configured("2", R"(, "keys": "q")");
    no("lora_parameters.keys is \"q\"; expected a list of names");
    configured("2", R"(, "keys": ["q", "v"])");
    const auto lacking =
        run(folder, {"fuse", "--base", "base.safetensors", "--adapter", "mlx", "--out", "no.safetensors"});
    CHECK(lacking.code == 1);
    CHECK(lacking.err.find("lora_parameters.keys names 'v', which 'base.safetensors' has as 'model.layers.2.v'")
        != std::string::npos);
    // A name that the base does not have where MLX looks says nothing; without a base it is noted.
    configured("2", R"(, "keys": ["q", "mlp.experts"])");
    CHECK(fused_model(folder, "mlx").size() == 8);
    const auto noted = must_run(folder, {"convert", "mlx", "--as", "peft", "--out", "peft"});
    CHECK(noted.err.find("has no factors of 'mlp.experts'") != std::string::npos);
    // The file alone cannot tell that its layers are not the last ones; the base can.
    values_model early;
    for (const auto& [name, tensor] : tensors) {
        auto other = name;
        other[13] = name[13] == '2' ? '0' : '1';
        early[other] = tensor;
    }
    write_values(folder / "mlx/adapters.safetensors", early);
    configured("2", "");
    must_run(folder, {"convert", "mlx", "--as", "peft", "--out", "peft"});
    no("num_layers is 2, and the adapter has factors of 'model.layers.0.q': MLX applies those of the last 2 of the 4 "
       "layers");
    // Of the layers in a file the configuration counts those that are the model's.
    std::filesystem::create_directories(folder / "base");
    write_values(folder / "base/model.safetensors", base);
    const auto fuse = [&](const std::string& counted) {
        write_text(folder / "base/config.json", "{\"model_type\": \"llama\", \"num_hidden_layers\": " + counted + "}");
        return run(folder, {"fuse", "--base", "base", "--adapter", "mlx", "--out", "fused"}).code;
    };
    CHECK(fuse("2") == 0);
    CHECK(fuse("3") == 1);
}

TEST_CASE("experts that PEFT adapts as one parameter are folded, however the base stores them")
{
    const scratch folder;
    constexpr std::size_t experts = 3, rank = 2;
    constexpr std::size_t hidden = 4;
    for (const std::size_t inner : {3u, 4u, 2u}) { // down_proj is square in the second, gate_up_proj in the third
        CAPTURE(inner);
        const auto n = [](std::size_t x) { return static_cast<std::int64_t>(x); };
        const std::string owner = "layers.0.mlp.experts";
        const values_model tensors{
            {"model." + owner + ".base_layer.lora_A.weight", random_tensor({n(experts * rank), n(hidden)}, 1)},
            {"model." + owner + ".base_layer.lora_B.weight", random_tensor({n(2 * inner), n(experts * rank)}, 2)},
            {"model." + owner + ".lora_A.weight", random_tensor({n(experts * 3), n(inner)}, 3)},
            {"model." + owner + ".lora_B.weight", random_tensor({n(hidden), n(experts * 3)}, 4)}};
        const nlohmann::json config{{"lora_alpha", 6},
            {"target_parameters", {"mlp.experts.down_proj", "experts.gate_up_proj"}},
            {"rank_pattern", {{"experts.down_proj", 3}}}, {"alpha_pattern", {{"down_proj", 1.5}}}};
        write_adapter_as(folder / "a", tensors, config);
        /// Entry (o, i) of expert e's update: lora_A has the experts one below the other, lora_B's columns alternate.
        const auto update = [&](bool both, std::size_t e, std::size_t o, std::size_t i) {
            const auto stem = "model." + owner + (both ? ".base_layer" : "");
            const auto &a = tensors.at(stem + ".lora_A.weight"), &b = tensors.at(stem + ".lora_B.weight");
            double sum = 0;
            for (std::size_t k = 0; k < (both ? rank : 3); ++k) {
                sum += entry(b, o, k * experts + e) * entry(a, e * (both ? rank : 3) + k, i);
            }
            return (both ? 3.0 : 0.5) * sum;
        };
        const auto both = random_tensor({n(experts), n(2 * inner), n(hidden)}, 5),
                   down = random_tensor({n(experts), n(hidden), n(inner)}, 6);
        const auto turned = [&](const values_tensor& x) {
            values_tensor y{x.dtype, {x.shape[0], x.shape[2], x.shape[1]}, x.values};
            const auto rows = static_cast<std::size_t>(x.shape[1]), columns = static_cast<std::size_t>(x.shape[2]);
            for (std::size_t i = 0; i < x.values.size(); ++i) {
                const auto e = i / (rows * columns), row = i / columns % rows, column = i % columns;
                y.values[(e * columns + column) * rows + row] = x.values[i];
            }
            return y;
        };
        /// One matrix of a stack.
        const auto slice = [&](const values_tensor& x, std::size_t e, std::size_t first, std::size_t rows) {
            const auto columns = static_cast<std::size_t>(x.shape[2]);
            const auto at = x.values.begin()
                + static_cast<std::ptrdiff_t>((e * static_cast<std::size_t>(x.shape[1]) + first) * columns);
            return values_tensor{
                x.dtype, {n(rows), n(columns)}, {at, at + static_cast<std::ptrdiff_t>(rows * columns)}};
        };
        // As they are in memory, and lie out×in.
        write_values(folder / "base.safetensors",
            {{owner + ".gate_up_proj", both}, {owner + ".down_proj", down}, {"norm.weight", random_tensor({4}, 7)}});
        const auto plain = fused_model(folder, "a");
        const auto &fused_both = plain.at(owner + ".gate_up_proj"), &fused_down = plain.at(owner + ".down_proj");
        check_changed(fused_both, both, [&](std::size_t i) {
            return update(true, i / (2 * inner * hidden), i / hidden % (2 * inner), i % hidden);
        });
        check_changed(fused_down, down,
            [&](std::size_t i) { return update(false, i / (hidden * inner), i / inner % hidden, i % inner); });
        // As a task, read a piece at a time.
        must_run(folder,
            {"merge", "--method", "task-arithmetic", "--lambda", "1", "--base", "base.safetensors", "--task-adapter",
                "a", "--out", "merged.safetensors"});
        check_changed(read_values(folder / "merged.safetensors").at(owner + ".gate_up_proj"), fused_both,
            [](std::size_t) { return 0.0; });
        // in×out, as gpt-oss and Llama 4 have them: the same numbers.
        write_values(folder / "base.safetensors",
            {{owner + ".gate_up_proj", turned(both)}, {owner + ".down_proj", turned(down)}});
        const auto other = fused_model(folder, "a");
        check_changed(turned(other.at(owner + ".gate_up_proj")), fused_both, [](std::size_t) { return 0.0; });
        check_changed(turned(other.at(owner + ".down_proj")), fused_down, [](std::size_t) { return 0.0; });
        // A weight for each expert, as files of most models have it: the same bits.
        for (const bool mixtral : {false, true}) {
            const std::string stem = mixtral ? "layers.0.block_sparse_moe.experts." : owner + ".";
            const auto name = [&](std::size_t e, const std::string& word) {
                return stem + std::to_string(e) + "." + word + ".weight";
            };
            values_model base;
            for (std::size_t e = 0; e < experts; ++e) {
                base[name(e, mixtral ? "w1" : "gate_proj")] = slice(both, e, 0, inner);
                base[name(e, mixtral ? "w3" : "up_proj")] = slice(both, e, inner, inner);
                base[name(e, mixtral ? "w2" : "down_proj")] = slice(down, e, 0, hidden);
            }
            write_values(folder / "base.safetensors", base);
            const auto split = fused_model(folder, "a");
            for (std::size_t e = 0; e < experts; ++e) {
                CHECK(split.at(name(e, mixtral ? "w1" : "gate_proj")).values == slice(fused_both, e, 0, inner).values);
                CHECK(
                    split.at(name(e, mixtral ? "w3" : "up_proj")).values == slice(fused_both, e, inner, inner).values);
                CHECK(split.at(name(e, mixtral ? "w2" : "down_proj")).values == slice(fused_down, e, 0, hidden).values);
            }
            const auto no_base = [&](const std::string& words) {
                refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "no.safetensors"}, 1,
                    words);
            };
            base[name(experts, mixtral ? "w2" : "down_proj")] = slice(down, 0, 0, hidden);
            write_values(folder / "base.safetensors", base);
            no_base("is of 3 experts, and the base has more");
        }
        // The router beside them, which Mixtral's files have elsewhere.
        for (const std::string owner_of_router : {"layers.0.mlp.", "layers.0.block_sparse_moe."}) {
            const auto router = owner_of_router + "gate.weight";
            values_model base{{router, random_tensor({n(experts), n(hidden)}, 8)},
                {owner_of_router + "experts.0.w1.weight", slice(both, 0, 0, inner)}};
            write_values(folder / "base.safetensors", base);
            const auto pair = factors("model.layers.0.mlp.gate", n(experts), n(hidden), 9);
            write_adapter_as(folder / "router", pair, {{"target_parameters", {"mlp.gate.weight"}}});
            base[router] = added(base.at(router), pair.at("model.layers.0.mlp.gate.lora_A.weight"),
                pair.at("model.layers.0.mlp.gate.lora_B.weight"), 0.5);
            CHECK(same(fused_model(folder, "router"), base));
        }
        // Other dialects have no such parameters; a base that has a weight for each expert gives them names.
        refused(folder, {"convert", "a", "--as", "mlx", "--out", "no"}, 1, "experts that are the parameter");
        must_run(folder, {"inspect", "a"});
    }
    const auto no = [&](const std::string& words) {
        refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "no.safetensors"}, 1, words);
    };
    const std::string module = "layers.0.mlp.experts";
    write_values(folder / "base.safetensors",
        {{module + ".gate_up_proj", random_tensor({3, 6, 4}, 1)},
            {module + ".down_proj", random_tensor({3, 4, 3}, 2)}});
    const auto of_down = factors(module, 4, 3, 5, 6);
    write_adapter_as(folder / "a", of_down, {{"target_parameters", {"experts.down_proj"}}});
    CHECK(fused_model(folder, "a").at(module + ".gate_up_proj").values
        == read_values(folder / "base.safetensors").at(module + ".gate_up_proj").values);
    must_run(
        folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--subtract", "--out", "less.safetensors"});
    write_adapter_as(folder / "a", of_down, {{"r", 4}, {"target_parameters", {"experts.down_proj"}}});
    no("have rank 6 in all, and adapter_config.json says 4 of each matrix");
    write_adapter_as(folder / "a", of_down, {{"r", 3}, {"target_parameters", {"experts.down_proj"}}});
    no("changes 2 matrices of it");
    write_adapter_as(folder / "a", of_down, {{"target_parameters", {"experts.down_proj", "experts.gate_up_proj"}}});
    no("has no factors 'layers.0.mlp.experts.base_layer.lora_A'");
    write_adapter_as(folder / "a", of_down, {{"target_parameters", {"experts.down_proj", "experts.bias"}}});
    no("which factors are whose is not known");
    write_adapter_as(folder / "a", of_down, {{"target_parameters", {"experts.up_proj"}}});
    no("module 'layers.0.mlp.experts.up_proj' of 'a' is no module of 'base.safetensors'");
    write_adapter_as(folder / "a", of_down, {{"target_parameters", "experts.down_proj"}});
    no("expected names of parameters");
    auto rescaled = of_down;
    rescaled[module + ".lora_magnitude_vector"] = random_tensor({4}, 9);
    write_adapter_as(folder / "a", rescaled, {{"target_parameters", {"experts.down_proj"}}, {"use_dora", true}});
    no("has factors of another kind than those of plain LoRA");
    write_adapter_as(folder / "a", of_down, {{"target_parameters", {"experts.down_proj"}}});
    refused(folder, {"merge-lora", "--adapter", "a", "--adapter", "a", "--out", "no"}, 1, "taskvec fuse");
}

TEST_CASE("a GGUF adapter with another magic or version is refused for that, in every verb")
{
    const scratch folder;
    write_text(folder / "base/config.json", R"({"architectures":["Qwen2ForCausalLM"]})");
    const std::string module = "model.layers.0.mlp.up_proj";
    write_values(folder / "base/model.safetensors", {{module + ".weight", random_tensor({8, 6}, 1)}});
    write_adapter_as(folder / "a", factors(module, 8, 6, 2));
    must_run(folder, {"convert", "a", "--as", "gguf", "--out", "a.gguf"});
    const auto sound = slurp(folder / "a.gguf");
    const auto attempt = [&](std::size_t at, const std::string& bytes, const std::string& words) {
        auto damaged = sound;
        damaged.replace(at, bytes.size(), bytes);
        write_text(folder / "b.gguf", damaged);
        refused(folder, {"fuse", "--base", "base", "--adapter", "b.gguf", "--out", "no"}, 1, words);
        refused(folder, {"convert", "b.gguf", "--as", "peft", "--out", "no"}, 1, words);
        refused(folder, {"inspect", "b.gguf"}, 1, words);
    };
    attempt(0, "GGUX", "does not begin with 'GGUF', the magic of GGUF files, but with 'GGUX'");
    attempt(0, std::string(4, '\1'), "but with the bytes 01 01 01 01");
    attempt(0, "FUGG", "another order of bytes");
    attempt(4, std::string(1, '\x63'), "is GGUF of version 99");
    attempt(4, std::string(1, '\1'), "is GGUF of version 1;");
}

TEST_CASE("convert names the base and the task for AutoPeftModel, and inspect says what each dialect would lose")
{
    const scratch folder;
    auto tensors = factors("layers.0.q", 8, 6, 3);
    write_adapter_as(folder / "a", tensors);
    auto result = must_run(folder,
        {"convert", "a", "--as", "peft", "--task-type", "CAUSAL_LM", "--base-name", "me/model", "--out", "named"});
    CHECK(result.err.find("AutoPeftModel") == std::string::npos);
    auto config = nlohmann::json::parse(slurp(folder / "named/adapter_config.json"));
    CHECK(config["task_type"] == "CAUSAL_LM");
    CHECK(config["base_model_name_or_path"] == "me/model");
    must_run(folder, {"convert", "named", "--as", "peft", "--out", "kept"}); // and they stay
    config = nlohmann::json::parse(slurp(folder / "kept/adapter_config.json"));
    CHECK(config["task_type"] == "CAUSAL_LM");
    CHECK(config["base_model_name_or_path"] == "me/model");
    result = must_run(folder, {"convert", "a", "--as", "peft", "--out", "plain"});
    CHECK(result.err.find("names no task type, by which AutoPeftModel loads it: --task-type gives it")
        != std::string::npos);
    refused(folder, {"convert", "a", "--as", "kohya", "--task-type", "CAUSAL_LM", "--out", "no"}, 2, "--task-type");
    refused(folder, {"convert", "a", "--as", "gguf", "--base-name", "x", "--out", "no"}, 2, "--base-name");
    refused(
        folder, {"convert", "a", "--as", "peft", "--task-type", "POETRY", "--out", "no"}, 2, "'POETRY' is not one of");
    CHECK(run(folder, {"convert", "--help"}).out.find("SEQ_2_SEQ_LM") != std::string::npos);
    // LoKr is another kind of configuration, and what both say stays.
    write_adapter_as(folder / "lokr",
        {{"w.lokr_w1", random_tensor({2, 2}, 2)}, {"w.lokr_w2", random_tensor({3, 4}, 3)}},
        {{"peft_type", "LOKR"}, {"alpha", 2}, {"task_type", "SEQ_CLS"}});
    must_run(folder, {"convert", "lokr", "--as", "peft", "--out", "lokr-lora"});
    config = nlohmann::json::parse(slurp(folder / "lokr-lora/adapter_config.json"));
    CHECK(config["task_type"] == "SEQ_CLS");
    CHECK(config["base_model_name_or_path"] == "base");
    CHECK(config["peft_type"] == "LORA");

    tensors["table.embed_tokens.lora_embedding_A"] = random_tensor({2, 7}, 8);
    tensors["table.embed_tokens.lora_embedding_B"] = random_tensor({6, 2}, 9);
    tensors["conv.lora_A.weight"] = random_tensor({2, 3, 3, 3}, 10);
    tensors["conv.lora_B.weight"] = random_tensor({4, 2, 1, 1}, 11);
    write_adapter_as(folder / "mixed", tensors);
    const auto shown = must_run(folder, {"inspect", "mixed"}).out;
    CHECK(shown.find("as kohya: 1 loss: module 'table.embed_tokens': it is an embedding") != std::string::npos);
    CHECK(shown.find("as MLX: 1 loss: module 'conv': it is a convolution") != std::string::npos);
    const auto json = nlohmann::json::parse(must_run(folder, {"inspect", "mixed", "--json"}).out);
    CHECK(json["not_held"]["diffusers"][0]["what"] == "module 'table.embed_tokens'");
    CHECK(json["not_held"]["MLX"].size() == 1);
    CHECK(!json["not_held"].contains("PEFT"));
    const auto held = nlohmann::json::parse(must_run(folder, {"inspect", "a", "--json"}).out)["not_held"];
    CHECK(held["kohya"].empty());
    CHECK(must_run(folder, {"inspect", "a"}).out.find("as kohya: nothing is lost") != std::string::npos);
}

TEST_CASE("convert keeps trained biases where PEFT looks for them")
{
    const scratch folder;
    auto tensors = factors("q", 6, 6, 1);
    tensors["q.base_layer.bias"] = random_tensor({6}, 3);
    tensors["k.bias"] = random_tensor({5}, 4); // of a layer that has no factors
    write_adapter_as(folder / "a", tensors, {{"bias", "all"}});
    must_run(folder, {"convert", "a", "--as", "peft", "--out", "c"});
    const auto found = read_values(folder / "c/adapter_model.safetensors");
    REQUIRE(found.size() == tensors.size());
    for (const auto& [name, x] : tensors) {
        CAPTURE_BOUND(name);
        REQUIRE(found.contains("base_model.model." + name));
        CHECK(found.at("base_model.model." + name).values == x.values);
    }
    CHECK(nlohmann::json::parse(slurp(folder / "c/adapter_config.json"))["bias"] == "all");
}

TEST_CASE("MLX's scale is a number that is there, and its fine_tune_type what the file holds")
{
    const scratch folder;
    const std::string q = "model.layers.0.q";
    const auto base = random_tensor({5, 6}, 1), a = random_tensor({6, 2}, 2), b = random_tensor({2, 5}, 3);
    write_values(folder / "base.safetensors", {{q + ".weight", base}});
    std::filesystem::create_directories(folder / "m");
    const auto attempt = [&](const std::string& config, const values_model& more, const std::string& part) {
        values_model tensors{{q + ".lora_a", a}, {q + ".lora_b", b}};
        tensors.insert(more.begin(), more.end());
        write_values(folder / "m/adapters.safetensors", tensors);
        write_text(folder / "m/adapter_config.json", config);
        refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "m", "--out", "out.safetensors"}, 1, part);
    };
    attempt(
        R"({"lora_parameters": {"rank": 2, "scale": "10"}})", {}, "lora_parameters.scale is \"10\"; expected a number");
    attempt(R"({"lora_parameters": {"rank": 2, "dropout": 0.0}})", {}, "has no lora_parameters.scale");
    attempt(R"({"num_layers": 1})", {}, "has no lora_parameters.scale");
    const values_model magnitudes{{q + ".m", random_tensor({5}, 4)}};
    attempt(R"({"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 3.0}})", magnitudes,
        "has magnitudes ('" + q + ".m'), but adapter_config.json says fine_tune_type \"lora\"");
    attempt(R"({"fine_tune_type": "full"})", {}, "has factors, but adapter_config.json says fine_tune_type \"full\"");
    write_values(folder / "m/adapters.safetensors", {{q + ".weight", random_tensor({5, 6}, 5)}});
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "m", "--out", "out.safetensors"}, 1,
        "as adapter_config.json says (fine_tune_type full)");
    // The tensors alone say no scale.
    write_values(folder / "alone.safetensors", {{q + ".lora_a", a}, {q + ".lora_b", b}});
    const auto alone = must_run(
        folder, {"fuse", "--base", "base.safetensors", "--adapter", "alone.safetensors", "--out", "out.safetensors"});
    CHECK(alone.err.find("the scale is taken to be 1, and mlx_lm trains with 20") != std::string::npos);
    check_changed(read_values(folder / "out.safetensors").at(q + ".weight"), base, [&](std::size_t index) {
        return entry(a, index % 6, 0) * entry(b, 0, index / 6) + entry(a, index % 6, 1) * entry(b, 1, index / 6);
    });
}

TEST_CASE("what PEFT's configuration leaves out of the modules of a file changes nothing")
{
    const scratch folder;
    const std::vector<std::string> modules{"model.layers.0.q", "model.layers.1.k", "model.layers.1.q"};
    values_model base, tensors;
    unsigned seed = 1;
    for (const auto& module : modules) {
        base[module + ".weight"] = random_tensor({6, 6}, seed++);
        tensors.merge(factors(module, 6, 6, 10 * seed));
    }
    write_values(folder / "base.safetensors", base);
    const std::vector<std::string> line{
        "fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "out.safetensors"};
    const auto left = [&](const std::string& config) { // modules that stay as the base has them
        write_adapter_as(folder / "a", tensors, nlohmann::json::parse(config));
        const auto result = must_run(folder, line);
        std::vector<std::string> names;
        for (const auto& [name, x] : read_values(folder / "out.safetensors")) {
            if (x.values == base.at(name).values) { names.push_back(name.substr(0, name.size() - 7)); }
        }
        CHECK((result.err.find("factors of " + std::to_string(names.size()) + " of 3 modules in 'a'")
                  != std::string::npos)
            == !names.empty());
        return names;
    };
    using list = std::vector<std::string>;
    CHECK(left(R"({})").empty());
    CHECK(left(R"({"target_modules": ["q", "k"]})").empty());
    CHECK(left(R"({"target_modules": "all-linear"})").empty());
    CHECK(left(R"({"target_modules": ["q"]})") == list{"model.layers.1.k"});
    CHECK(left(R"({"target_modules": ["model.layers.0.q", "k"]})") == list{"model.layers.1.q"});
    CHECK(left(R"({"target_modules": ".*\\.q"})") == list{"model.layers.1.k"});
    CHECK(left(R"({"target_modules": "q"})").empty()); // names none of them: another model's names
    // Expressions of Python's that others know otherwise, or not at all.
    CHECK(left(R"({"target_modules": ".*(?<!layers\\.0)\\.q"})") == list{"model.layers.0.q", "model.layers.1.k"});
    CHECK(left(R"({"target_modules": "(?i:.*\\.Q)\\Z"})") == list{"model.layers.1.k"});
    CHECK(left(R"({"target_modules": "(?P<all>.*)\\.[]q]"})") == list{"model.layers.1.k"});
    CHECK(left(R"({"target_modules": ["q", "k"], "exclude_modules": ".*\\.\\d{,1}\\.(?#of all)k"})")
        == list{"model.layers.1.k"});
    CHECK(left(R"({"target_modules": ["q", "k"], "exclude_modules": ["layers.1.q"]})") == list{"model.layers.1.q"});
    CHECK(left(R"({"target_modules": ["q", "k"], "exclude_modules": "model\\.layers\\.1.*"})")
        == list{"model.layers.1.k", "model.layers.1.q"});
    CHECK(left(R"({"target_modules": ["q", "k"], "layers_to_transform": 0})")
        == list{"model.layers.1.k", "model.layers.1.q"});
    CHECK(left(R"({"target_modules": ["q", "k"], "layers_to_transform": [1], "layers_pattern": "layers"})")
        == list{"model.layers.0.q"});
    // A module that is named whole is one of them, whatever its layer.
    CHECK(left(R"({"target_modules": ["model.layers.0.q", "k"], "layers_to_transform": [1]})")
        == list{"model.layers.1.q"});
    write_adapter_as(folder / "a", tensors,
        nlohmann::json::parse(R"({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["h"]})"));
    std::filesystem::remove(folder / "out.safetensors");
    auto quiet = line;
    quiet.push_back("--quiet");
    refused(folder, quiet, 1, "no module of the adapters is left");
    const auto merge = [](const std::string& out) {
        return std::vector<std::string>{"merge-lora", "--adapter", "a", "--out", out};
    };
    for (const auto& [config, words] :
        {std::pair(R"({"target_modules": "(.)\\1.*"})", "target_modules is '(.)\\1.*': it has a back-reference"),
            std::pair(R"({"exclude_modules": "(?>.*)q"})", "exclude_modules is '(?>.*)q': it has an atomic group"),
            std::pair(
                R"({"exclude_modules": "*"})", "no regular expression to Python: it repeats nothing; write the list"),
            std::pair(R"x({"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "(h|layers)"})x",
                "layers_pattern is '(h|layers)'")}) {
        write_adapter_as(folder / "b", tensors, nlohmann::json::parse(config));
        auto other = quiet;
        other[4] = "b";
        refused(folder, other, 1, words);
        auto merged = merge("merged");
        merged[2] = "b";
        refused(folder, merged, 1, words);
    }
    // Merges of adapters take no other ones than folding does.
    refused(folder, merge("merged"), 1, "factors of no module that adapter_config.json does not leave out");
    write_adapter_as(folder / "a", tensors,
        nlohmann::json::parse(R"({"target_modules": ["q", "k"], "exclude_modules": ["layers.1.q"]})"));
    const auto merged = must_run(folder, {"merge-lora", "--adapter", "a", "--out", "merged"});
    CHECK(merged.err.find("factors of 1 of 3 modules in 'a' ('model.layers.1.q') are left out") != std::string::npos);
    const auto kept = read_values(folder / "merged/adapter_model.safetensors");
    CHECK(kept.size() == 4);
    CHECK(kept.contains("base_model.model.model.layers.0.q.lora_A.weight"));
    CHECK(kept.contains("base_model.model.model.layers.1.k.lora_A.weight"));
}

TEST_CASE("keys of alpha_pattern are Python's expressions")
{
    const scratch folder;
    const std::string q = "layers.1.q_proj", mlp = "layers.0.mlp";
    const values_model base{{q + ".weight", random_tensor({6, 6}, 1)}, {mlp + ".weight", random_tensor({6, 6}, 2)}};
    write_values(folder / "base.safetensors", base);
    auto tensors = factors(q, 6, 6, 3);
    tensors.merge(factors(mlp, 6, 6, 5));
    const auto scaling = [&](const std::string& module) {
        const auto& a = tensors.at(module + ".lora_A.weight");
        const auto& b = tensors.at(module + ".lora_B.weight");
        const auto fused = read_values(folder / "out.safetensors").at(module + ".weight");
        for (const double alpha : {1.0, 8.0}) {
            if (fused.values == added(base.at(module + ".weight"), a, b, alpha / 2).values) { return alpha; }
        }
        return 0.0;
    };
    using pair = std::pair<const char*, const std::string*>; // what each matches alone, by re.match("(.*\\.)?(KEY)$")
    for (const auto& [key, module] : {pair("q_proj\\Z", &q), pair("\\Alayers\\.1\\.q_proj", &q),
             pair("layers\\.[]1]\\.q_proj", &q), pair("(?:mlp|q_proj)(?<!mlp)", &q), pair("(?i:MLP)", &mlp),
             pair("(?P<n>mlp)", &mlp), pair("layers\\.\\d{,2}\\.mlp", &mlp), pair("m(?#l)lp", &mlp)}) {
        const std::string shown = key; // for lambdas, which hold no binding
        CAPTURE(shown);
        write_adapter_as(folder / "a", tensors, {{"alpha_pattern", {{key, 8}}}});
        must_run(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "out.safetensors"});
        CHECK(scaling(q) == (module == &q ? 8 : 1));
        CHECK(scaling(mlp) == (module == &mlp ? 8 : 1));
    }
    // A class of POSIX is none to Python: "[[:digit:]" and a bracket.
    write_adapter_as(folder / "a", tensors, {{"alpha_pattern", {{"layers\\.[[:digit:]]\\.mlp", 8}}}});
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "no.safetensors"}, 1,
        "matches no module of the adapter");
}

TEST_CASE("kinds of adapters that are not read are refused by name, whatever their tensors are called")
{
    const scratch folder;
    write_values(folder / "base.safetensors", {{"layers.0.q.weight", random_tensor({6, 6}, 1)}});
    const auto refused_as = [&](const std::string& kind, const values_model& tensors, const std::string& words) {
        CAPTURE(kind);
        write_text(folder / "a/adapter_config.json", nlohmann::json{{"peft_type", kind}}.dump());
        write_values(folder / "a/adapter_model.safetensors", tensors);
        for (const auto& line : {std::vector<std::string>{
                                     "fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "no.safetensors"},
                 std::vector<std::string>{"convert", "a", "--as", "kohya", "--out", "no.safetensors"},
                 std::vector<std::string>{"merge-lora", "--adapter", "a", "--out", "no"}}) {
            refused(folder, line, 1, "adapter_config.json: peft_type " + kind + ": ");
            const auto said = run(folder, line).err;
            CHECK(said.find(words) != std::string::npos);
            const bool merged_by_peft = words.find("with PEFT and") != std::string::npos || words == "another kind";
            CHECK((said.find("fold it into its base") != std::string::npos) == merged_by_peft);
        }
    };
    const auto x = random_tensor({2, 6}, 2);
    const std::string q = "base_model.model.layers.0.q.";
    refused_as("VERA", {{q + "vera_lambda_b", x}, {"base_model.vera_A", x}}, "another kind");
    refused_as("OFT", {{q + "oft_R.weight", x}}, "another kind");
    refused_as("PVERA", {{q + "pvera_lambda_b", x}, {"base_model.pvera_A", x}}, "another kind");
    refused_as("NEW_KIND", {{"new", x}}, "another kind");
    for (const std::string kind : {"PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT", "CARTRIDGE"}) {
        refused_as(kind, {{"prompt_embeddings", x}}, "changes no weight");
    }
    refused_as("MULTITASK_PROMPT_TUNING", {{"prefix_task_cols", x}}, "changes no weight");
    refused_as("XLORA", {{q + "lora_A.weight", x}}, "depends on the input");
}

TEST_CASE("convert tells the parts of pipelines apart by names, and says what it takes for granted")
{
    const scratch folder;
    const auto names = [&](const std::string& adapter, const std::string& dialect) {
        must_run(folder, {"convert", adapter, "--as", dialect, "--out", "c.safetensors"});
        std::vector<std::string> found;
        for (const auto& one : read_values(folder / "c.safetensors")) { found.push_back(one.first); }
        return found;
    };
    using list = std::vector<std::string>;
    // Flux and Stable Diffusion 3 are transformers, and no UNet.
    write_adapter_as(folder / "flux", factors("single_transformer_blocks.0.attn.to_k", 4, 4, 1));
    const std::string flux = "transformer.single_transformer_blocks.0.attn.to_k.lora";
    CHECK(names("flux", "diffusers") == list{flux + ".down.weight", flux + ".up.weight"});
    write_adapter_as(folder / "unet", factors("down_blocks.0.attn.to_k", 4, 4, 1));
    CHECK(names("unet", "diffusers").front() == "unet.down_blocks.0.attn.to_k.lora.down.weight");
    write_adapter_as(folder / "llm", factors("model.layers.0.q", 4, 4, 1));
    const auto guessed = must_run(folder, {"convert", "llm", "--as", "diffusers", "--out", "out.safetensors"});
    CHECK(guessed.err.find("nothing says which part of a pipeline 'model.layers.0.q' is of") != std::string::npos);
    // kohya's names of them, which are read back.
    const std::string q = "transformer_blocks.0.attn.to_q";
    write_values(folder / "base.safetensors", {{q + ".weight", random_tensor({4, 4}, 5)}});
    write_adapter_as(folder / "t", factors("transformer." + q, 4, 4, 1), {}, "");
    CHECK(names("t", "kohya").front() == "lora_transformer_transformer_blocks_0_attn_to_q.alpha");
    const auto fused = fused_model(folder, "t");
    CHECK(same(fused_model(folder, "c.safetensors"), fused));
    must_run(folder, {"convert", "c.safetensors", "--as", "peft", "--base", "base.safetensors", "--out", "back"});
    CHECK(same(fused_model(folder, "back"), fused));
    write_adapter_as(folder / "t5", factors("text_encoder_3.encoder.block.0.q", 4, 4, 1), {}, "");
    CHECK(names("t5", "kohya").front() == "lora_te3_encoder_block_0_q.alpha");
    write_adapter_as(folder / "second", factors("transformer_2.blocks.0.q", 4, 4, 1), {}, "");
    refused(folder, {"convert", "second", "--as", "kohya", "--out", "no.safetensors"}, 1,
        "kohya's names have no word for 'transformer_2'");
    // Flat factors of LoHa may be a convolution's.
    values_model loha;
    for (const std::string part : {"w1_a", "w2_a"}) { loha["c.hada_" + part] = random_tensor({6, 2}, 1); }
    for (const std::string part : {"w1_b", "w2_b"}) { loha["c.hada_" + part] = random_tensor({2, 36}, 2); }
    write_adapter_as(folder / "loha", loha, {{"peft_type", "LOHA"}, {"alpha", 1}});
    write_values(folder / "base.safetensors", {{"c.weight", random_tensor({6, 4, 3, 3}, 3)}});
    const auto flat = must_run(folder, {"convert", "loha", "--as", "peft", "--out", "flat"});
    CHECK(flat.err.find("'c' is taken for linear layers; --base says what they are") != std::string::npos);
    const auto told =
        must_run(folder, {"convert", "loha", "--as", "peft", "--base", "base.safetensors", "--out", "told"});
    CHECK(told.err.find("--base says") == std::string::npos);
    CHECK(read_values(folder / "told/adapter_model.safetensors").at("base_model.model.c.lora_A.weight").shape
        == taskvec::extents{4, 4, 3, 3});
}

TEST_CASE("XLabs' factors, and a GGUF adapter of another number of heads, are refused by what they are")
{
    const scratch folder;
    const std::string qkv = "double_blocks.0.processor.qkv_lora1.";
    write_values(folder / "x.safetensors",
        {{qkv + "down.weight", random_tensor({2, 6}, 1)}, {qkv + "up.weight", random_tensor({6, 2}, 2)}});
    write_values(folder / "base.safetensors", {{"double_blocks.0.img_attn.qkv.weight", random_tensor({6, 6}, 3)}});
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "x.safetensors", "--out", "no.safetensors"}, 1,
        "' is no part of a LoRA");
    const std::string q = "model.layers.0.self_attn.q_proj";
    const auto configured = [&](const std::string& directory, int heads) {
        write_text(folder / directory / "config.json",
            nlohmann::json{{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"},
                {"num_attention_heads", heads}, {"num_key_value_heads", heads}}
                .dump());
        write_values(folder / directory / "model.safetensors", {{q + ".weight", random_tensor({8, 8}, 4)}});
    };
    configured("four", 4);
    configured("two", 2);
    write_adapter_as(folder / "a", factors(q, 8, 8, 5));
    must_run(folder, {"convert", "a", "--as", "gguf", "--base", "four", "--out", "a.gguf"});
    must_run(folder, {"fuse", "--base", "four", "--adapter", "a.gguf", "--out", "out"});
    refused(folder, {"fuse", "--base", "two", "--adapter", "a.gguf", "--out", "no"}, 1,
        "says that its model has 4 heads of attention");
}

TEST_CASE("square experts of Llama 4 are changed as PEFT sees them, by their columns as inputs")
{
    const scratch folder;
    constexpr std::size_t experts = 2, rank = 2;
    const auto n = [](std::size_t x) { return static_cast<std::int64_t>(x); };
    for (const bool llama4 : {true, false}) {
        const std::string owner = std::string("layers.0.") + (llama4 ? "feed_forward" : "mlp") + ".experts";
        // in×out, as both lie: down_proj is square with 4 of both, gate_up_proj with 2.
        for (const std::size_t inner : {4u, 2u}) {
            const auto down = random_tensor({2, n(inner), 4}, 1), both = random_tensor({2, 4, n(2 * inner)}, 2);
            const std::string name = owner + (inner == 4 ? ".down_proj" : ".gate_up_proj");
            write_values(folder / "base.safetensors", {{owner + ".gate_up_proj", both}, {owner + ".down_proj", down}});
            const values_model tensors{{owner + ".lora_A.weight", random_tensor({n(experts * rank), 4}, 3)},
                {owner + ".lora_B.weight", random_tensor({4, n(experts * rank)}, 4)}};
            write_adapter_as(folder / "a", tensors, {{"target_parameters", {name.substr(name.find("experts"))}}});
            const auto &a = tensors.at(owner + ".lora_A.weight"), &b = tensors.at(owner + ".lora_B.weight");
            check_changed(fused_model(folder, "a").at(name), inner == 4 ? down : both, [&](std::size_t index) {
                const auto e = index / 16, row = index / 4 % 4, column = index % 4;
                const auto out = llama4 ? row : column, in = llama4 ? column : row;
                double sum = 0;
                for (std::size_t k = 0; k < rank; ++k) {
                    sum += entry(b, out, k * experts + e) * entry(a, e * rank + k, in);
                }
                return 0.5 * sum;
            });
        }
    }
}

TEST_CASE("MLX's embedding is the head that is tied to it, and its DoRA has a magnitude for each entry")
{
    const scratch folder;
    const auto words = random_tensor({11, 6}, 1);
    const auto write_base = [&](bool tied, const std::string& name) {
        values_model tensors{
            {"model.embed_tokens.weight", words}, {"model.layers.0.q_proj.weight", random_tensor({6, 6}, 2)}};
        if (!tied) { tensors["lm_head.weight"] = random_tensor({11, 6}, 3); }
        std::filesystem::create_directories(folder / name);
        write_values(folder / name / "model.safetensors", tensors);
        write_text(folder / name / "config.json",
            std::string(R"({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, )")
                + "\"tie_word_embeddings\": " + (tied ? "true}" : "false}"));
    };
    write_base(true, "tied");
    write_base(false, "parted");
    const auto a = random_tensor({11, 2}, 4), b = random_tensor({2, 6}, 5);
    const std::string config = R"("num_layers": 1, "lora_parameters": {"rank": 2, "scale": 0.5}})";
    std::filesystem::create_directories(folder / "mlx");
    std::filesystem::create_directories(folder / "dora");
    write_values(
        folder / "mlx/adapters.safetensors", {{"model.embed_tokens.lora_a", a}, {"model.embed_tokens.lora_b", b}});
    write_text(folder / "mlx/adapter_config.json", R"({"fine_tune_type": "lora", )" + config);
    const auto update = [&](std::size_t i) {
        return 0.5 * (entry(a, i / 6, 0) * entry(b, 0, i % 6) + entry(a, i / 6, 1) * entry(b, 1, i % 6));
    };
    must_run(folder, {"fuse", "--base", "tied", "--adapter", "mlx", "--out", "out"});
    const auto fused = read_values(folder / "out/model.safetensors");
    CHECK(fused.size() == 2); // still one matrix
    check_changed(fused.at("model.embed_tokens.weight"), words, update);
    must_run(folder, {"fuse", "--base", "parted", "--adapter", "mlx", "--out", "out"});
    const auto alone = read_values(folder / "out/model.safetensors");
    check_changed(alone.at("model.embed_tokens.weight"), words, update);
    check_changed(alone.at("lm_head.weight"), random_tensor({11, 6}, 3), [](std::size_t) { return 0.0; });
    // For PEFT both have the update, as it writes them itself; without a base it is told that the two are one, if they
    // are.
    const auto noted = must_run(folder, {"convert", "mlx", "--as", "peft", "--base", "tied", "--out", "peft"});
    CHECK(noted.err.find("'lm_head' of 'tied' is tied to 'model.embed_tokens'") != std::string::npos);
    const auto peft = read_values(folder / "peft/adapter_model.safetensors");
    CHECK(peft.at("base_model.model.lm_head.lora_B.weight").values == a.values);
    CHECK(peft.at("base_model.model.lm_head.lora_A.weight").values == b.values);
    CHECK(peft.contains("base_model.model.model.embed_tokens.lora_embedding_A"));
    CHECK(nlohmann::json::parse(slurp(folder / "peft/adapter_config.json"))["ensure_weight_tying"] == true);
    must_run(folder, {"convert", "mlx", "--as", "peft", "--base", "parted", "--out", "other"});
    CHECK(read_values(folder / "other/adapter_model.safetensors").size() == 2);
    CHECK_FALSE(nlohmann::json::parse(slurp(folder / "other/adapter_config.json")).value("ensure_weight_tying", false));
    must_run(folder, {"convert", "mlx", "--as", "peft", "--out", "other"});
    CHECK(read_values(folder / "other/adapter_model.safetensors").size() == 2);
    CHECK(nlohmann::json::parse(slurp(folder / "other/adapter_config.json"))["ensure_weight_tying"] == true);
    must_run(folder, {"fuse", "--base", "tied", "--adapter", "other", "--out", "out"});
    CHECK(same(read_values(folder / "out/model.safetensors"), fused));
    // And the other way round: what MLX has as one is to change as one.
    must_run(folder, {"convert", "peft", "--as", "mlx", "--base", "tied", "--out", "back"});
    const auto back = read_values(folder / "back/adapters.safetensors");
    CHECK(back.size() == 2);
    CHECK(back.at("model.embed_tokens.lora_a").values == a.values);
    const auto one_alone = [&](const std::string& name) {
        must_run(folder, {"convert", name, "--as", "peft", "--base", "tied", "--out", "same"});
        must_run(folder, {"convert", name, "--as", "mlx", "--base", "parted", "--out", "same"});
        refused(folder, {"convert", name, "--as", "mlx", "--base", "tied", "--out", "no"}, 1,
            "which MLX adapts as one module");
    };
    write_adapter_as(folder / "words",
        {{"model.embed_tokens.lora_embedding_A", random_tensor({2, 11}, 6)},
            {"model.embed_tokens.lora_embedding_B", random_tensor({6, 2}, 7)}});
    one_alone("words");
    const auto unsure = must_run(folder, {"convert", "words", "--as", "mlx", "--out", "same"});
    CHECK(unsure.err.find("--base says whether it does") != std::string::npos);
    // A head that no file of the base has is a module of it.
    write_adapter_as(folder / "head", factors("lm_head", 11, 6, 8));
    one_alone("head");

    const auto m = random_tensor({11}, 9);
    write_values(folder / "dora/adapters.safetensors",
        {{"model.embed_tokens.lora_a", a}, {"model.embed_tokens.lora_b", b}, {"model.embed_tokens.m", m}});
    write_text(folder / "dora/adapter_config.json", R"({"fine_tune_type": "dora", )" + config);
    must_run(folder, {"fuse", "--base", "tied", "--adapter", "dora", "--out", "out"});
    const auto rescaled = read_values(folder / "out/model.safetensors");
    CHECK(rescaled.size() == 2);
    check_changed(rescaled.at("model.embed_tokens.weight"), words, [&](std::size_t index) {
        const auto direction = [&](std::size_t i) { return double{words.values[i]} + update(i); };
        double norm = 0;
        for (std::size_t k = 0; k < 6; ++k) { norm += std::pow(direction(index / 6 * 6 + k), 2); }
        return double{m.values[index / 6]} * direction(index) / std::sqrt(norm) - double{words.values[index]};
    });
    refused(folder, {"convert", "dora", "--as", "peft", "--out", "no"}, 1, "a magnitude for each entry");
    must_run(folder, {"convert", "dora", "--as", "mlx", "--out", "again"});
    const auto again = read_values(folder / "again/adapters.safetensors");
    CHECK(again.at("model.embed_tokens.lora_a").values == a.values);
    CHECK(again.at("model.embed_tokens.lora_b").values == b.values);
    CHECK(again.at("model.embed_tokens.m").values == m.values);
    write_adapter_as(folder / "of_dimensions",
        {{"model.embed_tokens.lora_embedding_A", random_tensor({2, 11}, 6)},
            {"model.embed_tokens.lora_embedding_B", random_tensor({6, 2}, 7)},
            {"model.embed_tokens.lora_magnitude_vector", random_tensor({6}, 8)}},
        {{"use_dora", true}});
    refused(folder, {"convert", "of_dimensions", "--as", "mlx", "--out", "no", "--quiet"}, 1,
        "a magnitude for each dimension");
}

TEST_CASE("convert refuses a base whose weights are not of its modules' shapes")
{
    const scratch folder;
    const auto base_of = [&](taskvec::extents q, taskvec::extents conv, taskvec::extents words) {
        write_values(folder / "base.safetensors",
            {{"layers.0.q.weight", random_tensor(std::move(q), 1)}, {"conv.weight", random_tensor(std::move(conv), 2)},
                {"model.embed_tokens.weight", random_tensor(std::move(words), 3)}});
    };
    auto tensors = factors("layers.0.q", 6, 4, 4);
    tensors["conv.lora_A.weight"] = random_tensor({2, 4, 3, 3}, 6);
    tensors["conv.lora_B.weight"] = random_tensor({5, 2, 1, 1}, 7);
    tensors["model.embed_tokens.lora_embedding_A"] = random_tensor({2, 11}, 8);
    tensors["model.embed_tokens.lora_embedding_B"] = random_tensor({4, 2}, 9);
    write_adapter_as(folder / "a", tensors);
    const std::vector<std::string> line{"convert", "a", "--as", "peft", "--base", "base.safetensors", "--out", "out"};
    base_of({6, 4}, {5, 4, 3, 3}, {11, 4});
    must_run(folder, line);
    base_of({4, 6}, {5, 4, 3, 3}, {8, 4}); // in×out, and before tokens were added
    must_run(folder, line);
    const auto no = [&](const std::string& words) { refused(folder, line, 1, words); };
    base_of({6, 8}, {5, 4, 3, 3}, {11, 4});
    no("'layers.0.q.weight' has shape [6, 8], and the update of module 'layers.0.q' in 'a' is 6×4");
    base_of({6, 4}, {5, 4, 1, 9}, {11, 4});
    no("'conv.weight' has shape [5, 4, 1, 9]");
    base_of({6, 4}, {5, 4, 3, 3}, {12, 4});
    no("'model.embed_tokens.weight' has shape [12, 4]");
}
