// SCE: against its definition, entry by entry, and what it refuses.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/kept.hpp"
#include "../reference/random_models.hpp"

#include <taskvec/methods/sce.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

using namespace taskvec;
using reference::product;
using reference::sum;

namespace {

/// SCE of one tensor, from its task vectors: what is added to the base.
template <class A>
std::vector<A> sce(const std::vector<std::vector<A>>& x, double density, double least)
{
    const std::size_t n = x[0].size(), tasks = x.size();
    std::vector<A> variances;
    for (std::size_t i = 0; i < n; ++i) {
        A mean = 0, spread = 0;
        for (std::size_t t = 0; t < tasks; ++t) { mean = sum(mean, sum(x[t][i], -x[0][i])); }
        mean /= static_cast<A>(tasks);
        for (std::size_t t = 0; t < tasks; ++t) {
            const A away = sum(sum(x[t][i], -x[0][i]), -mean);
            spread = sum(spread, product(away, away));
        }
        variances.push_back(spread / static_cast<A>(tasks));
    }
    auto kept = x;
    if (density < 1) {
        const auto differing = std::count_if(variances.begin(), variances.end(), [](A v) { return v != 0; });
        const auto selected =
            reference::top(variances, static_cast<std::uint64_t>(density * static_cast<double>(differing)), false);
        for (auto& of_task : kept) {
            for (std::size_t i = 0; i < n; ++i) { of_task[i] = selected[i] ? of_task[i] : A{0}; }
        }
    }
    std::vector<double> weights;
    for (const auto& of_task : kept) {
        double squares = 0;
        for (const A value : of_task) { squares += static_cast<double>(value) * static_cast<double>(value); }
        weights.push_back(n == 0 ? 0.0 : squares / static_cast<double>(n));
    }
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (double& weight : weights) {
        weight = total == 0 || total < least ? 1.0 / static_cast<double>(tasks) : weight / total;
    }
    std::vector<A> merged(n);
    for (std::size_t i = 0; i < n; ++i) {
        A all = 0, above = 0, below = 0;
        for (std::size_t t = 0; t < tasks; ++t) { all = sum(all, kept[t][i]); }
        for (std::size_t t = 0; t < tasks; ++t) {
            const A value = kept[t][i];
            if (value == 0 || (value > 0) != (all >= 0)) { continue; }
            above = sum(above, product(static_cast<A>(weights[t]), value));
            below = sum(below, static_cast<A>(weights[t]));
        }
        below = std::max(below, static_cast<A>(least));
        merged[i] = above == 0 ? A{0} : above / below;
    }
    return merged;
}

} // namespace

TEST_CASE_TEMPLATE("SCE equals its definition", T, float, double, bf16)
{
    using A = arithmetic_type<T>;
    for (const int levels : {0, 3}) { // with levels, variances tie and entries are equal
        const testing::random_models<T> models({3000, 1, 0, 700}, 3, 8, levels);
        for (const auto& options : {sce_options{}, sce_options{.density = 0.5}, sce_options::as_in_mergekit(),
                 sce_options{.density = 1e-9}, sce_options{.density = 0.3, .least_weight = 100}}) {
            CAPTURE(options.density);
            const double tolerance = std::same_as<T, bf16> ? 4e-2 : std::same_as<T, float> ? 2e-6 : 1e-14;
            double worst = 0;
            std::vector<T> first, out;
            for (const auto& [threads, chunk] : {std::pair<unsigned, std::size_t>{1, 64}, {3, 65536}}) {
                model_options how;
                how.chunk = chunk;
                merge(cpu{.threads = threads}, options, models.model(models.base), models.task_models(),
                    models.output(out), how);
                if (first.empty()) { first = out; }
                CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(T)) == 0);
            }
            std::size_t begin = 0;
            for (const std::size_t size : models.sizes) {
                std::vector<std::vector<A>> x(3);
                for (std::size_t t = 0; t < 3; ++t) {
                    for (std::size_t i = begin; i < begin + size; ++i) {
                        x[t].push_back(sum(widen<A>(models.tasks[t][i]), -widen<A>(models.base[i])));
                    }
                }
                const auto merged = sce(x, options.density, options.least_weight);
                for (std::size_t i = 0; i < size; ++i) {
                    const A expected = sum(widen<A>(models.base[begin + i]), merged[i]);
                    worst = std::max(
                        worst, std::abs(static_cast<double>(widen<A>(out[begin + i])) - static_cast<double>(expected)));
                }
                begin += size;
            }
            CHECK(worst < tolerance); // the weights' sums have another shape
        }
    }
}

TEST_CASE("SCE counts what is selected and erased, and refuses what has no meaning")
{
    const std::vector<float> base{0, 0, 0, 0}, a{1, 2, 0, 5}, b{-2, 2, 0, 4};
    std::vector<float> out(4);
    model_options how;
    how.statistics = true;
    const auto report = merge(cpu{}, sce_options{.density = 0.5}, base, std::vector{a, b}, out, how);
    CHECK(report.kept == std::vector<std::uint64_t>{1, 1}); // of two entries that differ the one that differs more
    CHECK(report.conflicting == std::vector<std::uint64_t>{1, 0});
    CHECK(out == std::vector<float>{-2, 0, 0, 0});
    CHECK_THROWS_AS(merge(cpu{}, sce_options{.density = 0}, base, std::vector{a, b}, out), invalid_argument);
    CHECK_THROWS_WITH_AS(merge(cpu{}, sce_options{.least_weight = -1}, base, std::vector{a, b}, out),
        "least-weight is -1; expected a number of at least 0", invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, sce_options{}, base, std::vector{a, {1, 2, 3, INFINITY}}, out), nonfinite_error);
}

TEST_CASE("SCE ranks variances that overflow as the largest")
{
    const std::vector<float> base{-3e38F, 1, 2, 3}, a{3e38F, 2, 2, 3}, b{3e38F, 1, 2, 3};
    std::vector<float> out(4);
    model_options how;
    how.on_overflow = overflow::error;
    CHECK_THROWS_AS(merge(cpu{}, sce_options{.density = 0.5}, base, std::vector{a, b}, out, how), nonfinite_error);
    how.on_overflow = overflow::propagate;
    merge(cpu{}, sce_options{.density = 0.5}, base, std::vector{a, b}, out, how);
    CHECK_FALSE(std::isfinite(out[0]));
    CHECK(out[1] == 1);
    CHECK(out[3] == 3);
}
