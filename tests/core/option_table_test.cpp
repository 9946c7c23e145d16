// Tables of options: rows, presets, inner structs, and options as text.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/option_text.hpp>

#include <doctest/doctest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace {

enum class colour : std::uint8_t { red, green };

struct plain {
    double share = 0.5;
    float factor = 1.5f;
    bool centred = true, loud = false;
    std::uint8_t small = 3;
    std::uint64_t seed = 0;
    colour paint = colour::green;
    std::vector<double> weights{}, start{};
    std::string label = "not described"; ///< what has no row is left alone
};
struct outer {
    plain inner{};
    double share = 0.25;
};
struct describes_itself {
    std::size_t parts = 2;
    static constexpr auto describe()
    {
        return taskvec::option_table{
            taskvec::option_row("parts", &describes_itself::parts, "how many", {.at_least = 1, .at_most = 9})};
    }
};

} // namespace

template <>
struct taskvec::enum_words<colour> {
    static constexpr std::array words{enum_word<colour>{colour::red, "red"}, enum_word<colour>{colour::green, "green"}};
};
template <>
struct taskvec::options_of<plain> {
    static constexpr option_table table{
        option_row("share", &plain::share, "share of entries kept", {.unit = "D", .above = 0, .at_most = 1}),
        option_row("factor", &plain::factor, "a factor"),
        option_row("centred", &plain::centred, "take the mean off", {.negated = "uncentred"}),
        option_row("loud", &plain::loud, "say more"), option_row("small", &plain::small, "a small number"),
        option_row("seed", &plain::seed, "of random choices"), option_row("paint", &plain::paint, "of the wall"),
        weights_row(&plain::weights), option_row("start", &plain::start, "where to begin")};
    static constexpr std::string_view preset_option = "like";
    static constexpr std::array presets{option_preset<plain>{"mine", "as it is", [] { return plain{}; }},
        option_preset<plain>{"theirs", "as others have it", [] { return plain{.share = 1, .paint = colour::red}; }}};
};
template <>
struct taskvec::options_of<outer> {
    static constexpr option_table table{
        option_row("share", &outer::share, "of the outer one"), options_within(&outer::inner, "share", "start")};
};

namespace {

std::string refusal(plain& options, const char* name, const char* text)
{
    try {
        (void)taskvec::set_option(options, name, text, std::string("--") + name);
    }
    catch (const taskvec::invalid_argument& wrong) {
        return wrong.what();
    }
    return "accepted";
}

TEST_CASE("values are read as their members' types, and written so that they are read back")
{
    plain options;
    CHECK(taskvec::set_option(options, "share", "0.1"));
    CHECK(options.share == 0.1);
    CHECK(taskvec::set_option(options, "share", "+1e-3"));
    CHECK(options.share == 1e-3);
    CHECK(taskvec::set_option(options, "factor", "-2.5"));
    CHECK(options.factor == -2.5f);
    CHECK(taskvec::set_option(options, "centred", "no"));
    CHECK_FALSE(options.centred);
    CHECK(taskvec::set_option(options, "loud", "on"));
    CHECK(options.loud);
    CHECK(taskvec::set_option(options, "small", "255"));
    CHECK(options.small == 255);
    CHECK(taskvec::set_option(options, "seed", "18446744073709551615"));
    CHECK(options.seed == std::numeric_limits<std::uint64_t>::max());
    CHECK(taskvec::set_option(options, "paint", "red"));
    CHECK(options.paint == colour::red);
    CHECK(taskvec::set_option(options, "start", "1,-0.5,2e3"));
    CHECK(options.start == std::vector<double>{1, -0.5, 2000});
    CHECK_FALSE(taskvec::set_option(options, "label", "x"));
    CHECK(options.label == "not described");

    plain read;
    taskvec::for_each_option(options, [&](const auto& row, const auto& value) {
        CHECK(taskvec::set_option(read, row.name, taskvec::write_option(value)));
    });
    taskvec::for_each_option(read, [&](const auto& row, const auto& value) {
        CHECK(taskvec::write_option(value) == taskvec::write_option(options.*(row.member)));
    });
    CHECK(read.share == options.share);
    CHECK(read.start == options.start);
}

TEST_CASE("what is out of range, or no value at all, is refused in one sentence")
{
    plain options;
    CHECK(refusal(options, "share", "20%") == "--share is '20%'; expected a number above 0 and up to 1");
    CHECK(refusal(options, "share", "20") == "--share is 20; expected a number above 0 and up to 1");
    CHECK(refusal(options, "share", "0") == "--share is 0; expected a number above 0 and up to 1");
    CHECK(refusal(options, "share", "nan") == "--share is nan; expected a number above 0 and up to 1");
    CHECK(refusal(options, "factor", "inf") == "--factor is inf; expected a finite number");
    CHECK(refusal(options, "factor", "") == "--factor is ''; expected a finite number");
    CHECK(refusal(options, "factor", "1 ") == "--factor is '1 '; expected a finite number");
    CHECK(refusal(options, "factor", "+-1") == "--factor is '+-1'; expected a finite number");
    CHECK(refusal(options, "small", "256") == "--small is 256; expected a whole number from 0 to 255");
    CHECK(refusal(options, "seed", "-1") == "--seed is -1; expected a whole number from 0 to 18446744073709551615");
    CHECK(refusal(options, "seed", "1.5") == "--seed is 1.5; expected a whole number from 0 to 18446744073709551615");
    CHECK(refusal(options, "loud", "maybe") == "--loud is 'maybe'; expected true or false");
    CHECK(refusal(options, "paint", "blue") == "--paint is 'blue'; expected one of: red, green");
    CHECK(
        refusal(options, "start", "1,,2") == "--start is '1,,2'; expected numbers separated by commas, such as 1,0.5");
    CHECK(refusal(options, "like", "nobody") == "--like is 'nobody'; expected one of: mine, theirs");
    CHECK(options.share == 0.5);
    describes_itself other;
    CHECK_THROWS_WITH_AS((void)taskvec::set_option(other, "parts", "0"),
        "parts is 0; expected a whole number from 1 to 9", taskvec::invalid_argument);
}

TEST_CASE("rows of an inner struct stand in the owner's table, all but those that are left out")
{
    outer options;
    CHECK(taskvec::set_option(options, "share", "7"));
    CHECK(options.share == 7);
    CHECK(options.inner.share == 0.5);
    CHECK(taskvec::set_option(options, "seed", "9"));
    CHECK(options.inner.seed == 9);
    CHECK_FALSE(taskvec::set_option(options, "start", "1"));
    CHECK(taskvec::set_option(options, "like", "theirs"));
    CHECK(options.inner.paint == colour::red);
    CHECK(options.share == 7);
    std::vector<std::string> names;
    for (const auto& option : taskvec::describe_options<outer>()) { names.push_back(option.name); }
    CHECK(names
        == std::vector<std::string>{"share", "factor", "centred", "loud", "small", "seed", "paint", "weights", "like"});
}

TEST_CASE("a description says kind, default, range and words")
{
    const auto list = taskvec::describe_options<plain>();
    REQUIRE(list.size() == 10);
    CHECK(list[0].unit == "D");
    CHECK(list[0].initial == "0.5");
    CHECK(list[0].kind == taskvec::option_kind::number);
    CHECK(list[2].negated == "uncentred");
    CHECK(list[2].initial == "true");
    CHECK(list[5].kind == taskvec::option_kind::whole_number);
    CHECK(list[6].words == std::vector<std::string>{"red", "green"});
    CHECK(list[6].initial == "green");
    CHECK(list[7].per_task);
    CHECK_FALSE(list[8].per_task);
    CHECK(list[9].is_preset);
    CHECK(list[9].words == std::vector<std::string>{"mine", "theirs"});
}

} // namespace
