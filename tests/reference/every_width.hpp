// A kernel at every width of packs that the processor has.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/instruction_set.hpp>

namespace testing {

/// Runs `kernel` on scalars and with each width in turn; check(bytes) follows each run, with 0 for scalars first.
template <class Kernel, class Check>
void with_every_width(const Kernel& kernel, const Check& check)
{
    using namespace taskvec;
    kernels::run_scalar(kernel);
    check(0);
#if TASKVEC_VECTORS()
    kernels::run_baseline(kernel);
    check(16);
#if TASKVEC_WIDE_VECTORS()
    if (current_instruction_set() >= instruction_set::avx2) {
        kernels::run_avx2(kernel);
        check(32);
    }
    if (current_instruction_set() >= instruction_set::avx512) {
        kernels::run_avx512(kernel);
        check(64);
    }
#endif
#endif
}

} // namespace testing
