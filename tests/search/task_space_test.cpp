// SPDX-License-Identifier: Apache-2.0
#include <taskvec/search/task_space.hpp>

#include <taskvec/core/random.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <doctest/doctest.h>

#include <limits>

using namespace taskvec;

namespace {
std::vector<float> random_vector(std::size_t n, std::uint64_t seed)
{
    std::vector<float> x(n);
    const random_stream stream(seed, 0);
    for (std::size_t i = 0; i < n; ++i) { x[i] = static_cast<float>(stream.normal(i)); }
    return x;
}
} // namespace

TEST_CASE("task_space: a point is base plus the weighted task vectors, term by term in f32")
{
    const std::size_t n = 70000;
    const auto base = random_vector(n, 1), t1 = random_vector(n, 2), t2 = random_vector(n, 3), t3 = random_vector(n, 4);
    for (const unsigned threads : {1u, 3u}) {
        task_space<float> space(as_view(base), {as_view(t1), as_view(t2), as_view(t3)}, cpu{.threads = threads});
        CHECK(space.tasks() == 3);
        const double lambdas[] = {0.3, 0.0, -1.7};
        const auto point = space.at(lambdas);
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < n; ++i) {
            volatile float a = 0.3f * t1[i], b = -1.7f * t3[i];
            volatile float sum = a + b;
            wrong += point[i] != base[i] + sum;
        }
        CHECK(wrong == 0);
        const double zero[] = {0, 0, 0};
        const auto origin = space.at(zero);
        CHECK(std::equal(origin.begin(), origin.end(), base.begin()));
    }
}

TEST_CASE("task_space: the bits of task arithmetic")
{
    const std::size_t n = 5000;
    const auto base = random_vector(n, 1);
    std::vector<float> t1(n), t2(n), tuned1(n), tuned2(n), merged(n);
    // Values on a coarse grid, so that tuned − base gives the task vector back exactly.
    std::vector<float> grid_base(n);
    const auto d1 = random_vector(n, 2), d2 = random_vector(n, 3);
    for (std::size_t i = 0; i < n; ++i) {
        grid_base[i] = std::round(base[i] * 64) / 64;
        t1[i] = std::round(d1[i] * 64) / 64;
        t2[i] = std::round(d2[i] * 64) / 64;
        tuned1[i] = grid_base[i] + t1[i];
        tuned2[i] = grid_base[i] + t2[i];
    }
    task_space<float> space(as_view(grid_base), {as_view(t1), as_view(t2)});
    const std::vector<double> lambdas{0.3, 0.7};
    merge(cpu{}, task_arithmetic_options{.lambda = 1, .weights = lambdas}, grid_base, std::vector{tuned1, tuned2},
        merged);
    const auto point = space.at(lambdas);
    CHECK(std::equal(point.begin(), point.end(), merged.begin()));
}

TEST_CASE("loss_plane evaluates every point of the grid")
{
    const std::vector<double> base{1, 0, 0}, t1{0, 1, 0}, t2{0, 0, 1};
    task_space<double> space(as_view(base), {as_view(t1), as_view(t2)});
    std::size_t calls = 0;
    const auto loss = [&](host_view<const double> p) {
        ++calls;
        return p[0] + 10 * p[1] + 100 * p[2];
    };
    const auto grid = loss_plane(space, {.lambda1 = {0, 1, 2}, .lambda2 = {0, 0.5}}, loss);
    CHECK(calls == 6);
    for (std::size_t i = 0; i < 3; ++i) {
        for (std::size_t j = 0; j < 2; ++j) {
            CHECK(grid.at(i, j) == 1 + 10 * static_cast<double>(i) + 50 * static_cast<double>(j));
        }
    }
    CHECK(loss_plane(space, {.task1 = 1, .task2 = 0, .lambda1 = {1, 2}}, loss).values
        == std::vector<double>{111, 121, 211, 221});
}

TEST_CASE("task_space and loss_plane: errors")
{
    const std::vector<double> base{1, 0, 0}, t1{0, 1, 0}, other{0, 0};
    CHECK_THROWS_AS((task_space<double>(as_view(base), {})), invalid_argument);
    CHECK_THROWS_AS((task_space<double>(as_view(base), {as_view(other)})), shape_mismatch);
    task_space<double> space(as_view(base), {as_view(t1), as_view(t1)});
    CHECK_THROWS_AS((void)space.at(std::vector<double>{1}), invalid_argument);
    CHECK_THROWS_AS((void)space.at(std::vector<double>{1, std::numeric_limits<double>::quiet_NaN()}), invalid_argument);
    const auto loss = [](host_view<const double>) { return 0.0; };
    CHECK_THROWS_AS((void)loss_plane(space, {.task1 = 0, .task2 = 0, .lambda1 = {1}}, loss), invalid_argument);
    CHECK_THROWS_AS((void)loss_plane(space, {.task1 = 0, .task2 = 2, .lambda1 = {1}}, loss), invalid_argument);
    CHECK_THROWS_AS((void)loss_plane(space, {.lambda1 = {}}, loss), invalid_argument);
}
