// SPDX-License-Identifier: Apache-2.0
#include "lora.hpp"

#include "checkpoints.hpp"
#include "data_merges.hpp"
#include "figures.hpp"
#include "lorahub.hpp"
#include "low_rank.hpp"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

namespace digits {
namespace {

constexpr std::size_t one_model = encoder::size();
const std::vector<std::string_view> merges{
    "Average", "Task Arithmetic", "TIES", "Fisher-Merging", "RegMean", "LoraHub"};

/// A merged update, and the λ with which it is folded in.
struct tuned {
    updates merged;
    double lambda = 0, density = 0;

    [[nodiscard]] encoder model(const setting& s) const { return folded(s.base.body, merged, lambda); }
};

void offer(
    choice<tuned>& best, const tuned& candidate, const setting& s, std::string_view method, lambda_curves& curves)
{
    best.offer(candidate, curves.add(method, candidate.lambda, candidate.model(s), s));
}

choice<tuned> tuned_sum(const setting& s, const updates& sum, lambda_curves& curves)
{
    choice<tuned> best;
    for (const double lambda : grid(0.05, 1.0, 0.05)) { offer(best, {sum, lambda}, s, "Task Arithmetic", curves); }
    return best;
}

/// λ scales what was elected, so that each density is elected once.
choice<tuned> tuned_ties(const setting& s, const std::vector<updates>& adapters, lambda_curves& curves)
{
    choice<tuned> best;
    for (const double density : {0.1, 0.2, 0.3}) {
        const updates merged = elected(adapters, density);
        for (const double lambda : grid(0.1, 2.0, 0.1)) {
            offer(best, {merged, lambda, density}, s, with_density("TIES", density), curves);
        }
    }
    return best;
}

} // namespace

const std::vector<std::size_t>& table_ranks()
{
    static const std::vector<std::size_t> ranks{1, 2, 4, 8, 16};
    return ranks;
}

const std::vector<std::size_t>& curve_ranks()
{
    static const std::vector<std::size_t> ranks{1, 2, 3, 4, 5, 6, 8, 12, 16, 24, rank};
    return ranks;
}

std::string with_rank(std::size_t q)
{
    return taskvec::message("PERU-LoRA (q=", q, ")");
}

std::vector<adapter> fine_tune_adapters(const setting& s, const adapter& initial, parameterisation kind)
{
    std::vector<adapter> adapters;
    for (std::size_t task = 0; task < tasks; ++task) {
        adapters.push_back(fine_tune_adapter(s.base, initial, s.train[task], s.seed, task_names[task], kind));
    }
    return adapters;
}

void run_lora(const setting& s, const std::vector<adapter>& adapters, const std::optional<std::filesystem::path>& out,
    lora_results& results)
{
    std::vector<updates> tuned_updates;
    for (const auto& phi : adapters) { tuned_updates.push_back(updates_of(phi)); }
    const std::vector<encoder> models = folded(s.base.body, tuned_updates);
    const auto add = [&](std::string_view method, const encoder& model) {
        results.methods.add(method, one_model, evaluate(model, s.base.head, s.test));
    };

    add("Pre-Trained", s.base.body);
    results.methods.add("Single-Task", one_model + tasks * adapter::size(), evaluate(models, s.base.head, s.test));
    const updates sum = summed(tuned_updates);
    add("Average", folded(s.base.body, sum, 1.0 / tasks));
    const auto arithmetic = tuned_sum(s, sum, results.lambdas);
    add("Task Arithmetic", arithmetic.best.model(s));
    const auto ties = tuned_ties(s, tuned_updates, results.lambdas);
    add("TIES", ties.best.model(s));
    // These merge the models that the adapters make.
    const std::vector<statistics> known = collect(s, models);
    add("Fisher-Merging", fisher_merged(s, models, known));
    const auto regmean = tuned_regmean(s, models, known);
    add("RegMean", regmean.best.model);
    const auto sought = lorahub(s, models);
    add("LoraHub", sought.model);
    results.chosen +=
        taskvec::message("seed ", s.seed, ": Task Arithmetic λ ", arithmetic.best.lambda, ", TIES λ ", ties.best.lambda,
            " density ", ties.best.density, ", RegMean α ", regmean.best.alpha, ", LoraHub ", text(sought.found), "\n");

    results.errors.resize(curve_ranks().size());
    for (std::size_t i = 0; i < curve_ranks().size(); ++i) {
        const std::size_t q = curve_ranks()[i];
        std::size_t parameters = one_model;
        scores accuracies{};
        std::array<double, 3> error{};
        for (std::size_t task = 0; task < tasks; ++task) {
            const compressed_updates served = truncated(tuned_updates[task], q);
            parameters += served.parameters();
            accuracies[task] = accuracy(folded(s.base.body, served.adapter), s.base.head, s.test[task]);
            error[0] += served.relative_error() / tasks;
            error[1] += served.layers[0].relative_error() / tasks;
            error[2] += served.layers[1].relative_error() / tasks;
            if (out && q == 8) { save(served.adapter, *out / "peru-lora" / task_names[task]); }
        }
        results.errors[i].total.push_back(error[0]);
        results.errors[i].first.push_back(error[1]);
        results.errors[i].second.push_back(error[2]);
        results.curve.add(with_rank(q), parameters, accuracies);
        if (std::ranges::find(table_ranks(), q) != table_ranks().end()) {
            results.methods.add(with_rank(q), parameters, accuracies);
        }
    }

    if (out) {
        save_base(s.base, *out);
        for (std::size_t task = 0; task < tasks; ++task) {
            save(tuned_updates[task], *out / "lora" / task_names[task]);
        }
        save(arithmetic.best.model(s), *out / "merged-lora-task-arithmetic.safetensors");
        save(ties.best.model(s), *out / "merged-lora-ties.safetensors");
    }
}

void write_lora(const lora_results& results, const std::filesystem::path& out)
{
    results.methods.write_csv(out / "lora.csv");
    results.lambdas.write(out / "lora-accuracy-against-lambda.csv", out / "lora-accuracy-against-lambda.svg",
        "Merging eight LoRA adapters in weight space: accuracy against λ");
    std::string csv = "q,PERU-LoRA,#params,relative error,relative error of fc1,relative error of fc2\n";
    plot::curve accuracies{.label = "PERU-LoRA", .x = {}, .y = {}};
    plot::curve total{.label = "both weights", .x = {}, .y = {}},
        first{.label = "fc1 (128 × 64)", .x = {}, .y = {}, .dashed = true},
        second{.label = "fc2 (512 × 128)", .x = {}, .y = {}, .dashed = true};
    for (std::size_t i = 0; i < curve_ranks().size(); ++i) {
        const std::size_t q = curve_ranks()[i];
        const row& served = results.curve[with_rank(q)];
        const auto& error = results.errors[i];
        csv += taskvec::message(q, ',', percent(served.average()), ',', served.parameters, ',',
            fixed(over_seeds(error.total).mean), ',', fixed(over_seeds(error.first).mean), ',',
            fixed(over_seeds(error.second).mean), '\n');
        accuracies.x.push_back(static_cast<double>(q));
        accuracies.y.push_back(100 * served.average());
        for (const auto& [line, values] :
            {std::pair(&total, &error.total), std::pair(&first, &error.first), std::pair(&second, &error.second)}) {
            line->x.push_back(static_cast<double>(q));
            line->y.push_back(over_seeds(*values).mean);
        }
    }
    write_text(out / "accuracy-against-q.csv", csv);

    const std::vector<double> ticks{1, 2, 4, 8, 16, 32};
    plot::line_chart chart{.title = "Reusing eight LoRA adapters of rank 32: accuracy against the rank kept",
        .x_label = "q: rank kept of each update",
        .y_label = "test accuracy, percent, mean of eight tasks",
        .curves = {accuracies},
        .log_x = true,
        .x_ticks = ticks};
    for (const char* method : {"Single-Task", "TIES", "Task Arithmetic", "Pre-Trained"}) {
        chart.curves.push_back(level(method, 100 * results.methods[method].average(), 1, rank));
    }
    draw(chart, out / "accuracy-against-q.svg");
    draw(plot::line_chart{.title = "LoRA updates cut to rank q: relative error",
             .x_label = "q: rank kept of each update",
             .y_label = "error / norm of the update, mean of eight tasks",
             .curves = {total, first, second},
             .log_x = true,
             .x_ticks = ticks},
        out / "error-against-q.svg");
}

std::vector<claim> lora_claims(const lora_results& results)
{
    const table& t = results.methods;
    const auto of = [&](std::string_view method) { return t[method].averages(); };
    const auto single = of("Single-Task"), best = t.best(merges), worst = t.worst(merges);
    const auto peru = [&](std::size_t q) { return of(with_rank(q)); };
    const std::vector<double>& error =
        results
            .errors[static_cast<std::size_t>(std::ranges::find(curve_ranks(), std::size_t{8}) - curve_ranks().begin())]
            .total;

    std::vector<claim> claims;
    claims.push_back(
        {"no merge of LoRA adapters comes near LoRA Single-Task: 5 points or more below", "P §4.1–2, Tables 1–4",
            minus(single, best, 0.05), against("best LoRA merge", best, "LoRA Single-Task", single)});
    claims.push_back({"PERU-LoRA (q=4), an eighth of the rank, is far above every LoRA merge: 5 points or more",
        "P §4.1–2, Tables 1–4", minus(peru(4), best, 0.05),
        against("PERU-LoRA (q=4)", peru(4), "best LoRA merge", best)});
    claims.push_back({"PERU-LoRA (q=8), a quarter of the rank, is close to LoRA Single-Task: within 1.5 points "
                      "(the paper: q = 40 of 128)",
        "P Figure 6", minus(peru(8), single, -0.015), against("PERU-LoRA (q=8)", peru(8), "LoRA Single-Task", single)});
    std::vector<double> below;
    for (const double e : error) { below.push_back(0.12 - e); }
    claims.push_back({"a quarter of the rank holds an update to within 12%", "", below,
        taskvec::message("relative error ", fixed(over_seeds(error).mean), " at q = 8 of ", rank)});
    claims.push_back({"every merge of LoRA adapters in weight space is better than the pre-trained model", "",
        minus(worst, of("Pre-Trained")), against("worst LoRA merge", worst, "Pre-Trained", of("Pre-Trained"))});
    return claims;
}

} // namespace digits
