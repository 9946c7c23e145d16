// Stable Diffusion's two namings of one model: diffusers' folders, and single files (LDM, A1111, ComfyUI).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A module of Stable Diffusion (1.x, 2.x, XL), and the tensor of a base that is its weight.
struct diffusion_module {
    std::string component{}; ///< its model, as diffusers calls that: "unet", "text_encoder", "text_encoder_2"
    std::string diffusers{}; ///< its name there: "down_blocks.0.attentions.0.proj_in"; empty: not known
    std::string ldm{}; ///< in single files, behind the model's prefix: "input_blocks.1.1.proj_in"; empty: not known
    std::string tensor{}; ///< of the base
    std::size_t block = 0; ///< of the rows of the tensor, where several modules are one: which block is this one's
    std::size_t blocks = 1; ///< and how many there are: 3 of a fused in_proj_weight
    bool transposed = false; ///< the tensor is in×out
    bool single_file = false; ///< the base has the name `ldm`
    std::string called{}; ///< of what find() gives: the name that was asked for, without its component, with dots
    bool translated = false; ///< of what find() gives: that is a name of the other kind than the base's
};

/// The modules of Stable Diffusion in a base, by the names of both kinds: a UNet under diffusers' names or those of
/// single files, the text encoders of single files (CLIP's under transformers' names, OpenCLIP's under its own, whose
/// q, k and v are one tensor). Everything follows from one table of stems; the blocks' numbers from how many residual
/// blocks a level has (2 in Stable Diffusion), which the base's names tell. Empty for other bases, and for UNets whose
/// blocks no such number tells.
///
///     const diffusion_names names(checkpoint.model());
///     names.find("lora_unet_down_blocks_0_attentions_0_proj_in", adapter_dialect::kohya); // input_blocks.1.1.proj_in
class diffusion_names {
public:
    diffusion_names() = default;
    /// Refers to nothing of the base afterwards.
    explicit diffusion_names(const const_model_ref& base);

    [[nodiscard]] bool empty() const noexcept { return modules_.empty(); }
    /// The modules that a name of an adapter may mean: of the component that it names, or of any where it names none.
    [[nodiscard]] std::vector<diffusion_module> find(std::string_view module, adapter_dialect dialect) const;
    /// Whether find() knows all that a name can mean: it names a component of Stable Diffusion, and the base is a
    /// single file, which holds all of them.
    [[nodiscard]] bool decides(std::string_view module, adapter_dialect dialect) const;
    /// The base's tensor that a name with dots and a last word means ("unet.conv_in.bias"); empty: none, several, or
    /// only a part of one.
    [[nodiscard]] std::string tensor_called(std::string_view name) const;

private:
    void add(diffusion_module module);
    void add_unet(const const_model_ref& base, bool single_file);
    void add_text_encoders(const const_model_ref& base);

    std::vector<diffusion_module> modules_{};
    std::multimap<std::string, std::pair<std::size_t, std::string>, std::less<>> dotted_{},
        underscored_{}; ///< places in modules_ and names, by component and name
    bool single_file_ = false;
};

namespace detail {

/// What the two kinds of names call a part of a UNet.
struct unet_stem {
    enum what { layer, residual, attention } kind = layer; ///< a module itself, or a block of some
    std::string diffusers{}, ldm{};
};
/// A pair of names, diffusers' first.
using name_pair = std::pair<std::string_view, std::string_view>;

/// The layers before and behind the blocks.
inline constexpr std::array<name_pair, 7> unet_layers{
    {{"conv_in", "input_blocks.0.0"}, {"time_embedding.linear_1", "time_embed.0"},
        {"time_embedding.linear_2", "time_embed.2"}, {"add_embedding.linear_1", "label_emb.0.0"},
        {"add_embedding.linear_2", "label_emb.0.2"}, {"conv_norm_out", "out.0"}, {"conv_out", "out.2"}}};
/// The layers of a residual block.
inline constexpr std::array<name_pair, 6> residual_layers{
    {{"norm1", "in_layers.0"}, {"conv1", "in_layers.2"}, {"time_emb_proj", "emb_layers.1"}, {"norm2", "out_layers.0"},
        {"conv2", "out_layers.3"}, {"conv_shortcut", "skip_connection"}}};
/// The layers of a block of OpenCLIP's text encoder that have a tensor each, and those around the blocks.
inline constexpr std::array<name_pair, 5> open_clip_layers{{{"layer_norm1", "ln_1"}, {"layer_norm2", "ln_2"},
    {"mlp.fc1", "mlp.c_fc"}, {"mlp.fc2", "mlp.c_proj"}, {"self_attn.out_proj", "attn.out_proj"}}};
inline constexpr std::array<name_pair, 2> open_clip_ends{
    {{"text_model.embeddings.token_embedding", "token_embedding"}, {"text_model.final_layer_norm", "ln_final"}}};

/// Where single files keep text encoders.
struct text_encoder_place {
    std::string_view prefix{}, component{};
    bool open_clip = false;
};
inline constexpr std::array<text_encoder_place, 5> text_encoder_places{
    {{"cond_stage_model.transformer.", "text_encoder", false},
        {"conditioner.embedders.0.transformer.", "text_encoder", false},
        {"cond_stage_model.model.", "text_encoder", true}, {"conditioner.embedders.0.model.", "text_encoder_2", true},
        {"conditioner.embedders.1.model.", "text_encoder_2", true}}};
inline constexpr std::string_view single_file_unet = "model.diffusion_model.";
/// What ComfyUI puts before its modules in adapters.
inline constexpr std::string_view comfyui_unet = "diffusion_model.";

[[nodiscard]] inline std::vector<std::string_view> segments_of(std::string_view name)
{
    std::vector<std::string_view> segments;
    for (std::size_t at = 0; at <= name.size();) {
        const auto end = std::min(name.find('.', at), name.size());
        segments.push_back(name.substr(at, end - at));
        at = end + 1;
    }
    return segments;
}
/// A segment that is the number of a block.
[[nodiscard]] inline std::optional<std::size_t> block_number(std::string_view segment)
{
    std::size_t number = 0;
    const auto [end, problem] = std::from_chars(segment.data(), segment.data() + segment.size(), number);
    const bool all = problem == std::errc() && end == segment.data() + segment.size();
    return all && number < 64 ? std::optional(number) : std::nullopt;
}

/// What stands before all names of a base's UNet; nothing: it has none under such names, or several.
[[nodiscard]] inline std::optional<std::string> unet_prefix(const const_model_ref& base, bool single_file)
{
    using list = std::array<std::string_view, 3>;
    constexpr list of_ldm{"input_blocks.", "middle_block.", "output_blocks."},
        of_diffusers{"down_blocks.", "mid_block.", "up_blocks."};
    std::set<std::string, std::less<>> found;
    for (const auto& [name, tensor] : base) {
        for (const auto part : single_file ? of_ldm : of_diffusers) {
            const auto at = name.find(part);
            if (at == name.npos || (at > 0 && name[at - 1] != '.')) { continue; }
            const auto before = name.substr(0, at);
            // Autoencoders have such blocks too, and ControlNets are another model.
            const bool other = before.ends_with("encoder.") || before.ends_with("decoder.")
                || before.ends_with("control_model.") || before.ends_with("controlnet.");
            if (!other) { found.insert(before); }
            break;
        }
    }
    if (single_file && found.contains(single_file_unet)) { return std::string(single_file_unet); }
    return found.size() == 1 ? std::optional(*found.begin()) : std::nullopt;
}

/// How many residual blocks a level of a UNet has on the way down, by its modules' names; nothing: levels differ. Parts
/// of a model that do not tell are Stable Diffusion's.
[[nodiscard]] inline std::optional<std::size_t> unet_depth(
    const std::set<std::string, std::less<>>& modules, bool single_file)
{
    constexpr std::size_t usual = 2;
    if (single_file) {
        std::size_t period = 0;
        for (const auto& name : modules) { // of the convolutions between levels
            const auto parts = segments_of(name);
            if (parts.size() != 4 || parts[0] != "input_blocks" || parts[3] != "op") { continue; }
            const auto number = block_number(parts[1]);
            if (number && (period == 0 || *number < period)) { period = *number; }
        }
        const bool whole = modules.contains("input_blocks.0.0") && modules.contains("out.2");
        if (!whole || period == 0) { period = usual + 1; }
        const bool regular = std::all_of(modules.begin(), modules.end(), [&](const auto& name) {
            const auto parts = segments_of(name);
            if (parts.size() != 4 || parts[0] != "input_blocks" || parts[3] != "op") { return true; }
            const auto number = block_number(parts[1]);
            return number && *number % period == 0;
        });
        return regular && period > 1 ? std::optional(period - 1) : std::nullopt;
    }
    std::map<std::size_t, std::size_t> down, up; // blocks, by level
    for (const auto& name : modules) {
        const auto parts = segments_of(name);
        if (parts.size() < 4 || (parts[2] != "resnets" && parts[2] != "attentions")) { continue; }
        const auto level = block_number(parts[1]), block = block_number(parts[3]);
        if (!level || !block || (parts[0] != "down_blocks" && parts[0] != "up_blocks")) { continue; }
        auto& count = (parts[0] == "down_blocks" ? down : up)[*level];
        count = std::max(count, *block + 1);
    }
    if (modules.contains("conv_in") && modules.contains("conv_out") && !down.empty()) {
        const auto depth = down.begin()->second;
        const auto all = [](const auto& levels, std::size_t count) {
            return std::all_of(levels.begin(), levels.end(), [&](const auto& one) { return one.second == count; });
        };
        return all(down, depth) && all(up, depth + 1) ? std::optional(depth) : std::nullopt;
    }
    const auto within = [](const auto& levels, std::size_t count) {
        return std::all_of(levels.begin(), levels.end(), [&](const auto& one) { return one.second <= count; });
    };
    return within(down, usual) && within(up, usual + 1) ? std::optional(usual) : std::nullopt;
}

/// The table: what both call the parts of a UNet of `depth` residual blocks a level. `upsampled_behind_attention` says
/// of a level on the way up whether it has attention, behind which single files count its upsampler.
template <class Call>
[[nodiscard]] std::vector<unet_stem> unet_stems(
    std::size_t depth, std::size_t levels, const Call& upsampled_behind_attention)
{
    std::vector<unet_stem> stems;
    const auto add = [&](unet_stem::what kind, std::string diffusers, std::string ldm) {
        stems.push_back({kind, std::move(diffusers), std::move(ldm)});
    };
    const auto text = [](std::size_t number) { return std::to_string(number); };
    for (const auto& [diffusers, ldm] : unet_layers) {
        add(unet_stem::layer, std::string(diffusers), std::string(ldm));
    }
    add(unet_stem::residual, "mid_block.resnets.0", "middle_block.0");
    add(unet_stem::attention, "mid_block.attentions.0", "middle_block.1");
    add(unet_stem::residual, "mid_block.resnets.1", "middle_block.2");
    for (std::size_t level = 0; level < levels; ++level) {
        const std::size_t first = level * (depth + 1);
        const auto down = "down_blocks." + text(level), up = "up_blocks." + text(level);
        const auto in = [&](std::size_t block) { return "input_blocks." + text(first + 1 + block); };
        const auto out = [&](std::size_t block) { return "output_blocks." + text(first + block); };
        for (std::size_t block = 0; block < depth; ++block) {
            add(unet_stem::residual, down + ".resnets." + text(block), in(block) + ".0");
            add(unet_stem::attention, down + ".attentions." + text(block), in(block) + ".1");
        }
        add(unet_stem::layer, down + ".downsamplers.0.conv", in(depth) + ".0.op");
        for (std::size_t block = 0; block <= depth; ++block) {
            add(unet_stem::residual, up + ".resnets." + text(block), out(block) + ".0");
            add(unet_stem::attention, up + ".attentions." + text(block), out(block) + ".1");
        }
        const bool behind = upsampled_behind_attention(up, out(depth));
        add(unet_stem::layer, up + ".upsamplers.0.conv", out(depth) + (behind ? ".2" : ".1") + ".conv");
    }
    return stems;
}

/// A module's name of one kind as that of the other; empty: the table has no row for it. `stems` by the names of the
/// first kind.
[[nodiscard]] inline std::string translated_module(
    const std::map<std::string, unet_stem, std::less<>>& stems, const std::string& module, bool from_ldm)
{
    for (auto at = module.size();; at = module.rfind('.', at - 1)) { // the longest stem first
        const auto stem = stems.find(std::string_view(module).substr(0, at));
        if (stem != stems.end()) {
            const auto rest = at == module.size() ? std::string() : module.substr(at + 1);
            const auto& to = from_ldm ? stem->second.diffusers : stem->second.ldm;
            switch (stem->second.kind) {
            case unet_stem::layer: return rest.empty() ? to : "";
            case unet_stem::attention: return rest.empty() ? "" : to + "." + rest;
            default:
                for (const auto& [diffusers, ldm] : residual_layers) {
                    if (rest == (from_ldm ? ldm : diffusers)) {
                        return to + "." + std::string(from_ldm ? diffusers : ldm);
                    }
                }
                return "";
            }
        }
        if (at == 0 || module.rfind('.', at - 1) == module.npos) { return ""; }
    }
}

/// The component that an adapter's name of a module names, and the rest of it.
struct component_name {
    std::string_view component{}, module{};
};
[[nodiscard]] inline component_name split_component(std::string_view module, adapter_dialect dialect)
{
    for (const std::string_view prefix : {single_file_unet, comfyui_unet}) {
        if (module.size() > prefix.size() && module.starts_with(prefix)) {
            return {"unet", module.substr(prefix.size())};
        }
    }
    if (dialect == adapter_dialect::kohya) {
        const auto named = kohya_component_of(module);
        return {named.diffusers, module.substr(named.prefix.size())};
    }
    const auto component = component_of(module);
    return {component, component.empty() ? module : module.substr(component.size() + 1)};
}
/// The models of Stable Diffusion's pipelines that adapters change.
inline constexpr std::array<std::string_view, 3> diffusion_components{"unet", "text_encoder", "text_encoder_2"};

} // namespace detail

inline diffusion_names::diffusion_names(const const_model_ref& base)
{
    add_unet(base, true);
    if (modules_.empty()) { add_unet(base, false); }
    add_text_encoders(base);
}

inline void diffusion_names::add(diffusion_module module)
{
    std::vector<std::string> names;
    const auto name = [&](std::string one) {
        if (!one.empty() && std::find(names.begin(), names.end(), one) == names.end()) {
            names.push_back(std::move(one));
        }
    };
    name(module.diffusers);
    name(module.ldm);
    if (module.component != "unet") { // versions of transformers differ in whether this stands before them
        constexpr std::string_view wrapper = "text_model.";
        const auto own = module.diffusers;
        name(own.starts_with(wrapper) ? own.substr(wrapper.size()) : std::string(wrapper) + own);
    }
    for (auto& one : names) {
        auto key = module.component + ":" + one;
        auto flat = key;
        std::replace(flat.begin() + static_cast<std::ptrdiff_t>(module.component.size()), flat.end(), '.', '_');
        underscored_.emplace(std::move(flat), std::pair(modules_.size(), one));
        dotted_.emplace(std::move(key), std::pair(modules_.size(), one));
    }
    modules_.push_back(std::move(module));
}

inline void diffusion_names::add_unet(const const_model_ref& base, bool single_file)
{
    constexpr std::string_view suffix = ".weight";
    const auto prefix = detail::unet_prefix(base, single_file);
    if (!prefix) { return; }
    std::set<std::string, std::less<>> modules;
    for (const auto& [name, tensor] : base) {
        if (!name.starts_with(*prefix) || !name.ends_with(suffix) || name.size() <= prefix->size() + suffix.size()) {
            continue;
        }
        modules.insert(name.substr(prefix->size(), name.size() - prefix->size() - suffix.size()));
    }
    const auto depth = detail::unet_depth(modules, single_file);
    if (!depth) { return; }
    const auto begins = [&](const std::string& stem) {
        const auto place = modules.lower_bound(stem);
        return place != modules.end() && place->starts_with(stem);
    };
    const auto table = detail::unet_stems(*depth, 16, [&](const std::string& up, const std::string& out) {
        return single_file ? modules.contains(out + ".2.conv") : begins(up + ".attentions.");
    });
    std::map<std::string, detail::unet_stem, std::less<>> stems;
    for (const auto& stem : table) { stems.emplace(single_file ? stem.ldm : stem.diffusers, stem); }
    for (const auto& module : modules) {
        auto other = detail::translated_module(stems, module, single_file);
        diffusion_module made;
        made.component = "unet";
        made.diffusers = single_file ? other : module;
        made.ldm = single_file ? module : other;
        made.tensor = *prefix + module + std::string(suffix);
        made.single_file = single_file;
        add(std::move(made));
    }
    single_file_ = single_file && *prefix == detail::single_file_unet;
}

inline void diffusion_names::add_text_encoders(const const_model_ref& base)
{
    constexpr std::string_view suffix = ".weight", blocks = "transformer.resblocks.",
                               layers = "text_model.encoder.layers.";
    for (const auto& [name, tensor] : base) {
        for (const auto& place : detail::text_encoder_places) {
            if (!name.starts_with(place.prefix)) { continue; }
            const auto own = name.substr(place.prefix.size());
            diffusion_module made;
            made.component = place.component;
            made.tensor = name;
            made.single_file = true;
            const bool weight = own.ends_with(suffix) && own.size() > suffix.size();
            made.ldm = weight ? own.substr(0, own.size() - suffix.size()) : own;
            if (!place.open_clip) {
                if (!weight) { continue; }
                made.diffusers = made.ldm;
                add(std::move(made));
                continue;
            }
            if (own == "positional_embedding") {
                made.diffusers = "text_model.embeddings.position_embedding";
                add(std::move(made));
                continue;
            }
            if (own == "text_projection") { // a matrix that is multiplied from the right
                made.diffusers = own;
                made.transposed = true;
                add(std::move(made));
                continue;
            }
            for (const auto& [diffusers, ldm] : detail::open_clip_ends) {
                if (weight && made.ldm == ldm) { made.diffusers = diffusers; }
            }
            const auto dot = own.starts_with(blocks) ? own.find('.', blocks.size()) : own.npos;
            if (dot != own.npos) {
                const auto layer = std::string(layers) + own.substr(blocks.size(), dot - blocks.size()) + ".";
                const auto within = std::string_view(made.ldm).substr(dot + 1);
                if (within == "attn.in_proj_weight") {
                    constexpr std::array<std::string_view, 3> fused{"q_proj", "k_proj", "v_proj"};
                    made.blocks = fused.size();
                    made.ldm.clear();
                    for (std::size_t i = 0; i < fused.size(); ++i) {
                        made.diffusers = layer + "self_attn." + std::string(fused[i]);
                        made.block = i;
                        add(made);
                    }
                    continue;
                }
                for (const auto& [diffusers, ldm] : detail::open_clip_layers) {
                    if (weight && within == ldm) { made.diffusers = layer + std::string(diffusers); }
                }
            }
            if (!made.diffusers.empty()) { add(std::move(made)); }
        }
    }
}

inline std::vector<diffusion_module> diffusion_names::find(std::string_view module, adapter_dialect dialect) const
{
    std::vector<diffusion_module> found;
    if (modules_.empty()) { return found; }
    const bool flat = dialect == adapter_dialect::kohya;
    const auto named = detail::split_component(module, dialect);
    std::vector<std::string> names{std::string(named.module)};
    if (const auto at = names[0].find(".processor."); at != std::string::npos) { names[0].erase(at, 10); }
    if (names[0].ends_with(".to_out")) { names.push_back(names[0] + ".0"); } // the list that it is, by its first
    std::set<std::size_t> places;
    for (const auto component : detail::diffusion_components) {
        if (!named.component.empty() && component != named.component) { continue; }
        for (auto name : names) {
            if (flat) { std::replace(name.begin(), name.end(), '.', '_'); }
            const auto& known = flat ? underscored_ : dotted_;
            const auto [first, last] = known.equal_range(std::string(component) + ":" + name);
            for (auto place = first; place != last; ++place) {
                const auto& [index, called] = place->second;
                if (!places.insert(index).second) { continue; }
                auto made = modules_[index];
                made.called = called;
                made.translated =
                    made.diffusers != made.ldm && called != (made.single_file ? made.ldm : made.diffusers);
                found.push_back(std::move(made));
            }
        }
    }
    return found;
}

inline bool diffusion_names::decides(std::string_view module, adapter_dialect dialect) const
{
    const auto component = detail::split_component(module, dialect).component;
    const auto& known = detail::diffusion_components;
    return single_file_ && std::find(known.begin(), known.end(), component) != known.end();
}

inline std::string diffusion_names::tensor_called(std::string_view name) const
{
    const auto dot = name.rfind('.');
    if (modules_.empty() || dot == name.npos) { return ""; }
    constexpr std::string_view suffix = "weight";
    const auto found = find(name.substr(0, dot), adapter_dialect::diffusers);
    const auto word = name.substr(dot + 1);
    if (found.size() != 1 || found[0].blocks > 1 || found[0].transposed) { return ""; }
    const auto& tensor = found[0].tensor;
    if (word == suffix) { return tensor; }
    return tensor.ends_with("." + std::string(suffix))
        ? tensor.substr(0, tensor.size() - suffix.size()) + std::string(word)
        : "";
}

} // namespace taskvec::inline TASKVEC_ABI
