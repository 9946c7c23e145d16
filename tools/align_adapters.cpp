// Adapters to merge: read, found to be of one base, and what they have in common.
// SPDX-License-Identifier: Apache-2.0
#include "align_adapters.hpp"
#include "architectures.hpp"

#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <cstddef>
#include <utility>

namespace tool {

namespace {

constexpr const char* base_field = "base_model_name_or_path";

/// What `first` carries beside its factors `other` carries too, but for the base weight of a module that it does not
/// adapt.
template <class T, class Fail>
void check_others(const taskvec::peft_adapter<T>& first, const taskvec::peft_adapter<T>& other, const Fail& fail)
{
    for (const auto& [name, tensor] : first.others) {
        const bool copy = name.ends_with(taskvec::peft_base_weight);
        const auto place = other.others.find(name);
        if (place == other.others.end() ? copy : place->second == tensor) { continue; }
        if (copy) { fail("carry different base weights '", name, "': they are adapters of different bases"); }
        fail("carry different tensors beside their factors ('", name,
            "' among them), which no merge of low-rank updates joins: choose what becomes of them "
            "(--modules-to-save average, first or drop), or remove them");
    }
}

/// Whether weights lie in×out, as the configuration says.
template <class T>
bool is_turned(const taskvec::peft_adapter<T>& adapter)
{
    return taskvec::flag_under(adapter.config, "fan_in_fan_out");
}

/// Whether an adapter has factors of a head. PEFT then saves it with fan_in_fan_out false although the other layers of
/// GPT-2 lie in×out: the head does not, and the configuration says what was found of the layer that came last.
template <class T>
bool adapts_head(const taskvec::peft_adapter<T>& adapter)
{
    return std::any_of(
        adapter.updates.begin(), adapter.updates.end(), [](const auto& one) { return is_head_module(one.first); });
}

template <class T>
void check_together(const taskvec::peft_adapter<T>& first, const taskvec::peft_adapter<T>& other, bool any_base)
{
    const auto fail = [&](const auto&... parts) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
            taskvec::message("'", first.label, "' and '", other.label, "' ", parts...));
    };
    const auto base = taskvec::text_under(first.config, base_field),
               its_base = taskvec::text_under(other.config, base_field);
    if (!any_base && !base.empty() && !its_base.empty() && base != its_base) {
        fail("are adapters of different bases, '", base, "' and '", its_base,
            "': where these are one model under two names, say so by --any-base");
    }
    if (is_turned(first) != is_turned(other) && !adapts_head(is_turned(first) ? other : first)) {
        fail("disagree about fan_in_fan_out: they are adapters of different bases");
    }
    for (const auto& [name, update] : first.updates) {
        if (other.updates.contains(name) && first.embeddings.contains(name) != other.embeddings.contains(name)) {
            fail("disagree whether module '", name, "' is an embedding: they are adapters of different bases");
        }
    }
    check_others(first, other, fail);
    check_others(other, first, fail);
}

template <class T>
void check_shapes(const adapter_group<T>& group)
{
    std::map<std::string, const taskvec::peft_adapter<T>*> seen;
    for (const auto& adapter : group.adapters) {
        for (const auto& [name, update] : adapter.updates) {
            const auto [place, fresh] = seen.emplace(name, &adapter);
            const auto& earlier = place->second->updates.at(name);
            if (!fresh && (earlier.out() != update.out() || earlier.in() != update.in())) {
                taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::adapter_shape,
                    taskvec::message("module '", name, "' is ", update.out(), "×", update.in(), " in '", adapter.label,
                        "' but ", earlier.out(), "×", earlier.in(), " in '", place->second->label,
                        "': they are adapters of different bases"));
            }
        }
    }
}

/// The merged adapter but for its updates. `tied`: what it says of the head and the embedding.
template <class T>
taskvec::peft_adapter<T> merged(const adapter_group<T>& group, std::optional<bool> tied)
{
    taskvec::peft_adapter<T> result;
    result.config = group.adapters[0].config;
    for (const auto& adapter : group.adapters) {
        result.others.insert(adapter.others.begin(), adapter.others.end());
        for (const char* field : {base_field, "task_type"}) {
            const auto said = taskvec::text_under(adapter.config, field);
            if (!said.empty() && taskvec::text_under(result.config, field).empty()) { result.config[field] = said; }
        }
        const auto trained = taskvec::text_under(adapter.config, "bias");
        if (trained == "all" || (trained == "lora_only" && taskvec::text_under(result.config, "bias") != "all")) {
            result.config["bias"] = trained;
        }
        if (is_turned(adapter)) { result.config["fan_in_fan_out"] = true; }
        result.embeddings.insert(adapter.embeddings.begin(), adapter.embeddings.end());
        for (const auto& [name, type] : adapter.stored) {
            const auto [place, fresh] = result.stored.emplace(name, type);
            if (!fresh) { place->second = taskvec::wider(place->second, type); }
        }
    }
    const auto same_modules = [&](const auto& adapter) {
        return std::equal(adapter.updates.begin(), adapter.updates.end(), group.adapters[0].updates.begin(),
            group.adapters[0].updates.end(), [](const auto& a, const auto& b) { return a.first == b.first; });
    };
    const bool as_first = !tied || *tied == taskvec::flag_under(result.config, weight_tying);
    if (!as_first) { result.config[weight_tying] = *tied; }
    // write_peft() then lists every module
    if (!as_first || !std::all_of(group.adapters.begin(), group.adapters.end(), same_modules)) {
        for (const char* field : {"target_modules", "exclude_modules"}) { result.config[field] = nullptr; }
    }
    return result;
}

} // namespace

template <class T>
aligned_adapters<T> align_adapters(const alignment_settings& given, const std::vector<task_argument>& arguments)
{
    adapter_group<T> group{given};
    aligned_adapters<T> result;
    for (const auto& argument : arguments) {
        group.adapters.push_back(read_adapter<T>(argument.path, given));
        group.paths.push_back(argument.path);
        group.weights.push_back(argument.weight);
        result.bytes += adapter_bytes(argument.path);
    }
    if (given.in_phi()) {
        group.initial = read_adapter<T>(given.init, given);
        result.bytes += adapter_bytes(given.init);
    }
    call_biases(group, {});
    align_modules(group);
    const auto tied = align_heads(group);
    check_whole_or_factored(group);
    auto tokens = align_tokens(group);
    join_whole_modules(group);
    auto& adapters = group.adapters;
    for (std::size_t i = 1; i < adapters.size(); ++i) {
        for (std::size_t j = 0; j < i; ++j) { check_together(adapters[j], adapters[i], given.any_base); }
    }
    for (const auto& adapter : adapters) {
        if (given.in_phi()) { check_together(group.initial, adapter, given.any_base); }
    }
    check_shapes(group);
    call_biases(group, group.adapted_modules());
    result.merged = merged(group, tied);
    for (auto& adapter : adapters) { result.updates.push_back(std::move(adapter.updates)); }
    result.weights = std::move(group.weights);
    result.initial = std::move(group.initial.updates);
    result.rows_changed = tokens.changed;
    result.tokenizer = std::move(tokens.tokenizer);
    return result;
}

template aligned_adapters<float> align_adapters(const alignment_settings&, const std::vector<task_argument>&);
template aligned_adapters<double> align_adapters(const alignment_settings&, const std::vector<task_argument>&);

} // namespace tool
