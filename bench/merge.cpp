// Merges as a share of the memory ceiling: weighted combination and TIES, f32 and bf16, one thread and two.
// SPDX-License-Identifier: Apache-2.0
#include "ceiling.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#include <benchmark/benchmark.h>

#include <memory>
#include <random>

using namespace taskvec;

namespace {

bench::ceiling& the_ceiling()
{
    static bench::ceiling instance;
    return instance;
}

template <class T>
std::vector<T> random_values(std::size_t n, unsigned seed)
{
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0.0f, 0.02f);
    std::vector<T> x(n);
    for (std::size_t i = 0; i < n; ++i) {
        x[i] = i < (1u << 16) ? narrow<T>(normal(generator))
                              : narrow<T>(widen<float>(x[i - (1u << 16)]) * 1.0001f + 1e-6f);
    }
    return x;
}

template <class T>
struct models {
    std::vector<T> base, out;
    std::vector<std::vector<T>> tasks;
    models(std::size_t n, std::size_t count)
        : base(random_values<T>(n, 0))
        , out(n)
    {
        std::mt19937 generator(1);
        for (std::size_t t = 0; t < count; ++t) {
            tasks.push_back(random_values<T>(n, static_cast<unsigned>(t + 1)));
            for (std::size_t i = 0; i < n; ++i) {
                tasks[t][i] = narrow<T>(widen<float>(base[i]) + 0.1f * widen<float>(tasks[t][i]));
            }
        }
    }
    [[nodiscard]] double bytes() const { return static_cast<double>(base.size() * sizeof(T)); }
};

template <class T>
void combination(benchmark::State& state)
{
    models<T> m(std::size_t{1} << 24, 8);
    const cpu policy{.threads = static_cast<unsigned>(state.range(0))};
    bench::interleave(
        state, "share of the ceiling", [&] { merge(policy, average_options{}, m.tasks, m.out); },
        [&] { return the_ceiling()(8 * m.bytes(), m.bytes(), 8); });
}

template <class T>
void arithmetic(benchmark::State& state)
{
    models<T> m(std::size_t{1} << 24, 8);
    const cpu policy{.threads = static_cast<unsigned>(state.range(0))};
    bench::interleave(
        state, "share of the ceiling", [&] { merge(policy, task_arithmetic_options{}, m.base, m.tasks, m.out); },
        [&] { return the_ceiling()(9 * m.bytes(), m.bytes(), 9); });
}

// The ceiling of the whole is two sweeps over base and tasks and one write.
template <class T>
void ties(benchmark::State& state)
{
    const std::size_t count = static_cast<std::size_t>(state.range(0));
    models<T> m(std::size_t{1} << 24, count);
    const cpu policy{.threads = static_cast<unsigned>(state.range(1))};
    const double read = static_cast<double>(count + 1) * m.bytes();
    bench::interleave(
        state, "share of the ceiling", [&] { merge(policy, ties_options{.density = 0.2}, m.base, m.tasks, m.out); },
        [&] { return the_ceiling()(2 * read, m.bytes(), count + 1); });
}

// The merge sweep alone: everything is kept, so no threshold is searched for.
template <class T>
void ties_merge_sweep(benchmark::State& state)
{
    const std::size_t count = static_cast<std::size_t>(state.range(0));
    models<T> m(std::size_t{1} << 24, count);
    const cpu policy{.threads = static_cast<unsigned>(state.range(1))};
    const double read = static_cast<double>(count + 1) * m.bytes();
    bench::interleave(
        state, "share of the ceiling",
        [&] { merge(policy, ties_options{.density = 1.0, .zero_sign = zero_sign::positive}, m.base, m.tasks, m.out); },
        [&] { return the_ceiling()(read, m.bytes(), count + 1); });
}

} // namespace

BENCHMARK(combination<float>)->Arg(1)->Arg(2)->UseManualTime()->Iterations(7);
BENCHMARK(combination<bf16>)->Arg(1)->Arg(2)->UseManualTime()->Iterations(7);
BENCHMARK(arithmetic<float>)->Arg(1)->UseManualTime()->Iterations(7);
BENCHMARK(arithmetic<bf16>)->Arg(1)->UseManualTime()->Iterations(7);
BENCHMARK(ties<float>)->Args({8, 1})->Args({3, 1})->UseManualTime()->Iterations(7);
BENCHMARK(ties<bf16>)->Args({3, 1})->Args({3, 2})->Args({8, 1})->UseManualTime()->Iterations(7);
BENCHMARK(ties_merge_sweep<float>)->Args({3, 1})->Args({8, 1})->UseManualTime()->Iterations(7);
BENCHMARK(ties_merge_sweep<bf16>)->Args({3, 1})->Args({8, 1})->UseManualTime()->Iterations(7);
