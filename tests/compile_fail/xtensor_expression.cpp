// An xtensor expression is computed where it is read: it has no view and is no tensor or matrix, which a sentence says.
// SPDX-License-Identifier: Apache-2.0
// error: an xtensor expression has no elements in memory: evaluate it first
#include <taskvec/interop/xtensor.hpp>

#include <array>
#include <cstddef>

// The part of xtensor's interface that matters, so that this needs no xtensor.
enum class layout_type { row_major, column_major };
struct expression {
    using value_type = float;
    static constexpr layout_type static_layout = layout_type::row_major;
    const expression& derived_cast() const;
    std::array<std::size_t, 2> shape() const;
};
struct container : expression {
    const float* data() const;
    std::size_t data_offset() const;
    std::array<std::ptrdiff_t, 2> strides() const;
};

#if defined(TASKVEC_FAULT)
using tensor = expression;
#else
using tensor = container;
#endif

void f(const tensor& sum)
{
    (void)taskvec::as_tensor(sum);
    (void)taskvec::as_matrix(sum);
    (void)taskvec::as_view(sum);
}
