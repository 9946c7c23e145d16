// SPDX-License-Identifier: Apache-2.0
#include "train.hpp"

#include <taskvec/core/random.hpp>

#include <utility>

namespace digits {
namespace {

Eigen::Map<Eigen::ArrayXf> array(std::span<float> values)
{
    return {values.data(), static_cast<Eigen::Index>(values.size())};
}
Eigen::Map<const Eigen::ArrayXf> array(std::span<const float> values)
{
    return {values.data(), static_cast<Eigen::Index>(values.size())};
}
std::span<float> flat(matrix& m)
{
    return {m.data(), static_cast<std::size_t>(m.size())};
}

} // namespace

void momentum_sgd::step(std::span<float> parameters, std::span<const float> gradient, double rate)
{
    velocity_ = momentum_ * velocity_ + array(gradient);
    array(parameters) -= static_cast<float>(rate) * velocity_;
}

void adam::step(std::span<float> parameters, std::span<const float> gradient, double rate)
{
    ++steps_;
    const auto g = array(gradient);
    mean_ = 0.9f * mean_ + 0.1f * g;
    square_ = 0.999f * square_ + 0.001f * g.square();
    const double mean_bias = 1.0 - std::pow(0.9, steps_), square_bias = 1.0 - std::pow(0.999, steps_);
    array(parameters) -=
        static_cast<float>(rate / mean_bias) * mean_ / ((square_ / static_cast<float>(square_bias)).sqrt() + 1e-8f);
}

dataset random_batch(const dataset& data, std::size_t size, std::uint64_t seed, int step, std::string_view name)
{
    const taskvec::random_stream random(seed, static_cast<std::uint32_t>(step), name);
    std::vector<std::size_t> chosen;
    for (std::size_t i = 0; i < size; ++i) { chosen.push_back((std::uint64_t{random.word(i)} * data.size()) >> 32); }
    return subset(data, chosen);
}

network pre_train(const dataset& train, std::uint64_t seed, const training_options& options)
{
    constexpr std::size_t images = 100;
    const dataset few{train.inputs.topRows(images), {train.labels.begin(), train.labels.begin() + images}};
    dataset pool{matrix(images * tasks, pixels), {}};
    for (std::size_t task = 0; task < tasks; ++task) {
        pool.inputs.middleRows(static_cast<Eigen::Index>(task * images), images) = in_domain(few, task).inputs;
        pool.labels.insert(pool.labels.end(), few.labels.begin(), few.labels.end());
    }

    network model = random_network(seed), gradient;
    adam body(encoder::size()), head(static_cast<std::size_t>(model.head.size()));
    for (int step = 0; step < options.steps; ++step) {
        const double rate = cosine_decay(options.rate, step, options.steps);
        backward(model, random_batch(pool, options.batch, seed, step, "pre-training"), gradient, true);
        body.step(model.body.values(), gradient.body.values(), rate);
        head.step(flat(model.head), flat(gradient.head), rate);
    }
    return model;
}

encoder fine_tune(const network& base, const dataset& train, std::uint64_t seed, std::string_view task,
    const training_options& options)
{
    network model = base, gradient;
    momentum_sgd optimiser(encoder::size());
    const std::string stream = taskvec::message("fine-tuning on ", task);
    for (int step = 0; step < options.steps; ++step) {
        backward(model, random_batch(train, options.batch, seed, step, stream), gradient, false);
        optimiser.step(model.body.values(), gradient.body.values(), cosine_decay(options.rate, step, options.steps));
    }
    return std::move(model.body);
}

} // namespace digits
