// Averages over checkpoints: the weights of each schedule, and merges that are the weighted average with them.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/shaped_models.hpp"

#include <taskvec/methods/checkpoint_average.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <vector>

using namespace taskvec;

namespace {

void check_weights(const checkpoint_average_options& options, const std::vector<double>& expected)
{
    const auto weights = checkpoint_weights(options, expected.size());
    REQUIRE(weights.size() == expected.size());
    for (std::size_t t = 0; t < weights.size(); ++t) {
        CAPTURE(t);
        CHECK(std::abs(weights[t] - expected[t]) < 1e-15);
    }
}

} // namespace

TEST_CASE("each schedule weighs checkpoints as it says")
{
    check_weights({}, {0.25, 0.25, 0.25, 0.25});
    check_weights({.schedule = checkpoint_schedule::ema, .decay = 0.5}, {1.0 / 7, 2.0 / 7, 4.0 / 7});
    check_weights({.schedule = checkpoint_schedule::ema, .decay = 1}, {0.5, 0.5});
    check_weights({.schedule = checkpoint_schedule::wsm, .shape = decay_shape::linear}, {0.2, 0.2, 0.2, 0.2, 0.2});
    const double root = std::sqrt(0.5);
    check_weights(
        {.schedule = checkpoint_schedule::wsm}, {0.5, root - 0.5, std::sqrt(0.75) - root, 1 - std::sqrt(0.75)});
    check_weights({.schedule = checkpoint_schedule::wsm, .shape = decay_shape::cosine},
        {(1 - root) / 2, root / 2, root / 2, (1 - root) / 2});
    for (const auto schedule : {checkpoint_schedule::uniform, checkpoint_schedule::ema, checkpoint_schedule::wsm}) {
        check_weights({.schedule = schedule}, {1});
    }
}

TEST_CASE("WSM is where updates that decay would have led")
{
    // Checkpoints of one number; the update before checkpoint t counts d(t / N).
    const std::vector<double> checkpoints{3, 4.5, 4, 7, 6.25, 9};
    for (const auto shape : {decay_shape::linear, decay_shape::one_minus_sqrt, decay_shape::cosine}) {
        const auto weights =
            checkpoint_weights({.schedule = checkpoint_schedule::wsm, .shape = shape}, checkpoints.size());
        double merged = 0, trained = checkpoints[0];
        for (std::size_t t = 0; t < checkpoints.size(); ++t) {
            merged += weights[t] * checkpoints[t];
            const double x = static_cast<double>(t) / 6;
            const double left = shape == decay_shape::linear ? 1 - x
                : shape == decay_shape::cosine               ? std::pow(std::cos(std::acos(-1.0) * x / 2), 2)
                                                             : 1 - std::sqrt(x);
            if (t > 0) { trained += left * (checkpoints[t] - checkpoints[t - 1]); }
        }
        CHECK(std::abs(merged - trained) < 1e-13);
    }
}

TEST_CASE_TEMPLATE("the merge is the average with these weights, bit for bit", T, float, bf16)
{
    const testing::random_models<T> models({3000, 1, 0, 64}, 5, 4);
    const auto merged = [&](const auto& options) {
        std::vector<T> out;
        merge(cpu{.threads = 2}, options, models.task_models(), models.output(out));
        return out;
    };
    for (const auto schedule : {checkpoint_schedule::uniform, checkpoint_schedule::ema, checkpoint_schedule::wsm}) {
        const checkpoint_average_options options{.schedule = schedule, .decay = 0.7};
        CHECK(testing::same_words(merged(options), merged(average_options{.weights = checkpoint_weights(options, 5)})));
    }
    for (const double decay : {0.0, -0.5, 1.5, std::numeric_limits<double>::quiet_NaN()}) {
        CAPTURE(decay);
        CHECK_THROWS_AS(merged(checkpoint_average_options{.decay = decay}), invalid_argument);
        CHECK_THROWS_AS((void)checkpoint_weights({.decay = decay}, 3), invalid_argument);
    }
}
