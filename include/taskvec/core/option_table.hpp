// What an options struct says about itself: one table with a row for each member.
// SPDX-License-Identifier: Apache-2.0
//
// A row names the member and says what it means, what it may hold and what unit stands for it in a usage line; its kind
// comes from the member's type and its default from the struct's own initialisers. Reading a value from text, writing
// it, listing (core/option_text.hpp), the command line's flags, notes, reports and sweep axes all come from the table.
//
// A struct gets its table by specialising options_of, beside it:
//
//     struct my_options {
//         double share = 0.5;
//         bool centred = true;
//         std::vector<double> weights{};
//     };
//     template <>
//     struct taskvec::options_of<my_options> {
//         static constexpr taskvec::option_table table{
//             taskvec::option_row("share", &my_options::share, "share of entries kept",
//                 {.unit = "D", .above = 0, .at_most = 1}),
//             taskvec::option_row("centred", &my_options::centred, "take the mean off", {.negated = "uncentred"}),
//             taskvec::weights_row(&my_options::weights)};
//     };
//
// or, where that reads better, by a static member function `describe()` that returns the same table.
#pragma once

#include <taskvec/core/config.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <limits>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Values that a sweep goes over: the plural that names them, and the usual ones as text ("0.1,0.2" or
/// "FIRST:LAST:STEP"); `of_subsets` where every subset of the tasks is tried as well.
struct option_axis {
    std::string_view name{}, usual{}, of_subsets{}; ///< as described above
};

/// What a row says beside name, member and meaning. Numbers are finite always, and within the range that is given.
struct option_details {
    std::string_view unit{}; ///< stands for the value in a usage line: "D", "N"; empty: by the kind
    /// Smallest value.
    double at_least = -std::numeric_limits<double>::infinity();
    double above = -std::numeric_limits<double>::infinity(); ///< the bound itself is outside
    /// Largest value.
    double at_most = std::numeric_limits<double>::infinity();
    std::string_view expected{}; ///< what messages say is expected; empty: in words made of the range
    std::string_view negated{}; ///< of a bool that is on by default: the flag that turns it off
    option_axis axis{}; ///< what a sweep tries
};

/// Of a share of entries: above 0 and up to 1.
[[nodiscard]] constexpr option_details share_details(option_axis axis = {})
{
    return {.unit = "D",
        .above = 0,
        .at_most = 1,
        .expected = "a share above 0 and up to 1, such as 0.1 for a tenth",
        .axis = axis};
}
/// The densities that a merge is usually tried with.
inline constexpr option_axis common_densities{"densities", "0.05,0.1,0.2,0.3,0.5", {}};
/// Of λ, the scale of a merged task vector.
[[nodiscard]] constexpr option_details lambda_details()
{
    return {.axis = {"lambdas", "0:1:0.05", "0.3"}};
}

/// One member of an options struct. `name`: lower case words with hyphens; `meaning`: a phrase without a full stop.
template <class Options, class Value>
struct option_row {
    /// The struct that has the member.
    using options_type = Options;
    using value_type = Value;

    std::string_view name; ///< lower case words with hyphens
    Value Options::* member; ///< where the value is
    std::string_view meaning; ///< a phrase without a full stop
    option_details details; ///< range, unit, words
    bool per_task = false; ///< a list with an entry for each task: given with the tasks, not by itself
    std::string_view each_of{}; ///< of such a list: what an entry is, "weight", or the row that holds for all tasks

    /// `its_name` and `words` must outlive the table: literals do.
    constexpr option_row(
        std::string_view its_name, Value Options::* its_member, std::string_view words, option_details more = {})
        : name(its_name)
        , member(its_member)
        , meaning(words)
        , details(more)
    { }

    /// Calls visit(row, value) with the member of `options`, as all rows do.
    template <class Owner, class Visit>
    constexpr void visit(Owner& options, Visit&& visit) const
    {
        visit(*this, options.*member);
    }
};

/// A list with an entry for each task. `each_of`: what an entry is, "weight", or the row that holds for all tasks.
template <class Options>
[[nodiscard]] constexpr option_row<Options, std::vector<double>> task_row(
    std::string_view name, std::vector<double> Options::* member, std::string_view each_of, std::string_view meaning)
{
    option_row<Options, std::vector<double>> row(name, member, meaning);
    row.per_task = true;
    row.each_of = each_of;
    return row;
}
/// The weights of the tasks: one for each, or none for all 1.
template <class Options>
[[nodiscard]] constexpr auto weights_row(
    std::vector<double> Options::* member, std::string_view meaning = "one for each task, or none for all 1")
{
    return task_row("weights", member, "weight", meaning);
}
/// A density of each task, where they differ.
template <class Options>
[[nodiscard]] constexpr auto densities_row(std::vector<double> Options::* member)
{
    return task_row("densities", member, "density", "density of each task, or none for one of all");
}
/// The share of outliers of each task, where they differ.
template <class Options>
[[nodiscard]] constexpr auto gammas_row(std::vector<double> Options::* member)
{
    return task_row("gammas", member, "gamma", "gamma of each task, or none for one of all");
}

/// The spread of keep probabilities of each task, where they differ.
template <class Options>
[[nodiscard]] constexpr auto epsilons_row(std::vector<double> Options::* member)
{
    return task_row("epsilons", member, "epsilon", "epsilon of each task, or none for one of all");
}

/// The options of a struct that is a member: its rows stand in the owner's table as if they were the owner's, all but
/// those that `without` names (which have no effect there, or which the owner has itself). Likewise its presets.
template <class Options, class Inner, std::size_t N>
struct inner_options {
    Inner Options::* member; ///< the struct within
    std::array<std::string_view, N> without; ///< names of its rows that are not the owner's

    /// Whether a row of the struct within is none of the owner's.
    [[nodiscard]] constexpr bool leaves_out(std::string_view name) const noexcept
    {
        for (const auto& other : without) {
            if (other == name) { return true; }
        }
        return false;
    }
    /// Calls visit(row, value) for each row of the struct within that is not left out.
    template <class Owner, class Visit>
    constexpr void visit(Owner& options, Visit&& visit) const;
};
/// The rows of member `member`, without those that are named. See inner_options.
template <class Options, class Inner, class... Names>
[[nodiscard]] constexpr inner_options<Options, Inner, sizeof...(Names)> options_within(
    Inner Options::* member, Names... without)
{
    return {member, {std::string_view(without)...}};
}

/// The rows of a struct.
template <class... Rows>
struct option_table {
    std::tuple<Rows...> rows; ///< in the order in which they are listed and asked for

    /// Takes option_row and inner_options, in any number.
    constexpr explicit option_table(const Rows&... all)
        : rows(all...)
    { }
};

/// A set of values under a name: "as the other library does it".
template <class Options>
struct option_preset {
    std::string_view name, meaning; ///< the preset's word, and what it follows
    /// The values.
    Options (*make)();
};

/// The extension point: `table`, and where there are presets `presets` (an array of option_preset, the first of which
/// is what the struct's initialisers say) with `preset_option`, the name of the option that chooses one.
template <class Options>
struct options_of { };
template <class Options>
    requires requires { Options::describe(); }
struct options_of<Options> {
    static constexpr auto table = Options::describe();
};

/// A struct that has a table.
template <class Options>
concept described_options = requires { options_of<Options>::table.rows; };

/// A struct with named presets.
template <class Options>
concept options_with_presets = requires {
    options_of<Options>::presets.size();
    options_of<Options>::preset_option;
};

/// The words for the values of an enumeration: specialise with `static constexpr std::array words{enum_word{…}, …}`.
template <class Enum>
struct enum_words { };
/// A value of an enumeration and its word.
template <class Enum>
struct enum_word {
    Enum value; ///< the value
    std::string_view word; ///< lower case, with hyphens
};
/// An enumeration whose values have words.
template <class Enum>
concept worded_enum = std::is_enum_v<Enum> && requires { enum_words<Enum>::words.size(); };

/// What may stand in a table.
template <class Value>
concept describable_value = std::same_as<Value, bool> || std::floating_point<Value> || std::unsigned_integral<Value>
    || worded_enum<Value> || std::same_as<Value, std::vector<double>>;

/// Calls visit(row, member) for every row of the table of `options`, those of inner structs in their places. The member
/// is const where `options` is.
///
///     for_each_option(options, [](const auto& row, const auto& value) { std::cout << row.name << …; });
template <class Options, class Visit>
constexpr void for_each_option(Options& options, Visit&& visit)
{
    using bare = std::remove_const_t<Options>;
    static_assert(described_options<bare>,
        "taskvec: this options struct has no table: specialise taskvec::options_of for it (core/option_table.hpp)");
    if constexpr (described_options<bare>) {
        std::apply([&](const auto&... rows) { (rows.visit(options, visit), ...); }, options_of<bare>::table.rows);
    }
}

/// Calls visit(preset_option, presets, inner) for each struct with presets among `options` and its inner structs. A
/// struct's own presets stand in place of those of its inner structs: it knows what the names mean for the whole.
template <class Options, class Visit>
constexpr void for_each_preset_list(Options& options, Visit&& visit);

template <class Options, class Inner, std::size_t N>
template <class Owner, class Visit>
constexpr void inner_options<Options, Inner, N>::visit(Owner& options, Visit&& visit) const
{
    for_each_option(options.*member, [&](const auto& row, auto& value) {
        if (!leaves_out(row.name)) { visit(row, value); }
    });
}

template <class Options, class Visit>
constexpr void for_each_preset_list(Options& options, Visit&& visit)
{
    using bare = std::remove_const_t<Options>;
    if constexpr (options_with_presets<bare>) {
        visit(options_of<bare>::preset_option, options_of<bare>::presets, options);
    }
    else if constexpr (described_options<bare>) {
        std::apply(
            [&](const auto&... rows) {
                const auto within = [&](const auto& row) {
                    if constexpr (requires { row.leaves_out(""); }) {
                        for_each_preset_list(options.*row.member, visit);
                    }
                };
                (within(rows), ...);
            },
            options_of<bare>::table.rows);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
