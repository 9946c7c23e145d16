// --method dare-ties.
// SPDX-License-Identifier: Apache-2.0
#include "ties_settings.hpp"

#include <taskvec/methods/dare.hpp>

namespace {

const tool::register_method entry({.name = "dare-ties",
    .help = "keep entries with probability --density (0.5), rescale, then as ties without its trim",
    .place = 50,
    .uses = {"density", "lambda", "scope", "semantics", "merge-weights", "seed"},
    .run = [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
               taskvec::tensor_sink& out) {
        taskvec::dare_ties_options options{
            .seed = settings.seed, .ties = tool::ties_options_of(settings, inputs.weights())};
        if (settings.density) { options.density = *settings.density; }
        return tool::merge(policy, settings, options, inputs.models(), out);
    }});

} // namespace
