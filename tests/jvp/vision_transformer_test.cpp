// The network of examples/vit: its vjp against its jvp, in each of the ways in which it is trained.
// SPDX-License-Identifier: Apache-2.0
#include "../../examples/vit/vision_transformer.hpp"

#include <taskvec/jvp/linearize.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using eigen_matrix = row_matrix<double>;
using reference::random_matrix;

namespace {
const vit::shape tiny_shape{
    .image_side = 4, .patch_side = 2, .width = 6, .hidden = 10, .heads = 2, .blocks = 2, .classes = 3};
const eigen_matrix x = vit::patches(random_matrix(3, 16, 1), tiny_shape);

parameters<double> random_like(const parameters<double>& p, const std::vector<std::string>& names, std::uint64_t seed)
{
    parameters<double> v;
    for (const auto& name : names) { v.insert(name, random_matrix(p[name].rows(), p[name].cols(), seed++, 0.3)); }
    return v;
}
double inner(const parameters<double>& a, const parameters<double>& b)
{
    double sum = 0;
    for (const auto& [name, value] : b) { sum += (a[name].array() * value.array()).sum(); }
    return sum;
}
std::vector<std::string> names_of(const parameters<double>& p)
{
    std::vector<std::string> names;
    for (const auto& [name, value] : p) { names.push_back(name); }
    return names;
}
} // namespace

TEST_CASE("patches of an image follow each other row by row")
{
    eigen_matrix image(1, 16);
    for (Eigen::Index i = 0; i < 16; ++i) { image(0, i) = static_cast<double>(i); }
    const eigen_matrix p = vit::patches(image, tiny_shape);
    CHECK(p.row(0) == Eigen::RowVector4d(0, 1, 4, 5));
    CHECK(p.row(3) == Eigen::RowVector4d(10, 11, 14, 15));
}

TEST_CASE("all parameters: ⟨dy, J·v⟩ = ⟨Jᵀ·dy, v⟩ and J·v against differences")
{
    const vit::network<double> net{.shape = tiny_shape};
    const auto p = vit::initial_parameters<double>(tiny_shape, 1);
    const auto f = [&](const auto& q) { return vit::logits(net, q, x); };
    const auto v = random_like(p, names_of(p), 5);
    const auto [y, dy] = jvp(f, p, v);
    auto up = p, down = p;
    for (const auto& [name, direction] : v) {
        up[name] += 1e-5 * direction;
        down[name] -= 1e-5 * direction;
    }
    CHECK(reference::largest_difference(dy, eigen_matrix((f(up) - f(down)) / 2e-5)) < 1e-7);
    vit::tape<double> record;
    CHECK(reference::largest_difference(vit::logits(net, p, x, &record), y) < 1e-12);
    const eigen_matrix cotangent = random_matrix(3, 3, 9);
    const auto gradients = vit::gradient(net, p, x, record, cotangent);
    CHECK(gradients.size() == p.size());
    CHECK(inner(gradients, v) == doctest::Approx((cotangent.array() * dy.array()).sum()).epsilon(1e-11));
}

TEST_CASE("adapters: LoRA's gradient, with and without the dense weights")
{
    const vit::network<double> net{.shape = tiny_shape, .scaling = 0.5};
    auto p = vit::initial_parameters<double>(tiny_shape, 1);
    std::vector<std::string> names;
    for (auto& [name, value] : vit::initial_adapters<double>(tiny_shape, {.rank = 2}, 3)) {
        names.push_back(name);
        p.insert(name, random_matrix(value.rows(), value.cols(), names.size()));
    }
    CHECK(names.size() == 8);
    const auto v = random_like(p, names, 5);
    const eigen_matrix dy = jvp([&](const auto& q) { return vit::logits(net, q, x); }, p, v).tangent,
                       cotangent = random_matrix(3, 3, 9);
    for (const bool dense : {false, true}) {
        vit::tape<double> record{.dense = dense};
        (void)vit::logits(net, p, x, &record);
        const auto gradients = vit::gradient(net, p, x, record, cotangent);
        CHECK(gradients.size() == (dense ? p.size() : names.size()));
        CHECK(inner(gradients, v) == doctest::Approx((cotangent.array() * dy.array()).sum()).epsilon(1e-11));
    }
}

TEST_CASE("a linearized network records the values at φ0, whatever tangents it carried")
{
    const vit::network<double> net{.shape = tiny_shape};
    const auto p = vit::initial_parameters<double>(tiny_shape, 1);
    vit::tape<double> plain, carried;
    (void)vit::logits(net, p, x, &plain);
    (void)jvp([&](const auto& q) { return vit::logits(net, q, x, &carried); }, p, random_like(p, names_of(p), 5));
    for (std::size_t b = 0; b < 2; ++b) {
        CHECK(reference::largest_difference(plain.blocks[b].q, carried.blocks[b].q) < 1e-13);
        CHECK(reference::largest_difference(plain.blocks[b].activated, carried.blocks[b].activated) < 1e-13);
    }
    CHECK(reference::largest_difference(plain.last, carried.last) < 1e-13);
}

TEST_CASE("per-layer linearized adapters: forward and gradients against differences")
{
    vit::network<double> net{.shape = tiny_shape, .scaling = 0.5};
    const auto p = vit::initial_parameters<double>(tiny_shape, 1);
    for (Eigen::Index b = 0; b < 2; ++b) {
        for (const char* projection : vit::adapted) {
            const std::string name = vit::block_name(b) + projection;
            // B0 is not zero here, so that A counts.
            net.linearized.insert(name,
                linearized_lora_layer<double>(p[name + ".weight"], p[name + ".bias"],
                    make_lora(random_matrix(6, 2, 5, 0.3), random_matrix(2, 6, 4), 0.5)));
            net.linearized[name].delta_a() = random_matrix(2, 6, 6, 0.3);
            net.linearized[name].b() += random_matrix(6, 2, 7, 0.3);
        }
    }
    vit::tape<double> record{.dense = false};
    const eigen_matrix y = vit::logits(net, p, x, &record), cotangent = random_matrix(3, 3, 9);
    const auto gradients = vit::gradient(net, p, x, record, cotangent);
    CHECK(gradients.size() == 8);
    for (auto& [name, layer] : net.linearized) {
        const eigen_matrix va = random_matrix(2, 6, 20), vb = random_matrix(6, 2, 21);
        const auto value = [&, &layer = layer](double a, double b) {
            layer.delta_a() += a * va;
            layer.b() += b * vb;
            const double result = (cotangent.array() * vit::logits(net, p, x).array()).sum();
            layer.delta_a() -= a * va;
            layer.b() -= b * vb;
            return result;
        };
        const double h = 1e-5;
        CHECK((gradients[name + ".lora_A"].array() * va.array()).sum()
            == doctest::Approx((value(h, 0) - value(-h, 0)) / (2 * h)).epsilon(1e-6));
        CHECK((gradients[name + ".lora_B"].array() * vb.array()).sum()
            == doctest::Approx((value(0, h) - value(0, -h)) / (2 * h)).epsilon(1e-6));
    }
}
