// --resume: what a killed run had finished stays, and the same command line ends in the same bytes.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <chrono>
#include <csignal>
#include <set>
#include <thread>

using namespace tools_test;

namespace resume_test {

using words = std::vector<std::string>;

words with(words list, const words& more)
{
    list.insert(list.end(), more.begin(), more.end());
    return list;
}

std::map<std::string, std::string> files_of(const std::filesystem::path& folder)
{
    std::map<std::string, std::string> files;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        if (entry.path().filename() != "README.md") { files[entry.path().filename().string()] = slurp(entry.path()); }
    }
    return files;
}

struct resumable {
    scratch folder;

    resumable()
    {
        std::mt19937 random(3);
        std::normal_distribution<float> bell;
        values_model base;
        for (int i = 0; i < 9; ++i) {
            values_tensor tensor{taskvec::dtype::bf16, {40, 10}, std::vector<float>(400)};
            for (auto& value : tensor.values) { value = rounded(tensor.dtype, bell(random)); }
            base["layers." + std::to_string(i) + ".weight"] = tensor;
        }
        write_values(folder / "base.safetensors", base);
        write_values(folder / "a.safetensors", sample_task(base, 4));
        write_values(folder / "b.safetensors", sample_task(base, 5));
        // Where nothing can be written once all is computed: the index of an older model cannot be read.
        std::filesystem::create_directory(folder / "bad");
        spill(folder / "bad/model.safetensors.index.json", "{");
    }
    [[nodiscard]] words merge(const std::string& method) const
    {
        return {"merge", "--method", method, "--base", "base.safetensors", "--task", "a.safetensors", "--task",
            "b.safetensors", "--shard-size", "2kB"};
    }
};

} // namespace resume_test

using namespace resume_test;

TEST_CASE("a merge that ended too early goes on from the shards that it had finished, to the same bytes")
{
    const resumable m;
    for (const std::string method : {"ties", "dare-ties", "task-arithmetic", "karcher"}) {
        CAPTURE(method);
        for (const auto* place : {"plain", "resumed"}) { std::filesystem::remove_all(m.folder / place); }
        REQUIRE(run(m.folder, with(m.merge(method), {"--out", "plain"})).code == 0);
        const auto stopped = run(m.folder, with(m.merge(method), {"--out", "bad", "--resume", "work"}));
        CHECK(stopped.code == 1);
        std::vector<std::filesystem::path> shards;
        for (const auto& entry : std::filesystem::directory_iterator(m.folder / "work")) {
            if (entry.path().extension() == ".safetensors") { shards.push_back(entry.path()); }
        }
        REQUIRE(shards.size() == 5);
        std::filesystem::remove(m.folder / "work/shard-2-of-5.safetensors");
        std::filesystem::remove(m.folder / "work/shard-4-of-5.safetensors");
        spill(m.folder / "work/.taskvec-1-0.tmp", "of a run that was killed");
        const auto done =
            run(m.folder, with(m.merge(method), {"--out", "resumed", "--resume", "work", "--threads", "3"}));
        CHECK_MESSAGE(done.code == 0, done.err);
        CHECK(done.err.find("3 of 5 shards in 'work' were finished by an earlier run") != std::string::npos);
        CHECK(files_of(m.folder / "resumed") == files_of(m.folder / "plain"));
        CHECK_FALSE(std::filesystem::exists(m.folder / "work"));
        // From the beginning, too.
        std::filesystem::remove_all(m.folder / "resumed");
        REQUIRE(run(m.folder, with(m.merge(method), {"--out", "resumed", "--resume", "work"})).code == 0);
        CHECK(files_of(m.folder / "resumed") == files_of(m.folder / "plain"));
        CHECK_FALSE(std::filesystem::exists(m.folder / "work"));
    }
}

TEST_CASE("a merge that was killed once its model had its name is only cleared up")
{
    const resumable m;
    const auto line = m.merge("ties");
    CHECK(run(m.folder, with(line, {"--out", "bad", "--resume", "work"})).code == 1); // all shards are finished
    REQUIRE(run(m.folder, with(line, {"--out", "out"})).code == 0);
    const auto right = files_of(m.folder / "out");
    for (int i = 1; i <= 5; ++i) { // as the kept shards take their names
        const auto number = std::to_string(i);
        const auto place = m.folder / ("out/model-0000" + number + "-of-00005.safetensors");
        REQUIRE(std::filesystem::remove(place));
        std::filesystem::create_hard_link(m.folder / ("work/shard-" + number + "-of-5.safetensors"), place);
    }
    const auto done = run(m.folder, with(line, {"--out", "out", "--resume", "work"}));
    CHECK(done.code == 0);
    CHECK(done.out == "'out' was finished by an earlier run\n");
    CHECK(files_of(m.folder / "out") == right);
    CHECK_FALSE(std::filesystem::exists(m.folder / "work"));
}

TEST_CASE("--resume refuses what another command line began, and what it cannot keep")
{
    const resumable m;
    const auto refused = [&](const words& line, const std::string& part, int code = 1) {
        const auto result = run(m.folder, line);
        CAPTURE(result.err);
        CHECK(result.code == code);
        CHECK(is_error_line(result.err));
        CHECK(result.err.find(part) != std::string::npos);
    };
    refused(with(m.merge("ties"), {"--out", "bad", "--resume", "work"}), "index");
    refused(with(m.merge("ties"), {"--out", "o", "--resume", "work", "--density", "0.5"}),
        "was begun by another command line, or its inputs have changed since: it does not have '--density 0.5'");
    std::filesystem::last_write_time(m.folder / "a.safetensors", std::filesystem::file_time_type::clock::now());
    refused(with(m.merge("ties"), {"--out", "o", "--resume", "work"}), "a.safetensors");
    CHECK_FALSE(std::filesystem::exists(m.folder / "o"));
    std::filesystem::create_directory(m.folder / "mine");
    spill(m.folder / "mine/thesis.txt", "x");
    refused(with(m.merge("ties"), {"--out", "o", "--resume", "mine"}), "holds other files, such as 'thesis.txt'");
    refused(with(m.merge("ties"), {"--out", "o", "--resume", "work", "--report", "r.json"}), "leave --report out", 2);
    refused({"merge", "--method", "average", "--task", "a.safetensors", "--out", "o", "--resume", "w"},
        "give --shard-size too", 2);
    CHECK(slurp(m.folder / "mine/thesis.txt") == "x");
    // A shard that is another's.
    std::filesystem::remove_all(m.folder / "work");
    refused(with(m.merge("ties"), {"--out", "bad", "--resume", "work"}), "index");
    std::filesystem::copy_file(m.folder / "a.safetensors", m.folder / "work/shard-1-of-5.safetensors",
        std::filesystem::copy_options::overwrite_existing);
    refused(with(m.merge("ties"), {"--out", "o", "--resume", "work"}), "holds other tensors than are to be written");
    CHECK_FALSE(std::filesystem::exists(m.folder / "o"));
}

TEST_CASE("an extraction that is killed goes on from the layers that it had decomposed")
{
    const scratch folder;
    std::mt19937 random(3);
    std::normal_distribution<float> bell;
    values_model base, task;
    for (int i = 0; i < 6; ++i) {
        values_tensor tensor{taskvec::dtype::f32, {220, 200}, std::vector<float>(44'000)};
        for (auto& value : tensor.values) { value = bell(random); }
        base["layers." + std::to_string(i) + ".weight"] = tensor;
        for (auto& value : tensor.values) { value += bell(random); }
        task["layers." + std::to_string(i) + ".weight"] = tensor;
    }
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    const words line{
        "extract-lora", "--base", "base.safetensors", "--task", "task.safetensors", "--rank", "4", "--out"};
    REQUIRE(run(folder, with(line, {"plain"})).code == 0);
    const auto killed = with(line, {"lora", "--resume", "work"});
    {
        process first(folder, killed);
        while (!std::filesystem::exists(folder / "work/layer-2.safetensors") && !first.ended()) {
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
        first.send(SIGKILL);
        (void)first.wait();
    }
    const bool left = std::filesystem::exists(folder / "work/layer-2.safetensors");
    const auto done = run(folder, killed);
    CHECK_MESSAGE(done.code == 0, done.err);
    CHECK((done.err.find("of 'work' were finished by an earlier run") != std::string::npos) == left);
    CHECK(files_of(folder / "lora") == files_of(folder / "plain"));
    CHECK_FALSE(std::filesystem::exists(folder / "work"));
}
