// A linear layer with a low-rank adapter (LoRA): forward with tangents, gradients, and the dense weight it equals.
// Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: low-rank adaptation of large language models" (2021).
// SPDX-License-Identifier: Apache-2.0
//
// The adapter is the library's one LoRA type, lora_update (adapters/lora.hpp); as_row_matrix() sees its factors as
// Eigen matrices, and make_lora() makes one of Eigen matrices.
#pragma once

#include <taskvec/adapters/lora.hpp>
#include <taskvec/jvp/linear.hpp>

#include <concepts>
#include <cstddef>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// A row-major matrix of the library as an Eigen matrix in the same memory; it must outlive the map. Throws
/// invalid_argument for a column-major one.
///
///     const auto a = as_row_matrix(adapter.at("layers.0.q_proj").a);   // rank × in
template <arithmetic_element T>
[[nodiscard]] row_matrix_map<T> as_row_matrix(const matrix<T>& x);
template <arithmetic_element T>
[[nodiscard]] Eigen::Map<row_matrix<T>> as_row_matrix(matrix<T>& x);

/// The update scaling·b·a of Eigen matrices or expressions, evaluated into memory of its own: b is out × rank, a is
/// rank × in. Throws shape_mismatch where they make no product.
///
///     const auto adapter = make_lora(b, a, 2);
template <class B, class A>
    requires detail::plain_matrix<B> && detail::plain_matrix<A> && arithmetic_element<typename B::Scalar>
    && std::same_as<typename A::Scalar, typename B::Scalar>
[[nodiscard]] lora_update<typename B::Scalar> make_lora(const B& b, const A& a, double scaling = 1);

/// y = x·wᵀ + bias + scaling·(x·aᵀ)·bᵀ, any of the operands with a tangent.
/// x is batch × in, w is out × in, bias is 1 × out or empty, a is rank × in, b is out × rank.
/// The product b·a is never formed. Throws shape_mismatch. Cost: 2·batch·(in·out + rank·(in + out)) flops, doubled
/// where x has a tangent; tangents of a and b alone cost 2·batch·rank·(in + out).
///
///     auto q = lora_linear(x, wq, bq, p["q.lora_A"], p["q.lora_B"], scaling);
template <operand X, operand W, operand Bias, operand A, operand B>
    requires matching_operands<X, W, Bias, A, B>
[[nodiscard]] operation_result<X, W, Bias, A, B> lora_linear(
    const X& x, const W& w, const Bias& bias, const A& a, const B& b, const operand_scalar<X>& scaling);

/// The gradients of a LoRA layer.
template <class T>
struct lora_gradient {
    row_matrix<T> x; ///< batch × in, empty if not asked for
    row_matrix<T> a; ///< rank × in, empty if not asked for
    row_matrix<T> b; ///< out × rank, empty if not asked for
};
/// Which gradients a LoRA layer's vjp computes; the frozen weight has none.
struct lora_wanted {
    bool x = true; ///< of the input
    bool a = true; ///< of lora_A
    bool b = true; ///< of lora_B
};

/// A frozen linear layer with a trainable LoRA adapter.
/// The weight (out × in) and the bias (1 × out, or empty) are borrowed when they are row-major and contiguous, and must
/// outlive the layer; temporaries are taken over, other layouts copied. The adapter is owned, with row-major factors.
///
///     lora_layer<float> layer(weight, bias, {.b = b, .a = a, .scaling = 2});
///     row_matrix<float> hidden, y = layer.forward(x, hidden);
///     auto gradient = layer.vjp(x, hidden, dy);
///     layer.b() -= rate * gradient.b;
template <arithmetic_element T>
class lora_layer {
public:
    /// Errors: shape_mismatch where weight, bias and adapter make no layer.
    template <operand W, operand Bias>
        requires matching_operands<W, Bias> && std::same_as<operand_scalar<W>, T>
    lora_layer(W&& weight, Bias&& bias, lora_update<T> adapter);

    /// y = x·Wᵀ + bias + scaling·(x·aᵀ)·bᵀ; x is batch × in, a matrix or a primal_tangent.
    template <operand X>
        requires std::same_as<operand_scalar<X>, T>
    [[nodiscard]] operation_result<X> forward(const X& x) const;
    /// The same, keeping scaling·x·aᵀ (batch × rank) in `hidden` for vjp().
    template <class X>
        requires detail::plain_matrix<X> && std::same_as<typename X::Scalar, T>
    [[nodiscard]] row_matrix<T> forward(const X& x, row_matrix<T>& hidden) const;
    /// Gradients of x, a and b: x and hidden as in forward(), dy is batch × out.
    template <class X, class G>
        requires detail::plain_matrix<X> && detail::plain_matrix<G>
    [[nodiscard]] lora_gradient<T> vjp(
        const X& x, const row_matrix<T>& hidden, const G& dy, lora_wanted wanted = {}) const;

    /// The trainable factors in place: a is rank × in, b is out × rank.
    [[nodiscard]] Eigen::Map<row_matrix<T>> a() { return as_row_matrix(adapter_.a); }
    /// The trainable lora_B in place, out × rank.
    [[nodiscard]] Eigen::Map<row_matrix<T>> b() { return as_row_matrix(adapter_.b); }
    [[nodiscard]] row_matrix_map<T> a() const { return as_row_matrix(adapter_.a); }
    [[nodiscard]] row_matrix_map<T> b() const { return as_row_matrix(adapter_.b); }
    /// Takes another adapter, of any rank and scaling. Throws shape_mismatch.
    void set(lora_update<T> adapter);
    /// The trainable part.
    [[nodiscard]] const lora_update<T>& adapter() const noexcept { return adapter_; }
    /// W + scaling·b·a, out × in: the plain layer that computes the same.
    [[nodiscard]] row_matrix<T> dense() const;

    /// r, the rank of the adapter.
    [[nodiscard]] Eigen::Index rank() const noexcept { return static_cast<Eigen::Index>(adapter_.rank()); }
    /// The frozen weight and bias.
    [[nodiscard]] row_matrix_map<T> weight() const { return weight_.primal(); }
    /// The frozen bias, 1 × out, or empty.
    [[nodiscard]] row_matrix_map<T> bias() const { return bias_.primal(); }

private:
    [[nodiscard]] T scaling() const noexcept { return static_cast<T>(adapter_.scaling); }

    primal_tangent<T> weight_, bias_;
    lora_update<T> adapter_;
};

namespace detail {

template <class M>
void require_row_major(const M& x)
{
    if (x.order() != matrix_order::row_major) {
        raise<invalid_argument>(
            error_code::tensor_layout, "as_row_matrix() sees row-major matrices; this one is column-major");
    }
}

template <class M>
[[nodiscard]] auto evaluated(const M& x)
{
    using T = typename M::Scalar;
    matrix<T> y(static_cast<std::size_t>(x.rows()), static_cast<std::size_t>(x.cols()), matrix_order::row_major);
    as_row_matrix(y) = x;
    return y;
}

/// The update with row-major factors: as it is, or turned.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> with_row_major_factors(lora_update<T> update)
{
    for (matrix<T>* const x : {&update.b, &update.a}) {
        if (x->order() == matrix_order::row_major) { continue; }
        matrix<T> turned(x->rows(), x->cols(), matrix_order::row_major);
        for (std::size_t i = 0; i < x->rows(); ++i) {
            for (std::size_t j = 0; j < x->cols(); ++j) { turned(i, j) = (*x)(i, j); }
        }
        *x = std::move(turned);
    }
    return update;
}

inline void check_adapter(std::string_view name, Eigen::Index in, Eigen::Index out, Eigen::Index a_rows,
    Eigen::Index a_cols, Eigen::Index b_rows, Eigen::Index b_cols)
{
    check_equal(name, "the number of columns of a (rank × in)", a_cols, in);
    check_equal(name, "the number of rows of b (out × rank)", b_rows, out);
    check_equal(name, "the number of columns of b (out × rank)", b_cols, a_rows);
}
template <arithmetic_element T>
void check_adapter(std::string_view name, const primal_tangent<T>& w, const lora_update<T>& adapter)
{
    const auto index = [](std::size_t x) { return static_cast<Eigen::Index>(x); };
    check_adapter(name, w.cols(), w.rows(), index(adapter.a.rows()), index(adapter.a.cols()), index(adapter.b.rows()),
        index(adapter.b.cols()));
}

/// scaling·x·aᵀ with tangents.
template <differentiable_scalar T>
primal_tangent<T> lora_hidden(const primal_tangent<T>& x, const primal_tangent<T>& a, const T& scaling)
{
    auto hidden = primal_tangent<T>::uninitialized(x.rows(), a.rows(), x.active() || a.active());
    product_into<true, false>(hidden, x, a);
    if (scaling != T(1)) { hidden.mutable_stack() *= scaling; }
    return hidden;
}

/// y = x·wᵀ + bias + hidden·upᵀ with tangents.
template <differentiable_scalar T>
primal_tangent<T> lora_output(const primal_tangent<T>& x, const primal_tangent<T>& w, const primal_tangent<T>& bias,
    const primal_tangent<T>& hidden, const primal_tangent<T>& up)
{
    const bool biased = bias.size() != 0, low_rank = hidden.active() || up.active();
    auto y = primal_tangent<T>::uninitialized(
        x.rows(), w.rows(), low_rank || x.active() || w.active() || (biased && bias.active()));
    product_into<true, false>(y, hidden, up);
    if (y.active() && !low_rank) { y.mutable_tangent().setZero(); }
    product_into<true, true>(y, x, w);
    if (biased) { add_bias_into(y, bias); }
    return y;
}

template <differentiable_scalar T>
void check_layer(
    std::string_view name, const primal_tangent<T>& x, const primal_tangent<T>& w, const primal_tangent<T>& bias)
{
    check_equal(name, "the number of columns of x", x.cols(), w.cols());
    if (bias.size() != 0) {
        check_equal(name, "the number of rows of the bias", bias.rows(), 1);
        check_equal(name, "the number of columns of the bias", bias.cols(), w.rows());
    }
}

template <differentiable_scalar T>
primal_tangent<T> lora_linear(const primal_tangent<T>& x, const primal_tangent<T>& w, const primal_tangent<T>& bias,
    const primal_tangent<T>& a, const primal_tangent<T>& b, const T& scaling)
{
    check_layer("lora_linear", x, w, bias);
    check_adapter("lora_linear", w.cols(), w.rows(), a.rows(), a.cols(), b.rows(), b.cols());
    auto y = lora_output(x, w, bias, lora_hidden(x, a, scaling), b);
    check_tangent(y, "lora_linear");
    return y;
}

} // namespace detail

template <operand X, operand W, operand Bias, operand A, operand B>
    requires matching_operands<X, W, Bias, A, B>
operation_result<X, W, Bias, A, B> lora_linear(
    const X& x, const W& w, const Bias& bias, const A& a, const B& b, const operand_scalar<X>& scaling)
{
    return detail::finish<operation_result<X, W, Bias, A, B>>(
        detail::lora_linear(detail::as_primal_tangent(x), detail::as_primal_tangent(w), detail::as_primal_tangent(bias),
            detail::as_primal_tangent(a), detail::as_primal_tangent(b), scaling));
}

template <arithmetic_element T>
row_matrix_map<T> as_row_matrix(const matrix<T>& x)
{
    detail::require_row_major(x);
    return {x.data(), static_cast<Eigen::Index>(x.rows()), static_cast<Eigen::Index>(x.cols())};
}
template <arithmetic_element T>
Eigen::Map<row_matrix<T>> as_row_matrix(matrix<T>& x)
{
    detail::require_row_major(x);
    return {x.data(), static_cast<Eigen::Index>(x.rows()), static_cast<Eigen::Index>(x.cols())};
}

template <class B, class A>
    requires detail::plain_matrix<B> && detail::plain_matrix<A> && arithmetic_element<typename B::Scalar>
    && std::same_as<typename A::Scalar, typename B::Scalar>
lora_update<typename B::Scalar> make_lora(const B& b, const A& a, double scaling)
{
    detail::check_equal("make_lora", "the number of columns of b (out × rank)", b.cols(), a.rows());
    return {.b = detail::evaluated(b), .a = detail::evaluated(a), .scaling = scaling};
}

template <arithmetic_element T>
template <operand W, operand Bias>
    requires matching_operands<W, Bias> && std::same_as<operand_scalar<W>, T>
lora_layer<T>::lora_layer(W&& weight, Bias&& bias, lora_update<T> adapter)
    : weight_(detail::keep(std::forward<W>(weight)))
    , bias_(detail::keep(std::forward<Bias>(bias)))
{
    set(std::move(adapter));
}

template <arithmetic_element T>
void lora_layer<T>::set(lora_update<T> adapter)
{
    detail::check_adapter("lora_layer", weight_, adapter);
    adapter_ = detail::with_row_major_factors(std::move(adapter));
}

template <arithmetic_element T>
row_matrix<T> lora_layer<T>::dense() const
{
    const row_matrix<T> product = scaling() * (b() * a());
    return weight_.primal() + product;
}

template <arithmetic_element T>
template <operand X>
    requires std::same_as<operand_scalar<X>, T>
operation_result<X> lora_layer<T>::forward(const X& x) const
{
    return detail::finish<operation_result<X>>(detail::lora_linear(detail::as_primal_tangent(x), weight_, bias_,
        primal_tangent<T>::borrow(a()), primal_tangent<T>::borrow(b()), scaling()));
}

template <arithmetic_element T>
template <class X>
    requires detail::plain_matrix<X> && std::same_as<typename X::Scalar, T>
row_matrix<T> lora_layer<T>::forward(const X& x, row_matrix<T>& hidden) const
{
    decltype(auto) input = detail::as_primal_tangent(x);
    detail::check_layer("lora_layer", input, weight_, bias_);
    hidden = detail::lora_hidden(input, primal_tangent<T>::borrow(a()), scaling()).take_primal();
    return detail::lora_output(input, weight_, bias_, primal_tangent<T>::borrow(hidden), primal_tangent<T>::borrow(b()))
        .take_primal();
}

template <arithmetic_element T>
template <class X, class G>
    requires detail::plain_matrix<X> && detail::plain_matrix<G>
lora_gradient<T> lora_layer<T>::vjp(const X& x, const row_matrix<T>& hidden, const G& dy, lora_wanted wanted) const
{
    decltype(auto) input = detail::as_primal_tangent(x);
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    detail::check_equal("lora_layer::vjp", "the number of columns of dy", cotangent.cols(), weight_.rows());
    detail::check_equal("lora_layer::vjp", "the number of rows of dy", cotangent.rows(), input.rows());
    detail::check_equal("lora_layer::vjp", "the number of rows of hidden", hidden.rows(), input.rows());
    detail::check_equal("lora_layer::vjp", "the number of columns of hidden", hidden.cols(), rank());
    lora_gradient<T> gradient;
    if (wanted.x || wanted.a) {
        row_matrix<T> through(cotangent.rows(), rank()); // d hidden, scaled
        through.noalias() = cotangent.primal() * b();
        if (scaling() != T(1)) { through *= scaling(); }
        if (wanted.a) { gradient.a.noalias() = through.transpose() * input.primal(); }
        if (wanted.x) {
            gradient.x.noalias() = through * a();
            gradient.x.noalias() += cotangent.primal() * weight_.primal();
        }
    }
    if (wanted.b) { gradient.b.noalias() = cotangent.primal().transpose() * hidden; }
    return gradient;
}

} // namespace taskvec::inline TASKVEC_ABI
