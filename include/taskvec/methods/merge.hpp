// merge(): aligned models, models in memory or flat views, merged by any method on the CPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_range.hpp>
#include <taskvec/core/parts.hpp>
#include <taskvec/methods/entries.hpp>
#include <taskvec/methods/walk.hpp>
#include <taskvec/methods/wrong_call.hpp>
#include <taskvec/models/overflow_guard.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = method(θ0, θ1 … θT): merges aligned models into a sink, whose tensors are those of models.outputs() in that
/// order. Elementwise, streaming: memory is a few rows for each thread, whatever the size of the models.
/// Bit-exact for any threads, chunks and sinks. Errors: invalid_argument (options; aliased outputs), nonfinite_error,
/// cancelled; what the sink throws. After an error an in-memory output is unspecified.
///
///     aligned_models models(&base, tasks);
///     merge(cpu{}, ties_options{.density = 0.2}, models, sink);
template <merge_method Options>
merge_report merge(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out);

/// Makes the checks that merge() makes before it writes, and the passes that come first; writes nothing. For a dry run.
///
///     check_merge(cpu{}, fisher_options{.fishers = fishers}, models);
template <merge_method Options>
void check_merge(const cpu& policy, const Options& options, const aligned_models& models)
{
    if (method<Options>::needs_base && !models.has_base()) {
        raise<invalid_argument>(error_code::base_missing, "this merge method needs a base model");
    }
    const detail::call_memory memory(policy.memory);
    const auto beside = detail::operands_beside(options, models, memory_space::host);
    cpu_passes passes(policy, models, beside);
    static_cast<void>(method<Options>(passes, options));
}

namespace detail {

/// Norms of the merged model as it was stored, read back where the sink has memory.
template <class Types>
void add_norms(const cpu& policy, const aligned_models& merged_and_base, merge_report& report)
{
    const auto sums = tensor_sums<Types>(policy, merged_and_base, 2, 0, "norms", [](auto& rows, double* sum) {
        const auto* const merged = rows.task(0);
        sum[0] = kernels::dot(merged, merged, rows.size());
        sum[1] = 0;
        if (rows.models().has_base()) {
            const auto* const change = rows.delta(0);
            sum[1] = kernels::dot(change, change, rows.size());
        }
    });
    for (std::size_t i = 0; i < sums.size(); ++i) {
        report.norms.push_back({merged_and_base.tensors()[i].name, std::sqrt(sums[i][0]), std::sqrt(sums[i][1])});
    }
}

/// What a method's body is for numbers of f32, and what it is called with.
template <class Options>
using single_body =
    std::remove_cvref_t<decltype(std::declval<const method<Options>&>().template body<float>(std::size_t{0}))>;
using single_entries = kernels::entries<float, 0, 0, 0>;

template <class Options>
concept callable_body = requires(const single_body<Options>& body, single_entries& in) { body(in); };

/// Whether a method's body, if it has one, is such as walks copy and call.
template <class Options>
consteval bool sound_body()
{
    if constexpr (!packed_method<Options>) { return true; }
    else if constexpr (!std::is_trivially_copyable_v<single_body<Options>> || !callable_body<Options>) {
        return false;
    }
    else {
        using result = decltype(std::declval<const single_body<Options>&>()(std::declval<single_entries&>()));
        return std::convertible_to<result, const typename single_entries::pack&>;
    }
}

/// Says what is missing of a body, in a sentence.
template <class Options>
consteval void check_body()
{
    static_assert(std::is_trivially_copyable_v<single_body<Options>>,
        "the body of a merge method is trivially copyable: numbers, and pointers to what passes.keep() returned");
    if constexpr (std::is_trivially_copyable_v<single_body<Options>>) {
        static_assert(callable_body<Options>,
            "the body of a merge method has a call operator: template <class In> typename In::pack operator()(In& in) "
            "const");
        static_assert(!callable_body<Options> || sound_body<Options>(),
            "the call operator of a merge method's body returns what becomes of the entries, a typename In::pack: "
            "not a mask, a number or nothing");
    }
}

/// merge() of models' tensors all together, but for what is copied. `beside`: operands_beside() of them.
template <class Types, merge_method Options>
merge_report merge_together(const cpu& policy, const Options& options, const aligned_models& models,
    std::span<const aligned_tensor::operand> beside, tensor_sink& out)
{
    using method_type = method<Options>;
    typed_passes<Types> passes(policy, models, beside);
    method_type prepared(passes, options);
    merge_report report;
    std::optional<overflow_guard> guard;
    if (models.options().on_overflow != overflow::propagate) {
        guard.emplace(out, models, models.options().on_overflow, largest_gain(options));
        if constexpr (requires { prepared.nonfinite_beside(std::size_t{0}, std::uint64_t{0}); }) {
            guard->excuse([&prepared](std::size_t tensor, std::uint64_t index) {
                return prepared.nonfinite_beside(tensor, index);
            });
        }
    }
    tensor_sink& guarded = guard ? *guard : out;
    if constexpr (whole_method<Options>) { prepared.write(policy, models, guarded); }
    else {
        merge_walk<Options>(passes, prepared, guarded, report);
    }
    if (guard) { report.saturated = guard->saturated(); }
    report.walks = prepared.walks() + 1;
    report.beside = prepared.bytes_beside();
    return report;
}

/// Tensors of models in runs, in order, and the bytes of each run's inputs.
struct tensor_runs {
    call_vector<tensor_range> tensors{};
    call_vector<std::uint64_t> bytes{};

    /// As many tensors in each as `memory` bytes hold of the inputs, and one at least.
    tensor_runs(const aligned_models& models, std::uint64_t memory)
    {
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const auto& tensor = models.tensors()[i];
            const std::uint64_t more = tensor.bytes(tensor.size);
            if (bytes.empty() || bytes.back() + more > memory) {
                tensors.push_back({i, i});
                bytes.push_back(0);
            }
            tensors.back().last = i + 1;
            bytes.back() += more;
        }
    }
};

/// The same as merge_together(), run by run: what a method reads several times stays in memory between its walks. A run
/// has a fourth of a thread's share of model_options::memory, or a tensor: small enough for threads to end together.
template <class Types, merge_method Options>
merge_report merge_in_runs(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    const std::size_t memory = models.options().memory;
    const tensor_runs runs(models, memory / (4 * worker_count(policy, models.tensors().size())));
    call_vector<merge_report> reports(runs.bytes.size());
    for_each_part(policy, "merge", runs.bytes, [&](std::size_t i, const cpu& on, std::size_t together) {
        const tensor_range range = runs.tensors[i];
        call_vector<std::size_t> tensors(range.last - range.first);
        std::iota(tensors.begin(), tensors.end(), range.first);
        const aligned_models run(models, tensors, std::max<std::size_t>(1, memory / together));
        reports[i] = merge_together<Types>(on, options, run, operands_beside(options, run, memory_space::host), out);
    });
    merge_report report;
    for (const auto& part : reports) { report += part; }
    return report;
}

/// merge() of aligned models that store the types of a storage_list.
template <class Types, merge_method Options>
merge_report merge_sound(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    using method_type = method<Options>;
    static_assert(check_method<Options>());
    check_options(options);
    if (method_type::needs_base && !models.has_base()) {
        raise<invalid_argument>(error_code::base_missing, "this merge method needs a base model");
    }
    const call_memory memory(policy.memory);
    const auto beside = operands_beside(options, models, memory_space::host);
    check_aliases(models, out, method_type::in_place, companions_of(options, models, memory_space::host, beside));
    bool in_runs = false;
    merge_report report;
    if constexpr (requires { method_type::tensor_by_tensor(options); }) {
        in_runs = method_type::tensor_by_tensor(options) && models.bytes() > models.options().memory;
        if (in_runs) { report = merge_in_runs<Types>(policy, options, models, out); }
    }
    if (!in_runs) { report = merge_together<Types>(policy, options, models, beside, out); }
    copy_through(policy, models, out);
    return report;
}

/// The same, of a method whose body is sound.
template <class Types, merge_method Options>
merge_report merge_storing(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    if constexpr (sound_body<Options>()) { return merge_sound<Types>(policy, options, models, out); }
    else {
        check_body<Options>();
        return {};
    }
}

} // namespace detail

template <merge_method Options>
merge_report merge(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    return detail::merge_storing<storage_types>(policy, options, models, out);
}

namespace detail {

/// The sink over a model in memory, checked against what a merge writes.
inline memory_sink sink_over(
    const aligned_models& models, const model_ref& out, memory_space space = memory_space::host)
{
    std::vector<void*> tensors;
    for (const auto& spec : models.outputs()) {
        const tensor_ref* const tensor = out.find(spec.name);
        if (!tensor) {
            raise<invalid_argument>(
                error_code::tensor_missing, message("tensor '", spec.name, "' is missing in the output"));
        }
        if (tensor->space != space || !tensor->contiguous()) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", spec.name, "' of the output must be contiguous ",
                    space == memory_space::host ? "host" : "device", " memory"));
        }
        if (tensor->shape != spec.shape) {
            raise<shape_mismatch>(error_code::output_shape,
                message("tensor '", spec.name, "' of the output has shape ", to_string(tensor->shape), "; expected ",
                    to_string(spec.shape)));
        }
        if (tensor->dtype != spec.dtype) {
            raise<dtype_mismatch>(error_code::output_dtype,
                message("tensor '", spec.name, "' of the output has dtype ", to_string(tensor->dtype), "; expected ",
                    to_string(spec.dtype)));
        }
        if (!tensor->data && spec.bytes() > 0) {
            raise<invalid_argument>(error_code::tensor_without_data,
                message("tensor '", spec.name, "' of the output has no data (null pointer)"));
        }
        tensors.push_back(tensor->data);
    }
    return memory_sink(std::move(tensors));
}

/// Outputs of an in-memory merge decide their own dtype, tensor by tensor, unless one is asked for.
template <class Types = storage_types, merge_method Options>
merge_report merge_in_memory(const cpu& policy, const Options& options, const const_model_ref* base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how)
{
    const aligned_models models(base, tasks, how);
    memory_sink sink = sink_over(models, out);
    merge_report report = merge_storing<Types>(policy, options, models, sink);
    if (how.statistics) {
        const const_model_ref merged(out);
        model_options reading = how;
        reading.labels.clear();
        reading.on_nonfinite = nonfinite::propagate;
        add_norms<Types>(policy, aligned_models(base, {&merged, 1}, reading), report);
    }
    return report;
}

} // namespace detail

/// Merges models in memory. `out` holds, for each tensor of the base, memory of its shape and dtype (or of
/// model_options::output). With a base:
///
///     merge(cpu{}, task_arithmetic_options{.lambda = 0.3}, base, tasks, out);
template <merge_method Options>
merge_report merge(const cpu& policy, const Options& options, const const_model_ref& base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how = {})
{
    return detail::merge_in_memory(policy, options, &base, tasks, out, how);
}

/// Merges models in memory by a method that needs no base (average). The first model gives names and dtypes.
template <merge_method Options>
    requires(!method<Options>::needs_base)
merge_report merge(const cpu& policy, const Options& options, std::span<const const_model_ref> tasks,
    const model_ref& out, const model_options& how = {})
{
    return detail::merge_in_memory(policy, options, nullptr, tasks, out, how);
}

namespace detail {
/// A list of storage types that holds each of those given once.
template <class List, class... Rest>
struct without_repeats {
    using type = List;
};
template <class... Kept, class First, class... Rest>
struct without_repeats<storage_list<Kept...>, First, Rest...>
    : without_repeats<
          std::conditional_t<(std::same_as<First, Kept> || ...), storage_list<Kept...>, storage_list<Kept..., First>>,
          Rest...> { };
template <class... T>
using distinct_storage = typename without_repeats<storage_list<>, T...>::type;

template <class Tasks>
[[nodiscard]] std::vector<const_model_ref> flat_models(const Tasks& tasks)
{
    std::vector<const_model_ref> models;
    for (const auto& task : tasks) { models.push_back(flat_model(as_view(task))); }
    return models;
}
template <class T, memory_space S>
[[nodiscard]] model_ref flat_output(view<T, S> out)
{
    model_ref model;
    model.insert("values", as_tensor(out));
    return model;
}
} // namespace detail

/// Merges flat views of one length. Storage types may differ between base, tasks and output; the output rounds once.
///
///     std::vector<float> base = …, out(base.size());
///     std::vector<std::vector<float>> tasks = …;
///     merge(cpu{}, ties_options{.density = 0.2, .lambda = 1.0}, base, tasks, out);
template <merge_method Options, input_of<cpu> Base, tasks_of<cpu> Tasks, output_of<cpu> Out>
merge_report merge(
    const cpu& policy, const Options& options, const Base& base, const Tasks& tasks, Out&& out, model_options how = {})
{
    const const_model_ref base_model = detail::flat_model(as_view(base));
    how.output = dtype_of<element_of<Out>>;
    using types = detail::distinct_storage<element_of<const Base>,
        element_of<std::ranges::range_reference_t<const Tasks>>, element_of<Out>>;
    return detail::merge_in_memory<types>(
        policy, options, &base_model, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

/// Merges flat views by a method that needs no base.
template <merge_method Options, tasks_of<cpu> Tasks, output_of<cpu> Out>
    requires(!method<Options>::needs_base)
merge_report merge(const cpu& policy, const Options& options, const Tasks& tasks, Out&& out, model_options how = {})
{
    how.output = dtype_of<element_of<Out>>;
    using types = detail::distinct_storage<element_of<std::ranges::range_reference_t<const Tasks>>, element_of<Out>>;
    return detail::merge_in_memory<types>(
        policy, options, nullptr, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

/// Options that are those of no method, or of one that lacks something: a sentence says what.
template <cpu_policy P, class Options, class... Arguments>
    requires(!merge_method<Options> && sizeof...(Arguments) >= 2)
merge_report merge(const P&, const Options&, Arguments&&...)
{
    static_assert(detail::check_method<Options>());
    return {};
}

/// The tasks in braces, as views or models: `{as_view(a), as_view(b)}`. (Vectors in braces would be copied.)
template <merge_method Options, class Base, class Task = detail::no_task, class Out>
merge_report merge(const cpu& policy, const Options& options, const Base& base, std::initializer_list<Task> tasks,
    Out&& out, const model_options& how = {})
{
    if constexpr (detail::merges_in_braces<Task>()) {
        return merge(policy, options, base, std::span<const Task>(tasks.begin(), tasks.size()), out, how);
    }
    return {};
}
template <merge_method Options, class Task = detail::no_task, class Out>
merge_report merge(const cpu& policy, const Options& options, std::initializer_list<Task> tasks, Out&& out,
    const model_options& how = {})
{
    if constexpr (detail::merges_in_braces<Task>()) {
        return merge(policy, options, std::span<const Task>(tasks.begin(), tasks.size()), out, how);
    }
    return {};
}

/// Braces that say nothing of a type: a sentence says so.
template <merge_method Options, class Base, class Out>
merge_report merge(
    const cpu&, const Options&, const Base&, const detail::mixed_tasks&, Out&&, const model_options& = {})
{
    static_assert(!merge_method<Options>,
        "merge(): the tasks in braces are of no one type: convert one of them, or merge models of tensors");
    return {};
}
template <merge_method Options, class Out>
merge_report merge(const cpu&, const Options&, const detail::mixed_tasks&, Out&&, const model_options& = {})
{
    static_assert(!merge_method<Options>,
        "merge(): the tasks in braces are of no one type: convert one of them, or merge models of tensors");
    return {};
}
template <merge_method Options, class Number, class Tasks, class Out>
    requires std::is_arithmetic_v<Number>
merge_report merge(
    const cpu&, const Options&, std::initializer_list<Number>, const Tasks&, Out&&, const model_options& = {})
{
    static_assert(!merge_method<Options>, "merge(): the base stands in braces: name a vector of its numbers");
    return {};
}

/// Arguments that are none of those above: a sentence says which one, and what it should be.
template <merge_method Options, class... Arguments>
    requires(!detail::right_merge<Options, Arguments...>)
merge_report merge(const cpu&, const Options&, Arguments&&...)
{
    detail::merge_arguments<Options, Arguments...>::check();
    return {};
}
template <cpu_policy P>
merge_report merge(const P&)
{
    static_assert(!policy<P>, "merge(): expected (policy, options, base, tasks, output)");
    return {};
}
template <detail::no_policy P, merge_method Options, class... Arguments>
merge_report merge(const P&, const Options&, const Arguments&...)
{
    static_assert(policy<P>,
        "merge(): the first argument is no policy: pass taskvec::cpu{}, or taskvec::cpu{.threads = 4} where threads "
        "are counted");
    return {};
}
template <merge_method Options, class... Arguments>
    requires(sizeof...(Arguments) >= 2)
merge_report merge(const Options&, const Arguments&...)
{
    static_assert(policy<Options>,
        "merge(): the policy is missing before the options: merge(taskvec::cpu{}, options, base, tasks, output)");
    return {};
}

// On taskvec::gpu this lives in <taskvec/device/methods.hpp>; without it a call says so.
template <detail::gpu_without_header<detail::gpu_room::merge> P, class... Arguments>
auto merge(const P&, Arguments&&...)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::merge>,
        "merge() on taskvec::gpu: include <taskvec/device/methods.hpp>");
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGED_NORMS(extern, storage_types)
TASKVEC_COMPILED_MERGED_NORMS(extern, storage_list<float>)
TASKVEC_COMPILED_MERGED_NORMS(extern, storage_list<f16>)
TASKVEC_COMPILED_MERGED_NORMS(extern, storage_list<bf16>)
#endif

} // namespace taskvec::inline TASKVEC_ABI
