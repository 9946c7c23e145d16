// Fingerprints against the values that the xxhash package gives (scripts/make-safetensors-fixtures).
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/fingerprint.hpp>

#include "scratch.hpp"

#include <doctest/doctest.h>

#include <vector>

using namespace taskvec;

TEST_CASE("the fingerprint is what its documentation says")
{
    const safetensors_file file(std::filesystem::path(TASKVEC_TEST_DIR) / "formats" / "data" / "reference.safetensors");
    CHECK(fingerprint(cpu{}, file.model()) == 0x7459cdb3c50a114a);
    std::vector<std::uint32_t> big((1 << 20) + 3);
    for (std::uint32_t i = 0; i < big.size(); ++i) { big[i] = i * 2654435761u; }
    const const_model_ref model{{"big", const_tensor_ref{big.data(), dtype::u32, {(1 << 20) + 3}, {}}}};
    for (const unsigned threads : {1u, 2u, 5u}) {
        CHECK(fingerprint(cpu{.threads = threads}, model) == 0x5315a6888e63f99a);
    }
}

TEST_CASE("every part of a model counts, its place in a file does not")
{
    const float data[] = {1, 2, 3, 4};
    const auto of = [](const const_model_ref& model) { return fingerprint(cpu{.threads = 1}, model); };
    const const_model_ref model{{"a", {data, dtype::f32, {2}, {}}}, {"b", {data + 2, dtype::f32, {2}, {}}}};
    const auto value = of(model);
    CHECK(value == of({{"b", {data + 2, dtype::f32, {2}, {}}}, {"a", {data, dtype::f32, {2}, {}}}}));
    CHECK(value != of({{"a", {data + 2, dtype::f32, {2}, {}}}, {"b", {data, dtype::f32, {2}, {}}}}));
    CHECK(value != of({{"a", {data, dtype::f32, {2}, {}}}, {"c", {data + 2, dtype::f32, {2}, {}}}}));
    CHECK(value != of({{"a", {data, dtype::i32, {2}, {}}}, {"b", {data + 2, dtype::f32, {2}, {}}}}));
    CHECK(value != of({{"a", {data, dtype::f32, {2, 1}, {}}}, {"b", {data + 2, dtype::f32, {2}, {}}}}));
    CHECK(value != of({{"a", {data, dtype::f32, {2}, {}}}}));
    CHECK(of({}) != 0);
    for (const auto& other : {const_tensor_ref{data, dtype::f32, {2}, {2}},
             const_tensor_ref{data, dtype::f32, {2}, {}, memory_space::device}}) {
        CHECK_THROWS_AS((void)of({{"a", other}}), invalid_argument);
        CHECK_THROWS_AS((void)fingerprint_sketch({{"a", other}}), invalid_argument);
    }
}

TEST_CASE("fingerprints as text")
{
    CHECK(fingerprint_text(0x0123456789abcdef) == "xxh64:0123456789abcdef");
    CHECK(parse_fingerprint("xxh64:0123456789abcdef") == 0x0123456789abcdef);
    for (const char* text : {"", "xxh64:", "0123456789abcdef", "xxh64:0123456789abcdeg", "xxh64:-123456789abcdef",
             "xxh64:0123456789abcdef0"}) {
        CHECK_FALSE(parse_fingerprint(text).has_value());
    }
}

TEST_CASE("a fingerprint can be cancelled")
{
    const std::vector<float> values(4);
    cpu policy{.threads = 1};
    policy.progress = [](const progress_event& event) {
        CHECK(event.phase == "fingerprint");
        return false;
    };
    CHECK_THROWS_AS((void)fingerprint(policy, {{"a", as_tensor(as_view(values))}}), cancelled);
}
