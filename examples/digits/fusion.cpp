// SPDX-License-Identifier: Apache-2.0
#include "fusion.hpp"

#include "figures.hpp"
#include "merging.hpp"

#include <taskvec/analysis/disentanglement.hpp>
#include <taskvec/analysis/scores.hpp>
#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/search/task_space.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>

namespace digits {
namespace {

std::vector<std::string> task_labels()
{
    return {task_names.begin(), task_names.end()};
}

std::vector<int> predicted(const matrix& logits)
{
    std::vector<int> labels;
    for (Eigen::Index i = 0; i < logits.rows(); ++i) {
        Eigen::Index best = 0;
        logits.row(i).maxCoeff(&best);
        labels.push_back(static_cast<int>(best));
    }
    return labels;
}

std::vector<std::pair<std::size_t, std::size_t>> pairs(const effort& how)
{
    std::vector<std::pair<std::size_t, std::size_t>> all;
    for (std::size_t t = 0; t < tasks; ++t) {
        if (!how.all_pairs) { all.emplace_back(t, (t + 1) % tasks); }
        for (std::size_t u = t + 1; u < tasks && how.all_pairs; ++u) { all.emplace_back(t, u); }
    }
    return all;
}

void measure_disentanglement(const way& w, const std::vector<dataset>& test, const effort& how, way_results& results)
{
    taskvec::task_space<float> space(taskvec::as_view(w.start), w.vector_views(), one_thread);
    taskvec::disentanglement_meter meter(space, [&](taskvec::host_view<const float> point, std::size_t task) {
        return predicted(w.at(point)(test[task].inputs));
    });
    const bool first_seed = results.disentanglement.empty();
    taskvec::lambda_grid mean;
    const auto all = pairs(how);
    for (const auto& [first, second] : all) {
        auto one = meter.grid({.task1 = first, .task2 = second, .lambda1 = taskvec::equidistant(-1, 1, how.grid)});
        if (mean.values.empty()) { mean = {one.lambda1, one.lambda2, std::vector<double>(one.values.size())}; }
        for (std::size_t i = 0; i < one.values.size(); ++i) {
            mean.values[i] += one.values[i] / static_cast<double>(all.size());
        }
        if (first_seed) { results.pairs.push_back({first, second, std::move(one)}); }
    }
    results.disentanglement.push_back(std::move(mean));

    std::vector<double>& together = results.together.emplace_back();
    for (const double lambda : together_lambdas()) {
        together.push_back(meter.error(std::vector<double>(tasks, lambda)) / tasks);
    }
    if (!first_seed) { return; }
    for (const auto& [first, second] : drawn_pairs) {
        const auto loss = [&, t = first, u = second](taskvec::host_view<const float> point) {
            const predictor predict = w.at(point);
            return (cross_entropy(predict(test[t].inputs), test[t].labels)
                       + cross_entropy(predict(test[u].inputs), test[u].labels))
                / 2;
        };
        results.planes.push_back({first, second,
            taskvec::loss_plane(
                space, {.task1 = first, .task2 = second, .lambda1 = taskvec::equidistant(-0.5, 1.5, how.grid)}, loss)});
    }
}

std::vector<double> cosines(const std::vector<float>& start, const std::vector<std::vector<float>>& tuned)
{
    const auto flat = [](const std::vector<float>& values) {
        return taskvec::const_model_ref{{"all",
            taskvec::const_tensor_ref{values.data(), taskvec::dtype::f32, {static_cast<std::int64_t>(values.size())}}}};
    };
    const taskvec::const_model_ref base = flat(start);
    std::vector<taskvec::const_model_ref> models;
    for (const auto& one : tuned) { models.push_back(flat(one)); }
    return taskvec::cosine_matrix(one_thread, taskvec::aligned_models(&base, models));
}

void measure(const setting& s, const way& w, const effort& how, way_results& results)
{
    sweep(s, w, how, results.subsets);
    const subset_scores::seed& scored = results.subsets.seeds().back();
    std::vector<dataset> test;
    for (const auto& task : s.test) {
        test.push_back(first(task, how.images == 0 ? task.size() : std::min(how.images, task.size())));
    }
    results.methods.add("Pre-Trained", encoder::size(), evaluate(s.base.body, s.base.head, test));
    results.methods.add("Single-Task", w.stored, scored.single);
    for (const auto merge : subset_merges()) {
        for (const auto& score : scored.of.find(merge)->second) {
            if (score.members.size() == tasks) { results.methods.add(merge, encoder::size(), score.accuracies); }
        }
    }
    results.cosines.push_back(cosines(w.start, w.tuned));
    if (w.folded) {
        std::vector<std::vector<float>> models;
        for (const auto& point : w.tuned) {
            const encoder model = w.folded(point);
            models.emplace_back(model.values().begin(), model.values().end());
        }
        results.weight_cosines.push_back(cosines({s.base.body.values().begin(), s.base.body.values().end()}, models));
    }
    measure_disentanglement(w, test, how, results);
}

std::vector<double> mean_over_seeds(const std::vector<std::vector<double>>& seeds)
{
    std::vector<double> mean(seeds.front().size());
    for (const auto& one : seeds) {
        for (std::size_t i = 0; i < mean.size(); ++i) { mean[i] += one[i] / static_cast<double>(seeds.size()); }
    }
    return mean;
}
taskvec::lambda_grid mean_over_seeds(const std::vector<taskvec::lambda_grid>& seeds)
{
    taskvec::lambda_grid mean = seeds.front();
    std::vector<std::vector<double>> values;
    for (const auto& one : seeds) { values.push_back(one.values); }
    mean.values = mean_over_seeds(values);
    return mean;
}

/// ξ at (λ, λ); NaN where the grid has no such point.
double on_diagonal(const taskvec::lambda_grid& grid, double lambda)
{
    for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
        if (std::abs(grid.lambda1[i] - lambda) < 1e-9) { return grid.at(i, i); }
    }
    return std::nan("");
}

/// The mean of ξ in the paper's box, λ in [0, 1]²: where models are merged.
double mean_in_box(const taskvec::lambda_grid& grid)
{
    std::vector<double> values;
    for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
            if (grid.lambda1[i] > -1e-9 && grid.lambda2[j] > -1e-9) { values.push_back(grid.at(i, j)); }
        }
    }
    return taskvec::summarize(values).mean;
}

double mean_cosine(const std::vector<double>& matrix)
{
    return taskvec::mean_off_diagonal(matrix);
}

/// A figure of each seed.
template <class Seeds>
std::vector<double> of_each(const Seeds& seeds, auto&& figure)
{
    std::vector<double> values;
    for (const auto& seed : seeds) { values.push_back(figure(seed)); }
    return values;
}

plot::heat_map cosine_map(const way_results& one)
{
    const auto mean = mean_over_seeds(one.cosines);
    plot::heat_map map{.title = taskvec::message("Cosine of task vectors, ", one.name),
        .columns = task_labels(),
        .rows = task_labels()};
    for (std::size_t t = 0; t < tasks; ++t) {
        const auto row = mean.begin() + static_cast<std::ptrdiff_t>(t * tasks);
        map.values.emplace_back(row, row + static_cast<std::ptrdiff_t>(tasks));
    }
    return map;
}

/// A grid as a heat map, λ1 upwards, with a box around [0, 1]².
plot::heat_map grid_map(const taskvec::lambda_grid& grid, std::string title, double highest)
{
    plot::heat_map map{.title = std::move(title),
        .columns = {},
        .rows = {},
        .lowest = 0,
        .highest = highest,
        .diverging = false,
        .x_label = "λ2",
        .y_label = "λ1"};
    const auto inside = [](double lambda) { return lambda > -1e-9 && lambda < 1 + 1e-9; };
    for (const double lambda : grid.lambda2) { map.columns.push_back(taskvec::message(lambda)); }
    const auto first = static_cast<std::size_t>(std::ranges::find_if(grid.lambda1, inside) - grid.lambda1.begin());
    const auto count = static_cast<std::size_t>(std::ranges::count_if(grid.lambda1, inside));
    const std::size_t last = first + count - 1, rows = grid.lambda1.size();
    map.box = plot::cell_box{rows - 1 - last, rows - 1 - first, first, last};
    for (std::size_t i = rows; i-- > 0;) {
        map.rows.push_back(taskvec::message(grid.lambda1[i]));
        auto& row = map.values.emplace_back();
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) { row.push_back(grid.at(i, j)); }
    }
    return map;
}

std::string cell(const subset_scores& scores, std::string_view merge, std::size_t k, over which)
{
    const auto as = [&](unit u) { return percent(taskvec::summarize(scores.values(merge, k, which, u)).mean); };
    return as(unit::normalized) + " / " + as(unit::absolute);
}

void write_pairs(const fusion_results& results, std::vector<pair_map> way_results::* maps, std::string_view value,
    const std::filesystem::path& file)
{
    std::string csv = taskvec::message("way,task1,task2,lambda1,lambda2,", value);
    for (const auto& one : results.ways) {
        for (const auto& [task1, task2, grid] : one.*maps) {
            for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
                for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
                    csv += taskvec::message("\n\"", one.name, "\",", task_names[task1], ',', task_names[task2], ',',
                        grid.lambda1[i], ',', grid.lambda2[j], ',', fixed(grid.at(i, j)));
                }
            }
        }
    }
    write_text(file, csv + '\n');
}

/// Task Arithmetic on every measured pair, a point for each: the paper's Figure 4.
plot::line_chart scatter(const fusion_results& results)
{
    plot::line_chart chart{.title = "Task Arithmetic on pairs of tasks: each pair's two normalized scores",
        .x_label = "first task: accuracy / Single-Task, percent",
        .y_label = "second task: accuracy / Single-Task, percent",
        .curves = {}};
    for (const auto& one : results.ways) {
        plot::curve points{.label = one.name, .x = {}, .y = {}, .line = false};
        for (const auto& seed : one.subsets.seeds()) {
            for (const auto& score : seed.of.find("Task Arithmetic")->second) {
                if (score.members.size() != 2) { continue; }
                const std::size_t t = score.members[0], u = score.members[1];
                points.x.push_back(100 * score.accuracies[t] / seed.single[t]);
                points.y.push_back(100 * score.accuracies[u] / seed.single[u]);
            }
        }
        chart.curves.push_back(std::move(points));
    }
    return chart;
}

std::string subset_text(const fusion_results& results)
{
    std::string out;
    for (const over which : readings) {
        out += taskvec::message("\nMean over ", name(which),
            " in percent, normalized (accuracy / Single-Task) / absolute (accuracy), by the number of tasks merged",
            which == over::all ? " (L Table 1, Figures 9–11)" : "", "\n\n");
        std::vector<std::vector<std::string>> cells{{"Merge, way"}};
        const std::size_t last = which == over::held_out ? tasks - 1 : tasks;
        for (std::size_t k = 2; k <= last; ++k) { cells[0].push_back(taskvec::message(k, " tasks")); }
        for (const auto merge : subset_merges()) {
            for (const auto& one : results.ways) {
                auto& line = cells.emplace_back(std::vector<std::string>{taskvec::message(merge, ", ", one.name)});
                for (std::size_t k = 2; k <= last; ++k) { line.push_back(cell(one.subsets, merge, k, which)); }
            }
        }
        out += aligned(cells);
    }
    return out;
}

/// All eight tasks merged: each task's accuracy over that of its own model, the mean over seeds.
std::vector<std::vector<std::string>> by_task(const fusion_results& results)
{
    std::vector<std::vector<std::string>> cells{{"Merge, way"}};
    for (const auto task : task_names) { cells[0].emplace_back(task); }
    for (const auto merge : subset_merges()) {
        for (const auto& one : results.ways) {
            auto& line = cells.emplace_back(std::vector<std::string>{taskvec::message(merge, ", ", one.name)});
            for (std::size_t task = 0; task < tasks; ++task) {
                std::vector<double> normalized;
                for (const auto& seed : one.subsets.seeds()) {
                    for (const auto& score : seed.of.find(merge)->second) {
                        if (score.members.size() != tasks) { continue; }
                        normalized.push_back(score.accuracies[task] / seed.single[task]);
                    }
                }
                line.push_back(percent(taskvec::summarize(normalized).mean));
            }
        }
    }
    return cells;
}

} // namespace

const way_results& fusion_results::operator[](std::string_view file) const
{
    const auto place = std::ranges::find(ways, file, &way_results::file);
    if (place == ways.end()) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::error_code::tensor_missing, taskvec::message("no way of fine-tuning '", file, "' was measured"));
    }
    return *place;
}

const std::vector<double>& together_lambdas()
{
    static const std::vector<double> lambdas = grid(0.0, 1.0, 0.1);
    return lambdas;
}

void run_fusion(const setting& s, const std::vector<way>& ways, const effort& how, fusion_results& results)
{
    if (results.ways.empty()) {
        for (const auto& w : ways) {
            results.ways.push_back({.name = w.name,
                .file = w.file,
                .methods = table(taskvec::message("Eight tasks merged in the space of their own parameters, ", w.name,
                    ": test accuracy in percent"))});
        }
    }
    for (std::size_t i = 0; i < ways.size(); ++i) { measure(s, ways[i], how, results.ways[i]); }
    const auto images = [](std::size_t wanted, std::size_t all) {
        return wanted == 0 || wanted >= all ? taskvec::message("all ", all) : taskvec::message(wanted, " of ", all);
    };
    results.scope = "Subsets of 2 to 8 tasks that were merged:";
    for (std::size_t k = 2; k <= tasks; ++k) { results.scope += taskvec::message(' ', measured_subsets(k, how)); }
    results.scope += taskvec::message(". λ and density are chosen for each of them on ",
        images(how.choice_images, s.validation[0].size()), " validation images of each of its tasks; LoraHub has ",
        how.hub_evaluations, " evaluations on ", how.hub_images,
        ". Scores, ξ and planes: ", images(how.images, s.test[0].size()), " test images. ξ is a mean over ",
        pairs(how).size(), " of the 28 pairs of tasks",
        how.subsets != 0 || !how.all_pairs ? " (--complete: all of everything)" : "",
        ". L-LoRA is its per-layer reading; LoraHub merges task vectors, and with Σw = 1 that is the paper's "
        "problem.\n");
}

std::string text(const fusion_results& results)
{
    std::string out = results.scope + subset_text(results);
    out += "\nAll eight tasks merged: normalized score of each task in percent (L Table 5)\n\n"
        + aligned(by_task(results));
    out += "\nBetween the task vectors of different tasks, and between their models\n\n";
    std::vector<std::vector<std::string>> cells{{"", "cosine of parameters", "of weights", "ξ(0.25, 0.25)",
        "ξ(0.5, 0.5)", "ξ(1, 1)", "ξ in [0, 1]²", "in [-1, 1]²"}};
    for (const auto& one : results.ways) {
        const auto grid = mean_over_seeds(one.disentanglement);
        cells.push_back({one.name, fixed(over_seeds(of_each(one.cosines, mean_cosine)).mean),
            one.weight_cosines.empty() ? "-" : fixed(over_seeds(of_each(one.weight_cosines, mean_cosine)).mean),
            fixed(on_diagonal(grid, 0.25)), fixed(on_diagonal(grid, 0.5)), fixed(on_diagonal(grid, 1)),
            fixed(mean_in_box(grid)), fixed(grid.mean())});
    }
    return out + aligned(cells);
}

void write_fusion(const fusion_results& results, const std::filesystem::path& out)
{
    std::string score_csv = "way,merge,tasks,mean over,subsets,normalized,standard "
                            "deviation,lowest,highest,absolute,standard deviation,lowest,highest";
    double highest = 0, highest_loss = 0;
    for (const auto& one : results.ways) {
        for (const auto& [task1, task2, grid] : one.pairs) {
            highest = std::max(highest, std::ranges::max(grid.values));
        }
        for (const auto& [task1, task2, grid] : one.planes) {
            highest_loss = std::max(highest_loss, std::ranges::max(grid.values));
        }
        one.methods.write_csv(out / taskvec::message("merged-", one.file, ".csv"));
        one.subsets.write_csv(out / taskvec::message("subsets-", one.file, ".csv"));
        for (const auto merge : subset_merges()) {
            for (const over which : readings) {
                for (std::size_t k = 2; k <= tasks; ++k) {
                    const auto normalized = one.subsets.values(merge, k, which, unit::normalized);
                    if (normalized.empty()) { continue; }
                    score_csv += taskvec::message(
                        "\n\"", one.name, "\",\"", merge, "\",", k, ',', name(which), ',', normalized.size());
                    for (const unit as : {unit::normalized, unit::absolute}) {
                        const auto s = taskvec::summarize(one.subsets.values(merge, k, which, as));
                        score_csv += taskvec::message(',', percent(s.mean), ',', percent(s.standard_deviation), ',',
                            percent(s.lowest), ',', percent(s.highest));
                    }
                }
            }
        }
    }
    write_text(out / "score-against-tasks.csv", score_csv + '\n');
    for (const over which : readings) {
        plot::line_chart chart{.title = taskvec::message("Task Arithmetic, mean over ", name(which)),
            .x_label = "tasks merged",
            .y_label = "normalized (solid) and absolute (dashed), percent",
            .curves = {}};
        for (const unit as : {unit::normalized, unit::absolute}) {
            for (const auto& one : results.ways) {
                plot::curve line{.label = one.name + (as == unit::absolute ? ", absolute" : ""),
                    .x = {},
                    .y = {},
                    .dashed = as == unit::absolute};
                for (std::size_t k = 2; k <= (which == over::held_out ? tasks - 1 : tasks); ++k) {
                    line.x.push_back(static_cast<double>(k));
                    line.y.push_back(
                        100 * taskvec::summarize(one.subsets.values("Task Arithmetic", k, which, as)).mean);
                }
                chart.curves.push_back(std::move(line));
            }
        }
        draw(chart,
            out
                / taskvec::message("score-against-tasks-",
                    which == over::all          ? "all"
                        : which == over::merged ? "merged"
                                                : "held-out",
                    ".svg"));
    }
    std::string task_csv;
    for (const auto& line : by_task(results)) {
        task_csv += '"' + line[0] + '"';
        for (std::size_t i = 1; i < line.size(); ++i) { task_csv += ',' + line[i]; }
        task_csv += '\n';
    }
    write_text(out / "normalized-score-of-each-task.csv", task_csv);
    draw(scatter(results), out / "pairs-of-tasks.svg");

    std::string together_csv = "lambda";
    plot::line_chart by_lambda{.title = "All eight tasks together: disentanglement error against λ",
        .x_label = "λ of every task",
        .y_label = "ξ(λ, …, λ) / 8: share of predictions that change",
        .curves = {}};
    for (const auto& one : results.ways) {
        std::ostringstream cosine_csv, grid_csv;
        taskvec::write_csv(cosine_csv, mean_over_seeds(one.cosines), task_labels());
        write_text(out / taskvec::message("cosine-", one.file, ".csv"), cosine_csv.str());
        draw(cosine_map(one), out / taskvec::message("cosine-", one.file, ".svg"));
        const auto mean = mean_over_seeds(one.disentanglement);
        taskvec::write_csv(grid_csv, mean, "xi");
        write_text(out / taskvec::message("disentanglement-", one.file, ".csv"), grid_csv.str());
        draw(grid_map(mean, taskvec::message("ξ(λ1, λ2), mean over pairs of tasks, ", one.name), highest),
            out / taskvec::message("disentanglement-", one.file, ".svg"));
        for (const auto& [first, second] : drawn_pairs) {
            const auto drawn = [t = first, u = second](
                                   const pair_map& map) { return map.task1 == t && map.task2 == u; };
            const std::string of = taskvec::message(task_names[first], " and ", task_names[second], ", ", one.name),
                              file =
                                  taskvec::message(one.file, '-', task_names[first], '-', task_names[second], ".svg");
            draw(grid_map(std::ranges::find_if(one.pairs, drawn)->grid, "ξ(λ1, λ2) of " + of, highest),
                out / ("disentanglement-" + file));
            // Far from the start losses explode; the scale ends where what matters would lose its colours.
            draw(grid_map(std::ranges::find_if(one.planes, drawn)->grid, "Loss of " + of, std::min(highest_loss, 3.0)),
                out / ("plane-" + file));
        }
        by_lambda.curves.push_back({.label = one.name, .x = together_lambdas(), .y = mean_over_seeds(one.together)});
        together_csv += ",\"" + one.name + '"';
    }
    write_pairs(results, &way_results::pairs, "xi", out / "disentanglement-of-pairs.csv");
    write_pairs(results, &way_results::planes, "loss", out / "planes.csv");
    for (std::size_t i = 0; i < together_lambdas().size(); ++i) {
        together_csv += taskvec::message('\n', together_lambdas()[i]);
        for (const auto& curve : by_lambda.curves) { together_csv += ',' + fixed(curve.y[i]); }
    }
    write_text(out / "disentanglement-of-eight.csv", together_csv + '\n');
    draw(by_lambda, out / "disentanglement-of-eight.svg");
}

std::vector<claim> fusion_claims(const fusion_results& results)
{
    const way_results &full = results["full"], &lora = results["lora"], &linearized = results["llora"];
    std::vector<claim> claims;
    // A figure of each seed that is to be lower for L-LoRA than for another way.
    const auto lower = [&](std::string_view sentence, std::string_view place, const way_results& than,
                           std::string_view what, auto&& figure) {
        const std::vector<double> theirs = figure(than), ours = figure(linearized);
        const spread difference = over_seeds(minus(theirs, ours));
        claims.push_back({std::string(sentence), std::string(place), minus(theirs, ours),
            taskvec::message(what, ": L-LoRA ", fixed(over_seeds(ours).mean), ", ", than.name, ' ',
                fixed(over_seeds(theirs).mean),
                ours.size() > 1
                    ? taskvec::message(" (difference ", fixed(difference.mean), "±", fixed(difference.deviation), ")")
                    : "")});
    };
    const auto cosine = [](const way_results& one) {
        return of_each(one.cosines, [](const auto& matrix) { return std::abs(mean_cosine(matrix)); });
    };
    // By how much a figure of `a` is above that of `b` for every number of tasks, in each seed: the least gain.
    const auto higher = [&](std::string_view sentence, std::string_view place, std::string_view merge,
                            const way_results& a, const way_results& b, over which, unit as) {
        std::vector<double> least;
        std::string measured = "gain in points for 2 to 8 tasks:";
        for (std::size_t k = 2; k <= tasks; ++k) {
            const std::vector<double> gain =
                minus(a.subsets.by_seed(merge, k, which, as), b.subsets.by_seed(merge, k, which, as));
            measured += ' ' + points(over_seeds(gain).mean);
            if (least.empty()) { least = gain; }
            std::ranges::transform(least, gain, least.begin(), [](double x, double y) { return std::min(x, y); });
        }
        claims.push_back({taskvec::message(sentence, ", by ", merge), std::string(place), least, measured});
    };
    const auto grows = [&](std::string_view place, std::string_view merge, const way_results& one) {
        const auto at = [&](std::size_t k) { return one.subsets.by_seed(merge, k, over::all, unit::normalized); };
        claims.push_back({taskvec::message("the normalized score over all tasks rises from two tasks to all, ",
                              one.name, ", by ", merge),
            std::string(place), minus(at(tasks), at(2)), against("all tasks", at(tasks), "two tasks", at(2))});
    };

    lower("L-LoRA's task vectors are closer to orthogonal than LoRA's", "L Figures 2, 8", lora, "mean cosine", cosine);
    lower("L-LoRA's task vectors are closer to orthogonal than those of full fine-tuning", "L Figures 2, 8", full,
        "mean cosine", cosine);
    lower("L-LoRA's disentanglement error is lower than LoRA's, on average in the box λ in [0, 1]²", "L Figure 6", lora,
        "ξ", [&](const way_results& one) { return of_each(one.disentanglement, mean_in_box); });
    for (const auto merge : subset_merges()) {
        if (merge == "LoraHub, Σw = 1") { continue; }
        higher("L-LoRA's normalized score over all tasks is above LoRA's for every number of tasks",
            "L Table 1, Figures 9–11", merge, linearized, lora, over::all, unit::normalized);
    }
    grows("L Table 1", "Task Arithmetic", full);
    grows("L Table 1", "Task Arithmetic", linearized);
    grows("L Table 1", "LoraHub", linearized);
    const auto seven = [](const way_results& one) {
        return one.subsets.by_seed("Task Arithmetic", tasks, over::all, unit::normalized);
    };
    claims.push_back(
        {"merged L-LoRA is above merged full fine-tuning in normalized score, all tasks, by Task Arithmetic",
            "L Table 1", minus(seven(linearized), seven(full)),
            against("L-LoRA", seven(linearized), "full fine-tuning", seven(full))});

    const auto single = linearized.methods["Single-Task"].averages(),
               lora_single = lora.methods["Single-Task"].averages();
    std::vector<double> a_little;
    for (const double below : minus(lora_single, single)) { a_little.push_back(std::min(below, 0.06 - below)); }
    claims.push_back({"L-LoRA Single-Task is a little below LoRA Single-Task: below it, and within 6 points", "",
        a_little, against("L-LoRA", single, "LoRA", lora_single)});
    for (const auto merge : subset_merges()) {
        higher("L-LoRA's absolute score over all tasks is above LoRA's for every number of tasks", "", merge,
            linearized, lora, over::all, unit::absolute);
        higher("L-LoRA's normalized score over the merged tasks is above LoRA's for every number of tasks", "", merge,
            linearized, lora, over::merged, unit::normalized);
    }
    lower("L-LoRA's task vectors are closer to orthogonal than LoRA's, as changes of the weights", "", lora,
        "mean cosine", [](const way_results& one) {
            return of_each(one.weight_cosines, [](const auto& matrix) { return std::abs(mean_cosine(matrix)); });
        });
    lower("L-LoRA's disentanglement error is lower where two task vectors are added whole", "", lora, "ξ(1, 1)",
        [&](const way_results& one) {
            return of_each(one.disentanglement, [](const auto& grid) { return on_diagonal(grid, 1); });
        });
    lower("L-LoRA's disentanglement error is lower where all eight task vectors are added whole", "", lora,
        "ξ(1, …, 1) / 8",
        [&](const way_results& one) { return of_each(one.together, [](const auto& seed) { return seed.back(); }); });
    return claims;
}

} // namespace digits
