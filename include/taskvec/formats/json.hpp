// JSON read strictly: UTF-8 only, no repeated keys, bounded depth, nothing after the value; and JSON strings written.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/formats/file_kind.hpp>

#if !__has_include(<nlohmann/json.hpp>)
#error "this header of taskvec needs nlohmann_json 3.10 or later (Debian: nlohmann-json3-dev)"
#include "taskvec: the error above ends the compilation"
#endif
#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The most values that a JSON file may have, which take a hundred times its bytes in memory.
inline constexpr std::size_t json_value_limit = 2'000'000;
/// The deepest nesting that a JSON file may have: the reference safetensors reader's limit.
inline constexpr std::size_t json_depth_limit = 127;

namespace detail {

/// Feeds `events`, a nlohmann SAX handler with a `fail(message)` for syntax errors, with one JSON text.
/// What nlohmann's lexer allows and JSON does not (a byte order mark, text that ends at a NUL) is a syntax error here.
template <class Events>
bool sax_parse_strictly(std::string_view text, Events& events)
{
    if (text.starts_with("\xef\xbb\xbf")) { return events.fail("begins with a byte order mark; JSON has none", 0); }
    if (const auto nul = text.find('\0'); nul != text.npos) {
        return events.fail("holds a NUL byte, which JSON never has", nul);
    }
    return nlohmann::json::sax_parse(text.begin(), text.end(), &events);
}

/// Shortens nlohmann's "[json.exception.parse_error.101] parse error at line 1, column 5: …" to what a reader needs:
/// without the name, and of what it was reading (a number may have millions of digits) the beginning and the end.
[[nodiscard]] inline std::string syntax_message(const char* what)
{
    std::string text = what;
    if (const auto end = text.find("] "); text.starts_with('[') && end != text.npos) { text.erase(0, end + 2); }
    constexpr std::size_t part = 200;
    if (text.size() > 3 * part) { text.replace(part, text.size() - 2 * part, "…"); }
    return text;
}

/// Builds a json value, refusing what the header of this file lists.
class json_builder final : public nlohmann::json_sax<nlohmann::json> {
public:
    json_builder(std::string_view file, std::uint64_t offset)
        : file_(file)
        , offset_(offset)
    { }
    [[nodiscard]] nlohmann::json take() { return std::move(root_); }
    [[noreturn]] bool fail(const std::string& what, std::uint64_t position)
    {
        raise<format_error>(error_code::json_syntax, message("invalid JSON at byte ", offset_ + position, ": ", what),
            file_, offset_ + position);
    }

    bool null() override { return value(nullptr); }
    bool boolean(bool x) override { return value(x); }
    bool number_integer(number_integer_t x) override { return value(x); }
    bool number_unsigned(number_unsigned_t x) override { return value(x); }
    bool number_float(number_float_t x, const string_t&) override { return value(x); }
    bool string(string_t& x) override { return value(std::move(x)); }
    bool binary(binary_t&) override { fail("binary value", 0); }
    bool start_object(std::size_t) override { return open(nlohmann::json::object()); }
    bool start_array(std::size_t) override { return open(nlohmann::json::array()); }
    bool end_object() override { return close(); }
    bool end_array() override { return close(); }
    bool key(string_t& x) override
    {
        if (stack_.back()->contains(x)) {
            raise<format_error>(error_code::json_key_repeated, message("key '", x, "' occurs twice in one JSON object"),
                file_, offset_);
        }
        key_ = std::move(x);
        return true;
    }
    bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& ex) override
    {
        fail(syntax_message(ex.what()), position ? position - 1 : 0);
    }

private:
    nlohmann::json* place(nlohmann::json x)
    {
        if (++values_ > json_value_limit) {
            raise<format_error>(error_code::json_syntax,
                message("JSON of more than ", json_value_limit, " values, which is no configuration or index"), file_,
                offset_);
        }
        if (stack_.empty()) { return &(root_ = std::move(x)); }
        auto& parent = *stack_.back();
        if (parent.is_array()) {
            parent.push_back(std::move(x));
            return &parent.back();
        }
        return &(parent[key_] = std::move(x));
    }
    template <class X>
    bool value(X&& x)
    {
        place(nlohmann::json(std::forward<X>(x)));
        return true;
    }
    bool open(nlohmann::json x)
    {
        if (stack_.size() == json_depth_limit) {
            raise<format_error>(error_code::json_syntax,
                message("JSON is nested deeper than ", json_depth_limit, " levels"), file_, offset_);
        }
        stack_.push_back(place(std::move(x)));
        return true;
    }
    bool close()
    {
        stack_.pop_back();
        return true;
    }

    std::string file_;
    std::uint64_t offset_;
    nlohmann::json root_;
    std::size_t values_ = 0;
    std::vector<nlohmann::json*> stack_;
    std::string key_;
};

} // namespace detail

/// Refuses a whole file that stands where JSON should and is something else that is known: a Git LFS pointer, a page of
/// HTML, an archive. Throws format_error with its name and the way on.
inline void refuse_other_kinds(std::string_view text, std::string_view file)
{
    const auto first = text.find_first_not_of(" \t\r\n");
    if (is_lfs_pointer(text) || text.starts_with("PK\x03\x04") || (first != text.npos && text[first] == '<')) {
        if (const auto kind = what_is_this_file(std::as_bytes(std::span(text)))) {
            raise<format_error>(error_code::json_syntax, kind->sentence(), std::string(file));
        }
    }
}

/// The JSON value that `text` holds, read strictly; anything else is a format_error that names `file` and the byte, or
/// what the file is instead. `offset` is where the text begins in the file.
[[nodiscard]] inline nlohmann::json parse_json(std::string_view text, std::string_view file, std::uint64_t offset = 0)
{
    if (offset == 0) { refuse_other_kinds(text, file); }
    detail::json_builder builder(file, offset);
    detail::sax_parse_strictly(text, builder);
    return builder.take();
}

namespace detail {

inline constexpr std::string_view python_constants[] = {"-Infinity", "Infinity", "NaN"};

} // namespace detail

/// Text in which NaN, Infinity and -Infinity, which are no JSON and which Python writes, are strings that no file has:
/// their names behind a control character. restored_constants() turns what is written of it back.
[[nodiscard]] inline std::string quoted_constants(std::string_view text)
{
    std::string result;
    bool in_string = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (in_string) {
            result += c;
            if (c == '\\' && i + 1 < text.size()) { result += text[++i]; }
            in_string = c != '"';
            continue;
        }
        in_string = c == '"';
        std::string_view found;
        for (const std::string_view word : detail::python_constants) {
            if (found.empty() && text.substr(i).starts_with(word)) { found = word; }
        }
        if (found.empty()) {
            result += c;
            continue;
        }
        result.append("\"\\u0001").append(found).append("\"");
        i += found.size() - 1;
    }
    return result;
}
/// Text in which python_constants' stand-ins are the constants again.
[[nodiscard]] inline std::string restored_constants(std::string text)
{
    for (const std::string_view word : detail::python_constants) {
        std::string quoted = "\"\\u0001";
        quoted.append(word).append("\"");
        for (std::size_t at = 0; (at = text.find(quoted, at)) != text.npos; at += word.size()) {
            text.replace(at, quoted.size(), word);
        }
    }
    return text;
}

/// The JSON of a configuration as Python writes it: parse_json() of quoted_constants().
[[nodiscard]] inline nlohmann::json parse_configuration(std::string_view text, std::string_view file)
{
    return parse_json(quoted_constants(text), file);
}

/// True when `text` is well-formed UTF-8: no overlong form, no surrogate, nothing above U+10FFFF.
[[nodiscard]] constexpr bool is_utf8(std::string_view text) noexcept
{
    for (std::size_t i = 0; i < text.size();) {
        const auto byte = [&](std::size_t k) {
            return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u;
        };
        const auto tail = [&](std::size_t k) { return (byte(k) & 0xc0u) == 0x80u; };
        const unsigned lead = byte(0);
        if (lead < 0x80u) { i += 1; }
        else if (lead >= 0xc2u && lead <= 0xdfu && tail(1)) {
            i += 2;
        }
        else if (lead >= 0xe0u && lead <= 0xefu && tail(1) && tail(2) && !(lead == 0xe0u && byte(1) < 0xa0u)
            && !(lead == 0xedu && byte(1) > 0x9fu)) {
            i += 3;
        }
        else if (lead >= 0xf0u && lead <= 0xf4u && tail(1) && tail(2) && tail(3) && !(lead == 0xf0u && byte(1) < 0x90u)
            && !(lead == 0xf4u && byte(1) > 0x8fu)) {
            i += 4;
        }
        else {
            return false;
        }
    }
    return true;
}

/// `text` as a JSON string with its quotes, escaped as the reference safetensors writer escapes: quotes, backslashes
/// and control characters only. Text that is not UTF-8 is an invalid_argument.
[[nodiscard]] inline std::string json_string(std::string_view text)
{
    if (!is_utf8(text)) {
        raise<invalid_argument>(
            error_code::unwritable, message("'", text, "' is not UTF-8 and cannot be written to a file"));
    }
    std::string result = "\"";
    for (const char c : text) {
        switch (c) {
        case '"': result += "\\\""; break;
        case '\\': result += "\\\\"; break;
        case '\b': result += "\\b"; break;
        case '\f': result += "\\f"; break;
        case '\n': result += "\\n"; break;
        case '\r': result += "\\r"; break;
        case '\t': result += "\\t"; break;
        default:
            if (static_cast<unsigned char>(c) < 0x20u) {
                constexpr char digits[] = "0123456789abcdef";
                result += "\\u00";
                result += digits[static_cast<unsigned char>(c) >> 4];
                result += digits[static_cast<unsigned char>(c) & 15];
            }
            else {
                result += c;
            }
        }
    }
    return result += '"';
}

/// The text under a key of an object; empty where there is none.
[[nodiscard]] inline std::string text_under(const nlohmann::json& object, std::string_view key)
{
    const auto place = object.find(key);
    return place != object.end() && place->is_string() ? place->get<std::string>() : std::string();
}

/// Whether an object says `true` under a key.
[[nodiscard]] inline bool flag_under(const nlohmann::json& object, std::string_view key)
{
    const auto place = object.find(key);
    return place != object.end() && place->is_boolean() && place->get<bool>();
}

} // namespace taskvec::inline TASKVEC_ABI
