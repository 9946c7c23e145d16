// Tables.
// SPDX-License-Identifier: Apache-2.0
#include "table.hpp"

#include "words.hpp"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#if __has_include(<sys/ioctl.h>)
#include <sys/ioctl.h>
#include <unistd.h>
#endif

namespace tool {

namespace {

/// The first `count` characters of UTF-8, and the rest.
std::size_t bytes_of(std::string_view text, std::size_t count)
{
    std::size_t at = 0;
    for (; at < text.size(); ++at) {
        if ((static_cast<unsigned char>(text[at]) & 0xc0u) == 0x80u) { continue; }
        if (count-- == 0) { break; }
    }
    return at;
}

/// `text` with an ellipsis in its middle, `width` wide.
std::string without_middle(const std::string& text, std::size_t width)
{
    const std::size_t all = text_width(text);
    if (all <= width) { return text; }
    const std::size_t end = (width - 1) / 2, begin = width - 1 - end;
    return text.substr(0, bytes_of(text, begin)) + "…" + text.substr(bytes_of(text, all - end));
}

} // namespace

terminal standard_output()
{
    terminal found;
#if defined(TIOCGWINSZ)
    if (::isatty(STDOUT_FILENO) != 1) { return found; }
    struct winsize size{};
    if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0) { found.width = size.ws_col; }
    const char *const none = std::getenv("NO_COLOR"), *const kind = std::getenv("TERM");
    found.colours = !(none && *none) && kind && *kind && std::string_view(kind) != "dumb";
#endif
    return found;
}

std::string table_text(std::vector<std::vector<std::string>> rows, const std::vector<bool>& right, const terminal& to)
{
    std::vector<std::size_t> widths(rows.front().size(), 0);
    for (const auto& row : rows) {
        for (std::size_t i = 0; i < row.size(); ++i) { widths[i] = std::max(widths[i], text_width(row[i])); }
    }
    std::size_t whole = 2 * (widths.size() - 1);
    for (const std::size_t width : widths) { whole += width; }
    constexpr std::size_t least = 16;
    if (to.width > 0 && whole > to.width && widths[0] > least) {
        widths[0] = std::max(least, widths[0] - std::min(widths[0], whole - to.width));
        for (auto& row : rows) { row[0] = without_middle(row[0], widths[0]); }
    }
    std::string text;
    for (std::size_t r = 0; r < rows.size(); ++r) {
        const auto& row = rows[r];
        if (r == 0 && to.colours) { text += "\x1b[1m"; }
        for (std::size_t i = 0; i < row.size(); ++i) {
            const std::string space(widths[i] - text_width(row[i]), ' ');
            const bool last = i + 1 == row.size();
            text += right[i] ? space + row[i] : row[i] + (last ? "" : space);
            text += last ? "" : "  ";
        }
        if (r == 0 && to.colours) { text += "\x1b[0m"; }
        text += '\n';
    }
    return text;
}

} // namespace tool
