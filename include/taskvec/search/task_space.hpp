// The points θ0 + Σ λt·τt of a base and its task vectors, one at a time in one buffer; and losses over a plane of them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/search/lambda_grid.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The affine space θ0 + Σ λt·τt. Base and task vectors are flat views of one storage type and length, borrowed; for
/// adapters they are φ0 and φt − φ0.
///
///     task_space<float> space(base, {tau1, tau2});
///     auto theta = space.at(std::array{0.3, 0.3});
template <storage_element T>
class task_space {
public:
    /// Errors: invalid_argument (no task vector), shape_mismatch.
    task_space(host_view<const T> base, std::vector<host_view<const T>> task_vectors, cpu policy = {})
        : base_(base)
        , task_vectors_(std::move(task_vectors))
        , policy_(std::move(policy))
        , point_(base.size(), memory_of(policy_))
    {
        if (task_vectors_.empty()) {
            raise<invalid_argument>(
                error_code::inputs_empty, "task_space: no task vector was given: at least one is needed");
        }
        for (std::size_t t = 0; t < task_vectors_.size(); ++t) {
            if (task_vectors_[t].size() != base_.size()) {
                raise<shape_mismatch>(error_code::input_size,
                    message("task_space: task vector ", t + 1, " has ", task_vectors_[t].size(), " elements, the base ",
                        base_.size()));
            }
        }
    }

    /// How many task vectors it has.
    [[nodiscard]] std::size_t tasks() const noexcept { return task_vectors_.size(); }
    /// θ0.
    [[nodiscard]] host_view<const T> base() const noexcept { return base_; }
    /// τt.
    [[nodiscard]] host_view<const T> task_vector(std::size_t task) const { return task_vectors_[task]; }

    /// θ0 + Σ λt·τt over the tasks whose λ is not 0, in f32 (f64 for f64), in task order, rounded once: the bits of
    /// task arithmetic with λ = 1 and these weights. Valid until the next call. One pass. Errors: invalid_argument
    /// (another number of factors than tasks, or one that is not finite).
    [[nodiscard]] host_view<const T> at(std::span<const double> lambdas)
    {
        if (lambdas.size() != tasks()) {
            raise<invalid_argument>(error_code::list_length,
                message("task_space: ", lambdas.size(), " factors for ", tasks(), " task vectors: give one each"));
        }
        std::vector<std::size_t> active;
        for (std::size_t t = 0; t < tasks(); ++t) {
            if (!std::isfinite(lambdas[t])) {
                raise<invalid_argument>(error_code::parameter_not_finite,
                    message("task_space: the factor of task ", t + 1, " is not finite"));
            }
            if (lambdas[t] != 0) { active.push_back(t); }
        }
        using A = arithmetic_type<T>;
        constexpr std::size_t step = 65536;
        for_each_index(policy_, (point_.size() + step - 1) / step, [&](std::size_t index, std::size_t) {
            std::array<A, block_size> row, sum;
            bits_type<A> ignored = 0;
            for (std::size_t offset = index * step; offset < std::min(point_.size(), (index + 1) * step);
                offset += block_size) {
                const std::size_t n = std::min(block_size, point_.size() - offset);
                if (active.empty()) {
                    std::copy_n(base_.data() + offset, n, point_.data() + offset);
                    continue;
                }
                for (std::size_t k = 0; k < active.size(); ++k) {
                    const A* const x = detail::widened<A>(task_vectors_[active[k]], offset, n, row.data(), ignored);
                    const A weight = static_cast<A>(lambdas[active[k]]);
                    k == 0 ? kernels::begin_sum(sum.data(), x, weight, n)
                           : kernels::accumulate(sum.data(), x, weight, n);
                }
                kernels::add_scaled(sum.data(), detail::widened<A>(base_, offset, n, row.data(), ignored), A(1), n);
                kernels::narrow(sum.data(), point_.data() + offset, n);
            }
        });
        return {point_.data(), point_.size()};
    }

private:
    host_view<const T> base_;
    std::vector<host_view<const T>> task_vectors_;
    cpu policy_;
    std::pmr::vector<T> point_; // in memory of the policy's resource
};

/// A number for a model: a loss, an accuracy.
template <class F, class T>
concept loss_function = requires(F& f, host_view<const T> parameters) {
    { f(parameters) } -> std::convertible_to<double>;
};

/// The plane of two of a space's tasks.
struct plane_options {
    std::size_t task1 = 0, task2 = 1; ///< places of the tasks in the space
    std::vector<double> lambda1{}, lambda2{}; ///< factors along each side; an empty lambda2 repeats lambda1
};

namespace detail {
template <class T>
void check_plane(const task_space<T>& space, const plane_options& plane)
{
    if (plane.task1 >= space.tasks() || plane.task2 >= space.tasks() || plane.task1 == plane.task2) {
        raise<invalid_argument>(error_code::index_out_of_range,
            message("a plane needs two different tasks below ", space.tasks(), ", got ", plane.task1, " and ",
                plane.task2));
    }
}
inline lambda_grid grid_of(const plane_options& plane)
{
    return empty_grid(plane.lambda1, plane.lambda2.empty() ? plane.lambda1 : plane.lambda2);
}
} // namespace detail

/// The loss at θ0 + λ1·τ1 + λ2·τ2 over a grid. Cost: one combination and one call of `loss` for each point.
/// Errors: invalid_argument.
///
///     const auto loss = [&](auto theta) { return model.loss(theta); };
///     auto plane = loss_plane(space, {.lambda1 = equidistant(-1, 2, 31)}, loss);
template <storage_element T, loss_function<T> Loss>
[[nodiscard]] lambda_grid loss_plane(task_space<T>& space, const plane_options& plane, Loss&& loss)
{
    detail::check_plane(space, plane);
    lambda_grid grid = detail::grid_of(plane);
    std::vector<double> lambdas(space.tasks(), 0.0);
    for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
            lambdas[plane.task1] = grid.lambda1[i];
            lambdas[plane.task2] = grid.lambda2[j];
            grid.at(i, j) = static_cast<double>(loss(space.at(lambdas)));
        }
    }
    return grid;
}

} // namespace taskvec::inline TASKVEC_ABI
