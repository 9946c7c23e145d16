// taskvec::compiled: the decompositions in f64.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/linalg/factored_svd.hpp>
#include <taskvec/linalg/randomized_svd.hpp>
#include <taskvec/linalg/truncated_svd.hpp>

namespace taskvec::inline TASKVEC_ABI {

// What f32 has is in linalg_f32.cpp.
TASKVEC_COMPILED_MATRICES(extern, float)

TASKVEC_COMPILED_SMALL_MATRICES()
TASKVEC_COMPILED_MATRICES(, double)
TASKVEC_COMPILED_FACTORED_SVD(, double)
TASKVEC_COMPILED_RANDOMIZED_SVD(, double)
TASKVEC_COMPILED_TRUNCATED_SVD(, double)

} // namespace taskvec::inline TASKVEC_ABI
