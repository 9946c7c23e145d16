// Averages over the checkpoints of one training run, in their order: uniform, exponential, or with the weights that
// stand for a decay of the learning rate. Tian et al., "WSM: decay-free learning rate schedule via checkpoint merging
// for LLM pre-training" (2025).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/merge.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How checkpoints are weighed: all the same; each by a factor more than the one before it; or as a decay of the
/// learning rate would have weighed the updates between them.
enum class checkpoint_schedule : std::uint8_t { uniform, ema, wsm };
/// A decay d from d(0) = 1 to d(1) = 0: 1 − x, 1 − √x, (1 + cos πx) / 2.
enum class decay_shape : std::uint8_t { linear, one_minus_sqrt, cosine };

template <>
struct enum_words<checkpoint_schedule> {
    static constexpr std::array words{enum_word<checkpoint_schedule>{checkpoint_schedule::uniform, "uniform"},
        enum_word<checkpoint_schedule>{checkpoint_schedule::ema, "ema"},
        enum_word<checkpoint_schedule>{checkpoint_schedule::wsm, "wsm"}};
};
template <>
struct enum_words<decay_shape> {
    static constexpr std::array words{enum_word<decay_shape>{decay_shape::linear, "linear"},
        enum_word<decay_shape>{decay_shape::one_minus_sqrt, "one-minus-sqrt"},
        enum_word<decay_shape>{decay_shape::cosine, "cosine"}};
};

/// θ* = Σ ct·θt over N checkpoints in the order of the tasks, the oldest first:
///   - uniform: ct = 1 / N;
///   - ema: ct ∝ decay^(N − 1 − t), an exponential moving average without the bias towards its first value;
///   - wsm: ct = d(t / N) − d((t + 1) / N), for which θ* is where the update from checkpoint t − 1 to t, times
///     d(t / N), for every t, would have led from the first checkpoint: training at a constant rate, then merged, for
///     training with that decay. The linear one is the uniform average.
///
/// This is the weighted average with these weights (average_options), bit for bit. Needs no base.
///
///     merge(cpu{}, checkpoint_average_options{.schedule = checkpoint_schedule::wsm}, checkpoints, out);
struct checkpoint_average_options {
    checkpoint_schedule schedule = checkpoint_schedule::uniform;
    double decay = 0.9; ///< of ema: what a checkpoint weighs against the next one
    decay_shape shape = decay_shape::one_minus_sqrt; ///< of wsm
};

template <>
struct options_of<checkpoint_average_options> {
    static constexpr option_table table{option_row("schedule", &checkpoint_average_options::schedule,
                                            "how checkpoints are weighed, the oldest first", {.unit = "HOW"}),
        option_row("decay", &checkpoint_average_options::decay,
            "what a checkpoint weighs against the next one under ema",
            {.above = 0, .at_most = 1, .expected = "a factor above 0 and up to 1, such as 0.9"}),
        option_row("decay-shape", &checkpoint_average_options::shape,
            "the decay of the learning rate that wsm stands for", {.unit = "SHAPE"})};
};

namespace detail {

/// What is left of the learning rate at x, the part of the decay that is over.
[[nodiscard]] inline double decayed(decay_shape shape, double x)
{
    switch (shape) {
    case decay_shape::linear: return 1 - x;
    case decay_shape::one_minus_sqrt: return 1 - std::sqrt(x);
    case decay_shape::cosine: break;
    }
    return (1 + std::cos(std::numbers::pi * x)) / 2;
}

/// checkpoint_weights(), as a list of the call.
[[nodiscard]] inline call_vector<double> weights_of_checkpoints(
    const checkpoint_average_options& options, std::size_t count)
{
    if (!(options.decay > 0 && options.decay <= 1)) {
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("decay is ", options.decay, "; expected a factor in (0, 1], such as 0.9"));
    }
    call_vector<double> weights;
    const double n = static_cast<double>(count);
    double sum = 0;
    for (std::size_t t = 0; t < count; ++t) {
        const double x = static_cast<double>(t);
        switch (options.schedule) {
        case checkpoint_schedule::uniform: weights.push_back(1); break;
        case checkpoint_schedule::ema: weights.push_back(std::pow(options.decay, n - 1 - x)); break;
        case checkpoint_schedule::wsm:
            weights.push_back(decayed(options.shape, x / n) - decayed(options.shape, (x + 1) / n));
            break;
        }
        sum += weights.back();
    }
    for (double& weight : weights) { weight /= sum; }
    return weights;
}

} // namespace detail

/// The weights of `count` checkpoints, the oldest first; their sum is 1 up to rounding. Errors: invalid_argument unless
/// 0 < decay ≤ 1.
///
///     const auto weights = checkpoint_weights({.schedule = checkpoint_schedule::ema, .decay = 0.5}, 3); // (1, 2, 4) /
///     7
[[nodiscard]] inline std::vector<double> checkpoint_weights(
    const checkpoint_average_options& options, std::size_t count)
{
    const auto weights = detail::weights_of_checkpoints(options, count);
    return {weights.begin(), weights.end()};
}

template <>
class method<checkpoint_average_options> : public method<average_options> {
public:
    template <class Passes>
    method(Passes& passes, const checkpoint_average_options& options)
        : method<average_options>(passes, detail::weights_of_checkpoints(options, passes.tasks()), true)
    { }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MODEL_MERGE(extern, checkpoint_average_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
