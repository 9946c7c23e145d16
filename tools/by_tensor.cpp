// Options whose values depend on the tensor: by patterns, and by depth.
// SPDX-License-Identifier: Apache-2.0
#include "mergekit_words.hpp"
#include "methods.hpp"
#include "words.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <set>
#include <utility>

namespace tool {

option_value parse_value(const std::string& name, const std::string& text, const std::string& flag)
{
    option_value value{name, text, flag};
    const auto sign = text.rfind('=');
    if (sign == text.npos && text.find(',') == text.npos) { return value; }
    value.by_tensor = true;
    if (sign != text.npos) { value.pattern = text.substr(0, sign); }
    std::string_view left = std::string_view(text).substr(sign == text.npos ? 0 : sign + 1);
    for (bool more = true; more;) {
        const auto comma = left.find(',');
        more = comma != left.npos;
        const std::string word(left.substr(0, comma));
        char* end = nullptr;
        const double number = std::strtod(word.c_str(), &end);
        if (word.empty() || *end != '\0' || !std::isfinite(number)) {
            throw usage_error(flag + " '" + text + "': '" + word
                + "' is no number; expected a number, REGEX=NUMBER, or several with commas between them, which are "
                  "spread "
                  "over the layers");
        }
        value.numbers.push_back(number);
        if (more) { left.remove_prefix(comma + 1); }
    }
    (void)name_matcher({value.pattern}, flag);
    return value;
}

void check_none_by_tensor(const option_values& values, const std::string& who)
{
    for (const auto& value : values) {
        if (value.by_tensor) {
            throw usage_error(value.flag + " '" + value.text + "': " + who + " takes one number for all tensors");
        }
    }
}

bool part_of_model::holds(std::string_view tensor) const
{
    if (const auto layer = layer_of(tensor)) { return layer->second >= first && layer->second < last; }
    return stands_before_layers(tensor) ? begins : ends;
}

namespace {

/// The number of a layer among `count`. mergekit rounds a layer's share of the depth first, and takes a single layer
/// for the last one. Layers behind these, for predicting further tokens, are as the last one.
double at_depth(const option_value& value, std::size_t layer, std::size_t count)
{
    const double last = static_cast<double>(value.numbers.size() - 1), layers = static_cast<double>(count) - 1;
    const double at = std::min(static_cast<double>(layer), layers);
    double place = 0;
    if (value.as_in_mergekit) { place = (count > 1 ? at / layers : 1) * last; }
    else if (count > 1) {
        place = last * at / layers;
    }
    const auto left = std::min(static_cast<std::size_t>(place), value.numbers.size() - 2);
    const double share = place - static_cast<double>(left);
    return (1 - share) * value.numbers[left] + share * value.numbers[left + 1];
}

/// The text that a pattern of a configuration's filter stands for.
std::string plain_text(const std::string& pattern)
{
    std::string text;
    for (std::size_t i = 0; i < pattern.size(); ++i) {
        if (pattern[i] == '\\' && i + 1 < pattern.size()) { ++i; }
        text += pattern[i];
    }
    return text;
}

/// What a tensor of the result is called in a model that gives it layers; the same where it does not.
std::string name_in_model(std::string_view tensor, const model_view* view)
{
    const auto layer = view && !view->empty() ? layer_of(tensor) : std::nullopt;
    return layer ? in_layer(tensor, *layer, origin_of(*view, layer->second).layer) : std::string(tensor);
}

/// Values by tensor, ready to be asked: how many layers there are is known, and every pattern matches something.
class tensor_values {
public:
    /// `view`: the layers of the model that has the values for itself. Filters of a configuration mean its names; those
    /// of what all models share mean the result's. `of_model`: which options are a model's own; empty: all of them.
    /// `before`: how many layers count where further ones stand behind them.
    tensor_values(const option_values& values, const taskvec::aligned_models& models, const run_options& run,
        const std::map<std::string, std::size_t>& before, const model_view* view = nullptr,
        const std::set<std::string>& of_model = {})
        : view_(view)
    {
        std::vector<std::string> names, in_filters, in_filters_of_model; // as the files, and as filters call them
        for (const auto& tensor : models.tensors()) {
            names.push_back(tensor.name);
            in_filters.push_back(name_in_filters(tensor.name));
            in_filters_of_model.push_back(name_in_filters(name_in_model(tensor.name, view)));
            if (const auto layer = layer_of(tensor.name)) {
                auto& count = layers_[layer->first];
                count = std::max(count, layer->second + 1);
            }
        }
        for (const auto& [prefix, count] : before) {
            if (const auto place = layers_.find(prefix); place != layers_.end()) {
                place->second = std::min(place->second, count);
            }
        }
        std::vector<std::string> unmatched;
        for (const auto& value : values) {
            if (!value.by_tensor) { continue; }
            const bool own = of_model.empty() || of_model.contains(value.name);
            entry made{value, {}, plain_text(value.pattern), value.as_in_mergekit && own};
            if (!value.as_in_mergekit) {
                made.matches = name_matcher({value.pattern}, value.flag);
                if (!value.pattern.empty()) {
                    check_patterns({value.pattern}, value.flag, names, "tensor that takes part");
                }
            }
            else if (!value.pattern.empty()) {
                const auto& its = made.in_model ? in_filters_of_model : in_filters;
                const auto has = [&](const std::string& name) { return name.find(made.text) != name.npos; };
                if (std::none_of(its.begin(), its.end(), has)) {
                    const auto file = std::find_if(names.begin(), names.end(), has);
                    unmatched.push_back(value.flag + ": the filter matches no tensor that takes part"
                        + (file == names.end() ? ""
                                               : "; filters call '" + *file + "' '" + name_in_filters(*file) + "'"));
                    continue;
                }
            }
            if (value.numbers.size() > 1 && layers_.empty()) {
                taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
                    value.flag + " '" + value.text
                        + "' is spread over layers, and no tensor has a layer's number in its name: give one number");
            }
            (value.part ? of_parts_[value.part->first] : everywhere_).push_back(values_.size());
            values_.push_back(std::move(made));
        }
        constexpr std::size_t most = 5;
        for (std::size_t i = 0; i < std::min(most, unmatched.size()); ++i) { // what counts last is the first
            note(run, *(unmatched.rbegin() + static_cast<std::ptrdiff_t>(i)));
        }
        if (unmatched.size() > most) {
            note(run, counted(unmatched.size() - most, "more filter") + " match no tensor that takes part");
        }
    }
    [[nodiscard]] bool empty() const { return values_.empty(); }
    /// What holds for a tensor, in order: the last is to win.
    [[nodiscard]] option_values of(std::string_view tensor) const
    {
        option_values result;
        const auto layer = layer_of(tensor);
        const auto of_result = name_in_filters(tensor), of_model = name_in_filters(name_in_model(tensor, view_));
        for (const auto i : places_of(layer)) {
            const auto& [value, matches, text, own] = values_[i];
            if (!value.as_in_mergekit) {
                if (!value.pattern.empty() && !matches(tensor)) { continue; }
            }
            else if ((own ? of_model : of_result).find(text) == std::string::npos) {
                continue;
            }
            const auto& part = value.part;
            if (part && !part->holds(tensor)) { continue; }
            if (value.numbers.empty()) { // a word
                result.push_back({value.name, value.text, value.flag});
                continue;
            }
            double number = value.numbers.front();
            if (value.numbers.size() > 1) {
                if (!layer && !value.as_in_mergekit) { continue; } // it has the value that all have
                if (layer && part) { number = at_depth(value, layer->second - part->first, part->last - part->first); }
                else if (layer) {
                    number = at_depth(value, layer->second, layers_.at(layer->first));
                }
            }
            result.push_back({value.name, taskvec::csv_number(number), value.flag});
        }
        return result;
    }

private:
    struct entry {
        option_value value;
        std::function<bool(std::string_view)> matches;
        std::string text; ///< of a configuration's filter
        bool in_model = false; ///< whose names are the model's
    };
    /// Which values can hold in a layer, or outside of all, in order.
    [[nodiscard]] std::vector<std::size_t> places_of(
        const std::optional<std::pair<std::string, std::size_t>>& layer) const
    {
        auto places = everywhere_;
        const auto add = [&](const std::vector<std::size_t>& more) {
            places.insert(places.end(), more.begin(), more.end());
        };
        if (layer) { // parts follow each other: it is in the last that begins before it
            const auto after = of_parts_.upper_bound(layer->second);
            if (after != of_parts_.begin()) { add(std::prev(after)->second); }
        }
        else {
            for (const auto& one : of_parts_) {
                const auto& mine = one.second;
                const auto outside = [&](std::size_t i) {
                    const auto& part = *values_[i].value.part;
                    return part.begins || part.ends;
                };
                if (std::any_of(mine.begin(), mine.end(), outside)) { add(mine); }
            }
        }
        std::sort(places.begin(), places.end());
        return places;
    }

    const model_view* view_;
    std::vector<entry> values_;
    std::vector<std::size_t> everywhere_;
    std::map<std::size_t, std::vector<std::size_t>> of_parts_; ///< by where they begin
    std::map<std::string, std::size_t> layers_;
};

/// The view of a model that a key of a request names; nullptr where it has none.
const model_view* view_of(const merge_request& request, const std::string& key)
{
    const auto place = request.views.find(key);
    return place == request.views.end() ? nullptr : &place->second;
}

/// What mergekit has for each model by itself, though it is the same for all of them.
std::set<std::string> rows_of_models(const merge_request& request)
{
    std::set<std::string> rows{""}; // not none, which would be all
    for (const auto& method : mergekit_methods()) {
        if (method.ours != request.method) { continue; }
        for (const auto& one : method.parameters) {
            if (one.of != mergekit_parameter::scope::shared) { rows.insert(one.row); }
        }
    }
    return rows;
}

/// How many layers of the result count for values that are spread over them, where further ones stand behind; slices
/// have none.
std::map<std::string, std::size_t> layers_that_count(const merge_request& request, const merge_inputs& inputs)
{
    if (!request.views.empty() || inputs.tasks().empty()) { return {}; }
    const auto& first = inputs.base() ? *inputs.base() : inputs.tasks().front();
    return layers_before_prediction(first.model(), config_beside(first.path()));
}

/// Whether a merge divides by the sum of the weights as mergekit does.
bool divides_as_mergekit(const merge_request& request)
{
    const auto* const method = method_named(request.method);
    const auto divides = [](const taskvec::option_description& row) { return row.name == "normalize-weights"; };
    if (!method || std::none_of(method->options.begin(), method->options.end(), divides)) { return false; }
    bool found = false;
    for (const auto& value : request.options) {
        if (value.name == "semantics") { found = value.text == "mergekit"; }
    }
    return found;
}

/// mergekit divides by 1 where the weights of a tensor cancel.
bool cancel(const std::vector<double>& weights)
{
    constexpr double nothing = 1e-8;
    return std::abs(std::accumulate(weights.begin(), weights.end(), 0.0)) < nothing;
}

} // namespace

method_call call_of(const taskvec::cpu& policy, const merge_request& request, const merge_inputs& inputs,
    const std::vector<double>* weights_of_tasks)
{
    const auto& all = weights_of_tasks ? *weights_of_tasks : inputs.weights();
    if (!weights_of_tasks) {
        auto weighted = inputs.arguments();
        for (auto& task : weighted) { // whose number is not the whole of it
            const auto host = request.adapters.find(task.text);
            const bool other = host != request.adapters.end() && !host->second.empty();
            if (other || request.weights.contains(task.text)) { task.weight = 1; }
        }
        note_zero_weights(request.run, weighted);
    }
    method_call call{policy, inputs.models(), request.options, all, request, inputs, request.run.device == "cuda",
        static_cast<std::size_t>(request.run.memory_bytes())};
    const auto* const first = view_of(request, request.tasks.empty() ? "" : request.tasks.front());
    const auto before = layers_that_count(request, inputs);
    auto values = std::make_shared<tensor_values>(
        request.options, inputs.models(), request.run, before, first, rows_of_models(request));
    if (!values->empty()) {
        call.values_of = [values](std::string_view tensor) { return values->of(tensor); };
    }
    std::vector<std::pair<std::size_t, tensor_values>> weights;
    for (std::size_t t = 0; t < inputs.arguments().size(); ++t) {
        const auto place = request.weights.find(inputs.arguments()[t].text);
        if (place != request.weights.end()) {
            const auto* const view = view_of(request, place->first);
            weights.emplace_back(t, tensor_values(place->second, inputs.models(), request.run, before, view));
        }
    }
    if (!weights.empty()) {
        call.weights_of = [weights, plain = all](std::string_view tensor) {
            auto result = plain;
            for (const auto& [t, given] : weights) {
                for (const auto& value : given.of(tensor)) { result[t] = std::strtod(value.text.c_str(), nullptr); }
            }
            return result;
        };
    }
    std::vector<std::pair<std::size_t, tensor_values>> own;
    for (std::size_t t = 0; t < inputs.arguments().size(); ++t) {
        const auto place = request.of_tasks.find(inputs.arguments()[t].text);
        if (place == request.of_tasks.end()) { continue; }
        call.of_tasks.resize(inputs.arguments().size());
        for (const auto& value : place->second) {
            if (!value.by_tensor) { call.of_tasks[t].push_back(value); }
        }
        const auto* const view = view_of(request, place->first);
        if (tensor_values more(place->second, inputs.models(), request.run, before, view); !more.empty()) {
            own.emplace_back(t, std::move(more));
        }
    }
    if (!own.empty()) {
        call.of_tasks_in = [own, plain = call.of_tasks](std::string_view tensor) {
            auto result = plain;
            for (const auto& [t, given] : own) {
                for (auto& value : given.of(tensor)) { result[t].push_back(std::move(value)); }
            }
            return result;
        };
    }
    if ((call.weights_of || cancel(all)) && divides_as_mergekit(request)) {
        call.values_of = [of = call.values_of, weights_of = call.weights_of, plain = all](std::string_view tensor) {
            auto result = of ? of(tensor) : option_values();
            if (cancel(weights_of ? weights_of(tensor) : plain)) {
                result.push_back({"normalize-weights", "false", "--normalize-weights"});
            }
            return result;
        };
    }
    if (call.on_device && (call.values_of || call.weights_of || call.of_tasks_in)) {
        throw usage_error("--device cuda: values by tensor are for the cpu; leave --device out");
    }
    return call;
}

nlohmann::ordered_json json_by_tensor(const merge_request& request)
{
    auto list = nlohmann::ordered_json::array();
    const auto add = [&](const option_value& value, const std::string& task) {
        if (!value.by_tensor) { return; }
        nlohmann::ordered_json one{{"option", value.name}};
        if (!task.empty()) { one["task"] = task; }
        if (!value.pattern.empty()) { one["pattern"] = value.pattern; }
        if (value.part) { one["layers"] = {value.part->first, value.part->last}; }
        if (value.numbers.empty()) { one["value"] = value.text; }
        else {
            one["values"] = value.numbers;
        }
        list.push_back(std::move(one));
    };
    for (const auto& value : request.options) { add(value, ""); }
    for (const auto* of_tasks : {&request.weights, &request.of_tasks}) {
        for (const auto& [task, values] : *of_tasks) {
            for (const auto& value : values) { add(value, task); }
        }
    }
    return list;
}

} // namespace tool
