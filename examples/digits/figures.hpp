// The digits example's figures.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/plot.hpp"

#include <cerrno>
#include <cstdio>
#include <filesystem>

namespace digits {

/// Draws a chart or a heat map as SVG. Without gnuplot the experiment goes on without figures, and says so.
template <class Figure>
void draw(const Figure& figure, const std::filesystem::path& file)
{
    try {
        plot::write_svg(figure, file);
    }
    catch (const taskvec::io_error& e) {
        if (e.system_code() != ENOENT) { throw; }
        std::fprintf(stderr, "digits: warning: no figure: %s\n", e.what());
    }
}

/// A horizontal line to compare with.
[[nodiscard]] inline plot::curve level(const std::string& label, double value, double first, double last)
{
    return {.label = label, .x = {first, last}, .y = {value, value}, .dashed = true, .marks = false};
}

} // namespace digits
