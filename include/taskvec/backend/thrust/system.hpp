// The Thrust system under taskvec::gpu: its execution policy, its memory, its errors.
// SPDX-License-Identifier: Apache-2.0
//
// One source for every system: nvcc compiles it for CUDA; g++ and clang compile it for OMP, TBB or CPP where the build sets
// THRUST_DEVICE_SYSTEM, and device memory is then host memory. No Thrust name appears in a public interface, and the inline
// namespace names the system (core/config.hpp), so objects built for different systems link side by side; their Thrust parts
// do not, so a program uses one system.
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/policy.hpp>

#include <thrust/detail/config.h>

#if THRUST_DEVICE_SYSTEM == THRUST_DEVICE_SYSTEM_CUDA
#if !defined(__CUDACC__)
#error "taskvec on the gpu: compile this file with nvcc, or for host threads with -DTHRUST_DEVICE_SYSTEM=THRUST_DEVICE_SYSTEM_OMP -fopenmp"
#endif
#define TASKVEC_ON_CUDA 1
#include <thrust/system/cuda/execution_policy.h>

#include <cuda_runtime.h>
#else
#if defined(__CUDACC__)
#error "taskvec on the gpu: nvcc builds for the CUDA system only; compile this file with the host compiler for another THRUST_DEVICE_SYSTEM"
#endif
#define TASKVEC_ON_CUDA 0
#include <thrust/execution_policy.h>
#endif

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::device {

#if TASKVEC_ON_CUDA
/// Throws backend_error, with CUDA's code and its words for it, unless a call succeeded.
inline void check(cudaError_t code, const char* call)
{
    if (code == cudaSuccess) { return; }
    (void)cudaGetLastError(); // what is not sticky has now been reported
    std::string text = message(cudaGetErrorName(code), ", ", cudaGetErrorString(code));
    if (code == cudaErrorMemoryAllocation) { text += ": use smaller tensors or a smaller memory budget, or free device memory"; }
    raise<backend_error>(text, call, static_cast<int>(code));
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

/// What Thrust's algorithms take first. On CUDA they queue on the caller's stream and do not wait.
[[nodiscard]] inline auto execution([[maybe_unused]] const gpu& policy)
{
#if TASKVEC_ON_CUDA
    return thrust::cuda::par_nosync.on(stream_of(policy));
#else
    return thrust::device;
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

/// `size` elements of T in device memory, from the policy's allocator, in its stream's order. Not initialised; move-only.
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
    [[nodiscard]] device_view<T> view() const noexcept requires storage_element<T> { return {data_, size_}; }
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
    static void* allocate(const gpu& policy, std::size_t bytes)
    {
        if (policy.allocator) {
            void* const place = policy.allocator->allocate(bytes, policy.stream);
            if (!place) { raise<backend_error>(message("no room for ", bytes, " bytes of scratch"), "gpu::allocator->allocate", 0); }
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
    static void deallocate(const gpu& policy, void* place, std::size_t bytes) noexcept
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

    gpu policy_{};
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

} // namespace taskvec::inline TASKVEC_ABI::device
