// Products and biases with tangents: matmul, linear (x·Wᵀ + b), add_bias; each with its vjp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/jvp.hpp>
#include <taskvec/jvp/primal_tangent.hpp>

#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// y = a·b; a is n × k, b is k × m, either or both with a tangent: ẏ = ȧ·b + a·ḃ.
/// One product of 2n rows serves a and ȧ; inactive operands cost nothing. Rounding as Eigen's product.
/// Throws shape_mismatch. Cost: 2nkm flops, and as much again for each active operand.
///
///     auto y = matmul(x, w);
template <operand A, operand B>
    requires matching_operands<A, B>
[[nodiscard]] operation_result<A, B> matmul(const A& a, const B& b);

/// The gradients of matmul: a is dy·bᵀ, b is aᵀ·dy.
template <class T>
struct matmul_gradient {
    row_matrix<T> a; ///< n × k, empty if not asked for
    row_matrix<T> b; ///< k × m, empty if not asked for
};
/// Which gradients matmul_vjp() computes; the other stays empty and costs nothing.
struct matmul_wanted {
    bool a = true; ///< dy·bᵀ
    bool b = true; ///< aᵀ·dy
};
/// vjp of matmul: a is n × k, b is k × m, dy is n × m.
template <class A, class B, class G>
    requires matching_operands<A, B, G>
[[nodiscard]] matmul_gradient<operand_scalar<A>> matmul_vjp(
    const A& a, const B& b, const G& dy, matmul_wanted wanted = {});

/// y = x·wᵀ, PyTorch's linear layer without bias; x is batch × in, w is out × in, either or both with a tangent.
/// Cost and errors as matmul.
template <operand X, operand W>
    requires matching_operands<X, W>
[[nodiscard]] operation_result<X, W> linear(const X& x, const W& w);

/// y = x·wᵀ + bias; bias is 1 × out, or empty for none.
///
///     auto hidden = relu(linear(x, fc1_weight, fc1_bias));
template <operand X, operand W, operand B>
    requires matching_operands<X, W, B>
[[nodiscard]] operation_result<X, W, B> linear(const X& x, const W& w, const B& bias);

/// The gradients of a linear layer.
template <class T>
struct linear_gradient {
    row_matrix<T> x; ///< batch × in: dy·w
    row_matrix<T> w; ///< out × in: dyᵀ·x
    row_matrix<T> bias; ///< 1 × out: the column sums of dy
};
/// Which gradients a linear layer's vjp computes; the others stay empty and cost nothing.
struct linear_wanted {
    bool x = true; ///< of the input
    bool w = true; ///< of the weight
    bool bias = true; ///< of the bias
};
/// vjp of linear: x is batch × in, w is out × in, dy is batch × out.
///
///     auto gradient = linear_vjp(x, w, dy, {.x = false});
template <class X, class W, class G>
    requires matching_operands<X, W, G>
[[nodiscard]] linear_gradient<operand_scalar<X>> linear_vjp(
    const X& x, const W& w, const G& dy, linear_wanted wanted = {});

/// y = x + bias, bias repeated down the rows; x is batch × features, bias is period × features where period divides
/// batch: 1 for a bias, the number of tokens for a positional embedding (row i gets bias row i mod period).
template <operand X, operand B>
    requires matching_operands<X, B>
[[nodiscard]] operation_result<X, B> add_bias(const X& x, const B& bias);

/// vjp of add_bias for the bias (for x it is dy itself): the sum of every period-th row of dy; period × features.
template <class G>
    requires matching_operands<G>
[[nodiscard]] row_matrix<operand_scalar<G>> add_bias_vjp(const G& dy, Eigen::Index period = 1);

namespace detail {

/// y (+)= a·b with tangents, b transposed or not. y is active wherever a or b is.
template <bool Transposed, bool Accumulate, differentiable_scalar T>
void product_into(primal_tangent<T>& y, const primal_tangent<T>& a, const primal_tangent<T>& b)
{
    const auto multiply = [](auto&& out, const auto& left, const auto& right, auto accumulate) {
        if constexpr (Transposed) {
            if constexpr (accumulate) { out.noalias() += left * right.transpose(); }
            else {
                out.noalias() = left * right.transpose();
            }
        }
        else {
            if constexpr (accumulate) { out.noalias() += left * right; }
            else {
                out.noalias() = left * right;
            }
        }
    };
    constexpr std::bool_constant<Accumulate> first{};
    if (a.active()) {
        if (a.stacked()) { multiply(y.mutable_stack(), a.stack(), b.primal(), first); }
        else {
            multiply(y.mutable_primal(), a.primal(), b.primal(), first);
            multiply(y.mutable_tangent(), a.tangent(), b.primal(), first);
        }
        if (b.active()) { multiply(y.mutable_tangent(), a.primal(), b.tangent(), std::true_type{}); }
    }
    else {
        multiply(y.mutable_primal(), a.primal(), b.primal(), first);
        if (b.active()) { multiply(y.mutable_tangent(), a.primal(), b.tangent(), first); }
    }
}

template <differentiable_scalar T>
void add_bias_into(primal_tangent<T>& y, const primal_tangent<T>& bias)
{
    const auto period = bias.rows();
    for (Eigen::Index row = 0; row < y.rows(); row += period) {
        y.mutable_primal().middleRows(row, period) += bias.primal();
        if (bias.active()) { y.mutable_tangent().middleRows(row, period) += bias.tangent(); }
    }
}

template <differentiable_scalar T>
primal_tangent<T> matmul(const primal_tangent<T>& a, const primal_tangent<T>& b)
{
    check_equal("matmul", "the number of rows of b", b.rows(), a.cols());
    auto y = primal_tangent<T>::uninitialized(a.rows(), b.cols(), a.active() || b.active());
    product_into<false, false>(y, a, b);
    check_tangent(y, "matmul");
    return y;
}

template <differentiable_scalar T>
primal_tangent<T> linear(const primal_tangent<T>& x, const primal_tangent<T>& w, const primal_tangent<T>& bias)
{
    check_equal("linear", "the number of columns of x", x.cols(), w.cols());
    const bool biased = bias.size() != 0;
    if (biased) {
        check_equal("linear", "the number of rows of the bias", bias.rows(), 1);
        check_equal("linear", "the number of columns of the bias", bias.cols(), w.rows());
    }
    const bool products = x.active() || w.active();
    auto y = primal_tangent<T>::uninitialized(x.rows(), w.rows(), products || (biased && bias.active()));
    product_into<true, false>(y, x, w);
    if (y.active() && !products) { y.mutable_tangent().setZero(); }
    if (biased) { add_bias_into(y, bias); }
    check_tangent(y, "linear");
    return y;
}

template <differentiable_scalar T>
primal_tangent<T> add_bias(const primal_tangent<T>& x, const primal_tangent<T>& bias)
{
    check_equal("add_bias", "the number of columns of the bias", bias.cols(), x.cols());
    if (bias.rows() == 0 || x.rows() % bias.rows() != 0) {
        raise<shape_mismatch>(error_code::operation_shape,
            message("operation 'add_bias': a bias of ", bias.rows(),
                " rows does not repeat a whole number of times in ", x.rows(), " rows"));
    }
    auto y = primal_tangent<T>::uninitialized(x.rows(), x.cols(), x.active() || bias.active());
    y.mutable_primal() = x.primal();
    if (x.active()) { y.mutable_tangent() = x.tangent(); }
    else if (y.active()) {
        y.mutable_tangent().setZero();
    }
    add_bias_into(y, bias);
    check_tangent(y, "add_bias");
    return y;
}

} // namespace detail

template <operand A, operand B>
    requires matching_operands<A, B>
operation_result<A, B> matmul(const A& a, const B& b)
{
    return detail::finish<operation_result<A, B>>(
        detail::matmul(detail::as_primal_tangent(a), detail::as_primal_tangent(b)));
}

template <class A, class B, class G>
    requires matching_operands<A, B, G>
matmul_gradient<operand_scalar<A>> matmul_vjp(const A& a, const B& b, const G& dy, matmul_wanted wanted)
{
    decltype(auto) left = detail::as_primal_tangent(a);
    decltype(auto) right = detail::as_primal_tangent(b);
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    detail::check_equal("matmul_vjp", "the number of rows of b", right.rows(), left.cols());
    detail::check_equal("matmul_vjp", "the number of rows of dy", cotangent.rows(), left.rows());
    detail::check_equal("matmul_vjp", "the number of columns of dy", cotangent.cols(), right.cols());
    matmul_gradient<operand_scalar<A>> gradient;
    if (wanted.a) { gradient.a.noalias() = cotangent.primal() * right.primal().transpose(); }
    if (wanted.b) { gradient.b.noalias() = left.primal().transpose() * cotangent.primal(); }
    return gradient;
}

template <operand X, operand W>
    requires matching_operands<X, W>
operation_result<X, W> linear(const X& x, const W& w)
{
    return detail::finish<operation_result<X, W>>(detail::linear(
        detail::as_primal_tangent(x), detail::as_primal_tangent(w), primal_tangent<operand_scalar<X>>()));
}

template <operand X, operand W, operand B>
    requires matching_operands<X, W, B>
operation_result<X, W, B> linear(const X& x, const W& w, const B& bias)
{
    return detail::finish<operation_result<X, W, B>>(
        detail::linear(detail::as_primal_tangent(x), detail::as_primal_tangent(w), detail::as_primal_tangent(bias)));
}

template <class X, class W, class G>
    requires matching_operands<X, W, G>
linear_gradient<operand_scalar<X>> linear_vjp(const X& x, const W& w, const G& dy, linear_wanted wanted)
{
    decltype(auto) input = detail::as_primal_tangent(x);
    decltype(auto) weight = detail::as_primal_tangent(w);
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    detail::check_equal("linear_vjp", "the number of columns of x", input.cols(), weight.cols());
    detail::check_equal("linear_vjp", "the number of rows of dy", cotangent.rows(), input.rows());
    detail::check_equal("linear_vjp", "the number of columns of dy", cotangent.cols(), weight.rows());
    linear_gradient<operand_scalar<X>> gradient;
    if (wanted.x) { gradient.x.noalias() = cotangent.primal() * weight.primal(); }
    if (wanted.w) { gradient.w.noalias() = cotangent.primal().transpose() * input.primal(); }
    if (wanted.bias) { gradient.bias = cotangent.primal().colwise().sum(); }
    return gradient;
}

template <operand X, operand B>
    requires matching_operands<X, B>
operation_result<X, B> add_bias(const X& x, const B& bias)
{
    return detail::finish<operation_result<X, B>>(
        detail::add_bias(detail::as_primal_tangent(x), detail::as_primal_tangent(bias)));
}

template <class G>
    requires matching_operands<G>
row_matrix<operand_scalar<G>> add_bias_vjp(const G& dy, Eigen::Index period)
{
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    if (period < 1 || cotangent.rows() % period != 0) {
        raise<invalid_argument>(error_code::operation_size,
            message("operation 'add_bias_vjp': a period of ", period, " does not divide ", cotangent.rows(), " rows"));
    }
    row_matrix<operand_scalar<G>> gradient = row_matrix<operand_scalar<G>>::Zero(period, cotangent.cols());
    for (Eigen::Index row = 0; row < cotangent.rows(); row += period) {
        gradient += cotangent.primal().middleRows(row, period);
    }
    return gradient;
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_JVP_PRODUCTS(extern, float)
TASKVEC_COMPILED_JVP_PRODUCTS(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
