// A matrix that is held by two thin factors.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/fwd.hpp>

#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// A product weight·left·rightᵀ that is held by its factors: left is m×r, right is n×r, in either order each. LoRA's
/// scaling·b·a is left = b, right = aᵀ (see lora_update::factors()). Refers to the factors, which must outlive it.
///
///     factor_pair<float> p{.left = b.view(), .right = a.view().transposed(), .weight = scaling};
template <storage_element T, memory_space S>
struct factor_pair {
    matrix_view<const T, S> left{}; ///< m×r
    matrix_view<const T, S> right{}; ///< n×r
    double weight = 1; ///< of the product
    std::string_view name{}; ///< for errors
};

} // namespace taskvec::inline TASKVEC_ABI
