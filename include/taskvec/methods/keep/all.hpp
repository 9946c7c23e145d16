// Keep rules: which entries of a task vector take part in a merge. This one keeps all.
// SPDX-License-Identifier: Apache-2.0
//
// A keep rule has two halves. What is chosen and prepared for all tensors, `get<A>(tensor)`, gives the rule of one
// tensor: a small value that bodies hold, whose call operator keeps a pack of entries of task t, changes them, or makes
// zeros of them. `sees_all`: NaN and infinity are never dropped. `clears_zeros`: no entry stays −0.
// constant_until(place, end) tells to where the rule is one and the same; rules that draw have stream(t) and drawing().
// Methods take any rule: see ties.hpp and dare.hpp.
#pragma once

#include <taskvec/core/pack.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// Keeps every entry as it is.
struct keep_all {
    /// NaN and infinity are never dropped: a sum over what is kept shows them.
    static constexpr bool sees_all = true;
    static constexpr bool clears_zeros = false;

    /// x.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In&, std::size_t, const typename In::pack& x) const noexcept
    {
        return x;
    }
    /// Itself: no tensor has a rule of its own.
    template <arithmetic_element A>
    [[nodiscard]] keep_all get(std::size_t) const noexcept
    {
        return *this;
    }
};

} // namespace taskvec::inline TASKVEC_ABI
