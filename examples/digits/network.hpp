// The network of the digits example: 64 → 128 → 512 with ReLU and biases (the encoder), then a 10 × 512 head.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "data.hpp"

#include <taskvec/core/policy.hpp>
#include <taskvec/core/tensor_ref.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace digits {

inline constexpr int hidden = 128, features = 512;

/// What the library computes with here: nothing runs in parallel.
inline const taskvec::cpu one_thread{.threads = 1};

/// The encoder's parameters: what is fine-tuned, merged and stored. One flat buffer that holds fc1.bias (128),
/// fc1.weight (128 × 64), fc2.bias (512) and fc2.weight (512 × 128), in this order (by name), each row-major.
class encoder {
public:
    using map = Eigen::Map<matrix>;
    using const_map = Eigen::Map<const matrix>;
    using vector_map = Eigen::Map<Eigen::RowVectorXf>;
    using const_vector_map = Eigen::Map<const Eigen::RowVectorXf>;

    encoder()
        : values_(size())
    { }

    [[nodiscard]] static constexpr std::size_t size() { return second_weight + std::size_t{features} * hidden; }

    [[nodiscard]] std::span<float> values() { return values_; }
    [[nodiscard]] std::span<const float> values() const { return values_; }

    [[nodiscard]] vector_map bias1() { return {values_.data(), hidden}; }
    [[nodiscard]] const_vector_map bias1() const { return {values_.data(), hidden}; }
    [[nodiscard]] map weight1() { return {values_.data() + first_weight, hidden, pixels}; }
    [[nodiscard]] const_map weight1() const { return {values_.data() + first_weight, hidden, pixels}; }
    [[nodiscard]] vector_map bias2() { return {values_.data() + second_bias, features}; }
    [[nodiscard]] const_vector_map bias2() const { return {values_.data() + second_bias, features}; }
    [[nodiscard]] map weight2() { return {values_.data() + second_weight, features, hidden}; }
    [[nodiscard]] const_map weight2() const { return {values_.data() + second_weight, features, hidden}; }

    /// The parameters as named tensors, without a copy.
    [[nodiscard]] taskvec::model_ref model();
    [[nodiscard]] taskvec::const_model_ref model() const;

private:
    static constexpr std::size_t first_weight = hidden, second_bias = first_weight + std::size_t{hidden} * pixels,
                                 second_weight = second_bias + features;
    std::vector<float> values_;
};

/// Encoder and head. The head is trained in pre-training and frozen afterwards, so all models share it.
struct network {
    encoder body;
    matrix head = matrix::Zero(classes, features);
};

/// He initialisation of the encoder, biases 0, N(0, 1/512) for the head.
network random_network(std::uint64_t seed);

/// What a forward pass leaves for the backward pass (and for statistics of the layers' inputs).
struct activations {
    matrix hidden, features, logits;
};

/// One row for each example.
activations forward(const encoder& body, const matrix& head, const matrix& inputs);

/// Gradient of the logits: (softmax − one-hot) / examples, of the mean cross-entropy.
matrix cross_entropy_gradient(const matrix& logits, const std::vector<int>& labels);

/// Mean cross-entropy over the examples.
double cross_entropy(const matrix& logits, const std::vector<int>& labels);

/// Adds nothing, overwrites `gradient`: the mean cross-entropy's gradient by every parameter. The head's part only when
/// `with_head`.
void backward(const network& model, const dataset& batch, network& gradient, bool with_head);
/// The same from a gradient by the logits of a forward pass.
void backward(const network& model, const matrix& inputs, const activations& out, const matrix& by_logits,
    network& gradient, bool with_head);

/// Share of the examples whose largest logit is their label's.
double accuracy(const matrix& logits, const std::vector<int>& labels);
double accuracy(const encoder& body, const matrix& head, const dataset& examples);

} // namespace digits
