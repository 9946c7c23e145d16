// The weighted sum over the tasks of a block: what averages, task arithmetic and sweeps are made of.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/arithmetic/block.hpp>

#include <array>
#include <span>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// weighted_sum() on the stored words, four tasks at a time; false where the models are not all stored as T.
template <storage_element T>
bool weighted_sum_stored(block<float>& rows, std::span<const float> weights, float* sum, bool difference)
{
    constexpr std::size_t most = 64;
    std::array<const storage_word<T>*, most> tasks;
    const storage_word<T>* base = nullptr;
    if (!rows.template stored<T>(base, tasks)) { return false; }
    using kernel = std::uint32_t(const storage_word<T>* const*, const storage_word<T>*, const float*, float*, std::size_t);
    static constexpr kernel* plain[] = {
        &kernels::add_stored<T, 1, false>, &kernels::add_stored<T, 2, false>, &kernels::add_stored<T, 3, false>, &kernels::add_stored<T, 4, false>};
    static constexpr kernel* changes[] = {
        &kernels::add_stored<T, 1, true>, &kernels::add_stored<T, 2, true>, &kernels::add_stored<T, 3, true>, &kernels::add_stored<T, 4, true>};
    kernels::fill(sum, 0.0f, rows.size());
    for (std::size_t t = 0; t < weights.size(); t += 4) {
        const std::size_t group = std::min<std::size_t>(4, weights.size() - t);
        rows.note((difference ? changes : plain)[group - 1](tasks.data() + t, base, weights.data() + t, sum, rows.size()));
    }
    return true;
}

} // namespace detail

/// sum = Σ weights[t]·θt, or Σ weights[t]·τt where `difference` is asked for (models with a base), over a block: +0 first,
/// then task by task; each product and sum rounds in A. Weights are rounded to A by the caller, once.
template <arithmetic_element A>
void weighted_sum(block<A>& rows, std::span<const A> weights, A* sum, bool difference)
{
    if constexpr (std::same_as<A, float>) {
        if (detail::weighted_sum_stored<bf16>(rows, weights, sum, difference) || detail::weighted_sum_stored<float>(rows, weights, sum, difference)) { return; }
    }
    kernels::fill(sum, A{0}, rows.size());
    for (std::size_t t = 0; t < weights.size(); ++t) { kernels::accumulate(sum, difference ? rows.delta(t) : rows.task(t), weights[t], rows.size()); }
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
