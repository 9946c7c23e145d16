// --method fisher.
// SPDX-License-Identifier: Apache-2.0
#include "statistics_inputs.hpp"

#include <taskvec/methods/fisher.hpp>

namespace {

taskvec::fisher_options options_of(
    const tool::merge_settings& settings, const tool::merge_inputs& inputs, const tool::statistics_inputs& fishers)
{
    taskvec::fisher_options options{.fishers = fishers.models(),
        .weights = inputs.weights(),
        .normalize = settings.normalize,
        .labels = fishers.labels()};
    if (settings.floor) { options.floor = *settings.floor; }
    return options;
}

const tool::register_method entry({.name = "fisher",
    .help = "mean weighted by each task's diagonal Fisher (--fisher FILE per task); needs no --base",
    .place = 60,
    .needs_base = false,
    .uses = {"fisher", "normalize", "floor"},
    .check =
        [](const tool::merge_settings& settings) {
            tool::check_statistics_count(settings, settings.fisher, "--fisher");
            tool::check_finite(settings.floor.value_or(0), "--floor");
        },
    .examine =
        [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs) {
            const tool::statistics_inputs fishers(policy, inputs, settings.fisher, true);
            (void)taskvec::detail::merger<taskvec::fisher_options>(
                policy, inputs.models(), options_of(settings, inputs, fishers));
        },
    .run =
        [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
            taskvec::tensor_sink& out) {
            const tool::statistics_inputs fishers(policy, inputs, settings.fisher, true);
            auto report = tool::merge(policy, settings, options_of(settings, inputs, fishers), inputs.models(), out);
            report.beside += fishers.checked_bytes();
            return report;
        }});

} // namespace
