// Models whose vocabularies differ.
// SPDX-License-Identifier: Apache-2.0
#include "vocabulary.hpp"

#include "command.hpp"
#include "token_rows.hpp"
#include "words.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/formats/quantised.hpp>

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

namespace tool {

namespace {

/// "3 tokens ('a', 'b', 'c')", with the first few.
std::string token_list(const std::vector<std::string>& texts)
{
    std::string list;
    for (std::size_t i = 0; i < texts.size() && i < 3; ++i) { list += (i ? ", '" : "'") + printable(texts[i]) + "'"; }
    return counted(texts.size(), "token") + " (" + list + (texts.size() > 3 ? " …)" : ")");
}

/// Refuses a tokenizer with more tokens than a tensor of its model has rows.
void check_rows(const fs::path& file, const token_table& tokens, std::string_view name,
    const taskvec::const_tensor_ref& tensor, const std::string& label)
{
    const auto rows = rows_of(name, tensor);
    if (rows >= tokens.size()) { return; }
    const auto& last = *tokens.texts.rbegin();
    refuse_tokenizer(file,
        taskvec::message("has ", counted(tokens.texts.size(), "token"), " and gives token '", printable(*last.second),
            "' the id ", last.first, ", but '", name, "' of ", label, " has ", counted(rows, "row"),
            ": they contradict each other; use the tokenizer of this model, or move this file away: rows are lined up "
            "by index without it"));
}

[[noreturn, gnu::cold]] void refuse_rule(const std::string& at, const std::string& what)
{
    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value, at + ": " + what);
}

} // namespace

void add_vocabulary_option(command& verb, std::string& vocabulary)
{
    verb.word("--vocabulary", vocabulary, {"error", "base", "union", "truncate"}, "WHAT",
        "error, base, union or truncate: embeddings and heads whose rows differ in number; rows are lined up by the "
        "tokens' text where models have a tokenizer.json, otherwise by index (default: error)");
}

vocabulary_policy vocabulary_policy_of(const std::string& word)
{
    return word == "base"    ? vocabulary_policy::base
        : word == "union"    ? vocabulary_policy::all
        : word == "truncate" ? vocabulary_policy::truncate
                             : vocabulary_policy::error;
}

lined_up_vocabulary::lined_up_vocabulary(const std::vector<vocabulary_input>& inputs, vocabulary_policy policy,
    const std::function<bool(std::string_view)>& include, const run_options& run,
    std::shared_ptr<const token_rules> rules)
    : policy_(policy)
    , rules_(std::move(rules))
{
    for (const auto& input : inputs) { models_.push_back(*input.model); }
    const auto [names, rows_differ] = tensors_of_tokens(inputs, include);
    if (rules_ && rules_->says_rows() && names.empty()) {
        refuse_rule(
            rules_->at, inputs.front().label + " has no tensor with a row for each token, such as embed_tokens.weight");
    }
    if (names.empty()) { return; }
    if (policy == vocabulary_policy::error || (inputs.size() == 1 && !rules_)) {
        check_by_index(inputs, names, run);
        return;
    }
    members_.resize(inputs.size());
    for (std::size_t m = 0; m < inputs.size(); ++m) { members_[m].tokenizer = tokenizer_of(inputs[m].path); }
    if (!rows_differ && !rules_ && !files_differ()) {
        check_by_index(inputs, names, run);
        return;
    }
    read_tokenizers(inputs);
    if (rules_) { take_tokens_of_first(inputs, names); }
    plan(inputs, names);
    for (const auto& name : names) { line_up(inputs, name); }
    runs_.clear();
    say(inputs, run);
}

/// What has a row for each token: by its name, or as long as an embedding is in each model.
lined_up_vocabulary::token_tensors lined_up_vocabulary::tensors_of_tokens(
    const std::vector<vocabulary_input>& inputs, const std::function<bool(std::string_view)>& include) const
{
    row_counts embedding(inputs.size());
    for (std::size_t m = 0; m < inputs.size(); ++m) {
        for (const auto& [name, tensor] : models_[m]) {
            if (!embedding[m] && tensor.shape.size() == 2 && has_rows_of_tokens(name)) {
                embedding[m] = rows_of(name, tensor);
            }
        }
    }
    token_tensors found;
    for (const auto& [name, tensor] : models_.front()) {
        const auto shape = by_tokens(name, tensor).shape;
        bool differs = false, fits = !shape.empty(), as_embedding = true;
        for (std::size_t m = 0; m < inputs.size(); ++m) {
            const auto* const mine = models_[m].find(name);
            if (!mine) { continue; }
            const auto own = by_tokens(name, *mine).shape;
            fits = fits && own.size() == shape.size() && std::equal(shape.begin() + 1, shape.end(), own.begin() + 1);
            differs = differs || own != shape;
            as_embedding = as_embedding && embedding[m] && !own.empty() && rows_of(name, *mine) == *embedding[m];
        }
        if (!fits || !(is_of_tokens(name, tensor.shape) || (differs && as_embedding))) { continue; }
        if (policy_ == vocabulary_policy::error) {
            if (include && !include(name)) { continue; }
            if (differs) { refuse_rows(inputs, name); }
        }
        found.differ = found.differ || differs;
        found.names.push_back(name);
    }
    return found;
}

void lined_up_vocabulary::refuse_rows(const std::vector<vocabulary_input>& inputs, const std::string& name) const
{
    const auto& first = *models_.front().find(name);
    for (std::size_t m = 1; m < inputs.size(); ++m) {
        const auto* const mine = models_[m].find(name);
        if (!mine || mine->shape == first.shape) { continue; }
        taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::tensor_shape,
            taskvec::message("tensor '", name, "' has ", grouped(rows_of(name, *mine)), " rows in ", inputs[m].label,
                " and ", grouped(rows_of(name, first)), " in ", inputs.front().label,
                ": their vocabularies differ; --vocabulary base, union or truncate lines the rows up"));
    }
}

/// Whether a model's tokenizer is another than the first one's.
bool lined_up_vocabulary::files_differ() const
{
    const auto& first = members_.front().tokenizer;
    return std::any_of(members_.begin() + 1, members_.end(), [&](const member& one) {
        const auto& its = one.tokenizer;
        return !first.empty() && !its.empty() && first != its && !equal_files(first, its);
    });
}

namespace {

/// What a tokenizer says of tokens; nullptr where there is none, or it cannot be read and says nothing of rows.
std::shared_ptr<const token_table> table_of(const fs::path& tokenizer)
{
    if (tokenizer.empty()) { return nullptr; }
    try {
        return std::make_shared<const token_table>(read_tokens(tokenizer));
    }
    catch (const taskvec::error&) {
        return nullptr;
    }
}

/// The first of the models up to `m` that has the tokenizer of model m, which has one.
std::size_t first_with_tokenizer(const std::vector<fs::path>& files, std::size_t m)
{
    std::size_t same = 0;
    while (same < m && (files[same].empty() || !(files[same] == files[m] || equal_files(files[same], files[m])))) {
        ++same;
    }
    return same;
}

} // namespace

/// What rows that are merged by index are of: a tokenizer whose tokens have no rows is refused, and it is said where
/// one row is that of different tokens.
void lined_up_vocabulary::check_by_index(
    const std::vector<vocabulary_input>& inputs, const std::vector<std::string>& names, const run_options& run) const
{
    std::vector<fs::path> files;
    std::uint64_t fewest = std::numeric_limits<std::uint64_t>::max();
    for (std::size_t m = 0; m < inputs.size(); ++m) {
        files.push_back(tokenizer_of(inputs[m].path));
        for (const auto& name : names) {
            if (const auto* const mine = models_[m].find(name)) { fewest = std::min(fewest, rows_of(name, *mine)); }
        }
    }
    const auto some = std::find_if(files.begin(), files.end(), [](const fs::path& file) { return !file.empty(); });
    const bool one_file = std::all_of(some, files.end(),
        [&](const fs::path& file) { return file.empty() || file == *some || equal_files(file, *some); });
    if (one_file && (some == files.end() || glance_finds_rows(*some, fewest))) { return; }
    std::vector<std::shared_ptr<const token_table>> tables; // equal files have one
    std::map<std::uint32_t, std::pair<const std::string*, std::size_t>> owners; // the first model that has the id
    for (std::size_t m = 0; m < inputs.size(); ++m) {
        const auto same = files[m].empty() ? m : first_with_tokenizer(files, m);
        tables.push_back(same < m ? tables[same] : table_of(files[m]));
        const auto& table = tables.back();
        if (!table) { continue; }
        for (const auto& name : names) {
            if (const auto* const mine = models_[m].find(name)) {
                check_rows(files[m], *table, name, *mine, inputs[m].label);
            }
        }
        if (same < m) { continue; }
        std::map<std::size_t, std::vector<std::string>> others;
        for (const auto& [id, text] : table->texts) {
            const auto& [first, owner] = owners.try_emplace(id, text, m).first->second;
            if (*first != *text) { others[owner].push_back(*text); }
        }
        for (const auto& [owner, texts] : others) {
            const bool one = texts.size() == 1;
            note(run,
                "the tokenizers of " + inputs[m].label + " and " + inputs[owner].label
                    + (one ? " give the id of " : " give the ids of ") + token_list(texts) + " of the former to "
                    + (one ? "another" : "others") + " in the latter: their rows are merged by index; "
                    + (files.front().empty() ? "with a tokenizer.json beside " + inputs.front().label + ", " : "")
                    + "--vocabulary base or union lines them up by text");
        }
    }
}

void lined_up_vocabulary::read_tokenizers(const std::vector<vocabulary_input>& inputs)
{
    if (members_.front().tokenizer.empty()) { return; }
    std::vector<fs::path> files;
    for (std::size_t m = 0; m < inputs.size(); ++m) {
        auto& mine = members_[m];
        files.push_back(mine.tokenizer);
        if (mine.tokenizer.empty()) { continue; }
        const auto same = first_with_tokenizer(files, m);
        mine.tokens = same < m ? members_[same].tokens : read_tokens(mine.tokenizer); // texts stay those of the former
        mine.by_text = true;
        for (const auto& [name, tensor] : models_[m]) {
            if (!is_of_tokens(name, tensor.shape) || tensor.shape.empty() || !models_.front().find(name)) { continue; }
            check_rows(mine.tokenizer, mine.tokens, name, tensor, inputs[m].label);
        }
    }
}

/// Models without a tokenizer have the tokens of the first one, as for mergekit.
void lined_up_vocabulary::take_tokens_of_first(
    const std::vector<vocabulary_input>& inputs, const std::vector<std::string>& names)
{
    const auto& first = members_.front();
    if (!first.by_text) {
        refuse_rule(rules_->at, inputs.front().label + " has no tokenizer.json, which says what its tokens are");
    }
    for (std::size_t m = 1; m < inputs.size(); ++m) {
        auto& mine = members_[m];
        if (mine.by_text) { continue; }
        mine.tokens = first.tokens; // texts stay those of the former
        mine.by_text = true;
        for (const auto& name : names) {
            const auto* const tensor = models_[m].find(name);
            if (!tensor || rows_of(name, *tensor) >= first.tokens.size()) { continue; }
            refuse_rule(rules_->at,
                taskvec::message(inputs[m].label, " has no tokenizer.json, and its '", name, "' has ",
                    counted(rows_of(name, *tensor), "row"), " for the ", counted(first.tokens.size(), "token"), " of ",
                    inputs.front().label, ": copy its tokenizer.json there"));
        }
    }
}

/// What the result's tokens are.
void lined_up_vocabulary::plan(const std::vector<vocabulary_input>& inputs, const std::vector<std::string>& names)
{
    const auto& first = members_.front();
    const bool all = policy_ == vocabulary_policy::all && first.by_text;
    if (all) { add_tokens_of_others(); }
    if (rules_) { add_tokens_of_rules(inputs); }
    for (std::size_t i = 0; i < new_tokens_.size(); ++i) { new_ids_[new_tokens_[i].text] = first.tokens.size() + i; }
    if (all && !new_tokens_.empty()) { check_rows_are_known(inputs, names); }
    if (policy_ == vocabulary_policy::truncate && first.by_text) { cut_behind_common_tokens(inputs); }
}

void lined_up_vocabulary::add_tokens_of_others()
{
    const auto& first = members_.front();
    std::set<std::string_view> known;
    for (std::size_t m = 1; m < members_.size(); ++m) {
        for (const auto& [id, text] : members_[m].tokens.texts) {
            if (!first.tokens.ids.contains(*text) && known.insert(*text).second) { new_tokens_.push_back({*text, m}); }
        }
    }
}

/// Rows behind the first model's are of tokens that a tokenizer names.
void lined_up_vocabulary::check_rows_are_known(
    const std::vector<vocabulary_input>& inputs, const std::vector<std::string>& names) const
{
    for (std::size_t m = 1; m < members_.size(); ++m) {
        if (members_[m].by_text) { continue; }
        for (const auto& name : names) {
            const auto* const mine = models_[m].find(name);
            if (!mine || rows_of(name, *mine) <= rows_of(name, *models_.front().find(name))) { continue; }
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
                taskvec::message("--vocabulary union: '", name, "' of ", inputs[m].label,
                    " has rows that the first model lacks, and no tokenizer.json says of which tokens: give it "
                    "one, or use --vocabulary base"));
        }
    }
}

void lined_up_vocabulary::cut_behind_common_tokens(const std::vector<vocabulary_input>& inputs)
{
    const auto& first = members_.front();
    for (const auto& [id, text] : first.tokens.texts) {
        const bool common = std::all_of(members_.begin(), members_.end(),
            [&, &own = *text](const member& one) { return !one.by_text || one.tokens.ids.contains(own); });
        if (common) { cut_ = std::uint64_t{id} + 1; }
    }
    if (cut_ == 0) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
            "--vocabulary truncate: no token of " + inputs.front().label
                + " is in the tokenizers of all models; expected models of one family");
    }
    if (cut_ == first.tokens.size()) { cut_ = 0; } // all are common: at most padding goes
}

/// Tokens that rules name and the result would lack; sources of rules that are not there are refused.
void lined_up_vocabulary::add_tokens_of_rules(const std::vector<vocabulary_input>& inputs)
{
    const auto& first = members_.front();
    std::set<std::string, std::less<>> known;
    for (const auto& one : new_tokens_) { known.insert(one.text); }
    for (const auto& rule : rules_->tokens) {
        rule_of_[rule.text] = &rule;
        const bool own = rule.from == token_rule::source::model;
        const auto& wanted = own ? rule.text : rule.token;
        if ((own || rule.from == token_rule::source::token) && !members_[rule.model].tokens.ids.contains(wanted)) {
            refuse_rule(rule.at, inputs[rule.model].label + " has no token '" + printable(wanted) + "'");
        }
        if (!first.tokens.ids.contains(rule.text) && known.insert(rule.text).second) {
            new_tokens_.push_back({rule.text});
        }
    }
}

/// Where a rule takes its row from; behind the inputs are zeros.
taskvec::row_run::part lined_up_vocabulary::row_of(const token_rule& rule, std::uint64_t row, const row_counts& rows,
    const std::vector<vocabulary_input>& inputs, const std::string& name) const
{
    if (rule.from == token_rule::source::zero) { return {inputs.size(), row}; }
    if (rule.from == token_rule::source::none) {
        refuse_rule(rule.at,
            "token '" + printable(rule.text) + "' has no 'source', and "
                + (rule.force ? "'force' is true" : "not every model has it"));
    }
    if (!rows[rule.model]) {
        refuse_rule(rule.at, inputs[rule.model].label + " has no '" + name + "', which the row would be taken from");
    }
    if (rule.from != token_rule::source::row) {
        const auto& tokens = members_[rule.model].tokens.ids;
        return {rule.model, tokens.find(rule.from == token_rule::source::model ? rule.text : rule.token)->second};
    }
    if (rule.row >= *rows[rule.model]) {
        refuse_rule(rule.at,
            taskvec::message("token_id is ", rule.row, ", and '", name, "' of ", inputs[rule.model].label, " has ",
                counted(*rows[rule.model], "row")));
    }
    return {rule.model, rule.row};
}

/// The token of a row of the result; nullptr for padding.
const std::string* lined_up_vocabulary::text_in_result(std::uint64_t row) const
{
    const auto& first = members_.front().tokens;
    if (row < first.size()) { return first.text(row); }
    const auto place = static_cast<std::size_t>(row - first.size());
    return place < new_tokens_.size() ? &new_tokens_[place].text : nullptr;
}

std::uint64_t lined_up_vocabulary::rows_of_result(const row_counts& rows) const
{
    if (rules_) { return (tokens_of_result() + rules_->multiple - 1) / rules_->multiple * rules_->multiple; }
    std::uint64_t result = *rows.front();
    for (std::size_t m = 1; m < rows.size(); ++m) {
        if (!rows[m]) { continue; }
        if (policy_ == vocabulary_policy::all && !members_[m].by_text) { result = std::max(result, *rows[m]); }
        if (policy_ == vocabulary_policy::truncate && cut_ == 0) { result = std::min(result, *rows[m]); }
        if (policy_ == vocabulary_policy::truncate && !members_[m].by_text) { result = std::min(result, *rows[m]); }
    }
    if (policy_ == vocabulary_policy::all && !new_tokens_.empty()) {
        result = std::max(result, members_.front().tokens.size() + new_tokens_.size());
    }
    if (policy_ == vocabulary_policy::truncate) {
        if (cut_ > 0) { result = std::min(result, cut_); }
        // Padding may go, tokens of the first model may not.
        else if (members_.front().by_text
            && std::all_of(members_.begin(), members_.end(), [](const member& one) { return one.by_text; })) {
            result = std::max(result, std::min(*rows.front(), members_.front().tokens.size()));
        }
    }
    return result;
}

/// The row of model m that stands for a row of the result.
std::optional<std::uint64_t> lined_up_vocabulary::row_in(std::size_t m, std::uint64_t row, const row_counts& rows) const
{
    if (!rows[m]) { return std::nullopt; }
    const auto& first = members_.front();
    const auto& mine = members_[m];
    const auto by_index = row < *rows[m] ? std::optional(row) : std::nullopt;
    if (!first.by_text) { return by_index; }
    const std::string* const text = text_in_result(row);
    const bool is_new = text && row >= first.tokens.size();
    if (is_new && (m == 0 || !mine.by_text)) { return std::nullopt; } // padding there
    if (!mine.by_text || m == 0) { return by_index; }
    if (!text) { return mine.tokens.text(row) ? std::nullopt : by_index; } // padding
    const auto place = mine.tokens.ids.find(*text);
    return place == mine.tokens.ids.end() ? std::nullopt : std::optional<std::uint64_t>(place->second);
}

namespace {

/// Puts a row of these parts behind runs.
void append_row(
    std::vector<taskvec::row_run>& runs, std::uint64_t row, const std::vector<taskvec::row_run::part>& parts)
{
    bool follows = !runs.empty() && runs.back().parts.size() == parts.size();
    for (std::size_t p = 0; follows && p < parts.size(); ++p) {
        const auto& before = runs.back().parts[p];
        follows = before.tensor == parts[p].tensor && before.row + runs.back().count == parts[p].row;
    }
    if (follows) { ++runs.back().count; }
    else {
        runs.push_back({row, 1, parts});
    }
}

} // namespace

/// What stands for a row of the result where a model lacks it, as rows of models: what a rule says, the base's, or all
/// that there are; behind the inputs are zeros. `own`: the row in each model, none of which is taken where a rule says
/// so.
std::vector<taskvec::row_run::part> lined_up_vocabulary::stand_in(std::uint64_t row, row_counts& own,
    const row_counts& rows, const std::vector<vocabulary_input>& inputs, const std::string& name) const
{
    bool all_have = true;
    for (std::size_t m = 0; m < own.size(); ++m) { all_have = all_have && (own[m] || !rows[m]); }
    const std::string* const text = rules_ ? text_in_result(row) : nullptr;
    const auto rule = text ? rule_of_.find(*text) : rule_of_.end();
    if (rule != rule_of_.end() && (rule->second->force || !all_have)) {
        if (rule->second->force) { std::fill(own.begin(), own.end(), std::nullopt); }
        return {row_of(*rule->second, row, rows, inputs, name)};
    }
    const auto base = rules_ ? rules_->base : std::optional<std::size_t>(0);
    if (base && own[*base]) { return {{*base, *own[*base]}}; }
    std::vector<taskvec::row_run::part> parts;
    for (std::size_t m = 0; m < own.size(); ++m) {
        if (own[m]) { parts.push_back({m, *own[m]}); }
    }
    if (rules_ && parts.empty()) { parts.push_back({own.size(), row}); } // of no model: zeros
    return parts;
}

/// Which rows of which tensor those of the result are, for each model; not those that fill up to a multiple.
std::vector<std::vector<taskvec::row_run>> lined_up_vocabulary::runs_of(
    const std::vector<vocabulary_input>& inputs, const row_counts& rows, const std::string& name) const
{
    std::vector<std::vector<taskvec::row_run>> runs(inputs.size());
    const auto total = rules_ ? tokens_of_result() : rows_of_result(rows);
    row_counts own(inputs.size());
    for (std::uint64_t row = 0; row < total; ++row) {
        for (std::size_t m = 0; m < own.size(); ++m) { own[m] = row_in(m, row, rows); }
        const auto lacking = stand_in(row, own, rows, inputs, name);
        for (std::size_t m = 0; m < own.size(); ++m) {
            if (!rows[m]) { continue; }
            if (own[m]) { append_row(runs[m], row, std::vector<taskvec::row_run::part>{{m, *own[m]}}); }
            else {
                append_row(runs[m], row, lacking);
            }
        }
    }
    return runs;
}

namespace {

/// A tensor of another source, with as many rows.
taskvec::const_tensor_ref with_rows(
    taskvec::extents shape, std::uint64_t rows, taskvec::dtype type, const taskvec::operand_source& source)
{
    shape[0] = static_cast<std::int64_t>(rows);
    return {nullptr, type, std::move(shape), {}, taskvec::memory_space::host, 0, &source};
}

} // namespace

void lined_up_vocabulary::line_up(const std::vector<vocabulary_input>& inputs, const std::string& name)
{
    row_counts rows;
    std::vector<taskvec::const_tensor_ref> tensors;
    for (const auto& input : inputs) {
        const auto* const mine = input.model->find(name);
        rows.push_back(mine ? std::optional(rows_of(name, *mine)) : std::nullopt);
        tensors.push_back(by_tokens(name, mine ? *mine : *inputs.front().model->find(name)));
    }
    auto& runs = runs_[rows];
    if (runs.empty()) { runs = runs_of(inputs, rows, name); }
    std::uint64_t filled = 0; // rows up to a multiple
    if (rules_) { // zeros are behind the inputs
        filled = rows_of_result(rows) - tokens_of_result();
        const auto shape = tensors.front().shape;
        sources_.push_back(std::make_unique<repeated_row>(row_length(shape)));
        tensors.push_back(with_rows(shape, tokens_of_result(), taskvec::dtype::f32, *sources_.back()));
    }
    bool any = false;
    for (std::size_t m = 0; m < inputs.size(); ++m) {
        if (!rows[m]) { continue; }
        const auto& mine = runs[m];
        const bool whole = filled == 0 && mine.size() == 1 && mine[0].parts.size() == 1 && mine[0].parts[0].tensor == m
            && mine[0].parts[0].row == 0;
        if (whole && mine[0].count == *rows[m]) { continue; }
        any = true;
        auto changed = tensors[m];
        if (whole && !changed.source) { changed.shape[0] = static_cast<std::int64_t>(mine[0].count); }
        else {
            const auto stored = taskvec::is_storage(changed.dtype) ? changed.dtype : taskvec::dtype::f32;
            changed = fill_up(select(tensors, mine, stored), filled);
            works_out_ = true;
        }
        replace(m, name, changed);
    }
    if (any) {
        tensors_.push_back(name);
        counts_[name] = rows;
    }
    changed_ = changed_ || any;
}

/// The tensor of these rows of others, stored as `stored`.
taskvec::const_tensor_ref lined_up_vocabulary::select(
    std::vector<taskvec::const_tensor_ref> from, std::vector<taskvec::row_run> runs, taskvec::dtype stored)
{
    auto made = std::make_unique<taskvec::selected_rows>(std::move(from), std::move(runs));
    const auto tensor = made->tensor(stored);
    sources_.push_back(std::move(made));
    return tensor;
}

/// A tensor of the result's tokens, with the mean of their rows so many times behind them.
taskvec::const_tensor_ref lined_up_vocabulary::fill_up(const taskvec::const_tensor_ref& tensor, std::uint64_t filled)
{
    if (filled == 0) { return tensor; }
    const auto tokens = tokens_of_result();
    sources_.push_back(std::make_unique<repeated_row>(row_length(tensor.shape), *tensor.source, tokens));
    const auto mean = with_rows(tensor.shape, filled, sources_.back()->type(), *sources_.back());
    return select({tensor, mean}, {{0, tokens, {{0, 0}}}, {tokens, filled, {{1, 0}}}}, tensor.dtype);
}

/// Puts a tensor that is seen by tokens in the place of a model's.
void lined_up_vocabulary::replace(std::size_t m, const std::string& name, taskvec::const_tensor_ref changed)
{
    if (is_row_of_tokens(name, models_[m].find(name)->shape)) { changed.shape.insert(changed.shape.begin(), 1); }
    taskvec::const_model_ref others;
    for (const auto& [other, tensor] : models_[m]) { others.insert(other, other == name ? changed : tensor); }
    models_[m] = std::move(others);
}

std::vector<std::optional<std::uint64_t>> lined_up_vocabulary::rows_in(const std::string& name, std::size_t m) const
{
    const auto& counts = counts_.at(name);
    std::vector<std::optional<std::uint64_t>> rows;
    const auto total = rows_of_result(counts);
    for (std::uint64_t row = 0; row < total; ++row) { rows.push_back(row_in(m, row, counts)); }
    return rows;
}

void lined_up_vocabulary::say(const std::vector<vocabulary_input>& inputs, const run_options& run) const
{
    if (!changed_) { return; }
    std::string lacking;
    for (std::size_t m = 0; m < inputs.size(); ++m) {
        if (members_[m].tokenizer.empty()) { lacking += (lacking.empty() ? "" : ", ") + inputs[m].label; }
    }
    if (!lacking.empty()) {
        note(run,
            "no tokenizer.json beside " + lacking
                + (rules_                          ? ": the tokens there are taken for those of " + inputs.front().label
                        : members_.front().by_text ? ": rows of the vocabulary are lined up by index there"
                                                   : ": rows of the vocabulary are lined up by index"));
    }
    say_tokens(inputs, run);
    say_rows(inputs.front(), run);
}

/// Whose rows stand for those of the first model's tokens that another lacks.
std::string lined_up_vocabulary::what_stands_in() const
{
    return rules_ && !rules_->base ? "the mean of the models that have them stands for them"
                                   : "rows of the latter stand for them";
}

/// Which tokens models have that others lack.
void lined_up_vocabulary::say_tokens(const std::vector<vocabulary_input>& inputs, const run_options& run) const
{
    const auto& first = members_.front().tokens;
    const auto& label = inputs.front().label;
    const auto lacks = [&](const token_table& tokens, const token_table& others) {
        std::vector<std::string> texts;
        for (const auto& [id, text] : others.texts) {
            if (!tokens.ids.contains(*text) && !rule_of_.contains(*text)) { texts.push_back(*text); }
        }
        return texts;
    };
    for (std::size_t m = 1; m < inputs.size(); ++m) {
        if (!members_[m].by_text) { continue; }
        const auto more = lacks(first, members_[m].tokens), less = lacks(members_[m].tokens, first);
        if (!more.empty()) {
            note(run,
                inputs[m].label + " has " + token_list(more) + " that " + label
                    + " lacks: " + (policy_ == vocabulary_policy::all ? "the result has them" : "left out"));
        }
        if (!less.empty() && cut_ == 0) {
            note(run, inputs[m].label + " lacks " + token_list(less) + " of " + label + ": " + what_stands_in());
        }
    }
    if (cut_ == 0) { return; }
    std::vector<std::string> lost;
    for (const auto& [id, text] : first.texts) {
        if (id >= cut_) { lost.push_back(*text); }
    }
    note(run,
        token_list(lost) + " of " + label + (lost.size() == 1 ? " is" : " are") + " left out: not all models have "
            + (lost.size() == 1 ? "it" : "them"));
}

/// How many rows there are that were not, and which tensors do not stay quantised, or of their dtype.
void lined_up_vocabulary::say_rows(const vocabulary_input& first, const run_options& run) const
{
    const auto& name = tensors_.front();
    const auto result = rows_of(name, *models_.front().find(name)), before = rows_of(name, *first.model->find(name));
    if (result != before) {
        note(run,
            taskvec::message("the vocabulary of the result has ", grouped(result), " rows, that of ", first.label,
                " has ", grouped(before)));
    }
    for (const auto& one : tensors_) {
        const auto& stored = *first.model->find(one);
        const auto* const layer = dynamic_cast<const taskvec::quantised_tensor*>(stored.source);
        const auto& made = *models_.front().find(one);
        if ((!layer || made.source == stored.source)
            && (taskvec::is_storage(stored.dtype) || made.dtype == stored.dtype)) {
            continue;
        }
        note(run,
            taskvec::message("'", one, "' of ", first.label, " does not stay ",
                layer ? taskvec::to_string(layer->layer().scheme) : taskvec::to_string(stored.dtype),
                ": its rows are lined up, and it is written as numbers"));
    }
}

} // namespace tool
