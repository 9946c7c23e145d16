// The tool when it is killed, interrupted, or its input shrinks: the old output or the new one, never a half.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <csignal>

using namespace tools_test;

namespace {

/// A model of zeros that takes no room on disk, and long enough to merge.
void write_zeros(const std::filesystem::path& path, std::int64_t elements)
{
    const auto layout = taskvec::layout_safetensors({{"w", taskvec::dtype::bf16, {elements}}});
    spill(path, layout.head);
    std::filesystem::resize_file(path, layout.size);
}

std::vector<std::string> merge_arguments()
{
    return {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--out",
        "out.safetensors", "--threads", "1"};
}

bool temporary_exists(const scratch& folder)
{
    for (const auto& name : folder.names()) {
        if (name.starts_with(".taskvec-")) { return true; }
    }
    return false;
}

} // namespace

TEST_CASE("killed at any moment, the tool leaves the old output or the new one")
{
    const scratch folder;
    write_zeros(folder / "base.safetensors", 4'000'000);
    write_zeros(folder / "a.safetensors", 4'000'000);
    write_values(folder / "out.safetensors", sample_base());
    const auto old = slurp(folder / "out.safetensors");
    for (int round = 0; round < 12; ++round) {
        process tool(folder, merge_arguments());
        ::usleep(static_cast<useconds_t>(4000 * round));
        tool.send(SIGKILL);
        tool.wait();
        const auto now = slurp(folder / "out.safetensors");
        if (now != old) {
            const taskvec::safetensors_file out(folder / "out.safetensors");
            CHECK(out.model()[0].tensor.size() == 4'000'000);
        }
        spill(folder / "out.safetensors", old);
    }
}

TEST_CASE("interrupted, the tool says so and cleans up")
{
    const scratch folder;
    write_zeros(folder / "base.safetensors", 40'000'000);
    write_zeros(folder / "a.safetensors", 40'000'000);
    for (const int signal : {SIGINT, SIGTERM}) {
        process tool(folder, merge_arguments());
        while (!temporary_exists(folder) && !tool.ended()) { ::usleep(200); }
        tool.send(signal);
        const auto result = tool.wait();
        CAPTURE(result.err);
        CHECK(result.code == 1);
        CHECK(result.err == "taskvec: error: interrupted; no output was written\n");
        CHECK(folder.names() == std::set<std::string>{"a.safetensors", "base.safetensors"});
    }
}

TEST_CASE("an input that shrinks while it is read is an error that names it")
{
    const scratch folder;
    write_zeros(folder / "base.safetensors", 40'000'000);
    int seen = 0;
    for (int round = 0; round < 5 && seen == 0; ++round) {
        write_zeros(folder / "a.safetensors", 40'000'000);
        process tool(folder, merge_arguments());
        while (!temporary_exists(folder) && !tool.ended()) { ::usleep(200); }
        std::filesystem::resize_file(folder / "a.safetensors", 4096);
        const auto result = tool.wait();
        CAPTURE(result.err);
        CHECK((result.code == 0 || result.code == 1));
        if (result.code == 1) {
            ++seen;
            CHECK(is_error_line(result.err));
            CHECK(result.err.find("a.safetensors: the file shrank") != std::string::npos);
            CHECK(folder.names() == std::set<std::string>{"a.safetensors", "base.safetensors"});
        }
        std::filesystem::remove(folder / "out.safetensors");
    }
    CHECK(seen > 0);
}

TEST_CASE("a directory that was made for the output goes when an input shrinks")
{
    const scratch folder;
    write_zeros(folder / "base.safetensors", 40'000'000);
    int seen = 0;
    for (int round = 0; round < 5 && seen == 0; ++round) {
        write_zeros(folder / "a.safetensors", 40'000'000);
        process tool(folder,
            {"peru-fft", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "a.safetensors",
                "--out", "new/reuse", "--threads", "1"});
        while (!std::filesystem::exists(folder / "new") && !tool.ended()) { ::usleep(200); }
        std::filesystem::resize_file(folder / "a.safetensors", 4096);
        const auto result = tool.wait();
        CAPTURE(result.err);
        CHECK((result.code == 0 || result.code == 1));
        if (result.code == 1) {
            ++seen;
            CHECK(result.err.find("the file shrank") != std::string::npos);
            CHECK(folder.names() == std::set<std::string>{"a.safetensors", "base.safetensors"});
        }
        std::filesystem::remove_all(folder / "new");
    }
    CHECK(seen > 0);
}
