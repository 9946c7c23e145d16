// Folding linearized adapters into plain LoRA adapters, which any server loads unchanged.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/initialization.hpp>

#include <cstddef>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// The plain LoRA update of one module that was fine-tuned per layer linearized: from φ0 = (A0, B0) to φ = (A, B) the
/// weight changes by s·(B0·A0 + B0·ΔA + ΔB·A0) = s·[B, B0]·[A0; A − A0], so b = [B, B0] and a = [A0; A − A0] of rank
/// 2r; where B0 = 0 that is b = B, a = A0 of rank r (A then has no influence). linearized_lora_layer computes with
/// exactly these factors. Throws what check_trained_from() throws. The result's factors are row-major. Exact but for
/// the rounding of A − A0.
///
///     const auto served = fold_linearized(initial.at("layers.0.q_proj"), tuned.at("layers.0.q_proj"));
template <arithmetic_element T>
[[nodiscard]] lora_update<T> fold_linearized(const lora_update<T>& initial, const lora_update<T>& adapter,
    std::string_view name = "adapter", const initialization_labels& labels = {})
{
    check_trained_from(initial, adapter, name, labels);
    const std::size_t out = initial.out(), in = initial.in(), rank = initial.rank();
    bool b0_is_zero = true;
    for (std::size_t i = 0; i < out; ++i) {
        for (std::size_t k = 0; k < rank; ++k) { b0_is_zero = b0_is_zero && initial.b(i, k) == T(0); }
    }
    const std::size_t folded_rank = b0_is_zero ? rank : 2 * rank;
    lora_update<T> folded{matrix<T>(out, folded_rank, matrix_order::row_major),
        matrix<T>(folded_rank, in, matrix_order::row_major), initial.scaling};
    for (std::size_t k = 0; k < rank; ++k) {
        for (std::size_t i = 0; i < out; ++i) { folded.b(i, k) = adapter.b(i, k); }
        for (std::size_t j = 0; j < in; ++j) { folded.a(k, j) = initial.a(k, j); }
        if (b0_is_zero) { continue; }
        for (std::size_t i = 0; i < out; ++i) { folded.b(i, rank + k) = initial.b(i, k); }
        for (std::size_t j = 0; j < in; ++j) { folded.a(rank + k, j) = adapter.a(k, j) - initial.a(k, j); }
    }
    return folded;
}

/// The same for every module of an adapter.
///
///     const auto served = fold_linearized(read_peft("init").updates, read_peft("task").updates);
template <arithmetic_element T>
[[nodiscard]] lora_adapter<T> fold_linearized(
    const lora_adapter<T>& initial, const lora_adapter<T>& adapter, const initialization_labels& labels = {})
{
    check_trained_from(initial, adapter, labels);
    lora_adapter<T> folded;
    for (const auto& [name, update] : adapter) {
        folded.emplace(name, fold_linearized(initial.at(name), update, name, labels));
    }
    return folded;
}

} // namespace taskvec::inline TASKVEC_ABI
