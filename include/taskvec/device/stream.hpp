// Streams beside the caller's, the order between streams, and pinned host memory: what copies that overlap with work
// need. SPDX-License-Identifier: Apache-2.0
//
// On a Thrust host system everything happens at once, in the order of the calls.
#pragma once

#include <taskvec/device/memory.hpp>

#include <cstddef>
#include <utility>

namespace taskvec::inline TASKVEC_ABI::device {

/// What is queued on `follower` from now on waits for what `leader` has queued so far. The host does not wait.
inline void follow([[maybe_unused]] const gpu& leader, [[maybe_unused]] const gpu& follower)
{
#if TASKVEC_ON_CUDA
    if (leader.stream == follower.stream) { return; }
    cudaEvent_t event{};
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    const cudaError_t recorded = cudaEventRecord(event, stream_of(leader));
    const cudaError_t waiting =
        recorded == cudaSuccess ? cudaStreamWaitEvent(stream_of(follower), event, 0) : cudaSuccess;
    (void)cudaEventDestroy(event); // once it has happened
    check(recorded, "cudaEventRecord");
    check(waiting, "cudaStreamWaitEvent");
#endif
}

/// A stream of its own, with the allocator of another policy. Its destructor waits for it. Move-only.
class side_stream {
public:
    explicit side_stream(const gpu& beside)
        : policy_{nullptr, beside.allocator, nullptr}
    {
#if TASKVEC_ON_CUDA
        cudaStream_t stream{};
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
        policy_.stream = stream;
#endif
    }
    side_stream(side_stream&& other) noexcept
        : policy_(std::exchange(other.policy_, {}))
    { }
    side_stream& operator=(side_stream&& other) noexcept
    {
        std::swap(policy_, other.policy_);
        return *this;
    }
    ~side_stream()
    {
#if TASKVEC_ON_CUDA
        if (policy_.stream) {
            (void)cudaStreamSynchronize(stream_of(policy_));
            (void)cudaStreamDestroy(stream_of(policy_));
        }
#endif
    }
    [[nodiscard]] const gpu& policy() const noexcept { return policy_; }

private:
    gpu policy_;
};

/// Host memory that copies to and from the device read and write by themselves, while the host goes on. Move-only.
class pinned_memory {
public:
    pinned_memory() = default;
    explicit pinned_memory(std::size_t bytes)
        : size_(bytes)
    {
        if (bytes == 0) { return; }
#if TASKVEC_ON_CUDA
        check(cudaHostAlloc(reinterpret_cast<void**>(&data_), bytes, cudaHostAllocDefault), "cudaHostAlloc");
#else
        data_ = static_cast<std::byte*>(std::malloc(bytes));
        if (!data_) { raise<backend_error>(message("no room for ", bytes, " bytes"), "malloc", 0); }
#endif
    }
    pinned_memory(pinned_memory&& other) noexcept
        : data_(std::exchange(other.data_, nullptr))
        , size_(std::exchange(other.size_, 0))
    { }
    pinned_memory& operator=(pinned_memory&& other) noexcept
    {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }
    ~pinned_memory()
    {
#if TASKVEC_ON_CUDA
        if (data_) { (void)cudaFreeHost(data_); }
#else
        std::free(data_);
#endif
    }
    [[nodiscard]] std::byte* data() const noexcept { return data_; }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }

private:
    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

/// Copies from device memory to pinned memory, in the stream's order; does not wait.
inline void download_later([[maybe_unused]] const gpu& policy, void* to, const void* from, std::size_t bytes)
{
    if (bytes == 0) { return; }
#if TASKVEC_ON_CUDA
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(policy)), "cudaMemcpyAsync");
#else
    std::memcpy(to, from, bytes);
#endif
}

} // namespace taskvec::inline TASKVEC_ABI::device
