// SPDX-License-Identifier: Apache-2.0
#include "adapter.hpp"

#include <taskvec/core/random.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/linear.hpp>
#include <taskvec/jvp/linearized_lora.hpp>
#include <taskvec/jvp/lora_layer.hpp>
#include <taskvec/jvp/loss.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace digits {
namespace {

template <class Adapter, class Ref>
taskvec::basic_model<Ref> named(Adapter& phi)
{
    return {
        {"fc1.lora_A", Ref{phi.a1().data(), taskvec::dtype::f32, {rank, pixels}}},
        {"fc1.lora_B", Ref{phi.b1().data(), taskvec::dtype::f32, {hidden, rank}}},
        {"fc2.lora_A", Ref{phi.a2().data(), taskvec::dtype::f32, {rank, hidden}}},
        {"fc2.lora_B", Ref{phi.b2().data(), taskvec::dtype::f32, {features, rank}}},
    };
}

void clip(std::span<float> gradient, float limit)
{
    Eigen::Map<Eigen::VectorXf> g(gradient.data(), static_cast<Eigen::Index>(gradient.size()));
    g *= std::min(1.0f, limit / std::max(g.norm(), 1e-12f));
}

taskvec::lora_update<float> first(const adapter& phi)
{
    return taskvec::make_lora(phi.b1(), phi.a1());
}
taskvec::lora_update<float> second(const adapter& phi)
{
    return taskvec::make_lora(phi.b2(), phi.a2());
}

using lora = taskvec::lora_layer<float>;
using linearized_lora = taskvec::linearized_lora_layer<float>;

/// The adapted network: both layers frozen but for their adapters, then ReLU, then the frozen head.
template <class Layer>
class adapted_network {
public:
    adapted_network(const network& base, const adapter& initial)
        : first_(base.body.weight1(), base.body.bias1(), first(initial))
        , second_(base.body.weight2(), base.body.bias2(), second(initial))
        , head_(base.head)
    { }

    void set(const adapter& phi)
    {
        first_.set(first(phi));
        second_.set(second(phi));
    }

    /// The mean cross-entropy's gradient by φ.
    void gradient(const dataset& batch, adapter& by_phi) const
    {
        matrix low1, low2;
        const matrix pre1 = first_.forward(batch.inputs, low1), out1 = taskvec::relu(pre1);
        const matrix pre2 = second_.forward(out1, low2), out2 = taskvec::relu(pre2);
        const matrix logits = taskvec::linear(out2, head_);

        const matrix by_logits = taskvec::cross_entropy_vjp(logits, batch.labels);
        const auto head = taskvec::linear_vjp(out2, head_, by_logits, {.w = false, .bias = false});
        const auto deep = second_.vjp(out1, low2, taskvec::relu_vjp(pre2, head.x));
        const auto shallow = first_.vjp(batch.inputs, low1, taskvec::relu_vjp(pre1, deep.x), {.x = false});
        by_phi.a1() = shallow.a;
        by_phi.b1() = shallow.b;
        by_phi.a2() = deep.a;
        by_phi.b2() = deep.b;
    }

    /// The plain network that computes the same.
    [[nodiscard]] encoder folded(encoder base) const
    {
        base.weight1() = first_.dense();
        base.weight2() = second_.dense();
        return base;
    }

private:
    Layer first_, second_;
    const matrix& head_;
};

template <class Layer>
adapter fine_tune_layers(const network& base, const adapter& initial, const dataset& train, std::uint64_t seed,
    std::string_view task, const training_options& options)
{
    adapted_network<Layer> model(base, initial);
    adapter phi = initial, gradient;
    momentum_sgd optimiser(adapter::size());
    const std::string stream = taskvec::message("adapter for ", task);
    for (int step = 0; step < options.steps; ++step) {
        model.set(phi);
        model.gradient(random_batch(train, options.batch, seed, step, stream), gradient);
        clip(gradient.values(), 0.3f);
        optimiser.step(phi.values(), gradient.values(), cosine_decay(options.rate, step, options.steps));
    }
    return phi;
}

template <class Layer>
encoder fold(const network& base, const adapter& initial, const adapter& phi)
{
    adapted_network<Layer> model(base, initial);
    model.set(phi);
    return model.folded(base.body);
}

} // namespace

taskvec::model_ref adapter::model()
{
    return named<adapter, taskvec::tensor_ref>(*this);
}

taskvec::const_model_ref adapter::model() const
{
    return named<const adapter, taskvec::const_tensor_ref>(*this);
}

adapter initial_adapter(std::uint64_t seed)
{
    adapter phi;
    const auto fill = [&](adapter::map a, std::string_view name) {
        const taskvec::random_stream random(seed, 0, name);
        const double deviation = 0.3 / std::sqrt(static_cast<double>(a.cols()));
        for (Eigen::Index i = 0; i < a.size(); ++i) {
            a.data()[i] = static_cast<float>(deviation * random.normal(static_cast<std::uint64_t>(i)));
        }
    };
    fill(phi.a1(), "fc1.lora_A");
    fill(phi.a2(), "fc2.lora_A");
    return phi;
}

encoder adapted(const network& base, const adapter& initial, const adapter& phi, parameterisation kind)
{
    return kind == parameterisation::lora ? fold<lora>(base, initial, phi) : fold<linearized_lora>(base, initial, phi);
}

adapter fine_tune_adapter(const network& base, const adapter& initial, const dataset& train, std::uint64_t seed,
    std::string_view task, parameterisation kind, const training_options& options)
{
    return kind == parameterisation::lora
        ? fine_tune_layers<lora>(base, initial, train, seed, task, options)
        : fine_tune_layers<linearized_lora>(base, initial, train, seed, task, options);
}

} // namespace digits
