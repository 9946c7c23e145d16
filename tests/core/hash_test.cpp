// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/hash.hpp>

#include <doctest/doctest.h>

#include <random>
#include <string>

using namespace taskvec;

TEST_CASE("published XXH64 values")
{
    CHECK(hash64("") == 0xEF46DB3751D8E999ull);
    CHECK(hash64("abc") == 0x44BC2CF5AD770999ull);
    CHECK(hash64("Nobody inspects the spammish repetition") == 0xFBCEA83C8A378BF1ull);
    // Whole stripes and none, words of eight and of four bytes, and single ones behind them.
    CHECK(hash64("The quick brown fox jumps") == 0x1EB61388311E1536ull);
    CHECK(hash64("The quick brown fox jumps over the lazy dog") == 0x0B242D361FDA71BCull);
    CHECK(hash64("xxhash", 20141025) == 0xB559B98D844E0635ull);
}

TEST_CASE("the hash depends on the bytes, not on how they were split")
{
    std::mt19937 random(3);
    std::string text(1000, '\0');
    for (auto& c : text) { c = static_cast<char>(random()); }
    for (int trial = 0; trial < 200; ++trial) {
        const std::string_view part = std::string_view(text).substr(0, random() % text.size());
        xxh64 hash(7);
        for (std::size_t at = 0; at < part.size();) {
            const std::size_t step = std::min<std::size_t>(random() % 70, part.size() - at);
            hash.update(part.substr(at, step));
            at += step;
        }
        CHECK(hash.digest() == hash64(part, 7));
    }
    CHECK(hash64(text, 1) != hash64(text, 2));
}
