// Fisher merging: Matena and Raffel, "Merging models with Fisher-weighted averaging" (NeurIPS 2022).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/statistics/aligned_fishers.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
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
    std::vector<const_model_ref> fishers{};
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

/// The Fishers of tasks that are flat views.
///
///     merge(cpu{}, fisher_options{.fishers = flat_fishers(f)}, tasks, out);
template <tasks_of<cpu> Fishers>
[[nodiscard]] std::vector<const_model_ref> flat_fishers(const Fishers& fishers)
{
    return detail::flat_models(fishers);
}

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// above += (c·f)·x, below += c·f. Returns whether some f is negative.
template <arithmetic_element A>
TASKVEC_NOINLINE bool accumulate_importance(A* TASKVEC_RESTRICT above, A* TASKVEC_RESTRICT below,
    const A* TASKVEC_RESTRICT f, const A* TASKVEC_RESTRICT x, A c, std::size_t n)
{
    TASKVEC_STRICT_FP
    bits_type<A> negative = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const A value = f[i];
        const A importance = c * value;
        const A product = importance * x[i];
        above[i] = above[i] + product;
        below[i] = below[i] + importance;
        negative |= static_cast<bits_type<A>>(value < 0);
    }
    return negative != 0;
}

/// above += Σ (factors[t]·Ft)·θt, below += Σ factors[t]·Ft, over the stored words of N tasks, with the roundings and in
/// the order of accumulate_importance(). Returns the largest magnitude bits of `above`: NaN and infinity in an input
/// cannot but reach it. `negative`: some Ft < 0.
template <storage_element T, storage_element F, std::size_t N>
TASKVEC_NOINLINE std::uint32_t add_stored_importance(const storage_word<T>* const* tasks,
    const storage_word<F>* const* fishers, const float* factors, float* TASKVEC_RESTRICT above,
    float* TASKVEC_RESTRICT below, std::size_t n, bool& negative)
{
    TASKVEC_STRICT_FP
    const storage_word<T>* x[N];
    const storage_word<F>* f[N];
    float c[N];
    for (std::size_t t = 0; t < N; ++t) {
        x[t] = tasks[t];
        f[t] = fishers[t];
        c[t] = factors[t];
    }
    std::int32_t top = 0, below_zero = 0;
    for (std::size_t begin = 0; begin < n; begin += fetch_group) {
        const std::size_t end = begin + fetch_group < n ? begin + fetch_group : n;
        for (std::size_t t = 0; t < N; ++t) {
            fetch_ahead(x[t] + begin);
            fetch_ahead(f[t] + begin);
        }
        for (std::size_t i = begin; i < end; ++i) {
            float numerator = above[i], denominator = below[i];
#pragma GCC unroll 4
            for (std::size_t t = 0; t < N; ++t) {
                const float value = widen_word<float, F>(f[t][i]);
                const float importance = c[t] * value;
                const float product = importance * widen_word<float, T>(x[t][i]);
                numerator = numerator + product;
                denominator = denominator + importance;
                below_zero |= static_cast<std::int32_t>(value < 0);
            }
            above[i] = numerator;
            below[i] = denominator;
            const std::int32_t magnitude = static_cast<std::int32_t>(magnitude_bits(numerator));
            top = magnitude > top ? magnitude : top;
        }
    }
    negative = negative || below_zero != 0;
    return static_cast<std::uint32_t>(top);
}

/// Whether some entry is below `floor`.
template <arithmetic_element A>
TASKVEC_NOINLINE bool any_below(const A* TASKVEC_RESTRICT x, A floor, std::size_t n)
{
    bits_type<A> found = 0;
    for (std::size_t i = 0; i < n; ++i) { found |= static_cast<bits_type<A>>(x[i] < floor); }
    return found != 0;
}

/// above = above / below
template <arithmetic_element A>
TASKVEC_NOINLINE void divide_rows(A* TASKVEC_RESTRICT above, const A* TASKVEC_RESTRICT below, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) { above[i] = above[i] / below[i]; }
}

/// above = above / below, and plain where below < floor
template <arithmetic_element A>
TASKVEC_NOINLINE void divide_rows_or(
    A* TASKVEC_RESTRICT above, const A* TASKVEC_RESTRICT below, const A* TASKVEC_RESTRICT plain, A floor, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) {
        const A quotient = above[i] / below[i];
        above[i] = below[i] < floor ? plain[i] : quotient;
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// What messages call the Fisher of a task.
[[nodiscard]] inline std::string fisher_label(
    const fisher_options& options, std::size_t t, const aligned_models& models)
{
    return fishers_label(options.labels, t, models);
}
[[noreturn, gnu::cold]] inline void refuse_fisher_nonfinite(
    const aligned_models& models, std::size_t tensor, const std::string& where, double found, std::uint64_t index)
{
    raise<nonfinite_error>(message("tensor '", models.tensors()[tensor].name, "' of ", where, " holds ",
        std::isnan(found) ? "NaN" : "infinity", " at index ", index, ": collect the statistics again"));
}
[[noreturn, gnu::cold]] inline void refuse_fisher_negative(
    const aligned_models& models, std::size_t tensor, const std::string& where, double found, std::uint64_t index)
{
    raise<invalid_argument>(message("tensor '", models.tensors()[tensor].name, "' of ", where, " holds ", found,
        " at index ", index, ": a diagonal Fisher is a mean of squares and cannot be negative"));
}

/// Throws unless the weights and the floor mean something. Returns the weights ct.
[[nodiscard]] inline std::vector<double> checked_fisher_weights(const fisher_options& options, std::size_t tasks)
{
    std::vector<double> weights = checked_weights(options.weights, tasks, false);
    double total = 0;
    for (const double weight : weights) { total += weight; }
    if (total == 0) { raise<invalid_argument>("the weights of a Fisher merge are all 0"); }
    if (!(options.floor >= 0) || !std::isfinite(options.floor)) {
        raise<invalid_argument>(
            message("floor is ", options.floor, "; expected a number that is not negative, such as 1e-12"));
    }
    return weights;
}

/// ct/‖Ft‖ for each task, from Σ Ft² of every tensor, [tensor][task]; 0 for a Fisher that is all 0.
[[nodiscard]] inline std::vector<double> normalized_fisher_weights(
    const std::vector<double>& weights, const std::vector<std::vector<double>>& squares)
{
    std::vector<double> factors;
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
class detail::merger<fisher_options> {
public:
    static constexpr bool needs_base = false, in_place = true;
    static constexpr std::size_t scratch_rows = 3;

    merger(const cpu& policy, const aligned_models& models, const fisher_options& options)
        : options_(options)
        , weights_(checked_fisher_weights(options, models.task_count()))
        , factors_(weights_)
        , fishers_(models, options.fishers, options.labels)
    {
        if (options.normalize) { normalize(policy, models); }
    }

    [[nodiscard]] std::span<const companion> companions() const noexcept { return fishers_.companions(); }

    template <arithmetic_element A>
    void operator()(block<A>& rows, A* merged, merge_tally&) const
    {
        const std::size_t n = rows.size(), tasks = rows.task_count();
        A* const below = rows.scratch(1);
        if (!accumulate_stored(rows, merged, below)) {
            kernels::fill(merged, A{0}, n);
            kernels::fill(below, A{0}, n);
            for (std::size_t t = 0; t < tasks; ++t) {
                const A* const fisher = load(rows, t, rows.scratch(2));
                if (!fisher) { continue; }
                if (kernels::accumulate_importance(
                        merged, below, fisher, rows.task(t), static_cast<A>(factors_[t]), n)) {
                    blame_negative(rows, t, fisher);
                }
            }
        }
        const A floor = fisher_floor<A>(options_);
        if (!kernels::any_below(below, floor, n)) { return kernels::divide_rows(merged, below, n); }
        A* const plain = rows.scratch(3);
        A total = 0;
        for (std::size_t t = 0; t < tasks; ++t) {
            const A weight = static_cast<A>(weights_[t]);
            t == 0 ? kernels::begin_sum(plain, rows.task(t), weight, n)
                   : kernels::accumulate(plain, rows.task(t), weight, n);
            total += weight;
        }
        kernels::divide(plain, total, n);
        kernels::divide_rows_or(merged, below, plain, floor, n);
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    [[nodiscard]] std::uint64_t bytes_beside(const aligned_models&) const noexcept
    {
        std::uint64_t once = 0;
        for (const auto& fisher : fishers_.companions()) { once += fisher.bytes; }
        return options_.normalize ? 2 * once : once;
    }

private:
    /// Where Ft of a block's tensor lies; without data where it counts as 0.
    template <arithmetic_element A>
    [[nodiscard]] const aligned_tensor::operand& operand(const block<A>& rows, std::size_t t) const noexcept
    {
        const auto tensor = static_cast<std::size_t>(&rows.tensor() - rows.models().tensors().data());
        return fishers_.operands()[tensor * rows.task_count() + t];
    }
    /// Ft of a block; nullptr where it counts as 0.
    template <arithmetic_element A>
    const A* load(block<A>& rows, std::size_t t, A* out) const
    {
        const aligned_tensor::operand& from = operand(rows, t);
        if (!from.data) { return nullptr; }
        bits_type<A> largest = 0;
        const A* const values = rows.beside(from, out, largest);
        if (largest >= exponent_mask<A> && rows.models().options().on_nonfinite == nonfinite::error) {
            for (std::size_t i = 0; i < rows.size(); ++i) {
                if (!std::isfinite(values[i])) {
                    const auto tensor = static_cast<std::size_t>(&rows.tensor() - rows.models().tensors().data());
                    refuse_fisher_nonfinite(rows.models(), tensor, fisher_label(options_, t, rows.models()),
                        static_cast<double>(values[i]), rows.offset() + i);
                }
            }
        }
        return values;
    }

    static constexpr std::size_t fused_tasks = 64; ///< the most that are accumulated from stored words

    /// Both sums of a block straight from the stored words, with the bits of the row by row way; false where that has
    /// to do it: words of other types, misaligned, a Fisher that is missing, or an input that is wrong and has to be
    /// named.
    template <arithmetic_element A>
    bool accumulate_stored(block<A>& rows, A* above, A* below) const
    {
        if constexpr (std::same_as<A, float>) {
            const aligned_tensor::operand* const fishers = &operand(rows, 0);
            if (fishers->dtype == dtype::bf16) { return accumulate_stored<bf16, bf16>(rows, fishers, above, below); }
            return accumulate_stored<float, float>(rows, fishers, above, below)
                || accumulate_stored<bf16, float>(rows, fishers, above, below);
        }
        else {
            return false;
        }
    }
    template <storage_element T, storage_element F>
    bool accumulate_stored(block<float>& rows, const aligned_tensor::operand* fishers, float* above, float* below) const
    {
        const std::size_t n = rows.size(), count = rows.task_count();
        std::array<const storage_word<T>*, fused_tasks> tasks;
        std::array<const storage_word<F>*, fused_tasks> values;
        const storage_word<T>* base = nullptr;
        if (!rows.template stored<T>(base, tasks)) { return false; }
        for (std::size_t t = 0; t < count; ++t) {
            const auto& from = fishers[t];
            if (!from.data
                || from.dtype != dtype_of<F> || reinterpret_cast<std::uintptr_t>(from.data) % alignof(F) != 0) {
                return false;
            }
            values[t] = reinterpret_cast<const storage_word<F>*>(from.data) + rows.offset();
        }
        using kernel = std::uint32_t(const storage_word<T>* const*, const storage_word<F>* const*, const float*, float*,
            float*, std::size_t, bool&);
        static constexpr kernel* of_group[] = {&kernels::add_stored_importance<T, F, 1>,
            &kernels::add_stored_importance<T, F, 2>, &kernels::add_stored_importance<T, F, 3>,
            &kernels::add_stored_importance<T, F, 4>};
        constexpr std::size_t most = std::size(of_group);
        kernels::fill(above, 0.0f, n);
        kernels::fill(below, 0.0f, n);
        std::uint32_t largest = 0;
        bool negative = false;
        for (std::size_t t = 0; t < count; t += most) {
            std::array<float, most> factors{};
            const std::size_t group = std::min(most, count - t);
            for (std::size_t i = 0; i < group; ++i) { factors[i] = static_cast<float>(factors_[t + i]); }
            largest =
                of_group[group - 1](tasks.data() + t, values.data() + t, factors.data(), above, below, n, negative);
        }
        return !negative && largest < exponent_mask<float>;
    }

    template <arithmetic_element A>
    [[noreturn, gnu::cold]] void blame_negative(const block<A>& rows, std::size_t t, const A* fisher) const
    {
        std::size_t i = 0;
        while (!(fisher[i] < 0)) { ++i; }
        const auto tensor = static_cast<std::size_t>(&rows.tensor() - rows.models().tensors().data());
        refuse_fisher_negative(rows.models(), tensor, fisher_label(options_, t, rows.models()),
            static_cast<double>(fisher[i]), rows.offset() + i);
    }

    void normalize(const cpu& policy, const aligned_models& models)
    {
        const std::size_t tasks = models.task_count();
        const auto sums =
            tensor_sums(policy, models, tasks, 1, "Fisher norms", [&]<class A>(block<A>& rows, double* sum) {
                for (std::size_t t = 0; t < tasks; ++t) {
                    const A* const fisher = load(rows, t, rows.scratch(0));
                    const auto& from = operand(rows, t);
                    if (!fisher) { sum[t] = 0; }
                    else if (from.dtype == dtype::f64) { // not as rounded to A
                        std::array<double, block_size> values;
                        sum[t] = with_elements(from, rows.offset(), rows.size(),
                            reinterpret_cast<std::byte*>(values.data()), [&](const auto* stored) {
                                using T = std::remove_cvref_t<decltype(*stored)>;
                                if constexpr (std::same_as<T, double>) {
                                    return kernels::dot(stored, stored, rows.size());
                                }
                                else {
                                    return 0.0;
                                }
                            });
                    }
                    else {
                        sum[t] = kernels::dot(fisher, fisher, rows.size());
                    }
                }
            });
        factors_ = normalized_fisher_weights(weights_, sums);
    }

    fisher_options options_;
    std::vector<double> weights_, factors_; // ct; ct, or ct/‖Ft‖
    aligned_fishers fishers_;
};

} // namespace taskvec::inline TASKVEC_ABI
