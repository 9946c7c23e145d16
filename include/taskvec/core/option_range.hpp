// What the numbers of options may be, held to their tables (core/option_table.hpp): the same ranges and words as where
// they are read from text.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/option_table.hpp>

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Throws where a number of `options` is not finite or outside the range that its row gives. merge() checks with it,
/// on every policy, before a method sees its options; a method checks what no row can say. Options without a table
/// pass. Errors: invalid_argument, "density is 1.5; expected a number above 0 and up to 1".
///
///     check_options(ties_options{.density = 1.5});
template <class Options>
void check_options(const Options& options);

namespace detail {

[[nodiscard]] inline std::string number_text(double value)
{
    char digits[32];
    const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
    return {digits, end};
}

[[nodiscard]] inline bool in_range(const option_details& range, double value)
{
    return std::isfinite(value) && value >= range.at_least && value > range.above && value <= range.at_most;
}

[[nodiscard]] inline std::string range_text(const option_details& range, std::string_view noun)
{
    if (!range.expected.empty()) { return std::string(range.expected); }
    std::string text(noun);
    const bool least = std::isfinite(range.at_least), above = std::isfinite(range.above);
    const bool most = std::isfinite(range.at_most);
    if (least && most) { return text + " from " + number_text(range.at_least) + " to " + number_text(range.at_most); }
    if (least) { return text + " of at least " + number_text(range.at_least); }
    if (above) { text += " above " + number_text(range.above); }
    if (most) { text += std::string(above ? " and" : "") + " up to " + number_text(range.at_most); }
    if (!above && !most) { text.replace(0, 1, "a finite"); }
    return text;
}

[[nodiscard]] inline std::string whole_number_text(option_details range, std::uint64_t largest)
{
    if (!(range.at_least > 0)) { range.at_least = 0; }
    if (std::isfinite(range.at_most)) { return range_text(range, "a whole number"); }
    return "a whole number from " + number_text(range.at_least) + " to " + std::to_string(largest);
}

[[noreturn]] inline void refuse_number(std::string_view name, double value, const std::string& expected)
{
    raise<invalid_argument>(
        std::isfinite(value) ? error_code::parameter_out_of_range : error_code::parameter_not_finite,
        message(name, " is ", number_text(value), "; expected ", expected));
}

inline void check_number(std::string_view name, const option_details& range, double value)
{
    if (!in_range(range, value)) { refuse_number(name, value, range_text(range, "a number")); }
}

} // namespace detail

template <class Options>
void check_options(const Options& options)
{
    if constexpr (described_options<Options>) {
        for_each_option(options, [](const auto& row, const auto& value) {
            using value_type = std::remove_cvref_t<decltype(value)>;
            if constexpr (std::floating_point<value_type>) {
                detail::check_number(row.name, row.details, static_cast<double>(value));
            }
            else if constexpr (std::unsigned_integral<value_type> && !std::same_as<value_type, bool>) {
                const auto number = static_cast<double>(value);
                if (!detail::in_range(row.details, number)) {
                    detail::refuse_number(row.name, number,
                        detail::whole_number_text(row.details, std::numeric_limits<value_type>::max()));
                }
            }
        });
    }
}

namespace detail {

/// How much larger the numbers of `options` can make a result: their product, each by itself or as a divisor.
template <class Options>
[[nodiscard]] double largest_gain(const Options& options)
{
    double gain = 1;
    if constexpr (described_options<Options>) {
        const auto of = [](double value) {
            const double size = std::fabs(value);
            return size > 1 ? size : size > 0 ? 1 / size : 1.0;
        };
        for_each_option(options, [&](const auto&, const auto& value) {
            using value_type = std::remove_cvref_t<decltype(value)>;
            if constexpr (std::floating_point<value_type>) { gain *= of(static_cast<double>(value)); }
            else if constexpr (std::same_as<value_type, std::vector<double>>) {
                double most = 1;
                for (const double one : value) { most = of(one) > most ? of(one) : most; }
                gain *= most;
            }
        });
    }
    return gain;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
