// Scores from outside.
// SPDX-License-Identifier: Apache-2.0
#include "scoring.hpp"

#include "runner.hpp"
#include "words.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/formats/file.hpp>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <limits>

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

namespace tool {

namespace {

bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}
bool is_word(char c)
{
    return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'
        || (static_cast<unsigned char>(c) & 0x80u) != 0;
}

/// Text with a backslash before each of these characters.
std::string escaped(const std::string& text, std::string_view characters)
{
    std::string result;
    for (const char c : text) {
        if (characters.find(c) != characters.npos) { result += '\\'; }
        result += c;
    }
    return result;
}
/// Text as it stands for itself between double quotes.
std::string double_quoted(const std::string& text)
{
    return escaped(text, "\"\\$`");
}

using clock = std::chrono::steady_clock;

/// The process group of a command, and when it has to end.
class running_command {
public:
    running_command(pid_t group, double timeout)
        : group_(group)
    {
        if (timeout > 0 && timeout < 1e9) {
            deadline_ =
                clock::now() + std::chrono::duration_cast<clock::duration>(std::chrono::duration<double>(timeout));
        }
    }
    /// Called ten times a second or more: asks the command to end when we are asked to, or when its time is up, and
    /// kills it when it does not listen.
    void watch()
    {
        const auto now = clock::now();
        if (!asked_) {
            out_of_time_ = now >= deadline_;
            if (!out_of_time_ && !was_interrupted()) { return; }
            asked_ = true;
            kill_at_ = now + std::chrono::seconds(5);
            ::kill(-group_, SIGTERM);
        }
        else if (now >= kill_at_) {
            kill_at_ = clock::time_point::max();
            ::kill(-group_, SIGKILL);
        }
    }
    [[nodiscard]] bool out_of_time() const { return out_of_time_; }

private:
    pid_t group_;
    clock::time_point deadline_ = clock::time_point::max(), kill_at_ = clock::time_point::max();
    bool asked_ = false, out_of_time_ = false;
};

struct pipe_end {
    int handle = -1;
    pipe_end() = default;
    pipe_end(const pipe_end&) = delete;
    pipe_end& operator=(const pipe_end&) = delete;
    ~pipe_end() { close(); }
    void close()
    {
        if (handle >= 0) { ::close(handle); }
        handle = -1;
    }
};

[[noreturn]] void fail_to_start(int code)
{
    taskvec::raise<taskvec::io_error>(taskvec::error_code::program_failed,
        taskvec::message("cannot run the scoring command: ", std::strerror(code)), "", code);
}

} // namespace

void check_score_command(const std::string& command)
{
    if (command.find("{}") == command.npos) {
        throw usage_error("--score '" + command
            + "' does not say where the model's path goes: write {} there, as in --score 'python score.py {}'");
    }
}

std::optional<double> last_number(std::string_view text)
{
    std::optional<double> found;
    for (std::size_t i = 0; i < text.size();) {
        if (!is_word(text[i]) && text[i] != '.') {
            ++i;
            continue;
        }
        // A run of what words and numbers are made of, with a sign before it that is no hyphen.
        std::size_t begin = i, end = i;
        while (end < text.size()
            && (is_word(text[end]) || text[end] == '.'
                || ((text[end] == '+' || text[end] == '-') && end > begin
                    && (text[end - 1] == 'e' || text[end - 1] == 'E') && is_digit(text[begin])))) {
            ++end;
        }
        i = end;
        const bool hyphen = begin >= 2 && text[begin - 1] == '-' && is_word(text[begin - 2]);
        const bool negative = begin >= 1 && text[begin - 1] == '-';
        while (end > begin && text[end - 1] == '.') { --end; } // the end of a sentence
        if (hyphen || end == begin) { continue; }
        double value = 0;
        const auto [stop, failure] = std::from_chars(text.data() + begin, text.data() + end, value);
        if (failure == std::errc::result_out_of_range) { value = std::numeric_limits<double>::infinity(); }
        else if (failure != std::errc{}) {
            continue;
        }
        if (stop != text.data() + end) { continue; }
        found = negative ? -value : value;
    }
    return found;
}

std::string with_path(const std::string& command, const std::string& path)
{
    const bool plain =
        std::all_of(path.begin(), path.end(), [](char c) { return is_word(c) || c == '.' || c == '/' || c == '-'; });
    std::string line, open; // what is open around this place: quotes, and ( or ` around commands of their own
    for (std::size_t at = 0; at < command.size();) {
        const char c = command[at], inside = open.empty() ? ' ' : open.back();
        if (command.compare(at, 2, "{}") == 0) {
            std::string word = inside == '"' ? double_quoted(path)
                : inside == '\''             ? "'" + shell_word(path) + "'"
                                             : shell_word(path);
            for (const char around : open) {
                if (around == '`') { word = escaped(word, "\\$`"); } // which takes off one level of backslashes
            }
            line += plain ? path : word;
            at += 2;
            continue;
        }
        if (inside == '\'') {
            if (c == '\'') { open.pop_back(); }
        }
        else if (c == '\\' && at + 1 < command.size()) {
            line += command[at++];
        }
        else if (c == '"' || c == '`') {
            inside == c ? open.pop_back() : open.push_back(c);
        }
        else if (c == '(' && (inside != '"' || (at > 0 && command[at - 1] == '$'))) {
            open.push_back(c);
        }
        else if (inside == '(' && c == ')') {
            open.pop_back();
        }
        else if (inside != '"' && c == '\'') {
            open.push_back(c);
        }
        line += command[at++];
    }
    return line;
}

double run_score_command(const score_command& command, const scored_candidate& candidate)
{
    std::string line = with_path(command.text, candidate.model.string());
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) { fail_to_start(errno); }
    pipe_end in, out;
    in.handle = ends[0];
    out.handle = ends[1];

    // A process group of its own, so that an interrupt can be passed on to all that the command started.
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, out.handle, 1);
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
    posix_spawnattr_setpgroup(&attributes, 0);
    char shell[] = "sh", option[] = "-c";
    char* arguments[] = {shell, option, line.data(), nullptr};
    std::vector<std::string> added = candidate.environment;
    std::vector<char*> environment;
    for (auto& variable : added) { environment.push_back(variable.data()); }
    for (char** ours = environ; *ours; ++ours) {
        const auto same = [name = std::string_view(*ours).substr(0, std::string_view(*ours).find('=') + 1)](
                              const std::string& variable) { return variable.starts_with(name); };
        if (std::none_of(added.begin(), added.end(), same)) { environment.push_back(*ours); }
    }
    environment.push_back(nullptr);
    pid_t child = 0;
    const int failure = ::posix_spawn(&child, "/bin/sh", &actions, &attributes, arguments, environment.data());
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    if (failure != 0) { fail_to_start(failure); }
    out.close();

    std::string text;
    running_command running(child, command.timeout);
    for (bool open = true; open;) {
        running.watch();
        pollfd ready{in.handle, POLLIN, 0};
        if (::poll(&ready, 1, 100) > 0) {
            char buffer[4096];
            const auto got = ::read(in.handle, buffer, sizeof buffer);
            if (got > 0) { text.append(buffer, static_cast<std::size_t>(got)); }
            open = got > 0 || (got < 0 && errno == EINTR);
        }
        // What the command left running in the background does not keep us.
        siginfo_t ended{};
        if (open && ::waitid(P_PID, static_cast<id_t>(child), &ended, WEXITED | WNOHANG | WNOWAIT) == 0
            && ended.si_pid == child) {
            pollfd more{in.handle, POLLIN, 0};
            open = ::poll(&more, 1, 0) > 0;
        }
    }
    int status = 0;
    pid_t reaped = 0;
    while ((reaped = ::waitpid(child, &status, WNOHANG)) == 0
        || (reaped < 0 && errno == EINTR)) { // its output may be closed long before it ends
        running.watch();
        ::poll(nullptr, 0, 20);
    }
    if (was_interrupted()) { taskvec::raise<taskvec::cancelled>(taskvec::error_code::cancelled); }
    const auto& point = candidate.point;
    const auto fail = [&](const std::string& what, int code) {
        taskvec::raise<taskvec::backend_error>(
            taskvec::error_code::scoring_command, what, "the scoring command '" + printable(command.text) + "'", code);
    };
    if (running.out_of_time()) {
        fail(taskvec::message(
                 "did not end within ", command.timeout, " s for ", point, ": mend it, or give it a longer --timeout"),
            SIGTERM);
    }
    if (WIFSIGNALED(status)) {
        fail(taskvec::message("was ended by signal ", WTERMSIG(status), " for ", point), WTERMSIG(status));
    }
    if (WEXITSTATUS(status) != 0) { fail(taskvec::message("failed for ", point), WEXITSTATUS(status)); }
    const auto score = last_number(text);
    const auto printed = [&](const std::string& what) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::score_invalid,
            taskvec::message("the scoring command '", printable(command.text), "' printed ", what));
    };
    if (!score) {
        printed(taskvec::message("no number for ", point, ": the last number on its standard output is the score"));
    }
    if (!std::isfinite(*score)) { printed(taskvec::message(*score, " for ", point, ": a score is a finite number")); }
    return *score;
}

scratch_directory::scratch_directory(const fs::path& parent)
{
    for (int number = 0;; ++number) {
        // As other temporary names. Nothing after mkdir() takes memory: the directory would stay.
        path_ = parent / taskvec::message(".taskvec-", ::getpid(), "-scratch", number, ".tmp");
        if (::mkdir(path_.c_str(), 0700) == 0) { break; }
        if (errno != EEXIST) {
            taskvec::raise<taskvec::io_error>(taskvec::system_error_code(errno),
                taskvec::message("cannot make a temporary directory in it: ", std::strerror(errno)), parent.string(),
                errno);
        }
    }
    guard_temporary(path_);
}

scratch_directory::~scratch_directory()
{
    taskvec::remove_temporary(path_.c_str()); // with its contents, and without memory
    release_temporary(path_);
}

} // namespace tool
