// Device memory of taskvec::gpu and CUDA's errors, without Thrust: what library calls from plain g++ need as well as
// kernels. SPDX-License-Identifier: Apache-2.0
//
// CUDA unless THRUST_DEVICE_SYSTEM names a host system: then device memory is host memory, and nothing of CUDA is
// included. These are calls of the CUDA runtime, which any C++ compiler makes; only kernels need nvcc.
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/policy.hpp>

#if defined(__CUDACC__) || !defined(THRUST_DEVICE_SYSTEM)
#define TASKVEC_ON_CUDA 1
#include <cuda_runtime_api.h>
#else
#define TASKVEC_ON_CUDA 0
#endif

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::device {

#if TASKVEC_ON_CUDA
/// What to do about a CUDA error; empty where nothing general can be said.
[[nodiscard]] inline std::string_view advice(cudaError_t code) noexcept
{
    switch (code) {
    case cudaErrorMemoryAllocation:
        return ": out of device memory; use smaller tensors or a smaller memory budget, or free device memory";
    case cudaErrorNoDevice:
        return ": no CUDA device is visible to this process; run on taskvec::cpu, or look at CUDA_VISIBLE_DEVICES";
    case cudaErrorInsufficientDriver:
        return ": the driver is missing or older than this CUDA runtime; install a newer driver, or run on "
               "taskvec::cpu";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
        return ": this program was not compiled for the architecture of the device; add it to CMAKE_CUDA_ARCHITECTURES";
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorECCUncorrectable:
        return ": earlier work on the device failed, and everything after it fails so until the process starts anew; "
               "its results are lost";
    default: return {};
    }
}

/// Throws backend_error, with CUDA's code and its words for it, unless a call succeeded.
inline void check(cudaError_t code, const char* call)
{
    if (code == cudaSuccess) { return; }
    (void)cudaGetLastError(); // what is not sticky has now been reported
    raise<backend_error>(
        message(cudaGetErrorName(code), ", ", cudaGetErrorString(code), advice(code)), call, static_cast<int>(code));
}

[[nodiscard]] inline cudaStream_t stream_of(const gpu& policy) noexcept
{
    return static_cast<cudaStream_t>(policy.stream);
}
#endif

/// Throws backend_error when no device answers. Costs nothing that matters; whoever wants to fail early calls it.
inline void require_device()
{
#if TASKVEC_ON_CUDA
    int count = 0;
    check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
    if (count == 0) { check(cudaErrorNoDevice, "cudaGetDeviceCount"); }
#endif
}

/// Waits for what was queued on the policy's stream; its errors come to light here.
inline void synchronize([[maybe_unused]] const gpu& policy)
{
#if TASKVEC_ON_CUDA
    check(cudaStreamSynchronize(stream_of(policy)), "cudaStreamSynchronize");
#endif
}

/// Copies from host to device memory, in the stream's order. From pageable memory the source may be reused at once.
inline void upload([[maybe_unused]] const gpu& policy, void* to, const void* from, std::size_t bytes)
{
    if (bytes == 0) { return; }
#if TASKVEC_ON_CUDA
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(policy)), "cudaMemcpyAsync");
#else
    std::memcpy(to, from, bytes);
#endif
}

/// Copies from device to host memory and waits for it.
inline void download([[maybe_unused]] const gpu& policy, void* to, const void* from, std::size_t bytes)
{
    if (bytes > 0) {
#if TASKVEC_ON_CUDA
        check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(policy)), "cudaMemcpyAsync");
#else
        std::memcpy(to, from, bytes);
#endif
    }
    synchronize(policy);
}

/// Copies within device memory, in the stream's order.
inline void copy([[maybe_unused]] const gpu& policy, void* to, const void* from, std::size_t bytes)
{
    if (bytes == 0 || to == from) { return; }
#if TASKVEC_ON_CUDA
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_of(policy)), "cudaMemcpyAsync");
#else
    std::memcpy(to, from, bytes);
#endif
}

/// Sets bytes of device memory to 0, in the stream's order.
inline void clear([[maybe_unused]] const gpu& policy, void* place, std::size_t bytes)
{
    if (bytes == 0) { return; }
#if TASKVEC_ON_CUDA
    check(cudaMemsetAsync(place, 0, bytes, stream_of(policy)), "cudaMemsetAsync");
#else
    std::memset(place, 0, bytes);
#endif
}

/// Device memory from the policy's allocator, or cudaMallocAsync; never null. Errors: backend_error.
[[nodiscard]] inline void* allocate(const gpu& policy, std::size_t bytes)
{
    if (policy.allocator) {
        void* const place = policy.allocator->allocate(bytes, policy.stream);
        if (!place) {
            raise<backend_error>(message("no room for ", bytes, " bytes of scratch"), "gpu::allocator->allocate", 0);
        }
        return place;
    }
    void* place = nullptr;
#if TASKVEC_ON_CUDA
    check(cudaMallocAsync(&place, bytes, stream_of(policy)), "cudaMallocAsync");
#else
    place = std::malloc(bytes);
    if (!place) { raise<backend_error>(message("no room for ", bytes, " bytes of scratch"), "malloc", 0); }
#endif
    return place;
}
inline void deallocate(const gpu& policy, void* place, std::size_t bytes) noexcept
{
    if (policy.allocator) {
        policy.allocator->deallocate(place, bytes, policy.stream);
        return;
    }
#if TASKVEC_ON_CUDA
    (void)cudaFreeAsync(place, stream_of(policy));
#else
    (void)bytes;
    std::free(place);
#endif
}

/// `size` elements of T in device memory, from the policy's allocator, in its stream's order. Not initialised;
/// move-only.
///
///     device::buffer<float> x(policy, values);   // a copy of a host vector
///     device_view<float> view = x.view();
///     std::vector<float> back = x.download();
template <class T>
    requires std::is_trivially_copyable_v<T>
class buffer {
public:
    buffer() = default;
    buffer(const gpu& policy, std::size_t size)
        : policy_(policy)
        , size_(size)
    {
        if (size_ > 0) { data_ = static_cast<T*>(allocate(policy_, size_ * sizeof(T))); }
    }
    buffer(const gpu& policy, const std::vector<T>& values)
        : buffer(policy, values.size())
    {
        assign(values.data(), values.size());
    }
    buffer(buffer&& other) noexcept
        : policy_(other.policy_)
        , data_(std::exchange(other.data_, nullptr))
        , size_(std::exchange(other.size_, 0))
    { }
    buffer& operator=(buffer&& other) noexcept
    {
        std::swap(policy_, other.policy_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~buffer()
    {
        if (data_) { deallocate(policy_, data_, size_ * sizeof(T)); }
    }

    [[nodiscard]] T* data() const noexcept { return data_; }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    [[nodiscard]] auto view() const noexcept
        requires storage_element<T>
    {
        return device_view<T>(data_, size_);
    }
    void assign(const T* from, std::size_t count) { upload(policy_, data_, from, count * sizeof(T)); }
    void clear() { device::clear(policy_, data_, size_ * sizeof(T)); }
    /// The elements, on the host. Waits.
    [[nodiscard]] std::vector<T> download() const
    {
        std::vector<T> values(size_);
        device::download(policy_, static_cast<void*>(values.data()), data_, size_ * sizeof(T));
        return values;
    }

private:
    gpu policy_{};
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

} // namespace taskvec::inline TASKVEC_ABI::device
