// Pieces of CSV files.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <charconv>
#include <string>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// The shortest text that reads back as the same number; independent of the locale.
[[nodiscard]] inline std::string csv_number(double value)
{
    char text[32];
    const auto end = std::to_chars(text, text + sizeof text, value).ptr;
    return {text, end};
}

/// A CSV field after RFC 4180: quoted when it has to be.
[[nodiscard]] inline std::string csv_field(std::string_view text)
{
    if (text.find_first_of(",\"\r\n") == std::string_view::npos) { return std::string(text); }
    std::string quoted = "\"";
    for (const char c : text) {
        if (c == '"') { quoted += '"'; }
        quoted += c;
    }
    return quoted + '"';
}

} // namespace taskvec::inline TASKVEC_ABI
