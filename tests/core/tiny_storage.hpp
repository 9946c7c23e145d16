// Storage types that a program brings: eight bits with a sign, four of exponent and three of mantissa, no infinity and
// no −0 (F8_E4M3FNUZ), and eight bits of a dtype that is read as f32 where no type stands for it. Plain and slow.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/half.hpp>
#include <taskvec/core/storage_traits.hpp>

#include <cstdint>

namespace tests {
struct tiny {
    std::uint8_t word;
};
/// The upper half of an f16 (F8_E5M2); what is below it is left off.
struct coarse {
    std::uint8_t word;
};
} // namespace tests

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_KERNELS_BEGIN

template <>
struct storage_traits<tests::tiny> {
    using word = std::uint8_t;
    using arithmetic = float;
    static constexpr taskvec::dtype dtype = taskvec::dtype::f8_e4m3fnuz;
    static constexpr std::uint8_t nan = 0x80, largest = 0x7f;

    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr float widen(word stored) noexcept
    {
        if (stored == nan) { return __builtin_nanf(""); }
        const int exponent = (stored >> 3) & 15;
        float value = static_cast<float>(exponent == 0 ? stored & 7 : 8 + (stored & 7)) * 0x1p-10f; // 2^(1 − 8 − 3)
        for (int e = 1; e < exponent; ++e) { value *= 2; }
        return stored & 0x80 ? -value : value;
    }
    /// What is nearer to 256 than to 240 is NaN: there is no infinity.
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr word narrow(float value) noexcept
    {
        const bool negative = value < 0;
        const float magnitude = negative ? -value : value;
        if (!(magnitude < 248)) { return nan; }
        word best = 0;
        for (word code = 0;; ++code) {
            const float here = widen(code) - magnitude, there = widen(best) - magnitude;
            const float distance = here < 0 ? -here : here, least = there < 0 ? -there : there;
            if (distance < least || (distance == least && code % 2 == 0)) { best = code; }
            if (code == largest) { break; }
        }
        return best == 0 || !negative ? best : static_cast<word>(best | 0x80);
    }
};

template <>
struct storage_traits<tests::coarse> {
    using word = std::uint8_t;
    using arithmetic = float;
    static constexpr taskvec::dtype dtype = taskvec::dtype::f8_e5m2;

    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr float widen(word stored) noexcept
    {
        return storage_traits<f16>::widen(static_cast<std::uint16_t>(stored << 8));
    }
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr word narrow(float value) noexcept
    {
        return static_cast<word>(storage_traits<f16>::narrow(value) >> 8);
    }
};

TASKVEC_KERNELS_END

using more_storage_types = storage_list<tests::tiny, tests::coarse>;

} // namespace taskvec::inline TASKVEC_ABI
