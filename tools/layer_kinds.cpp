// What a configuration says of layers by their numbers, where those of a result are other models' in another order.
// SPDX-License-Identifier: Apache-2.0
#include "layer_kinds.hpp"

#include "names.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

namespace tool {

namespace {

using json = layers_in_config::json;

constexpr std::array<const char*, 4> counts{"num_hidden_layers", "n_layer", "num_layers", "n_layers"};

/// How many layers a configuration has; 0 where it does not say.
std::size_t layers_said(const json& part)
{
    for (const char* name : counts) {
        if (part.contains(name) && part[name].is_number_unsigned()) { return part[name].get<std::size_t>(); }
    }
    for (const char* name : {"layers_block_type", "layer_types"}) { // Nemotron-H has nothing else
        if (part.contains(name) && part[name].is_array()) { return part[name].size(); }
    }
    return 0;
}

bool is_one_of(std::string_view name, std::initializer_list<std::string_view> list)
{
    return std::find(list.begin(), list.end(), name) != list.end();
}

bool holds_numbers(const json& value)
{
    return value.is_array()
        && std::all_of(value.begin(), value.end(), [](const json& one) { return one.is_number_unsigned(); });
}

/// Lists of the numbers of those layers that are of one kind: such as are known, and any that is called after layers
/// and rises.
bool lists_numbers(std::string_view name, const json& value, std::size_t before)
{
    if (!holds_numbers(value)) { return false; }
    if (is_one_of(name,
            {"mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "hybrid_layer_ids",
                "cross_attention_layers"})) {
        return true;
    }
    if (value.empty() || name.find("layer") == name.npos || name == "no_rope_layers") { return false; }
    const auto rises_not = [](const json& a, const json& b) { return a >= b; };
    return std::adjacent_find(value.begin(), value.end(), rises_not) == value.end() && value.back() < before;
}

/// Lists, or texts, of what each layer is.
bool lists_layers(std::string_view name, const json& value, std::size_t before)
{
    if (value.is_string()) {
        return name == "hybrid_override_pattern" && value.get_ref<const std::string&>().size() == before;
    }
    const bool named = name.find("layer") != name.npos
        || is_one_of(name,
            {"ffn_multipliers", "num_query_heads", "num_kv_heads", "block_configs", "activation_sparsity_pattern",
                "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_experts", "moe_topk",
                "indexer_types", "kv_sharing_modes", "sliding_windows", "swiglu_limits", "swiglu_limits_shared"});
    return named && value.is_array() && value.size() == before;
}

/// A number of a configuration; negative ones, which stand for no bound, are the largest.
std::optional<std::size_t> number_in(const json& part, std::string_view key)
{
    const auto place = part.find(key);
    if (place != part.end() && place->is_number_unsigned()) { return place->get<std::size_t>(); }
    if (place != part.end() && place->is_number_integer()) { return std::numeric_limits<std::size_t>::max(); }
    if (key != "sliding_window_pattern" || place != part.end()) { return std::nullopt; }
    // These have it where nothing says so.
    const auto type = part.find("model_type");
    if (type == part.end()) { return std::nullopt; }
    if (*type == "gemma2") { return 2; }
    if (*type == "gemma3_text") { return 6; }
    return *type == "cohere2" ? std::optional<std::size_t>(4) : std::nullopt;
}

bool has_value(const json& part, std::string_view key)
{
    const auto place = part.find(key);
    return place != part.end() && !place->is_null();
}

/// A kind of layers that numbers tell.
struct numbered_kind {
    using numbers = std::array<std::size_t, 3>;
    std::vector<std::string_view> keys; ///< of the numbers; the first is there
    std::string_view instead; ///< what counts in their place where it is there
    bool (*has)(std::size_t layer, const numbers& of); ///< whether a layer is of the kind
    numbers missing{0, 0, 0}; ///< what they are where they are not given
};

bool is_multiple(std::size_t layer, std::size_t of)
{
    return of > 0 && layer % of == 0;
}

const std::vector<numbered_kind>& numbered_kinds()
{
    using numbers = numbered_kind::numbers;
    const auto every = [](std::size_t layer, const numbers& of) { return is_multiple(layer + 1, of[0]); };
    const auto from = [](std::size_t layer, const numbers& of) { return layer >= of[0]; };
    const auto in_turn = [](std::size_t layer, const numbers& of) { return of[0] > 0 && layer % of[0] == of[1]; };
    static const std::vector<numbered_kind> list{
        {{"first_k_dense_replace", "moe_layer_freq"}, "",
            [](std::size_t layer, const numbers& of) { return layer >= of[0] && is_multiple(layer, of[1]); },
            {0, 1, 0}},
        {{"num_dense_layers"}, "", from}, {{"decoder_sparse_step"}, "", every},
        {{"interleave_moe_layer_step"}, "moe_layers", every}, {{"attn_layer_period", "attn_layer_offset"}, "", in_turn},
        {{"expert_layer_period", "expert_layer_offset"}, "", in_turn},
        {{"moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"}, "",
            [](std::size_t layer, const numbers& of) {
                return layer >= of[0] && layer <= of[1] && is_multiple(layer + 1, of[2]);
            },
            {0, std::numeric_limits<std::size_t>::max(), 1}},
        {{"max_window_layers"}, "layer_types", from}, {{"sliding_window_pattern"}, "layer_types", every},
        {{"full_attention_interval"}, "layer_types", every}, {{"no_rope_layer_interval"}, "no_rope_layers", every},
        {{"global_attn_every_n_layers"}, "layer_types",
            [](std::size_t layer, const numbers& of) { return is_multiple(layer, of[0]); }}};
    return list;
}

/// Whether a kind is in a configuration, and counts.
bool counts_in(const numbered_kind& kind, const json& part)
{
    if (!number_in(part, kind.keys.front())) { return false; }
    if (!kind.instead.empty() && has_value(part, kind.instead)) { return false; }
    const bool slides = is_one_of(kind.keys.front(), {"max_window_layers", "sliding_window_pattern"});
    if (slides && part.contains("sliding_window") && part["sliding_window"].is_null()) { return false; }
    return kind.keys.front() != "max_window_layers"
        || (part.contains("use_sliding_window") && part["use_sliding_window"] == true);
}

numbered_kind::numbers numbers_of(const numbered_kind& kind, const json& part)
{
    auto numbers = kind.missing;
    for (std::size_t k = 0; k < kind.keys.size(); ++k) {
        numbers[k] = number_in(part, kind.keys[k]).value_or(numbers[k]);
    }
    return numbers;
}

/// Numbers that give each layer the kind that is wanted, as few of them as will do other than they are; nothing where
/// none do.
std::optional<numbered_kind::numbers> numbers_for(
    const numbered_kind& kind, const numbered_kind::numbers& own, const std::vector<bool>& wanted)
{
    const auto fits = [&](const numbered_kind::numbers& of) {
        for (std::size_t i = 0; i < wanted.size(); ++i) {
            if (kind.has(i, of) != wanted[i]) { return false; }
        }
        return true;
    };
    constexpr std::size_t most = 1000; // layers to try numbers for
    if (fits(own)) { return own; }
    if (wanted.size() > most) { return std::nullopt; }
    auto tried = own;
    for (std::size_t k = 0; k < kind.keys.size(); ++k, tried = own) {
        for (tried[k] = 0; tried[k] <= wanted.size(); ++tried[k]) {
            if (fits(tried)) { return tried; }
        }
    }
    if (kind.keys.size() < 2) { return std::nullopt; }
    for (tried[0] = 0; tried[0] <= wanted.size(); ++tried[0]) {
        for (tried[1] = 0; tried[1] <= wanted.size(); ++tried[1]) {
            if (fits(tried)) { return tried; }
        }
    }
    return std::nullopt;
}

std::string in_words(const std::vector<std::string_view>& keys)
{
    std::string text;
    for (std::size_t k = 0; k < keys.size(); ++k) {
        text += (k == 0 ? "" : k + 1 == keys.size() ? " and " : ", ") + std::string(keys[k]);
    }
    return text;
}

/// What is said of layer i by a list that begins anew behind its end; null where it is empty.
json in_turn(const json& list, std::size_t i)
{
    return list.is_array() && !list.empty() ? list[i % list.size()] : json();
}

/// The layers of GPT-Neo's `attention_types`, [[["global", "local"], 12]]; null where it is none.
json layers_of_attention(const json& types)
{
    auto list = json::array();
    if (!types.is_array()) { return nullptr; }
    for (const auto& one : types) {
        if (!one.is_array() || one.size() != 2 || !one[0].is_array() || !one[1].is_number_unsigned()) {
            return nullptr;
        }
        constexpr std::size_t most = 10000;
        if (one[1].get<std::size_t>() > most) { return nullptr; }
        for (std::size_t i = 0; i < one[1].get<std::size_t>(); ++i) {
            for (const auto& word : one[0]) { list.push_back(word); }
        }
    }
    return list;
}

/// What a tensor is in its layer: its name behind the layer's number, without other numbers, and its shape.
std::string part_of_layer(const taskvec::tensor_spec& spec, const std::string& before)
{
    std::string text;
    const auto rest = std::string_view(spec.name).substr(before.size());
    for (std::size_t at = std::min(rest.find('.'), rest.size()); at < rest.size();) {
        const auto end = std::min(rest.find('.', at + 1), rest.size());
        const auto word = rest.substr(at, end - at);
        text += word.find_first_not_of("0123456789", 1) == word.npos ? ".#" : std::string(word);
        at = end;
    }
    for (const auto extent : spec.shape) { text += " " + std::to_string(extent); }
    return text;
}

} // namespace

layers_in_config::layers_in_config(const model_view& layers, const run_options& run)
    : run_(run)
{
    for (const auto& part : layers) {
        for (auto i = part.first; i < part.last; ++i) { layers_.push_back({part.path, i}); }
    }
}

const json& layers_in_config::config_of(const layer& one) const
{
    const auto place = others_.find(one.path);
    return place == others_.end() ? own_ : place->second;
}

void layers_in_config::load_configurations(const std::string& key, const json& part)
{
    own_ = part;
    others_.clear();
    for (const auto& one : layers_) {
        const auto file = fs::path(one.path) / "config.json";
        std::error_code ignored;
        if (others_.contains(one.path) || !fs::is_regular_file(file, ignored)) { continue; }
        const auto quoted = taskvec::quoted_constants(read_watched(file));
        (void)taskvec::parse_json(quoted, file.string());
        const auto whole = json::parse(quoted);
        others_[one.path] = key.empty() ? whole : whole.value(key, json::object());
    }
}

/// What says of each layer by its number what it is.
bool layers_in_config::update_list(const std::string& name, json& value, std::size_t before)
{
    const auto said = [&](const layer& one, const auto& is_it) -> const json& { // of the layer's own model, if it does
        const auto& its = config_of(one);
        const auto place = its.find(name);
        return place != its.end() && is_it(*place) ? *place : own_.at(name);
    };
    auto made = json::array();
    if (lists_numbers(name, value, before)) {
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            auto& one = layers_[i];
            const auto& list = said(one, holds_numbers);
            const bool in = std::find(list.begin(), list.end(), json(one.number)) != list.end();
            if (in) { made.push_back(i); }
            one.kind += name + (in ? " 1\n" : " 0\n");
        }
    }
    else if (lists_layers(name, value, before)) {
        const auto is_list = [&](const json& its) { return its.type() == value.type(); };
        std::string text;
        for (auto& one : layers_) {
            const auto has = [&](const json& its) {
                const auto size = its.is_string() ? its.get_ref<const std::string&>().size() : its.size();
                return is_list(its) && one.number < size;
            };
            const auto& list = said(one, has);
            if (!has(list)) { continue; }
            if (list.is_string()) { text += list.get_ref<const std::string&>()[one.number]; }
            else {
                made.push_back(list[one.number]);
            }
            one.kind += name + " " + (list.is_string() ? text.substr(text.size() - 1) : made.back().dump()) + "\n";
        }
        if (value.is_string()) { made = text; }
    }
    else if (name == "block_types" && value.is_array() && !value.empty()) { // a pattern, which may be of all layers
        bool same = true;
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            auto& one = layers_[i];
            made.push_back(in_turn(said(one, [](const json& its) { return its.is_array(); }), one.number));
            same = same && made.back() == in_turn(value, i);
            one.kind += name + " " + made.back().dump() + "\n";
        }
        if (same) { return false; }
    }
    else if (const auto attention = name == "attention_types" ? layers_of_attention(value) : json();
        attention.is_array()) {
        bool same = attention.size() == layers_.size();
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            auto& one = layers_[i];
            auto list = layers_of_attention(said(one, [](const json& its) { return its.is_array(); }));
            if (!list.is_array() || one.number >= list.size()) { list = attention; }
            const auto kind = one.number < list.size() ? list[one.number] : json();
            made.push_back(json::array({json::array({kind}), 1}));
            same = same && attention[i] == kind;
            one.kind += name + " " + kind.dump() + "\n";
        }
        if (same) { return false; }
    }
    else {
        constexpr std::size_t few = 8; // of so many entries a list may be by chance
        bool moved = layers_.size() != before;
        for (std::size_t i = 0; i < layers_.size(); ++i) { moved = moved || layers_[i].number != i; }
        if (moved && before >= few && value.is_array() && value.size() == before) {
            note(run_,
                "config.json: " + name + " has an entry for each of " + counted(before, "layer")
                    + " as it seems, and is not known here: it stays as it is, check it");
        }
        return false;
    }
    const bool changed = made != value;
    value = std::move(made);
    return changed;
}

/// What numbers say that layers are compared with.
bool layers_in_config::update_number_kinds(json& part)
{
    bool changed = false;
    for (const auto& kind : numbered_kinds()) {
        if (!counts_in(kind, own_)) { continue; }
        std::vector<bool> wanted;
        for (auto& one : layers_) {
            const auto& its = config_of(one);
            wanted.push_back(kind.has(one.number, numbers_of(kind, counts_in(kind, its) ? its : own_)));
            one.kind += std::string(kind.keys.front()) + (wanted.back() ? " 1\n" : " 0\n");
        }
        const auto own = numbers_of(kind, own_);
        const auto numbers = numbers_for(kind, own, wanted);
        if (!numbers) {
            noted_ = true;
            note(run_,
                "config.json: " + in_words(kind.keys) + (kind.keys.size() == 1 ? " tells" : " tell")
                    + " kinds of layers by their numbers, and no value gives each layer of the result the kind that it "
                      "has in its model: check it, or take the layers in another order");
            continue;
        }
        for (std::size_t k = 0; k < kind.keys.size(); ++k) {
            if ((*numbers)[k] == own[k]) { continue; }
            part[std::string(kind.keys[k])] = (*numbers)[k];
            changed = true;
        }
    }
    return changed;
}

bool layers_in_config::update(json& part, const std::string& key)
{
    const auto before = layers_said(part);
    if (before == 0) { return false; }
    is_said_ = true;
    load_configurations(key, part);
    bool changed = false;
    for (const char* name : counts) {
        if (!part.contains(name) || !part[name].is_number_unsigned()) { continue; }
        changed = changed || part[name] != layers_.size();
        part[name] = layers_.size();
    }
    for (auto& [name, value] : part.items()) { changed = update_list(name, value, before) || changed; }
    return update_number_kinds(part) || changed;
}

void layers_in_config::check(const std::vector<taskvec::tensor_spec>& specs) const
{
    if (!is_said_ || noted_) { return; }
    std::vector<std::set<std::string>> parts(layers_.size());
    for (const auto& spec : specs) {
        const auto layer = layer_of(spec.name);
        if (layer && layer->second < parts.size()) { parts[layer->second].insert(part_of_layer(spec, layer->first)); }
    }
    // Each number that a model has given to a layer is right for the layer that has it now where both are alike.
    std::map<std::size_t, std::size_t> by_number;
    for (std::size_t i = 0; i < layers_.size(); ++i) { by_number.emplace(layers_[i].number, i); }
    const bool in_place = std::all_of(layers_.begin(), layers_.end(), [&](const layer& one) {
        const auto i = static_cast<std::size_t>(&one - layers_.data());
        const auto own = by_number.find(i);
        return own != by_number.end() && parts[own->second] == parts[i];
    });
    if (in_place) { return; }
    std::map<std::string, std::size_t> first_of_kind;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
        const auto other = first_of_kind.emplace(layers_[i].kind, i).first->second;
        if (parts[other] == parts[i]) { continue; }
        note(run_,
            taskvec::message("config.json: layers ", other, " and ", i,
                " of the result hold different tensors, and nothing in it that is known here says which kind is which: "
                "check what it says of layers by their numbers"));
        return;
    }
}

} // namespace tool
