// Scores from outside.
// SPDX-License-Identifier: Apache-2.0
#include "scoring.hpp"

#include <cerrno>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace tool {

namespace {

/// Text as one word of the shell.
std::string shell_quoted(const std::string& text)
{
    std::string quoted = "'";
    for (const char c : text) { quoted += c == '\'' ? std::string("'\\''") : std::string(1, c); }
    return quoted + "'";
}

bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}
bool is_word(char c)
{
    return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (static_cast<unsigned char>(c) & 0x80u) != 0;
}

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
    taskvec::raise<taskvec::io_error>(taskvec::message("cannot run the scoring command: ", std::strerror(code)), "", code);
}

} // namespace

void check_score_command(const std::string& command)
{
    if (command.find("{}") == command.npos) {
        throw usage_error("--score '" + command + "' does not say where the model's path goes: write {} there, as in --score 'python score.py {}'");
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
                || ((text[end] == '+' || text[end] == '-') && end > begin && (text[end - 1] == 'e' || text[end - 1] == 'E') && is_digit(text[begin])))) {
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

double run_score_command(const std::string& command, const fs::path& model, const std::string& point)
{
    std::string line;
    for (std::size_t at = 0; at < command.size();) {
        if (command.compare(at, 2, "{}") == 0) {
            line += shell_quoted(model.string());
            at += 2;
        }
        else {
            line += command[at++];
        }
    }
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
    pid_t child = 0;
    const int failure = ::posix_spawn(&child, "/bin/sh", &actions, &attributes, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
    if (failure != 0) { fail_to_start(failure); }
    out.close();

    std::string text;
    bool stopped = false;
    for (bool open = true; open;) {
        if (was_interrupted() && !std::exchange(stopped, true)) { ::kill(-child, SIGTERM); }
        pollfd ready{in.handle, POLLIN, 0};
        if (::poll(&ready, 1, 100) > 0) {
            char buffer[4096];
            const auto got = ::read(in.handle, buffer, sizeof buffer);
            if (got > 0) { text.append(buffer, static_cast<std::size_t>(got)); }
            open = got > 0 || (got < 0 && errno == EINTR);
        }
        // What the command left running in the background does not keep us.
        siginfo_t ended{};
        if (open && ::waitid(P_PID, static_cast<id_t>(child), &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && ended.si_pid == child) {
            pollfd more{in.handle, POLLIN, 0};
            open = ::poll(&more, 1, 0) > 0;
        }
    }
    int status = 0;
    pid_t reaped = 0;
    while ((reaped = ::waitpid(child, &status, WNOHANG)) == 0 || (reaped < 0 && errno == EINTR)) { // its output may be closed long before it ends
        if (was_interrupted() && !std::exchange(stopped, true)) { ::kill(-child, SIGTERM); }
        ::poll(nullptr, 0, 20);
    }
    if (was_interrupted()) { taskvec::raise<taskvec::cancelled>(); }
    if (WIFSIGNALED(status)) {
        taskvec::raise<taskvec::backend_error>(
            taskvec::message("was ended by signal ", WTERMSIG(status), " for ", point), "the scoring command '" + command + "'", WTERMSIG(status));
    }
    if (WEXITSTATUS(status) != 0) {
        taskvec::raise<taskvec::backend_error>(taskvec::message("failed for ", point), "the scoring command '" + command + "'", WEXITSTATUS(status));
    }
    const auto score = last_number(text);
    if (!score) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::message("the scoring command '", command, "' printed no number for ", point, ": the last number on its standard output is the score"));
    }
    if (!std::isfinite(*score)) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::message("the scoring command '", command, "' printed ", *score, " for ", point, ": a score is a finite number"));
    }
    return *score;
}

scratch_directory::scratch_directory(const fs::path& parent)
{
    auto name = (parent / "taskvec-sweep-XXXXXX").string();
    if (!::mkdtemp(name.data())) {
        taskvec::raise<taskvec::io_error>(taskvec::message("cannot make a directory for candidates in it: ", std::strerror(errno)), parent.string(), errno);
    }
    path_ = name;
}

scratch_directory::~scratch_directory()
{
    std::error_code ignored;
    fs::remove_all(path_, ignored);
}

} // namespace tool
