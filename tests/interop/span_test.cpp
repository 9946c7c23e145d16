// Contiguous ranges of the standard library as inputs and outputs.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/policy.hpp>

#include <doctest/doctest.h>

#include <array>
#include <deque>
#include <list>
#include <span>
#include <vector>

using namespace taskvec;

TEST_CASE("vectors, arrays and spans are viewed in place")
{
    std::vector<float> numbers{1, 2, 3};
    std::array<double, 2> pair{4, 5};
    const std::span<const float> part = std::span(numbers).subspan(1);
    CHECK(as_view(numbers).data() == numbers.data());
    CHECK(as_view(numbers).size() == 3);
    CHECK(as_view(pair).size() == 2);
    CHECK(as_view(part).data() == numbers.data() + 1);
    CHECK(as_view(std::span(numbers).first(2)).size() == 2);
    as_view(numbers)[0] = 7;
    CHECK(numbers[0] == 7);
}

TEST_CASE("constness goes through")
{
    static_assert(output_of<std::vector<float>&, cpu>);
    static_assert(!output_of<const std::vector<float>&, cpu>);
    static_assert(input_of<const std::vector<float>&, cpu>);
    static_assert(output_of<std::span<float>, cpu>);
    static_assert(!output_of<std::span<const float>, cpu>);
    static_assert(input_of<std::span<const float>, cpu>);
    // A span is a pointer: its own constness says nothing of its elements.
    static_assert(output_of<const std::span<float>&, cpu>);
}

TEST_CASE("what is no contiguous run of a storage type is no view")
{
    static_assert(!viewable<std::deque<float>&>);
    static_assert(!viewable<std::list<float>&>);
    static_assert(!viewable<std::vector<int>&>);
    static_assert(!viewable<std::vector<bool>&>);
    static_assert(viewable<std::vector<bf16>&> && viewable<std::vector<f16>&>);
    const std::vector<float> empty;
    CHECK(as_view(empty).empty());
}
