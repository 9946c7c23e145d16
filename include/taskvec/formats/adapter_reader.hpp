// An adapter from its file of tensors and the configuration beside it, whatever dialect the two are of.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/lora.hpp>
#include <taskvec/formats/adapter_contents.hpp>
#include <taskvec/formats/adapter_modules.hpp>
#include <taskvec/formats/adapter_roles.hpp>
#include <taskvec/formats/adapter_tensors.hpp>
#include <taskvec/formats/mlx_settings.hpp>
#include <taskvec/formats/peft.hpp>
#include <taskvec/formats/peft_parameters.hpp>
#include <taskvec/formats/peft_settings.hpp>

#include <cmath>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// Reads one adapter. For one call of read().
template <arithmetic_element T>
class adapter_reader {
public:
    /// `path` is what the adapter was named by, and `file` its tensors. Throws what opening the file throws.
    adapter_reader(const std::filesystem::path& path, const std::filesystem::path& file)
        : file_(open_weights(file, adapter_.notes))
        , refuse_{file.string()}
        , config_name_((file.parent_path() / peft_config_name).string())
    {
        adapter_.label = "'" + path.string() + "'";
        adapter_.file = file;
        read_configuration(path);
    }
    /// Throws what read_adapter() throws.
    [[nodiscard]] adapter_contents<T> read()
    {
        if (configuration_) { check_peft_type(adapter_.config, config_name_); } // whose tensors are called otherwise
        tensors_ = adapter_sorter(file_).sort();
        modules_ = tensors_.modules();
        adapter_.dialect = tensors_.dialect;
        if (is(adapter_dialect::mlx)) { check_mlx_types(); }
        if (modules_.empty() && tensors_.copies.empty()) { refuse_empty(); }
        find_settings();
        if (configuration_ && is(adapter_dialect::mlx)) { find_mlx_strength(); }
        for (const auto& [module, parts] : tensors_.parts) { read_module(module, parts); }
        settings_.check_used();
        parameters_.check_used();
        if (has_peft_config()) { leave_out(); }
        note_ranks();
        note_cuts();
        note_alphas();
        copy_tensors();
        file_.map().check_unchanged();
        if (configuration_) { configuration_->check_unchanged(); } // of one pair: another run may have replaced both
        return std::move(adapter_);
    }

private:
    using role = adapter_role;
    using module_settings = component_settings::of_module;

    template <class... Parts>
    void note(const Parts&... parts)
    {
        adapter_.notes.push_back(message(parts...));
    }
    /// Whether the file's names are of a dialect.
    [[nodiscard]] bool is(adapter_dialect dialect) const { return tensors_.dialect == dialect; }
    [[nodiscard]] bool has_peft_config() const { return configuration_ && is(adapter_dialect::peft); }

    /// Directories have a configuration, and so do files that are called as those in them.
    void read_configuration(const std::filesystem::path& path)
    {
        std::error_code ignored;
        const auto name = adapter_.file.filename();
        if (!std::filesystem::is_directory(path, ignored) && name != peft_model_name && name != peft_pickle_name) {
            return;
        }
        const auto config = adapter_.file.parent_path() / peft_config_name;
        if (!std::filesystem::exists(config, ignored)) { return; }
        configuration_.emplace(config);
        adapter_.config = configuration_->fields();
    }
    void check_mlx_types() const
    {
        for (const auto& [module, parts] : tensors_.parts) {
            check_mlx_type(adapter_.config, module, parts.get(role::magnitude) != nullptr, refuse_.file);
        }
    }
    [[noreturn]] void refuse_empty() const
    {
        if (has_peft_config()) { check_foldable(adapter_.config, config_name_); } // what else it is, is said by name
        const auto type = adapter_.config.find("fine_tune_type");
        const bool full = type != adapter_.config.end() && *type == "full";
        refuse_(error_code::adapter_tensors, "holds no factors of an adapter",
            full ? message(", as ", peft_config_name,
                       " says (fine_tune_type full): put its weights into the model with mlx_lm.fuse and go on with "
                       "that")
                 : std::string());
    }
    /// What PEFT says of the modules: the configuration beside the file, or what diffusers keeps in its header.
    void find_settings()
    {
        const auto kept = file_.metadata().find(diffusers_metadata_key);
        if (has_peft_config()) {
            peft_settings all(adapter_.config, configuration_->ordered(), peft_config_name, config_name_);
            adapter_.fan_in_fan_out = all.flag("fan_in_fan_out");
            adapter_.tied = all.flag("ensure_weight_tying");
            settings_ = component_settings(std::move(all));
            parameters_ = peft_parameters(adapter_.config, modules_, config_name_);
        }
        else if (kept != file_.metadata().end() && (is(adapter_dialect::peft) || is(adapter_dialect::diffusers))) {
            settings_ = component_settings(diffusers_settings(kept->second, refuse_.file));
            adapter_.dialect = adapter_dialect::diffusers;
        }
    }
    void find_mlx_strength()
    {
        for (const auto& key : check_mlx_targets(adapter_.config, modules_, config_name_)) {
            note(adapter_.label, " has no factors of '", key, "', which lora_parameters.keys of its ", peft_config_name,
                " names: it does not change that");
        }
        mlx_ = mlx_strength(adapter_.config, config_name_);
    }

    void read_module(const std::string& module, const adapter_parts& parts)
    {
        const auto parameter = parameters_.of(module);
        const auto said = settings_.find(parameter.empty() ? module : parameter);
        if (is_cut_to_nothing(module, parts, said)) {
            ++cut_to_nothing_;
            return;
        }
        auto [made, rank] = module_reader<T>(file_, module, parts, tensors_.dialect).read();
        if (said) { said.settings->check(module, made.kind, made.bias.rank() > 0, refuse_.file); }
        std::size_t matrices = 1;
        if (!parameter.empty()) {
            check_plain(parameter, made);
            matrices = matrices_of(parameter, rank, said);
            rank /= matrices;
        }
        made.update.scaling = made.bias.scaling = scaling_of(said, rank, alpha_of(parts));
        check_update(made.update, module);
        if (parameter.empty()) { adapter_.modules.emplace(module, std::move(made)); }
        else {
            put_matrices(parameter, matrices, std::move(made));
        }
    }
    /// Whether AdaLoRA has left nothing of a module. Refuses its singular values where the configuration speaks of
    /// another kind, and modules without them where it does not.
    [[nodiscard]] bool is_cut_to_nothing(
        const std::string& module, const adapter_parts& parts, const module_settings& said) const
    {
        const bool adalora = said && said.settings->type() == "ADALORA";
        const auto* const values = parts.get(role::singular);
        if (values && !adalora) {
            refuse_(error_code::adapter_tensors, "tensor '", values->name, "' is AdaLoRA's, ",
                said ? message("but ", peft_config_name, " says peft_type ", said.settings->type())
                     : message("whose scaling is in ", peft_config_name, ": name the directory that holds both"));
        }
        if (adalora && !values) {
            refuse_(
                error_code::adapter_tensors, "module '", module, "' has no lora_E, which every module of AdaLoRA has");
        }
        return values && values->bytes == 0;
    }
    /// Refuses factors that PEFT does not give a parameter.
    void check_plain(const std::string& parameter, const adapted_module<T>& made) const
    {
        if (made.kind != "LoRA" || made.bias.rank() > 0 || made.embedding || !made.kernel.empty()) {
            refuse_(error_code::adapter_unsupported, "parameter '", parameter,
                "' has factors of another kind than those of plain LoRA: ", fold_with_peft);
        }
    }
    /// How many matrices a parameter is, by the rank of its factors in all.
    [[nodiscard]] std::size_t matrices_of(
        const std::string& parameter, std::size_t rank, const module_settings& said) const
    {
        const double expected = said.settings->rank(said.name), all = static_cast<double>(rank);
        const std::size_t matrices = expected >= 1 ? static_cast<std::size_t>(all / expected) : 0;
        if (matrices == 0 || static_cast<double>(matrices) * expected != all) {
            refuse_(error_code::adapter_tensors, "the factors of parameter '", parameter, "' have rank ", rank,
                " in all, and ", peft_config_name, " says ", expected,
                " of each matrix: the one is no multiple of the other");
        }
        return matrices;
    }
    /// The α that the file has of a module.
    [[nodiscard]] std::optional<double> alpha_of(const adapter_parts& parts) const
    {
        const auto* const entry = parts.get(role::alpha);
        if (!entry) { return std::nullopt; }
        const auto value = read_number(file_, *entry);
        if (!value || !std::isfinite(*value)) {
            refuse_(error_code::adapter_tensors, "tensor '", entry->name, "' of shape ", to_string(entry->shape),
                " is no finite number");
        }
        return value;
    }
    /// The scaling of a module with factors of this rank (0: of none), and counts what notes say of it.
    [[nodiscard]] double scaling_of(const module_settings& said, std::size_t rank, const std::optional<double>& alpha)
    {
        if (mlx_.rank && static_cast<double>(rank) != *mlx_.rank) { ++other_ranks_; }
        if (said) { return said.settings->scaling(said.name, rank, alpha, refuse_.file); }
        if (mlx_.scale) { return *mlx_.scale; }
        if (rank == 0) { return 1; }
        if (alpha) { return *alpha / static_cast<double>(rank); }
        ++without_alpha_;
        return 1;
    }
    /// Modules of the matrices of a parameter: a weight, or each expert's.
    void put_matrices(const std::string& parameter, std::size_t matrices, adapted_module<T> made)
    {
        const auto dot = parameter.rfind('.');
        const auto owner = parameter.substr(0, dot), last = parameter.substr(dot);
        if (matrices == 1 && last == ".weight") {
            adapter_.modules.emplace(owner, std::move(made));
            return;
        }
        auto updates = split_factors(made.update, matrices);
        for (std::size_t e = 0; e < matrices; ++e) {
            adapted_module<T> one;
            one.update = std::move(updates[e]);
            one.bias.scaling = made.bias.scaling;
            one.stored = made.stored;
            one.slice = {parameter, e, matrices};
            adapter_.modules.emplace(owner + "." + std::to_string(e) + last, std::move(one));
        }
    }

    /// Takes out what PEFT does nothing with.
    void leave_out()
    {
        auto out = modules_left_out(adapter_.config, config_name_, modules_,
            [&](const std::string& module) { return !parameters_.of(module).empty(); });
        for (const auto& module : out) { adapter_.modules.erase(module); }
        // Of a head that is tied PEFT saves the embedding's factors once more: nothing is lost with them.
        std::erase_if(out, [&](const auto& module) { return is_tied_head(adapter_.config, module); });
        if (out.empty()) { return; }
        note(left_out_words(adapter_.label, out, modules_.size()));
    }
    void note_ranks()
    {
        if (other_ranks_ == 0) { return; }
        note(adapter_.label, " has ", other_ranks_, " of ", modules_.size(), " modules of another rank than the ",
            *mlx_.rank, " of ", peft_config_name,
            ": each is taken with its own, as MLX does, whose scale is the same for any rank");
    }
    void note_cuts()
    {
        if (cut_to_nothing_ == 0) { return; }
        note(adapter_.label, " has ", cut_to_nothing_, " of ", modules_.size(),
            " modules at rank 0, to which AdaLoRA has cut them: they change nothing");
    }
    void note_alphas()
    {
        if (without_alpha_ == 0) { return; }
        if (is(adapter_dialect::mlx)) {
            note(adapter_.label, " has no ", peft_config_name,
                " beside it, whose lora_parameters.scale multiplies every update: the scale is taken to be 1, and "
                "mlx_lm trains with 20 unless told otherwise");
            return;
        }
        note(adapter_.label, " gives no alpha for ", without_alpha_, " of ", modules_.size(),
            " modules: it is taken to be the rank, a scaling of 1");
    }
    /// What comes with the factors as it is.
    void copy_tensors()
    {
        for (const auto& [name, entry] : tensors_.copies) {
            adapter_.copies.emplace(name, carried_tensor(file_, *entry));
        }
        for (const auto& [name, entry] : tensors_.wholes) {
            adapter_.wholes.emplace(name, carried_tensor(file_, *entry));
        }
    }

    adapter_contents<T> adapter_{};
    safetensors_file file_;
    refusal refuse_;
    std::string config_name_;
    std::optional<peft_config_file> configuration_{};
    adapter_tensors tensors_{};
    std::vector<std::string> modules_{};
    component_settings settings_{};
    peft_parameters parameters_{};
    mlx_strength mlx_{};
    std::size_t other_ranks_ = 0; ///< modules of another than the configuration's
    std::size_t cut_to_nothing_ = 0; ///< modules that AdaLoRA has cut
    std::size_t without_alpha_ = 0; ///< modules that nothing gives one
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
