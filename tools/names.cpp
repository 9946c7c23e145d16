// Tensors that models call differently.
// SPDX-License-Identifier: Apache-2.0
#include "names.hpp"

#include "architectures.hpp"
#include "command.hpp"
#include "runner.hpp"
#include "token_rows.hpp"
#include "words.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/formats/adapter_names.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>
#include <taskvec/formats/name_pattern.hpp>
#include <taskvec/models/operand_source.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <sstream>

namespace tool {

namespace {

/// sed's \1 as ECMAScript's $1.
std::string ecma_replacement(const std::string& text)
{
    std::string result;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '\\' && i + 1 < text.size() && text[i + 1] >= '0' && text[i + 1] <= '9') {
            result += text[i + 1] == '0' ? '$' : '$';
            result += text[++i] == '0' ? '&' : text[i];
        }
        else {
            result += text[i];
        }
    }
    return result;
}

/// old -> new: a JSON object of strings, or lines of two words.
std::map<std::string, std::string> read_table(const std::string& path)
{
    const auto text = taskvec::read_text_file(path);
    std::map<std::string, std::string> table;
    const auto add = [&](const std::string& from, const std::string& to) {
        if (to.empty()) {
            taskvec::raise<taskvec::format_error>(
                taskvec::error_code::csv_syntax, "gives '" + from + "' an empty name", path);
        }
        if (!table.emplace(from, to).second) {
            taskvec::raise<taskvec::format_error>(taskvec::error_code::csv_syntax, "names '" + from + "' twice", path);
        }
    };
    if (const auto first = text.find_first_not_of(" \t\r\n"); first != text.npos && text[first] == '{') {
        const auto json = taskvec::parse_json(text, path); // named: items() refers to it
        for (const auto& [from, to] : json.items()) {
            if (!to.is_string()) {
                taskvec::raise<taskvec::format_error>(taskvec::error_code::csv_syntax,
                    "maps '" + from + "' to something that is not a string; expected the new name", path);
            }
            add(from, to.get<std::string>());
        }
        return table;
    }
    std::istringstream lines(text);
    std::size_t number = 0;
    for (std::string line; std::getline(lines, line);) {
        ++number;
        std::istringstream words(line);
        std::string from, to, more;
        if (!(words >> from) || from.starts_with('#')) { continue; }
        if (!(words >> to) || words >> more) {
            taskvec::raise<taskvec::format_error>(taskvec::error_code::csv_syntax,
                taskvec::message(
                    "line ", number, " is no pair of names; expected 'OLD NEW' on each line, or a JSON object"),
                path);
        }
        add(from, to);
    }
    return table;
}

/// A model under other names; two tensors of one name are refused.
taskvec::const_model_ref under_names(const taskvec::const_model_ref& model, const std::vector<std::string>& names,
    const std::string& label, const std::string& what)
{
    std::vector<std::size_t> order(names.size());
    for (std::size_t i = 0; i < order.size(); ++i) { order[i] = i; }
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return names[a] < names[b]; });
    taskvec::const_model_ref result;
    for (std::size_t k = 0; k < order.size(); ++k) {
        const auto i = order[k];
        if (names[i].empty()) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::name_collision,
                what + " leaves tensor '" + model[i].name + "' of " + label + " without a name");
        }
        if (k > 0 && names[order[k - 1]] == names[i]) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::name_collision,
                what + " gives tensors '" + model[order[k - 1]].name + "' and '" + model[i].name + "' of " + label
                    + " one name, '" + names[i] + "'");
        }
        result.insert(names[i], model[i].tensor);
    }
    return result;
}

std::vector<std::string> names_of(const taskvec::const_model_ref& model)
{
    std::vector<std::string> names;
    for (const auto& [name, tensor] : model) { names.push_back(name); }
    return names;
}

std::string list_of(const std::vector<prefix_match::change>& changes,
    std::string (prefix_match::change::*words)() const, const std::string& between)
{
    std::string text;
    for (const auto& change : changes) { text += (text.empty() ? "" : between) + (change.*words)(); }
    return text;
}

bool same_bytes(const taskvec::const_tensor_ref& a, const taskvec::const_tensor_ref& b)
{
    const auto operand_of = [](const taskvec::const_tensor_ref& tensor) {
        return taskvec::aligned_tensor::operand{
            static_cast<const std::byte*>(tensor.data), tensor.dtype, tensor.source};
    };
    return a.shape == b.shape && same_elements(operand_of(a), operand_of(b), 0, a.size());
}

/// The embedding of a model whose shape a tensor has, where there is just one of that kind. `any_rows`: the head is
/// another model's, whose vocabulary may differ.
const taskvec::const_model_ref::entry* embedding_like(
    const taskvec::const_model_ref& model, const taskvec::const_tensor_ref& head, bool any_rows = false)
{
    const taskvec::const_model_ref::entry* found = nullptr;
    for (const auto& entry : model) {
        const bool fits =
            any_rows ? same_but_tokens(entry.name, entry.tensor.shape, head.shape) : entry.tensor.shape == head.shape;
        if (!is_embedding(entry.name) || !fits) { continue; }
        if (found) { return nullptr; }
        found = &entry;
    }
    return found;
}

} // namespace

void add_name_options(
    command& verb, name_rules& rules, bool& match_prefixes, const std::vector<std::string>& model_options)
{
    add_rename_options(verb, rules, model_options);
    verb.flag("--match-prefixes", match_prefixes,
        "Line names up where they differ by what stands before them (model., _orig_mod., base_model.model., …)");
}

void add_rename_options(command& verb, name_rules& rules, const std::vector<std::string>& model_options)
{
    static const std::string after = " of the model, or modules of the adapter, that is named before it";
    verb.take(
        "--rename", "REGEX=REPLACEMENT",
        "Rename tensors" + after + ": each match of the expression, $1 or \\1 for its groups; repeatable",
        [](const std::string&) { }, true);
    verb.take(
        "--map", "FILE", "Rename tensors" + after + " by a table: a JSON object old to new, or lines OLD NEW",
        [](const std::string&) { }, true);
    verb.after_parse([&rules, model_options](const std::vector<std::pair<std::string, std::string>>& given) {
        std::optional<std::string> model;
        std::vector<name_rule> waiting;
        std::map<std::string, std::string> again; // models that are named twice, with the option
        for (const auto& [flag, value] : given) {
            if (std::find(model_options.begin(), model_options.end(), flag) != model_options.end()) {
                model = flag == "--base" ? "" : value;
                if (rules.contains(*model)) { again.emplace(*model, flag); }
                auto& mine = rules[*model];
                mine.insert(mine.end(), waiting.begin(), waiting.end());
                waiting.clear();
            }
            else if (flag == "--rename" || flag == "--map") {
                (model ? rules[*model] : waiting).push_back({flag == "--map", value});
            }
        }
        if (!waiting.empty()) { throw usage_error("--rename and --map belong to a model: none is named"); }
        for (const auto& [text, flag] : again) {
            if (text.empty() || rules[text].empty()) { continue; }
            const auto called = printable(text);
            throw usage_error("--rename and --map belong to one model, and '" + flag + " " + called
                + "' names two: write them differently, as '" + called + "' and '" + (called[0] == '/' ? "/" : "./")
                + called + "'");
        }
    });
}

taskvec::const_model_ref renamed(const taskvec::const_model_ref& model, const std::vector<name_rule>& rules,
    const std::string& label, const run_options& run)
{
    auto names = names_of(model);
    std::string what;
    for (const auto& rule : rules) {
        bool any = false;
        std::vector<std::string> unused; // names of a table
        if (rule.is_table) {
            what = "--map '" + rule.text + "'";
            const auto table = read_table(rule.text);
            std::set<std::string_view> used;
            for (auto& name : names) {
                if (const auto place = table.find(name); place != table.end()) {
                    name = place->second;
                    used.insert(place->first);
                }
            }
            any = !used.empty();
            for (const auto& [from, to] : table) {
                if (!used.contains(from)) { unused.push_back(from); }
            }
        }
        else {
            what = "--rename '" + rule.text + "'";
            const auto sign = rule.text.rfind('=');
            if (sign == rule.text.npos || sign == 0) {
                throw usage_error(what + " is no REGEX=REPLACEMENT, such as '^model\\.=' or '^=model.'");
            }
            std::optional<taskvec::name_pattern> pattern;
            try {
                pattern.emplace(rule.text.substr(0, sign));
            }
            catch (const taskvec::invalid_argument& wrong) {
                throw usage_error(what + ": " + wrong.what());
            }
            const auto replacement = ecma_replacement(rule.text.substr(sign + 1));
            for (auto& name : names) {
                if (!pattern->occurs_in(name)) { continue; }
                any = true;
                name = pattern->replaced_in(name, replacement);
            }
        }
        if (!any) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::nothing_selected,
                what + " matches no tensor of " + label
                    + (names.empty() ? "" : ", whose first is '" + names.front() + "'")
                    + ": see 'taskvec inspect' for the names");
        }
        if (!unused.empty()) {
            note(run,
                what + " renames nothing by " + counted(unused.size(), "name") + " that " + label + " has not ('"
                    + printable(unused.front()) + "'" + (unused.size() > 1 ? " …)" : ")"));
        }
    }
    return rules.empty() ? model : under_names(model, names, label, what);
}

std::string prefix_match::change::words() const
{
    if (off.empty()) { return "'" + on + (within ? "' put within names" : "' put before"); }
    if (on.empty()) { return "'" + off + (within ? "' within names taken out" : "' taken off"); }
    return "'" + on + "' in place of '" + off + "'";
}

std::string prefix_match::change::rename() const
{
    const auto escaped = [](const std::string& text) {
        std::string result;
        for (const char c : text) { result += c == '.' ? std::string("\\.") : std::string(1, c); }
        return result;
    };
    if (within) { return "--rename '\\." + escaped(off) + "=.'"; }
    std::string text = "--rename '^" + escaped(off);
    if (!some_stay) { return text + "=" + on + "'"; }
    std::string list;
    for (const auto& word : next) { list += (list.empty() ? "" : "|") + escaped(word); }
    return text + "(" + list + ")=" + on + "$1'";
}

std::string prefix_match::words() const
{
    return list_of(changes, &change::words, ", ");
}
std::string prefix_match::ways(const std::string& model) const
{
    const std::string way = "add --match-prefixes";
    const bool put_within =
        std::any_of(changes.begin(), changes.end(), [](const change& one) { return one.within && one.off.empty(); });
    return put_within ? way : way + ", or after " + model + " " + list_of(changes, &change::rename, " ");
}

bool prefix_match::wrappers_only() const
{
    static const std::set<std::string_view> wrappers{"", "model", "base_model", "_orig_mod", "module",
        "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "language_model", "text_model",
        "transformer", "backbone", "base", "net", "llm", "lm", "bert", "roberta", "gpt_neox"};
    const auto known = [](std::string_view text) {
        while (!text.empty()) {
            const auto dot = text.find('.');
            if (!wrappers.contains(text.substr(0, dot))) { return false; }
            text = dot == text.npos ? std::string_view() : text.substr(dot + 1);
        }
        return true;
    };
    return std::all_of(
        changes.begin(), changes.end(), [&](const change& one) { return known(one.off) && known(one.on); });
}

namespace {

/// The segments that wrappers put within names: PyTorch's, and PEFT's around a layer that it adapts.
std::vector<std::string_view> segments_within()
{
    std::vector<std::string_view> segments(taskvec::wrapper_segments.begin(), taskvec::wrapper_segments.end());
    segments.emplace_back("base_layer");
    return segments;
}

/// A model under names without the segments that wrappers put within them, and those that were found; nothing where
/// there are none, or two tensors would have one name. What stands at the beginning is a prefix like others.
struct unwrapped_model {
    taskvec::const_model_ref model;
    std::map<std::string, std::string> names; ///< as they were, by those that they have
    std::set<std::string> segments;
};
std::optional<unwrapped_model> unwrapped(const taskvec::const_model_ref& model)
{
    unwrapped_model made;
    for (const auto& [name, tensor] : model) {
        auto plain = name;
        for (const auto segment : segments_within()) {
            const auto within = "." + std::string(segment) + ".";
            for (std::size_t at = 0; (at = plain.find(within, at)) != plain.npos;) {
                plain.erase(at, within.size() - 1);
                made.segments.emplace(segment);
            }
        }
        if (!made.names.emplace(plain, name).second) { return std::nullopt; }
    }
    if (made.segments.empty()) { return std::nullopt; }
    for (const auto& [plain, name] : made.names) { made.model.insert(plain, *model.find(name)); }
    return made;
}

prefix_match match_whole_names(const taskvec::const_model_ref& model, const taskvec::const_model_ref& reference)
{
    prefix_match result;
    std::vector<std::string> left;
    for (const auto& [name, tensor] : model) {
        if (reference.find(name)) { ++result.same; }
        else {
            left.push_back(name);
        }
    }
    // What is free in the reference, by each of its endings that begin at a dot.
    std::multimap<std::string_view, const taskvec::const_model_ref::entry*> endings;
    const auto for_each_ending = [](std::string_view name, const auto& use) {
        for (std::size_t at = 0;;) {
            if (!use(name.substr(at), at == 0)) { return; }
            at = name.find('.', at);
            if (at == name.npos) { return; }
            ++at;
        }
    };
    std::set<std::string_view> taken;
    for (const auto& entry : reference) {
        if (model.find(entry.name)) { continue; }
        for_each_ending(entry.name, [&](std::string_view ending, bool) {
            endings.emplace(ending, &entry);
            return true;
        });
    }
    while (!left.empty()) {
        std::map<std::pair<std::string, std::string>, std::size_t> votes;
        for (const auto& name : left) {
            const auto& shape = model.find(name)->shape;
            for_each_ending(name, [&](std::string_view ending, bool whole) {
                const auto [first, last] = endings.equal_range(ending);
                bool found = false;
                for (auto it = first; it != last; ++it) {
                    const auto& to = *it->second;
                    const bool whole_there = ending.size() == to.name.size();
                    if (taken.contains(to.name) || !same_but_tokens(to.name, to.tensor.shape, shape)
                        || (!whole && !whole_there && ending.find('.') == ending.npos)) {
                        continue;
                    }
                    found = true;
                    ++votes[{name.substr(0, name.size() - ending.size()),
                        to.name.substr(0, to.name.size() - ending.size())}];
                }
                return !found; // the longest ending decides
            });
        }
        if (votes.empty()) { break; }
        const auto best = std::max_element(
            votes.begin(), votes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
        const auto& [off, on] = best->first;
        for (const auto& [pair, count] : votes) {
            if (pair.first == off && pair.second != on && count == best->second) {
                result.doubtful = {on, pair.second};
            }
        }
        if (!result.doubtful.empty()) { break; }
        prefix_match::change change{off, on, 0, {}, false};
        std::vector<std::string> still;
        for (const auto& name : left) {
            if (name.starts_with(off)) {
                const auto to = on + name.substr(off.size());
                const auto* const there = reference.find(to);
                if (there && same_but_tokens(to, there->shape, model.find(name)->shape) && !model.find(to)
                    && taken
                        .insert(std::string_view(std::find_if(reference.begin(), reference.end(),
                            [&](const auto& e) {
                                return e.name == to;
                            })->name))
                        .second) {
                    result.names[name] = to;
                    ++change.tensors;
                    change.next.insert(name.substr(off.size(), name.find('.', off.size()) - off.size()));
                    continue;
                }
            }
            still.push_back(name);
        }
        if (change.tensors == 0) { break; }
        result.changes.push_back(change);
        left = std::move(still);
    }
    for (auto& change : result.changes) {
        change.some_stay = std::any_of(model.begin(), model.end(), [&](const auto& entry) {
            const auto place = result.names.find(entry.name);
            return entry.name.starts_with(change.off)
                && (place == result.names.end() || place->second != change.on + entry.name.substr(change.off.size()));
        });
    }
    return result;
}

} // namespace

prefix_match match_prefixes(const taskvec::const_model_ref& model, const taskvec::const_model_ref& reference)
{
    auto result = match_whole_names(model, reference);
    const auto mine = unwrapped(model), theirs = unwrapped(reference);
    if ((!mine && !theirs) || result.same + result.names.size() == model.size()) { return result; }
    const auto& plain_model = mine ? mine->model : model;
    const auto& plain_reference = theirs ? theirs->model : reference;
    auto plain = match_whole_names(plain_model, plain_reference);
    if (plain.same + plain.names.size() <= result.same + result.names.size()) { return result; }
    result.names.clear();
    result.changes.clear();
    result.doubtful = std::move(plain.doubtful);
    for (const auto& [name, tensor] : plain_model) {
        const auto place = plain.names.find(name);
        const auto& to = place == plain.names.end() ? name : place->second;
        if (!plain_reference.find(to)) { continue; }
        const auto& from = mine ? mine->names.at(name) : name;
        const auto& there = theirs ? theirs->names.at(to) : to;
        if (from != there) { result.names.emplace(from, there); }
    }
    for (const bool off : {true, false}) {
        const auto& side = off ? mine : theirs;
        for (const auto& segment : side ? side->segments : std::set<std::string>()) {
            prefix_match::change change;
            (off ? change.off : change.on) = segment + ".";
            change.within = true;
            result.changes.push_back(std::move(change));
        }
    }
    result.changes.insert(result.changes.end(), plain.changes.begin(), plain.changes.end());
    return result;
}

taskvec::const_model_ref renamed(const taskvec::const_model_ref& model, const prefix_match& match)
{
    taskvec::const_model_ref result;
    for (const auto& [name, tensor] : model) {
        const auto place = match.names.find(name);
        result.insert(place == match.names.end() ? name : place->second, tensor);
    }
    return result;
}

nlohmann::json config_beside(const fs::path& model)
{
    std::error_code ignored;
    const auto file = (fs::is_directory(model, ignored) ? model : model.parent_path()) / "config.json";
    if (!fs::is_regular_file(file, ignored)) { return nlohmann::json::object(); }
    auto config = taskvec::parse_configuration(read_watched(file), file.string());
    return config.is_object() ? config : nlohmann::json::object();
}

bool says_tied(const fs::path& model)
{
    return config_says_tied(config_beside(model));
}

bool config_says_tied(const nlohmann::json& config)
{
    const auto truth = [](const nlohmann::json& object) {
        return object.is_object() && object.contains("tie_word_embeddings") && object["tie_word_embeddings"] == true;
    };
    return truth(config) || (config.contains("text_config") && truth(config["text_config"]));
}

bool has_own_head(const taskvec::const_model_ref& model)
{
    return std::any_of(model.begin(), model.end(), [&](const taskvec::const_model_ref::entry& entry) {
        if (!is_head(entry.name)) { return false; }
        const auto* const like = embedding_like(model, entry.tensor);
        return like && like->name != entry.name && !same_bytes(entry.tensor, like->tensor);
    });
}

bool same_elements(const taskvec::aligned_tensor::operand& a, const taskvec::aligned_tensor::operand& b,
    std::uint64_t first, std::size_t count)
{
    if (a.dtype != b.dtype) { return false; }
    if ((a.source == b.source && a.data == b.data) || count == 0) { return true; }
    if (!a.source && !b.source) {
        const auto from = taskvec::byte_count(a.dtype, first);
        return a.data && b.data && std::memcmp(a.data + from, b.data + from, taskvec::byte_count(a.dtype, count)) == 0;
    }
    if (!a.source || !b.source || a.source->type() != b.source->type()) { return false; }
    constexpr std::size_t piece = 4096;
    std::vector<double> left(piece), right(piece); // or floats
    for (std::size_t at = 0; at < count; at += piece) {
        const auto n = std::min(piece, count - at);
        a.source->read(first + at, n, left.data());
        b.source->read(first + at, n, right.data());
        if (std::memcmp(left.data(), right.data(), taskvec::byte_count(a.source->type(), n)) != 0) { return false; }
    }
    return true;
}

std::vector<std::pair<std::size_t, std::size_t>> shared_matrices(const taskvec::aligned_models& models)
{
    std::vector<const taskvec::aligned_tensor*> firsts;
    std::vector<std::pair<std::size_t, std::size_t>> shared;
    for (const bool heads : {false, true}) { // an embedding is the first
        for (const auto& tensor : models.tensors()) {
            if (tensor.shape.size() != 2 || heads != is_head(tensor.name) || !(heads || is_embedding(tensor.name))) {
                continue;
            }
            const auto first = std::find_if(firsts.begin(), firsts.end(), [&](const taskvec::aligned_tensor* other) {
                return tensor.shape == other->shape && tensor.output_dtype == other->output_dtype
                    && same_elements(tensor.base, other->base, 0, tensor.size)
                    && std::equal(tensor.tasks.begin(), tensor.tasks.end(), other->tasks.begin(), other->tasks.end(),
                        [&](const auto& a, const auto& b) { return same_elements(a, b, 0, tensor.size); });
            });
            if (first == firsts.end()) { firsts.push_back(&tensor); }
            else {
                shared.emplace_back(tensor.output, (*first)->output);
            }
        }
    }
    return shared;
}

std::string tie_text(const taskvec::const_model_ref& model, bool says_tied)
{
    const taskvec::const_model_ref::entry* embedding = nullptr;
    for (const auto& entry : model) {
        if (is_head(entry.name)) {
            const auto* const like = embedding_like(model, entry.tensor);
            if (!like || like->name == entry.name || !same_bytes(entry.tensor, like->tensor)) { return ""; }
            return "'" + entry.name + "' has the bytes of '" + like->name + "'";
        }
        if (is_embedding(entry.name) && entry.tensor.shape.size() == 2 && !embedding) { embedding = &entry; }
    }
    return says_tied && embedding ? "the head is '" + embedding->name + "' (config.json: tie_word_embeddings)" : "";
}

std::string add_tied_head(taskvec::const_model_ref& model, const taskvec::const_model_ref& other)
{
    for (const auto& [name, tensor] : other) {
        if (!is_head(name) || tensor.shape.size() != 2 || model.find(name)) { continue; }
        const auto* const own = embedding_like(other, tensor);
        if (own && same_bytes(own->tensor, tensor)) { continue; }
        const auto* const embedding = embedding_like(model, tensor, true);
        if (!embedding) { continue; }
        const auto tied = embedding->tensor;
        model.insert(name, tied);
        return name;
    }
    return "";
}

std::vector<std::string> resolve_ties(taskvec::const_model_ref& model, const taskvec::const_model_ref& reference,
    bool says_tied, const std::string& label, const std::string& reference_label)
{
    std::vector<std::string> notes;
    taskvec::const_model_ref added;
    for (const auto& [name, tensor] : reference) {
        if (model.find(name) || tensor.shape.size() != 2) { continue; }
        const taskvec::const_model_ref::entry* mine = nullptr;
        std::string why;
        if (const auto* own = embedding_like(reference, tensor); own && own->name != name) {
            const auto* const same = model.find(own->name);
            if (same
                && (is_head(name) ? says_tied || same_bytes(tensor, own->tensor) : same_bytes(tensor, own->tensor))) {
                why = is_head(name) && says_tied ? "its config.json says tie_word_embeddings"
                                                 : reference_label + " holds the same bytes under both names";
                mine = &*std::find_if(
                    model.begin(), model.end(), [&](const auto& entry) { return entry.name == own->name; });
            }
        }
        if (!mine && is_head(name) && says_tied) {
            mine = embedding_like(model, tensor, true);
            why = "its config.json says tie_word_embeddings";
        }
        if (!mine || !same_but_tokens(name, mine->tensor.shape, tensor.shape)) { continue; }
        added.insert(name, mine->tensor);
        notes.push_back(label + " has no '" + name + "': it is tied to '" + mine->name + "' (" + why + ")");
    }
    for (const auto& [name, tensor] : added) { model.insert(name, tensor); }
    std::set<std::string> dropped;
    for (const auto& [name, tensor] : model) {
        if (!is_head(name) || reference.find(name)) { continue; }
        const auto* const own = embedding_like(model, tensor);
        if (!own || !reference.find(own->name)) { continue; }
        if (same_bytes(tensor, own->tensor)) {
            dropped.insert(name);
            notes.push_back("'" + name + "' of " + label + " is left out: it holds the bytes of '" + own->name
                + "', to which it is tied, as in " + reference_label);
        }
    }
    if (!dropped.empty()) {
        taskvec::const_model_ref rest;
        for (const auto& [name, tensor] : model) {
            if (!dropped.contains(name)) { rest.insert(name, tensor); }
        }
        model = std::move(rest);
    }
    return notes;
}

std::optional<std::pair<std::string, std::size_t>> layer_of(std::string_view name)
{
    for (std::size_t at = 0; at < name.size();) {
        const auto end = std::min(name.find('.', at), name.size());
        const auto part = name.substr(at, end - at);
        if (!part.empty() && part.size() < 7 && part.find_first_not_of("0123456789") == part.npos) {
            return std::pair(std::string(name.substr(0, at)), static_cast<std::size_t>(std::stoul(std::string(part))));
        }
        at = end + 1;
    }
    return std::nullopt;
}

std::string in_layer(std::string_view name, const std::pair<std::string, std::size_t>& layer, std::size_t number)
{
    const auto end = std::min(name.find('.', layer.first.size()), name.size());
    return layer.first + std::to_string(number) + std::string(name.substr(end));
}

std::string name_in_filters(std::string_view name)
{
    std::string result(name);
    constexpr std::string_view sparse = ".block_sparse_moe.", experts = ".experts.", weight = ".weight";
    if (const auto at = result.find(sparse); at != result.npos) {
        const auto rest = std::string_view(result).substr(at + sparse.size());
        const auto is = [&](std::string_view part) { return rest.starts_with(part); };
        const bool granite = is("input_linear.") || is("output_linear.") || is("router.");
        if (!granite) { result.replace(at, sparse.size(), ".mlp."); }
    }
    const auto at = result.find(experts);
    if (at == result.npos || !result.ends_with(weight)) { return result; }
    const auto number = at + experts.size();
    const auto end = result.find_first_not_of("0123456789", number);
    if (end == number || end == result.npos || result[end] != '.') { return result; }
    const auto part = result.substr(end + 1, result.size() - weight.size() - end - 1);
    static const std::map<std::string, std::string> fused{{"gate_proj", "gate_up_proj"}, {"up_proj", "gate_up_proj"},
        {"down_proj", "down_proj"}, {"w1", "gate_up_proj"}, {"w3", "gate_up_proj"}, {"w2", "down_proj"}};
    const auto place = fused.find(part);
    if (place == fused.end()) { return result; }
    const bool gated = !std::string_view(result).substr(0, at).ends_with(".mixer"); // Nemotron-H has no gates
    return result.substr(0, number) + (gated ? place->second : part);
}

bool stands_before_layers(std::string_view name)
{
    const auto has = [&](std::string_view part) { return name.find(part) != name.npos; };
    return (has("embed") && !has("embed_out")) || has("wte") || has("wpe") || name.ends_with("shared.weight");
}

std::size_t count_layers(const taskvec::const_model_ref& model, const std::string& label)
{
    std::map<std::string, std::size_t> counts;
    for (const auto& [name, tensor] : model) {
        if (const auto layer = layer_of(name)) {
            auto& count = counts[layer->first];
            count = std::max(count, layer->second + 1);
        }
    }
    if (counts.size() == 1) { return counts.begin()->second; }
    std::string text;
    for (const auto& [prefix, count] : counts) {
        text += taskvec::message(text.empty() ? "" : ", ", "'", prefix, "' with ", count);
    }
    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
        label
            + (counts.empty() ? " has no layers: no tensor has a number in its name"
                              : " has several lists of layers (" + text + "); expected one to take layers from"));
}

std::map<std::string, std::size_t> layers_before_prediction(
    const taskvec::const_model_ref& model, const nlohmann::json& config)
{
    std::size_t said = 0;
    for (const auto* part : {&config, config.contains("text_config") ? &config["text_config"] : nullptr}) {
        if (said > 0 || !part || !part->is_object()) { continue; }
        const auto place = part->find("num_hidden_layers");
        if (place != part->end() && place->is_number_unsigned()) { said = place->get<std::size_t>(); }
    }
    if (said == 0) { return {}; }
    struct layers {
        std::set<std::string> before{}; ///< names of tensors behind a layer's number
        std::map<std::size_t, std::set<std::string>> behind{};
    };
    std::map<std::string, layers> all;
    for (const auto& [name, tensor] : model) {
        const auto layer = layer_of(name);
        if (!layer) { continue; }
        auto& its = all[layer->first];
        const auto part = name.substr(std::min(name.find('.', layer->first.size()), name.size()));
        (layer->second < said ? its.before : its.behind[layer->second]).insert(part);
    }
    std::map<std::string, std::size_t> result;
    for (const auto& [prefix, its] : all) {
        const auto is_other = [&before = its.before](const auto& one) {
            return std::any_of(
                one.second.begin(), one.second.end(), [&](const std::string& part) { return !before.contains(part); });
        };
        if (its.before.empty() || its.behind.empty()) { continue; }
        if (std::all_of(its.behind.begin(), its.behind.end(), is_other)) { result[prefix] = said; }
    }
    return result;
}

taskvec::const_model_ref model_of_layers(const std::vector<layers_taken>& parts)
{
    std::map<std::string, taskvec::const_tensor_ref> tensors;
    std::size_t begin = 0;
    for (std::size_t p = 0; p < parts.size(); ++p) {
        const auto& part = parts[p];
        for (const auto& [name, tensor] : *part.model) {
            const auto layer = layer_of(name);
            if (!layer) {
                if (stands_before_layers(name) ? p == 0 : p + 1 == parts.size()) { tensors.emplace(name, tensor); }
            }
            else if (layer->second >= part.first && layer->second < part.last) {
                tensors.emplace(in_layer(name, *layer, layer->second - part.first + begin), tensor);
            }
        }
        begin += part.last - part.first;
    }
    for (const auto& [name, head] : *parts.front().model) {
        if (!is_head(name) || tensors.contains(name)) { continue; }
        if (const auto* const tied = embedding_like(*parts.back().model, head)) { tensors.emplace(name, tied->tensor); }
    }
    taskvec::const_model_ref result;
    for (const auto& [name, tensor] : tensors) { result.insert(name, tensor); }
    return result;
}

namespace {

/// The segments of names that are of an adapter, as PEFT's tuners, LyCORIS and others call them; what ends in "_"
/// begins such segments.
struct adapter_words {
    std::string_view kind, segments; ///< with spaces between
    bool read = false; ///< by the verbs for adapters
};
constexpr adapter_words known_adapters[]{{"DoRA", "lora_magnitude_vector dora_scale", true}, {"LoHa", "hada_", true},
    {"LoKr", "lokr_", true},
    {"LoRA", "lora_A lora_B lora_E lora_a lora_b lora_up lora_down lora_mid lora_embedding_A lora_embedding_B", true},
    {"OFT", "oft_R oft_r oft_s oft_embedding_R oft_blocks oft_diag", false}, {"BOFT", "boft_R boft_s", false},
    {"PSOFT", "psoft_R", false}, {"VeRA", "vera_lambda_ vera_A vera_B", false},
    {"PVeRA", "pvera_lambda_ pvera_A pvera_B", false}, {"IA3", "ia3_l", false}, {"VB-LoRA", "vblora_", false},
    {"RandLoRA", "randlora_", false}, {"GLoRA", "glora_", false}, {"GraLoRA", "gralora_", false},
    {"TinyLoRA", "tinylora_", false}, {"UniLoRA", "unilora_", false}, {"DeLoRA", "delora_", false},
    {"Poly", "poly_lora_ poly_router", false}, {"SuperTuning", "supertuning_", false},
    {"HiRA", "hira_A hira_B hira_embedding_A hira_embedding_B", false}, {"HRA", "hra_u", false},
    {"FourierFT", "fourierft_spectrum", false}, {"WaveFT", "waveft_spectrum", false}, {"SHiRA", "shira_weight", false},
    {"C3A", "c3a_kernel", false}, {"RoAd", "road_theta road_alpha", false}, {"Bone", "bone_block", false},
    {"MiSS", "miss_block", false}, {"AdaMSS", "adamss_A adamss_B", false}, {"FRoD", "frod_lambda_", false},
    {"PEANuT", "peanut_A peanut_B peanut_encoders peanut_decoders", false},
    {"Lily", "lily_A lily_B lily_router", false}, {"DEFT", "deft_P deft_R", false}, {"BEFT", "beft_bias", false},
    {"OSF", "osf_svd_params", false}, {"trainable tokens", "trainable_tokens_delta", false}};

/// Whether a name is one of kohya's scripts or LyCORIS, in which dots of modules are underscores.
bool is_underscored(std::string_view name)
{
    for (const std::string_view begin : {"lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_",
             "lora_transformer_", "lora_prior_", "lycoris_", "oft_unet_", "oft_te_"}) {
        if (name.starts_with(begin)) { return true; }
    }
    return false;
}

/// "lora1", "qkv_lora2": a projection of its own, as XLabs number them.
bool is_numbered_lora(std::string_view segment)
{
    const auto end = segment.find_last_not_of("0123456789");
    return end != segment.npos && end + 1 < segment.size() && segment.substr(0, end + 1).ends_with("lora");
}

} // namespace

adapter_part adapter_part_of(std::string_view name, const taskvec::const_model_ref& model)
{
    const auto has = [&](std::string_view part) { return name.find(part) != name.npos; };
    for (const auto& adapter : known_adapters) {
        for (auto rest = adapter.segments; !rest.empty();) {
            const auto word = rest.substr(0, rest.find(' '));
            rest.remove_prefix(std::min(rest.size(), word.size() + 1));
            for (auto at = name.find(word); at != name.npos; at = name.find(word, at + 1)) {
                const auto end = at + word.size();
                const bool begins = at == 0 || name[at - 1] == '.';
                const bool ends = word.ends_with('_') || end == name.size() || name[end] == '.';
                if (!begins || !ends) { continue; }
                return {
                    std::string(adapter.kind), std::string(word.starts_with("lora_") ? "lora" : word), adapter.read};
            }
        }
    }
    std::string_view before; // the segment before that at `at`
    for (std::size_t at = 0; at < name.size();) {
        const auto end = std::min(name.find('.', at), name.size());
        const auto segment = name.substr(at, end - at);
        if (segment == "up" || segment == "down") {
            if (is_numbered_lora(before) || has(".processor.qkv_lora.") || has(".processor.proj_lora.")) {
                return {"XLabs' LoRA", "lora", false};
            }
            if (before == "lora" || before == "lora_linear_layer" || before.ends_with("_lora")) {
                return {"LoRA", "lora", true};
            }
        }
        before = segment;
        at = end + 1;
    }
    // GLoRA of LyCORIS has plain names: all four of a module tell it.
    for (const std::string_view factor : {".a1.", ".a2.", ".b1.", ".b2.", ".bm."}) {
        const auto at = name.rfind(factor);
        if (at == name.npos || at + factor.size() + 6 != name.size() || !name.ends_with("weight")) { continue; }
        const std::string stem(name.substr(0, at));
        bool all = true;
        for (const char* other : {".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"}) {
            all = all && model.find(stem + other);
        }
        if (all) { return {"GLoRA", is_underscored(name) ? "lora" : "\\.(a1|a2|b1|b2|bm)\\.", false}; }
    }
    if (!is_underscored(name) || !has(".")) { return {}; }
    // Differences of whole tensors are merged as they are.
    for (const std::string_view ending : {".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight", ".alpha"}) {
        if (name.ends_with(ending)) { return {}; }
    }
    return {"LyCORIS",
        name.starts_with("lycoris_")   ? "^lycoris_"
            : name.starts_with("oft_") ? "^oft_"
                                       : "^lora_",
        false};
}

std::string closest_name(const std::string& pattern, const std::vector<std::string>& names)
{
    std::string letters; // the pattern without what regular expressions are made of
    for (const char c : pattern) {
        if (std::string_view("^$()[]*+?|\\").find(c) == std::string_view::npos) { letters += c; }
    }
    if (letters.size() < 3 || letters.size() > 200) { return ""; }
    std::string best;
    std::size_t least = letters.size() / 3 + 1;
    std::size_t looked_at = 0;
    for (const auto& name : names) {
        if (++looked_at > 5000 || name.size() > 400) { break; }
        // Edits that make the letters a part of the name: beginning and end of the name are free.
        std::vector<std::size_t> row(name.size() + 1, 0), next(name.size() + 1);
        for (std::size_t i = 1; i <= letters.size(); ++i) {
            next[0] = i;
            for (std::size_t j = 1; j <= name.size(); ++j) {
                next[j] = std::min({row[j] + 1, next[j - 1] + 1, row[j - 1] + (letters[i - 1] == name[j - 1] ? 0 : 1)});
            }
            row.swap(next);
        }
        const auto edits = *std::min_element(row.begin(), row.end());
        if (edits < least) {
            least = edits;
            best = name;
        }
    }
    return best;
}

} // namespace tool
