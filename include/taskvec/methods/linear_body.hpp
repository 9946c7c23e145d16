// Weighted sums over models, without a base: the bodies of average and SLERP.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/pack.hpp>

#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// Σ weights[t]·θt / divisor: +0 first, then in task order; every product, sum and quotient rounds.
template <arithmetic_element A>
struct mean_body {
    static constexpr bool watches = true;
    const A* weights; ///< of each task
    A divisor; ///< of the sum

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return weights[t] * in.task(t); });
        in.watch(sum);
        return sum / divisor;
    }
};

/// of_a·a + of_b·b, where a is the base or the first task and b the task after it.
template <arithmetic_element A>
struct pair_body {
    static constexpr bool watches = true;
    A of_a, of_b; ///< factors of the two
    bool from_base; ///< a is the base, and b the first task

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const auto a = from_base ? in.base() : in.task(0);
        const auto b = in.task(from_base ? 0 : 1);
        const auto sum = typename In::pack{} + of_a * a + of_b * b;
        in.watch(sum);
        return sum;
    }
};

} // namespace taskvec::inline TASKVEC_ABI
