// What an adapter holds, module by module.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"

#include <string>

namespace tool {

/// Whether a path is a directory of an adapter and of no model, or a GGUF file of an adapter.
[[nodiscard]] bool is_adapter(const fs::path& path);
/// Its modules with kind, shape, rank, scaling, ‖ΔW‖ and dtype, as a table or as JSON.
[[nodiscard]] std::string adapter_table(const fs::path& path, bool json, const run_options& run);

} // namespace tool
