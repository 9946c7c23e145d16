// Adapters folded into their base: base + Σ w·ΔW, streamed, each weight rounded once.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapted_model.hpp>
#include <taskvec/core/byte_buffer.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/models/operand_source.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A model written as it is, in the output's dtypes, as a merge method without options: what is worked out of it is
/// laid out one tensor at a time, and read in pieces of several rows.
struct fuse_options { };

template <>
class method<fuse_options> : public general_method {
public:
    static constexpr bool needs_base = false;

    method(const cpu_passes& passes, const fuse_options&)
    {
        if (passes.tasks() != 1) {
            raise<invalid_argument>(
                error_code::task_count, message("a fused model is one, and there are ", passes.tasks(), " tasks"));
        }
    }

    template <cpu_policy Policy>
    void write(const Policy& policy, const aligned_models& models, tensor_sink& out) const
    {
        detail::progress_meter meter(policy, "fuse", models.bytes());
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            if (tensor.wide) { write_tensor<double>(policy, models, i, out, meter); }
            else {
                write_tensor<float>(policy, models, i, out, meter);
            }
        }
    }

private:
    template <arithmetic_element A>
    static void write_tensor(const cpu& policy, const aligned_models& models, std::size_t index, tensor_sink& out,
        detail::progress_meter& meter)
    {
        const aligned_tensor& tensor = models.tensors()[index];
        if (!out.wants(tensor.output)) { return; }
        const auto& from = tensor.tasks[0];
        const detail::prepared_source prepared(tensor.size > 0 ? from.source : nullptr, policy);
        const chunk_range range = chunks_of(models, index);
        const std::size_t width = bits_per_element(tensor.output_dtype) / 8;
        auto* const direct = static_cast<std::byte*>(out.direct(tensor.output));
        const std::size_t largest = range.first < range.last ? models.chunks()[range.first].size : 0;
        struct buffers {
            std::pmr::vector<A> values;
            detail::byte_buffer stored;
        };
        std::pmr::vector<buffers> workers(memory_of(policy));
        for (std::size_t w = worker_count(policy, range.last - range.first); w-- > 0;) {
            workers.push_back({std::pmr::vector<A>(largest, memory_of(policy)),
                detail::byte_buffer(memory_of(policy), direct ? 0 : largest * width)});
        }
        const auto& conversion =
            detail::conversions_between<A, storage_types>.of(tensor.output_dtype, tensor.name, true);
        for_each_index(policy, range.last - range.first, [&](std::size_t c, std::size_t worker) {
            const tensor_chunk piece = models.chunks()[range.first + c];
            A* const values = workers[worker].values.data();
            read(from, tensor, piece, values);
            if (kernels::largest_magnitude(values, piece.size) >= exponent_mask<A>
                && models.options().on_nonfinite == nonfinite::error) {
                refuse(models, tensor, piece, values);
            }
            const std::uint64_t at = piece.offset * width;
            if (direct) { conversion.narrow(values, direct + at, piece.size); }
            else {
                conversion.narrow(values, workers[worker].stored.data(), piece.size);
                out.write(tensor.output, at, workers[worker].stored.data(), piece.size * width);
            }
            if (!meter.advance(models.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
        });
    }
    template <arithmetic_element A>
    static void read(
        const aligned_tensor::operand& from, const aligned_tensor& tensor, const tensor_chunk& piece, A* values)
    {
        if (from.source && from.dtype == dtype_of<A>) {
            from.source->read(piece.offset, piece.size, values);
            return;
        }
        constexpr std::size_t step = 512;
        std::array<double, step> raw;
        for (std::size_t at = 0; at < piece.size; at += step) {
            const std::size_t n = std::min(step, piece.size - at);
            const std::size_t width = bits_per_element(from.dtype) / 8;
            const std::byte* stored = from.data + (piece.offset + at) * width;
            if (from.source) {
                from.source->read(piece.offset + at, n, raw.data());
                stored = reinterpret_cast<const std::byte*>(raw.data());
            }
            else if (reinterpret_cast<std::uintptr_t>(stored) % width != 0) {
                std::memcpy(raw.data(), stored, n * width);
                stored = reinterpret_cast<const std::byte*>(raw.data());
            }
            (void)detail::conversions_between<A, storage_types>.of(from.dtype, tensor.name).widen(stored, values + at, n);
        }
    }
    /// Says whose number it is that is not finite.
    template <arithmetic_element A>
    [[noreturn]] TASKVEC_COLD static void refuse(
        const aligned_models& models, const aligned_tensor& tensor, const tensor_chunk& piece, const A* values)
    {
        std::size_t i = 0;
        while (i + 1 < piece.size && std::isfinite(values[i])) { ++i; }
        const std::uint64_t place = piece.offset + i;
        if (tensor.base.data) {
            std::array<double, 8> raw;
            const double before = detail::with_elements(tensor.base, place, 1, reinterpret_cast<std::byte*>(raw.data()),
                [](const auto* value) { return static_cast<double>(widen<double>(*value)); });
            if (!std::isfinite(before)) {
                detail::refuse_nonfinite(tensor.name, models.options().base_label, before, place);
            }
        }
        if (!tensor.tasks[0].source) {
            detail::refuse_nonfinite(tensor.name, models.label(0), static_cast<double>(values[i]), place);
        }
        raise<nonfinite_error>(error_code::result_overflow,
            message("tensor '", tensor.name, "' with its adapters is not finite at index ", place,
                ", though the base is: ", models.label(0), " makes it larger than ", to_string(dtype_of<A>),
                " holds; choose smaller weights, or repair the adapter"));
    }
};

/// base + Σ weight·ΔW into a sink, whose tensors are those of the base in name order, in the base's dtypes or
/// model_options::output (fp8 becomes f32). Every weight is rounded once, from the sum that adapted_weight documents:
/// the same bits for any threads, blocks, budgets and instruction sets. What no adapter changes keeps its bits, in the
/// dtype of the output. Memory: the factors of one tensor at a time beside what the updates take, and a chunk for each
/// thread; ΔW is never formed. Cost: one read and one write of the model, 2·rank flops an entry; DoRA reads its tensors
/// twice. Errors: nonfinite_error, cancelled; what the sink throws.
///
///     adapted_model sum;
///     sum.add(base, "layers.0.q_proj.weight", update, 0.5);
///     fuse(cpu{}, base, sum, sink);
template <cpu_policy Policy>
merge_report fuse(const Policy& policy, const const_model_ref& base, const adapted_model& changes, tensor_sink& out,
    const model_options& how = {})
{
    aligned_models models(&base, {&base, 1}, how);
    const auto sources = changes.attach(models, 0);
    return merge(policy, fuse_options{}, models, out);
}
/// The same to tensors in memory, and from an adapter whose modules M have the weights "M.weight" of the base.
///
///     fuse(cpu{}, base, read_peft("adapter").updates, out);
template <cpu_policy Policy>
merge_report fuse(const Policy& policy, const const_model_ref& base, const adapted_model& changes, const model_ref& out,
    const model_options& how = {})
{
    aligned_models models(&base, {&base, 1}, how);
    const auto sources = changes.attach(models, 0);
    memory_sink sink = detail::sink_over(models, out);
    return merge(policy, fuse_options{}, models, sink);
}
template <cpu_policy Policy, arithmetic_element T>
merge_report fuse(const Policy& policy, const const_model_ref& base, const lora_adapter<T>& adapter,
    const model_ref& out, const model_options& how = {}, double weight = 1)
{
    adapted_model changes;
    for (const auto& [module, update] : adapter) { changes.add(base, module + ".weight", update, weight); }
    return fuse(policy, base, changes, out, how);
}

/// An update and its weight in a sum.
template <arithmetic_element T>
struct weighted_update {
    const lora_update<T>& update; ///< borrowed
    double weight = 1; ///< of the update
};
/// One weight in memory: out = round(weight + Σ factors), typed. `weight` and `out` are out×in and row-major, `updates`
/// refer to theirs; out may be the weight's own memory.
///
///     fuse(cpu{}, as_view(weight), {{update, 0.5}, {other, 1.0}}, as_view(out));
template <cpu_policy Policy, arithmetic_element T, storage_element S, storage_element Out>
void fuse(const Policy& policy, view<const S, memory_space::host> weight,
    std::initializer_list<weighted_update<T>> updates, view<Out, memory_space::host> out, model_options how = {})
{
    if (updates.size() == 0) { raise<invalid_argument>(error_code::inputs_empty, "no update was given"); }
    const extents shape{static_cast<std::int64_t>(updates.begin()->update.out()),
        static_cast<std::int64_t>(updates.begin()->update.in())};
    const_model_ref base;
    base.insert("weight", as_tensor(weight, shape));
    model_ref result;
    result.insert("weight", as_tensor(out, shape));
    how.output = dtype_of<Out>;
    adapted_model changes;
    for (const auto& [update, factor] : updates) { changes.add(base, "weight", update, factor); }
    fuse(policy, base, changes, result, how);
}

TASKVEC_WRONG_CALLS(cpu, fuse, any_arguments,
    "fuse(policy, base, changes, output), where changes are a lora_adapter or an adapted_model, and output a model "
    "or a sink")

} // namespace taskvec::inline TASKVEC_ABI
