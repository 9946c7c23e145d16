// What prune and peru-fft share: the options of pruning, and pruning into a delta, on what --device names.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"

#include <taskvec/reuse/post_pruning.hpp>
#include <taskvec/select/sparse.hpp>

#include <string>

namespace tool {

/// The table of pruning. `of_what`: what --density is a share of, for the help.
[[nodiscard]] described pruning_table(const std::string& density = "share of entries kept");
/// The options that were given.
[[nodiscard]] taskvec::post_pruning_options pruning_options(const option_values& values);

void prune_into(const taskvec::cpu& policy, const run_options& run, const taskvec::post_pruning_options& options,
    const taskvec::aligned_models& models, taskvec::sparse_sink& out);

/// Reads of both models that pruning needs on smooth data.
inline constexpr unsigned pruning_walks = 3;

} // namespace tool
