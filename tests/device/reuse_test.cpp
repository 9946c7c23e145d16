// Sparse vectors, Post-Pruning and PERU-FFT on taskvec::gpu: the CPU's deltas and the CPU's weights.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/methods.hpp>
#include <taskvec/device/reuse.hpp>
#include <taskvec/device/reuse/streamed.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <limits>
#include <utility>

using namespace taskvec;
using testing::different;

namespace {

constexpr std::pair<scope, trim_rule> scopes_and_trims[] = {{scope::model, trim_rule::exact},
    {scope::tensor, trim_rule::exact}, {scope::model, trim_rule::reach_next}, {scope::tensor, trim_rule::reach_next}};

} // namespace

TEST_CASE_TEMPLATE(
    "Post-Pruning keeps what the CPU keeps, and is applied and undone in place", T, double, float, bf16, f16)
{
    using A = arithmetic_type<T>;
    const gpu policy;
    for (const int levels : {0, 2}) {
        const testing::random_models<T> models({3000, 1, 0, 64, 20001}, 1, 3, levels);
        const testing::on_device<T> device(policy, models);
        for (const auto& [over, trim] : scopes_and_trims) {
            for (const double density : {0.0001, 0.1, 1.0}) {
                const post_pruning_options options{.density = density, .scope = over, .trim = trim};
                const sparse_model expected =
                    post_pruning(cpu{}, options, models.model(models.base), models.task_models()[0]);
                const device_sparse_model delta = post_pruning(policy, options, device.base(), device.tasks()[0]);
                CHECK(to_host(delta) == expected);
                CHECK(kept_entries(delta) == kept_entries(expected));

                std::vector<T> live = models.base, live_words = models.base;
                const model_ref host_live = models.output(live);
                (void)apply(cpu{}, expected, host_live, 0.3);
                device::buffer<T> on_device(policy, models.base);
                model_ref device_live;
                for (const auto& [name, tensor] : host_live) {
                    const auto offset = static_cast<T*>(tensor.data) - live.data();
                    device_live.insert(name, as_tensor(device_view<T>(on_device.data() + offset, tensor.size())));
                }
                const device_saved_words saved = apply(policy, delta, device_live, 0.3);
                CHECK(different(on_device.download(), live) == 0);
                undo(policy, delta, saved, device_live);
                CHECK(different(on_device.download(), live_words) == 0);
            }
        }
    }
    const testing::random_models<T> models({9001}, 1, 3);
    const testing::on_device<T> device(policy, models);
    const auto expected = post_pruning(cpu{}, {}, models.base, models.tasks[0]);
    const device_sparse_vector<A> delta = post_pruning(policy, {}, device.base_view(), device.task_views()[0]);
    CHECK(to_host(delta) == expected);
    const device::buffer<T> live(policy, models.base);
    std::vector<T> weights = models.base;
    (void)apply(cpu{}, expected, weights);
    const auto saved = apply(policy, to_device(policy, expected), live.view());
    CHECK(different(live.download(), weights) == 0);
    undo(policy, delta, saved, live.view());
    CHECK(different(live.download(), models.base) == 0);
}

TEST_CASE("values are f64 where the base stores f64, and f32 otherwise")
{
    const gpu policy;
    const testing::random_models<double> wide({9001}, 1, 3);
    const testing::random_models<float> narrow({9001}, 1, 4);
    const testing::on_device<double> x(policy, wide);
    const testing::on_device<float> y(policy, narrow);
    CHECK(to_host(post_pruning(policy, {}, x.base_view(), y.base_view()))
        == post_pruning(cpu{}, {}, wide.base, narrow.base));
    CHECK(to_host(post_pruning(policy, {}, y.base_view(), x.base_view()))
        == post_pruning(cpu{}, {}, narrow.base, wide.base));
}

TEST_CASE_TEMPLATE("PERU-FFT has the CPU's merged model and the CPU's deltas", T, double, float, bf16, f16)
{
    const gpu policy;
    const testing::random_models<T> models({3000, 64, 5001}, 3, 3);
    const testing::on_device<T> device(policy, models);
    std::vector<T> merged;
    const auto expected = peru_fft(cpu{}, task_arithmetic_options{}, {.density = 0.05}, models.model(models.base),
        models.task_models(), models.output(merged));
    const auto deltas =
        peru_fft(policy, task_arithmetic_options{}, {.density = 0.05}, device.base(), device.tasks(), device.out());
    CHECK(different(device.result(), merged) == 0);
    REQUIRE(deltas.size() == expected.size());
    for (std::size_t t = 0; t < deltas.size(); ++t) { CHECK(to_host(deltas[t]) == expected[t]); }
    const auto flat = peru_fft(cpu{}, task_arithmetic_options{}, {}, models.base, models.tasks, merged);
    const auto flat_deltas =
        peru_fft(policy, task_arithmetic_options{}, {}, device.base_view(), device.task_views(), device.out_view());
    for (std::size_t t = 0; t < flat.size(); ++t) { CHECK(to_host(flat_deltas[t]) == flat[t]); }
}

TEST_CASE("bad input is named, and nothing is changed")
{
    const gpu policy;
    const testing::random_models<float> models({100}, 1, 3);
    const testing::on_device<float> device(policy, models);
    CHECK_THROWS_AS((void)to_device(policy, sparse_vector<float>{{5}, {3, 2}, {1, 1}}), invalid_argument);
    const device_sparse_model delta =
        to_device(policy, sparse_model{{"t0", sparse_vector<float>{{100}, {3, 99}, {1, 1}}}});
    CHECK_THROWS_WITH_AS(
        (void)apply(policy, delta, model_ref()), "tensor 't0' of the delta is missing in the model", invalid_argument);
    std::vector<float> on_host(100);
    CHECK_THROWS_WITH_AS(
        (void)apply(policy, delta, model_ref{{"t0", as_tensor(host_view<float>(on_host.data(), 100))}}),
        "tensor 't0' lives in host memory; copy it to the policy's own memory space first", invalid_argument);
    const device::buffer<bf16> narrow(policy, 100);
    const device::buffer<double> wide(policy, 100);
    CHECK_THROWS_AS((void)apply(policy, delta, model_ref{{"t0", as_tensor(wide.view())}}), dtype_mismatch);
    CHECK_THROWS_AS((void)apply(policy, delta, model_ref{{"t0", as_tensor(narrow.view(), {10, 10})}}), shape_mismatch);
    CHECK_THROWS_AS(undo(policy, delta, {}, device.out()), invalid_argument);
    CHECK(different(device.result(), std::vector<float>(100)) == 0);
    CHECK_THROWS_AS(
        (void)post_pruning(policy, {.density = 0}, device.base_view(), device.task_views()[0]), invalid_argument);
}

TEST_CASE_TEMPLATE(
    "Post-Pruning of models that stream keeps what the CPU keeps, whatever the budget", T, double, float, bf16, f16)
{
    for (const int levels : {0, 2}) {
        const testing::random_models<T> models({3000, 1, 0, 64, 20001}, 1, 3, levels);
        const auto base = models.model(models.base);
        const auto tasks = models.task_models();
        const aligned_models aligned(&base, tasks);
        for (const auto& [over, trim] : scopes_and_trims) {
            for (const double density : {0.0001, 0.1, 1.0}) {
                const post_pruning_options options{.density = density, .scope = over, .trim = trim};
                const sparse_model expected = post_pruning(cpu{}, options, base, tasks[0]);
                const bool in_pieces =
                    density == 0.1 && over == scope::model; // of 4096 elements; otherwise in one for each tensor
                sparse_model_sink sink;
                post_pruning_streamed(
                    gpu{}, options, aligned, sink, {.memory = in_pieces ? std::size_t{1} : std::size_t{1} << 24});
                CHECK(sink.take() == expected);
            }
        }
    }
}

TEST_CASE("models that stream: types of their own, bad input, a stop")
{
    const testing::random_models<double> wide({9001}, 1, 3);
    testing::random_models<float> narrow({9001}, 1, 4);
    const auto prune = [](const auto& base, const auto& task, const stream_options& how = {.memory = 1}) {
        const const_model_ref x = detail::flat_model(as_view(base)), y = detail::flat_model(as_view(task));
        sparse_model_sink sink;
        post_pruning_streamed(gpu{}, {}, aligned_models(&x, {&y, 1}), sink, how);
        return sink.take();
    };
    CHECK(std::get<sparse_vector<double>>(prune(wide.base, narrow.base).begin()->second)
        == post_pruning(cpu{}, {}, wide.base, narrow.base));
    CHECK(std::get<sparse_vector<float>>(prune(narrow.base, wide.base).begin()->second)
        == post_pruning(cpu{}, {}, narrow.base, wide.base));
    stream_options stopping{.memory = 1};
    stopping.host.progress = [](const progress_event& event) { return event.done < 5000; };
    CHECK_THROWS_AS(prune(wide.base, wide.tasks[0], stopping), cancelled);
    narrow.tasks[0][7] = std::numeric_limits<float>::infinity();
    CHECK_THROWS_AS(prune(narrow.base, narrow.tasks[0]), nonfinite_error);
    const const_model_ref one = detail::flat_model(as_view(narrow.base));
    sparse_model_sink sink;
    CHECK_THROWS_AS(post_pruning_streamed(gpu{}, {}, aligned_models(nullptr, {&one, 1}), sink), invalid_argument);
}
