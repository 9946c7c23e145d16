// Fisher accumulation: means of squares, expectations over labels, parts of the data, bad gradients.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/goldens.hpp"

#include <taskvec/statistics/fisher_accumulator.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <random>

using namespace taskvec;

namespace {

const_tensor_ref tensor(const std::vector<float>& v)
{
    return {v.data(), dtype::f32, {static_cast<std::int64_t>(v.size())}};
}

} // namespace

TEST_CASE("golden gradients give the golden Fisher")
{
    const reference::goldens file("statistics/statistics.safetensors");
    for (const auto& golden : file.cases("fisher")) {
        const auto gradients = [&](int example) { return file.input(golden, "gradient0_" + std::to_string(example)); };
        const auto expected = file.input(golden, "fisher0");
        empirical_fisher_accumulator whole(expected), left(expected), right(expected);
        for (int example = 0; example < 4; ++example) {
            whole.add(cpu{.threads = 2}, gradients(example));
            (example < 3 ? left : right).add(cpu{}, gradients(example));
        }
        left.add(right);
        CHECK(whole.examples() == 4);
        CHECK(left.examples() == 4);
        for (std::size_t i = 0; i < whole.parameters().size(); ++i) {
            const auto values = reference::values_of(*expected.find(whole.parameters()[i].name));
            const auto found = whole.fisher(i), parts = left.fisher(i);
            for (std::size_t k = 0; k < values.size(); ++k) {
                CHECK(found[k] == doctest::Approx(values[k]).epsilon(1e-6));
                CHECK(parts[k] == doctest::Approx(values[k]).epsilon(1e-6));
            }
        }
    }
}

TEST_CASE("the expected Fisher of a logistic model is p(1-p)x²; large tensors, threads, 16 bits")
{
    // log p(1|x) has gradient (1-p)·x, log p(0|x) has -p·x: expectation p(1-p)²x² + (1-p)p²x² = p(1-p)x².
    const std::size_t n = 200000;
    std::vector<bf16> x, one(n), zero(n);
    std::mt19937 generator(1);
    for (std::size_t i = 0; i < n; ++i) { x.push_back(narrow<bf16>(static_cast<float>(generator() % 64) - 32.0f)); }
    const auto model = [&](const std::vector<bf16>& v) {
        return const_model_ref{{"w", {v.data(), dtype::bf16, {static_cast<std::int64_t>(n)}}}};
    };
    expected_fisher_accumulator fisher(model(x));
    for (const float p : {0.25f, 0.5f}) {
        for (std::size_t i = 0; i < n; ++i) {
            one[i] = narrow<bf16>((1 - p) * widen<float>(x[i]));
            zero[i] = narrow<bf16>(-p * widen<float>(x[i]));
        }
        fisher.add(cpu{.threads = 3}, std::vector{model(zero), model(one)},
            std::vector<double>{1.0 - static_cast<double>(p), static_cast<double>(p)});
    }
    CHECK(fisher.examples() == 2);
    const auto mean = fisher.fisher(0);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const double value = widen<double>(x[i]);
        wrong += mean[i] != (0.1875 + 0.25) / 2 * value * value; // all of it exact in binary
    }
    CHECK(wrong == 0);
}

TEST_CASE("bad gradients are refused whole")
{
    std::vector<float> a{1, 2}, b{3, 4}, bad{1, std::numeric_limits<float>::infinity()}, three{1, 2, 3};
    const const_model_ref model{{"a", tensor(a)}, {"b", tensor(b)}};
    empirical_fisher_accumulator fisher(model);
    CHECK_THROWS_WITH_AS((void)fisher.fisher(0), "no example was given: the Fisher information is a mean over examples",
        invalid_argument);
    fisher.add(cpu{}, model);
    CHECK_THROWS_WITH_AS(fisher.add(cpu{}, {{"a", tensor(a)}, {"b", tensor(bad)}}),
        "the gradient of 'b' holds infinity at index 1: leave out this example", nonfinite_error);
    CHECK_THROWS_AS(fisher.add(cpu{}, {{"a", tensor(a)}}), invalid_argument);
    CHECK_THROWS_AS(fisher.add(cpu{}, {{"a", tensor(a)}, {"b", tensor(b)}, {"c", tensor(b)}}), invalid_argument);
    CHECK_THROWS_AS(fisher.add(cpu{}, {{"a", tensor(a)}, {"b", tensor(three)}}), shape_mismatch);
    std::vector<std::int64_t> whole(2);
    CHECK_THROWS_AS(fisher.add(cpu{}, {{"a", tensor(a)}, {"b", {whole.data(), dtype::i64, {2}}}}), dtype_mismatch);
    CHECK(fisher.examples() == 1);
    CHECK(fisher.fisher(0) == std::vector<double>{1, 4}); // what came before stands
    CHECK_THROWS_AS(fisher.add(empirical_fisher_accumulator({{"a", tensor(a)}})), invalid_argument);
    CHECK_THROWS_AS(fisher.add(empirical_fisher_accumulator({{"a", tensor(a)}, {"b", tensor(three)}})), shape_mismatch);

    expected_fisher_accumulator expected(model);
    const std::vector<const_model_ref> two{model, model};
    CHECK_THROWS_AS(expected.add(cpu{}, two, std::vector<double>{1.0}), invalid_argument);
    CHECK_THROWS_WITH_AS(expected.add(cpu{}, two, std::vector<double>{0.5, 0.6}),
        "the probabilities of the labels sum to 1.1; expected 1", invalid_argument);
    CHECK_THROWS_AS(expected.add(cpu{}, two, std::vector<double>{1.5, -0.5}), invalid_argument);
    CHECK(expected.examples() == 0);
}

TEST_CASE("integer tensors have no Fisher")
{
    std::vector<std::int64_t> step{1};
    std::vector<float> a{1, 2};
    empirical_fisher_accumulator fisher({{"a", tensor(a)}, {"step", {step.data(), dtype::i64, {1}}}});
    CHECK(fisher.parameters().size() == 1);
    fisher.add(cpu{}, {{"a", tensor(a)}});
    CHECK(fisher.fisher(0) == std::vector<double>{1, 4});
}
