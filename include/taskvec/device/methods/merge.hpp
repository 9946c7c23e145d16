// merge() on taskvec::gpu: what every method shares. The methods stand in device_linear.hpp, device_ties.hpp and so on.
// SPDX-License-Identifier: Apache-2.0
//
// A method is a detail::device_merger<Options>: its constructor makes the passes that must come first, its write()
// merges. It is written on device_models, so that it merges models in device memory and models that stream through it
// alike.
#pragma once

#include <taskvec/device/models/device_models.hpp>
#include <taskvec/device/models/tensor_dots.hpp>
#include <taskvec/methods/merge.hpp>

#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

template <>
inline constexpr bool gpu_header_included<gpu, gpu_room::merge> = true;

template <class Options>
class device_merger;

} // namespace detail

/// The options of a merge method that runs on taskvec::gpu.
template <class Options>
concept device_merge_method =
    requires(device_models& models, const Options& options) { detail::device_merger<Options>(models, options); };

namespace detail {

/// What a method reads besides the models: operands in the order of tensors(), as many for each, in memory space
/// `space`.
template <device_merge_method Options>
[[nodiscard]] std::vector<aligned_tensor::operand> operands_beside(
    const Options& options, const aligned_models& models, memory_space space)
{
    if constexpr (requires { device_merger<Options>::beside(options, models, space); }) {
        return device_merger<Options>::beside(options, models, space);
    }
    else {
        return {};
    }
}

/// What lies beside the models as memory that may not be overwritten: operands, or what a method says that has other
/// data.
template <device_merge_method Options>
[[nodiscard]] std::vector<companion> companions_of(const Options& options, const aligned_models& models,
    memory_space space, std::span<const aligned_tensor::operand> beside)
{
    if constexpr (requires { device_merger<Options>::companions(options, models, space); }) {
        return device_merger<Options>::companions(options, models, space);
    }
    std::vector<companion> companions;
    for (std::size_t i = 0; i < beside.size(); ++i) {
        const std::size_t tensor = i / (beside.size() / models.tensors().size());
        companions.push_back({tensor, beside[i].data, byte_count(beside[i].dtype, models.tensors()[tensor].size)});
    }
    return companions;
}

/// Merges into the outputs of `models`.
template <device_merge_method Options>
merge_report merge_on_device(device_models& models, const Options& options)
{
    device_merger<Options> method(models, options);
    merge_report report;
    method.write(models, report);
    models.copy_through();
    models.check_finite();
    report.walks = method.walks() + 1;
    if constexpr (requires { method.bytes_beside(models); }) { report.beside = method.bytes_beside(models); }
    return report;
}

/// Norms of the merged model as it was stored.
inline void add_norms(const gpu& policy, const aligned_models& merged_and_base, merge_report& report)
{
    resident_models resident(policy, merged_and_base);
    const auto merged = tensor_dots(resident, {{1, 1}}, false);
    const auto change = merged_and_base.has_base() ? tensor_dots(resident, {{1, 1}}, true)
                                                   : std::vector(merged.size(), std::vector{0.0});
    for (std::size_t i = 0; i < merged.size(); ++i) {
        report.norms.push_back({merged_and_base.tensors()[i].name, std::sqrt(merged[i][0]), std::sqrt(change[i][0])});
    }
}

template <device_merge_method Options>
merge_report merge_in_device_memory(const gpu& policy, const Options& options, const const_model_ref* base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how)
{
    using method_type = device_merger<Options>;
    if (method_type::needs_base && !base) { raise<invalid_argument>("this merge method needs a base model"); }
    const aligned_models models = align_on_device(policy, base, tasks, how);
    memory_sink sink = sink_over(models, out, memory_space::device);
    const std::vector<aligned_tensor::operand> beside = operands_beside(options, models, memory_space::device);
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
    requires(!detail::device_merger<Options>::needs_base)
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
    requires(!detail::device_merger<Options>::needs_base)
merge_report merge(const gpu& policy, const Options& options, const Tasks& tasks, Out&& out, model_options how = {})
{
    how.output = dtype_of<element_of<Out>>;
    return detail::merge_in_device_memory(
        policy, options, nullptr, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

/// A method whose header is missing.
template <merge_method Options, class... Arguments>
    requires(!device_merge_method<Options>)
auto merge(const gpu&, const Options&, Arguments&&...)
{
    static_assert(device_merge_method<Options>,
        "this method does not merge on taskvec::gpu: include <taskvec/device/methods.hpp>, for RegMean "
        "<taskvec/device/methods/regmean.hpp>");
}

} // namespace taskvec::inline TASKVEC_ABI
