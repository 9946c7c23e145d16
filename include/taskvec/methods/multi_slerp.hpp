// Multi-SLERP: the weighted mean direction of several models at their mean length.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/combination.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstddef>
#include <string>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = N·m/‖m‖ with m = Σ wt·xt/(‖xt‖ + ε), N = Σ wt·‖xt‖ and ε = 1e-8, where the
/// weights are divided by their sum unless `normalize` is off. The xt are the tasks; with a base they are the task
/// vectors, and the result is added to it. Goddard's Multi-SLERP goes on in the tangent space of the sphere at m, by
/// the weighted mean of the projected xt, which is 0 there: what it adds to this is rounding. One task is kept as it
/// is. Where the directions cancel (‖m‖ < ε), two models, or vectors that are all 0, are added up by their weights;
/// more are an error. Norms are f64 sums of a fixed shape, the factors are rounded to f32 (f64 for f64) once: bit-exact
/// for any threads and blocks. Agrees with mergekit's `multislerp` to rounding. Errors: invalid_argument. Cost: two
/// reads of the models, and T(T+1)/2 products an element in the first.
///
///     merge(cpu{}, multi_slerp_options{.weights = {1, 1, 2}}, tasks, out);
struct multi_slerp_options {
    std::vector<double> weights{};
    bool normalize = true; ///< divide the weights by their sum
};

template <>
struct options_of<multi_slerp_options> {
    static constexpr option_table table{weights_row(&multi_slerp_options::weights),
        option_row("normalized", &multi_slerp_options::normalize, "divide by the sum of the weights",
            {.negated = "unnormalized"})};
};

namespace detail {

/// The factors of the vectors of one tensor.
[[nodiscard]] inline call_vector<double> multi_slerp_factors(
    const gram_matrix& dots, const call_vector<double>& weights, const std::string& tensor)
{
    constexpr double epsilon = 1e-8;
    if (dots.count() == 1) { return call_vector<double>(1, 1.0); }
    call_vector<double> factors;
    double length = 0;
    bool all_zero = true;
    for (std::size_t t = 0; t < dots.count(); ++t) {
        const double norm = dots.norm(t);
        factors.push_back(weights[t] / (norm + epsilon));
        length += weights[t] * norm;
        all_zero = all_zero && norm == 0;
    }
    const double mean = dots.norm(factors);
    if (mean < epsilon) {
        if (dots.count() == 2 || all_zero) { return weights; }
        raise<invalid_argument>(error_code::no_solution,
            message("the directions of tensor '", tensor,
                "' cancel, so that Multi-SLERP has no mean direction there: change the weights, or exclude the "
                "tensor"));
    }
    for (double& factor : factors) { factor *= length / mean; }
    return factors;
}

} // namespace detail

template <>
class method<multi_slerp_options> : public combination_method {
public:
    template <class Passes>
    method(Passes& passes, const multi_slerp_options& options)
        : method(passes, weights_of(options, passes.models()))
    { }

private:
    template <class Passes>
    method(Passes& passes, const call_vector<double>& weights)
        : combination_method(
              passes, passes.models().has_base(), [&](const detail::gram_matrix& dots, std::size_t tensor) {
                  return detail::multi_slerp_factors(dots, weights, passes.models().tensors()[tensor].name);
              })
    { }
    [[nodiscard]] static call_vector<double> weights_of(
        const multi_slerp_options& options, const aligned_models& models)
    {
        auto weights = task_weights(options.weights, models);
        const double divisor = detail::weight_divisor(weights, options.normalize, models).get<double>();
        for (double& weight : weights) { weight /= divisor; }
        return weights;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, multi_slerp_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
