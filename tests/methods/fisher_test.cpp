// Fisher merging: against its definition, golden cases, closed forms, and statistics that are not what they should be.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/goldens.hpp"
#include "../reference/random_models.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/fisher.hpp>

#include <doctest/doctest.h>

#include <limits>

using namespace taskvec;

namespace {

/// Non-negative Fishers, about one in six entries 0 (in all tasks where the index is a multiple of 7).
template <class T>
std::vector<std::vector<T>> random_fishers(const testing::random_models<T>& models, unsigned seed)
{
    std::mt19937 generator(seed);
    std::vector<std::vector<T>> result;
    for (std::size_t t = 0; t < models.tasks.size(); ++t) {
        result.emplace_back();
        for (std::size_t i = 0; i < models.base.size(); ++i) {
            const float draw = static_cast<float>(generator() % 1000) / 250.0f;
            result.back().push_back(narrow<T>(i % 7 == 0 || generator() % 10 == 0 ? 0.0f : draw * draw));
        }
    }
    return result;
}

template <class T>
std::vector<const_model_ref> models_over(
    const testing::random_models<T>& models, const std::vector<std::vector<T>>& values)
{
    std::vector<const_model_ref> result;
    for (const auto& one : values) { result.push_back(models.model(one)); }
    return result;
}

} // namespace

TEST_CASE_TEMPLATE(
    "Fisher merging is the importance-weighted mean, bit-equal for any threads and chunks", T, float, double, bf16, f16)
{
    const testing::random_models<T> models({3000, 1, 64, 2048, 0}, 3, 5);
    const auto fishers = random_fishers(models, 8);
    for (const bool normalize : {false, true}) {
        const fisher_options options{
            .fishers = models_over(models, fishers), .weights = {0.5, 2.0, 1.25}, .normalize = normalize};
        std::vector<T> first;
        for (const unsigned threads : {1u, 4u}) {
            for (const std::size_t chunk : {64u, 3000u, 65536u}) {
                std::vector<T> out;
                model_options how;
                how.chunk = chunk;
                merge(cpu{.threads = threads}, options, models.task_models(), models.output(out), how);
                if (first.empty()) { first = out; }
                CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(T)) == 0);
            }
        }
        std::vector<double> norm(3, 1.0);
        for (std::size_t t = 0; t < 3 && normalize; ++t) {
            double square = 0;
            for (const T f : fishers[t]) { square += widen<double>(f) * widen<double>(f); }
            norm[t] = std::sqrt(square);
        }
        double worst = 0;
        for (std::size_t i = 0; i < first.size(); ++i) {
            double above = 0, below = 0, plain = 0, size = 0;
            for (std::size_t t = 0; t < 3; ++t) {
                const double c = options.weights[t], x = widen<double>(models.tasks[t][i]),
                             f = widen<double>(fishers[t][i]) / norm[t];
                above += c * f * x;
                below += c * f;
                plain += c * x / 3.75;
                size = std::max(size, std::abs(x));
            }
            const double expected = below < 1e-12 ? plain : above / below;
            worst = std::max(worst, std::abs(widen<double>(first[i]) - expected) / size);
        }
        const double rounding = std::same_as<T, bf16> ? 4e-3
            : std::same_as<T, f16>                    ? 5e-4
            : std::same_as<T, float>                  ? 1e-6
                                                      : 1e-15;
        CHECK(worst < rounding);
    }
}

TEST_CASE_TEMPLATE("stored words give the bits of rows, for any number of tasks and type of Fisher", T, float, bf16)
{
    for (const std::size_t tasks : {1u, 2u, 3u, 4u, 5u, 8u, 9u, 70u}) {
        const testing::random_models<T> models({5000, 33}, tasks, static_cast<unsigned>(tasks));
        const auto fishers = random_fishers(models, 3);
        // The same values in f64 are read row by row.
        std::vector<std::vector<double>> wide;
        std::vector<std::vector<float>> single;
        for (const auto& fisher : fishers) {
            wide.emplace_back();
            single.emplace_back();
            for (const T value : fisher) {
                wide.back().push_back(widen<double>(value));
                single.back().push_back(widen<float>(value));
            }
        }
        const auto merged = [&](const auto& values) {
            std::vector<const_model_ref> statistics;
            for (const auto& one : values) {
                using F = typename std::remove_cvref_t<decltype(one)>::value_type;
                statistics.push_back({{"t0", as_tensor(host_view<const F>(one.data(), 5000))},
                    {"t1", as_tensor(host_view<const F>(one.data() + 5000, 33))}});
            }
            std::vector<T> out;
            merge(cpu{}, fisher_options{.fishers = statistics, .weights = std::vector<double>(tasks, 0.3)},
                models.task_models(), models.output(out));
            return out;
        };
        const auto by_rows = merged(wide);
        for (const auto& other : {merged(fishers), merged(single)}) {
            CHECK(std::memcmp(other.data(), by_rows.data(), by_rows.size() * sizeof(T)) == 0);
        }
    }
}

TEST_CASE("norms of f64 Fishers are not those of their f32 roundings")
{
    // One f32 tensor and one f64 tensor: the norm is over both, and the second shows it to 15 digits.
    const std::vector<float> a{1, 2}, b{4, 8};
    const std::vector<double> wide_a{1}, wide_b{3}, f_a{1 + 1e-9, 1.0 / 3}, f_b{0.2, 0.7}, g_a{0.1}, g_b{0.3};
    const auto model = [](const auto& narrow_part, const auto& wide_part) {
        using N = typename std::remove_cvref_t<decltype(narrow_part)>::value_type;
        return const_model_ref{{"n", as_tensor(host_view<const N>(narrow_part.data(), 2))},
            {"w", as_tensor(host_view<const double>(wide_part.data(), 1))}};
    };
    std::vector<float> out(2);
    std::vector<double> wide_out(1);
    const std::vector<const_model_ref> tasks{model(a, wide_a), model(b, wide_b)};
    merge(cpu{}, fisher_options{.fishers = {model(f_a, g_a), model(f_b, g_b)}, .normalize = true}, tasks,
        model_ref{{"n", as_tensor(host_view<float>(out.data(), 2))},
            {"w", as_tensor(host_view<double>(wide_out.data(), 1))}});
    const double in_a = g_a[0] / std::sqrt(f_a[0] * f_a[0] + f_a[1] * f_a[1] + g_a[0] * g_a[0]);
    const double in_b = g_b[0] / std::sqrt(f_b[0] * f_b[0] + f_b[1] * f_b[1] + g_b[0] * g_b[0]);
    CHECK(wide_out[0] == doctest::Approx((in_a * 1 + in_b * 3) / (in_a + in_b)).epsilon(1e-14));
}

TEST_CASE("equal Fishers give the average, a Fisher that is alone gives its task, none at all gives the average")
{
    const testing::random_models<float> models({500}, 3, 1);
    const std::vector<std::vector<float>> equal(3, std::vector<float>(500, 4.0f)),
        none(3, std::vector<float>(500, 0.0f));
    std::vector<float> out(500), average(500);
    merge(cpu{}, average_options{}, models.tasks, average);
    merge(cpu{}, fisher_options{.fishers = flat_fishers(equal)}, models.tasks, out);
    CHECK(out == average); // powers of two scale exactly
    merge(cpu{}, fisher_options{.fishers = flat_fishers(none)}, models.tasks, out);
    CHECK(out == average);
    merge(cpu{}, fisher_options{.fishers = flat_fishers(none), .normalize = true}, models.tasks, out);
    CHECK(out == average);
    merge(cpu{}, fisher_options{.fishers = flat_fishers(none), .floor = 0}, models.tasks, out);
    CHECK(out == average);
    auto alone = none;
    alone[1].assign(500, 8.0f);
    merge(cpu{}, fisher_options{.fishers = flat_fishers(alone), .normalize = true}, models.tasks, out);
    double worst = 0;
    for (std::size_t i = 0; i < 500; ++i) {
        worst =
            std::max(worst, static_cast<double>(std::abs(out[i] - models.tasks[1][i]) / std::abs(models.tasks[1][i])));
    }
    CHECK(worst < 3e-7); // one product and one quotient
}

TEST_CASE("the plain average begins exactly below the floor")
{
    const std::vector<std::vector<float>> tasks{{1, 1, 1}, {3, 3, 3}}, fishers{{0.25f, 0.25f, 0}, {0.75f, 0.5f, 0}};
    std::vector<float> out(3);
    merge(cpu{}, fisher_options{.fishers = flat_fishers(fishers), .floor = 1.0}, tasks, out);
    CHECK(out == std::vector<float>{2.5f, 2.0f, 2.0f});
    merge(cpu{}, fisher_options{.fishers = flat_fishers(fishers), .weights = {3, 1}, .floor = 0.0}, tasks, out);
    CHECK(out == std::vector<float>{2.0f, 1.8f, 1.5f});
}

TEST_CASE("golden Fisher merges")
{
    const reference::goldens file("statistics/statistics.safetensors");
    const auto cases = file.cases("fisher");
    CHECK(cases.size() == 8);
    for (const auto& golden : cases) {
        CAPTURE(golden.name);
        const auto expected = file.expected(golden);
        const reference::like out(expected);
        merge(cpu{},
            fisher_options{.fishers = file.inputs(golden, "fisher"),
                .weights = golden.options()["weights"],
                .normalize = golden.options()["normalize"],
                .floor = golden.options()["floor"]},
            file.inputs(golden, "task"), out.model());
        CHECK(reference::largest_difference(out.model(), expected) <= golden.tolerance());
    }
}

TEST_CASE("statistics of another model, negative, NaN, missing, aliased: named errors")
{
    std::vector<float> x{1, 2, 3, 4}, y{5, 6, 7, 8}, f{1, 1, 1, 1}, out(4);
    const auto tensor = [](const std::vector<float>& v, extents shape = {4}) {
        return const_tensor_ref{v.data(), dtype::f32, std::move(shape)};
    };
    const std::vector<const_model_ref> tasks{{{"w", tensor(x)}}, {{"w", tensor(y)}}};
    const model_ref result{{"w", {out.data(), dtype::f32, {4}}}};
    const const_model_ref good{{"w", tensor(f)}};
    const auto run = [&](std::vector<const_model_ref> fishers, model_options how = {}) {
        merge(cpu{}, fisher_options{.fishers = std::move(fishers)}, tasks, result, how);
    };

    CHECK_THROWS_WITH_AS(
        run({good}), "1 Fishers for 2 tasks: give one each, in the order of the tasks", invalid_argument);
    CHECK_THROWS_WITH_AS(run({good, {{"v", tensor(f)}, {"w", tensor(f)}}}),
        "tensor 'v' of the Fisher of task 2 is not in the models: these are the statistics of another model",
        invalid_argument);
    CHECK_THROWS_WITH_AS(run({good, {}}),
        "tensor 'w' is missing in the Fisher of task 2: collect statistics for every parameter, or exclude the tensor",
        invalid_argument);
    CHECK_THROWS_WITH_AS(run({{{"w", tensor(f, {2, 2})}}, good}),
        "tensor 'w' has shape [2, 2] in the Fisher of task 1 but [4] in the models: these are the statistics of "
        "another model",
        shape_mismatch);
    std::vector<std::int64_t> whole(4);
    CHECK_THROWS_AS(run({{{"w", {whole.data(), dtype::i64, {4}}}}, good}), dtype_mismatch);
    std::vector<float> bad{1, 1, -2, 1};
    model_options how;
    how.labels = {"a", "b"};
    CHECK_THROWS_WITH_AS(run({good, {{"w", tensor(bad)}}}, how),
        "tensor 'w' of the Fisher of b holds -2 at index 2: a diagonal Fisher is a mean of squares and cannot be "
        "negative",
        invalid_argument);
    bad[2] = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_WITH_AS(run({good, {{"w", tensor(bad)}}}),
        "tensor 'w' of the Fisher of task 2 holds NaN at index 2: collect the statistics again", nonfinite_error);
    how.on_nonfinite = nonfinite::propagate;
    run({good, {{"w", tensor(bad)}}}, how);
    CHECK(std::isnan(out[2]));
    CHECK(out[1] == 4.0f);
    CHECK_THROWS_AS(
        merge(cpu{}, fisher_options{.fishers = {good, good}, .weights = {1, -1}}, tasks, result), invalid_argument);
    CHECK_THROWS_AS(
        merge(cpu{}, fisher_options{.fishers = {good, good}, .weights = {0, 0}}, tasks, result), invalid_argument);
    CHECK_THROWS_AS(
        merge(cpu{}, fisher_options{.fishers = {good, good}, .floor = -1}, tasks, result), invalid_argument);
    CHECK_THROWS_AS(
        merge(cpu{}, fisher_options{.fishers = {good, good}, .labels = {"x"}}, tasks, result), invalid_argument);
    // In place over a task is fine, over a Fisher is not.
    CHECK_THROWS_AS(
        merge(cpu{}, fisher_options{.fishers = {good, good}}, tasks, model_ref{{"w", {f.data(), dtype::f32, {4}}}}),
        invalid_argument);
    merge(cpu{}, fisher_options{.fishers = {good, good}}, tasks, model_ref{{"w", {x.data(), dtype::f32, {4}}}});
    CHECK(x == std::vector<float>{3, 4, 5, 6});
}

TEST_CASE("a tensor that stands for the base's needs no Fisher; excluded tensors need none either")
{
    std::vector<float> b{10, 10}, x{1, 2}, f{1, 3}, out(2);
    const auto tensor = [](const std::vector<float>& v) { return const_tensor_ref{v.data(), dtype::f32, {2}}; };
    const const_model_ref base{{"w", tensor(b)}};
    const std::vector<const_model_ref> tasks{{}, {{"w", tensor(x)}}};
    const model_ref result{{"w", {out.data(), dtype::f32, {2}}}};
    model_options how;
    how.on_missing = missing_tensors::base;
    merge(cpu{}, fisher_options{.fishers = {{}, {{"w", tensor(f)}}}}, base, tasks, result, how);
    CHECK(out == x);
    how.include = [](std::string_view) { return false; };
    merge(cpu{}, fisher_options{.fishers = {{}, {{"w", tensor(f)}}}}, base, tasks, result, how);
    CHECK(out == b);
}
