// What the transformers of vit/ and minilm/ share: projections with adapters, values off a forward pass of tangents,
// and the vjps of layers by the names of their parameters.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/random.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/linear.hpp>
#include <taskvec/jvp/linearized_lora.hpp>
#include <taskvec/jvp/lora_layer.hpp>
#include <taskvec/jvp/normalization.hpp>
#include <taskvec/jvp/parameters.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <utility>

namespace transformer {

using taskvec::parameters;
using taskvec::row_matrix;

/// A0 ~ N(0, 1/in), B0 = 0, as PEFT initialises: PROJECTION.lora_A and PROJECTION.lora_B of a square projection.
template <class T>
void insert_adapter(parameters<T>& p, const std::string& projection, Eigen::Index width, Eigen::Index rank,
    taskvec::random_stream draws)
{
    auto& a = p.insert(projection + ".lora_A", row_matrix<T>(rank, width));
    for (Eigen::Index i = 0; i < a.size(); ++i) {
        a.data()[i] =
            static_cast<T>(draws.normal(static_cast<std::uint64_t>(i)) / std::sqrt(static_cast<double>(width)));
    }
    p.insert(projection + ".lora_B", row_matrix<T>::Zero(width, rank));
}

template <class T>
row_matrix<T> values(row_matrix<T>&& x)
{
    return std::move(x);
}
template <class T>
row_matrix<T> values(taskvec::primal_tangent<T>&& x)
{
    return std::move(x).take_primal();
}

/// A linear layer with its adapter, where it has one: linearized in the network, or a LoRA among the parameters.
template <class Network, class P, class X>
auto project(const Network& net, const P& p, const std::string& name, const X& x)
    -> decltype(taskvec::linear(x, p[name], p[name]))
{
    using T = taskvec::operand_scalar<X>;
    if (const auto* layer = net.linearized.find(name)) {
        if constexpr (std::same_as<X, row_matrix<T>>) { return layer->forward(x); }
        else {
            // Linear in φ already: a network of these layers is differentiated in its input only.
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                "per-layer linearized adapters do not mix with a linearized network");
        }
    }
    if (p.contains(name + ".lora_A")) {
        return taskvec::lora_linear(x, p[name + ".weight"], p[name + ".bias"], p[name + ".lora_A"], p[name + ".lora_B"],
            static_cast<T>(net.scaling));
    }
    return taskvec::linear(x, p[name + ".weight"], p[name + ".bias"]);
}

/// The vjps of layers: each call returns the gradient of the layer's input, and stores those of its parameters, of the
/// dense ones where `dense`.
template <class T, class Network>
class backward_pass {
public:
    backward_pass(const Network& net, const parameters<T>& p, bool dense, taskvec::normalization_options norms = {})
        : net_(net)
        , p_(p)
        , dense_(dense)
        , norms_(norms)
    { }

    [[nodiscard]] row_matrix<T> linear(
        const std::string& name, const row_matrix<T>& input, const row_matrix<T>& dy, bool input_wanted = true)
    {
        if (input.size() == 0) { return taskvec::matmul(dy, p_[name + ".weight"]); } // not kept, as nothing needs it
        auto g = taskvec::linear_vjp(input, p_[name + ".weight"], dy, {.x = input_wanted, .w = dense_, .bias = dense_});
        if (dense_) {
            gradients.insert(name + ".weight", std::move(g.w));
            gradients.insert(name + ".bias", std::move(g.bias));
        }
        return std::move(g.x);
    }
    [[nodiscard]] row_matrix<T> norm(const std::string& name, const row_matrix<T>& input, const row_matrix<T>& dy)
    {
        auto g = taskvec::layer_norm_vjp(input, p_[name + ".weight"], dy, norms_);
        if (dense_) {
            gradients.insert(name + ".weight", std::move(g.gamma));
            gradients.insert(name + ".bias", std::move(g.beta));
        }
        return std::move(g.x);
    }
    /// Of project().
    [[nodiscard]] row_matrix<T> projection(
        const std::string& name, const row_matrix<T>& input, const row_matrix<T>& dy, bool input_wanted)
    {
        using namespace taskvec;
        const auto low_rank = [&](const auto& layer, const row_matrix<T>& hidden) {
            auto g = layer.vjp(input, hidden, dy, {.x = input_wanted});
            gradients.insert(name + ".lora_A", std::move(g.a));
            gradients.insert(name + ".lora_B", std::move(g.b));
            return std::move(g.x);
        };
        // scaling·x·aᵀ is cheap to compute again.
        if (const auto* layer = net_.linearized.find(name)) {
            const auto& folded = layer->fold();
            return low_rank(
                *layer, scale(taskvec::linear(input, as_row_matrix(folded.a)), static_cast<T>(folded.scaling)));
        }
        if (!p_.contains(name + ".lora_A")) { return linear(name, input, dy, input_wanted); }
        if (dense_) { (void)linear(name, input, dy, false); }
        const lora_layer<T> layer(p_[name + ".weight"], p_[name + ".bias"],
            make_lora(p_[name + ".lora_B"], p_[name + ".lora_A"], net_.scaling));
        return low_rank(layer, scale(taskvec::linear(input, layer.a()), static_cast<T>(layer.adapter().scaling)));
    }

    parameters<T> gradients{};

private:
    const Network& net_;
    const parameters<T>& p_;
    bool dense_;
    taskvec::normalization_options norms_;
};

} // namespace transformer
