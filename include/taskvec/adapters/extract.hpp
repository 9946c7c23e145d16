// Extracting a LoRA from two checkpoints: the low-rank approximation of what fine-tuning changed, one layer at a time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapter.hpp>
#include <taskvec/compiled/adapters.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/operand_source.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How extract_lora() chooses layers and ranks.
struct extract_options {
    rank_choice rank{}; ///< of every layer: a number, or a share of its energy or error
    sigma_side side = sigma_side::both;
    callback<bool(std::string_view)> include{}; ///< which tensors to look at, by name; empty: all
    std::string suffix =
        ".weight"; ///< the matrices and convolutions whose name ends so are layers; the rest of it is the module's
    /// Which of these are layers, by name; empty: all. Others are listed where they changed, as what no adapter holds:
    /// weights that a model reads past its modules, say, which would not see an update of the module.
    callback<bool(std::string_view)> layers{};
    std::string base_label = "the base", tuned_label = "the fine-tuned model"; ///< what messages call the two
};

template <>
struct options_of<extract_options> {
    static constexpr option_table table{options_within(&extract_options::rank),
        option_row("sigma", &extract_options::side, "which factor the singular values go to", {.unit = "SIDE"})};
};

/// What extract_lora() found.
template <arithmetic_element T>
struct extract_result : adapter_result<T> {
    std::vector<std::string> unchanged; ///< layers without any change: no update is made for them
    std::vector<std::string> left_out; ///< other tensors that changed: an adapter cannot hold them
    std::map<std::string, extents> kernels; ///< of the modules that are convolutions: their sides, slowest first
    double left_out_squared_norm = 0; ///< ‖·‖²_F of their changes (floating ones)
};

/// For each tensor "MODULE.weight" (out×in, or out×in×kernel… of a convolution, whose kernel counts among the inputs)
/// that differs between two checkpoints, ΔW = θt − θ0 in T and its approximation by the asked rank or energy,
/// decomposed by `decompose`. A convolution of one input channel may be one of as many groups as it has outputs, whose
/// update has no factors: it is none of the layers. Layers go one at a time: the memory is three to four times the
/// largest layer. A layer whose smaller side is below the rank is kept whole. Other tensors that differ are listed.
/// An integer tensor that the fine-tuned model lacks is the base's.
/// Throws invalid_argument (tensors missing on either side; a rank of 0, or above every layer's, unless clamped;
/// nothing to extract), shape_mismatch, dtype_mismatch, nonfinite_error.
///
///     auto lora = extract_lora<float>(cpu{}, base, tuned, {.rank = {.rank = 16}}, decompose_randomized{});
template <arithmetic_element T, decomposition<T> Decompose>
[[nodiscard]] extract_result<T> extract_lora(const cpu& policy, const const_model_ref& base,
    const const_model_ref& tuned, const extract_options& options, const Decompose& decompose);

namespace detail {

/// Elements [first, first + n) of a tensor, stored or decoded, in T.
template <class T>
void load_elements(const const_tensor_ref& tensor, std::string_view name, std::size_t first, std::size_t n, T* out)
{
    if (tensor.source) {
        const auto take = [&]<class S>(std::type_identity<S>) {
            constexpr std::size_t piece = 512;
            std::array<S, piece> values;
            for (std::size_t at = 0; at < n; at += piece) {
                const std::size_t some = std::min(piece, n - at);
                tensor.source->read(first + at, some, values.data());
                for (std::size_t i = 0; i < some; ++i) { out[at + i] = static_cast<T>(values[i]); }
            }
        };
        if (tensor.source->type() == dtype::f64) { take(std::type_identity<double>{}); }
        else {
            take(std::type_identity<float>{});
        }
        return;
    }
    visit_storage(tensor.dtype, name, [&]<class S>(std::type_identity<S>) {
        const auto* const from = static_cast<const std::byte*>(tensor.data) + first * sizeof(S);
        for (std::size_t i = 0; i < n; ++i) {
            S stored;
            std::memcpy(&stored, from + i * sizeof(S), sizeof(S));
            out[i] = widen<T>(stored);
        }
    });
}

/// tuned − base in T, row-major.
template <class T>
void subtract_tensors(const cpu& policy, const const_tensor_ref& base, const const_tensor_ref& tuned,
    std::string_view name, T* out, std::size_t size)
{
    if (base.source || tuned.source) {
        constexpr std::size_t piece = std::size_t{1} << 16;
        const prepared_source prepared_base(base.source, policy), prepared_tuned(tuned.source, policy);
        for_each_index(policy, (size + piece - 1) / piece, [&](std::size_t index, std::size_t) {
            const std::size_t first = index * piece, n = std::min(piece, size - first);
            std::pmr::vector<T> before(n, memory_of(policy));
            load_elements(base, name, first, n, before.data());
            load_elements(tuned, name, first, n, out + first);
            for (std::size_t i = 0; i < n; ++i) { out[first + i] -= before[i]; }
        });
        return;
    }
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

/// Whether weights of this shape are a layer that low-rank factors can change: a matrix, or a convolution in one to
/// three dimensions of more than one input channel.
[[nodiscard]] inline bool is_layer_shape(const extents& shape) noexcept
{
    return shape.size() == 2 || (shape.size() >= 3 && shape.size() <= 5 && shape[1] > 1);
}

/// Raises nonfinite_error for the first NaN or infinity of a tensor; returns if there is none.
inline void blame_nonfinite_tensor(const const_tensor_ref& tensor, std::string_view name, std::string_view label)
{
    visit_storage(tensor.dtype, name, [&]<class S>(std::type_identity<S>) {
        for (std::size_t i = 0; i < tensor.size(name); ++i) {
            arithmetic_type<S> value;
            load_elements(tensor, name, i, 1, &value);
            if (std::isfinite(value)) { continue; }
            raise<nonfinite_error>(error_code::not_finite,
                message("tensor '", name, "' of ", label, " holds ", std::isnan(value) ? "NaN" : "infinity",
                    " at index ", i, ": repair it, or leave out the tensor"));
        }
    });
}

} // namespace detail

template <arithmetic_element T, decomposition<T> Decompose>
extract_result<T> extract_lora(const cpu& policy, const const_model_ref& base, const const_model_ref& tuned,
    const extract_options& options, const Decompose& decompose)
{
    struct layer {
        std::string tensor;
        std::size_t out = 0, in = 0;
        extents kernel;
    };
    extract_result<T> result;
    std::vector<layer> layers;
    std::vector<std::string> others;
    std::size_t largest_rank = 0, largest_size = 0;
    for (const auto& [name, tensor] : tuned) {
        if (!base.find(name) && (!options.include || options.include(name))) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message("tensor '", name, "' of ", options.tuned_label, " is not in ", options.base_label,
                    ": leave it out, if it was added on purpose (extract_options::include; the tool: --exclude)"));
        }
    }
    for (const auto& [name, tensor] : base) {
        if (options.include && !options.include(name)) { continue; }
        const const_tensor_ref* const other = tuned.find(name);
        if (!other) {
            // Integers (a buffer that is saved no more) have not changed: what lacks them has the base's.
            if (!is_storage(tensor.dtype) && !is_fp8(tensor.dtype)) { continue; }
            raise<invalid_argument>(error_code::tensor_missing,
                message("tensor '", name, "' of ", options.base_label, " is missing in ", options.tuned_label,
                    ": leave it out, if it was removed on purpose (extract_options::include; the tool: --exclude)"));
        }
        if (other->shape != tensor.shape) {
            raise<shape_mismatch>(error_code::tensor_shape,
                message("tensor '", name, "' has shape ", to_string(other->shape), " in ", options.tuned_label, " but ",
                    to_string(tensor.shape), " in ", options.base_label,
                    ": leave it out (extract_options::include; the tool: --exclude), or extract from models of one "
                    "architecture"));
        }
        for (const auto* one : {&tensor, other}) {
            if (one->space != memory_space::host || !one->contiguous()) {
                raise<invalid_argument>(error_code::tensor_layout,
                    message("tensor '", name, "' is not contiguous host memory; copy it first"));
            }
        }
        const bool floating = is_storage(tensor.dtype) && is_storage(other->dtype);
        if (detail::is_layer_shape(tensor.shape) && name.size() > options.suffix.size()
            && name.ends_with(options.suffix) && floating && (!options.layers || options.layers(name))) {
            const auto out = static_cast<std::size_t>(tensor.shape[0]),
                       in = out == 0 ? static_cast<std::size_t>(tensor.shape[1]) : tensor.size(name) / out;
            layers.push_back({name, out, in, extents(tensor.shape.begin() + 2, tensor.shape.end())});
            largest_rank = std::max(largest_rank, std::min(out, in));
            largest_size = std::max(largest_size, out * in);
        }
        else {
            others.push_back(name);
        }
    }
    if (layers.empty()) {
        raise<invalid_argument>(error_code::nothing_selected,
            message("there is no floating matrix or convolution '*", options.suffix, "' to extract an adapter from"));
    }
    detail::check_layer_ranks(options.rank, largest_rank, options.tuned_label);

    const auto blame = [&](const std::string& name) {
        detail::blame_nonfinite_tensor(*base.find(name), name, options.base_label);
        detail::blame_nonfinite_tensor(*tuned.find(name), name, options.tuned_label);
        raise<nonfinite_error>(error_code::result_overflow,
            message("tensor '", name, "': the change from ", options.base_label, " to ", options.tuned_label,
                " overflows"));
    };
    matrix<T> delta(1, largest_size, matrix_order::row_major, memory_of(policy));
    detail::progress_meter meter(policy, "extract", layers.size(), progress_unit::layers);
    for (const auto& [tensor, out, in, kernel] : layers) {
        const std::string name = tensor.substr(0, tensor.size() - options.suffix.size());
        const auto *const before = base.find(tensor), *const after = tuned.find(tensor);
        detail::subtract_tensors<T>(policy, *before, *after, tensor, delta.data(), out * in);
        const matrix_view<const T> change(delta.data(), out, in, matrix_order::row_major);
        const double norm = squared_norm<T>(policy, change);
        if (!std::isfinite(norm)) { blame(tensor); }
        if (norm == 0) { result.unchanged.push_back(tensor); }
        else {
            rank_choice choice = options.rank;
            choice.clamp = true;
            const svd_result<T> s = decompose(policy, change, choice, tensor);
            const bool whole = options.rank.energy == 0 && options.rank.rank > std::min(out, in);
            result.layers.push_back({name, out, in, 0, s.rank(), whole, s.squared_norm, s.squared_error});
            result.adapter.emplace(name, to_update<T>(s, options.side));
            if (!kernel.empty()) { result.kernels.emplace(name, kernel); }
        }
        if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
    }
    for (const auto& name : others) {
        const auto *const before = base.find(name), *const after = tuned.find(name);
        const std::size_t bytes = before->bytes(name);
        const bool in_memory = !before->source && !after->source;
        if (in_memory && before->dtype == after->dtype
            && (bytes == 0 || std::memcmp(before->data, after->data, bytes) == 0)) {
            continue;
        }
        double norm = 0;
        if (is_storage(before->dtype) && is_storage(after->dtype)) {
            const std::size_t size = before->size(name);
            matrix<T> change(1, size, matrix_order::row_major, memory_of(policy));
            detail::subtract_tensors<T>(policy, *before, *after, name, change.data(), size);
            norm = squared_norm<T>(policy, change.view());
            if (!std::isfinite(norm)) { blame(name); }
            if (norm == 0) { continue; }
        }
        result.left_out.push_back(name);
        result.left_out_squared_norm += norm;
    }
    return result;
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_EXTRACT(extern, float)
TASKVEC_COMPILED_EXTRACT(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
