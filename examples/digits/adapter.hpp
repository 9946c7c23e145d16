// LoRA adapters of the digits network: two factor pairs, their training, and the encoders that they make.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "train.hpp"

#include <taskvec/core/tensor_ref.hpp>

#include <span>
#include <vector>

namespace digits {

inline constexpr int rank = 32;

/// φ, an adapter's parameters: for each weight W (out × in) the factors A (rank × in) and B (out × rank) of W + B·A.
/// One flat buffer that holds fc1.lora_A, fc1.lora_B, fc2.lora_A and fc2.lora_B, in this order, each row-major.
class adapter {
public:
    using map = Eigen::Map<matrix>;
    using const_map = Eigen::Map<const matrix>;

    adapter()
        : values_(size())
    { }

    [[nodiscard]] static constexpr std::size_t size() { return second_b + std::size_t{features} * rank; }

    [[nodiscard]] std::span<float> values() { return values_; }
    [[nodiscard]] std::span<const float> values() const { return values_; }

    [[nodiscard]] map a1() { return {values_.data(), rank, pixels}; }
    [[nodiscard]] const_map a1() const { return {values_.data(), rank, pixels}; }
    [[nodiscard]] map b1() { return {values_.data() + first_b, hidden, rank}; }
    [[nodiscard]] const_map b1() const { return {values_.data() + first_b, hidden, rank}; }
    [[nodiscard]] map a2() { return {values_.data() + second_a, rank, hidden}; }
    [[nodiscard]] const_map a2() const { return {values_.data() + second_a, rank, hidden}; }
    [[nodiscard]] map b2() { return {values_.data() + second_b, features, rank}; }
    [[nodiscard]] const_map b2() const { return {values_.data() + second_b, features, rank}; }

    /// The parameters as named tensors, without a copy.
    [[nodiscard]] taskvec::model_ref model();
    [[nodiscard]] taskvec::const_model_ref model() const;

private:
    static constexpr std::size_t first_b = std::size_t{rank} * pixels, second_a = first_b + std::size_t{hidden} * rank,
                                 second_b = second_a + std::size_t{rank} * hidden;
    std::vector<float> values_;
};

/// φ0, which all tasks share: A ~ N(0, 0.3²/in), B = 0, so that the adapted network starts as the base.
adapter initial_adapter(std::uint64_t seed);

/// How the factors make a weight: plain LoRA, W + B·A; or L-LoRA in its per-layer reading, where each layer is linear
/// in its own factors around φ0: W + B0·A0 + B0·(A − A0) + (B − B0)·A0.
enum class parameterisation { lora, linearized };

/// The encoder with the adapter folded in.
encoder adapted(const network& base, const adapter& initial, const adapter& phi, parameterisation kind);

/// The adapter fine-tuned on one task by SGD with momentum, the gradient clipped to norm 0.3; everything else is
/// frozen.
adapter fine_tune_adapter(const network& base, const adapter& initial, const dataset& train, std::uint64_t seed,
    std::string_view task, parameterisation kind, const training_options& options = {.steps = 150, .rate = 0.5});

} // namespace digits
