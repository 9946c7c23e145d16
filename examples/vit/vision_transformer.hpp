// A small vision transformer on the library's operations: one forward function for values and for tangents, and its
// vjp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../transformer.hpp"

#include <taskvec/core/random.hpp>
#include <taskvec/jvp/attention.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/linearized_lora.hpp>
#include <taskvec/jvp/loss.hpp>
#include <taskvec/jvp/parameters.hpp>

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace vit {

using taskvec::parameters;
using taskvec::row_matrix;

struct shape {
    Eigen::Index image_side = 8, patch_side = 2;
    Eigen::Index width = 64, hidden = 256, heads = 4, blocks = 2, classes = 10;

    [[nodiscard]] Eigen::Index tokens() const { return (image_side / patch_side) * (image_side / patch_side); }
    [[nodiscard]] Eigen::Index patch_size() const { return patch_side * patch_side; }
};

/// LoRA on the query and value projections of every block, as the paper has it.
inline constexpr const char* adapted[] = {"query", "value"};

struct adapter_shape {
    Eigen::Index rank = 8;
    double scaling = 1;
};

inline std::string block_name(Eigen::Index block)
{
    return "blocks." + std::to_string(block) + ".";
}

/// images × pixels to (images·tokens) × patch size: the patches of an image follow each other, row by row.
template <class T>
row_matrix<T> patches(const row_matrix<T>& images, const shape& s)
{
    const Eigen::Index per_side = s.image_side / s.patch_side;
    row_matrix<T> result(images.rows() * s.tokens(), s.patch_size());
    for (Eigen::Index row = 0; row < result.rows(); ++row) {
        const Eigen::Index image = row / s.tokens(), token = row % s.tokens();
        for (Eigen::Index i = 0; i < s.patch_size(); ++i) {
            const Eigen::Index y = token / per_side * s.patch_side + i / s.patch_side,
                               x = token % per_side * s.patch_side + i % s.patch_side;
            result(row, i) = images(image, y * s.image_side + x);
        }
    }
    return result;
}

/// Normal weights with variance 1 / inputs, zero biases; the same for the same seed.
template <class T>
parameters<T> initial_parameters(const shape& s, std::uint64_t seed)
{
    parameters<T> p;
    const auto normal = [&](const std::string& name, Eigen::Index rows, Eigen::Index cols, double deviation) {
        auto& values = p.insert(name, row_matrix<T>(rows, cols));
        const taskvec::random_stream stream(seed, 0, name);
        for (Eigen::Index i = 0; i < values.size(); ++i) {
            values.data()[i] = static_cast<T>(deviation * stream.normal(static_cast<std::uint64_t>(i)));
        }
    };
    const auto constant = [&](const std::string& name, Eigen::Index cols, double value) {
        p.insert(name, row_matrix<T>::Constant(1, cols, static_cast<T>(value)));
    };
    const auto linear = [&](const std::string& name, Eigen::Index out, Eigen::Index in) {
        normal(name + ".weight", out, in, 1 / std::sqrt(static_cast<double>(in)));
        constant(name + ".bias", out, 0);
    };
    linear("embed", s.width, s.patch_size());
    normal("positions", s.tokens(), s.width, 0.1);
    for (Eigen::Index b = 0; b < s.blocks; ++b) {
        const std::string block = block_name(b);
        for (const char* name : {"norm1", "norm2"}) {
            constant(block + name + ".weight", s.width, 1);
            constant(block + name + ".bias", s.width, 0);
        }
        for (const char* name : {"query", "key", "value", "out"}) { linear(block + name, s.width, s.width); }
        linear(block + "up", s.hidden, s.width);
        linear(block + "down", s.width, s.hidden);
    }
    constant("norm.weight", s.width, 1);
    constant("norm.bias", s.width, 0);
    linear("head", s.classes, s.width);
    return p;
}

/// A0 ~ N(0, 1/in), B0 = 0, as PEFT initialises, for every adapted projection.
template <class T>
parameters<T> initial_adapters(const shape& s, const adapter_shape& adapter, std::uint64_t seed)
{
    parameters<T> p;
    for (Eigen::Index b = 0; b < s.blocks; ++b) {
        for (const char* name : adapted) {
            const std::string prefix = block_name(b) + name;
            transformer::insert_adapter(p, prefix, s.width, adapter.rank, taskvec::random_stream(seed, 1, prefix));
        }
    }
    return p;
}

/// The network: its shape, and the per-layer linearized adapters where there are any (they then replace lora_A and
/// lora_B of the parameters).
template <class T>
struct network {
    vit::shape shape{};
    double scaling = 1;
    taskvec::named_values<taskvec::linearized_lora_layer<T>> linearized{}; ///< by projection: "blocks.0.query"
};

/// What the vjp needs of a forward pass: values only, whatever the forward pass carried.
template <class T>
struct tape {
    bool dense = true; ///< for gradients of the dense weights too
    struct block {
        row_matrix<T> input, normed1, q, k, v, mixed, middle, normed2, up, activated;
    };
    std::vector<block> blocks{};
    row_matrix<T> last{}, pooled{};
};

/// Logits, images × classes. `p` is parameters<T> or active_parameters<T> (under jvp() and linearize()); x holds
/// patches().
template <class T, class P>
auto logits(const network<T>& net, const P& p, const row_matrix<T>& x, tape<T>* record = nullptr)
{
    using namespace taskvec;
    const shape& s = net.shape;
    const attention_options heads{.batch = x.rows() / s.tokens(), .heads = s.heads};
    const auto dense = [&](const std::string& name, const auto& input) {
        return linear(input, p[name + ".weight"], p[name + ".bias"]);
    };
    const auto norm = [&](const std::string& name, const auto& input) {
        return layer_norm(input, p[name + ".weight"], p[name + ".bias"]);
    };
    if (record) { record->blocks.resize(static_cast<std::size_t>(s.blocks)); }
    auto stream = add_bias(dense("embed", x), p["positions"]);
    for (Eigen::Index b = 0; b < s.blocks; ++b) {
        const std::string block = block_name(b);
        auto normed1 = norm(block + "norm1", stream);
        auto q = transformer::project(net, p, block + "query", normed1);
        auto k = dense(block + "key", normed1);
        auto v = transformer::project(net, p, block + "value", normed1);
        auto mixed = attention(q, k, v, heads);
        auto middle = add(stream, dense(block + "out", mixed));
        auto normed2 = norm(block + "norm2", middle);
        auto up = dense(block + "up", normed2);
        auto activated = gelu(up);
        auto next = add(middle, dense(block + "down", activated));
        if (record) {
            auto& kept = record->blocks[static_cast<std::size_t>(b)];
            kept.input = transformer::values(std::move(stream));
            kept.normed1 = transformer::values(std::move(normed1));
            kept.q = transformer::values(std::move(q));
            kept.k = transformer::values(std::move(k));
            kept.v = transformer::values(std::move(v));
            kept.middle = transformer::values(std::move(middle));
            kept.up = transformer::values(std::move(up));
            if (record->dense) {
                kept.mixed = transformer::values(std::move(mixed));
                kept.normed2 = transformer::values(std::move(normed2));
                kept.activated = transformer::values(std::move(activated));
            }
        }
        stream = std::move(next);
    }
    auto pooled = mean_rows(norm("norm", stream), s.tokens());
    auto y = dense("head", pooled);
    if (record) {
        record->last = transformer::values(std::move(stream));
        record->pooled = transformer::values(std::move(pooled));
    }
    return y;
}

/// The vjp of logits() at the values on the tape: gradients of the dense parameters (if the tape is dense) and of the
/// adapters' factors (those of `p`, or of the per-layer linearized adapters).
template <class T>
parameters<T> gradient(const network<T>& net, const parameters<T>& p, const row_matrix<T>& x, const tape<T>& record,
    const row_matrix<T>& d_logits)
{
    using namespace taskvec;
    const shape& s = net.shape;
    const attention_options heads{.batch = x.rows() / s.tokens(), .heads = s.heads};
    const bool dense = record.dense;
    transformer::backward_pass<T, network<T>> back(net, p, dense);
    row_matrix<T> d_stream =
        back.norm("norm", record.last, mean_rows_vjp(back.linear("head", record.pooled, d_logits), s.tokens()));
    for (Eigen::Index b = s.blocks; b-- > 0;) {
        const std::string block = block_name(b);
        const auto& kept = record.blocks[static_cast<std::size_t>(b)];
        const row_matrix<T> d_up = gelu_vjp(kept.up, back.linear(block + "down", kept.activated, d_stream));
        d_stream += back.norm(block + "norm2", kept.middle, back.linear(block + "up", kept.normed2, d_up));
        const auto d_attention =
            attention_vjp(kept.q, kept.k, kept.v, back.linear(block + "out", kept.mixed, d_stream), heads);
        const bool further = b > 0 || dense; // is anything trained below?
        row_matrix<T> d_normed = back.projection(block + "query", kept.normed1, d_attention.q, further);
        const row_matrix<T> from_value = back.projection(block + "value", kept.normed1, d_attention.v, further);
        if (!further) { break; }
        d_normed += from_value;
        d_normed += back.linear(block + "key", kept.normed1, d_attention.k);
        d_stream += back.norm(block + "norm1", kept.input, d_normed);
    }
    if (dense) {
        back.gradients.insert("positions", add_bias_vjp(d_stream, s.tokens()));
        (void)back.linear("embed", x, d_stream, false);
    }
    return std::move(back.gradients);
}

} // namespace vit
