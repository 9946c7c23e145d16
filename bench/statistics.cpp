// Merges that look at data: Fisher as a share of the memory ceiling, RegMean beside a plain product of as many
// operations.
// SPDX-License-Identifier: Apache-2.0
#include "ceiling.hpp"

#include <taskvec/linalg/eigen.hpp>
#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/regmean.hpp>
#include <taskvec/statistics/gram_accumulator.hpp>

#include <benchmark/benchmark.h>

#include <random>

using namespace taskvec;

namespace {

constexpr std::size_t tasks = 3;

bench::ceiling& the_ceiling()
{
    static bench::ceiling instance;
    return instance;
}

std::vector<float> random_values(std::size_t n, unsigned seed)
{
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(n);
    for (std::size_t i = 0; i < n; ++i) { x[i] = i < (1u << 16) ? normal(generator) : x[i - (1u << 16)] * 1.0001f; }
    return x;
}

template <class T>
void fisher(benchmark::State& state)
{
    const std::size_t n = std::size_t{1} << 24;
    const cpu policy{.threads = static_cast<unsigned>(state.range(0))};
    const bool normalize = state.range(1) != 0;
    std::vector<std::vector<T>> models, fishers;
    for (unsigned t = 0; t < tasks; ++t) {
        models.emplace_back();
        fishers.emplace_back();
        for (const float x : random_values(n, t)) { models.back().push_back(narrow<T>(x)); }
        for (const float x : random_values(n, t + 10)) { fishers.back().push_back(narrow<T>(x * x)); }
    }
    std::vector<T> out(n);
    const double bytes = static_cast<double>(n * sizeof(T));
    const fisher_options options{.fishers = flat_fishers(fishers), .normalize = normalize};
    bench::interleave(
        state, "share of the ceiling", [&] { merge(policy, options, models, out); },
        [&] { return the_ceiling()((normalize ? 9 : 6) * bytes, bytes, 6); });
}

// One linear layer of n inputs and n outputs; the ideal is n³/3 + (T + 1)·2·n³ operations at the rate of a plain f64
// product.
void regmean(benchmark::State& state)
{
    const auto n = static_cast<std::size_t>(state.range(0));
    const auto side = static_cast<std::int64_t>(n);
    const cpu policy{.threads = 1};
    std::vector<std::vector<float>> weights;
    std::vector<matrix<double>> grams;
    std::vector<const_model_ref> models, statistics;
    for (unsigned t = 0; t < tasks; ++t) {
        weights.push_back(random_values(n * n, t));
        const auto inputs = random_values(2 * n * n, t + 10);
        gram_accumulator gram(n);
        gram.add(policy, matrix_view<const float>(inputs.data(), 2 * n, n, matrix_order::row_major));
        grams.push_back(gram.matrix());
    }
    for (unsigned t = 0; t < tasks; ++t) {
        models.emplace_back().insert("w", as_tensor(host_view<const float>(weights[t].data(), n * n), {side, side}));
        statistics.emplace_back().insert("w", as_tensor(host_view<const double>(grams[t].data(), n * n), {side, side}));
    }
    std::vector<float> result(n * n);
    model_ref out;
    out.insert("w", as_tensor(host_view<float>(result.data(), n * n), {side, side}));
    matrix<double> product(n, n);
    const regmean_options options{.grams = statistics, .ridge = 1e-6};
    bench::interleave(
        state, "share of a product's rate", [&] { merge(policy, options, models, out); },
        [&] {
            const double one = bench::seconds([&] {
                gemm(policy, 1.0, std::as_const(grams[0]).view(), std::as_const(grams[1]).view(), 0.0, product.view());
            });
            return one * (static_cast<double>(tasks + 1) + 1.0 / 6.0);
        });
}

} // namespace

BENCHMARK(fisher<float>)
    ->ArgNames({"threads", "normalize"})
    ->Args({1, 0})
    ->Args({2, 0})
    ->Args({1, 1})
    ->UseManualTime()
    ->Iterations(7);
BENCHMARK(fisher<bf16>)->ArgNames({"threads", "normalize"})->Args({1, 0})->UseManualTime()->Iterations(7);
BENCHMARK(regmean)->ArgName("n")->Arg(256)->Arg(768)->Arg(1536)->UseManualTime()->Iterations(7);
