// Tensors that are stored nowhere as numbers: their elements are worked out when they are read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/dtype.hpp>
#include <taskvec/fwd.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// What stands for the stored elements of one tensor: of a task (aligned_models::compute()), as a base weight with
/// adapters added (adapters/adapted_weight.hpp); or of any model whose tensor_ref names it (`source`), as a quantised
/// layer (formats/quantised.hpp). Everything that walks over aligned models reads it as it would a tensor of
/// dtype type() with these elements. Reads come from several threads at once, in any order, the same one more than
/// once; the same elements must come out each time.
class operand_source {
public:
    virtual ~operand_source() = default;
    /// f32 or f64.
    [[nodiscard]] virtual taskvec::dtype type() const noexcept = 0;
    /// Elements [offset, offset + count) of the tensor, row-major, as type(), to `out`, which is aligned to them.
    virtual void read(std::uint64_t offset, std::size_t count, void* out) const = 0;
    /// Does beforehand, on the policy's threads and in its memory, what the first read would do by itself.
    virtual void prepare(const cpu& /*policy*/) const { }
    /// Gives back what prepare() and reads keep, until the next one. Nobody reads meanwhile.
    virtual void release() const { }
    /// Bits that are read for an element: for progress and reports.
    [[nodiscard]] virtual unsigned stored_bits() const noexcept { return bits_per_element(type()); }
};

namespace detail {
/// Prepares a source, where there is one, and gives back what it keeps when the work is done.
class prepared_source {
public:
    prepared_source(const operand_source* source, const cpu& policy)
        : source_(source)
    {
        if (source_) { source_->prepare(policy); }
    }
    ~prepared_source()
    {
        if (source_) { source_->release(); }
    }
    prepared_source(const prepared_source&) = delete;
    prepared_source& operator=(const prepared_source&) = delete;

private:
    const operand_source* source_;
};
} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
