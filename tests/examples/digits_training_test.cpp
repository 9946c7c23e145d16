// SPDX-License-Identifier: Apache-2.0
#include "adapter.hpp"
#include "setting.hpp"
#include "table.hpp"
#include "train.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/core/random.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

using namespace digits;

namespace {

const dataset& images()
{
    static const dataset all = load_images(DIGITS_DATA_FILE);
    return all;
}

/// Mean cross-entropy, in f64 from f32 logits.
double loss(const encoder& body, const matrix& head, const dataset& batch)
{
    const Eigen::MatrixXd logits = forward(body, head, batch.inputs).logits.cast<double>();
    double sum = 0;
    for (Eigen::Index i = 0; i < logits.rows(); ++i) {
        const double top = logits.row(i).maxCoeff();
        sum += top + std::log((logits.row(i).array() - top).exp().sum())
            - logits(i, batch.labels[static_cast<std::size_t>(i)]);
    }
    return sum / static_cast<double>(logits.rows());
}

/// Checks a gradient along a random direction against a central difference of `at(values)`.
template <class Loss>
void check_gradient(std::span<const float> gradient, std::vector<float> values, std::uint32_t stream, Loss&& at)
{
    const taskvec::random_stream random(7, stream, "direction");
    std::vector<double> direction(values.size());
    double slope = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
        direction[i] = random.normal(i);
        slope += direction[i] * static_cast<double>(gradient[i]);
    }
    const double step = 2e-4;
    auto there = values, back = values;
    for (std::size_t i = 0; i < values.size(); ++i) {
        there[i] = static_cast<float>(values[i] + step * direction[i]);
        back[i] = static_cast<float>(values[i] - step * direction[i]);
    }
    CHECK(slope == doctest::Approx((at(there) - at(back)) / (2 * step)).epsilon(0.02));
}

template <class Parameters>
Parameters holding(const std::vector<float>& values)
{
    Parameters parameters;
    std::copy(values.begin(), values.end(), parameters.values().begin());
    return parameters;
}

std::vector<float> copy(std::span<const float> values)
{
    return {values.begin(), values.end()};
}

} // namespace

TEST_CASE("the network's gradient agrees with differences")
{
    const network model = random_network(3);
    const dataset batch = random_batch(in_domain(images(), 2), 64, 5, 0, "gradient test");
    network gradient;
    backward(model, batch, gradient, true);
    for (std::uint32_t direction = 0; direction < 4; ++direction) {
        check_gradient(gradient.body.values(), copy(model.body.values()), direction,
            [&](const std::vector<float>& values) { return loss(holding<encoder>(values), model.head, batch); });
        check_gradient({gradient.head.data(), static_cast<std::size_t>(gradient.head.size())},
            copy({model.head.data(), static_cast<std::size_t>(model.head.size())}), direction,
            [&](const std::vector<float>& values) {
                return loss(model.body, Eigen::Map<const matrix>(values.data(), classes, features), batch);
            });
    }
}

TEST_CASE("the encoder's named tensors are views of its one buffer, in name order")
{
    encoder body;
    std::iota(body.values().begin(), body.values().end(), 0.0f);
    const taskvec::const_model_ref model = std::as_const(body).model();
    REQUIRE(model.size() == 4);
    float next = 0;
    for (const auto& [name, tensor] : model) {
        CHECK(static_cast<const float*>(tensor.data)[0] == next);
        next += static_cast<float>(tensor.size());
    }
    CHECK(next == static_cast<float>(encoder::size()));
    CHECK(encoder::size() == 64 * 128 + 128 + 128 * 512 + 512);
    CHECK(body.weight2()(1, 0) - body.weight2()(0, 0) == 128.0f);
}

TEST_CASE("optimisers take the steps of their definitions")
{
    std::vector<float> x{1.0f};
    momentum_sgd sgd(1);
    sgd.step(x, std::vector<float>{2.0f}, 0.1); // v = 2
    CHECK(x[0] == doctest::Approx(0.8));
    sgd.step(x, std::vector<float>{1.0f}, 0.1); // v = 0.9·2 + 1
    CHECK(x[0] == doctest::Approx(0.8 - 0.28));

    std::vector<float> y{1.0f};
    adam optimiser(1);
    optimiser.step(y, std::vector<float>{-3.0f}, 0.01); // the first step is the rate, whatever the gradient
    CHECK(y[0] == doctest::Approx(1.01));
    optimiser.step(y, std::vector<float>{1.0f}, 0.01);
    const double m = (0.9 * -0.3 + 0.1) / (1 - 0.81), v = (0.999 * 0.009 + 0.001) / (1 - 0.999 * 0.999);
    CHECK(y[0] == doctest::Approx(1.01 - 0.01 * m / std::sqrt(v)));

    CHECK(cosine_decay(2.0, 0, 10) == 2.0);
    CHECK(cosine_decay(2.0, 5, 10) == doctest::Approx(1.0));
}

TEST_CASE("training is a function of the seed, and learns its own task only")
{
    const setting s = make_setting(images(), 5), same = make_setting(images(), 5), other = make_setting(images(), 6);
    CHECK(copy(s.base.body.values()) == copy(same.base.body.values()));
    CHECK(s.base.head == same.base.head);
    CHECK(copy(s.base.body.values()) != copy(other.base.body.values()));

    const encoder tuned = fine_tune(s.base, s.train[2], s.seed, task_names[2]),
                  again = fine_tune(same.base, same.train[2], same.seed, task_names[2]);
    CHECK(copy(tuned.values()) == copy(again.values()));
    const scores before = evaluate(s.base.body, s.base.head, s.test), after = evaluate(tuned, s.base.head, s.test);
    CHECK(after[2] > 0.93);
    CHECK(after[2] > before[2] + 0.2);
    CHECK(mean(after) < 0.7);
}

TEST_CASE("an adapter starts as the base, and its gradients agree with differences in both parameterisations")
{
    const network base = random_network(3);
    const dataset batch = random_batch(in_domain(images(), 4), 64, 5, 0, "adapter test");
    const adapter initial = initial_adapter(9);
    CHECK(copy(adapted(base, initial, initial, parameterisation::lora).values()) == copy(base.body.values()));
    CHECK(copy(adapted(base, initial, initial, parameterisation::linearized).values()) == copy(base.body.values()));

    // One step of plain descent moves φ by −rate · gradient, so its difference is the gradient (clipped to norm 0.3).
    // B0 ≠ 0 makes every term of the derivative count.
    adapter start = initial;
    const taskvec::random_stream random(1, 0, "B");
    for (Eigen::Index i = 0; i < start.b1().size(); ++i) {
        start.b1().data()[i] = static_cast<float>(0.1 * random.normal(static_cast<std::uint64_t>(i)));
    }
    for (Eigen::Index i = 0; i < start.b2().size(); ++i) {
        start.b2().data()[i] = static_cast<float>(0.05 * random.normal(static_cast<std::uint64_t>(1000000 + i)));
    }
    for (const auto kind : {parameterisation::lora, parameterisation::linearized}) {
        const adapter stepped = fine_tune_adapter(base, start, batch, 5, "step", kind, {.steps = 1, .rate = 1e-2});
        std::vector<float> gradient(adapter::size());
        double norm = 0;
        for (std::size_t i = 0; i < gradient.size(); ++i) {
            gradient[i] = (start.values()[i] - stepped.values()[i]) / 1e-2f;
            norm += static_cast<double>(gradient[i]) * gradient[i];
        }
        CHECK(std::sqrt(norm) == doctest::Approx(0.3).epsilon(1e-3));
        const dataset seen = random_batch(batch, 64, 5, 0, "adapter for step");
        const auto at = [&](const std::vector<float>& values) {
            return loss(adapted(base, start, holding<adapter>(values), kind), base.head, seen);
        };
        // The clipped gradient is the gradient up to its scale, which any one direction gives.
        std::vector<float> along = copy(start.values());
        const double step = 1e-3;
        auto there = along, back = along;
        double steepest = 0;
        for (std::size_t i = 0; i < along.size(); ++i) {
            there[i] = static_cast<float>(along[i] + step * gradient[i]);
            back[i] = static_cast<float>(along[i] - step * gradient[i]);
        }
        steepest = (at(there) - at(back)) / (2 * step) / 0.3;
        CHECK(steepest > 0.3); // so it was clipped
        for (auto& g : gradient) { g *= static_cast<float>(steepest / 0.3); }
        for (std::uint32_t direction = 0; direction < 3; ++direction) {
            check_gradient(gradient, copy(start.values()), direction, at);
        }
    }
}

TEST_CASE("a linearized adapter's encoder is affine in φ, a plain one's is not")
{
    const network base = random_network(3);
    const adapter initial = initial_adapter(9);
    adapter one = initial, two = initial, half = initial;
    const taskvec::random_stream random(2, 0, "φ");
    for (std::size_t i = 0; i < adapter::size(); ++i) {
        one.values()[i] += static_cast<float>(0.1 * random.normal(2 * i));
        two.values()[i] += static_cast<float>(0.1 * random.normal(2 * i + 1));
        half.values()[i] = 0.5f * (one.values()[i] + two.values()[i]);
    }
    const auto off_the_chord = [&](parameterisation kind) {
        const encoder a = adapted(base, initial, one, kind), b = adapted(base, initial, two, kind),
                      c = adapted(base, initial, half, kind);
        double largest = 0;
        for (std::size_t i = 0; i < encoder::size(); ++i) {
            largest =
                std::max(largest, std::abs(0.5 * (static_cast<double>(a.values()[i]) + b.values()[i]) - c.values()[i]));
        }
        return largest;
    };
    CHECK(off_the_chord(parameterisation::linearized) < 1e-5);
    CHECK(off_the_chord(parameterisation::lora) > 1e-2);
}

TEST_CASE("tables: rows keep their order, Avg comes last, several seeds give a standard deviation")
{
    table t("Title");
    scores half{}, all{};
    half.fill(0.5);
    all.fill(1.0);
    all[0] = 0.2;
    t.add("First", 10, half);
    t.add("Second row", 200, all);
    CHECK(t["First"].average() == 0.5);
    CHECK(t["Second row"].average() == doctest::Approx(0.9));
    CHECK(t.best({"First", "Second row"})[0] == doctest::Approx(0.9));
    CHECK_THROWS_AS((void)t["third"], taskvec::invalid_argument);
    const std::string one = t.text();
    CHECK(one.find("Method") < one.find("First"));
    CHECK(one.find("First") < one.find("Second row"));
    CHECK(one.find("90.00\n") != std::string::npos);
    CHECK(one.find("20.00") != std::string::npos);

    half.fill(0.7);
    t.add("First", 10, half);
    t.add("Second row", 200, all);
    CHECK(t.text().find("60.00±14.14\n") != std::string::npos); // 0.5, 0.7: sample deviation 0.1414
}
