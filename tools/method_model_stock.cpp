// --method model-stock.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"

#include <taskvec/methods/model_stock.hpp>

namespace {

const tool::register_method entry({.name = "model-stock",
    .help = "base + what the angles between the task vectors say of their mean, tensor by tensor",
    .place = 90,
    .uses = {"unclamped"},
    .check =
        [](const tool::merge_settings& settings) {
            if (settings.tasks.size() < 2) {
                throw tool::usage_error(
                    "--method model-stock compares fine-tuned models with each other: give two or more tasks");
            }
            tool::check_no_weights(settings, "--method model-stock", "it takes the plain mean; leave the weight out");
        },
    .run =
        [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
            taskvec::tensor_sink& out) {
            return tool::merge(
                policy, settings, taskvec::model_stock_options{.clamp = !settings.unclamped}, inputs.models(), out);
        }});

} // namespace
