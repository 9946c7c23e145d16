// Low rank beside Eigen's BDCSVD of the formed product, measured once in the same run: factored, randomized and
// truncated SVD, PERU-LoRA and merged adapters. About two minutes.
// SPDX-License-Identifier: Apache-2.0
#include "ceiling.hpp"

#include <taskvec/adapters/merge_ties.hpp>
#include <taskvec/linalg/randomized_svd.hpp>
#include <taskvec/linalg/truncated_svd.hpp>
#include <taskvec/reuse/peru_lora.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <map>
#include <string>

using namespace taskvec;

namespace {

using dense = Eigen::MatrixXf;

matrix<float> normal(
    std::size_t rows, std::size_t cols, std::uint64_t seed, matrix_order order = matrix_order::column_major)
{
    matrix<float> x(rows, cols, order);
    const random_stream stream(seed, 0);
    for (std::size_t i = 0; i < x.size(); ++i) { x.data()[i] = static_cast<float>(stream.normal(i)); }
    return x;
}
Eigen::Map<const dense> mapped(const matrix<float>& x)
{
    return {x.data(), static_cast<Eigen::Index>(x.rows()), static_cast<Eigen::Index>(x.cols())};
}

/// What the naive way takes, and the spectrum that it finds.
struct naive {
    double seconds = 0;
    std::vector<double> sigma;

    /// ‖A − Aq‖, the least that rank q can do.
    [[nodiscard]] double best(std::size_t q) const { return std::sqrt(energy_beyond(sigma, q)); }
};
template <class Form>
naive bdcsvd(Form&& form)
{
    naive result;
    result.seconds = bench::seconds([&] {
        const dense product = form();
        const Eigen::BDCSVD<dense> svd(product, Eigen::ComputeThinU | Eigen::ComputeThinV);
        benchmark::DoNotOptimize(svd.matrixU().data());
        result.sigma.assign(svd.singularValues().data(), svd.singularValues().data() + svd.singularValues().size());
    });
    return result;
}

/// Medians of the work, and how many times longer the naive way takes.
template <class Work>
void measure(benchmark::State& state, double naive_seconds, Work&& work)
{
    std::vector<double> times;
    for (auto _ : state) {
        times.push_back(bench::seconds([&] { work(); }));
        state.SetIterationTime(times.back());
    }
    state.counters["ms"] = 1e3 * bench::median(times);
    state.counters["naive_s"] = naive_seconds;
    state.counters["times"] = naive_seconds / bench::median(times);
}

// A 4096×4096 product of factors of 128 columns, q = 16.
void factored(benchmark::State& state)
{
    const auto a = normal(4096, 128, 1), b = normal(4096, 128, 2);
    static const naive reference = bdcsvd([&] { return dense(mapped(a) * mapped(b).transpose()); });
    const cpu policy{.threads = static_cast<unsigned>(state.range(0))};
    double error = 0;
    measure(state, reference.seconds,
        [&] { error = std::sqrt(factored_svd<float>(policy, a.view(), b.view(), {.rank = 16}).squared_error); });
    state.counters["error"] = error / reference.best(16);
}

/// σ falls as 1/k into a floor of noise a thousand times lower (decaying), or it is that of noise alone (flat).
matrix<float> large(bool decaying)
{
    constexpr std::size_t n = 4096, rank = 512;
    if (!decaying) { return normal(n, n, 3); }
    auto u = normal(n, rank, 4);
    const auto v = normal(n, rank, 5);
    for (std::size_t k = 0; k < rank; ++k) {
        for (std::size_t i = 0; i < n; ++i) { u(i, k) /= static_cast<float>(k + 1); }
    }
    auto a = normal(n, n, 6);
    gemm<float>(cpu{}, 1.0f, u.view(), v.view().transposed(), 1e-2f, a.view());
    return a;
}

// A dense 4096×4096 matrix, q = 16. "error": ‖A − Aq‖ beside the least possible; "estimate": beside what it says
// itself.
void randomized(benchmark::State& state)
{
    const bool decaying = state.range(0) != 0;
    const auto a = large(decaying);
    static std::map<bool, naive> references;
    if (!references.contains(decaying)) {
        references[decaying] = bdcsvd([&] { return dense(mapped(a)); });
    }
    const auto& reference = references[decaying];
    const cpu policy{.threads = static_cast<unsigned>(state.range(1))};
    randomized_svd_result<float> s;
    measure(state, reference.seconds, [&] { s = randomized_svd<float>(policy, a.view(), {.rank = 16, .seed = 1}); });
    const double error = std::sqrt(squared_residual<float>(policy, a.view(), s.u.view(), s.sigma, s.v.view()));
    state.counters["error"] = error / reference.best(16);
    state.counters["estimate"] = error / std::sqrt(s.squared_error);
}

// Exact, all columns: square, tall, and so narrow that Jacobi does it.
void truncated(benchmark::State& state)
{
    const auto m = static_cast<std::size_t>(state.range(0)), n = static_cast<std::size_t>(state.range(1));
    const auto a = normal(m, n, 7);
    static std::map<std::pair<std::size_t, std::size_t>, naive> references;
    if (!references.contains({m, n})) {
        references[{m, n}] = bdcsvd([&] { return dense(mapped(a)); });
    }
    const auto& reference = references[{m, n}];
    double error = 0;
    measure(state, reference.seconds,
        [&] { error = std::sqrt(truncated_svd<float>(cpu{.threads = 1}, a.view(), {.rank = 16}).squared_error); });
    state.counters["error"] = error / reference.best(16);
}

// Exact, the leading 16 triples of a square layer: σ falling as 1/k over noise, and noise alone.
void leading(benchmark::State& state)
{
    const bool decaying = state.range(0) != 0;
    const auto wide = static_cast<std::size_t>(state.range(2));
    const auto all = large(decaying);
    const auto a = all.view().block(0, 0, wide, wide);
    static std::map<std::pair<bool, std::size_t>, naive> references;
    const std::pair which(decaying, wide);
    if (!references.contains(which)) {
        references[which] = bdcsvd([&] {
            const auto side = static_cast<Eigen::Index>(wide);
            return dense(mapped(all).topLeftCorner(side, side));
        });
    }
    const auto& reference = references[which];
    const cpu policy{.threads = static_cast<unsigned>(state.range(1))};
    double error = 0;
    measure(state, reference.seconds,
        [&] { error = std::sqrt(leading_svd<float>(policy, a, {.rank = 16}).squared_error); });
    state.counters["error"] = error / reference.best(16);
}

constexpr std::size_t layer_count = 32, side = 1024;

std::vector<lora_adapter<float>> adapters(std::size_t count)
{
    std::vector<lora_adapter<float>> result(count);
    for (std::size_t t = 0; t < count; ++t) {
        for (std::size_t i = 0; i < layer_count; ++i) {
            const std::uint64_t seed = 1000 * t + 2 * i;
            result[t]["layers." + std::to_string(i)] = {normal(side, 16, seed, matrix_order::row_major),
                normal(16, side, seed + 1, matrix_order::row_major), 0.5};
        }
    }
    return result;
}
/// Forming the sum of the products of one layer, and its BDCSVD; times the number of layers.
double naive_layers(std::size_t count)
{
    static std::map<std::size_t, double> known;
    if (!known.contains(count)) {
        const auto given = adapters(count);
        known[count] = static_cast<double>(layer_count) * bdcsvd([&] {
            matrix<float> sum(side, side), next(side, side);
            for (const auto& adapter : given) {
                densify<float>(cpu{.threads = 1}, adapter.at("layers.0"), next.view());
                for (std::size_t i = 0; i < sum.size(); ++i) { sum.data()[i] += next.data()[i]; }
            }
            return dense(mapped(sum));
        }).seconds;
    }
    return known[count];
}

// 32 layers of 1024×1024 and rank 16, truncated to rank 4.
void peru(benchmark::State& state)
{
    const auto given = adapters(1);
    measure(state, naive_layers(1), [&] {
        benchmark::DoNotOptimize(
            peru_lora<float>(cpu{.threads = static_cast<unsigned>(state.range(0))}, given[0], {.rank = {.rank = 4}})
                .layers.data());
    });
}

// Four such adapters, summed and compressed to rank 16.
void linear(benchmark::State& state)
{
    const auto given = adapters(4);
    measure(state, naive_layers(4), [&] {
        benchmark::DoNotOptimize(
            merge_linear<float>(cpu{.threads = static_cast<unsigned>(state.range(0))}, given, {.rank = {.rank = 16}})
                .layers.data());
    });
}

// Three such adapters by TIES in product space, to rank 16, randomized. The naive way here is but the BDCSVDs.
void ties(benchmark::State& state)
{
    const auto given = adapters(3);
    measure(state, naive_layers(3), [&] {
        benchmark::DoNotOptimize(merge_ties<float>(cpu{.threads = static_cast<unsigned>(state.range(0))}, given,
            {.rank = {.rank = 16}}, decompose_randomized{})
                .layers.data());
    });
}

} // namespace

BENCHMARK(factored)->Arg(1)->Arg(2)->UseManualTime()->Iterations(15);
BENCHMARK(randomized)->ArgsProduct({{1, 0}, {1}})->Args({1, 2})->UseManualTime()->Iterations(9);
BENCHMARK(truncated)->Args({1024, 1024})->Args({4096, 512})->Args({4096, 64})->UseManualTime()->Iterations(3);
BENCHMARK(leading)->ArgsProduct({{1, 0}, {1, 2}, {3072}})->Args({1, 2, 4096})->UseManualTime()->Iterations(5);
BENCHMARK(peru)->Arg(1)->Arg(2)->UseManualTime()->Iterations(9);
BENCHMARK(linear)->Arg(1)->Arg(2)->UseManualTime()->Iterations(9);
BENCHMARK(ties)->Arg(1)->UseManualTime()->Iterations(3);
