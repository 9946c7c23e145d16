// What the parameters of a configuration set: options, and tasks with their weights.
// SPDX-License-Identifier: Apache-2.0
#include "config_parameters.hpp"

#include "words.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace tool::configuration {

namespace {

class parameters_reader {
public:
    explicit parameters_reader(reading& it)
        : it_(it)
        , where_(it.where)
        , method_(*it.method)
        , slices_(it.slices)
        , request_(it.request())
    { }

    void read()
    {
        check_names();
        const bool mergekit = it_.given.semantics == "mergekit";
        auto& options = request_.options;
        if (mergekit && method_.semantics) { options.push_back({"semantics", "mergekit", "--semantics"}); }
        if (mergekit && method_.ours == "model-stock") { options.push_back({"clamp", "false", "--semantics"}); }
        const auto& inputs = slices_.front().inputs;
        std::vector<option_values> weights(inputs.size()), own(inputs.size());
        for (const auto& one : method_.parameters) {
            if (one.name == "weight") {
                for (const auto& part : slices_) {
                    for (std::size_t i = 0; i < inputs.size(); ++i) {
                        bool for_all = false;
                        auto its = values_of(one, chain_of(part, i), for_all);
                        if (!for_all) { missing(one, part.inputs[i].at, its, " of '" + part.inputs[i].name + "'"); }
                        add_values(weights[i], std::move(its), part);
                    }
                }
                continue;
            }
            if (one.of == mergekit_parameter::scope::tasks && one.type == mergekit_parameter::kind::number
                && differs(one)) {
                for (std::size_t i = 0; i < inputs.size(); ++i) {
                    bool always = true;
                    for (const auto& part : slices_) {
                        bool for_all = false;
                        add_values(own[i], values_of(one, chain_of(part, i), for_all), part);
                        always = always && for_all;
                    }
                    if (!always && mergekit && !one.unless.empty()) {
                        own[i].insert(own[i].begin(), {one.row, one.unless, one.name});
                    }
                }
                continue;
            }
            option_values all;
            bool all_for_all = true, alike = one.type != mergekit_parameter::kind::number;
            std::vector<option_values> of_slices;
            for (const auto& part : slices_) {
                bool for_all = false;
                of_slices.push_back(values_of_inputs(one, part, for_all));
                if (!for_all && one.required) { missing(one, it_.at_method, of_slices.back(), ""); }
                all_for_all = all_for_all && for_all;
                alike = alike && same_values(of_slices.front(), of_slices.back());
            }
            if (alike) { all = std::move(of_slices.front()); }
            else {
                for (std::size_t p = 0; p < slices_.size(); ++p) {
                    if (!is_by_tensor(one)) {
                        where_.fail(slices_[p].inputs.front().at,
                            "'" + one.name + "' is not the same in all slices; one for all is supported");
                    }
                    const bool number = one.type == mergekit_parameter::kind::number;
                    add_values(all, std::move(of_slices[p]), slices_[p], number);
                }
            }
            if (!all_for_all && (mergekit || !method_.semantics) && !one.unless.empty()) {
                all.insert(all.begin(), {one.row, one.unless, one.name});
            }
            options.insert(options.end(), all.begin(), all.end());
        }
        for (std::size_t i = 0; i < inputs.size(); ++i) { add_task(i, std::move(weights[i]), std::move(own[i])); }
    }

private:
    using scopes = std::vector<YAML::Node>;

    /// The values of a parameter as options, the last of which that matches counts. `chain`: from what counts most.
    option_values values_of(const mergekit_parameter& one, const scopes& chain, bool& for_all)
    {
        option_values result;
        for_all = false;
        for (const auto& level : chain) {
            if (for_all) { break; } // what comes later never counts
            const auto& its = values_at(one, level);
            constexpr std::size_t most = 500000, numbers = 8; // aliases make many of few
            for (const auto& value : its.values) { values_made_ += 1 + value.numbers.size() / numbers; }
            if (values_made_ > most) {
                where_.fail(
                    level, "'" + one.name + "' and other parameters have too many values over all slices and models");
            }
            result.insert(result.end(), its.values.begin(), its.values.end());
            for_all = its.for_all;
        }
        std::reverse(result.begin(), result.end());
        return result;
    }

    /// What one `parameters` says of a parameter, what counts most first.
    struct values_read {
        option_values values{};
        bool for_all = false;
    };
    const values_read& values_at(const mergekit_parameter& one, const YAML::Node& level)
    {
        const std::pair key(one.name, level.Mark().pos);
        if (const auto place = values_read_.find(key); place != values_read_.end()) { return place->second; }
        auto& made = values_read_[key];
        const auto given = levels_read_.at(where_, level, "parameters").find(one.name);
        if (!given) { return made; }
        for (const auto& part : settings_of(where_, given->value, one.name)) {
            if (made.for_all) { break; }
            auto value = value_of(one, part);
            if (!value.text.empty() || !one.off.empty()) { made.values.push_back(std::move(value)); }
            made.for_all = part.filter.empty();
        }
        return made;
    }

    /// Whether tensors may differ in it: not where two parameters are one row, and one of them leaves it as it is.
    [[nodiscard]] static bool is_by_tensor(const mergekit_parameter& one)
    {
        using kind = mergekit_parameter::kind;
        return one.type == kind::number || (one.type == kind::truth && !one.off.empty() && one.unless.empty());
    }

    option_value value_of(const mergekit_parameter& one, const setting& part)
    {
        const auto flag = where_.of(part.value) + ": " + one.name;
        option_value made{one.row, "", flag};
        if (one.type != mergekit_parameter::kind::number) {
            const bool truth = one.type == mergekit_parameter::kind::truth;
            const bool filters = is_by_tensor(one);
            if (!part.value.IsScalar() || (!part.filter.empty() && !filters)) {
                where_.fail(part.value,
                    "'" + one.name + "' has one value "
                        + (filters ? "over the layers; a list of them is not supported: give filters such as layers.3."
                                   : "for all tensors; filters and lists are not supported"));
            }
            made.text =
                truth ? one.word(truth_of(where_, part.value, one.name), it_.given.semantics) : part.value.Scalar();
            if (!part.filter.empty()) {
                made.by_tensor = made.as_in_mergekit = true;
                made.pattern = escaped(part.filter);
            }
            return made;
        }
        if (part.value.IsScalar()) {
            const auto truth = parse_truth(part.value);
            made.numbers = {truth ? (*truth ? 1.0 : 0.0) : number_of(where_, part.value, one.name)};
        }
        for (const auto& number : part.value.IsSequence() ? part.value : YAML::Node()) {
            made.numbers.push_back(number_of(where_, number, one.name));
        }
        if (one.row
            == "density") { // there 0 keeps nothing, and what is above 1 all; a share that is no entry does so here
            constexpr double no_entry = 1e-30;
            for (double& number : made.numbers) { number = number == 0 ? no_entry : std::min(number, 1.0); }
        }
        if (one.row == "gamma") { // 1 there is whatever density leaves, as is any share above that
            for (double& number : made.numbers) { number = std::min(number, std::nextafter(1.0, 0.0)); }
        }
        for (const double number : made.numbers) {
            made.text += (made.text.empty() ? "" : ",") + taskvec::csv_number(number);
        }
        if (part.filter.empty() && made.numbers.size() == 1) {
            made.numbers.clear();
            return made;
        }
        made.by_tensor = true;
        made.as_in_mergekit = true;
        made.pattern = escaped(part.filter);
        return made;
    }

    /// Whether a parameter is not the same for all models.
    [[nodiscard]] bool differs(const mergekit_parameter& one)
    {
        bool for_all = false;
        for (const auto& part : slices_) {
            const auto chain = chain_of(part, 0);
            const auto values = values_of(one, chain, for_all);
            const auto filters = [](const option_value& value) { return !value.pattern.empty(); };
            if (part.part && std::any_of(values.begin(), values.end(), filters)) {
                return true;
            } // of the model's names
            for (std::size_t i = 1; i < part.inputs.size(); ++i) {
                const auto its = chain_of(part, i);
                if (!same_scopes(its, chain) && !same_values(values_of(one, its, for_all), values)) { return true; }
            }
        }
        return false;
    }

    [[nodiscard]] static bool same_scopes(const scopes& a, const scopes& b)
    {
        return std::equal(
            a.begin(), a.end(), b.begin(), b.end(), [](const YAML::Node& x, const YAML::Node& y) { return x.is(y); });
    }

    [[nodiscard]] static bool same_values(const option_values& a, const option_values& b)
    {
        return std::equal(a.begin(), a.end(), b.begin(), b.end(),
            [](const option_value& x, const option_value& y) { return x.text == y.text && x.pattern == y.pattern; });
    }

    /// Values that hold in a slice.
    static void add_values(option_values& to, option_values values, const slice& part, bool numbers = true)
    {
        for (auto& value : values) {
            if (part.part) {
                if (numbers && !value.by_tensor) { value.numbers = {std::strtod(value.text.c_str(), nullptr)}; }
                value.by_tensor = value.as_in_mergekit = true;
                value.part = part.part;
            }
            to.push_back(std::move(value));
        }
    }

    /// Values that all inputs of a slice have.
    option_values values_of_inputs(const mergekit_parameter& one, const slice& part, bool& for_all)
    {
        const auto chain = one.of == mergekit_parameter::scope::shared ? part.parameters : chain_of(part, 0);
        auto values = values_of(one, chain, for_all);
        if (one.of == mergekit_parameter::scope::shared) { return values; }
        for (std::size_t i = 1; i < part.inputs.size(); ++i) {
            bool its_for_all = false;
            const auto its = chain_of(part, i);
            if (!same_scopes(its, chain) && !same_values(values_of(one, its, its_for_all), values)) {
                where_.fail(part.inputs[i].at,
                    "'" + one.name + "' of '" + part.inputs[i].name + "' is another than that of '"
                        + part.inputs.front().name + "'; one for all models is supported");
            }
        }
        return values;
    }

    [[noreturn]] void missing(
        const mergekit_parameter& one, const YAML::Node& at, const option_values& given, const std::string& whose)
    {
        where_.fail(at,
            given.empty() ? "'" + one.name + "'" + whose + " is missing"
                          : "'" + one.name + "'" + whose
                    + " has filters and no value for the tensors that none of them matches: add one without a filter");
    }

    [[nodiscard]] static scopes chain_of(const slice& part, std::size_t i)
    {
        scopes chain;
        if (part.inputs[i].parameters) { chain.push_back(*part.inputs[i].parameters); }
        chain.insert(chain.end(), part.parameters.begin(), part.parameters.end());
        return chain;
    }

    /// Keys of `parameters`: those of other methods are noted, what no method knows is refused.
    void check_names()
    {
        const std::set<std::string> silent{"int8_mask", "eps"};
        std::vector<std::string> known(silent.begin(), silent.end());
        for (const auto& method : mergekit_methods()) {
            for (const auto& one : method.parameters) {
                if (!std::count(known.begin(), known.end(), one.name)) { known.push_back(one.name); }
            }
        }
        std::set<std::pair<int, bool>> checked; // aliases
        const auto check = [&](const YAML::Node& node, bool of_model) {
            if (!checked.emplace(node.Mark().pos, of_model).second) { return; }
            const mapping level(where_, node, "parameters", known);
            for (const auto& one : level.entries()) {
                const auto has = std::find_if(method_.parameters.begin(), method_.parameters.end(),
                    [&](const mergekit_parameter& its) { return its.name == one.name; });
                const bool used =
                    has != method_.parameters.end() && !(of_model && has->of == mergekit_parameter::scope::shared);
                if (used) { continue; }
                if (one.name == "int8_mask") { (void)truth_of(where_, one.value, one.name); }
                if (one.name == "eps" && method_.theirs == "multislerp") { check_eps(one.value); }
                note(request_.run,
                    where_.of(one.key) + ": '" + one.name + "' has no effect"
                        + (silent.contains(one.name) ? "" : " on merge_method '" + method_.theirs + "'")
                        + (has != method_.parameters.end() ? " for one model alone" : ""));
            }
        };
        const auto& top = slices_.front().parameters; // the last of them is that of all slices
        const bool common = !top.empty() && std::all_of(slices_.begin(), slices_.end(), [&](const slice& one) {
            return !one.parameters.empty() && one.parameters.back().is(top.back());
        });
        if (common) { check(top.back(), false); }
        for (const auto& part : slices_) {
            for (std::size_t i = 0; i + (common ? 1 : 0) < part.parameters.size(); ++i) {
                check(part.parameters[i], false);
            }
            for (const auto& one : part.inputs) {
                if (one.parameters) { check(*one.parameters, true); }
            }
        }
    }

    /// What multislerp adds to norms there, and is too small here to be seen.
    void check_eps(const YAML::Node& node)
    {
        constexpr double unseen = 1e-6;
        for (const auto& part : settings_of(where_, node, "eps")) {
            const auto look = [&](const YAML::Node& number) {
                if (!(std::abs(number_of(where_, number, "eps")) <= unseen)) {
                    where_.fail(number,
                        "eps is '" + shown(number.Scalar())
                            + "', and no eps above 1e-6 is supported: norms are what they are; leave it out");
                }
            };
            if (part.value.IsScalar()) { look(part.value); }
            for (const auto& number : part.value.IsSequence() ? part.value : YAML::Node()) { look(number); }
        }
    }

    /// A task's text that no other has, with the same weight of 1.
    [[nodiscard]] std::string distinct(std::string text)
    {
        const auto is_given = [&] { return std::count(request_.tasks.begin(), request_.tasks.end(), text) > 0; };
        if (is_given()) { text += '.'; }
        while (is_given()) { text += '0'; }
        return text;
    }

    void add_task(std::size_t i, option_values weight, option_values own)
    {
        const auto& one = slices_.front().inputs[i];
        if (!one.adapter.empty()) {
            const auto text = distinct(one.adapter + "=1"); // that is the adapter's own factor
            const bool on_base = one.path == request_.base && request_.base_adapter.empty();
            request_.adapters.emplace(text, on_base ? "" : one.path);
            request_.tasks.push_back(text);
            if (!own.empty()) { request_.of_tasks[text] = std::move(own); }
            for (auto& value : weight) {
                if (value.by_tensor) { continue; }
                value.by_tensor = value.as_in_mergekit = true;
                value.numbers = {std::strtod(value.text.c_str(), nullptr)};
            }
            if (!weight.empty()) { request_.weights[text] = std::move(weight); }
            return;
        }
        const bool plain = !weight.empty() && !weight.front().by_tensor; // the first is what counts last
        const auto own_text = one.path + "=" + (plain ? weight.front().text : "1");
        const auto text = it_.sliced() ? distinct(own_text) : own_text;
        if (plain) { weight.erase(weight.begin()); }
        request_.tasks.push_back(text);
        if (!weight.empty()) { request_.weights[text] = std::move(weight); }
        if (!own.empty()) { request_.of_tasks[text] = std::move(own); }
        for (const auto& part : slices_) {
            if (!part.part) { continue; }
            const auto& its = part.inputs[i];
            append_layers(request_.views[text], its.path, its.first, its.last);
        }
    }

    reading& it_;
    const place& where_;
    const mergekit_method& method_;
    const std::vector<slice>& slices_;
    merge_request& request_;
    // What was read, by where it stands: aliases are read once.
    mappings levels_read_;
    std::map<std::pair<std::string, int>, values_read> values_read_; ///< by the parameter's name too
    std::size_t values_made_ = 0;
};

} // namespace

void read_parameters(reading& it)
{
    parameters_reader(it).read();
}

} // namespace tool::configuration
