// Element types: what a tensor can hold, and the bit-exact conversions between storage and arithmetic types.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <Eigen/Core>

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// 16-bit storage types. Only their bits are used here: arithmetic runs in f32.
using bf16 = Eigen::bfloat16;
using f16 = Eigen::half;

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
[[nodiscard]] constexpr std::string_view name(dtype type) noexcept
{
    return detail::dtype_table[static_cast<std::size_t>(type)].name;
}

/// Bits of one element: 4 and 6 for the packed types, otherwise a multiple of 8.
[[nodiscard]] constexpr unsigned bits(dtype type) noexcept
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

/// The storage types that the algorithms compute with: f64, f32, bf16, f16.
template <class T>
concept storage_element =
    std::same_as<T, double> || std::same_as<T, float> || std::same_as<T, bf16> || std::same_as<T, f16>;

/// The types that arithmetic runs in.
template <class T>
concept arithmetic_element = std::same_as<T, double> || std::same_as<T, float>;

/// The type that arithmetic on T runs in: f64 for f64, otherwise f32.
template <storage_element T>
using arithmetic_type = std::conditional_t<std::same_as<T, double>, double, float>;

template <storage_element T>
inline constexpr dtype dtype_of = std::same_as<T, double> ? dtype::f64
    : std::same_as<T, float>                              ? dtype::f32
    : std::same_as<T, bf16>                               ? dtype::bf16
                                                          : dtype::f16;

/// True for the dtypes that merges compute with directly (f64, f32, bf16, f16).
[[nodiscard]] constexpr bool is_storage(dtype type) noexcept
{
    return type == dtype::f64 || type == dtype::f32 || type == dtype::bf16 || type == dtype::f16;
}

/// True for 8-bit floats that are dequantised to f32 on reading.
[[nodiscard]] constexpr bool is_fp8(dtype type) noexcept
{
    return type == dtype::f8_e4m3 || type == dtype::f8_e5m2;
}

TASKVEC_KERNELS_BEGIN

/// std::bit_cast, compiled under the kernels' options: g++ inlines no function into a kernel that was compiled without
/// them.
template <class To, class From>
    requires(sizeof(To) == sizeof(From))
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr To reinterpret_bits(From value) noexcept
{
    return __builtin_bit_cast(To, value);
}

/// bf16 bits to f32, exact.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float bf16_to_f32(std::uint16_t value) noexcept
{
    return reinterpret_bits<float>(static_cast<std::uint32_t>(value) << 16);
}

/// f32 to bf16 bits, to nearest even; NaN stays a quiet NaN of the same sign.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint16_t f32_to_bf16(float value) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (word >> 16) | 0x0040u;
    const std::uint32_t nan = 0u - static_cast<std::uint32_t>((word & 0x7fffffffu) > 0x7f800000u);
    return static_cast<std::uint16_t>((quiet & nan) | (rounded & ~nan));
}

/// f16 bits to f32, exact (subnormals too). Branch-free, so that loops of it vectorise.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float f16_to_f32(std::uint16_t value) noexcept
{
    const std::uint32_t sign = (value & 0x8000u) << 16;
    const std::uint32_t magnitude = value & 0x7fffu;
    // Exponent and mantissa moved into place are 2^112 too small; an exact product by a power of two mends normals and
    // subnormals alike. Infinity and NaN keep their all-ones exponent.
    const float scaled = reinterpret_bits<float>(magnitude << 13) * 0x1p112f;
    const std::uint32_t special = (magnitude << 13) | 0x7f800000u;
    const std::uint32_t extreme = 0u - static_cast<std::uint32_t>(magnitude >= 0x7c00u);
    const std::uint32_t word = (special & extreme) | (reinterpret_bits<std::uint32_t>(scaled) & ~extreme);
    return reinterpret_bits<float>(word | sign);
}

/// f32 to f16 bits, to nearest even, overflow to infinity, subnormals exact; NaN stays a quiet NaN of the same sign.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint16_t f32_to_f16(float value) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t sign = (word >> 16) & 0x8000u;
    const std::uint32_t magnitude = word & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 an addition of 1/2 aligns the mantissa to f16's subnormal spacing and rounds it to nearest even.
    const std::uint32_t subnormal =
        reinterpret_bits<std::uint32_t>(reinterpret_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
    const auto select = [](bool condition, std::uint32_t yes, std::uint32_t no) {
        const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
        return (yes & mask) | (no & ~mask);
    };
    std::uint32_t result = select(magnitude < 0x38800000u, subnormal, normal);
    result = select(magnitude >= 0x477ff000u, 0x7c00u, result);
    result = select(magnitude > 0x7f800000u, nan, result);
    return static_cast<std::uint16_t>(result | sign);
}

/// fp8 bits to f32, exact. e4m3 (fn) has no infinity: its largest code is NaN. e5m2 is the upper byte of f16.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float e4m3_to_f32(std::uint8_t code) noexcept
{
    const std::uint32_t sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
    // As for f16: moved into place an e4m3 number is 2^120 too small, subnormals too.
    const float scaled = reinterpret_bits<float>(magnitude << 20) * 0x1p120f;
    const std::uint32_t nan = 0u - static_cast<std::uint32_t>(magnitude == 0x7fu);
    return reinterpret_bits<float>((0x7fc00000u & nan) | (reinterpret_bits<std::uint32_t>(scaled) & ~nan) | sign);
}
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float e5m2_to_f32(std::uint8_t code) noexcept
{
    return f16_to_f32(static_cast<std::uint16_t>(code << 8));
}

/// f64 to f32 and back are the hardware's conversions; 16-bit types go through f32 (f64 to a 16-bit type therefore
/// rounds to odd first, so that the result is rounded once).
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float f64_to_f32_odd(double value) noexcept
{
    const float nearest = static_cast<float>(value);
    const double back = static_cast<double>(nearest);
    auto word = reinterpret_bits<std::uint32_t>(nearest);
    if (back == value || value != value || (word & 0x7fffffffu) == 0x7f800000u) { return nearest; }
    // Truncate toward zero, then set the last bit: an inexact value can no longer look like a tie.
    const double magnitude = value < 0 ? -value : value;
    const double rounded = back < 0 ? -back : back;
    if (rounded > magnitude) { --word; }
    return reinterpret_bits<float>(word | 1u);
}

/// What the loops load and store for an element of T: the number itself, or the bits of a 16-bit type (a class there
/// keeps the vectoriser away).
template <storage_element T>
using storage_word = std::conditional_t<sizeof(T) == 2, std::uint16_t, T>;

/// Converts the stored word of a T to an arithmetic type. Exact, except f64 to f32 (to nearest even).
template <arithmetic_element A, storage_element T>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr A widen_word(storage_word<T> word) noexcept
{
    if constexpr (std::same_as<T, bf16>) { return static_cast<A>(bf16_to_f32(word)); }
    else if constexpr (std::same_as<T, f16>) {
        return static_cast<A>(f16_to_f32(word));
    }
    else {
        return static_cast<A>(word);
    }
}

/// Converts one stored element to an arithmetic type.
template <arithmetic_element A, storage_element T>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr A widen(T value) noexcept
{
    return widen_word<A, T>(reinterpret_bits<storage_word<T>>(value));
}

/// Rounds an arithmetic value to the stored word of a T once, to nearest even.
template <storage_element T, arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr storage_word<T> narrow_word(A value) noexcept
{
    if constexpr (sizeof(T) != 2) { return static_cast<T>(value); }
    else {
        float single;
        if constexpr (std::same_as<A, double>) { single = f64_to_f32_odd(value); }
        else {
            single = value;
        }
        return std::same_as<T, bf16> ? f32_to_bf16(single) : f32_to_f16(single);
    }
}

/// Rounds an arithmetic value to a storage type once, to nearest even.
template <storage_element T, arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr T narrow(A value) noexcept
{
    return reinterpret_bits<T>(narrow_word<T>(value));
}

/// Unsigned words as wide as the arithmetic type; magnitudes compare as these once the sign is cleared.
template <arithmetic_element A>
using bits_type = std::conditional_t<std::same_as<A, double>, std::uint64_t, std::uint32_t>;

template <arithmetic_element A>
inline constexpr bits_type<A> sign_mask = std::same_as<A, double> ? static_cast<bits_type<A>>(std::uint64_t{1} << 63)
                                                                  : static_cast<bits_type<A>>(0x80000000u);

template <arithmetic_element A>
inline constexpr bits_type<A> exponent_mask =
    std::same_as<A, double> ? static_cast<bits_type<A>>(0x7ff0000000000000ull) : static_cast<bits_type<A>>(0x7f800000u);

/// The bits of |x|: ordered as the magnitudes are.
template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr bits_type<A> magnitude_bits(A value) noexcept
{
    return reinterpret_bits<bits_type<A>>(value) & static_cast<bits_type<A>>(~sign_mask<A>);
}

TASKVEC_KERNELS_END

/// Calls f with a value of the storage type that `type` names (std::type_identity<T>{}); other types are an error that
/// names `what`.
template <class F>
decltype(auto) visit_storage(dtype type, std::string_view what, F&& f)
{
    switch (type) {
    case dtype::f64: return f(std::type_identity<double>{});
    case dtype::f32: return f(std::type_identity<float>{});
    case dtype::bf16: return f(std::type_identity<bf16>{});
    case dtype::f16: return f(std::type_identity<f16>{});
    default: break;
    }
    raise<dtype_mismatch>(message("tensor '", what, "' has dtype ", name(type),
        "; expected one of F64, F32, BF16, F16: exclude it or convert it first"));
}

} // namespace taskvec::inline TASKVEC_ABI
