// What the architectures of common models say of names.
// SPDX-License-Identifier: Apache-2.0
#include "architectures.hpp"

#include "names.hpp"

#include <taskvec/formats/json.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <array>
#include <utility>

namespace tool {

namespace {

std::string model_type(const nlohmann::json& config)
{
    return taskvec::text_under(config, "model_type");
}

/// The first of `architectures`; empty where none is named.
std::string architecture(const nlohmann::json& config)
{
    const auto list = config.find("architectures");
    if (list == config.end() || !list->is_array() || list->empty() || !(*list)[0].is_string()) { return ""; }
    return (*list)[0].get<std::string>();
}

/// Whether an architecture has a head over its vocabulary.
bool has_language_head(std::string_view architecture)
{
    for (const std::string_view ending : {"LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "ForMaskedLM",
             "ForPreTraining", "DoubleHeadsModel", "MarianMTModel"}) {
        if (architecture.ends_with(ending)) { return true; }
    }
    return false;
}

/// Whether `ending` is a name, or its last parts.
bool ends_in(std::string_view name, std::string_view ending)
{
    return name == ending
        || (name.size() > ending.size() && name.ends_with(ending) && name[name.size() - ending.size() - 1] == '.');
}

std::string without_ending(std::string_view name, std::string_view ending)
{
    return std::string(name.substr(0, name.size() - ending.size()));
}

constexpr std::string_view weight = ".weight";

/// The modules that hold the input embeddings of language models, by their last parts; those of encoders that share
/// theirs with a decoder first.
constexpr std::array<std::string_view, 9> embeddings{"shared", "embed_tokens", "wte", "word_embeddings", "embed_in",
    "tok_embeddings", "tokens_embed", "word_embedding", "embeddings"};

/// The first of some tensors that is a matrix and called as an input embedding; nullptr where none is.
template <class Tensors, class Shape>
auto word_embedding(const Tensors& tensors, Shape shape_of) -> decltype(&*tensors.begin())
{
    for (const std::string_view ending : embeddings) {
        for (const auto& tensor : tensors) {
            const std::string_view name = tensor.name;
            if (!name.ends_with(weight) || !ends_in(name.substr(0, name.size() - weight.size()), ending)) { continue; }
            if (shape_of(tensor).size() == 2) { return &tensor; }
        }
    }
    return nullptr;
}

/// The head that goes with tensors of the file: heads with a transformation of their own store that, and a bias.
std::string head_by_tensors(const taskvec::const_model_ref& model)
{
    static constexpr std::array<std::pair<std::string_view, std::string_view>, 6> marks{
        {{"lm_head.dense.weight", "lm_head.decoder"},
            {"cls.predictions.transform.dense.weight", "cls.predictions.decoder"},
            {"generator_predictions.dense.weight", "generator_lm_head"}, {"vocab_transform.weight", "vocab_projector"},
            {"mlm_score.transform.dense.weight", "mlm_score.decoder"},
            {"predictions.dense.weight", "predictions.decoder"}}};
    for (const auto& [name, tensor] : model) {
        for (const auto& [mark, head] : marks) {
            if (ends_in(name, mark)) { return without_ending(name, mark) + std::string(head); }
        }
        if (name == "decoder.bias") { return "decoder"; } // ModernBERT
    }
    return "";
}

std::string head_by_configuration(const nlohmann::json& config)
{
    const auto type = model_type(config), name = architecture(config);
    if (!name.empty() && !has_language_head(name)) { return ""; }
    static constexpr std::array<std::pair<std::string_view, std::string_view>, 10> heads{
        {{"rwkv", "head"}, {"whisper", "proj_out"}, {"moonshine", "proj_out"}, {"xlnet", "lm_loss"},
            {"xlm", "pred_layer.proj"}, {"flaubert", "pred_layer.proj"}, {"gpt_neox_japanese", "embed_out"},
            {"trocr", "output_projection"}, {"biogpt", "output_projection"}, {"git", "output"}}};
    for (const auto& [known, head] : heads) {
        if (type == known) { return std::string(head); }
    }
    if (type == "gpt_neox") { return transformers_version(config).value_or(5) < 5 ? "embed_out" : "lm_head"; }
    if (type == "modernbert" || type == "modernbert-decoder") { return "decoder"; }
    return "lm_head";
}

/// The rows of a language model's embedding, by its configuration; nothing where that does not say.
std::optional<std::int64_t> vocabulary_size(const nlohmann::json& config)
{
    for (const auto* part : {&config, config.contains("text_config") ? &config["text_config"] : nullptr}) {
        for (const char* field : {"vocab_size", "n_words"}) {
            if (!part || !part->is_object()) { continue; }
            const auto size = part->find(field);
            if (size != part->end() && size->is_number_integer()) { return size->get<std::int64_t>(); }
        }
    }
    return std::nullopt;
}

/// The embedding of a model that has it under a name of its own: the one matrix beside its head with a row for each
/// word of the vocabulary.
std::string embedding_by_shape(
    const nlohmann::json& config, const taskvec::const_model_ref& model, const std::string& head)
{
    const auto rows = vocabulary_size(config);
    std::string found;
    for (const auto& [name, tensor] : model) {
        if (!rows || tensor.shape.size() != 2 || tensor.shape[0] != *rows || !name.ends_with(weight)) { continue; }
        const auto module = without_ending(name, weight);
        if (module == head || is_head_module(module) || model.find(module + ".bias")) { continue; }
        if (!found.empty()) { return ""; }
        found = module;
    }
    return found;
}

/// Whether the head of a model is its embedding.
bool heads_are_tied(const nlohmann::json& config, bool head_stored)
{
    for (const auto* part : {&config, config.contains("text_config") ? &config["text_config"] : nullptr}) {
        if (!part || !part->is_object() || !part->contains("tie_word_embeddings")) { continue; }
        return (*part)["tie_word_embeddings"] == true;
    }
    return !head_stored && has_language_head(architecture(config));
}

/// What transformers 5 puts in place of parts of names, one after the other: of their beginnings where "^" stands
/// before them. "#" is a number, which "#" in what takes the place repeats.
using replacements = std::vector<std::pair<std::string_view, std::string_view>>;
const replacements* replacements_of(const nlohmann::json& config)
{
    static const replacements vit{{"encoder.layer.", "layers."}, {"attention.query", "q_proj"},
        {"attention.key", "k_proj"}, {"attention.value", "v_proj"}, {"attention.output.dense", "attention.o_proj"},
        {"intermediate.dense", "mlp.fc1"}, {"output.dense", "mlp.fc2"}};
    static const replacements dinov2{{"attention.attention.query", "attention.q_proj"},
        {"attention.attention.key", "attention.k_proj"}, {"attention.attention.value", "attention.v_proj"},
        {"attention.output.dense", "attention.o_proj"}};
    static const replacements dinov3{{"^layer.", "model.layer."}};
    static const replacements swin{{"attention.self.query", "attention.q_proj"},
        {"attention.self.key", "attention.k_proj"}, {"attention.self.value", "attention.v_proj"},
        {"attention.output.dense", "attention.o_proj"}, {"intermediate.dense", "mlp.fc1"}, {"output.dense", "mlp.fc2"}};
    static const replacements segformer{{"encoder.patch_embeddings.#.", "stages.#.patch_embeddings."},
        {"encoder.block.#.", "stages.#.blocks."}, {"attention.self.query", "attention.q_proj"},
        {"attention.self.key", "attention.k_proj"}, {"attention.self.value", "attention.v_proj"},
        {"attention.self.sr", "attention.sequence_reduction.sequence_reduction"},
        {"attention.output.dense", "attention.o_proj"}, {"mlp.dense1", "mlp.fc1"}, {"mlp.dense2", "mlp.fc2"},
        {"decode_head.linear_c", "decode_head.linear_projections"}};
    // Language models that see: their towers are parts of "model", and the head is not.
    static const replacements llava{{"^language_model.lm_head", "lm_head"},
        {"^language_model.model.", "model.language_model."}, {"^vision_tower.", "model.vision_tower."},
        {"^model.vision_tower.vision_model.", "model.vision_tower."},
        {"^multi_modal_projector.", "model.multi_modal_projector."}};
    static const replacements mllama{{"^language_model.lm_head", "lm_head"},
        {"^language_model.model.", "model.language_model."}, {"^vision_model.", "model.vision_model."},
        {"^multi_modal_projector", "model.multi_modal_projector"}};
    static const replacements qwen2_vl{{"^visual.", "model.visual."},
        {"^model.layers.", "model.language_model.layers."},
        {"^model.embed_tokens", "model.language_model.embed_tokens"}};
    static const std::vector<std::pair<std::string_view, const replacements*>> of_types{{"vit", &vit}, {"deit", &vit},
        {"beit", &vit}, {"vit_mae", &vit}, {"vit_msn", &vit}, {"ijepa", &vit}, {"vivit", &vit},
        {"audio-spectrogram-transformer", &vit}, {"dinov2", &dinov2}, {"dinov2_with_registers", &dinov2},
        {"dinov3_vit", &dinov3}, {"swin", &swin}, {"segformer", &segformer}};
    static const std::vector<std::pair<std::string_view, const replacements*>> that_see{{"llava", &llava},
        {"llava_next", &llava}, {"llava_next_video", &llava}, {"llava_onevision", &llava}, {"vipllava", &llava},
        {"aria", &llava}, {"paligemma", &llava}, {"aya_vision", &llava}, {"got_ocr2", &llava}, {"gemma3", &llava},
        {"internvl", &llava}, {"mistral3", &llava}, {"mllama", &mllama}, {"qwen2_vl", &qwen2_vl},
        {"qwen2_5_vl", &qwen2_vl}};
    const auto type = model_type(config);
    const bool generates = architecture(config).ends_with("ForConditionalGeneration");
    for (const auto* list : {&of_types, generates ? &that_see : nullptr}) {
        for (std::size_t i = 0; list && i < list->size(); ++i) {
            if (type == (*list)[i].first) { return (*list)[i].second; }
        }
    }
    return nullptr;
}

/// Puts `to` in the place of the first `from` of a name, as of replacements.
void replace_in(std::string& name, std::string_view from, std::string_view to)
{
    if (from.starts_with('^')) {
        if (name.starts_with(from.substr(1))) { name.replace(0, from.size() - 1, to); }
        return;
    }
    const auto mark = from.find('#');
    if (mark == from.npos) {
        if (const auto at = name.find(from); at != name.npos) { name.replace(at, from.size(), to); }
        return;
    }
    const auto before = from.substr(0, mark), behind = from.substr(mark + 1);
    const auto at = name.find(before);
    if (at == name.npos) { return; }
    const auto first = at + before.size(), last = std::min(name.find_first_not_of("0123456789", first), name.size());
    if (first == last || name.compare(last, behind.size(), behind) != 0) { return; }
    std::string made(to);
    made.replace(made.find('#'), 1, name.substr(first, last - first));
    name.replace(at, last + behind.size() - at, made);
}

} // namespace

bool has_conv1d_layers(const nlohmann::json& config)
{
    // CTRL, their kin, has linear layers.
    static constexpr std::array<std::string_view, 5> types{
        "gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt-sw3"};
    return std::find(types.begin(), types.end(), model_type(config)) != types.end();
}
bool has_conv1d_layers(const std::filesystem::path& model)
{
    return has_conv1d_layers(config_beside(model));
}

bool is_head_module(std::string_view module)
{
    for (const std::string_view name : {"lm_head", "embed_out", "lm_head.decoder", "predictions.decoder",
             "generator_lm_head", "vocab_projector", "lm_loss", "pred_layer.proj", "output_projection"}) {
        if (ends_in(module, name)) { return true; }
    }
    return module == "decoder" || module == "proj_out"; // others have modules of these names within
}

bool is_head(std::string_view name)
{
    if (!name.ends_with(weight)) { return false; }
    const auto module = name.substr(0, name.size() - weight.size());
    return is_head_module(module) || ends_in(module, "output"); // the last: as Meta names it
}

std::optional<std::int64_t> vocabulary_rows(const std::vector<taskvec::tensor_spec>& specs)
{
    const auto* const embedding = word_embedding(specs, [](const taskvec::tensor_spec& spec) { return spec.shape; });
    return embedding ? std::optional<std::int64_t>(embedding->shape[0]) : std::nullopt;
}

bool is_embedding(std::string_view name)
{
    if (!name.ends_with(weight)) { return false; }
    const auto module = name.substr(0, name.size() - weight.size());
    return module.ends_with("embedding")
        || std::any_of(embeddings.begin(), embeddings.end(), [&](auto ending) { return module.ends_with(ending); });
}

tied_matrix tied_matrix_of(const nlohmann::json& config, const taskvec::const_model_ref& model)
{
    tied_matrix found;
    const auto stored = [&](const std::string& module) { return model.find(module + std::string(weight)) != nullptr; };
    const auto* const own = word_embedding(model, [](const auto& entry) { return entry.tensor.shape; });
    if (own) { found.embedding = without_ending(own->name, weight); }
    if (ends_in(found.embedding, "shared")) {
        const auto before = without_ending(found.embedding, "shared");
        for (const std::string_view part : {"encoder.", "decoder."}) {
            const auto copy = before + std::string(part) + "embed_tokens";
            const bool has_part = std::any_of(model.begin(), model.end(),
                [&](const auto& entry) { return entry.name.starts_with(before + std::string(part)); });
            if (has_part && !stored(copy)) { found.copies.push_back(copy); }
        }
    }
    const auto named = head_by_configuration(config);
    for (const auto& [name, tensor] : model) {
        if (!name.ends_with(weight) || tensor.shape.size() != 2) { continue; }
        const auto module = without_ending(name, weight);
        if (module != named && !is_head_module(module)) { continue; }
        found.head = module;
        found.head_stored = true;
    }
    if (found.head.empty()) { found.head = head_by_tensors(model); }
    if (found.head.empty()) { found.head = named; }
    if (found.embedding.empty() && has_language_head(architecture(config))) {
        found.embedding = embedding_by_shape(config, model, found.head);
    }
    found.tied = !found.embedding.empty() && !found.head.empty() && heads_are_tied(config, found.head_stored);
    return found;
}

bool is_read_past_its_module(const nlohmann::json& config, std::string_view module)
{
    if (model_type(config) == "whisper" && (ends_in(module, "encoder.conv1") || ends_in(module, "encoder.conv2"))) {
        return true; // their strides are asked for
    }
    for (const std::string_view name : {"embed_positions", "rel_embeddings", "query_position_embeddings", "iou_token",
             "mask_tokens", "no_mask_embed", "not_a_point_embed"}) {
        if (ends_in(module, name)) { return true; }
    }
    return false;
}

bool peft_joins_experts(const nlohmann::json& config)
{
    constexpr std::array<std::string_view, 28> types{"mixtral", "minimax", "minimax_m2", "Dots3NoteTextModel", "afmoe",
        "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite",
        "glm_moe_dsa", "glm4v_moe", "longcat_flash", "solar_open", "mellum", "qwen3_moe", "beam", "qwen3_omni_moe",
        "qwen3_omni_moe_thinker", "qwen3_omni_moe_text", "qwen3_next", "hunyuan_v1_moe", "flex_olmo", "olmoe",
        "exaone_moe", "cohere2_moe"};
    return std::find(types.begin(), types.end(), model_type(config)) != types.end();
}

bool is_router(const nlohmann::json& config, const taskvec::const_model_ref& model, std::string_view module)
{
    const auto dot = module.rfind('.');
    if (dot == module.npos || !(module.ends_with(".gate") || module.ends_with(".router"))) { return false; }
    if (model_type(config).starts_with("llama4")) { return false; } // a linear layer, under another name
    const auto experts = std::string(module.substr(0, dot)) + ".experts.";
    return std::any_of(model.begin(), model.end(), [&](const auto& entry) { return entry.name.starts_with(experts); });
}

std::optional<int> transformers_version(const nlohmann::json& config)
{
    const auto version = config.find("transformers_version");
    if (version == config.end() || !version->is_string()) { return std::nullopt; }
    const auto& text = version->get_ref<const std::string&>();
    if (text.empty() || text[0] < '0' || text[0] > '9') { return std::nullopt; }
    int major = 0;
    for (const char c : text) {
        if (c < '0' || c > '9' || major > 1000) { break; }
        major = 10 * major + (c - '0');
    }
    return major;
}

std::string name_in_transformers_5(const nlohmann::json& config, const std::string& module)
{
    if (model_type(config) == "gpt_neox" && module == "embed_out") { return "lm_head"; }
    const auto* const list = replacements_of(config);
    if (!list) { return module; }
    auto name = module;
    for (const auto& [from, to] : *list) { replace_in(name, from, to); }
    return name;
}

} // namespace tool
