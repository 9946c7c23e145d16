// Random words of many elements at once: what random_stream gives one by one, in vectors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/instruction_set.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/core/random.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// Where the words of consecutive elements go.
enum class word_order : std::uint8_t {
    in_sequence, ///< one behind the other
    halves ///< those of even elements, and after `half` words those of odd ones: as stored_pack takes 16-bit types
           ///< apart
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// The words of 4·blocks elements from 4·first on, less 2³¹. Philox is computed on one lane of 64 bits for each block,
/// whose lower half holds a word of the counter.
template <word_order order>
struct random_words_kernel {
    random_stream stream;
    std::uint64_t first;
    std::size_t blocks;
    std::int32_t* words;
    std::size_t half; ///< words before those of odd elements

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t block = 0;
#if TASKVEC_VECTORS() && defined(__x86_64__)
        if constexpr (bytes > 0) { block = vectors<bytes>(); }
#endif
        for (; block < blocks; ++block) {
            const auto four = stream.words(first + block);
            for (std::size_t j = 0; j < 4; ++j) {
                const auto word = static_cast<std::int32_t>(four[j] ^ 0x80000000u);
                if constexpr (order == word_order::in_sequence) { words[4 * block + j] = word; }
                else {
                    words[j % 2 * half + 2 * block + j / 2] = word;
                }
            }
        }
    }

private:
#if TASKVEC_VECTORS() && defined(__x86_64__)
    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE std::size_t vectors() const
    {
        using lanes = typename taskvec::detail::vector_of<std::uint64_t, bytes>::type;
        constexpr std::size_t width = sizeof(lanes) / sizeof(std::uint64_t);
        constexpr std::uint64_t lower = 0xffffffffu, signs = 0x8000000080000000u;
        lanes keys[2][philox_rounds], place{};
        auto key = stream.key();
        for (int round = 0; round < philox_rounds; ++round) {
            keys[0][round] = lanes{} + key[0];
            keys[1][round] = lanes{} + key[1];
            key = next_philox_key(key);
        }
        for (std::size_t lane = 0; lane < width; ++lane) { place[lane] = first + lane; }
        const lanes by_first = lanes{} + std::uint64_t{philox_multipliers[0]},
                    by_second = lanes{} + std::uint64_t{philox_multipliers[1]};
        std::size_t block = 0;
        for (; block + width <= blocks; block += width) {
            lanes c0 = place, c1 = place >> 32, c2 = lanes{} + std::uint64_t{stream.task()}, c3{};
            TASKVEC_UNROLL(10)
            for (int round = 0; round < philox_rounds; ++round) {
                lanes a = c0, b = c2;
                multiply_lower(a, by_first);
                multiply_lower(b, by_second);
                c0 = (b >> 32) ^ c1 ^ keys[0][round];
                c1 = b;
                c2 = (a >> 32) ^ c3 ^ keys[1][round];
                c3 = a;
            }
            if constexpr (order == word_order::in_sequence) {
                const lanes front = (((c0 & lower) | (c1 << 32)) ^ signs), back = (((c2 & lower) | (c3 << 32)) ^ signs);
                std::int32_t* const out = words + 4 * block;
                if constexpr (bytes == 64) {
                    put(__builtin_shufflevector(front, back, 0, 8, 1, 9, 2, 10, 3, 11), out);
                    put(__builtin_shufflevector(front, back, 4, 12, 5, 13, 6, 14, 7, 15), out + 16);
                }
                else if constexpr (bytes == 32) {
                    put(__builtin_shufflevector(front, back, 0, 4, 1, 5), out);
                    put(__builtin_shufflevector(front, back, 2, 6, 3, 7), out + 8);
                }
                else {
                    put(__builtin_shufflevector(front, back, 0, 2), out);
                    put(__builtin_shufflevector(front, back, 1, 3), out + 4);
                }
            }
            else {
                put(((c0 & lower) | (c2 << 32)) ^ signs, words + 2 * block);
                put(((c1 & lower) | (c3 << 32)) ^ signs, words + half + 2 * block);
            }
            place = place + width;
        }
        return block;
    }
    template <class Lanes>
    static TASKVEC_INLINE void put(const Lanes& x, std::int32_t* out) noexcept
    {
        using anywhere = typename taskvec::detail::vector_of<std::uint64_t, sizeof(Lanes)>::anywhere;
        *reinterpret_cast<anywhere*>(out) = x;
    }
    /// x becomes the product of its lanes' lower halves with those of y. (g++ 12 would multiply whole lanes.)
    template <class Lanes>
    static TASKVEC_INLINE void multiply_lower(Lanes& x, const Lanes& y) noexcept
    {
#if defined(__clang__)
        x = (x & 0xffffffffu) * (y & 0xffffffffu);
#else
        if constexpr (sizeof(Lanes) == 16) { asm("pmuludq %1, %0" : "+x"(x) : "x"(y)); }
        else {
            asm("vpmuludq %1, %0, %0" : "+v"(x) : "v"(y));
        }
#endif
    }
#endif
};

TASKVEC_KERNELS_END

} // namespace kernels

/// out[i] = stream.word(4·first + i) − 2³¹ for i < 4·blocks: the same words on every processor. In halves, `half` words
/// lie before those of odd elements. Cost: about a seventh of word() of each.
///
///     std::int32_t words[64];
///     random_words<word_order::in_sequence>(random_stream(7, 0, "layer.weight"), 0, 16, words);
template <word_order order>
void random_words(
    const random_stream& stream, std::uint64_t first, std::size_t blocks, std::int32_t* out, std::size_t half = 0)
{
    kernels::run_widest(kernels::random_words_kernel<order>{stream, first, blocks, out, half});
}

} // namespace taskvec::inline TASKVEC_ABI
