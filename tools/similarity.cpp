// taskvec similarity: cosines of task vectors.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"
#include "report.hpp"
#include "table.hpp"
#include "words.hpp"

#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/search/lambda_grid.hpp>

#include <plot.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <sstream>

namespace {

std::string fixed_text(double value)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.4f", value);
    if (std::isnan(value)) { return "nan"; } // not -nan
    return std::string_view(text) == "-0.0000" ? "0.0000" : text;
}

std::string table_of(const std::vector<std::string>& names, const std::vector<double>& cosines)
{
    constexpr std::size_t least = 7; // as wide as a negative cosine
    std::vector<std::vector<std::string>> rows{{""}};
    std::vector<bool> right{false};
    for (const auto& name : names) {
        const auto shown = tool::printable(name);
        rows[0].push_back(std::string(least - std::min(least, tool::text_width(shown)), ' ') + shown);
        right.push_back(true);
    }
    for (std::size_t r = 0; r < names.size(); ++r) {
        rows.push_back({tool::printable(names[r])});
        for (std::size_t c = 0; c < names.size(); ++c) {
            rows.back().push_back(fixed_text(cosines[r * names.size() + c]));
        }
    }
    return tool::table_text(std::move(rows), right);
}

struct similarity_settings {
    tool::model_request models;
    std::string csv, svg;
};

void run_similarity(const similarity_settings& given)
{
    tool::check_no_weights(given.models, "similarity", "a cosine does not depend on lengths; leave it out");
    tool::check_cpu(given.models.run);
    const tool::merge_inputs inputs(given.models, true);
    if (!given.csv.empty()) { tool::claim_output(given.csv, "--csv"); }
    if (!given.svg.empty()) { tool::claim_output(given.svg, "--svg"); }
    tool::claim_report(given.models.run);
    tool::runner run(given.models.run);
    if (given.models.run.dry_run) {
        tool::print("would compare " + tool::counted(inputs.tasks().size(), "task vector") + "\n"
            + tool::describe(given.models, inputs, tool::others::left_alone));
        return;
    }
    // All files are opened before the work, and named after everything that can fail: none is left where one of them
    // cannot be had.
    tool::report_file report(given.models.run.report);
    tool::text_output csv(given.csv), svg(given.svg);
    const auto cosines = taskvec::cosine_matrix(run.policy(), inputs.models());
    std::vector<std::string> names;
    for (const auto& task : inputs.arguments()) { names.push_back(task.name); }
    std::vector<std::vector<double>> rows;
    for (std::size_t r = 0; r < names.size(); ++r) {
        const auto row = cosines.begin() + static_cast<std::ptrdiff_t>(r * names.size());
        rows.emplace_back(row, row + static_cast<std::ptrdiff_t>(names.size()));
    }
    std::string csv_text, svg_text;
    if (csv.wanted()) {
        std::ostringstream text;
        text.exceptions(std::ios::badbit); // memory that runs out is no shorter table
        taskvec::write_csv(text, cosines, names, "task");
        csv_text = text.str();
        csv.finish_text(csv_text);
    }
    if (svg.wanted()) {
        svg_text = plot::svg_of(
            plot::heat_map{.title = "Cosine of task vectors", .columns = names, .rows = names, .values = rows},
            given.svg);
        svg.finish_text(svg_text);
    }
    if (report.wanted()) {
        const taskvec::merge_report done{.kept = {}, .conflicting = {}, .norms = {}, .walks = 1};
        tool::merge_request request; // without a method
        static_cast<tool::model_request&>(request) = given.models;
        auto content = tool::report_of(run, request, inputs, done, csv_text.size() + svg_text.size());
        content.erase("output");
        content["cosines"] = rows;
        report.finish(content);
    }
    tool::conclude(table_of(names, cosines), report, csv, svg);
}

const tool::register_verb similarity_verb(
    100, "similarity", "Cosine similarity of task vectors, as a table, CSV or picture", [](tool::command& verb) {
        const auto given = std::make_shared<similarity_settings>();
        tool::add_base_option(verb, given->models, tool::presence::required);
        tool::add_tasks_options(verb, given->models, "PATH", "A fine-tuned model; repeat");
        verb.text("--csv", given->csv, "FILE", "Also write the matrix as CSV");
        verb.text("--svg", given->svg, "FILE", "Also draw the matrix (needs gnuplot)");
        tool::add_tensor_options(verb, given->models);
        tool::add_run_options(verb, given->models.run);
        verb.footer("Example:\n  taskvec similarity --base base.safetensors --task math.safetensors --task "
                    "code.safetensors --svg cosines.svg");
        verb.action([given] { run_similarity(*given); });
    });

} // namespace
