// Whose device this program is compiled for: CUDA, HIP, or none, where THRUST_DEVICE_SYSTEM names a host system and
// device memory is host memory.
// SPDX-License-Identifier: Apache-2.0
//
// TASKVEC_ON_DEVICE is 1 where there is a vendor, whose names are then in device::vendor; TASKVEC_ON_CUDA and
// TASKVEC_ON_HIP say which. A new vendor is a header beside cuda.hpp with the same names, two lines here, a folder of
// linear algebra with its line in device/linalg/backend.hpp, and Thrust's execution policies for it in device/thrust.
#pragma once

#if defined(__HIPCC__) || defined(__HIP_PLATFORM_AMD__)
#define TASKVEC_ON_HIP 1
#define TASKVEC_ON_CUDA 0
#elif defined(__CUDACC__) || !defined(THRUST_DEVICE_SYSTEM)
/// 1 where the program is compiled for HIP, 0 elsewhere.
#define TASKVEC_ON_HIP 0
/// 1 where the program is compiled for CUDA, 0 elsewhere.
#define TASKVEC_ON_CUDA 1
#else
#define TASKVEC_ON_HIP 0
#define TASKVEC_ON_CUDA 0
#endif
/// 1 where the program is compiled for a vendor's device, 0 for a Thrust host system.
#define TASKVEC_ON_DEVICE (TASKVEC_ON_CUDA || TASKVEC_ON_HIP)

#if TASKVEC_ON_CUDA
#include <taskvec/device/vendor/cuda.hpp>
#elif TASKVEC_ON_HIP
#include <taskvec/device/vendor/hip.hpp>
#endif
