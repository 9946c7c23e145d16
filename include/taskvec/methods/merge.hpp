// merge(): one walk over aligned models that writes the merged model, for every method.
// SPDX-License-Identifier: Apache-2.0
//
// A method is an options struct (average_options, ties_options, …) with a detail::merger<Options> beside it, which
// makes the passes that must come first (thresholds, norms) in its constructor and then merges one block at a time.
// Adding a method is adding those two. A method that is not elementwise (RegMean) has write(policy, models, sink) in
// place of the call for a block.
#pragma once

#include <taskvec/core/sink.hpp>
#include <taskvec/models/block.hpp>
#include <taskvec/models/companion.hpp>
#include <taskvec/models/copy_through.hpp>
#include <taskvec/models/tensor_sums.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory_resource>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What a merge can say about itself; filled where model_options::statistics asks for it.
struct merge_report {
    struct tensor_norm {
        std::string name;
        double merged = 0; ///< ‖θ*‖ before rounding to storage
        double change = 0; ///< ‖θ* − θ0‖, 0 without a base
    };
    std::vector<std::uint64_t> kept{}; ///< for each task: nonzero entries of its task vector that took part
    std::vector<std::uint64_t> conflicting{}; ///< for each task: those of them whose sign lost the election (TIES)
    std::vector<tensor_norm> norms{};
    unsigned walks = 0; ///< how often the models were read from end to end
    std::uint64_t beside = 0; ///< bytes read beside those walks: statistics, and second reads of some tensors
};

namespace detail {

/// What a block tells its chunk.
struct merge_tally {
    std::int64_t sign_sum = 0; ///< Σ of elected signs
    std::uint64_t unresolved = 0; ///< entries whose election sum is 0 while some task vector is not
    std::vector<std::uint64_t> kept{}, conflicting{};
};

template <class Options>
class merger;

} // namespace detail

/// The options of a merge method.
template <class Options>
concept merge_method = requires(const cpu& policy, const aligned_models& models, const Options& options) {
    detail::merger<Options>(policy, models, options);
};

namespace detail {

/// Weights as many as tasks: given, or all 1. Rounded to A once, when used.
inline std::vector<double> checked_weights(
    const std::vector<double>& weights, std::size_t tasks, bool negative_allowed = true)
{
    if (weights.empty()) { return std::vector<double>(tasks, 1.0); }
    if (weights.size() != tasks) {
        raise<invalid_argument>(message(weights.size(), " weights for ", tasks, " tasks: give one each, or none"));
    }
    for (std::size_t t = 0; t < tasks; ++t) {
        if (!std::isfinite(weights[t])) {
            raise<invalid_argument>(message("the weight of task ", t + 1, " is not finite"));
        }
        if (!negative_allowed && weights[t] < 0) {
            raise<invalid_argument>(message(
                "the weight of task ", t + 1, " is ", weights[t], ": this method has no meaning for negative weights"));
        }
    }
    return weights;
}

inline void check_factor(double value, std::string_view what)
{
    if (!std::isfinite(value)) { raise<invalid_argument>(message(what, " is not finite")); }
}

/// Outputs must not overlap inputs, except that a method which reads each element for the last time before it writes
/// it may work in place. What lies beside the models may never be overwritten.
inline void check_aliases(
    const aligned_models& models, tensor_sink& out, bool in_place, std::span<const companion> companions = {})
{
    struct range {
        const std::byte *begin, *end;
        std::size_t tensor;
    };
    std::vector<range> written;
    for (std::size_t i = 0; i < models.tensors().size(); ++i) {
        const auto& tensor = models.tensors()[i];
        if (auto* const begin = static_cast<const std::byte*>(out.direct(tensor.output)); begin && tensor.size > 0) {
            written.push_back({begin, begin + byte_count(tensor.output_dtype, tensor.size), i});
        }
    }
    if (written.empty()) { return; }
    std::sort(
        written.begin(), written.end(), [](const range& a, const range& b) { return std::less<>()(a.begin, b.begin); });
    for (std::size_t i = 1; i < written.size(); ++i) {
        if (std::less<>()(written[i].begin, written[i - 1].end)) {
            raise<invalid_argument>(message("the outputs '", models.tensors()[written[i - 1].tensor].name, "' and '",
                models.tensors()[written[i].tensor].name, "' share memory"));
        }
    }
    const auto check = [&](const std::byte* begin, std::size_t bytes, std::size_t index, bool replaceable) {
        if (!begin || bytes == 0) { return; }
        const std::byte* const end = begin + bytes;
        auto place = std::lower_bound(written.begin(), written.end(), begin,
            [](const range& r, const std::byte* p) { return !std::less<>()(p, r.end); });
        if (place == written.end() || !std::less<>()(place->begin, end)) { return; }
        const bool same = place->tensor == index && place->begin == begin && place->end == end;
        if (!same || !replaceable) {
            raise<invalid_argument>(message("the output '", models.tensors()[place->tensor].name,
                "' shares memory with the input '", models.tensors()[index].name,
                "': this method cannot work in place there; give it memory of its own"));
        }
    };
    for (std::size_t i = 0; i < models.tensors().size(); ++i) {
        const auto& tensor = models.tensors()[i];
        check(tensor.base.data, byte_count(tensor.base.dtype, tensor.size), i, in_place);
        for (const auto& task : tensor.tasks) { check(task.data, byte_count(task.dtype, tensor.size), i, in_place); }
    }
    for (const auto& beside : companions) { check(beside.data, beside.bytes, beside.tensor, false); }
}

/// Stores merged rows as the output's dtype, in place where the sink has memory, otherwise chunk by chunk.
class row_writer {
public:
    row_writer(tensor_sink& out, bool stream, std::pmr::memory_resource* memory)
        : out_(&out)
        , stream_(stream)
        , buffer_(memory)
    { }

    void open(const aligned_tensor& tensor, const chunk& piece)
    {
        tensor_ = &tensor;
        piece_ = &piece;
        direct_ = static_cast<std::byte*>(out_->direct(tensor.output));
        const std::size_t needed = byte_count(tensor.output_dtype, direct_ ? block_size : piece.size);
        if (buffer_.size() < needed) { buffer_.resize(needed); }
    }
    template <arithmetic_element A>
    void write(std::uint64_t offset, const A* values, std::size_t n)
    {
        visit_storage(tensor_->output_dtype, tensor_->name, [&]<class T>(std::type_identity<T>) {
            if (!direct_) {
                kernels::narrow(
                    values, reinterpret_cast<T*>(buffer_.data() + (offset - piece_->offset) * sizeof(T)), n);
            }
            else if (!stream_ || reinterpret_cast<std::uintptr_t>(direct_) % alignof(T) != 0) {
                if constexpr (std::same_as<T, A>) { std::memcpy(direct_ + offset * sizeof(T), values, n * sizeof(T)); }
                else {
                    kernels::narrow(values, reinterpret_cast<T*>(buffer_.data()), n);
                    std::memcpy(direct_ + offset * sizeof(T), buffer_.data(), n * sizeof(T));
                }
            }
            else {
                if constexpr (std::same_as<T, A>) {
                    kernels::stream_copy(direct_ + offset * sizeof(T), values, n * sizeof(T));
                }
                else {
                    kernels::narrow(values, reinterpret_cast<T*>(buffer_.data()), n);
                    kernels::stream_copy(direct_ + offset * sizeof(T), buffer_.data(), n * sizeof(T));
                }
            }
        });
    }
    /// Where a fused kernel writes a block that is stored as T; without words where the output is stored otherwise, or
    /// misaligned.
    template <storage_element T>
    [[nodiscard]] kernels::stored_output<T> place(std::uint64_t offset)
    {
        if (tensor_->output_dtype != dtype_of<T>) { return {}; }
        if (!direct_) {
            return {kernels::words(reinterpret_cast<T*>(buffer_.data()) + (offset - piece_->offset)), false};
        }
        if (reinterpret_cast<std::uintptr_t>(direct_) % alignof(T) != 0) { return {}; }
        return {kernels::words(reinterpret_cast<T*>(direct_) + offset), stream_};
    }
    void close()
    {
        if (direct_) {
            if (stream_) { kernels::stream_fence(); }
            return;
        }
        const std::size_t width = bits(tensor_->output_dtype) / 8;
        out_->write(tensor_->output, piece_->offset * width, buffer_.data(), piece_->size * width);
    }

private:
    tensor_sink* out_;
    bool stream_;
    std::pmr::vector<std::byte> buffer_;
    const aligned_tensor* tensor_ = nullptr;
    const chunk* piece_ = nullptr;
    std::byte* direct_ = nullptr;
};

/// A method that can merge a block from stored words of one type to stored words of the same type in one sweep. fused()
/// is false, and nothing is done, where it cannot: the rows then take over, and give the same bits.
template <class Merger, class T>
concept fuses =
    requires(const Merger& method, block<float>& rows, const kernels::stored_output<T>& out, merge_tally& tally) {
        { method.fused(rows, out, tally) } -> std::same_as<bool>;
    };

/// Merges an opened block and writes it.
template <class Merger, arithmetic_element A>
void merge_block(const Merger& method, block<A>& rows, row_writer& writer, merge_tally& tally)
{
    if constexpr (std::same_as<A, float> && fuses<Merger, bf16>) {
        const auto fused = [&]<class T>(std::type_identity<T>) {
            const auto out = writer.template place<T>(rows.offset());
            return out.words && method.fused(rows, out, tally);
        };
        if (fused(std::type_identity<bf16>{}) || fused(std::type_identity<float>{})) { return; }
    }
    A* const merged = rows.scratch(0);
    method(rows, merged, tally);
    writer.write(rows.offset(), merged, rows.size());
}

/// Outputs larger than this do not stay in the cache: they are written past it.
inline constexpr std::uint64_t streaming_bytes = std::uint64_t{8} << 20;

/// Merges the given chunks with a prepared method. tallies[i] receives what chunk chunks[i] said.
template <class Merger>
void merge_chunks(const cpu& policy, const aligned_models& models, const Merger& method,
    std::span<const std::size_t> chunks, tensor_sink& out, std::span<merge_tally> tallies, std::string_view phase)
{
    std::uint64_t written = 0;
    for (const auto& tensor : models.tensors()) { written += byte_count(tensor.output_dtype, tensor.size); }
    auto workspaces = make_workspaces(policy, models, chunks.size(), 1 + Merger::scratch_rows);
    std::vector<row_writer> writers;
    for (std::size_t w = 0; w < workspaces.size(); ++w) {
        writers.emplace_back(out, written > streaming_bytes, memory_of(policy));
    }
    std::uint64_t read = 0;
    for (const std::size_t index : chunks) { read += models.bytes(models.chunks()[index]); }
    progress_meter meter(policy, phase, read);
    for_each_index(policy, chunks.size(), [&](std::size_t index, std::size_t worker) {
        const chunk& piece = models.chunks()[chunks[index]];
        const aligned_tensor& tensor = models.tensors()[piece.tensor];
        row_writer& writer = writers[worker];
        writer.open(tensor, piece);
        workspaces[worker].with_block(tensor, [&](auto& rows) {
            for_each_block_of(rows, piece, [&](auto& opened) { merge_block(method, opened, writer, tallies[index]); });
        });
        writer.close();
        if (!meter.advance(models.bytes(piece))) { raise<cancelled>(); }
    });
}

/// The walk of an elementwise method, and a second one over what a majority changed.
template <class Merger>
void merge_elementwise(
    const cpu& policy, const aligned_models& models, Merger& method, tensor_sink& out, merge_report& report)
{
    std::vector<std::size_t> chunks(models.chunks().size());
    for (std::size_t i = 0; i < chunks.size(); ++i) { chunks[i] = i; }
    std::vector<merge_tally> tallies(chunks.size());
    merge_chunks(policy, models, method, chunks, out, tallies, "merge");
    if constexpr (requires { method.settle(models, std::as_const(tallies)); }) {
        const std::vector<std::size_t> again = method.settle(models, std::as_const(tallies));
        if (!again.empty()) {
            std::vector<merge_tally> redone(again.size());
            merge_chunks(policy, models, method, again, out, redone, "settle");
            for (std::size_t i = 0; i < again.size(); ++i) { tallies[again[i]] = std::move(redone[i]); }
        }
    }
    for (const auto& tally : tallies) {
        report.kept.resize(std::max(report.kept.size(), tally.kept.size()));
        report.conflicting.resize(std::max(report.conflicting.size(), tally.conflicting.size()));
        for (std::size_t t = 0; t < tally.kept.size(); ++t) { report.kept[t] += tally.kept[t]; }
        for (std::size_t t = 0; t < tally.conflicting.size(); ++t) { report.conflicting[t] += tally.conflicting[t]; }
    }
}

/// Norms of the merged model as it was stored, read back where the sink has memory.
inline void add_norms(const cpu& policy, const aligned_models& merged_and_base, merge_report& report)
{
    const auto sums = tensor_sums(policy, merged_and_base, 2, 0, "norms", [](auto& rows, double* sum) {
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

} // namespace detail

/// θ* = method(θ0, θ1 … θT): merges aligned models into a sink, whose tensors are those of models.outputs() in that
/// order. Elementwise, streaming: memory is a few rows for each thread, whatever the size of the models.
/// Bit-exact for any threads, chunks and sinks. Errors: invalid_argument (options; aliased outputs), nonfinite_error,
/// cancelled; what the sink throws. After an error an in-memory output is unspecified.
///
///     aligned_models models(&base, tasks);
///     merge(cpu{}, ties_options{.density = 0.2}, models, sink);
template <merge_method Options>
merge_report merge(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    using method_type = detail::merger<Options>;
    if (method_type::needs_base && !models.has_base()) {
        raise<invalid_argument>("this merge method needs a base model");
    }
    detail::check_aliases(models, out, method_type::in_place);
    method_type method(policy, models, options);
    if constexpr (requires { method.companions(); }) {
        detail::check_aliases(models, out, method_type::in_place, method.companions());
    }
    merge_report report;
    if constexpr (requires { method.write(policy, models, out); }) { method.write(policy, models, out); }
    else {
        detail::merge_elementwise(policy, models, method, out, report);
    }
    detail::copy_through(policy, models, out);
    report.walks = method.walks() + 1;
    if constexpr (requires { method.bytes_beside(models); }) { report.beside = method.bytes_beside(models); }
    return report;
}

namespace detail {

/// The sink over a model in memory, checked against what a merge writes.
inline memory_sink sink_over(
    const aligned_models& models, const model_ref& out, memory_space space = memory_space::host)
{
    std::vector<void*> tensors;
    for (const auto& spec : models.outputs()) {
        const tensor_ref* const tensor = out.find(spec.name);
        if (!tensor) { raise<invalid_argument>(message("tensor '", spec.name, "' is missing in the output")); }
        if (tensor->space != space || !tensor->contiguous()) {
            raise<invalid_argument>(message("tensor '", spec.name, "' of the output must be contiguous ",
                space == memory_space::host ? "host" : "device", " memory"));
        }
        if (tensor->shape != spec.shape) {
            raise<shape_mismatch>(message("tensor '", spec.name, "' of the output has shape ", to_string(tensor->shape),
                "; expected ", to_string(spec.shape)));
        }
        if (tensor->dtype != spec.dtype) {
            raise<dtype_mismatch>(message("tensor '", spec.name, "' of the output has dtype ", name(tensor->dtype),
                "; expected ", name(spec.dtype)));
        }
        if (!tensor->data && spec.bytes() > 0) {
            raise<invalid_argument>(message("tensor '", spec.name, "' of the output has no data (null pointer)"));
        }
        tensors.push_back(tensor->data);
    }
    return memory_sink(std::move(tensors));
}

/// Outputs of an in-memory merge decide their own dtype, tensor by tensor, unless one is asked for.
template <merge_method Options>
merge_report merge_in_memory(const cpu& policy, const Options& options, const const_model_ref* base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how)
{
    const aligned_models models(base, tasks, how);
    memory_sink sink = sink_over(models, out);
    merge_report report = merge(policy, options, models, sink);
    if (how.statistics) {
        const const_model_ref merged(out);
        model_options reading = how;
        reading.labels.clear();
        reading.on_nonfinite = nonfinite::propagate;
        add_norms(policy, aligned_models(base, {&merged, 1}, reading), report);
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
    requires(!detail::merger<Options>::needs_base)
merge_report merge(const cpu& policy, const Options& options, std::span<const const_model_ref> tasks,
    const model_ref& out, const model_options& how = {})
{
    return detail::merge_in_memory(policy, options, nullptr, tasks, out, how);
}

/// A list of flat views (or what converts to one) of one storage type in P's memory space: one for each task.
template <class Tasks, class P>
concept tasks_of = std::ranges::input_range<const Tasks> && input_of<std::ranges::range_reference_t<const Tasks>, P>;

namespace detail {
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
    return detail::merge_in_memory(
        policy, options, &base_model, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

/// Merges flat views by a method that needs no base.
template <merge_method Options, tasks_of<cpu> Tasks, output_of<cpu> Out>
    requires(!detail::merger<Options>::needs_base)
merge_report merge(const cpu& policy, const Options& options, const Tasks& tasks, Out&& out, model_options how = {})
{
    how.output = dtype_of<element_of<Out>>;
    return detail::merge_in_memory(
        policy, options, nullptr, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

// On taskvec::gpu this lives in <taskvec/device/methods.hpp>; without it a call says so.
template <detail::gpu_without_header<detail::gpu_room::merge> P, class... Arguments>
auto merge(const P&, Arguments&&...)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::merge>,
        "merge() on taskvec::gpu: include <taskvec/device/methods.hpp>");
}

} // namespace taskvec::inline TASKVEC_ABI
