// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/dtype.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

using namespace taskvec;

namespace {

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

} // namespace

TEST_CASE("names and sizes are safetensors' and round-trip")
{
    for (const auto& row : detail::dtype_table) {
        CHECK(detail::dtype_table[static_cast<std::size_t>(row.type)].name == row.name);
        CHECK(parse_dtype(name(row.type)) == row.type);
    }
    CHECK(name(dtype::bf16) == "BF16");
    CHECK(bits(dtype::f6_e2m3) == 6);
    CHECK(bits(dtype::c64) == 64);
    CHECK_FALSE(parse_dtype("bf16").has_value());
    CHECK_FALSE(parse_dtype("").has_value());
    CHECK(is_storage(dtype::f16));
    CHECK_FALSE(is_storage(dtype::i32));
    CHECK(is_fp8(dtype::f8_e5m2));
    CHECK_FALSE(is_fp8(dtype::u8));
}

TEST_CASE("every 16-bit word widens to the value that Eigen gives it, and narrows back to itself")
{
    for (std::uint32_t i = 0; i < 0x10000; ++i) {
        const auto word = static_cast<std::uint16_t>(i);
        const float wide_bf16 = bf16_to_f32(word), wide_f16 = f16_to_f32(word);
        const float eigen_bf16 = static_cast<float>(std::bit_cast<bf16>(word)),
                    eigen_f16 = static_cast<float>(std::bit_cast<f16>(word));
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

TEST_CASE("f64 narrows to 16 bits in one rounding, where two would err")
{
    // Just above the middle of 1 and 1 + 2^-7 (bf16) or 1 + 2^-10 (f16), by less than f32 can see.
    CHECK(std::bit_cast<std::uint16_t>(narrow<bf16>(1 + 0x1p-8 + 0x1p-40)) == 0x3f81);
    CHECK(std::bit_cast<std::uint16_t>(narrow<bf16>(1 + 0x1p-8 - 0x1p-40)) == 0x3f80);
    CHECK(std::bit_cast<std::uint16_t>(narrow<f16>(-(1 + 0x1p-11 + 0x1p-50))) == 0xbc01);
    CHECK(std::bit_cast<std::uint16_t>(narrow<f16>(-(1 + 0x1p-11))) == 0xbc00);

    std::mt19937_64 random(2);
    for (int i = 0; i < 200'000; ++i) {
        double value =
            std::ldexp(static_cast<double>(random() % 0x2000) + 0x1000, static_cast<int>(random() % 40) - 35);
        value += std::ldexp(value, -30 - static_cast<int>(random() % 20)) * (static_cast<int>(random() % 3) - 1);
        if (random() % 2) { value = -value; }
        const auto to_bf16 = std::bit_cast<std::uint16_t>(narrow<bf16>(value)),
                   to_f16 = std::bit_cast<std::uint16_t>(narrow<f16>(value));
        if (to_bf16 != nearest(value, bf16_to_f32, 0x7f80) || to_f16 != nearest(value, f16_to_f32, 0x7c00)) {
            FAIL_CHECK("value ", value);
        }
    }
    CHECK(narrow<float>(1e300) == std::numeric_limits<float>::infinity());
    CHECK(std::isnan(narrow<float>(std::numeric_limits<double>::quiet_NaN())));
}

TEST_CASE("magnitude bits are ordered as magnitudes are")
{
    CHECK(magnitude_bits(-2.0f) == magnitude_bits(2.0f));
    CHECK(magnitude_bits(-0.0) == 0);
    CHECK(magnitude_bits(1.0) < magnitude_bits(-1.5));
    CHECK(magnitude_bits(std::numeric_limits<float>::denorm_min()) == 1);
    CHECK(magnitude_bits(-std::numeric_limits<float>::infinity()) == exponent_mask<float>);
}

TEST_CASE("visiting a dtype gives its type, and others are an error that names the tensor")
{
    const auto width = [](dtype type) {
        return visit_storage(type, "w", [](auto tag) { return sizeof(typename decltype(tag)::type); });
    };
    CHECK(width(dtype::f64) == 8);
    CHECK(width(dtype::f32) == 4);
    CHECK(width(dtype::bf16) == 2);
    CHECK(width(dtype::f16) == 2);
    CHECK_THROWS_WITH_AS(width(dtype::i64),
        "tensor 'w' has dtype I64; expected one of F64, F32, BF16, F16: exclude it or convert it first",
        dtype_mismatch);
}
