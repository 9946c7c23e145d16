// Passthrough, and averages that are not normalised: against their definitions, and what they refuse.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/ties.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/passthrough.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

using namespace taskvec;

TEST_CASE_TEMPLATE("passthrough scales one model, and 1 keeps its bits", T, float, double, bf16, f16)
{
    using A = arithmetic_type<T>;
    const testing::random_models<T> models({3000, 1, 0, 77}, 1, 4);
    std::vector<T> out;
    for (const double scale : {1.0, 0.3, 0.0, -2.5}) {
        merge(cpu{.threads = 2}, passthrough_options{.scale = scale}, models.task_models(), models.output(out));
        std::vector<T> expected;
        for (const T x : models.tasks[0]) {
            expected.push_back(narrow<T>(reference::product(static_cast<A>(scale), widen<A>(x))));
        }
        CHECK(std::memcmp(out.data(), expected.data(), out.size() * sizeof(T)) == 0);
        if (scale == 1.0) { CHECK(std::memcmp(out.data(), models.tasks[0].data(), out.size() * sizeof(T)) == 0); }
    }
}

TEST_CASE("an average that is not normalised is a weighted sum, also of weights that cancel")
{
    const testing::random_models<float> models({3000, 77}, 3, 4);
    std::vector<float> out;
    average_options options{.weights = {0.5, -1, 0.5}};
    CHECK_THROWS_AS(
        merge(cpu{}, options, models.task_models(), models.output(out)), invalid_argument); // nothing to divide by
    options.normalize = false;
    merge(cpu{}, options, models.task_models(), models.output(out));
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
        float total = 0;
        for (std::size_t t = 0; t < 3; ++t) {
            total =
                reference::sum(total, reference::product(static_cast<float>(options.weights[t]), models.tasks[t][i]));
        }
        wrong += out[i] != total;
    }
    CHECK(wrong == 0);
}

TEST_CASE("passthrough refuses several models, and scales that are no numbers")
{
    const std::vector<float> x{1, 2};
    std::vector<float> out(2);
    CHECK_THROWS_WITH_AS(merge(cpu{}, passthrough_options{}, std::vector{x, x}, out),
        "passthrough takes one model, and there are 2 tasks: give one", invalid_argument);
    CHECK_THROWS_AS(
        merge(cpu{}, passthrough_options{.scale = NAN}, std::vector<std::vector<float>>{x}, out), invalid_argument);
    CHECK_THROWS_AS(
        merge(cpu{}, passthrough_options{}, std::vector<std::vector<float>>{{1, INFINITY}}, out), nonfinite_error);
}
