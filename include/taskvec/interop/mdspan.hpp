// Multidimensional spans (std::mdspan, Kokkos' std::experimental::mdspan, cuda::std::mdspan) as inputs and outputs,
// without a copy.
// SPDX-License-Identifier: Apache-2.0
//
// Written against the interface that all of them share, and includes none of them but the standard one where there is
// one.
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <version>

#if defined(__cpp_lib_mdspan)
#include <mdspan>
#endif

namespace taskvec::inline TASKVEC_ABI {

namespace detail {
/// A multidimensional span over plain memory: its accessor's handle is a pointer to its elements.
template <class X>
concept mdspan_memory = requires(const X& x) {
    typename X::layout_type;
    typename X::accessor_type;
    x.mapping().required_span_size();
    x.is_exhaustive();
    X::rank();
    requires std::same_as<typename X::data_handle_type, typename X::element_type*>;
    requires std::same_as<typename X::reference, typename X::element_type&>;
    requires storage_element<std::remove_const_t<typename X::element_type>>;
};

template <class X>
[[nodiscard]] extents mdspan_extents(const X& x)
{
    extents result;
    for (std::size_t i = 0; i < static_cast<std::size_t>(X::rank()); ++i) {
        result.push_back(static_cast<std::int64_t>(x.extent(i)));
    }
    return result;
}
} // namespace detail

/// A multidimensional span as a flat view, elements in row-major order (layout_right's); the result borrows its memory.
///
/// Accepted: double, float, f16 or bf16 elements with a pointer accessor, where the elements follow
/// one another without holes in row-major order. std::layout_left with two dimensions or more is refused while
/// compiling, other layouts that are not row-major with invalid_argument. The memory is taken to be the host's: over
/// device memory make a device_view instead. Cost: the number of dimensions.
///
///     std::mdspan weight(data, 4, 3);
///     taskvec::host_view<float> flat = taskvec::as_view(weight);
template <class X>
    requires detail::mdspan_memory<std::remove_const_t<X>>
struct view_traits<X> {
    using element = typename X::element_type;
    static host_view<element> get(X& x)
    {
#if defined(__cpp_lib_mdspan)
        static_assert(!std::same_as<typename X::layout_type, std::layout_left> || X::rank() < 2,
            "taskvec: a span with layout_left holds the transposed tensor: use layout_right, or copy it into such a "
            "span first");
#endif
        const_tensor_ref shaped{.shape = detail::mdspan_extents(x)};
        const std::size_t count = shaped.size("mdspan");
        bool row_major = true;
        if constexpr (X::rank() > 0) {
            if (count != 0) {
                row_major = x.is_exhaustive() && x.is_strided();
                for (std::size_t i = 0; row_major && i < static_cast<std::size_t>(X::rank()); ++i) {
                    shaped.strides.push_back(static_cast<std::int64_t>(x.stride(i)));
                }
                row_major = row_major && shaped.contiguous();
            }
        }
        if (!row_major) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("a multidimensional span of shape ", to_string(shaped.shape),
                    " does not hold its elements one after another in row-major order: copy it into one with "
                    "layout_right "
                    "first"));
        }
        return {x.data_handle(), count};
    }
};

/// A multidimensional span as a tensor of its shape. Refuses what as_view refuses.
template <class X>
    requires detail::mdspan_memory<std::remove_cvref_t<X>>
[[nodiscard]] auto as_tensor(X&& x)
{
    return as_tensor(as_view(x), detail::mdspan_extents(x));
}

} // namespace taskvec::inline TASKVEC_ABI
