// Average, task arithmetic, SLERP and Model Stock on taskvec::gpu: the CPU's bits, through named tensors and through
// views.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/methods.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <limits>

using namespace taskvec;
using testing::different;

namespace {

template <class T, class Options>
void check_merge(const testing::random_models<T>& models, const testing::on_device<T>& device, const Options& options)
{
    const gpu policy;
    std::vector<T> expected;
    merge(cpu{.threads = 2}, options, models.model(models.base), models.task_models(), models.output(expected));
    merge(policy, options, device.base(), device.tasks(), device.out());
    CHECK(different(device.result(), expected) == 0);
    merge(cpu{.threads = 2}, options, models.base, models.tasks, expected);
    merge(policy, options, device.base_view(), device.task_views(), device.out_view());
    CHECK(different(device.result(), expected) == 0);
}

} // namespace

TEST_CASE_TEMPLATE("linear merges have the CPU's bits", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const std::size_t count : {1, 2, 7, 11}) {
        const testing::random_models<T> models({3000, 1, 0, 64, 70001}, count, static_cast<unsigned>(count));
        const testing::on_device<T> device(policy, models);
        std::vector<double> weights;
        for (std::size_t t = 0; t < count; ++t) { weights.push_back(0.3 * static_cast<double>(t) - 0.2); }
        check_merge(models, device, average_options{weights});
        check_merge(models, device, average_options{});
        check_merge(models, device, task_arithmetic_options{.lambda = -0.4, .weights = weights});
        check_merge(models, device, task_arithmetic_options{});
        if (count <= 2) { check_merge(models, device, slerp_options{.t = 0.3}); }
        if (count >= 2) {
            check_merge(models, device, model_stock_options{});
            check_merge(models, device, model_stock_options{.clamp = false});
        }
        std::vector<T> expected;
        merge(cpu{}, average_options{}, models.task_models(), models.output(expected));
        merge(policy, average_options{}, device.tasks(), device.out());
        CHECK(different(device.result(), expected) == 0);
    }
}

TEST_CASE("a merge may work in place, and refuses outputs that overlap otherwise")
{
    const gpu policy;
    const testing::random_models<float> models({5000}, 2, 1);
    const testing::on_device<float> device(policy, models);
    std::vector<float> expected(5000);
    merge(cpu{}, task_arithmetic_options{}, models.base, models.tasks, expected);
    const auto views = device.task_views();
    device_view<float> place(const_cast<float*>(views[1].data()), 5000);
    CHECK_THROWS_AS(merge(policy, task_arithmetic_options{}, device.base_view(), std::vector{views[0], views[1]},
                        device_view<float>(place.data() + 1, 4999)),
        error);
    merge(policy, task_arithmetic_options{}, device.base_view(), views, place);
    std::vector<float> found(5000);
    device::download(policy, found.data(), place.data(), 5000 * sizeof(float));
    CHECK(different(found, expected) == 0);
}

TEST_CASE("mixed storage types, fp8, missing and excluded tensors, integers, an output dtype")
{
    const gpu policy;
    const std::vector<float> a{1, 2, 3, 4, 5}, b{2, 4, 6, 8, 10};
    const std::vector<double> c{0.1, 0.2, 0.3, 0.4, 0.5};
    const std::vector<std::uint8_t> codes{0x00, 0x3c, 0x81, 0x7e, 0xb9};
    const std::vector<std::int64_t> steps{7, 8, 9};
    const device::buffer<float> da(policy, a), db(policy, b);
    const device::buffer<double> dc(policy, c);
    const device::buffer<std::uint8_t> dcodes(policy, codes);
    const device::buffer<std::int64_t> dsteps(policy, steps), dsteps_too(policy, steps),
        dother(policy, std::vector<std::int64_t>{7, 8, 10});
    const auto ref = [](const void* data, dtype type, std::int64_t n, memory_space space) {
        return const_tensor_ref{data, type, {n}, {}, space};
    };
    const auto models = [&](memory_space space, const void* x, const void* y, const void* z, const void* eight,
                            const void* integers) {
        const_model_ref base{{"copied", ref(x, dtype::f32, 5, space)}, {"eight", ref(eight, dtype::f8_e4m3, 5, space)},
            {"integers", ref(integers, dtype::i64, 3, space)}, {"mixed", ref(x, dtype::f32, 5, space)},
            {"only base", ref(y, dtype::f32, 5, space)}};
        const_model_ref task{{"copied", ref(y, dtype::f32, 5, space)}, {"eight", ref(y, dtype::f32, 5, space)},
            {"integers", ref(integers, dtype::i64, 3, space)}, {"mixed", ref(z, dtype::f64, 5, space)}};
        return std::pair(base, task);
    };
    model_options how;
    how.include = [](std::string_view name) { return name != "copied"; };
    how.on_missing = missing_tensors::base;
    how.statistics = true;
    const task_arithmetic_options options{.lambda = 0.7};
    std::vector<float> outputs(20), expected(20);
    std::vector<std::int64_t> integers(3), found_integers(3);
    const device::buffer<float> dout(policy, 20);
    const device::buffer<std::int64_t> dintegers(policy, 3);
    const auto out = [&](memory_space space, float* values, std::int64_t* numbers) {
        const auto tensor = [&](void* data, dtype type, std::int64_t n) {
            return tensor_ref{data, type, {n}, {}, space};
        };
        return model_ref{{"copied", tensor(values, dtype::f32, 5)}, {"eight", tensor(values + 5, dtype::f32, 5)},
            {"integers", tensor(numbers, dtype::i64, 3)}, {"mixed", tensor(values + 10, dtype::f32, 5)},
            {"only base", tensor(values + 15, dtype::f32, 5)}};
    };
    const auto [host_base, host_task] =
        models(memory_space::host, a.data(), b.data(), c.data(), codes.data(), steps.data());
    const auto [base, task] =
        models(memory_space::device, da.data(), db.data(), dc.data(), dcodes.data(), dsteps.data());
    const auto host_report = merge(
        cpu{}, options, host_base, {&host_task, 1}, out(memory_space::host, expected.data(), integers.data()), how);
    const auto report =
        merge(policy, options, base, {&task, 1}, out(memory_space::device, dout.data(), dintegers.data()), how);
    CHECK(different(dout.download(), expected) == 0);
    CHECK(dintegers.download() == steps);
    REQUIRE(report.norms.size() == host_report.norms.size());
    for (std::size_t i = 0; i < report.norms.size(); ++i) {
        CHECK(report.norms[i].name == host_report.norms[i].name);
        CHECK(report.norms[i].merged == host_report.norms[i].merged);
        CHECK(report.norms[i].change == host_report.norms[i].change);
    }
    how.output = dtype::f64; // a tensor of the output has another dtype
    CHECK_THROWS_AS(
        merge(policy, options, base, {&task, 1}, out(memory_space::device, dout.data(), dintegers.data()), how),
        dtype_mismatch);

    const const_model_ref one{{"n", ref(dsteps.data(), dtype::i64, 3, memory_space::device)}},
        same{{"n", ref(dsteps_too.data(), dtype::i64, 3, memory_space::device)}},
        other{{"n", ref(dother.data(), dtype::i64, 3, memory_space::device)}};
    const aligned_models equal = align_on_device(policy, &one, {&same, 1});
    CHECK(equal.copied().size() == 1);
    CHECK_THROWS_WITH_AS((void)align_on_device(policy, &one, {&other, 1}),
        "tensor 'n' of dtype I64 differs between task 1 and the base: only floating tensors can be merged; exclude it "
        "to keep the one of the base",
        dtype_mismatch);
}

TEST_CASE("bad input is named")
{
    const gpu policy;
    testing::random_models<bf16> models({3000, 5000}, 2, 1);
    models.tasks[1][7000] = bf16(std::numeric_limits<float>::quiet_NaN());
    models.tasks[0][7500] = bf16(std::numeric_limits<float>::infinity());
    const testing::on_device<bf16> device(policy, models);
    const char* const words = "tensor 't1' of task 2 holds NaN at index 4000: repair it, exclude the tensor, or ask "
                              "for non-finite values to propagate";
    CHECK_THROWS_WITH_AS(merge(policy, average_options{}, device.tasks(), device.out()), words, nonfinite_error);
    CHECK_THROWS_WITH_AS(
        merge(policy, task_arithmetic_options{}, device.base(), device.tasks(), device.out()), words, nonfinite_error);
    CHECK_THROWS_WITH_AS(merge(policy, slerp_options{}, device.tasks(), device.out()), words, nonfinite_error);
    CHECK_THROWS_WITH_AS(
        merge(policy, model_stock_options{}, device.base(), device.tasks(), device.out()), words, nonfinite_error);
    std::vector<bf16> expected;
    model_options how;
    how.on_nonfinite = nonfinite::propagate;
    merge(cpu{}, task_arithmetic_options{}, models.model(models.base), models.task_models(), models.output(expected),
        how);
    merge(policy, task_arithmetic_options{}, device.base(), device.tasks(), device.out(), how);
    CHECK(different(device.result(), expected) == 0);

    CHECK_THROWS_WITH_AS(merge(policy, average_options{}, models.task_models(), device.out()),
        "tensor 't0' of task 1 lives in host memory: the gpu policy needs device memory, or merge_streamed() for "
        "models on the host",
        invalid_argument);
    CHECK_THROWS_WITH_AS(merge(policy, average_options{}, device.tasks(), models.output(expected)),
        "tensor 't0' of the output must be contiguous device memory", invalid_argument);
    CHECK_THROWS_WITH_AS(merge(policy, average_options{.weights = {1, -1}}, device.tasks(), device.out()),
        "the weights of an average sum to 0 (1 of task 1, -1 of task 2), and nothing can be divided by that: change "
        "one "
        "of them",
        invalid_argument);
    CHECK_THROWS_AS(merge(policy, slerp_options{}, std::vector(3, device.tasks()[0]), device.out()), invalid_argument);
    CHECK_THROWS_AS(
        merge(policy, model_stock_options{}, device.base(), {&device.tasks()[0], 1}, device.out()), invalid_argument);
    const device::buffer<float> values(policy, 8);
    const auto* const askew = reinterpret_cast<const std::byte*>(values.data()) + 1;
    const const_model_ref model{{"x", const_tensor_ref{askew, dtype::f32, {2}, {}, memory_space::device}}};
    const model_ref out{{"x", tensor_ref{values.data() + 4, dtype::f32, {2}, {}, memory_space::device}}};
    CHECK_THROWS_WITH_AS(merge(policy, average_options{}, {&model, 1}, out),
        "tensor 'x' is not aligned to its elements of 4 bytes in device memory: copy it to memory that is",
        invalid_argument);
}
