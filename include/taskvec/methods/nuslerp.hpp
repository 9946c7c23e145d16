// NuSLERP: spherical interpolation by weights, of two models or of their task vectors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/combination.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/vector_factors.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b with t = w2/(w1 + w2) (½ where the
/// weights sum to 0) and Ω the angle between a and b; (1−t)·a + t·b where they are collinear (sin²Ω ≤ 1e-14). a and b
/// are the two tasks; with a base they are the task vectors, and the result is added to it. The angle to a zero vector
/// counts as a right one. With `angles` each row or column has its own Ω. Norms and the angle are f64 sums of a fixed
/// shape, the factors are rounded to f32 (f64 for f64) once: bit-exact for any threads and blocks. Agrees with
/// mergekit's `nuslerp` to rounding. Errors: invalid_argument (weights; another number of tasks than two). Cost: two
/// reads of the models; for rows one, and memory for each thread: four numbers for each of 65,536 entries or of one
/// row; for columns two, and two numbers for each column. On the CPU; on devices two numbers for each row too, and two
/// reads.
///
///     merge(cpu{}, nuslerp_options{.weights = {1, 3}}, base, tasks, out);
struct nuslerp_options {
    std::vector<double> weights{};
    angles_between angles = angles_between::tensors;
};

template <>
struct options_of<nuslerp_options> {
    static constexpr option_table table{weights_row(&nuslerp_options::weights),
        option_row("angles-between", &nuslerp_options::angles, "whose angles count", {.unit = "WHICH"})};
};

namespace detail {

/// The factors of two vectors at t between them, from their dot products a·a, b·a, b·b.
struct nuslerp_rule {
    double t;

    void operator()(const double* dots, double* factors) const
    {
        const double norms = std::max(std::sqrt(dots[0]), 1e-7) * std::max(std::sqrt(dots[2]), 1e-7);
        const double cosine = std::clamp(dots[1] / norms, -1.0, 1.0);
        factors[0] = 1 - t;
        factors[1] = t;
        if (1 - cosine * cosine <= 1e-14) { return; }
        const double angle = std::acos(cosine), sine = std::sin(angle);
        factors[0] = std::sin((1 - t) * angle) / sine;
        factors[1] = std::sin(t * angle) / sine;
    }
    [[nodiscard]] call_vector<double> operator()(const gram_matrix& matrix, std::size_t) const
    {
        const std::array dots{matrix(0, 0), matrix(1, 0), matrix(1, 1)};
        call_vector<double> factors(2);
        (*this)(dots.data(), factors.data());
        return factors;
    }
};

} // namespace detail

template <>
class method<nuslerp_options> : public detail::method_by_vectors<combination_method, detail::nuslerp_rule> {
public:
    template <class Passes>
    method(Passes& passes, const nuslerp_options& options)
        : method(passes, detail::nuslerp_rule{place(options, passes.models())}, options.angles)
    { }
    /// Calls use(body) with the body of a tensor.
    template <arithmetic_element A, class Use>
    decltype(auto) with_body(std::size_t tensor, Use&& use) const
    {
        if (!by_vector().any()) { return use(body<A>(tensor)); }
        return use(vector_combination_body<A>{by_vector().template get<A>(tensor), on_base()});
    }

private:
    template <class Passes>
    method(Passes& passes, const detail::nuslerp_rule& rule, angles_between angles)
        : method_by_vectors(
              passes, angles, 2, rule, passes, passes.models().has_base(), rule, angles == angles_between::tensors)
    { }
    /// t, between the two models.
    [[nodiscard]] static double place(const nuslerp_options& options, const aligned_models& models)
    {
        const std::size_t tasks = models.task_count();
        if (tasks != 2) {
            raise<invalid_argument>(error_code::task_count,
                message("NuSLERP goes between two models, and the number of tasks is ", tasks, ": give two"));
        }
        const auto weights = task_weights(options.weights, models);
        const double total = weights[0] + weights[1];
        return std::abs(total) < 1e-6 ? 0.5 : weights[1] / total;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, nuslerp_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
