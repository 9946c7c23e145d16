// jvp(f, x, v): the value of a function and its directional derivative, in one forward pass.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/jvp/dual.hpp>
#include <taskvec/jvp/parameters.hpp>

#include <concepts>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// f(x) and J(x)·v, of one shape. Binds as `auto [value, derivative] = jvp(…)`.
template <class Value>
struct jvp_result {
    Value primal; ///< f at the point
    Value tangent; ///< its derivative along the direction
};

namespace detail {

template <class T>
    requires std::floating_point<T>
jvp_result<T> split(const dual<T>& y)
{
    return {y.primal, y.tangent};
}
template <differentiable_scalar T>
jvp_result<dual<T>> split(const dual<dual<T>>& y)
{
    return {y.primal, y.tangent};
}
template <differentiable_scalar T>
jvp_result<row_matrix<T>> split(primal_tangent<T>&& y)
{
    row_matrix<T> tangent = y.tangent_or_zero();
    return {std::move(y).take_primal(), std::move(tangent)};
}
/// A function that met no active operand.
template <differentiable_scalar T>
jvp_result<row_matrix<T>> split(row_matrix<T>&& y)
{
    row_matrix<T> tangent = row_matrix<T>::Zero(y.rows(), y.cols());
    return {std::move(y), std::move(tangent)};
}

template <class X, class T>
using with_scalar =
    Eigen::Matrix<T, X::RowsAtCompileTime, X::ColsAtCompileTime, X::IsRowMajor ? Eigen::RowMajor : Eigen::ColMajor>;

template <class Derived>
    requires is_dual<typename Derived::Scalar>
auto split_elements(const Eigen::DenseBase<Derived>& expression)
{
    using T = decltype(Derived::Scalar::primal);
    const typename Derived::PlainObject y = expression;
    using plain = with_scalar<typename Derived::PlainObject, T>;
    jvp_result<plain> result{plain(y.rows(), y.cols()), plain(y.rows(), y.cols())};
    for (Eigen::Index i = 0; i < y.size(); ++i) {
        result.primal.data()[i] = y.data()[i].primal;
        result.tangent.data()[i] = y.data()[i].tangent;
    }
    return result;
}

} // namespace detail

/// f(x) and f'(x)·v for a function of one number, on dual numbers: f takes a dual<T>.
///
///     auto [value, slope] = jvp([](auto x) { return x * exp(x); }, 3.0, 1.0);
template <class F, std::floating_point T>
    requires std::invocable<const F&, dual<T>>
[[nodiscard]] jvp_result<T> jvp(const F& f, T x, T v)
{
    return detail::split(dual<T>(f(dual<T>(x, v))));
}

/// f(x) and J(x)·v for a function of an Eigen vector or matrix (of any kind but row_matrix), on dual numbers: f takes
/// the same kind of matrix with dual<T> for T, and returns a dual number or an Eigen expression of them. v has the
/// shape of x, else shape_mismatch. For functions of few inputs; networks are cheaper on primal_tangent matrices.
///
///     auto [value, derivative] = jvp([](const auto& x) { return dual<double>(x.squaredNorm()); }, x, v);
template <class F, class X>
    requires detail::plain_matrix<X> && std::floating_point<typename X::Scalar>
    && (!std::same_as<typename X::PlainObject, row_matrix<typename X::Scalar>>)
[[nodiscard]] auto jvp(const F& f, const X& x, const X& v)
{
    using T = typename X::Scalar;
    detail::check_same_shape("jvp", x, v);
    detail::with_scalar<typename X::PlainObject, dual<T>> both(x.rows(), x.cols());
    for (Eigen::Index row = 0; row < x.rows(); ++row) {
        for (Eigen::Index col = 0; col < x.cols(); ++col) { both(row, col) = {x.coeff(row, col), v.coeff(row, col)}; }
    }
    if constexpr (std::convertible_to<decltype(f(both)), dual<T>>) { return detail::split(dual<T>(f(both))); }
    else {
        return detail::split_elements(f(both));
    }
}

/// f(x) and J(x)·v for a network written on this library's operations: f takes a primal_tangent<T> and returns one (or
/// a dual<T>, such as a loss). x and v are batch × features of one shape, else shape_mismatch.
///
///     auto [y, dy] = jvp([&](const auto& x) { return linear(relu(linear(x, w1)), w2); }, x, v);
template <class F, differentiable_scalar T>
[[nodiscard]] auto jvp(const F& f, const row_matrix<T>& x, const row_matrix<T>& v)
{
    return detail::split(f(primal_tangent<T>::borrow(x, v, "jvp")));
}

/// f(φ, inputs…) and its derivative along `tangents`, a subset of the parameters: names that are missing there are
/// inactive and cost nothing. f takes active_parameters<T> and the inputs as they are. Throws invalid_argument for a
/// tangent of an unknown parameter, shape_mismatch for one of another shape.
///
///     auto f = [](const auto& p, const auto& x) { return linear(x, p["fc.weight"], p["fc.bias"]); };
///     auto [y, dy] = jvp(f, phi, direction, images);
template <class F, differentiable_scalar T, class... Inputs>
[[nodiscard]] auto jvp(const F& f, const parameters<T>& primals, const parameters<T>& tangents, const Inputs&... inputs)
{
    for (const auto& [name, tangent] : tangents) {
        if (!primals.contains(name)) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message("jvp: there is a tangent for parameter '", name, "', but no such parameter"));
        }
    }
    active_parameters<T> both;
    for (const auto& [name, value] : primals) {
        const auto* tangent = tangents.find(name);
        both.insert(
            name, tangent ? primal_tangent<T>::borrow(value, *tangent, name) : primal_tangent<T>::borrow(value));
    }
    return detail::split(f(std::as_const(both), inputs...));
}

} // namespace taskvec::inline TASKVEC_ABI
