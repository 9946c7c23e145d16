// Task vectors on taskvec::gpu: the CPU's bits, in every storage type; errors.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/arithmetic.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <array>
#include <limits>

using namespace taskvec;
using testing::different;

TEST_CASE_TEMPLATE("difference, apply, negate and combine have the CPU's bits", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const std::size_t n : {0, 1, 15, 4097, 70001}) {
        const testing::random_models<T> models({n}, 3, static_cast<unsigned>(n));
        const testing::on_device<T> device(policy, models);
        const auto tasks = device.task_views();
        std::vector<T> expected(n);
        difference(cpu{.threads = 1}, models.tasks[0], models.base, expected);
        difference(policy, tasks[0], device.base_view(), device.out_view());
        CHECK(different(device.result(), expected) == 0);
        apply(cpu{.threads = 1}, models.base, models.tasks[1], -0.3, expected);
        apply(policy, device.base_view(), tasks[1], -0.3, device.out_view());
        CHECK(different(device.result(), expected) == 0);
        negate(cpu{.threads = 1}, models.tasks[2], expected);
        negate(policy, tasks[2], device.out_view());
        CHECK(different(device.result(), expected) == 0);
        const std::array weights{0.1, -2.0, 0.7};
        combine(cpu{.threads = 1}, models.tasks, weights, expected);
        combine(policy, tasks, weights, device.out_view());
        CHECK(different(device.result(), expected) == 0);
    }
}

TEST_CASE_TEMPLATE("dot, norm and cosine have the CPU's bits", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const std::size_t n : {0, 1, 17, 4096, 4097, 70001}) {
        const testing::random_models<T> models({n}, 1, static_cast<unsigned>(n));
        const testing::on_device<T> device(policy, models);
        const auto x = device.task_views()[0];
        CHECK(dot(policy, x, device.base_view()) == dot(cpu{}, models.tasks[0], models.base));
        CHECK(norm(policy, x) == norm(cpu{}, models.tasks[0]));
        CHECK(cosine(policy, x, device.base_view()) == cosine(cpu{}, models.tasks[0], models.base));
    }
    const testing::random_models<T> models({3000, 1, 0, 20000}, 3, 5);
    const testing::on_device<T> device(policy, models);
    const auto base = device.base();
    const auto tasks = device.tasks();
    const auto host_base = models.model(models.base);
    const auto host_tasks = models.task_models();
    CHECK(cosine_matrix(policy, align_on_device(policy, &base, tasks))
        == cosine_matrix(cpu{}, aligned_models(&host_base, host_tasks)));
    CHECK(dot_matrix(policy, align_on_device(policy, nullptr, tasks))
        == dot_matrix(cpu{}, aligned_models(nullptr, host_tasks)));
}

TEST_CASE("storage types may be mixed: arithmetic in f64 where one is f64")
{
    const gpu policy;
    const std::size_t n = 5000;
    const testing::random_models<double> wide({n}, 1, 1);
    const testing::random_models<bf16> narrow({n}, 1, 2);
    const testing::on_device<double> x(policy, wide);
    const testing::on_device<bf16> y(policy, narrow);
    std::vector<double> expected(n);
    difference(cpu{}, narrow.base, wide.base, expected);
    difference(policy, y.base_view(), x.base_view(), x.out_view());
    CHECK(different(x.result(), expected) == 0);
    std::vector<bf16> rounded(n);
    apply(cpu{}, wide.base, narrow.base, 0.7, rounded);
    apply(policy, x.base_view(), y.base_view(), 0.7, y.out_view());
    CHECK(different(y.result(), rounded) == 0);
    CHECK(dot(policy, x.base_view(), y.base_view()) == dot(cpu{}, wide.base, narrow.base));
}

TEST_CASE("bad input is named")
{
    const gpu policy;
    testing::random_models<float> models({9000}, 2, 3);
    models.tasks[1][8000] = std::numeric_limits<float>::infinity();
    models.tasks[1][8500] = std::numeric_limits<float>::quiet_NaN();
    const testing::on_device<float> device(policy, models);
    const auto tasks = device.task_views();
    CHECK_THROWS_WITH_AS(combine(policy, tasks, std::array{1.0, 1.0}, device.out_view()),
        "input 2 holds infinity at index 8000: repair it, or ask for non-finite values to propagate", nonfinite_error);
    CHECK_THROWS_AS(difference(policy, tasks[0], tasks[1], device.out_view()), nonfinite_error);
    std::vector<float> expected(9000);
    combine(cpu{}, models.tasks, std::array{1.0, 1.0}, expected, nonfinite::propagate);
    combine(policy, tasks, std::array{1.0, 1.0}, device.out_view(), nonfinite::propagate);
    CHECK(different(device.result(), expected) == 0);
    CHECK_THROWS_WITH_AS(combine(policy, tasks, std::array{1.0}, device.out_view()),
        "1 weights for 2 vectors: give one each", invalid_argument);
    CHECK_THROWS_AS(negate(policy, device_view<const float>(tasks[0].data(), 5), device.out_view()), shape_mismatch);
}

TEST_CASE("out of device memory is a backend_error, and inputs keep their contents")
{
    struct none_left final : device_memory_resource {
        void* allocate(std::size_t, void*) override { return nullptr; }
        void deallocate(void*, std::size_t, void*) noexcept override { }
    } empty;
    const testing::random_models<float> models({100}, 1, 3);
    const testing::on_device<float> device(gpu{}, models);
    CHECK_THROWS_WITH_AS(negate(gpu{.allocator = &empty}, device.base_view(), device.out_view()),
        "gpu::allocator->allocate: no room for 8 bytes of scratch (code 0)", backend_error);
    CHECK(different(device.result(), std::vector<float>(100)) == 0);
}
