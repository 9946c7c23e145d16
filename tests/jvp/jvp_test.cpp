// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/jvp.hpp>

#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/linear.hpp>
#include <taskvec/jvp/loss.hpp>

#include "../reference/derivatives.hpp"

#include <vector>

using namespace taskvec;
using reference::random_matrix;
using reference::wide_matrix;

namespace {
const parameters<double> phi{
    {"w1", random_matrix(8, 5, 1)}, {"b1", random_matrix(1, 8, 2)}, {"w2", random_matrix(3, 8, 3)}};
const auto network = [](const auto& p, const auto& x) { return linear(gelu(linear(x, p["w1"], p["b1"])), p["w2"]); };
const wide_matrix x = random_matrix(6, 5, 4);
} // namespace

TEST_CASE("jvp of a function of one number")
{
    const auto [value, slope] = jvp(
        [](auto t) {
            using std::exp;
            return t * exp(t);
        },
        3.0, 2.0);
    CHECK(value == doctest::Approx(3 * std::exp(3.0)));
    CHECK(slope == doctest::Approx(2 * 4 * std::exp(3.0)));
    CHECK(jvp([](auto t) { return t * t; }, 3.0f, 1.0f).tangent == 6.0f);
}

TEST_CASE("jvp of functions of Eigen vectors and matrices, by dual numbers")
{
    const Eigen::VectorXd at = Eigen::VectorXd::LinSpaced(4, -1, 1), v = Eigen::VectorXd::LinSpaced(4, 2, 0.5);
    const auto norm = jvp([](const auto& t) { return t.squaredNorm(); }, at, v);
    CHECK(norm.primal == doctest::Approx(at.squaredNorm()));
    CHECK(norm.tangent == doctest::Approx(2 * at.dot(v)));
    const auto [y, dy] = jvp([](const auto& t) { return (t.array() * t.array().exp()).matrix(); }, at, v);
    static_assert(std::same_as<std::remove_const_t<decltype(y)>, Eigen::VectorXd>);
    for (Eigen::Index i = 0; i < 4; ++i) { CHECK(dy[i] == doctest::Approx((1 + at[i]) * std::exp(at[i]) * v[i])); }
    const Eigen::Matrix2f a = Eigen::Matrix2f::Identity() * 2, b = Eigen::Matrix2f::Ones();
    const auto square = jvp([](const auto& t) { return t * t; }, a, b);
    CHECK(square.tangent.isApprox(a * b + b * a));
    CHECK_THROWS_AS(
        (void)jvp([](const auto& t) { return t.squaredNorm(); }, at, Eigen::VectorXd(Eigen::VectorXd::Ones(3))),
        shape_mismatch);
}

TEST_CASE("jvp of a network in its input")
{
    const auto f = [](const auto& input) { return network(phi, input); };
    const wide_matrix v = random_matrix(6, 5, 5);
    const auto [y, dy] = jvp(f, x, v);
    CHECK(reference::largest_difference(y, f(x)) < 1e-13);
    const double h = 1e-6;
    CHECK(reference::largest_difference(
              dy, wide_matrix((f(wide_matrix(x + h * v)) - f(wide_matrix(x - h * v))) / (2 * h)))
        < 1e-8);
    CHECK_THROWS_AS((void)jvp(f, x, random_matrix(5, 6, 1)), shape_mismatch);
}

TEST_CASE("jvp of a network in any subset of its parameters; linear in v")
{
    const auto moved = [&](const parameters<double>& v, double step) {
        parameters<double> p = phi;
        for (const auto& [name, direction] : v) { p[name] += step * direction; }
        return wide_matrix(network(p, x));
    };
    for (unsigned mask = 0; mask < 8; ++mask) {
        parameters<double> v, w, both;
        unsigned bit = 0;
        for (const auto& [name, value] : phi) {
            if ((mask >> bit++ & 1u) == 0) { continue; }
            v.insert(name, random_matrix(value.rows(), value.cols(), 10 + bit));
            w.insert(name, random_matrix(value.rows(), value.cols(), 20 + bit));
            both.insert(name, 2.0 * v[name] - 3.0 * w[name]);
        }
        const auto [y, dy] = jvp(network, phi, v, x);
        CHECK(reference::largest_difference(y, network(phi, x)) < 1e-13);
        CHECK(reference::largest_difference(dy, wide_matrix((moved(v, 1e-6) - moved(v, -1e-6)) / 2e-6)) < 1e-7);
        const wide_matrix combined = 2.0 * dy - 3.0 * jvp(network, phi, w, x).tangent;
        CHECK(reference::largest_difference(jvp(network, phi, both, x).tangent, combined) < 1e-11);
    }
}

TEST_CASE("jvp of a loss is a pair of numbers")
{
    const std::vector<int> labels{0, 1, 2, 0, 1, 2};
    const auto loss = [&](const auto& p, const auto& input) { return cross_entropy(network(p, input), labels); };
    const parameters<double> v{{"b1", random_matrix(1, 8, 9)}};
    const auto [value, slope] = jvp(loss, phi, v, x);
    static_assert(std::same_as<std::remove_const_t<decltype(value)>, double>);
    parameters<double> up = phi, down = phi;
    up["b1"] += 1e-5 * v["b1"];
    down["b1"] -= 1e-5 * v["b1"];
    CHECK(value == doctest::Approx(loss(phi, x)));
    CHECK(slope == doctest::Approx((loss(up, x) - loss(down, x)) / 2e-5).epsilon(1e-7));
}

TEST_CASE("jvp: errors name the parameter")
{
    CHECK_THROWS_WITH_AS((void)jvp(network, phi, parameters<double>{{"w3", wide_matrix(1, 1)}}, x),
        "jvp: there is a tangent for parameter 'w3', but no such parameter", invalid_argument);
    CHECK_THROWS_WITH_AS((void)jvp(network, phi, parameters<double>{{"w2", random_matrix(8, 3, 1)}}, x),
        "'w2': the primal is [3, 8] and its tangent [8, 3]; they must have the same shape", shape_mismatch);
}
