// taskvec in one header. Generated from the headers of the taskvec project by scripts/single-header: change those instead.
// SPDX-License-Identifier: Apache-2.0
#pragma once

// ---- taskvec/adapters/adapted_model.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_ADAPTED_MODEL_HPP)
#define TASKVEC_SINGLE_ADAPTERS_ADAPTED_MODEL_HPP
// What adapters change of a base, by tensor: folded into it, or a task of any merge that is never stored.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/adapters/adapted_weight.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_ADAPTED_WEIGHT_HPP)
#define TASKVEC_SINGLE_ADAPTERS_ADAPTED_WEIGHT_HPP
// A weight with adapters added, worked out a block at a time: what folds adapters into a base, and what makes a task of
// an adapter that no file holds.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/adapters/lora.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_LORA_HPP)
#define TASKVEC_SINGLE_ADAPTERS_LORA_HPP
// LoRA adapters in memory: the low-rank update of one weight, and an adapter as updates by module name.
// Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: low-rank adaptation of large language models" (2021).
// SPDX-License-Identifier: Apache-2.0
//
// The one LoRA type: what PEFT's files are read into, what algorithms on adapters take and return, and what the layers
// of jvp/ are made from and give back. It needs no Eigen; jvp/lora_layer.hpp sees its factors as Eigen matrices.


// ---- taskvec/core/error.hpp
#if !defined(TASKVEC_SINGLE_CORE_ERROR_HPP)
#define TASKVEC_SINGLE_CORE_ERROR_HPP
// Errors: one base class, one kind a class, one code a subject, and messages that name the tensor, what was found and
// what to do.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/config.hpp
#if !defined(TASKVEC_SINGLE_CORE_CONFIG_HPP)
#define TASKVEC_SINGLE_CORE_CONFIG_HPP
// taskvec: tensor algorithms for reusing fine-tuned models.
// SPDX-License-Identifier: Apache-2.0
//
// The version, and the few macros that every header shares.

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
#endif // TASKVEC_SINGLE_CORE_CONFIG_HPP

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// What went wrong, as a value: the same in an exception and in the no-exceptions handler.
enum class error_kind {
    invalid_argument,
    shape_mismatch,
    dtype_mismatch,
    nonfinite,
    format_error,
    io_error,
    backend_error,
    cancelled
};

/// What went wrong, exactly: one code for each subject, the same in every version, to search for and to branch on.
/// The hundreds are the kinds. A number or a word, once given, never changes its meaning; new codes take new numbers.
/// docs/errors.md says of each what it means and what to do. Codes from 10000 up are never the library's: an error of
/// one's own may carry static_cast<error_code>(10001).
enum class error_code : std::uint16_t {
    // The caller's doing: a value, a list or a combination of models that cannot be.
    tensor_missing = 101,
    tensor_unexpected = 102,
    tensor_repeated = 103,
    unwritable = 104,
    tensor_layout = 105,
    tensor_memory = 106,
    tensor_without_data = 107,
    dlpack_tensor = 108,
    alias_output = 109,
    inputs_empty = 110,
    base_missing = 111,
    task_count = 112,
    list_length = 113,
    parameter_not_finite = 114,
    parameter_out_of_range = 115,
    weights_sum_zero = 116,
    density_out_of_range = 117,
    rank_out_of_range = 118,
    rank_choice = 119,
    index_out_of_range = 120,
    option_value = 121,
    pattern_invalid = 122,
    nothing_selected = 123,
    delta_entries = 124,
    call_order = 125,
    saved_words = 126,
    fingerprint_differs = 127,
    initialization_differs = 128,
    adapters_differ = 129,
    statistics_kind = 130,
    statistics_differ = 131,
    statistics_invalid = 132,
    no_solution = 133,
    norm_overflow = 134,
    size_limit = 135,
    context_stream = 136,
    sweep_table = 137,
    score_invalid = 138,
    operation_size = 139,
    parameter_inactive = 140,
    device_unavailable = 141,
    name_collision = 142,
    output_path = 143,
    adapter_factors = 144,
    layer_split = 145,
    // Shapes that do not fit.
    tensor_shape = 201,
    input_size = 202,
    output_shape = 203,
    shape_invalid = 204,
    matrix_shape = 205,
    factor_rank = 206,
    adapter_shape = 207,
    delta_shape = 208,
    statistics_shape = 209,
    operation_shape = 210,
    // Element types that do not fit.
    dtype_unsupported = 301,
    dtype_differs = 302,
    output_dtype = 303,
    not_mergeable = 304,
    delta_dtype = 305,
    // NaN, infinity and overflow.
    not_finite = 401,
    statistics_not_finite = 402,
    result_overflow = 403,
    scaling_not_finite = 404,
    score_not_finite = 405,
    tangent_not_finite = 406,
    // Files that do not hold what their format promises.
    json_syntax = 501,
    json_key_repeated = 502,
    not_safetensors = 503,
    header_field = 504,
    tensor_offsets = 505,
    file_truncated = 506,
    file_too_large = 507,
    file_tensors = 508,
    index_field = 509,
    delta_format = 510,
    statistics_format = 511,
    adapter_config = 512,
    adapter_unsupported = 513,
    adapter_tensors = 514,
    csv_syntax = 515,
    quantised_layer = 516,
    pickle_unsupported = 517,
    archive_damaged = 518,
    tokenizer = 519,
    // What the operating system refused.
    file_not_found = 601,
    file_access = 602,
    disk_full = 603,
    file_kind = 604,
    file_changed = 605,
    model_not_found = 606,
    program_failed = 607,
    system_refused = 608,
    // Devices, solvers, optimisers and other people's programs.
    out_of_memory = 701,
    device_unusable = 702,
    device_lost = 703,
    device_call = 704,
    no_convergence = 705,
    optimizer_failed = 706,
    scoring_command = 707,
    // Stopped on request.
    cancelled = 801
};

/// A code, its word, and the kind of the errors that carry it.
struct error_code_entry {
    error_code code; ///< its number
    std::string_view word; ///< lower case, with hyphens: what is printed
    error_kind kind; ///< of every error that carries it
};

/// Every code of the library, in ascending order.
inline constexpr error_code_entry error_codes[] = {
    {error_code::tensor_missing, "tensor-missing", error_kind::invalid_argument},
    {error_code::tensor_unexpected, "tensor-unexpected", error_kind::invalid_argument},
    {error_code::tensor_repeated, "tensor-repeated", error_kind::invalid_argument},
    {error_code::unwritable, "unwritable", error_kind::invalid_argument},
    {error_code::tensor_layout, "tensor-layout", error_kind::invalid_argument},
    {error_code::tensor_memory, "tensor-memory", error_kind::invalid_argument},
    {error_code::tensor_without_data, "tensor-without-data", error_kind::invalid_argument},
    {error_code::dlpack_tensor, "dlpack-tensor", error_kind::invalid_argument},
    {error_code::alias_output, "alias-output", error_kind::invalid_argument},
    {error_code::inputs_empty, "inputs-empty", error_kind::invalid_argument},
    {error_code::base_missing, "base-missing", error_kind::invalid_argument},
    {error_code::task_count, "task-count", error_kind::invalid_argument},
    {error_code::list_length, "list-length", error_kind::invalid_argument},
    {error_code::parameter_not_finite, "parameter-not-finite", error_kind::invalid_argument},
    {error_code::parameter_out_of_range, "parameter-out-of-range", error_kind::invalid_argument},
    {error_code::weights_sum_zero, "weights-sum-zero", error_kind::invalid_argument},
    {error_code::density_out_of_range, "density-out-of-range", error_kind::invalid_argument},
    {error_code::rank_out_of_range, "rank-out-of-range", error_kind::invalid_argument},
    {error_code::rank_choice, "rank-choice", error_kind::invalid_argument},
    {error_code::index_out_of_range, "index-out-of-range", error_kind::invalid_argument},
    {error_code::option_value, "option-value", error_kind::invalid_argument},
    {error_code::pattern_invalid, "pattern-invalid", error_kind::invalid_argument},
    {error_code::nothing_selected, "nothing-selected", error_kind::invalid_argument},
    {error_code::delta_entries, "delta-entries", error_kind::invalid_argument},
    {error_code::call_order, "call-order", error_kind::invalid_argument},
    {error_code::saved_words, "saved-words", error_kind::invalid_argument},
    {error_code::fingerprint_differs, "fingerprint-differs", error_kind::invalid_argument},
    {error_code::initialization_differs, "initialization-differs", error_kind::invalid_argument},
    {error_code::adapters_differ, "adapters-differ", error_kind::invalid_argument},
    {error_code::statistics_kind, "statistics-kind", error_kind::invalid_argument},
    {error_code::statistics_differ, "statistics-differ", error_kind::invalid_argument},
    {error_code::statistics_invalid, "statistics-invalid", error_kind::invalid_argument},
    {error_code::no_solution, "no-solution", error_kind::invalid_argument},
    {error_code::norm_overflow, "norm-overflow", error_kind::invalid_argument},
    {error_code::size_limit, "size-limit", error_kind::invalid_argument},
    {error_code::context_stream, "context-stream", error_kind::invalid_argument},
    {error_code::sweep_table, "sweep-table", error_kind::invalid_argument},
    {error_code::score_invalid, "score-invalid", error_kind::invalid_argument},
    {error_code::operation_size, "operation-size", error_kind::invalid_argument},
    {error_code::parameter_inactive, "parameter-inactive", error_kind::invalid_argument},
    {error_code::device_unavailable, "device-unavailable", error_kind::invalid_argument},
    {error_code::name_collision, "name-collision", error_kind::invalid_argument},
    {error_code::output_path, "output-path", error_kind::invalid_argument},
    {error_code::adapter_factors, "adapter-factors", error_kind::invalid_argument},
    {error_code::layer_split, "layer-split", error_kind::invalid_argument},
    {error_code::tensor_shape, "tensor-shape", error_kind::shape_mismatch},
    {error_code::input_size, "input-size", error_kind::shape_mismatch},
    {error_code::output_shape, "output-shape", error_kind::shape_mismatch},
    {error_code::shape_invalid, "shape-invalid", error_kind::shape_mismatch},
    {error_code::matrix_shape, "matrix-shape", error_kind::shape_mismatch},
    {error_code::factor_rank, "factor-rank", error_kind::shape_mismatch},
    {error_code::adapter_shape, "adapter-shape", error_kind::shape_mismatch},
    {error_code::delta_shape, "delta-shape", error_kind::shape_mismatch},
    {error_code::statistics_shape, "statistics-shape", error_kind::shape_mismatch},
    {error_code::operation_shape, "operation-shape", error_kind::shape_mismatch},
    {error_code::dtype_unsupported, "dtype-unsupported", error_kind::dtype_mismatch},
    {error_code::dtype_differs, "dtype-differs", error_kind::dtype_mismatch},
    {error_code::output_dtype, "output-dtype", error_kind::dtype_mismatch},
    {error_code::not_mergeable, "not-mergeable", error_kind::dtype_mismatch},
    {error_code::delta_dtype, "delta-dtype", error_kind::dtype_mismatch},
    {error_code::not_finite, "not-finite", error_kind::nonfinite},
    {error_code::statistics_not_finite, "statistics-not-finite", error_kind::nonfinite},
    {error_code::result_overflow, "result-overflow", error_kind::nonfinite},
    {error_code::scaling_not_finite, "scaling-not-finite", error_kind::nonfinite},
    {error_code::score_not_finite, "score-not-finite", error_kind::nonfinite},
    {error_code::tangent_not_finite, "tangent-not-finite", error_kind::nonfinite},
    {error_code::json_syntax, "json-syntax", error_kind::format_error},
    {error_code::json_key_repeated, "json-key-repeated", error_kind::format_error},
    {error_code::not_safetensors, "not-safetensors", error_kind::format_error},
    {error_code::header_field, "header-field", error_kind::format_error},
    {error_code::tensor_offsets, "tensor-offsets", error_kind::format_error},
    {error_code::file_truncated, "file-truncated", error_kind::format_error},
    {error_code::file_too_large, "file-too-large", error_kind::format_error},
    {error_code::file_tensors, "file-tensors", error_kind::format_error},
    {error_code::index_field, "index-field", error_kind::format_error},
    {error_code::delta_format, "delta-format", error_kind::format_error},
    {error_code::statistics_format, "statistics-format", error_kind::format_error},
    {error_code::adapter_config, "adapter-config", error_kind::format_error},
    {error_code::adapter_unsupported, "adapter-unsupported", error_kind::format_error},
    {error_code::adapter_tensors, "adapter-tensors", error_kind::format_error},
    {error_code::csv_syntax, "csv-syntax", error_kind::format_error},
    {error_code::quantised_layer, "quantised-layer", error_kind::format_error},
    {error_code::pickle_unsupported, "pickle-unsupported", error_kind::format_error},
    {error_code::archive_damaged, "archive-damaged", error_kind::format_error},
    {error_code::tokenizer, "tokenizer", error_kind::format_error},
    {error_code::file_not_found, "file-not-found", error_kind::io_error},
    {error_code::file_access, "file-access", error_kind::io_error},
    {error_code::disk_full, "disk-full", error_kind::io_error},
    {error_code::file_kind, "file-kind", error_kind::io_error},
    {error_code::file_changed, "file-changed", error_kind::io_error},
    {error_code::model_not_found, "model-not-found", error_kind::io_error},
    {error_code::program_failed, "program-failed", error_kind::io_error},
    {error_code::system_refused, "system-refused", error_kind::io_error},
    {error_code::out_of_memory, "out-of-memory", error_kind::backend_error},
    {error_code::device_unusable, "device-unusable", error_kind::backend_error},
    {error_code::device_lost, "device-lost", error_kind::backend_error},
    {error_code::device_call, "device-call", error_kind::backend_error},
    {error_code::no_convergence, "no-convergence", error_kind::backend_error},
    {error_code::optimizer_failed, "optimizer-failed", error_kind::backend_error},
    {error_code::scoring_command, "scoring-command", error_kind::backend_error},
    {error_code::cancelled, "cancelled", error_kind::cancelled},
};

/// The word of a code, such as "density-out-of-range"; "user-defined" for a code that is not the library's.
///
///     catch (const taskvec::error& failure) { log(taskvec::to_string(failure.code()), failure.what()); }
[[nodiscard]] constexpr std::string_view to_string(error_code code) noexcept
{
    for (const auto& entry : error_codes) {
        if (entry.code == code) { return entry.word; }
    }
    return "user-defined";
}

/// The code that fits an errno; system_refused for those that have no code of their own.
[[nodiscard]] constexpr error_code system_error_code(int system_code) noexcept
{
    switch (system_code) {
    case ENOENT: return error_code::file_not_found;
    case EACCES:
    case EPERM:
    case EROFS: return error_code::file_access;
#if defined(EDQUOT) // not on Windows
    case EDQUOT:
#endif
    case ENOSPC: return error_code::disk_full;
    case EISDIR:
    case ENOTDIR:
    case EEXIST: return error_code::file_kind;
    default: return error_code::system_refused;
    }
}

/// Base of everything that the library throws: a kind, a code and a message.
class error : public std::runtime_error {
public:
    /// `message` is what what() returns: it names tensor, found, expected and mend.
    error(error_code code, error_kind kind, const std::string& message)
        : std::runtime_error(message)
        , kind_(kind)
        , code_(code)
    { }
    /// What kind of thing went wrong.
    [[nodiscard]] error_kind kind() const noexcept { return kind_; }
    /// What exactly.
    [[nodiscard]] error_code code() const noexcept { return code_; }

private:
    error_kind kind_;
    error_code code_;
};

/// A broken precondition: a value outside its range, an empty list, aliased outputs.
class invalid_argument : public error {
public:
    /// See error.
    invalid_argument(error_code code, const std::string& message)
        : error(code, error_kind::invalid_argument, message)
    { }
};

/// Two tensors that must have the same shape have not.
class shape_mismatch : public error {
public:
    /// See error.
    shape_mismatch(error_code code, const std::string& message)
        : error(code, error_kind::shape_mismatch, message)
    { }
};

/// A tensor has an element type that the algorithm cannot use, or that differs from its partner's.
class dtype_mismatch : public error {
public:
    /// See error.
    dtype_mismatch(error_code code, const std::string& message)
        : error(code, error_kind::dtype_mismatch, message)
    { }
};

/// An input holds NaN or infinity and propagation was not asked for.
class nonfinite_error : public error {
public:
    /// See error.
    nonfinite_error(error_code code, const std::string& message)
        : error(code, error_kind::nonfinite, message)
    { }
};

/// A file does not hold what its format promises. `offset` is the byte at which the fault was seen.
class format_error : public error {
public:
    /// `file`: stands before the message where it is not empty.
    format_error(error_code code, const std::string& message, std::string file, std::uint64_t offset = 0)
        : error(code, error_kind::format_error, file.empty() ? message : file + ": " + message)
        , file_(std::move(file))
        , offset_(offset)
    { }
    /// The file, or nothing where none was named.
    [[nodiscard]] const std::string& file() const noexcept { return file_; }
    /// The byte at which reading stopped, 0 where that says nothing.
    [[nodiscard]] std::uint64_t offset() const noexcept { return offset_; }

private:
    std::string file_;
    std::uint64_t offset_;
};

/// The operating system refused: `system_code` is its errno, 0 where there is none.
class io_error : public error {
public:
    /// `system_code`: an errno, 0 for none.
    io_error(error_code code, const std::string& message, std::string file, int system_code = 0)
        : error(code, error_kind::io_error, file.empty() ? message : file + ": " + message)
        , file_(std::move(file))
        , system_code_(system_code)
    { }
    /// The file, or nothing where none was named.
    [[nodiscard]] const std::string& file() const noexcept { return file_; }
    /// The errno of the call that failed, or 0.
    [[nodiscard]] int system_code() const noexcept { return system_code_; }

private:
    std::string file_;
    int system_code_;
};

/// A backend failed: `call` is what was called, `backend_code` what it answered.
class backend_error : public error {
public:
    /// `call`: what failed, and what the vendor's code was.
    backend_error(error_code code, const std::string& message, std::string call, int backend_code)
        : error(code, error_kind::backend_error, call + ": " + message + " (code " + std::to_string(backend_code) + ")")
        , call_(std::move(call))
        , backend_code_(backend_code)
    { }
    /// The name of the call that failed.
    [[nodiscard]] const std::string& call() const noexcept { return call_; }
    /// The vendor's own code.
    [[nodiscard]] int backend_code() const noexcept { return backend_code_; }

private:
    std::string call_;
    int backend_code_;
};

/// The progress callback asked to stop.
class cancelled : public error {
public:
    /// See error.
    explicit cancelled(error_code code, const std::string& message = "cancelled by the progress callback")
        : error(code, error_kind::cancelled, message)
    { }
};

/// With exceptions off every error goes here, as what would have been thrown: kind(), code() and what(), and by its
/// kind the file, the offset or the call. Files that were being written under temporary names are gone by then. It is
/// called once in a process, on the thread that failed first, and a handler that returns is followed by std::abort().
/// Other threads may still be at work: std::_Exit() ends the process beside them, where std::exit() would destroy the
/// program's static objects under their hands.
using error_handler = void (*)(const error&);

namespace detail {
inline void print_error(const error& failure)
{
    const std::string_view word = to_string(failure.code());
    std::fprintf(stderr, "taskvec: error: %s [%.*s]\n", failure.what(), static_cast<int>(word.size()), word.data());
}
inline error_handler& error_handler_slot() noexcept
{
    static error_handler handler = &print_error;
    return handler;
}

/// What is done before the handler is called, as no destructor will run: formats/file.hpp removes temporary files.
using error_cleanup = void (*)() noexcept;
inline error_cleanup& error_cleanup_slot() noexcept
{
    static error_cleanup cleanup = nullptr;
    return cleanup;
}

/// Lets the first thread that fails go on to the handler. Others wait here for the end of the process: an error in the
/// handler itself, which would wait for itself, aborts.
TASKVEC_COLD TASKVEC_NOINLINE inline void pass_first_failure() noexcept
{
    static std::atomic_flag failed;
    static thread_local bool mine = false;
    if (!failed.test_and_set(std::memory_order_acq_rel)) { mine = true; }
    else if (mine) {
        std::abort();
    }
    else {
        for (;;) { failed.wait(true, std::memory_order_relaxed); }
    }
}

/// One piece of a message: text as it is, or a number written out.
class message_part {
public:
    message_part(std::string_view text) noexcept
        : text_(text)
    { }
    message_part(const char* text) noexcept
        : text_(text)
    { }
    message_part(const std::string& text) noexcept
        : text_(text)
    { }
    message_part(char letter) noexcept
        : digits_{letter}
        , size_(1)
    { }
    template <class Number>
        requires std::is_arithmetic_v<Number>
    message_part(Number number) noexcept
    {
        if constexpr (std::is_floating_point_v<Number>) { print("%.6g", static_cast<double>(number)); }
        else if constexpr (std::is_signed_v<Number>) {
            print("%lld", static_cast<long long>(number));
        }
        else {
            print("%llu", static_cast<unsigned long long>(number));
        }
    }
    [[nodiscard]] std::string_view text() const noexcept { return size_ ? std::string_view(digits_, size_) : text_; }

private:
    template <class Number>
    void print(const char* format, Number number) noexcept
    {
        size_ = static_cast<std::size_t>(std::snprintf(digits_, sizeof digits_, format, number));
    }
    std::string_view text_{};
    char digits_[24] = {};
    std::size_t size_ = 0;
};

TASKVEC_COLD TASKVEC_NOINLINE inline std::string join(std::initializer_list<message_part> parts)
{
    std::string text;
    for (const auto& part : parts) { text += part.text(); }
    return text;
}
} // namespace detail

/// Replaces the handler that is called with exceptions off; returns the former one. Not synchronised: set it at start.
inline error_handler set_error_handler(error_handler handler) noexcept
{
    return std::exchange(detail::error_handler_slot(), handler);
}

/// Joins its arguments (strings and numbers) into one message.
template <class... Parts>
[[nodiscard]] std::string message(const Parts&... parts)
{
    return detail::join({detail::message_part(parts)...});
}

/// Throws Error(code, arguments…), or hands it to the handler when exceptions are off. Never returns.
///
///     if (tasks == 0) { raise<invalid_argument>(error_code::inputs_empty, "no task was given: at least one is
///     needed"); }
template <class Error, class... Arguments>
[[noreturn]] TASKVEC_COLD TASKVEC_NOINLINE void raise(error_code code, Arguments&&... arguments)
{
#if defined(TASKVEC_NO_EXCEPTIONS)
    const Error failure(code, std::forward<Arguments>(arguments)...);
    detail::pass_first_failure();
    if (detail::error_cleanup_slot()) { detail::error_cleanup_slot()(); }
    detail::error_handler_slot()(failure);
    std::abort();
#else
    throw Error(code, std::forward<Arguments>(arguments)...);
#endif
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_ERROR_HPP

// ---- taskvec/core/matrix.hpp
#if !defined(TASKVEC_SINGLE_CORE_MATRIX_HPP)
#define TASKVEC_SINGLE_CORE_MATRIX_HPP
// Matrices: views of somebody else's memory in either storage order, and a small owner for results and scratch.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/view.hpp
#if !defined(TASKVEC_SINGLE_CORE_VIEW_HPP)
#define TASKVEC_SINGLE_CORE_VIEW_HPP
// Flat views of somebody else's memory. The memory space is part of the type: mixing spaces does not compile.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/storage.hpp
#if !defined(TASKVEC_SINGLE_CORE_STORAGE_HPP)
#define TASKVEC_SINGLE_CORE_STORAGE_HPP
// Storage types: what follows from the list of them. How to add one is told in core/storage_traits.hpp.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/half.hpp
#if !defined(TASKVEC_SINGLE_CORE_HALF_HPP)
#define TASKVEC_SINGLE_CORE_HALF_HPP
// The 16-bit storage types bf16 and f16: two bytes each, no arithmetic of their own.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/storage_traits.hpp
#if !defined(TASKVEC_SINGLE_CORE_STORAGE_TRAITS_HPP)
#define TASKVEC_SINGLE_CORE_STORAGE_TRAITS_HPP
// What a storage type is: the trait to specialise for a type that tensors are stored in.
// SPDX-License-Identifier: Apache-2.0
//
// A storage type is one header, which includes this one and holds the type and its storage_traits, and one entry in the
// list of core/storage_list.hpp. A program that brings a type of its own leaves that list alone: it compiles with
// TASKVEC_MORE_STORAGE defined as the name of its header, `-DTASKVEC_MORE_STORAGE='"my/fixed.hpp"'`, which ends with
//
//     namespace taskvec::inline TASKVEC_ABI {
//     using more_storage_types = storage_list<my::fixed>;
//     }
//
// All files of the program define it alike (the inline namespace holds them apart where they do not). Everything else,
// files, merges, selection, messages, follows from the trait.


// ---- taskvec/core/dtype.hpp
#if !defined(TASKVEC_SINGLE_CORE_DTYPE_HPP)
#define TASKVEC_SINGLE_CORE_DTYPE_HPP
// Element types of files, by name: every dtype of the safetensors format.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// Every element type of the safetensors format, in the order of its reference implementation (which is the order in
/// which that writer sorts tensors, descending).
enum class dtype : std::uint8_t {
    boolean,
    f4,
    f6_e2m3,
    f6_e3m2,
    u8,
    i8,
    f8_e5m2,
    f8_e4m3,
    f8_e8m0,
    f8_e4m3fnuz,
    f8_e5m2fnuz,
    i16,
    u16,
    f16,
    bf16,
    i32,
    u32,
    f32,
    c64,
    f64,
    i64,
    u64
};

namespace detail {
struct dtype_row {
    dtype type;
    std::string_view name; // as safetensors spells it
    unsigned bits;
};
inline constexpr dtype_row dtype_table[] = {
    {dtype::boolean, "BOOL", 8},
    {dtype::f4, "F4", 4},
    {dtype::f6_e2m3, "F6_E2M3", 6},
    {dtype::f6_e3m2, "F6_E3M2", 6},
    {dtype::u8, "U8", 8},
    {dtype::i8, "I8", 8},
    {dtype::f8_e5m2, "F8_E5M2", 8},
    {dtype::f8_e4m3, "F8_E4M3", 8},
    {dtype::f8_e8m0, "F8_E8M0", 8},
    {dtype::f8_e4m3fnuz, "F8_E4M3FNUZ", 8},
    {dtype::f8_e5m2fnuz, "F8_E5M2FNUZ", 8},
    {dtype::i16, "I16", 16},
    {dtype::u16, "U16", 16},
    {dtype::f16, "F16", 16},
    {dtype::bf16, "BF16", 16},
    {dtype::i32, "I32", 32},
    {dtype::u32, "U32", 32},
    {dtype::f32, "F32", 32},
    {dtype::c64, "C64", 64},
    {dtype::f64, "F64", 64},
    {dtype::i64, "I64", 64},
    {dtype::u64, "U64", 64},
};
} // namespace detail

/// The name of a dtype as safetensors spells it ("BF16").
[[nodiscard]] constexpr std::string_view to_string(dtype type) noexcept
{
    return detail::dtype_table[static_cast<std::size_t>(type)].name;
}

/// Bits of one element: 4 and 6 for the packed types, otherwise a multiple of 8.
[[nodiscard]] constexpr unsigned bits_per_element(dtype type) noexcept
{
    return detail::dtype_table[static_cast<std::size_t>(type)].bits;
}

/// The dtype with this safetensors name, or nothing.
[[nodiscard]] constexpr std::optional<dtype> parse_dtype(std::string_view text) noexcept
{
    for (const auto& row : detail::dtype_table) {
        if (row.name == text) { return row.type; }
    }
    return std::nullopt;
}

/// True for 8-bit floats that are dequantised to f32 on reading.
[[nodiscard]] constexpr bool is_fp8(dtype type) noexcept
{
    return type == dtype::f8_e4m3 || type == dtype::f8_e5m2;
}

/// Calls visit(std::type_identity<N>{}) with the type of a dtype of whole numbers, and says whether it is one.
///
///     taskvec::visit_integer(type, [&]<class N>(std::type_identity<N>) { largest = std::numeric_limits<N>::max(); });
template <class Visit>
constexpr bool visit_integer(dtype type, Visit&& visit)
{
    switch (type) {
    case dtype::i8: visit(std::type_identity<std::int8_t>{}); return true;
    case dtype::u8: visit(std::type_identity<std::uint8_t>{}); return true;
    case dtype::i16: visit(std::type_identity<std::int16_t>{}); return true;
    case dtype::u16: visit(std::type_identity<std::uint16_t>{}); return true;
    case dtype::i32: visit(std::type_identity<std::int32_t>{}); return true;
    case dtype::u32: visit(std::type_identity<std::uint32_t>{}); return true;
    case dtype::i64: visit(std::type_identity<std::int64_t>{}); return true;
    case dtype::u64: visit(std::type_identity<std::uint64_t>{}); return true;
    default: return false;
    }
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_DTYPE_HPP

// ---- taskvec/core/float_bits.hpp
#if !defined(TASKVEC_SINGLE_CORE_FLOAT_BITS_HPP)
#define TASKVEC_SINGLE_CORE_FLOAT_BITS_HPP
// Floating-point numbers as bits: the exact conversions between stored words and arithmetic types, and magnitudes as
// integers.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/storage_list.hpp
#if !defined(TASKVEC_SINGLE_CORE_STORAGE_LIST_HPP)
#define TASKVEC_SINGLE_CORE_STORAGE_LIST_HPP
// Which types tensors are stored in, by name alone: the list that a new storage type is entered in.
// SPDX-License-Identifier: Apache-2.0


#include <concepts>

namespace taskvec::inline TASKVEC_ABI {

/// The types that arithmetic runs in.
template <class T>
concept arithmetic_element = std::same_as<T, double> || std::same_as<T, float>;

/// Storage types in a row: the list of all of them is storage_types (fwd.hpp).
template <class... T>
struct storage_list { };

struct TASKVEC_MAY_ALIAS bf16;
struct TASKVEC_MAY_ALIAS f16;

/// The storage types that come with the library, in the order in which messages name them.
using own_storage_types = storage_list<double, float, bf16, f16>;

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_STORAGE_LIST_HPP

#include <concepts>
#include <cstdint>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_KERNELS_BEGIN

/// std::bit_cast, compiled under the kernels' options: g++ inlines no function into a kernel that was compiled without
/// them.
template <class To, class From>
    requires(sizeof(To) == sizeof(From))
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr To reinterpret_bits(From value) noexcept
{
    return __builtin_bit_cast(To, value);
}

/// bf16 bits to f32, exact.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float bf16_to_f32(std::uint16_t value) noexcept
{
    return reinterpret_bits<float>(static_cast<std::uint32_t>(value) << 16);
}

/// f32 to bf16 bits, to nearest even; NaN stays a quiet NaN of the same sign.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint16_t f32_to_bf16(float value) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const std::uint32_t quiet = (word >> 16) | 0x0040u;
    const std::uint32_t nan = 0u - static_cast<std::uint32_t>((word & 0x7fffffffu) > 0x7f800000u);
    return static_cast<std::uint16_t>((quiet & nan) | (rounded & ~nan));
}

/// f16 bits to f32, exact (subnormals too). Branch-free, so that loops of it vectorise.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float f16_to_f32(std::uint16_t value) noexcept
{
    const std::uint32_t sign = (value & 0x8000u) << 16;
    const std::uint32_t magnitude = value & 0x7fffu;
    // Exponent and mantissa moved into place are 2^112 too small; an exact product by a power of two mends normals and
    // subnormals alike. Infinity and NaN keep their all-ones exponent.
    const float scaled = reinterpret_bits<float>(magnitude << 13) * 0x1p112f;
    const std::uint32_t special = (magnitude << 13) | 0x7f800000u;
    const std::uint32_t extreme = 0u - static_cast<std::uint32_t>(magnitude >= 0x7c00u);
    const std::uint32_t word = (special & extreme) | (reinterpret_bits<std::uint32_t>(scaled) & ~extreme);
    return reinterpret_bits<float>(word | sign);
}

/// f32 to f16 bits, to nearest even, overflow to infinity, subnormals exact; NaN stays a quiet NaN of the same sign.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint16_t f32_to_f16(float value) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t sign = (word >> 16) & 0x8000u;
    const std::uint32_t magnitude = word & 0x7fffffffu;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 an addition of 1/2 aligns the mantissa to f16's subnormal spacing and rounds it to nearest even.
    const std::uint32_t subnormal =
        reinterpret_bits<std::uint32_t>(reinterpret_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x03ffu);
    const auto select = [](bool condition, std::uint32_t yes, std::uint32_t no) {
        const std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
        return (yes & mask) | (no & ~mask);
    };
    std::uint32_t result = select(magnitude < 0x38800000u, subnormal, normal);
    result = select(magnitude >= 0x477ff000u, 0x7c00u, result);
    result = select(magnitude > 0x7f800000u, nan, result);
    return static_cast<std::uint16_t>(result | sign);
}

/// fp8 bits to f32, exact. e4m3 (fn) has no infinity: its largest code is NaN. e5m2 is the upper byte of f16.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float e4m3_to_f32(std::uint8_t code) noexcept
{
    const std::uint32_t sign = (code & 0x80u) << 24, magnitude = code & 0x7fu;
    // As for f16: moved into place an e4m3 number is 2^120 too small, subnormals too.
    const float scaled = reinterpret_bits<float>(magnitude << 20) * 0x1p120f;
    const std::uint32_t nan = 0u - static_cast<std::uint32_t>(magnitude == 0x7fu);
    return reinterpret_bits<float>((0x7fc00000u & nan) | (reinterpret_bits<std::uint32_t>(scaled) & ~nan) | sign);
}
/// The number of an e5m2 code (1 sign, 5 exponent, 2 mantissa bits: the upper half of an f16). Exact.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float e5m2_to_f32(std::uint8_t code) noexcept
{
    return f16_to_f32(static_cast<std::uint16_t>(code << 8));
}

/// f32 to fp8 bits, to nearest even. A finite value beyond the largest number becomes that number (448, 57344). NaN
/// stays NaN, and so does infinity in e4m3, which has none.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint8_t f32_to_e4m3(float value) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t sign = (word >> 24) & 0x80u, magnitude = word & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) { return static_cast<std::uint8_t>(sign | 0x7fu); }
    // Below 2^-6 an addition of 2^14 aligns the mantissa to the subnormals' spacing of 2^-9.
    const std::uint32_t code = magnitude < 0x3c800000u
        ? reinterpret_bits<std::uint32_t>(reinterpret_bits<float>(magnitude) + 0x1p14f) - 0x46800000u
        : (magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    return static_cast<std::uint8_t>(sign | (code > 0x7eu ? 0x7eu : code));
}
/// The same to e5m2, whose infinity stays.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint8_t f32_to_e5m2(float value) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t sign = (word >> 24) & 0x80u, magnitude = word & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) {
        return static_cast<std::uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7eu : 0x7cu));
    }
    // Below 2^-14 an addition of 2^7 aligns the mantissa to the subnormals' spacing of 2^-16.
    const std::uint32_t code = magnitude < 0x38800000u
        ? reinterpret_bits<std::uint32_t>(reinterpret_bits<float>(magnitude) + 0x1p7f) - 0x43000000u
        : (magnitude - 0x38000000u + 0xfffffu + ((magnitude >> 21) & 1u)) >> 21;
    return static_cast<std::uint8_t>(sign | (code > 0x7bu ? 0x7bu : code));
}

/// f64 to f32, rounded to odd: what is then rounded to a type of at most 22 bits of precision is rounded once.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr float f64_to_f32_odd(double value) noexcept
{
    const float nearest = static_cast<float>(value);
    const double back = static_cast<double>(nearest);
    auto word = reinterpret_bits<std::uint32_t>(nearest);
    if (back == value || value != value || (word & 0x7fffffffu) == 0x7f800000u) { return nearest; }
    // Truncate toward zero, then set the last bit: an inexact value can no longer look like a tie.
    const double magnitude = value < 0 ? -value : value;
    const double rounded = back < 0 ? -back : back;
    if (rounded > magnitude) { --word; }
    return reinterpret_bits<float>(word | 1u);
}

/// Unsigned words as wide as the arithmetic type; magnitudes compare as these once the sign is cleared.
template <arithmetic_element A>
using bits_type = std::conditional_t<std::same_as<A, double>, std::uint64_t, std::uint32_t>;

/// The bit of the sign in A's word.
template <arithmetic_element A>
inline constexpr bits_type<A> sign_mask = std::same_as<A, double> ? static_cast<bits_type<A>>(std::uint64_t{1} << 63)
                                                                  : static_cast<bits_type<A>>(0x80000000u);

/// The bits of the exponent in A's word: those of infinity.
template <arithmetic_element A>
inline constexpr bits_type<A> exponent_mask =
    std::same_as<A, double> ? static_cast<bits_type<A>>(0x7ff0000000000000ull) : static_cast<bits_type<A>>(0x7f800000u);

/// The bits of |x|: ordered as the magnitudes are.
template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr bits_type<A> magnitude_bits(A value) noexcept
{
    return reinterpret_bits<bits_type<A>>(value) & static_cast<bits_type<A>>(~sign_mask<A>);
}

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_FLOAT_BITS_HPP

namespace taskvec::inline TASKVEC_ABI {

/// Specialised for each storage type T, a trivially copyable type that holds one word and nothing else:
///
///     word        the unsigned integer (or float, double) that holds an element: what loops load and store
///     arithmetic  float or double: the type that arithmetic on T runs in; it holds every T exactly
///     dtype       the dtype of safetensors that T is stored as; two storage types cannot share one
///     widen       word → arithmetic, exact
///     narrow      arithmetic → word, rounded once, to nearest even; NaN stays NaN
///
/// widen and narrow are static, constexpr, noexcept and TASKVEC_HOST_DEVICE, and stand between TASKVEC_KERNELS_BEGIN
/// and TASKVEC_KERNELS_END; without a branch, loops of them vectorise. An f64 becomes a T whose arithmetic is f32
/// through a float that is rounded to odd, hence by one rounding where T has at most 22 bits of precision.
///
///     template <>
///     struct storage_traits<my::fixed> {
///         using word = std::uint16_t;
///         using arithmetic = float;
///         static constexpr taskvec::dtype dtype = taskvec::dtype::i16;
///         static constexpr float widen(word stored) noexcept;
///         static constexpr word narrow(float value) noexcept;
///     };
template <class T>
struct storage_traits;

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_STORAGE_TRAITS_HPP

#include <cstdint>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_KERNELS_BEGIN

/// A bfloat16 number (the upper half of an f32) as its 16 bits. Only stored: arithmetic runs in f32. Numbers become a
/// bf16 by one rounding, to nearest even; a bf16 becomes a float exactly. Comparison compares the numbers: NaN equals
/// nothing, −0 equals +0. Trivial: not initialised unless by `bf16{}`, which is 0. It may alias other types of the same
/// bits (Eigen::bfloat16, std::bfloat16_t, std::uint16_t).
///
///     const taskvec::bf16 x(1.5f), y = taskvec::bf16::from_bits(0x3fc0);
///     const bool same = x == y && static_cast<float>(y) == 1.5f;
struct TASKVEC_MAY_ALIAS bf16 {
    std::uint16_t word; ///< the bits

    bf16() = default;
    /// Rounds once, to nearest even.
    TASKVEC_HOST_DEVICE explicit constexpr bf16(float value) noexcept
        : word(f32_to_bf16(value))
    { }
    /// The same of any number, rounded once: by way of f64, never twice.
    template <class Number>
        requires std::is_arithmetic_v<Number>
    TASKVEC_HOST_DEVICE explicit constexpr bf16(Number value) noexcept
        : word(f32_to_bf16(f64_to_f32_odd(static_cast<double>(value))))
    { }
    /// The number of these bits.
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr bf16 from_bits(std::uint16_t bits) noexcept
    {
        return reinterpret_bits<bf16>(bits);
    }
    /// Exact.
    [[nodiscard]] TASKVEC_HOST_DEVICE explicit constexpr operator float() const noexcept { return bf16_to_f32(word); }
    /// Exact.
    [[nodiscard]] TASKVEC_HOST_DEVICE explicit constexpr operator double() const noexcept { return bf16_to_f32(word); }
    [[nodiscard]] TASKVEC_HOST_DEVICE friend constexpr bool operator==(bf16 x, bf16 y) noexcept
    {
        return bf16_to_f32(x.word) == bf16_to_f32(y.word);
    }
};

/// An IEEE half-precision number as its 16 bits. Otherwise as bf16; what is above 65504 rounds to infinity as IEEE has
/// it. May alias Eigen::half, std::float16_t, std::uint16_t.
struct TASKVEC_MAY_ALIAS f16 {
    std::uint16_t word; ///< the bits

    f16() = default;
    /// Rounds once, to nearest even.
    TASKVEC_HOST_DEVICE explicit constexpr f16(float value) noexcept
        : word(f32_to_f16(value))
    { }
    /// The same of any number, rounded once: by way of f64, never twice.
    template <class Number>
        requires std::is_arithmetic_v<Number>
    TASKVEC_HOST_DEVICE explicit constexpr f16(Number value) noexcept
        : word(f32_to_f16(f64_to_f32_odd(static_cast<double>(value))))
    { }
    /// The number of these bits.
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr f16 from_bits(std::uint16_t bits) noexcept
    {
        return reinterpret_bits<f16>(bits);
    }
    /// Exact.
    [[nodiscard]] TASKVEC_HOST_DEVICE explicit constexpr operator float() const noexcept { return f16_to_f32(word); }
    /// Exact.
    [[nodiscard]] TASKVEC_HOST_DEVICE explicit constexpr operator double() const noexcept { return f16_to_f32(word); }
    [[nodiscard]] TASKVEC_HOST_DEVICE friend constexpr bool operator==(f16 x, f16 y) noexcept
    {
        return f16_to_f32(x.word) == f16_to_f32(y.word);
    }
};

template <>
struct storage_traits<bf16> {
    using word = std::uint16_t;
    using arithmetic = float;
    static constexpr taskvec::dtype dtype = taskvec::dtype::bf16;
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr float widen(word stored) noexcept { return bf16_to_f32(stored); }
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr word narrow(float value) noexcept { return f32_to_bf16(value); }
};

template <>
struct storage_traits<f16> {
    using word = std::uint16_t;
    using arithmetic = float;
    static constexpr taskvec::dtype dtype = taskvec::dtype::f16;
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr float widen(word stored) noexcept { return f16_to_f32(stored); }
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr word narrow(float value) noexcept { return f32_to_f16(value); }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_HALF_HPP

// ---- taskvec/fwd.hpp
#if !defined(TASKVEC_SINGLE_FWD_HPP)
#define TASKVEC_SINGLE_FWD_HPP
// Every public type of the CPU's rooms, declared: for headers that name the library's types and need no more of them.
// SPDX-License-Identifier: Apache-2.0
//
// Definitions are in the header of each type, `taskvec/<room>/…`; default template arguments are here. A program's own
// header includes this one, and its source files what they use. It includes a few small headers of the standard
// library (and, where TASKVEC_MORE_STORAGE is defined, that header).
//
//     #include <taskvec/fwd.hpp>
//
//     class adapters_on_disk {
//         taskvec::lora_update<float> read(const taskvec::cpu& policy) const;
//         taskvec::matrix<double>* scratch;
//     };
//
// Not declared, because their constraints need definitions: disentanglement_meter (analysis/disentanglement.hpp),
// dlpack_handle (interop/dlpack.hpp) and tensor_group (methods/by_tensor.hpp).


#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(TASKVEC_MORE_STORAGE)
#include TASKVEC_MORE_STORAGE
#endif

namespace taskvec::inline TASKVEC_ABI {

// Storage types and memory spaces: what the constraints below ask for.

#if !defined(TASKVEC_MORE_STORAGE)
/// The storage types that a program adds (TASKVEC_MORE_STORAGE).
using more_storage_types = storage_list<>;
#endif

namespace detail {
template <class First, class Second>
struct joined_lists;
template <class... A, class... B>
struct joined_lists<storage_list<A...>, storage_list<B...>> {
    using type = storage_list<A..., B...>;
};

template <class T, class List>
inline constexpr bool is_listed = false;
template <class T, class... Listed>
inline constexpr bool is_listed<T, storage_list<Listed...>> = (std::same_as<T, Listed> || ...);
} // namespace detail

/// Every storage type.
using storage_types = typename detail::joined_lists<own_storage_types, more_storage_types>::type;

/// The types that the algorithms compute with when tensors are stored in them: f64, f32, bf16, f16, and what the
/// program adds.
template <class T>
concept storage_element = detail::is_listed<T, storage_types>;

/// Where memory is: part of the type of what views it.
enum class memory_space : std::uint8_t { host, device };

template <class T>
struct dual;

namespace detail {
template <class T>
inline constexpr bool is_dual = false;
template <class T>
inline constexpr bool is_dual<dual<T>> = true;
} // namespace detail

/// What derivatives are taken of: float, double, or a dual number over one of them (nested for higher derivatives).
template <class T>
concept differentiable_scalar = std::same_as<T, float> || std::same_as<T, double> || detail::is_dual<T>;

// core/
template <class T>
class call_allocator;
template <class Signature>
class callback;
template <class Signature>
class function_ref;
enum class dtype : std::uint8_t;
enum class error_kind;
enum class error_code : std::uint16_t;
struct error_code_entry;
class error;
class invalid_argument;
class shape_mismatch;
class dtype_mismatch;
class nonfinite_error;
class format_error;
class io_error;
class backend_error;
class cancelled;
class xxh64;
enum class instruction_set : std::uint8_t;
enum class matrix_order : std::uint8_t;
template <class T, memory_space S = memory_space::host>
    requires storage_element<std::remove_const_t<T>>
class matrix_view;
template <storage_element T, memory_space S = memory_space::host>
class matrix;
struct option_axis;
struct option_details;
template <class Options, class Value>
struct option_row;
template <class Options, class Inner, std::size_t N>
struct inner_options;
template <class... Rows>
struct option_table;
template <class Options>
struct option_preset;
template <class Options>
struct options_of;
template <class Enum>
struct enum_words;
template <class Enum>
struct enum_word;
enum class option_kind : std::uint8_t;
struct option_description;
template <arithmetic_element A, int bytes>
struct pack_mask;
template <arithmetic_element A, int bytes>
struct pack_words;
template <arithmetic_element A, int bytes>
struct pack;
enum class progress_unit : std::uint8_t;
struct progress_event;
enum class nonfinite : std::uint8_t;
struct cpu;
class device_memory_resource;
class gpu_context;
struct gpu;
class random_stream;
enum class word_order : std::uint8_t;
struct tensor_spec;
class tensor_sink;
class memory_sink;
template <class T>
struct same_bits_as;
template <class T>
struct storage_traits;
template <storage_element T>
struct pack_conversion;
template <storage_element T, int bytes>
struct stored_pack;
template <class Byte>
    requires std::is_void_v<Byte>
struct basic_tensor_ref;
template <class Ref>
class basic_model;
template <class T, memory_space S>
    requires storage_element<std::remove_const_t<T>>
class view;
template <class X>
struct view_traits;

/// Elements in host memory.
template <class T>
using host_view = view<T, memory_space::host>;
/// Elements in device memory.
template <class T>
using device_view = view<T, memory_space::device>;
/// A matrix in device memory.
template <class T>
using device_matrix_view = matrix_view<T, memory_space::device>;
/// A tensor that may be written. See basic_tensor_ref.
using tensor_ref = basic_tensor_ref<void>;
/// A tensor that is read. See basic_tensor_ref.
using const_tensor_ref = basic_tensor_ref<const void>;
/// A model that may be written. See basic_model.
using model_ref = basic_model<tensor_ref>;
/// A model that is read. See basic_model.
using const_model_ref = basic_model<const_tensor_ref>;

// linalg/
template <storage_element T, memory_space S = memory_space::host>
struct factor_pair;
template <arithmetic_element T, memory_space S = memory_space::host>
struct factored_svd_result;
template <arithmetic_element T, memory_space S = memory_space::host>
struct stacked_factors;
template <arithmetic_element T, memory_space S = memory_space::host>
struct qr_factors;
struct small_svd_result;
struct randomized_svd_options;
template <arithmetic_element T, memory_space S = memory_space::host>
struct randomized_svd_result;
struct decompose_randomized;
struct rank_choice;
template <arithmetic_element T, memory_space S = memory_space::host>
struct svd_result;
template <arithmetic_element T>
struct truncated_svd_result;
struct decompose_exactly;

// models/
class operand_source;
struct row_run;
class selected_rows;
enum class missing_tensors : std::uint8_t;
enum class overflow : std::uint8_t;
struct model_options;
struct aligned_tensor;
struct copied_tensor;
struct tensor_chunk;
class chunk_list;
struct tensor_range;
class aligned_models;
template <arithmetic_element A>
class row_block;
class block_workspace;
struct chunk_range;
struct companion;
class overflow_guard;
struct operand_pair;
enum class weight_layout : std::uint8_t;

// select/
class index_list;
template <arithmetic_element A>
struct sparse_vector;
template <arithmetic_element A>
struct bitmask_vector;
struct sparse_view;
class saved_words;
class sparse_sink;
class sparse_model_sink;
enum class scope : std::uint8_t;
enum class trim_rule : std::uint8_t;
class task_shares;
class trim_thresholds;
template <arithmetic_element A>
struct top_k_threshold;

// statistics/
class fisher_accumulator;
class empirical_fisher_accumulator;
class expected_fisher_accumulator;
class gram_accumulator;

// methods/
struct keep_all;
template <arithmetic_element A>
struct acting_mean_body;
struct arcee_fusion_options;
template <arithmetic_element A>
struct chosen_body;
struct average_options;
struct checkpoint_average_options;
enum class checkpoint_schedule : std::uint8_t;
enum class decay_shape : std::uint8_t;
struct breadcrumbs_options;
struct breadcrumbs_ties_options;
enum class angles_between : std::uint8_t;
template <arithmetic_element A>
struct combination_body;
class combination_method;
struct dare_options;
struct dare_ties_options;
struct della_options;
struct della_linear_options;
enum class rank_axis : std::uint8_t;
class row_pieces;
enum class disjoint_merge : std::uint8_t;
enum class drop_rescale : std::uint8_t;
struct election_weights;
struct election_counts;
template <arithmetic_element A, class Rule>
struct sign_election_body;
template <arithmetic_element A, class Rule>
struct unit_election_body;
template <arithmetic_element A, class Rule = keep_all>
struct kept_sum_body;
class kept_sum;
struct fisher_options;
template <arithmetic_element A>
struct fisher_body;
template <arithmetic_element A>
struct keep_between_of_tensor;
class keep_between;
template <arithmetic_element A>
struct keep_random_of_tensor;
class keep_random;
template <arithmetic_element A>
struct keep_ranked_of_tensor;
class keep_ranked;
template <arithmetic_element A>
struct keep_top_of_tensor;
class keep_top;
template <arithmetic_element A>
struct mean_body;
template <arithmetic_element A>
struct pair_body;
template <arithmetic_element A>
struct scaled_body;
template <class Options>
class method;
struct merge_report;
struct merge_tally;
struct elementwise_method;
struct general_method;
struct karcher_options;
struct model_stock_options;
struct multi_slerp_options;
struct nearswap_options;
template <arithmetic_element A>
struct nearswap_body;
struct nuslerp_options;
class cpu_passes;
template <class Types>
class typed_passes;
class kept_numbers;
struct passthrough_options;
struct ram_options;
struct ram_plus_options;
struct regmean_options;
struct sce_options;
template <arithmetic_element A>
struct sce_body;
struct slerp_options;
struct task_arithmetic_options;
enum class zero_sign : std::uint8_t;
struct ties_options;
template <class Keep>
class sign_election_method;

// search/
struct lambda_grid;
struct lorahub_options;
struct lorahub_candidate;
struct lorahub_result;
struct lorahub_problem;
class lorahub_error;
struct cobyla;
struct subset_sweep_options;
struct sweep_row;
class sweep_table;
struct sweep_options;
template <storage_element T>
class task_space;
struct plane_options;

// analysis/
struct prediction_mismatch;
struct tensor_norms;
struct summary;

// adapters/
enum class sigma_side : std::uint8_t;
struct layer_report;
template <arithmetic_element T, memory_space S = memory_space::host>
struct adapter_result;
template <storage_element S>
class folded_update;
struct extract_options;
template <arithmetic_element T>
struct extract_result;
struct initialization_labels;
template <arithmetic_element T, memory_space S = memory_space::host>
struct lora_update;
struct linear_merge_options;
struct adapter_ties_options;
enum class peft_combination : std::uint8_t;
struct peft_merge_options;
struct initialized_adapter;
struct update_place;
struct weight_change;
template <arithmetic_element A>
class adapted_weight;
template <arithmetic_element A>
class adapted_stack;
class adapted_model;
struct fuse_options;
template <arithmetic_element T>
struct weighted_update;

// reuse/
struct peru_lora_options;
struct post_pruning_options;
struct sparse_addition_options;

// formats/
enum class index_check : std::uint8_t;
class checkpoint;
struct shard_name_parts;
struct shard_plan;
class resumable_shards;
class sharded_writer;
struct delta;
class delta_writer;
class delta_file;
struct file_kind;
class mapped_file;
enum class durability : std::uint8_t;
class atomic_file;
class directory_lock;
enum class existing_directory : std::uint8_t;
class output_directory;
class name_pattern;
struct peft_tensor;
template <arithmetic_element T>
struct peft_adapter;
class peft_writer;
struct peft_read_options;
enum class adapter_dialect : std::uint8_t;
struct parameter_slice;
template <arithmetic_element T>
struct adapted_module;
template <arithmetic_element T>
struct adapter_contents;
struct diffusion_module;
class diffusion_names;
struct module_match;
struct shape_check;
struct adapter_write_options;
struct adapter_loss;
struct written_adapter;
struct adapter_base_traits;
struct gguf_header;
struct gguf_target;
struct peft_write_options;
enum class quantisation : std::uint8_t;
struct layer_part;
struct quantised_layer;
struct unread_layer;
struct quantisation_hints;
class quantised_tensor;
class quantised_layers;
struct quantised_outputs;
class quantising_sink;
struct pytorch_contents;
struct safetensors_entry;
struct safetensors_header;
class safetensors_file;
struct safetensors_layout;
class safetensors_writer;
enum class statistics_kind : std::uint8_t;
struct statistics_info;
class statistics_file;

// jvp/
struct attention_options;
template <class T>
struct attention_gradient;
template <class T>
struct sum_gradient;
template <class T>
struct elementwise_product_gradient;
template <class Value>
struct jvp_result;
template <class T>
struct matmul_gradient;
struct matmul_wanted;
template <class T>
struct linear_gradient;
struct linear_wanted;
struct linearize_options;
template <class F, differentiable_scalar T>
class linearized;
template <class T>
struct linearized_lora_gradient;
template <arithmetic_element T>
class linearized_lora_layer;
template <class T>
struct lora_gradient;
struct lora_wanted;
template <arithmetic_element T>
class lora_layer;
struct normalization_options;
template <class T>
struct normalization_gradient;
template <class Value>
class named_values;
template <differentiable_scalar T>
class primal_tangent;

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FWD_HPP

#include <concepts>
#include <cstddef>
#include <string>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_KERNELS_BEGIN

template <>
struct storage_traits<double> {
    using word = double;
    using arithmetic = double;
    static constexpr taskvec::dtype dtype = taskvec::dtype::f64;
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr double widen(double stored) noexcept { return stored; }
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr double narrow(double value) noexcept { return value; }
};

template <>
struct storage_traits<float> {
    using word = float;
    using arithmetic = float;
    static constexpr taskvec::dtype dtype = taskvec::dtype::f32;
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr float widen(float stored) noexcept { return stored; }
    [[nodiscard]] TASKVEC_HOST_DEVICE static constexpr float narrow(float value) noexcept { return value; }
};

TASKVEC_KERNELS_END

namespace detail {
// What an entry of the list may lack, each in a sentence.
template <class T>
concept storage_with_word = requires { typename storage_traits<T>::word; };
template <class T>
concept storage_with_arithmetic =
    requires { typename storage_traits<T>::arithmetic; } && arithmetic_element<typename storage_traits<T>::arithmetic>;
template <class T>
concept storage_with_dtype = requires {
    { storage_traits<T>::dtype } -> std::convertible_to<dtype>;
};
template <class T>
concept storage_with_widen = requires(typename storage_traits<T>::word stored) {
    { storage_traits<T>::widen(stored) } -> std::same_as<typename storage_traits<T>::arithmetic>;
};
template <class T>
concept storage_with_narrow = requires(typename storage_traits<T>::arithmetic value) {
    { storage_traits<T>::narrow(value) } -> std::same_as<typename storage_traits<T>::word>;
};

template <class T>
consteval bool complete_storage()
{
    constexpr bool word = storage_with_word<T>, arithmetic = storage_with_arithmetic<T>, type = storage_with_dtype<T>;
    static_assert(word, "taskvec: this storage type has no storage_traits<T>::word, the type of what it is stored as");
    static_assert(arithmetic,
        "taskvec: this storage type has no storage_traits<T>::arithmetic, float or double, to compute with it in");
    static_assert(type,
        "taskvec: this storage type has no storage_traits<T>::dtype, the dtype of safetensors that it is stored as");
    if constexpr (word && arithmetic) {
        static_assert(storage_with_widen<T>,
            "taskvec: this storage type has no storage_traits<T>::widen, which makes the arithmetic type of a word: "
            "static constexpr arithmetic widen(word)");
        static_assert(storage_with_narrow<T>,
            "taskvec: this storage type has no storage_traits<T>::narrow, which rounds the arithmetic type to a word: "
            "static constexpr word narrow(arithmetic)");
    }
    if constexpr (word && type) {
        static_assert(std::is_trivially_copyable_v<T> && sizeof(T) == sizeof(typename storage_traits<T>::word)
                && 8 * sizeof(T) == bits_per_element(storage_traits<T>::dtype),
            "taskvec: this storage type is not one word of its dtype's size, trivially copyable");
    }
    return true;
}
template <class... T>
consteval bool complete_storages(storage_list<T...>)
{
    return (complete_storage<T>() && ...);
}
template <class... T>
consteval bool dtypes_differ(storage_list<T...>)
{
    const dtype types[] = {storage_traits<T>::dtype...};
    for (std::size_t i = 0; i < sizeof...(T); ++i) {
        for (std::size_t j = 0; j < i; ++j) {
            if (types[i] == types[j]) { return false; }
        }
    }
    return true;
}
} // namespace detail

static_assert(detail::complete_storages(storage_types{}) && detail::dtypes_differ(storage_types{}),
    "taskvec: two storage types have the same dtype");

namespace detail {
template <class>
struct storage_of_any {
    using type = storage_types;
};
template <class X>
    requires requires { typename X::storage; }
struct storage_of_any<X> {
    using type = typename X::storage;
};
} // namespace detail

/// The storage types that X may meet: those of the list that it names as X::storage, otherwise all.
template <class X>
using storage_of = typename detail::storage_of_any<X>::type;

/// The type that arithmetic on T runs in: f64 for f64, otherwise f32.
template <storage_element T>
using arithmetic_type = typename storage_traits<T>::arithmetic;

/// What the loops load and store for an element of T: the number itself, or the bits of a narrow type (a class there
/// keeps the vectoriser away).
template <storage_element T>
using storage_word = typename storage_traits<T>::word;

/// The dtype that tensors of T have.
template <storage_element T>
inline constexpr dtype dtype_of = storage_traits<T>::dtype;

/// Somebody else's type with the bits of a storage type, specialised where such types are known (Eigen::bfloat16 and
/// Eigen::half in interop/eigen.hpp): containers of it are views of that storage type, without a copy.
///
///     template <>
///     struct same_bits_as<std::bfloat16_t> { using type = taskvec::bf16; };
template <class T>
struct same_bits_as;
template <storage_element T>
struct same_bits_as<T> {
    using type = T;
};

/// A storage type, or a type that has the bits of one.
template <class T>
concept storable = requires { typename same_bits_as<T>::type; };

namespace detail {
template <class... T>
[[nodiscard]] constexpr bool any_is(dtype type, storage_list<T...>) noexcept
{
    return ((type == dtype_of<T>) || ...);
}

template <class... T>
[[nodiscard]] std::string names_of(storage_list<T...>)
{
    const std::string_view names[] = {to_string(dtype_of<T>)...};
    std::string text;
    for (std::size_t i = 0; i < sizeof...(T); ++i) {
        text += i == 0 ? "" : i + 1 == sizeof...(T) ? " or " : ", ";
        text += names[i];
    }
    return text;
}
} // namespace detail

/// True for the dtypes that merges compute with directly: those of the storage types.
[[nodiscard]] constexpr bool is_storage(dtype type) noexcept
{
    return detail::any_is(type, storage_types{});
}

/// True for fp8 that is dequantised to f32 on reading: that which is no storage type itself.
[[nodiscard]] constexpr bool is_dequantised(dtype type) noexcept
{
    return is_fp8(type) && !is_storage(type);
}

/// The storage types as messages name them: "F64, F32, BF16 or F16".
[[nodiscard]] TASKVEC_COLD inline std::string storage_names()
{
    return detail::names_of(storage_types{});
}

TASKVEC_KERNELS_BEGIN

/// Converts the stored word of a T to an arithmetic type. Exact, except f64 to f32 (to nearest even).
template <arithmetic_element A, storage_element T>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr A widen_word(storage_word<T> word) noexcept
{
    return static_cast<A>(storage_traits<T>::widen(word));
}

/// Converts one stored element to an arithmetic type.
template <arithmetic_element A, storage_element T>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr A widen(T value) noexcept
{
    return widen_word<A, T>(reinterpret_bits<storage_word<T>>(value));
}

/// Rounds an arithmetic value to the stored word of a T once, to nearest even. f64 to f32 and back are the hardware's
/// conversions; narrower types go through f32 (f64 therefore rounds to odd first, so that the result is rounded once).
template <storage_element T, arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr storage_word<T> narrow_word(A value) noexcept
{
    if constexpr (arithmetic_element<T>) { return static_cast<T>(value); }
    else if constexpr (std::same_as<A, double> && std::same_as<arithmetic_type<T>, float>) {
        return storage_traits<T>::narrow(f64_to_f32_odd(value));
    }
    else {
        return storage_traits<T>::narrow(static_cast<arithmetic_type<T>>(value));
    }
}

/// Rounds an arithmetic value to a storage type once, to nearest even.
template <storage_element T, arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr T narrow(A value) noexcept
{
    return reinterpret_bits<T>(narrow_word<T>(value));
}

TASKVEC_KERNELS_END

namespace detail {
[[noreturn]] TASKVEC_COLD inline void refuse_storage(dtype type, std::string_view tensor)
{
    raise<dtype_mismatch>(error_code::dtype_unsupported,
        message("tensor '", tensor, "' has dtype ", to_string(type), "; expected ", storage_names(),
            ": exclude it or convert it first"));
}
template <class F, class First, class... Rest>
decltype(auto) visit_listed(dtype type, std::string_view what, F& f, storage_list<First, Rest...>)
{
    if (type == dtype_of<First>) { return f(std::type_identity<First>{}); }
    if constexpr (sizeof...(Rest) > 0) { return visit_listed(type, what, f, storage_list<Rest...>{}); }
    else {
        refuse_storage(type, what);
    }
}
} // namespace detail

/// Calls f with a value of the storage type that `type` names (std::type_identity<T>{}); other types are an error that
/// names `what`.
template <class F>
decltype(auto) visit_storage(dtype type, std::string_view what, F&& f)
{
    return detail::visit_listed(type, what, f, storage_types{});
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_STORAGE_HPP

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// A contiguous run of `size` elements of T in memory space S; does not own them. T may be const.
template <class T, memory_space S>
    requires storage_element<std::remove_const_t<T>>
class view {
public:
    using element_type = T;
    using value_type = std::remove_const_t<T>;
    static constexpr memory_space space = S; ///< Where the elements are.

    constexpr view() noexcept = default;
    /// `size` elements from `data` on.
    constexpr view(T* data, std::size_t size) noexcept
        : data_(data)
        , size_(size)
    { }
    /// A view of mutable elements is a view of const ones.
    template <std::same_as<value_type> Mutable>
        requires std::is_const_v<T>
    constexpr view(const view<Mutable, S>& other) noexcept
        : data_(other.data())
        , size_(other.size())
    { }

    [[nodiscard]] constexpr T* data() const noexcept { return data_; }
    [[nodiscard]] constexpr std::size_t size() const noexcept { return size_; }
    [[nodiscard]] constexpr bool empty() const noexcept { return size_ == 0; }

    // Only memory that the host can read has elements.
    [[nodiscard]] constexpr T& operator[](std::size_t index) const noexcept
        requires(S == memory_space::host)
    {
        return data_[index];
    }
    [[nodiscard]] constexpr T* begin() const noexcept
        requires(S == memory_space::host)
    {
        return data_;
    }
    [[nodiscard]] constexpr T* end() const noexcept
        requires(S == memory_space::host)
    {
        return data_ + size_;
    }

private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

/// How a type becomes a view. Specialised for views and contiguous ranges here, for Eigen and xtensor in interop/.
/// A specialisation has `static view<…> get(X&)`, and refuses with an error what is not contiguous.
template <class X>
struct view_traits;

template <class T, memory_space S>
struct view_traits<view<T, S>> {
    static constexpr view<T, S> get(const view<T, S>& x) noexcept { return x; }
};
template <class T, memory_space S>
struct view_traits<const view<T, S>> : view_traits<view<T, S>> { };

namespace detail {
/// The storage type with the bits of T, const where T is.
template <class T>
using stored_as = std::conditional_t<std::is_const_v<T>, const typename same_bits_as<std::remove_const_t<T>>::type,
    typename same_bits_as<std::remove_const_t<T>>::type>;

/// Elements as those of their storage type.
template <class T>
[[nodiscard]] constexpr stored_as<T>* as_stored(T* x) noexcept
{
    if constexpr (std::same_as<T, stored_as<T>>) { return x; }
    else {
        return reinterpret_cast<stored_as<T>*>(x);
    }
}

/// A vector, array, span or their like: elements that can be stored, one after another.
template <class X>
concept contiguous_run = requires(X& x) {
    { *std::data(x) } -> std::same_as<std::remove_pointer_t<decltype(std::data(x))>&>;
    { std::size(x) } -> std::convertible_to<std::size_t>;
    requires storable<std::remove_cv_t<std::remove_pointer_t<decltype(std::data(x))>>>;
};

/// Something with a shape of its own: its elements need not lie row-major in one run. interop/ knows how it becomes a
/// view.
template <class X>
concept has_shape = requires(X& x) { x.shape(); } || requires(X& x) {
    x.rows();
    x.cols();
};
} // namespace detail

template <class X>
    requires detail::contiguous_run<X> && (!detail::has_shape<X>)
struct view_traits<X> {
    using element = detail::stored_as<std::remove_pointer_t<decltype(std::data(std::declval<X&>()))>>;
    static constexpr host_view<element> get(X& x) noexcept
    {
        return {detail::as_stored(std::data(x)), static_cast<std::size_t>(std::size(x))};
    }
};

/// Something that as_view() turns into a view: a view, a vector, array or span, an Eigen or xtensor container.
template <class X>
concept viewable = requires(std::remove_reference_t<X>& x) { view_traits<std::remove_reference_t<X>>::get(x); };

namespace detail {
/// Whether an object of this type owns the elements that it shows: its constness is theirs, and it is no
/// expression that says which other type its plain form is (Eigen's maps and blocks, xtensor's views).
template <class X>
concept owns_elements =
    viewable<X> && std::is_const_v<typename decltype(view_traits<const X>::get(std::declval<const X&>()))::element_type>
    && !std::is_const_v<typename decltype(view_traits<X>::get(std::declval<X&>()))::element_type>
    && !(
        requires { typename X::PlainObject; } && !requires { requires std::same_as<typename X::PlainObject, X>; })
    && !(
        requires { typename X::temporary_type; }
        && !requires { requires std::same_as<typename X::temporary_type, X>; });
} // namespace detail

/// Something whose elements are still there after the expression that it stands in: anything with a name, or a view.
/// (A temporary container is not: name it first.)
template <class X>
concept outlives_the_expression = std::is_lvalue_reference_v<X> || !detail::owns_elements<std::remove_cvref_t<X>>;

/// The view of x, without a copy. A temporary container is refused: its view would dangle.
template <viewable X>
    requires outlives_the_expression<X>
[[nodiscard]] constexpr auto as_view(X&& x)
{
    return view_traits<std::remove_reference_t<X>>::get(x);
}

/// The type of as_view(x), its element type (never const) and its memory space.
template <viewable X>
using view_of = decltype(view_traits<std::remove_reference_t<X>>::get(std::declval<std::remove_reference_t<X>&>()));
/// The element type of as_view(x), without const.
template <viewable X>
using element_of = typename view_of<X>::value_type;

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_VIEW_HPP

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which neighbours lie side by side in memory: those of a row (C, NumPy, PyTorch) or those of a column (Fortran, BLAS,
/// Eigen's default).
enum class matrix_order : std::uint8_t { row_major, column_major };

/// A rows×cols matrix of T in memory space S; does not own it. T may be const. `stride` counts the elements between the
/// starts of consecutive rows (row_major) or columns (column_major); 0 stands for a matrix without gaps.
///
///     matrix_view<const float> weight(data, out, in, matrix_order::row_major);
template <class T, memory_space S>
    requires storage_element<std::remove_const_t<T>>
class matrix_view {
public:
    using element_type = T;
    using value_type = std::remove_const_t<T>;
    static constexpr memory_space space = S; ///< Where the elements are.

    constexpr matrix_view() noexcept = default;
    /// Rows×cols elements from `data` on; `stride`: between starts of rows or columns, 0 for no gaps.
    constexpr matrix_view(
        T* data, std::size_t rows, std::size_t cols, matrix_order order, std::size_t stride = 0) noexcept
        : data_(data)
        , rows_(rows)
        , cols_(cols)
        , stride_(stride ? stride : (order == matrix_order::row_major ? cols : rows))
        , order_(order)
    { }
    /// A view of mutable elements is a view of const ones.
    template <std::same_as<value_type> Other>
        requires std::is_const_v<T>
    constexpr matrix_view(const matrix_view<Other, S>& other) noexcept
        : matrix_view(other.data(), other.rows(), other.cols(), other.order(), other.stride())
    { }

    [[nodiscard]] constexpr T* data() const noexcept { return data_; }
    /// Rows.
    [[nodiscard]] constexpr std::size_t rows() const noexcept { return rows_; }
    /// Columns.
    [[nodiscard]] constexpr std::size_t cols() const noexcept { return cols_; }
    [[nodiscard]] constexpr std::size_t size() const noexcept { return rows_ * cols_; }
    /// Elements between the starts of consecutive rows (row_major) or columns (column_major).
    [[nodiscard]] constexpr std::size_t stride() const noexcept { return stride_; }
    /// Which of the two lie together.
    [[nodiscard]] constexpr matrix_order order() const noexcept { return order_; }
    [[nodiscard]] constexpr bool empty() const noexcept { return rows_ == 0 || cols_ == 0; }

    /// The element; the caller keeps inside the matrix. On the host.
    [[nodiscard]] constexpr T& operator()(std::size_t row, std::size_t col) const noexcept
        requires(S == memory_space::host)
    {
        return data_[order_ == matrix_order::row_major ? row * stride_ + col : col * stride_ + row];
    }
    /// The same memory read as the transposed matrix.
    [[nodiscard]] constexpr matrix_view transposed() const noexcept
    {
        return {data_, cols_, rows_,
            order_ == matrix_order::row_major ? matrix_order::column_major : matrix_order::row_major, stride_};
    }
    /// rows×cols elements from (row, col) on; the caller keeps inside the matrix.
    [[nodiscard]] constexpr matrix_view block(
        std::size_t row, std::size_t col, std::size_t rows, std::size_t cols) const noexcept
    {
        T* const first = data_ + (order_ == matrix_order::row_major ? row * stride_ + col : col * stride_ + row);
        return {first, rows, cols, order_, stride_};
    }
    /// The first `count` columns.
    [[nodiscard]] constexpr matrix_view left_columns(std::size_t count) const noexcept
    {
        return block(0, 0, rows_, count);
    }

private:
    T* data_ = nullptr;
    std::size_t rows_ = 0, cols_ = 0, stride_ = 0;
    matrix_order order_ = matrix_order::column_major;
};

/// A matrix that owns its memory, without gaps, zero at first. A backend specialises it for its own memory space.
template <storage_element T, memory_space S>
class matrix;

template <storage_element T>
class matrix<T, memory_space::host> {
public:
    matrix() = default;
    matrix(std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major,
        std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : data_(rows * cols, T{}, memory)
        , rows_(rows)
        , cols_(cols)
        , order_(order)
    { }
    matrix(const matrix&) = default;
    matrix& operator=(const matrix&) = default;
    matrix(matrix&& other) noexcept
        : data_(std::move(other.data_))
        , rows_(std::exchange(other.rows_, 0))
        , cols_(std::exchange(other.cols_, 0))
        , order_(other.order_)
    { }
    /// Takes over the other's memory, and with it the resource that it came from.
    matrix& operator=(matrix&& other) noexcept
    {
        if (this != &other) {
            std::destroy_at(&data_);
            std::construct_at(&data_, std::move(other.data_));
            rows_ = std::exchange(other.rows_, 0);
            cols_ = std::exchange(other.cols_, 0);
            order_ = other.order_;
        }
        return *this;
    }
    ~matrix() = default;

    [[nodiscard]] T* data() noexcept { return data_.data(); }
    [[nodiscard]] const T* data() const noexcept { return data_.data(); }
    [[nodiscard]] std::size_t rows() const noexcept { return rows_; }
    [[nodiscard]] std::size_t cols() const noexcept { return cols_; }
    [[nodiscard]] std::size_t size() const noexcept { return data_.size(); }
    [[nodiscard]] bool empty() const noexcept { return data_.empty(); }
    [[nodiscard]] matrix_order order() const noexcept { return order_; }

    [[nodiscard]] T& operator()(std::size_t row, std::size_t col) noexcept { return view()(row, col); }
    [[nodiscard]] const T& operator()(std::size_t row, std::size_t col) const noexcept { return view()(row, col); }

    [[nodiscard]] matrix_view<T> view() & noexcept { return {data_.data(), rows_, cols_, order_}; }
    [[nodiscard]] matrix_view<const T> view() const& noexcept { return {data_.data(), rows_, cols_, order_}; }
    void view() const&& = delete; // name the owner first: its views would dangle
    /// Also of a temporary, for the call that it is an argument of.
    operator matrix_view<T>() noexcept { return view(); }
    operator matrix_view<const T>() const noexcept { return view(); }

private:
    std::pmr::vector<T> data_;
    std::size_t rows_ = 0, cols_ = 0;
    matrix_order order_ = matrix_order::column_major;
};

/// The transposed matrix in memory of its own, row-major.
///
///     const matrix<float> in_by_out = transposed_copy(out_by_in);
template <storage_element T>
[[nodiscard]] matrix<T> transposed_copy(const matrix<T>& x)
{
    matrix<T> y(x.cols(), x.rows(), matrix_order::row_major);
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < x.cols(); ++j) { y(j, i) = x(i, j); }
    }
    return y;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_MATRIX_HPP

// ---- taskvec/linalg/factor_pair.hpp
#if !defined(TASKVEC_SINGLE_LINALG_FACTOR_PAIR_HPP)
#define TASKVEC_SINGLE_LINALG_FACTOR_PAIR_HPP
// A matrix that is held by two thin factors.
// SPDX-License-Identifier: Apache-2.0


#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// A product weight·left·rightᵀ that is held by its factors: left is m×r, right is n×r, in either order each. LoRA's
/// scaling·b·a is left = b, right = aᵀ (see lora_update::factors()). Refers to the factors, which must outlive it.
///
///     factor_pair<float> p{.left = b.view(), .right = a.view().transposed(), .weight = scaling};
template <storage_element T, memory_space S>
struct factor_pair {
    matrix_view<const T, S> left{}; ///< m×r
    matrix_view<const T, S> right{}; ///< n×r
    double weight = 1; ///< of the product
    std::string_view name{}; ///< for errors
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_LINALG_FACTOR_PAIR_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// The update ΔW = scaling·b·a of one weight matrix (out×in), held by PEFT's factors: b is lora_B (out×r), a is lora_A
/// (r×in), both row-major, scaling is α/r or α/√r. In the papers' symbols A = scaling·b and B = aᵀ.
///
///     lora_update<float> update{.b = b, .a = a, .scaling = 2};
template <arithmetic_element T, memory_space S>
struct lora_update {
    matrix<T, S> b; ///< lora_B, out×r
    matrix<T, S> a; ///< lora_A, r×in
    double scaling = 1; ///< of b·a: α/r, or α/√r where rsLoRA is asked for

    /// Rows of ΔW.
    [[nodiscard]] std::size_t out() const noexcept { return b.rows(); }
    /// Columns of ΔW.
    [[nodiscard]] std::size_t in() const noexcept { return a.cols(); }
    /// r, the rank that the factors have room for.
    [[nodiscard]] std::size_t rank() const noexcept { return a.rows(); }
    /// weight·ΔW as factors, left = b and right = aᵀ. Refers to this update.
    [[nodiscard]] factor_pair<T, S> factors(double weight = 1, std::string_view name = {}) const&
    {
        return {.left = b.view(), .right = a.view().transposed(), .weight = weight * scaling, .name = name};
    }
    void factors(double weight = 1, std::string_view name = {}) const&& = delete; // its views would dangle
};

/// An adapter: updates by the name of the module that they belong to, in the order of the names' bytes.
template <arithmetic_element T, memory_space S = memory_space::host>
using lora_adapter = std::map<std::string, lora_update<T, S>>;

/// Throws shape_mismatch where b and a do not make a product, nonfinite_error for a scaling that is not finite.
template <arithmetic_element T, memory_space S>
void check_update(const lora_update<T, S>& update, std::string_view name)
{
    if (update.b.cols() != update.a.rows()) {
        raise<shape_mismatch>(error_code::factor_rank,
            message("'", name, "': lora_B is ", update.b.rows(), "×", update.b.cols(), " and lora_A ", update.a.rows(),
                "×", update.a.cols(), "; their ranks differ"));
    }
    if (!std::isfinite(update.scaling)) {
        raise<nonfinite_error>(error_code::scaling_not_finite, message("'", name, "': its scaling is not finite"));
    }
}

/// True for two scalings that are one number but for rounding: α/√r, say, and the same written as α'/r.
[[nodiscard]] inline bool same_scaling(double a, double b) noexcept
{
    return std::abs(a - b) <= 1e-12 * std::max(std::abs(a), std::abs(b));
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_LORA_HPP

// ---- taskvec/core/kernels.hpp
#if !defined(TASKVEC_SINGLE_CORE_KERNELS_HPP)
#define TASKVEC_SINGLE_CORE_KERNELS_HPP
// The CPU's elementwise kernels: over rows of one block, each written once over packs.
// SPDX-License-Identifier: Apache-2.0
//
// A block is a few thousand elements: small enough that its rows stay in the first cache levels, large enough that a
// call costs nothing. Every kernel reads few rows and writes one; it is compiled for each instruction set and chosen
// at run time (core/instruction_set.hpp), so that no flag is needed. No kernel fuses a multiply with an add.


// ---- taskvec/core/instruction_set.hpp
#if !defined(TASKVEC_SINGLE_CORE_INSTRUCTION_SET_HPP)
#define TASKVEC_SINGLE_CORE_INSTRUCTION_SET_HPP
// Instruction sets: kernels that are compiled several times, and the widest of them that the processor has, chosen at
// run time.
// SPDX-License-Identifier: Apache-2.0
//
// A kernel is a functor with a call operator over the bytes of a pack (core/pack.hpp). run_widest() compiles it for
// each instruction set by target attributes, whatever flags the file is built with, and runs one: 16-byte vectors
// everywhere, 32 with AVX2, 64 with AVX-512. Results are the same bits: no kernel fuses a multiply with an add. Other
// compilers than g++ and clang, and device code, run kernels on scalars. On Windows g++ keeps to 16 bytes: it aligns
// no stack to more there (GCC bug 54412).


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
#endif // TASKVEC_SINGLE_CORE_INSTRUCTION_SET_HPP

// ---- taskvec/core/stored_pack.hpp
#if !defined(TASKVEC_SINGLE_CORE_STORED_PACK_HPP)
#define TASKVEC_SINGLE_CORE_STORED_PACK_HPP
// Packs of stored words: how entries of a storage type become packs of its arithmetic type, and packs become stored
// words.
// SPDX-License-Identifier: Apache-2.0
//
// 16-bit types are read in words of 32 bits, two entries in each, whose halves come apart and together again by shifts
// and masks: part 0 of such a pack holds the even entries, part 1 the odd ones.


// ---- taskvec/core/pack.hpp
#if !defined(TASKVEC_SINGLE_CORE_PACK_HPP)
#define TASKVEC_SINGLE_CORE_PACK_HPP
// Packs: the few entries that a kernel's body works on at once. A vector on the CPU, a single number on a device, in
// tails and under other compilers than g++ and clang: a body is written once, over packs, and gives the same bits with
// any of them.
// SPDX-License-Identifier: Apache-2.0
//
// Every operation rounds by itself (no multiply-add is fused). Comparisons give masks, and masks choose: select(mask,
// yes, no), where(mask, x). A body has no branches on packs: `if (x > y)` does not compile.


// ---- taskvec/core/rounding.hpp
#if !defined(TASKVEC_SINGLE_CORE_ROUNDING_HPP)
#define TASKVEC_SINGLE_CORE_ROUNDING_HPP
// Arithmetic of elementwise functors that run on host and device: each operation rounds by itself, and no multiply-add
// is fused.
// SPDX-License-Identifier: Apache-2.0
//
// A functor is a struct of plain values and device pointers whose call operator (TASKVEC_FUNCTOR) loops over the
// indices that it is handed: device::sweep() (device/thrust) runs it. It stands beside its algorithm, between
// TASKVEC_KERNELS_BEGIN and TASKVEC_KERNELS_END, and takes its products, sums and quotients from here.


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
#endif // TASKVEC_SINGLE_CORE_ROUNDING_HPP

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// Signed words as wide as A.
template <arithmetic_element A>
using signed_word = std::conditional_t<std::same_as<A, double>, std::int64_t, std::int32_t>;

#if TASKVEC_VECTORS() && !defined(__clang__) && defined(__x86_64__)
#define TASKVEC_OPAQUE(value) asm("" : "+x"(value))
#elif TASKVEC_VECTORS() && !defined(__clang__) && defined(__aarch64__)
#define TASKVEC_OPAQUE(value) asm("" : "+w"(value))
#else
#define TASKVEC_OPAQUE(value) ((void)0)
#endif

namespace detail {
// Members, not alias templates: g++ drops vector_size of a dependent size there.
template <class T, int bytes>
struct vector_of {
#if TASKVEC_VECTORS()
    typedef T type __attribute__((vector_size(bytes)));
    typedef T anywhere __attribute__((vector_size(bytes), aligned(1), may_alias)); // in memory
#endif
};
template <class T>
struct vector_of<T, 0> {
    using type = T;
    using anywhere = T;
};
template <class>
inline constexpr bool never = false;
} // namespace detail

/// Lanes of A in a pack of `bytes`; 0 bytes are a single number.
template <arithmetic_element A, int bytes>
inline constexpr int pack_lanes = bytes == 0 ? 1 : bytes / static_cast<int>(sizeof(A));

/// What a comparison of packs gives: all bits of a lane where it holds, none where not.
template <arithmetic_element A, int bytes>
struct pack_mask {
    typename detail::vector_of<signed_word<A>, bytes>::type lanes; ///< all bits set, or none

    template <class T = void>
    TASKVEC_HOST_DEVICE explicit operator bool() const
    {
        static_assert(detail::never<T>,
            "a body must not branch on a pack: its entries may differ; choose with select(mask, yes, no) or "
            "where(mask, x)");
        return false;
    }
};

/// The bits of packs as signed words: magnitudes (their sign bit is clear) compare as numbers do.
template <arithmetic_element A, int bytes>
struct pack_words {
    /// One lane.
    using word = signed_word<A>;
    typename detail::vector_of<word, bytes>::type lanes; ///< the words
};

/// `bytes` of entries of A; 0 bytes are one entry.
template <arithmetic_element A, int bytes>
struct pack {
    using value_type = A;
    /// What comparisons give.
    using mask = pack_mask<A, bytes>;
    /// Its bits.
    using words = pack_words<A, bytes>;
    static constexpr int size = pack_lanes<A, bytes>;
    typename detail::vector_of<A, bytes>::type lanes; ///< the numbers

    template <class T = void>
    TASKVEC_HOST_DEVICE explicit operator bool() const
    {
        static_assert(detail::never<T>,
            "a body must not branch on a pack: its entries may differ; choose with select(mask, yes, no) or "
            "where(mask, x), where a mask is a comparison such as x != 0");
        return false;
    }
};

// Of masks !, && and || would be single answers.
template <arithmetic_element A, int bytes>
TASKVEC_HOST_DEVICE auto operator!(const pack_mask<A, bytes>& x)
{
    static_assert(detail::never<A>, "the opposite of a mask is ~mask: its entries may differ");
    return x;
}
template <arithmetic_element A, int bytes>
TASKVEC_HOST_DEVICE auto operator&&(const pack_mask<A, bytes>& x, const pack_mask<A, bytes>&)
{
    static_assert(detail::never<A>, "masks are joined with & and |, not with && and ||: their entries may differ");
    return x;
}
template <arithmetic_element A, int bytes>
TASKVEC_HOST_DEVICE auto operator||(const pack_mask<A, bytes>& x, const pack_mask<A, bytes>&)
{
    static_assert(detail::never<A>, "masks are joined with & and |, not with && and ||: their entries may differ");
    return x;
}

TASKVEC_KERNELS_BEGIN

/// A number in every lane. (g++ 12 finds the instruction for it only where the number is a floating one that is no
/// expression: it is hidden, and what looks like a difference is none.)
template <class Words>
[[nodiscard]] TASKVEC_INLINE Words filled_words(typename Words::word value) noexcept
{
    if constexpr (sizeof(Words) == sizeof(value)) { return {value}; }
#if TASKVEC_VECTORS()
    else if (__builtin_constant_p(value)) {
        return {decltype(Words::lanes){} + value};
    }
    else {
        using number = std::conditional_t<sizeof(value) == 8, double, float>;
        using numbers = typename detail::vector_of<number, sizeof(Words)>::type;
        auto bits = __builtin_bit_cast(number, value);
        TASKVEC_OPAQUE(bits);
        return {__builtin_bit_cast(decltype(Words::lanes), static_cast<numbers>(bits - numbers{}))};
    }
#endif
}
/// A number in every lane of a pack.
template <class Pack>
[[nodiscard]] TASKVEC_INLINE Pack filled(typename Pack::value_type value) noexcept
{
    using words = typename Pack::words;
    return __builtin_bit_cast(Pack, filled_words<words>(__builtin_bit_cast(typename words::word, value)));
}

// Arithmetic. Each operation is a function of its own, so that clang sees no expression to contract.
#if defined(__CUDACC__)
#define TASKVEC_PACK_ARITHMETIC(operation, rounded)                                                                    \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack<A, bytes> operator operation(                                                    \
        const pack<A, bytes>& x, const pack<A, bytes>& y) noexcept                                                     \
    {                                                                                                                  \
        return {elementwise::rounded(x.lanes, y.lanes)};                                                               \
    }
#else
#define TASKVEC_PACK_ARITHMETIC(operation, rounded)                                                                    \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack<A, bytes> operator operation(                                                    \
        const pack<A, bytes>& x, const pack<A, bytes>& y) noexcept                                                     \
    {                                                                                                                  \
        TASKVEC_STRICT_FP                                                                                              \
        return {x.lanes operation y.lanes};                                                                            \
    }
#endif
TASKVEC_PACK_ARITHMETIC(+, sum)
TASKVEC_PACK_ARITHMETIC(-, difference)
TASKVEC_PACK_ARITHMETIC(*, product)
TASKVEC_PACK_ARITHMETIC(/, quotient)
#undef TASKVEC_PACK_ARITHMETIC

/// A number and a pack: the number stands in every lane.
#define TASKVEC_PACK_WITH_NUMBER(operation)                                                                            \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack<A, bytes> operator operation(                                                    \
        std::type_identity_t<A> x, const pack<A, bytes>& y) noexcept                                                   \
    {                                                                                                                  \
        return filled<pack<A, bytes>>(x) operation y;                                                                  \
    }                                                                                                                  \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack<A, bytes> operator operation(                                                    \
        const pack<A, bytes>& x, std::type_identity_t<A> y) noexcept                                                   \
    {                                                                                                                  \
        return x operation filled<pack<A, bytes>>(y);                                                                  \
    }
TASKVEC_PACK_WITH_NUMBER(+)
TASKVEC_PACK_WITH_NUMBER(-)
TASKVEC_PACK_WITH_NUMBER(*)
TASKVEC_PACK_WITH_NUMBER(/)
#undef TASKVEC_PACK_WITH_NUMBER

/// The sign turned around, of every lane (of 0 and NaN too).
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack<A, bytes> operator-(const pack<A, bytes>& x) noexcept
{
    return {-x.lanes};
}

// Comparisons: vectors give all bits or none, single numbers are made to.
#define TASKVEC_PACK_COMPARISON(operation)                                                                             \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> operator operation(                                               \
        const pack<A, bytes>& x, const pack<A, bytes>& y) noexcept                                                     \
    {                                                                                                                  \
        if constexpr (bytes == 0) { return {static_cast<signed_word<A>>(x.lanes operation y.lanes ? -1 : 0)}; }        \
        else {                                                                                                         \
            return {x.lanes operation y.lanes};                                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> operator operation(                                               \
        const pack<A, bytes>& x, std::type_identity_t<A> y) noexcept                                                   \
    {                                                                                                                  \
        return x operation filled<pack<A, bytes>>(y);                                                                  \
    }
TASKVEC_PACK_COMPARISON(<)
TASKVEC_PACK_COMPARISON(>)
TASKVEC_PACK_COMPARISON(<=)
TASKVEC_PACK_COMPARISON(>=)
TASKVEC_PACK_COMPARISON(==)
TASKVEC_PACK_COMPARISON(!=)
#undef TASKVEC_PACK_COMPARISON

/// The bits of a pack, and a pack of bits.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> bits_of(const pack<A, bytes>& x) noexcept
{
    return __builtin_bit_cast(pack_words<A, bytes>, x);
}
/// The pack that has these bits.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack<A, bytes> from_bits(const pack_words<A, bytes>& x) noexcept
{
    return __builtin_bit_cast(pack<A, bytes>, x);
}
/// The mask as words: −1 where it holds, 0 where it does not.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> words_of(const pack_mask<A, bytes>& x) noexcept
{
    return {x.lanes};
}

#define TASKVEC_PACK_BITS(type, operation)                                                                             \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE type<A, bytes> operator operation(                                                    \
        const type<A, bytes>& x, const type<A, bytes>& y) noexcept                                                     \
    {                                                                                                                  \
        return {x.lanes operation y.lanes};                                                                            \
    }
TASKVEC_PACK_BITS(pack_mask, &)
TASKVEC_PACK_BITS(pack_mask, |)
TASKVEC_PACK_BITS(pack_mask, ^)
TASKVEC_PACK_BITS(pack_words, &)
TASKVEC_PACK_BITS(pack_words, |)
TASKVEC_PACK_BITS(pack_words, ^)
#undef TASKVEC_PACK_BITS

// Words wrap around, as registers do: they are numbers without sign while they are added.
#define TASKVEC_WORDS_SUM(operation)                                                                                   \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> operator operation(                                              \
        const pack_words<A, bytes>& x, const pack_words<A, bytes>& y) noexcept                                         \
    {                                                                                                                  \
        using bare = typename detail::vector_of<std::make_unsigned_t<signed_word<A>>, bytes>::type;                    \
        return {__builtin_bit_cast(decltype(x.lanes),                                                                  \
            static_cast<bare>(__builtin_bit_cast(bare, x.lanes) operation __builtin_bit_cast(bare, y.lanes)))};        \
    }
TASKVEC_WORDS_SUM(+)
TASKVEC_WORDS_SUM(-)
#undef TASKVEC_WORDS_SUM
/// Where the mask does not hold.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> operator~(const pack_mask<A, bytes>& x) noexcept
{
    return {~x.lanes};
}
/// Bits of every word and of `y`.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> operator&(
    const pack_words<A, bytes>& x, std::type_identity_t<signed_word<A>> y) noexcept
{
    return {x.lanes & y};
}
/// Bits of every word or of `y`.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> operator|(
    const pack_words<A, bytes>& x, std::type_identity_t<signed_word<A>> y) noexcept
{
    return {x.lanes | y};
}
/// Every word plus `y`, modulo its size.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> operator+(
    const pack_words<A, bytes>& x, std::type_identity_t<signed_word<A>> y) noexcept
{
    using word = std::make_unsigned_t<signed_word<A>>;
    using bare = typename detail::vector_of<word, bytes>::type;
    return {__builtin_bit_cast(
        decltype(x.lanes), static_cast<bare>(__builtin_bit_cast(bare, x.lanes) + static_cast<word>(y)))};
}
/// Words of a mask's lanes that hold; 0 elsewhere.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> where(
    const pack_mask<A, bytes>& mask, const pack_words<A, bytes>& x) noexcept
{
    return {mask.lanes & x.lanes};
}
/// x where a mask holds; +0 elsewhere.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack<A, bytes> where(const pack_mask<A, bytes>& mask, const pack<A, bytes>& x) noexcept
{
    return from_bits(where(mask, bits_of(x)));
}
/// yes where a mask holds, no elsewhere.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack<A, bytes> select(
    const pack_mask<A, bytes>& mask, const pack<A, bytes>& yes, const pack<A, bytes>& no) noexcept
{
    if constexpr (bytes == 0) { return {mask.lanes ? yes.lanes : no.lanes}; }
    else {
        return {mask.lanes ? yes.lanes : no.lanes};
    }
}
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> select(
    const pack_mask<A, bytes>& mask, const pack_words<A, bytes>& yes, const pack_words<A, bytes>& no) noexcept
{
    return {mask.lanes ? yes.lanes : no.lanes};
}

#define TASKVEC_WORDS_COMPARISON(operation)                                                                            \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> operator operation(                                               \
        const pack_words<A, bytes>& x, const pack_words<A, bytes>& y) noexcept                                         \
    {                                                                                                                  \
        if constexpr (bytes == 0) { return {static_cast<signed_word<A>>(x.lanes operation y.lanes ? -1 : 0)}; }        \
        else {                                                                                                         \
            return {x.lanes operation y.lanes};                                                                        \
        }                                                                                                              \
    }                                                                                                                  \
    template <arithmetic_element A, int bytes>                                                                         \
    [[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> operator operation(                                               \
        const pack_words<A, bytes>& x, std::type_identity_t<signed_word<A>> y) noexcept                                \
    {                                                                                                                  \
        return x operation filled_words<pack_words<A, bytes>>(y);                                                      \
    }
TASKVEC_WORDS_COMPARISON(<)
TASKVEC_WORDS_COMPARISON(>)
TASKVEC_WORDS_COMPARISON(<=)
TASKVEC_WORDS_COMPARISON(>=)
TASKVEC_WORDS_COMPARISON(==)
TASKVEC_WORDS_COMPARISON(!=)
#undef TASKVEC_WORDS_COMPARISON

/// A mask whose comparison stays where it stands: a body says so where it makes one before loops that use it, and where
/// it compares after a loop what was known before it. (g++ 12 may carry the comparison instead of its result from block
/// to block; 64-byte packs have no such value, and it ends in an internal error, or lane by lane in scalar code. A
/// value that is hidden is no comparison.)
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> materialised(const pack_mask<A, bytes>& mask) noexcept
{
#if TASKVEC_VECTORS() && !defined(__clang__) && defined(__x86_64__)
    if constexpr (bytes == 64) {
        auto lanes = mask.lanes;
        asm("" : "+v"(lanes));
        return {lanes};
    }
#endif
    return mask;
}

/// Every word shifted to the left.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> operator<<(const pack_words<A, bytes>& x, int by) noexcept
{
    return {x.lanes << by};
}
/// Every word shifted to the right, filled with zeros.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> operator>>(const pack_words<A, bytes>& x, int by) noexcept
{
    using bare = typename detail::vector_of<std::make_unsigned_t<signed_word<A>>, bytes>::type;
    return {__builtin_bit_cast(decltype(x.lanes), static_cast<bare>(__builtin_bit_cast(bare, x.lanes) >> by))};
}
/// All bits where a word is negative.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> spread_sign(const pack_words<A, bytes>& x) noexcept
{
    return {x.lanes >> (8 * static_cast<int>(sizeof(A)) - 1)};
}
/// The larger word.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> larger(
    const pack_words<A, bytes>& x, const pack_words<A, bytes>& y) noexcept
{
    return {x.lanes > y.lanes ? x.lanes : y.lanes};
}
/// The bits of |x|.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> magnitude_of(const pack<A, bytes>& x) noexcept
{
    return bits_of(x) & static_cast<signed_word<A>>(~sign_mask<A>);
}
/// Words where x is 0 of either sign; 0 elsewhere. (By the bits of x: g++ 12 takes a conjunction of two comparisons
/// apart, entry by entry, where the file is not built for the wide processor.)
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> where_zero(
    const pack<A, bytes>& x, const pack_words<A, bytes>& words) noexcept
{
    return where(spread_sign(magnitude_of(x) + signed_word<A>{-1}), words);
}
/// x with its sign turned where the word's sign bit is set; the word's other bits are clear.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack<A, bytes> turned(const pack<A, bytes>& x, const pack_words<A, bytes>& sign) noexcept
{
    return from_bits(bits_of(x) ^ sign);
}
/// Words plus 1 where a mask holds.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> added_where(
    const pack_mask<A, bytes>& mask, const pack_words<A, bytes>& x) noexcept
{
    return {x.lanes - mask.lanes};
}
/// Counts plus 1 where a word that is not negative is above 0.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> added_where_positive(
    const pack_words<A, bytes>& x, const pack_words<A, bytes>& counts) noexcept
{
    if constexpr (bytes == 64) { // where masks are no words, the smaller of x and 1 is what is added
        const auto one = filled_words<pack_words<A, bytes>>(1).lanes;
        return {counts.lanes + (x.lanes < one ? x.lanes : one)};
    }
    else {
        return added_where(x > 0, counts);
    }
}
/// Small whole numbers as A, exactly.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack<A, bytes> to_numbers(const pack_words<A, bytes>& x) noexcept
{
    if constexpr (bytes == 0) { return {static_cast<A>(x.lanes)}; }
#if TASKVEC_VECTORS()
    else {
        return {__builtin_convertvector(x.lanes, decltype(pack<A, bytes>::lanes))};
    }
#endif
}

/// Whether a mask holds in some lane: one answer for the whole pack, which a body may branch on. (g++ 12 finds no such
/// instruction by itself; clang does.)
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE bool any(const pack_mask<A, bytes>& mask) noexcept
{
    if constexpr (bytes == 0) { return mask.lanes != 0; }
    else {
#if TASKVEC_VECTORS() && !defined(__clang__) && defined(__x86_64__)
        if constexpr (bytes == 64) {
            bool found;
            asm("vptestmd %1, %1, %%k1\n\tkortestw %%k1, %%k1" : "=@ccnz"(found) : "v"(mask.lanes) : "k1");
            return found;
        }
        else if constexpr (bytes == 32) {
            bool found;
            asm("vptest %1, %1" : "=@ccnz"(found) : "x"(mask.lanes));
            return found;
        }
        else {
            int found;
            asm("%vpmovmskb %1, %0" : "=r"(found) : "x"(mask.lanes));
            return found != 0;
        }
#else
        std::uint64_t parts[bytes / 8], found = 0;
        std::memcpy(parts, &mask, sizeof parts);
        for (const std::uint64_t part : parts) { found |= part; }
        return found != 0;
#endif
    }
}

/// Puts the words where a mask holds side by side at `out`, in the order of the lanes, and tells how many they are.
/// There must be room for a whole pack: what lies behind those words is anything. (By name what the compilers do not
/// find: g++ 12 would take the pack apart, lane by lane.)
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE std::size_t packed_where(
    const pack_mask<A, bytes>& mask, const pack_words<A, bytes>& x, signed_word<A>* out) noexcept
{
    if constexpr (bytes == 0) {
        *out = x.lanes;
        return mask.lanes != 0;
    }
#if TASKVEC_VECTORS() && !defined(__clang__) && defined(__x86_64__)
    else if constexpr (bytes == 64) {
        auto packed = x.lanes;
        unsigned chosen;
        if constexpr (sizeof(A) == 4) {
            asm("vptestmd %3, %3, %%k1\n\tvpcompressd %2, %0%{%%k1%}%{z%}\n\tkmovw %%k1, %1"
                : "=v"(packed), "=r"(chosen)
                : "v"(x.lanes), "v"(mask.lanes)
                : "k1");
        }
        else {
            asm("vptestmq %3, %3, %%k1\n\tvpcompressq %2, %0%{%%k1%}%{z%}\n\tkmovb %%k1, %1"
                : "=v"(packed), "=r"(chosen)
                : "v"(x.lanes), "v"(mask.lanes)
                : "k1");
        }
        std::memcpy(out, &packed, sizeof packed);
        std::size_t count;
        asm("popcntl %1, %k0" : "=r"(count) : "r"(chosen) : "cc");
        return count;
    }
#endif
    else {
        if (!any(mask)) { return 0; } // most packs hold nothing, and the others are taken lane by lane without a branch
        constexpr std::size_t lanes = bytes / sizeof(A);
        signed_word<A> chosen[lanes], words[lanes];
        std::memcpy(chosen, &mask, sizeof chosen);
        std::memcpy(words, &x, sizeof words);
        signed_word<A>* const begin = out;
        TASKVEC_UNROLL(16)
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            *out = words[lane];
            out -= chosen[lane];
        }
        return static_cast<std::size_t>(out - begin);
    }
}

TASKVEC_KERNELS_END

#undef TASKVEC_OPAQUE

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_PACK_HPP

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_KERNELS_BEGIN

/// The conversions of a 16-bit type on words of 32 bits, as core/dtype.hpp defines them on one. `widen` reads the lower
/// half of a word and `widen_upper` the upper one; `narrow` gives the code in a word that is clear otherwise,
/// `narrow_upper` in the upper half, and leaves anything below.
template <storage_element T>
struct pack_conversion { };

/// Whether stored words of T come apart into packs.
template <storage_element T>
inline constexpr bool has_pack_conversion =
    std::same_as<T, arithmetic_type<T>> || requires { pack_conversion<T>::template widen<0>; };

template <>
struct pack_conversion<bf16> {
    template <int bytes>
    [[nodiscard]] static TASKVEC_INLINE pack<float, bytes> widen(const pack_words<float, bytes>& code) noexcept
    {
        return from_bits(code << 16);
    }
    template <int bytes>
    [[nodiscard]] static TASKVEC_INLINE pack<float, bytes> widen_upper(const pack_words<float, bytes>& word) noexcept
    {
        return from_bits(word & static_cast<std::int32_t>(0xffff0000u));
    }
    template <int bytes>
    [[nodiscard]] static TASKVEC_INLINE pack_words<float, bytes> narrow_upper(const pack<float, bytes>& x) noexcept
    {
        const auto word = bits_of(x);
        const auto rounded = word + 0x7fff + ((word >> 16) & 1);
        return select(x == x, rounded, word | 0x00400000);
    }
    template <int bytes>
    [[nodiscard]] static TASKVEC_INLINE pack_words<float, bytes> narrow(const pack<float, bytes>& x) noexcept
    {
        return narrow_upper(x) >> 16;
    }
};

template <>
struct pack_conversion<f16> {
    template <int bytes>
    [[nodiscard]] static TASKVEC_INLINE pack<float, bytes> widen(const pack_words<float, bytes>& code) noexcept
    {
        const auto sign = (code & 0x8000) << 16, magnitude = code & 0x7fff;
        const auto scaled = bits_of(from_bits(magnitude << 13) * 0x1p112f);
        return from_bits(select(magnitude >= 0x7c00, (magnitude << 13) | 0x7f800000, scaled) | sign);
    }
    template <int bytes>
    [[nodiscard]] static TASKVEC_INLINE pack<float, bytes> widen_upper(const pack_words<float, bytes>& word) noexcept
    {
        return widen(word >> 16);
    }
    template <int bytes>
    [[nodiscard]] static TASKVEC_INLINE pack_words<float, bytes> narrow(const pack<float, bytes>& x) noexcept
    {
        const auto word = bits_of(x);
        const auto sign = (word >> 16) & 0x8000, magnitude = word & 0x7fffffff;
        const auto normal = (magnitude + static_cast<std::int32_t>(0xc8000fffu) + ((magnitude >> 13) & 1)) >> 13;
        const auto subnormal = bits_of(from_bits(magnitude) + 0.5f) + static_cast<std::int32_t>(0xc1000000u);
        const auto nan = ((magnitude >> 13) & 0x03ff) | 0x7e00;
        auto result = select(magnitude < 0x38800000, subnormal, normal);
        result = select(magnitude >= 0x477ff000, filled_words<pack_words<float, bytes>>(0x7c00), result);
        result = select(magnitude > 0x7f800000, nan, result);
        return result | sign;
    }
    template <int bytes>
    [[nodiscard]] static TASKVEC_INLINE pack_words<float, bytes> narrow_upper(const pack<float, bytes>& x) noexcept
    {
        return narrow(x) << 16;
    }
};

/// `bytes` of consecutive stored entries of T (one entry for 0 bytes), which hold `parts` packs.
template <storage_element T, int bytes>
struct stored_pack {
    /// What its numbers are computed in.
    using number = arithmetic_type<T>;
    /// A pack of these.
    using pack_type = pack<number, bytes>;
    /// Packs that it becomes.
    static constexpr int parts = bytes == 0 ? 1 : static_cast<int>(sizeof(number) / sizeof(T));
    /// Entries that it holds.
    static constexpr std::size_t entries = bytes == 0 ? 1 : static_cast<std::size_t>(bytes) / sizeof(T);

    /// From and to any address.
    TASKVEC_INLINE void load(const storage_word<T>* from) noexcept
    {
        if constexpr (bytes == 0) { raw = *from; }
        else {
            raw.lanes = *reinterpret_cast<const in_memory*>(from);
        }
    }
    /// To any address.
    TASKVEC_INLINE void store(storage_word<T>* to) const noexcept
    {
        if constexpr (bytes == 0) { *to = raw; }
        else {
            *reinterpret_cast<in_memory*>(to) = raw.lanes;
        }
    }

    /// Part `part` as numbers. Of narrow types part 0 has the lower halves of the words and part 1 the upper ones.
    template <int part>
    [[nodiscard]] TASKVEC_INLINE pack_type get() const noexcept
    {
        if constexpr (bytes == 0) { return {widen_word<number, T>(raw)}; }
        else if constexpr (parts == 1) {
            return __builtin_bit_cast(pack_type, raw);
        }
        else if constexpr (part == 0) {
            return pack_conversion<T>::widen(raw);
        }
        else {
            return pack_conversion<T>::widen_upper(raw);
        }
    }
    /// Puts a part: part 0 first, which overwrites what was there.
    template <int part>
    TASKVEC_INLINE void put(const pack_type& x) noexcept
    {
        if constexpr (bytes == 0) { raw = narrow_word<T>(x.lanes); }
        else if constexpr (parts == 1) {
            raw = __builtin_bit_cast(decltype(raw), x);
        }
        else if constexpr (part == 0) {
            raw = pack_conversion<T>::narrow(x);
        }
        else {
            raw = raw | (pack_conversion<T>::narrow_upper(x) & static_cast<std::int32_t>(0xffff0000u));
        }
    }

    std::conditional_t<bytes == 0, storage_word<T>, pack_words<number, bytes>> raw; ///< the stored words

private:
    using in_memory = typename detail::vector_of<signed_word<number>, bytes>::anywhere;
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_STORED_PACK_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace taskvec::inline TASKVEC_ABI::kernels {

/// The words of a run of T. The 16-bit classes hold exactly one such word.
template <storage_element T>
[[nodiscard]] inline const storage_word<T>* words(const T* x) noexcept
{
    return reinterpret_cast<const storage_word<T>*>(x);
}
template <storage_element T>
[[nodiscard]] inline storage_word<T>* words(T* x) noexcept
{
    return reinterpret_cast<storage_word<T>*>(x);
}

/// Asks for the lines of `count` words that lie 4 KiB ahead, for a kernel that does so much between two loads that it
/// hides from the processor what is still to be loaded. Never faults. Always inlined: g++ takes a call of a function
/// that does nothing but prefetch for one without effect, and leaves it out.
template <std::size_t count, class Word>
TASKVEC_INLINE void fetch_ahead(const Word* words) noexcept
{
    const auto place = reinterpret_cast<std::uintptr_t>(words) + 4096; // a number: most lie outside the words' array
    TASKVEC_UNROLL(16)
    for (std::size_t line = 0; line < count * sizeof(Word); line += 64) {
        TASKVEC_PREFETCH(reinterpret_cast<const void*>(place + line), 3);
    }
}

TASKVEC_KERNELS_BEGIN

/// Whether consecutive stored words of T become consecutive entries of A as packs; otherwise they do one by one.
template <storage_element T, arithmetic_element A>
inline constexpr bool has_row_packs =
    std::same_as<T, A> || (std::same_as<A, float> && sizeof(T) == 2 && has_pack_conversion<T>);

#if TASKVEC_VECTORS()
#if defined(__x86_64__) && !defined(__clang__) // g++ 12 would convert halves, and put them together
#define TASKVEC_WIDENS_AT_ONCE 1
#else
#define TASKVEC_WIDENS_AT_ONCE 0
#endif
/// 16-bit codes in words of 32 bits, from memory.
template <int bytes>
TASKVEC_INLINE void widen_lanes(const std::uint16_t* from, pack_words<float, bytes>& wide) noexcept
{
    const auto& codes =
        *reinterpret_cast<const typename taskvec::detail::vector_of<std::uint16_t, bytes / 2>::anywhere*>(from);
    if constexpr (TASKVEC_WIDENS_AT_ONCE && bytes > 16) { asm("vpmovzxwd %1, %0" : "=v"(wide.lanes) : "m"(codes)); }
    else { // the baseline has none
        wide.lanes = __builtin_convertvector(codes, decltype(wide.lanes));
    }
}
/// Floats as doubles, from memory.
template <int bytes>
TASKVEC_INLINE void widen_lanes(const float* from, pack<double, bytes>& wide) noexcept
{
    const auto& numbers =
        *reinterpret_cast<const typename taskvec::detail::vector_of<float, bytes / 2>::anywhere*>(from);
    if constexpr (TASKVEC_WIDENS_AT_ONCE && bytes > 16) { asm("vcvtps2pd %1, %0" : "=v"(wide.lanes) : "m"(numbers)); }
    else if constexpr (TASKVEC_WIDENS_AT_ONCE) {
        asm("cvtps2pd %1, %0" : "=x"(wide.lanes) : "m"(numbers));
    }
    else {
        wide.lanes = __builtin_convertvector(numbers, decltype(wide.lanes));
    }
}
#undef TASKVEC_WIDENS_AT_ONCE
#endif

/// `bytes` of consecutive entries of A, from stored words of T (one entry for 0 bytes), and back.
template <arithmetic_element A, int bytes, storage_element T>
[[nodiscard]] TASKVEC_INLINE pack<A, bytes> load_row(const storage_word<T>* from) noexcept
{
    if constexpr (bytes == 0) { return {widen_word<A, T>(*from)}; }
    else if constexpr (std::same_as<T, A>) {
        stored_pack<A, bytes> loaded;
        loaded.load(from);
        return loaded.template get<0>();
    }
#if TASKVEC_VECTORS()
    else {
        pack_words<A, bytes> words;
        widen_lanes(from, words);
        return pack_conversion<T>::widen(words);
    }
#endif
}
template <storage_element T, arithmetic_element A, int bytes>
TASKVEC_INLINE void store_row(const pack<A, bytes>& x, storage_word<T>* to) noexcept
{
    if constexpr (bytes == 0) { *to = narrow_word<T>(x.lanes); }
    else if constexpr (std::same_as<T, A>) {
        stored_pack<A, bytes> made;
        made.template put<0>(x);
        made.store(to);
    }
#if TASKVEC_VECTORS()
    else {
        using codes = typename taskvec::detail::vector_of<std::uint16_t, bytes / 2>::type;
        using in_memory = typename taskvec::detail::vector_of<std::uint16_t, bytes / 2>::anywhere;
        *reinterpret_cast<in_memory*>(to) = __builtin_convertvector(pack_conversion<T>::narrow(x).lanes, codes);
    }
#endif
}

/// The largest word of a pack's lanes, or `least`.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE bits_type<A> largest_lane(const pack_words<A, bytes>& x, bits_type<A> least) noexcept
{
    signed_word<A> lanes[pack_lanes<A, bytes>];
    std::memcpy(lanes, &x, sizeof lanes);
    for (const auto lane : lanes) {
        least = static_cast<bits_type<A>>(lane) > least ? static_cast<bits_type<A>>(lane) : least;
    }
    return least;
}

/// out[i] = map(x[i], y[i]), entries of A that are stored as Out, X and Y: whole packs first, then single entries.
/// `watched`: `largest` receives the largest magnitude bits of the results. Without `out` nothing is stored.
template <arithmetic_element A, bool watched, storage_element Out, storage_element X, storage_element Y, class Map>
struct row_kernel {
    static constexpr bool packs = has_row_packs<Out, A> && has_row_packs<X, A> && has_row_packs<Y, A>;

    Map map;
    storage_word<Out>* out;
    const storage_word<X>* x;
    const storage_word<Y>* y;
    std::size_t size;
    bits_type<A>& largest;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        const auto from = row_kernel(*this); // stores cannot change a copy
        std::size_t i = 0;
        bits_type<A> found = 0;
        if constexpr (bytes > 0) { found = from.template packs_of<bytes>(i, found); }
        found = from.template packs_of<0>(i, found);
        if constexpr (watched) { largest = found; }
    }

private:
    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE bits_type<A> packs_of(std::size_t& i, bits_type<A> found) const
    {
        constexpr std::size_t width = static_cast<std::size_t>(pack_lanes<A, bytes>);
        pack_words<A, bytes> seen{};
        std::size_t at = i;
        for (; at + width <= size; at += width) {
            const pack<A, bytes> result = map(load_row<A, bytes, X>(x + at), load_row<A, bytes, Y>(y + at));
            if constexpr (watched) { seen = larger(seen, magnitude_of(result)); }
            store_row<Out>(result, out + at);
        }
        i = at;
        return largest_lane<A, bytes>(seen, found);
    }
};

/// Runs a row_kernel; returns the largest magnitude bits of the results where they are watched.
template <arithmetic_element A, bool watched, storage_element Out, storage_element X, storage_element Y, class Map>
bits_type<A> map_row(Out* out, const X* x, const Y* y, std::size_t n, const Map& map)
{
    bits_type<A> largest = 0;
    using kernel = row_kernel<A, watched, Out, X, Y, Map>;
    const kernel row{map, words(out), words(x), words(y), n, largest};
    if constexpr (kernel::packs) { run_widest(row); }
    else {
        run_scalar(row);
    }
    return largest;
}

// What rows are mapped by.
struct taken {
    template <class Pack>
    [[nodiscard]] TASKVEC_INLINE Pack operator()(const Pack& x, const Pack&) const noexcept
    {
        return x;
    }
};
struct difference {
    template <class Pack>
    [[nodiscard]] TASKVEC_INLINE Pack operator()(const Pack& x, const Pack& y) const noexcept
    {
        return x - y;
    }
};
struct negated {
    template <class Pack>
    [[nodiscard]] TASKVEC_INLINE Pack operator()(const Pack& x, const Pack&) const noexcept
    {
        return -x;
    }
};
template <arithmetic_element A>
struct sum_with_scaled {
    A factor;
    template <class Pack>
    [[nodiscard]] TASKVEC_INLINE Pack operator()(const Pack& sum, const Pack& x) const noexcept
    {
        return sum + factor * x;
    }
};
template <arithmetic_element A>
struct sum_begun_with {
    A factor;
    template <class Pack>
    [[nodiscard]] TASKVEC_INLINE Pack operator()(const Pack& x, const Pack&) const noexcept
    {
        return filled<Pack>(A{0}) + factor * x;
    }
};

/// The largest magnitude bits of a row, and whether an entry is below a number.
template <arithmetic_element A, bool magnitudes>
struct row_scan {
    const A* x;
    std::size_t size;
    A floor;
    bits_type<A>& found;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t i = 0;
        if constexpr (bytes > 0) { look<bytes>(i); }
        look<0>(i);
    }

private:
    template <int bytes>
    TASKVEC_INLINE void look(std::size_t& i) const
    {
        constexpr std::size_t width = static_cast<std::size_t>(pack_lanes<A, bytes>);
        pack_words<A, bytes> seen{};
        for (; i + width <= size; i += width) {
            const auto values = load_row<A, bytes, A>(x + i);
            if constexpr (magnitudes) { seen = larger(seen, magnitude_of(values)); }
            else {
                seen = larger(seen, words_of(values < floor) & signed_word<A>{1});
            }
        }
        found = largest_lane<A, bytes>(seen, found);
    }
};

/// `bytes` of f64, from as many consecutive numbers (one for 0 bytes).
template <int bytes, arithmetic_element A>
[[nodiscard]] TASKVEC_INLINE pack<double, bytes> load_wide(const A* from) noexcept
{
    if constexpr (bytes == 0) { return {static_cast<double>(*from)}; }
    else if constexpr (std::same_as<A, double>) {
        return load_row<double, bytes, double>(from);
    }
#if TASKVEC_VECTORS()
    else {
        pack<double, bytes> wide;
        widen_lanes(from, wide);
        return wide;
    }
#endif
}

/// Σ terms(i) for i < size in f64: sixteen interleaved partial sums, added pairwise at the end. `terms.at<bytes>(i)` is
/// the pack of them from i on.
template <class Terms>
struct sum_kernel {
    static constexpr int lanes = 16;
    Terms terms;
    std::size_t size;
    double& total;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        double sum[lanes] = {};
        std::size_t at = 0;
        if constexpr (bytes > 0) {
            constexpr int width = pack_lanes<double, bytes>, count = lanes / width;
            pack<double, bytes> sums[count]{};
            for (; at + lanes <= size; at += lanes) {
                TASKVEC_UNROLL(8)
                for (int k = 0; k < count; ++k) {
                    sums[k] = sums[k] + terms.template at<bytes>(at + static_cast<std::size_t>(k * width));
                }
            }
            std::memcpy(sum, sums, sizeof sum);
        }
        else {
            for (; at + lanes <= size; at += lanes) {
                for (std::size_t lane = 0; lane < lanes; ++lane) { add(sum[lane], at + lane); }
            }
        }
        for (std::size_t lane = 0; at + lane < size; ++lane) { add(sum[lane], at + lane); }
        for (std::size_t half = lanes / 2; half > 0; half /= 2) {
            for (std::size_t lane = 0; lane < half; ++lane) { sum[lane] = sum[lane] + sum[lane + half]; }
        }
        total = sum[0];
    }

private:
    TASKVEC_INLINE void add(double& sum, std::size_t i) const noexcept
    {
        TASKVEC_STRICT_FP
        sum = sum + terms.template at<0>(i).lanes;
    }
};

/// Products of two rows.
template <arithmetic_element A>
struct product_terms {
    const A *x, *y;

    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack<double, bytes> at(std::size_t i) const noexcept
    {
        return load_wide<bytes>(x + i) * load_wide<bytes>(y + i);
    }
};

TASKVEC_KERNELS_END

/// out = widen(x). Returns the largest magnitude bits seen, so that the caller learns of NaN and infinity for free.
template <arithmetic_element A, storage_element T>
bits_type<A> widen(const T* x, A* out, std::size_t n)
{
    return map_row<A, true>(out, x, x, n, taken{});
}

/// The largest magnitude bits of a row.
template <arithmetic_element A>
bits_type<A> largest_magnitude(const A* x, std::size_t n)
{
    bits_type<A> largest = 0;
    run_widest(row_scan<A, true>{x, n, A{0}, largest});
    return largest;
}

/// out = widen(x) − base. Returns the largest magnitude bits of the result.
template <arithmetic_element A, storage_element T>
bits_type<A> subtract(const T* x, const A* base, A* out, std::size_t n)
{
    return map_row<A, true>(out, x, base, n, difference{});
}

/// out = narrow(x), rounded once to nearest even.
template <storage_element T, arithmetic_element A>
void narrow(const A* x, T* out, std::size_t n)
{
    map_row<A, false>(out, x, x, n, taken{});
}

/// Whether some entry is below `floor`.
template <arithmetic_element A>
bool any_below(const A* x, A floor, std::size_t n)
{
    bits_type<A> found = 0;
    run_widest(row_scan<A, false>{x, n, floor, found});
    return found != 0;
}

/// sum += weight · x
template <arithmetic_element A>
void accumulate(A* sum, const A* x, A weight, std::size_t n)
{
    map_row<A, false>(sum, sum, x, n, sum_with_scaled<A>{weight});
}

/// out = 0 + weight · x: the first term of a sum that starts at +0.
template <arithmetic_element A>
void begin_sum(A* sum, const A* x, A weight, std::size_t n)
{
    map_row<A, false>(sum, x, x, n, sum_begun_with<A>{weight});
}

/// x = base + lambda · x
template <arithmetic_element A>
void add_scaled(A* x, const A* base, A lambda, std::size_t n)
{
    map_row<A, false>(x, base, x, n, sum_with_scaled<A>{lambda});
}

/// out = −x
template <arithmetic_element A>
void negate(const A* x, A* out, std::size_t n)
{
    map_row<A, false>(out, x, x, n, negated{});
}

/// Σ terms(i) for i < n in f64, in a fixed shape (see sum_kernel).
template <class Terms>
[[nodiscard]] double sum(const Terms& terms, std::size_t n)
{
    double total = 0;
    run_widest(sum_kernel<Terms>{terms, n, total});
    return total;
}

/// Σ x·y over a row in f64, in a fixed shape.
template <arithmetic_element A>
[[nodiscard]] double dot(const A* x, const A* y, std::size_t n)
{
    return sum(product_terms<A>{x, y}, n);
}

/// Copies to memory that will not be read again soon: non-temporal stores where the processor has them.
inline void stream_copy(void* to, const void* from, std::size_t size)
{
#if defined(__SSE2__)
    auto* out = static_cast<char*>(to);
    const auto* in = static_cast<const char*>(from);
    const std::size_t head = std::min(size, (16 - reinterpret_cast<std::uintptr_t>(out) % 16) % 16);
    std::memcpy(out, in, head);
    out += head;
    in += head;
    size -= head;
    for (; size >= 64; size -= 64, in += 64, out += 64) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)),
                      b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16)),
                      c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 32)),
                      d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 48));
        _mm_stream_si128(reinterpret_cast<__m128i*>(out), a);
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + 16), b);
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + 32), c);
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + 48), d);
    }
    std::memcpy(out, in, size);
#else
    std::memcpy(to, from, size);
#endif
}

/// Makes non-temporal stores visible to other threads; called once after a run of stream_copy().
inline void stream_fence() noexcept
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

} // namespace taskvec::inline TASKVEC_ABI::kernels
#endif // TASKVEC_SINGLE_CORE_KERNELS_HPP

// ---- taskvec/core/parallel.hpp
#if !defined(TASKVEC_SINGLE_CORE_PARALLEL_HPP)
#define TASKVEC_SINGLE_CORE_PARALLEL_HPP
// The CPU's parallel loop over blocks: errors carried across threads, cancellation, progress, one scratch a worker.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/call_memory.hpp
#if !defined(TASKVEC_SINGLE_CORE_CALL_MEMORY_HPP)
#define TASKVEC_SINGLE_CORE_CALL_MEMORY_HPP
// The memory of the small lists that a call makes for itself.
// SPDX-License-Identifier: Apache-2.0


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
#endif // TASKVEC_SINGLE_CORE_CALL_MEMORY_HPP

// ---- taskvec/core/policy.hpp
#if !defined(TASKVEC_SINGLE_CORE_POLICY_HPP)
#define TASKVEC_SINGLE_CORE_POLICY_HPP
// Policies: where an algorithm runs, and how. The first argument of every algorithm, by const reference.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/callback.hpp
#if !defined(TASKVEC_SINGLE_CORE_CALLBACK_HPP)
#define TASKVEC_SINGLE_CORE_CALLBACK_HPP
// Functions as values: callback owns what it calls, function_ref refers to it. What std::function is for, without the
// tenth of a second that <functional> costs in every file.
// SPDX-License-Identifier: Apache-2.0


#include <concepts>
#include <cstddef>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// A function of this signature, owned: a lambda, a function, a std::function. Empty at first, and where it is made of
/// a null pointer or of an empty std::function; an empty one must not be called. A copy copies what is called.
///
///     callback<bool(std::string_view)> wanted = [](std::string_view name) { return name != "bias"; };
///     if (wanted && wanted("weight")) { … }
template <class Signature>
class callback;

/// A function of this signature that somebody else owns and keeps until the last call: for parameters.
///
///     void repeat(std::size_t times, function_ref<void(std::size_t)> body);
///     repeat(3, [&](std::size_t i) { sum += i; });
template <class Signature>
class function_ref;

template <class R, class... A>
class callback<R(A...)> {
public:
    callback() noexcept = default;
    callback(std::nullptr_t) noexcept { }
    template <class F>
        requires(!std::same_as<std::remove_cvref_t<F>, callback> && std::is_invocable_r_v<R, std::decay_t<F>&, A...>)
    callback(F&& f)
    {
        using target = std::decay_t<F>;
        if constexpr (std::is_pointer_v<std::remove_cvref_t<F>> || requires { f.operator bool(); }) {
            if (!static_cast<bool>(f)) { return; }
        }
        target_ = new target(std::forward<F>(f));
        kind_ = &kind_of<target>;
    }
    callback(const callback& other)
        : target_(other.kind_ ? other.kind_->copy(other.target_) : nullptr)
        , kind_(other.kind_)
    { }
    callback(callback&& other) noexcept
        : target_(std::exchange(other.target_, nullptr))
        , kind_(std::exchange(other.kind_, nullptr))
    { }
    callback& operator=(callback other) noexcept
    {
        std::swap(target_, other.target_);
        std::swap(kind_, other.kind_);
        return *this;
    }
    ~callback()
    {
        if (kind_) { kind_->destroy(target_); }
    }

    [[nodiscard]] explicit operator bool() const noexcept { return kind_ != nullptr; }
    R operator()(A... arguments) const { return kind_->call(target_, std::forward<A>(arguments)...); }

private:
    struct kind {
        R (*call)(void*, A...);
        void* (*copy)(const void*);
        void (*destroy)(void*) noexcept;
    };
    template <class F>
    static constexpr kind kind_of{
        [](void* target, A... arguments) -> R { return (*static_cast<F*>(target))(std::forward<A>(arguments)...); },
        [](const void* target) -> void* { return new F(*static_cast<const F*>(target)); },
        [](void* target) noexcept { delete static_cast<F*>(target); }};

    void* target_ = nullptr;
    const kind* kind_ = nullptr;
};

template <class R, class... A>
class function_ref<R(A...)> {
public:
    template <class F>
        requires(!std::same_as<std::remove_cvref_t<F>, function_ref> && std::is_object_v<std::remove_reference_t<F>>
                    && std::is_invocable_r_v<R, F&, A...>)
    function_ref(F&& f) noexcept
        : target_(const_cast<void*>(static_cast<const volatile void*>(&f)))
        , call_([](void* target, A... arguments) -> R {
            return (*static_cast<std::remove_reference_t<F>*>(target))(std::forward<A>(arguments)...);
        })
    { }

    R operator()(A... arguments) const { return call_(target_, std::forward<A>(arguments)...); }

private:
    void* target_;
    R (*call_)(void*, A...);
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_CALLBACK_HPP

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// What a progress_event counts: bytes of the inputs that a phase reads, or the layers of a phase whose work is not
/// reading (decompositions, linear systems).
enum class progress_unit : std::uint8_t { bytes, layers };

/// What a long-running algorithm reports: `done` of `total` units of the phase it is in.
struct progress_event {
    std::string_view phase; ///< what is done, such as "merging"; a phase that comes again begins at 0
    std::uint64_t done = 0; ///< units done
    std::uint64_t total = 0; ///< units of the whole phase
    progress_unit unit = progress_unit::bytes; ///< what is counted
};

/// Called now and then from one thread at a time; returning false stops the work with taskvec::cancelled.
using progress_callback = callback<bool(const progress_event&)>;

/// The caller's own parallel loop: calls body(0) … body(count − 1), each once, in any order and on any threads, and
/// returns when all have returned. `body` never throws.
///
///     taskvec::cpu policy{.executor = [&](std::size_t count, const auto& body) { pool.run(count, body); }};
using parallel_for = callback<void(std::size_t count, function_ref<void(std::size_t)> body)>;

/// What to do with NaN or infinity in an input: an error that names the tensor and index, or let it spread.
enum class nonfinite : std::uint8_t { error, propagate };

/// Run on the CPU. Results do not depend on any of these members.
///
/// Memory: what grows with the elements of tensors comes from `memory`, which is asked from several threads at once
/// unless `threads` is 1: hand in a std::pmr::synchronized_pool_resource, or a resource of your own that locks. A
/// second call of the same kind asks for the same again, so that a resource that keeps what it was given back takes
/// nothing more from the system. Around it, from operator new, goes what lines models up by name, less than 2 KB for
/// each tensor of each model: nothing where a call gets aligned_models (merges but RegMean's, SCE's and those that work
/// on some tensors at a time, selection, pruning) on one thread or the caller's; and the singular values of a
/// decomposition. Eigen's products take up to a few MB a thread from malloc, whatever the sizes, and its large SVD
/// (truncated_svd()) takes its work space there. What a call returns: sparse vectors and saved words lie in memory of
/// `memory`, which must outlive them; matrices, adapters, statistics and lists lie in ordinary memory. Readers and
/// writers of files have no policy.
///
///     taskvec::cpu policy{.threads = 4};
struct cpu {
    /// The space of the views that a call with this policy takes.
    static constexpr memory_space space = memory_space::host;

    unsigned threads = 0; ///< 0: one for each hardware thread
    parallel_for executor{}; ///< empty: threads, started for each call
    std::pmr::memory_resource* memory = nullptr; ///< for scratch; null: std::pmr::get_default_resource()
    progress_callback progress{}; ///< empty: silent
};

/// The caller's own device memory, for scratch: ordered on the stream that is passed on (a cudaStream_t).
class device_memory_resource {
public:
    virtual ~device_memory_resource() = default;
    /// At least `bytes` bytes of device memory, aligned to 256; nullptr when there are not so many.
    [[nodiscard]] virtual void* allocate(std::size_t bytes, void* stream) = 0;
    /// Gives back what allocate() returned, on the same stream or one that waits for it.
    virtual void deallocate(void* place, std::size_t bytes, void* stream) noexcept = 0;
};

/// What outlives a call on a stream: library handles. Made and described by device/cusolver.
class gpu_context;

/// Run on the device of a CUDA stream, or, where the code was compiled for a Thrust host system, on the host threads of
/// that system, whose memory then counts as device memory. Results do not depend on any of these members.
///
/// The type is here so that interfaces can name it without a CUDA header. Each room has its gpu versions in a header of
/// their own (<taskvec/device/methods.hpp> and so on; <taskvec/gpu.hpp> includes them all), for nvcc, or for g++ and
/// clang with THRUST_DEVICE_SYSTEM set to a host system (see docs/gpu.md).
///
///     taskvec::gpu policy{.stream = stream};
struct gpu {
    /// The space of the views that a call with this policy takes.
    static constexpr memory_space space = memory_space::device;

    void* stream = nullptr; ///< a cudaStream_t; null: the default stream
    device_memory_resource* allocator = nullptr; ///< scratch on the device; null: cudaMallocAsync
    gpu_context* context = nullptr; ///< handles to reuse; null: made where they are needed, for the one call
};

namespace detail {
template <class P>
inline constexpr bool is_policy = false;
template <>
inline constexpr bool is_policy<cpu> = true;
template <>
inline constexpr bool is_policy<gpu> = true;

/// The rooms whose algorithms have gpu versions.
enum class gpu_room : std::uint8_t { arithmetic, select, merge, lowrank, reuse };
/// True once the gpu header of a room has been included: it specialises this.
template <class P, gpu_room Room>
inline constexpr bool gpu_header_included = false;
/// gpu, in a program that has not included the gpu header of a room: what the overloads match that say so.
template <class P, gpu_room Room>
concept gpu_without_header = std::same_as<P, gpu> && !gpu_header_included<P, Room>;
} // namespace detail

/// cpu or gpu.
template <class P>
concept policy = detail::is_policy<P>;

/// cpu alone. A function that needs no template otherwise is one over its policy, so that its body, and what that would
/// instantiate of Eigen, costs nothing to compile in a program that never calls it.
template <class P>
concept cpu_policy = std::same_as<P, cpu>;

/// Something that can be read (as elements of one storage type) in the memory space of policy P.
template <class X, class P>
concept input_of =
    viewable<const std::remove_reference_t<X>> && (view_of<const std::remove_reference_t<X>>::space == P::space);

/// Something that can be written in the memory space of policy P, and is still there afterwards.
template <class X, class P>
concept output_of = viewable<X> && outlives_the_expression<X> && (view_of<X>::space == P::space)
    && !std::is_const_v<typename view_of<X>::element_type>;

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_POLICY_HPP

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory_resource>
#include <string_view>

// <thread> costs a file a sixth of a second; what is needed of it is a few calls of POSIX.
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#else
#include <thread>
#include <vector>
#endif

namespace taskvec::inline TASKVEC_ABI {

/// Number of workers that a policy may use for `count` independent pieces of work.
[[nodiscard]] inline std::size_t worker_count(const cpu& policy, std::size_t count);

/// The policy's memory resource.
[[nodiscard]] inline std::pmr::memory_resource* memory_of(const cpu& policy) noexcept
{
    return policy.memory ? policy.memory : std::pmr::get_default_resource();
}

/// The same policy on one thread, silent: for work that is already inside a parallel loop.
[[nodiscard]] inline cpu sequential(const cpu& policy)
{
    return {.threads = 1, .executor = {}, .memory = policy.memory, .progress = {}};
}

/// Calls body(index, worker) once for each index in [0, count); `worker` < worker_count(policy, count) names a slot
/// that no other call uses at the same time. Indices are handed out in ascending order. The error of the lowest index
/// that failed is rethrown after all workers have stopped; indices above a failed one may be skipped, those below never
/// are: which error is reported does not depend on threads.
inline void for_each_index(
    const cpu& policy, std::size_t count, function_ref<void(std::size_t index, std::size_t worker)> body);

namespace detail {

/// How many threads the machine runs at once; at least 1.
[[nodiscard]] inline std::size_t hardware_threads() noexcept
{
#if defined(__unix__) || defined(__APPLE__)
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? static_cast<std::size_t>(count) : 1;
#else
    return std::max<std::size_t>(1, std::thread::hardware_concurrency());
#endif
}

/// Calls body(0) … body(count − 1), each on a thread of its own, body(0) on this one; returns when all have returned.
/// Where the system gives no more threads this one makes their calls. body does not throw.
TASKVEC_NOINLINE inline void run_on_threads(std::size_t count, function_ref<void(std::size_t)> body)
{
#if defined(__unix__) || defined(__APPLE__)
    constexpr std::size_t most = 256;
    if (count > most) { // the last of these threads starts the others
        run_on_threads(most, [&](std::size_t index) {
            if (index + 1 < most) { body(index); }
            else {
                run_on_threads(count - index, [&](std::size_t rest) { body(index + rest); });
            }
        });
        return;
    }
    struct worker {
        const function_ref<void(std::size_t)>* body;
        std::size_t index;
        pthread_t thread;
    };
    const auto run = [](void* argument) -> void* {
        const worker& mine = *static_cast<worker*>(argument);
        (*mine.body)(mine.index);
        return nullptr;
    };
    worker workers[most];
    std::size_t started = 1;
    for (; started < count; ++started) {
        workers[started] = {&body, started, {}};
        if (pthread_create(&workers[started].thread, nullptr, run, &workers[started]) != 0) { break; }
    }
    body(0);
    for (std::size_t index = started; index < count; ++index) { body(index); }
    for (std::size_t index = 1; index < started; ++index) { pthread_join(workers[index].thread, nullptr); }
#else
    std::vector<std::jthread> threads;
    threads.reserve(count - 1);
    for (std::size_t index = 1; index < count; ++index) {
        threads.emplace_back([&body, index] { body(index); });
    }
    body(0);
#endif
}

/// Holds a lock while it lives; what is waited for is short.
class light_lock {
public:
    explicit light_lock(std::atomic_flag& flag) noexcept
        : flag_(flag)
    {
        while (flag_.test_and_set(std::memory_order_acquire)) { flag_.wait(true, std::memory_order_relaxed); }
    }
    ~light_lock()
    {
        flag_.clear(std::memory_order_release);
        flag_.notify_one();
    }
    light_lock(const light_lock&) = delete;
    light_lock& operator=(const light_lock&) = delete;

private:
    std::atomic_flag& flag_;
};

/// Counts finished work and asks the callback, one thread at a time, whether to go on.
class progress_meter {
public:
    progress_meter(
        const cpu& policy, std::string_view phase, std::uint64_t total, progress_unit unit = progress_unit::bytes)
        : callback_(policy.progress)
        , phase_(phase)
        , unit_(unit)
        , total_(total)
        , step_(std::max<std::uint64_t>(1, total / 256))
    { }

    /// Adds `amount`; false once the callback has asked to stop.
    bool advance(std::uint64_t amount)
    {
        if (!callback_) { return true; }
        const std::uint64_t before = done_.fetch_add(amount, std::memory_order_relaxed), after = before + amount;
        if (before / step_ != after / step_ || after >= total_) {
            const light_lock lock(busy_);
            const call_memory none(nullptr); // in the caller's code
            if (!stopped_.load(std::memory_order_relaxed)
                && !callback_({phase_, std::min(after, total_), total_, unit_})) {
                stopped_.store(true, std::memory_order_relaxed);
            }
        }
        return !stopped_.load(std::memory_order_relaxed);
    }

private:
    const progress_callback& callback_;
    std::string_view phase_;
    progress_unit unit_;
    std::uint64_t total_, step_;
    std::atomic<std::uint64_t> done_{0};
    std::atomic<bool> stopped_{false};
    std::atomic_flag busy_;
};

} // namespace detail

inline std::size_t worker_count(const cpu& policy, std::size_t count)
{
    const std::size_t wanted = policy.threads ? policy.threads : detail::hardware_threads();
    return std::max<std::size_t>(1, std::min(wanted, count));
}

inline void for_each_index(
    const cpu& policy, std::size_t count, function_ref<void(std::size_t index, std::size_t worker)> body)
{
    if (count == 0) { return; }
    const std::size_t workers = worker_count(policy, count);
    if (workers == 1) {
        for (std::size_t index = 0; index < count; ++index) { body(index, std::size_t{0}); }
        return;
    }
    std::atomic<std::size_t> next{0}, first_failed{count};
#if !defined(TASKVEC_NO_EXCEPTIONS)
    std::atomic_flag busy;
    std::exception_ptr failure;
#endif
    std::pmr::memory_resource* const lists = detail::current_call_memory;
    const auto work = [&](std::size_t worker) {
        const detail::call_memory memory(lists);
        for (std::size_t index;
            (index = next.fetch_add(1, std::memory_order_relaxed)) < first_failed.load(std::memory_order_relaxed)
            && index < count;) {
#if defined(TASKVEC_NO_EXCEPTIONS)
            body(index, worker);
#else
            try {
                body(index, worker);
            }
            catch (...) {
                const detail::light_lock lock(busy);
                if (index < first_failed.load(std::memory_order_relaxed)) {
                    first_failed.store(index, std::memory_order_relaxed);
                    failure = std::current_exception();
                }
            }
#endif
        }
    };
    if (policy.executor) {
        const detail::call_memory none(nullptr); // whatever else the caller's threads do meanwhile
        policy.executor(workers, work);
    }
    else {
        detail::run_on_threads(workers, work);
    }
#if !defined(TASKVEC_NO_EXCEPTIONS)
    if (failure) { std::rethrow_exception(failure); }
#endif
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_PARALLEL_HPP

// ---- taskvec/models/block.hpp
#if !defined(TASKVEC_SINGLE_MODELS_BLOCK_HPP)
#define TASKVEC_SINGLE_MODELS_BLOCK_HPP
// Blocks: a few thousand elements of every aligned model, widened to the arithmetic type on demand.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/models/aligned_models.hpp
#if !defined(TASKVEC_SINGLE_MODELS_ALIGNED_MODELS_HPP)
#define TASKVEC_SINGLE_MODELS_ALIGNED_MODELS_HPP
// Several models lined up tensor by tensor: what every model-wide algorithm walks over, block by block.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/overflow.hpp
#if !defined(TASKVEC_SINGLE_CORE_OVERFLOW_HPP)
#define TASKVEC_SINGLE_CORE_OVERFLOW_HPP
// What becomes of finite numbers that a storage type cannot hold.
// SPDX-License-Identifier: Apache-2.0


#include <cmath>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// What becomes of a finite result that the dtype of the output cannot hold: an error that names it, the dtype's
/// largest number, or infinity.
enum class overflow : std::uint8_t { error, saturate, propagate };

/// The largest finite number of T (or the lowest), as its word: the one before infinity's.
template <storage_element T>
[[nodiscard]] storage_word<T> largest_word(bool negative) noexcept
{
    using word_bits = std::conditional_t<sizeof(T) == 1, std::uint8_t,
        std::conditional_t<sizeof(T) == 2, std::uint16_t,
            std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>>>;
    const auto infinity = narrow<T>(static_cast<arithmetic_type<T>>(negative ? -HUGE_VAL : HUGE_VAL));
    word_bits bits;
    std::memcpy(&bits, &infinity, sizeof bits);
    --bits;
    storage_word<T> word;
    std::memcpy(&word, &bits, sizeof word);
    return word;
}

namespace detail {
/// The largest finite number of T, in f64.
template <storage_element T>
[[nodiscard]] double largest_number() noexcept
{
    return static_cast<double>(widen_word<arithmetic_type<T>, T>(largest_word<T>(false)));
}
/// `text` where T holds less than the dtypes that results can have instead: F32 and BF16 go up to the same 3e38.
template <storage_element T>
[[nodiscard]] std::string_view if_narrow(std::string_view text) noexcept
{
    return largest_number<T>() < 1e38 ? text : std::string_view();
}
} // namespace detail

/// A number as T. One that T cannot hold is an error, for which `refuse()` throws, T's largest number, which
/// `saturated` counts, or infinity. What is not finite to begin with is refused unless it propagates.
template <storage_element T, arithmetic_element A, class Refuse>
[[nodiscard]] T narrow_within(A value, overflow how, std::uint64_t& saturated, Refuse&& refuse)
{
    const T stored = narrow<T>(value);
    if (std::isfinite(static_cast<double>(widen<arithmetic_type<T>>(stored))) || how == overflow::propagate) {
        return stored;
    }
    if (how == overflow::error || !std::isfinite(value)) { refuse(); }
    ++saturated;
    return reinterpret_bits<T>(largest_word<T>(value < 0));
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_OVERFLOW_HPP

// ---- taskvec/core/sink.hpp
#if !defined(TASKVEC_SINGLE_CORE_SINK_HPP)
#define TASKVEC_SINGLE_CORE_SINK_HPP
// Where a model-wide algorithm puts its result: tensors in memory, or a file that is written block by block.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/tensor_ref.hpp
#if !defined(TASKVEC_SINGLE_CORE_TENSOR_REF_HPP)
#define TASKVEC_SINGLE_CORE_TENSOR_REF_HPP
// Tensors and models as the run-time layer sees them: a pointer, a dtype, a shape. Nothing here owns memory.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/by_name.hpp
#if !defined(TASKVEC_SINGLE_CORE_BY_NAME_HPP)
#define TASKVEC_SINGLE_CORE_BY_NAME_HPP
// Things with names, in the order of their names.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Where a thing of that name stands, or would stand, among things (`.name`) in the order of their names.
template <class Things>
[[nodiscard]] auto place_by_name(Things& things, std::string_view name)
{
    return std::lower_bound(things.begin(), things.end(), name,
        [](const auto& thing, std::string_view wanted) { return std::string_view(thing.name) < wanted; });
}

/// The thing of that name among things in the order of their names, or null.
template <class Things>
[[nodiscard]] auto find_by_name(Things& things, std::string_view name) -> decltype(&*things.begin())
{
    const auto place = place_by_name(things, name);
    return place != things.end() && place->name == name ? &*place : nullptr;
}

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_CORE_BY_NAME_HPP

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A shape, or strides: slowest first, in elements.
using extents = std::vector<std::int64_t>;

/// "[2, 3]"
[[nodiscard]] inline std::string to_string(const extents& shape)
{
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) { text += (i ? ", " : "") + std::to_string(shape[i]); }
    return text + "]";
}

namespace detail {
/// How many elements a tensor may have, and how messages say it.
inline constexpr std::uint64_t most_elements = std::numeric_limits<std::size_t>::max() / 2;
inline constexpr std::string_view most_elements_text =
    sizeof(std::size_t) == 8 ? "2^63-1 elements" : "the 2^31-1 elements of a 32-bit program";
} // namespace detail

/// Number of elements of a shape; a negative extent or a product above 2^63-1 (2^31-1 in a 32-bit program) is an error
/// that names `what`.
[[nodiscard]] inline std::size_t element_count(const extents& shape, std::string_view what = "tensor")
{
    std::uint64_t count = 1;
    bool empty = false;
    for (const auto extent : shape) {
        if (extent < 0) {
            raise<shape_mismatch>(
                error_code::shape_invalid, message("tensor '", what, "' has a negative extent in ", to_string(shape)));
        }
        empty = empty || extent == 0;
    }
    if (empty) { return 0; }
    for (const auto extent : shape) {
        if (count > detail::most_elements / static_cast<std::uint64_t>(extent)) {
            raise<shape_mismatch>(error_code::shape_invalid,
                message(
                    "tensor '", what, "' of shape ", to_string(shape), " has more than ", detail::most_elements_text));
        }
        count *= static_cast<std::uint64_t>(extent);
    }
    return static_cast<std::size_t>(count);
}

namespace detail {
/// The product, or the sum, of two counts, modulo 2^64; whether that is another than theirs.
[[nodiscard]] constexpr bool product_wraps(std::uint64_t x, std::uint64_t y, std::uint64_t& product) noexcept
{
    product = x * y;
    return x != 0 && product / x != y;
}
[[nodiscard]] constexpr bool sum_wraps(std::uint64_t x, std::uint64_t y, std::uint64_t& sum) noexcept
{
    sum = x + y;
    return sum < x;
}
} // namespace detail

/// Bytes of `count` elements of `type` (packed sub-byte types round up to whole bytes).
[[nodiscard]] constexpr std::size_t byte_count(dtype type, std::size_t count) noexcept
{
    const std::size_t width = bits_per_element(type);
    return width % 8 == 0 ? count * (width / 8) : (count * width + 7) / 8;
}

/// {pointer, dtype, shape, strides, device}: DLPack's fields without the ownership. Byte is `void` or `const void`.
/// Strides count elements; empty strides mean row-major and contiguous.
template <class Byte>
    requires std::is_void_v<Byte>
struct basic_tensor_ref {
    Byte* data = nullptr;
    taskvec::dtype dtype = taskvec::dtype::f32; ///< of the elements
    extents shape{}; ///< slowest first; empty: a scalar
    extents strides{}; ///< empty, or one for each extent
    memory_space space = memory_space::host; ///< where `data` is
    int device = 0; ///< of a device's memory: its number
    const operand_source* source = nullptr; ///< not null: `data` is null, and elements come from here

    [[nodiscard]] std::size_t size(std::string_view what = "tensor") const { return element_count(shape, what); }
    /// Bytes of its elements, as if they were contiguous. `what` names it in errors.
    [[nodiscard]] std::size_t bytes(std::string_view what = "tensor") const
    {
        const std::size_t count = size(what);
        if constexpr (sizeof(std::size_t) < 8) {
            if (count > std::numeric_limits<std::size_t>::max() / 8 && bits_per_element(dtype) > 8) {
                raise<shape_mismatch>(error_code::shape_invalid,
                    message("tensor '", what, "' of shape ", to_string(shape), " and dtype ", to_string(dtype),
                        " has more bytes than a 32-bit program can address"));
            }
        }
        return byte_count(dtype, count);
    }
    /// True when the elements lie row-major without holes.
    [[nodiscard]] bool contiguous() const noexcept
    {
        if (strides.empty()) { return true; }
        std::int64_t expected = 1;
        for (std::size_t i = shape.size(); i-- > 0;) {
            if (shape[i] == 0) { return true; }
            if (shape[i] != 1 && strides[i] != expected) { return false; }
            expected *= shape[i];
        }
        return true;
    }
    /// What may be written may be read. (A template: of a reference that is const already nvcc would say that it never
    /// converts to itself.)
    template <class To>
        requires(std::same_as<To, const void> && !std::is_const_v<Byte>)
    operator basic_tensor_ref<To>() const
    {
        return {data, dtype, shape, strides, space, device, source};
    }
};

namespace detail {
/// What takes tensors as memory says this of those that are worked out.
[[noreturn]] TASKVEC_COLD inline void refuse_source(std::string_view tensor)
{
    raise<invalid_argument>(error_code::tensor_without_data,
        message("tensor '", tensor, "' is a quantised layer: its numbers are nowhere in memory; decode it first"));
}
} // namespace detail

/// The tensor that a view's memory makes with this shape (default: one flat dimension).
template <class T, memory_space S>
[[nodiscard]] auto as_tensor(view<T, S> flat, extents shape)
{
    using ref = basic_tensor_ref<std::conditional_t<std::is_const_v<T>, const void, void>>;
    if (element_count(shape) != flat.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a view of ", flat.size(), " elements cannot have shape ", to_string(shape)));
    }
    return ref{flat.data(), dtype_of<std::remove_const_t<T>>, std::move(shape), {}, S, 0};
}
template <class T, memory_space S>
[[nodiscard]] auto as_tensor(view<T, S> flat)
{
    return as_tensor(flat, {static_cast<std::int64_t>(flat.size())});
}

namespace detail {
template <class T, memory_space S, class Byte>
[[nodiscard]] view<const T, S> checked_flat_view(const basic_tensor_ref<Byte>& tensor, std::string_view what)
{
    if (tensor.dtype != dtype_of<T>) {
        raise<dtype_mismatch>(error_code::dtype_differs,
            message("tensor '", what, "' has dtype ", to_string(tensor.dtype), "; expected ", to_string(dtype_of<T>)));
    }
    if (tensor.space != S) {
        raise<invalid_argument>(error_code::tensor_memory,
            message("tensor '", what, "' lives in ", tensor.space == memory_space::host ? "host" : "device",
                " memory; copy it to the policy's own memory space first"));
    }
    if (!tensor.contiguous()) {
        raise<invalid_argument>(error_code::tensor_layout,
            message("tensor '", what, "' is not contiguous; copy it to row-major memory first"));
    }
    if (tensor.source) { refuse_source(what); }
    return {static_cast<const T*>(tensor.data), tensor.size(what)};
}
} // namespace detail

/// The flat view of a contiguous tensor of element type T in memory space S; anything else is an error naming `what`.
template <storage_element T, memory_space S = memory_space::host>
[[nodiscard]] auto flat_view(const const_tensor_ref& tensor, std::string_view what)
{
    return detail::checked_flat_view<T, S>(tensor, what);
}
template <storage_element T, memory_space S = memory_space::host>
[[nodiscard]] auto flat_view(const tensor_ref& tensor, std::string_view what)
{
    return detail::checked_flat_view<T, S>(tensor, what); // not by conversion, which copies the shape
}

/// A model: tensors by name. Kept sorted by the bytes of the name, which is the order that model-wide algorithms use.
template <class Ref>
class basic_model {
public:
    /// A tensor and its name.
    struct entry {
        std::string name; ///< sorts by its bytes
        Ref tensor; ///< borrowed
    };

    basic_model() = default;
    /// In any order. Errors: as insert().
    basic_model(std::initializer_list<entry> entries)
    {
        for (const auto& [name, tensor] : entries) { insert(name, tensor); }
    }
    /// A model of mutable tensors is a model of const ones.
    template <class Other>
        requires(!std::same_as<Other, Ref> && std::convertible_to<Other, Ref>)
    basic_model(const basic_model<Other>& other)
    {
        for (const auto& [name, tensor] : other) { entries_.push_back({name, Ref(tensor)}); }
    }

    /// Adds a tensor; a name that is already there is an error. Cost: O(log n) and a shift.
    void insert(std::string name, Ref tensor)
    {
        const auto place = detail::place_by_name(entries_, name);
        if (place != entries_.end() && place->name == name) {
            raise<invalid_argument>(
                error_code::tensor_repeated, message("tensor '", name, "' occurs twice in one model"));
        }
        entries_.insert(place, entry{std::move(name), std::move(tensor)});
    }
    /// The tensor of that name, or nullptr.
    [[nodiscard]] const Ref* find(std::string_view name) const
    {
        const entry* const one = detail::find_by_name(entries_, name);
        return one ? &one->tensor : nullptr;
    }
    [[nodiscard]] auto begin() const noexcept { return entries_.begin(); }
    [[nodiscard]] auto end() const noexcept { return entries_.end(); }
    [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }
    [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }
    [[nodiscard]] const entry& operator[](std::size_t index) const noexcept { return entries_[index]; }

private:
    std::vector<entry> entries_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_TENSOR_REF_HPP

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A tensor that is yet to be written.
struct tensor_spec {
    std::string name; ///< of the tensor
    taskvec::dtype dtype = taskvec::dtype::f32; ///< as it is to be stored
    extents shape{}; ///< slowest first

    [[nodiscard]] std::size_t size() const { return element_count(shape, name); }
    /// Bytes of the tensor.
    [[nodiscard]] std::size_t bytes() const { return byte_count(dtype, size()); }
};

/// Receives the bytes of a fixed list of tensors, in any order and from several threads at once. Blocks never overlap
/// while they are written. A walk that settles what it had to guess (TIES, sums of 0) writes blocks again once all have
/// been written; what is written last counts.
class tensor_sink {
public:
    virtual ~tensor_sink() = default;
    /// Whether blocks may be written again. To a sink for which what it got is final a walk that settles comes twice,
    /// and writes the second time.
    [[nodiscard]] virtual bool rewritable() const { return true; }
    /// The host memory of tensor `index`, to be written in place; nullptr when bytes must go through write().
    [[nodiscard]] virtual void* direct(std::size_t /*index*/) { return nullptr; }
    /// Whether tensor `index` is still wanted. What is not need not be computed, and is let go where it is written.
    [[nodiscard]] virtual bool wants(std::size_t /*index*/) const { return true; }
    /// Writes `size` bytes at byte `offset` of tensor `index`.
    virtual void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) = 0;
    /// The same of results that are far from the largest number of their dtype, as whoever made them knows: for sinks
    /// that look for overflow.
    virtual void write_bounded(std::size_t index, std::uint64_t offset, const void* data, std::size_t size)
    {
        write(index, offset, data, size);
    }
};

namespace detail {
/// Where a walk writes that is only to learn something.
class discarding_sink final : public tensor_sink {
public:
    void write(std::size_t /*index*/, std::uint64_t /*offset*/, const void* /*data*/, std::size_t /*size*/) override { }
};
} // namespace detail

/// The sink over tensors that the caller owns, in the order of `tensors`.
class memory_sink final : public tensor_sink {
public:
    /// `tensors`: memory for each tensor of the list that is written, in its order, which outlives the sink.
    explicit memory_sink(std::vector<void*> tensors)
        : tensors_(std::move(tensors))
    { }
    [[nodiscard]] void* direct(std::size_t index) override { return tensors_[index]; }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        std::memcpy(static_cast<std::byte*>(tensors_[index]) + offset, data, size);
    }

private:
    std::vector<void*> tensors_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_SINK_HPP

// ---- taskvec/models/operand_source.hpp
#if !defined(TASKVEC_SINGLE_MODELS_OPERAND_SOURCE_HPP)
#define TASKVEC_SINGLE_MODELS_OPERAND_SOURCE_HPP
// Tensors that are stored nowhere as numbers: their elements are worked out when they are read.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// What stands for the stored elements of one tensor: of a task (aligned_models::compute()), as a base weight with
/// adapters added (adapters/adapted_weight.hpp); or of any model whose tensor_ref names it (`source`), as a quantised
/// layer (formats/quantised.hpp). Everything that walks over aligned models reads it as it would a tensor of
/// dtype type() with these elements. Reads come from several threads at once, in any order, the same one more than
/// once; the same elements must come out each time.
class operand_source {
public:
    virtual ~operand_source() = default;
    /// f32 or f64.
    [[nodiscard]] virtual taskvec::dtype type() const noexcept = 0;
    /// Elements [offset, offset + count) of the tensor, row-major, as type(), to `out`, which is aligned to them.
    virtual void read(std::uint64_t offset, std::size_t count, void* out) const = 0;
    /// Does beforehand, on the policy's threads and in its memory, what the first read would do by itself.
    virtual void prepare(const cpu& /*policy*/) const { }
    /// Gives back what prepare() and reads keep, until the next one. Nobody reads meanwhile.
    virtual void release() const { }
    /// Bits that are read for an element: for progress and reports.
    [[nodiscard]] virtual unsigned stored_bits() const noexcept { return bits_per_element(type()); }
};

namespace detail {
/// Prepares a source, where there is one, and gives back what it keeps when the work is done.
class prepared_source {
public:
    prepared_source(const operand_source* source, const cpu& policy)
        : source_(source)
    {
        if (source_) { source_->prepare(policy); }
    }
    ~prepared_source()
    {
        if (source_) { source_->release(); }
    }
    prepared_source(const prepared_source&) = delete;
    prepared_source& operator=(const prepared_source&) = delete;

private:
    const operand_source* source_;
};
} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_OPERAND_SOURCE_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What a tensor that a task lacks means: an error, or "unchanged from the base".
enum class missing_tensors : std::uint8_t { error, base };

/// A task's tensors, and the base's where the task lacks some: the model that missing_tensors::base takes it for.
[[nodiscard]] inline const_model_ref completed(const_model_ref task, const const_model_ref& base)
{
    for (const auto& [name, tensor] : base) {
        if (!task.find(name)) { task.insert(name, tensor); }
    }
    return task;
}

/// What every model-wide algorithm may be told. None of it changes a bit of a tensor that is included.
struct model_options {
    callback<bool(std::string_view)> include{}; ///< empty: every floating tensor; the others are copied from the base
    std::optional<taskvec::dtype>
        output{}; ///< dtype of the result; empty: the base's, tensor by tensor (fp8 becomes f32)
    nonfinite on_nonfinite = nonfinite::error; ///< NaN and infinity in an input
    missing_tensors on_missing = missing_tensors::error; ///< a tensor that a task lacks
    overflow on_overflow = overflow::propagate; ///< a result that is too large for the output's dtype (host memory)
    std::vector<std::string> labels{}; ///< names of the tasks in messages; empty: "task 1", "task 2", …
    std::string base_label = "the base"; ///< name of the base in messages
    std::size_t chunk = 65536; ///< elements handed to a thread at a time (rounded up to a multiple of 64)
    bool statistics = false; ///< collect counts and norms for a report, at some cost
    std::size_t memory = std::size_t{256}
        << 20; ///< bytes of scratch that a pass may take, and of inputs that a merge tensor by tensor works on at a
               ///< time; less means more reads of the inputs, never other bits
};

/// One tensor of the aligned models: where its data lie in the base and in each task.
struct aligned_tensor {
    /// Where a tensor's elements lie in one model, and how they are stored.
    struct operand {
        const std::byte* data = nullptr;
        taskvec::dtype dtype = taskvec::dtype::f32; ///< as they are stored
        const operand_source* source = nullptr; ///< where set, elements come from it, and `data` is not read

        /// Bytes of `count` elements as they are stored.
        [[nodiscard]] std::uint64_t bytes(std::size_t count) const noexcept
        {
            return source ? (std::uint64_t{count} * source->stored_bits() + 7) / 8 : byte_count(dtype, count);
        }
    };
    std::string name; ///< of the tensor
    extents shape; ///< slowest first
    std::size_t size = 0;
    std::size_t output = 0; ///< index in aligned_models::outputs()
    std::uint64_t position = 0; ///< first element's place in the concatenation of all included tensors
    taskvec::dtype output_dtype = taskvec::dtype::f32; ///< of the merged tensor
    bool wide = false; ///< arithmetic runs in f64, because some model stores f64
    operand base{}; ///< data == nullptr when there is no base
    std::vector<operand> tasks{}; ///< in their order

    /// True when what is to be added to the base has f64 values: an f64 tensor, whatever the tasks store.
    [[nodiscard]] bool wide_base() const noexcept { return base.dtype == taskvec::dtype::f64; }
    /// Bytes of `count` elements in the base and all tasks together; a task that stands for the base adds none.
    [[nodiscard]] std::uint64_t bytes(std::size_t count) const noexcept
    {
        std::uint64_t total = base.data ? base.bytes(count) : 0;
        for (const auto& task : tasks) { total += task.data == base.data ? 0 : task.bytes(count); }
        return total;
    }
};

/// A tensor that takes no part: it is copied through unchanged.
struct copied_tensor {
    std::string name; ///< of the tensor
    std::size_t output = 0; ///< index in aligned_models::outputs()
    const_tensor_ref source{}; ///< its bytes
};

/// A run of consecutive elements of one tensor, handed to one thread.
struct tensor_chunk {
    std::size_t tensor = 0; ///< index in aligned_models::tensors()
    std::uint64_t offset = 0; ///< of the first element in its tensor
    std::size_t size = 0;
};

/// The chunks of a model's tensors in order. They are worked out when they are asked for: a list of them would grow
/// with the model.
class chunk_list {
public:
    /// `first_of[i]` is the number of the first chunk of tensor i, with the number of all chunks at the end; chunks are
    /// `step` elements long, the last one of each tensor excepted.
    chunk_list(
        std::span<const std::size_t> first_of, const std::vector<aligned_tensor>& tensors, std::size_t step) noexcept
        : first_of_(first_of)
        , tensors_(&tensors)
        , step_(step)
    { }
    [[nodiscard]] std::size_t size() const noexcept { return first_of_.empty() ? 0 : first_of_.back(); }
    [[nodiscard]] tensor_chunk operator[](std::size_t index) const noexcept
    {
        // Of tensors that share a first chunk only the last is not empty.
        const auto after = std::upper_bound(first_of_.begin(), first_of_.end(), index);
        const auto tensor = static_cast<std::size_t>(after - first_of_.begin()) - 1;
        const std::size_t offset = (index - first_of_[tensor]) * step_;
        return {tensor, offset, std::min(step_, (*tensors_)[tensor].size - offset)};
    }

private:
    std::span<const std::size_t> first_of_;
    const std::vector<aligned_tensor>* tensors_;
    std::size_t step_;
};

/// Tensors [first, last) of aligned models.
struct tensor_range {
    std::size_t first = 0, last = 0; ///< indices in aligned_models::tensors()
};

/// Lines up a base (optional) and tasks by tensor name, and checks everything that can be checked before any work:
/// names, shapes, dtypes, contiguity, memory space. Tensors are ordered by the bytes of their names. Integer tensors
/// must be equal in all models and are copied; excluded tensors are copied from the base. Holds views only. All tensors
/// live in the memory space `space`; for device memory `equal` says whether two runs of bytes are the same.
/// Errors: invalid_argument, shape_mismatch, dtype_mismatch, each naming the tensor and the model.
class aligned_models {
public:
    /// Whether two runs of bytes are the same; for memory that the host cannot read.
    using bytes_equal = callback<bool(const void* a, const void* b, std::size_t bytes)>;

    /// `base`: null for none. The models outlive the result.
    aligned_models(const const_model_ref* base, std::span<const const_model_ref> tasks, model_options options = {},
        memory_space space = memory_space::host, const bytes_equal& equal = {})
        : options_(std::move(options))
        , space_(space)
    {
        if (tasks.empty()) {
            raise<invalid_argument>(error_code::inputs_empty, "no task was given: at least one is needed");
        }
        if (!options_.labels.empty() && options_.labels.size() != tasks.size()) {
            raise<invalid_argument>(error_code::list_length,
                message(options_.labels.size(), " labels for ", tasks.size(), " tasks: give one each, or none"));
        }
        task_count_ = tasks.size();
        has_base_ = base != nullptr;
        filled_.assign(tasks.size(), 0);
        const const_model_ref& reference = base ? *base : tasks[0];
        for (std::size_t t = 0; t < tasks.size(); ++t) {
            for (const auto& [name, tensor] : tasks[t]) {
                if (!reference.find(name) && (!options_.include || options_.include(name))) {
                    raise<invalid_argument>(error_code::tensor_unexpected,
                        message("tensor '", name, "' is in ", label(t), " but not in ", reference_label(),
                            ": use models of one architecture, or exclude the tensor"));
                }
            }
        }
        for (const auto& [name, tensor] : reference) { add(name, tensor, tasks, equal); }
        cut();
    }

    /// What is no base and tasks: a sentence says so.
    template <class Base, class Tasks, class... Rest>
        requires(!std::derived_from<Base, aligned_models>
            && (!std::convertible_to<const Base&, const const_model_ref*>
                || !std::convertible_to<const Tasks&, std::span<const const_model_ref>>))
    aligned_models(const Base&, const Tasks&, const Rest&...)
    {
        constexpr bool address = std::convertible_to<const Base&, const const_model_ref*>;
        static_assert(address,
            "aligned_models: the base is the address of a taskvec::const_model_ref, or nullptr where there is none: "
            "aligned_models(&base, tasks)");
        static_assert(!address || std::convertible_to<const Tasks&, std::span<const const_model_ref>>,
            "aligned_models: the tasks are no list of models: pass a std::vector<taskvec::const_model_ref>, or {&task, "
            "1} for one");
    }

    /// The same models, handed to threads in other chunks.
    aligned_models(const aligned_models& other, std::size_t chunk)
        : aligned_models(other)
    {
        options_.chunk = chunk;
        cut();
    }

    /// Some of the tensors that take part, by a list of their places in tensors(), ascending: the same outputs, and
    /// nothing that is copied. Model-wide shares are then shares of these. `memory`: instead of that of the options,
    /// where such parts share it; 0: all of it.
    aligned_models(const aligned_models& other, std::span<const std::size_t> chosen, std::size_t memory = 0)
        : options_(other.options_)
        , space_(other.space_)
        , outputs_(other.outputs_)
        , filled_(other.filled_)
        , task_count_(other.task_count_)
        , has_base_(other.has_base_)
        , computed_(other.computed_)
    {
        if (memory > 0) { options_.memory = memory; }
        for (const std::size_t i : chosen) {
            auto& tensor = tensors_.emplace_back(other.tensors()[i]);
            tensor.position = elements_;
            elements_ += tensor.size;
            any_wide_ = any_wide_ || tensor.wide;
        }
        cut();
    }

    /// Puts elements that are worked out in place of those that a task stores. `tensor` is a place in tensors();
    /// `source` outlives these models and their copies. Host memory only.
    void compute(std::size_t task, std::size_t tensor, const operand_source& source)
    {
        if (space_ != memory_space::host) {
            raise<invalid_argument>(error_code::tensor_memory,
                message("tensor '", tensors_[tensor].name, "' of ", label(task),
                    " is worked out on the host: use the cpu policy, or store the model first"));
        }
        auto& operand = tensors_[tensor].tasks[task];
        operand.dtype = source.type();
        operand.source = &source;
        tensors_[tensor].wide = tensors_[tensor].wide || operand.dtype == taskvec::dtype::f64;
        any_wide_ = any_wide_ || tensors_[tensor].wide;
        computed_ = true;
    }
    /// Whether some tensor of a task is worked out: compute().
    [[nodiscard]] bool computed() const noexcept { return computed_; }

    /// The tensors that the result holds, in name order.
    [[nodiscard]] const std::vector<tensor_spec>& outputs() const& noexcept { return *outputs_; }
    void outputs() const&& = delete; // name the owner first: the reference would dangle
    /// The included floating tensors, in name order.
    [[nodiscard]] const std::vector<aligned_tensor>& tensors() const& noexcept { return tensors_; }
    void tensors() const&& = delete; // name the owner first: the reference would dangle
    /// The tensors that are copied, in name order.
    [[nodiscard]] const std::vector<copied_tensor>& copied() const& noexcept { return copied_; }
    void copied() const&& = delete; // name the owner first: the reference would dangle
    /// All chunks, tensor by tensor.
    [[nodiscard]] chunk_list chunks() const& noexcept { return {first_chunk_, tensors_, step()}; }
    chunk_list chunks() const&& = delete; // a list over a temporary
    /// Chunks [first_chunk(i), first_chunk(i + 1)) cover tensor i.
    [[nodiscard]] std::size_t first_chunk(std::size_t tensor) const noexcept { return first_chunk_[tensor]; }
    /// Elements of all included tensors together.
    [[nodiscard]] std::uint64_t elements() const noexcept { return elements_; }
    /// How many tasks there are.
    [[nodiscard]] std::size_t task_count() const noexcept { return task_count_; }
    /// Whether there is a base.
    [[nodiscard]] bool has_base() const noexcept { return has_base_; }
    /// For each task, how many tensors it lacks that stand for the base's (missing_tensors::base), among those that
    /// take part and those that no task has, which are copied.
    [[nodiscard]] const std::vector<std::size_t>& filled() const noexcept { return filled_; }
    /// True when some included tensor computes in f64: model-wide magnitudes then compare as f64.
    [[nodiscard]] bool any_wide() const noexcept { return any_wide_; }
    /// As they were given.
    [[nodiscard]] const model_options& options() const noexcept { return options_; }
    /// What messages call a task: its label, or "task 1", "task 2", …
    [[nodiscard]] std::string label(std::size_t task) const
    {
        return options_.labels.empty() ? message("task ", task + 1) : options_.labels[task];
    }
    /// The tensor that holds place `position` of the concatenation.
    [[nodiscard]] std::size_t tensor_at(std::uint64_t position) const
    {
        const auto after = std::upper_bound(tensors_.begin(), tensors_.end(), position,
            [](std::uint64_t p, const aligned_tensor& tensor) { return p < tensor.position; });
        return static_cast<std::size_t>(after - tensors_.begin())
            - 1; // of tensors that share a position only the last is not empty
    }
    /// Bytes that one walk over all included tensors reads.
    [[nodiscard]] std::uint64_t bytes() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& tensor : tensors_) { total += tensor.bytes(tensor.size); }
        return total;
    }
    /// Bytes that one walk over a chunk reads.
    [[nodiscard]] std::uint64_t bytes(const tensor_chunk& piece) const noexcept
    {
        return tensors_[piece.tensor].bytes(piece.size);
    }

private:
    [[nodiscard]] std::size_t step() const noexcept
    {
        return std::max<std::size_t>(64, (options_.chunk + 63) / 64 * 64);
    }
    void cut()
    {
        first_chunk_.assign(1, 0);
        first_chunk_.reserve(tensors_.size() + 1);
        for (const auto& tensor : tensors_) {
            first_chunk_.push_back(first_chunk_.back() + tensor.size / step() + (tensor.size % step() != 0));
        }
    }

    [[nodiscard]] std::string reference_label() const { return has_base_ ? options_.base_label : label(0); }
    void check_place(const const_tensor_ref& tensor, const std::string& name, const std::string& where) const
    {
        if (tensor.space != space_) {
            raise<invalid_argument>(error_code::tensor_memory,
                message("tensor '", name, "' of ", where,
                    space_ == memory_space::host ? " lives in device memory: the cpu policy needs host memory"
                                                 : " lives in host memory: the gpu policy needs device memory, or "
                                                   "merge_streamed() for models on the host"));
        }
        if (!tensor.contiguous()) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", name, "' of ", where, " is not contiguous: copy it to row-major memory first"));
        }
        if (tensor.source && space_ != memory_space::host) { detail::refuse_source(name); }
        if (!tensor.data && !tensor.source && tensor.bytes(name) > 0) {
            raise<invalid_argument>(error_code::tensor_without_data,
                message("tensor '", name, "' of ", where, " has no data (null pointer)"));
        }
    }
    static bool computes(taskvec::dtype type) noexcept { return is_storage(type) || is_fp8(type); }

    void add(const std::string& name, const const_tensor_ref& tensor, std::span<const const_model_ref> tasks,
        const bytes_equal& equal)
    {
        check_place(tensor, name, reference_label());
        const std::size_t size = tensor.size(name), output = outputs_->size();
        const bool included = !options_.include || options_.include(name);
        if (!included) {
            outputs_->push_back(
                {name, tensor.source ? options_.output.value_or(tensor.dtype) : tensor.dtype, tensor.shape});
            copied_.push_back({name, output, tensor});
            return;
        }
        aligned_tensor aligned{
            name, tensor.shape, size, output, elements_, tensor.dtype, tensor.dtype == taskvec::dtype::f64, {}, {}};
        const auto operand_of = [](const const_tensor_ref& from) {
            const void* const data = from.source ? from.source : from.data; // not read: it tells operands apart
            return aligned_tensor::operand{
                static_cast<const std::byte*>(data), from.source ? from.source->type() : from.dtype, from.source};
        };
        const auto reference = operand_of(tensor);
        aligned.wide = aligned.wide || reference.dtype == taskvec::dtype::f64;
        if (has_base_) { aligned.base = reference; }
        std::size_t lacking = 0;
        for (std::size_t t = 0; t < tasks.size(); ++t) {
            const const_tensor_ref* const mine = tasks[t].find(name);
            if (!mine) {
                // There is nothing to merge in integers: a task that lacks them (a buffer that is saved no more) has
                // the base's.
                if (has_base_ && !computes(tensor.dtype)) {
                    ++filled_[t];
                    continue;
                }
                if (options_.on_missing == missing_tensors::error || !has_base_) {
                    raise<invalid_argument>(error_code::tensor_missing,
                        message("tensor '", name, "' of ", reference_label(), " is missing in ", label(t),
                            has_base_ ? ": add it, or let missing tensors stand for the base's" : ": add it"));
                }
                aligned.tasks.push_back(reference);
                ++filled_[t];
                ++lacking;
                continue;
            }
            check_place(*mine, name, label(t));
            check_same(name, tensor, *mine, t, equal);
            aligned.tasks.push_back(operand_of(*mine));
            aligned.wide = aligned.wide || aligned.tasks.back().dtype == taskvec::dtype::f64;
        }
        // What no task has stays as it is: a share of entries does not count it.
        const bool untouched = lacking == tasks.size() && options_.output.value_or(tensor.dtype) == tensor.dtype;
        if (!computes(tensor.dtype) || untouched) {
            outputs_->push_back({name, tensor.dtype, tensor.shape});
            copied_.push_back({name, output, tensor});
            return;
        }
        aligned.output_dtype =
            options_.output.value_or(is_dequantised(tensor.dtype) ? taskvec::dtype::f32 : tensor.dtype);
        if (!is_storage(aligned.output_dtype)) {
            raise<dtype_mismatch>(error_code::output_dtype,
                message("a merge cannot be stored as ", to_string(aligned.output_dtype), ": choose ", storage_names()));
        }
        outputs_->push_back({name, aligned.output_dtype, tensor.shape});
        elements_ += size;
        any_wide_ = any_wide_ || aligned.wide;
        tensors_.push_back(std::move(aligned));
    }

    void check_same(const std::string& name, const const_tensor_ref& tensor, const const_tensor_ref& mine,
        std::size_t t, const bytes_equal& equal) const
    {
        if (mine.shape != tensor.shape) {
            raise<shape_mismatch>(error_code::tensor_shape,
                message("tensor '", name, "' has shape ", to_string(mine.shape), " in ", label(t), " but ",
                    to_string(tensor.shape), " in ", reference_label(),
                    ": use models of one architecture, or exclude the tensor"));
        }
        const bool floating = computes(tensor.dtype);
        if (computes(mine.dtype) != floating || (!floating && mine.dtype != tensor.dtype)) {
            raise<dtype_mismatch>(error_code::dtype_differs,
                message("tensor '", name, "' has dtype ", to_string(mine.dtype), " in ", label(t), " but ",
                    to_string(tensor.dtype), " in ", reference_label(),
                    ": convert one of them, or exclude the tensor"));
        }
        const std::size_t size = tensor.bytes(name);
        const auto same = [&] {
            return equal ? equal(mine.data, tensor.data, size) : std::memcmp(mine.data, tensor.data, size) == 0;
        };
        if (!floating && size > 0 && !same()) {
            raise<dtype_mismatch>(error_code::not_mergeable,
                message("tensor '", name, "' of dtype ", to_string(tensor.dtype), " differs between ", label(t),
                    " and ", reference_label(), ": only floating tensors can be merged; exclude it to keep the one of ",
                    reference_label()));
        }
    }

    model_options options_;
    memory_space space_;
    std::shared_ptr<std::vector<tensor_spec>> outputs_ =
        std::make_shared<std::vector<tensor_spec>>(); // complete once constructed: copies and parts share it
    std::vector<aligned_tensor> tensors_;
    std::vector<copied_tensor> copied_;
    std::vector<std::size_t> first_chunk_;
    std::vector<std::size_t> filled_;
    std::uint64_t elements_ = 0;
    std::size_t task_count_ = 0;
    bool has_base_ = false, any_wide_ = false, computed_ = false;
};

namespace detail {
/// A model that is one flat view: how the typed functions use the model-wide machinery.
template <class T, memory_space S>
[[nodiscard]] const_model_ref flat_model(view<T, S> values, std::string_view name = "values")
{
    const_model_ref model;
    model.insert(std::string(name), as_tensor(view<const std::remove_const_t<T>, S>(values)));
    return model;
}

/// What every walk over models says of NaN or infinity in an input.
[[noreturn]] TASKVEC_COLD inline void refuse_nonfinite(
    std::string_view tensor, std::string_view where, double found, std::uint64_t index)
{
    raise<nonfinite_error>(error_code::not_finite,
        message("tensor '", tensor, "' of ", where, " holds ", std::isnan(found) ? "NaN" : "infinity", " at index ",
            index, ": repair it, exclude the tensor, or ask for non-finite values to propagate"));
}
} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_ALIGNED_MODELS_HPP

// ---- taskvec/models/row_conversions.hpp
#if !defined(TASKVEC_SINGLE_MODELS_ROW_CONVERSIONS_HPP)
#define TASKVEC_SINGLE_MODELS_ROW_CONVERSIONS_HPP
// How rows of an arithmetic type come from stored elements, and go back: one function for each dtype.
// SPDX-License-Identifier: Apache-2.0


#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// An 8-bit float by its bits.
[[nodiscard]] inline float fp8_value(dtype type, unsigned code) noexcept
{
    return type == dtype::f8_e5m2 ? e5m2_to_f32(static_cast<std::uint8_t>(code))
                                  : e4m3_to_f32(static_cast<std::uint8_t>(code));
}

/// The conversions of one dtype. `from` and `to` are aligned to its elements.
template <arithmetic_element A>
struct row_conversion {
    bits_type<A> (*widen)(const void* from, A* out, std::size_t n) = nullptr; ///< kernels::widen
    bits_type<A> (*subtract)(const void* from, const A* base, A* out, std::size_t n) = nullptr; ///< kernels::subtract
    void (*narrow)(const A* from, void* to, std::size_t n) = nullptr; ///< kernels::narrow
};

template <arithmetic_element A, storage_element T>
[[nodiscard]] constexpr row_conversion<A> conversion_of() noexcept
{
    return {[](const void* from, A* out, std::size_t n) { return kernels::widen(static_cast<const T*>(from), out, n); },
        [](const void* from, const A* base, A* out, std::size_t n) {
            return kernels::subtract(static_cast<const T*>(from), base, out, n);
        },
        [](const A* from, void* to, std::size_t n) { kernels::narrow(from, static_cast<T*>(to), n); }};
}

/// 8-bit floats are read, as f32, and not written.
template <arithmetic_element A, dtype type>
[[nodiscard]] constexpr row_conversion<A> fp8_conversion() noexcept
{
    return {[](const void* from, A* out, std::size_t n) {
                for (std::size_t i = 0; i < n; ++i) {
                    out[i] = static_cast<A>(fp8_value(type, static_cast<const unsigned char*>(from)[i]));
                }
                return kernels::largest_magnitude(out, n);
            },
        [](const void* from, const A* base, A* out, std::size_t n) {
            for (std::size_t i = 0; i < n; ++i) {
                out[i] = static_cast<A>(fp8_value(type, static_cast<const unsigned char*>(from)[i])) - base[i];
            }
            return kernels::largest_magnitude(out, n);
        },
        nullptr};
}

/// The conversions between rows of A and every dtype that may be met.
template <arithmetic_element A>
class row_conversions {
public:
    template <storage_element... T>
    constexpr explicit row_conversions(storage_list<T...>) noexcept
    {
        table_[static_cast<std::size_t>(dtype::f8_e4m3)] = fp8_conversion<A, dtype::f8_e4m3>();
        table_[static_cast<std::size_t>(dtype::f8_e5m2)] = fp8_conversion<A, dtype::f8_e5m2>();
        ((table_[static_cast<std::size_t>(dtype_of<T>)] = conversion_of<A, T>()), ...); // also what is fp8
    }
    /// Those of a dtype; dtype_mismatch for a tensor that nothing can be computed with.
    [[nodiscard]] const row_conversion<A>& of(dtype type, std::string_view tensor, bool written = false) const
    {
        const row_conversion<A>& found = table_[static_cast<std::size_t>(type)];
        if (written ? !found.narrow : !found.widen) { refuse_storage(type, tensor); }
        return found;
    }

private:
    std::array<row_conversion<A>, std::size(dtype_table)> table_{};
};

template <arithmetic_element A, class Types>
inline constexpr row_conversions<A> conversions_between{Types{}};

/// The conversions of both arithmetic types, those that a list of storage types needs.
struct storage_conversions {
    const row_conversions<float>* single = nullptr;
    const row_conversions<double>* wide = nullptr;

    template <class... T>
    [[nodiscard]] static constexpr storage_conversions of(storage_list<T...> types) noexcept
    {
        storage_conversions all;
        if constexpr ((std::same_as<arithmetic_type<T>, float> || ...)) {
            all.single = &conversions_between<float, decltype(types)>;
        }
        if constexpr ((std::same_as<arithmetic_type<T>, double> || ...)) {
            all.wide = &conversions_between<double, decltype(types)>;
        }
        return all;
    }
    template <arithmetic_element A>
    [[nodiscard]] const row_conversions<A>& get() const noexcept
    {
        if constexpr (std::same_as<A, double>) { return *wide; }
        else {
            return *single;
        }
    }
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_ROW_CONVERSIONS_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Elements of a block: a row of f32 takes 16 KiB, so a dozen rows stay in the second-level cache.
inline constexpr std::size_t block_size = 4096;

/// The rows of one block: base(), task(t) and delta(t) = task(t) − base() in the arithmetic type A, loaded on demand,
/// and scratch rows. There is one for each worker; open() moves it on.
template <arithmetic_element A>
class row_block {
public:
    /// `scratch_rows`: rows beside those of the models; all of them lie in `memory`.
    row_block(const aligned_models& models, std::size_t scratch_rows, std::pmr::memory_resource* memory,
        const detail::row_conversions<A>& conversions = detail::conversions_between<A, storage_types>)
        : models_(&models)
        , conversions_(&conversions)
        , rows_((models.task_count() + 1 + scratch_rows) * block_size, memory)
        , raw_(block_size, memory)
    { }

    /// Moves to elements [offset, offset + size) of a tensor; size ≤ block_size.
    void open(const aligned_tensor& tensor, std::uint64_t offset, std::size_t size)
    {
        tensor_ = &tensor;
        offset_ = offset;
        size_ = size;
        base_ = nullptr;
        largest_ = 0;
    }

    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    /// The block's first element, in its tensor.
    [[nodiscard]] std::uint64_t offset() const noexcept { return offset_; }
    /// The same in the concatenation of all included tensors.
    [[nodiscard]] std::uint64_t position() const noexcept { return tensor_->position + offset_; }
    /// The tensor that is open.
    [[nodiscard]] const aligned_tensor& tensor() const noexcept { return *tensor_; }
    /// The tensor's place in models().tensors().
    [[nodiscard]] std::size_t tensor_index() const noexcept
    {
        return static_cast<std::size_t>(tensor_ - models_->tensors().data());
    }
    /// The models that it reads.
    [[nodiscard]] const aligned_models& models() const noexcept { return *models_; }
    /// How many tasks there are.
    [[nodiscard]] std::size_t task_count() const noexcept { return models_->task_count(); }

    /// θ0 of this block.
    const A* base()
    {
        if (!base_) { base_ = load(tensor_->base, rows_.data()); }
        return base_;
    }
    /// θt of this block: in place where it is stored as A, otherwise in row(t), which it shares with delta(t).
    const A* task(std::size_t t) { return load(tensor_->tasks[t], row(t)); }
    /// τt of this block (θt itself when there is no base).
    const A* delta(std::size_t t)
    {
        if (!tensor_->base.data) { return task(t); }
        const A* const from = base();
        const auto& task = tensor_->tasks[t];
        const auto& conversion = conversions_->of(task.dtype, tensor_->name);
        ahead(elements(task), width(task), largest_, [&](const std::byte* values, std::size_t at, std::size_t n) {
            return conversion.subtract(values, from + at, row(t) + at, n);
        });
        return row(t);
    }
    /// The stored words of this block, when the base (where there is one) and every task store T at aligned places:
    /// what a kernel reads without a detour through rows. tasks[t] for each task. False otherwise.
    template <storage_element T>
    [[nodiscard]] bool stored(const storage_word<T>*& base, std::pmr::vector<const void*>& tasks) const
    {
        if (tensor_->base.data && !usable<T>(tensor_->base)) { return false; }
        for (const auto& task : tensor_->tasks) {
            if (!usable<T>(task)) { return false; }
        }
        base = tensor_->base.data ? place<T>(tensor_->base) : nullptr;
        tasks.resize(task_count());
        for (std::size_t t = 0; t < task_count(); ++t) { tasks[t] = place<T>(tensor_->tasks[t]); }
        return true;
    }
    /// The same for task t alone.
    template <storage_element T>
    [[nodiscard]] bool stored_task(std::size_t t, const storage_word<T>*& base, const storage_word<T>*& task) const
    {
        if (!usable<T>(tensor_->tasks[t]) || (tensor_->base.data && !usable<T>(tensor_->base))) { return false; }
        base = tensor_->base.data ? place<T>(tensor_->base) : nullptr;
        task = place<T>(tensor_->tasks[t]);
        return true;
    }
    /// Tells check_finite() the largest magnitude bits that a fused kernel met: of its inputs, or of a result that NaN
    /// and infinity in an input cannot but reach.
    void note(bits_type<A> magnitude) noexcept { largest_ = std::max(largest_, magnitude); }
    /// The largest magnitude bits that were met since open().
    [[nodiscard]] bits_type<A> largest() const noexcept { return largest_; }

    /// The same elements of an operand that lies beside the models, as a method's statistics do: in place or in `out`,
    /// a row of its own. `largest` receives their largest magnitude bits: whoever reads them reports NaN and infinity.
    const A* beside(const aligned_tensor::operand& from, A* out, bits_type<A>& largest)
    {
        return load(from, out, largest);
    }
    /// Row of task t. Rows of tasks and scratch rows are consecutive, block_size apart.
    [[nodiscard]] A* row(std::size_t t) noexcept { return rows_.data() + (1 + t) * block_size; }
    /// Scratch row i.
    [[nodiscard]] A* scratch(std::size_t i) noexcept { return row(task_count() + i); }

    /// Throws nonfinite_error if an input of this block that was loaded holds NaN or infinity (unless propagation was
    /// asked for). A difference of finite values that overflows is not an input.
    void check_finite()
    {
        if (largest_ < exponent_mask<A> || models_->options().on_nonfinite == nonfinite::propagate) { return; }
        for (std::size_t i = 0; i < size_; ++i) {
            if (tensor_->base.data) { check(tensor_->base, i, models_->options().base_label); }
            for (std::size_t t = 0; t < task_count(); ++t) { check(tensor_->tasks[t], i, models_->label(t)); }
        }
    }

private:
    template <storage_element T>
    [[nodiscard]] static bool usable(const aligned_tensor::operand& from) noexcept
    {
        return !from.source
            && from.dtype == dtype_of<T> && reinterpret_cast<std::uintptr_t>(from.data) % alignof(T) == 0;
    }
    template <storage_element T>
    [[nodiscard]] const storage_word<T>* place(const aligned_tensor::operand& from) const noexcept
    {
        return reinterpret_cast<const storage_word<T>*>(from.data) + offset_;
    }
    [[nodiscard]] std::byte* raw() noexcept { return reinterpret_cast<std::byte*>(raw_.data()); }

    const A* load(const aligned_tensor::operand& from, A* out)
    {
        bits_type<A> largest = 0;
        const A* const values = load(from, out, largest);
        note(largest);
        return values;
    }
    const A* load(const aligned_tensor::operand& from, A* out, bits_type<A>& largest)
    {
        const std::byte* const stored = elements(from);
        const bool in_place = from.dtype == dtype_of<A> && stored != raw();
        const auto& conversion = conversions_->of(from.dtype, tensor_->name);
        ahead(stored, width(from), largest, [&](const std::byte* values, std::size_t at, std::size_t n) {
            return in_place ? kernels::largest_magnitude(reinterpret_cast<const A*>(values), n)
                            : conversion.widen(values, out + at, n);
        });
        return in_place ? reinterpret_cast<const A*>(stored) : out;
    }
    [[nodiscard]] static std::size_t width(const aligned_tensor::operand& from) noexcept
    {
        return bits_per_element(from.dtype) / 8;
    }
    /// The elements of this block of an operand, put into raw() where they are not aligned or worked out.
    [[nodiscard]] const std::byte* elements(const aligned_tensor::operand& from)
    {
        if (from.source) {
            from.source->read(offset_, size_, raw());
            return raw();
        }
        const std::byte* const place = from.data + offset_ * width(from);
        if (reinterpret_cast<std::uintptr_t>(place) % width(from) == 0) { return place; }
        std::memcpy(raw(), place, size_ * width(from));
        return raw();
    }

    /// Runs a kernel over the row in pieces, and before each fetches the same piece of the next block: with a dozen
    /// streams of 8 KiB each the hardware prefetchers start anew all the time.
    template <class Kernel>
    void ahead(const std::byte* values, std::size_t width, bits_type<A>& largest, const Kernel& kernel)
    {
        constexpr std::size_t piece = 512;
        for (std::size_t at = 0; at < size_; at += piece) {
            const std::byte* const here = values + at * width;
            const auto next = reinterpret_cast<std::uintptr_t>(here + block_size * width);
            for (std::size_t line = 0; line < piece * width; line += 64) {
                TASKVEC_PREFETCH(reinterpret_cast<const void*>(next + line), 2);
            }
            largest = std::max(largest, kernel(here, at, std::min(piece, size_ - at)));
        }
    }

    void check(const aligned_tensor::operand& from, std::size_t i, const std::string& where);

    const aligned_models* models_;
    const detail::row_conversions<A>* conversions_;
    std::pmr::vector<A> rows_;
    std::pmr::vector<double> raw_;
    const aligned_tensor* tensor_ = nullptr;
    std::uint64_t offset_ = 0;
    std::size_t size_ = 0;
    const A* base_ = nullptr;
    bits_type<A> largest_ = 0;
};

namespace detail {

/// Calls use(values) with the elements [offset, offset + size) of an operand as a typed pointer. Misaligned elements,
/// fp8 and what is worked out go through `raw` (room for block_size doubles).
template <class Use>
decltype(auto) with_elements(
    const aligned_tensor::operand& from, std::uint64_t offset, std::size_t size, std::byte* raw, Use&& use)
{
    if (from.source) {
        from.source->read(offset, size, raw);
        if (from.dtype == dtype::f64) { return use(reinterpret_cast<const double*>(raw)); }
        return use(reinterpret_cast<const float*>(raw));
    }
    if (is_dequantised(from.dtype)) {
        const auto* codes = reinterpret_cast<const unsigned char*>(from.data) + offset;
        auto* const values = reinterpret_cast<float*>(raw);
        for (std::size_t i = 0; i < size; ++i) { values[i] = fp8_value(from.dtype, codes[i]); }
        return use(static_cast<const float*>(values));
    }
    return visit_storage(from.dtype, "operand", [&]<class T>(std::type_identity<T>) -> decltype(auto) {
        const std::byte* place = from.data + offset * sizeof(T);
        if (reinterpret_cast<std::uintptr_t>(place) % alignof(T) != 0) {
            std::memcpy(raw, place, size * sizeof(T));
            place = raw;
        }
        return use(reinterpret_cast<const T*>(place));
    });
}

} // namespace detail

template <arithmetic_element A>
void row_block<A>::check(const aligned_tensor::operand& from, std::size_t i, const std::string& where)
{
    const double found = detail::with_elements(
        from, offset_ + i, 1, raw(), [](const auto* value) { return static_cast<double>(widen<double>(*value)); });
    if (!std::isfinite(found)) { detail::refuse_nonfinite(tensor_->name, where, found, offset_ + i); }
}

/// The blocks of one worker: in f32 and, where a tensor needs it, in f64.
class block_workspace {
public:
    /// `conversions`: of the storage types that the models may store, all of them where nothing else is known.
    block_workspace(const aligned_models& models, std::size_t scratch_rows, std::pmr::memory_resource* memory,
        detail::storage_conversions conversions)
        : models_(&models)
        , scratch_rows_(scratch_rows)
        , memory_(memory)
        , conversions_(conversions)
    { }
    /// The block in A, made when it is first asked for.
    template <arithmetic_element A>
    row_block<A>& get()
    {
        std::optional<row_block<A>>* slot;
        if constexpr (std::same_as<A, double>) { slot = &wide_; }
        else {
            slot = &single_;
        }
        if (!*slot) { slot->emplace(*models_, scratch_rows_, memory_, conversions_.get<A>()); }
        return **slot;
    }
    /// Calls use(block) with the block type that the tensor's arithmetic asks for.
    template <class Use>
    decltype(auto) with_block(const aligned_tensor& tensor, Use&& use)
    {
        return tensor.wide ? use(get<double>()) : use(get<float>());
    }

private:
    const aligned_models* models_;
    std::size_t scratch_rows_;
    std::pmr::memory_resource* memory_;
    detail::storage_conversions conversions_;
    std::optional<row_block<float>> single_;
    std::optional<row_block<double>> wide_;
};

namespace detail {

/// Whether some type of a list computes in A.
template <arithmetic_element A, class... T>
consteval bool computes_in(storage_list<T...>)
{
    return (std::same_as<arithmetic_type<T>, A> || ...);
}

/// block_workspace::with_block() for tensors that store the types of a list.
template <class Types, class Use>
decltype(auto) with_block_of(block_workspace& space, const aligned_tensor& tensor, Use&& use)
{
    if constexpr (!computes_in<double>(Types{})) { return use(space.get<float>()); }
    else if constexpr (!computes_in<float>(Types{})) {
        return use(space.get<double>());
    }
    else {
        return space.with_block(tensor, use);
    }
}

} // namespace detail

/// A range of chunks, by index.
struct chunk_range {
    std::size_t first = 0, last = 0; ///< indices in aligned_models::chunks()
};
/// The chunks of all tensors.
[[nodiscard]] inline chunk_range all_chunks(const aligned_models& models) noexcept
{
    return {0, models.chunks().size()};
}
/// The chunks of one tensor.
[[nodiscard]] inline chunk_range chunks_of(const aligned_models& models, std::size_t tensor) noexcept
{
    return {models.first_chunk(tensor), models.first_chunk(tensor + 1)};
}
/// Bytes that one walk over a range of chunks reads.
[[nodiscard]] inline std::uint64_t bytes_of(const aligned_models& models, chunk_range range) noexcept
{
    std::uint64_t total = 0;
    for (std::size_t c = range.first; c < range.last; ++c) { total += models.bytes(models.chunks()[c]); }
    return total;
}

/// One workspace for each worker that a walk over `count` chunks may use, for models that store the types of a
/// storage_list.
template <class Types = storage_types>
[[nodiscard]] std::pmr::vector<block_workspace> make_workspaces(
    const cpu& policy, const aligned_models& models, std::size_t count, std::size_t scratch_rows)
{
    std::pmr::vector<block_workspace> workspaces(memory_of(policy));
    const std::size_t workers = worker_count(policy, count);
    workspaces.reserve(workers);
    for (std::size_t w = 0; w < workers; ++w) {
        workspaces.emplace_back(models, scratch_rows, memory_of(policy), detail::storage_conversions::of(Types{}));
    }
    return workspaces;
}

/// Opens each block of a chunk in turn, calls body(block), and reports non-finite inputs after it.
template <arithmetic_element A, class Body>
void for_each_block_of(row_block<A>& rows, const tensor_chunk& piece, Body&& body)
{
    const aligned_tensor& tensor = rows.models().tensors()[piece.tensor];
    for (std::size_t at = 0; at < piece.size; at += block_size) {
        rows.open(tensor, piece.offset + at, std::min(block_size, piece.size - at));
        body(rows);
        rows.check_finite();
    }
}

/// Calls body(chunk index, worker, block) for every block of a range of chunks: chunks in parallel, the blocks of a
/// chunk in ascending order. `block` is a row_block<float>& or a row_block<double>&, `worker` as in for_each_index. No
/// code is made for storage types that `Types` does not list.
template <class Types = storage_types, class Body>
void for_each_block(const cpu& policy, const aligned_models& models, chunk_range range, std::size_t scratch_rows,
    std::string_view phase, Body&& body)
{
    const std::size_t count = range.last - range.first;
    auto workspaces = make_workspaces<Types>(policy, models, count, scratch_rows);
    detail::progress_meter meter(policy, phase, bytes_of(models, range));
    for_each_index(policy, count, [&](std::size_t index, std::size_t worker) {
        const tensor_chunk& piece = models.chunks()[range.first + index];
        detail::with_block_of<Types>(workspaces[worker], models.tensors()[piece.tensor], [&](auto& rows) {
            for_each_block_of(rows, piece, [&](auto& opened) { body(range.first + index, worker, opened); });
        });
        if (!meter.advance(models.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
    });
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_BLOCK_HPP

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How an update belongs to its weight.
struct update_place {
    bool transposed = false; ///< the weight is in×out: a Conv1D layer, or an embedding (entries×dimensions)
    bool row_blocks = false; ///< the slices are equal blocks of the rows of one matrix (a fused projection), out×in
    /// DoRA's magnitudes, one for each output: the weight becomes m·(θ0 + ΔW)/‖θ0 + ΔW‖, norms over each output's
    /// inputs. Empty: none.
    std::vector<double> magnitude{};
    /// Of a tensor that is several matrices, one behind the other (experts): which one, and how many there are.
    /// 0 of them: the tensor is one matrix.
    std::size_t slice = 0, slices = 0;
};

/// One thing that is added to a tensor. It refers to the update, or the stored tensor, which outlive it.
struct weight_change {
    const lora_update<float>* single = nullptr; ///< the update, in f32
    const lora_update<double>* wide = nullptr; ///< or in f64; both null: `saved` takes the tensor's place
    const_tensor_ref saved{}; ///< a whole tensor in place of the base's, where there is no update
    double weight = 1; ///< of the change: θ0 + weight·(θ − θ0)
    update_place place{}; ///< how the update lies in the tensor
    std::string label{}; ///< names the adapter in messages

    /// Whether it is a low-rank update; out() to b() are its own, and are asked of nothing else.
    [[nodiscard]] bool is_update() const noexcept { return single || wide; }
    /// Outputs of the module.
    [[nodiscard]] std::size_t out() const noexcept { return single ? single->out() : wide->out(); }
    /// Inputs of the module.
    [[nodiscard]] std::size_t in() const noexcept { return single ? single->in() : wide->in(); }
    /// The rank of its factors.
    [[nodiscard]] std::size_t rank() const noexcept { return single ? single->rank() : wide->rank(); }
    /// The factor of b·a.
    [[nodiscard]] double scaling() const noexcept { return single ? single->scaling : wide->scaling; }
    /// Entry (k, i) of lora_A, in f64.
    [[nodiscard]] double a(std::size_t k, std::size_t i) const noexcept
    {
        return single ? static_cast<double>(single->a(k, i)) : wide->a(k, i);
    }
    /// Entry (i, k) of lora_B, in f64.
    [[nodiscard]] double b(std::size_t i, std::size_t k) const noexcept
    {
        return single ? static_cast<double>(single->b(i, k)) : wide->b(i, k);
    }
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Entries of A in a panel: a cache line.
template <arithmetic_element A>
inline constexpr std::size_t panel_width = 64 / sizeof(A);

/// out += left·right for rows of `out`. `right` lies in panels of panel_width columns, [panel][rank][column]. Each
/// entry is out + (0 + l0·r0 + l1·r1 + …), every product and sum rounded by itself, in that order: the same bits for
/// any packs and any range.
template <arithmetic_element A>
struct low_rank_rows {
    const A* left; ///< rows×rank
    const A* panels;
    std::size_t rank, rows, first, count; ///< columns [first, first + count)
    A* out;
    std::size_t stride; ///< of out

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        constexpr std::size_t width = panel_width<A>;
        constexpr int tall = bytes == 64 ? 8 : 4;
        std::size_t j = 0;
        for (; j < count && (first + j) % width != 0; ++j) { column(j); }
        for (; j + width <= count; j += width) {
            const A* const panel = panels + (first + j) * rank; // whole panels lie before it
            std::size_t i = 0;
            for (; i + tall <= rows; i += tall) { tile<bytes, tall>(panel, i, j); }
            for (; i < rows; ++i) { tile<bytes, 1>(panel, i, j); }
        }
        for (; j < count; ++j) { column(j); }
    }

private:
    TASKVEC_INLINE void column(std::size_t j) const
    {
        constexpr std::size_t width = panel_width<A>;
        const std::size_t at = first + j;
        const A* const panel = panels + (at / width) * width * rank + at % width;
        for (std::size_t i = 0; i < rows; ++i) {
            TASKVEC_STRICT_FP
            A sum = 0;
            for (std::size_t k = 0; k < rank; ++k) {
                const A product = left[i * rank + k] * panel[k * width];
                sum = sum + product;
            }
            out[i * stride + j] = out[i * stride + j] + sum;
        }
    }
    template <int bytes, int tall>
    TASKVEC_INLINE void tile(const A* panel, std::size_t i, std::size_t j) const
    {
        constexpr std::size_t width = panel_width<A>, lanes = static_cast<std::size_t>(pack_lanes<A, bytes>);
        constexpr int across = static_cast<int>(width / lanes);
        if constexpr (across > 4) { // baseline packs: half a panel at a time leaves registers for the sums
            for (std::size_t c = 0; c < width; c += 2 * lanes) { sums<bytes, tall, 2>(panel + c, i, j + c); }
        }
        else {
            sums<bytes, tall, across>(panel, i, j);
        }
    }
    template <int bytes, int tall, int across>
    TASKVEC_INLINE void sums(const A* panel, std::size_t i, std::size_t j) const
    {
        constexpr std::size_t width = panel_width<A>, lanes = static_cast<std::size_t>(pack_lanes<A, bytes>);
        pack<A, bytes> sum[tall][across]{};
        const A* const l = left + i * rank;
        for (std::size_t k = 0; k < rank; ++k) {
            pack<A, bytes> r[across];
            TASKVEC_UNROLL(4)
            for (int c = 0; c < across; ++c) {
                r[c] = load_row<A, bytes, A>(words(panel + k * width + static_cast<std::size_t>(c) * lanes));
            }
            TASKVEC_UNROLL(8)
            for (int t = 0; t < tall; ++t) {
                const A factor = l[static_cast<std::size_t>(t) * rank + k];
                TASKVEC_UNROLL(4)
                for (int c = 0; c < across; ++c) { sum[t][c] = sum[t][c] + factor * r[c]; }
            }
        }
        TASKVEC_UNROLL(8)
        for (int t = 0; t < tall; ++t) {
            A* const to = out + (i + static_cast<std::size_t>(t)) * stride + j;
            TASKVEC_UNROLL(4)
            for (int c = 0; c < across; ++c) {
                A* const here = to + static_cast<std::size_t>(c) * lanes;
                store_row<A, A, bytes>(load_row<A, bytes, A>(words(here)) + sum[t][c], words(here));
            }
        }
    }
};

/// sums[i] += x[i]², in f64.
template <arithmetic_element A>
TASKVEC_NOINLINE void add_squares(const A* x, double* sums, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const double square = static_cast<double>(x[i]) * static_cast<double>(x[i]);
        sums[i] = sums[i] + square;
    }
}
/// x·(y − 1) + sum.
TASKVEC_NOINLINE inline double add_gain(double sum, double x, double y)
{
    TASKVEC_STRICT_FP
    const double part = x * (y - 1);
    return sum + part;
}

TASKVEC_KERNELS_END

} // namespace kernels

/// One tensor of a base with changes: c∘θ0 + Σ factors, in A, of any block of its elements. It reads the base where it
/// lies and forms no ΔW.
///
/// With updates ΔWt = st·bt·at and weights wt each entry is θ0 + Σ (wt·st·bt)·at: the factors wt·st·b are rounded to A
/// once, all ranks are summed one after the other in the order of the changes, from 0, and the sum is added to θ0;
/// every product and sum rounds by itself. DoRA's ΔW = g∘(θ0 + s·b·a) − θ0, with g = m/‖θ0 + s·b·a‖ in f64, is put into
/// the factors (wt·gt·st·bt) and into c = 1 + Σ wt·(gt − 1), which is rounded once and scales θ0. Tensors that were
/// saved whole add wt·(θ − θ0) after θ0; a single one of weight 1 takes its place. The same bits for any threads,
/// blocks and instruction sets.
/// Factors laid out for reads lie in ordinary memory: (rows + columns)·rank entries of A.
template <arithmetic_element A>
class adapted_weight final : public operand_source {
public:
    /// `columns`: of the weight as it lies in memory, row-major; convolutions count their kernel as columns. The
    /// changes fit the weight. Keeps to what it is handed.
    adapted_weight(std::string name, const aligned_tensor::operand& base, std::size_t rows, std::size_t columns,
        std::vector<weight_change> changes)
        : name_(std::move(name))
        , base_(base)
        , rows_(rows)
        , columns_(columns)
        , changes_(std::move(changes))
    { }

    [[nodiscard]] taskvec::dtype type() const noexcept override { return dtype_of<A>; }

    /// Lays the factors out for reads, and computes the norms that DoRA needs, which reads the base once. read() does
    /// it by itself, on one thread, when it was not done before.
    void prepare(const cpu& policy) const override
    {
        const std::lock_guard lock(mutex_);
        if (!ready_.load(std::memory_order_relaxed)) { lay_out(policy); }
    }
    /// Gives the memory of prepare() back. Nobody reads meanwhile.
    void release() const override
    {
        const std::lock_guard lock(mutex_);
        packs_.reset();
        ready_.store(false, std::memory_order_release);
    }

    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        if (!ready_.load(std::memory_order_acquire)) { prepare(cpu{.threads = 1}); }
        A* const values = static_cast<A*>(out);
        begin(offset, count, values);
        if (rank_ == 0) { return; }
        std::size_t row = static_cast<std::size_t>(offset / columns_),
                    column = static_cast<std::size_t>(offset % columns_);
        for (std::size_t at = 0; at < count;) {
            const std::size_t whole = column == 0 ? (count - at) / columns_ : 0;
            const std::size_t rows = std::max<std::size_t>(whole, 1);
            const std::size_t length = whole > 0 ? columns_ : std::min(columns_ - column, count - at);
            kernels::run_widest(kernels::low_rank_rows<A>{packs_->left.data() + row * rank_, packs_->right.data(),
                rank_, rows, column, length, values + at, columns_});
            at += rows * length;
            row += rows;
            column = 0;
        }
    }

private:
    /// Elements of an operand in A.
    static void widen_to(const aligned_tensor::operand& from, std::uint64_t offset, std::size_t count, A* out)
    {
        constexpr std::size_t piece = 512;
        std::array<double, piece> raw;
        for (std::size_t at = 0; at < count; at += piece) {
            const std::size_t n = std::min(piece, count - at);
            detail::with_elements(
                from, offset + at, n, reinterpret_cast<std::byte*>(raw.data()), [&]<class T>(const T* stored) {
                    for (std::size_t i = 0; std::same_as<T, double> && std::same_as<A, float> && i < n; ++i) {
                        out[at + i] = static_cast<A>(widen<double>(stored[i]));
                    }
                    if constexpr (!(std::same_as<T, double> && std::same_as<A, float>)) {
                        (void)kernels::widen(stored, out + at, n);
                    }
                });
        }
    }
    [[nodiscard]] static aligned_tensor::operand operand_of(const const_tensor_ref& tensor)
    {
        return {static_cast<const std::byte*>(tensor.data), tensor.dtype};
    }

    /// What the low-rank sum is added to.
    void begin(std::uint64_t offset, std::size_t count, A* out) const
    {
        const bool replaced = wholes_ == 1 && only_whole_->weight == 1;
        widen_to(replaced ? operand_of(only_whole_->saved) : base_, offset, count, out);
        if (packs_ && !packs_->scale.empty()) {
            for (std::size_t i = 0; i < count; ++i) {
                const auto place =
                    static_cast<std::size_t>(scale_by_column_ ? (offset + i) % columns_ : (offset + i) / columns_);
                out[i] = packs_->scale[place] * out[i];
            }
        }
        if (wholes_ == 0 || replaced) { return; }
        constexpr std::size_t piece = 512;
        std::array<A, piece> before, saved;
        for (std::size_t at = 0; at < count; at += piece) {
            const std::size_t n = std::min(piece, count - at);
            widen_to(base_, offset + at, n, before.data());
            for (const auto& change : changes_) {
                if (change.is_update()) { continue; }
                widen_to(operand_of(change.saved), offset + at, n, saved.data());
                (void)kernels::subtract(saved.data(), before.data(), saved.data(), n);
                kernels::accumulate(out + at, saved.data(), static_cast<A>(change.weight), n);
            }
        }
    }
    void lay_out(const cpu& policy) const
    {
        rank_ = wholes_ = 0;
        packs_.reset();
        bool rescaled = false;
        for (const auto& change : changes_) {
            if (!change.is_update()) {
                ++wholes_;
                only_whole_ = &change;
                continue;
            }
            rank_ += change.rank();
            if (!change.place.magnitude.empty()) {
                rescaled = true;
                scale_by_column_ = change.place.transposed;
            }
        }
        if (rank_ == 0) {
            ready_.store(true, std::memory_order_release);
            return;
        }
        std::pmr::memory_resource* const memory = memory_of(policy);
        std::pmr::vector<double> scale(rescaled ? (scale_by_column_ ? columns_ : rows_) : 0, 1.0, memory);
        constexpr std::size_t width = kernels::panel_width<A>;
        const std::size_t panels = (columns_ + width - 1) / width;
        packs laid(memory);
        laid.left.resize(rows_ * rank_);
        laid.right.resize(panels * width * rank_);
        std::size_t first = 0;
        for (const auto& change : changes_) {
            if (!change.is_update()) { continue; }
            std::pmr::vector<double> gain(memory);
            if (!change.place.magnitude.empty()) {
                gain = norms(policy, change);
                for (std::size_t i = 0; i < gain.size(); ++i) {
                    gain[i] = change.place.magnitude[i] / gain[i];
                    scale[i] = kernels::add_gain(scale[i], change.weight, gain[i]);
                }
            }
            const double factor = change.weight * change.scaling();
            const bool turned = change.place.transposed;
            const auto strength = [&](std::size_t output) { return gain.empty() ? factor : factor * gain[output]; };
            // The scaling goes into b, wherever b lies.
            for_each_index(policy, rows_, [&](std::size_t i, std::size_t) {
                A* const to = laid.left.data() + i * rank_ + first;
                for (std::size_t k = 0; k < change.rank(); ++k) {
                    to[k] = static_cast<A>(turned ? change.a(k, i) : change.b(i, k) * strength(i));
                }
            });
            for_each_index(policy, panels, [&](std::size_t p, std::size_t) {
                for (std::size_t k = 0; k < change.rank(); ++k) {
                    A* const to = laid.right.data() + (p * rank_ + first + k) * width;
                    for (std::size_t c = 0; c < std::min(width, columns_ - p * width); ++c) {
                        const std::size_t j = p * width + c;
                        to[c] = static_cast<A>(turned ? change.b(j, k) * strength(j) : change.a(k, j));
                    }
                }
            });
            first += change.rank();
        }
        laid.scale.assign(scale.begin(), scale.end());
        packs_.emplace(std::move(laid));
        ready_.store(true, std::memory_order_release);
    }

    /// ‖θ0 + s·b·a‖ of each output, in f64, in a fixed shape.
    [[nodiscard]] std::pmr::vector<double> norms(const cpu& policy, const weight_change& change) const
    {
        weight_change plain = change;
        plain.weight = 1;
        plain.place.magnitude.clear();
        const adapted_weight sum(name_, base_, rows_, columns_, {plain});
        sum.prepare(policy);
        const bool by_column = change.place.transposed;
        std::pmr::vector<double> squares(by_column ? columns_ : rows_, 0.0, memory_of(policy));
        if (!by_column) {
            for_each_index(policy, rows_, [&](std::size_t i, std::size_t) {
                std::pmr::vector<A> row(columns_, memory_of(policy));
                sum.read(std::uint64_t{i} * columns_, columns_, row.data());
                squares[i] = kernels::dot(row.data(), row.data(), columns_);
            });
        }
        else {
            constexpr std::size_t piece = 512;
            for_each_index(policy, (columns_ + piece - 1) / piece, [&](std::size_t index, std::size_t) {
                std::array<A, piece> row;
                const std::size_t from = index * piece, n = std::min(piece, columns_ - from);
                for (std::size_t i = 0; i < rows_; ++i) {
                    sum.read(std::uint64_t{i} * columns_ + from, n, row.data());
                    kernels::add_squares(row.data(), squares.data() + from, n);
                }
            });
        }
        for (std::size_t i = 0; i < squares.size(); ++i) {
            squares[i] = std::sqrt(squares[i]);
            if (squares[i] > 0 && std::isfinite(squares[i])) { continue; }
            raise<nonfinite_error>(error_code::not_finite,
                message("tensor '", name_, "' with the update of ", change.label, " has the norm ", squares[i],
                    " for output ", i,
                    ", by which DoRA divides: this adapter belongs to another base, or one of them is "
                    "damaged"));
        }
        return squares;
    }

    std::string name_;
    aligned_tensor::operand base_;
    std::size_t rows_, columns_;
    std::vector<weight_change> changes_;
    mutable std::mutex mutex_;
    mutable std::atomic<bool> ready_{false};
    /// The factors of all updates side by side, b with the scaling, a in panels; and what DoRA scales the base by.
    struct packs {
        explicit packs(std::pmr::memory_resource* memory)
            : left(memory)
            , right(memory)
            , scale(memory)
        { }
        std::pmr::vector<A> left, right, scale;
    };
    mutable std::optional<packs> packs_;
    mutable std::size_t rank_ = 0, wholes_ = 0;
    mutable const weight_change* only_whole_ = nullptr;
    mutable bool scale_by_column_ = false;
};

namespace detail {

/// What another source gives from some element on.
class source_from final : public operand_source {
public:
    source_from(const operand_source& whole, std::uint64_t first)
        : whole_(&whole)
        , first_(first)
    { }
    [[nodiscard]] taskvec::dtype type() const noexcept override { return whole_->type(); }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return whole_->stored_bits(); }
    void prepare(const cpu& policy) const override { whole_->prepare(policy); }
    void release() const override { whole_->release(); }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        whole_->read(first_ + offset, count, out);
    }

private:
    const operand_source* whole_;
    std::uint64_t first_;
};

} // namespace detail

/// A tensor that is several matrices, one behind the other (experts, fused projections), each with changes of its own:
/// the entries of adapted_weight, matrix by matrix.
template <arithmetic_element A>
class adapted_stack final : public operand_source {
public:
    /// `rows`×`columns`: of each of `slices` matrices as they lie in memory. Updates say which one they are of; a
    /// tensor that was saved whole is of all.
    adapted_stack(const std::string& name, const aligned_tensor::operand& base, std::size_t slices, std::size_t rows,
        std::size_t columns, const std::vector<weight_change>& changes)
        : entries_(rows * columns)
    {
        for (std::size_t i = 0; i < slices; ++i) {
            const std::size_t first = i * entries_;
            aligned_tensor::operand from = base;
            if (base.source) {
                parts_.push_back(std::make_unique<detail::source_from>(*base.source, first));
                from.source = parts_.back().get();
            }
            else {
                from.data += byte_count(base.dtype, first);
            }
            std::vector<weight_change> own;
            for (const auto& change : changes) {
                if (change.is_update() && change.place.slice != i) { continue; }
                own.push_back(change);
                auto& saved = own.back().saved;
                if (change.is_update()) { continue; }
                saved.data = static_cast<const std::byte*>(saved.data) + byte_count(saved.dtype, first);
                saved.shape = {static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns)};
            }
            matrices_.push_back(std::make_unique<adapted_weight<A>>(name, from, rows, columns, std::move(own)));
        }
    }

    [[nodiscard]] taskvec::dtype type() const noexcept override { return dtype_of<A>; }
    void prepare(const cpu& policy) const override
    {
        for (const auto& one : matrices_) { one->prepare(policy); }
    }
    void release() const override
    {
        for (const auto& one : matrices_) { one->release(); }
    }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        A* to = static_cast<A*>(out);
        while (count > 0) {
            const std::uint64_t within = offset % entries_;
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(count, entries_ - within));
            matrices_[static_cast<std::size_t>(offset / entries_)]->read(within, n, to);
            offset += n;
            count -= n;
            to += n;
        }
    }

private:
    std::size_t entries_;
    std::vector<std::unique_ptr<detail::source_from>> parts_;
    std::vector<std::unique_ptr<adapted_weight<A>>> matrices_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_ADAPTED_WEIGHT_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What adapters change of a base: updates, and tensors that were saved whole, by the names of the base's tensors. It
/// refers to the updates. One of these may become a task of aligned models (attach()), which then reads
/// base + Σ weight·ΔW wherever it would read a stored model; or be folded into the base (fuse()).
///
///     adapted_model sum;
///     for (const auto& [module, update] : adapter) { sum.add(base, module + ".weight", update); }
class adapted_model {
public:
    /// Adds weight·ΔW to a tensor of the base: out×in, or in×out where `place` says so; of a convolution
    /// (out×in×kernel…) the update's `in` counts the kernel. A vector takes an update of 1×n. Of a tensor of several
    /// matrices (experts×out×in, experts×in×out, or blocks of rows of one, each out×in) `place` says which one changes.
    /// Throws invalid_argument
    /// for a tensor that the base lacks, dtype_mismatch for one that does not hold floating numbers, shape_mismatch,
    /// nonfinite_error for factors or weights that are not finite.
    template <arithmetic_element T>
    void add(const const_model_ref& base, const std::string& tensor, const lora_update<T>& update, double weight = 1,
        update_place place = {}, std::string_view label = "the adapter")
    {
        weight_change change;
        if constexpr (std::same_as<T, double>) { change.wide = &update; }
        else {
            change.single = &update;
        }
        check_update(update, tensor);
        check_weight(weight, label);
        const const_tensor_ref& to = find(base, tensor, label);
        const bool divides = place.slices == 0
            || (place.row_blocks ? to.shape.size() == 2 && !place.transposed
                        && static_cast<std::size_t>(to.shape[0]) % place.slices == 0
                                 : to.shape.size() == 3 && static_cast<std::size_t>(to.shape[0]) == place.slices);
        if (!divides || place.slice >= std::max<std::size_t>(place.slices, 1)) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("tensor '", tensor, "' has shape ", to_string(to.shape), ", and ", label, " changes ",
                    place.slices, " matrices of it: this adapter belongs to another base"));
        }
        const std::size_t entries = to.size(tensor) / std::max<std::size_t>(place.slices, 1);
        const auto [rows, columns] = place.slices == 0 ? sides(to)
            : place.row_blocks ? sides({to.shape[0] / static_cast<std::int64_t>(place.slices), to.shape[1]}, entries)
                               : sides({to.shape[1], to.shape[2]}, entries);
        const std::size_t out = place.transposed ? columns : rows, in = place.transposed ? rows : columns;
        if (out != update.out() || in != update.in()) {
            const bool turned = rows == update.in() && columns == update.out();
            raise<shape_mismatch>(error_code::adapter_shape,
                message("tensor '", tensor, "' has shape ", to_string(to.shape),
                    place.slices ? message(", one of ", place.slices, " parts is ", rows, "×", columns) : std::string(),
                    ", but its update in ", label, " is ", update.out(), "×", update.in(),
                    place.transposed ? " (transposed)" : "",
                    turned ? ": it fits the other way round (fan_in_fan_out)"
                           : ": this adapter belongs to another base"));
        }
        if (!place.magnitude.empty() && place.magnitude.size() != update.out()) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("tensor '", tensor, "': ", label, " has ", place.magnitude.size(), " magnitudes (DoRA) for ",
                    update.out(), " outputs"));
        }
        check_finite(update.b.data(), update.b.size(), tensor, "lora_B", label);
        check_finite(update.a.data(), update.a.size(), tensor, "lora_A", label);
        check_finite(place.magnitude.data(), place.magnitude.size(), tensor, "the magnitudes", label);
        change.weight = weight;
        change.place = std::move(place);
        change.label = label;
        auto& list = changes_[tensor];
        for (const auto& other : list) {
            if (other.is_update() && other.place.slices != change.place.slices) {
                raise<shape_mismatch>(error_code::adapter_shape,
                    message("tensor '", tensor, "' is one matrix for ", change.place.slices == 0 ? label : other.label,
                        ", and several for ", change.place.slices == 0 ? other.label : std::string(label),
                        ": the two were made for different layers"));
            }
            if (other.is_update() && other.place.transposed != change.place.transposed) {
                raise<shape_mismatch>(error_code::adapter_shape,
                    message("tensor '", tensor, "' is transposed for ", change.place.transposed ? label : other.label,
                        ", and as it is for ", change.place.transposed ? other.label : std::string(label),
                        ": the two were made for different layers"));
            }
        }
        list.push_back(std::move(change));
    }
    template <arithmetic_element T>
    void add(const const_model_ref&, const std::string&, const lora_update<T>&&, double = 1, update_place = {},
        std::string_view = {}) = delete; // name the update first: it is referred to
    /// Adds weight·(saved − base): a tensor that was trained whole. With weight 1, and nothing else for this tensor, it
    /// takes the base's place.
    void replace(const const_model_ref& base, const std::string& tensor, const const_tensor_ref& saved,
        double weight = 1, std::string_view label = "the adapter")
    {
        check_weight(weight, label);
        const const_tensor_ref& to = find(base, tensor, label);
        if (to.shape != saved.shape) {
            raise<shape_mismatch>(error_code::tensor_shape,
                message("tensor '", tensor, "' has shape ", to_string(to.shape), ", and ", label,
                    " saves it whole with shape ", to_string(saved.shape),
                    ": bring the base to that shape first, or leave the tensor out"));
        }
        if (!is_storage(saved.dtype) && !is_fp8(saved.dtype)) { detail::refuse_storage(saved.dtype, tensor); }
        weight_change change;
        change.saved = saved;
        change.weight = weight;
        change.label = label;
        changes_[tensor].push_back(std::move(change));
    }

    /// What was added, by the name of the tensor, each tensor's changes in the order in which they came.
    [[nodiscard]] const std::map<std::string, std::vector<weight_change>>& changes() const noexcept { return changes_; }
    [[nodiscard]] bool empty() const noexcept { return changes_.empty(); }

    /// The sources of the changed tensors, for task `task` of models that were lined up with the base in its place. It
    /// outlives the models. Tensors that take no part in them are left out.
    [[nodiscard]] std::vector<std::unique_ptr<operand_source>> attach(aligned_models& models, std::size_t task) const
    {
        std::vector<std::unique_ptr<operand_source>> sources;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            const auto place = changes_.find(tensor.name);
            if (place == changes_.end()) { continue; }
            sources.push_back(
                source_of(tensor.name, tensor.tasks[task], sides(tensor.shape, tensor.size), place->second));
            models.compute(task, i, *sources.back());
        }
        return sources;
    }
    /// Makes `model`, the base's tensors, have the changed ones: each names a source that works it out as F32 (F64
    /// where the base or a change is F64) whenever it is read. The sources outlive the model's readers. For algorithms
    /// that read models tensor by tensor, as extract_lora() does.
    [[nodiscard]] std::vector<std::unique_ptr<operand_source>> put_into(const_model_ref& model) const
    {
        std::vector<std::unique_ptr<operand_source>> sources;
        const_model_ref changed;
        for (const auto& [name, tensor] : model) {
            const auto place = changes_.find(name);
            if (place == changes_.end()) {
                changed.insert(name, const_tensor_ref(tensor));
                continue;
            }
            sources.push_back(source_of(name, {static_cast<const std::byte*>(tensor.data), tensor.dtype, tensor.source},
                sides(tensor), place->second));
            changed.insert(
                name, {nullptr, sources.back()->type(), tensor.shape, {}, memory_space::host, 0, sources.back().get()});
        }
        model = std::move(changed);
        return sources;
    }

    /// Rows and columns of a weight: the first extent, and all others together; a vector is one row.
    [[nodiscard]] static std::pair<std::size_t, std::size_t> sides(const extents& shape, std::size_t size)
    {
        const std::size_t rows = shape.size() < 2 ? 1 : static_cast<std::size_t>(shape[0]);
        return {rows, rows == 0 ? 0 : size / rows};
    }

private:
    [[nodiscard]] static std::pair<std::size_t, std::size_t> sides(const const_tensor_ref& tensor)
    {
        return sides(tensor.shape, tensor.size());
    }
    [[nodiscard]] static std::unique_ptr<operand_source> source_of(const std::string& name,
        const aligned_tensor::operand& from, std::pair<std::size_t, std::size_t> size,
        const std::vector<weight_change>& list)
    {
        const bool wide = from.dtype == dtype::f64 || std::any_of(list.begin(), list.end(), [](const auto& change) {
            return change.wide || (!change.is_update() && change.saved.dtype == dtype::f64);
        });
        const auto stack =
            std::find_if(list.begin(), list.end(), [](const weight_change& change) { return change.place.slices > 0; });
        if (stack != list.end()) { // each matrix is as large as its updates
            const bool turned = stack->place.transposed;
            const std::size_t rows = turned ? stack->in() : stack->out(), columns = turned ? stack->out() : stack->in();
            if (wide) {
                return std::make_unique<adapted_stack<double>>(name, from, stack->place.slices, rows, columns, list);
            }
            return std::make_unique<adapted_stack<float>>(name, from, stack->place.slices, rows, columns, list);
        }
        if (wide) { return std::make_unique<adapted_weight<double>>(name, from, size.first, size.second, list); }
        return std::make_unique<adapted_weight<float>>(name, from, size.first, size.second, list);
    }
    [[nodiscard]] static const const_tensor_ref& find(
        const const_model_ref& base, const std::string& tensor, std::string_view label)
    {
        const const_tensor_ref* const found = base.find(tensor);
        if (!found) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message(label, " changes the tensor '", tensor,
                    "', which the base does not have: use the base that it was trained on"));
        }
        if (!is_storage(found->dtype) && !is_fp8(found->dtype)) { detail::refuse_storage(found->dtype, tensor); }
        return *found;
    }
    static void check_weight(double weight, std::string_view label)
    {
        if (!std::isfinite(weight)) {
            raise<invalid_argument>(
                error_code::parameter_not_finite, message("the weight of ", label, " is not finite"));
        }
    }
    template <class T>
    static void check_finite(
        const T* values, std::size_t size, std::string_view tensor, std::string_view what, std::string_view label)
    {
        for (std::size_t i = 0; i < size; ++i) {
            if (std::isfinite(values[i])) { continue; }
            raise<nonfinite_error>(error_code::not_finite,
                message("tensor '", tensor, "': ", what, " in ", label, " holds ",
                    std::isnan(values[i]) ? "NaN" : "infinity", " at entry ", i,
                    "; repair the adapter or leave it out"));
        }
    }

    std::map<std::string, std::vector<weight_change>> changes_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_ADAPTED_MODEL_HPP

// ---- taskvec/adapters/fold_adapter.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_FOLD_ADAPTER_HPP)
#define TASKVEC_SINGLE_ADAPTERS_FOLD_ADAPTER_HPP
// Folding linearized adapters into plain LoRA adapters, which any server loads unchanged.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/adapters/initialization.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_INITIALIZATION_HPP)
#define TASKVEC_SINGLE_ADAPTERS_INITIALIZATION_HPP
// The initialisation φ0 = (A0, B0) that an adapter was trained from, and the checks that two of them belong together.
// SPDX-License-Identifier: Apache-2.0


#include <string>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// What messages call an initialisation and the adapter that was trained from it.
struct initialization_labels {
    std::string initial = "the initialisation", adapter = "the adapter"; ///< in the singular
};

/// Throws unless one module's update can have been trained from `initial`: shape_mismatch for another shape or rank (or
/// factors that make no product), invalid_argument for another scaling, nonfinite_error; `name` is the module's.
/// Whether it was, the numbers do not tell.
template <arithmetic_element T>
void check_trained_from(const lora_update<T>& initial, const lora_update<T>& adapter, std::string_view name,
    const initialization_labels& labels = {})
{
    check_update(initial, name);
    check_update(adapter, name);
    if (adapter.out() != initial.out() || adapter.in() != initial.in() || adapter.rank() != initial.rank()) {
        raise<shape_mismatch>(error_code::adapter_shape,
            message("module '", name, "' is ", adapter.out(), "×", adapter.in(), " of rank ", adapter.rank(), " in ",
                labels.adapter, " but ", initial.out(), "×", initial.in(), " of rank ", initial.rank(), " in ",
                labels.initial, ": this is not what the adapter was trained from"));
    }
    if (!same_scaling(adapter.scaling, initial.scaling)) {
        raise<invalid_argument>(error_code::initialization_differs,
            message("module '", name, "' has scaling ", adapter.scaling, " in ", labels.adapter, " but ",
                initial.scaling, " in ", labels.initial, ": this is not what the adapter was trained from"));
    }
}

/// The same for every module of an adapter; also throws invalid_argument where the two do not have the same modules, or
/// none.
template <arithmetic_element T>
void check_trained_from(
    const lora_adapter<T>& initial, const lora_adapter<T>& adapter, const initialization_labels& labels = {})
{
    if (initial.empty()) {
        raise<invalid_argument>(error_code::initialization_differs,
            message(labels.initial,
                " has no modules: linearized adapters fold, and adapters merge "
                "in phi space, only around their initialisation"));
    }
    for (const auto& [name, update] : initial) {
        if (!adapter.contains(name)) {
            raise<invalid_argument>(error_code::initialization_differs,
                message("module '", name, "' of ", labels.initial, " is missing in ", labels.adapter,
                    ": give the initialisation that it was trained from"));
        }
    }
    for (const auto& [name, update] : adapter) {
        const auto start = initial.find(name);
        if (start == initial.end()) {
            raise<invalid_argument>(error_code::initialization_differs,
                message("module '", name, "' of ", labels.adapter, " is not in ", labels.initial,
                    ": give the initialisation that it was trained from"));
        }
        check_trained_from(start->second, update, name, labels);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_INITIALIZATION_HPP

#include <cstddef>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// The plain LoRA update of one module that was fine-tuned per layer linearized: from φ0 = (A0, B0) to φ = (A, B) the
/// weight changes by s·(B0·A0 + B0·ΔA + ΔB·A0) = s·[B, B0]·[A0; A − A0], so b = [B, B0] and a = [A0; A − A0] of rank
/// 2r; where B0 = 0 that is b = B, a = A0 of rank r (A then has no influence). linearized_lora_layer computes with
/// exactly these factors. Throws what check_trained_from() throws. The result's factors are row-major. Exact but for
/// the rounding of A − A0.
///
///     const auto served = fold_linearized(initial.at("layers.0.q_proj"), tuned.at("layers.0.q_proj"));
template <arithmetic_element T>
[[nodiscard]] lora_update<T> fold_linearized(const lora_update<T>& initial, const lora_update<T>& adapter,
    std::string_view name = "adapter", const initialization_labels& labels = {})
{
    check_trained_from(initial, adapter, name, labels);
    const std::size_t out = initial.out(), in = initial.in(), rank = initial.rank();
    bool b0_is_zero = true;
    for (std::size_t i = 0; i < out; ++i) {
        for (std::size_t k = 0; k < rank; ++k) { b0_is_zero = b0_is_zero && initial.b(i, k) == T(0); }
    }
    const std::size_t folded_rank = b0_is_zero ? rank : 2 * rank;
    lora_update<T> folded{matrix<T>(out, folded_rank, matrix_order::row_major),
        matrix<T>(folded_rank, in, matrix_order::row_major), initial.scaling};
    for (std::size_t k = 0; k < rank; ++k) {
        for (std::size_t i = 0; i < out; ++i) { folded.b(i, k) = adapter.b(i, k); }
        for (std::size_t j = 0; j < in; ++j) { folded.a(k, j) = initial.a(k, j); }
        if (b0_is_zero) { continue; }
        for (std::size_t i = 0; i < out; ++i) { folded.b(i, rank + k) = initial.b(i, k); }
        for (std::size_t j = 0; j < in; ++j) { folded.a(rank + k, j) = adapter.a(k, j) - initial.a(k, j); }
    }
    return folded;
}

/// The same for every module of an adapter.
///
///     const auto served = fold_linearized(read_peft("init").updates, read_peft("task").updates);
template <arithmetic_element T>
[[nodiscard]] lora_adapter<T> fold_linearized(
    const lora_adapter<T>& initial, const lora_adapter<T>& adapter, const initialization_labels& labels = {})
{
    check_trained_from(initial, adapter, labels);
    lora_adapter<T> folded;
    for (const auto& [name, update] : adapter) {
        folded.emplace(name, fold_linearized(initial.at(name), update, name, labels));
    }
    return folded;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_FOLD_ADAPTER_HPP

// ---- taskvec/adapters/fuse.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_FUSE_HPP)
#define TASKVEC_SINGLE_ADAPTERS_FUSE_HPP
// Adapters folded into their base: base + Σ w·ΔW, streamed, each weight rounded once.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/byte_buffer.hpp
#if !defined(TASKVEC_SINGLE_CORE_BYTE_BUFFER_HPP)
#define TASKVEC_SINGLE_CORE_BYTE_BUFFER_HPP
// Bytes for elements whose type is known when a program runs.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <memory_resource>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Zeroed bytes of a resource, aligned for elements of any storage type: a vector of bytes asks its resource for no
/// alignment, and one that packs what it gives (std::pmr::monotonic_buffer_resource) then gives none.
class byte_buffer {
public:
    explicit byte_buffer(std::pmr::memory_resource* memory, std::size_t size = 0)
        : units_(units_of(size), memory)
        , size_(size)
    { }

    [[nodiscard]] std::byte* data() noexcept { return reinterpret_cast<std::byte*>(units_.data()); }
    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    void resize(std::size_t size)
    {
        units_.resize(units_of(size));
        size_ = size;
    }

private:
    struct alignas(std::max_align_t) unit {
        std::byte bytes[alignof(std::max_align_t)];
    };
    [[nodiscard]] static std::size_t units_of(std::size_t size) noexcept
    {
        return size / sizeof(unit) + (size % sizeof(unit) == 0 ? 0 : 1);
    }

    std::pmr::vector<unit> units_;
    std::size_t size_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_CORE_BYTE_BUFFER_HPP

// ---- taskvec/core/wrong_call.hpp
#if !defined(TASKVEC_SINGLE_CORE_WRONG_CALL_HPP)
#define TASKVEC_SINGLE_CORE_WRONG_CALL_HPP
// What functions say of calls that are none of theirs: one sentence, that names what is wrong and the mend.
// SPDX-License-Identifier: Apache-2.0
//
// A public function gets its sentences by a line after its overloads, which names the form of a right call:
//
//     TASKVEC_WRONG_CALLS(cpu, difference, any_arguments, "difference(policy, tuned, base, output)")
//
// That declares overloads for calls which none of those above takes, and which are never as good a match as one of
// them, nor as a function of a caller's own that has the same name: whether a call is right is asked of the overloads
// that stand before the line, and what is no policy is taken by a conversion.


#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <ranges>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI::detail {

/// What is wrong with something that should be a flat view in a memory space.
enum class view_flaw : std::uint8_t { none, pointer, elements, space, no_view };

template <class X, memory_space Space>
consteval view_flaw flaw_of()
{
    using bare = std::remove_cvref_t<X>;
    if constexpr (std::is_pointer_v<bare>) { return view_flaw::pointer; }
    else if constexpr (viewable<const bare>) {
        return view_of<const bare>::space == Space ? view_flaw::none : view_flaw::space;
    }
    else if constexpr (requires(bare& x) { *std::data(x), std::size(x); }) {
        using element = std::remove_cvref_t<decltype(*std::data(std::declval<bare&>()))>;
        return storable<element> ? view_flaw::no_view : view_flaw::elements; // such as a matrix
    }
    else {
        return view_flaw::no_view;
    }
}

/// The first flaw of an argument, or of the entries of a list; what is no data at all (options, numbers, text) has
/// none.
template <class X, memory_space Space>
consteval view_flaw argument_flaw()
{
    using bare = std::remove_cvref_t<X>;
    constexpr view_flaw flaw = flaw_of<bare, Space>();
    if constexpr (flaw == view_flaw::pointer) {
        return storable<std::remove_cv_t<std::remove_pointer_t<bare>>> ? flaw : view_flaw::none;
    }
    else if constexpr (flaw == view_flaw::elements && std::ranges::input_range<const bare>) {
        using entry = std::remove_cvref_t<std::ranges::range_reference_t<const bare>>;
        if constexpr (std::is_arithmetic_v<entry>) { return std::same_as<entry, char> ? view_flaw::none : flaw; }
        else {
            constexpr view_flaw of_entry = flaw_of<entry, Space>();
            return of_entry == view_flaw::no_view ? view_flaw::none : of_entry;
        }
    }
    else {
        return flaw == view_flaw::no_view ? view_flaw::none : flaw;
    }
}

/// Not a policy, nor what becomes one.
template <class X>
concept no_policy =
    !policy<X> && !std::convertible_to<const X&, const cpu&> && !std::convertible_to<const X&, const gpu&>;

/// What is wrong with a call.
enum class call_flaw : std::uint8_t {
    policy,
    pointer,
    address,
    elements,
    space,
    constant,
    one_for_list,
    list_for_one,
    order,
    form
};
consteval bool differ(call_flaw found, call_flaw other)
{
    return found != other;
}

/// A vector or a model, which some functions take lists of.
template <class X>
concept list_entry = viewable<const X> || std::convertible_to<const X&, const_model_ref>;

/// A list of one X.
template <class X>
struct list_of_one {
    using type = void;
};
template <list_entry X>
struct list_of_one<X> {
    using type = std::array<std::conditional_t<viewable<const X>, X, const_model_ref>, 1>;
};
/// What a list X is of.
template <class X>
struct one_of_list {
    using type = void;
};
template <class X>
    requires(
        std::ranges::input_range<const X> && list_entry<std::remove_cvref_t<std::ranges::range_reference_t<const X>>>)
struct one_of_list<X> {
    using type = std::remove_cvref_t<std::ranges::range_reference_t<const X>>;
};

/// Whether a call is right where one of its arguments is what Other makes of it. `Before` are those already tried.
template <class Calls, template <class> class Other, class... Before>
struct one_changed {
    template <class One, class... After>
    static consteval bool right()
    {
        if constexpr (std::is_void_v<typename Other<One>::type>) { }
        else if constexpr (Calls::template take<Before&..., typename Other<One>::type&, After&...>) {
            return true;
        }
        if constexpr (sizeof...(After) == 0) { return false; }
        else {
            return one_changed<Calls, Other, Before..., One>::template right<After...>();
        }
    }
};

/// Whether a call is right where two neighbours change places.
template <class Calls, class... Before>
struct neighbours_changed {
    template <class One>
    static consteval bool right()
    {
        return false;
    }
    template <class One, class Next, class... After>
    static consteval bool right()
    {
        if constexpr (Calls::template take<Before&..., Next&, One&, After&...>) { return true; }
        else {
            return neighbours_changed<Calls, Before..., One>::template right<Next, After...>();
        }
    }
};

/// Whether a call is right where its first `Turns` arguments become its last ones, or fewer of them.
template <class Calls, class P, std::size_t Turns, class First, class... Rest>
consteval bool right_turned()
{
    if constexpr (Turns == 0) { return false; }
    else if constexpr (Calls::template take<const P&, Rest&..., First&>) {
        return true;
    }
    else {
        return right_turned<Calls, P, Turns - 1, Rest..., First>();
    }
}

/// Whether a call is right but for the constness, or the short life, of an argument.
template <class Calls, class P, class... Arguments>
inline constexpr bool only_constant = false;
template <class Calls, class P, class... Arguments>
    requires(Calls::template take<const P&, std::remove_cvref_t<Arguments>&...>)
inline constexpr bool only_constant<Calls, P, Arguments...> = !Calls::template take<const P&, Arguments...>;

/// What is wrong with a call of arguments of those types, without references; `Calls` says which are right.
template <class Calls, policy P, class... Arguments>
consteval call_flaw flaw_of_call()
{
    constexpr auto has = [](view_flaw flaw) { return ((argument_flaw<Arguments, P::space>() == flaw) || ...); };
    if constexpr (has(view_flaw::pointer)) { return call_flaw::pointer; }
    else if constexpr (((std::is_pointer_v<Arguments> && std::is_class_v<std::remove_pointer_t<Arguments>>) || ...)) {
        return call_flaw::address;
    }
    else if constexpr (has(view_flaw::elements)) {
        return call_flaw::elements;
    }
    else if constexpr (has(view_flaw::space)) {
        return call_flaw::space;
    }
    else if constexpr (sizeof...(Arguments) == 0) {
        return call_flaw::form;
    }
    else if constexpr (Calls::template take<const P&, Arguments&...>) {
        return call_flaw::constant;
    }
    else if constexpr (one_changed<Calls, list_of_one, const P>::template right<Arguments...>()) {
        return call_flaw::one_for_list;
    }
    else if constexpr (one_changed<Calls, one_of_list, const P>::template right<Arguments...>()) {
        return call_flaw::list_for_one;
    }
    else if constexpr (neighbours_changed<Calls, const P>::template right<Arguments...>()
        || right_turned<Calls, P, sizeof...(Arguments) - 1, Arguments...>()) {
        return call_flaw::order;
    }
    else {
        return call_flaw::form;
    }
}

/// What a call that was refused returns, so that the sentence stays the only error: it becomes anything.
struct no_result {
    template <class T>
    operator T() const; // never called: such a program does not compile
};

/// The first argument of a call of `Calls` that has no policy, and any other argument.
template <class Calls>
struct misplaced_argument {
    template <class X>
        requires(Calls::template lacks_policy<X>)
    misplaced_argument(const X&)
    { }
};
struct any_argument {
    any_argument() = default;
    template <class X>
    any_argument(const X&)
    { }
};

/// Whether a list of arguments begins with a vector, a list of them, a model, or what is nearly a vector.
template <class First = int, class...>
consteval bool first_is_flat()
{
    if constexpr (std::is_arithmetic_v<First>) { return true; }
    else {
        return list_entry<First> || !std::is_void_v<typename one_of_list<First>::type>
            || argument_flaw<First, memory_space::host>() != view_flaw::none;
    }
}

/// Calls of which a line TASKVEC_WRONG_CALLS speaks: all.
template <class... Arguments>
concept any_arguments = true;
/// Those whose first argument after the policy is a flat view, a list of them, a model, a number, or nearly a view; and
/// the others, such as those of sparse entries.
template <class... Arguments>
concept flat_arguments = first_is_flat<Arguments...>();
template <class... Arguments>
concept sparse_arguments = !first_is_flat<Arguments...>();

} // namespace taskvec::inline TASKVEC_ABI::detail

// The sentences of the calls of a function on one policy that `concerns<arguments after the policy…>`; with
// taskvec::cpu also those of calls without a policy. A line stands after the overloads that it speaks of.
// NOLINTBEGIN(bugprone-macro-parentheses)
#if defined(__CUDACC__) // nvcc's front end finds these constraints unsatisfied in the middle of right calls
#define TASKVEC_WRONG_CALLS(policy_type, function, concerns, right_call)
#else
#define TASKVEC_WRONG_CALLS(policy_type, function, concerns, right_call)                                               \
    namespace detail {                                                                                                 \
    struct policy_type##_##function##_of_##concerns {                                                                  \
        template <class P, class... Arguments>                                                                         \
        static constexpr bool take = requires(P&& policy, Arguments&&... x) {                                          \
            requires concerns<std::remove_cvref_t<Arguments>...>;                                                      \
            ::taskvec::function(static_cast<P&&>(policy), static_cast<Arguments&&>(x)...);                             \
        };                                                                                                             \
        template <class First>                                                                                         \
        static constexpr bool lacks_policy = std::same_as<policy_type, cpu> && no_policy<First> && concerns<First>;    \
        template <call_flaw Flaw, class>                                                                               \
        static auto explain()                                                                                          \
        {                                                                                                              \
            static_assert(differ(Flaw, call_flaw::policy),                                                             \
                #function "(): the first argument is no policy: pass taskvec::cpu{}, or taskvec::cpu{.threads = 4} "   \
                          "where threads are counted, in " right_call);                                                \
            static_assert(differ(Flaw, call_flaw::pointer),                                                            \
                #function "(): an argument is a pointer, which does not say how long it is: pass "                     \
                          "taskvec::host_view<const float>(pointer, size), or a device_view on taskvec::gpu");         \
            static_assert(differ(Flaw, call_flaw::address),                                                            \
                #function "(): an argument is the address of an object: pass the object, in " right_call);             \
            static_assert(differ(Flaw, call_flaw::elements),                                                           \
                #function "(): the elements of an argument are of no storage type: expected double, float, "           \
                          "taskvec::bf16 or taskvec::f16");                                                            \
            static_assert(differ(Flaw, call_flaw::space),                                                              \
                #function "(): an argument lies in another memory space than the policy works in: host memory with "   \
                          "taskvec::cpu, device memory with taskvec::gpu");                                            \
            static_assert(differ(Flaw, call_flaw::constant),                                                           \
                #function "(): an output is const, or a temporary that the result would be lost with: pass memory "    \
                          "that can be written, by its name, in " right_call);                                         \
            static_assert(differ(Flaw, call_flaw::one_for_list),                                                       \
                #function "(): one vector or model stands where a list of them is expected, such as std::array "       \
                          "list{taskvec::as_view(x)}, in " right_call);                                                \
            static_assert(differ(Flaw, call_flaw::list_for_one),                                                       \
                #function "(): a list stands where one vector or model is expected, in " right_call);                  \
            static_assert(differ(Flaw, call_flaw::order),                                                              \
                #function "(): the arguments are in another order than those of " right_call);                         \
            static_assert(differ(Flaw, call_flaw::form), #function "(): the arguments are not those of " right_call);  \
            return no_result{};                                                                                        \
        }                                                                                                              \
    };                                                                                                                 \
    }                                                                                                                  \
    template <std::same_as<policy_type> P, class... Arguments>                                                         \
        requires detail::concerns<Arguments...>                                                                        \
        && (!detail::policy_type##_##function##_of_##concerns::template take<const P&, Arguments&...>)                 \
    auto function(const P&, const Arguments&...)                                                                       \
    {                                                                                                                  \
        using calls = detail::policy_type##_##function##_of_##concerns;                                                \
        return calls::template explain<detail::flaw_of_call<calls, P, Arguments...>(), P>();                           \
    }                                                                                                                  \
    template <std::same_as<policy_type> P, class... Arguments>                                                         \
        requires detail::concerns<std::remove_cvref_t<Arguments>...>                                                   \
        && (detail::only_constant<detail::policy_type##_##function##_of_##concerns, P, Arguments...>)                  \
    auto function(const P&, Arguments&&...)                                                                            \
    {                                                                                                                  \
        using calls = detail::policy_type##_##function##_of_##concerns;                                                \
        return calls::template explain<detail::call_flaw::constant, P>();                                              \
    }                                                                                                                  \
    template <class Calls = detail::policy_type##_##function##_of_##concerns>                                          \
    auto function(const detail::misplaced_argument<detail::policy_type##_##function##_of_##concerns>&,                 \
        detail::any_argument = {}, detail::any_argument = {}, detail::any_argument = {}, detail::any_argument = {},    \
        detail::any_argument = {}, detail::any_argument = {})                                                          \
    {                                                                                                                  \
        return Calls::template explain<detail::call_flaw::policy, Calls>();                                            \
    }
#endif

// The sentence of a function that lives in a header of its own on taskvec::gpu, where that is not included.
#define TASKVEC_CALLS_NEED_HEADER(function, room, header)                                                              \
    template <detail::gpu_without_header<detail::gpu_room::room> P, class... Arguments>                                \
    auto function(const P&, Arguments&&...)                                                                            \
    {                                                                                                                  \
        static_assert(detail::gpu_header_included<P, detail::gpu_room::room>,                                          \
            #function "() on taskvec::gpu: include <" header ">");                                                     \
        return detail::no_result{};                                                                                    \
    }
// NOLINTEND(bugprone-macro-parentheses)
#endif // TASKVEC_SINGLE_CORE_WRONG_CALL_HPP

// ---- taskvec/methods/merge.hpp
#if !defined(TASKVEC_SINGLE_METHODS_MERGE_HPP)
#define TASKVEC_SINGLE_METHODS_MERGE_HPP
// merge(): aligned models, models in memory or flat views, merged by any method on the CPU.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/compiled/methods.hpp
#if !defined(TASKVEC_SINGLE_COMPILED_METHODS_HPP)
#define TASKVEC_SINGLE_COMPILED_METHODS_HPP
// What taskvec::compiled compiles of methods/, as a list; see compiled/linalg.hpp. Each method's header declares its
// own merges with it.
// SPDX-License-Identifier: Apache-2.0


#include <memory>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {
template <class Options>
std::vector<std::unique_ptr<operand_source>> merge_sources(
    const cpu& policy, const Options& options, const aligned_models& models); // methods/merge_on_read.hpp
} // namespace taskvec::inline TASKVEC_ABI::detail

/// The merges of a method of models of any storage types.
#define TASKVEC_COMPILED_MODEL_MERGE(EXTERN, OPTIONS)                                                                  \
    EXTERN template merge_report detail::merge_storing<storage_types, OPTIONS>(                                        \
        const cpu&, const OPTIONS&, const aligned_models&, tensor_sink&);                                              \
    EXTERN template std::vector<std::unique_ptr<operand_source>> detail::merge_sources<OPTIONS>(                       \
        const cpu&, const OPTIONS&, const aligned_models&);

/// The same, and those of flat views of one of the types that models come in.
#define TASKVEC_COMPILED_MERGES(EXTERN, OPTIONS)                                                                       \
    TASKVEC_COMPILED_MODEL_MERGE(EXTERN, OPTIONS)                                                                      \
    TASKVEC_COMPILED_TYPED_MERGE(EXTERN, OPTIONS, float)                                                               \
    TASKVEC_COMPILED_TYPED_MERGE(EXTERN, OPTIONS, f16)                                                                 \
    TASKVEC_COMPILED_TYPED_MERGE(EXTERN, OPTIONS, bf16)

#define TASKVEC_COMPILED_TYPED_MERGE(EXTERN, OPTIONS, T)                                                               \
    EXTERN template merge_report detail::merge_in_memory<storage_list<T>, OPTIONS>(const cpu&, const OPTIONS&,         \
        const const_model_ref*, std::span<const const_model_ref>, const model_ref&, const model_options&);

/// What merges share: the norms that a report gives.
#define TASKVEC_COMPILED_MERGED_NORMS(EXTERN, TYPES)                                                                   \
    EXTERN template void detail::add_norms<TYPES>(const cpu&, const aligned_models&, merge_report&);
#endif // TASKVEC_SINGLE_COMPILED_METHODS_HPP

// ---- taskvec/core/option_range.hpp
#if !defined(TASKVEC_SINGLE_CORE_OPTION_RANGE_HPP)
#define TASKVEC_SINGLE_CORE_OPTION_RANGE_HPP
// What the numbers of options may be, held to their tables (core/option_table.hpp): the same ranges and words as where
// they are read from text.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/option_table.hpp
#if !defined(TASKVEC_SINGLE_CORE_OPTION_TABLE_HPP)
#define TASKVEC_SINGLE_CORE_OPTION_TABLE_HPP
// What an options struct says about itself: one table with a row for each member.
// SPDX-License-Identifier: Apache-2.0
//
// A row names the member and says what it means, what it may hold and what unit stands for it in a usage line; its kind
// comes from the member's type and its default from the struct's own initialisers. Reading a value from text, writing
// it, listing (core/option_text.hpp), the command line's flags, notes, reports and sweep axes all come from the table.
//
// A struct gets its table by specialising options_of, beside it:
//
//     struct my_options {
//         double share = 0.5;
//         bool centred = true;
//         std::vector<double> weights{};
//     };
//     template <>
//     struct taskvec::options_of<my_options> {
//         static constexpr taskvec::option_table table{
//             taskvec::option_row("share", &my_options::share, "share of entries kept",
//                 {.unit = "D", .above = 0, .at_most = 1}),
//             taskvec::option_row("centred", &my_options::centred, "take the mean off", {.negated = "uncentred"}),
//             taskvec::weights_row(&my_options::weights)};
//     };
//
// or, where that reads better, by a static member function `describe()` that returns the same table.


#include <array>
#include <concepts>
#include <cstddef>
#include <limits>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Values that a sweep goes over: the plural that names them, and the usual ones as text ("0.1,0.2" or
/// "FIRST:LAST:STEP"); `of_subsets` where every subset of the tasks is tried as well.
struct option_axis {
    std::string_view name{}, usual{}, of_subsets{}; ///< as described above
};

/// What a row says beside name, member and meaning. Numbers are finite always, and within the range that is given.
struct option_details {
    std::string_view unit{}; ///< stands for the value in a usage line: "D", "N"; empty: by the kind
    /// Smallest value.
    double at_least = -std::numeric_limits<double>::infinity();
    double above = -std::numeric_limits<double>::infinity(); ///< the bound itself is outside
    /// Largest value.
    double at_most = std::numeric_limits<double>::infinity();
    std::string_view expected{}; ///< what messages say is expected; empty: in words made of the range
    std::string_view negated{}; ///< of a bool that is on by default: the flag that turns it off
    option_axis axis{}; ///< what a sweep tries
};

/// Of a share of entries: above 0 and up to 1.
[[nodiscard]] constexpr option_details share_details(option_axis axis = {})
{
    return {.unit = "D",
        .above = 0,
        .at_most = 1,
        .expected = "a share above 0 and up to 1, such as 0.1 for a tenth",
        .axis = axis};
}
/// The densities that a merge is usually tried with.
inline constexpr option_axis common_densities{"densities", "0.05,0.1,0.2,0.3,0.5", {}};
/// Of λ, the scale of a merged task vector.
[[nodiscard]] constexpr option_details lambda_details()
{
    return {.axis = {"lambdas", "0:1:0.05", "0.3"}};
}

/// One member of an options struct. `name`: lower case words with hyphens; `meaning`: a phrase without a full stop.
template <class Options, class Value>
struct option_row {
    /// The struct that has the member.
    using options_type = Options;
    using value_type = Value;

    std::string_view name; ///< lower case words with hyphens
    Value Options::* member; ///< where the value is
    std::string_view meaning; ///< a phrase without a full stop
    option_details details; ///< range, unit, words
    bool per_task = false; ///< a list with an entry for each task: given with the tasks, not by itself
    std::string_view each_of{}; ///< of such a list: what an entry is, "weight", or the row that holds for all tasks

    /// `its_name` and `words` must outlive the table: literals do.
    constexpr option_row(
        std::string_view its_name, Value Options::* its_member, std::string_view words, option_details more = {})
        : name(its_name)
        , member(its_member)
        , meaning(words)
        , details(more)
    { }

    /// Calls visit(row, value) with the member of `options`, as all rows do.
    template <class Owner, class Visit>
    constexpr void visit(Owner& options, Visit&& visit) const
    {
        visit(*this, options.*member);
    }
};

/// A list with an entry for each task. `each_of`: what an entry is, "weight", or the row that holds for all tasks.
template <class Options>
[[nodiscard]] constexpr option_row<Options, std::vector<double>> task_row(
    std::string_view name, std::vector<double> Options::* member, std::string_view each_of, std::string_view meaning)
{
    option_row<Options, std::vector<double>> row(name, member, meaning);
    row.per_task = true;
    row.each_of = each_of;
    return row;
}
/// The weights of the tasks: one for each, or none for all 1.
template <class Options>
[[nodiscard]] constexpr auto weights_row(
    std::vector<double> Options::* member, std::string_view meaning = "one for each task, or none for all 1")
{
    return task_row("weights", member, "weight", meaning);
}
/// A density of each task, where they differ.
template <class Options>
[[nodiscard]] constexpr auto densities_row(std::vector<double> Options::* member)
{
    return task_row("densities", member, "density", "density of each task, or none for one of all");
}
/// The share of outliers of each task, where they differ.
template <class Options>
[[nodiscard]] constexpr auto gammas_row(std::vector<double> Options::* member)
{
    return task_row("gammas", member, "gamma", "gamma of each task, or none for one of all");
}

/// The spread of keep probabilities of each task, where they differ.
template <class Options>
[[nodiscard]] constexpr auto epsilons_row(std::vector<double> Options::* member)
{
    return task_row("epsilons", member, "epsilon", "epsilon of each task, or none for one of all");
}

/// The options of a struct that is a member: its rows stand in the owner's table as if they were the owner's, all but
/// those that `without` names (which have no effect there, or which the owner has itself). Likewise its presets.
template <class Options, class Inner, std::size_t N>
struct inner_options {
    Inner Options::* member; ///< the struct within
    std::array<std::string_view, N> without; ///< names of its rows that are not the owner's

    /// Whether a row of the struct within is none of the owner's.
    [[nodiscard]] constexpr bool leaves_out(std::string_view name) const noexcept
    {
        for (const auto& other : without) {
            if (other == name) { return true; }
        }
        return false;
    }
    /// Calls visit(row, value) for each row of the struct within that is not left out.
    template <class Owner, class Visit>
    constexpr void visit(Owner& options, Visit&& visit) const;
};
/// The rows of member `member`, without those that are named. See inner_options.
template <class Options, class Inner, class... Names>
[[nodiscard]] constexpr inner_options<Options, Inner, sizeof...(Names)> options_within(
    Inner Options::* member, Names... without)
{
    return {member, {std::string_view(without)...}};
}

/// The rows of a struct.
template <class... Rows>
struct option_table {
    std::tuple<Rows...> rows; ///< in the order in which they are listed and asked for

    /// Takes option_row and inner_options, in any number.
    constexpr explicit option_table(const Rows&... all)
        : rows(all...)
    { }
};

/// A set of values under a name: "as the other library does it".
template <class Options>
struct option_preset {
    std::string_view name, meaning; ///< the preset's word, and what it follows
    /// The values.
    Options (*make)();
};

/// The extension point: `table`, and where there are presets `presets` (an array of option_preset, the first of which
/// is what the struct's initialisers say) with `preset_option`, the name of the option that chooses one.
template <class Options>
struct options_of { };
template <class Options>
    requires requires { Options::describe(); }
struct options_of<Options> {
    static constexpr auto table = Options::describe();
};

/// A struct that has a table.
template <class Options>
concept described_options = requires { options_of<Options>::table.rows; };

/// A struct with named presets.
template <class Options>
concept options_with_presets = requires {
    options_of<Options>::presets.size();
    options_of<Options>::preset_option;
};

/// The words for the values of an enumeration: specialise with `static constexpr std::array words{enum_word{…}, …}`.
template <class Enum>
struct enum_words { };
/// A value of an enumeration and its word.
template <class Enum>
struct enum_word {
    Enum value; ///< the value
    std::string_view word; ///< lower case, with hyphens
};
/// An enumeration whose values have words.
template <class Enum>
concept worded_enum = std::is_enum_v<Enum> && requires { enum_words<Enum>::words.size(); };

/// What may stand in a table.
template <class Value>
concept describable_value = std::same_as<Value, bool> || std::floating_point<Value> || std::unsigned_integral<Value>
    || worded_enum<Value> || std::same_as<Value, std::vector<double>>;

/// Calls visit(row, member) for every row of the table of `options`, those of inner structs in their places. The member
/// is const where `options` is.
///
///     for_each_option(options, [](const auto& row, const auto& value) { std::cout << row.name << …; });
template <class Options, class Visit>
constexpr void for_each_option(Options& options, Visit&& visit)
{
    using bare = std::remove_const_t<Options>;
    static_assert(described_options<bare>,
        "taskvec: this options struct has no table: specialise taskvec::options_of for it (core/option_table.hpp)");
    if constexpr (described_options<bare>) {
        std::apply([&](const auto&... rows) { (rows.visit(options, visit), ...); }, options_of<bare>::table.rows);
    }
}

/// Calls visit(preset_option, presets, inner) for each struct with presets among `options` and its inner structs. A
/// struct's own presets stand in place of those of its inner structs: it knows what the names mean for the whole.
template <class Options, class Visit>
constexpr void for_each_preset_list(Options& options, Visit&& visit);

template <class Options, class Inner, std::size_t N>
template <class Owner, class Visit>
constexpr void inner_options<Options, Inner, N>::visit(Owner& options, Visit&& visit) const
{
    for_each_option(options.*member, [&](const auto& row, auto& value) {
        if (!leaves_out(row.name)) { visit(row, value); }
    });
}

template <class Options, class Visit>
constexpr void for_each_preset_list(Options& options, Visit&& visit)
{
    using bare = std::remove_const_t<Options>;
    if constexpr (options_with_presets<bare>) {
        visit(options_of<bare>::preset_option, options_of<bare>::presets, options);
    }
    else if constexpr (described_options<bare>) {
        std::apply(
            [&](const auto&... rows) {
                const auto within = [&](const auto& row) {
                    if constexpr (requires { row.leaves_out(""); }) {
                        for_each_preset_list(options.*row.member, visit);
                    }
                };
                (within(rows), ...);
            },
            options_of<bare>::table.rows);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_OPTION_TABLE_HPP

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Throws where a number of `options` is not finite or outside the range that its row gives. merge() checks with it,
/// on every policy, before a method sees its options; a method checks what no row can say. Options without a table
/// pass. Errors: invalid_argument, "density is 1.5; expected a number above 0 and up to 1".
///
///     check_options(ties_options{.density = 1.5});
template <class Options>
void check_options(const Options& options);

namespace detail {

[[nodiscard]] inline std::string number_text(double value)
{
    char digits[32];
    const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
    return {digits, end};
}

[[nodiscard]] inline bool in_range(const option_details& range, double value)
{
    return std::isfinite(value) && value >= range.at_least && value > range.above && value <= range.at_most;
}

[[nodiscard]] inline std::string range_text(const option_details& range, std::string_view noun)
{
    if (!range.expected.empty()) { return std::string(range.expected); }
    std::string text(noun);
    const bool least = std::isfinite(range.at_least), above = std::isfinite(range.above);
    const bool most = std::isfinite(range.at_most);
    if (least && most) { return text + " from " + number_text(range.at_least) + " to " + number_text(range.at_most); }
    if (least) { return text + " of at least " + number_text(range.at_least); }
    if (above) { text += " above " + number_text(range.above); }
    if (most) { text += std::string(above ? " and" : "") + " up to " + number_text(range.at_most); }
    if (!above && !most) { text.replace(0, 1, "a finite"); }
    return text;
}

[[nodiscard]] inline std::string whole_number_text(option_details range, std::uint64_t largest)
{
    if (!(range.at_least > 0)) { range.at_least = 0; }
    if (std::isfinite(range.at_most)) { return range_text(range, "a whole number"); }
    return "a whole number from " + number_text(range.at_least) + " to " + std::to_string(largest);
}

[[noreturn]] inline void refuse_number(std::string_view name, double value, const std::string& expected)
{
    raise<invalid_argument>(
        std::isfinite(value) ? error_code::parameter_out_of_range : error_code::parameter_not_finite,
        message(name, " is ", number_text(value), "; expected ", expected));
}

inline void check_number(std::string_view name, const option_details& range, double value)
{
    if (!in_range(range, value)) { refuse_number(name, value, range_text(range, "a number")); }
}

} // namespace detail

template <class Options>
void check_options(const Options& options)
{
    if constexpr (described_options<Options>) {
        for_each_option(options, [](const auto& row, const auto& value) {
            using value_type = std::remove_cvref_t<decltype(value)>;
            if constexpr (std::floating_point<value_type>) {
                detail::check_number(row.name, row.details, static_cast<double>(value));
            }
            else if constexpr (std::unsigned_integral<value_type> && !std::same_as<value_type, bool>) {
                const auto number = static_cast<double>(value);
                if (!detail::in_range(row.details, number)) {
                    detail::refuse_number(row.name, number,
                        detail::whole_number_text(row.details, std::numeric_limits<value_type>::max()));
                }
            }
        });
    }
}

namespace detail {

/// How much larger the numbers of `options` can make a result: their product, each by itself or as a divisor.
template <class Options>
[[nodiscard]] double largest_gain(const Options& options)
{
    double gain = 1;
    if constexpr (described_options<Options>) {
        const auto of = [](double value) {
            const double size = std::fabs(value);
            return size > 1 ? size : size > 0 ? 1 / size : 1.0;
        };
        for_each_option(options, [&](const auto&, const auto& value) {
            using value_type = std::remove_cvref_t<decltype(value)>;
            if constexpr (std::floating_point<value_type>) { gain *= of(static_cast<double>(value)); }
            else if constexpr (std::same_as<value_type, std::vector<double>>) {
                double most = 1;
                for (const double one : value) { most = of(one) > most ? of(one) : most; }
                gain *= most;
            }
        });
    }
    return gain;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_OPTION_RANGE_HPP

// ---- taskvec/core/parts.hpp
#if !defined(TASKVEC_SINGLE_CORE_PARTS_HPP)
#define TASKVEC_SINGLE_CORE_PARTS_HPP
// Work in parts of unequal sizes: large ones on all threads, the others on a thread each.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Calls use(part, policy, at_once) for every part; part i has `bytes[i]`. Several parts at a time on a thread each,
/// for one has little to do for many threads, and while one waits for its bytes others work; those that are large
/// beside the others one by one, on all threads. `at_once`: how many there may be at that time, which share a budget.
/// Progress is that of one walk over all parts: what a part tells of counts where it calls it `phase`. Of what use()
/// throws, that of the first part; cancelled.
template <class Use>
void for_each_part(const cpu& policy, std::string_view phase, std::span<const std::uint64_t> bytes, const Use& use)
{
    const std::size_t workers = worker_count(policy, bytes.size());
    std::uint64_t total = 0;
    for (const std::uint64_t part : bytes) { total += part; }
    const auto large = [&](std::size_t i) { return workers == 1 || bytes[i] > total / (8 * workers); };
    progress_meter meter(policy, phase, total);
    const auto done = [&](std::size_t i) {
        if (!meter.advance(bytes[i])) { raise<cancelled>(error_code::cancelled); }
    };
    std::uint64_t before = 0; // bytes of the parts that come before one that is worked on by itself
    cpu reporting; // a copy that tells of the place among all parts, where somebody is told
    if (policy.progress) {
        reporting = policy;
        reporting.progress = [&](const progress_event& event) {
            return policy.progress({phase, before + (event.phase == phase ? event.done : 0), total, event.unit});
        };
    }
    const cpu& together = policy.progress ? reporting : policy;
    const cpu alone = sequential(policy);
    for (std::size_t i = 0, end = 0; i < bytes.size(); i = end) {
        end = i + 1;
        if (large(i)) {
            use(i, together, std::size_t{1});
            before += bytes[i];
            done(i);
            continue;
        }
        while (end < bytes.size() && !large(end)) { ++end; }
        for_each_index(policy, end - i, [&](std::size_t index, std::size_t) {
            use(i + index, alone, workers);
            done(i + index);
        });
        for (std::size_t part = i; part < end; ++part) { before += bytes[part]; }
    }
}

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_CORE_PARTS_HPP

// ---- taskvec/methods/entries.hpp
#if !defined(TASKVEC_SINGLE_METHODS_ENTRIES_HPP)
#define TASKVEC_SINGLE_METHODS_ENTRIES_HPP
// What a method's body sees of a pack of entries: the base, the tasks and their task vectors, and where to count.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/method.hpp
#if !defined(TASKVEC_SINGLE_METHODS_METHOD_HPP)
#define TASKVEC_SINGLE_METHODS_METHOD_HPP
// The contract of a merge method: what one has to say of itself so that merge() runs it, everywhere.
// SPDX-License-Identifier: Apache-2.0
//
// A method is an options struct and, beside it, a specialisation of taskvec::method for it. Anybody's will do: those of
// the library are written on the same contract.
//
//     struct midpoint_options { double lambda = 1; };                     // 1. what a caller may choose
//
//     template <class A>
//     struct midpoint_body {                                             // 3. what becomes of the entries
//         static constexpr bool watches = false;
//         A lambda;
//         template <class In>
//         TASKVEC_INLINE typename In::pack operator()(In& in) const
//         {
//             auto least = in.delta(0), most = in.delta(0);
//             for (std::size_t t = 1; t < in.tasks(); ++t) {
//                 const auto x = in.delta(t);
//                 least = select(x < least, x, least);
//                 most = select(x > most, x, most);
//             }
//             return in.base() + lambda * (0.5f * (least + most));
//         }
//     };
//
//     template <>
//     class taskvec::method<midpoint_options> : public taskvec::elementwise_method {
//     public:
//         template <class Passes>                                        // 2. what it must know before the walk
//         method(Passes&, const midpoint_options& options) : lambda_(options.lambda) { }
//         template <taskvec::arithmetic_element A>
//         midpoint_body<A> body(std::size_t) const { return {static_cast<A>(lambda_)}; }
//     private:
//         double lambda_;
//     };
//
// The constructor checks the options and may ask `passes` for what takes a walk over the models: dot products of every
// tensor, thresholds of top-k, and memory for tables that bodies read (see cpu_passes). body<A>(tensor) is a small
// value for each tensor: trivially copyable, numbers and pointers from passes.keep(). Its call operator works on a pack
// of entries (core/pack.hpp; the interface of `in` is that of kernels::entries): no branches on packs, one result. It
// is compiled for every vector width and, on the gpu policy, as a functor.
//
// What a method may say beside that has a default in elementwise_method. Methods that are not elementwise are row
// methods, with a call for a block of rows, or write everything themselves: row_method and whole_method below.


// ---- taskvec/models/companion.hpp
#if !defined(TASKVEC_SINGLE_MODELS_COMPANION_HPP)
#define TASKVEC_SINGLE_MODELS_COMPANION_HPP
// Memory that lies beside aligned models: what a method reads of each tensor besides the base and the tasks.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// Memory that a method reads beside the models (the statistics of a tensor, say), for the check of aliases.
struct companion {
    std::size_t tensor = 0; ///< index in aligned_models::tensors()
    const std::byte* data = nullptr;
    std::size_t bytes = 0; ///< that are read from `data` on
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_COMPANION_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A list of flat views (or what converts to one) of one storage type in P's memory space: one for each task.
template <class Tasks, class P>
concept tasks_of = std::ranges::input_range<const Tasks> && input_of<std::ranges::range_reference_t<const Tasks>, P>;

/// A merge method, by its options. Specialise it (see above); it has no general definition.
template <class Options>
class method;

/// What a merge can say about itself; filled where model_options::statistics asks for it.
struct merge_report {
    /// The norms of one tensor.
    struct tensor_norm {
        std::string name; ///< of the tensor
        double merged = 0; ///< ‖θ*‖ before rounding to storage
        double change = 0; ///< ‖θ* − θ0‖, 0 without a base
    };
    std::vector<std::uint64_t> kept{}; ///< for each task: nonzero entries of its task vector that took part
    std::vector<std::uint64_t> conflicting{}; ///< for each task: those of them whose sign lost the election (TIES)
    std::vector<tensor_norm> norms{}; ///< in the order of tensors
    unsigned walks = 0; ///< how often the models were read from end to end
    std::uint64_t beside = 0; ///< bytes read beside those walks: statistics, and second reads of some tensors
    std::uint64_t saturated = 0; ///< results that became their dtype's largest number (overflow::saturate)

    /// Adds what the merge of other tensors of the same models says of them.
    merge_report& operator+=(const merge_report& other)
    {
        const auto add = [](std::vector<std::uint64_t>& sum, const std::vector<std::uint64_t>& more) {
            if (sum.size() < more.size()) { sum.resize(more.size()); }
            for (std::size_t t = 0; t < more.size(); ++t) { sum[t] += more[t]; }
        };
        add(kept, other.kept);
        add(conflicting, other.conflicting);
        norms.insert(norms.end(), other.norms.begin(), other.norms.end());
        walks = std::max(walks, other.walks);
        beside += other.beside;
        saturated += other.saturated;
        return *this;
    }
};

/// What bodies counted: on a run of entries, a tensor, a model. Tallies of parts add up to that of the whole, whoever
/// walked over the parts and in whatever order.
struct merge_tally {
    static constexpr std::size_t slot_count = 4; ///< counters that a body has
    std::array<std::uint64_t, slot_count> counts{}; ///< by in.count(slot, mask)
    std::pmr::vector<std::uint64_t> of_tasks{}; ///< by in.count_of(slot, task, mask): [slot][task]

    merge_tally() = default;
    /// Counts of tasks will lie in memory of `memory`.
    explicit merge_tally(std::pmr::memory_resource* memory)
        : of_tasks(memory)
    { }

    /// Adds another part's counts, of entries and of tasks.
    merge_tally& operator+=(const merge_tally& other)
    {
        for (std::size_t k = 0; k < slot_count; ++k) { counts[k] += other.counts[k]; }
        if (of_tasks.size() < other.of_tasks.size()) { of_tasks.resize(other.of_tasks.size()); }
        for (std::size_t k = 0; k < other.of_tasks.size(); ++k) { of_tasks[k] += other.of_tasks[k]; }
        return *this;
    }
};

/// What a method says of itself when it says nothing. Derive from it, and hide what is otherwise.
///
/// Beside these a method may have
///   - `static call_vector<aligned_tensor::operand> beside(const Options&, const aligned_models&, memory_space)` (or
///     another list): what in.beside(b) reads, as many for each tensor, in the order of tensors();
///   - `static bool tensor_by_tensor(const Options&)`: whether all that it learns of a tensor comes of that tensor
///     alone, so that some tensors at a time may be prepared and merged, and models larger than memory are read once;
///   - `bool settle(std::span<const merge_tally> of_tensors)`, called once everything is merged: whether something has
///     to be merged again, and then `bool again(std::size_t tensor, const merge_tally& part)`: whether that part has;
///   - `void examine(const Passes&, std::size_t tensor, …)`: see fisher.hpp;
///   - `bool nonfinite_beside(std::size_t tensor, std::uint64_t index) const`: whether what it reads beside the models
///     has NaN or infinity there, which is then no overflow; see sparse_addition.hpp;
///   - where an entry's fate depends on its row: `const row_pieces& pieces()`, what the walk goes over; and for each of
///     them `weigh(row_block<A>&, const tensor_chunk& piece, A* numbers, detail::piece_memory&)`, which makes
///     `row_numbers()` rows of numbers as long as the piece. A body with `reads_beside` sees row b as in.beside(b). CPU
///     only: see della.hpp; unless the body says by `number(b, entry)` what in.beside(b) is on devices: nuslerp.hpp.
struct elementwise_method {
    static constexpr bool needs_base = true; ///< merges without a base do not compile
    static constexpr bool in_place = true; ///< an output may be the memory of an input of the same place: each entry is
                                           ///< read for the last time before it is written
    static constexpr bool on_device = true; ///< runs on taskvec::gpu too
    static constexpr std::size_t task_slots = 0; ///< slots of in.count_of() where statistics are asked for: the first
                                                 ///< is merge_report::kept, the second merge_report::conflicting

    /// How often the constructor read all models.
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    /// Bytes read beside the models.
    [[nodiscard]] std::uint64_t bytes_beside() const noexcept { return 0; }
};

/// The same of a method that is not elementwise: row_method or whole_method, on the CPU.
struct general_method : elementwise_method {
    static constexpr bool on_device = false;
    static constexpr std::size_t scratch_rows = 0; ///< rows of a block that a row method needs besides its result
};

class cpu_passes; // passes.hpp

namespace detail {

template <class Options>
concept has_method = requires { sizeof(method<Options>); };

template <class Options>
concept has_contract = has_method<Options> && std::derived_from<method<Options>, elementwise_method>;

template <class Options>
concept has_constructor = has_method<Options> && std::constructible_from<method<Options>, cpu_passes&, const Options&>;

template <class Options>
concept has_body =
    has_method<Options> && requires(const method<Options>& m, std::size_t tensor) { m.template body<float>(tensor); };

template <class Options>
concept watching_body = has_body<Options> && requires(const method<Options>& m, std::size_t tensor) {
    { std::remove_cvref_t<decltype(m.template body<float>(tensor))>::watches } -> std::convertible_to<bool>;
};

} // namespace detail

/// An elementwise method: body<A>(tensor) is a value whose call operator merges a pack of entries.
template <class Options>
concept packed_method = detail::watching_body<Options>;

/// A method on rows: method(block, merged, tally) merges an opened block of A into the row `merged`. For what is no
/// body of a few entries, such as scattered additions. CPU only.
template <class Options>
concept row_method = detail::has_method<Options>
    && requires(const method<Options>& m, row_block<float>& rows, float* merged, merge_tally& tally) {
           m(rows, merged, tally);
       };

/// A method that writes all tensors itself, from whole tensors: write(policy, models, out).
template <class Options>
concept whole_method = detail::has_method<Options>
    && requires(const method<Options>& m, const cpu& policy, const aligned_models& models, tensor_sink& out) {
           m.write(policy, models, out);
       };

/// The options of a merge method.
template <class Options>
concept merge_method = detail::has_contract<Options> && detail::has_constructor<Options>
    && (packed_method<Options> || row_method<Options> || whole_method<Options>);

namespace detail {

/// Says what is missing of a method, in a sentence.
template <class Options>
consteval bool check_method()
{
    static_assert(has_method<Options>,
        "these are not the options of a merge method: include the method's header, or specialise taskvec::method for "
        "them (see taskvec/methods/method.hpp)");
    if constexpr (has_method<Options>) {
        static_assert(has_contract<Options>,
            "a merge method derives from taskvec::elementwise_method, or general_method, and hides what is otherwise");
        static_assert(has_constructor<Options>,
            "a merge method has a constructor: template <class Passes> method(Passes& passes, const Options& options)");
        static_assert(has_body<Options> || row_method<Options> || whole_method<Options>,
            "a merge method has a body: template <arithmetic_element A> auto body(std::size_t tensor) const; or, where "
            "it is not elementwise, a call operator for a block of rows, or write(policy, models, out)");
        static_assert(!has_body<Options> || watching_body<Options>,
            "the body of a merge method says whether it hands NaN and infinity to in.watch(): static constexpr bool "
            "watches = false, where each input is to be looked at for them");
    }
    return true;
}

/// "1 of 'a', -1 of 'b'": which weights tasks have, for messages.
[[nodiscard]] TASKVEC_COLD inline std::string weights_text(
    std::span<const double> weights, const aligned_models& models)
{
    constexpr std::size_t most = 8;
    std::string text;
    for (std::size_t t = 0; t < std::min(most, weights.size()); ++t) {
        text += message(t == 0 ? "" : ", ", weights[t], " of ", models.label(t));
    }
    return weights.size() > most ? text + " …" : text;
}

/// What a sum over tasks is divided by: Σ weights in the arithmetic type, in task order; 1 where it is not
/// `normalized`.
class weight_divisor {
public:
    /// Weights of the tasks of `models`. Errors: invalid_argument where they sum to 0.
    weight_divisor(std::span<const double> weights, bool normalized, const aligned_models& models)
    {
        if (!normalized) { return; }
        single_ = 0;
        wide_ = 0;
        for (const double weight : weights) {
            single_ += static_cast<float>(weight);
            wide_ += weight;
        }
        if (single_ == 0 || wide_ == 0) {
            raise<invalid_argument>(error_code::weights_sum_zero,
                message("the weights sum to 0 (", weights_text(weights, models),
                    "), and nothing can be divided by that: change one of them, or do not normalize"));
        }
    }
    template <arithmetic_element A>
    [[nodiscard]] A get() const noexcept
    {
        if constexpr (std::same_as<A, double>) { return wide_; }
        else {
            return single_;
        }
    }

private:
    float single_ = 1;
    double wide_ = 1;
};

inline constexpr std::string_view no_negative_weights =
    "this method has no meaning for negative weights; give 0 or more";

/// task_weights() of tasks that label(t) names. `refusal`: why negative weights are refused; empty where they are not.
template <class Label>
[[nodiscard]] call_vector<double> labelled_weights(
    std::span<const double> weights, std::size_t tasks, const Label& label, std::string_view refusal)
{
    if (weights.empty()) { return call_vector<double>(tasks, 1.0); }
    if (weights.size() != tasks) {
        raise<invalid_argument>(
            error_code::list_length, message(weights.size(), " weights for ", tasks, " tasks: give one each, or none"));
    }
    for (std::size_t t = 0; t < tasks; ++t) {
        if (!std::isfinite(weights[t])) {
            raise<invalid_argument>(error_code::parameter_not_finite,
                message("the weight of ", label(t), " is ", weights[t], ": give a finite number"));
        }
        if (!refusal.empty() && weights[t] < 0) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("the weight of ", label(t), " is ", weights[t], ": ", refusal));
        }
    }
    return {weights.begin(), weights.end()};
}

} // namespace detail

/// The weights of the tasks of models, one for each: those given, or 1 for all where none are. A method's constructor
/// checks its list with this. Errors: invalid_argument, naming the task (another number of them; not finite; negative
/// where that means nothing).
///
///     const auto weights = task_weights(options.weights, passes.models());
[[nodiscard]] inline call_vector<double> task_weights(
    std::span<const double> weights, const aligned_models& models, bool negative_allowed = true)
{
    return detail::labelled_weights(
        weights, models.task_count(), [&](std::size_t t) { return models.label(t); },
        negative_allowed ? std::string_view() : detail::no_negative_weights);
}

/// The same for a number of tasks, which are "task 1", "task 2", … in messages.
[[nodiscard]] inline call_vector<double> task_weights(
    std::span<const double> weights, std::size_t tasks, bool negative_allowed = true)
{
    return detail::labelled_weights(
        weights, tasks, [](std::size_t t) { return message("task ", t + 1); },
        negative_allowed ? std::string_view() : detail::no_negative_weights);
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_METHOD_HPP

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace taskvec::inline TASKVEC_ABI {

namespace kernels {

/// A run of consecutive entries of one tensor, stored as T in the base, in every task and in the output.
template <storage_element T>
struct entry_run {
    using number = arithmetic_type<T>;
    const storage_word<T>* base = nullptr; ///< null where there is none
    const void* const* tasks = nullptr; ///< stored words of each
    std::size_t task_count = 0;
    const void* const* beside = nullptr; ///< numbers that lie beside the models; null for those that are not there
    /// Random words for each task, less 2³¹, as signed words of the number's width; of 16-bit types first those of even
    /// entries, and `half_of_draws` words later those of odd ones.
    const void* const* draws = nullptr;
    std::size_t half_of_draws = 0;
    storage_word<T>* out = nullptr; ///< of the first entry of the run
    std::size_t first = 0, size = 0; ///< the run among the entries that the pointers point to
    std::uint64_t place = 0; ///< of the first entry, in the concatenation of all tensors
};

/// What a kernel tells: counts, and the largest magnitude bits of what was watched.
template <arithmetic_element A>
struct run_findings {
    merge_tally* tally = nullptr;
    bits_type<A> largest = 0;
};

TASKVEC_KERNELS_BEGIN

/// The entries that a body is called with. `held` tasks are known when it is compiled (0: any number).
template <storage_element T, int bytes, int held, int part_of_pack>
class entries {
    using stored = stored_pack<T, bytes>;

public:
    using number = arithmetic_type<T>;
    using pack = typename stored::pack_type;
    using words = typename pack::words;
    using mask = typename pack::mask;

    TASKVEC_INLINE entries(const entry_run<T>& run, std::size_t at, const stored& base, const stored* tasks,
        words* counts, words* counts_of_tasks, words& largest) noexcept
        : run_(&run)
        , at_(at)
        , base_(&base)
        , tasks_(tasks)
        , counts_(counts)
        , counts_of_tasks_(counts_of_tasks)
        , largest_(&largest)
    { }

    [[nodiscard]] TASKVEC_INLINE std::size_t tasks() const noexcept
    {
        if constexpr (held > 0) { return held; }
        else {
            return run_->task_count;
        }
    }
    /// θ0; 0 where there is no base.
    [[nodiscard]] TASKVEC_INLINE pack base() const noexcept { return base_->template get<part_of_pack>(); }
    [[nodiscard]] TASKVEC_INLINE bool has_base() const noexcept { return run_->base != nullptr; }
    /// θt.
    [[nodiscard]] TASKVEC_INLINE pack task(std::size_t t) const noexcept
    {
        if constexpr (held > 0) { return tasks_[t].template get<part_of_pack>(); }
        else {
            stored loaded;
            loaded.load(static_cast<const storage_word<T>*>(run_->tasks[t]) + at_);
            return loaded.template get<part_of_pack>();
        }
    }
    /// τt = θt − θ0.
    [[nodiscard]] TASKVEC_INLINE pack delta(std::size_t t) const noexcept { return task(t) - base(); }
    /// Whether operand b beside the models is there for this tensor, and its entries.
    [[nodiscard]] TASKVEC_INLINE bool has_beside(std::size_t b) const noexcept { return run_->beside[b] != nullptr; }
    [[nodiscard]] TASKVEC_INLINE pack beside(std::size_t b) const noexcept
    {
        static_assert(stored::parts == 1, "what lies beside the models is read with rows of the arithmetic type");
        stored_pack<number, bytes> loaded;
        loaded.load(static_cast<const number*>(run_->beside[b]) + at_);
        return loaded.template get<0>();
    }
    /// The random words of task t's entries, less 2³¹ (see random_stream).
    [[nodiscard]] TASKVEC_INLINE words draws(std::size_t t) const noexcept
    {
        using lanes = typename taskvec::detail::vector_of<signed_word<number>, bytes>::anywhere;
        const auto* words_of_task = static_cast<const signed_word<number>*>(run_->draws[t]);
        if constexpr (sizeof(T) == sizeof(number)) { words_of_task += at_; }
        else {
            words_of_task += (bytes == 0 ? at_ % 2 : part_of_pack) * run_->half_of_draws + at_ / 2;
        }
        return {*reinterpret_cast<const lanes*>(words_of_task)};
    }
    /// Whether entries come before a place of the concatenation of all tensors: all of a pack, or none.
    [[nodiscard]] TASKVEC_INLINE bool before(std::uint64_t place) const noexcept { return run_->place < place; }

    /// f(0) + f(1) + … over the tasks, in order. No f(t) is −0: the first is taken as it is.
    template <class F>
    [[nodiscard]] TASKVEC_INLINE pack total_of(const F& f) const
    {
        if constexpr (held > 0) {
            pack sum = f(std::size_t{0});
            TASKVEC_UNROLL(8)
            for (std::size_t t = 1; t < held; ++t) { sum = sum + f(t); }
            return sum;
        }
        else {
            return sum_of(f);
        }
    }
    /// +0 + f(0) + f(1) + … over the tasks, in order.
    template <class F>
    [[nodiscard]] TASKVEC_INLINE pack sum_of(const F& f) const
    {
        pack sum{};
        each([&](std::size_t t) TASKVEC_BODY { sum = sum + f(t); });
        return sum;
    }
    /// f(t) for every task, in order.
    template <class F>
    TASKVEC_INLINE void each(const F& f) const
    {
        if constexpr (held > 0) {
            TASKVEC_UNROLL(8)
            for (std::size_t t = 0; t < held; ++t) { f(t); }
        }
        else {
            const std::size_t count = run_->task_count;
            for (std::size_t t = 0; t < count; ++t) { f(t); }
        }
    }
    /// f as a list that may be asked for each task several times: the first of them kept, in registers where their
    /// number is known, what comes after them computed again. see(t, f(t)) is called for every task, in order.
    template <class F>
    class list {
    public:
        template <class See>
        TASKVEC_INLINE list(const entries& in, const F& f, const See& see)
            : f_(f)
        {
            if constexpr (held > 0) {
                TASKVEC_UNROLL(8)
                for (std::size_t t = 0; t < held; ++t) { see(t, kept_[t] = f(t)); }
            }
            else {
                const std::size_t count = in.tasks() < room ? in.tasks() : room;
                for (std::size_t t = 0; t < count; ++t) { see(t, kept_[t] = f(t)); }
                for (std::size_t t = room; t < in.tasks(); ++t) { see(t, f(t)); }
            }
        }
        [[nodiscard]] TASKVEC_INLINE pack operator()(std::size_t t) const
        {
            if constexpr (held > 0) { return kept_[t]; }
            else {
                return t < room ? kept_[t] : f_(t);
            }
        }

    private:
        static constexpr std::size_t room = held > 0 ? held : 16;
        const F& f_;
        pack kept_[room];
    };
    template <class F, class See>
    [[nodiscard]] TASKVEC_INLINE list<F> list_of(const F& f, const See& see) const
    {
        return list<F>(*this, f, see);
    }

    /// Adds the entries that a mask holds for to a count.
    TASKVEC_INLINE void count(std::size_t slot, const mask& chosen) const noexcept
    {
        counts_[slot].lanes -= chosen.lanes;
    }
    /// Whether statistics are asked for; and a count for each task.
    [[nodiscard]] TASKVEC_INLINE bool counts_tasks() const noexcept
    {
        if constexpr (held > 0) { return false; }
        else {
            return counts_of_tasks_ != nullptr;
        }
    }
    TASKVEC_INLINE void count_of(std::size_t slot, std::size_t t, const mask& chosen) const noexcept
    {
        counts_of_tasks_[slot * run_->task_count + t].lanes -= chosen.lanes;
    }
    /// Tells the walk of a value that NaN and infinity in an input cannot but reach (bodies with `watches`).
    TASKVEC_INLINE void watch(const pack& x) const noexcept { *largest_ = larger(*largest_, magnitude_of(x)); }

private:
    const entry_run<T>* run_;
    std::size_t at_;
    const stored *base_, *tasks_;
    words *counts_, *counts_of_tasks_, *largest_;
};

/// Calls a body for every pack of a run: whole lines of 64 bytes with vectors, any number of entries with scalars.
template <storage_element T, int held, class Body>
struct merge_kernel {
    using number = arithmetic_type<T>;
    static constexpr std::size_t line = 64 / sizeof(T);

    const Body& body;
    const entry_run<T>& run_of;
    run_findings<number>& findings;
    std::int32_t* lanes_of_tasks; ///< room for the lanes of task_slots · tasks counts; null: not counted
    std::size_t task_slots;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        using stored = stored_pack<T, bytes>;
        using words = typename stored::pack_type::words;
        const Body merge = body;
        const entry_run<T> in = run_of;
        constexpr std::size_t group = bytes == 0 ? 1 : line, step = stored::entries;
        words counts[merge_tally::slot_count]{}, largest{};
        words* const of_tasks = reinterpret_cast<words*>(lanes_of_tasks);
        const storage_word<T>* x[held > 0 ? held : 1];
        if constexpr (held > 0) {
            TASKVEC_UNROLL(8)
            for (int t = 0; t < held; ++t) { x[t] = static_cast<const storage_word<T>*>(in.tasks[t]); }
        }
        storage_word<T>* TASKVEC_RESTRICT out = in.out - in.first;
        const std::size_t last = in.first + in.size;
        for (std::size_t i = in.first; i + group <= last; i += group) {
            if constexpr (bytes > 0) {
                if constexpr (held > 0) {
                    TASKVEC_UNROLL(8)
                    for (int t = 0; t < held; ++t) { fetch(x[t] + i); }
                }
                else {
                    for (std::size_t t = 0; t < in.task_count; ++t) {
                        fetch(static_cast<const storage_word<T>*>(in.tasks[t]) + i);
                    }
                }
                if (in.base) { fetch(in.base + i); }
            }
            TASKVEC_UNROLL(1)
            for (std::size_t at = i; at < i + group; at += step) {
                stored base, tasks[held > 0 ? held : 1], made;
                if (in.base) { base.load(in.base + at); }
                else {
                    base.raw = decltype(base.raw){};
                }
                if constexpr (held > 0) {
                    TASKVEC_UNROLL(8)
                    for (int t = 0; t < held; ++t) { tasks[t].load(x[t] + at); }
                }
                {
                    entries<T, bytes, held, 0> part(in, at, base, tasks, counts, of_tasks, largest);
                    watch_inputs(part);
                    made.template put<0>(merge(part));
                }
                if constexpr (stored::parts == 2) {
                    entries<T, bytes, held, 1> part(in, at, base, tasks, counts, of_tasks, largest);
                    watch_inputs(part);
                    made.template put<1>(merge(part));
                }
                made.store(out + at);
            }
        }
        for (std::size_t k = 0; k < merge_tally::slot_count; ++k) { findings.tally->counts[k] += added_up(&counts[k]); }
        findings.largest = largest_lane(&largest, findings.largest);
        if constexpr (held == 0) {
            if (of_tasks) {
                for (std::size_t k = 0; k < task_slots * in.task_count; ++k) {
                    findings.tally->of_tasks[k] += added_up(of_tasks + k);
                    of_tasks[k] = words{};
                }
            }
        }
    }

private:
    template <class Word>
    static TASKVEC_INLINE void fetch(const Word* words) noexcept
    {
        TASKVEC_PREFETCH(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(words) + 4096), 3);
    }
    template <class In>
    static TASKVEC_INLINE void watch_inputs(const In& in) noexcept
    {
        if constexpr (!Body::watches) {
            if (in.has_base()) { in.watch(in.base()); }
            in.each([&](std::size_t t) TASKVEC_BODY { in.watch(in.task(t)); });
        }
    }
    template <class Words>
    static TASKVEC_INLINE std::uint64_t added_up(const Words* words) noexcept
    {
        using word = typename Words::word;
        word lanes[sizeof(Words) / sizeof(word)];
        std::memcpy(lanes, words, sizeof lanes);
        std::uint64_t sum = 0;
        for (const word lane : lanes) { sum += static_cast<std::uint64_t>(lane); }
        return sum;
    }
    template <class Words>
    static TASKVEC_INLINE bits_type<number> largest_lane(const Words* words, bits_type<number> largest) noexcept
    {
        using word = typename Words::word;
        word lanes[sizeof(Words) / sizeof(word)];
        std::memcpy(lanes, words, sizeof lanes);
        for (const word lane : lanes) {
            largest = static_cast<bits_type<number>>(lane) > largest ? static_cast<bits_type<number>>(lane) : largest;
        }
        return largest;
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_ENTRIES_HPP

// ---- taskvec/methods/walk.hpp
#if !defined(TASKVEC_SINGLE_METHODS_WALK_HPP)
#define TASKVEC_SINGLE_METHODS_WALK_HPP
// The walk that merges on the CPU: chunks on threads, blocks in kernels, results past the cache.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/random_words.hpp
#if !defined(TASKVEC_SINGLE_CORE_RANDOM_WORDS_HPP)
#define TASKVEC_SINGLE_CORE_RANDOM_WORDS_HPP
// Random words of many elements at once: what random_stream gives one by one, in vectors.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/random.hpp
#if !defined(TASKVEC_SINGLE_CORE_RANDOM_HPP)
#define TASKVEC_SINGLE_CORE_RANDOM_HPP
// Counter-based random numbers: the same draw for an element wherever, and in whatever order, it is processed.
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/hash.hpp
#if !defined(TASKVEC_SINGLE_CORE_HASH_HPP)
#define TASKVEC_SINGLE_CORE_HASH_HPP
// XXH64 (the xxHash specification by Yann Collet): the 64-bit hash behind fingerprints and random streams.
// SPDX-License-Identifier: Apache-2.0


#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// Streaming XXH64. The result depends on the bytes alone, not on how they were split into updates.
///
///     xxh64 hash;
///     hash.update(data, size);
///     std::uint64_t value = hash.digest();
class xxh64 {
public:
    /// Begins a hash; the seed is XXH64's.
    explicit constexpr xxh64(std::uint64_t seed = 0) noexcept
        : lanes_{seed + p1 + p2, seed + p2, seed, seed - p1}
        , seed_(seed)
    { }

    /// Goes on with `size` bytes.
    void update(const void* data, std::size_t size) noexcept
    {
        const auto* bytes = static_cast<const unsigned char*>(data);
        total_ += size;
        if (size < 32 && held_ + size < 32) { // (the first half for compilers that take the sum for one that wraps)
            if (size) { std::memcpy(buffer_ + held_, bytes, size); }
            held_ += size;
            return;
        }
        if (held_) {
            const std::size_t missing = 32 - held_;
            std::memcpy(buffer_ + held_, bytes, missing);
            bytes += missing;
            size -= missing;
            stripe(buffer_);
        }
        for (; size >= 32; bytes += 32, size -= 32) { stripe(bytes); }
        if (size) { std::memcpy(buffer_, bytes, size); }
        held_ = size;
    }
    void update(std::string_view text) noexcept { update(text.data(), text.size()); }

    /// The hash of all that was given so far, which may go on.
    [[nodiscard]] std::uint64_t digest() const noexcept
    {
        std::uint64_t h;
        if (total_ >= 32) {
            h = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) + std::rotl(lanes_[3], 18);
            for (const auto lane : lanes_) { h = (h ^ round(0, lane)) * p1 + p4; }
        }
        else {
            h = seed_ + p5;
        }
        h += total_;
        std::size_t at = 0;
        for (; at + 8 <= held_; at += 8) {
            h = std::rotl(h ^ round(0, read<std::uint64_t>(buffer_ + at)), 27) * p1 + p4;
        }
        if (at + 4 <= held_) {
            h = std::rotl(h ^ (read<std::uint32_t>(buffer_ + at) * p1), 23) * p2 + p3;
            at += 4;
        }
        for (; at < held_; ++at) { h = std::rotl(h ^ (buffer_[at] * p5), 11) * p1; }
        h = (h ^ (h >> 33)) * p2;
        h = (h ^ (h >> 29)) * p3;
        return h ^ (h >> 32);
    }

private:
    static_assert(std::endian::native == std::endian::little, "taskvec reads and writes little-endian files in place");
    static constexpr std::uint64_t p1 = 0x9E3779B185EBCA87ull, p2 = 0xC2B2AE3D27D4EB4Full, p3 = 0x165667B19E3779F9ull,
                                   p4 = 0x85EBCA77C2B2AE63ull, p5 = 0x27D4EB2F165667C5ull;
    template <class Word>
    static std::uint64_t read(const unsigned char* bytes) noexcept
    {
        Word word;
        std::memcpy(&word, bytes, sizeof word);
        return word;
    }
    static constexpr std::uint64_t round(std::uint64_t lane, std::uint64_t input) noexcept
    {
        return std::rotl(lane + input * p2, 31) * p1;
    }
    void stripe(const unsigned char* bytes) noexcept
    {
        for (std::size_t i = 0; i < 4; ++i) { lanes_[i] = round(lanes_[i], read<std::uint64_t>(bytes + 8 * i)); }
    }

    std::uint64_t lanes_[4];
    std::uint64_t seed_;
    std::uint64_t total_ = 0;
    std::size_t held_ = 0;
    unsigned char buffer_[32] = {};
};

/// XXH64 of a string.
[[nodiscard]] inline std::uint64_t hash64(std::string_view text, std::uint64_t seed = 0) noexcept
{
    xxh64 hash(seed);
    hash.update(text);
    return hash.digest();
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_HASH_HPP

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// What Philox4x32-10 consists of.
inline constexpr int philox_rounds = 10;
/// What the first and the third word of a counter are multiplied by in each round.
inline constexpr std::array<std::uint32_t, 2> philox_multipliers{0xD2511F53u, 0xCD9E8D57u};
/// The key of the next round.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::array<std::uint32_t, 2> next_philox_key(
    std::array<std::uint32_t, 2> key) noexcept
{
    return {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
}
/// One block of Philox4x32-10: four random words for a 128-bit counter and a 64-bit key.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::array<std::uint32_t, 4> philox4x32(
    std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) noexcept
{
    for (int round = 0; round < philox_rounds; ++round) {
        const std::uint64_t a = std::uint64_t{philox_multipliers[0]} * counter[0];
        const std::uint64_t b = std::uint64_t{philox_multipliers[1]} * counter[2];
        counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
            static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
        key = next_philox_key(key);
    }
    return counter;
}

/// The random numbers of one (seed, task, tensor name): element i's draw is a function of these and i alone.
/// Key: XXH64 of the name seeded with `seed`. Counter: (i / 4, task, 0) as (low word, high word, task, 0); word i
/// mod 4.
///
///     random_stream stream(seed, task, "layer.weight");
///     bool keep = stream.word(i) < keep_below(density);
class random_stream {
public:
    /// The numbers of (seed, task, tensor name).
    random_stream(std::uint64_t seed, std::uint32_t task, std::string_view name) noexcept
        : random_stream(hash64(name, seed), task)
    { }
    /// The same by the key, the hash of name and seed.
    TASKVEC_HOST_DEVICE constexpr random_stream(std::uint64_t key, std::uint32_t task) noexcept
        : key_{static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)}
        , task_(task)
    { }

    /// The key of the first round.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::array<std::uint32_t, 2> key() const noexcept { return key_; }
    /// Which task's numbers they are.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint32_t task() const noexcept { return task_; }
    /// The four words of elements 4·block … 4·block + 3.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::array<std::uint32_t, 4> words(std::uint64_t block) const noexcept
    {
        return philox4x32(
            {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), task_, 0u}, key_);
    }
    /// A uniform 32-bit word for element `index`.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint32_t word(std::uint64_t index) const noexcept
    {
        return words(index / 4)[index % 4];
    }
    /// Uniform in [0, 1), a multiple of 2^-32.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr double uniform(std::uint64_t index) const noexcept
    {
        return word(index) * 0x1p-32;
    }
    /// Standard normal, by Box and Muller: elements 2j and 2j + 1 are pair j.
    [[nodiscard]] std::array<double, 2> normal_pair(std::uint64_t pair) const noexcept
    {
        const auto four = words(pair);
        const double u = static_cast<double>(((std::uint64_t{four[0]} << 32 | four[1]) >> 11) + 1) * 0x1p-53; // (0, 1]
        const double v = static_cast<double>((std::uint64_t{four[2]} << 32 | four[3]) >> 11) * 0x1p-53; // [0, 1)
        const double radius = std::sqrt(-2.0 * std::log(u)), angle = 2.0 * std::numbers::pi * v;
        return {radius * std::cos(angle), radius * std::sin(angle)};
    }
    /// Standard normal: a half of the element's pair.
    [[nodiscard]] double normal(std::uint64_t index) const noexcept { return normal_pair(index / 2)[index % 2]; }

private:
    std::array<std::uint32_t, 2> key_;
    std::uint32_t task_;
};

/// An element is kept with probability `density` when its word is below this: density·2^32, rounded.
[[nodiscard]] inline std::uint64_t keep_below(double density) noexcept
{
    return static_cast<std::uint64_t>(std::llround(density * 0x1p32));
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_RANDOM_HPP

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// Where the words of consecutive elements go.
enum class word_order : std::uint8_t {
    in_sequence, ///< one behind the other
    halves ///< those of even elements, and after `half` words those of odd ones: as stored_pack takes 16-bit types
           ///< apart
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// The words of 4·blocks elements from 4·first on, less 2³¹. Philox is computed on one lane of 64 bits for each block,
/// whose lower half holds a word of the counter.
template <word_order order>
struct random_words_kernel {
    random_stream stream;
    std::uint64_t first;
    std::size_t blocks;
    std::int32_t* words;
    std::size_t half; ///< words before those of odd elements

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t block = 0;
#if TASKVEC_VECTORS() && defined(__x86_64__)
        if constexpr (bytes > 0) { block = vectors<bytes>(); }
#endif
        for (; block < blocks; ++block) {
            const auto four = stream.words(first + block);
            for (std::size_t j = 0; j < 4; ++j) {
                const auto word = static_cast<std::int32_t>(four[j] ^ 0x80000000u);
                if constexpr (order == word_order::in_sequence) { words[4 * block + j] = word; }
                else {
                    words[j % 2 * half + 2 * block + j / 2] = word;
                }
            }
        }
    }

private:
#if TASKVEC_VECTORS() && defined(__x86_64__)
    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE std::size_t vectors() const
    {
        using lanes = typename taskvec::detail::vector_of<std::uint64_t, bytes>::type;
        constexpr std::size_t width = sizeof(lanes) / sizeof(std::uint64_t);
        constexpr std::uint64_t lower = 0xffffffffu, signs = 0x8000000080000000u;
        lanes keys[2][philox_rounds], place{};
        auto key = stream.key();
        for (int round = 0; round < philox_rounds; ++round) {
            keys[0][round] = lanes{} + key[0];
            keys[1][round] = lanes{} + key[1];
            key = next_philox_key(key);
        }
        for (std::size_t lane = 0; lane < width; ++lane) { place[lane] = first + lane; }
        const lanes by_first = lanes{} + std::uint64_t{philox_multipliers[0]},
                    by_second = lanes{} + std::uint64_t{philox_multipliers[1]};
        std::size_t block = 0;
        for (; block + width <= blocks; block += width) {
            lanes c0 = place, c1 = place >> 32, c2 = lanes{} + std::uint64_t{stream.task()}, c3{};
            TASKVEC_UNROLL(10)
            for (int round = 0; round < philox_rounds; ++round) {
                lanes a = c0, b = c2;
                multiply_lower(a, by_first);
                multiply_lower(b, by_second);
                c0 = (b >> 32) ^ c1 ^ keys[0][round];
                c1 = b;
                c2 = (a >> 32) ^ c3 ^ keys[1][round];
                c3 = a;
            }
            if constexpr (order == word_order::in_sequence) {
                const lanes front = (((c0 & lower) | (c1 << 32)) ^ signs), back = (((c2 & lower) | (c3 << 32)) ^ signs);
                std::int32_t* const out = words + 4 * block;
                if constexpr (bytes == 64) {
                    put(__builtin_shufflevector(front, back, 0, 8, 1, 9, 2, 10, 3, 11), out);
                    put(__builtin_shufflevector(front, back, 4, 12, 5, 13, 6, 14, 7, 15), out + 16);
                }
                else if constexpr (bytes == 32) {
                    put(__builtin_shufflevector(front, back, 0, 4, 1, 5), out);
                    put(__builtin_shufflevector(front, back, 2, 6, 3, 7), out + 8);
                }
                else {
                    put(__builtin_shufflevector(front, back, 0, 2), out);
                    put(__builtin_shufflevector(front, back, 1, 3), out + 4);
                }
            }
            else {
                put(((c0 & lower) | (c2 << 32)) ^ signs, words + 2 * block);
                put(((c1 & lower) | (c3 << 32)) ^ signs, words + half + 2 * block);
            }
            place = place + width;
        }
        return block;
    }
    template <class Lanes>
    static TASKVEC_INLINE void put(const Lanes& x, std::int32_t* out) noexcept
    {
        using anywhere = typename taskvec::detail::vector_of<std::uint64_t, sizeof(Lanes)>::anywhere;
        *reinterpret_cast<anywhere*>(out) = x;
    }
    /// x becomes the product of its lanes' lower halves with those of y. (g++ 12 would multiply whole lanes.)
    template <class Lanes>
    static TASKVEC_INLINE void multiply_lower(Lanes& x, const Lanes& y) noexcept
    {
#if defined(__clang__)
        x = (x & 0xffffffffu) * (y & 0xffffffffu);
#else
        if constexpr (sizeof(Lanes) == 16) { asm("pmuludq %1, %0" : "+x"(x) : "x"(y)); }
        else {
            asm("vpmuludq %1, %0, %0" : "+v"(x) : "v"(y));
        }
#endif
    }
#endif
};

TASKVEC_KERNELS_END

} // namespace kernels

/// out[i] = stream.word(4·first + i) − 2³¹ for i < 4·blocks: the same words on every processor. In halves, `half` words
/// lie before those of odd elements. Cost: about a seventh of word() of each.
///
///     std::int32_t words[64];
///     random_words<word_order::in_sequence>(random_stream(7, 0, "layer.weight"), 0, 16, words);
template <word_order order>
void random_words(
    const random_stream& stream, std::uint64_t first, std::size_t blocks, std::int32_t* out, std::size_t half = 0)
{
    kernels::run_widest(kernels::random_words_kernel<order>{stream, first, blocks, out, half});
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_RANDOM_WORDS_HPP

// ---- taskvec/methods/passes.hpp
#if !defined(TASKVEC_SINGLE_METHODS_PASSES_HPP)
#define TASKVEC_SINGLE_METHODS_PASSES_HPP
// What a method may ask for before the walk that merges: sums over the models, and memory for tables that bodies read.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/models/operand_pair.hpp
#if !defined(TASKVEC_SINGLE_MODELS_OPERAND_PAIR_HPP)
#define TASKVEC_SINGLE_MODELS_OPERAND_PAIR_HPP
// Pairs of operands of a tensor, whose dot products algorithms ask for.
// SPDX-License-Identifier: Apache-2.0


#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// Two operands of a tensor by number: 0 is the base, 1 + t task t, and 1 + T + b what lies beside the models (T
/// tasks).
struct operand_pair {
    std::uint32_t first = 0, second = 0; ///< numbers of operands
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_OPERAND_PAIR_HPP

// ---- taskvec/models/tensor_sums.hpp
#if !defined(TASKVEC_SINGLE_MODELS_TENSOR_SUMS_HPP)
#define TASKVEC_SINGLE_MODELS_TENSOR_SUMS_HPP
// Sums of a fixed shape: the same bits for any number of threads and any blocks.
// SPDX-License-Identifier: Apache-2.0


#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For every tensor a list of sums over its elements, each Σ over blocks of what `term` returns, in a fixed pairwise
/// shape. `term(block, sums)` adds nothing: it stores `width` block sums. Result: [tensor][which]. Cost: one walk.
template <class Types = storage_types, class Term>
[[nodiscard]] call_vector<call_vector<double>> tensor_sums(const cpu& policy, const aligned_models& models,
    std::size_t width, std::size_t scratch_rows, std::string_view phase, Term&& term);

namespace detail {

/// Adds block sums as they come in order, by a binary counter: the shape of a pairwise sum, in O(log n) memory.
class pairwise_sum {
public:
    void add(double value) noexcept
    {
        std::size_t level = 0;
        for (std::uint64_t bits = count_++; bits & 1u; bits >>= 1) { value = partial_[level++] + value; }
        partial_[level] = value;
    }
    [[nodiscard]] double total() const noexcept
    {
        double sum = 0;
        bool any = false;
        std::size_t level = 0;
        for (std::uint64_t bits = count_; bits; bits >>= 1, ++level) {
            if (bits & 1u) {
                sum = any ? partial_[level] + sum : partial_[level];
                any = true;
            }
        }
        return sum;
    }

private:
    std::array<double, 64> partial_{};
    std::uint64_t count_ = 0;
};

} // namespace detail

template <class Types, class Term>
call_vector<call_vector<double>> tensor_sums(const cpu& policy, const aligned_models& models, std::size_t width,
    std::size_t scratch_rows, std::string_view phase, Term&& term)
{
    // Blocks are the leaves, whatever the chunks are.
    call_vector<std::size_t> first_block(1, 0);
    for (const auto& tensor : models.tensors()) {
        first_block.push_back(first_block.back() + (tensor.size + block_size - 1) / block_size);
    }
    if (models.options().chunk % block_size != 0) {
        const aligned_models whole_blocks(models, (models.options().chunk / block_size + 1) * block_size);
        return tensor_sums<Types>(policy, whole_blocks, width, scratch_rows, phase, std::forward<Term>(term));
    }
    std::pmr::vector<double> leaves(first_block.back() * width, memory_of(policy));
    for_each_block<Types>(
        policy, models, all_chunks(models), scratch_rows, phase, [&](std::size_t index, std::size_t, auto& rows) {
            const std::size_t leaf =
                first_block[models.chunks()[index].tensor] + static_cast<std::size_t>(rows.offset() / block_size);
            term(rows, leaves.data() + leaf * width);
        });
    call_vector<call_vector<double>> sums(models.tensors().size(), call_vector<double>(width));
    for (std::size_t i = 0; i < sums.size(); ++i) {
        for (std::size_t which = 0; which < width; ++which) {
            detail::pairwise_sum sum;
            for (std::size_t leaf = first_block[i]; leaf < first_block[i + 1]; ++leaf) {
                sum.add(leaves[leaf * width + which]);
            }
            sums[i][which] = sum.total();
        }
    }
    return sums;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_TENSOR_SUMS_HPP

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The passes of the cpu policy. device_passes (device/methods) has the same interface; what needs a walk is a
/// function: tensor_dots(passes, pairs, difference) here, trim_thresholds_of(passes, …) in select/thresholds.hpp.
class cpu_passes {
public:
    /// Over models, on this policy, all of which it refers to; `beside`: what a method reads beside them.
    cpu_passes(const cpu& policy, const aligned_models& models, std::span<const aligned_tensor::operand> beside = {})
        : policy_(&policy)
        , models_(&models)
        , beside_(beside)
    { }
    // Name both first: they are referred to.
    cpu_passes(const cpu&&, const aligned_models&, std::span<const aligned_tensor::operand> = {}) = delete;
    cpu_passes(const cpu&, const aligned_models&&, std::span<const aligned_tensor::operand> = {}) = delete;

    /// Where the passes run.
    [[nodiscard]] const cpu& policy() const noexcept { return *policy_; }
    /// The models that are merged.
    [[nodiscard]] const aligned_models& models() const noexcept { return *models_; }
    /// How many tasks there are.
    [[nodiscard]] std::size_t tasks() const noexcept { return models_->task_count(); }
    static constexpr memory_space space = memory_space::host; ///< Where tables lie.
    /// Operands beside the models, for each tensor.
    [[nodiscard]] std::size_t beside_each() const noexcept
    {
        return models_->tensors().empty() ? 0 : beside_.size() / models_->tensors().size();
    }
    [[nodiscard]] const aligned_tensor::operand& beside(std::size_t tensor, std::size_t b) const noexcept
    {
        return beside_[tensor * beside_each() + b];
    }
    /// A table where bodies can read it; it lives as long as the passes do.
    template <class T, class Allocator>
    [[nodiscard]] const T* keep(std::vector<T, Allocator> table)
    {
        auto kept = std::allocate_shared<std::vector<T, Allocator>>(call_allocator<T>(), std::move(table));
        const T* const data = kept->data();
        tables_.push_back(std::move(kept));
        return data;
    }

private:
    const cpu* policy_;
    const aligned_models* models_;
    std::span<const aligned_tensor::operand> beside_;
    call_vector<std::shared_ptr<const void>> tables_;
};

/// The passes of models that are known, when the program is compiled, to store nothing but the types of a storage_list:
/// no code is made for others.
template <class Types>
class typed_passes : public cpu_passes {
public:
    /// The storage_list that the models' types are of.
    using storage = Types;
    /// As cpu_passes.
    using cpu_passes::cpu_passes;
};

/// Numbers for bodies, rounded to both arithmetic types once.
class kept_numbers {
public:
    /// Keeps `numbers` as long as the passes live, in f32 and in f64.
    template <class Passes>
    kept_numbers(Passes& passes, std::span<const double> numbers)
        : single_(passes.keep(call_vector<float>(numbers.begin(), numbers.end())))
        , wide_(passes.keep(call_vector<double>(numbers.begin(), numbers.end())))
    { }
    /// The numbers in A, where bodies can read them.
    template <arithmetic_element A>
    [[nodiscard]] const A* get() const noexcept
    {
        if constexpr (std::same_as<A, double>) { return wide_; }
        else {
            return single_;
        }
    }

private:
    const float* single_;
    const double* wide_;
};

namespace detail {

/// An operand of a block by number, in A; nullptr where it is not there.
template <arithmetic_element A>
const A* operand_row(const cpu_passes& passes, row_block<A>& rows, std::uint32_t which, A* scratch)
{
    if (which == 0) { return rows.tensor().base.data ? rows.base() : nullptr; }
    if (which <= rows.task_count()) { return rows.task(which - 1); }
    const auto& from = passes.beside(rows.tensor_index(), which - 1 - rows.task_count());
    if (!from.data) { return nullptr; }
    bits_type<A> ignored = 0;
    return rows.beside(from, scratch, ignored);
}

} // namespace detail

/// The dot products of pairs of operands over every tensor, [tensor][pair], in f64 with a fixed shape: the same bits
/// for any threads, blocks and policy. `difference`: of task vectors instead of tasks. An operand that is not there
/// counts as 0. One read of the models.
///
///     const auto squares = tensor_dots(passes, {{1, 1}}, true); // ‖τ1‖² of every tensor
template <std::derived_from<cpu_passes> Passes>
[[nodiscard]] call_vector<call_vector<double>> tensor_dots(
    Passes& passes, std::span<const operand_pair> pairs, bool difference, std::string_view phase = "sums")
{
    const std::size_t tasks = passes.tasks();
    return tensor_sums<storage_of<Passes>>(
        passes.policy(), passes.models(), pairs.size(), 2, phase, [&]<class A>(row_block<A>& rows, double* sum) {
            if (difference) { // they share rows with the tasks: all of them first
                for (std::size_t t = 0; t < tasks; ++t) { (void)rows.delta(t); }
            }
            for (const operand_pair pair : pairs) {
                const auto row = [&](std::uint32_t which, A* scratch) -> const A* {
                    if (difference && which > 0 && which <= tasks && rows.tensor().base.data) {
                        return rows.row(which - 1);
                    }
                    return detail::operand_row(passes, rows, which, scratch);
                };
                if (pair.first > tasks && pair.first == pair.second) { // statistics in f64 not as rounded to A
                    const auto& from = passes.beside(rows.tensor_index(), pair.first - 1 - tasks);
                    if (from.data && from.dtype == dtype::f64 && std::same_as<A, float>) {
                        std::array<double, block_size> raw;
                        *sum++ = detail::with_elements(from, rows.offset(), rows.size(),
                            reinterpret_cast<std::byte*>(raw.data()), [&]<class T>(const T* stored) {
                                if constexpr (std::same_as<T, double>) {
                                    return kernels::dot(stored, stored, rows.size());
                                }
                                else {
                                    return 0.0; // it is f64
                                }
                            });
                        continue;
                    }
                }
                const A* const x = row(pair.first, rows.scratch(0));
                const A* const y = pair.second == pair.first ? x : row(pair.second, rows.scratch(1));
                *sum++ = x && y ? kernels::dot(x, y, rows.size()) : 0.0;
            }
        });
}

/// The same of pairs in braces.
template <std::derived_from<cpu_passes> Passes>
[[nodiscard]] call_vector<call_vector<double>> tensor_dots(
    Passes& passes, std::initializer_list<operand_pair> pairs, bool difference, std::string_view phase = "sums")
{
    return tensor_dots(passes, std::span<const operand_pair>(pairs.begin(), pairs.size()), difference, phase);
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_PASSES_HPP

// ---- taskvec/methods/row_pieces.hpp
#if !defined(TASKVEC_SINGLE_METHODS_ROW_PIECES_HPP)
#define TASKVEC_SINGLE_METHODS_ROW_PIECES_HPP
// Pieces of whole rows: what a walk goes over where a method looks at rows and
// not at single entries.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The length of a tensor's rows, the entries along its last axis: all of a tensor with one axis, 1 of a scalar.
[[nodiscard]] inline std::size_t row_length(const aligned_tensor& tensor) noexcept
{
    return tensor.shape.empty() || tensor.size == 0 ? 1 : static_cast<std::size_t>(tensor.shape.back());
}

/// The included tensors in pieces of some 65,536 entries that hold whole units (rows, say): the same for any threads
/// and chunks. A unit that is longer is a piece by itself. Worked out when they are asked for, as chunk_list is.
class row_pieces {
public:
    static constexpr std::size_t entries = 65536; ///< that a piece has, if its units are not longer

    /// `unit(tensor)`: how many entries belong together; they divide the tensor's size.
    template <class Unit>
    row_pieces(const aligned_models& models, const Unit& unit)
        : models_(&models)
    {
        for (const auto& tensor : models.tensors()) {
            const std::size_t together = std::max<std::size_t>(unit(tensor), 1);
            steps_.push_back(std::max<std::size_t>(entries / together, 1) * together);
            first_of_.push_back(first_of_.back() + (tensor.size + steps_.back() - 1) / steps_.back());
        }
    }
    [[nodiscard]] std::size_t size() const noexcept { return first_of_.back(); }
    [[nodiscard]] tensor_chunk operator[](std::size_t index) const noexcept
    {
        // Of tensors that share a first piece only the last is not empty.
        const auto after = std::upper_bound(first_of_.begin(), first_of_.end(), index);
        const auto tensor = static_cast<std::size_t>(after - first_of_.begin()) - 1;
        const std::size_t offset = (index - first_of_[tensor]) * steps_[tensor];
        return {tensor, offset, std::min(steps_[tensor], models_->tensors()[tensor].size - offset)};
    }
    /// The pieces of a tensor, by number.
    [[nodiscard]] chunk_range of_tensor(std::size_t tensor) const noexcept
    {
        return {first_of_[tensor], first_of_[tensor + 1]};
    }

private:
    const aligned_models* models_;
    call_vector<std::size_t> first_of_ = call_vector<std::size_t>(1, 0), steps_;
};

namespace detail {

/// Rows of A for a piece, one after the other: what a method that looks at rows works with, for each worker.
class piece_memory {
public:
    explicit piece_memory(std::pmr::memory_resource* memory)
        : words_(memory)
    { }
    /// Room for `rows` rows of a piece. What was there is gone.
    template <arithmetic_element A>
    [[nodiscard]] A* rows(std::size_t rows, std::size_t size)
    {
        const std::size_t words = (rows * size * sizeof(A) + sizeof(double) - 1) / sizeof(double);
        if (words_.size() < words) { words_.resize(words); }
        return reinterpret_cast<A*>(words_.data());
    }

private:
    std::pmr::vector<double> words_;
};

/// Goes over pieces that hold the storage types of a list, with the blocks and the memory that each worker needs.
template <class Types>
class piece_walk {
public:
    piece_walk(const cpu& policy, const aligned_models& models, const row_pieces& pieces)
        : policy_(policy)
        , models_(&models)
        , pieces_(&pieces)
        , workspaces_(make_workspaces<Types>(policy, models, pieces.size(), 0))
        , memory_(memory_of(policy))
    {
        for (std::size_t w = 0; w < workspaces_.size(); ++w) { memory_.emplace_back(memory_of(policy)); }
    }
    [[nodiscard]] const cpu& policy() const noexcept { return policy_; }
    [[nodiscard]] std::size_t workers() const noexcept { return workspaces_.size(); }

    /// body(index, worker, rows, piece, memory) for the pieces of a range, in parallel; their bytes go to the meter.
    template <class Body>
    void each(chunk_range range, progress_meter& meter, const Body& body)
    {
        for_each_index(policy_, range.last - range.first, [&](std::size_t offset, std::size_t worker) {
            const tensor_chunk piece = (*pieces_)[range.first + offset];
            with_block_of<Types>(workspaces_[worker], models_->tensors()[piece.tensor],
                [&](auto& rows) { body(range.first + offset, worker, rows, piece, memory_[worker]); });
            if (!meter.advance(models_->bytes(piece))) { raise<cancelled>(error_code::cancelled); }
        });
    }

private:
    const cpu& policy_;
    const aligned_models* models_;
    const row_pieces* pieces_;
    std::pmr::vector<block_workspace> workspaces_;
    std::pmr::vector<piece_memory> memory_;
};

/// The task vectors of a piece, task after task, into out[t·size …].
template <arithmetic_element A>
void read_deltas(row_block<A>& rows, const tensor_chunk& piece, A* out)
{
    for_each_block_of(rows, piece, [&](row_block<A>& opened) {
        for (std::size_t t = 0; t < opened.task_count(); ++t) {
            std::memcpy(
                out + t * piece.size + (opened.offset() - piece.offset), opened.delta(t), opened.size() * sizeof(A));
        }
    });
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_ROW_PIECES_HPP

// ---- taskvec/models/copy_through.hpp
#if !defined(TASKVEC_SINGLE_MODELS_COPY_THROUGH_HPP)
#define TASKVEC_SINGLE_MODELS_COPY_THROUGH_HPP
// The tensors of aligned models that take no part in an algorithm, written as they are.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/models/stored_elements.hpp
#if !defined(TASKVEC_SINGLE_MODELS_STORED_ELEMENTS_HPP)
#define TASKVEC_SINGLE_MODELS_STORED_ELEMENTS_HPP
// Tensors that are worked out, as the words that a file would store of them.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Elements [offset, offset + count) of a source as they are stored in dtype `stored`, rounded to nearest even where
/// that is narrower. `out` has room for them, and is aligned to them. Throws dtype_mismatch for what is no storage
/// type.
inline void read_stored(const operand_source& from, dtype stored, std::uint64_t offset, std::size_t count, void* out)
{
    if (from.type() == stored) {
        from.read(offset, count, out);
        return;
    }
    // Word by word, not by the CPU's kernels: device files copy what is worked out, too, and hold none of those.
    const auto narrowed = [&]<class T, class A>(std::type_identity<T>, A) {
        std::array<A, block_size> values;
        auto* const words = static_cast<storage_word<T>*>(out);
        for (std::size_t at = 0; at < count; at += block_size) {
            const std::size_t n = std::min(block_size, count - at);
            from.read(offset + at, n, values.data());
            for (std::size_t k = 0; k < n; ++k) { words[at + k] = narrow_word<T>(values[k]); }
        }
    };
    visit_storage(stored, "operand", [&]<class T>(std::type_identity<T> as) {
        from.type() == dtype::f64 ? narrowed(as, double{}) : narrowed(as, float{});
    });
}

/// The type that operand_source::read() gives elements of a dtype in.
[[nodiscard]] constexpr dtype read_type(dtype stored) noexcept
{
    return stored == dtype::f64 ? dtype::f64 : dtype::f32;
}

/// Stored words as elements of read_type(stored).
inline void widen_stored(dtype stored, const void* words, std::size_t count, void* out)
{
    if (stored == dtype::f64) {
        (void)conversions_between<double, storage_types>.of(stored, "operand").widen(words, static_cast<double*>(out), count);
    }
    else {
        (void)conversions_between<float, storage_types>.of(stored, "operand").widen(words, static_cast<float*>(out), count);
    }
}

/// Elements of a source as they come back once they have been stored.
class rounded_source final : public operand_source {
public:
    /// Of `from`, which outlives this.
    rounded_source(const operand_source& from, dtype stored)
        : from_(&from)
        , stored_(stored)
    { }
    [[nodiscard]] dtype type() const noexcept override { return read_type(stored_); }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return from_->stored_bits(); }
    void prepare(const cpu& policy) const override { from_->prepare(policy); }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        std::array<double, block_size> words;
        for (std::size_t at = 0; at < count; at += block_size) {
            const std::size_t n = std::min(block_size, count - at);
            read_stored(*from_, stored_, offset + at, n, words.data());
            widen_stored(stored_, words.data(), n, static_cast<std::byte*>(out) + byte_count(type(), at));
        }
    }

private:
    const operand_source* from_;
    dtype stored_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_MODELS_STORED_ELEMENTS_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Writes a tensor that is worked out, as numbers of the output's dtype.
inline void decode_through(
    const cpu& policy, const copied_tensor& tensor, dtype type, tensor_sink& out, progress_meter& meter)
{
    constexpr std::size_t piece = 65536;
    const operand_source& from = *tensor.source.source;
    const std::size_t size = tensor.source.size();
    for_each_index(policy, (size + piece - 1) / piece, [&](std::size_t i, std::size_t) {
        const std::size_t n = std::min(piece, size - i * piece);
        byte_buffer words(memory_of(policy), byte_count(type, n));
        read_stored(from, type, i * piece, n, words.data());
        out.write(tensor.output, byte_count(type, i * piece), words.data(), words.size());
        if (!meter.advance(byte_count(from.type(), n))) { raise<cancelled>(error_code::cancelled); }
    });
}

/// Writes the tensors that take no part.
inline void copy_through(const cpu& policy, const aligned_models& models, tensor_sink& out)
{
    constexpr std::size_t piece = std::size_t{1} << 20;
    std::uint64_t total = 0;
    for (const auto& tensor : models.copied()) { total += tensor.source.bytes(); }
    progress_meter meter(policy, "copy", total);
    for (const auto& tensor : models.copied()) {
        if (!out.wants(tensor.output)) {
            if (!meter.advance(tensor.source.bytes())) { raise<cancelled>(error_code::cancelled); }
            continue;
        }
        if (tensor.source.source) {
            decode_through(policy, tensor, models.outputs()[tensor.output].dtype, out, meter);
            continue;
        }
        const auto* const from = static_cast<const std::byte*>(tensor.source.data);
        const std::size_t size = tensor.source.bytes();
        if (size == 0) { continue; }
        if (out.direct(tensor.output) == from) { // it is there
            if (!meter.advance(size)) { raise<cancelled>(error_code::cancelled); }
            continue;
        }
        for_each_index(policy, (size + piece - 1) / piece, [&](std::size_t i, std::size_t) {
            const std::size_t n = std::min(piece, size - i * piece);
            out.write(tensor.output, i * piece, from + i * piece, n);
            if (!meter.advance(n)) { raise<cancelled>(error_code::cancelled); }
        });
    }
}

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_MODELS_COPY_THROUGH_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory_resource>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Outputs must not overlap inputs, except that a method which reads each element for the last time before it writes
/// it may work in place. What lies beside the models may never be overwritten.
inline void check_aliases(
    const aligned_models& models, tensor_sink& out, bool in_place, std::span<const companion> companions = {})
{
    struct range {
        const std::byte *begin, *end;
        std::size_t tensor;
    };
    call_vector<range> written;
    for (std::size_t i = 0; i < models.tensors().size(); ++i) {
        const auto& tensor = models.tensors()[i];
        if (auto* const begin = static_cast<const std::byte*>(out.direct(tensor.output)); begin && tensor.size > 0) {
            written.push_back({begin, begin + byte_count(tensor.output_dtype, tensor.size), i});
        }
    }
    if (written.empty()) { return; }
    std::sort(
        written.begin(), written.end(), [](const range& a, const range& b) { return std::less<>()(a.begin, b.begin); });
    for (std::size_t i = 1; i < written.size(); ++i) {
        if (std::less<>()(written[i].begin, written[i - 1].end)) {
            raise<invalid_argument>(error_code::alias_output,
                message("the outputs '", models.tensors()[written[i - 1].tensor].name, "' and '",
                    models.tensors()[written[i].tensor].name, "' share memory"));
        }
    }
    const auto check = [&](const std::byte* begin, std::size_t bytes, std::size_t index, bool replaceable) {
        if (!begin || bytes == 0) { return; }
        const std::byte* const end = begin + bytes;
        auto place = std::lower_bound(written.begin(), written.end(), begin,
            [](const range& r, const std::byte* p) { return !std::less<>()(p, r.end); });
        if (place == written.end() || !std::less<>()(place->begin, end)) { return; }
        const bool same = place->tensor == index && place->begin == begin && place->end == end;
        if (!same || !replaceable) {
            raise<invalid_argument>(error_code::alias_output,
                message("the output '", models.tensors()[place->tensor].name, "' shares memory with the input '",
                    models.tensors()[index].name,
                    "': this method cannot work in place there; give it memory of its own"));
        }
    };
    for (std::size_t i = 0; i < models.tensors().size(); ++i) {
        const auto& tensor = models.tensors()[i];
        const auto check_operand = [&](const aligned_tensor::operand& from) {
            if (!from.source) { check(from.data, byte_count(from.dtype, tensor.size), i, in_place); }
        };
        check_operand(tensor.base);
        for (const auto& task : tensor.tasks) { check_operand(task); }
    }
    for (const auto& beside : companions) { check(beside.data, beside.bytes, beside.tensor, false); }
}

/// What a method reads besides the models: operands in the order of tensors(), as many for each, in memory space
/// `space`.
template <class Options>
[[nodiscard]] auto operands_beside(const Options& options, const aligned_models& models, memory_space space)
{
    if constexpr (requires { method<Options>::beside(options, models, space); }) {
        return method<Options>::beside(options, models, space);
    }
    else {
        return call_vector<aligned_tensor::operand>();
    }
}

/// The storage types that a walk over models of some Types may read: all, where something lies beside the models.
template <class Options, class Types>
using read_types = std::conditional_t<requires(const Options& options, const aligned_models& models) {
    method<Options>::beside(options, models, memory_space::host);
}, storage_types, Types>;

/// What lies beside the models as memory that may not be overwritten: operands, or what a method says that has other
/// data.
template <class Options>
[[nodiscard]] auto companions_of(const Options& options, const aligned_models& models, memory_space space,
    std::span<const aligned_tensor::operand> beside)
{
    if constexpr (requires { method<Options>::companions(options, models, space); }) {
        return method<Options>::companions(options, models, space);
    }
    else {
        call_vector<companion> companions;
        for (std::size_t i = 0; i < beside.size(); ++i) {
            const std::size_t tensor = i / (beside.size() / models.tensors().size());
            companions.push_back({tensor, beside[i].data, byte_count(beside[i].dtype, models.tensors()[tensor].size)});
        }
        return companions;
    }
}

/// Stores merged rows as the output's dtype, in place where the sink has memory, otherwise chunk by chunk.
class row_writer {
public:
    row_writer(tensor_sink& out, bool stream, std::pmr::memory_resource* memory, storage_conversions conversions)
        : out_(&out)
        , conversions_(conversions)
        , stream_(stream)
        , buffer_(memory)
    { }

    void open(const aligned_tensor& tensor, const tensor_chunk& piece)
    {
        tensor_ = &tensor;
        piece_ = &piece;
        direct_ = static_cast<std::byte*>(out_->direct(tensor.output));
        bounded_ = 0;
        const std::size_t needed = byte_count(tensor.output_dtype, direct_ ? block_size : piece.size);
        if (buffer_.size() < needed) { buffer_.resize(needed); }
    }
    template <arithmetic_element A>
    void write(std::uint64_t offset, const A* values, std::size_t n)
    {
        const dtype type = tensor_->output_dtype;
        const std::size_t width = bits_per_element(type) / 8;
        const auto& conversion = conversions_.get<A>().of(type, tensor_->name, true);
        if (!direct_) {
            conversion.narrow(values, buffer_.data() + (offset - piece_->offset) * width, n);
            return;
        }
        const void* stored = values;
        if (type != dtype_of<A>) {
            conversion.narrow(values, buffer_.data(), n);
            stored = buffer_.data();
        }
        put(offset * width, stored, n * width);
    }
    /// Whether the output is stored as T; and stored words of T, at `offset` of the tensor.
    template <storage_element T>
    [[nodiscard]] bool stores() const noexcept
    {
        return tensor_->output_dtype == dtype_of<T>;
    }
    template <storage_element T>
    void write_words(std::uint64_t offset, const storage_word<T>* words, std::size_t n)
    {
        if (!direct_) { std::memcpy(buffer_.data() + (offset - piece_->offset) * sizeof(T), words, n * sizeof(T)); }
        else {
            put(offset * sizeof(T), words, n * sizeof(T));
        }
    }
    /// Tells that n entries come of numbers whose largest magnitude has these bits.
    template <arithmetic_element A>
    void came_of(bits_type<A> largest, std::size_t n) noexcept
    {
        if (largest < magnitude_bits(static_cast<A>(0x1p64))) { bounded_ += n; }
    }
    void close()
    {
        if (direct_) {
            if (stream_) { kernels::stream_fence(); }
            return;
        }
        const std::size_t width = bits_per_element(tensor_->output_dtype) / 8;
        const dtype type = tensor_->output_dtype;
        const bool wide_exponent = type == dtype::f32 || type == dtype::bf16 || type == dtype::f64;
        if (wide_exponent && bounded_ == piece_->size) {
            out_->write_bounded(tensor_->output, piece_->offset * width, buffer_.data(), piece_->size * width);
        }
        else {
            out_->write(tensor_->output, piece_->offset * width, buffer_.data(), piece_->size * width);
        }
    }

private:
    void put(std::uint64_t at, const void* from, std::size_t bytes) const
    {
        if (stream_) { kernels::stream_copy(direct_ + at, from, bytes); }
        else {
            std::memcpy(direct_ + at, from, bytes);
        }
    }

    tensor_sink* out_;
    storage_conversions conversions_;
    bool stream_;
    byte_buffer buffer_;
    const aligned_tensor* tensor_ = nullptr;
    const tensor_chunk* piece_ = nullptr;
    std::byte* direct_ = nullptr;
    std::size_t bounded_ = 0; // entries of the chunk that came_of() told of
};

/// Bytes of stored words that a kernel makes before they leave the first-level cache.
inline constexpr std::size_t made_bytes = 4096;

/// What one worker of a merge needs beside its block.
struct merge_scratch {
    explicit merge_scratch(std::pmr::memory_resource* memory)
        : tasks(memory)
        , beside(memory)
        , draws(memory)
        , words(memory)
        , numbers(memory)
        , lanes(memory)
        , weighed(memory)
        , piece_rows(memory)
    { }
    std::pmr::vector<const void*> tasks, beside, draws;
    std::pmr::vector<std::int64_t> words; ///< behind draws: for each task, a block of signed words
    std::pmr::vector<double> numbers; ///< behind beside, where it is not read in place
    std::pmr::vector<std::int32_t> lanes; ///< counts of tasks
    piece_memory weighed, piece_rows; ///< of methods that look at rows: what they made of a piece, and what they need
    const void* weighed_rows = nullptr;
    tensor_chunk piece{};
    alignas(64) std::byte made[made_bytes];
};

/// Whether a method looks at whole rows before their entries are merged: see elementwise_method.
template <class Method>
concept looks_at_rows = requires(const Method& m) { m.pieces(); };

/// What a walk goes over: chunks, or pieces of whole rows.
template <class Method>
[[nodiscard]] decltype(auto) walked_pieces(const Method& prepared, const aligned_models& models)
{
    if constexpr (looks_at_rows<Method>) { return prepared.pieces(); }
    else {
        return models.chunks();
    }
}

/// Calls use(body) with the body of a tensor: a method has one, or chooses between several.
template <arithmetic_element A, class Method, class Use>
decltype(auto) visit_body(const Method& prepared, std::size_t tensor, Use&& use)
{
    if constexpr (requires { prepared.template with_body<A>(tensor, use); }) {
        return prepared.template with_body<A>(tensor, use);
    }
    else {
        return use(prepared.template body<A>(tensor));
    }
}

/// The words of a stream for entries [offset, offset + n) of a tensor, less 2³¹, in the order in which kernels of T
/// take them (entry_run::draws). Blocks start at multiples of 64, and there is room for a whole one.
template <storage_element T>
void fill_draws(
    const random_stream& stream, std::uint64_t offset, signed_word<arithmetic_type<T>>* words, std::size_t n)
{
    if constexpr (std::same_as<arithmetic_type<T>, double>) {
        for (std::size_t i = 0; i < n; i += 4) {
            const auto four = stream.words((offset + i) / 4);
            for (std::size_t j = 0; j < 4; ++j) { words[i + j] = std::int64_t{four[j]} - (std::int64_t{1} << 31); }
        }
    }
    else {
        constexpr auto order = sizeof(T) == sizeof(float) ? word_order::in_sequence : word_order::halves;
        random_words<order>(stream, offset / 4, (n + 3) / 4, words, block_size / 2);
    }
}

/// Tallies of nothing, that count in memory of `memory`.
[[nodiscard]] inline std::pmr::vector<merge_tally> empty_tallies(std::size_t count, std::pmr::memory_resource* memory)
{
    std::pmr::vector<merge_tally> tallies(memory);
    tallies.reserve(count);
    for (std::size_t i = 0; i < count; ++i) { tallies.emplace_back(memory); }
    return tallies;
}

/// What the counts of tasks say in a report.
inline void report_tally(const merge_tally& tally, std::size_t tasks, merge_report& report)
{
    const auto slot = [&](std::size_t k, std::vector<std::uint64_t>& to) {
        if (tally.of_tasks.size() < (k + 1) * tasks) { return; }
        const auto first = tally.of_tasks.begin() + static_cast<std::ptrdiff_t>(k * tasks);
        to.assign(first, first + static_cast<std::ptrdiff_t>(tasks));
    };
    slot(0, report.kept);
    slot(1, report.conflicting);
}

/// Runs the kernel that is compiled for just as many tasks as there are; false where there is none.
template <storage_element T, int... number, class Body>
bool run_held(std::integer_sequence<int, number...>, const Body& body, const kernels::entry_run<T>& run,
    std::size_t task_slots, kernels::run_findings<arithmetic_type<T>>& findings)
{
    return ((run.task_count == number ? (kernels::run_widest(kernels::merge_kernel<T, number, Body>{
                                             body, run, findings, nullptr, task_slots}),
                                            true)
                                      : false)
        || ...);
}

/// Calls the kernel of a body for as many tasks as there are: compiled for a few numbers, or for any.
template <storage_element T, class Body>
void run_kernel(const Body& body, const kernels::entry_run<T>& run, std::int32_t* lanes, std::size_t task_slots,
    kernels::run_findings<arithmetic_type<T>>& findings)
{
    constexpr std::size_t line = kernels::merge_kernel<T, 0, Body>::line;
    const std::size_t whole = current_instruction_set() == instruction_set::scalar ? 0 : run.size / line * line;
    if (whole > 0) {
        kernels::entry_run<T> lines = run;
        lines.size = whole;
        bool done = false;
        // The types that models are mostly stored as.
        if constexpr (requires { Body::held; } && (std::same_as<T, float> || std::same_as<T, bf16>)) {
            if (!lanes) { done = run_held<T>(Body::held, body, lines, task_slots, findings); }
        }
        if (!done) { kernels::run_widest(kernels::merge_kernel<T, 0, Body>{body, lines, findings, lanes, task_slots}); }
    }
    if (whole < run.size) {
        kernels::entry_run<T> rest = run;
        rest.first += whole;
        rest.size -= whole;
        rest.out += whole;
        kernels::run_scalar(kernels::merge_kernel<T, 0, Body>{body, rest, findings, lanes, task_slots});
    }
}

/// Merges the entries of an opened block that `run` points to, and writes the words of T where take(first, words,
/// count) puts them.
template <storage_element T, class Body, class Take>
void run_body(const Body& body, kernels::entry_run<T> run, merge_scratch& scratch, std::size_t task_slots,
    kernels::run_findings<arithmetic_type<T>>& findings, const Take& take)
{
    std::int32_t* lanes = nullptr;
    if (task_slots > 0) {
        findings.tally->of_tasks.resize(task_slots * run.task_count);
        scratch.lanes.assign(task_slots * run.task_count * 16 + 16, 0);
        const auto place = reinterpret_cast<std::uintptr_t>(scratch.lanes.data());
        lanes = scratch.lanes.data() + (64 - place % 64) % 64 / sizeof(std::int32_t);
    }
    constexpr std::size_t group = made_bytes / sizeof(T);
    auto* const made = reinterpret_cast<storage_word<T>*>(scratch.made);
    const std::size_t n = run.size;
    const std::uint64_t place = run.place;
    for (std::size_t begin = 0; begin < n; begin += group) {
        const std::size_t end = std::min(n, begin + group);
        for (std::size_t at = begin; at < end;) {
            std::size_t until = end;
            if constexpr (requires { body.constant_until(place, place); }) {
                until = static_cast<std::size_t>(body.constant_until(place + at, place + end) - place);
            }
            run.first = at;
            run.size = until - at;
            run.place = place + at;
            run.out = made + (at - begin);
            run_kernel<T>(body, run, lanes, task_slots, findings);
            at = until;
        }
        take(begin, made, end - begin);
    }
}

/// Reports what may not lie beside the models: NaN and infinity, and where the method says so what is negative.
template <class Method, arithmetic_element A>
void examine_beside(
    const Method& prepared, const row_block<A>& rows, std::size_t b, const A* values, bits_type<A> largest)
{
    const bool wrong = largest >= exponent_mask<A> && rows.models().options().on_nonfinite == nonfinite::error;
    bool negative = false;
    if constexpr (requires { Method::beside_not_negative; }) {
        negative = kernels::any_below(values, A{0}, rows.size());
    }
    if (!wrong && !negative) { return; }
    for (std::size_t i = 0; i < rows.size(); ++i) {
        if (wrong ? !std::isfinite(values[i]) : values[i] < 0) {
            prepared.refuse_beside(
                rows.models(), rows.tensor_index(), b, static_cast<double>(values[i]), rows.offset() + i);
        }
    }
}

/// Merges an opened block by a body, and writes it: from stored words to stored words where everything is stored as one
/// type, otherwise through rows of the arithmetic type. (A class, as nvcc's front end fails on the lambdas that would
/// do.)
template <class Method, class Body, class Passes, arithmetic_element A>
class block_merge {
    static constexpr bool with_beside = requires { Body::reads_beside; };
    static constexpr bool with_draws = requires(const Body& body) { body.stream(std::size_t{}); };

public:
    block_merge(const Method& prepared, const Body& body, const Passes& passes, row_block<A>& rows, row_writer& writer,
        merge_scratch& scratch, std::size_t task_slots, merge_tally& tally)
        : body_(body)
        , rows_(rows)
        , writer_(writer)
        , scratch_(scratch)
        , task_slots_(task_slots)
        , findings_{&tally, 0}
    {
        if constexpr (with_beside) { read_beside(prepared, passes); }
    }

    void run()
    {
        bool done = false;
        // Rows of numbers do not come apart as the halves of 16-bit types do.
        if constexpr (!with_beside) { done = any_stored(storage_of<Passes>{}); }
        if (!done && !stored<A>()) { through_rows(); }
        rows_.note(findings_.largest);
        writer_.template came_of<A>(rows_.largest(), rows_.size());
    }

private:
    void read_beside(const Method& prepared, const Passes& passes)
    {
        if constexpr (looks_at_rows<Method>) {
            const A* const made =
                static_cast<const A*>(scratch_.weighed_rows) + (rows_.offset() - scratch_.piece.offset);
            scratch_.beside.resize(prepared.row_numbers());
            for (std::size_t b = 0; b < scratch_.beside.size(); ++b) {
                scratch_.beside[b] = made + b * scratch_.piece.size;
            }
        }
        else {
            scratch_.beside.resize(passes.beside_each());
            scratch_.numbers.resize(scratch_.beside.size() * block_size);
            for (std::size_t b = 0; b < scratch_.beside.size(); ++b) {
                const auto& from = passes.beside(rows_.tensor_index(), b);
                scratch_.beside[b] = nullptr;
                if (!from.data) { continue; }
                bits_type<A> largest = 0;
                const A* const values =
                    rows_.beside(from, reinterpret_cast<A*>(scratch_.numbers.data() + b * block_size), largest);
                scratch_.beside[b] = values;
                examine_beside(prepared, rows_, b, values, largest);
            }
        }
    }
    template <storage_element T>
    void draw()
    {
        const std::size_t tasks = rows_.task_count();
        scratch_.draws.resize(tasks);
        scratch_.words.resize(tasks * block_size);
        for (std::size_t t = 0; t < tasks; ++t) {
            auto* const words = reinterpret_cast<signed_word<A>*>(scratch_.words.data() + t * block_size);
            scratch_.draws[t] = words;
            if (body_.drawing()) { fill_draws<T>(body_.stream(t), rows_.offset(), words, rows_.size()); }
        }
    }
    template <storage_element T>
    [[nodiscard]] kernels::entry_run<T> run_of(const storage_word<T>* base)
    {
        if constexpr (with_draws) { draw<T>(); }
        kernels::entry_run<T> run;
        run.base = base;
        run.tasks = scratch_.tasks.data();
        run.task_count = rows_.task_count();
        run.beside = scratch_.beside.data();
        run.draws = scratch_.draws.data();
        run.half_of_draws = block_size / 2;
        run.size = rows_.size();
        run.place = rows_.position();
        return run;
    }
    /// Where everything is stored as T; false, and nothing done, otherwise.
    template <storage_element T>
    bool stored()
    {
        const storage_word<T>* base = nullptr;
        if (!writer_.template stores<T>() || !rows_.template stored<T>(base, scratch_.tasks)) { return false; }
        run_body<T>(body_, run_of<T>(base), scratch_, task_slots_, findings_,
            [this](std::size_t first, const storage_word<T>* words, std::size_t n) {
                writer_.template write_words<T>(rows_.offset() + first, words, n);
            });
        return true;
    }
    /// The same for the narrow types of a list, in their order until one is it.
    template <class... T>
    bool any_stored(storage_list<T...>)
    {
        return (narrow_stored<T>() || ...);
    }
    template <storage_element T>
    bool narrow_stored()
    {
        if constexpr (std::same_as<arithmetic_type<T>, A> && !std::same_as<T, A> && has_pack_conversion<T>) {
            return stored<T>();
        }
        else {
            return false;
        }
    }
    void through_rows()
    {
        const std::size_t tasks = rows_.task_count();
        const A* const base = rows_.tensor().base.data ? rows_.base() : nullptr;
        scratch_.tasks.resize(tasks);
        for (std::size_t t = 0; t < tasks; ++t) { scratch_.tasks[t] = rows_.task(t); }
        A* const merged = rows_.scratch(0);
        run_body<A>(body_, run_of<A>(base), scratch_, task_slots_, findings_,
            [merged](std::size_t first, const A* words, std::size_t n) {
                std::memcpy(merged + first, words, n * sizeof(A));
            });
        writer_.write(rows_.offset(), merged, rows_.size());
    }

    const Body& body_;
    row_block<A>& rows_;
    row_writer& writer_;
    merge_scratch& scratch_;
    std::size_t task_slots_;
    kernels::run_findings<A> findings_;
};

/// Outputs larger than this do not stay in the cache: they are written past it.
inline constexpr std::uint64_t streaming_bytes = std::uint64_t{8} << 20;

/// Merges the given chunks with a prepared method. tallies[i] receives what chunk chunks[i] said.
template <class Options, class Passes>
void merge_chunks(const Passes& passes, const method<Options>& prepared, std::span<const std::size_t> chunks,
    tensor_sink& out, std::span<merge_tally> tallies, std::string_view phase)
{
    const cpu& policy = passes.policy();
    const aligned_models& models = passes.models();
    std::uint64_t written = 0;
    for (const auto& tensor : models.tensors()) { written += byte_count(tensor.output_dtype, tensor.size); }
    std::size_t scratch_rows = 1;
    if constexpr (row_method<Options>) { scratch_rows += method<Options>::scratch_rows; }
    using types = read_types<Options, storage_of<Passes>>;
    auto workspaces = make_workspaces<types>(policy, models, chunks.size(), scratch_rows);
    std::pmr::vector<row_writer> writers(memory_of(policy));
    std::pmr::vector<merge_scratch> scratch(memory_of(policy));
    writers.reserve(workspaces.size());
    scratch.reserve(workspaces.size());
    for (std::size_t w = 0; w < workspaces.size(); ++w) {
        writers.emplace_back(out, written > streaming_bytes, memory_of(policy), storage_conversions::of(types{}));
        scratch.emplace_back(memory_of(policy));
    }
    const std::size_t task_slots = models.options().statistics ? method<Options>::task_slots : 0;
    std::uint64_t bytes = 0;
    const auto& pieces = walked_pieces(prepared, models);
    for (const std::size_t c : chunks) { bytes += models.bytes(pieces[c]); }
    progress_meter meter(policy, phase, bytes);
    for_each_index(policy, chunks.size(), [&](std::size_t index, std::size_t worker) {
        const tensor_chunk& piece = pieces[chunks[index]];
        const aligned_tensor& tensor = models.tensors()[piece.tensor];
        row_writer& writer = writers[worker];
        writer.open(tensor, piece);
        with_block_of<storage_of<Passes>>(workspaces[worker], tensor, [&]<class A>(row_block<A>& rows) {
            if constexpr (packed_method<Options>) {
                if constexpr (looks_at_rows<method<Options>>) {
                    merge_scratch& own = scratch[worker];
                    A* const made = own.weighed.rows<A>(prepared.row_numbers(), piece.size);
                    prepared.weigh(rows, piece, made, own.piece_rows);
                    own.weighed_rows = made;
                    own.piece = piece;
                }
                visit_body<A>(prepared, piece.tensor, [&](const auto& body) {
                    for_each_block_of(rows, piece, [&](row_block<A>& opened) {
                        block_merge(prepared, body, passes, opened, writer, scratch[worker], task_slots, tallies[index])
                            .run();
                    });
                });
            }
            else {
                for_each_block_of(rows, piece, [&](row_block<A>& opened) {
                    A* const merged = opened.scratch(0);
                    prepared(opened, merged, tallies[index]);
                    writer.write(opened.offset(), merged, opened.size());
                });
            }
        });
        writer.close();
        if (!meter.advance(models.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
    });
}

/// The walk of a method, and a second one over what has to be merged again.
template <class Options, class Passes>
void merge_walk(const Passes& passes, method<Options>& prepared, tensor_sink& out, merge_report& report)
{
    const aligned_models& models = passes.models();
    std::pmr::memory_resource* const memory = memory_of(passes.policy());
    const auto& pieces = walked_pieces(prepared, models);
    constexpr bool settles = requires(std::span<const merge_tally> t) { prepared.settle(t); };
    std::pmr::vector<std::size_t> all(memory), wanted(memory);
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        if (settles) { all.push_back(i); }
        if (out.wants(models.tensors()[pieces[i].tensor].output)) { wanted.push_back(i); }
    }
    const auto& chunks = settles ? all : wanted; // what is not wanted has a say in what is settled
    auto tallies = empty_tallies(chunks.size(), memory);
    discarding_sink nowhere;
    const bool twice = settles && !out.rewritable();
    merge_chunks<Options>(passes, prepared, chunks, twice ? nowhere : out, tallies, twice ? "settle" : "merge");
    if constexpr (settles) {
        auto of_tensors = empty_tallies(models.tensors().size(), memory);
        for (std::size_t c = 0; c < tallies.size(); ++c) { of_tensors[pieces[c].tensor] += tallies[c]; }
        const bool settled = prepared.settle(std::span<const merge_tally>(of_tensors));
        if (twice) {
            tallies = empty_tallies(wanted.size(), memory);
            merge_chunks<Options>(passes, prepared, wanted, out, tallies, "merge");
        }
        else if (settled) {
            std::pmr::vector<std::size_t> again(memory);
            for (std::size_t c = 0; c < tallies.size(); ++c) {
                if (prepared.again(pieces[c].tensor, tallies[c])) { again.push_back(c); }
            }
            auto redone = empty_tallies(again.size(), memory);
            merge_chunks<Options>(passes, prepared, again, out, redone, "settle");
            for (std::size_t i = 0; i < again.size(); ++i) { tallies[again[i]] = std::move(redone[i]); }
        }
    }
    merge_tally total(memory);
    for (const auto& tally : tallies) { total += tally; }
    report_tally(total, models.task_count(), report);
}

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_METHODS_WALK_HPP

// ---- taskvec/methods/wrong_call.hpp
#if !defined(TASKVEC_SINGLE_METHODS_WRONG_CALL_HPP)
#define TASKVEC_SINGLE_METHODS_WRONG_CALL_HPP
// What merge() says of calls that are none of its own: one sentence, that names the argument and the mend.
// SPDX-License-Identifier: Apache-2.0


#include <concepts>
#include <cstddef>
#include <cstdint>
#include <ranges>
#include <span>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI::detail {

/// The argument lists of merge() on the CPU, without policy and options: one concept for each form.
template <class Models, class Sink>
concept merges_aligned = std::convertible_to<Models, const aligned_models&> && std::convertible_to<Sink, tensor_sink&>;
template <class Tasks, class Out>
concept merges_models =
    std::convertible_to<Tasks, std::span<const const_model_ref>> && std::convertible_to<Out, const model_ref&>;
template <class Tasks, class Out>
concept merges_views = tasks_of<std::remove_cvref_t<Tasks>, cpu> && output_of<Out, cpu>;
template <class Base>
concept base_model = std::convertible_to<Base, const const_model_ref&>;
template <class Base>
concept base_view = input_of<std::remove_cvref_t<Base>, cpu>;
template <class How>
concept merge_setting = std::convertible_to<How, const model_options&>;

/// Whether merge(policy, options, arguments…) is one of those that there are.
template <class Options, class... Arguments>
inline constexpr bool right_merge = false;
template <class Options, class A, class B>
inline constexpr bool right_merge<Options, A, B> =
    merges_aligned<A, B> || (!method<Options>::needs_base && (merges_views<A, B> || merges_models<A, B>));
template <class Options, class A, class B, class C>
inline constexpr bool right_merge<Options, A, B, C> =
    (base_view<A> && merges_views<B, C>) || (base_model<A> && merges_models<B, C>)
    || (merge_setting<C> && right_merge<Options, A, B> && !merges_aligned<A, B>);
template <class Options, class A, class B, class C, class D>
inline constexpr bool right_merge<Options, A, B, C, D> = merge_setting<D> && right_merge<Options, A, B, C>;

/// A list of models, of views, or of what is nearly a view.
template <class X>
concept list_like = std::ranges::input_range<const std::remove_cvref_t<X>> && !viewable<const std::remove_cvref_t<X>>
    && !std::is_arithmetic_v<std::remove_cvref_t<std::ranges::range_reference_t<const std::remove_cvref_t<X>>>>;

/// Text, such as the name of a file.
template <class X>
concept text_like = std::convertible_to<const std::remove_cvref_t<X>&, std::string_view>;
/// The address of a model.
template <class X>
concept address_of_model = std::is_pointer_v<std::remove_cvref_t<X>>
    && std::convertible_to<const std::remove_pointer_t<std::remove_cvref_t<X>>&, const_model_ref>;

/// Says what is wrong with a base.
template <class Base>
consteval void check_merge_base()
{
    constexpr bool read = !text_like<Base>, here = !address_of_model<Base>, one = !list_like<Base>;
    static_assert(read,
        "merge(): the base is text: where it names a file, open that first (taskvec/formats), and pass its model");
    static_assert(here, "merge(): the base is the address of a model: pass the model itself");
    static_assert(
        one || !read, "merge(): a list stands where the base is expected: merge(policy, options, base, tasks, output)");
    constexpr view_flaw flaw = read && here && one ? flaw_of<Base, memory_space::host>() : view_flaw::none;
    static_assert(flaw != view_flaw::pointer,
        "merge(): the base is a pointer, which does not say how long it is: pass "
        "taskvec::host_view<const float>(pointer, size)");
    static_assert(flaw != view_flaw::elements,
        "merge(): the elements of the base are of no storage type: expected double, float, taskvec::bf16 or "
        "taskvec::f16");
    static_assert(flaw != view_flaw::space,
        "merge(): the base lies in device memory, and the policy is taskvec::cpu: merge with taskvec::gpu, or copy it");
    static_assert(flaw != view_flaw::no_view,
        "merge(): the base is nothing that has a flat view: pass a vector, an array or a span of numbers, or a "
        "taskvec::const_model_ref (Eigen, xtensor and others: include their header of taskvec/interop)");
}

/// Says what is wrong with a list of tasks.
template <class Tasks>
consteval void check_merge_tasks()
{
    using bare = std::remove_cvref_t<Tasks>;
    static_assert(!std::is_pointer_v<bare>,
        "merge(): the tasks are a pointer: pass a list of views, such as "
        "std::vector<taskvec::host_view<const float>>");
    if constexpr (!std::is_pointer_v<bare>) {
        static_assert(list_like<bare>,
            "merge(): the tasks are one vector, or none: pass a list with a vector for each task, such as "
            "std::array tasks{taskvec::as_view(task)}");
        if constexpr (list_like<bare>) {
            constexpr view_flaw flaw = flaw_of<std::ranges::range_reference_t<const bare>, memory_space::host>();
            static_assert(flaw != view_flaw::pointer,
                "merge(): the tasks are pointers, which do not say how long they are: pass a list of "
                "taskvec::host_view<const float>(pointer, size)");
            static_assert(flaw != view_flaw::elements,
                "merge(): the elements of the tasks are of no storage type: expected double, float, taskvec::bf16 or "
                "taskvec::f16");
            static_assert(flaw != view_flaw::space,
                "merge(): the tasks lie in device memory, and the policy is taskvec::cpu: merge with taskvec::gpu, or "
                "copy them");
            static_assert(flaw != view_flaw::no_view,
                "merge(): a task is nothing that has a flat view: pass a list of vectors, arrays or spans of numbers, "
                "beside a base and an output of that kind (Eigen, xtensor and others: include their header of "
                "taskvec/interop)");
        }
    }
}

/// Says what is wrong with an output.
template <class Out>
consteval void check_merge_output()
{
    constexpr view_flaw flaw = flaw_of<Out, memory_space::host>();
    static_assert(flaw != view_flaw::pointer,
        "merge(): the output is a pointer, which does not say how long it is: pass "
        "taskvec::host_view<float>(pointer, size)");
    static_assert(flaw != view_flaw::elements,
        "merge(): the elements of the output are of no storage type: expected double, float, taskvec::bf16 or "
        "taskvec::f16");
    static_assert(flaw != view_flaw::space,
        "merge(): the output lies in device memory, and the policy is taskvec::cpu: merge with taskvec::gpu, or copy "
        "it");
    static_assert(flaw != view_flaw::no_view,
        "merge(): the output is nothing that has a flat view: pass a vector, an array or a span of numbers, or a "
        "taskvec::model_ref");
    if constexpr (flaw == view_flaw::none) {
        static_assert(!std::is_const_v<typename view_of<std::remove_reference_t<Out>>::element_type>,
            "merge(): the output is const: pass memory that can be written");
        static_assert(outlives_the_expression<Out>,
            "merge(): the output is a temporary, and the result would be lost with it: name it first");
    }
}

template <class Base, class Tasks, class Out>
consteval void check_flat_merge()
{
    if constexpr (!base_view<Base>) { check_merge_base<Base>(); }
    else if constexpr (!tasks_of<std::remove_cvref_t<Tasks>, cpu>) {
        check_merge_tasks<Tasks>();
    }
    else {
        check_merge_output<Out>();
    }
}

template <class Base, class Tasks, class Out>
consteval void check_model_merge()
{
    static_assert(!base_model<Tasks>,
        "merge(): the tasks are one model: pass a list with a model for each task, such as "
        "std::vector<taskvec::const_model_ref> tasks{task}");
    if constexpr (!base_model<Tasks>) {
        static_assert(std::convertible_to<Tasks, std::span<const const_model_ref>>,
            "merge(): the base is a model, and the tasks are no list of models: pass "
            "std::vector<taskvec::const_model_ref>");
        static_assert(!std::convertible_to<Tasks, std::span<const const_model_ref>> || !base_model<Out>
                || std::convertible_to<Out, const model_ref&>,
            "merge(): the output is a model of const tensors: pass a taskvec::model_ref, over memory that can be "
            "written");
        static_assert(!std::convertible_to<Tasks, std::span<const const_model_ref>> || base_model<Out>,
            "merge(): the base is a model, and the output is none: pass a taskvec::model_ref");
    }
}

/// Says what is wrong with the arguments of merge() after the options.
template <class Options, class... Arguments>
struct merge_arguments {
    static consteval void check()
    {
        static_assert(sizeof...(Arguments) == 0 && sizeof...(Arguments) > 0,
            "merge(): expected (policy, options, base, tasks, output), with a taskvec::model_options after them where "
            "it is wanted, or (policy, options, aligned models, sink)");
    }
};
template <class Options, class Tasks, class Out>
struct merge_arguments<Options, Tasks, Out> {
    static consteval void check()
    {
        constexpr bool forgotten = method<Options>::needs_base && list_like<Tasks>;
        static_assert(!forgotten,
            "merge(): this method needs the base of its tasks: merge(policy, options, base, tasks, output)");
        if constexpr (!forgotten) {
            if constexpr (method<Options>::needs_base) { merge_arguments<Options>::check(); }
            else if constexpr (tasks_of<std::remove_cvref_t<Tasks>, cpu>) {
                check_merge_output<Out>();
            }
            else if constexpr (std::convertible_to<Tasks, std::span<const const_model_ref>>) {
                check_model_merge<const_model_ref, Tasks, Out>();
            }
            else {
                check_merge_tasks<Tasks>();
            }
        }
    }
};
template <class Options, class Base, class Tasks, class Out>
struct merge_arguments<Options, Base, Tasks, Out> {
    static consteval void check()
    {
        if constexpr (merge_setting<Out> && !list_like<Tasks>) { merge_arguments<Options, Base, Tasks>::check(); }
        else if constexpr (base_model<Base>) {
            check_model_merge<Base, Tasks, Out>();
        }
        else {
            check_flat_merge<Base, Tasks, Out>();
        }
    }
};
template <class Options, class Base, class Tasks, class Out, class How>
struct merge_arguments<Options, Base, Tasks, Out, How> {
    static consteval void check()
    {
        static_assert(merge_setting<How>, "merge(): what comes after the output is a taskvec::model_options");
        if constexpr (merge_setting<How>) { merge_arguments<Options, Base, Tasks, Out>::check(); }
    }
};

/// What empty braces hold in place of tasks.
struct no_task { };

/// Braces with tasks of several types.
struct mixed_tasks {
    template <list_entry First, list_entry... Rest>
        requires(!(std::same_as<First, Rest> && ...))
    mixed_tasks(const First&, const Rest&...)
    { }
};

/// Whether tasks of a type in braces can be merged; says why not.
template <class Task>
consteval bool merges_in_braces()
{
    constexpr bool some = !std::same_as<Task, no_task>;
    static_assert(some, "merge(): no task was given: the braces of the tasks are empty");
    constexpr bool right = !owns_elements<Task> && (viewable<const Task> || std::same_as<Task, const_model_ref>);
    static_assert(right || !some,
        "merge(): tasks in braces would be copied, or are of no one type: pass views, {taskvec::as_view(a), "
        "taskvec::as_view(b)}, or name a list of them");
    return right;
}

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_METHODS_WRONG_CALL_HPP

// ---- taskvec/models/overflow_guard.hpp
#if !defined(TASKVEC_SINGLE_MODELS_OVERFLOW_GUARD_HPP)
#define TASKVEC_SINGLE_MODELS_OVERFLOW_GUARD_HPP
// Results that an output's dtype cannot hold, found as they are written.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// A sink that looks at what is written for infinity (or NaN) that no input holds at that place: a finite result that
/// the dtype of the output cannot hold. It is an error that names tensor and index, or becomes the dtype's largest
/// number. What an input has of NaN and infinity passes, for model_options::on_nonfinite to judge; so does what a
/// method adds of its own (excuse()). Everything goes through write(): direct() has no memory. Host memory only.
///
/// Cost: one look at each written byte while it is in the cache. None for outputs with the exponents of f32 or f64
/// where what a merge reads stays below 2^64, as weights do: a walk says so by write_bounded(), which is not looked at
/// unless the numbers of a method's options (`gain`, their product) can make a result 2^50 times as large.
///
///     overflow_guard guarded(file, models, overflow::error);
///     merge(cpu{}, ties_options{}, models, guarded);
class overflow_guard final : public tensor_sink {
public:
    /// In front of `out`, which outlives it as the models do; `gain`: how far options may enlarge a result.
    overflow_guard(tensor_sink& out, const aligned_models& models, overflow how, double gain = 1)
        : out_(&out)
        , models_(&models)
        , how_(how)
        , bounded_(gain < 0x1p50)
        , tensors_(models.outputs().size(), nullptr)
    {
        for (const auto& tensor : models.tensors()) { tensors_[tensor.output] = &tensor; }
    }

    /// Another input than the models: whether it has NaN or infinity at an index of models.tensors()[tensor].
    void excuse(callback<bool(std::size_t tensor, std::uint64_t index)> nonfinite) { beside_ = std::move(nonfinite); }

    [[nodiscard]] bool rewritable() const override { return out_->rewritable(); }
    [[nodiscard]] bool wants(std::size_t index) const override { return out_->wants(index); }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        const auto* const tensor = tensors_[index];
        if (!tensor || how_ == overflow::propagate || !holds_nonfinite(tensor->output_dtype, data, size)) {
            if (lost_.load(std::memory_order_acquire)) { count(index, offset, 0); }
            out_->write(index, offset, data, size);
            return;
        }
        std::uint64_t saturated = 0;
        call_vector<std::byte> words(static_cast<const std::byte*>(data), static_cast<const std::byte*>(data) + size);
        visit_storage(tensor->output_dtype, tensor->name, [&]<class T>(std::type_identity<T>) {
            for (std::size_t i = 0; i < size / sizeof(T); ++i) {
                storage_word<T> word;
                std::memcpy(&word, words.data() + i * sizeof(T), sizeof(T));
                const auto value = static_cast<double>(widen_word<arithmetic_type<T>, T>(word));
                if (std::isfinite(value)) { continue; }
                const std::uint64_t place = offset / sizeof(T) + i;
                if (any_input_nonfinite(*tensor, place)) { continue; }
                const bool lost = std::isnan(value);
                if (lost && models_->options().on_nonfinite == nonfinite::propagate) { continue; }
                if (how_ == overflow::error || lost) { refuse<T>(*tensor, place, lost); }
                word = static_cast<storage_word<T>>(largest_word<T>(value < 0));
                std::memcpy(words.data() + i * sizeof(T), &word, sizeof(T));
                ++saturated;
            }
        });
        count(index, offset, saturated);
        out_->write(index, offset, words.data(), size);
    }

    void write_bounded(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        bounded_ ? out_->write(index, offset, data, size) : write(index, offset, data, size);
    }

    /// Results that became the largest number of their dtype: of what was written twice, the last.
    [[nodiscard]] std::uint64_t saturated() const
    {
        const std::lock_guard lock(counting_);
        std::uint64_t total = 0;
        for (const auto& [piece, found] : of_pieces_) { total += found; }
        return total;
    }

private:
    template <std::size_t bytes>
    using signed_word_of = std::conditional_t<bytes == 2, std::int16_t,
        std::conditional_t<bytes == 4, std::int32_t, std::conditional_t<bytes == 8, std::int64_t, std::int8_t>>>;

    [[nodiscard]] static bool holds_nonfinite(dtype type, const void* data, std::size_t size);
    /// What is written again comes in the same pieces.
    void count(std::size_t index, std::uint64_t offset, std::uint64_t saturated)
    {
        const std::lock_guard lock(counting_);
        if (saturated == 0) { of_pieces_.erase({index, offset}); }
        else {
            of_pieces_[{index, offset}] = saturated;
            lost_.store(true, std::memory_order_release);
        }
    }
    [[nodiscard]] bool any_input_nonfinite(const aligned_tensor& tensor, std::uint64_t place) const
    {
        if (beside_ && beside_(static_cast<std::size_t>(&tensor - models_->tensors().data()), place)) { return true; }
        const auto wrong = [&](const aligned_tensor::operand& from) {
            alignas(8) std::byte raw[64];
            return from.data && !std::isfinite(detail::with_elements(from, place, 1, raw, [](const auto* value) {
                return static_cast<double>(widen<double>(*value));
            }));
        };
        return wrong(tensor.base) || std::any_of(tensor.tasks.begin(), tensor.tasks.end(), wrong);
    }
    /// "'base' and 'task'": the models, for messages.
    [[nodiscard]] TASKVEC_COLD std::string models_text() const
    {
        const bool base = models_->has_base();
        const std::size_t others = models_->task_count() - (base ? 0 : 1);
        return message(base ? models_->options().base_label : models_->label(0),
            others == 0       ? std::string()
                : others == 1 ? " and " + models_->label(base ? 0 : 1)
                              : message(" and the ", others, base ? " tasks" : " other tasks"));
    }
    template <storage_element T>
    [[noreturn]] TASKVEC_COLD void refuse(const aligned_tensor& tensor, std::uint64_t place, bool lost) const
    {
        raise<nonfinite_error>(error_code::result_overflow,
            message("tensor '", tensor.name, "' would hold ", lost ? "NaN" : "infinity", " at index ", place,
                " though it is finite in ", models_text(), ": ", to_string(dtype_of<T>), " holds numbers up to ",
                detail::largest_number<T>(), "; choose ", detail::if_narrow<T>("a wider dtype or "),
                "smaller factors, or let it saturate or propagate (overflow)"));
    }

    tensor_sink* out_;
    const aligned_models* models_;
    overflow how_;
    bool bounded_; // write_bounded() need not look
    call_vector<const aligned_tensor*> tensors_; // of each output; null for what is copied
    callback<bool(std::size_t, std::uint64_t)> beside_;
    mutable std::mutex counting_;
    std::map<std::pair<std::size_t, std::uint64_t>, std::uint64_t> of_pieces_; // saturated: of output and offset
    std::atomic<bool> lost_{false}; // something of that was ever there
};

namespace detail {

TASKVEC_KERNELS_BEGIN

/// The largest magnitude bits of stored words at any address, as a signed word. Whole numbers: any compiler's are the
/// same, nvcc's too.
template <class Word>
TASKVEC_NOINLINE Word largest_stored(const void* data, std::size_t n, Word magnitude)
{
#if TASKVEC_GNU()
    using word __attribute__((may_alias, aligned(1))) = Word;
    const auto* x = static_cast<const word*>(data);
#else
    struct words {
        const std::byte* at;
        [[nodiscard]] Word operator[](std::size_t i) const noexcept
        {
            Word word;
            std::memcpy(&word, at + i * sizeof word, sizeof word);
            return word;
        }
        void operator+=(std::size_t count) noexcept { at += count * sizeof(Word); }
    } x{static_cast<const std::byte*>(data)};
#endif
    constexpr std::size_t group = 256; // a number that the compiler knows, so that it vectorises at -O2
    Word largest = 0;
    for (; n >= group; n -= group, x += group) {
        for (std::size_t i = 0; i < group; ++i) {
            const Word found = static_cast<Word>(x[i] & magnitude);
            largest = found > largest ? found : largest;
        }
    }
    for (std::size_t i = 0; i < n; ++i) {
        const Word found = static_cast<Word>(x[i] & magnitude);
        largest = found > largest ? found : largest;
    }
    return largest;
}

TASKVEC_KERNELS_END

} // namespace detail

inline bool overflow_guard::holds_nonfinite(dtype type, const void* data, std::size_t size)
{
    return visit_storage(type, "", [&]<class T>(std::type_identity<T>) {
        using word = signed_word_of<sizeof(T)>;
        word infinity;
        const auto stored = narrow<T>(static_cast<arithmetic_type<T>>(HUGE_VAL));
        std::memcpy(&infinity, &stored, sizeof infinity);
        constexpr word magnitude = static_cast<word>(static_cast<std::make_unsigned_t<word>>(-1) >> 1);
        return detail::largest_stored<word>(data, size / sizeof(T), magnitude) >= infinity;
    });
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_OVERFLOW_GUARD_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <ranges>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = method(θ0, θ1 … θT): merges aligned models into a sink, whose tensors are those of models.outputs() in that
/// order. Elementwise, streaming: memory is a few rows for each thread, whatever the size of the models.
/// Bit-exact for any threads, chunks and sinks. Errors: invalid_argument (options; aliased outputs), nonfinite_error,
/// cancelled; what the sink throws. After an error an in-memory output is unspecified.
///
///     aligned_models models(&base, tasks);
///     merge(cpu{}, ties_options{.density = 0.2}, models, sink);
template <merge_method Options>
merge_report merge(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out);

/// Makes the checks that merge() makes before it writes, and the passes that come first; writes nothing. For a dry run.
///
///     check_merge(cpu{}, fisher_options{.fishers = fishers}, models);
template <merge_method Options>
void check_merge(const cpu& policy, const Options& options, const aligned_models& models)
{
    if (method<Options>::needs_base && !models.has_base()) {
        raise<invalid_argument>(error_code::base_missing, "this merge method needs a base model");
    }
    const detail::call_memory memory(policy.memory);
    const auto beside = detail::operands_beside(options, models, memory_space::host);
    cpu_passes passes(policy, models, beside);
    static_cast<void>(method<Options>(passes, options));
}

namespace detail {

/// Norms of the merged model as it was stored, read back where the sink has memory.
template <class Types>
void add_norms(const cpu& policy, const aligned_models& merged_and_base, merge_report& report)
{
    const auto sums = tensor_sums<Types>(policy, merged_and_base, 2, 0, "norms", [](auto& rows, double* sum) {
        const auto* const merged = rows.task(0);
        sum[0] = kernels::dot(merged, merged, rows.size());
        sum[1] = 0;
        if (rows.models().has_base()) {
            const auto* const change = rows.delta(0);
            sum[1] = kernels::dot(change, change, rows.size());
        }
    });
    for (std::size_t i = 0; i < sums.size(); ++i) {
        report.norms.push_back({merged_and_base.tensors()[i].name, std::sqrt(sums[i][0]), std::sqrt(sums[i][1])});
    }
}

/// What a method's body is for numbers of f32, and what it is called with.
template <class Options>
using single_body =
    std::remove_cvref_t<decltype(std::declval<const method<Options>&>().template body<float>(std::size_t{0}))>;
using single_entries = kernels::entries<float, 0, 0, 0>;

template <class Options>
concept callable_body = requires(const single_body<Options>& body, single_entries& in) { body(in); };

/// Whether a method's body, if it has one, is such as walks copy and call.
template <class Options>
consteval bool sound_body()
{
    if constexpr (!packed_method<Options>) { return true; }
    else if constexpr (!std::is_trivially_copyable_v<single_body<Options>> || !callable_body<Options>) {
        return false;
    }
    else {
        using result = decltype(std::declval<const single_body<Options>&>()(std::declval<single_entries&>()));
        return std::convertible_to<result, const typename single_entries::pack&>;
    }
}

/// Says what is missing of a body, in a sentence.
template <class Options>
consteval void check_body()
{
    static_assert(std::is_trivially_copyable_v<single_body<Options>>,
        "the body of a merge method is trivially copyable: numbers, and pointers to what passes.keep() returned");
    if constexpr (std::is_trivially_copyable_v<single_body<Options>>) {
        static_assert(callable_body<Options>,
            "the body of a merge method has a call operator: template <class In> typename In::pack operator()(In& in) "
            "const");
        static_assert(!callable_body<Options> || sound_body<Options>(),
            "the call operator of a merge method's body returns what becomes of the entries, a typename In::pack: "
            "not a mask, a number or nothing");
    }
}

/// merge() of models' tensors all together, but for what is copied. `beside`: operands_beside() of them.
template <class Types, merge_method Options>
merge_report merge_together(const cpu& policy, const Options& options, const aligned_models& models,
    std::span<const aligned_tensor::operand> beside, tensor_sink& out)
{
    using method_type = method<Options>;
    typed_passes<Types> passes(policy, models, beside);
    method_type prepared(passes, options);
    merge_report report;
    std::optional<overflow_guard> guard;
    if (models.options().on_overflow != overflow::propagate) {
        guard.emplace(out, models, models.options().on_overflow, largest_gain(options));
        if constexpr (requires { prepared.nonfinite_beside(std::size_t{0}, std::uint64_t{0}); }) {
            guard->excuse([&prepared](std::size_t tensor, std::uint64_t index) {
                return prepared.nonfinite_beside(tensor, index);
            });
        }
    }
    tensor_sink& guarded = guard ? *guard : out;
    if constexpr (whole_method<Options>) { prepared.write(policy, models, guarded); }
    else {
        merge_walk<Options>(passes, prepared, guarded, report);
    }
    if (guard) { report.saturated = guard->saturated(); }
    report.walks = prepared.walks() + 1;
    report.beside = prepared.bytes_beside();
    return report;
}

/// Tensors of models in runs, in order, and the bytes of each run's inputs.
struct tensor_runs {
    call_vector<tensor_range> tensors{};
    call_vector<std::uint64_t> bytes{};

    /// As many tensors in each as `memory` bytes hold of the inputs, and one at least.
    tensor_runs(const aligned_models& models, std::uint64_t memory)
    {
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const auto& tensor = models.tensors()[i];
            const std::uint64_t more = tensor.bytes(tensor.size);
            if (bytes.empty() || bytes.back() + more > memory) {
                tensors.push_back({i, i});
                bytes.push_back(0);
            }
            tensors.back().last = i + 1;
            bytes.back() += more;
        }
    }
};

/// The same as merge_together(), run by run: what a method reads several times stays in memory between its walks. A run
/// has a fourth of a thread's share of model_options::memory, or a tensor: small enough for threads to end together.
template <class Types, merge_method Options>
merge_report merge_in_runs(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    const std::size_t memory = models.options().memory;
    const tensor_runs runs(models, memory / (4 * worker_count(policy, models.tensors().size())));
    call_vector<merge_report> reports(runs.bytes.size());
    for_each_part(policy, "merge", runs.bytes, [&](std::size_t i, const cpu& on, std::size_t together) {
        const tensor_range range = runs.tensors[i];
        call_vector<std::size_t> tensors(range.last - range.first);
        std::iota(tensors.begin(), tensors.end(), range.first);
        const aligned_models run(models, tensors, std::max<std::size_t>(1, memory / together));
        reports[i] = merge_together<Types>(on, options, run, operands_beside(options, run, memory_space::host), out);
    });
    merge_report report;
    for (const auto& part : reports) { report += part; }
    return report;
}

/// merge() of aligned models that store the types of a storage_list.
template <class Types, merge_method Options>
merge_report merge_sound(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    using method_type = method<Options>;
    static_assert(check_method<Options>());
    check_options(options);
    if (method_type::needs_base && !models.has_base()) {
        raise<invalid_argument>(error_code::base_missing, "this merge method needs a base model");
    }
    const call_memory memory(policy.memory);
    const auto beside = operands_beside(options, models, memory_space::host);
    check_aliases(models, out, method_type::in_place, companions_of(options, models, memory_space::host, beside));
    bool in_runs = false;
    merge_report report;
    if constexpr (requires { method_type::tensor_by_tensor(options); }) {
        in_runs = method_type::tensor_by_tensor(options) && models.bytes() > models.options().memory;
        if (in_runs) { report = merge_in_runs<Types>(policy, options, models, out); }
    }
    if (!in_runs) { report = merge_together<Types>(policy, options, models, beside, out); }
    copy_through(policy, models, out);
    return report;
}

/// The same, of a method whose body is sound.
template <class Types, merge_method Options>
merge_report merge_storing(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    if constexpr (sound_body<Options>()) { return merge_sound<Types>(policy, options, models, out); }
    else {
        check_body<Options>();
        return {};
    }
}

} // namespace detail

template <merge_method Options>
merge_report merge(const cpu& policy, const Options& options, const aligned_models& models, tensor_sink& out)
{
    return detail::merge_storing<storage_types>(policy, options, models, out);
}

namespace detail {

/// The sink over a model in memory, checked against what a merge writes.
inline memory_sink sink_over(
    const aligned_models& models, const model_ref& out, memory_space space = memory_space::host)
{
    std::vector<void*> tensors;
    for (const auto& spec : models.outputs()) {
        const tensor_ref* const tensor = out.find(spec.name);
        if (!tensor) {
            raise<invalid_argument>(
                error_code::tensor_missing, message("tensor '", spec.name, "' is missing in the output"));
        }
        if (tensor->space != space || !tensor->contiguous()) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", spec.name, "' of the output must be contiguous ",
                    space == memory_space::host ? "host" : "device", " memory"));
        }
        if (tensor->shape != spec.shape) {
            raise<shape_mismatch>(error_code::output_shape,
                message("tensor '", spec.name, "' of the output has shape ", to_string(tensor->shape), "; expected ",
                    to_string(spec.shape)));
        }
        if (tensor->dtype != spec.dtype) {
            raise<dtype_mismatch>(error_code::output_dtype,
                message("tensor '", spec.name, "' of the output has dtype ", to_string(tensor->dtype), "; expected ",
                    to_string(spec.dtype)));
        }
        if (!tensor->data && spec.bytes() > 0) {
            raise<invalid_argument>(error_code::tensor_without_data,
                message("tensor '", spec.name, "' of the output has no data (null pointer)"));
        }
        tensors.push_back(tensor->data);
    }
    return memory_sink(std::move(tensors));
}

/// Outputs of an in-memory merge decide their own dtype, tensor by tensor, unless one is asked for.
template <class Types = storage_types, merge_method Options>
merge_report merge_in_memory(const cpu& policy, const Options& options, const const_model_ref* base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how)
{
    const aligned_models models(base, tasks, how);
    memory_sink sink = sink_over(models, out);
    merge_report report = merge_storing<Types>(policy, options, models, sink);
    if (how.statistics) {
        const const_model_ref merged(out);
        model_options reading = how;
        reading.labels.clear();
        reading.on_nonfinite = nonfinite::propagate;
        add_norms<Types>(policy, aligned_models(base, {&merged, 1}, reading), report);
    }
    return report;
}

} // namespace detail

/// Merges models in memory. `out` holds, for each tensor of the base, memory of its shape and dtype (or of
/// model_options::output). With a base:
///
///     merge(cpu{}, task_arithmetic_options{.lambda = 0.3}, base, tasks, out);
template <merge_method Options>
merge_report merge(const cpu& policy, const Options& options, const const_model_ref& base,
    std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how = {})
{
    return detail::merge_in_memory(policy, options, &base, tasks, out, how);
}

/// Merges models in memory by a method that needs no base (average). The first model gives names and dtypes.
template <merge_method Options>
    requires(!method<Options>::needs_base)
merge_report merge(const cpu& policy, const Options& options, std::span<const const_model_ref> tasks,
    const model_ref& out, const model_options& how = {})
{
    return detail::merge_in_memory(policy, options, nullptr, tasks, out, how);
}

namespace detail {
/// A list of storage types that holds each of those given once.
template <class List, class... Rest>
struct without_repeats {
    using type = List;
};
template <class... Kept, class First, class... Rest>
struct without_repeats<storage_list<Kept...>, First, Rest...>
    : without_repeats<
          std::conditional_t<(std::same_as<First, Kept> || ...), storage_list<Kept...>, storage_list<Kept..., First>>,
          Rest...> { };
template <class... T>
using distinct_storage = typename without_repeats<storage_list<>, T...>::type;

template <class Tasks>
[[nodiscard]] std::vector<const_model_ref> flat_models(const Tasks& tasks)
{
    std::vector<const_model_ref> models;
    for (const auto& task : tasks) { models.push_back(flat_model(as_view(task))); }
    return models;
}
template <class T, memory_space S>
[[nodiscard]] model_ref flat_output(view<T, S> out)
{
    model_ref model;
    model.insert("values", as_tensor(out));
    return model;
}
} // namespace detail

/// Merges flat views of one length. Storage types may differ between base, tasks and output; the output rounds once.
///
///     std::vector<float> base = …, out(base.size());
///     std::vector<std::vector<float>> tasks = …;
///     merge(cpu{}, ties_options{.density = 0.2, .lambda = 1.0}, base, tasks, out);
template <merge_method Options, input_of<cpu> Base, tasks_of<cpu> Tasks, output_of<cpu> Out>
merge_report merge(
    const cpu& policy, const Options& options, const Base& base, const Tasks& tasks, Out&& out, model_options how = {})
{
    const const_model_ref base_model = detail::flat_model(as_view(base));
    how.output = dtype_of<element_of<Out>>;
    using types = detail::distinct_storage<element_of<const Base>,
        element_of<std::ranges::range_reference_t<const Tasks>>, element_of<Out>>;
    return detail::merge_in_memory<types>(
        policy, options, &base_model, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

/// Merges flat views by a method that needs no base.
template <merge_method Options, tasks_of<cpu> Tasks, output_of<cpu> Out>
    requires(!method<Options>::needs_base)
merge_report merge(const cpu& policy, const Options& options, const Tasks& tasks, Out&& out, model_options how = {})
{
    how.output = dtype_of<element_of<Out>>;
    using types = detail::distinct_storage<element_of<std::ranges::range_reference_t<const Tasks>>, element_of<Out>>;
    return detail::merge_in_memory<types>(
        policy, options, nullptr, detail::flat_models(tasks), detail::flat_output(as_view(out)), how);
}

/// Options that are those of no method, or of one that lacks something: a sentence says what.
template <cpu_policy P, class Options, class... Arguments>
    requires(!merge_method<Options> && sizeof...(Arguments) >= 2)
merge_report merge(const P&, const Options&, Arguments&&...)
{
    static_assert(detail::check_method<Options>());
    return {};
}

/// The tasks in braces, as views or models: `{as_view(a), as_view(b)}`. (Vectors in braces would be copied.)
template <merge_method Options, class Base, class Task = detail::no_task, class Out>
merge_report merge(const cpu& policy, const Options& options, const Base& base, std::initializer_list<Task> tasks,
    Out&& out, const model_options& how = {})
{
    if constexpr (detail::merges_in_braces<Task>()) {
        return merge(policy, options, base, std::span<const Task>(tasks.begin(), tasks.size()), out, how);
    }
    return {};
}
template <merge_method Options, class Task = detail::no_task, class Out>
merge_report merge(const cpu& policy, const Options& options, std::initializer_list<Task> tasks, Out&& out,
    const model_options& how = {})
{
    if constexpr (detail::merges_in_braces<Task>()) {
        return merge(policy, options, std::span<const Task>(tasks.begin(), tasks.size()), out, how);
    }
    return {};
}

/// Braces that say nothing of a type: a sentence says so.
template <merge_method Options, class Base, class Out>
merge_report merge(
    const cpu&, const Options&, const Base&, const detail::mixed_tasks&, Out&&, const model_options& = {})
{
    static_assert(!merge_method<Options>,
        "merge(): the tasks in braces are of no one type: convert one of them, or merge models of tensors");
    return {};
}
template <merge_method Options, class Out>
merge_report merge(const cpu&, const Options&, const detail::mixed_tasks&, Out&&, const model_options& = {})
{
    static_assert(!merge_method<Options>,
        "merge(): the tasks in braces are of no one type: convert one of them, or merge models of tensors");
    return {};
}
template <merge_method Options, class Number, class Tasks, class Out>
    requires std::is_arithmetic_v<Number>
merge_report merge(
    const cpu&, const Options&, std::initializer_list<Number>, const Tasks&, Out&&, const model_options& = {})
{
    static_assert(!merge_method<Options>, "merge(): the base stands in braces: name a vector of its numbers");
    return {};
}

/// Arguments that are none of those above: a sentence says which one, and what it should be.
template <merge_method Options, class... Arguments>
    requires(!detail::right_merge<Options, Arguments...>)
merge_report merge(const cpu&, const Options&, Arguments&&...)
{
    detail::merge_arguments<Options, Arguments...>::check();
    return {};
}
template <cpu_policy P>
merge_report merge(const P&)
{
    static_assert(!policy<P>, "merge(): expected (policy, options, base, tasks, output)");
    return {};
}
template <detail::no_policy P, merge_method Options, class... Arguments>
merge_report merge(const P&, const Options&, const Arguments&...)
{
    static_assert(policy<P>,
        "merge(): the first argument is no policy: pass taskvec::cpu{}, or taskvec::cpu{.threads = 4} where threads "
        "are counted");
    return {};
}
template <merge_method Options, class... Arguments>
    requires(sizeof...(Arguments) >= 2)
merge_report merge(const Options&, const Arguments&...)
{
    static_assert(policy<Options>,
        "merge(): the policy is missing before the options: merge(taskvec::cpu{}, options, base, tasks, output)");
    return {};
}

// On taskvec::gpu this lives in <taskvec/device/methods.hpp>; without it a call says so.
template <detail::gpu_without_header<detail::gpu_room::merge> P, class... Arguments>
auto merge(const P&, Arguments&&...)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::merge>,
        "merge() on taskvec::gpu: include <taskvec/device/methods.hpp>");
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGED_NORMS(extern, storage_types)
TASKVEC_COMPILED_MERGED_NORMS(extern, storage_list<float>)
TASKVEC_COMPILED_MERGED_NORMS(extern, storage_list<f16>)
TASKVEC_COMPILED_MERGED_NORMS(extern, storage_list<bf16>)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_MERGE_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A model written as it is, in the output's dtypes, as a merge method without options: what is worked out of it is
/// laid out one tensor at a time, and read in pieces of several rows.
struct fuse_options { };

template <>
class method<fuse_options> : public general_method {
public:
    static constexpr bool needs_base = false;

    method(const cpu_passes& passes, const fuse_options&)
    {
        if (passes.tasks() != 1) {
            raise<invalid_argument>(
                error_code::task_count, message("a fused model is one, and there are ", passes.tasks(), " tasks"));
        }
    }

    template <cpu_policy Policy>
    void write(const Policy& policy, const aligned_models& models, tensor_sink& out) const
    {
        detail::progress_meter meter(policy, "fuse", models.bytes());
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            if (tensor.wide) { write_tensor<double>(policy, models, i, out, meter); }
            else {
                write_tensor<float>(policy, models, i, out, meter);
            }
        }
    }

private:
    template <arithmetic_element A>
    static void write_tensor(const cpu& policy, const aligned_models& models, std::size_t index, tensor_sink& out,
        detail::progress_meter& meter)
    {
        const aligned_tensor& tensor = models.tensors()[index];
        if (!out.wants(tensor.output)) { return; }
        const auto& from = tensor.tasks[0];
        const detail::prepared_source prepared(tensor.size > 0 ? from.source : nullptr, policy);
        const chunk_range range = chunks_of(models, index);
        const std::size_t width = bits_per_element(tensor.output_dtype) / 8;
        auto* const direct = static_cast<std::byte*>(out.direct(tensor.output));
        const std::size_t largest = range.first < range.last ? models.chunks()[range.first].size : 0;
        struct buffers {
            std::pmr::vector<A> values;
            detail::byte_buffer stored;
        };
        std::pmr::vector<buffers> workers(memory_of(policy));
        for (std::size_t w = worker_count(policy, range.last - range.first); w-- > 0;) {
            workers.push_back({std::pmr::vector<A>(largest, memory_of(policy)),
                detail::byte_buffer(memory_of(policy), direct ? 0 : largest * width)});
        }
        const auto& conversion =
            detail::conversions_between<A, storage_types>.of(tensor.output_dtype, tensor.name, true);
        for_each_index(policy, range.last - range.first, [&](std::size_t c, std::size_t worker) {
            const tensor_chunk piece = models.chunks()[range.first + c];
            A* const values = workers[worker].values.data();
            read(from, tensor, piece, values);
            if (kernels::largest_magnitude(values, piece.size) >= exponent_mask<A>
                && models.options().on_nonfinite == nonfinite::error) {
                refuse(models, tensor, piece, values);
            }
            const std::uint64_t at = piece.offset * width;
            if (direct) { conversion.narrow(values, direct + at, piece.size); }
            else {
                conversion.narrow(values, workers[worker].stored.data(), piece.size);
                out.write(tensor.output, at, workers[worker].stored.data(), piece.size * width);
            }
            if (!meter.advance(models.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
        });
    }
    template <arithmetic_element A>
    static void read(
        const aligned_tensor::operand& from, const aligned_tensor& tensor, const tensor_chunk& piece, A* values)
    {
        if (from.source && from.dtype == dtype_of<A>) {
            from.source->read(piece.offset, piece.size, values);
            return;
        }
        constexpr std::size_t step = 512;
        std::array<double, step> raw;
        for (std::size_t at = 0; at < piece.size; at += step) {
            const std::size_t n = std::min(step, piece.size - at);
            const std::size_t width = bits_per_element(from.dtype) / 8;
            const std::byte* stored = from.data + (piece.offset + at) * width;
            if (from.source) {
                from.source->read(piece.offset + at, n, raw.data());
                stored = reinterpret_cast<const std::byte*>(raw.data());
            }
            else if (reinterpret_cast<std::uintptr_t>(stored) % width != 0) {
                std::memcpy(raw.data(), stored, n * width);
                stored = reinterpret_cast<const std::byte*>(raw.data());
            }
            (void)detail::conversions_between<A, storage_types>.of(from.dtype, tensor.name).widen(stored, values + at, n);
        }
    }
    /// Says whose number it is that is not finite.
    template <arithmetic_element A>
    [[noreturn]] TASKVEC_COLD static void refuse(
        const aligned_models& models, const aligned_tensor& tensor, const tensor_chunk& piece, const A* values)
    {
        std::size_t i = 0;
        while (i + 1 < piece.size && std::isfinite(values[i])) { ++i; }
        const std::uint64_t place = piece.offset + i;
        if (tensor.base.data) {
            std::array<double, 8> raw;
            const double before = detail::with_elements(tensor.base, place, 1, reinterpret_cast<std::byte*>(raw.data()),
                [](const auto* value) { return static_cast<double>(widen<double>(*value)); });
            if (!std::isfinite(before)) {
                detail::refuse_nonfinite(tensor.name, models.options().base_label, before, place);
            }
        }
        if (!tensor.tasks[0].source) {
            detail::refuse_nonfinite(tensor.name, models.label(0), static_cast<double>(values[i]), place);
        }
        raise<nonfinite_error>(error_code::result_overflow,
            message("tensor '", tensor.name, "' with its adapters is not finite at index ", place,
                ", though the base is: ", models.label(0), " makes it larger than ", to_string(dtype_of<A>),
                " holds; choose smaller weights, or repair the adapter"));
    }
};

/// base + Σ weight·ΔW into a sink, whose tensors are those of the base in name order, in the base's dtypes or
/// model_options::output (fp8 becomes f32). Every weight is rounded once, from the sum that adapted_weight documents:
/// the same bits for any threads, blocks, budgets and instruction sets. What no adapter changes keeps its bits, in the
/// dtype of the output. Memory: the factors of one tensor at a time beside what the updates take, and a chunk for each
/// thread; ΔW is never formed. Cost: one read and one write of the model, 2·rank flops an entry; DoRA reads its tensors
/// twice. Errors: nonfinite_error, cancelled; what the sink throws.
///
///     adapted_model sum;
///     sum.add(base, "layers.0.q_proj.weight", update, 0.5);
///     fuse(cpu{}, base, sum, sink);
template <cpu_policy Policy>
merge_report fuse(const Policy& policy, const const_model_ref& base, const adapted_model& changes, tensor_sink& out,
    const model_options& how = {})
{
    aligned_models models(&base, {&base, 1}, how);
    const auto sources = changes.attach(models, 0);
    return merge(policy, fuse_options{}, models, out);
}
/// The same to tensors in memory, and from an adapter whose modules M have the weights "M.weight" of the base.
///
///     fuse(cpu{}, base, read_peft("adapter").updates, out);
template <cpu_policy Policy>
merge_report fuse(const Policy& policy, const const_model_ref& base, const adapted_model& changes, const model_ref& out,
    const model_options& how = {})
{
    aligned_models models(&base, {&base, 1}, how);
    const auto sources = changes.attach(models, 0);
    memory_sink sink = detail::sink_over(models, out);
    return merge(policy, fuse_options{}, models, sink);
}
template <cpu_policy Policy, arithmetic_element T>
merge_report fuse(const Policy& policy, const const_model_ref& base, const lora_adapter<T>& adapter,
    const model_ref& out, const model_options& how = {}, double weight = 1)
{
    adapted_model changes;
    for (const auto& [module, update] : adapter) { changes.add(base, module + ".weight", update, weight); }
    return fuse(policy, base, changes, out, how);
}

/// An update and its weight in a sum.
template <arithmetic_element T>
struct weighted_update {
    const lora_update<T>& update; ///< borrowed
    double weight = 1; ///< of the update
};
/// One weight in memory: out = round(weight + Σ factors), typed. `weight` and `out` are out×in and row-major, `updates`
/// refer to theirs; out may be the weight's own memory.
///
///     fuse(cpu{}, as_view(weight), {{update, 0.5}, {other, 1.0}}, as_view(out));
template <cpu_policy Policy, arithmetic_element T, storage_element S, storage_element Out>
void fuse(const Policy& policy, view<const S, memory_space::host> weight,
    std::initializer_list<weighted_update<T>> updates, view<Out, memory_space::host> out, model_options how = {})
{
    if (updates.size() == 0) { raise<invalid_argument>(error_code::inputs_empty, "no update was given"); }
    const extents shape{static_cast<std::int64_t>(updates.begin()->update.out()),
        static_cast<std::int64_t>(updates.begin()->update.in())};
    const_model_ref base;
    base.insert("weight", as_tensor(weight, shape));
    model_ref result;
    result.insert("weight", as_tensor(out, shape));
    how.output = dtype_of<Out>;
    adapted_model changes;
    for (const auto& [update, factor] : updates) { changes.add(base, "weight", update, factor); }
    fuse(policy, base, changes, result, how);
}

TASKVEC_WRONG_CALLS(cpu, fuse, any_arguments,
    "fuse(policy, base, changes, output), where changes are a lora_adapter or an adapted_model, and output a model "
    "or a sink")

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_FUSE_HPP

// ---- taskvec/adapters/phi_space.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_PHI_SPACE_HPP)
#define TASKVEC_SINGLE_ADAPTERS_PHI_SPACE_HPP
// Merging adapters by their own parameters φ = (A, B) rather than by the weights they make: average, task arithmetic,
// TIES, or any other merge method, on adapters that share their initialisation φ0. Tang et al., "Parameter efficient
// multi-task model fusion with partial linearization" (ICLR 2024).
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A fine-tuned adapter φt and the initialisation φ0 that its training started from, as named tensors.
struct initialized_adapter {
    const_model_ref adapter; ///< φt, after training
    const_model_ref initial; ///< φ0, before it
};

namespace detail {

inline std::string phi_label(const model_options& how, std::size_t task)
{
    return task < how.labels.size() ? how.labels[task] : message("adapter ", task + 1);
}
/// Options that call the base what it is here, unless the caller has a name for it.
inline model_options phi_options(model_options how)
{
    if (how.base_label == model_options{}.base_label) { how.base_label = "the initialisation"; }
    return how;
}

/// The factors of an adapter as named tensors: "MODULE.lora_A" and "MODULE.lora_B".
template <class Model, class Adapter>
[[nodiscard]] Model phi_tensors(Adapter& adapter)
{
    Model model;
    for (auto& [name, update] : adapter) {
        const auto tensor = [](auto& x) {
            using T = std::remove_reference_t<decltype(*x.data())>;
            return as_tensor(host_view<T>(x.data(), x.size()),
                {static_cast<std::int64_t>(x.rows()), static_cast<std::int64_t>(x.cols())});
        };
        if (update.a.order() != matrix_order::row_major || update.b.order() != matrix_order::row_major) {
            raise<invalid_argument>(
                error_code::tensor_layout, message("'", name, "': factors must be row-major, as PEFT stores them"));
        }
        model.insert(name + ".lora_A", tensor(update.a));
        model.insert(name + ".lora_B", tensor(update.b));
    }
    return model;
}

} // namespace detail

/// Throws unless all adapters started from the same φ0, bit for bit: invalid_argument names the first tensor that
/// differs, or the tensor of an adapter that has no initialisation. Linearized models add up only around a common φ0,
/// and LoRA factors from different random A0 have nothing in common.
inline void check_shared_initialization(std::span<const initialized_adapter> adapters, const model_options& how = {})
{
    if (adapters.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, "no adapter was given: at least one is needed");
    }
    if (!how.labels.empty() && how.labels.size() != adapters.size()) {
        raise<invalid_argument>(error_code::list_length,
            message(how.labels.size(), " labels for ", adapters.size(), " adapters: give one each, or none"));
    }
    const const_model_ref& first = adapters[0].initial;
    if (first.empty()) {
        raise<invalid_argument>(error_code::initialization_differs,
            message(
                "the initialisation of ", detail::phi_label(how, 0), " has no tensors: merging in phi space needs φ0"));
    }
    for (std::size_t t = 0; t < adapters.size(); ++t) {
        for (const auto& [name, tensor] : adapters[t].adapter) {
            if (!first.find(name)) {
                raise<invalid_argument>(error_code::initialization_differs,
                    message("tensor '", name, "' of ", detail::phi_label(how, t),
                        " has no initialisation: merging in phi space needs the φ0 of every tensor; give the adapter "
                        "that "
                        "its training started from"));
            }
        }
    }
    for (std::size_t t = 1; t < adapters.size(); ++t) {
        const std::string label = detail::phi_label(how, t);
        for (const auto& [name, tensor] : adapters[t].initial) {
            if (!first.find(name)) {
                raise<invalid_argument>(error_code::initialization_differs,
                    message("the initialisation of ", label, " has tensor '", name, "', that of ",
                        detail::phi_label(how, 0), " has not"));
            }
        }
        for (const auto& [name, tensor] : first) {
            const auto* other = adapters[t].initial.find(name);
            if (!other) {
                raise<invalid_argument>(error_code::initialization_differs,
                    message("tensor '", name, "' is missing in the initialisation of ", label));
            }
            if (other->shape != tensor.shape) {
                raise<shape_mismatch>(error_code::tensor_shape,
                    message("tensor '", name, "' of the initialisation of ", label, " has shape ",
                        to_string(other->shape), "; expected ", to_string(tensor.shape)));
            }
            if (other->dtype != tensor.dtype || !other->contiguous() || !tensor.contiguous()
                || std::memcmp(other->data, tensor.data, tensor.bytes(name)) != 0) {
                raise<invalid_argument>(error_code::initialization_differs,
                    message("the initialisation of ", label, " differs from that of ", detail::phi_label(how, 0),
                        " in tensor '", name,
                        "': adapters merge in phi space only around one φ0; merge their products instead"));
            }
        }
    }
}

/// φ* = method(φ0; φ1 … φT): any merge method of the library in the adapters' own parameters, after
/// check_shared_initialization(). task_arithmetic_options{.lambda = λ, .weights = w} is φ0 + λ·Σ wt·(φt − φ0), in one
/// fused pass: a LoraHub candidate. `out` holds memory for the adapter's tensors. Bit-exact, errors and cost as
/// merge().
///
///     merge_in_phi_space(cpu{}, task_arithmetic_options{.lambda = 0.3}, adapters, out);
template <merge_method Options>
merge_report merge_in_phi_space(const cpu& policy, const Options& options,
    std::span<const initialized_adapter> adapters, const model_ref& out, const model_options& how = {})
{
    check_shared_initialization(adapters, how);
    std::vector<const_model_ref> models;
    for (const auto& one : adapters) { models.push_back(one.adapter); }
    const std::span<const const_model_ref> tasks(models);
    const model_options named = detail::phi_options(how);
    if constexpr (!method<Options>::needs_base) { return merge(policy, options, tasks, out, named); }
    else {
        return merge(policy, options, adapters[0].initial, tasks, out, named);
    }
}

/// The same of adapters in memory that were all trained from `init`, which check_trained_from() holds them to.
/// Throws what that and merge() throw, and invalid_argument where factors are column-major.
///
///     auto merged = merge_in_phi_space<float>(cpu{}, task_arithmetic_options{.lambda = 0.3}, init, adapters);
template <arithmetic_element T, merge_method Options>
[[nodiscard]] lora_adapter<T> merge_in_phi_space(const cpu& policy, const Options& options, const lora_adapter<T>& init,
    std::type_identity_t<std::span<const lora_adapter<T>>> adapters, const model_options& how = {},
    merge_report* report = nullptr)
{
    const model_options named = detail::phi_options(how);
    for (std::size_t t = 0; t < adapters.size(); ++t) {
        check_trained_from(init, adapters[t], {.initial = named.base_label, .adapter = detail::phi_label(named, t)});
    }
    lora_adapter<T> merged = init;
    const auto base = detail::phi_tensors<const_model_ref>(init);
    std::vector<const_model_ref> tasks;
    for (const auto& adapter : adapters) { tasks.push_back(detail::phi_tensors<const_model_ref>(adapter)); }
    const auto out = detail::phi_tensors<model_ref>(merged);
    merge_report done = merge(policy, options, base, std::span<const const_model_ref>(tasks), out, named);
    if (report) { *report = std::move(done); }
    return merged;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_PHI_SPACE_HPP

// ---- taskvec/analysis/norms.hpp
#if !defined(TASKVEC_SINGLE_ANALYSIS_NORMS_HPP)
#define TASKVEC_SINGLE_ANALYSIS_NORMS_HPP
// Norms of models and of their changes, and what a task vector holds, tensor by tensor.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// ‖θ‖ of a tensor, and ‖θ − θ0‖ where there is a base (0 otherwise).
struct tensor_norms {
    double norm = 0, change = 0; ///< of the task, and of its difference to the base
};

/// The norms of the first task of `models`, for each of its tensors: f64 sums of a fixed shape over the stored values,
/// the same for any number of threads. Errors: nonfinite_error, cancelled. Cost: one read of the task and the base.
///
///     const aligned_models models(&base, {&merged, 1}, {});
///     norms_of(cpu{}, models)[0].change;   // how far the first tensor moved
[[nodiscard]] inline std::vector<tensor_norms> norms_of(const cpu& policy, const aligned_models& models)
{
    const auto sums = tensor_sums(policy, models, 2, 0, "norms", [](auto& rows, double* sum) {
        const auto* const values = rows.task(0);
        sum[0] = kernels::dot(values, values, rows.size());
        sum[1] = 0;
        if (rows.models().has_base()) {
            const auto* const change = rows.delta(0);
            sum[1] = kernels::dot(change, change, rows.size());
        }
    });
    std::vector<tensor_norms> norms;
    for (const auto& sum : sums) { norms.push_back({std::sqrt(sum[0]), std::sqrt(sum[1])}); }
    return norms;
}

/// The nonzero entries of each task vector (of each model, where there is no base), over all tensors: what takes part
/// in a merge that drops nothing. Errors: nonfinite_error, cancelled. Cost: one read of the models.
///
///     nonzero_entries(cpu{}, models)[t];
[[nodiscard]] inline std::vector<std::uint64_t> nonzero_entries(const cpu& policy, const aligned_models& models)
{
    const auto sums = tensor_sums(policy, models, models.task_count(), 0, "count", [](auto& rows, double* counts) {
        for (std::size_t t = 0; t < rows.task_count(); ++t) {
            const auto* const values = rows.delta(t);
            counts[t] =
                static_cast<double>(std::count_if(values, values + rows.size(), [](auto value) { return value != 0; }));
        }
    });
    std::vector<std::uint64_t> totals(models.task_count());
    for (const auto& tensor : sums) {
        for (std::size_t t = 0; t < totals.size(); ++t) { totals[t] += static_cast<std::uint64_t>(tensor[t]); }
    }
    return totals;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ANALYSIS_NORMS_HPP

// ---- taskvec/analysis/scores.hpp
#if !defined(TASKVEC_SINGLE_ANALYSIS_SCORES_HPP)
#define TASKVEC_SINGLE_ANALYSIS_SCORES_HPP
// Scores of merged models beside those of single-task ones, and their summaries.
// SPDX-License-Identifier: Apache-2.0


#include <cmath>
#include <cstddef>
#include <span>

namespace taskvec::inline TASKVEC_ABI {

/// score / single-task score: 1 is as good as the specialist. Throws invalid_argument unless the single-task score is
/// positive.
[[nodiscard]] inline double normalized_score(double score, double single_task_score)
{
    if (!(single_task_score > 0)) {
        raise<invalid_argument>(error_code::score_invalid,
            message("normalized_score: the single-task score is ", single_task_score, "; it must be positive"));
    }
    return score / single_task_score;
}

/// The mean of normalized scores over tasks: one score and one single-task score for each. Throws invalid_argument.
[[nodiscard]] inline double mean_normalized_score(
    std::span<const double> scores, std::span<const double> single_task_scores)
{
    if (scores.size() != single_task_scores.size() || scores.empty()) {
        raise<invalid_argument>(error_code::list_length,
            message("mean_normalized_score: ", scores.size(), " scores for ", single_task_scores.size(),
                " single-task scores: give one each, at least one"));
    }
    double sum = 0;
    for (std::size_t i = 0; i < scores.size(); ++i) { sum += normalized_score(scores[i], single_task_scores[i]); }
    return sum / static_cast<double>(scores.size());
}

/// Mean and sample standard deviation (divisor n − 1; 0 for one value), smallest and largest.
struct summary {
    std::size_t count = 0; ///< of the values
    double mean = 0, standard_deviation = 0, lowest = 0, highest = 0; ///< in the units of the values
};
/// Of at least one value, else invalid_argument. Two passes.
[[nodiscard]] inline summary summarize(std::span<const double> values)
{
    if (values.empty()) { raise<invalid_argument>(error_code::inputs_empty, "summarize: there are no values"); }
    summary result{values.size(), 0, 0, values[0], values[0]};
    for (const double value : values) {
        result.mean += value;
        if (value < result.lowest) { result.lowest = value; }
        if (value > result.highest) { result.highest = value; }
    }
    result.mean /= static_cast<double>(values.size());
    double square = 0;
    for (const double value : values) { square += (value - result.mean) * (value - result.mean); }
    if (values.size() > 1) { result.standard_deviation = std::sqrt(square / static_cast<double>(values.size() - 1)); }
    return result;
}

/// The mean of the entries off the diagonal of an n × n matrix (row-major), such as cosine_matrix()'s; 0 for n = 1.
/// Throws invalid_argument when the matrix is not square.
[[nodiscard]] inline double mean_off_diagonal(std::span<const double> matrix)
{
    const auto n = static_cast<std::size_t>(std::llround(std::sqrt(static_cast<double>(matrix.size()))));
    if (n * n != matrix.size()) {
        raise<invalid_argument>(
            error_code::list_length, message("mean_off_diagonal: ", matrix.size(), " elements are no square matrix"));
    }
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j < n; ++j) { sum += i == j ? 0.0 : matrix[i * n + j]; }
    }
    return n < 2 ? 0.0 : sum / static_cast<double>(n * (n - 1));
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ANALYSIS_SCORES_HPP

// ---- taskvec/arithmetic/task_vector.hpp
#if !defined(TASKVEC_SINGLE_ARITHMETIC_TASK_VECTOR_HPP)
#define TASKVEC_SINGLE_ARITHMETIC_TASK_VECTOR_HPP
// Task vectors as plain vectors: difference, application, weighted combination, negation; dot, norm, cosine.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <ranges>
#include <span>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// out = tuned − base, the task vector τ. Flat views of one length; storage types may differ. Subtracted in f32 (f64
/// when an input is f64) and rounded once; bit-exact. May work in place. Errors: shape_mismatch, nonfinite_error.
///
///     std::vector<float> tau(n);
///     difference(cpu{}, tuned, base, tau);
template <input_of<cpu> Tuned, input_of<cpu> Base, output_of<cpu> Out>
void difference(
    const cpu& policy, const Tuned& tuned, const Base& base, Out&& out, nonfinite on_nonfinite = nonfinite::error);

/// out = base + λ·vector: a task vector applied. Product and sum round separately in f32 (f64 when an input is f64).
/// Bit-exact. May work in place. Errors: shape_mismatch, nonfinite_error.
///
///     apply(cpu{}, base, tau, 0.3, merged);
template <input_of<cpu> Base, input_of<cpu> Vector, output_of<cpu> Out>
void apply(const cpu& policy, const Base& base, const Vector& vector, double lambda, Out&& out,
    nonfinite on_nonfinite = nonfinite::error);

/// out = −x: forgetting instead of learning. Exact. May work in place.
template <input_of<cpu> X, output_of<cpu> Out>
void negate(const cpu& policy, const X& x, Out&& out, nonfinite on_nonfinite = nonfinite::error);

/// out = Σ wt·xt over flat views of one storage type, in f32 (f64 for f64), in the order of the list; every product and
/// sum rounds; bit-exact. `out` may not share memory with an input. Errors: invalid_argument (no vector, wrong number
/// of weights), shape_mismatch, nonfinite_error.
///
///     combine(cpu{}, vectors, std::vector{0.5, -0.5}, out);
template <std::ranges::input_range Vectors, output_of<cpu> Out>
    requires input_of<std::ranges::range_reference_t<const Vectors>, cpu>
void combine(const cpu& policy, const Vectors& vectors, std::span<const double> weights, Out&& out,
    nonfinite on_nonfinite = nonfinite::error);

/// Σ xi·yi in f64, in a fixed pairwise shape: the same bits for any threads. Relative to Σ|xi·yi| the error is below
/// (12 + log2 n)·2^-53 or so. Errors: shape_mismatch.
template <input_of<cpu> X, input_of<cpu> Y>
[[nodiscard]] double dot(const cpu& policy, const X& x, const Y& y);

/// ‖x‖ = √(x·x).
template <input_of<cpu> X>
[[nodiscard]] double norm(const cpu& policy, const X& x);

/// x·y / (‖x‖·‖y‖), in [−1, 1]; 0 when a vector is 0, NaN when one has NaN or infinity. Vectors whose squares are
/// beyond f64 are scaled first.
template <input_of<cpu> X, input_of<cpu> Y>
[[nodiscard]] double cosine(const cpu& policy, const X& x, const Y& y);

/// Dots of all pairs of task vectors τs·τt over all included tensors: a T×T symmetric matrix, row-major. One walk over
/// the models; f64; fixed shape. Entries of τ in f32 (f64 for f64); what is beyond their range becomes infinity.
/// Errors: nonfinite_error, cancelled.
[[nodiscard]] inline std::vector<double> dot_matrix(const cpu& policy, const aligned_models& models);

/// Cosines of all pairs of task vectors: T×T, row-major, ones on the diagonal (0 for a task vector that is 0), all in
/// [−1, 1]; NaN for a task vector with NaN or infinity, where these propagate. Task vectors whose squares are beyond
/// f64, or whose entries are beyond f32, are computed in f64 and scaled first: one or two more walks.
///
///     const aligned_models models(&base, tasks);
///     std::vector<double> cosines = cosine_matrix(cpu{}, models);
[[nodiscard]] inline std::vector<double> cosine_matrix(const cpu& policy, const aligned_models& models);

namespace detail {

/// The arithmetic type of several views together: f64 if one is f64, otherwise f32.
template <class... X>
using common_arithmetic = std::conditional_t<(std::same_as<element_of<X>, double> || ...), double, float>;

template <class Out, class... X>
void check_lengths(const Out& out, const X&... inputs)
{
    std::size_t which = 0;
    const auto check = [&](std::size_t size) {
        ++which;
        if (size != out.size()) {
            raise<shape_mismatch>(error_code::input_size,
                message("input ", which, " has ", size, " elements; the output has ", out.size()));
        }
    };
    (check(inputs.size()), ...);
}

/// One row of a flat view in arithmetic type A: in place where it is stored as A, otherwise widened into `row`.
template <arithmetic_element A, class T>
const A* widened(host_view<const T> x, std::size_t offset, std::size_t n, A* row, bits_type<A>& largest)
{
    if constexpr (std::same_as<T, A>) {
        largest = std::max(largest, kernels::largest_magnitude(x.data() + offset, n));
        return x.data() + offset;
    }
    else {
        largest = std::max(largest, kernels::widen(x.data() + offset, row, n));
        return row;
    }
}

template <class T>
host_view<const T> const_view(host_view<T> x) noexcept
{
    return x;
}

[[noreturn]] TASKVEC_COLD inline void refuse_nonfinite_input(std::size_t which, double found, std::uint64_t index)
{
    raise<nonfinite_error>(error_code::not_finite,
        message("input ", which, " holds ", std::isnan(found) ? "NaN" : "infinity", " at index ", index,
            ": repair it, or ask for non-finite values to propagate"));
}

template <class T>
void find_nonfinite(host_view<const T> x, std::size_t which, std::size_t offset, std::size_t n)
{
    for (std::size_t i = offset; i < offset + n; ++i) {
        const double value = widen<double>(x[i]);
        if (!std::isfinite(value)) { refuse_nonfinite_input(which, value, i); }
    }
}

/// out = combine(rows of the inputs), block by block: combine(A* out, const A* const* rows, n).
template <arithmetic_element A, class Out, class Combine, class... T>
void map_rows(
    const cpu& policy, nonfinite on_nonfinite, host_view<Out> out, Combine&& combine, host_view<const T>... inputs)
{
    check_lengths(out, inputs...);
    constexpr std::size_t step = 65536;
    for_each_index(policy, (out.size() + step - 1) / step, [&](std::size_t index, std::size_t) {
        std::array<std::array<A, block_size>, sizeof...(T)> scratch;
        std::array<A, block_size> result;
        for (std::size_t offset = index * step; offset < std::min(out.size(), (index + 1) * step);
            offset += block_size) {
            const std::size_t n = std::min(block_size, out.size() - offset);
            bits_type<A> largest = 0;
            std::size_t row = 0;
            const std::array<const A*, sizeof...(T)> rows{
                widened<A>(inputs, offset, n, scratch[row++].data(), largest)...};
            if (largest >= exponent_mask<A> && on_nonfinite == nonfinite::error) {
                std::size_t which = 0;
                (find_nonfinite(inputs, ++which, offset, n), ...);
            }
            combine(result.data(), rows, n);
            kernels::narrow(result.data(), out.data() + offset, n);
        }
    });
}

} // namespace detail

template <input_of<cpu> Tuned, input_of<cpu> Base, output_of<cpu> Out>
void difference(const cpu& policy, const Tuned& tuned, const Base& base, Out&& out, nonfinite on_nonfinite)
{
    using A = detail::common_arithmetic<const Tuned, const Base>;
    detail::map_rows<A>(
        policy, on_nonfinite, as_view(out),
        [](A* result, const auto& rows, std::size_t n) { kernels::subtract(rows[0], rows[1], result, n); },
        detail::const_view(as_view(tuned)), detail::const_view(as_view(base)));
}

template <input_of<cpu> Base, input_of<cpu> Vector, output_of<cpu> Out>
void apply(const cpu& policy, const Base& base, const Vector& vector, double lambda, Out&& out, nonfinite on_nonfinite)
{
    using A = detail::common_arithmetic<const Base, const Vector>;
    detail::map_rows<A>(
        policy, on_nonfinite, as_view(out),
        [lambda](A* result, const auto& rows, std::size_t n) {
            std::memcpy(result, rows[1], n * sizeof(A));
            kernels::add_scaled(result, rows[0], static_cast<A>(lambda), n);
        },
        detail::const_view(as_view(base)), detail::const_view(as_view(vector)));
}

template <input_of<cpu> X, output_of<cpu> Out>
void negate(const cpu& policy, const X& x, Out&& out, nonfinite on_nonfinite)
{
    using A = detail::common_arithmetic<const X>;
    detail::map_rows<A>(
        policy, on_nonfinite, as_view(out),
        [](A* result, const auto& rows, std::size_t n) { kernels::negate(rows[0], result, n); },
        detail::const_view(as_view(x)));
}

template <std::ranges::input_range Vectors, output_of<cpu> Out>
    requires input_of<std::ranges::range_reference_t<const Vectors>, cpu>
void combine(
    const cpu& policy, const Vectors& vectors, std::span<const double> weights, Out&& out, nonfinite on_nonfinite)
{
    using X = std::remove_reference_t<std::ranges::range_reference_t<const Vectors>>;
    using T = element_of<X>;
    using A = arithmetic_type<T>;
    std::vector<host_view<const T>> inputs;
    for (const auto& vector : vectors) { inputs.push_back(as_view(vector)); }
    if (inputs.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, "no vector was given: at least one is needed");
    }
    if (weights.size() != inputs.size()) {
        raise<invalid_argument>(error_code::list_length,
            message(weights.size(), " weights for ", inputs.size(), " vectors: give one each"));
    }
    const auto result = as_view(out);
    for (const auto& input : inputs) { detail::check_lengths(result, input); }
    constexpr std::size_t step = 65536;
    for_each_index(policy, (result.size() + step - 1) / step, [&](std::size_t index, std::size_t) {
        std::array<A, block_size> row, sum;
        for (std::size_t offset = index * step; offset < std::min(result.size(), (index + 1) * step);
            offset += block_size) {
            const std::size_t n = std::min(block_size, result.size() - offset);
            for (std::size_t t = 0; t < inputs.size(); ++t) {
                bits_type<A> largest = 0;
                const A* const x = detail::widened<A>(inputs[t], offset, n, row.data(), largest);
                if (largest >= exponent_mask<A> && on_nonfinite == nonfinite::error) {
                    detail::find_nonfinite(inputs[t], t + 1, offset, n);
                }
                const A weight = static_cast<A>(weights[t]);
                t == 0 ? kernels::begin_sum(sum.data(), x, weight, n) : kernels::accumulate(sum.data(), x, weight, n);
            }
            kernels::narrow(sum.data(), result.data() + offset, n);
        }
    });
}

template <input_of<cpu> X, input_of<cpu> Y>
double dot(const cpu& policy, const X& x, const Y& y)
{
    using A = detail::common_arithmetic<const X, const Y>;
    const auto a = detail::const_view(as_view(x));
    const auto b = detail::const_view(as_view(y));
    detail::check_lengths(a, b);
    std::pmr::vector<double> leaves((a.size() + block_size - 1) / block_size, memory_of(policy));
    for_each_index(policy, (leaves.size() + 31) / 32, [&](std::size_t index, std::size_t) {
        std::array<A, block_size> first, second;
        for (std::size_t leaf = 32 * index; leaf < std::min(leaves.size(), 32 * (index + 1)); ++leaf) {
            const std::size_t offset = leaf * block_size, n = std::min(block_size, a.size() - offset);
            bits_type<A> ignored = 0;
            leaves[leaf] = kernels::dot(detail::widened<A>(a, offset, n, first.data(), ignored),
                detail::widened<A>(b, offset, n, second.data(), ignored), n);
        }
    });
    detail::pairwise_sum sum;
    for (const double leaf : leaves) { sum.add(leaf); }
    return sum.total();
}

template <input_of<cpu> X>
double norm(const cpu& policy, const X& x)
{
    return std::sqrt(dot(policy, x, x));
}

namespace detail {
/// Whether a sum of squares lost nothing to the range of f64: 0 may be the square of 1e-200, infinity that of 1e200.
[[nodiscard]] inline bool squares_fit(double sum) noexcept
{
    return sum >= 0x1p-900 && sum <= 0x1p1000;
}
/// Cosine from a dot and two sums of squares, each of a vector of its own scale; NaN where one is not finite.
[[nodiscard]] inline double cosine_of(double dot, double square_x, double square_y) noexcept
{
    if (!std::isfinite(square_x) || !std::isfinite(square_y)) { return std::numeric_limits<double>::quiet_NaN(); }
    const double norms = std::sqrt(square_x) * std::sqrt(square_y);
    return norms == 0 ? 0.0 : std::clamp(dot / norms, -1.0, 1.0);
}

/// y − x of finite numbers in f64, as a number below 2 in magnitude and a power of two; what is not finite stays so.
struct scaled_difference {
    double value = 0;
    int exponent = std::numeric_limits<int>::min(); ///< of 0: as small as can be
    scaled_difference(double x, double y) noexcept
    {
        value = y - x;
        int halved = 0;
        if (std::isinf(value) && std::isfinite(x) && std::isfinite(y)) {
            value = y / 2 - x / 2;
            halved = 1;
        }
        if (value == 0 || !std::isfinite(value)) { return; }
        const int power = std::ilogb(value);
        value = std::scalbn(value, -power);
        exponent = power + halved;
    }
    /// The number in units of 2^power, where power is at least its own.
    [[nodiscard]] double in_units(int power) const noexcept
    {
        return value == 0 || !std::isfinite(value) ? value : std::scalbn(value, std::max(exponent - power, -1100));
    }
};
} // namespace detail

template <input_of<cpu> X, input_of<cpu> Y>
double cosine(const cpu& policy, const X& x, const Y& y)
{
    const double square_x = dot(policy, x, x), square_y = dot(policy, y, y);
    if (detail::squares_fit(square_x) && detail::squares_fit(square_y)) {
        return detail::cosine_of(dot(policy, x, y), square_x, square_y);
    }
    const auto a = detail::const_view(as_view(x));
    const auto b = detail::const_view(as_view(y));
    detail::check_lengths(a, b);
    std::array<int, 2> powers;
    powers.fill(std::numeric_limits<int>::min());
    for (std::size_t i = 0; i < a.size(); ++i) {
        powers[0] = std::max(powers[0], detail::scaled_difference(0, widen<double>(a[i])).exponent);
        powers[1] = std::max(powers[1], detail::scaled_difference(0, widen<double>(b[i])).exponent);
    }
    std::array<detail::pairwise_sum, 3> sums;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double first = detail::scaled_difference(0, widen<double>(a[i])).in_units(powers[0]);
        const double second = detail::scaled_difference(0, widen<double>(b[i])).in_units(powers[1]);
        sums[0].add(first * second);
        sums[1].add(first * first);
        sums[2].add(second * second);
    }
    return detail::cosine_of(sums[0].total(), sums[1].total(), sums[2].total());
}

namespace detail {
/// A symmetric matrix from the sums of its upper triangle, row by row, tensor by tensor.
[[nodiscard]] inline std::vector<double> symmetric_dots(const call_vector<call_vector<double>>& sums, std::size_t tasks)
{
    std::vector<double> matrix(tasks * tasks, 0.0);
    std::size_t pair = 0;
    for (std::size_t s = 0; s < tasks; ++s) {
        for (std::size_t t = s; t < tasks; ++t, ++pair) {
            detail::pairwise_sum total;
            for (const auto& tensor : sums) { total.add(tensor[pair]); }
            matrix[s * tasks + t] = matrix[t * tasks + s] = total.total();
        }
    }
    return matrix;
}

/// Whether no sum of squares of a matrix of dots lost anything. A task vector of 0 has no square at all: whether it is
/// one the sums cannot say.
[[nodiscard]] inline bool all_squares_fit(const std::vector<double>& dots, std::size_t tasks)
{
    for (std::size_t t = 0; t < tasks; ++t) {
        if (!squares_fit(dots[t * tasks + t])) { return false; }
    }
    return true;
}

/// Cosines from a matrix of dots.
[[nodiscard]] inline std::vector<double> cosines_of(const std::vector<double>& dots, std::size_t tasks)
{
    std::vector<double> cosines(tasks * tasks);
    for (std::size_t s = 0; s < tasks; ++s) {
        for (std::size_t t = 0; t < tasks; ++t) {
            const double square = dots[s * tasks + s];
            cosines[s * tasks + t] = s == t && std::isfinite(square)
                ? (square == 0 ? 0.0 : 1.0)
                : cosine_of(dots[s * tasks + t], square, dots[t * tasks + t]);
        }
    }
    return cosines;
}
} // namespace detail

inline std::vector<double> dot_matrix(const cpu& policy, const aligned_models& models)
{
    const std::size_t tasks = models.task_count(), pairs = tasks * (tasks + 1) / 2;
    const auto sums = tensor_sums(policy, models, pairs, 0, "dots", [&]<class A>(row_block<A>& rows, double* out) {
        std::pmr::vector<const A*> deltas(memory_of(policy));
        deltas.reserve(tasks);
        for (std::size_t t = 0; t < tasks; ++t) { deltas.push_back(rows.delta(t)); }
        for (std::size_t s = 0; s < tasks; ++s) {
            for (std::size_t t = s; t < tasks; ++t) { *out++ = kernels::dot(deltas[s], deltas[t], rows.size()); }
        }
    });
    return detail::symmetric_dots(sums, tasks);
}

namespace detail {
/// The dots, of task vectors whose squares, or whose entries in f32, are beyond their types, again: in f64, each task
/// vector in units of the power of two of its largest entry. Nothing changes where none is. One walk, or two.
inline void rescale_dots(const cpu& policy, const aligned_models& models, std::vector<double>& dots)
{
    constexpr int none = std::numeric_limits<int>::min();
    const std::size_t tasks = models.task_count(), pairs = tasks * (tasks + 1) / 2;
    const auto each_row = [tasks]<class A>(row_block<A>& rows, const auto& use) {
        const A* const base = rows.models().has_base() ? rows.base() : nullptr;
        for (std::size_t t = 0; t < tasks; ++t) {
            const A* const task = rows.task(t);
            for (std::size_t i = 0; i < rows.size(); ++i) {
                use(t, i, scaled_difference(base ? static_cast<double>(base[i]) : 0.0, static_cast<double>(task[i])));
            }
        }
    };
    std::vector<int> of_chunks(models.chunks().size() * tasks, none), powers(tasks, none);
    for_each_block(policy, models, all_chunks(models), 0, "ranges", [&](std::size_t chunk, std::size_t, auto& rows) {
        each_row(rows, [&](std::size_t t, std::size_t, const scaled_difference& entry) {
            auto& power = of_chunks[chunk * tasks + t];
            power = std::max(power, entry.exponent);
        });
    });
    bool changed = false;
    for (std::size_t t = 0; t < tasks; ++t) {
        for (std::size_t c = t; c < of_chunks.size(); c += tasks) { powers[t] = std::max(powers[t], of_chunks[c]); }
        changed = changed || (powers[t] != none && !squares_fit(dots[t * tasks + t]));
    }
    if (!changed) { return; } // a task vector that is 0, or not finite
    const auto sums = tensor_sums(policy, models, pairs, 0, "dots", [&](auto& rows, double* out) {
        std::vector<double> scaled(tasks * rows.size());
        each_row(rows, [&](std::size_t t, std::size_t i, const scaled_difference& entry) {
            scaled[t * rows.size() + i] = entry.in_units(powers[t]);
        });
        for (std::size_t s = 0; s < tasks; ++s) {
            for (std::size_t t = s; t < tasks; ++t) {
                *out++ = kernels::dot(&scaled[s * rows.size()], &scaled[t * rows.size()], rows.size());
            }
        }
    });
    dots = symmetric_dots(sums, tasks);
}
} // namespace detail

inline std::vector<double> cosine_matrix(const cpu& policy, const aligned_models& models)
{
    auto dots = dot_matrix(policy, models);
    if (!detail::all_squares_fit(dots, models.task_count())) { detail::rescale_dots(policy, models, dots); }
    return detail::cosines_of(dots, models.task_count());
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(cpu, difference, any_arguments, "difference(policy, tuned, base, output), flat views of one length")
TASKVEC_WRONG_CALLS(cpu, apply, flat_arguments,
    "apply(policy, base, vector, lambda, output), or apply(policy, delta, live) of sparse entries")
TASKVEC_WRONG_CALLS(cpu, negate, any_arguments, "negate(policy, x, output), flat views of one length")
TASKVEC_WRONG_CALLS(
    cpu, combine, any_arguments, "combine(policy, vectors, weights, output), where weights are a std::vector<double>")
TASKVEC_WRONG_CALLS(cpu, dot, any_arguments, "dot(policy, x, y), flat views of one length")
TASKVEC_WRONG_CALLS(cpu, norm, any_arguments, "norm(policy, x) of a flat view")
TASKVEC_WRONG_CALLS(cpu, cosine, any_arguments, "cosine(policy, x, y), flat views of one length")
template <cpu_policy P, class Vectors, class... Arguments>
auto combine(const P&, const Vectors&, std::initializer_list<double>, const Arguments&...)
{
    static_assert(!policy<P>, "combine(): the weights stand in braces: name them, or pass std::vector{0.5, -0.5}");
    return detail::no_result{};
}

// On taskvec::gpu these live in a header of their own.
TASKVEC_CALLS_NEED_HEADER(difference, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(apply, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(negate, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(combine, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(dot, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(norm, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(cosine, arithmetic, "taskvec/device/arithmetic.hpp")

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ARITHMETIC_TASK_VECTOR_HPP

// ---- taskvec/core/csv.hpp
#if !defined(TASKVEC_SINGLE_CORE_CSV_HPP)
#define TASKVEC_SINGLE_CORE_CSV_HPP
// Pieces of CSV files.
// SPDX-License-Identifier: Apache-2.0


#include <charconv>
#include <string>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// The shortest text that reads back as the same number; independent of the locale.
[[nodiscard]] inline std::string csv_number(double value)
{
    char text[32];
    const auto end = std::to_chars(text, text + sizeof text, value).ptr;
    return {text, end};
}

/// A CSV field after RFC 4180: quoted when it has to be.
[[nodiscard]] inline std::string csv_field(std::string_view text)
{
    if (text.find_first_of(",\"\r\n") == std::string_view::npos) { return std::string(text); }
    std::string quoted = "\"";
    for (const char c : text) {
        if (c == '"') { quoted += '"'; }
        quoted += c;
    }
    return quoted + '"';
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_CSV_HPP

// ---- taskvec/core/exponential.hpp
#if !defined(TASKVEC_SINGLE_CORE_EXPONENTIAL_HPP)
#define TASKVEC_SINGLE_CORE_EXPONENTIAL_HPP
// e^x and ln x of packs, by additions, products and quotients that round as IEEE's do: the same bits on every processor
// and with every C library.
// SPDX-License-Identifier: Apache-2.0


#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_KERNELS_BEGIN

/// e^x for x ≤ 709: within 2 units in the last place, 0 below −708, NaN of NaN. x = k·ln 2 + r with |r| ≤ ½·ln 2, and
/// e^r by its series up to r¹³/13!.
template <int bytes>
[[nodiscard]] TASKVEC_INLINE pack<double, bytes> exponential(const pack<double, bytes>& x) noexcept;

/// ln x of normal positive numbers: within 2 units in the last place, or 2^−53 beside 1. x = 2^k·m with √½ ≤ m < √2,
/// and ln m = 2·artanh s with s = (m − 1)/(m + 1), by its series up to s²¹/21.
template <int bytes>
[[nodiscard]] TASKVEC_INLINE pack<double, bytes> logarithm(const pack<double, bytes>& x) noexcept;

namespace detail {

/// ln 2 in two parts: products of the first with whole numbers up to 2^20 are exact.
inline constexpr double ln2_upper = 0x1.62e42feep-1, ln2_lower = 0x1.a39ef35793c76p-33;
/// Where 1/2 and its neighbours are the lowest bits of a f64's sum with it: what is added is rounded to a whole number.
inline constexpr double to_whole = 0x1.8p52;

} // namespace detail

template <int bytes>
TASKVEC_INLINE pack<double, bytes> exponential(const pack<double, bytes>& x) noexcept
{
    constexpr double of_series[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
        1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0};
    const auto shifted = x * 0x1.71547652b82fep0 + detail::to_whole; // k in the lowest bits
    const auto k = shifted - detail::to_whole;
    const auto r = (x - k * detail::ln2_upper) - k * detail::ln2_lower;
    auto series = filled<pack<double, bytes>>(of_series[0]);
    TASKVEC_UNROLL(13)
    for (int n = 1; n < 14; ++n) { series = series * r + of_series[n]; }
    const auto scaled = from_bits(bits_of(series) + (bits_of(shifted) << 52));
    return select(x == x, where(x >= -708.0, scaled), x);
}

template <int bytes>
TASKVEC_INLINE pack<double, bytes> logarithm(const pack<double, bytes>& x) noexcept
{
    constexpr std::int64_t root_of_half = 0x3fe6a09e667f3bcd, bias = std::int64_t{1024} << 52;
    const auto k = (bits_of(x) + (bias - root_of_half)) >> 52; // and 1024
    const auto m = from_bits(bits_of(x) - ((k + std::int64_t{-1024}) << 52));
    const auto exponent = from_bits(k | std::int64_t{0x4330000000000000}) - (0x1p52 + 1024);
    const auto s = (m - 1.0) / (m + 1.0), z = s * s;
    auto series = filled<pack<double, bytes>>(1.0 / 21);
    TASKVEC_UNROLL(10)
    for (int n = 19; n > 0; n -= 2) { series = series * z + 1.0 / n; }
    const auto doubled = s + s;
    return exponent * detail::ln2_upper + (doubled * series + exponent * detail::ln2_lower);
}

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_EXPONENTIAL_HPP

// ---- taskvec/core/option_text.hpp
#if !defined(TASKVEC_SINGLE_CORE_OPTION_TEXT_HPP)
#define TASKVEC_SINGLE_CORE_OPTION_TEXT_HPP
// Options as text: read from a command line or a configuration, written to a report, listed for help and reference
// pages. All of it from the tables of core/option_table.hpp.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What kind of value an option holds.
enum class option_kind : std::uint8_t { truth, number, whole_number, word, numbers };

/// A row of a table, without its types.
struct option_description {
    std::string name, meaning, unit; ///< as in the row
    option_kind kind = option_kind::number; ///< of its values
    std::string initial; ///< the default, as write_option() writes it
    std::string expected; ///< "a number above 0 and up to 1", "one of: model, tensor"
    std::string negated; ///< of a truth that is on by default: the name that turns it off
    std::vector<std::string> words{}; ///< that it takes, where it takes words
    option_axis axis{}; ///< what a sweep tries
    bool per_task = false; ///< a list with an entry for each task
    std::string each_of{}; ///< of a list for the tasks: "weight", or the row that holds for all of them
    bool is_preset = false; ///< chooses a set of values for others: the words name the presets
};

/// A value as read_option() reads it: the shortest decimal that gives the same number, a word, true or false, numbers
/// separated by commas.
template <describable_value Value>
[[nodiscard]] std::string write_option(const Value& value);

/// Reads a value for a row: the whole text, in the row's range. Numbers as "0.2", "1e-6", "+3"; truths as true or
/// false, yes or no, on or off, 1 or 0; lists as "1,0.5". `label` begins messages. Errors: invalid_argument, one
/// sentence that says what was found and what is expected.
///
///     read_option(row, "0.2", "density")   // 0.2;  "20%": density is '20%'; expected a number above 0 and up to 1
template <class Options, class Value>
[[nodiscard]] Value read_option(const option_row<Options, Value>& row, std::string_view text, std::string_view label);

/// Sets the member whose row, or whose preset option, has this name. False where there is none. Setting a preset sets
/// all members that it belongs to: presets come first. `label`: as for read_option(); empty: the name.
///
///     set_option(options, "density", "0.2");
template <described_options Options>
bool set_option(Options& options, std::string_view name, std::string_view text, std::string_view label = {});

/// The rows of a struct, those of inner structs in their places, presets after them.
///
///     for (const auto& option : describe_options<ties_options>()) { std::cout << option.name << …; }
template <class Options>
[[nodiscard]] std::vector<option_description> describe_options();

namespace detail {

/// A decimal number that is the whole text; a sign of either kind may stand before it.
[[nodiscard]] inline std::optional<double> read_number(std::string_view text)
{
    if (text.size() > 1 && text[0] == '+' && text[1] != '-') { text.remove_prefix(1); }
    double value = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || failure != std::errc{} || end != text.data() + text.size()) { return std::nullopt; }
    return value;
}
[[nodiscard]] inline std::optional<std::uint64_t> read_whole_number(std::string_view text)
{
    std::uint64_t value = 0;
    const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || failure != std::errc{} || end != text.data() + text.size()) { return std::nullopt; }
    return value;
}

template <class Words>
[[nodiscard]] std::string list_text(const Words& words)
{
    std::string text = "one of: ";
    for (const auto& word : words) { text += (text.size() == 8 ? "" : ", ") + std::string(word); }
    return text;
}

template <worded_enum Enum>
[[nodiscard]] std::vector<std::string> words_of()
{
    std::vector<std::string> words;
    for (const auto& [value, word] : enum_words<Enum>::words) { words.emplace_back(word); }
    return words;
}

template <class Value>
[[nodiscard]] constexpr option_kind kind_of()
{
    static_assert(describable_value<Value>,
        "taskvec: a member of this type cannot stand in a table of options: bool, numbers, enumerations with words "
        "(enum_words) and vectors of double can");
    if constexpr (std::same_as<Value, bool>) { return option_kind::truth; }
    else if constexpr (std::floating_point<Value>) {
        return option_kind::number;
    }
    else if constexpr (std::unsigned_integral<Value>) {
        return option_kind::whole_number;
    }
    else if constexpr (std::is_enum_v<Value>) {
        return option_kind::word;
    }
    else {
        return option_kind::numbers;
    }
}

template <class Value>
[[nodiscard]] std::string expected_text(const option_details& details)
{
    constexpr auto kind = kind_of<Value>();
    if constexpr (kind == option_kind::truth) { return "true or false"; }
    else if constexpr (kind == option_kind::number) {
        return range_text(details, "a number");
    }
    else if constexpr (kind == option_kind::whole_number) {
        return whole_number_text(details, std::numeric_limits<Value>::max());
    }
    else if constexpr (kind == option_kind::word) {
        return list_text(words_of<Value>());
    }
    else {
        return "numbers separated by commas, such as 1,0.5";
    }
}

[[noreturn]] inline void refuse_option(std::string_view label, std::string_view text, const std::string& expected)
{
    const bool plain = read_number(text).has_value();
    raise<invalid_argument>(error_code::option_value,
        message(label, " is ", plain ? "" : "'", text, plain ? "" : "'", "; expected ", expected));
}

} // namespace detail

template <describable_value Value>
[[nodiscard]] std::string write_option(const Value& value)
{
    if constexpr (std::same_as<Value, bool>) { return value ? "true" : "false"; }
    else if constexpr (std::floating_point<Value>) {
        return detail::number_text(static_cast<double>(value));
    }
    else if constexpr (std::unsigned_integral<Value>) {
        return std::to_string(value);
    }
    else if constexpr (std::is_enum_v<Value>) {
        for (const auto& [known, word] : enum_words<Value>::words) {
            if (known == value) { return std::string(word); }
        }
        return {};
    }
    else {
        std::string text;
        for (const double number : value) { text += (text.empty() ? "" : ",") + detail::number_text(number); }
        return text;
    }
}

template <class Options, class Value>
[[nodiscard]] Value read_option(const option_row<Options, Value>& row, std::string_view text, std::string_view label)
{
    constexpr auto kind = detail::kind_of<Value>();
    const auto refuse = [&] { detail::refuse_option(label, text, detail::expected_text<Value>(row.details)); };
    if constexpr (kind == option_kind::truth) {
        for (const char* word : {"true", "yes", "on", "1"}) {
            if (text == word) { return true; }
        }
        for (const char* word : {"false", "no", "off", "0"}) {
            if (text == word) { return false; }
        }
        refuse();
        return false;
    }
    else if constexpr (kind == option_kind::number) {
        const auto value = detail::read_number(text);
        if (!value || !detail::in_range(row.details, *value)) { refuse(); }
        return static_cast<Value>(*value);
    }
    else if constexpr (kind == option_kind::whole_number) {
        const auto value = detail::read_whole_number(text);
        if (!value || *value > std::numeric_limits<Value>::max()
            || !detail::in_range(row.details, static_cast<double>(*value))) {
            refuse();
        }
        return static_cast<Value>(*value);
    }
    else if constexpr (kind == option_kind::word) {
        for (const auto& [value, word] : enum_words<Value>::words) {
            if (word == text) { return value; }
        }
        refuse();
        return {};
    }
    else {
        std::vector<double> values;
        for (std::size_t at = 0; at <= text.size() && !text.empty();) {
            const std::size_t end = std::min(text.find(',', at), text.size());
            const auto value = detail::read_number(text.substr(at, end - at));
            if (!value || !std::isfinite(*value)) { refuse(); }
            values.push_back(*value);
            at = end + 1;
        }
        return values;
    }
}

template <described_options Options>
bool set_option(Options& options, std::string_view name, std::string_view text, std::string_view label)
{
    if (label.empty()) { label = name; }
    bool found = false;
    for_each_preset_list(options, [&](std::string_view option, const auto& presets, auto& target) {
        if (option != name) { return; }
        found = true;
        std::vector<std::string_view> words;
        for (const auto& preset : presets) {
            words.push_back(preset.name);
            if (preset.name == text) {
                target = preset.make();
                return;
            }
        }
        detail::refuse_option(label, text, detail::list_text(words));
    });
    for_each_option(options, [&](const auto& row, auto& member) {
        if (row.name == name) {
            member = read_option(row, text, label);
            found = true;
        }
    });
    return found;
}

template <class Options>
[[nodiscard]] std::vector<option_description> describe_options()
{
    std::vector<option_description> list;
    const Options initial{};
    for_each_option(initial, [&]<class Owner, class Value>(const option_row<Owner, Value>& row, const Value& value) {
        option_description one;
        one.name = row.name;
        one.meaning = row.meaning;
        one.kind = detail::kind_of<Value>();
        one.unit = !row.details.unit.empty()        ? std::string(row.details.unit)
            : one.kind == option_kind::whole_number ? "N"
            : one.kind == option_kind::word         ? "WORD"
                                                    : "X";
        if constexpr (describable_value<Value>) { one.initial = write_option(value); }
        one.expected = detail::expected_text<Value>(row.details);
        one.negated = row.details.negated;
        if constexpr (worded_enum<Value>) { one.words = detail::words_of<Value>(); }
        one.axis = row.details.axis;
        one.per_task = row.per_task;
        one.each_of = row.each_of;
        list.push_back(std::move(one));
    });
    if constexpr (described_options<Options>) {
        for_each_preset_list(initial, [&](std::string_view option, const auto& presets, const auto&) {
            option_description one;
            one.name = option;
            one.meaning = "whose definition to follow";
            one.unit = "WHOSE";
            one.kind = option_kind::word;
            one.is_preset = true;
            for (const auto& preset : presets) { one.words.emplace_back(preset.name); }
            one.initial = one.words.front();
            one.expected = detail::list_text(one.words);
            list.push_back(std::move(one));
        });
    }
    return list;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_OPTION_TEXT_HPP

// ---- taskvec/interop/dlpack.hpp
#if !defined(TASKVEC_SINGLE_INTEROP_DLPACK_HPP)
#define TASKVEC_SINGLE_INTEROP_DLPACK_HPP
// DLPack tensors: borrowed as tensor references, taken over with their deleter, and made from tensor references.
// SPDX-License-Identifier: Apache-2.0
//
// Written against the field names and numbers that DLPack's ABI fixes, and includes no dlpack.h: any version's
// structures will do (DLTensor and DLManagedTensor; DLManagedTensorVersioned where the header, from DLPack 1.0 on, has
// it), wherever the framework at hand keeps its copy of that header.


#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// DLPack's DLTensor, of any version.
template <class T>
concept dlpack_tensor = requires(T& tensor) {
    requires std::same_as<std::remove_const_t<decltype(tensor.data)>, void*>;
    tensor.device.device_type;
    tensor.device.device_id;
    requires std::integral<std::remove_cvref_t<decltype(tensor.ndim)>>;
    tensor.dtype.code;
    tensor.dtype.bits;
    tensor.dtype.lanes;
    requires std::same_as<std::remove_const_t<decltype(tensor.shape)>, std::int64_t*>;
    requires std::same_as<std::remove_const_t<decltype(tensor.strides)>, std::int64_t*>;
    tensor.byte_offset;
};

/// DLPack's DLManagedTensor or DLManagedTensorVersioned.
template <class M>
concept dlpack_managed = dlpack_tensor<decltype(std::declval<M&>().dl_tensor)> && requires(M& managed) {
    managed.manager_ctx;
    managed.deleter = static_cast<void (*)(M*)>(nullptr);
};

/// DLPack's DLManagedTensorVersioned: says its version and whether it may be written.
template <class M>
concept dlpack_versioned = dlpack_managed<M> && requires(M& managed) {
    managed.version;
    managed.flags;
};

namespace detail {
// Numbers of DLPack's ABI.
inline constexpr int dlpack_cpu = 1, dlpack_cuda = 2, dlpack_cuda_host = 3, dlpack_cuda_managed = 13;
inline constexpr unsigned dlpack_int = 0, dlpack_uint = 1, dlpack_float = 2, dlpack_bfloat = 4, dlpack_complex = 5,
                          dlpack_bool = 6, dlpack_e4m3fn = 10, dlpack_e5m2 = 12, dlpack_e8m0fnu = 14;
inline constexpr std::uint64_t dlpack_read_only = 1;
inline constexpr std::uint32_t dlpack_major = 1;

struct dlpack_dtype_row {
    dtype type;
    unsigned code;
    unsigned bits;
};
inline constexpr dlpack_dtype_row dlpack_dtypes[] = {
    {dtype::f64, dlpack_float, 64},
    {dtype::f32, dlpack_float, 32},
    {dtype::f16, dlpack_float, 16},
    {dtype::bf16, dlpack_bfloat, 16},
    {dtype::i64, dlpack_int, 64},
    {dtype::i32, dlpack_int, 32},
    {dtype::i16, dlpack_int, 16},
    {dtype::i8, dlpack_int, 8},
    {dtype::u64, dlpack_uint, 64},
    {dtype::u32, dlpack_uint, 32},
    {dtype::u16, dlpack_uint, 16},
    {dtype::u8, dlpack_uint, 8},
    {dtype::boolean, dlpack_bool, 8},
    {dtype::c64, dlpack_complex, 64},
    {dtype::f8_e4m3, dlpack_e4m3fn, 8},
    {dtype::f8_e5m2, dlpack_e5m2, 8},
    {dtype::f8_e8m0, dlpack_e8m0fnu, 8},
};
} // namespace detail

/// A DLPack tensor as a tensor reference; borrows its memory, which must outlive the result.
///
/// `what` names the tensor in errors. Strides may be null (row-major) or any; algorithms refuse what is not row-major
/// and contiguous. byte_offset is applied. CPU and pinned memory are host memory; CUDA and managed memory are device
/// memory. Errors: dtype_mismatch for element types that safetensors has no name for, and for vector lanes;
/// invalid_argument for other devices, a missing shape, null or misaligned data; shape_mismatch for negative or
/// overflowing extents. Cost: the dimensions.
///
///     const taskvec::tensor_ref weight = taskvec::from_dlpack(managed->dl_tensor, "fc.weight");
template <dlpack_tensor T>
[[nodiscard]] tensor_ref from_dlpack(const T& tensor, std::string_view what = "DLPack tensor")
{
    tensor_ref result;
    const unsigned code = tensor.dtype.code, width = tensor.dtype.bits;
    const detail::dlpack_dtype_row* found = nullptr;
    for (const auto& row : detail::dlpack_dtypes) {
        if (row.code == code && row.bits == width) { found = &row; }
    }
    if (found == nullptr || tensor.dtype.lanes != 1) {
        raise<dtype_mismatch>(error_code::dtype_unsupported,
            message("tensor '", what, "' has DLPack type code ", code, " with ", width, " bits and ",
                static_cast<unsigned>(tensor.dtype.lanes),
                " lanes; expected one lane of a type that safetensors has a name for: convert it first"));
    }
    result.dtype = found->type;

    switch (static_cast<int>(tensor.device.device_type)) {
    case detail::dlpack_cpu:
    case detail::dlpack_cuda_host: result.space = memory_space::host; break;
    case detail::dlpack_cuda:
    case detail::dlpack_cuda_managed: result.space = memory_space::device; break;
    default:
        raise<invalid_argument>(error_code::tensor_memory,
            message("tensor '", what, "' lives on a device of DLPack type ",
                static_cast<int>(tensor.device.device_type),
                "; expected the CPU (1), CUDA (2), pinned (3) or managed CUDA memory (13): copy it to one of these "
                "first"));
    }
    result.device = result.space == memory_space::host ? 0 : static_cast<int>(tensor.device.device_id);

    if (tensor.ndim < 0 || (tensor.ndim > 0 && tensor.shape == nullptr)) {
        raise<invalid_argument>(error_code::dlpack_tensor,
            message("tensor '", what, "' has ", static_cast<int>(tensor.ndim), " dimensions and ",
                tensor.shape ? "a" : "no", " shape"));
    }
    if (tensor.ndim > 0) {
        result.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
        if (tensor.strides != nullptr) { result.strides.assign(tensor.strides, tensor.strides + tensor.ndim); }
    }
    const std::size_t count = result.size(what);
    if (count != 0) {
        if (tensor.data == nullptr) {
            raise<invalid_argument>(error_code::tensor_without_data,
                message("tensor '", what, "' of shape ", to_string(result.shape), " has no data"));
        }
        result.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
        const std::size_t alignment = result.dtype == dtype::c64 ? 4 : bits_per_element(result.dtype) / 8;
        if (reinterpret_cast<std::uintptr_t>(result.data) % alignment != 0) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", what, "' is not aligned to its ", alignment, "-byte elements: copy it first"));
        }
    }
    return result;
}

/// Owns a DLPack tensor that a framework handed over: calls its deleter exactly once, when it is destroyed or reset.
///
/// Takes the pointer over even when it refuses the tensor (the deleter is then called before the error leaves). A
/// DLManagedTensorVersioned of another major version than 1 is given back unread, with an invalid_argument.
///
///     taskvec::dlpack_handle weight(managed, "fc.weight");
///     model.insert("fc.weight", weight.tensor());
template <dlpack_managed M>
class dlpack_handle {
public:
    dlpack_handle() = default;
    /// Takes `managed` over, whatever happens; `what` names the tensor in errors. Errors: as from_dlpack();
    /// invalid_argument for null, and for another major version than 1.
    explicit dlpack_handle(M* managed, std::string_view what = "DLPack tensor")
        : managed_(managed)
        , what_(what)
    {
        if (managed == nullptr) {
            raise<invalid_argument>(
                error_code::dlpack_tensor, message("tensor '", what_, "': the DLPack pointer is null"));
        }
        if constexpr (dlpack_versioned<M>) {
            const auto [first, second] =
                managed->version; // by position: <sys/sysmacros.h> has macros of the members' names
            if (first != detail::dlpack_major) {
                raise<invalid_argument>(error_code::dlpack_tensor,
                    message("tensor '", what_, "' comes as DLPack ", first, ".", second, "; expected major version ",
                        detail::dlpack_major, ": ask its framework for that version"));
            }
        }
        tensor_ = from_dlpack(managed->dl_tensor, what_);
    }
    dlpack_handle(dlpack_handle&& other) noexcept
        : managed_(std::move(other.managed_))
        , what_(std::move(other.what_))
        , tensor_(std::exchange(other.tensor_, {}))
    { }
    dlpack_handle& operator=(dlpack_handle&& other) noexcept
    {
        managed_ = std::move(other.managed_);
        what_ = std::move(other.what_);
        tensor_ = std::exchange(other.tensor_, {});
        return *this;
    }

    /// True when the producer forbids writing. (An unversioned DLManagedTensor cannot say so.)
    [[nodiscard]] bool read_only() const noexcept
    {
        if constexpr (dlpack_versioned<M>) { return managed_ && (managed_->flags & detail::dlpack_read_only) != 0; }
        else {
            return false;
        }
    }
    /// The tensor, to be read.
    [[nodiscard]] const_tensor_ref tensor() const& { return tensor_; }
    void tensor() const&& = delete; // name the owner first: its views would dangle
    /// The tensor, to be written; invalid_argument if its producer made it read-only.
    [[nodiscard]] tensor_ref writable_tensor() &
    {
        if (read_only()) {
            raise<invalid_argument>(
                error_code::dlpack_tensor, message("tensor '", what_, "' is read-only: copy it before writing"));
        }
        return tensor_;
    }
    /// The flat elements, const T to read, T to write; refuses what flat_view refuses.
    template <class T, memory_space S = memory_space::host>
        requires storage_element<std::remove_const_t<T>>
    [[nodiscard]] taskvec::view<T, S> flat() &
    {
        const auto elements = flat_view<std::remove_const_t<T>, S>(tensor_, what_);
        if constexpr (std::is_const_v<T>) { return elements; }
        else {
            return {static_cast<T*>(writable_tensor().data), elements.size()};
        }
    }

    /// Gives the tensor back to its framework now.
    void reset() noexcept
    {
        managed_.reset();
        tensor_ = {};
    }
    /// Hands the pointer on without calling the deleter.
    [[nodiscard]] M* release() noexcept
    {
        tensor_ = {};
        return managed_.release();
    }
    explicit operator bool() const noexcept { return managed_ != nullptr; }

private:
    struct deleter {
        void operator()(M* managed) const noexcept
        {
            if (managed->deleter != nullptr) { managed->deleter(managed); }
        }
    };
    std::unique_ptr<M, deleter> managed_;
    std::string what_;
    tensor_ref tensor_;
};

namespace detail {
/// What the deleter of an exported tensor frees: the structure, its shape and strides, and a share in the memory's
/// owner.
template <class M>
struct dlpack_export {
    M managed{};
    std::vector<std::int64_t> shape, strides;
    std::shared_ptr<const void> owner;
};
} // namespace detail

/// A tensor reference as a managed DLPack tensor, for a framework to take over. `owner` keeps the memory alive until
/// the framework calls the deleter; leave it empty where the caller does. Strides are always given. A const tensor can
/// only be given as a DLManagedTensorVersioned, marked read-only.
///
///     auto buffer = std::make_shared<std::vector<float>>(12);
///     auto tensor = taskvec::as_tensor(taskvec::as_view(*buffer), {4, 3});
///     DLManagedTensorVersioned* given = taskvec::to_dlpack<DLManagedTensorVersioned>(tensor, buffer);
template <dlpack_managed M, class Byte>
    requires(dlpack_versioned<M> || !std::is_const_v<Byte>)
[[nodiscard]] M* to_dlpack(const basic_tensor_ref<Byte>& tensor, std::shared_ptr<const void> owner = {})
{
    const detail::dlpack_dtype_row* found = nullptr;
    for (const auto& row : detail::dlpack_dtypes) {
        if (row.type == tensor.dtype) { found = &row; }
    }
    if (found == nullptr) {
        raise<dtype_mismatch>(error_code::dtype_unsupported,
            message("DLPack has no fixed type for ", to_string(tensor.dtype), ": convert the tensor first"));
    }
    if (!tensor.strides.empty() && tensor.strides.size() != tensor.shape.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a tensor of shape ", to_string(tensor.shape), " has strides ", to_string(tensor.strides)));
    }
    const std::size_t count = tensor.size();

    auto made = std::make_unique<detail::dlpack_export<M>>();
    made->owner = std::move(owner);
    made->shape = tensor.shape;
    made->strides = tensor.strides;
    if (made->strides.empty()) {
        made->strides.resize(made->shape.size());
        std::int64_t step = 1;
        for (std::size_t i = made->shape.size(); i-- > 0;) {
            made->strides[i] = step;
            step *= made->shape[i] == 0 ? 1 : made->shape[i];
        }
    }
    M& managed = made->managed;
    auto& out = managed.dl_tensor;
    out.data = count == 0 ? nullptr : const_cast<void*>(static_cast<const void*>(tensor.data));
    out.byte_offset = 0;
    const int kind = tensor.space == memory_space::host ? detail::dlpack_cpu : detail::dlpack_cuda;
    out.device.device_type = static_cast<decltype(out.device.device_type)>(kind);
    out.device.device_id = tensor.space == memory_space::host ? 0 : tensor.device;
    out.ndim = static_cast<decltype(out.ndim)>(made->shape.size());
    out.dtype.code = static_cast<decltype(out.dtype.code)>(found->code);
    out.dtype.bits = static_cast<decltype(out.dtype.bits)>(found->bits);
    out.dtype.lanes = 1;
    out.shape = made->shape.data();
    out.strides = made->strides.data();
    if constexpr (dlpack_versioned<M>) {
        managed.version = {detail::dlpack_major, 0};
        managed.flags = std::is_const_v<Byte> ? detail::dlpack_read_only : 0;
    }
    managed.manager_ctx = made.get();
    managed.deleter = [](M* self) { delete static_cast<detail::dlpack_export<M>*>(self->manager_ctx); };
    return &made.release()->managed;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_INTEROP_DLPACK_HPP

// ---- taskvec/interop/mdspan.hpp
#if !defined(TASKVEC_SINGLE_INTEROP_MDSPAN_HPP)
#define TASKVEC_SINGLE_INTEROP_MDSPAN_HPP
// Multidimensional spans (std::mdspan, Kokkos' std::experimental::mdspan, cuda::std::mdspan) as inputs and outputs,
// without a copy.
// SPDX-License-Identifier: Apache-2.0
//
// Written against the interface that all of them share, and includes none of them but the standard one where there is
// one.


#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <version>

#if defined(__cpp_lib_mdspan)
#include <mdspan>
#endif

namespace taskvec::inline TASKVEC_ABI {

namespace detail {
/// A multidimensional span over plain memory: its accessor's handle is a pointer to its elements.
template <class X>
concept mdspan_memory = requires(const X& x) {
    typename X::layout_type;
    typename X::accessor_type;
    x.mapping().required_span_size();
    x.is_exhaustive();
    X::rank();
    requires std::same_as<typename X::data_handle_type, typename X::element_type*>;
    requires std::same_as<typename X::reference, typename X::element_type&>;
    requires storage_element<std::remove_const_t<typename X::element_type>>;
};

template <class X>
[[nodiscard]] extents mdspan_extents(const X& x)
{
    extents result;
    for (std::size_t i = 0; i < static_cast<std::size_t>(X::rank()); ++i) {
        result.push_back(static_cast<std::int64_t>(x.extent(i)));
    }
    return result;
}
} // namespace detail

/// A multidimensional span as a flat view, elements in row-major order (layout_right's); the result borrows its memory.
///
/// Accepted: double, float, f16 or bf16 elements with a pointer accessor, where the elements follow
/// one another without holes in row-major order. std::layout_left with two dimensions or more is refused while
/// compiling, other layouts that are not row-major with invalid_argument. The memory is taken to be the host's: over
/// device memory make a device_view instead. Cost: the number of dimensions.
///
///     std::mdspan weight(data, 4, 3);
///     taskvec::host_view<float> flat = taskvec::as_view(weight);
template <class X>
    requires detail::mdspan_memory<std::remove_const_t<X>>
struct view_traits<X> {
    using element = typename X::element_type;
    static host_view<element> get(X& x)
    {
#if defined(__cpp_lib_mdspan)
        static_assert(!std::same_as<typename X::layout_type, std::layout_left> || X::rank() < 2,
            "taskvec: a span with layout_left holds the transposed tensor: use layout_right, or copy it into such a "
            "span first");
#endif
        const_tensor_ref shaped{.shape = detail::mdspan_extents(x)};
        const std::size_t count = shaped.size("mdspan");
        bool row_major = true;
        if constexpr (X::rank() > 0) {
            if (count != 0) {
                row_major = x.is_exhaustive() && x.is_strided();
                for (std::size_t i = 0; row_major && i < static_cast<std::size_t>(X::rank()); ++i) {
                    shaped.strides.push_back(static_cast<std::int64_t>(x.stride(i)));
                }
                row_major = row_major && shaped.contiguous();
            }
        }
        if (!row_major) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("a multidimensional span of shape ", to_string(shaped.shape),
                    " does not hold its elements one after another in row-major order: copy it into one with "
                    "layout_right "
                    "first"));
        }
        return {x.data_handle(), count};
    }
};

/// A multidimensional span as a tensor of its shape. Refuses what as_view refuses.
template <class X>
    requires detail::mdspan_memory<std::remove_cvref_t<X>>
[[nodiscard]] auto as_tensor(X&& x)
{
    return as_tensor(as_view(x), detail::mdspan_extents(x));
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_INTEROP_MDSPAN_HPP

// ---- taskvec/interop/xtensor.hpp
#if !defined(TASKVEC_SINGLE_INTEROP_XTENSOR_HPP)
#define TASKVEC_SINGLE_INTEROP_XTENSOR_HPP
// xtensor containers, adaptors and strided views as inputs and outputs, and results as xtensor adaptors, without a
// copy.
// SPDX-License-Identifier: Apache-2.0
//
// Written against the interface that xtensor's strided expressions share (data, data_offset, shape, strides,
// static_layout), and includes none of its headers: they moved between 0.24 (xtensor/xarray.hpp) and 0.26
// (xtensor/containers/xarray.hpp). What calls as_xtensor() includes xtensor's xadapt.hpp.


#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace xt {
enum class layout_type; // xtensor's own: by it xt::adapt() is found
}

namespace taskvec::inline TASKVEC_ABI {

namespace detail {
/// An xtensor expression that lies in memory (xarray, xtensor, xtensor_fixed, adaptors, views by ranges; not a + b).
template <class X>
concept xtensor_memory = requires(X& x) {
    x.data();
    x.data_offset();
    x.shape().size();
    x.strides().size();
    std::remove_cv_t<X>::static_layout;
    requires std::is_pointer_v<decltype(x.data())>;
    requires storable<std::remove_cv_t<std::remove_pointer_t<decltype(x.data())>>>;
};

/// An xtensor expression that is computed where it is read: a + b, xt::sin(a), a view of either.
template <class X>
concept xtensor_lazy = requires(const X& x) {
    x.derived_cast();
    x.shape().size();
    std::remove_cv_t<X>::static_layout;
    typename std::remove_cv_t<X>::value_type;
} && !requires(const X& x) { x.data(); };

/// Extents or strides.
template <class Sizes>
[[nodiscard]] extents xtensor_extents(const Sizes& values)
{
    extents result;
    result.reserve(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) { result.push_back(static_cast<std::int64_t>(values[i])); }
    return result;
}
} // namespace detail

/// An xtensor container, adaptor or strided view as a flat view, elements in row-major order; the result borrows its
/// memory.
///
/// Accepted: elements of double, float, f16 or bf16 (or of a type with their bits) that follow one another without
/// holes in row-major order. Refused while compiling: static column-major layouts, and expressions that are still to
/// be computed. Refused with invalid_argument: other strides, as of a view that leaves out columns. Cost: the number
/// of dimensions.
///
///     xt::xarray<float> weight = xt::zeros<float>({4, 3});
///     taskvec::host_view<float> flat = taskvec::as_view(weight);
template <class X>
    requires detail::xtensor_memory<X>
struct view_traits<X> {
    using element = detail::stored_as<std::remove_pointer_t<decltype(std::declval<X&>().data())>>;
    static host_view<element> get(X& x)
    {
        using layout = std::remove_cv_t<decltype(std::remove_cv_t<X>::static_layout)>;
        static_assert(std::remove_cv_t<X>::static_layout != layout::column_major,
            "taskvec: a column-major xtensor container holds the transposed tensor: use the row-major layout, or copy "
            "it into such a container first");
        const const_tensor_ref shaped{
            .shape = detail::xtensor_extents(x.shape()), .strides = detail::xtensor_extents(x.strides())};
        if (!shaped.contiguous()) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("an xtensor expression of shape ", to_string(shaped.shape), " has strides ",
                    to_string(shaped.strides),
                    ", so its elements do not follow one another in row-major order: copy it into a row-major "
                    "container of "
                    "its own first"));
        }
        return {detail::as_stored(x.data() + x.data_offset()), shaped.size("xtensor expression")};
    }
};

/// What is still to be computed has no elements in memory: refused with a sentence.
template <class X>
    requires detail::xtensor_lazy<std::remove_reference_t<X>>
void as_view(X&&)
{
    static_assert(!detail::xtensor_lazy<std::remove_reference_t<X>>,
        "taskvec: an xtensor expression has no elements in memory: evaluate it first, as in xt::xarray<float> y = a + "
        "b");
}

/// An xtensor container as a tensor of its shape, of any number of dimensions. Refuses what as_view refuses.
///
///     taskvec::model_ref model{{"fc.weight", taskvec::as_tensor(weight)}};
template <class X>
    requires detail::xtensor_memory<std::remove_reference_t<X>> || detail::xtensor_lazy<std::remove_reference_t<X>>
[[nodiscard]] auto as_tensor(X&& x)
{
    if constexpr (detail::xtensor_lazy<std::remove_reference_t<X>>) { as_view(x); }
    else {
        return as_tensor(as_view(x), detail::xtensor_extents(x.shape()));
    }
}

/// The view of an xtensor container, adaptor or strided view of two dimensions, in either layout, whose rows or columns
/// are contiguous, without a copy; one dimension is a matrix of one column. The result borrows x's memory.
///
/// Throws shape_mismatch for other numbers of dimensions; invalid_argument where neither the rows nor the columns are
/// contiguous, as of a view that takes every other row and every other column. Cost: constant.
///
///     auto s = taskvec::truncated_svd(taskvec::cpu{}, taskvec::as_matrix(weight), {.rank = 8});
template <class X>
    requires detail::xtensor_memory<const X> || detail::xtensor_lazy<X>
[[nodiscard]] auto as_matrix(const X& x)
{
    if constexpr (detail::xtensor_lazy<X>) { as_view(x); }
    else {
        const extents shape = detail::xtensor_extents(x.shape()), strides = detail::xtensor_extents(x.strides());
        if (shape.empty() || shape.size() > 2) {
            raise<shape_mismatch>(error_code::shape_invalid,
                message("an xtensor expression of shape ", to_string(shape),
                    " is no matrix; expected 2 dimensions: reshape it, or take a view of two of them"));
        }
        const std::int64_t rows = shape[0], cols = shape.size() == 2 ? shape[1] : 1;
        const std::int64_t down = strides[0], right = shape.size() == 2 ? strides[1] : 1;
        const bool empty = rows == 0 || cols == 0;
        const bool by_rows = empty || ((cols == 1 || right == 1) && (rows == 1 || down >= cols));
        const bool by_cols = (rows == 1 || down == 1) && (cols == 1 || right >= rows);
        if (!by_rows && !by_cols) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("an xtensor expression of shape ", to_string(shape), " has strides ", to_string(strides),
                    ", so neither its rows nor its columns are contiguous: evaluate it into a container of its own "
                    "first"));
        }
        // A vector of its own is one run; one with gaps is a row or column of something wider.
        const bool as_column = by_cols && (!by_rows || cols == 1);
        std::int64_t stride = as_column ? (cols == 1 ? rows : right) : (rows == 1 || empty ? cols : down);
        auto* const data = detail::as_stored(x.data() + x.data_offset());
        return matrix_view<std::remove_pointer_t<std::remove_const_t<decltype(data)>>>(data,
            static_cast<std::size_t>(rows), static_cast<std::size_t>(cols),
            as_column ? matrix_order::column_major : matrix_order::row_major, static_cast<std::size_t>(stride));
    }
}
template <class X>
    requires detail::xtensor_memory<const X> && detail::owns_elements<X>
void as_matrix(const X&& x) = delete; // name the container first: the view would dangle

namespace detail {
inline constexpr auto xtensor_dynamic = static_cast<xt::layout_type>(0);
inline constexpr auto xtensor_row_major = static_cast<xt::layout_type>(1);
inline constexpr auto xtensor_column_major = static_cast<xt::layout_type>(2);

template <class T, class Shape>
concept xtensor_adapts = requires(T* data, const Shape& shape, xt::layout_type layout) {
    adapt<xtensor_row_major>(static_cast<T*>(data), shape, layout);
};

/// An adaptor over somebody else's memory: of an std::array of extents with as many dimensions, of a vector with as
/// many as it has elements.
template <xt::layout_type Layout, class T, class Shape>
[[nodiscard]] auto adapt_memory(T* data, const Shape& shape, xt::layout_type layout)
{
    static_assert(xtensor_adapts<T, Shape>,
        "taskvec: as_xtensor() needs xtensor's adaptors: include <xtensor/xadapt.hpp> (from xtensor 0.26 on "
        "<xtensor/containers/xadapt.hpp>)");
    // The pointer by value: of a name, xtensor would keep a reference to it.
    if constexpr (xtensor_adapts<T, Shape>) { return adapt<Layout>(static_cast<T*>(data), shape, layout); }
}
} // namespace detail

/// A host view as an xtensor adaptor of one dimension, as a row-major one of rows x cols, or as one of any shape
/// (shape_mismatch where the sizes differ). Needs xtensor's xadapt.hpp. The result borrows the view's memory, may be
/// assigned to where the view may be, and is never resized.
///
///     taskvec::as_xtensor(flat) *= 0.5f;
///     auto kernels = taskvec::as_xtensor(flat, {64, 3, 7, 7});
template <class T>
[[nodiscard]] auto as_xtensor(host_view<T> flat)
{
    return detail::adapt_memory<detail::xtensor_row_major>(
        flat.data(), std::array<std::size_t, 1>{flat.size()}, detail::xtensor_row_major);
}
template <class T>
[[nodiscard]] auto as_xtensor(host_view<T> flat, std::int64_t rows, std::int64_t cols)
{
    if (element_count({rows, cols}, "as_xtensor") != flat.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a view of ", flat.size(), " elements cannot be a matrix of ", rows, " x ", cols));
    }
    return detail::adapt_memory<detail::xtensor_row_major>(flat.data(),
        std::array<std::size_t, 2>{static_cast<std::size_t>(rows), static_cast<std::size_t>(cols)},
        detail::xtensor_row_major);
}
template <class T>
[[nodiscard]] auto as_xtensor(host_view<T> flat, const extents& shape)
{
    if (element_count(shape, "as_xtensor") != flat.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a view of ", flat.size(), " elements cannot have shape ", to_string(shape)));
    }
    return detail::adapt_memory<detail::xtensor_row_major>(
        flat.data(), std::vector<std::size_t>(shape.begin(), shape.end()), detail::xtensor_row_major);
}

/// An owning matrix, of either order, as an xtensor adaptor of two dimensions, for users who go on with xtensor. The
/// layout is known at run time alone: xt::layout_type::dynamic.
///
///     const auto s = taskvec::truncated_svd(taskvec::cpu{}, taskvec::as_matrix(weight), {.rank = 8});
///     const auto u = taskvec::as_xtensor(s.u);
template <storage_element T>
[[nodiscard]] auto as_xtensor(matrix<T>& x)
{
    return detail::adapt_memory<detail::xtensor_dynamic>(x.data(), std::array<std::size_t, 2>{x.rows(), x.cols()},
        x.order() == matrix_order::row_major ? detail::xtensor_row_major : detail::xtensor_column_major);
}
template <storage_element T>
[[nodiscard]] auto as_xtensor(const matrix<T>& x)
{
    return detail::adapt_memory<detail::xtensor_dynamic>(x.data(), std::array<std::size_t, 2>{x.rows(), x.cols()},
        x.order() == matrix_order::row_major ? detail::xtensor_row_major : detail::xtensor_column_major);
}
template <storage_element T>
void as_xtensor(const matrix<T>&& x) = delete; // name the owner first: the adaptor would dangle

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_INTEROP_XTENSOR_HPP

// ---- taskvec/methods/arcee_fusion.hpp
#if !defined(TASKVEC_SINGLE_METHODS_ARCEE_FUSION_HPP)
#define TASKVEC_SINGLE_METHODS_ARCEE_FUSION_HPP
// Arcee Fusion: the entries of one task that matter most in their tensor, by a threshold from its quartiles. mergekit.
// SPDX-License-Identifier: Apache-2.0


#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + τ where an entry's importance reaches the threshold of its tensor, θ0 elsewhere. The importance is
/// |τ|·KL(softmax(θ1) ‖ softmax(θ0)) of its row, with 1e-8 added to both distributions; rows lie along the last axis.
/// The threshold is the median plus `spread` interquartile ranges, over the tensor; the quantile q of n numbers is the
/// one at place floor(q·(n − 1)) in ascending order. One task. Bit-exact for any threads, blocks, processors and C
/// libraries: quartiles are exact, divergences are sums in f64 of a fixed shape, of exponentials and logarithms of the
/// library's own (core/exponential.hpp), rounded to the arithmetic type. Cost: five
/// reads of the models in f32 (one for divergences, three for quartiles, one to merge; eight in f64), two exponentials
/// and a logarithm an entry, and a number for each row. On the CPU.
///
///     merge(cpu{}, arcee_fusion_options{}, base, {as_view(task)}, out);
struct arcee_fusion_options {
    double spread = 1.5;
};

template <>
struct options_of<arcee_fusion_options> {
    static constexpr option_table table{option_row("spread", &arcee_fusion_options::spread,
        "interquartile ranges from the median importance to the threshold", {.unit = "X", .at_least = 0})};
};

/// θ0 + τ·(1 where the entry was chosen, or 0): the row beside the models says so.
template <arithmetic_element A>
struct chosen_body {
    static constexpr bool watches = false;
    static constexpr bool reads_beside = true;

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const auto taken = where(in.beside(0) != 0, in.delta(0));
        if (in.counts_tasks()) { in.count_of(0, 0, taken != 0); }
        return in.base() + taken;
    }
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// The largest of some numbers, of which there is one.
template <arithmetic_element A>
struct largest_kernel {
    const A* x;
    std::size_t size;
    A& largest;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        constexpr std::size_t width = pack_lanes<A, bytes>;
        A most = x[0];
        std::size_t i = 0;
        if (size >= width) {
            auto most_of_lanes = load_row<A, bytes, A>(x);
            for (; i + width <= size; i += width) {
                const auto next = load_row<A, bytes, A>(x + i);
                most_of_lanes = select(next > most_of_lanes, next, most_of_lanes);
            }
            A lanes[width];
            std::memcpy(lanes, &most_of_lanes, sizeof lanes);
            for (const A lane : lanes) { most = lane > most ? lane : most; }
        }
        for (; i < size; ++i) { most = x[i] > most ? x[i] : most; }
        largest = most;
    }
};
/// e^(x − most), which go to `out` too.
template <arithmetic_element A>
struct shifted_exponentials {
    const A* x;
    double most;
    double* out;

    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack<double, bytes> at(std::size_t i) const noexcept
    {
        const auto made = exponential(load_wide<bytes>(x + i) - most);
        store_row<double>(made, out + i);
        return made;
    }
};
/// p·ln(p/q) of the shares that numbers have of their sums, 1e-8 added to both.
struct divergence_terms {
    const double *x, *y;
    double of_x, of_y; ///< the sums

    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack<double, bytes> at(std::size_t i) const noexcept
    {
        const auto p = load_wide<bytes>(x + i) / of_x + 1e-8, q = load_wide<bytes>(y + i) / of_y + 1e-8;
        return p * logarithm(p / q);
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// KL(softmax(x) ‖ softmax(y)) of a row, 1e-8 added to both, in f64; not below 0. `p`, `q`: room for n numbers each.
template <arithmetic_element A>
[[nodiscard]] double softmax_divergence(const A* x, const A* y, std::size_t n, double* p, double* q)
{
    const auto exponentials = [n](const A* from, double* to) {
        A most{};
        kernels::run_widest(kernels::largest_kernel<A>{from, n, most});
        return kernels::sum(kernels::shifted_exponentials<A>{from, static_cast<double>(most), to}, n);
    };
    const double of_x = exponentials(x, p), of_y = exponentials(y, q);
    const double sum = kernels::sum(kernels::divergence_terms{p, q, of_x, of_y}, n);
    return sum > 0 ? sum : 0.0;
}

/// Numbers of a list that is gone over once for each digit of their bits: those at three places in ascending order.
template <arithmetic_element A>
class quartile_search {
public:
    static constexpr unsigned digit_bits = 11;
    static constexpr unsigned digits = (sizeof(A) * 8 + digit_bits - 1) / digit_bits;
    using histograms = std::array<std::array<std::uint64_t, std::size_t{1} << digit_bits>, 3>;

    explicit quartile_search(std::uint64_t n)
    {
        for (std::size_t k = 0; k < 3; ++k) {
            left_[k] = static_cast<std::uint64_t>(0.25 * static_cast<double>(k + 1) * static_cast<double>(n - 1));
        }
    }
    /// Counts a number of at least 0.
    void count(A value, histograms& to) const noexcept
    {
        const auto bits = std::bit_cast<bits_type<A>>(value);
        const auto digit = static_cast<std::size_t>(bits >> shift()) & (to[0].size() - 1);
        for (std::size_t k = 0; k < 3; ++k) { to[k][digit] += (bits & known_) == found_[k] ? 1u : 0u; }
    }
    /// Goes on to the next digit, once all numbers were counted.
    void next(const histograms& counted)
    {
        for (std::size_t k = 0; k < 3; ++k) {
            std::size_t digit = 0;
            for (; left_[k] >= counted[k][digit]; ++digit) { left_[k] -= counted[k][digit]; }
            found_[k] |= static_cast<bits_type<A>>(digit) << shift();
        }
        known_ |= static_cast<bits_type<A>>((bits_type<A>{1} << digit_bits) - 1) << shift();
        ++done_;
    }
    [[nodiscard]] A quartile(std::size_t k) const noexcept { return std::bit_cast<A>(found_[k]); }

private:
    [[nodiscard]] unsigned shift() const noexcept { return (digits - 1 - done_) * digit_bits; }

    std::array<std::uint64_t, 3> left_{}; // how many of the numbers with the digits found come before
    std::array<bits_type<A>, 3> found_{};
    bits_type<A> known_ = 0;
    unsigned done_ = 0;
};

} // namespace detail

template <>
class method<arcee_fusion_options> : public elementwise_method {
public:
    static constexpr bool on_device = false; // rows and quartiles are looked at on the CPU
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const arcee_fusion_options& options)
        : models_(&passes.models())
        , pieces_(passes.models(), &row_length)
    {
        if (passes.tasks() != 1) {
            raise<invalid_argument>(error_code::task_count,
                message("Arcee Fusion takes a base and one task, and there are ", passes.tasks(), " tasks: give one"));
        }
        detail::piece_walk<storage_of<Passes>> walk(passes.policy(), *models_, pieces_);
        diverge(walk);
        search(walk, options.spread);
    }
    /// Divergences and quartiles are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const arcee_fusion_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] chosen_body<A> body(std::size_t) const
    {
        return {};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; } // for divergences
    [[nodiscard]] std::uint64_t bytes_beside() const noexcept { return searched_; }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return pieces_; }
    [[nodiscard]] static std::size_t row_numbers() noexcept { return 1; }
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* numbers, detail::piece_memory& memory) const
    {
        const A threshold = static_cast<A>(thresholds_[piece.tensor]);
        each_importance(rows, piece, memory,
            [&](std::size_t i, A importance) { numbers[i] = importance >= threshold ? A{1} : A{0}; });
    }

private:
    /// A divergence for each row of each tensor.
    template <class Types>
    void diverge(detail::piece_walk<Types>& walk)
    {
        first_row_.push_back(0);
        for (const auto& tensor : models_->tensors()) {
            first_row_.push_back(first_row_.back() + tensor.size / row_length(tensor));
        }
        divergences_.resize(first_row_.back());
        detail::progress_meter meter(walk.policy(), "divergences", models_->bytes());
        walk.each({0, pieces_.size()}, meter,
            [&]<class A>(
                std::size_t, std::size_t, row_block<A>& rows, const tensor_chunk& piece, detail::piece_memory& memory) {
                A* const base = memory.rows<A>(2, piece.size);
                A* const task = base + piece.size;
                for_each_block_of(rows, piece, [&](row_block<A>& opened) {
                    const std::size_t at = static_cast<std::size_t>(opened.offset() - piece.offset);
                    std::memcpy(base + at, opened.base(), opened.size() * sizeof(A));
                    std::memcpy(task + at, opened.task(0), opened.size() * sizeof(A));
                });
                const std::size_t length = row_length(models_->tensors()[piece.tensor]);
                std::pmr::vector<double> shares(2 * length, memory_of(walk.policy()));
                double* out = divergences_.data() + first_row_[piece.tensor] + piece.offset / length;
                for (std::size_t at = 0; at < piece.size; at += length) {
                    *out++ =
                        detail::softmax_divergence(task + at, base + at, length, shares.data(), shares.data() + length);
                }
            });
    }

    /// The quartiles of each tensor's importances, and the threshold that they make.
    template <class Types>
    void search(detail::piece_walk<Types>& walk, double spread)
    {
        thresholds_.assign(models_->tensors().size(), 0);
        for (const auto& tensor : models_->tensors()) {
            const unsigned reads =
                tensor.wide ? detail::quartile_search<double>::digits : detail::quartile_search<float>::digits;
            searched_ += reads * tensor.bytes(tensor.size);
        }
        detail::progress_meter meter(walk.policy(), "quartiles", searched_);
        for (std::size_t i = 0; i < models_->tensors().size(); ++i) {
            const aligned_tensor& tensor = models_->tensors()[i];
            if (tensor.size == 0) { continue; }
            if (tensor.wide) { thresholds_[i] = threshold<double>(walk, meter, i, spread); }
            else {
                thresholds_[i] = static_cast<double>(threshold<float>(walk, meter, i, static_cast<float>(spread)));
            }
        }
    }
    template <arithmetic_element A, class Types>
    [[nodiscard]] A threshold(
        detail::piece_walk<Types>& walk, detail::progress_meter& meter, std::size_t tensor, A spread)
    {
        using search = detail::quartile_search<A>;
        search quartiles(models_->tensors()[tensor].size);
        std::pmr::vector<typename search::histograms> counted(walk.workers(), memory_of(walk.policy()));
        for (unsigned digit = 0; digit < search::digits; ++digit) {
            for (auto& one : counted) { one = {}; }
            walk.each(pieces_.of_tensor(tensor), meter,
                [&]<class B>(std::size_t, std::size_t worker, row_block<B>& rows, const tensor_chunk& piece,
                    detail::piece_memory& memory) {
                    if constexpr (std::same_as<A, B>) {
                        each_importance(rows, piece, memory,
                            [&](std::size_t, A importance) { quartiles.count(importance, counted[worker]); });
                    }
                });
            for (std::size_t w = 1; w < counted.size(); ++w) {
                for (std::size_t k = 0; k < 3; ++k) {
                    for (std::size_t j = 0; j < counted[0][k].size(); ++j) { counted[0][k][j] += counted[w][k][j]; }
                }
            }
            quartiles.next(counted[0]);
        }
        const A range = quartiles.quartile(2) - quartiles.quartile(0);
        volatile A distance = spread * range; // so that no compiler fuses it with the sum
        return quartiles.quartile(1) + distance;
    }

    /// use(i, importance) for each entry of a piece.
    template <arithmetic_element A, class Use>
    void each_importance(
        row_block<A>& rows, const tensor_chunk& piece, detail::piece_memory& memory, const Use& use) const
    {
        A* const deltas = memory.rows<A>(1, piece.size);
        detail::read_deltas(rows, piece, deltas);
        const std::size_t length = row_length(models_->tensors()[piece.tensor]);
        const double* divergence = divergences_.data() + first_row_[piece.tensor] + piece.offset / length;
        for (std::size_t at = 0; at < piece.size; at += length, ++divergence) {
            const A factor = static_cast<A>(*divergence);
            for (std::size_t i = at; i < at + length; ++i) { use(i, std::abs(deltas[i]) * factor); }
        }
    }

    const aligned_models* models_;
    row_pieces pieces_;
    call_vector<std::uint64_t> first_row_;
    call_vector<double> divergences_, thresholds_;
    std::uint64_t searched_ = 0; // bytes read for quartiles
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MODEL_MERGE(extern, arcee_fusion_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_ARCEE_FUSION_HPP

// ---- taskvec/methods/average.hpp
#if !defined(TASKVEC_SINGLE_METHODS_AVERAGE_HPP)
#define TASKVEC_SINGLE_METHODS_AVERAGE_HPP
// Weighted average of models: Model Soups (Wortsman et al. 2022), AdapterSoup, WiSE-FT with two models.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/linear_body.hpp
#if !defined(TASKVEC_SINGLE_METHODS_LINEAR_BODY_HPP)
#define TASKVEC_SINGLE_METHODS_LINEAR_BODY_HPP
// Weighted sums over models, without a base: the bodies of average and SLERP.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// Σ weights[t]·θt / divisor: +0 first, then in task order; every product, sum and quotient rounds.
template <arithmetic_element A>
struct mean_body {
    static constexpr bool watches = true;
    const A* weights; ///< of each task
    A divisor; ///< of the sum

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return weights[t] * in.task(t); });
        in.watch(sum);
        return sum / divisor;
    }
};

/// of_a·a + of_b·b, where a is the base or the first task and b the task after it.
template <arithmetic_element A>
struct pair_body {
    static constexpr bool watches = true;
    A of_a, of_b; ///< factors of the two
    bool from_base; ///< a is the base, and b the first task

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const auto a = from_base ? in.base() : in.task(0);
        const auto b = in.task(from_base ? 0 : 1);
        const auto sum = typename In::pack{} + of_a * a + of_b * b;
        in.watch(sum);
        return sum;
    }
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_LINEAR_BODY_HPP

#include <cstddef>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = Σ wt·θt / Σ wt, elementwise. Needs no base. Weights: one for each task, or none for all 1; any sign, but their
/// sum may not be 0. Without `normalize` nothing is divided: θ* = Σ wt·θt, for any weights. Sums run in f32 (f64 for
/// f64) in task order; bit-exact.
///
///     merge(cpu{}, average_options{.weights = {0.25, 0.75}}, tasks, out);
struct average_options {
    std::vector<double> weights{};
    bool normalize = true; ///< divide by the sum of the weights

    /// WiSE-FT (Wortsman et al. 2022) over {θ0, θ1}: (1−α)·θ0 + α·θ1.
    [[nodiscard]] static average_options wise_ft(double alpha) { return {.weights = {1 - alpha, alpha}}; }
};

template <>
struct options_of<average_options> {
    static constexpr option_table table{weights_row(&average_options::weights),
        option_row("normalized", &average_options::normalize, "divide by the sum of the weights",
            {.negated = "unnormalized"})};
};

template <>
class method<average_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    template <class Passes>
    method(Passes& passes, const average_options& options)
        : method(passes, task_weights(options.weights, passes.models()), options.normalize)
    { }
    /// Of one weight for each task. Errors: invalid_argument where they sum to 0.
    template <class Passes>
    method(Passes& passes, std::span<const double> weights, bool normalize)
        : weights_(weights.begin(), weights.end())
        , normalize_(normalize)
        , numbers_(passes, weights_)
    {
        if (total<double>() == 0 || total<float>() == 0) {
            raise<invalid_argument>(error_code::weights_sum_zero,
                message("the weights of an average sum to 0 (", detail::weights_text(weights_, passes.models()),
                    "), and nothing can be divided by that: change one of them"));
        }
    }
    template <arithmetic_element A>
    [[nodiscard]] mean_body<A> body(std::size_t) const
    {
        return {numbers_.get<A>(), total<A>()};
    }

private:
    /// Σ wt in A, in task order.
    template <arithmetic_element A>
    [[nodiscard]] A total() const noexcept
    {
        if (!normalize_) { return 1; }
        A sum = 0;
        for (const double weight : weights_) { sum += static_cast<A>(weight); }
        return sum;
    }

    call_vector<double> weights_;
    bool normalize_;
    kept_numbers numbers_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, average_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_AVERAGE_HPP

// ---- taskvec/methods/breadcrumbs.hpp
#if !defined(TASKVEC_SINGLE_METHODS_BREADCRUMBS_HPP)
#define TASKVEC_SINGLE_METHODS_BREADCRUMBS_HPP
// Model Breadcrumbs: task vectors without their outliers and without their smallest entries. Davari and Belilovsky,
// "Model Breadcrumbs: scaling multi-task model merging with sparse masks" (ECCV 2024).
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/elect/sum.hpp
#if !defined(TASKVEC_SINGLE_METHODS_ELECT_SUM_HPP)
#define TASKVEC_SINGLE_METHODS_ELECT_SUM_HPP
// θ0 + λ·Σ weights·(what a rule keeps of the task vectors): task arithmetic, DARE, Model Stock.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/keep/all.hpp
#if !defined(TASKVEC_SINGLE_METHODS_KEEP_ALL_HPP)
#define TASKVEC_SINGLE_METHODS_KEEP_ALL_HPP
// Keep rules: which entries of a task vector take part in a merge. This one keeps all.
// SPDX-License-Identifier: Apache-2.0
//
// A keep rule has two halves. What is chosen and prepared for all tensors, `get<A>(tensor)`, gives the rule of one
// tensor: a small value that bodies hold, whose call operator keeps a pack of entries of task t, changes them, or makes
// zeros of them. `sees_all`: NaN and infinity are never dropped. constant_until(place, end) tells to where the rule is
// one and the same; rules that draw have stream(t) and drawing(). Methods take any rule: see ties.hpp and dare.hpp.


#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Keeps every entry as it is.
struct keep_all {
    /// NaN and infinity are never dropped: a sum over what is kept shows them.
    static constexpr bool sees_all = true;

    /// x.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In&, std::size_t, const typename In::pack& x) const noexcept
    {
        return x;
    }
    /// Itself: no tensor has a rule of its own.
    template <arithmetic_element A>
    [[nodiscard]] keep_all get(std::size_t) const noexcept
    {
        return *this;
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
};

namespace detail {

/// Says what is missing of a keep rule, in a sentence.
template <class Keep>
consteval bool check_keep()
{
    constexpr bool chosen = requires(const Keep& keep, std::size_t tensor) { keep.template get<float>(tensor); };
    static_assert(chosen,
        "a keep rule has the rule of each tensor: template <arithmetic_element A> auto get(std::size_t tensor) const");
    if constexpr (chosen) {
        using rule = std::remove_cvref_t<decltype(std::declval<const Keep&>().template get<float>(std::size_t{0}))>;
        static_assert(
            requires { static_cast<bool>(rule::sees_all); },
            "the keep rule of a tensor says whether it never drops NaN and infinity: static constexpr bool sees_all");
    }
    static_assert(
        requires(const Keep& keep) { static_cast<unsigned>(keep.walks()); },
        "a keep rule says how often it read the models: unsigned walks() const");
    return true;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_KEEP_ALL_HPP

// ---- taskvec/methods/keep/l1_factors.hpp
#if !defined(TASKVEC_SINGLE_METHODS_KEEP_L1_FACTORS_HPP)
#define TASKVEC_SINGLE_METHODS_KEEP_L1_FACTORS_HPP
// What a keep rule takes of each task vector's L1 norm, and the factors that give it back: mergekit's `rescale`.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/task_rows.hpp
#if !defined(TASKVEC_SINGLE_METHODS_TASK_ROWS_HPP)
#define TASKVEC_SINGLE_METHODS_TASK_ROWS_HPP
// Rows of a block's task vectors, a pack of entries at a time, for what a method works out before it merges.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Entries as a rule sees them that merges use too (`before`, `draws`).
template <arithmetic_element A, int bytes>
struct ruled_entries {
    using number = A;
    using pack = taskvec::pack<A, bytes>;
    using words = typename pack::words;
    using mask = typename pack::mask;
    std::uint64_t place; ///< in the concatenation of all tensors; all of a pack lie on one side of what a rule asks for
    const signed_word<A>* drawn; ///< the rule's words of these entries; null where it draws none

    [[nodiscard]] TASKVEC_INLINE bool before(std::uint64_t end) const noexcept { return place < end; }
    [[nodiscard]] TASKVEC_INLINE words draws(std::size_t) const noexcept
    {
        using lanes = typename taskvec::detail::vector_of<signed_word<A>, bytes>::anywhere;
        return {*reinterpret_cast<const lanes*>(drawn)};
    }
};

/// Some consecutive entries of all task vectors, whose rows lie `stride` apart: x(t) is the pack of task t.
template <arithmetic_element A, int bytes>
struct task_packs {
    const A* first; ///< of task 0
    std::size_t stride;

    [[nodiscard]] TASKVEC_INLINE pack<A, bytes> operator()(std::size_t t) const noexcept
    {
        return load_row<A, bytes, A>(first + t * stride);
    }
};

/// Calls work.template at<bytes>(i, x) for the entries of a block from i on: whole packs first, then one by one.
template <arithmetic_element A, class Work>
struct task_rows_kernel {
    Work& work;
    const A* rows;
    std::size_t stride, size;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t i = 0;
        if constexpr (bytes > 0) { packs_of<bytes>(i); }
        packs_of<0>(i);
    }

private:
    template <int bytes>
    TASKVEC_INLINE void packs_of(std::size_t& i) const
    {
        constexpr std::size_t width = static_cast<std::size_t>(pack_lanes<A, bytes>);
        for (; i + width <= size; i += width) { work.template at<bytes>(i, task_packs<A, bytes>{rows + i, stride}); }
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// The rows of a block's task vectors, task 0 first and block_size apart; of tasks where there is no base.
template <arithmetic_element A>
[[nodiscard]] const A* delta_rows(row_block<A>& rows)
{
    for (std::size_t t = 0; t < rows.task_count(); ++t) {
        const A* const x = rows.delta(t);
        if (x != rows.row(t)) { std::copy_n(x, rows.size(), rows.row(t)); }
    }
    return rows.row(0);
}

/// Runs `work` over `rows`, which delta_rows() gave.
template <arithmetic_element A, class Work>
void over_task_rows(const A* rows, std::size_t size, Work& work)
{
    kernels::run_widest(kernels::task_rows_kernel<A, Work>{work, rows, block_size, size});
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_TASK_ROWS_HPP

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// For every tensor and task Σ|τ| / Σ|kept τ|, [tensor][task]: in f64 with a fixed shape; 1 where either sum is below
/// 1e-7, as in mergekit. Cost: one read of the models. On the CPU only: invalid_argument elsewhere.
template <class Passes, class Keep>
[[nodiscard]] call_vector<call_vector<double>> l1_factors(Passes& passes, const Keep& keep);

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Magnitudes of a row, for sum().
template <arithmetic_element A>
struct magnitude_terms {
    const A* x;

    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack<double, bytes> at(std::size_t i) const noexcept
    {
        return from_bits(magnitude_of(load_wide<bytes>(x + i)));
    }
};

/// A row of task vector `task` as its tensor's rule keeps it: work of task_rows_kernel on that row alone.
template <arithmetic_element A, class Rule>
struct kept_entries {
    const Rule& rule;
    std::size_t task;
    std::uint64_t place; ///< of the first entry
    const signed_word<A>* drawn; ///< null where the rule draws none
    A* out;

    template <int bytes, class Deltas>
    TASKVEC_INLINE void at(std::size_t i, const Deltas& x) const
    {
        const ruled_entries<A, bytes> entries{place + i, drawn ? drawn + i : nullptr};
        store_row<A>(rule(entries, task, x(0)), out + i);
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// out = a row of task vector t as the rule of its tensor keeps it. `words`: room for a block's.
template <arithmetic_element A, class Rule>
void keep_row(const row_block<A>& rows, const Rule& rule, std::size_t t, const A* x, A* out, signed_word<A>* words)
{
    const signed_word<A>* drawn = nullptr;
    if constexpr (requires { rule.stream(t); }) {
        if (rule.drawing()) {
            fill_draws<A>(rule.stream(t), rows.offset(), words, rows.size());
            drawn = words;
        }
    }
    const std::uint64_t place = rows.position();
    for (std::size_t at = 0; at < rows.size();) {
        std::size_t until = rows.size();
        if constexpr (requires { rule.constant_until(place, place); }) {
            until = static_cast<std::size_t>(rule.constant_until(place + at, place + until) - place);
        }
        const kernels::kept_entries<A, Rule> work{rule, t, place + at, drawn ? drawn + at : nullptr, out + at};
        over_task_rows(x + at, until - at, work);
        at = until;
    }
}

} // namespace detail

template <class Passes, class Keep>
call_vector<call_vector<double>> l1_factors(Passes& passes, const Keep& keep)
{
    if constexpr (Passes::space != memory_space::host) {
        static_cast<void>(keep);
        raise<invalid_argument>(error_code::device_unavailable,
            "L1 norms of what is kept are summed on the CPU: merge there, or do not rescale");
    }
    else {
        const std::size_t tasks = passes.tasks();
        auto sums = tensor_sums<storage_of<Passes>>(
            passes.policy(), passes.models(), 2 * tasks, 1, "norms", [&]<class A>(row_block<A>& rows, double* sum) {
                const auto rule = keep.template get<A>(rows.tensor_index());
                alignas(64) signed_word<A> words[block_size];
                A* const kept = rows.scratch(0);
                for (std::size_t t = 0; t < tasks; ++t) {
                    const A* const x = rows.delta(t);
                    detail::keep_row(rows, rule, t, x, kept, words);
                    sum[2 * t] = kernels::sum(kernels::magnitude_terms<A>{x}, rows.size());
                    sum[2 * t + 1] = kernels::sum(kernels::magnitude_terms<A>{kept}, rows.size());
                }
            });
        for (auto& of_tensor : sums) {
            for (std::size_t t = 0; t < tasks; ++t) {
                const double all = of_tensor[2 * t], kept = of_tensor[2 * t + 1];
                of_tensor[t] = all < 1e-7 || kept < 1e-7 ? 1.0 : all / kept;
            }
            of_tensor.resize(tasks);
        }
        return sums;
    }
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_KEEP_L1_FACTORS_HPP

#include <concepts>
#include <cstddef>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// θ0 + factor·(Σ weights[t]·keep(τt) / divisor): +0 first, then in task order; every product, sum and quotient rounds.
template <arithmetic_element A, class Rule>
struct kept_sum_body : Rule {
    static constexpr bool watches = Rule::sees_all;
    const A* weights; ///< of each task
    A factor; ///< of the sum
    A divisor = 1; ///< of the sum

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const Rule& keep = *this;
        const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY {
            const auto kept = keep(in, t, in.delta(t));
            if constexpr (!std::same_as<Rule, keep_all>) {
                if (in.counts_tasks()) { in.count_of(0, t, kept != 0); }
            }
            return weights[t] * kept;
        });
        in.watch(sum);
        if (divisor != 1) { return in.base() + factor * (sum / divisor); }
        return in.base() + factor * sum;
    }
};

/// θ0 + λ·(sum or weighted mean of what any rule keeps), prepared for every tensor: what task arithmetic and sparse
/// methods without an election are made of.
class kept_sum {
public:
    /// From options with lambda, weights and normalize; `rescale`: what is kept of a task vector gets its L1 norm back
    /// (l1_factors). Errors: invalid_argument (lambda, weights).
    template <class Passes, class Options, class Keep>
    kept_sum(Passes& passes, const Options& options, const Keep& keep, bool rescale)
        : kept_sum(passes, options, keep, rescale, task_weights(options.weights, passes.models()))
    { }
    template <arithmetic_element A, class Rule>
    [[nodiscard]] kept_sum_body<A, Rule> body(const Rule& rule, std::size_t tensor) const
    {
        const A* weights;
        if constexpr (std::same_as<A, double>) { weights = wide_; }
        else {
            weights = single_;
        }
        return {rule, weights + tensor * stride_, static_cast<A>(lambda_), divisor_.template get<A>()};
    }
    /// Reads of the models for L1 norms.
    [[nodiscard]] unsigned walks() const noexcept { return stride_ ? 1u : 0u; }

private:
    template <class Passes, class Options, class Keep>
    kept_sum(Passes& passes, const Options& options, const Keep& keep, bool rescale, call_vector<double> weights)
        : lambda_(options.lambda)
        , divisor_(weights, options.normalize, passes.models())
        , stride_(rescale ? passes.tasks() : 0)
    {
        if (rescale) {
            call_vector<double> scaled;
            for (const auto& factors : l1_factors(passes, keep)) {
                for (std::size_t t = 0; t < factors.size(); ++t) { scaled.push_back(weights[t] * factors[t]); }
            }
            weights = std::move(scaled);
        }
        single_ = passes.keep(call_vector<float>(weights.begin(), weights.end()));
        wide_ = passes.keep(std::move(weights));
    }

    double lambda_;
    detail::weight_divisor divisor_;
    std::size_t stride_;
    const float* single_ = nullptr;
    const double* wide_ = nullptr;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_ELECT_SUM_HPP

// ---- taskvec/methods/keep/between.hpp
#if !defined(TASKVEC_SINGLE_METHODS_KEEP_BETWEEN_HPP)
#define TASKVEC_SINGLE_METHODS_KEEP_BETWEEN_HPP
// Keeping the entries of middling magnitude of every task vector, without outliers: the masks of Model Breadcrumbs.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/keep/top.hpp
#if !defined(TASKVEC_SINGLE_METHODS_KEEP_TOP_HPP)
#define TASKVEC_SINGLE_METHODS_KEEP_TOP_HPP
// Keeping the top entries of every task vector by magnitude: the trim of TIES.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/select/thresholds.hpp
#if !defined(TASKVEC_SINGLE_SELECT_THRESHOLDS_HPP)
#define TASKVEC_SINGLE_SELECT_THRESHOLDS_HPP
// Thresholds of every task vector of aligned models, over the whole model or tensor by tensor.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/select/top_k.hpp
#if !defined(TASKVEC_SINGLE_SELECT_TOP_K_HPP)
#define TASKVEC_SINGLE_SELECT_TOP_K_HPP
// Exact top-k by magnitude, over one tensor or a whole model, in constant memory.
// SPDX-License-Identifier: Apache-2.0
//
// Every task vector has a threshold {magnitude, equal_end}: an entry is kept when its magnitude is larger, or equal and
// its place comes before equal_end. So exactly k entries are kept, among equal magnitudes those of lowest index, and
// whoever processes an entry later needs nothing but its value and its place.
//
// The k-th magnitude is found on the bits of |x|, never by a sort: a sample brackets it, one walk over the data counts
// what lies above the bracket and collects what lies inside; an answer outside the bracket, or too much inside, narrows
// the bracket and walks again; what sampling cannot narrow, a histogram does.


#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory_resource>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which entries of a task vector are kept: those with bits of |x| above `magnitude`, and those equal to it whose place
/// in the scope comes before `equal_end`.
template <arithmetic_element A>
struct top_k_threshold {
    bits_type<A> magnitude = 0; ///< bits of |x|, without the sign
    /// Place in the scope.
    std::uint64_t equal_end = std::numeric_limits<std::uint64_t>::max();

    /// Whether the entry with this value at this place of the scope is kept.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr bool keeps(A value, std::uint64_t place) const noexcept
    {
        const bits_type<A> bits = magnitude_bits(value);
        return bits > magnitude || (bits == magnitude && place < equal_end);
    }
    friend bool operator==(const top_k_threshold&, const top_k_threshold&) = default;
};

/// k(n) = floor(density · n) in double, at least 1 when n > 0, and 0 for a density below 2^-64, of which no model has
/// an entry. Errors: invalid_argument unless 0 < density ≤ 1.
[[nodiscard]] inline std::uint64_t top_k_count(double density, std::uint64_t n)
{
    if (!(density > 0.0 && density <= 1.0)) {
        raise<invalid_argument>(error_code::density_out_of_range,
            message("density is ", density, "; expected a share in (0, 1], such as 0.2 for 20%"));
    }
    if (n == 0 || density < 0x1p-64) { return 0; }
    return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(std::floor(density * static_cast<double>(n))));
}

/// The threshold on f32 values that selects what an f64 threshold selects (f32 values are exact in f64).
template <arithmetic_element To, arithmetic_element From>
[[nodiscard]] top_k_threshold<To> threshold_as(const top_k_threshold<From>& threshold) noexcept
{
    if constexpr (std::same_as<To, From>) { return threshold; }
    else {
        static_assert(std::same_as<To, float>, "a threshold on f32 magnitudes says nothing about f64 ones");
        const double exact = std::bit_cast<double>(threshold.magnitude);
        float below = static_cast<float>(exact);
        if (static_cast<double>(below) > exact) {
            below = std::bit_cast<float>(std::bit_cast<std::uint32_t>(below) - 1);
        }
        if (static_cast<double>(below) == exact || std::isnan(exact)) {
            return {magnitude_bits(below), threshold.equal_end};
        }
        return {magnitude_bits(below), 0}; // between two floats: only larger ones are kept
    }
}

namespace kernels {

/// Consecutive entries whose magnitudes are looked at: those of x − base, of x where there is no base.
template <storage_element T>
struct magnitude_run {
    using bits = bits_type<arithmetic_type<T>>;
    const storage_word<T>*x = nullptr, *base = nullptr;
    std::size_t size = 0; ///< at most a block's
    bits low = 0, high = 0; ///< the bracket
    bits* collected = nullptr; ///< room for `size` magnitudes and a pack; null: they are counted only
};

/// What a look finds: magnitudes above a bracket and inside it, and the largest magnitude bits.
template <arithmetic_element A>
struct magnitude_counts {
    std::uint64_t above = 0, inside = 0;
    bits_type<A> largest = 0;
};

TASKVEC_KERNELS_BEGIN

/// Counts magnitudes above a bracket and inside it, and appends those inside to what is collected, in no particular
/// order.
template <arithmetic_element A, int bytes>
class bracket_counter {
public:
    using words = pack_words<A, bytes>;
    using word = signed_word<A>; // magnitudes have no sign bit: signed compares are the cheap ones

    /// `collected`: room for those inside and a pack; null: they are counted only.
    TASKVEC_INLINE bracket_counter(bits_type<A> low, bits_type<A> high, bits_type<A>* collected)
        : low_(filled_words<words>(static_cast<word>(low)))
        , high_(filled_words<words>(static_cast<word>(high)))
        , out_(reinterpret_cast<word*>(collected))
    { }
    TASKVEC_INLINE void take(const words& magnitude)
    {
        const auto over = magnitude > high_, from_low = magnitude >= low_;
        above_ = added_where(over, above_);
        reached_ = added_where(from_low, reached_);
        top_ = larger(top_, magnitude);
        const auto hit = from_low & ~over;
        if (out_) { out_ += packed_where(hit, magnitude, out_); }
    }
    TASKVEC_INLINE void add_to(magnitude_counts<A>& counts) const
    {
        constexpr int lanes = static_cast<int>(pack_lanes<A, bytes>);
        word over[lanes], from_low[lanes], largest[lanes];
        std::memcpy(over, &above_, sizeof over);
        std::memcpy(from_low, &reached_, sizeof from_low);
        std::memcpy(largest, &top_, sizeof largest);
        for (int lane = 0; lane < lanes; ++lane) {
            counts.above += static_cast<std::uint64_t>(over[lane]);
            counts.inside += static_cast<std::uint64_t>(from_low[lane] - over[lane]);
            const auto found = static_cast<bits_type<A>>(largest[lane]);
            counts.largest = found > counts.largest ? found : counts.largest;
        }
    }

private:
    words low_, high_;
    word* out_;
    words above_{}, reached_{}, top_{};
};

/// Looks at a run, which with vectors is whole lines of 64 bytes.
template <storage_element T, bool difference>
struct look_kernel {
    using number = arithmetic_type<T>;
    static constexpr std::size_t line = 64 / sizeof(T);

    const magnitude_run<T>& run_of;
    magnitude_counts<number>& counts;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        using stored = stored_pack<T, bytes>;
        constexpr std::size_t group = bytes == 0 ? 1 : line;
        const storage_word<T>*const x = run_of.x, *const base = run_of.base;
        const std::size_t n = run_of.size;
        bracket_counter<number, bytes> counter(
            run_of.low, run_of.high, run_of.collected ? run_of.collected + counts.inside : nullptr);
        const auto take = [&](const typename stored::pack_type& value)
                              TASKVEC_BODY { counter.take(magnitude_of(value)); };
        for (std::size_t i = 0; i + group <= n; i += group) {
            if constexpr (bytes > 0) {
                fetch_ahead<line>(x + i);
                if constexpr (difference) { fetch_ahead<line>(base + i); }
            }
            TASKVEC_UNROLL(4)
            for (std::size_t at = i; at < i + group; at += stored::entries) {
                stored entries, origin;
                entries.load(x + at);
                if constexpr (difference) {
                    origin.load(base + at);
                    take(entries.template get<0>() - origin.template get<0>());
                    if constexpr (stored::parts == 2) { take(entries.template get<1>() - origin.template get<1>()); }
                }
                else {
                    take(entries.template get<0>());
                    if constexpr (stored::parts == 2) { take(entries.template get<1>()); }
                }
            }
        }
        counter.add_to(counts);
    }
};

/// Looks at a list of magnitudes.
template <arithmetic_element A>
struct look_again_kernel {
    std::span<const bits_type<A>> list;
    bits_type<A> low, high;
    bits_type<A>* collected;
    magnitude_counts<A>& counts;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t i = 0;
        if constexpr (bytes > 0) { packs_of<bytes>(i); }
        packs_of<0>(i);
    }

private:
    template <int bytes>
    TASKVEC_INLINE void packs_of(std::size_t& i) const
    {
        using words = pack_words<A, bytes>;
        using lanes = typename taskvec::detail::vector_of<signed_word<A>, bytes>::anywhere;
        constexpr std::size_t width = static_cast<std::size_t>(pack_lanes<A, bytes>);
        bracket_counter<A, bytes> counter(low, high, collected ? collected + counts.inside : nullptr);
        for (; i + width <= list.size(); i += width) {
            counter.take(words{*reinterpret_cast<const lanes*>(list.data() + i)});
        }
        counter.add_to(counts);
    }
};

/// Zeroes the entries whose magnitude is below `least`. With vectors the row is whole lines of 64 bytes.
template <arithmetic_element A>
struct keep_kernel {
    A* x;
    std::size_t n;
    bits_type<A> least;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        using stored = stored_pack<A, bytes>;
        using words = typename stored::pack_type::words;
        A* const row = x;
        const std::size_t size = n;
        const words bound = filled_words<words>(static_cast<signed_word<A>>(least));
        for (std::size_t i = 0; i + stored::entries <= size; i += stored::entries) {
            stored entries;
            entries.load(row + i);
            const auto value = entries.template get<0>();
            entries.template put<0>(where(magnitude_of(value) >= bound, value));
            entries.store(row + i);
        }
    }
};

TASKVEC_KERNELS_END

/// Looks at a run of any size.
template <bool difference, storage_element T>
void look(const magnitude_run<T>& run, magnitude_counts<arithmetic_type<T>>& counts)
{
    using kernel = look_kernel<T, difference>;
    magnitude_run<T> part = run;
    part.size = current_instruction_set() == instruction_set::scalar ? 0 : run.size / kernel::line * kernel::line;
    if (part.size > 0) { run_widest(kernel{part, counts}); }
    if (part.size == run.size) { return; }
    part.x += part.size;
    if (part.base) { part.base += part.size; }
    part.size = run.size - part.size;
    run_scalar(kernel{part, counts});
}

/// Looks at a list of magnitudes. `collected`: room for those inside and a pack, or null.
template <arithmetic_element A>
[[nodiscard]] magnitude_counts<A> look_again(
    std::span<const bits_type<A>> list, bits_type<A> low, bits_type<A> high, bits_type<A>* collected = nullptr)
{
    magnitude_counts<A> counts;
    run_widest(look_again_kernel<A>{list, low, high, collected, counts});
    return counts;
}

/// Zeroes the entries of a row whose magnitude is below `least`.
template <arithmetic_element A>
void keep_at_least(A* x, std::size_t n, bits_type<A> least)
{
    constexpr std::size_t line = 64 / sizeof(A);
    const std::size_t whole = current_instruction_set() == instruction_set::scalar ? 0 : n / line * line;
    if (whole > 0) { run_widest(keep_kernel<A>{x, whole, least}); }
    if (whole < n) { run_scalar(keep_kernel<A>{x + whole, n - whole, least}); }
}

/// Zeroes the entries of a row that a threshold drops; x[0] has place `place`. Kept entries are unchanged.
template <arithmetic_element A>
void trim(A* x, std::size_t n, std::uint64_t place, const top_k_threshold<A>& threshold)
{
    const std::size_t equal = threshold.equal_end > place
        ? static_cast<std::size_t>(std::min<std::uint64_t>(threshold.equal_end - place, n))
        : 0;
    if (equal > 0 && threshold.magnitude > 0) { keep_at_least(x, equal, threshold.magnitude); }
    if (equal < n) { keep_at_least(x + equal, n - equal, threshold.magnitude + 1); }
}

} // namespace kernels

namespace detail {

/// Entries of a list by their rank, the largest first, for lists that are asked a few times: a histogram tells the bin
/// of a rank, and only that bin's entries are ordered. All entries lie in [low, high].
template <std::unsigned_integral Bits>
class ranking {
public:
    ranking(std::span<const Bits> values, Bits low, Bits high, std::pmr::memory_resource* memory)
        : values_(values)
        , low_(low)
        , shift_(static_cast<unsigned>(
              std::max(0, static_cast<int>(std::bit_width(static_cast<Bits>(high - low))) - bin_bits)))
        , counts_(std::size_t{1} << bin_bits, 0, memory)
        , members_(memory)
    {
        for (const Bits value : values) { ++counts_[bin_of(value)]; }
    }
    /// The entry of rank `rank` < number of entries; rank 0 is the largest.
    [[nodiscard]] Bits operator[](std::size_t rank)
    {
        std::size_t bin = counts_.size() - 1;
        while (counts_[bin] <= rank) { rank -= counts_[bin--]; }
        members_.clear();
        for (const Bits value : values_) {
            if (bin_of(value) == bin) { members_.push_back(value); }
        }
        const auto place = members_.begin() + static_cast<std::ptrdiff_t>(rank);
        std::nth_element(members_.begin(), place, members_.end(), std::greater<>());
        return *place;
    }

private:
    static constexpr int bin_bits = 11;
    [[nodiscard]] std::size_t bin_of(Bits value) const noexcept
    {
        return static_cast<std::size_t>((value - low_) >> shift_);
    }

    std::span<const Bits> values_;
    Bits low_;
    unsigned shift_;
    std::pmr::vector<std::size_t> counts_;
    std::pmr::vector<Bits> members_;
};

/// Where a sample says that the entry lies which a share of all entries is larger than.
template <std::unsigned_integral Bits>
struct sampled_bracket {
    Bits low = 0, high = 0;
    Bits value = 0; ///< the sample's own
    double margin = 0; ///< how many of the sample's ranks it may be off by
};
/// All entries, of the sample too, lie in [low, high].
template <std::unsigned_integral Bits>
[[nodiscard]] sampled_bracket<Bits> bracket_of(
    std::span<const Bits> sample, double share, Bits low, Bits high, std::pmr::memory_resource* memory)
{
    const double m = static_cast<double>(sample.size());
    // Neighbours are alike, so the sample's rank is a little less certain than that of independent draws.
    const double margin = 3.0 * std::sqrt(m * share * (1.0 - share)) + 4.0;
    const double first = share * m - margin, last = share * m + margin;
    ranking<Bits> ranked(sample, low, high, memory);
    const auto at = [&](double rank) { return ranked[static_cast<std::size_t>(std::min(m - 1, std::max(0.0, rank)))]; };
    return {last >= m ? low : at(last), first < 0 ? high : at(first), at(share * m), margin};
}

/// What ranking says of a long list, by looks at it.
template <arithmetic_element A>
[[nodiscard]] bits_type<A> magnitude_of_rank(std::span<const bits_type<A>> list, std::size_t rank, bits_type<A> low,
    bits_type<A> high, std::pmr::memory_resource* memory)
{
    using bits = bits_type<A>;
    constexpr std::size_t short_list = 8192, sampled = 1024;
    if (list.size() > short_list) {
        std::pmr::vector<bits> sample(sampled, memory);
        for (std::size_t i = 0; i < sampled; ++i) { sample[i] = list[i * (list.size() / sampled)]; }
        const auto share = static_cast<double>(rank) / static_cast<double>(list.size());
        const auto bracket = bracket_of<bits>(sample, share, low, high, memory);
        const auto counts = kernels::look_again<A>(list, bracket.low, bracket.high);
        if (counts.above <= rank && rank < counts.above + counts.inside && counts.inside <= list.size() / 2) {
            if (bracket.low == bracket.high) { return bracket.low; }
            std::pmr::vector<bits> inside(static_cast<std::size_t>(counts.inside) + 64 / sizeof(bits), memory);
            (void)kernels::look_again<A>(list, bracket.low, bracket.high, inside.data());
            return magnitude_of_rank<A>(std::span(inside).first(static_cast<std::size_t>(counts.inside)),
                rank - static_cast<std::size_t>(counts.above), bracket.low, bracket.high, memory);
        }
    }
    return ranking<bits>(list, low, high, memory)[rank];
}

/// Finds the thresholds of several task vectors ("channels") over a range of chunks in common walks.
template <arithmetic_element A, class Types = storage_types>
class top_k_search {
    using bits = bits_type<A>;
    static constexpr bits highest = static_cast<bits>(~sign_mask<A>);
    static constexpr std::uint64_t all = std::numeric_limits<std::uint64_t>::max();

    // What is known of a channel: the answer lies in [low, high], `above` entries lie above it and `inside` within.
    struct channel {
        std::uint64_t k = 0, above = 0, inside = 0;
        bits low = 0, high = highest;
        bool done = false;
        int sampled_rounds = 0;
        top_k_threshold<A> threshold{};
    };
    // What a walk tries: the pivots, and what it saw of them.
    struct attempt {
        bits low = 0, high = 0;
        bool active = false, collecting = false, counting_bins = false;
        unsigned shift = 0;
        std::uint64_t above = 0, inside = 0;
        double expected = 0; ///< how many lie inside, as far as is known
    };
    struct segment {
        std::size_t chunk = 0;
        std::size_t begin = 0, end = 0;
    };
    struct collected {
        explicit collected(std::pmr::memory_resource* memory)
            : values(memory)
            , segments(memory)
            , bins(memory)
        { }
        std::uint64_t above = 0, inside = 0;
        std::pmr::vector<bits> values;
        std::pmr::vector<segment> segments;
        std::pmr::vector<std::uint64_t> bins;
        bool overflow = false;
    };
    // What all workers of a walk saw.
    struct seen_of_channels {
        seen_of_channels(
            std::size_t workers, std::size_t channels, std::size_t chunks, std::pmr::memory_resource* memory)
            : by_worker(memory)
            , inside(channels * chunks, 0, memory)
            , channel_count(channels)
            , chunk_count(chunks)
        {
            by_worker.reserve(workers * channels);
            for (std::size_t i = 0; i < workers * channels; ++i) { by_worker.emplace_back(memory); }
        }
        [[nodiscard]] collected& of(std::size_t worker, std::size_t channel) noexcept
        {
            return by_worker[worker * channel_count + channel];
        }
        [[nodiscard]] std::size_t workers() const noexcept { return by_worker.size() / channel_count; }
        /// For each chunk, the entries inside a channel's bracket.
        [[nodiscard]] std::span<std::uint32_t> inside_of(std::size_t channel) noexcept
        {
            return std::span(inside).subspan(channel * chunk_count, chunk_count);
        }
        std::pmr::vector<collected> by_worker; // [worker][channel]
        std::pmr::vector<std::uint32_t> inside; // [channel][chunk]
        std::size_t channel_count, chunk_count;
    };
    static constexpr unsigned bin_bits = 11;

public:
    top_k_search(const cpu& policy, const aligned_models& models, chunk_range range, std::size_t capacity)
        : policy_(policy)
        , models_(models)
        , range_(range)
        , capacity_(capacity)
        , memory_(memory_of(policy))
        , workspaces_(make_workspaces<Types>(policy, models, range.last - range.first, 1))
    {
        for (std::size_t c = range.first; c < range.last; ++c) { elements_ += models.chunks()[c].size; }
        begin_ = range.first < range.last ? place_of(range.first) : 0;
    }

    /// counts[t] of task vector t are kept. `walks` receives how often the data were read from end to end.
    call_vector<top_k_threshold<A>> run(std::span<const std::uint64_t> counts, unsigned* walks)
    {
        channels_.resize(counts.size());
        for (std::size_t t = 0; t < counts.size(); ++t) {
            auto& c = channels_[t];
            c.k = counts[t];
            c.inside = elements_;
            c.done = c.k >= elements_; // everything is kept
        }
        walks_ = 0;
        while (!std::all_of(channels_.begin(), channels_.end(), [](const channel& c) { return c.done; })) { round(); }
        if (walks) { *walks = walks_; }
        call_vector<top_k_threshold<A>> thresholds;
        for (const auto& c : channels_) { thresholds.push_back(c.threshold); }
        return thresholds;
    }

private:
    [[nodiscard]] std::uint64_t place_of(std::size_t chunk) const
    {
        const auto& piece = models_.chunks()[chunk];
        return models_.tensors()[piece.tensor].position + piece.offset;
    }

    void round()
    {
        call_vector<attempt> attempts(channels_.size());
        auto samples = sample();
        for (std::size_t t = 0; t < channels_.size(); ++t) {
            if (!channels_[t].done) { plan(channels_[t], attempts[t], samples[t]); }
        }
        seen_of_channels seen(workspaces_.size(), channels_.size(), range_.last - range_.first, memory_);
        walk(attempts, seen);
        ++walks_;
        for (std::size_t t = 0; t < channels_.size(); ++t) {
            if (attempts[t].active) { learn(t, attempts[t], seen); }
        }
    }

    /// Magnitudes of entries at places spread over the scope, those inside each channel's bracket.
    std::pmr::vector<std::pmr::vector<bits>> sample()
    {
        constexpr std::size_t run = 32;
        std::pmr::vector<std::pmr::vector<bits>> samples(channels_.size(), memory_); // its elements take it on
        const std::uint64_t wanted = std::clamp<std::uint64_t>(elements_ / 512, 1024, 131072), runs = wanted / run;
        bool worth = false;
        for (const auto& c : channels_) {
            worth = worth || (!c.done && c.inside > capacity_ / 16 && c.sampled_rounds < 3);
        }
        if (!worth || elements_ < 8 * wanted) { return samples; }
        const random_stream places(0x746f702d6bull, static_cast<std::uint32_t>(walks_));
        for (std::uint64_t r = 0; r < runs; ++r) {
            const std::uint64_t stratum = elements_ / runs;
            std::uint64_t place = begin_ + r * stratum + places.word(r) % stratum;
            const aligned_tensor& tensor = models_.tensors()[models_.tensor_at(place)];
            const std::uint64_t offset = place - tensor.position;
            const std::size_t n = static_cast<std::size_t>(std::min<std::uint64_t>(run, tensor.size - offset));
            with_block_of<Types>(workspaces_[0], tensor, [&](auto& rows) {
                rows.open(tensor, offset, n);
                for (std::size_t t = 0; t < channels_.size(); ++t) {
                    const auto& c = channels_[t];
                    if (c.done) { continue; }
                    const auto* const values = rows.delta(t);
                    for (std::size_t i = 0; i < n; ++i) {
                        const bits magnitude = magnitude_bits(static_cast<A>(values[i]));
                        if (magnitude >= c.low && magnitude <= c.high) { samples[t].push_back(magnitude); }
                    }
                }
            });
        }
        return samples;
    }

    /// Chooses what the next walk asks of a channel.
    void plan(channel& c, attempt& a, std::span<const bits> sample)
    {
        a = {c.low, c.high, true, false, false, 0, 0, 0, static_cast<double>(c.inside)};
        if (c.low == c.high) { return; }
        if (c.inside <= capacity_ / 16) {
            a.collecting = true;
            return;
        }
        if (sample.size() >= 64 && c.sampled_rounds < 3) {
            ++c.sampled_rounds;
            const double share = static_cast<double>(c.k - c.above) / static_cast<double>(c.inside);
            const auto found = bracket_of<bits>(sample, share, c.low, c.high, memory_);
            a.low = found.low;
            a.high = found.high;
            a.collecting = true;
            const auto in_sample = [&](bits low, bits high) {
                return static_cast<double>(kernels::look_again<A>(sample, low, high).inside);
            };
            a.expected = static_cast<double>(c.inside) / static_cast<double>(sample.size()) * in_sample(a.low, a.high);
            // One value that fills the bracket and more, and would not fit, is looked at alone: its equals are counted.
            if (a.expected > static_cast<double>(capacity_) / 2 && in_sample(found.value, found.value) > found.margin) {
                a.low = a.high = found.value;
            }
            return;
        }
        a.counting_bins = true;
        unsigned width = 0;
        for (bits rest = c.high - c.low; rest; rest >>= 1) { ++width; }
        a.shift = width > bin_bits ? width - bin_bits : 0;
    }

    void walk(const call_vector<attempt>& attempts, seen_of_channels& seen)
    {
        const std::size_t count = range_.last - range_.first,
                          share = std::max<std::size_t>(1, capacity_ / workspaces_.size());
        for (std::size_t t = 0; t < attempts.size(); ++t) {
            const attempt& a = attempts[t];
            if (!a.active || !a.collecting || a.low == a.high) { continue; }
            const double each = 1.1 * a.expected / static_cast<double>(seen.workers()) + block_size;
            for (std::size_t w = 0; w < seen.workers(); ++w) {
                seen.of(w, t).values.reserve(static_cast<std::size_t>(std::min(each, static_cast<double>(share))));
            }
        }
        progress_meter meter(policy_, "select", bytes_of(models_, range_));
        for_each_index(policy_, count, [&](std::size_t index, std::size_t worker) {
            const tensor_chunk& piece = models_.chunks()[range_.first + index];
            const aligned_tensor& tensor = models_.tensors()[piece.tensor];
            with_block_of<Types>(workspaces_[worker], tensor, [&]<class B>(row_block<B>& rows) {
                for_each_block_of(rows, piece, [&](row_block<B>& opened) {
                    for (std::size_t t = 0; t < attempts.size(); ++t) {
                        if (!attempts[t].active) { continue; }
                        collected& into = seen.of(worker, t);
                        const std::span<std::uint32_t> inside_of = seen.inside_of(t);
                        if constexpr (std::same_as<A, B>) {
                            if (look_stored(Types{}, attempts[t], opened, t, into, index, share, inside_of)) {
                                continue;
                            }
                            (void)look<A>(
                                attempts[t], opened.delta(t), nullptr, opened.size(), into, index, share, inside_of);
                        }
                        else {
                            // An f32 tensor beside f64 ones: its magnitudes compare as f64, exactly.
                            const B* const values = opened.delta(t);
                            std::array<A, block_size> wide;
                            for (std::size_t i = 0; i < opened.size(); ++i) { wide[i] = static_cast<A>(values[i]); }
                            (void)look<A>(
                                attempts[t], wide.data(), nullptr, opened.size(), into, index, share, inside_of);
                        }
                    }
                });
            });
            if (!meter.advance(models_.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
        });
    }

    /// look() straight at the stored words of task t, where it and the base (if there is one) are stored as the same
    /// type, and aligned; false otherwise.
    template <class... T>
    static bool look_stored(storage_list<T...>, const attempt& a, row_block<A>& rows, std::size_t t, collected& into,
        std::size_t index, std::size_t share, std::span<std::uint32_t> inside_of)
    {
        return (look_stored_as<T>(a, rows, t, into, index, share, inside_of) || ...);
    }
    template <storage_element T>
    static bool look_stored_as(const attempt& a, row_block<A>& rows, std::size_t t, collected& into, std::size_t index,
        std::size_t share, std::span<std::uint32_t> inside_of)
    {
        if constexpr (std::same_as<arithmetic_type<T>, A> && has_pack_conversion<T>) {
            const storage_word<T>*x = nullptr, *base = nullptr;
            if (!rows.template stored_task<T>(t, base, x)) { return false; }
            rows.note(look<T>(a, x, base, rows.size(), into, index, share, inside_of));
            return true;
        }
        else {
            return false;
        }
    }

    /// Appends collected magnitudes of a chunk, or gives up collecting when there is no room.
    template <class Magnitude>
    static void keep(collected& into, std::size_t index, std::size_t share, const Magnitude* values, std::size_t count)
    {
        const std::size_t begin = into.values.size(), end = begin + count;
        if (end > share) {
            into.overflow = true;
            into.values.clear();
            into.values.shrink_to_fit();
            into.segments.clear();
            return;
        }
        into.values.insert(into.values.end(), values, values + count);
        if (!into.segments.empty() && into.segments.back().chunk == index) { into.segments.back().end = end; }
        else {
            into.segments.push_back({index, begin, end});
        }
    }

    /// Counts the magnitudes of x − base (of x where there is no base), and collects or bins what lies inside the
    /// bracket. Returns the largest magnitude bits.
    template <storage_element T>
    static bits look(const attempt& a, const storage_word<T>* x, const storage_word<T>* base, std::size_t n,
        collected& into, std::size_t index, std::size_t share, std::span<std::uint32_t> inside_of)
    {
        const bool collecting = a.collecting && a.low != a.high && !into.overflow;
        std::array<bits, block_size + 64 / sizeof(bits)> values;
        kernels::magnitude_counts<A> counts;
        const kernels::magnitude_run<T> run{
            x, base, n, a.low, a.high, collecting || a.counting_bins ? values.data() : nullptr};
        if (base) { kernels::look<true>(run, counts); }
        else {
            kernels::look<false>(run, counts);
        }
        into.above += counts.above;
        into.inside += counts.inside;
        inside_of[index] += static_cast<std::uint32_t>(counts.inside);
        if (counts.inside == 0) { return counts.largest; }
        const auto inside = static_cast<std::size_t>(counts.inside);
        if (a.counting_bins) {
            if (into.bins.empty()) { into.bins.assign(std::size_t{1} << bin_bits, 0); }
            for (std::size_t i = 0; i < inside; ++i) {
                ++into.bins[static_cast<std::size_t>((values[i] - a.low) >> a.shift)];
            }
        }
        if (collecting) { keep(into, index, share, values.data(), inside); }
        return counts.largest;
    }

    void learn(std::size_t t, attempt& a, seen_of_channels& seen)
    {
        channel& c = channels_[t];
        bool overflow = false;
        for (std::size_t w = 0; w < seen.workers(); ++w) {
            const collected& worker = seen.of(w, t);
            a.above += worker.above;
            a.inside += worker.inside;
            overflow = overflow || worker.overflow;
        }
        if (c.k <= a.above) { // the answer is above the bracket
            c.low = a.high + 1;
            c.inside = a.above - c.above;
            return;
        }
        if (c.k > a.above + a.inside) { // below it
            c.inside -= a.above + a.inside - c.above;
            c.above = a.above + a.inside;
            c.high = a.low - 1;
            return;
        }
        c = {c.k, a.above, a.inside, a.low, a.high, false, c.sampled_rounds, {}};
        if (c.low == c.high) { finish(t, c.low, seen.inside_of(t)); }
        else if (a.counting_bins) {
            for (std::size_t bin = std::size_t{1} << bin_bits; bin-- > 0;) {
                std::uint64_t count = 0;
                for (std::size_t w = 0; w < seen.workers(); ++w) {
                    count += seen.of(w, t).bins.empty() ? 0 : seen.of(w, t).bins[bin];
                }
                if (c.k <= c.above + count) {
                    const bits floor = a.low + (static_cast<bits>(bin) << a.shift);
                    c.low = floor;
                    c.high = std::min<bits>(a.high, floor + ((bits{1} << a.shift) - 1));
                    c.inside = count;
                    return;
                }
                c.above += count;
            }
        }
        else if (!overflow) {
            std::pmr::vector<bits> joined(memory_);
            std::span<const bits> values = seen.of(0, t).values;
            if (seen.workers() > 1) {
                joined.reserve(static_cast<std::size_t>(a.inside));
                for (std::size_t w = 0; w < seen.workers(); ++w) {
                    const auto& found = seen.of(w, t).values;
                    joined.insert(joined.end(), found.begin(), found.end());
                }
                values = joined;
            }
            const bits answer =
                magnitude_of_rank<A>(values, static_cast<std::size_t>(c.k - c.above - 1), a.low, a.high, memory_);
            std::pmr::vector<std::uint32_t> equal(range_.last - range_.first, 0, memory_);
            for (std::size_t w = 0; w < seen.workers(); ++w) {
                const collected& worker = seen.of(w, t);
                for (const auto& [index, begin, end] : worker.segments) {
                    const auto counts =
                        kernels::look_again<A>(std::span(worker.values).subspan(begin, end - begin), answer, answer);
                    equal[index] += static_cast<std::uint32_t>(counts.inside);
                    c.above += counts.above;
                }
            }
            finish(t, answer, equal);
        }
    }

    /// The answer is known, c.above entries lie above it and equal[chunk] are equal: finds the place where equals end.
    void finish(std::size_t t, bits answer, std::span<const std::uint32_t> equal)
    {
        channel& c = channels_[t];
        c.done = true;
        c.threshold = {answer, all};
        std::uint64_t wanted = c.k - c.above;
        std::size_t index = 0;
        while (index < equal.size() && equal[index] < wanted) { wanted -= equal[index++]; }
        if (index == equal.size()) { return; }
        const tensor_chunk& piece = models_.chunks()[range_.first + index];
        with_block_of<Types>(workspaces_[0], models_.tensors()[piece.tensor], [&](auto& rows) {
            for_each_block_of(rows, piece, [&](auto& opened) {
                if (wanted == 0) { return; }
                const auto* const values = opened.delta(t);
                if constexpr (std::same_as<std::remove_cvref_t<decltype(*values)>, A>) {
                    kernels::magnitude_counts<A> counts;
                    kernels::look<false>(
                        kernels::magnitude_run<A>{values, nullptr, opened.size(), answer, answer, nullptr}, counts);
                    if (counts.inside < wanted) {
                        wanted -= counts.inside;
                        return;
                    }
                }
                for (std::size_t i = 0; i < opened.size() && wanted > 0; ++i) {
                    if (magnitude_bits(static_cast<A>(values[i])) == answer && --wanted == 0) {
                        c.threshold.equal_end = opened.position() + i + 1;
                    }
                }
            });
        });
    }

    const cpu& policy_;
    const aligned_models& models_;
    chunk_range range_;
    std::size_t capacity_;
    std::pmr::memory_resource* memory_;
    std::pmr::vector<block_workspace> workspaces_;
    std::uint64_t elements_ = 0, begin_ = 0;
    call_vector<channel> channels_;
    unsigned walks_ = 0;
};

/// top_k_thresholds(), as a list of the call.
template <arithmetic_element A, class Types>
[[nodiscard]] call_vector<top_k_threshold<A>> found_thresholds(const cpu& policy, const aligned_models& models,
    chunk_range range, std::span<const std::uint64_t> counts, std::size_t capacity, unsigned* walks)
{
    return top_k_search<A, Types>(policy, models, range, std::max<std::size_t>(1024, capacity)).run(counts, walks);
}

} // namespace detail

/// The threshold that keeps the counts[t] largest entries of each task vector τt = θt − θ0 (θt when there is no base)
/// over a range of chunks. Exact; the same bits for any threads, chunk and memory. Magnitudes compare in A: use f64
/// when models.any_wide(). `capacity`: entries that may be collected at a time (4 or 8 bytes each), for each task.
/// `walks`: receives how often the data were read from end to end (1 on smooth data; a few at worst).
/// Errors: nonfinite_error (unless propagation was asked for; NaN then counts as larger than infinity).
///
///     auto thresholds = top_k_thresholds<float>(cpu{}, models, all_chunks(models), counts);
template <arithmetic_element A, class Types = storage_types>
[[nodiscard]] std::vector<top_k_threshold<A>> top_k_thresholds(const cpu& policy, const aligned_models& models,
    chunk_range range, std::span<const std::uint64_t> counts, std::size_t capacity = std::size_t{1} << 22,
    unsigned* walks = nullptr)
{
    const detail::call_memory memory(policy.memory);
    const auto found = detail::found_thresholds<A, Types>(policy, models, range, counts, capacity, walks);
    return {found.begin(), found.end()};
}

/// The threshold that keeps the k entries of largest magnitude of a flat view, lowest index first among equals.
/// Bit-exact. Errors: invalid_argument unless 0 < k ≤ n (k = 0 only for n = 0); nonfinite_error. Cost: a little more
/// than one read of x.
///
///     std::vector<float> x = …;
///     auto threshold = top_k(cpu{}, x, 100);
///     bool kept = threshold.keeps(x[7], 7);
template <input_of<cpu> X>
[[nodiscard]] auto top_k(const cpu& policy, const X& x, std::uint64_t k, unsigned* walks = nullptr)
{
    const auto values = as_view(x);
    using A = arithmetic_type<element_of<const X>>;
    if (k > values.size() || (k == 0 && !values.empty())) {
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("k is ", k, " for ", values.size(), " entries; expected 1 to ", values.size()));
    }
    const const_model_ref model = detail::flat_model(values);
    const aligned_models models(nullptr, {&model, 1});
    return top_k_thresholds<A, storage_list<element_of<const X>>>(
        policy, models, all_chunks(models), std::array{k}, std::size_t{1} << 22, walks)[0];
}

/// The k-th largest magnitude of a flat view.
template <input_of<cpu> X>
[[nodiscard]] auto kth_magnitude(const cpu& policy, const X& x, std::uint64_t k)
{
    using A = arithmetic_type<element_of<const X>>;
    if (k == 0) { raise<invalid_argument>(error_code::parameter_out_of_range, "k is 0; expected at least 1"); }
    return std::bit_cast<A>(top_k(policy, x, k).magnitude);
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(cpu, top_k, any_arguments, "top_k(policy, x, k) of a flat view, where k counts entries")
TASKVEC_WRONG_CALLS(
    cpu, kth_magnitude, any_arguments, "kth_magnitude(policy, x, k) of a flat view, where k counts entries")

// On taskvec::gpu these live in a header of their own.
TASKVEC_CALLS_NEED_HEADER(top_k, select, "taskvec/device/select.hpp")
TASKVEC_CALLS_NEED_HEADER(kth_magnitude, select, "taskvec/device/select.hpp")

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SELECT_TOP_K_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Over what the top entries are counted and the majority sign is taken: all tensors together (what the papers mean),
/// or each tensor by itself.
enum class scope : std::uint8_t { model, tensor };

/// Which entries the trim keeps: exactly k, lowest index first among equals; or every entry whose magnitude reaches the
/// (floor(density·n) + 1)-th largest, however many are equal.
enum class trim_rule : std::uint8_t { exact, reach_next };

template <>
struct enum_words<scope> {
    static constexpr std::array words{
        enum_word<scope>{scope::model, "model"}, enum_word<scope>{scope::tensor, "tensor"}};
};
template <>
struct enum_words<trim_rule> {
    static constexpr std::array words{
        enum_word<trim_rule>{trim_rule::exact, "exact"}, enum_word<trim_rule>{trim_rule::reach_next, "reach-next"}};
};

namespace detail {

/// Finds thresholds as trim_thresholds asks for them, on the CPU.
template <class Types = storage_types>
struct top_k_by_sampling {
    const cpu* policy;
    const aligned_models* models;
    std::size_t at_once = 1; ///< how many such searches there are at a time, which share the budget

    template <arithmetic_element A>
    [[nodiscard]] call_vector<top_k_threshold<A>> operator()(
        std::type_identity<A>, tensor_range range, std::span<const std::uint64_t> counts, unsigned* walks) const
    {
        // Half the budget for what a pass collects, for all tasks together.
        const std::size_t capacity =
            std::min(std::size_t{1} << 22, models->options().memory / 2 / (models->task_count() * sizeof(A) * at_once));
        const chunk_range chunks{models->first_chunk(range.first), models->first_chunk(range.last)};
        return found_thresholds<A, Types>(*policy, *models, chunks, counts, capacity, walks);
    }

    /// Calls f(tensor, search) for every tensor, with what searches that tensor: see for_each_part().
    template <class F>
    void for_each_tensor(const F& f) const
    {
        call_vector<std::uint64_t> bytes;
        for (std::size_t i = 0; i < models->tensors().size(); ++i) {
            bytes.push_back(bytes_of(*models, {models->first_chunk(i), models->first_chunk(i + 1)}));
        }
        for_each_part(*policy, "select", bytes, [&](std::size_t i, const cpu& on, std::size_t together) {
            f(i, top_k_by_sampling{&on, models, together});
        });
    }
};

} // namespace detail

/// How many entries of n are kept, for what is no plain share: count(n), or count(n, t) of task t.
template <class Count>
concept entry_count = std::same_as<std::invoke_result_t<const Count&, std::uint64_t>, std::uint64_t>
    || std::same_as<std::invoke_result_t<const Count&, std::uint64_t, std::size_t>, std::uint64_t>;

/// A share of the entries of task vectors: one for all, or one for each task.
class task_shares {
public:
    /// One share for all tasks: a number converts.
    task_shares(double all)
        : all_(all)
    { }
    /// `each`: one for each task, or none for `all`. `what`: "densities", for messages. Errors: invalid_argument where
    /// there are not as many as tasks.
    task_shares(double all, std::span<const double> each, std::size_t tasks, std::string_view what)
        : all_(all)
        , each_(each.begin(), each.end())
    {
        if (!each_.empty() && each_.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(each_.size(), " ", what, " for ", tasks, " tasks: give one each, or none"));
        }
    }
    /// The share of task t.
    [[nodiscard]] double of(std::size_t t) const { return each_.empty() ? all_ : each_[t]; }

private:
    double all_;
    call_vector<double> each_{};
};

/// Thresholds of every task vector, over the whole model or for each tensor.
class trim_thresholds {
public:
    /// Finds the thresholds of all tasks: about one read of the models. Errors: invalid_argument (a density outside
    /// (0, 1]), nonfinite_error unless it may spread, cancelled.
    template <cpu_policy P> // a template, so that files which do not call it do not compile the search for every type
    trim_thresholds(const P& policy, const aligned_models& models, const task_shares& density, scope over,
        trim_rule rule = trim_rule::exact)
        : trim_thresholds(models, density, over, rule, detail::top_k_by_sampling<>{&policy, &models})
    { }
    /// The same by another search: search(std::type_identity<A>{}, tensors, counts, walks) finds the thresholds that
    /// keep counts[t] entries of task vector t over a range of tensors.
    template <class Search>
    trim_thresholds(
        const aligned_models& models, const task_shares& density, scope over, trim_rule rule, const Search& search)
        : trim_thresholds(storage_types{}, models, density, over, rule, search)
    { }
    /// The same for models that store nothing but the types of a list: no code is made for others.
    template <class... T, class Search>
    trim_thresholds(storage_list<T...>, const aligned_models& models, const task_shares& density, scope over,
        trim_rule rule, const Search& search)
        : trim_thresholds(
              storage_list<T...>{}, models,
              [&density, rule](std::uint64_t n, std::size_t t) {
                  const double share = density.of(t);
                  const std::uint64_t exact = top_k_count(share, n); // refuses what is no share
                  return rule == trim_rule::exact
                      ? exact
                      : std::min(n, static_cast<std::uint64_t>(std::floor(share * static_cast<double>(n))) + 1);
              },
              over, search, rule == trim_rule::reach_next)
    {
        if (!models.tensors().empty()) { return; }
        for (std::size_t t = 0; t < tasks_; ++t) { // a wrong density is one anywhere
            static_cast<void>(top_k_count(density.of(t), 0));
        }
    }
    /// The same for count(n) entries of n, or count(n, t) of task t, the largest; with `equals` all that are as large
    /// as the last of them.
    template <class... T, entry_count Count, class Search>
    trim_thresholds(storage_list<T...>, const aligned_models& models, const Count& count, scope over,
        const Search& search, bool equals = false)
        : per_tensor_(over == scope::tensor)
        , tasks_(models.task_count())
    {
        constexpr bool wide = (std::same_as<arithmetic_type<T>, double> || ...);
        if constexpr (wide) {
            if (models.any_wide()) {
                find<double>(models, count, equals, search, wide_);
                return;
            }
        }
        if constexpr ((std::same_as<arithmetic_type<T>, float> || ...)) {
            find<float>(models, count, equals, search, single_);
        }
    }
    /// The threshold on task t's vector in a tensor, for arithmetic in A.
    template <arithmetic_element A>
    [[nodiscard]] top_k_threshold<A> get(std::size_t tensor, std::size_t t) const
    {
        const std::size_t index = (per_tensor_ ? tensor : 0) * tasks_ + t;
        if constexpr (std::same_as<A, double>) { return wide_[index]; }
        else {
            return wide_.empty() ? single_[index] : threshold_as<float>(wide_[index]);
        }
    }
    /// How often the models were read to find them.
    [[nodiscard]] unsigned walks() const noexcept { return walks_; }

private:
    template <arithmetic_element A, class Count, class Search>
    void find(const aligned_models& models, const Count& count, bool equals, const Search& search,
        call_vector<top_k_threshold<A>>& thresholds)
    {
        const std::size_t scopes = per_tensor_ ? models.tensors().size() : 1;
        const top_k_threshold<A> none{static_cast<bits_type<A>>(~sign_mask<A>), 0}; // above every magnitude
        thresholds.assign(scopes * tasks_, none);
        call_vector<unsigned> walks(scopes, 0);
        const auto find_in = [&](std::size_t at, tensor_range range, std::uint64_t n, const auto& found_by) {
            call_vector<std::uint64_t> counts;
            call_vector<bool> empty;
            for (std::size_t t = 0; t < tasks_; ++t) {
                std::uint64_t k = 0;
                if constexpr (std::invocable<const Count&, std::uint64_t, std::size_t>) { k = count(n, t); }
                else {
                    k = count(n);
                }
                empty.push_back(k == 0);
                counts.push_back(std::max<std::uint64_t>(1, k)); // a search finds one at least
            }
            if (std::find(empty.begin(), empty.end(), false) == empty.end()) { return; }
            std::size_t task = 0;
            for (auto threshold :
                found_by(std::type_identity<A>{}, range, std::span<const std::uint64_t>(counts), &walks[at])) {
                if (equals) { threshold.equal_end = std::numeric_limits<std::uint64_t>::max(); }
                if (!empty[task]) { thresholds[at * tasks_ + task] = threshold; }
                ++task;
            }
        };
        const auto in_tensor = [&](std::size_t i, const auto& found_by) {
            find_in(i, {i, i + 1}, models.tensors()[i].size, found_by);
        };
        if (!per_tensor_) { find_in(0, {0, models.tensors().size()}, models.elements(), search); }
        else if constexpr (requires { search.for_each_tensor(in_tensor); }) {
            search.for_each_tensor(in_tensor);
        }
        else {
            for (std::size_t i = 0; i < scopes; ++i) { in_tensor(i, search); }
        }
        for (const unsigned taken : walks) { walks_ = std::max(walks_, taken); }
    }

    call_vector<top_k_threshold<float>> single_;
    call_vector<top_k_threshold<double>> wide_;
    bool per_tensor_;
    std::size_t tasks_;
    unsigned walks_ = 0;
};

/// The thresholds that a method's passes find, on whatever policy they run: see cpu_passes (methods/passes.hpp).
template <class Passes>
    requires(Passes::space == memory_space::host)
[[nodiscard]] trim_thresholds trim_thresholds_of(
    Passes& passes, const task_shares& density, scope over, trim_rule rule = trim_rule::exact)
{
    using types = storage_of<Passes>;
    return {types{}, passes.models(), density, over, rule,
        detail::top_k_by_sampling<types>{&passes.policy(), &passes.models()}};
}

/// The same where count(n) entries of n, or count(n, t) of task t, are kept, the largest.
template <class Passes, entry_count Count>
    requires(Passes::space == memory_space::host)
[[nodiscard]] trim_thresholds trim_thresholds_of(Passes& passes, const Count& count, scope over)
{
    using types = storage_of<Passes>;
    return {
        types{}, passes.models(), count, over, detail::top_k_by_sampling<types>{&passes.policy(), &passes.models()}};
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SELECT_THRESHOLDS_HPP

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// The rule of one tensor: entries whose magnitude is above a task's threshold, or equal to it and placed before
/// equal_end. A kept 0 is none.
template <arithmetic_element A>
struct keep_top_of_tensor {
    /// NaN and infinity are never dropped: their magnitudes are the largest.
    static constexpr bool sees_all = true;
    /// A task's threshold as a pack compares with it: what is kept is above one of two words.
    struct bounds {
        signed_word<A> before = 0, after = 0; ///< for entries placed before equal_end, and for the others
        std::uint64_t equal_end = 0; ///< place in the scope
        bounds() = default;
        /// From a threshold.
        explicit bounds(const top_k_threshold<A>& threshold) noexcept
            : before(static_cast<signed_word<A>>(threshold.magnitude > 0 ? threshold.magnitude - 1 : 0))
            , after(static_cast<signed_word<A>>(threshold.magnitude))
            , equal_end(threshold.equal_end)
        { }
    };
    const bounds* of_tasks; ///< of each task
    std::size_t tasks; ///< how many

    /// x where it is kept, 0 where not.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        const bounds& bound = of_tasks[t];
        const signed_word<A> below = in.before(bound.equal_end) ? bound.before : bound.after;
        return where(magnitude_of(x) > filled_words<typename In::words>(below), x);
    }
    /// The first place after `place` and up to `end` from which on another rule holds.
    [[nodiscard]] std::uint64_t constant_until(std::uint64_t place, std::uint64_t end) const noexcept
    {
        for (std::size_t t = 0; t < tasks; ++t) {
            if (of_tasks[t].equal_end > place) { end = std::min(end, of_tasks[t].equal_end); }
        }
        return end;
    }
};

/// Keeps the top `density` of every task vector over a scope (see trim_thresholds). Cost: about one read of the models.
class keep_top {
public:
    /// The top `density` of each task over `over`, chosen by `rule`.
    template <class Passes>
    keep_top(Passes& passes, const task_shares& density, scope over, trim_rule rule = trim_rule::exact)
        : keep_top(passes, over, trim_thresholds_of(passes, density, over, rule))
    { }
    /// The same for count(n) entries of n, or count(n, t) of task t.
    template <class Passes, entry_count Count>
    keep_top(Passes& passes, const Count& count, scope over)
        : keep_top(passes, over, trim_thresholds_of(passes, count, over))
    { }
    /// The rule of a tensor, in the arithmetic type A.
    template <arithmetic_element A>
    [[nodiscard]] keep_top_of_tensor<A> get(std::size_t tensor) const noexcept
    {
        const std::size_t row = (per_tensor_ ? tensor : 0) * tasks_;
        if constexpr (std::same_as<A, double>) { return {wide_ + row, tasks_}; }
        else {
            return {single_ + row, tasks_};
        }
    }
    [[nodiscard]] unsigned walks() const noexcept { return walks_; }

private:
    template <arithmetic_element A>
    using bounds = typename keep_top_of_tensor<A>::bounds;

    template <class Passes>
    keep_top(Passes& passes, scope over, const trim_thresholds& found)
        : per_tensor_(over == scope::tensor)
        , tasks_(passes.models().task_count())
    {
        walks_ = found.walks();
        const std::size_t rows = per_tensor_ ? passes.models().tensors().size() : 1;
        call_vector<bounds<float>> single;
        call_vector<bounds<double>> wide;
        for (std::size_t row = 0; row < rows; ++row) {
            for (std::size_t t = 0; t < tasks_; ++t) {
                single.emplace_back(found.get<float>(row, t));
                if (passes.models().any_wide()) { wide.emplace_back(found.get<double>(row, t)); }
            }
        }
        single_ = passes.keep(std::move(single));
        wide_ = passes.keep(std::move(wide));
    }

    bool per_tensor_;
    std::size_t tasks_;
    unsigned walks_ = 0;
    const bounds<float>* single_ = nullptr;
    const bounds<double>* wide_ = nullptr;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_KEEP_TOP_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// The rule of one tensor: what is among the top entries of `upper`, and not among those of `outliers`.
template <arithmetic_element A>
struct keep_between_of_tensor {
    /// NaN and infinity are outliers, which are dropped.
    static constexpr bool sees_all = false;
    keep_top_of_tensor<A> upper, outliers; ///< what is kept or above it, and what is above it

    /// x where it is kept, 0 where not.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        return select(outliers(in, t, x) == 0, upper(in, t, x), typename In::pack{});
    }
    [[nodiscard]] std::uint64_t constant_until(std::uint64_t place, std::uint64_t end) const noexcept
    {
        return outliers.constant_until(place, upper.constant_until(place, end));
    }
};

/// Of n entries of a task vector (of a tensor, or of all) the floor(gamma·n) largest magnitudes are dropped as
/// outliers, the floor(density·n) below them are kept, and the rest is dropped; where gamma and density leave no room
/// for both, fewer outliers are dropped. Among equals the lowest index counts as the largest. Errors: invalid_argument
/// unless 0 < density ≤ 1 and 0 ≤ gamma < 1 for every task. Cost: about two reads of the models.
class keep_between {
public:
    /// `passes`: of the models that are merged; `over`: what a share counts over.
    template <class Passes>
    keep_between(Passes& passes, const task_shares& density, const task_shares& gamma, scope over)
        : outliers_(
              passes, [&](std::uint64_t n, std::size_t t) { return outlier_count(density.of(t), gamma.of(t), n); },
              over)
        , kept_(
              passes,
              [&](std::uint64_t n, std::size_t t) {
                  return outlier_count(density.of(t), gamma.of(t), n) + share(density.of(t), n);
              },
              over)
    { }
    /// The rule of a tensor, in the arithmetic type A.
    template <arithmetic_element A>
    [[nodiscard]] keep_between_of_tensor<A> get(std::size_t tensor) const noexcept
    {
        return {kept_.get<A>(tensor), outliers_.get<A>(tensor)};
    }
    [[nodiscard]] unsigned walks() const noexcept { return outliers_.walks() + kept_.walks(); }

private:
    [[nodiscard]] static std::uint64_t share(double of, std::uint64_t n)
    {
        return static_cast<std::uint64_t>(std::floor(of * static_cast<double>(n)));
    }
    [[nodiscard]] static std::uint64_t outlier_count(double density, double gamma, std::uint64_t n)
    {
        static_cast<void>(top_k_count(density, n)); // refuses a wrong density
        if (!(gamma >= 0.0 && gamma < 1.0)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("gamma is ", gamma, "; expected a share from 0 to below 1, such as 0.01 for the top 1%"));
        }
        return std::min(share(gamma, n), n - share(density, n));
    }

    keep_top outliers_, kept_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_KEEP_BETWEEN_HPP

// ---- taskvec/methods/ties.hpp
#if !defined(TASKVEC_SINGLE_METHODS_TIES_HPP)
#define TASKVEC_SINGLE_METHODS_TIES_HPP
// TIES: trim, elect signs, merge what agrees. Yadav et al., "TIES-Merging" (NeurIPS 2023).
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/elect/sign.hpp
#if !defined(TASKVEC_SINGLE_METHODS_ELECT_SIGN_HPP)
#define TASKVEC_SINGLE_METHODS_ELECT_SIGN_HPP
// Electing a sign and merging the entries that agree with it: the second and third step of TIES.
// SPDX-License-Identifier: Apache-2.0


#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// How the entries whose sign was elected become one.
enum class disjoint_merge : std::uint8_t { mean, sum, max };

template <>
struct enum_words<disjoint_merge> {
    static constexpr std::array words{enum_word<disjoint_merge>{disjoint_merge::mean, "mean"},
        enum_word<disjoint_merge>{disjoint_merge::sum, "sum"}, enum_word<disjoint_merge>{disjoint_merge::max, "max"}};
};

/// The factors of one task in the election: in the sum that elects, in the value that is merged, in the divisor of the
/// mean, and in the test of agreement (where only its sign counts).
struct election_weights {
    call_vector<double> elect{}, value{}, divide{}, agree{}; ///< one for each task in each list
};

/// The factors of an election, rounded to A once: T elect, T value, T divide, T agree.
template <arithmetic_element A>
[[nodiscard]] call_vector<A> election_factors(const election_weights& weights)
{
    call_vector<A> factors;
    for (const auto* list : {&weights.elect, &weights.value, &weights.divide, &weights.agree}) {
        for (const double weight : *list) { factors.push_back(static_cast<A>(weight)); }
    }
    return factors;
}

/// What elections count: entries whose sum is positive, those whose sum is negative, and those whose sum is exactly 0
/// while some entry is not; for each task, where statistics are asked for, its nonzero entries and those that do not
/// agree.
struct election_counts {
    /// Slots of in.count(): sums above 0, below 0, and exactly 0 while some entry is not.
    static constexpr std::size_t positive = 0, negative = 1, unresolved = 2;
    /// Slots of in.count_of(): entries that take part, and those of them that do not agree.
    static constexpr std::size_t kept = 0, conflicting = 1;
};

/// θ0 + λ·τ, where τ merges those of the kept entries whose sign is that of their weighted sum. Works for any weights:
/// factors are those of election_factors(). `zero`: what a sum of 0 elects (1, 0 or −1). A sum that is NaN spreads.
template <arithmetic_element A, class Rule>
struct sign_election_body : Rule {
    static constexpr bool watches = Rule::sees_all;
    const A* factors; ///< those of election_factors()
    disjoint_merge combine; ///< of agreeing entries
    A zero, lambda; ///< what a sum of 0 elects, and the scale of τ

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        const Rule& keep = *this;
        const std::size_t count = in.tasks();
        const auto trim = [&](std::size_t t) TASKVEC_BODY { return keep(in, t, in.delta(t)); };
        typename In::words seen{};
        pack sum{};
        const auto kept = in.list_of(trim, [&](std::size_t t, const pack& x) TASKVEC_BODY {
            seen = seen | magnitude_of(x);
            sum = sum + factors[t] * x;
        });
        in.watch(sum);
        const auto none = sum == 0;
        in.count(election_counts::positive, sum > 0);
        in.count(election_counts::negative, sum < 0);
        in.count(election_counts::unresolved, where_zero(sum, seen) > 0);
        pack sign = select(sum > 0, filled<pack>(1), sum);
        sign = select(sum < 0, filled<pack>(-1), sign);
        sign = select(none, filled<pack>(zero), sign);
        pack total{}, divisor{};
        in.each([&](std::size_t t) TASKVEC_BODY {
            const pack x = kept(t);
            const auto agrees = factors[3 * count + t] * x * sign > 0;
            const pack candidate = where(agrees, factors[count + t] * x);
            if (combine == disjoint_merge::max) {
                total = select(magnitude_of(candidate) > magnitude_of(total), candidate, total);
            }
            else {
                total = total + candidate;
                if (combine == disjoint_merge::mean) {
                    divisor = divisor + where(agrees, filled<pack>(factors[2 * count + t]));
                }
            }
            if (in.counts_tasks()) {
                in.count_of(election_counts::kept, t, x != 0);
                in.count_of(election_counts::conflicting, t, (x != 0) & ~agrees);
            }
        });
        const pack mean = total / select(divisor == 0, filled<pack>(1), divisor);
        return in.base() + lambda * select(sign == sign, mean, sign);
    }
};

/// The same where all weights are 1, the agreeing entries become their mean, and a sum of 0 elects one of the signs:
/// the operations of sign_election_body in its order, but for products by 1 and sums with a 0 that cannot change a bit.
template <arithmetic_element A, class Rule>
struct unit_election_body : Rule {
    static constexpr bool watches = Rule::sees_all;
    /// Numbers of tasks that are compiled by themselves: with the tasks in registers a sweep takes four fifths of the
    /// time.
    static constexpr std::integer_sequence<int, 2, 3, 4, 5, 6, 7, 8> held{};
    A lambda; ///< the scale of τ
    signed_word<A> zero; ///< the sign bit that a sum of 0 elects: 0 for plus

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        using words = typename In::words;
        const Rule& keep = *this;
        const auto trim = [&](std::size_t t) TASKVEC_BODY { return keep(in, t, in.delta(t)); };
        pack sum{};
        const auto kept = in.list_of(trim, [&](std::size_t, const pack& x) TASKVEC_BODY { sum = sum + x; });
        in.watch(sum);
        in.count(election_counts::positive, sum > 0);
        in.count(election_counts::negative, sum < 0);
        // With the sum's sign taken off, an entry agrees where it is a positive number, and then it is one as a word
        // too.
        const words sign = bits_of(sum) & static_cast<signed_word<A>>(sign_mask<A>);
        words of_zeros{}, elected = sign;
        if (zero != 0) { // one answer for all packs: the first sweep has none of it
            of_zeros = where_zero(sum, filled_words<words>(zero));
            elected = sign | of_zeros;
        }
        words agreeing{};
        const pack total = in.total_of([&](std::size_t t) TASKVEC_BODY {
            const words x = bits_of(kept(t)) ^ elected;
            const words agrees = larger(x, words{});
            agreeing = added_where_positive(agrees, agreeing);
            return from_bits(agrees);
        });
        // A sum of 0 has entries of both signs, or none at all.
        in.count(election_counts::unresolved, where_zero(sum, agreeing) > 0);
        // Nothing agrees with a sum of no entries, and nothing is +0.
        if (zero != 0) { elected = sign | (of_zeros & (words{} - agreeing)); }
        const pack mean = turned(total / to_numbers(larger(agreeing, filled_words<words>(1))), elected);
        return in.base() + lambda * select(materialised(sum == sum), mean, sum);
    }
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_ELECT_SIGN_HPP

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The sign of an entry whose election sum is exactly 0 while some task vector is not: that of the sum of all elected
/// signs in scope, and if that is 0 too none (majority) or minus (majority_or_negative; but none for
/// disjoint_merge::max, as in the code that this follows); plus; or none. An entry without a sign merges to 0.
enum class zero_sign : std::uint8_t { majority, majority_or_negative, positive, none };

template <>
struct enum_words<zero_sign> {
    static constexpr std::array words{enum_word<zero_sign>{zero_sign::majority, "majority"},
        enum_word<zero_sign>{zero_sign::majority_or_negative, "majority-or-negative"},
        enum_word<zero_sign>{zero_sign::positive, "positive"}, enum_word<zero_sign>{zero_sign::none, "none"}};
};

/// θ* = θ0 + λ·τ, where τ merges the trimmed task vectors τ̂t:
///   1. trim: τ̂t keeps the top `density` of τt by magnitude (k = floor(density·n), at least 1), zeroes the rest;
///      with `densities` each task has its own;
///   2. elect: γ = sign(Σ wt·τ̂t), elementwise;
///   3. merge the entries with sign γ: Σ wt·τ̂t / Σ wt (mean), Σ wt·τ̂t (sum), or the wt·τ̂t of largest magnitude (max).
///
/// Sums run in f32 (f64 for f64) in task order; every product, sum and quotient rounds; bit-exact for any threads and
/// blocks. Weights: one for each task, or none for all 1; negative ones only under a preset that gives them a meaning.
/// Cost: two reads of the inputs and one write; a little more where the majority decides.
///
///     merge(cpu{}, ties_options{.density = 0.2}, base, tasks, out);
struct ties_options {
    double density = 0.2;
    double lambda = 1.0;
    std::vector<double> weights{};
    taskvec::scope scope = taskvec::scope::model;
    disjoint_merge combine = disjoint_merge::mean;
    taskvec::zero_sign zero_sign = taskvec::zero_sign::majority;
    trim_rule trim = trim_rule::exact;
    bool weighted_election = true; ///< weights count in the election
    bool divide_by_count = false; ///< the mean divides by the number of agreeing tasks, not by the sum of their weights
    bool agree_when_weighted =
        false; ///< an entry agrees by the sign of wt·τ̂t, so that a negative weight turns its task around
    bool negative_weights = false; ///< negative weights are accepted
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    bool rescale = false; ///< what is kept of a task vector gets its L1 norm back, tensor by tensor: mergekit's rescale

    /// What the paper's own code does: the trim keeps one entry more than asked and all its equals (all of them at
    /// density 1), the mean divides by the count, and an unresolved zero counts as negative.
    [[nodiscard]] static ties_options as_in_ties_merging()
    {
        ties_options options;
        options.trim = trim_rule::reach_next;
        options.zero_sign = taskvec::zero_sign::majority_or_negative;
        options.weighted_election = false;
        options.divide_by_count = true;
        return options;
    }
    /// What mergekit does in f32, up to its arbitrary choice among equal magnitudes at the threshold: per tensor,
    /// exactly k, a sum of 0 elects plus, weights apply before the election and in the divisor.
    [[nodiscard]] static ties_options as_in_mergekit()
    {
        ties_options options;
        options.scope = taskvec::scope::tensor;
        options.zero_sign = taskvec::zero_sign::positive;
        options.agree_when_weighted = true;
        options.negative_weights = true;
        return options;
    }
    /// What PEFT does (ties, majority sign "total"): per tensor, exactly k, unweighted election, a sum of 0 elects
    /// plus, the weighted sum is divided by the number of agreeing tasks.
    [[nodiscard]] static ties_options as_in_peft()
    {
        ties_options options;
        options.scope = taskvec::scope::tensor;
        options.zero_sign = taskvec::zero_sign::positive;
        options.weighted_election = false;
        options.divide_by_count = true;
        options.negative_weights = true;
        return options;
    }
};

template <>
struct options_of<ties_options> {
    static constexpr option_table table{
        option_row("density", &ties_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&ties_options::densities),
        option_row("lambda", &ties_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&ties_options::weights),
        option_row("scope", &ties_options::scope, "what a density counts over", {.unit = "SCOPE"}),
        option_row("merge-weights", &ties_options::combine, "how TIES joins agreeing entries", {.unit = "HOW"}),
        option_row("zero-sign", &ties_options::zero_sign, "sign of an entry whose election sum is 0", {.unit = "SIGN"}),
        option_row("trim", &ties_options::trim, "keep exactly k entries, or all that reach the next", {.unit = "RULE"}),
        option_row("weighted-election", &ties_options::weighted_election, "let weights count in the election",
            {.negated = "unweighted-election"}),
        option_row("divide-by-count", &ties_options::divide_by_count,
            "divide the mean by the number of agreeing tasks, not by their weights"),
        option_row("agree-when-weighted", &ties_options::agree_when_weighted,
            "let an entry agree by its sign after its task's weight"),
        option_row("negative-weights", &ties_options::negative_weights, "accept negative weights"),
        option_row("rescale", &ties_options::rescale,
            "give what is kept of a task vector its L1 norm back, tensor by tensor")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<ties_options>{"paper", "the paper", [] { return ties_options{}; }},
        option_preset<ties_options>{"ties-merging", "the paper's own code", &ties_options::as_in_ties_merging},
        option_preset<ties_options>{"mergekit", "mergekit", &ties_options::as_in_mergekit},
        option_preset<ties_options>{"peft", "PEFT", &ties_options::as_in_peft}};
};

namespace detail {

/// What a zero sum elects where the majority decides and the elected signs in scope add up to `sum`.
[[nodiscard]] inline int majority_sign(const ties_options& options, std::int64_t sum) noexcept
{
    if (sum != 0) { return sum > 0 ? 1 : -1; }
    return options.zero_sign == zero_sign::majority || options.combine == disjoint_merge::max ? 0 : -1;
}

/// What a zero sum elects before the majority is known.
[[nodiscard]] inline int provisional_sign(const ties_options& options) noexcept
{
    return options.zero_sign == zero_sign::none ? 0 : 1;
}

/// What elections go by, of options whose weights and densities have been taken up.
[[nodiscard]] inline ties_options election_rules(const ties_options& options)
{
    ties_options rules;
    rules.lambda = options.lambda;
    rules.scope = options.scope;
    rules.combine = options.combine;
    rules.zero_sign = options.zero_sign;
    return rules;
}

/// What zero sums of each tensor elect, from the sums of the signs that each elected; by the majority of the scope.
[[nodiscard]] inline call_vector<int> majority_signs(const ties_options& options, call_vector<std::int64_t> sums)
{
    if (options.scope == scope::model) {
        std::int64_t total = 0;
        for (const auto sum : sums) { total += sum; }
        sums.assign(sums.size(), total);
    }
    call_vector<int> signs;
    for (const auto sum : sums) { signs.push_back(majority_sign(options, sum)); }
    return signs;
}

/// The weights of TIES, of tasks that label(t) names. Errors: invalid_argument.
template <class Label>
[[nodiscard]] call_vector<double> ties_weights(const ties_options& options, std::size_t tasks, const Label& label)
{
    return labelled_weights(options.weights, tasks, label,
        options.negative_weights ? std::string_view()
                                 : "TIES knows negative weights by the semantics of mergekit and PEFT only; give 0 or "
                                   "more, or accept them (negative_weights)");
}

/// The factors of each task in an election with these options. Errors: invalid_argument (weights).
[[nodiscard]] inline election_weights election_weights_of(const ties_options& options, const aligned_models& models)
{
    const std::size_t tasks = models.task_count();
    const auto weights = ties_weights(options, tasks, [&](std::size_t t) { return models.label(t); });
    const call_vector<double> ones(tasks, 1.0);
    return {options.weighted_election ? weights : ones, weights,
        options.combine != disjoint_merge::mean ? call_vector<double>(tasks, 0.0)
            : options.divide_by_count           ? ones
                                                : weights,
        options.agree_when_weighted ? weights : ones};
}

} // namespace detail

/// Any keep rule × sign election: what TIES and DARE-TIES are. `Keep` prepares a rule for every tensor (keep_top,
/// keep_random, keep_all …); the election is that of `options`, whose densities are not looked at.
template <class Keep>
class sign_election_method : public elementwise_method {
    static_assert(detail::check_keep<Keep>());

public:
    static constexpr bool in_place = false;
    static constexpr std::size_t task_slots = 2;

    /// `keep()` makes the rule, once the options have been checked.
    template <class Passes, class MakeKeep>
    sign_election_method(Passes& passes, const ties_options& options, const MakeKeep& keep)
        : sign_election_method(passes, options, detail::election_weights_of(options, passes.models()), keep)
    { }
    /// Calls use(body) with the body of a tensor.
    template <arithmetic_element A, class Use>
    decltype(auto) with_body(std::size_t tensor, Use&& use) const
    {
        using rule = decltype(keep_.template get<A>(tensor));
        const A lambda = static_cast<A>(options_.lambda);
        if (unit_ && signs_[tensor] != 0) {
            return use(unit_election_body<A, rule>{keep_.template get<A>(tensor), lambda,
                signs_[tensor] > 0 ? 0 : static_cast<signed_word<A>>(sign_mask<A>)});
        }
        return use(body<A>(tensor));
    }
    template <arithmetic_element A>
    [[nodiscard]] auto body(std::size_t tensor) const
    {
        using rule = decltype(keep_.template get<A>(tensor));
        const A* factors;
        if constexpr (std::same_as<A, double>) { factors = wide_ + tensor * stride_; }
        else {
            factors = single_ + tensor * stride_;
        }
        return sign_election_body<A, rule>{keep_.template get<A>(tensor), factors, options_.combine,
            static_cast<A>(signs_[tensor]), static_cast<A>(options_.lambda)};
    }

    /// Sets the majority, once every entry has voted; whether it is another than was guessed somewhere.
    bool settle(std::span<const merge_tally> of_tensors)
    {
        const bool majority =
            options_.zero_sign == zero_sign::majority || options_.zero_sign == zero_sign::majority_or_negative;
        if (!majority) { return false; }
        call_vector<std::int64_t> sums;
        for (const auto& tally : of_tensors) {
            sums.push_back(static_cast<std::int64_t>(
                tally.counts[election_counts::positive] - tally.counts[election_counts::negative]));
        }
        signs_ = detail::majority_signs(options_, std::move(sums));
        return true;
    }
    /// Whether a part of a tensor with this tally was merged with a wrong guess.
    [[nodiscard]] bool again(std::size_t tensor, const merge_tally& part) const
    {
        return part.counts[election_counts::unresolved] > 0 && signs_[tensor] != detail::provisional_sign(options_);
    }
    [[nodiscard]] unsigned walks() const noexcept { return keep_.walks() + (stride_ ? 1u : 0u); }

protected:
    /// The prepared rules, for methods that derive from this.
    [[nodiscard]] const Keep& keep() const noexcept { return keep_; }

private:
    template <class Passes, class MakeKeep>
    sign_election_method(
        Passes& passes, const ties_options& options, const election_weights& weights, const MakeKeep& keep)
        : options_(detail::election_rules(options))
        , keep_(keep())
        , stride_(options.rescale ? 4 * weights.value.size() : 0)
        , unit_(options.combine == disjoint_merge::mean && !options.rescale && !passes.models().options().statistics)
        , signs_(passes.models().tensors().size(), detail::provisional_sign(options))
    {
        for (const auto* list : {&weights.elect, &weights.value, &weights.divide, &weights.agree}) {
            for (const double weight : *list) { unit_ = unit_ && weight == 1.0; }
        }
        auto single = election_factors<float>(weights);
        auto wide = election_factors<double>(weights);
        if (options.rescale) {
            single.clear();
            wide.clear();
            for (const auto& factors : l1_factors(passes, keep_)) {
                election_weights scaled = weights;
                for (std::size_t t = 0; t < factors.size(); ++t) {
                    scaled.elect[t] *= factors[t];
                    scaled.value[t] *= factors[t];
                }
                const auto more = election_factors<float>(scaled);
                const auto more_wide = election_factors<double>(scaled);
                single.insert(single.end(), more.begin(), more.end());
                wide.insert(wide.end(), more_wide.begin(), more_wide.end());
            }
        }
        single_ = passes.keep(std::move(single));
        wide_ = passes.keep(std::move(wide));
    }

    ties_options options_;
    Keep keep_;
    const float* single_ = nullptr;
    const double* wide_ = nullptr;
    std::size_t stride_; // from a tensor's factors to the next's: 0 where all have the same
    bool unit_; // weights of 1 and means, not counted: the short body will do
    call_vector<int> signs_; // for each tensor, what a zero sum elects
};

template <>
class method<ties_options> : public sign_election_method<keep_top> {
public:
    template <class Passes>
    method(Passes& passes, const ties_options& options)
        : sign_election_method(passes, options, [&] {
            return keep_top(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
                options.scope, options.trim);
        })
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const ties_options& options) noexcept
    {
        return options.scope == scope::tensor;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, ties_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_TIES_HPP

#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + λ·Σ wt·τ̂t, where τ̂t drops the floor(gamma·n) largest entries of τt by magnitude, keeps the
/// floor(density·n) below them and drops the rest: n counts a tensor (the paper's layers) or the model. With
/// `densities` and `gammas` each task has its own; with `normalize` the sum is divided by Σ wt; with `rescale` τ̂t gets
/// the L1 norm of τt back, tensor by tensor. Bit-exact for any threads and blocks. Cost: about three reads of the
/// models, one more to rescale (on the CPU only).
///
///     merge(cpu{}, breadcrumbs_options{.density = 0.85, .gamma = 0.01}, base, tasks, out);
struct breadcrumbs_options {
    double density = 0.85;
    double gamma = 0.01;
    double lambda = 0.3;
    std::vector<double> weights{};
    taskvec::scope scope = taskvec::scope::tensor;
    bool normalize = false; ///< divide by the sum of the weights
    bool rescale = false; ///< give what is kept of a task vector its L1 norm back
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    std::vector<double> gammas{}; ///< of each task, or none for `gamma` of all

    /// mergekit's: λ is 1 where none is given.
    [[nodiscard]] static breadcrumbs_options as_in_mergekit()
    {
        breadcrumbs_options options;
        options.lambda = 1.0;
        return options;
    }
};

/// Breadcrumbs in place of the trim of TIES: election and disjoint merge over what they keep. `ties.density` is not
/// used, and `ties.scope` counts for the masks as well.
///
///     merge(cpu{}, breadcrumbs_ties_options{.density = 0.85, .gamma = 0.01}, base, tasks, out);
struct breadcrumbs_ties_options {
    double density = 0.85;
    double gamma = 0.01;
    /// Of election and merge.
    ties_options ties = in_tensors();
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    std::vector<double> gammas{}; ///< of each task, or none for `gamma` of all

    /// What mergekit's breadcrumbs_ties does: what agrees is added up, not averaged.
    [[nodiscard]] static breadcrumbs_ties_options as_in_mergekit()
    {
        breadcrumbs_ties_options options;
        options.ties = ties_options::as_in_mergekit();
        options.ties.combine = disjoint_merge::sum;
        return options;
    }

private:
    [[nodiscard]] static ties_options in_tensors()
    {
        ties_options options;
        options.scope = taskvec::scope::tensor;
        return options;
    }
};

template <>
struct options_of<breadcrumbs_options> {
    static constexpr option_table table{
        option_row("density", &breadcrumbs_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&breadcrumbs_options::densities),
        option_row("gamma", &breadcrumbs_options::gamma, "share of the largest entries dropped as outliers",
            {.unit = "D", .at_least = 0, .at_most = 1}),
        option_row("lambda", &breadcrumbs_options::lambda, "scale of the merged task vector", lambda_details()),
        gammas_row(&breadcrumbs_options::gammas), weights_row(&breadcrumbs_options::weights),
        option_row("scope", &breadcrumbs_options::scope, "what a density counts over", {.unit = "SCOPE"}),
        option_row("normalize-weights", &breadcrumbs_options::normalize, "divide by the sum of the weights"),
        option_row("rescale", &breadcrumbs_options::rescale,
            "give what is kept of a task vector its L1 norm back, tensor by tensor")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<breadcrumbs_options>{"paper", "the paper", [] { return breadcrumbs_options{}; }},
        option_preset<breadcrumbs_options>{"mergekit", "mergekit", &breadcrumbs_options::as_in_mergekit}};
};
template <>
struct options_of<breadcrumbs_ties_options> {
    static constexpr option_table table{option_row("density", &breadcrumbs_ties_options::density,
                                            "share of entries kept", share_details(common_densities)),
        option_row("gamma", &breadcrumbs_ties_options::gamma, "share of the largest entries dropped as outliers",
            {.unit = "D", .at_least = 0, .at_most = 1}),
        densities_row(&breadcrumbs_ties_options::densities), gammas_row(&breadcrumbs_ties_options::gammas),
        options_within(&breadcrumbs_ties_options::ties, "density", "densities", "trim")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<breadcrumbs_ties_options>{"paper", "the paper", [] { return breadcrumbs_ties_options{}; }},
        option_preset<breadcrumbs_ties_options>{"mergekit", "mergekit", &breadcrumbs_ties_options::as_in_mergekit}};
};

template <>
class method<breadcrumbs_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const breadcrumbs_options& options)
        : keep_(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
              task_shares(options.gamma, options.gammas, passes.tasks(), "gammas"), options.scope)
        , sum_(passes, options, keep_, options.rescale)
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const breadcrumbs_options& options) noexcept
    {
        return options.scope == scope::tensor;
    }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A, keep_between_of_tensor<A>> body(std::size_t tensor) const
    {
        return sum_.body<A>(keep_.get<A>(tensor), tensor);
    }
    [[nodiscard]] unsigned walks() const noexcept { return keep_.walks() + sum_.walks(); }

private:
    keep_between keep_;
    kept_sum sum_;
};

template <>
class method<breadcrumbs_ties_options> : public sign_election_method<keep_between> {
public:
    template <class Passes>
    method(Passes& passes, const breadcrumbs_ties_options& options)
        : sign_election_method(passes, options.ties, [&] {
            return keep_between(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
                task_shares(options.gamma, options.gammas, passes.tasks(), "gammas"), options.ties.scope);
        })
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const breadcrumbs_ties_options& options) noexcept
    {
        return options.ties.scope == scope::tensor;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, breadcrumbs_options)
TASKVEC_COMPILED_MERGES(extern, breadcrumbs_ties_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_BREADCRUMBS_HPP

// ---- taskvec/methods/by_tensor.hpp
#if !defined(TASKVEC_SINGLE_METHODS_BY_TENSOR_HPP)
#define TASKVEC_SINGLE_METHODS_BY_TENSOR_HPP
// Merges whose options depend on the tensor: a callback name -> options.
// SPDX-License-Identifier: Apache-2.0


#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The tensors that take part, in groups of the same options: their places in models.tensors(), ascending. The options
/// of a group are those of its first tensor. A group for each set of values, in the order of their first tensors.
template <described_options Options>
struct tensor_group {
    Options options{}; ///< of all of them
    std::vector<std::size_t> tensors{}; ///< places in models.tensors(), ascending
};
/// Groups the tensors that take part by what `options_of(name)` says of each.
template <described_options Options>
[[nodiscard]] std::vector<tensor_group<Options>> group_by_options(
    const aligned_models& models, const callback<Options(std::string_view)>& options_of);

/// merge() with options that depend on the tensor: λ by layer, another density for embeddings, weights of tasks by
/// pattern. `options_of(name)` gives those of a tensor. Tensors with equal options are merged together, as merge()
/// merges a model of just these: a share of entries in model scope is a share of theirs. Where all options are equal
/// that is merge() itself, bit for bit; where a method knows no model-wide numbers, every tensor has the bits that
/// merge() with its options gives it. Errors, threads and cost as merge(): each tensor is read as often.
///
///     merge_by_tensor<task_arithmetic_options>(cpu{}, [](std::string_view name) {
///         return task_arithmetic_options{.lambda = name.starts_with("lm_head") ? 0.1 : 0.5};
///     }, models, sink);
template <merge_method Options>
    requires described_options<Options>
merge_report merge_by_tensor(const cpu& policy, const callback<Options(std::string_view)>& options_of,
    const aligned_models& models, tensor_sink& out);

namespace detail {

template <described_options Options>
[[nodiscard]] std::string text_of_options(const Options& options)
{
    std::string text;
    for_each_option(options, [&]<class Value>(const auto& row, const Value& member) {
        text += std::string(row.name) + "=";
        if constexpr (std::same_as<Value, std::vector<double>>) {
            for (const double x : member) { text += csv_number(x) + ","; }
        }
        else {
            text += write_option(member);
        }
        text += ";";
    });
    return text;
}

} // namespace detail

template <described_options Options>
std::vector<tensor_group<Options>> group_by_options(
    const aligned_models& models, const callback<Options(std::string_view)>& options_of)
{
    std::vector<tensor_group<Options>> groups;
    std::map<std::string, std::size_t> places;
    for (std::size_t i = 0; i < models.tensors().size(); ++i) {
        auto options = options_of(models.tensors()[i].name);
        const auto [place, fresh] = places.emplace(detail::text_of_options(options), groups.size());
        if (fresh) { groups.push_back({std::move(options), {}}); }
        groups[place->second].tensors.push_back(i);
    }
    return groups;
}

template <merge_method Options>
    requires described_options<Options>
merge_report merge_by_tensor(const cpu& policy, const callback<Options(std::string_view)>& options_of,
    const aligned_models& models, tensor_sink& out)
{
    const auto groups = group_by_options(models, options_of);
    if (groups.size() == 1) { return merge(policy, groups.front().options, models, out); }
    merge_report report;
    for (const auto& group : groups) {
        report += merge(policy, group.options, aligned_models(models, group.tensors), out);
    }
    detail::copy_through(policy, models, out);
    return report;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_BY_TENSOR_HPP

// ---- taskvec/methods/checkpoint_average.hpp
#if !defined(TASKVEC_SINGLE_METHODS_CHECKPOINT_AVERAGE_HPP)
#define TASKVEC_SINGLE_METHODS_CHECKPOINT_AVERAGE_HPP
// Averages over the checkpoints of one training run, in their order: uniform, exponential, or with the weights that
// stand for a decay of the learning rate. Tian et al., "WSM: decay-free learning rate schedule via checkpoint merging
// for LLM pre-training" (2025).
// SPDX-License-Identifier: Apache-2.0


#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How checkpoints are weighed: all the same; each by a factor more than the one before it; or as a decay of the
/// learning rate would have weighed the updates between them.
enum class checkpoint_schedule : std::uint8_t { uniform, ema, wsm };
/// A decay d from d(0) = 1 to d(1) = 0: 1 − x, 1 − √x, (1 + cos πx) / 2.
enum class decay_shape : std::uint8_t { linear, one_minus_sqrt, cosine };

template <>
struct enum_words<checkpoint_schedule> {
    static constexpr std::array words{enum_word<checkpoint_schedule>{checkpoint_schedule::uniform, "uniform"},
        enum_word<checkpoint_schedule>{checkpoint_schedule::ema, "ema"},
        enum_word<checkpoint_schedule>{checkpoint_schedule::wsm, "wsm"}};
};
template <>
struct enum_words<decay_shape> {
    static constexpr std::array words{enum_word<decay_shape>{decay_shape::linear, "linear"},
        enum_word<decay_shape>{decay_shape::one_minus_sqrt, "one-minus-sqrt"},
        enum_word<decay_shape>{decay_shape::cosine, "cosine"}};
};

/// θ* = Σ ct·θt over N checkpoints in the order of the tasks, the oldest first:
///   - uniform: ct = 1 / N;
///   - ema: ct ∝ decay^(N − 1 − t), an exponential moving average without the bias towards its first value;
///   - wsm: ct = d(t / N) − d((t + 1) / N), for which θ* is where the update from checkpoint t − 1 to t, times
///     d(t / N), for every t, would have led from the first checkpoint: training at a constant rate, then merged, for
///     training with that decay. The linear one is the uniform average.
///
/// This is the weighted average with these weights (average_options), bit for bit. Needs no base.
///
///     merge(cpu{}, checkpoint_average_options{.schedule = checkpoint_schedule::wsm}, checkpoints, out);
struct checkpoint_average_options {
    checkpoint_schedule schedule = checkpoint_schedule::uniform;
    double decay = 0.9; ///< of ema: what a checkpoint weighs against the next one
    decay_shape shape = decay_shape::one_minus_sqrt; ///< of wsm
};

template <>
struct options_of<checkpoint_average_options> {
    static constexpr option_table table{option_row("schedule", &checkpoint_average_options::schedule,
                                            "how checkpoints are weighed, the oldest first", {.unit = "HOW"}),
        option_row("decay", &checkpoint_average_options::decay,
            "what a checkpoint weighs against the next one under ema",
            {.above = 0, .at_most = 1, .expected = "a factor above 0 and up to 1, such as 0.9"}),
        option_row("decay-shape", &checkpoint_average_options::shape,
            "the decay of the learning rate that wsm stands for", {.unit = "SHAPE"})};
};

namespace detail {

/// What is left of the learning rate at x, the part of the decay that is over.
[[nodiscard]] inline double decayed(decay_shape shape, double x)
{
    switch (shape) {
    case decay_shape::linear: return 1 - x;
    case decay_shape::one_minus_sqrt: return 1 - std::sqrt(x);
    case decay_shape::cosine: break;
    }
    return (1 + std::cos(std::numbers::pi * x)) / 2;
}

/// checkpoint_weights(), as a list of the call.
[[nodiscard]] inline call_vector<double> weights_of_checkpoints(
    const checkpoint_average_options& options, std::size_t count)
{
    if (!(options.decay > 0 && options.decay <= 1)) {
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("decay is ", options.decay, "; expected a factor in (0, 1], such as 0.9"));
    }
    call_vector<double> weights;
    const double n = static_cast<double>(count);
    double sum = 0;
    for (std::size_t t = 0; t < count; ++t) {
        const double x = static_cast<double>(t);
        switch (options.schedule) {
        case checkpoint_schedule::uniform: weights.push_back(1); break;
        case checkpoint_schedule::ema: weights.push_back(std::pow(options.decay, n - 1 - x)); break;
        case checkpoint_schedule::wsm:
            weights.push_back(decayed(options.shape, x / n) - decayed(options.shape, (x + 1) / n));
            break;
        }
        sum += weights.back();
    }
    for (double& weight : weights) { weight /= sum; }
    return weights;
}

} // namespace detail

/// The weights of `count` checkpoints, the oldest first; their sum is 1 up to rounding. Errors: invalid_argument unless
/// 0 < decay ≤ 1.
///
///     const auto weights = checkpoint_weights({.schedule = checkpoint_schedule::ema, .decay = 0.5}, 3); // (1, 2, 4) /
///     7
[[nodiscard]] inline std::vector<double> checkpoint_weights(
    const checkpoint_average_options& options, std::size_t count)
{
    const auto weights = detail::weights_of_checkpoints(options, count);
    return {weights.begin(), weights.end()};
}

template <>
class method<checkpoint_average_options> : public method<average_options> {
public:
    template <class Passes>
    method(Passes& passes, const checkpoint_average_options& options)
        : method<average_options>(passes, detail::weights_of_checkpoints(options, passes.tasks()), true)
    { }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MODEL_MERGE(extern, checkpoint_average_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_CHECKPOINT_AVERAGE_HPP

// ---- taskvec/methods/combination.hpp
#if !defined(TASKVEC_SINGLE_METHODS_COMBINATION_HPP)
#define TASKVEC_SINGLE_METHODS_COMBINATION_HPP
// Linear combinations with factors of their own for every tensor, found from the dot products of its models: what
// NuSLERP, Multi-SLERP and the Karcher mean come to.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/vector_factors.hpp
#if !defined(TASKVEC_SINGLE_METHODS_VECTOR_FACTORS_HPP)
#define TASKVEC_SINGLE_METHODS_VECTOR_FACTORS_HPP
// Numbers for each row or column of a tensor, from the dot products that the tasks have there: what NuSLERP and Model
// Stock merge by.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which vectors of two models have an angle: whole tensors, their rows (along the last axis), or their columns (along
/// the first axis). A tensor with one axis is one vector, a scalar one of length 1.
enum class angles_between : std::uint8_t { tensors, rows, columns };

template <>
struct enum_words<angles_between> {
    static constexpr std::array words{enum_word<angles_between>{angles_between::tensors, "tensors"},
        enum_word<angles_between>{angles_between::rows, "rows"},
        enum_word<angles_between>{angles_between::columns, "columns"}};
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// sums[i] += x[i]·y[i], in f64.
template <arithmetic_element A>
struct column_products {
    const A *x, *y;
    double* sums;
    std::size_t size;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t i = 0;
        if constexpr (bytes > 0) { add<bytes>(i); }
        add<0>(i);
    }

private:
    template <int bytes>
    TASKVEC_INLINE void add(std::size_t& i) const
    {
        TASKVEC_STRICT_FP
        constexpr std::size_t width = static_cast<std::size_t>(pack_lanes<double, bytes>);
        for (; i + width <= size; i += width) {
            const auto products = load_wide<bytes>(x + i) * load_wide<bytes>(y + i);
            store_row<double>(load_row<double, bytes, double>(sums + i) + products, sums + i);
        }
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// Which vector of its tensor an entry belongs to.
struct vector_layout {
    std::uint64_t width = 1; ///< entries of a row, or how many columns there are
    bool columns = false;

    [[nodiscard]] TASKVEC_HOST_DEVICE std::uint64_t vector_of(std::uint64_t entry) const noexcept
    {
        return columns ? entry % width : entry / width;
    }
    /// How many vectors a tensor of so many entries has.
    [[nodiscard]] std::uint64_t count(std::uint64_t size) const noexcept
    {
        return size == 0 ? 0 : columns ? width : size / width;
    }
};

[[nodiscard]] inline vector_layout layout_of(const aligned_tensor& tensor, angles_between which)
{
    if (which != angles_between::columns || tensor.shape.size() < 2 || tensor.size == 0) {
        return {row_length(tensor), false};
    }
    return {tensor.size / static_cast<std::uint64_t>(tensor.shape.front()), true};
}

/// The dot product of two parts of rows that begin at entry `first` of their tensor: sums of what lies between
/// multiples of block_size, added in order. So it has the same bits where a tensor comes in pieces.
template <arithmetic_element A>
[[nodiscard]] double row_dot(const A* x, const A* y, std::uint64_t first, std::size_t size)
{
    double total = 0;
    for (std::size_t at = 0; at < size;) {
        const std::size_t n = std::min(size - at, block_size - static_cast<std::size_t>((first + at) % block_size));
        total += kernels::dot(x + at, y + at, n);
        at += n;
    }
    return total;
}

/// What a body merges by: numbers that lie beside the models, and on devices in a table.
template <arithmetic_element A>
struct factors_of_vectors {
    static constexpr bool reads_beside = true;
    const A* table; ///< null on the CPU
    vector_layout layout;
    std::size_t factors; ///< of each vector

    /// What in.beside(f) is on devices.
    [[nodiscard]] TASKVEC_HOST_DEVICE A number(std::size_t f, std::uint64_t entry) const noexcept
    {
        return table[layout.vector_of(entry) * factors + f];
    }
};

/// `factors` numbers for each vector: rule(dots, numbers) makes them from dots[i(i+1)/2 + j], the dot product of tasks
/// i and j ≤ i (of task vectors, where there is a base). On the CPU those of rows are made when their piece is merged,
/// and those of columns before, by a read of the models; on devices all are.
template <class Rule>
class vector_factors {
public:
    template <class Passes>
    vector_factors(Passes& passes, angles_between which, std::size_t factors, const Rule& rule)
        : models_(&passes.models())
        , tasks_(passes.tasks())
        , factors_(factors)
        , rule_(rule)
        , pieces_(passes.models(), [which](const aligned_tensor& tensor) { return together(tensor, which); })
        , table_(memory_for(passes))
    {
        if (which == angles_between::tensors) { return; }
        for (const auto& tensor : models_->tensors()) { layouts_.push_back(layout_of(tensor, which)); }
        prepare(passes);
    }
    /// Whether there are factors of rows or columns.
    [[nodiscard]] bool any() const noexcept { return !layouts_.empty(); }
    [[nodiscard]] unsigned walks() const noexcept { return first_.empty() ? 0 : 1; }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return pieces_; }
    /// How many there are for each vector.
    [[nodiscard]] std::size_t factors() const noexcept { return factors_; }
    /// Those of a piece's entries: out[f·size …] is factor f of each.
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* out, piece_memory& memory) const
    {
        const vector_layout& layout = layouts_[piece.tensor];
        const std::size_t size = piece.size, width = static_cast<std::size_t>(layout.width);
        if (layout.columns) {
            const double* const table = table_.data() + first_[piece.tensor] * factors_;
            for (std::size_t f = 0; f < factors_; ++f) {
                auto column = static_cast<std::size_t>(layout.vector_of(piece.offset));
                for (std::size_t i = 0; i < size; ++i) {
                    out[f * size + i] = static_cast<A>(table[column * factors_ + f]);
                    column = column + 1 == width ? 0 : column + 1;
                }
            }
            return;
        }
        A* const deltas = memory.rows<A>(tasks_, size);
        read_deltas(rows, piece, deltas);
        call_vector<double> dots(pair_count()), factors(factors_);
        for (std::size_t at = 0; at < size; at += width) {
            std::size_t pair = 0;
            for (std::size_t i = 0; i < tasks_; ++i) {
                for (std::size_t j = 0; j <= i; ++j) {
                    dots[pair++] = row_dot(deltas + i * size + at, deltas + j * size + at, piece.offset + at, width);
                }
            }
            rule_(dots.data(), factors.data());
            for (std::size_t f = 0; f < factors_; ++f) {
                std::fill_n(out + f * size + at, width, static_cast<A>(factors[f]));
            }
        }
    }
    /// What a body of a tensor is made of.
    template <arithmetic_element A>
    [[nodiscard]] factors_of_vectors<A> get(std::size_t tensor) const noexcept
    {
        return {table_on_device<A>(tensor), layouts_[tensor], factors_};
    }

private:
    template <arithmetic_element A>
    [[nodiscard]] const A* table_on_device(std::size_t tensor) const noexcept
    {
        return kept_ ? kept_->get<A>() + first_[tensor] * factors_ : nullptr;
    }
    static constexpr std::size_t strip_width = 1024; ///< columns that are summed at a time

    /// Some columns of a tensor.
    struct strip {
        std::size_t tensor, first, count;
    };

    template <class Passes>
    [[nodiscard]] static std::pmr::memory_resource* memory_for(const Passes& passes)
    {
        if constexpr (Passes::space == memory_space::device) { return std::pmr::get_default_resource(); }
        else {
            return memory_of(passes.policy());
        }
    }
    /// How many entries a piece may not part.
    [[nodiscard]] static std::size_t together(const aligned_tensor& tensor, angles_between which)
    {
        const vector_layout layout = layout_of(tensor, which);
        return which == angles_between::tensors || layout.columns ? 1 : static_cast<std::size_t>(layout.width);
    }
    [[nodiscard]] std::size_t pair_count() const noexcept { return tasks_ * (tasks_ + 1) / 2; }

    /// Where the vectors of each tensor begin in the table, of those that `counts` says yes to.
    template <class Counts>
    std::size_t number_vectors(const Counts& counts)
    {
        std::uint64_t next = 0;
        for (std::size_t i = 0; i < layouts_.size(); ++i) {
            first_.push_back(next);
            next += counts(layouts_[i]) ? layouts_[i].count(models_->tensors()[i].size) : 0;
        }
        return static_cast<std::size_t>(next);
    }

    template <class Passes>
    void prepare(Passes& passes)
    {
        if constexpr (Passes::space == memory_space::device) {
            const std::size_t vectors = number_vectors([](const vector_layout&) { return true; });
            const auto dots = vector_dots(passes.walked(), layouts_, first_, vectors);
            call_vector<double> factors(vectors * factors_);
            for (std::size_t v = 0; v < vectors; ++v) {
                rule_(dots.data() + v * pair_count(), factors.data() + v * factors_);
            }
            kept_.emplace(passes, factors);
        }
        else {
            const auto columns = [](const vector_layout& layout) { return layout.columns; };
            if (std::none_of(layouts_.begin(), layouts_.end(), columns)) { return; }
            table_.resize(number_vectors(columns) * factors_);
            sum_columns<storage_of<Passes>>(passes.policy());
        }
    }

    /// Fills the table: a column's dot products are sums in order.
    template <class Types>
    void sum_columns(const cpu& policy)
    {
        call_vector<strip> strips;
        std::uint64_t bytes = 0;
        for (std::size_t i = 0; i < layouts_.size(); ++i) {
            if (!layouts_[i].columns) { continue; }
            const auto width = static_cast<std::size_t>(layouts_[i].width);
            for (std::size_t at = 0; at < width; at += strip_width) {
                strips.push_back({i, at, std::min(strip_width, width - at)});
            }
            bytes += models_->tensors()[i].bytes(models_->tensors()[i].size);
        }
        auto workspaces = make_workspaces<Types>(policy, *models_, strips.size(), 0);
        progress_meter meter(policy, "angles", bytes);
        for_each_index(policy, strips.size(), [&](std::size_t index, std::size_t worker) {
            const strip& part = strips[index];
            const aligned_tensor& tensor = models_->tensors()[part.tensor];
            with_block_of<Types>(
                workspaces[worker], tensor, [&](auto& rows) { sum_strip(rows, part, memory_of(policy)); });
            const std::size_t of_each = tensor.size / static_cast<std::size_t>(layouts_[part.tensor].width);
            if (!meter.advance(tensor.bytes(part.count * of_each))) { raise<cancelled>(error_code::cancelled); }
        });
    }
    template <arithmetic_element A>
    void sum_strip(row_block<A>& rows, const strip& part, std::pmr::memory_resource* memory)
    {
        const aligned_tensor& tensor = models_->tensors()[part.tensor];
        const auto width = static_cast<std::size_t>(layouts_[part.tensor].width);
        const std::size_t height = tensor.size / width;
        const std::size_t at_once = part.count == width ? std::max<std::size_t>(block_size / width, 1) : 1;
        std::pmr::vector<double> sums(pair_count() * part.count, memory);
        call_vector<const A*> deltas(tasks_);
        for (std::size_t row = 0; row < height; row += at_once) {
            const std::size_t n = std::min(at_once, height - row);
            rows.open(tensor, row * width + part.first, n * part.count);
            for (std::size_t t = 0; t < tasks_; ++t) { deltas[t] = rows.delta(t); }
            double* to = sums.data();
            for (std::size_t i = 0; i < tasks_; ++i) {
                for (std::size_t j = 0; j <= i; ++j, to += part.count) {
                    for (std::size_t k = 0; k < n; ++k) {
                        kernels::run_widest(kernels::column_products<A>{
                            deltas[i] + k * part.count, deltas[j] + k * part.count, to, part.count});
                    }
                }
            }
            rows.check_finite();
        }
        call_vector<double> dots(pair_count());
        for (std::size_t c = 0; c < part.count; ++c) {
            for (std::size_t pair = 0; pair < dots.size(); ++pair) { dots[pair] = sums[pair * part.count + c]; }
            rule_(dots.data(), table_.data() + (first_[part.tensor] + part.first + c) * factors_);
        }
    }

    const aligned_models* models_;
    std::size_t tasks_, factors_;
    Rule rule_;
    row_pieces pieces_;
    call_vector<vector_layout> layouts_; // of each tensor; empty where tensors are whole vectors
    call_vector<std::uint64_t> first_; // vector of each tensor in the table
    std::pmr::vector<double> table_; // [vector][factor] of columns, on the CPU
    std::optional<kept_numbers> kept_; // of all vectors, on devices
};

/// A method whose factors are those of whole tensors, as Method's are, or those that Rule makes of rows or columns.
template <class Method, class Rule>
class method_by_vectors : public Method {
public:
    [[nodiscard]] unsigned walks() const noexcept { return by_vector_.any() ? by_vector_.walks() : 1; }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return by_vector_.pieces(); }
    [[nodiscard]] std::size_t row_numbers() const noexcept { return by_vector_.any() ? by_vector_.factors() : 0; }
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* numbers, piece_memory& memory) const
    {
        if (by_vector_.any()) { by_vector_.weigh(rows, piece, numbers, memory); }
    }

protected:
    /// `factors` of each vector; `of_method` goes to Method's constructor.
    template <class Passes, class... OfMethod>
    method_by_vectors(
        Passes& passes, angles_between angles, std::size_t factors, const Rule& rule, OfMethod&&... of_method)
        : Method(std::forward<OfMethod>(of_method)...)
        , by_vector_(passes, angles, factors, rule)
    { }
    [[nodiscard]] const vector_factors<Rule>& by_vector() const noexcept { return by_vector_; }

private:
    vector_factors<Rule> by_vector_;
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_VECTOR_FACTORS_HPP

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

namespace kernels {

/// Σ factor(t)·θt, or θ0 + Σ factor(t)·τt: +0 first, then in task order; every product and sum rounds.
template <class In, class Factor>
[[nodiscard]] TASKVEC_INLINE typename In::pack combined(In& in, bool on_base, const Factor& factor)
{
    if (on_base) {
        const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return factor(t) * in.delta(t); });
        in.watch(sum);
        return in.base() + sum;
    }
    const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return factor(t) * in.task(t); });
    in.watch(sum);
    return sum;
}

} // namespace kernels

/// Σ weights[t]·θt, or θ0 + Σ weights[t]·τt.
template <arithmetic_element A>
struct combination_body {
    static constexpr bool watches = true;
    const A* weights; ///< of each task
    bool on_base; ///< of τt on θ0, and not of θt

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        return kernels::combined(in, on_base, [&](std::size_t t) TASKVEC_BODY { return weights[t]; });
    }
};

/// The same with weights that rows or columns of a tensor have of their own.
template <arithmetic_element A>
struct vector_combination_body : detail::factors_of_vectors<A> {
    static constexpr bool watches = true;
    bool on_base; ///< of τt on θ0, and not of θt

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        return kernels::combined(in, on_base, [&](std::size_t t) TASKVEC_BODY { return in.beside(t); });
    }
};

namespace detail {

/// All dot products of the vectors of one tensor.
class gram_matrix {
public:
    /// From the dots of i and j ≤ i, in that order.
    gram_matrix(std::size_t count, call_vector<double> dots)
        : count_(count)
        , dots_(std::move(dots))
    { }
    [[nodiscard]] std::size_t count() const noexcept { return count_; }
    [[nodiscard]] double operator()(std::size_t i, std::size_t j) const noexcept
    {
        return i < j ? dots_[j * (j + 1) / 2 + i] : dots_[i * (i + 1) / 2 + j];
    }
    [[nodiscard]] double norm(std::size_t i) const noexcept { return std::sqrt((*this)(i, i)); }
    /// The dot product of vector i with Σ factors[j]·(vector j).
    [[nodiscard]] double dot(std::size_t i, std::span<const double> factors) const noexcept
    {
        double sum = 0;
        for (std::size_t j = 0; j < count_; ++j) { sum += factors[j] * (*this)(i, j); }
        return sum;
    }
    /// ‖Σ factors[j]·(vector j)‖.
    [[nodiscard]] double norm(std::span<const double> factors) const noexcept
    {
        double sum = 0;
        for (std::size_t i = 0; i < count_; ++i) { sum += factors[i] * dot(i, factors); }
        return std::sqrt(sum > 0 ? sum : 0.0); // below 0 lies rounding
    }

private:
    std::size_t count_;
    call_vector<double> dots_;
};

/// The dot products of the tasks of every tensor, or, on a base, of their task vectors. One read of the models.
template <class Passes>
[[nodiscard]] call_vector<gram_matrix> gram_matrices(Passes& passes, bool on_base, std::string_view phase)
{
    const auto tasks = static_cast<std::uint32_t>(passes.tasks());
    call_vector<operand_pair> pairs;
    for (std::uint32_t i = 0; i < tasks; ++i) {
        for (std::uint32_t j = 0; j <= i; ++j) { pairs.push_back({1 + i, 1 + j}); }
    }
    call_vector<gram_matrix> matrices;
    for (auto& sums : tensor_dots(passes, pairs, on_base, phase)) { matrices.emplace_back(tasks, std::move(sums)); }
    return matrices;
}

} // namespace detail

/// A method that combines the models of every tensor by factors of its own, which come from their dot products: derive
/// from it, and say in the constructor what the factors of a tensor are. Needs no base. Cost: two reads of the models.
class combination_method : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    /// Dot products are those of a tensor.
    template <class Options>
    [[nodiscard]] static bool tensor_by_tensor(const Options&) noexcept
    {
        return true;
    }
    template <arithmetic_element A>
    [[nodiscard]] combination_body<A> body(std::size_t tensor) const
    {
        return {factors_.get<A>() + tensor * tasks_, on_base_};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; }

protected:
    /// factors_of(dots, tensor) gives one factor for each task. Not `whole`: the models are not read, and there is no
    /// body.
    template <class Passes, class Rule>
    combination_method(Passes& passes, bool on_base, const Rule& factors_of, bool whole = true)
        : factors_(passes, whole ? all_factors(passes, on_base, factors_of) : call_vector<double>())
        , tasks_(passes.tasks())
        , on_base_(on_base)
    { }
    /// Whether task vectors are combined on a base, and not tasks.
    [[nodiscard]] bool on_base() const noexcept { return on_base_; }

private:
    template <class Passes, class Rule>
    [[nodiscard]] static call_vector<double> all_factors(Passes& passes, bool on_base, const Rule& factors_of)
    {
        call_vector<double> all;
        std::size_t tensor = 0;
        for (const auto& dots : detail::gram_matrices(passes, on_base, "angles")) {
            const auto factors = factors_of(dots, tensor++);
            all.insert(all.end(), factors.begin(), factors.end());
        }
        return all;
    }

    kept_numbers factors_;
    std::size_t tasks_;
    bool on_base_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_COMBINATION_HPP

// ---- taskvec/methods/dare.hpp
#if !defined(TASKVEC_SINGLE_METHODS_DARE_HPP)
#define TASKVEC_SINGLE_METHODS_DARE_HPP
// DARE: drop entries at random and rescale the rest. Yu et al., "Language models are super Mario" (ICML 2024).
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/keep/random.hpp
#if !defined(TASKVEC_SINGLE_METHODS_KEEP_RANDOM_HPP)
#define TASKVEC_SINGLE_METHODS_KEEP_RANDOM_HPP
// Keeping entries at random, and dividing them by the density: the drop and rescale of DARE.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <cstdint>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// The rule of one tensor: entry i of task t is kept, divided by a number, where its word is below `bound`.
template <arithmetic_element A>
struct keep_random_of_tensor {
    static constexpr bool sees_all =
        false; ///< NaN and infinity may be dropped: the walk looks for them in what it reads.
    std::uint64_t key; ///< of random_stream
    const std::uint64_t* bounds; ///< of each task, at most 2³²: everything
    const A* divisors; ///< of each task
    bool draws; ///< whether any task's bound asks for draws

    /// x divided by the task's number where it is kept, 0 where not.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        const std::uint64_t bound = bounds[t];
        if (bound == 0) { return typename In::pack{}; }
        if (bound >> 32 != 0) { return x; } // x / 1 is x
        const auto last = static_cast<signed_word<A>>(static_cast<std::int64_t>(bound) - (std::int64_t{1} << 31));
        return where(in.draws(t) < filled_words<typename In::words>(last), x / divisors[t]);
    }
    /// Whether a body has to draw at all.
    [[nodiscard]] TASKVEC_INLINE bool drawing() const noexcept { return draws; }
    /// The random numbers of task t.
    [[nodiscard]] TASKVEC_HOST_DEVICE random_stream stream(std::size_t t) const noexcept
    {
        return {key, static_cast<std::uint32_t>(t)};
    }
};

/// Keeps each entry with probability `density` (of its task), by draws of (seed, task, tensor name, element index)
/// alone, and divides it by the density unless it is to stay as it is. Errors: invalid_argument unless 0 < density ≤ 1.
class keep_random {
public:
    /// `divided`: what is kept is divided by its density.
    template <class Passes>
    keep_random(Passes& passes, const task_shares& density, std::uint64_t seed, bool divided = true)
        : divisors_(passes, divisors_of(passes.tasks(), density, divided))
    {
        call_vector<std::uint64_t> bounds;
        for (std::size_t t = 0; t < passes.tasks(); ++t) {
            bounds.push_back(keep_below(density.of(t)));
            draws_ = draws_ || (bounds.back() != 0 && bounds.back() >> 32 == 0);
        }
        bounds_ = passes.keep(std::move(bounds));
        for (const auto& tensor : passes.models().tensors()) { keys_.push_back(hash64(tensor.name, seed)); }
    }
    /// The rule of a tensor, in the arithmetic type A.
    template <arithmetic_element A>
    [[nodiscard]] keep_random_of_tensor<A> get(std::size_t tensor) const noexcept
    {
        return {keys_[tensor], bounds_, divisors_.get<A>(), draws_};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    [[nodiscard]] static double checked(double density)
    {
        if (!(density > 0.0 && density <= 1.0)) {
            raise<invalid_argument>(error_code::density_out_of_range,
                message("density is ", density, "; expected a share in (0, 1], such as 0.5"));
        }
        return density;
    }

    [[nodiscard]] static call_vector<double> divisors_of(std::size_t tasks, const task_shares& density, bool divided)
    {
        call_vector<double> divisors;
        for (std::size_t t = 0; t < tasks; ++t) {
            const double share = checked(density.of(t));
            divisors.push_back(divided ? share : 1.0);
        }
        return divisors;
    }

    kept_numbers divisors_;
    const std::uint64_t* bounds_ = nullptr;
    bool draws_ = false;
    call_vector<std::uint64_t> keys_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_KEEP_RANDOM_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What makes up for dropped entries: division by the density; the factor that gives what is kept of a task vector its
/// L1 norm back, tensor by tensor (mergekit's: a read of the models more, on the CPU only); or nothing.
enum class drop_rescale : std::uint8_t { density, l1, none };

template <>
struct enum_words<drop_rescale> {
    static constexpr std::array words{enum_word<drop_rescale>{drop_rescale::density, "density"},
        enum_word<drop_rescale>{drop_rescale::l1, "l1"}, enum_word<drop_rescale>{drop_rescale::none, "none"}};
};

/// Task arithmetic over task vectors of which each entry is kept with probability `density` and divided by `density`.
/// The draw of an entry is random_stream(seed, task, tensor name).word(flat index) < keep_below(density): a function of
/// these alone, so results do not depend on threads, blocks or the other tensors. Bit-exact. With `normalize` the sum
/// is divided by Σ wt, which may not be 0. With `densities` each task has its own.
///
///     merge(cpu{}, dare_options{.density = 0.5, .seed = 7}, base, tasks, out);
struct dare_options {
    double density = 0.5;
    std::uint64_t seed = 0;
    double lambda = 1.0;
    std::vector<double> weights{};
    drop_rescale rescale = drop_rescale::density;
    bool normalize = false; ///< divide by the sum of the weights
    std::vector<double> densities{}; ///< of each task, or none for `density` of all

    /// What mergekit's dare_linear does, up to its random numbers.
    [[nodiscard]] static dare_options as_in_mergekit()
    {
        dare_options options;
        options.rescale = drop_rescale::l1;
        return options;
    }
};

/// DARE, then TIES without its trim: election and disjoint merge over what was kept. `ties.density`, `ties.densities`
/// and `ties.rescale` are not used.
///
///     merge(cpu{}, dare_ties_options{.density = 0.5, .ties = {.lambda = 0.7}}, base, tasks, out);
struct dare_ties_options {
    double density = 0.5;
    std::uint64_t seed = 0;
    ties_options ties{}; ///< of election and merge
    drop_rescale rescale = drop_rescale::density;
    std::vector<double> densities{}; ///< of each task, or none for `density` of all

    /// What ties-merging does with what DARE keeps.
    [[nodiscard]] static dare_ties_options as_in_ties_merging()
    {
        dare_ties_options options;
        options.ties = ties_options::as_in_ties_merging();
        return options;
    }
    /// What mergekit's dare_ties does, up to its random numbers: what agrees is added up, not averaged.
    [[nodiscard]] static dare_ties_options as_in_mergekit()
    {
        dare_ties_options options;
        options.ties = ties_options::as_in_mergekit();
        options.ties.combine = disjoint_merge::sum;
        options.rescale = drop_rescale::l1;
        return options;
    }
    /// What PEFT's dare_ties does, up to its random numbers.
    [[nodiscard]] static dare_ties_options as_in_peft()
    {
        dare_ties_options options;
        options.ties = ties_options::as_in_peft();
        return options;
    }
};

template <>
struct options_of<dare_options> {
    static constexpr option_table table{
        option_row("density", &dare_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&dare_options::densities), option_row("seed", &dare_options::seed, "of random choices"),
        option_row("lambda", &dare_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&dare_options::weights),
        option_row("rescale-by", &dare_options::rescale, "what makes up for dropped entries", {.unit = "HOW"}),
        option_row("normalize-weights", &dare_options::normalize, "divide by the sum of the weights")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<dare_options>{"paper", "the paper", [] { return dare_options{}; }},
        option_preset<dare_options>{"mergekit", "mergekit", &dare_options::as_in_mergekit}};
};
template <>
struct options_of<dare_ties_options> {
    static constexpr option_table table{
        option_row("density", &dare_ties_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&dare_ties_options::densities), option_row("seed", &dare_ties_options::seed, "of random choices"),
        options_within(&dare_ties_options::ties, "density", "densities", "trim", "rescale"),
        option_row("rescale-by", &dare_ties_options::rescale, "what makes up for dropped entries", {.unit = "HOW"})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<dare_ties_options>{"paper", "the paper", [] { return dare_ties_options{}; }},
        option_preset<dare_ties_options>{
            "ties-merging", "the paper's own code", &dare_ties_options::as_in_ties_merging},
        option_preset<dare_ties_options>{"mergekit", "mergekit", &dare_ties_options::as_in_mergekit},
        option_preset<dare_ties_options>{"peft", "PEFT", &dare_ties_options::as_in_peft}};
};

namespace detail {
/// The options of an election whose kept entries are rescaled by their L1 norm, or are not.
[[nodiscard]] inline ties_options rescaled(ties_options options, bool rescale)
{
    options.rescale = rescale;
    return options;
}
} // namespace detail

template <>
class method<dare_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const dare_options& options)
        : keep_(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"), options.seed,
              options.rescale == drop_rescale::density)
        , sum_(passes, options, keep_, options.rescale == drop_rescale::l1)
    { }
    /// L1 norms are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const dare_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A, keep_random_of_tensor<A>> body(std::size_t tensor) const
    {
        return sum_.body<A>(keep_.get<A>(tensor), tensor);
    }
    [[nodiscard]] unsigned walks() const noexcept { return sum_.walks(); }

private:
    keep_random keep_;
    kept_sum sum_;
};

template <>
class method<dare_ties_options> : public sign_election_method<keep_random> {
public:
    template <class Passes>
    method(Passes& passes, const dare_ties_options& options)
        : sign_election_method(passes, detail::rescaled(options.ties, options.rescale == drop_rescale::l1), [&] {
            return keep_random(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
                options.seed, options.rescale == drop_rescale::density);
        })
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const dare_ties_options& options) noexcept
    {
        return options.ties.scope == scope::tensor;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, dare_options)
TASKVEC_COMPILED_MERGES(extern, dare_ties_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_DARE_HPP

// ---- taskvec/methods/della.hpp
#if !defined(TASKVEC_SINGLE_METHODS_DELLA_HPP)
#define TASKVEC_SINGLE_METHODS_DELLA_HPP
// DELLA: drop entries at random, small ones more often, rescale the rest and elect signs. Deep, Bhardwaj and Poria,
// "DELLA-Merging: reducing interference in model merging through magnitude-based sampling" (2024).
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/methods/keep/ranked.hpp
#if !defined(TASKVEC_SINGLE_METHODS_KEEP_RANKED_HPP)
#define TASKVEC_SINGLE_METHODS_KEEP_RANKED_HPP
// Keeping entries at random, larger ones more often: the MAGPRUNE of DELLA, by ranks within rows.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which entries are ranked among each other: those along the last axis (the rows of a matrix), or those along the
/// second one (mergekit's: another thing where there are three axes or more). A tensor with one axis is one row.
enum class rank_axis : std::uint8_t { last, second };

template <>
struct enum_words<rank_axis> {
    static constexpr std::array words{
        enum_word<rank_axis>{rank_axis::last, "last"}, enum_word<rank_axis>{rank_axis::second, "second"}};
};

/// The rule of one tensor: what an entry is divided by was worked out with its row; 0 where it is dropped.
template <arithmetic_element A>
struct keep_ranked_of_tensor {
    static constexpr bool sees_all =
        false; ///< NaN and infinity may be dropped: the walk looks for them in what it reads.
    static constexpr bool reads_beside = true;

    /// x divided by its own number where it is kept, 0 where not.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        const auto divisor = in.beside(t);
        return where(divisor != 0, x / divisor);
    }
};

namespace detail {

/// Ranks of magnitudes: 0 is the smallest. Among equals the lowest index counts as the largest.
template <arithmetic_element A>
class magnitude_ranks {
public:
    explicit magnitude_ranks(std::pmr::memory_resource* memory)
        : items_(memory)
        , other_(memory)
    { }

    /// Calls take(i, rank) for the entries x[0], x[stride], … x[(n − 1)·stride], in ascending rank.
    template <class Take>
    void rank(const A* x, std::size_t n, std::size_t stride, const Take& take)
    {
        items_.resize(n);
        for (std::size_t i = 0; i < n; ++i) { // a stable sort leaves equals as they are here: the last ones first
            const std::size_t from = n - 1 - i;
            items_[i] = {magnitude_bits(x[from * stride]), static_cast<std::uint32_t>(from)};
        }
        if (n < 256) {
            std::sort(items_.begin(), items_.end(),
                [](const item& a, const item& b) { return a.key != b.key ? a.key < b.key : a.index > b.index; });
        }
        else {
            sort_digits();
        }
        for (std::size_t rank = 0; rank < n; ++rank) { take(items_[rank].index, rank); }
    }

private:
    struct item {
        bits_type<A> key = 0;
        std::uint32_t index = 0;
    };
    static constexpr unsigned digit = 11;
    static constexpr std::size_t digits = (sizeof(A) * 8 - 1 + digit - 1) / digit; // the sign is none of the magnitude
    [[nodiscard]] static std::size_t digit_of(const item& one, std::size_t d) noexcept
    {
        return static_cast<std::size_t>(one.key >> (d * digit)) & ((std::size_t{1} << digit) - 1);
    }

    /// A radix sort, without the digits that are the same in all.
    void sort_digits()
    {
        other_.resize(items_.size());
        for (auto& one : counts_) { one.fill(0); }
        for (const item& one : items_) {
            for (std::size_t d = 0; d < digits; ++d) { ++counts_[d][digit_of(one, d)]; }
        }
        for (std::size_t d = 0; d < digits; ++d) {
            auto& places = counts_[d];
            if (places[digit_of(items_.front(), d)] == items_.size()) { continue; }
            std::uint32_t before = 0;
            for (auto& place : places) { before += std::exchange(place, before); }
            for (const item& one : items_) { other_[places[digit_of(one, d)]++] = one; }
            std::swap(items_, other_);
        }
    }

    std::pmr::vector<item> items_, other_;
    std::array<std::array<std::uint32_t, std::size_t{1} << digit>, digits> counts_;
};

} // namespace detail

/// In every row of n entries the entry of rank r by magnitude (0: the smallest; among equals the lowest index is the
/// largest) is kept with probability p = density − epsilon + 2·epsilon·r / (n − 1), by its draw of (seed, task, tensor
/// name, element index) as in keep_random, and divided by p unless it is to stay as it is. In a row of one entry p is
/// the density; a task with density 1 is kept whole. Errors: invalid_argument unless 0 < density ≤ 1, and unless
/// 0 ≤ epsilon with density ± epsilon within (0, 1). Cost: every row is sorted. On the CPU.
class keep_ranked {
public:
    /// `axis`: which entries make a row; `divided`: what is kept is divided by its probability.
    template <class Passes>
    keep_ranked(Passes& passes, const task_shares& density, const task_shares& epsilon, std::uint64_t seed,
        rank_axis axis, bool divided)
        : policy_(passes.policy())
        , models_(&passes.models())
        , axis_(axis)
        , divided_(divided)
        , pieces_(passes.models(), [axis](const aligned_tensor& tensor) { return group_of(tensor, axis).block(); })
    {
        for (std::size_t t = 0; t < passes.tasks(); ++t) {
            densities_.push_back(density.of(t));
            epsilons_.push_back(epsilon.of(t));
            check(densities_[t], epsilons_[t]);
        }
        for (const auto& tensor : passes.models().tensors()) { keys_.push_back(hash64(tensor.name, seed)); }
    }
    /// Refuses what the constructor refuses of a task.
    static void check(double density, double epsilon)
    {
        if (!(density > 0.0 && density <= 1.0)) {
            raise<invalid_argument>(error_code::density_out_of_range,
                message("density is ", density, "; expected a share in (0, 1], such as 0.5"));
        }
        const double room = std::min(density, 1 - density);
        if (density < 1 && !(epsilon >= 0 && density - epsilon > 0 && density + epsilon < 1)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("epsilon is ", epsilon, " and density ", density, "; expected an epsilon from 0 to below ",
                    room, ", for which density - epsilon and density + epsilon are within (0, 1)"));
        }
    }
    /// The rule of a tensor: the same for all, as what differs was worked out with the rows.
    template <arithmetic_element A>
    [[nodiscard]] keep_ranked_of_tensor<A> get(std::size_t) const noexcept
    {
        return {};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return pieces_; }

    /// What each entry of a piece is divided by, 0 where it is dropped: out[t·size …] for task t.
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* out, detail::piece_memory& scratch) const
    {
        std::pmr::memory_resource* const memory = memory_of(policy_);
        const std::size_t tasks = densities_.size(), size = piece.size;
        A* const deltas = scratch.rows<A>(tasks, size);
        detail::read_deltas(rows, piece, deltas);
        weigh(piece, deltas, out, memory);
    }

    /// Σ|τ| / Σ|kept τ| for every tensor and task, as l1_factors() says of other rules.
    template <class Types>
    [[nodiscard]] call_vector<call_vector<double>> l1_factors() const
    {
        const std::size_t tasks = densities_.size();
        std::pmr::memory_resource* const memory = memory_of(policy_);
        std::pmr::vector<double> leaves(2 * tasks * pieces_.size(), memory);
        detail::piece_walk<Types> walk(policy_, *models_, pieces_);
        detail::progress_meter meter(policy_, "norms", models_->bytes());
        walk.each({0, pieces_.size()}, meter,
            [&]<class A>(std::size_t index, std::size_t, row_block<A>& rows, const tensor_chunk& piece,
                detail::piece_memory& held) {
                A* const deltas = held.rows<A>(2 * tasks, piece.size);
                A* const out = deltas + tasks * piece.size;
                detail::read_deltas(rows, piece, deltas);
                weigh(piece, deltas, out, memory);
                for (std::size_t t = 0; t < tasks; ++t) {
                    double all = 0, kept = 0;
                    for (std::size_t i = t * piece.size; i < (t + 1) * piece.size; ++i) {
                        const double x = std::abs(static_cast<double>(deltas[i]));
                        all += x;
                        if (out[i] != 0) { kept += x / static_cast<double>(out[i]); }
                    }
                    leaves[2 * (index * tasks + t)] = all;
                    leaves[2 * (index * tasks + t) + 1] = kept;
                }
            });
        call_vector<call_vector<double>> factors;
        for (std::size_t i = 0; i < models_->tensors().size(); ++i) {
            factors.emplace_back();
            for (std::size_t t = 0; t < tasks; ++t) {
                detail::pairwise_sum all, kept;
                const auto range = pieces_.of_tensor(i);
                for (std::size_t index = range.first; index < range.last; ++index) {
                    all.add(leaves[2 * (index * tasks + t)]);
                    kept.add(leaves[2 * (index * tasks + t) + 1]);
                }
                const bool none = all.total() < 1e-7 || kept.total() < 1e-7;
                factors.back().push_back(none ? 1.0 : all.total() / kept.total());
            }
        }
        return factors;
    }

private:
    /// Groups that are ranked by themselves: `length` entries, `stride` apart; stride groups make a block.
    struct group {
        std::size_t length = 1, stride = 1;
        [[nodiscard]] std::size_t block() const noexcept { return length * stride; }
    };
    [[nodiscard]] static group group_of(const aligned_tensor& tensor, rank_axis axis)
    {
        const std::size_t axes = tensor.shape.size();
        if (axis == rank_axis::last || axes < 3 || tensor.size == 0) { return {row_length(tensor), 1}; }
        const auto rows = static_cast<std::size_t>(tensor.shape[0]), length = static_cast<std::size_t>(tensor.shape[1]);
        return {length, tensor.size / rows / length};
    }

    /// What an entry's word, less 2³¹, must be below to be kept, and what it is divided by.
    template <arithmetic_element A>
    struct chance {
        std::int64_t below = 0;
        A divisor = 0;
    };

    template <arithmetic_element A>
    void weigh(const tensor_chunk& piece, const A* deltas, A* out, std::pmr::memory_resource* memory) const
    {
        const std::size_t size = piece.size;
        const group rows = group_of(models_->tensors()[piece.tensor], axis_);
        detail::magnitude_ranks<A> ranks(memory);
        std::pmr::vector<std::int32_t> drawn(memory);
        std::pmr::vector<chance<A>> chances(rows.length, memory); // of every rank
        for (std::size_t t = 0; t < densities_.size(); ++t) {
            const A* const x = deltas + t * size;
            A* const numbers = out + t * size;
            if (densities_[t] == 1) {
                std::fill(numbers, numbers + size, A{1});
                continue;
            }
            for (std::size_t rank = 0; rank < rows.length; ++rank) {
                const double p = probability(t, rank, rows.length);
                chances[rank] = {static_cast<std::int64_t>(keep_below(p)) - (std::int64_t{1} << 31),
                    divided_ ? static_cast<A>(p) : A{1}};
            }
            const std::int32_t* const words =
                draw(random_stream(keys_[piece.tensor], static_cast<std::uint32_t>(t)), piece, drawn);
            for (std::size_t begin = 0; begin < size; begin += rows.block()) {
                for (std::size_t lane = 0; lane < rows.stride; ++lane) {
                    const std::size_t at = begin + lane;
                    ranks.rank(x + at, rows.length, rows.stride, [&](std::size_t i, std::size_t rank) {
                        const std::size_t place = at + i * rows.stride;
                        const chance<A>& its = chances[rank];
                        numbers[place] = words[place] < its.below ? its.divisor : A{0};
                    });
                }
            }
        }
    }
    /// The random words of a piece's entries, less 2³¹; they lie in `room`.
    [[nodiscard]] static const std::int32_t* draw(
        const random_stream& stream, const tensor_chunk& piece, std::pmr::vector<std::int32_t>& room)
    {
        const std::uint64_t first = piece.offset / 4, last = (piece.offset + piece.size + 3) / 4;
        room.resize(4 * (last - first));
        random_words<word_order::in_sequence>(stream, first, last - first, room.data());
        return room.data() + piece.offset % 4;
    }
    [[nodiscard]] double probability(std::size_t t, std::size_t rank, std::size_t n) const noexcept
    {
        if (n == 1) { return densities_[t]; }
        return densities_[t] - epsilons_[t] + 2 * epsilons_[t] * static_cast<double>(rank) / static_cast<double>(n - 1);
    }

    const cpu& policy_;
    const aligned_models* models_;
    rank_axis axis_;
    bool divided_;
    row_pieces pieces_;
    call_vector<double> densities_, epsilons_;
    call_vector<std::uint64_t> keys_;
};

/// The same of ranked entries, which are looked at in whole rows.
template <class Passes>
[[nodiscard]] call_vector<call_vector<double>> l1_factors(Passes&, const keep_ranked& keep)
{
    return keep.l1_factors<storage_of<Passes>>();
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_KEEP_RANKED_HPP

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Task arithmetic over task vectors of which each entry is kept with a probability that grows with the rank r of its
/// magnitude among the n entries of its row, p = density − epsilon + 2·epsilon·r / (n − 1), and divided by p (MAGPRUNE,
/// as in the authors' code). Draws are those of DARE, functions of (seed, task, tensor, index) alone; with epsilon 0
/// this is DARE, bit for bit. Equal magnitudes: the lowest index ranks highest. Rows of one entry have p = density, as
/// have scalars; density 1 keeps all, whatever epsilon is. With `rescale` l1 what is kept of a task vector gets its L1
/// norm back in place of the division. With `normalize` the sum is divided by Σ wt. With `densities` and `epsilons`
/// each task has its own. Bit-exact for any threads and blocks. Errors: invalid_argument unless density ± epsilon is
/// within (0, 1). Cost: one read of the models, one more for L1 norms, and a sort of every row; memory for each thread:
/// 65,536 entries or one row, 2·T numbers each. On the CPU.
///
///     merge(cpu{}, della_linear_options{.density = 0.5, .epsilon = 0.15, .seed = 7}, base, tasks, out);
struct della_linear_options {
    double density = 0.5;
    double epsilon = 0.15;
    std::uint64_t seed = 0;
    double lambda = 1.0;
    std::vector<double> weights{};
    drop_rescale rescale = drop_rescale::density; ///< density: by each entry's own probability
    bool normalize = false; ///< divide by the sum of the weights
    rank_axis axis = rank_axis::last;
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    std::vector<double> epsilons{}; ///< of each task, or none for `epsilon` of all

    /// What mergekit's della_linear does, up to its random numbers.
    [[nodiscard]] static della_linear_options as_in_mergekit()
    {
        della_linear_options options;
        options.rescale = drop_rescale::l1;
        options.axis = rank_axis::second;
        return options;
    }
};

/// The same drop, then TIES without its trim: election and disjoint merge over what was kept. `ties.density`,
/// `ties.densities` and `ties.rescale` are not used.
///
///     merge(cpu{}, della_options{.density = 0.4, .epsilon = 0.1, .ties = {.lambda = 1.1}}, base, tasks, out);
struct della_options {
    double density = 0.5;
    double epsilon = 0.15;
    std::uint64_t seed = 0;
    ties_options ties{}; ///< of election and merge
    drop_rescale rescale = drop_rescale::density; ///< density: by each entry's own probability
    rank_axis axis = rank_axis::last;
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    std::vector<double> epsilons{}; ///< of each task, or none for `epsilon` of all

    /// What mergekit's della does, up to its random numbers.
    [[nodiscard]] static della_options as_in_mergekit()
    {
        della_options options;
        options.ties = ties_options::as_in_mergekit();
        options.rescale = drop_rescale::l1;
        options.axis = rank_axis::second;
        return options;
    }
};

template <>
struct options_of<della_linear_options> {
    static constexpr option_table table{
        option_row("density", &della_linear_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&della_linear_options::densities),
        option_row("epsilon", &della_linear_options::epsilon,
            "how far the keep probabilities of a row's smallest and largest entry are from the density",
            {.unit = "X", .at_least = 0}),
        epsilons_row(&della_linear_options::epsilons),
        option_row("seed", &della_linear_options::seed, "of random choices"),
        option_row("lambda", &della_linear_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&della_linear_options::weights),
        option_row("rescale-by", &della_linear_options::rescale, "what makes up for dropped entries", {.unit = "HOW"}),
        option_row("normalize-weights", &della_linear_options::normalize, "divide by the sum of the weights"),
        option_row("rank-axis", &della_linear_options::axis, "along which axis entries are ranked among each other",
            {.unit = "AXIS"})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<della_linear_options>{"paper", "the paper", [] { return della_linear_options{}; }},
        option_preset<della_linear_options>{"mergekit", "mergekit", &della_linear_options::as_in_mergekit}};
};
template <>
struct options_of<della_options> {
    static constexpr option_table table{
        option_row("density", &della_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&della_options::densities),
        option_row("epsilon", &della_options::epsilon,
            "how far the keep probabilities of a row's smallest and largest entry are from the density",
            {.unit = "X", .at_least = 0}),
        epsilons_row(&della_options::epsilons), option_row("seed", &della_options::seed, "of random choices"),
        options_within(&della_options::ties, "density", "densities", "trim", "rescale"),
        option_row("rescale-by", &della_options::rescale, "what makes up for dropped entries", {.unit = "HOW"}),
        option_row("rank-axis", &della_options::axis, "along which axis entries are ranked among each other",
            {.unit = "AXIS"})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<della_options>{"paper", "the paper", [] { return della_options{}; }},
        option_preset<della_options>{"mergekit", "mergekit", &della_options::as_in_mergekit}};
};

namespace detail {
/// The keep rule of either struct.
template <class Passes, class Options>
[[nodiscard]] keep_ranked ranked_of(Passes& passes, const Options& options)
{
    return {passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
        task_shares(options.epsilon, options.epsilons, passes.tasks(), "epsilons"), options.seed, options.axis,
        options.rescale == drop_rescale::density};
}
} // namespace detail

template <>
class method<della_linear_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;
    static constexpr bool on_device = false; // rows are sorted on the CPU

    template <class Passes>
    method(Passes& passes, const della_linear_options& options)
        : tasks_(passes.tasks())
        , keep_(detail::ranked_of(passes, options))
        , sum_(passes, options, keep_, options.rescale == drop_rescale::l1)
    { }
    /// Rows and L1 norms are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const della_linear_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A, keep_ranked_of_tensor<A>> body(std::size_t tensor) const
    {
        return sum_.body<A>(keep_.get<A>(tensor), tensor);
    }
    [[nodiscard]] unsigned walks() const noexcept { return sum_.walks(); }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return keep_.pieces(); }
    [[nodiscard]] std::size_t row_numbers() const noexcept { return tasks_; }
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* numbers, detail::piece_memory& memory) const
    {
        keep_.weigh(rows, piece, numbers, memory);
    }

private:
    std::size_t tasks_;
    keep_ranked keep_;
    kept_sum sum_;
};

template <>
class method<della_options> : public sign_election_method<keep_ranked> {
public:
    static constexpr bool on_device = false; // rows are sorted on the CPU

    template <class Passes>
    method(Passes& passes, const della_options& options)
        : sign_election_method(passes, detail::rescaled(options.ties, options.rescale == drop_rescale::l1),
              [&] { return detail::ranked_of(passes, options); })
        , tasks_(passes.tasks())
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const della_options& options) noexcept
    {
        return options.ties.scope == scope::tensor;
    }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return keep().pieces(); }
    [[nodiscard]] std::size_t row_numbers() const noexcept { return tasks_; }
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* numbers, detail::piece_memory& memory) const
    {
        keep().weigh(rows, piece, numbers, memory);
    }

private:
    std::size_t tasks_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MODEL_MERGE(extern, della_linear_options)
TASKVEC_COMPILED_MODEL_MERGE(extern, della_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_DELLA_HPP

// ---- taskvec/methods/fisher.hpp
#if !defined(TASKVEC_SINGLE_METHODS_FISHER_HPP)
#define TASKVEC_SINGLE_METHODS_FISHER_HPP
// Fisher merging: Matena and Raffel, "Merging models with Fisher-weighted averaging" (NeurIPS 2022).
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/statistics/aligned_fishers.hpp
#if !defined(TASKVEC_SINGLE_STATISTICS_ALIGNED_FISHERS_HPP)
#define TASKVEC_SINGLE_STATISTICS_ALIGNED_FISHERS_HPP
// The diagonal Fishers of tasks lined up with the models that they belong to, and checked.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// What messages call the Fisher of a task.
[[nodiscard]] inline std::string fishers_label(
    const std::vector<std::string>& labels, std::size_t t, const aligned_models& models)
{
    return labels.empty() ? "the Fisher of " + models.label(t) : labels[t];
}

/// The diagonal Fishers of tasks lined up with the models that they belong to. Checked: that each included tensor has
/// one of its shape for every task, and no other tensor, and that it can be read in memory space `space`.
class aligned_fishers {
public:
    aligned_fishers(const aligned_models& models, std::span<const const_model_ref> fishers,
        const std::vector<std::string>& labels, memory_space space = memory_space::host)
    {
        const std::size_t tasks = models.task_count();
        if (fishers.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(fishers.size(), " Fishers for ", tasks, " tasks: give one each, in the order of the tasks"));
        }
        if (!labels.empty() && labels.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(labels.size(), " labels for ", tasks, " Fishers: give one each, or none"));
        }
        for (std::size_t t = 0; t < tasks; ++t) {
            for (const auto& [name, tensor] : fishers[t]) {
                if (!detail::find_by_name(models.outputs(), name)) {
                    raise<invalid_argument>(error_code::tensor_unexpected,
                        message("tensor '", name, "' of ", fishers_label(labels, t, models),
                            " is not in the models: these are the statistics of another model"));
                }
            }
        }
        operands_.resize(models.tensors().size() * tasks);
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            for (std::size_t t = 0; t < tasks; ++t) {
                const const_tensor_ref* const fisher = fishers[t].find(tensor.name);
                if (!fisher) {
                    const bool stands_in = models.options().on_missing == missing_tensors::base
                        && tensor.tasks[t].data == tensor.base.data && tensor.tasks[t].source == tensor.base.source;
                    if (stands_in) { continue; }
                    raise<invalid_argument>(error_code::tensor_missing,
                        message("tensor '", tensor.name, "' is missing in ", fishers_label(labels, t, models),
                            ": collect statistics for every parameter, or exclude the tensor"));
                }
                check_fisher(*fisher, tensor, [&] { return fishers_label(labels, t, models); }, space);
                operands_[i * tasks + t] = {static_cast<const std::byte*>(fisher->data), fisher->dtype};
                companions_.push_back({i, operands_[i * tasks + t].data, byte_count(fisher->dtype, tensor.size)});
            }
        }
    }

    /// Ft of each tensor, [tensor][task]; null data where it counts as 0.
    [[nodiscard]] const call_vector<aligned_tensor::operand>& operands() const noexcept { return operands_; }
    [[nodiscard]] const call_vector<companion>& companions() const noexcept { return companions_; }

private:
    static void check_fisher(const const_tensor_ref& fisher, const aligned_tensor& tensor,
        function_ref<std::string()> where, memory_space space)
    {
        if (fisher.shape != tensor.shape) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("tensor '", tensor.name, "' has shape ", to_string(fisher.shape), " in ", where(), " but ",
                    to_string(tensor.shape), " in the models: these are the statistics of another model"));
        }
        if (!is_storage(fisher.dtype) && !is_fp8(fisher.dtype)) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("tensor '", tensor.name, "' has dtype ", to_string(fisher.dtype), " in ", where(),
                    "; expected ", storage_names(), ": convert it"));
        }
        if (fisher.space != space || !fisher.contiguous() || (!fisher.data && tensor.size > 0)) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", tensor.name, "' of ", where(), " must be contiguous ",
                    space == memory_space::host ? "host" : "device", " memory: copy it first"));
        }
    }

    call_vector<aligned_tensor::operand> operands_;
    call_vector<companion> companions_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_STATISTICS_ALIGNED_FISHERS_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = Σ ct·Ft·θt / Σ ct·Ft, elementwise, where Ft ≥ 0 is the diagonal Fisher information of task t: parameters that a
/// task is sure about count more. Where the denominator is below `floor`, no task knows anything, and the plain average
/// Σ ct·θt / Σ ct is taken. `normalize` divides each Ft by its l2 norm over all included tensors (a Fisher that is all
/// zero stays zero), so that tasks whose gradients are larger do not drown the others. Needs no base. `fishers` holds
/// one model of statistics for each task, with a tensor of the same name and shape for every included floating tensor
/// (f64, f32, bf16, f16 or fp8), and no others; where a missing tensor of a task stands for the base's, its Fisher may
/// be missing too and counts as 0. fisher_accumulator makes them, statistics_file reads them. Weights ct: one for each
/// task, or none for all 1; not negative, not all 0. Sums run in f32 (f64 for f64) in task order: (ct·Ft) and
/// (ct·Ft)·θt round, then their sums, then the quotient; with `normalize` ct/‖Ft‖ rounds once. Bit-exact. Errors:
/// invalid_argument (a negative Fisher entry, tensors that do not belong), shape_mismatch, dtype_mismatch,
/// nonfinite_error. Cost: one read of models and Fishers; one more of the Fishers to normalise.
///
///     merge(cpu{}, fisher_options{.fishers = fishers}, tasks, out);
struct fisher_options {
    std::vector<const_model_ref> fishers{}; ///< of each task, by the names of the models' tensors
    std::vector<double> weights{};
    bool normalize = false;
    double floor = 1e-12;
    std::vector<std::string> labels{}; ///< names of the Fishers in messages; empty: "the Fisher of task 1", …
};

template <>
struct options_of<fisher_options> {
    static constexpr option_table table{weights_row(&fisher_options::weights),
        option_row("normalize", &fisher_options::normalize, "divide each Fisher by its norm over the model"),
        option_row(
            "floor", &fisher_options::floor, "below this sum of Fishers the plain average is taken", {.at_least = 0})};
};

/// The Fishers of tasks that are flat views, in the memory of the policy that merges.
///
///     merge(cpu{}, fisher_options{.fishers = flat_fishers(f)}, tasks, out);
template <class Fishers>
    requires(tasks_of<Fishers, cpu> || tasks_of<Fishers, gpu>)
[[nodiscard]] std::vector<const_model_ref> flat_fishers(const Fishers& fishers)
{
    return detail::flat_models(fishers);
}

/// Σ (factors[t]·Ft)·θt / Σ factors[t]·Ft, and Σ weights[t]·θt / total where the denominator is below `floor`. Every
/// product, sum and quotient rounds, in task order from +0 on. A Fisher that is not there counts as 0.
template <arithmetic_element A>
struct fisher_body {
    static constexpr bool watches = true;
    static constexpr bool reads_beside = true;
    const A *factors, *weights; ///< ct/‖Ft‖ or ct, and ct, of each task
    A total, floor; ///< Σ ct, and the least denominator

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        pack above{}, below{}, plain{};
        in.each([&](std::size_t t) TASKVEC_BODY {
            const pack value = in.task(t);
            if (in.has_beside(t)) {
                const pack importance = factors[t] * in.beside(t);
                above = above + importance * value;
                below = below + importance;
            }
            plain = plain + weights[t] * value;
        });
        in.watch(above);
        return select(below < floor, plain / total, above / below);
    }
};

namespace detail {

/// What messages call the Fisher of a task.
[[nodiscard]] inline std::string fisher_label(
    const fisher_options& options, std::size_t t, const aligned_models& models)
{
    return fishers_label(options.labels, t, models);
}
[[noreturn]] TASKVEC_COLD inline void refuse_fisher_nonfinite(
    const aligned_models& models, std::size_t tensor, const std::string& where, double found, std::uint64_t index)
{
    raise<nonfinite_error>(error_code::statistics_not_finite,
        message("tensor '", models.tensors()[tensor].name, "' of ", where, " holds ",
            std::isnan(found) ? "NaN" : "infinity", " at index ", index, ": collect the statistics again"));
}
[[noreturn]] TASKVEC_COLD inline void refuse_fisher_negative(
    const aligned_models& models, std::size_t tensor, const std::string& where, double found, std::uint64_t index)
{
    raise<invalid_argument>(error_code::statistics_invalid,
        message("tensor '", models.tensors()[tensor].name, "' of ", where, " holds ", found, " at index ", index,
            ": a diagonal Fisher is a mean of squares and cannot be negative"));
}

/// Throws unless the weights mean something. Returns the weights ct.
[[nodiscard]] inline call_vector<double> checked_fisher_weights(
    const fisher_options& options, const aligned_models& models)
{
    auto weights = task_weights(options.weights, models, false);
    double total = 0;
    for (const double weight : weights) { total += weight; }
    if (total == 0) {
        raise<invalid_argument>(
            error_code::weights_sum_zero, "the weights of a Fisher merge are all 0: give one of them more");
    }
    return weights;
}

/// ct/‖Ft‖ for each task, from Σ Ft² of every tensor, [tensor][task]; 0 for a Fisher that is all 0.
template <class Squares>
[[nodiscard]] call_vector<double> normalized_fisher_weights(std::span<const double> weights, const Squares& squares)
{
    call_vector<double> factors;
    for (std::size_t t = 0; t < weights.size(); ++t) {
        double square = 0;
        for (const auto& of_tensor : squares) { square += of_tensor[t]; }
        factors.push_back(square == 0 ? 0.0 : weights[t] / std::sqrt(square));
    }
    return factors;
}

/// The least denominator that is divided by; never 0, so that 0 / 0 is never taken.
template <arithmetic_element A>
[[nodiscard]] A fisher_floor(const fisher_options& options) noexcept
{
    return std::max(static_cast<A>(options.floor), std::numeric_limits<A>::denorm_min());
}

} // namespace detail

template <>
class method<fisher_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;
    static constexpr bool beside_not_negative = true;

    [[nodiscard]] static call_vector<aligned_tensor::operand> beside(
        const fisher_options& options, const aligned_models& models, memory_space space)
    {
        return detail::aligned_fishers(models, options.fishers, options.labels, space).operands();
    }

    template <class Passes>
    method(Passes& passes, const fisher_options& options)
        : options_(&options)
        , weights_(detail::checked_fisher_weights(options, passes.models()))
        , plain_(passes, weights_)
        , factors_(plain_)
    {
        const std::size_t tensors = passes.models().tensors().size();
        const auto tasks = static_cast<std::uint32_t>(passes.tasks());
        for (std::size_t i = 0; i < tensors; ++i) {
            for (std::size_t t = 0; t < tasks; ++t) {
                const auto& fisher = passes.beside(i, t);
                bytes_ += fisher.data ? byte_count(fisher.dtype, passes.models().tensors()[i].size) : 0;
            }
        }
        if (!options.normalize) { return; }
        bytes_ *= 2;
        call_vector<operand_pair> squares;
        for (std::uint32_t t = 0; t < tasks; ++t) { squares.push_back({1 + tasks + t, 1 + tasks + t}); }
        const auto sums = tensor_dots(passes, squares, false, "Fisher norms");
        factors_ = kept_numbers(passes, detail::normalized_fisher_weights(weights_, sums));
    }
    template <arithmetic_element A>
    [[nodiscard]] fisher_body<A> body(std::size_t) const
    {
        A total = 0;
        for (const double weight : weights_) { total += static_cast<A>(weight); }
        return {factors_.get<A>(), plain_.get<A>(), total, detail::fisher_floor<A>(*options_)};
    }
    /// Reports what no Fisher may hold.
    [[noreturn]] void refuse_beside(
        const aligned_models& models, std::size_t tensor, std::size_t t, double found, std::uint64_t index) const
    {
        const std::string where = detail::fisher_label(*options_, t, models);
        if (std::isfinite(found)) { detail::refuse_fisher_negative(models, tensor, where, found, index); }
        detail::refuse_fisher_nonfinite(models, tensor, where, found, index);
    }
    [[nodiscard]] std::uint64_t bytes_beside() const noexcept { return bytes_; }

private:
    const fisher_options* options_; // the caller's
    call_vector<double> weights_; // ct
    kept_numbers plain_, factors_; // ct; ct or ct/‖Ft‖
    std::uint64_t bytes_ = 0;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, fisher_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_FISHER_HPP

// ---- taskvec/methods/karcher.hpp
#if !defined(TASKVEC_SINGLE_METHODS_KARCHER_HPP)
#define TASKVEC_SINGLE_METHODS_KARCHER_HPP
// The Karcher mean: the point of a sphere whose squared distances to the models add up to the least. Karcher,
// "Riemannian center of mass and mollifier smoothing" (1977).
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = (Σ wt·‖θt‖)·m, where m is the Karcher mean of the directions θt/‖θt‖ on
/// the unit sphere with weights wt, which are divided by their sum. m starts at the normalised mean and moves by
///     m ← exp_m(Σ wt·log_m(θt/‖θt‖))
/// until a step is shorter than `tolerance`, `steps` times at most. Vectors shorter than `tolerance` have no direction;
/// where none has one the result is 0. Needs no base. m is always a linear combination of the θt, and steps are taken
/// on its factors in f64 from the models' dot products (sums of a fixed shape): no step reads a model. The factors are
/// rounded to f32 (f64 for f64) once: bit-exact for any threads and blocks. Agrees with mergekit's `karcher`, whose
/// steps run in f32, to `tolerance`. Errors: invalid_argument (weights negative or all 0, tolerance). Cost: two reads
/// of the models, and T(T+1)/2 products an element in the first.
///
///     merge(cpu{}, karcher_options{.steps = 50, .tolerance = 1e-12}, tasks, out);
struct karcher_options {
    std::vector<double> weights{};
    std::uint64_t steps = 10;
    double tolerance = 1e-5;
};

template <>
struct options_of<karcher_options> {
    static constexpr option_table table{weights_row(&karcher_options::weights),
        option_row("steps", &karcher_options::steps, "steps towards the mean, at most"),
        option_row("tolerance", &karcher_options::tolerance,
            "length of a step that is none, and of a vector without direction", {.above = 0})};
};

namespace detail {

/// The factors of the models of one tensor. The weights sum to 1.
[[nodiscard]] inline call_vector<double> karcher_factors(
    const karcher_options& options, const gram_matrix& dots, const call_vector<double>& weights)
{
    const std::size_t n = dots.count();
    if (n == 1) { return call_vector<double>(1, 1.0); }
    call_vector<double> norms(n), share(n), mean(n);
    double length = 0, total = 0;
    std::size_t first = n;
    for (std::size_t t = 0; t < n; ++t) {
        norms[t] = dots.norm(t);
        length += weights[t] * norms[t];
        if (!(norms[t] > options.tolerance)) { continue; }
        first = std::min(first, t);
        share[t] = weights[t];
        total += weights[t];
    }
    if (first == n || total == 0) { return mean; }
    for (std::size_t t = 0; t < n; ++t) {
        share[t] /= total;
        mean[t] = share[t] == 0 ? 0.0 : share[t] / norms[t];
    }
    const auto normalize = [&](double least) {
        const double norm = dots.norm(mean);
        if (!(norm > least)) { return false; }
        for (double& factor : mean) { factor /= norm; }
        return true;
    };
    if (!normalize(options.tolerance)) { // directions that cancel: from the first of them
        mean.assign(n, 0.0);
        mean[first] = 1 / norms[first];
    }
    for (std::uint64_t step = 0; step < options.steps; ++step) {
        call_vector<double> tangent(n);
        for (std::size_t t = 0; t < n; ++t) {
            if (share[t] == 0) { continue; }
            const double cosine = std::clamp(dots.dot(t, mean) / norms[t], -1.0, 1.0), angle = std::acos(cosine);
            const double sine = std::sin(angle);
            if (angle < options.tolerance || sine < 1e-12) { continue; } // at m, or opposite: no direction leads there
            const double pull = share[t] * angle / sine;
            tangent[t] += pull / norms[t];
            for (std::size_t j = 0; j < n; ++j) { tangent[j] -= pull * cosine * mean[j]; }
        }
        const double norm = dots.norm(tangent);
        if (norm < options.tolerance) { break; }
        for (std::size_t t = 0; t < n; ++t) { mean[t] = std::cos(norm) * mean[t] + std::sin(norm) / norm * tangent[t]; }
        (void)normalize(0.0);
    }
    for (double& factor : mean) { factor *= length; }
    return mean;
}

} // namespace detail

template <>
class method<karcher_options> : public combination_method {
public:
    template <class Passes>
    method(Passes& passes, const karcher_options& options)
        : method(passes, options, weights_of(options, passes.models()))
    { }

private:
    template <class Passes>
    method(Passes& passes, const karcher_options& options, const call_vector<double>& weights)
        : combination_method(passes, false, [&](const detail::gram_matrix& dots, std::size_t) {
            return detail::karcher_factors(options, dots, weights);
        })
    { }
    [[nodiscard]] static call_vector<double> weights_of(const karcher_options& options, const aligned_models& models)
    {
        auto weights = task_weights(options.weights, models, false);
        const double total = detail::weight_divisor(weights, true, models).get<double>();
        for (double& weight : weights) { weight /= total; }
        return weights;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, karcher_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_KARCHER_HPP

// ---- taskvec/methods/merge_on_read.hpp
#if !defined(TASKVEC_SINGLE_METHODS_MERGE_ON_READ_HPP)
#define TASKVEC_SINGLE_METHODS_MERGE_ON_READ_HPP
// merge_on_read(): what merge() would store, worked out whenever it is read, for merges of merges.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The options of a method whose result can be worked out piece by piece, in any order: an elementwise one
/// (method.hpp). What it has to know of whole tensors, norms or thresholds, it finds beforehand.
template <class Options>
concept merges_on_read = merge_method<Options> && packed_method<Options>;

/// merge() whose result is stored nowhere: makes `merged` the model that merge() would write, each tensor of which
/// names a source that works its elements out whenever they are read. It goes into other algorithms as models on disk
/// do, so that a merge of merges needs no room for what comes between. The elements are those that would be read back,
/// rounded to the output's dtype: what is made of them has the same bits. What is copied through is the reference's.
///
/// The passes that come before the walk are made here, and the whole walk for a method that settles (TIES), with its
/// checks; nothing is written. A read reads these elements of all models, on the thread that asks; where a method looks
/// at rows, all of the piece that they lie in (row_pieces), unless a thread has just read there. A few rows are held
/// for each thread that reads at a time. Whoever reads twice has everything worked out twice. Reads may begin anywhere;
/// those of some thousand elements that begin at multiples of 64 cost least.
///
/// The result owns what `merged` refers to, and has it as long as anybody reads; the models outlive both. Errors: here
/// as check_merge(); in reads as merge() when it comes to these elements, or those since the last multiple of 64 before
/// them: nonfinite_error (inputs; overflow::error), naming this merge's tensor and model.
///
///     const_model_ref mixed;
///     const auto sources = merge_on_read(cpu{}, average_options{}, models, mixed);
///     merge(cpu{}, slerp_options{.t = 0.3}, aligned_models(&mixed, tasks), sink);
template <merges_on_read Options>
[[nodiscard]] std::vector<std::unique_ptr<operand_source>> merge_on_read(
    const cpu& policy, const Options& options, const aligned_models& models, const_model_ref& merged);

/// The same for merge_by_tensor().
///
///     const auto sources = merge_on_read_by_tensor<average_options>(cpu{}, options_of, models, mixed);
template <merges_on_read Options>
    requires described_options<Options>
[[nodiscard]] std::vector<std::unique_ptr<operand_source>> merge_on_read_by_tensor(const cpu& policy,
    const callback<Options(std::string_view)>& options_of, const aligned_models& models, const_model_ref& merged);

namespace detail {

/// A sink of which nothing is wanted: a walk into it only settles what there is to settle.
class unwanted_sink final : public tensor_sink {
public:
    [[nodiscard]] bool rewritable() const override { return false; }
    [[nodiscard]] bool wants(std::size_t /*index*/) const override { return false; }
    void write(std::size_t /*index*/, std::uint64_t /*offset*/, const void* /*data*/, std::size_t /*size*/) override { }
};

/// Takes the stored words of blocks, and gives those that a read is about in its type.
class read_sink final : public tensor_sink {
public:
    /// What is written next is of a tensor of dtype `stored`; elements [first, first + count) go to `out`.
    void open(dtype stored, std::uint64_t first, std::size_t count, void* out) noexcept
    {
        stored_ = stored;
        first_ = first;
        last_ = first + count;
        out_ = static_cast<std::byte*>(out);
    }
    void write(std::size_t /*index*/, std::uint64_t offset, const void* data, std::size_t size) override
    {
        const std::size_t width = byte_count(stored_, 1);
        const std::uint64_t begin = offset / width;
        const std::uint64_t first = std::max(begin, first_), last = std::min(begin + size / width, last_);
        if (first >= last) { return; }
        widen_stored(stored_, static_cast<const std::byte*>(data) + (first - begin) * width,
            static_cast<std::size_t>(last - first),
            out_ + byte_count(read_type(stored_), static_cast<std::size_t>(first - first_)));
    }

private:
    dtype stored_ = dtype::f32;
    std::uint64_t first_ = 0, last_ = 0;
    std::byte* out_ = nullptr;
};

/// A prepared merge, any part of which may be asked for, by any thread.
template <class Options>
class readable_merge {
public:
    /// Checks, and makes the passes. The models that `models` refers to outlive this.
    readable_merge(const cpu& policy, const Options& options, const aligned_models& models)
        : policy_(policy)
        , options_(options)
        , models_(models)
        , beside_(operands_beside(options_, models_, memory_space::host))
        , passes_(policy_, models_, beside_)
        , prepared_(passes_, options_)
    {
        if constexpr (requires(std::span<const merge_tally> tallies) { prepared_.settle(tallies); }) {
            unwanted_sink nothing;
            merge_report ignored;
            merge_walk<Options>(passes_, prepared_, nothing, ignored);
        }
    }
    readable_merge(const readable_merge&) = delete;
    readable_merge& operator=(const readable_merge&) = delete;

    [[nodiscard]] const aligned_models& models() const noexcept { return models_; }
    /// What lies beside a tensor.
    [[nodiscard]] std::span<const aligned_tensor::operand> beside(std::size_t tensor) const noexcept
    {
        const std::size_t each = passes_.beside_each();
        return std::span(beside_).subspan(tensor * each, each);
    }
    /// Elements [offset, offset + count) of a tensor, in read_type() of its dtype.
    void read(std::size_t tensor, std::uint64_t offset, std::size_t count, void* out) const
    {
        if (count == 0) { return; }
        const std::uint64_t end = offset + count;
        if constexpr (by_rows) {
            const chunk_range own = prepared_.pieces().of_tensor(tensor);
            const std::size_t step = prepared_.pieces()[own.first].size;
            const worker_lease lease(*this, own.first + static_cast<std::size_t>(offset / step));
            lease.mine->taken.open(models_.tensors()[tensor].output_dtype, offset, count, out);
            for (std::uint64_t at = offset; at < end;) {
                const std::size_t number = own.first + static_cast<std::size_t>(at / step);
                const tensor_chunk piece = prepared_.pieces()[number];
                const std::uint64_t last = std::min(end, piece.offset + piece.size);
                // Blocks lie in a piece as merge() has them.
                work_out(*lease.mine, tensor, at - (at - piece.offset) % block_size, last, number);
                at = last;
            }
        }
        else {
            constexpr std::uint64_t start = 64; // of which blocks begin at a multiple: see fill_draws()
            const worker_lease lease(*this, 0);
            lease.mine->taken.open(models_.tensors()[tensor].output_dtype, offset, count, out);
            work_out(*lease.mine, tensor, offset - offset % start, end, 0);
        }
    }
    /// Gives the memory of workers back that nobody has.
    void release() const
    {
        const std::lock_guard lock(mutex_);
        idle_.clear();
    }

private:
    static constexpr bool by_rows = looks_at_rows<method<Options>>;

    /// What a thread needs that reads.
    struct worker {
        explicit worker(const readable_merge& merge)
            : space(merge.models_, 1, memory_of(merge.policy_), storage_conversions::of(storage_types{}))
            , writer(guarded(merge), false, memory_of(merge.policy_), storage_conversions::of(storage_types{}))
            , scratch(memory_of(merge.policy_))
        { }
        worker(const worker&) = delete;
        worker& operator=(const worker&) = delete;

        read_sink taken;
        std::optional<overflow_guard> guard;
        block_workspace space;
        row_writer writer;
        merge_scratch scratch;
        merge_tally tally;
        std::optional<std::size_t> weighed{}; ///< the piece of rows that `scratch` is about, by number

    private:
        tensor_sink& guarded(const readable_merge& merge)
        {
            const auto how = merge.models_.options().on_overflow;
            if (how == overflow::propagate) { return taken; }
            guard.emplace(taken, merge.models_, how, largest_gain(merge.options_));
            if constexpr (requires { merge.prepared_.nonfinite_beside(std::size_t{0}, std::uint64_t{0}); }) {
                guard->excuse([&prepared = merge.prepared_](std::size_t tensor, std::uint64_t index) {
                    return prepared.nonfinite_beside(tensor, index);
                });
            }
            return *guard;
        }
    };
    /// A worker for as long as it lives: of those that nobody has one that knows the piece, otherwise the one that was
    /// used the longest ago.
    struct worker_lease {
        worker_lease(const readable_merge& of, std::size_t piece)
            : merge(of)
        {
            const std::lock_guard lock(merge.mutex_);
            auto& idle = merge.idle_;
            if (idle.empty()) {
                idle.reserve(merge.workers_ + 1); // so that none comes back to a list that has no room
                mine = std::make_unique<worker>(merge);
                ++merge.workers_;
                return;
            }
            auto found = std::find_if(
                idle.begin(), idle.end(), [&](const auto& one) { return !by_rows || one->weighed == piece; });
            if (found == idle.end()) { found = idle.begin(); }
            mine = std::move(*found);
            idle.erase(found);
        }
        worker_lease(const worker_lease&) = delete;
        worker_lease& operator=(const worker_lease&) = delete;
        ~worker_lease()
        {
            const std::lock_guard lock(merge.mutex_);
            merge.idle_.push_back(std::move(mine));
        }
        const readable_merge& merge;
        std::unique_ptr<worker> mine;
    };

    /// Merges elements [begin, end) of a tensor into the worker's sink. `number`: the piece of rows that they lie in.
    void work_out(worker& own, std::size_t tensor, std::uint64_t begin, std::uint64_t end, std::size_t number) const
    {
        const aligned_tensor& from = models_.tensors()[tensor];
        with_block_of<storage_types>(own.space, from, [&]<class A>(row_block<A>& rows) {
            if constexpr (by_rows) {
                if (own.weighed != number) {
                    merge_scratch& scratch = own.scratch;
                    own.weighed.reset();
                    scratch.piece = prepared_.pieces()[number];
                    A* const made = scratch.weighed.rows<A>(prepared_.row_numbers(), scratch.piece.size);
                    prepared_.weigh(rows, scratch.piece, made, scratch.piece_rows);
                    scratch.weighed_rows = made;
                    own.weighed = number;
                }
            }
            visit_body<A>(prepared_, tensor, [&](const auto& body) {
                for (std::uint64_t at = begin; at < end; at += block_size) {
                    const tensor_chunk block{
                        tensor, at, static_cast<std::size_t>(std::min<std::uint64_t>(block_size, end - at))};
                    own.writer.open(from, block);
                    for_each_block_of(rows, block, [&](row_block<A>& opened) {
                        block_merge(prepared_, body, passes_, opened, own.writer, own.scratch, 0, own.tally).run();
                    });
                    own.writer.close();
                }
            });
        });
    }

    cpu policy_;
    Options options_;
    aligned_models models_;
    decltype(operands_beside(
        std::declval<const Options&>(), std::declval<const aligned_models&>(), memory_space::host)) beside_;
    typed_passes<storage_types> passes_;
    method<Options> prepared_;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<worker>> idle_; // those that nobody has, the last one used at the end
    mutable std::size_t workers_ = 0; // of all
};

/// One tensor of a merge that is made when it is read.
template <class Options>
class merged_source final : public operand_source {
public:
    merged_source(std::shared_ptr<const readable_merge<Options>> merge, std::size_t tensor)
        : merge_(std::move(merge))
        , tensor_(tensor)
    { }
    [[nodiscard]] dtype type() const noexcept override { return read_type(of().output_dtype); }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        merge_->read(tensor_, offset, count, out);
    }
    void prepare(const cpu& policy) const override
    {
        const auto one = [&](const aligned_tensor::operand& from) {
            if (from.source) { from.source->prepare(policy); }
        };
        one(of().base);
        for (const auto& task : of().tasks) { one(task); }
        for (const auto& from : merge_->beside(tensor_)) { one(from); }
    }
    void release() const override { merge_->release(); }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return static_cast<unsigned>(8 * of().bytes(1)); }

private:
    [[nodiscard]] const aligned_tensor& of() const noexcept { return merge_->models().tensors()[tensor_]; }

    std::shared_ptr<const readable_merge<Options>> merge_;
    std::size_t tensor_;
};

/// The sources of models.tensors(), in their order.
template <class Options>
std::vector<std::unique_ptr<operand_source>> merge_sources(
    const cpu& policy, const Options& options, const aligned_models& models)
{
    const call_memory none(nullptr); // what is made here outlives a call that may be under way
    std::vector<std::unique_ptr<operand_source>> sources;
    if constexpr (merges_on_read<Options>) { // others are compiled by the same list (compiled/methods.hpp)
        static_assert(check_method<Options>());
        check_options(options);
        if (method<Options>::needs_base && !models.has_base()) {
            raise<invalid_argument>(error_code::base_missing, "this merge method needs a base model");
        }
        const auto merge = std::make_shared<const readable_merge<Options>>(policy, options, models);
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            sources.push_back(std::make_unique<merged_source<Options>>(merge, i));
        }
    }
    return sources;
}

/// The model that a merge with these sources would write. Those of what is copied and comes out of being stored as
/// something else are added to them.
[[nodiscard]] inline const_model_ref model_of_sources(
    const aligned_models& models, std::vector<std::unique_ptr<operand_source>>& sources)
{
    const_model_ref merged;
    const auto insert = [&](std::size_t output, const operand_source& source) {
        const auto& spec = models.outputs()[output];
        merged.insert(spec.name, {nullptr, spec.dtype, spec.shape, {}, memory_space::host, 0, &source});
    };
    for (std::size_t i = 0; i < models.tensors().size(); ++i) { insert(models.tensors()[i].output, *sources[i]); }
    for (const auto& copied : models.copied()) {
        if (!copied.source.source) {
            merged.insert(copied.name, const_tensor_ref(copied.source));
            continue;
        }
        sources.push_back(
            std::make_unique<rounded_source>(*copied.source.source, models.outputs()[copied.output].dtype));
        insert(copied.output, *sources.back());
    }
    return merged;
}

} // namespace detail

template <merges_on_read Options>
std::vector<std::unique_ptr<operand_source>> merge_on_read(
    const cpu& policy, const Options& options, const aligned_models& models, const_model_ref& merged)
{
    auto sources = detail::merge_sources(policy, options, models);
    merged = detail::model_of_sources(models, sources);
    return sources;
}

template <merges_on_read Options>
    requires described_options<Options>
std::vector<std::unique_ptr<operand_source>> merge_on_read_by_tensor(const cpu& policy,
    const callback<Options(std::string_view)>& options_of, const aligned_models& models, const_model_ref& merged)
{
    std::vector<std::unique_ptr<operand_source>> sources(models.tensors().size());
    for (const auto& group : group_by_options(models, options_of)) {
        auto part = detail::merge_sources(policy, group.options, aligned_models(models, group.tensors));
        for (std::size_t i = 0; i < part.size(); ++i) { sources[group.tensors[i]] = std::move(part[i]); }
    }
    merged = detail::model_of_sources(models, sources);
    return sources;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_MERGE_ON_READ_HPP

// ---- taskvec/methods/model_stock.hpp
#if !defined(TASKVEC_SINGLE_METHODS_MODEL_STOCK_HPP)
#define TASKVEC_SINGLE_METHODS_MODEL_STOCK_HPP
// Model Stock: Jang, Yun and Han, "Model Stock: all we need is just a few fine-tuned models" (ECCV 2024).
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor: θ* = θ0 + t·mean(τ), t = N·c / (1 + (N−1)·c), with c the mean cosine over all pairs of the N task
/// vectors of that tensor (0 for a pair with a zero vector). The less the fine-tuned models agree, the closer the
/// result stays to the base. t is clamped to [0, 1] unless `clamp` is off (mergekit does not clamp). At least two
/// tasks. With `angles` each row or column has its own t, 0 where its task vectors cancel. Cosines are f64 sums of a
/// fixed shape; t/N is rounded to f32 (f64 for f64) once; sums run in task order: bit-exact for any threads and blocks.
/// Errors: invalid_argument, also where a tensor's t has no value unclamped (task vectors that cancel). Cost: two reads
/// of all models, and N(N+1)/2 products an element in the first. For rows one, and memory for each thread: N + 1
/// numbers for each of 65,536 entries or of one row; for columns a number for each.
///
///     merge(cpu{}, model_stock_options{}, base, tasks, out);
struct model_stock_options {
    bool clamp = true;
    angles_between angles = angles_between::tensors;
};

template <>
struct options_of<model_stock_options> {
    static constexpr option_table table{
        option_row("clamp", &model_stock_options::clamp, "hold the ratio inside 0 to 1", {.negated = "unclamped"}),
        option_row("angles-between", &model_stock_options::angles, "whose angles count", {.unit = "WHICH"})};
};

namespace detail {

inline void check_model_stock(std::size_t tasks)
{
    if (tasks < 2) {
        raise<invalid_argument>(error_code::task_count,
            "Model Stock compares fine-tuned models with each other: at least two tasks are needed");
    }
}

/// c, the mean cosine over all pairs of task vectors: dots[i(i+1)/2 + j] = τi·τj for j ≤ i.
[[nodiscard]] inline double mean_cosine(std::size_t tasks, const double* dots)
{
    const auto dot = [&](std::size_t i, std::size_t j) { return dots[i * (i + 1) / 2 + j]; };
    double cosines = 0;
    for (std::size_t i = 0; i < tasks; ++i) {
        for (std::size_t j = 0; j < i; ++j) {
            const double norms = std::sqrt(dot(i, i)) * std::sqrt(dot(j, j));
            cosines += norms == 0 ? 0.0 : dot(i, j) / norms;
        }
    }
    const double n = static_cast<double>(tasks);
    return cosines / (n * (n - 1) / 2);
}

/// t/N for a tensor from the dots of its task vectors.
[[nodiscard]] inline double model_stock_factor(
    const model_stock_options& options, const std::string& tensor, std::size_t tasks, std::span<const double> dots)
{
    const double n = static_cast<double>(tasks), c = mean_cosine(tasks, dots.data()), below = 1 + (n - 1) * c;
    double t = n * c / below;
    if (options.clamp && c == c) {
        t = below > 0 ? std::clamp(t, 0.0, 1.0) : 0.0;
    } // c ≥ −1/(N−1): below it lies rounding
    else if (!(below > 0) && c == c) {
        raise<invalid_argument>(error_code::no_solution,
            message("the task vectors of tensor '", tensor, "' cancel (mean cosine ", c,
                "): the ratio of Model Stock has no value there; clamp it, or exclude the tensor"));
    }
    return t / n;
}

/// t/N for a row or column.
struct model_stock_rule {
    bool clamp;
    std::size_t tasks;

    void operator()(const double* dots, double* factor) const
    {
        const double n = static_cast<double>(tasks), c = mean_cosine(tasks, dots), below = 1 + (n - 1) * c;
        const double t = below < 1e-6 ? 0.0 : n * c / below; // what few entries are cancels often, to rounding
        *factor = (clamp ? std::clamp(t, 0.0, 1.0) : t) / n;
    }
};

} // namespace detail

/// θ0 + factor·Στt with a factor for each row or column.
template <arithmetic_element A>
struct scaled_vectors_body : detail::factors_of_vectors<A> {
    static constexpr bool watches = true;

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return in.delta(t); });
        in.watch(sum);
        return in.base() + in.beside(0) * sum;
    }
};

template <>
class method<model_stock_options> : public detail::method_by_vectors<elementwise_method, detail::model_stock_rule> {
public:
    template <class Passes>
    method(Passes& passes, const model_stock_options& options)
        : method_by_vectors(passes, options.angles, 1, detail::model_stock_rule{options.clamp, checked(passes.tasks())})
        , weights_(passes, call_vector<double>(passes.tasks(), 1.0))
    {
        if (by_vector().any()) { return; }
        const auto tasks = static_cast<std::uint32_t>(passes.tasks());
        call_vector<operand_pair> pairs;
        for (std::uint32_t i = 0; i < tasks; ++i) {
            for (std::uint32_t j = 0; j <= i; ++j) { pairs.push_back({1 + i, 1 + j}); }
        }
        const auto sums = tensor_dots(passes, pairs, true, "cosines");
        for (std::size_t tensor = 0; tensor < sums.size(); ++tensor) {
            factors_.push_back(detail::model_stock_factor(
                options, passes.models().tensors()[tensor].name, passes.tasks(), sums[tensor]));
        }
    }
    /// Angles are those of a tensor, or of its rows or columns.
    [[nodiscard]] static bool tensor_by_tensor(const model_stock_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A> body(std::size_t tensor) const
    {
        return {{}, weights_.get<A>(), static_cast<A>(factors_[tensor])};
    }
    /// Calls use(body) with the body of a tensor.
    template <arithmetic_element A, class Use>
    decltype(auto) with_body(std::size_t tensor, Use&& use) const
    {
        if (!by_vector().any()) { return use(body<A>(tensor)); }
        return use(scaled_vectors_body<A>{by_vector().template get<A>(tensor)});
    }

private:
    [[nodiscard]] static std::size_t checked(std::size_t tasks)
    {
        detail::check_model_stock(tasks);
        return tasks;
    }

    kept_numbers weights_;
    call_vector<double> factors_; // t/N for each tensor
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, model_stock_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_MODEL_STOCK_HPP

// ---- taskvec/methods/multi_slerp.hpp
#if !defined(TASKVEC_SINGLE_METHODS_MULTI_SLERP_HPP)
#define TASKVEC_SINGLE_METHODS_MULTI_SLERP_HPP
// Multi-SLERP: the weighted mean direction of several models at their mean length.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <string>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = N·m/‖m‖ with m = Σ wt·xt/(‖xt‖ + ε), N = Σ wt·‖xt‖ and ε = 1e-8, where the
/// weights are divided by their sum unless `normalize` is off. The xt are the tasks; with a base they are the task
/// vectors, and the result is added to it. Goddard's Multi-SLERP goes on in the tangent space of the sphere at m, by
/// the weighted mean of the projected xt, which is 0 there: what it adds to this is rounding. One task is kept as it
/// is. Where the directions cancel (‖m‖ < ε), two models, or vectors that are all 0, are added up by their weights;
/// more are an error. Norms are f64 sums of a fixed shape, the factors are rounded to f32 (f64 for f64) once: bit-exact
/// for any threads and blocks. Agrees with mergekit's `multislerp` to rounding. Errors: invalid_argument. Cost: two
/// reads of the models, and T(T+1)/2 products an element in the first.
///
///     merge(cpu{}, multi_slerp_options{.weights = {1, 1, 2}}, tasks, out);
struct multi_slerp_options {
    std::vector<double> weights{};
    bool normalize = true; ///< divide the weights by their sum
};

template <>
struct options_of<multi_slerp_options> {
    static constexpr option_table table{weights_row(&multi_slerp_options::weights),
        option_row("normalized", &multi_slerp_options::normalize, "divide by the sum of the weights",
            {.negated = "unnormalized"})};
};

namespace detail {

/// The factors of the vectors of one tensor.
[[nodiscard]] inline call_vector<double> multi_slerp_factors(
    const gram_matrix& dots, const call_vector<double>& weights, const std::string& tensor)
{
    constexpr double epsilon = 1e-8;
    if (dots.count() == 1) { return call_vector<double>(1, 1.0); }
    call_vector<double> factors;
    double length = 0;
    bool all_zero = true;
    for (std::size_t t = 0; t < dots.count(); ++t) {
        const double norm = dots.norm(t);
        factors.push_back(weights[t] / (norm + epsilon));
        length += weights[t] * norm;
        all_zero = all_zero && norm == 0;
    }
    const double mean = dots.norm(factors);
    if (mean < epsilon) {
        if (dots.count() == 2 || all_zero) { return weights; }
        raise<invalid_argument>(error_code::no_solution,
            message("the directions of tensor '", tensor,
                "' cancel, so that Multi-SLERP has no mean direction there: change the weights, or exclude the "
                "tensor"));
    }
    for (double& factor : factors) { factor *= length / mean; }
    return factors;
}

} // namespace detail

template <>
class method<multi_slerp_options> : public combination_method {
public:
    template <class Passes>
    method(Passes& passes, const multi_slerp_options& options)
        : method(passes, weights_of(options, passes.models()))
    { }

private:
    template <class Passes>
    method(Passes& passes, const call_vector<double>& weights)
        : combination_method(
              passes, passes.models().has_base(), [&](const detail::gram_matrix& dots, std::size_t tensor) {
                  return detail::multi_slerp_factors(dots, weights, passes.models().tensors()[tensor].name);
              })
    { }
    [[nodiscard]] static call_vector<double> weights_of(
        const multi_slerp_options& options, const aligned_models& models)
    {
        auto weights = task_weights(options.weights, models);
        const double divisor = detail::weight_divisor(weights, options.normalize, models).get<double>();
        for (double& weight : weights) { weight /= divisor; }
        return weights;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, multi_slerp_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_MULTI_SLERP_HPP

// ---- taskvec/methods/nearswap.hpp
#if !defined(TASKVEC_SINGLE_METHODS_NEARSWAP_HPP)
#define TASKVEC_SINGLE_METHODS_NEARSWAP_HPP
// NearSwap: takes another model's entries where they are near the base's, and goes a fixed way towards the rest.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = w·θ1 + (1 − w)·θ0, elementwise, with w = min(t / max(|θ0 − θ1|, 1e-6), 1): entries closer than t become θ1's,
/// others move by t. After alchemonaut's NearSwap, in the operations of mergekit's `nearswap`, where the quotient is t
/// times a reciprocal, every one rounded in f32 (f64 for f64): bit-exact. Errors: invalid_argument (t below 0; another
/// number of tasks than one). Cost: one read of the models.
///
///     merge(cpu{}, nearswap_options{.t = 0.001}, base, tasks, out);
struct nearswap_options {
    double t = 0.001;
};

template <>
struct options_of<nearswap_options> {
    static constexpr option_table table{
        option_row("t", &nearswap_options::t, "how near entries are to be taken, and how far others go",
            {.at_least = 0, .expected = "a distance of at least 0, such as 0.001"})};
};

/// What nearswap_options says of an entry.
template <arithmetic_element A>
struct nearswap_body {
    static constexpr bool watches = false;
    A t; ///< the distance

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        const auto one = filled<pack>(1);
        auto apart = from_bits(magnitude_of(in.base() - in.task(0)));
        const auto least = filled<pack>(static_cast<A>(1e-6));
        apart = select(apart < least, least, apart);
        auto weight = t * (one / apart);
        weight = select(weight > one, one, weight);
        return weight * in.task(0) + (one - weight) * in.base();
    }
};

template <>
class method<nearswap_options> : public elementwise_method {
public:
    template <class Passes>
    method(Passes& passes, const nearswap_options& options)
        : t_(options.t)
    {
        if (passes.tasks() != 1) {
            raise<invalid_argument>(error_code::task_count,
                message("NearSwap takes a base and one task, and there are ", passes.tasks(), " tasks: give one"));
        }
    }
    template <arithmetic_element A>
    [[nodiscard]] nearswap_body<A> body(std::size_t) const
    {
        return {static_cast<A>(t_)};
    }

private:
    double t_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, nearswap_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_NEARSWAP_HPP

// ---- taskvec/methods/nuslerp.hpp
#if !defined(TASKVEC_SINGLE_METHODS_NUSLERP_HPP)
#define TASKVEC_SINGLE_METHODS_NUSLERP_HPP
// NuSLERP: spherical interpolation by weights, of two models or of their task vectors.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b with t = w2/(w1 + w2) (½ where the
/// weights sum to 0) and Ω the angle between a and b; (1−t)·a + t·b where they are collinear (sin²Ω ≤ 1e-14). a and b
/// are the two tasks; with a base they are the task vectors, and the result is added to it. The angle to a zero vector
/// counts as a right one. With `angles` each row or column has its own Ω. Norms and the angle are f64 sums of a fixed
/// shape, the factors are rounded to f32 (f64 for f64) once: bit-exact for any threads and blocks. Agrees with
/// mergekit's `nuslerp` to rounding. Errors: invalid_argument (weights; another number of tasks than two). Cost: two
/// reads of the models; for rows one, and memory for each thread: four numbers for each of 65,536 entries or of one
/// row; for columns two, and two numbers for each column. On the CPU; on devices two numbers for each row too, and two
/// reads.
///
///     merge(cpu{}, nuslerp_options{.weights = {1, 3}}, base, tasks, out);
struct nuslerp_options {
    std::vector<double> weights{};
    angles_between angles = angles_between::tensors;
};

template <>
struct options_of<nuslerp_options> {
    static constexpr option_table table{weights_row(&nuslerp_options::weights),
        option_row("angles-between", &nuslerp_options::angles, "whose angles count", {.unit = "WHICH"})};
};

namespace detail {

/// The factors of two vectors at t between them, from their dot products a·a, b·a, b·b.
struct nuslerp_rule {
    double t;

    void operator()(const double* dots, double* factors) const
    {
        const double norms = std::max(std::sqrt(dots[0]), 1e-7) * std::max(std::sqrt(dots[2]), 1e-7);
        const double cosine = std::clamp(dots[1] / norms, -1.0, 1.0);
        factors[0] = 1 - t;
        factors[1] = t;
        if (1 - cosine * cosine <= 1e-14) { return; }
        const double angle = std::acos(cosine), sine = std::sin(angle);
        factors[0] = std::sin((1 - t) * angle) / sine;
        factors[1] = std::sin(t * angle) / sine;
    }
    [[nodiscard]] call_vector<double> operator()(const gram_matrix& matrix, std::size_t) const
    {
        const std::array dots{matrix(0, 0), matrix(1, 0), matrix(1, 1)};
        call_vector<double> factors(2);
        (*this)(dots.data(), factors.data());
        return factors;
    }
};

} // namespace detail

template <>
class method<nuslerp_options> : public detail::method_by_vectors<combination_method, detail::nuslerp_rule> {
public:
    template <class Passes>
    method(Passes& passes, const nuslerp_options& options)
        : method(passes, detail::nuslerp_rule{place(options, passes.models())}, options.angles)
    { }
    /// Calls use(body) with the body of a tensor.
    template <arithmetic_element A, class Use>
    decltype(auto) with_body(std::size_t tensor, Use&& use) const
    {
        if (!by_vector().any()) { return use(body<A>(tensor)); }
        return use(vector_combination_body<A>{by_vector().template get<A>(tensor), on_base()});
    }

private:
    template <class Passes>
    method(Passes& passes, const detail::nuslerp_rule& rule, angles_between angles)
        : method_by_vectors(
              passes, angles, 2, rule, passes, passes.models().has_base(), rule, angles == angles_between::tensors)
    { }
    /// t, between the two models.
    [[nodiscard]] static double place(const nuslerp_options& options, const aligned_models& models)
    {
        const std::size_t tasks = models.task_count();
        if (tasks != 2) {
            raise<invalid_argument>(error_code::task_count,
                message("NuSLERP goes between two models, and the number of tasks is ", tasks, ": give two"));
        }
        const auto weights = task_weights(options.weights, models);
        const double total = weights[0] + weights[1];
        return std::abs(total) < 1e-6 ? 0.5 : weights[1] / total;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, nuslerp_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_NUSLERP_HPP

// ---- taskvec/methods/passthrough.hpp
#if !defined(TASKVEC_SINGLE_METHODS_PASSTHROUGH_HPP)
#define TASKVEC_SINGLE_METHODS_PASSTHROUGH_HPP
// One model as it is, or scaled: a merge of slices takes layers from it, and layers grow or fade.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = scale·θ1, elementwise, of the one task. Needs no base. The scale is rounded to f32 (f64 for f64) once; a scale
/// of 1 keeps every bit that the output's dtype holds. Bit-exact. Errors: invalid_argument (scale; another number of
/// tasks than one).
///
///     merge(cpu{}, passthrough_options{.scale = 0.5}, std::vector{task}, out);
struct passthrough_options {
    double scale = 1.0;
};

template <>
struct options_of<passthrough_options> {
    static constexpr option_table table{option_row("scale", &passthrough_options::scale, "factor of every entry")};
};

/// factor·θ1.
template <arithmetic_element A>
struct scaled_body {
    static constexpr bool watches = false;
    A factor; ///< of every entry

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        return factor * in.task(0);
    }
};

template <>
class method<passthrough_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    template <class Passes>
    method(Passes& passes, const passthrough_options& options)
        : scale_(options.scale)
    {
        if (passes.tasks() != 1) {
            raise<invalid_argument>(error_code::task_count,
                message("passthrough takes one model, and there are ", passes.tasks(), " tasks: give one"));
        }
    }
    template <arithmetic_element A>
    [[nodiscard]] scaled_body<A> body(std::size_t) const
    {
        return {static_cast<A>(scale_)};
    }

private:
    double scale_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, passthrough_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_PASSTHROUGH_HPP

// ---- taskvec/methods/ram.hpp
#if !defined(TASKVEC_SINGLE_METHODS_RAM_HPP)
#define TASKVEC_SINGLE_METHODS_RAM_HPP
// RAM and RAM+: task vectors that are averaged where several act, and kept whole where one does. "Reinforced Agent
// Merging" (arXiv 2601.13572).
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + Σ τt/c over the tasks that act on an entry, |τt| > epsilon, where c is their number: the mean of those
/// that act. Entries with one task alone keep its change whole. Bit-exact: sums in task order, every quotient and sum
/// rounds in f32 (f64 for f64). Errors: invalid_argument (epsilon). Cost: one read of the models.
///
///     merge(cpu{}, ram_options{.epsilon = 1e-5}, base, tasks, out);
struct ram_options {
    double epsilon = 1e-5;
};

/// RAM, where the entries that one task acts on alone are multiplied by λt = 1 + r·min(ρt, alpha), with ρt the number
/// of entries that task t shares with others divided by the number that it has alone: over the model, as in the paper,
/// or tensor by tensor (mergekit's). Cost: one more read of the models. On the CPU.
///
///     merge(cpu{}, ram_plus_options{.r = 0.1, .alpha = 0.2}, base, tasks, out);
struct ram_plus_options {
    double epsilon = 1e-5;
    double r = 0.1;
    double alpha = 0.2;
    taskvec::scope scope = taskvec::scope::model;

    /// What mergekit's ramplus_tl does.
    [[nodiscard]] static ram_plus_options as_in_mergekit()
    {
        ram_plus_options options;
        options.scope = taskvec::scope::tensor;
        return options;
    }
};

namespace detail {
[[nodiscard]] constexpr option_details epsilon_details()
{
    return {.at_least = 0, .expected = "a magnitude of at least 0, such as 1e-5"};
}
} // namespace detail

template <>
struct options_of<ram_options> {
    static constexpr option_table table{option_row(
        "epsilon", &ram_options::epsilon, "magnitude above which a task acts on an entry", detail::epsilon_details())};
};
template <>
struct options_of<ram_plus_options> {
    static constexpr option_table table{option_row("epsilon", &ram_plus_options::epsilon,
                                            "magnitude above which a task acts on an entry", detail::epsilon_details()),
        option_row("r", &ram_plus_options::r, "how much the share of common entries raises those of one task"),
        option_row("alpha", &ram_plus_options::alpha, "the largest share that counts", {.at_least = 0}),
        option_row("scope", &ram_plus_options::scope, "what shares count over", {.unit = "SCOPE"})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<ram_plus_options>{"paper", "the paper", [] { return ram_plus_options{}; }},
        option_preset<ram_plus_options>{"mergekit", "mergekit", &ram_plus_options::as_in_mergekit}};
};

/// θ0 + Σ over the acting tasks of raise[t]·τt where one acts alone, and of τt/c where c do.
template <arithmetic_element A>
struct acting_mean_body {
    static constexpr bool watches = false;
    A epsilon; ///< magnitude above which a task acts
    const A* raise; ///< null: 1 for all

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        using words = typename In::words;
        const auto acts = [&](const pack& x) TASKVEC_BODY { return from_bits(magnitude_of(x)) > epsilon; };
        words acting{};
        in.each([&](std::size_t t) TASKVEC_BODY {
            const auto acts_here = acts(in.delta(t));
            acting = added_where(acts_here, acting);
            if (in.counts_tasks()) { in.count_of(0, t, acts_here); }
        });
        const auto count = to_numbers(larger(acting, filled_words<words>(1)));
        const auto alone = count == 1;
        const pack sum = in.sum_of([&](std::size_t t) TASKVEC_BODY {
            const pack x = in.delta(t);
            const pack raised = raise ? raise[t] * x : x;
            return where(acts(x), select(alone, raised, x / count));
        });
        return in.base() + sum;
    }
};

template <>
class method<ram_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes&, const ram_options& options)
        : epsilon_(options.epsilon)
    { }
    template <arithmetic_element A>
    [[nodiscard]] acting_mean_body<A> body(std::size_t) const
    {
        return {static_cast<A>(epsilon_), nullptr};
    }

private:
    double epsilon_;
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Counts for each task the entries of a block on which it acts with others, and those on which it acts alone.
template <arithmetic_element A>
struct acting_tasks {
    static constexpr std::size_t lanes = 64 / sizeof(A);
    A epsilon;
    std::size_t tasks;
    signed_word<A>* counts; ///< `lanes` for each task, with others, then as many alone; their sums count

    template <int bytes, class Deltas>
    TASKVEC_INLINE void at(std::size_t, const Deltas& x) const
    {
        using words = pack_words<A, bytes>;
        words acting{};
        for (std::size_t t = 0; t < tasks; ++t) { acting = added_where(acts(x(t)), acting); }
        const auto several = materialised(acting > 1);
        for (std::size_t t = 0; t < tasks; ++t) {
            const auto here = acts(x(t));
            add(here & several, counts + t * lanes);
            add(here & ~several, counts + (tasks + t) * lanes);
        }
    }

private:
    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> acts(const pack<A, bytes>& x) const noexcept
    {
        return from_bits(magnitude_of(x)) > epsilon;
    }
    template <int bytes>
    static TASKVEC_INLINE void add(const pack_mask<A, bytes>& mask, signed_word<A>* to) noexcept
    {
        pack_words<A, bytes> count;
        std::memcpy(&count, to, sizeof count);
        count = added_where(mask, count);
        std::memcpy(to, &count, sizeof count);
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

template <>
class method<ram_plus_options> : public elementwise_method {
public:
    static constexpr bool on_device = false; // entries are counted on the CPU
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const ram_plus_options& options)
        : epsilon_(options.epsilon)
        , tasks_(passes.tasks())
        , raise_(passes, factors(passes, options))
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const ram_plus_options& options) noexcept
    {
        return options.scope == scope::tensor;
    }
    template <arithmetic_element A>
    [[nodiscard]] acting_mean_body<A> body(std::size_t tensor) const
    {
        return {static_cast<A>(epsilon_), raise_.get<A>() + tensor * tasks_};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; }

private:
    /// λt for every tensor and task.
    template <class Passes>
    [[nodiscard]] static call_vector<double> factors(Passes& passes, const ram_plus_options& options)
    {
        const std::size_t tasks = passes.tasks();
        // For every task the entries that it shares, then those that it has alone: whole numbers, exact in f64.
        auto counts = tensor_sums<storage_of<Passes>>(
            passes.policy(), passes.models(), 2 * tasks, 0, "shares", [&]<class A>(row_block<A>& rows, double* sum) {
                const A epsilon = static_cast<A>(options.epsilon);
                using counter = kernels::acting_tasks<A>;
                std::pmr::vector<signed_word<A>> lanes(2 * tasks * counter::lanes, memory_of(passes.policy()));
                const counter work{epsilon, tasks, lanes.data()};
                detail::over_task_rows(detail::delta_rows(rows), rows.size(), work);
                for (std::size_t k = 0; k < 2 * tasks; ++k) {
                    const auto* const of_lanes = lanes.data() + k * counter::lanes;
                    sum[k] =
                        static_cast<double>(std::accumulate(of_lanes, of_lanes + counter::lanes, signed_word<A>{0}));
                }
            });
        if (options.scope == taskvec::scope::model) {
            call_vector<double> total(2 * tasks);
            for (const auto& row : counts) {
                for (std::size_t k = 0; k < total.size(); ++k) { total[k] += row[k]; }
            }
            for (auto& row : counts) { row = total; }
        }
        call_vector<double> all;
        for (const auto& row : counts) {
            for (std::size_t t = 0; t < tasks; ++t) {
                // With nothing alone nothing is raised: the largest share stands for it.
                const double share = row[tasks + t] == 0 ? options.alpha : row[t] / row[tasks + t];
                all.push_back(1 + options.r * std::min(share, options.alpha));
            }
        }
        return all;
    }

    double epsilon_;
    std::size_t tasks_;
    kept_numbers raise_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, ram_options)
TASKVEC_COMPILED_MERGES(extern, ram_plus_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_RAM_HPP

// ---- taskvec/methods/sce.hpp
#if !defined(TASKVEC_SINGLE_METHODS_SCE_HPP)
#define TASKVEC_SINGLE_METHODS_SCE_HPP
// SCE: select the entries in which task vectors differ most, calculate a weight for each task, erase minority signs.
// Wan et al., "FuseChat: knowledge fusion of chat models" (arXiv 2408.07990).
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor:
///   1. select: of the m entries whose variance over the task vectors is not 0 the floor(density·m) with the largest
///      take part, lowest index first among equals; at density 1 all entries do;
///   2. calculate: wt = mean(τt²) over the tensor with the others as 0, divided by Σ wt; where that sum is below
///      `least_weight`, or 0, all tasks weigh the same;
///   3. erase: an entry's sign is that of Σ τt (plus for 0), and tasks of another sign, or 0, are left out there.
///
/// θ* = θ0 + Σ wt·τt / Σ wt over the tasks that are left (a divisor is at least `least_weight`). Variances, of the task
/// vectors less the first, products, sums and quotients round in f32 (f64 for f64) in task order, sums of squares are
/// f64 sums of a fixed shape: bit-exact for any threads and blocks. Errors: invalid_argument (density, least_weight).
/// Cost: three reads of the models, and room for the variances of the largest tensor twice. On the CPU.
///
///     merge(cpu{}, sce_options{.density = 0.1}, base, tasks, out);
struct sce_options {
    double density = 0.1;
    double least_weight = 0.0;

    /// mergekit's: everything is selected where no density is given, and weights have a floor.
    [[nodiscard]] static sce_options as_in_mergekit() { return {.density = 1.0, .least_weight = 1e-6}; }
};

template <>
struct options_of<sce_options> {
    static constexpr option_table table{
        option_row("density", &sce_options::density, "share of entries kept", share_details(common_densities)),
        option_row("least-weight", &sce_options::least_weight,
            "below this sum of mean squares all tasks weigh the same; also the least divisor", {.at_least = 0})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{option_preset<sce_options>{"paper", "the paper", [] { return sce_options{}; }},
        option_preset<sce_options>{"mergekit", "mergekit", &sce_options::as_in_mergekit}};
};

namespace detail {

/// The variance over the task vectors of an entry; exactly 0 where they are equal.
template <class Pack, class Delta>
[[nodiscard]] TASKVEC_INLINE Pack variance_of(std::size_t tasks, const Delta& delta)
{
    using number = typename Pack::value_type;
    const Pack first = delta(std::size_t{0});
    const number count = static_cast<number>(tasks);
    Pack mean{}, sum{};
    for (std::size_t t = 1; t < tasks; ++t) { mean = mean + (delta(t) - first); }
    mean = mean / count;
    for (std::size_t t = 0; t < tasks; ++t) {
        const Pack away = (delta(t) - first) - mean;
        sum = sum + away * away;
    }
    return sum / count;
}

} // namespace detail

/// Selection, weights and erasure of one tensor.
template <arithmetic_element A>
struct sce_body {
    static constexpr bool watches = false;
    top_k_threshold<A> selected; ///< on variances
    const A* weights; ///< of each task
    A least; ///< the least divisor

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        const auto takes_part =
            materialised(mask_of(in, in.tasks(), [&](std::size_t t) TASKVEC_BODY { return in.delta(t); }));
        const pack sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return where(takes_part, in.delta(t)); });
        const pack sign = select(sum >= 0, filled<pack>(1), filled<pack>(-1));
        pack total{}, divisor{};
        in.each([&](std::size_t t) TASKVEC_BODY {
            const pack x = where(takes_part, in.delta(t));
            const auto agrees = x * sign > 0;
            total = total + where(agrees, weights[t] * x);
            divisor = divisor + where(agrees, filled<pack>(weights[t]));
            if (in.counts_tasks()) {
                in.count_of(0, t, x != 0);
                in.count_of(1, t, (x != 0) & ~agrees);
            }
        });
        return in.base() + total / select(divisor < least, filled<pack>(least), divisor);
    }
    /// Which entries are selected.
    template <class In, class Delta>
    [[nodiscard]] TASKVEC_INLINE typename In::mask mask_of(const In& in, std::size_t tasks, const Delta& delta) const
    {
        const auto bits = magnitude_of(detail::variance_of<typename In::pack>(tasks, delta));
        const auto magnitude = static_cast<signed_word<A>>(selected.magnitude);
        const signed_word<A> below = in.before(selected.equal_end) ? magnitude - 1 : magnitude;
        return bits > filled_words<typename In::words>(below);
    }
    [[nodiscard]] std::uint64_t constant_until(std::uint64_t place, std::uint64_t end) const noexcept
    {
        return selected.equal_end > place ? std::min(end, selected.equal_end) : end;
    }
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// The variances of a block's entries.
template <arithmetic_element A>
struct entry_variances {
    std::size_t tasks;
    A* out;

    template <int bytes, class Deltas>
    TASKVEC_INLINE void at(std::size_t i, const Deltas& x)
    {
        const auto variance = from_bits(magnitude_of(taskvec::detail::variance_of<pack<A, bytes>>(tasks, x)));
        store_row<A>(variance, out + i);
    }
};

/// Rows of task vectors with what is not selected as 0.
template <arithmetic_element A>
struct selected_entries {
    const sce_body<A>& rule;
    std::size_t tasks;
    std::uint64_t place; ///< of the first entry
    A* out; ///< rows, block_size apart

    template <int bytes, class Deltas>
    TASKVEC_INLINE void at(std::size_t i, const Deltas& x)
    {
        const auto selected = materialised(rule.mask_of(ruled_entries<A, bytes>{place + i, nullptr}, tasks, x));
        for (std::size_t t = 0; t < tasks; ++t) { store_row<A>(where(selected, x(t)), out + t * block_size + i); }
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

template <>
class method<sce_options> : public elementwise_method {
public:
    static constexpr bool on_device = false; // variances are ranked on the CPU
    static constexpr bool in_place = false;
    static constexpr std::size_t task_slots = 2;

    template <class Passes>
    method(Passes& passes, const sce_options& options)
        : tasks_(passes.tasks())
        , least_(options.least_weight)
    {
        static_cast<void>(top_k_count(options.density, 0)); // refuses what is no share
        const auto& models = passes.models();
        single_.resize(models.tensors().size());
        wide_.resize(models.tensors().size());
        if (options.density < 1) {
            walks_ = 2;
            for (std::size_t i = 0; i < models.tensors().size(); ++i) {
                if (models.tensors()[i].wide) { wide_[i] = threshold<double>(passes, i, options.density); }
                else {
                    single_[i] = threshold<float>(passes, i, options.density);
                }
            }
        }
        call_vector<double> weights;
        for (const auto& squares : squares_of(passes)) {
            double total = 0;
            const std::size_t n = models.tensors()[weights.size() / tasks_].size;
            for (const double square : squares) { total += square / static_cast<double>(n); }
            for (const double square : squares) {
                weights.push_back(n == 0 || total == 0 || total < least_ ? 1.0 / static_cast<double>(tasks_)
                                                                         : square / static_cast<double>(n) / total);
            }
        }
        single_weights_ = passes.keep(call_vector<float>(weights.begin(), weights.end()));
        wide_weights_ = passes.keep(std::move(weights));
    }
    /// Variances and weights are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const sce_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] sce_body<A> body(std::size_t tensor) const
    {
        const A least = std::max(static_cast<A>(least_), std::numeric_limits<A>::min());
        if constexpr (std::same_as<A, double>) { return {wide_[tensor], wide_weights_ + tensor * tasks_, least}; }
        else {
            return {single_[tensor], single_weights_ + tensor * tasks_, least};
        }
    }
    [[nodiscard]] unsigned walks() const noexcept { return walks_; }

private:
    /// The threshold on the variances of a tensor, as bits: a variance that overflows is the largest.
    template <arithmetic_element A, class Passes>
    [[nodiscard]] top_k_threshold<A> threshold(Passes& passes, std::size_t tensor, double density) const
    {
        const auto& models = passes.models();
        const cpu& policy = passes.policy();
        const std::size_t size = models.tensors()[tensor].size;
        std::pmr::vector<A> variances(size, memory_of(policy));
        for_each_block(policy, models, chunk_range{models.first_chunk(tensor), models.first_chunk(tensor + 1)}, 0,
            "variances", [&]<class B>(std::size_t, std::size_t, row_block<B>& rows) {
                if constexpr (std::same_as<A, B>) {
                    kernels::entry_variances<A> work{tasks_, variances.data() + rows.offset()};
                    detail::over_task_rows(detail::delta_rows(rows), rows.size(), work);
                }
            });
        const auto differing = static_cast<std::uint64_t>(size)
            - static_cast<std::uint64_t>(std::count(variances.begin(), variances.end(), A{0}));
        const auto k = static_cast<std::uint64_t>(std::floor(density * static_cast<double>(differing)));
        if (k == 0) { return {static_cast<bits_type<A>>(~sign_mask<A>), 0}; }
        model_options how;
        how.on_nonfinite = nonfinite::propagate;
        const const_model_ref all = detail::flat_model(host_view<const A>(variances.data(), size));
        const aligned_models ranked(nullptr, {&all, 1}, how);
        auto found = top_k_thresholds<A, storage_list<A>>(policy, ranked, all_chunks(ranked), std::array{k})[0];
        if (found.equal_end <= size) { found.equal_end += models.tensors()[tensor].position; }
        return found;
    }
    /// Σ τt² over what is selected of every tensor.
    template <class Passes>
    [[nodiscard]] call_vector<call_vector<double>> squares_of(Passes& passes) const
    {
        return tensor_sums<storage_of<Passes>>(
            passes.policy(), passes.models(), tasks_, tasks_, "weights", [&]<class A>(row_block<A>& rows, double* sum) {
                const sce_body<A> rule = body_of<A>(rows.tensor_index());
                const A* selected = detail::delta_rows(rows);
                if (walks_ > 1) {
                    kernels::selected_entries<A> work{rule, tasks_, rows.position(), rows.scratch(0)};
                    std::size_t at = 0;
                    while (at < rows.size()) {
                        const auto end = rule.constant_until(rows.position() + at, rows.position() + rows.size());
                        const auto until = static_cast<std::size_t>(end - rows.position());
                        work.place = rows.position() + at;
                        work.out = rows.scratch(0) + at;
                        detail::over_task_rows(selected + at, until - at, work);
                        at = until;
                    }
                    selected = rows.scratch(0);
                }
                for (std::size_t t = 0; t < tasks_; ++t) {
                    const A* const x = selected + t * block_size;
                    sum[t] = kernels::dot(x, x, rows.size());
                }
            });
    }
    /// What selects, without weights.
    template <arithmetic_element A>
    [[nodiscard]] sce_body<A> body_of(std::size_t tensor) const
    {
        if constexpr (std::same_as<A, double>) { return {wide_[tensor], nullptr, 0}; }
        else {
            return {single_[tensor], nullptr, 0};
        }
    }

    std::size_t tasks_;
    double least_;
    unsigned walks_ = 1;
    call_vector<top_k_threshold<float>> single_; // of each tensor; as they stand they keep everything
    call_vector<top_k_threshold<double>> wide_;
    const float* single_weights_ = nullptr;
    const double* wide_weights_ = nullptr;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, sce_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_SCE_HPP

// ---- taskvec/methods/slerp.hpp
#if !defined(TASKVEC_SINGLE_METHODS_SLERP_HPP)
#define TASKVEC_SINGLE_METHODS_SLERP_HPP
// SLERP: spherical linear interpolation between two models. Shoemake, "Animating rotation with quaternion curves"
// (SIGGRAPH 1985).
// SPDX-License-Identifier: Apache-2.0


#include <cmath>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor, as one flat vector: θ* = sin((1−t)Ω)/sinΩ·a + sin(tΩ)/sinΩ·b, with Ω the angle between a and b; and
/// (1−t)·a + t·b where |cosΩ| > 0.9995 or a norm is 0 (mergekit takes the angle to a zero tensor as a right one). a and
/// b are the two tasks, or, when there is one task, the base and that task. t = 0 gives a, t = 1 gives b; other values
/// than [0, 1] extrapolate. Norms and the angle are f64 sums of a fixed shape; the two factors are rounded to f32 (f64
/// for f64) once, then both products and the sum round: bit-exact for any threads and blocks. Cost: two reads of the
/// two models.
///
///     merge(cpu{}, slerp_options{.t = 0.3}, std::vector{a, b}, out);
struct slerp_options {
    double t = 0.5;
};

template <>
struct options_of<slerp_options> {
    static constexpr option_table table{
        option_row("t", &slerp_options::t, "how far to go, 0 is the first model and 1 the second")};
};

namespace detail {

/// The factors of a and b for one tensor.
struct slerp_factors {
    double of_a, of_b;
};
/// From the dots a·a, b·b and a·b.
[[nodiscard]] inline slerp_factors factors_of(const slerp_options& options, double aa, double bb, double ab)
{
    const double t = options.t, cosine = ab / (std::sqrt(aa) * std::sqrt(bb)); // NaN where a norm is 0
    if (!(std::abs(cosine) <= 0.9995)) { return {1 - t, t}; }
    const double angle = std::acos(cosine), sine = std::sin(angle);
    return {std::sin((1 - t) * angle) / sine, std::sin(t * angle) / sine};
}

/// Throws unless there are two models to go between. True where the first of them is the base.
inline bool check_slerp(const aligned_models& models)
{
    const bool from_base = models.task_count() == 1;
    if (models.task_count() > 2 || (from_base && !models.has_base())) {
        raise<invalid_argument>(error_code::task_count,
            message("SLERP goes between two models, and there ",
                models.task_count() == 1 ? "is one" : message("are ", models.task_count(), " tasks"),
                ": give two tasks, or a base and one task"));
    }
    return from_base;
}

} // namespace detail

template <>
class method<slerp_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    template <class Passes>
    method(Passes& passes, const slerp_options& options)
        : from_base_(detail::check_slerp(passes.models()))
    {
        const std::uint32_t a = from_base_ ? 0 : 1, b = a + 1;
        for (const auto& sum : tensor_dots(passes, {{a, a}, {b, b}, {a, b}}, false, "angles")) {
            factors_.push_back(detail::factors_of(options, sum[0], sum[1], sum[2]));
        }
    }
    /// Angles are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const slerp_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] pair_body<A> body(std::size_t tensor) const
    {
        return {static_cast<A>(factors_[tensor].of_a), static_cast<A>(factors_[tensor].of_b), from_base_};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; }

private:
    bool from_base_;
    call_vector<detail::slerp_factors> factors_; // for each tensor
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, slerp_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_SLERP_HPP

// ---- taskvec/methods/task_arithmetic.hpp
#if !defined(TASKVEC_SINGLE_METHODS_TASK_ARITHMETIC_HPP)
#define TASKVEC_SINGLE_METHODS_TASK_ARITHMETIC_HPP
// Task arithmetic: Ilharco et al., "Editing models with task arithmetic" (ICLR 2023).
// SPDX-License-Identifier: Apache-2.0


#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + λ·Σ wt·τt with τt = θt − θ0. λ < 0 forgets. The analogy "a is to b as c is to …",
/// θ0 + λ·(τc + τb − τa), is the weights {1, 1, −1} over the tasks {c, b, a}: see analogy(). Sums run in f32 (f64 for
/// f64) in task order; every product and sum rounds; bit-exact. With `normalize` the sum is divided by Σ wt, which may
/// not be 0: λ times the weighted mean of the task vectors.
///
///     merge(cpu{}, task_arithmetic_options{.lambda = 0.3}, base, tasks, out);
struct task_arithmetic_options {
    double lambda = 0.3;
    std::vector<double> weights{};
    bool normalize = false; ///< divide by the sum of the weights

    /// mergekit's: λ is 1 where none is given.
    [[nodiscard]] static task_arithmetic_options as_in_mergekit()
    {
        task_arithmetic_options options;
        options.lambda = 1.0;
        return options;
    }
};

template <>
struct options_of<task_arithmetic_options> {
    static constexpr option_table table{
        option_row("lambda", &task_arithmetic_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&task_arithmetic_options::weights),
        option_row("normalize-weights", &task_arithmetic_options::normalize, "divide by the sum of the weights")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<task_arithmetic_options>{"paper", "the paper", [] { return task_arithmetic_options{}; }},
        option_preset<task_arithmetic_options>{"mergekit", "mergekit", &task_arithmetic_options::as_in_mergekit}};
};

template <>
class method<task_arithmetic_options> : public elementwise_method {
public:
    template <class Passes>
    method(Passes& passes, const task_arithmetic_options& options)
        : sum_(passes, options, keep_all{}, false)
    { }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A> body(std::size_t tensor) const
    {
        return sum_.body<A>(keep_all{}, tensor);
    }

private:
    kept_sum sum_;
};

/// The analogy "a is to b as c is to …": θ0 + λ·(τc + τb − τa). Sums in that order.
///
///     merge(cpu{}, analogy(0.5), base, std::vector{c, b, a}, out);
[[nodiscard]] inline task_arithmetic_options analogy(double lambda = 1.0)
{
    return {.lambda = lambda, .weights = {1.0, 1.0, -1.0}};
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, task_arithmetic_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_METHODS_TASK_ARITHMETIC_HPP

// ---- taskvec/models/selected_rows.hpp
#if !defined(TASKVEC_SINGLE_MODELS_SELECTED_ROWS_HPP)
#define TASKVEC_SINGLE_MODELS_SELECTED_ROWS_HPP
// Rows of several tensors as one tensor: embeddings and heads of models whose vocabularies differ, lined up.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A run of rows that are taken together: row `first + i` is the mean of row `row + i` of each part.
struct row_run {
    /// A row of some tensor.
    struct part {
        std::size_t tensor = 0; ///< in the list that selected_rows is given
        std::uint64_t row = 0; ///< of the first row that is taken
    };
    std::uint64_t first = 0, count = 0; ///< of the rows that are made
    std::vector<part> parts{}; ///< one to be taken bit for bit, more to be averaged
};

/// A tensor whose rows (the first extent) are rows of others, or means of some. One row of another is it bit for bit;
/// a mean is summed in the order of its parts, in f32 (f64 where a tensor holds f64). Nothing is stored but the runs.
/// The tensors' memory outlives it. Throws shape_mismatch where rows differ in length or lie outside their tensors, and
/// where runs leave rows out.
///
///     const selected_rows rows({base, task}, {{0, 32000, {{0, 0}}}, {32000, 1, {{1, 32000}}}});
///     model.insert("embed_tokens.weight", rows.tensor(base.dtype)); // 32001 rows, the last one of the task
class selected_rows final : public operand_source {
public:
    /// `tensors`: of one row length each; `runs`: ascending, without gaps.
    selected_rows(std::vector<const_tensor_ref> tensors, std::vector<row_run> runs)
        : tensors_(std::move(tensors))
        , runs_(std::move(runs))
    {
        if (tensors_.empty()) { raise<shape_mismatch>(error_code::shape_invalid, "rows of no tensor were selected"); }
        shape_ = tensors_.front().shape;
        const auto inner = [](const extents& shape) { return extents(shape.begin() + !shape.empty(), shape.end()); };
        for (const auto& tensor : tensors_) {
            if (tensor.shape.empty() || inner(tensor.shape) != inner(shape_)) {
                raise<shape_mismatch>(error_code::shape_invalid,
                    message("rows of tensors of shape ", to_string(shape_), " and ", to_string(tensor.shape),
                        " cannot stand in one"));
            }
            operands_.push_back({static_cast<const std::byte*>(tensor.data),
                tensor.source ? tensor.source->type() : tensor.dtype, tensor.source});
            wide_ = wide_ || operands_.back().dtype == dtype::f64;
        }
        columns_ = element_count(inner(shape_));
        std::uint64_t rows = 0;
        for (const auto& run : runs_) {
            const bool inside = std::all_of(run.parts.begin(), run.parts.end(), [&](const row_run::part& part) {
                const auto held =
                    part.tensor < tensors_.size() ? static_cast<std::uint64_t>(tensors_[part.tensor].shape[0]) : 0;
                return part.row <= held && run.count <= held - part.row;
            });
            if (run.first != rows || run.parts.empty() || !inside) {
                raise<shape_mismatch>(error_code::shape_invalid,
                    message("the run of ", run.count, " rows at row ", run.first,
                        " does not follow the one before it, or takes rows that its tensors lack"));
            }
            rows += run.count;
        }
        shape_[0] = static_cast<std::int64_t>(rows);
    }

    /// The tensor that walks over models are given. `stored`: what a result is stored as where nothing else is asked.
    /// Refers to this.
    [[nodiscard]] const_tensor_ref tensor(taskvec::dtype stored) const&
    {
        return {nullptr, stored, shape_, {}, memory_space::host, 0, this};
    }
    void tensor(taskvec::dtype) const&& = delete; // name the owner first: its views would dangle
    /// As they were given.
    [[nodiscard]] const std::vector<row_run>& runs() const noexcept { return runs_; }
    [[nodiscard]] taskvec::dtype type() const noexcept override { return wide_ ? dtype::f64 : dtype::f32; }
    [[nodiscard]] unsigned stored_bits() const noexcept override
    {
        return tensors_.front().source ? tensors_.front().source->stored_bits()
                                       : bits_per_element(tensors_.front().dtype);
    }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        wide_ ? read_as(offset, count, static_cast<double*>(out)) : read_as(offset, count, static_cast<float*>(out));
    }

private:
    template <class A>
    void read_as(std::uint64_t offset, std::size_t count, A* out) const
    {
        if (count == 0) { return; }
        std::array<double, block_size> raw; // what with_elements() may need
        auto run = std::upper_bound(runs_.begin(), runs_.end(), offset,
            [&](std::uint64_t at, const row_run& one) { return at < one.first * columns_; });
        for (--run; count > 0; ++run) {
            std::uint64_t inner = offset - run->first * columns_;
            auto left = static_cast<std::size_t>(std::min<std::uint64_t>(count, run->count * columns_ - inner));
            offset += left;
            count -= left;
            while (left > 0) {
                const std::size_t n = std::min(left, block_size);
                for (std::size_t p = 0; p < run->parts.size(); ++p) {
                    const auto& part = run->parts[p];
                    detail::with_elements(operands_[part.tensor], part.row * columns_ + inner, n,
                        reinterpret_cast<std::byte*>(raw.data()), [&](const auto* values) {
                            for (std::size_t i = 0; i < n; ++i) {
                                const auto value = static_cast<A>(widen<A>(values[i]));
                                out[i] = p == 0 ? value : out[i] + value;
                            }
                        });
                }
                if (run->parts.size() > 1) {
                    for (std::size_t i = 0; i < n; ++i) { out[i] /= static_cast<A>(run->parts.size()); }
                }
                out += n;
                inner += n;
                left -= n;
            }
        }
    }

    std::vector<const_tensor_ref> tensors_;
    std::vector<aligned_tensor::operand> operands_;
    std::vector<row_run> runs_;
    extents shape_;
    std::uint64_t columns_ = 1;
    bool wide_ = false;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_SELECTED_ROWS_HPP

// ---- taskvec/models/weight_layout.hpp
#if !defined(TASKVEC_SINGLE_MODELS_WEIGHT_LAYOUT_HPP)
#define TASKVEC_SINGLE_MODELS_WEIGHT_LAYOUT_HPP
// How the weight of a linear layer is stored.
// SPDX-License-Identifier: Apache-2.0


#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// How a linear layer's weight lies in memory, row-major: as torch's Linear stores it, or as transformers' Conv1D does.
enum class weight_layout : std::uint8_t {
    out_in, ///< y = x·Wᵀ: a row for each output
    in_out ///< y = x·W: a row for each input
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_WEIGHT_LAYOUT_HPP

// ---- taskvec/reuse/parameter_count.hpp
#if !defined(TASKVEC_SINGLE_REUSE_PARAMETER_COUNT_HPP)
#define TASKVEC_SINGLE_REUSE_PARAMETER_COUNT_HPP
// How many parameters a way of reusing T fine-tuned models stores.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/select/sparse.hpp
#if !defined(TASKVEC_SINGLE_SELECT_SPARSE_HPP)
#define TASKVEC_SINGLE_SELECT_SPARSE_HPP
// Sparse vectors: the entries of a tensor that were kept, by ascending flat index; added to live weights and taken
// back.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/select/index_list.hpp
#if !defined(TASKVEC_SINGLE_SELECT_INDEX_LIST_HPP)
#define TASKVEC_SINGLE_SELECT_INDEX_LIST_HPP
// A list of flat indices that takes four bytes for each where the tensor allows it.
// SPDX-License-Identifier: Apache-2.0


#include <compare>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <memory_resource>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Flat indices, read as 64-bit numbers and held in 32 bits each until one of them needs more (those of a tensor of at
/// most 2^32 elements never do). The list does not order or check them. Copies take their memory from the default
/// resource, as all std::pmr containers do; a move keeps it.
///
///     index_list indices{3, 15};
///     for (const std::uint64_t index : indices) { … }
class index_list {
public:
    using value_type = std::uint64_t;
    /// Of the memory that holds the words.
    using allocator_type = std::pmr::polymorphic_allocator<std::byte>;

    index_list() = default;
    /// Empty, with memory from `memory`.
    explicit index_list(const allocator_type& memory)
        : narrow_(memory)
        , wide_(memory)
    { }
    /// `count` zeros, with room for the indices of a tensor of `elements` elements.
    index_list(std::size_t count, std::uint64_t elements, const allocator_type& memory = {})
        : index_list(memory)
    {
        is_wide_ = elements > 0 && elements - 1 > most;
        is_wide_ ? wide_.resize(count) : narrow_.resize(count);
    }
    index_list(std::initializer_list<std::uint64_t> indices, const allocator_type& memory = {})
        : index_list(memory)
    {
        for (const std::uint64_t index : indices) { push_back(index); }
    }

    [[nodiscard]] std::size_t size() const noexcept { return is_wide_ ? wide_.size() : narrow_.size(); }
    [[nodiscard]] bool empty() const noexcept { return size() == 0; }
    [[nodiscard]] std::uint64_t operator[](std::size_t i) const noexcept { return is_wide_ ? wide_[i] : narrow_[i]; }
    /// The last index; the list is not empty.
    [[nodiscard]] std::uint64_t back() const noexcept { return (*this)[size() - 1]; }
    /// True where an index takes eight bytes.
    [[nodiscard]] bool wide() const noexcept { return is_wide_; }
    /// The words: std::uint32_t, or std::uint64_t where wide().
    [[nodiscard]] const void* data() const noexcept
    {
        return is_wide_ ? static_cast<const void*>(wide_.data()) : static_cast<const void*>(narrow_.data());
    }

    /// Room for `count` indices, without another allocation, of the width that the list has now.
    void reserve(std::size_t count) { is_wide_ ? wide_.reserve(count) : narrow_.reserve(count); }
    /// Appends an index; the first that needs more than 32 bits widens the list.
    void push_back(std::uint64_t index)
    {
        if (!is_wide_ && index > most) {
            wide_.reserve(narrow_.capacity());
            wide_.assign(narrow_.begin(), narrow_.end());
            narrow_.clear();
            narrow_.shrink_to_fit();
            is_wide_ = true;
        }
        is_wide_ ? wide_.push_back(index) : narrow_.push_back(static_cast<std::uint32_t>(index));
    }
    /// Replaces `n` indices from number `first` on, which fit the width that the list has. Disjoint runs may be stored
    /// from several threads at once.
    void store(std::size_t first, const std::uint64_t* indices, std::size_t n) noexcept
    {
        for (std::size_t i = 0; i < n; ++i) {
            if (is_wide_) { wide_[first + i] = indices[i]; }
            else {
                narrow_[first + i] = static_cast<std::uint32_t>(indices[i]);
            }
        }
    }

    /// Goes through the indices, as numbers: random access, whose reference is a value.
    class iterator {
    public:
        using iterator_category = std::input_iterator_tag;
        using iterator_concept = std::random_access_iterator_tag;
        using value_type = std::uint64_t;
        using difference_type = std::ptrdiff_t;
        using pointer = void;
        using reference = std::uint64_t;

        iterator() = default;
        /// At place `at` of a list, which it refers to.
        iterator(const index_list& list, std::size_t at) noexcept
            : list_(&list)
            , at_(at)
        { }
        [[nodiscard]] std::uint64_t operator*() const noexcept { return (*list_)[at_]; }
        [[nodiscard]] std::uint64_t operator[](std::ptrdiff_t n) const noexcept { return *(*this + n); }
        iterator& operator++() noexcept { return *this += 1; }
        iterator& operator--() noexcept { return *this -= 1; }
        iterator operator++(int) noexcept
        {
            const iterator before = *this;
            ++*this;
            return before;
        }
        iterator operator--(int) noexcept
        {
            const iterator before = *this;
            --*this;
            return before;
        }
        /// n places on, or back.
        iterator& operator+=(std::ptrdiff_t n) noexcept
        {
            at_ += static_cast<std::size_t>(n);
            return *this;
        }
        /// n places back.
        iterator& operator-=(std::ptrdiff_t n) noexcept { return *this += -n; }
        /// n places on.
        friend iterator operator+(iterator i, std::ptrdiff_t n) noexcept { return i += n; }
        /// n places on.
        friend iterator operator+(std::ptrdiff_t n, iterator i) noexcept { return i += n; }
        /// n places back.
        friend iterator operator-(iterator i, std::ptrdiff_t n) noexcept { return i -= n; }
        /// How many places a is behind b.
        friend std::ptrdiff_t operator-(const iterator& a, const iterator& b) noexcept
        {
            return static_cast<std::ptrdiff_t>(a.at_) - static_cast<std::ptrdiff_t>(b.at_);
        }
        friend bool operator==(const iterator& a, const iterator& b) noexcept { return a.at_ == b.at_; }
        friend auto operator<=>(const iterator& a, const iterator& b) noexcept { return a.at_ <=> b.at_; }

    private:
        const index_list* list_ = nullptr;
        std::size_t at_ = 0;
    };
    [[nodiscard]] iterator begin() const noexcept { return {*this, 0}; }
    [[nodiscard]] iterator end() const noexcept { return {*this, size()}; }

    /// The same indices, whatever they are held in.
    friend bool operator==(const index_list& a, const index_list& b) noexcept
    {
        if (a.size() != b.size()) { return false; }
        for (std::size_t i = 0; i < a.size(); ++i) {
            if (a[i] != b[i]) { return false; }
        }
        return true;
    }

private:
    static constexpr std::uint64_t most = std::numeric_limits<std::uint32_t>::max();

    std::pmr::vector<std::uint32_t> narrow_{};
    std::pmr::vector<std::uint64_t> wide_{};
    bool is_wide_ = false;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SELECT_INDEX_LIST_HPP

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory_resource>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The kept entries of a tensor of this shape: `indices` ascend and are row-major flat, values[i] belongs to
/// indices[i]. A is the arithmetic type: f32, or f64 for f64 tensors. An f32 entry takes 8 bytes (12 in tensors of more
/// than 2^32 elements).
template <arithmetic_element A>
struct sparse_vector {
    using value_type = A;
    extents shape{}; ///< of the tensor
    index_list indices{}; ///< ascending, row-major flat
    std::pmr::vector<A> values{}; ///< one for each index

    /// How many entries are kept.
    [[nodiscard]] std::size_t kept() const noexcept { return indices.size(); }
    friend bool operator==(const sparse_vector&, const sparse_vector&) = default;
};

/// The same entries with a bit for each element of the tensor (least significant first) instead of indices: smaller
/// when more than one element in 32 is kept.
template <arithmetic_element A>
struct bitmask_vector {
    using value_type = A;
    extents shape{}; ///< of the tensor
    std::pmr::vector<std::uint8_t> bitmask{}; ///< bit i%8 of byte i/8 is entry i
    std::pmr::vector<A> values{}; ///< of the bits that are set, in order

    /// How many entries are kept.
    [[nodiscard]] std::size_t kept() const noexcept { return values.size(); }
    friend bool operator==(const bitmask_vector&, const bitmask_vector&) = default;
};

/// One tensor's kept entries, and a model's by tensor name.
using sparse_tensor = std::variant<sparse_vector<float>, sparse_vector<double>>;
/// A model's kept entries by tensor name.
using sparse_model = std::map<std::string, sparse_tensor>;

/// Entries kept in a whole model.
[[nodiscard]] inline std::uint64_t kept_entries(const sparse_model& model)
{
    std::uint64_t total = 0;
    for (const auto& [name, tensor] : model) {
        total += std::visit([](const auto& sparse) { return sparse.kept(); }, tensor);
    }
    return total;
}

namespace detail {
/// A value of T from memory of any alignment.
template <class T>
[[nodiscard]] T load(const void* data, std::size_t index) noexcept
{
    T value;
    std::memcpy(&value, static_cast<const std::byte*>(data) + index * sizeof(T), sizeof(T));
    return value;
}
} // namespace detail

/// Kept entries that lie in somebody else's memory, such as a mapped file: indices or a bitmask, and their values, of
/// any alignment. Who makes one has checked them: indices ascend and are in range, the bits are as many as the values.
struct sparse_view {
    std::string name = "values"; ///< of the tensor
    extents shape{}; ///< of the tensor
    std::uint64_t size = 0, kept = 0; ///< elements, and entries
    bool wide = false; ///< f64 values
    const std::byte* values = nullptr; ///< f32, or f64 where `wide`
    const std::byte* indices = nullptr; ///< 32-bit words, or 64-bit ones; null where there is a bitmask
    bool wide_indices = false; ///< indices are 64-bit words
    const std::uint8_t* bitmask = nullptr; ///< where there are no indices: bit i%8 of byte i/8 is entry i
    std::span<const std::uint64_t> before{}; ///< bits set before each run of `run` elements
    static constexpr std::uint64_t run = 65536; ///< elements of a run that `before` counts

    /// The flat index of kept entry number `entry`; where there are indices.
    [[nodiscard]] std::uint64_t index(std::uint64_t entry) const noexcept
    {
        return wide_indices ? detail::load<std::uint64_t>(indices, entry) : detail::load<std::uint32_t>(indices, entry);
    }
    /// The value of kept entry number `entry`, as an A.
    template <arithmetic_element A>
    [[nodiscard]] A value(std::uint64_t entry) const noexcept
    {
        return wide ? static_cast<A>(detail::load<double>(values, entry))
                    : static_cast<A>(detail::load<float>(values, entry));
    }
    /// Calls use(index, entry) for the kept entries in elements [from, to), in ascending order.
    template <class Use>
    void for_each(std::uint64_t from, std::uint64_t to, Use&& use) const
    {
        if (!bitmask) {
            std::uint64_t low = 0, high = kept; // the first entry at or after `from`
            while (low < high) {
                const std::uint64_t middle = low + (high - low) / 2;
                if (index(middle) < from) { low = middle + 1; }
                else {
                    high = middle;
                }
            }
            for (; low < kept; ++low) {
                const auto place = index(low);
                if (place >= to) { return; }
                use(place, low);
            }
            return;
        }
        if (from >= to) { return; }
        std::uint64_t entry = before[from / run];
        for (std::uint64_t byte = from / run * (run / 8); byte < from / 8; ++byte) {
            entry += static_cast<unsigned>(std::popcount(bitmask[byte]));
        }
        for (std::uint64_t byte = from / 8; byte * 8 < to; ++byte) {
            for (unsigned rest = bitmask[byte]; rest; rest &= rest - 1, ++entry) {
                const std::uint64_t place = 8 * byte + static_cast<unsigned>(std::countr_zero(rest));
                if (place >= from && place < to) { use(place, entry); }
            }
        }
    }
};

/// Throws invalid_argument unless a sparse vector keeps its own promises: as many values as indices, ascending, in
/// range.
template <arithmetic_element A>
void check_sparse(const sparse_vector<A>& sparse, std::string_view name = "values")
{
    const std::uint64_t size = element_count(sparse.shape, name);
    if (sparse.values.size() != sparse.indices.size()) {
        raise<invalid_argument>(error_code::delta_entries,
            message("delta of tensor '", name, "' has ", sparse.values.size(), " values for ", sparse.indices.size(),
                " indices"));
    }
    for (std::size_t i = 0; i < sparse.indices.size(); ++i) {
        if (sparse.indices[i] >= size) {
            raise<invalid_argument>(error_code::delta_entries,
                message("delta of tensor '", name, "' has index ", sparse.indices[i], "; the tensor has ", size,
                    " elements"));
        }
        if (i && sparse.indices[i] <= sparse.indices[i - 1]) {
            raise<invalid_argument>(error_code::delta_entries,
                message("delta of tensor '", name, "' has index ", sparse.indices[i], " after ", sparse.indices[i - 1],
                    "; indices must ascend"));
        }
    }
}
/// Throws invalid_argument unless a bitmask has a bit for each element, none beyond the last, and as many set as there
/// are values.
template <arithmetic_element A>
void check_sparse(const bitmask_vector<A>& masked, std::string_view name = "values")
{
    const std::size_t size = element_count(masked.shape, name), bytes = masked.bitmask.size();
    if (bytes != size / 8 + (size % 8 != 0)) {
        raise<invalid_argument>(error_code::delta_entries,
            message("a bitmask of ", bytes, " bytes for ", size, " elements; expected ", size / 8 + (size % 8 != 0)));
    }
    if (size % 8 && (masked.bitmask[bytes - 1] >> (size % 8)) != 0) {
        raise<invalid_argument>(error_code::delta_entries,
            message("a bitmask sets bit ",
                8 * (bytes - 1) + static_cast<std::size_t>(std::bit_width(unsigned{masked.bitmask[bytes - 1]})) - 1,
                " of ", size));
    }
    std::size_t set = 0;
    for (const std::uint8_t byte : masked.bitmask) { set += static_cast<unsigned>(std::popcount(byte)); }
    if (set != masked.values.size()) {
        raise<invalid_argument>(
            error_code::delta_entries, message("a bitmask sets ", set, " bits for ", masked.values.size(), " values"));
    }
}

/// Indices become bits, in memory from `memory`. Errors: as check_sparse().
template <arithmetic_element A>
[[nodiscard]] bitmask_vector<A> to_bitmask(
    const sparse_vector<A>& sparse, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
{
    check_sparse(sparse);
    const std::size_t size = element_count(sparse.shape);
    bitmask_vector<A> result{sparse.shape, std::pmr::vector<std::uint8_t>(size / 8 + (size % 8 != 0), 0, memory),
        std::pmr::vector<A>(sparse.values, memory)};
    for (const auto index : sparse.indices) {
        result.bitmask[index / 8] = static_cast<std::uint8_t>(result.bitmask[index / 8] | (1u << (index % 8)));
    }
    return result;
}

/// Bits become indices, in memory from `memory`. Errors: as check_sparse().
template <arithmetic_element A>
[[nodiscard]] sparse_vector<A> to_sparse(
    const bitmask_vector<A>& masked, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
{
    check_sparse(masked);
    sparse_vector<A> result{
        masked.shape, index_list(0, element_count(masked.shape), memory), std::pmr::vector<A>(masked.values, memory)};
    result.indices.reserve(masked.values.size());
    for (std::size_t byte = 0; byte < masked.bitmask.size(); ++byte) {
        for (unsigned bits = masked.bitmask[byte]; bits; bits &= bits - 1) {
            result.indices.push_back(byte * 8 + static_cast<unsigned>(std::countr_zero(bits)));
        }
    }
    return result;
}

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// live[indices[i]] += scale · values[i], in A, rounded once on storing.
template <storage_element T, arithmetic_element A>
TASKVEC_NOINLINE void add_at(storage_word<T>* live, const std::uint64_t* TASKVEC_RESTRICT indices,
    const A* TASKVEC_RESTRICT values, A scale, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A product = scale * values[i];
        live[indices[i]] = narrow_word<T>(widen_word<A, T>(live[indices[i]]) + product);
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// The view of a sparse vector, a bitmask or a view, checked, and what it needs beside them.
struct viewed_entries {
    sparse_view view;
    std::pmr::vector<std::uint64_t> before; // what view.before shows, of a bitmask in memory
};
template <arithmetic_element A>
[[nodiscard]] viewed_entries view_entries(
    const sparse_vector<A>& sparse, std::pmr::memory_resource* memory, std::string_view name = "values")
{
    check_sparse(sparse, name);
    viewed_entries result{{.name = std::string(name), .shape = sparse.shape}, std::pmr::vector<std::uint64_t>(memory)};
    result.view.size = element_count(sparse.shape, name);
    result.view.kept = sparse.kept();
    result.view.wide = std::same_as<A, double>;
    result.view.values = reinterpret_cast<const std::byte*>(sparse.values.data());
    result.view.indices = static_cast<const std::byte*>(sparse.indices.data());
    result.view.wide_indices = sparse.indices.wide();
    return result;
}
template <arithmetic_element A>
[[nodiscard]] viewed_entries view_entries(
    const bitmask_vector<A>& masked, std::pmr::memory_resource* memory, std::string_view name = "values")
{
    check_sparse(masked, name);
    viewed_entries result{{.name = std::string(name), .shape = masked.shape}, std::pmr::vector<std::uint64_t>(memory)};
    result.view.size = element_count(masked.shape, name);
    result.view.kept = masked.kept();
    result.view.wide = std::same_as<A, double>;
    result.view.values = reinterpret_cast<const std::byte*>(masked.values.data());
    result.view.bitmask = masked.bitmask.data();
    result.before.reserve(masked.bitmask.size() / (sparse_view::run / 8) + 1);
    std::uint64_t set = 0;
    for (std::size_t byte = 0; byte < masked.bitmask.size(); ++byte) {
        if (byte % (sparse_view::run / 8) == 0) { result.before.push_back(set); }
        set += static_cast<unsigned>(std::popcount(masked.bitmask[byte]));
    }
    result.view.before = result.before;
    return result;
}
[[nodiscard]] inline viewed_entries view_entries(const sparse_view& view, std::pmr::memory_resource* memory)
{
    return {view, std::pmr::vector<std::uint64_t>(memory)};
}

/// Entries of one sort that are handed on together.
inline constexpr std::size_t entry_batch = 512;

/// Calls use(first, places, n) for the entries first … first + n − 1 at these places, n ≤ entry_batch, each entry once:
/// pieces of 65,536 entries (of a bitmask: elements) in parallel.
template <class Use>
void for_each_entry_batch(const cpu& policy, const sparse_view& entries, const Use& use)
{
    const std::uint64_t length = entries.bitmask ? entries.size : entries.kept, piece = sparse_view::run;
    for_each_index(policy, static_cast<std::size_t>((length + piece - 1) / piece), [&](std::size_t p, std::size_t) {
        std::array<std::uint64_t, entry_batch> places;
        std::size_t n = 0;
        std::uint64_t first = entries.bitmask ? entries.before[p] : p * piece;
        const auto take = [&](std::uint64_t place) {
            places[n++] = place;
            if (n == entry_batch) {
                use(first, places.data(), n);
                first += n;
                n = 0;
            }
        };
        const std::uint64_t begin = p * piece, end = std::min(length, begin + piece);
        if (entries.bitmask) {
            entries.for_each(begin, end, [&](std::uint64_t place, std::uint64_t) { take(place); });
        }
        else {
            for (std::uint64_t entry = begin; entry < end; ++entry) { take(entries.index(entry)); }
        }
        if (n > 0) { use(first, places.data(), n); }
    });
}

/// Saves the words at the entries' places, then adds the entries.
template <storage_element T>
void add_entries(const cpu& policy, const sparse_view& entries, T* live, double scale, T* saved)
{
    using A = arithmetic_type<T>;
    for_each_entry_batch(policy, entries, [&](std::uint64_t first, const std::uint64_t* places, std::size_t n) {
        std::array<A, entry_batch> values;
        for (std::size_t i = 0; i < n; ++i) {
            values[i] = entries.value<A>(first + i);
            saved[first + i] = live[places[i]];
        }
        kernels::add_at<T, A>(kernels::words(live), places, values.data(), static_cast<A>(scale), n);
    });
}
template <storage_element T>
void put_entries_back(const cpu& policy, const sparse_view& entries, T* live, const T* saved)
{
    for_each_entry_batch(policy, entries, [&](std::uint64_t first, const std::uint64_t* places, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i) { live[places[i]] = saved[first + i]; }
    });
}

/// Throws unless entries fit flat weights of T.
template <storage_element T>
void check_fits(const sparse_view& entries, std::size_t size)
{
    if (entries.wide != std::same_as<arithmetic_type<T>, double>) {
        raise<dtype_mismatch>(error_code::delta_dtype,
            message("tensor '", entries.name, "' has dtype ", to_string(dtype_of<T>), "; the delta holds ",
                entries.wide ? "F64" : "F32", " values"));
    }
    if (entries.size != size) {
        raise<shape_mismatch>(error_code::delta_shape,
            message("tensor '", entries.name, "' has ", size, " elements; the delta is for shape ",
                to_string(entries.shape)));
    }
}

template <class T>
inline constexpr bool holds_entries = false;
template <class A>
inline constexpr bool holds_entries<sparse_vector<A>> = true;
template <class A>
inline constexpr bool holds_entries<bitmask_vector<A>> = true;
template <>
inline constexpr bool holds_entries<sparse_view> = true;

/// What the values are known to be while compiling; void for a view.
template <class Sparse>
struct entry_value {
    using type = void;
};
template <class Sparse>
    requires requires { typename Sparse::value_type; }
struct entry_value<Sparse> {
    using type = typename Sparse::value_type;
};
template <class Sparse, class T>
inline constexpr bool entries_suit = std::same_as<typename entry_value<Sparse>::type, void>
    || std::same_as<typename entry_value<Sparse>::type, arithmetic_type<T>>;

} // namespace detail

/// One tensor's kept entries: a sparse_vector, a bitmask_vector, or a sparse_view.
template <class X>
concept sparse_entries = detail::holds_entries<X>;

/// Adds sparse entries to live weights in place: live[index] += scale·value, in f32 (f64 for f64), rounded once. The
/// words that were there go to `saved`, for undo(): room for kept() words, in the order of the entries. Storage type of
/// `live`: any; f64 values need f64 weights. A bitmask is read as it is. Bit-exact. Errors: invalid_argument (indices,
/// room), shape_mismatch, dtype_mismatch (a view of other values); nothing is changed then. Cost: O(kept), and for a
/// bitmask O(elements / 8). Memory: none, but for a bitmask 8 bytes for each 65,536 elements.
///
///     std::vector<bf16> saved(delta.kept());
///     apply(cpu{}, delta, weights, saved);         // switch the task on
///     undo(cpu{}, delta, saved, weights);          // and off: the very words of before
template <sparse_entries Sparse, output_of<cpu> Live, class Saved>
    requires std::ranges::contiguous_range<Saved> && std::ranges::sized_range<Saved>
void apply(const cpu& policy, const Sparse& sparse, Live&& live, Saved&& saved, double scale = 1.0)
{
    const auto weights = as_view(live);
    using T = element_of<Live>;
    static_assert(detail::entries_suit<Sparse, T>,
        "an f64 delta belongs to f64 weights, an f32 delta to f32, bf16 or f16 weights");
    static_assert(std::same_as<std::ranges::range_value_t<Saved>, T>,
        "the saved words are of another storage type than the weights");
    static_assert(std::ranges::borrowed_range<Saved> || std::is_lvalue_reference_v<Saved>,
        "the saved words would be gone before undo(): name a container for them");
    const auto entries = detail::view_entries(sparse, memory_of(policy));
    detail::check_fits<T>(entries.view, weights.size());
    if (std::ranges::size(saved) != entries.view.kept) {
        raise<invalid_argument>(error_code::saved_words,
            message(
                "room for ", std::ranges::size(saved), " saved words; the delta has ", entries.view.kept, " entries"));
    }
    detail::add_entries(policy, entries.view, weights.data(), scale, std::ranges::data(saved));
}

/// The same with the saved words returned, in memory of the policy's resource.
///
///     const auto saved = apply(cpu{}, delta, weights);
template <sparse_entries Sparse, output_of<cpu> Live>
[[nodiscard]] auto apply(const cpu& policy, const Sparse& sparse, Live&& live, double scale = 1.0)
{
    const auto weights = as_view(live);
    using T = element_of<Live>;
    static_assert(detail::entries_suit<Sparse, T>,
        "an f64 delta belongs to f64 weights, an f32 delta to f32, bf16 or f16 weights");
    const auto entries = detail::view_entries(sparse, memory_of(policy));
    detail::check_fits<T>(entries.view, weights.size());
    std::pmr::vector<T> saved(entries.view.kept, memory_of(policy));
    detail::add_entries(policy, entries.view, weights.data(), scale, saved.data());
    return saved;
}

/// Puts back the words that apply() saved. Bit-exact: it restores, it never subtracts.
template <sparse_entries Sparse, class Saved, output_of<cpu> Live>
    requires std::ranges::contiguous_range<const Saved> && std::ranges::sized_range<const Saved>
void undo(const cpu& policy, const Sparse& sparse, const Saved& saved, Live&& live)
{
    const auto weights = as_view(live);
    using T = element_of<Live>;
    static_assert(std::same_as<std::ranges::range_value_t<const Saved>, T>,
        "the saved words are of another storage type than the weights");
    const auto entries = detail::view_entries(sparse, memory_of(policy));
    detail::check_fits<T>(entries.view, weights.size());
    if (std::ranges::size(saved) != entries.view.kept) {
        raise<invalid_argument>(error_code::saved_words,
            message(std::ranges::size(saved), " saved words for ", entries.view.kept, " entries"));
    }
    detail::put_entries_back(policy, entries.view, weights.data(), std::ranges::data(saved));
}

/// The entries of a model's tensors as views, checked, in name order; they live as long as the model does.
/// Errors: as check_sparse().
[[nodiscard]] inline std::vector<sparse_view> views(const sparse_model& model)
{
    std::vector<sparse_view> result;
    result.reserve(model.size());
    for (const auto& entry : model) {
        result.push_back(std::visit(
            [&](const auto& sparse) {
                return detail::view_entries(sparse, std::pmr::get_default_resource(), entry.first).view;
            },
            entry.second));
    }
    return result;
}
std::vector<sparse_view> views(const sparse_model&& model) = delete; // views of a temporary

namespace detail {

/// Calls use(entries, live weights of their type T, offset of the tensor's saved words) after checking all tensors.
/// Returns the bytes of the saved words: tensor after tensor, each from a multiple of 8 on.
template <class Use>
std::size_t for_each_live_tensor(std::span<const sparse_view> delta, const model_ref& live, const Use& use)
{
    const auto visit_pair = [&](const sparse_view& entries, std::size_t& at, const auto& then) {
        const tensor_ref* const weights = live.find(entries.name);
        if (!weights) {
            raise<invalid_argument>(error_code::tensor_missing,
                message("tensor '", entries.name, "' of the delta is missing in the model"));
        }
        visit_storage(weights->dtype, entries.name, [&]<class T>(std::type_identity<T>) {
            check_fits<T>(entries, entries.size);
            (void)flat_view<T>(*weights, entries.name);
            if (entries.shape != weights->shape) {
                raise<shape_mismatch>(error_code::delta_shape,
                    message("tensor '", entries.name, "' has shape ", to_string(weights->shape),
                        "; the delta is for shape ", to_string(entries.shape)));
            }
            then(entries, static_cast<T*>(weights->data), at);
            at += (entries.kept * sizeof(T) + 7) / 8 * 8;
        });
    };
    std::size_t bytes = 0, at = 0;
    for (const auto& entries : delta) {
        visit_pair(entries, bytes, [](const auto&, auto*, std::size_t) { });
    }
    for (const auto& entries : delta) { visit_pair(entries, at, use); }
    return bytes;
}
inline void check_saved_bytes(std::span<const std::byte> saved, std::size_t needed)
{
    if (saved.size() != needed) {
        raise<invalid_argument>(error_code::saved_words,
            message("the saved words of this delta take ", needed, " bytes (see saved_bytes()), not ", saved.size(),
                ": they do not belong to it"));
    }
    if (reinterpret_cast<std::uintptr_t>(saved.data()) % 8 != 0) {
        raise<invalid_argument>(error_code::tensor_layout, "memory for saved words must be aligned to 8 bytes");
    }
}

} // namespace detail

/// The words that a model-wide apply() replaced.
class saved_words {
public:
    saved_words() = default;
    /// Room for `bytes` bytes (see saved_bytes()), from `memory`.
    explicit saved_words(std::size_t bytes, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : words_((bytes + 7) / 8, memory)
    { }
    /// The memory, aligned to 8 bytes.
    [[nodiscard]] std::span<const std::byte> bytes() const& noexcept { return std::as_bytes(std::span(words_)); }
    /// The memory, aligned to 8 bytes, to be written.
    [[nodiscard]] std::span<std::byte> bytes() & noexcept { return std::as_writable_bytes(std::span(words_)); }
    std::span<const std::byte> bytes() const&& = delete;

private:
    std::pmr::vector<std::uint64_t> words_;
};

/// Bytes that the saved words of a model-wide apply() take: 8 for each 8 begun of each tensor. Errors: as apply().
[[nodiscard]] inline std::size_t saved_bytes(std::span<const sparse_view> delta, const model_ref& live)
{
    return detail::for_each_live_tensor(delta, live, [](const auto&, auto*, std::size_t) { });
}
[[nodiscard]] inline std::size_t saved_bytes(const sparse_model& delta, const model_ref& live)
{
    return saved_bytes(views(delta), live);
}

/// Adds a delta to the live weights of a model in place. The words that were there go to `saved`, for undo():
/// saved_bytes() bytes, aligned to 8. Errors: a tensor that is missing, of another shape or storage type; room of
/// another size; nothing is changed then.
///
///     const delta_file delta("task.delta.safetensors");
///     std::vector<double> memory(saved_bytes(delta.parts(), live) / 8);
///     apply(cpu{}, delta.parts(), live, std::as_writable_bytes(std::span(memory)));
template <cpu_policy Policy>
void apply(const Policy& policy, std::span<const sparse_view> delta, const model_ref& live, std::span<std::byte> saved,
    double scale = 1.0)
{
    detail::check_saved_bytes(saved, saved_bytes(delta, live));
    detail::for_each_live_tensor(delta, live, [&]<class T>(const sparse_view& entries, T* weights, std::size_t offset) {
        detail::add_entries(policy, entries, weights, scale, reinterpret_cast<T*>(saved.data() + offset));
    });
}
template <cpu_policy Policy>
void apply(const Policy& policy, const sparse_model& delta, const model_ref& live, std::span<std::byte> saved,
    double scale = 1.0)
{
    apply(policy, views(delta), live, saved, scale);
}

/// The same with the saved words returned, in memory of the policy's resource.
template <cpu_policy Policy>
[[nodiscard]] saved_words apply(
    const Policy& policy, std::span<const sparse_view> delta, const model_ref& live, double scale = 1.0)
{
    saved_words saved(saved_bytes(delta, live), memory_of(policy));
    apply(policy, delta, live, saved.bytes(), scale);
    return saved;
}
template <cpu_policy Policy>
[[nodiscard]] saved_words apply(
    const Policy& policy, const sparse_model& delta, const model_ref& live, double scale = 1.0)
{
    return apply(policy, views(delta), live, scale);
}

/// Takes a delta that apply() added out of the live weights again: the very words of before.
template <cpu_policy Policy>
void undo(
    const Policy& policy, std::span<const sparse_view> delta, std::span<const std::byte> saved, const model_ref& live)
{
    detail::check_saved_bytes(saved, saved_bytes(delta, live));
    detail::for_each_live_tensor(delta, live, [&]<class T>(const sparse_view& entries, T* weights, std::size_t offset) {
        detail::put_entries_back(policy, entries, weights, reinterpret_cast<const T*>(saved.data() + offset));
    });
}
template <cpu_policy Policy>
void undo(const Policy& policy, const sparse_model& delta, std::span<const std::byte> saved, const model_ref& live)
{
    undo(policy, views(delta), saved, live);
}
template <cpu_policy Policy>
void undo(const Policy& policy, std::span<const sparse_view> delta, const saved_words& saved, const model_ref& live)
{
    undo(policy, delta, saved.bytes(), live);
}
template <cpu_policy Policy>
void undo(const Policy& policy, const sparse_model& delta, const saved_words& saved, const model_ref& live)
{
    undo(policy, views(delta), saved.bytes(), live);
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(cpu, apply, sparse_arguments,
    "apply(policy, delta, live), or (policy, delta, live, saved): a sparse vector and a flat view, or a sparse_model "
    "and a "
    "taskvec::model_ref; or apply(policy, base, vector, lambda, output)")
TASKVEC_WRONG_CALLS(cpu, undo, any_arguments,
    "undo(policy, delta, saved, live): a sparse vector and flat views, or a sparse_model, the words that apply() saved "
    "and "
    "a taskvec::model_ref")

/// Receives the kept entries of a model: first how many there are of each included tensor, then the entries, in pieces
/// that come in any order and from several threads at once.
class sparse_sink {
public:
    virtual ~sparse_sink() = default;
    /// kept[i] entries of models.tensors()[i] will follow. Called once, before any write.
    virtual void begin(const aligned_models& models, std::span<const std::uint64_t> kept) = 0;
    /// Entries number `first` … `first + n − 1` of a tensor; they all lie in its elements [from, to), where `from` is a
    /// multiple of 64 and `to` too, or the tensor's end. n may be 0.
    virtual void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const float* values, std::size_t n) = 0;
    virtual void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const double* values, std::size_t n) = 0;
};

/// Collects kept entries in memory, which comes from `memory` and must outlive what take() returns.
class sparse_model_sink final : public sparse_sink {
public:
    /// What is collected lies in `memory`.
    explicit sparse_model_sink(std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : memory_(memory)
    { }
    void begin(const aligned_models& models, std::span<const std::uint64_t> kept) override
    {
        tensors_.clear();
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const auto& tensor = models.tensors()[i];
            const auto make = [&]<class A>(std::type_identity<A>) {
                sparse_vector<A> sparse{
                    tensor.shape, index_list(kept[i], tensor.size, memory_), std::pmr::vector<A>(kept[i], memory_)};
                tensors_.push_back(&model_.insert_or_assign(tensor.name, std::move(sparse)).first->second);
            };
            if (tensor.wide_base()) { make(std::type_identity<double>{}); }
            else {
                make(std::type_identity<float>{});
            }
        }
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t, std::uint64_t, const std::uint64_t* indices,
        const float* values, std::size_t n) override
    {
        store(tensor, first, indices, values, n);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t, std::uint64_t, const std::uint64_t* indices,
        const double* values, std::size_t n) override
    {
        store(tensor, first, indices, values, n);
    }
    /// Hands over what was collected.
    [[nodiscard]] sparse_model take() { return std::move(model_); }

private:
    template <arithmetic_element A>
    void store(std::size_t tensor, std::uint64_t first, const std::uint64_t* indices, const A* values, std::size_t n)
    {
        auto& sparse = std::get<sparse_vector<A>>(*tensors_[tensor]);
        sparse.indices.store(first, indices, n);
        std::copy_n(values, n, sparse.values.begin() + static_cast<std::ptrdiff_t>(first));
    }
    std::pmr::memory_resource* memory_;
    sparse_model model_;
    std::vector<sparse_tensor*> tensors_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SELECT_SPARSE_HPP

#include <cstdint>
#include <span>

namespace taskvec::inline TASKVEC_ABI {

/// |θ|: elements of all tensors of a model.
[[nodiscard]] inline std::uint64_t parameter_count(const const_model_ref& model)
{
    std::uint64_t total = 0;
    for (const auto& [name, tensor] : model) { total += tensor.size(name); }
    return total;
}

/// |θ| + Σ kept: a shared model (θ0 for Post-Pruning, θ* for PERU-FFT) and a sparse delta for each task. Indices are
/// not counted, as in the paper.
[[nodiscard]] inline std::uint64_t parameter_count(const const_model_ref& shared, std::span<const sparse_model> deltas)
{
    std::uint64_t total = parameter_count(shared);
    for (const auto& delta : deltas) { total += kept_entries(delta); }
    return total;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_REUSE_PARAMETER_COUNT_HPP

// ---- taskvec/reuse/peru_fft.hpp
#if !defined(TASKVEC_SINGLE_REUSE_PERU_FFT_HPP)
#define TASKVEC_SINGLE_REUSE_PERU_FFT_HPP
// PERU-FFT: a merged model and, for each task, the largest entries of what the merge lost. Jiang et al. (2023).
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/reuse/post_pruning.hpp
#if !defined(TASKVEC_SINGLE_REUSE_POST_PRUNING_HPP)
#define TASKVEC_SINGLE_REUSE_POST_PRUNING_HPP
// Post-Pruning: each task keeps the largest entries of its task vector beside a shared model. Jiang et al., "Effective
// and Parameter-Efficient Reusing Fine-Tuned Models" (2023).
// SPDX-License-Identifier: Apache-2.0


#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What is kept of a task vector: the top `density` by magnitude, over all tensors together or tensor by tensor.
struct post_pruning_options {
    double density = 0.1;
    taskvec::scope scope = taskvec::scope::model;
    trim_rule trim = trim_rule::exact;

    /// What the trim of TIES keeps in its paper's own code: one entry more than asked, and all its equals.
    [[nodiscard]] static post_pruning_options as_in_ties_merging()
    {
        post_pruning_options options;
        options.trim = trim_rule::reach_next;
        return options;
    }
};

template <>
struct options_of<post_pruning_options> {
    static constexpr option_table table{
        option_row("density", &post_pruning_options::density, "share of entries kept", share_details()),
        option_row("scope", &post_pruning_options::scope, "what a density counts over", {.unit = "SCOPE"}),
        option_row("trim", &post_pruning_options::trim, "keep exactly k entries, or all that reach the next",
            {.unit = "RULE"})};
    /// What TIES trims over, in the words of its presets.
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<post_pruning_options>{"paper", "the paper", [] { return post_pruning_options{}; }},
        option_preset<post_pruning_options>{
            "ties-merging", "the paper's own code", &post_pruning_options::as_in_ties_merging},
        option_preset<post_pruning_options>{
            "mergekit", "mergekit", [] { return post_pruning_options{.scope = scope::tensor}; }},
        option_preset<post_pruning_options>{
            "peft", "PEFT", [] { return post_pruning_options{.scope = scope::tensor}; }}};
};

namespace detail {
/// What one worker keeps of a chunk.
struct chunk_entries {
    explicit chunk_entries(std::pmr::memory_resource* memory)
        : indices(memory)
        , single(memory)
        , wide(memory)
    { }
    template <arithmetic_element V>
    [[nodiscard]] std::pmr::vector<V>& values() noexcept
    {
        if constexpr (std::same_as<V, double>) { return wide; }
        else {
            return single;
        }
    }
    std::pmr::vector<std::uint64_t> indices;
    std::pmr::vector<float> single;
    std::pmr::vector<double> wide;
};
} // namespace detail

/// v̂ = top-m% of τ = θ − θ0, for models aligned as base and one task: k = floor(density·n) entries by magnitude (lowest
/// index first among equals; with trim_rule::reach_next one more, and all its equals), of which zeros are not stored.
/// Values are f32, and f64 where the base stores f64. Streams: the entries go to `out` in pieces. Served as θ0 + v̂.
/// With a merged model as the base it is the second half of PERU-FFT. Bit-exact. Errors: invalid_argument,
/// nonfinite_error, cancelled. Cost: three reads of both models.
template <cpu_policy Policy>
void post_pruning(
    const Policy& policy, const post_pruning_options& options, const aligned_models& models, sparse_sink& out)
{
    if (!models.has_base() || models.task_count() != 1) {
        raise<invalid_argument>(error_code::task_count, "pruning takes one base and one task");
    }
    const detail::call_memory memory(policy.memory);
    const trim_thresholds thresholds(policy, models, options.density, options.scope, options.trim);
    // Calls entry(index, value) for what is kept of a block, with values of type V: zeros, also those that V rounds to,
    // are not stored.
    const auto keep = [&]<class V, class A>(
                          std::type_identity<V>, row_block<A>& rows, std::size_t tensor, auto&& entry) {
        const auto threshold = thresholds.get<A>(tensor, 0);
        const A* const values = rows.delta(0);
        for (std::size_t i = 0; i < rows.size(); ++i) {
            const V value = static_cast<V>(values[i]);
            if (value != 0 && threshold.keeps(values[i], rows.position() + i)) { entry(rows.offset() + i, value); }
        }
    };
    const auto visit_values = [&](std::size_t tensor, auto&& then) {
        models.tensors()[tensor].wide_base() ? then(std::type_identity<double>{}) : then(std::type_identity<float>{});
    };
    std::pmr::vector<std::uint64_t> first(models.chunks().size() + 1, 0, memory_of(policy));
    call_vector<std::uint64_t> kept(models.tensors().size(), 0);
    for_each_block(policy, models, all_chunks(models), 0, "count", [&](std::size_t index, std::size_t, auto& rows) {
        std::uint64_t count = 0;
        const std::size_t tensor = models.chunks()[index].tensor;
        visit_values(tensor, [&](auto type) { keep(type, rows, tensor, [&](std::uint64_t, auto) { ++count; }); });
        first[index] += count;
    });
    for (std::size_t index = 0; index < models.chunks().size(); ++index) {
        auto& total = kept[models.chunks()[index].tensor];
        total += std::exchange(first[index], total);
    }
    out.begin(models, kept);
    auto workspaces = make_workspaces(policy, models, models.chunks().size(), 0);
    std::pmr::vector<detail::chunk_entries> entries(memory_of(policy));
    for (std::size_t w = 0; w < workspaces.size(); ++w) { entries.emplace_back(memory_of(policy)); }
    detail::progress_meter meter(policy, "prune", models.bytes());
    for_each_index(policy, models.chunks().size(), [&](std::size_t index, std::size_t worker) {
        const tensor_chunk& piece = models.chunks()[index];
        workspaces[worker].with_block(models.tensors()[piece.tensor], [&](auto& rows) {
            visit_values(piece.tensor, [&]<class V>(std::type_identity<V> type) {
                auto& indices = entries[worker].indices;
                auto& values = entries[worker].template values<V>();
                indices.clear();
                values.clear();
                for_each_block_of(rows, piece, [&](auto& opened) {
                    keep(type, opened, piece.tensor, [&](std::uint64_t place, V value) {
                        indices.push_back(place);
                        values.push_back(value);
                    });
                });
                out.write(piece.tensor, first[index], piece.offset, piece.offset + piece.size, indices.data(),
                    values.data(), indices.size());
            });
        });
        if (!meter.advance(models.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
    });
}

/// Post-Pruning of models in memory. The entries lie in memory of the policy's resource.
///
///     sparse_model delta = post_pruning(cpu{}, {.density = 0.1}, base, task);
///     auto saved = apply(cpu{}, delta, live);   // live == base: now the pruned task
template <cpu_policy Policy>
[[nodiscard]] sparse_model post_pruning(const Policy& policy, const post_pruning_options& options,
    const const_model_ref& base, const const_model_ref& task, const model_options& how = {})
{
    sparse_model_sink sink(memory_of(policy));
    post_pruning(policy, options, aligned_models(&base, {&task, 1}, how), sink);
    return sink.take();
}

/// Post-Pruning of flat views.
template <input_of<cpu> Base, input_of<cpu> Task>
[[nodiscard]] auto post_pruning(const cpu& policy, const post_pruning_options& options, const Base& base,
    const Task& task, const model_options& how = {})
{
    using A = arithmetic_type<element_of<const Base>>;
    sparse_model model =
        post_pruning(policy, options, detail::flat_model(as_view(base)), detail::flat_model(as_view(task)), how);
    return std::get<sparse_vector<A>>(std::move(model.begin()->second));
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(cpu, post_pruning, any_arguments,
    "post_pruning(policy, options, base, task), of flat views or models; or (policy, options, aligned models, sink)")
#if !defined(__CUDACC__)
// Options in braces have no type of their own.
template <cpu_policy P, class... Arguments>
    requires(!detail::cpu_post_pruning_of_any_arguments::take<const P&, const post_pruning_options&, Arguments&...>)
auto post_pruning(const P&, const post_pruning_options&, const Arguments&...)
{
    using calls = detail::cpu_post_pruning_of_any_arguments;
    return calls::explain<detail::flaw_of_call<calls, P, post_pruning_options, Arguments...>(), P>();
}
#endif

// On taskvec::gpu this lives in a header of its own.
TASKVEC_CALLS_NEED_HEADER(post_pruning, reuse, "taskvec/device/reuse.hpp")

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_REUSE_POST_PRUNING_HPP

#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = merge(θ0, θ1 … θT) by any method, then ût = top-m% of ut = θt − θ* for each task, where θ* is the merged model
/// as it was stored and rounded. Task t is served as θ* + ût: apply() switches it on in place, undo() off again.
/// Parameters: |θ*| + Σ kept. `out` receives θ*. Errors and bits: as merge() and post_pruning().
///
///     auto deltas = peru_fft(cpu{}, task_arithmetic_options{.lambda = 0.3}, {.density = 0.1}, base, tasks, merged);
template <merge_method Options>
[[nodiscard]] std::vector<sparse_model> peru_fft(const cpu& policy, const Options& method,
    const post_pruning_options& residual, const const_model_ref& base, std::span<const const_model_ref> tasks,
    const model_ref& out, const model_options& how = {});

/// PERU-FFT over flat views.
template <merge_method Options, input_of<cpu> Base, tasks_of<cpu> Tasks, output_of<cpu> Out>
[[nodiscard]] auto peru_fft(const cpu& policy, const Options& method, const post_pruning_options& residual,
    const Base& base, const Tasks& tasks, Out&& out, const model_options& how = {})
{
    merge(policy, method, base, tasks, out, how);
    using A = arithmetic_type<element_of<Out>>;
    std::vector<sparse_vector<A>> deltas;
    for (const auto& task : tasks) { deltas.push_back(post_pruning(policy, residual, std::as_const(out), task, how)); }
    return deltas;
}

namespace detail {
/// Task t as it is served: where tensors may be missing, completed by the base's.
[[nodiscard]] inline const_model_ref task_served(
    const const_model_ref& base, const const_model_ref& task, const model_options& how)
{
    return how.on_missing == missing_tensors::base ? completed(task, base) : task;
}
/// How task t is lined up with the merged model.
[[nodiscard]] inline model_options residual_options(const model_options& how, std::size_t t)
{
    model_options pruning = how;
    pruning.base_label = "the merged model";
    pruning.output.reset();
    if (!how.labels.empty()) { pruning.labels = {how.labels[t]}; }
    return pruning;
}
} // namespace detail

template <merge_method Options>
std::vector<sparse_model> peru_fft(const cpu& policy, const Options& method, const post_pruning_options& residual,
    const const_model_ref& base, std::span<const const_model_ref> tasks, const model_ref& out, const model_options& how)
{
    merge(policy, method, base, tasks, out, how);
    std::vector<sparse_model> deltas;
    const const_model_ref merged(out);
    for (std::size_t t = 0; t < tasks.size(); ++t) {
        deltas.push_back(post_pruning(
            policy, residual, merged, detail::task_served(base, tasks[t], how), detail::residual_options(how, t)));
    }
    return deltas;
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(
    cpu, peru_fft, any_arguments, "peru_fft(policy, options of a merge, post_pruning_options, base, tasks, output)")
#if !defined(__CUDACC__)
// Options in braces have no type of their own.
template <cpu_policy P, class Options, class... Arguments>
    requires(!detail::cpu_peru_fft_of_any_arguments::take<const P&, const Options&, const post_pruning_options&,
        Arguments&...>)
auto peru_fft(const P&, const Options&, const post_pruning_options&, const Arguments&...)
{
    if constexpr (merge_method<Options>) {
        using calls = detail::cpu_peru_fft_of_any_arguments;
        return calls::explain<detail::flaw_of_call<calls, P, Options, post_pruning_options, Arguments...>(), P>();
    }
    else {
        static_assert(detail::check_method<Options>());
        return detail::no_result{};
    }
}
template <cpu_policy P, class Options, class... Arguments>
    requires(detail::only_constant<detail::cpu_peru_fft_of_any_arguments, P, const Options&,
        const post_pruning_options&, Arguments...>)
auto peru_fft(const P&, const Options&, const post_pruning_options&, Arguments&&...)
{
    return detail::cpu_peru_fft_of_any_arguments::explain<detail::call_flaw::constant, P>();
}
#endif

// On taskvec::gpu this lives in a header of its own.
TASKVEC_CALLS_NEED_HEADER(peru_fft, reuse, "taskvec/device/reuse.hpp")

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_REUSE_PERU_FFT_HPP

// ---- taskvec/reuse/sparse_addition.hpp
#if !defined(TASKVEC_SINGLE_REUSE_SPARSE_ADDITION_HPP)
#define TASKVEC_SINGLE_REUSE_SPARSE_ADDITION_HPP
// A base plus the kept entries of a task: how a pruned task is written out.
// SPDX-License-Identifier: Apache-2.0


#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A base plus sparse entries, as a merge method without tasks of its own: θ0 + scale·v̂, each product and sum in f32
/// (f64 for f64), rounded once. Tensors without an entry are copied bit for bit. The entries stay where they are, in
/// memory (views()) or in a mapped file (delta_file::parts()), as indices or as a bitmask. Bit-exact. Errors:
/// invalid_argument, shape_mismatch, dtype_mismatch; nonfinite_error for NaN or infinity in the base (see
/// model_options) or, if asked, among the entries. Memory: O(tensors).
///
///     const aligned_models models(&base, {&base, 1});
///     merge(cpu{}, sparse_addition_options{.entries = file.parts()}, models, sink);
struct sparse_addition_options {
    std::span<const sparse_view> entries{}; ///< each names its tensor; they outlive the options
    double scale = 1.0; ///< of every entry
    nonfinite on_nonfinite = nonfinite::propagate; ///< NaN and infinity among the entries
};

template <>
class method<sparse_addition_options> : public general_method {
public:
    method(const cpu_passes& passes, const sparse_addition_options& options)
        : scale_(options.scale)
        , on_nonfinite_(options.on_nonfinite)
    {
        const aligned_models& models = passes.models();
        detail::check_number("scale", {}, scale_);
        tensors_.assign(models.tensors().size(), nullptr);
        for (const auto& entries : options.entries) {
            const aligned_tensor* const place = detail::find_by_name(models.tensors(), entries.name);
            if (!place) {
                raise<invalid_argument>(error_code::tensor_unexpected,
                    message("tensor '", entries.name, "' of the delta is not a floating tensor of ",
                        models.options().base_label));
            }
            if (entries.shape != place->shape) {
                raise<shape_mismatch>(error_code::delta_shape,
                    message("tensor '", place->name, "' has shape ", to_string(place->shape), " in ",
                        models.options().base_label, "; the delta is for shape ", to_string(entries.shape)));
            }
            if (entries.wide && !place->wide) {
                raise<dtype_mismatch>(error_code::delta_dtype,
                    message("tensor '", place->name, "' is not F64 in ", models.options().base_label,
                        "; the delta holds F64 values"));
            }
            tensors_[static_cast<std::size_t>(place - models.tensors().data())] = &entries;
        }
    }
    template <arithmetic_element A>
    void operator()(row_block<A>& rows, A* merged, merge_tally&) const
    {
        std::memcpy(merged, rows.base(), rows.size() * sizeof(A));
        const auto* const entries = tensors_[rows.tensor_index()];
        if (!entries) { return; }
        entries->for_each(rows.offset(), rows.offset() + rows.size(), [&](std::uint64_t index, std::uint64_t entry) {
            const std::uint64_t place = index - rows.offset();
            const A value = entries->template value<A>(entry);
            if (!std::isfinite(value) && on_nonfinite_ == nonfinite::error) {
                raise<nonfinite_error>(error_code::not_finite,
                    message("the delta of tensor '", entries->name, "' holds ", std::isnan(value) ? "NaN" : "infinity",
                        " for index ", index,
                        ": make it again from sound models, or ask for non-finite values to propagate"));
            }
            kernels::add_at<A, A>(merged, &place, &value, static_cast<A>(scale_), 1);
        });
    }
    [[nodiscard]] bool nonfinite_beside(std::size_t tensor, std::uint64_t index) const
    {
        const auto* const entries = tensors_[tensor];
        bool found = false;
        if (entries) {
            entries->for_each(index, index + 1, [&](std::uint64_t, std::uint64_t entry) {
                found = found || !std::isfinite(entries->template value<double>(entry));
            });
        }
        return found;
    }

private:
    double scale_;
    nonfinite on_nonfinite_;
    std::vector<const sparse_view*> tensors_; // of each tensor
};

/// θ0 + scale·v̂ into a sink; the tensors are those of `models.outputs()`, aligned from the base alone. NaN and infinity
/// among the entries are what model_options say of those in the base.
///
///     const aligned_models models(&base, {&base, 1});
///     add_delta(cpu{}, models, file.parts(), 1.0, sink);
template <cpu_policy Policy>
void add_delta(const Policy& policy, const aligned_models& models, std::span<const sparse_view> delta, double scale,
    tensor_sink& out)
{
    merge(policy, sparse_addition_options{delta, scale, models.options().on_nonfinite}, models, out);
}
/// The same with entries in memory, among which NaN and infinity propagate.
template <cpu_policy Policy>
void add_delta(
    const Policy& policy, const aligned_models& models, const sparse_model& delta, double scale, tensor_sink& out)
{
    merge(policy, sparse_addition_options{views(delta), scale}, models, out);
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_REUSE_SPARSE_ADDITION_HPP

// ---- taskvec/search/lambda_grid.hpp
#if !defined(TASKVEC_SINGLE_SEARCH_LAMBDA_GRID_HPP)
#define TASKVEC_SINGLE_SEARCH_LAMBDA_GRID_HPP
// A number at each point of a grid of two scaling factors, and tables of numbers as CSV.
// SPDX-License-Identifier: Apache-2.0


#include <cmath>
#include <cstddef>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// values[i·lambda2.size() + j] belongs to (lambda1[i], lambda2[j]).
struct lambda_grid {
    std::vector<double> lambda1, lambda2; ///< factors along each side
    std::vector<double> values{}; ///< row by row

    /// The value at (lambda1[i], lambda2[j]), unchecked.
    [[nodiscard]] double& at(std::size_t i, std::size_t j) { return values[i * lambda2.size() + j]; }
    [[nodiscard]] double at(std::size_t i, std::size_t j) const { return values[i * lambda2.size() + j]; }
    /// The mean over all points; 0 for an empty grid.
    [[nodiscard]] double mean() const
    {
        double sum = 0;
        for (const double value : values) { sum += value; }
        return values.empty() ? 0 : sum / static_cast<double>(values.size());
    }
};

/// `count` equidistant values from `first` to `last`, both included.
[[nodiscard]] inline std::vector<double> equidistant(double first, double last, std::size_t count)
{
    std::vector<double> values(count);
    for (std::size_t i = 0; i < count; ++i) {
        values[i] =
            count == 1 ? first : first + (last - first) * static_cast<double>(i) / static_cast<double>(count - 1);
    }
    return values;
}

namespace detail {

inline lambda_grid empty_grid(std::span<const double> lambda1, std::span<const double> lambda2)
{
    for (const auto& factors : {lambda1, lambda2}) {
        if (factors.empty()) {
            raise<invalid_argument>(
                error_code::inputs_empty, "a grid needs at least one scaling factor along each side");
        }
        for (const double factor : factors) {
            if (!std::isfinite(factor)) {
                raise<invalid_argument>(error_code::parameter_not_finite, "a scaling factor of the grid is not finite");
            }
        }
    }
    lambda_grid grid{{lambda1.begin(), lambda1.end()}, {lambda2.begin(), lambda2.end()}};
    grid.values.resize(lambda1.size() * lambda2.size());
    return grid;
}

} // namespace detail

/// The grid as CSV, a line for each point: lambda1,lambda2,NAME. Numbers read back exactly.
inline void write_csv(std::ostream& out, const lambda_grid& grid, std::string_view value_name = "value")
{
    out << "lambda1,lambda2," << csv_field(value_name) << '\n';
    for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
            out << csv_number(grid.lambda1[i]) << ',' << csv_number(grid.lambda2[j]) << ',' << csv_number(grid.at(i, j))
                << '\n';
        }
    }
}

/// A square matrix (row-major, such as cosine_matrix()'s) as CSV: a first line and a first column of labels, with
/// `corner` where they meet. Throws invalid_argument when there are not as many labels as rows.
///
///     write_csv(file, cosine_matrix(cpu{}, models), names);
inline void write_csv(std::ostream& out, std::span<const double> matrix, std::span<const std::string> labels,
    std::string_view corner = {})
{
    const std::size_t n = labels.size();
    if (matrix.size() != n * n) {
        raise<invalid_argument>(
            error_code::list_length, message("write_csv: ", n, " labels for a matrix of ", matrix.size(), " elements"));
    }
    out << csv_field(corner);
    for (const auto& label : labels) { out << ',' << csv_field(label); }
    out << '\n';
    for (std::size_t i = 0; i < n; ++i) {
        out << csv_field(labels[i]);
        for (std::size_t j = 0; j < n; ++j) { out << ',' << csv_number(matrix[i * n + j]); }
        out << '\n';
    }
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SEARCH_LAMBDA_GRID_HPP

// ---- taskvec/search/lorahub.hpp
#if !defined(TASKVEC_SINGLE_SEARCH_LORAHUB_HPP)
#define TASKVEC_SINGLE_SEARCH_LORAHUB_HPP
// LoraHub: weights of a combination, sought without gradients. Huang et al., "LoraHub: efficient cross-task
// generalization via dynamic LoRA composition" (COLM 2024).
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>
#if !defined(TASKVEC_NO_EXCEPTIONS)
#include <exception>
#endif

namespace taskvec::inline TASKVEC_ABI {

/// What is sought: w in [−bound, bound]ᵀ that minimises L(w) + α·Σ|wt|, in at most so many evaluations. The defaults
/// are the paper's (its code takes the mean of |wt|, not their sum).
struct lorahub_options {
    double bound = 1.5;
    double alpha = 0.05; ///< factor of the L1 term
    std::size_t evaluations = 40;
    std::vector<double> start{}; ///< empty: all 0
};

template <>
struct options_of<lorahub_options> {
    static constexpr option_table table{
        option_row("bound", &lorahub_options::bound, "largest magnitude of a weight", {.above = 0}),
        option_row("l1", &lorahub_options::alpha, "factor of the sum of the weights' magnitudes", {.at_least = 0}),
        option_row("evaluations", &lorahub_options::evaluations, "scores that may be asked for", {.at_least = 1}),
        option_row("start", &lorahub_options::start, "weights to begin with, one for each task; none: all 0")};
};

/// One evaluation.
struct lorahub_candidate {
    std::vector<double> weights;
    double loss = 0; ///< L(w)
    double objective = 0; ///< L(w) + α·Σ|wt|
};

/// What lorahub() found.
struct lorahub_result {
    lorahub_candidate best; ///< of lowest objective; the first of equals
    std::vector<lorahub_candidate> history; ///< all evaluations, in order
};

/// What an optimiser is told beside the objective.
struct lorahub_problem {
    std::size_t dimension = 0; ///< one weight for each task
    double lower = 0, upper = 0; ///< bounds of every weight
    std::vector<double> start; ///< weights to begin with
    std::size_t evaluations = 0; ///< the budget
};

/// L(w) + α·Σ|wt|, as an optimiser calls it. Weights outside the bounds count as the bound.
using lorahub_objective = callback<double(std::span<const double> weights)>;

/// An optimiser: any callable that is given the problem and the objective, and returns when it has done what it could.
/// What it returns does not matter: the best candidate is taken from the history. One that does not stop when the
/// budget is spent is stopped (by an exception of no standard type out of the objective; with exceptions off going on
/// is an error).
template <class Optimizer>
concept lorahub_optimizer = std::invocable<Optimizer&, const lorahub_problem&, const lorahub_objective&>;

/// The loss of a candidate: of a view or model that is valid during the call, or of weights.
template <class Loss, class Candidate>
concept candidate_loss = requires(Loss& loss, const Candidate& candidate) {
    { loss(candidate) } -> std::convertible_to<double>;
};

/// A search that could not go on: a loss that failed or is not finite (kind nonfinite, or the kind and the code of what
/// the loss threw), or an optimiser that failed (backend_error). history() has what had been evaluated until then.
class lorahub_error : public error {
public:
    /// See error; `history` is handed on.
    lorahub_error(error_code code, error_kind kind, const std::string& message, std::vector<lorahub_candidate> history)
        : error(code, kind, message)
        , history_(std::move(history))
    { }
    /// What was evaluated until then.
    [[nodiscard]] const std::vector<lorahub_candidate>& history() const noexcept { return history_; }

private:
    std::vector<lorahub_candidate> history_;
};

namespace detail {

/// Counts, checks and keeps what an optimiser evaluates.
class lorahub_search {
public:
    lorahub_search(const lorahub_options& options, std::size_t tasks)
        : options_(options)
        , problem_{tasks, -options.bound, options.bound, options.start, options.evaluations}
    {
        if (tasks == 0) {
            raise<invalid_argument>(error_code::inputs_empty, "no task was given: at least one is needed");
        }
        if (!(options.bound > 0) || !std::isfinite(options.bound)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message(
                    "the bound of LoraHub's weights is ", options.bound, "; expected a positive number, such as 1.5"));
        }
        if (!(options.alpha >= 0) || !std::isfinite(options.alpha)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("alpha is ", options.alpha, "; expected a number that is not negative, such as 0.05"));
        }
        if (options.evaluations == 0) {
            raise<invalid_argument>(
                error_code::parameter_out_of_range, "LoraHub was given no evaluations: at least one is needed");
        }
        if (options.start.empty()) { problem_.start.assign(tasks, 0.0); }
        if (problem_.start.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message("LoraHub starts at ", problem_.start.size(), " weights for ", tasks,
                    " tasks: give one each, or none"));
        }
        for (const double weight : problem_.start) {
            if (!(std::abs(weight) <= options.bound)) {
                raise<invalid_argument>(error_code::parameter_out_of_range,
                    message("LoraHub starts at the weight ", weight, ", outside [", -options.bound, ", ", options.bound,
                        "]"));
            }
        }
    }

    template <class LossOfWeights, class Optimizer>
    lorahub_result run(LossOfWeights&& loss, Optimizer&& optimizer)
    {
        const lorahub_objective objective = [&](std::span<const double> weights) { return evaluate(weights, loss); };
#if defined(TASKVEC_NO_EXCEPTIONS)
        optimizer(std::as_const(problem_), objective);
#else
        try {
            optimizer(std::as_const(problem_), objective);
        }
        catch (const stop&) {
        }
        catch (const std::exception& failure) {
            if (!failed_) { remember(backend_code, backend_kind, message("the optimiser failed: ", failure.what())); }
        }
        catch (...) {
            if (!failed_) { remember(backend_code, backend_kind, "the optimiser failed"); }
        }
        if (failed_) { raise<lorahub_error>(code_, kind_, what_, std::move(history_)); }
#endif
        if (history_.empty()) {
            raise<lorahub_error>(
                backend_code, backend_kind, "the optimiser evaluated no candidate", std::move(history_));
        }
        std::size_t best = 0;
        for (std::size_t i = 1; i < history_.size(); ++i) {
            if (history_[i].objective < history_[best].objective) { best = i; }
        }
        return {history_[best], std::move(history_)};
    }

private:
    static constexpr error_code backend_code = error_code::optimizer_failed;
    static constexpr error_kind backend_kind = error_kind::backend_error;
    struct stop { }; // leaves an optimiser that has nothing more to learn

    template <class LossOfWeights>
    double evaluate(std::span<const double> weights, LossOfWeights& loss)
    {
        if (failed_ || history_.size() == options_.evaluations) {
#if defined(TASKVEC_NO_EXCEPTIONS)
            fail(backend_code, backend_kind,
                message("the optimiser asked for more than its budget of ", options_.evaluations, " evaluations"));
#else
            throw stop{};
#endif
        }
        if (weights.size() != problem_.dimension) {
            fail(backend_code, backend_kind,
                message("the optimiser gave ", weights.size(), " weights for ", problem_.dimension, " tasks"));
        }
        lorahub_candidate candidate{{weights.begin(), weights.end()}, 0, 0};
        double size = 0;
        for (double& weight : candidate.weights) {
            if (std::isnan(weight)) {
                fail(backend_code, backend_kind,
                    message("the optimiser gave NaN as a weight of candidate ", history_.size() + 1));
            }
            weight = std::clamp(weight, problem_.lower, problem_.upper);
            size += std::abs(weight);
        }
#if defined(TASKVEC_NO_EXCEPTIONS)
        candidate.loss = loss(std::span<const double>(candidate.weights));
#else
        try {
            candidate.loss = loss(std::span<const double>(candidate.weights));
        }
        catch (const error& failure) {
            fail(failure.code(), failure.kind(),
                message("the loss of ", describe(candidate), " failed: ", failure.what()));
        }
        catch (const std::exception& failure) {
            fail(backend_code, backend_kind, message("the loss of ", describe(candidate), " failed: ", failure.what()));
        }
#endif
        if (!std::isfinite(candidate.loss)) {
            fail(error_code::score_not_finite, error_kind::nonfinite,
                message("the loss of ", describe(candidate), " is ", candidate.loss,
                    ": a search needs a finite loss; lower the bound, or repair the loss"));
        }
        candidate.objective = candidate.loss + options_.alpha * size;
        history_.push_back(std::move(candidate));
        return history_.back().objective;
    }

    [[nodiscard]] std::string describe(const lorahub_candidate& candidate) const
    {
        std::string text = message("candidate ", history_.size() + 1, " (weights");
        for (const double weight : candidate.weights) { text += message(' ', weight); }
        return text + ")";
    }

    void remember(error_code code, error_kind kind, const std::string& what)
    {
        failed_ = true;
        code_ = code;
        kind_ = kind;
        what_ = what;
    }
    /// Remembers what went wrong, and leaves the optimiser, through which no error may be lost.
    [[noreturn]] void fail(error_code code, error_kind kind, const std::string& what)
    {
#if defined(TASKVEC_NO_EXCEPTIONS)
        raise<lorahub_error>(code, kind, what, std::move(history_));
#else
        remember(code, kind, what);
        throw stop{};
#endif
    }

    lorahub_options options_;
    lorahub_problem problem_;
    std::vector<lorahub_candidate> history_;
    bool failed_ = false;
    error_code code_ = backend_code;
    error_kind kind_ = backend_kind;
    std::string what_;
};

/// θ0 + Σ wt·τt, or Σ wt·θt without a base.
struct combination_options {
    std::vector<double> weights{};
};

} // namespace detail

template <>
class method<detail::combination_options> : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    template <class Passes>
    method(Passes& passes, const detail::combination_options& options)
        : from_base_(passes.models().has_base())
        , weights_(passes, task_weights(options.weights, passes.models()))
    { }
    template <arithmetic_element A, class Use>
    decltype(auto) with_body(std::size_t, Use&& use) const
    {
        if (from_base_) { return use(kept_sum_body<A>{{}, weights_.get<A>(), A{1}}); }
        return use(mean_body<A>{weights_.get<A>(), A{1}});
    }
    template <arithmetic_element A>
    [[nodiscard]] mean_body<A> body(std::size_t) const
    {
        return {weights_.get<A>(), A{1}};
    }

private:
    bool from_base_;
    kept_numbers weights_;
};

namespace detail {

/// Searches over one buffer, which holds the best candidate in the end.
template <class Loss, class Optimizer>
lorahub_result lorahub_in_memory(const cpu& policy, const lorahub_options& options, const aligned_models& models,
    const model_ref& out, Loss&& loss, Optimizer&& optimizer)
{
    memory_sink sink = sink_over(models, out);
    check_aliases(models, sink, false);
    lorahub_search search(options, models.task_count());
    std::vector<double> made;
    const auto combine_into_out = [&](std::span<const double> weights) {
        made.assign(weights.begin(), weights.end());
        merge(policy, combination_options{made}, models, sink);
    };
    auto result = search.run(
        [&](std::span<const double> weights) {
            combine_into_out(weights);
            return static_cast<double>(loss());
        },
        optimizer);
    if (made != result.best.weights) { combine_into_out(result.best.weights); }
    return result;
}

} // namespace detail

/// The search alone, for candidates that are made otherwise: `loss` is given the weights, one for each of `tasks`
/// tasks. Errors: invalid_argument (options), lorahub_error.
///
///     auto found = lorahub_search({}, 3, [&](std::span<const double> w) { return evaluate(space.at(w)); }, cobyla{});
template <candidate_loss<std::span<const double>> Loss, lorahub_optimizer Optimizer>
lorahub_result lorahub_search(const lorahub_options& options, std::size_t tasks, Loss&& loss, Optimizer&& optimizer)
{
    return detail::lorahub_search(options, tasks)
        .run([&](std::span<const double> weights) { return static_cast<double>(loss(weights)); }, optimizer);
}

/// LoraHub: minimises L(θ0 + Σ wt·τt) + α·Σ|wt| over w in [−1.5, 1.5]ᵀ by a gradient-free optimiser: 40 evaluations
/// from w = 0 on, α = 0.05. The paper optimises with Shiwa of Nevergrad; `cobyla` of merge/lorahub_nlopt.hpp, or any
/// callable, does it here.
///
/// `base` and `tasks` are models; adapters are models of their factors, around their common φ0, or without a base as in
/// the paper: Σ wt·φt. `out` has memory for one model that shares none with the inputs. Each candidate is one fused
/// combination into it, in task order, with the bits of task arithmetic with λ = 1; `loss` is then given `out` as a
/// const_model_ref. In the end `out` holds the best candidate. Errors: invalid_argument (options, models),
/// shape_mismatch, dtype_mismatch; lorahub_error, which keeps the history. Cost of a candidate: one read of all models,
/// one write, and the loss.
///
///     const auto loss = [&](const const_model_ref& model) { return few_shot_loss(model); };
///     auto found = lorahub(cpu{}, {}, base, tasks, out, loss, cobyla{}); // found.best.weights; out holds that model
template <candidate_loss<const_model_ref> Loss, lorahub_optimizer Optimizer>
lorahub_result lorahub(const cpu& policy, const lorahub_options& options, const const_model_ref& base,
    std::span<const const_model_ref> tasks, const model_ref& out, Loss&& loss, Optimizer&& optimizer,
    const model_options& how = {})
{
    const const_model_ref candidate(out);
    return detail::lorahub_in_memory(
        policy, options, aligned_models(&base, tasks, how), out, [&] { return loss(candidate); }, optimizer);
}
/// Without a base: L(Σ wt·θt).
template <candidate_loss<const_model_ref> Loss, lorahub_optimizer Optimizer>
lorahub_result lorahub(const cpu& policy, const lorahub_options& options, std::span<const const_model_ref> tasks,
    const model_ref& out, Loss&& loss, Optimizer&& optimizer, const model_options& how = {})
{
    const const_model_ref candidate(out);
    return detail::lorahub_in_memory(
        policy, options, aligned_models(nullptr, tasks, how), out, [&] { return loss(candidate); }, optimizer);
}

/// LoraHub over flat views of one length; `loss` is given a view of `out`.
///
///     const auto loss = [&](host_view<const float> theta) { return loss_at(theta); };
///     auto found = lorahub(cpu{}, {}, base, tasks, out, loss, cobyla{});
template <input_of<cpu> Base, tasks_of<cpu> Tasks, output_of<cpu> Out,
    candidate_loss<host_view<const element_of<Out>>> Loss, lorahub_optimizer Optimizer>
lorahub_result lorahub(const cpu& policy, const lorahub_options& options, const Base& base, const Tasks& tasks,
    Out&& out, Loss&& loss, Optimizer&& optimizer, model_options how = {})
{
    const const_model_ref base_model = detail::flat_model(as_view(base));
    const host_view<const element_of<Out>> candidate = as_view(out);
    how.output = dtype_of<element_of<Out>>;
    return detail::lorahub_in_memory(
        policy, options, aligned_models(&base_model, detail::flat_models(tasks), how),
        detail::flat_output(as_view(out)), [&] { return loss(candidate); }, optimizer);
}
/// Over flat views, without a base: L(Σ wt·xt).
template <tasks_of<cpu> Tasks, output_of<cpu> Out, candidate_loss<host_view<const element_of<Out>>> Loss,
    lorahub_optimizer Optimizer>
lorahub_result lorahub(const cpu& policy, const lorahub_options& options, const Tasks& tasks, Out&& out, Loss&& loss,
    Optimizer&& optimizer, model_options how = {})
{
    const host_view<const element_of<Out>> candidate = as_view(out);
    how.output = dtype_of<element_of<Out>>;
    return detail::lorahub_in_memory(
        policy, options, aligned_models(nullptr, detail::flat_models(tasks), how), detail::flat_output(as_view(out)),
        [&] { return loss(candidate); }, optimizer);
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SEARCH_LORAHUB_HPP

// ---- taskvec/search/subset_sweep.hpp
#if !defined(TASKVEC_SINGLE_SEARCH_SUBSET_SWEEP_HPP)
#define TASKVEC_SINGLE_SEARCH_SUBSET_SWEEP_HPP
// Every subset of the tasks, depth first: one axpy a subset, and the bits of the direct sum.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The subsets of n tasks that have at least `smallest` members (at least 1), each ascending, in lexicographic order:
/// {0,1}, {0,1,2}, …, {0,2}, … There are 2ⁿ of them, less those that are too small.
///
///     task_subsets(3, 2)   // {0,1}, {0,1,2}, {0,2}, {1,2}
[[nodiscard]] inline std::vector<std::vector<std::size_t>> task_subsets(std::size_t n, std::size_t smallest = 2)
{
    std::vector<std::vector<std::size_t>> all;
    std::vector<std::size_t> subset;
    // Depth first without recursion: extend by the next task while there is one, otherwise move the last member on.
    for (std::size_t next = 0;;) {
        if (next < n) {
            subset.push_back(next++);
            if (subset.size() >= smallest) { all.push_back(subset); }
        }
        else {
            if (subset.empty()) { return all; }
            next = subset.back() + 1;
            subset.pop_back();
        }
    }
}

/// Which subsets are visited, and the weights of their sums.
struct subset_sweep_options {
    std::vector<double> weights{}; ///< one for each task; empty: all 1
    std::size_t smallest = 2; ///< subsets of fewer tasks are not visited
};

/// What is called for each subset: the tasks in it, ascending, and Σ wt·τt over them.
template <class Visit, class T>
concept subset_visitor = requires(
    Visit& visit, std::span<const std::size_t> subset, host_view<const arithmetic_type<T>> sum) { visit(subset, sum); };

/// Visits the subsets of n task vectors that have at least `smallest` members (2ⁿ − (n + 1) of them by default) in
/// lexicographic order: {0,1}, {0,1,2}, …, {0,2}, … The sum handed to `visit` is a flat view of f32 (f64 for f64)
/// values, valid during the call, with the bits of combine() over the subset in task order: a stack of partial sums is
/// kept, and each subset adds one task vector to its parent's. To get a model, apply() the sum to the base, with λ or
/// λ/|subset|. Memory: n sums. Cost: one axpy a subset. Returns the number of subsets visited. Errors: invalid_argument
/// (no task vector, more than 63, wrong number of weights), shape_mismatch, nonfinite_error.
///
///     for_each_subset(cpu{}, std::vector{tau1, tau2, tau3}, {}, [&](auto subset, auto sum) {
///         apply(cpu{}, base, sum, 0.3, merged);
///         scores.push_back(evaluate(merged, subset));
///     });
template <storage_element T, subset_visitor<T> Visit>
std::size_t for_each_subset(const cpu& policy, const std::vector<host_view<const T>>& task_vectors,
    const subset_sweep_options& options, Visit&& visit)
{
    using A = arithmetic_type<T>;
    const std::size_t tasks = task_vectors.size();
    if (tasks == 0) {
        raise<invalid_argument>(
            error_code::inputs_empty, "for_each_subset: no task vector was given: at least one is needed");
    }
    if (tasks > 63) {
        raise<invalid_argument>(error_code::size_limit,
            message("for_each_subset: ", tasks, " tasks have too many subsets to visit; give at most 63"));
    }
    if (!options.weights.empty() && options.weights.size() != tasks) {
        raise<invalid_argument>(error_code::list_length,
            message("for_each_subset: ", options.weights.size(), " weights for ", tasks,
                " task vectors: give one each, or none"));
    }
    const std::size_t size = task_vectors[0].size();
    for (std::size_t t = 0; t < tasks; ++t) {
        if (task_vectors[t].size() != size) {
            raise<shape_mismatch>(error_code::input_size,
                message("for_each_subset: task vector ", t + 1, " has ", task_vectors[t].size(),
                    " elements, the first ", size));
        }
    }
    std::pmr::vector<std::pmr::vector<A>> sums(memory_of(policy)); // sums[d]: of the first d + 1 members of the subset
    std::vector<std::size_t> subset;
    std::size_t visited = 0;
    const auto add_task = [&](std::size_t task) {
        const std::size_t depth = subset.size();
        if (sums.size() == depth) { sums.emplace_back(size); }
        const A* const parent = depth == 0 ? nullptr : sums[depth - 1].data();
        A* const sum = sums[depth].data();
        const A weight = options.weights.empty() ? A(1) : static_cast<A>(options.weights[task]);
        constexpr std::size_t step = 65536;
        for_each_index(policy, (size + step - 1) / step, [&](std::size_t index, std::size_t) {
            std::array<A, block_size> row;
            for (std::size_t offset = index * step; offset < std::min(size, (index + 1) * step); offset += block_size) {
                const std::size_t n = std::min(block_size, size - offset);
                bits_type<A> largest = 0;
                const A* const x = detail::widened<A>(task_vectors[task], offset, n, row.data(), largest);
                if (largest >= exponent_mask<A>) { detail::find_nonfinite(task_vectors[task], task + 1, offset, n); }
                if (!parent) { kernels::begin_sum(sum + offset, x, weight, n); }
                else {
                    std::memcpy(sum + offset, parent + offset, n * sizeof(A));
                    kernels::accumulate(sum + offset, x, weight, n);
                }
            }
        });
        subset.push_back(task);
    };
    // Depth first without recursion: extend by the next task while there is one, otherwise move the last member on.
    for (std::size_t next = 0;;) {
        if (next < tasks) {
            add_task(next++);
            if (subset.size() >= std::max<std::size_t>(1, options.smallest)) {
                visit(std::span<const std::size_t>(subset), host_view<const A>(sums[subset.size() - 1].data(), size));
                ++visited;
            }
        }
        else {
            if (subset.empty()) { break; }
            next = subset.back() + 1;
            subset.pop_back();
        }
    }
    return visited;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SEARCH_SUBSET_SWEEP_HPP

// ---- taskvec/search/sweep.hpp
#if !defined(TASKVEC_SINGLE_SEARCH_SWEEP_HPP)
#define TASKVEC_SINGLE_SEARCH_SWEEP_HPP
// Searches over grids with a caller's score: λ, TIES density × λ, every subset of the tasks; kept as a table that a
// later run goes on with.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/search/task_space.hpp
#if !defined(TASKVEC_SINGLE_SEARCH_TASK_SPACE_HPP)
#define TASKVEC_SINGLE_SEARCH_TASK_SPACE_HPP
// The points θ0 + Σ λt·τt of a base and its task vectors, one at a time in one buffer; and losses over a plane of them.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The affine space θ0 + Σ λt·τt. Base and task vectors are flat views of one storage type and length, borrowed; for
/// adapters they are φ0 and φt − φ0.
///
///     task_space<float> space(base, {tau1, tau2});
///     auto theta = space.at(std::array{0.3, 0.3});
template <storage_element T>
class task_space {
public:
    /// Errors: invalid_argument (no task vector), shape_mismatch.
    task_space(host_view<const T> base, std::vector<host_view<const T>> task_vectors, cpu policy = {})
        : base_(base)
        , task_vectors_(std::move(task_vectors))
        , policy_(std::move(policy))
        , point_(base.size(), memory_of(policy_))
    {
        if (task_vectors_.empty()) {
            raise<invalid_argument>(
                error_code::inputs_empty, "task_space: no task vector was given: at least one is needed");
        }
        for (std::size_t t = 0; t < task_vectors_.size(); ++t) {
            if (task_vectors_[t].size() != base_.size()) {
                raise<shape_mismatch>(error_code::input_size,
                    message("task_space: task vector ", t + 1, " has ", task_vectors_[t].size(), " elements, the base ",
                        base_.size()));
            }
        }
    }

    /// How many task vectors it has.
    [[nodiscard]] std::size_t tasks() const noexcept { return task_vectors_.size(); }
    /// θ0.
    [[nodiscard]] host_view<const T> base() const noexcept { return base_; }
    /// τt.
    [[nodiscard]] host_view<const T> task_vector(std::size_t task) const { return task_vectors_[task]; }

    /// θ0 + Σ λt·τt over the tasks whose λ is not 0, in f32 (f64 for f64), in task order, rounded once: the bits of
    /// task arithmetic with λ = 1 and these weights. Valid until the next call. One pass. Errors: invalid_argument
    /// (another number of factors than tasks, or one that is not finite).
    [[nodiscard]] host_view<const T> at(std::span<const double> lambdas)
    {
        if (lambdas.size() != tasks()) {
            raise<invalid_argument>(error_code::list_length,
                message("task_space: ", lambdas.size(), " factors for ", tasks(), " task vectors: give one each"));
        }
        std::vector<std::size_t> active;
        for (std::size_t t = 0; t < tasks(); ++t) {
            if (!std::isfinite(lambdas[t])) {
                raise<invalid_argument>(error_code::parameter_not_finite,
                    message("task_space: the factor of task ", t + 1, " is not finite"));
            }
            if (lambdas[t] != 0) { active.push_back(t); }
        }
        using A = arithmetic_type<T>;
        constexpr std::size_t step = 65536;
        for_each_index(policy_, (point_.size() + step - 1) / step, [&](std::size_t index, std::size_t) {
            std::array<A, block_size> row, sum;
            bits_type<A> ignored = 0;
            for (std::size_t offset = index * step; offset < std::min(point_.size(), (index + 1) * step);
                offset += block_size) {
                const std::size_t n = std::min(block_size, point_.size() - offset);
                if (active.empty()) {
                    std::copy_n(base_.data() + offset, n, point_.data() + offset);
                    continue;
                }
                for (std::size_t k = 0; k < active.size(); ++k) {
                    const A* const x = detail::widened<A>(task_vectors_[active[k]], offset, n, row.data(), ignored);
                    const A weight = static_cast<A>(lambdas[active[k]]);
                    k == 0 ? kernels::begin_sum(sum.data(), x, weight, n)
                           : kernels::accumulate(sum.data(), x, weight, n);
                }
                kernels::add_scaled(sum.data(), detail::widened<A>(base_, offset, n, row.data(), ignored), A(1), n);
                kernels::narrow(sum.data(), point_.data() + offset, n);
            }
        });
        return {point_.data(), point_.size()};
    }

private:
    host_view<const T> base_;
    std::vector<host_view<const T>> task_vectors_;
    cpu policy_;
    std::pmr::vector<T> point_; // in memory of the policy's resource
};

/// A number for a model: a loss, an accuracy.
template <class F, class T>
concept loss_function = requires(F& f, host_view<const T> parameters) {
    { f(parameters) } -> std::convertible_to<double>;
};

/// The plane of two of a space's tasks.
struct plane_options {
    std::size_t task1 = 0, task2 = 1; ///< places of the tasks in the space
    std::vector<double> lambda1{}, lambda2{}; ///< factors along each side; an empty lambda2 repeats lambda1
};

namespace detail {
template <class T>
void check_plane(const task_space<T>& space, const plane_options& plane)
{
    if (plane.task1 >= space.tasks() || plane.task2 >= space.tasks() || plane.task1 == plane.task2) {
        raise<invalid_argument>(error_code::index_out_of_range,
            message("a plane needs two different tasks below ", space.tasks(), ", got ", plane.task1, " and ",
                plane.task2));
    }
}
inline lambda_grid grid_of(const plane_options& plane)
{
    return empty_grid(plane.lambda1, plane.lambda2.empty() ? plane.lambda1 : plane.lambda2);
}
} // namespace detail

/// The loss at θ0 + λ1·τ1 + λ2·τ2 over a grid. Cost: one combination and one call of `loss` for each point.
/// Errors: invalid_argument.
///
///     const auto loss = [&](auto theta) { return model.loss(theta); };
///     auto plane = loss_plane(space, {.lambda1 = equidistant(-1, 2, 31)}, loss);
template <storage_element T, loss_function<T> Loss>
[[nodiscard]] lambda_grid loss_plane(task_space<T>& space, const plane_options& plane, Loss&& loss)
{
    detail::check_plane(space, plane);
    lambda_grid grid = detail::grid_of(plane);
    std::vector<double> lambdas(space.tasks(), 0.0);
    for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
            lambdas[plane.task1] = grid.lambda1[i];
            lambdas[plane.task2] = grid.lambda2[j];
            grid.at(i, j) = static_cast<double>(loss(space.at(lambdas)));
        }
    }
    return grid;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SEARCH_TASK_SPACE_HPP

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <map>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A point of a sweep, as its coordinates are written in a table, and its score.
struct sweep_row {
    std::vector<std::string> point; ///< the coordinates, in the order of the table's columns
    double score = 0; ///< as the scoring function gave it
};

/// Points and scores, in the order in which they came. A sweep skips what its table holds already, so a sweep that was
/// cut short is gone on with by handing it the table that it left: write_csv() and read_sweep() carry one over.
class sweep_table {
public:
    /// Without columns it takes those of the first sweep that it is given to.
    explicit sweep_table(std::vector<std::string> columns = {})
        : columns_(std::move(columns))
    { }

    /// The names of the coordinates.
    [[nodiscard]] const std::vector<std::string>& columns() const noexcept { return columns_; }
    /// The rows, in the order in which they came.
    [[nodiscard]] const std::vector<sweep_row>& rows() const noexcept { return rows_; }
    /// Whether this point has been scored.
    [[nodiscard]] bool contains(const std::vector<std::string>& point) const { return places_.contains(point); }
    /// The row of highest score, or of lowest; the first of equals; nullptr when there is none.
    [[nodiscard]] const sweep_row* best(bool highest = true) const noexcept
    {
        const sweep_row* found = nullptr;
        for (const auto& row : rows_) {
            if (!found || (highest ? row.score > found->score : row.score < found->score)) { found = &row; }
        }
        return found;
    }
    /// Errors: invalid_argument (another number of coordinates than columns, a point that is there already),
    /// nonfinite_error.
    void add(std::vector<std::string> point, double score)
    {
        if (point.size() != columns_.size()) {
            raise<invalid_argument>(error_code::sweep_table,
                message("a point of ", point.size(), " coordinates in a table of ", columns_.size(), " columns"));
        }
        if (!std::isfinite(score)) {
            raise<nonfinite_error>(error_code::score_not_finite,
                message("the score of ", describe(point), " is ", score, ": a score is a finite number"));
        }
        if (!places_.emplace(point, rows_.size()).second) {
            raise<invalid_argument>(
                error_code::sweep_table, message("the point ", describe(point), " is in the table already"));
        }
        rows_.push_back({std::move(point), score});
    }
    /// "density=0.2 lambda=0.5", for messages.
    [[nodiscard]] std::string describe(const std::vector<std::string>& point) const
    {
        std::string text;
        for (std::size_t i = 0; i < point.size(); ++i) {
            text += (i ? " " : "") + (i < columns_.size() ? columns_[i] + "=" : std::string()) + point[i];
        }
        return text;
    }
    /// Gives an empty table its columns. Throws invalid_argument if it has others.
    void require_columns(const std::vector<std::string>& columns)
    {
        if (columns_.empty()) { columns_ = columns; }
        if (columns_ != columns) {
            std::string found, wanted;
            for (const auto& name : columns_) { found += (found.empty() ? "" : ",") + name; }
            for (const auto& name : columns) { wanted += (wanted.empty() ? "" : ",") + name; }
            raise<invalid_argument>(error_code::sweep_table,
                message("the table has the columns ", found, "; this sweep writes ", wanted, ": start a new table"));
        }
    }

private:
    std::vector<std::string> columns_;
    std::vector<sweep_row> rows_;
    std::map<std::vector<std::string>, std::size_t> places_;
};

/// The table as CSV: its columns and `score`, a line for each row. Scores read back exactly.
inline void write_csv(std::ostream& out, const sweep_table& table)
{
    for (const auto& name : table.columns()) { out << csv_field(name) << ','; }
    out << "score\n";
    for (const auto& row : table.rows()) {
        for (const auto& coordinate : row.point) { out << csv_field(coordinate) << ','; }
        out << csv_number(row.score) << '\n';
    }
}

namespace detail {

/// The fields of CSV text after RFC 4180, line by line; empty lines are left out.
inline std::vector<std::vector<std::string>> csv_lines(std::string_view text, std::string_view file)
{
    std::vector<std::vector<std::string>> lines;
    std::vector<std::string> fields;
    std::string field;
    bool quoted = false, begun = false;
    const auto end_field = [&] {
        fields.push_back(std::exchange(field, {}));
        begun = false;
    };
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (quoted) {
            if (c != '"') { field += c; }
            else if (i + 1 < text.size() && text[i + 1] == '"') {
                field += text[++i];
            }
            else {
                quoted = false;
            }
        }
        else if (c == '"' && !begun) {
            quoted = begun = true;
        }
        else if (c == ',') {
            end_field();
        }
        else if (c == '\n') {
            if (!fields.empty() || begun) {
                end_field();
                lines.push_back(std::exchange(fields, {}));
            }
        }
        else if (c != '\r') {
            field += c;
            begun = true;
        }
    }
    if (quoted) {
        raise<format_error>(error_code::csv_syntax, "ends inside a quoted field", std::string(file), text.size());
    }
    if (!fields.empty() || begun) {
        end_field();
        lines.push_back(std::move(fields));
    }
    return lines;
}

} // namespace detail

/// The table that write_csv() wrote. `file` is named in messages. Throws format_error for text that is no such table.
[[nodiscard]] inline sweep_table read_sweep(std::string_view csv, std::string_view file = "")
{
    const auto fail = [&](const std::string& what) {
        raise<format_error>(error_code::csv_syntax, what, std::string(file));
    };
    auto lines = detail::csv_lines(csv, file);
    if (lines.empty() || lines[0].back() != "score") {
        fail("is no table of scores: its first line must end in 'score'");
    }
    lines[0].pop_back();
    sweep_table table(lines[0]);
    for (std::size_t i = 1; i < lines.size(); ++i) {
        auto& line = lines[i];
        if (line.size() != table.columns().size() + 1) {
            fail(message("line ", i + 1, " has ", line.size(), " fields; expected ", table.columns().size() + 1,
                ": remove the line"));
        }
        double score = 0;
        const std::string text = std::move(line.back());
        line.pop_back();
        const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), score);
        if (text.empty() || failure != std::errc{} || end != text.data() + text.size() || !std::isfinite(score)) {
            fail(message("line ", i + 1, " has the score '", text, "'; expected a number: remove the line"));
        }
        if (table.contains(line)) {
            fail(message("line ", i + 1, " repeats ", table.describe(line), ": remove the line"));
        }
        table.add(std::move(line), score);
    }
    return table;
}

/// The λ that the papers try: 0, 0.05 … 1, each the double nearest to its decimal.
[[nodiscard]] inline std::vector<double> lambda_steps()
{
    std::vector<double> steps;
    for (int i = 0; i <= 20; ++i) { steps.push_back(i / 20.0); }
    return steps;
}

/// How a sweep goes on: how many at once, and what is called when rows were added.
struct sweep_options {
    std::size_t at_once = 1; ///< candidates that are scored at the same time, each in a buffer of its own: for a score
                             ///< that may be called from several threads
    callback<void(const sweep_table&)>
        keep{}; ///< called after rows were added, on the calling thread: to write the table to a file
};

template <>
struct options_of<sweep_options> {
    static constexpr option_table table{
        option_row("jobs", &sweep_options::at_once, "candidates that are scored at the same time", {.at_least = 1})};
};

/// A score that is told which tasks, ascending, are in the model: to score it on these tasks alone.
template <class F, class T>
concept subset_score = requires(F& f, host_view<const T> parameters, std::span<const std::size_t> subset) {
    { f(parameters, subset) } -> std::convertible_to<double>;
};

namespace detail {

/// Makes candidates one after the other, scores as many at once as is allowed, and keeps the scores in the order of the
/// points.
template <storage_element T, class Score>
    requires(loss_function<Score, T> || subset_score<Score, T>)
class sweep_runner {
public:
    sweep_runner(const cpu& policy, std::size_t size, sweep_table& table, Score& score, const sweep_options& options)
        : policy_(policy)
        , table_(&table)
        , score_(&score)
        , options_(options)
        , buffers_(std::max<std::size_t>(1, options.at_once), memory_of(policy))
    {
        for (auto& buffer : buffers_) { buffer.resize(size); }
        policy_.progress = {};
    }
    [[nodiscard]] bool wanted(const std::vector<std::string>& point) const
    {
        return !table_->contains(point) && std::find(points_.begin(), points_.end(), point) == points_.end();
    }
    template <class Make>
    void add(std::vector<std::string> point, Make&& make, std::span<const std::size_t> subset = {})
    {
        auto& buffer = buffers_[points_.size()];
        make(host_view<T>(buffer.data(), buffer.size()));
        points_.push_back(std::move(point));
        subsets_.emplace_back(subset.begin(), subset.end());
        if (points_.size() == buffers_.size()) { flush(); }
    }
    void flush()
    {
        const auto points = std::exchange(points_, {});
        const auto subsets = std::exchange(subsets_, {});
        std::vector<double> scores(points.size(), std::numeric_limits<double>::quiet_NaN()); // NaN: not known
        const auto keep = [&] {
            bool added = false;
            for (std::size_t i = 0; i < points.size(); ++i) {
                if (std::isnan(scores[i])) { continue; }
                table_->add(points[i], scores[i]);
                added = true;
            }
            if (added && options_.keep) { options_.keep(*table_); }
        };
        const auto score_all = [&] {
            cpu workers = policy_;
            workers.threads = static_cast<unsigned>(points.size());
            for_each_index(workers, points.size(), [&](std::size_t i, std::size_t) {
                const double found = score(i, subsets[i]);
                if (!std::isfinite(found)) {
                    raise<nonfinite_error>(error_code::score_not_finite,
                        message("the score of ", table_->describe(points[i]), " is ", found,
                            ": a score is a finite number"));
                }
                scores[i] = found;
            });
        };
#if defined(TASKVEC_NO_EXCEPTIONS)
        score_all();
#else
        try {
            score_all();
        }
        catch (...) {
            keep();
            throw;
        }
#endif
        keep();
    }

private:
    double score(std::size_t i, const std::vector<std::size_t>& subset) const
    {
        const host_view<const T> model(buffers_[i].data(), buffers_[i].size());
        if constexpr (subset_score<Score, T>) {
            return static_cast<double>((*score_)(model, std::span<const std::size_t>(subset)));
        }
        else {
            return static_cast<double>((*score_)(model));
        }
    }

    cpu policy_;
    sweep_table* table_;
    Score* score_;
    sweep_options options_;
    std::pmr::vector<std::pmr::vector<T>> buffers_;
    std::vector<std::vector<std::string>> points_;
    std::vector<std::vector<std::size_t>> subsets_; ///< of the points, where a sweep is over subsets
};

inline void check_steps(std::span<const double> values, std::string_view what)
{
    if (values.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, message("a sweep needs at least one ", what));
    }
    for (const double value : values) {
        if (!std::isfinite(value)) {
            raise<invalid_argument>(
                error_code::parameter_not_finite, message("a ", what, " of the sweep is not finite"));
        }
    }
}

} // namespace detail

/// Scores θ0 + λ·τ for each λ, with τ any merged task vector: columns `lambda`. Flat views; candidates have the storage
/// type of `base` and the bits of apply(). `score` is given a view that is valid during the call. What the table holds
/// is skipped; when a score throws or is not finite, the rows before it are kept and the error is passed on. Errors:
/// invalid_argument, shape_mismatch, nonfinite_error. Cost: one pass and one score for each λ.
///
///     sweep_table table;
///     const auto score = [&](host_view<const float> theta) { return accuracy(theta); };
///     sweep_lambda(cpu{}, base, tau, lambda_steps(), table, score);
///     table.best()->point; // {"0.3"}
template <input_of<cpu> Base, input_of<cpu> Vector, loss_function<std::remove_const_t<element_of<const Base>>> Score>
void sweep_lambda(const cpu& policy, const Base& base, const Vector& vector, std::span<const double> lambdas,
    sweep_table& table, Score&& score, const sweep_options& options = {})
{
    using T = std::remove_const_t<element_of<const Base>>;
    detail::check_steps(lambdas, "lambda");
    table.require_columns({"lambda"});
    detail::sweep_runner<T, std::remove_reference_t<Score>> runner(policy, as_view(base).size(), table, score, options);
    for (const double lambda : lambdas) {
        std::vector<std::string> point{csv_number(lambda)};
        if (runner.wanted(point)) {
            runner.add(std::move(point), [&](host_view<T> out) { apply(policy, base, vector, lambda, out); });
        }
    }
    runner.flush();
}

/// Scores TIES over density × λ: columns `density,lambda`. `ties` gives everything else but `densities`. Candidates
/// have the bits of merge(). Otherwise as sweep_lambda(). Cost of a point: one TIES merge and one score.
///
///     sweep_ties(cpu{}, {}, base, tasks, std::array{0.1, 0.2, 0.5}, lambda_steps(), table, score);
template <input_of<cpu> Base, tasks_of<cpu> Tasks, loss_function<std::remove_const_t<element_of<const Base>>> Score>
void sweep_ties(const cpu& policy, const ties_options& ties, const Base& base, const Tasks& tasks,
    std::span<const double> densities, std::span<const double> lambdas, sweep_table& table, Score&& score,
    const sweep_options& options = {})
{
    using T = std::remove_const_t<element_of<const Base>>;
    detail::check_steps(densities, "density");
    detail::check_steps(lambdas, "lambda");
    table.require_columns({"density", "lambda"});
    detail::sweep_runner<T, std::remove_reference_t<Score>> runner(policy, as_view(base).size(), table, score, options);
    for (const double density : densities) {
        for (const double lambda : lambdas) {
            std::vector<std::string> point{csv_number(density), csv_number(lambda)};
            if (!runner.wanted(point)) { continue; }
            ties_options here = ties;
            here.density = density;
            here.densities.clear();
            here.lambda = lambda;
            runner.add(std::move(point), [&](host_view<T> out) { merge(policy, here, base, tasks, out); });
        }
    }
    runner.flush();
}

/// Scores θ0 + λ·Σ wt·τt over every subset of the task vectors, depth first by for_each_subset(): columns
/// `tasks,lambda`, the tasks counted from 0 and joined by `+`. One axpy a subset, one pass and one score a point.
/// `score` may also take the subset: score(view, std::span<const std::size_t>). Otherwise as sweep_lambda().
///
///     // "0+1", "0+1+2", "0+2", "1+2"
///     sweep_subsets(cpu{}, base, {tau0, tau1, tau2}, {}, std::array{0.3}, table, score);
template <storage_element T, class Score>
    requires(loss_function<Score, T> || subset_score<Score, T>)
void sweep_subsets(const cpu& policy, host_view<const T> base, const std::vector<host_view<const T>>& task_vectors,
    const subset_sweep_options& subsets, std::span<const double> lambdas, sweep_table& table, Score&& score,
    const sweep_options& options = {})
{
    detail::check_steps(lambdas, "lambda");
    table.require_columns({"tasks", "lambda"});
    detail::sweep_runner<T, std::remove_reference_t<Score>> runner(policy, base.size(), table, score, options);
    for_each_subset(policy, task_vectors, subsets, [&](std::span<const std::size_t> subset, auto sum) {
        std::string members;
        for (const std::size_t task : subset) { members += (members.empty() ? "" : "+") + std::to_string(task); }
        for (const double lambda : lambdas) {
            std::vector<std::string> point{members, csv_number(lambda)};
            if (runner.wanted(point)) {
                runner.add(std::move(point), [&](host_view<T> out) { apply(policy, base, sum, lambda, out); }, subset);
            }
        }
    });
    runner.flush();
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_SEARCH_SWEEP_HPP

// ---- taskvec/statistics/aligned_grams.hpp
#if !defined(TASKVEC_SINGLE_STATISTICS_ALIGNED_GRAMS_HPP)
#define TASKVEC_SINGLE_STATISTICS_ALIGNED_GRAMS_HPP
// The Gram matrices of tasks lined up with the models that they belong to, and checked.
// SPDX-License-Identifier: Apache-2.0


#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// A linear layer that has Gram matrices.
struct gram_layer {
    std::size_t tensor = 0;
    std::size_t in = 0, out = 0;
    weight_layout layout = weight_layout::out_in;
    std::vector<aligned_tensor::operand> grams{}; // of each task
};

/// What messages call the Grams of a task.
[[nodiscard]] inline std::string grams_label(
    const std::vector<std::string>& labels, std::size_t t, const aligned_models& models)
{
    return labels.empty() ? "the Grams of " + models.label(t) : labels[t];
}

/// The linear layers of aligned models that have Gram matrices, a matrix for each task. Checked: that every matrix
/// belongs to a weight of rank 2, is in×in, is there for every task or for none, and can be read in memory space
/// `space`. What the matrices hold is checked by stored_gram, when it is read.
class aligned_grams {
public:
    aligned_grams(const aligned_models& models, std::span<const const_model_ref> grams,
        const std::vector<std::string>& labels, const std::function<weight_layout(std::string_view)>& layout_of,
        memory_space space = memory_space::host)
    {
        const std::size_t tasks = models.task_count();
        if (grams.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(
                    grams.size(), " sets of Grams for ", tasks, " tasks: give one each, in the order of the tasks"));
        }
        if (!labels.empty() && labels.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(labels.size(), " labels for ", tasks, " sets of Grams: give one each, or none"));
        }
        for (std::size_t t = 0; t < tasks; ++t) {
            for (const auto& [name, gram] : grams[t]) {
                if (!detail::find_by_name(models.outputs(), name)) {
                    raise<invalid_argument>(error_code::tensor_unexpected,
                        message("tensor '", name, "' of ", grams_label(labels, t, models),
                            " is not in the models: these are the statistics of another model"));
                }
            }
        }
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            std::size_t present = 0, absent = 0;
            for (std::size_t t = 0; t < tasks; ++t) { grams[t].find(tensor.name) ? ++present : (absent = t); }
            if (present == 0) { continue; }
            if (present < tasks) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message("tensor '", tensor.name, "' is missing in ", grams_label(labels, absent, models),
                        " but not in the other Grams: collect it for every task, or for none"));
            }
            if (tensor.shape.size() != 2) {
                raise<shape_mismatch>(error_code::statistics_shape,
                    message("tensor '", tensor.name, "' of shape ", to_string(tensor.shape),
                        " has a Gram matrix, but only the weight of a linear layer (rank 2) can have one"));
            }
            const weight_layout layout = layout_of ? layout_of(tensor.name) : weight_layout::out_in;
            const bool rows_are_outputs = layout == weight_layout::out_in;
            gram_layer one{i, static_cast<std::size_t>(tensor.shape[rows_are_outputs ? 1 : 0]),
                static_cast<std::size_t>(tensor.shape[rows_are_outputs ? 0 : 1]), layout, {}};
            for (std::size_t t = 0; t < tasks; ++t) {
                one.grams.push_back(
                    check_gram(*grams[t].find(tensor.name), one, tensor, grams_label(labels, t, models), space));
            }
            for (const auto& gram : one.grams) {
                companions_.push_back({i, gram.data, byte_count(gram.dtype, one.in * one.in)});
            }
            if (tensor.size > 0) { layers_.push_back(std::move(one)); }
        }
    }

    /// In the order of tensors().
    [[nodiscard]] const std::vector<gram_layer>& layers() const noexcept { return layers_; }
    [[nodiscard]] const std::vector<companion>& companions() const noexcept { return companions_; }

private:
    static aligned_tensor::operand check_gram(const const_tensor_ref& gram, const gram_layer& one,
        const aligned_tensor& tensor, const std::string& where, memory_space space)
    {
        const auto in = static_cast<std::int64_t>(one.in);
        if (gram.shape != extents{in, in}) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("tensor '", tensor.name, "' has a Gram matrix of shape ", to_string(gram.shape), " in ", where,
                    "; expected ", to_string({in, in}), " for a weight of shape ", to_string(tensor.shape), " stored ",
                    one.layout == weight_layout::out_in ? "out×in (say so if it is in×out)"
                                                        : "in×out (say so if it is out×in)"));
        }
        if (!is_storage(gram.dtype)) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("tensor '", tensor.name, "' has dtype ", to_string(gram.dtype), " in ", where, "; expected ",
                    storage_names(), ": convert it"));
        }
        if (gram.space != space || !gram.contiguous() || (!gram.data && one.in > 0)) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", tensor.name, "' of ", where, " must be contiguous ",
                    space == memory_space::host ? "host" : "device", " memory: copy it first"));
        }
        return {static_cast<const std::byte*>(gram.data), gram.dtype};
    }

    std::vector<gram_layer> layers_;
    std::vector<companion> companions_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_STATISTICS_ALIGNED_GRAMS_HPP

// ---- taskvec/statistics/fisher_accumulator.hpp
#if !defined(TASKVEC_SINGLE_STATISTICS_FISHER_ACCUMULATOR_HPP)
#define TASKVEC_SINGLE_STATISTICS_FISHER_ACCUMULATOR_HPP
// Diagonal Fisher information, built from per-example gradients: what Fisher merging needs to know of the data.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// sum += weight · x², in f64
template <arithmetic_element A>
TASKVEC_NOINLINE void accumulate_squares(
    double* TASKVEC_RESTRICT sum, const A* TASKVEC_RESTRICT x, double weight, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const double value = static_cast<double>(x[i]);
        const double square = value * value;
        const double product = weight * square;
        sum[i] = sum[i] + product;
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

/// Sums of squared gradients over the parameters of a model, in f64, and the number of examples they come from. What
/// the two kinds of Fisher share: empirical_fisher_accumulator and expected_fisher_accumulator say which gradients they
/// take.
class fisher_accumulator {
public:
    /// Examples seen.
    [[nodiscard]] std::uint64_t examples() const noexcept { return examples_; }
    /// The parameters' names and shapes.
    [[nodiscard]] const std::vector<tensor_spec>& parameters() const noexcept { return parameters_; }
    /// The mean of tensor `index` of parameters(): its diagonal Fisher. Throws invalid_argument before the first
    /// example.
    [[nodiscard]] std::vector<double> fisher(std::size_t index) const
    {
        if (examples_ == 0) {
            raise<invalid_argument>(
                error_code::inputs_empty, "no example was given: the Fisher information is a mean over examples");
        }
        std::vector<double> mean = sums_[index];
        for (double& value : mean) { value /= static_cast<double>(examples_); }
        return mean;
    }

protected:
    /// `parameters` gives names and shapes; its data are not read.
    explicit fisher_accumulator(const const_model_ref& parameters)
    {
        for (const auto& [name, tensor] : parameters) {
            if (!is_storage(tensor.dtype) && !is_fp8(tensor.dtype)) { continue; } // integers have no gradient
            parameters_.push_back({name, tensor.dtype, tensor.shape});
            sums_.emplace_back(tensor.size(name), 0.0);
        }
    }
    ~fisher_accumulator() = default;
    fisher_accumulator(const fisher_accumulator&) = default;
    fisher_accumulator(fisher_accumulator&&) = default;
    fisher_accumulator& operator=(const fisher_accumulator&) = default;
    fisher_accumulator& operator=(fisher_accumulator&&) = default;

    /// Checks a gradient whole before any of it counts.
    void check(const cpu& policy, const const_model_ref& gradient) const
    {
        for (const auto& [name, tensor] : gradient) {
            if (!has(name)) {
                raise<invalid_argument>(error_code::tensor_unexpected,
                    message("the gradient has tensor '", name, "', which the model has not"));
            }
        }
        for (const auto& spec : parameters_) {
            const const_tensor_ref* const tensor = gradient.find(spec.name);
            if (!tensor) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message(
                        "the gradient lacks tensor '", spec.name, "': pass zeros for a parameter that is not used"));
            }
            if (tensor->shape != spec.shape) {
                raise<shape_mismatch>(error_code::statistics_shape,
                    message("the gradient of '", spec.name, "' has shape ", to_string(tensor->shape), "; expected ",
                        to_string(spec.shape), ", its parameter's"));
            }
            if (!is_storage(tensor->dtype)) {
                raise<dtype_mismatch>(error_code::dtype_unsupported,
                    message("the gradient of '", spec.name, "' has dtype ", to_string(tensor->dtype), "; expected ",
                        storage_names()));
            }
            if (tensor->space != memory_space::host || !tensor->contiguous() || (!tensor->data && tensor->size() > 0)) {
                raise<invalid_argument>(error_code::tensor_layout,
                    message("the gradient of '", spec.name, "' must be contiguous host memory: copy it first"));
            }
            visit(policy, *tensor, [&](std::size_t at, const double* values, std::size_t n) {
                for (std::size_t i = 0; i < n; ++i) {
                    if (!std::isfinite(values[i])) {
                        raise<nonfinite_error>(error_code::statistics_not_finite,
                            message("the gradient of '", spec.name, "' holds ",
                                std::isnan(values[i]) ? "NaN" : "infinity", " at index ", at + i,
                                ": leave out this example"));
                    }
                }
            });
        }
    }
    /// sums += weight · gradient²
    void add_squares(const cpu& policy, const const_model_ref& gradient, double weight)
    {
        constexpr std::size_t piece = 65536;
        for (std::size_t index = 0; index < parameters_.size(); ++index) {
            const const_tensor_ref& tensor = *gradient.find(parameters_[index].name);
            const std::size_t size = sums_[index].size();
            for_each_index(size > piece ? policy : sequential(policy), (size + piece - 1) / piece,
                [&](std::size_t p, std::size_t) {
                    const std::size_t first = p * piece;
                    visit_range(policy, tensor, first, std::min(piece, size - first),
                        [&](std::size_t at, const double* values, std::size_t n) {
                            kernels::accumulate_squares(sums_[index].data() + at, values, weight, n);
                        });
                });
        }
    }
    /// One example more, whose gradients are all added.
    void count_example() noexcept { ++examples_; }
    /// Adds what was seen elsewhere. Throws invalid_argument, shape_mismatch for another model's.
    void add_sums(const fisher_accumulator& other)
    {
        if (other.parameters_.size() != parameters_.size()) {
            raise<invalid_argument>(
                error_code::statistics_differ, "Fisher sums of models with different parameters cannot be added");
        }
        for (std::size_t i = 0; i < parameters_.size(); ++i) {
            if (other.parameters_[i].name != parameters_[i].name) {
                raise<invalid_argument>(error_code::statistics_differ,
                    message("Fisher sums of models with different parameters cannot be added: one has '",
                        parameters_[i].name, "' where the other has '", other.parameters_[i].name, "'"));
            }
            if (other.parameters_[i].shape != parameters_[i].shape) {
                raise<shape_mismatch>(error_code::statistics_shape,
                    message("Fisher sums of '", parameters_[i].name, "' have shapes ", to_string(parameters_[i].shape),
                        " and ", to_string(other.parameters_[i].shape)));
            }
        }
        for (std::size_t i = 0; i < sums_.size(); ++i) {
            for (std::size_t k = 0; k < sums_[i].size(); ++k) { sums_[i][k] += other.sums_[i][k]; }
        }
        examples_ += other.examples_;
    }

private:
    [[nodiscard]] bool has(std::string_view name) const { return detail::find_by_name(parameters_, name) != nullptr; }
    /// Calls use(first, values, count) for consecutive runs of elements [first, first + size), in f64.
    template <class Use>
    static void visit_range(
        const cpu& policy, const const_tensor_ref& tensor, std::size_t first, std::size_t size, Use&& use)
    {
        std::pmr::vector<double> raw(block_size, memory_of(policy)), values(block_size, memory_of(policy));
        const aligned_tensor::operand from{static_cast<const std::byte*>(tensor.data), tensor.dtype};
        for (std::size_t at = 0; at < size; at += block_size) {
            const std::size_t n = std::min(block_size, size - at);
            detail::with_elements(from, first + at, n, reinterpret_cast<std::byte*>(raw.data()),
                [&](const auto* stored) { (void)kernels::widen(stored, values.data(), n); });
            use(first + at, values.data(), n);
        }
    }
    template <class Use>
    static void visit(const cpu& policy, const const_tensor_ref& tensor, Use&& use)
    {
        visit_range(policy, tensor, 0, tensor.size(), use);
    }

    std::vector<tensor_spec> parameters_; // in name order
    std::vector<std::vector<double>> sums_;
    std::uint64_t examples_ = 0;
};

/// The empirical Fisher: mean over examples of g², g the gradient of log p(y|x) at the example's own label y. Cheap,
/// and biased where the model is wrong (Kunstner, Balles, Hennig 2019). The sign and any constant factor of the loss's
/// gradient do not matter to a merge, except that factors differ between tasks: divide a batch's mean loss back to one
/// example's. Errors leave the sums as they were. Cost of an example: one read of the gradient to check, one to add.
///
///     empirical_fisher_accumulator fisher(parameters);
///     for (…) { fisher.add(cpu{}, gradient_of_log_likelihood); }
class empirical_fisher_accumulator : public fisher_accumulator {
public:
    /// Zeros, of the names and shapes of `parameters`. Errors: as fisher_accumulator.
    explicit empirical_fisher_accumulator(const const_model_ref& parameters)
        : fisher_accumulator(parameters)
    { }
    /// Adds one example.
    void add(const cpu& policy, const const_model_ref& gradient)
    {
        check(policy, gradient);
        add_squares(policy, gradient, 1.0);
        count_example();
    }
    void add(const empirical_fisher_accumulator& other) { add_sums(other); }
};

/// The Fisher information itself: mean over examples of the expectation Σy p(y|x)·gy² over the model's own labels y, gy
/// the gradient of log p(y|x). Errors leave the sums as they were.
///
///     expected_fisher_accumulator fisher(parameters);
///     for (…) { fisher.add(cpu{}, gradients_of_each_label, probabilities); }
class expected_fisher_accumulator : public fisher_accumulator {
public:
    /// Zeros, of the names and shapes of `parameters`. Errors: as fisher_accumulator.
    explicit expected_fisher_accumulator(const const_model_ref& parameters)
        : fisher_accumulator(parameters)
    { }
    /// Adds one example: for each label the gradient and the probability that the model gives it; probabilities sum to
    /// 1 (within 1e-3). Where there are too many labels, draw some from the model and give each draw 1 / draws.
    void add(const cpu& policy, std::span<const const_model_ref> gradients, std::span<const double> probabilities)
    {
        if (gradients.size() != probabilities.size() || gradients.empty()) {
            raise<invalid_argument>(error_code::list_length,
                message(gradients.size(), " gradients for ", probabilities.size(),
                    " probabilities: give one of each for every label"));
        }
        double total = 0;
        for (std::size_t y = 0; y < probabilities.size(); ++y) {
            if (!(probabilities[y] >= 0)) {
                raise<invalid_argument>(error_code::parameter_out_of_range,
                    message("the probability of label ", y, " is ", probabilities[y]));
            }
            total += probabilities[y];
        }
        if (!(std::abs(total - 1) <= 1e-3)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("the probabilities of the labels sum to ", total, "; expected 1"));
        }
        for (const auto& gradient : gradients) { check(policy, gradient); }
        for (std::size_t y = 0; y < gradients.size(); ++y) { add_squares(policy, gradients[y], probabilities[y]); }
        count_example();
    }
    void add(const expected_fisher_accumulator& other) { add_sums(other); }
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_STATISTICS_FISHER_ACCUMULATOR_HPP

// ---- taskvec/statistics/stored_gram.hpp
#if !defined(TASKVEC_SINGLE_STATISTICS_STORED_GRAM_HPP)
#define TASKVEC_SINGLE_STATISTICS_STORED_GRAM_HPP
// Gram matrices as they lie in memory or in a mapped file: read, and checked to be what they claim on the way.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>

namespace taskvec::inline TASKVEC_ABI::detail {

/// How far entries of a Gram matrix may be from symmetric, as a share of what the diagonal allows: what storage rounds.
[[nodiscard]] constexpr double gram_tolerance(taskvec::dtype type) noexcept
{
    return type == taskvec::dtype::f64 ? 1e-9 : type == taskvec::dtype::f32 ? 1e-4 : 2e-2;
}
[[noreturn]] TASKVEC_COLD inline void refuse_gram_nonfinite(const std::string& where, double value, std::size_t index)
{
    raise<nonfinite_error>(error_code::statistics_not_finite,
        message(where, " holds ", std::isnan(value) ? "NaN" : "infinity", " at index ", index,
            ": collect the statistics again"));
}
[[noreturn]] TASKVEC_COLD inline void refuse_gram_negative(const std::string& where, double value, std::size_t i)
{
    raise<invalid_argument>(error_code::statistics_invalid,
        message(where, " has ", value, " at row and column ", i, ": a sum of squares cannot be negative"));
}
/// Entries (i, j) and (j, i), of which one is not finite, or which differ by more than is tolerated, or are too large.
[[noreturn]] TASKVEC_COLD inline void refuse_gram_entry(
    const std::string& where, std::size_t n, std::size_t i, std::size_t j, double lower, double upper, double tolerated)
{
    if (!std::isfinite(lower)) { refuse_gram_nonfinite(where, lower, i * n + j); }
    if (!std::isfinite(upper)) { refuse_gram_nonfinite(where, upper, j * n + i); }
    if (std::abs(lower - upper) > tolerated) {
        raise<invalid_argument>(error_code::statistics_invalid,
            message(
                where, " is not symmetric: ", lower, " at (", i, ", ", j, ") but ", upper, " at (", j, ", ", i, ")"));
    }
    raise<invalid_argument>(error_code::statistics_invalid,
        message(where, " is no Gram matrix: its entry ", lower, " at (", i, ", ", j,
            ") is larger than its diagonal allows"));
}

/// A Gram matrix that is read from memory or a mapped file, n×n, and checked to be one on the way: finite, symmetric,
/// no entry larger than its diagonal allows (each up to what storage rounds). Throws nonfinite_error, invalid_argument,
/// in which `where` names it.
class stored_gram {
public:
    static constexpr std::size_t tile = 128; ///< square pieces, both halves of which are in memory at a time

    /// `raw` has room for block_size doubles, `diagonal` for n; both are used again for the next one.
    stored_gram(const aligned_tensor::operand& from, std::size_t n, std::function<std::string()> where,
        std::span<double> diagonal, double* raw)
        : from_(from)
        , n_(n)
        , where_(std::move(where))
        , diagonal_(diagonal.first(n))
    {
        for (std::size_t i = 0; i < n; ++i) {
            (void)read(from, i * n + i, 1, &diagonal_[i], raw);
            if (!std::isfinite(diagonal_[i])) { refuse_gram_nonfinite(where_(), diagonal_[i], i * n + i); }
            if (diagonal_[i] < 0) { refuse_gram_negative(where_(), diagonal_[i], i); }
        }
    }

    [[nodiscard]] std::size_t tile_rows() const noexcept { return (n_ + tile - 1) / tile; }
    /// Calls use(i, j, value) for the entries of one row of tiles on and below the diagonal, the mean of both halves.
    /// `memory`: 2·tile² doubles. Rows of tiles may be read at the same time.
    template <class Use>
    void for_each_entry(std::size_t tile_row, double* memory, double* raw, Use&& use) const
    {
        const double tolerance = gram_tolerance(from_.dtype);
        double *const below = memory, *const above = memory + tile * tile;
        const std::size_t r = tile_row * tile, height = std::min(tile, n_ - r);
        for (std::size_t c = 0; c <= r; c += tile) {
            const std::size_t width = std::min(tile, n_ - c);
            for (std::size_t i = 0; i < height; ++i) {
                (void)read(from_, (r + i) * n_ + c, width, below + i * tile, raw);
            }
            for (std::size_t j = 0; j < width; ++j) {
                (void)read(from_, (c + j) * n_ + r, height, above + j * tile, raw);
            }
            for (std::size_t i = 0; i < height; ++i) {
                for (std::size_t j = 0; j < width && c + j <= r + i; ++j) {
                    const double lower = below[i * tile + j], upper = above[j * tile + i];
                    const double bound = std::sqrt(diagonal_[r + i]) * std::sqrt(diagonal_[c + j]);
                    if (!(std::abs(lower - upper) <= tolerance * bound)
                        || !(std::abs(lower) <= (1 + 10 * tolerance) * bound)) {
                        refuse_gram_entry(where_(), n_, r + i, c + j, lower, upper, tolerance * bound);
                    }
                    use(r + i, c + j, 0.5 * (lower + upper));
                }
            }
        }
    }

    /// `count` elements of any operand from `offset` on, in f64. Returns their largest magnitude bits.
    static std::uint64_t read(
        const aligned_tensor::operand& from, std::uint64_t offset, std::size_t count, double* out, double* raw)
    {
        std::uint64_t largest = 0;
        for (std::size_t at = 0; at < count; at += block_size) {
            const std::size_t n = std::min(block_size, count - at);
            largest = std::max(largest,
                with_elements(from, offset + at, n, reinterpret_cast<std::byte*>(raw),
                    [&](const auto* values) { return kernels::widen(values, out + at, n); }));
        }
        return largest;
    }

private:
    aligned_tensor::operand from_;
    std::size_t n_;
    std::function<std::string()> where_;
    std::span<double> diagonal_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_STATISTICS_STORED_GRAM_HPP
