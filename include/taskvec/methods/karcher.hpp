// The Karcher mean: the point of a sphere whose squared distances to the models add up to the least. Karcher,
// "Riemannian center of mass and mollifier smoothing" (1977).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/combination.hpp>
#include <taskvec/methods/merge.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = (Σ wt·‖θt‖)·m, where m is the Karcher mean of the directions θt/‖θt‖ on
/// the unit sphere with weights wt, which are divided by their sum. m starts at the normalised mean and moves by
///     m ← exp_m(Σ wt·log_m(θt/‖θt‖))
/// until a step is shorter than `tolerance`, `steps` times at most. Vectors shorter than `tolerance` have no direction;
/// where none has one the result is 0. Needs no base. m is always a linear combination of the θt, and steps are taken
/// on its factors in f64 from the models' dot products (sums of a fixed shape): no step reads a model. The factors are
/// rounded to f32 (f64 for f64) once: bit-exact for any threads and blocks. Agrees with mergekit's `karcher`, whose
/// steps run in f32, to `tolerance`. Errors: invalid_argument (weights negative or all 0, tolerance). Cost: two reads
/// of the models, and T(T+1)/2 products an element in the first.
///
///     merge(cpu{}, karcher_options{.steps = 50, .tolerance = 1e-12}, tasks, out);
struct karcher_options {
    std::vector<double> weights{};
    std::uint64_t steps = 10;
    double tolerance = 1e-5;
};

template <>
struct options_of<karcher_options> {
    static constexpr option_table table{weights_row(&karcher_options::weights),
        option_row("steps", &karcher_options::steps, "steps towards the mean, at most"),
        option_row("tolerance", &karcher_options::tolerance,
            "length of a step that is none, and of a vector without direction", {.above = 0})};
};

namespace detail {

/// The factors of the models of one tensor. The weights sum to 1.
[[nodiscard]] inline call_vector<double> karcher_factors(
    const karcher_options& options, const gram_matrix& dots, const call_vector<double>& weights)
{
    const std::size_t n = dots.count();
    if (n == 1) { return call_vector<double>(1, 1.0); }
    call_vector<double> norms(n), share(n), mean(n);
    double length = 0, total = 0;
    std::size_t first = n;
    for (std::size_t t = 0; t < n; ++t) {
        norms[t] = dots.norm(t);
        length += weights[t] * norms[t];
        if (!(norms[t] > options.tolerance)) { continue; }
        first = std::min(first, t);
        share[t] = weights[t];
        total += weights[t];
    }
    if (first == n || total == 0) { return mean; }
    for (std::size_t t = 0; t < n; ++t) {
        share[t] /= total;
        mean[t] = share[t] == 0 ? 0.0 : share[t] / norms[t];
    }
    const auto normalize = [&](double least) {
        const double norm = dots.norm(mean);
        if (!(norm > least)) { return false; }
        for (double& factor : mean) { factor /= norm; }
        return true;
    };
    if (!normalize(options.tolerance)) { // directions that cancel: from the first of them
        mean.assign(n, 0.0);
        mean[first] = 1 / norms[first];
    }
    for (std::uint64_t step = 0; step < options.steps; ++step) {
        call_vector<double> tangent(n);
        for (std::size_t t = 0; t < n; ++t) {
            if (share[t] == 0) { continue; }
            const double cosine = std::clamp(dots.dot(t, mean) / norms[t], -1.0, 1.0), angle = std::acos(cosine);
            const double sine = std::sin(angle);
            if (angle < options.tolerance || sine < 1e-12) { continue; } // at m, or opposite: no direction leads there
            const double pull = share[t] * angle / sine;
            tangent[t] += pull / norms[t];
            for (std::size_t j = 0; j < n; ++j) { tangent[j] -= pull * cosine * mean[j]; }
        }
        const double norm = dots.norm(tangent);
        if (norm < options.tolerance) { break; }
        for (std::size_t t = 0; t < n; ++t) { mean[t] = std::cos(norm) * mean[t] + std::sin(norm) / norm * tangent[t]; }
        (void)normalize(0.0);
    }
    for (double& factor : mean) { factor *= length; }
    return mean;
}

} // namespace detail

template <>
class method<karcher_options> : public combination_method {
public:
    template <class Passes>
    method(Passes& passes, const karcher_options& options)
        : method(passes, options, weights_of(options, passes.models()))
    { }

private:
    template <class Passes>
    method(Passes& passes, const karcher_options& options, const call_vector<double>& weights)
        : combination_method(passes, false, [&](const detail::gram_matrix& dots, std::size_t) {
            return detail::karcher_factors(options, dots, weights);
        })
    { }
    [[nodiscard]] static call_vector<double> weights_of(const karcher_options& options, const aligned_models& models)
    {
        auto weights = task_weights(options.weights, models, false);
        const double total = detail::weight_divisor(weights, true, models).get<double>();
        for (double& weight : weights) { weight /= total; }
        return weights;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, karcher_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
