// Weighted average of models: Model Soups (Wortsman et al. 2022), AdapterSoup, WiSE-FT with two models.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/linear_body.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstddef>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = Σ wt·θt / Σ wt, elementwise. Needs no base. Weights: one for each task, or none for all 1; any sign, but their
/// sum may not be 0. Without `normalize` nothing is divided: θ* = Σ wt·θt, for any weights. Sums run in f32 (f64 for
/// f64) in task order; bit-exact.
///
///     merge(cpu{}, average_options{.weights = {0.25, 0.75}}, tasks, out);
struct average_options {
    std::vector<double> weights{};
    bool normalize = true; ///< divide by the sum of the weights

    /// WiSE-FT (Wortsman et al. 2022) over {θ0, θ1}: (1−α)·θ0 + α·θ1.
    [[nodiscard]] static average_options wise_ft(double alpha) { return {.weights = {1 - alpha, alpha}}; }
};

template <>
struct options_of<average_options> {
    static constexpr option_table table{weights_row(&average_options::weights),
        option_row("normalized", &average_options::normalize, "divide by the sum of the weights",
            {.negated = "unnormalized"})};
};

template <>
class method<average_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    template <class Passes>
    method(Passes& passes, const average_options& options)
        : method(passes, task_weights(options.weights, passes.models()), options.normalize)
    { }
    /// Of one weight for each task. Errors: invalid_argument where they sum to 0.
    template <class Passes>
    method(Passes& passes, std::span<const double> weights, bool normalize)
        : weights_(weights.begin(), weights.end())
        , normalize_(normalize)
        , numbers_(passes, weights_)
    {
        if (total<double>() == 0 || total<float>() == 0) {
            raise<invalid_argument>(error_code::weights_sum_zero,
                message("the weights of an average sum to 0 (", detail::weights_text(weights_, passes.models()),
                    "), and nothing can be divided by that: change one of them"));
        }
    }
    template <arithmetic_element A>
    [[nodiscard]] mean_body<A> body(std::size_t) const
    {
        return {numbers_.get<A>(), total<A>()};
    }

private:
    /// Σ wt in A, in task order.
    template <arithmetic_element A>
    [[nodiscard]] A total() const noexcept
    {
        if (!normalize_) { return 1; }
        A sum = 0;
        for (const double weight : weights_) { sum += static_cast<A>(weight); }
        return sum;
    }

    call_vector<double> weights_;
    bool normalize_;
    kept_numbers numbers_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, average_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
