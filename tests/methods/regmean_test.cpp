// RegMean: golden cases, least squares on the stacked data, layouts, threads, the ridge, and Grams that are none.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/goldens.hpp"
#include "../reference/least_squares.hpp"
#include "../reference/linear_layers.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/regmean.hpp>

#include <doctest/doctest.h>

#include <random>

using namespace taskvec;

namespace {

/// With a merge on the CPU and the definition beside it.
template <class T>
struct layers : testing::linear_layers<T> {
    using base = testing::linear_layers<T>;
    using base::base, base::in, base::out, base::weights, base::biases, base::shape, base::models, base::gram,
        base::weight, base::at;

    struct result {
        std::vector<T> weight, bias;
    };
    [[nodiscard]] result merged(const regmean_options& options, const cpu& policy = {.threads = 2}) const
    {
        result found{std::vector<T>(in * out), std::vector<T>(out)};
        merge(policy, options, models(),
            model_ref{{"fc.weight", {found.weight.data(), dtype_of<T>, shape()}},
                {"fc.bias", {found.bias.data(), dtype_of<T>, {static_cast<std::int64_t>(out)}}}});
        return found;
    }
    /// The definition, by Gaussian elimination.
    [[nodiscard]] reference::rows expected(double alpha, std::vector<double> task_weights = {}) const
    {
        task_weights.resize(weights.size(), 1.0);
        reference::rows g(in, std::vector<double>(in)), b(in, std::vector<double>(out));
        for (std::size_t t = 0; t < weights.size(); ++t) {
            for (std::size_t i = 0; i < in; ++i) {
                for (std::size_t j = 0; j < in; ++j) {
                    const double scaled = task_weights[t] * (i == j ? 1 : alpha) * gram(t, i, j);
                    g[i][j] += scaled;
                    for (std::size_t o = 0; o < out; ++o) { b[i][o] += scaled * weight(t, j, o); }
                }
            }
        }
        return reference::solve(g, b);
    }
    [[nodiscard]] double difference(const std::vector<T>& found, const reference::rows& wanted) const
    {
        double worst = 0;
        for (std::size_t i = 0; i < in; ++i) {
            for (std::size_t o = 0; o < out; ++o) {
                worst = std::max(worst, std::abs(widen<double>(found[at(i, o)]) - wanted[i][o]));
            }
        }
        return worst;
    }
};

} // namespace

TEST_CASE("golden RegMeans")
{
    const reference::goldens file("statistics/statistics.safetensors");
    const auto cases = file.cases("regmean");
    CHECK(cases.size() == 8);
    for (const auto& golden : cases) {
        CAPTURE(golden.name);
        const auto expected = file.expected(golden);
        const reference::like out(expected);
        merge(cpu{}, regmean_options{.grams = file.inputs(golden, "gram"), .alpha = golden.options()["alpha"]},
            file.inputs(golden, "task"), out.model());
        CHECK(reference::largest_difference(out.model(), expected)
            <= golden.tolerance() / 10); // the stored bound leaves room for ill conditioning
    }
}

TEST_CASE_TEMPLATE("RegMean equals its definition in both layouts, whatever the threads", T, float, double, bf16)
{
    const double rounding = std::same_as<T, double> ? 1e-12 : std::same_as<T, float> ? 1e-6 : 2e-2;
    for (const auto layout : {weight_layout::out_in, weight_layout::in_out}) {
        for (const auto& [n, p] : {std::pair<std::size_t, std::size_t>{1, 1}, {7, 300}, {150, 3}, {40, 40}}) {
            const layers<T> net(n, p, 3, 2 * n + 5, 3, layout);
            for (const double alpha : {0.9, 0.3, 0.0}) {
                const auto found = net.merged(net.options(alpha));
                CHECK(net.difference(found.weight, net.expected(alpha)) < rounding * 4);
                const auto single = net.merged(net.options(alpha), cpu{.threads = 1});
                CHECK(std::memcmp(single.weight.data(), found.weight.data(), found.weight.size() * sizeof(T)) == 0);
                std::vector<T> bias(p);
                merge(cpu{}, average_options{}, net.biases, bias);
                CHECK(std::memcmp(bias.data(), found.bias.data(), p * sizeof(T)) == 0);
            }
            auto weighted = net.options(0.9);
            weighted.weights = {0.5, 2, 0};
            CHECK(net.difference(net.merged(weighted).weight, net.expected(0.9, {0.5, 2, 0})) < rounding * 4);
        }
    }
}

TEST_CASE("with alpha 1 RegMean is least squares on the stacked data")
{
    const layers<double> net(24, 11, 4, 30, 6);
    reference::rows x, y;
    for (std::size_t t = 0; t < 4; ++t) {
        for (const auto& row : net.inputs[t]) {
            x.push_back(row);
            y.emplace_back(net.out);
            for (std::size_t o = 0; o < net.out; ++o) {
                for (std::size_t i = 0; i < net.in; ++i) { y.back()[o] += row[i] * net.weight(t, i, o); }
            }
        }
    }
    CHECK(net.difference(net.merged(net.options(1.0)).weight, reference::least_squares(x, y)) < 1e-12);
}

TEST_CASE("one task comes back as it was; equal Grams give the average; large layers too")
{
    const layers<float> alone(30, 20, 1, 40, 1);
    CHECK(alone.merged(alone.options(0.9)).weight == alone.weights[0]);
    layers<float> equal(30, 20, 3, 40, 2);
    equal.grams[1] = equal.grams[2] = equal.grams[0];
    std::vector<float> average(600);
    merge(cpu{}, average_options{}, equal.weights, average);
    const auto found = equal.merged(equal.options(1.0)).weight;
    double worst = 0;
    for (std::size_t i = 0; i < 600; ++i) {
        worst = std::max(worst, static_cast<double>(std::abs(found[i] - average[i])));
    }
    CHECK(worst < 1e-6);
    // Beyond 1024 inputs a layer is solved alone, its columns in parallel. Orthogonal inputs: each row is a weighted
    // mean by the diagonal.
    const std::size_t n = 1100, p = 600;
    std::vector<std::vector<float>> w(2, std::vector<float>(n * p)), g(2, std::vector<float>(n * n, 0.0f));
    for (std::size_t i = 0; i < n * p; ++i) {
        w[0][i] = static_cast<float>(i % 101);
        w[1][i] = static_cast<float>(i % 7);
    }
    for (std::size_t i = 0; i < n; ++i) {
        g[0][i * n + i] = 1.0f + static_cast<float>(i % 3);
        g[1][i * n + i] = 2.0f;
    }
    const auto N = static_cast<std::int64_t>(n), P = static_cast<std::int64_t>(p);
    std::vector<const_model_ref> tasks, grams;
    for (std::size_t t = 0; t < 2; ++t) {
        tasks.push_back({{"w", {w[t].data(), dtype::f32, {P, N}}}});
        grams.push_back({{"w", {g[t].data(), dtype::f32, {N, N}}}});
    }
    std::vector<float> one(n * p), three(n * p);
    merge(
        cpu{.threads = 1}, regmean_options{.grams = grams}, tasks, model_ref{{"w", {one.data(), dtype::f32, {P, N}}}});
    merge(cpu{.threads = 3}, regmean_options{.grams = grams}, tasks,
        model_ref{{"w", {three.data(), dtype::f32, {P, N}}}});
    CHECK(one == three);
    worst = 0;
    for (std::size_t i = 0; i < n * p; ++i) {
        const double a = 1.0 + static_cast<double>(i % n % 3), b = 2.0;
        worst = std::max(worst, std::abs(one[i] - (a * w[0][i] + b * w[1][i]) / (a + b)));
    }
    CHECK(worst < 1e-5);
}

TEST_CASE("a singular system is an error that suggests the ridge; with it, unseen directions get the average")
{
    layers<double> net(10, 4, 2, 3, 9); // 6 examples for 10 inputs
    CHECK_THROWS_WITH_AS((void)net.merged(net.options(1.0)),
        "the inputs of layer 'fc.weight' do not determine its weight: the sum of its Gram matrices is singular: set "
        "ridge, such as 1e-6, or lower alpha",
        invalid_argument);
    CHECK_NOTHROW((void)net.merged(net.options(0.9)));
    for (std::size_t t = 0; t < 2; ++t) { // input 6 is dead
        for (std::size_t i = 0; i < 10; ++i) { net.grams[t][i * 10 + 6] = net.grams[t][6 * 10 + i] = 0; }
    }
    CHECK_THROWS_WITH_AS((void)net.merged(net.options(0.9)),
        "the inputs of layer 'fc.weight' do not determine its weight: the sum of its Gram matrices is singular (input "
        "6 was 0 in all batches): set ridge, such "
        "as "
        "1e-6, or lower alpha",
        invalid_argument);
    auto options = net.options(0.9);
    options.ridge = 1e-9;
    const auto found = net.merged(options);
    for (std::size_t o = 0; o < 4; ++o) {
        CHECK(found.weight[net.at(6, o)] == doctest::Approx((net.weight(0, 6, o) + net.weight(1, 6, o)) / 2));
    }
    options.ridge = 1e9; // drowns the data
    const auto drowned = net.merged(options);
    for (std::size_t i = 0; i < 10; ++i) {
        CHECK(drowned.weight[net.at(i, 1)] == doctest::Approx((net.weight(0, i, 1) + net.weight(1, i, 1)) / 2));
    }
    // A layer that no task has used.
    for (auto& gram : net.grams) { std::fill(gram.begin(), gram.end(), 0.0); }
    CHECK_THROWS_WITH_AS((void)net.merged(net.options(0.9)), doctest::Contains("set ridge"), invalid_argument);
    options.ridge = 1e-9;
    const auto unused = net.merged(options);
    for (std::size_t i = 0; i < 10; ++i) {
        CHECK(unused.weight[net.at(i, 1)] == doctest::Approx((net.weight(0, i, 1) + net.weight(1, i, 1)) / 2));
    }
    // Singular but for what rounding to f32 left.
    layers<float> rounded(10, 4, 2, 3, 9);
    CHECK_THROWS_AS((void)rounded.merged(rounded.options(1.0)), invalid_argument);
}

TEST_CASE("what is no Gram matrix of this model is refused by name")
{
    const layers<double> good(6, 4, 2, 20, 4);
    const auto run = [&](const layers<double>& net) { (void)net.merged(net.options(0.9)); };
    auto net = good;
    net.grams[1][1 * 6 + 4] += 1;
    CHECK_THROWS_AS(run(net), invalid_argument);
    try {
        run(net);
    }
    catch (const invalid_argument& e) {
        CHECK(std::string(e.what()).starts_with(
            "the Gram matrix of 'fc.weight' in the Grams of task 2 is not symmetric: "));
    }
    net = good;
    net.grams[0][2 * 6 + 2] = -1;
    CHECK_THROWS_WITH_AS(run(net),
        "the Gram matrix of 'fc.weight' in the Grams of task 1 has -1 at row and column 2: a sum of squares cannot be "
        "negative",
        invalid_argument);
    net = good;
    net.grams[0][2 * 6 + 3] = net.grams[0][3 * 6 + 2] = 1e6;
    CHECK_THROWS_AS(run(net), invalid_argument);
    net = good;
    net.grams[0][2 * 6 + 3] = NAN;
    CHECK_THROWS_WITH_AS(run(net),
        "the Gram matrix of 'fc.weight' in the Grams of task 1 holds NaN at index 15: collect the statistics again",
        nonfinite_error);
    net = good;
    net.weights[1][7] = INFINITY;
    CHECK_THROWS_WITH_AS(run(net),
        "tensor 'fc.weight' of task 2 holds infinity at index 7: repair it, or exclude the tensor", nonfinite_error);

    const auto with = [&](std::vector<const_model_ref> grams, double alpha = 0.9, double ridge = 0,
                          std::vector<double> weights = {}) {
        (void)good.merged(
            regmean_options{.grams = std::move(grams), .alpha = alpha, .ridge = ridge, .weights = std::move(weights)});
    };
    const auto grams = good.gram_models();
    const std::vector<double> square(36);
    CHECK_THROWS_WITH_AS(
        with({grams[0]}), "1 sets of Grams for 2 tasks: give one each, in the order of the tasks", invalid_argument);
    CHECK_THROWS_WITH_AS(with({grams[0], {}}),
        "tensor 'fc.weight' is missing in the Grams of task 2 but not in the other Grams: collect it for every task, "
        "or for none",
        invalid_argument);
    CHECK_THROWS_WITH_AS(with({grams[0], {{"other", {square.data(), dtype::f64, {6, 6}}}}}),
        "tensor 'other' of the Grams of task 2 is not in the models: these are the statistics of another model",
        invalid_argument);
    CHECK_THROWS_WITH_AS(with({grams[0], {{"fc.weight", {square.data(), dtype::f64, {4, 4}}}}}),
        "tensor 'fc.weight' has a Gram matrix of shape [4, 4] in the Grams of task 2; expected [6, 6] for a weight of "
        "shape [4, 6] stored out×in (say so if it "
        "is in×out)",
        shape_mismatch);
    CHECK_THROWS_AS(
        with({{{"fc.bias", {square.data(), dtype::f64, {4, 4}}}}, {{"fc.bias", {square.data(), dtype::f64, {4, 4}}}}}),
        shape_mismatch);
    CHECK_THROWS_AS(with({grams[0], {{"fc.weight", {square.data(), dtype::i64, {6, 6}}}}}), dtype_mismatch);
    CHECK_THROWS_AS(with(grams, 1.5), invalid_argument);
    CHECK_THROWS_AS(with(grams, NAN), invalid_argument);
    CHECK_THROWS_AS(with(grams, 0.9, -1), invalid_argument);
    CHECK_THROWS_AS(with(grams, 0.9, 0, {1, -1}), invalid_argument);
    CHECK_THROWS_AS(with(grams, 0.9, 0, {0, 0}), invalid_argument);
    // No Grams at all: an average.
    CHECK_NOTHROW(with({{}, {}}));
}
