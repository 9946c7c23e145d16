// What PEFT's configurations say of an adapter's modules: scalings, and kinds that are refused.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>
#include <taskvec/formats/peft.hpp>

#include <cmath>
#include <cstddef>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// Refuses configurations of kinds of adapters that are not read, by the kind's name.
inline void check_peft_type(const nlohmann::json& config, const std::string& file)
{
    const peft_fields fields(config, file);
    const auto* const type = fields.find("peft_type");
    if (!type || *type == "LORA" || *type == "LOHA" || *type == "LOKR" || *type == "ADALORA") { return; }
    const auto name = type->is_string() ? type->get<std::string>() : fields.shown(*type);
    const auto why = unmergeable_kind(name);
    raise<format_error>(error_code::adapter_unsupported,
        why.empty() ? message("peft_type ", name, ": another kind of adapter; ", fold_with_peft)
                    : message("peft_type ", name, ": ", why),
        file);
}
/// Refuses configurations of PEFT whose update is none that can be folded, each by name.
inline void check_foldable(const nlohmann::json& config, const std::string& file)
{
    const peft_fields fields(config, file);
    const auto refuse = [&](std::string_view what, std::string_view why) {
        raise<format_error>(error_code::adapter_unsupported, message(what, ": ", why, "; ", fold_with_peft), file);
    };
    check_peft_type(config, file);
    check_lora_initialization(fields, refuse);
    for (const auto& [field, why] : beyond_updates) {
        const bool parameters = std::string_view(field) == "target_parameters" && peft_type_of(config) == "LORA";
        if (!parameters && fields.says_something(field)) { refuse(field, why); }
    }
}

/// Refuses a module whose factors are of another kind than the configuration says: the update would be another one.
inline void check_kind(const peft_fields& fields, std::string_view name, const std::string& module,
    std::string_view kind, const std::string& where, bool biased)
{
    const auto wrong = [&](const std::string& what) {
        raise<format_error>(error_code::adapter_tensors, message("module '", module, "' ", what), where);
    };
    const auto* const type = fields.find("peft_type");
    const bool loha = type && *type == "LOHA", lokr = type && *type == "LOKR";
    const bool is_loha = kind == "LoHa", is_lokr = kind == "LoKr";
    if (type && (loha != is_loha || lokr != is_lokr)) {
        wrong(message("has the factors of ", kind, ", but ", name, " says peft_type ",
            type->template get<std::string>(), loha ? ", and its hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b" : "",
            lokr ? ", and its lokr_w1 and lokr_w2" : "", loha || lokr ? " are missing" : "",
            ": correct peft_type, or fetch the file that belongs to it"));
    }
    if (is_loha || is_lokr) { return; }
    if (biased && fields.find("lora_bias") && !fields.says_something("lora_bias")) {
        wrong(message("has a lora_B.bias, but ", name, " says lora_bias false: correct one of them"));
    }
    const bool promised = fields.says_something("use_dora");
    if (promised && kind != "DoRA") {
        wrong(message("has no lora_magnitude_vector, but ", name,
            " says use_dora, which rescales every module by one: save the adapter anew, or set use_dora to false if "
            "it was trained without"));
    }
    if (!promised && fields.find("use_dora") && kind == "DoRA") {
        wrong(message("has a lora_magnitude_vector, but ", name, " says use_dora false: correct one of them"));
    }
}

/// What a configuration of PEFT says of the modules of an adapter: adapter_config.json, or what diffusers keeps of one
/// in the header of its file.
class peft_settings {
public:
    /// `ordered` is the same configuration in file order, which decides between patterns. Messages call it `name`, and
    /// the file that it is in `file`. Throws what check_foldable() throws; format_error for fields of other types.
    peft_settings(
        nlohmann::json config, const nlohmann::ordered_json& ordered, std::string_view name, const std::string& file)
        : config_(std::move(config))
        , name_(name)
        , file_(file)
    {
        check_foldable(config_, file_);
        type_ = peft_type_of(config_);
        const peft_fields fields(config_, file_);
        if (type_ != "ADALORA") { // whose rank_pattern has masks
            ranks_ = peft_patterns(ordered, "rank_pattern", file_);
            alphas_ = peft_patterns(ordered, "alpha_pattern", file_);
        }
        const bool loha_or_lokr = type_ == "LOHA" || type_ == "LOKR";
        rank_ = fields.number("r", 8);
        alpha_ = fields.number(loha_or_lokr ? "alpha" : "lora_alpha", 8);
        if (type_ == "ADALORA") { // it divides by the rank that it began with, whatever was cut, and a little more
            initial_rank_ = fields.number("init_r", 12) + 1e-5;
            if (!(initial_rank_ >= 1)) {
                raise<format_error>(error_code::adapter_config,
                    message("init_r is ", peft_fields::shown(*fields.find("init_r")), "; expected a rank above 0"),
                    file_);
            }
        }
        root_ = !loha_or_lokr && fields.flag("use_rslora");
    }
    [[nodiscard]] const std::string& type() const noexcept { return type_; }
    [[nodiscard]] bool flag(const char* field) const { return peft_fields(config_, file_).flag(field); }
    /// Refuses factors of another kind than it says, of a file of tensors `where`.
    void check(const std::string& module, std::string_view kind, bool biased, const std::string& where) const
    {
        check_kind(peft_fields(config_, file_), name_, module, kind, where, biased);
    }
    /// The rank of a module.
    [[nodiscard]] double rank(const std::string& module) { return ranks_.find(module, rank_); }
    /// The scaling of a module with factors of this rank (0: of none), and an alpha in the file, where it has one.
    [[nodiscard]] double scaling(
        const std::string& module, std::size_t rank, const std::optional<double>& alpha, const std::string& where)
    {
        if (type_ == "ADALORA") { return (alpha_ > 0 ? alpha_ : static_cast<double>(rank)) / initial_rank_; }
        const double expected = ranks_.find(module, rank_), strength = alphas_.find(module, alpha_);
        if (rank > 0 && static_cast<double>(rank) != expected) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has rank ", rank, " but ", name_, " says ", expected), where);
        }
        if (alpha && *alpha != strength) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has the alpha ", *alpha, " but ", name_, " says ", strength,
                    ": correct one of them"),
                where);
        }
        return root_ ? strength / std::sqrt(expected) : strength / expected;
    }
    /// Throws format_error for a pattern that no module had.
    void check_used() const
    {
        ranks_.check_used("rank_pattern", file_);
        alphas_.check_used("alpha_pattern", file_);
    }

private:
    nlohmann::json config_;
    std::string name_, file_, type_;
    peft_patterns ranks_, alphas_;
    double rank_ = 8, alpha_ = 8, initial_rank_ = 0;
    bool root_ = false;
};

/// The configurations that diffusers keeps in the header of a file, by component; "" for one of a single model. `text`
/// is what stands under diffusers_metadata_key. Throws format_error.
[[nodiscard]] inline std::map<std::string, peft_settings> diffusers_settings(
    const std::string& text, const std::string& file)
{
    const std::string place = message(file, ": ", diffusers_metadata_key);
    const auto whole = parse_json(text, place);
    if (!whole.is_object()) { raise<format_error>(error_code::adapter_config, "is not a JSON object", place); }
    const auto ordered = nlohmann::ordered_json::parse(text); // in file order, which decides between patterns
    std::map<std::string, nlohmann::ordered_json> parts;
    for (const auto& [key, value] : ordered.items()) {
        const auto dot = key.find('.');
        parts[key.substr(0, dot == key.npos ? 0 : dot)][dot == key.npos ? key : key.substr(dot + 1)] = value;
    }
    std::map<std::string, peft_settings> settings;
    for (const auto& [component, fields] : parts) {
        settings.emplace(
            component, peft_settings(nlohmann::json::parse(fields.dump()), fields, diffusers_metadata_key, place));
    }
    return settings;
}

/// The configurations of an adapter, and which of them says what of a module.
class component_settings {
public:
    component_settings() = default;
    /// One for all modules.
    explicit component_settings(peft_settings all) { settings_.emplace("", std::move(all)); }
    /// One for each component, as diffusers_settings() has them.
    explicit component_settings(std::map<std::string, peft_settings> settings)
        : settings_(std::move(settings))
    { }

    /// What one configuration says of a module.
    struct of_module {
        peft_settings* settings = nullptr; ///< nullptr: none is about it
        std::string name{}; ///< what it calls the module
        explicit operator bool() const noexcept { return settings != nullptr; }
    };
    /// Refers to this.
    [[nodiscard]] of_module find(const std::string& module)
    {
        const std::string component(component_of(module));
        if (const auto place = settings_.find(component); place != settings_.end()) {
            return {&place->second, component.empty() ? module : module.substr(component.size() + 1)};
        }
        const bool one_for_all = settings_.size() == 1 && settings_.begin()->first.empty();
        return {one_for_all ? &settings_.begin()->second : nullptr, module};
    }
    /// Throws format_error for a pattern that no module had.
    void check_used() const
    {
        for (const auto& one : settings_) { one.second.check_used(); }
    }

private:
    std::map<std::string, peft_settings> settings_; // by component; "": of all
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
