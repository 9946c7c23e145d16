// SPDX-License-Identifier: Apache-2.0
#include "fft.hpp"

#include "checkpoints.hpp"
#include "data_merges.hpp"
#include "figures.hpp"
#include "lora.hpp"
#include "lorahub.hpp"
#include "merging.hpp"
#include "train.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#include <algorithm>
#include <array>

namespace digits {
namespace {

constexpr std::size_t one_model = encoder::size();
const std::vector<std::string_view> merges{
    "Average", "Task Arithmetic", "TIES", "Fisher-Merging", "RegMean", "LoraHub"};

/// The tuned merges of one seed.
struct tuned {
    encoder model;
    double lambda = 0, density = 0;
};

choice<tuned> tuned_task_arithmetic(const setting& s, const std::vector<encoder>& models, lambda_curves& curves)
{
    choice<tuned> best;
    for (const double lambda : grid(0.05, 1.0, 0.05)) {
        const encoder model = merged(taskvec::task_arithmetic_options{.lambda = lambda}, s.base.body, models);
        best.offer({model, lambda, 0}, curves.add("Task Arithmetic", lambda, model, s));
    }
    return best;
}

choice<tuned> tuned_ties(const setting& s, const std::vector<encoder>& models, lambda_curves& curves)
{
    choice<tuned> best;
    for (const double density : {0.1, 0.2, 0.3}) {
        for (const double lambda : grid(0.1, 2.0, 0.1)) {
            const encoder model =
                merged(taskvec::ties_options{.density = density, .lambda = lambda}, s.base.body, models);
            best.offer({model, lambda, density}, curves.add(with_density("TIES", density), lambda, model, s));
        }
    }
    return best;
}

/// Each task as it is served: its delta is switched on in the live weights, and off again for the next task.
scores served(const reused& compressed, const setting& s)
{
    const taskvec::cpu policy{.threads = 1};
    encoder live = compressed.shared;
    scores accuracies{};
    for (std::size_t task = 0; task < tasks; ++task) {
        const taskvec::saved_words saved = taskvec::apply(policy, compressed.deltas[task], live.model());
        accuracies[task] = accuracy(live, s.base.head, s.test[task]);
        taskvec::undo(policy, compressed.deltas[task], saved, live.model());
    }
    return accuracies;
}

} // namespace

const std::vector<double>& table_densities()
{
    static const std::vector<double> densities{0.01, 0.05, 0.10, 0.20};
    return densities;
}

const std::vector<double>& curve_densities()
{
    static const std::vector<double> densities{
        0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.10, 0.15, 0.20, 0.30, 0.40, 0.50, 1.0};
    return densities;
}

std::vector<encoder> fine_tune_all(const setting& s)
{
    std::vector<encoder> models;
    for (std::size_t task = 0; task < tasks; ++task) {
        models.push_back(fine_tune(s.base, s.train[task], s.seed, task_names[task]));
    }
    return models;
}

void run_fft(const setting& s, const std::optional<std::filesystem::path>& out, fft_results& results)
{
    const std::vector<encoder> models = fine_tune_all(s);
    const auto add = [&](std::string_view method, const encoder& model) {
        results.methods.add(method, one_model, evaluate(model, s.base.head, s.test));
    };

    add("Pre-Trained", s.base.body);
    results.methods.add("Single-Task", tasks * one_model, evaluate(models, s.base.head, s.test));
    const encoder averaged = merged(taskvec::average_options{}, s.base.body, models);
    add("Average", averaged);
    const auto arithmetic = tuned_task_arithmetic(s, models, results.lambdas);
    add("Task Arithmetic", arithmetic.best.model);
    const auto elected = tuned_ties(s, models, results.lambdas);
    add("TIES", elected.best.model);
    const std::vector<statistics> known = collect(s, models);
    const encoder by_fisher = fisher_merged(s, models, known);
    add("Fisher-Merging", by_fisher);
    const auto regmean = tuned_regmean(s, models, known);
    add("RegMean", regmean.best.model);
    const auto sought = lorahub(s, models);
    add("LoraHub", sought.model);
    results.chosen += taskvec::message("seed ", s.seed, ": Task Arithmetic λ ", arithmetic.best.lambda, ", TIES λ ",
        elected.best.lambda, " density ", elected.best.density, ", RegMean α ", regmean.best.alpha, ", LoraHub ",
        text(sought.found), "\n");

    const auto reuse = [&](std::string_view method, const encoder& shared, auto&& compress) {
        results.curve.add(with_density(method, 0), one_model, evaluate(shared, s.base.head, s.test));
        for (const double density : curve_densities()) {
            if (density == 0) { continue; }
            const reused compressed = compress(density);
            const scores accuracies = served(compressed, s);
            const std::string name = with_density(method, density);
            results.curve.add(name, compressed.parameters(), accuracies, compressed.bytes());
            if (std::ranges::find(table_densities(), density) != table_densities().end()) {
                results.methods.add(name, compressed.parameters(), accuracies, compressed.bytes());
            }
        }
    };
    const taskvec::task_arithmetic_options shared{.lambda = arithmetic.best.lambda};
    reuse("Post-Pruning", s.base.body, [&](double density) { return post_pruned(s.base.body, models, density); });
    reuse(
        "PERU-FFT", arithmetic.best.model, [&](double density) { return peru(shared, s.base.body, models, density); });
    for (const std::size_t q : table_ranks()) {
        const reused compressed = peru(
            shared, s.base.body, models, static_cast<double>(peru_lora_parameters(q)) / static_cast<double>(one_model));
        results.as_large.add(with_rank(q), compressed.parameters(), served(compressed, s), compressed.bytes());
    }

    if (out) {
        save_base(s.base, *out);
        for (std::size_t task = 0; task < tasks; ++task) {
            save(models[task], *out / taskvec::message(task_names[task], ".safetensors"));
        }
        save(averaged, *out / "merged-average.safetensors");
        save(arithmetic.best.model, *out / "merged-task-arithmetic.safetensors");
        save(elected.best.model, *out / "merged-ties.safetensors");
        save(by_fisher, *out / "merged-fisher.safetensors");
        save(regmean.best.model, *out / "merged-regmean.safetensors");
        save(sought.model, *out / "merged-lorahub.safetensors");
        save(known, models, *out / "statistics");
        save(peru(shared, s.base.body, models, 0.10), *out / "peru-fft");
    }
}

void write_fft(const fft_results& results, const std::filesystem::path& out)
{
    results.methods.write_csv(out / "fft.csv");
    results.lambdas.write(out / "accuracy-against-lambda.csv", out / "accuracy-against-lambda.svg",
        "Merging eight fine-tuned models: accuracy against λ");
    std::string csv =
        "m%,Post-Pruning,PERU-FFT,Post-Pruning #params,PERU-FFT #params,Post-Pruning bytes,PERU-FFT bytes\n";
    plot::curve by_pruning{.label = "Post-Pruning", .x = {}, .y = {}}, by_peru{.label = "PERU-FFT", .x = {}, .y = {}};
    for (const double density : curve_densities()) {
        const row &pruned = results.curve[with_density("Post-Pruning", density)],
                  &peru = results.curve[with_density("PERU-FFT", density)];
        csv += taskvec::message(100 * density, ',', percent(pruned.average()), ',', percent(peru.average()), ',',
            pruned.parameters, ',', peru.parameters, ',', pruned.bytes, ',', peru.bytes, '\n');
        by_pruning.x.push_back(100 * density);
        by_pruning.y.push_back(100 * pruned.average());
        by_peru.x.push_back(100 * density);
        by_peru.y.push_back(100 * peru.average());
    }
    write_text(out / "accuracy-against-m.csv", csv);

    plot::line_chart chart{.title = "Reusing eight fine-tuned models: accuracy against the share of entries kept",
        .x_label = "m: entries kept for each task, percent",
        .y_label = "test accuracy, percent, mean of eight tasks",
        .curves = {by_peru, by_pruning},
        .log_x = true,
        .x_ticks = {0.25, 0.5, 1, 2, 5, 10, 20, 50, 100}};
    for (const char* method : {"Single-Task", "TIES", "Task Arithmetic", "Pre-Trained"}) {
        chart.curves.push_back(level(method, 100 * results.methods[method].average(), by_peru.x[1], by_peru.x.back()));
    }
    // As the paper draws it: from 0 to 40%, where the curves have long been level.
    plot::line_chart saturation = chart;
    saturation.log_x = false;
    saturation.x_ticks = {0, 1, 5, 10, 20, 30, 40};
    for (auto& line : saturation.curves) {
        if (line.x.size() == 2) { line.x = {0, 40}; }
        while (line.x.back() > 40) {
            line.x.pop_back();
            line.y.pop_back();
        }
    }
    draw(saturation, out / "accuracy-against-m-to-40.svg");
    for (auto& line : chart.curves) { // 0 has no place on a logarithmic axis
        if (line.x.front() == 0) {
            line.x.erase(line.x.begin());
            line.y.erase(line.y.begin());
        }
    }
    draw(chart, out / "accuracy-against-m.svg");
}

std::vector<claim> fft_claims(const fft_results& results)
{
    const table& t = results.methods;
    const auto of = [&](std::string_view method) { return t[method].averages(); };
    const auto pre_trained = of("Pre-Trained"), single = of("Single-Task"), best = t.best(merges),
               worst = t.worst(merges);
    const auto pruned = [&](double m) { return results.curve[with_density("Post-Pruning", m)].averages(); };
    const auto peru = [&](double m) { return results.curve[with_density("PERU-FFT", m)].averages(); };

    std::vector<claim> claims;
    claims.push_back({"no merge comes near the single-task models: 5 points or more below", "P §4.1–2, Tables 1–4",
        minus(single, best, 0.05), against("best merge", best, "Single-Task", single)});
    claims.push_back({"Post-Pruning (10%) is far above every merge: 5 points or more", "P §4.1–2, Tables 1–4",
        minus(pruned(0.10), best, 0.05), against("Post-Pruning (10%)", pruned(0.10), "best merge", best)});
    claims.push_back({"PERU-FFT (10%) is close to the single-task models: within 3 points", "P §4.1–2, Tables 1–4",
        minus(peru(0.10), single, -0.03), against("PERU-FFT (10%)", peru(0.10), "Single-Task", single)});
    for (const double m : table_densities()) {
        claims.push_back({taskvec::message("PERU-FFT is above Post-Pruning at m = ", 100 * m, "%"), "P §4.1, Figure 5",
            minus(peru(m), pruned(m)), against("PERU-FFT", peru(m), "Post-Pruning", pruned(m))});
    }
    claims.push_back({"PERU-FFT (5%) is as good as Post-Pruning (10%), with half the entries: not 0.5 points below it",
        "P §4.1", minus(peru(0.05), pruned(0.10), -0.005),
        against("PERU-FFT (5%)", peru(0.05), "Post-Pruning (10%)", pruned(0.10))});
    claims.push_back({"PERU-FFT is saturated at m = 20%: 40% gains less than 0.5 points", "P Figure 5",
        minus(peru(0.20), peru(0.40), -0.005), against("PERU-FFT (40%)", peru(0.40), "PERU-FFT (20%)", peru(0.20))});

    const auto compare = [&](std::string_view sentence, std::string_view a, std::string_view b) {
        claims.push_back({std::string(sentence), "", minus(of(a), of(b)), against(a, of(a), b, of(b))});
    };
    claims.push_back({"every merge is better than the pre-trained model", "", minus(worst, pre_trained),
        against("worst merge", worst, "Pre-Trained", pre_trained)});
    compare("Task Arithmetic is better than Average", "Task Arithmetic", "Average");
    compare("TIES is better than Task Arithmetic", "TIES", "Task Arithmetic");
    compare("Fisher-Merging is better than Average", "Fisher-Merging", "Average");
    compare("RegMean is better than TIES (P Table 2 has TIES 77.86, RegMean 76.60)", "RegMean", "TIES");
    claims.push_back({"PERU-FFT (1%) is already above every merge", "", minus(peru(0.01), best),
        against("PERU-FFT (1%)", peru(0.01), "best merge", best)});
    return claims;
}

} // namespace digits
