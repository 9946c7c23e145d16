// The names of CUDA's runtime that device/ is written on: memory, streams, events and errors.
// SPDX-License-Identifier: Apache-2.0
//
// A vendor is one such header and a folder of linear algebra (device/cusolver here). These are calls of the runtime,
// which any C++ compiler makes; only kernels need nvcc. Every vendor's header declares the same names.
#pragma once

#include <taskvec/device/vendor/failure.hpp>

#include <cuda_runtime_api.h>

#include <cstddef>

namespace taskvec::inline TASKVEC_ABI::device::vendor {

inline constexpr const char* name = "CUDA";
inline constexpr const char* visible_devices = "CUDA_VISIBLE_DEVICES";
inline constexpr const char* architectures = "CMAKE_CUDA_ARCHITECTURES";

// Types.

using error_type = cudaError_t;
using stream_type = cudaStream_t;
using event_type = cudaEvent_t;

// Errors.

inline constexpr error_type success = cudaSuccess;
inline constexpr error_type no_device = cudaErrorNoDevice;
inline constexpr error_type out_of_memory = cudaErrorMemoryAllocation;

/// What kind of failure a code is.
[[nodiscard]] inline failure kind_of(error_type code) noexcept
{
    switch (code) {
    case cudaErrorMemoryAllocation: return failure::memory;
    case cudaErrorNoDevice: return failure::no_device;
    case cudaErrorInsufficientDriver: return failure::driver;
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion: return failure::architecture;
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorECCUncorrectable: return failure::lost;
    default: return failure::other;
    }
}
[[nodiscard]] inline const char* name_of(error_type code)
{
    return cudaGetErrorName(code);
}
[[nodiscard]] inline const char* words_of(error_type code)
{
    return cudaGetErrorString(code);
}
/// The last error of this thread, which is then forgotten unless it sticks.
inline error_type take_last_error()
{
    return cudaGetLastError();
}
[[nodiscard]] inline error_type peek_last_error()
{
    return cudaPeekAtLastError();
}

// Calls. Those with a stream queue their work there.

[[nodiscard]] inline error_type count_devices(int* count)
{
    return cudaGetDeviceCount(count);
}
[[nodiscard]] inline error_type synchronize(stream_type stream)
{
    return cudaStreamSynchronize(stream);
}
[[nodiscard]] inline error_type copy_to_device(void* to, const void* from, std::size_t bytes, stream_type stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
}
[[nodiscard]] inline error_type copy_to_host(void* to, const void* from, std::size_t bytes, stream_type stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream);
}
[[nodiscard]] inline error_type copy_on_device(void* to, const void* from, std::size_t bytes, stream_type stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
/// `rows` runs of `bytes` bytes, which start every to_pitch and from_pitch bytes.
[[nodiscard]] inline error_type copy_runs_on_device(void* to, std::size_t to_pitch, const void* from,
    std::size_t from_pitch, std::size_t bytes, std::size_t rows, stream_type stream)
{
    return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, cudaMemcpyDeviceToDevice, stream);
}
[[nodiscard]] inline error_type copy_runs_to_host(void* to, std::size_t to_pitch, const void* from,
    std::size_t from_pitch, std::size_t bytes, std::size_t rows, stream_type stream)
{
    return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, cudaMemcpyDeviceToHost, stream);
}
[[nodiscard]] inline error_type clear(void* place, std::size_t bytes, stream_type stream)
{
    return cudaMemsetAsync(place, 0, bytes, stream);
}
[[nodiscard]] inline error_type allocate(void** place, std::size_t bytes, stream_type stream)
{
    return cudaMallocAsync(place, bytes, stream);
}
inline error_type deallocate(void* place, stream_type stream)
{
    return cudaFreeAsync(place, stream);
}
[[nodiscard]] inline error_type allocate_pinned(void** place, std::size_t bytes)
{
    return cudaHostAlloc(place, bytes, cudaHostAllocDefault);
}
inline error_type deallocate_pinned(void* place)
{
    return cudaFreeHost(place);
}
[[nodiscard]] inline error_type create_stream(stream_type* stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
}
inline error_type destroy_stream(stream_type stream)
{
    return cudaStreamDestroy(stream);
}
[[nodiscard]] inline error_type create_event(event_type* event)
{
    return cudaEventCreateWithFlags(event, cudaEventDisableTiming);
}
[[nodiscard]] inline error_type record_event(event_type event, stream_type stream)
{
    return cudaEventRecord(event, stream);
}
[[nodiscard]] inline error_type wait_for_event(stream_type stream, event_type event)
{
    return cudaStreamWaitEvent(stream, event, 0);
}
inline error_type destroy_event(event_type event)
{
    return cudaEventDestroy(event);
}

/// What errors call these calls.
namespace calls {
inline constexpr const char* count_devices = "cudaGetDeviceCount";
inline constexpr const char* synchronize = "cudaStreamSynchronize";
inline constexpr const char* copy = "cudaMemcpyAsync";
inline constexpr const char* copy_runs = "cudaMemcpy2DAsync";
inline constexpr const char* clear = "cudaMemsetAsync";
inline constexpr const char* allocate = "cudaMallocAsync";
inline constexpr const char* allocate_pinned = "cudaHostAlloc";
inline constexpr const char* create_stream = "cudaStreamCreateWithFlags";
inline constexpr const char* create_event = "cudaEventCreateWithFlags";
inline constexpr const char* record_event = "cudaEventRecord";
inline constexpr const char* wait_for_event = "cudaStreamWaitEvent";
} // namespace calls

} // namespace taskvec::inline TASKVEC_ABI::device::vendor
