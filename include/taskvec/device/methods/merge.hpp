// merge() on taskvec::gpu: any elementwise method, by its body, and those that say how they merge there.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/option_range.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/device/methods/walk.hpp>
#include <taskvec/device/models/device_models.hpp>
#include <taskvec/device/models/tensor_dots.hpp>
#include <taskvec/methods/merge.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

template <>
inline constexpr bool gpu_header_included<gpu, gpu_room::merge> = true;

} // namespace detail

/// How a method that is not elementwise merges on taskvec::gpu, by its options: a constructor (device_models&, options)
/// and write(device_models&, merge_report&). Specialise it beside such a method (RegMean: device/methods/regmean.hpp).
template <class Options>
class device_method;

/// The options of a merge method that runs on taskvec::gpu.
template <class Options>
concept device_merge_method = merge_method<Options>
    && ((packed_method<Options> && method<Options>::on_device)
        || requires(device_models& models, const Options& options) { device_method<Options>(models, options); });

namespace detail {

/// Merges into the outputs of `models`.
template <device_merge_method Options>
merge_report merge_on_device(device_models& models, const Options& options)
{
    check_options(options);
    merge_report report;
    if constexpr (packed_method<Options>) {
        static_assert(std::is_trivially_copyable_v<single_body<Options>>,
            "the body of a merge method is trivially copyable: numbers, and pointers to what passes.keep() returned");
        device_passes passes(models);
        method<Options> prepared(passes, options);
        device_walk<Options> walk(passes, prepared);
        walk.write(all_tensors(models.models()));
        if constexpr (requires { method<Options>::beside(options, models.models(), memory_space::device); }) {
            check_beside<Options>(passes, prepared);
        }
        if constexpr (requires(std::span<const merge_tally> t) { prepared.settle(t); }) {
            const auto tallies = walk.tallies();
            if (prepared.settle(std::span<const merge_tally>(tallies))) {
                for (std::size_t i = 0; i < tallies.size(); ++i) {
                    if (prepared.again(i, tallies[i])) { walk.again(i); }
                }
            }
        }
        if (walk.counts_tasks()) {
            merge_tally total;
            for (const auto& tally : walk.tallies()) { total += tally; }
            report_tally(total, passes.tasks(), report);
        }
        report.walks = prepared.walks() + 1;
        report.beside = prepared.bytes_beside();
        models.copy_through();
        models.check_finite();
    }
    else {
        device_method<Options> prepared(models, options);
        prepared.write(models, report);
        models.copy_through();
        models.check_finite();
        report.walks = 1;
        report.beside = prepared.bytes_beside(models);
    }
    return report;
}

/// Norms of the merged model as it was stored.
inline void add_norms(const gpu& policy, const aligned_models& merged_and_base, merge_report& report)
{
    resident_models resident(policy, merged_and_base);
    const auto merged = tensor_dots(resident, {{1, 1}}, false);
    const auto change = merged_and_base.has_base()
        ? tensor_dots(resident, {{1, 1}}, true)
        : call_vector<call_vector<double>>(merged.size(), call_vector<double>(1));
    for (std::size_t i = 0; i < merged.size(); ++i) {
        report.norms.push_back({merged_and_base.tensors()[i].name, std::sqrt(merged[i][0]), std::sqrt(change[i][0])});
    }
}

template <device_merge_method Options>
merge_report merge_in_device_memory(const gpu& policy, const Options& options, const const_model_ref* base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how)
{
    using method_type = method<Options>;
    if (method_type::needs_base && !base) {
        raise<invalid_argument>(error_code::base_missing, "this merge method needs a base model");
    }
    const aligned_models models = align_on_device(policy, base, tasks, how);
    memory_sink sink = sink_over(models, out, memory_space::device);
    const auto beside = operands_beside(options, models, memory_space::device);
    check_aliases(models, sink, method_type::in_place, companions_of(options, models, memory_space::device, beside));
    resident_models resident(policy, models, &sink, beside);
    merge_report report = merge_on_device(resident, options);
    if (how.statistics) {
        const const_model_ref merged(out);
        model_options reading = how;
        reading.labels.clear();
        reading.on_nonfinite = nonfinite::propagate;
        add_norms(policy, align_on_device(policy, base, {&merged, 1}, reading), report);
    }
    return report;
}

} // namespace detail

/// Merges models in device memory into outputs in device memory, as merge() on the CPU does: the same meaning, checks,
/// errors and bits; each task is read once in a pass. Tensors must be aligned to their elements. Work is queued on the
/// policy's stream; the call waits for it to report NaN and infinity (with nonfinite::propagate, average, task
/// arithmetic and DARE do not wait) and where numbers decide (TIES, SLERP, Model Stock, integer tensors). After an
/// error the outputs are unspecified.
///
///     merge(policy, ties_options{.density = 0.2}, base, tasks, out);
template <device_merge_method Options>
merge_report merge(const gpu& policy, const Options& options, const const_model_ref& base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how = {})
{
    return detail::merge_in_device_memory(policy, options, &base, tasks, out, how);
}

/// The same by a method that needs no base.
template <device_merge_method Options>
    requires(!method<Options>::needs_base)
merge_report merge(const gpu& policy, const Options& options, std::span<const const_model_ref> tasks,
    const model_ref& out, const model_options& how = {})
{
    return detail::merge_in_device_memory(policy, options, nullptr, tasks, out, how);
}

/// Merges flat device views of one length, as on the CPU.
///
///     // tasks: a vector of device_view<const float>
///     merge(policy, ties_options{.density = 0.2}, base.view(), tasks, out.view());
template <device_merge_method Options, input_of<gpu> Base, tasks_of<gpu> Tasks, output_of<gpu> Out>
merge_report merge(
    const gpu& policy, const Options& options, const Base& base, const Tasks& tasks, Out&& out, model_options how = {})
{
    const const_model_ref base_model = detail::flat_model(as_view(base));
    how.output = dtype_of<element_of<Out>>;
    return detail::merge_in_device_memory(
        policy, options, &base_model, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

/// The same by a method that needs no base.
template <device_merge_method Options, tasks_of<gpu> Tasks, output_of<gpu> Out>
    requires(!method<Options>::needs_base)
merge_report merge(const gpu& policy, const Options& options, const Tasks& tasks, Out&& out, model_options how = {})
{
    how.output = dtype_of<element_of<Out>>;
    return detail::merge_in_device_memory(
        policy, options, nullptr, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

namespace detail {
/// Says in a sentence why options are none of a merge on taskvec::gpu.
template <class Options>
consteval bool check_device_method()
{
    if constexpr (merge_method<Options>) {
        static_assert(device_merge_method<Options>,
            "this method does not merge on taskvec::gpu: it has no body, or says so by on_device = false; RegMean does "
            "with <taskvec/device/methods/regmean.hpp>");
        return true;
    }
    else {
        return check_method<Options>();
    }
}

/// Arguments of merge() that begin with options of a merge on taskvec::gpu.
template <class Options = void, class...>
consteval bool begin_with_device_options()
{
    return device_merge_method<Options>;
}
template <class... Arguments>
concept device_arguments = begin_with_device_options<Arguments...>();
} // namespace detail

/// Options of no method, or of one that lacks something or does not merge on a device: a sentence says what.
template <std::same_as<gpu> P, class Options, class... Arguments>
    requires(!device_merge_method<Options> && sizeof...(Arguments) >= 2)
auto merge(const P&, const Options&, Arguments&&...)
{
    static_assert(detail::check_device_method<Options>());
    return detail::no_result{};
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(gpu, merge, device_arguments,
    "merge(policy, options, base, tasks, output), of device views or of models in device memory; without the base "
    "where "
    "the method needs none")

} // namespace taskvec::inline TASKVEC_ABI
