// Reports: what a verb did, as JSON.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "outputs.hpp"

#include <nlohmann/json.hpp>

#include <cstdint>

namespace tool {

/// A report that is being written.
class report_file : public text_output {
public:
    using text_output::text_output;
    void finish(const nlohmann::ordered_json& content);
};
/// Highest resident memory, file pages included, in bytes.
[[nodiscard]] std::uint64_t peak_memory();

} // namespace tool
