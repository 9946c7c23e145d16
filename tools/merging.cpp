// What merge, prune and peru-fft share.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"

#include <taskvec/formats/name_pattern.hpp>

#include <algorithm>
#include <cmath>

namespace tool {

namespace {

std::vector<method>& methods()
{
    static std::vector<method> list;
    return list;
}
std::vector<method> sorted_methods()
{
    auto list = methods();
    std::sort(list.begin(), list.end(), [](const method& a, const method& b) { return a.place < b.place; });
    return list;
}

/// A validator for one of a few words.
CLI::Validator one_of(const std::vector<std::string>& words)
{
    return CLI::Validator(
        [words](std::string& text) {
            std::string list;
            for (const auto& word : words) {
                if (word == text) { return std::string(); }
                list += (list.empty() ? "" : ", ") + word;
            }
            return "'" + text + "' is not one of: " + list;
        },
        "");
}

/// Notes that an option was on the command line.
CLI::Validator remembered(merge_settings& settings, const std::string& name)
{
    return CLI::Validator(
        [given = &settings.given, name](std::string&) {
            given->insert(name);
            return std::string();
        },
        "");
}

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

register_method::register_method(method entry)
{
    methods().push_back(std::move(entry));
}

std::string method_list()
{
    std::string text;
    for (const auto& entry : sorted_methods()) {
        text += "  " + entry.name + std::string(entry.name.size() < 17 ? 17 - entry.name.size() : 1, ' ') + entry.help
            + "\n";
    }
    return text;
}

const method& find_method(const merge_settings& settings)
{
    const auto& list = methods();
    const auto place =
        std::find_if(list.begin(), list.end(), [&](const method& entry) { return entry.name == settings.method; });
    if (place == list.end()) { throw usage_error("--method '" + settings.method + "' is unknown"); }
    if (place->needs_base && settings.base.empty()) {
        throw usage_error("--base is required by --method " + place->name);
    }
    // What is out of range is out of range for every method.
    check_density(settings.density.value_or(1), settings.density_option);
    check_finite(settings.lambda.value_or(0), "--lambda");
    for (const auto& option : settings.given) {
        if (!place->uses.contains(option)) {
            note(settings.run, "--" + option + " has no effect on --method " + place->name);
        }
    }
    if (place->check) { place->check(settings); }
    return *place;
}

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

void add_nonfinite_option(CLI::App& verb, std::string& nonfinite)
{
    verb.add_option("--nonfinite", nonfinite, "error or propagate: NaN and infinity in an input (default: error)")
        ->type_name("WHAT")
        ->check(one_of({"error", "propagate"}));
}

void add_tensor_options(CLI::App& verb, merge_settings& settings)
{
    verb.add_option("--include", settings.include, "Only tensors that match; others are copied from the base")
        ->type_name("REGEX")
        ->allow_extra_args(false);
    verb.add_option("--exclude", settings.exclude, "All but tensors that match")
        ->type_name("REGEX")
        ->allow_extra_args(false);
    add_nonfinite_option(verb, settings.nonfinite);
    verb.add_option("--missing", settings.missing, "error or base: a tensor that a task lacks (default: error)")
        ->type_name("WHAT")
        ->check(one_of({"error", "base"}));
}

void add_density_option(CLI::App& verb, merge_settings& settings, std::optional<double>& density,
    const std::string& option, const std::string& help)
{
    verb.add_option(option, density, help)->type_name("D")->check(remembered(settings, option.substr(2)));
}

void add_ties_options(CLI::App& verb, merge_settings& settings)
{
    const auto seen = [&settings](const char* name) { return remembered(settings, name); };
    verb.add_option("--scope", settings.scope, "model or tensor: what a density counts over (default: model)")
        ->type_name("SCOPE")
        ->check(one_of({"model", "tensor"}))
        ->check(seen("scope"));
    verb.add_option(
            "--semantics", settings.semantics, "paper, ties-merging, mergekit or peft: whose TIES (default: paper)")
        ->type_name("WHOSE")
        ->check(one_of({"paper", "ties-merging", "mergekit", "peft"}))
        ->check(seen("semantics"));
    verb.add_option("--merge-weights", settings.merge_weights,
            "mean, sum or max: how TIES joins agreeing entries (default: mean)")
        ->type_name("HOW")
        ->check(one_of({"mean", "sum", "max"}))
        ->check(seen("merge-weights"));
}

void add_merge_options(CLI::App& verb, merge_settings& settings)
{
    const auto seen = [&settings](const char* name) { return remembered(settings, name); };
    verb.add_option(
            "--lambda", settings.lambda, "Scale of the merged task vector (default: 1; 0.3 for task-arithmetic)")
        ->type_name("X")
        ->check(seen("lambda"));
    add_ties_options(verb, settings);
    verb.add_option("--seed", settings.seed, "Of random choices (default: 0)")
        ->type_name("N")
        ->transform(decimal_number())
        ->check(seen("seed"));
    verb.add_option("--fisher", settings.fisher, "Diagonal Fisher of a task; repeat in task order")
        ->type_name("FILE")
        ->allow_extra_args(false)
        ->check(seen("fisher"));
    verb.add_option("--gram", settings.gram, "Gram matrices of a task; repeat in task order")
        ->type_name("FILE")
        ->allow_extra_args(false)
        ->check(seen("gram"));
    const auto flag = [&verb, given = &settings.given](
                          const std::string& option, bool& value, const std::string& help) {
        verb.add_flag_callback(
            option,
            [given, option, &value] {
                value = true;
                given->insert(option.substr(2));
            },
            help);
    };
    flag("--normalize", settings.normalize, "fisher: divide each Fisher by its norm over the model");
    verb.add_option(
            "--floor", settings.floor, "fisher: below this sum of Fishers the plain average is taken (default: 1e-12)")
        ->type_name("X")
        ->check(seen("floor"));
    verb.add_option("--alpha", settings.alpha, "regmean: scale of the Grams' off-diagonals, 0 to 1 (default: 0.9)")
        ->type_name("X")
        ->check(seen("alpha"));
    verb.add_option(
            "--ridge", settings.ridge, "regmean: share of the mean diagonal added to it, such as 1e-6 (default: 0)")
        ->type_name("X")
        ->check(seen("ridge"));
    verb.add_option("--conv1d", settings.conv1d,
            "regmean: weights stored in x out, as Conv1D's, beside those that the Gram files name; all others are out "
            "x in")
        ->type_name("REGEX")
        ->allow_extra_args(false)
        ->check(seen("conv1d"));
    verb.add_option("--t", settings.t, "slerp: how far to go, 0 is the first model and 1 the second (default: 0.5)")
        ->type_name("X")
        ->check(seen("t"));
    flag("--unclamped", settings.unclamped, "model-stock: do not hold the ratio inside 0 to 1");
    verb.add_option("--dtype", settings.dtype,
            "keep, f32, bf16 or f16: dtype of the result (default: keep, the base's, per tensor)")
        ->type_name("DTYPE")
        ->transform(CLI::Validator(
            [](std::string& text) {
                std::transform(text.begin(), text.end(), text.begin(),
                    [](char c) { return static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c); });
                return std::string();
            },
            ""))
        ->check(one_of({"keep", "f32", "bf16", "f16"}));
    add_tensor_options(verb, settings);
    verb.add_option(
            "--shard-size", settings.shard_size, "Write a directory of shards of at most this size, such as 5GB")
        ->type_name("SIZE");
    add_run_options(verb, settings.run);
}

void add_method_option(CLI::App& verb, merge_settings& settings)
{
    std::vector<std::string> names;
    for (const auto& entry : sorted_methods()) { names.push_back(entry.name); }
    verb.add_option("--method", settings.method, "How to merge; see below")
        ->type_name("METHOD")
        ->required()
        ->check(one_of(names));
}

taskvec::model_options model_options_of(const merge_settings& settings)
{
    taskvec::model_options options;
    options.include = name_filter(settings.include, settings.exclude);
    if (settings.dtype == "f32") { options.output = taskvec::dtype::f32; }
    if (settings.dtype == "bf16") { options.output = taskvec::dtype::bf16; }
    if (settings.dtype == "f16") { options.output = taskvec::dtype::f16; }
    options.on_nonfinite =
        settings.nonfinite == "propagate" ? taskvec::nonfinite::propagate : taskvec::nonfinite::error;
    options.on_missing = settings.missing == "base" ? taskvec::missing::base : taskvec::missing::error;
    options.statistics = !settings.run.report.empty();
    options.memory = static_cast<std::size_t>(settings.run.memory_bytes());
    return options;
}

merge_inputs::merge_inputs(const merge_settings& settings, bool base_wanted)
    : arguments_(parse_tasks(settings.tasks))
{
    auto options = model_options_of(settings);
    if (!settings.shard_size.empty()) { (void)parse_size(settings.shard_size, "--shard-size"); }
    if (base_wanted || !settings.base.empty()) {
        base_.emplace(open_model(settings.base));
        options.base_label = "'" + settings.base + "'";
    }
    for (const auto& task : arguments_) {
        tasks_.push_back(open_model(task.path));
        task_models_.push_back(tasks_.back().model());
        options.labels.push_back("'" + task.path.string() + "'");
    }
    models_.emplace(base_ ? &base_->model() : nullptr, task_models_, std::move(options));
    if (!settings.include.empty() && models_->tensors().empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::message("no floating tensor of '",
            base_ ? settings.base : arguments_.front().path.string(), "' matches --include '", settings.include.front(),
            "'", settings.exclude.empty() ? "" : " and not --exclude", ": see 'taskvec inspect' for the names"));
    }
}

std::vector<double> merge_inputs::weights() const
{
    std::vector<double> result;
    for (const auto& task : arguments_) { result.push_back(task.weight); }
    return result;
}

std::uint64_t merge_inputs::copied_bytes() const
{
    std::uint64_t total = 0;
    for (const auto& tensor : models_->copied()) { total += tensor.source.bytes(); }
    return total;
}

void check_density(double density, const std::string& option)
{
    if (!(density > 0.0 && density <= 1.0)) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::message(
            option, " is ", density, "; expected a share above 0 and up to 1, such as 0.1 for a tenth"));
    }
}

void check_no_weights(const merge_settings& settings, const std::string& who, const std::string& mend)
{
    for (const auto& task : parse_tasks(settings.tasks)) {
        if (task.weight != 1) {
            throw usage_error(taskvec::message(
                who, " has no meaning for the weight ", task.weight, " of --task '", task.path.string(), "': ", mend));
        }
    }
}

void check_finite(double factor, const std::string& option)
{
    if (!std::isfinite(factor)) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::message(option, " is ", factor, "; expected a finite number"));
    }
}

namespace {

/// The nonzero entries of each task vector (of each model, where there is no base): what takes part in a merge that
/// drops nothing.
std::vector<std::uint64_t> nonzero_entries(const taskvec::cpu& policy, const taskvec::aligned_models& models)
{
    const auto sums =
        taskvec::tensor_sums(policy, models, models.task_count(), 0, "count", [](auto& rows, double* counts) {
            for (std::size_t t = 0; t < rows.task_count(); ++t) {
                const auto* const values = rows.delta(t);
                counts[t] = static_cast<double>(
                    std::count_if(values, values + rows.size(), [](auto value) { return value != 0; }));
            }
        });
    std::vector<std::uint64_t> totals(models.task_count());
    for (const auto& tensor : sums) {
        for (std::size_t t = 0; t < totals.size(); ++t) { totals[t] += static_cast<std::uint64_t>(tensor[t]); }
    }
    return totals;
}

} // namespace

nlohmann::ordered_json report_of(const runner& run, const merge_settings& settings, const merge_inputs& inputs,
    const taskvec::merge_report& merged, std::uint64_t written)
{
    nlohmann::ordered_json report;
    if (!settings.method.empty()) { report["method"] = settings.method; }
    report["output"] = settings.out;
    report["seconds"] = run.seconds();
    report["bytes_read"] = merged.walks * inputs.models().bytes() + merged.beside + inputs.copied_bytes();
    report["bytes_written"] = written;
    report["peak_memory"] = peak_memory();
    report["peak_anonymous_memory"] = run.anonymous_peak();
    report["walks"] = merged.walks;
    report["elements"] = inputs.models().elements();
    const auto kept = merged.kept.empty() ? nonzero_entries(run.policy(), inputs.models()) : merged.kept;
    report["tasks"] = nlohmann::ordered_json::array();
    for (std::size_t t = 0; t < inputs.arguments().size(); ++t) {
        const auto& task = inputs.arguments()[t];
        nlohmann::ordered_json entry{{"name", task.name}, {"path", task.path.string()}, {"weight", task.weight}};
        entry["kept"] = kept[t];
        entry["conflicting"] =
            t < merged.conflicting.size() ? merged.conflicting[t] : 0; // without an election nothing conflicts
        report["tasks"].push_back(std::move(entry));
    }
    return report;
}

nlohmann::ordered_json norms_of(const taskvec::cpu& policy, const taskvec::aligned_models& models)
{
    const auto sums = taskvec::tensor_sums(policy, models, 2, 0, "norms", [](auto& rows, double* sum) {
        const auto* const values = rows.task(0);
        sum[0] = taskvec::kernels::dot(values, values, rows.size());
        sum[1] = 0;
        if (rows.models().has_base()) {
            const auto* const change = rows.delta(0);
            sum[1] = taskvec::kernels::dot(change, change, rows.size());
        }
    });
    auto list = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < sums.size(); ++i) {
        nlohmann::ordered_json entry{{"name", models.tensors()[i].name}, {"norm", std::sqrt(sums[i][0])}};
        if (models.has_base()) { entry["change"] = std::sqrt(sums[i][1]); }
        list.push_back(std::move(entry));
    }
    return list;
}

taskvec::aligned_models beside_base(
    const merge_settings& settings, const merge_inputs& inputs, const taskvec::checkpoint& merged)
{
    auto options = model_options_of(settings);
    options.on_nonfinite = taskvec::nonfinite::propagate;
    options.output.reset();
    return {inputs.base() ? &inputs.base()->model() : nullptr, {&merged.model(), 1}, options};
}

taskvec::scope scope_of(const merge_settings& settings)
{
    const bool tensor =
        settings.scope ? *settings.scope == "tensor" : settings.semantics == "mergekit" || settings.semantics == "peft";
    return tensor ? taskvec::scope::tensor : taskvec::scope::model;
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
