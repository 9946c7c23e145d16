// SLERP: spherical linear interpolation between two models. Shoemake, "Animating rotation with quaternion curves"
// (SIGGRAPH 1985).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/linear_body.hpp>
#include <taskvec/methods/merge.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b, with Ω the angle between a and b; and
/// (1−t)·a + t·b where |cosΩ| > 0.9995 or a norm is 0 (mergekit takes the angle to a zero tensor as a right one). a and
/// b are the two tasks, or, when there is one task, the base and that task. t = 0 gives a, t = 1 gives b; other values
/// than [0, 1] extrapolate. Norms and the angle are f64 sums of a fixed shape; the two factors are rounded to f32 (f64
/// for f64) once, then both products and the sum round: bit-exact for any threads and blocks. Cost: two reads of the
/// two models.
///
///     merge(cpu{}, slerp_options{.t = 0.3}, std::vector{a, b}, out);
struct slerp_options {
    double t = 0.5;
};

template <>
struct options_of<slerp_options> {
    static constexpr option_table table{
        option_row("t", &slerp_options::t, "how far to go, 0 is the first model and 1 the second")};
};

namespace detail {

/// The factors of a and b for one tensor.
struct slerp_factors {
    double of_a, of_b;
};
/// From the dots a·a, b·b and a·b.
[[nodiscard]] inline slerp_factors factors_of(const slerp_options& options, double aa, double bb, double ab)
{
    const double t = options.t, cosine = ab / (std::sqrt(aa) * std::sqrt(bb)); // NaN where a norm is 0
    if (!(std::abs(cosine) <= 0.9995)) { return {1 - t, t}; }
    const double angle = std::acos(cosine), sine = std::sin(angle);
    return {std::sin((1 - t) * angle) / sine, std::sin(t * angle) / sine};
}

/// Throws unless there are two models to go between. True where the first of them is the base.
inline bool check_slerp(const aligned_models& models)
{
    const bool from_base = models.task_count() == 1;
    if (models.task_count() > 2 || (from_base && !models.has_base())) {
        raise<invalid_argument>(error_code::task_count,
            message("SLERP goes between two models, and there ",
                models.task_count() == 1 ? "is one" : message("are ", models.task_count(), " tasks"),
                ": give two tasks, or a base and one task"));
    }
    return from_base;
}

} // namespace detail

template <>
class method<slerp_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    template <class Passes>
    method(Passes& passes, const slerp_options& options)
        : from_base_(detail::check_slerp(passes.models()))
    {
        const std::uint32_t a = from_base_ ? 0 : 1, b = a + 1;
        for (const auto& sum : tensor_dots(passes, {{a, a}, {b, b}, {a, b}}, false, "angles")) {
            factors_.push_back(detail::factors_of(options, sum[0], sum[1], sum[2]));
        }
    }
    /// Angles are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const slerp_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] pair_body<A> body(std::size_t tensor) const
    {
        return {static_cast<A>(factors_[tensor].of_a), static_cast<A>(factors_[tensor].of_b), from_base_};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; }

private:
    bool from_base_;
    call_vector<detail::slerp_factors> factors_; // for each tensor
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, slerp_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
