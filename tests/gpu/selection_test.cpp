// Exact top-k on taskvec::gpu: the CPU's thresholds, whatever ties; errors.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/select/gpu.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <limits>

using namespace taskvec;

TEST_CASE_TEMPLATE("top_k finds the CPU's threshold", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const int levels : {0, 3}) { // few values: most magnitudes tie
        for (const std::size_t n : {1, 64, 4097, 50000}) {
            const testing::random_models<T> models({n}, 1, static_cast<unsigned>(n), levels);
            const testing::on_device<T> device(policy, models);
            for (const std::uint64_t k : {std::uint64_t{1}, n / 5, n - 1, static_cast<std::uint64_t>(n)}) {
                if (k == 0) { continue; }
                CHECK(top_k(policy, device.base_view(), k) == top_k(cpu{.threads = 1}, models.base, k));
                CHECK(kth_magnitude(policy, device.base_view(), k) == kth_magnitude(cpu{.threads = 1}, models.base, k));
            }
        }
    }
}

TEST_CASE("all equal, all zero, subnormals and infinity on request")
{
    const gpu policy;
    for (const float value : {0.0f, -2.5f, 1e-42f}) {
        const std::vector<float> values(9000, value);
        const device::buffer<float> x(policy, values);
        CHECK(top_k(policy, x.view(), 4100) == top_k(cpu{}, values, 4100));
    }
    CHECK(top_k(policy, device_view<const float>(), 0) == top_k_threshold<float>{});
    const device::buffer<float> x(policy, std::vector<float>{1, 2, std::numeric_limits<float>::infinity()});
    CHECK_THROWS_WITH_AS((void)top_k(policy, x.view(), 1),
        "tensor 'values' of task 1 holds infinity at index 2: repair it, exclude the tensor, or ask for non-finite values to propagate", nonfinite_error);
    CHECK_THROWS_WITH_AS((void)top_k(policy, x.view(), 4), "k is 4 for 3 entries; expected 1 to 3", invalid_argument);
    CHECK_THROWS_AS((void)top_k(policy, x.view(), 0), invalid_argument);
    CHECK_THROWS_AS((void)kth_magnitude(policy, x.view(), 0), invalid_argument);
    unsigned walks = 0;
    const device::buffer<double> wide(policy, std::vector<double>{1, 2, 3});
    CHECK(top_k(policy, wide.view(), 2, &walks).equal_end == 2);
    CHECK(walks == 7);
}

TEST_CASE_TEMPLATE("thresholds of task vectors over a model and tensor by tensor", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const int levels : {0, 2}) {
        const testing::random_models<T> models({3000, 1, 0, 64, 20000}, 9, 4, levels);
        const testing::on_device<T> on_device(policy, models);
        const auto base = models.model(models.base), device_base = on_device.base();
        const auto tasks = models.task_models(), device_tasks = on_device.tasks();
        const aligned_models host(&base, tasks), device = align_on_device(policy, &device_base, device_tasks);
        for (const double density : {0.0001, 0.2, 1.0}) {
            for (const scope over : {scope::model, scope::tensor}) {
                for (const trim_rule rule : {trim_rule::exact, trim_rule::reach_next}) {
                    const trim_thresholds expected(cpu{}, host, density, over, rule), found = find_thresholds(policy, device, density, over, rule);
                    std::size_t different = 0;
                    for (std::size_t i = 0; i < host.tensors().size(); ++i) {
                        for (std::size_t t = 0; t < 9; ++t) { different += found.get<arithmetic_type<T>>(i, t) != expected.get<arithmetic_type<T>>(i, t); }
                    }
                    CHECK(different == 0);
                }
            }
        }
        CHECK_THROWS_AS((void)find_thresholds(policy, device, 0, scope::model), invalid_argument);
    }
}

TEST_CASE("f32 tensors beside f64 ones compare in f64")
{
    const gpu policy;
    const testing::random_models<double> wide({5000}, 1, 1);
    const testing::random_models<float> narrow({7000}, 1, 2);
    const testing::on_device<double> x(policy, wide);
    const testing::on_device<float> y(policy, narrow);
    const auto both = [](const_tensor_ref a, const_tensor_ref b) { return const_model_ref{{"a", a}, {"b", b}}; };
    const auto host = both(as_tensor(host_view<const double>(wide.base.data(), 5000)), as_tensor(host_view<const float>(narrow.base.data(), 7000)));
    const auto on_device = both(as_tensor(x.base_view()), as_tensor(y.base_view()));
    const trim_thresholds expected(cpu{}, aligned_models(nullptr, {&host, 1}), 0.3, scope::model),
        found = find_thresholds(policy, align_on_device(policy, nullptr, {&on_device, 1}), 0.3, scope::model);
    CHECK(found.get<double>(0, 0) == expected.get<double>(0, 0));
    CHECK(found.get<float>(1, 0) == expected.get<float>(1, 0));
}
