// SPDX-License-Identifier: Apache-2.0
#include "way.hpp"

#include "train.hpp"

#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/jvp.hpp>
#include <taskvec/jvp/linear.hpp>

#include <algorithm>
#include <memory>
#include <utility>

namespace digits {
namespace {

template <class Model>
way with_points(
    std::string name, std::string file, std::size_t stored, const Model& start, const std::vector<Model>& tuned)
{
    way result{.name = std::move(name), .file = std::move(file), .stored = stored};
    result.start.assign(start.values().begin(), start.values().end());
    for (const Model& model : tuned) {
        result.tuned.emplace_back(model.values().begin(), model.values().end());
        auto& vector = result.vectors.emplace_back(Model::size());
        taskvec::difference(one_thread, model.values(), start.values(), vector);
    }
    return result;
}

template <class Model>
Model from(std::span<const float> point)
{
    Model model;
    std::ranges::copy(point, model.values().begin());
    return model;
}

/// Predictions by the encoders that points make.
void predict_by_folding(way& w, const matrix& head)
{
    w.at = [folded = w.folded, &head](std::span<const float> point) -> predictor {
        return [model = folded(point), &head](const matrix& inputs) { return forward(model, head, inputs).logits; };
    };
}

taskvec::parameters<float> named(const encoder& model)
{
    using taskvec::row_matrix;
    return {{"fc1.bias", row_matrix<float>(model.bias1())}, {"fc1.weight", row_matrix<float>(model.weight1())},
        {"fc2.bias", row_matrix<float>(model.bias2())}, {"fc2.weight", row_matrix<float>(model.weight2())}};
}

/// The network on the library's operations, for values and for tangents.
struct network_function {
    const matrix* head;

    auto operator()(const auto& p, const matrix& inputs) const
    {
        using namespace taskvec;
        const auto hidden = relu(linear(inputs, p["fc1.weight"], p["fc1.bias"]));
        return linear(relu(linear(hidden, p["fc2.weight"], p["fc2.bias"])), *head);
    }
};

/// f(x; θ0) + ∇f(x; θ0)·(θ − θ0)
matrix linearized_logits(
    const network_function& f, const taskvec::parameters<float>& start, const encoder& difference, const matrix& inputs)
{
    auto [value, derivative] = taskvec::jvp(f, start, named(difference), inputs);
    return value + derivative;
}

} // namespace

std::vector<taskvec::host_view<const float>> way::vector_views() const
{
    std::vector<taskvec::host_view<const float>> views;
    for (const auto& vector : vectors) { views.push_back(taskvec::as_view(vector)); }
    return views;
}

way full_way(const setting& s, const std::vector<encoder>& models)
{
    way w = with_points("full fine-tuning", "full", tasks * encoder::size(), s.base.body, models);
    w.folded = from<encoder>;
    predict_by_folding(w, s.base.head);
    return w;
}

way adapter_way(const setting& s, const adapter& initial, const std::vector<adapter>& adapters, parameterisation kind)
{
    const bool plain = kind == parameterisation::lora;
    way w = with_points(plain ? "LoRA" : "L-LoRA, per layer", plain ? "lora" : "llora",
        encoder::size() + tasks * adapter::size(), initial, adapters);
    w.folded = [&s, initial, kind](
                   std::span<const float> point) { return adapted(s.base, initial, from<adapter>(point), kind); };
    predict_by_folding(w, s.base.head);
    return w;
}

way linearized_way(const setting& s, const std::vector<encoder>& models)
{
    way w = with_points("full linearization", "linearized", tasks * encoder::size(), s.base.body, models);
    const auto start = std::make_shared<const taskvec::parameters<float>>(named(s.base.body));
    w.at = [start, &s](std::span<const float> point) -> predictor {
        encoder difference;
        taskvec::difference(one_thread, point, s.base.body.values(), difference.values());
        return [start, difference, &s](
                   const matrix& inputs) { return linearized_logits({&s.base.head}, *start, difference, inputs); };
    };
    return w;
}

std::vector<encoder> fine_tune_linearized(const setting& s)
{
    constexpr training_options options{.steps = 150, .rate = 0.03};
    const auto start = named(s.base.body);
    std::vector<encoder> models;
    for (std::size_t task = 0; task < tasks; ++task) {
        encoder difference, theta = s.base.body;
        network gradient;
        momentum_sgd optimiser(encoder::size());
        const std::string stream = taskvec::message("fine-tuning on ", task_names[task]);
        for (int step = 0; step < options.steps; ++step) {
            const dataset batch = random_batch(s.train[task], options.batch, s.seed, step, stream);
            const matrix logits = linearized_logits({&s.base.head}, start, difference, batch.inputs);
            // The transposed Jacobian is that of θ0, whatever θ is.
            backward(s.base, batch.inputs, forward(s.base.body, s.base.head, batch.inputs),
                cross_entropy_gradient(logits, batch.labels), gradient, false);
            optimiser.step(
                difference.values(), gradient.body.values(), cosine_decay(options.rate, step, options.steps));
        }
        taskvec::apply(one_thread, s.base.body.values(), difference.values(), 1.0, theta.values());
        models.push_back(std::move(theta));
    }
    return models;
}

} // namespace digits
