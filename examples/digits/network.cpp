// SPDX-License-Identifier: Apache-2.0
#include "network.hpp"

#include <taskvec/core/random.hpp>

#include <cmath>

namespace digits {
namespace {

void fill_normal(Eigen::Ref<matrix> weight, double deviation, std::uint64_t seed, std::string_view name)
{
    const taskvec::random_stream random(seed, 0, name);
    for (Eigen::Index i = 0; i < weight.rows(); ++i) {
        for (Eigen::Index j = 0; j < weight.cols(); ++j) {
            weight(i, j) =
                static_cast<float>(deviation * random.normal(static_cast<std::uint64_t>(i * weight.cols() + j)));
        }
    }
}

/// The gradient behind a ReLU: 0 where the output is 0.
void through_relu(matrix& gradient, const matrix& output)
{
    gradient.array() *= (output.array() > 0.0f).cast<float>();
}

template <class Encoder, class Ref>
taskvec::basic_model<Ref> named(Encoder& body)
{
    return {
        {"fc1.bias", Ref{body.bias1().data(), taskvec::dtype::f32, {hidden}}},
        {"fc1.weight", Ref{body.weight1().data(), taskvec::dtype::f32, {hidden, pixels}}},
        {"fc2.bias", Ref{body.bias2().data(), taskvec::dtype::f32, {features}}},
        {"fc2.weight", Ref{body.weight2().data(), taskvec::dtype::f32, {features, hidden}}},
    };
}

} // namespace

taskvec::model_ref encoder::model()
{
    return named<encoder, taskvec::tensor_ref>(*this);
}

taskvec::const_model_ref encoder::model() const
{
    return named<const encoder, taskvec::const_tensor_ref>(*this);
}

network random_network(std::uint64_t seed)
{
    network model;
    fill_normal(model.body.weight1(), std::sqrt(2.0 / pixels), seed, "fc1.weight");
    fill_normal(model.body.weight2(), std::sqrt(2.0 / hidden), seed, "fc2.weight");
    fill_normal(model.head, std::sqrt(1.0 / features), seed, "head.weight");
    return model;
}

activations forward(const encoder& body, const matrix& head, const matrix& inputs)
{
    activations out;
    out.hidden.noalias() = inputs * body.weight1().transpose();
    out.hidden = (out.hidden.rowwise() + body.bias1()).cwiseMax(0.0f);
    out.features.noalias() = out.hidden * body.weight2().transpose();
    out.features = (out.features.rowwise() + body.bias2()).cwiseMax(0.0f);
    out.logits.noalias() = out.features * head.transpose();
    return out;
}

matrix cross_entropy_gradient(const matrix& logits, const std::vector<int>& labels)
{
    matrix gradient = (logits.colwise() - logits.rowwise().maxCoeff()).array().exp();
    for (Eigen::Index i = 0; i < gradient.rows(); ++i) {
        gradient.row(i) /= gradient.row(i).sum();
        gradient(i, labels[static_cast<std::size_t>(i)]) -= 1.0f;
    }
    return gradient / static_cast<float>(gradient.rows());
}

double cross_entropy(const matrix& logits, const std::vector<int>& labels)
{
    double sum = 0;
    for (Eigen::Index i = 0; i < logits.rows(); ++i) {
        const Eigen::Array<double, 1, classes> row = logits.row(i).cast<double>();
        sum += std::log((row - row.maxCoeff()).exp().sum()) + row.maxCoeff() - row(labels[static_cast<std::size_t>(i)]);
    }
    return sum / static_cast<double>(labels.size());
}

void backward(const network& model, const dataset& batch, network& gradient, bool with_head)
{
    const activations out = forward(model.body, model.head, batch.inputs);
    backward(model, batch.inputs, out, cross_entropy_gradient(out.logits, batch.labels), gradient, with_head);
}

void backward(const network& model, const matrix& inputs, const activations& out, const matrix& by_logits,
    network& gradient, bool with_head)
{
    if (with_head) { gradient.head.noalias() = by_logits.transpose() * out.features; }

    matrix second;
    second.noalias() = by_logits * model.head;
    through_relu(second, out.features);
    gradient.body.weight2().noalias() = second.transpose() * out.hidden;
    gradient.body.bias2() = second.colwise().sum();

    matrix first;
    first.noalias() = second * model.body.weight2();
    through_relu(first, out.hidden);
    gradient.body.weight1().noalias() = first.transpose() * inputs;
    gradient.body.bias1() = first.colwise().sum();
}

double accuracy(const matrix& logits, const std::vector<int>& labels)
{
    std::size_t correct = 0;
    for (Eigen::Index i = 0; i < logits.rows(); ++i) {
        Eigen::Index best = 0;
        logits.row(i).maxCoeff(&best);
        correct += best == labels[static_cast<std::size_t>(i)];
    }
    return static_cast<double>(correct) / static_cast<double>(labels.size());
}

double accuracy(const encoder& body, const matrix& head, const dataset& examples)
{
    return accuracy(forward(body, head, examples.inputs).logits, examples.labels);
}

} // namespace digits
