// Weight disentanglement: how much the presence of other task vectors changes what a model says about a task's inputs.
// Ortiz-Jimenez, Favero, Frossard, "Task arithmetic in the tangent space" (NeurIPS 2023); for adapters Tang et al.,
// "Parameter-efficient multi-task model fusion with partial linearization" (ICLR 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/search/task_space.hpp>

#if !__has_include(<Eigen/Core>)
#error "this header of taskvec needs Eigen 3.4 or later (Debian: libeigen3-dev, with -I /usr/include/eigen3)"
#include "taskvec: the error above ends the compilation"
#endif
#include <Eigen/Core>

#include <concepts>
#include <cstddef>
#include <map>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The share of examples on which two predictions differ, in [0, 1]; 0 for none. A prediction is a range of class
/// indices, or a matrix batch × classes whose rows' largest entries decide (the first among equal ones).
struct prediction_mismatch {
    /// Of class indices. Errors: shape_mismatch where the two are not as long.
    template <std::ranges::sized_range Labels>
        requires std::integral<std::ranges::range_value_t<Labels>>
    [[nodiscard]] double operator()(const Labels& a, const Labels& b) const
    {
        check(std::ranges::size(a), std::ranges::size(b));
        std::size_t different = 0;
        auto other = std::ranges::begin(b);
        for (const auto label : a) { different += label != *other++; }
        return share(different, std::ranges::size(a));
    }
    /// Of scores, batch × classes. Errors: shape_mismatch where the two have not as many rows.
    template <class Derived>
    [[nodiscard]] double operator()(const Eigen::MatrixBase<Derived>& a, const Eigen::MatrixBase<Derived>& b) const
    {
        check(static_cast<std::size_t>(a.rows()), static_cast<std::size_t>(b.rows()));
        std::size_t different = 0;
        for (Eigen::Index row = 0; row < a.rows(); ++row) {
            Eigen::Index first = 0, second = 0;
            a.row(row).maxCoeff(&first);
            b.row(row).maxCoeff(&second);
            different += first != second;
        }
        return share(different, static_cast<std::size_t>(a.rows()));
    }

private:
    static void check(std::size_t a, std::size_t b)
    {
        if (a != b) {
            raise<shape_mismatch>(error_code::input_size,
                message("prediction_mismatch: predictions for ", a, " and for ", b, " examples"));
        }
    }
    static double share(std::size_t different, std::size_t examples)
    {
        return examples == 0 ? 0.0 : static_cast<double>(different) / static_cast<double>(examples);
    }
};

/// What a model with these parameters says about the inputs of a task: any value that the distance understands.
template <class Model, class T>
concept model_callback =
    requires(Model& model, host_view<const T> parameters, std::size_t task) { model(parameters, task); };

/// ξ(λ) = Σi E_x[dist(f(x; φ0 + λi·νi), f(x; φ0 + Σj λj·νj))], x over task i's inputs, i and j over the chosen tasks.
/// `model(parameters, task)` evaluates f on the inputs of a task, `distance(single, merged)` returns the mean over
/// them. The predictions of single task vectors are kept (one for each task and factor) and shared by all grids of one
/// meter.
///
///     disentanglement_meter meter(space, [&](auto phi, std::size_t task) { return predict(phi, inputs[task]); });
///     lambda_grid xi = meter.grid({.task1 = 0, .task2 = 1, .lambda1 = equidistant(-1, 1, 21)});
///     double together = meter.error(std::vector{0.3, 0.3, 0.3});
template <storage_element T, class Model, class Distance = prediction_mismatch>
    requires model_callback<Model, T>
class disentanglement_meter {
public:
    /// What the model returns.
    using prediction = std::remove_cvref_t<std::invoke_result_t<Model&, host_view<const T>, std::size_t>>;

    /// `space` is borrowed.
    disentanglement_meter(task_space<T>& space, Model model, Distance distance = {})
        : space_(&space)
        , model_(std::move(model))
        , distance_(std::move(distance))
    { }

    /// dist for each of `tasks` (default: all) at these factors, one for each task of the space; tasks that are not
    /// chosen must have factor 0. Cost: one combination, one evaluation a chosen task, and single evaluations not yet
    /// made. Errors: invalid_argument.
    [[nodiscard]] std::vector<double> error_by_task(
        std::span<const double> lambdas, std::span<const std::size_t> tasks = {})
    {
        std::vector<std::size_t> chosen(tasks.begin(), tasks.end());
        if (chosen.empty()) {
            for (std::size_t t = 0; t < space_->tasks(); ++t) { chosen.push_back(t); }
        }
        if (lambdas.size() != space_->tasks()) {
            raise<invalid_argument>(error_code::list_length,
                message(
                    "disentanglement: ", lambdas.size(), " factors for ", space_->tasks(), " tasks: give one each"));
        }
        std::vector<bool> allowed(space_->tasks(), false);
        for (const std::size_t task : chosen) {
            if (task >= space_->tasks()) {
                raise<invalid_argument>(
                    error_code::index_out_of_range, message("disentanglement: there is no task ", task));
            }
            allowed[task] = true;
        }
        for (std::size_t t = 0; t < lambdas.size(); ++t) {
            if (!allowed[t] && lambdas[t] != 0) {
                raise<invalid_argument>(error_code::index_out_of_range,
                    message("disentanglement: task ", t, " has a factor but is not among the chosen tasks"));
            }
        }
        for (const std::size_t task : chosen) { (void)single(task, lambdas[task]); }
        const auto merged = space_->at(lambdas);
        std::vector<double> errors;
        for (const std::size_t task : chosen) {
            errors.push_back(static_cast<double>(distance_(single(task, lambdas[task]), model_(merged, task))));
        }
        return errors;
    }

    /// ξ at these factors: the sum of error_by_task().
    [[nodiscard]] double error(std::span<const double> lambdas, std::span<const std::size_t> tasks = {})
    {
        double sum = 0;
        for (const double error : error_by_task(lambdas, tasks)) { sum += error; }
        return sum;
    }

    /// ξ(λ1, λ2) of two tasks over a grid. Errors: invalid_argument.
    [[nodiscard]] lambda_grid grid(const plane_options& plane)
    {
        detail::check_plane(*space_, plane);
        lambda_grid grid = detail::grid_of(plane);
        const std::size_t pair[] = {plane.task1, plane.task2};
        std::vector<double> lambdas(space_->tasks(), 0.0);
        for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
            for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
                lambdas[plane.task1] = grid.lambda1[i];
                lambdas[plane.task2] = grid.lambda2[j];
                grid.at(i, j) = error(lambdas, pair);
            }
        }
        return grid;
    }

private:
    const prediction& single(std::size_t task, double lambda)
    {
        const auto key = std::pair(task, lambda);
        if (const auto known = singles_.find(key); known != singles_.end()) { return known->second; }
        std::vector<double> lambdas(space_->tasks(), 0.0);
        lambdas[task] = lambda;
        return singles_.emplace(key, model_(space_->at(lambdas), task)).first->second;
    }

    task_space<T>* space_;
    Model model_;
    Distance distance_;
    std::map<std::pair<std::size_t, double>, prediction> singles_;
};

template <storage_element T, class Model>
disentanglement_meter(task_space<T>&, Model) -> disentanglement_meter<T, Model>;
template <storage_element T, class Model, class Distance>
disentanglement_meter(task_space<T>&, Model, Distance) -> disentanglement_meter<T, Model, Distance>;

} // namespace taskvec::inline TASKVEC_ABI
