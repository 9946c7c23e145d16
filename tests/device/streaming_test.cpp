// merge_streamed(): models on the host through a little device memory, with the CPU's bits.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/methods.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <limits>

using namespace taskvec;
using testing::different;

namespace {

template <class T, class Options>
void check_streamed(const testing::random_models<T>& models, const Options& options, std::size_t memory)
{
    std::vector<T> expected, found;
    model_options how;
    how.statistics = true;
    const merge_report wanted = merge(
        cpu{.threads = 2}, options, models.model(models.base), models.task_models(), models.output(expected), how);
    const merge_report report = merge_streamed(gpu{}, options, models.model(models.base), models.task_models(),
        models.output(found), how, {.memory = memory, .host = {.threads = 2}});
    CHECK(different(found, expected) == 0);
    CHECK(report.kept == wanted.kept);
    CHECK(report.conflicting == wanted.conflicting);
}

} // namespace

TEST_CASE_TEMPLATE("every method streams with the CPU's bits, whatever the budget", T, double, float, bf16, f16)
{
    const std::vector<std::size_t> sizes{9001, 1, 0, 64, 30011};
    const testing::random_models<T> models(sizes, 3, 1, 2), smooth(sizes, 2, 2);
    auto fishers = testing::random_models<T>(sizes, 3, 3);
    for (auto& fisher : fishers.tasks) {
        for (auto& value : fisher) { value = narrow<T>(std::abs(widen<arithmetic_type<T>>(value))); }
    }
    for (const std::size_t memory : {std::size_t{1}, std::size_t{300000}, std::size_t{1} << 24}) {
        check_streamed(models, average_options{.weights = {1, 2, 3}}, memory);
        check_streamed(models, task_arithmetic_options{}, memory);
        check_streamed(models, ties_options{.density = 0.3}, memory);
        check_streamed(smooth, ties_options{.density = 0.3, .scope = scope::tensor}, memory);
        check_streamed(models, dare_options{.density = 0.3}, memory);
        check_streamed(models, dare_options{.densities = {0.3, 1.0, 0.7}}, memory);
        check_streamed(models, dare_ties_options{.density = 0.3}, memory);
        check_streamed(models, ties_options{.densities = {0.3, 0.9, 0.05}}, memory);
        check_streamed(smooth, slerp_options{.t = 0.3}, memory);
        check_streamed(models, model_stock_options{}, memory);
        check_streamed(models, fisher_options{.fishers = fishers.task_models(), .normalize = true}, memory);
    }
}

TEST_CASE("in place, unaligned memory, a sink that only writes, excluded tensors")
{
    const testing::random_models<float> models({9001, 100}, 2, 1);
    std::vector<float> expected, found;
    merge(cpu{}, task_arithmetic_options{}, models.model(models.base), models.task_models(), models.output(expected));
    auto base = models.base;
    merge_streamed(gpu{}, task_arithmetic_options{}, models.model(base), models.task_models(), models.output(base), {},
        {.memory = 1});
    CHECK(different(base, expected) == 0);

    std::vector<std::byte> bytes(9001 * sizeof(float) + 1);
    std::memcpy(bytes.data() + 1, models.base.data(), 9001 * sizeof(float));
    const const_model_ref askew{{"x", const_tensor_ref{bytes.data() + 1, dtype::f32, {9001}}}},
        task{{"x", as_tensor(host_view<const float>(models.tasks[0].data(), 9001))}};
    struct writing final : tensor_sink {
        void write(std::size_t, std::uint64_t offset, const void* data, std::size_t size) override
        {
            std::memcpy(values.data() + offset / 4, data, size);
        }
        std::vector<float> values = std::vector<float>(9001);
    } sink;
    (void)merge_streamed(gpu{}, ties_options{}, aligned_models(&askew, {&task, 1}), sink, {.memory = 1});
    std::vector<float> straight(9001);
    merge(cpu{}, ties_options{}, std::vector<float>(models.base.begin(), models.base.begin() + 9001),
        std::vector<std::vector<float>>(1, {models.tasks[0].begin(), models.tasks[0].begin() + 9001}), straight);
    CHECK(different(sink.values, straight) == 0);

    model_options how;
    how.include = [](std::string_view name) { return name == "t0"; };
    merge(cpu{}, average_options{}, models.model(models.base), models.task_models(), models.output(expected), how);
    merge_streamed(gpu{}, average_options{}, models.model(models.base), models.task_models(), models.output(found), how,
        {.memory = 1});
    CHECK(different(found, expected) == 0);
}

TEST_CASE("bad input is named, the work can be stopped, and buffers come from the allocator")
{
    testing::random_models<bf16> models({9001, 5000}, 2, 1);
    models.tasks[1][9001 + 4500] = bf16(std::numeric_limits<float>::infinity());
    std::vector<bf16> out;
    const char* const words = "tensor 't1' of task 2 holds infinity at index 4500: repair it, exclude the tensor, or "
                              "ask for non-finite values to propagate";
    CHECK_THROWS_WITH_AS(merge_streamed(gpu{}, ties_options{}, models.model(models.base), models.task_models(),
                             models.output(out), {}, {.memory = 1}),
        words, nonfinite_error);
    stream_options stopping{.memory = 1};
    stopping.host.progress = [](const progress_event& event) { return event.done < 5000; };
    CHECK_THROWS_AS(merge_streamed(gpu{}, average_options{}, models.model(models.base), models.task_models(),
                        models.output(out), {}, stopping),
        cancelled);
    const testing::on_device<bf16> device(gpu{}, models);
    CHECK_THROWS_WITH_AS(merge_streamed(gpu{}, average_options{}, device.base(), device.tasks(), models.output(out)),
        "tensor 't0' of the base lives in device memory: the cpu policy needs host memory", invalid_argument);
    struct little final : device_memory_resource {
        void* allocate(std::size_t bytes, void*) override { return bytes > 10000 ? nullptr : std::malloc(bytes); }
        void deallocate(void* place, std::size_t, void*) noexcept override { std::free(place); }
    } allocator;
    if (!TASKVEC_ON_CUDA) {
        CHECK_THROWS_AS(merge_streamed(gpu{.allocator = &allocator}, average_options{}, models.model(models.base),
                            models.task_models(), models.output(out)),
            backend_error);
    }
}
