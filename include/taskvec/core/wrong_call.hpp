// What functions say of calls that are none of theirs: one sentence, that names what is wrong and the mend.
// SPDX-License-Identifier: Apache-2.0
//
// A public function gets its sentences by a line after its overloads, which names the form of a right call:
//
//     TASKVEC_WRONG_CALLS(cpu, difference, any_arguments, "difference(policy, tuned, base, output)")
//
// That declares overloads for calls which none of those above takes, and which are never as good a match as one of
// them, nor as a function of a caller's own that has the same name: whether a call is right is asked of the overloads
// that stand before the line, and what is no policy is taken by a conversion.
#pragma once

#include <taskvec/core/policy.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/core/view.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <ranges>
#include <type_traits>
#include <utility>

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
        using element = std::remove_cvref_t<decltype(*std::data(std::declval<bare&>()))>;
        return storable<element> ? view_flaw::no_view : view_flaw::elements; // such as a matrix
    }
    else {
        return view_flaw::no_view;
    }
}

/// The first flaw of an argument, or of the entries of a list; what is no data at all (options, numbers, text) has
/// none.
template <class X, memory_space Space>
consteval view_flaw argument_flaw()
{
    using bare = std::remove_cvref_t<X>;
    constexpr view_flaw flaw = flaw_of<bare, Space>();
    if constexpr (flaw == view_flaw::pointer) {
        return storable<std::remove_cv_t<std::remove_pointer_t<bare>>> ? flaw : view_flaw::none;
    }
    else if constexpr (flaw == view_flaw::elements && std::ranges::input_range<const bare>) {
        using entry = std::remove_cvref_t<std::ranges::range_reference_t<const bare>>;
        if constexpr (std::is_arithmetic_v<entry>) { return std::same_as<entry, char> ? view_flaw::none : flaw; }
        else {
            constexpr view_flaw of_entry = flaw_of<entry, Space>();
            return of_entry == view_flaw::no_view ? view_flaw::none : of_entry;
        }
    }
    else {
        return flaw == view_flaw::no_view ? view_flaw::none : flaw;
    }
}

/// Not a policy, nor what becomes one.
template <class X>
concept no_policy =
    !policy<X> && !std::convertible_to<const X&, const cpu&> && !std::convertible_to<const X&, const gpu&>;

/// What is wrong with a call.
enum class call_flaw : std::uint8_t {
    policy,
    pointer,
    address,
    elements,
    space,
    constant,
    one_for_list,
    list_for_one,
    order,
    form
};
consteval bool differ(call_flaw found, call_flaw other)
{
    return found != other;
}

/// A vector or a model, which some functions take lists of.
template <class X>
concept list_entry = viewable<const X> || std::convertible_to<const X&, const_model_ref>;

/// A list of one X.
template <class X>
struct list_of_one {
    using type = void;
};
template <list_entry X>
struct list_of_one<X> {
    using type = std::array<std::conditional_t<viewable<const X>, X, const_model_ref>, 1>;
};
/// What a list X is of.
template <class X>
struct one_of_list {
    using type = void;
};
template <class X>
    requires(
        std::ranges::input_range<const X> && list_entry<std::remove_cvref_t<std::ranges::range_reference_t<const X>>>)
struct one_of_list<X> {
    using type = std::remove_cvref_t<std::ranges::range_reference_t<const X>>;
};

/// Whether a call is right where one of its arguments is what Other makes of it. `Before` are those already tried.
template <class Calls, template <class> class Other, class... Before>
struct one_changed {
    template <class One, class... After>
    static consteval bool right()
    {
        if constexpr (std::is_void_v<typename Other<One>::type>) { }
        else if constexpr (Calls::template take<Before&..., typename Other<One>::type&, After&...>) {
            return true;
        }
        if constexpr (sizeof...(After) == 0) { return false; }
        else {
            return one_changed<Calls, Other, Before..., One>::template right<After...>();
        }
    }
};

/// Whether a call is right where two neighbours change places.
template <class Calls, class... Before>
struct neighbours_changed {
    template <class One>
    static consteval bool right()
    {
        return false;
    }
    template <class One, class Next, class... After>
    static consteval bool right()
    {
        if constexpr (Calls::template take<Before&..., Next&, One&, After&...>) { return true; }
        else {
            return neighbours_changed<Calls, Before..., One>::template right<Next, After...>();
        }
    }
};

/// Whether a call is right where its first `Turns` arguments become its last ones, or fewer of them.
template <class Calls, class P, std::size_t Turns, class First, class... Rest>
consteval bool right_turned()
{
    if constexpr (Turns == 0) { return false; }
    else if constexpr (Calls::template take<const P&, Rest&..., First&>) {
        return true;
    }
    else {
        return right_turned<Calls, P, Turns - 1, Rest..., First>();
    }
}

/// Whether a call is right but for the constness, or the short life, of an argument.
template <class Calls, class P, class... Arguments>
inline constexpr bool only_constant = false;
template <class Calls, class P, class... Arguments>
    requires(Calls::template take<const P&, std::remove_cvref_t<Arguments>&...>)
inline constexpr bool only_constant<Calls, P, Arguments...> = !Calls::template take<const P&, Arguments...>;

/// What is wrong with a call of arguments of those types, without references; `Calls` says which are right.
template <class Calls, policy P, class... Arguments>
consteval call_flaw flaw_of_call()
{
    constexpr auto has = [](view_flaw flaw) { return ((argument_flaw<Arguments, P::space>() == flaw) || ...); };
    if constexpr (has(view_flaw::pointer)) { return call_flaw::pointer; }
    else if constexpr (((std::is_pointer_v<Arguments> && std::is_class_v<std::remove_pointer_t<Arguments>>) || ...)) {
        return call_flaw::address;
    }
    else if constexpr (has(view_flaw::elements)) {
        return call_flaw::elements;
    }
    else if constexpr (has(view_flaw::space)) {
        return call_flaw::space;
    }
    else if constexpr (sizeof...(Arguments) == 0) {
        return call_flaw::form;
    }
    else if constexpr (Calls::template take<const P&, Arguments&...>) {
        return call_flaw::constant;
    }
    else if constexpr (one_changed<Calls, list_of_one, const P>::template right<Arguments...>()) {
        return call_flaw::one_for_list;
    }
    else if constexpr (one_changed<Calls, one_of_list, const P>::template right<Arguments...>()) {
        return call_flaw::list_for_one;
    }
    else if constexpr (neighbours_changed<Calls, const P>::template right<Arguments...>()
        || right_turned<Calls, P, sizeof...(Arguments) - 1, Arguments...>()) {
        return call_flaw::order;
    }
    else {
        return call_flaw::form;
    }
}

/// What a call that was refused returns, so that the sentence stays the only error: it becomes anything.
struct no_result {
    template <class T>
    operator T() const; // never called: such a program does not compile
};

/// The first argument of a call of `Calls` that has no policy, and any other argument.
template <class Calls>
struct misplaced_argument {
    template <class X>
        requires(Calls::template lacks_policy<X>)
    misplaced_argument(const X&)
    { }
};
struct any_argument {
    any_argument() = default;
    template <class X>
    any_argument(const X&)
    { }
};

/// Whether a list of arguments begins with a vector, a list of them, a model, or what is nearly a vector.
template <class First = int, class...>
consteval bool first_is_flat()
{
    if constexpr (std::is_arithmetic_v<First>) { return true; }
    else {
        return list_entry<First> || !std::is_void_v<typename one_of_list<First>::type>
            || argument_flaw<First, memory_space::host>() != view_flaw::none;
    }
}

/// Calls of which a line TASKVEC_WRONG_CALLS speaks: all.
template <class... Arguments>
concept any_arguments = true;
/// Those whose first argument after the policy is a flat view, a list of them, a model, a number, or nearly a view; and
/// the others, such as those of sparse entries.
template <class... Arguments>
concept flat_arguments = first_is_flat<Arguments...>();
template <class... Arguments>
concept sparse_arguments = !first_is_flat<Arguments...>();

} // namespace taskvec::inline TASKVEC_ABI::detail

// The sentences of the calls of a function on one policy that `concerns<arguments after the policy…>`; with
// taskvec::cpu also those of calls without a policy. A line stands after the overloads that it speaks of.
// NOLINTBEGIN(bugprone-macro-parentheses)
#if defined(__CUDACC__) // nvcc's front end finds these constraints unsatisfied in the middle of right calls
#define TASKVEC_WRONG_CALLS(policy_type, function, concerns, right_call)
#else
#define TASKVEC_WRONG_CALLS(policy_type, function, concerns, right_call)                                               \
    namespace detail {                                                                                                 \
    struct policy_type##_##function##_of_##concerns {                                                                  \
        template <class P, class... Arguments>                                                                         \
        static constexpr bool take = requires(P&& policy, Arguments&&... x) {                                          \
            requires concerns<std::remove_cvref_t<Arguments>...>;                                                      \
            ::taskvec::function(static_cast<P&&>(policy), static_cast<Arguments&&>(x)...);                             \
        };                                                                                                             \
        template <class First>                                                                                         \
        static constexpr bool lacks_policy = std::same_as<policy_type, cpu> && no_policy<First> && concerns<First>;    \
        template <call_flaw Flaw, class>                                                                               \
        static auto explain()                                                                                          \
        {                                                                                                              \
            static_assert(differ(Flaw, call_flaw::policy),                                                             \
                #function "(): the first argument is no policy: pass taskvec::cpu{}, or taskvec::cpu{.threads = 4} "   \
                          "where threads are counted, in " right_call);                                                \
            static_assert(differ(Flaw, call_flaw::pointer),                                                            \
                #function "(): an argument is a pointer, which does not say how long it is: pass "                     \
                          "taskvec::host_view<const float>(pointer, size), or a device_view on taskvec::gpu");         \
            static_assert(differ(Flaw, call_flaw::address),                                                            \
                #function "(): an argument is the address of an object: pass the object, in " right_call);             \
            static_assert(differ(Flaw, call_flaw::elements),                                                           \
                #function "(): the elements of an argument are of no storage type: expected double, float, "           \
                          "taskvec::bf16 or taskvec::f16");                                                            \
            static_assert(differ(Flaw, call_flaw::space),                                                              \
                #function "(): an argument lies in another memory space than the policy works in: host memory with "   \
                          "taskvec::cpu, device memory with taskvec::gpu");                                            \
            static_assert(differ(Flaw, call_flaw::constant),                                                           \
                #function "(): an output is const, or a temporary that the result would be lost with: pass memory "    \
                          "that can be written, by its name, in " right_call);                                         \
            static_assert(differ(Flaw, call_flaw::one_for_list),                                                       \
                #function "(): one vector or model stands where a list of them is expected, such as std::array "       \
                          "list{taskvec::as_view(x)}, in " right_call);                                                \
            static_assert(differ(Flaw, call_flaw::list_for_one),                                                       \
                #function "(): a list stands where one vector or model is expected, in " right_call);                  \
            static_assert(differ(Flaw, call_flaw::order),                                                              \
                #function "(): the arguments are in another order than those of " right_call);                         \
            static_assert(differ(Flaw, call_flaw::form), #function "(): the arguments are not those of " right_call);  \
            return no_result{};                                                                                        \
        }                                                                                                              \
    };                                                                                                                 \
    }                                                                                                                  \
    template <std::same_as<policy_type> P, class... Arguments>                                                         \
        requires detail::concerns<Arguments...>                                                                        \
        && (!detail::policy_type##_##function##_of_##concerns::template take<const P&, Arguments&...>)                 \
    auto function(const P&, const Arguments&...)                                                                       \
    {                                                                                                                  \
        using calls = detail::policy_type##_##function##_of_##concerns;                                                \
        return calls::template explain<detail::flaw_of_call<calls, P, Arguments...>(), P>();                           \
    }                                                                                                                  \
    template <std::same_as<policy_type> P, class... Arguments>                                                         \
        requires detail::concerns<std::remove_cvref_t<Arguments>...>                                                   \
        && (detail::only_constant<detail::policy_type##_##function##_of_##concerns, P, Arguments...>)                  \
    auto function(const P&, Arguments&&...)                                                                            \
    {                                                                                                                  \
        using calls = detail::policy_type##_##function##_of_##concerns;                                                \
        return calls::template explain<detail::call_flaw::constant, P>();                                              \
    }                                                                                                                  \
    template <class Calls = detail::policy_type##_##function##_of_##concerns>                                          \
    auto function(const detail::misplaced_argument<detail::policy_type##_##function##_of_##concerns>&,                 \
        detail::any_argument = {}, detail::any_argument = {}, detail::any_argument = {}, detail::any_argument = {},    \
        detail::any_argument = {}, detail::any_argument = {})                                                          \
    {                                                                                                                  \
        return Calls::template explain<detail::call_flaw::policy, Calls>();                                            \
    }
#endif

// The sentence of a function that lives in a header of its own on taskvec::gpu, where that is not included.
#define TASKVEC_CALLS_NEED_HEADER(function, room, header)                                                              \
    template <detail::gpu_without_header<detail::gpu_room::room> P, class... Arguments>                                \
    auto function(const P&, Arguments&&...)                                                                            \
    {                                                                                                                  \
        static_assert(detail::gpu_header_included<P, detail::gpu_room::room>,                                          \
            #function "() on taskvec::gpu: include <" header ">");                                                     \
        return detail::no_result{};                                                                                    \
    }
// NOLINTEND(bugprone-macro-parentheses)
