// Stable Diffusion's names: against those that diffusers' converter gives, and by hand for text encoders.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/adapter_names.hpp>
#include <taskvec/formats/json.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

using namespace taskvec;

namespace {

/// What single files call diffusers' modules, by kind of model: made by diffusers.
nlohmann::json stored_names()
{
    return parse_json(
        read_text_file(std::filesystem::path(TASKVEC_TEST_DIR) / "data" / "diffusion" / "names.json"), "names.json");
}

/// A base of weights without elements.
const_model_ref base_of(const std::vector<std::string>& names)
{
    const_model_ref base;
    for (const auto& name : names) { base.insert(name, {nullptr, dtype::f32, {0, 0}, {}}); }
    return base;
}
std::string flat(std::string name)
{
    std::replace(name.begin(), name.end(), '.', '_');
    return name;
}

/// The tensor that one module is matched with; empty: none.
std::string matched(const std::string& module, const const_model_ref& base, adapter_dialect dialect)
{
    const auto match = match_modules(std::vector<std::string>{module}, base, dialect);
    return match.tensors.contains(module) ? match.tensors.at(module) : "";
}

} // namespace

TEST_CASE("modules of UNets have the names that diffusers' converter gives them, either way")
{
    const auto stored = stored_names();
    for (const std::string kind : {"sd1", "sdxl"}) {
        CAPTURE(kind);
        std::map<std::string, std::string> ldm_of;
        std::vector<std::string> single, folder, wrapped;
        for (const auto& [diffusers, ldm] : stored.at(kind).items()) {
            ldm_of[diffusers] = ldm.get<std::string>();
            single.push_back("model.diffusion_model." + ldm_of[diffusers] + ".weight");
            folder.push_back(diffusers + ".weight");
        }
        CHECK(ldm_of.size() > 300);
        // An autoencoder has a conv_in too, and a single file text encoders.
        single.emplace_back("first_stage_model.encoder.conv_in.weight");
        single.emplace_back("first_stage_model.decoder.conv_in.weight");
        single.emplace_back("cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight");
        const auto file = base_of(single), unet = base_of(folder);
        const diffusion_names of_file(file), of_unet(unet);
        std::vector<std::string> kohya, dotted, kohya_ldm;
        for (const auto& [diffusers, ldm] : ldm_of) {
            kohya.push_back("lora_unet_" + flat(diffusers));
            kohya_ldm.push_back("lora_unet_" + flat(ldm));
            dotted.push_back("unet." + diffusers);
        }
        const auto into_file = match_modules(kohya, file, adapter_dialect::kohya),
                   into_file_dotted = match_modules(dotted, file, adapter_dialect::diffusers),
                   into_unet = match_modules(kohya_ldm, unet, adapter_dialect::kohya),
                   as_they_are = match_modules(kohya_ldm, file, adapter_dialect::kohya);
        for (const auto* match : {&into_file, &into_file_dotted, &into_unet, &as_they_are}) {
            CHECK(match->unmatched.empty());
            CHECK(match->tensors.size() == ldm_of.size());
        }
        std::size_t wrong = 0;
        for (const auto& [diffusers, ldm] : ldm_of) {
            const auto tensor = "model.diffusion_model." + ldm + ".weight";
            wrong += into_file.tensors.at("lora_unet_" + flat(diffusers)) == tensor ? 0 : 1;
            wrong += into_file_dotted.tensors.at("unet." + diffusers) == tensor ? 0 : 1;
            wrong += into_unet.tensors.at("lora_unet_" + flat(ldm)) == diffusers + ".weight" ? 0 : 1;
            wrong += as_they_are.tensors.at("lora_unet_" + flat(ldm)) == tensor ? 0 : 1;
            const auto found = of_file.find("lora_unet_" + flat(diffusers), adapter_dialect::kohya);
            wrong += found.size() == 1 && found[0].called == diffusers && found[0].translated ? 0 : 1;
            wrong += of_unet.find("unet." + ldm, adapter_dialect::peft).size() == 1 ? 0 : 1;
        }
        CHECK(wrong == 0);
        const auto count = std::to_string(ldm_of.size());
        CHECK(into_file.changes
            == std::vector<std::string>{"underscores read as the base's dots",
                count + " names of diffusers' translated to the base's, a single file's (LDM)"});
        CHECK(into_unet.changes
            == std::vector<std::string>{"underscores read as the base's dots",
                count + " names of single files (LDM) translated to the base's, diffusers'"});
        CHECK(as_they_are.changes == std::vector<std::string>{"underscores read as the base's dots"});

        // What no model has is not matched, and no other component's stands in for it.
        for (const std::string module :
            {"lora_unet_down_blocks_7_resnets_0_conv1", "lora_unet_mid_block_resnets_2_conv1",
                "lora_unet_down_blocks_0_resnets_0_conv9", "lora_te2_text_model_encoder_layers_0_mlp_fc1"}) {
            CHECK(matched(module, file, adapter_dialect::kohya).empty());
        }
        CHECK(matched("lora_te_text_model_encoder_layers_0_mlp_fc1", file, adapter_dialect::kohya)
            == "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight");
        // Whole tensors and wrapped names go the same way.
        CHECK(into_file_dotted.renamed("unet.conv_norm_out.weight", file) == "model.diffusion_model.out.0.weight");
        CHECK(into_file_dotted.renamed("unet.conv_in.bias", file) == "model.diffusion_model.input_blocks.0.0.bias");
        std::vector<std::string> compiled;
        for (const auto& name : folder) { compiled.push_back("_orig_mod." + name); }
        CHECK(matched("lora_unet_out_2", base_of(compiled), adapter_dialect::kohya) == "_orig_mod.conv_out.weight");
        // Behind what ComfyUI and single files put before them, in any dialect with dots.
        wrong = 0;
        for (const std::string prefix : {"diffusion_model.", "model.diffusion_model."}) {
            for (const auto dialect : {adapter_dialect::peft, adapter_dialect::kohya}) {
                std::vector<std::string> behind;
                for (const auto& [diffusers, ldm] : ldm_of) {
                    behind.push_back(prefix + ldm);
                    behind.push_back(prefix + diffusers);
                }
                const auto of_both = match_modules(behind, unet, dialect),
                           of_single = match_modules(behind, file, dialect);
                for (const auto& [diffusers, ldm] : ldm_of) {
                    for (const auto& name : {prefix + diffusers, prefix + ldm}) {
                        wrong += of_both.tensors.at(name) == diffusers + ".weight" ? 0 : 1;
                        wrong += of_single.tensors.at(name) == "model.diffusion_model." + ldm + ".weight" ? 0 : 1;
                    }
                }
            }
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("kohya's words with dots and prefixes, and underscores behind what a base has not before its names")
{
    const auto kohya = adapter_dialect::kohya;
    const auto wan = base_of({"blocks.0.self_attn.q.weight", "blocks.0.ffn.0.weight", "blocks.1.ffn.0.weight"});
    for (const std::string prefix : {"diffusion_model.", "model.diffusion_model.", "transformer.", ""}) {
        CAPTURE(prefix);
        for (const auto dialect : {kohya, adapter_dialect::peft}) {
            CHECK(matched(prefix + "blocks.0.self_attn.q", wan, dialect) == "blocks.0.self_attn.q.weight");
            CHECK(matched(prefix + "blocks.1.ffn.0", wan, dialect) == "blocks.1.ffn.0.weight");
            CHECK(matched(prefix + "blocks.2.ffn.0", wan, dialect).empty());
        }
    }
    const auto match = match_modules(std::vector<std::string>{"diffusion_model.blocks.0.ffn.0"}, wan, kohya);
    CHECK(match.changes == std::vector<std::string>{"'diffusion_model.' taken off"});

    // transformers 5 saves a text encoder without "text_model."; other layers and towers are not these.
    const std::string fc1 = "encoder.layers.0.mlp.fc1.weight", under = "text_model_encoder_layers_0_mlp_fc1";
    const auto text = base_of({fc1, "encoder.layers.0.self_attn.q_proj.weight", "final_layer_norm.weight"});
    CHECK(matched("lora_te_" + under, text, kohya) == fc1);
    CHECK(matched("lora_te1_" + under, base_of({"text_model." + fc1}), kohya) == "text_model." + fc1);
    CHECK(match_modules(std::vector<std::string>{"lora_te_" + under}, text, kohya).changes
        == std::vector<std::string>{"underscores read as the base's dots", "'text_model_' taken off"});
    CHECK(matched("lora_te_text_model_encoder_layers_1_mlp_fc1", text, kohya).empty());
    CHECK(matched("lora_te_vision_model_encoder_layers_0_mlp_fc1", text, kohya).empty());
    CHECK(matched("lora_te_" + under, base_of({"layers.0.mlp.fc1.weight"}), kohya).empty()); // any encoder's, or none
    CHECK(matched("lora_te_" + under, base_of({"mlp.fc1.weight"}), kohya).empty());
    CHECK(matched("lora_te_" + under, base_of({"fc1.weight"}), kohya).empty());
}

TEST_CASE("a part of a UNet has Stable Diffusion's blocks, and levels of other sizes are not guessed")
{
    const auto kohya = adapter_dialect::kohya;
    const std::string q = "transformer_blocks.0.attn1.to_q", under = "transformer_blocks_0_attn1_to_q";
    const auto part = base_of({"model.diffusion_model.input_blocks.4.1." + q + ".weight"});
    CHECK(matched("lora_unet_down_blocks_1_attentions_0_" + under, part, kohya)
        == "model.diffusion_model.input_blocks.4.1." + q + ".weight");
    CHECK(matched("lora_unet_down_blocks_0_attentions_0_" + under, part, kohya).empty());
    CHECK(
        matched("lora_unet_input_blocks_4_1_" + under, base_of({"down_blocks.1.attentions.0." + q + ".weight"}), kohya)
        == "down_blocks.1.attentions.0." + q + ".weight");

    // A whole model of one residual block a level.
    const std::vector<std::string> one{"input_blocks.0.0.weight", "input_blocks.1.0.in_layers.2.weight",
        "input_blocks.2.0.op.weight", "input_blocks.3.0.in_layers.2.weight", "out.2.weight"};
    CHECK(matched("lora_unet_down_blocks_1_resnets_0_conv1", base_of(one), kohya) == one[3]);
    // Levels that differ: no number tells where a block is.
    CHECK(diffusion_names(base_of({"input_blocks.0.0.weight", "input_blocks.2.0.op.weight",
                              "input_blocks.5.0.op.weight", "out.2.weight"}))
            .empty());
    CHECK(diffusion_names(base_of({"conv_in.weight", "conv_out.weight", "down_blocks.0.resnets.0.conv1.weight",
                              "down_blocks.1.resnets.1.conv1.weight", "up_blocks.0.resnets.2.conv1.weight"}))
            .empty());
    CHECK(diffusion_names(base_of({"conv_in.weight", "conv_out.weight", "down_blocks.0.resnets.1.conv1.weight",
                              "up_blocks.0.resnets.1.conv1.weight"}))
            .empty()); // one more on the way up is what a level has
    CHECK(diffusion_names(base_of({"input_blocks.0.0.weight", "input_blocks.1.0.op.weight", "out.2.weight"})).empty());
    for (const char* odd : {"input_blocks.x.0.op.weight", "input_blocks.99.0.op.weight", "input_blocks..0.op.weight"}) {
        CHECK(diffusion_names(base_of({"input_blocks.0.0.weight", "input_blocks.3.0.op.weight", odd, "out.2.weight"}))
                .empty());
    }
    for (const char* more : {"down_blocks.0.resnets.2.conv1.weight", "up_blocks.0.resnets.3.conv1.weight"}) {
        CHECK(diffusion_names(base_of({more})).empty()); // more than Stable Diffusion's levels have
    }
    // Four residual blocks a level: the nearest convolution between levels tells, in whatever order names come.
    const std::vector<std::string> four{"input_blocks.0.0.weight", "input_blocks.10.0.op.weight",
        "input_blocks.5.0.op.weight", "input_blocks.6.0.in_layers.2.weight", "out.2.weight"};
    CHECK(matched("lora_unet_down_blocks_1_resnets_0_conv1", base_of(four), kohya) == four[3]);
    // Names that count no blocks, and modules within a module that has none.
    const auto odd = base_of({"conv_in.weight", "conv_in.bias", "conv_out.weight", "up_blocks.0.resnets.0.conv1.weight",
        "down_blocks.x.resnets.0.conv1.weight", "down_blocks.0.resnets.x.conv1.weight", "conv_in.inner.weight",
        "side_blocks.0.resnets.7.conv1.weight", "mid_block.attentions.0.weight", "mid_block.resnets.0.other.weight",
        ".weight"});
    CHECK(matched("lora_unet_output_blocks_0_0_in_layers_2", odd, kohya) == "up_blocks.0.resnets.0.conv1.weight");
    const diffusion_names known(odd);
    for (const char* module : {"input_blocks.0.0.inner", "middle_block.1", "middle_block.0.other"}) {
        CHECK(known.find(std::string("unet.") + module, adapter_dialect::diffusers).empty());
    }
    for (const char* module : {"conv_in.inner", "mid_block.attentions.0", "mid_block.resnets.0.other"}) {
        CHECK(known.find(std::string("unet.") + module, adapter_dialect::diffusers).size() == 1); // as it is
    }
    // Other models have blocks of these names.
    CHECK(diffusion_names(base_of({"controlnet.down_blocks.0.resnets.0.conv1.weight"})).empty());
    CHECK(diffusion_names(base_of({"xdown_blocks.0.resnets.0.conv1.weight"})).empty());
    CHECK(diffusion_names(base_of({"a.down_blocks.0.resnets.0.conv1.weight", "b.mid_block.resnets.0.conv1.weight"}))
            .empty()); // two
    CHECK(
        diffusion_names(base_of({"encoder.down_blocks.0.resnets.0.conv1.weight",
                            "encoder.mid_block.resnets.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight"}))
            .empty());
    CHECK(diffusion_names(base_of({"control_model.input_blocks.1.0.in_layers.2.weight"})).empty());
    CHECK(diffusion_names(base_of({"model.layers.0.self_attn.q_proj.weight"})).empty());
}

TEST_CASE("text encoders of single files are found by component, OpenCLIP's by its own names")
{
    const std::string clip = "conditioner.embedders.0.transformer.text_model.", layer = "encoder.layers.3.",
                      open = "conditioner.embedders.1.model.", block = open + "transformer.resblocks.3.";
    const auto base = base_of({clip + layer + "self_attn.q_proj.weight", clip + layer + "mlp.fc2.weight",
        block + "attn.in_proj_weight", block + "attn.in_proj_bias", block + "attn.out_proj.weight",
        block + "ln_1.weight", block + "ln_2.weight", block + "mlp.c_fc.weight", block + "mlp.c_proj.weight",
        open + "token_embedding.weight", open + "positional_embedding", open + "ln_final.weight",
        open + "text_projection", "model.diffusion_model.out.2.weight"});
    const auto kohya = adapter_dialect::kohya, dotted = adapter_dialect::diffusers;
    const diffusion_names names(base);
    const auto one = [&](const std::string& module, adapter_dialect dialect) {
        const auto found = names.find(module, dialect);
        REQUIRE(found.size() == 1);
        return found[0];
    };
    CHECK(matched("lora_te1_text_model_encoder_layers_3_mlp_fc2", base, kohya) == clip + layer + "mlp.fc2.weight");
    CHECK(matched("lora_te2_text_model_encoder_layers_3_mlp_fc2", base, kohya) == block + "mlp.c_proj.weight");
    CHECK(matched("text_encoder_2.text_model.encoder.layers.3.mlp.fc1", base, dotted) == block + "mlp.c_fc.weight");
    CHECK(matched("text_encoder_2.encoder.layers.3.mlp.fc1", base, dotted) == block + "mlp.c_fc.weight");
    CHECK(matched("text_encoder.encoder.layers.3.mlp.fc2", base, dotted) == clip + layer + "mlp.fc2.weight");
    CHECK(matched("lora_te2_text_model_encoder_layers_3_self_attn_out_proj", base, kohya)
        == block + "attn.out_proj.weight");
    CHECK(matched("text_encoder_2.text_model.embeddings.token_embedding", base, dotted)
        == open + "token_embedding.weight");
    CHECK(matched("text_encoder_2.text_model.embeddings.position_embedding", base, dotted)
        == open + "positional_embedding");
    CHECK(one("text_encoder_2.text_model.final_layer_norm", dotted).tensor == open + "ln_final.weight");
    CHECK(one("text_encoder_2.text_model.encoder.layers.3.layer_norm1", dotted).tensor == block + "ln_1.weight");
    CHECK(one("text_encoder_2.text_model.encoder.layers.3.layer_norm2", dotted).tensor == block + "ln_2.weight");
    CHECK(one("lora_te2_text_projection", kohya).transposed);
    const std::vector<std::string> projections{"q", "k", "v"};
    for (std::size_t i = 0; i < projections.size(); ++i) {
        const auto found = one("lora_te2_text_model_encoder_layers_3_self_attn_" + projections[i] + "_proj", kohya);
        CHECK(found.tensor == block + "attn.in_proj_weight");
        CHECK(found.block == i);
        CHECK(found.blocks == 3);
        CHECK(found.translated);
    }
    // Whole tensors by diffusers' names: only where one tensor alone is meant.
    CHECK(names.tensor_called("text_encoder_2.text_model.final_layer_norm.bias") == open + "ln_final.bias");
    CHECK(names.tensor_called("text_encoder_2.text_model.final_layer_norm.weight") == open + "ln_final.weight");
    CHECK(names.tensor_called("text_encoder_2.text_model.embeddings.position_embedding.weight")
        == open + "positional_embedding");
    for (const char* none : {"weight", "text_encoder_2.text_model.embeddings.position_embedding.bias",
             "text_encoder_2.text_projection.weight", "text_encoder_2.text_model.encoder.layers.9.layer_norm1.weight",
             "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj.bias"}) {
        CAPTURE(none);
        CHECK(names.tensor_called(none).empty());
    }
    const diffusion_names of_file(base_of({"model.diffusion_model.input_blocks.0.0.weight"}));
    CHECK(of_file.decides("text_encoder_2.anything", dotted));
    CHECK_FALSE(of_file.decides("vae.anything", dotted));
    CHECK_FALSE(names.decides("text_encoder_2.anything", dotted)); // no UNet of a single file
    CHECK(diffusion_names(base_of({})).tensor_called("unet.conv_in.weight").empty());
    // diffusers' processors and the list of an output stand for the module within.
    const auto attention = base_of({"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight"});
    const std::string at = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.";
    const diffusion_names of_attention(attention);
    for (const auto& [called, tensor] : {std::pair("processor.to_q", "to_q"), std::pair("processor.to_out", "to_out.0"),
             std::pair("to_out", "to_out.0"), std::pair("to_out.0", "to_out.0")}) {
        const auto found = of_attention.find(at + called, dotted);
        REQUIRE(found.size() == 1);
        CHECK(found[0].tensor == at.substr(5) + tensor + ".weight");
    }
    // Of CLIP's encoder what has no weight is no module.
    const diffusion_names bare_clip(base_of({"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
        "cond_stage_model.transformer..weight", "cond_stage_model.transformer.text_model.position_ids"}));
    CHECK(bare_clip.find("text_encoder.text_model.encoder.layers.0.mlp.fc1", dotted).empty());
    // Without a component either may be meant, where both have it.
    const std::string bare = "text_model.encoder.layers.3.mlp.fc2";
    const auto match = match_modules(std::vector<std::string>{bare}, base, adapter_dialect::peft);
    CHECK(match.unmatched == std::vector<std::string>{bare});
    CHECK(match.doubtful.at(bare)
        == std::vector<std::string>{clip + layer + "mlp.fc2.weight", block + "mlp.c_proj.weight"});
    // A name of the second encoder that it does not have is not the first one's.
    CHECK(matched("lora_te1_text_model_encoder_layers_4_mlp_fc2", base, kohya).empty());
    CHECK(matched("lora_te2_text_model_encoder_layers_3_self_attn_x_proj", base, kohya).empty());
}
