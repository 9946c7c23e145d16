// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/float_bits.hpp>

#include <reference/nearest_half.hpp>

#include <Eigen/Core>

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

using namespace taskvec;
using reference::nearest;

TEST_CASE("every 16-bit word widens to the value that Eigen gives it, and narrows back to itself")
{
    for (std::uint32_t i = 0; i < 0x10000; ++i) {
        const auto word = static_cast<std::uint16_t>(i);
        const float wide_bf16 = bf16_to_f32(word), wide_f16 = f16_to_f32(word);
        const float eigen_bf16 = static_cast<float>(std::bit_cast<Eigen::bfloat16>(word)),
                    eigen_f16 = static_cast<float>(std::bit_cast<Eigen::half>(word));
        const bool same_bf16 = std::isnan(wide_bf16)
            ? std::isnan(eigen_bf16)
            : std::bit_cast<std::uint32_t>(wide_bf16) == std::bit_cast<std::uint32_t>(eigen_bf16);
        const bool same_f16 = std::isnan(wide_f16)
            ? std::isnan(eigen_f16)
            : std::bit_cast<std::uint32_t>(wide_f16) == std::bit_cast<std::uint32_t>(eigen_f16);
        const std::uint16_t back_bf16 = f32_to_bf16(wide_bf16), back_f16 = f32_to_f16(wide_f16);
        const bool round_bf16 = back_bf16 == (std::isnan(wide_bf16) ? (word | 0x40) : word);
        const bool round_f16 = back_f16 == (std::isnan(wide_f16) ? (word | 0x200) : word);
        if (!(same_bf16 && same_f16 && round_bf16 && round_f16)) { FAIL_CHECK("word ", word); }
    }
}

TEST_CASE("f32 narrows to the nearest 16-bit value, ties to even")
{
    std::mt19937_64 random(1);
    const auto check = [](float value) {
        const std::uint16_t to_bf16 = f32_to_bf16(value), to_f16 = f32_to_f16(value);
        const std::uint16_t expected_bf16 = nearest(value, bf16_to_f32, 0x7f80),
                            expected_f16 = nearest(value, f16_to_f32, 0x7c00);
        if (to_bf16 != expected_bf16 || to_f16 != expected_f16) {
            FAIL_CHECK("value ", value, ": ", to_bf16, " ", expected_bf16, ", ", to_f16, " ", expected_f16);
        }
    };
    for (int i = 0; i < 200'000; ++i) {
        const auto value = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
        if (std::isfinite(value)) { check(value); }
        check(std::ldexp(static_cast<float>(random() % 0x4000) - 0x2000,
            static_cast<int>(random() % 50) - 35)); // f16's range, many ties
    }
    for (const float value : {0.0f, -0.0f, 65504.0f, 65519.996f, 65520.0f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, 0x1p-149f,
             0x1.ffp-15f, 3.4e38f, 3.3895314e38f}) {
        check(value);
        check(-value);
    }
    CHECK(f32_to_f16(std::numeric_limits<float>::infinity()) == 0x7c00);
    CHECK(f32_to_bf16(-std::numeric_limits<float>::infinity()) == 0xff80);
}

TEST_CASE("a NaN stays a NaN of its sign, even where its payload does not fit")
{
    for (const std::uint32_t word : {0x7f800001u, 0xff800001u, 0x7fc00000u, 0xffffffffu, 0x7f801000u}) {
        const auto value = std::bit_cast<float>(word);
        CHECK(std::isnan(bf16_to_f32(f32_to_bf16(value))));
        CHECK(std::isnan(f16_to_f32(f32_to_f16(value))));
        CHECK((f32_to_bf16(value) >> 15) == (word >> 31));
        CHECK((f32_to_f16(value) >> 15) == (word >> 31));
    }
}

TEST_CASE("magnitude bits are ordered as magnitudes are")
{
    CHECK(magnitude_bits(-2.0f) == magnitude_bits(2.0f));
    CHECK(magnitude_bits(-0.0) == 0);
    CHECK(magnitude_bits(1.0) < magnitude_bits(-1.5));
    CHECK(magnitude_bits(std::numeric_limits<float>::denorm_min()) == 1);
    CHECK(magnitude_bits(-std::numeric_limits<float>::infinity()) == exponent_mask<float>);
}
