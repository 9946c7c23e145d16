// Results that the output's dtype cannot hold.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/reuse/sparse_addition.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <string>

using namespace taskvec;

namespace {

constexpr std::size_t size = 5000, place = 4321; // beyond the first block

template <class T>
std::vector<T> filled_with(float value, float there)
{
    std::vector<T> values(size, narrow<T>(value));
    values[place] = narrow<T>(there);
    return values;
}

template <class T, class Options>
std::vector<T> merged(const Options& options, const std::vector<T>& base, const std::vector<T>& task, model_options how)
{
    std::vector<T> out(size);
    merge(cpu{}, options, base, std::vector<std::vector<T>>{task}, out, how);
    return out;
}

template <class T, class Options>
void check_all(const Options& options, const std::vector<T>& base, const std::vector<T>& task, double largest)
{
    const auto open = merged(options, base, task, {});
    CHECK(std::isinf(static_cast<double>(widen<double>(open[place]))));
    const auto closed = merged(options, base, task, {.on_overflow = overflow::saturate});
    CHECK(static_cast<double>(widen<double>(closed[place])) == largest);
    for (std::size_t i = 0; i < size; ++i) {
        if (i != place) { REQUIRE(widen<double>(closed[i]) == widen<double>(open[i])); }
    }
    try {
        (void)merged(options, base, task, {.on_overflow = overflow::error});
        FAIL("no error");
    }
    catch (const nonfinite_error& found) {
        const std::string text = found.what();
        CHECK(text.find("tensor 'values' would hold infinity at index 4321") == 0);
        CHECK(text.find("saturate") != text.npos);
    }
}

} // namespace

TEST_CASE("a result beyond its dtype is found in every storage type")
{
    check_all<f16>(task_arithmetic_options{.lambda = 2}, filled_with<f16>(1, 30000), filled_with<f16>(2, 60000), 65504);
    check_all<f16>(
        task_arithmetic_options{.lambda = 2}, filled_with<f16>(1, -30000), filled_with<f16>(2, -60000), -65504);
    check_all<f16>(
        ties_options{.density = 1, .lambda = 3}, filled_with<f16>(1, 30000), filled_with<f16>(2, 60000), 65504);
    check_all<bf16>(task_arithmetic_options{.lambda = 3}, filled_with<bf16>(1, 1e38f), filled_with<bf16>(2, 3e38f),
        3.3895313892515355e38);
    check_all<float>(task_arithmetic_options{.lambda = 3}, filled_with<float>(1, 1e38f), filled_with<float>(2, 3e38f),
        std::numeric_limits<float>::max());
    check_all<double>(
        task_arithmetic_options{.lambda = 1e300}, std::vector<double>(size, 1.0),
        [] {
            std::vector<double> values(size, 1.0);
            values[place] = 1e30;
            return values;
        }(),
        std::numeric_limits<double>::max());
}

TEST_CASE("narrowing may overflow where nothing else does")
{
    std::vector<float> a(size, 1.0f);
    a[place] = 1e5f;
    std::vector<f16> out(size);
    const std::vector<std::vector<float>> tasks{a, a};
    CHECK_THROWS_AS(merge(cpu{}, average_options{}, tasks, out, {.on_overflow = overflow::error}), nonfinite_error);
    merge(cpu{}, average_options{}, tasks, out, {.on_overflow = overflow::saturate});
    CHECK(widen<float>(out[place]) == 65504.0f);
    a[place] = 65519.0f; // rounds to the largest number
    merge(cpu{}, average_options{}, std::vector<std::vector<float>>{a, a}, out, {.on_overflow = overflow::error});
    CHECK(widen<float>(out[place]) == 65504.0f);
}

TEST_CASE("NaN and infinity of an input are not overflow")
{
    auto task = filled_with<f16>(2, HUGE_VALF);
    const auto base = filled_with<f16>(1, 3);
    const auto out = merged(
        task_arithmetic_options{}, base, task, {.on_nonfinite = nonfinite::propagate, .on_overflow = overflow::error});
    CHECK(std::isinf(widen<float>(out[place])));
    CHECK_THROWS_WITH_AS((void)merged(task_arithmetic_options{}, base, task, {.on_overflow = overflow::error}),
        doctest::Contains("of task 1 holds infinity"), nonfinite_error);
}

TEST_CASE("saturated results are counted")
{
    const auto base = filled_with<f16>(30000, 30000);
    const auto task = filled_with<f16>(60000, 30000);
    const_model_ref base_model = detail::flat_model(as_view(base)), task_model = detail::flat_model(as_view(task));
    const aligned_models models(&base_model, {&task_model, 1}, {.on_overflow = overflow::saturate});
    std::vector<f16> out(size);
    memory_sink sink({out.data()});
    CHECK(merge(cpu{}, task_arithmetic_options{.lambda = 2}, models, sink).saturated == size - 1);
}

TEST_CASE("a large factor overflows in the widest dtypes too")
{
    const std::vector<float> base{0, 1, 2}, task{1e5F, 1, 2};
    std::vector<float> out(3);
    model_options how;
    how.on_overflow = overflow::error;
    CHECK_THROWS_AS(
        merge(cpu{}, task_arithmetic_options{.lambda = 1e34}, base, std::array{task}, out, how), nonfinite_error);
    CHECK_THROWS_AS(
        merge(cpu{}, task_arithmetic_options{.lambda = 1, .weights = {1e34}}, base, std::array{task}, out, how),
        nonfinite_error);
    how.on_overflow = overflow::saturate;
    merge(cpu{}, task_arithmetic_options{.lambda = 1e34}, base, std::array{task}, out, how);
    CHECK(out == std::vector<float>{std::numeric_limits<float>::max(), 1, 2});
}

TEST_CASE("a result that is written again, once the majority of signs is known, is counted once")
{
    // Entry 0: a conflict of equal sums, which the majority (negative) decides. Entry 1: beyond F16, in the same block.
    const std::vector<f16> base(8);
    std::vector<f16> x(8), y(8);
    for (std::size_t i = 0; i < 8; ++i) { x[i] = y[i] = narrow<f16>(i == 1 ? 60000.0F : -1.0F); }
    x[0] = narrow<f16>(2.0F);
    y[0] = narrow<f16>(-2.0F);
    const const_model_ref first = detail::flat_model(as_view(base));
    const std::array tasks{detail::flat_model(as_view(x)), detail::flat_model(as_view(y))};
    const aligned_models models(&first, tasks, {.on_overflow = overflow::saturate});
    std::vector<f16> out(8);
    memory_sink sink({out.data()});
    const ties_options how{.density = 1, .lambda = 2, .zero_sign = zero_sign::majority};
    CHECK(merge(cpu{}, how, models, sink).saturated == 1);
    CHECK(widen<float>(out[0]) == -4); // it was written again
    CHECK(widen<float>(out[1]) == 65504);
}

TEST_CASE("what a delta holds of infinity is no overflow, and what it makes of finite numbers is")
{
    const float infinity = std::numeric_limits<float>::infinity();
    const std::vector<float> base{1, 2, 3e38F};
    const auto added = [&](const std::vector<float>& values, nonfinite on_nonfinite) {
        sparse_vector<float> entries{.shape = {3}, .indices = {0, 2}, .values = {values.begin(), values.end()}};
        const const_model_ref model = detail::flat_model(as_view(base));
        sparse_model delta;
        delta.insert_or_assign(model.begin()->name, std::move(entries));
        const aligned_models models(
            &model, {&model, 1}, {.on_nonfinite = on_nonfinite, .on_overflow = overflow::error});
        std::vector<float> out(3);
        memory_sink sink({out.data()});
        const auto parts = views(delta);
        add_delta(cpu{}, models, parts, 1.0, sink);
        return out;
    };
    CHECK(added({infinity, -1e38F}, nonfinite::propagate) == std::vector<float>{infinity, 2, 3e38F - 1e38F});
    CHECK_THROWS_WITH_AS(
        (void)added({infinity, -1e38F}, nonfinite::error), doctest::Contains("holds infinity"), nonfinite_error);
    CHECK_THROWS_WITH_AS(
        (void)added({infinity, 1e38F}, nonfinite::propagate), doctest::Contains("index 2"), nonfinite_error);
}
