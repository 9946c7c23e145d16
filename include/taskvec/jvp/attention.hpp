// Scaled dot-product attention with tangents, over batches and heads, causal or not; and its vjp.
// Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin, "Attention is all you need" (2017).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/jvp/normalization.hpp>

#include <algorithm>
#include <cmath>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// How rows and columns hold sequences and heads.
struct attention_options {
    Eigen::Index batch = 1; ///< sequences stacked in the rows
    Eigen::Index heads = 1; ///< heads side by side in the columns
    bool causal = false; ///< position i sees positions 0 … i only (PyTorch's is_causal)
};

/// y = softmax(q·kᵀ / √d)·v for each sequence and head, d = width / heads.
/// q is (batch·queries) × width, k is (batch·keys) × width, v is (batch·keys) × value width; head h has columns
/// h·d … h·d + d − 1. The result is (batch·queries) × value width. Any of them may have a tangent.
/// Memory beyond the result: one queries × keys matrix (two where a tangent is there), not one a head.
/// Throws shape_mismatch, invalid_argument (a batch or heads that do not divide).
///
///     auto y = attention(q, k, v, {.batch = 64, .heads = 4});
template <operand Q, operand K, operand V>
    requires matching_operands<Q, K, V>
[[nodiscard]] operation_result<Q, K, V> attention(const Q& q, const K& k, const V& v, attention_options options = {});

/// The gradients of attention.
template <class T>
struct attention_gradient {
    row_matrix<T> q, k, v; ///< the shapes of q, k and v
};
/// vjp of attention; dy has the shape of the result. Computes the attention weights again rather than keeping them.
template <class Q, class K, class V, class G>
    requires matching_operands<Q, K, V, G>
[[nodiscard]] attention_gradient<operand_scalar<Q>> attention_vjp(
    const Q& q, const K& k, const V& v, const G& dy, attention_options options = {});

namespace detail {

struct attention_shape {
    Eigen::Index queries, keys, width, value_width;
};

template <differentiable_scalar T>
attention_shape check_attention(std::string_view name, const primal_tangent<T>& q, const primal_tangent<T>& k,
    const primal_tangent<T>& v, const attention_options& options)
{
    check_equal(name, "the number of columns of k", k.cols(), q.cols());
    check_equal(name, "the number of rows of v", v.rows(), k.rows());
    if (options.batch < 1 || options.heads < 1) {
        raise<invalid_argument>(error_code::operation_size,
            message("operation '", name, "': batch and heads must be at least 1, got ", options.batch, " and ",
                options.heads));
    }
    if (q.rows() % options.batch != 0 || k.rows() % options.batch != 0) {
        raise<invalid_argument>(error_code::operation_size,
            message("operation '", name, "': a batch of ", options.batch, " does not divide ", q.rows(),
                " query rows and ", k.rows(), " key rows"));
    }
    if (q.cols() % options.heads != 0 || v.cols() % options.heads != 0) {
        raise<invalid_argument>(error_code::operation_size,
            message("operation '", name, "': ", options.heads, " heads do not divide ", q.cols(), " and ", v.cols(),
                " columns"));
    }
    if (k.rows() == 0) {
        raise<invalid_argument>(
            error_code::operation_size, message("operation '", name, "': there are no keys to attend to"));
    }
    return {q.rows() / options.batch, k.rows() / options.batch, q.cols() / options.heads, v.cols() / options.heads};
}

template <differentiable_scalar T>
T attention_scale(Eigen::Index width)
{
    return T(1 / std::sqrt(static_cast<double>(width)));
}

/// The attention weights of one head from its scores, in place: softmax over the visible keys, zero elsewhere.
template <differentiable_scalar T>
void attention_weights(row_matrix<T>& scores, row_matrix<T>* tangents, bool causal)
{
    const auto keys = scores.cols();
    for (Eigen::Index i = 0; i < scores.rows(); ++i) {
        const Eigen::Index visible = causal ? std::min(i + 1, keys) : keys;
        T* row = scores.data() + i * keys;
        T* tangent = tangents ? tangents->data() + i * keys : nullptr;
        softmax_row(row, tangent, row, tangent, visible);
        std::fill(row + visible, row + keys, T(0));
        if (tangent) { std::fill(tangent + visible, tangent + keys, T(0)); }
    }
}

template <differentiable_scalar T>
primal_tangent<T> attention(const primal_tangent<T>& q, const primal_tangent<T>& k, const primal_tangent<T>& v,
    const attention_options& options)
{
    const auto [queries, keys, width, value_width] = check_attention("attention", q, k, v, options);
    const bool weights_active = q.active() || k.active();
    auto y = primal_tangent<T>::uninitialized(q.rows(), v.cols(), weights_active || v.active());
    const T scale = attention_scale<T>(width);
    row_matrix<T> weights(queries, keys), tangents, scaled(queries, width), scaled_tangent;
    if (weights_active) { tangents.resize(queries, keys); }
    for (Eigen::Index sequence = 0; sequence < options.batch; ++sequence) {
        for (Eigen::Index head = 0; head < options.heads; ++head) {
            const auto of = [&](auto whole, Eigen::Index rows, Eigen::Index cols) {
                return whole.block(sequence * rows, head * cols, rows, cols);
            };
            scaled = of(q.primal(), queries, width) * scale;
            weights.noalias() = scaled * of(k.primal(), keys, width).transpose();
            if (q.active()) {
                scaled_tangent = of(q.tangent(), queries, width) * scale;
                tangents.noalias() = scaled_tangent * of(k.primal(), keys, width).transpose();
                if (k.active()) { tangents.noalias() += scaled * of(k.tangent(), keys, width).transpose(); }
            }
            else if (k.active()) {
                tangents.noalias() = scaled * of(k.tangent(), keys, width).transpose();
            }
            attention_weights(weights, weights_active ? &tangents : nullptr, options.causal);
            of(y.mutable_primal(), queries, value_width).noalias() = weights * of(v.primal(), keys, value_width);
            if (weights_active) {
                of(y.mutable_tangent(), queries, value_width).noalias() = tangents * of(v.primal(), keys, value_width);
                if (v.active()) {
                    of(y.mutable_tangent(), queries, value_width).noalias() +=
                        weights * of(v.tangent(), keys, value_width);
                }
            }
            else if (v.active()) {
                of(y.mutable_tangent(), queries, value_width).noalias() = weights * of(v.tangent(), keys, value_width);
            }
        }
    }
    check_tangent(y, "attention");
    return y;
}

template <differentiable_scalar T>
attention_gradient<T> attention_vjp(const primal_tangent<T>& q, const primal_tangent<T>& k, const primal_tangent<T>& v,
    const primal_tangent<T>& dy, const attention_options& options)
{
    const auto [queries, keys, width, value_width] = check_attention("attention_vjp", q, k, v, options);
    check_equal("attention_vjp", "the number of rows of dy", dy.rows(), q.rows());
    check_equal("attention_vjp", "the number of columns of dy", dy.cols(), v.cols());
    attention_gradient<T> gradient{
        row_matrix<T>(q.rows(), q.cols()), row_matrix<T>(k.rows(), k.cols()), row_matrix<T>(v.rows(), v.cols())};
    const T scale = attention_scale<T>(width);
    row_matrix<T> weights(queries, keys), d_weights(queries, keys), scaled(queries, width);
    const auto view_of_matrix = [](row_matrix<T>& x) {
        return Eigen::Map<row_matrix<T>>(x.data(), x.rows(), x.cols());
    };
    for (Eigen::Index sequence = 0; sequence < options.batch; ++sequence) {
        for (Eigen::Index head = 0; head < options.heads; ++head) {
            const auto of = [&](auto whole, Eigen::Index rows, Eigen::Index cols) {
                return whole.block(sequence * rows, head * cols, rows, cols);
            };
            const auto cotangent = of(dy.primal(), queries, value_width);
            scaled = of(q.primal(), queries, width) * scale;
            weights.noalias() = scaled * of(k.primal(), keys, width).transpose();
            attention_weights(weights, static_cast<row_matrix<T>*>(nullptr), options.causal);
            of(view_of_matrix(gradient.v), keys, value_width).noalias() = weights.transpose() * cotangent;
            d_weights.noalias() = cotangent * of(v.primal(), keys, value_width).transpose();
            for (Eigen::Index i = 0; i < queries; ++i) {
                const auto weight = weights.row(i).array();
                const T average = (weight * d_weights.row(i).array()).sum();
                d_weights.row(i).array() = weight * (d_weights.row(i).array() - average);
            }
            of(view_of_matrix(gradient.q), queries, width).noalias() =
                scale * (d_weights * of(k.primal(), keys, width));
            of(view_of_matrix(gradient.k), keys, width).noalias() = d_weights.transpose() * scaled;
        }
    }
    return gradient;
}

} // namespace detail

template <operand Q, operand K, operand V>
    requires matching_operands<Q, K, V>
operation_result<Q, K, V> attention(const Q& q, const K& k, const V& v, attention_options options)
{
    return detail::finish<operation_result<Q, K, V>>(detail::attention(
        detail::as_primal_tangent(q), detail::as_primal_tangent(k), detail::as_primal_tangent(v), options));
}

template <class Q, class K, class V, class G>
    requires matching_operands<Q, K, V, G>
attention_gradient<operand_scalar<Q>> attention_vjp(
    const Q& q, const K& k, const V& v, const G& dy, attention_options options)
{
    return detail::attention_vjp(detail::as_primal_tangent(q), detail::as_primal_tangent(k),
        detail::as_primal_tangent(v), detail::as_primal_tangent(dy), options);
}

} // namespace taskvec::inline TASKVEC_ABI
