// Operations along rows with tangents: softmax, layer_norm, rms_norm; each with its vjp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/jvp/primal_tangent.hpp>

#include <algorithm>
#include <cmath>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// Each row's exp(x − max) / Σ exp(x − max); any shape with at least one column. ẏ = y ⊙ (ẋ − Σ y ⊙ ẋ), rows apart.
template <operand X>
[[nodiscard]] operation_result<X> softmax(const X& x);

/// vjp of softmax from its result: y and dy have one shape; returns y ⊙ (dy − Σ y ⊙ dy).
template <class Y, class G>
    requires matching_operands<Y, G>
[[nodiscard]] row_matrix<operand_scalar<Y>> softmax_vjp(const Y& y, const G& dy);

/// What layer_norm() and rms_norm() divide by.
struct normalization_options {
    double epsilon = 1e-5; ///< added to the variance (layer_norm) or the mean square (rms_norm)
};

/// Layer normalisation (Ba, Kiros, Hinton 2016): y = (x − mean) / √(variance + epsilon) ⊙ gamma + beta, rows apart,
/// with the biased variance, as PyTorch has it. x is batch × features; gamma and beta are 1 × features, or empty for
/// ones and zeros. Mean and variance are computed in two passes over the row in T. Throws shape_mismatch.
///
///     auto h = layer_norm(x, p["norm1.weight"], p["norm1.bias"]);
template <operand X, operand Gamma, operand Beta>
    requires matching_operands<X, Gamma, Beta>
[[nodiscard]] operation_result<X, Gamma, Beta> layer_norm(
    const X& x, const Gamma& gamma, const Beta& beta, normalization_options options = {});

/// The gradients of a normalisation.
template <class T>
struct normalization_gradient {
    row_matrix<T> x; ///< batch × features
    row_matrix<T> gamma; ///< 1 × features
    row_matrix<T> beta; ///< 1 × features; empty for rms_norm
};
/// vjp of layer_norm: x and dy are batch × features, gamma is 1 × features or empty.
template <class X, class Gamma, class G>
    requires matching_operands<X, Gamma, G>
[[nodiscard]] normalization_gradient<operand_scalar<X>> layer_norm_vjp(
    const X& x, const Gamma& gamma, const G& dy, normalization_options options = {});

/// Root-mean-square normalisation (Zhang, Sennrich 2019): y = x / √(mean(x²) + epsilon) ⊙ gamma, rows apart; x is
/// batch × features; gamma is 1 × features, or empty for ones. Throws shape_mismatch.
template <operand X, operand Gamma>
    requires matching_operands<X, Gamma>
[[nodiscard]] operation_result<X, Gamma> rms_norm(const X& x, const Gamma& gamma, normalization_options options = {});

/// vjp of rms_norm: x and dy are batch × features, gamma is 1 × features or empty.
template <class X, class Gamma, class G>
    requires matching_operands<X, Gamma, G>
[[nodiscard]] normalization_gradient<operand_scalar<X>> rms_norm_vjp(
    const X& x, const Gamma& gamma, const G& dy, normalization_options options = {});

namespace detail {

template <differentiable_scalar T>
using row_array = Eigen::Array<T, 1, Eigen::Dynamic>;
template <differentiable_scalar T>
using row_array_map = Eigen::Map<row_array<T>>;
template <differentiable_scalar T>
using const_row_array_map = Eigen::Map<const row_array<T>>;

/// y = softmax(x) of one row, and its tangent from ẋ when there is one. In place is allowed.
template <differentiable_scalar T>
void softmax_row(const T* x, const T* x_tangent, T* y, T* y_tangent, Eigen::Index count)
{
    const const_row_array_map<T> in(x, count);
    row_array_map<T> out(y, count);
    const T top = in.maxCoeff();
    out = (in - top).exp();
    const T sum = out.sum();
    out *= T(1) / sum;
    if (x_tangent) {
        const const_row_array_map<T> direction(x_tangent, count);
        const T average = (out * direction).sum();
        row_array_map<T>(y_tangent, count) = out * (direction - average);
    }
}

template <differentiable_scalar T>
primal_tangent<T> softmax(const primal_tangent<T>& x)
{
    if (x.cols() == 0) {
        raise<invalid_argument>(error_code::operation_size, "operation 'softmax': the matrix has no columns");
    }
    auto y = primal_tangent<T>::uninitialized(x.rows(), x.cols(), x.active());
    const auto cols = x.cols();
    for (Eigen::Index row = 0; row < x.rows(); ++row) {
        softmax_row(x.primal().data() + row * cols, x.active() ? x.tangent().data() + row * cols : nullptr,
            y.mutable_primal().data() + row * cols, x.active() ? y.mutable_tangent().data() + row * cols : nullptr,
            cols);
    }
    check_tangent(y, "softmax");
    return y;
}

/// x minus its mean (Centered, layer_norm) or x (rms_norm), over its root mean square; returns 1 / √(mean square +
/// epsilon).
template <bool Centered, differentiable_scalar T>
T normalize_row(const T* x, T* normalized, Eigen::Index count, const T& epsilon)
{
    using std::sqrt;
    const const_row_array_map<T> in(x, count);
    row_array_map<T> out(normalized, count);
    const T share = T(1) / T(static_cast<double>(count));
    if constexpr (Centered) { out = in - in.sum() * share; }
    else {
        out = in;
    }
    const T inverse = T(1) / sqrt(out.square().sum() * share + epsilon);
    out *= inverse;
    return inverse;
}

/// The derivative of normalize_row along `direction`; its own transpose, so that it serves the vjp too.
template <bool Centered, class Out, class Normalized, class Direction, class T>
void normalize_row_derivative(Out&& out, const Normalized& normalized, const Direction& direction, const T& inverse)
{
    const T share = T(1) / T(static_cast<double>(normalized.size()));
    const T along = (direction * normalized).sum() * share;
    if constexpr (Centered) {
        const T average = direction.sum() * share;
        out = (direction - average - normalized * along) * inverse;
    }
    else {
        out = (direction - normalized * along) * inverse;
    }
}

template <differentiable_scalar T>
void check_row(std::string_view name, std::string_view what, const primal_tangent<T>& row, Eigen::Index features)
{
    if (row.size() == 0) { return; }
    if (row.rows() != 1 || row.cols() != features) {
        raise<shape_mismatch>(error_code::operation_shape,
            message("operation '", name, "': ", what, " is [", row.rows(), ", ", row.cols(), "], expected [1, ",
                features, "]"));
    }
}

template <bool Centered, differentiable_scalar T>
primal_tangent<T> normalize(const primal_tangent<T>& x, const primal_tangent<T>& gamma, const primal_tangent<T>& beta,
    double epsilon, std::string_view name)
{
    check_row(name, "gamma", gamma, x.cols());
    check_row(name, "beta", beta, x.cols());
    if (x.cols() == 0) {
        raise<invalid_argument>(
            error_code::operation_size, message("operation '", name, "': the matrix has no columns"));
    }
    const bool scaled = gamma.size() != 0, shifted = beta.size() != 0;
    const bool gamma_active = scaled && gamma.active(), beta_active = shifted && beta.active();
    auto y = primal_tangent<T>::uninitialized(x.rows(), x.cols(), x.active() || gamma_active || beta_active);
    const auto cols = x.cols();
    row_array<T> normalized(cols);
    const const_row_array_map<T> scale_row(gamma.primal().data(), scaled ? cols : 0),
        shift_row(beta.primal().data(), shifted ? cols : 0);
    for (Eigen::Index row = 0; row < x.rows(); ++row) {
        const T inverse = normalize_row<Centered>(x.primal().data() + row * cols, normalized.data(), cols, T(epsilon));
        row_array_map<T> out(y.mutable_primal().data() + row * cols, cols);
        if (scaled && shifted) { out = normalized * scale_row + shift_row; }
        else if (scaled) {
            out = normalized * scale_row;
        }
        else if (shifted) {
            out = normalized + shift_row;
        }
        else {
            out = normalized;
        }
        if (!y.active()) { continue; }
        row_array_map<T> tangent(y.mutable_tangent().data() + row * cols, cols);
        if (x.active()) {
            normalize_row_derivative<Centered>(
                tangent, normalized, const_row_array_map<T>(x.tangent().data() + row * cols, cols), inverse);
            if (scaled) { tangent *= scale_row; }
            if (gamma_active) { tangent += normalized * gamma.tangent().array().row(0); }
        }
        else if (gamma_active) {
            tangent = normalized * gamma.tangent().array().row(0);
        }
        else {
            tangent.setZero();
        }
        if (beta_active) { tangent += beta.tangent().array().row(0); }
    }
    check_tangent(y, name);
    return y;
}

template <bool Centered, differentiable_scalar T>
normalization_gradient<T> normalize_vjp(const primal_tangent<T>& x, const primal_tangent<T>& gamma,
    const primal_tangent<T>& dy, double epsilon, std::string_view name)
{
    check_row(name, "gamma", gamma, x.cols());
    check_same_shape(name, x, dy);
    const bool scaled = gamma.size() != 0;
    const auto cols = x.cols();
    normalization_gradient<T> gradient;
    gradient.x.resize(x.rows(), cols);
    gradient.gamma = row_matrix<T>::Zero(1, cols);
    if (Centered) { gradient.beta = row_matrix<T>::Zero(1, cols); }
    row_array<T> normalized(cols), direction(cols);
    for (Eigen::Index row = 0; row < x.rows(); ++row) {
        const T inverse = normalize_row<Centered>(x.primal().data() + row * cols, normalized.data(), cols, T(epsilon));
        std::copy_n(dy.primal().data() + row * cols, cols, direction.data());
        gradient.gamma.array().row(0) += direction * normalized;
        if (Centered) { gradient.beta.array().row(0) += direction; }
        if (scaled) { direction *= gamma.primal().array().row(0); }
        normalize_row_derivative<Centered>(
            row_array_map<T>(gradient.x.data() + row * cols, cols), normalized, direction, inverse);
    }
    return gradient;
}

} // namespace detail

template <operand X>
operation_result<X> softmax(const X& x)
{
    return detail::finish<operation_result<X>>(detail::softmax(detail::as_primal_tangent(x)));
}

template <class Y, class G>
    requires matching_operands<Y, G>
row_matrix<operand_scalar<Y>> softmax_vjp(const Y& y, const G& dy)
{
    decltype(auto) result = detail::as_primal_tangent(y);
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    detail::check_same_shape("softmax_vjp", result, cotangent);
    row_matrix<operand_scalar<Y>> dx(result.rows(), result.cols());
    for (Eigen::Index row = 0; row < dx.rows(); ++row) {
        const auto weights = result.primal().row(row).array(), direction = cotangent.primal().row(row).array();
        const operand_scalar<Y> average = (weights * direction).sum();
        dx.row(row) = (weights * (direction - average)).matrix();
    }
    return dx;
}

template <operand X, operand Gamma, operand Beta>
    requires matching_operands<X, Gamma, Beta>
operation_result<X, Gamma, Beta> layer_norm(
    const X& x, const Gamma& gamma, const Beta& beta, normalization_options options)
{
    return detail::finish<operation_result<X, Gamma, Beta>>(detail::normalize<true>(detail::as_primal_tangent(x),
        detail::as_primal_tangent(gamma), detail::as_primal_tangent(beta), options.epsilon, "layer_norm"));
}

template <class X, class Gamma, class G>
    requires matching_operands<X, Gamma, G>
normalization_gradient<operand_scalar<X>> layer_norm_vjp(
    const X& x, const Gamma& gamma, const G& dy, normalization_options options)
{
    return detail::normalize_vjp<true>(detail::as_primal_tangent(x), detail::as_primal_tangent(gamma),
        detail::as_primal_tangent(dy), options.epsilon, "layer_norm_vjp");
}

template <operand X, operand Gamma>
    requires matching_operands<X, Gamma>
operation_result<X, Gamma> rms_norm(const X& x, const Gamma& gamma, normalization_options options)
{
    return detail::finish<operation_result<X, Gamma>>(detail::normalize<false>(detail::as_primal_tangent(x),
        detail::as_primal_tangent(gamma), primal_tangent<operand_scalar<X>>(), options.epsilon, "rms_norm"));
}

template <class X, class Gamma, class G>
    requires matching_operands<X, Gamma, G>
normalization_gradient<operand_scalar<X>> rms_norm_vjp(
    const X& x, const Gamma& gamma, const G& dy, normalization_options options)
{
    return detail::normalize_vjp<false>(detail::as_primal_tangent(x), detail::as_primal_tangent(gamma),
        detail::as_primal_tangent(dy), options.epsilon, "rms_norm_vjp");
}

} // namespace taskvec::inline TASKVEC_ABI
