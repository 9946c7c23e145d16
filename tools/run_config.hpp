// What the command line of run gives, and the merges that a configuration says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"

#include <string>

namespace tool {

struct run_settings {
    std::string config, semantics; ///< whose definitions; empty: as the configuration says, mergekit's by default
    std::string at_method; ///< where the document that was read last names its method
    bool explain = false;
    merge_request request;
};

/// Merges as a configuration says, or says what it would do. Throws invalid_argument for what is wrong in it, with its
/// place; so does a build that reads no YAML.
void run_config(run_settings& given);

} // namespace tool
