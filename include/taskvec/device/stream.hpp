// Streams beside the caller's, the order between streams, and pinned host memory: what copies that overlap with work
// need.
// SPDX-License-Identifier: Apache-2.0
//
// On a Thrust host system everything happens at once, in the order of the calls.
#pragma once

#include <taskvec/device/memory.hpp>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace taskvec::inline TASKVEC_ABI::device {

/// What is queued on `follower` from now on waits for what `leader` has queued so far. The host does not wait.
inline void follow([[maybe_unused]] const gpu& leader, [[maybe_unused]] const gpu& follower)
{
#if TASKVEC_ON_DEVICE
    if (leader.stream == follower.stream) { return; }
    vendor::event_type event{};
    check(vendor::create_event(&event), vendor::calls::create_event);
    const vendor::error_type recorded = vendor::record_event(event, stream_of(leader));
    const vendor::error_type waiting =
        recorded == vendor::success ? vendor::wait_for_event(stream_of(follower), event) : vendor::success;
    (void)vendor::destroy_event(event); // once it has happened
    check(recorded, vendor::calls::record_event);
    check(waiting, vendor::calls::wait_for_event);
#endif
}

/// A stream of its own, with the allocator of another policy. Its destructor waits for it. Move-only.
class side_stream {
public:
    /// Makes the stream; `beside`: whose allocator it takes. Errors: backend_error.
    explicit side_stream(const gpu& beside)
        : policy_{nullptr, beside.allocator, nullptr}
    {
#if TASKVEC_ON_DEVICE
        vendor::stream_type stream{};
        check(vendor::create_stream(&stream), vendor::calls::create_stream);
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
#if TASKVEC_ON_DEVICE
        if (policy_.stream) {
            (void)vendor::synchronize(stream_of(policy_));
            (void)vendor::destroy_stream(stream_of(policy_));
        }
#endif
    }
    /// A policy on the stream.
    [[nodiscard]] const gpu& policy() const noexcept { return policy_; }

private:
    gpu policy_;
};

/// Host memory that copies to and from the device read and write by themselves, while the host goes on. Move-only.
class pinned_memory {
public:
    pinned_memory() = default;
    /// `bytes` bytes; none for 0. Errors: backend_error.
    explicit pinned_memory(std::size_t bytes)
        : size_(bytes)
    {
        if (bytes == 0) { return; }
#if TASKVEC_ON_DEVICE
        void* place = nullptr;
        check(vendor::allocate_pinned(&place, bytes), vendor::calls::allocate_pinned);
        data_ = static_cast<std::byte*>(place);
#else
        data_ = static_cast<std::byte*>(std::malloc(bytes));
        if (!data_) {
            raise<backend_error>(error_code::out_of_memory, message("no room for ", bytes, " bytes"), "malloc", 0);
        }
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
#if TASKVEC_ON_DEVICE
        if (data_) { (void)vendor::deallocate_pinned(data_); }
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
#if TASKVEC_ON_DEVICE
    check(vendor::copy_to_host(to, from, bytes, stream_of(policy)), vendor::calls::copy);
#else
    std::memcpy(to, from, bytes);
#endif
}

} // namespace taskvec::inline TASKVEC_ABI::device
