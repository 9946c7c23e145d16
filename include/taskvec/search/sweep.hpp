// Searches over grids with a caller's score: λ, TIES density × λ, every subset of the tasks; kept as a table that a
// later run goes on with.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/csv.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/search/lambda_grid.hpp>
#include <taskvec/search/subset_sweep.hpp>
#include <taskvec/search/task_space.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <map>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A point of a sweep, as its coordinates are written in a table, and its score.
struct sweep_row {
    std::vector<std::string> point; ///< the coordinates, in the order of the table's columns
    double score = 0; ///< as the scoring function gave it
};

/// Points and scores, in the order in which they came. A sweep skips what its table holds already, so a sweep that was
/// cut short is gone on with by handing it the table that it left: write_csv() and read_sweep() carry one over.
class sweep_table {
public:
    /// Without columns it takes those of the first sweep that it is given to.
    explicit sweep_table(std::vector<std::string> columns = {})
        : columns_(std::move(columns))
    { }

    /// The names of the coordinates.
    [[nodiscard]] const std::vector<std::string>& columns() const noexcept { return columns_; }
    /// The rows, in the order in which they came.
    [[nodiscard]] const std::vector<sweep_row>& rows() const noexcept { return rows_; }
    /// Whether this point has been scored.
    [[nodiscard]] bool contains(const std::vector<std::string>& point) const { return places_.contains(point); }
    /// The row of highest score, or of lowest; the first of equals; nullptr when there is none.
    [[nodiscard]] const sweep_row* best(bool highest = true) const noexcept
    {
        const sweep_row* found = nullptr;
        for (const auto& row : rows_) {
            if (!found || (highest ? row.score > found->score : row.score < found->score)) { found = &row; }
        }
        return found;
    }
    /// Errors: invalid_argument (another number of coordinates than columns, a point that is there already),
    /// nonfinite_error.
    void add(std::vector<std::string> point, double score)
    {
        if (point.size() != columns_.size()) {
            raise<invalid_argument>(error_code::sweep_table,
                message("a point of ", point.size(), " coordinates in a table of ", columns_.size(), " columns"));
        }
        if (!std::isfinite(score)) {
            raise<nonfinite_error>(error_code::score_not_finite,
                message("the score of ", describe(point), " is ", score, ": a score is a finite number"));
        }
        if (!places_.emplace(point, rows_.size()).second) {
            raise<invalid_argument>(
                error_code::sweep_table, message("the point ", describe(point), " is in the table already"));
        }
        rows_.push_back({std::move(point), score});
    }
    /// "density=0.2 lambda=0.5", for messages.
    [[nodiscard]] std::string describe(const std::vector<std::string>& point) const
    {
        std::string text;
        for (std::size_t i = 0; i < point.size(); ++i) {
            text += (i ? " " : "") + (i < columns_.size() ? columns_[i] + "=" : std::string()) + point[i];
        }
        return text;
    }
    /// Gives an empty table its columns. Throws invalid_argument if it has others.
    void require_columns(const std::vector<std::string>& columns)
    {
        if (columns_.empty()) { columns_ = columns; }
        if (columns_ != columns) {
            std::string found, wanted;
            for (const auto& name : columns_) { found += (found.empty() ? "" : ",") + name; }
            for (const auto& name : columns) { wanted += (wanted.empty() ? "" : ",") + name; }
            raise<invalid_argument>(error_code::sweep_table,
                message("the table has the columns ", found, "; this sweep writes ", wanted, ": start a new table"));
        }
    }

private:
    std::vector<std::string> columns_;
    std::vector<sweep_row> rows_;
    std::map<std::vector<std::string>, std::size_t> places_;
};

/// The table as CSV: its columns and `score`, a line for each row. Scores read back exactly.
inline void write_csv(std::ostream& out, const sweep_table& table)
{
    for (const auto& name : table.columns()) { out << csv_field(name) << ','; }
    out << "score\n";
    for (const auto& row : table.rows()) {
        for (const auto& coordinate : row.point) { out << csv_field(coordinate) << ','; }
        out << csv_number(row.score) << '\n';
    }
}

namespace detail {

/// The fields of CSV text after RFC 4180, line by line; empty lines are left out.
inline std::vector<std::vector<std::string>> csv_lines(std::string_view text, std::string_view file)
{
    std::vector<std::vector<std::string>> lines;
    std::vector<std::string> fields;
    std::string field;
    bool quoted = false, begun = false;
    const auto end_field = [&] {
        fields.push_back(std::exchange(field, {}));
        begun = false;
    };
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (quoted) {
            if (c != '"') { field += c; }
            else if (i + 1 < text.size() && text[i + 1] == '"') {
                field += text[++i];
            }
            else {
                quoted = false;
            }
        }
        else if (c == '"' && !begun) {
            quoted = begun = true;
        }
        else if (c == ',') {
            end_field();
        }
        else if (c == '\n') {
            if (!fields.empty() || begun) {
                end_field();
                lines.push_back(std::exchange(fields, {}));
            }
        }
        else if (c != '\r') {
            field += c;
            begun = true;
        }
    }
    if (quoted) {
        raise<format_error>(error_code::csv_syntax, "ends inside a quoted field", std::string(file), text.size());
    }
    if (!fields.empty() || begun) {
        end_field();
        lines.push_back(std::move(fields));
    }
    return lines;
}

} // namespace detail

/// The table that write_csv() wrote. `file` is named in messages. Throws format_error for text that is no such table.
[[nodiscard]] inline sweep_table read_sweep(std::string_view csv, std::string_view file = "")
{
    const auto fail = [&](const std::string& what) {
        raise<format_error>(error_code::csv_syntax, what, std::string(file));
    };
    auto lines = detail::csv_lines(csv, file);
    if (lines.empty() || lines[0].back() != "score") {
        fail("is no table of scores: its first line must end in 'score'");
    }
    lines[0].pop_back();
    sweep_table table(lines[0]);
    for (std::size_t i = 1; i < lines.size(); ++i) {
        auto& line = lines[i];
        if (line.size() != table.columns().size() + 1) {
            fail(message("line ", i + 1, " has ", line.size(), " fields; expected ", table.columns().size() + 1,
                ": remove the line"));
        }
        double score = 0;
        const std::string text = std::move(line.back());
        line.pop_back();
        const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), score);
        if (text.empty() || failure != std::errc{} || end != text.data() + text.size() || !std::isfinite(score)) {
            fail(message("line ", i + 1, " has the score '", text, "'; expected a number: remove the line"));
        }
        if (table.contains(line)) {
            fail(message("line ", i + 1, " repeats ", table.describe(line), ": remove the line"));
        }
        table.add(std::move(line), score);
    }
    return table;
}

/// The λ that the papers try: 0, 0.05 … 1, each the double nearest to its decimal.
[[nodiscard]] inline std::vector<double> lambda_steps()
{
    std::vector<double> steps;
    for (int i = 0; i <= 20; ++i) { steps.push_back(i / 20.0); }
    return steps;
}

/// How a sweep goes on: how many at once, and what is called when rows were added.
struct sweep_options {
    std::size_t at_once = 1; ///< candidates that are scored at the same time, each in a buffer of its own: for a score
                             ///< that may be called from several threads
    callback<void(const sweep_table&)>
        keep{}; ///< called after rows were added, on the calling thread: to write the table to a file
};

template <>
struct options_of<sweep_options> {
    static constexpr option_table table{
        option_row("jobs", &sweep_options::at_once, "candidates that are scored at the same time", {.at_least = 1})};
};

/// A score that is told which tasks, ascending, are in the model: to score it on these tasks alone.
template <class F, class T>
concept subset_score = requires(F& f, host_view<const T> parameters, std::span<const std::size_t> subset) {
    { f(parameters, subset) } -> std::convertible_to<double>;
};

namespace detail {

/// Makes candidates one after the other, scores as many at once as is allowed, and keeps the scores in the order of the
/// points.
template <storage_element T, class Score>
    requires(loss_function<Score, T> || subset_score<Score, T>)
class sweep_runner {
public:
    sweep_runner(const cpu& policy, std::size_t size, sweep_table& table, Score& score, const sweep_options& options)
        : policy_(policy)
        , table_(&table)
        , score_(&score)
        , options_(options)
        , buffers_(std::max<std::size_t>(1, options.at_once), memory_of(policy))
    {
        for (auto& buffer : buffers_) { buffer.resize(size); }
        policy_.progress = {};
    }
    [[nodiscard]] bool wanted(const std::vector<std::string>& point) const
    {
        return !table_->contains(point) && std::find(points_.begin(), points_.end(), point) == points_.end();
    }
    template <class Make>
    void add(std::vector<std::string> point, Make&& make, std::span<const std::size_t> subset = {})
    {
        auto& buffer = buffers_[points_.size()];
        make(host_view<T>(buffer.data(), buffer.size()));
        points_.push_back(std::move(point));
        subsets_.emplace_back(subset.begin(), subset.end());
        if (points_.size() == buffers_.size()) { flush(); }
    }
    void flush()
    {
        const auto points = std::exchange(points_, {});
        const auto subsets = std::exchange(subsets_, {});
        std::vector<double> scores(points.size(), std::numeric_limits<double>::quiet_NaN()); // NaN: not known
        const auto keep = [&] {
            bool added = false;
            for (std::size_t i = 0; i < points.size(); ++i) {
                if (std::isnan(scores[i])) { continue; }
                table_->add(points[i], scores[i]);
                added = true;
            }
            if (added && options_.keep) { options_.keep(*table_); }
        };
        const auto score_all = [&] {
            cpu workers = policy_;
            workers.threads = static_cast<unsigned>(points.size());
            for_each_index(workers, points.size(), [&](std::size_t i, std::size_t) {
                const double found = score(i, subsets[i]);
                if (!std::isfinite(found)) {
                    raise<nonfinite_error>(error_code::score_not_finite,
                        message("the score of ", table_->describe(points[i]), " is ", found,
                            ": a score is a finite number"));
                }
                scores[i] = found;
            });
        };
#if defined(TASKVEC_NO_EXCEPTIONS)
        score_all();
#else
        try {
            score_all();
        }
        catch (...) {
            keep();
            throw;
        }
#endif
        keep();
    }

private:
    double score(std::size_t i, const std::vector<std::size_t>& subset) const
    {
        const host_view<const T> model(buffers_[i].data(), buffers_[i].size());
        if constexpr (subset_score<Score, T>) {
            return static_cast<double>((*score_)(model, std::span<const std::size_t>(subset)));
        }
        else {
            return static_cast<double>((*score_)(model));
        }
    }

    cpu policy_;
    sweep_table* table_;
    Score* score_;
    sweep_options options_;
    std::pmr::vector<std::pmr::vector<T>> buffers_;
    std::vector<std::vector<std::string>> points_;
    std::vector<std::vector<std::size_t>> subsets_; ///< of the points, where a sweep is over subsets
};

inline void check_steps(std::span<const double> values, std::string_view what)
{
    if (values.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, message("a sweep needs at least one ", what));
    }
    for (const double value : values) {
        if (!std::isfinite(value)) {
            raise<invalid_argument>(
                error_code::parameter_not_finite, message("a ", what, " of the sweep is not finite"));
        }
    }
}

} // namespace detail

/// Scores θ0 + λ·τ for each λ, with τ any merged task vector: columns `lambda`. Flat views; candidates have the storage
/// type of `base` and the bits of apply(). `score` is given a view that is valid during the call. What the table holds
/// is skipped; when a score throws or is not finite, the rows before it are kept and the error is passed on. Errors:
/// invalid_argument, shape_mismatch, nonfinite_error. Cost: one pass and one score for each λ.
///
///     sweep_table table;
///     const auto score = [&](host_view<const float> theta) { return accuracy(theta); };
///     sweep_lambda(cpu{}, base, tau, lambda_steps(), table, score);
///     table.best()->point; // {"0.3"}
template <input_of<cpu> Base, input_of<cpu> Vector, loss_function<std::remove_const_t<element_of<const Base>>> Score>
void sweep_lambda(const cpu& policy, const Base& base, const Vector& vector, std::span<const double> lambdas,
    sweep_table& table, Score&& score, const sweep_options& options = {})
{
    using T = std::remove_const_t<element_of<const Base>>;
    detail::check_steps(lambdas, "lambda");
    table.require_columns({"lambda"});
    detail::sweep_runner<T, std::remove_reference_t<Score>> runner(policy, as_view(base).size(), table, score, options);
    for (const double lambda : lambdas) {
        std::vector<std::string> point{csv_number(lambda)};
        if (runner.wanted(point)) {
            runner.add(std::move(point), [&](host_view<T> out) { apply(policy, base, vector, lambda, out); });
        }
    }
    runner.flush();
}

/// Scores TIES over density × λ: columns `density,lambda`. `ties` gives everything else but `densities`. Candidates
/// have the bits of merge(). Otherwise as sweep_lambda(). Cost of a point: one TIES merge and one score.
///
///     sweep_ties(cpu{}, {}, base, tasks, std::array{0.1, 0.2, 0.5}, lambda_steps(), table, score);
template <input_of<cpu> Base, tasks_of<cpu> Tasks, loss_function<std::remove_const_t<element_of<const Base>>> Score>
void sweep_ties(const cpu& policy, const ties_options& ties, const Base& base, const Tasks& tasks,
    std::span<const double> densities, std::span<const double> lambdas, sweep_table& table, Score&& score,
    const sweep_options& options = {})
{
    using T = std::remove_const_t<element_of<const Base>>;
    detail::check_steps(densities, "density");
    detail::check_steps(lambdas, "lambda");
    table.require_columns({"density", "lambda"});
    detail::sweep_runner<T, std::remove_reference_t<Score>> runner(policy, as_view(base).size(), table, score, options);
    for (const double density : densities) {
        for (const double lambda : lambdas) {
            std::vector<std::string> point{csv_number(density), csv_number(lambda)};
            if (!runner.wanted(point)) { continue; }
            ties_options here = ties;
            here.density = density;
            here.densities.clear();
            here.lambda = lambda;
            runner.add(std::move(point), [&](host_view<T> out) { merge(policy, here, base, tasks, out); });
        }
    }
    runner.flush();
}

/// Scores θ0 + λ·Σ wt·τt over every subset of the task vectors, depth first by for_each_subset(): columns
/// `tasks,lambda`, the tasks counted from 0 and joined by `+`. One axpy a subset, one pass and one score a point.
/// `score` may also take the subset: score(view, std::span<const std::size_t>). Otherwise as sweep_lambda().
///
///     // "0+1", "0+1+2", "0+2", "1+2"
///     sweep_subsets(cpu{}, base, {tau0, tau1, tau2}, {}, std::array{0.3}, table, score);
template <storage_element T, class Score>
    requires(loss_function<Score, T> || subset_score<Score, T>)
void sweep_subsets(const cpu& policy, host_view<const T> base, const std::vector<host_view<const T>>& task_vectors,
    const subset_sweep_options& subsets, std::span<const double> lambdas, sweep_table& table, Score&& score,
    const sweep_options& options = {})
{
    detail::check_steps(lambdas, "lambda");
    table.require_columns({"tasks", "lambda"});
    detail::sweep_runner<T, std::remove_reference_t<Score>> runner(policy, base.size(), table, score, options);
    for_each_subset(policy, task_vectors, subsets, [&](std::span<const std::size_t> subset, auto sum) {
        std::string members;
        for (const std::size_t task : subset) { members += (members.empty() ? "" : "+") + std::to_string(task); }
        for (const double lambda : lambdas) {
            std::vector<std::string> point{members, csv_number(lambda)};
            if (runner.wanted(point)) {
                runner.add(std::move(point), [&](host_view<T> out) { apply(policy, base, sum, lambda, out); }, subset);
            }
        }
    });
    runner.flush();
}

} // namespace taskvec::inline TASKVEC_ABI
