// How the weight of a linear layer is stored.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// How a linear layer's weight lies in memory, row-major: as torch's Linear stores it, or as transformers' Conv1D does.
enum class weight_layout : std::uint8_t {
    out_in, ///< y = x·Wᵀ: a row for each output
    in_out ///< y = x·W: a row for each input
};

} // namespace taskvec::inline TASKVEC_ABI
