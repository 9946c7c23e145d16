// The merges that look at data: what they need to know of each task, collected from its training images, and the
// merges.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "setting.hpp"

#include <taskvec/statistics/fisher_accumulator.hpp>
#include <taskvec/statistics/gram_accumulator.hpp>

#include <cstddef>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

inline constexpr std::size_t fisher_images = 256, gram_images = 512;

/// One task's model on its own training images: the Fisher information (its expectation over the model's own labels,
/// exact: all ten, for 256 images), and the Grams of both layers' inputs (512 images).
struct statistics {
    taskvec::expected_fisher_accumulator fisher;
    std::map<std::string, taskvec::gram_accumulator> grams; ///< by the names of the weights
};

statistics collect(const encoder& model, const matrix& head, const dataset& train);
/// Of every task's own model.
std::vector<statistics> collect(const setting& s, const std::vector<encoder>& models);

/// Fisher merging: nothing to choose.
encoder fisher_merged(const setting& s, const std::vector<encoder>& models, const std::vector<statistics>& known);

/// RegMean with the scale α of the off-diagonals that validation chose; ridge 1e-6.
struct regmean_choice {
    encoder model;
    double alpha = 0;
};
choice<regmean_choice> tuned_regmean(
    const setting& s, const std::vector<encoder>& models, const std::vector<statistics>& known);

/// <task>.fisher.safetensors and <task>.gram.safetensors, for the tool's merges, with the fingerprint of each task's
/// model.
void save(
    const std::vector<statistics>& known, const std::vector<encoder>& models, const std::filesystem::path& folder);

} // namespace digits
