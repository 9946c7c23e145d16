// Scores from outside: a shell command that is given a model's path and prints a number.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

/// Throws usage_error unless the command says, by {}, where the path goes.
void check_score_command(const std::string& command);
/// The last number in a text: a decimal, or nan or inf, that is no part of a word. Empty where there is none.
[[nodiscard]] std::optional<double> last_number(std::string_view text);
/// A command with every {} replaced by a path, which stays one word of the shell whatever is in it: outside quotes,
/// inside either kind of them, and in $(…) and `…`. A path of letters, digits and ./_- goes in as it is.
[[nodiscard]] std::string with_path(const std::string& command, const std::string& path);

/// How candidates are scored.
struct score_command {
    std::string text; ///< with {} where the path goes
    double timeout = 0; ///< seconds; 0: as long as it takes
};

/// A candidate, for its command.
struct scored_candidate {
    fs::path model;
    std::string point; ///< names it in messages
    std::vector<std::string> environment{}; ///< variables that the command gets beside ours, such as TASKVEC_LAMBDA=0.3
};

/// Runs `sh -c`, and gives back the last number that it prints on standard output. Its standard error is ours. An
/// interrupt is passed on to the command, and what does not end by itself within five seconds after that is killed; so
/// is what runs out of time. Throws backend_error for a command that fails or runs out of time, invalid_argument for
/// one that prints no finite number, cancelled. May be called from several threads.
[[nodiscard]] double run_score_command(const score_command& command, const scored_candidate& candidate);

/// A directory for what is needed for a while: it goes, with what is in it, when this object does, and when the process
/// is stopped.
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
