// The ways in which examples/vit is fine-tuned: gradients against central differences, training that learns, and what
// tells the two readings of L-LoRA apart.
// SPDX-License-Identifier: Apache-2.0
#include "../../examples/vit/paradigm.hpp"

#include "../reference/derivatives.hpp"

#include <vector>

using namespace taskvec;
using eigen_matrix = row_matrix<double>;
using reference::random_matrix;
using vit::paradigm;

namespace {
const vit::shape tiny_shape{
    .image_side = 4, .patch_side = 2, .width = 6, .hidden = 10, .heads = 2, .blocks = 2, .classes = 3};
const vit::adapter_shape adapter{.rank = 2, .scaling = 1.5};
const std::vector<int> labels{0, 1, 2, 1, 0, 2};
const eigen_matrix x = vit::patches(random_matrix(6, 16, 1), tiny_shape);
const auto base = vit::initial_parameters<double>(tiny_shape, 1);

vit::model<double> fresh(paradigm kind)
{
    return vit::model<double>(kind, tiny_shape, base, adapter, 7);
}
bool ends_with_a(const std::string& name)
{
    return name.ends_with(".lora_A");
}
/// Everything that is trained moves by `step` times a direction of its own; `wanted` says what.
template <class Wanted>
void move(vit::model<double>& model, double step, const Wanted& wanted, std::uint64_t seed = 40)
{
    for (const auto& name : model.trained_names()) {
        auto values = model.trained(name);
        const eigen_matrix direction = random_matrix(values.rows(), values.cols(), seed++);
        if (wanted(name)) { values += step * direction; }
    }
}
void move(vit::model<double>& model, double step, std::uint64_t seed = 40)
{
    move(model, step, [](const std::string&) { return true; }, seed);
}
double loss(const vit::model<double>& model)
{
    return cross_entropy(model.forward(x), labels);
}
} // namespace

TEST_CASE("every paradigm starts as the base model")
{
    const eigen_matrix expected = vit::logits(vit::network<double>{.shape = tiny_shape}, base, x);
    for (const auto kind : vit::paradigms) {
        CAPTURE(std::string(name(kind)));
        CHECK(reference::largest_difference(fresh(kind).forward(x), expected) < 1e-13);
    }
}

TEST_CASE("every paradigm: the loss's gradient against central differences, at the start and away from it")
{
    for (const auto kind : vit::paradigms) {
        CAPTURE(std::string(name(kind)));
        for (const double distance : {0.0, 0.2}) {
            CAPTURE(distance);
            auto model = fresh(kind);
            move(model, distance);
            const auto gradients = model.loss_gradient(x, labels);
            CHECK(gradients.size() == model.trained_names().size());
            double largest = 0;
            std::uint64_t seed = 60;
            for (const auto& name : model.trained_names()) {
                CAPTURE(name);
                const eigen_matrix direction = random_matrix(gradients[name].rows(), gradients[name].cols(), seed++);
                const double h = 1e-5;
                model.trained(name) += h * direction;
                const double up = loss(model);
                model.trained(name) -= 2 * h * direction;
                const double down = loss(model);
                model.trained(name) += h * direction;
                const double found = (gradients[name].array() * direction.array()).sum();
                CHECK(std::abs(found - (up - down) / (2 * h)) < 1e-7 * (1 + std::abs(found)));
                largest = std::max(largest, std::abs(found));
            }
            CHECK(largest > 1e-2);
        }
    }
}

TEST_CASE("every paradigm: training lowers the loss")
{
    for (const auto kind : vit::paradigms) {
        CAPTURE(std::string(name(kind)));
        auto model = fresh(kind);
        const double before = loss(model);
        for (int step = 0; step < 60; ++step) { model.update(model.loss_gradient(x, labels), 0.02); }
        CHECK(loss(model) < 0.8 * before);
    }
}

TEST_CASE("the first gradient of both kinds of L-LoRA is LoRA's; A's is exactly zero")
{
    const auto expected = fresh(paradigm::lora).loss_gradient(x, labels);
    for (const auto kind : {paradigm::linearized_lora_layers, paradigm::linearized_lora_network}) {
        CAPTURE(std::string(name(kind)));
        const auto found = fresh(kind).loss_gradient(x, labels);
        REQUIRE(found.size() == expected.size());
        for (const auto& [name, value] : expected) {
            CHECK(reference::largest_difference(found[name], value) < 1e-13);
            CHECK(value.isZero(0) == ends_with_a(name));
        }
    }
}

TEST_CASE("a linearized network is exactly linear in what is trained; per-layer linearized adapters are not")
{
    for (const auto kind : vit::paradigms) {
        CAPTURE(std::string(name(kind)));
        auto model = fresh(kind);
        const eigen_matrix start = model.forward(x);
        move(model, 0.3);
        const eigen_matrix one = model.forward(x) - start;
        move(model, 0.3);
        const eigen_matrix two = model.forward(x) - start;
        const double remainder = reference::largest_difference(two, eigen_matrix(2 * one)) / one.cwiseAbs().maxCoeff();
        const bool linear = kind == paradigm::full_linearized || kind == paradigm::linearized_lora_network;
        if (linear) { CHECK(remainder < 1e-12); }
        else {
            CHECK(remainder > 1e-3);
        }
    }
}

TEST_CASE("L-LoRA with B0 = 0: A has no influence in either reading; with A at its start the per-layer one is LoRA")
{
    const auto only_b = [](const std::string& name) { return !ends_with_a(name); };
    for (const auto kind : {paradigm::linearized_lora_layers, paradigm::linearized_lora_network}) {
        CAPTURE(std::string(name(kind)));
        auto b_moved = fresh(kind), both_moved = fresh(kind);
        move(b_moved, 0.3, only_b);
        move(both_moved, 0.3);
        CHECK(reference::largest_difference(both_moved.forward(x), b_moved.forward(x)) == 0);
    }
    auto lora = fresh(paradigm::lora), layers = fresh(paradigm::linearized_lora_layers),
         network = fresh(paradigm::linearized_lora_network);
    for (auto* model : {&lora, &layers, &network}) { move(*model, 0.3, only_b); }
    CHECK(reference::largest_difference(layers.forward(x), lora.forward(x)) < 1e-12);
    CHECK(reference::largest_difference(network.forward(x), lora.forward(x)) > 1e-3);
    move(lora, 0.3, ends_with_a);
    CHECK(reference::largest_difference(layers.forward(x), lora.forward(x)) > 1e-3);
}
