// Scores from outside: a shell command that is given a model's path and prints a number.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tool.hpp"

#include <optional>
#include <string>
#include <string_view>

namespace tool {

/// Whether an interrupt (SIGINT, SIGTERM, SIGHUP) has asked the tool to stop. Beside the handlers, in tool.cpp.
[[nodiscard]] bool was_interrupted();
/// Throws usage_error unless the command says, by {}, where the path goes.
void check_score_command(const std::string& command);
/// The last number in a text: a decimal, or nan or inf, that is no part of a word. Empty where there is none.
[[nodiscard]] std::optional<double> last_number(std::string_view text);
/// Runs `sh -c command`, with {} replaced by the quoted path, and gives back the last number that it prints on standard output. Its standard error is
/// ours. An interrupt is passed on to the command. `point` names the candidate in messages.
/// Throws backend_error for a command that fails, invalid_argument for one that prints no finite number, cancelled. May be called from several threads.
[[nodiscard]] double run_score_command(const std::string& command, const fs::path& model, const std::string& point);

/// A directory for candidates that goes, with what is in it, when this object does.
class scratch_directory {
public:
    explicit scratch_directory(const fs::path& parent);
    scratch_directory(const scratch_directory&) = delete;
    scratch_directory& operator=(const scratch_directory&) = delete;
    ~scratch_directory();
    [[nodiscard]] const fs::path& path() const { return path_; }

private:
    fs::path path_;
};

} // namespace tool
