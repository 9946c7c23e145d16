// Tables as a person reads them: columns, and on a terminal its width and a header that stands out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace tool {

/// What is known of the terminal that standard output goes to.
struct terminal {
    std::size_t width = 0; ///< columns; 0: it is none, or does not say
    bool colours = false;
};
/// Standard output's; no colours where NO_COLOR is set or TERM is dumb.
[[nodiscard]] terminal standard_output();

/// Rows of as many cells, the first of them the header: columns two spaces apart, those whose place is true in `right`
/// to the right. Where the rows are wider than the terminal the first column's cells lose their middle, as names do
/// that share beginnings and ends. Nothing is cut where standard output is no terminal.
[[nodiscard]] std::string table_text(
    std::vector<std::vector<std::string>> rows, const std::vector<bool>& right, const terminal& to = standard_output());

} // namespace tool
