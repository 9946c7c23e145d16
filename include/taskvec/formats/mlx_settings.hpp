// What MLX's configuration says of an adapter's modules.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>
#include <taskvec/formats/peft.hpp>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// Which modules MLX's configuration has adapted: those of the last layers, by their names within a layer or the model.
struct mlx_targets {
    std::string_view layers_field = "num_layers"; ///< "lora_layers" of old
    std::optional<std::int64_t> layers{}; ///< how many of the last ones; nothing: all
    std::optional<std::vector<std::string>> keys{}; ///< names; nothing: every module that can be

    /// Throws format_error for fields of other types.
    mlx_targets(const nlohmann::json& config, const std::string& file)
    {
        const peft_fields fields(config, file);
        if (!config.contains("num_layers")) { layers_field = "lora_layers"; }
        if (const auto* const given = fields.find(std::string(layers_field).c_str())) {
            if (!given->is_number_integer()) {
                raise<format_error>(error_code::adapter_config,
                    message(layers_field, " is ", peft_fields::shown(*given),
                        "; expected a whole number, -1 for all layers"),
                    file);
            }
            if (const auto most = given->get<std::int64_t>(); most >= 0) { layers = most; }
        }
        const auto* const parameters = fields.find("lora_parameters");
        if (!parameters || !parameters->is_object()) { return; }
        const auto given = parameters->find("keys");
        if (given == parameters->end() || given->is_null()) { return; }
        if (!is_list_of_texts(*given)) {
            raise<format_error>(error_code::adapter_config,
                message("lora_parameters.keys is ", peft_fields::shown(*given), "; expected a list of names"), file);
        }
        keys = given->template get<std::vector<std::string>>();
    }
    /// Whether a key names a module.
    [[nodiscard]] static bool names(const std::string& key, std::string_view module)
    {
        return key == module || key == place_in_layers(module).within;
    }
};

/// What MLX's configuration says, against what an adapter of it holds. Throws format_error for a number of layers, or
/// keys, that would leave some of the adapter's modules out, as MLX does without a word. Returns the keys that name
/// none of them.
[[nodiscard]] inline std::vector<std::string> check_mlx_targets(
    const nlohmann::json& config, const std::vector<std::string>& modules, const std::string& file)
{
    const mlx_targets targets(config, file);
    std::vector<std::string> idle;
    if (targets.keys) {
        for (const auto& module : modules) {
            if (std::any_of(targets.keys->begin(), targets.keys->end(),
                    [&](const auto& key) { return mlx_targets::names(key, module); })) {
                continue;
            }
            raise<format_error>(error_code::adapter_config,
                message("lora_parameters.keys does not name '", place_in_layers(module).within,
                    "', and the adapter has factors of '", module,
                    "', which MLX would leave out: add the name to keys, or take the module out of the file"),
                file);
        }
        for (const auto& key : *targets.keys) {
            if (std::none_of(modules.begin(), modules.end(),
                    [&](const auto& module) { return mlx_targets::names(key, module); })) {
                idle.push_back(key);
            }
        }
    }
    if (!targets.layers) { return idle; }
    const auto most = *targets.layers;
    std::optional<std::int64_t> first, last;
    for (const auto& module : modules) {
        const auto number = place_in_layers(module).number;
        if (!number) { continue; }
        first = std::min(first.value_or(*number), *number);
        last = std::max(last.value_or(*number), *number);
    }
    if (!first || *last - *first < most) { return idle; }
    raise<format_error>(error_code::adapter_config,
        message(targets.layers_field, " is ", most, ", and the adapter has modules of layers ", *first, " to ", *last,
            ": MLX applies those of the last ", most, " layers alone; correct ", targets.layers_field,
            ", or take the modules of the others out of the file"),
        file);
}

/// What fine_tune_type says of a module, which is `rescaled` where it has the magnitudes of DoRA. Throws format_error
/// where the two differ; `where` is the file of tensors.
inline void check_mlx_type(
    const nlohmann::json& config, const std::string& module, bool rescaled, const std::string& where)
{
    const auto* const type = peft_fields(config, where).find("fine_tune_type");
    if (!type || *type == (rescaled ? "dora" : "lora")) { return; }
    raise<format_error>(error_code::adapter_tensors,
        *type == "dora" ? message("module '", module, "' has no magnitudes ('", module, ".m'), but ", peft_config_name,
                              " says fine_tune_type dora, which rescales every module by them: save the adapter anew")
                        : message("module '", module, "' has ", rescaled ? "magnitudes ('" : "factors",
                              rescaled ? module + ".m')" : "", ", but ", peft_config_name, " says fine_tune_type ",
                              peft_fields::shown(*type), ", by which MLX reads none: correct one of them"),
        where);
}

/// How strong MLX's configuration makes the updates of all modules.
struct mlx_strength {
    std::optional<double> scale{}; ///< that multiplies every update; nothing: there is no configuration
    std::optional<double> rank{}; ///< that it was trained with, where it says so

    mlx_strength() = default;
    /// Throws format_error for fields of other types, and where there is no scale.
    mlx_strength(const nlohmann::json& config, const std::string& file)
        : scale(number(config, "scale", file))
        , rank(number(config, "rank", file))
    {
        if (!scale) {
            raise<format_error>(error_code::adapter_config,
                "has no lora_parameters.scale, by which MLX multiplies every update: add the one that it was trained "
                "with (mlx_lm trains with 20 unless told otherwise)",
                file);
        }
    }

private:
    [[nodiscard]] static std::optional<double> number(
        const nlohmann::json& config, const char* field, const std::string& file)
    {
        const auto given = config.find("lora_parameters");
        if (given == config.end() || !given->is_object()) { return std::nullopt; }
        const auto value = given->find(field);
        if (value == given->end()) { return std::nullopt; }
        if (!value->is_number()) {
            raise<format_error>(error_code::adapter_config,
                message("lora_parameters.", field, " is ", peft_fields::shown(*value), "; expected a number"), file);
        }
        return value->get<double>();
    }
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
