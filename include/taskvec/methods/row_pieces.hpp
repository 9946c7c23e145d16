// Pieces of whole rows: what a walk goes over where a method looks at rows and
// not at single entries.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/block.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The length of a tensor's rows, the entries along its last axis: all of a tensor with one axis, 1 of a scalar.
[[nodiscard]] inline std::size_t row_length(const aligned_tensor& tensor) noexcept
{
    return tensor.shape.empty() || tensor.size == 0 ? 1 : static_cast<std::size_t>(tensor.shape.back());
}

/// The included tensors in pieces of some 65,536 entries that hold whole units (rows, say): the same for any threads
/// and chunks. A unit that is longer is a piece by itself. Worked out when they are asked for, as chunk_list is.
class row_pieces {
public:
    static constexpr std::size_t entries = 65536; ///< that a piece has, if its units are not longer

    /// `unit(tensor)`: how many entries belong together; they divide the tensor's size.
    template <class Unit>
    row_pieces(const aligned_models& models, const Unit& unit)
        : models_(&models)
    {
        for (const auto& tensor : models.tensors()) {
            const std::size_t together = std::max<std::size_t>(unit(tensor), 1);
            steps_.push_back(std::max<std::size_t>(entries / together, 1) * together);
            first_of_.push_back(first_of_.back() + (tensor.size + steps_.back() - 1) / steps_.back());
        }
    }
    [[nodiscard]] std::size_t size() const noexcept { return first_of_.back(); }
    [[nodiscard]] tensor_chunk operator[](std::size_t index) const noexcept
    {
        // Of tensors that share a first piece only the last is not empty.
        const auto after = std::upper_bound(first_of_.begin(), first_of_.end(), index);
        const auto tensor = static_cast<std::size_t>(after - first_of_.begin()) - 1;
        const std::size_t offset = (index - first_of_[tensor]) * steps_[tensor];
        return {tensor, offset, std::min(steps_[tensor], models_->tensors()[tensor].size - offset)};
    }
    /// The pieces of a tensor, by number.
    [[nodiscard]] chunk_range of_tensor(std::size_t tensor) const noexcept
    {
        return {first_of_[tensor], first_of_[tensor + 1]};
    }

private:
    const aligned_models* models_;
    call_vector<std::size_t> first_of_ = call_vector<std::size_t>(1, 0), steps_;
};

namespace detail {

/// Rows of A for a piece, one after the other: what a method that looks at rows works with, for each worker.
class piece_memory {
public:
    explicit piece_memory(std::pmr::memory_resource* memory)
        : words_(memory)
    { }
    /// Room for `rows` rows of a piece. What was there is gone.
    template <arithmetic_element A>
    [[nodiscard]] A* rows(std::size_t rows, std::size_t size)
    {
        const std::size_t words = (rows * size * sizeof(A) + sizeof(double) - 1) / sizeof(double);
        if (words_.size() < words) { words_.resize(words); }
        return reinterpret_cast<A*>(words_.data());
    }

private:
    std::pmr::vector<double> words_;
};

/// Goes over pieces that hold the storage types of a list, with the blocks and the memory that each worker needs.
template <class Types>
class piece_walk {
public:
    piece_walk(const cpu& policy, const aligned_models& models, const row_pieces& pieces)
        : policy_(policy)
        , models_(&models)
        , pieces_(&pieces)
        , workspaces_(make_workspaces<Types>(policy, models, pieces.size(), 0))
        , memory_(memory_of(policy))
    {
        for (std::size_t w = 0; w < workspaces_.size(); ++w) { memory_.emplace_back(memory_of(policy)); }
    }
    [[nodiscard]] const cpu& policy() const noexcept { return policy_; }
    [[nodiscard]] std::size_t workers() const noexcept { return workspaces_.size(); }

    /// body(index, worker, rows, piece, memory) for the pieces of a range, in parallel; their bytes go to the meter.
    template <class Body>
    void each(chunk_range range, progress_meter& meter, const Body& body)
    {
        for_each_index(policy_, range.last - range.first, [&](std::size_t offset, std::size_t worker) {
            const tensor_chunk piece = (*pieces_)[range.first + offset];
            with_block_of<Types>(workspaces_[worker], models_->tensors()[piece.tensor],
                [&](auto& rows) { body(range.first + offset, worker, rows, piece, memory_[worker]); });
            if (!meter.advance(models_->bytes(piece))) { raise<cancelled>(error_code::cancelled); }
        });
    }

private:
    const cpu& policy_;
    const aligned_models* models_;
    const row_pieces* pieces_;
    std::pmr::vector<block_workspace> workspaces_;
    std::pmr::vector<piece_memory> memory_;
};

/// The task vectors of a piece, task after task, into out[t·size …].
template <arithmetic_element A>
void read_deltas(row_block<A>& rows, const tensor_chunk& piece, A* out)
{
    for_each_block_of(rows, piece, [&](row_block<A>& opened) {
        for (std::size_t t = 0; t < opened.task_count(); ++t) {
            std::memcpy(
                out + t * piece.size + (opened.offset() - piece.offset), opened.delta(t), opened.size() * sizeof(A));
        }
    });
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
