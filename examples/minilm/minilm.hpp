// all-MiniLM-L6-v2, a sentence encoder of 22.7 million parameters (BERT, 6 layers of width 384), on the library's
// operations: one forward function for values and for tangents, and its vjp; LoRA and linearized LoRA on its attention.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../transformer.hpp"

#include <taskvec/core/random.hpp>
#include <taskvec/jvp/attention.hpp>
#include <taskvec/jvp/elementwise.hpp>
#include <taskvec/jvp/embedding.hpp>
#include <taskvec/jvp/jvp.hpp>
#include <taskvec/jvp/linear.hpp>
#include <taskvec/jvp/linearized_lora.hpp>
#include <taskvec/jvp/lora_layer.hpp>
#include <taskvec/jvp/loss.hpp>
#include <taskvec/jvp/normalization.hpp>
#include <taskvec/jvp/parameters.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace minilm {

using taskvec::parameters;
using taskvec::row_matrix;

/// What config.json says.
struct shape {
    Eigen::Index vocabulary = 30522, positions = 512, width = 384, hidden = 1536, heads = 12, layers = 6;
    double epsilon = 1e-12; ///< of every layer_norm
};

/// Token ids of texts of one length, text after text: what the tokenizer gives, [CLS] first and [SEP] last.
struct batch {
    std::vector<std::int64_t> ids;
    Eigen::Index length = 0; ///< ids of each text

    [[nodiscard]] Eigen::Index texts() const { return static_cast<Eigen::Index>(ids.size()) / length; }
};

/// Throws invalid_argument: no ids, lengths that do not fit, a text of more than `positions` ids, an id outside the
/// vocabulary.
inline void check(const shape& s, const batch& b)
{
    using namespace taskvec;
    if (b.ids.empty() || b.length < 1 || static_cast<Eigen::Index>(b.ids.size()) % b.length != 0) {
        raise<invalid_argument>(error_code::inputs_empty,
            message(b.ids.size(), " token ids are no texts of ", b.length, " ids: give each text as many"));
    }
    if (b.length > s.positions) {
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("a text has ", b.length, " token ids; the model has positions for ", s.positions,
                ": cut the text, as the tokenizer's truncation does"));
    }
    for (std::size_t i = 0; i < b.ids.size(); ++i) {
        if (b.ids[i] < 0 || b.ids[i] >= s.vocabulary) {
            raise<invalid_argument>(error_code::index_out_of_range,
                message("token id ", b.ids[i], " at place ", i, " is outside the vocabulary of ", s.vocabulary,
                    ": is this the tokenizer of the model?"));
        }
    }
}

/// LoRA on the query and value projections of every layer, as the second paper has it and as PEFT does by default.
inline constexpr const char* adapted[] = {"query", "value"};

inline std::string layer_name(Eigen::Index layer)
{
    return "encoder.layer." + std::to_string(layer) + ".";
}

/// "encoder.layer.0.attention.self.query"
inline std::string projection_name(Eigen::Index layer, const char* name)
{
    return layer_name(layer) + "attention.self." + name;
}

/// The network: its shape, and the per-layer linearized adapters where there are any (they then replace lora_A and
/// lora_B of the parameters).
template <class T>
struct network {
    minilm::shape shape{};
    double scaling = 1;
    taskvec::named_values<taskvec::linearized_lora_layer<T>> linearized{}; ///< by projection_name()
};

/// A0 ~ N(0, 1/in), B0 = 0 for every adapted projection: PROJECTION.lora_A and PROJECTION.lora_B.
template <class T>
parameters<T> initial_adapters(const shape& s, Eigen::Index rank, std::uint64_t seed)
{
    parameters<T> p;
    for (Eigen::Index layer = 0; layer < s.layers; ++layer) {
        for (const char* name : adapted) {
            const std::string prefix = projection_name(layer, name);
            transformer::insert_adapter(p, prefix, s.width, rank, taskvec::random_stream(seed, 0, prefix));
        }
    }
    return p;
}

/// What the vjp needs of a forward pass: values only, whatever the forward pass carried.
template <class T>
struct tape {
    bool dense = true; ///< for gradients of the dense weights too
    struct layer {
        row_matrix<T> input, q, k, v, mixed, attended, middle, up, activated, output;
    };
    row_matrix<T> embedded{};
    std::vector<layer> layers{};
};

/// Of each token, its place in its text.
inline std::vector<std::int64_t> positions_of(const batch& b)
{
    std::vector<std::int64_t> all(b.ids.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
        all[i] = static_cast<std::int64_t>(i) % static_cast<std::int64_t>(b.length);
    }
    return all;
}

/// Mean of the last layer's token vectors, texts × width: the sentence embedding, before normalized(). `p` is
/// parameters<T> or active_parameters<T> (under jvp() and linearize()), by the names of the model's file. Throws as
/// check().
template <class T, class P>
auto embed(const network<T>& net, const P& p, const batch& b, tape<T>* record = nullptr)
{
    using namespace taskvec;
    const shape& s = net.shape;
    check(s, b);
    const attention_options heads{.batch = b.texts(), .heads = s.heads};
    const normalization_options eps{.epsilon = s.epsilon};
    const auto norm = [&](const std::string& name, const auto& input) {
        return layer_norm(input, p[name + ".weight"], p[name + ".bias"], eps);
    };
    const auto dense = [&](const std::string& name, const auto& input) {
        return linear(input, p[name + ".weight"], p[name + ".bias"]);
    };
    if (record) { record->layers.resize(static_cast<std::size_t>(s.layers)); }
    // Every token is of the first type.
    auto embedded = add(add(embedding(p["embeddings.word_embeddings.weight"], b.ids),
                            embedding(p["embeddings.position_embeddings.weight"], positions_of(b))),
        embedding(p["embeddings.token_type_embeddings.weight"], std::vector<std::int64_t>(b.ids.size(), 0)));
    auto stream = norm("embeddings.LayerNorm", embedded);
    if (record) { record->embedded = transformer::values(std::move(embedded)); }
    for (Eigen::Index i = 0; i < s.layers; ++i) {
        const std::string layer = layer_name(i);
        auto q = transformer::project(net, p, projection_name(i, "query"), stream);
        auto k = dense(projection_name(i, "key"), stream);
        auto v = transformer::project(net, p, projection_name(i, "value"), stream);
        auto mixed = attention(q, k, v, heads);
        auto attended = add(stream, dense(layer + "attention.output.dense", mixed));
        auto middle = norm(layer + "attention.output.LayerNorm", attended);
        auto up = dense(layer + "intermediate.dense", middle);
        auto activated = gelu(up);
        auto output = add(middle, dense(layer + "output.dense", activated));
        auto next = norm(layer + "output.LayerNorm", output);
        if (record) {
            auto& kept = record->layers[static_cast<std::size_t>(i)];
            kept.input = transformer::values(std::move(stream));
            kept.q = transformer::values(std::move(q));
            kept.k = transformer::values(std::move(k));
            kept.v = transformer::values(std::move(v));
            kept.attended = transformer::values(std::move(attended));
            kept.up = transformer::values(std::move(up));
            kept.output = transformer::values(std::move(output));
            if (record->dense) {
                kept.mixed = transformer::values(std::move(mixed));
                kept.middle = transformer::values(std::move(middle));
                kept.activated = transformer::values(std::move(activated));
            }
        }
        stream = std::move(next);
    }
    return mean_rows(stream, b.length);
}

/// Each row over its length: what sentence-transformers returns.
template <class T>
row_matrix<T> normalized(row_matrix<T> embeddings)
{
    embeddings.rowwise().normalize();
    return embeddings;
}

/// The vjp of embed() at the values on the tape: gradients of the dense parameters (if the tape is dense) and of the
/// adapters' factors (those of `p`, or of the per-layer linearized adapters). `d_embedding` is texts × width.
template <class T>
parameters<T> gradient(const network<T>& net, const parameters<T>& p, const batch& b, const tape<T>& record,
    const row_matrix<T>& d_embedding)
{
    using namespace taskvec;
    const shape& s = net.shape;
    const attention_options heads{.batch = b.texts(), .heads = s.heads};
    const bool dense = record.dense;
    transformer::backward_pass<T, network<T>> back(net, p, dense, {.epsilon = s.epsilon});
    row_matrix<T> d_stream = mean_rows_vjp(d_embedding, b.length);
    for (Eigen::Index i = s.layers; i-- > 0;) {
        const std::string layer = layer_name(i);
        const auto& kept = record.layers[static_cast<std::size_t>(i)];
        const row_matrix<T> d_output = back.norm(layer + "output.LayerNorm", kept.output, d_stream);
        const row_matrix<T> d_up = gelu_vjp(kept.up, back.linear(layer + "output.dense", kept.activated, d_output));
        const row_matrix<T> d_middle = d_output + back.linear(layer + "intermediate.dense", kept.middle, d_up);
        const row_matrix<T> d_attended = back.norm(layer + "attention.output.LayerNorm", kept.attended, d_middle);
        const auto d_attention = attention_vjp(
            kept.q, kept.k, kept.v, back.linear(layer + "attention.output.dense", kept.mixed, d_attended), heads);
        const bool further = i > 0 || dense; // is anything trained below?
        const row_matrix<T> by_query = back.projection(projection_name(i, "query"), kept.input, d_attention.q, further);
        const row_matrix<T> by_value = back.projection(projection_name(i, "value"), kept.input, d_attention.v, further);
        if (!further) { return std::move(back.gradients); }
        d_stream = d_attended + by_query + by_value;
        d_stream += back.linear(projection_name(i, "key"), kept.input, d_attention.k);
    }
    const row_matrix<T> d_embedded = back.norm("embeddings.LayerNorm", record.embedded, d_stream);
    back.gradients.insert("embeddings.word_embeddings.weight", embedding_vjp(d_embedded, b.ids, s.vocabulary));
    back.gradients.insert(
        "embeddings.position_embeddings.weight", embedding_vjp(d_embedded, positions_of(b), s.positions));
    back.gradients.insert("embeddings.token_type_embeddings.weight",
        embedding_vjp(d_embedded, std::vector<std::int64_t>(b.ids.size(), 0),
            p["embeddings.token_type_embeddings.weight"].rows()));
    return std::move(back.gradients);
}

} // namespace minilm
