// θ0 + λ·Σ weights·(what a rule keeps of the task vectors): task arithmetic, DARE, Model Stock.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/fwd.hpp>
#include <taskvec/methods/keep/all.hpp>
#include <taskvec/methods/keep/l1_factors.hpp>

#include <concepts>
#include <cstddef>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// θ0 + factor·(Σ weights[t]·keep(τt) / divisor): +0 first, then in task order; every product, sum and quotient rounds.
template <arithmetic_element A, class Rule>
struct kept_sum_body : Rule {
    static constexpr bool watches = Rule::sees_all;
    const A* weights; ///< of each task
    A factor; ///< of the sum
    A divisor = 1; ///< of the sum

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
        if (divisor != 1) { return in.base() + factor * (sum / divisor); }
        return in.base() + factor * sum;
    }
};

/// θ0 + λ·(sum or weighted mean of what any rule keeps), prepared for every tensor: what task arithmetic and sparse
/// methods without an election are made of.
class kept_sum {
public:
    /// From options with lambda, weights and normalize; `rescale`: what is kept of a task vector gets its L1 norm back
    /// (l1_factors). Errors: invalid_argument (lambda, weights).
    template <class Passes, class Options, class Keep>
    kept_sum(Passes& passes, const Options& options, const Keep& keep, bool rescale)
        : kept_sum(passes, options, keep, rescale, task_weights(options.weights, passes.models()))
    { }
    template <arithmetic_element A, class Rule>
    [[nodiscard]] kept_sum_body<A, Rule> body(const Rule& rule, std::size_t tensor) const
    {
        const A* weights;
        if constexpr (std::same_as<A, double>) { weights = wide_; }
        else {
            weights = single_;
        }
        return {rule, weights + tensor * stride_, static_cast<A>(lambda_), divisor_.template get<A>()};
    }
    /// Reads of the models for L1 norms.
    [[nodiscard]] unsigned walks() const noexcept { return stride_ ? 1u : 0u; }

private:
    template <class Passes, class Options, class Keep>
    kept_sum(Passes& passes, const Options& options, const Keep& keep, bool rescale, call_vector<double> weights)
        : lambda_(options.lambda)
        , divisor_(weights, options.normalize, passes.models())
        , stride_(rescale ? passes.tasks() : 0)
    {
        if (rescale) {
            call_vector<double> scaled;
            for (const auto& factors : l1_factors(passes, keep)) {
                for (std::size_t t = 0; t < factors.size(); ++t) { scaled.push_back(weights[t] * factors[t]); }
            }
            weights = std::move(scaled);
        }
        single_ = passes.keep(call_vector<float>(weights.begin(), weights.end()));
        wide_ = passes.keep(std::move(weights));
    }

    double lambda_;
    detail::weight_divisor divisor_;
    std::size_t stride_;
    const float* single_ = nullptr;
    const double* wide_ = nullptr;
};

} // namespace taskvec::inline TASKVEC_ABI
