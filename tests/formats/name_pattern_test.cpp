// Regular expressions over names.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/name_pattern.hpp>

#include <doctest/doctest.h>

#include <regex>
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

TEST_CASE("counted repeats are written out up to a limit")
{
    CHECK(name_pattern("a{2000}").matches(std::string(2000, 'a')));
    CHECK_THROWS_WITH_AS(name_pattern("a{2001}"), doctest::Contains("more than 2000 characters"), invalid_argument);
}

TEST_CASE("back-references are refused, however long")
{
    for (const char* wrong : {"(a)\\1", "\\4444444444444444444444", "[a\\]]\\9"}) {
        CAPTURE(wrong);
        CHECK_THROWS_WITH_AS(name_pattern{wrong}, doctest::Contains("has a back-reference"), invalid_argument);
    }
    CHECK(name_pattern("a\\\\1").matches("a\\1")); // a backslash, and a one
}

TEST_CASE("hostile patterns and names cost neither the stack nor for ever")
{
    CHECK_FALSE(name_pattern("(a*)*b").occurs_in(std::string(60, 'a')));
    CHECK(name_pattern("(a|b)*c").matches(std::string(4000, 'a') + "c"));
    CHECK(name_pattern(std::string(400, '(') + "a" + std::string(400, ')')).matches("a"));
    CHECK_THROWS_AS((void)name_pattern(".").occurs_in(std::string(1'000'000, 'a')), invalid_argument);
}

TEST_CASE("a pattern beyond its budget is refused before it is compiled")
{
    std::string doubled = "a", hidden = "([[:alpha:])]x{40}){40}";
    for (int i = 0; i < 40; ++i) { doubled += "{2}"; }
    for (const std::string& wrong : {std::string("a{3000}"), std::string("(a{50}){50}"),
             std::string("((a{20}){20}){20}"), std::string("(a|b{40}){0,60}"), std::string("a{99999}"),
             std::string("a{1,00000001}"), std::string("(a{1,9999}){1,9999}"), std::string("(ab){1000}"), doubled,
             "(" + hidden + "){40}", std::string("([)]x{60}){60}"), std::string("(\\)x{60}){60}")}) {
        CAPTURE(wrong);
        CHECK_THROWS_WITH_AS(name_pattern{wrong}, doctest::Contains("repeats are written out"), invalid_argument);
    }
    CHECK_THROWS_WITH_AS(
        name_pattern("(?!a(?=b))"), doctest::Contains("a look-ahead within a look-ahead"), invalid_argument);
    CHECK_THROWS_AS(name_pattern("(?!a(b(?!c)))"), invalid_argument);
    CHECK(name_pattern("(?!lm_head)(?!embed).*\\.weight").matches("layers.0.weight"));
    CHECK_FALSE(name_pattern("(?!lm_head)(?!embed).*\\.weight").matches("embed.weight"));
    CHECK(name_pattern("(a{40}){40}").matches(std::string(1600, 'a')));
    CHECK(name_pattern("layers\\.[0-9]{1,2}\\.(q|v)_proj").matches("layers.31.q_proj"));
    CHECK(name_pattern("[{]x{3}\\{").matches("{xxx{"));
    CHECK(name_pattern("[[:digit:]]{2}").matches("31"));
    CHECK(name_pattern("[[a]{2}").matches("[a")); // a bracket in a class, which names no class
    for (const char* cut : {"a{", "a{2", "a{2,", "(", "[[", "[[:", "[[:a", "[\\"}) { // cut short anywhere
        CAPTURE(cut);
        CHECK_THROWS_AS(name_pattern{cut}, invalid_argument);
    }
}

TEST_CASE("the worst patterns within the budget take moments")
{
    std::string groups;
    for (int i = 0; i < 150; ++i) { groups += "(a*)"; }
    const std::string name(4096, 'a');
    CHECK_FALSE(name_pattern(groups + "b").occurs_in(name)); // with groups kept and a search from each place: hours
    CHECK_FALSE(name_pattern(groups + "b").matches(name));
    CHECK_FALSE(name_pattern("((a?){20}){30}b").occurs_in(name));
    CHECK_FALSE(name_pattern("(a|(?=.*b)a)*c").occurs_in(name.substr(0, 1000)));
}

TEST_CASE("look-aheads take no longer than they may, however they are repeated")
{
    std::string pattern = "(?:";
    for (int i = 0; i < 120; ++i) { pattern += "(?=.*q)"; }
    pattern += ".)*";
    const std::string name = std::string(4000, 'a') + ".q";
    CHECK_THROWS_WITH_AS(
        (void)name_pattern(pattern).matches(name), doctest::Contains("looks ahead too often"), invalid_argument);
    CHECK_THROWS_AS((void)name_pattern(pattern).occurs_in(name), invalid_argument);
    CHECK(name_pattern(pattern).matches("aq"));
    CHECK_FALSE(name_pattern(pattern).matches("qa")); // nothing is ahead of the last one
    CHECK(name_pattern("^(?!lm_head)(?!.*norm).*").matches("model.layers.31.mlp.down_proj.weight"));
    CHECK_FALSE(name_pattern("^(?!lm_head)(?!.*norm).*").matches("model.norm.weight"));
}

TEST_CASE("a pattern occurs where a search would find it")
{
    for (const char* pattern :
        {"^a", "a$", "^$", "", "a|b", "a|^b$", "(a)(b)", "\\bb", "b\\b", "(?=b)", "(?!a)b", "[^a]$"}) {
        for (const char* name : {"", "a", "b", "ab", "ba", "a b", "xab", "a\nb", "\nb", "xyz"}) {
            CAPTURE(pattern);
            CAPTURE(name);
            CHECK(name_pattern(pattern).occurs_in(name) == std::regex_search(name, std::regex(pattern)));
        }
    }
}
