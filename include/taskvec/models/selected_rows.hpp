// Rows of several tensors as one tensor: embeddings and heads of models whose vocabularies differ, lined up.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/storage.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/block.hpp>
#include <taskvec/models/operand_source.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A run of rows that are taken together: row `first + i` is the mean of row `row + i` of each part.
struct row_run {
    /// A row of some tensor.
    struct part {
        std::size_t tensor = 0; ///< in the list that selected_rows is given
        std::uint64_t row = 0; ///< of the first row that is taken
    };
    std::uint64_t first = 0, count = 0; ///< of the rows that are made
    std::vector<part> parts{}; ///< one to be taken bit for bit, more to be averaged
};

/// A tensor whose rows (the first extent) are rows of others, or means of some. One row of another is it bit for bit;
/// a mean is summed in the order of its parts, in f32 (f64 where a tensor holds f64). Nothing is stored but the runs.
/// The tensors' memory outlives it. Throws shape_mismatch where rows differ in length or lie outside their tensors, and
/// where runs leave rows out.
///
///     const selected_rows rows({base, task}, {{0, 32000, {{0, 0}}}, {32000, 1, {{1, 32000}}}});
///     model.insert("embed_tokens.weight", rows.tensor(base.dtype)); // 32001 rows, the last one of the task
class selected_rows final : public operand_source {
public:
    /// `tensors`: of one row length each; `runs`: ascending, without gaps.
    selected_rows(std::vector<const_tensor_ref> tensors, std::vector<row_run> runs)
        : tensors_(std::move(tensors))
        , runs_(std::move(runs))
    {
        if (tensors_.empty()) { raise<shape_mismatch>(error_code::shape_invalid, "rows of no tensor were selected"); }
        shape_ = tensors_.front().shape;
        const auto inner = [](const extents& shape) { return extents(shape.begin() + !shape.empty(), shape.end()); };
        for (const auto& tensor : tensors_) {
            if (tensor.shape.empty() || inner(tensor.shape) != inner(shape_)) {
                raise<shape_mismatch>(error_code::shape_invalid,
                    message("rows of tensors of shape ", to_string(shape_), " and ", to_string(tensor.shape),
                        " cannot stand in one"));
            }
            operands_.push_back({static_cast<const std::byte*>(tensor.data),
                tensor.source ? tensor.source->type() : tensor.dtype, tensor.source});
            wide_ = wide_ || operands_.back().dtype == dtype::f64;
        }
        columns_ = element_count(inner(shape_));
        std::uint64_t rows = 0;
        for (const auto& run : runs_) {
            const bool inside = std::all_of(run.parts.begin(), run.parts.end(), [&](const row_run::part& part) {
                const auto held =
                    part.tensor < tensors_.size() ? static_cast<std::uint64_t>(tensors_[part.tensor].shape[0]) : 0;
                return part.row <= held && run.count <= held - part.row;
            });
            if (run.first != rows || run.parts.empty() || !inside) {
                raise<shape_mismatch>(error_code::shape_invalid,
                    message("the run of ", run.count, " rows at row ", run.first,
                        " does not follow the one before it, or takes rows that its tensors lack"));
            }
            rows += run.count;
        }
        shape_[0] = static_cast<std::int64_t>(rows);
    }

    /// The tensor that walks over models are given. `stored`: what a result is stored as where nothing else is asked.
    /// Refers to this.
    [[nodiscard]] const_tensor_ref tensor(taskvec::dtype stored) const&
    {
        return {nullptr, stored, shape_, {}, memory_space::host, 0, this};
    }
    void tensor(taskvec::dtype) const&& = delete; // name the owner first: its views would dangle
    /// As they were given.
    [[nodiscard]] const std::vector<row_run>& runs() const noexcept { return runs_; }
    [[nodiscard]] taskvec::dtype type() const noexcept override { return wide_ ? dtype::f64 : dtype::f32; }
    [[nodiscard]] unsigned stored_bits() const noexcept override
    {
        return tensors_.front().source ? tensors_.front().source->stored_bits()
                                       : bits_per_element(tensors_.front().dtype);
    }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        wide_ ? read_as(offset, count, static_cast<double*>(out)) : read_as(offset, count, static_cast<float*>(out));
    }

private:
    template <class A>
    void read_as(std::uint64_t offset, std::size_t count, A* out) const
    {
        if (count == 0) { return; }
        std::array<double, block_size> raw; // what with_elements() may need
        auto run = std::upper_bound(runs_.begin(), runs_.end(), offset,
            [&](std::uint64_t at, const row_run& one) { return at < one.first * columns_; });
        for (--run; count > 0; ++run) {
            std::uint64_t inner = offset - run->first * columns_;
            auto left = static_cast<std::size_t>(std::min<std::uint64_t>(count, run->count * columns_ - inner));
            offset += left;
            count -= left;
            while (left > 0) {
                const std::size_t n = std::min(left, block_size);
                for (std::size_t p = 0; p < run->parts.size(); ++p) {
                    const auto& part = run->parts[p];
                    detail::with_elements(operands_[part.tensor], part.row * columns_ + inner, n,
                        reinterpret_cast<std::byte*>(raw.data()), [&](const auto* values) {
                            for (std::size_t i = 0; i < n; ++i) {
                                const auto value = static_cast<A>(widen<A>(values[i]));
                                out[i] = p == 0 ? value : out[i] + value;
                            }
                        });
                }
                if (run->parts.size() > 1) {
                    for (std::size_t i = 0; i < n; ++i) { out[i] /= static_cast<A>(run->parts.size()); }
                }
                out += n;
                inner += n;
                left -= n;
            }
        }
    }

    std::vector<const_tensor_ref> tensors_;
    std::vector<aligned_tensor::operand> operands_;
    std::vector<row_run> runs_;
    extents shape_;
    std::uint64_t columns_ = 1;
    bool wide_ = false;
};

} // namespace taskvec::inline TASKVEC_ABI
