// Candidates and their scores.
// SPDX-License-Identifier: Apache-2.0
#include "candidates.hpp"

#include "report.hpp"
#include "words.hpp"

#include <taskvec/core/csv.hpp>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <sstream>
#include <utility>

#include <unistd.h>

namespace tool {

namespace {

/// The same without notes, which were made when all was checked.
merge_request quiet(const merge_request& request)
{
    auto result = request;
    result.run.quiet = true;
    return result;
}

/// As merge reports it.
std::uint64_t bytes_read(const method_call& call, const taskvec::merge_report& merged)
{
    return merged.walks * call.inputs.models().bytes() + merged.beside + call.inputs.copied_bytes();
}

} // namespace

void add_score_options(command& verb, score_settings& score)
{
    verb.text("--score", score.command.text, "'CMD {}'",
        "Shell command; {} is the merged model's path, the last number it prints is the score", presence::required);
    verb.flag("--minimize", score.minimize, "The lowest score is the best");
    verb.number("--timeout", score.command.timeout, "S", "Seconds that a scoring command may take (default: 0, any)");
}

void add_table_option(command& verb, score_settings& score, const std::string& rows)
{
    verb.text("--csv", score.csv, "FILE",
        "Table of " + rows + " and scores, written after each; a later run goes on from it");
}

void add_scratch_option(command& verb, score_settings& score)
{
    verb.text(
        "--scratch", score.scratch, "DIR", "Directory for candidates while they are scored (default: the system's)");
}

void check_score_settings(const score_settings& score)
{
    check_score_command(score.command.text);
    if (!(score.command.timeout >= 0) || !std::isfinite(score.command.timeout)) {
        throw usage_error(taskvec::message(
            "--timeout is ", score.command.timeout, "; expected seconds, or 0 for as long as it takes"));
    }
}

taskvec::sweep_table read_scores(const score_settings& score, const std::vector<std::string>& columns)
{
    std::error_code ignored;
    taskvec::sweep_table table;
    if (!score.csv.empty() && fs::exists(score.csv, ignored)) {
        table = taskvec::read_sweep(taskvec::read_text_file(score.csv), score.csv);
    }
    if (!table.columns().empty() && table.columns() != columns) {
        std::string found;
        for (const auto& name : table.columns()) { found += name + ","; }
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::sweep_table,
            taskvec::message("'", score.csv, "' holds another sweep, with the columns ", found,
                "score: name another --csv, or remove it"));
    }
    table.require_columns(columns);
    return table;
}

void write_scores(const score_settings& score, const taskvec::sweep_table& table)
{
    if (score.csv.empty() || table.rows().empty()) { return; } // a table begins with its first score
    std::ostringstream text;
    text.exceptions(std::ios::badbit); // memory that runs out is no shorter table
    taskvec::write_csv(text, table);
    taskvec::write_text_file(score.csv, text.str());
    interrupt_leaves() = in_quotes(score.csv) + " holds " + counted(table.rows().size(), "score")
        + ", and the same command line goes on from there";
}

fs::path first_model_of(const merge_request& request, const merge_inputs& inputs)
{
    return inputs.base() ? fs::path(request.base) : inputs.arguments().front().path;
}

void claim_outputs(
    const merge_request& request, const score_settings& score, const std::string& svg, const fs::path& first_model)
{
    if (!request.out.empty()) {
        const bool directory = out_is_directory(request.out, first_model, !request.shard_size.empty());
        claim_model(request.run, request.out, directory);
    }
    if (!score.csv.empty()) { claim_output(score.csv, "--csv"); }
    if (!svg.empty()) { claim_output(svg, "--svg"); }
    claim_report(request.run);
    const auto scratch = scratch_parent(score);
    if (::access(scratch.c_str(), W_OK | X_OK) != 0) {
        const int code = errno;
        taskvec::raise<taskvec::io_error>(taskvec::system_error_code(code),
            taskvec::message("cannot make a temporary directory in it: ", std::strerror(code)), scratch.string(), code);
    }
}

fs::path scratch_parent(const score_settings& score)
{
    return score.scratch.empty() ? fs::temp_directory_path() : fs::path(score.scratch);
}

traffic write_candidate(
    const fs::path& file, const method_entry& method, const method_call& call, const fs::path& scratch)
{
    const auto plan = outputs_of(quiet(call.request), call.inputs);
    taskvec::safetensors_writer out(
        file, plan.specs, metadata_of(call.inputs.metadata(), plan.specs), taskvec::durability::process);
    taskvec::quantising_sink sink(plan, out, scratch);
    const auto merged = run_method(method, call, sink);
    sink.finish();
    std::error_code ignored;
    if (!fs::exists(file, ignored)) { guard_temporary(file); } // the next candidate takes the same name
    out.commit();
    return {bytes_read(call, merged), fs::file_size(file, ignored)};
}

best_merge::best_merge(const method_entry& method, const method_call& call, const std::string& done)
{
    const auto request = quiet(call.request);
    const auto& inputs = call.inputs;
    const bool directory =
        out_is_directory(request.out, first_model_of(call.request, inputs), !request.shard_size.empty());
    plan_ = std::make_unique<taskvec::quantised_outputs>(outputs_of(request, inputs));
    out_ = std::make_unique<model_output>(request.out, *plan_, inputs.reference(), request.shard_size, directory);
    auto models = recipe_models(request, inputs);
    for (std::size_t t = 0; t < call.weights.size(); ++t) { // where they were sought, they are no arguments
        auto& model = models[t + (inputs.base() ? 1 : 0)];
        model.weight = inputs.adapter(t) ? model.weight * call.weights[t] : call.weights[t];
    }
    add_model_files(*out_, request.copies, call.request.run,
        {done, request.method, std::move(models), json_of(method.values(request.options)).dump(2), {}, false,
            &inputs.vocabulary()},
        plan_->specs);
    const auto merged = run_method(method, call, out_->sink());
    out_->finish();
    bytes_ = {bytes_read(call, merged), out_->file_size()};
}

} // namespace tool
