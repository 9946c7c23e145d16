// Folding linearized adapters into plain LoRA adapters, which any server loads unchanged.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapter.hpp>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// What messages call the two adapters of a fold.
struct fold_labels {
    std::string initial = "the initialisation", adapter = "the adapter";
};

/// The plain LoRA update of one module that was fine-tuned per layer linearized: from φ0 = (A0, B0) to φ = (A, B) the
/// weight changes by s·(B0·A0 + B0·ΔA + ΔB·A0) = s·[B, B0]·[A0; A − A0], so b = [B, B0] and a = [A0; A − A0] of rank
/// 2r; where B0 = 0 that is b = B, a = A0 of rank r (A then has no influence). See linearized_lora_layer, whose fold()
/// it is. `initial` and `adapter` have one shape, rank and scaling, else shape_mismatch or invalid_argument naming
/// `name`. Factors row-major. Exact but for the rounding of A − A0.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> fold_linearized(const lora_update<T>& initial, const lora_update<T>& adapter,
    std::string_view name = "adapter", const fold_labels& labels = {})
{
    check_update(initial, name);
    check_update(adapter, name);
    const std::size_t out = initial.out(), in = initial.in(), rank = initial.rank();
    if (adapter.out() != out || adapter.in() != in || adapter.rank() != rank) {
        raise<shape_mismatch>(message("module '", name, "' is ", adapter.out(), "×", adapter.in(), " of rank ",
            adapter.rank(), " in ", labels.adapter, " but ", out, "×", in, " of rank ", rank, " in ", labels.initial,
            ": this is not what the adapter was trained from"));
    }
    if (!same_scaling(adapter.scaling, initial.scaling)) {
        raise<invalid_argument>(message("module '", name, "' has scaling ", adapter.scaling, " in ", labels.adapter,
            " but ", initial.scaling, " in ", labels.initial, ": this is not what the adapter was trained from"));
    }
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

/// The same for every module of an adapter. Throws invalid_argument where the two do not have the same modules.
///
///     const auto served = fold_linearized(read_peft("init").updates, read_peft("task").updates);
template <arithmetic_element T>
[[nodiscard]] lora_adapter<T> fold_linearized(
    const lora_adapter<T>& initial, const lora_adapter<T>& adapter, const fold_labels& labels = {})
{
    if (initial.empty()) {
        raise<invalid_argument>(
            "the initialisation has no modules: a linearized adapter folds only around its initialisation");
    }
    for (const auto& [name, update] : initial) {
        if (!adapter.contains(name)) {
            raise<invalid_argument>(message("module '", name, "' of ", labels.initial, " is missing in ",
                labels.adapter, ": give the initialisation that it was trained from"));
        }
    }
    lora_adapter<T> folded;
    for (const auto& [name, update] : adapter) {
        const auto start = initial.find(name);
        if (start == initial.end()) {
            raise<invalid_argument>(message("module '", name, "' of ", labels.adapter, " is not in ", labels.initial,
                ": give the initialisation that it was trained from"));
        }
        folded.emplace(name, fold_linearized(start->second, update, name, labels));
    }
    return folded;
}

} // namespace taskvec::inline TASKVEC_ABI
