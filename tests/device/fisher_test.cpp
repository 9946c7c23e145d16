// Fisher merging on taskvec::gpu: the CPU's bits; errors.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/methods.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <limits>

using namespace taskvec;
using testing::different;

namespace {

/// Squares of normal numbers, some of them 0.
template <class T>
testing::random_models<T> random_fishers(const std::vector<std::size_t>& sizes, std::size_t count)
{
    testing::random_models<T> fishers(sizes, count, 77);
    for (auto& fisher : fishers.tasks) {
        for (auto& value : fisher) {
            const auto x = widen<arithmetic_type<T>>(value);
            value = narrow<T>(x * x < 0.3 ? arithmetic_type<T>{0} : x * x);
        }
    }
    return fishers;
}

} // namespace

TEST_CASE_TEMPLATE("Fisher merges have the CPU's bits", T, double, float, bf16, f16)
{
    const gpu policy;
    const std::vector<std::size_t> sizes{3000, 1, 0, 9001};
    for (const std::size_t count : {1, 3}) {
        const testing::random_models<T> models(sizes, count, 5);
        const testing::random_models<T> fishers = random_fishers<T>(sizes, count);
        const testing::on_device<T> device(policy, models), device_fishers(policy, fishers);
        for (const bool normalize : {false, true}) {
            for (const double floor : {1e-12, 0.5}) {
                std::vector<double> weights;
                for (std::size_t t = 0; t < count; ++t) { weights.push_back(0.5 + static_cast<double>(t)); }
                fisher_options options{
                    .fishers = fishers.task_models(), .weights = weights, .normalize = normalize, .floor = floor};
                std::vector<T> expected;
                merge(cpu{}, options, models.task_models(), models.output(expected));
                options.fishers = device_fishers.tasks();
                merge(policy, options, device.tasks(), device.out());
                CHECK(different(device.result(), expected) == 0);
            }
        }
    }
}

TEST_CASE("Fishers of flat views, and of another storage type")
{
    const gpu policy;
    const testing::random_models<bf16> models({5000}, 2, 5);
    const auto fishers = random_fishers<float>({5000}, 2);
    const testing::on_device<bf16> device(policy, models);
    const testing::on_device<float> device_fishers(policy, fishers);
    std::vector<bf16> expected(5000);
    merge(cpu{}, fisher_options{.fishers = flat_fishers(fishers.tasks)}, models.tasks, expected);
    merge(policy, fisher_options{.fishers = flat_fishers(device_fishers.task_views())}, device.task_views(),
        device.out_view());
    CHECK(different(device.result(), expected) == 0);
}

TEST_CASE("bad Fishers are named")
{
    const gpu policy;
    const testing::random_models<float> models({3000, 5000}, 2, 5);
    auto fishers = random_fishers<float>({3000, 5000}, 2);
    const testing::on_device<float> device(policy, models);
    CHECK_THROWS_WITH_AS(merge(policy, fisher_options{.fishers = fishers.task_models()}, device.tasks(), device.out()),
        "tensor 't0' of the Fisher of task 1 must be contiguous device memory: copy it first", invalid_argument);
    fishers.tasks[1][7000] = -0.5f;
    const testing::on_device<float> negative(policy, fishers);
    CHECK_THROWS_WITH_AS(merge(policy, fisher_options{.fishers = negative.tasks()}, device.tasks(), device.out()),
        "tensor 't1' of the Fisher of task 2 holds -0.5 at index 4000: a diagonal Fisher is a mean of squares and "
        "cannot be negative",
        invalid_argument);
    fishers.tasks[0][10] = std::numeric_limits<float>::infinity();
    const testing::on_device<float> infinite(policy, fishers);
    for (const bool normalize : {false, true}) {
        CHECK_THROWS_WITH_AS(merge(policy, fisher_options{.fishers = infinite.tasks(), .normalize = normalize},
                                 device.tasks(), device.out()),
            "tensor 't0' of the Fisher of task 1 holds infinity at index 10: collect the statistics again",
            nonfinite_error);
    }
    CHECK_THROWS_AS(
        merge(policy, fisher_options{.fishers = infinite.tasks()}, device.tasks(), infinite.out()), nonfinite_error);
    CHECK_THROWS_AS(merge(policy, fisher_options{.fishers = {}}, device.tasks(), device.out()), invalid_argument);
    const testing::random_models<float> short_ones({3000, 4000}, 2, 5);
    const testing::on_device<float> of_another(policy, short_ones);
    CHECK_THROWS_AS(
        merge(policy, fisher_options{.fishers = of_another.tasks()}, device.tasks(), device.out()), shape_mismatch);
    model_ref shared;
    const const_model_ref first = negative.tasks()[0];
    for (const auto& [name, tensor] : first) {
        shared.insert(
            name, tensor_ref{const_cast<void*>(tensor.data), tensor.dtype, tensor.shape, {}, memory_space::device});
    }
    CHECK_THROWS_AS(merge(policy, fisher_options{.fishers = negative.tasks()}, device.tasks(), shared),
        invalid_argument); // would overwrite a Fisher
}
