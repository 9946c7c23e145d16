// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/dual.hpp>

#include <Eigen/Dense>
#include <doctest/doctest.h>

#include <functional>

using namespace taskvec;

namespace {
template <class F>
void check(const char* name, const F& f, double at)
{
    CAPTURE(std::string(name));
    const double h = 1e-5;
    const auto y = f(dual<double>(at, 2.0));
    CHECK(y.primal == doctest::Approx(f(at)).epsilon(1e-14));
    CHECK(y.tangent == doctest::Approx((f(at + h) - f(at - h)) / h).epsilon(1e-7));
    // Nested: the tangent of the tangent is the second derivative.
    const auto second = f(dual<dual<double>>({at, 1.0}, {1.0, 0.0}));
    CHECK(second.primal.tangent == doctest::Approx(second.tangent.primal).epsilon(1e-14));
    CHECK(std::abs(second.tangent.tangent - (f(at + 1e-4) - 2 * f(at) + f(at - 1e-4)) / 1e-8)
        <= 1e-5 * (1 + std::abs(second.tangent.tangent)));
    const auto single = f(dual<float>(static_cast<float>(at), 2.0f));
    CHECK(static_cast<double>(single.tangent) == doctest::Approx(y.tangent).epsilon(1e-4));
}
} // namespace

TEST_CASE("dual: every function against differences, at first and second order")
{
    const auto constant = [](const auto& x, double value) {
        return std::remove_cvref_t<decltype(x)>(static_cast<float>(value));
    };
    for (const double at : {0.3, 0.75, 1.5}) {
        check("arithmetic", [&](const auto& x) { return (x * x - constant(x, 2)) / (x + constant(x, 3)) + -x; }, at);
        check(
            "exp",
            [](const auto& x) {
                using std::exp;
                return exp(x * x);
            },
            at);
        check(
            "expm1",
            [](const auto& x) {
                using std::expm1;
                return expm1(x);
            },
            at);
        check(
            "log",
            [](const auto& x) {
                using std::log;
                return log(x);
            },
            at);
        check(
            "log1p",
            [](const auto& x) {
                using std::log1p;
                return log1p(x);
            },
            at);
        check(
            "sqrt",
            [](const auto& x) {
                using std::sqrt;
                return sqrt(x);
            },
            at);
        check(
            "sin",
            [](const auto& x) {
                using std::sin;
                return sin(x);
            },
            at);
        check(
            "cos",
            [](const auto& x) {
                using std::cos;
                return cos(x);
            },
            at);
        check(
            "tan",
            [](const auto& x) {
                using std::tan;
                return tan(x);
            },
            at * 0.8);
        check(
            "atan",
            [](const auto& x) {
                using std::atan;
                return atan(x);
            },
            at);
        check(
            "sinh",
            [](const auto& x) {
                using std::sinh;
                return sinh(x);
            },
            at);
        check(
            "cosh",
            [](const auto& x) {
                using std::cosh;
                return cosh(x);
            },
            at);
        check(
            "tanh",
            [](const auto& x) {
                using std::tanh;
                return tanh(x);
            },
            at);
        check(
            "erf",
            [](const auto& x) {
                using std::erf;
                return erf(x);
            },
            at);
        check(
            "abs",
            [](const auto& x) {
                using std::abs;
                return abs(-x);
            },
            at);
        check(
            "pow",
            [](const auto& x) {
                using std::pow;
                return pow(x, 3);
            },
            at);
        check(
            "pow of two duals",
            [](const auto& x) {
                using std::pow;
                return pow(x, x);
            },
            at);
    }
}

TEST_CASE("dual: compound assignment, comparison and documented values")
{
    dual<double> x{3, 1};
    x *= 2.0;
    x += dual<double>(1, 5);
    x -= 1;
    x /= 2.0;
    CHECK(x.primal == 3);
    CHECK(x.tangent == 3.5);
    CHECK(x == 3.0);
    CHECK(x < 4.0);
    CHECK(x >= 3.0);
    CHECK(x != 2.0);
    CHECK(abs(dual<double>(0, 1)).tangent == 0);
    CHECK(pow(dual<double>(2, 1), 0).tangent == 0);
    CHECK(isnan(dual<double>(0, std::nan(""))));
    CHECK(!isfinite(log(dual<double>(0, 1))));
}

TEST_CASE("dual: in Eigen expressions, products and decompositions")
{
    using vector = Eigen::Matrix<dual<double>, 3, 1>;
    using square = Eigen::Matrix<dual<double>, 3, 3>;
    square m;
    Eigen::Matrix3d value, direction;
    for (int i = 0; i < 9; ++i) {
        value.data()[i] = (i * 7 % 5) + (i % 4 == 0 ? 6 : 0.5);
        direction.data()[i] = 0.1 * i - 0.3;
        m.data()[i] = {value.data()[i], direction.data()[i]};
    }
    // d(m⁻¹) = −m⁻¹·dm·m⁻¹
    const square inverse = m.inverse();
    const Eigen::Matrix3d expected = -value.inverse() * direction * value.inverse();
    for (int i = 0; i < 9; ++i) {
        CHECK(inverse.data()[i].tangent == doctest::Approx(expected.data()[i]).epsilon(1e-12));
    }
    // d|m·v| for a constant v
    const Eigen::Vector3d v(1, -2, 0.5);
    const vector product = m * v.cast<dual<double>>();
    const dual<double> norm = (2.0 * product).norm();
    CHECK(norm.primal == doctest::Approx(2 * (value * v).norm()));
    CHECK(norm.tangent == doctest::Approx(2 * (value * v).dot(direction * v) / (value * v).norm()));
    // Dynamic sizes and array functions
    const Eigen::Array<dual<double>, Eigen::Dynamic, 1> array =
        Eigen::ArrayXd::LinSpaced(5, 0.1, 0.9).cast<dual<double>>() + dual<double>(0, 1);
    const dual<double> sum = (array.exp() * array.tanh()).sum();
    double tangent = 0;
    for (const double t : {0.1, 0.3, 0.5, 0.7, 0.9}) {
        tangent += std::exp(t) * (std::tanh(t) + 1 - std::tanh(t) * std::tanh(t));
    }
    CHECK(sum.tangent == doctest::Approx(tangent).epsilon(1e-13));
}
