// --method regmean.
// SPDX-License-Identifier: Apache-2.0
#include "statistics_inputs.hpp"

#include <taskvec/methods/regmean.hpp>

#include <algorithm>

namespace {

/// How weights are stored: as the Gram files say, and --conv1d.
std::function<taskvec::weight_layout(std::string_view)> layout_of(
    const tool::merge_settings& settings, const tool::statistics_inputs& grams)
{
    const auto& first = grams.files().front();
    for (const auto& file : grams.files()) {
        for (const auto& [name, gram] : file.model()) {
            if (first.model().find(name) && file.layout(name) != first.layout(name)) {
                taskvec::raise<taskvec::invalid_argument>(
                    taskvec::message("'", first.path().string(), "' and '", file.path().string(),
                        "' disagree about how the weight '", name, "' is stored: collect one of them again"));
            }
        }
    }
    const auto named = tool::name_matcher(settings.conv1d, "--conv1d");
    const auto& weights = first.model();
    if (!settings.conv1d.empty()
        && std::none_of(weights.begin(), weights.end(), [&](const auto& weight) { return named(weight.name); })) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::message("no tensor of '", first.path().string(),
            "' matches --conv1d '", settings.conv1d.front(), "': see 'taskvec inspect' for the names"));
    }
    return [named, &first](
               std::string_view name) { return named(name) ? taskvec::weight_layout::in_out : first.layout(name); };
}

taskvec::regmean_options options_of(
    const tool::merge_settings& settings, const tool::merge_inputs& inputs, const tool::statistics_inputs& grams)
{
    taskvec::regmean_options options{.grams = grams.models(),
        .weights = inputs.weights(),
        .layout = layout_of(settings, grams),
        .labels = grams.labels()};
    if (settings.alpha) { options.alpha = *settings.alpha; }
    if (settings.ridge) { options.ridge = *settings.ridge; }
    return options;
}

const tool::register_method entry({.name = "regmean",
    .help = "weights of linear layers that fit all tasks' outputs best (--gram FILE per task), the\n                   "
            "rest averaged; needs no --base",
    .place = 70,
    .needs_base = false,
    .uses = {"gram", "alpha", "ridge", "conv1d"},
    .check =
        [](const tool::merge_settings& settings) {
            tool::check_statistics_count(settings, settings.gram, "--gram");
            (void)tool::name_matcher(settings.conv1d, "--conv1d");
        },
    .examine =
        [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs) {
            const tool::statistics_inputs grams(policy, inputs, settings.gram, false);
            (void)taskvec::detail::merger<taskvec::regmean_options>(
                policy, inputs.models(), options_of(settings, inputs, grams));
        },
    .run =
        [](const taskvec::cpu& policy, const tool::merge_settings& settings, const tool::merge_inputs& inputs,
            taskvec::tensor_sink& out) {
            const tool::statistics_inputs grams(policy, inputs, settings.gram, false);
            auto report = tool::merge(policy, settings, options_of(settings, inputs, grams), inputs.models(), out);
            report.beside += grams.checked_bytes();
            return report;
        }});

} // namespace
