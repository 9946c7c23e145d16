// A column-major xtensor container is no row-major tensor: its view is refused with a sentence.
// SPDX-License-Identifier: Apache-2.0
// error: a column-major xtensor container holds the transposed tensor
#include <taskvec/interop/xtensor.hpp>

#include <array>

// The part of xtensor's interface that matters, so that this needs no xtensor.
enum class layout_type { row_major, column_major };
template <layout_type L>
struct container {
    static constexpr layout_type static_layout = L;
    float* data();
    std::size_t data_offset();
    std::array<std::size_t, 2> shape();
    std::array<std::ptrdiff_t, 2> strides();
};

#if defined(TASKVEC_FAULT)
using tensor = container<layout_type::column_major>;
#else
using tensor = container<layout_type::row_major>;
#endif

taskvec::host_view<float> f(tensor& weight)
{
    return taskvec::as_view(weight);
}
