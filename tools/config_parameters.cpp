// What the parameters of a configuration set: options, and tasks with their weights.
// SPDX-License-Identifier: Apache-2.0
#include "config_parameters.hpp"

#include "words.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace tool::configuration {

namespace {

using scopes = std::vector<YAML::Node>; ///< `parameters`, what counts most first

[[nodiscard]] scopes chain_of(const slice& part, std::size_t i)
{
    scopes chain;
    if (part.inputs[i].parameters) { chain.push_back(*part.inputs[i].parameters); }
    chain.insert(chain.end(), part.parameters.begin(), part.parameters.end());
    return chain;
}

[[nodiscard]] bool same_scopes(const scopes& a, const scopes& b)
{
    return std::equal(
        a.begin(), a.end(), b.begin(), b.end(), [](const YAML::Node& x, const YAML::Node& y) { return x.is(y); });
}

[[nodiscard]] bool same_values(const option_values& a, const option_values& b)
{
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
        [](const option_value& x, const option_value& y) { return x.text == y.text && x.pattern == y.pattern; });
}

[[nodiscard]] bool is_shared(const mergekit_parameter& one)
{
    return one.of == mergekit_parameter::scope::shared;
}
[[nodiscard]] bool is_number(const mergekit_parameter& one)
{
    return one.type == mergekit_parameter::kind::number;
}
/// Whether tensors may differ in it: not where two parameters are one row, and one of them leaves it as it is.
[[nodiscard]] bool is_by_tensor(const mergekit_parameter& one)
{
    const bool truth = one.type == mergekit_parameter::kind::truth;
    return is_number(one) || (truth && !one.off.empty() && one.unless.empty());
}

/// Makes a value for all tensors one by tensor.
void spread(option_value& value, bool number)
{
    if (number && !value.by_tensor) { value.numbers = {std::strtod(value.text.c_str(), nullptr)}; }
    value.by_tensor = value.as_in_mergekit = true;
}

/// Values that hold in a slice.
void add_values(option_values& to, option_values values, const slice& part, bool numbers = true)
{
    for (auto& value : values) {
        if (part.part) {
            spread(value, numbers);
            value.part = part.part;
        }
        to.push_back(std::move(value));
    }
}

/// mergekit's default where nothing is given counts least.
void put_default(option_values& values, const mergekit_parameter& one)
{
    if (!one.unless.empty()) { values.insert(values.begin(), {one.row, one.unless, one.name}); }
}

/// Looks at keys of `parameters`: those of other methods are noted, what no method knows is refused.
class names_check {
public:
    explicit names_check(const reading& it)
        : where_(it.where)
        , method_(*it.method)
        , run_(it.request().run)
        , known_(silent_.begin(), silent_.end())
    {
        for (const auto& method : mergekit_methods()) {
            for (const auto& one : method.parameters) {
                if (kinds_.emplace(one.name, one.type).second) { known_.push_back(one.name); }
            }
        }
    }

    void look(const std::vector<slice>& slices)
    {
        const auto& top = slices.front().parameters; // the last of them is that of all slices
        const bool common = !top.empty() && std::all_of(slices.begin(), slices.end(), [&](const slice& one) {
            return !one.parameters.empty() && one.parameters.back().is(top.back());
        });
        if (common) { look(top.back(), false); }
        for (const auto& part : slices) {
            for (std::size_t i = 0; i + (common ? 1 : 0) < part.parameters.size(); ++i) {
                look(part.parameters[i], false);
            }
            for (const auto& one : part.inputs) {
                if (one.parameters) { look(*one.parameters, true); }
            }
        }
    }

private:
    void look(const YAML::Node& node, bool of_model)
    {
        if (!checked_.emplace(node.Mark().pos, of_model).second) { return; }
        const mapping level(where_, node, "parameters", known_);
        for (const auto& one : level.entries()) {
            const auto has = std::find_if(method_.parameters.begin(), method_.parameters.end(),
                [&](const mergekit_parameter& its) { return its.name == one.name; });
            const bool there = has != method_.parameters.end();
            check_kind(one, there ? has->type : kinds_.at(one.name)); // of what has no effect, and no say, too
            if (there && !(of_model && is_shared(*has))) { continue; }
            if (one.name == "eps" && method_.theirs == "multislerp") { check_eps(one.value); }
            note(run_,
                where_.of(one.key) + ": '" + one.name + "' has no effect"
                    + (silent_.contains(one.name) ? "" : " on merge_method '" + method_.theirs + "'")
                    + (there ? " for one model alone" : ""));
        }
    }

    /// Whether all that is given for a parameter are numbers, or truths.
    void check_kind(const mapping::entry& given, mergekit_parameter::kind type) const
    {
        if (given.value.IsNull()) { return; } // it is as if it were not there
        std::set<int> checked;
        for (const auto& part : settings_of(where_, given.value, given.name)) {
            if (!checked.insert(part.value.Mark().pos).second) { continue; }
            for (const auto& value : scalars_of(part.value)) {
                if (type == mergekit_parameter::kind::truth) { (void)truth_of(where_, value, given.name); }
                else {
                    (void)number_or_truth_of(where_, value, given.name);
                }
            }
        }
    }

    /// What multislerp adds to norms there, and is too small here to be seen.
    void check_eps(const YAML::Node& node) const
    {
        constexpr double unseen = 1e-6;
        for (const auto& part : settings_of(where_, node, "eps")) {
            for (const auto& number : scalars_of(part.value)) {
                if (std::abs(number_of(where_, number, "eps")) <= unseen) { continue; }
                where_.fail(number,
                    "eps is '" + shown(number.Scalar())
                        + "', and no eps above 1e-6 is supported: norms are what they are; leave it out");
            }
        }
    }

    const place& where_;
    const mergekit_method& method_;
    const run_options& run_;
    const std::set<std::string> silent_{"int8_mask", "eps"};
    std::vector<std::string> known_;
    std::map<std::string, mergekit_parameter::kind> kinds_{
        {"int8_mask", mergekit_parameter::kind::truth}, {"eps", mergekit_parameter::kind::number}}; ///< of known names
    std::set<std::pair<int, bool>> checked_; ///< aliases
};

class parameters_reader {
public:
    explicit parameters_reader(reading& it)
        : it_(it)
        , where_(it.where)
        , method_(*it.method)
        , slices_(it.slices)
        , request_(it.request())
        , is_mergekit_(it.given.semantics == "mergekit")
        , weights_(models())
        , own_(models())
    { }

    void read()
    {
        auto& options = request_.options;
        if (is_mergekit_ && method_.semantics) { options.push_back({"semantics", "mergekit", "--semantics"}); }
        if (is_mergekit_ && method_.ours == "model-stock") { options.push_back({"clamp", "false", "--semantics"}); }
        for (const auto& one : method_.parameters) {
            if (one.name == "weight") { read_weights(one); }
            else if (one.of == mergekit_parameter::scope::tasks && is_number(one) && differs(one)) {
                read_for_each(one);
            }
            else {
                read_for_all(one);
            }
        }
        for (std::size_t i = 0; i < models(); ++i) {
            slices_.front().inputs[i].adapter.empty() ? add_model(i) : add_adapter(i);
        }
    }

private:
    /// How many models are merged, in each slice.
    [[nodiscard]] std::size_t models() const { return slices_.front().inputs.size(); }

    /// What is given for a parameter, and whether that is something for every tensor.
    struct values_given {
        option_values values{};
        bool for_all = false;
    };

    void read_weights(const mergekit_parameter& one)
    {
        for (const auto& part : slices_) {
            for (std::size_t i = 0; i < models(); ++i) {
                auto its = values_of(one, chain_of(part, i));
                if (!its.for_all) { missing(one, part.inputs[i].at, its.values, " of '" + part.inputs[i].name + "'"); }
                add_values(weights_[i], std::move(its.values), part);
                if (is_mergekit_ && i >= part.inputs_behind) { weights_[i].push_back(none_behind(one, part)); }
            }
        }
    }

    /// No weight for what stands behind the layers of the last slice.
    [[nodiscard]] static option_value none_behind(const mergekit_parameter& one, const slice& part)
    {
        option_value made{one.row, "0", one.name};
        spread(made, true);
        made.part = {part.part->last, part.part->last, false, true};
        return made;
    }

    /// What models have of their own.
    void read_for_each(const mergekit_parameter& one)
    {
        for (std::size_t i = 0; i < models(); ++i) {
            bool always = true;
            for (const auto& part : slices_) {
                auto its = values_of(one, chain_of(part, i));
                add_values(own_[i], std::move(its.values), part);
                always = always && its.for_all;
            }
            if (!always && is_mergekit_) { put_default(own_[i], one); }
        }
    }

    /// What is the same for all models of a slice.
    void read_for_all(const mergekit_parameter& one)
    {
        bool always = true, alike = !is_number(one);
        std::vector<option_values> of_slices;
        for (const auto& part : slices_) {
            auto its = values_of_inputs(one, part);
            if (!its.for_all && one.required) { missing(one, it_.at_method, its.values, ""); }
            of_slices.push_back(std::move(its.values));
            always = always && its.for_all;
            alike = alike && same_values(of_slices.front(), of_slices.back());
        }
        option_values all;
        if (alike) { all = std::move(of_slices.front()); }
        else {
            for (std::size_t p = 0; p < slices_.size(); ++p) {
                if (!is_by_tensor(one)) {
                    where_.fail(slices_[p].inputs.front().at,
                        "'" + one.name + "' is not the same in all slices; one for all is supported");
                }
                add_values(all, std::move(of_slices[p]), slices_[p], is_number(one));
            }
        }
        if (!always && (is_mergekit_ || !method_.semantics)) { put_default(all, one); }
        request_.options.insert(request_.options.end(), all.begin(), all.end());
    }

    /// Whether a parameter is not the same for all models.
    [[nodiscard]] bool differs(const mergekit_parameter& one)
    {
        return std::any_of(slices_.begin(), slices_.end(), [&](const slice& part) {
            const auto values = values_of(one, chain_of(part, 0)).values;
            const auto filters = [](const option_value& value) { return !value.pattern.empty(); };
            if (part.part && std::any_of(values.begin(), values.end(), filters)) { return true; } // of a model's names
            return first_other(one, part, values).has_value();
        });
    }

    /// The first model of a slice that has other values than the first one has, which are given.
    [[nodiscard]] std::optional<std::size_t> first_other(
        const mergekit_parameter& one, const slice& part, const option_values& values)
    {
        const auto chain = chain_of(part, 0);
        for (std::size_t i = 1; i < part.inputs.size(); ++i) {
            const auto its = chain_of(part, i);
            if (!same_scopes(its, chain) && !same_values(values_of(one, its).values, values)) { return i; }
        }
        return std::nullopt;
    }

    /// Values that all inputs of a slice have.
    [[nodiscard]] values_given values_of_inputs(const mergekit_parameter& one, const slice& part)
    {
        if (is_shared(one)) { return values_of(one, part.parameters); }
        auto given = values_of(one, chain_of(part, 0));
        if (const auto other = first_other(one, part, given.values)) {
            where_.fail(part.inputs[*other].at,
                "'" + one.name + "' of '" + part.inputs[*other].name + "' is another than that of '"
                    + part.inputs.front().name + "'; one for all models is supported");
        }
        return given;
    }

    /// The values of a parameter as options, the last of which that matches counts.
    [[nodiscard]] values_given values_of(const mergekit_parameter& one, const scopes& chain)
    {
        values_given result;
        for (const auto& level : chain) {
            if (result.for_all) { break; } // what comes later never counts
            const auto& its = values_at(one, level);
            for (const auto& value : its.values) { count(one, level, value.numbers.size()); }
            result.values.insert(result.values.end(), its.values.begin(), its.values.end());
            result.for_all = its.for_all;
        }
        std::reverse(result.values.begin(), result.values.end());
        return result;
    }

    /// Counts a value of so many numbers, before it is made: aliases make many of few.
    void count(const mergekit_parameter& one, const YAML::Node& level, std::size_t numbers)
    {
        constexpr std::size_t most = 500000, of_a_value = 8;
        if ((values_made_ += 1 + numbers / of_a_value) > most) {
            where_.fail(
                level, "'" + one.name + "' and other parameters have too many values over all slices and models");
        }
    }

    /// What one `parameters` says of a parameter, what counts most first.
    const values_given& values_at(const mergekit_parameter& one, const YAML::Node& level)
    {
        const std::pair key(one.name, level.Mark().pos);
        if (const auto place = values_read_.find(key); place != values_read_.end()) { return place->second; }
        auto& made = values_read_[key];
        const auto given = levels_read_.at(where_, level, "parameters").find(one.name);
        if (!given) { return made; }
        for (const auto& part : settings_of(where_, given->value, one.name)) {
            if (made.for_all) { break; }
            count(one, level, part.value.size());
            auto value = value_of(one, part);
            if (!value.text.empty() || !one.off.empty()) { made.values.push_back(std::move(value)); }
            made.for_all = part.filter.empty();
        }
        return made;
    }

    [[nodiscard]] option_value value_of(const mergekit_parameter& one, const setting& part)
    {
        auto made = is_number(one) ? numbers_at(one, part.value)
                                   : option_value{one.row, word_of(one, part), flag_of(one, part.value)};
        if (part.filter.empty() && made.numbers.size() < 2) {
            made.numbers.clear();
            return made;
        }
        made.by_tensor = made.as_in_mergekit = true;
        made.pattern = escaped(part.filter);
        return made;
    }

    [[nodiscard]] std::string flag_of(const mergekit_parameter& one, const YAML::Node& value) const
    {
        return where_.of(value) + ": " + one.name;
    }

    /// A value of numbers, for all tensors.
    const option_value& numbers_at(const mergekit_parameter& one, const YAML::Node& value)
    {
        const std::pair key(one.name, value.Mark().pos);
        if (const auto place = numbers_read_.find(key); place != numbers_read_.end()) { return place->second; }
        option_value made{one.row, "", flag_of(one, value)};
        made.numbers = numbers_of(one, value);
        for (const double number : made.numbers) {
            made.text += (made.text.empty() ? "" : ",") + taskvec::csv_number(number);
        }
        return numbers_read_.emplace(key, std::move(made)).first->second;
    }

    [[nodiscard]] std::string word_of(const mergekit_parameter& one, const setting& part) const
    {
        const bool filters = is_by_tensor(one);
        if (!part.value.IsScalar() || (!part.filter.empty() && !filters)) {
            where_.fail(part.value,
                "'" + one.name + "' has one value "
                    + (filters ? "over the layers; a list of them is not supported: give filters such as layers.3."
                               : "for all tensors; filters and lists are not supported"));
        }
        if (one.type != mergekit_parameter::kind::truth) { return part.value.Scalar(); }
        return one.word(truth_of(where_, part.value, one.name), it_.given.semantics);
    }

    [[nodiscard]] std::vector<double> numbers_of(const mergekit_parameter& one, const YAML::Node& value) const
    {
        std::vector<double> numbers;
        for (const auto& number : scalars_of(value)) {
            numbers.push_back(number_or_truth_of(where_, number, one.name));
        }
        if (one.row == "density") { // there 0 keeps nothing, and what is above 1 all: a share that is no entry here
            constexpr double no_entry = 1e-30;
            for (double& number : numbers) { number = number == 0 ? no_entry : std::min(number, 1.0); }
        }
        if (one.row == "tolerance") { // there 0 is never reached, and the steps are all that are given
            for (double& number : numbers) { number = number == 0 ? std::numeric_limits<double>::min() : number; }
        }
        if (one.row == "gamma") { // 1 there is whatever density leaves, as is any share above that
            for (double& number : numbers) { number = std::min(number, std::nextafter(1.0, 0.0)); }
        }
        return numbers;
    }

    [[noreturn]] void missing(
        const mergekit_parameter& one, const YAML::Node& at, const option_values& given, const std::string& whose) const
    {
        where_.fail(at,
            given.empty() ? "'" + one.name + "'" + whose + " is missing"
                          : "'" + one.name + "'" + whose
                    + " has filters and no value for the tensors that none of them matches: add one without a filter");
    }

    /// A task's text that no other has, with the same weight of 1.
    [[nodiscard]] std::string distinct(std::string text) const
    {
        const auto is_given = [&] { return std::count(request_.tasks.begin(), request_.tasks.end(), text) > 0; };
        if (is_given()) { text += '.'; }
        while (is_given()) { text += '0'; }
        return text;
    }

    /// Adds a task of this text, with what is left of weights, and what it has of its own.
    void add_task(std::size_t i, const std::string& text)
    {
        request_.tasks.push_back(text);
        if (!weights_[i].empty()) { request_.weights[text] = std::move(weights_[i]); }
        if (!own_[i].empty()) { request_.of_tasks[text] = std::move(own_[i]); }
    }

    void add_adapter(std::size_t i)
    {
        const auto& one = slices_.front().inputs[i];
        const auto text = distinct(one.adapter + "=1"); // that is the adapter's own factor
        const bool on_base = one.path == request_.base && request_.base_adapter.empty();
        request_.adapters.emplace(text, on_base ? "" : one.path);
        for (auto& value : weights_[i]) { spread(value, true); }
        add_task(i, text);
    }

    void add_model(std::size_t i)
    {
        auto& weight = weights_[i];
        auto text = slices_.front().inputs[i].path + "=1";
        if (!weight.empty() && !weight.front().by_tensor) { // the first is what counts last
            text = slices_.front().inputs[i].path + "=" + weight.front().text;
            weight.erase(weight.begin());
        }
        if (it_.sliced()) { text = distinct(text); }
        add_task(i, text);
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
    bool is_mergekit_; ///< whose semantics
    std::vector<option_values> weights_, own_; ///< of each model
    // What was read, by where it stands: aliases are read once.
    mappings levels_read_;
    std::map<std::pair<std::string, int>, values_given> values_read_; ///< by the parameter's name too
    std::map<std::pair<std::string, int>, option_value> numbers_read_; ///< the same
    std::size_t values_made_ = 0;
};

} // namespace

void read_parameters(reading& it)
{
    names_check(it).look(it.slices);
    parameters_reader(it).read();
}

} // namespace tool::configuration
