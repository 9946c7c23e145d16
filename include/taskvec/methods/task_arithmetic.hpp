// Task arithmetic: Ilharco et al., "Editing models with task arithmetic" (ICLR 2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/arithmetic/weighted_sum.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstddef>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + λ·Σ wt·τt with τt = θt − θ0. λ < 0 forgets. The analogy "a is to b as c is to …",
/// θ0 + λ·(τc + τb − τa), is the weights {1, 1, −1} over the tasks {c, b, a}: see analogy(). Sums run in f32 (f64 for
/// f64) in task order; every product and sum rounds; bit-exact.
///
///     merge(cpu{}, task_arithmetic_options{.lambda = 0.3}, base, tasks, out);
struct task_arithmetic_options {
    double lambda = 0.3;
    std::vector<double> weights{};
};

template <>
struct options_of<task_arithmetic_options> {
    static constexpr option_table table{
        option_row("lambda", &task_arithmetic_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&task_arithmetic_options::weights)};
};

template <>
class detail::merger<task_arithmetic_options> {
public:
    static constexpr bool needs_base = true, in_place = true;
    static constexpr std::size_t scratch_rows = 0;

    merger(const cpu&, const aligned_models& models, const task_arithmetic_options& options)
        : lambda_(options.lambda)
        , weights_(checked_weights(options.weights, models.task_count()))
    {
        check_factor(lambda_, "lambda");
    }
    template <arithmetic_element A>
    void operator()(block<A>& rows, A* merged, merge_tally&) const
    {
        weighted_sum(rows, weights_.get<A>(), merged, true);
        kernels::add_scaled(merged, rows.base(), static_cast<A>(lambda_), rows.size());
    }
    template <storage_element T>
    bool fused(block<float>& rows, const kernels::stored_output<T>& out, merge_tally&) const
    {
        return weighted_sum_stored<T, true>(rows, weights_.get<float>(), static_cast<float>(lambda_), out);
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    double lambda_;
    rounded_weights weights_;
};

/// The analogy "a is to b as c is to …": θ0 + λ·(τc + τb − τa). Sums in that order.
///
///     merge(cpu{}, analogy(0.5), base, std::vector{c, b, a}, out);
[[nodiscard]] inline task_arithmetic_options analogy(double lambda = 1.0)
{
    return {lambda, {1.0, 1.0, -1.0}};
}

} // namespace taskvec::inline TASKVEC_ABI
