// Fisher merging: Matena and Raffel, "Merging models with Fisher-weighted averaging" (NeurIPS 2022).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/statistics/aligned_fishers.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = Σ ct·Ft·θt / Σ ct·Ft, elementwise, where Ft ≥ 0 is the diagonal Fisher information of task t: parameters that a
/// task is sure about count more. Where the denominator is below `floor`, no task knows anything, and the plain average
/// Σ ct·θt / Σ ct is taken. `normalize` divides each Ft by its l2 norm over all included tensors (a Fisher that is all
/// zero stays zero), so that tasks whose gradients are larger do not drown the others. Needs no base. `fishers` holds
/// one model of statistics for each task, with a tensor of the same name and shape for every included floating tensor
/// (f64, f32, bf16, f16 or fp8), and no others; where a missing tensor of a task stands for the base's, its Fisher may
/// be missing too and counts as 0. fisher_accumulator makes them, statistics_file reads them. Weights ct: one for each
/// task, or none for all 1; not negative, not all 0. Sums run in f32 (f64 for f64) in task order: (ct·Ft) and
/// (ct·Ft)·θt round, then their sums, then the quotient; with `normalize` ct/‖Ft‖ rounds once. Bit-exact. Errors:
/// invalid_argument (a negative Fisher entry, tensors that do not belong), shape_mismatch, dtype_mismatch,
/// nonfinite_error. Cost: one read of models and Fishers; one more of the Fishers to normalise.
///
///     merge(cpu{}, fisher_options{.fishers = fishers}, tasks, out);
struct fisher_options {
    std::vector<const_model_ref> fishers{}; ///< of each task, by the names of the models' tensors
    std::vector<double> weights{};
    bool normalize = false;
    double floor = 1e-12;
    std::vector<std::string> labels{}; ///< names of the Fishers in messages; empty: "the Fisher of task 1", …
};

template <>
struct options_of<fisher_options> {
    static constexpr option_table table{weights_row(&fisher_options::weights),
        option_row("normalize", &fisher_options::normalize, "divide each Fisher by its norm over the model"),
        option_row(
            "floor", &fisher_options::floor, "below this sum of Fishers the plain average is taken", {.at_least = 0})};
};

/// The Fishers of tasks that are flat views, in the memory of the policy that merges.
///
///     merge(cpu{}, fisher_options{.fishers = flat_fishers(f)}, tasks, out);
template <class Fishers>
    requires(tasks_of<Fishers, cpu> || tasks_of<Fishers, gpu>)
[[nodiscard]] std::vector<const_model_ref> flat_fishers(const Fishers& fishers)
{
    return detail::flat_models(fishers);
}

/// Σ (factors[t]·Ft)·θt / Σ factors[t]·Ft, and Σ weights[t]·θt / total where the denominator is below `floor`. Every
/// product, sum and quotient rounds, in task order from +0 on. A Fisher that is not there counts as 0.
template <arithmetic_element A>
struct fisher_body {
    static constexpr bool watches = true;
    static constexpr bool reads_beside = true;
    const A *factors, *weights; ///< ct/‖Ft‖ or ct, and ct, of each task
    A total, floor; ///< Σ ct, and the least denominator

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        pack above{}, below{}, plain{};
        in.each([&](std::size_t t) TASKVEC_BODY {
            const pack value = in.task(t);
            if (in.has_beside(t)) {
                const pack importance = factors[t] * in.beside(t);
                above = above + importance * value;
                below = below + importance;
            }
            plain = plain + weights[t] * value;
        });
        in.watch(above);
        return select(below < floor, plain / total, above / below);
    }
};

namespace detail {

/// What messages call the Fisher of a task.
[[nodiscard]] inline std::string fisher_label(
    const fisher_options& options, std::size_t t, const aligned_models& models)
{
    return fishers_label(options.labels, t, models);
}
[[noreturn]] TASKVEC_COLD inline void refuse_fisher_nonfinite(
    const aligned_models& models, std::size_t tensor, const std::string& where, double found, std::uint64_t index)
{
    raise<nonfinite_error>(error_code::statistics_not_finite,
        message("tensor '", models.tensors()[tensor].name, "' of ", where, " holds ",
            std::isnan(found) ? "NaN" : "infinity", " at index ", index, ": collect the statistics again"));
}
[[noreturn]] TASKVEC_COLD inline void refuse_fisher_negative(
    const aligned_models& models, std::size_t tensor, const std::string& where, double found, std::uint64_t index)
{
    raise<invalid_argument>(error_code::statistics_invalid,
        message("tensor '", models.tensors()[tensor].name, "' of ", where, " holds ", found, " at index ", index,
            ": a diagonal Fisher is a mean of squares and cannot be negative"));
}

/// Throws unless the weights mean something. Returns the weights ct.
[[nodiscard]] inline call_vector<double> checked_fisher_weights(
    const fisher_options& options, const aligned_models& models)
{
    auto weights = task_weights(options.weights, models, false);
    double total = 0;
    for (const double weight : weights) { total += weight; }
    if (total == 0) {
        raise<invalid_argument>(
            error_code::weights_sum_zero, "the weights of a Fisher merge are all 0: give one of them more");
    }
    return weights;
}

/// ct/‖Ft‖ for each task, from Σ Ft² of every tensor, [tensor][task]; 0 for a Fisher that is all 0.
template <class Squares>
[[nodiscard]] call_vector<double> normalized_fisher_weights(std::span<const double> weights, const Squares& squares)
{
    call_vector<double> factors;
    for (std::size_t t = 0; t < weights.size(); ++t) {
        double square = 0;
        for (const auto& of_tensor : squares) { square += of_tensor[t]; }
        factors.push_back(square == 0 ? 0.0 : weights[t] / std::sqrt(square));
    }
    return factors;
}

/// The least denominator that is divided by; never 0, so that 0 / 0 is never taken.
template <arithmetic_element A>
[[nodiscard]] A fisher_floor(const fisher_options& options) noexcept
{
    return std::max(static_cast<A>(options.floor), std::numeric_limits<A>::denorm_min());
}

} // namespace detail

template <>
class method<fisher_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;
    static constexpr bool beside_not_negative = true;

    [[nodiscard]] static call_vector<aligned_tensor::operand> beside(
        const fisher_options& options, const aligned_models& models, memory_space space)
    {
        return detail::aligned_fishers(models, options.fishers, options.labels, space).operands();
    }

    template <class Passes>
    method(Passes& passes, const fisher_options& options)
        : options_(&options)
        , weights_(detail::checked_fisher_weights(options, passes.models()))
        , plain_(passes, weights_)
        , factors_(plain_)
    {
        const std::size_t tensors = passes.models().tensors().size();
        const auto tasks = static_cast<std::uint32_t>(passes.tasks());
        for (std::size_t i = 0; i < tensors; ++i) {
            for (std::size_t t = 0; t < tasks; ++t) {
                const auto& fisher = passes.beside(i, t);
                bytes_ += fisher.data ? byte_count(fisher.dtype, passes.models().tensors()[i].size) : 0;
            }
        }
        if (!options.normalize) { return; }
        bytes_ *= 2;
        call_vector<operand_pair> squares;
        for (std::uint32_t t = 0; t < tasks; ++t) { squares.push_back({1 + tasks + t, 1 + tasks + t}); }
        const auto sums = tensor_dots(passes, squares, false, "Fisher norms");
        factors_ = kept_numbers(passes, detail::normalized_fisher_weights(weights_, sums));
    }
    template <arithmetic_element A>
    [[nodiscard]] fisher_body<A> body(std::size_t) const
    {
        A total = 0;
        for (const double weight : weights_) { total += static_cast<A>(weight); }
        return {factors_.get<A>(), plain_.get<A>(), total, detail::fisher_floor<A>(*options_)};
    }
    /// Reports what no Fisher may hold.
    [[noreturn]] void refuse_beside(
        const aligned_models& models, std::size_t tensor, std::size_t t, double found, std::uint64_t index) const
    {
        const std::string where = detail::fisher_label(*options_, t, models);
        if (std::isfinite(found)) { detail::refuse_fisher_negative(models, tensor, where, found, index); }
        detail::refuse_fisher_nonfinite(models, tensor, where, found, index);
    }
    [[nodiscard]] std::uint64_t bytes_beside() const noexcept { return bytes_; }

private:
    const fisher_options* options_; // the caller's
    call_vector<double> weights_; // ct
    kept_numbers plain_, factors_; // ct; ct or ct/‖Ft‖
    std::uint64_t bytes_ = 0;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, fisher_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
