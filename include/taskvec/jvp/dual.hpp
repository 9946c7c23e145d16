// Dual numbers: a scalar and its derivative, usable wherever Eigen takes a scalar. For functions of few inputs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>
#include <taskvec/fwd.hpp>

#if !__has_include(<Eigen/Core>)
#error "this header of taskvec needs Eigen 3.4 or later (Debian: libeigen3-dev, with -I /usr/include/eigen3)"
#include "taskvec: the error above ends the compilation"
#endif
#include <Eigen/Core>

#include <cmath>
#include <concepts>
#include <limits>
#include <numbers>
#include <ostream>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// a + b·ε with ε² = 0: f(dual{x, v}) is {f(x), f'(x)·v}. Comparisons look at the primal alone. Constants convert
/// implicitly and have tangent zero. Nested, dual<dual<double>> carries second derivatives.
/// Where a function has no derivative the documented value is taken: abs'(0) = 0; of equal arguments max and min take
/// the first. sqrt'(0) is infinite.
/// Cost: two to four times the scalar's. Networks are cheaper with primal_tangent matrices.
///
///     taskvec::dual<double> x{3.0, 1.0};
///     auto y = x * exp(x); // y.primal = 3e³, y.tangent = (1 + 3)e³
template <class T>
struct dual {
    T primal{}; ///< the value
    T tangent{}; ///< its derivative along the direction

    constexpr dual() = default;
    /// A constant.
    template <class U>
        requires std::convertible_to<U, T>
    constexpr dual(const U& value)
        : primal(static_cast<T>(value))
    { }
    constexpr dual(const T& value, const T& derivative)
        : primal(value)
        , tangent(derivative)
    { }

    /// x += y, in value and derivative.
    constexpr dual& operator+=(const dual& other) { return *this = *this + other; }
    /// x −= y, in value and derivative.
    constexpr dual& operator-=(const dual& other) { return *this = *this - other; }
    /// x *= y, by the product rule.
    constexpr dual& operator*=(const dual& other) { return *this = *this * other; }
    /// x /= y, by the quotient rule.
    constexpr dual& operator/=(const dual& other) { return *this = *this / other; }

    /// x.
    friend constexpr dual operator+(const dual& x) { return x; }
    /// −x.
    friend constexpr dual operator-(const dual& x) { return {-x.primal, -x.tangent}; }
    /// x + y.
    friend constexpr dual operator+(const dual& x, const dual& y)
    {
        return {x.primal + y.primal, x.tangent + y.tangent};
    }
    /// x − y.
    friend constexpr dual operator-(const dual& x, const dual& y)
    {
        return {x.primal - y.primal, x.tangent - y.tangent};
    }
    friend constexpr dual operator*(const dual& x, const dual& y)
    {
        return {x.primal * y.primal, x.tangent * y.primal + x.primal * y.tangent};
    }
    /// x / y, by the quotient rule.
    friend constexpr dual operator/(const dual& x, const dual& y)
    {
        const T quotient = x.primal / y.primal;
        return {quotient, (x.tangent - quotient * y.tangent) / y.primal};
    }
    friend constexpr bool operator==(const dual& x, const dual& y) { return x.primal == y.primal; }
    friend constexpr bool operator!=(const dual& x, const dual& y) { return !(x.primal == y.primal); }
    friend constexpr bool operator<(const dual& x, const dual& y) { return x.primal < y.primal; }
    /// Of the primals.
    friend constexpr bool operator>(const dual& x, const dual& y) { return y.primal < x.primal; }
    /// Of the primals.
    friend constexpr bool operator<=(const dual& x, const dual& y) { return x.primal <= y.primal; }
    /// Of the primals.
    friend constexpr bool operator>=(const dual& x, const dual& y) { return y.primal <= x.primal; }
    /// "primal + tangent e".
    friend std::ostream& operator<<(std::ostream& out, const dual& x)
    {
        return out << x.primal << " + " << x.tangent << "e";
    }
};

/// eˣ and its derivative eˣ·ẋ.
template <class T>
[[nodiscard]] dual<T> exp(const dual<T>& x)
{
    using std::exp;
    const T value = exp(x.primal);
    return {value, value * x.tangent};
}
/// eˣ − 1, exact near 0; derivative eˣ·ẋ.
template <class T>
[[nodiscard]] dual<T> expm1(const dual<T>& x)
{
    using std::expm1;
    const T value = expm1(x.primal);
    return {value, (value + T(1)) * x.tangent};
}
/// ln x; derivative ẋ / x.
template <class T>
[[nodiscard]] dual<T> log(const dual<T>& x)
{
    using std::log;
    return {log(x.primal), x.tangent / x.primal};
}
/// Ln(1 + x), exact near 0; derivative ẋ / (1 + x).
template <class T>
[[nodiscard]] dual<T> log1p(const dual<T>& x)
{
    using std::log1p;
    return {log1p(x.primal), x.tangent / (T(1) + x.primal)};
}
/// √x; derivative ẋ / (2·√x), infinite at 0.
template <class T>
[[nodiscard]] dual<T> sqrt(const dual<T>& x)
{
    using std::sqrt;
    const T value = sqrt(x.primal);
    return {value, x.tangent / (T(2) * value)};
}
/// sin x; derivative cos x·ẋ.
template <class T>
[[nodiscard]] dual<T> sin(const dual<T>& x)
{
    using std::cos;
    using std::sin;
    return {sin(x.primal), cos(x.primal) * x.tangent};
}
/// cos x; derivative −sin x·ẋ.
template <class T>
[[nodiscard]] dual<T> cos(const dual<T>& x)
{
    using std::cos;
    using std::sin;
    return {cos(x.primal), -sin(x.primal) * x.tangent};
}
/// tan x; derivative (1 + tan² x)·ẋ.
template <class T>
[[nodiscard]] dual<T> tan(const dual<T>& x)
{
    using std::tan;
    const T value = tan(x.primal);
    return {value, (T(1) + value * value) * x.tangent};
}
/// arctan x; derivative ẋ / (1 + x²).
template <class T>
[[nodiscard]] dual<T> atan(const dual<T>& x)
{
    using std::atan;
    return {atan(x.primal), x.tangent / (T(1) + x.primal * x.primal)};
}
/// sinh x; derivative cosh x·ẋ.
template <class T>
[[nodiscard]] dual<T> sinh(const dual<T>& x)
{
    using std::cosh;
    using std::sinh;
    return {sinh(x.primal), cosh(x.primal) * x.tangent};
}
/// cosh x; derivative sinh x·ẋ.
template <class T>
[[nodiscard]] dual<T> cosh(const dual<T>& x)
{
    using std::cosh;
    using std::sinh;
    return {cosh(x.primal), sinh(x.primal) * x.tangent};
}
/// tanh x; derivative (1 − tanh² x)·ẋ.
template <class T>
[[nodiscard]] dual<T> tanh(const dual<T>& x)
{
    using std::tanh;
    const T value = tanh(x.primal);
    return {value, (T(1) - value * value) * x.tangent};
}
/// The error function; derivative 2/√π·e^(−x²)·ẋ.
template <class T>
[[nodiscard]] dual<T> erf(const dual<T>& x)
{
    using std::erf;
    using std::exp;
    return {erf(x.primal), T(2 * std::numbers::inv_sqrtpi_v<double>) * exp(-(x.primal * x.primal)) * x.tangent};
}
/// |x|; the derivative at 0 is 0.
template <class T>
[[nodiscard]] dual<T> abs(const dual<T>& x)
{
    return x.primal > T(0) ? x : x.primal < T(0) ? -x : dual<T>(x.primal, T(0) * x.tangent);
}
/// abs(x), under its other name.
template <class T>
[[nodiscard]] dual<T> fabs(const dual<T>& x)
{
    return abs(x);
}
/// x to a constant power; the derivative is p·x^(p−1).
template <class T, class U>
    requires std::is_arithmetic_v<U>
[[nodiscard]] dual<T> pow(const dual<T>& x, const U& exponent)
{
    using std::pow;
    if (exponent == U(0)) { return {T(1), T(0) * x.tangent}; }
    return {static_cast<T>(pow(x.primal, exponent)),
        T(exponent) * static_cast<T>(pow(x.primal, exponent - U(1))) * x.tangent};
}
/// x to the power y, x > 0.
template <class T>
[[nodiscard]] dual<T> pow(const dual<T>& x, const dual<T>& y)
{
    return exp(y * log(x));
}
template <class T>
[[nodiscard]] dual<T> pow(const T& x, const dual<T>& y)
{
    return pow(dual<T>(x), y);
}
/// Whether value and derivative are finite.
template <class T>
[[nodiscard]] bool isfinite(const dual<T>& x)
{
    using std::isfinite;
    return isfinite(x.primal) && isfinite(x.tangent);
}
/// Whether value or derivative is NaN.
template <class T>
[[nodiscard]] bool isnan(const dual<T>& x)
{
    using std::isnan;
    return isnan(x.primal) || isnan(x.tangent);
}
/// Whether value or derivative is infinite.
template <class T>
[[nodiscard]] bool isinf(const dual<T>& x)
{
    using std::isinf;
    return isinf(x.primal) || isinf(x.tangent);
}

} // namespace taskvec::inline TASKVEC_ABI

namespace Eigen {

template <class T>
struct NumTraits<taskvec::dual<T>> : NumTraits<T> {
    using Real = taskvec::dual<T>;
    using NonInteger = taskvec::dual<T>;
    using Nested = taskvec::dual<T>;
    using Literal = typename NumTraits<T>::Literal;
    enum {
        IsComplex = 0,
        IsInteger = 0,
        IsSigned = 1,
        RequireInitialization = 1,
        ReadCost = 2 * NumTraits<T>::ReadCost,
        AddCost = 2 * NumTraits<T>::AddCost,
        MulCost = 3 * NumTraits<T>::MulCost + NumTraits<T>::AddCost
    };
};

// A dual number meets a plain one in an expression: 2.0 * x.
template <class T, class Operation>
struct ScalarBinaryOpTraits<taskvec::dual<T>, T, Operation> {
    using ReturnType = taskvec::dual<T>;
};
template <class T, class Operation>
struct ScalarBinaryOpTraits<T, taskvec::dual<T>, Operation> {
    using ReturnType = taskvec::dual<T>;
};

} // namespace Eigen

template <class T>
class std::numeric_limits<taskvec::dual<T>> : public std::numeric_limits<T> { };
