// Linear combinations as elementwise functors: what the gpu policy's arithmetic is made of.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/elements.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::elementwise {

TASKVEC_KERNELS_BEGIN

/// out = Σ weights[t]·xt, where xt is operand 1 + t: +0 first, then in order; each product and sum rounds in A, and the
/// result once more in its storage type.
template <arithmetic_element A>
struct linear_combination {
    device_piece piece;
    const A* weights;
    std::size_t count;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            A total = 0;
            for (std::size_t t = 0; t < count; ++t) {
                const A value = load<A>(piece.operands[1 + t], i, piece.position + i, flag);
                total = sum(total, product(weights[t], value));
            }
            store(piece.out, piece.out_dtype, i, total);
        }
    }
};

enum class pointwise_operation : std::uint8_t { difference, apply, negate };

/// out = x1 − x2, x1 + factor·x2, or −x1, for operands x1, x2.
template <arithmetic_element A>
struct pointwise {
    device_piece piece;
    pointwise_operation operation;
    A factor;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            const A x = load<A>(piece.operands[1], i, piece.position + i, flag);
            A result = -x;
            if (operation != pointwise_operation::negate) {
                const A y = load<A>(piece.operands[2], i, piece.position + i, flag);
                result = operation == pointwise_operation::difference ? difference(x, y) : sum(x, product(factor, y));
            }
            store(piece.out, piece.out_dtype, i, result);
        }
    }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI::elementwise
