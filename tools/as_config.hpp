// merge --as-config: a command line as a configuration of mergekit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"

#include <string>

namespace tool {

/// The configuration with which `taskvec run` makes what this request makes. What mergekit has no word for stands under
/// `taskvec`, a key that mergekit passes over. `inputs`, `plan`: the models, and what the result's file holds. Throws
/// usage_error for what no configuration can say, naming the option.
[[nodiscard]] std::string configuration_of(const merge_request& request, const method_entry& method,
    const merge_inputs& inputs, const taskvec::quantised_outputs& plan);

} // namespace tool
