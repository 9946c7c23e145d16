// safetensors: the reference reader's verdicts, the reference writer's bytes, and files that are damaged at random.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/random.hpp>
#include <taskvec/formats/safetensors.hpp>

#include "../skip.hpp"
#include "scratch.hpp"

#include <doctest/doctest.h>

#include <csignal>
#include <random>
#include <thread>

#if !defined(_WIN32)
#include <sys/wait.h>
#endif

using namespace taskvec;

namespace {

const std::filesystem::path data_folder = std::filesystem::path(TASKVEC_TEST_DIR) / "formats" / "data";

std::span<const std::byte> bytes_of(const std::string& text)
{
    return std::as_bytes(std::span(text));
}

std::string from_hex(const std::string& hex)
{
    std::string result;
    for (std::size_t i = 0; i < hex.size(); i += 2) {
        result += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    }
    return result;
}

/// True when the file parses; false when it is refused by a format_error. Anything else fails the test.
bool accepted(const std::string& content)
{
    try {
        const auto header = parse_safetensors(bytes_of(content), "f");
        std::uint64_t end = header.data_offset;
        for (const auto& entry : header.entries) { // what was accepted keeps its promises
            CHECK(entry.offset == end);
            CHECK(entry.bytes == byte_count(entry.dtype, element_count(entry.shape)));
            end += entry.bytes;
        }
        CHECK(end == content.size());
        return true;
    }
    catch (const format_error&) {
        return false;
    }
}

std::vector<tensor_spec> specs_of(const safetensors_file& file)
{
    std::vector<tensor_spec> specs;
    for (const auto& [name, tensor] : file.model()) { specs.push_back({name, tensor.dtype, tensor.shape}); }
    return specs;
}

} // namespace

TEST_CASE("a corpus of files gets the reference reader's verdicts, but for what is stricter on purpose")
{
    const auto corpus = nlohmann::json::parse(slurp(data_folder / "corpus.json"));
    REQUIRE(corpus.size() > 200);
    for (const auto& entry : corpus) {
        const auto label = entry["label"].get<std::string>();
        CAPTURE(label);
        CHECK(accepted(from_hex(entry["file"].get<std::string>())) == entry["valid"].get<bool>());
    }
}

TEST_CASE("deep nesting does not reach the stack's end")
{
    for (const std::size_t depth : {1'000u, 5'000'000u}) {
        CHECK_FALSE(accepted(safetensors_bytes("{\"a\":{\"x\":" + std::string(depth, '['))));
        CHECK_FALSE(accepted(safetensors_bytes(std::string(depth, '['))));
        std::string objects;
        for (std::size_t i = 0; i < depth / 5; ++i) { objects += "{\"a\":"; }
        CHECK_FALSE(accepted(safetensors_bytes(objects)));
    }
}

TEST_CASE("errors name the file, the tensor, and what was expected")
{
    const auto text_of = [](const std::string& header, const std::string& data = {}) -> std::string {
        const auto content = safetensors_bytes(header, data);
        try {
            (void)parse_safetensors(bytes_of(content), "m.safetensors");
        }
        catch (const format_error& failure) {
            return failure.what();
        }
        return "accepted";
    };
    CHECK(text_of(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "1234")
        == "m.safetensors: tensor 'w' of dtype F32 and shape [2] needs 8 bytes; its data_offsets give it 4");
    CHECK(text_of(R"({"w":{"dtype":"F99","shape":[2],"data_offsets":[0,4]}})")
        == "m.safetensors: tensor 'w' has the unknown dtype 'F99'");
    CHECK(text_of(R"({"w":{"shape":[2],"data_offsets":[0,4]}})") == "m.safetensors: tensor 'w' has no dtype");
    CHECK(text_of(R"({"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})")
        == "m.safetensors: tensor 'w' has a negative number in its shape; expected unsigned integers");
    CHECK(text_of(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "12")
        == "m.safetensors: has 2 bytes of tensor data; its header describes 4: the file is cut short; fetch it again");
    CHECK(text_of(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":1})", "1234")
        == "m.safetensors: tensor 'w' occurs twice in the header");
    CHECK(
        text_of(
            R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"v":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
            "123")
        == "m.safetensors: tensor 'v' begins at byte 2 of the buffer; expected 1, where the tensor before it ends: the "
           "buffer has a hole");
    CHECK(text_of("{]").find("header is not valid JSON at byte 9") != std::string::npos);
}

TEST_CASE("refusals carry the code of their subject")
{
    const auto code_of = [](const std::string& file) {
        try {
            (void)parse_safetensors(bytes_of(file), "m.safetensors");
        }
        catch (const format_error& failure) {
            return failure.code();
        }
        return error_code{};
    };
    const auto file_of = [](const std::string& header, const std::string& data) {
        const std::uint64_t length = header.size();
        std::string text(8, '\0');
        std::memcpy(text.data(), &length, 8);
        return text + header + data;
    };
    const std::string header = R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                      whole = file_of(header, "1234");
    CHECK(code_of(whole) == error_code{});
    for (const std::size_t size : {std::size_t{20}, whole.size() - 1}) {
        CHECK(code_of(whole.substr(0, size)) == error_code::file_truncated);
    }
    CHECK(code_of(whole + "5") == error_code::tensor_offsets);
    CHECK(code_of("") == error_code::not_safetensors);
    CHECK(code_of(std::string(16, '\xff')) == error_code::not_safetensors);
    CHECK(code_of(file_of("{]", "")) == error_code::json_syntax);
    CHECK(code_of(file_of("[]", "")) == error_code::header_field);
    CHECK(code_of(file_of(R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "1234"))
        == error_code::tensor_offsets);
}

TEST_CASE("the reference writer's file is read, and written again byte for byte")
{
    const scratch folder;
    const safetensors_file file(data_folder / "reference.safetensors");
    CHECK(file.metadata() == metadata_map{{"format", "pt"}});
    const auto model = file.model();
    REQUIRE(model.size() == 15);
    for (std::size_t i = 1; i < model.size(); ++i) { CHECK(model[i - 1].name < model[i].name); }
    const auto* ints = model.find("ints");
    REQUIRE(ints);
    CHECK(ints->dtype == dtype::i32);
    CHECK(ints->shape == extents{4});
    std::int32_t values[4];
    std::memcpy(values, ints->data, sizeof values);
    CHECK(values[3] == 3);
    CHECK(model.find("scalar")->shape.empty());
    float scalar;
    std::memcpy(&scalar, model.find("scalar")->data, sizeof scalar);
    CHECK(scalar == 2.5f);
    CHECK(model.find("empty")->shape == extents{0, 4});
    CHECK(model.find("näme \"quoted\"\\\t\x01/"));
    CHECK(model.find("brain")->dtype == dtype::bf16);
    CHECK(model.find("fp8")->dtype == dtype::f8_e4m3);

    write_safetensors(folder / "copy", model, file.metadata());
    CHECK(slurp(folder / "copy") == slurp(data_folder / "reference.safetensors"));
    write_safetensors(folder / "defaults", model); // {"format":"pt"} is added
    CHECK(slurp(folder / "defaults") == slurp(data_folder / "reference.safetensors"));
}

TEST_CASE("metadata is kept, and a format of its own too")
{
    const scratch folder;
    write_safetensors(folder / "f", {}, {{"format", "np"}, {"a \"key\"", "värde\n"}});
    const safetensors_file file(folder / "f");
    CHECK(file.metadata() == metadata_map{{"format", "np"}, {"a \"key\"", "värde\n"}});
    CHECK(file.entries().empty());
    CHECK(std::filesystem::file_size(folder / "f") % 8 == 0);
}

TEST_CASE("random models come back bit for bit, written in random pieces by several threads")
{
    const scratch folder;
    std::mt19937 random(11);
    constexpr dtype types[] = {dtype::boolean, dtype::f4, dtype::u8, dtype::f8_e5m2fnuz, dtype::i16, dtype::f16,
        dtype::bf16, dtype::f32, dtype::c64, dtype::f64, dtype::u64};
    for (int round = 0; round < 30; ++round) {
        std::vector<tensor_spec> specs;
        std::vector<std::string> contents;
        const auto count = random() % 8;
        for (std::size_t i = 0; i < count; ++i) {
            tensor_spec spec{"t" + std::to_string(random() % 1000) + "." + std::to_string(i),
                types[random() % std::size(types)], {}};
            for (std::size_t rank = random() % 4; rank > 0; --rank) {
                spec.shape.push_back(static_cast<std::int64_t>(random() % 6));
            }
            if (bits_per_element(spec.dtype) < 8) { spec.shape.push_back(2); }
            contents.emplace_back(spec.bytes(), '\0');
            for (auto& c : contents.back()) { c = static_cast<char>(random()); }
            specs.push_back(std::move(spec));
        }
        safetensors_writer writer(folder / "f", specs, {{"round", std::to_string(round)}}, durability::process);
        {
            std::vector<std::jthread> threads;
            for (std::size_t t = 0; t < 3; ++t) {
                threads.emplace_back([&, t, step = 1 + random() % 7] {
                    for (std::size_t i = t; i < specs.size(); i += 3) {
                        for (std::size_t at = 0; at < contents[i].size(); at += step) {
                            writer.write(
                                i, at, contents[i].data() + at, std::min<std::size_t>(step, contents[i].size() - at));
                        }
                    }
                });
            }
        }
        writer.commit();
        const safetensors_file file(folder / "f");
        REQUIRE(file.entries().size() == specs.size());
        const auto model = file.model();
        for (std::size_t i = 0; i < specs.size(); ++i) {
            const auto* tensor = model.find(specs[i].name);
            REQUIRE(tensor);
            CHECK(tensor->dtype == specs[i].dtype);
            CHECK(tensor->shape == specs[i].shape);
            CHECK(std::string(static_cast<const char*>(tensor->data), tensor->bytes()) == contents[i]);
        }
        for (std::size_t i = 1; i < file.entries().size(); ++i) {
            const auto &a = file.entries()[i - 1], &b = file.entries()[i];
            CHECK((a.dtype > b.dtype || (a.dtype == b.dtype && a.name < b.name)));
        }
    }
}

TEST_CASE("what cannot be written is refused before a file appears")
{
    const scratch folder;
    const auto refused = [&](const std::vector<tensor_spec>& specs, const metadata_map& metadata = {}) {
        CHECK_THROWS_AS(safetensors_writer(folder / "f", specs, metadata), error);
        CHECK(folder.names().empty());
    };
    refused({{"a", dtype::f32, {1}}, {"a", dtype::f32, {1}}});
    refused({{"__metadata__", dtype::f32, {1}}});
    refused({{"\xff", dtype::f32, {1}}});
    refused({{"a", dtype::f4, {1}}});
    refused({{"a", dtype::f32, {-1}}});
    refused({{"a", dtype::f32, {std::int64_t{1} << 62}}});
    refused({{"a", dtype::u8, {std::int64_t{1} << 62}}, {"b", dtype::u8, {std::int64_t{1} << 62}},
        {"c", dtype::f64, {std::int64_t{1} << 60}}, {"d", dtype::f64, {std::int64_t{1} << 59}}});
    refused({}, {{"k", "\xff"}});
}

TEST_CASE("writes outside a tensor, and an incomplete file, are refused")
{
    const scratch folder;
    spill(folder / "f", "old");
    safetensors_writer writer(folder / "f", {{"a", dtype::u8, {4}}, {"b", dtype::u8, {4}}});
    CHECK_THROWS_AS(writer.write(0, 2, "xxx", 3), invalid_argument);
    CHECK_THROWS_AS(writer.write(0, 5, "", 0), invalid_argument);
    CHECK_THROWS_AS(writer.write(2, 0, "x", 1), invalid_argument);
    writer.write(0, 0, "aaaa", 4);
    CHECK_THROWS_AS(writer.commit(), invalid_argument);
    CHECK(slurp(folder / "f") == "old");
    writer.write(1, 0, "bbbb", 4);
    writer.commit();
    CHECK(safetensors_file(folder / "f").entries().size() == 2);
    CHECK(folder.names() == std::set<std::string>{"f"});
}

TEST_CASE("a file may be replaced while it is read")
{
    const scratch folder;
    const std::vector<float> values{1, 2, 3};
    const_model_ref model{{"w", as_tensor(as_view(values))}};
    write_safetensors(folder / "f", model);
    const safetensors_file input(folder / "f");
    const auto old = input.model();
    safetensors_writer writer(folder / "f", specs_of(input), input.metadata());
    const auto* from = static_cast<const float*>(old[0].tensor.data);
    for (std::size_t i = 0; i < 3; ++i) {
        const float twice = 2 * from[i];
        writer.write(0, 4 * i, &twice, 4);
    }
#if defined(_WIN32)
    CHECK_THROWS_AS(writer.commit(), io_error); // not there: the old file stays
    CHECK(from[2] == 3.0f);
    constexpr float expected = 3.0f;
#else
    writer.commit();
    CHECK(from[2] == 3.0f); // the map keeps the old bytes
    constexpr float expected = 6.0f;
#endif
    const safetensors_file output(folder / "f");
    CHECK(static_cast<const float*>(output.model()[0].tensor.data)[2] == expected);
}

#if !defined(_WIN32)
TEST_CASE("a writer that is killed at any moment leaves the old file or the new")
{
    const scratch folder;
    const std::vector<float> before(1 << 16, 1.0f), after(1 << 16, 2.0f);
    write_safetensors(folder / "f", {{"w", as_tensor(as_view(before))}});
    int seen_old = 0;
    for (int delay = 0; delay < 40; ++delay) {
        const pid_t child = ::fork();
        if (child == 0) {
            try {
                for (;;) {
                    write_safetensors(folder / "f", {{"w", as_tensor(as_view(after))}}, {},
                        delay % 2 ? durability::synchronised : durability::process);
                }
            }
            catch (...) {
            }
            ::_exit(1);
        }
        ::usleep(static_cast<useconds_t>(100 * delay));
        ::kill(child, SIGKILL);
        int status = 0;
        ::waitpid(child, &status, 0);
        CHECK(WIFSIGNALED(status));
        const safetensors_file file(folder / "f"); // throws if it is half of one
        const auto* values = static_cast<const float*>(file.model()[0].tensor.data);
        CHECK(values[0] == values[(1 << 16) - 1]);
        seen_old += values[0] == 1.0f;
        write_safetensors(folder / "f", {{"w", as_tensor(as_view(before))}}, {}, durability::process);
    }
    MESSAGE("the old file stood ", seen_old, " times of 40");
}
#endif

TEST_CASE("files damaged at random either parse or are refused by an error")
{
    const std::string good = slurp(data_folder / "reference.safetensors");
    const auto corpus = nlohmann::json::parse(slurp(data_folder / "corpus.json"));
    std::vector<std::string> seeds{good};
    for (const auto& entry : corpus) { seeds.push_back(from_hex(entry["file"].get<std::string>())); }
    const std::vector<std::string> words{"[", "]", "{", "}", ",", ":", "\"", "\\", "\\u0061", "-", "1e9",
        "18446744073709551615", "9223372036854775808", "null", "\"a\"", "\"dtype\"", "\"shape\"", "\"data_offsets\"",
        "\"__metadata__\"", "\"F32\"", "\"F4\"", "0", std::string(1, '\0'), "\xff", "\xc3", " "};
    std::mt19937 random(2024);
    int parsed = 0;
    for (int round = 0; round < 20'000; ++round) {
        std::string content = seeds[random() % (round % 2 ? seeds.size() : 1)];
        for (auto edits = 1 + random() % 4; edits > 0 && !content.empty(); --edits) {
            // Most of the damage goes where the header is; half of it keeps the header's length right.
            const std::size_t at =
                random() % (random() % 4 ? std::min<std::size_t>(content.size(), 1000) : content.size());
            const auto before = content.size();
            switch (random() % 6) {
            case 0: content[at] = static_cast<char>(random()); break;
            case 1: content.erase(at, 1 + random() % 8); break;
            case 2: content.insert(at, words[random() % words.size()]); break;
            case 3: content.resize(at); break;
            case 4: content[at] = static_cast<char>(content[at] ^ (1 << random() % 8)); break;
            default: content.insert(at, content.substr(random() % content.size(), random() % 64)); break;
            }
            if (random() % 2 && at >= 8 && content.size() >= 8) {
                std::uint64_t length = 0;
                std::memcpy(&length, content.data(), 8);
                length += content.size() - before;
                std::memcpy(content.data(), &length, 8);
            }
        }
        parsed += accepted(content);
    }
    CHECK(parsed > 20); // the damage is not so heavy that only the first check is ever reached
    CHECK(parsed < 19'000);
}

#if defined(_WIN32)
TEST_CASE("what is of POSIX alone")
{
    testing::skip("a writer that is killed at any moment: Windows has no fork");
}
#endif
