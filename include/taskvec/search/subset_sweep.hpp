// Every subset of the tasks, depth first: one axpy a subset, and the bits of the direct sum.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/arithmetic/task_vector.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The subsets of n tasks that have at least `smallest` members (at least 1), each ascending, in lexicographic order:
/// {0,1}, {0,1,2}, …, {0,2}, … There are 2ⁿ of them, less those that are too small.
///
///     task_subsets(3, 2)   // {0,1}, {0,1,2}, {0,2}, {1,2}
[[nodiscard]] inline std::vector<std::vector<std::size_t>> task_subsets(std::size_t n, std::size_t smallest = 2)
{
    std::vector<std::vector<std::size_t>> all;
    std::vector<std::size_t> subset;
    // Depth first without recursion: extend by the next task while there is one, otherwise move the last member on.
    for (std::size_t next = 0;;) {
        if (next < n) {
            subset.push_back(next++);
            if (subset.size() >= smallest) { all.push_back(subset); }
        }
        else {
            if (subset.empty()) { return all; }
            next = subset.back() + 1;
            subset.pop_back();
        }
    }
}

/// Which subsets are visited, and the weights of their sums.
struct subset_sweep_options {
    std::vector<double> weights{}; ///< one for each task; empty: all 1
    std::size_t smallest = 2; ///< subsets of fewer tasks are not visited
};

/// What is called for each subset: the tasks in it, ascending, and Σ wt·τt over them.
template <class Visit, class T>
concept subset_visitor = requires(
    Visit& visit, std::span<const std::size_t> subset, host_view<const arithmetic_type<T>> sum) { visit(subset, sum); };

/// Visits the subsets of n task vectors that have at least `smallest` members (2ⁿ − (n + 1) of them by default) in
/// lexicographic order: {0,1}, {0,1,2}, …, {0,2}, … The sum handed to `visit` is a flat view of f32 (f64 for f64)
/// values, valid during the call, with the bits of combine() over the subset in task order: a stack of partial sums is
/// kept, and each subset adds one task vector to its parent's. To get a model, apply() the sum to the base, with λ or
/// λ/|subset|. Memory: n sums. Cost: one axpy a subset. Returns the number of subsets visited. Errors: invalid_argument
/// (no task vector, more than 63, wrong number of weights), shape_mismatch, nonfinite_error.
///
///     for_each_subset(cpu{}, std::vector{tau1, tau2, tau3}, {}, [&](auto subset, auto sum) {
///         apply(cpu{}, base, sum, 0.3, merged);
///         scores.push_back(evaluate(merged, subset));
///     });
template <storage_element T, subset_visitor<T> Visit>
std::size_t for_each_subset(const cpu& policy, const std::vector<host_view<const T>>& task_vectors,
    const subset_sweep_options& options, Visit&& visit)
{
    using A = arithmetic_type<T>;
    const std::size_t tasks = task_vectors.size();
    if (tasks == 0) {
        raise<invalid_argument>(
            error_code::inputs_empty, "for_each_subset: no task vector was given: at least one is needed");
    }
    if (tasks > 63) {
        raise<invalid_argument>(error_code::size_limit,
            message("for_each_subset: ", tasks, " tasks have too many subsets to visit; give at most 63"));
    }
    if (!options.weights.empty() && options.weights.size() != tasks) {
        raise<invalid_argument>(error_code::list_length,
            message("for_each_subset: ", options.weights.size(), " weights for ", tasks,
                " task vectors: give one each, or none"));
    }
    const std::size_t size = task_vectors[0].size();
    for (std::size_t t = 0; t < tasks; ++t) {
        if (task_vectors[t].size() != size) {
            raise<shape_mismatch>(error_code::input_size,
                message("for_each_subset: task vector ", t + 1, " has ", task_vectors[t].size(),
                    " elements, the first ", size));
        }
    }
    std::pmr::vector<std::pmr::vector<A>> sums(memory_of(policy)); // sums[d]: of the first d + 1 members of the subset
    std::vector<std::size_t> subset;
    std::size_t visited = 0;
    const auto add_task = [&](std::size_t task) {
        const std::size_t depth = subset.size();
        if (sums.size() == depth) { sums.emplace_back(size); }
        const A* const parent = depth == 0 ? nullptr : sums[depth - 1].data();
        A* const sum = sums[depth].data();
        const A weight = options.weights.empty() ? A(1) : static_cast<A>(options.weights[task]);
        constexpr std::size_t step = 65536;
        for_each_index(policy, (size + step - 1) / step, [&](std::size_t index, std::size_t) {
            std::array<A, block_size> row;
            for (std::size_t offset = index * step; offset < std::min(size, (index + 1) * step); offset += block_size) {
                const std::size_t n = std::min(block_size, size - offset);
                bits_type<A> largest = 0;
                const A* const x = detail::widened<A>(task_vectors[task], offset, n, row.data(), largest);
                if (largest >= exponent_mask<A>) { detail::find_nonfinite(task_vectors[task], task + 1, offset, n); }
                if (!parent) { kernels::begin_sum(sum + offset, x, weight, n); }
                else {
                    std::memcpy(sum + offset, parent + offset, n * sizeof(A));
                    kernels::accumulate(sum + offset, x, weight, n);
                }
            }
        });
        subset.push_back(task);
    };
    // Depth first without recursion: extend by the next task while there is one, otherwise move the last member on.
    for (std::size_t next = 0;;) {
        if (next < tasks) {
            add_task(next++);
            if (subset.size() >= std::max<std::size_t>(1, options.smallest)) {
                visit(std::span<const std::size_t>(subset), host_view<const A>(sums[subset.size() - 1].data(), size));
                ++visited;
            }
        }
        else {
            if (subset.empty()) { break; }
            next = subset.back() + 1;
            subset.pop_back();
        }
    }
    return visited;
}

} // namespace taskvec::inline TASKVEC_ABI
