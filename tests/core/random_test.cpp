// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/random.hpp>

#include <doctest/doctest.h>

#include <cmath>

using namespace taskvec;

TEST_CASE("Philox4x32-10's published answers")
{
    using words = std::array<std::uint32_t, 4>;
    CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == words{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
    CHECK(philox4x32({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}) == words{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
    CHECK(philox4x32({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, {0xa4093822u, 0x299f31d0u})
        == words{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

TEST_CASE("a draw is a function of seed, task, name and index alone")
{
    const random_stream stream(1, 2, "layer.weight"), again(1, 2, "layer.weight");
    for (const std::uint64_t index : {0ull, 1ull, 5ull, 1ull << 33, (1ull << 40) + 3}) {
        CHECK(stream.word(index) == again.word(index));
        CHECK(stream.word(index) == stream.words(index / 4)[index % 4]);
        CHECK(stream.word(index) != random_stream(2, 2, "layer.weight").word(index));
        CHECK(stream.word(index) != random_stream(1, 3, "layer.weight").word(index));
        CHECK(stream.word(index) != random_stream(1, 2, "layer.bias").word(index));
    }
    CHECK(stream.word(1) != stream.word(1 + (1ull << 34))); // the counter's high word counts
}

TEST_CASE("uniform and normal draws have the moments they should")
{
    const random_stream stream(11, 0, "x");
    constexpr int n = 1 << 18;
    double uniform = 0, mean = 0, square = 0, fourth = 0, pair = 0;
    for (int i = 0; i < n; ++i) {
        const double u = stream.uniform(i), z = stream.normal(i);
        REQUIRE((u >= 0 && u < 1));
        REQUIRE(std::isfinite(z));
        uniform += u;
        mean += z;
        square += z * z;
        fourth += z * z * z * z;
        pair += z * stream.normal(i ^ 1);
    }
    CHECK(uniform / n == doctest::Approx(0.5).epsilon(0.01));
    CHECK(std::fabs(mean / n) < 0.01);
    CHECK(square / n == doctest::Approx(1).epsilon(0.02));
    CHECK(fourth / n == doctest::Approx(3).epsilon(0.05));
    CHECK(std::fabs(pair / n) < 0.02);
}

TEST_CASE("keep_below keeps all at 1, and a share of density otherwise")
{
    CHECK(keep_below(1.0) == 0x100000000ull);
    CHECK(keep_below(0.5) == 0x80000000ull);
    CHECK(keep_below(0.0) == 0);
    const random_stream stream(5, 0, "x");
    int kept = 0;
    for (int i = 0; i < 100'000; ++i) { kept += stream.word(i) < keep_below(0.3); }
    CHECK(kept == doctest::Approx(30'000).epsilon(0.02));
}
