// The exact k-th magnitude of 2^26 values, in read sweeps, beside std::nth_element; and that of bf16 task vectors.
// SPDX-License-Identifier: Apache-2.0
#include "ceiling.hpp"

#include <taskvec/select/thresholds.hpp>

#include <benchmark/benchmark.h>

#include <cmath>
#include <random>

using namespace taskvec;

namespace {

constexpr std::size_t count = std::size_t{1} << 26;

enum shape : int { normal, equal, few, sorted, exponents };

std::vector<float> values(int which)
{
    std::vector<float> x(count);
    std::mt19937 generator(1);
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t word = generator();
        switch (which) {
        case normal: { // a sum of four uniform bytes' worth of bits: bell-shaped, no two alike by design
            const float u = static_cast<float>(word & 0xffff) + static_cast<float>(word >> 16) - 65535.0f;
            x[i] = u * (1.0f + static_cast<float>(generator() & 0xffff) * 0x1p-16f);
            break;
        }
        case equal: x[i] = 0.5f; break;
        case few: x[i] = static_cast<float>(word % 4); break;
        case sorted: x[i] = static_cast<float>(i); break;
        default: x[i] = std::bit_cast<float>(word % 0x7f000000u); break;
        }
    }
    return x;
}

// "sweeps": the time as a multiple of one read of the data.
void kth(benchmark::State& state)
{
    static int made = -1;
    static std::vector<float> x;
    if (made != state.range(0)) {
        x = values(static_cast<int>(state.range(0)));
        made = static_cast<int>(state.range(0));
    }
    const cpu policy{.threads = static_cast<unsigned>(state.range(1))};
    static bench::ceiling ceiling;
    unsigned walks = 0;
    std::vector<double> ratios;
    for (auto _ : state) {
        const double sweep = ceiling(count * sizeof(float), 0, 1);
        const double time = bench::seconds([&] { benchmark::DoNotOptimize(top_k(policy, x, count / 5, &walks)); });
        state.SetIterationTime(time);
        ratios.push_back(time / sweep);
    }
    state.counters["sweeps"] = bench::median(ratios);
    state.counters["walks"] = walks;
}

// The thresholds of three bf16 task vectors of 2^24 entries over their common base: what TIES looks for first.
void task_vectors(benchmark::State& state)
{
    constexpr std::size_t n = std::size_t{1} << 24;
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<float> draws(1u << 16);
    for (auto& draw : draws) { draw = normal(generator); }
    std::vector<std::vector<bf16>> memory(4, std::vector<bf16>(n));
    std::vector<const_model_ref> models(4);
    for (std::size_t m = 0; m < 4; ++m) {
        for (std::size_t i = 0; i < n; ++i) {
            memory[m][i] = narrow<bf16>(draws[i & 0xffff] + (m == 0 ? 0.0f : 0.1f * draws[(i * 7 + m * 131) & 0xffff]));
        }
        models[m].insert(
            "w", {memory[m].data(), dtype::bf16, {static_cast<std::int64_t>(n)}, {}, memory_space::host, 0});
    }
    const aligned_models aligned(&models[0], std::span(models).subspan(1));
    const cpu policy{.threads = static_cast<unsigned>(state.range(0))};
    bench::ceiling ceiling;
    unsigned walks = 0;
    std::vector<double> ratios;
    for (auto _ : state) {
        const double sweep = ceiling(4.0 * n * sizeof(bf16), 0, 4);
        const double time =
            bench::seconds([&] { walks = trim_thresholds(policy, aligned, 0.2, scope::model).walks(); });
        state.SetIterationTime(time);
        ratios.push_back(time / sweep);
    }
    state.counters["sweeps"] = bench::median(ratios);
    state.counters["walks"] = walks;
}

void nth_element(benchmark::State& state)
{
    const auto x = values(normal);
    for (auto _ : state) {
        auto copy = x;
        const double time = bench::seconds([&] {
            std::nth_element(copy.begin(), copy.begin() + count / 5, copy.end(),
                [](float a, float b) { return std::abs(a) > std::abs(b); });
        });
        state.SetIterationTime(time);
    }
}

} // namespace

BENCHMARK(kth)
    ->ArgsProduct({{normal, equal, few, sorted, exponents}, {1}})
    ->Args({normal, 2})
    ->UseManualTime()
    ->Iterations(5);
BENCHMARK(task_vectors)->Arg(1)->Arg(2)->UseManualTime()->Iterations(7);
BENCHMARK(nth_element)->UseManualTime()->Iterations(1);
