// A run: the policy, its progress line, and signals.
// SPDX-License-Identifier: Apache-2.0
#include "runner.hpp"

#include "device.hpp"
#include "words.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/file.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include <unistd.h>

namespace tool {

namespace {

// Signals. Handlers may touch only what is here: plain arrays, filled before they are needed.

struct mapped_range {
    std::atomic<const std::byte*> begin{nullptr};
    const std::byte* end = nullptr;
    const char* path = nullptr;
};
std::array<mapped_range, 4096> mapped_ranges;
std::atomic<std::size_t> mapped_count{0};
struct temporary_name {
    std::atomic<bool> there{false};
    bool given_back = false; ///< is a second name of what stood under the name before it in this list
    bool is_output = false; ///< has the output's name already: it stays once all outputs have theirs
    char path[PATH_MAX];
};
std::array<temporary_name, 4096> temporaries; // of memory that is never asked for
std::atomic<std::size_t> temporary_count{0};
std::atomic<int> interrupted{0};
bool progress_visible = false;

void write_text(const char* text)
{
    [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text, std::strlen(text));
}

void leave_at_once() noexcept;

extern "C" void on_interrupt(int signal)
{
    if (interrupted.exchange(signal) != 0) { leave_at_once(); }
}

void remove_temporaries()
{
    for (std::size_t i = temporary_count.load(); i-- > 0;) { // what lies in a directory comes after it
        if (!temporaries[i].there.load()) { continue; }
        if (temporaries[i].is_output && are_outputs_there()) { continue; }
        const bool back = temporaries[i].given_back;
        if (back && !are_outputs_there()) { ::rename(temporaries[i].path, temporaries[i - 1].path); }
        taskvec::remove_temporary(temporaries[i].path);
        if (back) { --i; }
    }
}

/// What a second signal does: a terminal that closes sends two, and who presses Ctrl-C twice does not want to wait.
void leave_at_once() noexcept
{
    if (!take_last_word()) { return; } // the end is being said already
    if (!are_outputs_there()) {
        write_text("taskvec: error: interrupted; each output is the old one or the new one, whole\n");
    }
    remove_temporaries();
    ::_exit(are_outputs_there() ? 0 : 1);
}

/// Appends to the list, in which there is room.
void append_temporary(const fs::path& path, bool given_back, bool is_output = false) noexcept
{
    const auto count = temporary_count.load();
    auto& entry = temporaries[count];
    const auto& name = path.native();
    std::memcpy(entry.path, name.c_str(), name.size() + 1);
    entry.given_back = given_back;
    entry.is_output = is_output;
    entry.there = true;
    temporary_count = count + 1;
}
constinit std::mutex temporaries_busy;

void on_temporary(const fs::path& path, bool there) noexcept
{
    const std::lock_guard lock(temporaries_busy);
    auto count = temporary_count.load();
    const std::string_view name = path.native();
    if (there) {
        if (count < temporaries.size() && name.size() < PATH_MAX) { append_temporary(path, false); }
        return;
    }
    for (std::size_t i = 0; i < count; ++i) {
        if (temporaries[i].there.load() && name == temporaries[i].path) { temporaries[i].there = false; }
    }
    while (count > 0 && !temporaries[count - 1].there.load()) { temporary_count = --count; }
}

/// Does nothing: the write that failed is an error by itself, with EPIPE or EFBIG. Not SIG_IGN, which a program that
/// scores candidates would inherit.
extern "C" void on_failed_write(int) { }

[[noreturn]] void on_terminate()
{
    if (are_outputs_there()) { // the outputs have their names: what is left cannot be said to have failed
        remove_temporaries();
        ::_exit(0);
    }
    const char* what =
        "taskvec: error: ended by an error within an error; each output is the old one or the new one, whole\n";
    if (const auto current = std::current_exception()) {
        try {
            std::rethrow_exception(current);
        }
        catch (const std::bad_alloc&) {
            what = "taskvec: error: out of memory: use fewer --threads or a smaller --memory\n";
        }
        catch (...) { // NOLINT(bugprone-empty-catch): there is nobody left to tell
        }
    }
    write_text(what);
    remove_temporaries();
    ::_exit(1);
}

void on_unsynchronised(const fs::path& directory, int code)
{
    std::fprintf(stderr,
        "taskvec: warning: directory '%s' could not be forced to disk (%s): the outputs have their names and are "
        "whole, but a power cut now may bring back what was there before\n",
        directory.c_str(), std::strerror(code));
}

extern "C" void on_bus_error(int, siginfo_t* info, void*)
{
    const auto* address = static_cast<const std::byte*>(info->si_addr);
    const char* path = "a model file";
    for (std::size_t i = 0; i < mapped_count.load(); ++i) {
        if (address >= mapped_ranges[i].begin.load() && address < mapped_ranges[i].end) {
            path = mapped_ranges[i].path;
        }
    }
    write_text("taskvec: error: ");
    write_text(path);
    write_text(": the file shrank, or its disk failed, while it was being read; nothing was written: run again when "
               "nothing else changes it\n");
    remove_temporaries();
    ::_exit(1);
}

/// A string that is never freed: handlers may read it at any time.
const char* keep(const std::string& text)
{
    char* copy = static_cast<char*>(std::malloc(text.size() + 1));
    if (copy) { std::memcpy(copy, text.c_str(), text.size() + 1); }
    return copy;
}

/// The files that are read, as they were when they were opened first.
struct opened_files {
    std::mutex busy;
    std::map<fs::path, taskvec::mapped_file::identity> all;

    static opened_files& instance()
    {
        static opened_files files;
        return files;
    }
    void add(const taskvec::mapped_file& map)
    {
        const std::lock_guard lock(busy);
        all.emplace(map.path(), map.opened());
    }
};

} // namespace

bool take_last_word() noexcept
{
    static std::atomic<bool> taken{false};
    return !taken.exchange(true);
}

void say_plainly(const char* text)
{
    write_text(text);
}

void check_inputs()
{
    auto& files = opened_files::instance();
    const std::lock_guard lock(files.busy);
    for (const auto& [path, opened] : files.all) { taskvec::mapped_file::check_unchanged(path, opened); }
}

void install_handlers()
{
    static const bool once = [] {
        struct sigaction action{};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO;
        ::sigaction(SIGBUS, &action, nullptr);
        struct sigaction stop{};
        stop.sa_handler = on_interrupt;
        struct sigaction failed{};
        failed.sa_handler = on_failed_write;
        const auto handle = [](int signal, const struct sigaction& how) {
            struct sigaction before{};
            ::sigaction(signal, nullptr, &before);
            if (before.sa_handler != SIG_IGN) { ::sigaction(signal, &how, nullptr); }
        };
        for (const int signal : // by hand, and by what runs jobs: time that is up, a warning before that
            {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGXCPU, SIGUSR1, SIGUSR2, SIGALRM, SIGVTALRM}) {
            handle(signal, stop);
        }
        for (const int signal : {SIGPIPE, SIGXFSZ}) { handle(signal, failed); }
        std::set_terminate(on_terminate);
        taskvec::set_unsynchronised_handler(on_unsynchronised);
        taskvec::set_temporary_handler(on_temporary);
        return true;
    }();
    (void)once;
}

void clear_progress()
{
    if (std::exchange(progress_visible, false)) { write_text("\r\033[K"); }
}

std::uint64_t status_bytes(const char* field)
{
    std::FILE* file = std::fopen("/proc/self/status", "r");
    if (!file) { return 0; }
    char line[256];
    unsigned long long value = 0;
    while (std::fgets(line, sizeof line, file)) {
        if (std::strncmp(line, field, std::strlen(field)) == 0) {
            std::sscanf(line + std::strlen(field), "%llu", &value);
            break;
        }
    }
    std::fclose(file);
    return value * 1024;
}

fs::path place_of(const fs::path& path)
{
    std::error_code failure;
    auto place = fs::weakly_canonical(fs::absolute(path.has_filename() ? path : path.parent_path(), failure), failure);
    return failure ? path : place;
}

std::vector<fs::path>& opened_places()
{
    static std::vector<fs::path> list;
    return list;
}

void guard_map(const taskvec::mapped_file& map)
{
    install_handlers();
    const auto bytes = map.bytes();
    opened_places().push_back(place_of(map.path()));
    opened_files::instance().add(map);
    const auto index = mapped_count.load();
    if (bytes.empty() || index == mapped_ranges.size()) { return; }
    mapped_ranges[index].end = bytes.data() + bytes.size();
    mapped_ranges[index].path = keep(printable(map.path().string()));
    mapped_ranges[index].begin = bytes.data();
    mapped_count = index + 1;
}

taskvec::mapped_file open_watched(const fs::path& path)
{
    taskvec::mapped_file map(path);
    opened_files::instance().add(map);
    return map;
}

std::string read_watched(const fs::path& path, std::size_t limit)
{
    (void)open_watched(path);
    return taskvec::read_text_file(path, limit);
}

bool holds_f64(const taskvec::checkpoint& model)
{
    return std::any_of(model.model().begin(), model.model().end(),
        [](const auto& entry) { return entry.tensor.dtype == taskvec::dtype::f64; });
}

void check_no_hub_cache(const fs::path& path)
{
    std::error_code ignored;
    const auto snapshots = path / "snapshots";
    if (!fs::is_directory(snapshots, ignored)) { return; }
    const auto folder = path.has_filename() ? path : path.parent_path(); // "DIR/" is DIR
    if (!folder.filename().string().starts_with("models--") && !fs::is_directory(path / "blobs", ignored)) { return; }
    std::vector<fs::path> found;
    for (fs::directory_iterator it(snapshots, ignored), end; !ignored && it != end; it.increment(ignored)) {
        found.push_back(it->path());
    }
    std::sort(found.begin(), found.end());
    if (const auto main = path / "refs" / "main"; fs::is_regular_file(main, ignored)) {
        auto revision = taskvec::read_text_file(main);
        while (!revision.empty() && static_cast<unsigned char>(revision.back()) <= ' ') { revision.pop_back(); }
        if (!revision.empty() && fs::is_directory(snapshots / revision, ignored)) {
            found.insert(found.begin(), snapshots / revision);
        }
    }
    taskvec::raise<taskvec::io_error>(taskvec::error_code::model_not_found,
        found.empty() ? std::string("is a model in the Hub's cache, and its snapshots/ are empty: fetch it again")
                      : taskvec::message("is a model in the Hub's cache, whose files lie in its snapshots/: name ",
                            in_quotes(found.front())),
        path.string());
}

taskvec::checkpoint open_guarded(const fs::path& path)
{
    return open_guarded(path, taskvec::index_check::strict);
}

taskvec::checkpoint open_guarded(const fs::path& path, taskvec::index_check how)
{
    install_handlers();
    check_no_hub_cache(path);
    auto model = taskvec::open_model(path, how);
    for (const auto& file : model.files()) { guard_map(file.map()); }
    return model;
}

void guard_temporary(const fs::path& path)
{
    on_temporary(path, true);
}

void guard_new_output(const fs::path& path) noexcept
{
    const std::lock_guard lock(temporaries_busy);
    if (temporary_count.load() == temporaries.size() || path.native().size() >= PATH_MAX) { return; }
    append_temporary(path, false, true);
}

void guard_replaced(const fs::path& path, const fs::path& kept) noexcept
{
    const std::lock_guard lock(temporaries_busy);
    if (temporary_count.load() + 2 > temporaries.size() || path.native().size() >= PATH_MAX
        || kept.native().size() >= PATH_MAX) {
        return;
    }
    append_temporary(path, false);
    append_temporary(kept, true);
}

void release_temporary(const fs::path& path) noexcept
{
    on_temporary(path, false);
}

void check_cpu(const run_options& options)
{
    if (options.device == "cpu") { return; }
    throw usage_error("--device " + options.device + ": only merge, prune and peru-fft run there; leave --device out");
}

runner::runner(const run_options& options, runs_on where)
    : terminal_(!options.quiet && ::isatty(STDERR_FILENO) == 1)
    , start_(clock::now())
    , phase_start_(start_)
    , drawn_(start_ - std::chrono::hours(1))
{
    if (options.device != "cpu") {
        if (where != runs_on::any_device) { check_cpu(options); }
        require_cuda();
    }
    (void)options.memory_bytes(); // a size that is none is wrong usage for every verb
    install_handlers();
    policy_.threads = options.threads;
    policy_.progress = [this](const taskvec::progress_event& event) { return advance(event); };
    anonymous_peak_ = status_bytes("RssAnon:");
}

runner::~runner()
{
    clear_progress();
}

double runner::seconds() const
{
    return std::chrono::duration<double>(clock::now() - start_).count();
}

bool runner::advance(const taskvec::progress_event& event)
{
    if (interrupted.load() != 0) { return false; }
    anonymous_peak_ = std::max(anonymous_peak_, status_bytes("RssAnon:"));
    if (!terminal_) { return true; }
    const auto now = clock::now();
    if (event.phase != phase_) {
        phase_ = event.phase;
        phase_start_ = now;
        drawn_ = now - std::chrono::hours(1);
    }
    if (now - drawn_ < std::chrono::milliseconds(100)) { return true; }
    drawn_ = now;
    progress_visible = true;
    const double share = event.total ? static_cast<double>(event.done) / static_cast<double>(event.total) : 1.0;
    const double elapsed = std::chrono::duration<double>(now - phase_start_).count();
    char text[160];
    int length = std::snprintf(text, sizeof text, "\r%-11s %3d%%", phase_.c_str(), static_cast<int>(100 * share));
    if (elapsed > 0.2 && share > 0) {
        const auto left = static_cast<long>(std::ceil(elapsed / share - elapsed));
        const double speed = static_cast<double>(event.done) / elapsed;
        char layers[32];
        std::snprintf(layers, sizeof layers, "%.3g layers", speed);
        const auto rate = event.unit == taskvec::progress_unit::layers ? std::string(layers)
                                                                       : size_text(static_cast<std::uint64_t>(speed));
        length += std::snprintf(text + length, sizeof text - static_cast<std::size_t>(length), "  %s/s  %ld:%02ld left",
            rate.c_str(), left / 60, left % 60);
    }
    std::snprintf(text + length, sizeof text - static_cast<std::size_t>(length), "\033[K");
    write_text(text);
    return true;
}

bool was_interrupted()
{
    return interrupted.load() != 0;
}

} // namespace tool
