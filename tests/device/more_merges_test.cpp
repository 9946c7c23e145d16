// Breadcrumbs, normalised sums, the spherical methods, NearSwap and RAM on taskvec::gpu: the CPU's bits; and what is
// refused there.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/methods.hpp>
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/methods/karcher.hpp>
#include <taskvec/methods/model_stock.hpp>
#include <taskvec/methods/multi_slerp.hpp>
#include <taskvec/methods/nearswap.hpp>
#include <taskvec/methods/nuslerp.hpp>
#include <taskvec/methods/passthrough.hpp>
#include <taskvec/methods/ram.hpp>

#include "../reference/shaped_models.hpp"
#include "on_device.hpp"

#include <doctest/doctest.h>

#include <limits>
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

TEST_CASE_TEMPLATE("NuSLERP and Model Stock of rows and columns have the CPU's bits, in device memory and streamed", T,
    float, double, bf16)
{
    const testing::shaped_models<T> models(
        {{7, 13}, {}, {3, 7000}, {5, 1}, {2, 3, 4}, {0, 4}, {9001}, {2, 20000}, {20000, 2}, {70, 150}, {70000}}, 2, 5);
    const testing::on_device<T> device(gpu{}, models.flat);
    std::vector<const_model_ref> tasks, of_device;
    for (const auto& task : models.flat.task_models()) { tasks.push_back(models.shaped(task)); }
    for (const auto& task : device.tasks()) { of_device.push_back(models.shaped(task)); }
    const auto base = models.shaped(models.flat.model(models.flat.base));
    for (const auto angles : {angles_between::rows, angles_between::columns}) {
        const nuslerp_options options{.weights = {1, 3}, .angles = angles};
        const model_stock_options stock{.angles = angles};
        std::vector<T> found;
        const auto expected = models.merged(options), stocked = models.merged(stock);
        merge(gpu{}, options, models.shaped(device.base()), of_device, models.shaped(device.out()));
        CHECK(different(device.result(), expected) == 0);
        merge(gpu{}, stock, models.shaped(device.base()), of_device, models.shaped(device.out()));
        CHECK(different(device.result(), stocked) == 0);
        for (const std::size_t memory : {std::size_t{1}, std::size_t{300000}}) {
            merge_streamed(
                gpu{}, options, base, tasks, models.shaped(models.flat.output(found)), {}, {.memory = memory});
            CHECK(different(found, expected) == 0);
        }
        std::vector<T> alone;
        merge(cpu{}, options, tasks, models.shaped(models.flat.output(alone)));
        merge(gpu{}, options, of_device, models.shaped(device.out()));
        CHECK(different(device.result(), alone) == 0);
    }
    auto wrong = models.flat;
    wrong.tasks[1][91 + 1 + 5000] = narrow<T>(std::numeric_limits<float>::infinity());
    const testing::on_device<T> with_infinity(gpu{}, wrong);
    std::vector<const_model_ref> infinite;
    for (const auto& task : with_infinity.tasks()) { infinite.push_back(models.shaped(task)); }
    CHECK_THROWS_WITH_AS(merge(gpu{}, nuslerp_options{.angles = angles_between::rows},
                             models.shaped(with_infinity.base()), infinite, models.shaped(with_infinity.out())),
        "tensor 't2' of task 2 holds infinity at index 5000: repair it, exclude the tensor, or ask for non-finite "
        "values "
        "to propagate",
        nonfinite_error);
}
