// The names of HIP's runtime that device/ is written on, for AMD's devices: memory, streams, events and errors.
// SPDX-License-Identifier: Apache-2.0
//
// NEVER COMPILED AGAINST ROCM, and never run: written from HIP's documentation, and held by a test to the list of names
// of cuda.hpp and to declarations of HIP's functions as documented. What is missing for a HIP build beside it is a
// folder of linear algebra (hipBLAS and hipSOLVER, as device/cusolver), and Thrust for HIP in device/thrust.
#pragma once

#include <taskvec/device/vendor/failure.hpp>

#include <hip/hip_runtime_api.h>

#include <cstddef>

namespace taskvec::inline TASKVEC_ABI::device::vendor {

inline constexpr const char* name = "HIP";
inline constexpr const char* visible_devices = "HIP_VISIBLE_DEVICES";
inline constexpr const char* architectures = "CMAKE_HIP_ARCHITECTURES";

// Types.

using error_type = hipError_t;
using stream_type = hipStream_t;
using event_type = hipEvent_t;

// Errors.

inline constexpr error_type success = hipSuccess;
inline constexpr error_type no_device = hipErrorNoDevice;
inline constexpr error_type out_of_memory = hipErrorOutOfMemory;

/// What kind of failure a code is.
[[nodiscard]] inline failure kind_of(error_type code) noexcept
{
    switch (code) {
    case hipErrorOutOfMemory: return failure::memory;
    case hipErrorNoDevice: return failure::no_device;
    case hipErrorInsufficientDriver: return failure::driver;
    case hipErrorNoBinaryForGpu: return failure::architecture;
    case hipErrorIllegalAddress:
    case hipErrorLaunchFailure:
    case hipErrorLaunchTimeOut:
    case hipErrorAssert:
    case hipErrorECCNotCorrectable: return failure::lost;
    default: return failure::other;
    }
}
[[nodiscard]] inline const char* name_of(error_type code)
{
    return hipGetErrorName(code);
}
[[nodiscard]] inline const char* words_of(error_type code)
{
    return hipGetErrorString(code);
}
/// The last error of this thread, which is then forgotten unless it sticks.
inline error_type take_last_error()
{
    return hipGetLastError();
}
[[nodiscard]] inline error_type peek_last_error()
{
    return hipPeekAtLastError();
}

// Calls. Those with a stream queue their work there.

[[nodiscard]] inline error_type count_devices(int* count)
{
    return hipGetDeviceCount(count);
}
[[nodiscard]] inline error_type synchronize(stream_type stream)
{
    return hipStreamSynchronize(stream);
}
[[nodiscard]] inline error_type copy_to_device(void* to, const void* from, std::size_t bytes, stream_type stream)
{
    return hipMemcpyAsync(to, from, bytes, hipMemcpyHostToDevice, stream);
}
[[nodiscard]] inline error_type copy_to_host(void* to, const void* from, std::size_t bytes, stream_type stream)
{
    return hipMemcpyAsync(to, from, bytes, hipMemcpyDeviceToHost, stream);
}
[[nodiscard]] inline error_type copy_on_device(void* to, const void* from, std::size_t bytes, stream_type stream)
{
    return hipMemcpyAsync(to, from, bytes, hipMemcpyDeviceToDevice, stream);
}
/// `rows` runs of `bytes` bytes, which start every to_pitch and from_pitch bytes.
[[nodiscard]] inline error_type copy_runs_on_device(void* to, std::size_t to_pitch, const void* from,
    std::size_t from_pitch, std::size_t bytes, std::size_t rows, stream_type stream)
{
    return hipMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, hipMemcpyDeviceToDevice, stream);
}
[[nodiscard]] inline error_type copy_runs_to_host(void* to, std::size_t to_pitch, const void* from,
    std::size_t from_pitch, std::size_t bytes, std::size_t rows, stream_type stream)
{
    return hipMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, hipMemcpyDeviceToHost, stream);
}
[[nodiscard]] inline error_type clear(void* place, std::size_t bytes, stream_type stream)
{
    return hipMemsetAsync(place, 0, bytes, stream);
}
[[nodiscard]] inline error_type allocate(void** place, std::size_t bytes, stream_type stream)
{
    return hipMallocAsync(place, bytes, stream);
}
inline error_type deallocate(void* place, stream_type stream)
{
    return hipFreeAsync(place, stream);
}
[[nodiscard]] inline error_type allocate_pinned(void** place, std::size_t bytes)
{
    return hipHostMalloc(place, bytes, hipHostMallocDefault);
}
inline error_type deallocate_pinned(void* place)
{
    return hipHostFree(place);
}
[[nodiscard]] inline error_type create_stream(stream_type* stream)
{
    return hipStreamCreateWithFlags(stream, hipStreamNonBlocking);
}
inline error_type destroy_stream(stream_type stream)
{
    return hipStreamDestroy(stream);
}
[[nodiscard]] inline error_type create_event(event_type* event)
{
    return hipEventCreateWithFlags(event, hipEventDisableTiming);
}
[[nodiscard]] inline error_type record_event(event_type event, stream_type stream)
{
    return hipEventRecord(event, stream);
}
[[nodiscard]] inline error_type wait_for_event(stream_type stream, event_type event)
{
    return hipStreamWaitEvent(stream, event, 0);
}
inline error_type destroy_event(event_type event)
{
    return hipEventDestroy(event);
}

/// What errors call these calls.
namespace calls {
inline constexpr const char* count_devices = "hipGetDeviceCount";
inline constexpr const char* synchronize = "hipStreamSynchronize";
inline constexpr const char* copy = "hipMemcpyAsync";
inline constexpr const char* copy_runs = "hipMemcpy2DAsync";
inline constexpr const char* clear = "hipMemsetAsync";
inline constexpr const char* allocate = "hipMallocAsync";
inline constexpr const char* allocate_pinned = "hipHostMalloc";
inline constexpr const char* create_stream = "hipStreamCreateWithFlags";
inline constexpr const char* create_event = "hipEventCreateWithFlags";
inline constexpr const char* record_event = "hipEventRecord";
inline constexpr const char* wait_for_event = "hipStreamWaitEvent";
} // namespace calls

} // namespace taskvec::inline TASKVEC_ABI::device::vendor
