// taskvec sweep: merges over a grid, each scored by a command.
// SPDX-License-Identifier: Apache-2.0
#include "candidates.hpp"
#include "report.hpp"
#include "words.hpp"

#include <taskvec/core/csv.hpp>
#include <taskvec/search/subset_sweep.hpp>
#include <taskvec/search/sweep.hpp>

#include <plot.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <exception>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <thread>

namespace {

struct sweep_settings {
    tool::merge_request merge;
    tool::score_settings score;
    std::string svg;
    std::map<std::string, tool::option_value> grids; ///< by option: the grid that was asked for
    std::vector<std::string> over; ///< OPTION=GRID
    std::string per_task; ///< the grid of each task's own lambda
    bool subsets = false;
    std::optional<std::size_t> smallest;
    std::size_t jobs = 1;
};

/// "0.1,0.3,0.5", "0:1:0.05" (first, last, step) or a mix of both.
std::vector<double> parse_grid(const std::string& text, const std::string& option)
{
    const auto fail = [&]() {
        throw tool::usage_error(
            option + " is '" + text + "'; expected numbers such as 0.1,0.3,0.5, or FIRST:LAST:STEP such as 0:1:0.05");
    };
    const auto number = [&](const std::string& word) {
        double value = 0;
        const auto [end, failure] = std::from_chars(word.data(), word.data() + word.size(), value);
        if (word.empty() || failure != std::errc{} || end != word.data() + word.size() || !std::isfinite(value)) {
            fail();
        }
        return value;
    };
    std::vector<double> grid;
    std::istringstream items(text + ",");
    for (std::string item; std::getline(items, item, ',');) {
        const auto first = item.find(':'), second = item.find(':', first == item.npos ? first : first + 1);
        if (first == item.npos) {
            grid.push_back(number(item));
            continue;
        }
        if (second == item.npos) { fail(); }
        const double from = number(item.substr(0, first)), to = number(item.substr(first + 1, second - first - 1)),
                     step = number(item.substr(second + 1));
        const double count = std::floor((to - from) / step + 1e-9);
        if (!(count >= 0)) { fail(); }
        if (count > 100000) {
            throw tool::usage_error(option + " is '" + text + "': '" + item
                + "' has more than 100000 values, the most of a grid; give a larger step");
        }
        for (double i = 0; i <= count; ++i) {
            grid.push_back(std::round((from + i * step) * 1e12) / 1e12);
        } // 0.15, not 0.15000000000000002
    }
    if (grid.empty()) { fail(); }
    return grid;
}

/// A point of the grid.
struct candidate {
    std::vector<std::size_t> tasks;
    std::vector<double> values; ///< one for each axis
    std::vector<double> weights; ///< each task's own lambda, where these are swept over
    std::vector<std::string> point; ///< as the table has it
};

/// An option that is swept over.
struct axis {
    std::string option;
    std::vector<double> values;
};

struct grid {
    std::vector<axis> axes;
    std::vector<std::string> columns;
    std::vector<candidate> candidates; ///< those of one subset are neighbours
};

const tool::option_value* given_value(const sweep_settings& given, const std::string& option)
{
    const auto& list = given.merge.options;
    const auto place = std::find_if(list.rbegin(), list.rend(),
        [&](const tool::option_value& value) { return value.name == option && !value.by_tensor; });
    return place == list.rend() ? nullptr : &*place;
}

/// What is spread over the layers is no point of a grid, and no grid either.
void check_one_number(const sweep_settings& given, const taskvec::option_description& option)
{
    for (const auto& value : given.merge.options) {
        if (value.name != option.name || !value.by_tensor || !value.pattern.empty()) { continue; }
        throw tool::usage_error(value.flag + " '" + value.text
            + "' would be spread over the layers, and a sweep takes one number for all of them: "
            + (option.axis.name.empty() ? "--over " + option.name + "=" : "--" + std::string(option.axis.name) + " ")
            + value.text + " sweeps over these");
    }
}

/// The grids that were asked for: those of --lambdas and its like, and --over OPTION=GRID.
std::map<std::string, tool::option_value> grids_of(const sweep_settings& given)
{
    auto grids = given.grids;
    for (const auto& text : given.over) {
        const auto sign = text.find('=');
        if (sign == text.npos || sign == 0) {
            throw tool::usage_error("--over is '" + text + "'; expected an option and its values, such as t=0:1:0.1");
        }
        const std::string option = text.substr(0, sign);
        if (!grids.emplace(option, tool::option_value{option, text.substr(sign + 1), "--over " + option}).second) {
            throw tool::usage_error("--over " + option + ": two grids for one option; give one");
        }
    }
    return grids;
}

/// The options of the method that have values to go over, in the order of its table.
std::vector<axis> axes_of(const sweep_settings& given, const tool::method_entry& method)
{
    const auto grids = grids_of(given);
    std::vector<axis> axes;
    std::set<std::string> used;
    for (const auto& option : method.options) {
        const bool number =
            option.kind == taskvec::option_kind::number || option.kind == taskvec::option_kind::whole_number;
        const auto asked = grids.find(option.name);
        const auto* const one = given_value(given, option.name);
        if (!given.per_task.empty() && option.name == "lambda") {
            if (one || asked != grids.end()) {
                throw tool::usage_error(
                    (one ? one->flag : asked->second.flag) + " and --lambda-per-task exclude each other");
            }
            continue; // 1: the weights are the tasks' own
        }
        if (!number || (asked == grids.end() && option.axis.name.empty())) { continue; }
        check_one_number(given, option);
        used.insert(option.name);
        std::string flag = "--" + (option.axis.name.empty() ? option.name : std::string(option.axis.name)), text;
        if (asked != grids.end()) {
            flag = asked->second.flag;
            text = asked->second.text;
            if (one) { throw tool::usage_error(one->flag + " and " + flag + " exclude each other"); }
        }
        else if (one) {
            flag = one->flag;
            text = one->text;
        }
        else {
            text = given.subsets && !option.axis.of_subsets.empty() ? option.axis.of_subsets : option.axis.usual;
        }
        axes.push_back({option.name, parse_grid(text, flag)});
        tool::check_usage([&] {
            for (const double value : axes.back().values) {
                method.check_values({{option.name, taskvec::csv_number(value), flag}});
            }
        });
    }
    for (const auto& [option, grid] : grids) {
        if (!used.contains(option)) {
            throw tool::usage_error("--method " + method.name + " has no " + option + " to sweep over");
        }
    }
    return axes;
}

grid grid_of(const sweep_settings& given, const tool::method_entry& method)
{
    const auto tasks = tool::parse_tasks(given.merge.tasks);
    grid result;
    result.axes = axes_of(given, method);
    std::vector<double> own;
    if (!given.per_task.empty()) {
        const bool takes = method.weighted
            && std::any_of(method.options.begin(), method.options.end(),
                [](const taskvec::option_description& option) { return option.name == "lambda"; });
        if (!takes) {
            throw tool::usage_error("--method " + method.name + " has no lambda of each task to sweep over");
        }
        if (given.subsets) {
            throw tool::usage_error(
                "--subsets and --lambda-per-task exclude each other: a lambda of 0 leaves a task out");
        }
        tool::check_no_weights(given.merge, "--lambda-per-task", "it goes over the tasks' weights");
        own = parse_grid(given.per_task, "--lambda-per-task");
    }
    if (given.subsets) { result.columns.push_back("tasks"); }
    for (const auto& axis : result.axes) { result.columns.push_back(axis.option); }
    if (!own.empty()) {
        for (const auto& task : tasks) { result.columns.push_back("lambda of " + task.name); }
    }
    if (result.columns.empty()) {
        throw tool::usage_error("--method " + method.name + " has nothing to sweep over but --subsets");
    }
    std::vector<std::vector<std::size_t>> sets;
    if (given.subsets) {
        const auto smallest = given.smallest.value_or(2);
        if (tasks.size() > 20) {
            throw tool::usage_error(
                taskvec::message("--subsets of ", tasks.size(), " tasks are too many to score; give at most 20"));
        }
        sets = taskvec::task_subsets(tasks.size(), std::max<std::size_t>(1, smallest));
        if (sets.empty()) {
            throw tool::usage_error(taskvec::message("--subsets: there is none of ", smallest, " tasks or more"));
        }
    }
    else {
        sets.emplace_back();
        for (std::size_t t = 0; t < tasks.size(); ++t) { sets[0].push_back(t); }
    }
    std::vector<std::vector<double>> points(1);
    const auto extend = [&](const std::vector<double>& values) { // the last one runs fastest
        constexpr std::size_t most = 100000;
        if (points.size() * values.size() > most) {
            throw tool::usage_error(taskvec::message("the grid has more than ", most, " points: give fewer values",
                own.empty() ? "" : ", or let 'taskvec lorahub' seek each task's weight"));
        }
        std::vector<std::vector<double>> longer;
        for (const auto& point : points) {
            for (const double value : values) {
                longer.push_back(point);
                longer.back().push_back(value);
            }
        }
        points = std::move(longer);
    };
    for (const auto& axis : result.axes) { extend(axis.values); }
    for (std::size_t t = 0; !own.empty() && t < tasks.size(); ++t) { extend(own); }
    std::set<std::vector<std::string>> seen;
    for (const auto& set : sets) {
        std::string names;
        for (const auto t : set) { names += (names.empty() ? "" : "+") + tasks[t].name; }
        for (const auto& values : points) {
            const auto axes = values.begin() + static_cast<std::ptrdiff_t>(result.axes.size());
            candidate one{set, {values.begin(), axes}, {axes, values.end()}, {}};
            if (given.subsets) { one.point.push_back(names); }
            for (const double value : values) { one.point.push_back(taskvec::csv_number(value)); }
            if (seen.insert(one.point).second) { result.candidates.push_back(std::move(one)); }
        }
    }
    return result;
}

/// The command line of one candidate.
tool::merge_request request_of(
    const sweep_settings& given, const tool::method_entry& method, const grid& points, const candidate& one)
{
    auto result = given.merge;
    const auto chosen = [&](std::vector<std::string>& list) {
        if (list.size() != given.merge.tasks.size()) { return; }
        std::vector<std::string> kept;
        for (const auto t : one.tasks) { kept.push_back(list[t]); }
        list = std::move(kept);
    };
    for (const auto& list : method.lists) {
        if (list.per_task) { chosen(result.lists[list.name]); }
    }
    chosen(result.tasks);
    for (std::size_t i = 0; i < points.axes.size(); ++i) {
        const auto& option = points.axes[i].option;
        std::erase_if(
            result.options, [&](const tool::option_value& value) { return value.name == option && !value.by_tensor; });
        result.options.push_back({option, taskvec::csv_number(one.values[i]), "--" + option});
    }
    if (!one.weights.empty()) { result.options.push_back({"lambda", "1", "--lambda-per-task"}); }
    return result;
}

/// What a method is run with for one candidate.
tool::method_call call_of(const taskvec::cpu& policy, const tool::merge_request& request,
    const tool::merge_inputs& inputs, const candidate& one)
{
    return tool::call_of(policy, request, inputs, one.weights.empty() ? nullptr : &one.weights);
}

/// What a scoring command is told of its candidate: TASKVEC_TASKS, TASKVEC_DENSITY, TASKVEC_LAMBDA, those that the
/// sweep has.
std::vector<std::string> variables_of(const std::vector<std::string>& columns, const candidate& one)
{
    const auto& point = one.point;
    std::vector<std::string> variables;
    std::string own; // each task's lambda, joined by commas
    const std::size_t shared = columns.size() - one.weights.size();
    for (std::size_t i = shared; i < columns.size(); ++i) { own += (own.empty() ? "" : ",") + point[i]; }
    if (!own.empty()) { variables.push_back("TASKVEC_LAMBDA=" + own); }
    for (std::size_t i = 0; i < shared; ++i) {
        std::string name = "TASKVEC_";
        for (const char c : columns[i]) {
            name += c == '-' ? '_' : c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
        }
        variables.push_back(name + "=" + point[i]);
    }
    return variables;
}

/// The models of the subset that was used last, kept open.
class open_inputs {
public:
    explicit open_inputs(const tool::method_entry& method)
        : needs_base_(method.needs_base)
    { }
    const tool::merge_inputs& of(const tool::merge_request& request)
    {
        if (!inputs_ || tasks_ != request.tasks) {
            inputs_ = std::make_unique<tool::merge_inputs>(request, needs_base_);
            tasks_ = request.tasks;
        }
        return *inputs_;
    }

private:
    bool needs_base_;
    std::vector<std::string> tasks_;
    std::unique_ptr<tool::merge_inputs> inputs_;
};

void draw(const sweep_settings& given, const grid& points, const taskvec::sweep_table& table)
{
    std::map<std::vector<std::string>, double> scores;
    for (const auto& row : table.rows()) { scores[row.point] = row.score; }
    plot::line_chart chart{
        .title = "Sweep of " + given.merge.method, .x_label = "lambda", .y_label = "score", .curves = {}};
    const bool one_each = given.subsets
        && std::all_of(points.candidates.begin(), points.candidates.end(),
            [&](const candidate& c) { return c.values == points.candidates[0].values; });
    if (one_each) { // by the number of tasks
        chart.x_label = "tasks merged";
        std::map<double, std::vector<double>> by_size;
        for (const auto& one : points.candidates) {
            by_size[static_cast<double>(one.tasks.size())].push_back(scores.at(one.point));
        }
        plot::curve best{.label = "highest", .x = {}, .y = {}}, mean{.label = "mean", .x = {}, .y = {}},
            worst{.label = "lowest", .x = {}, .y = {}};
        for (const auto& [size, list] : by_size) {
            double sum = 0;
            for (const double score : list) { sum += score; }
            for (auto* curve : {&best, &mean, &worst}) { curve->x.push_back(size); }
            best.y.push_back(*std::max_element(list.begin(), list.end()));
            mean.y.push_back(sum / static_cast<double>(list.size()));
            worst.y.push_back(*std::min_element(list.begin(), list.end()));
            chart.x_ticks.push_back(size);
        }
        chart.curves = {best, mean, worst};
    }
    else { // over the last axis, a curve for each point of the others
        chart.x_label = points.columns.back();
        for (const auto& one : points.candidates) {
            std::string label;
            for (std::size_t c = 0; c + 1 < one.point.size(); ++c) {
                label += (c ? ", " : "") + points.columns[c] + " " + one.point[c];
            }
            if (label.empty()) { label = given.merge.method; }
            auto place = std::find_if(chart.curves.begin(), chart.curves.end(),
                [&](const plot::curve& curve) { return curve.label == label; });
            if (place == chart.curves.end()) { place = chart.curves.insert(place, {.label = label, .x = {}, .y = {}}); }
            place->x.push_back(one.weights.empty() ? one.values.back() : one.weights.back());
            place->y.push_back(scores.at(one.point));
        }
    }
    plot::write_svg(chart, given.svg);
}

void run_sweep(const sweep_settings& given)
{
    tool::check_score_settings(given.score);
    if (given.jobs == 0) { throw tool::usage_error("--jobs is 0; expected at least 1"); }
    tool::check_cpu(given.merge.run);
    const auto& method = tool::find_method(given.merge);
    if (given.smallest && !given.subsets) { tool::note(given.merge.run, "--smallest has no effect without --subsets"); }
    const auto points = grid_of(given, method);
    auto table = tool::read_scores(given.score, points.columns);
    std::vector<const candidate*> left;
    for (const auto& one : points.candidates) {
        if (!table.contains(one.point)) { left.push_back(&one); }
    }
    const tool::merge_inputs all(
        given.merge, method.needs_base); // everything that can be checked is, before the first candidate
    tool::claim_outputs(given.merge, given.score, given.svg, tool::first_model_of(given.merge, all));
    tool::runner run(given.merge.run);
    method.examine(tool::call_of(run.policy(), given.merge, all));
    (void)tool::outputs_of(given.merge, all);
    if (given.merge.run.dry_run) {
        tool::print("would score " + tool::counted(left.size(), "candidate") + " of "
            + tool::counted(points.candidates.size(), "point") + " by '" + tool::printable(given.score.command.text)
            + "'\n" + tool::describe(given.merge, all));
        return;
    }
    tool::report_file report(given.merge.run.report);
    tool::traffic bytes;
    tool::write_scores(given.score, table); // what cannot be written again is known early
    if (!table.rows().empty()) {
        tool::note(given.merge.run,
            tool::counted(points.candidates.size() - left.size(), "point") + " of "
                + std::to_string(points.candidates.size()) + " are in '" + given.score.csv
                + "' already: remove it to score them again");
    }
    {
        const tool::scratch_directory scratch(tool::scratch_parent(given.score));
        open_inputs inputs(method);
        for (std::size_t first = 0; first < left.size(); first += given.jobs) {
            const std::size_t count = std::min(given.jobs, left.size() - first);
            std::vector<tool::fs::path> files;
            for (std::size_t i = 0; i < count; ++i) {
                const auto request = request_of(given, method, points, *left[first + i]);
                const auto& models = inputs.of(request);
                files.push_back(scratch.path() / ("candidate" + std::to_string(i) + ".safetensors"));
                bytes += tool::write_candidate(
                    files.back(), method, call_of(run.policy(), request, models, *left[first + i]), scratch.path());
            }
            std::vector<std::optional<double>> scores(count);
            std::vector<std::exception_ptr> failures(count);
            {
                std::vector<std::jthread> threads;
                const auto score = [&](std::size_t i) {
                    try {
                        const auto& point = left[first + i]->point;
                        scores[i] = tool::run_score_command(given.score.command,
                            {files[i], table.describe(point), variables_of(points.columns, *left[first + i])});
                    }
                    catch (...) {
                        failures[i] = std::current_exception();
                    }
                };
                for (std::size_t i = 1; i < count; ++i) { threads.emplace_back(score, i); }
                score(0);
            }
            for (std::size_t i = 0; i < count; ++i) {
                if (scores[i]) { table.add(left[first + i]->point, *scores[i]); }
            }
            tool::write_scores(given.score, table);
            for (const auto& failure : failures) {
                if (failure) { std::rethrow_exception(failure); }
            }
        }
    }
    // The best of this grid: the table may hold other points.
    taskvec::sweep_table here(points.columns);
    std::map<std::vector<std::string>, const candidate*> places;
    for (const auto& one : points.candidates) { places.emplace(one.point, &one); }
    for (const auto& row : table.rows()) {
        if (places.contains(row.point)) { here.add(row.point, row.score); }
    }
    const auto& best = *here.best(!given.score.minimize);
    const auto& winner = *places.at(best.point);
    std::optional<tool::best_merge> out;
    if (!given.merge.out.empty()) {
        const auto request = request_of(given, method, points, winner);
        const tool::merge_inputs inputs(request, method.needs_base);
        out.emplace(method, call_of(run.policy(), request, inputs, winner),
            "Merged by " + request.method + ", the best of " + tool::counted(points.candidates.size(), "point"));
    }
    if (out) { bytes += out->bytes(); }
    if (!given.svg.empty()) { draw(given, points, here); }
    if (report.wanted()) {
        nlohmann::ordered_json content{{"method", given.merge.method}, {"seconds", run.seconds()},
            {"bytes_read", bytes.read}, {"bytes_written", bytes.written}, {"points", points.candidates.size()},
            {"scored", left.size()}, {"peak_memory", tool::peak_memory()},
            {"peak_anonymous_memory", run.anonymous_peak()}};
        for (std::size_t c = 0; c < points.columns.size(); ++c) { content["best"][points.columns[c]] = best.point[c]; }
        content["best"]["score"] = best.score;
        content["options"] = tool::json_of(method.values(request_of(given, method, points, winner).options));
        report.finish(content);
    }
    struct {
        std::optional<tool::best_merge>& model;
        void commit()
        {
            if (model) { model->commit(); }
        }
    } merged{out};
    tool::conclude("best of " + tool::counted(points.candidates.size(), "point") + ": "
            + tool::printable(here.describe(best.point)) + " score=" + taskvec::csv_number(best.score)
            + (given.merge.out.empty() ? std::string() : ", merged into '" + tool::printable(given.merge.out) + "'")
            + "\n",
        report, merged);
}

/// Adds a flag for each axis that some method's table has.
void add_axis_options(tool::command& verb, sweep_settings& given)
{
    std::set<std::string> seen;
    for (const auto& table : tool::method_tables()) {
        for (const auto& option : table.options) {
            const auto& axis = option.axis;
            if (axis.name.empty() || !seen.insert(std::string(axis.name)).second) { continue; }
            const std::string flag = "--" + std::string(axis.name);
            verb.take(flag, "GRID",
                "Values of --" + option.name + ", such as 0.1,0.3 or 0:1:0.05 (default: " + std::string(axis.usual)
                    + (axis.of_subsets.empty() ? "" : "; " + std::string(axis.of_subsets) + " with --subsets") + ")",
                [&given, flag, name = option.name](
                    const std::string& text) { given.grids[name] = {name, text, flag}; });
        }
    }
    verb.texts("--over", given.over, "OPTION=GRID", "Values of any other option that is a number, such as t=0:1:0.1");
    verb.text("--lambda-per-task", given.per_task, "GRID",
        "Values of a lambda of each task's own, such as 0:1:0.25: all combinations");
}

const tool::register_verb sweep_verb(25, "sweep",
    "Merge over a grid of lambdas, densities or task subsets, and score each merge by a command",
    [](tool::command& verb) {
        const auto given = std::make_shared<sweep_settings>();
        given->merge.method = "task-arithmetic";
        tool::add_method_option(verb, given->merge, tool::presence::optional,
            "How to merge; see 'taskvec merge --help' (default: task-arithmetic)");
        tool::add_base_option(verb, given->merge);
        tool::add_weighted_tasks_option(verb, given->merge);
        tool::add_score_options(verb, given->score);
        add_axis_options(verb, *given);
        verb.flag("--subsets", given->subsets, "Every subset of two or more tasks");
        verb.count("--smallest", given->smallest, "N", "Tasks in the smallest of the subsets (default: 2)");
        verb.count("--jobs", given->jobs, "N", "Scoring commands that run at the same time (default: 1)");
        tool::add_table_option(verb, given->score, "points");
        verb.text("--svg", given->svg, "FILE", "Also draw the scores (needs gnuplot)");
        verb.text("--out", given->merge.out, "PATH", "Write the best merge: a file, or a directory");
        tool::add_scratch_option(verb, given->score);
        tool::add_merge_options(verb, given->merge);
        tool::add_copy_options(verb, given->merge.copies);
        verb.footer(
            "The command finds the point in TASKVEC_TASKS (names joined by +), TASKVEC_DENSITY and "
            "TASKVEC_LAMBDA (of each task, joined by commas, with --lambda-per-task).\n\nExample:\n  taskvec sweep "
            "--base base.safetensors --task math.safetensors --task code.safetensors \\\n"
            "      --score 'python evaluate.py {}' --csv scores.csv --out best.safetensors");
        verb.action([given] { run_sweep(*given); });
    });

} // namespace
