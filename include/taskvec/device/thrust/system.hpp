// The Thrust system under taskvec::gpu: its execution policy, its memory, its errors.
// SPDX-License-Identifier: Apache-2.0
//
// One source for every system: nvcc compiles it for CUDA; g++ and clang compile it for OMP, TBB or CPP where the build
// sets THRUST_DEVICE_SYSTEM, and device memory is then host memory. No Thrust name appears in a public interface, and
// the inline namespace names the system (core/config.hpp), so objects built for different systems link side by side;
// their Thrust parts do not, so a program uses one system.
#pragma once

#include <taskvec/device/memory.hpp>

#if TASKVEC_ON_DEVICE && !TASKVEC_ON_CUDA
#error                                                                                                                 \
    "taskvec on HIP: there is no walk over elements yet; expected rocThrust's execution policies, on the stream of taskvec::gpu, in taskvec/device/thrust"
#endif

#include <thrust/detail/config.h>

#if THRUST_DEVICE_SYSTEM == THRUST_DEVICE_SYSTEM_CUDA
#if !defined(__CUDACC__)
#error                                                                                                                 \
    "taskvec on the gpu: compile this file with nvcc, or for host threads with -DTHRUST_DEVICE_SYSTEM=THRUST_DEVICE_SYSTEM_OMP -fopenmp"
#endif
#include <thrust/system/cuda/execution_policy.h>
#else
#if defined(__CUDACC__)
#error                                                                                                                 \
    "taskvec on the gpu: nvcc builds for the CUDA system only; compile this file with the host compiler for another THRUST_DEVICE_SYSTEM"
#endif
#include <thrust/execution_policy.h>
#endif

namespace taskvec::inline TASKVEC_ABI::device {

/// What Thrust's algorithms take first. On CUDA they queue on the caller's stream and do not wait.
[[nodiscard]] inline auto execution([[maybe_unused]] const gpu& policy)
{
#if TASKVEC_ON_CUDA
    return thrust::cuda::par_nosync.on(stream_of(policy));
#else
    return thrust::device;
#endif
}

} // namespace taskvec::inline TASKVEC_ABI::device
