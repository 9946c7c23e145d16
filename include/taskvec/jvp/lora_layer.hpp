// A linear layer with a low-rank adapter (LoRA): forward with tangents, gradients, and the dense weight it equals.
// Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: low-rank adaptation of large language models" (2021).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/jvp/linear.hpp>

#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// A LoRA adapter with PEFT's names and shapes: the weight update is scaling·b·a.
template <differentiable_scalar T>
struct lora_factors {
    row_matrix<T> a; ///< rank × in: PEFT's lora_A.weight
    row_matrix<T> b; ///< out × rank: PEFT's lora_B.weight
    T scaling = T(1); ///< lora_alpha / rank, or lora_alpha / √rank

    [[nodiscard]] Eigen::Index rank() const noexcept { return a.rows(); }
    /// scaling·b·a, out × in.
    [[nodiscard]] row_matrix<T> product() const { return scaling * (b * a); }
};

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

template <class T>
struct lora_gradient {
    row_matrix<T> x; ///< batch × in, empty if not asked for
    row_matrix<T> a; ///< rank × in, empty if not asked for
    row_matrix<T> b; ///< out × rank, empty if not asked for
};
/// Which gradients a LoRA layer's vjp computes; the frozen weight has none.
struct lora_wanted {
    bool x = true;
    bool a = true;
    bool b = true;
};

/// A frozen linear layer with a trainable LoRA adapter.
/// The weight (out × in) and the bias (1 × out, or empty) are borrowed when they are row-major and contiguous, and must
/// outlive the layer; temporaries are taken over, other layouts copied. The adapter is owned.
///
///     lora_layer<float> layer(weight, bias, {.a = a, .b = b, .scaling = 2.0f});
///     row_matrix<float> hidden, y = layer.forward(x, hidden);
///     auto gradient = layer.vjp(x, hidden, dy);
///     layer.adapter.b -= rate * gradient.b;
template <differentiable_scalar T>
class lora_layer {
public:
    lora_factors<T> adapter; ///< the trainable part

    template <operand W, operand Bias>
        requires matching_operands<W, Bias> && std::same_as<operand_scalar<W>, T>
    lora_layer(W&& weight, Bias&& bias, lora_factors<T> factors);

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
    /// W + scaling·b·a, out × in: the plain layer that computes the same.
    [[nodiscard]] row_matrix<T> dense() const { return weight_.primal() + adapter.product(); }

    /// The frozen weight and bias.
    [[nodiscard]] row_matrix_map<T> weight() const { return weight_.primal(); }
    [[nodiscard]] row_matrix_map<T> bias() const { return bias_.primal(); }

private:
    primal_tangent<T> weight_, bias_;
};

namespace detail {

inline void check_adapter(std::string_view name, Eigen::Index in, Eigen::Index out, Eigen::Index a_rows,
    Eigen::Index a_cols, Eigen::Index b_rows, Eigen::Index b_cols)
{
    check_equal(name, "the number of columns of a (rank × in)", a_cols, in);
    check_equal(name, "the number of rows of b (out × rank)", b_rows, out);
    check_equal(name, "the number of columns of b (out × rank)", b_cols, a_rows);
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

template <differentiable_scalar T>
template <operand W, operand Bias>
    requires matching_operands<W, Bias> && std::same_as<operand_scalar<W>, T>
lora_layer<T>::lora_layer(W&& weight, Bias&& bias, lora_factors<T> factors)
    : adapter(std::move(factors))
    , weight_(detail::keep(std::forward<W>(weight)))
    , bias_(detail::keep(std::forward<Bias>(bias)))
{
    detail::check_adapter("lora_layer", weight_.cols(), weight_.rows(), adapter.a.rows(), adapter.a.cols(),
        adapter.b.rows(), adapter.b.cols());
}

template <differentiable_scalar T>
template <operand X>
    requires std::same_as<operand_scalar<X>, T>
operation_result<X> lora_layer<T>::forward(const X& x) const
{
    return detail::finish<operation_result<X>>(detail::lora_linear(detail::as_primal_tangent(x), weight_, bias_,
        primal_tangent<T>::borrow(adapter.a), primal_tangent<T>::borrow(adapter.b), adapter.scaling));
}

template <differentiable_scalar T>
template <class X>
    requires detail::plain_matrix<X> && std::same_as<typename X::Scalar, T>
row_matrix<T> lora_layer<T>::forward(const X& x, row_matrix<T>& hidden) const
{
    decltype(auto) input = detail::as_primal_tangent(x);
    detail::check_layer("lora_layer", input, weight_, bias_);
    hidden = detail::lora_hidden(input, primal_tangent<T>::borrow(adapter.a), adapter.scaling).take_primal();
    return detail::lora_output(
        input, weight_, bias_, primal_tangent<T>::borrow(hidden), primal_tangent<T>::borrow(adapter.b))
        .take_primal();
}

template <differentiable_scalar T>
template <class X, class G>
    requires detail::plain_matrix<X> && detail::plain_matrix<G>
lora_gradient<T> lora_layer<T>::vjp(const X& x, const row_matrix<T>& hidden, const G& dy, lora_wanted wanted) const
{
    decltype(auto) input = detail::as_primal_tangent(x);
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    detail::check_equal("lora_layer::vjp", "the number of columns of dy", cotangent.cols(), weight_.rows());
    detail::check_equal("lora_layer::vjp", "the number of rows of dy", cotangent.rows(), input.rows());
    detail::check_equal("lora_layer::vjp", "the number of rows of hidden", hidden.rows(), input.rows());
    detail::check_equal("lora_layer::vjp", "the number of columns of hidden", hidden.cols(), adapter.rank());
    lora_gradient<T> gradient;
    if (wanted.x || wanted.a) {
        row_matrix<T> through(cotangent.rows(), adapter.rank()); // d hidden, scaled
        through.noalias() = cotangent.primal() * adapter.b;
        if (adapter.scaling != T(1)) { through *= adapter.scaling; }
        if (wanted.a) { gradient.a.noalias() = through.transpose() * input.primal(); }
        if (wanted.x) {
            gradient.x.noalias() = through * adapter.a;
            gradient.x.noalias() += cotangent.primal() * weight_.primal();
        }
    }
    if (wanted.b) { gradient.b.noalias() = cotangent.primal().transpose() * hidden; }
    return gradient;
}

} // namespace taskvec::inline TASKVEC_ABI
