// Regular expressions over tensor names. Both may come from files, so neither may cost more than it says.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <cstddef>
#include <iterator>
#include <regex>
#include <string>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// An ECMAScript regular expression that is matched against names of tensors and modules. Where the standard library
/// can, without backtracking: no pattern takes exponential time, no name exhausts the stack, and back-references are
/// refused. Patterns have at most 1,000 bytes, names at most 4,096.
///
///     const name_pattern pattern("layers\\.[0-9]+\\.weight");
///     bool in = pattern.occurs_in("model.layers.3.weight");
class name_pattern {
public:
    static constexpr std::size_t longest_pattern = 1000, longest_name = 4096;

    /// Throws invalid_argument for text that is not a regular expression, saying why.
    explicit name_pattern(const std::string& text)
    {
        if (text.size() > longest_pattern) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("a regular expression of ", text.size(), " bytes; expected at most ", longest_pattern));
        }
#if !defined(TASKVEC_NO_EXCEPTIONS)
        try {
            expression_ = std::regex(text, flags);
        }
        catch (const std::regex_error& problem) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' is not a regular expression that is understood here: ", problem.what()));
        }
#else
        expression_ = std::regex(text, flags);
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
        return std::regex_search(checked(name).begin(), name.end(), expression_);
    }
    /// The name with each match replaced; `$1` stands for a group, `$&` for the match, as in ECMAScript. Throws like
    /// matches().
    [[nodiscard]] std::string replaced_in(std::string_view name, const std::string& replacement) const
    {
        std::string result;
        std::regex_replace(std::back_inserter(result), checked(name).begin(), name.end(), expression_, replacement);
        return result;
    }

private:
#if defined(__GLIBCXX__)
    static constexpr auto flags = std::regex::ECMAScript | std::regex::optimize | std::regex_constants::__polynomial;
#else
    static constexpr auto flags = std::regex::ECMAScript | std::regex::optimize;
#endif
    static std::string_view checked(std::string_view name)
    {
        if (name.size() > longest_name) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("tensor '", name.substr(0, 60), "…' has a name of ", name.size(),
                    " bytes; regular expressions are matched against at most ", longest_name));
        }
        return name;
    }
    std::regex expression_;
};

} // namespace taskvec::inline TASKVEC_ABI
