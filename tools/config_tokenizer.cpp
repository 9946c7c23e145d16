// The tokenizer that a configuration gives the result, and its chat template.
// SPDX-License-Identifier: Apache-2.0
#include "config_tokenizer.hpp"

#include "chat_templates.hpp"
#include "vocabulary.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace tool::configuration {

namespace {

class tokenizer_reader {
public:
    explicit tokenizer_reader(reading& it)
        : it_(it)
        , where_(it.where)
        , slices_(it.slices)
        , request_(it.request())
    { }

    /// `tokenizer_source`, or `tokenizer`: whose vocabulary the result has, where models differ in it, and what becomes
    /// of rows of single tokens.
    void read(const mapping& top)
    {
        auto one = top.find("tokenizer_source");
        std::shared_ptr<const token_rules> rules;
        if (const auto block = top.find("tokenizer")) {
            if (one) { where_.fail(block->key, "'tokenizer' and 'tokenizer_source' are both given"); }
            const mapping parts(where_, block->value, "'tokenizer'", {"source", "tokens", "pad_to_multiple_of"});
            rules = rules_of_tokens(top, parts);
            one = parts.find("source");
            if (!one) { one.emplace(mapping::entry{"source", block->key, YAML::Node("union")}); }
        }
        if (!one) { return; }
        std::optional<input> source;
        if (!one->value.IsScalar() || (one->value.Scalar() != "base" && one->value.Scalar() != "union")) {
            source.emplace(it_.names.find(one->value));
        }
        const auto word = source ? source->name : one->value.Scalar();
        const auto content = [](const std::string& model) -> std::optional<std::string> {
            std::ifstream file(fs::path(model) / "tokenizer.json", std::ios::binary);
            if (!file) { return std::nullopt; }
            return std::string(std::istreambuf_iterator<char>(file), {});
        };
        const auto& reference = request_.base.empty() ? slices_.front().inputs.front().path : request_.base;
        const auto first = content(reference);
        if (!it_.models_are_there()) { return; } // looked at when all of them are
        if (request_.vocabulary != "error") {
            where_.fail(one->key, "'" + one->name + "' is given, and --vocabulary as well; expected one of them");
        }
        bool same = first.has_value(), all_have = same;
        std::optional<decltype(token_table::ids)> ids;
        std::set<std::string> seen;
        const auto look = [&](const input& model) {
            if (!seen.insert(model.path).second) { return; }
            const auto its = content(model.path);
            all_have = all_have && its.has_value();
            same = same && its.has_value();
            if (!same || its == first) { return; } // settings may differ where tokens do not
            if (!ids) { ids = read_tokens(fs::path(reference) / "tokenizer.json").ids; }
            same = read_tokens(fs::path(model.path) / "tokenizer.json").ids == *ids;
        };
        for (const auto& part : slices_) {
            for (const auto& model : part.inputs) { look(model); }
            if (part.base) { look(*part.base); }
        }
        if (source) { look(*source); }
        if (same && !rules) {
            request_.vocabulary = "base"; // rows that pad may differ
            if (source) { take_tokenizer(*source); }
            return;
        }
        const std::string what = "'" + one->name + ": " + shown(word) + "'";
        if (!all_have) {
            where_.fail(one->key, what + ": tokens are told apart by tokenizer.json, and not every model has one");
        }
        if (it_.sliced() && rules) {
            where_.fail(
                one->key, "'tokens' and 'pad_to_multiple_of' are supported for whole models, and here are slices");
        }
        if (it_.sliced()) {
            where_.fail(one->key,
                what + " is supported in slices where all models have the same tokenizer.json, and these differ");
        }
        std::error_code ignored;
        const bool the_first = word == "base" || (source && fs::equivalent(source->path, reference, ignored));
        if (!same && source && !the_first) {
            where_.fail(one->value,
                what + ": the models' vocabularies differ; expected base, which is '" + reference + "' here, or union");
        }
        if (!same && rules && rules->base.value_or(0) != 0) {
            where_.fail(top.find("base_model")->value,
                "the vocabulary begins with that of the first model, and the base is another: put it first among the "
                "models");
        }
        request_.vocabulary = the_first || same ? "base" : "union";
        request_.rows_of_tokens = std::move(rules);
    }

private:
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
        const auto place = std::find_if(inputs.begin(), inputs.end(),
            [&](const input& one) { return one.path == model.path && one.adapter == model.adapter; });
        if (place == inputs.end()) { return std::nullopt; }
        return before + static_cast<std::size_t>(place - inputs.begin());
    }

    /// `tokens` and `pad_to_multiple_of`; nullptr where neither says anything.
    std::shared_ptr<const token_rules> rules_of_tokens(const mapping& top, const mapping& parts)
    {
        auto rules = std::make_shared<token_rules>();
        if (const auto base = top.find("base_model")) { rules->base = place_among_models(it_.names.find(base->value)); }
        const auto whole = [&](const mapping::entry& one, double most) {
            const auto number = number_of(where_, one.value, one.name);
            if (!(number >= 0 && number <= most && std::floor(number) == number)) {
                where_.fail(one.value,
                    taskvec::message(one.name, " is ", shown(one.value.Scalar()), "; expected a whole number, at most ",
                        static_cast<std::uint64_t>(most)));
            }
            return static_cast<std::uint64_t>(number);
        };
        if (const auto one = parts.find("pad_to_multiple_of")) {
            constexpr double most = 1 << 20;
            rules->multiple = std::max<std::uint64_t>(1, whole(*one, most)); // 0: none
            rules->at = where_.of(one->key) + ": 'pad_to_multiple_of'";
        }
        if (const auto one = parts.find("tokens")) {
            const mapping all(where_, one->value, "'tokens'");
            for (const auto& token : all.entries()) {
                const auto what = "token '" + shown(token.name) + "'";
                if (token.name.empty()) { where_.fail(token.key, "'tokens' has a token without a text"); }
                const mapping its(where_, token.value, what, {"source", "force"});
                token_rule rule;
                rule.text = token.name;
                rule.at = where_.of(token.key);
                if (const auto force = its.find("force")) { rule.force = truth_of(where_, force->value, "force"); }
                if (const auto source = its.find("source")) {
                    rule.at = where_.of(source->value);
                    read_source(source->value, what, rule, whole);
                }
                rules->tokens.push_back(std::move(rule));
            }
            rules->at = where_.of(one->key) + ": 'tokens'";
        }
        return rules->at.empty() || (rules->tokens.empty() && rules->multiple == 1) ? nullptr : rules;
    }

    /// The `source` of a token: a model, a token of one, or zeros.
    template <class Whole>
    void read_source(const YAML::Node& node, const std::string& what, token_rule& rule, const Whole& whole)
    {
        using source = token_rule::source;
        const auto model = [&](const YAML::Node& at) {
            if (at.IsScalar() && at.Scalar() == "zero" && !fs::exists("zero")) {
                where_.fail(
                    at, "the source of " + what + " is 'zero', which would be a model; for zeros write {kind: zero}");
            }
            const auto found = it_.names.find(at);
            const auto place = place_among_models(found);
            if (!place) {
                where_.fail(at,
                    "the source of " + what + " is '" + shown(found.name)
                        + "', which is not merged here; "
                          "expected one of the models, or the base");
            }
            return *place;
        };
        const bool kinds = node.IsMap() && mapping(where_, node, "a source").find("kind");
        if (!kinds) {
            rule.from = source::model;
            rule.model = model(node);
            return;
        }
        const mapping parts(where_, node, "a source", {"kind", "model", "token", "token_id"});
        const auto kind = *parts.find("kind");
        const auto word = scalar_of(where_, kind.value, "kind");
        if (word != "zero" && word != "model_token") {
            where_.fail(kind.value, "kind is '" + shown(word) + "'" + meant(word, {"zero", "model_token"}));
        }
        if (word == "zero") {
            if (parts.entries().size() > 1) {
                where_.fail(node, "the source of " + what + " is zeros, which have nothing but a kind");
            }
            rule.from = source::zero;
            return;
        }
        const auto its = parts.find("model"), token = parts.find("token"), row = parts.find("token_id");
        if (!its) { where_.fail(node, "the source of " + what + " has no 'model'"); }
        if (token.has_value() == row.has_value()) {
            where_.fail(node,
                "the source of " + what + " has "
                    + (row ? "both 'token' and 'token_id'" : "neither 'token' nor 'token_id'")
                    + "; expected one of them");
        }
        rule.model = model(its->value);
        rule.from = token ? source::token : source::row;
        if (token) { rule.token = scalar_of(where_, token->value, "token"); }
        else {
            constexpr double most = (1 << 28) - 1;
            rule.row = whole(*row, most);
        }
    }

    reading& it_;
    const place& where_;
    const std::vector<slice>& slices_;
    merge_request& request_;
};

} // namespace

void read_tokenizer(reading& it, const mapping& top)
{
    tokenizer_reader(it).read(top);
}

void read_chat_template(reading& it, const mapping& top)
{
    const auto one = top.find("chat_template");
    if (!one) { return; }
    const auto text = scalar_of(it.where, one->value, "chat_template");
    if (text.find('{') != text.npos) {
        it.request().copies.chat_template = text;
        return;
    }
    if (text == "chatml") {
        it.request().copies.chat_template = std::string(chatml_template);
        return;
    }
    if (text != "auto") {
        it.where.fail(one->value,
            "chat_template is '" + shown(text)
                + "'; expected auto (what most of the models have), chatml, or a template itself, a text with {{ … "
                  "}}");
    }
    std::vector<std::pair<std::string, std::size_t>> found; // in the order of the models
    std::set<std::string> seen;
    const auto count = [&](const input& model) {
        if (!seen.insert(model.path).second) { return; }
        const auto own = chat_template_beside(model.path);
        if (!own) { return; }
        const auto place =
            std::find_if(found.begin(), found.end(), [&](const auto& other) { return other.first == *own; });
        if (place == found.end()) { found.emplace_back(*own, 1); }
        else {
            ++place->second;
        }
    };
    if (!it.request().base.empty()) {
        input base;
        base.path = it.request().base;
        count(base);
    }
    for (const auto& part : it.slices) {
        if (part.base) { count(*part.base); }
        for (const auto& model : part.inputs) { count(model); }
    }
    if (!it.models_are_there()) { return; } // looked at when all of them are
    if (found.empty()) {
        it.where.fail(one->value, "chat_template: auto, and no model has a chat template; leave it out, or give one");
    }
    it.request().copies.chat_template = std::max_element(found.begin(), found.end(), [](const auto& a, const auto& b) {
        return a.second < b.second; // the first of the most
    })->first;
}

} // namespace tool::configuration
