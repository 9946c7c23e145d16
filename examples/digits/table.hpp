// The papers' tables: a row for each method, a column for each task and their average, over one seed or several.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "data.hpp"

#include <array>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

/// Accuracy on each task, as fractions.
using scores = std::array<double, tasks>;

[[nodiscard]] double mean(const scores& accuracies);

/// Mean and sample standard deviation over seeds.
struct spread {
    double mean = 0, deviation = 0;
};
[[nodiscard]] spread over_seeds(const std::vector<double>& values);

/// One method in one table.
struct row {
    std::string method;
    std::size_t parameters = 0; ///< as the papers count: without the places of sparse entries
    std::size_t bytes = 0; ///< in files, places included, headers left out
    std::vector<scores> accuracies{}; ///< one element for each seed

    /// The average over the tasks, for each seed and over all seeds.
    [[nodiscard]] std::vector<double> averages() const;
    [[nodiscard]] double average() const { return over_seeds(averages()).mean; }
};

/// Rows in the order in which they were first added.
class table {
public:
    explicit table(std::string title)
        : title_(std::move(title))
    { }

    /// Adds one seed's accuracies to the row of this method. Without `bytes` each parameter takes four.
    void add(std::string_view method, std::size_t parameters, const scores& accuracies,
        std::optional<std::size_t> bytes = std::nullopt);

    [[nodiscard]] const std::string& title() const { return title_; }
    [[nodiscard]] const std::vector<row>& rows() const { return rows_; }
    /// The row of that method; a method that is not in the table is an error.
    [[nodiscard]] const row& operator[](std::string_view method) const;
    /// The highest and the lowest average of these methods, for each seed.
    [[nodiscard]] std::vector<double> best(const std::vector<std::string_view>& methods) const;
    [[nodiscard]] std::vector<double> worst(const std::vector<std::string_view>& methods) const;

    /// Columns separated by blanks: method, #params, KiB, the tasks, Avg; percent with two decimals, ± the standard
    /// deviation over seeds where there are several.
    [[nodiscard]] std::string text() const;
    /// The same as CSV; the standard deviations follow as columns of their own.
    void write_csv(const std::filesystem::path& file) const;

private:
    std::string title_;
    std::vector<row> rows_;
};

/// Lines of cells as text in columns: the first to the left, the others to the right, two blanks between them.
[[nodiscard]] std::string aligned(const std::vector<std::vector<std::string>>& cells);

/// "64.23"
[[nodiscard]] std::string percent(double fraction);

/// "0.0531": an error, a cosine.
[[nodiscard]] std::string fixed(double value);

/// "Post-Pruning (10%)"
[[nodiscard]] std::string with_density(std::string_view method, double density);

/// Writes a whole text file; failing is an error that names it.
void write_text(const std::filesystem::path& file, std::string_view text);

} // namespace digits
