// Models whose vocabularies differ: rows of embeddings and heads lined up, and the tokenizer that fits the result.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"
#include "tokenizers.hpp"

#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/selected_rows.hpp>

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

class command;

/// Whose rows a result has where vocabularies differ.
enum class vocabulary_policy : std::uint8_t {
    error, ///< they may not differ
    base, ///< those of the first model
    all, ///< those of the first model, and behind them what others have more (--vocabulary union)
    truncate ///< those of the first model, up to the last token that all have
};
/// Adds --vocabulary.
void add_vocabulary_option(command& verb, std::string& vocabulary);
[[nodiscard]] vocabulary_policy vocabulary_policy_of(const std::string& word);

/// Where the row of a token is from, for models that lack it, or for all.
struct token_rule {
    enum class source : std::uint8_t {
        none, ///< all models have the token
        zero,
        model, ///< the token's own row in a model
        token, ///< another token's row there
        row ///< a row there by its index
    };
    std::string text; ///< the token; the result's tokenizer gets it where it lacks it
    source from = source::none;
    std::size_t model = 0; ///< among the inputs
    std::string token{}; ///< of source::token
    std::uint64_t row = 0; ///< of source::row
    bool force = false; ///< for models that have the token too
    std::string at{}; ///< where it is said, for errors
};
/// What a configuration that names a tokenizer says of the rows of tokens. The result has as many as its tokenizer has
/// tokens.
struct token_rules {
    std::vector<token_rule> tokens{};
    std::uint64_t multiple = 1; ///< of which the number of rows is one: what is added is the mean of the tokens' rows
    std::optional<std::size_t> base{}; ///< the input whose row stands for that which another lacks; nothing: the mean
    std::string at{}; ///< where it is said, for errors

    /// Whether it says more than that rows are those of tokens.
    [[nodiscard]] bool says_rows() const { return !tokens.empty() || multiple > 1; }
};

/// A model whose rows are to be lined up.
struct vocabulary_input {
    fs::path path; ///< beside whose weights a tokenizer may lie
    std::string label;
    const taskvec::const_model_ref* model = nullptr;
};

/// Models lined up with the first one (the base, or the first task): the one place that knows what rows a policy takes.
///
/// Tokens are told apart by their text where a model and the first one have a tokenizer.json, otherwise by their index.
/// A row that a model lacks is the first one's; where that lacks it too, the mean of those that have it, as for
/// mergekit: a merge then leaves the row of a token that one model has as it is there.
///
/// Never moves: models() may refer to it. Throws shape_mismatch where rows differ and the policy is `error`,
/// format_error where a tokenizer has more tokens than an embedding has rows, under any policy, invalid_argument where
/// nothing is common. Where rows are merged by index it is noted which of them are of different tokens.
class lined_up_vocabulary {
public:
    /// `include`: which tensors count for the policy `error`; empty: all. `rules`: for the policies `base` and `all`,
    /// and the first input has a tokenizer.json then, which stands for that of inputs without one; throws
    /// invalid_argument, with the place, for what no model has.
    lined_up_vocabulary(const std::vector<vocabulary_input>& inputs, vocabulary_policy policy,
        const std::function<bool(std::string_view)>& include, const run_options& run,
        std::shared_ptr<const token_rules> rules = {});
    lined_up_vocabulary(const lined_up_vocabulary&) = delete;
    lined_up_vocabulary& operator=(const lined_up_vocabulary&) = delete;

    /// The models in the order of the inputs.
    [[nodiscard]] const std::vector<taskvec::const_model_ref>& models() const { return models_; }
    /// Whether rows were lined up: some model, or the result, has others than before.
    [[nodiscard]] bool changed() const { return changed_; }
    /// Whether rows of some model were put together anew, and not only the last ones left out.
    [[nodiscard]] bool works_out_rows() const { return works_out_; }
    /// Names of tensors whose rows were lined up.
    [[nodiscard]] const std::vector<std::string>& tensors() const { return tensors_; }

    /// For each row of the result's tensor of this name, which row of input m it is; nothing where that has none.
    /// `name` is one of tensors(), and input m has it.
    [[nodiscard]] std::vector<std::optional<std::uint64_t>> rows_in(const std::string& name, std::size_t m) const;

    /// The tokenizer files of the first model's directory that differ for the result, by name: new contents, or nothing
    /// where a file cannot be kept. Empty where the tokenizer stays.
    [[nodiscard]] std::map<std::string, std::optional<std::string>> tokenizer_files(const run_options& run) const;
    /// Takes what names tokens that are no more (`pad_token_id` and its like) out of a configuration; returns their
    /// keys.
    [[nodiscard]] std::vector<std::string> drop_lost_ids(std::string& config) const;

private:
    struct member {
        fs::path tokenizer; ///< empty: none
        token_table tokens;
        bool by_text = false; ///< against the first one
    };
    struct new_token {
        std::string text;
        std::optional<std::size_t> from{}; ///< nothing: a rule's
    };
    using row_counts = std::vector<std::optional<std::uint64_t>>;

    /// Tensors of the first model with a row for each token, and whether rows differ in some model.
    struct token_tensors {
        std::vector<std::string> names{};
        bool differ = false;
    };

    [[nodiscard]] token_tensors tensors_of_tokens(
        const std::vector<vocabulary_input>& inputs, const std::function<bool(std::string_view)>& include) const;
    void refuse_rows(const std::vector<vocabulary_input>& inputs, const std::string& name) const;
    [[nodiscard]] bool files_differ() const;
    void check_by_index(const std::vector<vocabulary_input>& inputs, const std::vector<std::string>& names,
        const run_options& run) const;
    void read_tokenizers(const std::vector<vocabulary_input>& inputs);
    void plan(const std::vector<vocabulary_input>& inputs, const std::vector<std::string>& names);
    void add_tokens_of_others();
    void add_tokens_of_rules(const std::vector<vocabulary_input>& inputs);
    void check_rows_are_known(const std::vector<vocabulary_input>& inputs, const std::vector<std::string>& names) const;
    void cut_behind_common_tokens(const std::vector<vocabulary_input>& inputs);
    [[nodiscard]] std::uint64_t rows_of_result(const row_counts& rows) const;
    [[nodiscard]] std::optional<std::uint64_t> row_in(std::size_t m, std::uint64_t row, const row_counts& rows) const;
    [[nodiscard]] taskvec::row_run::part row_of(const token_rule& rule, std::uint64_t row, const row_counts& rows,
        const std::vector<vocabulary_input>& inputs, const std::string& name) const;
    [[nodiscard]] std::uint64_t tokens_of_result() const { return members_.front().tokens.size() + new_tokens_.size(); }
    [[nodiscard]] const std::string* text_in_result(std::uint64_t row) const;
    /// How a new token stands in a tokenizer, where it is an added token there; nothing for one of the vocabulary.
    [[nodiscard]] std::optional<added_token> description(const new_token& token) const;
    [[nodiscard]] std::vector<taskvec::row_run::part> stand_in(std::uint64_t row, row_counts& own,
        const row_counts& rows, const std::vector<vocabulary_input>& inputs, const std::string& name) const;
    [[nodiscard]] std::vector<std::vector<taskvec::row_run>> runs_of(
        const std::vector<vocabulary_input>& inputs, const row_counts& rows, const std::string& name) const;
    void line_up(const std::vector<vocabulary_input>& inputs, const std::string& name);
    [[nodiscard]] taskvec::const_tensor_ref select(
        std::vector<taskvec::const_tensor_ref> from, std::vector<taskvec::row_run> runs, taskvec::dtype stored);
    [[nodiscard]] taskvec::const_tensor_ref fill_up(const taskvec::const_tensor_ref& tensor, std::uint64_t filled);
    void replace(std::size_t m, const std::string& name, taskvec::const_tensor_ref changed);
    bool add_tokens(nlohmann::json& tokenizer, std::map<std::string, std::uint64_t>& added) const;
    void add_to_vocabulary(
        nlohmann::json& vocabulary, const new_token& token, std::uint64_t id, std::optional<double>& least) const;
    void add_merges(nlohmann::json& model, const std::set<std::size_t>& donors,
        const std::map<std::string, std::uint64_t>& added) const;
    bool keep_ids(nlohmann::json& tokenizer) const;
    bool remove_tokens(nlohmann::json& tokenizer, std::map<std::string, std::uint64_t>& lost) const;
    void say(const std::vector<vocabulary_input>& inputs, const run_options& run) const;
    [[nodiscard]] std::string what_stands_in() const;
    void take_tokens_of_first(const std::vector<vocabulary_input>& inputs, const std::vector<std::string>& names);
    void say_tokens(const std::vector<vocabulary_input>& inputs, const run_options& run) const;
    void say_rows(const vocabulary_input& first, const run_options& run) const;

    vocabulary_policy policy_;
    std::vector<member> members_;
    std::vector<taskvec::const_model_ref> models_;
    std::shared_ptr<const token_rules> rules_; ///< may be none
    std::map<std::string_view, const token_rule*> rule_of_; ///< by the text of the token
    std::vector<std::unique_ptr<taskvec::operand_source>> sources_;
    std::vector<std::string> tensors_;
    std::vector<new_token> new_tokens_; ///< `all`: behind the first one's, in this order
    std::map<std::string_view, std::uint64_t> new_ids_;
    std::uint64_t cut_ = 0; ///< `truncate`: tokens from here on are left out; 0: none
    bool changed_ = false, works_out_ = false;
    std::map<row_counts, std::vector<std::vector<taskvec::row_run>>> runs_; ///< by rows, for each model
    std::map<std::string, row_counts> counts_; ///< of tensors_, before
};

} // namespace tool
