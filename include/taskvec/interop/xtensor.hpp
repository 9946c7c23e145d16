// xtensor containers, adaptors and strided views as inputs and outputs, and results as xtensor adaptors, without a
// copy.
// SPDX-License-Identifier: Apache-2.0
//
// Written against the interface that xtensor's strided expressions share (data, data_offset, shape, strides,
// static_layout), and includes none of its headers: they moved between 0.24 (xtensor/xarray.hpp) and 0.26
// (xtensor/containers/xarray.hpp). What calls as_xtensor() includes xtensor's xadapt.hpp.
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/core/tensor_ref.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace xt {
enum class layout_type; // xtensor's own: by it xt::adapt() is found
}

namespace taskvec::inline TASKVEC_ABI {

namespace detail {
/// An xtensor expression that lies in memory (xarray, xtensor, xtensor_fixed, adaptors, views by ranges; not a + b).
template <class X>
concept xtensor_memory = requires(X& x) {
    x.data();
    x.data_offset();
    x.shape().size();
    x.strides().size();
    std::remove_cv_t<X>::static_layout;
    requires std::is_pointer_v<decltype(x.data())>;
    requires storable<std::remove_cv_t<std::remove_pointer_t<decltype(x.data())>>>;
};

/// An xtensor expression that is computed where it is read: a + b, xt::sin(a), a view of either.
template <class X>
concept xtensor_lazy = requires(const X& x) {
    x.derived_cast();
    x.shape().size();
    std::remove_cv_t<X>::static_layout;
    typename std::remove_cv_t<X>::value_type;
} && !requires(const X& x) { x.data(); };

/// Extents or strides.
template <class Sizes>
[[nodiscard]] extents xtensor_extents(const Sizes& values)
{
    extents result;
    result.reserve(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) { result.push_back(static_cast<std::int64_t>(values[i])); }
    return result;
}
} // namespace detail

/// An xtensor container, adaptor or strided view as a flat view, elements in row-major order; the result borrows its
/// memory.
///
/// Accepted: elements of double, float, f16 or bf16 (or of a type with their bits) that follow one another without
/// holes in row-major order. Refused while compiling: static column-major layouts, and expressions that are still to
/// be computed. Refused with invalid_argument: other strides, as of a view that leaves out columns. Cost: the number
/// of dimensions.
///
///     xt::xarray<float> weight = xt::zeros<float>({4, 3});
///     taskvec::host_view<float> flat = taskvec::as_view(weight);
template <class X>
    requires detail::xtensor_memory<X>
struct view_traits<X> {
    using element = detail::stored_as<std::remove_pointer_t<decltype(std::declval<X&>().data())>>;
    static host_view<element> get(X& x)
    {
        using layout = std::remove_cv_t<decltype(std::remove_cv_t<X>::static_layout)>;
        static_assert(std::remove_cv_t<X>::static_layout != layout::column_major,
            "taskvec: a column-major xtensor container holds the transposed tensor: use the row-major layout, or copy "
            "it into such a container first");
        const const_tensor_ref shaped{
            .shape = detail::xtensor_extents(x.shape()), .strides = detail::xtensor_extents(x.strides())};
        if (!shaped.contiguous()) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("an xtensor expression of shape ", to_string(shaped.shape), " has strides ",
                    to_string(shaped.strides),
                    ", so its elements do not follow one another in row-major order: copy it into a row-major "
                    "container of "
                    "its own first"));
        }
        return {detail::as_stored(x.data() + x.data_offset()), shaped.size("xtensor expression")};
    }
};

/// What is still to be computed has no elements in memory: refused with a sentence.
template <class X>
    requires detail::xtensor_lazy<std::remove_reference_t<X>>
void as_view(X&&)
{
    static_assert(!detail::xtensor_lazy<std::remove_reference_t<X>>,
        "taskvec: an xtensor expression has no elements in memory: evaluate it first, as in xt::xarray<float> y = a + "
        "b");
}

/// An xtensor container as a tensor of its shape, of any number of dimensions. Refuses what as_view refuses.
///
///     taskvec::model_ref model{{"fc.weight", taskvec::as_tensor(weight)}};
template <class X>
    requires detail::xtensor_memory<std::remove_reference_t<X>> || detail::xtensor_lazy<std::remove_reference_t<X>>
[[nodiscard]] auto as_tensor(X&& x)
{
    if constexpr (detail::xtensor_lazy<std::remove_reference_t<X>>) { as_view(x); }
    else {
        return as_tensor(as_view(x), detail::xtensor_extents(x.shape()));
    }
}

/// The view of an xtensor container, adaptor or strided view of two dimensions, in either layout, whose rows or columns
/// are contiguous, without a copy; one dimension is a matrix of one column. The result borrows x's memory.
///
/// Throws shape_mismatch for other numbers of dimensions; invalid_argument where neither the rows nor the columns are
/// contiguous, as of a view that takes every other row and every other column. Cost: constant.
///
///     auto s = taskvec::truncated_svd(taskvec::cpu{}, taskvec::as_matrix(weight), {.rank = 8});
template <class X>
    requires detail::xtensor_memory<const X> || detail::xtensor_lazy<X>
[[nodiscard]] auto as_matrix(const X& x)
{
    if constexpr (detail::xtensor_lazy<X>) { as_view(x); }
    else {
        const extents shape = detail::xtensor_extents(x.shape()), strides = detail::xtensor_extents(x.strides());
        if (shape.empty() || shape.size() > 2) {
            raise<shape_mismatch>(error_code::shape_invalid,
                message("an xtensor expression of shape ", to_string(shape),
                    " is no matrix; expected 2 dimensions: reshape it, or take a view of two of them"));
        }
        const std::int64_t rows = shape[0], cols = shape.size() == 2 ? shape[1] : 1;
        const std::int64_t down = strides[0], right = shape.size() == 2 ? strides[1] : 1;
        const bool empty = rows == 0 || cols == 0;
        const bool by_rows = empty || ((cols == 1 || right == 1) && (rows == 1 || down >= cols));
        const bool by_cols = (rows == 1 || down == 1) && (cols == 1 || right >= rows);
        if (!by_rows && !by_cols) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("an xtensor expression of shape ", to_string(shape), " has strides ", to_string(strides),
                    ", so neither its rows nor its columns are contiguous: evaluate it into a container of its own "
                    "first"));
        }
        // A vector of its own is one run; one with gaps is a row or column of something wider.
        const bool as_column = by_cols && (!by_rows || cols == 1);
        std::int64_t stride = as_column ? (cols == 1 ? rows : right) : (rows == 1 || empty ? cols : down);
        auto* const data = detail::as_stored(x.data() + x.data_offset());
        return matrix_view<std::remove_pointer_t<std::remove_const_t<decltype(data)>>>(data,
            static_cast<std::size_t>(rows), static_cast<std::size_t>(cols),
            as_column ? matrix_order::column_major : matrix_order::row_major, static_cast<std::size_t>(stride));
    }
}
template <class X>
    requires detail::xtensor_memory<const X> && detail::owns_elements<X>
void as_matrix(const X&& x) = delete; // name the container first: the view would dangle

namespace detail {
inline constexpr auto xtensor_dynamic = static_cast<xt::layout_type>(0);
inline constexpr auto xtensor_row_major = static_cast<xt::layout_type>(1);
inline constexpr auto xtensor_column_major = static_cast<xt::layout_type>(2);

template <class T, class Shape>
concept xtensor_adapts = requires(T* data, const Shape& shape, xt::layout_type layout) {
    adapt<xtensor_row_major>(static_cast<T*>(data), shape, layout);
};

/// An adaptor over somebody else's memory: of an std::array of extents with as many dimensions, of a vector with as
/// many as it has elements.
template <xt::layout_type Layout, class T, class Shape>
[[nodiscard]] auto adapt_memory(T* data, const Shape& shape, xt::layout_type layout)
{
    static_assert(xtensor_adapts<T, Shape>,
        "taskvec: as_xtensor() needs xtensor's adaptors: include <xtensor/xadapt.hpp> (from xtensor 0.26 on "
        "<xtensor/containers/xadapt.hpp>)");
    // The pointer by value: of a name, xtensor would keep a reference to it.
    if constexpr (xtensor_adapts<T, Shape>) { return adapt<Layout>(static_cast<T*>(data), shape, layout); }
}
} // namespace detail

/// A host view as an xtensor adaptor of one dimension, as a row-major one of rows x cols, or as one of any shape
/// (shape_mismatch where the sizes differ). Needs xtensor's xadapt.hpp. The result borrows the view's memory, may be
/// assigned to where the view may be, and is never resized.
///
///     taskvec::as_xtensor(flat) *= 0.5f;
///     auto kernels = taskvec::as_xtensor(flat, {64, 3, 7, 7});
template <class T>
[[nodiscard]] auto as_xtensor(host_view<T> flat)
{
    return detail::adapt_memory<detail::xtensor_row_major>(
        flat.data(), std::array<std::size_t, 1>{flat.size()}, detail::xtensor_row_major);
}
template <class T>
[[nodiscard]] auto as_xtensor(host_view<T> flat, std::int64_t rows, std::int64_t cols)
{
    if (element_count({rows, cols}, "as_xtensor") != flat.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a view of ", flat.size(), " elements cannot be a matrix of ", rows, " x ", cols));
    }
    return detail::adapt_memory<detail::xtensor_row_major>(flat.data(),
        std::array<std::size_t, 2>{static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)},
        detail::xtensor_row_major);
}
template <class T>
[[nodiscard]] auto as_xtensor(host_view<T> flat, const extents& shape)
{
    if (element_count(shape, "as_xtensor") != flat.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a view of ", flat.size(), " elements cannot have shape ", to_string(shape)));
    }
    return detail::adapt_memory<detail::xtensor_row_major>(
        flat.data(), std::vector<std::size_t>(shape.begin(), shape.end()), detail::xtensor_row_major);
}

/// An owning matrix, of either order, as an xtensor adaptor of two dimensions, for users who go on with xtensor. The
/// layout is known at run time alone: xt::layout_type::dynamic.
///
///     const auto s = taskvec::truncated_svd(taskvec::cpu{}, taskvec::as_matrix(weight), {.rank = 8});
///     const auto u = taskvec::as_xtensor(s.u);
template <storage_element T>
[[nodiscard]] auto as_xtensor(matrix<T>& x)
{
    return detail::adapt_memory<detail::xtensor_dynamic>(x.data(), std::array<std::size_t, 2>{x.rows(), x.cols()},
        x.order() == matrix_order::row_major ? detail::xtensor_row_major : detail::xtensor_column_major);
}
template <storage_element T>
[[nodiscard]] auto as_xtensor(const matrix<T>& x)
{
    return detail::adapt_memory<detail::xtensor_dynamic>(x.data(), std::array<std::size_t, 2>{x.rows(), x.cols()},
        x.order() == matrix_order::row_major ? detail::xtensor_row_major : detail::xtensor_column_major);
}
template <storage_element T>
void as_xtensor(const matrix<T>&& x) = delete; // name the owner first: the adaptor would dangle

} // namespace taskvec::inline TASKVEC_ABI
