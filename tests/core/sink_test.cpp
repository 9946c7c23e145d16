// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/sink.hpp>

#include <doctest/doctest.h>

#include <vector>

using namespace taskvec;

TEST_CASE("a memory sink writes in place, or bytes at an offset")
{
    std::vector<float> first(2), second(3);
    memory_sink sink({first.data(), second.data()});
    CHECK(sink.direct(1) == second.data());
    const float value = 5;
    tensor_sink& any = sink;
    any.write(1, 8, &value, sizeof value);
    CHECK(second == std::vector<float>{0, 0, 5});
    const tensor_spec spec{"w", dtype::bf16, {2, 3}};
    CHECK(spec.size() == 6);
    CHECK(spec.bytes() == 12);
}
