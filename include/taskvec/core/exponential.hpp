// e^x and ln x of packs, by additions, products and quotients that round as IEEE's do: the same bits on every processor
// and with every C library.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/pack.hpp>

#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_KERNELS_BEGIN

/// e^x for x ≤ 709: within 2 units in the last place, 0 below −708, NaN of NaN. x = k·ln 2 + r with |r| ≤ ½·ln 2, and
/// e^r by its series up to r¹³/13!.
template <int bytes>
[[nodiscard]] TASKVEC_INLINE pack<double, bytes> exponential(const pack<double, bytes>& x) noexcept;

/// ln x of normal positive numbers: within 2 units in the last place, or 2^−53 beside 1. x = 2^k·m with √½ ≤ m < √2,
/// and ln m = 2·artanh s with s = (m − 1)/(m + 1), by its series up to s²¹/21.
template <int bytes>
[[nodiscard]] TASKVEC_INLINE pack<double, bytes> logarithm(const pack<double, bytes>& x) noexcept;

namespace detail {

/// ln 2 in two parts: products of the first with whole numbers up to 2^20 are exact.
inline constexpr double ln2_upper = 0x1.62e42feep-1, ln2_lower = 0x1.a39ef35793c76p-33;
/// Where 1/2 and its neighbours are the lowest bits of a f64's sum with it: what is added is rounded to a whole number.
inline constexpr double to_whole = 0x1.8p52;

} // namespace detail

template <int bytes>
TASKVEC_INLINE pack<double, bytes> exponential(const pack<double, bytes>& x) noexcept
{
    constexpr double of_series[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
        1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
    const auto shifted = x * 0x1.71547652b82fep0 + detail::to_whole; // k in the lowest bits
    const auto k = shifted - detail::to_whole;
    const auto r = (x - k * detail::ln2_upper) - k * detail::ln2_lower;
    auto series = filled<pack<double, bytes>>(of_series[0]);
    TASKVEC_UNROLL(13)
    for (int n = 1; n < 14; ++n) { series = series * r + of_series[n]; }
    const auto scaled = from_bits(bits_of(series) + (bits_of(shifted) << 52));
    return select(x == x, where(x >= -708.0, scaled), x);
}

template <int bytes>
TASKVEC_INLINE pack<double, bytes> logarithm(const pack<double, bytes>& x) noexcept
{
    constexpr std::int64_t root_of_half = 0x3fe6a09e667f3bcd, bias = std::int64_t{1024} << 52;
    const auto k = (bits_of(x) + (bias - root_of_half)) >> 52; // and 1024
    const auto m = from_bits(bits_of(x) - ((k + std::int64_t{-1024}) << 52));
    const auto exponent = from_bits(k | std::int64_t{0x4330000000000000}) - (0x1p52 + 1024);
    const auto s = (m - 1.0) / (m + 1.0), z = s * s;
    auto series = filled<pack<double, bytes>>(1.0 / 21);
    TASKVEC_UNROLL(10)
    for (int n = 19; n > 0; n -= 2) { series = series * z + 1.0 / n; }
    const auto doubled = s + s;
    return exponent * detail::ln2_upper + (doubled * series + exponent * detail::ln2_lower);
}

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI
