// FLUX's two namings of one transformer: its authors' (single files, kohya, ComfyUI), and diffusers', whose q, k and v
// are tensors of their own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Makes modules of FLUX that an adapter has under its authors' names ("double_blocks.0.img_attn.qkv") those that a
/// base of diffusers has in their place, as many as one of them is there; of other bases nothing. The number of modules
/// that were translated. What does not fit the base is left as it is. Throws invalid_argument where the adapter has one
/// of the base's modules under both names.
///
///     split_flux(adapter, checkpoint.model());
///     const auto match = match_modules(adapter, checkpoint.model());
template <arithmetic_element T>
std::size_t split_flux(adapter_contents<T>& adapter, const const_model_ref& base);

namespace detail {

/// A layer of FLUX under its authors' name, with underscores for dots, and the layers that it is in diffusers: their
/// rows lie in it one behind the other.
struct flux_layer {
    std::string_view own{};
    std::array<std::string_view, 4> parts{}; ///< those behind the last are empty
    bool swapped = false; ///< shift and scale lie the other way round: its second half of rows is diffusers' first
};
/// Of the blocks of image and text.
inline constexpr std::array<flux_layer, 10> flux_double_layers{
    {{"img_attn_qkv", {"attn.to_q", "attn.to_k", "attn.to_v"}}, {"img_attn_proj", {"attn.to_out.0"}},
        {"img_mlp_0", {"ff.net.0.proj"}}, {"img_mlp_2", {"ff.net.2"}}, {"img_mod_lin", {"norm1.linear"}},
        {"txt_attn_qkv", {"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"}},
        {"txt_attn_proj", {"attn.to_add_out"}}, {"txt_mlp_0", {"ff_context.net.0.proj"}},
        {"txt_mlp_2", {"ff_context.net.2"}}, {"txt_mod_lin", {"norm1_context.linear"}}}};
/// Of the blocks of both together.
inline constexpr std::array<flux_layer, 3> flux_single_layers{
    {{"linear1", {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"}}, {"linear2", {"proj_out"}},
        {"modulation_lin", {"norm.linear"}}}};
/// Around them.
inline constexpr std::array<flux_layer, 10> flux_ends{{{"img_in", {"x_embedder"}}, {"txt_in", {"context_embedder"}},
    {"time_in_in_layer", {"time_text_embed.timestep_embedder.linear_1"}},
    {"time_in_out_layer", {"time_text_embed.timestep_embedder.linear_2"}},
    {"vector_in_in_layer", {"time_text_embed.text_embedder.linear_1"}},
    {"vector_in_out_layer", {"time_text_embed.text_embedder.linear_2"}},
    {"guidance_in_in_layer", {"time_text_embed.guidance_embedder.linear_1"}},
    {"guidance_in_out_layer", {"time_text_embed.guidance_embedder.linear_2"}}, {"final_layer_linear", {"proj_out"}},
    {"final_layer_adaLN_modulation_1", {"norm_out.linear"}, true}}};

/// The modules of diffusers' that one of FLUX's is.
struct flux_parts {
    std::vector<std::string> modules{}; ///< in the order of their rows; empty: none of FLUX's
    bool swapped = false; ///< as flux_layer has it
};
[[nodiscard]] inline flux_parts flux_parts_of(std::string_view module)
{
    for (const std::string_view before : {"lora_unet_", "lora_transformer_", "lycoris_", "model.diffusion_model.",
             "diffusion_model.", "transformer.", "unet."}) {
        if (!module.starts_with(before)) { continue; }
        module.remove_prefix(before.size());
        break;
    }
    std::string name(module);
    std::replace(name.begin(), name.end(), '.', '_');
    const auto parts_of = [](const auto& layers, std::string_view own, const std::string& block) {
        flux_parts found;
        for (const auto& layer : layers) {
            if (own != layer.own) { continue; }
            for (const auto part : layer.parts) {
                if (!part.empty()) { found.modules.push_back(block + std::string(part)); }
            }
            found.swapped = layer.swapped;
        }
        return found;
    };
    for (const auto& [own, of_diffusers] :
        {std::pair<std::string_view, std::string>("double_blocks_", "transformer_blocks."),
            std::pair<std::string_view, std::string>("single_blocks_", "single_transformer_blocks.")}) {
        if (!name.starts_with(own)) { continue; }
        const char *const first = name.data() + own.size(), *const last = name.data() + name.size();
        std::uint32_t number = 0;
        const auto [behind, problem] = std::from_chars(first, last, number);
        if (problem != std::errc() || behind == last || *behind != '_') { return {}; }
        const std::string_view within(behind + 1, static_cast<std::size_t>(last - behind - 1));
        const auto block = of_diffusers + std::to_string(number) + ".";
        return own.starts_with("double") ? parts_of(flux_double_layers, within, block)
                                         : parts_of(flux_single_layers, within, block);
    }
    return parts_of(flux_ends, name, "");
}

/// What stands before the names of a transformer's modules in a base that has them as diffusers does; nothing: it has
/// none, or several.
[[nodiscard]] inline std::optional<std::string> flux_prefix(const const_model_ref& base)
{
    std::set<std::string> found;
    for (const auto& [name, tensor] : base) {
        for (const std::string_view list : {"single_transformer_blocks.", "transformer_blocks."}) {
            const auto at = name.find(list);
            if (at == name.npos || (at > 0 && name[at - 1] != '.')) { continue; }
            found.insert(name.substr(0, at));
            break;
        }
    }
    return found.size() == 1 ? std::optional(*found.begin()) : std::nullopt;
}

/// Some rows of what an adapter does to a module, as what it does to another.
template <arithmetic_element T>
[[nodiscard]] adapted_module<T> rows_of(
    const adapted_module<T>& made, std::size_t first, std::size_t count, std::size_t shift)
{
    adapted_module<T> one = made;
    const std::size_t rank = made.update.rank();
    const auto from = [&](std::size_t row) { return first + (row + shift) % count; };
    one.update.b = matrix<T>(count, rank, matrix_order::row_major);
    for (std::size_t i = 0; i < count; ++i) {
        for (std::size_t k = 0; k < rank; ++k) { one.update.b(i, k) = made.update.b(from(i), k); }
    }
    if (made.magnitude.empty()) { return one; }
    one.magnitude.resize(count);
    for (std::size_t i = 0; i < count; ++i) { one.magnitude[i] = made.magnitude[from(i)]; }
    return one;
}

} // namespace detail

template <arithmetic_element T>
std::size_t split_flux(adapter_contents<T>& adapter, const const_model_ref& base)
{
    const auto prefix = detail::flux_prefix(base);
    if (!prefix) { return 0; }
    constexpr std::string_view suffix = ".weight";
    std::map<std::string, adapted_module<T>> split;
    std::size_t translated = 0;
    const auto put = [&](const std::string& name, const std::string& module, adapted_module<T> made) {
        if (split.contains(name) || (name != module && adapter.modules.contains(name))) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message("module '", module, "' of ", adapter.label, " and another of it both mean '", name,
                    "': leave one of them out"));
        }
        split.emplace(name, std::move(made));
    };
    for (auto& [module, made] : adapter.modules) {
        const auto parts = detail::flux_parts_of(module);
        std::vector<std::size_t> counts;
        std::size_t rows = 0;
        bool fits = !base.find(module + std::string(suffix)) && made.kernel.empty() && !made.embedding
            && made.bias.rank() == 0 && made.slice.parameter.empty();
        for (const auto& part : parts.modules) {
            const auto* const there = base.find(*prefix + part + std::string(suffix));
            fits = fits && there && there->shape.size() == 2
                && static_cast<std::size_t>(there->shape[1]) == made.update.in();
            if (!fits) { break; }
            counts.push_back(static_cast<std::size_t>(there->shape[0]));
            rows += counts.back();
        }
        if (!fits || parts.modules.empty() || rows != made.update.out() || (parts.swapped && rows % 2 != 0)) {
            put(module, module, made);
            continue;
        }
        ++translated;
        for (std::size_t i = 0, first = 0; i < counts.size(); first += counts[i++]) {
            put(*prefix + parts.modules[i], module,
                detail::rows_of(made, first, counts[i], parts.swapped ? rows / 2 : 0));
        }
    }
    if (translated > 0) { adapter.modules = std::move(split); }
    return translated;
}

} // namespace taskvec::inline TASKVEC_ABI
