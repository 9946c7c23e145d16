// xtensor containers, adaptors and strided views as inputs and outputs, without a copy.
// SPDX-License-Identifier: Apache-2.0
//
// Written against the interface that xtensor's strided expressions share (data, data_offset, shape, strides,
// static_layout), and includes none of its headers: they moved between 0.24 (xtensor/xarray.hpp) and 0.26
// (xtensor/containers/xarray.hpp).
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

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
    requires storage_element<std::remove_cv_t<std::remove_pointer_t<decltype(x.data())>>>;
};

template <class Shape>
[[nodiscard]] extents xtensor_extents(const Shape& values)
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
/// Accepted: elements of double, float, f16 or bf16 that follow one another without holes in
/// row-major order. Refused while compiling: static column-major layouts. Refused with invalid_argument: other strides,
/// as of a view that leaves out columns. Cost: the number of dimensions.
///
///     xt::xarray<float> weight = xt::zeros<float>({4, 3});
///     taskvec::host_view<float> flat = taskvec::as_view(weight);
template <class X>
    requires detail::xtensor_memory<X>
struct view_traits<X> {
    using element = std::remove_pointer_t<decltype(std::declval<X&>().data())>;
    static host_view<element> get(X& x)
    {
        using layout = std::remove_cv_t<decltype(std::remove_cv_t<X>::static_layout)>;
        static_assert(std::remove_cv_t<X>::static_layout != layout::column_major,
            "taskvec: a column-major xtensor container holds the transposed tensor: use the row-major layout, or copy "
            "it into such a container first");
        const const_tensor_ref shaped{
            .shape = detail::xtensor_extents(x.shape()), .strides = detail::xtensor_extents(x.strides())};
        if (!shaped.contiguous()) {
            raise<invalid_argument>(message("an xtensor expression of shape ", to_string(shaped.shape), " has strides ",
                to_string(shaped.strides),
                ", so its elements do not follow one another in row-major order: copy it into a row-major container of "
                "its own first"));
        }
        return {x.data() + x.data_offset(), shaped.size("xtensor expression")};
    }
};

/// An xtensor container as a tensor of its shape. Refuses what as_view refuses.
///
///     taskvec::model_ref model{{"fc.weight", taskvec::as_tensor(weight)}};
template <class X>
    requires detail::xtensor_memory<std::remove_reference_t<X>>
[[nodiscard]] auto as_tensor(X&& x)
{
    return as_tensor(as_view(x), detail::xtensor_extents(x.shape()));
}

} // namespace taskvec::inline TASKVEC_ABI
