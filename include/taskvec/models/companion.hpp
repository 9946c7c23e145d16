// Memory that lies beside aligned models: what a method reads of each tensor besides the base and the tasks.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// Memory that a method reads beside the models (the statistics of a tensor, say), for the check of aliases.
struct companion {
    std::size_t tensor = 0; ///< index in aligned_models::tensors()
    const std::byte* data = nullptr;
    std::size_t bytes = 0; ///< that are read from `data` on
};

} // namespace taskvec::inline TASKVEC_ABI
