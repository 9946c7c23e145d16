// What a keep rule takes of each task vector's L1 norm, and the factors that give it back: mergekit's `rescale`.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/kernels.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/methods/passes.hpp>
#include <taskvec/methods/task_rows.hpp>
#include <taskvec/methods/walk.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// For every tensor and task Σ|τ| / Σ|kept τ|, [tensor][task]: in f64 with a fixed shape; 1 where either sum is below
/// 1e-7, as in mergekit. Cost: one read of the models. On the CPU only: invalid_argument elsewhere.
template <class Passes, class Keep>
[[nodiscard]] call_vector<call_vector<double>> l1_factors(Passes& passes, const Keep& keep);

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Magnitudes of a row, for sum().
template <arithmetic_element A>
struct magnitude_terms {
    const A* x;

    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack<double, bytes> at(std::size_t i) const noexcept
    {
        return from_bits(magnitude_of(load_wide<bytes>(x + i)));
    }
};

/// A row of task vector `task` as its tensor's rule keeps it: work of task_rows_kernel on that row alone.
template <arithmetic_element A, class Rule>
struct kept_entries {
    const Rule& rule;
    std::size_t task;
    std::uint64_t place; ///< of the first entry
    const signed_word<A>* drawn; ///< null where the rule draws none
    A* out;

    template <int bytes, class Deltas>
    TASKVEC_INLINE void at(std::size_t i, const Deltas& x) const
    {
        const ruled_entries<A, bytes> entries{place + i, drawn ? drawn + i : nullptr};
        store_row<A>(rule(entries, task, x(0)), out + i);
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// out = a row of task vector t as the rule of its tensor keeps it. `words`: room for a block's.
template <arithmetic_element A, class Rule>
void keep_row(const row_block<A>& rows, const Rule& rule, std::size_t t, const A* x, A* out, signed_word<A>* words)
{
    const signed_word<A>* drawn = nullptr;
    if constexpr (requires { rule.stream(t); }) {
        if (rule.drawing()) {
            fill_draws<A>(rule.stream(t), rows.offset(), words, rows.size());
            drawn = words;
        }
    }
    const std::uint64_t place = rows.position();
    for (std::size_t at = 0; at < rows.size();) {
        std::size_t until = rows.size();
        if constexpr (requires { rule.constant_until(place, place); }) {
            until = static_cast<std::size_t>(rule.constant_until(place + at, place + until) - place);
        }
        const kernels::kept_entries<A, Rule> work{rule, t, place + at, drawn ? drawn + at : nullptr, out + at};
        over_task_rows(x + at, until - at, work);
        at = until;
    }
}

} // namespace detail

template <class Passes, class Keep>
call_vector<call_vector<double>> l1_factors(Passes& passes, const Keep& keep)
{
    if constexpr (Passes::space != memory_space::host) {
        static_cast<void>(keep);
        raise<invalid_argument>(error_code::device_unavailable,
            "L1 norms of what is kept are summed on the CPU: merge there, or do not rescale");
    }
    else {
        const std::size_t tasks = passes.tasks();
        auto sums = tensor_sums<storage_of<Passes>>(
            passes.policy(), passes.models(), 2 * tasks, 1, "norms", [&]<class A>(row_block<A>& rows, double* sum) {
                const auto rule = keep.template get<A>(rows.tensor_index());
                alignas(64) signed_word<A> words[block_size];
                A* const kept = rows.scratch(0);
                for (std::size_t t = 0; t < tasks; ++t) {
                    const A* const x = rows.delta(t);
                    detail::keep_row(rows, rule, t, x, kept, words);
                    sum[2 * t] = kernels::sum(kernels::magnitude_terms<A>{x}, rows.size());
                    sum[2 * t + 1] = kernels::sum(kernels::magnitude_terms<A>{kept}, rows.size());
                }
            });
        for (auto& of_tensor : sums) {
            for (std::size_t t = 0; t < tasks; ++t) {
                const double all = of_tensor[2 * t], kept = of_tensor[2 * t + 1];
                of_tensor[t] = all < 1e-7 || kept < 1e-7 ? 1.0 : all / kept;
            }
            of_tensor.resize(tasks);
        }
        return sums;
    }
}

} // namespace taskvec::inline TASKVEC_ABI
