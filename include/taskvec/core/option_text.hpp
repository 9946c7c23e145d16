// Options as text: read from a command line or a configuration, written to a report, listed for help and reference
// pages. All of it from the tables of core/option_table.hpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/option_range.hpp>
#include <taskvec/core/option_table.hpp>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What kind of value an option holds.
enum class option_kind : std::uint8_t { truth, number, whole_number, word, numbers };

/// A row of a table, without its types.
struct option_description {
    std::string name, meaning, unit; ///< as in the row
    option_kind kind = option_kind::number; ///< of its values
    std::string initial; ///< the default, as write_option() writes it
    std::string expected; ///< "a number above 0 and up to 1", "one of: model, tensor"
    std::string negated; ///< of a truth that is on by default: the name that turns it off
    std::vector<std::string> words{}; ///< that it takes, where it takes words
    option_axis axis{}; ///< what a sweep tries
    bool per_task = false; ///< a list with an entry for each task
    std::string each_of{}; ///< of a list for the tasks: "weight", or the row that holds for all of them
    bool is_preset = false; ///< chooses a set of values for others: the words name the presets
};

/// A value as read_option() reads it: the shortest decimal that gives the same number, a word, true or false, numbers
/// separated by commas.
template <describable_value Value>
[[nodiscard]] std::string write_option(const Value& value);

/// Reads a value for a row: the whole text, in the row's range. Numbers as "0.2", "1e-6", "+3"; truths as true or
/// false, yes or no, on or off, 1 or 0; lists as "1,0.5". `label` begins messages. Errors: invalid_argument, one
/// sentence that says what was found and what is expected.
///
///     read_option(row, "0.2", "density")   // 0.2;  "20%": density is '20%'; expected a number above 0 and up to 1
template <class Options, class Value>
[[nodiscard]] Value read_option(const option_row<Options, Value>& row, std::string_view text, std::string_view label);

/// Sets the member whose row, or whose preset option, has this name. False where there is none. Setting a preset sets
/// all members that it belongs to: presets come first. `label`: as for read_option(); empty: the name.
///
///     set_option(options, "density", "0.2");
template <described_options Options>
bool set_option(Options& options, std::string_view name, std::string_view text, std::string_view label = {});

/// The rows of a struct, those of inner structs in their places, presets after them.
///
///     for (const auto& option : describe_options<ties_options>()) { std::cout << option.name << …; }
template <class Options>
[[nodiscard]] std::vector<option_description> describe_options();

namespace detail {

/// A decimal number that is the whole text; a sign of either kind may stand before it.
[[nodiscard]] inline std::optional<double> read_number(std::string_view text)
{
    if (text.size() > 1 && text[0] == '+' && text[1] != '-') { text.remove_prefix(1); }
    double value = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || failure != std::errc{} || end != text.data() + text.size()) { return std::nullopt; }
    return value;
}
[[nodiscard]] inline std::optional<std::uint64_t> read_whole_number(std::string_view text)
{
    std::uint64_t value = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || failure != std::errc{} || end != text.data() + text.size()) { return std::nullopt; }
    return value;
}

template <class Words>
[[nodiscard]] std::string list_text(const Words& words)
{
    std::string text = "one of: ";
    for (const auto& word : words) { text += (text.size() == 8 ? "" : ", ") + std::string(word); }
    return text;
}

template <worded_enum Enum>
[[nodiscard]] std::vector<std::string> words_of()
{
    std::vector<std::string> words;
    for (const auto& [value, word] : enum_words<Enum>::words) { words.emplace_back(word); }
    return words;
}

template <class Value>
[[nodiscard]] constexpr option_kind kind_of()
{
    static_assert(describable_value<Value>,
        "taskvec: a member of this type cannot stand in a table of options: bool, numbers, enumerations with words "
        "(enum_words) and vectors of double can");
    if constexpr (std::same_as<Value, bool>) { return option_kind::truth; }
    else if constexpr (std::floating_point<Value>) {
        return option_kind::number;
    }
    else if constexpr (std::unsigned_integral<Value>) {
        return option_kind::whole_number;
    }
    else if constexpr (std::is_enum_v<Value>) {
        return option_kind::word;
    }
    else {
        return option_kind::numbers;
    }
}

template <class Value>
[[nodiscard]] std::string expected_text(const option_details& details)
{
    constexpr auto kind = kind_of<Value>();
    if constexpr (kind == option_kind::truth) { return "true or false"; }
    else if constexpr (kind == option_kind::number) {
        return range_text(details, "a number");
    }
    else if constexpr (kind == option_kind::whole_number) {
        return whole_number_text(details, std::numeric_limits<Value>::max());
    }
    else if constexpr (kind == option_kind::word) {
        return list_text(words_of<Value>());
    }
    else {
        return "numbers separated by commas, such as 1,0.5";
    }
}

[[noreturn]] inline void refuse_option(std::string_view label, std::string_view text, const std::string& expected)
{
    const bool plain = read_number(text).has_value();
    raise<invalid_argument>(error_code::option_value,
        message(label, " is ", plain ? "" : "'", text, plain ? "" : "'", "; expected ", expected));
}

} // namespace detail

template <describable_value Value>
[[nodiscard]] std::string write_option(const Value& value)
{
    if constexpr (std::same_as<Value, bool>) { return value ? "true" : "false"; }
    else if constexpr (std::floating_point<Value>) {
        return detail::number_text(static_cast<double>(value));
    }
    else if constexpr (std::unsigned_integral<Value>) {
        return std::to_string(value);
    }
    else if constexpr (std::is_enum_v<Value>) {
        for (const auto& [known, word] : enum_words<Value>::words) {
            if (known == value) { return std::string(word); }
        }
        return {};
    }
    else {
        std::string text;
        for (const double number : value) { text += (text.empty() ? "" : ",") + detail::number_text(number); }
        return text;
    }
}

template <class Options, class Value>
[[nodiscard]] Value read_option(const option_row<Options, Value>& row, std::string_view text, std::string_view label)
{
    constexpr auto kind = detail::kind_of<Value>();
    const auto refuse = [&] { detail::refuse_option(label, text, detail::expected_text<Value>(row.details)); };
    if constexpr (kind == option_kind::truth) {
        for (const char* word : {"true", "yes", "on", "1"}) {
            if (text == word) { return true; }
        }
        for (const char* word : {"false", "no", "off", "0"}) {
            if (text == word) { return false; }
        }
        refuse();
        return false;
    }
    else if constexpr (kind == option_kind::number) {
        const auto value = detail::read_number(text);
        if (!value || !detail::in_range(row.details, *value)) { refuse(); }
        return static_cast<Value>(*value);
    }
    else if constexpr (kind == option_kind::whole_number) {
        const auto value = detail::read_whole_number(text);
        if (!value || *value > std::numeric_limits<Value>::max()
            || !detail::in_range(row.details, static_cast<double>(*value))) {
            refuse();
        }
        return static_cast<Value>(*value);
    }
    else if constexpr (kind == option_kind::word) {
        for (const auto& [value, word] : enum_words<Value>::words) {
            if (word == text) { return value; }
        }
        refuse();
        return {};
    }
    else {
        std::vector<double> values;
        for (std::size_t at = 0; at <= text.size() && !text.empty();) {
            const std::size_t end = std::min(text.find(',', at), text.size());
            const auto value = detail::read_number(text.substr(at, end - at));
            if (!value || !std::isfinite(*value)) { refuse(); }
            values.push_back(*value);
            at = end + 1;
        }
        return values;
    }
}

template <described_options Options>
bool set_option(Options& options, std::string_view name, std::string_view text, std::string_view label)
{
    if (label.empty()) { label = name; }
    bool found = false;
    for_each_preset_list(options, [&](std::string_view option, const auto& presets, auto& target) {
        if (option != name) { return; }
        found = true;
        std::vector<std::string_view> words;
        for (const auto& preset : presets) {
            words.push_back(preset.name);
            if (preset.name == text) {
                target = preset.make();
                return;
            }
        }
        detail::refuse_option(label, text, detail::list_text(words));
    });
    for_each_option(options, [&](const auto& row, auto& member) {
        if (row.name == name) {
            member = read_option(row, text, label);
            found = true;
        }
    });
    return found;
}

template <class Options>
[[nodiscard]] std::vector<option_description> describe_options()
{
    std::vector<option_description> list;
    const Options initial{};
    for_each_option(initial, [&]<class Owner, class Value>(const option_row<Owner, Value>& row, const Value& value) {
        option_description one;
        one.name = row.name;
        one.meaning = row.meaning;
        one.kind = detail::kind_of<Value>();
        one.unit = !row.details.unit.empty()        ? std::string(row.details.unit)
            : one.kind == option_kind::whole_number ? "N"
            : one.kind == option_kind::word         ? "WORD"
                                                    : "X";
        if constexpr (describable_value<Value>) { one.initial = write_option(value); }
        one.expected = detail::expected_text<Value>(row.details);
        one.negated = row.details.negated;
        if constexpr (worded_enum<Value>) { one.words = detail::words_of<Value>(); }
        one.axis = row.details.axis;
        one.per_task = row.per_task;
        one.each_of = row.each_of;
        list.push_back(std::move(one));
    });
    if constexpr (described_options<Options>) {
        for_each_preset_list(initial, [&](std::string_view option, const auto& presets, const auto&) {
            option_description one;
            one.name = option;
            one.meaning = "whose definition to follow";
            one.unit = "WHOSE";
            one.kind = option_kind::word;
            one.is_preset = true;
            for (const auto& preset : presets) { one.words.emplace_back(preset.name); }
            one.initial = one.words.front();
            one.expected = detail::list_text(one.words);
            list.push_back(std::move(one));
        });
    }
    return list;
}

} // namespace taskvec::inline TASKVEC_ABI
