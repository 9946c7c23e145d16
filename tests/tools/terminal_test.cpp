// What the tool draws on a terminal. A file of its own, because not every machine opens a pseudo terminal.
// SPDX-License-Identifier: Apache-2.0
#include "../skip.hpp"
#include "run_tool.hpp"

#include <poll.h>
#include <sys/ioctl.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

using namespace tools_test;

namespace {

/// A pseudo terminal, both of its ends open: what is written to `name` waits here after the writer has gone.
class pseudo_terminal {
public:
    pseudo_terminal()
    {
        terminal_ = ::posix_openpt(O_RDWR | O_NOCTTY);
        const char* name =
            terminal_ >= 0 && ::grantpt(terminal_) == 0 && ::unlockpt(terminal_) == 0 ? ::ptsname(terminal_) : nullptr;
        if (name) {
            name_ = name;
            other_end_ = ::open(name, O_RDWR | O_NOCTTY);
        }
        if (other_end_ < 0) { trouble_ = std::strerror(errno); }
    }
    ~pseudo_terminal()
    {
        if (other_end_ >= 0) { ::close(other_end_); }
        if (terminal_ >= 0) { ::close(terminal_); }
    }
    pseudo_terminal(const pseudo_terminal&) = delete;
    pseudo_terminal& operator=(const pseudo_terminal&) = delete;

    /// Why there is none; empty if there is one.
    [[nodiscard]] const std::string& trouble() const { return trouble_; }
    [[nodiscard]] const std::string& name() const { return name_; }
    /// What was written to it so far. The system passes it on in parts, and a little later on a busy machine.
    [[nodiscard]] std::string written() const
    {
        std::string text;
        char part[4096];
        for (::pollfd ready{terminal_, POLLIN, 0}; ::poll(&ready, 1, 300) > 0;) {
            const auto got = ::read(terminal_, part, sizeof part);
            if (got <= 0) { break; }
            text.append(part, static_cast<std::size_t>(got));
        }
        return text;
    }

private:
    int terminal_ = -1, other_end_ = -1;
    std::string name_, trouble_;
};

/// What a merge draws on it.
std::string drawn_on(const pseudo_terminal& terminal, bool quiet)
{
    const scratch folder;
    const auto base = sample_base();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "a.safetensors", sample_task(base, 50));
    const std::string command = "cd '" + folder.path().string() + "' && '" + TASKVEC_TOOL
        + "' merge --method ties --base base.safetensors --task a.safetensors --out out" + (quiet ? " --quiet" : "")
        + " > /dev/null 2> " + terminal.name();
    CAPTURE(command);
    CHECK(std::system(command.c_str()) == 0);
    return terminal.written();
}

} // namespace

TEST_CASE("on a terminal, progress is drawn and wiped again; --quiet leaves it out")
{
    const pseudo_terminal terminal;
    if (!terminal.trouble().empty()) {
        testing::skip("progress was not looked at: no pseudo terminal opens here (" + terminal.trouble() + ")");
        return;
    }
    const auto loud = drawn_on(terminal, false);
    CHECK(loud.find("merge") != std::string::npos);
    CHECK(loud.find('%') != std::string::npos);
    CHECK(loud.ends_with("\r\033[K"));
    CHECK(drawn_on(terminal, true).empty());
}

TEST_CASE("tables keep within a terminal, whose headers stand out")
{
    const pseudo_terminal terminal;
    if (!terminal.trouble().empty()) {
        testing::skip("no pseudo terminal: " + terminal.trouble());
        return;
    }
    const scratch folder;
    const std::string name = "model.layers.0." + std::string(60, 'x') + ".q_proj.weight";
    write_values(folder / "a.safetensors", {{name, {taskvec::dtype::f32, {1}, {1}}}});
    const auto shown = [&](const std::vector<std::string>& environment, unsigned short columns) {
        const int end = ::open(terminal.name().c_str(), O_RDWR | O_NOCTTY);
        const struct winsize size{24, columns, 0, 0};
        REQUIRE(::ioctl(end, TIOCSWINSZ, &size) == 0);
        ::close(end);
        std::string line = "exec '" + std::string(TASKVEC_TOOL) + "' inspect a.safetensors > " + terminal.name();
        std::vector<std::string> variables = environment;
        process child(folder, {"-c", line}, variables, "/bin/sh");
        CHECK(child.wait().code == 0);
        return terminal.written();
    };
    const auto narrow = shown({"TERM=xterm", "NO_COLOR="}, 60);
    CHECK(narrow.starts_with("\x1b[1mname"));
    CHECK(narrow.find(name) == std::string::npos);
    CHECK(narrow.find("model.layers.0.xx") != std::string::npos);
    CHECK(narrow.find("q_proj.weight") != std::string::npos);
    CHECK(narrow.find("…") != std::string::npos);
    const auto plain = shown({"TERM=xterm", "NO_COLOR=1"}, 200);
    CHECK(plain.starts_with("name"));
    CHECK(plain.find(name) != std::string::npos);
    CHECK(run(folder, {"inspect", "a.safetensors"}).out.find(name) != std::string::npos);
}
