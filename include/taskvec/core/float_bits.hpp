// Floating-point numbers as bits: the exact conversions between stored words and arithmetic types, and magnitudes as
// integers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>
#include <taskvec/core/storage_list.hpp>

#include <concepts>
#include <cstdint>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

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
/// The number of an e5m2 code (1 sign, 5 exponent, 2 mantissa bits: the upper half of an f16). Exact.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float e5m2_to_f32(std::uint8_t code) noexcept
{
    return f16_to_f32(static_cast<std::uint16_t>(code << 8));
}

/// f32 to fp8 bits, to nearest even. A finite value beyond the largest number becomes that number (448, 57344). NaN
/// stays NaN, and so does infinity in e4m3, which has none.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint8_t f32_to_e4m3(float value) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t sign = (word >> 24) & 0x80u, magnitude = word & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) { return static_cast<std::uint8_t>(sign | 0x7fu); }
    // Below 2^-6 an addition of 2^14 aligns the mantissa to the subnormals' spacing of 2^-9.
    const std::uint32_t code = magnitude < 0x3c800000u
        ? reinterpret_bits<std::uint32_t>(reinterpret_bits<float>(magnitude) + 0x1p14f) - 0x46800000u
        : (magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    return static_cast<std::uint8_t>(sign | (code > 0x7eu ? 0x7eu : code));
}
/// The same to e5m2, whose infinity stays.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint8_t f32_to_e5m2(float value) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t sign = (word >> 24) & 0x80u, magnitude = word & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) {
        return static_cast<std::uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7eu : 0x7cu));
    }
    // Below 2^-14 an addition of 2^7 aligns the mantissa to the subnormals' spacing of 2^-16.
    const std::uint32_t code = magnitude < 0x38800000u
        ? reinterpret_bits<std::uint32_t>(reinterpret_bits<float>(magnitude) + 0x1p7f) - 0x43000000u
        : (magnitude - 0x38000000u + 0xfffffu + ((magnitude >> 21) & 1u)) >> 21;
    return static_cast<std::uint8_t>(sign | (code > 0x7bu ? 0x7bu : code));
}

/// f64 to f32, rounded to odd: what is then rounded to a type of at most 22 bits of precision is rounded once.
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

/// Unsigned words as wide as the arithmetic type; magnitudes compare as these once the sign is cleared.
template <arithmetic_element A>
using bits_type = std::conditional_t<std::same_as<A, double>, std::uint64_t, std::uint32_t>;

/// The bit of the sign in A's word.
template <arithmetic_element A>
inline constexpr bits_type<A> sign_mask = std::same_as<A, double> ? static_cast<bits_type<A>>(std::uint64_t{1} << 63)
                                                                  : static_cast<bits_type<A>>(0x80000000u);

/// The bits of the exponent in A's word: those of infinity.
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

} // namespace taskvec::inline TASKVEC_ABI
