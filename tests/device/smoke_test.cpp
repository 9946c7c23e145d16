// One pass through merges, selection, sums and compaction: compiled for Thrust's CPP system too.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/arithmetic.hpp>
#include <taskvec/device/methods.hpp>
#include <taskvec/device/reuse.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

using namespace taskvec;

TEST_CASE("the gpu policy does what the CPU does")
{
    const gpu policy;
    const testing::random_models<bf16> models({9001}, 3, 1, 3);
    const testing::on_device<bf16> device(policy, models);
    std::vector<bf16> expected(9001);
    merge(cpu{}, ties_options{}, models.base, models.tasks, expected);
    merge(policy, ties_options{}, device.base_view(), device.task_views(), device.out_view());
    CHECK(testing::different(device.result(), expected) == 0);
    CHECK(dot(policy, device.base_view(), device.out_view()) == dot(cpu{}, models.base, expected));
    CHECK(to_host(post_pruning(policy, {}, device.base_view(), device.out_view()))
        == post_pruning(cpu{}, {}, models.base, expected));
}
