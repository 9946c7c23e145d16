// SPDX-License-Identifier: Apache-2.0
#include "table.hpp"

#include <taskvec/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <numeric>

namespace digits {
namespace {

/// The accuracies of one column (a task, or the average when `task` is `tasks`) of a row.
spread column(const row& r, std::size_t task)
{
    if (task == tasks) { return over_seeds(r.averages()); }
    std::vector<double> values;
    for (const auto& seed : r.accuracies) { values.push_back(seed[task]); }
    return over_seeds(values);
}

/// Number of characters, not bytes, of UTF-8 text.
std::size_t width(std::string_view text)
{
    return static_cast<std::size_t>(std::count_if(
        text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0u) != 0x80u; }));
}

} // namespace

double mean(const scores& accuracies)
{
    return std::accumulate(accuracies.begin(), accuracies.end(), 0.0) / static_cast<double>(accuracies.size());
}

spread over_seeds(const std::vector<double>& values)
{
    const auto count = static_cast<double>(values.size());
    const double centre = std::accumulate(values.begin(), values.end(), 0.0) / count;
    double squares = 0;
    for (const double value : values) { squares += (value - centre) * (value - centre); }
    return {centre, values.size() > 1 ? std::sqrt(squares / (count - 1)) : 0.0};
}

std::vector<double> row::averages() const
{
    std::vector<double> all;
    for (const auto& seed : accuracies) { all.push_back(mean(seed)); }
    return all;
}

void table::add(
    std::string_view method, std::size_t parameters, const scores& accuracies, std::optional<std::size_t> bytes)
{
    auto place = std::find_if(rows_.begin(), rows_.end(), [&](const row& r) { return r.method == method; });
    if (place == rows_.end()) {
        place = rows_.insert(place, row{std::string(method), parameters, bytes.value_or(4 * parameters)});
    }
    place->accuracies.push_back(accuracies);
}

const row& table::operator[](std::string_view method) const
{
    const auto place = std::find_if(rows_.begin(), rows_.end(), [&](const row& r) { return r.method == method; });
    if (place == rows_.end()) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::error_code::tensor_missing, taskvec::message("table '", title_, "' has no row '", method, "'"));
    }
    return *place;
}

std::vector<double> table::best(const std::vector<std::string_view>& methods) const
{
    std::vector<double> highest = (*this)[methods.front()].averages();
    for (const auto method : methods) {
        const std::vector<double> averages = (*this)[method].averages();
        std::ranges::transform(highest, averages, highest.begin(), [](double a, double b) { return std::max(a, b); });
    }
    return highest;
}

std::vector<double> table::worst(const std::vector<std::string_view>& methods) const
{
    std::vector<double> lowest = (*this)[methods.front()].averages();
    for (const auto method : methods) {
        const std::vector<double> averages = (*this)[method].averages();
        std::ranges::transform(lowest, averages, lowest.begin(), [](double a, double b) { return std::min(a, b); });
    }
    return lowest;
}

std::string table::text() const
{
    std::vector<std::vector<std::string>> cells{{"Method", "#params", "KiB"}};
    for (const auto task : task_names) { cells[0].emplace_back(task); }
    cells[0].emplace_back("Avg");
    for (const auto& r : rows_) {
        auto& line = cells.emplace_back(
            std::vector<std::string>{r.method, std::to_string(r.parameters), std::to_string((r.bytes + 512) / 1024)});
        for (std::size_t task = 0; task <= tasks; ++task) {
            const spread value = column(r, task);
            line.push_back(
                percent(value.mean) + (r.accuracies.size() > 1 ? taskvec::message("±", percent(value.deviation)) : ""));
        }
    }
    return title_ + "\n\n" + aligned(cells);
}

void table::write_csv(const std::filesystem::path& file) const
{
    const bool several = !rows_.empty() && rows_.front().accuracies.size() > 1;
    std::string out = "method,#params,bytes";
    for (const auto task : task_names) { out += taskvec::message(',', task); }
    out += ",Avg";
    for (std::size_t task = 0; several && task <= tasks; ++task) {
        out += taskvec::message(",sd ", task == tasks ? "Avg" : task_names[task]);
    }
    for (const auto& r : rows_) {
        out += taskvec::message('\n', r.method, ',', r.parameters, ',', r.bytes);
        for (std::size_t task = 0; task <= tasks; ++task) {
            out += taskvec::message(',', percent(column(r, task).mean));
        }
        for (std::size_t task = 0; several && task <= tasks; ++task) {
            out += taskvec::message(',', percent(column(r, task).deviation));
        }
    }
    out += '\n';
    write_text(file, out);
}

std::string aligned(const std::vector<std::vector<std::string>>& cells)
{
    std::vector<std::size_t> widths(cells[0].size());
    for (const auto& line : cells) {
        for (std::size_t c = 0; c < line.size(); ++c) { widths[c] = std::max(widths[c], width(line[c])); }
    }
    std::string out;
    for (const auto& line : cells) {
        for (std::size_t c = 0; c < line.size(); ++c) {
            const std::string padding(widths[c] - width(line[c]), ' ');
            out += c == 0 ? line[c] + padding : taskvec::message("  ", padding, line[c]);
        }
        out += '\n';
    }
    return out;
}

std::string percent(double fraction)
{
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.2f", 100.0 * fraction);
    return buffer;
}

std::string fixed(double value)
{
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.4f", value);
    return buffer;
}

std::string with_density(std::string_view method, double density)
{
    char buffer[64];
    std::snprintf(
        buffer, sizeof buffer, "%.*s (%g%%)", static_cast<int>(method.size()), method.data(), 100.0 * density);
    return buffer;
}

void write_text(const std::filesystem::path& file, std::string_view text)
{
    std::ofstream stream(file, std::ios::binary);
    stream << text;
    stream.close();
    if (!stream) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::file_access, "cannot be written", file.string());
    }
}

} // namespace digits
