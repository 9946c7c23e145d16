// Reuse on taskvec::gpu: Post-Pruning and PERU-FFT, whose deltas stay in device memory. PERU-LoRA comes with
// <taskvec/device/linalg.hpp>.
// SPDX-License-Identifier: Apache-2.0
//
// For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host system.
#pragma once

#include <taskvec/core/wrong_call.hpp>
#include <taskvec/device/methods/merge.hpp>
#include <taskvec/device/select.hpp>
#include <taskvec/reuse/peru_fft.hpp>
#include <taskvec/reuse/post_pruning.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {
template <>
inline constexpr bool gpu_header_included<gpu, gpu_room::reuse> = true;
} // namespace detail

namespace elementwise {

TASKVEC_KERNELS_BEGIN

/// Whether element i of the first task vector is kept: above its threshold, and not zero as a value of type V.
template <arithmetic_element V, arithmetic_element A>
struct kept_entry {
    device_piece piece;
    const top_k_threshold<A>* threshold;
    counter* flag;

    TASKVEC_FUNCTOR bool operator()(std::uint64_t i) const
    {
        const A value = delta(piece, 0, i, origin<A>(piece, i, flag), flag);
        return static_cast<V>(value) != 0 && threshold->keeps(value, piece.position + i);
    }
};

/// *count += the entries that are kept.
template <arithmetic_element V, arithmetic_element A>
struct count_kept {
    kept_entry<V, A> kept;
    counter* count;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        counter found = 0;
        for (std::uint64_t i = at.first; i < at.last; i += at.step) { found += kept(i) ? 1 : 0; }
        if (found) { atomic_add(count, found); }
    }
};

/// values[j] = element chosen[j] of the first task vector.
template <arithmetic_element V, arithmetic_element A>
struct gather_entries {
    device_piece piece;
    const std::uint64_t* chosen;
    V* values;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t j = at.first; j < at.last; j += at.step) {
            values[j] = static_cast<V>(delta(piece, 0, chosen[j], origin<A>(piece, chosen[j], nullptr), nullptr));
        }
    }
};

TASKVEC_KERNELS_END

} // namespace elementwise

namespace detail {

/// Calls use(std::type_identity<V>{}, std::type_identity<A>{}) with the type of the values that are kept of a tensor's
/// task vector (f64 where the base stores f64, as on the CPU), and that of its arithmetic.
template <class Use>
void visit_kept(const aligned_tensor& tensor, const Use& use)
{
    visit_arithmetic(tensor, [&]<class A>(std::type_identity<A> type) {
        if constexpr (std::same_as<A, double>) {
            if (tensor.wide_base()) { return use(type, type); }
        }
        use(std::type_identity<float>{}, type);
    });
}

/// Post-Pruning of models in device memory that are lined up.
[[nodiscard]] inline device_sparse_model prune_on_device(
    const gpu& policy, const post_pruning_options& options, const aligned_models& models)
{
    const auto& tensors = models.tensors();
    resident_models resident(policy, models);
    const trim_thresholds thresholds = thresholds_on_device(resident, options.density, options.scope, options.trim);
    const device_thresholds on_device(policy, models, thresholds);
    device::buffer<elementwise::counter> counts(policy, tensors.size());
    counts.clear();
    resident.read(all_tensors(models), [&](const gpu& piece_policy, std::size_t tensor, const device_piece& piece) {
        visit_kept(tensors[tensor], [&]<class V, class A>(std::type_identity<V>, std::type_identity<A>) {
            device::sweep(piece_policy, piece.size,
                elementwise::count_kept<V, A>{
                    {piece, on_device.get<A>(tensor), resident.nonfinite_flag()}, counts.data() + tensor});
        });
    });
    const std::vector<elementwise::counter> kept = counts.download();
    resident.check_finite();
    device_sparse_model result;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        visit_kept(tensors[i], [&]<class V, class A>(std::type_identity<V>, std::type_identity<A>) {
            device_sparse_vector<V> sparse{
                tensors[i].shape, device::buffer<std::uint64_t>(policy, kept[i]), device::buffer<V>(policy, kept[i])};
            if (kept[i] > 0) {
                resident.read({i, i + 1}, [&](const gpu& piece_policy, std::size_t, const device_piece& piece) {
                    (void)device::compact(piece_policy, piece.size,
                        elementwise::kept_entry<V, A>{piece, on_device.get<A>(i), nullptr}, sparse.indices.data());
                    device::sweep(piece_policy, kept[i],
                        elementwise::gather_entries<V, A>{piece, sparse.indices.data(), sparse.values.data()});
                });
            }
            result.emplace(tensors[i].name, std::move(sparse));
        });
    }
    return result;
}

} // namespace detail

/// Post-Pruning of models in device memory, as on the CPU: the same entries, values and errors. The delta is in device
/// memory; to_host() makes a sparse_model of it. Waits.
///
///     device_sparse_model delta = post_pruning(policy, {.density = 0.1}, base, task);
///     auto saved = apply(policy, delta, live);   // live == base: now the pruned task
[[nodiscard]] inline device_sparse_model post_pruning(const gpu& policy, const post_pruning_options& options,
    const const_model_ref& base, const const_model_ref& task, const model_options& how = {})
{
    return detail::prune_on_device(policy, options, align_on_device(policy, &base, {&task, 1}, how));
}

/// Post-Pruning of flat device views.
template <input_of<gpu> Base, input_of<gpu> Task>
[[nodiscard]] auto post_pruning(const gpu& policy, const post_pruning_options& options, const Base& base,
    const Task& task, const model_options& how = {})
{
    using A = arithmetic_type<element_of<const Base>>;
    device_sparse_model model =
        post_pruning(policy, options, detail::flat_model(as_view(base)), detail::flat_model(as_view(task)), how);
    return std::get<device_sparse_vector<A>>(std::move(model.begin()->second));
}

/// PERU-FFT of models in device memory, as on the CPU, by any method that merges there (include its header, or
/// <taskvec/device/methods.hpp>).
///
///     auto deltas = peru_fft(policy, task_arithmetic_options{.lambda = 0.3}, {.density = 0.1}, base, tasks, merged);
template <device_merge_method Options>
[[nodiscard]] std::vector<device_sparse_model> peru_fft(const gpu& policy, const Options& method,
    const post_pruning_options& residual, const const_model_ref& base, std::span<const const_model_ref> tasks,
    const model_ref& out, const model_options& how = {})
{
    merge(policy, method, base, tasks, out, how);
    std::vector<device_sparse_model> deltas;
    const const_model_ref merged(out);
    for (std::size_t t = 0; t < tasks.size(); ++t) {
        deltas.push_back(post_pruning(
            policy, residual, merged, detail::task_served(base, tasks[t], how), detail::residual_options(how, t)));
    }
    return deltas;
}

/// PERU-FFT over flat device views.
template <device_merge_method Options, input_of<gpu> Base, tasks_of<gpu> Tasks, output_of<gpu> Out>
[[nodiscard]] auto peru_fft(const gpu& policy, const Options& method, const post_pruning_options& residual,
    const Base& base, const Tasks& tasks, Out&& out, const model_options& how = {})
{
    merge(policy, method, base, tasks, out, how);
    using A = arithmetic_type<element_of<Out>>;
    std::vector<device_sparse_vector<A>> deltas;
    for (const auto& task : tasks) { deltas.push_back(post_pruning(policy, residual, std::as_const(out), task, how)); }
    return deltas;
}

#if !defined(__CUDACC__)
// What calls say that are none of those above. Options in braces have no type of their own.
TASKVEC_WRONG_CALLS(
    gpu, post_pruning, any_arguments, "post_pruning(policy, options, base, task), of device views or models")
template <std::same_as<gpu> P, class... Arguments>
    requires(!detail::gpu_post_pruning_of_any_arguments::take<const P&, const post_pruning_options&, Arguments&...>)
auto post_pruning(const P&, const post_pruning_options&, const Arguments&...)
{
    using calls = detail::gpu_post_pruning_of_any_arguments;
    return calls::explain<detail::flaw_of_call<calls, P, post_pruning_options, Arguments...>(), P>();
}
TASKVEC_WRONG_CALLS(
    gpu, peru_fft, any_arguments, "peru_fft(policy, options of a merge, post_pruning_options, base, tasks, output)")
template <std::same_as<gpu> P, class Options, class... Arguments>
    requires(!detail::gpu_peru_fft_of_any_arguments::take<const P&, const Options&, const post_pruning_options&,
        Arguments&...>)
auto peru_fft(const P&, const Options&, const post_pruning_options&, const Arguments&...)
{
    if constexpr (device_merge_method<Options>) {
        using calls = detail::gpu_peru_fft_of_any_arguments;
        return calls::explain<detail::flaw_of_call<calls, P, Options, post_pruning_options, Arguments...>(), P>();
    }
    else {
        static_assert(detail::check_device_method<Options>());
        return detail::no_result{};
    }
}
template <std::same_as<gpu> P, class Options, class... Arguments>
    requires(detail::only_constant<detail::gpu_peru_fft_of_any_arguments, P, const Options&,
        const post_pruning_options&, Arguments...>)
auto peru_fft(const P&, const Options&, const post_pruning_options&, Arguments&&...)
{
    return detail::gpu_peru_fft_of_any_arguments::explain<detail::call_flaw::constant, P>();
}
#endif

} // namespace taskvec::inline TASKVEC_ABI
