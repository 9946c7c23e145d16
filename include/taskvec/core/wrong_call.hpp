// What functions say of calls that are none of theirs: one sentence, that names what is wrong and the mend.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/policy.hpp>
#include <taskvec/core/view.hpp>

#include <cstdint>
#include <iterator>
#include <ranges>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI::detail {

/// What is wrong with something that should be a flat view in a memory space.
enum class view_flaw : std::uint8_t { none, pointer, elements, space, no_view };

template <class X, memory_space Space>
consteval view_flaw flaw_of()
{
    using bare = std::remove_cvref_t<X>;
    if constexpr (std::is_pointer_v<bare>) { return view_flaw::pointer; }
    else if constexpr (viewable<const bare>) {
        return view_of<const bare>::space == Space ? view_flaw::none : view_flaw::space;
    }
    else if constexpr (requires(bare& x) { *std::data(x), std::size(x); }) {
        return view_flaw::elements;
    }
    else {
        return view_flaw::no_view;
    }
}

/// The first flaw of an argument, or of the entries of a list; what is no data at all (options, numbers) has none.
template <class X, memory_space Space>
consteval view_flaw argument_flaw()
{
    using bare = std::remove_cvref_t<X>;
    constexpr view_flaw flaw = flaw_of<bare, Space>();
    if constexpr (flaw == view_flaw::elements && std::ranges::input_range<const bare>) {
        using entry = std::remove_cvref_t<std::ranges::range_reference_t<const bare>>;
        if constexpr (std::is_arithmetic_v<entry>) { return flaw; }
        else {
            constexpr view_flaw of_entry = flaw_of<entry, Space>();
            return of_entry == view_flaw::no_view ? view_flaw::none : of_entry;
        }
    }
    else {
        return flaw == view_flaw::no_view ? view_flaw::none : flaw;
    }
}

/// Whether some argument lacks what makes it a view in the memory space of a policy: what catch-alls beside a function
/// match.
template <class P, class... Arguments>
concept flawed_call = policy<P> && ((argument_flaw<Arguments, P::space>() != view_flaw::none) || ...);

/// Refuses such a call.
template <policy P, class... Arguments>
consteval void refuse_call()
{
    static_assert(((argument_flaw<Arguments, P::space>() != view_flaw::pointer) && ...),
        "taskvec: an argument is a pointer, which does not say how long it is: pass "
        "taskvec::host_view<const float>(pointer, size)");
    static_assert(((argument_flaw<Arguments, P::space>() != view_flaw::elements) && ...),
        "taskvec: the elements of an argument are of no storage type: expected double, float, taskvec::bf16 or "
        "taskvec::f16");
    static_assert(((argument_flaw<Arguments, P::space>() != view_flaw::space) && ...),
        "taskvec: an argument lies in another memory space than the policy works in: host memory with taskvec::cpu, "
        "device memory with taskvec::gpu");
}

} // namespace taskvec::inline TASKVEC_ABI::detail
