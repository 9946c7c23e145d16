// LoraHub: candidates bit for bit, what optimisers may and may not do, errors that keep the history, COBYLA.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"

#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/search/lorahub.hpp>
#if defined(TASKVEC_TEST_NLOPT)
#include <taskvec/search/lorahub_nlopt.hpp>
#endif

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <limits>
#include <stdexcept>

using namespace taskvec;

namespace {

/// Evaluates a list of weights, whatever comes back.
struct list_of_weights {
    std::vector<std::vector<double>> candidates;
    void operator()(const lorahub_problem&, const lorahub_objective& objective) const
    {
        for (const auto& weights : candidates) { (void)objective(weights); }
    }
};

/// What lorahub() throws, as a lorahub_error; a failed test if it is anything else.
template <class Run>
lorahub_error error_of(Run&& run)
{
    try {
        run();
    }
    catch (const lorahub_error& failure) {
        return failure;
    }
    FAIL("no lorahub_error was thrown");
    return {error_code::optimizer_failed, error_kind::backend_error, "", {}};
}

bool says(const error& failure, std::string_view part)
{
    return std::string_view(failure.what()).find(part) != std::string_view::npos;
}

const auto no_loss = [](const auto&) { return 0.0; };

} // namespace

TEST_CASE_TEMPLATE("a candidate has the bits of task arithmetic with lambda 1, and the buffer ends as the best one", T,
    float, double, bf16, f16)
{
    const testing::random_models<T> models({3000, 1, 64, 0}, 3, 7);
    const list_of_weights optimizer{{{0, 0, 0}, {0.3, -0.7, 1.5}, {1, 1, 1}, {-1.5, 0.1, 0}}};
    std::vector<T> out;
    const auto output = models.output(out);
    std::size_t calls = 0;
    const std::array<double, 4> losses{3, 1, 2, 1.5};
    const auto found = lorahub(
        cpu{.threads = 2}, {.alpha = 0.1}, models.model(models.base), models.task_models(), output,
        [&](const const_model_ref& candidate) {
            std::vector<T> expected;
            merge(cpu{}, task_arithmetic_options{.lambda = 1, .weights = optimizer.candidates[calls]},
                models.model(models.base), models.task_models(), models.output(expected));
            CHECK(std::memcmp(expected.data(), out.data(), out.size() * sizeof(T)) == 0);
            CHECK(candidate.find("t0")->data == out.data());
            return losses[calls++];
        },
        optimizer);
    REQUIRE(found.history.size() == 4);
    for (std::size_t i = 0; i < 4; ++i) {
        CHECK(found.history[i].weights == optimizer.candidates[i]);
        CHECK(found.history[i].loss == losses[i]);
        double size = 0;
        for (const double weight : optimizer.candidates[i]) { size += std::abs(weight); }
        CHECK(found.history[i].objective == doctest::Approx(losses[i] + 0.1 * size).epsilon(1e-14));
    }
    CHECK(found.best.weights == optimizer.candidates[1]); // 1 + 0.25, before 1.5 + 0.16
    std::vector<T> expected;
    merge(cpu{}, task_arithmetic_options{.lambda = 1, .weights = found.best.weights}, models.model(models.base),
        models.task_models(), models.output(expected));
    CHECK(std::memcmp(expected.data(), out.data(), out.size() * sizeof(T)) == 0);
}

TEST_CASE("flat views, with a base and without one")
{
    const std::vector<float> base{1, 2, 3};
    const std::vector<std::vector<float>> tasks{{2, 2, 2}, {1, 4, 3}};
    const list_of_weights optimizer{{{0.5, -1}, {1, 0}}};
    std::vector<float> out(3);
    std::vector<std::vector<float>> seen;
    const auto look = [&](host_view<const float> candidate) {
        seen.emplace_back(candidate.begin(), candidate.end());
        return 1.0 + static_cast<double>(seen.size());
    };
    auto found = lorahub(cpu{}, {.alpha = 0}, base, tasks, out, look, optimizer);
    CHECK(seen == std::vector<std::vector<float>>{{1.5f, 0, 2.5f}, {2, 2, 2}});
    CHECK(out == std::vector<float>{1.5f, 0, 2.5f}); // the first candidate was the better one
    CHECK(found.best.loss == 2);
    seen.clear();
    found = lorahub(cpu{}, {.alpha = 0}, tasks, out, look, optimizer);
    CHECK(seen == std::vector<std::vector<float>>{{0, -3, -2}, {2, 2, 2}}); // Σ wt·xt
    // The factors of adapters are named tensors, in the paper without a base.
    const auto a = detail::flat_models(tasks);
    const auto by_name = lorahub(
        cpu{}, {.alpha = 0}, a, detail::flat_output(as_view(out)),
        [&](const const_model_ref&) { return look(as_view(std::as_const(out))); }, optimizer);
    CHECK(seen.size() == 4);
    CHECK(seen[2] == seen[0]);
    CHECK(by_name.history.size() == 2);
}

TEST_CASE("the defaults are the paper's")
{
    const lorahub_options defaults;
    CHECK(defaults.bound == 1.5);
    CHECK(defaults.alpha == 0.05);
    CHECK(defaults.evaluations == 40);
    const auto found =
        lorahub_search({}, 2, no_loss, [](const lorahub_problem& problem, const lorahub_objective& objective) {
            CHECK(problem.dimension == 2);
            CHECK(problem.lower == -1.5);
            CHECK(problem.upper == 1.5);
            CHECK(problem.evaluations == 40);
            CHECK(problem.start == std::vector<double>{0, 0});
            CHECK(objective(problem.start) == 0);
            CHECK(objective(std::array{1.0, -0.5}) == doctest::Approx(0.075));
        });
    CHECK(found.best.weights == std::vector<double>{0, 0});
}

TEST_CASE("an optimiser that does not stop is stopped; what it got counts")
{
    std::size_t calls = 0;
    const auto found = lorahub_search(
        {.evaluations = 7}, 1, [&](std::span<const double> w) { return ++calls, (w[0] - 0.4) * (w[0] - 0.4); },
        [](const lorahub_problem&, const lorahub_objective& objective) {
            for (double w = -1;; w += 0.1) {
                try {
                    (void)objective({&w, 1});
                }
                catch (const std::exception&) { // swallows what it can
                }
            }
        });
    CHECK(calls == 7);
    CHECK(found.history.size() == 7);
    CHECK(found.best.weights[0] == doctest::Approx(-0.4));
}

TEST_CASE("weights outside the bounds are evaluated at the bound")
{
    const auto found = lorahub_search(
        {.bound = 0.5}, 2, [](std::span<const double> w) { return w[0]; }, list_of_weights{{{-7, 0.25}}});
    CHECK(found.best.weights == std::vector<double>{-0.5, 0.25});
    CHECK(found.best.objective == doctest::Approx(-0.5 + 0.05 * 0.75));
}

TEST_CASE("a loss that is not finite or that throws, and an optimiser that fails, are errors that keep the history")
{
    const list_of_weights three{{{0.0}, {0.5}, {1.0}}};
    std::size_t calls = 0;
    const auto at_third = [&](auto&& wrong) {
        calls = 0;
        return [&](std::span<const double>) -> double { return ++calls == 3 ? wrong() : 1.0; };
    };
    for (const double value : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
        const auto failure = error_of([&] { lorahub_search({}, 1, at_third([&] { return value; }), three); });
        CHECK(failure.kind() == error_kind::nonfinite);
        CHECK(failure.code() == error_code::score_not_finite);
        CHECK(says(failure, "candidate 3"));
        CHECK(says(failure, "weights 1"));
        REQUIRE(failure.history().size() == 2);
        CHECK(failure.history()[1].weights == std::vector<double>{0.5});
    }
    // An optimiser cannot hide it.
    const auto stubborn = [&](const lorahub_problem&, const lorahub_objective& objective) {
        for (int i = 0; i < 5; ++i) {
            try {
                (void)objective(std::array{0.1});
            }
            catch (...) {
            }
        }
    };
    CHECK(error_of([&] { lorahub_search({}, 1, at_third([] { return std::nan(""); }), stubborn); }).history().size()
        == 2);

    auto failure = error_of(
        [&] { lorahub_search({}, 1, at_third([]() -> double { throw std::runtime_error("no such batch"); }), three); });
    CHECK(failure.kind() == error_kind::backend_error);
    CHECK(says(failure, "candidate 3"));
    CHECK(says(failure, "no such batch"));
    CHECK(failure.history().size() == 2);
    failure = error_of(
        [&] { lorahub_search({}, 1, at_third([]() -> double { raise<cancelled>(error_code::cancelled); }), three); });
    CHECK(failure.kind() == error_kind::cancelled);
    CHECK(failure.code() == error_code::cancelled);

    failure = error_of([&] {
        lorahub_search({}, 1, no_loss, [](const lorahub_problem&, const lorahub_objective& objective) {
            (void)objective(std::array{0.2});
            throw std::runtime_error("the simplex is flat");
        });
    });
    CHECK(failure.kind() == error_kind::backend_error);
    CHECK(failure.code() == error_code::optimizer_failed);
    CHECK(says(failure, "the simplex is flat"));
    CHECK(failure.history().size() == 1);
    CHECK(says(error_of([&] { lorahub_search({}, 1, no_loss, [](const auto&, const auto&) { throw 7; }); }),
        "the optimiser failed"));
    CHECK(says(error_of([&] { lorahub_search({}, 1, no_loss, [](const auto&, const auto&) { }); }), "no candidate"));
    CHECK(says(error_of([&] { lorahub_search({}, 2, no_loss, three); }), "1 weights for 2 tasks"));
    CHECK(says(error_of([&] { lorahub_search({}, 1, no_loss, list_of_weights{{{std::nan("")}}}); }), "NaN"));
}

TEST_CASE("options and models are checked before anything is evaluated")
{
    const auto never = [](const lorahub_problem&, const lorahub_objective&) { FAIL("the optimiser was called"); };
    const double nan = std::numeric_limits<double>::quiet_NaN();
    for (const lorahub_options& wrong : {lorahub_options{.bound = 0}, lorahub_options{.bound = nan},
             lorahub_options{.alpha = -1}, lorahub_options{.alpha = nan}, lorahub_options{.evaluations = 0},
             lorahub_options{.start = {0}}, lorahub_options{.start = {0, 1.6}}, lorahub_options{.start = {0, nan}}}) {
        CHECK_THROWS_AS(lorahub_search(wrong, 2, no_loss, never), invalid_argument);
    }
    CHECK_THROWS_AS(lorahub_search({}, 0, no_loss, never), invalid_argument);
    const std::vector<float> base{1, 2};
    std::vector<std::vector<float>> tasks{{1, 2}, {3, 4}};
    std::vector<float> out(2), short_out(1);
    CHECK_THROWS_AS(lorahub(cpu{}, {}, base, tasks, short_out, no_loss, never), shape_mismatch);
    CHECK_THROWS_AS(
        lorahub(cpu{}, {}, base, tasks, tasks[0], no_loss, never), invalid_argument); // the buffer is a task's
    CHECK_THROWS_AS(lorahub(cpu{}, {}, std::vector<float>{1}, tasks, out, no_loss, never), shape_mismatch);
    tasks[1][0] = std::numeric_limits<float>::infinity();
    const auto failure = error_of([&] { lorahub(cpu{}, {}, base, tasks, out, no_loss, list_of_weights{{{0, 0}}}); });
    CHECK(failure.kind() == error_kind::nonfinite);
    CHECK(says(failure, "infinity"));
}

#if defined(TASKVEC_TEST_NLOPT)
TEST_CASE("COBYLA finds the weights of a combination, inside the bounds and the budget")
{
    const testing::random_models<float> models({400}, 3, 3);
    std::vector<float> target(models.base.size()), out(models.base.size());
    const std::vector<double> wanted{0.8, -0.4, 0};
    merge(cpu{}, task_arithmetic_options{.lambda = 1, .weights = wanted}, models.base, models.tasks, target);
    const auto loss = [&](host_view<const float> theta) {
        double sum = 0;
        for (std::size_t i = 0; i < target.size(); ++i) { sum += (theta[i] - target[i]) * (theta[i] - target[i]); }
        return sum / static_cast<double>(target.size());
    };
    const auto found = lorahub(cpu{}, {.alpha = 0}, models.base, models.tasks, out, loss, cobyla{});
    CHECK(found.history.size() <= 40);
    CHECK(found.history.front().weights == std::vector<double>{0, 0, 0});
    for (const auto& candidate : found.history) {
        for (const double weight : candidate.weights) { CHECK(std::abs(weight) <= 1.5); }
    }
    for (std::size_t t = 0; t < 3; ++t) { CHECK(std::abs(found.best.weights[t] - wanted[t]) < 0.05); }
    CHECK(found.best.loss < 0.01 * found.history.front().loss);
    CHECK(loss(as_view(std::as_const(out))) == found.best.loss);
    const auto again = lorahub(cpu{.threads = 3}, {.alpha = 0}, models.base, models.tasks, out, loss, cobyla{});
    CHECK(again.best.weights == found.best.weights);
    // A minimum outside the bounds is approached along them.
    const auto edge = lorahub_search(
        {.bound = 0.5, .alpha = 0}, 2, [](std::span<const double> w) { return (w[0] - 2) * (w[0] - 2) + w[1] * w[1]; },
        cobyla{});
    CHECK(edge.best.weights[0] == doctest::Approx(0.5).epsilon(1e-3));
    CHECK(std::abs(edge.best.weights[1]) < 0.05);
    // Where the loss is indifferent, the L1 term decides.
    const auto lean = lorahub_search({.alpha = 0.05, .start = {1, 1}}, 2, no_loss, cobyla{});
    CHECK(lean.best.objective < 0.02);
}

TEST_CASE("a loss that fails comes through NLopt as the search's error, with the history")
{
    std::size_t calls = 0;
    const auto failure = error_of([&] {
        lorahub_search(
            {}, 2,
            [&](std::span<const double>) -> double {
                return ++calls < 4 ? 1.0 / static_cast<double>(calls) : throw std::runtime_error("out of data");
            },
            cobyla{});
    });
    CHECK(says(failure, "candidate 4"));
    CHECK(says(failure, "out of data"));
    CHECK(failure.history().size() == 3);
    CHECK(says(error_of([] { lorahub_search({}, 2, no_loss, cobyla{.step = 0}); }), "step"));
}
#endif
