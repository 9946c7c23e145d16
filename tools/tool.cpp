// What the verbs share.
// SPDX-License-Identifier: Apache-2.0
#include "device.hpp"
#include "scoring.hpp"

#include <taskvec/core/parallel.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include <sys/resource.h>
#include <unistd.h>

namespace tool {

namespace {

struct verb_entry {
    int place;
    void (*add)(CLI::App&);
};
std::vector<verb_entry>& verbs()
{
    static std::vector<verb_entry> list;
    return list;
}

// Signals. Handlers may touch only what is here: plain arrays, filled before they are needed.

struct mapped_range {
    std::atomic<const std::byte*> begin{nullptr};
    const std::byte* end = nullptr;
    const char* path = nullptr;
};
std::array<mapped_range, 4096> mapped_ranges;
std::atomic<std::size_t> mapped_count{0};
std::array<std::atomic<const char*>, 4096> temporaries;
std::atomic<std::size_t> temporary_count{0};
std::atomic<int> interrupted{0};
bool progress_visible = false;

void write_text(const char* text)
{
    [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text, std::strlen(text));
}

void clear_progress()
{
    if (std::exchange(progress_visible, false)) { write_text("\r\033[K"); }
}

extern "C" void on_interrupt(int signal)
{
    // A second time: leave at once; temporary files stay, as when the process is killed.
    if (interrupted.exchange(signal) != 0) { ::_exit(1); }
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
    for (std::size_t i = temporary_count.load(); i-- > 0;) { // what lies in a directory comes after it
        const char* name = temporaries[i].load();
        if (name && ::unlink(name) != 0) { ::rmdir(name); }
    }
    ::_exit(1);
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
        for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
            struct sigaction before{};
            ::sigaction(signal, nullptr, &before);
            if (before.sa_handler != SIG_IGN) { ::sigaction(signal, &stop, nullptr); }
        }
        return true;
    }();
    (void)once;
}

/// A string that is never freed: handlers may read it at any time.
const char* keep(const std::string& text)
{
    char* copy = static_cast<char*>(std::malloc(text.size() + 1));
    if (copy) { std::memcpy(copy, text.c_str(), text.size() + 1); }
    return copy;
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

/// Where two paths lead, as far as they exist.
fs::path place_of(const fs::path& path)
{
    std::error_code failure;
    auto place = fs::weakly_canonical(fs::absolute(path.has_filename() ? path : path.parent_path(), failure), failure);
    return failure ? path : place;
}
/// What --out and its like have named so far, and the files that were opened.
std::vector<std::pair<fs::path, std::string>>& claimed()
{
    static std::vector<std::pair<fs::path, std::string>> list;
    return list;
}
std::vector<fs::path>& opened()
{
    static std::vector<fs::path> list;
    return list;
}

std::optional<double> whole_number(std::string_view text)
{
    if (text.starts_with('+')) { text.remove_prefix(1); }
    double value = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || failure != std::errc{} || end != text.data() + text.size() || !std::isfinite(value)) {
        return std::nullopt;
    }
    return value;
}

} // namespace

register_verb::register_verb(int place, void (*add)(CLI::App&))
{
    verbs().push_back({place, add});
}

void add_verbs(CLI::App& app)
{
    std::sort(
        verbs().begin(), verbs().end(), [](const verb_entry& a, const verb_entry& b) { return a.place < b.place; });
    for (const auto& verb : verbs()) { verb.add(app); }
}

task_argument parse_task(const std::string& text, const std::string& option)
{
    task_argument task;
    const auto sign = text.rfind('=');
    const auto weight = sign == text.npos ? std::nullopt : whole_number(std::string_view(text).substr(sign + 1));
    task.path = weight ? text.substr(0, sign) : text;
    if (weight) { task.weight = *weight; }
    if (task.path.empty()) {
        throw usage_error(option + " '" + text + "' names no model; expected PATH or PATH=WEIGHT");
    }
    std::error_code ignored;
    auto whole = fs::absolute(task.path, ignored).lexically_normal();
    if (!whole.has_filename()) { whole = whole.parent_path(); } // "dir/"
    const bool by_directory = !fs::is_directory(task.path, ignored) && whole.stem() == "model";
    if (by_directory) { whole = whole.parent_path(); }
    task.name =
        by_directory || fs::is_directory(task.path, ignored) ? whole.filename().string() : whole.stem().string();
    return task;
}

std::vector<task_argument> parse_tasks(const std::vector<std::string>& texts)
{
    std::vector<task_argument> tasks;
    std::map<std::string, fs::path> seen;
    for (const auto& text : texts) {
        tasks.push_back(parse_task(text));
        const auto& task = tasks.back();
        const auto [place, fresh] = seen.emplace(task.name, task.path);
        if (!fresh) {
            taskvec::raise<taskvec::invalid_argument>(
                taskvec::message("tasks '", place->second.string(), "' and '", task.path.string(), "' are both named '",
                    task.name, "': rename one, since tasks are told apart by name"));
        }
    }
    return tasks;
}

std::uint64_t parse_size(const std::string& text, const std::string& option)
{
    const auto fail = [&] {
        throw usage_error(option + " is '" + text + "'; expected a size such as 5GB, 256MiB or 1000000");
    };
    double number = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (failure != std::errc{} || !(number > 0)) { fail(); }
    std::string unit(end, text.data() + text.size());
    unit.erase(0, unit.find_first_not_of(' ') == unit.npos ? unit.size() : unit.find_first_not_of(' '));
    for (auto& c : unit) { c = static_cast<char>(std::tolower(static_cast<unsigned char>(c))); }
    if (unit.ends_with('b')) { unit.pop_back(); }
    const double base = unit.ends_with('i') ? 1024 : 1000;
    if (unit.ends_with('i')) { unit.pop_back(); }
    const auto power = std::string_view("kmgt").find(unit);
    if (unit.size() > 1 || (unit.size() == 1 && power == std::string_view::npos)) { fail(); }
    if (unit.size() == 1) { number *= std::pow(base, static_cast<double>(power) + 1); }
    if (!(number >= 1) || number >= 9.2e18) { fail(); }
    return static_cast<std::uint64_t>(number);
}

CLI::Validator decimal_number()
{
    return CLI::Validator(
        [](std::string& text) {
            std::uint64_t value = 0;
            const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
            if (failure != std::errc{} || end != text.data() + text.size()) {
                return "'" + text + "' is not a whole number from 0 to 18446744073709551615";
            }
            text = std::to_string(value);
            return std::string();
        },
        "");
}

void add_quiet(CLI::App& verb, run_options& options)
{
    verb.add_flag("--quiet", options.quiet, "No progress and no notes");
}

void add_run_options(CLI::App& verb, run_options& options)
{
    verb.add_option(
            "--threads", options.threads, "Threads; results do not depend on it (default: one for each processor)")
        ->type_name("N")
        ->transform(decimal_number());
    verb.add_option("--device", options.device, "cpu or cuda: where merges and pruning run (default: cpu)")
        ->type_name("DEVICE")
        ->check([](const std::string& text) {
            return text == "cpu" || text == "cuda" ? std::string()
                                                   : "'" + text + "' is not a device; expected cpu or cuda";
        });
    verb.add_option("--memory", options.memory, "Budget of anonymous memory (default: 256MiB)")->type_name("SIZE");
    verb.add_option("--report", options.report, "Write what was done as JSON: seconds, bytes, memory, counts, norms")
        ->type_name("FILE");
    verb.add_flag(
        "--dry-run", options.dry_run, "Check everything that can be checked, say what would be done, write nothing");
    add_quiet(verb, options);
}

void guard_map(const taskvec::mapped_file& map)
{
    install_handlers();
    const auto bytes = map.bytes();
    opened().push_back(place_of(map.path()));
    const auto index = mapped_count.load();
    if (bytes.empty() || index == mapped_ranges.size()) { return; }
    mapped_ranges[index].end = bytes.data() + bytes.size();
    mapped_ranges[index].path = keep(printable(map.path().string()));
    mapped_ranges[index].begin = bytes.data();
    mapped_count = index + 1;
}

taskvec::checkpoint open_model(const fs::path& path)
{
    install_handlers();
    auto model = taskvec::open_model(path);
    for (const auto& file : model.files()) { guard_map(file.map()); }
    return model;
}

void claim_output(const fs::path& path, const std::string& option, output_kind kind)
{
    if (path.empty()) { throw usage_error(option + " is empty; expected a path"); }
    if (kind == output_kind::model && !path.has_filename()) { kind = output_kind::directory; }
    const auto place = place_of(path);
    for (const auto& [other, owner] : claimed()) {
        if (other == place) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::message(
                option, " '", path.string(), "' is also what ", owner, " asks for: give each its own"));
        }
    }
    const auto& inputs = opened();
    if (kind == output_kind::file && std::find(inputs.begin(), inputs.end(), place) != inputs.end()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::message(option, " '", path.string(),
            "' is one of the files that are read, and only a model may replace it: choose another path"));
    }
    claimed().emplace_back(place, option);
    std::error_code ignored;
    const auto status = fs::status(path, ignored);
    if (fs::exists(status)) {
        const bool fits = kind == output_kind::directory ? fs::is_directory(status)
            : kind == output_kind::model                 ? fs::is_directory(status) || fs::is_regular_file(status)
                                                         : fs::is_regular_file(status);
        if (!fits) {
            taskvec::raise<taskvec::io_error>(kind == output_kind::directory
                    ? "exists and is not a directory; choose another output"
                    : "exists and is not a regular file; choose another output",
                path.string(), kind == output_kind::directory ? ENOTDIR : EEXIST);
        }
        if (::access(path.c_str(), W_OK) != 0) {
            taskvec::detail::raise_io(path, "exists and may not be written", errno);
        }
        if (fs::is_directory(status)) { return; }
    }
    auto folder = taskvec::detail::directory_of(place);
    while (kind == output_kind::directory && !fs::exists(folder, ignored) && folder.has_relative_path()) {
        folder = folder.parent_path();
    }
    if (::access(folder.c_str(), W_OK | X_OK) != 0 || !fs::is_directory(folder, ignored)) {
        taskvec::detail::raise_io(path, "cannot create a file in directory '" + folder.string() + "'",
            fs::exists(folder, ignored) && !fs::is_directory(folder, ignored) ? ENOTDIR : errno);
    }
}

void claim_report(const run_options& options)
{
    if (!options.report.empty()) { claim_output(options.report, "--report"); }
}

void guard_temporary(const fs::path& path)
{
    install_handlers();
    const auto index = temporary_count.load();
    if (path.empty() || index == temporaries.size()) { return; }
    temporaries[index] = keep(path.string());
    temporary_count = index + 1;
}

model_output::model_output(fs::path path, const std::vector<taskvec::tensor_spec>& specs,
    const taskvec::metadata_map& metadata, const std::string& shard_size)
    : path_(std::move(path))
{
    std::error_code ignored;
    if (!shard_size.empty()) {
        shards_ =
            std::make_unique<taskvec::sharded_writer>(path_, specs, parse_size(shard_size, "--shard-size"), metadata);
    }
    else if (!path_.has_filename() || fs::is_directory(path_, ignored)) {
        shards_ = std::make_unique<taskvec::sharded_writer>(
            path_, specs, std::numeric_limits<std::uint64_t>::max(), metadata);
    }
    else {
        file_ = std::make_unique<taskvec::safetensors_writer>(path_, specs, metadata);
        guard_temporary(file_->temporary());
        return;
    }
    for (const auto& temporary : shards_->temporaries()) { guard_temporary(temporary); }
}

taskvec::tensor_sink& model_output::sink()
{
    if (file_) { return *file_; }
    return *shards_;
}

void model_output::finish()
{
    file_ ? file_->finish() : shards_->finish();
}

taskvec::checkpoint model_output::reopen() const
{
    std::vector<taskvec::safetensors_file> files;
    if (file_) { files.emplace_back(file_->temporary()); }
    else {
        for (const auto& temporary : shards_->shard_temporaries()) { files.emplace_back(temporary); }
    }
    return {path_, std::move(files)};
}

void model_output::commit()
{
    file_ ? file_->commit() : shards_->commit();
}

std::uint64_t model_output::file_size() const
{
    return file_ ? file_->file_size() : shards_->file_size();
}

runner::runner(const run_options& options, runs_on where)
    : terminal_(!options.quiet && ::isatty(STDERR_FILENO) == 1)
    , start_(clock::now())
    , phase_start_(start_)
    , drawn_(start_ - std::chrono::hours(1))
{
    if (options.device != "cpu") {
        if (where != runs_on::any_device) {
            taskvec::raise<taskvec::invalid_argument>(
                "--device cuda: only merge, prune and peru-fft run there; leave --device out");
        }
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

void note(const run_options& options, const std::string& text)
{
    if (options.quiet) { return; }
    clear_progress();
    std::fprintf(stderr, "taskvec: note: %s\n", printable(text).c_str());
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

std::size_t text_width(std::string_view text)
{
    return static_cast<std::size_t>(std::count_if(
        text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u; }));
}

void print(const std::string& text)
{
    clear_progress();
    if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
        taskvec::raise<taskvec::io_error>(
            taskvec::message("cannot write to standard output: ", std::strerror(errno)), "", errno);
    }
}

report_file::report_file(const std::string& path)
{
    if (path.empty()) { return; }
    file_ = std::make_unique<taskvec::atomic_file>(path);
    guard_temporary(file_->temporary());
}

void report_file::finish(const nlohmann::ordered_json& content)
{
    if (wanted()) {
        finish_text(
            std::string_view(content.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n"));
    }
}

void report_file::finish_text(std::string_view text)
{
    if (!file_) { return; }
    file_->write(0, text.data(), text.size());
    file_->finish();
}

void report_file::commit()
{
    if (file_) { file_->commit(); }
}

std::uint64_t peak_memory()
{
    return status_bytes("VmHWM:");
}

} // namespace tool
