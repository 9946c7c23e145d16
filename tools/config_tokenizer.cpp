// The tokenizer that a configuration gives the result, and its chat template.
// SPDX-License-Identifier: Apache-2.0
#include "config_tokenizer.hpp"

#include "chat_templates.hpp"
#include "tokenizers.hpp"
#include "vocabulary.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace tool::configuration {

namespace {

/// What lies beside a model that says what its tokens are, and cannot be read here; empty where nothing does.
std::string slow_tokenizer_of(const fs::path& model)
{
    std::error_code ignored;
    const auto folder = fs::is_directory(model, ignored) ? model : model.parent_path();
    for (const char* name : slow_tokenizer_names) {
        if (fs::is_regular_file(folder / name, ignored)) { return name; }
    }
    return "";
}

class tokenizer_reader {
public:
    tokenizer_reader(reading& it, const mapping& top)
        : it_(it)
        , where_(it.where)
        , top_(top)
        , slices_(it.slices)
        , request_(it.request())
        , reference_(request_.base.empty() ? slices_.front().inputs.front().path : request_.base)
    { }

    /// Whose vocabulary the result has, where models differ in it, and what becomes of rows of single tokens.
    void read()
    {
        std::shared_ptr<token_rules> rules;
        const auto one = find_source(rules);
        if (!one) { return; }
        std::optional<input> source;
        if (!one->value.IsScalar() || (one->value.Scalar() != "base" && one->value.Scalar() != "union")) {
            source.emplace(it_.names.find(one->value));
        }
        if (!it_.models_are_there()) { return; } // looked at when all of them are
        check_files_of(*one);
        if (request_.vocabulary != "error") {
            where_.fail(one->key, "'" + one->name + "' is given, and --vocabulary as well; expected one of them");
        }
        const auto word = source ? source->name : one->value.Scalar();
        const auto what = "'" + one->name + ": " + shown(word) + "'";
        const bool same = have_same_tokens(*one, what, source);
        if (it_.sliced()) {
            if (rules->says_rows()) {
                where_.fail(
                    one->key, "'tokens' and 'pad_to_multiple_of' are supported for whole models, and here are slices");
            }
            if (!same) {
                where_.fail(one->key,
                    what + " is supported in slices where all models have the same tokenizer.json, and these differ");
            }
        }
        if (rules->at.empty()) { rules->at = where_.of(one->key) + ": " + what; }
        std::error_code ignored;
        const bool the_first = word == "base" || (source && fs::equivalent(source->path, reference_, ignored));
        if (!same && source && !the_first) {
            where_.fail(one->value,
                what + ": the models' vocabularies differ; expected base, which is '" + reference_
                    + "' here, or union");
        }
        if (same && source && rules->tokens.empty()) { take_tokenizer(*source); }
        request_.vocabulary = the_first || same ? "base" : "union";
        request_.rows_of_tokens = std::move(rules);
        for (auto& [text, model] : request_.adapters) { // the adapter's model has rows of its own
            if (model.empty()) { model = request_.base; }
        }
    }

private:
    /// `tokenizer_source`, or the `source` of `tokenizer`, whose rules are read.
    std::optional<mapping::entry> find_source(std::shared_ptr<token_rules>& rules)
    {
        auto one = top_.find("tokenizer_source");
        const auto block = top_.find("tokenizer");
        if (!block) {
            if (one) { rules = plain_rules(); }
            return one;
        }
        if (one) { where_.fail(block->key, "'tokenizer' and 'tokenizer_source' are both given"); }
        const mapping parts(where_, block->value, "'tokenizer'", {"source", "tokens", "pad_to_multiple_of"});
        rules = read_rules(parts);
        if (const auto source = parts.find("source")) { return source; }
        return mapping::entry{"source", block->key, YAML::Node("union")};
    }

    /// Whether all models have the same tokens; those of a model without a tokenizer are the first one's, as there.
    /// Throws invalid_argument where a tokenizer cannot be read.
    [[nodiscard]] bool have_same_tokens(
        const mapping::entry& one, const std::string& what, const std::optional<input>& source) const
    {
        const auto refuse = [&](const input* model, const std::string& its) {
            const auto label = "'" + (model ? model->name : reference_) + "'";
            where_.fail(one.key,
                what + ": " + label + " has no tokenizer.json, by which tokens are told apart"
                    + (its.empty() ? "" : ", and its '" + its + "' is not read")
                    + ": copy one there (of the model that it was trained from, if no tokens were added), or leave '"
                    + (top_.find("tokenizer") ? "tokenizer" : "tokenizer_source")
                    + "' out, and rows are merged by their numbers");
        };
        const auto first = tokenizer_of(reference_);
        if (first.empty()) { refuse(nullptr, slow_tokenizer_of(reference_)); }
        std::optional<decltype(token_table::ids)> ids;
        bool same = true;
        std::set<std::string> seen{reference_};
        const auto look = [&](const input& model, bool is_source) {
            if (!seen.insert(model.path).second) { return; }
            const auto its = tokenizer_of(model.path);
            if (its.empty()) {
                const auto slow = slow_tokenizer_of(model.path);
                if (is_source || !slow.empty()) { refuse(&model, slow); }
                return;
            }
            if (!same || equal_files(its, first)) { return; } // settings may differ where tokens do not
            if (!ids) { ids = read_tokens(first).ids; }
            same = read_tokens(its).ids == *ids;
        };
        if (source) { look(*source, true); }
        for (const auto& part : slices_) {
            for (const auto& model : part.inputs) { look(model, false); }
            if (part.base) { look(*part.base, false); }
        }
        return same;
    }

    /// A base that is not merged gives the result its tokenizer, and no rows: refuses what would make others of them.
    void check_files_of(const mapping::entry& one) const
    {
        if (!it_.files_of) { return; }
        const auto& base = *it_.files_of;
        const auto refuse = [&](const std::string& why) {
            where_.fail(one.key,
                "the result has the tokenizer of the base_model '" + base.name
                    + "', which is not among the sources of the slices, and " + why
                    + "; leave base_model out, and the first source's is taken");
        };
        if (const auto block = top_.find("tokenizer");
            block && mapping(where_, block->value, "'tokenizer'").find("tokens")) {
            refuse("'tokens' may add some to it");
        }
        const auto tokens_of = [](const fs::path& model) -> std::optional<decltype(token_table::ids)> {
            std::error_code ignored;
            const auto file = model / "tokenizer.json";
            return fs::is_regular_file(file, ignored) ? std::optional(read_tokens(file).ids) : std::nullopt;
        };
        const auto tokens = tokens_of(base.path);
        std::set<std::string> seen;
        for (const auto& part : slices_) {
            for (const auto& model : part.inputs) {
                if (!seen.insert(model.path).second) { continue; }
                const auto its = tokens_of(model.path);
                if (!its || its == tokens) { continue; }
                refuse(tokens ? "the tokens of '" + model.name + "' are others" : "it has no tokenizer.json");
            }
        }
    }

    /// The result has the tokenizer of this model, whose tokens are those of all.
    void take_tokenizer(const input& source)
    {
        std::error_code ignored;
        if (it_.copies_are_given || !fs::is_directory(source.path, ignored)) { return; }
        request_.copies.tokenizer_from = source.path;
    }

    /// The models in the order of vocabulary_input: the base of the merge first, where it has one.
    [[nodiscard]] std::optional<std::size_t> place_among_models(const input& model) const
    {
        std::size_t before = 0;
        if (const auto& base = request_.base; !base.empty()) {
            if (model.path == base && model.adapter == request_.base_adapter) { return 0; }
            ++before;
        }
        const auto& inputs = slices_.front().inputs;
        const auto place =
            std::find_if(inputs.begin(), inputs.end(), [&](const input& one) { return one.is_model_of(model); });
        if (place == inputs.end()) { return std::nullopt; }
        return before + static_cast<std::size_t>(place - inputs.begin());
    }

    /// The rules of a result that has a row for each token of its tokenizer, and no others.
    [[nodiscard]] std::shared_ptr<token_rules> plain_rules()
    {
        auto rules = std::make_shared<token_rules>();
        if (!request_.base.empty()) { rules->base = 0; }
        else if (const auto base = top_.find("base_model")) {
            rules->base = place_among_models(it_.names.find(base->value));
        }
        return rules;
    }

    /// `tokens` and `pad_to_multiple_of`.
    std::shared_ptr<token_rules> read_rules(const mapping& parts)
    {
        auto rules = plain_rules();
        if (const auto one = parts.find("pad_to_multiple_of")) {
            constexpr std::uint64_t most = 1 << 20;
            rules->multiple = std::max<std::uint64_t>(1, whole_of(where_, one->value, one->name, most)); // 0: none
            rules->at = where_.of(one->key) + ": 'pad_to_multiple_of'";
        }
        if (const auto one = parts.find("tokens")) {
            const mapping all(where_, one->value, "'tokens'");
            for (const auto& token : all.entries()) { rules->tokens.push_back(read_rule(token)); }
            rules->at = where_.of(one->key) + ": 'tokens'";
        }
        return rules;
    }

    token_rule read_rule(const mapping::entry& token)
    {
        const auto what = "token '" + shown(token.name) + "'";
        if (token.name.empty()) { where_.fail(token.key, "'tokens' has a token without a text"); }
        auto place = rules_read_.find(token.value.Mark().pos);
        if (place == rules_read_.end()) {
            place = rules_read_.emplace(token.value.Mark().pos, read_rule_of(token.value, what)).first;
        }
        auto rule = place->second;
        rule.text = token.name;
        if (rule.at.empty()) { rule.at = where_.of(token.key); }
        return rule;
    }

    /// What is said of a token, at its source where it has one.
    token_rule read_rule_of(const YAML::Node& node, const std::string& what)
    {
        const mapping its(where_, node, what, {"source", "force"});
        token_rule rule;
        if (const auto force = its.find("force")) { rule.force = truth_of(where_, force->value, "force"); }
        if (const auto source = its.find("source")) {
            rule.at = where_.of(source->value);
            read_source(source->value, "the source of " + what, rule);
        }
        return rule;
    }

    /// The `source` of a token: a model, a token of one, or zeros.
    void read_source(const YAML::Node& node, const std::string& what, token_rule& rule)
    {
        using source = token_rule::source;
        const bool kinds = node.IsMap() && sources_read_.at(where_, node, "a source").find("kind");
        if (!kinds) {
            rule.from = source::model;
            rule.model = model_of(node, what);
            return;
        }
        const auto& parts = kinds_read_.at(where_, node, "a source", {"kind", "model", "token", "token_id"});
        const auto kind = *parts.find("kind");
        const auto word = scalar_of(where_, kind.value, "kind");
        if (word != "zero" && word != "model_token") {
            where_.fail(kind.value, "kind is '" + shown(word) + "'" + meant(word, {"zero", "model_token"}));
        }
        if (word == "model_token") {
            read_token_of_model(parts, what, rule);
            return;
        }
        if (parts.entries().size() > 1) { where_.fail(node, what + " is zeros, which have nothing but a kind"); }
        rule.from = source::zero;
    }

    void read_token_of_model(const mapping& parts, const std::string& what, token_rule& rule)
    {
        const auto its = parts.find("model"), token = parts.find("token"), row = parts.find("token_id");
        if (!its) { where_.fail(parts.node(), what + " has no 'model'"); }
        if (token.has_value() == row.has_value()) {
            where_.fail(parts.node(),
                what + " has " + (row ? "both 'token' and 'token_id'" : "neither 'token' nor 'token_id'")
                    + "; expected one of them");
        }
        rule.model = model_of(its->value, what);
        rule.from = token ? token_rule::source::token : token_rule::source::row;
        if (token) { rule.token = scalar_of(where_, token->value, "token"); }
        else {
            constexpr std::uint64_t most = (1 << 28) - 1;
            rule.row = whole_of(where_, row->value, row->name, most);
        }
    }

    /// The place of a model that a token's row is from.
    [[nodiscard]] std::size_t model_of(const YAML::Node& node, const std::string& what)
    {
        if (node.IsScalar() && node.Scalar() == "zero" && !fs::exists("zero")) {
            where_.fail(node, what + " is 'zero', which would be a model; for zeros write {kind: zero}");
        }
        const auto known = places_.find(node.Mark().pos);
        if (known != places_.end()) { return known->second; }
        const auto& found = it_.names.find(node);
        const auto place = place_among_models(found);
        if (!place) {
            where_.fail(node,
                what + " is '" + shown(found.name)
                    + "', which is not merged here; expected one of the models, or the base");
        }
        places_.emplace(node.Mark().pos, *place);
        return *place;
    }

    reading& it_;
    const place& where_;
    const mapping& top_;
    const std::vector<slice>& slices_;
    merge_request& request_;
    const std::string& reference_; ///< the model whose vocabulary comes first
    // What was read, by where it stands: aliases are read once.
    std::map<int, token_rule> rules_read_;
    mappings sources_read_, kinds_read_;
    std::map<int, std::size_t> places_; ///< of models
};

/// The chat template that most models have, of several the one that the first of them has; nothing where none has one.
std::optional<std::string> usual_template(const reading& it)
{
    std::vector<std::pair<std::string, std::size_t>> found; // in the order of the models
    auto paths = it.paths();
    if (it.files_of) { paths.insert(paths.begin(), it.files_of->path); }
    for (const auto& path : paths) {
        const auto own = chat_template_beside(path);
        if (!own) { continue; }
        const auto place =
            std::find_if(found.begin(), found.end(), [&](const auto& other) { return other.first == *own; });
        if (place == found.end()) { found.emplace_back(*own, 1); }
        else {
            ++place->second;
        }
    }
    const auto most = std::max_element(found.begin(), found.end(), [](const auto& a, const auto& b) {
        return a.second < b.second; // the first of the most
    });
    return most == found.end() ? std::nullopt : std::optional(most->first);
}

} // namespace

void read_tokenizer(reading& it, const mapping& top)
{
    tokenizer_reader(it, top).read();
}

void read_chat_template(reading& it, const mapping& top)
{
    const auto one = top.find("chat_template");
    if (!one) { return; }
    const auto text = scalar_of(it.where, one->value, "chat_template");
    auto& result = it.request().copies.chat_template;
    if (text.find('{') != text.npos) { result = text; }
    else if (text == "chatml") {
        result = std::string(chatml_template);
    }
    else if (text != "auto") {
        it.where.fail(one->value,
            "chat_template is '" + shown(text)
                + "'; expected auto (what most of the models have), chatml, or a template itself, a text with {{ … "
                  "}}");
    }
    else {
        const auto usual = usual_template(it);
        if (!it.models_are_there()) { return; } // looked at when all of them are
        if (!usual) {
            it.where.fail(
                one->value, "chat_template: auto, and no model has a chat template; leave it out, or give one");
        }
        result = usual;
    }
}

} // namespace tool::configuration
