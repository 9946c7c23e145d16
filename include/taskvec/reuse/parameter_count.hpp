// How many parameters a way of reusing T fine-tuned models stores.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/select/sparse.hpp>

#include <cstdint>
#include <span>

namespace taskvec::inline TASKVEC_ABI {

/// |θ|: elements of all tensors of a model.
[[nodiscard]] inline std::uint64_t parameter_count(const const_model_ref& model)
{
    std::uint64_t total = 0;
    for (const auto& [name, tensor] : model) { total += tensor.size(name); }
    return total;
}

/// |θ| + Σ kept: a shared model (θ0 for Post-Pruning, θ* for PERU-FFT) and a sparse delta for each task. Indices are
/// not counted, as in the paper.
[[nodiscard]] inline std::uint64_t parameter_count(const const_model_ref& shared, std::span<const sparse_model> deltas)
{
    std::uint64_t total = parameter_count(shared);
    for (const auto& delta : deltas) { total += kept_entries(delta); }
    return total;
}

} // namespace taskvec::inline TASKVEC_ABI
