// The global operator new of this program, which counts, and what counts with it.
// SPDX-License-Identifier: Apache-2.0
#include "counted.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace {

std::atomic<std::size_t> given_bytes{0}, returned_bytes{0};
constexpr std::size_t line = 64; // before each block its size, in as much memory as keeps any alignment up to it

[[nodiscard]] std::size_t whole_lines(std::size_t bytes) noexcept
{
    return (bytes + line - 1) / line * line;
}
[[nodiscard]] void* counted_new(std::size_t bytes)
{
    void* const block = std::aligned_alloc(line, line + whole_lines(bytes));
    if (!block) { std::abort(); }
    *static_cast<std::size_t*>(block) = bytes;
    given_bytes += bytes;
    return static_cast<std::byte*>(block) + line;
}
void counted_delete(void* place) noexcept
{
    if (!place) { return; }
    void* const block = static_cast<std::byte*>(place) - line;
    returned_bytes += *static_cast<std::size_t*>(block);
    std::free(block);
}

} // namespace

void* operator new(std::size_t bytes)
{
    return counted_new(bytes);
}
void* operator new[](std::size_t bytes)
{
    return counted_new(bytes);
}
void* operator new(std::size_t bytes, std::align_val_t)
{
    return counted_new(bytes);
}
void* operator new[](std::size_t bytes, std::align_val_t)
{
    return counted_new(bytes);
}
void operator delete(void* place) noexcept
{
    counted_delete(place);
}
void operator delete[](void* place) noexcept
{
    counted_delete(place);
}
void operator delete(void* place, std::size_t) noexcept
{
    counted_delete(place);
}
void operator delete[](void* place, std::size_t) noexcept
{
    counted_delete(place);
}
void operator delete(void* place, std::align_val_t) noexcept
{
    counted_delete(place);
}
void operator delete[](void* place, std::align_val_t) noexcept
{
    counted_delete(place);
}
void operator delete(void* place, std::size_t, std::align_val_t) noexcept
{
    counted_delete(place);
}
void operator delete[](void* place, std::size_t, std::align_val_t) noexcept
{
    counted_delete(place);
}

namespace testing {

global_news global_news_so_far() noexcept
{
    const std::size_t returned = returned_bytes; // first: never more than was given
    return {given_bytes, returned};
}

namespace {
struct held {
    explicit held(std::atomic_flag& flag) noexcept
        : busy(flag)
    {
        while (busy.test_and_set(std::memory_order_acquire)) { busy.wait(true, std::memory_order_relaxed); }
    }
    ~held()
    {
        busy.clear(std::memory_order_release);
        busy.notify_one();
    }
    held(const held&) = delete;
    held& operator=(const held&) = delete;
    std::atomic_flag& busy;
};
} // namespace

// A block: what is known of it, then memory that begins at an odd multiple of the alignment asked for.
void* counted_memory::do_allocate(std::size_t bytes, std::size_t alignment)
{
    const held lock(busy_);
    asked_ += bytes;
    in_use_ += bytes;
    for (spare** at = &spares_; *at; at = &(*at)->next) {
        if ((*at)->bytes == bytes && (*at)->alignment == alignment) {
            spare* const found = *at;
            *at = found->next;
            return found->place;
        }
    }
    fresh_ += bytes;
    const std::size_t unit = std::max(2 * alignment, line), offset = unit + (alignment < line ? alignment : 0);
    auto* const block = static_cast<std::byte*>(std::aligned_alloc(unit, (offset + bytes + unit - 1) / unit * unit));
    if (!block) { std::abort(); }
    new (block) spare{nullptr, bytes, alignment, block + offset};
    return block + offset;
}
void counted_memory::do_deallocate(void* place, std::size_t bytes, std::size_t alignment)
{
    const held lock(busy_);
    in_use_ -= bytes;
    const std::size_t unit = std::max(2 * alignment, line), offset = unit + (alignment < line ? alignment : 0);
    auto* const block = reinterpret_cast<spare*>(static_cast<std::byte*>(place) - offset);
    block->next = std::exchange(spares_, block);
}
counted_memory::~counted_memory()
{
    while (spares_) { std::free(std::exchange(spares_, spares_->next)); }
}

} // namespace testing

using testing::count_memory, testing::counted_memory;

TEST_CASE("Blocks of operator new are counted, those that a call returns apart")
{
    counted_memory memory;
    const auto kept = count_memory(memory, [] { return std::vector<char>(1000); });
    CHECK(kept.around == 0);
    CHECK(kept.received == 1000);
    const auto dropped = count_memory(memory, [] {
        const std::vector<char> first(1000), second(24);
        return first.size() + second.size();
    });
    CHECK(dropped.around == 1024);
    CHECK(dropped.received == 0);
    struct alignas(64) wide {
        char bytes[128];
    };
    CHECK(count_memory(memory, [] { return std::make_unique<wide>() != nullptr; }).around == 128);
}

TEST_CASE("A counted resource uses no operator new, counts each request, and gives again what it got back")
{
    counted_memory memory;
    const auto call = [&] {
        const std::pmr::vector<double> x(100, &memory), y(100, &memory);
        CHECK(reinterpret_cast<std::uintptr_t>(x.data()) % 16 == 8);
        return x.size() + y.size();
    };
    const auto first = count_memory(memory, call), again = count_memory(memory, call);
    CHECK(first.through == 1600);
    CHECK(first.fresh == 1600);
    CHECK(first.around == 0);
    CHECK(again.through == 1600);
    CHECK(again.fresh == 0);
    CHECK(memory.in_use() == 0);
}
