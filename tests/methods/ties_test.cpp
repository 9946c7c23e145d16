// TIES: hand-worked cases, and every option against the definition written out.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/ties.hpp"

#include <taskvec/methods/ties.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

using namespace taskvec;

namespace {

std::vector<float> merged(
    const ties_options& options, const std::vector<float>& base, const std::vector<std::vector<float>>& tasks)
{
    std::vector<float> out(base.size());
    merge(cpu{}, options, base, tasks, out);
    return out;
}

template <class T>
void check_against_reference(
    const testing::random_models<T>& models, const ties_options& options, const cpu& policy, std::size_t chunk)
{
    std::vector<std::vector<arithmetic_type<T>>> tasks;
    for (const auto& task : models.tasks) { tasks.push_back(testing::widen_all(task)); }
    const auto expected = reference::ties(testing::widen_all(models.base), tasks, models.sizes, options);
    std::vector<T> out;
    model_options how;
    how.chunk = chunk;
    const auto task_models = models.task_models();
    for (const bool statistics : {false, true}) { // the fused kernel, and the row-by-row one
        how.statistics = statistics;
        const model_ref target = models.output(out);
        merge(policy, options, models.model(models.base), task_models, target, how);
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < expected.size(); ++i) {
            wrong += widen<double>(out[i]) != widen<double>(narrow<T>(expected[i]));
        }
        CAPTURE(statistics);
        CAPTURE(models.tasks.size());
        CHECK(wrong == 0);
    }
}

} // namespace

TEST_CASE("TIES by hand")
{
    // Task vectors (1, -2, 3), (-1, 4, 1): sums 0, 2, 4; the majority of signs is plus.
    CHECK(merged({.density = 1.0}, {0, 0, 0}, {{1, -2, 3}, {-1, 4, 1}}) == std::vector<float>{1, 4, 2});
    CHECK(merged({.density = 1.0, .zero_sign = zero_sign::none}, {0, 0, 0}, {{1, -2, 3}, {-1, 4, 1}})
        == std::vector<float>{0, 4, 2});
    CHECK(merged({.density = 1.0, .combine = disjoint_merge::sum}, {0, 0, 0}, {{1, -2, 3}, {-1, 4, 1}})
        == std::vector<float>{1, 4, 4});
    CHECK(merged({.density = 1.0, .combine = disjoint_merge::max}, {0, 0, 0}, {{1, -2, 3}, {-1, 4, 1}})
        == std::vector<float>{1, 4, 3});
    // A negative majority turns the zero sum the other way.
    CHECK(merged({.density = 1.0}, {0, 0, 0}, {{1, -2, -3}, {-1, -4, -1}}) == std::vector<float>{-1, -3, -2});
    // No majority: signs 0, 1, -1. Zero stays; the paper's code counts it as negative.
    CHECK(merged({.density = 1.0}, {0, 0, 0}, {{1, 2, -3}, {-1, 4, 1}}) == std::vector<float>{0, 3, -3});
    CHECK(merged(ties_options::as_in_ties_merging(), {0, 0, 0}, {{1, 2, -3}, {-1, 4, 1}})[0]
        == 0.0f); // density 0.2 trims it
    // Weights count in sum and divisor: (2·1 + 1·4)/3 = 2.
    CHECK(merged({.density = 1.0, .weights = {2, 1}}, {10, 0}, {{11, 1}, {14, -3}}) == std::vector<float>{12, -3});
    // The trim keeps floor(0.5·5) = 2 entries, the lower index first among equal magnitudes.
    CHECK(merged({.density = 0.5, .lambda = 2.0}, {0, 0, 0, 0, 0}, {{1, -3, 2, 2, 1}})
        == std::vector<float>{0, -6, 4, 0, 0});
    // At least one entry is kept.
    CHECK(merged({.density = 1e-9}, {0, 0, 0}, {{1, -3, 2}}) == std::vector<float>{0, -3, 0});
}

TEST_CASE("unresolved zeros decide as told")
{
    const std::vector<float> base{0, 0};
    const std::vector<std::vector<float>> tasks{{1, 2}, {-1, -2}};
    auto options = ties_options::as_in_ties_merging();
    options.density = 1.0;
    CHECK(merged(options, base, tasks) == std::vector<float>{-1, -2});
    CHECK(merged({.density = 1.0}, base, tasks) == std::vector<float>{0, 0});
    CHECK(merged({.density = 1.0, .zero_sign = zero_sign::positive}, base, tasks) == std::vector<float>{1, 2});
    CHECK(merged({.density = 1.0, .zero_sign = zero_sign::none}, base, tasks) == std::vector<float>{0, 0});
}

TEST_CASE("a sink for which bytes are final gets each of them once, settled")
{
    /// Takes nothing twice.
    struct final_sink final : tensor_sink {
        std::vector<float> values = std::vector<float>(3000);
        std::vector<int> times = std::vector<int>(3000);
        [[nodiscard]] bool rewritable() const override { return false; }
        void write(std::size_t, std::uint64_t offset, const void* data, std::size_t size) override
        {
            std::memcpy(values.data() + offset / sizeof(float), data, size);
            for (std::size_t i = 0; i < size / sizeof(float); ++i) { ++times[offset / sizeof(float) + i]; }
        }
    };
    std::vector<float> base(3000, 0), first(3000), second(3000);
    for (std::size_t i = 0; i < 3000; ++i) { // sums of 0, and a negative majority, which nothing guesses
        first[i] = static_cast<float>(i % 7 + 1);
        second[i] = i % 3 == 0 ? -9.0F : -first[i];
    }
    const const_model_ref before{{"w", as_tensor(as_view(base))}};
    const std::vector<const_model_ref> tasks{{{"w", as_tensor(as_view(first))}}, {{"w", as_tensor(as_view(second))}}};
    for (const bool statistics : {false, true}) {
        model_options how;
        how.chunk = 512;
        how.statistics = statistics;
        const aligned_models models(&before, tasks, how);
        std::vector<float> expected(3000);
        memory_sink memory({expected.data()});
        const auto plain = merge(cpu{.threads = 3}, ties_options{.density = 1.0}, models, memory);
        CHECK(expected[1] == -2.0F);
        final_sink once;
        const auto report = merge(cpu{.threads = 3}, ties_options{.density = 1.0}, models, once);
        CHECK(once.values == expected);
        CHECK(std::count(once.times.begin(), once.times.end(), 1) == 3000);
        CHECK(report.kept == plain.kept);
        CHECK(report.conflicting == plain.conflicting);
    }
}

TEST_CASE_TEMPLATE("TIES equals its definition in every storage type", T, float, double, bf16, f16)
{
    unsigned seed = 1;
    for (const std::size_t tasks : {1, 2, 3, 5, 8, 9}) {
        for (const int levels : {0, 3}) {
            const testing::random_models<T> models({1, 63, 2049, 0, 700}, tasks, seed++, levels);
            for (const double density : {1e-6, 0.2, 0.7, 1.0}) {
                ties_options options{.density = density, .lambda = 0.7};
                check_against_reference(models, options, cpu{.threads = 1 + seed % 3}, 64 + 13 * seed);
                options.scope = scope::tensor;
                check_against_reference(models, options, cpu{.threads = 2}, 1000);
            }
        }
    }
}

TEST_CASE("every combination of options equals the definition")
{
    const testing::random_models<float> models({500, 64, 1, 300}, 3, 77, 2);
    for (const auto over : {scope::model, scope::tensor}) {
        for (const auto combine : {disjoint_merge::mean, disjoint_merge::sum, disjoint_merge::max}) {
            for (const auto zero :
                {zero_sign::majority, zero_sign::majority_or_negative, zero_sign::positive, zero_sign::none}) {
                for (const auto trim : {trim_rule::exact, trim_rule::reach_next}) {
                    for (const bool weighted : {false, true}) {
                        ties_options options{.density = 0.4,
                            .lambda = 0.9,
                            .weights = {1.0, 0.5, 2.25},
                            .scope = over,
                            .combine = combine,
                            .zero_sign = zero,
                            .trim = trim};
                        options.weighted_election = weighted;
                        options.divide_by_count = !weighted;
                        check_against_reference(models, options, cpu{.threads = 2}, 128);
                    }
                }
            }
        }
    }
    for (auto options :
        {ties_options::as_in_ties_merging(), ties_options::as_in_mergekit(), ties_options::as_in_peft()}) {
        for (const double density : {0.3, 1.0}) {
            options.density = density;
            options.weights = {};
            check_against_reference(models, options, cpu{}, 65536);
            if (options.negative_weights) {
                options.weights = {1.0, -0.5, 0.75};
                check_against_reference(models, options, cpu{}, 65536);
            }
        }
    }
}

TEST_CASE("TIES has the same bits for any threads, chunks and executor")
{
    const testing::random_models<bf16> models({100000, 33000, 5}, 4, 5);
    std::vector<std::vector<bf16>> results;
    const cpu own{.threads = 3, .executor = [](std::size_t count, const std::function<void(std::size_t)>& body) {
                      for (std::size_t i = count; i-- > 0;) { body(i); }
                  }};
    for (const cpu& policy : {cpu{.threads = 1}, cpu{.threads = 4}, own}) {
        for (const std::size_t chunk : {64u, 4097u, 1u << 20}) {
            std::vector<bf16> out;
            model_options how;
            how.chunk = chunk;
            merge(policy, ties_options{.density = 0.1}, models.model(models.base), models.task_models(),
                models.output(out), how);
            results.push_back(std::move(out));
        }
    }
    for (const auto& result : results) {
        CHECK(std::memcmp(result.data(), results[0].data(), result.size() * sizeof(bf16)) == 0);
    }
}

TEST_CASE("a report counts what was kept and what lost the election")
{
    const std::vector<float> base{0, 0, 0};
    const std::vector<std::vector<float>> tasks{{1, -2, 3}, {-1, 4, 1}};
    std::vector<float> out(3);
    model_options how;
    how.statistics = true;
    const auto report = merge(cpu{}, ties_options{.density = 1.0}, base, tasks, out, how);
    CHECK(report.kept == std::vector<std::uint64_t>{3, 3});
    CHECK(report.conflicting == std::vector<std::uint64_t>{1, 1}); // −2 lost to 4; −1 lost to the majority
    REQUIRE(report.norms.size() == 1);
    CHECK(report.norms[0].merged == doctest::Approx(std::sqrt(21.0)));
    CHECK(report.norms[0].change == doctest::Approx(std::sqrt(21.0)));
}

TEST_CASE("non-finite inputs are an error that names them, or spread when asked")
{
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> base{0, 0, 0, 0};
    std::vector<float> out(4);
    CHECK_THROWS_WITH_AS(merge(cpu{}, ties_options{.density = 1}, base,
                             std::vector<std::vector<float>>{{1, 2, 3, 4}, {1, 2, nan, 4}}, out),
        "tensor 'values' of task 2 holds NaN at index 2: repair it, exclude the tensor, or ask for non-finite values "
        "to propagate",
        nonfinite_error);
    CHECK_THROWS_AS(merge(cpu{}, ties_options{.density = 1}, std::vector<float>{0, inf, 0, 0},
                        std::vector<std::vector<float>>{{1, 2, 3, 4}}, out),
        nonfinite_error);
    model_options how;
    how.on_nonfinite = nonfinite::propagate;
    merge(cpu{}, ties_options{.density = 1}, base, std::vector<std::vector<float>>{{1, nan, inf, 4}, {1, 2, 3, 4}}, out,
        how);
    CHECK(out[0] == 1.0f);
    CHECK(std::isnan(out[1]));
    CHECK(out[2] == inf);
    CHECK(out[3] == 4.0f);
    // A difference of finite values that overflows is no fault of the inputs.
    const float huge = std::numeric_limits<float>::max();
    std::vector<float> one(1);
    CHECK_NOTHROW(merge(
        cpu{}, ties_options{.density = 1}, std::vector<float>{-huge}, std::vector<std::vector<float>>{{huge}}, one));
}

TEST_CASE("bad arguments are named before any work")
{
    const std::vector<float> base{0, 0};
    std::vector<float> out(2), three(3);
    const std::vector<std::vector<float>> tasks{{1, 2}, {3, 4}};
    CHECK_THROWS_AS(merge(cpu{}, ties_options{.density = 0.0}, base, tasks, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ties_options{.density = 1.1}, base, tasks, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ties_options{.lambda = std::nan("")}, base, tasks, out), invalid_argument);
    CHECK_THROWS_WITH_AS(merge(cpu{}, ties_options{.weights = {1.0}}, base, tasks, out),
        "1 weights for 2 tasks: give one each, or none", invalid_argument);
    CHECK_THROWS_WITH_AS(merge(cpu{}, ties_options{.densities = {0.5, 0.5, 0.5}}, base, tasks, out),
        "3 densities for 2 tasks: give one each, or none", invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ties_options{.densities = {0.5, 1.5}}, base, tasks, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ties_options{.weights = {1.0, -1.0}}, base, tasks, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ties_options{}, base, std::vector<std::vector<float>>{}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ties_options{}, base, tasks, three), shape_mismatch);
    CHECK_THROWS_AS(
        merge(cpu{}, ties_options{}, base, std::vector<std::vector<float>>{{1, 2, 3}}, out), shape_mismatch);
    std::vector<float> same = base;
    CHECK_THROWS_AS(
        merge(cpu{}, ties_options{}, same, tasks, same), invalid_argument); // TIES may read its inputs again
    std::vector<float> shifted(3);
    CHECK_THROWS_AS(merge(cpu{}, ties_options{}, host_view<const float>{shifted.data(), 2}, tasks,
                        host_view<float>{shifted.data() + 1, 2}),
        invalid_argument);
}
