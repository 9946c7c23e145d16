// Where a model-wide algorithm puts its result: tensors in memory, or a file that is written block by block.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A tensor that is yet to be written.
struct tensor_spec {
    std::string name; ///< of the tensor
    taskvec::dtype dtype = taskvec::dtype::f32; ///< as it is to be stored
    extents shape{}; ///< slowest first

    [[nodiscard]] std::size_t size() const { return element_count(shape, name); }
    /// Bytes of the tensor.
    [[nodiscard]] std::size_t bytes() const { return byte_count(dtype, size()); }
};

/// Receives the bytes of a fixed list of tensors, in any order and from several threads at once. Blocks never overlap
/// while they are written. A walk that settles what it had to guess (TIES, sums of 0) writes blocks again once all have
/// been written; what is written last counts.
class tensor_sink {
public:
    virtual ~tensor_sink() = default;
    /// Whether blocks may be written again. To a sink for which what it got is final a walk that settles comes twice,
    /// and writes the second time.
    [[nodiscard]] virtual bool rewritable() const { return true; }
    /// The host memory of tensor `index`, to be written in place; nullptr when bytes must go through write().
    [[nodiscard]] virtual void* direct(std::size_t /*index*/) { return nullptr; }
    /// Whether tensor `index` is still wanted. What is not need not be computed, and is let go where it is written.
    [[nodiscard]] virtual bool wants(std::size_t /*index*/) const { return true; }
    /// Writes `size` bytes at byte `offset` of tensor `index`.
    virtual void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) = 0;
    /// The same of results that are far from the largest number of their dtype, as whoever made them knows: for sinks
    /// that look for overflow.
    virtual void write_bounded(std::size_t index, std::uint64_t offset, const void* data, std::size_t size)
    {
        write(index, offset, data, size);
    }
};

namespace detail {
/// Where a walk writes that is only to learn something.
class discarding_sink final : public tensor_sink {
public:
    void write(std::size_t /*index*/, std::uint64_t /*offset*/, const void* /*data*/, std::size_t /*size*/) override { }
};
} // namespace detail

/// The sink over tensors that the caller owns, in the order of `tensors`.
class memory_sink final : public tensor_sink {
public:
    /// `tensors`: memory for each tensor of the list that is written, in its order, which outlives the sink.
    explicit memory_sink(std::vector<void*> tensors)
        : tensors_(std::move(tensors))
    { }
    [[nodiscard]] void* direct(std::size_t index) override { return tensors_[index]; }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        std::memcpy(static_cast<std::byte*>(tensors_[index]) + offset, data, size);
    }

private:
    std::vector<void*> tensors_;
};

} // namespace taskvec::inline TASKVEC_ABI
