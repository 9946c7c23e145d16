// taskvec: tensor algorithms for reusing fine-tuned models.
// SPDX-License-Identifier: Apache-2.0
//
// The version, and the few macros that every header shares.
#pragma once

/// The version's first number. What versions promise is in docs/stability.md.
#define TASKVEC_VERSION_MAJOR 0
/// Its second.
#define TASKVEC_VERSION_MINOR 2
/// Its third.
#define TASKVEC_VERSION_PATCH 0

// What cannot compile the headers is told so in one sentence, and nothing after it: an #include of nothing ends it.
#if (defined(__clang__) && __clang_major__ < 14) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ < 12)
#error "taskvec needs g++ 12 or clang 14 (or later): this compiler is older"
#include "taskvec: the error above ends the compilation"
#elif defined(_MSC_VER) && !defined(__clang__) && _MSC_VER < 1930
#error "taskvec needs Visual Studio 2022 (or later): this one is older, and fuses multiply-adds unasked"
#include "taskvec: the error above ends the compilation"
#elif __cplusplus < 202002L && (!defined(_MSVC_LANG) || _MSVC_LANG < 202002L)
#error "taskvec needs C++20: compile with -std=c++20 (or later)"
#include "taskvec: the error above ends the compilation"
#elif defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "taskvec needs a little-endian processor: it works on model files, which are little-endian, where they lie"
#include "taskvec: the error above ends the compilation"
#elif defined(__FLT_EVAL_METHOD__) && (__FLT_EVAL_METHOD__ == 1 || __FLT_EVAL_METHOD__ == 2)
#error "taskvec needs arithmetic that rounds to the type it is done in, which x87 does not: add -msse2 -mfpmath=sse"
#include "taskvec: the error above ends the compilation"
#endif

#if (defined(__GNUC__) || defined(__clang__)) && !defined(TASKVEC_STANDARD_ONLY)
/// Whether attributes, pragmas and built-in functions of g++ and clang are used. Other compilers, and these where
/// TASKVEC_STANDARD_ONLY is defined, are given standard C++ alone.
#define TASKVEC_GNU() 1
#else
#define TASKVEC_GNU() 0
#endif
#if TASKVEC_GNU() && defined(__GNUC__) && !defined(__CUDACC__)
/// Whether kernels work on vectors. Otherwise, and in device code, they work on one number at a time: the same bits.
#define TASKVEC_VECTORS() 1
#else
#define TASKVEC_VECTORS() 0
#endif

/// Defined: errors go to a replaceable handler (core/error.hpp) instead of being thrown.
#if !defined(TASKVEC_NO_EXCEPTIONS) && !defined(__cpp_exceptions)
#define TASKVEC_NO_EXCEPTIONS 1
#endif

// Everything lives in an inline namespace that names the version, what changes a type's meaning, and the Thrust system:
// files that disagree link side by side. Those that taskvec::compiled is not made for compile everything themselves.
#if defined(TASKVEC_NO_EXCEPTIONS)
#define TASKVEC_ABI_ERRORS aborts
#undef TASKVEC_COMPILED
#else
/// The part of TASKVEC_ABI that says what becomes of errors: `throws`, or `aborts` with TASKVEC_NO_EXCEPTIONS.
#define TASKVEC_ABI_ERRORS throws
#endif
#ifndef TASKVEC_ABI_SYSTEM
#if defined(__CUDACC__)
#define TASKVEC_ABI_SYSTEM cuda
#undef TASKVEC_COMPILED
#elif defined(THRUST_DEVICE_SYSTEM)
// THRUST_DEVICE_SYSTEM is a name until Thrust has been included, and a number afterwards: both name the same system.
#define TASKVEC_SYSTEM_THRUST_DEVICE_SYSTEM_OMP thrust_omp
#define TASKVEC_SYSTEM_THRUST_DEVICE_SYSTEM_TBB thrust_tbb
#define TASKVEC_SYSTEM_THRUST_DEVICE_SYSTEM_CPP thrust_cpp
#define TASKVEC_SYSTEM_2 thrust_omp
#define TASKVEC_SYSTEM_3 thrust_tbb
#define TASKVEC_SYSTEM_4 thrust_cpp
#define TASKVEC_SYSTEM_OF_(system) TASKVEC_SYSTEM_##system
#define TASKVEC_SYSTEM_OF(system) TASKVEC_SYSTEM_OF_(system)
#define TASKVEC_ABI_SYSTEM TASKVEC_SYSTEM_OF(THRUST_DEVICE_SYSTEM)
#undef TASKVEC_COMPILED
#else
/// The part of TASKVEC_ABI that names the device: `host`, `cuda`, or a host system of Thrust (`thrust_omp` …).
#define TASKVEC_ABI_SYSTEM host
#endif
#endif
#if defined(TASKVEC_MORE_STORAGE)
#define TASKVEC_ABI_STORAGE _more
#undef TASKVEC_COMPILED
#else
/// The part of TASKVEC_ABI that says whether TASKVEC_MORE_STORAGE is defined.
#define TASKVEC_ABI_STORAGE
#endif
#if defined(TASKVEC_STANDARD_ONLY)
#define TASKVEC_ABI_KERNELS _standard
#undef TASKVEC_COMPILED
#else
/// The part of TASKVEC_ABI that says whether TASKVEC_STANDARD_ONLY is defined.
#define TASKVEC_ABI_KERNELS
#endif
#define TASKVEC_ABI_JOIN_(a, b, c, d, e, f) v##a##_##b##_##c##_##d##e##f
/// Joins the parts of TASKVEC_ABI, which are macros themselves.
#define TASKVEC_ABI_JOIN(a, b, c, d, e, f) TASKVEC_ABI_JOIN_(a, b, c, d, e, f)
/// The inline namespace of everything, such as `v0_2_throws_host`.
#define TASKVEC_ABI                                                                                                    \
    TASKVEC_ABI_JOIN(TASKVEC_VERSION_MAJOR, TASKVEC_VERSION_MINOR, TASKVEC_ABI_ERRORS, TASKVEC_ABI_SYSTEM,             \
        TASKVEC_ABI_STORAGE, TASKVEC_ABI_KERNELS)

#if defined(__CUDACC__)
#define TASKVEC_HOST_DEVICE __host__ __device__
#else
/// Before a function that kernels on a device call too; nothing where no CUDA compiler reads it.
#define TASKVEC_HOST_DEVICE
#endif

// Elementwise kernels are bit-reproducible: each product and each sum rounds separately, whatever flags the user
// builds with (short of -ffast-math, /fp:fast, and -ffp-contract=fast under clang). A kernel is a function of its own,
// never inlined, between TASKVEC_KERNELS_BEGIN and TASKVEC_KERNELS_END, whose body starts with TASKVEC_STRICT_FP: the
// optimiser then sees one flat loop over restrict pointers and vectorises it, and no multiply-add is fused.
#if TASKVEC_GNU()
/// Before a function that stays a function of its own.
#define TASKVEC_NOINLINE [[gnu::noinline]]
/// Before a function that is hardly ever called.
#define TASKVEC_COLD [[gnu::cold]]
/// Behind the star of a pointer whose memory no other pointer reaches.
#define TASKVEC_RESTRICT __restrict
/// Asks for the line of an address, to be read; `locality` as of __builtin_prefetch.
#define TASKVEC_PREFETCH(address, locality) __builtin_prefetch(address, 0, locality)
#else
#define TASKVEC_NOINLINE
#define TASKVEC_COLD
#define TASKVEC_RESTRICT
#define TASKVEC_PREFETCH(address, locality) ((void)(address))
#endif
#if defined(__GNUC__) || defined(__clang__)
/// Before the name of a type whose words may be other types' objects. (Compilers without the attribute let every type
/// be so.)
#define TASKVEC_MAY_ALIAS [[gnu::may_alias]]
#else
#define TASKVEC_MAY_ALIAS
#endif
#if TASKVEC_GNU()
/// Behind the parameters of a lambda in a body.
#define TASKVEC_BODY __attribute__((always_inline))
#else
#define TASKVEC_BODY
#endif
#if defined(__CUDACC__)
#define TASKVEC_INLINE __host__ __device__ __forceinline__
#elif TASKVEC_VECTORS()
/// Before what a kernel's body is made of (core/pack.hpp), and before a body's call operator: always inlined, and so
/// compiled for the kernel's instruction set.
#define TASKVEC_INLINE __attribute__((always_inline)) inline
#else
#define TASKVEC_INLINE inline
#endif
#if !TASKVEC_VECTORS()
#define TASKVEC_UNROLL(turns)
#else
/// Before a loop of a kernel on the CPU: how many turns become one.
#define TASKVEC_UNROLL(turns) TASKVEC_PRAGMA_(GCC unroll turns)
#define TASKVEC_PRAGMA_(words) _Pragma(#words)
#endif
#if defined(__CUDACC__)
// Device code rounds each operation by intrinsics (device/thrust). The CPU's kernels lose their guarantee in a file
// that nvcc compiles for a processor with fused multiply-adds: run cpu policies from files of the host compiler.
#define TASKVEC_KERNELS_BEGIN
#define TASKVEC_KERNELS_END
#define TASKVEC_STRICT_FP
#elif defined(_MSC_VER) && !defined(__clang__)
#define TASKVEC_KERNELS_BEGIN __pragma(fp_contract(off)) // it stays off, as it is unless /fp:contract asks for it
#define TASKVEC_KERNELS_END
#define TASKVEC_STRICT_FP
#elif !TASKVEC_GNU() && defined(__GNUC__) && !defined(__clang__) // its optimiser does not know the standard's pragma
#define TASKVEC_KERNELS_BEGIN
#define TASKVEC_KERNELS_END
#define TASKVEC_STRICT_FP
#elif !TASKVEC_GNU()
#define TASKVEC_KERNELS_BEGIN
#define TASKVEC_KERNELS_END
#define TASKVEC_STRICT_FP _Pragma("STDC FP_CONTRACT OFF")
#elif defined(__clang__)
#define TASKVEC_KERNELS_BEGIN
#define TASKVEC_KERNELS_END
#define TASKVEC_STRICT_FP _Pragma("clang fp contract(off)")
#elif defined(__GNUC__)
/// Before kernels, at namespace level: no multiply-add is fused from here to TASKVEC_KERNELS_END.
#define TASKVEC_KERNELS_BEGIN                                                                                          \
    _Pragma("GCC push_options") _Pragma(                                                                               \
        "GCC optimize(\"fp-contract=off\",\"no-trapping-math\",\"tree-vectorize\",\"vect-cost-model=dynamic\")")
/// Ends what TASKVEC_KERNELS_BEGIN began.
#define TASKVEC_KERNELS_END _Pragma("GCC pop_options")
/// The first thing in a kernel's body: the same for clang, which wants it there.
#define TASKVEC_STRICT_FP
#endif
#if defined(__CUDACC__)
#define TASKVEC_FUNCTOR __host__ __device__
#else
/// Before the call operator of an elementwise functor of the gpu policy, also between TASKVEC_KERNELS_BEGIN and _END:
/// it loops over the indices that it is handed. On a host system it is, like a kernel, a function of its own.
#define TASKVEC_FUNCTOR TASKVEC_NOINLINE
#endif
