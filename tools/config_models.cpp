// Models of a configuration, and the slices that they are merged in.
// SPDX-License-Identifier: Apache-2.0
#include "config_models.hpp"

#include "scoring.hpp"
#include "words.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <map>
#include <set>

namespace tool::configuration {

namespace {

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
        set_base(base);
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
        if (const auto modules = top.find("modules")) {
            const mapping all(where_, modules->value, "'modules'");
            if (all.entries().size() != 1 || top.find("models") || top.find("slices")) {
                where_.fail(modules->key,
                    all.entries().empty() ? "'modules' is empty; expected one, or 'models' instead"
                        : all.entries().size() == 1
                        ? "'modules' is given beside 'models' or 'slices'; expected one of them"
                        : "'modules' has several of them, and one is supported: give "
                          "'models' for all tensors, with filters where modules differ");
            }
            const mapping one(where_, all.entries().front().value, "a module", {"models", "slices", "parameters"});
            read_parts(one, base);
            if (const auto given = top.find("parameters")) {
                for (auto& part : slices_) { part.parameters.push_back(given->value); }
            }
            return;
        }
        read_parts(top, base);
    }

    /// What a configuration, or its only module, says of models.
    void read_parts(const mapping& top, std::optional<mapping::entry>& base)
    {
        const auto models = top.find("models"), slices = top.find("slices");
        if (models && slices) {
            where_.fail(slices->key, "'models' and 'slices' are both given; expected one of them");
        }
        if (!models && !slices) { where_.fail(top.node(), "'models' is missing (or 'slices')"); }
        YAML::Node list(models ? models->value : slices->value);
        if (!list.IsSequence() || list.size() == 0) {
            where_.fail(list,
                std::string(models ? "'models' is " : "'slices' is ")
                    + (list.IsSequence() ? "an empty list" : kind_of(list))
                    + (models ? "; expected a list of models" : "; expected a list of slices"));
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
        constexpr std::size_t most_of_all = 100000; // aliases make many of few
        if ((models_read_ += list.size()) > most_of_all) {
            where_.fail(list, taskvec::message("there are more than ", most_of_all, " models in all slices"));
        }
        auto& inputs = to.inputs;
        for (const auto& node : list) {
            inputs.push_back(read_input(node, layers));
            for (std::size_t i = 0; i + 1 < inputs.size(); ++i) {
                if (inputs[i].path == inputs.back().path && inputs[i].adapter == inputs.back().adapter) {
                    where_.fail(inputs.back().at, "'" + inputs.back().name + "' stands twice among the models");
                }
            }
        }
    }

    void read_slices(const YAML::Node& list, std::optional<mapping::entry>& base)
    {
        constexpr std::size_t most = 10000;
        if (list.size() > most) { where_.fail(list, taskvec::message("there are more than ", most, " slices")); }
        bool whole = list.size() == 1;
        std::size_t begin = 0;
        std::optional<mapping::entry> own_base;
        for (const auto& node : list) {
            const auto& part =
                slices_read_.at(where_, node, "a slice", {"sources", "base_model", "residual_weight", "parameters"});
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
            for (auto& one : made.inputs) {
                whole = read_layers(one) && whole;
                const auto wanted = made.inputs.front().last - made.inputs.front().first;
                if (one.last - one.first != wanted) {
                    where_.fail(*one.layers,
                        taskvec::message("'", one.name, "' gives ", counted(one.last - one.first, "layer"), " and '",
                            made.inputs.front().name, "' ", wanted, "; expected as many of each source of a slice"));
                }
            }
            if (const auto own = part.find("base_model")) {
                own_base.emplace(*own);
                made.base = it_.names.find(own->value);
            }
            else if (base) {
                made.base = it_.names.find(base->value);
            }
            const auto end = begin + made.inputs.front().last - made.inputs.front().first;
            made.part = {begin, end, slices_.empty(), slices_.size() + 1 == list.size()};
            begin = end;
            slices_.push_back(std::move(made));
        }
        if (begin == 0) { where_.fail(list, "all of the slices are empty: the result would have no layer"); }
        if (whole) { // it is as if it were no slice
            slices_.front().part.reset();
            if (own_base) { base.emplace(*own_base); }
        }
    }

    /// The layers of a source; whether they are all that its model has.
    bool read_layers(input& one)
    {
        const auto& node = *one.layers;
        if (!one.adapter.empty()) {
            where_.fail(
                one.at, "'" + one.name + "': layers of a model with an adapter; store it first by 'taskvec fuse'");
        }
        if (!node.IsSequence() || node.size() != 2) {
            where_.fail(node, "layer_range is " + kind_of(node) + "; expected two numbers such as [0, 32]");
        }
        const auto first = number_of(where_, node[0], "layer_range"), last = number_of(where_, node[1], "layer_range");
        auto place = layers_.find(one.path);
        if (!it_.others_are_there && it_.others.contains(one.name)) { // its layers are counted when it is
            place = layers_.try_emplace(one.path, 0).first;
            place->second = std::max(place->second, static_cast<std::size_t>(std::clamp(last, 0.0, 1e9)));
        }
        if (place == layers_.end()) {
            try {
                const auto model = open_guarded(one.path);
                place = layers_.emplace(one.path, count_layers(model.model(), "'" + one.name + "'")).first;
            }
            catch (const taskvec::invalid_argument& wrong) {
                where_.fail(one.at, wrong.what(), wrong.code());
            }
        }
        const auto count = static_cast<double>(place->second);
        if (std::floor(first) != first || std::floor(last) != last || first < 0 || first > last || last > count) {
            where_.fail(node,
                taskvec::message("layer_range [", first, ", ", last, "]: '", one.name, "' has the layers [0, ",
                    place->second, "]; expected a part of them, the end not included"));
        }
        one.first = static_cast<std::size_t>(first);
        one.last = static_cast<std::size_t>(last);
        return one.first == 0 && one.last == place->second;
    }

    /// The `parameters` of a model that only stands there.
    [[nodiscard]] static YAML::Node without_weight()
    {
        YAML::Node made;
        made["weight"] = 0;
        return made;
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
        for (auto& part : slices_) {
            if (part.inputs.empty()) { continue; }
            const auto count = part.inputs.front().last - part.inputs.front().first;
            while (part.inputs.size() < most) {
                const auto other = std::find_if(all.begin(), all.end(), [&](const input& one) {
                    const auto same = [&](const input& its) { return its.path == one.path; };
                    return layers_[one.path] >= count && std::none_of(part.inputs.begin(), part.inputs.end(), same);
                });
                auto further = other == all.end() ? part.inputs.front() : *other;
                if (other != all.end()) {
                    further.first = 0;
                    further.last = count;
                }
                further.parameters.reset();
                further.parameters.emplace(without_weight());
                part.inputs.push_back(std::move(further));
            }
        }
    }

    /// Whether the method takes so many models.
    void check_count()
    {
        for (const auto& part : slices_) {
            const auto count = part.inputs.size();
            if (count >= method_.fewest && count <= method_.most) { continue; }
            const std::string beside = method_.takes == mergekit_method::base::required ? " beside the base" : "";
            const auto wanted = method_.most == method_.fewest ? counted(method_.fewest, "model") + beside
                : count < method_.fewest                       ? counted(method_.fewest, "model") + beside + " or more"
                                                               : counted(method_.most, "model") + beside + " at most";
            where_.fail(count > method_.most ? part.inputs[method_.most].at : it_.at_method,
                taskvec::message("merge_method '", method_.theirs, "' takes ", wanted, "; here ",
                    count == 1 ? "is " : "are ", count));
        }
    }

    /// The bases of slices stand among their sources.
    void set_bases_of_slices(const std::optional<mapping::entry>& given)
    {
        using base = mergekit_method::base;
        for (auto& one : slices_) {
            auto& inputs = one.inputs;
            if (method_.takes == base::input) {
                one.base.reset();
                continue;
            }
            if (!one.base) {
                if (method_.takes == base::required) {
                    where_.fail(it_.at_method, "merge_method '" + method_.theirs + "' needs a 'base_model'");
                }
                continue;
            }
            const auto place = std::find_if(
                inputs.begin(), inputs.end(), [&](const input& its) { return its.path == one.base->path; });
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
        if (method_.ours == "average") { even_out(); }
        const auto& first = slices_.front();
        for (const auto& one : slices_) {
            if (one.inputs.empty()) { where_.fail(it_.at_method, "a slice has no model beside the base"); }
            if (one.inputs.size() != first.inputs.size() || one.base.has_value() != first.base.has_value()) {
                where_.fail(one.inputs.front().at,
                    taskvec::message("this slice merges ", counted(one.inputs.size(), "model"), " and the first ",
                        first.inputs.size(), "; expected as many in every slice, but for merge_method 'linear'"));
            }
        }
        if (first.base) { request_.base = first.base->path; }
        for (const auto& one : slices_) {
            if (one.base) { append_layers(request_.views[""], one.base->path, one.base->first, one.base->last); }
        }
        std::error_code ignored;
        if (given && request_.copies.from.empty()) { // configuration and tokenizer are the base's
            if (const auto from = it_.names.find(given->value).path; fs::is_directory(from, ignored)) {
                request_.copies.from = from;
            }
        }
    }

    void set_base(const std::optional<mapping::entry>& given)
    {
        using base = mergekit_method::base;
        if (it_.sliced()) {
            set_bases_of_slices(given);
            check_count();
            return;
        }
        auto& inputs = slices_.front().inputs;
        if (!given) {
            if (method_.takes == base::required) {
                where_.fail(it_.at_method, "merge_method '" + method_.theirs + "' needs a 'base_model'");
            }
        }
        else {
            auto found = it_.names.find(given->value);
            const auto same = [&](const input& one) { return one.path == found.path && one.adapter == found.adapter; };
            std::vector<input> others;
            std::copy_if(inputs.begin(), inputs.end(), std::back_inserter(others), std::not_fn(same));
            const bool weighted = !method_.parameters.empty() && method_.parameters.front().name == "weight";
            if (others.empty() && method_.takes == base::required && weighted) { // no task vector: the base itself
                others.push_back(inputs.front());
                others.front().parameters.reset();
                others.front().parameters.emplace(without_weight());
            }
            if (method_.takes != base::input) {
                request_.base = found.path;
                request_.base_adapter = found.adapter;
                inputs.swap(others);
            }
            else if (others.size() == inputs.size()) {
                inputs.push_back(std::move(found));
            }
        }
        if (inputs.empty()) { where_.fail(it_.at_method, "no model is left beside the base"); }
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

void read_models(reading& it, const mapping& top)
{
    models_reader(it).read(top);
}

} // namespace tool::configuration
