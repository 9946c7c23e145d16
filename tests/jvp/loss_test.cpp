// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/loss.hpp>

#include "../reference/derivatives.hpp"

#include <vector>

using namespace taskvec;
using reference::random_matrix;
using reference::wide_matrix;

TEST_CASE("cross_entropy: value, tangents and gradient")
{
    const std::vector<int> labels{2, 0, 3, 3, 1};
    const std::array<wide_matrix, 1> inputs{random_matrix(5, 4, 1, 3.0)};
    double expected = 0;
    for (Eigen::Index row = 0; row < 5; ++row) {
        double sum = 0;
        for (Eigen::Index col = 0; col < 4; ++col) { sum += std::exp(inputs[0](row, col)); }
        expected += std::log(sum) - inputs[0](row, labels[static_cast<std::size_t>(row)]);
    }
    CHECK(cross_entropy(inputs[0], labels) == doctest::Approx(expected / 5).epsilon(1e-14));
    const auto f = [&](const auto& x) { return cross_entropy(x, labels); };
    reference::check_operation("cross_entropy", f, inputs);
    reference::check_vjp(
        "cross_entropy", f,
        [&](const wide_matrix& dy) {
            return std::array<wide_matrix, 1>{cross_entropy_vjp(inputs[0], labels, dy(0, 0))};
        },
        inputs);
}

TEST_CASE("cross_entropy is stable for large logits and accepts every kind of integer label")
{
    wide_matrix logits(2, 3);
    logits << 1e4, 0, -1e4, -1e4, 1e4, 0;
    CHECK(cross_entropy(logits, std::vector<std::int64_t>{0, 1}) == 0);
    CHECK(cross_entropy(logits, std::array<std::uint8_t, 2>{1, 1}) == doctest::Approx(5e3));
    CHECK(cross_entropy_vjp(logits, std::vector<std::int64_t>{1, 1})(0, 0) == 0.5);
}

TEST_CASE("cross_entropy: wrong labels are named errors")
{
    const wide_matrix logits = random_matrix(2, 3, 1);
    CHECK_THROWS_AS((void)cross_entropy(logits, std::vector<int>{0}), shape_mismatch);
    CHECK_THROWS_WITH_AS((void)cross_entropy(logits, std::vector<int>{0, 3}),
        "operation 'cross_entropy': label 3 of row 1 is outside [0, 3)", invalid_argument);
    CHECK_THROWS_AS((void)cross_entropy_vjp(logits, std::vector<int>{-1, 0}), invalid_argument);
    CHECK_THROWS_AS((void)cross_entropy(wide_matrix(0, 3), std::vector<int>{}), invalid_argument);
}

TEST_CASE("mean and mean_rows: values, tangents and gradients")
{
    const std::array<wide_matrix, 1> inputs{random_matrix(6, 5, 1)};
    CHECK(mean(inputs[0]) == doctest::Approx(inputs[0].mean()).epsilon(1e-15));
    const auto average = [](const auto& x) { return mean(x); };
    reference::check_operation("mean", average, inputs);
    reference::check_vjp(
        "mean", average,
        [&](const wide_matrix& dy) { return std::array<wide_matrix, 1>{mean_vjp(inputs[0], dy(0, 0))}; }, inputs);
    const auto pool = [](const auto& x) { return mean_rows(x, 3); };
    const wide_matrix pooled = pool(inputs[0]);
    CHECK(pooled.rows() == 2);
    CHECK(pooled(1, 4) == doctest::Approx((inputs[0](3, 4) + inputs[0](4, 4) + inputs[0](5, 4)) / 3));
    reference::check_operation("mean_rows", pool, inputs);
    reference::check_vjp(
        "mean_rows", pool, [&](const wide_matrix& dy) { return std::array<wide_matrix, 1>{mean_rows_vjp(dy, 3)}; },
        inputs);
    CHECK_THROWS_AS((void)mean_rows(inputs[0], 4), invalid_argument);
    CHECK_THROWS_AS((void)mean(wide_matrix(0, 0)), invalid_argument);
    CHECK_THROWS_AS((void)mean_vjp(wide_matrix(0, 0)), invalid_argument);
}
