// SPDX-License-Identifier: Apache-2.0
#include <taskvec/analysis/disentanglement.hpp>

#include <doctest/doctest.h>

#include <map>

using namespace taskvec;

namespace {
// Two parameters, one for each task. A task's inputs are numbers; the prediction is whether input·p[own] +
// coupling·p[other] > 1.
struct toy {
    double coupling = 0;
    std::vector<std::vector<double>> inputs{{0.5, 1, 2, 4}, {1, 3, 5, 7, 9}};
    std::map<std::size_t, std::size_t> calls{};

    std::vector<int> operator()(host_view<const double> p, std::size_t task)
    {
        ++calls[task];
        std::vector<int> labels;
        for (const double x : inputs[task]) { labels.push_back(x * p[task] + coupling * p[1 - task] > 1); }
        return labels;
    }
};
const std::vector<double> base{0, 0}, nu1{1, 0}, nu2{0, 1};
} // namespace

TEST_CASE("a disentangled model has ξ = 0 everywhere")
{
    task_space<double> space(as_view(base), {as_view(nu1), as_view(nu2)});
    disentanglement_meter meter(space, toy{});
    const auto grid = meter.grid({.lambda1 = equidistant(-1, 1, 5)});
    CHECK(grid.values.size() == 25);
    for (const double xi : grid.values) { CHECK(xi == 0); }
}

TEST_CASE("ξ against its definition, evaluated directly")
{
    task_space<double> space(as_view(base), {as_view(nu1), as_view(nu2)});
    toy model{.coupling = 0.8};
    disentanglement_meter meter(space, std::ref(model));
    const std::vector<double> l1{-1, 0, 0.4, 1}, l2{0, 0.7, 1.5};
    const auto grid = meter.grid({.lambda1 = l1, .lambda2 = l2});
    double total = 0;
    for (std::size_t i = 0; i < l1.size(); ++i) {
        for (std::size_t j = 0; j < l2.size(); ++j) {
            double xi = 0;
            for (std::size_t task = 0; task < 2; ++task) {
                const double own = task == 0 ? l1[i] : l2[j], other = task == 0 ? l2[j] : l1[i];
                double different = 0;
                for (const double x : model.inputs[task]) { different += (x * own > 1) != (x * own + 0.8 * other > 1); }
                xi += different / static_cast<double>(model.inputs[task].size());
            }
            CHECK(grid.at(i, j) == doctest::Approx(xi).epsilon(1e-14));
            total += xi;
        }
    }
    CHECK(total > 0.5);
    CHECK(meter.error(std::vector<double>{l1[3], l2[2]}) == grid.at(3, 2));
    // Singles are evaluated once for each task and factor: 4 + 12 calls on task 0, 3 + 12 on task 1, and one more each
    // for error().
    CHECK(model.calls[0] == 4 + 12 + 1);
    CHECK(model.calls[1] == 3 + 12 + 1);
}

TEST_CASE("n tasks: every chosen task counts, the others stay away")
{
    const std::vector<double> zero(3, 0.0), a{1, 0, 0}, b{0, 1, 0}, c{0, 0, 1};
    task_space<double> space(as_view(zero), {as_view(a), as_view(b), as_view(c)});
    // A distance of one's own on real outputs: the model says its own parameter plus a tenth of all others.
    const auto model = [](host_view<const double> p, std::size_t task) {
        return p[task] + 0.1 * (p[0] + p[1] + p[2] - p[task]);
    };
    const auto distance = [](double x, double y) { return std::abs(x - y); };
    disentanglement_meter meter(space, model, distance);
    const auto errors = meter.error_by_task(std::vector<double>{1, 2, 3});
    REQUIRE(errors.size() == 3);
    CHECK(errors[0] == doctest::Approx(0.5));
    CHECK(errors[1] == doctest::Approx(0.4));
    CHECK(errors[2] == doctest::Approx(0.3));
    CHECK(meter.error(std::vector<double>{1, 2, 3}) == doctest::Approx(1.2));
    const std::vector<std::size_t> pair{0, 2};
    CHECK(meter.error(std::vector<double>{1, 0, 3}, pair) == doctest::Approx(0.4));
    CHECK_THROWS_AS((void)meter.error(std::vector<double>{1, 2, 3}, pair), invalid_argument);
    CHECK_THROWS_AS((void)meter.error(std::vector<double>{1, 2}), invalid_argument);
    CHECK_THROWS_AS((void)meter.error(std::vector<double>{1, 0, 3}, std::vector<std::size_t>{0, 3}), invalid_argument);
    CHECK_THROWS_AS((void)meter.grid({.task1 = 1, .task2 = 1, .lambda1 = {1}}), invalid_argument);
}

TEST_CASE("prediction_mismatch on labels and on logits")
{
    const prediction_mismatch mismatch;
    CHECK(mismatch(std::vector<int>{1, 2, 3, 4}, std::vector<int>{1, 2, 0, 4}) == 0.25);
    CHECK(mismatch(std::vector<int>{}, std::vector<int>{}) == 0);
    Eigen::MatrixXf a(2, 3), b(2, 3);
    a << 1, 2, 0, 5, 4, 5;
    b << 0, 9, 8, 1, 2, 1;
    CHECK(mismatch(a, b) == 0.5);
    CHECK_THROWS_AS((void)mismatch(std::vector<int>{1}, std::vector<int>{1, 2}), shape_mismatch);
    CHECK_THROWS_AS((void)mismatch(a, Eigen::MatrixXf(1, 3)), shape_mismatch);
}
