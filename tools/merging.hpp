// What merge, prune and peru-fft share: the options about models and methods, and the registry of merge methods.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "device.hpp"
#include "tool.hpp"

#include <taskvec/methods/merge.hpp>
#include <taskvec/select/thresholds.hpp>

#include <CLI/Option.hpp>

#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace tool {

/// The command line of a verb that merges or prunes. What is empty was not given.
struct merge_settings {
    std::string method, base, out;
    std::vector<std::string> tasks;
    std::optional<double> density, lambda, merge_density;
    std::optional<std::string> scope, merge_weights;
    std::string semantics = "paper", dtype = "keep", nonfinite = "error", missing = "error", shard_size;
    std::uint64_t seed = 0;
    std::vector<std::string> include, exclude;
    std::vector<std::string> fisher, gram; ///< files, in task order
    std::optional<double> floor, alpha, ridge, t;
    bool normalize = false, unclamped = false;
    std::vector<std::string> conv1d; ///< weights that are stored in×out
    run_options run;

    std::string density_option = "--density"; ///< the option that gave `density`, for messages
    std::set<std::string>
        given; ///< names of the method's options that were on the command line: "density", "fisher", …
};

/// Which names --include and --exclude leave: any pattern may match any part. Empty where all are.
[[nodiscard]] std::function<bool(std::string_view)> name_filter(
    const std::vector<std::string>& include, const std::vector<std::string>& exclude);
/// Adds --scope, --semantics and --merge-weights.
void add_ties_options(CLI::App& verb, merge_settings& settings);
/// Adds --nonfinite.
void add_nonfinite_option(CLI::App& verb, std::string& nonfinite);
/// Adds the options about which tensors take part and what is wrong with them.
void add_tensor_options(CLI::App& verb, merge_settings& settings);
/// Adds all options that merge, prune and peru-fft share, tensor and run options included.
void add_merge_options(CLI::App& verb, merge_settings& settings);
/// Adds --density, or another share with its own name.
void add_density_option(CLI::App& verb, merge_settings& settings, std::optional<double>& density,
    const std::string& option, const std::string& help);
/// Adds --method, with the names and lines of all registered methods in the help's footer.
void add_method_option(CLI::App& verb, merge_settings& settings);
/// The help lines of all methods.
[[nodiscard]] std::string method_list();

/// A scope for pruning: --scope, or the preset's.
[[nodiscard]] taskvec::scope scope_of(const merge_settings& settings);

/// The models that a command line names, opened, lined up and checked. Never moves: models() points into it.
class merge_inputs {
public:
    merge_inputs(const merge_settings& settings, bool base_wanted);
    merge_inputs(const merge_inputs&) = delete;
    merge_inputs& operator=(const merge_inputs&) = delete;

    [[nodiscard]] const taskvec::checkpoint* base() const { return base_ ? &*base_ : nullptr; }
    [[nodiscard]] const std::vector<task_argument>& arguments() const { return arguments_; }
    [[nodiscard]] const std::deque<taskvec::checkpoint>& tasks() const { return tasks_; }
    [[nodiscard]] const std::vector<taskvec::const_model_ref>& task_models() const { return task_models_; }
    [[nodiscard]] const taskvec::aligned_models& models() const { return *models_; }
    [[nodiscard]] std::vector<double> weights() const;
    /// The base's metadata, or the first task's where there is no base.
    [[nodiscard]] const taskvec::metadata_map& metadata() const
    {
        return base_ ? base_->metadata() : tasks_.front().metadata();
    }
    [[nodiscard]] std::uint64_t copied_bytes() const;

private:
    std::optional<taskvec::checkpoint> base_;
    std::vector<task_argument> arguments_;
    std::deque<taskvec::checkpoint> tasks_;
    std::vector<taskvec::const_model_ref> task_models_;
    std::optional<taskvec::aligned_models> models_;
};

/// Whether a tensor's name is matched by one of these regular expressions of an option. Throws usage_error.
[[nodiscard]] std::function<bool(std::string_view)> name_matcher(
    const std::vector<std::string>& patterns, const std::string& option);

/// How models are lined up, from the command line.
[[nodiscard]] taskvec::model_options model_options_of(const merge_settings& settings);

/// merge() on what --device names.
template <class Options>
taskvec::merge_report merge(const taskvec::cpu& policy, const merge_settings& settings, const Options& options,
    const taskvec::aligned_models& models, taskvec::tensor_sink& out)
{
    if (settings.run.device == "cuda") {
        return merge_on_cuda(options, models, out, settings.run.memory_bytes(), policy);
    }
    return taskvec::merge(policy, options, models, out);
}

/// A merge method of the command line. Each tools/method_<name>.cpp registers one.
struct method {
    std::string name, help;
    int place = 0; ///< in the help
    bool needs_base = true;
    std::set<std::string> uses{}; ///< options that mean something to it; others are noted as without effect
    /// Checks options that need no models. May be empty.
    void (*check)(const merge_settings&) = nullptr;
    /// Checks, for a dry run, what the method reads beside the models. May be empty.
    void (*examine)(const taskvec::cpu& policy, const merge_settings& settings, const merge_inputs& inputs) = nullptr;
    /// Merges into a sink whose tensors are inputs.models().outputs().
    taskvec::merge_report (*run)(const taskvec::cpu& policy, const merge_settings& settings, const merge_inputs& inputs,
        taskvec::tensor_sink& out) = nullptr;
};
struct register_method {
    explicit register_method(method entry);
};
/// The method of the settings; notes options that it does not use. Throws usage_error for one that needs a base and has
/// none.
[[nodiscard]] const method& find_method(const merge_settings& settings);

/// Throws invalid_argument unless `density` is in (0, 1].
void check_density(double density, const std::string& option);
/// Throws usage_error for --task PATH=WEIGHT where `who` (a verb or method) has no meaning for weights; `mend` says
/// what to do.
void check_no_weights(const merge_settings& settings, const std::string& who, const std::string& mend);
/// Throws invalid_argument unless `factor` is finite.
void check_finite(double factor, const std::string& option);

/// The part of a report that merges have in common.
[[nodiscard]] nlohmann::ordered_json report_of(const runner& run, const merge_settings& settings,
    const merge_inputs& inputs, const taskvec::merge_report& merged, std::uint64_t written);
/// Norms of a model, and of its distance from the base where there is one, tensor by tensor. `models` has one task.
[[nodiscard]] nlohmann::ordered_json norms_of(const taskvec::cpu& policy, const taskvec::aligned_models& models);
/// A merged model beside the base, lined up for norms_of().
[[nodiscard]] taskvec::aligned_models beside_base(
    const merge_settings& settings, const merge_inputs& inputs, const taskvec::checkpoint& merged);
/// What a dry run says about the inputs.
[[nodiscard]] std::string describe(const merge_inputs& inputs);

} // namespace tool
