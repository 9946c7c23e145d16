// SPDX-License-Identifier: Apache-2.0
#include "../reference/every_width.hpp"

#include <taskvec/core/random_words.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

using namespace taskvec;

TEST_CASE("many random words are those of one at a time, at every width, across a counter's words, and no word more")
{
    constexpr std::int32_t untouched = 77;
    const random_stream stream(0x0123456789abcdefu, 3);
    for (const std::uint64_t first : {0ull, 5ull, 0xfffffffaull, 0x123456789abcull}) {
        for (const std::size_t blocks : {0, 1, 2, 3, 7, 8, 9, 16, 31, 64}) {
            CAPTURE(first);
            CAPTURE(blocks);
            const std::size_t half = 2 * blocks + 3;
            std::vector<std::int32_t> row(4 * blocks + 16, untouched), halves(2 * half + 16, untouched);
            testing::with_every_width(
                kernels::random_words_kernel<word_order::in_sequence>{stream, first, blocks, row.data(), 0},
                [&](int bytes) {
                    CAPTURE(bytes);
                    for (std::size_t i = 0; i < 4 * blocks; ++i) {
                        REQUIRE(std::int64_t{row[i]} + (std::int64_t{1} << 31) == stream.word(4 * first + i));
                    }
                    for (std::size_t i = 4 * blocks; i < row.size(); ++i) { REQUIRE(row[i] == untouched); }
                    row.assign(row.size(), untouched);
                });
            testing::with_every_width(
                kernels::random_words_kernel<word_order::halves>{stream, first, blocks, halves.data(), half},
                [&](int bytes) {
                    CAPTURE(bytes);
                    for (std::size_t i = 0; i < 4 * blocks; ++i) {
                        REQUIRE(std::int64_t{halves[i % 2 * half + i / 2]} + (std::int64_t{1} << 31)
                            == stream.word(4 * first + i));
                    }
                    for (std::size_t i = 2 * blocks; i < half; ++i) { REQUIRE(halves[i] == untouched); }
                    for (std::size_t i = half + 2 * blocks; i < halves.size(); ++i) { REQUIRE(halves[i] == untouched); }
                    halves.assign(halves.size(), untouched);
                });
        }
    }
}
