// Rows of a block's task vectors, a pack of entries at a time, for what a method works out before it merges.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/instruction_set.hpp>
#include <taskvec/core/kernels.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/models/block.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Entries as a rule sees them that merges use too (`before`, `draws`).
template <arithmetic_element A, int bytes>
struct ruled_entries {
    using number = A;
    using pack = taskvec::pack<A, bytes>;
    using words = typename pack::words;
    using mask = typename pack::mask;
    std::uint64_t place; ///< in the concatenation of all tensors; all of a pack lie on one side of what a rule asks for
    const signed_word<A>* drawn; ///< the rule's words of these entries; null where it draws none

    [[nodiscard]] TASKVEC_INLINE bool before(std::uint64_t end) const noexcept { return place < end; }
    [[nodiscard]] TASKVEC_INLINE words draws(std::size_t) const noexcept
    {
        using lanes = typename taskvec::detail::vector_of<signed_word<A>, bytes>::anywhere;
        return {*reinterpret_cast<const lanes*>(drawn)};
    }
};

/// Some consecutive entries of all task vectors, whose rows lie `stride` apart: x(t) is the pack of task t.
template <arithmetic_element A, int bytes>
struct task_packs {
    const A* first; ///< of task 0
    std::size_t stride;

    [[nodiscard]] TASKVEC_INLINE pack<A, bytes> operator()(std::size_t t) const noexcept
    {
        return load_row<A, bytes, A>(first + t * stride);
    }
};

/// Calls work.template at<bytes>(i, x) for the entries of a block from i on: whole packs first, then one by one.
template <arithmetic_element A, class Work>
struct task_rows_kernel {
    Work& work;
    const A* rows;
    std::size_t stride, size;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t i = 0;
        if constexpr (bytes > 0) { packs_of<bytes>(i); }
        packs_of<0>(i);
    }

private:
    template <int bytes>
    TASKVEC_INLINE void packs_of(std::size_t& i) const
    {
        constexpr std::size_t width = static_cast<std::size_t>(pack_lanes<A, bytes>);
        for (; i + width <= size; i += width) { work.template at<bytes>(i, task_packs<A, bytes>{rows + i, stride}); }
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// The rows of a block's task vectors, task 0 first and block_size apart; of tasks where there is no base.
template <arithmetic_element A>
[[nodiscard]] const A* delta_rows(row_block<A>& rows)
{
    for (std::size_t t = 0; t < rows.task_count(); ++t) {
        const A* const x = rows.delta(t);
        if (x != rows.row(t)) { std::copy_n(x, rows.size(), rows.row(t)); }
    }
    return rows.row(0);
}

/// Runs `work` over `rows`, which delta_rows() gave.
template <arithmetic_element A, class Work>
void over_task_rows(const A* rows, std::size_t size, Work& work)
{
    kernels::run_widest(kernels::task_rows_kernel<A, Work>{work, rows, block_size, size});
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
