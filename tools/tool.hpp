// What the verbs of the command line share: their registry, arguments, models, outputs, progress and reports.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/policy.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/formats/checkpoint.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

namespace fs = std::filesystem;

/// Wrong usage: exit code 2. Whatever else is wrong is a taskvec::error: exit code 1.
class usage_error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

/// A verb adds its subcommand to the command line; its callback does the work. Each tools/<verb>.cpp registers itself:
///
///     const tool::register_verb verb(10, [](CLI::App& app) { … });
struct register_verb {
    register_verb(int place, void (*add)(CLI::App&));
};
/// Adds all verbs, by place.
void add_verbs(CLI::App& app);

// Arguments.

/// `PATH=WEIGHT`: split at the last '=', and only if a number follows.
struct task_argument {
    fs::path path;
    double weight = 1;
    std::string name; ///< the file's stem; the directory's name for a directory or a file called `model`
};
/// `option` is what gave it, for messages.
[[nodiscard]] task_argument parse_task(const std::string& text, const std::string& option = "--task");
/// All tasks; equal names are an error.
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
/// claim_output() for --report, where it was given.
void claim_report(const run_options& options);
/// For options that are counts: digits and nothing else, in base ten. (CLI11 takes -1 for 2^64-1, and 010 for 8.) Use
/// with transform().
[[nodiscard]] CLI::Validator decimal_number();
void add_quiet(CLI::App& verb, run_options& options);
void add_run_options(CLI::App& verb, run_options& options);

// Models.

/// open_model(), with the maps known to the handler for files that shrink.
[[nodiscard]] taskvec::checkpoint open_model(const fs::path& path);

/// Makes another map known to that handler.
void guard_map(const taskvec::mapped_file& map);

// Outputs.

/// What an option's path becomes: a file beside the models, a model (which may replace one that is read), a directory.
enum class output_kind { file, model, directory };
/// Checks a place that `option` asks to write to, before any work: that it has a name, that it can be created or
/// replaced, that no other option asks for it, and that only a model replaces one of the files that are read. Throws
/// usage_error, io_error, invalid_argument.
void claim_output(const fs::path& path, const std::string& option, output_kind kind = output_kind::file);

/// A model that is being written: a file, a directory (`DIR/model.safetensors`), or a directory of shards.
class model_output {
public:
    /// `shard_size`: empty for one file.
    model_output(fs::path path, const std::vector<taskvec::tensor_spec>& specs, const taskvec::metadata_map& metadata,
        const std::string& shard_size);
    [[nodiscard]] taskvec::tensor_sink& sink();
    /// Forces the bytes to disk; the files still have temporary names.
    void finish();
    /// The finished model, read back under its temporary names.
    [[nodiscard]] taskvec::checkpoint reopen() const;
    void commit();
    [[nodiscard]] std::uint64_t file_size() const;
    [[nodiscard]] const fs::path& path() const { return path_; }

private:
    fs::path path_;
    std::unique_ptr<taskvec::safetensors_writer> file_;
    std::unique_ptr<taskvec::sharded_writer> shards_;
};

/// Removes this file, or this directory if it is empty by then, should the process have to end without destructors (see
/// open_model). What lies in a directory is named after it.
void guard_temporary(const fs::path& path);

// Progress.

/// Where a verb can run.
enum class runs_on : std::uint8_t { cpu, any_device };

/// The policy that the options ask for, with a progress line on a terminal. Interrupts stop the work as an error.
/// Throws for --device cuda unless the verb runs there, the build has CUDA, and a device answers.
class runner {
public:
    explicit runner(const run_options& options, runs_on where = runs_on::cpu);
    ~runner();
    runner(const runner&) = delete;
    runner& operator=(const runner&) = delete;

    [[nodiscard]] const taskvec::cpu& policy() const { return policy_; }
    [[nodiscard]] double seconds() const;
    /// Highest anonymous memory seen, in bytes.
    [[nodiscard]] std::uint64_t anonymous_peak() const { return anonymous_peak_; }

private:
    bool advance(const taskvec::progress_event& event);

    using clock = std::chrono::steady_clock;
    taskvec::cpu policy_;
    bool terminal_;
    std::uint64_t anonymous_peak_ = 0;
    std::string phase_;
    clock::time_point start_, phase_start_, drawn_;
};

// Words.

/// A hint on standard error, unless --quiet.
void note(const run_options& options, const std::string& text);
/// 1234567 as "1,234,567".
[[nodiscard]] std::string grouped(std::uint64_t value);
/// 1234567 as "1.23 MB".
[[nodiscard]] std::string size_text(std::uint64_t bytes);
/// 0.123 as "0.12 s".
[[nodiscard]] std::string seconds_text(double seconds);
/// "1 task", "2 tasks".
[[nodiscard]] std::string counted(std::uint64_t count, const std::string& noun);
/// Text for terminals and one-line messages: control characters and what is not UTF-8 are written as \\x and two
/// digits.
[[nodiscard]] std::string printable(std::string_view text);
/// Columns the text takes on a terminal: its code points.
[[nodiscard]] std::size_t text_width(std::string_view text);
/// Writes to standard output; a failure is an error.
void print(const std::string& text);
/// Says what was done, then gives the finished outputs their names: where standard output fails, nothing is changed.
template <class... Outputs>
void conclude(const std::string& text, Outputs&... outputs)
{
    print(text);
    (outputs.commit(), ...);
}

// Reports.

/// A file of JSON or text that is created at once, so that a path that cannot be written is known early, filled at the
/// end, and named when all else has gone well. No path: nothing is written.
class report_file {
public:
    explicit report_file(const std::string& path);
    [[nodiscard]] bool wanted() const { return file_ != nullptr; }
    void finish(const nlohmann::ordered_json& content);
    void finish_text(std::string_view text);
    void commit();

private:
    std::unique_ptr<taskvec::atomic_file> file_;
};
/// Highest resident memory, file pages included, in bytes.
[[nodiscard]] std::uint64_t peak_memory();

} // namespace tool
