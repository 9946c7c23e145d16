// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/callback.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>

using namespace taskvec;

namespace {
int twice(int x)
{
    return 2 * x;
}

int sum_of(std::size_t count, function_ref<int(std::size_t)> term)
{
    int sum = 0;
    for (std::size_t i = 0; i < count; ++i) { sum += term(i); }
    return sum;
}
} // namespace

TEST_CASE("a callback owns what it calls, and copies are apart")
{
    callback<int()> count = [n = 0]() mutable { return ++n; };
    CHECK(count() == 1);
    const callback<int()> copy = count;
    CHECK(count() == 2);
    CHECK(count() == 3);
    CHECK(copy() == 2);
    callback<int()> moved = std::move(count);
    CHECK(moved() == 4);
    CHECK_FALSE(static_cast<bool>(count)); // NOLINT(bugprone-use-after-move)
    count = copy;
    CHECK(count() == 3);
    count = nullptr;
    CHECK_FALSE(static_cast<bool>(count));
}

TEST_CASE("what a callback owns lives as long as it does")
{
    const auto owned = std::make_shared<int>(7);
    {
        callback<int()> first = [owned] { return *owned; };
        CHECK(owned.use_count() == 2);
        const callback<int()> second = first;
        CHECK(owned.use_count() == 3);
        first = [] { return 1; };
        CHECK(owned.use_count() == 2);
        CHECK(second() == 7);
    }
    CHECK(owned.use_count() == 1);
}

TEST_CASE("a callback is made of functions, pointers and std::function, and is empty where they are")
{
    const callback<long(int)> f = twice, g = &twice, h = std::function<int(int)>(twice);
    CHECK(f(3) == 6);
    CHECK(g(3) == 6);
    CHECK(h(3) == 6);
    int (*const nothing)(int) = nullptr;
    CHECK_FALSE(static_cast<bool>(callback<int(int)>()));
    CHECK_FALSE(static_cast<bool>(callback<int(int)>(nothing)));
    CHECK_FALSE(static_cast<bool>(callback<int(int)>(std::function<int(int)>())));
    CHECK_FALSE(static_cast<bool>(callback<int(int)>(callback<long(long)>())));
    static_assert(!std::is_convertible_v<int, callback<int()>>);
    static_assert(!std::is_convertible_v<decltype([](std::string&) { }), callback<void(const std::string&)>>);
}

TEST_CASE("arguments and results go through as they are")
{
    const callback<std::unique_ptr<int>(std::unique_ptr<int>)> pass = [](std::unique_ptr<int> x) { return x; };
    CHECK(*pass(std::make_unique<int>(5)) == 5);
    int n = 1;
    const callback<int&(int&)> same = [](int& x) -> int& { return x; };
    same(n) = 2;
    CHECK(n == 2);
}

TEST_CASE("a function_ref calls what the caller holds")
{
    CHECK(sum_of(4, [](std::size_t i) { return static_cast<int>(i); }) == 6);
    int calls = 0;
    auto counting = [&calls](std::size_t) { return ++calls; };
    CHECK(sum_of(3, counting) == 6);
    CHECK(calls == 3);
    const function_ref<int(std::size_t)> by_value = counting;
    const std::function<int(std::size_t)> wrapped = by_value;
    CHECK(wrapped(0) == 4);
}
