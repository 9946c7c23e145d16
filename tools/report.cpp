// Reports: what a verb did, as JSON.
// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include "runner.hpp"

namespace tool {

void report_file::finish(const nlohmann::ordered_json& content)
{
    if (wanted()) { finish_text(content.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n"); }
}

std::uint64_t peak_memory()
{
    return status_bytes("VmHWM:");
}

} // namespace tool
