// The tool when it is killed, interrupted, or its input shrinks: the old output or the new one, never a half.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <random>

using namespace tools_test;

namespace {

/// A model of zeros that takes no room on disk, and long enough to merge. A task has another last element than the
/// base, of which it would be noted as a copy.
void write_zeros(const std::filesystem::path& path, std::int64_t elements)
{
    const auto layout = taskvec::layout_safetensors({{"w", taskvec::dtype::bf16, {elements}}});
    spill(path, layout.head);
    std::filesystem::resize_file(path, layout.size);
    if (path.filename() == "base.safetensors") { return; }
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(layout.size) - 1);
    file.put('\1');
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
    for (const int signal : {SIGINT, SIGTERM, SIGXCPU, SIGUSR1, SIGALRM}) {
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

TEST_CASE("killed at random moments, sharded merges leave the old model or the new one, and clean removes the rest")
{
    const char* const wanted = std::getenv("TASKVEC_KILLS"); // the nightly test: 1,000
    const int rounds = wanted ? std::atoi(wanted) : 20;
    const scratch folder;
    values_model base;
    for (const char* name : {"a", "b", "c", "d"}) {
        base[name] = {taskvec::dtype::f32, {wanted ? 300'000 : 100'000}, {}};
        base[name].values.assign(taskvec::element_count(base[name].shape), 0.5f);
    }
    auto other = base;
    for (auto& [name, tensor] : other) { tensor.values.assign(tensor.values.size(), 2.0f); }
    for (const auto& [name, model] : {std::pair{"base", &base}, std::pair{"other", &other}}) {
        std::filesystem::create_directory(folder / name);
        write_values(folder / name / "model.safetensors", *model);
        spill(folder / name / "config.json", std::string("{\"of\": \"") + name + "\"}");
    }
    // Two models in turn, of different numbers of shards, into one directory.
    const auto merge = [](bool first) {
        return std::vector<std::string>{"merge", "--method", "average", "--task", first ? "base" : "other", "--out",
            "out", "--shard-size", first ? "400kB" : "900kB", "--threads", "1", "--no-card"};
    };
    const auto is = [&](bool first) {
        const auto model = taskvec::open_model(folder / "out");
        const float value = first ? 0.5f : 2.0f;
        bool right = slurp(folder / "out/config.json").find(first ? "base" : "other") != std::string::npos
            && model.model().size() == base.size();
        for (const auto& [name, tensor] : model.model()) {
            const auto* const values = static_cast<const float*>(tensor.data);
            for (std::size_t i = 0; i < tensor.size(); ++i) { right = right && values[i] == value; }
        }
        return right;
    };
    REQUIRE(run(folder, merge(true)).code == 0);
    const auto began = std::chrono::steady_clock::now();
    REQUIRE(run(folder, merge(false)).code == 0);
    const auto took = std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - began).count();
    std::mt19937 random(wanted ? static_cast<unsigned>(::getpid()) : 7u);
    bool first = false; // which one is there
    int killed = 0, changed = 0;
    for (int round = 0; round < rounds; ++round) {
        process tool(folder, merge(!first));
        ::usleep(static_cast<useconds_t>(std::uniform_real_distribution<double>(0, 1.2 * took)(random)));
        tool.send(SIGKILL);
        killed += tool.wait().code == -SIGKILL;
        if (is(!first)) {
            first = !first;
            ++changed;
        }
        else {
            CHECK(is(first));
        }
    }
    CHECK(killed > 0);
    MESSAGE(rounds << " rounds, " << killed << " killed, " << changed << " with the new model");
    for (const char* place : {"out", "."}) { CHECK(run(folder, {"clean", place}).code == 0); }
    CHECK(folder.names() == std::set<std::string>{"base", "other", "out"});
    REQUIRE(run(folder, merge(true)).code == 0);
    auto names = scratch::names_in(folder / "out");
    std::erase_if(names, [](const std::string& name) { return name.starts_with("model-0000"); });
    CHECK(names == std::set<std::string>{"config.json", "model.safetensors.index.json"});
    CHECK(scratch::names_in(folder / "out").size() == 2 + 4);
}
