// Arithmetic of elementwise functors that run on host and device: each operation rounds by itself, and no multiply-add
// is fused.
// SPDX-License-Identifier: Apache-2.0
//
// A functor is a struct of plain values and device pointers whose call operator (TASKVEC_FUNCTOR) loops over the
// indices that it is handed: device::sweep() (device/thrust) runs it. It stands beside its algorithm, between
// TASKVEC_KERNELS_BEGIN and TASKVEC_KERNELS_END, and takes its products, sums and quotients from here.
#pragma once

#include <taskvec/core/storage.hpp>

#include <concepts>
#include <cstdint>
#if !TASKVEC_GNU()
#include <atomic>
#endif

namespace taskvec::inline TASKVEC_ABI::elementwise {

/// The indices of one worker of a sweep: first, first + step, … below last. Neighbouring workers have neighbouring
/// indices on a device, and runs of their own on host threads.
struct indices {
    std::uint64_t first = 0, last = 0, step = 1, worker = 0;
};

/// What counts and flags in device memory are made of: the type that CUDA's atomics take.
using counter = unsigned long long;

TASKVEC_KERNELS_BEGIN

template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A product(A x, A y) noexcept
{
    TASKVEC_STRICT_FP
#if defined(__CUDA_ARCH__)
    if constexpr (std::same_as<A, double>) { return __dmul_rn(x, y); }
    else {
        return __fmul_rn(x, y);
    }
#else
    return x * y;
#endif
}

template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A sum(A x, A y) noexcept
{
    TASKVEC_STRICT_FP
#if defined(__CUDA_ARCH__)
    if constexpr (std::same_as<A, double>) { return __dadd_rn(x, y); }
    else {
        return __fadd_rn(x, y);
    }
#else
    return x + y;
#endif
}

template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A difference(A x, A y) noexcept
{
    TASKVEC_STRICT_FP
#if defined(__CUDA_ARCH__)
    if constexpr (std::same_as<A, double>) { return __dsub_rn(x, y); }
    else {
        return __fsub_rn(x, y);
    }
#else
    return x - y;
#endif
}

template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A quotient(A x, A y) noexcept
{
    TASKVEC_STRICT_FP
#if defined(__CUDA_ARCH__)
    if constexpr (std::same_as<A, double>) { return __ddiv_rn(x, y); }
    else {
        return __fdiv_rn(x, y);
    }
#else
    return x / y;
#endif
}

/// *place += amount, from any number of workers at once. Integers: the order does not matter.
TASKVEC_HOST_DEVICE inline void atomic_add(counter* place, counter amount) noexcept
{
#if defined(__CUDA_ARCH__)
    atomicAdd(place, amount);
#elif !TASKVEC_GNU()
    std::atomic_ref(*place).fetch_add(amount, std::memory_order_relaxed);
#else
    __atomic_fetch_add(place, amount, __ATOMIC_RELAXED);
#endif
}

/// The value of *place before 1 is added to it, from any number of workers at once: a number that no other gets.
TASKVEC_HOST_DEVICE inline counter atomic_take(counter* place) noexcept
{
#if defined(__CUDA_ARCH__)
    return atomicAdd(place, counter{1});
#elif !TASKVEC_GNU()
    return std::atomic_ref(*place).fetch_add(1, std::memory_order_relaxed);
#else
    return __atomic_fetch_add(place, 1, __ATOMIC_RELAXED);
#endif
}

/// *place = min(*place, value), from any number of workers at once.
TASKVEC_HOST_DEVICE inline void atomic_min(counter* place, counter value) noexcept
{
#if defined(__CUDA_ARCH__)
    atomicMin(place, value);
#elif !TASKVEC_GNU()
    const std::atomic_ref shared(*place);
    counter found = shared.load(std::memory_order_relaxed);
    while (value < found && !shared.compare_exchange_weak(found, value, std::memory_order_relaxed)) { }
#else
    counter found = __atomic_load_n(place, __ATOMIC_RELAXED);
    while (value < found
        && !__atomic_compare_exchange_n(place, &found, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { }
#endif
}

/// Lowers *flag to `place` where a value is NaN or infinity; a null flag asks for nothing.
template <arithmetic_element A>
TASKVEC_HOST_DEVICE inline void note(A value, std::uint64_t place, counter* flag) noexcept
{
    if (magnitude_bits(value) >= exponent_mask<A> && flag) { atomic_min(flag, place); }
}

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI::elementwise
