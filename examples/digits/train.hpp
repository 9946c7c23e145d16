// Training for the digits example: optimisers over flat parameters, the weak pre-training, and full fine-tuning.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "network.hpp"

#include <Eigen/Core>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <span>
#include <string_view>
#include <vector>

namespace digits {

/// SGD with momentum: v ← momentum·v + g; x ← x − rate·v.
class momentum_sgd {
public:
    explicit momentum_sgd(std::size_t size, float momentum = 0.9f)
        : velocity_(Eigen::ArrayXf::Zero(static_cast<Eigen::Index>(size)))
        , momentum_(momentum)
    { }
    void step(std::span<float> parameters, std::span<const float> gradient, double rate);

private:
    Eigen::ArrayXf velocity_;
    float momentum_;
};

/// Adam (Kingma and Ba, 2015) with β1 = 0.9, β2 = 0.999, ε = 1e-8.
class adam {
public:
    explicit adam(std::size_t size)
        : mean_(Eigen::ArrayXf::Zero(static_cast<Eigen::Index>(size)))
        , square_(mean_)
    { }
    void step(std::span<float> parameters, std::span<const float> gradient, double rate);

private:
    Eigen::ArrayXf mean_, square_;
    int steps_ = 0;
};

/// From `rate` down to 0 along half a cosine.
[[nodiscard]] inline double cosine_decay(double rate, int step, int steps)
{
    return 0.5 * rate * (1.0 + std::cos(std::numbers::pi * step / steps));
}

/// The batch of one step: `size` independent draws from `data`, the same whenever (seed, step, name) are the same.
dataset random_batch(const dataset& data, std::size_t size, std::uint64_t seed, int step, std::string_view name);

struct training_options {
    int steps;
    double rate;
    std::size_t batch = 64;
};

/// The base model: Adam, encoder and head, on 100 training images seen in all eight domains. Deliberately weak: a base
/// that has learnt the tasks leaves nothing to merge.
network pre_train(
    const dataset& train, std::uint64_t seed, const training_options& options = {.steps = 60, .rate = 1e-3});

/// The encoder of `base` fine-tuned on one task by SGD with momentum (Adam would give dense task vectors, which do not
/// prune), the head frozen. `train` is in the task's domain.
encoder fine_tune(const network& base, const dataset& train, std::uint64_t seed, std::string_view task,
    const training_options& options = {.steps = 150, .rate = 0.03});

} // namespace digits
