// What is said is what is so: nothing is reported as failed that was written, and nothing is left behind.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <taskvec/formats/peft.hpp>

#include <csignal>
#include <fstream>

using namespace tools_test;

namespace {

/// Runs the tool by the shell, which can close and redirect what the tool is given; $TOOL is its path.
outcome run_in_shell(const scratch& folder, const std::string& script)
{
    return run(folder, {"-c", script}, {std::string("TOOL=") + TASKVEC_TOOL}, "/bin/sh");
}

void write_adapter(const std::filesystem::path& path, float first)
{
    taskvec::peft_adapter<float> adapter;
    taskvec::matrix<float> b(6, 2, taskvec::matrix_order::row_major), a(2, 5, taskvec::matrix_order::row_major);
    for (std::size_t i = 0; i < b.size(); ++i) { b.data()[i] = first + static_cast<float>(i); }
    for (std::size_t i = 0; i < a.size(); ++i) { a.data()[i] = first - static_cast<float>(i * i); }
    adapter.updates.emplace("layer", taskvec::lora_update<float>{b, a, 1});
    taskvec::write_peft(path, adapter);
}

void write_inputs(const scratch& folder)
{
    const auto base = sample_base();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "a.safetensors", sample_task(base, 2));
    write_adapter(folder / "la", 1);
    write_adapter(folder / "lb", 2);
}

/// The number of a process that is no more.
std::string number_of_dead_process()
{
    const pid_t child = ::fork();
    if (child == 0) { ::_exit(0); }
    ::waitpid(child, nullptr, 0);
    return std::to_string(child);
}

} // namespace

TEST_CASE("where standard output is closed, full or a broken pipe, no output appears")
{
    const scratch folder;
    write_inputs(folder);
    const auto before = folder.names();
    const std::string merge = "$TOOL merge --method average --task a.safetensors --task base.safetensors --out o ";
    const std::string lora = "$TOOL merge-lora --adapter la --adapter lb --rank 2 --out lo ";
    for (const auto& verb : {merge, lora, merge + "--shard-size 2kB "}) {
        CAPTURE(verb);
        for (const std::string to : {">&-", ">/dev/full", "<&- >&- 2>/dev/null"}) {
            CAPTURE(to);
            CHECK(run_in_shell(folder, verb + to).code == 1);
            CHECK(folder.names() == before);
        }
        // The reader has gone before anything is printed.
        const auto piped = run_in_shell(folder, "{ sleep 0.2; " + verb + "; echo $? >&2; } | true");
        CHECK(piped.err.find("cannot write to standard output") != std::string::npos);
        CHECK(piped.err.ends_with("1\n"));
        CHECK(folder.names() == before);
    }
}

TEST_CASE("a report that cannot be written leaves an adapter's output as it was")
{
    const scratch folder;
    write_inputs(folder);
    const auto before = folder.names();
    const auto result = run(folder,
        {"merge-lora", "--adapter", "la", "--adapter", "lb", "--rank", "2", "--out", "lo", "--report",
            "no/such/r.json"});
    CHECK(result.code == 1);
    CHECK(is_error_line(result.err));
    CHECK(folder.names() == before);
}

TEST_CASE("one of two writers of a directory wins, the other says so")
{
    const scratch folder;
    write_inputs(folder);
    const std::vector<std::string> merge{"merge", "--method", "average", "--task", "a.safetensors", "--task",
        "base.safetensors", "--out", "d", "--shard-size", "2kB"};
    REQUIRE(run(folder, merge).code == 0);
    const auto names = scratch::names_in(folder / "d");
    {
        const taskvec::directory_lock other(folder / "d");
        const auto result = run(folder, merge);
        CHECK(result.code == 1);
        CHECK(result.err.find("another process") != std::string::npos);
    }
    CHECK(scratch::names_in(folder / "d") == names);
    CHECK(run(folder, merge).code == 0);
    CHECK_FALSE(scratch::names_in(folder / "d").contains(".taskvec-lock"));
}

TEST_CASE("SIGQUIT ends as SIGTERM does: one line, nothing left")
{
    const scratch folder;
    const auto layout = taskvec::layout_safetensors({{"w", taskvec::dtype::bf16, {40'000'000}}});
    for (const char* name : {"base.safetensors", "a.safetensors"}) {
        spill(folder / name, layout.head);
        std::filesystem::resize_file(folder / name, layout.size);
    }
    std::fstream file(folder / "a.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(layout.size) - 1);
    file.put('\1'); // else it would be noted as a copy of the base
    file.close();
    process tool(folder,
        {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--out",
            "out.safetensors", "--threads", "1"});
    for (int i = 0; i < 2000 && folder.names().size() < 3; ++i) { ::usleep(1000); }
    tool.send(SIGQUIT);
    const auto result = tool.wait();
    CHECK(result.code == 1);
    CHECK(is_error_line(result.err));
    CHECK(folder.names() == std::set<std::string>{"a.safetensors", "base.safetensors"});
}

TEST_CASE("clean removes what dead runs left, and nothing else")
{
    const scratch folder;
    const auto dead = ".taskvec-" + number_of_dead_process(), alive = ".taskvec-" + std::to_string(::getpid());
    spill(folder / (dead + "-0.tmp"), "x");
    std::filesystem::create_directory(folder / (dead + "-directory-1.tmp"));
    spill(folder / (dead + "-directory-1.tmp/model.safetensors"), "x");
    spill(folder / (alive + "-0.tmp"), "x");
    spill(folder / ".taskvec-notes.tmp", "x");
    spill(folder / "model.safetensors", "x");
    spill(folder / ".taskvec-lock", "model-00001-of-00002-2.safetensors\nmodel.safetensors\n");
    spill(folder / "model-00001-of-00002-2.safetensors", "x");
    const auto before = folder.names();
    CHECK(run(folder, {"clean", ".", "--dry-run"}).code == 0);
    CHECK(folder.names() == before);
    const auto result = run(folder, {"clean", "."});
    CHECK(result.code == 0);
    CHECK(result.out.find("removed './" + dead + "-0.tmp'\n") != std::string::npos);
    CHECK(folder.names() == std::set<std::string>{alive + "-0.tmp", ".taskvec-notes.tmp", "model.safetensors"});
    CHECK(run(folder, {"clean", "missing"}).code == 1);
}

TEST_CASE("clean leaves what somebody has locked, in whichever container its process is")
{
    const scratch folder;
    const auto dead = number_of_dead_process();
    const auto name = ".taskvec-" + dead + "-0.tmp";
    spill(folder / name, "x");
    {
        const taskvec::detail::descriptor held(taskvec::detail::system::open_to_read(folder / name));
        REQUIRE(taskvec::detail::system::lock(held.get()) == 0);
        CHECK(run(folder, {"clean", "."}).out == "nothing of a dead run lies in '.'\n");
        CHECK(folder.names().contains(name));
    }
    CHECK(run(folder, {"clean", "."}).out == "removed './" + name + "'\n");
    CHECK(folder.names().empty());
}

TEST_CASE("help, versions and pages that cannot be written are failures")
{
    const scratch folder;
    for (const std::string words : {"--help", "--version", "merge --help", "help run", "manual merge"}) {
        CAPTURE(words);
        for (const std::string to : {" >/dev/full", " >&-"}) {
            const auto result = run_in_shell(folder, "$TOOL " + words + to);
            CHECK(result.code == 1);
            CHECK(result.err.find("cannot write to standard output") != std::string::npos);
        }
    }
    CHECK(run_in_shell(folder, "$TOOL manual --out pages >/dev/full").code == 1);
    CHECK(scratch::names_in(folder / "pages").empty());
    CHECK(run(folder, {"manual", "--out", "pages"}).code == 0);
    CHECK(scratch::names_in(folder / "pages").contains("taskvec-merge.1"));
}

TEST_CASE("the advice to clean is a line for the shell, whatever the directory is called")
{
    const scratch folder;
    write_inputs(folder);
    const auto dead = number_of_dead_process();
    for (const std::string name : {"my models", "it's", "plain"}) {
        std::filesystem::create_directory(folder / name);
        const auto left = folder / name / (".taskvec-" + dead + "-0.tmp");
        spill(left, "x");
        const auto said = run(folder,
            {"merge", "--method", "average", "--task", "a.safetensors", "--task", "base.safetensors", "--out",
                name + "/o"})
                              .err;
        const std::string before = "killed runs: 'taskvec clean ", after = "' removes what they left";
        const auto begin = said.find(before) + before.size(), end = said.find(after);
        REQUIRE(end != std::string::npos);
        CHECK(run_in_shell(folder, "$TOOL clean " + said.substr(begin, end - begin)).code == 0);
        CHECK_FALSE(std::filesystem::exists(left));
    }
}

TEST_CASE("a second signal ends at once: one line, nothing left")
{
    const scratch folder;
    write_inputs(folder);
    // A score that is never done: the first signal waits for it.
    process tool(folder,
        {"sweep", "--base", "base.safetensors", "--task", "a.safetensors", "--lambdas", "0.5,1", "--scratch", ".",
            "--score", "trap '' HUP; touch began; sleep 3; echo 1 {}", "--out", "o"});
    while (!std::filesystem::exists(folder / "began") && !tool.ended()) { ::usleep(2000); }
    tool.send(SIGHUP);
    ::usleep(1000);
    tool.send(SIGHUP);
    const auto result = tool.wait();
    CHECK(result.code == 1);
    CHECK(result.err.starts_with("taskvec: error: interrupted; "));
    CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
    for (const auto& name : folder.names()) { CHECK_FALSE(name.starts_with(".taskvec-")); }
}

TEST_CASE("an interrupted sweep says what it keeps")
{
    const scratch folder;
    write_inputs(folder);
    const auto result = run(folder,
        {"sweep", "--base", "base.safetensors", "--task", "a.safetensors", "--lambdas", "0.1,0.5,1", "--csv", "s.csv",
            "--score", "case $TASKVEC_LAMBDA in 0.5) kill -INT $PPID; sleep 1;; esac; echo 1 {}", "--out", "o"});
    CHECK(result.code == 1);
    CHECK(result.err
        == "taskvec: error: interrupted; 's.csv' holds 1 score, and the same command line goes on from there\n");
    CHECK_FALSE(std::filesystem::exists(folder / "o"));
}

TEST_CASE("what killed runs left beside an output is noted, with what removes it")
{
    const scratch folder;
    write_inputs(folder);
    const auto dead = number_of_dead_process();
    const auto left = ".taskvec-" + dead + "-0.tmp";
    spill(folder / left, "x");
    std::vector<std::string> merge{
        "merge", "--method", "average", "--task", "a.safetensors", "--task", "base.safetensors", "--out", "o"};
    for (const auto& verb :
        {merge, {"merge-lora", "--adapter", "la", "--adapter", "lb", "--rank", "2", "--out", "lo"}}) {
        const auto result = run(folder, verb);
        CHECK(result.code == 0);
        CHECK(result.err.find("holds 1 temporary file of killed runs: 'taskvec clean ") != std::string::npos);
    }
    CHECK(folder.names().contains(left)); // it is not theirs to remove
    merge.emplace_back("--quiet");
    CHECK(run(folder, merge).err.empty());
    std::filesystem::remove(folder / left);
    CHECK(run(folder, {"merge-lora", "--adapter", "la", "--adapter", "lb", "--rank", "2", "--out", "lo"}).err.empty());
}

TEST_CASE("what a killed run had put aside comes back with clean, or with the next run")
{
    const auto dead = number_of_dead_process();
    const auto aside = ".taskvec-" + dead + "-directory-0.tmp";
    for (const bool by_clean : {true, false}) {
        const scratch folder;
        write_inputs(folder);
        write_adapter(folder / "lo", 3);
        const auto config = slurp(folder / "lo/adapter_config.json"),
                   weights = slurp(folder / "lo/adapter_model.safetensors");
        std::filesystem::create_directory(folder / "lo" / aside);
        for (const char* name : {"adapter_config.json", "adapter_model.safetensors"}) {
            std::filesystem::rename(folder / "lo" / name, folder / "lo" / aside / (std::string(name) + ".old"));
        }
        spill(folder / "lo" / aside / "adapter_config.json", "new");
        spill(folder / "lo/adapter_model.safetensors", "new");
        if (by_clean) {
            const auto result = run(folder, {"clean", "lo"});
            CHECK(result.code == 0);
            CHECK(result.out.find("brought back 'lo/adapter_config.json'\n") != std::string::npos);
        }
        else {
            const taskvec::output_directory next(folder / "lo");
        }
        CHECK(slurp(folder / "lo/adapter_config.json") == config);
        CHECK(slurp(folder / "lo/adapter_model.safetensors") == weights);
        CHECK(scratch::names_in(folder / "lo")
            == std::set<std::string>{"adapter_config.json", "adapter_model.safetensors"});
    }
}

TEST_CASE("the set of peru-fft replaces an older one as a whole, and keeps what else lies there")
{
    const scratch folder;
    write_inputs(folder);
    const std::vector<std::string> peru{"peru-fft", "--method", "average", "--task", "a.safetensors", "--task",
        "base.safetensors", "--density", "0.1", "--out"};
    const auto to = [&](const std::string& place) {
        auto words = peru;
        words.push_back(place);
        return words;
    };
    std::filesystem::create_directory(folder / "old");
    spill(folder / "old/merged.safetensors", "old");
    spill(folder / "old/notes.txt", "mine");
    REQUIRE(run(folder, to("new")).code == 0);
    REQUIRE(run(folder, to("old")).code == 0);
    CHECK(slurp(folder / "old/merged.safetensors") == slurp(folder / "new/merged.safetensors"));
    CHECK(slurp(folder / "old/notes.txt") == "mine");
    auto names = scratch::names_in(folder / "new");
    names.insert("notes.txt");
    CHECK(scratch::names_in(folder / "old") == names);
}
