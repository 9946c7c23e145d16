// Element types of files, by name: every dtype of the safetensors format.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// Every element type of the safetensors format, in the order of its reference implementation (which is the order in
/// which that writer sorts tensors, descending).
enum class dtype : std::uint8_t {
    boolean,
    f4,
    f6_e2m3,
    f6_e3m2,
    u8,
    i8,
    f8_e5m2,
    f8_e4m3,
    f8_e8m0,
    f8_e4m3fnuz,
    f8_e5m2fnuz,
    i16,
    u16,
    f16,
    bf16,
    i32,
    u32,
    f32,
    c64,
    f64,
    i64,
    u64
};

namespace detail {
struct dtype_row {
    dtype type;
    std::string_view name; // as safetensors spells it
    unsigned bits;
};
inline constexpr dtype_row dtype_table[] = {
    {dtype::boolean, "BOOL", 8},
    {dtype::f4, "F4", 4},
    {dtype::f6_e2m3, "F6_E2M3", 6},
    {dtype::f6_e3m2, "F6_E3M2", 6},
    {dtype::u8, "U8", 8},
    {dtype::i8, "I8", 8},
    {dtype::f8_e5m2, "F8_E5M2", 8},
    {dtype::f8_e4m3, "F8_E4M3", 8},
    {dtype::f8_e8m0, "F8_E8M0", 8},
    {dtype::f8_e4m3fnuz, "F8_E4M3FNUZ", 8},
    {dtype::f8_e5m2fnuz, "F8_E5M2FNUZ", 8},
    {dtype::i16, "I16", 16},
    {dtype::u16, "U16", 16},
    {dtype::f16, "F16", 16},
    {dtype::bf16, "BF16", 16},
    {dtype::i32, "I32", 32},
    {dtype::u32, "U32", 32},
    {dtype::f32, "F32", 32},
    {dtype::c64, "C64", 64},
    {dtype::f64, "F64", 64},
    {dtype::i64, "I64", 64},
    {dtype::u64, "U64", 64},
};
} // namespace detail

/// The name of a dtype as safetensors spells it ("BF16").
[[nodiscard]] constexpr std::string_view to_string(dtype type) noexcept
{
    return detail::dtype_table[static_cast<std::size_t>(type)].name;
}

/// Bits of one element: 4 and 6 for the packed types, otherwise a multiple of 8.
[[nodiscard]] constexpr unsigned bits_per_element(dtype type) noexcept
{
    return detail::dtype_table[static_cast<std::size_t>(type)].bits;
}

/// The dtype with this safetensors name, or nothing.
[[nodiscard]] constexpr std::optional<dtype> parse_dtype(std::string_view text) noexcept
{
    for (const auto& row : detail::dtype_table) {
        if (row.name == text) { return row.type; }
    }
    return std::nullopt;
}

/// True for 8-bit floats that are dequantised to f32 on reading.
[[nodiscard]] constexpr bool is_fp8(dtype type) noexcept
{
    return type == dtype::f8_e4m3 || type == dtype::f8_e5m2;
}

/// Calls visit(std::type_identity<N>{}) with the type of a dtype of whole numbers, and says whether it is one.
///
///     taskvec::visit_integer(type, [&]<class N>(std::type_identity<N>) { largest = std::numeric_limits<N>::max(); });
template <class Visit>
constexpr bool visit_integer(dtype type, Visit&& visit)
{
    switch (type) {
    case dtype::i8: visit(std::type_identity<std::int8_t>{}); return true;
    case dtype::u8: visit(std::type_identity<std::uint8_t>{}); return true;
    case dtype::i16: visit(std::type_identity<std::int16_t>{}); return true;
    case dtype::u16: visit(std::type_identity<std::uint16_t>{}); return true;
    case dtype::i32: visit(std::type_identity<std::int32_t>{}); return true;
    case dtype::u32: visit(std::type_identity<std::uint32_t>{}); return true;
    case dtype::i64: visit(std::type_identity<std::int64_t>{}); return true;
    case dtype::u64: visit(std::type_identity<std::uint64_t>{}); return true;
    default: return false;
    }
}

} // namespace taskvec::inline TASKVEC_ABI
