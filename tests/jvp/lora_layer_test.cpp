// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/lora_layer.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using reference::matrix;
using reference::random_matrix;

namespace {
const matrix x = random_matrix(6, 7, 1), w = random_matrix(5, 7, 2), bias = random_matrix(1, 5, 3),
             a = random_matrix(2, 7, 4), b = random_matrix(5, 2, 5);
} // namespace

TEST_CASE("lora_linear: values and tangents for every choice of active operands")
{
    const auto f = [](const auto& x_, const auto& w_, const auto& bias_, const auto& a_, const auto& b_) {
        return lora_linear(x_, w_, bias_, a_, b_, 0.75);
    };
    const matrix expected = linear(x, matrix(w + 0.75 * b * a), bias);
    CHECK(reference::largest_difference(lora_linear(x, w, bias, a, b, 0.75), expected) < 1e-13);
    reference::check_operation("lora_linear", f, std::array<matrix, 5>{x, w, bias, a, b});
}

TEST_CASE("lora_layer: forward, gradients, dense weight")
{
    lora_layer<double> layer(w, bias, {.a = a, .b = b, .scaling = 0.75});
    CHECK(layer.weight().data() == w.data()); // borrowed
    matrix hidden;
    const matrix y = layer.forward(x, hidden);
    CHECK(reference::largest_difference(y, layer.forward(x)) == 0);
    CHECK(reference::largest_difference(y, linear(x, layer.dense(), bias)) < 1e-13);
    const auto f = [](const auto& x_, const auto& a_, const auto& b_) {
        return lora_linear(x_, w, bias, a_, b_, 0.75);
    };
    reference::check_vjp(
        "lora_layer", f,
        [&](const matrix& dy) {
            const auto gradient = layer.vjp(x, hidden, dy);
            return std::array<matrix, 3>{gradient.x, gradient.a, gradient.b};
        },
        std::array<matrix, 3>{x, a, b});
    const auto partial = layer.vjp(x, hidden, y, {.x = false, .a = false});
    CHECK(partial.x.size() + partial.a.size() == 0);
    CHECK(partial.b.size() == 10);
}

TEST_CASE("lora_layer passes tangents through")
{
    const matrix v = random_matrix(6, 7, 9);
    const lora_layer<double> layer(w, matrix(), {.a = a, .b = b, .scaling = 2});
    const auto y = layer.forward(primal_tangent<double>(x, v));
    CHECK(reference::largest_difference(y.tangent(), linear(v, layer.dense())) < 1e-12);
}

TEST_CASE("lora_layer keeps temporaries alive and refuses wrong shapes")
{
    const lora_layer<double> layer(matrix(2 * w), random_matrix(1, 5, 3), {.a = a, .b = b});
    CHECK(reference::largest_difference(layer.weight(), matrix(2 * w)) == 0);
    CHECK(reference::largest_difference(layer.bias(), bias) == 0);
    CHECK_THROWS_AS((lora_layer<double>(w, bias, {.a = b, .b = a})), shape_mismatch);
    CHECK_THROWS_AS((void)layer.forward(w.transpose()), shape_mismatch);
    matrix hidden;
    const matrix y = layer.forward(x, hidden);
    CHECK_THROWS_AS((void)layer.vjp(x, hidden, x), shape_mismatch);
    CHECK_THROWS_AS((void)layer.vjp(x, matrix(), y), shape_mismatch);
}
