// Electing a sign and merging the entries that agree with it: the second and third step of TIES.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/core/pack.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

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
    call_vector<double> elect{}, value{}, divide{}, agree{}; ///< one for each task in each list
};

/// The factors of an election, rounded to A once: T elect, T value, T divide, T agree.
template <arithmetic_element A>
[[nodiscard]] call_vector<A> election_factors(const election_weights& weights)
{
    call_vector<A> factors;
    for (const auto* list : {&weights.elect, &weights.value, &weights.divide, &weights.agree}) {
        for (const double weight : *list) { factors.push_back(static_cast<A>(weight)); }
    }
    return factors;
}

/// What elections count: entries whose sum is positive, those whose sum is negative, and those whose sum is exactly 0
/// while some entry is not; for each task, where statistics are asked for, its nonzero entries and those that do not
/// agree.
struct election_counts {
    /// Slots of in.count(): sums above 0, below 0, and exactly 0 while some entry is not.
    static constexpr std::size_t positive = 0, negative = 1, unresolved = 2;
    /// Slots of in.count_of(): entries that take part, and those of them that do not agree.
    static constexpr std::size_t kept = 0, conflicting = 1;
};

/// θ0 + λ·τ, where τ merges those of the kept entries whose sign is that of their weighted sum. Works for any weights:
/// factors are those of election_factors(). `zero`: what a sum of 0 elects (1, 0 or −1). A sum that is NaN spreads.
template <arithmetic_element A, class Rule>
struct sign_election_body : Rule {
    static constexpr bool watches = Rule::sees_all;
    const A* factors; ///< those of election_factors()
    disjoint_merge combine; ///< of agreeing entries
    A zero, lambda; ///< what a sum of 0 elects, and the scale of τ

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        const Rule& keep = *this;
        const std::size_t count = in.tasks();
        const auto trim = [&](std::size_t t) TASKVEC_BODY { return keep(in, t, in.delta(t)); };
        typename In::words seen{};
        pack sum{};
        const auto kept = in.list_of(trim, [&](std::size_t t, const pack& x) TASKVEC_BODY {
            seen = seen | magnitude_of(x);
            sum = sum + factors[t] * x;
        });
        in.watch(sum);
        const auto none = sum == 0;
        in.count(election_counts::positive, sum > 0);
        in.count(election_counts::negative, sum < 0);
        in.count(election_counts::unresolved, where_zero(sum, seen) > 0);
        pack sign = select(sum > 0, filled<pack>(1), sum);
        sign = select(sum < 0, filled<pack>(-1), sign);
        sign = select(none, filled<pack>(zero), sign);
        pack total{}, divisor{};
        in.each([&](std::size_t t) TASKVEC_BODY {
            const pack x = kept(t);
            const auto agrees = factors[3 * count + t] * x * sign > 0;
            const pack candidate = where(agrees, factors[count + t] * x);
            if (combine == disjoint_merge::max) {
                total = select(magnitude_of(candidate) > magnitude_of(total), candidate, total);
            }
            else {
                total = total + candidate;
                if (combine == disjoint_merge::mean) {
                    divisor = divisor + where(agrees, filled<pack>(factors[2 * count + t]));
                }
            }
            if (in.counts_tasks()) {
                in.count_of(election_counts::kept, t, x != 0);
                in.count_of(election_counts::conflicting, t, (x != 0) & ~agrees);
            }
        });
        const pack mean = total / select(divisor == 0, filled<pack>(1), divisor);
        return in.base() + lambda * select(sign == sign, mean, sign);
    }
};

/// The same where all weights are 1, the agreeing entries become their mean, and a sum of 0 elects one of the signs:
/// the operations of sign_election_body in its order, but for products by 1 and sums with a 0 that cannot change a bit.
template <arithmetic_element A, class Rule>
struct unit_election_body : Rule {
    static constexpr bool watches = Rule::sees_all;
    /// Numbers of tasks that are compiled by themselves: with the tasks in registers a sweep takes four fifths of the
    /// time.
    static constexpr std::integer_sequence<int, 2, 3, 4, 5, 6, 7, 8> held{};
    A lambda; ///< the scale of τ
    signed_word<A> zero; ///< the sign bit that a sum of 0 elects: 0 for plus

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        using words = typename In::words;
        const Rule& keep = *this;
        const auto trim = [&](std::size_t t) TASKVEC_BODY { return keep(in, t, in.delta(t)); };
        pack sum{};
        const auto kept = in.list_of(trim, [&](std::size_t, const pack& x) TASKVEC_BODY { sum = sum + x; });
        in.watch(sum);
        in.count(election_counts::positive, sum > 0);
        in.count(election_counts::negative, sum < 0);
        // With the sum's sign taken off, an entry agrees where it is a positive number, and then it is one as a word
        // too.
        const words sign = bits_of(sum) & static_cast<signed_word<A>>(sign_mask<A>);
        words of_zeros{}, elected = sign;
        if (zero != 0) { // one answer for all packs: the first sweep has none of it
            of_zeros = where_zero(sum, filled_words<words>(zero));
            elected = sign | of_zeros;
        }
        words agreeing{};
        const pack total = in.total_of([&](std::size_t t) TASKVEC_BODY {
            const words x = bits_of(kept(t)) ^ elected;
            const words agrees = larger(x, words{});
            agreeing = added_where_positive(agrees, agreeing);
            return from_bits(agrees);
        });
        // A sum of 0 has entries of both signs, or none at all.
        in.count(election_counts::unresolved, where_zero(sum, agreeing) > 0);
        // Nothing agrees with a sum of no entries, and nothing is +0.
        if (zero != 0) { elected = sign | (of_zeros & (words{} - agreeing)); }
        const pack mean = turned(total / to_numbers(larger(agreeing, filled_words<words>(1))), elected);
        return in.base() + lambda * select(materialised(sum == sum), mean, sum);
    }
};

} // namespace taskvec::inline TASKVEC_ABI
