// The tensors of aligned models that take no part in an algorithm, written as they are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/parallel.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/models/aligned_models.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Writes the tensors that take no part.
inline void copy_through(const cpu& policy, const aligned_models& models, tensor_sink& out)
{
    constexpr std::size_t piece = std::size_t{1} << 20;
    std::uint64_t total = 0;
    for (const auto& tensor : models.copied()) { total += tensor.source.bytes(); }
    progress_meter meter(policy, "copy", total);
    for (const auto& tensor : models.copied()) {
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
