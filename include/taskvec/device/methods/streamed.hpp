// merge_streamed(): models on the host, of any size, merged on taskvec::gpu.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/wrong_call.hpp>
#include <taskvec/device/methods/merge.hpp>
#include <taskvec/device/models/streamed_models.hpp>
#include <taskvec/models/overflow_guard.hpp>

#include <concepts>
#include <optional>
#include <span>

namespace taskvec::inline TASKVEC_ABI {

/// Merges aligned models in host memory into a sink on the host, through device memory: as merge() on the CPU, by any
/// method that merges on taskvec::gpu (include its header, or <taskvec/device/methods.hpp>), with the CPU's bits.
/// Copies overlap with work: two pieces are under way, on two streams of their own. A method reads the models as often
/// as it does in device memory (average, task arithmetic and DARE once, SLERP, Model Stock and, with room for its
/// selection, TIES twice), each time over the bus. What a Fisher merge reads beside them is on the host too. Norms are
/// not reported. Waits. Errors: as merge(); backend_error; cancelled. After an error an output in memory is
/// unspecified.
///
///     const stream_options how{.memory = std::size_t{4} << 30};
///     merge_streamed(policy, ties_options{.density = 0.2}, aligned_models(&base, tasks), sink, how);
template <device_merge_method Options>
merge_report merge_streamed(const gpu& policy, const Options& options, const aligned_models& models, tensor_sink& out,
    const stream_options& how = {})
{
    using method_type = method<Options>;
    if (method_type::needs_base && !models.has_base()) {
        raise<invalid_argument>(error_code::base_missing, "this merge method needs a base model");
    }
    const auto beside = detail::operands_beside(options, models, memory_space::host);
    detail::check_aliases(
        models, out, method_type::in_place, detail::companions_of(options, models, memory_space::host, beside));
    std::optional<overflow_guard> guard;
    if (models.options().on_overflow != overflow::propagate) {
        guard.emplace(out, models, models.options().on_overflow, detail::largest_gain(options));
    }
    tensor_sink* const guarded = guard ? &*guard : &out;
    streamed_models streamed(policy, models, how, guarded, beside);
    merge_report report = detail::merge_on_device(streamed, options);
    if (guard) { report.saturated = guard->saturated(); }
    return report;
}

/// The same for models and outputs in host memory.
template <device_merge_method Options>
merge_report merge_streamed(const gpu& policy, const Options& options, const const_model_ref& base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how = {},
    const stream_options& streaming = {})
{
    const aligned_models models(&base, tasks, how);
    memory_sink sink = detail::sink_over(models, out);
    return merge_streamed(policy, options, models, sink, streaming);
}

/// Options of no method, or of one that lacks something or does not merge on a device: a sentence says what.
template <std::same_as<gpu> P, class Options, class... Arguments>
    requires(!device_merge_method<Options> && sizeof...(Arguments) >= 2)
auto merge_streamed(const P&, const Options&, Arguments&&...)
{
    static_assert(detail::check_device_method<Options>());
    return detail::no_result{};
}
template <std::same_as<gpu> P, class Options, class Models, class Sink>
    requires(!device_merge_method<Options>)
auto merge_streamed(const P&, const Options&, const Models&, Sink&&, const stream_options&)
{
    static_assert(detail::check_device_method<Options>());
    return detail::no_result{};
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(gpu, merge_streamed, device_arguments,
    "merge_streamed(policy, options, aligned models, sink, stream_options), or (policy, options, base, tasks, output) "
    "of "
    "models in host memory")

} // namespace taskvec::inline TASKVEC_ABI
