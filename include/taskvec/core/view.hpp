// Flat views of somebody else's memory. The memory space is part of the type: mixing spaces does not compile.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/storage.hpp>
#include <taskvec/fwd.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// A contiguous run of `size` elements of T in memory space S; does not own them. T may be const.
template <class T, memory_space S>
    requires storage_element<std::remove_const_t<T>>
class view {
public:
    using element_type = T;
    using value_type = std::remove_const_t<T>;
    static constexpr memory_space space = S; ///< Where the elements are.

    constexpr view() noexcept = default;
    /// `size` elements from `data` on.
    constexpr view(T* data, std::size_t size) noexcept
        : data_(data)
        , size_(size)
    { }
    /// A view of mutable elements is a view of const ones.
    template <std::same_as<value_type> Mutable>
        requires std::is_const_v<T>
    constexpr view(const view<Mutable, S>& other) noexcept
        : data_(other.data())
        , size_(other.size())
    { }

    [[nodiscard]] constexpr T* data() const noexcept { return data_; }
    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
    [[nodiscard]] constexpr bool empty() const noexcept { return size_ == 0; }

    // Only memory that the host can read has elements.
    [[nodiscard]] constexpr T& operator[](std::size_t index) const noexcept
        requires(S == memory_space::host)
    {
        return data_[index];
    }
    [[nodiscard]] constexpr T* begin() const noexcept
        requires(S == memory_space::host)
    {
        return data_;
    }
    [[nodiscard]] constexpr T* end() const noexcept
        requires(S == memory_space::host)
    {
        return data_ + size_;
    }

private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

/// How a type becomes a view. Specialised for views and contiguous ranges here, for Eigen and xtensor in interop/.
/// A specialisation has `static view<…> get(X&)`, and refuses with an error what is not contiguous.
template <class X>
struct view_traits;

template <class T, memory_space S>
struct view_traits<view<T, S>> {
    static constexpr view<T, S> get(const view<T, S>& x) noexcept { return x; }
};
template <class T, memory_space S>
struct view_traits<const view<T, S>> : view_traits<view<T, S>> { };

namespace detail {
/// The storage type with the bits of T, const where T is.
template <class T>
using stored_as = std::conditional_t<std::is_const_v<T>, const typename same_bits_as<std::remove_const_t<T>>::type,
    typename same_bits_as<std::remove_const_t<T>>::type>;

/// Elements as those of their storage type.
template <class T>
[[nodiscard]] constexpr stored_as<T>* as_stored(T* x) noexcept
{
    if constexpr (std::same_as<T, stored_as<T>>) { return x; }
    else {
        return reinterpret_cast<stored_as<T>*>(x);
    }
}

/// A vector, array, span or their like: elements that can be stored, one after another.
template <class X>
concept contiguous_run = requires(X& x) {
    { *std::data(x) } -> std::same_as<std::remove_pointer_t<decltype(std::data(x))>&>;
    { std::size(x) } -> std::convertible_to<std::size_t>;
    requires storable<std::remove_cv_t<std::remove_pointer_t<decltype(std::data(x))>>>;
};

/// Something with a shape of its own: its elements need not lie row-major in one run. interop/ knows how it becomes a
/// view.
template <class X>
concept has_shape = requires(X& x) { x.shape(); } || requires(X& x) {
    x.rows();
    x.cols();
};
} // namespace detail

template <class X>
    requires detail::contiguous_run<X> && (!detail::has_shape<X>)
struct view_traits<X> {
    using element = detail::stored_as<std::remove_pointer_t<decltype(std::data(std::declval<X&>()))>>;
    static constexpr host_view<element> get(X& x) noexcept
    {
        return {detail::as_stored(std::data(x)), static_cast<std::size_t>(std::size(x))};
    }
};

/// Something that as_view() turns into a view: a view, a vector, array or span, an Eigen or xtensor container.
template <class X>
concept viewable = requires(std::remove_reference_t<X>& x) { view_traits<std::remove_reference_t<X>>::get(x); };

namespace detail {
/// Whether an object of this type owns the elements that it shows: its constness is theirs, and it is no
/// expression that says which other type its plain form is (Eigen's maps and blocks, xtensor's views).
template <class X>
concept owns_elements =
    viewable<X> && std::is_const_v<typename decltype(view_traits<const X>::get(std::declval<const X&>()))::element_type>
    && !std::is_const_v<typename decltype(view_traits<X>::get(std::declval<X&>()))::element_type>
    && !(
        requires { typename X::PlainObject; } && !requires { requires std::same_as<typename X::PlainObject, X>; })
    && !(
        requires { typename X::temporary_type; }
        && !requires { requires std::same_as<typename X::temporary_type, X>; });
} // namespace detail

/// Something whose elements are still there after the expression that it stands in: anything with a name, or a view.
/// (A temporary container is not: name it first.)
template <class X>
concept outlives_the_expression = std::is_lvalue_reference_v<X> || !detail::owns_elements<std::remove_cvref_t<X>>;

/// The view of x, without a copy. A temporary container is refused: its view would dangle.
template <viewable X>
    requires outlives_the_expression<X>
[[nodiscard]] constexpr auto as_view(X&& x)
{
    return view_traits<std::remove_reference_t<X>>::get(x);
}

/// The type of as_view(x), its element type (never const) and its memory space.
template <viewable X>
using view_of = decltype(view_traits<std::remove_reference_t<X>>::get(std::declval<std::remove_reference_t<X>&>()));
/// The element type of as_view(x), without const.
template <viewable X>
using element_of = typename view_of<X>::value_type;

} // namespace taskvec::inline TASKVEC_ABI
