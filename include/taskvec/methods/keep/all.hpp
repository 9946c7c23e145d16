// Keep rules: which entries of a task vector take part in a merge. This one keeps all.
// SPDX-License-Identifier: Apache-2.0
//
// A keep rule has two halves. What is chosen and prepared for all tensors, `get<A>(tensor)`, gives the rule of one
// tensor: a small value that bodies hold, whose call operator keeps a pack of entries of task t, changes them, or makes
// zeros of them. `sees_all`: NaN and infinity are never dropped. constant_until(place, end) tells to where the rule is
// one and the same; rules that draw have stream(t) and drawing(). Methods take any rule: see ties.hpp and dare.hpp.
#pragma once

#include <taskvec/core/pack.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Keeps every entry as it is.
struct keep_all {
    /// NaN and infinity are never dropped: a sum over what is kept shows them.
    static constexpr bool sees_all = true;

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
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
};

namespace detail {

/// Says what is missing of a keep rule, in a sentence.
template <class Keep>
consteval bool check_keep()
{
    constexpr bool chosen = requires(const Keep& keep, std::size_t tensor) { keep.template get<float>(tensor); };
    static_assert(chosen,
        "a keep rule has the rule of each tensor: template <arithmetic_element A> auto get(std::size_t tensor) const");
    if constexpr (chosen) {
        using rule = std::remove_cvref_t<decltype(std::declval<const Keep&>().template get<float>(std::size_t{0}))>;
        static_assert(
            requires { static_cast<bool>(rule::sees_all); },
            "the keep rule of a tensor says whether it never drops NaN and infinity: static constexpr bool sees_all");
    }
    static_assert(
        requires(const Keep& keep) { static_cast<unsigned>(keep.walks()); },
        "a keep rule says how often it read the models: unsigned walks() const");
    return true;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
