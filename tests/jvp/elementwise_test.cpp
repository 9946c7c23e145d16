// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/elementwise.hpp>

#include "../reference/derivatives.hpp"

#include <limits>

using namespace taskvec;
using reference::random_matrix;
using reference::wide_matrix;

TEST_CASE("add, subtract, scale and elementwise_product: values, tangents and gradients")
{
    // More elements than one block.
    const std::array<wide_matrix, 2> inputs{random_matrix(25, 37, 1), random_matrix(25, 37, 2)};
    CHECK(add(inputs[0], inputs[1]) == wide_matrix(inputs[0] + inputs[1]));
    CHECK(subtract(inputs[0], inputs[1]) == wide_matrix(inputs[0] - inputs[1]));
    CHECK(elementwise_product(inputs[0], inputs[1]) == wide_matrix(inputs[0].cwiseProduct(inputs[1])));
    const auto sum = [](const auto& a, const auto& b) { return add(a, b); };
    reference::check_operation("add", sum, inputs);
    reference::check_vjp(
        "add", sum,
        [&](const wide_matrix& dy) {
            const auto gradient = add_vjp(dy);
            return std::array<wide_matrix, 2>{gradient.a, gradient.b};
        },
        inputs);
    const auto difference = [](const auto& a, const auto& b) { return subtract(a, b); };
    reference::check_operation("subtract", difference, inputs);
    reference::check_vjp(
        "subtract", difference,
        [&](const wide_matrix& dy) {
            const auto gradient = subtract_vjp(dy);
            return std::array<wide_matrix, 2>{gradient.a, gradient.b};
        },
        inputs);
    const auto product = [](const auto& a, const auto& b) { return elementwise_product(a, b); };
    reference::check_operation("elementwise_product", product, inputs);
    reference::check_vjp(
        "elementwise_product", product,
        [&](const wide_matrix& dy) {
            const auto gradient = elementwise_product_vjp(inputs[0], inputs[1], dy);
            return std::array<wide_matrix, 2>{gradient.a, gradient.b};
        },
        inputs);
    const auto scaled = [](const auto& x) { return scale(x, 2.5); };
    const std::array<wide_matrix, 1> one{inputs[0]};
    reference::check_operation("scale", scaled, one);
    reference::check_vjp(
        "scale", scaled, [](const wide_matrix& dy) { return std::array<wide_matrix, 1>{scale_vjp(dy, 2.5)}; }, one);
    CHECK_THROWS_AS((void)add(inputs[0], random_matrix(37, 25, 1)), shape_mismatch);
    CHECK_THROWS_AS((void)elementwise_product(inputs[0], random_matrix(25, 36, 1)), shape_mismatch);
    CHECK_THROWS_AS((void)elementwise_product_vjp(inputs[0], inputs[1], random_matrix(25, 36, 1)), shape_mismatch);
}

namespace {
template <class F, class Vjp>
void check_activation(const std::string& name, const F& f, const Vjp& vjp)
{
    // More elements than one block, none within the difference step of relu's kink.
    wide_matrix x = random_matrix(27, 39, 4, 2.0);
    for (Eigen::Index i = 0; i < x.size(); ++i) {
        if (std::abs(x.data()[i]) < 1e-3) { x.data()[i] = 0.1; }
    }
    const std::array<wide_matrix, 1> inputs{x};
    reference::check_operation(name, f, inputs);
    reference::check_vjp(
        name, f, [&](const wide_matrix& dy) { return std::array<wide_matrix, 1>{vjp(x, dy)}; }, inputs);
    CHECK_THROWS_AS((void)vjp(x, random_matrix(2, 2, 1)), shape_mismatch);
}
} // namespace

TEST_CASE("relu: derivatives")
{
    check_activation(
        "relu", [](const auto& x) { return relu(x); }, [](const auto& x, const auto& dy) { return relu_vjp(x, dy); });
}
TEST_CASE("gelu: derivatives")
{
    check_activation(
        "gelu", [](const auto& x) { return gelu(x); }, [](const auto& x, const auto& dy) { return gelu_vjp(x, dy); });
}
TEST_CASE("gelu_tanh: derivatives")
{
    check_activation(
        "gelu_tanh", [](const auto& x) { return gelu_tanh(x); },
        [](const auto& x, const auto& dy) { return gelu_tanh_vjp(x, dy); });
}
TEST_CASE("silu: derivatives")
{
    check_activation(
        "silu", [](const auto& x) { return silu(x); }, [](const auto& x, const auto& dy) { return silu_vjp(x, dy); });
}
TEST_CASE("sigmoid: derivatives")
{
    check_activation(
        "sigmoid", [](const auto& x) { return sigmoid(x); },
        [](const auto& x, const auto& dy) { return sigmoid_vjp(x, dy); });
}
TEST_CASE("tanh: derivatives")
{
    check_activation(
        "tanh", [](const auto& x) { return taskvec::tanh(x); },
        [](const auto& x, const auto& dy) { return tanh_vjp(x, dy); });
}

TEST_CASE("activations against their formulas, in f64 and in f32 over the whole useful range")
{
    const Eigen::Index n = 4001;
    wide_matrix x(1, n), v = wide_matrix::Ones(1, n);
    for (Eigen::Index i = 0; i < n; ++i) { x(0, i) = -20 + 0.01 * static_cast<double>(i); }
    const row_matrix<float> x32 = x.cast<float>(), v32 = v.cast<float>();
    const auto check = [&](const std::string& name, const auto& f, const auto& exact, const auto& slope,
                           double tolerance64 = 1e-14) {
        CAPTURE(name);
        const auto y = f(primal_tangent<double>(x, v));
        const auto y32 = f(primal_tangent<float>(x32, v32));
        for (Eigen::Index i = 0; i < n; ++i) {
            const double at = x(0, i), at32 = static_cast<double>(x32(0, i));
            CHECK(std::abs(y.primal()(0, i) - exact(at)) <= tolerance64 * (1 + std::abs(exact(at))));
            CHECK(std::abs(y.tangent()(0, i) - slope(at)) <= 4 * tolerance64);
            CHECK(std::abs(static_cast<double>(y32.primal()(0, i)) - exact(at32))
                <= 6e-7 * std::max(2e-2, std::abs(exact(at32))));
            CHECK(std::abs(static_cast<double>(y32.tangent()(0, i)) - slope(at32)) <= 2.5e-6);
        }
    };
    const auto logistic = [](double t) { return 1 / (1 + std::exp(-t)); };
    const auto phi = [](double t) { return 0.5 * std::erfc(-t / std::sqrt(2.0)); };
    const auto density = [](double t) { return std::exp(-0.5 * t * t) / std::sqrt(2 * std::acos(-1.0)); };
    const auto inner = [](double t) { return std::sqrt(2 / std::acos(-1.0)) * (t + 0.044715 * t * t * t); };
    check(
        "relu", [](const auto& t) { return relu(t); }, [](double t) { return t > 0 ? t : 0; },
        [](double t) { return t > 0 ? 1.0 : 0.0; });
    check(
        "sigmoid", [](const auto& t) { return sigmoid(t); }, logistic,
        [&](double t) { return logistic(t) * (1 - logistic(t)); });
    check(
        "tanh", [](const auto& t) { return taskvec::tanh(t); }, [](double t) { return std::tanh(t); },
        [](double t) { return 1 - std::tanh(t) * std::tanh(t); });
    check(
        "silu", [](const auto& t) { return silu(t); }, [&](double t) { return t * logistic(t); },
        [&](double t) { return logistic(t) * (1 + t * (1 - logistic(t))); });
    check(
        "gelu", [](const auto& t) { return gelu(t); }, [&](double t) { return t * phi(t); },
        [&](double t) { return phi(t) + t * density(t); });
    check(
        "gelu_tanh", [](const auto& t) { return gelu_tanh(t); },
        [&](double t) { return t * 0.5 * (1 + std::tanh(inner(t))); },
        [&](double t) {
            const double h = std::tanh(inner(t));
            return 0.5 * (1 + h) + 0.5 * t * (1 - h * h) * std::sqrt(2 / std::acos(-1.0)) * (1 + 3 * 0.044715 * t * t);
        });
}

TEST_CASE("gelu in f32 keeps relative accuracy in the negative tail")
{
    for (double at = -5.5; at < 0; at += 0.125) {
        const auto y = gelu(row_matrix<float>::Constant(1, 1, static_cast<float>(at)).eval());
        const double exact = at * 0.5 * std::erfc(-at / std::sqrt(2.0));
        CHECK(static_cast<double>(y(0, 0)) == doctest::Approx(exact).epsilon(3e-6));
    }
}

TEST_CASE("non-differentiable and non-finite points have documented values")
{
    const wide_matrix zero = wide_matrix::Zero(1, 1), one = wide_matrix::Ones(1, 1);
    const auto y = relu(primal_tangent<double>(zero, one));
    CHECK(y.primal()(0, 0) == 0);
    CHECK(y.tangent()(0, 0) == 0);
    CHECK(relu_vjp(zero, one)(0, 0) == 0);
    const wide_matrix nan = wide_matrix::Constant(1, 1, std::numeric_limits<double>::quiet_NaN());
    CHECK(std::isnan(relu(nan)(0, 0)));
}

#if TASKVEC_CHECK_TANGENTS
TEST_CASE("debug builds: NaN in a tangent names the operation that made it")
{
    const double infinity = std::numeric_limits<double>::infinity();
    const wide_matrix zero = wide_matrix::Zero(1, 3);
    wide_matrix tangent = wide_matrix::Ones(1, 3);
    tangent(0, 1) = infinity;
    const primal_tangent<double> x(zero, tangent);
    CHECK_THROWS_WITH_AS((void)elementwise_product(x, zero),
        "operation 'elementwise_product' made a NaN in its tangent at row 0, column 1 of [1, 3]; look at its inputs "
        "there (an infinite primal or tangent, or a "
        "derivative that does not exist)",
        nonfinite_error);
    CHECK_THROWS_AS((void)relu(primal_tangent<double>(wide_matrix(wide_matrix::Constant(1, 3, -1)), tangent)),
        nonfinite_error); // 0·∞
}
#endif
