// Adapters as people have them: PEFT's directories, files of kohya and A1111, diffusers, MLX and llama.cpp, told apart
// by what they hold, read into one form that folds into a base. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>
#include <taskvec/formats/adapter_gguf.hpp>
#include <taskvec/formats/adapter_modules.hpp>
#include <taskvec/formats/adapter_roles.hpp>
#include <taskvec/formats/adapter_tensors.hpp>
#include <taskvec/formats/mlx_settings.hpp>
#include <taskvec/formats/peft_parameters.hpp>
#include <taskvec/formats/peft_settings.hpp>

#include <cmath>
#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The file of tensors that an adapter's path stands for: itself, or PEFT's, diffusers' or MLX's file in a directory.
/// Throws io_error where there is none.
[[nodiscard]] inline std::filesystem::path adapter_tensor_file(const std::filesystem::path& path)
{
    std::error_code ignored;
    if (!std::filesystem::is_directory(path, ignored)) { return path; }
    for (const std::string_view name : {peft_model_name, std::string_view("pytorch_lora_weights.safetensors"),
             std::string_view("adapters.safetensors"), peft_pickle_name}) {
        if (std::filesystem::exists(path / name, ignored)) { return path / name; }
    }
    raise<io_error>(error_code::model_not_found,
        message("holds no adapter: expected ", peft_model_name,
            " (PEFT), pytorch_lora_weights.safetensors (diffusers) or adapters.safetensors (MLX), or name the file "
            "(kohya's, or a GGUF file)"),
        path.string());
}

/// Reads an adapter of any dialect: a PEFT directory, a directory of diffusers or MLX, or a file (a GGUF file by
/// read_gguf_adapter()). Told apart by the names of its tensors; a file that mixes dialects, or holds several adapters,
/// is refused. Scalings are α/r (α/√r with use_rslora), with α and r from the configuration and its patterns, from
/// those that diffusers keeps in the header of its file (`lora_adapter_metadata`), or from `.alpha` tensors; MLX gives
/// its scale; where nothing gives one α is r, which `notes` says. LoHa, LoKr and Tucker's forms of them become updates
/// of higher rank, exactly but for the rounding of products of factors to T. Factors of convolutions are flattened,
/// with the kernel among the inputs. Throws io_error; format_error for halves without partners, a rank of 0, alphas
/// that contradict each other, factors of another kind than the configuration says (peft_type, use_dora), tensors with
/// no place in an adapter, configurations that no update can say; shape_mismatch; dtype_mismatch.
///
///     const auto adapter = read_adapter("style.safetensors");
template <arithmetic_element T = float>
[[nodiscard]] adapter_contents<T> read_adapter(const std::filesystem::path& path)
{
    using role = detail::adapter_role;
    adapter_contents<T> adapter;
    adapter.label = "'" + path.string() + "'";
    adapter.file = adapter_tensor_file(path);
    if (is_gguf_file(adapter.file)) { return read_gguf_adapter<T>(adapter.file); }
    const safetensors_file file = detail::open_weights(adapter.file, adapter.notes);
    const std::string where = adapter.file.string();

    std::error_code ignored;
    const auto config_path = adapter.file.parent_path() / peft_config_name;
    const std::string config_file = config_path.string();
    const bool may_have_config = std::filesystem::is_directory(path, ignored)
        || adapter.file.filename() == peft_model_name || adapter.file.filename() == peft_pickle_name;
    std::optional<detail::peft_config_file> configuration;
    if (may_have_config && std::filesystem::exists(config_path, ignored)) {
        configuration.emplace(config_path);
        adapter.config = configuration->fields();
    }

    const auto [parts, wholes, copies, dialect] = detail::adapter_sorter(file).sort();
    adapter.dialect = dialect;
    if (dialect == adapter_dialect::mlx) {
        const auto* const type = detail::peft_fields(adapter.config, config_file).find("fine_tune_type");
        for (const auto& [module, found] : parts) {
            const bool rescaled = found.get(role::magnitude) != nullptr;
            if (!type || *type == (rescaled ? "dora" : "lora")) { continue; }
            raise<format_error>(error_code::adapter_tensors,
                *type == "dora"
                    ? message("module '", module, "' has no magnitudes ('", module, ".m'), but ", peft_config_name,
                          " says fine_tune_type dora, which rescales every module by them: save the adapter anew")
                    : message("module '", module, "' has ", rescaled ? "magnitudes ('" : "factors",
                          rescaled ? module + ".m')" : "", ", but ", peft_config_name, " says fine_tune_type ",
                          detail::peft_fields::shown(*type), ", by which MLX reads none: correct one of them"),
                where);
        }
    }
    const bool peft_config = configuration && dialect == adapter_dialect::peft;
    if (parts.empty() && copies.empty()) {
        if (peft_config) { detail::check_foldable(adapter.config, config_file); } // another kind is said by its name
        const auto type = adapter.config.find("fine_tune_type");
        const bool full = type != adapter.config.end() && *type == "full";
        raise<format_error>(error_code::adapter_tensors,
            message("holds no factors of an adapter",
                full ? message(", as ", peft_config_name,
                           " says (fine_tune_type full): put its weights into the model with mlx_lm.fuse and go on "
                           "with that")
                     : std::string()),
            where);
    }

    std::map<std::string, detail::peft_settings> settings; // by component; all are under "" outside diffusers
    const auto kept = file.metadata().find(detail::diffusers_metadata_key);
    if (peft_config) {
        const auto& all =
            settings
                .emplace(
                    "", detail::peft_settings(adapter.config, configuration->ordered(), peft_config_name, config_file))
                .first->second;
        adapter.fan_in_fan_out = all.flag("fan_in_fan_out");
        adapter.tied = all.flag("ensure_weight_tying");
    }
    else if (kept != file.metadata().end()
        && (dialect == adapter_dialect::peft || dialect == adapter_dialect::diffusers)) {
        settings = detail::diffusers_settings(kept->second, where);
        adapter.dialect = adapter_dialect::diffusers;
    }
    /// What says the scaling of a module, and what the module is called there.
    const auto settings_of = [&](const std::string& module) {
        const auto component = peft_config ? std::string_view() : detail::component_of(module);
        auto place = settings.find(std::string(component));
        std::string name = component.empty() ? module : module.substr(component.size() + 1);
        if (place == settings.end() && settings.size() == 1 && settings.begin()->first.empty()) {
            place = settings.begin();
            name = module;
        }
        return std::pair(place == settings.end() ? nullptr : &place->second, std::move(name));
    };
    std::optional<double> mlx_scale;
    std::optional<double> mlx_rank;
    if (dialect == adapter_dialect::mlx) {
        std::vector<std::string> names;
        for (const auto& one : parts) { names.push_back(one.first); }
        for (const auto& key : detail::check_mlx_targets(adapter.config, names, config_file)) {
            adapter.notes.push_back(message(adapter.label, " has no factors of '", key,
                "', which lora_parameters.keys of its ", peft_config_name, " names: it does not change that"));
        }
        const auto given = adapter.config.find("lora_parameters");
        const auto number = [&](const char* field) -> std::optional<double> {
            if (given == adapter.config.end() || !given->is_object()) { return std::nullopt; }
            const auto value = given->find(field);
            if (value == given->end()) { return std::nullopt; }
            if (!value->is_number()) {
                raise<format_error>(error_code::adapter_config,
                    message(
                        "lora_parameters.", field, " is ", detail::peft_fields::shown(*value), "; expected a number"),
                    config_file);
            }
            return value->template get<double>();
        };
        mlx_scale = number("scale");
        mlx_rank = number("rank");
        if (!mlx_scale && configuration) {
            raise<format_error>(error_code::adapter_config,
                "has no lora_parameters.scale, by which MLX multiplies every update: add the one that it was trained "
                "with (mlx_lm trains with 20 unless told otherwise)",
                config_file);
        }
    }
    std::size_t other_ranks = 0;
    std::size_t without_alpha = 0;
    std::size_t cut_to_nothing = 0;
    std::vector<std::string> stored_modules;
    for (const auto& one : parts) { stored_modules.push_back(one.first); }
    detail::peft_parameters parameters(
        peft_config ? adapter.config : nlohmann::json::object(), stored_modules, config_file);
    for (const auto& [module, found] : parts) {
        const auto parameter = parameters.of(module);
        const auto said = settings_of(parameter.empty() ? module : parameter);
        const bool adalora = said.first && said.first->type() == "ADALORA";
        if (const auto* const values = found.get(role::singular)) {
            if (!adalora) {
                raise<format_error>(error_code::adapter_tensors,
                    message("tensor '", values->name, "' is AdaLoRA's, ",
                        said.first ? message("but ", peft_config_name, " says peft_type ", said.first->type())
                                   : message("whose scaling is in ", peft_config_name,
                                         ": name the directory that holds both")),
                    where);
            }
            if (values->bytes == 0) { // a module of which AdaLoRA has left nothing
                ++cut_to_nothing;
                continue;
            }
        }
        else if (adalora) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has no lora_E, which every module of AdaLoRA has"), where);
        }
        auto [made, rank] = detail::module_reader<T>(file, module, found, dialect).read();
        if (said.first) { said.first->check(module, made.kind, made.bias.rank() > 0, where); }
        std::size_t matrices = 1;
        if (!parameter.empty()) {
            if (made.kind != "LoRA" || made.bias.rank() > 0 || made.embedding || !made.kernel.empty()) {
                raise<format_error>(error_code::adapter_unsupported,
                    message("parameter '", parameter,
                        "' has factors of another kind than those of plain LoRA: ", detail::fold_with_peft),
                    where);
            }
            const double expected = said.first->rank(said.second);
            matrices = expected >= 1 ? static_cast<std::size_t>(static_cast<double>(rank) / expected) : 0;
            if (matrices == 0 || static_cast<double>(matrices) * expected != static_cast<double>(rank)) {
                raise<format_error>(error_code::adapter_tensors,
                    message("the factors of parameter '", parameter, "' have rank ", rank, " in all, and ",
                        peft_config_name, " says ", expected, " of each matrix: the one is no multiple of the other"),
                    where);
            }
            rank /= matrices;
        }
        std::optional<double> alpha;
        if (const auto* const entry = found.get(role::alpha)) {
            const auto value = detail::read_flat_factor<double>(file, *entry);
            if (value.size() != 1 || !std::isfinite(value.data()[0])) {
                raise<format_error>(error_code::adapter_tensors,
                    message("tensor '", entry->name, "' of shape ", to_string(entry->shape), " is no finite number"),
                    where);
            }
            alpha = value.data()[0];
        }
        double scaling = 1;
        if (said.first) { scaling = said.first->scaling(said.second, rank, alpha, where); }
        else if (mlx_scale) {
            scaling = *mlx_scale;
        }
        else if (alpha && rank > 0) {
            scaling = *alpha / static_cast<double>(rank);
        }
        else if (rank > 0) {
            ++without_alpha;
        }
        if (mlx_rank && static_cast<double>(rank) != *mlx_rank) { ++other_ranks; }
        made.update.scaling = scaling;
        made.bias.scaling = scaling;
        check_update(made.update, module);
        if (parameter.empty()) {
            adapter.modules.emplace(module, std::move(made));
            continue;
        }
        const auto dot = parameter.rfind('.');
        if (matrices == 1 && parameter.substr(dot) == ".weight") {
            adapter.modules.emplace(parameter.substr(0, dot), std::move(made));
            continue;
        }
        auto updates = detail::split_factors(made.update, matrices);
        for (std::size_t e = 0; e < matrices; ++e) {
            adapted_module<T> one;
            one.update = std::move(updates[e]);
            one.bias.scaling = scaling;
            one.stored = made.stored;
            one.slice = {parameter, e, matrices};
            adapter.modules.emplace(
                parameter.substr(0, dot + 1) + std::to_string(e) + parameter.substr(dot), std::move(one));
        }
    }
    for (const auto& one : settings) { one.second.check_used(); }
    parameters.check_used();
    if (peft_config) {
        const auto out = detail::modules_left_out(adapter.config, stored_modules, [&](const std::string& module) {
            return !parameters.of(module).empty(); // of target_parameters
        });
        for (const auto& module : out) { adapter.modules.erase(module); }
        if (!out.empty()) {
            adapter.notes.push_back(
                message("factors of ", out.size(), " of ", parts.size(), " modules in ", adapter.label, " ('",
                    out.front(), out.size() > 1 ? "', …" : "'", ") are left out, as PEFT does: ", peft_config_name,
                    " leaves these modules out (target_modules, exclude_modules or "
                    "layers_to_transform)"));
        }
    }
    if (other_ranks > 0) {
        adapter.notes.push_back(message(adapter.label, " has ", other_ranks, " of ", parts.size(),
            " modules of another rank than the ", *mlx_rank, " of ", peft_config_name,
            ": each is taken with its own, as MLX does, whose scale is the same for any rank"));
    }
    if (cut_to_nothing > 0) {
        adapter.notes.push_back(message(adapter.label, " has ", cut_to_nothing, " of ", parts.size(),
            " modules at rank 0, to which AdaLoRA has cut them: they change nothing"));
    }
    if (without_alpha > 0 && dialect == adapter_dialect::mlx) {
        adapter.notes.push_back(message(adapter.label, " has no ", peft_config_name,
            " beside it, whose lora_parameters.scale multiplies every update: the scale is taken to be 1, and mlx_lm "
            "trains with 20 unless told otherwise"));
    }
    else if (without_alpha > 0) {
        adapter.notes.push_back(message(adapter.label, " gives no alpha for ", without_alpha, " of ", parts.size(),
            " modules: it is taken to be the rank, a scaling of 1"));
    }
    for (const auto& [name, entry] : copies) { adapter.copies.emplace(name, detail::carried_tensor(file, *entry)); }
    for (const auto& [name, entry] : wholes) { adapter.wholes.emplace(name, detail::carried_tensor(file, *entry)); }
    file.map().check_unchanged();
    if (configuration) { configuration->check_unchanged(); } // of one pair: another run may have replaced both
    return adapter;
}

} // namespace taskvec::inline TASKVEC_ABI
