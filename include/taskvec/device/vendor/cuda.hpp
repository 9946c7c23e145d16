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

/// The vendor's word for its devices.
inline constexpr const char* name = "CUDA";
/// The environment variable that hides devices.
inline constexpr const char* visible_devices = "CUDA_VISIBLE_DEVICES";
/// The CMake variable that chooses what code a program holds.
inline constexpr const char* architectures = "CMAKE_CUDA_ARCHITECTURES";

// Types.

/// A code of the runtime.
using error_type = cudaError_t;
/// A stream: what gpu::stream points to.
using stream_type = cudaStream_t;
/// An event on a stream.
using event_type = cudaEvent_t;

// Errors.

/// The code of a call that did what it was asked.
inline constexpr error_type success = cudaSuccess;
/// The code where there is no device.
inline constexpr error_type no_device = cudaErrorNoDevice;
/// The code where memory is short.
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
/// The name of a code.
[[nodiscard]] inline const char* name_of(error_type code)
{
    return cudaGetErrorName(code);
}
/// What the runtime says of a code.
[[nodiscard]] inline const char* words_of(error_type code)
{
    return cudaGetErrorString(code);
}
/// The last error of this thread, which is then forgotten unless it sticks.
inline error_type take_last_error()
{
    return cudaGetLastError();
}
/// The last error of this thread, which stays.
[[nodiscard]] inline error_type peek_last_error()
{
    return cudaPeekAtLastError();
}

// Calls. Those with a stream queue their work there.

/// How many devices are visible.
[[nodiscard]] inline error_type count_devices(int* count)
{
    return cudaGetDeviceCount(count);
}
/// Waits for all that is queued on a stream.
[[nodiscard]] inline error_type synchronize(stream_type stream)
{
    return cudaStreamSynchronize(stream);
}
/// Copies bytes from the host to the device.
[[nodiscard]] inline error_type copy_to_device(void* to, const void* from, std::size_t bytes, stream_type stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream);
}
/// Copies bytes from the device to the host.
[[nodiscard]] inline error_type copy_to_host(void* to, const void* from, std::size_t bytes, stream_type stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream);
}
/// Copies bytes on the device.
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
/// The same as copy_runs_on_device(), to the host.
[[nodiscard]] inline error_type copy_runs_to_host(void* to, std::size_t to_pitch, const void* from,
    std::size_t from_pitch, std::size_t bytes, std::size_t rows, stream_type stream)
{
    return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, cudaMemcpyDeviceToHost, stream);
}
/// Sets bytes to 0.
[[nodiscard]] inline error_type clear(void* place, std::size_t bytes, stream_type stream)
{
    return cudaMemsetAsync(place, 0, bytes, stream);
}
/// Device memory, in the stream's order.
[[nodiscard]] inline error_type allocate(void** place, std::size_t bytes, stream_type stream)
{
    return cudaMallocAsync(place, bytes, stream);
}
/// Gives device memory back, in the stream's order.
inline error_type deallocate(void* place, stream_type stream)
{
    return cudaFreeAsync(place, stream);
}
/// Host memory that copies read and write by themselves.
[[nodiscard]] inline error_type allocate_pinned(void** place, std::size_t bytes)
{
    return cudaHostAlloc(place, bytes, cudaHostAllocDefault);
}
/// Gives pinned memory back.
inline error_type deallocate_pinned(void* place)
{
    return cudaFreeHost(place);
}
/// A stream that does not wait for the default one.
[[nodiscard]] inline error_type create_stream(stream_type* stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking);
}
/// Gives a stream back once its work is done.
inline error_type destroy_stream(stream_type stream)
{
    return cudaStreamDestroy(stream);
}
/// An event without times.
[[nodiscard]] inline error_type create_event(event_type* event)
{
    return cudaEventCreateWithFlags(event, cudaEventDisableTiming);
}
/// Marks a place on a stream.
[[nodiscard]] inline error_type record_event(event_type event, stream_type stream)
{
    return cudaEventRecord(event, stream);
}
/// What is queued on the stream from now on waits for the event.
[[nodiscard]] inline error_type wait_for_event(stream_type stream, event_type event)
{
    return cudaStreamWaitEvent(stream, event, 0);
}
/// Gives an event back once it has happened.
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
