// LoraHub: weights of a combination, sought without gradients. Huang et al., "LoraHub: efficient cross-task
// generalization via dynamic LoRA composition" (COLM 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/elect/sum.hpp>
#include <taskvec/methods/linear_body.hpp>
#include <taskvec/methods/merge.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#if !defined(TASKVEC_NO_EXCEPTIONS)
#include <exception>
#endif

namespace taskvec::inline TASKVEC_ABI {

/// What is sought: w in [−bound, bound]ᵀ that minimises L(w) + α·Σ|wt|, in at most so many evaluations. The defaults
/// are the paper's (its code takes the mean of |wt|, not their sum).
struct lorahub_options {
    double bound = 1.5;
    double alpha = 0.05; ///< factor of the L1 term
    std::size_t evaluations = 40;
    std::vector<double> start{}; ///< empty: all 0
};

template <>
struct options_of<lorahub_options> {
    static constexpr option_table table{
        option_row("bound", &lorahub_options::bound, "largest magnitude of a weight", {.above = 0}),
        option_row("l1", &lorahub_options::alpha, "factor of the sum of the weights' magnitudes", {.at_least = 0}),
        option_row("evaluations", &lorahub_options::evaluations, "scores that may be asked for", {.at_least = 1}),
        option_row("start", &lorahub_options::start, "weights to begin with, one for each task; none: all 0")};
};

/// One evaluation.
struct lorahub_candidate {
    std::vector<double> weights;
    double loss = 0; ///< L(w)
    double objective = 0; ///< L(w) + α·Σ|wt|
};

/// What lorahub() found.
struct lorahub_result {
    lorahub_candidate best; ///< of lowest objective; the first of equals
    std::vector<lorahub_candidate> history; ///< all evaluations, in order
};

/// What an optimiser is told beside the objective.
struct lorahub_problem {
    std::size_t dimension = 0; ///< one weight for each task
    double lower = 0, upper = 0; ///< bounds of every weight
    std::vector<double> start; ///< weights to begin with
    std::size_t evaluations = 0; ///< the budget
};

/// L(w) + α·Σ|wt|, as an optimiser calls it. Weights outside the bounds count as the bound.
using lorahub_objective = callback<double(std::span<const double> weights)>;

/// An optimiser: any callable that is given the problem and the objective, and returns when it has done what it could.
/// What it returns does not matter: the best candidate is taken from the history. One that does not stop when the
/// budget is spent is stopped (by an exception of no standard type out of the objective; with exceptions off going on
/// is an error).
template <class Optimizer>
concept lorahub_optimizer = std::invocable<Optimizer&, const lorahub_problem&, const lorahub_objective&>;

/// The loss of a candidate: of a view or model that is valid during the call, or of weights.
template <class Loss, class Candidate>
concept candidate_loss = requires(Loss& loss, const Candidate& candidate) {
    { loss(candidate) } -> std::convertible_to<double>;
};

/// A search that could not go on: a loss that failed or is not finite (kind nonfinite, or the kind and the code of what
/// the loss threw), or an optimiser that failed (backend_error). history() has what had been evaluated until then.
class lorahub_error : public error {
public:
    /// See error; `history` is handed on.
    lorahub_error(error_code code, error_kind kind, const std::string& message, std::vector<lorahub_candidate> history)
        : error(code, kind, message)
        , history_(std::move(history))
    { }
    /// What was evaluated until then.
    [[nodiscard]] const std::vector<lorahub_candidate>& history() const noexcept { return history_; }

private:
    std::vector<lorahub_candidate> history_;
};

namespace detail {

/// Counts, checks and keeps what an optimiser evaluates.
class lorahub_search {
public:
    lorahub_search(const lorahub_options& options, std::size_t tasks)
        : options_(options)
        , problem_{tasks, -options.bound, options.bound, options.start, options.evaluations}
    {
        if (tasks == 0) {
            raise<invalid_argument>(error_code::inputs_empty, "no task was given: at least one is needed");
        }
        if (!(options.bound > 0) || !std::isfinite(options.bound)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message(
                    "the bound of LoraHub's weights is ", options.bound, "; expected a positive number, such as 1.5"));
        }
        if (!(options.alpha >= 0) || !std::isfinite(options.alpha)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("alpha is ", options.alpha, "; expected a number that is not negative, such as 0.05"));
        }
        if (options.evaluations == 0) {
            raise<invalid_argument>(
                error_code::parameter_out_of_range, "LoraHub was given no evaluations: at least one is needed");
        }
        if (options.start.empty()) { problem_.start.assign(tasks, 0.0); }
        if (problem_.start.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message("LoraHub starts at ", problem_.start.size(), " weights for ", tasks,
                    " tasks: give one each, or none"));
        }
        for (const double weight : problem_.start) {
            if (!(std::abs(weight) <= options.bound)) {
                raise<invalid_argument>(error_code::parameter_out_of_range,
                    message("LoraHub starts at the weight ", weight, ", outside [", -options.bound, ", ", options.bound,
                        "]"));
            }
        }
    }

    template <class LossOfWeights, class Optimizer>
    lorahub_result run(LossOfWeights&& loss, Optimizer&& optimizer)
    {
        const lorahub_objective objective = [&](std::span<const double> weights) { return evaluate(weights, loss); };
#if defined(TASKVEC_NO_EXCEPTIONS)
        optimizer(std::as_const(problem_), objective);
#else
        try {
            optimizer(std::as_const(problem_), objective);
        }
        catch (const stop&) {
        }
        catch (const std::exception& failure) {
            if (!failed_) { remember(backend_code, backend_kind, message("the optimiser failed: ", failure.what())); }
        }
        catch (...) {
            if (!failed_) { remember(backend_code, backend_kind, "the optimiser failed"); }
        }
        if (failed_) { raise<lorahub_error>(code_, kind_, what_, std::move(history_)); }
#endif
        if (history_.empty()) {
            raise<lorahub_error>(
                backend_code, backend_kind, "the optimiser evaluated no candidate", std::move(history_));
        }
        std::size_t best = 0;
        for (std::size_t i = 1; i < history_.size(); ++i) {
            if (history_[i].objective < history_[best].objective) { best = i; }
        }
        return {history_[best], std::move(history_)};
    }

private:
    static constexpr error_code backend_code = error_code::optimizer_failed;
    static constexpr error_kind backend_kind = error_kind::backend_error;
    struct stop { }; // leaves an optimiser that has nothing more to learn

    template <class LossOfWeights>
    double evaluate(std::span<const double> weights, LossOfWeights& loss)
    {
        if (failed_ || history_.size() == options_.evaluations) {
#if defined(TASKVEC_NO_EXCEPTIONS)
            fail(backend_code, backend_kind,
                message("the optimiser asked for more than its budget of ", options_.evaluations, " evaluations"));
#else
            throw stop{};
#endif
        }
        if (weights.size() != problem_.dimension) {
            fail(backend_code, backend_kind,
                message("the optimiser gave ", weights.size(), " weights for ", problem_.dimension, " tasks"));
        }
        lorahub_candidate candidate{{weights.begin(), weights.end()}, 0, 0};
        double size = 0;
        for (double& weight : candidate.weights) {
            if (std::isnan(weight)) {
                fail(backend_code, backend_kind,
                    message("the optimiser gave NaN as a weight of candidate ", history_.size() + 1));
            }
            weight = std::clamp(weight, problem_.lower, problem_.upper);
            size += std::abs(weight);
        }
#if defined(TASKVEC_NO_EXCEPTIONS)
        candidate.loss = loss(std::span<const double>(candidate.weights));
#else
        try {
            candidate.loss = loss(std::span<const double>(candidate.weights));
        }
        catch (const error& failure) {
            fail(failure.code(), failure.kind(),
                message("the loss of ", describe(candidate), " failed: ", failure.what()));
        }
        catch (const std::exception& failure) {
            fail(backend_code, backend_kind, message("the loss of ", describe(candidate), " failed: ", failure.what()));
        }
#endif
        if (!std::isfinite(candidate.loss)) {
            fail(error_code::score_not_finite, error_kind::nonfinite,
                message("the loss of ", describe(candidate), " is ", candidate.loss,
                    ": a search needs a finite loss; lower the bound, or repair the loss"));
        }
        candidate.objective = candidate.loss + options_.alpha * size;
        history_.push_back(std::move(candidate));
        return history_.back().objective;
    }

    [[nodiscard]] std::string describe(const lorahub_candidate& candidate) const
    {
        std::string text = message("candidate ", history_.size() + 1, " (weights");
        for (const double weight : candidate.weights) { text += message(' ', weight); }
        return text + ")";
    }

    void remember(error_code code, error_kind kind, const std::string& what)
    {
        failed_ = true;
        code_ = code;
        kind_ = kind;
        what_ = what;
    }
    /// Remembers what went wrong, and leaves the optimiser, through which no error may be lost.
    [[noreturn]] void fail(error_code code, error_kind kind, const std::string& what)
    {
#if defined(TASKVEC_NO_EXCEPTIONS)
        raise<lorahub_error>(code, kind, what, std::move(history_));
#else
        remember(code, kind, what);
        throw stop{};
#endif
    }

    lorahub_options options_;
    lorahub_problem problem_;
    std::vector<lorahub_candidate> history_;
    bool failed_ = false;
    error_code code_ = backend_code;
    error_kind kind_ = backend_kind;
    std::string what_;
};

/// θ0 + Σ wt·τt, or Σ wt·θt without a base.
struct combination_options {
    std::vector<double> weights{};
};

} // namespace detail

template <>
class method<detail::combination_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    template <class Passes>
    method(Passes& passes, const detail::combination_options& options)
        : from_base_(passes.models().has_base())
        , weights_(passes, task_weights(options.weights, passes.models()))
    { }
    template <arithmetic_element A, class Use>
    decltype(auto) with_body(std::size_t, Use&& use) const
    {
        if (from_base_) { return use(kept_sum_body<A>{{}, weights_.get<A>(), A{1}}); }
        return use(mean_body<A>{weights_.get<A>(), A{1}});
    }
    template <arithmetic_element A>
    [[nodiscard]] mean_body<A> body(std::size_t) const
    {
        return {weights_.get<A>(), A{1}};
    }

private:
    bool from_base_;
    kept_numbers weights_;
};

namespace detail {

/// Searches over one buffer, which holds the best candidate in the end.
template <class Loss, class Optimizer>
lorahub_result lorahub_in_memory(const cpu& policy, const lorahub_options& options, const aligned_models& models,
    const model_ref& out, Loss&& loss, Optimizer&& optimizer)
{
    memory_sink sink = sink_over(models, out);
    check_aliases(models, sink, false);
    lorahub_search search(options, models.task_count());
    std::vector<double> made;
    const auto combine_into_out = [&](std::span<const double> weights) {
        made.assign(weights.begin(), weights.end());
        merge(policy, combination_options{made}, models, sink);
    };
    auto result = search.run(
        [&](std::span<const double> weights) {
            combine_into_out(weights);
            return static_cast<double>(loss());
        },
        optimizer);
    if (made != result.best.weights) { combine_into_out(result.best.weights); }
    return result;
}

} // namespace detail

/// The search alone, for candidates that are made otherwise: `loss` is given the weights, one for each of `tasks`
/// tasks. Errors: invalid_argument (options), lorahub_error.
///
///     auto found = lorahub_search({}, 3, [&](std::span<const double> w) { return evaluate(space.at(w)); }, cobyla{});
template <candidate_loss<std::span<const double>> Loss, lorahub_optimizer Optimizer>
lorahub_result lorahub_search(const lorahub_options& options, std::size_t tasks, Loss&& loss, Optimizer&& optimizer)
{
    return detail::lorahub_search(options, tasks)
        .run([&](std::span<const double> weights) { return static_cast<double>(loss(weights)); }, optimizer);
}

/// LoraHub: minimises L(θ0 + Σ wt·τt) + α·Σ|wt| over w in [−1.5, 1.5]ᵀ by a gradient-free optimiser: 40 evaluations
/// from w = 0 on, α = 0.05. The paper optimises with Shiwa of Nevergrad; `cobyla` of merge/lorahub_nlopt.hpp, or any
/// callable, does it here.
///
/// `base` and `tasks` are models; adapters are models of their factors, around their common φ0, or without a base as in
/// the paper: Σ wt·φt. `out` has memory for one model that shares none with the inputs. Each candidate is one fused
/// combination into it, in task order, with the bits of task arithmetic with λ = 1; `loss` is then given `out` as a
/// const_model_ref. In the end `out` holds the best candidate. Errors: invalid_argument (options, models),
/// shape_mismatch, dtype_mismatch; lorahub_error, which keeps the history. Cost of a candidate: one read of all models,
/// one write, and the loss.
///
///     const auto loss = [&](const const_model_ref& model) { return few_shot_loss(model); };
///     auto found = lorahub(cpu{}, {}, base, tasks, out, loss, cobyla{}); // found.best.weights; out holds that model
template <candidate_loss<const_model_ref> Loss, lorahub_optimizer Optimizer>
lorahub_result lorahub(const cpu& policy, const lorahub_options& options, const const_model_ref& base,
    std::span<const const_model_ref> tasks, const model_ref& out, Loss&& loss, Optimizer&& optimizer,
    const model_options& how = {})
{
    const const_model_ref candidate(out);
    return detail::lorahub_in_memory(
        policy, options, aligned_models(&base, tasks, how), out, [&] { return loss(candidate); }, optimizer);
}
/// Without a base: L(Σ wt·θt).
template <candidate_loss<const_model_ref> Loss, lorahub_optimizer Optimizer>
lorahub_result lorahub(const cpu& policy, const lorahub_options& options, std::span<const const_model_ref> tasks,
    const model_ref& out, Loss&& loss, Optimizer&& optimizer, const model_options& how = {})
{
    const const_model_ref candidate(out);
    return detail::lorahub_in_memory(
        policy, options, aligned_models(nullptr, tasks, how), out, [&] { return loss(candidate); }, optimizer);
}

/// LoraHub over flat views of one length; `loss` is given a view of `out`.
///
///     const auto loss = [&](host_view<const float> theta) { return loss_at(theta); };
///     auto found = lorahub(cpu{}, {}, base, tasks, out, loss, cobyla{});
template <input_of<cpu> Base, tasks_of<cpu> Tasks, output_of<cpu> Out,
    candidate_loss<host_view<const element_of<Out>>> Loss, lorahub_optimizer Optimizer>
lorahub_result lorahub(const cpu& policy, const lorahub_options& options, const Base& base, const Tasks& tasks,
    Out&& out, Loss&& loss, Optimizer&& optimizer, model_options how = {})
{
    const const_model_ref base_model = detail::flat_model(as_view(base));
    const host_view<const element_of<Out>> candidate = as_view(out);
    how.output = dtype_of<element_of<Out>>;
    return detail::lorahub_in_memory(
        policy, options, aligned_models(&base_model, detail::flat_models(tasks), how),
        detail::flat_output(as_view(out)), [&] { return loss(candidate); }, optimizer);
}
/// Over flat views, without a base: L(Σ wt·xt).
template <tasks_of<cpu> Tasks, output_of<cpu> Out, candidate_loss<host_view<const element_of<Out>>> Loss,
    lorahub_optimizer Optimizer>
lorahub_result lorahub(const cpu& policy, const lorahub_options& options, const Tasks& tasks, Out&& out, Loss&& loss,
    Optimizer&& optimizer, model_options how = {})
{
    const host_view<const element_of<Out>> candidate = as_view(out);
    how.output = dtype_of<element_of<Out>>;
    return detail::lorahub_in_memory(
        policy, options, aligned_models(nullptr, detail::flat_models(tasks), how), detail::flat_output(as_view(out)),
        [&] { return loss(candidate); }, optimizer);
}

} // namespace taskvec::inline TASKVEC_ABI
