// SPDX-License-Identifier: Apache-2.0
#include "subsets.hpp"

#include "figures.hpp"
#include "merging.hpp"

#include <taskvec/methods/ties.hpp>
#include <taskvec/search/subset_sweep.hpp>

#include <algorithm>
#include <functional>
#include <map>
#include <span>

namespace digits {
namespace {

constexpr std::size_t images_for_lambda = 100;

using members = std::span<const std::size_t>;
using vector_view = taskvec::host_view<const float>;

/// The models of one seed, and their task vectors.
struct fine_tuned {
    fine_tuned(const encoder& origin, const std::vector<encoder>& all)
        : base(origin)
        , models(all)
        , vectors(all.size())
    {
        for (std::size_t t = 0; t < all.size(); ++t) {
            taskvec::difference(one_thread, models[t].values(), base.values(), vectors[t].values());
        }
    }
    [[nodiscard]] std::vector<vector_view> views() const
    {
        std::vector<vector_view> all;
        for (const auto& vector : vectors) { all.push_back(taskvec::as_view(vector.values())); }
        return all;
    }

    const encoder& base;
    const std::vector<encoder>& models;
    std::vector<encoder> vectors;
};

/// A merge of some of the tasks, of whose task vectors `sum` is the sum; and the λ that validation may choose from.
struct subset_merge {
    std::string_view name;
    std::function<std::vector<double>(double tasks)> lambdas;
    std::function<encoder(const fine_tuned&, members, vector_view sum, double lambda)> make;
};

encoder moved(const fine_tuned& tuned, members, vector_view sum, double lambda)
{
    encoder model;
    taskvec::apply(one_thread, tuned.base.values(), sum, lambda, model.values());
    return model;
}

encoder elected(const fine_tuned& tuned, members subset, vector_view, double lambda)
{
    std::vector<encoder> chosen;
    for (const std::size_t task : subset) { chosen.push_back(tuned.models[task]); }
    return merged(taskvec::ties_options{.density = 0.2, .lambda = lambda}, tuned.base, chosen);
}

const std::array<subset_merge, 3> merges{{
    {"Average", [](double n) { return std::vector{1 / n}; }, moved},
    {"Task Arithmetic", [](double n) { return std::vector{0.6 / n, 0.8 / n, 1 / n, 1.2 / n, 1.5 / n, 2 / n}; }, moved},
    {"TIES", [](double) { return std::vector{0.3, 0.5, 0.7, 1.0, 1.3}; }, elected},
}};

std::vector<double> accuracies(
    const encoder& model, const matrix& head, const std::vector<dataset>& data, members subset)
{
    std::vector<double> all;
    for (const std::size_t task : subset) { all.push_back(accuracy(model, head, data[task])); }
    return all;
}

} // namespace

const std::vector<std::string_view>& subset_curves::methods()
{
    static const std::vector<std::string_view> names{merges[0].name, merges[1].name, merges[2].name};
    return names;
}

taskvec::summary subset_curves::normalized(std::string_view method, std::size_t size) const
{
    const auto& values =
        normalized_
            .at(static_cast<std::size_t>(std::ranges::find(merges, method, &subset_merge::name) - merges.begin()))
            .at(size);
    return values.empty() ? taskvec::summary{} : taskvec::summarize(values);
}

void subset_curves::add(const setting& s, const std::vector<encoder>& models)
{
    const fine_tuned tuned(s.base.body, models);
    const auto vectors = tuned.views();
    const auto for_each = [&](auto&& visit) { taskvec::for_each_subset(one_thread, vectors, {}, visit); };

    std::vector<dataset> few;
    for (const auto& task : s.validation) { few.push_back(first(task, images_for_lambda)); }
    std::array<std::array<std::map<double, double>, tasks + 1>, merges.size()> validation;
    for_each([&](members subset, vector_view sum) {
        for (std::size_t m = 0; m < merges.size(); ++m) {
            const auto lambdas = merges[m].lambdas(static_cast<double>(subset.size()));
            for (const double lambda : lambdas) {
                double& total = validation[m][subset.size()][lambda];
                if (lambdas.size() == 1) { continue; } // nothing to choose
                total +=
                    taskvec::summarize(accuracies(merges[m].make(tuned, subset, sum, lambda), s.base.head, few, subset))
                        .mean;
            }
        }
    });
    for (std::size_t m = 0; m < merges.size(); ++m) {
        for (std::size_t size = 2; size <= tasks; ++size) {
            choice<double> best;
            for (const auto& [lambda, total] : validation[m][size]) { best.offer(lambda, total); }
            lambdas_[m][size].push_back(best.best);
        }
    }

    const scores single = evaluate(models, s.base.head, s.test);
    for_each([&](members subset, vector_view sum) {
        std::vector<double> alone;
        for (const std::size_t task : subset) { alone.push_back(single[task]); }
        for (std::size_t m = 0; m < merges.size(); ++m) {
            const encoder model = merges[m].make(tuned, subset, sum, lambdas_[m][subset.size()].back());
            normalized_[m][subset.size()].push_back(
                taskvec::mean_normalized_score(accuracies(model, s.base.head, s.test, subset), alone));
        }
    });
}

void subset_curves::write(const std::filesystem::path& csv, const std::filesystem::path& svg) const
{
    std::string lines = "method,tasks,subsets,lambda,mean,standard deviation,lowest,highest\n";
    plot::line_chart chart{.title = "Merging two to eight fine-tuned models",
        .x_label = "tasks merged",
        .y_label = "accuracy / Single-Task, percent, mean of all subsets",
        .curves = {}};
    for (std::size_t m = 0; m < merges.size(); ++m) {
        plot::curve line{.label = std::string(merges[m].name), .x = {}, .y = {}};
        for (std::size_t size = 2; size <= tasks; ++size) {
            const auto s = normalized(merges[m].name, size);
            lines += taskvec::message(merges[m].name, ',', size, ',', s.count / lambdas_[m][size].size(), ',',
                fixed(over_seeds(lambdas_[m][size]).mean), ',', percent(s.mean), ',', percent(s.standard_deviation),
                ',', percent(s.lowest), ',', percent(s.highest), '\n');
            line.x.push_back(static_cast<double>(size));
            line.y.push_back(100 * s.mean);
        }
        chart.curves.push_back(std::move(line));
    }
    write_text(csv, lines);
    draw(chart, svg);
}

} // namespace digits
