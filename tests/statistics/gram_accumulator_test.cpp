// Gram accumulation: equal to XᵀX however the data are cut, for every storage type and order.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/goldens.hpp"

#include <taskvec/statistics/gram_accumulator.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <random>

using namespace taskvec;

namespace {

template <class T>
std::vector<T> random_batch(std::size_t size, unsigned seed)
{
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<T> x;
    for (std::size_t i = 0; i < size; ++i) { x.push_back(narrow<T>(normal(generator))); }
    return x;
}

} // namespace

TEST_CASE_TEMPLATE(
    "a Gram matrix is the sum of outer products, in any batches and threads", T, float, double, bf16, f16)
{
    for (const std::size_t n : {1u, 63u, 65u, 200u}) {
        const std::size_t examples = 300;
        const auto x = random_batch<T>(examples * n, static_cast<unsigned>(n));
        const auto rows = [&](std::size_t first, std::size_t count) {
            return matrix_view<const T>(x.data() + first * n, count, n, matrix_order::row_major);
        };
        gram_accumulator whole(n), threads(n), left(n), right(n);
        whole.add(cpu{.threads = 1}, rows(0, examples));
        threads.add(cpu{.threads = 4}, rows(0, examples));
        left.add(cpu{}, rows(0, 7));
        left.add(cpu{}, rows(7, 0));
        right.add(cpu{}, rows(7, 200));
        right.add(cpu{}, rows(207, 93));
        left.add(right);
        CHECK(left.examples() == examples);
        const auto g = whole.matrix(), other = threads.matrix(), parts = left.matrix();
        CHECK(std::memcmp(g.data(), other.data(), n * n * sizeof(double)) == 0);
        double worst = 0, symmetry = 0, cut = 0;
        for (std::size_t i = 0; i < n; ++i) {
            for (std::size_t j = 0; j < n; ++j) {
                double sum = 0;
                for (std::size_t e = 0; e < examples; ++e) {
                    sum += widen<double>(x[e * n + i]) * widen<double>(x[e * n + j]);
                }
                worst = std::max(worst, std::abs(g(i, j) - sum));
                cut = std::max(cut, std::abs(parts(i, j) - sum));
                symmetry = std::max(symmetry, std::abs(g(i, j) - g(j, i)));
                CHECK(whole(i, j) == g(i, j));
            }
        }
        CHECK(worst < 1e-11);
        CHECK(cut < 1e-11);
        CHECK(symmetry == 0);
    }
}

TEST_CASE("golden batches give the golden Grams")
{
    const reference::goldens file("statistics/statistics.safetensors");
    for (const auto& golden : file.cases("regmean")) {
        const auto batch = file.input(golden, "batch0"), gram = file.input(golden, "gram0");
        for (const std::string layer : {"fc0", "fc1"}) {
            const auto& x = *batch.find(layer);
            const auto examples = static_cast<std::size_t>(x.shape[0]), n = static_cast<std::size_t>(x.shape[1]);
            const auto values = reference::values_of(x), expected = reference::values_of(*gram.find(layer + ".weight"));
            gram_accumulator sums(n, layer);
            sums.add(cpu{}, matrix_view<const double>(values.data(), examples, n, matrix_order::row_major));
            for (std::size_t i = 0; i < n * n; ++i) {
                CHECK(sums(i / n, i % n) == doctest::Approx(expected[i]).epsilon(1e-6));
            }
        }
    }
}

TEST_CASE("batches in column order; of the wrong width; with NaN")
{
    const auto x = random_batch<float>(12, 3);
    gram_accumulator by_rows(3, "fc1"), by_columns(3, "fc1");
    by_rows.add(cpu{}, matrix_view<const float>(x.data(), 4, 3, matrix_order::row_major));
    std::vector<float> turned(12);
    for (std::size_t i = 0; i < 12; ++i) { turned[i % 3 * 4 + i / 3] = x[i]; }
    by_columns.add(cpu{}, matrix_view<float>(turned.data(), 4, 3, matrix_order::column_major));
    CHECK(by_rows(2, 1) == by_columns(2, 1));
    CHECK_THROWS_WITH_AS(by_rows.add(cpu{}, matrix_view<const float>(x.data(), 3, 4, matrix_order::row_major)),
        "a batch of 3×4 was given to the Gram matrix of fc1, which has 3 inputs: pass examples×features",
        shape_mismatch);
    CHECK_THROWS_AS(by_rows.add(gram_accumulator(4)), shape_mismatch);
    turned[4] = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_WITH_AS(
        by_columns.add(cpu{}, matrix_view<const float>(turned.data(), 4, 3, matrix_order::column_major)),
        "a batch for fc1 holds NaN at row 0, column 1: leave out this example", nonfinite_error);
    CHECK(by_columns.examples() == 4);
    CHECK(by_rows(0, 0) == by_columns(0, 0)); // nothing of the bad batch was added
}
