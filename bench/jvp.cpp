// What forward-mode derivatives and linearized LoRA cost, as ratios measured in turn in one process, on random data:
//   layer_*        a linearized LoRA layer (768 → 768, rank 16, 512 rows) over a LoRA layer: forward, and a training
//   step
//                  (forward, input gradient, factor gradients). B0 = 0 as PEFT initialises, B0 ≠ 0, and folded.
//   transformer_*  jvp of a vision transformer over its forward pass: adapters active, and all parameters active; and
//   the
//                  forward pass of per-layer linearized LoRA over that of LoRA.
// SPDX-License-Identifier: Apache-2.0
#include "../examples/vit/vision_transformer.hpp"
#include "ceiling.hpp"

#include <taskvec/jvp/jvp.hpp>

#include <benchmark/benchmark.h>

namespace {

using taskvec::linearized_lora_layer;
using taskvec::lora_layer;
using taskvec::make_lora;
using matrix = taskvec::row_matrix<float>;

matrix random_matrix(Eigen::Index rows, Eigen::Index cols, std::uint64_t seed, float scale = 1)
{
    matrix x(rows, cols);
    const taskvec::random_stream stream(seed, 0);
    for (Eigen::Index i = 0; i < x.size(); ++i) {
        x.data()[i] = scale * static_cast<float>(stream.normal(static_cast<std::uint64_t>(i)));
    }
    return x;
}

/// Times work and yardstick in turn; the counter `name` is work / yardstick, of medians.
template <class Work, class Yardstick>
void cost(benchmark::State& state, const char* name, Work&& work, Yardstick&& yardstick)
{
    std::vector<double> works, yardsticks;
    work();
    yardstick();
    for (auto _ : state) {
        yardsticks.push_back(bench::seconds(yardstick));
        works.push_back(bench::seconds(work));
        state.SetIterationTime(works.back());
    }
    state.counters[name] = bench::median(works) / bench::median(yardsticks);
}

constexpr Eigen::Index width = 768, rank = 16, rows = 512;

struct layers {
    matrix weight = random_matrix(width, width, 1, 0.03f), bias = random_matrix(1, width, 2),
           x = random_matrix(rows, width, 3), dy = random_matrix(rows, width, 4);
    lora_layer<float> plain{
        weight, bias, make_lora(random_matrix(width, rank, 6), random_matrix(rank, width, 5, 0.03f), 2)};
    linearized_lora_layer<float> linearized;
    explicit layers(bool b0_zero)
        : linearized(weight, bias,
              make_lora(b0_zero ? matrix(matrix::Zero(width, rank)) : random_matrix(width, rank, 8),
                  random_matrix(rank, width, 7, 0.03f), 2))
    {
        linearized.delta_a() = random_matrix(rank, width, 9, 0.01f);
        linearized.b() += random_matrix(width, rank, 10, 0.01f);
    }
    template <class Layer>
    void step(const Layer& layer)
    {
        matrix hidden, y = layer.forward(x, hidden);
        benchmark::DoNotOptimize(y.data());
        auto gradient = layer.vjp(x, hidden, dy);
        benchmark::DoNotOptimize(gradient.x.data());
    }
    template <class Layer>
    void forward(const Layer& layer)
    {
        matrix y = layer.forward(x);
        benchmark::DoNotOptimize(y.data());
    }
};

void layer_forward(benchmark::State& state)
{
    layers l(state.range(0) == 0);
    cost(state, "over_lora", [&] { l.forward(l.linearized); }, [&] { l.forward(l.plain); });
}
void layer_training_step(benchmark::State& state)
{
    layers l(state.range(0) == 0);
    cost(state, "over_lora", [&] { l.step(l.linearized); }, [&] { l.step(l.plain); });
}
void layer_folded_forward(benchmark::State& state)
{
    layers l(state.range(0) == 0);
    const lora_layer<float> folded(l.weight, l.bias, l.linearized.fold());
    cost(state, "over_lora", [&] { l.forward(folded); }, [&] { l.forward(l.plain); });
}
BENCHMARK(layer_forward)
    ->ArgName("b0_nonzero")
    ->Arg(0)
    ->Arg(1)
    ->UseManualTime()
    ->Iterations(31)
    ->Unit(benchmark::kMillisecond);
BENCHMARK(layer_training_step)
    ->ArgName("b0_nonzero")
    ->Arg(0)
    ->Arg(1)
    ->UseManualTime()
    ->Iterations(31)
    ->Unit(benchmark::kMillisecond);
BENCHMARK(layer_folded_forward)
    ->ArgName("b0_nonzero")
    ->Arg(0)
    ->Arg(1)
    ->UseManualTime()
    ->Iterations(31)
    ->Unit(benchmark::kMillisecond);

struct transformer {
    vit::network<float> net{
        .shape =
            {.image_side = 16, .patch_side = 2, .width = 256, .hidden = 1024, .heads = 4, .blocks = 4, .classes = 10},
        .scaling = 1};
    vit::adapter_shape adapter{.rank = 16};
    taskvec::parameters<float> base = vit::initial_parameters<float>(net.shape, 1),
                               adapters = vit::initial_adapters<float>(net.shape, adapter, 2), both = base;
    taskvec::parameters<float> all_directions, adapter_directions;
    matrix x = vit::patches(random_matrix(8, 256, 3), net.shape);

    transformer()
    {
        for (const auto& [name, value] : adapters) {
            both.insert(name, random_matrix(value.rows(), value.cols(), 4, 0.05f));
            adapter_directions.insert(name, random_matrix(value.rows(), value.cols(), 5, 0.01f));
        }
        for (const auto& [name, value] : base) {
            all_directions.insert(name, random_matrix(value.rows(), value.cols(), 6, 0.01f));
        }
    }
    void forward(const taskvec::parameters<float>& p) const
    {
        matrix y = vit::logits(net, p, x);
        benchmark::DoNotOptimize(y.data());
    }
    void derivative(const taskvec::parameters<float>& p, const taskvec::parameters<float>& v) const
    {
        auto result = jvp([&](const auto& q) { return vit::logits(net, q, x); }, p, v);
        benchmark::DoNotOptimize(result.tangent.data());
    }
};

void transformer_jvp_adapters(benchmark::State& state)
{
    transformer t;
    cost(state, "forwards", [&] { t.derivative(t.both, t.adapter_directions); }, [&] { t.forward(t.both); });
}
void transformer_jvp_all_parameters(benchmark::State& state)
{
    transformer t;
    cost(state, "forwards", [&] { t.derivative(t.base, t.all_directions); }, [&] { t.forward(t.base); });
}
void transformer_linearized_layers(benchmark::State& state)
{
    transformer t;
    vit::network<float> linearized = t.net;
    for (Eigen::Index b = 0; b < t.net.shape.blocks; ++b) {
        for (const char* projection : vit::adapted) {
            const std::string name = vit::block_name(b) + projection;
            linearized.linearized.insert(name,
                linearized_lora_layer<float>(t.base[name + ".weight"], t.base[name + ".bias"],
                    make_lora(t.adapters[name + ".lora_B"], t.adapters[name + ".lora_A"])));
        }
    }
    cost(
        state, "over_lora",
        [&] {
            matrix y = vit::logits(linearized, t.base, t.x);
            benchmark::DoNotOptimize(y.data());
        },
        [&] { t.forward(t.both); });
}
BENCHMARK(transformer_jvp_adapters)->UseManualTime()->Iterations(15)->Unit(benchmark::kMillisecond);
BENCHMARK(transformer_jvp_all_parameters)->UseManualTime()->Iterations(15)->Unit(benchmark::kMillisecond);
BENCHMARK(transformer_linearized_layers)->UseManualTime()->Iterations(15)->Unit(benchmark::kMillisecond);

} // namespace
