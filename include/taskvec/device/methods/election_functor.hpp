// Electing a sign and merging the entries that agree with it, as an elementwise functor: TIES and DARE-TIES on the gpu
// policy. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/random.hpp>
#include <taskvec/device/models/elements.hpp>
#include <taskvec/methods/sign_election.hpp>
#include <taskvec/select/top_k.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::elementwise {

/// Where elections of a tensor are counted: `slots` copies of [Σ of signs, unresolved, kept and conflicting of each
/// task].
inline constexpr std::size_t tally_slots = 64;
[[nodiscard]] constexpr std::size_t tally_size(std::size_t tasks, bool statistics) noexcept
{
    return statistics ? 2 + 2 * tasks : 2;
}

TASKVEC_KERNELS_BEGIN

/// Keeps the entries that a threshold keeps. thresholds[t] is that of task t.
template <arithmetic_element A>
struct keep_top {
    static constexpr bool by_packs = true;
    const top_k_threshold<A>* thresholds;

    [[nodiscard]] TASKVEC_HOST_DEVICE A operator()(
        std::size_t t, A value, std::uint64_t, std::uint64_t place) const noexcept
    {
        return thresholds[t].keeps(value, place) ? value : A{0};
    }
};

/// Keeps entries at random, divided by the density: element i of task t where its word is below `bound` (see
/// random_stream).
template <arithmetic_element A>
struct keep_at_random {
    static constexpr bool by_packs = false; // the draws take longer than the reads
    std::uint64_t key, bound;
    A density;

    [[nodiscard]] TASKVEC_HOST_DEVICE A operator()(
        std::size_t t, A value, std::uint64_t i, std::uint64_t) const noexcept
    {
        if (bound >> 32) { return value; } // everything is kept, and x / 1 is x
        const std::uint32_t word = random_stream(key, static_cast<std::uint32_t>(t)).word(i);
        return word < bound ? quotient(value, density) : A{0};
    }
};

/// What a worker saw of an election; added to the tally at its end.
struct election_counts {
    counter signs = 0, unresolved = 0; // modulo 2^64
};

/// θ0 + λ·τ, where τ merges what `keep` leaves of the task vectors: the operations of detail::elect_rows() in its
/// order. factors: T elect, T value, T divide, T agree. Every task is read once; what is kept of the first `held` stays
/// in registers, what is kept of others is computed again.
template <arithmetic_element A, class Keep>
struct elect_and_merge {
    device_piece piece;
    Keep keep;
    const A* factors;
    disjoint_merge how;
    A zero, lambda; // what a sum of 0 elects
    counter* tallies;
    bool statistics;
    counter* flag;

    static constexpr std::size_t held = 8;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        election_counts counts;
        counter* const tally = tally_of(at);
        for (std::uint64_t i = at.first; i < at.last; i += at.step) { one(i, tally, counts); }
        add(tally, counts);
    }

    [[nodiscard]] TASKVEC_HOST_DEVICE counter* tally_of(const indices& at) const noexcept
    {
        return tallies + at.worker % tally_slots * tally_size(piece.tasks, statistics);
    }
    static TASKVEC_HOST_DEVICE void add(counter* tally, const election_counts& counts) noexcept
    {
        if (counts.signs != 0) { atomic_add(tally, counts.signs); }
        if (counts.unresolved != 0) { atomic_add(tally + 1, counts.unresolved); }
    }

    /// Element i.
    TASKVEC_HOST_DEVICE void one(std::uint64_t i, counter* tally, election_counts& counts) const
    {
        const A base = origin<A>(piece, i, flag);
        A kept[held];
        for (std::size_t t = 0; t < held; ++t) {
            if (t < piece.tasks) { kept[t] = value(t, i, base, flag); }
        }
        store(piece.out, piece.out_dtype, i, merged(i, base, kept, tally, counts));
    }

    /// The merged element i, from its base and what is kept of the first tasks.
    [[nodiscard]] TASKVEC_HOST_DEVICE A merged(
        std::uint64_t i, A base, const A* kept, counter* tally, election_counts& counts) const
    {
        const std::size_t tasks = piece.tasks;
        A s = 0;
        bits_type<A> seen = 0;
        for (std::size_t t = 0; t < held; ++t) {
            if (t < tasks) { vote(t, kept[t], s, seen); }
        }
        for (std::size_t t = held; t < tasks; ++t) { vote(t, value(t, i, base, flag), s, seen); }
        const bool none = s == 0;
        counts.signs += static_cast<counter>(s > 0) - static_cast<counter>(s < 0);
        counts.unresolved += static_cast<counter>(none && seen != 0);
        A sign = s > 0 ? A{1} : s;
        sign = s < 0 ? A{-1} : sign;
        sign = none ? zero : sign;
        A total = 0, divisor = 0;
        for (std::size_t t = 0; t < held; ++t) {
            if (t < tasks) { join(t, kept[t], sign, total, divisor, tally); }
        }
        for (std::size_t t = held; t < tasks; ++t) { join(t, value(t, i, base, nullptr), sign, total, divisor, tally); }
        A change = quotient(total, divisor == 0 ? A{1} : divisor);
        change = sign == sign ? change : sign;
        return sum(base, product(lambda, change));
    }

    [[nodiscard]] TASKVEC_HOST_DEVICE A value(std::size_t t, std::uint64_t i, A base, counter* note_in) const
    {
        return keep(t, delta(piece, t, i, base, note_in), piece.offset + i, piece.position + i);
    }
    TASKVEC_HOST_DEVICE void vote(std::size_t t, A x, A& s, bits_type<A>& seen) const
    {
        s = sum(s, product(factors[t], x));
        seen |= magnitude_bits(x);
    }
    TASKVEC_HOST_DEVICE void join(std::size_t t, A x, A sign, A& total, A& divisor, counter* tally) const
    {
        const std::size_t tasks = piece.tasks;
        const bool agrees = product(product(factors[3 * tasks + t], x), sign) > 0;
        const A candidate = agrees ? product(factors[tasks + t], x) : A{0};
        if (how == disjoint_merge::max) {
            total = magnitude_bits(candidate) > magnitude_bits(total) ? candidate : total;
        }
        else {
            total = sum(total, candidate);
            divisor = sum(divisor, agrees && how == disjoint_merge::mean ? factors[2 * tasks + t] : A{0});
        }
        if (statistics && x != 0) {
            atomic_add(tally + 2 + t, 1);
            if (!agrees) { atomic_add(tally + 2 + tasks + t, 1); }
        }
    }
};

/// elect_and_merge over at most `held` tasks where everything is stored as T, by accesses of 16 bytes: the same
/// operations on every element.
template <storage_element T, class Keep>
struct elect_and_merge_packs {
    elect_and_merge<float, Keep> of_elements;

    /// The sweep is over packs.
    [[nodiscard]] static constexpr std::uint64_t packs(std::uint64_t size) noexcept
    {
        return (size + pack<T>::size - 1) / pack<T>::size;
    }

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        constexpr std::size_t held = elect_and_merge<float, Keep>::held;
        const device_piece& piece = of_elements.piece;
        election_counts counts;
        counter* const tally = of_elements.tally_of(at);
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t begin = k * pack<T>::size;
            if (begin + pack<T>::size > piece.size) {
                for (std::uint64_t i = begin; i < piece.size; ++i) { of_elements.one(i, tally, counts); }
                continue;
            }
            float base[pack<T>::size], kept[pack<T>::size][held], value[pack<T>::size];
            load_pack<T>(piece.operands[0], k, piece.position + begin, of_elements.flag, base);
            for (std::size_t t = 0; t < held; ++t) {
                if (t < piece.tasks) {
                    load_pack<T>(piece.operands[1 + t], k, piece.position + begin, of_elements.flag, value);
                    for (std::size_t j = 0; j < pack<T>::size; ++j) {
                        kept[j][t] = of_elements.keep(
                            t, difference(value[j], base[j]), piece.offset + begin + j, piece.position + begin + j);
                    }
                }
            }
            for (std::size_t j = 0; j < pack<T>::size; ++j) {
                value[j] = of_elements.merged(begin + j, base[j], kept[j], tally, counts);
            }
            store_pack<T>(piece.out, k, value);
        }
        of_elements.add(tally, counts);
    }
};

/// θ0 + λ·Σ weights[t]·(what is kept at random of task vector t). Four elements a time: one draw is four words. Where
/// `tallies` is not null, tally_slots copies of it count, for each task, the entries that are left and not 0.
template <arithmetic_element A>
struct random_linear_combination {
    device_piece piece;
    keep_at_random<A> keep;
    const A* weights;
    A lambda;
    counter *tallies, *flag;

    /// The sweep is over groups of four elements.
    [[nodiscard]] static constexpr std::uint64_t groups(std::uint64_t size) noexcept { return (size + 3) / 4; }

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t group = at.first; group < at.last; group += at.step) {
            const std::uint64_t begin = 4 * group;
            A base[4], total[4] = {};
            for (unsigned j = 0; j < 4; ++j) {
                base[j] = begin + j < piece.size ? origin<A>(piece, begin + j, flag) : A{0};
            }
            for (std::size_t t = 0; t < piece.tasks; ++t) {
                const auto words =
                    random_stream(keep.key, static_cast<std::uint32_t>(t)).words((piece.offset + begin) / 4);
                for (unsigned j = 0; j < 4; ++j) {
                    if (begin + j >= piece.size) { break; }
                    const A value = delta(piece, t, begin + j, base[j], flag);
                    const A kept = keep.bound >> 32 ? value
                        : words[j] < keep.bound     ? quotient(value, keep.density)
                                                    : A{0};
                    total[j] = sum(total[j], product(weights[t], kept));
                    if (tallies && kept != 0) { atomic_add(tallies + at.worker % tally_slots * piece.tasks + t, 1); }
                }
            }
            for (unsigned j = 0; j < 4; ++j) {
                if (begin + j < piece.size) {
                    store(piece.out, piece.out_dtype, begin + j, sum(base[j], product(lambda, total[j])));
                }
            }
        }
    }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI::elementwise
