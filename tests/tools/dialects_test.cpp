// What dialects of adapters say beside their factors, and shapes that few of them have, against plain loops.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_files.hpp"

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

} // namespace

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
