// What a tensor of an adapter is, and of which module, from its name in any dialect.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// One tensor's part in an adapter, from its name.
struct adapter_role {
    enum what {
        whole,
        a,
        b,
        embedding_a,
        embedding_b,
        magnitude,
        bias,
        trained_bias,
        alpha,
        mid,
        base_copy,
        ignored,
        hada_w1_a,
        hada_w1_b,
        hada_w2_a,
        hada_w2_b,
        hada_t1,
        hada_t2,
        lokr_w1,
        lokr_w1_a,
        lokr_w1_b,
        lokr_w2,
        lokr_w2_a,
        lokr_w2_b,
        lokr_t2,
        singular,
        unknown
    } role = whole;
    std::string module{}, adapter{}; ///< the adapter's name, where the key has one
    std::optional<adapter_dialect> dialect{}; ///< nothing: it may be any
};

/// What an update is made of.
enum class factor_form { lora, embedding, loha, lokr };

/// The form that a tensor is a factor of; nothing: it stands beside factors, or is none.
[[nodiscard]] constexpr std::optional<factor_form> form_of(adapter_role::what role) noexcept
{
    switch (role) {
    case adapter_role::a:
    case adapter_role::b: return factor_form::lora;
    case adapter_role::embedding_a:
    case adapter_role::embedding_b: return factor_form::embedding;
    case adapter_role::hada_w1_a:
    case adapter_role::hada_w1_b:
    case adapter_role::hada_w2_a:
    case adapter_role::hada_w2_b:
    case adapter_role::hada_t1:
    case adapter_role::hada_t2: return factor_form::loha;
    case adapter_role::lokr_w1:
    case adapter_role::lokr_w1_a:
    case adapter_role::lokr_w1_b:
    case adapter_role::lokr_w2:
    case adapter_role::lokr_w2_a:
    case adapter_role::lokr_w2_b:
    case adapter_role::lokr_t2: return factor_form::lokr;
    default: return std::nullopt;
    }
}

/// A module as diffusers calls it today: without ".processor", the list that to_out is by its first, and the attention
/// of text encoders as transformers has it.
[[nodiscard]] inline std::string current_module(std::string module)
{
    if (const auto at = module.find(".processor."); at != module.npos) { module.erase(at, 10); }
    const bool encoder = module.starts_with("text_encoder");
    struct projection {
        std::string_view old, unet, text;
    };
    constexpr std::array<projection, 4> projections{{{".to_q", ".to_q", ".q_proj"}, {".to_k", ".to_k", ".k_proj"},
        {".to_v", ".to_v", ".v_proj"}, {".to_out", ".to_out.0", ".out_proj"}}};
    for (const auto& one : projections) {
        if (!module.ends_with(one.old)) { continue; }
        module.replace(module.size() - one.old.size(), one.old.size(), encoder ? one.text : one.unet);
        break;
    }
    return module;
}

/// What the end of a tensor's name says.
struct role_ending {
    std::string_view text{};
    adapter_role::what role = adapter_role::unknown;
    std::optional<adapter_dialect> dialect{}; ///< nothing: it may be any
};
inline constexpr std::array<role_ending, 40> role_endings{{{".lora_E", adapter_role::singular, adapter_dialect::peft},
    {".lora_A.weight", adapter_role::a, adapter_dialect::peft},
    {".lora_B.weight", adapter_role::b, adapter_dialect::peft},
    {".lora_embedding_A", adapter_role::embedding_a, adapter_dialect::peft},
    {".lora_embedding_B", adapter_role::embedding_b, adapter_dialect::peft},
    {".lora_B.bias", adapter_role::bias, adapter_dialect::peft},
    {".lora_magnitude_vector.weight", adapter_role::magnitude, adapter_dialect::peft},
    {".lora_magnitude_vector", adapter_role::magnitude, adapter_dialect::peft},
    {".lora_down.weight", adapter_role::a, adapter_dialect::kohya},
    {".lora_up.weight", adapter_role::b, adapter_dialect::kohya},
    {".lora_mid.weight", adapter_role::mid, adapter_dialect::kohya},
    {".dora_scale", adapter_role::magnitude, adapter_dialect::kohya}, {".alpha", adapter_role::alpha, {}},
    {".lora.down.weight", adapter_role::a, adapter_dialect::diffusers},
    {".lora.up.weight", adapter_role::b, adapter_dialect::diffusers},
    {"_lora.down.weight", adapter_role::a, adapter_dialect::diffusers},
    {"_lora.up.weight", adapter_role::b, adapter_dialect::diffusers},
    {".lora_linear_layer.down.weight", adapter_role::a, adapter_dialect::diffusers},
    {".lora_linear_layer.up.weight", adapter_role::b, adapter_dialect::diffusers},
    {".lora_a", adapter_role::a, adapter_dialect::mlx}, {".lora_b", adapter_role::b, adapter_dialect::mlx},
    {".hada_w1_a", adapter_role::hada_w1_a, {}}, {".hada_w1_b", adapter_role::hada_w1_b, {}},
    {".hada_w2_a", adapter_role::hada_w2_a, {}}, {".hada_w2_b", adapter_role::hada_w2_b, {}},
    {".lokr_w1", adapter_role::lokr_w1, {}}, {".lokr_w1_a", adapter_role::lokr_w1_a, {}},
    {".lokr_w1_b", adapter_role::lokr_w1_b, {}}, {".lokr_w2", adapter_role::lokr_w2, {}},
    {".lokr_w2_a", adapter_role::lokr_w2_a, {}}, {".lokr_w2_b", adapter_role::lokr_w2_b, {}},
    {".hada_t1", adapter_role::hada_t1, {}}, {".hada_t2", adapter_role::hada_t2, {}},
    {".lokr_t2", adapter_role::lokr_t2, {}}, {".base_layer.weight", adapter_role::base_copy, adapter_dialect::peft},
    {".base_layer.bias", adapter_role::trained_bias, adapter_dialect::peft},
    {".lora_A", adapter_role::a, adapter_dialect::peft}, {".lora_B", adapter_role::b, adapter_dialect::peft},
    {".lora_up.bias", adapter_role::bias, adapter_dialect::kohya},
    {".lora_linear_layer.alpha", adapter_role::alpha, adapter_dialect::diffusers}}};

/// By the longest ending that is known; nothing: the name has none of them.
[[nodiscard]] inline std::optional<adapter_role> role_by_ending(std::string_view name)
{
    const role_ending* best = nullptr;
    for (const auto& one : role_endings) {
        const bool has = name.size() > one.text.size() && name.ends_with(one.text);
        if (has && (!best || one.text.size() > best->text.size())) { best = &one; }
    }
    if (!best) { return std::nullopt; }
    return adapter_role{best->role, std::string(name.substr(0, name.size() - best->text.size())), {}, best->dialect};
}

/// Of a module that PEFT has saved whole: MODULE.modules_to_save.ADAPTER.weight; nothing: it is no such name.
[[nodiscard]] inline std::optional<adapter_role> role_of_saved_module(std::string_view name)
{
    constexpr std::string_view part = ".modules_to_save.";
    const auto at = name.find(part);
    if (at == name.npos) { return std::nullopt; }
    const auto rest = name.substr(at + part.size());
    const auto dot = rest.find('.');
    const bool named = dot != rest.npos;
    return adapter_role{adapter_role::whole,
        std::string(name.substr(0, at + 1)) + std::string(named ? rest.substr(dot + 1) : rest),
        std::string(named ? rest.substr(0, dot) : std::string_view()), adapter_dialect::peft};
}

/// With the adapter's name in it: MODULE.lora_A.default.weight, MODULE.lora_embedding_A.default, …
[[nodiscard]] inline std::optional<adapter_role> role_with_adapter(std::string_view name)
{
    for (const std::string_view part :
        {".lora_A.", ".lora_B.", ".lora_E.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.",
            ".hada_w1_a.", ".hada_w1_b.", ".hada_w2_a.", ".hada_w2_b.", ".lokr_w1.", ".lokr_w1_a.", ".lokr_w1_b.",
            ".lokr_w2.", ".lokr_w2_a.", ".lokr_w2_b.", ".hada_t1.", ".hada_t2.", ".lokr_t2."}) {
        const auto at = name.rfind(part);
        if (at == name.npos) { continue; }
        const auto rest = name.substr(at + part.size());
        const auto dot = rest.find('.');
        const auto without = std::string(name.substr(0, at + part.size() - 1))
            + std::string(dot == rest.npos ? std::string_view() : rest.substr(dot));
        if (auto found = role_by_ending(without)) {
            found->adapter = std::string(rest.substr(0, dot));
            return found;
        }
    }
    return std::nullopt;
}

/// Whether a name that is none of those above is one of an adapter all the same, of a kind that is not known.
[[nodiscard]] inline bool looks_like_a_factor(std::string_view name) noexcept
{
    for (const std::string_view part :
        {"lora_", ".lora.", ".hada_", ".lokr_", ".oft_", ".vera_", "_lora1.", "_lora2.", ".diff"}) {
        if (name.find(part) != name.npos) { return true; }
    }
    return false;
}

/// A tensor's part in an adapter, from its name without PEFT's prefix.
[[nodiscard]] inline adapter_role role_of(std::string_view name)
{
    if (name.find(".original_module.") != name.npos || name.find(".lora_velora_embed") != name.npos) {
        return {adapter_role::ignored, std::string(name), {}, {}};
    }
    if (auto found = role_of_saved_module(name)) { return *std::move(found); }
    if (auto found = role_by_ending(name)) {
        if (found->dialect == adapter_dialect::diffusers) { found->module = current_module(std::move(found->module)); }
        return *std::move(found);
    }
    if (auto found = role_with_adapter(name)) { return *std::move(found); }
    return {looks_like_a_factor(name) ? adapter_role::unknown : adapter_role::whole, std::string(name), {}, {}};
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
