// Adapters to merge: the names of their modules.
// SPDX-License-Identifier: Apache-2.0
#include "align_adapters.hpp"
#include "names.hpp"

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <utility>

namespace tool {

namespace {

/// The modules of an adapter as tensors without data.
template <class T>
void add_modules(const taskvec::peft_adapter<T>& adapter, taskvec::const_model_ref& model)
{
    for (const auto& [name, update] : adapter.updates) {
        if (model.find(name)) { continue; }
        model.insert(name,
            {nullptr, taskvec::dtype::f32,
                {static_cast<std::int64_t>(update.out()), static_cast<std::int64_t>(update.in())}, {}});
    }
}

std::size_t modules_of(const taskvec::const_model_ref& model)
{
    return static_cast<std::size_t>(std::distance(model.begin(), model.end()));
}

/// "'q', 'v' and 6 more"
std::string some_of(const taskvec::const_model_ref& model)
{
    constexpr std::size_t most = 2;
    const std::size_t all = modules_of(model);
    std::string text;
    std::size_t at = 0;
    for (const auto& [name, tensor] : model) {
        if (at == most) { break; }
        const bool last = ++at == all;
        text += (text.empty() ? "'" : last ? " and '" : ", '") + name + "'";
    }
    return all > most ? text + " and " + std::to_string(all - most) + " more" : text;
}

template <class Map>
Map under_names(Map&& map, const std::map<std::string, std::string>& names)
{
    Map result;
    for (auto& [name, value] : map) {
        const auto place = names.find(name);
        result.emplace(place == names.end() ? name : place->second, std::move(value));
    }
    return result;
}

/// What comes beside factors ("MODULE.base_layer.weight", "MODULE.weight", "MODULE.bias") as its module is called.
std::map<std::string, taskvec::peft_tensor> with_modules_under_names(
    std::map<std::string, taskvec::peft_tensor> tensors, const std::map<std::string, std::string>& names)
{
    std::map<std::string, taskvec::peft_tensor> result;
    for (auto& [name, tensor] : tensors) {
        const auto at = name.ends_with(taskvec::peft_base_weight) ? name.size() - taskvec::peft_base_weight.size()
                                                                  : std::min(name.rfind('.'), name.size());
        const auto place = names.find(name.substr(0, at));
        result.emplace(place == names.end() ? name : place->second + name.substr(at), std::move(tensor));
    }
    return result;
}

} // namespace

template <class T>
void align_modules(adapter_group<T>& group)
{
    taskvec::const_model_ref seen;
    add_modules(group.adapters[0], seen);
    for (std::size_t i = 1; i < group.adapters.size(); ++i) {
        auto& adapter = group.adapters[i];
        taskvec::const_model_ref mine;
        add_modules(adapter, mine);
        const auto match = match_prefixes(mine, seen);
        const std::string label = "'" + adapter.label + "'";
        if (group.given.match_prefixes && !match.names.empty()) {
            note(group.given.run,
                taskvec::message(
                    "modules of ", label, ": ", match.words(), ", ", counted(match.names.size(), "module")));
            adapter.updates = under_names(std::move(adapter.updates), match.names);
            adapter.others = with_modules_under_names(std::move(adapter.others), match.names);
            adapter.stored = under_names(std::move(adapter.stored), match.names);
            std::set<std::string> embeddings;
            for (const auto& name : adapter.embeddings) {
                const auto place = match.names.find(name);
                embeddings.insert(place == match.names.end() ? name : place->second);
            }
            adapter.embeddings = std::move(embeddings);
        }
        else {
            const std::size_t all = adapter.updates.size(), fewest = std::min(all, modules_of(seen));
            const std::string would = match.names.empty() ? std::string()
                                                          : "; with " + match.words() + ", "
                    + counted(match.names.size(), "module") + " would be the same: --match-prefixes";
            if (match.same == 0 && match.names.empty() && !group.given.disjoint) {
                taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                    taskvec::message(label, " shares no module with the adapters before it: it has ", some_of(mine),
                        ", and they have ", some_of(seen),
                        "; where they are of different parts of one model, --disjoint makes an adapter of all"));
            }
            if (2 * match.same < fewest || (!match.names.empty() && match.wrappers_only())) {
                note(group.given.run,
                    label + " shares " + (match.same == 0 ? "none" : grouped(match.same)) + " of its "
                        + counted(all, "module") + " with the adapters before it: the result has those of both"
                        + would);
            }
        }
        add_modules(adapter, seen);
    }
}

template void align_modules(adapter_group<float>&);
template void align_modules(adapter_group<double>&);

} // namespace tool
