// taskvec lorahub: weights of task vectors, sought without gradients by a score of the caller's.
// SPDX-License-Identifier: Apache-2.0
#include "candidates.hpp"
#include "report.hpp"
#include "words.hpp"

#include <taskvec/search/lorahub.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <exception>
#include <limits>
#include <memory>

#if defined(TASKVEC_HAS_NLOPT)
#include <taskvec/search/lorahub_nlopt.hpp>
#endif

namespace {

struct lorahub_settings {
    tool::merge_request merge;
    tool::score_settings score;
    taskvec::lorahub_options search;
    std::string bounds = "-1.5:1.5";
};

#if defined(TASKVEC_HAS_NLOPT)

struct interval {
    double lower = 0, upper = 0;
};

interval parse_bounds(const std::string& text)
{
    const auto fail = [&](const std::string& why) {
        throw tool::usage_error(
            "--bounds is '" + text + "'" + why + "; expected LOWER:UPPER, such as -1.5:1.5, with LOWER below UPPER");
    };
    const auto number = [&](const std::string& word) {
        double value = 0;
        const auto [end, failure] = std::from_chars(word.data(), word.data() + word.size(), value);
        if (word.empty() || failure != std::errc{} || end != word.data() + word.size() || !std::isfinite(value)) {
            fail("");
        }
        return value;
    };
    const auto colon = text.find(':');
    if (colon == text.npos) { fail(""); }
    const interval found{number(text.substr(0, colon)), number(text.substr(colon + 1))};
    if (found.lower > found.upper) { fail(", which is reversed"); }
    if (found.lower == found.upper) { fail(", which leaves nothing to seek"); }
    return found;
}

/// COBYLA within bounds that need not be symmetric.
class bounded_cobyla {
public:
    explicit bounded_cobyla(interval bounds)
        : bounds_(bounds)
    { }
    void operator()(const taskvec::lorahub_problem& problem, const taskvec::lorahub_objective& objective) const
    {
        auto narrowed = problem;
        narrowed.lower = bounds_.lower;
        narrowed.upper = bounds_.upper;
        taskvec::cobyla{}(narrowed, objective);
    }

private:
    interval bounds_;
};

/// "math=0.83 code=0.412", to read; the table and the report have all digits.
std::string weights_text(const std::vector<std::string>& names, const std::vector<double>& weights)
{
    std::string text;
    for (std::size_t t = 0; t < names.size(); ++t) {
        char number[32];
        std::snprintf(number, sizeof number, "%.4g", weights[t]);
        text += (t ? " " : "") + tool::printable(names[t]) + "=" + number;
    }
    return text;
}

class lorahub_run {
public:
    explicit lorahub_run(const lorahub_settings& given)
        : given_(given)
        , bounds_(parse_bounds(given.bounds))
    {
        tool::check_score_settings(given.score);
        tool::check_cpu(given.merge.run);
        tool::check_no_weights(given.merge, "lorahub", "the weights are what it seeks");
        given_.search.bound = std::max(std::abs(bounds_.lower), std::abs(bounds_.upper));
        if (given_.search.evaluations == 0) { throw tool::usage_error("--evaluations is 0; expected at least 1"); }
        if (!(given_.search.alpha >= 0) || !std::isfinite(given_.search.alpha)) {
            throw tool::usage_error(
                taskvec::message("--l1 is ", given_.search.alpha, "; expected a finite number of at least 0"));
        }
        tool::check_usage([&] { taskvec::check_options(given_.search); });
        if (given_.search.evaluations > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
            throw tool::usage_error(
                taskvec::message("--evaluations is ", given_.search.evaluations, "; expected fewer, such as 40"));
        }
        given_.merge.method = "task-arithmetic"; // θ0 + Σ wt·τt
        given_.merge.options = {{"lambda", "1", "--lambda"}};
        for (const auto& task : tool::parse_tasks(given_.merge.tasks)) { names_.push_back(task.name); }
        given_.search.start.assign(names_.size(), std::clamp(0.0, bounds_.lower, bounds_.upper));
    }

    void run()
    {
        const auto& request = given_.merge;
        const auto& method = tool::find_method(request);
        auto table = tool::read_scores(given_.score, names_);
        const tool::merge_inputs inputs(request, method.needs_base);
        tool::claim_outputs(request, given_.score, "", tool::first_model_of(request, inputs));
        tool::runner run(request.run);
        const std::vector<double> start(given_.search.start);
        const auto first = tool::call_of(run.policy(), request, inputs, &start);
        method.examine(first);
        (void)tool::outputs_of(request, inputs);
        if (request.run.dry_run) {
            tool::print("would score up to " + tool::counted(given_.search.evaluations, "candidate") + " by '"
                + tool::printable(given_.score.command.text) + "' (" + tool::counted(table.rows().size(), "score")
                + " kept already)\n" + tool::describe(request, inputs));
            return;
        }
        tool::report_file report(request.run.report);
        tool::write_scores(given_.score, table); // what cannot be written again is known early
        if (!table.rows().empty()) {
            tool::note(request.run,
                tool::counted(table.rows().size(), "score") + " of '" + given_.score.csv
                    + "' will not be asked for again: remove it to score anew");
        }
        std::size_t scored = 0;
        const auto found = search(method, inputs, run, table, scored);
        const auto& best = found.best;
        const double score = given_.score.minimize ? best.loss : -best.loss;
        const auto call = tool::call_of(run.policy(), request, inputs, &best.weights);
        const std::string tried = tool::counted(found.history.size(), "candidate");
        tool::best_merge out(method, call, "Merged by LoraHub, the best of " + tried);
        if (report.wanted()) {
            nlohmann::ordered_json content{{"method", "lorahub"}, {"output", request.out}, {"seconds", run.seconds()},
                {"bytes_read", bytes_.read + out.bytes().read}, {"bytes_written", bytes_.written + out.bytes().written},
                {"evaluations", found.history.size()}, {"scored", scored}, {"l1", given_.search.alpha},
                {"bounds", {bounds_.lower, bounds_.upper}}, {"peak_memory", tool::peak_memory()},
                {"peak_anonymous_memory", run.anonymous_peak()}};
            for (std::size_t t = 0; t < names_.size(); ++t) { content["weights"][names_[t]] = best.weights[t]; }
            content["score"] = score;
            content["objective"] = best.objective;
            report.finish(content);
        }
        tool::conclude("best of " + tried + ": " + weights_text(names_, best.weights)
                + " score=" + taskvec::csv_number(score) + ", merged into '" + tool::printable(request.out) + "'\n",
            report, out);
    }

private:
    /// Asks the command for what the table does not hold. What fails there comes out as it was thrown.
    taskvec::lorahub_result search(const tool::method_entry& method, const tool::merge_inputs& inputs,
        const tool::runner& run, taskvec::sweep_table& table, std::size_t& scored)
    {
        const tool::scratch_directory scratch(tool::scratch_parent(given_.score));
        std::string tasks;
        for (const auto& name : names_) { tasks += (tasks.empty() ? "" : "+") + name; }
        std::exception_ptr failure;
        const auto loss_of = [&](const std::vector<double>& weights) {
            std::vector<std::string> point;
            std::string joined;
            for (const double weight : weights) {
                point.push_back(taskvec::csv_number(weight));
                joined += (joined.empty() ? "" : ",") + point.back();
            }
            if (!table.contains(point)) {
                const auto file = scratch.path() / "candidate.safetensors";
                bytes_ += tool::write_candidate(
                    file, method, tool::call_of(run.policy(), given_.merge, inputs, &weights), scratch.path());
                const double score = tool::run_score_command(given_.score.command,
                    {file, table.describe(point), {"TASKVEC_TASKS=" + tasks, "TASKVEC_WEIGHTS=" + joined}});
                ++scored;
                table.add(point, score);
                tool::write_scores(given_.score, table);
            }
            const auto& rows = table.rows();
            const double score = std::find_if(rows.begin(), rows.end(), [&](const taskvec::sweep_row& row) {
                return row.point == point;
            })->score;
            return given_.score.minimize ? score : -score;
        };
        try {
            return taskvec::lorahub_search(
                given_.search, names_.size(),
                [&](std::span<const double> weights) {
                    try {
                        return loss_of({weights.begin(), weights.end()});
                    }
                    catch (...) {
                        failure = std::current_exception();
                        throw;
                    }
                },
                bounded_cobyla(bounds_));
        }
        catch (const taskvec::lorahub_error&) {
            if (failure) { std::rethrow_exception(failure); }
            throw;
        }
    }

    lorahub_settings given_;
    interval bounds_;
    std::vector<std::string> names_;
    tool::traffic bytes_; ///< of the candidates
};

void run_lorahub(const lorahub_settings& given)
{
    lorahub_run(given).run();
}

#else

void run_lorahub(const lorahub_settings&)
{
    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
        "this build of taskvec seeks no weights: it was built without NLopt (Debian: libnlopt-dev); install it, "
        "configure anew and build again");
}

#endif

const tool::register_verb lorahub_verb(26, "lorahub",
    "Seek the weights of task vectors without gradients, by scores of a command", [](tool::command& verb) {
        const auto given = std::make_shared<lorahub_settings>();
        tool::add_base_option(verb, given->merge, tool::presence::required);
        tool::add_tasks_options(verb, given->merge, "MODEL", "A fine-tuned model; repeat for each");
        tool::add_score_options(verb, given->score);
        verb.count("--evaluations", given->search.evaluations, "N", "Candidates that may be scored (default: 40)");
        verb.number("--l1", given->search.alpha, "X",
            "Factor of the sum of the weights' magnitudes, which counts against a score (default: 0.05)");
        verb.text("--bounds", given->bounds, "LOWER:UPPER", "Where every weight lies; starts at 0 (default: -1.5:1.5)");
        tool::add_table_option(verb, given->score, "weights");
        verb.text("--out", given->merge.out, "PATH", "Where the best merge goes: a file, or a directory",
            tool::presence::required);
        tool::add_scratch_option(verb, given->score);
        tool::add_dtype_option(verb, given->merge.dtype, tool::dtype_of_result);
        tool::add_tensor_options(verb, given->merge, "; others are copied from the base");
        tool::add_overflow_option(verb, given->merge.overflow);
        tool::add_shard_size_option(verb, given->merge.shard_size);
        tool::add_run_options(verb, given->merge.run);
        tool::add_copy_options(verb, given->merge.copies);
        verb.footer("Maximises score - l1 * sum |w| over base + sum w * (task - base), or with --minimize minimises "
                    "score + l1 * sum |w|,\nby NLopt's COBYLA. The command finds the point in TASKVEC_TASKS (names "
                    "joined by +) and TASKVEC_WEIGHTS (joined by commas).\n\nExample:\n  taskvec lorahub "
                    "--base base.safetensors --task math.safetensors --task code.safetensors \\\n"
                    "      --score 'python evaluate.py {}' --csv weights.csv --out best.safetensors");
        verb.action([given] { run_lorahub(*given); });
    });

} // namespace
