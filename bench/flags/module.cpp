// One set of flags: see work.hpp.
// SPDX-License-Identifier: Apache-2.0
#include "work.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/select/top_k.hpp>

#include <cstddef>
#include <random>
#include <vector>

using namespace taskvec;

namespace {

template <class T>
struct models {
    std::vector<T> base, out;
    std::vector<std::vector<T>> tasks;

    void make()
    {
        constexpr std::size_t n = std::size_t{1} << 23;
        std::mt19937 generator(1);
        std::normal_distribution<float> normal(0.0f, 0.02f);
        std::vector<float> draws(1u << 20);
        for (auto& draw : draws) { draw = normal(generator); }
        base.resize(n);
        out.resize(n);
        tasks.assign(3, std::vector<T>(n));
        for (std::size_t i = 0; i < n; ++i) {
            const float origin = draws[i % draws.size()];
            base[i] = narrow<T>(origin);
            for (std::size_t t = 0; t < 3; ++t) {
                tasks[t][i] = narrow<T>(origin + 0.1f * draws[(i * (2 * t + 3) + t) % draws.size()]);
            }
        }
    }
};
models<bf16> halves;
models<float> singles;

void setup()
{
    halves.make();
    singles.make();
}
template <class T>
void ties(models<T>& m)
{
    merge(cpu{.threads = 1}, ties_options{.density = 0.2}, m.base, m.tasks, m.out);
}
template <class T>
void average(models<T>& m)
{
    merge(cpu{.threads = 1}, average_options{}, m.tasks, m.out);
}
void run(int kind)
{
    switch (kind) {
    case 0: return ties(halves);
    case 1: return ties(singles);
    case 2: return average(halves);
    case 3: return average(singles);
    default: (void)top_k(cpu{.threads = 1}, singles.base, singles.base.size() / 5);
    }
}

} // namespace

extern "C" __attribute__((visibility("default"))) flag_work work()
{
    return {&setup, &run};
}
