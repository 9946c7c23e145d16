// The tensors of aligned models that take no part in an algorithm, written as they are.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/parallel.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/core/storage.hpp>
#include <taskvec/models/aligned_models.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Writes a tensor that is decoded, as numbers of the output's dtype.
inline void decode_through(
    const cpu& policy, const copied_tensor& tensor, dtype type, tensor_sink& out, progress_meter& meter)
{
    constexpr std::size_t piece = 65536;
    const std::size_t size = tensor.source.size();
    const auto write = [&]<class T, class A>(std::type_identity<T>, A) {
        for_each_index(policy, (size + piece - 1) / piece, [&](std::size_t i, std::size_t) {
            const std::size_t n = std::min(piece, size - i * piece);
            std::pmr::vector<A> values(n, memory_of(policy));
            std::pmr::vector<storage_word<T>> words(n, memory_of(policy));
            tensor.source.source->read(i * piece, n, values.data());
            for (std::size_t k = 0; k < n; ++k) { words[k] = narrow_word<T>(values[k]); }
            out.write(tensor.output, i * piece * sizeof(T), words.data(), n * sizeof(T));
            if (!meter.advance(n * sizeof(A))) { raise<cancelled>(error_code::cancelled); }
        });
    };
    visit_storage(type, tensor.name, [&]<class T>(std::type_identity<T> as) {
        tensor.source.source->type() == dtype::f64 ? write(as, double{}) : write(as, float{});
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
