// Reports: what a verb did, as JSON.
// SPDX-License-Identifier: Apache-2.0
#include "report.hpp"

#include "runner.hpp"
#include "words.hpp"

namespace tool {

void report_file::finish(const nlohmann::ordered_json& content)
{
    if (!wanted()) { return; }
    auto whole = content;
    if (!notes().empty()) { whole["notes"] = notes(); }
    finish_text(whole.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
}

std::uint64_t peak_memory()
{
    return status_bytes("VmHWM:");
}

} // namespace tool
