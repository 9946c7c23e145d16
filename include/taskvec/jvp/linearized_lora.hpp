// The linearized LoRA layer: a LoRA layer expanded to first order in its factors around their initialisation.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/fold_adapter.hpp>
#include <taskvec/adapters/lora.hpp>
#include <taskvec/jvp/lora_layer.hpp>

#include <concepts>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// The gradients of a linearized LoRA layer.
template <class T>
struct linearized_lora_gradient {
    row_matrix<T> x; ///< batch × in, empty if not asked for
    row_matrix<T> a; ///< rank × in, empty if not asked for; exactly zero where B0 = 0
    row_matrix<T> b; ///< out × rank, empty if not asked for
};

/// f(x) = W0·x + bias + s·(B0·A0 + B0·ΔA + ΔB·A0)·x, the first-order expansion in (A, B) of a LoRA layer around its
/// initialisation φ0 = (A0, B0), with ΔA = A − A0, ΔB = B − B0. This is the *per-layer* reading of L-LoRA (Tang et al.,
/// "Parameter-efficient multi-task model fusion with partial linearization", ICLR 2024, Listing 2): each adapted layer
/// is linear in its own φ, and layers compose non-linearly. For the whole-network reading see linearize().
///
/// As f(x) = W0·x + s·[B0 + ΔB, B0]·[A0; ΔA]·x all products are shared: the layer is a LoRA of rank 2r, and of rank r
/// where B0 = 0 (as PEFT initialises): it then costs exactly what LoRA costs, and the gradient of A is exactly zero.
///
/// The weight (out × in) and the bias (1 × out, or empty) are borrowed when they are row-major and contiguous, and must
/// outlive the layer; temporaries are taken over, other layouts copied. The factors are owned. Errors: shape_mismatch.
///
///     linearized_lora_layer<float> layer(weight, bias, {.b = b0, .a = a0, .scaling = 2});
///     row_matrix<float> hidden, y = layer.forward(x, hidden);
///     auto gradient = layer.vjp(x, hidden, dy);
///     layer.b() -= rate * gradient.b;
///     layer.delta_a() -= rate * gradient.a;
///     lora_update<float> served = layer.fold();
template <arithmetic_element T>
class linearized_lora_layer {
public:
    /// At φ0: `initial` holds B0 (out × rank), A0 (rank × in) and the scaling; ΔA = ΔB = 0.
    template <operand W, operand Bias>
        requires matching_operands<W, Bias> && std::same_as<operand_scalar<W>, T>
    linearized_lora_layer(W&& weight, Bias&& bias, lora_update<T> initial);

    /// f(x); x is batch × in, a matrix or a primal_tangent.
    template <operand X>
        requires std::same_as<operand_scalar<X>, T>
    [[nodiscard]] operation_result<X> forward(const X& x) const;
    /// f(x), keeping s·x·[A0; ΔA]ᵀ (batch × stacked_rank()) in `hidden` for vjp().
    template <class X>
        requires detail::plain_matrix<X> && std::same_as<typename X::Scalar, T>
    [[nodiscard]] row_matrix<T> forward(const X& x, row_matrix<T>& hidden) const;
    /// Gradients of x, A (the same as ΔA's) and B (the same as ΔB's): x and hidden as in forward(), dy is batch × out.
    template <class X, class G>
        requires detail::plain_matrix<X> && detail::plain_matrix<G>
    [[nodiscard]] linearized_lora_gradient<T> vjp(
        const X& x, const row_matrix<T>& hidden, const G& dy, lora_wanted wanted = {}) const;

    /// The trainable ΔA, rank × in, and B = B0 + ΔB, out × rank, as writable blocks.
    [[nodiscard]] Eigen::Ref<row_matrix<T>> delta_a()
    {
        return b0_is_zero_ ? Eigen::Ref<row_matrix<T>>(delta_a_) : Eigen::Ref<row_matrix<T>>(down().bottomRows(rank_));
    }
    /// B, out × rank, writable in place.
    [[nodiscard]] Eigen::Ref<row_matrix<T>> b() { return up().leftCols(rank_); }
    /// Moves the trainable part to φ = (A, B); a different scaling or shape is an error.
    void set(const lora_update<T>& adapter);
    /// φ = (A0 + ΔA, B): what an adapter file stores beside its initialisation.
    [[nodiscard]] lora_update<T> adapter() const;
    /// φ0 = (A0, B0).
    [[nodiscard]] lora_update<T> initial() const;

    /// The plain LoRA that computes the same: b = [B0 + ΔB, B0], a = [A0; ΔA], rank 2r; rank r where B0 = 0. Serves at
    /// LoRA's cost. Exact but for the order of additions inside one product. What fold_linearized() makes of initial()
    /// and adapter().
    [[nodiscard]] const lora_update<T>& fold() const noexcept { return folded_; }
    /// The plain weight that computes the same: W0 + s·(B0·A0 + B0·ΔA + ΔB·A0), out × in.
    [[nodiscard]] row_matrix<T> dense() const { return weight_.primal() + scaling() * (up() * down()); }

    /// r, the rank of the trained adapter.
    [[nodiscard]] Eigen::Index rank() const noexcept { return rank_; }
    /// The rank of fold(): r where B0 = 0, otherwise 2r.
    [[nodiscard]] Eigen::Index stacked_rank() const noexcept { return static_cast<Eigen::Index>(folded_.rank()); }
    /// The frozen weight and bias.
    [[nodiscard]] row_matrix_map<T> weight() const { return weight_.primal(); }
    /// The frozen bias, 1 × out, or empty.
    [[nodiscard]] row_matrix_map<T> bias() const { return bias_.primal(); }

private:
    [[nodiscard]] Eigen::Map<row_matrix<T>> down() { return as_row_matrix(folded_.a); }
    [[nodiscard]] Eigen::Map<row_matrix<T>> up() { return as_row_matrix(folded_.b); }
    [[nodiscard]] row_matrix_map<T> down() const { return as_row_matrix(folded_.a); }
    [[nodiscard]] row_matrix_map<T> up() const { return as_row_matrix(folded_.b); }
    [[nodiscard]] T scaling() const noexcept { return static_cast<T>(folded_.scaling); }

    primal_tangent<T> weight_, bias_;
    lora_update<T> folded_; // a = [A0; ΔA] and b = [B, B0], or A0 and B where B0 = 0
    row_matrix<T> delta_a_; // where B0 = 0: without effect on f
    Eigen::Index rank_;
    bool b0_is_zero_;
};

template <arithmetic_element T>
template <operand W, operand Bias>
    requires matching_operands<W, Bias> && std::same_as<operand_scalar<W>, T>
linearized_lora_layer<T>::linearized_lora_layer(W&& weight, Bias&& bias, lora_update<T> initial)
    : weight_(detail::keep(std::forward<W>(weight)))
    , bias_(detail::keep(std::forward<Bias>(bias)))
    , rank_(static_cast<Eigen::Index>(initial.rank()))
{
    detail::check_adapter("linearized_lora_layer", weight_, initial);
    folded_ = fold_linearized(initial, initial, "linearized_lora_layer");
    b0_is_zero_ = folded_.rank() == initial.rank();
    if (b0_is_zero_) { delta_a_ = row_matrix<T>::Zero(rank_, down().cols()); }
}

template <arithmetic_element T>
template <operand X>
    requires std::same_as<operand_scalar<X>, T>
operation_result<X> linearized_lora_layer<T>::forward(const X& x) const
{
    decltype(auto) input = detail::as_primal_tangent(x);
    detail::check_layer("linearized_lora_layer", input, weight_, bias_);
    auto y = detail::lora_output(input, weight_, bias_,
        detail::lora_hidden(input, primal_tangent<T>::borrow(down()), scaling()), primal_tangent<T>::borrow(up()));
    detail::check_tangent(y, "linearized_lora_layer");
    return detail::finish<operation_result<X>>(std::move(y));
}

template <arithmetic_element T>
template <class X>
    requires detail::plain_matrix<X> && std::same_as<typename X::Scalar, T>
row_matrix<T> linearized_lora_layer<T>::forward(const X& x, row_matrix<T>& hidden) const
{
    decltype(auto) input = detail::as_primal_tangent(x);
    detail::check_layer("linearized_lora_layer", input, weight_, bias_);
    hidden = detail::lora_hidden(input, primal_tangent<T>::borrow(down()), scaling()).take_primal();
    return detail::lora_output(
        input, weight_, bias_, primal_tangent<T>::borrow(hidden), primal_tangent<T>::borrow(up()))
        .take_primal();
}

template <arithmetic_element T>
template <class X, class G>
    requires detail::plain_matrix<X> && detail::plain_matrix<G>
linearized_lora_gradient<T> linearized_lora_layer<T>::vjp(
    const X& x, const row_matrix<T>& hidden, const G& dy, lora_wanted wanted) const
{
    decltype(auto) input = detail::as_primal_tangent(x);
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    detail::check_equal("linearized_lora_layer::vjp", "the number of columns of dy", cotangent.cols(), weight_.rows());
    detail::check_equal("linearized_lora_layer::vjp", "the number of rows of dy", cotangent.rows(), input.rows());
    detail::check_equal("linearized_lora_layer::vjp", "the number of rows of hidden", hidden.rows(), input.rows());
    detail::check_equal("linearized_lora_layer::vjp", "the number of columns of hidden", hidden.cols(), stacked_rank());
    linearized_lora_gradient<T> gradient;
    if (wanted.a && b0_is_zero_) { gradient.a = row_matrix<T>::Zero(rank_, down().cols()); }
    if (wanted.x || (wanted.a && !b0_is_zero_)) {
        row_matrix<T> through(cotangent.rows(), stacked_rank()); // d hidden, scaled: [s·dy·B, s·dy·B0]
        through.noalias() = cotangent.primal() * up();
        if (scaling() != T(1)) { through *= scaling(); }
        if (wanted.a && !b0_is_zero_) { gradient.a.noalias() = through.rightCols(rank_).transpose() * input.primal(); }
        if (wanted.x) {
            gradient.x.noalias() = through * down();
            gradient.x.noalias() += cotangent.primal() * weight_.primal();
        }
    }
    if (wanted.b) { gradient.b.noalias() = cotangent.primal().transpose() * hidden.leftCols(rank_); }
    return gradient;
}

template <arithmetic_element T>
void linearized_lora_layer<T>::set(const lora_update<T>& adapter)
{
    detail::check_adapter("linearized_lora_layer::set", weight_, adapter);
    detail::check_equal("linearized_lora_layer::set", "the rank", static_cast<Eigen::Index>(adapter.rank()), rank_);
    if (!same_scaling(adapter.scaling, folded_.scaling)) {
        raise<invalid_argument>(error_code::initialization_differs,
            "linearized_lora_layer::set: the adapter's scaling differs from that of its initialisation");
    }
    const lora_update<T> phi = detail::with_row_major_factors(adapter);
    delta_a() = as_row_matrix(phi.a) - down().topRows(rank_);
    b() = as_row_matrix(phi.b);
}

template <arithmetic_element T>
lora_update<T> linearized_lora_layer<T>::adapter() const
{
    const row_matrix<T> moved = b0_is_zero_ ? delta_a_ : row_matrix<T>(down().bottomRows(rank_));
    return make_lora(up().leftCols(rank_), down().topRows(rank_) + moved, folded_.scaling);
}

template <arithmetic_element T>
lora_update<T> linearized_lora_layer<T>::initial() const
{
    const row_matrix<T> b0 =
        b0_is_zero_ ? row_matrix<T>(row_matrix<T>::Zero(up().rows(), rank_)) : row_matrix<T>(up().rightCols(rank_));
    return make_lora(b0, down().topRows(rank_), folded_.scaling);
}

} // namespace taskvec::inline TASKVEC_ABI
