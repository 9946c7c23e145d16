// Scores of merged models beside those of single-task ones, and their summaries.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <cmath>
#include <cstddef>
#include <span>

namespace taskvec::inline TASKVEC_ABI {

/// score / single-task score: 1 is as good as the specialist. Throws invalid_argument unless the single-task score is
/// positive.
[[nodiscard]] inline double normalized_score(double score, double single_task_score)
{
    if (!(single_task_score > 0)) {
        raise<invalid_argument>(error_code::score_invalid,
            message("normalized_score: the single-task score is ", single_task_score, "; it must be positive"));
    }
    return score / single_task_score;
}

/// The mean of normalized scores over tasks: one score and one single-task score for each. Throws invalid_argument.
[[nodiscard]] inline double mean_normalized_score(
    std::span<const double> scores, std::span<const double> single_task_scores)
{
    if (scores.size() != single_task_scores.size() || scores.empty()) {
        raise<invalid_argument>(error_code::list_length,
            message("mean_normalized_score: ", scores.size(), " scores for ", single_task_scores.size(),
                " single-task scores: give one each, at least one"));
    }
    double sum = 0;
    for (std::size_t i = 0; i < scores.size(); ++i) { sum += normalized_score(scores[i], single_task_scores[i]); }
    return sum / static_cast<double>(scores.size());
}

/// Mean and sample standard deviation (divisor n − 1; 0 for one value), smallest and largest.
struct summary {
    std::size_t count = 0; ///< of the values
    double mean = 0, standard_deviation = 0, lowest = 0, highest = 0; ///< in the units of the values
};
/// Of at least one value, else invalid_argument. Two passes.
[[nodiscard]] inline summary summarize(std::span<const double> values)
{
    if (values.empty()) { raise<invalid_argument>(error_code::inputs_empty, "summarize: there are no values"); }
    summary result{values.size(), 0, 0, values[0], values[0]};
    for (const double value : values) {
        result.mean += value;
        if (value < result.lowest) { result.lowest = value; }
        if (value > result.highest) { result.highest = value; }
    }
    result.mean /= static_cast<double>(values.size());
    double square = 0;
    for (const double value : values) { square += (value - result.mean) * (value - result.mean); }
    if (values.size() > 1) { result.standard_deviation = std::sqrt(square / static_cast<double>(values.size() - 1)); }
    return result;
}

/// The mean of the entries off the diagonal of an n × n matrix (row-major), such as cosine_matrix()'s; 0 for n = 1.
/// Throws invalid_argument when the matrix is not square.
[[nodiscard]] inline double mean_off_diagonal(std::span<const double> matrix)
{
    const auto n = static_cast<std::size_t>(std::llround(std::sqrt(static_cast<double>(matrix.size()))));
    if (n * n != matrix.size()) {
        raise<invalid_argument>(
            error_code::list_length, message("mean_off_diagonal: ", matrix.size(), " elements are no square matrix"));
    }
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j < n; ++j) { sum += i == j ? 0.0 : matrix[i * n + j]; }
    }
    return n < 2 ? 0.0 : sum / static_cast<double>(n * (n - 1));
}

} // namespace taskvec::inline TASKVEC_ABI
