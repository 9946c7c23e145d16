// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/storage.hpp>

#include <reference/nearest_half.hpp>

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <type_traits>

using namespace taskvec;
using reference::nearest;

TEST_CASE("the storage types are f64, f32, bf16 and f16, and messages name them from the list")
{
    CHECK(is_storage(dtype::f16));
    CHECK_FALSE(is_storage(dtype::i32));
    CHECK_FALSE(is_storage(dtype::f8_e4m3));
    CHECK(storage_names() == "F64, F32, BF16 or F16");
    CHECK(storage_element<bf16>);
    CHECK_FALSE(storage_element<std::uint16_t>);
    CHECK_FALSE(storage_element<const float>);
    CHECK(std::is_same_v<arithmetic_type<double>, double>);
    CHECK(std::is_same_v<arithmetic_type<f16>, float>);
    CHECK(dtype_of<bf16> == dtype::bf16);
}

TEST_CASE("the 16-bit types are trivial, two bytes, and convert by one rounding")
{
    CHECK(std::is_trivial_v<bf16>);
    CHECK(std::is_trivial_v<f16>);
    CHECK(sizeof(bf16) == 2);
    CHECK(alignof(f16) == 2);
    CHECK_FALSE(std::is_convertible_v<float, bf16>);
    CHECK_FALSE(std::is_convertible_v<f16, float>);
    CHECK(bf16{}.word == 0);
    CHECK(f16{}.word == 0);
    CHECK(bf16(1.5f).word == 0x3fc0);
    CHECK(f16(-2).word == 0xc000);
    CHECK(bf16(1 + 0x1p-8 + 0x1p-40).word == 0x3f81); // from a double: not by way of a float
    CHECK(f16(-(1 + 0x1p-11 + 0x1p-50)).word == 0xbc01);
    CHECK(static_cast<float>(bf16::from_bits(0x3fc0)) == 1.5f);
    CHECK(static_cast<double>(f16::from_bits(0x3e00)) == 1.5);
    CHECK(bf16(0.0f) == bf16(-0.0f));
    CHECK(f16(2.0f) != f16(3.0f));
    CHECK_FALSE(f16::from_bits(0x7e00) == f16::from_bits(0x7e00));
    constexpr bf16 constant(0.5f);
    static_assert(constant.word == 0x3f00);
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
        "tensor 'w' has dtype I64; expected F64, F32, BF16 or F16: exclude it or convert it first", dtype_mismatch);
}
