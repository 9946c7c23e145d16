// RegMean on taskvec::gpu: the CPU's layers up to rounding, everything else bit for bit; panels; models that stream;
// errors.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/methods/regmean.hpp>
#include <taskvec/device/methods/streamed.hpp>

#include "../capture.hpp"
#include "../reference/linear_layers.hpp"
#include "on_device.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <string>

using namespace taskvec;
using testing::different;

namespace {

/// Copies of models in device memory.
class copies {
public:
    copies(const gpu& policy, const std::vector<const_model_ref>& models)
    {
        for (const auto& model : models) {
            models_.emplace_back();
            for (const auto& [name, tensor] : model) {
                const auto* const bytes = static_cast<const std::byte*>(tensor.data);
                memory_.emplace_back(policy, std::vector<std::byte>(bytes, bytes + tensor.bytes()));
                models_.back().insert(name,
                    const_tensor_ref{memory_.back().data(), tensor.dtype, tensor.shape, {}, memory_space::device});
            }
        }
    }
    [[nodiscard]] const std::vector<const_model_ref>& models() const { return models_; }

private:
    std::deque<device::buffer<std::byte>> memory_;
    std::vector<const_model_ref> models_;
};

template <class T>
struct merged {
    std::vector<T> weight, bias;

    explicit merged(const testing::linear_layers<T>& net)
        : weight(net.in * net.out)
        , bias(net.out)
    { }
    model_ref model(const testing::linear_layers<T>& net, T* w, T* b, memory_space space) const
    {
        return {{"fc.weight", {w, dtype_of<T>, net.shape(), {}, space}},
            {"fc.bias", {b, dtype_of<T>, {static_cast<std::int64_t>(net.out)}, {}, space}}};
    }
};

template <class T>
merged<T> on_cpu(const testing::linear_layers<T>& net, const regmean_options& options)
{
    merged<T> result(net);
    merge(cpu{.threads = 1}, options, net.models(),
        result.model(net, result.weight.data(), result.bias.data(), memory_space::host));
    return result;
}
template <class T>
merged<T> on_gpu(const testing::linear_layers<T>& net, const regmean_options& options)
{
    const gpu policy;
    const copies models(policy, net.models()), grams(policy, options.grams);
    regmean_options there = options;
    there.grams = grams.models();
    merged<T> result(net);
    const device::buffer<T> weight(policy, result.weight.size()), bias(policy, result.bias.size());
    merge(policy, there, models.models(), result.model(net, weight.data(), bias.data(), memory_space::device));
    result.weight = weight.download();
    result.bias = bias.download();
    return result;
}
template <class T>
merged<T> streamed(const testing::linear_layers<T>& net, const regmean_options& options)
{
    merged<T> result(net);
    const auto tasks = net.models();
    const aligned_models models(nullptr, tasks);
    std::vector<void*> places;
    for (const auto& spec : models.outputs()) {
        places.push_back(
            spec.name == "fc.bias" ? static_cast<void*>(result.bias.data()) : static_cast<void*>(result.weight.data()));
    }
    memory_sink sink(places);
    merge_streamed(gpu{}, options, models, sink, {.memory = 1});
    return result;
}

/// The largest difference, in units that storage can tell apart near the larger of an entry and 1.
template <class T>
double distance(const merged<T>& found, const merged<T>& expected)
{
    const double unit = std::same_as<T, double> ? 1e-11 : std::same_as<T, float> ? 1.2e-7 : 8e-3;
    double worst = found.weight.size() == expected.weight.size() ? 0 : 1e9;
    for (std::size_t i = 0; i < found.weight.size(); ++i) {
        const double x = widen<double>(found.weight[i]), y = widen<double>(expected.weight[i]);
        worst = std::max(worst, std::abs(x - y) / (unit * std::max(1.0, std::abs(y))));
    }
    return worst;
}

template <class T, class Merge>
std::string words_of(const testing::linear_layers<T>& net, const regmean_options& options, const Merge& merge_by)
{
    try {
        (void)merge_by(net, options);
    }
    catch (const error& failure) {
        return failure.what();
    }
    return "no error";
}

} // namespace

TEST_CASE_TEMPLATE("RegMean merges layers as the CPU does, in both layouts, and in panels", T, double, float, bf16)
{
    for (const auto layout : {weight_layout::out_in, weight_layout::in_out}) {
        for (const auto& [n, p] :
            {std::pair<std::size_t, std::size_t>{1, 1}, {7, 300}, {150, 3}, {40, 40}, {24, 700}}) {
            CAPTURE_BOUND(n);
            const testing::linear_layers<T> net(n, p, 3, 2 * n + 5, 3, layout);
            for (const double alpha : {0.9, 0.0}) {
                auto options = net.options(alpha);
                options.weights = {0.5, 2, 1};
                options.ridge = alpha == 0 ? 1e-3 : 0;
                const auto expected = on_cpu(net, options), found = on_gpu(net, options),
                           passed = streamed(net, options);
                CHECK(distance(found, expected) <= 1);
                CHECK(distance(passed, expected) <= 1);
                CHECK(different(found.bias, expected.bias) == 0);
                CHECK(different(passed.bias, expected.bias) == 0);
            }
        }
    }
}

TEST_CASE(
    "a task that is alone comes back; inputs that no one saw get the average with a ridge, and are an error without")
{
    const testing::linear_layers<float> alone(30, 20, 1, 40, 1);
    CHECK(different(on_gpu(alone, alone.options(0.9)).weight, alone.weights[0]) == 0);
    testing::linear_layers<double> net(10, 4, 2, 30, 2);
    for (auto& gram : net.grams) {
        for (std::size_t i = 0; i < 10; ++i) { gram[i * 10 + 3] = gram[3 * 10 + i] = 0; }
    }
    auto options = net.options(0.9);
    const std::string words = words_of(net, options, on_cpu<double>);
    CHECK(words.find("(input 3 was 0 in all batches)") != std::string::npos);
    CHECK(words_of(net, options, on_gpu<double>) == words);
    options.ridge = 1e-6;
    CHECK(distance(on_gpu(net, options), on_cpu(net, options)) <= 1);
}

TEST_CASE("what is no Gram matrix is refused in the CPU's words")
{
    const testing::linear_layers<double> good(12, 5, 2, 30, 4);
    for (const int fault : {0, 1, 2, 3, 4}) {
        auto net = good;
        auto& gram = net.grams[1];
        switch (fault) {
        case 0: gram[5 * 12 + 2] += 1; break;
        case 1: gram[4 * 12 + 4] = -1; break;
        case 2: gram[7 * 12 + 1] = gram[1 * 12 + 7] = 1e6; break;
        case 3: gram[6 * 12 + 6] = std::numeric_limits<double>::infinity(); break;
        default: gram[8 * 12 + 2] = std::numeric_limits<double>::quiet_NaN(); break;
        }
        CAPTURE(fault);
        const std::string words = words_of(net, net.options(0.9), on_cpu<double>);
        CHECK(words != "no error");
        CHECK(words_of(net, net.options(0.9), on_gpu<double>) == words);
        CHECK(words_of(net, net.options(0.9), streamed<double>) == words);
    }
    auto options = good.options(1.5);
    CHECK(words_of(good, options, on_gpu<double>) == words_of(good, options, on_cpu<double>));
    options = good.options(0.9);
    options.grams.pop_back();
    CHECK(words_of(good, options, on_gpu<double>) == words_of(good, options, on_cpu<double>));
}

TEST_CASE("NaN in a weight is named, spaces are checked, and outputs may replace a task but not its Gram")
{
    const gpu policy;
    testing::linear_layers<float> net(6, 6, 2, 30, 5);
    const auto expected = on_cpu(net, net.options(0.9));
    const copies models(policy, net.models()), grams(policy, net.gram_models());
    auto options = net.options(0.9);
    CHECK_THROWS_AS(merge(policy, options, models.models(), model_ref()), invalid_argument); // Grams on the host
    options.grams = grams.models();
    const auto writable = [](const const_tensor_ref& tensor) {
        return tensor_ref{const_cast<void*>(tensor.data), tensor.dtype, tensor.shape, {}, memory_space::device};
    };
    const device::buffer<float> bias(policy, 6);
    const tensor_ref bias_place{bias.data(), dtype::f32, {6}, {}, memory_space::device};
    CHECK_THROWS_AS(
        merge(policy, options, models.models(),
            model_ref{{"fc.weight", writable(*grams.models()[0].find("fc.weight"))}, {"fc.bias", bias_place}}),
        invalid_argument);
    const tensor_ref place = writable(*models.models()[0].find("fc.weight"));
    merge(policy, options, models.models(), model_ref{{"fc.weight", place}, {"fc.bias", bias_place}});
    merged<float> found(net);
    device::download(policy, found.weight.data(), place.data, found.weight.size() * sizeof(float));
    CHECK(distance(found, expected) <= 1);

    net.weights[1][8] = std::numeric_limits<float>::quiet_NaN();
    const std::string words = words_of(net, net.options(0.9), on_gpu<float>);
    CHECK(words.find("tensor 'fc.weight' of task 2 holds NaN at index 8") != std::string::npos);
}
