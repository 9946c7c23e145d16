// --method average.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"

#include <taskvec/methods/average.hpp>

namespace {

const tool::register_method entry({.name = "average",
    .help = "weighted mean of the models; needs no --base",
    .place = 10,
    .needs_base = false,
    .run = [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
               taskvec::tensor_sink& out) {
        return tool::merge(
            policy, settings, taskvec::average_options{.weights = inputs.weights()}, inputs.models(), out);
    }});

} // namespace
