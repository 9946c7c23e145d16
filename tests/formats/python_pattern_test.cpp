// Python's regular expressions over names: what re.fullmatch() and re.match() say of them, and what is refused.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>
#include <taskvec/formats/python_pattern.hpp>

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
