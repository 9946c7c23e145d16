// Every subset of the tasks, merged and scored on all tasks: those that were merged, and those that were held out.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "way.hpp"

#include <array>
#include <cstddef>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

/// How much of what there is to measure the dear measurements take.
struct effort {
    std::size_t subsets = 2; ///< of each number of tasks, spread evenly (of pairs four times as many); 0: all
    std::size_t choice_images = 60; ///< of each merged task's validation images, for λ and density; 0: all
    std::size_t hub_images = 16, hub_evaluations = 40; ///< LoraHub's, of each merged task and in all
    std::size_t images = 200; ///< of each task's test images, for subsets, planes and ξ; 0: all
    std::size_t grid = 9; ///< points along each side of a map of ξ, from −1 to 1, and of a loss plane
    bool all_pairs = false; ///< ξ of all 28 pairs of tasks, not of the eight that are next to each other

    /// Leaves nothing out.
    [[nodiscard]] static effort complete()
    {
        return {.subsets = 0,
            .choice_images = 0,
            .hub_images = 64,
            .hub_evaluations = 200,
            .images = 0,
            .grid = 17,
            .all_pairs = true};
    }
};

/// One merge of one subset.
struct subset_score {
    std::vector<std::size_t> members; ///< ascending
    double lambda = 0, density = 0; ///< as validation chose; 0 where the merge has none
    scores accuracies{}; ///< on the test images of all tasks
};

/// Which tasks a score is the mean over, and whether it is divided by the single-task model's.
enum class over { all, merged, held_out };
enum class unit { normalized, absolute };
inline constexpr std::array readings{over::all, over::merged, over::held_out};
[[nodiscard]] std::string_view name(over tasks);

/// The scores of one way of fine-tuning. Collected over seeds.
class subset_scores {
public:
    struct seed {
        scores single{}; ///< each task's own model
        std::map<std::string, std::vector<subset_score>, std::less<>> of{}; ///< by merge
    };

    void begin(const scores& single) { seeds_.push_back({single}); }
    void add(std::string_view merge, subset_score score);

    [[nodiscard]] const std::vector<seed>& seeds() const { return seeds_; }
    /// One number for each subset of so many tasks, of all seeds. None where no task is held out.
    [[nodiscard]] std::vector<double> values(std::string_view merge, std::size_t size, over which, unit as) const;
    /// Their mean, for each seed.
    [[nodiscard]] std::vector<double> by_seed(std::string_view merge, std::size_t size, over which, unit as) const;

    /// A line for each seed, merge and subset: what was chosen, and the accuracy on each task.
    void write_csv(const std::filesystem::path& file) const;

private:
    std::vector<seed> seeds_;
};

/// "Average", "Task Arithmetic", "TIES", "LoraHub", "LoraHub, Σw = 1".
///
/// For each combination of tasks (L E.1.2–E.1.4): Task Arithmetic has λ from {0, 0.05 … 1}, TIES one of the 16 points
/// of {0.25, 0.5, 0.75, 1}² for density and λ, each by the mean validation accuracy of the merged tasks. LoraHub has
/// weights in [−1.5, 1.5] of the task vectors, θ0 + Σ wt·τt; with Σw = 1, the constraint that the paper writes down,
/// that is the same as Σ wt·θt, which its authors' code merges (without the constraint).
[[nodiscard]] const std::vector<std::string_view>& subset_merges();

/// Number of subsets of k tasks that are measured.
[[nodiscard]] std::size_t measured_subsets(std::size_t k, const effort& how);

/// Merges subsets of one seed's tasks in every way of subset_merges(), and scores them.
void sweep(const setting& s, const way& w, const effort& how, subset_scores& results);

} // namespace digits
