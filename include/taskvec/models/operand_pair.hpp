// Pairs of operands of a tensor, whose dot products algorithms ask for.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// Two operands of a tensor by number: 0 is the base, 1 + t task t, and 1 + T + b what lies beside the models (T
/// tasks).
struct operand_pair {
    std::uint32_t first = 0, second = 0; ///< numbers of operands
};

} // namespace taskvec::inline TASKVEC_ABI
