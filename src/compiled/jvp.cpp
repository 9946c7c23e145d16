// taskvec::compiled: the products of forward mode.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/linear.hpp>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_COMPILED_JVP_PRODUCTS(, float)
TASKVEC_COMPILED_JVP_PRODUCTS(, double)

} // namespace taskvec::inline TASKVEC_ABI
