// taskvec::compiled: what is done with adapters.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/extract.hpp>
#include <taskvec/adapters/merge_adapters.hpp>
#include <taskvec/reuse/peru_lora.hpp>

namespace taskvec::inline TASKVEC_ABI {

// What decompositions need is in linalg_f32.cpp and linalg_f64.cpp.
TASKVEC_COMPILED_SMALL_MATRICES(extern)
TASKVEC_COMPILED_MATRICES(extern, float)
TASKVEC_COMPILED_MATRICES(extern, double)
TASKVEC_COMPILED_FACTORED_SVD(extern, float)
TASKVEC_COMPILED_FACTORED_SVD(extern, double)

TASKVEC_COMPILED_MERGE_ADAPTERS(, float)
TASKVEC_COMPILED_MERGE_ADAPTERS(, double)
TASKVEC_COMPILED_EXTRACT(, float)
TASKVEC_COMPILED_EXTRACT(, double)
TASKVEC_COMPILED_PERU_LORA(, float)
TASKVEC_COMPILED_PERU_LORA(, double)

} // namespace taskvec::inline TASKVEC_ABI
