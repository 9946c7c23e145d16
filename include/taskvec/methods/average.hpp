// Weighted average of models: Model Soups (Wortsman et al. 2022), AdapterSoup, WiSE-FT with two models.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/arithmetic/weighted_sum.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstddef>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = Σ wt·θt / Σ wt, elementwise. Needs no base. Weights: one for each task, or none for all 1; any sign, but their
/// sum may not be 0. Sums run in f32 (f64 for f64) in task order; bit-exact.
///
///     merge(cpu{}, average_options{.weights = {0.25, 0.75}}, tasks, out);
struct average_options {
    std::vector<double> weights{};

    /// WiSE-FT (Wortsman et al. 2022) over {θ0, θ1}: (1−α)·θ0 + α·θ1.
    [[nodiscard]] static average_options wise_ft(double alpha) { return {{1 - alpha, alpha}}; }
};

template <>
struct options_of<average_options> {
    static constexpr option_table table{weights_row(&average_options::weights)};
};

template <>
class detail::merger<average_options> {
public:
    static constexpr bool needs_base = false, in_place = true;
    static constexpr std::size_t scratch_rows = 0;

    merger(const cpu&, const aligned_models& models, const average_options& options)
        : weights_(checked_weights(options.weights, models.task_count()))
    {
        if (total<double>() == 0 || total<float>() == 0) {
            raise<invalid_argument>("the weights of an average sum to 0");
        }
    }
    template <arithmetic_element A>
    void operator()(block<A>& rows, A* merged, merge_tally&) const
    {
        weighted_sum(rows, weights_.get<A>(), merged, false);
        kernels::divide(merged, total<A>(), rows.size());
    }
    template <storage_element T>
    bool fused(block<float>& rows, const kernels::stored_output<T>& out, merge_tally&) const
    {
        return weighted_sum_stored<T, false>(rows, weights_.get<float>(), total<float>(), out);
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    /// Σ wt in A, in task order.
    template <arithmetic_element A>
    [[nodiscard]] A total() const noexcept
    {
        A sum = 0;
        for (const A weight : weights_.get<A>()) { sum += weight; }
        return sum;
    }

private:
    rounded_weights weights_;
};

} // namespace taskvec::inline TASKVEC_ABI
