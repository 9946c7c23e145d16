// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/linear.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using reference::random_matrix;
using reference::wide_matrix;

TEST_CASE("matmul: values, tangents and gradients")
{
    const std::array<wide_matrix, 2> inputs{random_matrix(5, 7, 1), random_matrix(7, 3, 2)};
    const auto f = [](const auto& a, const auto& b) { return matmul(a, b); };
    CHECK(reference::largest_difference(matmul(inputs[0], inputs[1]), wide_matrix(inputs[0].lazyProduct(inputs[1])))
        < 1e-13);
    reference::check_operation("matmul", f, inputs);
    reference::check_vjp(
        "matmul", f,
        [&](const wide_matrix& dy) {
            const auto gradient = matmul_vjp(inputs[0], inputs[1], dy);
            return std::array<wide_matrix, 2>{gradient.a, gradient.b};
        },
        inputs);
}

TEST_CASE("linear: values, tangents and gradients, with and without a bias")
{
    const std::array<wide_matrix, 3> inputs{random_matrix(6, 4, 1), random_matrix(5, 4, 2), random_matrix(1, 5, 3)};
    const auto f = [](const auto& x, const auto& w, const auto& bias) { return linear(x, w, bias); };
    wide_matrix expected = inputs[0].lazyProduct(inputs[1].transpose());
    CHECK(reference::largest_difference(linear(inputs[0], inputs[1]), expected) < 1e-13);
    expected.rowwise() += inputs[2].row(0);
    CHECK(reference::largest_difference(linear(inputs[0], inputs[1], inputs[2]), expected) < 1e-13);
    CHECK(
        reference::largest_difference(linear(inputs[0], inputs[1], wide_matrix()), linear(inputs[0], inputs[1])) == 0);
    reference::check_operation("linear", f, inputs);
    reference::check_vjp(
        "linear", f,
        [&](const wide_matrix& dy) {
            const auto gradient = linear_vjp(inputs[0], inputs[1], dy);
            return std::array<wide_matrix, 3>{gradient.x, gradient.w, gradient.bias};
        },
        inputs);
    const auto only_weight = linear_vjp(inputs[0], inputs[1], expected, {.x = false, .bias = false});
    CHECK(only_weight.x.size() == 0);
    CHECK(only_weight.bias.size() == 0);
    CHECK(only_weight.w.size() == 20);
}

TEST_CASE("add_bias: one row, and a period of rows")
{
    for (const Eigen::Index period : {1, 3}) {
        const std::array<wide_matrix, 2> inputs{random_matrix(6, 4, 1), random_matrix(period, 4, 2)};
        const auto f = [](const auto& x, const auto& bias) { return add_bias(x, bias); };
        const wide_matrix y = add_bias(inputs[0], inputs[1]);
        CHECK(y(4, 2) == inputs[0](4, 2) + inputs[1](4 % period, 2));
        reference::check_operation("add_bias", f, inputs);
        reference::check_vjp(
            "add_bias", f,
            [&](const wide_matrix& dy) { return std::array<wide_matrix, 2>{dy, add_bias_vjp(dy, period)}; }, inputs);
    }
}

TEST_CASE("operands of any Eigen layout are accepted: column-major, blocks, vectors, expressions")
{
    const wide_matrix x = random_matrix(4, 6, 1), w = random_matrix(3, 6, 2), bias = random_matrix(1, 3, 3);
    const Eigen::MatrixXd column_major = x;
    const Eigen::VectorXd vector = bias.row(0);
    const wide_matrix expected = linear(x, w, bias);
    CHECK(reference::largest_difference(linear(column_major, w, vector), expected) == 0);
    CHECK(reference::largest_difference(linear(2.0 * x, w, 2.0 * bias), 2 * expected) < 1e-13);
    const wide_matrix wide = random_matrix(4, 10, 5);
    CHECK(reference::largest_difference(linear(wide.middleCols(2, 6), w), linear(wide_matrix(wide.middleCols(2, 6)), w))
        == 0);
    CHECK(reference::largest_difference(linear(x, w, bias.row(0)), expected) == 0);
}

TEST_CASE("wrong shapes are named errors")
{
    const wide_matrix x = random_matrix(4, 6, 1), w = random_matrix(3, 5, 2);
    CHECK_THROWS_WITH_AS(
        (void)linear(x, w), "operation 'linear': the number of columns of x is 6, expected 5", shape_mismatch);
    CHECK_THROWS_AS((void)matmul(x, w), shape_mismatch);
    CHECK_THROWS_AS((void)linear(x, random_matrix(3, 6, 2), random_matrix(1, 4, 3)), shape_mismatch);
    CHECK_THROWS_AS((void)add_bias(x, random_matrix(3, 6, 2)), shape_mismatch);
    CHECK_THROWS_AS((void)add_bias_vjp(x, 3), invalid_argument);
    CHECK_THROWS_AS((void)linear_vjp(x, random_matrix(3, 6, 2), x), shape_mismatch);
    CHECK_THROWS_WITH_AS(primal_tangent<double>(x, w),
        "'primal_tangent': the primal is [4, 6] and its tangent [3, 5]; they must have the same shape", shape_mismatch);
    CHECK_THROWS_AS((void)primal_tangent<double>::borrow(x, w, "layer.weight"), shape_mismatch);
}

TEST_CASE("float operands agree with double to f32 rounding")
{
    const auto x = random_matrix<float>(9, 17, 1), w = random_matrix<float>(5, 17, 2),
               bias = random_matrix<float>(1, 5, 3);
    const auto v = random_matrix<float>(9, 17, 4);
    const auto y = linear(primal_tangent<float>(x, v), w, bias);
    const auto exact =
        linear(primal_tangent<double>(x.cast<double>(), v.cast<double>()), w.cast<double>(), bias.cast<double>());
    CHECK(reference::largest_difference(y.primal(), exact.primal()) < 1e-5);
    CHECK(reference::largest_difference(y.tangent(), exact.tangent()) < 1e-5);
}
