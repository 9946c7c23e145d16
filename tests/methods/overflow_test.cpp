// Results that the output's dtype cannot hold.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

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
