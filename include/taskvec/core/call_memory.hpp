// The memory of the small lists that a call makes for itself.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <cstddef>
#include <memory>
#include <memory_resource>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

template <class T>
class call_allocator;

/// A list that lives no longer than the call that makes it: what a merge method keeps of its options and its passes.
///
///     call_vector<double> factors(passes.tasks(), 1.0); // in memory of the policy's resource
template <class T>
using call_vector = std::vector<T, call_allocator<T>>;

namespace detail {
/// Where lists that begin on this thread take their memory: cpu::memory of the call that the thread works for; null:
/// operator new. It is null while the caller's code runs (an executor, a progress callback).
inline constinit thread_local std::pmr::memory_resource* current_call_memory = nullptr;

/// While it lives, this thread works for a call with a policy's resource (null: operator new).
class call_memory {
public:
    explicit call_memory(std::pmr::memory_resource* memory) noexcept
        : before_(current_call_memory)
    {
        current_call_memory = memory;
    }
    ~call_memory() { current_call_memory = before_; }
    call_memory(const call_memory&) = delete;
    call_memory& operator=(const call_memory&) = delete;

private:
    std::pmr::memory_resource* before_;
};
} // namespace detail

/// Memory of the call that is under way where a list begins: of its policy's resource (cpu::memory), or from operator
/// new where that is null and where no call is under way. A copy of a list takes that of its own time; what moves takes
/// its memory along.
template <class T>
class call_allocator {
public:
    using value_type = T; ///< of the elements
    using propagate_on_container_move_assignment = std::true_type; ///< memory goes along
    using propagate_on_container_swap = std::true_type; ///< memory goes along

    call_allocator() noexcept = default;
    /// Of the same memory.
    template <class U>
    call_allocator(const call_allocator<U>& other) noexcept
        : memory_(other.memory())
    { }
    /// Room for `count` elements.
    [[nodiscard]] T* allocate(std::size_t count)
    {
        if (!memory_) { return std::allocator<T>().allocate(count); }
        if (count > static_cast<std::size_t>(-1) / sizeof(T)) { return std::allocator<T>().allocate(count); } // throws
        return static_cast<T*>(memory_->allocate(count * sizeof(T), alignof(T)));
    }
    /// Gives room back.
    void deallocate(T* place, std::size_t count) noexcept
    {
        if (!memory_) { std::allocator<T>().deallocate(place, count); }
        else {
            memory_->deallocate(place, count * sizeof(T), alignof(T));
        }
    }
    /// What a copy of a list takes: that of its own time.
    [[nodiscard]] call_allocator select_on_container_copy_construction() const noexcept { return {}; }
    /// The resource; null: operator new.
    [[nodiscard]] std::pmr::memory_resource* memory() const noexcept { return memory_; }
    template <class U>
    [[nodiscard]] friend bool operator==(const call_allocator& x, const call_allocator<U>& y) noexcept
    {
        return x.memory() == y.memory();
    }

private:
    std::pmr::memory_resource* memory_ = detail::current_call_memory;
};

} // namespace taskvec::inline TASKVEC_ABI
