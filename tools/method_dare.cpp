// --method dare.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"

#include <taskvec/methods/dare.hpp>

namespace {

const tool::register_method entry({.name = "dare",
    .help = "keep entries with probability --density (0.5), rescale, then as task arithmetic",
    .place = 40,
    .uses = {"density", "lambda", "seed"},
    .run = [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
               taskvec::tensor_sink& out) {
        taskvec::dare_options options{.seed = settings.seed, .weights = inputs.weights()};
        if (settings.density) { options.density = *settings.density; }
        if (settings.lambda) { options.lambda = *settings.lambda; }
        return tool::merge(policy, settings, options, inputs.models(), out);
    }});

} // namespace
