// Electing a sign and merging the entries that agree with it: the second and third step of TIES, on rows of a block.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/kernels.hpp>
#include <taskvec/core/option_table.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How the entries whose sign was elected become one.
enum class disjoint_merge : std::uint8_t { mean, sum, max };

template <>
struct enum_words<disjoint_merge> {
    static constexpr std::array words{enum_word<disjoint_merge>{disjoint_merge::mean, "mean"},
        enum_word<disjoint_merge>{disjoint_merge::sum, "sum"}, enum_word<disjoint_merge>{disjoint_merge::max, "max"}};
};

/// The factors of one task in the election: in the sum that elects, in the value that is merged, in the divisor of the
/// mean, and in the test of agreement (where only its sign counts).
struct election_weights {
    std::vector<double> elect{}, value{}, divide{}, agree{};
};

/// What an election over one row saw.
struct election_tally {
    std::int64_t sign_sum = 0; ///< Σ of the signs of nonzero sums
    std::uint64_t unresolved = 0; ///< entries whose sum is exactly 0 while some task vector's entry is not
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Rows of the row-by-row election: the slow, general twin of elect_and_merge.
template <arithmetic_element A>
TASKVEC_NOINLINE void election_sum(
    A* TASKVEC_RESTRICT sum, A* TASKVEC_RESTRICT seen, const A* TASKVEC_RESTRICT x, A weight, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A product = weight * x[i];
        sum[i] = sum[i] + product;
        seen[i] = reinterpret_bits<A>(magnitude_bits(seen[i]) | magnitude_bits(x[i]));
    }
}

/// sign = the elected sign (1, −1, 0; NaN for a sum that is NaN). A sum of 0 elects `zero`.
template <arithmetic_element A>
TASKVEC_NOINLINE election_tally elect(A* TASKVEC_RESTRICT sum, const A* TASKVEC_RESTRICT seen, A zero, std::size_t n)
{
    using word = std::make_signed_t<bits_type<A>>;
    word signs = 0, unresolved = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const A s = sum[i];
        const bool positive = s > 0, negative = s < 0, none = s == 0;
        signs += static_cast<word>(positive) - static_cast<word>(negative);
        unresolved += static_cast<word>(none & (magnitude_bits(seen[i]) != 0));
        A sign = positive ? A{1} : s;
        sign = negative ? A{-1} : sign;
        sum[i] = none ? zero : sign;
    }
    return {signs, static_cast<std::uint64_t>(unresolved)};
}

template <arithmetic_element A>
TASKVEC_NOINLINE void merge_agreeing(A* TASKVEC_RESTRICT total, A* TASKVEC_RESTRICT divisor,
    const A* TASKVEC_RESTRICT sign, const A* TASKVEC_RESTRICT x, A value, A divide, A agree, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A side = agree * x[i];
        const A test = side * sign[i];
        const A product = value * x[i];
        total[i] = total[i] + (test > 0 ? product : A{0});
        divisor[i] = divisor[i] + (test > 0 ? divide : A{0});
    }
}

template <arithmetic_element A>
TASKVEC_NOINLINE void largest_agreeing(A* TASKVEC_RESTRICT largest, const A* TASKVEC_RESTRICT sign,
    const A* TASKVEC_RESTRICT x, A value, A agree, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A side = agree * x[i];
        const A test = side * sign[i];
        const A product = value * x[i];
        const A candidate = test > 0 ? product : A{0};
        largest[i] = magnitude_bits(candidate) > magnitude_bits(largest[i]) ? candidate : largest[i];
    }
}

/// total / divisor (a divisor of 0 counts as 1); a NaN sign spreads.
template <arithmetic_element A>
TASKVEC_NOINLINE void finish_mean(
    A* TASKVEC_RESTRICT total, const A* TASKVEC_RESTRICT divisor, const A* TASKVEC_RESTRICT sign, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) {
        const A by = divisor[i] == 0 ? A{1} : divisor[i];
        const A mean = total[i] / by;
        total[i] = sign[i] == sign[i] ? mean : sign[i];
    }
}

/// Counts the nonzero entries of a row, and those of them that do not agree with the elected sign.
template <arithmetic_element A>
TASKVEC_NOINLINE std::uint32_t count_conflicts(
    const A* TASKVEC_RESTRICT sign, const A* TASKVEC_RESTRICT x, A agree, std::size_t n, std::uint32_t& kept)
{
    TASKVEC_STRICT_FP
    using word = std::make_signed_t<bits_type<A>>;
    word nonzero = 0, agreeing = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const A side = agree * x[i];
        const A test = side * sign[i];
        nonzero += x[i] != 0;
        agreeing += test > 0;
    }
    kept = static_cast<std::uint32_t>(nonzero);
    return static_cast<std::uint32_t>(nonzero - agreeing);
}

/// What a fused election adds up: Σ of the signs' bits (−1 for minus), entries whose sum is 0, those of them that some
/// entry is not, and the largest magnitude bits of a sum.
struct election_counts {
    std::int32_t negative = 0, zero = 0, unresolved = 0, top = 0;
};

/// TIES in one loop over the stored words of N tasks, for weights that are all 1: difference, trim, election, mean and
/// λ, with nothing but the result leaving the registers. The same operations in the same order as the row-by-row
/// kernels, but for products by 1 and sums with a 0 that cannot change a bit. For finite sums only: counts.top tells,
/// and NaN or infinity in an input cannot but reach it. Works off whole strips; what fills the last one up must be
/// zeros. least[t] ≥ 1: the magnitude bits that an entry of task t must reach to be kept. zero: what a sum of 0 elects.
template <storage_element T, std::size_t N>
TASKVEC_NOINLINE void elect_stored(const step_word* const* tasks, const step_word* TASKVEC_RESTRICT base,
    const std::int32_t* least, float zero, float lambda, std::uint32_t* TASKVEC_RESTRICT out, std::size_t n,
    election_counts& counts)
{
    TASKVEC_STRICT_FP
    const step_word* x[N];
    std::int32_t bound[N];
    for (std::size_t t = 0; t < N; ++t) {
        x[t] = tasks[t];
        bound[t] = least[t];
    }
    const std::int32_t zero_side = zero < 0 ? -1 : 0;
    const std::int32_t zero_mean = zero != 0 ? -1 : 0; // of its bits, what a sum of 0 lets through
    // Of each step of a strip: the loop over a strip has no sum across its steps, and becomes straight code between two
    // fetches.
    alignas(64) std::int32_t negative[strip_steps]{}, zeros[strip_steps]{}, unresolved[strip_steps]{},
        top[strip_steps]{};
    for (std::size_t begin = 0; begin < n; begin += strip_steps) {
        for (std::size_t t = 0; t < N; ++t) { fetch_ahead<strip_steps>(x[t] + begin); }
        fetch_ahead<strip_steps>(base + begin);
        for (std::size_t j = 0; j < strip_steps; ++j) {
            std::uint32_t origins = base[begin + j], step[N], made = 0;
            for (std::size_t t = 0; t < N; ++t) { step[t] = x[t][begin + j]; }
#pragma GCC unroll 2
            for (std::size_t lane = 0; lane < step_width<T>; ++lane) {
                const float origin = step_value<T>(origins, lane);
                std::int32_t kept[N];
                float s = 0;
#pragma GCC unroll 8
                for (std::size_t t = 0; t < N; ++t) {
                    const float delta = step_value<T>(step[t], lane) - origin;
                    kept[t] = static_cast<std::int32_t>(magnitude_bits(delta)) >= bound[t]
                        ? reinterpret_bits<std::int32_t>(delta)
                        : 0;
                    s = t == 0 ? reinterpret_bits<float>(kept[t]) : s + reinterpret_bits<float>(kept[t]);
                }
                const std::int32_t magnitude = static_cast<std::int32_t>(magnitude_bits(s));
                top[j] = magnitude > top[j] ? magnitude : top[j];
                const bool none = s == 0;
                std::int32_t side = reinterpret_bits<std::int32_t>(s) >> 31; // all bits of a negative sum
                negative[j] += side;
                zeros[j] += none ? 1 : 0;
                side = none ? zero_side : side;
                float total = 0;
                std::int32_t count = 0;
#pragma GCC unroll 8
                for (std::size_t t = 0; t < N; ++t) {
                    const bool agrees = (kept[t] ^ side) > 0;
                    const float value = reinterpret_bits<float>(agrees ? kept[t] : 0);
                    total = t == 0 ? value : total + value;
                    count += agrees ? 1 : 0;
                }
                // A sum of 0 has entries of both signs, or none at all.
                unresolved[j] += (none & (count != 0)) ? 1 : 0;
                const float mean = total / static_cast<float>(count > 1 ? count : 1);
                const float change = lambda
                    * reinterpret_bits<float>(
                        none ? reinterpret_bits<std::int32_t>(mean) & zero_mean : reinterpret_bits<std::int32_t>(mean));
                made |= step_of_finite<T>(origin + change, lane);
            }
            out[begin + j] = made;
        }
    }
    for (std::size_t j = 0; j < strip_steps; ++j) {
        counts.negative += negative[j];
        counts.zero += zeros[j];
        counts.unresolved += unresolved[j];
        counts.top = top[j] > counts.top ? top[j] : counts.top;
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

/// The factors of an election, rounded to A once: T elect, T value, T divide, T agree.
template <arithmetic_element A>
[[nodiscard]] std::vector<A> election_factors(const election_weights& weights)
{
    std::vector<A> factors;
    for (const auto* list : {&weights.elect, &weights.value, &weights.divide, &weights.agree}) {
        for (const double weight : *list) { factors.push_back(static_cast<A>(weight)); }
    }
    return factors;
}

namespace detail {

/// Scratch rows that elect_rows() needs besides its output: signs, divisors, and the bits of everything seen.
inline constexpr std::size_t election_rows = 3;

/// The general election over `tasks` rows that are `stride` apart, row by row: merged = base + λ·τ.
/// `scratch`: election_rows rows, `stride` apart. `kept` and `conflicting`, where given, add up what each task did.
template <arithmetic_element A>
election_tally elect_rows(const A* rows, std::size_t tasks, std::size_t stride, const A* factors, disjoint_merge how,
    A zero, const A* base, A lambda, A* merged, A* scratch, std::size_t n, std::vector<std::uint64_t>* kept = nullptr,
    std::vector<std::uint64_t>* conflicting = nullptr)
{
    A* const sign = scratch;
    A* const divisor = scratch + stride;
    A* const seen = scratch + 2 * stride;
    for (A* const row : {sign, seen, merged}) { kernels::fill(row, A{0}, n); }
    for (std::size_t t = 0; t < tasks; ++t) { kernels::election_sum(sign, seen, rows + t * stride, factors[t], n); }
    const election_tally tally = kernels::elect(sign, seen, zero, n);
    kernels::fill(divisor, A{0}, n);
    for (std::size_t t = 0; t < tasks; ++t) {
        const A value = factors[tasks + t], divide = how == disjoint_merge::mean ? factors[2 * tasks + t] : A{0},
                agree = factors[3 * tasks + t];
        if (how == disjoint_merge::max) { kernels::largest_agreeing(merged, sign, rows + t * stride, value, agree, n); }
        else {
            kernels::merge_agreeing(merged, divisor, sign, rows + t * stride, value, divide, agree, n);
        }
        if (kept && conflicting) {
            kept->resize(tasks);
            conflicting->resize(tasks);
            std::uint32_t nonzero = 0;
            (*conflicting)[t] += kernels::count_conflicts(sign, rows + t * stride, agree, n, nonzero);
            (*kept)[t] += nonzero;
        }
    }
    kernels::finish_mean(merged, divisor, sign, n);
    kernels::add_scaled(merged, base, lambda, n);
    return tally;
}

/// The most tasks that a fused election takes.
inline constexpr std::size_t fused_tasks = 8;

/// The fused election over a run of stored words, to stored words. False where a sum was NaN or infinite: `out` is then
/// to be made again, row by row. `tally` adds up.
template <storage_element T>
[[nodiscard]] bool elect_stored(const storage_word<T>* const* tasks, std::size_t count, const storage_word<T>* base,
    const std::int32_t* least, float zero, float lambda, const kernels::stored_output<T>& out, std::size_t n,
    election_tally& tally)
{
    using kernels::step_word;
    using kernel = void(const step_word* const*, const step_word*, const std::int32_t*, float, float, std::uint32_t*,
        std::size_t, kernels::election_counts&);
    static constexpr kernel* elect[fused_tasks] = {&kernels::elect_stored<T, 1>, &kernels::elect_stored<T, 2>,
        &kernels::elect_stored<T, 3>, &kernels::elect_stored<T, 4>, &kernels::elect_stored<T, 5>,
        &kernels::elect_stored<T, 6>, &kernels::elect_stored<T, 7>, &kernels::elect_stored<T, 8>};
    alignas(64) std::uint32_t made[kernels::group_steps];
    kernels::election_counts counts;
    std::size_t lanes = 0;
    kernels::for_each_group<T, fused_tasks>(tasks, count, base, n,
        [&](const step_word* const* from, const step_word* origin, std::size_t at, std::size_t steps) {
            elect[count - 1](from, origin, least, zero, lambda, made, steps, counts);
            out.put(at, made, std::min(steps * kernels::step_width<T>, n - at));
            lanes += kernels::whole_strips(steps) * kernels::step_width<T>;
        });
    // What fills up the last strip holds zeros: it votes for nothing.
    tally.sign_sum += static_cast<std::int64_t>(lanes) + 2 * std::int64_t{counts.negative} - std::int64_t{counts.zero};
    tally.unresolved += static_cast<std::uint64_t>(counts.unresolved);
    return static_cast<std::uint32_t>(counts.top) < exponent_mask<float>;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
