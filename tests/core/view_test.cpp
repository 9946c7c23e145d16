// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/view.hpp>

#include <doctest/doctest.h>

#include <array>
#include <list>
#include <span>
#include <vector>

using namespace taskvec;

TEST_CASE("containers of storage elements become views of their own memory")
{
    std::vector<float> values{1, 2, 3};
    const std::vector<float>& constant = values;
    std::array<double, 2> pair{4, 5};
    std::span<const float> span(values);

    const host_view<float> writable = as_view(values);
    CHECK(writable.data() == values.data());
    CHECK(writable.size() == 3);
    writable[1] = 7;
    CHECK(values[1] == 7);

    static_assert(std::same_as<view_of<std::vector<float>&>, host_view<float>>);
    static_assert(std::same_as<view_of<const std::vector<float>&>, host_view<const float>>);
    static_assert(std::same_as<view_of<std::span<const float>&>, host_view<const float>>);
    static_assert(std::same_as<element_of<std::array<double, 2>&>, double>);
    CHECK(as_view(constant).data() == values.data());
    CHECK(as_view(span).size() == 3);
    CHECK(as_view(pair)[1] == 5);
    CHECK(as_view(writable).data() == values.data());
    CHECK(host_view<const float>(writable).data() == values.data());
    CHECK(host_view<float>{}.empty());
    double sum = 0;
    for (const double value : as_view(pair)) { sum += value; }
    CHECK(sum == 9);
}

TEST_CASE("what is not contiguous, or not a storage type, is no view")
{
    static_assert(!viewable<std::list<float>>);
    static_assert(!viewable<std::vector<int>>);
    static_assert(!viewable<float>);
    static_assert(!std::constructible_from<host_view<float>, host_view<const float>>);
    static_assert(!std::constructible_from<host_view<const float>, device_view<float>>);
}
