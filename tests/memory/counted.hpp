// What a call allocates: through the policy's memory resource, and around it by the global operator new, which
// counting_test.cpp replaces in this program.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/policy.hpp>

#include <doctest/doctest.h>

#include <atomic>
#include <cstddef>
#include <memory_resource>
#include <string_view>

namespace testing {

/// Bytes that the global operator new has given out in this program, and got back.
struct global_news {
    std::size_t given = 0, returned = 0;
};
[[nodiscard]] global_news global_news_so_far() noexcept;

/// A memory resource for any number of threads that counts what it is asked for, and keeps what it gets back for the
/// next who asks for as much. It does not use operator new, and aligns no better than it is asked to: a result that
/// depended on alignment would show.
class counted_memory final : public std::pmr::memory_resource {
public:
    counted_memory() = default;
    counted_memory(const counted_memory&) = delete;
    counted_memory& operator=(const counted_memory&) = delete;
    ~counted_memory() override;

    [[nodiscard]] std::size_t asked() const noexcept { return asked_; } ///< bytes of all requests together
    [[nodiscard]] std::size_t fresh() const noexcept { return fresh_; } ///< those that the system had to give
    [[nodiscard]] std::size_t in_use() const noexcept { return in_use_; }

private:
    struct spare {
        spare* next;
        std::size_t bytes, alignment;
        std::byte* place;
    };
    void* do_allocate(std::size_t bytes, std::size_t alignment) override;
    void do_deallocate(void* place, std::size_t bytes, std::size_t alignment) override;
    [[nodiscard]] bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }

    std::atomic<std::size_t> asked_{0}, fresh_{0}, in_use_{0};
    std::atomic_flag busy_;
    spare* spares_ = nullptr;
};

/// What one call took. `around`: what operator new gave and got back before the call returned; what the caller receives
/// is not in it.
struct call_memory {
    std::size_t through = 0, fresh = 0, around = 0, received = 0;
};

/// Runs a call whose result lives until everything has been counted.
template <class Call>
[[nodiscard]] call_memory count_memory(const counted_memory& memory, const Call& call)
{
    const std::size_t asked = memory.asked(), fresh = memory.fresh();
    const global_news before = global_news_so_far();
    const auto counted = [&] {
        const global_news after = global_news_so_far();
        const std::size_t given = after.given - before.given, returned = after.returned - before.returned;
        return call_memory{memory.asked() - asked, memory.fresh() - fresh, returned, given - returned};
    };
    if constexpr (requires { [](const auto&) { }(call()); }) {
        [[maybe_unused]] const auto result = call();
        return counted();
    }
    else {
        call();
        return counted();
    }
}

/// What may go around the resource in a call over `tensors` tensors, those of all models counted: nothing that grows
/// with their elements.
[[nodiscard]] constexpr std::size_t most_around(std::size_t tensors) noexcept
{
    return 64 * 1024 + 2048 * tensors;
}

/// Makes a call twice, with one thread and with three, and holds it to the promise of cpu::memory.
template <class Call>
void check_call(std::string_view what, std::size_t tensors, const Call& call)
{
    CAPTURE(what);
    for (const unsigned threads : {1u, 3u}) {
        CAPTURE(threads);
        counted_memory memory;
        const taskvec::cpu policy{.threads = threads, .memory = &memory};
        const call_memory first = count_memory(memory, [&] { return call(policy); });
        const call_memory again = count_memory(memory, [&] { return call(policy); });
        CHECK(first.around <= most_around(tensors));
        CHECK(again.around <= first.around);
        if (threads == 1) { // who of several takes how much is up to them
            CHECK(again.fresh == 0);
            CHECK(again.through == first.through);
        }
        CHECK(memory.in_use() == 0);
    }
}

} // namespace testing
