// Sums of a fixed shape: the same bits for any number of threads and any blocks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/models/block.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For every tensor a list of sums over its elements, each Σ over blocks of what `term` returns, in a fixed pairwise
/// shape. `term(block, sums)` adds nothing: it stores `width` block sums. Result: [tensor][which]. Cost: one walk.
template <class Types = storage_types, class Term>
[[nodiscard]] call_vector<call_vector<double>> tensor_sums(const cpu& policy, const aligned_models& models,
    std::size_t width, std::size_t scratch_rows, std::string_view phase, Term&& term);

namespace detail {

/// Adds block sums as they come in order, by a binary counter: the shape of a pairwise sum, in O(log n) memory.
class pairwise_sum {
public:
    void add(double value) noexcept
    {
        std::size_t level = 0;
        for (std::uint64_t bits = count_++; bits & 1u; bits >>= 1) { value = partial_[level++] + value; }
        partial_[level] = value;
    }
    [[nodiscard]] double total() const noexcept
    {
        double sum = 0;
        bool any = false;
        std::size_t level = 0;
        for (std::uint64_t bits = count_; bits; bits >>= 1, ++level) {
            if (bits & 1u) {
                sum = any ? partial_[level] + sum : partial_[level];
                any = true;
            }
        }
        return sum;
    }

private:
    std::array<double, 64> partial_{};
    std::uint64_t count_ = 0;
};

} // namespace detail

template <class Types, class Term>
call_vector<call_vector<double>> tensor_sums(const cpu& policy, const aligned_models& models, std::size_t width,
    std::size_t scratch_rows, std::string_view phase, Term&& term)
{
    // Blocks are the leaves, whatever the chunks are.
    call_vector<std::size_t> first_block(1, 0);
    for (const auto& tensor : models.tensors()) {
        first_block.push_back(first_block.back() + (tensor.size + block_size - 1) / block_size);
    }
    if (models.options().chunk % block_size != 0) {
        const aligned_models whole_blocks(models, (models.options().chunk / block_size + 1) * block_size);
        return tensor_sums<Types>(policy, whole_blocks, width, scratch_rows, phase, std::forward<Term>(term));
    }
    std::pmr::vector<double> leaves(first_block.back() * width, memory_of(policy));
    for_each_block<Types>(
        policy, models, all_chunks(models), scratch_rows, phase, [&](std::size_t index, std::size_t, auto& rows) {
            const std::size_t leaf =
                first_block[models.chunks()[index].tensor] + static_cast<std::size_t>(rows.offset() / block_size);
            term(rows, leaves.data() + leaf * width);
        });
    call_vector<call_vector<double>> sums(models.tensors().size(), call_vector<double>(width));
    for (std::size_t i = 0; i < sums.size(); ++i) {
        for (std::size_t which = 0; which < width; ++which) {
            detail::pairwise_sum sum;
            for (std::size_t leaf = first_block[i]; leaf < first_block[i + 1]; ++leaf) {
                sum.add(leaves[leaf * width + which]);
            }
            sums[i][which] = sum.total();
        }
    }
    return sums;
}

} // namespace taskvec::inline TASKVEC_ABI
