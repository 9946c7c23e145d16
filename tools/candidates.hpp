// Candidates: merges that are written to be scored by a command, and the table of scores from which a later run goes
// on. What sweep and lorahub share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"
#include "model_files.hpp"
#include "outputs.hpp"
#include "scoring.hpp"

#include <taskvec/search/sweep.hpp>

#include <memory>
#include <string>
#include <vector>

namespace tool {

/// What the command line says of scores.
struct score_settings {
    score_command command;
    std::string csv, scratch;
    bool minimize = false;
};

/// Adds --score, --minimize and --timeout.
void add_score_options(command& verb, score_settings& score);
/// Adds --csv; `rows`: what it is a table of.
void add_table_option(command& verb, score_settings& score, const std::string& rows);
/// Adds --scratch.
void add_scratch_option(command& verb, score_settings& score);
/// Throws usage_error for a command without a place for the path, and for a timeout that is none.
void check_score_settings(const score_settings& score);

/// The table at --csv, empty where there is none yet. Throws format_error, and invalid_argument for a table of others.
[[nodiscard]] taskvec::sweep_table read_scores(const score_settings& score, const std::vector<std::string>& columns);
/// Writes it there, where --csv was given and there is a score.
void write_scores(const score_settings& score, const taskvec::sweep_table& table);
/// Where candidates lie while they are scored.
[[nodiscard]] fs::path scratch_parent(const score_settings& score);
/// The first model of a request: the base, or the first task.
[[nodiscard]] fs::path first_model_of(const merge_request& request, const merge_inputs& inputs);
/// Checks, before any work, the places that a search writes to: the best model's, the table's, the picture's, the
/// report's, and that of the candidates. `first_model`: by whose kind `--out` is a file or a directory.
void claim_outputs(
    const merge_request& request, const score_settings& score, const std::string& svg, const fs::path& first_model);

/// What was read and written, in bytes.
struct traffic {
    std::uint64_t read = 0, written = 0;
    traffic& operator+=(const traffic& other)
    {
        read += other.read;
        written += other.written;
        return *this;
    }
};

/// Merges into a file that is only there to be scored; `scratch` has room for what is on its way.
[[nodiscard]] traffic write_candidate(
    const fs::path& file, const method_entry& method, const method_call& call, const fs::path& scratch);

/// The merge that was best, on its way to --out.
class best_merge {
public:
    /// `done` is what the model's card says of it.
    best_merge(const method_entry& method, const method_call& call, const std::string& done);
    void commit() { out_->commit(); }
    [[nodiscard]] const traffic& bytes() const { return bytes_; }

private:
    std::unique_ptr<taskvec::quantised_outputs> plan_;
    std::unique_ptr<model_output> out_;
    traffic bytes_;
};

} // namespace tool
