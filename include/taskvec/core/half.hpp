// The 16-bit storage types bf16 and f16: two bytes each, no arithmetic of their own.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/storage_traits.hpp>

#include <cstdint>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_KERNELS_BEGIN

/// A bfloat16 number (the upper half of an f32) as its 16 bits. Only stored: arithmetic runs in f32. Numbers become a
/// bf16 by one rounding, to nearest even; a bf16 becomes a float exactly. Comparison compares the numbers: NaN equals
/// nothing, −0 equals +0. Trivial: not initialised unless by `bf16{}`, which is 0. It may alias other types of the same
/// bits (Eigen::bfloat16, std::bfloat16_t, std::uint16_t).
///
///     const taskvec::bf16 x(1.5f), y = taskvec::bf16::from_bits(0x3fc0);
///     const bool same = x == y && static_cast<float>(y) == 1.5f;
struct TASKVEC_MAY_ALIAS bf16 {
    std::uint16_t word; ///< the bits

    bf16() = default;
    /// Rounds once, to nearest even.
    TASKVEC_HOST_DEVICE explicit constexpr bf16(float value) noexcept
        : word(f32_to_bf16(value))
    { }
    /// The same of any number, rounded once: by way of f64, never twice.
    template <class Number>
        requires std::is_arithmetic_v<Number>
    TASKVEC_HOST_DEVICE explicit constexpr bf16(Number value) noexcept
        : word(f32_to_bf16(f64_to_f32_odd(static_cast<double>(value))))
    { }
    /// The number of these bits.
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr bf16 from_bits(std::uint16_t bits) noexcept
    {
        return reinterpret_bits<bf16>(bits);
    }
    /// Exact.
    [[nodiscard]] TASKVEC_HOST_DEVICE explicit constexpr operator float() const noexcept { return bf16_to_f32(word); }
    /// Exact.
    [[nodiscard]] TASKVEC_HOST_DEVICE explicit constexpr operator double() const noexcept { return bf16_to_f32(word); }
    [[nodiscard]] TASKVEC_HOST_DEVICE friend constexpr bool operator==(bf16 x, bf16 y) noexcept
    {
        return bf16_to_f32(x.word) == bf16_to_f32(y.word);
    }
};

/// An IEEE half-precision number as its 16 bits. Otherwise as bf16; what is above 65504 rounds to infinity as IEEE has
/// it. May alias Eigen::half, std::float16_t, std::uint16_t.
struct TASKVEC_MAY_ALIAS f16 {
    std::uint16_t word; ///< the bits

    f16() = default;
    /// Rounds once, to nearest even.
    TASKVEC_HOST_DEVICE explicit constexpr f16(float value) noexcept
        : word(f32_to_f16(value))
    { }
    /// The same of any number, rounded once: by way of f64, never twice.
    template <class Number>
        requires std::is_arithmetic_v<Number>
    TASKVEC_HOST_DEVICE explicit constexpr f16(Number value) noexcept
        : word(f32_to_f16(f64_to_f32_odd(static_cast<double>(value))))
    { }
    /// The number of these bits.
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr f16 from_bits(std::uint16_t bits) noexcept
    {
        return reinterpret_bits<f16>(bits);
    }
    /// Exact.
    [[nodiscard]] TASKVEC_HOST_DEVICE explicit constexpr operator float() const noexcept { return f16_to_f32(word); }
    /// Exact.
    [[nodiscard]] TASKVEC_HOST_DEVICE explicit constexpr operator double() const noexcept { return f16_to_f32(word); }
    [[nodiscard]] TASKVEC_HOST_DEVICE friend constexpr bool operator==(f16 x, f16 y) noexcept
    {
        return f16_to_f32(x.word) == f16_to_f32(y.word);
    }
};

template <>
struct storage_traits<bf16> {
    using word = std::uint16_t;
    using arithmetic = float;
    static constexpr taskvec::dtype dtype = taskvec::dtype::bf16;
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr float widen(word stored) noexcept { return bf16_to_f32(stored); }
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr word narrow(float value) noexcept { return f32_to_bf16(value); }
};

template <>
struct storage_traits<f16> {
    using word = std::uint16_t;
    using arithmetic = float;
    static constexpr taskvec::dtype dtype = taskvec::dtype::f16;
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr float widen(word stored) noexcept { return f16_to_f32(stored); }
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr word narrow(float value) noexcept { return f32_to_f16(value); }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI
