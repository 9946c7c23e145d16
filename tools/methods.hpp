// The registry of merge methods, and the flags, notes and reports that come from their tables.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "command.hpp"
#include "models.hpp"
#include "resume.hpp"

#include <taskvec/tool/method.hpp>

#include <nlohmann/json_fwd.hpp>

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tool {

/// The command line of a verb that merges or prunes.
struct merge_request : model_request {
    std::string method;
    option_values options; ///< what was given for rows of tables, in order
    std::map<std::string, std::vector<std::string>> lists; ///< what was given for list_options, by name
    std::map<std::string, option_values> weights; ///< --weight, by the text of its --task
    std::map<std::string, option_values> of_tasks; ///< --task-density and its like, by the text of its --task
    std::string as_config; ///< where the request goes as a configuration; empty: nowhere
    resume_request resume;

    [[nodiscard]] const std::vector<std::string>& list(const std::string& name) const;
};

/// A table whose rows become flags, under the name of what has it.
struct described {
    std::string name;
    std::vector<taskvec::option_description> options;
};
/// All methods, by place.
[[nodiscard]] const std::vector<method_entry>& all_methods();
/// The method of this name or alias; nullptr where there is none.
[[nodiscard]] const method_entry* method_named(std::string_view name);
/// Their tables.
[[nodiscard]] std::vector<described> method_tables();

/// Numbers that depend on the tensor (REGEX=X): the verb knows none such, says by itself that it takes none, or takes
/// them, but for options of its own.
enum class values_by_tensor { never, refused, taken };
/// Adds a flag for each row of `own`, and for each other name that some of `others` have. Rows of the same name are one
/// flag, whose help says where defaults differ. `renamed`: flags that differ from their rows' names. Presets and what
/// is given with the tasks included and left out, respectively.
void add_described_options(command& verb, const std::vector<described>& own, const std::vector<described>& others,
    option_values& values, const std::map<std::string, std::string>& renamed = {},
    values_by_tensor by_tensor = values_by_tensor::never);
/// Adds the options of all methods (after those of `own`), and those about tensors and runs: what merge, prune,
/// peru-fft and sweep share.
void add_merge_options(command& verb, merge_request& request, const std::vector<described>& own = {},
    const std::map<std::string, std::string>& renamed = {}, values_by_tensor by_tensor = values_by_tensor::taken);
/// Adds --method.
void add_method_option(command& verb, merge_request& request, presence how, const std::string& help);
/// The help lines of all methods.
[[nodiscard]] std::string method_list();

/// The method of the request; checks values, and notes options that it does not use. Throws usage_error.
[[nodiscard]] const method_entry& find_method(const merge_request& request);
/// The same for what is no method: `who` in notes, `table` and `lists` what it uses.
void check_options(const merge_request& request, const std::string& who, const described& table,
    const std::vector<std::string>& lists, const std::function<void(const option_values&)>& check_values);
/// Notes a lambda of 0 for all tensors, with which no task adds anything.
void note_zero_lambda(const run_options& run, const option_values& values);
/// Runs `check`, and throws usage_error for what it refuses.
void check_usage(const std::function<void()>& check);

/// What merge does with a request.
void run_merge(const merge_request& request);
/// Says what it would do for each tensor. `fate`: what becomes of the result, where that is not written to --out.
void explain_merge(const merge_request& request, const std::string& fate = "");
/// Puts what a merge's result would look like into a new folder, so that merges that take it are explained: its
/// tensors' names, dtypes and shapes, in a file of holes that takes no space, and what would lie beside it. `mark`:
/// makes the bytes others than those of the next such file.
void outline_merge(const merge_request& request, const fs::path& folder, unsigned char mark);
/// Why the result of a merge has to be stored before another one reads it, in words that follow a colon; empty where
/// it need not.
[[nodiscard]] std::string why_stored(const merge_request& request);
/// The tensors of a merge's result, which is stored nowhere: they are worked out whenever they are read, and what is
/// made of them is what would be made of the stored result. Puts its outline into a new folder, as outline_merge().
/// Owns what they refer to. Throws what run_merge() throws before it writes.
[[nodiscard]] std::shared_ptr<const taskvec::const_model_ref> merge_unstored(
    const merge_request& request, const fs::path& folder, unsigned char mark);

/// What a method is run with. `weights`: of the tasks, where they are not those of the command line; they outlive the
/// call.
[[nodiscard]] method_call call_of(const taskvec::cpu& policy, const merge_request& request, const merge_inputs& inputs,
    const std::vector<double>* weights = nullptr);

/// Runs a method. What is one matrix under several names in every model stays one: its further names get what the
/// first comes out as, whatever the method draws or keeps for each tensor.
taskvec::merge_report run_method(const method_entry& method, const method_call& call, taskvec::tensor_sink& out);
/// The same for a method that can, whose result is worked out when it is read.
[[nodiscard]] merge_sources run_method_on_read(
    const method_entry& method, const method_call& call, taskvec::const_model_ref& merged);

/// The part of a report that merges have in common.
[[nodiscard]] nlohmann::ordered_json report_of(const runner& run, const merge_request& request,
    const merge_inputs& inputs, const taskvec::merge_report& merged, std::uint64_t written);
/// What was given by tensor.
[[nodiscard]] nlohmann::ordered_json json_by_tensor(const merge_request& request);
/// A value of the command line: a number for all tensors, or REGEX=NUMBERS or NUMBERS, spread over the layers.
[[nodiscard]] option_value parse_value(const std::string& name, const std::string& text, const std::string& flag);
/// Throws usage_error for values by tensor where `who` takes one for all.
void check_none_by_tensor(const option_values& values, const std::string& who);
/// Options and their values.
[[nodiscard]] nlohmann::ordered_json json_of(const std::vector<taskvec::option_description>& values);
/// Norms of a model, and of its distance from the base where there is one, tensor by tensor. `models` has one task.
[[nodiscard]] nlohmann::ordered_json norms_of(const taskvec::cpu& policy, const taskvec::aligned_models& models);

} // namespace tool
