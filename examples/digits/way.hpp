// The four ways of fine-tuning that the second paper compares, as merges see them: points of a space of parameters, and
// the network that each point makes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adapter.hpp"
#include "setting.hpp"

#include <taskvec/core/view.hpp>

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace digits {

/// Logits for inputs.
using predictor = std::function<matrix(const matrix& inputs)>;

/// All tasks, fine-tuned in one way from one start. Points are flat: encoders, adapters φ.
struct way {
    std::string name; ///< "L-LoRA, per layer"
    std::string file; ///< the same in file names: "llora"
    std::size_t stored = 0; ///< numbers that Single-Task stores: the base, and what each task adds
    std::vector<float> start{};
    std::vector<std::vector<float>> tuned{}, vectors{}; ///< θt, and θt − θ0
    /// The encoder that a point makes; empty where a point makes no plain network.
    std::function<encoder(std::span<const float> point)> folded{};
    std::function<predictor(std::span<const float> point)> at{};

    [[nodiscard]] std::vector<taskvec::host_view<const float>> vector_views() const;
};

/// Fully fine-tuned encoders.
[[nodiscard]] way full_way(const setting& s, const std::vector<encoder>& models);
/// Adapters around φ0, plain or linearized per layer.
[[nodiscard]] way adapter_way(
    const setting& s, const adapter& initial, const std::vector<adapter>& adapters, parameterisation kind);
/// Encoders θt of the network linearized around θ0: f(x; θ0) + ∇f(x; θ0)·(θ − θ0).
[[nodiscard]] way linearized_way(const setting& s, const std::vector<encoder>& models);

/// One θt for each task, fine-tuned in the network linearized in all its parameters: SGD as in full fine-tuning.
[[nodiscard]] std::vector<encoder> fine_tune_linearized(const setting& s);

} // namespace digits
