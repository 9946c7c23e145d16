// The linear algebra seam of the device that this program is compiled for: cuSOLVER's on CUDA, Eigen's on a Thrust host
// system.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/vendor/vendor.hpp>

#if TASKVEC_ON_CUDA
#include <taskvec/device/cusolver/linalg.hpp>
#elif TASKVEC_ON_DEVICE
#error                                                                                                                 \
    "taskvec on HIP: there is no linear algebra yet; expected a folder beside device/cusolver with the operations of taskvec/linalg/linalg.hpp, on hipBLAS and hipSOLVER, and its line in taskvec/device/linalg/backend.hpp"
#else
#include <taskvec/device/linalg/host.hpp>
#endif
