// Device memory and errors of the Thrust system that this is compiled for.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/thrust/system.hpp>

#include <doctest/doctest.h>

#include <cstdlib>
#include <vector>

using namespace taskvec;

TEST_CASE("a buffer brings back what was put into it")
{
    const gpu policy;
    const std::vector<float> values{1, 2, 3};
    device::buffer<float> x(policy, values), y(policy, 3);
    device::copy(policy, y.data(), x.data(), 3 * sizeof(float));
    CHECK(y.download() == values);
    y.clear();
    CHECK(y.download() == std::vector<float>(3, 0.0f));
    const device::buffer<float> moved(std::move(x));
    CHECK(x.data() == nullptr);
    CHECK(moved.download() == values);
    CHECK(device::buffer<float>(policy, 0).download().empty());
}

TEST_CASE("scratch comes from the policy's allocator, and an empty hand is an error")
{
    struct counting final : device_memory_resource {
        void* allocate(std::size_t bytes, void*) override { return limit < bytes ? nullptr : (++live, place); }
        void deallocate(void*, std::size_t, void*) noexcept override { --live; }
        std::size_t limit = 64;
        int live = 0;
        void* place = nullptr;
    } resource;
    const device::buffer<double> memory(gpu{}, 8);
    resource.place = memory.data();
    const gpu policy{.allocator = &resource};
    {
        const device::buffer<double> x(policy, 8);
        CHECK(x.data() == memory.data());
        CHECK(resource.live == 1);
    }
    CHECK(resource.live == 0);
    CHECK_THROWS_WITH_AS(device::buffer<double>(policy, 9),
        "gpu::allocator->allocate: no room for 72 bytes of scratch (code 0)", backend_error);
}
