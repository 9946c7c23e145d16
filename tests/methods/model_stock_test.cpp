// Model Stock: golden cases, the definition, hand-worked and degenerate cases.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/goldens.hpp"
#include "../reference/random_models.hpp"
#include "../reference/shaped_models.hpp"

#include <taskvec/methods/model_stock.hpp>

#include <doctest/doctest.h>

using namespace taskvec;

TEST_CASE("golden Model Stocks, clamped and not")
{
    const reference::goldens file("merge/mergekit.safetensors");
    const auto cases = file.cases("model_stock");
    CHECK(cases.size() == 4);
    for (const auto& golden : cases) {
        CAPTURE(golden.name);
        const auto expected = file.expected(golden);
        const reference::like out(expected);
        merge(cpu{}, model_stock_options{.clamp = golden.options()["clamp"]}, file.input(golden, "base"),
            file.inputs(golden, "task"), out.model());
        CHECK(reference::largest_difference(out.model(), expected) <= golden.tolerance());
    }
}

TEST_CASE_TEMPLATE(
    "Model Stock equals its definition per tensor, bit-equal for any threads and chunks", T, float, double, bf16, f16)
{
    const testing::random_models<T> models({3000, 1, 64, 5000, 0}, 4, 5);
    for (const bool clamp : {true, false}) {
        std::vector<T> first;
        for (const unsigned threads : {1u, 3u}) {
            for (const std::size_t chunk : {64u, 3000u, 65536u}) {
                std::vector<T> out;
                model_options how;
                how.chunk = chunk;
                how.include = [&](std::string_view name) {
                    return clamp || name != "t1";
                }; // one element: cosines of ±1 may cancel
                merge(cpu{.threads = threads}, model_stock_options{.clamp = clamp}, models.model(models.base),
                    models.task_models(), models.output(out), how);
                if (first.empty()) { first = out; }
                CHECK(std::memcmp(first.data(), out.data(), out.size() * sizeof(T)) == 0);
            }
        }
        double worst = 0;
        std::size_t begin = 0;
        for (const std::size_t size : models.sizes) {
            const auto base = [&](std::size_t i) { return widen<double>(models.base[begin + i]); };
            const auto delta = [&](std::size_t t, std::size_t i) {
                return widen<double>(models.tasks[t][begin + i]) - base(i);
            };
            double c = 0;
            for (std::size_t s = 0; s < 4; ++s) {
                for (std::size_t t = 0; t < s; ++t) {
                    double ss = 0, tt = 0, st = 0;
                    for (std::size_t i = 0; i < size; ++i) {
                        ss += delta(s, i) * delta(s, i);
                        tt += delta(t, i) * delta(t, i);
                        st += delta(s, i) * delta(t, i);
                    }
                    c += st == 0 ? 0 : st / std::sqrt(ss * tt) / 6;
                }
            }
            double ratio = 4 * c / (1 + 3 * c);
            ratio = clamp ? std::min(1.0, std::max(0.0, ratio)) : ratio;
            for (std::size_t i = 0; i < size && !(size == 1 && !clamp); ++i) {
                const double expected = base(i) + ratio * (delta(0, i) + delta(1, i) + delta(2, i) + delta(3, i)) / 4;
                worst = std::max(worst, std::abs(widen<double>(first[begin + i]) - expected));
            }
            begin += size;
        }
        CHECK(worst < (std::same_as<T, bf16>   ? 2e-2
                      : std::same_as<T, f16>   ? 2e-3
                      : std::same_as<T, float> ? 2e-6
                                               : 1e-14));
    }
}

TEST_CASE_TEMPLATE("a ratio for each row or column is that of a tensor of its own", T, float, double, bf16)
{
    constexpr std::size_t height = 60, width = 1500;
    const testing::shaped_models<T> models({{height, width}}, 3, 6);
    for (const bool rows : {true, false}) {
        const std::size_t count = rows ? height : width, length = rows ? width : height;
        const auto place = [&](std::size_t v, std::size_t i) { return rows ? v * width + i : i * width + v; };
        testing::random_models<T> apart(std::vector<std::size_t>(count, length), 3, 1);
        for (std::size_t v = 0; v < count; ++v) {
            for (std::size_t i = 0; i < length; ++i) {
                apart.base[v * length + i] = models.flat.base[place(v, i)];
                for (std::size_t t = 0; t < 3; ++t) {
                    apart.tasks[t][v * length + i] = models.flat.tasks[t][place(v, i)];
                }
            }
        }
        for (const bool clamp : {true, false}) {
            std::vector<T> expected;
            merge(cpu{}, model_stock_options{.clamp = clamp}, apart.model(apart.base), apart.task_models(),
                apart.output(expected));
            const model_stock_options options{
                .clamp = clamp, .angles = rows ? angles_between::rows : angles_between::columns};
            merge_report report;
            const auto found = models.merged(options, 64, 3, &report);
            CHECK(testing::same_words(found, models.merged(options)));
            CHECK(report.walks == (rows ? 1 : 2));
            double worst = 0;
            for (std::size_t v = 0; v < count; ++v) {
                for (std::size_t i = 0; i < length; ++i) {
                    worst = std::max(
                        worst, std::abs(widen<double>(found[place(v, i)]) - widen<double>(expected[v * length + i])));
                }
            }
            CHECK(worst < (std::same_as<T, bf16> ? 2e-2 : std::same_as<T, float> ? 2e-6 : 1e-13));
        }
    }
}

TEST_CASE("Model Stock of rows by hand: equal, orthogonal, opposite, zero, of one entry")
{
    std::vector<float> base(10, 1), a{3, 5, 2, 1, 2, 3, 1, 1, 3, 3}, b{3, 5, 1, 2, 0, -1, 1, 1, 3, 0}, out(10);
    const auto model = [](std::vector<float>& x) {
        model_ref of;
        of.insert("w", tensor_ref{.data = x.data(), .dtype = dtype::f32, .shape = {4, 2}});
        of.insert("v", tensor_ref{.data = x.data() + 8, .dtype = dtype::f32, .shape = {2, 1}});
        return of;
    };
    for (const bool clamp : {true, false}) {
        merge(cpu{}, model_stock_options{.clamp = clamp, .angles = angles_between::rows}, const_model_ref(model(base)),
            {const_model_ref(model(a)), const_model_ref(model(b))}, model(out));
        CHECK(out == std::vector<float>{3, 5, 1, 1, 1, 1, 1, 1, 3, 1});
    }
}

TEST_CASE("Model Stock by hand")
{
    const auto stock = [](std::vector<std::vector<float>> tasks, bool clamp = true) {
        const std::vector<float> base{1, 1};
        std::vector<float> out(2);
        merge(cpu{}, model_stock_options{.clamp = clamp}, base, tasks, out);
        return out;
    };
    // Equal task vectors: c = 1, t = 1, the average. Orthogonal ones: c = 0, t = 0, the base.
    CHECK(stock({{3, 5}, {3, 5}}) == std::vector<float>{3, 5});
    CHECK(stock({{3, 1}, {1, 5}}) == std::vector<float>{1, 1});
    // c = 0.6: t = 1.2 / 1.6 = 0.75; mean of (5, 0) and (3, 4) is (4, 2).
    CHECK(stock({{6, 1}, {4, 5}}) == std::vector<float>{4, 2.5f});
    // c = -0.6: t = -1.2 / 0.4 = -3, clamped 0; mean of (5, 0) and (-3, 4) is (1, 2).
    CHECK(stock({{6, 1}, {-2, 5}}) == std::vector<float>{1, 1});
    CHECK(stock({{6, 1}, {-2, 5}}, false) == std::vector<float>{-2, -5});
    // A task that changed nothing: its cosines count as 0.
    CHECK(stock({{1, 1}, {4, 5}}) == std::vector<float>{1, 1});
    // Opposite task vectors have no ratio unless it is clamped.
    CHECK(stock({{2, 1}, {0, 1}}) == std::vector<float>{1, 1});
    CHECK_THROWS_WITH_AS(stock({{2, 1}, {0, 1}}, false),
        "the task vectors of tensor 'values' cancel (mean cosine -1): the ratio of Model Stock has no value there; "
        "clamp it, or exclude the tensor",
        invalid_argument);
    CHECK_THROWS_AS(stock({{2, 1}}), invalid_argument);
}
