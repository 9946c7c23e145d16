// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/byte_buffer.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory_resource>

namespace {

bool is_aligned(const void* place)
{
    return reinterpret_cast<std::uintptr_t>(place) % alignof(std::max_align_t) == 0;
}

} // namespace

TEST_CASE("bytes for elements of any type are aligned, whatever their resource gave before")
{
    for (const std::size_t size : {1u, 15u, 16u, 17u, 1000u}) {
        CAPTURE(size);
        std::byte room[8192];
        std::pmr::monotonic_buffer_resource packed(room, sizeof room, std::pmr::null_memory_resource());
        (void)packed.allocate(1, 1); // what comes next lies at an odd address, if it may
        taskvec::detail::byte_buffer buffer(&packed, size);
        CHECK(buffer.size() == size);
        CHECK(is_aligned(buffer.data()));
        CHECK(std::all_of(buffer.data(), buffer.data() + size, [](std::byte x) { return x == std::byte{0}; }));
        (void)packed.allocate(1, 1);
        buffer.resize(2 * size);
        CHECK(buffer.size() == 2 * size);
        CHECK(is_aligned(buffer.data()));
        buffer.data()[2 * size - 1] = std::byte{1};
    }
}
