// What the command line of run gives, and the merges that a configuration says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"

#include <map>
#include <string>

namespace tool {

/// Where models and adapters are named first, by their paths.
struct named_places {
    std::map<std::string, std::string> models{}, adapters{};
};

struct run_settings {
    std::string config, semantics; ///< whose definitions; empty: as the configuration says, mergekit's by default
    std::string at_method; ///< where the document that was read last names its method
    named_places at_models; ///< where its models stand
    bool explain = false;
    merge_request request;
};

/// Merges as a configuration says, or says what it would do. Throws invalid_argument for what is wrong in it, with its
/// place; so does a build that reads no YAML.
void run_config(run_settings& given);

} // namespace tool
