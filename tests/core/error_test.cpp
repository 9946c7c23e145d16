// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/error.hpp>

#include <doctest/doctest.h>

using namespace taskvec;

TEST_CASE("one catch clause sees every kind, with its kind and message")
{
    const auto kind_of = [](auto&& thrower) {
        try {
            thrower();
        }
        catch (const error& caught) {
            CHECK(std::string(caught.what()).find("what") != std::string::npos);
            return caught.kind();
        }
        FAIL("nothing was thrown");
        return error_kind{};
    };
    CHECK(kind_of([] { raise<invalid_argument>(error_code::density_out_of_range, "what"); })
        == error_kind::invalid_argument);
    CHECK(kind_of([] { raise<shape_mismatch>(error_code::tensor_shape, "what"); }) == error_kind::shape_mismatch);
    CHECK(kind_of([] { raise<dtype_mismatch>(error_code::dtype_differs, "what"); }) == error_kind::dtype_mismatch);
    CHECK(kind_of([] { raise<nonfinite_error>(error_code::not_finite, "what"); }) == error_kind::nonfinite);
    CHECK(kind_of([] { raise<format_error>(error_code::json_syntax, "what", "file"); }) == error_kind::format_error);
    CHECK(kind_of([] { raise<io_error>(error_code::disk_full, "what", "file"); }) == error_kind::io_error);
    CHECK(
        kind_of([] { raise<backend_error>(error_code::device_lost, "what", "call", 7); }) == error_kind::backend_error);
    CHECK(kind_of([] { raise<cancelled>(error_code::cancelled, "what"); }) == error_kind::cancelled);
}

TEST_CASE("errors keep the file, the offset, the code and the call")
{
    const format_error format(error_code::json_syntax, "bad header", "m.safetensors", 8);
    CHECK(format.file() == "m.safetensors");
    CHECK(format.offset() == 8);
    CHECK(std::string(format.what()) == "m.safetensors: bad header");
    CHECK(std::string(format_error(error_code::json_syntax, "bad header", "").what()) == "bad header");
    CHECK(io_error(error_code::file_not_found, "cannot open", "m.safetensors", 2).system_code() == 2);
    CHECK(format.code() == error_code::json_syntax);
    const backend_error backend(error_code::no_convergence, "failed", "gesvd", 3);
    CHECK(backend.code() == error_code::no_convergence);
    CHECK(backend.backend_code() == 3);
    CHECK(backend.call() == "gesvd");
    CHECK(std::string(backend.what()) == "gesvd: failed (code 3)");
}

TEST_CASE("a code of a caller's own passes through, beside the library's kind")
{
    constexpr auto mine = static_cast<error_code>(10001);
    try {
        raise<invalid_argument>(mine, "the moon is full");
    }
    catch (const error& failure) {
        CHECK(failure.code() == mine);
        CHECK(failure.kind() == error_kind::invalid_argument);
        CHECK(std::string(failure.what()) == "the moon is full"); // the code is not part of the message
        CHECK(to_string(failure.code()) == "user-defined");
    }
}

TEST_CASE("a message joins text and numbers")
{
    CHECK(message("a ", std::string("b "), std::string_view("c "), 'd', ' ', -1, ' ', 18446744073709551615ull, ' ', 0.1)
        == "a b c d -1 18446744073709551615 0.1");
}

TEST_CASE("the handler for builds without exceptions can be replaced and restored")
{
    const error_handler mine = [](const error&) { };
    const error_handler former = set_error_handler(mine);
    CHECK((set_error_handler(former) == mine));
}
