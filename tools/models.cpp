// The models that a verb reads.
// SPDX-License-Identifier: Apache-2.0
#include "models.hpp"

#include "words.hpp"

#include <taskvec/formats/name_pattern.hpp>

#include <algorithm>
#include <cmath>

namespace tool {

namespace {

std::vector<taskvec::name_pattern> compile(const std::vector<std::string>& patterns, const std::string& option)
{
    std::vector<taskvec::name_pattern> result;
    for (const auto& pattern : patterns) {
        try {
            result.emplace_back(pattern);
        }
        catch (const taskvec::invalid_argument& wrong) {
            throw usage_error(option + ": " + wrong.what());
        }
    }
    return result;
}

bool any_matches(const std::vector<taskvec::name_pattern>& patterns, std::string_view name)
{
    return std::any_of(patterns.begin(), patterns.end(),
        [&](const taskvec::name_pattern& pattern) { return pattern.occurs_in(name); });
}

} // namespace

std::function<bool(std::string_view)> name_matcher(const std::vector<std::string>& patterns, const std::string& option)
{
    return [compiled = compile(patterns, option)](std::string_view name) { return any_matches(compiled, name); };
}

std::function<bool(std::string_view)> name_filter(
    const std::vector<std::string>& include, const std::vector<std::string>& exclude)
{
    if (include.empty() && exclude.empty()) { return {}; }
    return [wanted = compile(include, "--include"), unwanted = compile(exclude, "--exclude")](std::string_view name) {
        return (wanted.empty() || any_matches(wanted, name)) && !any_matches(unwanted, name);
    };
}

void add_base_option(command& verb, model_request& request, presence how)
{
    verb.text("--base", request.base, "MODEL", "The pre-trained model that the tasks started from", how);
}

void add_weighted_tasks_option(command& verb, model_request& request)
{
    verb.texts("--task", request.tasks, "PATH[=WEIGHT]",
        "A fine-tuned model, with its weight (default 1); repeat, order counts", presence::required);
}

void add_nonfinite_option(command& verb, std::string& nonfinite)
{
    verb.word("--nonfinite", nonfinite, {"error", "propagate"}, "WHAT",
        "error or propagate: NaN and infinity in an input (default: error)");
}

void add_tensor_options(command& verb, model_request& request, const std::string& others)
{
    verb.texts("--include", request.include, "REGEX", "Only tensors that match" + others);
    verb.texts("--exclude", request.exclude, "REGEX", "All but tensors that match");
    add_nonfinite_option(verb, request.nonfinite);
    verb.word("--missing", request.missing, {"error", "base"}, "WHAT",
        "error or base: a tensor that a task lacks (default: error)");
}

void add_dtype_option(command& verb, std::string& dtype, const std::string& help)
{
    verb.word("--dtype", dtype, {"keep", "f32", "bf16", "f16"}, "DTYPE", "keep, f32, bf16 or f16: " + help, true);
}

std::optional<taskvec::dtype> output_dtype(const std::string& text)
{
    std::string name = text;
    std::transform(name.begin(), name.end(), name.begin(),
        [](char c) { return static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c); });
    return taskvec::parse_dtype(name); // nothing for KEEP
}

void add_shard_size_option(command& verb, std::string& shard_size)
{
    verb.text("--shard-size", shard_size, "SIZE", "Write a directory of shards of at most this size, such as 5GB");
}

taskvec::model_options model_options_of(const model_request& request)
{
    taskvec::model_options options;
    options.include = name_filter(request.include, request.exclude);
    options.output = output_dtype(request.dtype);
    options.on_nonfinite = request.nonfinite == "propagate" ? taskvec::nonfinite::propagate : taskvec::nonfinite::error;
    options.on_missing = request.missing == "base" ? taskvec::missing_tensors::base : taskvec::missing_tensors::error;
    options.statistics = !request.run.report.empty();
    options.memory = static_cast<std::size_t>(request.run.memory_bytes());
    return options;
}

merge_inputs::merge_inputs(const model_request& request, bool base_wanted)
    : arguments_(parse_tasks(request.tasks))
{
    auto options = model_options_of(request);
    if (!request.shard_size.empty()) { (void)parse_size(request.shard_size, "--shard-size"); }
    if (base_wanted || !request.base.empty()) {
        base_.emplace(open_guarded(request.base));
        options.base_label = "'" + request.base + "'";
    }
    for (const auto& task : arguments_) {
        weights_.push_back(task.weight);
        tasks_.push_back(open_guarded(task.path));
        task_models_.push_back(tasks_.back().model());
        options.labels.push_back("'" + task.path.string() + "'");
    }
    models_.emplace(base_ ? &base_->model() : nullptr, task_models_, std::move(options));
    if (!request.include.empty() && models_->tensors().empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::nothing_selected,
            taskvec::message("no floating tensor of '", base_ ? request.base : arguments_.front().path.string(),
                "' matches --include '", request.include.front(), "'",
                request.exclude.empty() ? "" : " and not --exclude", ": see 'taskvec inspect' for the names"));
    }
}

std::uint64_t merge_inputs::copied_bytes() const
{
    std::uint64_t total = 0;
    for (const auto& tensor : models_->copied()) { total += tensor.source.bytes(); }
    return total;
}

void check_no_weights(const std::vector<std::string>& tasks, const std::string& who, const std::string& mend)
{
    for (const auto& task : parse_tasks(tasks)) {
        if (task.weight != 1) {
            throw usage_error(taskvec::message(
                who, " has no meaning for the weight ", task.weight, " of --task '", task.path.string(), "': ", mend));
        }
    }
}

void check_finite(double factor, const std::string& option)
{
    if (!std::isfinite(factor)) {
        throw usage_error(taskvec::message(option, " is ", factor, "; expected a finite number"));
    }
}

taskvec::aligned_models beside_base(
    const model_request& request, const merge_inputs& inputs, const taskvec::checkpoint& merged)
{
    auto options = model_options_of(request);
    options.on_nonfinite = taskvec::nonfinite::propagate;
    options.output.reset();
    return {inputs.base() ? &inputs.base()->model() : nullptr, {&merged.model(), 1}, options};
}

std::string describe(const merge_inputs& inputs)
{
    std::string text;
    const auto line = [&](const char* role, const taskvec::checkpoint& model, const std::string& more) {
        text += std::string("  ") + role + "  " + printable(model.path().string()) + "  "
            + size_text(model.data_bytes()) + more + "\n";
    };
    if (inputs.base()) { line("base", *inputs.base(), ""); }
    for (std::size_t t = 0; t < inputs.tasks().size(); ++t) {
        line("task", inputs.tasks()[t],
            inputs.arguments()[t].weight == 1 ? "" : taskvec::message("  weight ", inputs.arguments()[t].weight));
    }
    text += "  " + counted(inputs.models().tensors().size(), "tensor") + " of "
        + counted(inputs.models().elements(), "element") + " take part, "
        + counted(inputs.models().copied().size(), "tensor") + (inputs.models().copied().size() == 1 ? " is" : " are")
        + " copied\n";
    return text;
}

} // namespace tool
