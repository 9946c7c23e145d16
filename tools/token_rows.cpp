// Tensors with a row for each token of a vocabulary.
// SPDX-License-Identifier: Apache-2.0
#include "token_rows.hpp"

#include <taskvec/core/dtype.hpp>

#include <algorithm>
#include <type_traits>

namespace tool {

namespace {

bool ends_as_a_name(std::string_view name, std::string_view ending)
{
    return name.ends_with(ending) && (name.size() == ending.size() || name[name.size() - ending.size() - 1] == '.');
}

} // namespace

bool has_rows_of_tokens(std::string_view name)
{
    for (const std::string_view ending :
        {"embed_tokens.weight", "embed_tokens_per_layer.weight", "wte.weight", "word_embeddings.weight",
            "tok_embeddings.weight", "embed_in.weight", "shared.weight", "token_embedding.weight", "token_embd.weight",
            "tokens_embed.weight", "word_embedding.weight", "lm_loss.weight", "lm_loss.bias", "pred_layer.proj.weight",
            "pred_layer.proj.bias", "output_projection.weight", "lm_head.weight", "lm_head.bias",
            "lm_head.decoder.weight", "lm_head.decoder.bias", "embed_out.weight", "predictions.decoder.weight",
            "predictions.decoder.bias", "predictions.bias"}) {
        if (ends_as_a_name(name, ending)) { return true; }
    }
    return name == "output.weight" || name == "model.output.weight" || name == "decoder.weight"
        || name == "decoder.bias";
}

bool same_but_tokens(std::string_view name, const taskvec::extents& a, const taskvec::extents& b)
{
    if (a == b) { return true; }
    if (is_row_of_tokens(name, a) && is_row_of_tokens(name, b)) { return true; }
    return !a.empty() && a.size() == b.size() && std::equal(a.begin() + 1, a.end(), b.begin() + 1)
        && has_rows_of_tokens(name);
}

bool is_row_of_tokens(std::string_view name, const taskvec::extents& shape)
{
    return shape.size() == 2 && shape[0] == 1 && ends_as_a_name(name, "final_logits_bias");
}

bool is_of_tokens(std::string_view name, const taskvec::extents& shape)
{
    return has_rows_of_tokens(name) || is_row_of_tokens(name, shape);
}

taskvec::const_tensor_ref by_tokens(std::string_view name, taskvec::const_tensor_ref tensor)
{
    if (is_row_of_tokens(name, tensor.shape)) { tensor.shape.erase(tensor.shape.begin()); }
    return tensor;
}

std::uint64_t rows_of(std::string_view name, const taskvec::const_tensor_ref& tensor)
{
    if (tensor.shape.empty()) { return 0; }
    return static_cast<std::uint64_t>(tensor.shape[is_row_of_tokens(name, tensor.shape) ? 1 : 0]);
}

std::uint64_t row_length(const taskvec::extents& shape)
{
    return taskvec::element_count(taskvec::extents(shape.begin() + 1, shape.end()));
}

repeated_row::repeated_row(std::uint64_t columns)
    : columns_(std::max<std::uint64_t>(columns, 1))
{ }

repeated_row::repeated_row(std::uint64_t columns, const taskvec::operand_source& of, std::uint64_t rows)
    : columns_(std::max<std::uint64_t>(columns, 1))
    , rows_(rows)
    , of_(&of)
{ }

taskvec::dtype repeated_row::type() const noexcept
{
    return of_ ? of_->type() : taskvec::dtype::f32;
}

void repeated_row::read(std::uint64_t offset, std::size_t count, void* out) const
{
    const bool wide = type() == taskvec::dtype::f64;
    std::call_once(once_, [&] { wide ? work_out<double>() : work_out<float>(); });
    const auto copy = [&](auto* to) {
        for (std::size_t i = 0; i < count; ++i) {
            to[i] = static_cast<std::remove_reference_t<decltype(*to)>>(
                row_[static_cast<std::size_t>((offset + i) % columns_)]);
        }
    };
    wide ? copy(static_cast<double*>(out)) : copy(static_cast<float*>(out));
}

template <class A>
void repeated_row::work_out() const
{
    row_.assign(static_cast<std::size_t>(columns_), 0.0);
    if (!of_) { return; }
    constexpr std::uint64_t at_once = 1 << 16; // elements
    const auto step = std::max<std::uint64_t>(1, at_once / columns_);
    std::vector<A> part;
    for (std::uint64_t row = 0; row < rows_; row += step) {
        part.resize(static_cast<std::size_t>(std::min(step, rows_ - row) * columns_));
        of_->read(row * columns_, part.size(), part.data());
        for (std::size_t i = 0; i < part.size(); ++i) { row_[i % row_.size()] += static_cast<double>(part[i]); }
    }
    for (double& value : row_) { value /= static_cast<double>(rows_); }
}

} // namespace tool
