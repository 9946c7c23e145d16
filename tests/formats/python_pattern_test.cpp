// Python's regular expressions over names: what re.fullmatch() and re.match() say of them, and what is refused.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>
#include <taskvec/formats/python_pattern.hpp>

#include "../capture.hpp"

#include <doctest/doctest.h>

#include <filesystem>
#include <string>

using namespace taskvec;

namespace {

detail::python_pattern pattern_of(const std::string& text)
{
    return detail::python_pattern(text, {"config.json", "target_modules is '" + text + "'", "list the names instead"});
}
std::string refusal_of(const std::string& text, const std::string& name = "model.q_proj")
{
    try {
        (void)pattern_of(text).matches(name);
    }
    catch (const format_error& problem) {
        return problem.what();
    }
    return "";
}

} // namespace

TEST_CASE("Python's expressions match what Python's re matches")
{
    const auto stored = parse_json(
        read_text_file(std::filesystem::path(TASKVEC_TEST_DIR) / "data" / "patterns" / "python.json"), "python.json");
    std::size_t count = 0;
    for (const auto& one : stored) {
        const auto text = one.at(0).get<std::string>(), name = one.at(1).get<std::string>();
        CAPTURE(text);
        CAPTURE(name);
        const auto& said = one.at(2);
        if (said.is_null()) { // re.error
            CHECK(refusal_of(text, name).find("no regular expression to Python") != std::string::npos);
        }
        else {
            CHECK(pattern_of(text).matches(name) == said.at(0).get<bool>());
            CHECK(pattern_of(text).begins(name) == said.at(1).get<bool>());
        }
        ++count;
    }
    CHECK(count == 1200);
}

TEST_CASE("expressions of Python that are not understood are refused with what to write instead")
{
    for (const auto& [text, why] : {std::pair("(q)\\1", "a back-reference"),
             std::pair("(?P<n>q)(?P=n)", "a back-reference"), std::pair("(q)?(?(1)a|b)", "a condition"),
             std::pair("(?>q)", "an atomic group"), std::pair("q*+", "a possessive repeat"),
             std::pair("(?x: q )", "the flag x"), std::pair("\\N{DOT}", "a character by its name")}) {
        const auto said = refusal_of(text);
        CAPTURE(said);
        CHECK(said.find("config.json") != std::string::npos);
        CHECK(said.find(std::string("target_modules is '") + text + "': it has " + why) != std::string::npos);
        CHECK(said.find(", not understood here; list the names instead") != std::string::npos);
    }
    CHECK(refusal_of(std::string(2000, 'a')).find("it has 2000 bytes, and at most 1000 are read") != std::string::npos);
    CHECK(refusal_of("a", std::string(5000, 'a')).find("has 5000 bytes") != std::string::npos);
    // Of letters beyond ASCII Python knows more; as they stand they are compared.
    CHECK(refusal_of("\\w+", "sch\u00f6n").find("beyond ASCII") != std::string::npos);
    CHECK(pattern_of("sch.n").matches("sch\u00f6n"));
    CHECK(pattern_of("sch[\u00f6]n").matches("sch\u00f6n"));
}

TEST_CASE("escapes, counts, edges and flags mean what they mean to Python")
{
    struct expectation {
        const char *text, *name;
        bool matches, begins;
    };
    for (const auto& [text, name, matches, begins] :
        {// said by re of Python 3.11
            expectation{"\\Sq", "aq", true, true}, {"\\Sq", " q", false, false}, {"\\Wq", ".q", true, true},
            {"\\Wq", "_q", false, false}, {"\\W", "\t", true, true},
            {"[\\a\\f\\r\\t\\v\\b]+", "\a\f\r\t\v\b", true, true}, {"\\a\\f\\r\\t\\v", "\a\f\r\t\v", true, true},
            {"\\b\\v", "\b\v", false, false}, {"\\x41\\x5a\\x6F\\x4e", "AZoN", true, true},
            {"\\u0041\\U00000042", "AB", true, true}, {"[\\x61-\\x63]+", "abc", true, true},
            {"\\101[\\60-\\62]\\07", "A1\7", true, true}, {"[\\7]", "\7", true, true},
            {"(?m)^a$\\n^b$", "a\nb", true, true}, {"^a$\\n^b$", "a\nb", false, false},
            {"(?m)^b", "a\nb", false, false}, {"(?m:a$\\n)b", "a\nb", true, true}, {"(?m)a\\n^", "a\n", true, true},
            {"(?m)a^b", "ab", false, false}, {"(?m)a$", "a\nb", false, true}, {"a$\\n", "a\n", true, true},
            {"a$", "a\n", false, true}, {"a$", "a\nb", false, false}, {"a$\\n\\n", "a\n\n", false, false},
            {"a\\Z", "a\n", false, false}, {"a\\Z", "a", true, true}, {"a\\Bb", "ab", true, true},
            {"a\\B.b", "a.b", false, false}, {"(?i)\\x41B[c-d]", "abD", true, true}, {"(?i:a)B", "AB", true, true},
            {"(?i:a)B", "Ab", false, false}, {"(?i-s:A.)", "a\n", false, false}, {"(?s).(?-s:.)", "\n\n", false, false},
            {"(?s).(?-s:.)", "\na", true, true}, {"(?a:a)", "a", true, true}, {"(?u)\\w", "a", true, true},
            {"a(?#or more)b", "ab", true, true}, {"a{b}", "a{b}", true, true}, {"a{", "a{", true, true},
            {"a{2,", "a{2,", true, true}, {"a{}", "a{}", true, true}, {"a{,2}", "aa", true, true},
            {"a{,}b", "aaab", true, true}, {"(?<=(?:ab){2})c", "ababc", false, false}, {"ab(?<!b)", "ab", false, false},
            {"(?<!aaa)b", "b", true, true}, {"(a|bc){2}(?<=bca|aaa)", "bca", true, true}, {"a|b|", "b", true, true},
            {"[]a]+", "a]", true, true}, {"[^]a]", "b", true, true}, {"[a-]+", "a-", true, true},
            {"[\\d-]+", "1-", true, true}, {"[^a]", "\n", true, true}, {"(?P<n>a)b", "ab", true, true}}) {
        CAPTURE_BOUND(text);
        CAPTURE_BOUND(name);
        CHECK(pattern_of(text).matches(name) == matches);
        CHECK(pattern_of(text).begins(name) == begins);
    }
    CHECK(pattern_of(std::string("\\0")).matches(std::string_view("\0", 1)));
}

TEST_CASE("what is no expression to Python is refused with what is wrong with it")
{
    for (const auto& [text, why] :
        {std::pair("a(?#b", "a comment in it does not end"), std::pair("(?P<a", "a group in it has no name"),
            std::pair("(?P<>a)", "a group in it has no name"), std::pair("(?", "it has a '(?' that begins nothing"),
            std::pair("(?i", "it has a '(?' that begins nothing"),
            std::pair("(?)a", "it has a '(?' that begins nothing"),
            std::pair("(?-i)a", "it has a '(?' that begins nothing"),
            std::pair("(?k)a", "it has a '(?' that begins nothing"),
            std::pair("(?-a:a)", "it has a '(?' that begins nothing"),
            std::pair("a(?i)b", "flags of the whole are not at its beginning"), std::pair("^*", "it repeats nothing"),
            std::pair("\\b+", "it repeats nothing"), std::pair("a|*", "it repeats nothing"),
            std::pair("a**", "it repeats a repeat"), std::pair("a{1}{2}", "it repeats a repeat"),
            std::pair("a{2,1}", "it has a repeat whose counts are the wrong way round"),
            std::pair("\\", "it ends in a backslash"), std::pair("[\\", "it ends in a backslash"),
            std::pair("[", "it has a '[' without a ']'"), std::pair("[a", "it has a '[' without a ']'"),
            std::pair("[z-a]", "it has a range in '[…]' that is none"),
            std::pair("[\\d-z]", "it has a range in '[…]' that is none"),
            std::pair("[a-\\d]", "it has a range in '[…]' that is none"),
            std::pair("\\q", "it has a '\\q' that means nothing"),
            std::pair("\\Q", "it has a '\\Q' that means nothing"),
            std::pair("\\x4", "it has an escape with too few digits"),
            std::pair("\\x4g", "it has an escape with too few digits"),
            std::pair("\\x4G", "it has an escape with too few digits"),
            std::pair("\\u12", "it has an escape with too few digits"),
            std::pair("\\U00110000", "it has a number of no character"),
            std::pair("(?<=a*)b", "what a look-behind sees has no fixed width"),
            std::pair("(?<=a|bc)d", "what a look-behind sees has no fixed width"),
            std::pair("(?=a", "it has a '(' without a ')'")}) {
        CAPTURE_BOUND(text);
        CHECK(refusal_of(text).find(std::string("no regular expression to Python: ") + why) != std::string::npos);
    }
    CHECK(refusal_of("\\8").find("a back-reference") != std::string::npos);
    CHECK(refusal_of("\\18").find("a back-reference") != std::string::npos);
    CHECK(refusal_of("(?<=((a{1000000000}){1000000000}){1000000000})b|.*")
            .empty()); // a width beyond all numbers is one too
}

TEST_CASE("letters beyond ASCII are compared as whole characters; bytes that are no UTF-8 as they are")
{
    CHECK(pattern_of("a.b").matches("a\u20acb"));
    CHECK(pattern_of("a.b").matches("a\U0001F600b"));
    CHECK(pattern_of("[\u20ac-\u20af]").matches("\u20ad"));
    CHECK_FALSE(pattern_of("[\u20ac-\u20af]").matches("\u20b0"));
    for (const char* broken : {"\xE2\x82", "\xF0\x9F\x98", "\xC3", "\xC3(", "\xFF", "\xE2(\xAC"}) {
        CAPTURE(broken);
        const std::string name = broken;
        CHECK(pattern_of(std::string(name.size(), '.')).matches(name));
        CHECK_FALSE(pattern_of(std::string(name.size() + 1, '.')).matches(name));
    }
}

TEST_CASE("no expression takes exponential time, or more steps than are allowed")
{
    CHECK_FALSE(pattern_of("(a*)*b").matches(std::string(60, 'a')));
    CHECK_FALSE(pattern_of("((a?){20}){30}b").matches(std::string(60, 'a')));
    CHECK(pattern_of("(a|b)*c").matches(std::string(4000, 'a') + "c"));
    CHECK(pattern_of(std::string(400, '(') + "a" + std::string(400, ')')).matches("a"));
    CHECK(pattern_of("a{1000000000}|b").matches("b"));
    std::string nested = "a";
    for (int i = 0; i < 200; ++i) { nested = "(" + nested + "*)"; }
    CHECK(
        refusal_of(nested + "b", std::string(4000, 'a')).find("it takes more than 1000000 steps") != std::string::npos);
}
