// Everything that runs on taskvec::gpu. For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host system.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/backend/thrust/system.hpp>
