// Strict JSON.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/json.hpp>

#include <doctest/doctest.h>

#include <string>
#include <utility>

using namespace taskvec;

TEST_CASE("valid JSON is read as nlohmann reads it")
{
    for (const std::string text :
        {R"({"a":[1,-2,3.5,"x",null,true,{}],"b":{"c":[[]]}})", "[]", "1", "\"x\"", " \n{} \t"}) {
        CHECK(parse_json(text, "f") == nlohmann::json::parse(text));
    }
}

TEST_CASE("what is not strict JSON is a format_error that says where")
{
    for (const std::string text : {"", " ", "{", "[1,]", "{}x", "{} {}", "\xef\xbb\xbf{}", "nul", "{'a':1}", "[1e999]",
             "\"\xff\"", "\"\\ud800\"", "// c\n1"}) {
        CHECK_THROWS_AS((void)parse_json(text, "f"), format_error);
    }
    CHECK_THROWS_AS((void)parse_json(std::string("{}\0", 3), "f"), format_error);
    try {
        (void)parse_json("[1, x]", "file.json", 100);
        FAIL("accepted");
    }
    catch (const format_error& failure) {
        CHECK(failure.file() == "file.json");
        CHECK(failure.offset() == 104);
        CHECK(failure.code() == error_code::json_syntax);
        CHECK(std::string(failure.what()).find_first_of("[]") == std::string::npos);
    }
}

TEST_CASE("an error does not repeat what is long")
{
    try {
        (void)parse_json("{\"x\":" + std::string(5'000'000, '1') + "}", "f");
        FAIL("accepted");
    }
    catch (const format_error& failure) {
        CHECK(std::string(failure.what()).size() < 1000);
        CHECK(std::string(failure.what()).find("111") != std::string::npos);
    }
}

TEST_CASE("what stands in place of JSON is called what it is")
{
    const std::string pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n";
    for (const auto& [text, words] : {std::pair<std::string, std::string>{pointer,
                                          "is a Git LFS pointer, not the file that it stands for: fetch a "
                                          "file of 123456 bytes, the real one"},
             {"<!DOCTYPE html><html></html>", "is a page of HTML"}, {"  <html>", "is a page of HTML"},
             {std::string("PK\x03\x04\0\0", 6), "zip archive"}, {"version 2", "invalid JSON at byte 0"}}) {
        CHECK_THROWS_WITH_AS((void)parse_json(text, "config.json"), doctest::Contains(words.c_str()), format_error);
    }
    CHECK_THROWS_WITH_AS((void)parse_json(pointer, "model.safetensors", 8), // within another file
        doctest::Contains("invalid JSON at byte 8"), format_error);
}

TEST_CASE("a key that occurs twice is refused at any depth")
{
    CHECK_THROWS_WITH_AS(
        (void)parse_json(R"({"a":1,"a":1})", "f"), "f: key 'a' occurs twice in one JSON object", format_error);
    CHECK_THROWS_AS((void)parse_json(R"({"b":[{"a":1,"\u0061":1}]})", "f"), format_error);
    CHECK_NOTHROW((void)parse_json(R"({"a":{"a":1},"b":{"a":1}})", "f"));
}

TEST_CASE("nesting is bounded")
{
    const auto nested = [](std::size_t depth) { return std::string(depth, '[') + std::string(depth, ']'); };
    CHECK_NOTHROW((void)parse_json(nested(json_depth_limit), "f"));
    CHECK_THROWS_AS((void)parse_json(nested(json_depth_limit + 1), "f"), format_error);
    CHECK_THROWS_AS((void)parse_json(std::string(1'000'000, '['), "f"), format_error);
}

TEST_CASE("the number of values is bounded")
{
    std::string numbers = "[0";
    for (std::size_t i = 1; i < 1'999'999; ++i) { numbers += ",0"; }
    CHECK(parse_json(numbers + "]", "file").size() == 1'999'999);
    CHECK_THROWS_WITH_AS(
        (void)parse_json(numbers + ",0]", "file"), doctest::Contains("more than 2000000 values"), format_error);
}

TEST_CASE("texts and flags under a key are those of the right type, and nothing otherwise")
{
    const auto object = parse_json(R"({"text":"words","yes":true,"no":false,"one":1,"none":null})", "f");
    CHECK(text_under(object, "text") == "words");
    for (const char* key : {"yes", "one", "none", "missing"}) { CHECK(text_under(object, key).empty()); }
    CHECK(flag_under(object, "yes"));
    for (const char* key : {"no", "one", "text", "none", "missing"}) { CHECK_FALSE(flag_under(object, key)); }
}

TEST_CASE("UTF-8 is recognised by its definition")
{
    CHECK(is_utf8(""));
    CHECK(is_utf8(
        "a\x7f\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xef\xbf\xbf\xf0\x90\x80\x80\xf4\x8f\xbf\xbf"));
    for (const std::string text : {"\x80", "\xc1\xbf", "\xc2", "\xc2z", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xe1\x80",
             "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xf1\x80\x80", "\xe1z\x80", "\xe1\x80z",
             "\xf1z\x80\x80", "\xf1\x80z\x80", "\xf1\x80\x80z", "\xff"}) {
        CHECK_FALSE(is_utf8(text));
    }
}

TEST_CASE("strings come back from their JSON form")
{
    std::string all;
    for (int c = 0; c < 128; ++c) { all += static_cast<char>(c); }
    all += "é😀";
    CHECK(nlohmann::json::parse(json_string(all)).get<std::string>() == all);
    CHECK(json_string("a\"\\\n\x01é/\x7f") == "\"a\\\"\\\\\\n\\u0001é/\x7f\"");
    CHECK_THROWS_AS((void)json_string("\xff"), invalid_argument);
}

TEST_CASE("Python's constants become strings and come back, outside of strings alone")
{
    const std::string text = R"({"a": [NaN, Infinity, -Infinity, 1], "NaN": "x\\", "b": "\"NaN"})";
    const auto json = parse_configuration(text, "f");
    CHECK(json["a"][0] == "\u0001NaN");
    CHECK(json["a"][3] == 1);
    CHECK(json["NaN"] == "x\\");
    CHECK(json["b"] == "\"NaN");
    CHECK(restored_constants(nlohmann::ordered_json::parse(quoted_constants(text)).dump())
        == R"({"a":[NaN,Infinity,-Infinity,1],"NaN":"x\\","b":"\"NaN"})");
    CHECK_THROWS_AS((void)parse_json(text, "f"), format_error);
    CHECK_THROWS_AS((void)parse_configuration("{\"a\": Infinit}", "f"), format_error);
    CHECK_THROWS_AS((void)parse_configuration("\"a\\", "f"), format_error); // cut behind a backslash
}
