// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/dtype.hpp>

#include <doctest/doctest.h>

#include <cstddef>

using namespace taskvec;

TEST_CASE("names and sizes are safetensors' and round-trip")
{
    for (const auto& row : detail::dtype_table) {
        CHECK(detail::dtype_table[static_cast<std::size_t>(row.type)].name == row.name);
        CHECK(parse_dtype(to_string(row.type)) == row.type);
    }
    CHECK(to_string(dtype::bf16) == "BF16");
    CHECK(bits_per_element(dtype::f6_e2m3) == 6);
    CHECK(bits_per_element(dtype::c64) == 64);
    CHECK_FALSE(parse_dtype("bf16").has_value());
    CHECK_FALSE(parse_dtype("").has_value());
    CHECK(is_fp8(dtype::f8_e5m2));
    CHECK_FALSE(is_fp8(dtype::u8));
}
