// What the parameters of a configuration set: options, and tasks with their weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "config_models.hpp"

namespace tool::configuration {

/// Reads the `parameters` of all levels into options, and makes the models tasks. The models are known, and whose
/// semantics to follow.
void read_parameters(reading& it);

} // namespace tool::configuration
