// Selection by magnitude as elementwise functors: histograms of magnitude bits, counts of equals, trimming.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/elements.hpp>
#include <taskvec/models/block.hpp>
#include <taskvec/select/top_k.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::elementwise {

/// What a pass over magnitudes asks of a task vector: those whose bits begin with `prefix` (or, at the end, are equal
/// to it).
template <arithmetic_element A>
struct magnitude_prefix {
    bits_type<A> prefix = 0;
    bool active = false;
};

/// Magnitude bits that one histogram tells apart.
inline constexpr unsigned histogram_bits = 11;
inline constexpr std::size_t histogram_bins = std::size_t{1} << histogram_bits;

TASKVEC_KERNELS_BEGIN

/// For each task vector, counts the entries whose magnitude begins with its prefix by the next `width` bits, above
/// `shift`. bins[(copy·T + t)·histogram_bins + bin]: workers share `copies` copies, so that few meet in one place.
/// Magnitudes compare in A, the tensor computes in B.
template <arithmetic_element A, arithmetic_element B>
struct magnitude_histogram {
    device_piece piece;
    const magnitude_prefix<A>* wanted;
    unsigned shift, width;
    counter* bins;
    std::size_t copies;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        counter* const mine = bins + at.worker % copies * piece.tasks * histogram_bins;
        const auto mask = static_cast<bits_type<A>>((bits_type<A>{1} << width) - 1);
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            const B base = origin<B>(piece, i, flag);
            for (std::size_t t = 0; t < piece.tasks; ++t) {
                if (!wanted[t].active) { continue; }
                const auto upper =
                    static_cast<bits_type<A>>(magnitude_bits(static_cast<A>(delta(piece, t, i, base, flag))) >> shift);
                if (static_cast<bits_type<A>>(upper >> width) == wanted[t].prefix) {
                    atomic_add(mine + t * histogram_bins + (upper & mask), 1);
                }
            }
        }
    }
};

/// bins[k] += the other copies of it.
struct add_copies {
    counter* bins;
    std::size_t size, copies; // of one copy

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            counter total = bins[k];
            for (std::size_t copy = 1; copy < copies; ++copy) { total += bins[copy * size + k]; }
            bins[k] = total;
        }
    }
};

/// counts[t·blocks + block] += the entries of task vector t whose magnitude is its prefix, for blocks of block_size
/// elements of a tensor.
template <arithmetic_element A, arithmetic_element B>
struct equal_counts {
    device_piece piece;
    const magnitude_prefix<A>* wanted;
    counter* counts;
    std::uint64_t blocks, first_block; // of all tensors; of this one
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            const B base = origin<B>(piece, i, flag);
            for (std::size_t t = 0; t < piece.tasks; ++t) {
                if (wanted[t].active
                    && magnitude_bits(static_cast<A>(delta(piece, t, i, base, flag))) == wanted[t].prefix) {
                    atomic_add(counts + t * blocks + first_block + (piece.offset + i) / block_size, 1);
                }
            }
        }
    }
};

/// *place = that of the wanted-th entry of a task vector among [begin, end) whose magnitude is `magnitude`. A walk of
/// one worker.
template <arithmetic_element A, arithmetic_element B>
struct nth_equal {
    device_piece piece;
    std::size_t task;
    bits_type<A> magnitude;
    std::uint64_t begin, end, wanted;
    counter* place;

    TASKVEC_FUNCTOR void operator()(const indices&) const
    {
        TASKVEC_STRICT_FP
        std::uint64_t left = wanted;
        for (std::uint64_t i = begin; i < end && left > 0; ++i) {
            const B base = origin<B>(piece, i, nullptr);
            if (magnitude_bits(static_cast<A>(delta(piece, task, i, base, nullptr))) == magnitude && --left == 0) {
                *place = piece.position + i;
            }
        }
    }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI::elementwise
