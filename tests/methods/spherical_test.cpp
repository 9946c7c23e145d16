// NuSLERP, Multi-SLERP, Karcher means: against loops over whole vectors, their degenerate cases, and what they refuse.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/spherical.hpp"

#include <taskvec/methods/karcher.hpp>
#include <taskvec/methods/multi_slerp.hpp>
#include <taskvec/methods/nuslerp.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

using namespace taskvec;

namespace {

/// Merges with different threads and chunks, and holds every tensor to `expected(vectors)` of its vectors in f64.
template <class T, class Options, class Expected>
void check(const testing::random_models<T>& models, const Options& options, bool with_base, const Expected& expected)
{
    std::vector<T> first, out;
    for (const auto& [threads, chunk] : {std::pair<unsigned, std::size_t>{1, 64}, {3, 65536}}) {
        model_options how;
        how.chunk = chunk;
        const cpu policy{.threads = threads};
        if (with_base) {
            merge(policy, options, models.model(models.base), models.task_models(), models.output(out), how);
        }
        else {
            merge(policy, options, models.task_models(), models.output(out), how);
        }
        if (first.empty()) { first = out; }
        CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(T)) == 0);
    }
    double worst = 0;
    std::size_t begin = 0;
    for (const std::size_t size : models.sizes) {
        std::vector<std::vector<double>> vectors;
        for (const auto& task : models.tasks) {
            vectors.emplace_back();
            for (std::size_t i = begin; i < begin + size; ++i) {
                vectors.back().push_back(widen<double>(task[i]) - (with_base ? widen<double>(models.base[i]) : 0.0));
            }
        }
        const auto wanted = expected(vectors);
        for (std::size_t i = 0; i < size; ++i) {
            const double base = with_base ? widen<double>(models.base[begin + i]) : 0.0;
            worst = std::max(worst, std::abs(widen<double>(first[begin + i]) - (base + wanted[i])));
        }
        begin += size;
    }
    CHECK(worst < (std::same_as<T, bf16> ? 4e-2 : std::same_as<T, float> ? 3e-6 : 1e-12));
}

} // namespace

TEST_CASE_TEMPLATE("spherical methods equal loops over whole vectors, with a base and without", T, float, double, bf16)
{
    const std::vector<std::size_t> sizes{3000, 1, 64, 5000, 0};
    const testing::random_models<T> pair(sizes, 2, 5), four(sizes, 4, 6);
    for (const bool base : {false, true}) {
        for (const std::vector<double>& weights : {std::vector<double>{}, {1, 3}, {2, -1}, {1, -1}}) {
            check(pair, nuslerp_options{weights}, base, [&](const auto& x) { return reference::nuslerp(x, weights); });
        }
        for (const bool normalize : {true, false}) {
            const std::vector<double> weights{1, 0.5, 2, 0.25};
            check(four, multi_slerp_options{.weights = weights, .normalize = normalize}, base,
                [&](const auto& x) { return reference::multi_slerp(x, weights, normalize); });
        }
    }
    for (const std::vector<double>& weights : {std::vector<double>{1, 1, 1, 1}, {1, 0.5, 2, 0}}) {
        check(four, karcher_options{.weights = weights, .steps = 40, .tolerance = 1e-13}, false,
            [&](const auto& x) { return reference::karcher(x, weights, 40); });
    }
}

TEST_CASE("zero vectors, collinear vectors, one task, directions that cancel")
{
    const auto run = [](const auto& options, const std::vector<std::vector<float>>& tasks) {
        std::vector<float> out(tasks[0].size());
        merge(cpu{}, options, tasks, out);
        return out;
    };
    CHECK(run(nuslerp_options{}, {{1, 2}, {2, 4}}) == std::vector<float>{1.5f, 3});
    CHECK(run(nuslerp_options{.weights = {3, 1}}, {{1, 2}, {-1, -2}}) == std::vector<float>{0.5f, 1});
    CHECK(run(nuslerp_options{}, {{2, 0}, {0, 2}})[0] == doctest::Approx(std::sqrt(2.0)));
    CHECK(run(nuslerp_options{}, {{0, 0}, {0, 2}})[1] == doctest::Approx(std::sqrt(2.0))); // as at a right angle
    CHECK(run(multi_slerp_options{}, {{0.1f, 7}}) == std::vector<float>{0.1f, 7});
    CHECK(run(multi_slerp_options{}, {{1, 2}, {-1, -2}}) == std::vector<float>{0, 0});
    CHECK(run(multi_slerp_options{}, {{0, 0}, {0, 0}, {0, 0}}) == std::vector<float>{0, 0});
    CHECK(run(multi_slerp_options{}, {{2, 0}, {0, 2}})[0] == doctest::Approx(std::sqrt(2.0)));
    CHECK_THROWS_WITH_AS(run(multi_slerp_options{.weights = {1, 1, 2}}, {{1, 0}, {1, 0}, {-1, 0}}),
        "the directions of tensor 'values' cancel, so that Multi-SLERP has no mean direction there: change the "
        "weights, or exclude the tensor",
        invalid_argument);
    CHECK(run(karcher_options{}, {{0.1f, 7}}) == std::vector<float>{0.1f, 7});
    CHECK(run(karcher_options{}, {{0, 0}, {0, 0}}) == std::vector<float>{0, 0});
    CHECK(run(karcher_options{}, {{0, 0}, {0, 4}}) == std::vector<float>{0, 2}); // the lengths' mean
    CHECK(run(karcher_options{}, {{3, 0}, {-1, 0}}) == std::vector<float>{2, 0}); // from the first of them
    CHECK(run(karcher_options{}, {{1, 0}, {0, 1}})[1] == doctest::Approx(std::sqrt(0.5)));
}

TEST_CASE("spherical methods refuse other numbers of models, and weights without meaning")
{
    const std::vector<float> x{1, 2};
    std::vector<float> out(2);
    CHECK_THROWS_WITH_AS(merge(cpu{}, nuslerp_options{}, std::vector{x, x, x}, out),
        "NuSLERP goes between two models, and the number of tasks is 3: give two", invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, nuslerp_options{.weights = {1, NAN}}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, multi_slerp_options{.weights = {1, -1}}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, karcher_options{.weights = {1, -1}}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, karcher_options{.weights = {0, 0}}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, karcher_options{.tolerance = 0}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, karcher_options{}, std::vector{x, {1, NAN}}, out), nonfinite_error);
}
