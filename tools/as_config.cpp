// merge --as-config: a command line as a configuration of mergekit.
// SPDX-License-Identifier: Apache-2.0
#include "as_config.hpp"

#include "mergekit_words.hpp"
#include "words.hpp"

#if defined(TASKVEC_HAS_YAML)
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <map>
#include <set>
#include <string_view>
#include <vector>
#endif

namespace tool {

#if defined(TASKVEC_HAS_YAML)

namespace {

using row = taskvec::option_description;

[[noreturn]] void cannot_say(const std::string& what, const std::string& mend)
{
    throw usage_error("--as-config: a configuration cannot say " + what + "; " + mend);
}

/// What it says of the inputs and of nothing that a method takes.
void check_inputs(const merge_request& request)
{
    const auto refuse = [](bool given, const std::string& option) {
        if (given) { cannot_say(option, "leave it out, or write the merged model alone"); }
    };
    refuse(!request.include.empty(), "--include");
    refuse(!request.exclude.empty(), "--exclude");
    refuse(request.missing == "base", "--missing");
    refuse(std::any_of(request.names.begin(), request.names.end(), [](const auto& one) { return !one.second.empty(); }),
        "--rename and --map");
    refuse(request.match_prefixes, "--match-prefixes");
    refuse(request.vocabulary != "error", "--vocabulary");
    for (const auto& [name, texts] : request.lists) { refuse(!texts.empty(), "--" + name); }
}

const mergekit_method& words_of(const merge_request& request)
{
    const auto& known = mergekit_methods();
    const auto place = std::find_if(
        known.begin(), known.end(), [&](const mergekit_method& one) { return one.ours == request.method; });
    if (place == known.end()) { cannot_say("--method " + request.method, "mergekit has no such method"); }
    return *place;
}

/// The text that occurs in just the names that a pattern matches; a filter of mergekit's is one.
std::string filter_of(const option_value& value, const std::vector<std::string>& tensors)
{
    std::string text;
    for (std::size_t i = 0; i < value.pattern.size(); ++i) {
        if (value.pattern[i] == '\\' && i + 1 < value.pattern.size()) { ++i; }
        text += value.pattern[i];
    }
    const auto matches = name_matcher({value.pattern}, value.flag);
    for (const auto& name : tensors) {
        const auto its = name_in_filters(name);
        if (matches(name) != (its.find(text) != its.npos)) {
            cannot_say("the pattern '" + value.pattern + "' of " + value.flag,
                "its filters are plain text that occurs in a tensor's name"
                    + (its == name ? "" : ", and call '" + name + "' '" + its + "'"));
        }
    }
    return text;
}

/// Values of a parameter: those of tensors that a text occurs in, the first that matches counts, then that of all.
void put(YAML::Emitter& out, const std::string& name, const option_values& by_tensor, const std::string& of_all,
    const std::vector<std::string>& tensors)
{
    out << YAML::Key << name << YAML::Value;
    if (by_tensor.empty()) {
        out << of_all;
        return;
    }
    out << YAML::BeginSeq;
    for (auto one = by_tensor.rbegin(); one != by_tensor.rend(); ++one) { // on the command line the last counts
        if (one->pattern.empty() || one->numbers.size() != 1) {
            cannot_say(one->flag + " spread over the layers as here", "give REGEX=X for the tensors that differ");
        }
        out << YAML::BeginMap << YAML::Key << "filter" << YAML::Value << filter_of(*one, tensors) << YAML::Key
            << "value" << YAML::Value << taskvec::csv_number(one->numbers.front()) << YAML::EndMap;
    }
    if (!of_all.empty()) { out << YAML::BeginMap << YAML::Key << "value" << YAML::Value << of_all << YAML::EndMap; }
    out << YAML::EndSeq;
}

/// What is given for some tensors of a row.
option_values by_tensor(const option_values& values, const std::string& name)
{
    option_values found;
    std::copy_if(values.begin(), values.end(), std::back_inserter(found),
        [&](const option_value& one) { return one.by_tensor && one.name == name; });
    return found;
}

/// The truth that sets a row to a value; empty where none does.
std::string truth_of(const mergekit_parameter& one, const std::string& value, const std::string& semantics)
{
    const auto off = one.word(false, semantics);
    return value == one.word(true, semantics) ? "true" : value == off || off.empty() ? "false" : "";
}

/// Whether `run` would promote without a dtype: numbers of several dtypes, and no quantised layers.
bool promotes(const merge_inputs& inputs)
{
    std::set<taskvec::dtype> found;
    const auto look = [&](const taskvec::checkpoint& model) {
        for (const auto& [name, tensor] : model.model()) {
            if (tensor.source) { return false; }
            if (taskvec::is_storage(tensor.dtype)) { found.insert(tensor.dtype); }
        }
        return true;
    };
    const bool plain =
        (!inputs.base() || look(*inputs.base())) && std::all_of(inputs.tasks().begin(), inputs.tasks().end(), look);
    return plain && found.size() > 1;
}

/// What says the dtypes of a result.
struct said_dtype {
    std::string of_all; ///< mergekit's word; empty: nothing has to be said
    bool kept = false; ///< each tensor has the base's, which mergekit has no word for
};
said_dtype dtype_of(const merge_request& request, const merge_inputs& inputs, const taskvec::quantised_outputs& plan)
{
    for (const auto& [theirs, ours] : mergekit_dtypes()) {
        if (ours == request.dtype) { return {theirs}; }
    }
    if (!plan.plain() && request.dtype == "keep") { return {"", true}; }
    if (!promotes(inputs)) { return {}; }
    std::set<taskvec::dtype> found;
    for (const auto& spec : plan.specs) {
        if (taskvec::is_storage(spec.dtype) || taskvec::is_fp8(spec.dtype)) { found.insert(spec.dtype); }
    }
    for (const auto& [theirs, ours] : mergekit_dtypes()) {
        if (found.size() == 1 && output_dtype(ours) == *found.begin()) { return {theirs}; }
    }
    const auto kept =
        taskvec::plan_outputs(inputs.models(), inputs.reference_model(), inputs.reference().layers(), true);
    if (!kept.plain()) {
        cannot_say("that FP8 becomes numbers and other tensors keep their dtype", "give one --dtype for all");
    }
    return {"", true};
}

class writer {
public:
    writer(const merge_request& request, const method_entry& method, const merge_inputs& inputs,
        const taskvec::quantised_outputs& plan)
        : request_(request)
        , dtype_(dtype_of(request, inputs, plan))
        , words_(words_of(request))
        , rows_(method.values(request.options))
    {
        for (const auto& option : request.options) {
            if (option.name == "semantics" && option.text == "mergekit") { semantics_ = option.text; }
        }
        const option_values preset =
            words_.semantics ? option_values{{"semantics", semantics_, "--semantics"}} : option_values();
        plain_ = method.values(preset);
        tasks_ = parse_tasks(request.tasks);
        for (const auto& tensor : inputs.models().tensors()) { tensors_.push_back(tensor.name); }
    }

    std::string text()
    {
        out_ << YAML::BeginMap << YAML::Key << "merge_method" << YAML::Value << words_.theirs;
        put_base();
        put_models();
        put_parameters();
        if (!dtype_.of_all.empty()) { out_ << YAML::Key << "out_dtype" << YAML::Value << dtype_.of_all; }
        put_own();
        out_ << YAML::EndMap;
        return "# taskvec run FILE --out DIR makes this merge; mergekit passes over what stands under 'taskvec'.\n"
            + std::string(out_.c_str()) + "\n";
    }

private:
    void put_base()
    {
        using base = mergekit_method::base;
        if (request_.base.empty()) {
            if (words_.takes == base::required) {
                cannot_say(request_.method + " without a base", "give one of the models as --base");
            }
            return;
        }
        if (words_.takes == base::input) {
            cannot_say("--base of " + request_.method + ", which mergekit would merge as well", "leave it out");
        }
        out_ << YAML::Key << "base_model" << YAML::Value;
        put_name(request_.base, "");
    }

    /// A model, with an adapter on it or by itself; as a mapping where its name would be taken apart at a `+`.
    void put_name(const std::string& model, const std::string& adapter)
    {
        if ((model + adapter).find('+') == std::string::npos) {
            out_ << model + (adapter.empty() ? "" : "+" + adapter);
            return;
        }
        const auto put_path = [&](const char* key, const std::string& path) {
            out_ << YAML::Key << key << YAML::Value << YAML::BeginMap << YAML::Key << "path" << YAML::Value << path
                 << YAML::EndMap;
        };
        out_ << YAML::BeginMap;
        put_path("model", model);
        if (!adapter.empty()) { put_path("lora", adapter); }
        out_ << YAML::EndMap;
    }

    void put_models()
    {
        out_ << YAML::Key << "models" << YAML::Value << YAML::BeginSeq;
        std::set<std::string> seen{request_.base};
        if (tasks_.size() > words_.most) {
            cannot_say(counted(tasks_.size(), "task") + " of " + request_.method + " beside a base",
                "give one of them as --base");
        }
        for (std::size_t t = 0; t < tasks_.size(); ++t) {
            const auto& text = request_.tasks[t];
            const auto path = tasks_[t].path.string();
            if (request_.adapters.contains(text) && tasks_[t].weight != 1) {
                cannot_say(taskvec::message(taskvec::csv_number(tasks_[t].weight), " times the update of '", path, "'"),
                    "store the model first (taskvec fuse --adapter " + text + ") and give it as --task");
            }
            const bool adapter = request_.adapters.contains(text);
            if (!seen.insert(adapter ? request_.base + "+" + path : path).second) {
                cannot_say("'" + path + "' twice", "give each model once");
            }
            out_ << YAML::BeginMap << YAML::Key << "model" << YAML::Value;
            put_name(adapter ? request_.base : path, adapter ? path : "");
            put_parameters_of(t);
            out_ << YAML::EndMap;
        }
        out_ << YAML::EndSeq;
    }

    void put_parameters_of(std::size_t t)
    {
        const auto own = request_.of_tasks.find(request_.tasks[t]);
        const auto weights = request_.weights.find(request_.tasks[t]);
        check_parameters_of(t);
        bool open = false;
        const auto start = [&] {
            if (!open) { out_ << YAML::Key << "parameters" << YAML::Value << YAML::BeginMap; }
            open = true;
        };
        for (const auto& one : words_.parameters) {
            if (one.name == "weight") {
                start();
                put(out_, "weight", weights == request_.weights.end() ? option_values() : weights->second,
                    taskvec::csv_number(tasks_[t].weight), tensors_);
            }
            else if (own != request_.of_tasks.end()) {
                std::string of_all;
                for (const auto& value : own->second) {
                    if (value.name == one.row && !value.by_tensor) { of_all = value.text; }
                }
                const auto some = by_tensor(own->second, one.row);
                if (some.empty() && of_all.empty()) { continue; }
                start();
                put(out_, one.name, some, of_all, tensors_);
            }
        }
        if (open) { out_ << YAML::EndMap; }
    }

    /// Refuses what a model has of its own and mergekit has for none.
    void check_parameters_of(std::size_t t) const
    {
        const auto has = [&](const std::string& row) {
            return std::any_of(words_.parameters.begin(), words_.parameters.end(), [&](const mergekit_parameter& one) {
                return one.row == row && one.of != mergekit_parameter::scope::shared;
            });
        };
        const auto& text = request_.tasks[t];
        const bool weighs = request_.weights.contains(text)
            || (tasks_[t].weight != 1 && !request_.adapters.contains(text)); // that of an adapter is its own
        if (weighs && !has("weight")) {
            cannot_say("the weight of '" + tasks_[t].path.string() + "' with --method " + request_.method,
                "mergekit's '" + words_.theirs + "' weighs all models alike: leave weights out, or --as-config");
        }
        if (const auto own = request_.of_tasks.find(text); own != request_.of_tasks.end()) {
            for (const auto& value : own->second) {
                if (!has(value.name)) {
                    cannot_say(
                        value.flag + " with --method " + request_.method, "give one --" + value.name + " for all");
                }
            }
        }
    }

    void put_parameters()
    {
        bool open = false;
        for (const auto& one : words_.parameters) {
            if (one.name == "weight") { continue; }
            const auto place =
                std::find_if(rows_.begin(), rows_.end(), [&](const row& its) { return its.name == one.row; });
            if (place == rows_.end()) { continue; }
            const bool truth = one.type == mergekit_parameter::kind::truth;
            const auto word = truth ? truth_of(one, place->initial, semantics_) : place->initial;
            if (word.empty()) { continue; } // it stands under `taskvec`
            said_.insert(one.row);
            if (!open) { out_ << YAML::Key << "parameters" << YAML::Value << YAML::BeginMap; }
            open = true;
            put(out_, one.name, by_tensor(request_.options, one.row), word, tensors_);
        }
        if (open) { out_ << YAML::EndMap; }
    }

    /// What mergekit has no word for.
    void put_own()
    {
        out_ << YAML::Key << "taskvec" << YAML::Value << YAML::BeginMap << YAML::Key << "semantics" << YAML::Value
             << semantics_;
        if (dtype_.kept) { out_ << YAML::Key << "dtype" << YAML::Value << "keep"; }
        for (std::size_t i = 0; i < rows_.size(); ++i) {
            const auto& one = rows_[i];
            if (one.is_preset || one.per_task || said_.contains(one.name)) { continue; }
            if (const auto some = by_tensor(request_.options, one.name); !some.empty()) {
                cannot_say(some.front().flag + " by tensor", "give one value for all");
            }
            if (one.initial != plain_[i].initial) { out_ << YAML::Key << one.name << YAML::Value << one.initial; }
        }
        out_ << YAML::EndMap;
    }

    const merge_request& request_;
    const said_dtype dtype_;
    std::vector<std::string> tensors_;
    const mergekit_method& words_;
    std::vector<row> rows_, plain_; ///< the values, and those of the semantics alone
    std::string semantics_ = "paper"; ///< those that `run` knows; other presets are their rows
    std::vector<task_argument> tasks_;
    std::set<std::string> said_; ///< rows that mergekit has a word for
    YAML::Emitter out_;
};

} // namespace

std::string configuration_of(const merge_request& request, const method_entry& method, const merge_inputs& inputs,
    const taskvec::quantised_outputs& plan)
{
    check_inputs(request);
    return writer(request, method, inputs, plan).text();
}

#else

std::string configuration_of(
    const merge_request&, const method_entry&, const merge_inputs&, const taskvec::quantised_outputs&)
{
    throw usage_error("--as-config: this build of taskvec writes no configurations: it was built without yaml-cpp "
                      "(Debian: libyaml-cpp-dev); install it, configure anew and build again");
}

#endif

} // namespace tool
