// TIES, DARE and DARE-TIES on taskvec::gpu: the CPU's bits with every option; counts; errors.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/methods.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <limits>

using namespace taskvec;
using testing::different;

namespace {

template <class T, class Options>
void check_merge(const testing::random_models<T>& models, const testing::on_device<T>& device, const Options& options,
    bool statistics = false)
{
    const gpu policy;
    model_options how;
    how.statistics = statistics;
    std::vector<T> expected;
    const merge_report wanted = merge(
        cpu{.threads = 2}, options, models.model(models.base), models.task_models(), models.output(expected), how);
    const merge_report found = merge(policy, options, device.base(), device.tasks(), device.out(), how);
    CHECK(different(device.result(), expected) == 0);
    CHECK(found.kept == wanted.kept);
    CHECK(found.conflicting == wanted.conflicting);
}

std::vector<double> some_weights(std::size_t count, bool negative)
{
    std::vector<double> weights;
    for (std::size_t t = 0; t < count; ++t) {
        weights.push_back(0.25 * static_cast<double>(t + 1) * (negative && t % 2 ? -1 : 1));
    }
    return weights;
}

} // namespace

TEST_CASE_TEMPLATE("TIES has the CPU's bits with every option", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const std::size_t count : {1, 3, 11}) { // 8 stay in registers
        for (const int levels : {0, 2}) { // few values: magnitudes tie and sums cancel
            const testing::random_models<T> models({3000, 1, 0, 64, 5001}, count, static_cast<unsigned>(count), levels);
            const testing::on_device<T> device(policy, models);
            for (auto options : {ties_options{}, ties_options::as_in_ties_merging(), ties_options::as_in_mergekit(),
                     ties_options::as_in_peft()}) {
                options.density = 0.4;
                options.lambda = 0.7;
                check_merge(models, device, options);
                options.weights = some_weights(count, options.negative_weights);
                check_merge(models, device, options, true);
            }
            for (const disjoint_merge combine : {disjoint_merge::mean, disjoint_merge::sum, disjoint_merge::max}) {
                for (const zero_sign zero :
                    {zero_sign::majority, zero_sign::majority_or_negative, zero_sign::positive, zero_sign::none}) {
                    for (const scope over : {scope::model, scope::tensor}) {
                        check_merge(models, device,
                            ties_options{
                                .density = 0.3, .lambda = -1.5, .scope = over, .combine = combine, .zero_sign = zero});
                    }
                }
            }
        }
    }
}

TEST_CASE_TEMPLATE("DARE and DARE-TIES draw what the CPU draws", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const std::size_t count : {1, 3, 9}) {
        const testing::random_models<T> models(
            {3000, 1, 0, 63, 5001}, count, static_cast<unsigned>(count), count == 3 ? 2 : 0);
        const testing::on_device<T> device(policy, models);
        for (const double density : {1e-12, 0.3, 1.0}) {
            check_merge(models, device,
                dare_options{.density = density, .seed = 7, .lambda = 0.3, .weights = some_weights(count, true)},
                density < 1);
            check_merge(
                models, device, dare_ties_options{.density = density, .seed = 8, .ties = {.lambda = 0.6}}, true);
            check_merge(models, device,
                dare_ties_options{.density = density, .seed = 9, .ties = ties_options::as_in_mergekit()});
        }
    }
}

TEST_CASE("a majority that is against the first guess is settled")
{
    // Two entries elect minus, one sum is 0: it follows them.
    const gpu policy;
    const std::vector<float> base(4, 0.0f), first{-1, -2, 3, 0}, second{-1, -2, -3, 0};
    const device::buffer<float> b(policy, base), x(policy, first), y(policy, second), out(policy, 4);
    merge(policy, ties_options{.density = 1.0}, b.view(), std::vector{x.view(), y.view()}, out.view());
    CHECK(out.download() == std::vector<float>{-1, -2, -3, 0});
}

TEST_CASE("views, and storage types of their own")
{
    const gpu policy;
    const testing::random_models<float> models({9001}, 3, 1);
    const testing::random_models<bf16> rounded({9001}, 1, 2);
    const testing::on_device<float> device(policy, models);
    const testing::on_device<bf16> other(policy, rounded);
    std::vector<bf16> expected(9001);
    merge(cpu{}, ties_options{}, rounded.base, models.tasks, expected);
    merge(policy, ties_options{}, other.base_view(), device.task_views(), other.out_view());
    CHECK(different(other.result(), expected) == 0);
}

TEST_CASE("bad input is named")
{
    const gpu policy;
    testing::random_models<float> models({3000, 5000}, 2, 1);
    models.tasks[1][7000] = std::numeric_limits<float>::quiet_NaN();
    const testing::on_device<float> device(policy, models);
    const char* const words = "tensor 't1' of task 2 holds NaN at index 4000: repair it, exclude the tensor, or ask "
                              "for non-finite values to propagate";
    CHECK_THROWS_WITH_AS(
        merge(policy, ties_options{}, device.base(), device.tasks(), device.out()), words, nonfinite_error);
    CHECK_THROWS_WITH_AS(merge(policy, ties_options{.density = 1.0}, device.base(), device.tasks(), device.out()),
        words, nonfinite_error);
    CHECK_THROWS_WITH_AS(
        merge(policy, dare_options{}, device.base(), device.tasks(), device.out()), words, nonfinite_error);
    CHECK_THROWS_WITH_AS(
        merge(policy, dare_ties_options{}, device.base(), device.tasks(), device.out()), words, nonfinite_error);
    model_options how;
    how.on_nonfinite = nonfinite::propagate;
    std::vector<float> expected;
    merge(cpu{}, ties_options{}, models.model(models.base), models.task_models(), models.output(expected), how);
    merge(policy, ties_options{}, device.base(), device.tasks(), device.out(), how);
    CHECK(different(device.result(), expected) == 0);
    CHECK_THROWS_AS(
        merge(policy, ties_options{.density = 0}, device.base(), device.tasks(), device.out()), invalid_argument);
    CHECK_THROWS_AS(
        merge(policy, ties_options{.weights = {1, -1}}, device.base(), device.tasks(), device.out()), invalid_argument);
    CHECK_THROWS_AS(
        merge(policy, dare_options{.density = 2}, device.base(), device.tasks(), device.out()), invalid_argument);
    CHECK_THROWS_AS(merge(policy, ties_options{}, device.base(), device.tasks(),
                        device.base_view().size() ? model_ref() : device.out()),
        invalid_argument);
}
