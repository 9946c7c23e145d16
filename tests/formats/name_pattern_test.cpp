// Regular expressions over names.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/name_pattern.hpp>

#include <doctest/doctest.h>

#include <string>

using namespace taskvec;

TEST_CASE("patterns match whole names or parts of them")
{
    const name_pattern digits("layers\\.[0-9]+\\.weight");
    CHECK(digits.matches("layers.12.weight"));
    CHECK_FALSE(digits.matches("model.layers.12.weight"));
    CHECK(digits.occurs_in("model.layers.12.weight.scale"));
    CHECK_FALSE(digits.occurs_in("model.layers.x.weight"));
    CHECK(name_pattern("^a|b$").occurs_in("xb"));
    CHECK_FALSE(name_pattern("^a|b$").occurs_in("xbx"));
    CHECK(name_pattern("").occurs_in(""));
}

TEST_CASE("what is no pattern is refused with the reason")
{
    for (const char* wrong : {"(", "[", "a{2,1}", "*", "\\"}) {
        CAPTURE(wrong);
        CHECK_THROWS_AS(name_pattern{wrong}, invalid_argument);
    }
    CHECK_THROWS_AS(name_pattern(std::string(2000, 'a')), invalid_argument);
    CHECK_THROWS_AS(name_pattern("(a{0,1000}){0,1000}"), invalid_argument); // too many states
}

TEST_CASE("hostile patterns and names cost neither the stack nor for ever")
{
    CHECK_FALSE(name_pattern("(a*)*b").occurs_in(std::string(60, 'a')));
    CHECK(name_pattern("(a|b)*c").matches(std::string(4000, 'a') + "c"));
    CHECK(name_pattern(std::string(400, '(') + "a" + std::string(400, ')')).matches("a"));
    CHECK_THROWS_AS((void)name_pattern(".").occurs_in(std::string(1'000'000, 'a')), invalid_argument);
}
