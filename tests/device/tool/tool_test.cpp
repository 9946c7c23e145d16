// --device cuda of the tool: the files of --device cpu, bit for bit, or one line that says why not.
// SPDX-License-Identifier: Apache-2.0
//
// The tool itself is asked; where it has no device it has to say so. A second one, TASKVEC_TOOL_ON_THREADS, is the same
// files with tools/device/cuda.cu compiled for host threads: what it merges goes through the code that a device would
// run.
#include "../../tools/run_tool.hpp"

#include <taskvec/formats/statistics.hpp>
#include <taskvec/statistics/gram_accumulator.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>
#include <random>

using namespace tools_test;

namespace {

struct models {
    scratch folder;

    models()
    {
        const values_model base = sample_base();
        write_values(folder / "base.safetensors", base);
        for (unsigned t = 0; t < 3; ++t) {
            write_values(folder / (letter(t) + ".safetensors"), sample_task(base, 31 + t));
            values_model fisher = sample_task(base, 41 + t, 1.0f);
            for (auto& [name, tensor] : fisher) {
                tensor.dtype = taskvec::dtype::f32;
                for (auto& value : tensor.values) { value = value * value; }
            }
            const taskvec::statistics_info info{.kind = taskvec::statistics_kind::expected_fisher,
                .examples = 10,
                .fingerprint = std::nullopt,
                .in_out = {},
                .metadata = {}};
            write_values(
                folder / (letter(t) + ".fisher.safetensors"), fisher, taskvec::detail::statistics_metadata(info));
            const std::vector<float> inputs = draws(60 * 31, 51 + t);
            std::map<std::string, taskvec::gram_accumulator> grams;
            grams.emplace("layers.0.weight", 31)
                .first->second.add(taskvec::cpu{},
                    taskvec::matrix_view<const float>(inputs.data(), 60, 31, taskvec::matrix_order::row_major));
            taskvec::write_statistics(folder / (letter(t) + ".gram.safetensors"), grams, std::nullopt, {});
        }
    }
    static std::vector<float> draws(std::size_t count, unsigned seed)
    {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        std::vector<float> values(count);
        for (auto& value : values) { value = normal(random); }
        return values;
    }
    static std::string letter(unsigned t) { return std::string(1, static_cast<char>('a' + t)); }

    outcome merge(const std::string& tool, const std::string& device, const std::string& out,
        const std::vector<std::string>& how, unsigned tasks = 3) const
    {
        std::vector<std::string> arguments{
            "merge", "--base", "base.safetensors", "--out", out, "--device", device, "--method"};
        arguments.insert(arguments.end(), how.begin(), how.end());
        for (unsigned t = 0; t < tasks; ++t) {
            arguments.insert(arguments.end(), {"--task", letter(t) + ".safetensors"});
        }
        return run(folder, arguments, {}, tool);
    }
    [[nodiscard]] std::string bytes(const std::string& file) const { return slurp((folder / file).string()); }
};

/// Every merge of the tool, as its options after --method, and how many tasks it takes.
struct way {
    std::vector<std::string> options;
    unsigned tasks = 3;
};
std::vector<way> ways()
{
    const std::vector<std::string> fishers{
        "--fisher", "a.fisher.safetensors", "--fisher", "b.fisher.safetensors", "--fisher", "c.fisher.safetensors"};
    const auto with = [&](std::vector<std::string> options) {
        options.insert(options.end(), fishers.begin(), fishers.end());
        return options;
    };
    return {{{"average"}}, {{"task-arithmetic", "--lambda", "0.3"}}, {{"ties", "--density", "0.3"}},
        {{"ties", "--semantics", "mergekit", "--lambda", "0.7"}}, {{"ties", "--scope", "tensor", "--memory", "1MiB"}},
        {{"dare", "--seed", "7"}}, {{"dare-ties", "--density", "0.4"}}, {with({"fisher"})},
        {with({"fisher", "--normalize"})}, {{"slerp", "--t", "0.3"}, 2}, {{"model-stock"}},
        {{"average", "--exclude", "bias", "--dtype", "f32"}}};
}

/// Merges on the device of `tool` have the bytes of the CPU's, and reports count the same entries.
void check_ways(const models& m, const std::string& tool)
{
    for (const way& one : ways()) {
        CAPTURE(one.options);
        const outcome expected = m.merge(TASKVEC_TOOL, "cpu", "cpu.safetensors", one.options, one.tasks);
        CAPTURE(expected.err);
        REQUIRE(expected.code == 0);
        const outcome found = m.merge(tool, "cuda", "cuda.safetensors", one.options, one.tasks);
        CAPTURE(found.err);
        REQUIRE(found.code == 0);
        CHECK(m.bytes("cuda.safetensors") == m.bytes("cpu.safetensors"));
    }
}

} // namespace

TEST_CASE("the tool merges on a device, or says in a line that it has none")
{
    const models m;
    const outcome asked = m.merge(TASKVEC_TOOL, "cuda", "out.safetensors", {"average"});
    if (asked.code == 0) { return check_ways(m, TASKVEC_TOOL); }
    auto all = ways();
    all.push_back(
        {{"regmean", "--gram", "a.gram.safetensors", "--gram", "b.gram.safetensors", "--gram", "c.gram.safetensors"}});
    for (const way& one : all) {
        CAPTURE(one.options);
        const outcome found = m.merge(TASKVEC_TOOL, "cuda", "out.safetensors", one.options, one.tasks);
        CAPTURE(found.err);
        CHECK(found.code == 1);
        CHECK(found.out.empty());
        CHECK(is_error_line(found.err));
        CHECK((found.err.find("--device cuda: this build of the tool") != std::string::npos
            || found.err.find("cudaError") != std::string::npos));
        CHECK_FALSE(std::filesystem::exists(m.folder / "out.safetensors"));
    }
    const outcome fft = run(m.folder,
        {"peru-fft", "--method", "average", "--base", "base.safetensors", "--task", "a.safetensors", "--task",
            "b.safetensors", "--out", "folder", "--device", "cuda"});
    CHECK(fft.code == 1);
    CHECK(is_error_line(fft.err));
    CHECK_FALSE(std::filesystem::exists(m.folder / "folder"));
}

TEST_CASE("every method writes the CPU's file through the device's code")
{
    check_ways(models(), TASKVEC_TOOL_ON_THREADS);
}

TEST_CASE("regmean merges there up to rounding, and averages the rest bit for bit")
{
    const models m;
    const way one{
        {"regmean", "--gram", "a.gram.safetensors", "--gram", "b.gram.safetensors", "--gram", "c.gram.safetensors"}};
    for (const std::string device : {"cpu", "cuda"}) {
        const outcome done = m.merge(TASKVEC_TOOL_ON_THREADS, device, device + ".safetensors", one.options);
        CAPTURE(done.err);
        REQUIRE(done.code == 0);
    }
    auto found = read_values(m.folder / "cuda.safetensors");
    const auto expected = read_values(m.folder / "cpu.safetensors");
    auto& layer = found.at("layers.0.weight").values;
    const auto& wanted = expected.at("layers.0.weight").values;
    REQUIRE(layer.size() == wanted.size());
    for (std::size_t i = 0; i < layer.size(); ++i) {
        CHECK(std::abs(layer[i] - wanted[i]) <= 1.2e-7f * std::max(1.0f, std::abs(wanted[i])));
    }
    layer = wanted;
    CHECK(same(found, expected));
}

TEST_CASE("peru-fft merges there too")
{
    const models m;
    for (const std::string device : {"cpu", "cuda"}) {
        const outcome done = run(m.folder,
            {"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--task",
                "b.safetensors", "--out", device, "--device", device},
            {}, TASKVEC_TOOL_ON_THREADS);
        CAPTURE(done.err);
        REQUIRE(done.code == 0);
    }
    for (const char* file : {"/merged.safetensors", "/a.delta.safetensors", "/b.delta.safetensors"}) {
        CHECK(m.bytes(std::string("cuda") + file) == m.bytes(std::string("cpu") + file));
    }
}

TEST_CASE("prune writes the CPU's delta there")
{
    const models m;
    for (const std::string device : {"cpu", "cuda"}) {
        const outcome done = run(m.folder,
            {"prune", "--base", "base.safetensors", "--task", "a.safetensors", "--density", "0.2", "--out",
                device + ".delta.safetensors", "--device", device, "--report", device + ".json"},
            {}, TASKVEC_TOOL_ON_THREADS);
        CAPTURE(done.err);
        REQUIRE(done.code == 0);
    }
    CHECK(m.bytes("cuda.delta.safetensors") == m.bytes("cpu.delta.safetensors"));
    CHECK(nlohmann::json::parse(m.bytes("cuda.json"))["bytes_read"]
        == nlohmann::json::parse(m.bytes("cpu.json"))["bytes_read"]);
}

TEST_CASE("reports count what the CPU's count")
{
    const models m;
    for (way one : ways()) {
        CAPTURE(one.options);
        nlohmann::json reports[2];
        for (const int which : {0, 1}) {
            const std::string device = which == 0 ? "cpu" : "cuda";
            auto how = one.options;
            how.insert(how.end(), {"--report", device + ".json"});
            REQUIRE(m.merge(TASKVEC_TOOL_ON_THREADS, device, "out.safetensors", how, one.tasks).code == 0);
            reports[which] = nlohmann::json::parse(m.bytes(device + ".json"));
        }
        CHECK(reports[1]["tasks"] == reports[0]["tasks"]);
        CHECK(reports[1]["tensors"] == reports[0]["tensors"]);
        if (one.options[0].find("ties") == std::string::npos) {
            CHECK(reports[1]["bytes_read"] == reports[0]["bytes_read"]);
        } // selection walks differ
    }
}

TEST_CASE("bad input is an error there too, and leaves no file")
{
    const models m;
    auto spoiled = read_values(m.folder / "b.safetensors");
    spoiled.at("layers.0.weight").values[7] = std::numeric_limits<float>::quiet_NaN();
    write_values(m.folder / "b.safetensors", spoiled);
    const outcome found = m.merge(TASKVEC_TOOL_ON_THREADS, "cuda", "out.safetensors", {"task-arithmetic"});
    CHECK(found.code == 1);
    CHECK(is_error_line(found.err));
    CHECK(found.err.find("'layers.0.weight'") != std::string::npos);
    CHECK(found.err.find("NaN at index 7") != std::string::npos);
    CHECK_FALSE(std::filesystem::exists(m.folder / "out.safetensors"));
}
