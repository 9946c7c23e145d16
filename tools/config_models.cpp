// Models of a configuration, and the slices that they are merged in.
// SPDX-License-Identifier: Apache-2.0
#include "config_models.hpp"

#include "scoring.hpp"
#include "words.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <set>
#include <utility>

namespace tool::configuration {

namespace {

using base_kind = mergekit_method::base;

class models_reader {
public:
    explicit models_reader(reading& it)
        : it_(it)
        , where_(it.where)
        , method_(*it.method)
        , slices_(it.slices)
        , request_(it.request())
    { }

    void read(const mapping& top)
    {
        auto base = top.find("base_model");
        read_models(top, base);
        set_base(method_.takes == base_kind::input ? top.find("base_model") : base); // a slice's is for other methods
    }

private:
    input read_input(const YAML::Node& node, bool slice)
    {
        if (const auto place = inputs_read_.find(node.Mark().pos); place != inputs_read_.end()) {
            return place->second;
        }
        auto keys = std::vector<std::string>{"model", "parameters"};
        if (slice) { keys.insert(keys.begin() + 1, "layer_range"); }
        const mapping part(where_, node, slice ? "a source" : "a model", keys);
        const auto model = part.find("model");
        if (!model) { where_.fail(node, "'model' is missing"); }
        auto made = it_.names.find(model->value);
        if (const auto given = part.find("parameters")) { made.parameters = given->value; }
        if (const auto range = part.find("layer_range")) { made.layers = range->value; }
        if (slice && !made.layers) { where_.fail(node, "'layer_range' is missing, such as [0, 32]"); }
        inputs_read_.emplace(node.Mark().pos, made);
        return made;
    }

    void read_models(const mapping& top, std::optional<mapping::entry>& base)
    {
        const auto modules = top.find("modules");
        if (!modules) {
            read_parts(top, base);
            return;
        }
        read_parts(only_module(top, *modules), base);
        if (const auto given = top.find("parameters")) {
            for (auto& part : slices_) { part.parameters.push_back(given->value); }
        }
    }

    [[nodiscard]] mapping only_module(const mapping& top, const mapping::entry& modules) const
    {
        const mapping all(where_, modules.value, "'modules'");
        if (all.entries().size() != 1 || top.find("models") || top.find("slices")) {
            where_.fail(modules.key,
                all.entries().empty()           ? "'modules' is empty; expected one, or 'models' instead"
                    : all.entries().size() == 1 ? "'modules' is given beside 'models' or 'slices'; expected one of them"
                                                : "'modules' has several of them, and one is supported: give "
                                                  "'models' for all tensors, with filters where modules differ");
        }
        return {where_, all.entries().front().value, "a module", {"models", "slices", "parameters"}};
    }

    /// What a configuration, or its only module, says of models.
    void read_parts(const mapping& top, std::optional<mapping::entry>& base)
    {
        const auto models = top.find("models"), slices = top.find("slices");
        if (models && slices) {
            where_.fail(slices->key, "'models' and 'slices' are both given; expected one of them");
        }
        if (!models && !slices) { where_.fail(top.node(), "'models' is missing (or 'slices')"); }
        const auto& [word, key, list] = models ? *models : *slices;
        if (!list.IsSequence() || list.size() == 0) {
            where_.fail(list,
                "'" + word + "' is " + (list.IsSequence() ? "an empty list" : kind_of(list)) + "; expected a list of "
                    + word);
        }
        if (slices) { read_slices(list, base); }
        else {
            slices_.emplace_back();
            read_inputs(list, slices_.back(), false);
        }
        for (auto& one : slices_) {
            if (const auto given = top.find("parameters")) { one.parameters.push_back(given->value); }
        }
    }

    void read_inputs(const YAML::Node& list, slice& to, bool layers)
    {
        constexpr std::size_t most = 1000;
        if (list.size() > most) { where_.fail(list, taskvec::message("there are more than ", most, " models")); }
        check_count_of_all(list, models_read_ += list.size());
        std::set<std::pair<std::string, std::string>> seen;
        for (const auto& node : list) {
            const auto& one = to.inputs.emplace_back(read_input(node, layers));
            if (!seen.emplace(one.path, one.adapter).second) {
                where_.fail(one.at, "'" + one.name + "' stands twice among the models");
            }
        }
    }

    void check_count_of_all(const YAML::Node& at, std::size_t models) const
    {
        constexpr std::size_t most = 100000; // aliases make many of few
        if (models > most) { where_.fail(at, taskvec::message("there are more than ", most, " models in all slices")); }
    }

    void read_slices(const YAML::Node& list, std::optional<mapping::entry>& base)
    {
        constexpr std::size_t most = 10000;
        if (list.size() > most) { where_.fail(list, taskvec::message("there are more than ", most, " slices")); }
        std::size_t begin = 0;
        for (const auto& node : list) {
            auto made = read_slice(node, base);
            const auto end = begin + made.inputs.front().count();
            made.part = {begin, end, slices_.empty(), slices_.size() + 1 == list.size()};
            begin = end;
            slices_.push_back(std::move(made));
        }
        if (begin == 0) { where_.fail(list, "all of the slices are empty: the result would have no layer"); }
        const auto& inputs = slices_.front().inputs;
        const bool whole = slices_.size() == 1 && std::all_of(inputs.begin(), inputs.end(), [&](const input& one) {
            return one.first == 0 && one.last == layers_.at(one.path);
        });
        if (!whole) {
            check_no_adapters();
            return;
        }
        slices_.front().part.reset(); // it is as if it were no slice
        if (const auto own = slice_at(list[0]).find("base_model")) { base.emplace(*own); }
    }

    /// Layers that are put together are those of files.
    void check_no_adapters() const
    {
        const auto check = [&](const input& one) {
            if (one.adapter.empty()) { return; }
            where_.fail(one.at,
                "'" + one.name
                    + "': layers of a model with an adapter, but for one slice of all layers of its models; store it "
                      "first by 'taskvec fuse'");
        };
        for (const auto& part : slices_) {
            for (const auto& one : part.inputs) { check(one); }
            if (part.base) { check(*part.base); }
        }
    }

    const mapping& slice_at(const YAML::Node& node)
    {
        return slices_read_.at(where_, node, "a slice", {"sources", "base_model", "residual_weight", "parameters"});
    }

    slice read_slice(const YAML::Node& node, const std::optional<mapping::entry>& base)
    {
        const auto& part = slice_at(node);
        if (const auto one = part.find("residual_weight")) {
            where_.fail(one->key, "'residual_weight' is not supported");
        }
        slice made;
        if (const auto given = part.find("parameters")) { made.parameters.push_back(given->value); }
        const auto sources = part.find("sources");
        if (!sources || !sources->value.IsSequence() || sources->value.size() == 0) {
            where_.fail(node, "a slice without a list of 'sources'");
        }
        read_inputs(sources->value, made, true);
        const auto& first = made.inputs.front();
        for (auto& one : made.inputs) {
            read_layers(one);
            if (one.count() == first.count()) { continue; }
            where_.fail(*one.layers,
                taskvec::message("'", one.name, "' gives ", counted(one.count(), "layer"), " and '", first.name, "' ",
                    first.count(), "; expected as many of each source of a slice"));
        }
        const auto own = part.find("base_model");
        if (own || base) { made.base.emplace(it_.names.find((own ? own : base)->value)); }
        return made;
    }

    void read_layers(input& one)
    {
        const auto& node = *one.layers;
        if (!node.IsSequence() || node.size() != 2) {
            where_.fail(node, "layer_range is " + kind_of(node) + "; expected two numbers such as [0, 32]");
        }
        const auto first = number_of(where_, node[0], "layer_range"), last = number_of(where_, node[1], "layer_range");
        const auto count = layers_of(one, last);
        if (std::floor(first) != first || std::floor(last) != last || first < 0 || first > last
            || last > static_cast<double>(count)) {
            where_.fail(node,
                taskvec::message("layer_range [", first, ", ", last, "]: '", one.name, "' has the layers [0, ", count,
                    "]; expected a part of them, the end not included"));
        }
        one.first = static_cast<std::size_t>(first);
        one.last = static_cast<std::size_t>(last);
    }

    /// How many layers a model has. A result that is not there yet has those up to `last`: they are counted when it is.
    std::size_t layers_of(const input& one, double last)
    {
        if (!it_.others_are_there && it_.others.contains(one.name)) {
            auto& count = layers_[one.path];
            count = std::max(count, static_cast<std::size_t>(std::clamp(last, 0.0, 1e9)));
            return count;
        }
        if (const auto place = layers_.find(one.path); place != layers_.end()) { return place->second; }
        try {
            const auto model = open_guarded(one.path);
            return layers_.emplace(one.path, count_layers(model.model(), "'" + one.name + "'")).first->second;
        }
        catch (const taskvec::invalid_argument& wrong) {
            where_.fail(one.at, wrong.what(), wrong.code());
        }
    }

    /// Makes it a model that only stands there.
    static void take_weight_of(input& one)
    {
        YAML::Node none;
        none["weight"] = 0;
        one.parameters.reset();
        one.parameters.emplace(none);
    }

    /// Where slices are means of different numbers of models, further ones have no weight: models of other slices, as
    /// far as they have so many layers.
    void even_out()
    {
        std::vector<input> all;
        std::set<std::string> known;
        std::size_t most = 0;
        for (const auto& part : slices_) {
            most = std::max(most, part.inputs.size());
            for (const auto& one : part.inputs) {
                if (known.insert(one.path).second) { all.push_back(one); }
            }
        }
        check_count_of_all(it_.at_method, most * slices_.size());
        slices_.back().inputs_behind = slices_.front().inputs.size();
        for (auto& part : slices_) {
            auto& inputs = part.inputs;
            if (inputs.empty()) { continue; }
            const auto count = inputs.front().count();
            std::set<std::string> own;
            for (const auto& one : inputs) { own.insert(one.path); }
            for (auto other = all.begin(); inputs.size() < most; other += other == all.end() ? 0 : 1) {
                if (other != all.end() && (own.contains(other->path) || layers_[other->path] < count)) { continue; }
                auto further = other == all.end() ? inputs.front() : *other;
                if (other != all.end()) {
                    further.first = 0;
                    further.last = count;
                }
                take_weight_of(further);
                inputs.push_back(std::move(further));
            }
        }
    }

    /// Whether the method takes so many models.
    void check_count()
    {
        for (const auto& part : slices_) {
            const auto count = part.inputs.size();
            if (count >= method_.fewest && count <= method_.most) { continue; }
            const std::string beside = method_.takes == base_kind::required ? " beside the base" : "";
            const auto wanted = method_.most == method_.fewest ? counted(method_.fewest, "model") + beside
                : count < method_.fewest                       ? counted(method_.fewest, "model") + beside + " or more"
                                                               : counted(method_.most, "model") + beside + " at most";
            where_.fail(count > method_.most ? part.inputs[method_.most].at : it_.at_method,
                taskvec::message("merge_method '", method_.theirs, "' takes ", wanted, "; here ",
                    count == 1 ? "is " : "are ", count));
        }
    }

    /// What has no base is refused where the method needs one.
    void lacks_base() const
    {
        if (method_.takes != base_kind::required) { return; }
        where_.fail(it_.at_method, "merge_method '" + method_.theirs + "' needs a 'base_model'");
    }

    /// The base of a slice stands among its sources, which say its layers.
    void take_base_out(slice& one) const
    {
        auto& inputs = one.inputs;
        if (method_.takes == base_kind::input) { one.base.reset(); }
        else if (!one.base) {
            lacks_base();
        }
        if (!one.base) { return; }
        const auto place =
            std::find_if(inputs.begin(), inputs.end(), [&](const input& its) { return its.path == one.base->path; });
        if (place == inputs.end()) {
            where_.fail(inputs.front().at,
                "the base '" + one.base->name + "' is not among the sources of the slice: add it, with its layers");
        }
        one.base->first = place->first;
        one.base->last = place->last;
        std::vector<input> others;
        for (auto& its : inputs) {
            if (&its != &*place) { others.push_back(std::move(its)); }
        }
        inputs.swap(others);
    }

    void check_slices_are_alike() const
    {
        const auto& first = slices_.front();
        for (const auto& one : slices_) {
            if (one.inputs.empty()) { where_.fail(it_.at_method, "a slice has no model beside the base"); }
            if (one.inputs.size() != first.inputs.size() || one.base.has_value() != first.base.has_value()) {
                where_.fail(one.inputs.front().at,
                    taskvec::message("this slice merges ", counted(one.inputs.size(), "model"), " and the first ",
                        first.inputs.size(), "; expected as many in every slice, but for merge_method 'linear'"));
            }
        }
    }

    /// Whether one of the slices has the model, with whatever adapter.
    [[nodiscard]] bool is_in_a_slice(const input& model) const
    {
        const auto is_it = [&](const input& one) { return one.path == model.path; };
        return std::any_of(slices_.begin(), slices_.end(), [&](const slice& part) {
            return std::any_of(part.inputs.begin(), part.inputs.end(), is_it) || (part.base && is_it(*part.base));
        });
    }

    /// Configuration and tokenizer are the base's.
    void take_files_of(const input& base)
    {
        if (!is_in_a_slice(base)) { it_.files_of.emplace(base); }
        std::error_code ignored;
        if (request_.copies.from.empty() && fs::is_directory(base.path, ignored)) { request_.copies.from = base.path; }
    }

    /// Whether the base is merged with whole models: of those of a slice only where it is among them, or the method
    /// takes it out of them.
    [[nodiscard]] bool merges(const input& base) const
    {
        const auto& inputs = slices_.front().inputs;
        return method_.takes != base_kind::input || !inputs.front().layers
            || std::any_of(inputs.begin(), inputs.end(), [&](const input& one) { return one.is_model_of(base); });
    }

    void set_bases_of_slices(const std::optional<mapping::entry>& given)
    {
        for (auto& one : slices_) { take_base_out(one); }
        if (method_.ours == "average") { even_out(); }
        check_slices_are_alike();
        for (const auto& one : slices_) {
            if (!one.base) { continue; }
            if (&one == &slices_.front()) { request_.base = one.base->path; }
            append_layers(request_.views[""], one.base->path, one.base->first, one.base->last);
        }
        if (given) { take_files_of(it_.names.find(given->value)); }
    }

    /// Where models are whole, the base is taken out of them, or merged as well: as the first of them, whose vocabulary
    /// and files the result has.
    void set_base_of_all(const input& base)
    {
        auto& inputs = slices_.front().inputs;
        std::vector<input> others;
        std::copy_if(inputs.begin(), inputs.end(), std::back_inserter(others),
            [&](const input& one) { return !one.is_model_of(base); });
        if (method_.takes == base_kind::input) {
            if (method_.most == 1) { // with a base beside it there are two
                if (others.size() == inputs.size()) { inputs.push_back(base); }
                return;
            }
            const auto place =
                std::find_if(inputs.begin(), inputs.end(), [&](const input& one) { return one.is_model_of(base); });
            std::vector<input> all{place == inputs.end() ? base : *place};
            all.insert(all.end(), others.begin(), others.end());
            inputs.swap(all);
            return;
        }
        const bool weighted = !method_.parameters.empty() && method_.parameters.front().name == "weight";
        if (others.empty() && method_.takes == base_kind::required && weighted) { // no task vector: the base itself
            others.push_back(inputs.front());
            take_weight_of(others.front());
        }
        request_.base = base.path;
        request_.base_adapter = base.adapter;
        inputs.swap(others);
    }

    void set_base(const std::optional<mapping::entry>& given)
    {
        if (it_.sliced()) { set_bases_of_slices(given); }
        else {
            slices_.front().base.reset(); // of a slice of all layers
            const auto base = given ? std::optional(it_.names.find(given->value)) : std::nullopt;
            if (!base) { lacks_base(); }
            else if (merges(*base)) {
                set_base_of_all(*base);
            }
            else {
                take_files_of(*base);
            }
            if (slices_.front().inputs.empty()) { where_.fail(it_.at_method, "no model is left beside the base"); }
        }
        check_count();
    }

    reading& it_;
    const place& where_;
    const mergekit_method& method_;
    std::vector<slice>& slices_;
    merge_request& request_;
    std::map<std::string, std::size_t> layers_; ///< how many a model has, by path
    // What was read, by where it stands: aliases are read once.
    std::map<int, input> inputs_read_;
    mappings slices_read_;
    std::size_t models_read_ = 0;
};

} // namespace

std::vector<std::string> reading::paths() const
{
    std::vector<std::string> all;
    std::set<std::string> seen{""};
    const auto add = [&](const std::string& path) {
        if (seen.insert(path).second) { all.push_back(path); }
    };
    add(request().base);
    for (const auto& part : slices) {
        if (part.base) { add(part.base->path); }
        for (const auto& one : part.inputs) { add(one.path); }
    }
    return all;
}

void read_models(reading& it, const mapping& top)
{
    models_reader(it).read(top);
}

} // namespace tool::configuration
