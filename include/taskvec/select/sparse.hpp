// Sparse vectors: the entries of a tensor that were kept, by ascending flat index.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The kept entries of a tensor of this shape: `indices` ascend and are row-major flat, values[i] belongs to indices[i].
/// A is the arithmetic type: f32, or f64 for f64 tensors.
template <arithmetic_element A>
struct sparse_vector {
    extents shape{};
    std::vector<std::uint64_t> indices{};
    std::vector<A> values{};

    [[nodiscard]] std::size_t kept() const noexcept { return indices.size(); }
    friend bool operator==(const sparse_vector&, const sparse_vector&) = default;
};

} // namespace taskvec::inline TASKVEC_ABI
