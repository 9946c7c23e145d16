// Arcee Fusion against its definition by softmax, sort and quartiles; bad input.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/shaped_models.hpp"

#include <taskvec/methods/arcee_fusion.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

using namespace taskvec;

namespace {

template <class A>
double divergence_by_definition(const std::vector<A>& x, const std::vector<A>& y)
{
    const auto softmax = [](const std::vector<A>& from) {
        const double most = static_cast<double>(*std::max_element(from.begin(), from.end()));
        std::vector<double> to;
        double sum = 0;
        for (const A value : from) {
            to.push_back(std::exp(static_cast<double>(value) - most));
            sum += to.back();
        }
        for (double& value : to) { value = value / sum + 1e-8; }
        return to;
    };
    const auto p = softmax(x), q = softmax(y);
    double sum = 0;
    for (std::size_t i = 0; i < x.size(); ++i) { sum += p[i] * std::log(p[i] / q[i]); }
    return sum > 0 ? sum : 0;
}

template <class T>
std::vector<T> fused_by_definition(const testing::shaped_models<T>& models, double spread)
{
    using A = arithmetic_type<T>;
    const auto base = testing::widen_all(models.flat.base), task = testing::widen_all(models.flat.tasks.front());
    std::vector<T> out;
    std::size_t begin = 0;
    for (std::size_t k = 0; k < models.shapes.size(); begin += models.flat.sizes[k++]) {
        const std::size_t size = models.flat.sizes[k];
        if (size == 0) { continue; }
        const std::size_t length = models.shapes[k].empty() ? 1 : models.shapes[k].back();
        std::vector<A> importance, delta;
        for (std::size_t row = begin; row < begin + size; row += length) {
            const auto part = [&](const std::vector<A>& from) {
                const auto first = from.begin() + static_cast<std::ptrdiff_t>(row);
                return std::vector<A>(first, first + static_cast<std::ptrdiff_t>(length));
            };
            const A factor = static_cast<A>(divergence_by_definition(part(task), part(base)));
            for (std::size_t i = row; i < row + length; ++i) {
                delta.push_back(task[i] - base[i]);
                importance.push_back(std::abs(delta.back()) * factor);
            }
        }
        auto sorted = importance;
        std::sort(sorted.begin(), sorted.end());
        const auto quantile = [&](double q) {
            return sorted[static_cast<std::size_t>(q * static_cast<double>(size - 1))];
        };
        volatile A distance = static_cast<A>(spread) * (quantile(0.75) - quantile(0.25));
        const A threshold = quantile(0.5) + distance;
        for (std::size_t i = 0; i < size; ++i) {
            out.push_back(narrow<T>(base[begin + i] + (importance[i] >= threshold ? delta[i] : A{0})));
        }
    }
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("Arcee Fusion equals its definition", T, float, double, bf16)
{
    for (const int levels : {0, 2}) { // with levels, importances tie
        const testing::shaped_models<T> models(
            {{7, 13}, {}, {64, 300}, {5, 1}, {2, 3, 4}, {0, 4}, {1001}, {1, 70000}, {1}}, 1, 23, levels);
        for (const double spread : {1.5, 0.0, 3.0}) {
            CAPTURE(spread);
            const arcee_fusion_options options{.spread = spread};
            const auto expected = fused_by_definition(models, spread);
            CHECK(testing::same_words(models.merged(options), expected));
            CHECK(testing::same_words(models.merged(options, 64, 3), expected));
        }
    }
}

TEST_CASE("Arcee Fusion takes what stands out, and all of a tensor whose importances are all 0")
{
    testing::shaped_models<float> models({{50, 40}, {9, 1}}, 1, 3);
    merge_report report;
    const auto out = models.merged(arcee_fusion_options{}, 65536, 2, &report);
    std::size_t taken = 0;
    for (std::size_t i = 0; i < 2000; ++i) { taken += out[i] != models.flat.base[i] ? 1 : 0; }
    CHECK(taken > 20);
    CHECK(taken < 600);
    for (std::size_t i = 2000; i < 2009; ++i) { // rows of one entry: nothing diverges, and nothing is below 0
        const float delta = models.flat.tasks[0][i] - models.flat.base[i];
        CHECK(out[i] == models.flat.base[i] + delta);
    }
    CHECK(report.kept == std::vector<std::uint64_t>{taken + 9});
    CHECK(report.walks == 2);
    CHECK(report.beside == 3 * 2 * 4 * 2009);
}

TEST_CASE("Arcee Fusion refuses several tasks, and NaN by its place")
{
    const testing::shaped_models<float> two({{4, 6}}, 2, 1);
    CHECK_THROWS_WITH_AS((void)two.merged(arcee_fusion_options{}),
        "Arcee Fusion takes a base and one task, and there are 2 tasks: give one", invalid_argument);
    testing::shaped_models<float> models({{4, 6}}, 1, 1);
    CHECK_THROWS_AS((void)models.merged(arcee_fusion_options{.spread = -1}), invalid_argument);
    models.flat.tasks[0][8] = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_AS((void)models.merged(arcee_fusion_options{}), nonfinite_error);
}
