// Python's regular expressions over names of modules, which PEFT's configurations hold.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// A regular expression with the syntax and the meaning of Python's `re`, matched against names of modules: by the set
/// of all places that a part of it can end at, so that nothing is tried twice. Not understood, and refused: what
/// depends on what was matched before (back-references, conditions), what gives up matches (atomic groups, possessive
/// repeats), verbose expressions, characters by name; beyond ASCII, classes such as `\w` and (?i). Expressions have
/// at most 1,000 bytes, names at most 4,096, and a match takes at most a million steps.
///
///     const python_pattern pattern("(?i:q)_proj\\Z", {file, "target_modules is '…'", "list the names instead"});
///     pattern.matches("Q_proj"); // as re.fullmatch()
class python_pattern {
public:
    /// How a refusal is said: "FILE: SUBJECT: why; MEND".
    struct complaint {
        std::string file{}, subject{}, mend{};
    };
    static constexpr std::size_t longest_pattern = 1000, longest_name = 4096, most_steps = 1'000'000;

    /// Throws format_error for what is not understood here, or is no expression to Python.
    python_pattern(const std::string& text, complaint words)
        : words_(std::move(words))
    {
        constexpr std::size_t most_shown = 200;
        if (words_.subject.size() > most_shown) { words_.subject = words_.subject.substr(0, most_shown) + "…'"; }
        if (text.size() > longest_pattern) {
            refuse("it has ", text.size(), " bytes, and at most ", longest_pattern, " are read");
        }
        text_ = decoded(text);
        flags all;
        alternatives_ = read_alternatives(all, 0);
        if (at_ < text_.size()) { refuse_as_python("it has a ')' without a '('"); }
        if (needs_ascii_) { check_ascii(text_, "it"); }
    }
    /// As re.fullmatch(): whether the whole name matches. Throws format_error for a name that takes too long.
    [[nodiscard]] bool matches(std::string_view name) const
    {
        const auto ends = ends_in(name);
        return !ends.first.empty() && ends.first.back() == ends.second;
    }
    /// As re.match(): whether something that the name begins with matches. Throws like matches().
    [[nodiscard]] bool begins(std::string_view name) const { return !ends_in(name).first.empty(); }

private:
    static constexpr std::size_t unlimited = std::numeric_limits<std::size_t>::max();
    struct flags {
        bool any_case = false, dot_all = false, lines = false;
    };
    struct part;
    using sequence = std::vector<part>;
    using places = std::vector<std::size_t>; // ascending
    using ranges = std::vector<std::pair<char32_t, char32_t>>;
    struct part {
        enum what {
            character,
            group,
            repeat,
            ahead,
            behind,
            start,
            line_start,
            text_end,
            end,
            line_end,
            word_edge
        } kind = character;
        bool negated = false, any_case = false;
        ranges of{}; ///< the characters
        std::vector<sequence> inner{}; ///< of groups and looks: alternatives; of a repeat: what it repeats
        std::size_t least = 0, most = 0; ///< of a repeat: counts; of a look-behind: the width
    };
    /// How many characters something is wide.
    struct width {
        std::size_t least = 0, most = 0;
    };

    template <class... Parts>
    [[noreturn]] void refuse(const Parts&... parts) const
    {
        raise<format_error>(error_code::adapter_config,
            message(words_.subject, ": ", message(parts...), "; ", words_.mend), words_.file);
    }
    template <class... Parts>
    [[noreturn]] void refuse_as_python(const Parts&... parts) const
    {
        refuse("no regular expression to Python: ", parts...);
    }
    [[noreturn]] void refuse_unknown(std::string_view what) const { refuse("it has ", what, ", not understood here"); }

    /// The characters of UTF-8; bytes that are none as they are.
    static std::u32string decoded(std::string_view text)
    {
        std::u32string result;
        for (std::size_t at = 0; at < text.size();) {
            const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
            const unsigned char first = byte(at);
            const std::size_t more = first >= 0xF0 && first < 0xF8 ? 3
                : first >= 0xE0 && first < 0xF0                    ? 2
                : first >= 0xC0 && first < 0xE0                    ? 1
                                                                   : 0;
            std::uint32_t value = more == 0 ? first : static_cast<std::uint32_t>(first & (0x3F >> more));
            std::size_t i = 1;
            for (; i <= more && at + i < text.size() && (byte(at + i) & 0xC0) == 0x80; ++i) {
                value = value * 64 + (byte(at + i) & 0x3F);
            }
            const bool whole = i == more + 1;
            result += static_cast<char32_t>(whole ? value : first);
            at += whole ? more + 1 : 1;
        }
        return result;
    }
    void check_ascii(std::u32string_view text, std::string_view what) const
    {
        if (std::any_of(text.begin(), text.end(), [](char32_t c) { return c > 127; })) {
            refuse(what, " has characters beyond ASCII, of which \\d, \\s, \\w, \\b and (?i) are not understood here");
        }
    }

    [[nodiscard]] bool next_is(std::u32string_view text) const
    {
        return std::u32string_view(text_).substr(at_).starts_with(text);
    }
    bool take(std::u32string_view text)
    {
        if (!next_is(text)) { return false; }
        at_ += text.size();
        return true;
    }
    static bool is_digit(char32_t c) { return c >= U'0' && c <= U'9'; }
    static bool is_word(char32_t c)
    {
        return is_digit(c) || c == U'_' || (c >= U'a' && c <= U'z') || (c >= U'A' && c <= U'Z');
    }

    std::vector<sequence> read_alternatives(flags& on, std::size_t depth)
    {
        std::vector<sequence> all;
        do {
            all.push_back(read_sequence(on, depth, depth == 0 && all.empty()));
        } while (take(U"|"));
        return all;
    }
    /// `first`: flags for the whole expression may stand here.
    sequence read_sequence(flags& on, std::size_t depth, bool first)
    {
        sequence parts;
        while (at_ < text_.size() && !next_is(U"|") && !next_is(U")")) {
            if (take(U"(")) {
                read_group(parts, on, depth, first);
                continue;
            }
            if (read_repeat(parts)) { continue; }
            const char32_t c = text_[at_++];
            switch (c) {
            case U'.':
                parts.push_back(on.dot_all ? made(part::character, true) : one_of({{U'\n', U'\n'}}, true, false));
                break;
            case U'^': parts.push_back(made(on.lines ? part::line_start : part::start)); break;
            case U'$': parts.push_back(made(on.lines ? part::line_end : part::end)); break;
            case U'[': parts.push_back(read_class(on)); break;
            case U'\\': parts.push_back(read_escape(on)); break;
            default: parts.push_back(one_of({{c, c}}, false, on.any_case));
            }
        }
        return parts;
    }
    static part made(part::what kind, bool negated = false)
    {
        part one;
        one.kind = kind;
        one.negated = negated;
        return one;
    }
    part one_of(ranges of, bool negated, bool any_case)
    {
        part one;
        one.of = std::move(of);
        one.negated = negated;
        one.any_case = any_case;
        needs_ascii_ = needs_ascii_ || any_case;
        return one;
    }
    /// Behind the parenthesis.
    void read_group(sequence& parts, flags& outer, std::size_t depth, bool first)
    {
        flags on = outer;
        part one = made(part::group);
        if (take(U"?")) {
            if (take(U"#")) {
                const auto close = text_.find(U')', at_);
                if (close == text_.npos) { refuse_as_python("a comment in it does not end"); }
                at_ = close + 1;
                return;
            }
            if (take(U"P<")) {
                const auto close = text_.find(U'>', at_);
                if (close == text_.npos || close == at_) { refuse_as_python("a group in it has no name"); }
                at_ = close + 1;
            }
            else if (take(U"=") || take(U"!")) {
                one = made(part::ahead, text_[at_ - 1] == U'!');
            }
            else if (take(U"<=") || take(U"<!")) {
                one = made(part::behind, text_[at_ - 1] == U'!');
            }
            else if (next_is(U"P=")) {
                refuse_unknown("a back-reference ('(?P=')");
            }
            else if (next_is(U"(")) {
                refuse_unknown("a condition ('(?(')");
            }
            else if (next_is(U">")) {
                refuse_unknown("an atomic group ('(?>')");
            }
            else if (read_flags(on)) {
                if (!first || !parts.empty()) {
                    refuse_as_python("flags of the whole are not at its beginning (those of a part are '(?i:…)')");
                }
                outer = on;
                return;
            }
        }
        one.inner = read_alternatives(on, depth + 1);
        if (!take(U")")) { refuse_as_python("it has a '(' without a ')'"); }
        if (one.kind == part::behind) {
            const auto wide = width_of(one.inner);
            if (wide.least != wide.most) { refuse_as_python("what a look-behind sees has no fixed width"); }
            one.least = wide.least;
        }
        parts.push_back(std::move(one));
    }
    /// Behind "(?": whether these are of the whole expression ("i)"), and not of a group ("i:", "-i:", ":").
    bool read_flags(flags& on)
    {
        bool value = true, any = false;
        for (; at_ < text_.size(); ++at_) {
            const char32_t c = text_[at_];
            if (c == U':' || (c == U')' && value && any)) {
                ++at_;
                return c == U')';
            }
            if (c == U'-' && value) { value = false; }
            else if (c == U'i') {
                on.any_case = value;
            }
            else if (c == U's') {
                on.dot_all = value;
            }
            else if (c == U'm') {
                on.lines = value;
            }
            else if (c == U'x') {
                refuse_unknown("the flag x (verbose)");
            }
            else if (!value || (c != U'a' && c != U'u')) { // which change nothing of ASCII
                break;
            }
            any = true;
        }
        refuse_as_python("it has a '(?' that begins nothing");
    }
    /// A count behind what the last part is; false: none is here.
    bool read_repeat(sequence& parts)
    {
        const auto before = at_;
        std::size_t least = 0, most = unlimited;
        if (take(U"*")) { }
        else if (take(U"+")) {
            least = 1;
        }
        else if (take(U"?")) {
            most = 1;
        }
        else if (take(U"{")) {
            const auto count = [&](std::size_t otherwise) {
                if (at_ >= text_.size() || !is_digit(text_[at_])) { return otherwise; }
                std::size_t value = 0;
                for (; at_ < text_.size() && is_digit(text_[at_]); ++at_) {
                    value = std::min<std::size_t>(10 * value + (text_[at_] - U'0'), 1'000'000'000);
                }
                return value;
            };
            const bool empty = next_is(U"}"), numbered = at_ < text_.size() && is_digit(text_[at_]);
            least = count(0);
            most = take(U",") ? count(unlimited) : numbered ? least : unlimited;
            if (empty || !take(U"}")) { // it stands for itself
                at_ = before;
                return false;
            }
            if (most < least) { refuse_as_python("it has a repeat whose counts are the wrong way round"); }
        }
        else {
            return false;
        }
        if (parts.empty() || (parts.back().kind >= part::start && parts.back().kind <= part::word_edge)) {
            refuse_as_python("it repeats nothing");
        }
        if (parts.back().kind == part::repeat) { refuse_as_python("it repeats a repeat"); }
        if (take(U"+")) { refuse_unknown("a possessive repeat ('*+', '++', '?+' or '}+')"); }
        (void)take(U"?"); // of what a name matches, how much is tried first changes nothing
        part one = made(part::repeat);
        one.least = least;
        one.most = most;
        sequence repeated;
        repeated.push_back(std::move(parts.back()));
        one.inner.push_back(std::move(repeated));
        parts.back() = std::move(one);
        return true;
    }

    /// The characters of \d, \s, \w and their opposites; nothing: it is none of these letters.
    std::optional<ranges> class_of(char32_t letter)
    {
        ranges found;
        switch (letter) {
        case U'd':
        case U'D': found = {{U'0', U'9'}}; break;
        case U's':
        case U'S': found = {{U'\t', U'\r'}, {0x1C, U' '}}; break;
        case U'w':
        case U'W': found = {{U'0', U'9'}, {U'A', U'Z'}, {U'_', U'_'}, {U'a', U'z'}}; break;
        default: return std::nullopt;
        }
        needs_ascii_ = true;
        if (letter >= U'a') { return found; }
        ranges others;
        char32_t from = 0;
        for (const auto& [low, high] : found) {
            if (low > from) { others.emplace_back(from, low - 1); }
            from = high + 1;
        }
        others.emplace_back(from, 0x10FFFF);
        return others;
    }
    /// The character that an escape means, behind its backslash, but for classes and edges.
    char32_t read_escaped(bool in_class)
    {
        const char32_t c = text_[at_++];
        switch (c) {
        case U'a': return U'\a';
        case U'f': return U'\f';
        case U'n': return U'\n';
        case U'r': return U'\r';
        case U't': return U'\t';
        case U'v': return U'\v';
        case U'x': return read_number(2, 16);
        case U'u': return read_number(4, 16);
        case U'U': return read_number(8, 16);
        default: break;
        }
        if (c == U'b' && in_class) { return U'\b'; }
        if (is_digit(c)) {
            std::size_t digits = 0; // of an octal number: three, or fewer behind a 0 or in a class
            while (digits < 3 && at_ - 1 + digits < text_.size() && text_[at_ - 1 + digits] >= U'0'
                && text_[at_ - 1 + digits] <= U'7') {
                ++digits;
            }
            if (digits == 0 || (c != U'0' && !in_class && digits < 3)) { refuse_unknown("a back-reference ('\\1')"); }
            --at_;
            return read_number(digits, 8);
        }
        if (c == U'N') { refuse_unknown("a character by its name ('\\N')"); }
        if ((c >= U'a' && c <= U'z') || (c >= U'A' && c <= U'Z')) {
            refuse_as_python("it has a '\\", static_cast<char>(c), "' that means nothing");
        }
        return c;
    }
    char32_t read_number(std::size_t digits, std::uint32_t radix)
    {
        std::uint32_t value = 0;
        for (std::size_t i = 0; i < digits; ++i, ++at_) {
            const char32_t c = at_ < text_.size() ? text_[at_] : U'.';
            const std::uint32_t digit = is_digit(c) ? c - U'0'
                : c >= U'a' && c <= U'f'            ? c - U'a' + 10
                : c >= U'A' && c <= U'F'            ? c - U'A' + 10
                                                    : radix;
            if (digit >= radix) { refuse_as_python("it has an escape with too few digits"); }
            value = value * radix + digit;
        }
        if (value > 0x10FFFF) { refuse_as_python("it has a number of no character"); }
        return value;
    }
    part read_escape(const flags& on)
    {
        if (at_ >= text_.size()) { refuse_as_python("it ends in a backslash"); }
        const char32_t c = text_[at_];
        if (auto found = class_of(c)) {
            ++at_;
            return one_of(*std::move(found), false, false);
        }
        const bool edge = c == U'b' || c == U'B';
        if (!edge && c != U'A' && c != U'Z' && c != U'z') {
            const char32_t literal = read_escaped(false);
            return one_of({{literal, literal}}, false, on.any_case);
        }
        ++at_;
        needs_ascii_ = needs_ascii_ || edge;
        return edge ? made(part::word_edge, c == U'B') : made(c == U'A' ? part::start : part::text_end);
    }
    /// Behind the bracket.
    part read_class(const flags& on)
    {
        ranges found;
        const bool negated = take(U"^");
        const auto one = [&](ranges& all) -> std::optional<char32_t> { // nothing: it was a class, and is in `all`
            if (!take(U"\\")) { return text_[at_++]; }
            if (at_ >= text_.size()) { refuse_as_python("it ends in a backslash"); }
            const auto several = class_of(text_[at_]);
            if (!several) { return read_escaped(true); }
            ++at_;
            all.insert(all.end(), several->begin(), several->end());
            return std::nullopt;
        };
        for (bool first = true; first || !next_is(U"]"); first = false) {
            if (at_ >= text_.size()) { refuse_as_python("it has a '[' without a ']'"); }
            const auto low = one(found);
            if (!next_is(U"-") || at_ + 1 >= text_.size() || text_[at_ + 1] == U']') {
                if (low) { found.emplace_back(*low, *low); }
                continue;
            }
            ++at_;
            const auto high = one(found);
            if (!low || !high || *high < *low) { refuse_as_python("it has a range in '[…]' that is none"); }
            found.emplace_back(*low, *high);
        }
        ++at_;
        return one_of(std::move(found), negated, on.any_case);
    }

    static std::size_t product(std::size_t a, std::size_t b)
    {
        return a == 0 || b == 0 ? 0 : a > unlimited / b ? unlimited : a * b;
    }
    static width width_of(const std::vector<sequence>& alternatives)
    {
        width all{unlimited, 0};
        for (const auto& parts : alternatives) {
            width sum;
            for (const auto& one : parts) {
                auto own = one.kind == part::group || one.kind == part::repeat ? width_of(one.inner)
                    : one.kind == part::character                              ? width{1, 1}
                                                                               : width{};
                if (one.kind == part::repeat) { own = {product(own.least, one.least), product(own.most, one.most)}; }
                sum.least = std::min(sum.least, unlimited - own.least) + own.least;
                sum.most = std::min(sum.most, unlimited - own.most) + own.most;
            }
            all = {std::min(all.least, sum.least), std::max(all.most, sum.most)};
        }
        return all;
    }

    /// A name, and how often its places were looked at.
    struct walk {
        std::u32string text{};
        std::size_t steps = 0;
    };
    /// Where what the name begins with may end, and how long it is.
    [[nodiscard]] std::pair<places, std::size_t> ends_in(std::string_view name) const
    {
        if (name.size() > longest_name) {
            refuse("a module's name has ", name.size(), " bytes, and at most ", longest_name, " are matched");
        }
        walk on{decoded(name)};
        if (needs_ascii_) { check_ascii(on.text, "the name of a module"); }
        return {ends_of(alternatives_, {0}, on), on.text.size()};
    }
    [[nodiscard]] places ends_of(const std::vector<sequence>& alternatives, const places& from, walk& on) const
    {
        places all;
        for (const auto& parts : alternatives) {
            places here = from;
            for (const auto& one : parts) {
                if (here.empty()) { break; }
                here = ends_of(one, here, on);
            }
            all.insert(all.end(), here.begin(), here.end());
        }
        in_order(all);
        return all;
    }
    static void in_order(places& all)
    {
        std::sort(all.begin(), all.end());
        all.erase(std::unique(all.begin(), all.end()), all.end());
    }
    [[nodiscard]] places ends_of(const part& one, const places& from, walk& on) const
    {
        on.steps += from.size() + 1;
        if (on.steps > most_steps) { refuse("to match it takes more than ", most_steps, " steps"); }
        if (one.kind == part::group) { return ends_of(one.inner, from, on); }
        if (one.kind == part::repeat) { return ends_of_repeat(one, from, on); }
        places ends;
        for (const auto place : from) {
            const std::size_t wide = one.kind == part::character ? 1 : 0;
            if (holds(one, place, on)) { ends.push_back(place + wide); }
        }
        return ends;
    }
    [[nodiscard]] places ends_of_repeat(const part& one, const places& from, walk& on) const
    {
        places here = from;
        for (std::size_t i = 0; i < one.least && !here.empty(); ++i) {
            auto next = ends_of(one.inner, here, on);
            if (next == here) { break; } // and so it would stay
            here = std::move(next);
        }
        std::vector<bool> seen(on.text.size() + 1);
        for (const auto place : here) { seen[place] = true; }
        places all = here;
        for (std::size_t i = one.least; i < one.most && !here.empty(); ++i) {
            here = ends_of(one.inner, here, on);
            std::erase_if(here, [&](std::size_t place) { return seen[place]; });
            for (const auto place : here) { seen[place] = true; }
            all.insert(all.end(), here.begin(), here.end());
        }
        in_order(all);
        return all;
    }
    /// Of a character: whether it is here; of what is no wider than a place: whether that is so here.
    [[nodiscard]] bool holds(const part& one, std::size_t place, walk& on) const
    {
        const auto& text = on.text;
        const auto word = [&](std::size_t i) { return i < text.size() && is_word(text[i]); };
        const bool at_end = place == text.size(), before_end = !at_end && text[place] == U'\n';
        switch (one.kind) {
        case part::character: return !at_end && one.negated != among(one, text[place]);
        case part::ahead: return one.negated != !ends_of(one.inner, {place}, on).empty();
        case part::behind: {
            if (place < one.least) { return one.negated; }
            const auto ends = ends_of(one.inner, {place - one.least}, on);
            return one.negated != !ends.empty();
        }
        case part::start: return place == 0;
        case part::line_start: return place == 0 || text[place - 1] == U'\n';
        case part::text_end: return at_end;
        case part::end: return at_end || (before_end && place + 1 == text.size());
        case part::line_end: return at_end || before_end;
        default: return one.negated != (word(place) != (place > 0 && word(place - 1)));
        }
    }
    static bool among(const part& one, char32_t c)
    {
        const auto in = [&](char32_t x) {
            return std::any_of(
                one.of.begin(), one.of.end(), [&](const auto& range) { return range.first <= x && x <= range.second; });
        };
        constexpr char32_t case_bit = 0x20;
        const bool letter = (c >= U'a' && c <= U'z') || (c >= U'A' && c <= U'Z');
        return in(c) || (one.any_case && letter && in(c ^ case_bit));
    }

    complaint words_;
    std::u32string text_{}; ///< of the expression
    std::size_t at_ = 0; ///< what of it has been read
    bool needs_ascii_ = false; ///< what it says is known of ASCII alone
    std::vector<sequence> alternatives_{};
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
