// Quantised layers: codes and their scales, recognised by their names, read as one tensor of numbers, and written
// again. SPDX-License-Identifier: Apache-2.0
//
// What is read: FP8 with scales (per tensor, per channel, in blocks; under the names of vLLM and compressed-tensors,
// DeepSeek and ComfyUI), MXFP4 (gpt-oss, compressed-tensors) and NVFP4 (ModelOpt, compressed-tensors). What is only
// recognised: GPTQ, AWQ, bitsandbytes, compressed-tensors' integers, HQQ, Quanto.
#pragma once

#include <taskvec/core/callback.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/float_bits.hpp>
#include <taskvec/core/half.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>
#include <taskvec/models/operand_source.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The schemes that are read.
enum class quantisation : std::uint8_t {
    fp8, ///< one code of 8 bits (E4M3 or E5M2) for each number, one scale for a tensor, a channel or a block
    mxfp4, ///< two codes of 4 bits (E2M1) in a byte, a power of two for each 32 numbers
    nvfp4 ///< two codes of 4 bits in a byte, an E4M3 scale for each 16 numbers, one factor for all
};
/// The name of a scheme, as messages say it.
[[nodiscard]] constexpr std::string_view to_string(quantisation scheme) noexcept
{
    return scheme == quantisation::fp8 ? "scaled FP8" : scheme == quantisation::mxfp4 ? "MXFP4" : "NVFP4";
}

/// A tensor of a file that belongs to a layer: what its name has after the layer's stem ("weight_scale"), and its view.
struct layer_part {
    std::string leaf; ///< its name without the layer's stem
    const_tensor_ref tensor{}; ///< of the file
};

/// How a layer is quantised. A number is its code times its scale (times `factor`), each product rounded to f32.
struct quantised_layer {
    std::string name; ///< of the tensor that it stands for, such as "model.layers.0.mlp.down_proj.weight"
    quantisation scheme = quantisation::fp8; ///< of its codes
    extents shape{}; ///< of the numbers
    extents block{}; ///< for each extent, how many elements share a scale
    extents grid{}; ///< for each extent, how many scales there are
    const_tensor_ref codes{}, scales{}; ///< as they are stored
    float factor = 1; ///< NVFP4: of all scales
    bool powers_of_two = false; ///< scales are powers of two, whatever they are stored as
    bool transposed = false; ///< MXFP4 experts: the last two extents are stored the other way round
    std::vector<layer_part> parts{}; ///< codes, scales, and what belongs to the layer beside them (input scales)

    /// "per tensor", "per channel", "blocks of 128 × 128", …
    [[nodiscard]] std::string granularity() const
    {
        if (element_count(grid) <= 1) { return "per tensor"; }
        std::size_t split = 0;
        for (std::size_t i = 1; i < grid.size(); ++i) { split += grid[i] > 1 ? 1u : 0u; }
        if (block[0] == 1 && split == 0) { return "per channel"; }
        std::string text = "blocks of ";
        for (std::size_t i = 0; i < block.size(); ++i) { text += (i ? " × " : "") + std::to_string(block[i]); }
        return text;
    }
};

/// What stands before a layer's last word: part names are this and their leaves. "a.b.weight" has "a.b.".
[[nodiscard]] inline std::string_view layer_stem(std::string_view name)
{
    const auto dot = name.rfind('.');
    return dot == name.npos ? std::string_view() : name.substr(0, dot + 1);
}

/// A layer that nothing here reads, or that is damaged.
struct unread_layer {
    std::string name; ///< of the layer
    std::string what; ///< "is quantised by GPTQ", "has a scale of shape …"
    std::string mend; ///< "dequantise it first …"
    std::vector<std::string> parts{}; ///< names of its tensors
};

/// What a configuration says about scales beyond their shapes.
struct quantisation_hints {
    extents block{}; ///< quantization_config.weight_block_size; empty: deduced from shapes
    bool powers_of_two = false; ///< scale_fmt "ue8m0"
    std::string file{}; ///< which says so, for messages
};

/// The hints of a config.json; none where it is not there, or says nothing. Throws format_error for block sizes that
/// are none.
[[nodiscard]] inline quantisation_hints read_quantisation_hints(const std::filesystem::path& config)
{
    quantisation_hints hints;
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(config, ignored)) { return hints; }
    const auto json = parse_configuration(read_text_file(config), config.string());
    const nlohmann::json* how = nullptr;
    for (const auto* part : {&json, json.contains("text_config") ? &json["text_config"] : &json}) {
        if (!how && part->is_object() && part->contains("quantization_config")
            && (*part)["quantization_config"].is_object()) {
            how = &(*part)["quantization_config"];
        }
    }
    if (!how) { return hints; }
    hints.file = config.string();
    const auto take = [&](const nlohmann::json& sizes, std::string_view key) {
        bool fits = sizes.is_array() && !sizes.empty();
        for (const auto& size : sizes) {
            fits = fits && size.is_number_unsigned() && size.get<std::uint64_t>() > 0
                && size.get<std::uint64_t>() < (std::uint64_t{1} << 32);
        }
        if (!fits) {
            raise<format_error>(error_code::quantised_layer,
                message("quantization_config has a '", key, "' that is no list of sizes, such as [128, 128]"),
                hints.file);
        }
        hints.block.clear();
        for (const auto& size : sizes) { hints.block.push_back(size.get<std::int64_t>()); }
    };
    if (how->contains("weight_block_size") && !(*how)["weight_block_size"].is_null()) {
        take((*how)["weight_block_size"], "weight_block_size");
    }
    if (how->contains("config_groups") && (*how)["config_groups"].is_object()) {
        for (const auto& group : (*how)["config_groups"]) {
            if (!group.is_object() || !group.contains("weights") || !group["weights"].is_object()) { continue; }
            const auto& weights = group["weights"];
            if (weights.contains("block_structure") && weights["block_structure"].is_array()) {
                take(weights["block_structure"], "block_structure");
            }
        }
    }
    hints.powers_of_two = how->contains("scale_fmt") && (*how)["scale_fmt"] == "ue8m0";
    return hints;
}

namespace detail {

/// The numbers of all codes.
template <class Widen>
[[nodiscard]] constexpr std::array<float, 256> code_table(Widen widen)
{
    std::array<float, 256> table{};
    for (unsigned code = 0; code < 256; ++code) { table[code] = widen(static_cast<std::uint8_t>(code)); }
    return table;
}
inline constexpr auto e4m3_numbers = code_table([](std::uint8_t code) { return e4m3_to_f32(code); });
inline constexpr auto e5m2_numbers = code_table([](std::uint8_t code) { return e5m2_to_f32(code); });
/// Powers of two: 2^(code − 127), 255 is NaN.
inline constexpr auto e8m0_numbers = code_table([](std::uint8_t code) {
    return code == 255 ? reinterpret_bits<float>(std::uint32_t{0x7fc00000u})
        : code == 0    ? 0x1p-127f
                       : reinterpret_bits<float>(static_cast<std::uint32_t>(code) << 23);
});
inline constexpr std::array<float, 16> e2m1_numbers{
    0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

[[nodiscard]] constexpr bool is_scale_dtype(dtype type) noexcept
{
    return type == dtype::f32 || type == dtype::f16 || type == dtype::bf16 || type == dtype::f64
        || type == dtype::f8_e8m0;
}

/// A scale by its place. `type`: that of is_scale_dtype(), f8_e4m3, or u8 for powers of two.
[[nodiscard]] inline float scale_at(const const_tensor_ref& scales, std::uint64_t index) noexcept
{
    const auto* const data = static_cast<const unsigned char*>(scales.data);
    const auto load = [&]<class T>(T value) {
        std::memcpy(&value, data + index * sizeof value, sizeof value);
        return value;
    };
    switch (scales.dtype) {
    case dtype::f32: return load(float{});
    case dtype::f64: return static_cast<float>(load(double{}));
    case dtype::f16: return f16_to_f32(load(std::uint16_t{}));
    case dtype::bf16: return bf16_to_f32(load(std::uint16_t{}));
    case dtype::f8_e4m3: return e4m3_numbers[data[index]];
    default: return e8m0_numbers[data[index]];
    }
}

/// The first scale of a row, a row being all numbers that share the other indices.
[[nodiscard]] inline std::uint64_t first_scale(const quantised_layer& layer, std::uint64_t row) noexcept
{
    std::uint64_t index = 0, stride = layer.grid.empty() ? 1 : static_cast<std::uint64_t>(layer.grid.back());
    for (std::size_t d = layer.shape.size(); d-- > 1;) {
        const auto extent = static_cast<std::uint64_t>(layer.shape[d - 1]);
        index += row % extent / static_cast<std::uint64_t>(layer.block[d - 1]) * stride;
        stride *= static_cast<std::uint64_t>(layer.grid[d - 1]);
        row /= extent;
    }
    return index;
}

} // namespace detail

/// A quantised layer as a tensor: decodes any run of its numbers.
class quantised_tensor final : public operand_source {
public:
    /// A layer that quantised_layers found.
    explicit quantised_tensor(quantised_layer layer)
        : layer_(std::move(layer))
    { }
    /// How the layer is stored.
    [[nodiscard]] const quantised_layer& layer() const noexcept { return layer_; }
    /// The tensor that walks over models are given. Refers to this.
    [[nodiscard]] const_tensor_ref tensor() const&
    {
        return {nullptr, dtype::f32, layer_.shape, {}, memory_space::host, 0, this};
    }
    void tensor() const&& = delete; // name the owner first: its views would dangle
    [[nodiscard]] dtype type() const noexcept override { return dtype::f32; }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return layer_.scheme == quantisation::fp8 ? 8 : 4; }

    void read(std::uint64_t offset, std::size_t count, void* numbers) const override
    {
        auto* out = static_cast<float*>(numbers);
        const std::uint64_t columns = layer_.shape.empty() ? 1 : static_cast<std::uint64_t>(layer_.shape.back());
        while (count > 0) {
            const std::uint64_t row = offset / columns, column = offset % columns;
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(count, columns - column));
            layer_.transposed ? decode_column(row, column, n, out) : decode_row(row, column, n, out);
            offset += n;
            count -= n;
            out += n;
        }
    }

private:
    [[nodiscard]] float scale(std::uint64_t index) const
    {
        const float value = detail::scale_at(layer_.scales, index);
        return layer_.scheme == quantisation::nvfp4 ? value * layer_.factor : value;
    }
    [[nodiscard]] float nibble(std::uint64_t index) const
    {
        const unsigned byte = static_cast<const unsigned char*>(layer_.codes.data)[index / 2];
        return detail::e2m1_numbers[index % 2 ? byte >> 4 : byte & 15u];
    }
    void decode_row(std::uint64_t row, std::uint64_t column, std::size_t n, float* out) const
    {
        const std::uint64_t columns = layer_.shape.empty() ? 1 : static_cast<std::uint64_t>(layer_.shape.back());
        const std::uint64_t width = layer_.shape.empty() ? 1 : static_cast<std::uint64_t>(layer_.block.back());
        const std::uint64_t scales = detail::first_scale(layer_, row), first = row * columns;
        const auto* const codes = static_cast<const unsigned char*>(layer_.codes.data);
        const float* const numbers =
            layer_.codes.dtype == dtype::f8_e5m2 ? detail::e5m2_numbers.data() : detail::e4m3_numbers.data();
        for (std::size_t i = 0; i < n;) {
            const std::uint64_t at = column + i;
            const auto end = static_cast<std::size_t>(std::min<std::uint64_t>(n, i + width - at % width));
            const float factor = scale(scales + at / width);
            if (layer_.scheme == quantisation::fp8) {
                for (; i < end; ++i) { out[i] = numbers[codes[first + column + i]] * factor; }
            }
            else {
                for (; i < end; ++i) { out[i] = nibble(first + column + i) * factor; }
            }
        }
    }
    /// Row and column of the numbers, stored as column and row: shape […, in, out] of codes […, out, in].
    void decode_column(std::uint64_t row, std::uint64_t column, std::size_t n, float* out) const
    {
        const std::size_t rank = layer_.shape.size();
        const auto ins = static_cast<std::uint64_t>(layer_.shape[rank - 2]);
        const auto outs = static_cast<std::uint64_t>(layer_.shape[rank - 1]);
        const auto width = static_cast<std::uint64_t>(layer_.block[rank - 2]);
        const auto groups = static_cast<std::uint64_t>(layer_.grid[rank - 2]);
        const std::uint64_t matrix = row / ins, in = row % ins;
        for (std::size_t i = 0; i < n; ++i) {
            const std::uint64_t stored = matrix * outs + column + i;
            out[i] = nibble(stored * ins + in) * scale(stored * groups + in / width);
        }
    }

    quantised_layer layer_;
};

/// The layers of a model that are quantised, and the model with each of them as one tensor.
///
///     const quantised_layers layers(file.model(), hints);
///     for (const auto& [name, tensor] : layers.model()) { … } // "l.weight", F32; no "l.weight_scale"
///
/// A layer whose scheme is not read, or whose tensors contradict each other (a scale of the wrong shape, NaN, negative
/// or infinite scales, a scale without its weight, FP8 without a scale beside layers with one), is in unread(), and its
/// tensors stay in the model as they are: whoever computes with them asks refuse_unread() first. Views only.
/// Cost: O(names), and one read of all scales.
class quantised_layers {
public:
    /// Where hints come from, asked once and only if they are needed.
    using hint_source = std::function<quantisation_hints()>;

    quantised_layers() = default;
    /// `hints` is asked at most once, and only where scales of blocks have to be understood.
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
               "weights "
               "that it was made of), or exclude the whole layer";
    }
    [[nodiscard]] static std::string repair() { return "fetch the file again, or exclude the whole layer"; }

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

    void find_layers()
    {
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name)) { find_unread(name, value); }
        }
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name)) { find_fp4(name, value); }
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
        if (leaf == "qweight") {
            auto parts = present(stem, {"qweight", "qzeros", "scales", "g_idx"});
            const auto scales = find(stem + "scales");
            const bool wide =
                scales && scales->shape.size() == 2 && value.shape.size() == 2 && scales->shape[1] != value.shape[1];
            const bool awq = !find(stem + "g_idx") && wide;
            give_up(module(), awq ? "is quantised by AWQ" : "is quantised by GPTQ", std::move(parts));
        }
        else if (leaf == "weight_packed" && value.dtype != dtype::u8) {
            give_up(module(), "is quantised to integers (compressed-tensors)",
                present(stem,
                    {"weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx",
                        "input_scale", "input_zero_point"}));
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
        else if (name.ends_with(".absmax") && !name.ends_with(".nested_absmax")) {
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
                    {"weight", "weight_scale", "weight_scales", "weight_zero_point", "input_scale",
                        "input_zero_point"}));
        }
        else if (value.dtype == dtype::f8_e4m3fnuz || value.dtype == dtype::f8_e5m2fnuz) {
            if (find(name + "_scale") || find(name + "_scale_inv")) {
                give_up(name, message("is quantised to ", to_string(value.dtype)),
                    present(name, {"", "_scale", "_scale_inv"}));
            }
        }
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
                "weight_shape"});
        quantised_layer layer;
        layer.name = stem + "weight";
        layer.codes = value;
        layer.scales = *scales;
        const bool powers = scales->dtype == dtype::u8 || scales->dtype == dtype::f8_e8m0;
        const auto factor = find(stem + "weight_scale_2"), divisor = find(stem + "weight_global_scale");
        const auto wrong = [&](const std::string& what, const std::string& mend) {
            give_up(layer.name, what, parts, mend);
        };
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
            layer.factor = detail::scale_at(*global, 0);
            if (!(layer.factor > 0) || !std::isfinite(layer.factor)) {
                return wrong(message("has the global scale ", layer.factor, "; expected a positive number"), repair());
            }
            if (!factor) { layer.factor = 1.0f / layer.factor; }
        }
        if (value.shape.size() < 2) {
            return wrong("has packed codes of shape " + to_string(value.shape) + "; expected [out, in / 2]", repair());
        }
        layer.shape = value.shape;
        layer.shape.back() *= 2;
        auto expected = layer.shape;
        expected.back() = (expected.back() + group - 1) / group;
        if (scales->shape != expected || layer.shape.back() % group != 0) {
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
        std::vector<std::string> scales = present(name, {"_scale", "_scale_inv"});
        if (leaf == "weight" && find(stem + "scale_weight")) { scales.push_back(stem + "scale_weight"); }
        if (scales.empty()) {
            bare_.push_back(name);
            return;
        }
        std::vector<std::string> parts{name, scales[0]};
        for (auto& more : present(stem, {"input_scale", "scale_input", "input_scale_ub"})) {
            if (leaf == "weight") { parts.push_back(std::move(more)); }
        }
        for (auto& more : present(name, {"_input_scale"})) { parts.push_back(std::move(more)); }
        if (scales.size() > 1) {
            parts.insert(parts.end(), scales.begin() + 1, scales.end());
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
        if (const auto wrong = lay_out(layer, scales[0]); !wrong.empty()) {
            give_up(name, wrong, parts, repair());
            return;
        }
        if (element_count(layer.grid) > 1) { need_hints(); }
        layer.powers_of_two = layer.scales.dtype == dtype::f8_e8m0 || hints_.powers_of_two;
        add(std::move(layer), parts, stem);
    }

    /// Blocks and grid from the shapes of codes and scales; what is wrong with them, or nothing.
    [[nodiscard]] std::string lay_out(quantised_layer& layer, const std::string& scale_name)
    {
        const auto& shape = layer.shape;
        const auto& given = layer.scales.shape;
        const std::size_t rank = shape.size();
        layer.block.assign(rank, 1);
        layer.grid.assign(rank, 1);
        for (std::size_t i = 0; i < rank; ++i) { layer.block[i] = std::max<std::int64_t>(1, shape[i]); }
        if (layer.scales.size() == 1) { return {}; }
        const auto wrong = [&](const std::string& expected) {
            return "has a scale ('" + scale_name + "') of shape " + to_string(given) + " for a weight of shape "
                + to_string(shape) + "; expected " + expected;
        };
        const auto ceiling = [](std::int64_t n, std::int64_t by) { return (n + by - 1) / by; };
        std::string choices = "[] for all of it";
        if (rank > 0) { choices += message(", [", shape[0], "] for each channel"); }
        if (rank > 1) {
            need_hints();
            auto sizes = extents(rank, 1);
            const std::int64_t usual = 128;
            const bool told = hints_.block.size() == 2;
            sizes[rank - 2] = told ? hints_.block[0] : usual;
            sizes[rank - 1] = told ? hints_.block[1] : usual;
            auto blocks = shape;
            for (std::size_t i = 0; i < rank; ++i) { blocks[i] = ceiling(shape[i], sizes[i]); }
            choices += message(" or ", to_string(blocks), " for blocks of ", sizes[rank - 2], " × ", sizes[rank - 1],
                told ? " (" + hints_.file + ")" : std::string());
            if (given == blocks) {
                for (std::size_t i = 0; i < rank; ++i) {
                    layer.block[i] = std::min(sizes[i], std::max<std::int64_t>(1, shape[i]));
                }
                layer.grid = given;
                return {};
            }
        }
        if (rank == 0 || layer.scales.size() == 0 || element_count(shape) == 0) { return wrong(choices); }
        auto channel = extents(rank, 1);
        channel[0] = shape[0];
        if (given == extents{shape[0]} || given == channel) {
            layer.block[0] = 1;
            layer.grid = channel;
            return {};
        }
        const bool told = rank == 2 && hints_.block.size() == 2;
        if (given.size() != rank || told || (rank == 2 && given[0] == 1) || given == shape) { return wrong(choices); }
        for (std::size_t i = 0; i < rank; ++i) {
            if (given[i] <= 0 || shape[i] % given[i] != 0) { return wrong(choices); }
            layer.block[i] = shape[i] / given[i];
        }
        layer.grid = given;
        return {};
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
        const bool scaled = !layers_.empty() || find("scaled_fp8");
        for (const auto& name : bare_) {
            if (!scaled) { continue; } // numbers as they are
            give_up(name, "is FP8 without a scale ('" + name + "_scale'), which other layers of the model have", {name},
                repair());
        }
        for (const auto& [name, value] : *stored_) {
            if (taken_.contains(name)) { continue; }
            const std::string stem(layer_stem(name));
            const auto leaf = std::string_view(name).substr(stem.size());
            if (leaf == "weight_scale" || leaf == "weight_scale_inv" || leaf == "scale_weight") {
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
                     "output_scale", "input_scale", "scale_input"}) {
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
    const_model_ref model_, beside_;
};

/// Throws for layers that are not read and take part: format_error by the layer's name, saying what to do; for one of
/// which `include` leaves some tensors and not others, invalid_argument (a layer is excluded whole). `include`: empty
/// where all do. `file`: for messages.
inline void refuse_unread(
    const quantised_layers& layers, const callback<bool(std::string_view)>& include, const std::string& file)
{
    for (const auto& layer : layers.unread()) {
        std::size_t in = 0;
        const std::string* excluded = nullptr;
        for (const auto& part : layer.parts) {
            if (!include || include(part)) { ++in; }
            else {
                excluded = &part;
            }
        }
        if (in == 0) { continue; }
        if (excluded) {
            raise<invalid_argument>(error_code::layer_split,
                message("'", file, "': tensor '", *excluded, "' is excluded, and it is part of layer '", layer.name,
                    "', which ", layer.what, ": exclude the whole layer, or nothing of it"));
        }
        raise<format_error>(
            error_code::quantised_layer, message("layer '", layer.name, "' ", layer.what, ": ", layer.mend), file);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
