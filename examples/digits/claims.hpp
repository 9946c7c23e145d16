// The papers' claims, each measured where it is printed.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <cstdio>
#include <string>
#include <vector>

namespace digits {

/// A sentence of the papers, whether this run agrees, and the figures that say so.
struct claim {
    std::string text;
    bool holds;
    std::string measured;
};

/// What a claim's figures are written with: "64.23", or "+1.20" for a difference; in points of percent.
[[nodiscard]] inline std::string points(double fraction)
{
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%+.2f", 100.0 * fraction);
    return buffer;
}

[[nodiscard]] inline std::string text(const std::vector<claim>& claims)
{
    std::string out;
    for (const auto& [sentence, holds, measured] : claims) {
        out += taskvec::message(holds ? "  reproduced      " : "  NOT reproduced  ", sentence, "\n                  ", measured, '\n');
    }
    return out;
}

} // namespace digits
