// Device memory of taskvec::gpu and the vendor's errors, without Thrust: what library calls from plain g++ need as well
// as kernels.
// SPDX-License-Identifier: Apache-2.0
//
// Written on the names of device/vendor. Where THRUST_DEVICE_SYSTEM names a host system, device memory is host memory,
// and nothing of a vendor is included.
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/policy.hpp>
#include <taskvec/core/view.hpp>
#include <taskvec/device/vendor/vendor.hpp>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::device {

#if TASKVEC_ON_DEVICE
/// What to do about an error of the vendor's; empty where nothing general can be said.
[[nodiscard]] inline std::string advice(vendor::error_type code)
{
    switch (vendor::kind_of(code)) {
    case failure::memory:
        return ": out of device memory; use smaller tensors or a smaller memory budget, or free device memory";
    case failure::no_device:
        return message(": no ", vendor::name, " device is visible to this process; run on taskvec::cpu, or look at ",
            vendor::visible_devices);
    case failure::driver:
        return message(": the driver is missing or older than this ", vendor::name,
            " runtime; install a newer driver, or run on taskvec::cpu");
    case failure::architecture:
        return message(
            ": this program was not compiled for the architecture of the device; add it to ", vendor::architectures);
    case failure::lost:
        return ": earlier work on the device failed, and everything after it fails so until the process starts anew; "
               "its results are lost";
    case failure::other: break;
    }
    return {};
}

/// The error_code of an error of the vendor's.
[[nodiscard]] inline error_code code_of(vendor::error_type code)
{
    switch (vendor::kind_of(code)) {
    case failure::memory: return error_code::out_of_memory;
    case failure::no_device:
    case failure::driver:
    case failure::architecture: return error_code::device_unusable;
    case failure::lost: return error_code::device_lost;
    case failure::other: break;
    }
    return error_code::device_call;
}

/// Throws backend_error, with the vendor's code and words for it, unless a call succeeded.
inline void check(vendor::error_type code, const char* call)
{
    if (code == vendor::success) { return; }
    (void)vendor::take_last_error(); // what is not sticky has now been reported
    raise<backend_error>(code_of(code), message(vendor::name_of(code), ", ", vendor::words_of(code), advice(code)),
        call, static_cast<int>(code));
}

[[nodiscard]] inline vendor::stream_type stream_of(const gpu& policy) noexcept
{
    return static_cast<vendor::stream_type>(policy.stream);
}
#endif

/// Throws backend_error when no device answers. Costs nothing that matters; whoever wants to fail early calls it.
inline void require_device()
{
#if TASKVEC_ON_DEVICE
    int count = 0;
    check(vendor::count_devices(&count), vendor::calls::count_devices);
    if (count == 0) { check(vendor::no_device, vendor::calls::count_devices); }
#endif
}

/// Waits for what was queued on the policy's stream; its errors come to light here.
inline void synchronize([[maybe_unused]] const gpu& policy)
{
#if TASKVEC_ON_DEVICE
    check(vendor::synchronize(stream_of(policy)), vendor::calls::synchronize);
#endif
}

/// Copies from host to device memory, in the stream's order. From pageable memory the source may be reused at once.
inline void upload([[maybe_unused]] const gpu& policy, void* to, const void* from, std::size_t bytes)
{
    if (bytes == 0) { return; }
#if TASKVEC_ON_DEVICE
    check(vendor::copy_to_device(to, from, bytes, stream_of(policy)), vendor::calls::copy);
#else
    std::memcpy(to, from, bytes);
#endif
}

/// Copies from device to host memory and waits for it.
inline void download([[maybe_unused]] const gpu& policy, void* to, const void* from, std::size_t bytes)
{
    if (bytes > 0) {
#if TASKVEC_ON_DEVICE
        check(vendor::copy_to_host(to, from, bytes, stream_of(policy)), vendor::calls::copy);
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
#if TASKVEC_ON_DEVICE
    check(vendor::copy_on_device(to, from, bytes, stream_of(policy)), vendor::calls::copy);
#else
    std::memcpy(to, from, bytes);
#endif
}

/// Sets bytes of device memory to 0, in the stream's order.
inline void clear([[maybe_unused]] const gpu& policy, void* place, std::size_t bytes)
{
    if (bytes == 0) { return; }
#if TASKVEC_ON_DEVICE
    check(vendor::clear(place, bytes, stream_of(policy)), vendor::calls::clear);
#else
    std::memset(place, 0, bytes);
#endif
}

/// Device memory from the policy's allocator, or the vendor's, in the stream's order; null where there is no room.
/// Errors: backend_error, for whatever else fails.
[[nodiscard]] inline void* try_allocate(const gpu& policy, std::size_t bytes)
{
    if (policy.allocator) { return policy.allocator->allocate(bytes, policy.stream); }
#if TASKVEC_ON_DEVICE
    void* place = nullptr;
    const vendor::error_type code = vendor::allocate(&place, bytes, stream_of(policy));
    if (vendor::kind_of(code) == failure::memory) {
        (void)vendor::take_last_error(); // it would be taken for the next launch's
        return nullptr;
    }
    check(code, vendor::calls::allocate);
    return place;
#else
    return std::malloc(bytes);
#endif
}
/// The same, never null. Errors: backend_error, out_of_memory among them.
[[nodiscard]] inline void* allocate(const gpu& policy, std::size_t bytes)
{
    void* const place = try_allocate(policy, bytes);
    if (place) { return place; }
#if TASKVEC_ON_DEVICE
    if (!policy.allocator) { check(vendor::out_of_memory, vendor::calls::allocate); }
#endif
    raise<backend_error>(error_code::out_of_memory, message("no room for ", bytes, " bytes of scratch"),
        policy.allocator ? "gpu::allocator->allocate" : "malloc", 0);
}
/// Gives back what allocate() or try_allocate() returned, in the stream's order.
inline void deallocate(const gpu& policy, void* place, std::size_t bytes) noexcept
{
    if (policy.allocator) {
        policy.allocator->deallocate(place, bytes, policy.stream);
        return;
    }
#if TASKVEC_ON_DEVICE
    (void)vendor::deallocate(place, stream_of(policy));
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
    /// Room for `size` elements. Errors: backend_error (out of memory).
    buffer(const gpu& policy, std::size_t size)
        : policy_(policy)
        , size_(size)
    {
        if (size_ > 0) { data_ = static_cast<T*>(allocate(policy_, size_ * sizeof(T))); }
    }
    /// Of no elements where there is no room for them.
    [[nodiscard]] static buffer where_there_is_room(const gpu& policy, std::size_t size)
    {
        buffer made;
        made.policy_ = policy;
        if (size > 0) { made.data_ = static_cast<T*>(try_allocate(policy, size * sizeof(T))); }
        if (made.data_) { made.size_ = size; }
        return made;
    }
    /// A copy of `values`, queued on the stream.
    buffer(const gpu& policy, std::span<const T> values)
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
    void view() const&& = delete; // name the owner first: its views would dangle
    /// The elements, as a view; of storage types.
    [[nodiscard]] auto view() const& noexcept
        requires storage_element<T>
    {
        return device_view<T>(data_, size_);
    }
    /// Copies `count` elements from the host, queued on the stream.
    void assign(const T* from, std::size_t count) { upload(policy_, data_, from, count * sizeof(T)); }
    /// Sets all bytes to 0, queued on the stream.
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
