// The tokenizer that a configuration gives the result, and its chat template.
// SPDX-License-Identifier: Apache-2.0
#include "config_tokenizer.hpp"

#include "chat_templates.hpp"
#include "tokenizers.hpp"
#include "vocabulary.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
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

/// The tokenizer.json of a model's directory; nothing where it has none.
std::optional<std::string> tokenizer_text_of(const std::string& model)
{
    std::ifstream file(fs::path(model) / "tokenizer.json", std::ios::binary);
    if (!file) { return std::nullopt; }
    return std::string(std::istreambuf_iterator<char>(file), {});
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
        std::shared_ptr<const token_rules> rules;
        const auto one = find_source(rules);
        if (!one) { return; }
        std::optional<input> source;
        if (!one->value.IsScalar() || (one->value.Scalar() != "base" && one->value.Scalar() != "union")) {
            source.emplace(it_.names.find(one->value));
        }
        if (!it_.models_are_there()) { return; } // looked at when all of them are
        if (request_.vocabulary != "error") {
            where_.fail(one->key, "'" + one->name + "' is given, and --vocabulary as well; expected one of them");
        }
        const auto tokens = compare(source);
        if (tokens.same && !rules) {
            request_.vocabulary = "base"; // rows that pad may differ
            if (source) { take_tokenizer(*source); }
            return;
        }
        const auto word = source ? source->name : one->value.Scalar();
        const auto what = "'" + one->name + ": " + shown(word) + "'";
        if (!tokens.all_have) {
            where_.fail(one->key, what + ": tokens are told apart by tokenizer.json, and not every model has one");
        }
        if (it_.sliced()) {
            where_.fail(one->key,
                rules
                    ? "'tokens' and 'pad_to_multiple_of' are supported for whole models, and here are slices"
                    : what + " is supported in slices where all models have the same tokenizer.json, and these differ");
        }
        std::error_code ignored;
        const bool the_first = word == "base" || (source && fs::equivalent(source->path, reference_, ignored));
        if (!tokens.same) { check_first(*one, what, source && !the_first, rules.get()); }
        request_.vocabulary = the_first || tokens.same ? "base" : "union";
        request_.rows_of_tokens = std::move(rules);
    }

private:
    /// `tokenizer_source`, or the `source` of `tokenizer`, whose rules are read.
    std::optional<mapping::entry> find_source(std::shared_ptr<const token_rules>& rules)
    {
        auto one = top_.find("tokenizer_source");
        const auto block = top_.find("tokenizer");
        if (!block) { return one; }
        if (one) { where_.fail(block->key, "'tokenizer' and 'tokenizer_source' are both given"); }
        const mapping parts(where_, block->value, "'tokenizer'", {"source", "tokens", "pad_to_multiple_of"});
        rules = read_rules(parts);
        if (const auto source = parts.find("source")) { return source; }
        return mapping::entry{"source", block->key, YAML::Node("union")};
    }

    /// Whether all models have a tokenizer.json, and the same tokens in it.
    struct comparison {
        bool same = false, all_have = false;
    };
    [[nodiscard]] comparison compare(const std::optional<input>& source) const
    {
        const auto first = tokenizer_text_of(reference_);
        comparison tokens{first.has_value(), first.has_value()};
        std::optional<decltype(token_table::ids)> ids;
        std::set<std::string> seen;
        const auto look = [&](const input& model) {
            if (!seen.insert(model.path).second) { return; }
            const auto its = tokenizer_text_of(model.path);
            tokens.all_have = tokens.all_have && its.has_value();
            tokens.same = tokens.same && its.has_value();
            if (!tokens.same || its == first) { return; } // settings may differ where tokens do not
            if (!ids) { ids = read_tokens(fs::path(reference_) / "tokenizer.json").ids; }
            tokens.same = read_tokens(fs::path(model.path) / "tokenizer.json").ids == *ids;
        };
        for (const auto& part : slices_) {
            for (const auto& model : part.inputs) { look(model); }
            if (part.base) { look(*part.base); }
        }
        if (source) { look(*source); }
        return tokens;
    }

    /// Vocabularies that differ begin with that of the first model.
    void check_first(
        const mapping::entry& one, const std::string& what, bool of_another, const token_rules* rules) const
    {
        if (of_another) {
            where_.fail(one.value,
                what + ": the models' vocabularies differ; expected base, which is '" + reference_
                    + "' here, or union");
        }
        if (rules && rules->base.value_or(0) != 0) {
            where_.fail(top_.find("base_model")->value,
                "the vocabulary begins with that of the first model, and the base is another: put it first among the "
                "models");
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

    /// `tokens` and `pad_to_multiple_of`; nullptr where neither says anything.
    std::shared_ptr<const token_rules> read_rules(const mapping& parts)
    {
        auto rules = std::make_shared<token_rules>();
        if (const auto base = top_.find("base_model")) {
            rules->base = place_among_models(it_.names.find(base->value));
        }
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
        return rules->at.empty() || (rules->tokens.empty() && rules->multiple == 1) ? nullptr : rules;
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
    for (const auto& path : it.paths()) {
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
