// taskvec sweep: merges over a grid, each scored by a command.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"
#include "scoring.hpp"

#include <taskvec/search/sweep.hpp>

#include <plot.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <exception>
#include <map>
#include <memory>
#include <sstream>
#include <thread>

namespace {

struct settings {
    tool::merge_settings merge;
    tool::score_command score;
    std::string csv, svg, scratch, lambdas, densities;
    bool subsets = false, minimize = false;
    std::size_t smallest = 2, jobs = 1;
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
        if (!(count >= 0) || count > 100000) { fail(); }
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
    std::optional<double> density, lambda;
    std::vector<std::string> point; ///< as the table has it
};

/// All subsets of at least `smallest` of n tasks, depth first.
std::vector<std::vector<std::size_t>> subsets_of(std::size_t n, std::size_t smallest)
{
    std::vector<std::vector<std::size_t>> all;
    std::vector<std::size_t> subset;
    for (std::size_t next = 0;;) {
        if (next < n) {
            subset.push_back(next++);
            if (subset.size() >= smallest) { all.push_back(subset); }
        }
        else {
            if (subset.empty()) { return all; }
            next = subset.back() + 1;
            subset.pop_back();
        }
    }
}

struct grid {
    std::vector<std::string> columns;
    std::vector<candidate> candidates; ///< those of one subset are neighbours
};

grid grid_of(const settings& given, const tool::method& method)
{
    const auto tasks = tool::parse_tasks(given.merge.tasks);
    const auto axis = [&](const char* name, const std::string& text, const std::optional<double>& one,
                          const std::vector<double>& usual) {
        const bool used = method.uses.contains(name);
        if (!text.empty() && !used) {
            throw tool::usage_error(taskvec::message("--method ", method.name, " has no ", name, " to sweep over"));
        }
        const auto option = std::string(name) == "density" ? "--densities" : "--lambdas";
        if (!text.empty() && one) {
            throw tool::usage_error(taskvec::message("--", name, " and ", option, " exclude each other"));
        }
        std::vector<std::optional<double>> values;
        if (!used) { values.emplace_back(); }
        else if (one) {
            values.emplace_back(one);
        }
        else {
            for (const double value : text.empty() ? usual : parse_grid(text, option)) { values.emplace_back(value); }
        }
        return values;
    };
    const auto lambdas = axis("lambda", given.lambdas, given.merge.lambda,
        given.subsets ? std::vector<double>{0.3} : taskvec::lambda_steps());
    const auto densities = axis("density", given.densities, given.merge.density, {0.05, 0.1, 0.2, 0.3, 0.5});
    for (const auto& density : densities) {
        if (density) { tool::check_density(*density, "--densities"); }
    }
    grid result;
    if (given.subsets) { result.columns.push_back("tasks"); }
    if (densities[0]) { result.columns.push_back("density"); }
    if (lambdas[0]) { result.columns.push_back("lambda"); }
    if (result.columns.empty()) {
        throw tool::usage_error("--method " + method.name + " has nothing to sweep over but --subsets");
    }
    std::vector<std::vector<std::size_t>> sets;
    if (given.subsets) {
        if (tasks.size() > 20) {
            throw tool::usage_error(
                taskvec::message("--subsets of ", tasks.size(), " tasks are too many to score; give at most 20"));
        }
        sets = subsets_of(tasks.size(), std::max<std::size_t>(1, given.smallest));
        if (sets.empty()) {
            throw tool::usage_error(taskvec::message("--subsets: there is none of ", given.smallest, " tasks or more"));
        }
    }
    else {
        sets.emplace_back();
        for (std::size_t t = 0; t < tasks.size(); ++t) { sets[0].push_back(t); }
    }
    for (const auto& set : sets) {
        std::string names;
        for (const auto t : set) { names += (names.empty() ? "" : "+") + tasks[t].name; }
        for (const auto& density : densities) {
            for (const auto& lambda : lambdas) {
                candidate one{set, density, lambda, {}};
                if (given.subsets) { one.point.push_back(names); }
                if (density) { one.point.push_back(taskvec::detail::csv_number(*density)); }
                if (lambda) { one.point.push_back(taskvec::detail::csv_number(*lambda)); }
                const bool again = std::any_of(result.candidates.begin(), result.candidates.end(),
                    [&](const candidate& c) { return c.point == one.point; });
                if (!again) { result.candidates.push_back(std::move(one)); }
            }
        }
    }
    return result;
}

/// The command line of one candidate.
tool::merge_settings settings_of(const settings& given, const candidate& one)
{
    auto result = given.merge;
    const auto chosen = [&](std::vector<std::string>& list) {
        if (list.size() != given.merge.tasks.size()) { return; }
        std::vector<std::string> kept;
        for (const auto t : one.tasks) { kept.push_back(list[t]); }
        list = std::move(kept);
    };
    chosen(result.fisher);
    chosen(result.gram);
    chosen(result.tasks);
    result.density = one.density;
    result.lambda = one.lambda;
    return result;
}

/// What a scoring command is told of its candidate: TASKVEC_TASKS, TASKVEC_DENSITY, TASKVEC_LAMBDA, those that the
/// sweep has.
std::vector<std::string> variables_of(const std::vector<std::string>& columns, const std::vector<std::string>& point)
{
    std::vector<std::string> variables;
    for (std::size_t i = 0; i < columns.size(); ++i) {
        std::string name = "TASKVEC_";
        for (const char c : columns[i]) { name += static_cast<char>(c - 'a' + 'A'); }
        variables.push_back(name + "=" + point[i]);
    }
    return variables;
}

/// The models of the subset that was used last, kept open.
class open_inputs {
public:
    explicit open_inputs(const tool::method& method)
        : needs_base_(method.needs_base)
    { }
    const tool::merge_inputs& of(const tool::merge_settings& settings)
    {
        if (!inputs_ || tasks_ != settings.tasks) {
            inputs_ = std::make_unique<tool::merge_inputs>(settings, needs_base_);
            tasks_ = settings.tasks;
        }
        return *inputs_;
    }

private:
    bool needs_base_;
    std::vector<std::string> tasks_;
    std::unique_ptr<tool::merge_inputs> inputs_;
};

void write_table(const std::string& path, const taskvec::sweep_table& table)
{
    if (path.empty()) { return; }
    std::ostringstream text;
    taskvec::write_csv(text, table);
    taskvec::write_text_file(path, text.str());
}

taskvec::sweep_table read_table(const std::string& path, const std::vector<std::string>& columns)
{
    std::error_code ignored;
    taskvec::sweep_table table;
    if (!path.empty() && tool::fs::exists(path, ignored)) {
        table = taskvec::read_sweep(taskvec::read_text_file(path), path);
    }
    if (!table.columns().empty() && table.columns() != columns) {
        std::string found;
        for (const auto& name : table.columns()) { found += name + ","; }
        taskvec::raise<taskvec::invalid_argument>(taskvec::message(
            "'", path, "' holds another sweep, with the columns ", found, "score: name another --csv, or remove it"));
    }
    table.require_columns(columns);
    return table;
}

void draw(const settings& given, const grid& points, const taskvec::sweep_table& table)
{
    std::map<std::vector<std::string>, double> scores;
    for (const auto& row : table.rows()) { scores[row.point] = row.score; }
    plot::line_chart chart{
        .title = "Sweep of " + given.merge.method, .x_label = "lambda", .y_label = "score", .curves = {}};
    const bool one_each =
        given.subsets && std::all_of(points.candidates.begin(), points.candidates.end(), [&](const candidate& c) {
            return c.lambda == points.candidates[0].lambda && c.density == points.candidates[0].density;
        });
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
    else { // a curve for each subset and density; without a lambda, over the density
        const bool over_lambda = points.candidates[0].lambda.has_value();
        chart.x_label = over_lambda ? "lambda" : "density";
        for (const auto& one : points.candidates) {
            std::string label;
            for (std::size_t c = 0; c + 1 < one.point.size(); ++c) {
                label += (c ? ", " : "") + points.columns[c] + " " + one.point[c];
            }
            if (label.empty()) { label = given.merge.method; }
            auto place = std::find_if(chart.curves.begin(), chart.curves.end(),
                [&](const plot::curve& curve) { return curve.label == label; });
            if (place == chart.curves.end()) { place = chart.curves.insert(place, {.label = label, .x = {}, .y = {}}); }
            place->x.push_back(over_lambda ? *one.lambda : *one.density);
            place->y.push_back(scores.at(one.point));
        }
    }
    plot::write_svg(chart, given.svg);
}

void sweep(const settings& given)
{
    tool::check_score_command(given.score.text);
    if (!(given.score.timeout >= 0) || !std::isfinite(given.score.timeout)) {
        throw tool::usage_error(
            taskvec::message("--timeout is ", given.score.timeout, "; expected seconds, or 0 for as long as it takes"));
    }
    if (given.jobs == 0) { throw tool::usage_error("--jobs is 0; expected at least 1"); }
    const auto& method = tool::find_method(given.merge);
    const auto points = grid_of(given, method);
    auto table = read_table(given.csv, points.columns);
    std::vector<const candidate*> left;
    for (const auto& one : points.candidates) {
        if (!table.contains(one.point)) { left.push_back(&one); }
    }
    const tool::merge_inputs all(
        given.merge, method.needs_base); // everything that can be checked is, before the first candidate
    tool::runner run(given.merge.run);
    if (method.examine) { method.examine(run.policy(), given.merge, all); }
    if (given.merge.run.dry_run) {
        tool::print("would score " + tool::counted(left.size(), "candidate") + " of "
            + tool::counted(points.candidates.size(), "point") + " by '" + tool::printable(given.score.text) + "'\n"
            + tool::describe(all));
        return;
    }
    tool::report_file report(given.merge.run.report);
    write_table(given.csv, table); // a path that cannot be written is known early
    if (!table.rows().empty()) {
        tool::note(given.merge.run,
            tool::counted(points.candidates.size() - left.size(), "point") + " of "
                + std::to_string(points.candidates.size()) + " are in '" + given.csv
                + "' already: remove it to score them again");
    }
    {
        const tool::scratch_directory scratch(
            given.scratch.empty() ? tool::fs::temp_directory_path() : tool::fs::path(given.scratch));
        open_inputs inputs(method);
        for (std::size_t first = 0; first < left.size(); first += given.jobs) {
            const std::size_t count = std::min(given.jobs, left.size() - first);
            std::vector<tool::fs::path> files;
            for (std::size_t i = 0; i < count; ++i) {
                const auto settings = settings_of(given, *left[first + i]);
                const auto& models = inputs.of(settings);
                files.push_back(scratch.path() / ("candidate" + std::to_string(i) + ".safetensors"));
                taskvec::safetensors_writer out(
                    files.back(), models.models().outputs(), models.metadata(), taskvec::durability::process);
                method.run(run.policy(), settings, models, out);
                if (first == 0) { tool::guard_temporary(files.back()); }
                out.commit();
            }
            std::vector<std::optional<double>> scores(count);
            std::vector<std::exception_ptr> failures(count);
            {
                std::vector<std::jthread> threads;
                const auto score = [&](std::size_t i) {
                    try {
                        const auto& point = left[first + i]->point;
                        scores[i] = tool::run_score_command(
                            given.score, {files[i], table.describe(point), variables_of(points.columns, point)});
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
            write_table(given.csv, table);
            for (const auto& failure : failures) {
                if (failure) { std::rethrow_exception(failure); }
            }
        }
    }
    // The best of this grid: the table may hold other points.
    taskvec::sweep_table here(points.columns);
    for (const auto& row : table.rows()) {
        if (std::any_of(points.candidates.begin(), points.candidates.end(),
                [&](const candidate& c) { return c.point == row.point; })) {
            here.add(row.point, row.score);
        }
    }
    const auto& best = *here.best(!given.minimize);
    const auto& winner = *std::find_if(
        points.candidates.begin(), points.candidates.end(), [&](const candidate& c) { return c.point == best.point; });
    std::optional<tool::model_output> out;
    if (!given.merge.out.empty()) {
        const auto settings = settings_of(given, winner);
        const tool::merge_inputs inputs(settings, method.needs_base);
        out.emplace(settings.out, inputs.models().outputs(), inputs.metadata(), settings.shard_size);
        method.run(run.policy(), settings, inputs, out->sink());
        out->finish();
    }
    if (!given.svg.empty()) { draw(given, points, here); }
    if (report.wanted()) {
        nlohmann::ordered_json content{{"method", given.merge.method}, {"seconds", run.seconds()},
            {"points", points.candidates.size()}, {"scored", left.size()}, {"peak_memory", tool::peak_memory()},
            {"peak_anonymous_memory", run.anonymous_peak()}};
        for (std::size_t c = 0; c < points.columns.size(); ++c) { content["best"][points.columns[c]] = best.point[c]; }
        content["best"]["score"] = best.score;
        report.finish(content);
    }
    if (out) { out->commit(); }
    report.commit();
    tool::print("best of " + tool::counted(points.candidates.size(), "point") + ": "
        + tool::printable(here.describe(best.point)) + " score=" + taskvec::detail::csv_number(best.score)
        + (given.merge.out.empty() ? std::string() : ", merged into '" + tool::printable(given.merge.out) + "'")
        + "\n");
}

const tool::register_verb verb(25, [](CLI::App& app) {
    auto* sweep_verb = app.add_subcommand(
        "sweep", "Merge over a grid of lambdas, densities or task subsets, and score each merge by a command");
    const auto given = std::make_shared<settings>();
    given->merge.method = "task-arithmetic";
    tool::add_method_option(*sweep_verb, given->merge);
    sweep_verb->get_option("--method")
        ->required(false)
        ->description("How to merge; see 'taskvec merge --help' (default: task-arithmetic)");
    sweep_verb->add_option("--base", given->merge.base, "The pre-trained model that the tasks started from")
        ->type_name("MODEL");
    sweep_verb
        ->add_option(
            "--task", given->merge.tasks, "A fine-tuned model, with its weight (default 1); repeat, order counts")
        ->type_name("PATH[=WEIGHT]")
        ->required()
        ->allow_extra_args(false);
    sweep_verb
        ->add_option("--score", given->score.text,
            "Shell command; {} is the merged model's path, the last number it prints is the score")
        ->type_name("'CMD {}'")
        ->required();
    sweep_verb
        ->add_option("--lambdas", given->lambdas, "Such as 0.1,0.3 or 0:1:0.05 (default: 0:1:0.05; 0.3 with --subsets)")
        ->type_name("GRID");
    sweep_verb->add_option("--densities", given->densities, "For ties and dare (default: 0.05,0.1,0.2,0.3,0.5)")
        ->type_name("GRID");
    sweep_verb->add_flag("--subsets", given->subsets, "Every subset of two or more tasks");
    sweep_verb->add_option("--smallest", given->smallest, "Tasks in the smallest of the subsets (default: 2)")
        ->type_name("N")
        ->transform(tool::decimal_number());
    sweep_verb->add_flag("--minimize", given->minimize, "The lowest score is the best");
    sweep_verb->add_option("--jobs", given->jobs, "Scoring commands that run at the same time (default: 1)")
        ->type_name("N")
        ->transform(tool::decimal_number());
    sweep_verb
        ->add_option("--timeout", given->score.timeout, "Seconds that a scoring command may take (default: 0, any)")
        ->type_name("S");
    sweep_verb
        ->add_option("--csv", given->csv, "Table of points and scores, written after each; a later run goes on from it")
        ->type_name("FILE");
    sweep_verb->add_option("--svg", given->svg, "Also draw the scores (needs gnuplot)")->type_name("FILE");
    sweep_verb->add_option("--out", given->merge.out, "Write the best merge: a file, or a directory")
        ->type_name("PATH");
    sweep_verb
        ->add_option(
            "--scratch", given->scratch, "Directory for candidates while they are scored (default: the system's)")
        ->type_name("DIR");
    tool::add_density_option(
        *sweep_verb, given->merge, given->merge.density, "--density", "One density instead of a grid");
    tool::add_merge_options(*sweep_verb, given->merge);
    sweep_verb->footer("The command finds the point in TASKVEC_TASKS (names joined by +), TASKVEC_DENSITY and "
                       "TASKVEC_LAMBDA.\n\nExample:\n  taskvec sweep "
                       "--base base.safetensors --task math.safetensors --task code.safetensors \\\n"
                       "      --score 'python evaluate.py {}' --csv scores.csv --out best.safetensors");
    sweep_verb->callback([given] { sweep(*given); });
});

} // namespace
