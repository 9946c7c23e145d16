// The second paper on the digits: LoRA beside linearized LoRA (L-LoRA, in its per-layer reading), fine-tuned from one
// initialisation φ0 and merged in the space of their own parameters φ.
// Tang et al., "Parameter-efficient multi-task model fusion with partial linearization" (ICLR 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adapter.hpp"
#include "claims.hpp"
#include "setting.hpp"
#include "table.hpp"

#include <taskvec/search/lambda_grid.hpp>

#include <array>
#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace digits {

/// How much of what there is to measure the dear measurements take: λ for subsets of tasks, scores of all subsets, and
/// ξ.
struct effort {
    std::size_t images = 0; ///< of each task's test images, for subsets and for ξ; 0: all
    std::size_t trials = 4; ///< subsets of each size on which that size's λ is chosen; 0: all
    std::size_t grid = 9; ///< points along each side of ξ's grid from −1 to 1
    bool all_pairs = false; ///< ξ of all 28 pairs of tasks, not of the eight that are next to each other

    /// Leaves nothing out: about three minutes a seed.
    [[nodiscard]] static effort complete() { return {.trials = 0, .grid = 17, .all_pairs = true}; }
};

/// One way of fine-tuning adapters, merged in φ space. Collected over seeds.
struct phi_results {
    explicit phi_results(std::string title)
        : methods(std::move(title))
    { }

    table methods;
    /// normalized.at(method)[k]: for each subset of k tasks, in each seed, the mean over these tasks of accuracy /
    /// Single-Task.
    std::map<std::string, std::array<std::vector<double>, tasks + 1>> normalized;
    /// For each seed: tasks × tasks cosines of the task vectors φt − φ0, and of the weights that they make.
    std::vector<std::vector<double>> cosines, weight_cosines;
    /// For each seed: ξ(λ1, λ2), a mean over pairs of tasks; and ξ(λ, …, λ) of all eight tasks together, divided by
    /// eight, at each of together_lambdas().
    std::vector<taskvec::lambda_grid> disentanglement;
    std::vector<std::vector<double>> together;
};

struct llora_results {
    phi_results lora{"LoRA (rank 32), merged in φ space: test accuracy in percent"};
    phi_results linearized{"L-LoRA (rank 32, per layer), merged in φ space: test accuracy in percent"};
    /// The chosen λ, a line for each seed, way and method.
    std::string chosen;
    /// What was measured, in words.
    std::string scope;
};

/// "Average", "Task Arithmetic", "TIES".
[[nodiscard]] const std::vector<std::string_view>& phi_merges();
[[nodiscard]] const std::vector<double>& together_lambdas();

/// Merges and measures adapters of both kinds for one seed; all were fine-tuned from `initial`. The linearized adapters
/// and their initialisation go to `out` as PEFT adapter directories, if given.
void run_llora(const setting& s, const adapter& initial, const std::vector<adapter>& lora,
    const std::vector<adapter>& linearized, const effort& how, const std::optional<std::filesystem::path>& out,
    llora_results& results);

/// Normalized scores by the number of tasks, cosines and ξ, as text.
[[nodiscard]] std::string text(const llora_results& results);

/// Tables, matrices and grids as CSV; scores, cosines and ξ as SVG.
void write_llora(const llora_results& results, const std::filesystem::path& out);

/// What this run says about the second paper's claims. `fully_fine_tuned`: the table of full fine-tuning, if it was
/// run.
[[nodiscard]] std::vector<claim> llora_claims(const llora_results& results, const table* fully_fine_tuned = nullptr);

} // namespace digits
