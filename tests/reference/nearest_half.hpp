// The 16-bit number nearest to a number.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>

namespace reference {

// Plain and slow: the 16-bit value nearest to `exact`, ties to the even word, by trying the neighbours.
template <class Widen>
std::uint16_t nearest(double exact, Widen widen, std::uint16_t infinity)
{
    const std::uint16_t sign = std::signbit(exact) ? 0x8000 : 0;
    const double magnitude = std::fabs(exact);
    std::uint16_t low = 0, high = infinity; // positive words are ordered as their values are
    while (high - low > 1) {
        const auto middle = static_cast<std::uint16_t>((low + high) / 2);
        (static_cast<double>(widen(middle)) <= magnitude ? low : high) = middle;
    }
    const double below = widen(low);
    // Infinity stands where the next finite value would be.
    const double above = high == infinity ? 2 * below - static_cast<double>(widen(static_cast<std::uint16_t>(low - 1)))
                                          : static_cast<double>(widen(high));
    const double down = magnitude - below, up = above - magnitude;
    const std::uint16_t word = down < up ? low : up < down ? high : low % 2 == 0 ? low : high;
    return static_cast<std::uint16_t>(word | sign);
}

} // namespace reference
