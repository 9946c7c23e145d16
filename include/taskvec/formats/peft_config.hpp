// What adapter_config.json of PEFT says: its fields, the modules that it means, and what it says that is more than an
// update of weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>
#include <taskvec/formats/python_pattern.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The file names of an adapter directory, and what PEFT puts before the names of modules.
inline constexpr std::string_view peft_config_name = "adapter_config.json";
/// Of the file that has the factors.
inline constexpr std::string_view peft_model_name = "adapter_model.safetensors";
/// What PEFT wrote before 2024: read as PyTorch files are (formats/pytorch.hpp).
inline constexpr std::string_view peft_pickle_name = "adapter_model.bin";
/// Stands before the name of every module.
inline constexpr std::string_view peft_prefix = "base_model.model.";

/// What follows the name of an adapted module in the name of the copy of its base weight that an adapter may carry.
inline constexpr std::string_view peft_base_weight = ".base_layer.weight";
/// What follows it in the name of the bias of an adapted module, which was trained.
inline constexpr std::string_view peft_base_bias = ".base_layer.bias";
/// The head that PEFT ties to the embedding (ensure_weight_tying); of other names it ties none.
inline constexpr std::string_view peft_tied_head = "lm_head";

/// Whether a tensor is of a module that modules_to_save calls `module`: PEFT takes every module whose name ends so
/// ("classifier" is pre_classifier too), with all that is within it.
[[nodiscard]] inline bool is_within_module(std::string_view tensor, std::string_view module)
{
    return !module.empty() && tensor.find(std::string(module) + ".") != tensor.npos;
}

/// True when one of the modules that a configuration lists as saved whole is on the path of this tensor.
[[nodiscard]] inline bool belongs_to_saved_module(std::string_view name, const nlohmann::json& config)
{
    const auto list = config.find("modules_to_save");
    return list != config.end() && list->is_array() && std::any_of(list->begin(), list->end(), [&](const auto& module) {
        return module.is_string() && is_within_module(name, module.template get_ref<const std::string&>());
    });
}

namespace detail {

/// What messages advise for an adapter that PEFT alone can put into its base.
inline constexpr std::string_view fold_with_peft =
    "fold it into its base with PEFT (merge_and_unload) and go on with the model";

/// PEFT's rule for rank_pattern and alpha_pattern: the first key, in file order, that as a regular expression matches
/// the module's whole name or a dotted end of it.
class peft_patterns {
public:
    struct pattern {
        std::string key;
        python_pattern matcher;
        double value = 0;
        bool used = false;
    };

    peft_patterns() = default;
    /// The field of a configuration in file order, which decides between patterns.
    peft_patterns(const nlohmann::ordered_json& config, const char* field, const std::string& file)
    {
        const auto object = config.find(field);
        if (object == config.end() || object->is_null()) { return; }
        if (!object->is_object()) {
            raise<format_error>(error_code::adapter_config, message(field, " is not an object"), file);
        }
        for (const auto& [key, value] : object->items()) {
            if (!value.is_number()) {
                raise<format_error>(error_code::adapter_config,
                    message(field, " gives '", key, "' something that is not a number"), file);
            }
            patterns_.push_back({key, compile(key, field, file), value.template get<double>(), false});
        }
    }
    /// The value for a module, or `otherwise`.
    [[nodiscard]] double find(const std::string& module, double otherwise)
    {
        bool found = false;
        for (auto& one : patterns_) {
            if (!one.matcher.begins(module)) { continue; }
            one.used = true;
            if (!found) {
                otherwise = one.value;
                found = true;
            }
        }
        return otherwise;
    }
    /// A key that matched no module is a mistake that PEFT does not notice.
    void check_used(std::string_view field, const std::string& file) const
    {
        for (const auto& one : patterns_) {
            if (!one.used) {
                raise<format_error>(error_code::adapter_config,
                    message(field, " has the key '", one.key,
                        "', which matches no module of the adapter; remove or correct it"),
                    file);
            }
        }
    }

private:
    static python_pattern compile(const std::string& key, std::string_view field, const std::string& file)
    {
        return python_pattern("(.*\\.)?(" + key + ")$",
            {file, message(field, " has the key '", key, "'"),
                "write a key for each of the modules that are meant, of their names alone"});
    }
    std::vector<pattern> patterns_;
};

/// Whether a value is a list of texts, as configurations name modules and parameters.
[[nodiscard]] inline bool is_list_of_texts(const nlohmann::json& value)
{
    return value.is_array() && std::all_of(value.begin(), value.end(), [](const auto& one) { return one.is_string(); });
}

/// Fields of adapter_config.json, read with a complaint that names the file and the field.
class peft_fields {
public:
    peft_fields(const nlohmann::json& config, const std::string& file)
        : config_(config)
        , file_(file)
    { }
    [[nodiscard]] const nlohmann::json* find(const char* field) const
    {
        const auto place = config_.find(field);
        return place == config_.end() || place->is_null() ? nullptr : &*place;
    }
    [[nodiscard]] bool flag(const char* field) const
    {
        const auto* value = find(field);
        if (value && !value->is_boolean()) {
            raise<format_error>(
                error_code::adapter_config, message(field, " is ", shown(*value), "; expected true or false"), file_);
        }
        return value && value->get<bool>();
    }
    /// `otherwise` where the field is absent; null is no number.
    [[nodiscard]] double number(const char* field, double otherwise) const
    {
        const auto value = config_.find(field);
        if (value == config_.end()) { return otherwise; }
        if (!value->is_number()) {
            raise<format_error>(
                error_code::adapter_config, message(field, " is ", shown(*value), "; expected a number"), file_);
        }
        return value->get<double>();
    }
    /// Absent, null, a text or a list of texts, as PEFT names modules.
    void check_names(const char* field) const
    {
        const auto* value = find(field);
        if (value && !value->is_string() && !is_list_of_texts(*value)) {
            raise<format_error>(error_code::adapter_config,
                message(field, " is ", shown(*value), "; expected names of modules, or a regular expression"), file_);
        }
    }
    /// A value as JSON, shortened for a message.
    [[nodiscard]] static std::string shown(const nlohmann::json& value)
    {
        const auto text = value.dump(-1, ' ', true);
        return text.size() <= 80 ? text : text.substr(0, 80) + "…";
    }
    /// Present and saying something: not null, false, "", [] or {}.
    [[nodiscard]] bool says_something(const char* field) const
    {
        const auto* value = find(field);
        return value && !(value->is_boolean() && !value->get<bool>())
            && !(value->is_string() && value->get_ref<const std::string&>().empty())
            && !((value->is_array() || value->is_object()) && value->empty());
    }

private:
    const nlohmann::json& config_;
    const std::string& file_;
};

/// adapter_config.json as it was read. Throws what read_text_file() and parse_json() throw; format_error where it is no
/// JSON object.
class peft_config_file {
public:
    explicit peft_config_file(const std::filesystem::path& path)
        : map_(path)
        , name_(path.string())
        , text_(read_text_file(path))
        , fields_(parse_json(text_, name_))
    {
        if (!fields_.is_object()) { raise<format_error>(error_code::adapter_config, "is not a JSON object", name_); }
    }
    [[nodiscard]] const nlohmann::json& fields() const& noexcept { return fields_; }
    void fields() const&& = delete; // name the owner first: the reference would dangle
    /// The fields in file order, which decides between patterns.
    [[nodiscard]] nlohmann::ordered_json ordered() const { return nlohmann::ordered_json::parse(text_); }
    /// Throws io_error where the file is no longer what was read.
    void check_unchanged() const { map_.check_unchanged(); }

private:
    mapped_file map_;
    std::string name_, text_;
    nlohmann::json fields_;
};

/// Fields of a configuration that, where they say something, make an adapter another thing than a change of each weight
/// by itself, whoever reads it, and what each does.
inline constexpr std::array<std::pair<const char*, std::string_view>, 9> beyond_updates{
    {{"use_qalora", "QA-LoRA pools its input"}, {"use_bdlora", "its factors are block-diagonal"},
        {"alora_invocation_tokens", "aLoRA switches on within the input"},
        {"trainable_token_indices", "single rows of an embedding are replaced"},
        {"target_parameters", "bare parameters are adapted"}, {"layer_replication", "the base's layers are repeated"},
        {"kasa_config", "KaSA changes the base weights"}, {"arrow_config", "adapters are routed"},
        {"monteclora_config", "its factors are random variables"}}};

/// Why no change of weights stands for an adapter of a kind, and what to do with one; empty: PEFT makes one, by
/// merge_and_unload().
[[nodiscard]] inline std::string_view unmergeable_kind(std::string_view type) noexcept
{
    for (const std::string_view kind :
        {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"}) {
        if (type == kind) {
            return "it is learnt input and changes no weight, so that there is nothing to fold, extract or merge; load "
                   "it beside its base with PEFT (PeftModel.from_pretrained)";
        }
    }
    for (const std::string_view kind : {"ADAPTION_PROMPT", "LILY", "POLY", "SHADOW", "XLORA"}) {
        if (type == kind) {
            return "what it does depends on the input, so that no change of weights stands for it; "
                   "load it beside its base with PEFT (PeftModel.from_pretrained)";
        }
    }
    return {};
}
/// The kind of adapter that a configuration names; LORA where it names none.
[[nodiscard]] inline std::string peft_type_of(const nlohmann::json& config)
{
    const auto type = config.is_object() ? config.find("peft_type") : config.end();
    return type != config.end() && type->is_string() ? type->get<std::string>() : "LORA";
}

/// Refuses an initialisation of LoRA that is not one of those that leave the base as it is (pissa, olora, corda, loftq,
/// lora_ga … change it), by refuse(what, why).
template <class Refuse>
void check_lora_initialization(const peft_fields& fields, const Refuse& refuse)
{
    const auto* const init = fields.find("init_lora_weights");
    if (!init || !init->is_string()) { return; }
    const auto& name = init->get_ref<const std::string&>();
    // MiCA and VeLoRA change how an adapter is trained, and not the base.
    constexpr std::array<std::string_view, 5> harmless{"gaussian", "eva", "orthogonal", "mica", "velora"};
    if (name == "loftq") { // PEFT converts the others alone: what is rounded away is no product of factors
        refuse(message("init_lora_weights is '", name, "'"),
            "such an initialisation quantises the base weights, and the adapter is an update of these, which it does "
            "not hold");
        return;
    }
    if (std::find(harmless.begin(), harmless.end(), name) == harmless.end()) {
        refuse(message("init_lora_weights is '", name, "'"),
            "such an initialisation changes the base weights, by a residual that the adapter does not hold, so that it "
            "is an "
            "update of another base: save it converted to a plain LoRA, by PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=INITIAL) with what was saved before the training");
    }
}

/// The modules that a field of a configuration names: by a regular expression of the whole name, or by a list of names
/// and their dotted ends. Throws format_error for expressions that are not understood.
class named_modules {
public:
    /// Refers to the configuration. `file` is where it is, for messages.
    named_modules(const peft_fields& fields, const char* field, const std::string& file)
        : given_(fields.says_something(field) ? fields.find(field) : nullptr)
    {
        if (!given_ || !given_->is_string()) { return; }
        const auto& text = given_->get_ref<const std::string&>();
        auto lower = text;
        std::transform(lower.begin(), lower.end(), lower.begin(),
            [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c; });
        if (lower == "all-linear") { return; }
        pattern_.emplace(text,
            python_pattern::complaint{
                file, message(field, " is '", text, "'"), "write the list of the modules' names in its place"});
    }
    /// Whether a module is one of them. Nothing where that cannot be told: the field is absent, empty, or of PEFT's own
    /// words ("all-linear").
    [[nodiscard]] std::optional<bool> contain(const std::string& module) const
    {
        if (pattern_) { return pattern_->matches(module); }
        if (!given_ || !given_->is_array()) { return std::nullopt; }
        return std::any_of(given_->begin(), given_->end(), [&](const auto& one) {
            if (!one.is_string()) { return false; }
            const auto& name = one.template get_ref<const std::string&>();
            return module == name || module.ends_with("." + name);
        });
    }

private:
    const nlohmann::json* given_;
    std::optional<python_pattern> pattern_{};
};
/// The number of the layer that a module is in, to PEFT: that behind the first of the lists `layers_pattern` names, or,
/// where it names none, behind whatever comes second in the name.
[[nodiscard]] inline std::optional<std::int64_t> layer_for_peft(
    const nlohmann::json* layers_pattern, const std::string& module)
{
    std::vector<std::string> lists;
    if (layers_pattern && layers_pattern->is_string()) { lists.push_back(layers_pattern->get<std::string>()); }
    for (std::size_t i = 0; layers_pattern && layers_pattern->is_array() && i < layers_pattern->size(); ++i) {
        if ((*layers_pattern)[i].is_string()) { lists.push_back((*layers_pattern)[i].get<std::string>()); }
    }
    std::erase(lists, "");
    const auto number_before = [&](const std::string& list) -> std::optional<std::int64_t> {
        for (std::size_t dot = module.find('.'); dot != module.npos; dot = module.find('.', dot + 1)) {
            const auto end = module.find('.', dot + 1);
            if (end == module.npos) { break; }
            const auto digits = module.substr(dot + 1, end - dot - 1);
            const std::string_view before = std::string_view(module).substr(0, dot);
            const bool there =
                list.empty() ? before.find('.') != before.npos : before == list || before.ends_with("." + list);
            if (there && !digits.empty() && digits.size() < 10
                && digits.find_first_not_of("0123456789") == digits.npos) {
                return std::stoll(digits);
            }
        }
        return std::nullopt;
    };
    if (lists.empty()) { return number_before(""); }
    for (const auto& list : lists) {
        if (const auto number = number_before(list)) { return number; }
    }
    return std::nullopt;
}
/// Refuses a layers_pattern that is more than the names of lists of layers: PEFT has it in an expression of its own.
inline void check_layers_pattern(const peft_fields& fields, const std::string& file)
{
    const auto* const given = fields.find("layers_pattern");
    if (!given) { return; }
    for (const auto& one : given->is_array() ? *given : nlohmann::json::array({*given})) {
        if (!one.is_string()) { continue; }
        const auto& text = one.get_ref<const std::string&>();
        if (text.find_first_of("\\^$|?*+()[]{}") == text.npos) { continue; }
        raise<format_error>(error_code::adapter_config,
            message("layers_pattern is '", text,
                "': of regular expressions there, names alone are understood here; write the list's name (\"layers\"), "
                "or "
                "the whole names of the modules into target_modules"),
            file);
    }
}
/// The modules of an adapter's file that PEFT does nothing with, as the configuration leaves them out: by
/// exclude_modules, by target_modules that do not name them, or by layers_to_transform. `is_parameter(module)`: those
/// of target_parameters are none of these. Empty where target_modules names none at all: the names are then another
/// model's, and PEFT loads nothing of it. Throws format_error for expressions that are not understood, of `file`.
template <class IsParameter>
[[nodiscard]] std::vector<std::string> modules_left_out(const nlohmann::json& config, const std::string& file,
    const std::vector<std::string>& modules, const IsParameter& is_parameter)
{
    const peft_fields fields(config, file);
    const named_modules named(fields, "target_modules", file), excluded(fields, "exclude_modules", file);
    std::set<std::int64_t> layers;
    if (const auto* const given = fields.find("layers_to_transform")) {
        const auto add = [&](const nlohmann::json& one) {
            if (one.is_number_integer()) { layers.insert(one.template get<std::int64_t>()); }
        };
        if (given->is_array()) { std::for_each(given->begin(), given->end(), add); }
        else {
            add(*given);
        }
    }
    if (!layers.empty()) { check_layers_pattern(fields, file); }
    const auto* const targets = fields.find("target_modules");
    std::vector<std::string> out;
    bool any = false;
    for (const auto& module : modules) {
        if (is_parameter(module)) { continue; }
        bool in = named.contain(module).value_or(true);
        any = any || in;
        if (excluded.contain(module).value_or(false)) { in = false; }
        const bool by_whole_name =
            targets && targets->is_array() && std::find(targets->begin(), targets->end(), module) != targets->end();
        const bool by_list = !targets || targets->is_array();
        if (in && by_list && !by_whole_name && !layers.empty()) {
            const auto layer = layer_for_peft(fields.find("layers_pattern"), module);
            in = layer && layers.contains(*layer);
        }
        if (!in) { out.push_back(module); }
    }
    return any ? out : std::vector<std::string>();
}

/// What is said of modules_left_out() of an adapter that has factors of `count` modules.
[[nodiscard]] inline std::string left_out_words(
    const std::string& label, const std::vector<std::string>& out, std::size_t count)
{
    return message("factors of ", out.size(), " of ", count, " modules in ", label, " ('", out.front(),
        out.size() > 1 ? "', …" : "'", ") are left out, as PEFT does: ", peft_config_name,
        " leaves these modules out (target_modules, exclude_modules or layers_to_transform)");
}

/// Whether a module is the head of an adapter that says ensure_weight_tying and names embed_tokens or lm_head: PEFT
/// gives it what it gives the embedding, whether target_modules names it or not.
[[nodiscard]] inline bool is_tied_head(const nlohmann::json& config, std::string_view module)
{
    if (module != peft_tied_head || !flag_under(config, "ensure_weight_tying")) { return false; }
    const auto targets = config.find("target_modules");
    return targets == config.end() || !targets->is_array()
        || std::any_of(targets->begin(), targets->end(), [](const auto& one) {
               if (!one.is_string()) { return false; }
               const std::string_view name = one.template get_ref<const std::string&>();
               const auto last = name.substr(name.rfind('.') + 1);
               return last == "embed_tokens" || last == peft_tied_head;
           });
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
