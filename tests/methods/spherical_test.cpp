// NuSLERP, Multi-SLERP, Karcher means: against loops over whole vectors, their degenerate cases, and what they refuse.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/shaped_models.hpp"
#include "../reference/spherical.hpp"

#include <taskvec/methods/karcher.hpp>
#include <taskvec/methods/multi_slerp.hpp>
#include <taskvec/methods/nuslerp.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

using namespace taskvec;

namespace {

/// Merges with different threads and chunks, and holds every tensor to `expected(vectors)` of its vectors in f64.
template <class T, class Options, class Expected>
void check(const testing::random_models<T>& models, const Options& options, bool with_base, const Expected& expected)
{
    std::vector<T> first, out;
    for (const auto& [threads, chunk] : {std::pair<unsigned, std::size_t>{1, 64}, {3, 65536}}) {
        model_options how;
        how.chunk = chunk;
        const cpu policy{.threads = threads};
        if (with_base) {
            merge(policy, options, models.model(models.base), models.task_models(), models.output(out), how);
        }
        else {
            merge(policy, options, models.task_models(), models.output(out), how);
        }
        if (first.empty()) { first = out; }
        CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(T)) == 0);
    }
    double worst = 0;
    std::size_t begin = 0;
    for (const std::size_t size : models.sizes) {
        std::vector<std::vector<double>> vectors;
        for (const auto& task : models.tasks) {
            vectors.emplace_back();
            for (std::size_t i = begin; i < begin + size; ++i) {
                vectors.back().push_back(widen<double>(task[i]) - (with_base ? widen<double>(models.base[i]) : 0.0));
            }
        }
        const auto wanted = expected(vectors);
        for (std::size_t i = 0; i < size; ++i) {
            const double base = with_base ? widen<double>(models.base[begin + i]) : 0.0;
            worst = std::max(worst, std::abs(widen<double>(first[begin + i]) - (base + wanted[i])));
        }
        begin += size;
    }
    CHECK(worst < (std::same_as<T, bf16> ? 4e-2 : std::same_as<T, float> ? 3e-6 : 1e-12));
}

/// The rows or columns of tensors: places of their entries, in a concatenation of all tensors.
std::vector<std::vector<std::size_t>> vectors_of(const testing::shape_list& shapes, bool columns)
{
    std::vector<std::vector<std::size_t>> vectors;
    std::size_t begin = 0;
    for (const auto& shape : shapes) {
        std::size_t size = 1;
        for (const auto extent : shape) { size *= extent; }
        const bool one = shape.size() < 2;
        const std::size_t length = one ? size : columns ? shape.front() : shape.back();
        for (std::size_t v = 0; v * length < size; ++v) {
            vectors.emplace_back();
            for (std::size_t i = 0; i < length; ++i) {
                vectors.back().push_back(begin + (columns && !one ? i * (size / length) + v : v * length + i));
            }
        }
        begin += size;
    }
    return vectors;
}

template <class T>
void check_vectors(const testing::shaped_models<T>& models, angles_between angles, bool with_base)
{
    const std::vector<double> weights{1, 3};
    const nuslerp_options options{.weights = weights, .angles = angles};
    std::vector<T> first, out;
    std::vector<const_model_ref> tasks;
    for (const auto& task : models.flat.tasks) { tasks.push_back(models.shaped(models.flat.model(task))); }
    for (const auto& [threads, chunk] : {std::pair<unsigned, std::size_t>{1, 64}, {3, 65536}}) {
        model_options how;
        how.chunk = chunk;
        const cpu policy{.threads = threads};
        const auto to = models.shaped(models.flat.output(out));
        const auto report = with_base
            ? merge(policy, options, models.shaped(models.flat.model(models.flat.base)), tasks, to, how)
            : merge(policy, options, tasks, to, how);
        CHECK(report.walks == (angles == angles_between::rows ? 1 : 2));
        if (first.empty()) { first = out; }
        CHECK(testing::same_words(first, out));
    }
    const auto value = [](T x) { return widen<double>(x); };
    double worst = 0;
    for (const auto& places : vectors_of(models.shapes, angles == angles_between::columns)) {
        reference::vectors x;
        for (const auto& task : models.flat.tasks) {
            x.emplace_back();
            for (const auto i : places) {
                x.back().push_back(value(task[i]) - (with_base ? value(models.flat.base[i]) : 0.0));
            }
        }
        const auto wanted = reference::nuslerp(x, weights);
        for (std::size_t i = 0; i < places.size(); ++i) {
            const double base = with_base ? value(models.flat.base[places[i]]) : 0.0;
            worst = std::max(worst, std::abs(value(first[places[i]]) - (base + wanted[i])));
        }
    }
    CHECK(worst < (std::same_as<T, bf16> ? 4e-2 : std::same_as<T, float> ? 3e-6 : 1e-12));
}

const testing::shape_list vector_shapes{{7, 13}, {}, {3, 700}, {5, 1}, {1, 5}, {2, 3, 4}, {0, 4}, {4, 0}, {2, 5, 3, 2},
    {1001}, {2, 9000}, {9000, 2}, {70, 1500}, {70000}};

} // namespace

TEST_CASE_TEMPLATE("NuSLERP of rows and columns equals loops over each of them", T, float, double, bf16)
{
    testing::shaped_models<T> acute(
        vector_shapes, 2, 3); // where an angle is nearly straight the factors have no digits
    for (std::size_t i = 0; i < acute.flat.base.size(); ++i) {
        acute.flat.base[i] = narrow<T>(std::abs(widen<double>(acute.flat.base[i])));
        for (auto& task : acute.flat.tasks) {
            task[i] = narrow<T>(widen<double>(acute.flat.base[i]) + std::abs(widen<double>(task[i])));
        }
    }
    const testing::shaped_models<T> any({{300, 700}, {1001}, {5, 40, 60}}, 2, 4);
    for (const bool base : {false, true}) {
        for (const auto angles : {angles_between::rows, angles_between::columns}) {
            check_vectors(acute, angles, base);
            check_vectors(any, angles, base);
        }
    }
}

TEST_CASE("NuSLERP of rows: worked examples, rows of zeros, tensors of one vector")
{
    const auto run = [](const std::vector<std::int64_t>& shape, angles_between angles,
                         const std::vector<double>& weights, std::vector<float> a, std::vector<float> b) {
        std::vector<float> out(a.size());
        std::vector<const_model_ref> tasks(2);
        model_ref to;
        tasks[0].insert("w", tensor_ref{.data = a.data(), .dtype = dtype::f32, .shape = {shape.begin(), shape.end()}});
        tasks[1].insert("w", tensor_ref{.data = b.data(), .dtype = dtype::f32, .shape = {shape.begin(), shape.end()}});
        to.insert("w", tensor_ref{.data = out.data(), .dtype = dtype::f32, .shape = {shape.begin(), shape.end()}});
        merge(cpu{}, nuslerp_options{.weights = weights, .angles = angles}, tasks, to);
        return out;
    };
    const float half = static_cast<float>(std::sqrt(0.5));
    // The rows are parallel and at a right angle; the columns (2, 2) and (4, 2), (0, 0) and (0, 2).
    const auto rows = run({2, 2}, angles_between::rows, {}, {2, 0, 2, 0}, {4, 0, 0, 2});
    CHECK(rows[0] == 3);
    CHECK(rows[1] == 0);
    CHECK(rows[2] == doctest::Approx(2 * half));
    CHECK(rows[3] == doctest::Approx(2 * half));
    const auto columns = run({2, 2}, angles_between::columns, {}, {2, 0, 2, 0}, {4, 0, 2, 2});
    const double angle = std::acos(12 / std::sqrt(8.0 * 20)), factor = std::sin(angle / 2) / std::sin(angle);
    CHECK(columns[0] == doctest::Approx(6 * factor));
    CHECK(columns[2] == doctest::Approx(4 * factor));
    CHECK(columns[1] == 0);
    CHECK(columns[3] == doctest::Approx(2 * half)); // a column of zeros: a right angle
    const auto zero = run({2, 2}, angles_between::rows, {1, 3}, {0, 0, 1, 2}, {0, 0, 1, 2});
    CHECK(zero == std::vector<float>{0, 0, 1, 2});
    for (const auto angles : {angles_between::tensors, angles_between::rows, angles_between::columns}) {
        CHECK(run({}, angles, {1, 3}, {2}, {-4}) == std::vector<float>{-2.5f}); // a scalar: ¼·2 − ¾·4
        CHECK(run({2}, angles, {}, {2, 0}, {0, 2})[0] == doctest::Approx(2 * half));
        CHECK(run({3, 1}, angles_between::rows, {}, {1, 2, 0}, {3, -2, 4})[0] == 2); // rows of one entry are scalars
        CHECK_THROWS_AS(run({1, 2}, angles, {}, {1, NAN}, {1, 2}), nonfinite_error);
    }
}

TEST_CASE_TEMPLATE("spherical methods equal loops over whole vectors, with a base and without", T, float, double, bf16)
{
    const std::vector<std::size_t> sizes{3000, 1, 64, 5000, 0};
    const testing::random_models<T> pair(sizes, 2, 5), four(sizes, 4, 6);
    for (const bool base : {false, true}) {
        for (const std::vector<double>& weights : {std::vector<double>{}, {1, 3}, {2, -1}, {1, -1}}) {
            check(pair, nuslerp_options{weights}, base, [&](const auto& x) { return reference::nuslerp(x, weights); });
        }
        for (const bool normalize : {true, false}) {
            const std::vector<double> weights{1, 0.5, 2, 0.25};
            check(four, multi_slerp_options{.weights = weights, .normalize = normalize}, base,
                [&](const auto& x) { return reference::multi_slerp(x, weights, normalize); });
        }
    }
    for (const std::vector<double>& weights : {std::vector<double>{1, 1, 1, 1}, {1, 0.5, 2, 0}}) {
        check(four, karcher_options{.weights = weights, .steps = 40, .tolerance = 1e-13}, false,
            [&](const auto& x) { return reference::karcher(x, weights, 40); });
    }
}

TEST_CASE("zero vectors, collinear vectors, one task, directions that cancel")
{
    const auto run = [](const auto& options, const std::vector<std::vector<float>>& tasks) {
        std::vector<float> out(tasks[0].size());
        merge(cpu{}, options, tasks, out);
        return out;
    };
    CHECK(run(nuslerp_options{}, {{1, 2}, {2, 4}}) == std::vector<float>{1.5f, 3});
    CHECK(run(nuslerp_options{.weights = {3, 1}}, {{1, 2}, {-1, -2}}) == std::vector<float>{0.5f, 1});
    CHECK(run(nuslerp_options{}, {{2, 0}, {0, 2}})[0] == doctest::Approx(std::sqrt(2.0)));
    CHECK(run(nuslerp_options{}, {{0, 0}, {0, 2}})[1] == doctest::Approx(std::sqrt(2.0))); // as at a right angle
    CHECK(run(multi_slerp_options{}, {{0.1f, 7}}) == std::vector<float>{0.1f, 7});
    CHECK(run(multi_slerp_options{}, {{1, 2}, {-1, -2}}) == std::vector<float>{0, 0});
    CHECK(run(multi_slerp_options{}, {{0, 0}, {0, 0}, {0, 0}}) == std::vector<float>{0, 0});
    CHECK(run(multi_slerp_options{}, {{2, 0}, {0, 2}})[0] == doctest::Approx(std::sqrt(2.0)));
    CHECK_THROWS_WITH_AS(run(multi_slerp_options{.weights = {1, 1, 2}}, {{1, 0}, {1, 0}, {-1, 0}}),
        "the directions of tensor 'values' cancel, so that Multi-SLERP has no mean direction there: change the "
        "weights, or exclude the tensor",
        invalid_argument);
    CHECK(run(karcher_options{}, {{0.1f, 7}}) == std::vector<float>{0.1f, 7});
    CHECK(run(karcher_options{}, {{0, 0}, {0, 0}}) == std::vector<float>{0, 0});
    CHECK(run(karcher_options{}, {{0, 0}, {0, 4}}) == std::vector<float>{0, 2}); // the lengths' mean
    CHECK(run(karcher_options{}, {{3, 0}, {-1, 0}}) == std::vector<float>{2, 0}); // from the first of them
    CHECK(run(karcher_options{}, {{1, 0}, {0, 1}})[1] == doctest::Approx(std::sqrt(0.5)));
}

TEST_CASE("spherical methods refuse other numbers of models, and weights without meaning")
{
    const std::vector<float> x{1, 2};
    std::vector<float> out(2);
    CHECK_THROWS_WITH_AS(merge(cpu{}, nuslerp_options{}, std::vector{x, x, x}, out),
        "NuSLERP goes between two models, and the number of tasks is 3: give two", invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, nuslerp_options{.weights = {1, NAN}}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, multi_slerp_options{.weights = {1, -1}}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, karcher_options{.weights = {1, -1}}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, karcher_options{.weights = {0, 0}}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, karcher_options{.tolerance = 0}, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, karcher_options{}, std::vector{x, {1, NAN}}, out), nonfinite_error);
}
