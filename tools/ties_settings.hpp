// TIES options from the command line: a preset, overridden by what was given.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "merging.hpp"

#include <taskvec/methods/ties.hpp>

#include <utility>
#include <vector>

namespace tool {

[[nodiscard]] inline taskvec::ties_options ties_options_of(const merge_settings& settings, std::vector<double> weights)
{
    auto options = settings.semantics == "ties-merging" ? taskvec::ties_options::as_in_ties_merging()
        : settings.semantics == "mergekit"              ? taskvec::ties_options::as_in_mergekit()
        : settings.semantics == "peft"                  ? taskvec::ties_options::as_in_peft()
                                                        : taskvec::ties_options{};
    options.weights = std::move(weights);
    if (settings.density) { options.density = *settings.density; }
    if (settings.lambda) { options.lambda = *settings.lambda; }
    if (settings.scope) {
        options.scope = *settings.scope == "tensor" ? taskvec::scope::tensor : taskvec::scope::model;
    }
    if (settings.merge_weights) {
        options.combine = *settings.merge_weights == "sum" ? taskvec::disjoint_merge::sum
            : *settings.merge_weights == "max"             ? taskvec::disjoint_merge::max
                                                           : taskvec::disjoint_merge::mean;
    }
    return options;
}

} // namespace tool
