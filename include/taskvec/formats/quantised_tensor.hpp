// Codes and their scales as a tensor of numbers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/float_bits.hpp>
#include <taskvec/core/half.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/operand_source.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
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

} // namespace taskvec::inline TASKVEC_ABI
