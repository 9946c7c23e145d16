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
    CHECK(kind_of([] { raise<invalid_argument>("what"); }) == error_kind::invalid_argument);
    CHECK(kind_of([] { raise<shape_mismatch>("what"); }) == error_kind::shape_mismatch);
    CHECK(kind_of([] { raise<dtype_mismatch>("what"); }) == error_kind::dtype_mismatch);
    CHECK(kind_of([] { raise<nonfinite_error>("what"); }) == error_kind::nonfinite);
    CHECK(kind_of([] { raise<format_error>("what", "file"); }) == error_kind::format_error);
    CHECK(kind_of([] { raise<io_error>("what", "file"); }) == error_kind::io_error);
    CHECK(kind_of([] { raise<backend_error>("what", "call", 7); }) == error_kind::backend_error);
    CHECK(kind_of([] { raise<cancelled>("what"); }) == error_kind::cancelled);
}

TEST_CASE("errors keep the file, the offset, the code and the call")
{
    const format_error format("bad header", "m.safetensors", 8);
    CHECK(format.file() == "m.safetensors");
    CHECK(format.offset() == 8);
    CHECK(std::string(format.what()) == "m.safetensors: bad header");
    CHECK(std::string(format_error("bad header", "").what()) == "bad header");
    CHECK(io_error("cannot open", "m.safetensors", 2).code() == 2);
    const backend_error backend("failed", "gesvd", 3);
    CHECK(backend.code() == 3);
    CHECK(backend.call() == "gesvd");
    CHECK(std::string(backend.what()) == "gesvd: failed (code 3)");
}

TEST_CASE("a message joins text and numbers")
{
    CHECK(message("a ", std::string("b "), std::string_view("c "), 'd', ' ', -1, ' ', 18446744073709551615ull, ' ', 0.1)
        == "a b c d -1 18446744073709551615 0.1");
}

TEST_CASE("the handler for builds without exceptions can be replaced and restored")
{
    const error_handler mine = [](error_kind, const char*) { };
    const error_handler former = set_error_handler(mine);
    CHECK((set_error_handler(former) == mine));
}
