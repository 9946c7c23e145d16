// Values of a configuration in YAML.
// SPDX-License-Identifier: Apache-2.0
#include "config_values.hpp"

#include "names.hpp"
#include "words.hpp"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <iterator>
#include <map>
#include <set>
#include <string_view>
#include <system_error>

namespace tool::configuration {

std::string shown(const std::string& text)
{
    return printable(text.size() > 80 ? text.substr(0, 80) : text) + (text.size() > 80 ? "…" : "");
}

std::string kind_of(const YAML::Node& node)
{
    return node.IsMap()     ? "a mapping"
        : node.IsSequence() ? "a list"
        : node.IsNull()     ? "nothing"
                            : "'" + shown(node.Scalar()) + "'";
}

namespace {

/// Letters to change, add or leave out between two words.
std::size_t edits_between(std::string_view a, std::string_view b)
{
    std::vector<std::size_t> row(b.size() + 1), next(b.size() + 1);
    for (std::size_t j = 0; j <= b.size(); ++j) { row[j] = j; }
    for (std::size_t i = 1; i <= a.size(); ++i) {
        next[0] = i;
        for (std::size_t j = 1; j <= b.size(); ++j) {
            next[j] = std::min({row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
        }
        row.swap(next);
    }
    return row.back();
}

/// Whether one may be written for the other: few edits, or one within the other.
bool is_like(const std::string& word, const std::string& name)
{
    constexpr std::size_t longest = 100, part = 4;
    if (word.size() > longest) { return false; }
    const bool within =
        (word.size() >= part && name.find(word) != name.npos) || (name.size() >= part && word.find(name) != word.npos);
    return within || edits_between(word, name) <= std::max<std::size_t>(1, std::min(word.size(), name.size()) / 3);
}

/// Whether a scalar is a text whatever it looks like: in quotes, as a block, or tagged as one.
bool is_text(const YAML::Node& node)
{
    return node.Tag() == "!" || node.Tag() == "tag:yaml.org,2002:str";
}

} // namespace

std::string meant(const std::string& word, const std::vector<std::string>& known)
{
    std::vector<std::string> alike;
    std::copy_if(known.begin(), known.end(), std::back_inserter(alike),
        [&](const std::string& name) { return is_like(word, name); });
    const auto like = closest_name(word, alike);
    if (!like.empty()) { return "; did you mean '" + like + "'?"; }
    std::string text;
    for (const auto& name : known) { text += (text.empty() ? "; expected " : ", ") + name; }
    return text;
}

mapping::mapping(const place& where, const YAML::Node& node, const std::string& what)
    : node_(node)
{
    if (!node.IsMap()) { where.fail(node, what + " is " + kind_of(node) + "; expected a mapping"); }
    std::set<std::string> seen;
    taken_.insert(node.Mark().pos);
    add(where, node, what, seen, 0);
}

mapping::mapping(
    const place& where, const YAML::Node& node, const std::string& what, const std::vector<std::string>& known)
    : mapping(where, node, what)
{
    for (const auto& one : entries_) {
        if (!std::count(known.begin(), known.end(), one.name)) {
            where.fail(one.key, "'" + shown(one.name) + "' is no key of " + what + meant(one.name, known));
        }
    }
}

void mapping::add(
    const place& where, const YAML::Node& node, const std::string& what, std::set<std::string>& seen, std::size_t depth)
{
    constexpr std::size_t deepest = 16, most = 200;
    const auto too_many = [&] { where.fail(node, what + " takes over too many others ('<<')"); };
    if (depth > deepest) { too_many(); }
    std::set<std::string> own;
    std::vector<YAML::Node> others;
    for (const auto& pair : node) {
        if (!pair.first.IsScalar()) { where.fail(pair.first, "a key is " + kind_of(pair.first)); }
        const auto key = pair.first.Scalar();
        if (!own.insert(key).second) { where.fail(pair.first, "'" + shown(key) + "' stands twice in " + what); }
        if (key == "<<" && !is_text(pair.first)) {
            if (pair.second.IsSequence()) {
                for (const auto& one : pair.second) { others.push_back(one); }
            }
            else {
                others.push_back(pair.second);
            }
        }
        else if (seen.insert(key).second) {
            entries_.push_back({key, pair.first, pair.second});
        }
    }
    for (const auto& other : others) {
        if (!other.IsMap()) { where.fail(other, "'<<' in " + what + " is " + kind_of(other) + "; expected a mapping"); }
        if (++others_ > most) { too_many(); }
        if (taken_.insert(other.Mark().pos).second) { add(where, other, what, seen, depth + 1); }
    }
}

const mapping& mappings::at(
    const place& where, const YAML::Node& node, const std::string& what, const std::vector<std::string>& known)
{
    const std::pair key(what, node.Mark().pos);
    if (const auto place = read_.find(key); place != read_.end()) { return place->second; }
    return read_.emplace(key, known.empty() ? mapping(where, node, what) : mapping(where, node, what, known))
        .first->second;
}

std::string scalar_of(const place& where, const YAML::Node& node, const std::string& what)
{
    if (!node.IsScalar()) { where.fail(node, what + " is " + kind_of(node) + "; expected one word"); }
    if (node.Scalar().find('\0') != std::string::npos) {
        where.fail(node, what + " is " + kind_of(node) + ", which has a NUL in it; expected a text without");
    }
    return node.Scalar();
}

namespace {

/// Without each `_` that stands between digits.
std::string without_separators(const std::string& given)
{
    const auto is_digit = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0; };
    std::string text;
    for (std::size_t i = 0; i < given.size(); ++i) {
        const bool between =
            given[i] == '_' && i > 0 && i + 1 < given.size() && is_digit(given[i - 1]) && is_digit(given[i + 1]);
        if (!between) { text += given[i]; }
    }
    return text;
}

/// All of a text as a number; `how`: std::from_chars' base, where it has one.
template <class Number, class... Base>
std::optional<Number> whole_text(std::string_view text, Base... how)
{
    Number value{};
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value, how...);
    if (failure != std::errc{} || end != text.data() + text.size()) { return std::nullopt; }
    return value;
}

/// Digits that begin with 0 and are not decimal: 0x10, 0b11 and 010. Nothing for others.
std::optional<int> base_of(std::string_view digits)
{
    if (digits.size() < 2 || digits[0] != '0') { return std::nullopt; }
    if (digits[1] == 'x') { return 16; }
    if (digits[1] == 'b') { return 2; }
    return digits.find_first_not_of("01234567") == digits.npos ? std::optional(8) : std::nullopt;
}

} // namespace

std::optional<double> parse_number(const YAML::Node& node)
{
    constexpr std::string_view space = " \t\r\n"; // around a number in quotes or a block
    std::string_view given = node.Scalar();
    given.remove_prefix(std::min(given.find_first_not_of(space), given.size()));
    given.remove_suffix(given.size() - (given.find_last_not_of(space) + 1));
    const auto text = without_separators(std::string(given));
    const double sign = text.starts_with('-') ? -1.0 : 1.0;
    std::string_view digits = text;
    if (text.starts_with('-') || text.starts_with('+')) { digits.remove_prefix(1); }
    if (digits.empty() || digits[0] == '-' || digits[0] == '+') { return std::nullopt; }
    const bool in_tens = is_text(node) || node.Tag() == "tag:yaml.org,2002:float";
    if (const auto base = in_tens ? std::nullopt : base_of(digits)) {
        const auto whole = whole_text<std::uint64_t>(digits.substr(*base == 8 ? 0 : 2), *base);
        return whole ? std::optional(sign * static_cast<double>(*whole)) : std::nullopt;
    }
    const auto value = whole_text<double>(digits);
    return value && std::isfinite(*value) ? std::optional(sign * *value) : std::nullopt;
}

double number_of(const place& where, const YAML::Node& node, const std::string& what)
{
    const auto text = scalar_of(where, node, what);
    const auto value = parse_number(node);
    if (!value) { where.fail(node, what + " is '" + shown(text) + "'; expected a number"); }
    return *value;
}

std::uint64_t whole_of(const place& where, const YAML::Node& node, const std::string& what, std::uint64_t most)
{
    const auto number = number_of(where, node, what);
    if (!(number >= 0 && number <= static_cast<double>(most) && std::floor(number) == number)) {
        where.fail(
            node, taskvec::message(what, " is ", shown(node.Scalar()), "; expected a whole number, at most ", most));
    }
    return static_cast<std::uint64_t>(number);
}

std::optional<bool> parse_truth(const YAML::Node& node)
{
    const auto text = lower_case(node.Scalar());
    for (const auto* word : {"true", "yes", "on"}) {
        if (text == word) { return true; }
    }
    for (const auto* word : {"false", "no", "off"}) {
        if (text == word) { return false; }
    }
    return std::nullopt;
}

double number_or_truth_of(const place& where, const YAML::Node& node, const std::string& what)
{
    if (const auto truth = parse_truth(node)) { return *truth ? 1.0 : 0.0; }
    return number_of(where, node, what);
}

bool truth_of(const place& where, const YAML::Node& node, const std::string& what)
{
    const auto text = scalar_of(where, node, what);
    if (const auto truth = parse_truth(node)) { return *truth; }
    if (const auto number = parse_number(node)) { return *number != 0; } // as mergekit has written them: 1.0
    where.fail(node, what + " is '" + shown(text) + "'; expected true or false");
}

namespace {

/// A value beside the filter of the tensors that it is for.
setting setting_of(const place& where, const YAML::Node& node, const std::string& name)
{
    const mapping part(where, node, "a value of '" + name + "'", {"filter", "value"});
    const auto value = part.find("value");
    if (!value) { where.fail(node, "'" + name + "': a filter without a 'value'"); }
    setting made{"", value->value};
    if (const auto filter = part.find("filter")) {
        made.filter = scalar_of(where, filter->value, "the filter");
        if (made.filter == "*") { made.filter.clear(); }
    }
    return made;
}

/// Refuses what is neither a scalar nor a list of them.
void check_value(const place& where, const YAML::Node& value, const std::string& name)
{
    if (value.IsScalar()) { return; }
    if (!value.IsSequence() || value.size() == 0) {
        where.fail(value,
            "'" + name + "' is " + (value.IsSequence() ? "an empty list" : kind_of(value))
                + "; expected a value, a list of numbers over the layers, or a list of filters with values");
    }
    constexpr std::size_t most = 1000;
    if (value.size() > most) {
        where.fail(value,
            taskvec::message(
                "'", name, "' is a list of ", value.size(), " numbers over the layers; expected at most ", most));
    }
    for (const auto& number : value) {
        if (!number.IsScalar()) {
            where.fail(number, "'" + name + "' has " + kind_of(number) + " in a list of numbers");
        }
    }
}

} // namespace

std::vector<setting> settings_of(const place& where, const YAML::Node& node, const std::string& name)
{
    std::vector<setting> result;
    std::map<int, setting> read; // aliases: each is read, and looked at, once
    std::set<int> checked;
    const auto check = [&](const YAML::Node& value) {
        if (checked.insert(value.Mark().pos).second) { check_value(where, value, name); }
    };
    const auto add = [&](const YAML::Node& one) {
        auto place = read.find(one.Mark().pos);
        if (place == read.end()) {
            place = read.emplace(one.Mark().pos, setting_of(where, one, name)).first;
            check(place->second.value);
        }
        result.push_back(place->second);
    };
    if (node.IsMap()) { add(node); }
    else if (node.IsSequence() && node.size() > 0 && node[0].IsMap()) {
        for (const auto& one : node) { add(one); }
    }
    else {
        check(node);
        result.push_back({"", node});
    }
    return result;
}

std::vector<YAML::Node> scalars_of(const YAML::Node& value)
{
    if (value.IsScalar()) { return {value}; }
    std::vector<YAML::Node> all;
    for (const auto& one : value) { all.push_back(one); }
    return all;
}

std::string escaped(const std::string& text)
{
    std::string pattern;
    for (const char c : text) {
        if (std::string_view("^$\\.*+?()[]{}|").find(c) != std::string_view::npos) { pattern += '\\'; }
        pattern += c;
    }
    return pattern;
}

} // namespace tool::configuration
