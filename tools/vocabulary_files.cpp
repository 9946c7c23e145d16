// The tokenizer that fits a result whose vocabulary is another than that of its first model.
// SPDX-License-Identifier: Apache-2.0
#include "vocabulary.hpp"

#include "runner.hpp"
#include "token_rows.hpp"
#include "tokenizers.hpp"
#include "words.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

namespace tool {

namespace {

using json = nlohmann::ordered_json;
/// For objects of many keys: those of the other are found one by one.
using large_json = nlohmann::json;

template <class Json>
Json token_entry(const added_token& token, bool with_id, std::uint64_t id)
{
    Json entry = Json::object();
    if (with_id) { entry["id"] = id; }
    entry["content"] = token.content;
    entry["single_word"] = token.single_word;
    entry["lstrip"] = token.lstrip;
    entry["rstrip"] = token.rstrip;
    entry["normalized"] = token.normalized;
    entry["special"] = token.special;
    return entry;
}

template <class Json>
std::string dumped(const Json& content)
{
    return content.dump(2, ' ', false) + "\n";
}

template <class Json>
std::optional<Json> read_object(const fs::path& file)
{
    std::error_code ignored;
    if (!fs::is_regular_file(file, ignored)) { return std::nullopt; }
    const auto map = open_watched(file);
    const auto bytes = map.bytes();
    const auto* const text = reinterpret_cast<const char*>(bytes.data());
    auto content = Json::parse(text, text + bytes.size(), nullptr, false);
    if (content.is_discarded() || !content.is_object()) {
        taskvec::raise<taskvec::format_error>(
            taskvec::error_code::json_syntax, "is no JSON object, as tokenizers have it", file.string());
    }
    return content;
}

/// The two tokens of a merge, which is an array of them or a text with a space between; empty for what is neither.
std::pair<std::string, std::string> parts_of_merge(const large_json& merge)
{
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        return {merge[0].get<std::string>(), merge[1].get<std::string>()};
    }
    if (!merge.is_string()) { return {}; }
    const auto& text = merge.get_ref<const std::string&>();
    const auto space = text.find(' ', 1);
    return space == text.npos ? std::pair<std::string, std::string>()
                              : std::pair(text.substr(0, space), text.substr(space + 1));
}

/// Whether an entry of added_tokens is one.
bool is_description(const large_json& entry)
{
    return entry.is_object() && entry.contains("id") && entry["id"].is_number_unsigned() && entry.contains("content")
        && entry["content"].is_string();
}

/// The ids that the tokenizers library gives added tokens, whatever the file says: that of model.vocab, and to what is
/// not in there one after another behind it.
std::map<std::string, std::uint64_t> ids_of_added(const large_json& tokenizer)
{
    std::map<std::string, std::uint64_t> own, ids;
    const auto& vocabulary = tokenizer.at("model").at("vocab");
    if (vocabulary.is_object()) {
        for (const auto& [text, id] : vocabulary.items()) {
            if (id.is_number_unsigned()) { own.emplace(text, id.get<std::uint64_t>()); }
        }
    }
    else {
        for (const auto& piece : vocabulary) {
            if (piece.is_array() && !piece.empty() && piece[0].is_string()) {
                own.emplace(piece[0].get<std::string>(), own.size());
            }
        }
    }
    auto next = std::uint64_t{vocabulary.size()};
    for (const auto& entry : tokenizer.at("added_tokens")) {
        if (!is_description(entry)) { continue; }
        const auto& text = entry["content"].get_ref<const std::string&>();
        if (ids.contains(text)) { continue; }
        const auto place = own.find(text);
        ids.emplace(text, place == own.end() ? next++ : place->second);
    }
    return ids;
}

/// Of the pieces of a Unigram vocabulary; 0 where none is below.
double least_score(const large_json& pieces)
{
    double least = 0;
    for (const auto& piece : pieces) {
        if (piece.is_array() && piece.size() == 2 && piece[1].is_number()) {
            least = std::min(least, piece[1].get<double>());
        }
    }
    return least;
}

} // namespace

std::optional<added_token> lined_up_vocabulary::description(const new_token& token) const
{
    if (!token.from) {
        added_token plain;
        plain.content = token.text;
        plain.normalized = true;
        return plain;
    }
    const auto& added = members_[*token.from].tokens.added;
    const auto place = added.find(token.text);
    return place == added.end() ? std::nullopt : std::optional(place->second);
}

/// Puts new tokens into a tokenizer: those that a donor's added_tokens describe there (and into `added`), others into
/// the model's vocabulary, with the merges that make them. Where the first one's added tokens would be read under other
/// ids then, they are put there as well. True where the model has changed.
bool lined_up_vocabulary::add_tokens(large_json& tokenizer, std::map<std::string, std::uint64_t>& added) const
{
    auto& model = tokenizer["model"];
    if (!model.is_object()) { model = large_json::object(); }
    auto& descriptions = tokenizer["added_tokens"];
    if (!descriptions.is_array()) { descriptions = large_json::array(); }
    std::set<std::size_t> donors;
    std::optional<double> least;
    for (std::size_t i = 0; i < new_tokens_.size(); ++i) {
        const auto& token = new_tokens_[i];
        const auto id = members_.front().tokens.size() + i;
        if (const auto its = description(token)) {
            descriptions.push_back(token_entry<large_json>(*its, true, id));
            added[token.text] = id;
            continue;
        }
        donors.insert(*token.from);
        add_to_vocabulary(model["vocab"], token, id, least);
    }
    if (!donors.empty()) { add_merges(model, donors, added); }
    return keep_ids(tokenizer) || !donors.empty();
}

/// `least`: the least score of a Unigram piece, once it is known.
void lined_up_vocabulary::add_to_vocabulary(
    large_json& vocabulary, const new_token& token, std::uint64_t id, std::optional<double>& least) const
{
    if (vocabulary.is_object()) { vocabulary[token.text] = id; }
    else if (vocabulary.is_array() && vocabulary.size() == id) {
        // A Unigram piece of the least score: texts keep their segmentations where they can.
        if (!least) { least = least_score(vocabulary); }
        vocabulary.push_back(large_json::array({token.text, *least}));
    }
    else {
        const auto& first = members_.front();
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
            taskvec::message("--vocabulary union: token '", printable(token.text), "' of ",
                in_quotes(members_[*token.from].tokenizer), " cannot be added to the ", first.tokens.model,
                " vocabulary of ", in_quotes(first.tokenizer),
                ", whose ids are places in a list: use --vocabulary base, or --copy-from with a tokenizer of "
                "your own"));
    }
}

/// The donors' merges that make new tokens of the vocabulary, each once.
void lined_up_vocabulary::add_merges(
    large_json& model, const std::set<std::size_t>& donors, const std::map<std::string, std::uint64_t>& added) const
{
    if (!model.contains("merges") || !model["merges"].is_array()) { return; }
    auto& merges = model["merges"];
    const auto& vocabulary = model["vocab"];
    const bool as_text = !merges.empty() && merges.front().is_string();
    std::set<std::pair<std::string, std::string>> there;
    for (const auto donor : donors) {
        each_merge(members_[donor].tokenizer, [&](const std::string& left, const std::string& right) {
            const auto whole = left + right;
            if (!new_ids_.contains(whole) || added.contains(whole)) { return; }
            if (!vocabulary.contains(left) || !vocabulary.contains(right)) { return; }
            if (!there.emplace(left, right).second) { return; }
            as_text ? merges.push_back(left + " " + right) : merges.push_back(large_json::array({left, right}));
        });
    }
}

/// Puts added tokens into the vocabulary too where tokenizers would read them under other ids otherwise; whether it
/// did.
bool lined_up_vocabulary::keep_ids(large_json& tokenizer) const
{
    auto& vocabulary = tokenizer["model"]["vocab"];
    if (!vocabulary.is_object() && !vocabulary.is_array()) { return false; }
    const auto& descriptions = tokenizer["added_tokens"];
    const auto read = ids_of_added(tokenizer);
    const auto is_moved = [&](const large_json& entry) {
        return is_description(entry)
            && entry["id"].get<std::uint64_t>() != read.at(entry["content"].get_ref<const std::string&>());
    };
    const auto moved = std::find_if(descriptions.begin(), descriptions.end(), is_moved);
    if (moved == descriptions.end()) { return false; }
    if (!vocabulary.is_object()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
            taskvec::message("--vocabulary union: tokenizers would read '",
                printable((*moved)["content"].get<std::string>()), "' of ", in_quotes(members_.front().tokenizer),
                " under another id than that of its row: use --vocabulary base, or --copy-from with a tokenizer of "
                "your own"));
    }
    for (const auto& entry : descriptions) {
        if (is_description(entry)) { vocabulary[entry["content"].get<std::string>()] = entry["id"]; }
    }
    return true;
}

/// Takes the tokens from cut_ on out of a tokenizer (and puts them into `lost`), with merges that need them. True where
/// the model has changed.
bool lined_up_vocabulary::remove_tokens(large_json& tokenizer, std::map<std::string, std::uint64_t>& lost) const
{
    for (const auto& [id, text] : members_.front().tokens.texts) {
        if (id >= cut_) { lost[*text] = id; }
    }
    const auto keep = [](large_json& list, const auto& wanted) {
        auto kept = large_json::array();
        for (auto& entry : list) {
            if (wanted(entry)) { kept.push_back(std::move(entry)); }
        }
        list = std::move(kept);
    };
    if (tokenizer.contains("added_tokens") && tokenizer["added_tokens"].is_array()) {
        keep(tokenizer["added_tokens"], [&](const large_json& entry) {
            return !(entry.is_object() && entry.contains("id") && entry["id"].is_number_unsigned()
                && entry["id"].get<std::uint64_t>() >= cut_);
        });
    }
    if (!tokenizer.contains("model") || !tokenizer["model"].is_object()) { return false; }
    auto& model = tokenizer["model"];
    auto& vocabulary = model["vocab"];
    const auto before = vocabulary.size();
    if (vocabulary.is_array()) {
        while (vocabulary.size() > cut_) { vocabulary.erase(vocabulary.size() - 1); }
    }
    else {
        for (const auto& [text, id] : lost) { vocabulary.erase(text); }
    }
    if (vocabulary.size() != before && model.contains("merges") && model["merges"].is_array()) {
        keep(model["merges"], [&](const large_json& merge) {
            const auto [left, right] = parts_of_merge(merge);
            return !lost.contains(left) && !lost.contains(right) && !lost.contains(left + right);
        });
    }
    return vocabulary.size() != before;
}

namespace {

/// Takes the values of an object that are lost tokens out of it, of lists too; the keys that have none now.
std::vector<std::string> drop_lost(json& settings, const std::map<std::string, std::uint64_t>& lost)
{
    const auto is_lost = [&](const json& value) {
        const json* text = &value;
        if (value.is_object() && value.contains("content")) { text = &value["content"]; }
        return text->is_string() && lost.contains(text->get<std::string>());
    };
    std::vector<std::string> keys;
    for (auto& [key, value] : settings.items()) {
        if (is_lost(value)) { keys.push_back(key); }
        if (!value.is_array()) { continue; }
        auto list = json::array();
        for (const auto& one : value) {
            if (!is_lost(one)) { list.push_back(one); }
        }
        if (list.size() != value.size()) { value = std::move(list); }
    }
    for (const auto& key : keys) { settings.erase(key); }
    return keys;
}

/// What transformers' slow tokenizers read has other tokens than the result.
void leave_slow_files_out(
    std::map<std::string, std::optional<std::string>>& files, const fs::path& folder, const run_options& run)
{
    std::string gone;
    for (const char* name : slow_tokenizer_names) {
        std::error_code ignored;
        if (!fs::exists(folder / name, ignored)) { continue; }
        files[name] = std::nullopt;
        gone += (gone.empty() ? "'" : ", '") + std::string(name) + "'";
    }
    if (!gone.empty()) {
        note(run, gone + " of the slow tokenizer are left out: tokenizer.json has the tokens of the result");
    }
}

} // namespace

std::map<std::string, std::optional<std::string>> lined_up_vocabulary::tokenizer_files(const run_options& run) const
{
    std::map<std::string, std::optional<std::string>> files;
    if (!changed_ || (new_tokens_.empty() && cut_ == 0)) { return files; }
    const auto& first = members_.front();
    const auto folder = first.tokenizer.parent_path();
    std::map<std::string, std::uint64_t> added, lost;
    bool model_changes = false;
    {
        auto tokenizer = *read_object<large_json>(first.tokenizer);
        model_changes = new_tokens_.empty() ? remove_tokens(tokenizer, lost) : add_tokens(tokenizer, added);
        files[tokenizer_name] = dumped(tokenizer);
    }
    std::set<std::string> dropped;
    for (const char* name : {"tokenizer_config.json", "special_tokens_map.json"}) {
        auto content = read_object<json>(folder / name);
        if (!content) { continue; }
        if (content->contains("added_tokens_decoder") && (*content)["added_tokens_decoder"].is_object()) {
            auto& decoder = (*content)["added_tokens_decoder"];
            for (const auto& [text, id] : added) {
                const auto& token = new_tokens_[static_cast<std::size_t>(id - first.tokens.size())];
                decoder[std::to_string(id)] = token_entry<json>(*description(token), false, id);
            }
            for (const auto& [text, id] : lost) { decoder.erase(std::to_string(id)); }
        }
        for (auto& key : drop_lost(*content, lost)) { dropped.insert(std::move(key)); }
        files[name] = dumped(*content);
    }
    if (auto content = read_object<large_json>(folder / "added_tokens.json")) {
        for (const auto& [text, id] : added) { (*content)[text] = id; }
        for (const auto& [text, id] : lost) { content->erase(text); }
        files["added_tokens.json"] = dumped(*content);
    }
    for (const auto& key : dropped) { note(run, "the tokenizer's " + key + " is left out: its token is no more"); }
    if (model_changes) { leave_slow_files_out(files, folder, run); }
    return files;
}

std::vector<std::string> lined_up_vocabulary::drop_lost_ids(std::string& config) const
{
    std::vector<std::string> keys;
    if (!changed_ || policy_ != vocabulary_policy::truncate) { return keys; }
    const auto rows = rows_of(tensors_.front(), *models_.front().find(tensors_.front()));
    auto content = json::parse(taskvec::quoted_constants(config), nullptr, false);
    if (!content.is_object()) { return keys; }
    const auto lost = [&](const json& id) { return id.is_number_unsigned() && id.get<std::uint64_t>() >= rows; };
    const std::function<void(json&)> look = [&](json& part) {
        for (auto& [key, value] : part.items()) {
            if (value.is_object()) { look(value); }
            if (!key.ends_with("_token_id")) { continue; }
            if (lost(value)) {
                value = nullptr;
                keys.push_back(key);
            }
            else if (value.is_array()) {
                auto list = json::array();
                for (const auto& id : value) {
                    if (!lost(id)) { list.push_back(id); }
                }
                if (list.size() == value.size()) { continue; }
                value = list.empty() ? json(nullptr) : std::move(list);
                keys.push_back(key);
            }
        }
    };
    look(content);
    if (!keys.empty()) { config = taskvec::restored_constants(dumped(content)); }
    return keys;
}

} // namespace tool
