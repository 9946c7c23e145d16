// The models that a verb reads: opened, lined up, checked, and what reports and dry runs say of them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"
#include "command.hpp"
#include "names.hpp"
#include "runner.hpp"

#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/quantising_sink.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

class adapter_sum;
class lined_up_vocabulary;
struct token_rules;

/// What is copied beside the weights of an output directory.
struct copy_request {
    std::string from;
    bool no_copy = false, copy_code = false, no_card = false;
    std::optional<std::string> chat_template{}; ///< that of the result's tokenizer
    std::string tokenizer_from{}; ///< whose tokenizer the result has, where it is not that of the other files
};

/// Layers [first, last) of a model, of a view those from `begin` on.
struct layer_part {
    std::string path;
    std::size_t first = 0, last = 0, begin = 0;
};
/// A model put together from layers of several (model_of_layers).
using model_view = std::vector<layer_part>;
/// Adds layers [first, last) of a model behind those of a view.
void append_layers(model_view& view, const std::string& path, std::size_t first, std::size_t last);

/// What a layer of a view is in the model that it comes from.
struct layer_origin {
    const layer_part* part;
    std::size_t layer;
};
/// Of a layer that is in the view.
[[nodiscard]] layer_origin origin_of(const model_view& view, std::size_t layer);

/// A model, or an adapter, that the result of a document was made of.
struct ingredient {
    std::string role, path;
    double weight = 1;
    bool adapter = false;
};

/// Which models, which of their tensors, and what is wrong with these.
struct model_request {
    std::string base, out;
    std::vector<std::string> tasks; ///< of --task and --task-adapter, in the order of the command line
    /// Which of them are adapters, and the model that each is on; empty: the base.
    std::map<std::string, std::string> adapters;
    std::string base_adapter; ///< one that is on the base itself
    std::string missing; ///< "error", "base", or as it is without the option: an error, but for integers
    std::string dtype, nonfinite = "error", overflow = "error", index = "strict", vocabulary = "error", shard_size;
    std::shared_ptr<const token_rules> rows_of_tokens; ///< where a configuration says more than `vocabulary`
    std::vector<std::string> include, exclude;
    name_rules names;
    std::map<std::string, model_view> views; ///< what stands for a model, by the keys of `names`
    bool match_prefixes = false;
    copy_request copies;
    run_options run;
    std::map<std::string, std::string> called; ///< what paths are called in what is said, where not by themselves
    /// Models that are stored nowhere, by the paths under which their outlines lie (unstored_merge).
    std::map<std::string, std::shared_ptr<const taskvec::const_model_ref>> unstored;
    /// What models that are results of other documents were made of, by their paths.
    std::map<std::string, std::vector<ingredient>> made_of;
};
/// What stands for the tensors in the file of a path that is only a model's outline; nullptr for others.
[[nodiscard]] const taskvec::const_model_ref* unstored(const model_request& request, const fs::path& path);
/// What a path is called in what is said.
[[nodiscard]] std::string called(const model_request& request, const std::string& path);

/// Adds --base, the model that the tasks started from.
void add_base_option(command& verb, model_request& request, presence how = presence::optional);
/// Adds --task and --task-adapter, at least one of which is wanted. `unit` and `help` are those of --task.
void add_tasks_options(command& verb, model_request& request, const std::string& unit, const std::string& help);
/// The same for --task PATH[=WEIGHT].
void add_weighted_tasks_option(command& verb, model_request& request);
/// Adds --nonfinite.
void add_nonfinite_option(command& verb, std::string& nonfinite);
/// Adds --overflow.
void add_overflow_option(command& verb, std::string& overflow);
[[nodiscard]] taskvec::overflow overflow_of(const std::string& word);
/// Adds --index.
void add_index_option(command& verb, std::string& index);
/// open_guarded() as --index says, under the names that rules give; notes what there is to know. `instead`: the
/// tensors, where the file's are not what is meant (unstored()).
[[nodiscard]] taskvec::checkpoint open_noted(const fs::path& path, const run_options& run, const std::string& index,
    const std::vector<name_rule>& rules = {}, const taskvec::const_model_ref* instead = nullptr);
/// Throws invalid_argument for a pattern of an option that matches none of the names. `whose`: "of 'base'".
void check_patterns(const std::vector<std::string>& patterns, const std::string& option,
    const std::vector<std::string>& names, const std::string& what);
/// Adds the options about which tensors take part and what is wrong with them. `others`: what becomes of the rest.
void add_tensor_options(command& verb, model_request& request, const std::string& others = "");
/// Adds --dtype.
void add_dtype_option(command& verb, std::string& dtype, const std::string& help);
/// The help of --dtype where models are written.
inline constexpr const char* dtype_of_result =
    "dtype of the result; keep: the base's, per tensor, and layers in scaled FP8 are quantised again (default: the "
    "base's, and F32 for quantised layers)";
/// The dtype that --dtype names; nothing for `keep`, and where it is not given.
[[nodiscard]] std::optional<taskvec::dtype> output_dtype(const std::string& text);
/// Adds --shard-size.
void add_shard_size_option(command& verb, std::string& shard_size);

/// Whether a tensor's name is matched by one of these regular expressions of an option. Throws usage_error.
[[nodiscard]] std::function<bool(std::string_view)> name_matcher(
    const std::vector<std::string>& patterns, const std::string& option);
/// Which names --include and --exclude leave: any pattern may match any part. Empty where all are.
[[nodiscard]] std::function<bool(std::string_view)> name_filter(
    const std::vector<std::string>& include, const std::vector<std::string>& exclude);

/// Throws invalid_argument where a model holds factors of an adapter that `include` does not leave out.
void check_no_factors(const taskvec::checkpoint& model, const std::function<bool(std::string_view)>& include);

/// How models are lined up, from the command line.
[[nodiscard]] taskvec::model_options model_options_of(const model_request& request);

/// The models that a command line names, opened, lined up and checked. Never moves: models() points into it.
class merge_inputs {
public:
    merge_inputs(const model_request& request, bool base_wanted);
    merge_inputs(const merge_inputs&) = delete;
    merge_inputs& operator=(const merge_inputs&) = delete;
    ~merge_inputs();

    [[nodiscard]] const taskvec::checkpoint* base() const { return base_ ? &*base_ : nullptr; }
    /// The base's tensors as they are lined up with the tasks': base()->model(), but for rows of tokens (--vocabulary).
    [[nodiscard]] const taskvec::const_model_ref& base_model() const;
    /// The same of the base, or of the first task where there is no base.
    [[nodiscard]] const taskvec::const_model_ref& reference_model() const;
    /// How rows of tokens are lined up.
    [[nodiscard]] const lined_up_vocabulary& vocabulary() const { return *vocabulary_; }
    [[nodiscard]] const std::vector<task_argument>& arguments() const { return arguments_; }
    [[nodiscard]] const std::deque<taskvec::checkpoint>& tasks() const { return tasks_; }
    /// Models that only give layers to others.
    [[nodiscard]] const std::deque<taskvec::checkpoint>& parts() const { return parts_; }
    [[nodiscard]] const std::vector<taskvec::const_model_ref>& task_models() const { return task_models_; }
    [[nodiscard]] const taskvec::aligned_models& models() const { return *models_; }
    [[nodiscard]] const std::vector<double>& weights() const { return weights_; }
    /// The adapter that task t is made of by the base; nullptr for a model.
    [[nodiscard]] const adapter_sum* adapter(std::size_t t) const
    {
        const auto place = sums_.find(t);
        return place == sums_.end() ? nullptr : place->second.get();
    }
    /// The adapter that a model which is not the base has on it, or that the base has: nullptr where there is none.
    [[nodiscard]] const adapter_sum* adapter_on(std::optional<std::size_t> t) const
    {
        const auto place = worn_.find(t);
        return place == worn_.end() ? nullptr : place->second.get();
    }
    /// Makes task `place` of other models, which stands for the base, what task t is. The sources outlive those models.
    [[nodiscard]] std::vector<std::unique_ptr<taskvec::operand_source>> attach(
        taskvec::aligned_models& models, std::size_t place, std::size_t t) const;
    /// The base's metadata, or the first task's where there is no base.
    [[nodiscard]] const taskvec::metadata_map& metadata() const
    {
        return base_ ? base_->metadata() : tasks_.front().metadata();
    }
    [[nodiscard]] std::uint64_t copied_bytes() const;
    /// The base, or the first task where there is no base.
    [[nodiscard]] const taskvec::checkpoint& reference() const { return base_ ? *base_ : tasks_.front(); }

private:
    void line_up(const model_request& request);
    void check_filters(const model_request& request) const;
    void check_layers(const model_request& request) const;
    void check_scales(const model_request& request) const;
    void line_up_vocabulary(const model_request& request);
    void check_integers(const model_request& request) const;
    void note_what_is_missing(const model_request& request) const;
    void note_copies_of_the_base(const model_request& request) const;
    [[nodiscard]] std::string name_of_base(const model_request& request) const;

    [[nodiscard]] taskvec::checkpoint open(const model_request& request, const fs::path& path, const std::string& key);
    void add_adapter(const model_request& request, const task_argument& task, std::size_t t);
    void put_on(taskvec::checkpoint& model, const task_argument& adapter, const model_request& request,
        std::optional<std::size_t> t);

    std::map<std::optional<std::size_t>, std::unique_ptr<adapter_sum>> worn_; ///< nothing: the base's
    std::map<std::size_t, std::unique_ptr<adapter_sum>> sums_;
    std::vector<std::unique_ptr<taskvec::operand_source>> sources_;
    std::deque<taskvec::checkpoint> parts_;
    std::optional<taskvec::checkpoint> base_;
    std::vector<task_argument> arguments_;
    std::vector<double> weights_;
    std::deque<taskvec::checkpoint> tasks_;
    std::unique_ptr<lined_up_vocabulary> vocabulary_;
    std::vector<taskvec::const_model_ref> task_models_;
    std::optional<taskvec::aligned_models> models_;
};

/// What the file of a result holds, where layers of `reference` are quantised; notes what becomes of them. `dtype`: the
/// text of --dtype.
[[nodiscard]] taskvec::quantised_outputs outputs_of(const run_options& run, const taskvec::aligned_models& models,
    const taskvec::checkpoint& reference, const std::string& dtype, const taskvec::const_model_ref* lined_up = nullptr);
/// The same for a merge, as its --dtype says.
[[nodiscard]] taskvec::quantised_outputs outputs_of(const model_request& request, const merge_inputs& inputs);
/// The metadata of a result whose models have this: without what it says of layers that are quantised no more.
[[nodiscard]] taskvec::metadata_map metadata_of(
    taskvec::metadata_map metadata, const std::vector<taskvec::tensor_spec>& specs);
/// Bytes of the tensors that are written.
[[nodiscard]] std::uint64_t bytes_of(const taskvec::quantised_outputs& plan);
/// Throws where a model has layers that cannot be read and that `include` does not leave out whole. `excludable`:
/// whether a command line could leave them out.
void check_readable(
    const taskvec::checkpoint& model, const std::function<bool(std::string_view)>& include, bool excludable = true);
/// Throws where a layer has lost its scale, as another of the models has it: under the names that they are lined up by.
void check_scales_alike(
    const std::vector<const taskvec::checkpoint*>& models, const std::function<bool(std::string_view)>& include);
/// "12 layers in scaled FP8 (blocks of 128 × 128)", each kind; empty where none is.
[[nodiscard]] std::string layers_text(const taskvec::checkpoint& model);

/// A merged model beside the base, lined up for norms.
[[nodiscard]] taskvec::aligned_models beside_base(
    const model_request& request, const merge_inputs& inputs, const taskvec::checkpoint& merged);
/// What becomes of tensors that take no part: the result has them too, or there is no such result.
enum class others { copied, left_alone };
/// What a dry run says about the inputs.
[[nodiscard]] std::string describe(
    const model_request& request, const merge_inputs& inputs, others rest = others::copied);

/// Throws usage_error for --task PATH=WEIGHT where `who` (a verb or method) has no meaning for weights; `mend` says
/// what to do. That of an adapter is no weight in the merge.
void check_no_weights(const model_request& request, const std::string& who, const std::string& mend);
/// Throws usage_error unless `factor` is finite.
void check_finite(double factor, const std::string& option);

} // namespace tool
