// Line charts and heat maps as SVG files, drawn by gnuplot. Shared by the tool and the examples; no part of the
// library.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/formats/file.hpp>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

namespace plot {

/// One line of a chart. Points whose y is not finite are left out.
struct curve {
    std::string label;
    std::vector<double> x, y;
    bool dashed = false; ///< for what is there to compare with
    bool marks = true; ///< a mark at each point
    bool line = true; ///< false: the marks alone
};

struct line_chart {
    std::string title, x_label, y_label;
    std::vector<curve> curves;
    std::optional<std::pair<double, double>> y_range{}; ///< empty: what the curves need
    bool log_x = false;
    std::vector<double> x_ticks{}; ///< empty: gnuplot's choice
    unsigned width = 840, height = 520;
};

/// A block of a heat map's cells, first and last included.
struct cell_box {
    std::size_t first_row = 0, last_row = 0, first_column = 0, last_column = 0;
};

/// A matrix as coloured cells with their values written in them; row 0 is at the top.
struct heat_map {
    std::string title;
    std::vector<std::string> columns, rows; ///< labels
    std::vector<std::vector<double>> values{}; ///< [row][column]; a value that is not finite has a grey cell
    double lowest = -1, highest = 1; ///< of the colour scale
    int decimals = 2;
    bool diverging = true; ///< blue to white to red, around a middle that means something; otherwise white to dark blue
    std::string x_label{}, y_label{};
    std::optional<cell_box> box{}; ///< cells with a frame around them
};

namespace detail {

/// Text as a gnuplot string. Single quotes keep everything literal; control characters have no place in a label.
inline std::string literal(std::string_view text)
{
    std::string result = "'";
    for (const char c : text) {
        if (c == '\'') { result += "''"; }
        else {
            result += static_cast<unsigned char>(c) < 0x20u ? ' ' : c;
        }
    }
    return result + "'";
}

inline std::string number_text(double value)
{
    if (!std::isfinite(value)) { return "NaN"; }
    char buffer[40];
    std::snprintf(buffer, sizeof buffer, "%.10g", value);
    return buffer;
}

inline std::string fixed_text(double value, int decimals)
{
    char buffer[64];
    std::snprintf(buffer, sizeof buffer, "%.*f", decimals, value);
    return buffer[0] == '-' && std::string_view(buffer).find_first_not_of("-0.") == std::string_view::npos ? buffer + 1
                                                                                                           : buffer;
}

/// How many letters a text shows.
inline std::size_t letters(std::string_view text)
{
    return static_cast<std::size_t>(std::count_if(
        text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0u) != 0x80u; }));
}

/// A text of at most so many letters: a longer one has an ellipsis for its middle.
inline std::string shortened(std::string_view text, std::size_t most)
{
    const std::size_t all = letters(text);
    if (all <= most) { return std::string(text); }
    const std::size_t first = most / 2, last = all - (most - first - 1); // letters before and behind the ellipsis
    std::string result;
    std::size_t letter = 0;
    for (std::size_t at = 0; at < text.size();) {
        std::size_t next = at + 1;
        while (next < text.size() && (static_cast<unsigned char>(text[next]) & 0xc0u) == 0x80u) { ++next; }
        if (letter < first || letter >= last) { result.append(text, at, next - at); }
        else if (letter == first) {
            result += "…";
        }
        ++letter;
        at = next;
    }
    return result;
}

/// Labels that a picture has room for, shortened no further than leaves them different.
inline std::vector<std::string> short_labels(const std::vector<std::string>& labels)
{
    const auto different = [](std::vector<std::string> list) {
        std::sort(list.begin(), list.end());
        return std::unique(list.begin(), list.end()) - list.begin();
    };
    std::size_t longest = 0;
    for (const auto& label : labels) { longest = std::max(longest, letters(label)); }
    std::vector<std::string> result = labels;
    for (std::size_t most = 28; most < longest; most *= 2) {
        for (std::size_t i = 0; i < labels.size(); ++i) { result[i] = shortened(labels[i], most); }
        if (different(result) == different(labels)) { return result; }
    }
    return labels;
}

/// Okabe and Ito's colours, which colour-blind readers tell apart, by what each stands for wherever it is drawn.
struct label_colour {
    const char *label, *colour;
};
inline constexpr label_colour label_colours[] = {{"task-arithmetic", "#0072b2"}, {"ties", "#d55e00"},
    {"lorahub", "#009e73"}, {"peru", "#cc79a7"}, {"post-pruning", "#e69f00"}, {"average", "#56b4e9"},
    {"single-task", "#000000"}, {"pre-trained", "#8c8c8c"}};

/// The colour of each curve. It follows from the label, not from the place in the chart, so that a method has one
/// colour in all of them: its own, or one that is chosen by the letters of the label. One that is taken gives way to
/// the next.
inline std::vector<const char*> colours_of(const std::vector<curve>& curves)
{
    constexpr std::size_t count = std::size(label_colours);
    std::vector<const char*> result(curves.size());
    std::vector<bool> taken(count);
    for (const bool named : {true, false}) { // what has a colour of its own comes first
        for (std::size_t c = 0; c < curves.size(); ++c) {
            std::string label;
            std::uint32_t hash = 2166136261u; // FNV-1a
            for (const char letter : curves[c].label) {
                label += letter == ' ' || letter == '_' ? '-'
                    : 'A' <= letter && letter <= 'Z'    ? static_cast<char>(letter + 32)
                                                        : letter;
                hash = (hash ^ static_cast<unsigned char>(label.back())) * 16777619u;
            }
            const auto own =
                static_cast<std::size_t>(std::find_if(std::begin(label_colours), std::end(label_colours),
                                             [&](const label_colour& one) { return label.starts_with(one.label); })
                    - std::begin(label_colours));
            if (named != (own < count)) { continue; }
            std::size_t place = named ? own : hash % count;
            if (std::find(taken.begin(), taken.end(), false) == taken.end()) { taken.assign(count, false); }
            while (taken[place]) { place = (place + 1) % count; }
            taken[place] = true;
            result[c] = label_colours[place].colour;
        }
    }
    return result;
}

/// The picture's title is the chart's; those that gnuplot gives to it and to its parts say nothing.
inline std::string with_title(const std::string& svg, std::string_view title)
{
    std::string own = "<title>", result;
    for (const char c : title) {
        if (c == '&') { own += "&amp;"; }
        else if (c == '<') {
            own += "&lt;";
        }
        else {
            own += static_cast<unsigned char>(c) < 0x20u ? ' ' : c;
        }
    }
    own += "</title>";
    std::size_t at = 0;
    for (std::size_t begin; (begin = svg.find("<title>", at)) != std::string::npos; own.clear()) {
        const std::size_t end = svg.find("</title>", begin);
        if (end == std::string::npos) { break; }
        result.append(svg, at, begin - at).append(own);
        at = end + 8;
    }
    return result.append(svg, at);
}

/// Gives each stroke of a dashed path an element of its own: gnuplot joins a line and its sample in the key into one
/// path, which some converters (ImageMagick's own) then draw with a stroke between the two.
inline std::string separate_paths(const std::string& svg)
{
    std::string result;
    std::size_t at = 0;
    for (std::size_t begin; (begin = svg.find("<path", at)) != std::string::npos;) {
        const std::size_t data = svg.find(" d='M", begin), end = svg.find("'/>", begin);
        if (data == std::string::npos || end == std::string::npos || data > end) { break; }
        const std::string attributes = svg.substr(begin, data + 4 - begin);
        result.append(svg, at, begin - at);
        for (std::size_t stroke = data + 4; stroke < end;) {
            const std::size_t next = std::min(svg.find('M', stroke + 1), end);
            result += attributes;
            result.append(svg, stroke, next - stroke);
            result += "'/>";
            stroke = next;
        }
        at = end + 3;
    }
    return result.append(svg, at);
}

/// Runs gnuplot on a script and gives back what it draws, under that title.
inline std::string run_gnuplot(const std::string& script, std::string_view title, const std::filesystem::path& target)
{
    using file = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;
    const file input(std::tmpfile(), &std::fclose), output(std::tmpfile(), &std::fclose),
        errors(std::tmpfile(), &std::fclose);
    if (!input || !output || !errors) {
        taskvec::raise<taskvec::io_error>(
            taskvec::system_error_code(errno), "cannot create temporary files for gnuplot", target.string(), errno);
    }
    std::fwrite(script.data(), 1, script.size(), input.get());
    if (std::fflush(input.get()) != 0) {
        taskvec::raise<taskvec::io_error>(
            taskvec::system_error_code(errno), "cannot write gnuplot's script", target.string(), errno);
    }
    std::rewind(input.get());

    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ::fileno(input.get()), 0);
    posix_spawn_file_actions_adddup2(&actions, ::fileno(output.get()), 1);
    posix_spawn_file_actions_adddup2(&actions, ::fileno(errors.get()), 2);
    char name[] = "gnuplot", dash[] = "-";
    char* arguments[] = {name, dash, nullptr};
    pid_t child = 0;
    const int failure = ::posix_spawnp(&child, name, &actions, nullptr, arguments, environ);
    posix_spawn_file_actions_destroy(&actions);
    const char* const advice =
        "plots are drawn by gnuplot, which was not found: install gnuplot (Debian: apt-get install gnuplot-nox)";
    if (failure == ENOENT) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::program_failed, advice, target.string(), ENOENT);
    }
    if (failure != 0) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::program_failed,
            taskvec::message("cannot start gnuplot: ", std::generic_category().message(failure)), target.string(),
            failure);
    }
    int status = 0;
    while (::waitpid(child, &status, 0) < 0 && errno == EINTR) { }
    const auto read_all = [](std::FILE* stream) {
        std::string text;
        std::rewind(stream);
        char buffer[4096];
        for (std::size_t got; (got = std::fread(buffer, 1, sizeof buffer, stream)) > 0;) { text.append(buffer, got); }
        return text;
    };
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::program_failed, advice, target.string(), ENOENT);
    }
    const auto svg = read_all(output.get());
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || svg.find("</svg>") == std::string::npos) {
        auto said = read_all(errors.get());
        std::replace(said.begin(), said.end(), '\n', ' ');
        taskvec::raise<taskvec::io_error>(
            taskvec::error_code::program_failed, "gnuplot failed: " + said, target.string());
    }
    return with_title(separate_paths(svg), title);
}

inline std::string terminal(unsigned width, unsigned height)
{
    return "set encoding utf8\nset terminal svg size " + std::to_string(width) + "," + std::to_string(height)
        + " dynamic noenhanced font 'Helvetica,Arial,sans-serif,14' background '#ffffff'\nset output\n";
}

} // namespace detail

/// A line chart as SVG, drawn for the file `path`, which errors name and nothing writes. Throws
/// taskvec::invalid_argument for curves that are not curves, io_error if gnuplot is missing or fails.
[[nodiscard]] inline std::string svg_of(const line_chart& chart, const std::filesystem::path& path)
{
    using namespace detail;
    if (chart.curves.empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::inputs_empty, "a chart without curves");
    }
    const auto colours = colours_of(chart.curves);
    std::vector<std::string> labels;
    for (const auto& one : chart.curves) { labels.push_back(one.label); }
    labels = short_labels(labels);
    std::string script = terminal(chart.width, chart.height);
    script += "set title " + literal(chart.title) + " font ',16'\nset xlabel " + literal(chart.x_label)
        + "\nset ylabel " + literal(chart.y_label) + "\n";
    script += "set grid lc rgb '#d9d9d9' lw 1\nset border 3 lc rgb '#404040'\nset tics nomirror\nset key outside right "
              "center reverse Left samplen 2 spacing 1.4\n";
    if (chart.log_x) { script += "set logscale x\n"; }
    script += "set autoscale xfix\n"; // the axis ends where the curves do
    if (chart.y_range) {
        script += "set yrange [" + number_text(chart.y_range->first) + ":" + number_text(chart.y_range->second) + "]\n";
    }
    if (!chart.x_ticks.empty()) {
        script += "set xtics (";
        for (std::size_t i = 0; i < chart.x_ticks.size(); ++i) {
            script += (i ? "," : "") + number_text(chart.x_ticks[i]);
        }
        script += ")\n";
    }
    std::string plots;
    for (std::size_t c = 0; c < chart.curves.size(); ++c) {
        const auto& line = chart.curves[c];
        if (line.x.size() != line.y.size() || line.x.empty()) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::list_length,
                taskvec::message("curve '", line.label, "' has ", line.x.size(), " x and ", line.y.size(), " y"));
        }
        const auto block = "$curve" + std::to_string(c);
        script += block + " << EOD\n";
        for (std::size_t i = 0; i < line.x.size(); ++i) {
            script += number_text(line.x[i]) + " " + number_text(line.y[i]) + "\n";
        }
        script += "EOD\n";
        plots += (c ? ", \\\n  " : "plot ") + block + " using 1:2 with "
            + (!line.line        ? "points"
                    : line.marks ? "linespoints"
                                 : "lines")
            + " lw 2 lc rgb '" + colours[c] + "'" + (line.dashed && line.line ? " dt (8,6)" : "")
            + (line.marks || !line.line ? " pt 7 ps 0.5" : "") + " title " + literal(labels[c]);
    }
    return run_gnuplot(script + plots + "\n", chart.title, path);
}

/// A heat map as SVG. Throws like the line chart.
[[nodiscard]] inline std::string svg_of(const heat_map& map, const std::filesystem::path& path)
{
    using namespace detail;
    if (map.values.empty() || map.values.size() != map.rows.size()) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::error_code::list_length, "a heat map needs one label for each of its rows");
    }
    std::size_t longest_row = 4, longest_column = 4;
    const auto rows = short_labels(map.rows), columns = short_labels(map.columns);
    for (const auto& label : rows) { longest_row = std::max(longest_row, letters(label)); }
    for (const auto& label : columns) { longest_column = std::max(longest_column, letters(label)); }
    // Margins in pixels, from the labels' lengths: letters of 8 to 9 pixels, column labels at 45 degrees.
    const std::size_t cell = 56, left = 9 * longest_row + (map.y_label.empty() ? 24 : 56), right = 96, top = 64,
                      bottom = 6 * longest_column + (map.x_label.empty() ? 40 : 64);
    const std::size_t width =
                          std::max<std::size_t>(left + right + cell * map.columns.size(), 8 * letters(map.title) + 60),
                      height = top + bottom + cell * map.rows.size();
    const auto share = [](std::size_t part, std::size_t whole) {
        return number_text(static_cast<double>(part) / static_cast<double>(whole));
    };
    std::string script = terminal(static_cast<unsigned>(width), static_cast<unsigned>(height));
    script += "set lmargin at screen " + share(left, width) + "\nset rmargin at screen "
        + share(left + cell * map.columns.size(), width) + "\nset tmargin at screen " + share(height - top, height)
        + "\nset bmargin at screen " + share(bottom, height) + "\n";
    // The colour bar has one width and distance, however many cells there are.
    script += "set colorbox vertical user origin screen " + share(left + cell * map.columns.size() + 16, width) + ","
        + share(bottom, height) + " size screen " + share(20, width) + "," + share(cell * map.rows.size(), height)
        + "\n";
    script += "set title " + literal(map.title) + " font ',16'\nunset key\nset border 0\nset tics scale 0\n";
    script += map.diverging ? "set palette defined (0 '#2166ac', 1 '#92c5de', 2 '#f7f7f7', 3 '#f4a582', 4 '#b2182b')\n"
                            : "set palette defined (0 '#f7fbff', 1 '#c6dbef', 2 '#6baed6', 3 '#2171b5', 4 '#08306b')\n";
    if (!map.x_label.empty()) { script += "set xlabel " + literal(map.x_label) + "\n"; }
    if (!map.y_label.empty()) { script += "set ylabel " + literal(map.y_label) + "\n"; }
    script += "set cbrange [" + number_text(map.lowest) + ":" + number_text(map.highest)
        + "]\nset object 1 rect from graph 0,0 to graph 1,1 behind fc rgb '#d0d0d0' fs solid noborder\n";
    script += "set xrange [-0.5:" + number_text(static_cast<double>(map.columns.size()) - 0.5) + "]\nset yrange ["
        + number_text(static_cast<double>(map.rows.size()) - 0.5) + ":-0.5]\n";
    const auto ticks = [&](const std::vector<std::string>& labels) {
        std::string text = "(";
        for (std::size_t i = 0; i < labels.size(); ++i) {
            text += (i ? "," : "") + literal(labels[i]) + " " + std::to_string(i);
        }
        return text + ")";
    };
    script += "set xtics " + ticks(columns) + " rotate by 45 right\nset ytics " + ticks(rows) + "\n";
    if (map.box) {
        const auto edge = [](std::size_t index, double side) { return number_text(static_cast<double>(index) + side); };
        script += "set object 2 rect from " + edge(map.box->first_column, -0.5) + "," + edge(map.box->first_row, -0.5)
            + " to " + edge(map.box->last_column, 0.5) + "," + edge(map.box->last_row, 0.5)
            + " front fs empty border rgb '#d00000' lw 3\n";
    }
    script += "$cells << EOD\n";
    const auto dark = [&](double value) {
        const double place = (value - map.lowest) / (map.highest - map.lowest); // on the colour scale, 0 to 1
        return map.diverging ? std::abs(place - 0.5) > 0.35 : place > 0.6;
    };
    for (std::size_t r = 0; r < map.values.size(); ++r) {
        if (map.values[r].size() != map.columns.size()) {
            taskvec::raise<taskvec::invalid_argument>(
                taskvec::error_code::list_length, "a heat map needs one label for each of its columns");
        }
        for (std::size_t c = 0; c < map.values[r].size(); ++c) {
            const double value = map.values[r][c];
            const bool known = std::isfinite(value);
            script += std::to_string(c) + " " + std::to_string(r) + " " + number_text(value) + " \""
                + (known ? fixed_text(value, map.decimals) : "n/a") + "\" "
                + (known && dark(value) ? "0xffffff" : "0x202020") + "\n";
        }
    }
    script += "EOD\nset style fill solid noborder\nplot $cells using 1:2:($1-0.5):($1+0.5):($2-0.5):($2+0.5):3 with "
              "boxxyerror lc palette, $cells using "
              "1:2:4:5 with labels tc rgb variable font ',13'\n";
    return run_gnuplot(script, map.title, path);
}

/// Draws a chart or a heat map into a file. Throws like svg_of().
template <class Figure>
void write_svg(const Figure& figure, const std::filesystem::path& path)
{
    taskvec::write_text_file(path, svg_of(figure, path));
}

} // namespace plot
