// Options whose values depend on the tensor: by patterns, and by depth.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"
#include "words.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
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
/// for the last one.
double at_depth(const option_value& value, std::size_t layer, std::size_t count)
{
    const double last = static_cast<double>(value.numbers.size() - 1), layers = static_cast<double>(count) - 1;
    double place = 0;
    if (value.as_in_mergekit) { place = (count > 1 ? static_cast<double>(layer) / layers : 1) * last; }
    else if (count > 1) {
        place = last * static_cast<double>(layer) / layers;
    }
    const auto left = std::min(static_cast<std::size_t>(place), value.numbers.size() - 2);
    const double share = place - static_cast<double>(left);
    return (1 - share) * value.numbers[left] + share * value.numbers[left + 1];
}

/// Values by tensor, ready to be asked: how many layers there are is known, and every pattern matches something.
class tensor_values {
public:
    tensor_values(const option_values& values, const taskvec::aligned_models& models, const run_options& run)
    {
        std::vector<std::string> names;
        for (const auto& tensor : models.tensors()) {
            names.push_back(tensor.name);
            if (const auto layer = layer_of(tensor.name)) {
                auto& count = layers_[layer->first];
                count = std::max(count, layer->second + 1);
            }
        }
        for (const auto& value : values) {
            if (!value.by_tensor) { continue; }
            if (!value.pattern.empty()) {
                const auto matches = name_matcher({value.pattern}, value.flag);
                if (!value.as_in_mergekit) {
                    check_patterns({value.pattern}, value.flag, names, "tensor that takes part");
                }
                else if (std::none_of(names.begin(), names.end(), matches)) {
                    note(run, value.flag + ": the filter matches no tensor that takes part");
                }
            }
            if (value.numbers.size() > 1 && layers_.empty()) {
                taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
                    value.flag + " '" + value.text
                        + "' is spread over layers, and no tensor has a layer's number in its name: give one number");
            }
            values_.push_back({value, name_matcher({value.pattern}, value.flag)});
        }
    }
    [[nodiscard]] bool empty() const { return values_.empty(); }
    /// What holds for a tensor, in order: the last is to win.
    [[nodiscard]] option_values of(std::string_view tensor) const
    {
        option_values result;
        for (const auto& [value, matches] : values_) {
            if (!value.pattern.empty() && !matches(tensor)) { continue; }
            const auto layer = layer_of(tensor);
            const auto& part = value.part;
            if (part && !part->holds(tensor)) { continue; }
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
    std::vector<std::pair<option_value, std::function<bool(std::string_view)>>> values_;
    std::map<std::string, std::size_t> layers_;
};

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
    auto values = std::make_shared<tensor_values>(request.options, inputs.models(), request.run);
    if (!values->empty()) {
        call.values_of = [values](std::string_view tensor) { return values->of(tensor); };
    }
    std::vector<std::pair<std::size_t, tensor_values>> weights;
    for (std::size_t t = 0; t < inputs.arguments().size(); ++t) {
        const auto place = request.weights.find(inputs.arguments()[t].text);
        if (place != request.weights.end()) {
            weights.emplace_back(t, tensor_values(place->second, inputs.models(), request.run));
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
        if (tensor_values more(place->second, inputs.models(), request.run); !more.empty()) {
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
        one["values"] = value.numbers;
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
