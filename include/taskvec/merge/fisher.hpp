// Fisher merging: Matena and Raffel, "Merging models with Fisher-weighted averaging" (NeurIPS 2022).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/merge/merge.hpp>

#include <string>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = Σ ct·Ft·θt / Σ ct·Ft, elementwise, where Ft ≥ 0 is the diagonal Fisher information of task t: parameters that a task is
/// sure about count more. Where the denominator is below `floor`, no task knows anything, and the plain average
/// Σ ct·θt / Σ ct is taken. `normalize` divides each Ft by its l2 norm over all included tensors (a Fisher that is all zero stays
/// zero), so that tasks whose gradients are larger do not drown the others. Needs no base.
/// `fishers` holds one model of statistics for each task, with a tensor of the same name and shape for every included
/// floating tensor (f64, f32, bf16, f16 or fp8), and no others; where a missing tensor of a task stands for the base's, its Fisher may be
/// missing too and counts as 0. fisher_accumulator makes them, statistics_file reads them.
/// Weights ct: one for each task, or none for all 1; not negative, not all 0. Sums run in f32 (f64 for f64) in task
/// order: (ct·Ft) and (ct·Ft)·θt round, then their sums, then the quotient; with `normalize` ct/‖Ft‖ rounds once. Bit-exact.
/// Errors: invalid_argument (a negative Fisher entry, tensors that do not belong), shape_mismatch, dtype_mismatch,
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
TASKVEC_NOINLINE bool accumulate_importance(
    A* TASKVEC_RESTRICT above, A* TASKVEC_RESTRICT below, const A* TASKVEC_RESTRICT f, const A* TASKVEC_RESTRICT x, A c, std::size_t n)
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
TASKVEC_NOINLINE void divide_rows_or(A* TASKVEC_RESTRICT above, const A* TASKVEC_RESTRICT below, const A* TASKVEC_RESTRICT plain, A floor, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) {
        const A quotient = above[i] / below[i];
        above[i] = below[i] < floor ? plain[i] : quotient;
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

template <>
class detail::merger<fisher_options> {
public:
    static constexpr bool needs_base = false, in_place = true;
    static constexpr std::size_t scratch_rows = 3;

    merger(const cpu& policy, const aligned_models& models, const fisher_options& options)
        : options_(options)
        , weights_(checked_weights(options.weights, models.task_count(), false))
        , factors_(weights_)
    {
        double total = 0;
        for (const double weight : weights_) { total += weight; }
        if (total == 0) { raise<invalid_argument>("the weights of a Fisher merge are all 0"); }
        if (!(options.floor >= 0) || !std::isfinite(options.floor)) {
            raise<invalid_argument>(message("floor is ", options.floor, "; expected a number that is not negative, such as 1e-12"));
        }
        align(models);
        if (options.normalize) { normalize(policy, models); }
    }

    [[nodiscard]] std::span<const companion> companions() const noexcept { return companions_; }

    template <arithmetic_element A>
    void operator()(block<A>& rows, A* merged, merge_tally&) const
    {
        const std::size_t n = rows.size(), tasks = rows.task_count();
        A* const below = rows.scratch(1);
        kernels::fill(merged, A{0}, n);
        kernels::fill(below, A{0}, n);
        for (std::size_t t = 0; t < tasks; ++t) {
            const A* const fisher = load(rows, t, rows.scratch(2));
            if (!fisher) { continue; }
            if (kernels::accumulate_importance(merged, below, fisher, rows.task(t), static_cast<A>(factors_[t]), n)) { blame_negative(rows, t, fisher); }
        }
        const A floor = std::max(static_cast<A>(options_.floor), std::numeric_limits<A>::denorm_min()); // 0 / 0 is never taken
        if (!kernels::any_below(below, floor, n)) { return kernels::divide_rows(merged, below, n); }
        A* const plain = rows.scratch(3);
        A total = 0;
        for (std::size_t t = 0; t < tasks; ++t) {
            const A weight = static_cast<A>(weights_[t]);
            t == 0 ? kernels::begin_sum(plain, rows.task(t), weight, n) : kernels::accumulate(plain, rows.task(t), weight, n);
            total += weight;
        }
        kernels::divide(plain, total, n);
        kernels::divide_rows_or(merged, below, plain, floor, n);
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    [[nodiscard]] std::uint64_t bytes_beside(const aligned_models&) const noexcept
    {
        std::uint64_t once = 0;
        for (const auto& fisher : companions_) { once += fisher.bytes; }
        return options_.normalize ? 2 * once : once;
    }

private:
    [[nodiscard]] std::string label(std::size_t t, const aligned_models& models) const
    {
        return options_.labels.empty() ? "the Fisher of " + models.label(t) : options_.labels[t];
    }

    void align(const aligned_models& models)
    {
        const std::size_t tasks = models.task_count();
        if (options_.fishers.size() != tasks) {
            raise<invalid_argument>(message(options_.fishers.size(), " Fishers for ", tasks, " tasks: give one each, in the order of the tasks"));
        }
        if (!options_.labels.empty() && options_.labels.size() != tasks) {
            raise<invalid_argument>(message(options_.labels.size(), " labels for ", tasks, " Fishers: give one each, or none"));
        }
        for (std::size_t t = 0; t < tasks; ++t) {
            for (const auto& [name, tensor] : options_.fishers[t]) {
                const auto place = std::lower_bound(
                    models.outputs().begin(), models.outputs().end(), name, [](const tensor_spec& spec, const std::string& n) { return spec.name < n; });
                if (place == models.outputs().end() || place->name != name) {
                    raise<invalid_argument>(
                        message("tensor '", name, "' of ", label(t, models), " is not in the models: these are the statistics of another model"));
                }
            }
        }
        operands_.resize(models.tensors().size() * tasks);
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            for (std::size_t t = 0; t < tasks; ++t) {
                const const_tensor_ref* const fisher = options_.fishers[t].find(tensor.name);
                if (!fisher) {
                    const bool stands_in = models.options().on_missing == missing::base && tensor.tasks[t].data == tensor.base.data;
                    if (stands_in) { continue; }
                    raise<invalid_argument>(message(
                        "tensor '", tensor.name, "' is missing in ", label(t, models), ": collect statistics for every parameter, or exclude the tensor"));
                }
                check(*fisher, tensor, label(t, models));
                operands_[i * tasks + t] = {static_cast<const std::byte*>(fisher->data), fisher->dtype};
                companions_.push_back({i, operands_[i * tasks + t].data, byte_count(fisher->dtype, tensor.size)});
            }
        }
    }

    static void check(const const_tensor_ref& fisher, const aligned_tensor& tensor, const std::string& where)
    {
        if (fisher.shape != tensor.shape) {
            raise<shape_mismatch>(message("tensor '", tensor.name, "' has shape ", to_string(fisher.shape), " in ", where, " but ", to_string(tensor.shape),
                " in the models: these are the statistics of another model"));
        }
        if (!is_storage(fisher.dtype) && !is_fp8(fisher.dtype)) {
            raise<dtype_mismatch>(
                message("tensor '", tensor.name, "' has dtype ", name(fisher.dtype), " in ", where, "; expected F64, F32, BF16 or F16: convert it"));
        }
        if (fisher.space != memory_space::host || !fisher.contiguous() || (!fisher.data && tensor.size > 0)) {
            raise<invalid_argument>(message("tensor '", tensor.name, "' of ", where, " must be contiguous host memory: copy it first"));
        }
    }

    /// Ft of a block; nullptr where it counts as 0.
    template <arithmetic_element A>
    const A* load(block<A>& rows, std::size_t t, A* out) const
    {
        const auto tensor = static_cast<std::size_t>(&rows.tensor() - rows.models().tensors().data());
        const aligned_tensor::operand& from = operands_[tensor * rows.task_count() + t];
        if (!from.data) { return nullptr; }
        bits_type<A> largest = 0;
        const A* const values = rows.beside(from, out, largest);
        if (largest >= exponent_mask<A> && rows.models().options().on_nonfinite == nonfinite::error) {
            for (std::size_t i = 0; i < rows.size(); ++i) {
                if (std::isfinite(values[i])) { continue; }
                raise<nonfinite_error>(message("tensor '", rows.tensor().name, "' of ", label(t, rows.models()), " holds ",
                    std::isnan(values[i]) ? "NaN" : "infinity", " at index ", rows.offset() + i, ": collect the statistics again"));
            }
        }
        return values;
    }

    template <arithmetic_element A>
    [[noreturn, gnu::cold]] void blame_negative(const block<A>& rows, std::size_t t, const A* fisher) const
    {
        std::size_t i = 0;
        while (!(fisher[i] < 0)) { ++i; }
        raise<invalid_argument>(message("tensor '", rows.tensor().name, "' of ", label(t, rows.models()), " holds ", fisher[i], " at index ", rows.offset() + i,
            ": a diagonal Fisher is a mean of squares and cannot be negative"));
    }

    void normalize(const cpu& policy, const aligned_models& models)
    {
        const std::size_t tasks = models.task_count();
        const auto sums = tensor_sums(policy, models, tasks, 1, "Fisher norms", [&]<class A>(block<A>& rows, double* sum) {
            for (std::size_t t = 0; t < tasks; ++t) {
                const A* const fisher = load(rows, t, rows.scratch(0));
                sum[t] = fisher ? kernels::dot(fisher, fisher, rows.size()) : 0.0;
            }
        });
        for (std::size_t t = 0; t < tasks; ++t) {
            double square = 0;
            for (const auto& of_tensor : sums) { square += of_tensor[t]; }
            factors_[t] = square == 0 ? 0.0 : weights_[t] / std::sqrt(square);
        }
    }

    fisher_options options_;
    std::vector<double> weights_, factors_; // ct; ct, or ct/‖Ft‖
    std::vector<aligned_tensor::operand> operands_; // [tensor][task]
    std::vector<companion> companions_;
};

} // namespace taskvec::inline TASKVEC_ABI
