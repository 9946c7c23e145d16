// Arguments that several verbs take.
// SPDX-License-Identifier: Apache-2.0
#include "arguments.hpp"

#include "command.hpp"
#include "words.hpp"

#include <taskvec/core/error.hpp>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <map>
#include <optional>
#include <set>
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

std::string place_text(const fs::path& path)
{
    std::error_code failure;
    const auto place = fs::weakly_canonical(fs::absolute(path, failure), failure);
    return (failure ? path : place).string();
}

/// A model's name by the last `parts` of its path, without an ending that files have.
std::string parts_of_name(const fs::path& path, std::size_t parts)
{
    std::error_code ignored;
    auto whole = fs::absolute(path, ignored).lexically_normal();
    if (!whole.has_filename()) { whole = whole.parent_path(); } // "dir/"
    const bool directory = fs::is_directory(path, ignored);
    std::string name = whole.filename().string();
    if (!directory) {
        if (const auto at = name.find(".safetensors.index."); at != name.npos) { name.resize(at); } // an index
        else {
            name = whole.stem().string();
        }
        if (name == "model") { name = whole.parent_path().filename().string(), whole = whole.parent_path(); }
    }
    for (std::size_t i = 1; i < parts; ++i) {
        whole = whole.parent_path();
        if (!whole.has_filename()) { break; }
        name = whole.filename().string() + "-" + name;
    }
    return name;
}

/// Models that lie beside one another under one name but for its ending (y.safetensors, y.pt, a directory y) are called
/// by all of it: no folder above tells them apart. The endings that names have to keep.
std::vector<std::string> tell_kinds_apart(std::vector<task_argument>& tasks)
{
    const auto stem_place = [](const fs::path& path) {
        std::error_code ignored;
        auto whole = fs::path(place_text(path.has_filename() ? path : path.parent_path()));
        return fs::is_directory(path, ignored) ? whole : whole.parent_path() / whole.stem();
    };
    std::map<std::string, std::set<std::string>> places; // by where they would be without an ending
    for (const auto& task : tasks) { places[stem_place(task.path).string()].insert(place_text(task.path)); }
    std::vector<std::string> endings;
    for (auto& task : tasks) {
        std::error_code ignored;
        const bool alone = places[stem_place(task.path).string()].size() == 1;
        endings.push_back(alone || fs::is_directory(task.path, ignored) ? "" : task.path.extension().string());
        task.name += endings.back();
    }
    return endings;
}

} // namespace

task_argument parse_task(const std::string& text, const std::string& option)
{
    task_argument task;
    std::error_code ignored;
    const auto sign = text.rfind('=');
    task.path = text;
    if (sign != text.npos && !fs::exists(text, ignored)) { // what is there under the whole text is meant
        const auto before = text.substr(0, sign), after = text.substr(sign + 1);
        if (const auto weight = number_in(after)) {
            task.path = before;
            task.weight = *weight;
        }
        else if (!before.empty() && fs::exists(before, ignored)) {
            // A path, and it is not there; perhaps a weight was meant.
            taskvec::raise<taskvec::io_error>(taskvec::error_code::file_not_found,
                taskvec::message("is not there (", option, "), and '", after, "' is no number: name a model, or '",
                    before, "' with a weight, as in '", before, "=0.5'"),
                text, ENOENT);
        }
    }
    if (task.path.empty()) {
        throw usage_error(option + " '" + text + "' names no model; expected PATH or PATH=WEIGHT");
    }
    task.text = text;
    task.name = parts_of_name(task.path, 1);
    return task;
}

void note_zero_weights(const run_options& run, const std::vector<task_argument>& models, const std::string& noun)
{
    std::string names;
    std::size_t count = 0;
    for (const auto& model : models) {
        if (model.weight != 0) { continue; }
        names += (names.empty() ? "" : ", ") + in_quotes(model.path);
        ++count;
    }
    if (count == 0) { return; }
    note(run,
        std::to_string(count) + " of " + counted(models.size(), noun) + (count == 1 ? " has" : " have")
            + " the weight 0 (" + names + "): " + (count == 1 ? "it adds" : "they add") + " nothing");
}

std::vector<task_argument> parse_tasks(const std::vector<std::string>& texts)
{
    std::vector<task_argument> tasks;
    for (const auto& text : texts) { tasks.push_back(parse_task(text)); }
    const auto endings = tell_kinds_apart(tasks);
    // Equal names are told apart by the folders above, as many as it takes.
    for (std::size_t parts = 2; parts <= 64; ++parts) {
        std::map<std::string, std::set<std::string>> places;
        for (const auto& task : tasks) { places[task.name].insert(place_text(task.path)); }
        bool again = false;
        for (std::size_t t = 0; t < tasks.size(); ++t) {
            auto& task = tasks[t];
            if (places[task.name].size() == 1) { continue; }
            const auto longer = parts_of_name(task.path, parts) + endings[t];
            again = again || longer != task.name;
            task.name = longer;
        }
        if (!again) { break; }
    }
    // What is left is one model several times, or cannot be told apart: by numbers.
    std::map<std::string, std::size_t> seen, times;
    std::set<std::string> names;
    for (auto& task : tasks) {
        const auto name = task.name;
        const auto number_of_name = ++seen[name];
        task.time = ++times[place_text(task.path)];
        for (auto number = number_of_name; !names.insert(task.name).second; ++number) {
            task.name = name + "-" + std::to_string(std::max<std::size_t>(2, number));
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
        "cpu or cuda: where merge, prune and peru-fft run; all else runs on the cpu (default: cpu)");
    verb.text("--memory", options.memory, "SIZE", "Budget of anonymous memory (default: 256MiB)");
    verb.text("--report", options.report, "FILE", "Write what was done as JSON: seconds, bytes, memory, counts, norms");
    verb.flag(
        "--dry-run", options.dry_run, "Check everything that can be checked, say what would be done, write nothing");
    add_quiet(verb, options);
}

} // namespace tool
