// The tensors of aligned models that take no part in an algorithm, written as they are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/byte_buffer.hpp>
#include <taskvec/core/parallel.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/stored_elements.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Writes a tensor that is worked out, as numbers of the output's dtype.
inline void decode_through(
    const cpu& policy, const copied_tensor& tensor, dtype type, tensor_sink& out, progress_meter& meter)
{
    constexpr std::size_t piece = 65536;
    const operand_source& from = *tensor.source.source;
    const std::size_t size = tensor.source.size();
    for_each_index(policy, (size + piece - 1) / piece, [&](std::size_t i, std::size_t) {
        const std::size_t n = std::min(piece, size - i * piece);
        byte_buffer words(memory_of(policy), byte_count(type, n));
        read_stored(from, type, i * piece, n, words.data());
        out.write(tensor.output, byte_count(type, i * piece), words.data(), words.size());
        if (!meter.advance(byte_count(from.type(), n))) { raise<cancelled>(error_code::cancelled); }
    });
}

/// Writes the tensors that take no part.
inline void copy_through(const cpu& policy, const aligned_models& models, tensor_sink& out)
{
    constexpr std::size_t piece = std::size_t{1} << 20;
    std::uint64_t total = 0;
    for (const auto& tensor : models.copied()) { total += tensor.source.bytes(); }
    progress_meter meter(policy, "copy", total);
    for (const auto& tensor : models.copied()) {
        if (!out.wants(tensor.output)) {
            if (!meter.advance(tensor.source.bytes())) { raise<cancelled>(error_code::cancelled); }
            continue;
        }
        if (tensor.source.source) {
            decode_through(policy, tensor, models.outputs()[tensor.output].dtype, out, meter);
            continue;
        }
        const auto* const from = static_cast<const std::byte*>(tensor.source.data);
        const std::size_t size = tensor.source.bytes();
        if (size == 0) { continue; }
        if (out.direct(tensor.output) == from) { // it is there
            if (!meter.advance(size)) { raise<cancelled>(error_code::cancelled); }
            continue;
        }
        for_each_index(policy, (size + piece - 1) / piece, [&](std::size_t i, std::size_t) {
            const std::size_t n = std::min(piece, size - i * piece);
            out.write(tensor.output, i * piece, from + i * piece, n);
            if (!meter.advance(n)) { raise<cancelled>(error_code::cancelled); }
        });
    }
}

} // namespace taskvec::inline TASKVEC_ABI::detail
