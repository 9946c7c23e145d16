// Instruction sets: kernels that are compiled several times, and the widest of them that the processor has, chosen at
// run time.
// SPDX-License-Identifier: Apache-2.0
//
// A kernel is a functor with a call operator over the bytes of a pack (core/pack.hpp). run_widest() compiles it for
// each instruction set by target attributes, whatever flags the file is built with, and runs one: 16-byte vectors
// everywhere, 32 with AVX2, 64 with AVX-512. Results are the same bits: no kernel fuses a multiply with an add. Other
// compilers than g++ and clang, and device code, run kernels on scalars. On Windows g++ keeps to 16 bytes: it aligns
// no stack to more there (GCC bug 54412).
#pragma once

#include <taskvec/core/config.hpp>

#include <cstdint>

#if TASKVEC_VECTORS() && defined(__x86_64__) && (!defined(_WIN32) || defined(__clang__))
#define TASKVEC_WIDE_VECTORS() 1
#else
/// Whether kernels are compiled for vectors of 32 and 64 bytes too.
#define TASKVEC_WIDE_VECTORS() 0
#endif

namespace taskvec::inline TASKVEC_ABI {

/// What kernels of elementwise work are compiled for.
enum class instruction_set : std::uint8_t {
    scalar, ///< one element at a time
    baseline, ///< 16-byte vectors: SSE2, NEON
    avx2, ///< 32-byte vectors (x86-64-v3)
    avx512 ///< 64-byte vectors (x86-64-v4)
};

/// The name that reports give it: "AVX-512".
[[nodiscard]] constexpr const char* to_string(instruction_set set) noexcept
{
    switch (set) {
    case instruction_set::avx512: return "AVX-512";
    case instruction_set::avx2: return "AVX2";
    case instruction_set::baseline: return "baseline";
    default: return "scalar";
    }
}

/// The widest instruction set that this header compiles kernels for and this processor has.
[[nodiscard]] inline instruction_set supported_instruction_set() noexcept
{
#if !TASKVEC_VECTORS()
    return instruction_set::scalar;
#elif TASKVEC_WIDE_VECTORS()
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("avx512vl")) {
        return instruction_set::avx512;
    }
    return __builtin_cpu_supports("avx2") ? instruction_set::avx2 : instruction_set::baseline;
#else
    return instruction_set::baseline;
#endif
}

#if TASKVEC_VECTORS()
namespace detail {
/// The chosen set plus 1; 0 until somebody asks. Constant-initialised: no constructor runs before main().
inline std::uint8_t& instruction_set_slot() noexcept
{
    static std::uint8_t slot = 0;
    return slot;
}
} // namespace detail
#endif

/// The instruction set that kernels run with: the widest supported one, or what limit_instruction_set() said.
[[nodiscard]] inline instruction_set current_instruction_set() noexcept
{
#if TASKVEC_VECTORS()
    std::uint8_t& slot = detail::instruction_set_slot();
    std::uint8_t chosen = __atomic_load_n(&slot, __ATOMIC_RELAXED);
    if (chosen == 0) {
        chosen = static_cast<std::uint8_t>(static_cast<std::uint8_t>(supported_instruction_set()) + 1);
        __atomic_store_n(&slot, chosen, __ATOMIC_RELAXED);
    }
    return static_cast<instruction_set>(chosen - 1);
#else
    return instruction_set::scalar;
#endif
}

/// Keeps kernels from running with more than `most`; what the processor lacks is never run. Results do not change. For
/// tests and measurements.
///
///     limit_instruction_set(instruction_set::avx2);
inline void limit_instruction_set([[maybe_unused]] instruction_set most) noexcept
{
#if TASKVEC_VECTORS()
    const instruction_set least = most < supported_instruction_set() ? most : supported_instruction_set();
    __atomic_store_n(&detail::instruction_set_slot(), static_cast<std::uint8_t>(static_cast<std::uint8_t>(least) + 1),
        __ATOMIC_RELAXED);
#endif
}

namespace kernels {

TASKVEC_KERNELS_BEGIN

#if TASKVEC_WIDE_VECTORS()
template <class Kernel>
[[gnu::noinline, gnu::target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi2,popcnt")]] void run_avx512(
    const Kernel& kernel)
{
    TASKVEC_STRICT_FP
    kernel.template run<64>();
}
template <class Kernel>
[[gnu::noinline, gnu::target("avx2,bmi2,popcnt")]] void run_avx2(const Kernel& kernel)
{
    TASKVEC_STRICT_FP
    kernel.template run<32>();
}
#endif
#if TASKVEC_VECTORS()
template <class Kernel>
TASKVEC_NOINLINE void run_baseline(const Kernel& kernel)
{
    TASKVEC_STRICT_FP
    kernel.template run<16>();
}
#endif
template <class Kernel>
TASKVEC_NOINLINE void run_scalar(const Kernel& kernel)
{
    TASKVEC_STRICT_FP
    kernel.template run<0>();
}

TASKVEC_KERNELS_END

/// Calls kernel.run<bytes>() with the widest packs that the processor has; run<0>() works on scalars. `run` is always
/// inlined (TASKVEC_INLINE), and so is all that it calls with packs.
template <class Kernel>
void run_widest(const Kernel& kernel)
{
#if TASKVEC_VECTORS()
    switch (current_instruction_set()) {
#if TASKVEC_WIDE_VECTORS()
    case instruction_set::avx512: return run_avx512(kernel);
    case instruction_set::avx2: return run_avx2(kernel);
#endif
    case instruction_set::baseline: return run_baseline(kernel);
    default: break;
    }
#endif
    run_scalar(kernel);
}

} // namespace kernels

} // namespace taskvec::inline TASKVEC_ABI
