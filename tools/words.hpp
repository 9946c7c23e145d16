// Numbers and names as people read them, and what the tool says on a terminal.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

struct run_options;

/// A hint on standard error, unless --quiet; once, however often it is said.
void note(const run_options& options, const std::string& text);
/// All hints so far, for reports.
[[nodiscard]] std::vector<std::string>& notes();
/// The words of the command line after the tool's name, and the tool's version.
[[nodiscard]] std::vector<std::string>& command_words();
[[nodiscard]] std::string tool_version();
/// 1234567 as "1,234,567".
[[nodiscard]] std::string grouped(std::uint64_t value);
/// 1234567 as "1.23 MB".
[[nodiscard]] std::string size_text(std::uint64_t bytes);
/// 0.123 as "0.12 s".
[[nodiscard]] std::string seconds_text(double seconds);
/// "1 task", "2 tasks".
[[nodiscard]] std::string counted(std::uint64_t count, const std::string& noun);
/// A to Z as a to z, whatever the locale is.
[[nodiscard]] std::string lower_case(std::string text);
/// A path as messages name it.
[[nodiscard]] std::string in_quotes(const std::filesystem::path& path);
/// Text as one word of the shell: as it is, or between quotes.
[[nodiscard]] std::string shell_word(const std::string& text);
/// Text for terminals and one-line messages: control characters and what is not UTF-8 are written as \\x and two
/// digits.
[[nodiscard]] std::string printable(std::string_view text);
/// Columns the text takes on a terminal: its code points.
[[nodiscard]] std::size_t text_width(std::string_view text);
/// Writes to standard output; a failure is an error.
void print(const std::string& text);
/// Before outputs take their names: throws where an input has changed since it was opened.
void check_before_commit();
/// What an interrupt leaves on purpose, such as "'scores.csv' holds 3 points": said instead of "no output was written".
[[nodiscard]] std::string& interrupt_leaves();
/// While it lives nobody else gives files their names in the directories of the outputs that were claimed: what belongs
/// together is of one run. A lock (flock) on each directory that ends with the process; file systems without such locks
/// are written to without. Waits ten seconds for others, then throws io_error.
class names_held {
public:
    names_held();
    names_held(const names_held&) = delete;
    names_held& operator=(const names_held&) = delete;
    ~names_held();

private:
    explicit names_held(int);

    std::vector<int> directories_;
};
/// Says that all outputs have their names: memory that runs out from here on is no failure.
void outputs_are_there() noexcept;
[[nodiscard]] bool are_outputs_there() noexcept;
/// Gives the finished outputs their names, and says what was done once those have theirs that can be given back
/// (reports and the like): where an input has changed, or one of these or standard output fails, nothing is changed.
/// Where one of them fails, those before it are given back: what cannot be comes last.
template <class... Outputs>
void conclude(const std::string& text, Outputs&... outputs)
{
    check_before_commit();
    const names_held alone;
    std::size_t done = 0;
    bool said = false;
    const auto say = [&] {
        if (!said) { print(text); }
        said = true;
    };
    const auto commit = [&](auto& output) {
        if constexpr (!requires { output.revert(); }) { say(); }
        output.commit();
        ++done;
    };
    try {
        (commit(outputs), ...);
        say();
    }
    catch (...) {
        std::size_t i = 0;
        const auto give_back = [&](auto& output) {
            if constexpr (requires { output.revert(); }) {
                if (i <= done) { output.revert(); } // the one that failed may have its name by now
            }
            ++i;
        };
        (give_back(outputs), ...);
        throw;
    }
    outputs_are_there();
}

} // namespace tool
