// NuSLERP: spherical interpolation by weights, of two models or of their task vectors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/combination.hpp>
#include <taskvec/methods/merge.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b with t = w2/(w1 + w2) (½ where the
/// weights sum to 0) and Ω the angle between a and b; (1−t)·a + t·b where they are collinear (sin²Ω ≤ 1e-14). a and b
/// are the two tasks; with a base they are the task vectors, and the result is added to it. The angle to a zero vector
/// counts as a right one. Norms and the angle are f64 sums of a fixed shape, the factors are rounded to f32 (f64 for
/// f64) once: bit-exact for any threads and blocks. Agrees with mergekit's `nuslerp` (flattened) to rounding. Errors:
/// invalid_argument (weights; another number of tasks than two). Cost: two reads of the models.
///
///     merge(cpu{}, nuslerp_options{.weights = {1, 3}}, base, tasks, out);
struct nuslerp_options {
    std::vector<double> weights{};
};

template <>
struct options_of<nuslerp_options> {
    static constexpr option_table table{weights_row(&nuslerp_options::weights)};
};

namespace detail {

/// The factors of the two vectors at t between them.
[[nodiscard]] inline std::vector<double> nuslerp_factors(const gram_matrix& dots, double t)
{
    const double norms = std::max(dots.norm(std::size_t{0}), 1e-7) * std::max(dots.norm(std::size_t{1}), 1e-7);
    const double cosine = std::clamp(dots(0, 1) / norms, -1.0, 1.0);
    if (1 - cosine * cosine <= 1e-14) { return {1 - t, t}; }
    const double angle = std::acos(cosine), sine = std::sin(angle);
    return {std::sin((1 - t) * angle) / sine, std::sin(t * angle) / sine};
}

} // namespace detail

template <>
class method<nuslerp_options> : public combination_method {
public:
    template <class Passes>
    method(Passes& passes, const nuslerp_options& options)
        : method(passes, place(options, passes.tasks()))
    { }

private:
    template <class Passes>
    method(Passes& passes, double t)
        : combination_method(passes, passes.models().has_base(),
              [t](const detail::gram_matrix& dots, std::size_t) { return detail::nuslerp_factors(dots, t); })
    { }
    /// t, between the two models.
    [[nodiscard]] static double place(const nuslerp_options& options, std::size_t tasks)
    {
        if (tasks != 2) {
            raise<invalid_argument>(error_code::task_count,
                message("NuSLERP goes between two models, and the number of tasks is ", tasks, ": give two"));
        }
        const auto weights = task_weights(options.weights, 2);
        const double total = weights[0] + weights[1];
        return std::abs(total) < 1e-6 ? 0.5 : weights[1] / total;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, nuslerp_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
