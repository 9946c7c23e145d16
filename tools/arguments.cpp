// Arguments that several verbs take.
// SPDX-License-Identifier: Apache-2.0
#include "arguments.hpp"

#include "command.hpp"

#include <taskvec/core/error.hpp>

#include <cctype>
#include <charconv>
#include <cmath>
#include <map>
#include <optional>
#include <string_view>

namespace tool {

namespace {

std::optional<double> number_in(std::string_view text)
{
    if (text.starts_with('+')) { text.remove_prefix(1); }
    double value = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || failure != std::errc{} || end != text.data() + text.size() || !std::isfinite(value)) {
        return std::nullopt;
    }
    return value;
}

} // namespace

task_argument parse_task(const std::string& text, const std::string& option)
{
    task_argument task;
    const auto sign = text.rfind('=');
    const auto weight = sign == text.npos ? std::nullopt : number_in(std::string_view(text).substr(sign + 1));
    task.path = weight ? text.substr(0, sign) : text;
    if (weight) { task.weight = *weight; }
    if (task.path.empty()) {
        throw usage_error(option + " '" + text + "' names no model; expected PATH or PATH=WEIGHT");
    }
    std::error_code ignored;
    auto whole = fs::absolute(task.path, ignored).lexically_normal();
    if (!whole.has_filename()) { whole = whole.parent_path(); } // "dir/"
    const bool by_directory = !fs::is_directory(task.path, ignored) && whole.stem() == "model";
    if (by_directory) { whole = whole.parent_path(); }
    task.name =
        by_directory || fs::is_directory(task.path, ignored) ? whole.filename().string() : whole.stem().string();
    return task;
}

std::vector<task_argument> parse_tasks(const std::vector<std::string>& texts)
{
    std::vector<task_argument> tasks;
    std::map<std::string, fs::path> seen;
    for (const auto& text : texts) {
        tasks.push_back(parse_task(text));
        const auto& task = tasks.back();
        const auto [place, fresh] = seen.emplace(task.name, task.path);
        if (!fresh) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::task_name_repeated,
                taskvec::message("tasks '", place->second.string(), "' and '", task.path.string(), "' are both named '",
                    task.name, "': rename one, since tasks are told apart by name"));
        }
    }
    return tasks;
}

std::uint64_t parse_size(const std::string& text, const std::string& option)
{
    const auto fail = [&] {
        throw usage_error(option + " is '" + text + "'; expected a size such as 5GB, 256MiB or 1000000");
    };
    double number = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (failure != std::errc{} || !(number > 0)) { fail(); }
    std::string unit(end, text.data() + text.size());
    unit.erase(0, unit.find_first_not_of(' ') == unit.npos ? unit.size() : unit.find_first_not_of(' '));
    for (auto& c : unit) { c = static_cast<char>(std::tolower(static_cast<unsigned char>(c))); }
    if (unit.ends_with('b')) { unit.pop_back(); }
    const double base = unit.ends_with('i') ? 1024 : 1000;
    if (unit.ends_with('i')) { unit.pop_back(); }
    const auto power = std::string_view("kmgt").find(unit);
    if (unit.size() > 1 || (unit.size() == 1 && power == std::string_view::npos)) { fail(); }
    if (unit.size() == 1) { number *= std::pow(base, static_cast<double>(power) + 1); }
    if (!(number >= 1) || number >= 9.2e18) { fail(); }
    return static_cast<std::uint64_t>(number);
}

void add_quiet(command& verb, run_options& options)
{
    verb.flag("--quiet", options.quiet, "No progress and no notes");
}

void add_run_options(command& verb, run_options& options)
{
    verb.count(
        "--threads", options.threads, "N", "Threads; results do not depend on it (default: one for each processor)");
    verb.word("--device", options.device, {"cpu", "cuda"}, "DEVICE",
        "cpu or cuda: where merges and pruning run (default: cpu)");
    verb.text("--memory", options.memory, "SIZE", "Budget of anonymous memory (default: 256MiB)");
    verb.text("--report", options.report, "FILE", "Write what was done as JSON: seconds, bytes, memory, counts, norms");
    verb.flag(
        "--dry-run", options.dry_run, "Check everything that can be checked, say what would be done, write nothing");
    add_quiet(verb, options);
}

} // namespace tool
