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

[[nodiscard]] inline adapter_role role_of(std::string_view name)
{
    using role = adapter_role;
    using dialect = adapter_dialect;
    struct ending {
        std::string_view text;
        role::what what;
        std::optional<dialect> of;
    };
    static const std::array<ending, 40> endings{{{".lora_E", role::singular, dialect::peft},
        {".lora_A.weight", role::a, dialect::peft}, {".lora_B.weight", role::b, dialect::peft},
        {".lora_embedding_A", role::embedding_a, dialect::peft},
        {".lora_embedding_B", role::embedding_b, dialect::peft}, {".lora_B.bias", role::bias, dialect::peft},
        {".lora_magnitude_vector.weight", role::magnitude, dialect::peft},
        {".lora_magnitude_vector", role::magnitude, dialect::peft}, {".lora_down.weight", role::a, dialect::kohya},
        {".lora_up.weight", role::b, dialect::kohya}, {".lora_mid.weight", role::mid, dialect::kohya},
        {".dora_scale", role::magnitude, dialect::kohya}, {".alpha", role::alpha, {}},
        {".lora.down.weight", role::a, dialect::diffusers}, {".lora.up.weight", role::b, dialect::diffusers},
        {"_lora.down.weight", role::a, dialect::diffusers}, {"_lora.up.weight", role::b, dialect::diffusers},
        {".lora_linear_layer.down.weight", role::a, dialect::diffusers},
        {".lora_linear_layer.up.weight", role::b, dialect::diffusers}, {".lora_a", role::a, dialect::mlx},
        {".lora_b", role::b, dialect::mlx}, {".hada_w1_a", role::hada_w1_a, {}}, {".hada_w1_b", role::hada_w1_b, {}},
        {".hada_w2_a", role::hada_w2_a, {}}, {".hada_w2_b", role::hada_w2_b, {}}, {".lokr_w1", role::lokr_w1, {}},
        {".lokr_w1_a", role::lokr_w1_a, {}}, {".lokr_w1_b", role::lokr_w1_b, {}}, {".lokr_w2", role::lokr_w2, {}},
        {".lokr_w2_a", role::lokr_w2_a, {}}, {".lokr_w2_b", role::lokr_w2_b, {}}, {".hada_t1", role::hada_t1, {}},
        {".hada_t2", role::hada_t2, {}}, {".lokr_t2", role::lokr_t2, {}},
        {".base_layer.weight", role::base_copy, dialect::peft}, {".base_layer.bias", role::trained_bias, dialect::peft},
        {".lora_A", role::a, dialect::peft}, {".lora_B", role::b, dialect::peft},
        {".lora_up.bias", role::bias, dialect::kohya}, {".lora_linear_layer.alpha", role::alpha, dialect::diffusers}}};
    const auto plain = [&](std::string_view text) -> std::optional<role> {
        const ending* best = nullptr;
        for (const auto& one : endings) {
            if (text.size() > one.text.size() && text.ends_with(one.text)
                && (!best || one.text.size() > best->text.size())) {
                best = &one;
            }
        }
        if (!best) { return std::nullopt; }
        return role{best->what, std::string(text.substr(0, text.size() - best->text.size())), {}, best->of};
    };
    if (name.find(".original_module.") != name.npos || name.find(".lora_velora_embed") != name.npos) {
        return {role::ignored, std::string(name), {}, {}};
    }
    if (const auto at = name.find(".modules_to_save."); at != name.npos) {
        const auto rest = name.substr(at + 17);
        const auto dot = rest.find('.');
        return {role::whole,
            std::string(name.substr(0, at + 1)) + std::string(rest.substr(dot == rest.npos ? 0 : dot + 1)),
            std::string(dot == rest.npos ? "" : rest.substr(0, dot)), dialect::peft};
    }
    if (auto found = plain(name)) {
        if (found->dialect == dialect::diffusers) { found->module = current_module(std::move(found->module)); }
        return *found;
    }
    // With the adapter's name in it: MODULE.lora_A.default.weight, MODULE.lora_embedding_A.default, …
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
        if (auto found = plain(without)) {
            found->adapter = std::string(rest.substr(0, dot));
            return *found;
        }
    }
    const bool like_a_factor = name.find("lora_") != name.npos || name.find(".lora.") != name.npos
        || name.find(".hada_") != name.npos || name.find(".lokr_") != name.npos || name.find(".oft_") != name.npos
        || name.find(".vera_") != name.npos || name.find("_lora1.") != name.npos || name.find("_lora2.") != name.npos
        || name.find(".diff") != name.npos;
    if (like_a_factor && !name.starts_with("lora_unet_") && !name.starts_with("lora_te")) {
        return {role::unknown, std::string(name), {}, {}};
    }
    return {like_a_factor ? role::unknown : role::whole, std::string(name), {}, {}};
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
