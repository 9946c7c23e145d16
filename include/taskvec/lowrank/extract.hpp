// Extracting a LoRA from two checkpoints: the low-rank approximation of what fine-tuning changed, one layer at a time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/lowrank/adapter.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

struct extract_options {
    rank_choice rank{};
    sigma_side side = sigma_side::both;
    std::function<bool(std::string_view)> include{}; ///< which tensors to look at, by name; empty: all
    std::string suffix = ".weight"; ///< the 2-D tensors whose name ends so are layers; the rest of the name is the module's
};

/// What extract_lora() found.
template <arithmetic_element T>
struct extract_result : adapter_result<T> {
    std::vector<std::string> unchanged; ///< layers without any change: no update is made for them
    std::vector<std::string> left_out; ///< other tensors that changed: an adapter cannot hold them
    double left_out_squared_norm = 0; ///< ‖·‖²_F of their changes (floating ones)
};

namespace detail {

/// tuned − base in T, row-major.
template <class T>
void subtract_tensors(const cpu& policy, const const_tensor_ref& base, const const_tensor_ref& tuned, std::string_view name, T* out, std::size_t size)
{
    visit_storage(base.dtype, name, [&]<class B>(std::type_identity<B>) {
        visit_storage(tuned.dtype, name, [&]<class X>(std::type_identity<X>) {
            constexpr std::size_t piece = std::size_t{1} << 16;
            const auto* const from = static_cast<const std::byte*>(base.data);
            const auto* const to = static_cast<const std::byte*>(tuned.data);
            for_each_index(policy, (size + piece - 1) / piece, [&](std::size_t index, std::size_t) {
                for (std::size_t i = index * piece; i < std::min(size, (index + 1) * piece); ++i) {
                    B b; // elements of a file may lie at any address
                    X x;
                    std::memcpy(&b, from + i * sizeof(B), sizeof(B));
                    std::memcpy(&x, to + i * sizeof(X), sizeof(X));
                    out[i] = static_cast<T>(widen<T>(x) - widen<T>(b));
                }
            });
        });
    });
}

} // namespace detail

/// For each 2-D tensor "MODULE.weight" (out×in) that differs between two checkpoints, ΔW = θt − θ0 in T and its approximation
/// by the asked rank or energy, decomposed by `decompose`. Layers go one at a time: the memory is three to four times the
/// largest layer. A layer whose smaller side is below the rank is kept whole. Other tensors that differ are listed.
/// Throws invalid_argument (tensors missing on either side; a rank of 0, or above every layer's, unless clamped; nothing to
/// extract), shape_mismatch, dtype_mismatch, nonfinite_error.
///
///     auto lora = extract_lora<float>(cpu{}, base, tuned, {.rank = {.rank = 16}}, decompose_randomized{});
template <arithmetic_element T, decomposition<T> Decompose>
[[nodiscard]] extract_result<T> extract_lora(
    const cpu& policy, const const_model_ref& base, const const_model_ref& tuned, const extract_options& options, const Decompose& decompose)
{
    struct layer {
        std::string tensor;
        std::size_t out = 0, in = 0;
    };
    extract_result<T> result;
    std::vector<layer> layers;
    std::vector<std::string> others;
    std::size_t largest_rank = 0, largest_size = 0;
    for (const auto& [name, tensor] : tuned) {
        if (!base.find(name)) {
            raise<invalid_argument>(message("tensor '", name, "' of the fine-tuned model is not in the base: they are not of one architecture"));
        }
    }
    for (const auto& [name, tensor] : base) {
        if (options.include && !options.include(name)) { continue; }
        const const_tensor_ref* const other = tuned.find(name);
        if (!other) { raise<invalid_argument>(message("tensor '", name, "' of the base is missing in the fine-tuned model")); }
        if (other->shape != tensor.shape) {
            raise<shape_mismatch>(
                message("tensor '", name, "' has shape ", to_string(other->shape), " in the fine-tuned model but ", to_string(tensor.shape), " in the base"));
        }
        for (const auto* one : {&tensor, other}) {
            if (one->space != memory_space::host || !one->contiguous()) {
                raise<invalid_argument>(message("tensor '", name, "' is not contiguous host memory; copy it first"));
            }
        }
        const bool floating = is_storage(tensor.dtype) && is_storage(other->dtype);
        if (tensor.shape.size() == 2 && name.size() > options.suffix.size() && name.ends_with(options.suffix) && floating) {
            const auto out = static_cast<std::size_t>(tensor.shape[0]), in = static_cast<std::size_t>(tensor.shape[1]);
            layers.push_back({name, out, in});
            largest_rank = std::max(largest_rank, std::min(out, in));
            largest_size = std::max(largest_size, out * in);
        }
        else {
            others.push_back(name);
        }
    }
    if (layers.empty()) { raise<invalid_argument>(message("there is no 2-D floating tensor '*", options.suffix, "' to extract an adapter from")); }
    detail::check_rank(options.rank, largest_rank, "every layer");

    matrix<T> delta(1, largest_size, matrix_order::row_major, memory_of(policy));
    detail::progress_meter meter(policy, "extract", layers.size());
    for (const auto& [tensor, out, in] : layers) {
        const std::string name = tensor.substr(0, tensor.size() - options.suffix.size());
        const auto *const before = base.find(tensor), *const after = tuned.find(tensor);
        detail::subtract_tensors<T>(policy, *before, *after, tensor, delta.data(), out * in);
        const matrix_view<const T> change(delta.data(), out, in, matrix_order::row_major);
        const double norm = squared_norm<T>(policy, change);
        if (!std::isfinite(norm)) { detail::blame_nonfinite(change, tensor); }
        if (norm == 0) { result.unchanged.push_back(tensor); }
        else {
            rank_choice choice = options.rank;
            choice.clamp = true;
            const svd_result<T> s = decompose(policy, change, choice, tensor);
            const bool whole = options.rank.energy == 0 && options.rank.rank > std::min(out, in);
            result.layers.push_back({name, out, in, 0, s.rank(), whole, s.squared_norm, s.squared_error});
            result.adapter.emplace(name, to_update<T>(s, options.side));
        }
        if (!meter.advance(1)) { raise<cancelled>(); }
    }
    for (const auto& name : others) {
        const auto *const before = base.find(name), *const after = tuned.find(name);
        const std::size_t bytes = before->bytes(name);
        if (before->dtype == after->dtype && (bytes == 0 || std::memcmp(before->data, after->data, bytes) == 0)) { continue; }
        double norm = 0;
        if (is_storage(before->dtype) && is_storage(after->dtype)) {
            const std::size_t size = before->size(name);
            matrix<T> change(1, size, matrix_order::row_major, memory_of(policy));
            detail::subtract_tensors<T>(policy, *before, *after, name, change.data(), size);
            norm = squared_norm<T>(policy, change.view());
            if (norm == 0) { continue; }
        }
        result.left_out.push_back(name);
        result.left_out_squared_norm += norm;
    }
    return result;
}

} // namespace taskvec::inline TASKVEC_ABI
