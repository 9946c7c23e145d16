// DELLA: ranks within rows and draws against their definition, sums and elections over them, frequencies, bad input.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/kept.hpp"
#include "../reference/random_models.hpp"
#include "../reference/shaped_models.hpp"

#include <taskvec/methods/della.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

using namespace taskvec;
using testing::same_words;
using testing::shape_list;
using testing::shaped_models;

namespace {

/// The drop of DELLA as it is defined, entry by entry: each row is sorted, each entry drawn for. `divided`: by its
/// probability.
template <class A>
std::vector<A> magpruned(const std::vector<A>& x, const shape_list& shapes, std::uint32_t task, std::uint64_t seed,
    double density, double epsilon, rank_axis axis, bool divided)
{
    std::vector<A> kept(x.size());
    std::size_t begin = 0;
    for (std::size_t k = 0; k < shapes.size(); ++k) {
        const auto& shape = shapes[k];
        std::size_t size = 1;
        for (const auto extent : shape) { size *= extent; }
        std::size_t length = shape.empty() ? 1 : shape.back(), stride = 1;
        if (axis == rank_axis::second && shape.size() > 2) {
            length = shape[1];
            for (std::size_t i = 2; i < shape.size(); ++i) { stride *= shape[i]; }
        }
        const random_stream stream(seed, task, "t" + std::to_string(k));
        for (std::size_t row = 0; row * length < size; ++row) {
            std::vector<std::size_t> places;
            for (std::size_t i = 0; i < length; ++i) {
                places.push_back(row / stride * stride * length + row % stride + i * stride);
            }
            auto order = places;
            std::stable_sort(order.begin(), order.end(),
                [&](auto a, auto b) { return std::abs(x[begin + a]) > std::abs(x[begin + b]); });
            for (std::size_t i = 0; i < length; ++i) {
                const double r = static_cast<double>(length - 1 - i), n = static_cast<double>(length);
                const double p = density == 1 ? 1
                    : length == 1             ? density
                                              : density - epsilon + 2 * epsilon * r / (n - 1);
                const A value = x[begin + order[i]];
                const bool keep = stream.word(order[i]) < std::llround(p * 0x1p32);
                kept[begin + order[i]] = !keep ? A{0} : divided ? value / static_cast<A>(p) : value;
            }
        }
        begin += size;
    }
    return kept;
}

const shape_list della_shapes{{7, 13}, {}, {3, 700}, {5, 1}, {2, 3, 4}, {0, 4}, {2, 5, 3, 2}, {1001}, {2, 66000}};

template <class T>
std::vector<std::vector<arithmetic_type<T>>> deltas_of(const shaped_models<T>& models)
{
    std::vector<std::vector<arithmetic_type<T>>> tasks;
    for (const auto& task : models.flat.tasks) { tasks.push_back(testing::widen_all(task)); }
    return reference::task_vectors(testing::widen_all(models.flat.base), tasks);
}

} // namespace

TEST_CASE_TEMPLATE(
    "DELLA equals its definition, with an election and without, along either axis", T, float, double, bf16)
{
    for (const int levels : {0, 9}) { // with levels, magnitudes tie
        const shaped_models<T> models(della_shapes, 3, 17, levels);
        const auto base = testing::widen_all(models.flat.base);
        const auto deltas = deltas_of(models);
        const std::vector<double> weights{1, -0.5, 0.25}, densities{0.5, 0.3, 0.8}, epsilons{0.15, 0.2, 0.0};
        for (const auto axis : {rank_axis::last, rank_axis::second}) {
            for (const bool divided : {true, false}) {
                auto kept = deltas;
                for (std::uint32_t t = 0; t < 3; ++t) {
                    kept[t] = magpruned(deltas[t], models.shapes, t, 11, densities[t], epsilons[t], axis, divided);
                }
                della_linear_options linear{.seed = 11, .lambda = 0.7, .weights = weights};
                linear.rescale = divided ? drop_rescale::density : drop_rescale::none;
                linear.axis = axis;
                linear.densities = densities;
                linear.epsilons = epsilons;
                linear.normalize = divided;
                std::vector<T> expected;
                for (const auto x : reference::added(base, kept, weights, 0.7, divided)) {
                    expected.push_back(narrow<T>(x));
                }
                CHECK(same_words(models.merged(linear), expected));
                CHECK(same_words(models.merged(linear, 64, 3), expected));

                della_options elected{.seed = 11, .rescale = linear.rescale, .axis = axis};
                elected.densities = densities;
                elected.epsilons = epsilons;
                auto election = elected.ties;
                election.density = 1;
                std::vector<arithmetic_type<T>> zeros(base.size());
                auto sum = reference::ties(zeros, kept, models.flat.sizes, election);
                expected.clear();
                for (std::size_t i = 0; i < sum.size(); ++i) {
                    expected.push_back(narrow<T>(reference::sum(base[i], sum[i])));
                }
                CHECK(same_words(models.merged(elected), expected));
                CHECK(same_words(models.merged(elected, 64, 3), expected));
            }
        }
    }
}

TEST_CASE("without a spread DELLA is DARE, and with density 1 it drops nothing")
{
    const shaped_models<float> models(della_shapes, 2, 5);
    CHECK(same_words(models.merged(della_linear_options{.density = 0.4, .epsilon = 0, .seed = 9}),
        models.merged(dare_options{.density = 0.4, .seed = 9})));
    CHECK(same_words(models.merged(della_options{.density = 0.4, .epsilon = 0, .seed = 9}),
        models.merged(dare_ties_options{.density = 0.4, .seed = 9})));
    CHECK(same_words(models.merged(della_linear_options{.density = 1, .lambda = 0.3}),
        models.merged(task_arithmetic_options{.lambda = 0.3})));
    CHECK(same_words(models.merged(della_options{.density = 1}), models.merged(ties_options{.density = 1})));
    CHECK_FALSE(same_words(models.merged(della_linear_options{.seed = 1}), models.merged(della_linear_options{})));
}

TEST_CASE("L1 norms of what DELLA keeps come back, as in mergekit")
{
    const shaped_models<float> models(della_shapes, 2, 8);
    const auto deltas = deltas_of(models);
    const auto& sizes = models.flat.sizes;
    auto kept = deltas;
    for (std::uint32_t t = 0; t < 2; ++t) {
        kept[t] = magpruned(deltas[t], models.shapes, t, 3, 0.4, 0.15, rank_axis::second, false);
        kept[t] = reference::with_l1_of(deltas[t], kept[t], sizes);
    }
    const auto close = [&](const std::vector<float>& found, const std::vector<float>& expected) {
        double worst = 0;
        for (std::size_t i = 0; i < found.size(); ++i) {
            worst = std::max(worst, static_cast<double>(std::abs(found[i] - expected[i])));
        }
        CHECK(worst < 1e-5); // weights are rounded with the factors, not before them
    };
    auto linear = della_linear_options::as_in_mergekit();
    linear.density = 0.4;
    linear.seed = 3;
    close(models.merged(linear), reference::added(models.flat.base, kept, {1, 1}, 1, false));
    CHECK(same_words(models.merged(linear, 64, 3), models.merged(linear)));
    auto elected = della_options::as_in_mergekit();
    elected.density = 0.4;
    elected.seed = 3;
    auto election = elected.ties;
    election.density = 1;
    auto expected = reference::ties(std::vector<float>(models.flat.base.size()), kept, sizes, election);
    for (std::size_t i = 0; i < expected.size(); ++i) {
        expected[i] = reference::sum(models.flat.base[i], expected[i]);
    }
    close(models.merged(elected), expected);
}

TEST_CASE("entries of each rank are kept as often as their probability says")
{
    constexpr std::size_t rows = 20000, length = 5;
    shaped_models<float> models({{rows, length}, {rows, 1}}, 1, 2);
    della_linear_options options{.density = 0.5, .epsilon = 0.3, .seed = 21};
    options.rescale = drop_rescale::none;
    merge_report report;
    const auto out = models.merged(options, 65536, 2, &report);
    std::vector<std::size_t> kept(length);
    std::size_t alone = 0, all = 0;
    const auto deltas = deltas_of(models).front();
    const auto is_kept = [&](std::size_t i) { return out[i] != models.flat.base[i]; };
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t i = row * length; i < (row + 1) * length; ++i) {
            std::size_t rank = 0;
            for (std::size_t j = row * length; j < (row + 1) * length; ++j) {
                rank += std::abs(deltas[j]) < std::abs(deltas[i]) ? 1 : 0;
            }
            kept[rank] += is_kept(i) ? 1 : 0;
        }
        alone += is_kept(rows * length + row) ? 1 : 0;
    }
    const auto fits = [](std::size_t count, double p) {
        const double n = rows, expected = n * p, spread = std::sqrt(n * p * (1 - p));
        CHECK(std::abs(static_cast<double>(count) - expected) < 5 * spread);
    };
    for (std::size_t rank = 0; rank < length; ++rank) {
        CAPTURE(rank);
        fits(kept[rank], 0.2 + 0.15 * static_cast<double>(rank));
        all += kept[rank];
    }
    fits(alone, 0.5); // rows of one entry
    CHECK(report.kept == std::vector<std::uint64_t>{all + alone});
    CHECK(report.walks == 1);
}

TEST_CASE("probabilities that are none are refused with their range, and NaN by its place")
{
    shaped_models<float> models({{4, 6}}, 2, 1);
    CHECK_THROWS_WITH_AS((void)models.merged(della_options{.density = 0.3, .epsilon = 0.4}),
        "epsilon is 0.4 and density 0.3; expected an epsilon from 0 to below 0.3, for which density - epsilon and "
        "density + epsilon are within (0, 1)",
        invalid_argument);
    CHECK_THROWS_WITH_AS((void)models.merged(della_linear_options{.density = 0.75, .epsilon = 0.25}),
        "epsilon is 0.25 and density 0.75; expected an epsilon from 0 to below 0.25, for which density - epsilon and "
        "density + epsilon are within (0, 1)",
        invalid_argument);
    CHECK_THROWS_AS((void)models.merged(della_linear_options{.epsilon = -0.1}), invalid_argument);
    CHECK_THROWS_AS((void)models.merged(della_linear_options{.epsilons = {0.1, NAN}}), invalid_argument);
    CHECK_THROWS_AS((void)models.merged(della_linear_options{.density = 0}), invalid_argument);
    CHECK_THROWS_WITH_AS((void)models.merged(della_linear_options{.epsilons = {0.1}}),
        "1 epsilons for 2 tasks: give one each, or none", invalid_argument);
    models.flat.tasks[1][8] = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_AS((void)models.merged(della_linear_options{}), nonfinite_error);
    CHECK_THROWS_AS((void)models.merged(della_options{}), nonfinite_error);
}
