// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/linearize.hpp>

#include <taskvec/jvp/attention.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/linearized_lora.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using eigen_matrix = row_matrix<double>;
using reference::random_matrix;

namespace {
// One attention block with LoRA on q and v, b0 zero as PEFT initialises.
const parameters<double> phi0{{"q", random_matrix(6, 6, 1)}, {"k", random_matrix(6, 6, 2)},
    {"v", random_matrix(6, 6, 3)}, {"q.lora_A", random_matrix(2, 6, 4)},
    {"q.lora_B", eigen_matrix(eigen_matrix::Zero(6, 2))}, {"v.lora_A", random_matrix(2, 6, 5)},
    {"v.lora_B", eigen_matrix(eigen_matrix::Zero(6, 2))}, {"gamma", random_matrix(1, 6, 6)}};
const eigen_matrix none;
const auto network = [](const auto& p, const auto& x) {
    const auto h = rms_norm(x, p["gamma"]);
    const auto q = lora_linear(h, p["q"], none, p["q.lora_A"], p["q.lora_B"], 0.5);
    const auto v = lora_linear(h, p["v"], none, p["v.lora_A"], p["v.lora_B"], 0.5);
    return add(x, attention(q, linear(h, p["k"]), v, {.batch = 2, .heads = 2}));
};
const linearize_options adapters{.active = {"q.lora_A", "q.lora_B", "v.lora_A", "v.lora_B"}};
const eigen_matrix x = random_matrix(8, 6, 7);

parameters<double> moved(const std::vector<std::string>& names, double step, std::uint64_t seed = 30)
{
    parameters<double> phi = phi0;
    for (const auto& name : names) { phi[name] += step * random_matrix(phi[name].rows(), phi[name].cols(), seed++); }
    return phi;
}
} // namespace

TEST_CASE("linearize: exact at φ0, bit for bit")
{
    CHECK(linearize(network, phi0)(phi0, x) == eigen_matrix(network(phi0, x)));
    CHECK(linearize(network, phi0, adapters)(phi0, x) == eigen_matrix(network(phi0, x)));
    CHECK(linearize(network, phi0)(parameters<double>{}, x) == eigen_matrix(network(phi0, x)));
}

TEST_CASE("linearize: exactly linear in φ, over all parameters and over the adapters")
{
    for (const auto& options : {linearize_options{}, adapters}) {
        const auto f = linearize(network, phi0, options);
        const eigen_matrix at_0 = f(phi0, x);
        const eigen_matrix one = f(moved(f.active(), 1), x) - at_0, four = f(moved(f.active(), 4), x) - at_0;
        CHECK(one.norm() > 0.1);
        CHECK(reference::largest_difference(four, eigen_matrix(4 * one)) < 1e-11);
        // The sum of two displacements is the sum of their effects.
        const auto a = moved(f.active(), 1), b = moved(f.active(), 1, 60);
        parameters<double> both = phi0;
        for (auto& [name, value] : both) { value = a[name] + b[name] - phi0[name]; }
        CHECK(reference::largest_difference(f(both, x), eigen_matrix(f(a, x) + f(b, x) - at_0)) < 1e-11);
        // First order: the remainder shrinks with the square of the step.
        const auto remainder = [&](double step) {
            return (network(moved(f.active(), step), x) - f(moved(f.active(), step), x)).norm();
        };
        const double ratio = remainder(1e-3) / remainder(5e-4);
        CHECK(ratio == doctest::Approx(4).epsilon(0.05));
    }
}

TEST_CASE("linearize: at_difference and derivative agree with the difference of φ")
{
    const auto f = linearize(network, phi0, adapters);
    const auto phi = moved(f.active(), 1);
    parameters<double> delta;
    for (const auto& name : f.active()) { delta.insert(name, phi[name] - phi0[name]); }
    CHECK(reference::largest_difference(f.at_difference(delta, x), f(phi, x)) < 1e-13);
    const auto [value, derivative] = f.derivative(delta, x);
    CHECK(reference::largest_difference(eigen_matrix(value + derivative), f(phi, x)) < 1e-13);
}

TEST_CASE("linearize: with B0 = 0 the adapters' A has no influence")
{
    const auto f = linearize(network, phi0, adapters);
    CHECK(f(moved({"q.lora_A", "v.lora_A"}, 1), x) == eigen_matrix(network(phi0, x)));
}

TEST_CASE("linearize over one layer's adapter is the linearized LoRA layer")
{
    for (const double b0 : {0.0, 1.0}) {
        const eigen_matrix w = random_matrix(5, 6, 1), bias = random_matrix(1, 5, 2);
        const parameters<double> start{{"A", random_matrix(2, 6, 3)}, {"B", b0 * random_matrix(5, 2, 4)}};
        const auto layer = [&](const auto& p, const auto& input) {
            return lora_linear(input, w, bias, p["A"], p["B"], 0.5);
        };
        linearized_lora_layer<double> expanded(w, bias, make_lora(start["B"], start["A"], 0.5));
        parameters<double> phi = start;
        phi["A"] += random_matrix(2, 6, 8);
        phi["B"] += random_matrix(5, 2, 9);
        expanded.set(make_lora(phi["B"], phi["A"], 0.5));
        CHECK(reference::largest_difference(linearize(layer, start)(phi, x), expanded.forward(x)) < 1e-12);
    }
}

TEST_CASE("linearize: the gradient is the vjp at φ0, restricted to the active parameters")
{
    const parameters<double> start{{"w", random_matrix(4, 6, 1)}, {"b", random_matrix(1, 4, 2)}};
    const auto f = [](const auto& p, const auto& input) { return taskvec::tanh(linear(input, p["w"], p["b"])); };
    const auto f_vjp = [](const parameters<double>& p, const eigen_matrix& dy, const eigen_matrix& input) {
        const auto gradient = linear_vjp(input, p["w"], tanh_vjp(linear(input, p["w"], p["b"]), dy));
        return parameters<double>{{"w", gradient.w}, {"b", gradient.bias}};
    };
    const auto expanded = linearize(f, start, {.active = {"w"}});
    const eigen_matrix dy = random_matrix(8, 4, 3), v = random_matrix(4, 6, 4);
    const auto gradient = expanded.gradient(f_vjp, dy, x);
    CHECK(gradient.size() == 1);
    parameters<double> phi{{"w", start["w"] + v}};
    const eigen_matrix change = expanded(phi, x) - expanded(start, x);
    CHECK((gradient["w"].array() * v.array()).sum()
        == doctest::Approx((dy.array() * change.array()).sum()).epsilon(1e-12));
    const auto forgetful = [](const parameters<double>&, const eigen_matrix&, const eigen_matrix&) {
        return parameters<double>{};
    };
    CHECK_THROWS_AS((void)expanded.gradient(forgetful, dy, x), invalid_argument);
}

TEST_CASE("linearize: inactive parameters that move, unknown names and wrong shapes are named errors")
{
    CHECK_THROWS_WITH_AS((void)linearize(network, phi0, {.active = {"z"}}),
        "linearize: parameter 'z' is to be active, but there is no such parameter", invalid_argument);
    const auto f = linearize(network, phi0, adapters);
    CHECK_THROWS_WITH_AS((void)f(moved({"gamma"}, 1), x),
        "linearize: parameter 'gamma' is inactive and must stay at φ0; name it in linearize_options::active to move it",
        invalid_argument);
    CHECK_THROWS_AS((void)f.derivative(parameters<double>{{"k", random_matrix(6, 6, 1)}}, x), invalid_argument);
    CHECK_THROWS_AS((void)f(parameters<double>{{"z", random_matrix(6, 6, 1)}}, x), invalid_argument);
    CHECK_THROWS_AS((void)f(parameters<double>{{"q.lora_A", random_matrix(6, 2, 1)}}, x), shape_mismatch);
}
