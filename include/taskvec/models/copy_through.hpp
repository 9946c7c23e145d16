// The tensors of aligned models that take no part in an algorithm, written as they are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/parallel.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/models/aligned_models.hpp>

#include <algorithm>
#include <cstddef>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Writes the tensors that take no part.
inline void copy_through(const cpu& policy, const aligned_models& models, tensor_sink& out)
{
    constexpr std::size_t piece = std::size_t{1} << 20;
    for (const auto& tensor : models.copied()) {
        const auto* const from = static_cast<const std::byte*>(tensor.source.data);
        const std::size_t size = tensor.source.bytes();
        if (size == 0 || out.direct(tensor.output) == from) { continue; }
        for_each_index(policy, (size + piece - 1) / piece, [&](std::size_t i, std::size_t) {
            out.write(tensor.output, i * piece, from + i * piece, std::min(piece, size - i * piece));
        });
    }
}

} // namespace taskvec::inline TASKVEC_ABI::detail
