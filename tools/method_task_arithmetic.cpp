// --method task-arithmetic.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"

#include <taskvec/methods/task_arithmetic.hpp>

namespace {

const tool::register_method entry({.name = "task-arithmetic",
    .help = "base + lambda * weighted sum of the task vectors",
    .place = 20,
    .uses = {"lambda"},
    .run = [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
               taskvec::tensor_sink& out) {
        taskvec::task_arithmetic_options options{.weights = inputs.weights()};
        if (settings.lambda) { options.lambda = *settings.lambda; }
        return tool::merge(policy, settings, options, inputs.models(), out);
    }});

} // namespace
