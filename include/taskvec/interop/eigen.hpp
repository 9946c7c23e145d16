// Eigen vectors and matrices as inputs and outputs, and results as Eigen maps, without a copy.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/core/tensor_ref.hpp>

#if !__has_include(<Eigen/Core>)
#error "this header of taskvec needs Eigen 3.4 or later (Debian: libeigen3-dev, with -I /usr/include/eigen3)"
#include "taskvec: the error above ends the compilation"
#endif
#include <Eigen/Core>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Eigen's 16-bit types have the bits of the library's: they are views of those.
template <>
struct same_bits_as<Eigen::bfloat16> {
    using type = bf16;
};
template <>
struct same_bits_as<Eigen::half> {
    using type = f16;
};

namespace detail {
/// The scalar by which Eigen knows a storage type.
template <class T>
struct eigen_scalar {
    using type = T;
};
template <>
struct eigen_scalar<bf16> {
    using type = Eigen::bfloat16;
};
template <>
struct eigen_scalar<f16> {
    using type = Eigen::half;
};
template <class T>
using eigen_scalar_of = typename eigen_scalar<std::remove_const_t<T>>::type;

/// Elements of a storage type as Eigen's.
template <class T>
[[nodiscard]] auto as_eigen_scalars(T* x) noexcept
{
    using scalar = std::conditional_t<std::is_const_v<T>, const eigen_scalar_of<T>, eigen_scalar_of<T>>;
    if constexpr (std::same_as<T, scalar>) { return x; }
    else {
        return reinterpret_cast<scalar*>(x);
    }
}

template <class Derived>
void derived_from_dense_base(const Eigen::DenseBase<Derived>&);

/// An Eigen object that lies in memory (a matrix, array, map, block, transpose …; not an expression to be evaluated).
template <class X>
concept eigen_memory = requires(const X& x) {
    detail::derived_from_dense_base(x);
    requires(std::remove_cv_t<X>::Flags & Eigen::DirectAccessBit) != 0;
    requires storable<typename std::remove_cv_t<X>::Scalar>;
};

/// An Eigen expression that is computed where it is read: a + b, a * b, a.cast<double>().
template <class X>
concept eigen_lazy = requires(const X& x) {
    detail::derived_from_dense_base(x);
    requires(std::remove_cv_t<X>::Flags & Eigen::DirectAccessBit) == 0;
};

/// Refuses what is not one row-major run. `inner` and `outer` are strides in elements; a vector is one row.
inline void require_eigen_run(std::int64_t rows, std::int64_t cols, std::int64_t inner, std::int64_t outer)
{
    if (rows == 0 || cols == 0) { return; }
    if (cols > 1 && inner != 1) {
        raise<invalid_argument>(error_code::tensor_layout,
            message("an Eigen vector of ", cols, " elements has a stride of ", inner,
                "; expected 1: copy it into a vector of its own first"));
    }
    if (rows > 1 && outer != cols) {
        raise<invalid_argument>(error_code::tensor_layout,
            message("an Eigen block of ", rows, " x ", cols, " has ", outer, " elements from row to row; expected ",
                cols, ": copy it into a matrix of its own, or pass it row by row"));
    }
}
} // namespace detail

/// An Eigen object as a flat view, elements in row-major order; the result borrows its memory.
///
/// Accepted: vectors and arrays, row-major matrices, their maps, refs and blocks, of double, float, Eigen::half or
/// Eigen::bfloat16, where the elements follow one another without holes. Refused while compiling: column-major matrices
/// (their memory is the transposed matrix), expressions that are still to be computed, and inner strides known not to
/// be
/// 1. Refused with invalid_argument: other
/// strides, as of a block that leaves out columns, or of a column of a row-major matrix. Cost: constant.
///
///     Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> weight(4, 3);
///     taskvec::host_view<float> flat = taskvec::as_view(weight.topRows(2));
template <class X>
    requires detail::eigen_memory<X>
struct view_traits<X> {
    using element = detail::stored_as<std::remove_pointer_t<decltype(std::declval<X&>().data())>>;
    static host_view<element> get(X& x)
    {
        static_assert(bool(X::IsVectorAtCompileTime) || bool(X::IsRowMajor),
            "taskvec: a column-major Eigen matrix holds the transposed tensor: use Eigen::RowMajor, or copy it into a "
            "row-major matrix first");
        static_assert(int(X::InnerStrideAtCompileTime) == 1 || int(X::InnerStrideAtCompileTime) == Eigen::Dynamic
                || int(X::SizeAtCompileTime) == 1,
            "taskvec: this Eigen object leaves elements out (its inner stride is not 1): copy it into a vector or "
            "matrix of its own first");
        if constexpr (bool(X::IsVectorAtCompileTime)) { detail::require_eigen_run(1, x.size(), x.innerStride(), 0); }
        else {
            detail::require_eigen_run(x.rows(), x.cols(), x.innerStride(), x.outerStride());
        }
        return {detail::as_stored(x.data()), static_cast<std::size_t>(x.size())};
    }
};

/// What is still to be computed has no elements in memory: refused with a sentence.
template <class X>
    requires detail::eigen_lazy<std::remove_reference_t<X>>
void as_view(X&&)
{
    static_assert(!detail::eigen_lazy<std::remove_reference_t<X>>,
        "taskvec: an Eigen expression has no elements in memory: evaluate it first, as in Eigen::VectorXf y = a + b");
}

/// An Eigen object as a tensor: shape {rows, cols}, {size} for a vector. Refuses what as_view refuses.
///
///     taskvec::model_ref model{{"fc.weight", taskvec::as_tensor(weight)}, {"fc.bias", taskvec::as_tensor(bias)}};
template <class X>
    requires detail::eigen_memory<std::remove_reference_t<X>> || detail::eigen_lazy<std::remove_reference_t<X>>
[[nodiscard]] auto as_tensor(X&& x)
{
    if constexpr (detail::eigen_lazy<std::remove_reference_t<X>>) { as_view(x); }
    else if constexpr (bool(std::remove_reference_t<X>::IsVectorAtCompileTime)) {
        return as_tensor(as_view(x), extents{static_cast<std::int64_t>(x.size())});
    }
    else {
        return as_tensor(as_view(x), extents{static_cast<std::int64_t>(x.rows()), static_cast<std::int64_t>(x.cols())});
    }
}

namespace detail {
template <class T, class Plain>
using eigen_map_of = Eigen::Map<std::conditional_t<std::is_const_v<T>, const Plain, Plain>>;

/// The elements of a column-major owner, const where T is, as an Eigen map.
template <class T, class Owner>
[[nodiscard]] auto map_columns(T* data, const Owner& x)
{
    if (x.order() != matrix_order::column_major) {
        raise<invalid_argument>(error_code::tensor_layout,
            message("as_eigen() maps column-major matrices, and this one of ", x.rows(), " x ", x.cols(),
                " is row-major: see its elements by as_eigen(view, rows, cols)"));
    }
    return eigen_map_of<T, Eigen::Matrix<eigen_scalar_of<T>, Eigen::Dynamic, Eigen::Dynamic>>(
        as_eigen_scalars(data), static_cast<Eigen::Index>(x.rows()), static_cast<Eigen::Index>(x.cols()));
}
} // namespace detail

/// A host view as an Eigen array of one dimension, or as a row-major matrix of rows x cols (shape_mismatch where the
/// sizes differ).
///
///     taskvec::as_eigen(flat) *= 0.5f;
template <class T>
[[nodiscard]] auto as_eigen(host_view<T> flat)
{
    return detail::eigen_map_of<T, Eigen::Array<detail::eigen_scalar_of<T>, Eigen::Dynamic, 1>>(
        detail::as_eigen_scalars(flat.data()), static_cast<Eigen::Index>(flat.size()));
}
template <class T>
[[nodiscard]] auto as_eigen(host_view<T> flat, std::int64_t rows, std::int64_t cols)
{
    if (element_count({rows, cols}, "as_eigen") != flat.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a view of ", flat.size(), " elements cannot be a matrix of ", rows, " x ", cols));
    }
    return detail::eigen_map_of<T,
        Eigen::Matrix<detail::eigen_scalar_of<T>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>>(
        detail::as_eigen_scalars(flat.data()), static_cast<Eigen::Index>(rows), static_cast<Eigen::Index>(cols));
}

/// The view of an Eigen matrix, map or block, in either order, whose rows or columns are contiguous, without a copy; a
/// vector is a matrix of one column or row. The result borrows x's memory.
///
/// Refused while compiling: expressions that are still to be computed, and temporary matrices. Throws invalid_argument
/// where neither the rows nor the columns are contiguous. Cost: constant.
///
///     auto s = taskvec::truncated_svd(taskvec::cpu{}, taskvec::as_matrix(weight), {.rank = 8});
template <class Derived>
    requires storable<typename Derived::Scalar>
[[nodiscard]] auto as_matrix(const Eigen::DenseBase<Derived>& x)
{
    if constexpr (detail::eigen_lazy<Derived>) { as_view(x.derived()); }
    else {
        const Derived& m = x.derived();
        if (m.innerStride() != 1 && m.innerSize() > 1) {
            raise<invalid_argument>(error_code::tensor_layout,
                "an Eigen expression with an inner stride is not a matrix view; evaluate it into a matrix first");
        }
        return matrix_view<detail::stored_as<const typename Derived::Scalar>>(detail::as_stored(m.data()),
            static_cast<std::size_t>(m.rows()), static_cast<std::size_t>(m.cols()),
            Derived::IsRowMajor ? matrix_order::row_major : matrix_order::column_major,
            static_cast<std::size_t>(m.outerStride()));
    }
}
template <class Derived>
    requires storable<typename Derived::Scalar>
void as_matrix(const Eigen::PlainObjectBase<Derived>&& x) = delete; // name the matrix first: the view would dangle

/// An owning column-major matrix as an Eigen map, for users who go on with Eigen; invalid_argument for a row-major one.
///
///     const auto s = taskvec::truncated_svd(taskvec::cpu{}, taskvec::as_matrix(weight), {.rank = 8});
///     const auto u = taskvec::as_eigen(s.u);
template <storage_element T>
[[nodiscard]] auto as_eigen(matrix<T>& x)
{
    return detail::map_columns(x.data(), x);
}
template <storage_element T>
[[nodiscard]] auto as_eigen(const matrix<T>& x)
{
    return detail::map_columns(x.data(), x);
}
template <storage_element T>
void as_eigen(const matrix<T>&& x) = delete; // name the owner first: the map would dangle

} // namespace taskvec::inline TASKVEC_ABI
