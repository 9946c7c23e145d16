// Tensors with a row for each token of a vocabulary: embeddings, heads and their biases.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/operand_source.hpp>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string_view>
#include <vector>

namespace tool {

/// Whether a tensor of this name has a row for each token: input embeddings, and heads with their biases.
[[nodiscard]] bool has_rows_of_tokens(std::string_view name);
/// Whether two shapes are the same, or differ by the rows of tokens alone (of a bias 1×V, by its entries).
[[nodiscard]] bool same_but_tokens(std::string_view name, const taskvec::extents& a, const taskvec::extents& b);
/// Whether a tensor of this name and shape is one row of an entry for each token, 1×V: BART's bias of the logits.
[[nodiscard]] bool is_row_of_tokens(std::string_view name, const taskvec::extents& shape);
/// Whether a tensor has a row for each token, or is such a row.
[[nodiscard]] bool is_of_tokens(std::string_view name, const taskvec::extents& shape);
/// A tensor whose first side is that of the tokens: a row of them is seen as a column.
[[nodiscard]] taskvec::const_tensor_ref by_tokens(std::string_view name, taskvec::const_tensor_ref tensor);
/// How many tokens a tensor has rows for.
[[nodiscard]] std::uint64_t rows_of(std::string_view name, const taskvec::const_tensor_ref& tensor);
/// Elements of a row.
[[nodiscard]] std::uint64_t row_length(const taskvec::extents& shape);

/// A tensor that has one row everywhere: zeros, or the mean of the rows of another, worked out when it is read first.
class repeated_row final : public taskvec::operand_source {
public:
    /// Zeros.
    explicit repeated_row(std::uint64_t columns);
    /// The mean of `rows` rows of a tensor, which outlives this.
    repeated_row(std::uint64_t columns, const taskvec::operand_source& of, std::uint64_t rows);

    [[nodiscard]] taskvec::dtype type() const noexcept override;
    void read(std::uint64_t offset, std::size_t count, void* out) const override;

private:
    template <class A>
    void work_out() const;

    std::uint64_t columns_ = 1, rows_ = 1;
    const taskvec::operand_source* of_ = nullptr;
    mutable std::once_flag once_;
    mutable std::vector<double> row_;
};

} // namespace tool
