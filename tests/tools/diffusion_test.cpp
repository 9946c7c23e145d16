// Adapters of Stable Diffusion and FLUX under the names of one kind, on bases under the other, against plain loops.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_files.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

using namespace tools_test;

namespace {

const std::string unet_prefix = "model.diffusion_model.",
                  clip_layer = "conditioner.embedders.0.transformer.text_model.encoder.layers.0.",
                  open_clip = "conditioner.embedders.1.model.", open_block = open_clip + "transformer.resblocks.0.";

/// A part of a single file of SDXL.
values_model single_file()
{
    return {{unet_prefix + "input_blocks.0.0.weight", random_tensor({4, 3, 3, 3}, 1)},
        {unet_prefix + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", random_tensor({6, 5}, 2)},
        {unet_prefix + "input_blocks.4.0.emb_layers.1.weight", random_tensor({6, 7}, 3)},
        {unet_prefix + "output_blocks.5.2.conv.weight", random_tensor({4, 4, 3, 3}, 4)},
        {unet_prefix + "output_blocks.3.1.norm.weight", random_tensor({4}, 12)},
        {"first_stage_model.encoder.conv_in.weight", random_tensor({4, 3, 3, 3}, 5)},
        {"first_stage_model.decoder.conv_in.weight", random_tensor({4, 3, 3, 3}, 6)},
        {clip_layer + "self_attn.q_proj.weight", random_tensor({4, 4}, 7)},
        {open_block + "attn.in_proj_weight", random_tensor({12, 4}, 8)},
        {open_block + "attn.in_proj_bias", random_tensor({12}, 9)},
        {open_block + "mlp.c_fc.weight", random_tensor({6, 4}, 10)},
        {open_clip + "text_projection", random_tensor({4, 4}, 11)}};
}

/// A module under diffusers' name, and what the single file calls it; its component as kohya and diffusers call that.
struct module_names {
    std::string diffusers, single, kohya, component;
    taskvec::extents down, up;
};
const std::vector<module_names> unet_modules{
    {"conv_in", "input_blocks.0.0", "lora_unet_", "unet.", {2, 3, 3, 3}, {4, 2, 1, 1}},
    {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_", "unet.", {2, 5}, {6, 2}},
    {"down_blocks.1.resnets.0.time_emb_proj", "input_blocks.4.0.emb_layers.1", "lora_unet_", "unet.", {2, 7}, {6, 2}},
    {"up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv", "lora_unet_", "unet.", {2, 4, 3, 3}, {4, 2, 1, 1}}};

std::string underscored(std::string name)
{
    for (auto& c : name) { c = c == '.' ? '_' : c; }
    return name;
}
values_tensor down_of(const module_names& one)
{
    return random_tensor(one.down, 20 + static_cast<unsigned>(one.diffusers.size()));
}
values_tensor up_of(const module_names& one)
{
    return random_tensor(one.up, 90 + static_cast<unsigned>(one.diffusers.size()));
}

outcome succeed(const scratch& folder, const std::vector<std::string>& arguments)
{
    auto result = run(folder, arguments);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    return result;
}
const std::vector<std::string> fuse_it{
    "fuse", "--base", "base.safetensors", "--adapter", "a.safetensors", "--out", "out.safetensors"};

/// Rows [first, first + count) of a matrix.
values_tensor rows_of(const values_tensor& x, std::size_t first, std::size_t count)
{
    const auto columns = static_cast<std::size_t>(x.shape[1]);
    const auto at = x.values.begin() + static_cast<std::ptrdiff_t>(first * columns);
    return {x.dtype, {static_cast<std::int64_t>(count), x.shape[1]},
        {at, at + static_cast<std::ptrdiff_t>(count * columns)}};
}
void put_rows(values_tensor& x, std::size_t first, const values_tensor& rows)
{
    std::copy(rows.values.begin(), rows.values.end(),
        x.values.begin() + static_cast<std::ptrdiff_t>(first * static_cast<std::size_t>(x.shape[1])));
}

} // namespace

TEST_CASE("adapters of Stable Diffusion fold into a base of either kind of names")
{
    const scratch folder;
    const auto file = single_file();
    auto expected = file;
    values_model diffusers_base, diffusers_expected, kohya, kohya_single, dotted;
    for (const auto& one : unet_modules) {
        const auto tensor = unet_prefix + one.single + ".weight";
        expected[tensor] = added(file.at(tensor), down_of(one), up_of(one), 1);
        diffusers_base[one.diffusers + ".weight"] = file.at(tensor);
        diffusers_expected[one.diffusers + ".weight"] = expected.at(tensor);
        const auto put = [&](values_model& to, const std::string& down, const std::string& up) {
            to[down] = down_of(one);
            to[up] = up_of(one);
        };
        for (auto [to, name] : {std::pair(&kohya, one.diffusers), std::pair(&kohya_single, one.single)}) {
            const auto stem = one.kohya + underscored(name);
            put(*to, stem + ".lora_down.weight", stem + ".lora_up.weight");
            (*to)[stem + ".alpha"] = {taskvec::dtype::f32, {}, {2}};
        }
        put(dotted, one.component + one.diffusers + ".lora_A.weight", one.component + one.diffusers + ".lora_B.weight");
    }
    // A level with attention, behind which single files count its upsampler.
    diffusers_base["up_blocks.1.attentions.0.norm.weight"] = file.at(unet_prefix + "output_blocks.3.1.norm.weight");
    diffusers_expected["up_blocks.1.attentions.0.norm.weight"] =
        diffusers_base.at("up_blocks.1.attentions.0.norm.weight");
    const auto folds = [&](const values_model& base, const values_model& adapter, const values_model& fused,
                           const std::string& said) {
        CAPTURE(said);
        write_values(folder / "base.safetensors", base);
        write_values(folder / "a.safetensors", adapter);
        const auto done = succeed(folder, fuse_it);
        CHECK(same(read_values(folder / "out.safetensors"), fused));
        CHECK((done.err.find("translated") != std::string::npos) == !said.empty());
        CHECK(done.err.find(said) != std::string::npos);
    };
    const std::string to_single = "4 names of diffusers' translated to the base's, a single file's (LDM)",
                      to_diffusers = "4 names of single files (LDM) translated to the base's, diffusers'";
    folds(file, kohya, expected, to_single);
    folds(file, kohya_single, expected, "");
    folds(file, dotted, expected, to_single);
    folds(diffusers_base, kohya_single, diffusers_expected, to_diffusers);
    folds(diffusers_base, kohya, diffusers_expected, "");

    // As a task that is never stored.
    write_values(folder / "base.safetensors", file);
    write_values(folder / "a.safetensors", kohya);
    const auto task = succeed(folder,
        {"merge", "--method", "task-arithmetic", "--lambda", "1", "--base", "base.safetensors", "--task-adapter",
            "a.safetensors", "--out", "merged.safetensors"});
    CHECK(task.err.find(to_single) != std::string::npos);
    const auto merged = read_values(folder / "merged.safetensors");
    double worst = 0;
    for (const auto& [name, tensor] : expected) {
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            worst = std::max(worst, std::abs(double{tensor.values[i]} - double{merged.at(name).values[i]}));
        }
    }
    CHECK(worst < 1e-6);

    // Names of PEFT's, without a component.
    values_model bare;
    for (const auto& one : unet_modules) {
        bare[one.diffusers + ".lora_A.weight"] = down_of(one);
        bare[one.diffusers + ".lora_B.weight"] = up_of(one);
    }
    write_adapter_as(folder / "peft", bare, {{"lora_alpha", 2}});
    const auto by_peft =
        succeed(folder, {"fuse", "--base", "base.safetensors", "--adapter", "peft", "--out", "out.safetensors"});
    CHECK(same(read_values(folder / "out.safetensors"), expected));
    CHECK(by_peft.err.find(to_single) != std::string::npos);

    // Converted they keep their kind of names, but for diffusers, which knows its own alone.
    const auto names = [&](const std::string& adapter, const std::string& as, const std::string& out) {
        succeed(folder, {"convert", adapter, "--as", as, "--base", "base.safetensors", "--out", out});
        std::vector<std::string> found;
        for (const auto& [name, tensor] : read_values(folder / out)) { found.push_back(name); }
        return found;
    };
    std::vector<std::string> of_kohya, of_diffusers;
    for (const auto& [name, tensor] : kohya) { of_kohya.push_back(name); }
    for (const auto& one : unet_modules) {
        for (const std::string half : {"down", "up"}) {
            of_diffusers.push_back("unet." + one.diffusers + ".lora." + half + ".weight");
        }
    }
    std::sort(of_diffusers.begin(), of_diffusers.end());
    CHECK(names("a.safetensors", "kohya", "k.safetensors") == of_kohya);
    CHECK(names("a.safetensors", "diffusers", "d.safetensors") == of_diffusers);
    write_values(folder / "b.safetensors", kohya_single);
    CHECK(names("b.safetensors", "diffusers", "d.safetensors") == of_diffusers);
    succeed(folder, {"convert", "a.safetensors", "--as", "peft", "--base", "base.safetensors", "--out", "p"});
    succeed(folder, {"fuse", "--base", "base.safetensors", "--adapter", "p", "--out", "out.safetensors"});
    CHECK(same(read_values(folder / "out.safetensors"), expected));
}

TEST_CASE("text encoders of a single file take their adapters, fused projections a block of rows")
{
    const scratch folder;
    const auto file = single_file();
    write_values(folder / "base.safetensors", file);
    const std::string one = "lora_te1_text_model_encoder_layers_0_", two = "lora_te2_text_model_encoder_layers_0_";
    values_model adapter;
    const auto put = [&](const std::string& stem, std::int64_t out, std::int64_t in, unsigned seed) {
        adapter[stem + ".lora_down.weight"] = random_tensor({2, in}, seed);
        adapter[stem + ".lora_up.weight"] = random_tensor({out, 2}, seed + 1);
        adapter[stem + ".alpha"] = {taskvec::dtype::f32, {}, {1}};
    };
    put(one + "self_attn_q_proj", 4, 4, 30);
    put(two + "self_attn_q_proj", 4, 4, 40);
    put(two + "self_attn_v_proj", 4, 4, 50);
    put(two + "mlp_fc1", 6, 4, 60);
    put("lora_te2_text_projection", 4, 4, 70);
    const auto change = [&](const values_tensor& w, const std::string& stem, bool turned = false) {
        return added(w, adapter.at(stem + ".lora_down.weight"), adapter.at(stem + ".lora_up.weight"), 0.5, turned);
    };
    auto expected = file;
    auto& fused = expected[open_block + "attn.in_proj_weight"];
    expected[clip_layer + "self_attn.q_proj.weight"] =
        change(file.at(clip_layer + "self_attn.q_proj.weight"), one + "self_attn_q_proj");
    put_rows(fused, 0, change(rows_of(fused, 0, 4), two + "self_attn_q_proj"));
    put_rows(fused, 8, change(rows_of(fused, 8, 4), two + "self_attn_v_proj"));
    expected[open_block + "mlp.c_fc.weight"] = change(file.at(open_block + "mlp.c_fc.weight"), two + "mlp_fc1");
    expected[open_clip + "text_projection"] =
        change(file.at(open_clip + "text_projection"), "lora_te2_text_projection", true);
    write_values(folder / "a.safetensors", adapter);
    const auto done = succeed(folder, fuse_it);
    CHECK(same(read_values(folder / "out.safetensors"), expected));
    CHECK(done.err.find("3 names of diffusers' translated") != std::string::npos);
    succeed(folder,
        {"convert", "a.safetensors", "--as", "diffusers", "--base", "base.safetensors", "--out", "d.safetensors"});
    succeed(folder, {"fuse", "--base", "base.safetensors", "--adapter", "d.safetensors", "--out", "out.safetensors"});
    CHECK(same(read_values(folder / "out.safetensors"), expected));

    // DoRA's norms are those of the block.
    const auto magnitude = random_tensor({4, 1}, 80);
    const values_model rescaled{{two + "self_attn_k_proj.lora_down.weight", random_tensor({2, 4}, 81)},
        {two + "self_attn_k_proj.lora_up.weight", random_tensor({4, 2}, 82)},
        {two + "self_attn_k_proj.alpha", {taskvec::dtype::f32, {}, {2}}},
        {two + "self_attn_k_proj.dora_scale", magnitude}};
    write_values(folder / "a.safetensors", rescaled);
    succeed(folder, fuse_it);
    const auto before = rows_of(file.at(open_block + "attn.in_proj_weight"), 4, 4),
               after = rows_of(read_values(folder / "out.safetensors").at(open_block + "attn.in_proj_weight"), 4, 4),
               plain = added(before, rescaled.at(two + "self_attn_k_proj.lora_down.weight"),
                   rescaled.at(two + "self_attn_k_proj.lora_up.weight"), 1);
    for (std::size_t o = 0; o < 4; ++o) {
        double squares = 0;
        for (std::size_t i = 0; i < 4; ++i) {
            squares += double{plain.values[o * 4 + i]} * double{plain.values[o * 4 + i]};
        }
        for (std::size_t i = 0; i < 4; ++i) {
            CHECK(std::abs(double{after.values[o * 4 + i]}
                      - double{magnitude.values[o]} * double{plain.values[o * 4 + i]} / std::sqrt(squares))
                < 2e-6);
        }
    }

    // What is not clear is refused, and what is another model's.
    const auto no = [&](const values_model& tensors, const std::string& words) {
        write_values(folder / "a.safetensors", tensors);
        auto arguments = fuse_it;
        arguments.back() = "no.safetensors";
        arguments.emplace_back("--quiet");
        refused(folder, arguments, 1, words);
    };
    const auto pair = [](const std::string& stem, std::int64_t out, std::int64_t in) {
        return values_model{{stem + ".lora_down.weight", random_tensor({2, in}, 1)},
            {stem + ".lora_up.weight", random_tensor({out, 2}, 2)}};
    };
    no(pair(two + "mlp_fc9", 6, 4), "is no module of 'base.safetensors'");
    no(pair("lora_te2_text_model_encoder_layers_9_self_attn_q_proj", 4, 4), "is no module of 'base.safetensors'");
    no(pair("lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_attn1_to_q", 6, 5),
        "is no module of 'base.safetensors'");
    no(pair(two + "self_attn_q_proj", 12, 4), "its update in 'a.safetensors' is 12×4");
    const std::string bare = "text_model.encoder.layers.0.self_attn.q_proj";
    write_adapter_as(folder / "a", factors(bare, 4, 4, 5));
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "no.safetensors", "--quiet"}, 1,
        "may mean '" + clip_layer + "self_attn.q_proj.weight' or '" + open_block + "attn.in_proj_weight'");
    succeed(folder,
        {"fuse", "--base", "base.safetensors", "--adapter", "a", "--rename", "^text_model=text_encoder_2.text_model",
            "--out", "out.safetensors"});
    auto biased = factors("text_encoder_2." + bare, 4, 4, 5);
    biased["text_encoder_2." + bare + ".lora_B.bias"] = random_tensor({4}, 6);
    write_adapter_as(folder / "a", biased, {{"lora_bias", true}});
    refused(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "no.safetensors", "--quiet"}, 1,
        "is several modules' weight, whose biases are one tensor");
}

TEST_CASE("FLUX's modules under its authors' names fold into diffusers', a block of rows each")
{
    const scratch folder;
    const std::string both = "transformer_blocks.0.attn.", one = "single_transformer_blocks.0.";
    const values_model base{{both + "to_q.weight", random_tensor({4, 4}, 1)},
        {both + "to_k.weight", random_tensor({4, 4}, 2)}, {both + "to_v.weight", random_tensor({4, 4}, 3)},
        {both + "to_add_out.weight", random_tensor({4, 4}, 4)}, {one + "attn.to_q.weight", random_tensor({4, 4}, 5)},
        {one + "attn.to_k.weight", random_tensor({4, 4}, 6)}, {one + "attn.to_v.weight", random_tensor({4, 4}, 7)},
        {one + "proj_mlp.weight", random_tensor({7, 4}, 8)}, {"norm_out.linear.weight", random_tensor({8, 4}, 9)},
        {"time_text_embed.timestep_embedder.linear_1.weight", random_tensor({4, 5}, 10)}};
    struct layer {
        std::string own;
        std::vector<std::string> parts; // with the first row of each in the layer's
        std::vector<std::size_t> first;
        values_tensor down, up;
    };
    std::vector<layer> layers{{"double_blocks.0.img_attn.qkv", {both + "to_q", both + "to_k", both + "to_v"}, {0, 4, 8},
                                  random_tensor({2, 4}, 20), random_tensor({12, 2}, 21)},
        {"double_blocks.0.txt_attn.proj", {both + "to_add_out"}, {0}, random_tensor({2, 4}, 22),
            random_tensor({4, 2}, 23)},
        {"single_blocks.0.linear1", {one + "attn.to_q", one + "attn.to_k", one + "attn.to_v", one + "proj_mlp"},
            {0, 4, 8, 12}, random_tensor({2, 4}, 24), random_tensor({19, 2}, 25)},
        {"time_in.in_layer", {"time_text_embed.timestep_embedder.linear_1"}, {0}, random_tensor({2, 5}, 26),
            random_tensor({4, 2}, 27)},
        {"final_layer.adaLN_modulation.1", {"norm_out.linear"}, {4}, random_tensor({2, 4}, 28),
            random_tensor({8, 2}, 29)}};
    auto expected = base;
    values_model kohya, dotted;
    for (const auto& layer : layers) {
        const auto stem = "lora_unet_" + underscored(layer.own);
        kohya[stem + ".lora_down.weight"] = layer.down;
        kohya[stem + ".lora_up.weight"] = layer.up;
        kohya[stem + ".alpha"] = {taskvec::dtype::f32, {}, {1}};
        dotted["diffusion_model." + layer.own + ".lora_A.weight"] = layer.down;
        dotted["diffusion_model." + layer.own + ".lora_B.weight"] = layer.up;
        dotted["diffusion_model." + layer.own + ".alpha"] = {taskvec::dtype::f32, {}, {1}};
        for (std::size_t i = 0; i < layer.parts.size(); ++i) {
            const auto tensor = layer.parts[i] + ".weight";
            auto rows = base.at(tensor); // of the up factor; those of norm_out begin in the middle and go round
            const auto count = static_cast<std::size_t>(rows.shape[0]), all = layer.up.values.size() / 2;
            rows.shape = {rows.shape[0], 2};
            rows.values.resize(2 * count);
            for (std::size_t j = 0; j < 2 * count; ++j) {
                rows.values[j] = layer.up.values[(2 * layer.first[i] + j) % (2 * all)];
            }
            expected[tensor] = added(base.at(tensor), layer.down, rows, 0.5);
        }
    }
    for (const std::string prefix : {"", "transformer."}) {
        values_model named, named_expected;
        for (const auto& [name, tensor] : base) { named[prefix + name] = tensor; }
        for (const auto& [name, tensor] : expected) { named_expected[prefix + name] = tensor; }
        write_values(folder / "base.safetensors", named);
        for (const auto* adapter : {&kohya, &dotted}) {
            write_values(folder / "a.safetensors", *adapter);
            const auto done = succeed(folder, fuse_it);
            CHECK(same(read_values(folder / "out.safetensors"), named_expected));
            CHECK(done.err.find("has 5 modules under the names of FLUX's authors") != std::string::npos);
        }
    }
    write_values(folder / "base.safetensors", base);
    write_values(folder / "a.safetensors", kohya);
    succeed(folder,
        {"convert", "a.safetensors", "--as", "diffusers", "--base", "base.safetensors", "--out", "d.safetensors"});
    const auto converted = read_values(folder / "d.safetensors");
    CHECK(converted.size() == 20);
    CHECK(converted.contains("transformer." + one + "proj_mlp.lora.up.weight"));
    succeed(folder, {"fuse", "--base", "base.safetensors", "--adapter", "d.safetensors", "--out", "out.safetensors"});
    CHECK(same(read_values(folder / "out.safetensors"), expected));

    // What does not fit is no guess, and no module is changed twice.
    const auto no = [&](const std::vector<std::string>& line, const std::string& words) {
        refused(folder, line, 1, words);
    };
    const std::vector<std::string> fuse{
        "fuse", "--base", "base.safetensors", "--adapter", "b.safetensors", "--out", "no.safetensors", "--quiet"};
    auto wrong = kohya;
    wrong["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] = random_tensor({13, 2}, 30);
    write_values(folder / "b.safetensors", wrong);
    no(fuse, "is no module of 'base.safetensors': use the base that it was trained on, in the form whose names it has");
    no({"convert", "b.safetensors", "--as", "peft", "--base", "base.safetensors", "--out", "no", "--quiet"},
        "give the base that it was trained on, in the form whose names it has (a single file, or diffusers')");
    auto twice = kohya;
    twice[both + "to_k.lora_down.weight"] = random_tensor({2, 4}, 31);
    twice[both + "to_k.lora_up.weight"] = random_tensor({4, 2}, 32);
    write_values(folder / "b.safetensors", twice);
    no(fuse, "and another of it both mean '" + both + "to_k'");
}

TEST_CASE("an adapter in PEFT's names behind a single file's prefix folds into diffusers' model")
{
    const scratch folder;
    values_model base, expected, tensors, words;
    for (const auto& one : unet_modules) {
        base[one.diffusers + ".weight"] = single_file().at(unet_prefix + one.single + ".weight");
        expected[one.diffusers + ".weight"] = added(base.at(one.diffusers + ".weight"), down_of(one), up_of(one), 1);
        tensors[unet_prefix + one.single + ".lora_A.weight"] = down_of(one);
        tensors[unet_prefix + one.single + ".lora_B.weight"] = up_of(one);
        words["diffusion_model." + one.single + ".lora_down.weight"] = down_of(one);
        words["diffusion_model." + one.single + ".lora_up.weight"] = up_of(one);
    }
    base["up_blocks.1.attentions.0.norm.weight"] = single_file().at(unet_prefix + "output_blocks.3.1.norm.weight");
    expected["up_blocks.1.attentions.0.norm.weight"] = base.at("up_blocks.1.attentions.0.norm.weight");
    write_values(folder / "base.safetensors", base);
    write_adapter_as(folder / "a", tensors, {{"lora_alpha", 2}});
    succeed(folder, {"fuse", "--base", "base.safetensors", "--adapter", "a", "--out", "out.safetensors"});
    CHECK(same(read_values(folder / "out.safetensors"), expected));
    write_values(folder / "a.safetensors", words);
    succeed(folder, fuse_it);
    CHECK(same(read_values(folder / "out.safetensors"), expected));
}
