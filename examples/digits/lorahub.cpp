// SPDX-License-Identifier: Apache-2.0
#include "lorahub.hpp"

#include <taskvec/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>

namespace digits {
void evolution_strategy::operator()(
    const taskvec::lorahub_problem& problem, const taskvec::lorahub_objective& objective) const
{
    const taskvec::random_stream random(seed, 0, "LoraHub");
    std::vector<double> best = problem.start, candidate(problem.dimension);
    double lowest = objective(best), size = step;
    std::uint64_t draw = 0;
    for (std::size_t evaluation = 1; evaluation < problem.evaluations; ++evaluation) {
        for (std::size_t t = 0; t < problem.dimension; ++t) {
            candidate[t] = std::clamp(best[t] + size * random.normal(draw++), problem.lower, problem.upper);
        }
        // To the nearest point of the plane Σ wt = 1; what that pushes out of the bounds comes back in the next round.
        for (int round = 0; sum_to_one && round < 20; ++round) {
            const double missing = 1 - std::accumulate(candidate.begin(), candidate.end(), 0.0);
            for (double& weight : candidate) {
                weight =
                    std::clamp(weight + missing / static_cast<double>(candidate.size()), problem.lower, problem.upper);
            }
        }
        const double value = objective(candidate);
        const bool better = value < lowest;
        size *= better ? 1.5 : std::pow(1.5, -0.25);
        if (better) {
            lowest = value;
            best = candidate;
        }
    }
}

std::string text(const taskvec::lorahub_result& found)
{
    std::string out = "w";
    for (const double weight : found.best.weights) { out += taskvec::message(' ', std::round(100 * weight) / 100); }
    return out;
}

few_shot_loss::few_shot_loss(const setting& s)
    : head_(&s.base.head)
{
    for (const auto& task : s.validation) { few_.push_back(first(task, few_shot_images)); }
}

double few_shot_loss::operator()(const encoder& model) const
{
    double sum = 0;
    for (const auto& task : few_) { sum += cross_entropy(forward(model, *head_, task.inputs).logits, task.labels); }
    return sum / static_cast<double>(few_.size());
}

} // namespace digits
