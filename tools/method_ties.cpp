// --method ties.
// SPDX-License-Identifier: Apache-2.0
#include "ties_settings.hpp"

namespace {

const tool::register_method entry({.name = "ties",
    .help = "trim to the top --density (0.2), elect signs, merge what agrees",
    .place = 30,
    .uses = {"density", "lambda", "scope", "semantics", "merge-weights"},
    .run = [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
               taskvec::tensor_sink& out) {
        return tool::merge(policy, settings, tool::ties_options_of(settings, inputs.weights()), inputs.models(), out);
    }});

} // namespace
