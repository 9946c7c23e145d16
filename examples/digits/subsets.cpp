// SPDX-License-Identifier: Apache-2.0
#include "subsets.hpp"

#include "lorahub.hpp"

#include <taskvec/analysis/scores.hpp>
#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/search/lorahub.hpp>
#include <taskvec/search/subset_sweep.hpp>

#include <algorithm>
#include <span>

namespace digits {
namespace {

using members = std::span<const std::size_t>;
using vector_view = taskvec::host_view<const float>;

constexpr std::array ties_points{0.25, 0.5, 0.75, 1.0};

std::vector<dataset> few_of(const std::vector<dataset>& data, std::size_t images)
{
    std::vector<dataset> few;
    for (const auto& one : data) { few.push_back(first(one, images == 0 ? one.size() : std::min(images, one.size()))); }
    return few;
}

double mean_accuracy(const predictor& predict, const std::vector<dataset>& data, members of)
{
    double sum = 0;
    for (const std::size_t task : of) { sum += accuracy(predict(data[task].inputs), data[task].labels); }
    return sum / static_cast<double>(of.size());
}

/// The merges of subsets of one seed's tasks.
class merger {
public:
    merger(const setting& s, const way& w, const effort& how)
        : way_(w)
        , how_(how)
        , choice_(few_of(s.validation, how.choice_images))
        , hub_(few_of(s.validation, how.hub_images))
        , test_(few_of(s.test, how.images))
        , seed_(s.seed)
        , point_(w.start.size())
    { }

    void add(members subset, vector_view sum, subset_scores& results)
    {
        const std::vector<std::size_t> tasks(subset.begin(), subset.end());
        const double share = 1.0 / static_cast<double>(subset.size());
        results.add("Average", {tasks, 0, 0, test(moved(sum, share))});

        choice<double> lambda;
        for (const double candidate : grid(0, 1, 0.05)) {
            lambda.offer(candidate, mean_accuracy(way_.at(moved(sum, candidate)), choice_, subset));
        }
        results.add("Task Arithmetic", {tasks, lambda.best, 0, test(moved(sum, lambda.best))});

        // λ scales what was elected, so that each density is elected once.
        std::vector<std::vector<float>> chosen;
        for (const std::size_t task : subset) { chosen.push_back(way_.vectors[task]); }
        const std::vector<float> zero(way_.start.size());
        struct ties_choice {
            double density = 0, lambda = 0;
            std::vector<float> elected{};
        };
        choice<ties_choice> ties;
        for (const double density : ties_points) {
            std::vector<float> elected(way_.start.size());
            taskvec::merge(one_thread, taskvec::ties_options{.density = density, .lambda = 1.0}, zero, chosen, elected);
            for (const double candidate : ties_points) {
                const double score = mean_accuracy(way_.at(moved(elected, candidate)), choice_, subset);
                if (score > ties.score) { ties = {{density, candidate, elected}, score}; }
            }
        }
        const auto& best = ties.best;
        results.add("TIES", {tasks, best.lambda, best.density, test(moved(best.elected, best.lambda))});

        std::vector<std::vector<float>> models;
        for (const std::size_t task : subset) { models.push_back(way_.tuned[task]); }
        for (const bool constrained : {false, true}) {
            taskvec::lorahub_options options{.evaluations = how_.hub_evaluations};
            if (constrained) { options.start.assign(subset.size(), share); }
            std::vector<float> found(way_.start.size());
            (void)taskvec::lorahub(
                one_thread, options, way_.start, models, found,
                [&](vector_view point) {
                    const predictor predict = way_.at(point);
                    double sum_of_losses = 0;
                    for (const std::size_t task : subset) {
                        sum_of_losses += cross_entropy(predict(hub_[task].inputs), hub_[task].labels);
                    }
                    return sum_of_losses * share;
                },
                evolution_strategy{.seed = seed_, .sum_to_one = constrained});
            results.add(constrained ? "LoraHub, Σw = 1" : "LoraHub", {tasks, 0, 0, test(found)});
        }
    }

    [[nodiscard]] scores test(std::span<const float> point) const
    {
        const predictor predict = way_.at(point);
        scores accuracies{};
        for (std::size_t task = 0; task < tasks; ++task) {
            accuracies[task] = accuracy(predict(test_[task].inputs), test_[task].labels);
        }
        return accuracies;
    }

private:
    std::span<const float> moved(vector_view vector, double lambda)
    {
        taskvec::apply(one_thread, way_.start, vector, lambda, point_);
        return point_;
    }
    std::span<const float> moved(const std::vector<float>& vector, double lambda)
    {
        return moved(taskvec::as_view(vector), lambda);
    }

    const way& way_;
    const effort& how_;
    std::vector<dataset> choice_, hub_, test_;
    std::uint64_t seed_;
    std::vector<float> point_;
};

std::size_t subsets_of(std::size_t k)
{
    std::size_t count = 1;
    for (std::size_t i = 0; i < k; ++i) { count = count * (tasks - i) / (i + 1); }
    return count;
}

/// The tasks of a subset that a score is the mean over.
bool counts(const subset_score& score, std::size_t task, over which)
{
    return which == over::all || std::ranges::binary_search(score.members, task) == (which == over::merged);
}

} // namespace

std::string_view name(over tasks)
{
    return tasks == over::all ? "all eight tasks" : tasks == over::merged ? "the merged tasks" : "the held-out tasks";
}

const std::vector<std::string_view>& subset_merges()
{
    static const std::vector<std::string_view> names{
        "Average", "Task Arithmetic", "TIES", "LoraHub", "LoraHub, Σw = 1"};
    return names;
}

void subset_scores::add(std::string_view merge, subset_score score)
{
    seeds_.back().of[std::string(merge)].push_back(std::move(score));
}

std::vector<double> subset_scores::values(std::string_view merge, std::size_t size, over which, unit as) const
{
    std::vector<double> all;
    for (const auto& one : seeds_) {
        for (const auto& score : one.of.find(merge)->second) {
            if (score.members.size() != size || (which == over::held_out && size == tasks)) { continue; }
            std::vector<double> of_tasks;
            for (std::size_t task = 0; task < tasks; ++task) {
                if (!counts(score, task, which)) { continue; }
                of_tasks.push_back(as == unit::absolute
                        ? score.accuracies[task]
                        : taskvec::normalized_score(score.accuracies[task], one.single[task]));
            }
            all.push_back(taskvec::summarize(of_tasks).mean);
        }
    }
    return all;
}

std::vector<double> subset_scores::by_seed(std::string_view merge, std::size_t size, over which, unit as) const
{
    const std::vector<double> all = values(merge, size, which, as);
    std::vector<double> means;
    const std::size_t each = all.size() / seeds_.size();
    for (std::size_t seed = 0; seed < seeds_.size() && each > 0; ++seed) {
        means.push_back(taskvec::summarize(std::span(all).subspan(seed * each, each)).mean);
    }
    return means;
}

void subset_scores::write_csv(const std::filesystem::path& file) const
{
    std::string lines = "seed,merge,members,lambda,density";
    for (const auto task : task_names) { lines += taskvec::message(',', task); }
    for (std::size_t seed = 0; seed < seeds_.size(); ++seed) {
        for (const auto& [merge, all] : seeds_[seed].of) {
            for (const auto& score : all) {
                lines += taskvec::message('\n', seed + 1, ",\"", merge, "\",");
                for (const std::size_t task : score.members) {
                    lines += taskvec::message(task == score.members.front() ? "" : "+", task_names[task]);
                }
                lines += taskvec::message(',', score.lambda, ',', score.density);
                for (const double value : score.accuracies) { lines += ',' + percent(value); }
            }
        }
    }
    write_text(file, lines + '\n');
}

std::size_t measured_subsets(std::size_t k, const effort& how)
{
    const std::size_t all = subsets_of(k);
    return how.subsets == 0 ? all : std::min(all, (k == 2 ? 4 : 1) * how.subsets);
}

void sweep(const setting& s, const way& w, const effort& how, subset_scores& results)
{
    merger all_merges(s, w, how);
    scores single{};
    for (std::size_t task = 0; task < tasks; ++task) { single[task] = all_merges.test(w.tuned[task])[task]; }
    results.begin(single);
    std::array<std::size_t, tasks + 1> seen{};
    taskvec::for_each_subset(one_thread, w.vector_views(), {}, [&](members subset, vector_view sum) {
        const std::size_t k = subset.size(), all = subsets_of(k), wanted = measured_subsets(k, how), place = seen[k]++;
        // The places i·all/wanted for i = 0 … wanted − 1.
        if ((place * wanted + all - 1) / all * all / wanted == place) { all_merges.add(subset, sum, results); }
    });
}

} // namespace digits
