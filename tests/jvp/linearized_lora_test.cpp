// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/linearized_lora.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using eigen_matrix = row_matrix<double>;
using reference::random_matrix;

namespace {
const eigen_matrix x = random_matrix(6, 7, 1), w = random_matrix(5, 7, 2), bias = random_matrix(1, 5, 3),
                   a0 = random_matrix(2, 7, 4), zero = eigen_matrix::Zero(5, 2), nonzero = random_matrix(5, 2, 5),
                   delta_a = random_matrix(2, 7, 6), delta_b = random_matrix(5, 2, 7);
const double s = 0.75;

linearized_lora_layer<double> moved(const eigen_matrix& b0)
{
    linearized_lora_layer<double> layer(w, bias, make_lora(b0, a0, s));
    layer.set(make_lora(b0 + delta_b, a0 + delta_a, s));
    return layer;
}
} // namespace

TEST_CASE("linearized_lora_layer: the formula, for B0 = 0 and not")
{
    for (const auto& b0 : {zero, nonzero}) {
        const auto layer = moved(b0);
        const eigen_matrix weight = w + s * (b0 * a0 + b0 * delta_a + delta_b * a0);
        const eigen_matrix expected = linear(x, weight, bias);
        eigen_matrix hidden;
        CHECK(reference::largest_difference(layer.forward(x), expected) < 1e-12);
        CHECK(reference::largest_difference(layer.forward(x, hidden), expected) < 1e-12);
        CHECK(reference::largest_difference(layer.dense(), weight) < 1e-13);
        const auto phi = layer.adapter(), phi0 = layer.initial();
        CHECK(reference::largest_difference(as_row_matrix(phi.a), a0 + delta_a) < 1e-15);
        CHECK(reference::largest_difference(as_row_matrix(phi.b), b0 + delta_b) == 0);
        CHECK(reference::largest_difference(as_row_matrix(phi0.a), a0) == 0);
        CHECK(reference::largest_difference(as_row_matrix(phi0.b), b0) == 0);
    }
}

TEST_CASE("linearized_lora_layer is the jvp of the LoRA layer in its factors")
{
    for (const auto& b0 : {zero, nonzero}) {
        const auto expansion =
            lora_linear(x, w, bias, primal_tangent<double>(a0, delta_a), primal_tangent<double>(b0, delta_b), s);
        CHECK(
            reference::largest_difference(moved(b0).forward(x), eigen_matrix(expansion.primal() + expansion.tangent()))
            < 1e-12);
    }
}

TEST_CASE("linearized_lora_layer: exact at its initialisation, and linear in φ")
{
    for (const auto& b0 : {zero, nonzero}) {
        linearized_lora_layer<double> layer(w, bias, make_lora(b0, a0, s));
        const eigen_matrix at_0 = layer.forward(x);
        CHECK(reference::largest_difference(at_0, lora_linear(x, w, bias, a0, b0, s)) < 1e-13);
        const auto at = [&](double t) {
            layer.delta_a() = t * delta_a;
            layer.b() = b0 + t * delta_b;
            return eigen_matrix(layer.forward(x) - at_0);
        };
        CHECK(reference::largest_difference(at(3.0), eigen_matrix(3.0 * at(1.0))) < 1e-12);
        CHECK(reference::largest_difference(at(-2.0), eigen_matrix(-2.0 * at(1.0))) < 1e-12);
    }
}

TEST_CASE("linearized_lora_layer: fold() and dense() equal the layer; the rank is r where B0 = 0, else 2r")
{
    for (const auto& b0 : {zero, nonzero}) {
        const auto layer = moved(b0);
        const auto folded = layer.fold();
        CHECK(folded.rank() == (b0 == zero ? 2u : 4u));
        CHECK(layer.stacked_rank() == static_cast<Eigen::Index>(folded.rank()));
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
        eigen_matrix hidden;
        const eigen_matrix y = layer.forward(x, hidden), dy = random_matrix(y.rows(), y.cols(), 20);
        const auto gradient = layer.vjp(x, hidden, dy);
        // ⟨dy, f⟩ is linear in x and in φ: a difference of any step is its derivative.
        const auto value = [&](const eigen_matrix& input, const eigen_matrix& da, const eigen_matrix& db) {
            auto other = moved(b0);
            other.delta_a() += da;
            other.b() += db;
            return (dy.array() * other.forward(input).array()).sum();
        };
        const eigen_matrix no_a = eigen_matrix::Zero(2, 7), no_b = eigen_matrix::Zero(5, 2),
                           vx = random_matrix(6, 7, 21), va = random_matrix(2, 7, 22), vb = random_matrix(5, 2, 23);
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
    const eigen_matrix v = random_matrix(6, 7, 9);
    const auto layer = moved(nonzero);
    const auto y = layer.forward(primal_tangent<double>(x, v));
    CHECK(reference::largest_difference(y.tangent(), linear(v, layer.dense())) < 1e-12);
}

TEST_CASE("linearized_lora_layer: errors")
{
    auto layer = moved(nonzero);
    CHECK_THROWS_AS(layer.set(make_lora(zero, a0, 1)), invalid_argument);
    CHECK_THROWS_AS(layer.set(make_lora(random_matrix(5, 3, 1), random_matrix(3, 7, 1), s)), shape_mismatch);
    CHECK_THROWS_AS((linearized_lora_layer<double>(w, bias, make_lora(random_matrix(4, 2, 1), a0))), shape_mismatch);
    CHECK_THROWS_AS((void)make_lora(a0, zero), shape_mismatch);
    CHECK_THROWS_AS((void)(linearized_lora_layer<double>(w, random_matrix(1, 4, 1), make_lora(zero, a0)).forward(x)),
        shape_mismatch);
}

TEST_CASE("linearized_lora_layer in f32")
{
    const row_matrix<float> x32 = x.cast<float>(), w32 = w.cast<float>(), bias32 = bias.cast<float>();
    linearized_lora_layer<float> layer(w32, bias32, make_lora(nonzero.cast<float>(), a0.cast<float>(), 0.75));
    layer.set(make_lora((nonzero + delta_b).cast<float>(), (a0 + delta_a).cast<float>(), 0.75));
    CHECK(reference::largest_difference(layer.forward(x32), moved(nonzero).forward(x)) < 2e-5);
}
