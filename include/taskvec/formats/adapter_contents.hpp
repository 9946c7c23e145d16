// An adapter of any dialect in one form, and what readers of dialects share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/lora.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/formats/gguf.hpp>
#include <taskvec/formats/peft.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Who wrote an adapter, by the names of its tensors.
enum class adapter_dialect : std::uint8_t {
    peft, ///< `MODULE.lora_A.weight`, at times with an adapter's name in it, and PEFT's prefix before it
    kohya, ///< kohya's scripts, A1111, LyCORIS: `lora_unet_MODULE.lora_down.weight`, `.alpha`; dots are underscores
    diffusers, ///< `unet.MODULE.lora.down.weight`, `MODULE_lora.down.weight`, `MODULE.lora_linear_layer.down.weight`,
               ///< and PEFT's names under those of its components
    mlx, ///< `MODULE.lora_a` (in×r) and `MODULE.lora_b` (r×out)
    gguf ///< llama.cpp's: a GGUF file with `blk.N.attn_q.weight.lora_a`, `.lora_b`
};

/// "PEFT", "kohya", "diffusers", "MLX", "GGUF".
[[nodiscard]] constexpr std::string_view to_string(adapter_dialect dialect) noexcept
{
    switch (dialect) {
    case adapter_dialect::peft: return "PEFT";
    case adapter_dialect::kohya: return "kohya";
    case adapter_dialect::diffusers: return "diffusers";
    case adapter_dialect::mlx: return "MLX";
    case adapter_dialect::gguf: break;
    }
    return "GGUF";
}

template <>
struct enum_words<adapter_dialect> {
    static constexpr std::array words{enum_word<adapter_dialect>{adapter_dialect::peft, "peft"},
        enum_word<adapter_dialect>{adapter_dialect::kohya, "kohya"},
        enum_word<adapter_dialect>{adapter_dialect::diffusers, "diffusers"},
        enum_word<adapter_dialect>{adapter_dialect::mlx, "mlx"},
        enum_word<adapter_dialect>{adapter_dialect::gguf, "gguf"}};
};

/// Which of the matrices that a model keeps as one parameter an update is of: experts of a layer, as transformers 5 has
/// them and PEFT adapts them (target_parameters).
struct parameter_slice {
    std::string parameter{}; ///< "layers.0.mlp.experts.down_proj"; empty: the module has a weight of its own
    std::size_t index = 0; ///< of the matrix, along the parameter's first extent
    std::size_t count = 1; ///< how many there are
};

/// What an adapter does to one module.
template <arithmetic_element T>
struct adapted_module {
    lora_update<T>
        update{}; ///< out×in; a convolution's `in` counts its kernel (in·kh·kw), an embedding's is its entries
    extents kernel{}; ///< of a convolution: its sides, {1, 1} included; empty otherwise
    bool paired_rows = false; ///< rows lie as llama.cpp keeps those of q and k: unpair_rows() puts them back
    bool embedding = false; ///< factored as PEFT does it: the weight is entries×dimensions
    std::vector<double> magnitude{}; ///< DoRA's, one for each output; empty: none
    lora_update<T> bias{}; ///< what lora_bias adds to the module's bias, as an update of 1×out; of rank 0: nothing
    dtype stored = dtype_of<T>; ///< of the factors in the file
    std::string kind = "LoRA"; ///< "LoRA", "DoRA", "AdaLoRA", "LoHa" or "LoKr": what the update was made of
    parameter_slice slice{}; ///< of an expert: the parameter that it is part of, and the module's name counts it
};

/// An adapter read from any dialect. Module names are the file's, without prefixes that say nothing of the module;
/// kohya's have underscores for dots: match_modules() finds the weights of a base that they mean. Experts that PEFT
/// adapts as one parameter are a module each, "layers.0.mlp.experts.3.down_proj".
template <arithmetic_element T>
struct adapter_contents {
    std::map<std::string, adapted_module<T>> modules{}; ///< by module
    std::map<std::string, peft_tensor> wholes{}; ///< tensors that were trained whole (modules_to_save, biases), by name
    std::map<std::string, peft_tensor> copies{}; ///< copies of base weights that an adapter carries, by name
    adapter_dialect dialect = adapter_dialect::peft; ///< that it was read from
    bool fan_in_fan_out = false; ///< square weights lie in×out, as its configuration says
    bool tied = false; ///< what it does to the embedding it does to the head tied to it (PEFT's ensure_weight_tying)
    nlohmann::json config = nlohmann::json::object(); ///< adapter_config.json, where there is one
    gguf_target target{}; ///< of a GGUF adapter: the model that it says it is for
    std::vector<std::string> notes{}; ///< what was taken for granted, a sentence each
    std::string label{}; ///< names the adapter in messages: its path
    std::filesystem::path file{}; ///< the tensors
};

namespace detail {

/// What diffusers calls the parts of a pipeline that adapters change: "unet.down_blocks.0.…" is a module of "unet".
inline constexpr std::array<std::string_view, 8> diffusers_components{"unet", "text_encoder", "text_encoder_2",
    "text_encoder_3", "transformer", "transformer_2", "prior", "image_encoder"};
/// The component that a module's name begins with; empty: none.
[[nodiscard]] inline std::string_view component_of(std::string_view module) noexcept
{
    const auto first = module.substr(0, module.find('.'));
    const bool known =
        std::find(diffusers_components.begin(), diffusers_components.end(), first) != diffusers_components.end();
    return known && first.size() < module.size() ? first : std::string_view();
}
/// What kohya's names begin with, and the component of diffusers' that is meant; empty: any.
struct kohya_component {
    std::string_view prefix{}, diffusers{};
};
inline constexpr std::array<kohya_component, 8> kohya_components{{{"lora_unet_", "unet"}, {"lora_te1_", "text_encoder"},
    {"lora_te2_", "text_encoder_2"}, {"lora_te3_", "text_encoder_3"}, {"lora_te_", "text_encoder"},
    {"lora_transformer_", "transformer"}, {"lycoris_", ""}, {"lora_prior_unet_", "prior"}}};
/// The one of a module's name; empty: it has none.
[[nodiscard]] constexpr kohya_component kohya_component_of(std::string_view module) noexcept
{
    for (const auto& one : kohya_components) {
        if (module.starts_with(one.prefix)) { return one; }
    }
    return {};
}
/// Where a module lies in a model's list of layers: "model.layers.3.self_attn.q_proj" in layer 3, as
/// "self_attn.q_proj".
struct layer_place {
    std::optional<std::int64_t> number{}; ///< nothing: it is in no layer
    std::string_view within{}; ///< its name there
    std::string_view list{}; ///< what the list is called: "model.layers"; empty: it is in no layer
};
[[nodiscard]] inline layer_place place_in_layers(std::string_view module)
{
    constexpr std::string_view list = "layers.";
    const auto dotted = module.find(".layers.");
    const auto at = module.starts_with(list) ? list.size()
        : dotted != module.npos              ? dotted + list.size() + 1
                                             : module.npos;
    const auto dot = at == module.npos ? module.npos : module.find('.', at);
    if (dot == module.npos) { return {std::nullopt, module, {}}; }
    std::int64_t number = 0;
    const auto digits = module.substr(at, dot - at);
    const auto [end, problem] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    if (problem != std::errc() || end != digits.data() + digits.size() || number < 0) {
        return {std::nullopt, module, {}};
    }
    return {number, module.substr(dot + 1), module.substr(0, at - 1)};
}
/// Whether MLX has an embedding under a module's name, whose factors lie entries×r and r×dimensions. No linear layer is
/// called so.
[[nodiscard]] inline bool is_mlx_embedding(std::string_view module) noexcept
{
    const auto last = module.substr(module.rfind('.') == module.npos ? 0 : module.rfind('.') + 1);
    for (const std::string_view name : {"embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings",
             "token_type_embeddings", "tok_embeddings", "embed_in", "embeddings", "embedding", "shared"}) {
        if (last == name) { return true; }
    }
    return false;
}
/// Whether a module read from MLX's files is an embedding under DoRA, whose magnitudes are one for each entry there:
/// its outputs are the entries, and its factors lie as a linear layer's.
template <arithmetic_element T>
[[nodiscard]] bool is_rescaled_by_entry(
    const adapter_contents<T>& adapter, const std::string& module, const adapted_module<T>& made) noexcept
{
    return adapter.dialect == adapter_dialect::mlx && !made.magnitude.empty() && !made.embedding
        && is_mlx_embedding(module);
}
/// The key in the header of a safetensors file under which diffusers keeps the configurations of what is in it: JSON,
/// each field under its component's name ("unet.lora_alpha").
inline constexpr const char* diffusers_metadata_key = "lora_adapter_metadata";

/// Refuses a file, by its name and a sentence of parts.
struct refusal {
    std::string file;

    template <class... Parts>
    [[noreturn]] void operator()(error_code code, const Parts&... parts) const
    {
        raise<format_error>(code, message(parts...), file);
    }
};

/// All entries of a stored factor in T, as rows of its first extent.
template <class T>
[[nodiscard]] matrix<T> read_flat_factor(const safetensors_file& file, const safetensors_entry& entry)
{
    safetensors_entry flat = entry;
    std::int64_t rest = 1;
    for (std::size_t i = 1; i < entry.shape.size(); ++i) { rest *= entry.shape[i]; }
    flat.shape = entry.shape.empty() ? extents{1, 1}
        : entry.shape.size() == 1    ? extents{1, entry.shape[0]}
                                     : extents{entry.shape[0], rest};
    return read_factor<T>(file, flat);
}

/// The number that a tensor of one entry holds, of a storage type or a whole one: some writers store α as I64. Nothing
/// where it holds more or fewer. Throws dtype_mismatch for a dtype of neither kind.
[[nodiscard]] inline std::optional<double> read_number(const safetensors_file& file, const safetensors_entry& entry)
{
    if (std::any_of(entry.shape.begin(), entry.shape.end(), [](auto side) { return side != 1; })) {
        return std::nullopt;
    }
    std::optional<double> value;
    const bool whole = visit_integer(entry.dtype, [&]<class N>(std::type_identity<N>) {
        N stored;
        std::memcpy(&stored, file.tensor(entry).data, sizeof stored);
        value = static_cast<double>(stored);
    });
    return whole ? value : read_flat_factor<double>(file, entry).data()[0];
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
