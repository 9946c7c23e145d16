// Every subset of the fully fine-tuned models: how merges hold up as the number of tasks grows.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "setting.hpp"

#include <taskvec/analysis/scores.hpp>

#include <array>
#include <cstddef>
#include <filesystem>
#include <string_view>
#include <vector>

namespace digits {

/// Average, Task Arithmetic and TIES (density 0.2) of every subset of two tasks or more, each scored on its own tasks.
/// Collected over seeds.
class subset_curves {
public:
    /// One seed. λ is chosen for each method and each number of tasks, as the one that does best over all subsets of
    /// that size on 100 validation images of each task; scores are those of the whole test split.
    void add(const setting& s, const std::vector<encoder>& models);

    [[nodiscard]] static const std::vector<std::string_view>& methods();
    /// Accuracy / Single-Task, a mean over the tasks of a subset, of all subsets of so many tasks in all seeds; 0 where
    /// nothing was measured.
    [[nodiscard]] taskvec::summary normalized(std::string_view method, std::size_t size) const;

    /// A line for each method and number of tasks as CSV; the means as SVG.
    void write(const std::filesystem::path& csv, const std::filesystem::path& svg) const;

private:
    using by_size = std::array<std::vector<double>, tasks + 1>;
    std::array<by_size, 3> normalized_, lambdas_; ///< [method][size]; of lambdas_ an element for each seed
};

} // namespace digits
