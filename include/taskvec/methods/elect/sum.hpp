// θ0 + λ·Σ weights·(what a rule keeps of the task vectors): task arithmetic, DARE, Model Stock.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/fwd.hpp>
#include <taskvec/methods/keep/all.hpp>

#include <concepts>
#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// θ0 + factor·Σ weights[t]·keep(τt): +0 first, then in task order; every product and sum rounds.
template <arithmetic_element A, class Rule>
struct kept_sum_body : Rule {
    static constexpr bool watches = Rule::sees_all;
    const A* weights;
    A factor;

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const Rule& keep = *this;
        const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY {
            const auto kept = keep(in, t, in.delta(t));
            if constexpr (!std::same_as<Rule, keep_all>) {
                if (in.counts_tasks()) { in.count_of(0, t, kept != 0); }
            }
            return weights[t] * kept;
        });
        in.watch(sum);
        return in.base() + factor * sum;
    }
};

} // namespace taskvec::inline TASKVEC_ABI
