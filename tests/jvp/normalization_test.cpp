// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/normalization.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using reference::random_matrix;
using reference::wide_matrix;

TEST_CASE("softmax: values, tangents and gradient")
{
    const std::array<wide_matrix, 1> inputs{random_matrix(4, 6, 1, 2.0)};
    const auto f = [](const auto& x) { return softmax(x); };
    const wide_matrix y = f(inputs[0]);
    for (Eigen::Index row = 0; row < 4; ++row) {
        double sum = 0;
        for (Eigen::Index col = 0; col < 6; ++col) { sum += std::exp(inputs[0](row, col)); }
        for (Eigen::Index col = 0; col < 6; ++col) {
            CHECK(y(row, col) == doctest::Approx(std::exp(inputs[0](row, col)) / sum).epsilon(1e-14));
        }
    }
    reference::check_operation("softmax", f, inputs);
    reference::check_vjp(
        "softmax", f, [&](const wide_matrix& dy) { return std::array<wide_matrix, 1>{softmax_vjp(y, dy)}; }, inputs);
    CHECK(softmax(wide_matrix(wide_matrix::Constant(1, 2, 1e8)))(0, 0) == 0.5);
    CHECK_THROWS_AS((void)softmax(wide_matrix(2, 0)), invalid_argument);
    CHECK_THROWS_AS((void)softmax_vjp(y, random_matrix(6, 4, 1)), shape_mismatch);
}

TEST_CASE("layer_norm: values, tangents and gradients")
{
    const std::array<wide_matrix, 3> inputs{
        random_matrix(4, 9, 1, 2.0), random_matrix(1, 9, 2), random_matrix(1, 9, 3)};
    const normalization_options options{.epsilon = 1e-3};
    const auto f = [&](const auto& x, const auto& gamma, const auto& beta) {
        return layer_norm(x, gamma, beta, options);
    };
    const wide_matrix y = f(inputs[0], inputs[1], inputs[2]);
    for (Eigen::Index row = 0; row < 4; ++row) {
        double average = 0, variance = 0;
        for (Eigen::Index col = 0; col < 9; ++col) { average += inputs[0](row, col) / 9; }
        for (Eigen::Index col = 0; col < 9; ++col) {
            variance += (inputs[0](row, col) - average) * (inputs[0](row, col) - average) / 9;
        }
        for (Eigen::Index col = 0; col < 9; ++col) {
            CHECK(y(row, col)
                == doctest::Approx((inputs[0](row, col) - average) / std::sqrt(variance + 1e-3) * inputs[1](0, col)
                    + inputs[2](0, col))
                    .epsilon(1e-12));
        }
    }
    reference::check_operation("layer_norm", f, inputs);
    reference::check_vjp(
        "layer_norm", f,
        [&](const wide_matrix& dy) {
            const auto gradient = layer_norm_vjp(inputs[0], inputs[1], dy, options);
            return std::array<wide_matrix, 3>{gradient.x, gradient.gamma, gradient.beta};
        },
        inputs);
    // Without gamma and beta
    const wide_matrix none;
    const std::array<wide_matrix, 1> x{inputs[0]};
    const auto plain = [&](const auto& input) {
        const row_matrix<operand_scalar<decltype(input)>> empty;
        return layer_norm(input, empty, empty, options);
    };
    CHECK(
        reference::largest_difference(plain(inputs[0]),
            layer_norm(inputs[0], wide_matrix(wide_matrix::Ones(1, 9)), wide_matrix(wide_matrix::Zero(1, 9)), options))
        == 0);
    reference::check_operation("layer_norm without gamma and beta", plain, x);
    reference::check_vjp(
        "layer_norm without gamma and beta", plain,
        [&](const wide_matrix& dy) {
            return std::array<wide_matrix, 1>{layer_norm_vjp(inputs[0], none, dy, options).x};
        },
        x);
    CHECK_THROWS_AS((void)layer_norm(inputs[0], random_matrix(1, 8, 1), none), shape_mismatch);
    CHECK_THROWS_AS((void)layer_norm(inputs[0], none, random_matrix(2, 9, 1)), shape_mismatch);
}

TEST_CASE("rms_norm: values, tangents and gradients")
{
    const std::array<wide_matrix, 2> inputs{random_matrix(4, 9, 1, 2.0), random_matrix(1, 9, 2)};
    const normalization_options options{.epsilon = 1e-2};
    const auto f = [&](const auto& x, const auto& gamma) { return rms_norm(x, gamma, options); };
    const wide_matrix y = f(inputs[0], inputs[1]);
    for (Eigen::Index row = 0; row < 4; ++row) {
        double square = 0;
        for (Eigen::Index col = 0; col < 9; ++col) { square += inputs[0](row, col) * inputs[0](row, col) / 9; }
        for (Eigen::Index col = 0; col < 9; ++col) {
            CHECK(y(row, col)
                == doctest::Approx(inputs[0](row, col) / std::sqrt(square + 1e-2) * inputs[1](0, col)).epsilon(1e-12));
        }
    }
    reference::check_operation("rms_norm", f, inputs);
    reference::check_vjp(
        "rms_norm", f,
        [&](const wide_matrix& dy) {
            const auto gradient = rms_norm_vjp(inputs[0], inputs[1], dy, options);
            CHECK(gradient.beta.size() == 0);
            return std::array<wide_matrix, 2>{gradient.x, gradient.gamma};
        },
        inputs);
    CHECK(reference::largest_difference(rms_norm(inputs[0], wide_matrix(), options),
              rms_norm(inputs[0], wide_matrix(wide_matrix::Ones(1, 9)), options))
        == 0);
}
