// taskvec::compiled: the decompositions in f32.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/linalg/factored_svd.hpp>
#include <taskvec/linalg/randomized_svd.hpp>
#include <taskvec/linalg/truncated_svd.hpp>

namespace taskvec::inline TASKVEC_ABI {

// What f64 has is in linalg_f64.cpp.
TASKVEC_COMPILED_SMALL_MATRICES(extern)
TASKVEC_COMPILED_MATRICES(extern, double)

TASKVEC_COMPILED_MATRICES(, float)
TASKVEC_COMPILED_FACTORED_SVD(, float)
TASKVEC_COMPILED_RANDOMIZED_SVD(, float)
TASKVEC_COMPILED_TRUNCATED_SVD(, float)
TASKVEC_COMPILED_LEADING_SVD()

} // namespace taskvec::inline TASKVEC_ABI
