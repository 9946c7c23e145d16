// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/primal_tangent.hpp>

#include <taskvec/jvp/attention.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/embedding.hpp>
#include <taskvec/jvp/linearized_lora.hpp>
#include <taskvec/jvp/loss.hpp>

#include "../reference/derivatives.hpp"

#include <limits>
#include <utility>
#include <vector>

using namespace taskvec;
using eigen_matrix = row_matrix<double>;
using reference::random_matrix;

namespace {
const eigen_matrix x = random_matrix(3, 4, 1), v = random_matrix(3, 4, 2);
}

TEST_CASE("primal_tangent: copies and moves keep values and tangents, and do not share memory")
{
    primal_tangent<double> made(x, v);
    const auto copy = made;
    made.mutable_primal().setZero();
    made.mutable_tangent().setZero();
    CHECK(copy.primal() == x);
    CHECK(copy.tangent() == v);
    CHECK(copy.stacked());
    CHECK(copy.stack().topRows(3) == x);
    CHECK(copy.stack().bottomRows(3) == v);
    auto moved = std::move(made);
    CHECK(moved.primal().isZero(0));
    moved = copy;
    CHECK(moved.primal() == x);
    CHECK(moved.tangent() == v);
    CHECK(moved.primal().data() != copy.primal().data());
    const auto& self = moved;
    moved = self;
    CHECK(moved.tangent() == v);
}

TEST_CASE("primal_tangent: borrowed memory stays the caller's, also through copies")
{
    const auto borrowed = primal_tangent<double>::borrow(x, v);
    const auto copy = borrowed;
    CHECK(copy.primal().data() == x.data());
    CHECK(copy.tangent().data() == v.data());
    CHECK(!copy.stacked());
    const auto constant = primal_tangent<double>::borrow(x);
    CHECK(!constant.active());
    CHECK(constant.tangent_or_zero().isZero(0));
    CHECK(primal_tangent<double>::borrow(x).take_primal() == x);
    CHECK(primal_tangent<double>(x, v).take_primal() == x);
}

TEST_CASE("primal_tangent: a tangent of another shape is an error that names the matrix and both shapes")
{
    CHECK_THROWS_WITH_AS((void)primal_tangent<double>::borrow(x, random_matrix(4, 3, 1), "fc1.weight"),
        "'fc1.weight': the primal is [3, 4] and its tangent [4, 3]; they must have the same shape", shape_mismatch);
}

TEST_CASE("operations do no work for what is inactive: the result of constants is inactive")
{
    const auto constant = primal_tangent<double>::borrow(x);
    CHECK(!linear(constant, x).active());
    CHECK(!gelu(constant).active());
    CHECK(!add(constant, x).active());
    CHECK(!attention(constant, constant, constant).active());
    CHECK(linear(x, primal_tangent<double>(x, v)).active());
}

#if TASKVEC_CHECK_TANGENTS
TEST_CASE("debug builds: every operation names itself when it makes a NaN in a tangent")
{
    const double infinity = std::numeric_limits<double>::infinity();
    const eigen_matrix zero = eigen_matrix::Zero(3, 4), one = eigen_matrix::Ones(1, 4), none;
    eigen_matrix wild = v, opposite = v;
    wild(1, 2) = infinity;
    opposite(1, 2) = -infinity;
    const primal_tangent<double> a(x, wild), b(x, opposite);
    const std::vector<int> rows{0, 1}, labels{0, 2, 2};
    const auto named = [](const char* operation, const auto& f) {
        CAPTURE(std::string(operation));
        std::string said;
        try {
            (void)f();
        }
        catch (const nonfinite_error& e) {
            said = e.what();
        }
        CHECK(said.starts_with("operation '" + std::string(operation) + "' made a NaN in its tangent"));
    };
    named("add", [&] { return add(a, b); });
    named("subtract", [&] { return subtract(a, a); });
    named("scale", [&] { return scale(a, 0.0); });
    named("elementwise_product", [&] { return elementwise_product(a, zero); });
    named("matmul", [&] { return matmul(a, eigen_matrix(zero.transpose())); });
    named("linear", [&] { return linear(a, zero); });
    named("add_bias", [&] { return add_bias(a, primal_tangent<double>(one, opposite.row(1))); });
    named("lora_linear", [&] { return lora_linear(a, zero, none, x, eigen_matrix(eigen_matrix::Zero(3, 3)), 1.0); });
    named("linearized_lora_layer",
        [&] { return linearized_lora_layer<double>(zero, none, make_lora(eigen_matrix::Zero(3, 3), x)).forward(a); });
    named("relu", [&] { return relu(primal_tangent<double>(eigen_matrix(-eigen_matrix::Ones(3, 4)), wild)); });
    named("softmax", [&] { return softmax(a); });
    named("layer_norm", [&] { return layer_norm(a, none, none); });
    named("rms_norm", [&] { return rms_norm(a, none); });
    named("attention", [&] { return attention(a, x, x); });
    named("mean_rows", [&] {
        return mean_rows(primal_tangent<double>(eigen_matrix(2, 1), eigen_matrix{{infinity}, {-infinity}}), 2);
    });
    named("mean",
        [&] { return mean(primal_tangent<double>(eigen_matrix(2, 1), eigen_matrix{{infinity}, {-infinity}})); });
    named("cross_entropy", [&] { return cross_entropy(a, labels); });
    // These hand on a NaN that was there before.
    eigen_matrix nan = v;
    nan(1, 2) = std::numeric_limits<double>::quiet_NaN();
    const primal_tangent<double> c(x, nan);
    named("gelu", [&] { return gelu(c); });
    named("gelu_tanh", [&] { return gelu_tanh(c); });
    named("silu", [&] { return silu(c); });
    named("sigmoid", [&] { return sigmoid(c); });
    named("tanh", [&] { return taskvec::tanh(c); });
    named("embedding", [&] { return embedding(c, rows); });
}
#endif
