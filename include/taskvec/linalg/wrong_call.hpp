// What decompositions take beside views of const elements, and what they say of anything else: one sentence.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/core/policy.hpp>
#include <taskvec/core/view.hpp>

#include <type_traits>

namespace taskvec::inline TASKVEC_ABI::detail {

/// The storage type of a matrix of the library in a memory space, a view or an owner; void for anything else.
template <class X, memory_space S>
struct matrix_element {
    using type = void;
};
template <class T, memory_space S>
struct matrix_element<matrix_view<T, S>, S> {
    using type = std::remove_const_t<T>;
};
template <class T, memory_space S>
struct matrix_element<matrix<T, S>, S> {
    using type = T;
};
template <class X, memory_space S>
using matrix_element_of = typename matrix_element<std::remove_cvref_t<X>, S>::type;

/// A matrix in a memory space that is no view of const elements: functions of such views see it as one.
template <class X, memory_space S>
concept other_matrix = !std::is_void_v<matrix_element_of<X, S>>
    && !std::is_same_v<std::remove_cvref_t<X>, matrix_view<const matrix_element_of<X, S>, S>>;

/// What is no matrix in a memory space.
template <class X, memory_space S>
concept no_matrix = std::is_void_v<matrix_element_of<X, S>>;

/// The memory space that a matrix does not lie in, of the two that there are.
template <memory_space S>
inline constexpr memory_space other_space = S == memory_space::host ? memory_space::device : memory_space::host;

/// Refuses an argument that is no matrix where a policy works.
template <policy P, class X>
consteval void refuse_matrix()
{
    static_assert(std::is_void_v<matrix_element_of<X, other_space<P::space>>>,
        "taskvec: a matrix lies in another memory space than the policy works in: host memory with taskvec::cpu, "
        "device memory with taskvec::gpu");
    static_assert(!no_matrix<X, P::space> || !std::is_void_v<matrix_element_of<X, other_space<P::space>>>,
        "taskvec: an argument is no matrix: pass taskvec::matrix_view<const float>(data, rows, cols, order), or "
        "taskvec::as_matrix(x) of an Eigen or xtensor matrix of double, float or 16-bit elements");
}

} // namespace taskvec::inline TASKVEC_ABI::detail
