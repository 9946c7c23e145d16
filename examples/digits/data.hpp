// The data of the digits example: the images, one random split a seed, and the eight domain shifts that are the tasks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Eigen/Core>

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string_view>
#include <vector>

namespace digits {

/// Rows are examples, or outputs of a layer: the storage order of checkpoints, too.
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

inline constexpr int image_side = 8, pixels = image_side * image_side, classes = 10;

/// `inputs` is examples × 64; `labels` are 0 … 9.
struct dataset {
    matrix inputs;
    std::vector<int> labels;

    [[nodiscard]] std::size_t size() const { return labels.size(); }
};

/// The 1,797 images, pixels divided by 16. A file that cannot be read, or that holds anything else, is an error.
dataset load_images(const std::filesystem::path& file);

/// The examples of `all` with these indices, in this order.
dataset subset(const dataset& all, const std::vector<std::size_t>& indices);
/// The first `count` of them, which must be there.
dataset first(const dataset& all, std::size_t count);

/// 0 … count − 1 in random order: Fisher and Yates, on the stream that (seed, stream, name) keys.
std::vector<std::size_t> shuffled(std::size_t count, std::uint64_t seed, std::uint32_t stream, std::string_view name);

/// What is trained on, what every hyperparameter is chosen on, and what the tables report.
struct splits {
    dataset train, validation, test;
};

inline constexpr std::size_t train_size = 1000, validation_size = 300;

/// A random split into 1,000 / 300 / the rest.
splits split(const dataset& all, std::uint64_t seed);

inline constexpr std::array<std::string_view, 8> task_names{
    "rot90", "rot180", "rot270", "transpose", "mirror", "flip", "invert", "permute"};
inline constexpr std::size_t tasks = task_names.size();

/// The same digits as task `task` shows them, normalised for the network: (x − 0.3) / 0.37. In the order of task_names:
/// rotated counter-clockwise by 90°, 180° and 270°; transposed; flipped left-right; flipped up-down; inverted contrast;
/// and one fixed random permutation of the pixels, the same for every seed.
dataset in_domain(const dataset& images, std::size_t task);

/// The same for every task: element t is task t's data.
std::vector<dataset> in_every_domain(const dataset& images);

} // namespace digits
