// Each call of the system fails once: the outputs are the old ones or the new ones, whole, and what is said is so.
// SPDX-License-Identifier: Apache-2.0
#if defined(TASKVEC_FAULT_SHIM)
#include "run_tool.hpp"

#include <taskvec/formats/peft.hpp>

using namespace tools_test;

namespace {

using fault_tree = std::map<std::string, std::string>;

/// All that lies in a folder, with its bytes. A report holds the time that it took: only whether it is new counts.
fault_tree fault_tree_of(const std::filesystem::path& folder)
{
    fault_tree result;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
        const auto name = std::filesystem::relative(entry.path(), folder).string();
        auto& content = result[name] = entry.is_directory() ? "directory" : slurp(entry.path());
        if (name == "report.json" && content != "old") { content = "new"; }
    }
    return result;
}

void write_fault_adapter(const std::filesystem::path& path, float first)
{
    taskvec::peft_adapter<float> adapter;
    taskvec::matrix<float> b(6, 2, taskvec::matrix_order::row_major), a(2, 5, taskvec::matrix_order::row_major);
    for (std::size_t i = 0; i < b.size(); ++i) { b.data()[i] = first + static_cast<float>(i % 3); }
    for (std::size_t i = 0; i < a.size(); ++i) { a.data()[i] = first - static_cast<float>(i * i); }
    adapter.updates.emplace("layer", taskvec::lora_update<float>{b, a, first});
    taskvec::write_peft(path, adapter);
}

/// Models, adapters, and older outputs of every kind.
void write_fault_inputs(const scratch& folder)
{
    const auto base = sample_base();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "a.safetensors", sample_task(base, 2));
    write_values(folder / "out.safetensors", sample_task(base, 3));
    std::filesystem::create_directory(folder / "model");
    write_values(folder / "model/model.safetensors", base);
    spill(folder / "model/config.json", "{}");
    spill(folder / "report.json", "old");
    write_fault_adapter(folder / "la", 1);
    write_fault_adapter(folder / "lb", 2);
    write_fault_adapter(folder / "lora", 3);
    std::filesystem::create_directory(folder / "set");
    spill(folder / "set/merged.safetensors", "old");
    spill(folder / "set/notes.txt", "mine");
    REQUIRE(run(folder,
                {"merge", "--method", "average", "--task", "out.safetensors", "--task", "base.safetensors", "--out",
                    "shards", "--shard-size", "3kB"})
                .code
        == 0);
    std::filesystem::copy(folder / "model", folder / "directory");
    spill(folder / "directory/config.json", "{\"old\": 1}");
}

const std::vector<std::vector<std::string>>& fault_verbs()
{
    static const std::vector<std::vector<std::string>> verbs{{"merge", "--method", "ties", "--base", "base.safetensors",
                                                                 "--task", "a.safetensors", "--out", "out.safetensors"},
        {"merge", "--method", "average", "--task", "a.safetensors", "--task", "base.safetensors", "--shard-size", "2kB",
            "--out", "shards"},
        {"merge", "--method", "average", "--task", "a.safetensors", "--task", "base.safetensors", "--shard-size", "2kB",
            "--out", "new/model"},
        {"merge", "--method", "average", "--task", "model", "--task", "a.safetensors", "--out", "directory"},
        {"merge-lora", "--adapter", "la", "--adapter", "lb", "--rank", "2", "--out", "lora"},
        {"peru-fft", "--method", "average", "--base", "base.safetensors", "--task", "a.safetensors", "--density", "0.1",
            "--out", "set"},
        {"prune", "--base", "base.safetensors", "--task", "a.safetensors", "--density", "0.1", "--out", "a.delta"}};
    return verbs;
}

/// One verb, over and over from the same state.
class fault_run {
public:
    explicit fault_run(std::vector<std::string> arguments)
        : arguments_(std::move(arguments))
    {
        for (const char* more : {"--report", "report.json", "--threads", "1"}) { arguments_.emplace_back(more); }
        write_fault_inputs(start_);
        old_ = fault_tree_of(start_.path());
    }

    /// How many calls of a kind there are; what the verb leaves when none fails.
    long count(const std::string& kind)
    {
        const auto file = start_.path().string() + ".count";
        const scratch folder;
        const auto done = attempt(folder, {"TASKVEC_FAULT_KIND=" + kind, "TASKVEC_FAULT_COUNT=" + file});
        REQUIRE_MESSAGE(done.code == 0, done.err);
        new_ = fault_tree_of(folder.path());
        REQUIRE(new_ != old_);
        const long calls = std::stol(slurp(file));
        std::filesystem::remove(file);
        return calls;
    }
    /// What is wrong when a call fails; empty: nothing.
    std::string wrong(const std::string& kind, long number, bool from_then_on) const
    {
        const scratch folder;
        std::vector<std::string> environment{
            "TASKVEC_FAULT_KIND=" + kind, "TASKVEC_FAULT_AT=" + std::to_string(number)};
        if (from_then_on) { environment.emplace_back("TASKVEC_FAULT_ON=1"); }
        const auto done = attempt(folder, environment);
        const auto now = fault_tree_of(folder.path());
        std::string what;
        if (done.code != 0 && done.code != 1) { what = "ended with " + std::to_string(done.code); }
        else if (const auto& right = done.code == 0 ? new_ : old_; now != right) {
            what = "exit " + std::to_string(done.code) + ", and otherwise than it should be:";
            for (const auto* tree : {&now, &right}) {
                for (const auto& [name, content] : *tree) {
                    const auto here = now.find(name), there = right.find(name);
                    const bool same = here != now.end() && there != right.end() && here->second == there->second;
                    if (!same && what.find(" " + name + ",") == what.npos) { what += " " + name + ","; }
                }
            }
        }
        else if (done.code == 1 && !is_error_line(done.err)) {
            what = "not said in one line";
        }
        if (what.empty()) { return what; }
        return arguments_.front() + ", " + kind + " call " + std::to_string(number)
            + (from_then_on ? " and on: " : ": ") + what + " " + done.err + "\n";
    }

private:
    outcome attempt(const scratch& folder, std::vector<std::string> environment) const
    {
        std::filesystem::copy(start_.path(), folder.path(),
            std::filesystem::copy_options::recursive | std::filesystem::copy_options::overwrite_existing);
        environment.emplace_back(std::string("LD_PRELOAD=") + TASKVEC_FAULT_SHIM);
        return run(folder, arguments_, environment);
    }

    scratch start_;
    std::vector<std::string> arguments_;
    fault_tree old_, new_;
};

} // namespace

TEST_CASE("a call of the system that fails leaves the old outputs or the new ones")
{
    for (const auto& verb : fault_verbs()) {
        CAPTURE(verb.back());
        fault_run tries(verb);
        const long calls = tries.count("system");
        CHECK(calls > 10);
        std::string wrong;
        for (long call = 1; call <= calls; ++call) { wrong += tries.wrong("system", call, false); }
        CHECK(wrong == "");
    }
}
#endif
