// The second paper on the digits: full fine-tuning, LoRA, linearized LoRA (L-LoRA, in its per-layer reading) and full
// linearization, each merged in the space of its own parameters.
// Tang et al., "Parameter-efficient multi-task model fusion with partial linearization" (ICLR 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "claims.hpp"
#include "setting.hpp"
#include "subsets.hpp"
#include "table.hpp"
#include "way.hpp"

#include <taskvec/search/lambda_grid.hpp>

#include <array>
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace digits {

/// Something measured over the plane of two tasks.
struct pair_map {
    std::size_t task1 = 0, task2 = 0;
    taskvec::lambda_grid grid;
};

/// One way of fine-tuning. Collected over seeds.
struct way_results {
    std::string name, file;
    table methods;
    subset_scores subsets{};
    /// For each seed: tasks × tasks cosines of the task vectors, and of the weights that they make (where they do).
    std::vector<std::vector<double>> cosines{}, weight_cosines{};
    /// For each seed: ξ(λ1, λ2), a mean over pairs of tasks; and ξ(λ, …, λ) of all eight tasks together, divided by
    /// eight, at each of together_lambdas().
    std::vector<taskvec::lambda_grid> disentanglement{};
    std::vector<std::vector<double>> together{};
    /// Of the first seed: ξ of each pair, and the mean cross-entropy of the drawn pairs' two tasks.
    std::vector<pair_map> pairs{}, planes{};
};

struct fusion_results {
    std::vector<way_results> ways{};
    std::string scope{}; ///< what was measured, in words

    [[nodiscard]] const way_results& operator[](std::string_view file) const;
};

[[nodiscard]] const std::vector<double>& together_lambdas();
/// The pairs of tasks of which maps are drawn.
inline constexpr std::array<std::pair<std::size_t, std::size_t>, 2> drawn_pairs{{{0, 1}, {4, 5}}};

/// Merges and measures one seed's models, one way of fine-tuning after the other. `ways` is the same for all seeds.
void run_fusion(const setting& s, const std::vector<way>& ways, const effort& how, fusion_results& results);

/// Scores by the number of tasks, of each task, cosines and ξ, as text.
[[nodiscard]] std::string text(const fusion_results& results);

/// Tables, matrices and grids as CSV; scores, cosines, planes and ξ as SVG.
void write_fusion(const fusion_results& results, const std::filesystem::path& out);

/// What this run says about the second paper's claims. Needs the ways "full", "lora" and "llora".
[[nodiscard]] std::vector<claim> fusion_claims(const fusion_results& results);

} // namespace digits
