// What the tool writes, seen from outside: all of it or none of it, and nothing over what is read.
// SPDX-License-Identifier: Apache-2.0
#include "../skip.hpp"
#include "run_tool.hpp"

#include <algorithm>
#include <cstdlib>

#include <sys/stat.h>

using namespace tools_test;

namespace {

struct output_models {
    scratch folder;
    values_model base = sample_base();

    output_models()
    {
        write_values(folder / "base.safetensors", base);
        write_values(folder / "a.safetensors", sample_task(base, 50));
        write_values(folder / "b.safetensors", sample_task(base, 51));
    }
};

const std::vector<std::vector<std::string>> verbs{
    {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--out", "out", "--report",
        "r.json"},
    {"merge", "--method", "average", "--task", "a.safetensors", "--out", "new/deep", "--shard-size", "3kB"},
    {"prune", "--base", "base.safetensors", "--task", "a.safetensors", "--out", "out", "--report", "r.json"},
    {"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--out", "new/deep",
        "--report", "r.json"},
    {"similarity", "--base", "base.safetensors", "--task", "a.safetensors", "--task", "b.safetensors", "--csv", "c.csv",
        "--report", "r.json"},
};

std::string shell_quoted(const std::string& word)
{
    std::string result = "'";
    for (const char c : word) { result += c == '\'' ? std::string("'\\''") : std::string(1, c); }
    return result + "'";
}

/// Runs the tool through the shell, for redirections; its exit code.
int run_redirected(const scratch& folder, const std::vector<std::string>& arguments, const std::string& redirection)
{
    std::string command = "cd " + shell_quoted(folder.path().string()) + " && " + shell_quoted(TASKVEC_TOOL);
    for (const auto& argument : arguments) { command += " " + shell_quoted(argument); }
    const int status = std::system((command + " " + redirection).c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// All files and directories below a folder.
std::set<std::string> everything_in(const std::filesystem::path& folder)
{
    std::set<std::string> result;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
        result.insert(std::filesystem::relative(entry, folder).string());
    }
    return result;
}

} // namespace

TEST_CASE("what cannot be said was not done: a full standard output changes no file")
{
    if (!std::filesystem::exists("/dev/full")) {
        testing::skip("standard output was not filled: there is no /dev/full here");
        return;
    }
    for (const auto& arguments : verbs) {
        const output_models m;
        const auto before = everything_in(m.folder.path());
        CAPTURE(arguments[0]);
        CHECK(run_redirected(m.folder, arguments, "> /dev/full 2> /dev/null") == 1);
        CHECK(everything_in(m.folder.path()) == before);
        CHECK(run_redirected(m.folder, arguments, "> /dev/null") == 0); // the same command is good otherwise
        CHECK(everything_in(m.folder.path()) != before);
    }
}

TEST_CASE("nothing is said to be done before the report that goes with it is written")
{
    if (!std::filesystem::exists("/dev/full")) {
        testing::skip("no report failed: there is no /dev/full here");
        return;
    }
    for (auto arguments : verbs) {
        const auto report = std::find(arguments.begin(), arguments.end(), "--report");
        if (report == arguments.end()) { continue; }
        *(report + 1) = "/dev/full";
        const output_models m;
        const auto before = everything_in(m.folder.path());
        const auto result = run(m.folder, arguments);
        CAPTURE(arguments[0]);
        CAPTURE(result.err);
        CHECK(result.code == 1);
        CHECK(result.out.empty());
        CHECK(everything_in(m.folder.path()) == before);
    }
}

TEST_CASE("directories that were made for an output go with it when the work fails")
{
    const output_models m;
    auto damaged = m.base;
    damaged["layers.1.weight"].values[4000] = std::numeric_limits<float>::quiet_NaN();
    write_values(m.folder / "nan.safetensors", damaged);
    const auto before = everything_in(m.folder.path());
    for (const std::vector<std::string>& how :
        {std::vector<std::string>{"peru-fft"}, {"merge", "--shard-size", "3kB"}}) {
        auto arguments = how;
        for (const char* word : {"--method", "task-arithmetic", "--base", "base.safetensors", "--task",
                 "nan.safetensors", "--out", "x/y/z"}) {
            arguments.emplace_back(word);
        }
        const auto result = run(m.folder, arguments);
        CAPTURE(result.err);
        CHECK(result.code == 1);
        CHECK(everything_in(m.folder.path()) == before);
    }
}

TEST_CASE("two options never write to one file, and only a model replaces what is read")
{
    const output_models m;
    const auto before = everything_in(m.folder.path());
    const std::string read = slurp(m.folder / "base.safetensors");
    const std::vector<std::vector<std::string>> clashes{
        {"merge", "--method", "average", "--task", "a.safetensors", "--out", "o", "--report", "./o"},
        {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--out", "o", "--report",
            "base.safetensors"},
        {"prune", "--base", "base.safetensors", "--task", "a.safetensors", "--out", "base.safetensors"},
        {"similarity", "--base", "base.safetensors", "--task", "a.safetensors", "--csv", "base.safetensors"},
        {"similarity", "--base", "base.safetensors", "--task", "a.safetensors", "--csv", "x", "--svg", "x"},
        {"similarity", "--base", "base.safetensors", "--task", "a.safetensors", "--csv", "x", "--report", "x"},
    };
    for (const auto& arguments : clashes) {
        for (const bool dry : {false, true}) {
            auto words = arguments;
            if (dry) { words.emplace_back("--dry-run"); }
            const auto result = run(m.folder, words);
            CAPTURE(result.err);
            CHECK(result.code == 1);
            CHECK(is_error_line(result.err));
            CHECK(everything_in(m.folder.path()) == before);
            CHECK(slurp(m.folder / "base.safetensors") == read);
        }
    }
}

TEST_CASE("an output directory that the tool is run in stays the directory that it is")
{
    const output_models m;
    const auto inode = [&] {
        struct stat found{};
        REQUIRE(::stat(m.folder.path().c_str(), &found) == 0);
        return found.st_ino;
    };
    const auto before = inode();
    const std::string name = m.folder.path().filename().string();
    std::filesystem::create_symlink(name, m.folder.path().string() + ".link");
    values_model merged;
    for (const auto& out :
        std::vector<std::string>{".", "./", "../" + name, m.folder.path().string(), "../" + name + ".link"}) {
        CAPTURE(out);
        const auto result = run(m.folder,
            {"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "a.safetensors", "--out",
                out, "--report", "r.json"});
        CAPTURE(result.err);
        CHECK(result.code == 0);
        CHECK(inode() == before);
        const auto written = read_values(m.folder / "model.safetensors");
        if (merged.empty()) { merged = written; }
        CHECK(same(written, merged));
        std::filesystem::remove(m.folder / "model.safetensors");
    }
    std::filesystem::remove(m.folder.path().string() + ".link");
    REQUIRE(run(m.folder,
                {"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "a.safetensors",
                    "--out", ".", "--shard-size", "3kB"})
                .code
        == 0);
    CHECK(std::filesystem::exists(m.folder / "model.safetensors.index.json"));
    CHECK(inode() == before);
    CHECK(same(read_values(m.folder / "base.safetensors"), m.base));
    for (const auto& file : everything_in(m.folder.path())) {
        CHECK_FALSE(file.ends_with(".tmp"));
        if (file.starts_with("model")) { std::filesystem::remove(m.folder / file); }
    }
    REQUIRE(run(m.folder,
                {"peru-fft", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "a.safetensors",
                    "--out", "."})
                .code
        == 0);
    CHECK(std::filesystem::exists(m.folder / "a.delta.safetensors"));
    CHECK(inode() == before);
}

TEST_CASE("a name that ends in .safetensors is a file's")
{
    const output_models m;
    std::filesystem::create_directories(m.folder / "model");
    std::filesystem::rename(m.folder / "b.safetensors", m.folder / "model/model.safetensors");
    std::filesystem::create_directory(m.folder / "d.safetensors");
    const auto before = everything_in(m.folder.path());
    for (const std::string task : {"a.safetensors", "model"}) {
        const auto merged = [&](const std::vector<std::string>& more) {
            std::vector<std::string> words{"merge", "--method", "average", "--task", task};
            words.insert(words.end(), more.begin(), more.end());
            return run(m.folder, words);
        };
        CAPTURE(task);
        for (const std::string out : {"o.safetensors", "d.safetensors", "o.st"}) {
            const auto sharded = merged({"--out", out, "--shard-size", "5GB"});
            CAPTURE(sharded.err);
            CHECK(sharded.code == 2);
            CHECK(is_usage_error(sharded.err));
            CHECK(sharded.err.find("--out '" + out + "' names a file, and --shard-size makes a directory")
                != std::string::npos);
        }
        const auto there = merged({"--out", "d.safetensors"});
        CAPTURE(there.err);
        CHECK(there.code == 1);
        CHECK(there.err.find("d.safetensors: is a directory") != std::string::npos);
        CHECK(there.err.find("[file-kind]") != std::string::npos);
        CHECK(everything_in(m.folder.path()) == before);
    }
    // With a '/' behind it, it is the directory that it says.
    REQUIRE(run(m.folder, {"merge", "--method", "average", "--task", "a.safetensors", "--out", "d.safetensors/"}).code
        == 0);
    CHECK(std::filesystem::exists(m.folder / "d.safetensors/model.safetensors"));
}
