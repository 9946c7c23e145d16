// One document of a configuration becomes a request.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "config_names.hpp"
#include "run_config.hpp"

#include <functional>
#include <string>

namespace tool::configuration {

/// Reads a document into a request. `there`: whether the results of stages are. Errors of wrong values in the file are
/// no wrong usage.
[[nodiscard]] stages_named read_document(
    run_settings& given, const YAML::Node& document, const stages& others, bool there);

/// A merge, what is wrong with which is said with the place of the method where it has none of its own.
void with_place(const run_settings& given, const std::function<void()>& merge);

} // namespace tool::configuration
