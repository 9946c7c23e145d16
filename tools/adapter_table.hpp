// What an adapter holds, module by module.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"

#include <string>

namespace tool {

/// Whether a path is a directory of an adapter and of no model, or a GGUF file of an adapter.
[[nodiscard]] bool is_adapter(const fs::path& path);
struct adapter_table_settings {
    bool json = false;
    bool singular_values = false; ///< of each update: σ1, σr and the rank of 90% of the energy, or all in JSON
    std::string svg; ///< a picture of them goes there; empty: none
};
/// Prints its modules with kind, shape, rank, scaling, ‖ΔW‖ and dtype, as a table or as JSON.
void print_adapter(const fs::path& path, const adapter_table_settings& how, const run_options& run);

} // namespace tool
