// post_pruning_streamed(): models on the host, of any size, pruned on taskvec::gpu.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/streamed_models.hpp>
#include <taskvec/device/reuse.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace elementwise {

TASKVEC_KERNELS_BEGIN

/// counts[b] += the entries that are kept of block b of the tensor.
template <arithmetic_element V, arithmetic_element A>
struct count_kept_in_blocks {
    kept_entry<V, A> kept;
    counter* counts;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            if (kept(i)) { atomic_add(counts + (kept.piece.offset + i) / block_size, 1); }
        }
    }
};

TASKVEC_KERNELS_END

} // namespace elementwise

/// Post-Pruning of aligned models in host memory into a sink on the host, through device memory: the CPU's entries,
/// values and errors. Reads both models three times over the bus (once to select, where selection has room; once to
/// count; once to take), and waits for each piece in the last of these. Besides what stream_options says it takes 8
/// bytes of device memory for each 4096 elements, and what is kept of a piece.
///
///     const stream_options how{.memory = std::size_t{4} << 30};
///     post_pruning_streamed(policy, {.density = 0.1}, aligned_models(&base, {&task, 1}), sink, how);
inline void post_pruning_streamed(const gpu& policy, const post_pruning_options& options, const aligned_models& models,
    sparse_sink& out, const stream_options& how = {})
{
    using elementwise::counter;
    if (!models.has_base() || models.task_count() != 1) {
        raise<invalid_argument>(error_code::task_count, "pruning takes one base and one task");
    }
    streamed_models streamed(policy, models, how);
    const trim_thresholds thresholds =
        detail::thresholds_on_device(streamed, options.density, options.scope, options.trim);
    const detail::device_thresholds on_device(policy, models, thresholds);
    const detail::equal_blocks blocks(models, all_tensors(models));
    device::buffer<counter> counts(policy, blocks.count());
    counts.clear();
    streamed.read(all_tensors(models), [&](const gpu& lane, std::size_t tensor, const device_piece& piece) {
        detail::visit_kept(
            models.tensors()[tensor], [&]<class V, class A>(std::type_identity<V>, std::type_identity<A>) {
                device::sweep(lane, piece.size,
                    elementwise::count_kept_in_blocks<V, A>{
                        {piece, on_device.get<A>(tensor), streamed.nonfinite_flag()},
                        counts.data() + blocks.first(tensor)});
            });
    });
    const std::vector<counter> found = counts.download();
    streamed.check_finite();
    std::vector<std::uint64_t> kept(models.tensors().size(), 0), written(models.tensors().size(), 0);
    for (std::size_t i = 0; i < kept.size(); ++i) {
        for (std::uint64_t block = 0; block * block_size < models.tensors()[i].size; ++block) {
            kept[i] += found[blocks.first(i) + block];
        }
    }
    out.begin(models, kept);
    streamed.read(all_tensors(models), [&](const gpu& lane, std::size_t tensor, const device_piece& piece) {
        detail::visit_kept(
            models.tensors()[tensor], [&]<class V, class A>(std::type_identity<V>, std::type_identity<A>) {
                std::uint64_t count = 0;
                for (std::uint64_t at = piece.offset; at < piece.offset + piece.size; at += block_size) {
                    count += found[blocks.first(tensor) + at / block_size];
                }
                const device::buffer<std::uint64_t> chosen(lane, count);
                const device::buffer<V> entries(lane, count);
                if (count > 0) {
                    (void)device::compact(lane, piece.size,
                        elementwise::kept_entry<V, A>{piece, on_device.get<A>(tensor), nullptr}, chosen.data());
                    device::sweep(lane, count, elementwise::gather_entries<V, A>{piece, chosen.data(), entries.data()});
                }
                std::vector<std::uint64_t> indices = chosen.download();
                const std::vector<V> values = entries.download();
                for (std::uint64_t& index : indices) { index += piece.offset; }
                out.write(tensor, written[tensor], piece.offset, piece.offset + piece.size, indices.data(),
                    values.data(), indices.size());
                written[tensor] += count;
            });
    });
}

} // namespace taskvec::inline TASKVEC_ABI
