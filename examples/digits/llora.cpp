// SPDX-License-Identifier: Apache-2.0
#include "llora.hpp"

#include "checkpoints.hpp"
#include "figures.hpp"
#include "lorahub.hpp"
#include "low_rank.hpp"
#include "merging.hpp"

#include <taskvec/adapters/phi_space.hpp>
#include <taskvec/analysis/disentanglement.hpp>
#include <taskvec/analysis/scores.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/search/subset_sweep.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <span>
#include <sstream>

namespace digits {
namespace {

using members = std::span<const std::size_t>;

constexpr double ties_density = 0.2;

/// Rows of `data` from the front; all of them for 0.
std::vector<dataset> first_images(const std::vector<dataset>& data, std::size_t images)
{
    std::vector<dataset> few;
    for (const auto& one : data) {
        const std::size_t count = images == 0 ? one.size() : std::min(images, one.size());
        few.push_back(first(one, count));
    }
    return few;
}

/// Adapters of one kind around their φ0: their task vectors, and the models that points of φ space make.
class phi_space {
public:
    phi_space(const setting& s, const adapter& initial, const std::vector<adapter>& adapters, parameterisation kind)
        : s_(s)
        , initial_(initial)
        , adapters_(adapters)
        , kind_(kind)
    {
        for (const auto& phi : adapters) {
            adapter& vector = vectors_.emplace_back();
            taskvec::difference(one_thread, phi.values(), initial.values(), vector.values());
        }
    }

    [[nodiscard]] std::vector<taskvec::host_view<const float>> vectors() const
    {
        std::vector<taskvec::host_view<const float>> views;
        for (const auto& vector : vectors_) { views.push_back(taskvec::as_view(vector.values())); }
        return views;
    }
    [[nodiscard]] taskvec::host_view<const float> start() const { return taskvec::as_view(initial_.values()); }

    [[nodiscard]] encoder model(const adapter& phi) const { return adapted(s_.base, initial_, phi, kind_); }
    [[nodiscard]] encoder model(taskvec::host_view<const float> phi) const
    {
        adapter copy;
        std::ranges::copy(phi, copy.values().begin());
        return model(copy);
    }

    /// φ0 + λ·Σ(φt − φ0): `sum` is what a sweep over subsets hands out.
    [[nodiscard]] adapter moved(taskvec::host_view<const float> sum, double lambda) const
    {
        adapter phi;
        taskvec::apply(one_thread, initial_.values(), sum, lambda, phi.values());
        return phi;
    }
    /// TIES over some of the adapters, after the check that they share their φ0.
    [[nodiscard]] adapter elected(members subset, double lambda) const
    {
        std::vector<taskvec::initialized_adapter> chosen;
        for (const std::size_t task : subset) { chosen.push_back({adapters_[task].model(), initial_.model()}); }
        adapter phi;
        taskvec::merge_in_phi_space(
            one_thread, taskvec::ties_options{.density = ties_density, .lambda = lambda}, chosen, phi.model());
        return phi;
    }

private:
    const setting& s_;
    const adapter& initial_;
    const std::vector<adapter>& adapters_;
    parameterisation kind_;
    std::vector<adapter> vectors_;
};

/// A merge of a subset with a λ, and the λ that validation may choose from; none: it has no λ.
struct phi_merge {
    std::string_view name;
    std::vector<double> lambdas;
    std::function<adapter(const phi_space&, members, taskvec::host_view<const float> sum, double lambda)> make;
};

const std::vector<phi_merge>& merges()
{
    static const std::vector<phi_merge> all{
        {"Average", {},
            [](const phi_space& space, members subset, auto sum, double) {
                return space.moved(sum, 1.0 / static_cast<double>(subset.size()));
            }},
        {"Task Arithmetic", grid(0.05, 1.0, 0.05),
            [](const phi_space& space, members, auto sum, double lambda) { return space.moved(sum, lambda); }},
        {"TIES", grid(0.1, 2.0, 0.1),
            [](const phi_space& space, members subset, auto, double lambda) { return space.elected(subset, lambda); }},
    };
    return all;
}

/// A model's accuracy on some of the tasks, in their order.
std::vector<double> accuracies(
    const encoder& model, const matrix& head, const std::vector<dataset>& data, members subset)
{
    std::vector<double> all;
    for (const std::size_t task : subset) { all.push_back(accuracy(model, head, data[task])); }
    return all;
}

double mean_of(const std::vector<double>& values)
{
    return taskvec::summarize(values).mean;
}

/// Number of subsets of k tasks.
std::size_t subsets_of(std::size_t k)
{
    std::size_t count = 1;
    for (std::size_t i = 0; i < k; ++i) { count = count * (tasks - i) / (i + 1); }
    return count;
}

/// chosen[m][k]: the λ of merge m for subsets of k tasks, which does best on the validation images of a few such
/// subsets, spread evenly over all of that size.
using chosen_lambdas = std::vector<std::array<double, tasks + 1>>;
chosen_lambdas choose_lambdas(const setting& s, const phi_space& space, std::size_t trials)
{
    std::vector<std::array<std::vector<double>, tasks + 1>> scores(merges().size());
    std::array<std::size_t, tasks + 1> seen{};
    taskvec::for_each_subset(one_thread, space.vectors(), {}, [&](members subset, taskvec::host_view<const float> sum) {
        const std::size_t k = subset.size(), all = subsets_of(k), wanted = trials == 0 ? all : std::min(trials, all),
                          place = seen[k]++;
        // The places i·all/wanted for i = 0 … wanted − 1.
        if ((place * wanted + all - 1) / all * all / wanted != place) { return; }
        for (std::size_t m = 0; m < merges().size(); ++m) {
            const auto& [name, lambdas, make] = merges()[m];
            scores[m][k].resize(lambdas.size());
            for (std::size_t i = 0; i < lambdas.size(); ++i) {
                scores[m][k][i] += mean_of(
                    accuracies(space.model(make(space, subset, sum, lambdas[i])), s.base.head, s.validation, subset));
            }
        }
    });
    chosen_lambdas chosen(merges().size());
    for (std::size_t m = 0; m < merges().size(); ++m) {
        for (std::size_t k = 2; k <= tasks && !merges()[m].lambdas.empty(); ++k) {
            choice<double> best;
            for (std::size_t i = 0; i < scores[m][k].size(); ++i) {
                best.offer(merges()[m].lambdas[i], scores[m][k][i]);
            }
            chosen[m][k] = best.best;
        }
    }
    return chosen;
}

/// Every subset, merged by every merge and scored on its tasks; all eight together also in full, for the table.
void sweep(const setting& s, const phi_space& space, const chosen_lambdas& lambdas, const std::vector<dataset>& test,
    const std::vector<encoder>& singles, phi_results& results)
{
    std::vector<double> single;
    for (std::size_t task = 0; task < tasks; ++task) {
        single.push_back(accuracy(singles[task], s.base.head, test[task]));
    }
    taskvec::for_each_subset(one_thread, space.vectors(), {}, [&](members subset, taskvec::host_view<const float> sum) {
        std::vector<double> specialists;
        for (const std::size_t task : subset) { specialists.push_back(single[task]); }
        for (std::size_t m = 0; m < merges().size(); ++m) {
            const auto& merge = merges()[m];
            const encoder model = space.model(merge.make(space, subset, sum, lambdas[m][subset.size()]));
            results.normalized[std::string(merge.name)][subset.size()].push_back(
                taskvec::mean_normalized_score(accuracies(model, s.base.head, test, subset), specialists));
            if (subset.size() == tasks) {
                results.methods.add(merge.name, encoder::size(), evaluate(model, s.base.head, s.test));
            }
        }
    });
}

std::vector<int> predictions(const encoder& model, const matrix& head, const matrix& inputs)
{
    const matrix logits = forward(model, head, inputs).logits;
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

void measure_disentanglement(
    const setting& s, const phi_space& phi, const std::vector<dataset>& test, const effort& how, phi_results& results)
{
    taskvec::task_space<float> space(phi.start(), phi.vectors(), one_thread);
    taskvec::disentanglement_meter meter(space, [&](taskvec::host_view<const float> point, std::size_t task) {
        return predictions(phi.model(point), s.base.head, test[task].inputs);
    });

    taskvec::lambda_grid mean;
    const auto all = pairs(how);
    for (const auto& [first, second] : all) {
        const auto one =
            meter.grid({.task1 = first, .task2 = second, .lambda1 = taskvec::equidistant(-1, 1, how.grid)});
        if (mean.values.empty()) { mean = {one.lambda1, one.lambda2, std::vector<double>(one.values.size())}; }
        for (std::size_t i = 0; i < one.values.size(); ++i) {
            mean.values[i] += one.values[i] / static_cast<double>(all.size());
        }
    }
    results.disentanglement.push_back(std::move(mean));

    std::vector<double>& together = results.together.emplace_back();
    for (const double lambda : together_lambdas()) {
        together.push_back(meter.error(std::vector<double>(tasks, lambda)) / tasks);
    }
}

template <class Model>
std::vector<double> cosines(const Model& base, const std::vector<Model>& models)
{
    const taskvec::const_model_ref start = base.model();
    const std::vector<taskvec::const_model_ref> tuned = views(models);
    return taskvec::cosine_matrix(one_thread, taskvec::aligned_models(&start, tuned));
}

/// Everything about one kind of adapters.
std::string measure(const setting& s, const adapter& initial, const std::vector<adapter>& adapters,
    parameterisation kind, const effort& how, phi_results& results)
{
    const phi_space space(s, initial, adapters, kind);
    std::vector<encoder> singles;
    for (const auto& phi : adapters) { singles.push_back(space.model(phi)); }
    results.methods.add("Pre-Trained", encoder::size(), evaluate(s.base.body, s.base.head, s.test));
    results.methods.add(
        "Single-Task", encoder::size() + tasks * adapter::size(), evaluate(singles, s.base.head, s.test));

    const std::vector<dataset> test = first_images(s.test, how.images);
    const chosen_lambdas lambdas = choose_lambdas(s, space, how.trials);
    sweep(s, space, lambdas, test, singles, results);
    const auto sought = lorahub(s, initial, adapters, [&](const adapter& phi) { return space.model(phi); });
    results.methods.add("LoraHub", encoder::size(), evaluate(space.model(sought.model), s.base.head, s.test));
    results.cosines.push_back(cosines(initial, adapters));
    results.weight_cosines.push_back(cosines(s.base.body, singles));
    measure_disentanglement(s, space, test, how, results);

    std::string chosen;
    for (std::size_t m = 0; m < merges().size(); ++m) {
        if (merges()[m].lambdas.empty()) { continue; }
        chosen += taskvec::message(
            "seed ", s.seed, ", ", kind == parameterisation::lora ? "LoRA" : "L-LoRA", ", ", merges()[m].name, ": λ");
        for (std::size_t k = 2; k <= tasks; ++k) { chosen += taskvec::message(' ', lambdas[m][k]); }
        chosen += '\n';
    }
    return chosen;
}

/// Of all seeds.
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

/// The mean of ξ where no λ is negative: where models are merged.
double mean_where_positive(const taskvec::lambda_grid& grid)
{
    std::vector<double> values;
    for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
            if (grid.lambda1[i] > -1e-9 && grid.lambda2[j] > -1e-9) { values.push_back(grid.at(i, j)); }
        }
    }
    return mean_of(values);
}

double mean_cosine(const std::vector<std::vector<double>>& seeds)
{
    return taskvec::mean_off_diagonal(mean_over_seeds(seeds));
}

/// The mean over subsets of so many tasks, for each seed.
std::vector<double> score(const phi_results& results, std::string_view method, std::size_t size)
{
    const std::vector<double>& all = results.normalized.at(std::string(method))[size];
    std::vector<double> seeds;
    const std::size_t each = subsets_of(size);
    for (std::size_t first = 0; first + each <= all.size(); first += each) {
        seeds.push_back(mean_of({all.begin() + static_cast<std::ptrdiff_t>(first),
            all.begin() + static_cast<std::ptrdiff_t>(first + each)}));
    }
    return seeds;
}

/// "93.31±1.20": of fractions, in percent.
std::string spread_text(const std::vector<double>& values)
{
    const auto s = taskvec::summarize(values);
    return percent(s.mean) + (s.count > 1 ? taskvec::message("±", percent(s.standard_deviation)) : "");
}

struct way {
    std::string_view name, reading, file; ///< reading: of L-LoRA, which has two
    const phi_results& results;
};
std::array<way, 2> ways(const llora_results& results)
{
    return {{{"LoRA", "", "lora", results.lora}, {"L-LoRA", " (per layer)", "llora", results.linearized}}};
}

plot::heat_map cosine_map(const way& one)
{
    const std::vector<std::string> names(task_names.begin(), task_names.end());
    const auto mean = mean_over_seeds(one.results.cosines);
    plot::heat_map map{.title = taskvec::message("Cosine of task vectors in φ space, ", one.name, one.reading),
        .columns = names,
        .rows = names};
    for (std::size_t t = 0; t < tasks; ++t) {
        const auto row = mean.begin() + static_cast<std::ptrdiff_t>(t * tasks);
        map.values.emplace_back(row, row + static_cast<std::ptrdiff_t>(tasks));
    }
    return map;
}

plot::heat_map disentanglement_map(const way& one, double highest)
{
    const auto grid = mean_over_seeds(one.results.disentanglement);
    plot::heat_map map{.title = taskvec::message("ξ(λ1, λ2) of pairs of tasks, ", one.name, one.reading),
        .columns = {},
        .rows = {},
        .lowest = 0,
        .highest = highest,
        .diverging = false,
        .x_label = "λ2",
        .y_label = "λ1"};
    const auto label = [](double lambda) { return taskvec::message(lambda); };
    for (const double lambda : grid.lambda2) { map.columns.push_back(label(lambda)); }
    for (std::size_t i = grid.lambda1.size(); i-- > 0;) { // λ1 grows upwards
        map.rows.push_back(label(grid.lambda1[i]));
        auto& row = map.values.emplace_back();
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) { row.push_back(grid.at(i, j)); }
    }
    return map;
}

} // namespace

const std::vector<std::string_view>& phi_merges()
{
    static const std::vector<std::string_view> names{"Average", "Task Arithmetic", "TIES"};
    return names;
}

const std::vector<double>& together_lambdas()
{
    static const std::vector<double> lambdas = grid(0.0, 1.0, 0.1);
    return lambdas;
}

void run_llora(const setting& s, const adapter& initial, const std::vector<adapter>& lora,
    const std::vector<adapter>& linearized, const effort& how, const std::optional<std::filesystem::path>& out,
    llora_results& results)
{
    results.chosen += measure(s, initial, lora, parameterisation::lora, how, results.lora);
    results.chosen += measure(s, initial, linearized, parameterisation::linearized, how, results.linearized);
    const std::size_t all = s.test[0].size(), images = how.images == 0 ? all : std::min(how.images, all);
    results.scope = taskvec::message("Subsets of tasks and ξ are measured on ",
        images == all ? "all " : taskvec::message(images, " of the "), all,
        " test images. λ is chosen for each number of tasks, on the validation images of ",
        how.trials == 0 ? std::string("all its subsets") : taskvec::message(how.trials, " of its subsets"),
        ". ξ is a mean over ", pairs(how).size(), " of the 28 pairs of tasks",
        how.trials != 0 || !how.all_pairs ? " (--complete: all of everything)." : ".",
        " L-LoRA is its per-layer reading.");
    if (out) {
        save_base(s.base, *out);
        save(updates_of(initial), *out / "llora-init");
        for (std::size_t task = 0; task < tasks; ++task) {
            save(updates_of(linearized[task]), *out / "llora" / task_names[task]);
        }
    }
}

std::string text(const llora_results& results)
{
    std::string out = results.scope
        + ".\n\nNormalized score (accuracy / Single-Task, mean of the merged tasks) in percent, over all subsets of so "
          "many tasks\n\n";
    std::vector<std::vector<std::string>> cells{{"Method"}};
    for (std::size_t k = 2; k <= tasks; ++k) { cells[0].push_back(taskvec::message(k, " (", subsets_of(k), ')')); }
    for (const auto method : phi_merges()) {
        for (const auto& one : ways(results)) {
            auto& line = cells.emplace_back(std::vector<std::string>{taskvec::message(method, ", ", one.name)});
            for (std::size_t k = 2; k <= tasks; ++k) {
                line.push_back(spread_text(one.results.normalized.at(std::string(method))[k]));
            }
        }
    }
    out += aligned(cells);

    out += "\nBetween the task vectors of different tasks, and between their models\n\n";
    cells = {{"", "cosine in φ space", "in weight space", "ξ(0.25, 0.25)", "ξ(0.5, 0.5)", "ξ(1, 1)", "ξ on [0, 1]²",
        "on [-1, 1]²"}};
    for (const auto& one : ways(results)) {
        const auto grid = mean_over_seeds(one.results.disentanglement);
        cells.push_back({std::string(one.name), fixed(mean_cosine(one.results.cosines)),
            fixed(mean_cosine(one.results.weight_cosines)), fixed(on_diagonal(grid, 0.25)),
            fixed(on_diagonal(grid, 0.5)), fixed(on_diagonal(grid, 1)), fixed(mean_where_positive(grid)),
            fixed(grid.mean())});
    }
    return out + aligned(cells);
}

void write_llora(const llora_results& results, const std::filesystem::path& out)
{
    const std::vector<std::string> names(task_names.begin(), task_names.end());
    std::string score_csv = "way,method,tasks,subsets,mean,standard deviation,lowest,highest\n",
                together_csv = "lambda,LoRA,L-LoRA\n";
    plot::line_chart by_tasks{.title = "Merging in φ space, by number of tasks (L-LoRA: per layer)",
        .x_label = "tasks merged",
        .y_label = "accuracy / Single-Task, percent, mean of all subsets",
        .curves = {}},
        by_lambda{.title = "All eight tasks together: disentanglement error against λ (L-LoRA: per layer)",
            .x_label = "λ of every task",
            .y_label = "ξ(λ, …, λ) / 8: share of predictions that change",
            .curves = {}};
    double highest = 0;
    for (const auto& one : ways(results)) {
        for (const double value : mean_over_seeds(one.results.disentanglement).values) {
            highest = std::max(highest, value);
        }
    }
    for (const auto& one : ways(results)) {
        one.results.methods.write_csv(out / taskvec::message(one.file, "-phi.csv"));
        for (const auto method : phi_merges()) {
            plot::curve line{
                .label = taskvec::message(method, ", ", one.name), .x = {}, .y = {}, .dashed = one.file == "lora"};
            for (std::size_t k = 2; k <= tasks; ++k) {
                const auto s = taskvec::summarize(one.results.normalized.at(std::string(method))[k]);
                score_csv += taskvec::message(one.name, ',', method, ',', k, ',', subsets_of(k), ',', percent(s.mean),
                    ',', percent(s.standard_deviation), ',', percent(s.lowest), ',', percent(s.highest), '\n');
                line.x.push_back(static_cast<double>(k));
                line.y.push_back(100 * s.mean);
            }
            by_tasks.curves.push_back(std::move(line));
        }
        std::ostringstream cosine_csv, grid_csv;
        taskvec::write_csv(cosine_csv, mean_over_seeds(one.results.cosines), names);
        write_text(out / taskvec::message("cosine-", one.file, ".csv"), cosine_csv.str());
        draw(cosine_map(one), out / taskvec::message("cosine-", one.file, ".svg"));
        taskvec::write_csv(grid_csv, mean_over_seeds(one.results.disentanglement), "xi");
        write_text(out / taskvec::message("disentanglement-", one.file, ".csv"), grid_csv.str());
        draw(disentanglement_map(one, highest), out / taskvec::message("disentanglement-", one.file, ".svg"));
        by_lambda.curves.push_back(
            {.label = std::string(one.name), .x = together_lambdas(), .y = mean_over_seeds(one.results.together)});
    }
    for (std::size_t i = 0; i < together_lambdas().size(); ++i) {
        together_csv += taskvec::message(
            together_lambdas()[i], ',', fixed(by_lambda.curves[0].y[i]), ',', fixed(by_lambda.curves[1].y[i]), '\n');
    }
    write_text(out / "phi-score-against-tasks.csv", score_csv);
    draw(by_tasks, out / "phi-score-against-tasks.svg");
    write_text(out / "disentanglement-of-eight.csv", together_csv);
    draw(by_lambda, out / "disentanglement-of-eight.svg");
}

std::vector<claim> llora_claims(const llora_results& results, const table* fully_fine_tuned)
{
    const table &lora = results.lora.methods, &linearized = results.linearized.methods;
    std::vector<claim> claims;
    // A figure of each seed that is to be lower for L-LoRA.
    const auto lower = [&](std::string_view sentence, std::string_view place, std::string_view what, auto&& figure) {
        const std::vector<double> of_lora = figure(results.lora), of_linearized = figure(results.linearized);
        const spread difference = over_seeds(minus(of_lora, of_linearized));
        claims.push_back({std::string(sentence), std::string(place), minus(of_lora, of_linearized),
            taskvec::message(what, ": L-LoRA ", fixed(over_seeds(of_linearized).mean), ", LoRA ",
                fixed(over_seeds(of_lora).mean),
                of_lora.size() > 1
                    ? taskvec::message(" (difference ", fixed(difference.mean), "±", fixed(difference.deviation), ")")
                    : "")});
    };
    const auto of_each = [](const auto& seeds, auto&& figure) {
        std::vector<double> values;
        for (const auto& seed : seeds) { values.push_back(figure(seed)); }
        return values;
    };
    const auto cosine = [](const std::vector<double>& matrix) { return std::abs(taskvec::mean_off_diagonal(matrix)); };

    lower("L-LoRA's task vectors are closer to orthogonal than LoRA's, in φ space", "L Figures 2, 8", "mean cosine",
        [&](const phi_results& way) { return of_each(way.cosines, cosine); });
    lower("L-LoRA's disentanglement error is lower, on average over λ in [0, 1]²", "L Figure 6", "ξ",
        [&](const phi_results& way) { return of_each(way.disentanglement, mean_where_positive); });
    lower("L-LoRA's disentanglement error is lower, on average over λ in [-1, 1]²", "L Figure 6", "ξ",
        [&](const phi_results& way) {
            return of_each(way.disentanglement, [](const taskvec::lambda_grid& grid) { return grid.mean(); });
        });
    for (const auto method : phi_merges()) {
        // By how much it is higher for every number of tasks, in each seed: the least of the gains.
        std::vector<double> least;
        std::string measured = "gain in points for 2 to 8 tasks:";
        for (std::size_t k = 2; k <= tasks; ++k) {
            const std::vector<double> gain =
                minus(score(results.linearized, method, k), score(results.lora, method, k));
            measured += ' ' + points(over_seeds(gain).mean);
            if (least.empty()) { least = gain; }
            for (std::size_t seed = 0; seed < gain.size(); ++seed) { least[seed] = std::min(least[seed], gain[seed]); }
        }
        claims.push_back(
            {taskvec::message("L-LoRA's normalized score is higher for every number of tasks, by ", method),
                "L Table 1, Figures 9–11", least, measured});
    }

    const auto single = linearized["Single-Task"].averages(), lora_single = lora["Single-Task"].averages();
    std::vector<double> a_little;
    for (std::size_t seed = 0; seed < single.size(); ++seed) {
        const double below = lora_single[seed] - single[seed];
        a_little.push_back(std::min(below, 0.06 - below));
    }
    claims.push_back({"L-LoRA Single-Task is a little below LoRA Single-Task: below it, and within 6 points", "",
        a_little, against("L-LoRA", single, "LoRA", lora_single)});
    lower("L-LoRA's task vectors are closer to orthogonal than LoRA's, as changes of the weights", "", "mean cosine",
        [&](const phi_results& way) { return of_each(way.weight_cosines, cosine); });
    lower("L-LoRA's disentanglement error is lower where two task vectors are added whole", "", "ξ(1, 1)",
        [&](const phi_results& way) {
            return of_each(way.disentanglement, [](const taskvec::lambda_grid& grid) { return on_diagonal(grid, 1); });
        });
    lower("L-LoRA's disentanglement error is lower where all eight task vectors are added whole", "", "ξ(1, …, 1) / 8",
        [&](const phi_results& way) {
            return of_each(way.together, [](const std::vector<double>& seed) { return seed.back(); });
        });
    std::vector<double> mean(single.size()), lora_mean(single.size());
    std::vector<std::string> merged; // all the merges of the tables
    for (const auto& r : linearized.rows()) {
        if (r.method != "Pre-Trained" && r.method != "Single-Task") { merged.push_back(r.method); }
    }
    for (const auto& method : merged) {
        const auto accuracy = linearized[method].averages(), lora_accuracy = lora[method].averages();
        for (std::size_t seed = 0; seed < mean.size(); ++seed) {
            mean[seed] += accuracy[seed] / static_cast<double>(merged.size());
            lora_mean[seed] += lora_accuracy[seed] / static_cast<double>(merged.size());
        }
        claims.push_back({taskvec::message("L-LoRA merges better than LoRA by ", method, ", eight tasks, in accuracy"),
            "", minus(accuracy, lora_accuracy), against("L-LoRA", accuracy, "LoRA", lora_accuracy)});
    }
    claims.push_back({"L-LoRA merges better than LoRA on average over these methods, eight tasks, in accuracy", "",
        minus(mean, lora_mean), against("L-LoRA", mean, "LoRA", lora_mean)});
    for (const auto method : phi_merges()) {
        const auto gain = [&](std::size_t k) {
            return minus(score(results.linearized, method, k), score(results.lora, method, k));
        };
        claims.push_back({taskvec::message("L-LoRA's gain grows with the number of tasks, by ", method), "",
            minus(gain(tasks), gain(2)),
            taskvec::message("in points: ", points(over_seeds(gain(2)).mean), " for two tasks, ",
                points(over_seeds(gain(tasks)).mean), " for eight")});
    }
    if (fully_fine_tuned) {
        const auto best = linearized.best(phi_merges()), full = fully_fine_tuned->best(phi_merges());
        claims.push_back({"the best L-LoRA merge is better than the best merge of fully fine-tuned models by the same "
                          "methods, in accuracy",
            "", minus(best, full), against("L-LoRA", best, "full fine-tuning", full)});
    }
    return claims;
}

} // namespace digits
