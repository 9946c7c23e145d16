// The papers' claims, each measured where it is printed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "table.hpp"

#include <taskvec/core/error.hpp>

#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

/// A sentence of the papers, whether this run agrees, and the figures that say so.
struct claim {
    std::string text;
    bool holds;
    std::string measured;
};

/// A difference of accuracies in points of percent: "+1.20".
[[nodiscard]] inline std::string points(double fraction)
{
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%+.2f", 100.0 * fraction);
    return buffer;
}

/// "TIES 70.05, Single-Task 95.77 (-25.73)"
[[nodiscard]] inline std::string against(std::string_view a, double x, std::string_view b, double y)
{
    return taskvec::message(a, " ", percent(x), ", ", b, " ", percent(y), " (", points(x - y), ")");
}

[[nodiscard]] inline std::string text(const std::vector<claim>& claims)
{
    std::string out;
    for (const auto& [sentence, holds, measured] : claims) {
        out += taskvec::message(
            holds ? "  reproduced      " : "  NOT reproduced  ", sentence, "\n                  ", measured, '\n');
    }
    return out;
}

} // namespace digits
