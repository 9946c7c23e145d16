// Quantised layers: codes and their scales, recognised by their names, read as one tensor of numbers, and written
// again.
// SPDX-License-Identifier: Apache-2.0
//
// What is read: FP8 with scales (per tensor, per channel, in blocks; under the names of vLLM and compressed-tensors,
// DeepSeek, Mistral and ComfyUI), MXFP4 (gpt-oss, compressed-tensors) and NVFP4 (ModelOpt, compressed-tensors). What is
// only recognised: GPTQ, AWQ, Marlin, bitsandbytes, compressed-tensors' integers, HQQ, Quanto, ExLlama's, AQLM, QuIP#,
// QTIP, VPTQ, ComfyUI's other formats, and any integers beside scales.
#pragma once

#include <taskvec/core/callback.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/float_bits.hpp>
#include <taskvec/core/half.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/formats/json.hpp>
#include <taskvec/formats/quantisation_hints.hpp>
#include <taskvec/formats/quantised_tensor.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A layer that nothing here reads, or that is damaged.
struct unread_layer {
    std::string name; ///< of the layer
    std::string what; ///< "is quantised by GPTQ", "has a scale of shape …"
    std::string mend; ///< "dequantise it first …", without the way that always is: to exclude the layer
    std::vector<std::string> parts{}; ///< names of its tensors
};

/// The layers of a model that are quantised, and the model with each of them as one tensor.
///
///     const quantised_layers layers(file.model(), hints);
///     for (const auto& [name, tensor] : layers.model()) { … } // "l.weight", F32; no "l.weight_scale"
///
/// A layer whose scheme is not read, or whose tensors contradict each other (a scale of the wrong shape, NaN, negative
/// or infinite scales, a scale without its weight, FP8 without a scale where something says that there is one: other
/// layers that have it, the configuration, the index, what lies beside it), is in unread(), and its tensors stay in the
/// model as they are: whoever computes with them asks refuse_unread() first, and refuse_unscaled() where models are
/// compared. Views only. Cost: O(names), and one read of all scales.
class quantised_layers {
public:
    /// Where hints come from, asked once and only if they are needed.
    using hint_source = std::function<quantisation_hints()>;

    quantised_layers() = default;
    /// `hints` is asked at most once, and only where the model holds FP8 or packed codes.
    explicit quantised_layers(const const_model_ref& stored, hint_source hints = {})
        : stored_(&stored)
        , ask_(std::move(hints))
    {
        find_layers();
        stored_ = nullptr;
        ask_ = {};
    }
    quantised_layers(const quantised_layers&) = delete;
    quantised_layers& operator=(const quantised_layers&) = delete;

    /// Whether any layer is quantised, by a scheme that is read or not.
    [[nodiscard]] bool any() const noexcept { return !layers_.empty() || !unread_.empty(); }
    /// The model: every quantised layer is one tensor of numbers, all others are as they are. Refers to this.
    [[nodiscard]] const const_model_ref& model() const& noexcept { return model_; }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// The layers that are read.
    [[nodiscard]] const std::vector<quantised_tensor>& layers() const& noexcept { return layers_; }
    void layers() const&& = delete; // name the owner first: its views would dangle
    /// The layers that are not.
    [[nodiscard]] const std::vector<unread_layer>& unread() const noexcept { return unread_; }
    /// Tensors that are about the quantisation and belong to no one layer (`scaled_fp8`, scales of a KV cache).
    [[nodiscard]] const const_model_ref& beside() const noexcept { return beside_; }
    /// What the configuration said, where it was asked.
    [[nodiscard]] const quantisation_hints& hints() const noexcept { return hints_; }

private:
    using tensor = const const_tensor_ref*;

    [[nodiscard]] tensor find(const std::string& name) const { return stored_->find(name); }
    [[nodiscard]] static bool ends(std::string_view name, std::string_view leaf)
    {
        return name.ends_with(leaf) && (name.size() == leaf.size() || name[name.size() - leaf.size() - 1] == '.');
    }
    void need_hints()
    {
        if (ask_) { hints_ = std::exchange(ask_, {})(); }
    }
    [[nodiscard]] static std::string dequantise_first()
    {
        return "dequantise the model first (transformers' model.dequantize() and save_pretrained(), or take the "
               "weights that it was made of)";
    }
    [[nodiscard]] static std::string repair() { return "fetch the file again"; }

    void give_up(const std::string& name, const std::string& what, std::vector<std::string> parts,
        const std::string& mend = dequantise_first())
    {
        for (const auto& part : parts) { taken_.insert(part); }
        unread_.push_back({name, what, mend, std::move(parts)});
    }
    /// Those of some names that the model has, after a stem.
    [[nodiscard]] std::vector<std::string> present(
        const std::string& stem, std::initializer_list<std::string_view> leaves) const
    {
        std::vector<std::string> names;
        for (const auto leaf : leaves) {
            if (auto name = stem + std::string(leaf); find(name)) { names.push_back(std::move(name)); }
        }
        return names;
    }

    /// What a stem's own tensors have behind it (those without a dot there).
    [[nodiscard]] const std::vector<std::string>& leaves_of(const std::string& stem)
    {
        static const std::vector<std::string> none;
        if (leaves_.empty()) {
            for (const auto& [name, value] : *stored_) {
                const auto own = layer_stem(name);
                leaves_[std::string(own)].push_back(name.substr(own.size()));
            }
        }
        const auto place = leaves_.find(stem);
        return place == leaves_.end() ? none : place->second;
    }
    /// A layer's tensors: all that its stem has but a bias, or those of some names where it has no stem.
    [[nodiscard]] std::vector<std::string> whole(const std::string& stem, std::initializer_list<std::string_view> known)
    {
        if (stem.empty()) { return present(stem, known); }
        std::vector<std::string> names;
        for (const auto& leaf : leaves_of(stem)) {
            if (leaf != "bias") { names.push_back(stem + leaf); }
        }
        return names;
    }
    /// Whether a word names a scale, or what goes with one: "weight_scale_2", "qscale_weight", "scales", "absmax".
    [[nodiscard]] static bool names_scale(std::string_view word)
    {
        return word == "s" || word.ends_with("_s") || word.ends_with("amax") || word.find("scale") != word.npos
            || word.find("absmax") != word.npos || word.find("zero_point") != word.npos;
    }
    /// Whether a scale is one of inputs, outputs (`logit_scale` is a parameter) or caches, and none of weights.
    [[nodiscard]] static bool names_activations(std::string_view word)
    {
        for (const std::string_view other :
            {"k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale", "qscale_act", "logit_scale"}) {
            if (word == other) { return true; }
        }
        return word.find("input") != word.npos || word.find("output") != word.npos;
    }
    /// Whether a name is that of a scale of a tensor, or of what goes with one.
    [[nodiscard]] bool is_scale_of(const std::string& other, const std::string& name) const
    {
        const auto stem = layer_stem(name), leaf = std::string_view(name).substr(stem.size());
        if (other == name || !other.starts_with(stem)) { return false; }
        const auto word = std::string_view(other).substr(stem.size());
        if (word.starts_with(leaf) && word.size() > leaf.size() + 1 && word[leaf.size()] == '.') { // "weight.scale"
            const auto rest = word.substr(leaf.size() + 1);
            return rest.find('.') == rest.npos && names_scale(rest);
        }
        if (word.find('.') != word.npos || !names_scale(word)) { return false; }
        const bool extends = word.starts_with(leaf) && word[leaf.size()] == '_';
        for (auto at = other.find('_', stem.size() + 1); at != other.npos; at = other.find('_', at + 1)) {
            // "gate_up_proj_scale" is none of "gate", nor "bias_scale" of "weight"
            const auto owner = other.substr(0, at);
            if (owner == name || (extends && at < name.size()) || names_scale(owner.substr(stem.size()))) { continue; }
            if (find(owner)) { return false; }
        }
        if (extends || leaf == "weight") { return extends || !word.ends_with("_s"); }
        for (const std::string_view before : {"scale_", "scales_", "qscale_"}) {
            if (word.starts_with(before) && word.substr(before.size()) == leaf) { return true; }
        }
        return false;
    }
    /// The scales of a tensor, and what goes with them, by whatever names.
    [[nodiscard]] std::vector<std::string> scales_of(const std::string& name)
    {
        std::vector<std::string> names;
        for (const auto& stem : {std::string(layer_stem(name)), name + "."}) {
            for (const auto& leaf : leaves_of(stem)) {
                if (auto other = stem + leaf; is_scale_of(other, name)) { names.push_back(std::move(other)); }
            }
        }
        return names;
    }
    /// Whether a tensor holds zeros only, as zero points of what is symmetric do.
    [[nodiscard]] bool holds_zeros(const std::string& name) const
    {
        const auto points = find(name);
        const auto* const data = static_cast<const unsigned char*>(points->data);
        return data && std::all_of(data, data + points->bytes(), [](unsigned char byte) { return byte == 0; });
    }
    /// The format that ComfyUI gives for a layer, beside it or in the file's header; empty where it gives none.
    [[nodiscard]] std::string comfy_format(const std::string& stem)
    {
        if (const auto mark = find(stem + std::string(detail::comfy_mark))) {
            if (mark->dtype != dtype::u8 || !mark->data) { return "?"; }
            const auto json =
                nlohmann::json::parse(std::string(static_cast<const char*>(mark->data), mark->bytes()), nullptr, false);
            const auto format = json.is_object() ? text_under(json, "format") : std::string();
            return format.empty() || format.size() > 40 ? "?" : format;
        }
        need_hints();
        const auto place = hints_.formats.find(std::string_view(stem).substr(0, stem.empty() ? 0 : stem.size() - 1));
        return place == hints_.formats.end() ? std::string() : place->second;
    }

    void find_layers()
    {
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name)) { find_unread(name, value); }
        }
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name)) { find_fp4(name, value); }
        }
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name)) { find_integers(name, value); }
        }
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name) && is_fp8(value.dtype)) { find_fp8(name, value); }
        }
        find_leftovers();
        std::vector<const_model_ref::entry> entries;
        for (const auto& entry : *stored_) {
            if (!read_.contains(entry.name)) { entries.push_back(entry); }
        }
        for (const auto& layer : layers_) { entries.push_back({layer.layer().name, layer.tensor()}); }
        std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
        for (std::size_t i = 0; i < entries.size(); ++i) {
            if (i > 0 && entries[i].name == entries[i - 1].name) { continue; } // refused by add()
            model_.insert(entries[i].name, entries[i].tensor);
        }
    }

    void find_unread(const std::string& name, const const_tensor_ref& value)
    {
        const std::string stem(layer_stem(name));
        const auto leaf = std::string_view(name).substr(stem.size());
        const auto module = [&] { return stem.empty() ? name : stem.substr(0, stem.size() - 1); };
        const bool codes = is_integer(value.dtype);
        if (leaf == "qweight") {
            auto parts = present(stem, {"qweight", "qzeros", "scales", "g_idx"});
            const auto scales = find(stem + "scales");
            const bool wide =
                scales && scales->shape.size() == 2 && value.shape.size() == 2 && scales->shape[1] != value.shape[1];
            const bool awq = !find(stem + "g_idx") && wide;
            give_up(module(), awq ? "is quantised by AWQ" : "is quantised by GPTQ", std::move(parts));
        }
        else if ((leaf == "weight_packed" && (value.dtype != dtype::u8 || find(stem + "scale_packed")))
            || leaf == "scale_packed") {
            const bool marlin = leaf == "scale_packed" || find(stem + "scale_packed");
            give_up(module(),
                marlin ? "is quantised to integers (compressed-tensors, Marlin 2:4)"
                       : "is quantised to integers (compressed-tensors)",
                present(stem,
                    {"weight_packed", "scale_packed", "meta", "weight_shape", "weight_scale", "weight_global_scale",
                        "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale",
                        "output_scale", "output_zero_point"}));
        }
        else if (codes && (leaf == "B" || leaf == "B_24") && !present(stem, {"s", "s_channel", "s_group"}).empty()) {
            give_up(module(), "is quantised to integers (Marlin)",
                present(stem, {"B", "B_24", "B_meta", "s", "s_channel", "s_group", "workspace", "reduce_buffer"}));
        }
        else if (codes && leaf == "q_weight") {
            give_up(module(), "is quantised by ExLlamaV2",
                whole(stem, {"q_weight", "q_scale", "q_scale_max", "q_groups", "q_group_map", "q_perm", "q_invperm"}));
        }
        else if (codes && leaf == "trellis") {
            give_up(module(), find(stem + "tlut") ? "is quantised by QTIP" : "is quantised by ExLlamaV3",
                whole(
                    stem, {"trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "tlut", "SU", "SV", "rcp", "tp_rank"}));
        }
        else if (codes && leaf == "Qidxs") {
            give_up(module(), "is quantised by QuIP#",
                whole(stem, {"Qidxs", "SU", "SV", "Wscale", "codebook_id", "had_left", "had_right", "rcp"}));
        }
        else if (codes && leaf == "codes" && find(stem + "codebooks")) {
            give_up(module(), "is quantised by AQLM", whole(stem, {"codes", "codebooks", "scales"}));
        }
        else if (codes && leaf == "indices" && find(stem + "centroids.weight")) {
            auto parts =
                whole(stem, {"indices", "res_indices", "outlier_indices", "perm", "weight_scale", "weight_bias"});
            for (auto& more : present(stem, {"centroids.weight", "res_centroids.weight", "outlier_centroids.weight"})) {
                parts.push_back(std::move(more));
            }
            give_up(module(), "is quantised by VPTQ", std::move(parts));
        }
        else if (leaf == "W_q") {
            give_up(module(), "is quantised by HQQ",
                present(stem, {"W_q", "scale", "zero", "meta", "nbits", "group_size", "shape", "axis", "packing"}));
        }
        else if (name.ends_with("._data") && find(name.substr(0, name.size() - 5) + "_scale")) {
            const auto whole = name.substr(0, name.size() - 6);
            give_up(whole, "is quantised by Quanto", present(whole, {"._data", "._scale", "._shift"}));
        }
        else if (leaf == "SCB" && find(stem + "weight")) {
            give_up(stem + "weight", "is quantised to 8 bits by bitsandbytes",
                present(stem, {"weight", "SCB", "weight_format"}));
        }
        else if (name.ends_with(".absmax")) {
            const auto whole = name.substr(0, name.size() - 7);
            auto parts = present(whole, {"", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"});
            std::string kind = "4 bits";
            for (const std::string_view type : {"nf4", "fp4"}) {
                const auto state = whole + ".quant_state.bitsandbytes__" + std::string(type);
                if (find(state)) {
                    parts.push_back(state);
                    kind = type == "nf4" ? "NF4" : "FP4";
                }
            }
            give_up(whole, "is quantised to " + kind + " by bitsandbytes", std::move(parts));
        }
        else if (leaf == "weight" && (value.dtype == dtype::i8 || value.dtype == dtype::i32)
            && (find(name + "_scale") || find(name + "_scales"))) {
            give_up(name, "is quantised to integers",
                present(stem,
                    {"weight", "weight_scale", "weight_scales", "weight_zero_point", "input_scale", "input_zero_point",
                        detail::comfy_mark}));
        }
        else if (value.dtype == dtype::f8_e4m3fnuz || value.dtype == dtype::f8_e5m2fnuz) {
            if (auto parts = scales_of(name); !parts.empty()) {
                parts.insert(parts.begin(), name);
                give_up(name, message("is quantised to ", to_string(value.dtype)), std::move(parts));
            }
        }
    }

    [[nodiscard]] static bool is_integer(dtype type)
    {
        return type == dtype::i8 || type == dtype::u8 || type == dtype::i16 || type == dtype::i32 || type == dtype::i64;
    }
    /// Integers beside scales, by none of the names above.
    void find_integers(const std::string& name, const const_tensor_ref& value)
    {
        if (!is_integer(value.dtype) || value.shape.size() < 2) { return; }
        std::vector<std::string> parts{name};
        std::string scale;
        for (auto& other : scales_of(name)) {
            if (taken_.contains(other)) { continue; }
            const auto type = find(other)->dtype;
            const auto word = std::string_view(other).substr(layer_stem(name).size());
            const bool of_weights = (detail::is_scale_dtype(type) || is_fp8(type)) && !names_activations(word)
                && word.find("zero_point") == word.npos;
            if (of_weights && scale.empty()) { scale = other; }
            parts.push_back(std::move(other));
        }
        if (scale.empty()) { return; }
        for (auto& more : present(std::string(layer_stem(name)), {detail::comfy_mark})) {
            parts.push_back(std::move(more));
        }
        give_up(name,
            "is quantised to " + std::string(to_string(value.dtype)) + " with scales ('" + scale
                + "'), by no scheme that is read",
            std::move(parts));
    }

    void find_fp4(const std::string& name, const const_tensor_ref& value)
    {
        const std::string stem(layer_stem(name));
        const auto leaf = std::string_view(name).substr(stem.size());
        if (value.dtype != dtype::u8) { return; }
        constexpr std::string_view blocks = "_blocks";
        if (name.ends_with(blocks)) {
            const auto whole = name.substr(0, name.size() - blocks.size());
            const auto scales = find(whole + "_scales");
            if (scales && scales->dtype == dtype::u8) { add_mxfp4_blocks(whole, name, value, *scales); }
            else if (value.shape.size() > 2 && value.shape.back() == 16) {
                give_up(whole, "has MXFP4 codes ('" + name + "') without scales ('" + whole + "_scales', U8)", {name},
                    repair());
            }
            return;
        }
        if (leaf != "weight_packed" && leaf != "weight") { return; }
        const auto scales = find(stem + "weight_scale");
        if (!scales) {
            if (leaf == "weight_packed") {
                give_up(stem + "weight", "has packed codes without 'weight_scale'", {name}, repair());
            }
            return;
        }
        auto parts = present(stem,
            {leaf, "weight_scale", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale",
                "weight_shape", detail::comfy_mark});
        quantised_layer layer;
        layer.name = stem + "weight";
        layer.codes = value;
        layer.scales = *scales;
        const bool powers = scales->dtype == dtype::u8 || scales->dtype == dtype::f8_e8m0;
        const auto factor = find(stem + "weight_scale_2"), divisor = find(stem + "weight_global_scale");
        const auto wrong = [&](const std::string& what, const std::string& mend) {
            give_up(layer.name, what, parts, mend);
        };
        if (const auto format = comfy_format(stem); !format.empty()) { // its scales lie in another order
            return wrong("is quantised by ComfyUI as '" + format + "'", dequantise_first());
        }
        if (!powers && scales->dtype != dtype::f8_e4m3) {
            return wrong("is packed in bytes with scales of " + std::string(to_string(scales->dtype))
                    + ": neither MXFP4 nor NVFP4",
                dequantise_first());
        }
        layer.scheme = powers ? quantisation::mxfp4 : quantisation::nvfp4;
        const std::int64_t group = powers ? 32 : 16;
        if (!powers) {
            const auto global = factor ? factor : divisor;
            if (!global) {
                return wrong("has NVFP4 codes without 'weight_scale_2' or 'weight_global_scale'", repair());
            }
            if (global->dtype != dtype::f32 || global->size() != 1) {
                return wrong("has a global scale of " + std::string(to_string(global->dtype)) + " "
                        + to_string(global->shape) + "; expected one F32",
                    repair());
            }
            const float given = detail::scale_at(*global, 0);
            if (!(given > 0) || !std::isfinite(given)) {
                return wrong(message("has the global scale ", given, "; expected a positive number"), repair());
            }
            layer.factor = factor ? given : 1.0f / given;
            if (!std::isfinite(layer.factor)) {
                return wrong(message("has the global scale ", given, ", by which nothing can be divided"), repair());
            }
        }
        if (value.shape.size() < 2) {
            return wrong("has packed codes of shape " + to_string(value.shape) + "; expected [out, in / 2]", repair());
        }
        layer.shape = value.shape;
        layer.shape.back() *= 2;
        auto expected = layer.shape;
        expected.back() = (expected.back() + group - 1) / group;
        if (layer.shape.back() % group != 0) {
            return wrong("has numbers of shape " + to_string(layer.shape) + ", whose rows are no multiple of "
                    + std::to_string(group),
                repair());
        }
        if (scales->shape != expected) {
            return wrong("has scales of shape " + to_string(scales->shape) + " for numbers of shape "
                    + to_string(layer.shape) + "; expected " + to_string(expected),
                repair());
        }
        layer.block = extents(layer.shape.size(), 1);
        layer.block.back() = group;
        layer.grid = expected;
        add(std::move(layer), parts, stem);
    }

    void add_mxfp4_blocks(const std::string& whole, const std::string& name, const const_tensor_ref& value,
        const const_tensor_ref& scales)
    {
        const std::vector<std::string> parts{name, whole + "_scales"};
        const std::size_t rank = value.shape.size();
        auto expected = value.shape;
        if (rank > 0) { expected.pop_back(); }
        if (rank < 3 || rank > 4 || value.shape.back() != 16 || scales.shape != expected) {
            give_up(whole,
                "has MXFP4 codes of shape " + to_string(value.shape) + " and scales of shape " + to_string(scales.shape)
                    + "; expected [experts, out, in / 32, 16] and [experts, out, in / 32]",
                parts, repair());
            return;
        }
        quantised_layer layer;
        layer.name = whole;
        layer.scheme = quantisation::mxfp4;
        layer.codes = value;
        layer.scales = scales;
        const std::int64_t groups = value.shape[rank - 2], out = value.shape[rank - 3];
        layer.transposed = rank == 4; // experts are multiplied from the right: [experts, in, out]
        if (layer.transposed) {
            layer.shape = {value.shape[0], groups * 32, out};
            layer.block = {1, 32, 1};
            layer.grid = {value.shape[0], groups, out};
        }
        else {
            layer.shape = {out, groups * 32};
            layer.block = {1, 32};
            layer.grid = {out, groups};
        }
        add(std::move(layer), parts, std::string(layer_stem(whole)));
    }

    void find_fp8(const std::string& name, const const_tensor_ref& value)
    {
        const std::string stem(layer_stem(name));
        const auto leaf = std::string_view(name).substr(stem.size());
        if (leaf == "scaled_fp8") { return; }
        std::vector<std::string> scales = present(name, {"_scale", "_scale_inv"}), beside, unknown;
        if (leaf == "weight") { // "scale": DeepSeek's own code; "qscale_weight": Mistral's files
            for (auto& more : present(stem, {"scale_weight", "scale", "qscale_weight"})) {
                scales.push_back(std::move(more));
            }
            beside = present(stem, {"input_scale", "scale_input", "input_scale_ub", "qscale_act", detail::comfy_mark});
        }
        for (auto& more : present(name, {"_input_scale"})) { beside.push_back(std::move(more)); }
        for (auto& other : scales_of(name)) {
            const auto word = std::string_view(other).substr(stem.size());
            if (names_activations(word) || std::find(scales.begin(), scales.end(), other) != scales.end()) { continue; }
            (word.find("zero_point") != word.npos && holds_zeros(other) ? beside : unknown).push_back(std::move(other));
        }
        const auto format = leaf == "weight" ? comfy_format(stem) : std::string();
        std::vector<std::string> parts{name};
        for (const auto* const list : {&scales, &unknown, &beside}) {
            parts.insert(parts.end(), list->begin(), list->end());
        }
        if (parts.size() == 1 && format.empty()) {
            bare_.push_back(name);
            return;
        }
        scaled_ = true;
        if (!format.empty() && format != (value.dtype == dtype::f8_e4m3 ? "float8_e4m3fn" : "float8_e5m2")) {
            give_up(name, "is quantised by ComfyUI as '" + format + "'", parts);
            return;
        }
        if (scales.empty()) {
            if (!unknown.empty()) {
                give_up(name, "is FP8 with a scale of a name that says too little ('" + unknown[0] + "')", parts);
                return;
            }
            give_up(name,
                "is FP8 without a scale ('" + name + "_scale'), although "
                    + (beside.empty() ? std::string("the file's header has its format")
                                      : "'" + beside[0] + "' is there"),
                parts, repair());
            return;
        }
        scales.insert(scales.end(), unknown.begin(), unknown.end());
        if (scales.size() > 1) {
            give_up(name, "has two scales, '" + scales[0] + "' and '" + scales[1] + "'", parts, repair());
            return;
        }
        quantised_layer layer;
        layer.name = name;
        layer.codes = value;
        layer.scales = *find(scales[0]);
        layer.shape = value.shape;
        if (!detail::is_scale_dtype(layer.scales.dtype)) {
            give_up(name,
                "has a scale ('" + scales[0] + "') of dtype " + std::string(to_string(layer.scales.dtype))
                    + "; expected F32, BF16, F16 or F8_E8M0",
                parts, repair());
            return;
        }
        need_hints();
        if (const auto wrong = lay_out(layer, scales[0]); !wrong.what.empty()) {
            give_up(name, wrong.what, parts, wrong.mend);
            return;
        }
        layer.powers_of_two = layer.scales.dtype == dtype::f8_e8m0 || hints_.powers_of_two;
        add(std::move(layer), parts, stem);
    }

    struct fault {
        std::string what{}, mend{};
    };
    /// Blocks and grid from the shapes of codes and scales; what is wrong with them, or nothing. Blocks are of the size
    /// that the configuration says; where it says none, of 128 × 128, or of the only powers of two that fit.
    [[nodiscard]] fault lay_out(quantised_layer& layer, const std::string& scale_name) const
    {
        const auto& shape = layer.shape;
        const auto& given = layer.scales.shape;
        const std::size_t rank = shape.size();
        layer.block.assign(rank, 1);
        layer.grid.assign(rank, 1);
        for (std::size_t i = 0; i < rank; ++i) { layer.block[i] = std::max<std::int64_t>(1, shape[i]); }
        if (layer.scales.size() == 1) { return {}; }
        const auto ceiling = [](std::int64_t n, std::int64_t by) { return (n + by - 1) / by; };
        const std::string have = "has a scale ('" + scale_name + "') of shape " + to_string(given)
            + " for a weight of shape " + to_string(shape);
        std::string choices = "[] for all of it";
        if (rank > 0) { choices += message(", [", shape[0], "] for each channel"); }
        std::vector<extents> told, fitting; // blocks of matrices
        if (rank > 1) {
            for (const auto& block : hints_.more_blocks) { told.push_back(block); }
            told.insert(told.begin(), hints_.block);
            std::erase_if(told, [](const extents& block) { return block.size() != 2; });
            const bool guess = told.empty();
            for (const auto& sizes : guess ? std::vector<extents>{{128, 128}} : told) {
                auto block = extents(rank, 1), blocks = shape;
                for (std::size_t i = 0; i < 2; ++i) {
                    const std::size_t d = rank - 2 + i;
                    blocks[d] = ceiling(shape[d], sizes[i]);
                    block[d] = std::min(sizes[i], std::max<std::int64_t>(1, shape[d]));
                }
                choices += message(" or ", to_string(blocks), " for blocks of ", sizes[0], " × ", sizes[1]);
                if (given == blocks && std::find(fitting.begin(), fitting.end(), block) == fitting.end()) {
                    fitting.push_back(block);
                }
            }
            if (!guess) { choices += " (" + (hints_.key.empty() ? "" : hints_.key + " of ") + hints_.file + ")"; }
        }
        const fault wrong{have + "; expected " + choices, repair()};
        const auto unclear = [&](const extents& a, const extents& b) -> fault {
            return {have + ", which is one of blocks of " + across(a) + " as of " + across(b),
                R"(write the one that it is into the config.json beside the model ("quantization_config": {"weight_block_size": [rows, columns]}))"};
        };
        if (fitting.size() > 1) { return unclear(fitting[0], fitting[1]); }
        if (fitting.size() == 1) {
            layer.block = fitting[0];
            layer.grid = given;
            return {};
        }
        if (rank == 0 || layer.scales.size() == 0 || element_count(shape) == 0) { return wrong; }
        if (given == extents{shape[0]}) {
            layer.block[0] = 1;
            layer.grid[0] = shape[0];
            return {};
        }
        if (given.size() != rank || (rank == 2 && given[0] == 1) || given == shape) { return wrong; }
        auto block = extents(rank, 1), other = block;
        for (std::size_t i = 0; i < rank; ++i) {
            const std::int64_t size = shape[i], parts = given[i];
            if (parts <= 0 || parts > size) { return wrong; }
            if (parts == 1 || parts == size) {
                block[i] = other[i] = parts == 1 ? size : 1;
                continue;
            }
            if (!told.empty() || i + 2 < rank) { return wrong; }
            while (ceiling(size, block[i]) > parts) { block[i] *= 2; }
            if (ceiling(size, block[i]) != parts) { return wrong; }
            other[i] = size % parts == 0 ? size / parts : block[i];
        }
        if (block != other) { return unclear(block, other); }
        layer.block = block;
        layer.grid = given;
        return {};
    }
    /// "64 × 32"
    [[nodiscard]] static std::string across(const extents& block)
    {
        std::string text;
        for (std::size_t i = 0; i < block.size(); ++i) { text += (i ? " × " : "") + std::to_string(block[i]); }
        return text;
    }

    void add(quantised_layer layer, const std::vector<std::string>& parts, const std::string& stem)
    {
        const bool signless = layer.scales.dtype == dtype::u8 || layer.scales.dtype == dtype::f8_e8m0;
        const std::uint64_t count = layer.scales.size();
        for (std::uint64_t i = 0; i < count; ++i) {
            const float scale = detail::scale_at(layer.scales, i);
            if (signless ? scale == scale : scale >= 0 && std::isfinite(scale)) { continue; }
            give_up(layer.name,
                message("has the scale ", scale, " (at ", i, " of ", count, "); expected a positive number"), parts,
                repair());
            return;
        }
        if (layer.name != parts[0] && find(layer.name)) {
            give_up(layer.name, "is there twice, as it is and quantised ('" + parts[0] + "')", parts, repair());
            return;
        }
        for (const auto& part : parts) {
            taken_.insert(part);
            read_.insert(part);
            layer.parts.push_back({part.substr(stem.size()), *find(part)});
        }
        layers_.emplace_back(std::move(layer));
    }

    /// Scales without weights, FP8 without scales, and what belongs to no one layer.
    void find_leftovers()
    {
        const bool scaled = scaled_ || !layers_.empty() || find("scaled_fp8");
        for (const auto& name : bare_) {
            if (taken_.contains(name)) { continue; }
            need_hints();
            const auto listed = std::find_if(hints_.absent.begin(), hints_.absent.end(),
                [&](const std::string& other) { return is_scale_of(other, name); });
            const std::string lost = "is FP8 without a scale ('" + name + "_scale'), which ";
            if (listed != hints_.absent.end()) {
                give_up(name, "is FP8 without its scale ('" + *listed + "'), which the index lists and no file has",
                    {name}, repair());
            }
            else if (scaled) {
                give_up(name, lost + "other layers of the model have", {name}, repair());
            }
            else if (hints_.scaled_fp8) {
                give_up(
                    name, lost + "layers have by what '" + hints_.file + "' says of quantisation", {name}, repair());
            } // else: numbers as they are
        }
        for (const auto& [name, value] : *stored_) {
            if (taken_.contains(name)) { continue; }
            const std::string stem(layer_stem(name));
            const auto leaf = std::string_view(name).substr(stem.size());
            if (leaf == detail::comfy_mark) {
                const auto weight = find(stem + "weight");
                std::vector<std::string> parts{name};
                if (weight) {
                    for (auto& more : scales_of(stem + "weight")) { parts.push_back(std::move(more)); }
                    parts.insert(parts.begin(), stem + "weight");
                }
                give_up(stem + "weight",
                    "is quantised by ComfyUI as '" + comfy_format(stem) + "' ('" + name + "'), and "
                        + (weight ? "its tensor is " + std::string(to_string(weight->dtype)) : "has no codes"),
                    std::move(parts), repair());
                continue;
            }
            if (leaf == "weight_scale" || leaf == "weight_scale_inv" || leaf == "scale_weight"
                || leaf == "qscale_weight") {
                const auto weight = find(stem + "weight");
                if (weight && !scaled && is_storage(weight->dtype)) { continue; } // a parameter of that name
                if (weight && is_storage(weight->dtype)) {
                    give_up(stem + "weight",
                        "is " + std::string(to_string(weight->dtype)) + " and has a scale ('" + name
                            + "') all the same",
                        {stem + "weight", name}, repair());
                    continue;
                }
                give_up(
                    stem + "weight", "has a scale ('" + name + "') and no codes that it belongs to", {name}, repair());
                continue;
            }
            if (!scaled) { continue; }
            for (const std::string_view word : {"scaled_fp8", "k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale",
                     "output_scale", "input_scale", "scale_input", "qscale_act"}) {
                if (leaf == word) {
                    beside_.insert(name, value);
                    read_.insert(name);
                    break;
                }
            }
        }
    }

    const const_model_ref* stored_ = nullptr;
    hint_source ask_;
    quantisation_hints hints_;
    std::vector<quantised_tensor> layers_;
    std::vector<unread_layer> unread_;
    std::vector<std::string> bare_;
    std::set<std::string> taken_, read_; // names that are settled, and those that the model has no more
    std::unordered_map<std::string, std::vector<std::string>> leaves_; // by stem
    bool scaled_ = false; // FP8 with a scale, or what goes with one
    const_model_ref model_, beside_;
};

/// A regular expression (formats/name_pattern.hpp) that matches these names, which share a stem, and no others.
[[nodiscard]] inline std::string pattern_of(const std::vector<std::string>& names)
{
    if (names.empty()) { return {}; }
    std::string stem(layer_stem(names[0]));
    for (const auto& name : names) {
        while (!name.starts_with(stem)) {
            stem.pop_back();
            stem.resize(layer_stem(stem).size());
        }
    }
    const auto literally = [](std::string_view text) {
        std::string result;
        for (const char c : text) {
            if (std::string_view("\\^$.|?*+()[]{}").find(c) != std::string_view::npos) { result += '\\'; }
            result += c;
        }
        return result;
    };
    std::string choices;
    for (const auto& name : names) { choices += (choices.empty() ? "" : "|") + literally(name.substr(stem.size())); }
    return "^" + literally(stem) + (names.size() > 1 ? "(" + choices + ")" : choices) + "$";
}

namespace detail {
/// "exclude the whole layer (the tool: --exclude '^l\.(weight|weight_scale)$')", by the layer's name and those of its
/// tensors.
[[nodiscard]] inline std::string way_to_exclude(const std::string& name, std::vector<std::string> parts)
{
    const auto stem = layer_stem(name);
    const bool sibling = !parts.empty() && layer_stem(parts[0]) == stem && !stem.empty();
    if (sibling && std::find(parts.begin(), parts.end(), name) == parts.end()) { parts.insert(parts.begin(), name); }
    return "exclude the whole layer (the tool: --exclude '" + pattern_of(parts) + "')";
}
} // namespace detail

/// Throws for layers that are not read and take part: format_error by the layer's name, saying what to do; for one of
/// which `include` leaves some tensors and not others, invalid_argument (a layer is excluded whole). `include`: empty
/// where all do. `file`: for messages. `excludable`: whether whoever calls could have left layers out.
inline void refuse_unread(const quantised_layers& layers, const callback<bool(std::string_view)>& include,
    const std::string& file, bool excludable = true)
{
    for (const auto& layer : layers.unread()) {
        std::vector<std::string> in, out;
        for (const auto& part : layer.parts) { (!include || include(part) ? in : out).push_back(part); }
        if (in.empty()) { continue; }
        const auto way = detail::way_to_exclude(layer.name, layer.parts);
        if (!out.empty()) {
            std::string rest;
            for (const auto& part : in) { rest += (rest.empty() ? "'" : ", '") + part + "'"; }
            raise<invalid_argument>(error_code::layer_split,
                message("'", file, "': tensor '", out[0], "' is excluded and ", rest, in.size() > 1 ? " are" : " is",
                    " not, parts of layer '", layer.name, "', which ", layer.what, ": ", way, ", or nothing of it"));
        }
        raise<format_error>(error_code::quantised_layer,
            message("layer '", layer.name, "' ", layer.what, ": ", layer.mend, excludable ? ", or " + way : ""), file);
    }
}

/// Throws format_error where a tensor that takes part is FP8 without a scale in one model and a layer in scaled FP8 in
/// another, of whose `layers` that is one: its scale was lost, and its codes are no numbers. `include`: empty where all
/// take part. `file` and `other_file`: for messages.
///
///     refuse_unscaled(task.model(), base.model(), *base.layers(), {}, "task", "base");
inline void refuse_unscaled(const const_model_ref& model, const const_model_ref& other, const quantised_layers& layers,
    const callback<bool(std::string_view)>& include, const std::string& file, const std::string& other_file)
{
    std::unordered_map<const operand_source*, const quantised_layer*> scaled;
    for (const auto& tensor : layers.layers()) {
        if (tensor.layer().scheme == quantisation::fp8) { scaled.emplace(&tensor, &tensor.layer()); }
    }
    if (scaled.empty()) { return; }
    for (const auto& [name, tensor] : model) {
        if (tensor.source || !is_fp8(tensor.dtype) || (include && !include(name))) { continue; }
        const auto* const there = other.find(name);
        const auto place = there && there->source ? scaled.find(there->source) : scaled.end();
        if (place == scaled.end()) { continue; }
        const auto& layer = *place->second;
        raise<format_error>(error_code::quantised_layer,
            message("layer '", name, "' is FP8 without a scale, which it has in '", other_file, "' ('",
                layer_stem(layer.name), layer.parts[1].leaf, "'): fetch the file again, or ",
                detail::way_to_exclude(name, {name})),
            file);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
