// Arguments that several verbs take.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

namespace tool {

namespace fs = std::filesystem;

class command;

/// Wrong usage: exit code 2. Whatever else is wrong is a taskvec::error: exit code 1.
class usage_error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// `PATH=WEIGHT`: split at the last '=', and only if a number follows and nothing is there under the whole text.
struct task_argument {
    fs::path path;
    double weight = 1;
    std::string name; ///< the file's stem; the directory's name for a directory or a file called `model`
    std::string text; ///< as it was given
    std::size_t time = 1; ///< above 1: one that was given before
};
/// `option` is what gave it, for messages.
[[nodiscard]] task_argument parse_task(const std::string& text, const std::string& option = "--task");
/// All tasks. Equal names are told apart by the folders above, and where that is one model given twice by numbers.
[[nodiscard]] std::vector<task_argument> parse_tasks(const std::vector<std::string>& texts);
/// "5GB", "256MiB", "1000": bytes. Throws usage_error naming the option.
[[nodiscard]] std::uint64_t parse_size(const std::string& text, const std::string& option);

/// What every verb that computes is told.
struct run_options {
    unsigned threads = 0;
    std::string device = "cpu";
    std::string memory = "256MiB";
    std::string report;
    bool quiet = false, dry_run = false;

    [[nodiscard]] std::uint64_t memory_bytes() const { return parse_size(memory, "--memory"); }
};
/// Notes how many models have the weight 0, and which: they add nothing. `noun`: what they are called.
void note_zero_weights(
    const run_options& run, const std::vector<task_argument>& models, const std::string& noun = "task");
void add_quiet(command& verb, run_options& options);
void add_run_options(command& verb, run_options& options);

} // namespace tool
