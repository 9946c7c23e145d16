// SLERP: golden cases, the definition, its degenerate cases, and what it refuses.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/goldens.hpp"
#include "../reference/random_models.hpp"

#include <taskvec/methods/slerp.hpp>

#include <doctest/doctest.h>

using namespace taskvec;

TEST_CASE("golden SLERPs, from the base to a task")
{
    const reference::goldens file("merge/mergekit.safetensors");
    const auto cases = file.cases("slerp");
    CHECK(cases.size() >= 8);
    for (const auto& golden : cases) {
        CAPTURE(golden.name);
        const auto expected = file.expected(golden);
        const reference::like out(expected);
        merge(cpu{}, slerp_options{.t = golden.options()["t"]}, file.input(golden, "base"), file.inputs(golden, "task"),
            out.model());
        CHECK(reference::largest_difference(out.model(), expected) <= golden.tolerance());
    }
}

TEST_CASE_TEMPLATE(
    "SLERP equals its definition per tensor, bit-equal for any threads and chunks", T, float, double, bf16, f16)
{
    const testing::random_models<T> models({3000, 1, 64, 5000, 0}, 2, 5);
    std::vector<T> first;
    for (const unsigned threads : {1u, 3u}) {
        for (const std::size_t chunk : {64u, 3000u, 65536u}) {
            std::vector<T> out;
            model_options how;
            how.chunk = chunk;
            merge(cpu{.threads = threads}, slerp_options{.t = 0.3}, models.task_models(), models.output(out), how);
            if (first.empty()) { first = out; }
            CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(T)) == 0);
        }
    }
    double worst = 0;
    std::size_t begin = 0;
    for (const std::size_t size : models.sizes) {
        const auto a = [&](std::size_t i) { return widen<double>(models.tasks[0][begin + i]); };
        const auto b = [&](std::size_t i) { return widen<double>(models.tasks[1][begin + i]); };
        double aa = 0, bb = 0, ab = 0, largest = 0;
        for (std::size_t i = 0; i < size; ++i) {
            aa += a(i) * a(i);
            bb += b(i) * b(i);
            ab += a(i) * b(i);
            largest = std::max({largest, std::abs(a(i)), std::abs(b(i))});
        }
        const double cosine = ab / std::sqrt(aa * bb), angle = std::acos(std::clamp(cosine, -1.0, 1.0));
        const bool linear = std::abs(cosine) > 0.9995;
        const double p = linear ? 0.7 : std::sin(0.7 * angle) / std::sin(angle),
                     q = linear ? 0.3 : std::sin(0.3 * angle) / std::sin(angle);
        for (std::size_t i = 0; i < size; ++i) {
            worst = std::max(worst, std::abs(widen<double>(first[begin + i]) - (p * a(i) + q * b(i))) / largest);
        }
        begin += size;
    }
    CHECK(worst < (std::same_as<T, bf16> ? 4e-3 : std::same_as<T, f16> ? 6e-4 : std::same_as<T, float> ? 2e-7 : 1e-15));
}

TEST_CASE("right angles, zero vectors, collinear vectors, the ends")
{
    const auto slerp = [](std::vector<float> a, std::vector<float> b, double t) {
        std::vector<float> out(a.size());
        merge(cpu{}, slerp_options{.t = t}, std::vector{a, b}, out);
        return out;
    };
    const auto half = slerp({2, 0}, {0, 2}, 0.5); // on the circle, not on the chord
    CHECK(half[0] == doctest::Approx(std::sqrt(2.0)));
    CHECK(half[1] == doctest::Approx(std::sqrt(2.0)));
    CHECK(slerp({2, 0}, {0, 0}, 0.25) == std::vector<float>{1.5f, 0});
    CHECK(slerp({0, 0}, {0, 0}, 0.25) == std::vector<float>{0, 0});
    CHECK(slerp({1, 2}, {2, 4}, 0.5) == std::vector<float>{1.5f, 3});
    CHECK(slerp({1, 2}, {-1, -2}, 0.25) == std::vector<float>{0.5f, 1});
    CHECK(slerp({1, 2}, {3, -4}, 0) == std::vector<float>{1, 2});
    const auto end = slerp({1, 2}, {3, -4}, 1);
    CHECK(end[0] == doctest::Approx(3));
    CHECK(end[1] == doctest::Approx(-4));
    // cos = 0.9995 is the border: one side interpolates on the arc, the other on the chord.
    const auto arc = slerp({1, 0}, {0.9994f, 0.034636f}, 0.5), chord = slerp({1, 0}, {0.9996f, 0.028282f}, 0.5);
    CHECK(std::hypot(arc[0], arc[1]) == doctest::Approx(1).epsilon(1e-5));
    CHECK(std::hypot(chord[0], chord[1]) < 0.99991);
}

TEST_CASE("SLERP refuses three models, one without a base, and t that is no number")
{
    const std::vector<float> x{1, 2};
    std::vector<float> out(2);
    CHECK_THROWS_WITH_AS(merge(cpu{}, slerp_options{}, std::vector{x, x, x}, out),
        "SLERP goes between two models, and there are 3 tasks: give two tasks, or a base and one task",
        invalid_argument);
    CHECK_THROWS_WITH_AS(merge(cpu{}, slerp_options{}, std::vector<std::vector<float>>{x}, out),
        "SLERP goes between two models, and there is one: give two tasks, or a base and one task", invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, slerp_options{.t = NAN}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, slerp_options{}, std::vector{x, {1, NAN}}, out), nonfinite_error);
}
