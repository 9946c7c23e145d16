// The tables of options of the library's structs.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/option_text.hpp>
#include <taskvec/taskvec.hpp>

#include "../../examples/midpoint.hpp"

#include <doctest/doctest.h>
#include <library_methods.hpp>

#include <cmath>
#include <concepts>
#include <set>
#include <string>
#include <type_traits>
#include <vector>

namespace {

/// What every table of the library promises.
template <class Options>
void check_table()
{
    std::set<std::string> names;
    Options fresh{};
    for (const auto& option : taskvec::describe_options<Options>()) {
        CAPTURE(option.name);
        CHECK(names.insert(option.name).second);
        CHECK_FALSE(option.meaning.empty());
        CHECK_FALSE(option.meaning.ends_with('.'));
        if (!option.negated.empty()) {
            CHECK(names.insert(option.negated).second);
            CHECK(option.initial == "true");
        }
        if (option.is_preset || option.initial.empty()) { continue; }
        CHECK(taskvec::set_option(fresh, option.name, option.initial)); // the default is in its own range
    }
    for (const auto& option : taskvec::describe_options<Options>()) { // the first preset is the struct as it stands
        if (!option.is_preset) { continue; }
        Options first{};
        CHECK(taskvec::set_option(first, option.name, option.words.front()));
        std::string one, other;
        taskvec::for_each_option(first, [&](const auto&, const auto& v) { one += taskvec::write_option(v) + ";"; });
        const Options initial{};
        taskvec::for_each_option(initial, [&](const auto&, const auto& v) { other += taskvec::write_option(v) + ";"; });
        CHECK(one == other);
    }
}

/// What a row's range leaves out is refused by check_options(), in the words in which text is refused.
template <class Options>
void check_ranges()
{
    Options options{};
    CHECK_NOTHROW(taskvec::check_options(options));
    taskvec::for_each_option(options, [&](const auto& row, auto& value) {
        if constexpr (std::same_as<std::remove_cvref_t<decltype(value)>, double>) {
            const double kept = value;
            const auto& range = row.details;
            for (const double wrong :
                {std::nan(""), HUGE_VAL, -HUGE_VAL, range.at_least - 1, range.above, range.at_most + 1}) {
                CAPTURE(row.name);
                CAPTURE(wrong);
                value = wrong;
                const std::string text = taskvec::write_option(wrong);
                std::string said, read;
                try {
                    taskvec::check_options(options);
                }
                catch (const taskvec::invalid_argument& error) {
                    said = error.what();
                    CHECK(error.code()
                        == (std::isfinite(wrong) ? taskvec::error_code::parameter_out_of_range
                                                 : taskvec::error_code::parameter_not_finite));
                }
                Options other{};
                try {
                    taskvec::set_option(other, row.name, text);
                }
                catch (const taskvec::invalid_argument& error) {
                    read = error.what();
                }
                CHECK_FALSE(said.empty());
                CHECK(said == read);
            }
            value = kept;
        }
    });
    CHECK_NOTHROW(taskvec::check_options(options));
}

template <class... Options>
struct check_tables {
    static void run() { ((check_table<Options>(), check_ranges<Options>()), ...); }
};

TEST_CASE("the library's tables hold what they promise")
{
    with_library_methods<check_tables>::run();
    check_table<taskvec::post_pruning_options>();
    check_table<taskvec::lorahub_options>();
    check_table<taskvec::sweep_options>();
    check_table<taskvec::rank_choice>();
    check_table<taskvec::linear_merge_options>();
    check_table<taskvec::adapter_ties_options>();
    check_table<taskvec::peru_lora_options>();
    check_table<taskvec::extract_options>();
}

TEST_CASE("a method of one's own is never given a number that its table leaves out")
{
    const std::vector<float> x{1, 2};
    std::vector<float> out(2);
    CHECK_THROWS_WITH_AS(merge(taskvec::cpu{}, example::midpoint_options{.lambda = NAN}, x, std::vector{x, x}, out),
        "lambda is nan; expected a finite number", taskvec::invalid_argument);
    CHECK(out == std::vector<float>(2));
}

TEST_CASE("presets are the structs that they name")
{
    taskvec::dare_ties_options options;
    CHECK(taskvec::set_option(options, "semantics", "peft"));
    CHECK(options.ties.scope == taskvec::scope::tensor);
    CHECK(options.ties.divide_by_count);
    CHECK(options.density == 0.5);
    CHECK_FALSE(taskvec::set_option(options, "trim", "exact"));
    CHECK(taskvec::set_option(options, "semantics", "mergekit")); // the whole's own: what agrees is added up
    CHECK(options.ties.combine == taskvec::disjoint_merge::sum);
    CHECK(options.rescale == taskvec::drop_rescale::l1);
    taskvec::post_pruning_options pruning;
    CHECK(taskvec::set_option(pruning, "semantics", "mergekit"));
    CHECK(pruning.scope == taskvec::scope::tensor);
    CHECK(pruning.density == 0.1);
    CHECK(pruning.trim == taskvec::trim_rule::exact);
    CHECK(taskvec::set_option(pruning, "semantics", "ties-merging"));
    CHECK(pruning.trim == taskvec::trim_rule::reach_next);
    CHECK(pruning.scope == taskvec::scope::model);
}

} // namespace
