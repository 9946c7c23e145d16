// Difference, application, combination; dot, norm, cosine of a fixed shape.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/ties.hpp"

#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <doctest/doctest.h>

#include <limits>

using namespace taskvec;
using reference::product;
using reference::sum;

TEST_CASE_TEMPLATE("difference, apply, combine and negate equal their definitions", T, float, double, bf16, f16)
{
    using A = arithmetic_type<T>;
    for (const std::size_t n : {0, 1, 2047, 2048, 200001}) {
        const testing::random_models<T> m({n}, 2, static_cast<unsigned>(n));
        std::vector<T> tau(n), applied(n), combined(n), negated(n);
        const cpu policy{.threads = 2};
        difference(policy, m.tasks[0], m.base, tau);
        apply(policy, m.base, m.tasks[1], -0.3, applied);
        combine(policy, m.tasks, std::vector{0.25, -1.5}, combined);
        negate(policy, m.base, negated);
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < n; ++i) {
            const A base = widen<A>(m.base[i]), a = widen<A>(m.tasks[0][i]), b = widen<A>(m.tasks[1][i]);
            wrong += widen<A>(tau[i]) != widen<A>(narrow<T>(sum(a, -base)));
            wrong += widen<A>(applied[i]) != widen<A>(narrow<T>(sum(base, product(static_cast<A>(-0.3), b))));
            wrong += widen<A>(combined[i]) != widen<A>(narrow<T>(sum(product(A(0.25), a), product(A(-1.5), b))));
            wrong += widen<A>(negated[i]) != -base;
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE("an analogy adds and subtracts task vectors")
{
    const std::vector<float> base{1, 1}, a{2, 1}, b{1, 3}, c{5, 1};
    std::vector<float> out(2);
    merge(cpu{}, analogy(0.5), base, std::vector{c, b, a}, out);
    CHECK(out == std::vector<float>{1 + 0.5f * (4 + 0 - 1), 1 + 0.5f * (0 + 2 - 0)});
}

TEST_CASE("dots have the same bits for any threads, and small error")
{
    const testing::random_models<float> m({1000003}, 2, 4);
    long double exact = 0, size = 0;
    for (std::size_t i = 0; i < m.base.size(); ++i) {
        exact += static_cast<long double>(m.base[i]) * m.tasks[0][i];
        size += std::abs(static_cast<long double>(m.base[i]) * m.tasks[0][i]);
    }
    const double one = dot(cpu{.threads = 1}, m.base, m.tasks[0]);
    CHECK(one == dot(cpu{.threads = 3}, m.base, m.tasks[0]));
    CHECK(std::abs(static_cast<double>(one - exact)) <= static_cast<double>(size) * 32 * 0x1p-53);
    CHECK(norm(cpu{}, std::vector<float>{3, 4}) == 5.0);
    CHECK(cosine(cpu{}, std::vector<float>{1, 0}, std::vector<float>{1, 1}) == doctest::Approx(std::sqrt(0.5)));
    CHECK(cosine(cpu{}, std::vector<float>{0, 0}, std::vector<float>{1, 1}) == 0.0);
    CHECK(norm(cpu{}, std::vector<float>{}) == 0.0);

    const testing::random_models<bf16> models({5000, 10, 0, 300}, 3, 6);
    const auto base = models.model(models.base);
    const auto tasks = models.task_models();
    std::vector<std::vector<double>> seen;
    for (const unsigned threads : {1u, 3u}) {
        for (const std::size_t chunk : {64u, 65536u}) {
            model_options how;
            how.chunk = chunk;
            seen.push_back(cosine_matrix(cpu{.threads = threads}, aligned_models(&base, tasks, how)));
        }
    }
    for (const auto& matrix : seen) { CHECK(matrix == seen[0]); }
    std::vector<double> u(models.base.size()), v(models.base.size());
    for (std::size_t i = 0; i < u.size(); ++i) {
        u[i] = widen<double>(models.tasks[0][i]) - widen<double>(models.base[i]);
        v[i] = widen<double>(models.tasks[2][i]) - widen<double>(models.base[i]);
    }
    CHECK(seen[0][2] == doctest::Approx(cosine(cpu{}, u, v)).epsilon(1e-6));
    CHECK(seen[0][2] == seen[0][6]);
    CHECK(seen[0][4] == 1.0);
}

TEST_CASE("bad inputs are named")
{
    std::vector<float> two(2), three(3), poisoned{1, std::numeric_limits<float>::quiet_NaN()};
    CHECK_THROWS_WITH_AS(
        difference(cpu{}, two, three, two), "input 2 has 3 elements; the output has 2", shape_mismatch);
    CHECK_THROWS_WITH_AS(difference(cpu{}, two, poisoned, two),
        "input 2 holds NaN at index 1: repair it, or ask for non-finite values to propagate", nonfinite_error);
    CHECK_NOTHROW(difference(cpu{}, two, poisoned, two, nonfinite::propagate));
    CHECK(std::isnan(two[1]));
    CHECK_THROWS_AS(combine(cpu{}, std::vector{two, two}, std::vector{1.0}, two), invalid_argument);
    CHECK_THROWS_AS(combine(cpu{}, std::vector<std::vector<float>>{}, std::vector<double>{}, two), invalid_argument);
    CHECK_THROWS_AS((void)dot(cpu{}, two, three), shape_mismatch);
}

TEST_CASE("cosines of task vectors whose squares, or whose entries, are beyond their types are those of the vectors")
{
    const auto matrix_of = [](auto base, auto x, auto y, nonfinite how = nonfinite::error) {
        const const_model_ref first = detail::flat_model(as_view(base));
        const std::array tasks{detail::flat_model(as_view(x)), detail::flat_model(as_view(y))};
        model_options options;
        options.on_nonfinite = how;
        return cosine_matrix(cpu{}, aligned_models(&first, tasks, options));
    };
    using wide = std::vector<double>;
    using narrow = std::vector<float>;
    const auto near = [](const std::vector<double>& found, double expected) {
        CHECK(found[0] == 1);
        CHECK(found[3] == 1);
        CHECK(found[1] == doctest::Approx(expected).epsilon(1e-12));
        CHECK(found[1] == found[2]);
        CHECK(std::abs(found[1]) <= 1);
    };
    // (1, 2)·(2, 1) / 5, whatever the scale of each is
    for (const double x : {1e160, 1.0, 1e-170, 4e-320}) {
        for (const double y : {3e200, 1e-250, -1e-170}) {
            near(matrix_of(wide{0, 0}, wide{x, 2 * x}, wide{2 * y, y}), y < 0 ? -0.8 : 0.8);
            const wide a{x, 2 * x}, b{2 * y, y};
            CHECK(cosine(cpu{}, a, b) == doctest::Approx(y < 0 ? -0.8 : 0.8).epsilon(1e-12));
        }
    }
    near(matrix_of(wide{-1e308, 0}, wide{1e308, 1e308}, wide{1e308, -1e308}), 0.6); // (2, 1)·(2, −1) / 5
    near(matrix_of(narrow{-3e38F, 3e38F}, narrow{3e38F, 3e38F}, narrow{3e38F, 0}), 2 / std::sqrt(5.0));
    // A task vector of 0 beside them, and equal ones: never above 1.
    CHECK(matrix_of(wide{1, 1}, wide{1, 1}, wide{1e200, 1}) == std::vector<double>{0, 0, 0, 1});
    const wide third{1.0 / 3, 0.1, 1e-3 / 7, 0.7, 1.9};
    for (const double value : matrix_of(wide(5), third, third)) { CHECK(value <= 1); }
    // What is not finite has no cosine, not even with itself.
    const double infinity = std::numeric_limits<double>::infinity();
    for (const double poison : {infinity, std::numeric_limits<double>::quiet_NaN()}) {
        const auto found = matrix_of(wide{0, 0}, wide{poison, 1}, wide{1e-170, 0}, nonfinite::propagate);
        CHECK(std::isnan(found[0]));
        CHECK(std::isnan(found[1]));
        CHECK(found[3] == 1);
    }
}
