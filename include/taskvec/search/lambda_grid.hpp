// A number at each point of a grid of two scaling factors, and tables of numbers as CSV.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/csv.hpp>
#include <taskvec/core/error.hpp>

#include <cmath>
#include <cstddef>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// values[i·lambda2.size() + j] belongs to (lambda1[i], lambda2[j]).
struct lambda_grid {
    std::vector<double> lambda1, lambda2; ///< factors along each side
    std::vector<double> values{}; ///< row by row

    /// The value at (lambda1[i], lambda2[j]), unchecked.
    [[nodiscard]] double& at(std::size_t i, std::size_t j) { return values[i * lambda2.size() + j]; }
    [[nodiscard]] double at(std::size_t i, std::size_t j) const { return values[i * lambda2.size() + j]; }
    /// The mean over all points; 0 for an empty grid.
    [[nodiscard]] double mean() const
    {
        double sum = 0;
        for (const double value : values) { sum += value; }
        return values.empty() ? 0 : sum / static_cast<double>(values.size());
    }
};

/// `count` equidistant values from `first` to `last`, both included.
[[nodiscard]] inline std::vector<double> equidistant(double first, double last, std::size_t count)
{
    std::vector<double> values(count);
    for (std::size_t i = 0; i < count; ++i) {
        values[i] =
            count == 1 ? first : first + (last - first) * static_cast<double>(i) / static_cast<double>(count - 1);
    }
    return values;
}

namespace detail {

inline lambda_grid empty_grid(std::span<const double> lambda1, std::span<const double> lambda2)
{
    for (const auto& factors : {lambda1, lambda2}) {
        if (factors.empty()) {
            raise<invalid_argument>(
                error_code::inputs_empty, "a grid needs at least one scaling factor along each side");
        }
        for (const double factor : factors) {
            if (!std::isfinite(factor)) {
                raise<invalid_argument>(error_code::parameter_not_finite, "a scaling factor of the grid is not finite");
            }
        }
    }
    lambda_grid grid{{lambda1.begin(), lambda1.end()}, {lambda2.begin(), lambda2.end()}};
    grid.values.resize(lambda1.size() * lambda2.size());
    return grid;
}

} // namespace detail

/// The grid as CSV, a line for each point: lambda1,lambda2,NAME. Numbers read back exactly.
inline void write_csv(std::ostream& out, const lambda_grid& grid, std::string_view value_name = "value")
{
    out << "lambda1,lambda2," << csv_field(value_name) << '\n';
    for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
            out << csv_number(grid.lambda1[i]) << ',' << csv_number(grid.lambda2[j]) << ',' << csv_number(grid.at(i, j))
                << '\n';
        }
    }
}

/// A square matrix (row-major, such as cosine_matrix()'s) as CSV: a first line and a first column of labels, with
/// `corner` where they meet. Throws invalid_argument when there are not as many labels as rows.
///
///     write_csv(file, cosine_matrix(cpu{}, models), names);
inline void write_csv(std::ostream& out, std::span<const double> matrix, std::span<const std::string> labels,
    std::string_view corner = {})
{
    const std::size_t n = labels.size();
    if (matrix.size() != n * n) {
        raise<invalid_argument>(
            error_code::list_length, message("write_csv: ", n, " labels for a matrix of ", matrix.size(), " elements"));
    }
    out << csv_field(corner);
    for (const auto& label : labels) { out << ',' << csv_field(label); }
    out << '\n';
    for (std::size_t i = 0; i < n; ++i) {
        out << csv_field(labels[i]);
        for (std::size_t j = 0; j < n; ++j) { out << ',' << csv_number(matrix[i * n + j]); }
        out << '\n';
    }
}

} // namespace taskvec::inline TASKVEC_ABI
