// Regular expressions over tensor names. Both may come from files, so neither may cost more than it says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <regex>
#include <string>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// An ECMAScript regular expression that is matched against names of tensors and modules. Where the standard library
/// can, without backtracking: no pattern takes exponential time and no name exhausts the stack; back-references are
/// refused. Patterns have at most 1,000 bytes, names at most 4,096. The time of a match is bounded by the product of
/// the two, times the name's length again where there is a look-ahead such as `(?!lm_head)`, and then this is at most
/// 40 million: counted repeats such as `x{3}` are written out, and a pattern may have at most 2,000 characters and
/// groups that way; a count has at most four digits; a look-ahead holds no other.
///
///     const name_pattern pattern("layers\\.[0-9]+\\.weight");
///     bool in = pattern.occurs_in("model.layers.3.weight");
class name_pattern {
public:
    /// Bytes of a pattern, bytes of a name, and characters of a pattern with its counted repeats written out.
    static constexpr std::size_t longest_pattern = 1000, longest_name = 4096, largest_expansion = 2000;
    /// Characters of a pattern with look-aheads, written out, times the square of a name's bytes.
    static constexpr std::size_t most_looks_ahead = 40'000'000;

    /// Throws invalid_argument for text that is not a regular expression, saying why.
    explicit name_pattern(const std::string& text)
    {
        if (text.size() > longest_pattern) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("a regular expression of ", text.size(), " bytes; expected at most ", longest_pattern));
        }
        check_budget(text);
#if !defined(TASKVEC_NO_EXCEPTIONS)
        try {
            compile(text);
        }
        catch (const std::regex_error& problem) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' is not a regular expression that is understood here: ", problem.what()));
        }
#else
        compile(text);
#endif
    }

    /// Whether the whole name matches. Throws invalid_argument for a name that is too long.
    [[nodiscard]] bool matches(std::string_view name) const
    {
        return std::regex_match(checked(name).begin(), name.end(), expression_);
    }
    /// Whether a part of the name matches. Throws like matches().
    [[nodiscard]] bool occurs_in(std::string_view name) const
    {
#if defined(__GLIBCXX__)
        return std::regex_match(checked(name).begin(), name.end(), within_);
#else
        return std::regex_search(checked(name).begin(), name.end(), expression_);
#endif
    }
    /// The name with each match replaced; `$1` stands for a group, `$&` for the match, as in ECMAScript. Throws like
    /// matches(). What groups hold is kept for this alone, and costs more than matching: not for hostile patterns.
    [[nodiscard]] std::string replaced_in(std::string_view name, const std::string& replacement) const
    {
        std::string result;
        std::regex_replace(
            std::back_inserter(result), checked(name).begin(), name.end(), std::regex(text_, flags), replacement);
        return result;
    }

private:
#if defined(__GLIBCXX__)
    static constexpr auto flags = std::regex::ECMAScript | std::regex::optimize | std::regex_constants::__polynomial;
#else
    static constexpr auto flags = std::regex::ECMAScript | std::regex::optimize;
#endif
    void compile(const std::string& text)
    {
        expression_ = std::regex(text, flags | std::regex::nosubs);
#if defined(__GLIBCXX__)
        // A search would begin anew at every character of the name; this is one walk over it.
        within_ = std::regex("[^]*(?:" + text + ")[^]*", flags | std::regex::nosubs);
#endif
        text_ = text;
    }

    /// Refuses what would take long. What is no pattern passes; the parser refuses it afterwards.
    void check_budget(std::string_view text)
    {
        struct group {
            std::size_t size = 0; ///< with the repeats written out; never more than what is too large
            bool looks_ahead = false;
        };
        constexpr std::size_t too_large = largest_expansion + 1;
        std::vector<group> open{{}}; // outermost first
        std::size_t last = 0; // the size of what a repeat would repeat
        bool fits = true, nested = false, refers_back = false;
        const auto grow = [&](std::size_t size) { open.back().size = std::min(open.back().size + size, too_large); };
        const auto add = [&](std::size_t size) {
            last = size;
            grow(size);
        };
        for (std::size_t at = 0; at < text.size(); ++at) {
            const char c = text[at];
            if (c == '\\') {
                // Parsers compute the number of a back-reference without looking whether it fits their integers.
                ++at;
                refers_back = refers_back || (at < text.size() && text[at] >= '1' && text[at] <= '9');
                add(1);
            }
            else if (c == '[') {
                at = end_of_class(text, at + 1);
                add(1);
            }
            else if (c == '(') {
                const auto kind = text.substr(at + 1, 2);
                const bool looks = kind == "?=" || kind == "?!";
                nested = nested || (looks && open.back().looks_ahead);
                looks_ahead_ = looks_ahead_ || looks;
                open.push_back({1, looks || open.back().looks_ahead});
            }
            else if (c == ')' && open.size() > 1) {
                const auto inner = open.back().size;
                open.pop_back();
                add(inner);
            }
            else if (c == '{') {
                std::size_t most = 0, value = 0, digits = 0;
                for (++at; at < text.size() && text[at] != '}'; ++at) {
                    if (text[at] < '0' || text[at] > '9') {
                        value = digits = 0;
                        continue;
                    }
                    fits = fits && ++digits <= 4;
                    value = std::min<std::size_t>(10 * value + static_cast<std::size_t>(text[at] - '0'), 10'000);
                    most = std::max(most, value);
                }
                if (most > 1) {
                    grow(std::min(last * (most - 1), too_large));
                    last = std::min(last * most, too_large);
                }
            }
            else {
                add(1);
            }
        }
        if (refers_back) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' has a back-reference such as '\\1': write out what it refers to"));
        }
        std::size_t total = 0;
        for (const auto& part : open) { total += part.size; }
        if (!fits || total > largest_expansion) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' has more than ", largest_expansion,
                    " characters and groups once its counted repeats are written out: use smaller counts, '*' or '+'"));
        }
        expansion_ = total;
        if (nested) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' has a look-ahead within a look-ahead: write one after the other"));
        }
    }
    /// Where the `]` is that ends the class whose inside begins at `at`.
    static std::size_t end_of_class(std::string_view text, std::size_t at)
    {
        for (; at < text.size() && text[at] != ']'; ++at) {
            if (text[at] == '\\') { ++at; }
            else if (text[at] == '[' && at + 1 < text.size()
                && std::string_view(".:=").find(text[at + 1]) != std::string_view::npos) {
                at = std::min(text.find(text[at + 1], at + 2), text.size() - 1) + 1; // [:alpha:], [.hyphen.], [=a=]
            }
        }
        return at;
    }
    [[nodiscard]] std::string_view checked(std::string_view name) const
    {
        if (name.size() > longest_name) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("tensor '", name.substr(0, 60), "…' has a name of ", name.size(),
                    " bytes; regular expressions are matched against at most ", longest_name));
        }
        if (looks_ahead_ && expansion_ * name.size() * name.size() > most_looks_ahead) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text_, "' looks ahead too often in tensor '", name.substr(0, 60), "…' with its name of ",
                    name.size(), " bytes: leave '(?=' and '(?!' out, or shorten the pattern"));
        }
        return name;
    }
    std::string text_;
    std::size_t expansion_ = 0; ///< characters and groups, written out
    bool looks_ahead_ = false;
    std::regex expression_;
#if defined(__GLIBCXX__)
    std::regex within_; ///< the pattern with anything before and after it
#endif
};

} // namespace taskvec::inline TASKVEC_ABI
