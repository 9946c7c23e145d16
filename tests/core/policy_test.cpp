// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/policy.hpp>

#include <doctest/doctest.h>

#include <vector>

using namespace taskvec;

TEST_CASE("a policy reads and writes views of its own memory space only")
{
    static_assert(policy<cpu>);
    static_assert(!policy<int>);
    static_assert(input_of<std::vector<float>&, cpu>);
    static_assert(input_of<const std::vector<bf16>&, cpu>);
    static_assert(!input_of<device_view<float>, cpu>);
    static_assert(output_of<std::vector<float>&, cpu>);
    static_assert(!output_of<const std::vector<float>&, cpu>);
    static_assert(!output_of<host_view<const float>, cpu>);
    static_assert(!output_of<device_view<float>, cpu>);
}
