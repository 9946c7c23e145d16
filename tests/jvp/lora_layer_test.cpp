// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/lora_layer.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using eigen_matrix = row_matrix<double>;
using reference::random_matrix;

namespace {
const eigen_matrix x = random_matrix(6, 7, 1), w = random_matrix(5, 7, 2), bias = random_matrix(1, 5, 3),
                   a = random_matrix(2, 7, 4), b = random_matrix(5, 2, 5);
} // namespace

TEST_CASE("lora_linear: values and tangents for every choice of active operands")
{
    const auto f = [](const auto& x_, const auto& w_, const auto& bias_, const auto& a_, const auto& b_) {
        return lora_linear(x_, w_, bias_, a_, b_, 0.75);
    };
    const eigen_matrix expected = linear(x, eigen_matrix(w + 0.75 * b * a), bias);
    CHECK(reference::largest_difference(lora_linear(x, w, bias, a, b, 0.75), expected) < 1e-13);
    reference::check_operation("lora_linear", f, std::array<eigen_matrix, 5>{x, w, bias, a, b});
}

TEST_CASE("lora_layer: forward, gradients, dense weight")
{
    lora_layer<double> layer(w, bias, make_lora(b, a, 0.75));
    CHECK(layer.weight().data() == w.data()); // borrowed
    eigen_matrix hidden;
    const eigen_matrix y = layer.forward(x, hidden);
    CHECK(reference::largest_difference(y, layer.forward(x)) == 0);
    CHECK(layer.a() == a);
    CHECK(layer.b() == b);
    CHECK(layer.adapter().scaling == 0.75);
    CHECK(reference::largest_difference(y, linear(x, layer.dense(), bias)) < 1e-13);
    const auto f = [](const auto& x_, const auto& a_, const auto& b_) {
        return lora_linear(x_, w, bias, a_, b_, 0.75);
    };
    reference::check_vjp(
        "lora_layer", f,
        [&](const eigen_matrix& dy) {
            const auto gradient = layer.vjp(x, hidden, dy);
            return std::array<eigen_matrix, 3>{gradient.x, gradient.a, gradient.b};
        },
        std::array<eigen_matrix, 3>{x, a, b});
    const auto partial = layer.vjp(x, hidden, y, {.x = false, .a = false});
    CHECK(partial.x.size() + partial.a.size() == 0);
    CHECK(partial.b.size() == 10);
}

TEST_CASE("lora_layer passes tangents through")
{
    const eigen_matrix v = random_matrix(6, 7, 9);
    const lora_layer<double> layer(w, eigen_matrix(), make_lora(b, a, 2));
    const auto y = layer.forward(primal_tangent<double>(x, v));
    CHECK(reference::largest_difference(y.tangent(), linear(v, layer.dense())) < 1e-12);
}

TEST_CASE("lora_layer takes another adapter, in either order, and trains it in place")
{
    lora_layer<double> layer(w, bias, make_lora(b, a, 0.75));
    const eigen_matrix before = layer.forward(x), other_a = random_matrix(3, 7, 6), other_b = random_matrix(5, 3, 7);
    lora_update<double> by_columns{taskvec::matrix<double>(5, 3), taskvec::matrix<double>(3, 7), 2};
    for (std::size_t k = 0; k < 3; ++k) {
        for (std::size_t i = 0; i < 5; ++i) {
            by_columns.b(i, k) = other_b(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(k));
        }
        for (std::size_t j = 0; j < 7; ++j) {
            by_columns.a(k, j) = other_a(static_cast<Eigen::Index>(k), static_cast<Eigen::Index>(j));
        }
    }
    CHECK_THROWS_AS((void)as_row_matrix(by_columns.a), invalid_argument);
    layer.set(by_columns);
    CHECK(layer.rank() == 3);
    CHECK(layer.forward(x) == lora_linear(x, w, bias, other_a, other_b, 2.0));
    layer.set(make_lora(eigen_matrix(0 * b), a, 0.75));
    layer.b() += b;
    CHECK(layer.forward(x) == before);
    CHECK_THROWS_AS(layer.set(make_lora(random_matrix(4, 2, 1), a)), shape_mismatch);
}

TEST_CASE("lora_layer keeps temporaries alive and refuses wrong shapes")
{
    const lora_layer<double> layer(eigen_matrix(2 * w), random_matrix(1, 5, 3), make_lora(b, a));
    CHECK(reference::largest_difference(layer.weight(), eigen_matrix(2 * w)) == 0);
    CHECK(reference::largest_difference(layer.bias(), bias) == 0);
    CHECK_THROWS_AS((lora_layer<double>(w, bias, make_lora(random_matrix(4, 2, 1), a))), shape_mismatch);
    CHECK_THROWS_AS((void)make_lora(a, b), shape_mismatch);
    CHECK_THROWS_AS((void)layer.forward(w.transpose()), shape_mismatch);
    eigen_matrix hidden;
    const eigen_matrix y = layer.forward(x, hidden);
    CHECK_THROWS_AS((void)layer.vjp(x, hidden, x), shape_mismatch);
    CHECK_THROWS_AS((void)layer.vjp(x, eigen_matrix(), y), shape_mismatch);
}
