// taskvec doctor: what the tool finds on this machine, and what of it is in the way.
// SPDX-License-Identifier: Apache-2.0
#include "arguments.hpp"
#include "build_facts.hpp"
#include "command.hpp"
#include "device.hpp"
#include "words.hpp"

#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/core/instruction_set.hpp>
#include <taskvec/core/parallel.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <clocale>
#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <vector>

#include <sched.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

namespace {

struct doctor_settings {
    std::string directory = ".";
    bool json = false;
};

/// What is said, and what is wrong.
struct findings {
    std::vector<std::pair<std::string, std::string>> facts;
    std::vector<std::string> problems, advice;
    void fact(const std::string& name, const std::string& text) { facts.emplace_back(name, text); }
};

/// A field of /proc/meminfo, in bytes; 0 where it is not there.
std::uint64_t memory_field(const std::string& field)
{
    std::ifstream file("/proc/meminfo");
    std::string line;
    while (std::getline(file, line)) {
        if (line.starts_with(field)) { return std::strtoull(line.c_str() + field.size(), nullptr, 10) * 1024; }
    }
    return 0;
}

/// A file of this process's control group, or of the nearest one above that says something else than "max".
std::string control_group(const std::string& file)
{
    std::ifstream own("/proc/self/cgroup");
    std::string line, group;
    while (std::getline(own, line)) {
        if (line.starts_with("0::")) { group = line.substr(3); }
    }
    for (;;) {
        std::string text;
        std::ifstream limit("/sys/fs/cgroup" + group + "/" + file);
        if (std::getline(limit, text) && !text.starts_with("max")) { return text; }
        if (group.empty()) { return {}; }
        group.erase(group.rfind('/') == group.npos ? 0 : group.rfind('/'));
    }
}

/// Whether kernels give the same bits with every instruction set that this processor has.
bool kernels_agree()
{
    std::vector<float> base, tuned;
    for (int i = 0; i < 4099; ++i) {
        base.push_back(1.0F / static_cast<float>(i + 1));
        tuned.push_back(static_cast<float>(i % 97) / 7.0F - 3.0F);
    }
    const auto widest = taskvec::current_instruction_set();
    std::vector<std::vector<float>> results;
    for (auto set : {taskvec::instruction_set::scalar, taskvec::instruction_set::baseline,
             taskvec::instruction_set::avx2, taskvec::instruction_set::avx512}) {
        taskvec::limit_instruction_set(std::min(set, widest));
        std::vector<float> result(base.size());
        taskvec::difference(taskvec::cpu{.threads = 1}, tuned, base, result);
        taskvec::apply(taskvec::cpu{.threads = 1}, base, result, 0.3, result);
        results.push_back(std::move(result));
    }
    taskvec::limit_instruction_set(widest);
    return std::all_of(results.begin(), results.end(), [&](const auto& one) { return one == results[0]; });
}

void look_at_processor(findings& found)
{
    found.fact("instruction set",
        std::string(taskvec::to_string(taskvec::current_instruction_set())) + ", of "
            + tool::compiled_instruction_sets() + " in this build");
    const bool agree = kernels_agree();
    found.fact("kernels", agree ? "the same bits with every instruction set" : "DIFFER between instruction sets");
    if (!agree) {
        found.problems.emplace_back(
            "kernels give other bits with other instruction sets: the compiler or the processor is at fault");
    }
    const auto threads = taskvec::worker_count(taskvec::cpu{}, std::numeric_limits<std::size_t>::max());
    std::string text = std::to_string(threads) + " by default";
    std::istringstream quota(control_group("cpu.max"));
    double of = 0, period = 0;
    if (quota >> of >> period && period > 0 && of / period < static_cast<double>(threads)) {
        std::ostringstream share;
        share << of / period;
        text += ", but the control group grants " + share.str() + " processors";
        found.advice.push_back("give --threads " + std::to_string(std::max(1, static_cast<int>(of / period + 0.5)))
            + ": the control group grants no more");
    }
    cpu_set_t allowed;
    if (::sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        const auto count = static_cast<std::size_t>(CPU_COUNT(&allowed));
        if (count < threads) {
            text += ", but this process may run on " + tool::counted(count, "processor");
            found.advice.push_back("give --threads " + std::to_string(count) + ": the process may run on no more");
        }
    }
    found.fact("threads", text);
}

void look_at_memory(findings& found)
{
    const auto total = memory_field("MemTotal:"), available = memory_field("MemAvailable:");
    std::uint64_t usable = available;
    std::string text = total == 0 ? std::string("unknown, /proc/meminfo does not say")
                                  : tool::size_text(total) + ", " + tool::size_text(available) + " available";
    if (const auto limit = control_group("memory.max"); !limit.empty()) {
        const auto most = std::strtoull(limit.c_str(), nullptr, 10);
        text += ", at most " + tool::size_text(most) + " in this control group";
        usable = std::min<std::uint64_t>(usable, most);
    }
    rlimit addresses{};
    if (::getrlimit(RLIMIT_AS, &addresses) == 0 && addresses.rlim_cur != RLIM_INFINITY) {
        text += ", addresses limited to " + tool::size_text(addresses.rlim_cur) + " (ulimit -v)";
        found.problems.emplace_back("addresses are limited (ulimit -v), and models are mapped whole: lift the limit "
                                    "for models that are larger");
    }
    const auto budget = tool::run_options().memory_bytes();
    text += "; a merge takes " + tool::size_text(budget) + " by default (--memory)";
    found.fact("memory", text);
    if (total != 0 && usable < 2 * budget) {
        found.problems.push_back("little memory is left: give a --memory below " + tool::size_text(usable / 2));
    }
    rlimit files{};
    if (::getrlimit(RLIMIT_NOFILE, &files) == 0) {
        found.fact("open files",
            files.rlim_cur == RLIM_INFINITY ? std::string("no limit") : tool::grouped(files.rlim_cur) + " at most");
        if (files.rlim_cur < 256) {
            found.problems.emplace_back("few files may be open at once: models of many shards need more (ulimit -n)");
        }
    }
}

void look_at_device(findings& found)
{
    if (!tool::has_cuda()) {
        found.fact("device", "the CPU; this build has no --device cuda");
        return;
    }
    try {
        tool::require_cuda();
        found.fact("device", "the CPU, and --device cuda, which answers");
    }
    catch (const taskvec::error& failure) {
        found.fact("device", "the CPU; none for --device cuda");
        found.advice.emplace_back(failure.what());
    }
}

void look_at_locale(findings& found)
{
    std::string text = "numbers are read and written with a point, whatever the locale is; this one is ";
    const char* name = "C";
    for (const char* variable : {"LC_ALL", "LC_CTYPE", "LANG"}) {
        if (const char* value = std::getenv(variable); value != nullptr && *value != '\0') {
            name = value;
            break;
        }
    }
    found.fact("locale", text + "'" + tool::printable(name) + "'");
}

void look_at_directory(findings& found, const std::string& directory)
{
    const std::string quoted = "'" + tool::printable(directory) + "'";
    struct statvfs space{};
    std::error_code failure;
    if (!tool::fs::is_directory(directory, failure) || ::statvfs(directory.c_str(), &space) != 0) {
        found.fact("outputs", quoted + " is no directory that can be read");
        found.problems.push_back(quoted + " is no directory that can be read: name one that is with --out");
        return;
    }
    const auto left = static_cast<std::uint64_t>(space.f_bavail) * space.f_frsize;
    const bool writable = ::access(directory.c_str(), W_OK | X_OK) == 0;
    std::size_t left_over = 0;
    for (tool::fs::directory_iterator it(directory, failure), end; !failure && it != end; it.increment(failure)) {
        left_over += it->path().filename().string().starts_with(".taskvec-") ? 1U : 0U;
    }
    found.fact("outputs",
        "temporary files lie beside what they become; " + quoted + " has " + tool::size_text(left) + " left");
    if (!writable) { found.problems.push_back(quoted + " cannot be written to"); }
    if (left < 100'000'000) { found.problems.push_back("little space is left in " + quoted); }
    if (left_over != 0) {
        found.advice.push_back(tool::counted(left_over, "temporary file") + " of other runs in " + quoted
            + ": 'taskvec clean' removes those of runs that have ended");
    }
}

void doctor(const doctor_settings& given)
{
    findings found;
    look_at_processor(found);
    look_at_memory(found);
    look_at_device(found);
    look_at_locale(found);
    look_at_directory(found, given.directory);
    std::string text;
    if (given.json) {
        nlohmann::ordered_json json;
        json["version"] = tool::tool_version();
        for (const auto& [name, fact] : found.facts) { json["facts"][name] = fact; }
        json["problems"] = found.problems;
        json["advice"] = found.advice;
        text = json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
    }
    else {
        text = tool::version_page() + "\n";
        for (const auto& [name, fact] : found.facts) {
            text += name + ":" + std::string(17 - std::min<std::size_t>(16, name.size()), ' ') + fact + "\n";
        }
        for (const auto& one : found.advice) { text += "advice:           " + one + "\n"; }
        for (const auto& one : found.problems) { text += "problem:          " + one + "\n"; }
        if (found.problems.empty()) { text += "problem:          none\n"; }
    }
    tool::print(text);
    if (!found.problems.empty()) { throw std::runtime_error(found.problems[0]); }
}

const tool::register_verb doctor_verb(
    125, "doctor", "Say what the tool runs with on this machine, and what is in its way", [](tool::command& verb) {
        const auto given = std::make_shared<doctor_settings>();
        verb.text("--out", given->directory, "DIR", "The directory that outputs will go to (default: this one)");
        verb.flag("--json", given->json, "As JSON");
        verb.footer("Exit code 1 where something would keep merges from working.\n\nExample:\n  taskvec doctor");
        verb.action([given] { doctor(*given); });
    });

} // namespace
