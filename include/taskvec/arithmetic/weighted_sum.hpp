// The weighted sum over the tasks of a block: what averages, task arithmetic and sweeps are made of.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/models/block.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// The most tasks that one pass of a fused weighted sum takes, and the most that it takes at all.
inline constexpr std::size_t summed_at_once = 8, summed_at_most = 64;

/// out = θ0 + factor · Σ weights[t]·τt where Difference is true, otherwise Σ weights[t]·θt / factor, over a block, in
/// one sweep from stored words to stored words: the bits of weighted_sum() and what follows it. False, and nothing
/// done, where the models are not all stored as T.
template <storage_element T, bool Difference>
bool weighted_sum_stored(
    row_block<float>& rows, std::span<const float> weights, float factor, const kernels::stored_output<T>& out)
{
    using kernels::step_word;
    std::array<const storage_word<T>*, summed_at_most> tasks;
    const storage_word<T>* base = nullptr;
    if (!rows.template stored<T>(base, tasks)) { return false; }
    using kernel = void(const step_word* const*, const step_word*, const float*, float*, std::size_t);
    static constexpr kernel* add[summed_at_once] = {&kernels::add_stored<T, 1, Difference>,
        &kernels::add_stored<T, 2, Difference>, &kernels::add_stored<T, 3, Difference>,
        &kernels::add_stored<T, 4, Difference>, &kernels::add_stored<T, 5, Difference>,
        &kernels::add_stored<T, 6, Difference>, &kernels::add_stored<T, 7, Difference>,
        &kernels::add_stored<T, 8, Difference>};
    alignas(64) float sums[kernels::step_width<T> * kernels::group_steps];
    alignas(64) std::uint32_t made[kernels::group_steps];
    std::uint32_t largest = 0;
    kernels::for_each_group<T, summed_at_most>(tasks.data(), weights.size(), Difference ? base : nullptr, rows.size(),
        [&](const step_word* const* from, const step_word* origin, std::size_t at, std::size_t steps) {
            kernels::fill(sums, 0.0f, std::size(sums));
            for (std::size_t t = 0; t < weights.size(); t += summed_at_once) {
                add[std::min(summed_at_once, weights.size() - t) - 1](
                    from + t, origin, weights.data() + t, sums, steps);
            }
            largest = std::max(largest, kernels::finish_stored<T, Difference>(sums, origin, factor, made, steps));
            out.put(at, made, std::min(steps * kernels::step_width<T>, rows.size() - at));
        });
    rows.note(largest);
    return true;
}

} // namespace detail

/// sum = Σ weights[t]·θt, or Σ weights[t]·τt where `difference` is asked for (models with a base), over a block: +0
/// first, then task by task; each product and sum rounds in A. Weights are rounded to A by the caller, once.
template <arithmetic_element A>
void weighted_sum(row_block<A>& rows, std::span<const A> weights, A* sum, bool difference)
{
    kernels::fill(sum, A{0}, rows.size());
    for (std::size_t t = 0; t < weights.size(); ++t) {
        kernels::accumulate(sum, difference ? rows.delta(t) : rows.task(t), weights[t], rows.size());
    }
}

/// Weights rounded to both arithmetic types, once.
class rounded_weights {
public:
    explicit rounded_weights(const std::vector<double>& weights)
        : single_(weights.begin(), weights.end())
        , wide_(weights)
    { }
    template <arithmetic_element A>
    [[nodiscard]] std::span<const A> get() const noexcept
    {
        if constexpr (std::same_as<A, double>) { return wide_; }
        else {
            return single_;
        }
    }

private:
    std::vector<float> single_;
    std::vector<double> wide_;
};

} // namespace taskvec::inline TASKVEC_ABI
