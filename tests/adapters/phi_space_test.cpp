// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/phi_space.hpp>

#include <taskvec/jvp/linearized_lora.hpp>
#include <taskvec/jvp/parameters.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using eigen_matrix = row_matrix<double>;
using reference::random_matrix;

namespace {
struct fixture {
    parameters<double> initial{{"layer.lora_A", random_matrix(2, 7, 1)}, {"layer.lora_B", random_matrix(5, 2, 2)}};
    std::vector<parameters<double>> tuned;
    parameters<double> merged = initial;
    std::vector<initialized_adapter> adapters;

    fixture()
    {
        for (std::uint64_t t = 0; t < 3; ++t) {
            tuned.push_back(initial);
            for (auto& [name, value] : tuned.back()) {
                value += random_matrix(value.rows(), value.cols(), 10 * t + static_cast<std::uint64_t>(value.rows()));
            }
        }
        for (const auto& one : tuned) { adapters.push_back({as_model(one), as_model(std::as_const(initial))}); }
    }
};
} // namespace

TEST_CASE("φ space: task arithmetic and average are the formulas")
{
    fixture f;
    merge_in_phi_space(
        cpu{}, task_arithmetic_options{.lambda = 0.3, .weights = {1, -0.5, 2}}, f.adapters, as_model(f.merged));
    for (const auto& [name, value] : f.merged) {
        const eigen_matrix& start = f.initial[name];
        const eigen_matrix expected = start
            + 0.3 * ((f.tuned[0][name] - start) - 0.5 * (f.tuned[1][name] - start) + 2 * (f.tuned[2][name] - start));
        CHECK(reference::largest_difference(value, expected) < 1e-14);
    }
    merge_in_phi_space(cpu{}, average_options{}, f.adapters, as_model(f.merged));
    for (const auto& [name, value] : f.merged) {
        CHECK(reference::largest_difference(
                  value, eigen_matrix((f.tuned[0][name] + f.tuned[1][name] + f.tuned[2][name]) / 3))
            < 1e-14);
    }
}

TEST_CASE("φ space: TIES is TIES on the adapters' own parameters")
{
    fixture f;
    parameters<double> direct = f.initial;
    merge_in_phi_space(cpu{}, ties_options{.density = 0.4, .lambda = 0.8}, f.adapters, as_model(f.merged));
    std::vector<const_model_ref> tasks;
    for (const auto& one : f.tuned) { tasks.push_back(as_model(one)); }
    merge(cpu{}, ties_options{.density = 0.4, .lambda = 0.8}, as_model(std::as_const(f.initial)), tasks,
        as_model(direct));
    for (const auto& [name, value] : f.merged) { CHECK(value == direct[name]); }
}

TEST_CASE("φ space: a merged linearized layer is the same combination of the layers' functions")
{
    // f_lin is linear in φ: the layer at φ0 + λ·Σ(φt − φ0) is f(φ0) + λ·Σ(f(φt) − f(φ0)).
    fixture f;
    const eigen_matrix x = random_matrix(4, 7, 3), w = random_matrix(5, 7, 4);
    linearized_lora_layer<double> layer(
        w, eigen_matrix(), make_lora(f.initial["layer.lora_B"], f.initial["layer.lora_A"], 0.5));
    const auto at = [&](const parameters<double>& p) {
        layer.set(make_lora(p["layer.lora_B"], p["layer.lora_A"], 0.5));
        return eigen_matrix(layer.forward(x));
    };
    merge_in_phi_space(cpu{}, task_arithmetic_options{.lambda = 0.3}, f.adapters, as_model(f.merged));
    const eigen_matrix start = at(f.initial);
    eigen_matrix expected = start;
    for (const auto& one : f.tuned) { expected += 0.3 * (at(one) - start); }
    CHECK(reference::largest_difference(at(f.merged), expected) < 1e-12);
}

TEST_CASE("φ space: another initialisation is an error that names the tensor")
{
    fixture f;
    parameters<double> other = f.initial;
    other["layer.lora_A"](1, 3) += 1e-12;
    f.adapters[2].initial = as_model(std::as_const(other));
    CHECK_THROWS_WITH_AS(merge_in_phi_space(cpu{}, task_arithmetic_options{}, f.adapters, as_model(f.merged),
                             {.labels = {"cats", "dogs", "birds"}}),
        "the initialisation of birds differs from that of cats in tensor 'layer.lora_A': adapters merge in phi space "
        "only around one φ0; merge their products "
        "instead",
        invalid_argument);
    f.adapters[2].initial = const_model_ref{};
    CHECK_THROWS_AS(merge_in_phi_space(cpu{}, average_options{}, f.adapters, as_model(f.merged)), invalid_argument);
    f.adapters[0].initial = const_model_ref{};
    CHECK_THROWS_AS(merge_in_phi_space(cpu{}, average_options{}, f.adapters, as_model(f.merged)), invalid_argument);
    CHECK_THROWS_AS(check_shared_initialization({}), invalid_argument);
    CHECK_THROWS_AS(check_shared_initialization(fixture().adapters, {.labels = {"a"}}), invalid_argument);
}

TEST_CASE("φ space: an adapter's tensor without an initialisation is an error that names it, whatever the method")
{
    fixture f;
    f.tuned[1].insert("layer2.lora_A", random_matrix(2, 7, 5));
    f.adapters[1].adapter = as_model(std::as_const(f.tuned[1]));
    const char* const because = "tensor 'layer2.lora_A' of dogs has no initialisation: merging in phi space needs the "
                                "φ0 of every tensor; give the adapter that "
                                "its training started from";
    const model_options how{.labels = {"cats", "dogs", "birds"}};
    CHECK_THROWS_WITH_AS(
        merge_in_phi_space(cpu{}, average_options{}, f.adapters, as_model(f.merged), how), because, invalid_argument);
    CHECK_THROWS_WITH_AS(merge_in_phi_space(cpu{}, task_arithmetic_options{}, f.adapters, as_model(f.merged), how),
        because, invalid_argument);
}
