// A small vision transformer on the library's operations: one forward function for values and for tangents, and its
// vjp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

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
            auto& a = p.insert(prefix + ".lora_A", row_matrix<T>(adapter.rank, s.width));
            const taskvec::random_stream stream(seed, 1, prefix);
            for (Eigen::Index i = 0; i < a.size(); ++i) {
                a.data()[i] = static_cast<T>(
                    stream.normal(static_cast<std::uint64_t>(i)) / std::sqrt(static_cast<double>(s.width)));
            }
            p.insert(prefix + ".lora_B", row_matrix<T>::Zero(s.width, adapter.rank));
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

namespace detail {
template <class T>
row_matrix<T> values(row_matrix<T>&& x)
{
    return std::move(x);
}
template <class T>
row_matrix<T> values(taskvec::primal_tangent<T>&& x)
{
    return std::move(x).take_primal();
}

template <class T, class P, class X>
auto project(const network<T>& net, const P& p, const std::string& name, const X& x)
    -> decltype(taskvec::linear(x, p[name], p[name]))
{
    if (const auto* layer = net.linearized.find(name)) {
        if constexpr (std::same_as<X, row_matrix<T>>) { return layer->forward(x); }
        else {
            // Linear in φ already: a network of these layers is differentiated in its input only.
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                "per-layer linearized adapters do not mix with a linearized network");
        }
    }
    if (p.contains(name + ".lora_A")) {
        return taskvec::lora_linear(x, p[name + ".weight"], p[name + ".bias"], p[name + ".lora_A"], p[name + ".lora_B"],
            static_cast<T>(net.scaling));
    }
    return taskvec::linear(x, p[name + ".weight"], p[name + ".bias"]);
}
} // namespace detail

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
        auto q = detail::project(net, p, block + "query", normed1);
        auto k = dense(block + "key", normed1);
        auto v = detail::project(net, p, block + "value", normed1);
        auto mixed = attention(q, k, v, heads);
        auto middle = add(stream, dense(block + "out", mixed));
        auto normed2 = norm(block + "norm2", middle);
        auto up = dense(block + "up", normed2);
        auto activated = gelu(up);
        auto next = add(middle, dense(block + "down", activated));
        if (record) {
            auto& kept = record->blocks[static_cast<std::size_t>(b)];
            kept.input = detail::values(std::move(stream));
            kept.normed1 = detail::values(std::move(normed1));
            kept.q = detail::values(std::move(q));
            kept.k = detail::values(std::move(k));
            kept.v = detail::values(std::move(v));
            kept.middle = detail::values(std::move(middle));
            kept.up = detail::values(std::move(up));
            if (record->dense) {
                kept.mixed = detail::values(std::move(mixed));
                kept.normed2 = detail::values(std::move(normed2));
                kept.activated = detail::values(std::move(activated));
            }
        }
        stream = std::move(next);
    }
    auto pooled = mean_rows(norm("norm", stream), s.tokens());
    auto y = dense("head", pooled);
    if (record) {
        record->last = detail::values(std::move(stream));
        record->pooled = detail::values(std::move(pooled));
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
    parameters<T> gradients;
    // The gradient of a linear layer's input; its parameters' are stored.
    const auto linear_back = [&](const std::string& name, const row_matrix<T>& input, const row_matrix<T>& dy,
                                 bool input_wanted = true) {
        auto g = input.size() != 0
            ? linear_vjp(input, p[name + ".weight"], dy, {.x = input_wanted, .w = dense, .bias = dense})
            : linear_gradient<T>{matmul(dy, p[name + ".weight"]), {}, {}};
        if (dense) {
            gradients.insert(name + ".weight", std::move(g.w));
            gradients.insert(name + ".bias", std::move(g.bias));
        }
        return std::move(g.x);
    };
    const auto norm_back = [&](const std::string& name, const row_matrix<T>& input, const row_matrix<T>& dy) {
        auto g = layer_norm_vjp(input, p[name + ".weight"], dy);
        if (dense) {
            gradients.insert(name + ".weight", std::move(g.gamma));
            gradients.insert(name + ".bias", std::move(g.beta));
        }
        return std::move(g.x);
    };
    const auto adapted_back = [&](const std::string& name, const row_matrix<T>& input, const row_matrix<T>& dy,
                                  bool input_wanted) {
        const auto low_rank_back = [&](const auto& layer, const row_matrix<T>& hidden) {
            auto g = layer.vjp(input, hidden, dy, {.x = input_wanted});
            gradients.insert(name + ".lora_A", std::move(g.a));
            gradients.insert(name + ".lora_B", std::move(g.b));
            return std::move(g.x);
        };
        // scaling·x·aᵀ is cheap to compute again.
        if (const auto* layer = net.linearized.find(name)) {
            const auto& folded = layer->fold();
            return low_rank_back(
                *layer, scale(linear(input, taskvec::as_row_matrix(folded.a)), static_cast<T>(folded.scaling)));
        }
        if (!p.contains(name + ".lora_A")) { return linear_back(name, input, dy, input_wanted); }
        if (dense) {
            auto g = linear_vjp(input, p[name + ".weight"], dy, {.x = false});
            gradients.insert(name + ".weight", std::move(g.w));
            gradients.insert(name + ".bias", std::move(g.bias));
        }
        const lora_layer<T> layer(p[name + ".weight"], p[name + ".bias"],
            taskvec::make_lora(p[name + ".lora_B"], p[name + ".lora_A"], net.scaling));
        return low_rank_back(layer, scale(linear(input, layer.a()), static_cast<T>(layer.adapter().scaling)));
    };

    row_matrix<T> d_stream =
        norm_back("norm", record.last, mean_rows_vjp(linear_back("head", record.pooled, d_logits), s.tokens()));
    for (Eigen::Index b = s.blocks; b-- > 0;) {
        const std::string block = block_name(b);
        const auto& kept = record.blocks[static_cast<std::size_t>(b)];
        const row_matrix<T> d_up = gelu_vjp(kept.up, linear_back(block + "down", kept.activated, d_stream));
        d_stream += norm_back(block + "norm2", kept.middle, linear_back(block + "up", kept.normed2, d_up));
        const auto d_attention =
            attention_vjp(kept.q, kept.k, kept.v, linear_back(block + "out", kept.mixed, d_stream), heads);
        const bool further = b > 0 || dense; // is anything trained below?
        row_matrix<T> d_normed = adapted_back(block + "query", kept.normed1, d_attention.q, further);
        const row_matrix<T> from_value = adapted_back(block + "value", kept.normed1, d_attention.v, further);
        if (!further) { break; }
        d_normed += from_value;
        d_normed += linear_back(block + "key", kept.normed1, d_attention.k);
        d_stream += norm_back(block + "norm1", kept.input, d_normed);
    }
    if (dense) {
        gradients.insert("positions", add_bias_vjp(d_stream, s.tokens()));
        (void)linear_back("embed", x, d_stream, false);
    }
    return gradients;
}

} // namespace vit
