// taskvec merge-lora: several adapters as one.
// SPDX-License-Identifier: Apache-2.0
#include "align_adapters.hpp"
#include "decompose.hpp"
#include "methods.hpp"
#include "runner.hpp"
#include "tokenizers.hpp"
#include "vocabulary.hpp"
#include "words.hpp"

#include <taskvec/adapters/merge_as_peft.hpp>
#include <taskvec/adapters/merge_ties.hpp>
#include <taskvec/adapters/phi_space.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>

namespace {

struct merge_lora_settings : tool::alignment_settings {
    std::string method = "linear", space = "product";
    std::vector<std::string> adapters;
    tool::rank_settings rank;
    tool::option_values options; ///< of the method: lambda, density and what else TIES is told
    std::string majority_sign = "total";
    bool randomized = false;
    std::uint64_t seed = 0;

    [[nodiscard]] const tool::option_value* option(const std::string& name) const
    {
        const auto place = std::find_if(
            options.rbegin(), options.rend(), [&](const tool::option_value& one) { return one.name == name; });
        return place == options.rend() ? nullptr : &*place;
    }
    [[nodiscard]] bool semantics_of_peft() const
    {
        const auto* const given = option("semantics");
        return given && given->text == "peft";
    }
    /// PEFT's combination type; nothing for the library's own methods. With a rank PEFT's linear and ties are those of
    /// the updates, which the library's are too.
    [[nodiscard]] std::optional<taskvec::peft_combination> combination() const
    {
        if (in_phi() || !semantics_of_peft() || (rank.given() && (method == "linear" || method == "ties"))) {
            return {};
        }
        for (const auto& word : taskvec::enum_words<taskvec::peft_combination>::words) {
            if (word.word == method) { return word.value; }
        }
        return {};
    }

    [[nodiscard]] double lambda() const
    {
        taskvec::linear_merge_options linear;
        tool::apply_options(linear, options);
        return linear.lambda;
    }
    [[nodiscard]] taskvec::ties_options ties(std::vector<double> weights) const
    {
        taskvec::ties_options ties;
        tool::apply_options(ties, options);
        ties.weights = std::move(weights);
        return ties;
    }
};

/// A merge that keeps every layer's rank: layers without errors to report.
template <class T>
nlohmann::ordered_json ranks_of(const taskvec::lora_adapter<T>& adapter)
{
    auto list = nlohmann::ordered_json::array();
    for (const auto& [name, update] : adapter) {
        list.push_back({{"name", name}, {"shape", {update.out(), update.in()}}, {"rank_before", update.rank()},
            {"rank", update.rank()}});
    }
    return list;
}

template <class T>
taskvec::lora_adapter<T> merge_phi(
    const taskvec::cpu& policy, const merge_lora_settings& given, const tool::aligned_adapters<T>& from)
{
    taskvec::model_options how;
    how.base_label = "the initialisation '" + given.init + "'";
    for (const auto& text : given.adapters) {
        how.labels.push_back(tool::in_quotes(tool::parse_task(text, "--adapter").path));
    }
    const auto merged = [&](const auto& options) {
        return taskvec::merge_in_phi_space<T>(policy, options, from.initial, from.updates, how);
    };
    if (given.method == "ties") { return merged(given.ties(from.weights)); }
    if (given.method == "average") { return merged(taskvec::average_options{from.weights}); }
    return merged(taskvec::task_arithmetic_options{.lambda = given.lambda(), .weights = from.weights});
}

template <class T>
void merge_as(const merge_lora_settings& given, const std::vector<tool::task_argument>& arguments)
{
    auto from = tool::align_adapters<T>(given, arguments);
    const tool::runner run(given.run);
    std::vector<std::string> read;
    if (given.in_phi()) { read.push_back(given.init); }
    for (const auto& argument : arguments) { read.push_back(argument.path.string()); }
    auto report = tool::open_report(given, read);
    auto adapter = std::move(from.merged);
    nlohmann::ordered_json content{{"method", given.method}, {"space", given.space}};
    for (const auto& argument : arguments) {
        content["adapters"].push_back({{"path", argument.path.string()}, {"weight", argument.weight}});
    }
    std::string summary =
        tool::counted(arguments.size(), "adapter") + " by " + given.method + (given.in_phi() ? " in phi space" : "");

    if (given.vocabulary != "error") { content["vocabulary"] = given.vocabulary; }
    const auto combination = given.combination();
    using way = tool::decompose::way;
    const tool::decompose decompose{given.run.dry_run ? way::not_at_all
            : given.randomized                        ? way::randomized
                                                      : way::exactly,
        given.seed};
    if (combination) {
        auto result = taskvec::merge_as_peft<T>(run.policy(), from.updates,
            {.combination = *combination,
                .weights = from.weights,
                .lambda = given.lambda(),
                .density = taskvec::prunes(*combination) ? given.ties({}).density : 1,
                .by_frequency = given.majority_sign == "frequency",
                .rank = given.rank.rank.value_or(0),
                .seed = given.seed},
            decompose);
        adapter.updates = std::move(result.adapter);
        content["semantics"] = "peft";
        summary += " as PEFT, " + tool::counted(adapter.updates.size(), "layer");
        if (taskvec::merges_updates(*combination) && arguments.size() > 1) {
            tool::add_result(content, result);
            summary += given.rank.given() ? " at " + given.rank.words(result.layers) : " at the highest rank";
            if (!given.run.dry_run) { summary += ", relative error " + tool::percent(result.relative_error()); }
        }
        else {
            content["layers"] = ranks_of(adapter.updates);
            summary += *combination == taskvec::peft_combination::cat && arguments.size() > 1
                ? " at the sum of the ranks, exact"
                : ", ranks unchanged";
        }
    }
    else if (given.in_phi() || given.method == "average-factors") {
        adapter.updates = given.in_phi() ? merge_phi(run.policy(), given, from)
                                         : taskvec::average_factors_separately<T>(from.updates, from.weights);
        content["layers"] = ranks_of(adapter.updates);
        if (given.in_phi()) { content["init"] = given.init; }
        summary += ", " + tool::counted(adapter.updates.size(), "layer") + ", ranks unchanged";
    }
    else {
        taskvec::adapter_result<T> result;
        if (given.method == "linear") {
            result = taskvec::merge_linear<T>(run.policy(), from.updates,
                {.weights = from.weights,
                    .lambda = given.lambda(),
                    .rank = given.rank.given() ? given.rank.choice() : taskvec::rank_choice::full()});
        }
        else {
            result = taskvec::merge_ties<T>(
                run.policy(), from.updates, {.ties = given.ties(from.weights), .rank = given.rank.choice()}, decompose);
        }
        adapter.updates = std::move(result.adapter);
        tool::add_result(content, result);
        summary += ", " + tool::counted(adapter.updates.size(), "layer")
            + (given.rank.given() ? " at " + given.rank.words(result.layers) : " at the sum of the ranks, exact");
        if (given.rank.given() && !(given.run.dry_run && given.method == "ties")) {
            summary += ", relative error " + tool::percent(result.relative_error());
        }
    }
    if (given.run.dry_run) {
        tool::print("would merge " + summary + " into '" + tool::printable(given.out) + "'\n");
        return;
    }
    std::vector<std::string> without; // a tokenizer of other rows
    for (const auto& file : from.rows_changed ? tool::tokenizer_files_in(given.out) : std::vector<tool::fs::path>()) {
        without.push_back(file.filename().string());
    }
    tool::write_adapter(given, run, report, adapter, std::move(content), from.bytes,
        "merged " + summary + " into '" + tool::printable(given.out) + "'", {}, from.tokenizer, without);
}

/// The methods that have options of their own. Ranks are the verb's, weights come with the adapters.
std::vector<tool::described> method_tables()
{
    std::vector<tool::described> tables{{"linear", taskvec::describe_options<taskvec::linear_merge_options>()},
        {"ties", taskvec::describe_options<taskvec::adapter_ties_options>()}};
    for (auto& table : tables) {
        std::erase_if(table.options, [](const taskvec::option_description& option) {
            return option.per_task || option.name == "rank" || option.name == "energy" || option.name == "clamp"
                || option.name == "sigma";
        });
    }
    return tables;
}

/// What does not go together with PEFT's combination types, and what they need.
void check_combination(const merge_lora_settings& given)
{
    const auto combination = given.combination();
    const bool of_peft = std::any_of(taskvec::enum_words<taskvec::peft_combination>::words.begin(),
                             taskvec::enum_words<taskvec::peft_combination>::words.end(),
                             [&](const auto& word) { return word.word == given.method; })
        && given.method != "linear" && given.method != "ties";
    if (of_peft && !combination) {
        throw tool::usage_error("--method " + given.method + " is a combination type of PEFT"
            + (given.in_phi() ? ", which has no --space phi" : ": say so by --semantics peft"));
    }
    if (given.majority_sign != "total" && !(combination && taskvec::elects_signs(*combination))) {
        throw tool::usage_error(
            "--majority-sign is of PEFT's ties and dare-ties: give --semantics peft, and no --rank with "
            "--method ties (--method ties-svd takes one)");
    }
    if (!combination) { return; }
    if (given.rank.energy || given.rank.clamp) {
        throw tool::usage_error("--energy and --clamp have no meaning with --semantics peft, which knows ranks alone");
    }
    if (given.rank.rank && !taskvec::merges_updates(*combination)) {
        throw tool::usage_error("--rank has no meaning with --method " + given.method
            + " of PEFT, which keeps the ranks; --method " + (given.method == "cat" ? "" : given.method + "-")
            + "svd takes one");
    }
    if (given.rank.rank && *given.rank.rank == 0) { throw tool::usage_error("--rank is 0; expected at least 1"); }
    if (taskvec::prunes(*combination) && !given.option("density")) {
        throw tool::usage_error("--method " + given.method + " of PEFT needs --density, the share of entries kept");
    }
}

void run_merge_lora(const merge_lora_settings& given)
{
    tool::check_cpu(given.run);
    if ((given.space == "phi") != given.in_phi()) {
        throw tool::usage_error(given.space == "phi"
                ? "--space phi needs --init DIR, the initialisation that the adapters share"
                : "--init has no meaning without --space phi");
    }
    if (given.in_phi() && given.method == "average-factors") {
        throw tool::usage_error("--method average-factors has no --space phi; --method average has");
    }
    if (!given.in_phi() && given.method == "average") {
        throw tool::usage_error("--method average needs --space phi; the mean of the updates is --method linear with "
                                "weights that sum to 1, and the mean of A "
                                "and of B, each by itself, is --method average-factors");
    }
    check_combination(given);
    const auto combination = given.combination();
    const bool keeps_ranks = given.in_phi() || given.method == "average-factors";
    if (keeps_ranks && given.rank.given()) {
        throw tool::usage_error("--rank and --energy have no meaning where the factors themselves are merged: the "
                                "ranks stay; truncate the result by peru-lora");
    }
    if (!keeps_ranks && !combination && given.method == "ties") { (void)given.rank.choice(); }
    tool::check_usage([&] {
        taskvec::adapter_ties_options all; // has every row that a method has
        tool::apply_options(all, given.options);
    });
    const auto tables = method_tables();
    const auto table = std::find_if(
        tables.begin(), tables.end(), [&](const tool::described& one) { return one.name == given.method; });
    for (const auto& value : given.options) {
        if (given.semantics_of_peft() && !given.in_phi() && value.name == "semantics"
            && (combination || given.method == "linear")) {
            continue;
        }
        if (combination) {
            if (value.name != "lambda" && !(value.name == "density" && taskvec::prunes(*combination))) {
                tool::note(given.run, value.flag + " has no effect on --method " + given.method + " of PEFT");
            }
            continue;
        }
        if (table == tables.end()
            || std::none_of(table->options.begin(), table->options.end(),
                [&](const auto& option) { return option.name == value.name; })) {
            tool::note(given.run, value.flag + " has no effect on --method " + given.method);
        }
    }

    std::vector<tool::task_argument> arguments;
    bool wide = given.in_phi() && tool::adapter_is_wide(given.init);
    for (const auto& text : given.adapters) {
        arguments.push_back(tool::parse_task(text, "--adapter"));
        wide = wide || tool::adapter_is_wide(arguments.back().path);
    }
    tool::note_zero_weights(given.run, arguments, "adapter");
    tool::note_zero_lambda(given.run, given.options);
    tool::in_precision(wide, [&]<class T>(std::type_identity<T>) { merge_as<T>(given, arguments); });
}

const tool::register_verb merge_lora_verb(80, "merge-lora",
    "Merge LoRA adapters, of different ranks and targets too, into one adapter", [](tool::command& verb) {
        const auto given = std::make_shared<merge_lora_settings>();
        verb.word("--method", given->method,
            {"linear", "ties", "average", "average-factors", "cat", "svd", "ties-svd", "dare-linear", "dare-linear-svd",
                "dare-ties", "dare-ties-svd", "magnitude-prune", "magnitude-prune-svd"},
            "METHOD", "How to merge; see below (default: linear)");
        verb.texts("--adapter", given->adapters, "DIR[=W]",
            "An adapter, with its weight (default 1); repeat, order counts", tool::presence::required);
        verb.text(
            "--out", given->out, "DIR", "Where the merged adapter goes, a PEFT directory", tool::presence::required);
        verb.word("--space", given->space, {"product", "phi"}, "SPACE",
            "product or phi: merge the updates, or the adapters' own parameters around the initialisation that they "
            "share (default: product)");
        verb.text("--init", given->init, "DIR", "The initialisation of --space phi, a PEFT directory");
        tool::add_rank_options(verb, given->rank);
        tool::add_described_options(verb, {}, method_tables(), given->options);
        verb.word("--majority-sign", given->majority_sign, {"total", "frequency"}, "HOW",
            "total or frequency: PEFT's ties and dare-ties elect the sign of the sum, or of most entries (default: "
            "total)");
        verb.flag("--randomized", given->randomized,
            "ties, and PEFT's types with svd: randomized SVD of the merged layers, nearly the best; with --energy a "
            "hundred times faster for large ones");
        verb.count("--seed", given->seed, "N", "Of --randomized, and of PEFT's DARE (default: 0)");
        verb.flag("--any-base", given->any_base, "Merge although the adapters name different base models");
        verb.flag("--match-prefixes", given->match_prefixes,
            "Line modules up where their names differ by what stands before them (model., _orig_mod., …)");
        verb.flag("--disjoint", given->disjoint,
            "Merge adapters that share no module, being of different parts of a model: the result has the modules of "
            "all");
        tool::add_modules_to_save(verb, *given);
        tool::add_vocabulary_option(verb, given->vocabulary);
        tool::add_adapter_options(verb, *given, "the adapters'");
        verb.footer("Methods:\n"
                    "  linear           sum of weight times update; exact, of the sum of the ranks, unless --rank "
                    "or --energy compress it.\n"
                    "                   Negative weights subtract. In phi space: the initialisation plus lambda "
                    "times the sum of weight times change\n"
                    "  ties             trim to the top --density (0.2), elect signs, merge what agrees. Needs "
                    "--rank or --energy, but in phi space\n"
                    "  average          in phi space only: the weighted mean of the parameters\n"
                    "  average-factors  the weighted mean of A and of B, each by itself. Not the mean of the "
                    "updates: it has cross terms\n"
                    "With --semantics peft, the combination types of PEFT's add_weighted_adapter:\n"
                    "  linear, ties, dare-linear, dare-ties, magnitude-prune\n"
                    "                   of the factors, A and B each by itself; adapters of one rank, which stays\n"
                    "  cat              the exact sum, of the sum of the ranks\n"
                    "  svd, and the others with -svd\n"
                    "                   of the updates, at --rank (default: the highest of the adapters)\n"
                    "  All but linear, cat and svd need --density. linear and ties with --rank are svd and ties-svd\n"
                    "\nExample:\n  taskvec merge-lora --method linear --adapter math-lora=0.5 --adapter "
                    "code-lora=0.5 --rank 16 --out both-lora\n"
                    "  taskvec merge-lora --space phi --init llora-init --adapter math-llora --adapter code-llora "
                    "--lambda 0.5 --out both-llora");
        verb.action([given] { run_merge_lora(*given); });
    });

} // namespace
