// What kinds of failures a vendor's error codes are: what can be said about them is the same for every vendor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::device {

/// What kind of failure a vendor's code stands for.
enum class failure : std::uint8_t {
    other,
    memory, ///< out of device memory
    no_device, ///< no device is visible
    driver, ///< the driver is missing or too old
    architecture, ///< the program holds no code for the device
    lost ///< earlier work failed, and everything after it fails too
};

} // namespace taskvec::inline TASKVEC_ABI::device
