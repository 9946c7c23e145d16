// --method slerp.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"

#include <taskvec/methods/slerp.hpp>

namespace {

const tool::register_method entry({.name = "slerp",
    .help = "along the arc between two models, by --t (0.5): two tasks, or --base and one task",
    .place = 80,
    .needs_base = false,
    .uses = {"t"},
    .check =
        [](const tool::merge_settings& settings) {
            if (settings.tasks.size() > 2 || (settings.tasks.size() == 1 && settings.base.empty())) {
                throw tool::usage_error(
                    "--method slerp goes between two models: give two tasks, or --base and one task");
            }
            tool::check_no_weights(settings, "--method slerp", "--t says how far to go");
            tool::check_finite(settings.t.value_or(0), "--t");
        },
    .run =
        [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
            taskvec::tensor_sink& out) {
            return tool::merge(
                policy, settings, taskvec::slerp_options{.t = settings.t.value_or(0.5)}, inputs.models(), out);
        }});

} // namespace
