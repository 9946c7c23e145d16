// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/error.hpp>
#include <taskvec/core/parallel.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <vector>

using namespace taskvec;

TEST_CASE("every index is visited once, whatever the number of threads")
{
    for (const unsigned threads : {0u, 1u, 2u, 3u, 4u, 9u}) {
        for (const std::size_t count : {0u, 1u, 2u, 7u, 1000u}) {
            std::vector<std::atomic<int>> visits(count);
            std::vector<std::atomic<int>> busy(worker_count({.threads = threads}, count));
            std::atomic<bool> shared = false;
            for_each_index({.threads = threads}, count, [&](std::size_t index, std::size_t worker) {
                if (busy.at(worker)++ != 0) { shared = true; }
                ++visits.at(index);
                --busy.at(worker);
            });
            CHECK_FALSE(shared);
            for (const auto& visit : visits) { CHECK(visit == 1); }
        }
    }
}

TEST_CASE("there are never more workers than work, and never none")
{
    CHECK(worker_count({.threads = 4}, 2) == 2);
    CHECK(worker_count({.threads = 2}, 100) == 2);
    CHECK(worker_count({.threads = 3}, 0) == 1);
    CHECK(worker_count({}, 1) == 1);
}

TEST_CASE("the caller's own parallel loop runs the work")
{
    std::size_t asked = 0;
    const cpu policy{.threads = 3, .executor = [&](std::size_t count, const std::function<void(std::size_t)>& body) {
                         asked = count;
                         for (std::size_t i = count; i-- > 0;) { body(i); } // any order, here backwards and in sequence
                     }};
    std::vector<int> visits(10);
    for_each_index(policy, visits.size(), [&](std::size_t index, std::size_t) { ++visits[index]; });
    CHECK(asked == 3);
    CHECK(visits == std::vector<int>(10, 1));
}

TEST_CASE("a caller's loop may take its body by any type that calls it")
{
    const auto sum = [](const cpu& policy) {
        std::vector<int> visits(10);
        for_each_index(policy, visits.size(), [&](std::size_t index, std::size_t) { ++visits[index]; });
        return visits;
    };
    const auto loop = [](std::size_t count, const auto& body) {
        for (std::size_t i = 0; i < count; ++i) { body(i); }
    };
    CHECK(sum({.threads = 2, .executor = loop}) == std::vector<int>(10, 1));
    CHECK(sum({.threads = 2,
              .executor =
                  [](std::size_t count, function_ref<void(std::size_t)> body) {
                      for (std::size_t i = 0; i < count; ++i) { body(i); }
                  }})
        == std::vector<int>(10, 1));
}

TEST_CASE("more threads than one thread starts run too")
{
    std::vector<std::atomic<int>> visits(700);
    detail::run_on_threads(visits.size(), [&](std::size_t index) { ++visits[index]; });
    for (const auto& visit : visits) { CHECK(visit == 1); }
}

TEST_CASE("the failure of the lowest index is the one that is reported, with any number of threads")
{
    for (const unsigned threads : {1u, 2u, 4u}) {
        for (int trial = 0; trial < 50; ++trial) {
            std::array<std::atomic<int>, 40> visits{};
            std::string what;
            try {
                for_each_index({.threads = threads}, visits.size(), [&](std::size_t index, std::size_t) {
                    ++visits[index];
                    if (index >= 17 && index % 2 == 1) {
                        raise<invalid_argument>(error_code::index_out_of_range, message("index ", index));
                    }
                });
            }
            catch (const invalid_argument& failure) {
                what = failure.what();
            }
            CHECK(what == "index 17");
            for (std::size_t i = 0; i <= 17; ++i) { CHECK(visits[i] == 1); }
        }
    }
}

TEST_CASE("progress is told in growing amounts, ends at the total, and can stop the work")
{
    std::vector<std::uint64_t> seen;
    const cpu told{.progress = [&](const progress_event& event) {
        CHECK(event.phase == "merge");
        CHECK(event.total == 1000);
        seen.push_back(event.done);
        return true;
    }};
    detail::progress_meter meter(told, "merge", 1000);
    for (int i = 0; i < 100; ++i) { CHECK(meter.advance(10)); }
    REQUIRE(!seen.empty());
    CHECK(std::is_sorted(seen.begin(), seen.end()));
    CHECK(seen.back() == 1000);

    int calls = 0;
    const cpu stopped{.progress = [&](const progress_event&) { return ++calls < 3; }};
    detail::progress_meter stop(stopped, "merge", 10);
    CHECK(stop.advance(1));
    CHECK(stop.advance(1));
    CHECK_FALSE(stop.advance(1));
    CHECK_FALSE(stop.advance(1));
    CHECK(calls == 3); // not asked again
    const cpu silent;
    detail::progress_meter silence(silent, "merge", 10);
    CHECK(silence.advance(10));
}

TEST_CASE("the policy's memory resource, or the default")
{
    CHECK(memory_of({}) == std::pmr::get_default_resource());
    CHECK(memory_of({.memory = std::pmr::null_memory_resource()}) == std::pmr::null_memory_resource());
    const cpu inner = sequential({.threads = 8, .memory = std::pmr::null_memory_resource()});
    CHECK(inner.threads == 1);
    CHECK(inner.memory == std::pmr::null_memory_resource());
}
