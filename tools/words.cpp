// Numbers and names as people read them, and what the tool says on a terminal.
// SPDX-License-Identifier: Apache-2.0
#include "words.hpp"

#include "runner.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace tool {

std::vector<std::string>& notes()
{
    static std::vector<std::string> list;
    return list;
}

void note(const run_options& options, const std::string& text)
{
    if (std::find(notes().begin(), notes().end(), text) != notes().end()) { return; }
    notes().push_back(text);
    if (options.quiet) { return; }
    clear_progress();
    std::fprintf(stderr, "taskvec: note: %s\n", printable(text).c_str());
}

std::vector<std::string>& command_words()
{
    static std::vector<std::string> words;
    return words;
}

std::string tool_version()
{
    return std::to_string(TASKVEC_VERSION_MAJOR) + "." + std::to_string(TASKVEC_VERSION_MINOR) + "."
        + std::to_string(TASKVEC_VERSION_PATCH);
}

std::string grouped(std::uint64_t value)
{
    std::string text = std::to_string(value);
    for (std::size_t at = text.size(); at > 3; at -= 3) { text.insert(at - 3, ","); }
    return text;
}

std::string size_text(std::uint64_t bytes)
{
    static constexpr const char* units[] = {"B", "kB", "MB", "GB", "TB"};
    double value = static_cast<double>(bytes);
    std::size_t unit = 0;
    for (; value >= 999.5 && unit + 1 < std::size(units); ++unit) { value /= 1000; }
    char text[32];
    std::snprintf(text, sizeof text,
        unit == 0           ? "%.0f %s"
            : value < 9.995 ? "%.2f %s"
            : value < 99.95 ? "%.1f %s"
                            : "%.0f %s",
        value, units[unit]);
    return text;
}

std::string seconds_text(double seconds)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.2f s", seconds);
    return text;
}

std::string counted(std::uint64_t count, const std::string& noun)
{
    if (count == 1) { return "1 " + noun; }
    return grouped(count) + " " + (noun.ends_with("ry") ? noun.substr(0, noun.size() - 1) + "ies" : noun + "s");
}

std::string lower_case(std::string text)
{
    std::transform(text.begin(), text.end(), text.begin(),
        [](char c) { return static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c); });
    return text;
}

std::string in_quotes(const std::filesystem::path& path)
{
    return "'" + path.string() + "'";
}

std::string printable(std::string_view text)
{
    std::string result;
    for (std::size_t at = 0; at < text.size();) {
        // One character: the shortest piece that is UTF-8, or a byte that begins none.
        std::size_t length = 1;
        while (length <= 4 && at + length <= text.size() && !taskvec::is_utf8(text.substr(at, length))) { ++length; }
        const bool valid = length <= 4 && at + length <= text.size();
        const auto piece = text.substr(at, valid ? length : 1);
        at += piece.size();
        const auto first = static_cast<unsigned char>(piece[0]);
        const bool c1_control = piece.size() == 2 && first == 0xc2u && static_cast<unsigned char>(piece[1]) < 0xa0u;
        // Marks that turn the direction of writing, and separators of lines: they make a terminal show what is not
        // there.
        const bool turns = piece.size() == 3 && first == 0xe2u
            && ((piece[1] == '\x80' && static_cast<unsigned char>(piece[2]) >= 0xa8u
                    && static_cast<unsigned char>(piece[2]) <= 0xaeu)
                || (piece[1] == '\x81' && static_cast<unsigned char>(piece[2]) >= 0xa6u
                    && static_cast<unsigned char>(piece[2]) <= 0xa9u));
        if (valid && first >= 0x20u && first != 0x7fu && !c1_control && !turns) {
            result += piece;
            continue;
        }
        for (const char byte : piece) {
            char code[8];
            std::snprintf(code, sizeof code, "\\x%02x", static_cast<unsigned>(static_cast<unsigned char>(byte)));
            result += code;
        }
    }
    return result;
}

std::string shell_word(const std::string& text)
{
    constexpr std::string_view plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789./_-=:,+@%^";
    if (!text.empty() && text.find_first_not_of(plain) == text.npos) { return text; }
    std::string quoted = "'";
    for (const char c : text) { quoted += c == '\'' ? std::string("'\\''") : std::string(1, c); }
    return quoted + "'";
}

std::size_t text_width(std::string_view text)
{
    return static_cast<std::size_t>(std::count_if(
        text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u; }));
}

namespace {
std::atomic<bool> all_there{false};
} // namespace

void outputs_are_there() noexcept
{
    all_there = true;
}

bool are_outputs_there() noexcept
{
    return all_there.load();
}

std::string& interrupt_leaves()
{
    static std::string text;
    return text;
}

void check_before_commit()
{
    check_inputs();
}

void print(const std::string& text)
{
    clear_progress();
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
        taskvec::raise<taskvec::io_error>(taskvec::system_error_code(errno),
            taskvec::message("cannot write to standard output: ", std::strerror(errno)), "", errno);
    }
}

} // namespace tool
