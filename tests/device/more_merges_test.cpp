// Breadcrumbs, normalised sums, the spherical methods, NearSwap and RAM on taskvec::gpu: the CPU's bits; and what is
// refused there.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/methods.hpp>
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/methods/karcher.hpp>
#include <taskvec/methods/multi_slerp.hpp>
#include <taskvec/methods/nearswap.hpp>
#include <taskvec/methods/nuslerp.hpp>
#include <taskvec/methods/passthrough.hpp>
#include <taskvec/methods/ram.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <vector>

using namespace taskvec;
using testing::different;

namespace {

template <class T, class Options>
void check_merge(const testing::random_models<T>& models, const testing::on_device<T>& device, const Options& options)
{
    std::vector<T> expected;
    merge(cpu{.threads = 2}, options, models.model(models.base), models.task_models(), models.output(expected));
    merge(gpu{}, options, device.base(), device.tasks(), device.out());
    CHECK(different(device.result(), expected) == 0);
}

} // namespace

TEST_CASE_TEMPLATE("newer elementwise merges have the CPU's bits", T, float, bf16)
{
    for (const std::size_t count : {1, 2, 3}) {
        const testing::random_models<T> models({3000, 1, 0, 64, 70001}, count, static_cast<unsigned>(count));
        const testing::on_device<T> device(gpu{}, models);
        check_merge(models, device, breadcrumbs_options{.density = 0.6, .gamma = 0.05, .normalize = true});
        check_merge(models, device, breadcrumbs_ties_options{.density = 0.6, .gamma = 0.05});
        check_merge(models, device, multi_slerp_options{});
        check_merge(models, device, karcher_options{});
        check_merge(models, device, ram_options{.epsilon = 0.5});
        if (count == 1) {
            check_merge(models, device, passthrough_options{.scale = 0.3});
            check_merge(models, device, nearswap_options{.t = 0.1});
        }
        if (count == 2) { check_merge(models, device, nuslerp_options{.weights = {1, 3}}); }
    }
}

TEST_CASE("L1 norms of what is kept are the CPU's alone")
{
    const testing::random_models<float> models({3000}, 2, 1);
    const testing::on_device<float> device(gpu{}, models);
    CHECK_THROWS_WITH_AS(
        merge(gpu{}, breadcrumbs_options{.density = 0.6, .rescale = true}, device.base(), device.tasks(), device.out()),
        "L1 norms of what is kept are summed on the CPU: merge there, or do not rescale", invalid_argument);
}
