// Fisher-weighted averages as an elementwise functor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/elements.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::elementwise {

TASKVEC_KERNELS_BEGIN

/// Σ (ct·Ft)·θt / Σ ct·Ft, or Σ ct·θt / Σ ct where the denominator is below `floor`. Ft is operand 1 + T + t (null
/// data: 0). factors: T of the Fishers, then T of the plain average, whose sum is `total`. The least place of a
/// negative entry goes to *negative, of NaN and infinity in a Fisher to *nonfinite.
template <arithmetic_element A>
struct fisher_average {
    device_piece piece;
    const A* factors;
    A total, floor;
    counter *flag, *nonfinite, *negative;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        const std::size_t tasks = piece.tasks;
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            const std::uint64_t place = piece.position + i;
            A above = 0, below = 0, plain = 0;
            for (std::size_t t = 0; t < tasks; ++t) {
                const A value = load<A>(piece.operands[1 + t], i, place, flag);
                plain = sum(plain, product(factors[tasks + t], value));
                const aligned_tensor::operand& fisher = piece.operands[1 + tasks + t];
                if (!fisher.data) { continue; }
                const A f = load<A>(fisher, i, place, nonfinite);
                if (f < 0) { atomic_min(negative, place); }
                const A importance = product(factors[t], f);
                above = sum(above, product(importance, value));
                below = sum(below, importance);
            }
            store(piece.out, piece.out_dtype, i, below < floor ? quotient(plain, total) : quotient(above, below));
        }
    }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI::elementwise
