// --method regmean.
// SPDX-License-Identifier: Apache-2.0
#include "statistics_inputs.hpp"

#include <taskvec/methods/regmean.hpp>

#include <algorithm>

namespace {

/// How weights are stored: as the Gram files say, and --conv1d.
std::function<taskvec::weight_layout(std::string_view)> layout_of(
    const tool::merge_request& request, const tool::statistics_inputs& grams)
{
    const auto& patterns = request.list("conv1d");
    const auto& first = grams.files().front();
    for (const auto& file : grams.files()) {
        for (const auto& [name, gram] : file.model()) {
            if (first.model().find(name) && file.layout(name) != first.layout(name)) {
                taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::statistics_differ,
                    taskvec::message("'", first.path().string(), "' and '", file.path().string(),
                        "' disagree about how the weight '", name, "' is stored: collect one of them again"));
            }
        }
    }
    const auto named = tool::name_matcher(patterns, "--conv1d");
    const auto& weights = first.model();
    if (!patterns.empty()
        && std::none_of(weights.begin(), weights.end(), [&](const auto& weight) { return named(weight.name); })) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::nothing_selected,
            taskvec::message("no tensor of '", first.path().string(), "' matches --conv1d '", patterns.front(),
                "': see 'taskvec inspect' for the names"));
    }
    return [named, &first](
               std::string_view name) { return named(name) ? taskvec::weight_layout::in_out : first.layout(name); };
}

const tool::register_method<taskvec::regmean_options> regmean("regmean",
    "weights of linear layers that fit all tasks' outputs best (--gram FILE per task), the\n                   "
    "rest averaged; needs no --base",
    70,
    {.needs_base = false,
        .lists = {{"gram", "FILE", "Gram matrices of a task; repeat in task order", true},
            {"conv1d", "REGEX",
                "weights stored in x out, as Conv1D's, beside those that the Gram files name; all others are out x "
                "in"}},
        .check =
            [](const tool::merge_request& request) { (void)tool::name_matcher(request.list("conv1d"), "--conv1d"); },
        .attach = [](const tool::method_call& call,
                      taskvec::regmean_options& options) -> std::unique_ptr<tool::attachment> {
            auto grams = std::make_unique<tool::statistics_inputs>(call, "gram");
            options.grams = grams->models();
            options.labels = grams->labels();
            options.layout = layout_of(call.request, *grams);
            return grams;
        },
        .examine = [](const taskvec::cpu& policy, const taskvec::aligned_models& models,
                       const taskvec::regmean_options& options) { taskvec::check_merge(policy, options, models); }});

} // namespace
