// SPDX-License-Identifier: Apache-2.0
#include "lora.hpp"

#include "checkpoints.hpp"
#include "data_merges.hpp"
#include "figures.hpp"
#include "lorahub.hpp"
#include "low_rank.hpp"
#include "merging.hpp"

#include <taskvec/select/sparse.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <span>
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

/// The largest entries of each tensor of an adapter, a share of each; the rest 0.
adapter pruned_factors(const adapter& phi, double share)
{
    adapter kept = phi;
    for (const auto& [name, tensor] : kept.model()) {
        const std::span<float> values(static_cast<float*>(tensor.data), tensor.size());
        std::vector<float> sizes;
        for (const float value : values) { sizes.push_back(std::abs(value)); }
        const auto count = static_cast<std::ptrdiff_t>(share * static_cast<double>(sizes.size()));
        std::ranges::nth_element(sizes, sizes.begin() + count - 1, std::greater{});
        const float least = sizes[static_cast<std::size_t>(count - 1)];
        std::ranges::replace_if(values, [&](float value) { return std::abs(value) < least; }, 0.0f);
    }
    return kept;
}

/// Singular values that are more than rounding.
std::size_t numerical_rank(const std::vector<double>& spectrum)
{
    return static_cast<std::size_t>(
        std::ranges::count_if(spectrum, [&](double sigma) { return sigma > 1e-5 * spectrum.front(); }));
}

/// Other ways than PERU-LoRA to store as much.
void measure_alternatives(const setting& s, const std::vector<adapter>& adapters, const std::vector<updates>& tuned,
    double lambda, lora_results& results)
{
    const std::vector<encoder> models = folded(s.base.body, tuned);
    const encoder shared = folded(s.base.body, summed(tuned), lambda);
    for (const std::size_t q : table_ranks()) {
        const double share = static_cast<double>(q) / rank;
        scores by_factors{};
        for (std::size_t task = 0; task < tasks; ++task) {
            by_factors[task] = accuracy(
                folded(s.base.body, updates_of(pruned_factors(adapters[task], share))), s.base.head, s.test[task]);
        }
        results.kept.add(with_kept("A and B pruned", q),
            one_model + tasks * static_cast<std::size_t>(share * static_cast<double>(adapter::size())), by_factors);
        const reused product = post_pruned(
            s.base.body, models, static_cast<double>(peru_lora_parameters(q)) / static_cast<double>(one_model));
        scores by_product{};
        for (std::size_t task = 0; task < tasks; ++task) {
            encoder live = product.shared;
            (void)taskvec::apply(one_thread, product.deltas[task], live.model());
            by_product[task] = accuracy(live, s.base.head, s.test[task]);
        }
        results.kept.add(with_kept("product pruned", q), product.parameters(), by_product, product.bytes());
        if (q != 4 && q != 8) { continue; }
        scores by_residual{};
        for (std::size_t task = 0; task < tasks; ++task) {
            std::vector<double> weights(tasks, -lambda);
            weights[task] += 1;
            by_residual[task] =
                accuracy(folded(shared, truncated(combined(tuned, weights), q).adapter), s.base.head, s.test[task]);
        }
        results.kept.add(with_kept("Task Arithmetic and a residual cut", q),
            one_model + tasks * peru_lora_parameters(q), by_residual);
    }

    constexpr std::size_t q = 4;
    std::vector<updates> cut;
    for (const auto& update : tuned) { cut.push_back(truncated(update, q).adapter); }
    results.residual_text += taskvec::message("seed ", s.seed, ':');
    for (std::size_t count = 2; count <= tasks; ++count) {
        std::vector<double> weights(count, -1.0 / static_cast<double>(count));
        weights[0] += 1;
        const auto layers = spectra(combined({cut.begin(), cut.begin() + static_cast<std::ptrdiff_t>(count)}, weights));
        const std::array sides{std::size_t{pixels}, std::size_t{hidden}};
        double least = 1;
        for (std::size_t layer = 0; layer < 2; ++layer) {
            const std::size_t found = numerical_rank(layers[layer]);
            least =
                std::min(least, static_cast<double>(found) / static_cast<double>(std::min(q * count, sides[layer])));
            results.residual_text += taskvec::message(layer == 0 ? " " : "/", found);
        }
        results.residual_ranks[count - 2].push_back(least);
    }
    results.residual_text += '\n';

    if (!results.spectra[0].empty()) { return; }
    for (auto& mean : results.spectra) { mean.assign(rank, 0.0); }
    for (const auto& update : tuned) {
        const auto layers = spectra(update);
        for (std::size_t layer = 0; layer < 2; ++layer) {
            for (std::size_t i = 0; i < rank; ++i) {
                results.spectra[layer][i] += layers[layer][i] / layers[layer][0] / tasks;
            }
        }
    }
}

} // namespace

std::string with_kept(std::string_view what, std::size_t q)
{
    return taskvec::message(what, " (as q=", q, ")");
}

std::vector<exponential_fit> fit_errors(const lora_results& results)
{
    std::vector<exponential_fit> fits;
    for (std::size_t seed = 0; seed < results.errors.front().total.size(); ++seed) {
        double n = 0, x = 0, y = 0, xx = 0, xy = 0, yy = 0;
        for (std::size_t i = 0; i < curve_ranks().size(); ++i) {
            const double error = results.errors[i].total[seed];
            if (error < 1e-3) { continue; }
            const double q = static_cast<double>(curve_ranks()[i]), ln = std::log(error);
            n += 1;
            x += q;
            y += ln;
            xx += q * q;
            xy += q * ln;
            yy += ln * ln;
        }
        const double slope = (n * xy - x * y) / (n * xx - x * x), intercept = (y - slope * x) / n;
        const double together = (n * xy - x * y) * (n * xy - x * y) / ((n * xx - x * x) * (n * yy - y * y));
        fits.push_back({-slope, intercept, together});
    }
    return fits;
}

std::string text(const lora_results& results)
{
    std::vector<double> rate, r_squared;
    for (const auto& fit : fit_errors(results)) {
        rate.push_back(fit.rate);
        r_squared.push_back(fit.r_squared);
    }
    return taskvec::message("Relative error of PERU-LoRA against q: falls by a factor of ",
        fixed(std::exp(-over_seeds(rate).mean)), " with each further rank (exponential fit, R² ",
        fixed(over_seeds(r_squared).mean),
        ")\n\nNumerical rank of θ1 − θ*, updates of rank 4, θ* the average of 2 to 8 tasks; fc1/fc2, at most 64/128\n",
        results.residual_text);
}

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

    measure_alternatives(s, adapters, tuned_updates, arithmetic.best.lambda, results);

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
    results.kept.write_csv(out / "lora-kept.csv");
    std::string values = "i,fc1,fc2\n";
    plot::line_chart decay{.title = "Singular values of LoRA updates of rank 32",
        .x_label = "i",
        .y_label = "log10 of the i-th over the largest, mean of eight tasks",
        .curves = {}};
    for (std::size_t layer = 0; layer < 2; ++layer) {
        plot::curve line{.label = layer == 0 ? "fc1 (128 × 64)" : "fc2 (512 × 128)", .x = {}, .y = {}};
        for (std::size_t i = 0; i < rank; ++i) {
            line.x.push_back(static_cast<double>(i + 1));
            line.y.push_back(std::log10(results.spectra[layer][i]));
        }
        decay.curves.push_back(std::move(line));
    }
    for (std::size_t i = 0; i < rank; ++i) {
        values += taskvec::message(i + 1, ',', results.spectra[0][i], ',', results.spectra[1][i], '\n');
    }
    write_text(out / "lora-singular-values.csv", values);
    draw(decay, out / "lora-singular-values.svg");

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
    claims.push_back({"PERU-LoRA (q=8), a quarter of the rank, is as good as LoRA Single-Task: within 0.5 points (the "
                      "paper: q = 40 of 128)",
        "P Figure 6", minus(peru(8), single, -0.005), against("PERU-LoRA (q=8)", peru(8), "LoRA Single-Task", single)});
    std::vector<double> explained, in_full;
    for (const auto& fit : fit_errors(results)) { explained.push_back(fit.r_squared - 0.95); }
    claims.push_back({"the truncation's error falls exponentially in q: the fit's R² is 0.95 at least", "P §1",
        explained, taskvec::message("R² ", fixed(over_seeds(explained).mean + 0.95))});
    const auto kept = [&](std::string_view what, std::size_t q) { return results.kept[with_kept(what, q)].averages(); };
    for (const std::size_t q : {std::size_t{4}, std::size_t{8}}) {
        const auto factors = kept("A and B pruned", q), product = kept("product pruned", q);
        claims.push_back(
            {taskvec::message(
                 "pruning A and B separately is worse than pruning their product to as many numbers, as q = ", q),
                "P §1, §3.2", minus(product, factors), against("product", product, "A and B", factors)});
    }
    for (std::size_t seed = 0; seed < results.residual_ranks[0].size(); ++seed) {
        double least = 1;
        for (const auto& ranks : results.residual_ranks) { least = std::min(least, ranks[seed]); }
        in_full.push_back(least - 0.9);
    }
    claims.push_back(
        {"the rank of θt − θ* is up to q·T, so that a merged model saves nothing: nine tenths of it at least", "P §3.2",
            in_full,
            taskvec::message("least share of min(4·T, the layer's sides) ", fixed(over_seeds(in_full).mean + 0.9))});
    for (const std::size_t q : {std::size_t{4}, std::size_t{8}}) {
        claims.push_back(
            {taskvec::message("PERU-LoRA is above Task Arithmetic with residuals cut to the same rank, q = ", q), "",
                minus(peru(q), kept("Task Arithmetic and a residual cut", q)),
                against(with_rank(q), peru(q), "residuals", kept("Task Arithmetic and a residual cut", q))});
        claims.push_back({taskvec::message("PERU-LoRA is above A and B pruned to as many parameters, q = ", q), "",
            minus(peru(q), kept("A and B pruned", q)),
            against(with_rank(q), peru(q), "A and B pruned", kept("A and B pruned", q))});
        claims.push_back({taskvec::message("PERU-LoRA is above its product pruned to as many parameters (P §3.2 holds "
                                           "that pruning it saves nothing), q = ",
                              q),
            "", minus(peru(q), kept("product pruned", q)),
            against(with_rank(q), peru(q), "product pruned", kept("product pruned", q))});
    }
    std::vector<double> below;
    for (const double e : error) { below.push_back(0.12 - e); }
    claims.push_back({"a quarter of the rank holds an update to within 12%", "", below,
        taskvec::message("relative error ", fixed(over_seeds(error).mean), " at q = 8 of ", rank)});
    claims.push_back({"every merge of LoRA adapters in weight space is better than the pre-trained model", "",
        minus(worst, of("Pre-Trained")), against("worst LoRA merge", worst, "Pre-Trained", of("Pre-Trained"))});
    return claims;
}

} // namespace digits
