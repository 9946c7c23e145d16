// Tokenizers' files beside models, and what tokenizer.json says of tokens.
// SPDX-License-Identifier: Apache-2.0
#include "tokenizers.hpp"

#include "runner.hpp"
#include "words.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstring>
#include <utility>

namespace tool {

void refuse_tokenizer(const fs::path& tokenizer, const std::string& what)
{
    taskvec::raise<taskvec::format_error>(taskvec::error_code::tokenizer, what, tokenizer.string());
}

fs::path tokenizer_of(const fs::path& model)
{
    std::error_code ignored;
    const bool folder = fs::is_directory(model, ignored);
    const auto name = model.filename().string();
    if (!folder && name != "model.safetensors" && !name.starts_with("pytorch_model.") && !name.ends_with(".json")) {
        return {};
    }
    const auto file = (folder ? model : model.parent_path()) / tokenizer_name;
    return fs::is_regular_file(file, ignored) ? file : fs::path();
}

namespace {

/// Hears of a tokenizer.json what token_table holds, and, where somebody listens, merges.
class token_events final : public nlohmann::json_sax<nlohmann::json> {
public:
    using merge_listener = std::function<void(const std::string& left, const std::string& right)>;

    token_events(const fs::path& file, token_table& table, merge_listener merge = {})
        : file_(file)
        , table_(table)
        , merge_(std::move(merge))
    { }

    bool null() override { return next(); }
    bool boolean(bool value) override
    {
        if (in_added()) {
            const auto& key = stack_[2].key;
            if (key == "single_word") { token_.single_word = value; }
            if (key == "lstrip") { token_.lstrip = value; }
            if (key == "rstrip") { token_.rstrip = value; }
            if (key == "normalized") { token_.normalized = value; }
            if (key == "special") { token_.special = value; }
        }
        return next();
    }
    bool number_integer(number_integer_t value) override
    {
        if (value < 0 && (in_vocabulary() || (in_added() && stack_[2].key == "id"))) {
            refuse_tokenizer(file_, taskvec::message("gives a token the id ", value, "; ids count from 0"));
        }
        return value < 0 ? next() : number_unsigned(static_cast<number_unsigned_t>(value));
    }
    bool number_unsigned(number_unsigned_t value) override
    {
        if (in_vocabulary()) { add(stack_[2].key, value); }
        if (in_added() && stack_[2].key == "id") {
            token_.id = id_of(token_.content, value);
            has_id_ = true;
        }
        return next();
    }
    bool number_float(number_float_t, const string_t&) override { return next(); }
    bool string(string_t& value) override
    {
        if (in_added() && stack_[2].key == "content") { token_.content = value; }
        if (stack_.size() == 2 && stack_[0].key == "model" && stack_[1].key == "type") { table_.model = value; }
        const bool listed = stack_.size() == 4 && stack_[3].array && within_model("vocab");
        if (listed && stack_[2].array && stack_[3].index == 0) { add(value, stack_[2].index); } // Unigram
        if (merge_ && stack_.size() >= 3 && stack_[2].array && within_model("merges")) {
            if (stack_.size() == 3) {
                const auto space = value.find(' ', 1);
                if (space != value.npos) { merge_(value.substr(0, space), value.substr(space + 1)); }
            }
            else if (stack_[3].index == 0) {
                left_ = value;
            }
            else {
                merge_(left_, value);
            }
        }
        return next();
    }
    bool binary(binary_t&) override { return next(); }
    bool start_object(std::size_t) override { return open(false); }
    bool start_array(std::size_t) override { return open(true); }
    bool end_object() override
    {
        if (in_added()) {
            if (!has_id_) { refuse_tokenizer(file_, "has an entry of added_tokens without an id"); }
            add(token_.content, token_.id);
            table_.added[token_.content] = token_;
        }
        return close();
    }
    bool end_array() override { return close(); }
    bool key(string_t& value) override
    {
        stack_.back().key = std::move(value);
        return true;
    }
    bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override
    {
        taskvec::raise<taskvec::format_error>(taskvec::error_code::json_syntax,
            taskvec::message("invalid JSON at byte ", position ? position - 1 : 0), file_.string());
    }

private:
    struct level {
        bool array = false;
        std::string key; ///< the last one, of an object
        std::size_t index = 0; ///< of the next element, of an array
    };
    [[nodiscard]] bool within_model(std::string_view part) const
    {
        return stack_[0].key == "model" && stack_[1].key == part;
    }
    [[nodiscard]] bool in_vocabulary() const { return stack_.size() == 3 && !stack_[2].array && within_model("vocab"); }
    [[nodiscard]] bool in_added() const
    {
        return stack_.size() == 3 && !stack_[2].array && stack_[1].array && stack_[0].key == "added_tokens";
    }
    bool next()
    {
        if (!stack_.empty()) { ++stack_.back().index; }
        return true;
    }
    bool open(bool array)
    {
        if (stack_.size() > 100) { refuse_tokenizer(file_, "is nested more than 100 levels deep"); }
        stack_.push_back({array, {}, 0});
        if (in_added()) {
            token_ = {};
            has_id_ = false;
        }
        return true;
    }
    bool close()
    {
        stack_.pop_back();
        return next();
    }
    [[nodiscard]] std::uint32_t id_of(const std::string& text, std::uint64_t id) const
    {
        if (id >= (1u << 28)) {
            refuse_tokenizer(
                file_, taskvec::message("gives token '", printable(text), "' the id ", id, ", which no embedding has"));
        }
        return static_cast<std::uint32_t>(id);
    }
    void add(const std::string& text, std::uint64_t number)
    {
        const auto id = id_of(text, number);
        const auto [place, is_new] = table_.ids.emplace(text, id);
        if (!is_new) {
            if (place->second == id) { return; }
            refuse_tokenizer(
                file_, taskvec::message("gives token '", printable(text), "' two ids, ", place->second, " and ", id));
        }
        const auto [other, id_is_new] = table_.texts.emplace(id, &place->first);
        if (!id_is_new) {
            refuse_tokenizer(file_,
                taskvec::message("gives the id ", id, " to two tokens, '", printable(*other->second), "' and '",
                    printable(text), "'"));
        }
    }

    const fs::path& file_;
    token_table& table_;
    merge_listener merge_;
    std::vector<level> stack_;
    added_token token_;
    std::string left_;
    bool has_id_ = false;
};

void hear(const fs::path& file, token_events& events)
{
    const auto map = open_watched(file);
    const auto bytes = map.bytes();
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    taskvec::refuse_other_kinds(text, file.string());
    (void)nlohmann::json::sax_parse(text.begin(), text.end(), &events);
}

} // namespace

std::vector<fs::path> tokenizer_files_in(const fs::path& directory)
{
    std::vector<fs::path> files;
    const auto add = [&](const char* name) {
        std::error_code ignored;
        if (fs::is_regular_file(directory / name, ignored)) { files.push_back(directory / name); }
    };
    for (const char* name : {tokenizer_name, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "chat_template.jinja"}) {
        add(name);
    }
    for (const char* name : slow_tokenizer_names) { add(name); }
    return files;
}

const std::string* token_table::text(std::uint64_t id) const
{
    if (id >= (1u << 28)) { return nullptr; }
    const auto place = texts.find(static_cast<std::uint32_t>(id));
    return place == texts.end() ? nullptr : place->second;
}

token_table read_tokens(const fs::path& tokenizer)
{
    token_table table;
    token_events events(tokenizer, table);
    hear(tokenizer, events);
    if (table.ids.empty()) {
        refuse_tokenizer(tokenizer, "names no token: it has neither model.vocab nor added_tokens");
    }
    return table;
}

void each_merge(const fs::path& tokenizer, const std::function<void(const std::string&, const std::string&)>& f)
{
    token_table unused;
    token_events events(tokenizer, unused, f);
    hear(tokenizer, events);
}

bool glance_finds_rows(const fs::path& tokenizer, std::uint64_t rows)
{
    const auto map = open_watched(tokenizer);
    const auto bytes = map.bytes();
    const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    std::uint64_t pieces = 0;
    char last = ' ', before = ' '; // of what is no white space; a text is its quote
    const auto step = [&](char c) {
        before = last;
        last = c;
    };
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '"') {
            for (++i; i < text.size() && text[i] != '"'; ++i) { i += text[i] == '\\' ? 1u : 0u; }
            step(c);
        }
        else if (c == '-' || (c >= '0' && c <= '9')) {
            std::uint64_t number = 0;
            for (; i < text.size() && text[i] >= '0' && text[i] <= '9'; ++i) {
                number = std::min<std::uint64_t>(number * 10 + static_cast<std::uint64_t>(text[i] - '0'), 1ull << 60);
            }
            if (last == ':' && number >= rows) { return false; }
            if (last == ',' && before == '"' && ++pieces > rows) { return false; }
            const auto rest = text.find_first_not_of("-+.eE0123456789", i);
            i = (rest == text.npos ? text.size() : rest) - 1;
            step('0');
        }
        else if (c != ' ' && c != '\n' && c != '\r' && c != '\t') {
            step(c);
        }
    }
    return true;
}

bool equal_files(const fs::path& a, const fs::path& b)
{
    const auto first = open_watched(a), second = open_watched(b);
    const auto x = first.bytes(), y = second.bytes();
    return x.size() == y.size() && (x.empty() || std::memcmp(x.data(), y.data(), x.size()) == 0);
}

} // namespace tool
