// What a forward pass and a training step cost in four ways of fine-tuning: the second paper's Table 4 on this model.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model_file.hpp"

#include <cstddef>
#include <string>
#include <vector>

namespace minilm {

struct cost {
    std::string way;
    double trained = 0; ///< parameters that are trained, in millions
    double forward = 0, step = 0; ///< processor time of one batch in milliseconds, the median of the repetitions
    double forward_memory = 0,
           step_memory =
               0; ///< the most that was resident beside what was there before, in MB; 0 where the system does not say
};

struct cost_options {
    Eigen::Index texts = 32, length = 16, rank = 16;
    std::size_t repetitions = 5;
};

/// Full fine-tuning, full linearization, LoRA and L-LoRA (linearized per layer) on query and value: the forward pass of
/// a batch of random ids, and a step of plain gradient descent, which updates every parameter that is trained. One
/// thread computes.
std::vector<cost> measure_cost(const loaded& model, const cost_options& options = {});

} // namespace minilm
