// Which tensors of a base the modules of an adapter mean: prefixes, underscores for dots, names of components, and the
// two namings of Stable Diffusion.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapted_model.hpp>
#include <taskvec/formats/adapter_file.hpp>
#include <taskvec/formats/diffusion_names.hpp>
#include <taskvec/formats/flux_names.hpp>
#include <taskvec/formats/mlx_settings.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The segments that PyTorch's wrappers put into names, anywhere between dots: those of FSDP, torch.compile and
/// activation checkpointing.
inline constexpr std::array<std::string_view, 3> wrapper_segments{
    "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"};

/// A name without the segments of wrappers, wherever they stand in it; itself where it has none.
///
///     without_wrappers("layers.0._checkpoint_wrapped_module.mlp.weight") // "layers.0.mlp.weight"
[[nodiscard]] inline std::string without_wrappers(std::string_view name)
{
    std::string rest;
    for (std::size_t at = 0; at <= name.size();) {
        const auto end = std::min(name.find('.', at), name.size());
        const auto segment = name.substr(at, end - at);
        if (std::find(wrapper_segments.begin(), wrapper_segments.end(), segment) == wrapper_segments.end()) {
            rest += (rest.empty() ? "" : ".") + std::string(segment);
        }
        at = end + 1;
    }
    return rest;
}

/// Modules of an adapter, and the base's tensors that they mean.
struct module_match {
    std::map<std::string, std::string> tensors{}; ///< the module's weight, by the module's name
    std::vector<std::string> unmatched{}; ///< modules without one
    std::map<std::string, std::vector<std::string>>
        doubtful{}; ///< of these, those that several tensors may be meant by
    std::map<std::string, diffusion_module>
        diffusion{}; ///< modules that are matched as those of Stable Diffusion: what is known of them, by their names
    std::vector<std::string> changes{}; ///< how names were changed, a phrase each: "'model.' put before"

    /// What the adapter calls `name` (a tensor that comes with it whole), called as the base calls it.
    [[nodiscard]] std::string renamed(const std::string& name, const const_model_ref& base) const
    {
        if (base.find(name)) { return name; }
        if (const auto called = names.tensor_called(name); !called.empty() && called != name) {
            return renamed(called, base);
        }
        const auto dot = name.rfind('.');
        if (const auto place = tensors.find(name.substr(0, dot)); place != tensors.end() && dot != name.npos) {
            if (!place->second.ends_with(".weight")) { return name; } // of several modules
            return place->second.substr(0, place->second.rfind('.')) + name.substr(dot);
        }
        for (const auto& [off, on] : prefixes) {
            if (name.starts_with(off) && base.find(on + name.substr(off.size()))) {
                return on + name.substr(off.size());
            }
        }
        const auto plain = without_wrappers(name);
        if (plain != name) { return renamed(plain, base); }
        for (const auto& entry : base) {
            if (entry.name.size() > plain.size() && without_wrappers(entry.name) == plain) { return entry.name; }
        }
        return name;
    }
    std::vector<std::pair<std::string, std::string>> prefixes{}; ///< taken off, and put before
    diffusion_names names{}; ///< those of the base, where it is a Stable Diffusion
};

namespace detail {

[[nodiscard]] inline std::string with_underscores(std::string name)
{
    std::replace(name.begin(), name.end(), '.', '_');
    return name;
}
/// A module's name without the name of its component: lora_unet_, lora_te1_, …
[[nodiscard]] inline std::string_view without_component(std::string_view module)
{
    return module.substr(kohya_component_of(module).prefix.size());
}

/// What the segments of a prefix say of the part of a model that a module is in: numbers of layers, and towers. Words
/// such as "model", "transformer" or "language_model" say nothing, and libraries put them before names as they like.
struct prefix_meaning {
    std::set<std::string, std::less<>> towers{}; ///< "encoder", "decoder", "vision", "audio"
    bool numbered = false; ///< has a number behind its first segment: of a layer, not of a list of models
};
[[nodiscard]] inline prefix_meaning meaning_of(std::string_view prefix)
{
    prefix_meaning meaning;
    for (std::size_t at = 0; at < prefix.size();) {
        const auto end = std::min(prefix.find('.', at), prefix.size());
        const auto segment = prefix.substr(at, end - at);
        const bool number = !segment.empty() && segment.find_first_not_of("0123456789") == segment.npos;
        meaning.numbered = meaning.numbered || (number && at > 0);
        // Whole words: models are called "audio_spectrogram_transformer" and "speecht5" too.
        const auto is = [&](std::string_view tower, std::initializer_list<std::string_view> begins) {
            const bool told = segment == tower || segment.ends_with("_" + std::string(tower))
                || std::any_of(begins.begin(), begins.end(), [&](auto word) { return segment.starts_with(word); });
            if (told) { meaning.towers.emplace(tower); }
        };
        is("encoder", {});
        is("decoder", {});
        is("vision", {"vision_", "visual", "image_tower", "image_encoder"});
        is("audio", {"audio_tower", "audio_model", "audio_encoder", "speech_encoder"});
        is("qformer", {});
        at = end + 1;
    }
    return meaning;
}
/// Whether `on` may stand in the place of `off` before a module's name: neither may tell another layer or tower than
/// the other. Where the adapter's names begin without a prefix (`off` is empty), the base's may be any.
[[nodiscard]] inline bool may_replace(std::string_view off, std::string_view on)
{
    if (off.empty()) { return true; }
    const auto here = meaning_of(off), there = meaning_of(on);
    return !here.numbered && !there.numbered && here.towers == there.towers;
}

/// The modules of a base that a name with underscores ends in, behind something that tells no layer or tower and goes
/// into `off`: transformers 5 saves a CLIPTextModel without the "text_model." that it has before its names elsewhere.
/// `names` are the base's, each with underscores and as it is.
[[nodiscard]] inline std::vector<std::string> behind_underscores(
    std::string_view key, const std::vector<std::pair<std::string, std::string>>& names, std::string& off)
{
    std::vector<std::string> found;
    std::size_t longest = 0;
    for (const auto& [underscored, name] : names) {
        const bool ends = key.size() > underscored.size() && key.ends_with(underscored)
            && key[key.size() - underscored.size() - 1] == '_';
        if (!ends || underscored.size() < longest || name.find('.') == name.npos) { continue; }
        if (underscored.size() > longest) { found.clear(); }
        longest = underscored.size();
        found.push_back(name);
    }
    if (found.empty()) { return found; }
    off = std::string(key.substr(0, key.size() - longest));
    auto dotted = off;
    std::replace(dotted.begin(), dotted.end(), '_', '.');
    if (!may_replace(dotted, "")) { found.clear(); }
    return found;
}

/// match_modules() of names that no wrapper has changed.
[[nodiscard]] inline module_match match_plain_modules(
    const std::vector<std::string>& modules, const const_model_ref& base, adapter_dialect dialect)
{
    constexpr std::string_view suffix = ".weight";
    const std::string without_components = "names of components and processors left out",
                      with_dots = "underscores read as the base's dots";
    module_match match;
    std::vector<std::string> left, none; // to be matched, and those that certainly mean nothing
    const auto has = [&](const std::string& module) { return base.find(module + std::string(suffix)) != nullptr; };
    const auto change = [&](const std::string& text) {
        if (std::find(match.changes.begin(), match.changes.end(), text) == match.changes.end()) {
            match.changes.push_back(text);
        }
    };
    match.names = diffusion_names(base);
    std::size_t translated = 0;
    bool into_ldm = false;
    for (const auto& module : modules) {
        if (has(module)) {
            match.tensors.emplace(module, module + std::string(suffix));
            continue;
        }
        auto meant = match.names.find(module, dialect);
        if (meant.size() > 1) {
            for (const auto& one : meant) { match.doubtful[module].push_back(one.tensor); }
            none.push_back(module);
            continue;
        }
        const bool named = !split_component(module, dialect).component.empty();
        if (meant.empty() && match.names.decides(module, dialect)) { none.push_back(module); }
        else if (meant.empty() || (!named && !meant[0].translated)) {
            left.push_back(module);
        }
        else {
            if (dialect == adapter_dialect::kohya) { change(with_dots); }
            else if (named) {
                change(without_components);
            }
            translated += meant[0].translated ? 1 : 0;
            into_ldm = into_ldm || meant[0].single_file;
            match.tensors.emplace(module, meant[0].tensor);
            match.diffusion.emplace(module, std::move(meant[0]));
        }
    }
    if (translated > 0) {
        const auto count = message(translated, translated == 1 ? " name" : " names");
        match.changes.push_back(into_ldm ? count + " of diffusers' translated to the base's, a single file's (LDM)"
                                         : count + " of single files (LDM) translated to the base's, diffusers'");
    }
    if (dialect == adapter_dialect::kohya && !left.empty()) {
        std::vector<std::pair<std::string, std::string>> names; // with underscores, and the module's name
        for (const auto& [name, tensor] : base) {
            if (!name.ends_with(suffix)) { continue; }
            auto module = name.substr(0, name.size() - suffix.size());
            names.emplace_back(detail::with_underscores(module), module);
        }
        std::vector<std::string> still;
        for (const auto& module : left) {
            const std::string key = detail::with_underscores(std::string(detail::without_component(module)));
            std::vector<std::string> whole, ending;
            for (const auto& [underscored, name] : names) {
                if (underscored == key) { whole.push_back(name); }
                else if (underscored.size() > key.size() && underscored.ends_with(key)
                    && underscored[underscored.size() - key.size() - 1] == '_') {
                    ending.push_back(name);
                }
            }
            std::string off;
            const bool flat = module.find('.') == module.npos;
            if (flat && whole.empty() && ending.empty()) { whole = detail::behind_underscores(key, names, off); }
            const auto& found = whole.empty() ? ending : whole;
            if (found.size() == 1) {
                match.tensors.emplace(module, found[0] + std::string(suffix));
                change(with_dots);
                if (!off.empty()) { change("'" + off + "' taken off"); }
            }
            else {
                for (const auto& name : found) { match.doubtful[module].push_back(name + std::string(suffix)); }
                still.push_back(module);
            }
        }
        left = std::move(still); // ComfyUI's have dots, and prefixes
    }
    // diffusers: components, processors, and the list that to_out is
    std::vector<std::string> still;
    for (const auto& module : left) {
        std::string name = module;
        if (const auto component = detail::component_of(name); !component.empty()) {
            name.erase(0, component.size() + 1);
        }
        if (const auto at = name.find(".processor."); at != name.npos) { name.erase(at, 10); }
        if (!has(name) && name.ends_with(".to_out") && has(name + ".0")) { name += ".0"; }
        if (name != module && has(name)) {
            match.tensors.emplace(module, name + std::string(suffix));
            change(without_components);
        }
        else {
            still.push_back(module);
        }
    }
    left = std::move(still);
    std::vector<std::string> open; // modules that no prefix of their own decides; those of others may
    while (!left.empty()) {
        // Prefixes by the first that is left: its longest ending that a tensor of the base has.
        std::string off, on;
        bool found = false;
        const std::string first = left.front() + std::string(suffix);
        for (std::size_t at = 0; !found; ++at) {
            const auto ending = first.substr(at);
            std::vector<std::string> before;
            for (const auto& [name, tensor] : base) {
                const bool whole_there = name.size() == ending.size();
                if (name.size() < ending.size() || !name.ends_with(ending)
                    || (!whole_there && name[name.size() - ending.size() - 1] != '.')
                    || (at > 0 && !whole_there && ending.find('.') == ending.size() - suffix.size())) {
                    continue;
                }
                auto prefix = name.substr(0, name.size() - ending.size());
                if (detail::may_replace(std::string_view(first).substr(0, at), prefix)) {
                    before.push_back(std::move(prefix));
                }
            }
            if (before.size() > 1) {
                for (const auto& prefix : before) { match.doubtful[left.front()].push_back(prefix + ending); }
                break;
            }
            if (before.size() == 1) {
                off = first.substr(0, at);
                on = before[0];
                found = true;
                break;
            }
            at = first.find('.', at);
            if (at == first.npos || at + suffix.size() >= first.size()) { break; }
        }
        if (!found) { // the others may say more
            open.push_back(left.front());
            left.erase(left.begin());
            continue;
        }
        const auto rename = [&](std::vector<std::string>& waiting) {
            std::vector<std::string> rest;
            for (const auto& module : waiting) {
                const auto name = module.starts_with(off) ? on + module.substr(off.size()) : "";
                if (!name.empty() && has(name)) { match.tensors.emplace(module, name + std::string(suffix)); }
                else {
                    rest.push_back(module);
                }
            }
            waiting = std::move(rest);
        };
        rename(left);
        rename(open);
        match.prefixes.emplace_back(off, on);
        match.changes.push_back(off.empty() ? "'" + on + "' put before"
                : on.empty()                ? "'" + off + "' taken off"
                                            : "'" + on + "' in place of '" + off + "'");
    }
    std::erase_if(match.doubtful, [&](const auto& one) { return match.tensors.contains(one.first); });
    match.unmatched = std::move(open);
    match.unmatched.insert(match.unmatched.end(), none.begin(), none.end());
    return match;
}

} // namespace detail

/// Finds, for every module of an adapter, the tensor "….weight" of the base that it means: by its own name; without the
/// segments that wrappers put into the names of either (without_wrappers()); where dots are underscores by the one name
/// that has them there; where a file names components (unet., text_encoder.) or diffusers' processors without these;
/// in a Stable Diffusion by the names of either kind, of the component that a name says (diffusion_names); and by
/// prefixes that one of the two puts before its names, where they are the same for all: never by one that tells
/// another layer or tower (encoder, decoder, vision) than what it stands for. Nothing is matched where two tensors
/// would do, unless the prefixes of other modules decide.
[[nodiscard]] inline module_match match_modules(
    const std::vector<std::string>& modules, const const_model_ref& base, adapter_dialect dialect)
{
    std::map<std::string, std::string> module_of, tensor_of; // by the names without wrappers
    bool wrapped = false;
    for (const auto& module : modules) {
        const auto plain = without_wrappers(module);
        wrapped = wrapped || plain != module;
        if (!module_of.emplace(plain, module).second) { return detail::match_plain_modules(modules, base, dialect); }
    }
    for (const auto& [name, tensor] : base) {
        const auto plain = without_wrappers(name);
        wrapped = wrapped || plain != name;
        if (!tensor_of.emplace(plain, name).second) { return detail::match_plain_modules(modules, base, dialect); }
    }
    if (!wrapped) { return detail::match_plain_modules(modules, base, dialect); }
    std::vector<std::string> plain_modules;
    for (const auto& [plain, module] : module_of) { plain_modules.push_back(plain); }
    const_model_ref plain_base;
    for (const auto& [plain, name] : tensor_of) { plain_base.insert(plain, *base.find(name)); }
    const auto found = detail::match_plain_modules(plain_modules, plain_base, dialect);
    module_match match;
    bool differ = false;
    for (const auto& [plain, tensor] : found.tensors) {
        const auto &module = module_of.at(plain), &there = tensor_of.at(tensor);
        differ = differ || (module == plain) != (there == tensor);
        match.tensors.emplace(module, there);
    }
    for (const auto& plain : found.unmatched) { match.unmatched.push_back(module_of.at(plain)); }
    for (const auto& [plain, tensors] : found.doubtful) {
        for (const auto& tensor : tensors) { match.doubtful[module_of.at(plain)].push_back(tensor_of.at(tensor)); }
    }
    match.changes = found.changes;
    if (differ) { match.changes.emplace_back("segments of wrappers (_fsdp_wrapped_module, _orig_mod, …) left out"); }
    match.prefixes = found.prefixes;
    match.names = found.names;
    for (const auto& [plain, known] : found.diffusion) {
        auto& there = match.diffusion[module_of.at(plain)] = known;
        there.tensor = tensor_of.at(known.tensor);
    }
    return match;
}
/// The same for the modules of an adapter, among them experts that are part of one parameter, whose tensors are the
/// parameters. In `unmatched` such a parameter stands for all its experts.
template <arithmetic_element T>
[[nodiscard]] module_match match_modules(const adapter_contents<T>& adapter, const const_model_ref& base)
{
    constexpr std::string_view suffix = ".weight";
    std::vector<std::string> names;
    std::map<std::string, std::vector<std::string>> experts; // by parameter
    for (const auto& [module, made] : adapter.modules) {
        if (made.slice.parameter.empty()) { names.push_back(module); }
        else {
            experts[made.slice.parameter].push_back(module);
        }
    }
    if (experts.empty()) { return match_modules(names, base, adapter.dialect); }
    const_model_ref with_parameters = base; // each also as the weight of a module of its name
    for (const auto& [name, tensor] : base) {
        auto called = name + std::string(suffix);
        if (!name.ends_with(suffix) && !base.find(called)) { with_parameters.insert(std::move(called), tensor); }
    }
    for (const auto& one : experts) { names.push_back(one.first); }
    auto match = match_modules(names, with_parameters, adapter.dialect);
    for (const auto& [parameter, modules] : experts) {
        const auto place = match.tensors.find(parameter);
        if (place == match.tensors.end()) { continue; }
        const auto tensor = place->second.substr(0, place->second.size() - suffix.size());
        match.tensors.erase(place);
        for (const auto& module : modules) { match.tensors.emplace(module, tensor); }
    }
    return match;
}

/// Makes the experts of an adapter that are parts of one parameter, as transformers 5 has them in memory, modules of
/// their own where the base stores a weight for each, as files of most models do: rows of gate_up_proj are those of
/// gate_proj and up_proj one behind the other (w1 and w3 of Mixtral, whose w2 is down_proj). Their router goes along
/// (mlp.gate is block_sparse_moe.gate in Mixtral's files). Throws shape_mismatch for an odd number of rows, or another
/// number of experts than the base has.
template <arithmetic_element T>
void split_experts(adapter_contents<T>& adapter, const const_model_ref& base)
{
    const auto any = [&](const std::string& ending) {
        return std::any_of(base.begin(), base.end(), [&](const auto& entry) { return entry.name.ends_with(ending); });
    };
    const bool mixtral = any(".experts.0.w1.weight");
    if (!mixtral && !any(".experts.0.down_proj.weight")) { return; }
    const bool sparse = mixtral && any(".block_sparse_moe.experts.0.w1.weight");
    const auto as_stored = [&](std::string name, std::string_view part) {
        if (const auto at = name.rfind(part); sparse && at != name.npos) {
            name.replace(at + 1, 3, "block_sparse_moe");
        }
        return name;
    };
    const bool own_router = any(".mlp.gate.weight");
    std::map<std::string, adapted_module<T>> split;
    for (auto& [module, made] : adapter.modules) {
        const auto parameter = made.slice.parameter; // which a module of its own has no more
        const bool both = parameter.ends_with(".experts.gate_up_proj"),
                   down = parameter.ends_with(".experts.down_proj");
        if (!both && !down) {
            const bool router = parameter.empty() && module.ends_with(".mlp.gate") && !own_router;
            split.emplace(router ? as_stored(module, ".mlp.gate") : module, std::move(made));
            continue;
        }
        const auto owner = as_stored(parameter.substr(0, parameter.rfind('.')), ".mlp.experts");
        const auto called = [&](std::size_t index, std::string_view word) {
            return owner + "." + std::to_string(index) + "." + std::string(word);
        };
        auto last = called(made.slice.count, mixtral ? "w2.weight" : "down_proj.weight");
        last.erase(0, std::min(last.find("layers."), last.size())); // whatever stands before the layers
        if (!last.empty() && (any("." + last) || base.find(last))) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("parameter '", parameter, "' of ", adapter.label, " is of ", made.slice.count,
                    " experts, and the base has more: this adapter belongs to another base"));
        }
        const auto index = made.slice.index;
        made.slice = {};
        if (down) {
            split.emplace(called(index, mixtral ? "w2" : "down_proj"), std::move(made));
            continue;
        }
        const std::size_t rows = made.update.out() / 2, rank = made.update.rank();
        if (made.update.out() % 2 != 0) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("parameter '", parameter, "' of ", adapter.label, " has ", made.update.out(),
                    " outputs, and those of gate_proj and up_proj are equally many"));
        }
        for (std::size_t half = 0; half < 2; ++half) {
            adapted_module<T> one = made;
            one.update.b = matrix<T>(rows, rank, matrix_order::row_major);
            for (std::size_t i = 0; i < rows; ++i) {
                for (std::size_t k = 0; k < rank; ++k) { one.update.b(i, k) = made.update.b(half * rows + i, k); }
            }
            split.emplace(called(index,
                              half == 0       ? (mixtral ? "w1" : "gate_proj")
                                  : (mixtral) ? "w3"
                                              : "up_proj"),
                std::move(one));
        }
    }
    adapter.modules = std::move(split);
}

/// What MLX's configuration says (num_layers, lora_parameters.keys), against the base of an adapter of it, as matched.
/// Does nothing for other dialects. Throws format_error for more layers than the base has, modules of layers that MLX
/// would leave out, and names of modules that the base has there and the adapter nothing of. `label` names the base in
/// messages; `counted` are the layers that its configuration counts, where it does: files may hold more behind them,
/// which predict further tokens.
template <arithmetic_element T>
void check_mlx_base(const adapter_contents<T>& adapter, const const_model_ref& base, const module_match& match,
    std::string_view label = "the base", std::optional<std::int64_t> counted = std::nullopt)
{
    if (adapter.dialect != adapter_dialect::mlx) { return; }
    constexpr std::string_view suffix = ".weight";
    const std::string file = (adapter.file.parent_path() / peft_config_name).string();
    const detail::mlx_targets targets(adapter.config, file);
    std::map<std::string, std::int64_t, std::less<>> layers; // by list
    std::int64_t most = 0;
    for (const auto& [name, tensor] : base) {
        const auto place = detail::place_in_layers(name);
        if (!place.number) { continue; }
        auto& count = layers[std::string(place.list)];
        count = std::max(count, *place.number + 1);
    }
    for (auto& one : layers) {
        if (counted && *counted > 0) { one.second = std::min(one.second, *counted); }
        most = std::max(most, one.second);
    }
    std::set<std::string, std::less<>> used; // lists
    std::vector<std::string> modules; // as the base calls them
    for (const auto& [module, tensor] : match.tensors) {
        modules.push_back(tensor.substr(0, tensor.size() - suffix.size()));
        const auto place = detail::place_in_layers(modules.back());
        if (!place.number) { continue; }
        used.emplace(place.list);
        const auto count = layers.find(place.list)->second;
        if (!targets.layers || *targets.layers > count || *place.number >= count - *targets.layers) { continue; }
        raise<format_error>(error_code::adapter_config,
            message(targets.layers_field, " is ", *targets.layers, ", and the adapter has factors of '", module,
                "': MLX applies those of the last ", *targets.layers, " of the ", count, " layers of ", label,
                " alone; correct ", targets.layers_field, ", or use the base that it was trained on"),
            file);
    }
    if (!used.empty()) {
        most = 0;
        for (const auto& list : used) { most = std::max(most, layers.find(list)->second); }
    }
    if (targets.layers && most > 0 && *targets.layers > most) {
        raise<format_error>(error_code::adapter_config,
            message(targets.layers_field, " is ", *targets.layers, ", and ", label, " has ", most,
                " layers: use the base that it was trained on, or correct ", targets.layers_field, " (-1 is all)"),
            file);
    }
    if (!targets.keys) { return; }
    for (const auto& key : *targets.keys) {
        const auto named = [&](const std::string& module) { return detail::mlx_targets::names(key, module); };
        if (std::any_of(modules.begin(), modules.end(), named)) { continue; }
        if (std::any_of(
                match.tensors.begin(), match.tensors.end(), [&](const auto& one) { return named(one.first); })) {
            continue;
        }
        for (const auto& [name, tensor] : base) {
            if (!name.ends_with(suffix)) { continue; }
            const auto module = name.substr(0, name.size() - suffix.size());
            const auto place = detail::place_in_layers(module);
            const bool other_list = place.number && !used.empty() && !used.contains(place.list);
            const bool early =
                place.number && targets.layers && *place.number < layers.find(place.list)->second - *targets.layers;
            if (!named(module) || ((other_list || early) && key != module)) { continue; }
            raise<format_error>(error_code::adapter_config,
                message("lora_parameters.keys names '", key, "', which ", label, " has as '", module,
                    "', and the adapter has no factors of any: fetch or save it anew, or take the name out of keys"),
                file);
        }
    }
}

namespace detail {

/// The sides of a kernel without those of 1 at its end, which layers of fewer dimensions do not have.
[[nodiscard]] inline extents kernel_of(extents sides)
{
    while (!sides.empty() && sides.back() == 1) { sides.pop_back(); }
    return sides;
}
/// Refuses factors of a convolution on a weight with another kernel, though it has as many entries. LoHa and LoKr may
/// be stored flat, and then say nothing of a kernel.
template <arithmetic_element T>
void check_kernel(const adapted_module<T>& made, const const_tensor_ref& to, const std::string& tensor,
    const std::string& module, const std::string& label)
{
    const bool flat = made.kernel.empty() && (made.kind == "LoHa" || made.kind == "LoKr");
    const extents there = to.shape.size() > 2 ? kernel_of(extents(to.shape.begin() + 2, to.shape.end())) : extents{},
                  mine = kernel_of(made.kernel);
    if (flat || made.embedding || mine == there) { return; }
    std::int64_t cells = 1;
    for (const auto side : made.kernel) { cells *= side; }
    extents shape{static_cast<std::int64_t>(made.update.out()),
        cells == 0 ? 0 : static_cast<std::int64_t>(made.update.in()) / cells};
    shape.insert(shape.end(), made.kernel.begin(), made.kernel.end());
    raise<shape_mismatch>(error_code::adapter_shape,
        message("tensor '", tensor, "' has shape ", to_string(to.shape), ", but the update of module '", module,
            "' in ", label, " is of shape ", to_string(shape), made.kernel.empty() ? ", a linear layer's" : "",
            ": this adapter belongs to another base"));
}

} // namespace detail

/// Gives a module what its weight in a base says and the file does not: the kernel of factors that are stored flat
/// (LoHa, LoKr), which have none or one with sides of 1 at its end; and that MLX's factors are an embedding's, where
/// they fit the other way round.
template <arithmetic_element T>
void take_shape(adapted_module<T>& made, const const_tensor_ref& to, adapter_dialect dialect)
{
    const auto rank = to.shape.size();
    if (rank > 2) {
        const extents kernel(to.shape.begin() + 2, to.shape.end());
        const bool flat = made.kernel.empty() && (made.kind == "LoHa" || made.kind == "LoKr");
        if (flat || detail::kernel_of(made.kernel) == detail::kernel_of(kernel)) { made.kernel = kernel; }
    }
    if (dialect == adapter_dialect::mlx && rank == 2 && to.shape[0] != to.shape[1]) {
        made.embedding = made.embedding
            || (static_cast<std::size_t>(to.shape[0]) == made.update.in()
                && static_cast<std::size_t>(to.shape[1]) == made.update.out());
    }
}

/// What check_shape() is told of a module and its weight.
struct shape_check {
    const std::string& tensor; ///< the weight's name, for messages
    const std::string& module; ///< the module's
    const std::string& label; ///< the adapter's
    std::size_t blocks = 1; ///< how many modules the weight is, one below the other
    bool may_grow = false; ///< the update may have more rows, of tokens that were added
};
/// Throws shape_mismatch for a module that is not of the shape of its weight in a base, either way round, or of another
/// kernel. Of weights that are packed, and so of no shape of their own, nothing is said.
///
///     check_shape(made, *base.find(tensor), {.tensor = tensor, .module = module, .label = adapter.label});
template <arithmetic_element T>
void check_shape(const adapted_module<T>& made, const const_tensor_ref& to, const shape_check& of)
{
    if (!is_storage(to.dtype) && !is_fp8(to.dtype)) { return; }
    detail::check_kernel(made, to, of.tensor, of.module, of.label);
    const auto sides = adapted_model::sides(to.shape, to.size(of.tensor));
    const std::size_t rows = sides.first / std::max<std::size_t>(of.blocks, 1), columns = sides.second,
                      out = made.update.out(), in = made.update.in();
    const bool fits = columns == in && (rows == out || (of.may_grow && rows < out)),
               turned = to.shape.size() == 2 && columns == out && (rows == in || (of.may_grow && rows < in));
    if (fits || turned) { return; }
    raise<shape_mismatch>(error_code::adapter_shape,
        message("tensor '", of.tensor, "' has shape ", to_string(to.shape), ", and the update of module '", of.module,
            "' in ", of.label, " is ", out, "×", in, ": this adapter belongs to another base"));
}

/// A module's name in its model, with the component that `module` names, as diffusers calls it, before it; none where
/// that names none.
[[nodiscard]] inline std::string with_component_of(std::string_view module, const std::string& name)
{
    const auto own = detail::component_of(module),
               component = own.empty() ? detail::kohya_component_of(module).diffusers : own;
    return component.empty() ? name : std::string(component) + "." + name;
}

/// What add_adapter() is told of a base.
struct adapter_base_traits {
    bool conv1d = false; ///< square weights lie in×out (GPT-2's Conv1D), but for heads and embeddings
    bool holds_adapter = false; ///< the adapter is in it: copies of weights that come with that are those of before
    std::string_view label = "the base"; ///< names it in messages
    std::string_view renaming{}; ///< a caller's word for what gives modules other names, for messages: such as a flag
};

namespace detail {

/// How the adapted weights of a base that are not square lie: some out×in, some in×out.
struct weight_orders {
    bool plain = false, turned = false;
};
template <arithmetic_element T>
[[nodiscard]] weight_orders orders_of_adapted(
    const const_model_ref& base, const adapter_contents<T>& adapter, const module_match& match)
{
    weight_orders found;
    for (const auto& [module, made] : adapter.modules) {
        const auto place = match.tensors.find(module);
        if (place == match.tensors.end() || made.embedding || made.update.out() == made.update.in()) { continue; }
        const const_tensor_ref& to = *base.find(place->second);
        if (to.shape.size() != 2) { continue; }
        const auto [rows, columns] = adapted_model::sides(to.shape, to.size(place->second));
        found.plain = found.plain || (rows == made.update.out() && columns == made.update.in());
        found.turned = found.turned || (rows == made.update.in() && columns == made.update.out());
    }
    return found;
}

} // namespace detail

/// Whether an adapter that says fan_in_fan_out is of a base whose linear layers lie out×in, as its modules that are not
/// square tell: PEFT takes the flag for false then.
template <arithmetic_element T>
[[nodiscard]] bool denies_fan_in_fan_out(
    const const_model_ref& base, const adapter_contents<T>& adapter, const module_match& match)
{
    const auto found = detail::orders_of_adapted(base, adapter, match);
    return adapter.fan_in_fan_out && found.plain && !found.turned;
}
/// Whether weights of a base show that its linear layers lie in×out (Conv1D): those that an adapter changes and are not
/// square, or, where all are square, those of the base that are not and whose biases have an entry for each column.
template <arithmetic_element T>
[[nodiscard]] bool shows_in_by_out(
    const const_model_ref& base, const adapter_contents<T>& adapter, const module_match& match)
{
    auto found = detail::orders_of_adapted(base, adapter, match);
    if (found.plain || found.turned) { return found.turned; }
    constexpr std::string_view ending = "weight";
    for (const auto& [name, tensor] : base) {
        if (tensor.shape.size() != 2 || tensor.shape[0] == tensor.shape[1] || !name.ends_with(".weight")) { continue; }
        const auto* const bias = base.find(name.substr(0, name.size() - ending.size()) + "bias");
        if (!bias || bias->shape.size() != 1) { continue; }
        found.plain = found.plain || bias->shape[0] == tensor.shape[0];
        found.turned = found.turned || bias->shape[0] == tensor.shape[1];
    }
    return found.turned && !found.plain;
}

namespace detail {

/// Whether PEFT takes the matrices of a stack of experts for in×out, as those of gpt-oss lie, by the shapes of
/// gate_up_proj and down_proj beside one another; nothing where they do not tell. Llama 4's (feed_forward.experts) lie
/// so too, and transformers does not say it of them: PEFT takes their columns for inputs.
[[nodiscard]] inline std::optional<bool> experts_lie_in_by_out(const const_model_ref& base, const std::string& tensor)
{
    const auto owner = tensor.substr(0, tensor.rfind('.') + 1);
    if (("." + owner).ends_with(".feed_forward.experts.")) { return false; }
    const auto *const both = base.find(owner + "gate_up_proj"), *const down = base.find(owner + "down_proj");
    if (!both || !down || both->shape.size() != 3 || down->shape.size() != 3) { return std::nullopt; }
    const bool plain = both->shape[2] == down->shape[1] && both->shape[1] == 2 * down->shape[2],
               turned = both->shape[1] == down->shape[2] && both->shape[2] == 2 * down->shape[1];
    return plain == turned ? std::nullopt : std::optional(turned);
}
/// How an expert's update belongs to the parameter that it is part of.
template <arithmetic_element T>
[[nodiscard]] update_place place_of_expert(
    const adapted_module<T>& made, const const_model_ref& base, const std::string& tensor, const std::string& label)
{
    update_place place;
    const const_tensor_ref& to = *base.find(tensor);
    const bool stack = to.shape.size() == 3;
    if (stack || made.slice.count > 1) {
        place.slice = made.slice.index;
        place.slices = made.slice.count;
    }
    if (to.shape.size() < 2) { return place; }
    const auto rows = static_cast<std::size_t>(to.shape[to.shape.size() - 2]),
               columns = static_cast<std::size_t>(to.shape[to.shape.size() - 1]);
    const bool fits = rows == made.update.out() && columns == made.update.in(),
               turned = rows == made.update.in() && columns == made.update.out();
    if (!fits || !turned) {
        place.transposed = turned;
        return place;
    }
    const auto lies = experts_lie_in_by_out(base, tensor);
    if (stack && !lies) {
        raise<shape_mismatch>(error_code::adapter_shape,
            message("tensor '", tensor, "' has shape ", to_string(to.shape), ", and nothing says whether ", label,
                " changes its matrices as they lie or transposed: ", fold_with_peft));
    }
    place.transposed = lies.value_or(false);
    return place;
}

} // namespace detail

/// What messages say behind "use the base that it was trained on" of a module that no base's is: models of images have
/// other names, and other tensors, in single files and in diffusers. Empty for other models' modules.
///
///     form_of_base("lora_unet_double_blocks_0_img_attn_qkv") // ", in the form whose names …"
[[nodiscard]] inline std::string_view form_of_base(std::string_view module) noexcept
{
    const bool of_images = !detail::kohya_component_of(module).prefix.empty()
        || module.starts_with(detail::single_file_unet) || module.starts_with(detail::comfyui_unet);
    return of_images ? ", in the form whose names it has (a single file, or diffusers')" : "";
}

/// Adds weight·(what an adapter does) to `sum`, which refers to the adapter from then on. Where a weight is not square
/// its shape says whether it lies in×out; a square one does where the adapter (fan_in_fan_out) or `traits` say so, and
/// others do not deny it.
/// Throws invalid_argument for modules that `match` has no tensor for, two that have the same, or a copy of a base
/// weight that is another base's; shape_mismatch, for convolutions of another kernel too; nonfinite_error.
template <arithmetic_element T>
void add_adapter(adapted_model& sum, const const_model_ref& base, const adapter_contents<T>& adapter,
    const module_match& match, double weight = 1, const adapter_base_traits& traits = {})
{
    if (!match.unmatched.empty()) {
        const auto& module = match.unmatched.front();
        const auto doubt = match.doubtful.find(module);
        raise<invalid_argument>(error_code::tensor_unexpected,
            message("module '", module, "' of ", adapter.label,
                doubt != match.doubtful.end() && doubt->second.size() > 1
                    ? message(" may mean '", doubt->second[0], "' or '", doubt->second[1], "' of ", traits.label)
                    : message(" is no module of ", traits.label),
                match.unmatched.size() > 1 ? message(", nor are ", match.unmatched.size() - 1, " others clear") : "",
                base.find(module + ".in_proj_weight")
                    ? message(", but one of PyTorch's MultiheadAttention, whose three projections are one tensor: ",
                          detail::fold_with_peft)
                    : message(": use the base that it was trained on", form_of_base(module), ", ",
                          traits.renaming.empty() ? ""
                                                  : message("say what it is called there (", traits.renaming, "), "),
                          "or leave such modules out")));
    }
    const bool in_by_out = adapter.fan_in_fan_out && !denies_fan_in_fan_out(base, adapter, match);
    std::map<std::string, std::string> taken; // modules, by the tensors that they mean
    for (const auto& [module, made] : adapter.modules) {
        if (made.paired_rows) {
            raise<invalid_argument>(error_code::call_order,
                message("module '", module, "' of ", adapter.label,
                    " has its rows in the order of llama.cpp: unpair_rows() first"));
        }
        const std::string& tensor = match.tensors.at(module);
        const bool expert = !made.slice.parameter.empty();
        const auto known = match.diffusion.find(module);
        const auto diffusion = known == match.diffusion.end() ? diffusion_module() : known->second;
        const auto which = expert  ? tensor + "[" + std::to_string(made.slice.index) + "]"
            : diffusion.blocks > 1 ? tensor + "[" + std::to_string(diffusion.block) + "]"
                                   : tensor;
        if (const auto [other, fresh] = taken.emplace(which, module); !fresh) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message("modules '", other->second, "' and '", module, "' of ", adapter.label, " may both mean '",
                    tensor, "' of ", traits.label,
                    ": leave out the one that is another model's (of another component)"));
        }
        if (expert) {
            sum.add(base, tensor, made.update, weight, detail::place_of_expert(made, base, tensor, adapter.label),
                adapter.label);
            continue;
        }
        const const_tensor_ref& to = *base.find(tensor);
        detail::check_kernel(made, to, tensor, module, adapter.label);
        update_place place;
        place.magnitude = made.magnitude;
        if (diffusion.blocks > 1) {
            if (made.bias.rank() > 0) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message("module '", module, "' of ", adapter.label, " has a bias of its own (lora_bias), and '",
                        tensor, "' of ", traits.label,
                        " is several modules' weight, whose biases are one tensor: fold it with PEFT, into the "
                        "model as diffusers has it"));
            }
            place.slice = diffusion.block;
            place.slices = diffusion.blocks;
            place.row_blocks = true;
            sum.add(base, tensor, made.update, weight, std::move(place), adapter.label);
            continue;
        }
        const auto [rows, columns] = adapted_model::sides(to.shape, to.size(tensor));
        const bool fits = rows == made.update.out() && columns == made.update.in(),
                   turned = to.shape.size() == 2 && rows == made.update.in() && columns == made.update.out();
        const bool head =
            tensor.ends_with("head.weight") || tensor.ends_with("wte.weight") || tensor.ends_with("wpe.weight");
        place.transposed =
            made.embedding || diffusion.transposed || (turned && (!fits || ((in_by_out || traits.conv1d) && !head)));
        sum.add(base, tensor, made.update, weight, std::move(place), adapter.label);
        if (made.bias.rank() > 0) {
            const std::string bias = tensor.substr(0, tensor.size() - 6) + "bias";
            if (!base.find(bias)) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message("module '", module, "' of ", adapter.label, " has a bias of its own (lora_bias), and ",
                        traits.label, " has no '", bias,
                        "' to add it to: fold it with PEFT, which adds the layer's bias"));
            }
            sum.add(base, bias, made.bias, weight, {}, adapter.label);
        }
    }
    for (const auto& [name, stored] : adapter.copies) {
        const auto tensor = match.renamed(name, base);
        const const_tensor_ref* const there = base.find(tensor);
        if (there && !traits.holds_adapter && there->dtype == stored.dtype
            && (there->shape != stored.shape
                || std::memcmp(there->data, stored.bytes.data(), stored.bytes.size()) != 0)) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message(adapter.label, " carries a copy of the weight '", tensor,
                    "' that it was trained on, which is not that of ", traits.label,
                    ": use the base that it was trained on"));
        }
    }
    for (const auto& [name, stored] : adapter.wholes) {
        sum.replace(base, match.renamed(name, base),
            const_tensor_ref{stored.bytes.data(), stored.dtype, stored.shape, {}, memory_space::host, 0}, weight,
            adapter.label);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
