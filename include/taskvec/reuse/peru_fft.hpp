// PERU-FFT: a merged model and, for each task, the largest entries of what the merge lost. Jiang et al. (2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/wrong_call.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/reuse/post_pruning.hpp>

#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = merge(θ0, θ1 … θT) by any method, then ût = top-m% of ut = θt − θ* for each task, where θ* is the merged model
/// as it was stored and rounded. Task t is served as θ* + ût: apply() switches it on in place, undo() off again.
/// Parameters: |θ*| + Σ kept. `out` receives θ*. Errors and bits: as merge() and post_pruning().
///
///     auto deltas = peru_fft(cpu{}, task_arithmetic_options{.lambda = 0.3}, {.density = 0.1}, base, tasks, merged);
template <merge_method Options>
[[nodiscard]] std::vector<sparse_model> peru_fft(const cpu& policy, const Options& method,
    const post_pruning_options& residual, const const_model_ref& base, std::span<const const_model_ref> tasks,
    const model_ref& out, const model_options& how = {});

/// PERU-FFT over flat views.
template <merge_method Options, input_of<cpu> Base, tasks_of<cpu> Tasks, output_of<cpu> Out>
[[nodiscard]] auto peru_fft(const cpu& policy, const Options& method, const post_pruning_options& residual,
    const Base& base, const Tasks& tasks, Out&& out, const model_options& how = {})
{
    merge(policy, method, base, tasks, out, how);
    using A = arithmetic_type<element_of<Out>>;
    std::vector<sparse_vector<A>> deltas;
    for (const auto& task : tasks) { deltas.push_back(post_pruning(policy, residual, std::as_const(out), task, how)); }
    return deltas;
}

namespace detail {
/// Task t as it is served: where tensors may be missing, completed by the base's.
[[nodiscard]] inline const_model_ref task_served(
    const const_model_ref& base, const const_model_ref& task, const model_options& how)
{
    return how.on_missing == missing_tensors::base ? completed(task, base) : task;
}
/// How task t is lined up with the merged model.
[[nodiscard]] inline model_options residual_options(const model_options& how, std::size_t t)
{
    model_options pruning = how;
    pruning.base_label = "the merged model";
    pruning.output.reset();
    if (!how.labels.empty()) { pruning.labels = {how.labels[t]}; }
    return pruning;
}
} // namespace detail

template <merge_method Options>
std::vector<sparse_model> peru_fft(const cpu& policy, const Options& method, const post_pruning_options& residual,
    const const_model_ref& base, std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how)
{
    merge(policy, method, base, tasks, out, how);
    std::vector<sparse_model> deltas;
    const const_model_ref merged(out);
    for (std::size_t t = 0; t < tasks.size(); ++t) {
        deltas.push_back(post_pruning(
            policy, residual, merged, detail::task_served(base, tasks[t], how), detail::residual_options(how, t)));
    }
    return deltas;
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(
    cpu, peru_fft, any_arguments, "peru_fft(policy, options of a merge, post_pruning_options, base, tasks, output)")
#if !defined(__CUDACC__)
// Options in braces have no type of their own.
template <cpu_policy P, class Options, class... Arguments>
    requires(!detail::cpu_peru_fft_of_any_arguments::take<const P&, const Options&, const post_pruning_options&,
        Arguments&...>)
auto peru_fft(const P&, const Options&, const post_pruning_options&, const Arguments&...)
{
    if constexpr (merge_method<Options>) {
        using calls = detail::cpu_peru_fft_of_any_arguments;
        return calls::explain<detail::flaw_of_call<calls, P, Options, post_pruning_options, Arguments...>(), P>();
    }
    else {
        static_assert(detail::check_method<Options>());
        return detail::no_result{};
    }
}
template <cpu_policy P, class Options, class... Arguments>
    requires(detail::only_constant<detail::cpu_peru_fft_of_any_arguments, P, const Options&,
        const post_pruning_options&, Arguments...>)
auto peru_fft(const P&, const Options&, const post_pruning_options&, Arguments&&...)
{
    return detail::cpu_peru_fft_of_any_arguments::explain<detail::call_flaw::constant, P>();
}
#endif

// On taskvec::gpu this lives in a header of its own.
TASKVEC_CALLS_NEED_HEADER(peru_fft, reuse, "taskvec/device/reuse.hpp")

} // namespace taskvec::inline TASKVEC_ABI
