// Task arithmetic: Ilharco et al., "Editing models with task arithmetic" (ICLR 2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/elect/sum.hpp>
#include <taskvec/methods/merge.hpp>

#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + λ·Σ wt·τt with τt = θt − θ0. λ < 0 forgets. The analogy "a is to b as c is to …",
/// θ0 + λ·(τc + τb − τa), is the weights {1, 1, −1} over the tasks {c, b, a}: see analogy(). Sums run in f32 (f64 for
/// f64) in task order; every product and sum rounds; bit-exact. With `normalize` the sum is divided by Σ wt, which may
/// not be 0: λ times the weighted mean of the task vectors.
///
///     merge(cpu{}, task_arithmetic_options{.lambda = 0.3}, base, tasks, out);
struct task_arithmetic_options {
    double lambda = 0.3;
    std::vector<double> weights{};
    bool normalize = false; ///< divide by the sum of the weights

    /// mergekit's: λ is 1 where none is given.
    [[nodiscard]] static task_arithmetic_options as_in_mergekit()
    {
        task_arithmetic_options options;
        options.lambda = 1.0;
        return options;
    }
};

template <>
struct options_of<task_arithmetic_options> {
    static constexpr option_table table{
        option_row("lambda", &task_arithmetic_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&task_arithmetic_options::weights),
        option_row("normalize-weights", &task_arithmetic_options::normalize, "divide by the sum of the weights")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<task_arithmetic_options>{"paper", "the paper", [] { return task_arithmetic_options{}; }},
        option_preset<task_arithmetic_options>{"mergekit", "mergekit", &task_arithmetic_options::as_in_mergekit}};
};

template <>
class method<task_arithmetic_options> : public elementwise_method {
public:
    template <class Passes>
    method(Passes& passes, const task_arithmetic_options& options)
        : sum_(passes, options, keep_all{}, false)
    { }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A> body(std::size_t tensor) const
    {
        return sum_.body<A>(keep_all{}, tensor);
    }

private:
    kept_sum sum_;
};

/// The analogy "a is to b as c is to …": θ0 + λ·(τc + τb − τa). Sums in that order.
///
///     merge(cpu{}, analogy(0.5), base, std::vector{c, b, a}, out);
[[nodiscard]] inline task_arithmetic_options analogy(double lambda = 1.0)
{
    return {.lambda = lambda, .weights = {1.0, 1.0, -1.0}};
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, task_arithmetic_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
