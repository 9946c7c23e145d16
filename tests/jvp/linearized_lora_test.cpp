// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/linearized_lora.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using reference::matrix;
using reference::random_matrix;

namespace {
const matrix x = random_matrix(6, 7, 1), w = random_matrix(5, 7, 2), bias = random_matrix(1, 5, 3),
             a0 = random_matrix(2, 7, 4), zero = matrix::Zero(5, 2), nonzero = random_matrix(5, 2, 5),
             delta_a = random_matrix(2, 7, 6), delta_b = random_matrix(5, 2, 7);
const double s = 0.75;

linearized_lora_layer<double> moved(const matrix& b0)
{
    linearized_lora_layer<double> layer(w, bias, {.a = a0, .b = b0, .scaling = s});
    layer.set({.a = a0 + delta_a, .b = b0 + delta_b, .scaling = s});
    return layer;
}
} // namespace

TEST_CASE("linearized_lora_layer: the formula, for B0 = 0 and not")
{
    for (const auto& b0 : {zero, nonzero}) {
        const auto layer = moved(b0);
        const matrix weight = w + s * (b0 * a0 + b0 * delta_a + delta_b * a0);
        const matrix expected = linear(x, weight, bias);
        matrix hidden;
        CHECK(reference::largest_difference(layer.forward(x), expected) < 1e-12);
        CHECK(reference::largest_difference(layer.forward(x, hidden), expected) < 1e-12);
        CHECK(reference::largest_difference(layer.dense(), weight) < 1e-13);
        CHECK(reference::largest_difference(layer.adapter().a, a0 + delta_a) < 1e-15);
        CHECK(reference::largest_difference(layer.adapter().b, b0 + delta_b) == 0);
        CHECK(reference::largest_difference(layer.initial().a, a0) == 0);
        CHECK(reference::largest_difference(layer.initial().b, b0) == 0);
    }
}

TEST_CASE("linearized_lora_layer is the jvp of the LoRA layer in its factors")
{
    for (const auto& b0 : {zero, nonzero}) {
        const auto expansion =
            lora_linear(x, w, bias, primal_tangent<double>(a0, delta_a), primal_tangent<double>(b0, delta_b), s);
        CHECK(reference::largest_difference(moved(b0).forward(x), matrix(expansion.primal() + expansion.tangent()))
            < 1e-12);
    }
}

TEST_CASE("linearized_lora_layer: exact at its initialisation, and linear in φ")
{
    for (const auto& b0 : {zero, nonzero}) {
        linearized_lora_layer<double> layer(w, bias, {.a = a0, .b = b0, .scaling = s});
        const matrix at_0 = layer.forward(x);
        CHECK(reference::largest_difference(at_0, lora_linear(x, w, bias, a0, b0, s)) < 1e-13);
        const auto at = [&](double t) {
            layer.delta_a() = t * delta_a;
            layer.b() = b0 + t * delta_b;
            return matrix(layer.forward(x) - at_0);
        };
        CHECK(reference::largest_difference(at(3.0), matrix(3.0 * at(1.0))) < 1e-12);
        CHECK(reference::largest_difference(at(-2.0), matrix(-2.0 * at(1.0))) < 1e-12);
    }
}

TEST_CASE("linearized_lora_layer: fold() and dense() equal the layer; the rank is r where B0 = 0, else 2r")
{
    for (const auto& b0 : {zero, nonzero}) {
        const auto layer = moved(b0);
        const auto folded = layer.fold();
        CHECK(folded.rank() == (b0 == zero ? 2 : 4));
        CHECK(layer.stacked_rank() == folded.rank());
        const lora_layer<double> plain(w, bias, folded);
        CHECK(reference::largest_difference(plain.forward(x), layer.forward(x)) == 0);
        CHECK(reference::largest_difference(plain.dense(), layer.dense()) < 1e-13);
        CHECK(reference::largest_difference(linear(x, layer.dense(), bias), layer.forward(x)) < 1e-12);
    }
}

TEST_CASE("linearized_lora_layer: gradients, and exactly zero for A where B0 = 0")
{
    for (const auto& b0 : {zero, nonzero}) {
        const auto layer = moved(b0);
        matrix hidden;
        const matrix y = layer.forward(x, hidden), dy = random_matrix(y.rows(), y.cols(), 20);
        const auto gradient = layer.vjp(x, hidden, dy);
        // ⟨dy, f⟩ is linear in x and in φ: a difference of any step is its derivative.
        const auto value = [&](const matrix& input, const matrix& da, const matrix& db) {
            auto other = moved(b0);
            other.delta_a() += da;
            other.b() += db;
            return (dy.array() * other.forward(input).array()).sum();
        };
        const matrix no_a = matrix::Zero(2, 7), no_b = matrix::Zero(5, 2), vx = random_matrix(6, 7, 21),
                     va = random_matrix(2, 7, 22), vb = random_matrix(5, 2, 23);
        const double at = value(x, no_a, no_b);
        CHECK(
            (gradient.x.array() * vx.array()).sum() == doctest::Approx(value(x + vx, no_a, no_b) - at).epsilon(1e-10));
        CHECK((gradient.a.array() * va.array()).sum() == doctest::Approx(value(x, va, no_b) - at).epsilon(1e-10));
        CHECK((gradient.b.array() * vb.array()).sum() == doctest::Approx(value(x, no_a, vb) - at).epsilon(1e-10));
        CHECK((b0 == zero) == (gradient.a.array() == 0).all());
        const auto partial = layer.vjp(x, hidden, dy, {.x = false, .b = false});
        CHECK(partial.x.size() + partial.b.size() == 0);
        CHECK(partial.a == gradient.a);
    }
}

TEST_CASE("linearized_lora_layer passes tangents of its input through")
{
    const matrix v = random_matrix(6, 7, 9);
    const auto layer = moved(nonzero);
    const auto y = layer.forward(primal_tangent<double>(x, v));
    CHECK(reference::largest_difference(y.tangent(), linear(v, layer.dense())) < 1e-12);
}

TEST_CASE("linearized_lora_layer: errors")
{
    auto layer = moved(nonzero);
    CHECK_THROWS_AS(layer.set({.a = a0, .b = zero, .scaling = 1}), invalid_argument);
    CHECK_THROWS_AS(
        layer.set({.a = random_matrix(3, 7, 1), .b = random_matrix(5, 3, 1), .scaling = s}), shape_mismatch);
    CHECK_THROWS_AS((linearized_lora_layer<double>(w, bias, {.a = zero, .b = a0})), shape_mismatch);
    CHECK_THROWS_AS(
        (linearized_lora_layer<double>(w, random_matrix(1, 4, 1), {.a = a0, .b = zero}).forward(x)), shape_mismatch);
}

TEST_CASE("linearized_lora_layer in f32")
{
    const row_matrix<float> x32 = x.cast<float>(), w32 = w.cast<float>(), bias32 = bias.cast<float>();
    linearized_lora_layer<float> layer(
        w32, bias32, {.a = a0.cast<float>(), .b = nonzero.cast<float>(), .scaling = 0.75f});
    layer.set({.a = (a0 + delta_a).cast<float>(), .b = (nonzero + delta_b).cast<float>(), .scaling = 0.75f});
    CHECK(reference::largest_difference(layer.forward(x32), moved(nonzero).forward(x)) < 2e-5);
}
