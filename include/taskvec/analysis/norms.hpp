// Norms of models and of their changes, and what a task vector holds, tensor by tensor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/kernels.hpp>
#include <taskvec/core/policy.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/tensor_sums.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// ‖θ‖ of a tensor, and ‖θ − θ0‖ where there is a base (0 otherwise).
struct tensor_norms {
    double norm = 0, change = 0; ///< of the task, and of its difference to the base
};

/// The norms of the first task of `models`, for each of its tensors: f64 sums of a fixed shape over the stored values,
/// the same for any number of threads. Errors: nonfinite_error, cancelled. Cost: one read of the task and the base.
///
///     const aligned_models models(&base, {&merged, 1}, {});
///     norms_of(cpu{}, models)[0].change;   // how far the first tensor moved
[[nodiscard]] inline std::vector<tensor_norms> norms_of(const cpu& policy, const aligned_models& models)
{
    const auto sums = tensor_sums(policy, models, 2, 0, "norms", [](auto& rows, double* sum) {
        const auto* const values = rows.task(0);
        sum[0] = kernels::dot(values, values, rows.size());
        sum[1] = 0;
        if (rows.models().has_base()) {
            const auto* const change = rows.delta(0);
            sum[1] = kernels::dot(change, change, rows.size());
        }
    });
    std::vector<tensor_norms> norms;
    for (const auto& sum : sums) { norms.push_back({std::sqrt(sum[0]), std::sqrt(sum[1])}); }
    return norms;
}

/// The nonzero entries of each task vector (of each model, where there is no base), over all tensors: what takes part
/// in a merge that drops nothing. Errors: nonfinite_error, cancelled. Cost: one read of the models.
///
///     nonzero_entries(cpu{}, models)[t];
[[nodiscard]] inline std::vector<std::uint64_t> nonzero_entries(const cpu& policy, const aligned_models& models)
{
    const auto sums = tensor_sums(policy, models, models.task_count(), 0, "count", [](auto& rows, double* counts) {
        for (std::size_t t = 0; t < rows.task_count(); ++t) {
            const auto* const values = rows.delta(t);
            counts[t] =
                static_cast<double>(std::count_if(values, values + rows.size(), [](auto value) { return value != 0; }));
        }
    });
    std::vector<std::uint64_t> totals(models.task_count());
    for (const auto& tensor : sums) {
        for (std::size_t t = 0; t < totals.size(); ++t) { totals[t] += static_cast<std::uint64_t>(tensor[t]); }
    }
    return totals;
}

} // namespace taskvec::inline TASKVEC_ABI
