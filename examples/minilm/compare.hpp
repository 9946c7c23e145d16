// What transformers and torch.func computed for a model of this kind, and how far this example is from it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model_file.hpp"

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace minilm {

/// Largest differences; derivatives' are shares of the largest entry.
struct differences {
    double embedding = 0; ///< of normalized embeddings, against transformers
    double jvp = 0; ///< of the derivative of embed() along a direction of all parameters, against torch.func.jvp
    double gradient = 0; ///< of the gradient by all parameters, against torch.func.vjp
    double lora = 0; ///< of embeddings with LoRA on query and value
    double lora_gradient = 0; ///< of the gradient by the adapters
    double linearized_network = 0; ///< of L-LoRA's whole-network reading, a jvp along the adapters
    double linearized_layers = 0; ///< of L-LoRA's per-layer reading

    [[nodiscard]] std::vector<std::pair<std::string, double>> named() const;
};

/// Computes what scripts/make-minilm-goldens wrote to `golden`, for the model that it was made from.
differences compare(const loaded& model, const std::filesystem::path& golden);

} // namespace minilm
