// A run: the policy, its progress line, and signals.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"

#include <taskvec/core/policy.hpp>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {
class checkpoint;
class mapped_file;
enum class index_check : std::uint8_t;
} // namespace taskvec::inline TASKVEC_ABI

namespace tool {

// Signals: an interrupt asks the work to stop; a file that shrinks while it is mapped ends the process with its name.

/// Sees to signals, to std::terminate (one line is said, temporary files go), and to directories that could not be
/// forced to disk (a warning).
void install_handlers();
/// Throws io_error (file_changed) where a file that was opened by these functions is no longer what it was.
void check_inputs();
/// Whether the caller is to say how the process ends: true once, so that an error and a signal are one line.
[[nodiscard]] bool take_last_word() noexcept;
/// Says one line on standard error, and nothing else: no memory is needed.
void say_plainly(const char* text);
/// Whether an interrupt (SIGINT, SIGTERM, SIGHUP, SIGQUIT) has asked the tool to stop.
[[nodiscard]] bool was_interrupted();
/// Refuses a directory of the Hub's cache (models--ORG--NAME) with the name of the snapshot in it that holds the files.
void check_no_hub_cache(const fs::path& path);
/// taskvec::open_model(), with the maps known to the handler for files that shrink.
[[nodiscard]] taskvec::checkpoint open_guarded(const fs::path& path);
[[nodiscard]] taskvec::checkpoint open_guarded(const fs::path& path, taskvec::index_check how);
/// True when some tensor is f64: everything then computes in f64.
[[nodiscard]] bool holds_f64(const taskvec::checkpoint& model);
/// Makes another map known to that handler.
void guard_map(const taskvec::mapped_file& map);
/// A file that is read beside models (a configuration, a tokenizer): check_inputs() throws where it changes after it
/// was opened first, however often it is read.
[[nodiscard]] taskvec::mapped_file open_watched(const fs::path& path);
[[nodiscard]] std::string read_watched(const fs::path& path, std::size_t limit = 100'000'000);
/// Removes this file, or this directory if it is empty by then, should the process have to end without destructors. The
/// library's own temporary files are known already.
void guard_temporary(const fs::path& path);
/// The same of an output that has its name, until all outputs have theirs: then it stays.
void guard_new_output(const fs::path& path) noexcept;
/// Gives a file back what it replaced, which has the second name `kept`, should the process have to end like that.
void guard_replaced(const fs::path& path, const fs::path& kept) noexcept;
/// Ends what guard_temporary(), guard_new_output() and guard_replaced() began, for one of the names.
void release_temporary(const fs::path& path) noexcept;
/// The files that were opened by these, where they lie.
[[nodiscard]] std::vector<fs::path>& opened_places();
/// Where a path leads, as far as it exists.
[[nodiscard]] fs::path place_of(const fs::path& path);

/// Where a verb can run.
enum class runs_on : std::uint8_t { cpu, any_device };

/// Throws usage_error for --device cuda, of a verb that does not run there.
void check_cpu(const run_options& options);

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
/// Wipes the progress line, where one is drawn.
void clear_progress();
/// A field of /proc/self/status that is in kB, in bytes; 0 where it is not there.
[[nodiscard]] std::uint64_t status_bytes(const char* field);

} // namespace tool
