// taskvec in one header. Generated from the headers of the taskvec project by scripts/single-header: change those instead.
// SPDX-License-Identifier: Apache-2.0
#pragma once

// ---- taskvec/formats/adapter_contents.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_ADAPTER_CONTENTS_HPP)
#define TASKVEC_SINGLE_FORMATS_ADAPTER_CONTENTS_HPP
// An adapter of any dialect in one form, and what readers of dialects share.
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
struct module_match;
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

// ---- taskvec/formats/gguf.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_GGUF_HPP)
#define TASKVEC_SINGLE_FORMATS_GGUF_HPP
// GGUF, the files of llama.cpp: their metadata and where their tensors lie, read strictly; whole files written from
// memory; and what the tensors of its language models are called. SPDX-License-Identifier: Apache-2.0


// ---- taskvec/formats/file_kind.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_FILE_KIND_HPP)
#define TASKVEC_SINGLE_FORMATS_FILE_KIND_HPP
// What a file is that is no safetensors file: said by its bytes, with the way on.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// What a file turned out to be, in words: "is <what>: <mend>".
struct file_kind {
    std::string what, mend; ///< completes "is …", and what to do about it
    /// "is <what>: <mend>".
    [[nodiscard]] std::string sentence() const { return message("is ", what, ": ", mend); }
};

namespace detail {

inline constexpr std::string_view convert_to_safetensors =
    "convert it once by transformers' save_pretrained(), or by safetensors.torch.save_file(torch.load(FILE, "
    "weights_only=True), 'model.safetensors')";
inline constexpr std::string_view fetch_again = "fetch it again, and compare its size with that at its source";

inline constexpr std::string_view pytorch_archive = "a PyTorch file (a zip archive with a pickle)";

[[nodiscard]] inline bool begins_like(std::string_view text, std::string_view lower_case)
{
    return text.size() >= lower_case.size()
        && std::equal(lower_case.begin(), lower_case.end(), text.begin(),
            [](char want, char found) { return want == (found >= 'A' && found <= 'Z' ? found - 'A' + 'a' : found); });
}

/// Whether bytes are text that people read: no control characters but white space.
[[nodiscard]] inline bool is_plain_text(std::string_view text)
{
    return !text.empty() && std::none_of(text.begin(), text.end(), [](char c) {
        const auto code = static_cast<unsigned char>(c);
        return (code < 0x20u && c != '\n' && c != '\r' && c != '\t') || code == 0x7fu;
    });
}

/// The first words of a text, on one line.
[[nodiscard]] inline std::string first_words(std::string_view text, std::size_t most = 60)
{
    std::string words(text.substr(0, most));
    for (auto& c : words) {
        if (c == '\n' || c == '\r' || c == '\t') { c = ' '; }
    }
    while (words.ends_with(' ')) { words.pop_back(); }
    return words + (text.size() > most ? " …" : "");
}

[[nodiscard]] inline file_kind kind_of_zip(std::string_view bytes)
{
    // Names stand in the directory at the end, and before each entry.
    constexpr std::size_t part = 65536;
    const auto head = bytes.substr(0, part), tail = bytes.substr(bytes.size() - std::min(part, bytes.size()));
    const auto names = [&](std::string_view name) {
        return head.find(name) != head.npos || tail.find(name) != tail.npos;
    };
    const bool cut = tail.find("PK\x05\x06") == tail.npos;
    const std::string lost = cut ? "the end of a zip archive is missing: " + std::string(fetch_again) + "; then " : "";
    if (names("constants.pkl") || names("/code/")) {
        return {"a TorchScript archive (PyTorch, zip)", lost + "save the model's state_dict() as safetensors"};
    }
    if (names("data.pkl")) { return {std::string(pytorch_archive), lost + std::string(convert_to_safetensors)}; }
    if (names(".npy")) {
        return {"a NumPy archive (.npz, zip)", lost + "save its arrays by safetensors.numpy.save_file()"};
    }
    return {"a zip archive, as PyTorch's .bin, .pt and .pth are (pickles in a zip)",
        lost + std::string(convert_to_safetensors) + ", or unpack it"};
}

} // namespace detail

/// Says what a file is that was taken for a safetensors file, by its content alone: PyTorch's zip and pickle files, a
/// Git LFS pointer, a page of HTML, GGUF, HDF5, archives, text, zeros, nothing at all. Nothing for what is unknown. For
/// messages: a valid safetensors file is not asked about. Cost: looks at the first and last 64 KiB.
///
///     if (const auto kind = what_is_this_file(map.bytes())) { std::cerr << kind->sentence(); }
[[nodiscard]] inline std::optional<file_kind> what_is_this_file(std::span<const std::byte> content)
{
    using detail::convert_to_safetensors, detail::fetch_again;
    const std::string_view bytes(reinterpret_cast<const char*>(content.data()), content.size());
    const auto begins = [&](std::string_view magic) { return bytes.starts_with(magic); };
    const std::string again(fetch_again), convert(convert_to_safetensors);
    if (bytes.empty()) { return file_kind{"empty (0 bytes)", again}; }
    if (begins("version https://git-lfs.github.com/spec/")) {
        std::string size = "the";
        if (const auto at = bytes.substr(0, 1024).find("\nsize "); at != bytes.npos) {
            auto digits = bytes.substr(at + 6, 20);
            digits = digits.substr(0, digits.find_first_not_of("0123456789"));
            if (!digits.empty()) { size = "a file of " + std::string(digits) + " bytes, the"; }
        }
        return file_kind{"a Git LFS pointer, not the file that it stands for",
            "fetch " + size + " real one, by 'git lfs pull' in its repository or by 'hf download'"};
    }
    using namespace std::string_view_literals;
    if (begins("PK\x03\x04"sv) || begins("PK\x05\x06"sv)) { return detail::kind_of_zip(bytes); }
    if (begins("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"sv)) {
        return file_kind{"a PyTorch file of the old kind (before 1.6: a row of pickles)", convert};
    }
    if (bytes.size() > 2 && bytes[0] == '\x80' && bytes[1] >= 2 && bytes[1] <= 5) {
        return file_kind{"a Python pickle, as PyTorch and others write them", convert};
    }
    if (begins("algg")) {
        return file_kind{"an adapter of llama.cpp before GGUF (ggla)",
            "take the adapter that it was converted from, and convert that again with a current llama.cpp"};
    }
    if (begins("FUGG")) {
        return file_kind{"a GGUF file in another order of bytes", "convert it on a machine like this one"};
    }
    if (begins("GGUF")) {
        return file_kind{"a GGUF file (llama.cpp)", "take the model's safetensors files, from which it was converted"};
    }
    if (begins("lmgg") || begins("tjgg") || begins("fmgg")) {
        return file_kind{
            "a GGML file (llama.cpp of old)", "take the model's safetensors files, from which it was converted"};
    }
    if (begins("\x89HDF\r\n\x1a\n"sv)) {
        return file_kind{"an HDF5 file (Keras, TensorFlow: .h5)",
            "convert it once by transformers' from_pretrained(DIR, from_tf=True).save_pretrained()"};
    }
    if (begins("\x93NUMPY"sv)) { return file_kind{"a NumPy array (.npy)", "save it by safetensors.numpy.save_file()"}; }
    if (bytes.size() > 8 && bytes.substr(4, 4) == "TFL3") {
        return file_kind{"a TensorFlow Lite model", "take the safetensors files of the model that it was made of"};
    }
    if (bytes.size() > 262 && bytes.substr(257, 5) == "ustar") { return file_kind{"a tar archive", "unpack it first"}; }
    for (const auto& [magic, name] : {std::pair{"\x1f\x8b"sv, "gzip"sv}, std::pair{"\x28\xb5\x2f\xfd"sv, "zstd"sv},
             std::pair{"\xfd\x37zXZ\0"sv, "xz"sv}, std::pair{"BZh"sv, "bzip2"sv},
             std::pair{"7z\xbc\xaf\x27\x1c"sv, "7-Zip"sv}, std::pair{"Rar!\x1a\x07"sv, "RAR"sv}}) {
        if (begins(magic)) { return file_kind{message("compressed by ", name), "unpack it first"}; }
    }
    if (const auto head = bytes.substr(0, std::min<std::size_t>(bytes.size(), 65536));
        head.find_first_not_of('\0') == head.npos) {
        return file_kind{message("zeros from its first byte on"), "the download did not finish; " + again};
    }
    if (const auto first = static_cast<unsigned char>(bytes[0]);
        bytes.size() > 2 && first > 0x80u && first < 0x90u && (static_cast<unsigned char>(bytes[1]) & 0xe0u) == 0xa0u) {
        return file_kind{"MessagePack (Flax: .msgpack)",
            "convert it once by transformers' from_pretrained(DIR, from_flax=True).save_pretrained()"};
    }
    auto text = bytes.substr(0, 65536);
    if (text.starts_with("\xef\xbb\xbf")) { text.remove_prefix(3); }
    const auto start = text.find_first_not_of(" \t\r\n");
    const auto words = start == text.npos ? text : text.substr(start);
    if (detail::begins_like(words, "<!doctype html") || detail::begins_like(words, "<html")
        || detail::begins_like(words, "<head")) {
        return file_kind{"a page of HTML, not a model",
            "the address answered with a page (to log in, to accept terms, or an error): fetch the file itself, by "
            "'hf download' or from the address behind 'download'"};
    }
    if (detail::is_plain_text(text.size() < bytes.size() ? text.substr(0, text.size() - 4) : text)) {
        if (words.starts_with('<')) { return file_kind{"a page of XML", again}; }
        if (words.starts_with('{') || words.starts_with('[')) {
            return file_kind{"JSON (" + detail::first_words(words) + "), not tensors",
                "name the model's directory, its .safetensors file or its .safetensors.index.json"};
        }
        return file_kind{"a text ('" + detail::first_words(words) + "'), not a model", again};
    }
    if (bytes.size() > 16 && bytes[0] == '\x08' && bytes.substr(0, 256).find("onnx") != bytes.npos) {
        return file_kind{"an ONNX model", "take the safetensors files of the model that it was made of"};
    }
    return std::nullopt;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_FILE_KIND_HPP

// ---- taskvec/formats/json.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_JSON_HPP)
#define TASKVEC_SINGLE_FORMATS_JSON_HPP
// JSON read strictly: UTF-8 only, no repeated keys, bounded depth, nothing after the value; and JSON strings written.
// SPDX-License-Identifier: Apache-2.0


#if !__has_include(<nlohmann/json.hpp>)
#error "this header of taskvec needs nlohmann_json 3.10 or later (Debian: nlohmann-json3-dev)"
#include "taskvec: the error above ends the compilation"
#endif
#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The most values that a JSON file may have, which take a hundred times its bytes in memory.
inline constexpr std::size_t json_value_limit = 2'000'000;
/// The deepest nesting that a JSON file may have: the reference safetensors reader's limit.
inline constexpr std::size_t json_depth_limit = 127;

namespace detail {

/// Feeds `events`, a nlohmann SAX handler with a `fail(message)` for syntax errors, with one JSON text.
/// What nlohmann's lexer allows and JSON does not (a byte order mark, text that ends at a NUL) is a syntax error here.
template <class Events>
bool sax_parse_strictly(std::string_view text, Events& events)
{
    if (text.starts_with("\xef\xbb\xbf")) { return events.fail("begins with a byte order mark; JSON has none", 0); }
    if (const auto nul = text.find('\0'); nul != text.npos) {
        return events.fail("holds a NUL byte, which JSON never has", nul);
    }
    return nlohmann::json::sax_parse(text.begin(), text.end(), &events);
}

/// Shortens nlohmann's "[json.exception.parse_error.101] parse error at line 1, column 5: …" to what a reader needs.
[[nodiscard]] inline std::string syntax_message(const char* what)
{
    std::string text = what;
    if (const auto end = text.find("] "); text.starts_with('[') && end != text.npos) { text.erase(0, end + 2); }
    return text;
}

/// Builds a json value, refusing what the header of this file lists.
class json_builder final : public nlohmann::json_sax<nlohmann::json> {
public:
    json_builder(std::string_view file, std::uint64_t offset)
        : file_(file)
        , offset_(offset)
    { }
    [[nodiscard]] nlohmann::json take() { return std::move(root_); }
    [[noreturn]] bool fail(const std::string& what, std::uint64_t position)
    {
        raise<format_error>(error_code::json_syntax, message("invalid JSON at byte ", offset_ + position, ": ", what),
            file_, offset_ + position);
    }

    bool null() override { return value(nullptr); }
    bool boolean(bool x) override { return value(x); }
    bool number_integer(number_integer_t x) override { return value(x); }
    bool number_unsigned(number_unsigned_t x) override { return value(x); }
    bool number_float(number_float_t x, const string_t&) override { return value(x); }
    bool string(string_t& x) override { return value(std::move(x)); }
    bool binary(binary_t&) override { fail("binary value", 0); }
    bool start_object(std::size_t) override { return open(nlohmann::json::object()); }
    bool start_array(std::size_t) override { return open(nlohmann::json::array()); }
    bool end_object() override { return close(); }
    bool end_array() override { return close(); }
    bool key(string_t& x) override
    {
        if (stack_.back()->contains(x)) {
            raise<format_error>(error_code::json_key_repeated, message("key '", x, "' occurs twice in one JSON object"),
                file_, offset_);
        }
        key_ = std::move(x);
        return true;
    }
    bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& ex) override
    {
        fail(syntax_message(ex.what()), position ? position - 1 : 0);
    }

private:
    nlohmann::json* place(nlohmann::json x)
    {
        if (++values_ > json_value_limit) {
            raise<format_error>(error_code::json_syntax,
                message("JSON of more than ", json_value_limit, " values, which is no configuration or index"), file_,
                offset_);
        }
        if (stack_.empty()) { return &(root_ = std::move(x)); }
        auto& parent = *stack_.back();
        if (parent.is_array()) {
            parent.push_back(std::move(x));
            return &parent.back();
        }
        return &(parent[key_] = std::move(x));
    }
    template <class X>
    bool value(X&& x)
    {
        place(nlohmann::json(std::forward<X>(x)));
        return true;
    }
    bool open(nlohmann::json x)
    {
        if (stack_.size() == json_depth_limit) {
            raise<format_error>(error_code::json_syntax,
                message("JSON is nested deeper than ", json_depth_limit, " levels"), file_, offset_);
        }
        stack_.push_back(place(std::move(x)));
        return true;
    }
    bool close()
    {
        stack_.pop_back();
        return true;
    }

    std::string file_;
    std::uint64_t offset_;
    nlohmann::json root_;
    std::size_t values_ = 0;
    std::vector<nlohmann::json*> stack_;
    std::string key_;
};

} // namespace detail

/// Refuses a whole file that stands where JSON should and is something else that is known: a Git LFS pointer, a page of
/// HTML, an archive. Throws format_error with its name and the way on.
inline void refuse_other_kinds(std::string_view text, std::string_view file)
{
    const auto first = text.find_first_not_of(" \t\r\n");
    if (text.starts_with("version https://git-lfs.") || text.starts_with("PK\x03\x04")
        || (first != text.npos && text[first] == '<')) {
        if (const auto kind = what_is_this_file(std::as_bytes(std::span(text)))) {
            raise<format_error>(error_code::json_syntax, kind->sentence(), std::string(file));
        }
    }
}

/// The JSON value that `text` holds, read strictly; anything else is a format_error that names `file` and the byte, or
/// what the file is instead. `offset` is where the text begins in the file.
[[nodiscard]] inline nlohmann::json parse_json(std::string_view text, std::string_view file, std::uint64_t offset = 0)
{
    if (offset == 0) { refuse_other_kinds(text, file); }
    detail::json_builder builder(file, offset);
    detail::sax_parse_strictly(text, builder);
    return builder.take();
}

namespace detail {

inline constexpr std::string_view python_constants[] = {"-Infinity", "Infinity", "NaN"};

} // namespace detail

/// Text in which NaN, Infinity and -Infinity, which are no JSON and which Python writes, are strings that no file has:
/// their names behind a control character. restored_constants() turns what is written of it back.
[[nodiscard]] inline std::string quoted_constants(std::string_view text)
{
    std::string result;
    bool in_string = false;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (in_string) {
            result += c;
            if (c == '\\' && i + 1 < text.size()) { result += text[++i]; }
            in_string = c != '"';
            continue;
        }
        in_string = c == '"';
        std::string_view found;
        for (const std::string_view word : detail::python_constants) {
            if (found.empty() && text.substr(i).starts_with(word)) { found = word; }
        }
        if (found.empty()) {
            result += c;
            continue;
        }
        result.append("\"\\u0001").append(found).append("\"");
        i += found.size() - 1;
    }
    return result;
}
/// Text in which python_constants' stand-ins are the constants again.
[[nodiscard]] inline std::string restored_constants(std::string text)
{
    for (const std::string_view word : detail::python_constants) {
        std::string quoted = "\"\\u0001";
        quoted.append(word).append("\"");
        for (std::size_t at = 0; (at = text.find(quoted, at)) != text.npos; at += word.size()) {
            text.replace(at, quoted.size(), word);
        }
    }
    return text;
}

/// The JSON of a configuration as Python writes it: parse_json() of quoted_constants().
[[nodiscard]] inline nlohmann::json parse_configuration(std::string_view text, std::string_view file)
{
    return parse_json(quoted_constants(text), file);
}

/// True when `text` is well-formed UTF-8: no overlong form, no surrogate, nothing above U+10FFFF.
[[nodiscard]] constexpr bool is_utf8(std::string_view text) noexcept
{
    for (std::size_t i = 0; i < text.size();) {
        const auto byte = [&](std::size_t k) {
            return i + k < text.size() ? static_cast<unsigned char>(text[i + k]) : 0u;
        };
        const auto tail = [&](std::size_t k) { return (byte(k) & 0xc0u) == 0x80u; };
        const unsigned lead = byte(0);
        if (lead < 0x80u) { i += 1; }
        else if (lead >= 0xc2u && lead <= 0xdfu && tail(1)) {
            i += 2;
        }
        else if (lead >= 0xe0u && lead <= 0xefu && tail(1) && tail(2) && !(lead == 0xe0u && byte(1) < 0xa0u)
            && !(lead == 0xedu && byte(1) > 0x9fu)) {
            i += 3;
        }
        else if (lead >= 0xf0u && lead <= 0xf4u && tail(1) && tail(2) && tail(3) && !(lead == 0xf0u && byte(1) < 0x90u)
            && !(lead == 0xf4u && byte(1) > 0x8fu)) {
            i += 4;
        }
        else {
            return false;
        }
    }
    return true;
}

/// `text` as a JSON string with its quotes, escaped as the reference safetensors writer escapes: quotes, backslashes
/// and control characters only. Text that is not UTF-8 is an invalid_argument.
[[nodiscard]] inline std::string json_string(std::string_view text)
{
    if (!is_utf8(text)) {
        raise<invalid_argument>(
            error_code::unwritable, message("'", text, "' is not UTF-8 and cannot be written to a file"));
    }
    std::string result = "\"";
    for (const char c : text) {
        switch (c) {
        case '"': result += "\\\""; break;
        case '\\': result += "\\\\"; break;
        case '\b': result += "\\b"; break;
        case '\f': result += "\\f"; break;
        case '\n': result += "\\n"; break;
        case '\r': result += "\\r"; break;
        case '\t': result += "\\t"; break;
        default:
            if (static_cast<unsigned char>(c) < 0x20u) {
                constexpr char digits[] = "0123456789abcdef";
                result += "\\u00";
                result += digits[static_cast<unsigned char>(c) >> 4];
                result += digits[static_cast<unsigned char>(c) & 15];
            }
            else {
                result += c;
            }
        }
    }
    return result += '"';
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_JSON_HPP

// ---- taskvec/formats/safetensors.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_SAFETENSORS_HPP)
#define TASKVEC_SINGLE_FORMATS_SAFETENSORS_HPP
// The safetensors format: a strict reader over a memory map, and an atomic writer that takes bytes in any order.
// SPDX-License-Identifier: Apache-2.0
//
// Format: https://github.com/huggingface/safetensors. A file is an 8-byte little-endian header length, that many bytes
// of JSON, and one buffer that the tensors tile.


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


#include <algorithm>
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
        const auto place = lower_bound(name);
        if (place != entries_.end() && place->name == name) {
            raise<invalid_argument>(
                error_code::tensor_repeated, message("tensor '", name, "' occurs twice in one model"));
        }
        entries_.insert(place, entry{std::move(name), std::move(tensor)});
    }
    /// The tensor of that name, or nullptr.
    [[nodiscard]] const Ref* find(std::string_view name) const
    {
        const auto place = const_cast<basic_model*>(this)->lower_bound(name);
        return place != entries_.end() && place->name == name ? &place->tensor : nullptr;
    }
    [[nodiscard]] auto begin() const noexcept { return entries_.begin(); }
    [[nodiscard]] auto end() const noexcept { return entries_.end(); }
    [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }
    [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }
    [[nodiscard]] const entry& operator[](std::size_t index) const noexcept { return entries_[index]; }

private:
    auto lower_bound(std::string_view name)
    {
        return std::lower_bound(entries_.begin(), entries_.end(), name,
            [](const entry& e, std::string_view n) { return std::string_view(e.name) < n; });
    }
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

// ---- taskvec/formats/file.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_FILE_HPP)
#define TASKVEC_SINGLE_FORMATS_FILE_HPP
// Files: read-only memory maps, and files that appear whole or not at all.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/parallel.hpp
#if !defined(TASKVEC_SINGLE_CORE_PARALLEL_HPP)
#define TASKVEC_SINGLE_CORE_PARALLEL_HPP
// The CPU's parallel loop over blocks: errors carried across threads, cancellation, progress, one scratch a worker.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/policy.hpp
#if !defined(TASKVEC_SINGLE_CORE_POLICY_HPP)
#define TASKVEC_SINGLE_CORE_POLICY_HPP
// Policies: where an algorithm runs, and how. The first argument of every algorithm, by const reference.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/core/callback.hpp
#if !defined(TASKVEC_SINGLE_CORE_CALLBACK_HPP)
#define TASKVEC_SINGLE_CORE_CALLBACK_HPP
// Functions as values: callback owns what it calls, function_ref refers to it. What std::function is for, without the
// tenth of a second that <functional> costs in every file. SPDX-License-Identifier: Apache-2.0


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
    std::string_view phase; ///< what is done, such as "merging"
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
/// nothing more from the system. Around it, from operator new, goes what grows with names alone: lists of tensors and
/// options, less than 2 KB for each tensor of each model; and the singular values of a decomposition. Eigen's products
/// take up to a few MB a thread from malloc, whatever the sizes, and its large SVD (truncated_svd()) takes its work
/// space there. What a call returns: sparse vectors and saved words lie in memory of `memory`, which must outlive them;
/// matrices, adapters, statistics and lists lie in ordinary memory. Readers and writers of files have no policy.
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
    const auto work = [&](std::size_t worker) {
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
    if (policy.executor) { policy.executor(workers, work); }
    else {
        detail::run_on_threads(workers, work);
    }
#if !defined(TASKVEC_NO_EXCEPTIONS)
    if (failure) { std::rethrow_exception(failure); }
#endif
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_CORE_PARALLEL_HPP

// ---- taskvec/formats/system.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_SYSTEM_HPP)
#define TASKVEC_SINGLE_FORMATS_SYSTEM_HPP
// What files need of the operating system: one body for POSIX, one for Windows. Internal: formats/file.hpp stands on
// it. SPDX-License-Identifier: Apache-2.0
//
// Functions take paths as std::filesystem has them, give what the calls of POSIX of their kind give (−1 and errno where
// they fail), and throw nothing but for memory.


#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#if defined(_WIN32)
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#else
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h> // renameat2
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#if defined(__linux__)
#include <linux/magic.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#endif
#include <unistd.h>
#endif

namespace taskvec::inline TASKVEC_ABI {
namespace detail {

#if !defined(_WIN32)
static_assert(sizeof(::off_t) == 8, "taskvec's files need 64-bit offsets: compile with -D_FILE_OFFSET_BITS=64");
#endif

/// The system's words for an errno.
[[nodiscard]] inline std::string errno_text(int code)
{
#if defined(_WIN32)
    return std::generic_category().message(code); // the system's own numbers are others there
#else
    return std::system_category().message(code);
#endif
}

/// Calls a system function again for as long as a signal interrupts it.
template <class Call>
auto retry(Call call)
{
    for (;;) {
        const auto result = call();
        if (result >= 0 || errno != EINTR) { return result; }
    }
}

/// A name as text: as it is (no copy), or of wide characters in UTF-8.
#if defined(_WIN32)
[[nodiscard]] inline std::string name_text(const std::filesystem::path& path)
{
    const auto text = path.u8string();
    return {reinterpret_cast<const char*>(text.data()), text.size()};
}
#else
[[nodiscard]] inline const std::string& name_text(const std::filesystem::path& path) noexcept
{
    return path.native();
}
#endif

/// And back.
[[nodiscard]] inline std::filesystem::path path_of(std::string_view text)
{
#if defined(_WIN32)
    return std::u8string_view(reinterpret_cast<const char8_t*>(text.data()), text.size());
#else
    return text;
#endif
}

} // namespace detail

namespace detail::system {

/// What is known of a file.
struct status {
    bool is_file = false, is_directory = false;
    std::uint64_t device = 0, inode = 0, size = 0;
    std::int64_t seconds = 0, nanoseconds = 0; ///< when it was written to
    unsigned mode = 0, owner = 0, group = 0; ///< 0 on Windows
};

#if !defined(_WIN32)

inline bool known(const struct stat& from, status& to) noexcept
{
    to = {S_ISREG(from.st_mode), S_ISDIR(from.st_mode), static_cast<std::uint64_t>(from.st_dev),
        static_cast<std::uint64_t>(from.st_ino), static_cast<std::uint64_t>(from.st_size), from.st_mtim.tv_sec,
        from.st_mtim.tv_nsec, from.st_mode, from.st_uid, from.st_gid};
    return true;
}
/// False, and errno, where nothing is known.
inline bool look_at(const std::filesystem::path& path, status& found) noexcept
{
    struct stat raw{};
    return ::stat(path.c_str(), &raw) == 0 && known(raw, found);
}
inline bool look_at_link(const std::filesystem::path& path, status& found) noexcept
{
    struct stat raw{};
    return ::lstat(path.c_str(), &raw) == 0 && known(raw, found);
}
inline bool look_at(int file, status& found) noexcept
{
    struct stat raw{};
    return ::fstat(file, &raw) == 0 && known(raw, found);
}

inline int open_to_read(const std::filesystem::path& path) noexcept
{
    return retry([&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); });
}
/// A new file, to read and write.
inline int open_new(const std::filesystem::path& path, bool for_others = true) noexcept
{
    return retry([&] { return ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, for_others ? 0666 : 0600); });
}
/// A file that is there (or not, where it `may_be_new`), to read and write; no link.
inline int open_to_write(const std::filesystem::path& path, bool may_be_new = false) noexcept
{
    return retry(
        [&] { return ::open(path.c_str(), O_RDWR | (may_be_new ? O_CREAT : 0) | O_CLOEXEC | O_NOFOLLOW, 0666); });
}
inline int close(int file) noexcept
{
    return ::close(file);
}
inline std::ptrdiff_t read_at(int file, void* to, std::size_t size, std::uint64_t offset) noexcept
{
    return retry([&] { return ::pread(file, to, size, static_cast<::off_t>(offset)); });
}
/// Moves at most 0x7ffff000 bytes at once, and may stop early at a signal or a full disk.
inline std::ptrdiff_t write_at(int file, const void* from, std::size_t size, std::uint64_t offset) noexcept
{
    return retry([&] { return ::pwrite(file, from, size, static_cast<::off_t>(offset)); });
}
inline int force_to_disk(int file) noexcept
{
    return retry([&] { return ::fsync(file); });
}
inline int resize(int file, std::uint64_t size) noexcept
{
    return retry([&] { return ::ftruncate(file, static_cast<::off_t>(size)); });
}
/// 0, or an errno: a full disk is found here, where the system can tell.
inline int reserve(int file, std::uint64_t size) noexcept
{
#if defined(__linux__)
    // In memory, reserving means clearing every page: as long as writing it once more. Its free space can be asked.
    struct ::statfs system{};
    if (::fstatfs(file, &system) == 0 && static_cast<std::uint64_t>(system.f_type) == TMPFS_MAGIC) {
        const bool fits = system.f_blocks == 0 // no limit
            || size / static_cast<std::uint64_t>(system.f_bsize) <= static_cast<std::uint64_t>(system.f_bavail);
        return fits ? (resize(file, size) == 0 ? 0 : errno) : ENOSPC;
    }
    if (retry([&] { return ::fallocate(file, 0, 0, static_cast<::off_t>(size)); }) == 0) { return 0; }
    if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL) { return errno; }
#endif
    return resize(file, size) == 0 ? 0 : errno;
}
/// The nine bits of permissions.
inline int set_permissions(int file, unsigned mode) noexcept
{
    return ::fchmod(file, static_cast<::mode_t>(mode));
}
inline int set_permissions(const std::filesystem::path& path, unsigned mode) noexcept
{
    return ::chmod(path.c_str(), static_cast<::mode_t>(mode));
}

/// A file's bytes, read-only; null and errno where that fails.
inline const std::byte* map(int file, std::size_t size) noexcept
{
    void* const memory = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    return memory == MAP_FAILED ? nullptr : static_cast<const std::byte*>(memory); // NOLINT
}
inline void unmap(const void* memory, std::size_t size) noexcept
{
    ::munmap(const_cast<void*>(memory), size);
}
inline void advise(const std::byte* memory, std::size_t size, int advice) noexcept
{
    ::madvise(const_cast<std::byte*>(memory), size, advice);
}

inline int remove_file(const std::filesystem::path& path) noexcept
{
    return ::unlink(path.c_str());
}
inline int remove_directory(const std::filesystem::path& path) noexcept
{
    return ::rmdir(path.c_str());
}
inline int make_directory(const std::filesystem::path& path, bool for_others = true) noexcept
{
    return ::mkdir(path.c_str(), for_others ? 0777 : 0700);
}
/// Replaces a file.
inline int rename(const std::filesystem::path& from, const std::filesystem::path& to) noexcept
{
    return ::rename(from.c_str(), to.c_str());
}
inline int link(const std::filesystem::path& from, const std::filesystem::path& to) noexcept
{
    return ::link(from.c_str(), to.c_str());
}
/// Two directories take each other's name.
#if defined(RENAME_EXCHANGE)
inline constexpr bool can_exchange = true;
inline int exchange(const std::filesystem::path& one, const std::filesystem::path& other) noexcept
{
    return ::renameat2(AT_FDCWD, one.c_str(), AT_FDCWD, other.c_str(), RENAME_EXCHANGE);
}
#else
inline constexpr bool can_exchange = false;
inline int exchange(const std::filesystem::path&, const std::filesystem::path&) noexcept
{
    errno = ENOSYS;
    return -1;
}
#endif
inline bool may_write(const std::filesystem::path& path) noexcept
{
    return ::access(path.c_str(), W_OK) == 0;
}
inline bool may_fill(const std::filesystem::path& directory) noexcept
{
    return ::access(directory.c_str(), W_OK | X_OK) == 0;
}
/// An exclusive lock that ends with the process; EWOULDBLOCK where somebody else has it.
inline int lock(int file) noexcept
{
    return retry([&] { return ::flock(file, LOCK_EX | LOCK_NB); });
}

[[nodiscard]] inline long process() noexcept
{
    return static_cast<long>(::getpid());
}
[[nodiscard]] inline bool is_gone(int process) noexcept
{
    return ::kill(static_cast<::pid_t>(process), 0) != 0 && errno == ESRCH;
}

#else

/// The errno that fits an error of Windows.
inline int fail() noexcept
{
    switch (::GetLastError()) {
    case ERROR_FILE_NOT_FOUND:
    case ERROR_PATH_NOT_FOUND:
    case ERROR_INVALID_NAME:
    case ERROR_BAD_PATHNAME:
    case ERROR_BAD_NETPATH:
    case ERROR_INVALID_DRIVE: errno = ENOENT; break;
    case ERROR_ACCESS_DENIED:
    case ERROR_SHARING_VIOLATION:
    case ERROR_USER_MAPPED_FILE:
    case ERROR_WRITE_PROTECT: errno = EACCES; break;
    case ERROR_LOCK_VIOLATION: errno = EWOULDBLOCK; break;
    case ERROR_FILE_EXISTS:
    case ERROR_ALREADY_EXISTS: errno = EEXIST; break;
    case ERROR_DISK_FULL:
    case ERROR_HANDLE_DISK_FULL: errno = ENOSPC; break;
    case ERROR_DIR_NOT_EMPTY: errno = ENOTEMPTY; break;
    case ERROR_DIRECTORY: errno = ENOTDIR; break;
    case ERROR_NOT_SAME_DEVICE: errno = EXDEV; break;
    case ERROR_TOO_MANY_OPEN_FILES: errno = EMFILE; break;
    case ERROR_FILENAME_EXCED_RANGE: errno = ENAMETOOLONG; break;
    case ERROR_NOT_ENOUGH_MEMORY:
    case ERROR_OUTOFMEMORY:
    case ERROR_COMMITMENT_LIMIT: errno = ENOMEM; break;
    case ERROR_NOT_SUPPORTED:
    case ERROR_INVALID_FUNCTION: errno = ENOTSUP; break;
    case ERROR_NOACCESS: errno = EFAULT; break;
    case ERROR_INVALID_PARAMETER: errno = EINVAL; break;
    default: errno = EIO;
    }
    return -1;
}
inline HANDLE handle_of(int file) noexcept
{
    return reinterpret_cast<HANDLE>(::_get_osfhandle(file));
}
/// For files that others may rename and remove meanwhile, as they may elsewhere.
inline HANDLE open_handle(const std::filesystem::path& path, DWORD access, DWORD creation, DWORD flags) noexcept
{
    return ::CreateFileW(path.c_str(), access, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE, nullptr,
        creation, flags, nullptr);
}
inline int open(const std::filesystem::path& path, DWORD access, DWORD creation, DWORD flags) noexcept
{
    const HANDLE handle = open_handle(path, access, creation, flags);
    if (handle == INVALID_HANDLE_VALUE) { return fail(); }
    const int file = ::_open_osfhandle(reinterpret_cast<std::intptr_t>(handle), _O_BINARY | _O_NOINHERIT);
    if (file < 0) { ::CloseHandle(handle); }
    return file;
}

inline bool look_at(HANDLE handle, status& found) noexcept
{
    if (::GetFileType(handle) != FILE_TYPE_DISK) {
        found = {};
        return true;
    }
    BY_HANDLE_FILE_INFORMATION raw{};
    if (!::GetFileInformationByHandle(handle, &raw)) { return fail() == 0; }
    const auto together = [](DWORD high, DWORD low) { return std::uint64_t{high} << 32 | low; };
    const std::uint64_t written = together(raw.ftLastWriteTime.dwHighDateTime, raw.ftLastWriteTime.dwLowDateTime);
    const bool directory = (raw.dwFileAttributes & FILE_ATTRIBUTE_DIRECTORY) != 0;
    const bool link = (raw.dwFileAttributes & FILE_ATTRIBUTE_REPARSE_POINT) != 0;
    found = {!directory && !link, directory && !link, raw.dwVolumeSerialNumber,
        together(raw.nFileIndexHigh, raw.nFileIndexLow), together(raw.nFileSizeHigh, raw.nFileSizeLow),
        static_cast<std::int64_t>(written / 10'000'000), static_cast<std::int64_t>(written % 10'000'000 * 100), 0, 0,
        0};
    return true;
}
inline bool look_at(const std::filesystem::path& path, status& found, DWORD flags = 0) noexcept
{
    const HANDLE handle = open_handle(path, FILE_READ_ATTRIBUTES, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS | flags);
    if (handle == INVALID_HANDLE_VALUE) { return fail() == 0; }
    const bool known = look_at(handle, found);
    ::CloseHandle(handle);
    return known;
}
inline bool look_at_link(const std::filesystem::path& path, status& found) noexcept
{
    return look_at(path, found, FILE_FLAG_OPEN_REPARSE_POINT);
}
inline bool look_at(int file, status& found) noexcept
{
    return look_at(handle_of(file), found);
}

inline int open_to_read(const std::filesystem::path& path) noexcept
{
    return open(path, GENERIC_READ, OPEN_EXISTING, FILE_FLAG_BACKUP_SEMANTICS); // directories too, which are told apart
}
inline int open_new(const std::filesystem::path& path, bool = true) noexcept
{
    return open(path, GENERIC_READ | GENERIC_WRITE, CREATE_NEW, FILE_ATTRIBUTE_NORMAL);
}
inline int open_to_write(const std::filesystem::path& path, bool may_be_new = false) noexcept
{
    return open(path, GENERIC_READ | GENERIC_WRITE, may_be_new ? OPEN_ALWAYS : OPEN_EXISTING,
        FILE_ATTRIBUTE_NORMAL | FILE_FLAG_OPEN_REPARSE_POINT);
}
inline int close(int file) noexcept
{
    return ::_close(file);
}
inline OVERLAPPED at(std::uint64_t offset) noexcept
{
    OVERLAPPED place{};
    place.Offset = static_cast<DWORD>(offset);
    place.OffsetHigh = static_cast<DWORD>(offset >> 32);
    return place;
}
inline std::ptrdiff_t read_at(int file, void* to, std::size_t size, std::uint64_t offset) noexcept
{
    OVERLAPPED place = at(offset);
    DWORD moved = 0;
    if (::ReadFile(handle_of(file), to, static_cast<DWORD>(std::min<std::size_t>(size, 1u << 30)), &moved, &place)) {
        return static_cast<std::ptrdiff_t>(moved);
    }
    return ::GetLastError() == ERROR_HANDLE_EOF ? 0 : fail();
}
inline std::ptrdiff_t write_at(int file, const void* from, std::size_t size, std::uint64_t offset) noexcept
{
    OVERLAPPED place = at(offset);
    DWORD moved = 0;
    if (::WriteFile(handle_of(file), from, static_cast<DWORD>(std::min<std::size_t>(size, 1u << 30)), &moved, &place)) {
        return static_cast<std::ptrdiff_t>(moved);
    }
    return fail();
}
inline int force_to_disk(int file) noexcept
{
    return ::FlushFileBuffers(handle_of(file)) ? 0 : fail();
}
inline int resize(int file, std::uint64_t size) noexcept
{
    FILE_END_OF_FILE_INFO end{};
    end.EndOfFile.QuadPart = static_cast<LONGLONG>(size);
    return ::SetFileInformationByHandle(handle_of(file), FileEndOfFileInfo, &end, sizeof end) ? 0 : fail();
}
inline int reserve(int file, std::uint64_t size) noexcept
{
    return resize(file, size) == 0 ? 0 : errno;
}
inline int set_permissions(int, unsigned) noexcept
{
    return 0; // a new file has those of its directory
}
inline int set_permissions(const std::filesystem::path&, unsigned) noexcept
{
    return 0;
}

/// A whole file as memory, or new memory that the page file backs.
inline void* map_pages(HANDLE file, std::uint64_t size, bool to_write) noexcept
{
    const HANDLE section = ::CreateFileMappingW(file, nullptr, to_write ? PAGE_READWRITE : PAGE_READONLY,
        static_cast<DWORD>(size >> 32), static_cast<DWORD>(size), nullptr);
    if (!section) {
        fail();
        return nullptr;
    }
    void* const memory =
        ::MapViewOfFile(section, to_write ? FILE_MAP_WRITE : FILE_MAP_READ, 0, 0, static_cast<SIZE_T>(size));
    if (!memory) { fail(); }
    ::CloseHandle(section); // the view keeps it
    return memory;
}
inline const std::byte* map(int file, std::size_t size) noexcept
{
    return static_cast<const std::byte*>(map_pages(handle_of(file), size, false));
}
inline void unmap(const void* memory, std::size_t) noexcept
{
    ::UnmapViewOfFile(memory);
}
inline void advise(const std::byte*, std::size_t, int) noexcept { }

inline int remove_file(const std::filesystem::path& path) noexcept
{
    if (::DeleteFileW(path.c_str())) { return 0; }
    if (::GetLastError() == ERROR_ACCESS_DENIED) {
        const DWORD attributes = ::GetFileAttributesW(path.c_str());
        if (attributes != INVALID_FILE_ATTRIBUTES && (attributes & FILE_ATTRIBUTE_DIRECTORY) != 0) {
            errno = EISDIR;
            return -1;
        }
        ::SetLastError(ERROR_ACCESS_DENIED);
    }
    return fail();
}
inline int remove_directory(const std::filesystem::path& path) noexcept
{
    return ::RemoveDirectoryW(path.c_str()) ? 0 : fail();
}
inline int make_directory(const std::filesystem::path& path, bool = true) noexcept
{
    return ::CreateDirectoryW(path.c_str(), nullptr) ? 0 : fail();
}
inline int rename(const std::filesystem::path& from, const std::filesystem::path& to) noexcept
{
    return ::MoveFileExW(from.c_str(), to.c_str(), MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) ? 0 : fail();
}
inline int link(const std::filesystem::path& from, const std::filesystem::path& to) noexcept
{
    return ::CreateHardLinkW(to.c_str(), from.c_str(), nullptr) ? 0 : fail();
}
inline constexpr bool can_exchange = false;
inline int exchange(const std::filesystem::path&, const std::filesystem::path&) noexcept
{
    errno = ENOSYS;
    return -1;
}
inline bool may_write(const std::filesystem::path& path) noexcept
{
    return ::_waccess(path.c_str(), 2) == 0;
}
inline bool may_fill(const std::filesystem::path& directory) noexcept
{
    return ::_waccess(directory.c_str(), 2) == 0;
}
inline int lock(int file) noexcept
{
    OVERLAPPED far_away = at(std::uint64_t{1} << 62); // a locked byte that is read by nobody
    return ::LockFileEx(handle_of(file), LOCKFILE_EXCLUSIVE_LOCK | LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &far_away)
        ? 0
        : fail();
}

[[nodiscard]] inline long process() noexcept
{
    return static_cast<long>(::GetCurrentProcessId());
}
[[nodiscard]] inline bool is_gone(int process) noexcept
{
    const HANDLE handle = ::OpenProcess(SYNCHRONIZE, FALSE, static_cast<DWORD>(process));
    if (!handle) { return ::GetLastError() == ERROR_INVALID_PARAMETER; }
    const bool ended = ::WaitForSingleObject(handle, 0) == WAIT_OBJECT_0;
    ::CloseHandle(handle);
    return ended;
}

#endif

/// Whether an errno says that two directories cannot be exchanged here.
[[nodiscard]] inline bool is_no_exchange(int code) noexcept
{
    return code == EINVAL || code == ENOSYS || code == ENOTSUP || code == EXDEV || code == EBUSY;
}

} // namespace detail::system

namespace detail {

/// A file descriptor, closed once.
class descriptor {
public:
    descriptor() = default;
    explicit descriptor(int value) noexcept
        : value_(value)
    { }
    descriptor(descriptor&& other) noexcept
        : value_(std::exchange(other.value_, -1))
    { }
    descriptor& operator=(descriptor&& other) noexcept
    {
        if (this != &other) {
            close();
            value_ = std::exchange(other.value_, -1);
        }
        return *this;
    }
    ~descriptor() { close(); }

    [[nodiscard]] int get() const noexcept { return value_; }
    [[nodiscard]] explicit operator bool() const noexcept { return value_ >= 0; }
    /// 0, or the errno of close(2): some file systems report a failed write only here.
    int close() noexcept
    {
        return value_ >= 0 && system::close(std::exchange(value_, -1)) != 0 && errno != EINTR ? errno : 0;
    }

private:
    int value_ = -1;
};

#if !defined(_WIN32)

/// Removes a file, or a directory with all that lies in it. Takes no memory, which may be what has run out.
inline void remove_tree(int parent, const char* name) noexcept
{
    if (::unlinkat(parent, name, 0) == 0 || (errno != EISDIR && errno != EPERM)) { return; }
    for (int tries = 0; tries < 2 && ::unlinkat(parent, name, AT_REMOVEDIR) != 0; ++tries) {
#if defined(__linux__)
        const descriptor directory(::openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW));
        alignas(8) char entries[4096]; // of numbers (16 bytes), a length (2), a kind (1), a name
        for (long size = 0;
            directory && (size = ::syscall(SYS_getdents64, directory.get(), entries, sizeof entries)) > 0;) {
            std::uint16_t length = 0;
            for (long at = 0; at < size; at += length) {
                std::memcpy(&length, entries + at + 16, sizeof length);
                const char* const inner = entries + at + 19;
                if (std::strcmp(inner, ".") != 0 && std::strcmp(inner, "..") != 0) {
                    remove_tree(directory.get(), inner);
                }
            }
        }
        if (directory) { continue; }
#endif
        return;
    }
    ::unlinkat(parent, name, AT_REMOVEDIR);
}
inline void remove_tree(const char* path) noexcept
{
    remove_tree(AT_FDCWD, path);
}

} // namespace detail

namespace detail::system {

/// What remove_temporary() does, for handlers of signals: without memory.
inline void remove_by_text(const char* path, bool with_contents) noexcept
{
    if (with_contents) { remove_tree(path); }
    else if (::unlink(path) != 0) {
        ::rmdir(path);
    }
}

/// Calls body(name) for each entry of a directory but itself and the one above; false, and errno, where it cannot be
/// read. Not std::filesystem::directory_iterator, which ends the process where memory runs out.
template <class Body>
bool for_each_name(const std::filesystem::path& directory, Body body)
{
    struct closer {
        void operator()(DIR* handle) const noexcept { ::closedir(handle); }
    };
    const std::unique_ptr<DIR, closer> handle(::opendir(directory.c_str()));
    if (!handle) { return false; }
    while (const auto* const entry = ::readdir(handle.get())) {
        const std::string_view name = entry->d_name;
        if (name != "." && name != "..") { body(name); }
    }
    return true;
}

/// A failure of map_unnamed_file: which step, and the errno.
struct unnamed_failure {
    std::string_view what;
    int code = 0;
    bool of_space = false;
};
/// New memory that a file without a name in `place` backs, or null and what failed.
inline void* map_unnamed(const std::filesystem::path& place, std::size_t bytes, unnamed_failure& failure)
{
    descriptor file(retry([&] { return ::open(place.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); }));
    if (!file) { // not every file system has files without names
        auto pattern = (place / ".taskvec-XXXXXX").string();
        file = descriptor(::mkostemp(pattern.data(), O_CLOEXEC));
        if (!file) {
            failure = {"cannot create a temporary file in it", errno, false};
            return nullptr;
        }
        ::unlink(pattern.c_str());
    }
    if (const int code = ::posix_fallocate(file.get(), 0, static_cast<::off_t>(bytes))) {
        failure = {"cannot reserve space", code, true};
        return nullptr;
    }
    void* const memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (memory != MAP_FAILED) { return memory; } // NOLINT(performance-no-int-to-ptr)
    failure = {"cannot map a temporary file in it", errno, false};
    return nullptr;
}
/// Forces a directory's names to disk: 0, or the errno of a failure that matters. File systems that cannot do so are
/// left to themselves.
inline int synchronise(const std::filesystem::path& directory) noexcept
{
    const descriptor handle(retry([&] { return ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
    if (!handle || force_to_disk(handle.get()) == 0) { return 0; }
    return errno != EINVAL && errno != ENOTSUP && errno != EROFS ? errno : 0;
}

} // namespace detail::system

namespace detail {

#else

} // namespace detail

namespace detail::system {

template <class Body>
bool for_each_name(const std::filesystem::path& directory, Body body)
{
    WIN32_FIND_DATAW entry{};
    const HANDLE search = ::FindFirstFileW((directory / L"*").c_str(), &entry);
    if (search == INVALID_HANDLE_VALUE) { return fail() == 0; }
    const std::unique_ptr<void, decltype(&::FindClose)> closer(search, &::FindClose);
    do {
        const std::wstring_view name = entry.cFileName;
        if (name != L"." && name != L"..") { body(name); }
    } while (::FindNextFileW(search, &entry));
    return true;
}

struct unnamed_failure {
    std::string_view what;
    int code = 0;
    bool of_space = false;
};
/// (The page file backs it: a file that is mapped cannot go before the map does.)
inline void* map_unnamed(const std::filesystem::path&, std::size_t bytes, unnamed_failure& failure)
{
    void* const memory = map_pages(INVALID_HANDLE_VALUE, bytes, true);
    if (!memory) { failure = {"cannot reserve space", errno, true}; }
    return memory;
}
inline int synchronise(const std::filesystem::path&) noexcept
{
    return 0; // renames are written through
}

} // namespace detail::system

namespace detail {

/// Removes a file, or a directory with all that lies in it.
inline void remove_tree(const std::filesystem::path& path) noexcept
{
    if (system::remove_file(path) == 0 || errno != EISDIR) { return; }
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
}

} // namespace detail

namespace detail::system {

/// What remove_temporary() does.
inline void remove_by_text(const char* text, bool with_contents) noexcept
{
    const auto path = path_of(text);
    if (with_contents) { remove_tree(path); }
    else if (remove_file(path) != 0) {
        remove_directory(path);
    }
}

} // namespace detail::system

namespace detail {

#endif

} // namespace detail
} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_SYSTEM_HPP

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Called where a directory could not be forced to disk after the files in it had taken their names: they are in place,
/// and only a power cut could still undo that. That is no error, since nothing can be taken back.
using unsynchronised_handler = void (*)(const std::filesystem::path& directory, int code);

namespace detail {

[[noreturn]] inline void raise_io(const std::filesystem::path& path, std::string_view what, int code)
{
    raise<io_error>(system_error_code(code), message(what, ": ", errno_text(code)), path.string(), code);
}

/// The directory that holds `path`, "." where it names none.
[[nodiscard]] inline std::filesystem::path directory_of(const std::filesystem::path& path)
{
    return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

inline std::atomic<unsynchronised_handler>& unsynchronised_slot() noexcept
{
    static std::atomic<unsynchronised_handler> handler{nullptr};
    return handler;
}

/// Makes renames in a directory durable. File systems that cannot do so are left to themselves; a failure is told to
/// the handler.
inline void synchronise_directory(const std::filesystem::path& directory)
{
    const int code = system::synchronise(directory);
    if (code == 0) { return; }
    if (const auto handler = unsynchronised_slot().load()) { handler(directory, code); }
}

/// Maps `bytes` (not 0) of a new file that has no name and is gone with the map: system::unmap() gives it back.
/// `folder`: where it lies (empty: here). `what`: for whom, in messages.
[[nodiscard]] inline void* map_unnamed_file(
    const std::filesystem::path& folder, std::uint64_t bytes, std::string_view what)
{
    const auto place = folder.empty() ? std::filesystem::path(".") : folder;
    if (bytes > std::numeric_limits<std::size_t>::max()) {
        raise_io(place, message("cannot map ", bytes, " bytes for ", what, " in a 32-bit program"), EFBIG);
    }
    system::unnamed_failure failure{};
    void* const memory = system::map_unnamed(place, static_cast<std::size_t>(bytes), failure);
    if (!memory) {
        raise_io(
            place, failure.of_space ? message(failure.what, " for ", what) : std::string(failure.what), failure.code);
    }
    return memory;
}

} // namespace detail

/// Sets what hears of directories that could not be forced to disk; returns what heard of them before (at first:
/// nothing).
inline unsynchronised_handler set_unsynchronised_handler(unsynchronised_handler handler) noexcept
{
    return detail::unsynchronised_slot().exchange(handler);
}

/// A whole regular file, mapped read-only and private. Move-only; the address does not change when the object moves.
///
/// The bytes follow the file: a file that another process shortens while it is mapped makes reads beyond its new end
/// raise SIGBUS, which a library cannot turn into an error. Replacing a file by rename, as this library does, is safe.
/// Throws io_error for what is missing, unreadable, or not a regular file. Cost: no byte is read.
class mapped_file {
public:
    mapped_file() = default;
    /// Maps the file.
    explicit mapped_file(std::filesystem::path path)
        : path_(std::move(path))
    {
        const detail::descriptor file(detail::system::open_to_read(path_));
        if (!file) { detail::raise_io(path_, "cannot open for reading", errno); }
        detail::system::status status;
        if (!detail::system::look_at(file.get(), status)) {
            detail::raise_io(path_, "cannot read the file's size", errno);
        }
        if (!status.is_file) {
            raise<io_error>(error_code::file_kind,
                status.is_directory ? "is a directory; expected a file" : "is not a regular file", path_.string());
        }
        opened_ = identity(status);
        if (opened_.size > std::numeric_limits<std::size_t>::max()) {
            detail::raise_io(
                path_, message("has ", opened_.size, " bytes, more than a 32-bit program can map into memory"), EFBIG);
        }
        if (opened_.size == 0) { return; }
        data_ = detail::system::map(file.get(), static_cast<std::size_t>(opened_.size));
        if (!data_) { detail::raise_io(path_, "cannot map the file into memory", errno); }
        size_ = static_cast<std::size_t>(opened_.size);
    }
    mapped_file(mapped_file&& other) noexcept
        : path_(std::move(other.path_))
        , data_(std::exchange(other.data_, nullptr))
        , size_(std::exchange(other.size_, 0))
        , opened_(other.opened_)
    { }
    mapped_file& operator=(mapped_file&& other) noexcept
    {
        if (this != &other) {
            unmap();
            path_ = std::move(other.path_);
            data_ = std::exchange(other.data_, nullptr);
            size_ = std::exchange(other.size_, 0);
            opened_ = other.opened_;
        }
        return *this;
    }
    ~mapped_file() { unmap(); }

    /// What tells one state of a file from another: where it lies on the disk, its size, when it was written to.
    struct identity {
        std::uint64_t device = 0, inode = 0, size = 0; ///< of the file system, in it, in bytes
        std::int64_t seconds = 0, nanoseconds = 0; ///< of the last write

        identity() = default;
        /// Of what the system says of a file.
        explicit identity(const detail::system::status& status) noexcept
            : device(status.device)
            , inode(status.inode)
            , size(status.size)
            , seconds(status.seconds)
            , nanoseconds(status.nanoseconds)
        { }
        bool operator==(const identity&) const = default;
    };
    /// The file as it was when it was opened.
    [[nodiscard]] const identity& opened() const noexcept { return opened_; }
    /// Throws io_error (file_changed) where the file at `path` is no longer the one that was `opened`: shortened,
    /// written to, replaced, removed.
    static void check_unchanged(const std::filesystem::path& path, const identity& opened)
    {
        detail::system::status status;
        if (detail::system::look_at(path, status) && identity(status) == opened) { return; }
        raise<io_error>(error_code::file_changed,
            "changed while it was being read: what was computed from it may mix old and new bytes; run again when "
            "nothing else writes to it",
            path.string());
    }
    void check_unchanged() const { check_unchanged(path_, opened_); }

    /// The file's path.
    [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
    /// The file's bytes, which stay where they are as long as the map lives.
    [[nodiscard]] std::span<const std::byte> bytes() const& noexcept { return {data_, size_}; }
    void bytes() const&& = delete; // name the owner first: its views would dangle

    /// How the bytes will be read: MADV_SEQUENTIAL, MADV_RANDOM, MADV_WILLNEED, MADV_NORMAL. A hint: failure is
    /// ignored, and so is all of it on Windows.
    void advise(int advice) const noexcept
    {
        if (size_) { detail::system::advise(data_, size_, advice); }
    }

private:
    void unmap() noexcept
    {
        if (data_) { detail::system::unmap(data_, size_); }
    }

    std::filesystem::path path_;
    const std::byte* data_ = nullptr;
    std::size_t size_ = 0;
    identity opened_;
};

/// Whether a finished file is forced to disk before it takes its name.
enum class durability : std::uint8_t {
    synchronised, ///< fsync the file, rename, fsync the directory: survives a power cut as the old file or the new
    process ///< rename only: survives a killed process as the old file or the new
};

/// Called where a temporary file, a directory or a lock was made (`there`) and where it has its real name or is gone,
/// for those who must remove it when no destructor can run: in a handler of signals or of std::terminate. May be called
/// by several threads at once. The youngest goes first: files before the directories that they lie in.
using temporary_handler = void (*)(const std::filesystem::path& place, bool there) noexcept;

namespace detail {

inline std::atomic<temporary_handler>& temporary_slot() noexcept
{
    static std::atomic<temporary_handler> handler{nullptr};
    return handler;
}

/// What stands under temporary names.
class temporaries {
public:
    static void add(const std::filesystem::path& place)
    {
        tell(place, true);
#if defined(TASKVEC_NO_EXCEPTIONS)
        const light_lock lock(busy_);
        places_.push_back(place);
#endif
    }
    static void drop(const std::filesystem::path& place) noexcept
    {
        tell(place, false);
#if defined(TASKVEC_NO_EXCEPTIONS)
        const light_lock lock(busy_);
        std::erase(places_, place);
#endif
    }

private:
    static void tell(const std::filesystem::path& place, bool there) noexcept
    {
        if (const auto handler = temporary_slot().load()) { handler(place, there); }
    }
#if defined(TASKVEC_NO_EXCEPTIONS)
    /// An error ends the process without a destructor, and calls this before that.
    static void remove() noexcept
    {
        const light_lock lock(busy_);
        std::error_code ignored;
        for (; !places_.empty(); places_.pop_back()) {
            const std::filesystem::path& place = places_.back();
            // Of the directories only one that is not finished has such a name, and others' files lie in the rest.
            if (place.filename().string().starts_with(".taskvec-")) { std::filesystem::remove_all(place, ignored); }
            else {
                std::filesystem::remove(place, ignored);
            }
        }
    }

    static inline std::atomic_flag busy_;
    static inline std::vector<std::filesystem::path> places_;
    static inline const bool hooked_ = (error_cleanup_slot() = &temporaries::remove, true);
#endif
};

} // namespace detail

/// Sets what hears of temporary names; returns what heard of them before (at first: nothing).
inline temporary_handler set_temporary_handler(temporary_handler handler) noexcept
{
    return detail::temporary_slot().exchange(handler);
}

/// Removes a temporary file or directory that a temporary_handler heard of: a directory with all that lies in it where
/// it is not finished, otherwise only where it is empty. Takes no memory, and may be called by handlers of signals.
inline void remove_temporary(const char* place) noexcept
{
#if defined(_WIN32)
    const std::string_view text = place;
    const auto name = text.substr(text.find_last_of("/\\") + 1); // npos + 1 is 0
#else
    const char* const slash = std::strrchr(place, '/');
    const std::string_view name = slash ? slash + 1 : place;
#endif
    detail::system::remove_by_text(place, name.starts_with(".taskvec-"));
}

/// A file that is written under a temporary name beside its target and takes the target's name on commit().
///
/// Until then, and for ever when the process is killed or commit() is never called, the target stays as it was. The
/// temporary file is called `.taskvec-<process>-<number>.tmp`; the destructor removes it, a killed process leaves it
/// behind. A target that exists keeps its permission bits; a new one follows the umask. A symbolic link is replaced,
/// not followed. A file that is still mapped may be replaced: the map keeps the old bytes. Throws io_error with the
/// errno of whatever the system refuses (a full disk at construction, where space is reserved).
///
///     atomic_file file("out.bin", 1024);
///     file.write(0, data, 1024);
///     file.commit();
class atomic_file {
public:
    /// `size`: the bytes that the file will have, reserved at once.
    explicit atomic_file(
        std::filesystem::path target, std::uint64_t size = 0, durability mode = durability::synchronised)
        : atomic_file(begun{}, std::move(target), mode) // what throws from here on is cleared up by the destructor
    {
        if (!target_.has_filename()) {
            raise<io_error>(error_code::file_kind, "names no file", target_.string(), EISDIR);
        }
        detail::system::status status;
        const bool exists = detail::system::look_at(target_, status);
        if (exists && status.is_directory) {
            raise<io_error>(error_code::file_kind, "is a directory; name a file to write", target_.string(), EISDIR);
        }
        if (exists && !status.is_file) {
            raise<io_error>(error_code::file_kind, "exists and is not a regular file; choose another output",
                target_.string(), EEXIST);
        }
        if (exists && !detail::system::may_write(target_)) {
            detail::raise_io(target_, "exists and may not be written", errno);
        }
        const auto directory = detail::directory_of(target_);
        static std::atomic<unsigned> counter{0};
        for (;;) {
            temporary_ = directory
                / message(".taskvec-", detail::system::process(), '-', counter.fetch_add(1, std::memory_order_relaxed),
                    ".tmp");
            file_ = detail::descriptor(detail::system::open_new(temporary_));
            if (file_) {
                detail::temporaries::add(temporary_);
                break;
            }
            if (errno != EEXIST) {
                const int code = errno;
                temporary_.clear();
                detail::raise_io(
                    target_, message("cannot create a file in directory '", directory.string(), "'"), code);
            }
        }
        int code = 0;
        std::string_view what;
        if (exists && detail::system::set_permissions(file_.get(), status.mode & 0777) != 0 && errno != EPERM) {
            code = errno;
            what = "cannot give the new file the old one's permissions";
        }
        if (!code && size) {
            code = detail::system::reserve(file_.get(), size);
            what = "cannot reserve the file's space";
        }
        if (code) {
            discard(); // without exceptions no destructor runs
            detail::raise_io(target_, message(what, " (", size, " bytes)"), code);
        }
    }
    atomic_file(atomic_file&& other) noexcept
        : target_(std::move(other.target_))
        , temporary_(std::exchange(other.temporary_, {}))
        , file_(std::move(other.file_))
        , finished_(other.finished_)
        , mode_(other.mode_)
    { }
    atomic_file& operator=(atomic_file&& other) noexcept
    {
        if (this != &other) {
            discard();
            target_ = std::move(other.target_);
            temporary_ = std::exchange(other.temporary_, {});
            file_ = std::move(other.file_);
            finished_ = other.finished_;
            mode_ = other.mode_;
        }
        return *this;
    }
    ~atomic_file() { discard(); }

    /// The path that commit() gives the file.
    [[nodiscard]] const std::filesystem::path& target() const noexcept { return target_; }
    /// The name that the file has until commit(); empty afterwards.
    [[nodiscard]] const std::filesystem::path& temporary() const noexcept { return temporary_; }

    /// Writes all `size` bytes at `offset`. May be called from several threads for ranges that do not overlap.
    void write(std::uint64_t offset, const void* data, std::size_t size)
    {
        const auto* bytes = static_cast<const std::byte*>(data);
        while (size) {
            const auto written = detail::system::write_at(file_.get(), bytes, size, offset);
            if (written <= 0) {
                const int code = written < 0 ? errno : ENOSPC;
                if (code == EFAULT) { // bytes of a map whose file has been shortened: the system sees it before a
                                      // SIGBUS could be raised
                    raise<io_error>(error_code::file_changed,
                        "cannot be written: a model file that is copied from shrank, or its disk failed, "
                        "while it was being read",
                        target_.string(), code);
                }
                detail::raise_io(target_, message("cannot write ", size, " bytes at offset ", offset), code);
            }
            bytes += written;
            offset += static_cast<std::uint64_t>(written);
            size -= static_cast<std::size_t>(written);
        }
    }

    /// Closes the file until open_again(), for those who write more files than a process may have open. Nothing may be
    /// written in between.
    void close_for_now()
    {
        if (const int code = file_.close()) { detail::raise_io(target_, "cannot close the file", code); }
    }
    /// Opens what close_for_now() closed.
    void open_again()
    {
        if (file_) { return; }
        file_ = detail::descriptor(detail::system::open_to_write(temporary_));
        if (!file_) { detail::raise_io(target_, "cannot open the file again", errno); }
    }

    /// Takes the bytes of a finished file in place of its own: another name of it, or a copy where the file system has
    /// no such thing.
    void take(const std::filesystem::path& finished)
    {
        close_for_now();
        detail::system::remove_file(temporary_);
        if (detail::system::link(finished, temporary_) == 0) { return; }
        std::error_code failure;
        std::filesystem::copy_file(finished, temporary_, failure);
        if (failure) {
            detail::raise_io(target_, message("cannot take the bytes of '", finished.string(), "'"), failure.value());
        }
    }

    /// Forces the bytes to disk (unless durability::process) and closes the file; only the rename is left to commit().
    void finish()
    {
        if (finished_) { return; }
        open_again();
        if (mode_ == durability::synchronised && detail::system::force_to_disk(file_.get()) != 0) {
            detail::raise_io(target_, "cannot force the file to disk", errno);
        }
        close_for_now();
        finished_ = true;
    }

    /// Gives the file its name, replacing what had it. `whole_directory`: also make the rename durable.
    void commit(bool whole_directory = true)
    {
        finish();
        const auto directory = detail::directory_of(target_); // after the rename nothing may fail, memory included
        if (detail::system::rename(temporary_, target_) != 0) {
            const int code = errno;
            detail::raise_io(target_, message("cannot rename '", temporary_.string(), "' to it"), code);
        }
        detail::temporaries::drop(temporary_);
        temporary_.clear();
        if (whole_directory && mode_ == durability::synchronised) { detail::synchronise_directory(directory); }
    }

private:
    struct begun { };
    atomic_file(begun, std::filesystem::path target, durability mode)
        : target_(std::move(target))
        , mode_(mode)
    { }
    void discard() noexcept
    {
        file_.close();
        if (!temporary_.empty()) {
            detail::system::remove_file(temporary_);
            detail::temporaries::drop(temporary_);
        }
        temporary_.clear();
    }

    std::filesystem::path target_, temporary_;
    detail::descriptor file_;
    bool finished_ = false;
    durability mode_ = durability::synchronised;
};

/// A directory that one writer has for itself, by an advisory lock (flock) on `.taskvec-lock` in it. The lock ends with
/// its holder, also with a killed process; the file is removed by the destructor, and one that a killed process left is
/// taken over, with the text that it left in it. Throws io_error (EWOULDBLOCK) where another writer holds it. File
/// systems without such locks (some network ones) are written to without.
class directory_lock {
public:
    directory_lock() = default;
    /// Waits for nobody: takes the lock of `directory`, or throws io_error.
    explicit directory_lock(const std::filesystem::path& directory)
        : directory_lock() // what throws from here on is cleared up by the destructor
    {
        path_ = directory / ".taskvec-lock";
        for (;;) {
            file_ = detail::descriptor(detail::system::open_to_write(path_, true));
            if (!file_) { return; } // whatever is wrong with the directory is found when files are made in it
            if (detail::system::lock(file_.get()) != 0) {
                const int code = errno;
                file_.close();
                if (code != EWOULDBLOCK) {
                    detail::system::remove_file(path_);
                    return;
                }
                raise<io_error>(system_error_code(code),
                    "is being written to by another process; wait until it is done, or choose another output",
                    directory.string(), code);
            }
            // The holder before may have removed the file between the two calls: what is locked must be what is there.
            if (is_there()) {
                detail::temporaries::add(path_);
                return;
            }
        }
    }
    directory_lock(const directory_lock&) = delete;
    directory_lock& operator=(const directory_lock&) = delete;
    ~directory_lock()
    {
        if (!file_) { return; }
        if (!kept_ && is_there()) { detail::system::remove_file(path_); }
        detail::temporaries::drop(path_);
    }

    /// The file in the directory, while the lock is held.
    [[nodiscard]] std::filesystem::path path() const { return file_ ? path_ : std::filesystem::path(); }
    /// What note() left here: by a holder that was killed, at first.
    [[nodiscard]] std::string noted() const
    {
        std::string text;
        if (file_) {
            char piece[4096];
            std::ptrdiff_t size = 0;
            while ((size = detail::system::read_at(file_.get(), piece, sizeof piece, text.size())) > 0) {
                text.append(piece, static_cast<std::size_t>(size));
            }
        }
        return text;
    }
    /// Leaves a text for whoever takes the lock over, should this process be killed; on disk when it returns.
    void note(std::string_view text)
    {
        if (!file_) { return; }
        const auto size = static_cast<std::ptrdiff_t>(text.size());
        if (detail::system::resize(file_.get(), 0) != 0
            || detail::system::write_at(file_.get(), text.data(), text.size(), 0) != size
            || detail::system::force_to_disk(file_.get()) != 0) {
            detail::raise_io(path_, "cannot be written", errno);
        }
    }
    /// The file stays when the lock ends, with its text.
    void keep() noexcept { kept_ = true; }

private:
    /// Whether the locked file still has its name: the directory may have been exchanged for another.
    [[nodiscard]] bool is_there() const noexcept
    {
        detail::system::status held, there;
        return detail::system::look_at(file_.get(), held) && detail::system::look_at(path_, there)
            && held.device == there.device && held.inode == there.inode;
    }

    std::filesystem::path path_;
    detail::descriptor file_;
    bool kept_ = false;
};

namespace detail {

/// What is in a directory, the last one in the alphabet first: an adapter's weights before its configuration.
[[nodiscard]] inline std::vector<std::filesystem::path> names_in(const std::filesystem::path& directory)
{
    std::vector<std::filesystem::path> names;
    if (!system::for_each_name(directory, [&](auto name) { names.emplace_back(name); })) {
        raise_io(directory, "cannot be read as a directory", errno);
    }
    std::sort(names.rbegin(), names.rend());
    return names;
}

/// The process that gave a temporary name; 0 where it is none.
[[nodiscard]] inline int process_of_temporary(std::string_view name) noexcept
{
    constexpr std::string_view prefix = ".taskvec-";
    if (!name.starts_with(prefix) || !name.ends_with(".tmp")) { return 0; }
    name.remove_prefix(prefix.size());
    int process = 0;
    const auto [end, failure] = std::from_chars(name.data(), name.data() + name.size(), process);
    return failure == std::errc{} && *end == '-' ? process : 0;
}

/// What follows the name of an old file that has gone aside, and that of a new file where there was no old one.
inline constexpr std::string_view put_aside_ending = ".old", was_not_there_ending = ".new";

} // namespace detail

/// Whether a name is that of a temporary file or directory (`.taskvec-<process>-….tmp`) whose process is no more on
/// this machine.
[[nodiscard]] inline bool is_left_over(std::string_view name) noexcept
{
    const auto process = detail::process_of_temporary(name);
    return process > 0 && detail::system::is_gone(process);
}

/// Brings a directory back to what it was before a writer that replaced its files one by one was killed: where new
/// files were still to come, the old ones, which had gone aside, return. Returns the names that did. `lock`: on the
/// directory, held. Called by output_directory.
inline std::vector<std::string> finish_replacements(
    const std::filesystem::path& directory, [[maybe_unused]] const directory_lock& lock)
{
    std::vector<std::string> returned;
    for (const auto& name : detail::names_in(directory)) {
        const auto text = detail::name_text(name);
        const bool dead = is_left_over(text) || detail::process_of_temporary(text) == detail::system::process();
        if (!dead || text.find("-directory-") == std::string::npos) { continue; }
        const auto folder = directory / name;
        detail::system::status status;
        if (!detail::system::look_at_link(folder, status) || !status.is_directory) { continue; }
        std::vector<std::string> aside, added;
        bool to_come = false;
        for (const auto& entry : detail::names_in(folder)) {
            auto inner = detail::name_text(entry);
            const bool old = inner.ends_with(detail::put_aside_ending);
            const bool mark = inner.ends_with(detail::was_not_there_ending);
            to_come = to_come || (!old && !mark);
            if (old) { aside.push_back(std::move(inner)); }
            else if (mark) {
                added.push_back(std::move(inner));
            }
        }
        if (aside.empty() && added.empty()) { continue; } // nothing was moved yet
        if (to_come) {
            for (const auto& mark : added) {
                const auto plain = mark.substr(0, mark.size() - detail::was_not_there_ending.size());
                detail::system::remove_file(directory / detail::path_of(plain));
            }
            for (const auto& old : aside) { // the first to go and the last to come comes back last here too
                auto plain = old.substr(0, old.size() - detail::put_aside_ending.size());
                const auto place = directory / detail::path_of(plain);
                if (detail::system::rename(folder / detail::path_of(old), place) != 0) {
                    detail::raise_io(place, "cannot be given back what a killed run put aside", errno);
                }
                returned.push_back(std::move(plain));
            }
            detail::synchronise_directory(directory);
        }
        detail::remove_tree(folder.c_str());
    }
    return returned;
}

/// What becomes of a directory that exists already.
enum class existing_directory : std::uint8_t {
    fill, ///< files take their names in it one by one
    exchange ///< a sibling, with links to what stays, takes its place in one step, where the system can do that
};

/// A directory that files are written to. One that does not exist appears whole or not at all: it is filled under
/// another name beside its own, `.taskvec-<process>-directory-<number>.tmp`, and takes its own on commit(); until then
/// the destructor removes it, and the directories above it that had to be made. In one that exists, files are written
/// where they belong, each by itself; or, where they belong together (existing_directory::exchange), to a sibling that
/// is exchanged with it on commit(), so that nobody ever sees some of the old and some of the new. That needs Linux, a
/// file system with links, and a directory of one's own without directories in it; elsewhere the old files go aside and
/// the new ones take their names, the first in the alphabet (an adapter's configuration) going first and coming last.
/// One writer at a time has an existing directory (see directory_lock). Throws io_error.
///
///     output_directory folder("out/merged");
///     atomic_file file(folder.path() / "a.bin", 4);
///     …
///     file.commit();
///     folder.commit();
class output_directory {
public:
    /// `target`: the directory. What `mode` and `existing` mean is said at their types.
    explicit output_directory(const std::filesystem::path& target, durability mode = durability::synchronised,
        existing_directory existing = existing_directory::fill)
        : output_directory(begun{}, target, mode) // what throws from here on is cleared up by the destructor
    {
        std::error_code ignored;
        if (std::filesystem::exists(target_, ignored)) {
            if (!std::filesystem::is_directory(target_, ignored)) {
                raise<io_error>(error_code::file_kind, "exists and is not a directory; choose another output",
                    target_.string(), ENOTDIR);
            }
            lock_.emplace(target_);
            finish_replacements(target_, *lock_);
            if (existing == existing_directory::exchange) { stage(); }
            return;
        }
        std::vector<std::filesystem::path> missing;
        for (auto level = target_.parent_path(); !level.empty() && !std::filesystem::exists(level, ignored);
            level = level.parent_path()) {
            missing.push_back(level);
        }
        missing.insert(missing.begin(), path_ = sibling_name());
        made_.reserve(missing.size());
        for (; !missing.empty(); missing.pop_back()) { make(std::move(missing.back())); }
    }
    output_directory(const output_directory&) = delete;
    output_directory& operator=(const output_directory&) = delete;
    ~output_directory() { discard(); }

    /// Where to write: under the temporary name where the directory is new.
    [[nodiscard]] const std::filesystem::path& path() const noexcept { return path_; }
    /// What was made so far, outermost first: empty for a directory that exists, and after commit().
    [[nodiscard]] const std::vector<std::filesystem::path>& made() const noexcept { return made_; }

    /// Gives a new directory its name. `obsolete`: names of files that go as the new ones come, from a directory whose
    /// files are replaced together.
    void commit(const std::vector<std::string>& obsolete = {})
    {
        if (made_.empty()) { return; }
        if (staged_) {
            replace(obsolete);
            return;
        }
        auto named = target_; // after the rename nothing may fail, memory included
        std::vector<std::filesystem::path> above;
        for (const auto& level : made_) { above.push_back(detail::directory_of(level)); }
        if (detail::system::rename(path_, target_) != 0) {
            const int code = errno;
            if (code == ENOTEMPTY || code == EEXIST || code == ENOTDIR) {
                raise<io_error>(error_code::file_kind,
                    "was made by another program while this one worked, and is left as that made it; run again to "
                    "replace it, or choose another output",
                    target_.string(), code);
            }
            detail::raise_io(target_, "cannot give the finished directory its name", code);
        }
        path_.swap(named);
        for (const auto& level : made_) { detail::temporaries::drop(level); }
        made_.clear();
        // The name first, then those of the directories above that are new themselves.
        for (; mode_ == durability::synchronised && !above.empty(); above.pop_back()) {
            detail::synchronise_directory(above.back());
        }
    }

    /// The lock's file, while the directory is locked, for whoever must remove it when no destructor can run.
    [[nodiscard]] std::filesystem::path lock_file() const { return lock_ ? lock_->path() : std::filesystem::path(); }
    /// The lock on a directory that exists already; none otherwise.
    [[nodiscard]] directory_lock* lock() noexcept { return lock_ ? &*lock_ : nullptr; }

private:
    struct begun { };
    output_directory(begun, const std::filesystem::path& target, durability mode)
        : target_(target.has_filename() ? target : target.parent_path())
        , path_(target_)
        , mode_(mode)
    { }
    [[nodiscard]] std::filesystem::path sibling_name() const
    {
        static std::atomic<unsigned> counter{0};
        return detail::directory_of(target_)
            / message(".taskvec-", detail::system::process(), "-directory-",
                counter.fetch_add(1, std::memory_order_relaxed), ".tmp");
    }
    /// A new directory for the new files: beside the one that exists, or within it where the two cannot be exchanged.
    void stage()
    {
        std::error_code failure;
        auto real = std::filesystem::canonical(target_, failure); // a link to a directory stays a link
        if (failure) { return; }
        const auto named = std::exchange(target_, std::move(real));
        for (const bool beside : {true, false}) {
            detail::system::status old, own;
            if (beside && !can_be_exchanged(old)) { continue; }
            path_ = beside ? sibling_name() : target_ / sibling_name().filename();
            made_.push_back(path_); // before there is something to remove
            if (detail::system::make_directory(path_, false) == 0
                && (!beside
                    || (detail::system::look_at(path_, own) && own.owner == old.owner && own.group == old.group
                        && detail::system::set_permissions(path_, old.mode & 07777) == 0))) {
                detail::temporaries::add(path_);
                staged_ = true;
                beside_ = beside;
                return;
            }
            detail::system::remove_directory(path_);
            made_.clear();
        }
        target_ = path_ = named;
    }
    [[nodiscard]] bool can_be_exchanged(detail::system::status& status) const
    {
        if (!detail::system::can_exchange) { return false; }
        detail::system::status above;
        if (target_ == target_.root_path() || !detail::system::look_at(target_, status)
            || !detail::system::look_at(target_.parent_path(), above) || status.device != above.device
            || !detail::system::may_fill(target_.parent_path())) {
            return false;
        }
        for (const auto& name : detail::names_in(target_)) {
            detail::system::status entry;
            if (!detail::system::look_at_link(target_ / name, entry) || !entry.is_file) { return false; }
        }
        return true;
    }
    /// Puts the new files in the place of the old ones.
    void replace(const std::vector<std::string>& obsolete)
    {
        const auto fresh = detail::names_in(path_);
        auto named = target_;
        for (const auto& name : fresh) { // each keeps the permissions of what it replaces
            detail::system::status old;
            if (!detail::system::look_at(target_ / name, old) || !old.is_file) { continue; }
            if (!detail::system::may_write(target_ / name)) {
                detail::raise_io(target_ / name, "exists and may not be written", errno);
            }
            (void)detail::system::set_permissions(path_ / name, old.mode & 0777);
        }
        if (!beside_ || !link_the_rest(obsolete) || !take_place()) {
            go_inside(fresh);
            move_in(fresh, obsolete);
        }
        discard(); // what lies under the temporary name is old by now
        path_.swap(named);
        staged_ = false;
    }
    /// Takes the new files into the old directory, where the next writer of it looks for what has gone aside.
    void go_inside(const std::vector<std::filesystem::path>& fresh)
    {
        if (!beside_) { return; }
        for (const auto& name : detail::names_in(path_)) {
            if (std::find(fresh.begin(), fresh.end(), name) == fresh.end()) {
                detail::system::remove_file(path_ / name);
            }
        }
        auto inner = target_ / path_.filename(), made = inner;
        if (detail::system::rename(path_, inner) != 0) {
            detail::raise_io(target_, "the finished files cannot be moved into it", errno);
        }
        detail::temporaries::drop(path_);
        detail::temporaries::add(inner);
        path_.swap(inner);
        made_.back().swap(made);
        beside_ = false;
    }
    /// Where the directories cannot be exchanged: the old files go aside, then the new ones take their names. The first
    /// to go and the last to come is the first one in the alphabet: an adapter has no configuration, and is read by
    /// nobody, while its weights change.
    void move_in(const std::vector<std::filesystem::path>& fresh, const std::vector<std::string>& obsolete) const
    {
        struct step {
            std::filesystem::path from, to;
        };
        std::vector<step> steps;
        const auto put_aside = [&](const std::filesystem::path& name) {
            detail::system::status old;
            if (detail::system::look_at_link(target_ / name, old)) {
                steps.push_back({target_ / name, (path_ / name) += detail::put_aside_ending});
            }
        };
        for (auto name = fresh.rbegin(); name != fresh.rend(); ++name) {
            const std::size_t before = steps.size();
            put_aside(*name);
            if (steps.size() != before) { continue; }
            // Nothing of this name is there to come back: whoever undoes the work removes the new file.
            const auto mark = (path_ / *name) += detail::was_not_there_ending;
            if (!detail::descriptor(detail::system::open_new(mark, false))) {
                detail::raise_io(target_, "a file cannot be created in it", errno);
            }
        }
        for (const auto& name : obsolete) { put_aside(name); }
        const std::size_t aside = steps.size();
        for (const auto& name : fresh) { steps.push_back({path_ / name, target_ / name}); }
        for (std::size_t i = 0; i < steps.size(); ++i) {
            if (i == 0 && mode_ == durability::synchronised) { detail::synchronise_directory(path_); }
            const bool ordered = i == 0 || i == aside || i + 1 == steps.size(); // also on the disk
            if (mode_ == durability::synchronised && ordered) { detail::synchronise_directory(target_); }
            if (detail::system::rename(steps[i].from, steps[i].to) == 0) { continue; }
            const int code = errno;
            while (i-- > 0) { detail::system::rename(steps[i].to, steps[i].from); }
            detail::raise_io(target_, "the finished files cannot take their names in it", code);
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(target_); }
    }
    /// Gives all that is only in the old directory a name in the new one too; false where the system has no such links.
    [[nodiscard]] bool link_the_rest(const std::vector<std::string>& obsolete) const
    {
        const auto lock = lock_file().filename();
        for (const auto& name : detail::names_in(target_)) {
            if (std::find(obsolete.begin(), obsolete.end(), name) != obsolete.end()) { continue; }
            if (name != lock && detail::system::link(target_ / name, path_ / name) != 0 && errno != EEXIST) {
                return false;
            }
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(path_); }
        return true;
    }
    /// False where the system cannot exchange the two.
    [[nodiscard]] bool take_place() const
    {
        const auto above = detail::directory_of(target_);
        if (detail::system::exchange(path_, target_) != 0) {
            const int code = errno;
            if (detail::system::is_no_exchange(code)) { return false; }
            detail::raise_io(target_, "cannot be exchanged with the finished directory", code);
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(above); }
        return true;
    }
    void make(std::filesystem::path level)
    {
        if (detail::system::make_directory(level) == 0) {
            made_.push_back(std::move(level)); // there is room for it
            detail::temporaries::add(made_.back());
            return;
        }
        const int code = errno;
        discard();
        detail::raise_io(target_, message("cannot create the directory '", level.string(), "'"), code);
    }
    void discard() noexcept
    {
        if (!made_.empty() && made_.back() == path_) { detail::remove_tree(path_.c_str()); }
        for (; !made_.empty(); made_.pop_back()) {
            detail::temporaries::drop(made_.back());
            detail::system::remove_directory(made_.back());
        } // fails, as it should, where something else lies in it by now
    }

    std::filesystem::path target_, path_;
    durability mode_;
    std::vector<std::filesystem::path> made_;
    std::optional<directory_lock> lock_;
    bool staged_ = false; ///< what lies at path_ is to replace what lies at target_
    bool beside_ = false; ///< by an exchange of the two
};

/// Writes a whole text file atomically.
inline void write_text_file(
    const std::filesystem::path& path, std::string_view text, durability mode = durability::synchronised)
{
    atomic_file file(path, 0, mode);
    file.write(0, text.data(), text.size());
    file.commit();
}

/// A whole file as a string. Meant for small files: more than `limit` bytes is a format_error.
[[nodiscard]] inline std::string read_text_file(const std::filesystem::path& path, std::size_t limit = 100'000'000)
{
    const mapped_file file(path);
    const auto bytes = file.bytes();
    if (bytes.size() > limit) {
        raise<format_error>(error_code::file_too_large,
            message("has ", bytes.size(), " bytes; expected at most ", limit), path.string());
    }
    std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    file.check_unchanged();
    return text;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_FILE_HPP

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A file's `__metadata__`: strings by name.
using metadata_map = std::map<std::string, std::string>;

/// The longest header that a reader accepts and a writer makes.
inline constexpr std::uint64_t safetensors_header_limit = 100'000'000;

/// One tensor of a file.
struct safetensors_entry {
    std::string name; ///< of the tensor
    taskvec::dtype dtype = taskvec::dtype::f32; ///< as it is stored
    extents shape{}; ///< slowest first
    std::uint64_t offset = 0; ///< of its first byte, from the beginning of the file
    std::uint64_t bytes = 0; ///< of the tensor
};

/// What a header says, checked.
struct safetensors_header {
    std::vector<safetensors_entry> entries; ///< in the order of their bytes in the file
    metadata_map metadata; ///< of __metadata__
    std::uint64_t data_offset = 0; ///< where the buffer begins, from the beginning of the file
};

namespace detail {

/// Reads a header's JSON event by event, so that its cost in memory is that of its result.
class safetensors_events final : public nlohmann::json_sax<nlohmann::json> {
public:
    struct tensor {
        std::string name;
        taskvec::dtype dtype = taskvec::dtype::f32;
        std::vector<std::uint64_t> shape, range;
        bool has_dtype = false, has_shape = false, has_range = false;
    };

    explicit safetensors_events(std::string_view file)
        : file_(file)
    { }

    std::vector<tensor> tensors;
    metadata_map metadata;

    [[noreturn]] bool fail(const std::string& what, std::uint64_t position)
    {
        raise<format_error>(error_code::json_syntax,
            message("header is not valid JSON at byte ", 8 + position, ": ", what), file_, 8 + position);
    }

    bool null() override
    {
        // The reference reader takes a null __metadata__ for none at all.
        return top() == state::root && in_metadata_key() ? true : scalar("null");
    }
    bool boolean(bool) override { return scalar("a boolean"); }
    bool number_integer(number_integer_t x) override { return scalar(x == 0 ? "-0" : "a negative number"); }
    bool number_float(number_float_t, const string_t& text) override { return scalar(text); }
    bool number_unsigned(number_unsigned_t x) override
    {
        if (top() == state::shape) { tensors.back().shape.push_back(x); }
        else if (top() == state::range) {
            if (tensors.back().range.size() == 2) { bad("data_offsets has more than two numbers"); }
            tensors.back().range.push_back(x);
        }
        else {
            return scalar("a number");
        }
        return true;
    }
    bool string(string_t& x) override
    {
        if (top() == state::metadata) { metadata[key_] = std::move(x); }
        else if (top() == state::tensor && key_ == "dtype") {
            const auto type = parse_dtype(x);
            if (!type) { bad(message("has the unknown dtype '", x, "'")); }
            tensors.back().dtype = *type;
            tensors.back().has_dtype = true;
        }
        else {
            return scalar("a string");
        }
        return true;
    }
    bool binary(binary_t&) override { return scalar("binary"); }

    bool start_object(std::size_t) override
    {
        if (stack_.empty()) { return push(state::root); }
        if (top() == state::root) {
            if (in_metadata_key()) { return push(state::metadata); }
            tensors.push_back({.name = key_, .shape = {}, .range = {}});
            return push(state::tensor);
        }
        if (!ignoring()) { scalar("an object"); }
        return push(state::ignored);
    }
    bool start_array(std::size_t) override
    {
        if (!stack_.empty() && top() == state::tensor && key_ == "shape") {
            tensors.back().has_shape = true;
            return push(state::shape);
        }
        if (!stack_.empty() && top() == state::tensor && key_ == "data_offsets") {
            tensors.back().has_range = true;
            return push(state::range);
        }
        if (stack_.empty() || !ignoring()) { scalar("an array"); }
        return push(state::ignored);
    }
    bool key(string_t& x) override
    {
        if (!stack_.back().keys.insert(x).second) {
            const auto kind = top();
            if (kind == state::root) {
                raise<format_error>(error_code::json_key_repeated,
                    message("tensor '", x, "' occurs twice in the header"), file_, std::uint64_t{8});
            }
            if (kind == state::metadata) {
                raise<format_error>(error_code::json_key_repeated, message("metadata key '", x, "' occurs twice"),
                    file_, std::uint64_t{8});
            }
            bad(message("has the key '", x, "' twice"));
        }
        key_ = std::move(x);
        return true;
    }
    bool end_object() override
    {
        if (top() == state::tensor) {
            const auto& t = tensors.back();
            if (!t.has_dtype || !t.has_shape || !t.has_range) {
                bad(message("has no ", !t.has_dtype ? "dtype" : !t.has_shape ? "shape" : "data_offsets"));
            }
        }
        return pop();
    }
    bool end_array() override
    {
        if (top() == state::range && tensors.back().range.size() != 2) {
            bad("has data_offsets of fewer than two numbers");
        }
        return pop();
    }
    bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& ex) override
    {
        fail(syntax_message(ex.what()), position ? position - 1 : 0);
    }

private:
    enum class state : std::uint8_t { none, root, metadata, tensor, shape, range, ignored };
    struct frame {
        state kind = state::none;
        std::set<std::string> keys{};
    };

    [[nodiscard]] state top() const { return stack_.empty() ? state::none : stack_.back().kind; }
    [[nodiscard]] bool in_metadata_key() const { return key_ == "__metadata__"; }
    /// Keys of a tensor that the format does not know are ignored, as the reference reader does.
    [[nodiscard]] bool ignoring() const
    {
        return top() == state::ignored
            || (top() == state::tensor && key_ != "dtype" && key_ != "shape" && key_ != "data_offsets");
    }
    /// A value that is neither a string nor an unsigned number where one belongs.
    bool scalar(std::string_view found)
    {
        if (ignoring()) { return true; }
        switch (top()) {
        case state::none:
            raise<format_error>(error_code::header_field, message("header is ", found, "; expected a JSON object"),
                file_, std::uint64_t{8});
        case state::root:
            raise<format_error>(error_code::header_field,
                message(in_metadata_key() ? "__metadata__" : "tensor '" + key_ + "'", " is ", found,
                    "; expected a JSON object"),
                file_, std::uint64_t{8});
        case state::metadata:
            raise<format_error>(error_code::header_field,
                message("metadata '", key_, "' is ", found, "; expected a string"), file_, std::uint64_t{8});
        case state::shape: bad(message("has ", found, " in its shape; expected unsigned integers"));
        case state::range: bad(message("has ", found, " in its data_offsets; expected unsigned integers"));
        default:
            bad(message("has ", found, " as its ", key_,
                key_ == "dtype" ? "; expected a string" : "; expected an array of unsigned integers"));
        }
    }
    [[noreturn]] void bad(const std::string& what)
    {
        raise<format_error>(
            error_code::header_field, message("tensor '", tensors.back().name, "' ", what), file_, std::uint64_t{8});
    }
    bool push(state kind)
    {
        if (stack_.size() == json_depth_limit) {
            raise<format_error>(error_code::json_syntax,
                message("header is nested deeper than ", json_depth_limit, " levels"), file_, std::uint64_t{8});
        }
        stack_.push_back({kind});
        return true;
    }
    bool pop()
    {
        stack_.pop_back();
        return true;
    }

    std::string file_;
    std::vector<frame> stack_;
    std::string key_;
};

/// Checks one tensor's numbers the way the reference reader does; `start` is where its bytes must begin in the buffer.
inline safetensors_entry check_tensor(
    safetensors_events::tensor&& t, std::uint64_t start, std::uint64_t data_offset, std::string_view file)
{
    const auto fail = [&](const std::string& what) {
        raise<format_error>(
            error_code::tensor_offsets, message("tensor '", t.name, "' ", what), std::string(file), data_offset);
    };
    const std::uint64_t begin = t.range[0], end = t.range[1];
    if (begin > end) { fail(message("has data_offsets [", begin, ", ", end, "] that run backwards")); }
    if (begin != start) {
        fail(message("begins at byte ", begin, " of the buffer; expected ", start,
            ", where the tensor before it ends: the buffer has ", begin > start ? "a hole" : "an overlap"));
    }
    std::uint64_t count = 1;
    extents shape;
    shape.reserve(t.shape.size());
    for (const auto extent : t.shape) {
        if (product_wraps(count, extent, count)) { fail("has a shape whose product is above 2^64-1"); }
        if (extent > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
            fail("has an extent above 2^63-1");
        }
        shape.push_back(static_cast<std::int64_t>(extent));
    }
    std::uint64_t bit_count = 0;
    if (product_wraps(count, bits_per_element(t.dtype), bit_count)) { fail("has more than 2^64-1 bits"); }
    if (bit_count % 8 != 0) {
        fail(message("of dtype ", to_string(t.dtype), " has ", bit_count, " bits; expected whole bytes"));
    }
    if (end - begin != bit_count / 8) {
        fail(message("of dtype ", to_string(t.dtype), " and shape ", to_string(shape), " needs ", bit_count / 8,
            " bytes; its data_offsets give it ", end - begin));
    }
    return {std::move(t.name), t.dtype, std::move(shape), data_offset + begin, end - begin};
}

} // namespace detail

/// Reads and checks the header of a safetensors file that lies in memory, by the rules of the reference reader: header
/// of at most 100,000,000 bytes, UTF-8 JSON nested at most 127 deep, ranges that tile the buffer without hole or
/// overlap, products checked for overflow, sizes that match. Leading white space, unknown keys of a tensor, empty
/// tensors, scalars, any rank, any order of tensors and unaligned data are valid. Stricter than the reference in four
/// points: a key that occurs twice, a tensor described by a JSON array instead of an object, a dtype that is no string,
/// and an extent above 2^63-1 are refused. Throws format_error naming `file` and the tensor. Cost: O(header).
[[nodiscard]] inline safetensors_header parse_safetensors(std::span<const std::byte> bytes, std::string_view file)
{
    const auto fail = [&](error_code code, const std::string& what, std::uint64_t offset) {
        raise<format_error>(code, what, std::string(file), offset);
    };
    std::uint64_t length = 0;
    if (bytes.size() >= 8) { std::memcpy(&length, bytes.data(), 8); }
    if (bytes.size() < 8 || length > safetensors_header_limit || length > bytes.size() - 8 || length == 0) {
        if (const auto kind = what_is_this_file(bytes)) { fail(error_code::not_safetensors, kind->sentence(), 0); }
    }
    if (bytes.size() < 8) {
        fail(error_code::file_truncated,
            message("has ", bytes.size(), " bytes; a safetensors file has at least 8: fetch it again"), 0);
    }
    if (length > safetensors_header_limit) {
        fail(error_code::not_safetensors,
            message("claims a header of ", length, " bytes; at most ", safetensors_header_limit,
                " are allowed: this is not a safetensors file, or a damaged one"),
            0);
    }
    if (length > bytes.size() - 8) {
        fail(error_code::file_truncated,
            message("claims a header of ", length, " bytes and has ", bytes.size() - 8,
                " after it: the file is cut short; fetch it again"),
            0);
    }

    detail::safetensors_events events(file);
    detail::sax_parse_strictly(
        {reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<std::size_t>(length)}, events);

    safetensors_header header;
    header.metadata = std::move(events.metadata);
    header.data_offset = 8 + length;
    std::stable_sort(
        events.tensors.begin(), events.tensors.end(), [](const auto& a, const auto& b) { return a.range < b.range; });
    header.entries.reserve(events.tensors.size());
    std::uint64_t end = 0;
    for (auto& tensor : events.tensors) {
        header.entries.push_back(detail::check_tensor(std::move(tensor), end, header.data_offset, file));
        end += header.entries.back().bytes;
    }
    if (const std::uint64_t present = bytes.size() - header.data_offset; end != present) {
        fail(end > present ? error_code::file_truncated : error_code::tensor_offsets,
            message("has ", present, " bytes of tensor data; its header describes ", end,
                end > present ? ": the file is cut short; fetch it again" : ""),
            header.data_offset);
    }
    return header;
}

/// A safetensors file, mapped. Tensors are views into the map and live as long as this object (moving it keeps them).
/// A view's address is aligned to its dtype only if the file aligned it.
///
///     taskvec::safetensors_file file("model.safetensors");
///     for (const auto& [name, tensor] : file.model()) { … }
///
/// Throws io_error, format_error. Cost: O(header); no tensor byte is read.
class safetensors_file {
public:
    /// Maps the file and checks its header.
    explicit safetensors_file(std::filesystem::path path)
        : map_(std::move(path))
        , header_(parse_safetensors(map_.bytes(), map_.path().string()))
    { }
    /// A file of another format whose tensors lie in it as they do here: `header` was read from it, and checked against
    /// its bytes (formats/pytorch.hpp).
    safetensors_file(mapped_file map, safetensors_header header)
        : map_(std::move(map))
        , header_(std::move(header))
    { }
    /// The same, with some tensors laid out anew: those whose offset is `size of the file + n` lie at byte n of `more`.
    safetensors_file(mapped_file map, safetensors_header header, std::shared_ptr<const std::byte> more)
        : map_(std::move(map))
        , header_(std::move(header))
        , more_(std::move(more))
    { }

    /// The file's path.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return map_.path(); }
    /// The file's path.
    [[nodiscard]] std::filesystem::path path() && { return map_.path(); }
    /// The map itself.
    [[nodiscard]] const mapped_file& map() const& noexcept { return map_; }
    void map() const&& = delete; // name the owner first: its views would dangle
    /// The tensors in the order of their bytes in the file.
    [[nodiscard]] const std::vector<safetensors_entry>& entries() const& noexcept { return header_.entries; }
    [[nodiscard]] std::vector<safetensors_entry> entries() && { return std::move(header_.entries); }
    /// What __metadata__ has.
    [[nodiscard]] const metadata_map& metadata() const& noexcept { return header_.metadata; }
    /// What __metadata__ has.
    [[nodiscard]] metadata_map metadata() && { return std::move(header_.metadata); }
    /// Bytes of the tensors together.
    [[nodiscard]] std::uint64_t data_bytes() const noexcept { return map_.bytes().size() - header_.data_offset; }
    void tensor(const safetensors_entry&) const&& = delete; // name the owner first: its views would dangle
    /// A tensor of entries(), as a view into the map.
    [[nodiscard]] const_tensor_ref tensor(const safetensors_entry& entry) const&
    {
        const auto size = map_.bytes().size();
        const auto* const data =
            more_ && entry.offset >= size ? more_.get() + (entry.offset - size) : map_.bytes().data() + entry.offset;
        return {data, entry.dtype, entry.shape, {}, memory_space::host, 0};
    }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// All tensors, by name.
    [[nodiscard]] const_model_ref model() const&
    {
        std::vector<const safetensors_entry*> sorted;
        for (const auto& entry : header_.entries) { sorted.push_back(&entry); }
        std::sort(sorted.begin(), sorted.end(), [](auto* a, auto* b) { return a->name < b->name; });
        const_model_ref result;
        for (const auto* entry : sorted) { result.insert(entry->name, tensor(*entry)); }
        return result;
    }

private:
    mapped_file map_;
    safetensors_header header_;
    std::shared_ptr<const std::byte> more_;
};

/// The header bytes (length included) of a file that holds `specs`, and where each tensor's bytes go.
struct safetensors_layout {
    std::string head; ///< length and header
    std::vector<std::uint64_t> offsets; ///< for each spec, from the beginning of the file
    std::uint64_t size = 0; ///< of the whole file
};
/// Whether a file has this head and size.
[[nodiscard]] inline bool is_laid_out(const std::filesystem::path& path, const safetensors_layout& layout)
{
    const mapped_file file(path);
    const auto bytes = file.bytes();
    return bytes.size() == layout.size && std::memcmp(bytes.data(), layout.head.data(), layout.head.size()) == 0;
}

/// Lays a file out as the reference writer does: tensors by dtype (its enum, descending), then by name; `__metadata__`
/// first; the header padded with spaces to a multiple of 8. `format` is set to "pt" unless the metadata has it already.
/// Throws invalid_argument for a name that occurs twice, is "__metadata__", or is not UTF-8.
[[nodiscard]] inline safetensors_layout layout_safetensors(
    const std::vector<tensor_spec>& specs, metadata_map metadata = {})
{
    metadata.try_emplace("format", "pt");
    std::vector<std::size_t> order(specs.size());
    for (std::size_t i = 0; i < order.size(); ++i) { order[i] = i; }
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return specs[a].dtype != specs[b].dtype ? specs[a].dtype > specs[b].dtype : specs[a].name < specs[b].name;
    });

    std::string json = "{\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
        json += (json.back() == '{' ? "" : ",") + json_string(key) + ":" + json_string(value);
    }
    json += '}';
    safetensors_layout layout;
    layout.offsets.resize(specs.size());
    std::uint64_t at = 0;
    std::set<std::string_view> names{"__metadata__"};
    for (const auto index : order) {
        const auto& spec = specs[index];
        if (!names.insert(spec.name).second) {
            raise<invalid_argument>(spec.name == "__metadata__" ? error_code::unwritable : error_code::tensor_repeated,
                spec.name == "__metadata__" ? "a tensor cannot be called '__metadata__'"
                                            : message("tensor '", spec.name, "' would be written twice"));
        }
        const std::uint64_t count = spec.size();
        std::uint64_t bit_count = 0, end = 0;
        if (detail::product_wraps(count, bits_per_element(spec.dtype), bit_count)
            || detail::sum_wraps(at, bit_count / 8, end)) {
            raise<invalid_argument>(error_code::unwritable,
                message("tensor '", spec.name, "' of shape ", to_string(spec.shape), " is too large for a file"));
        }
        if (bit_count % 8 != 0) {
            raise<invalid_argument>(error_code::unwritable,
                message("tensor '", spec.name, "' of dtype ", to_string(spec.dtype), " does not fill whole bytes"));
        }
        json += ',' + json_string(spec.name) + ":{\"dtype\":\"" + std::string(to_string(spec.dtype)) + "\",\"shape\":[";
        for (std::size_t i = 0; i < spec.shape.size(); ++i) { json += message(i ? "," : "", spec.shape[i]); }
        json += "],\"data_offsets\":[" + std::to_string(at) + ',' + std::to_string(end) + "]}";
        layout.offsets[index] = at;
        at = end;
    }
    json += '}';
    json.append((8 - json.size() % 8) % 8, ' ');
    const std::uint64_t length = json.size();
    if (length > safetensors_header_limit) {
        raise<invalid_argument>(error_code::unwritable,
            message("the header would have ", length, " bytes; a safetensors header has at most ",
                safetensors_header_limit, ": write several files"));
    }
    layout.head.resize(8);
    std::memcpy(layout.head.data(), &length, 8);
    layout.head += json;
    for (auto& offset : layout.offsets) { offset += layout.head.size(); }
    layout.size = layout.head.size() + at;
    return layout;
}

/// Writes one safetensors file: reserves it under a temporary name, takes the tensors' bytes in any order and from any
/// thread, and gives it its name on commit(). See atomic_file for what a crash leaves, and for replacing an input.
///
///     taskvec::safetensors_writer out("merged.safetensors", {{"w", taskvec::dtype::f32, {2, 2}}});
///     out.write(0, 0, data, 16);
///     out.commit();
class safetensors_writer final : public tensor_sink {
public:
    /// Tensor `index` of write() is specs[index], whatever its place in the file.
    /// Throws invalid_argument (see layout_safetensors) before anything is created, and io_error.
    safetensors_writer(std::filesystem::path target, const std::vector<tensor_spec>& specs, metadata_map metadata = {},
        durability mode = durability::synchronised)
        : safetensors_writer(std::move(target), specs, layout_safetensors(specs, std::move(metadata)), mode)
    { }
    /// A file that is written already, with these tensors and this metadata: only commit() is left. Throws
    /// format_error where it has others.
    safetensors_writer(std::filesystem::path target, const std::vector<tensor_spec>& specs, metadata_map metadata,
        durability mode, const std::filesystem::path& finished)
        : safetensors_writer(std::move(target), specs, layout_safetensors(specs, std::move(metadata)), mode, finished)
    { }

    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        if (index >= sizes_.size() || offset > sizes_[index] || size > sizes_[index] - offset) {
            raise<invalid_argument>(error_code::index_out_of_range,
                message("a write of ", size, " bytes at ", offset, " lies outside tensor ", index, " of '",
                    file_.target().string(), "'"));
        }
        if (on_demand_ && whole_.load(std::memory_order_acquire)) { // a walk that settles its sums writes some again
            const detail::light_lock lock(busy_);
            file_.open_again();
            file_.write(offsets_[index] + offset, data, size);
            file_.close_for_now();
            return;
        }
        if (on_demand_ && !open_.load(std::memory_order_acquire)) {
            const detail::light_lock lock(busy_);
            if (!open_.load(std::memory_order_relaxed)) {
                file_.open_again();
                open_.store(true, std::memory_order_release);
            }
        }
        file_.write(offsets_[index] + offset, data, size);
        // Before the first byte is written again all have been written once: whoever writes the last one is the only
        // one left.
        if (written_.fetch_add(size, std::memory_order_acq_rel) + size == expected_ && on_demand_ && size) {
            file_.close_for_now();
            whole_.store(true, std::memory_order_release);
        }
    }
    /// Has the file open from its first write to its last only, for those who write more files than a process may have
    /// open. Before the first write.
    void open_on_demand()
    {
        file_.close_for_now();
        on_demand_ = true;
    }

    /// Forces the bytes to disk, so that commit() only renames. Throws invalid_argument if fewer bytes were written
    /// than the tensors have.
    void finish()
    {
        if (const auto written = written_.load(); written < expected_) {
            raise<invalid_argument>(error_code::call_order,
                message("'", file_.target().string(), "' is incomplete: ", written, " of ", expected_,
                    " bytes were written"));
        }
        file_.finish();
    }
    /// Gives the file its name. Nothing may be written afterwards.
    void commit(bool whole_directory = true)
    {
        finish();
        file_.commit(whole_directory);
    }

    /// The path that commit() gives the file.
    [[nodiscard]] const std::filesystem::path& target() const noexcept { return file_.target(); }
    /// The name that the file has until commit(); empty afterwards.
    [[nodiscard]] const std::filesystem::path& temporary() const noexcept { return file_.temporary(); }
    /// Bytes of the whole file.
    [[nodiscard]] std::uint64_t file_size() const noexcept { return size_; }

private:
    safetensors_writer(
        std::filesystem::path target, const std::vector<tensor_spec>& specs, safetensors_layout layout, durability mode)
        : file_(std::move(target), layout.size, mode)
        , offsets_(std::move(layout.offsets))
        , size_(layout.size)
        , expected_(layout.size - layout.head.size())
    {
        sizes_.reserve(specs.size());
        for (const auto& spec : specs) { sizes_.push_back(spec.bytes()); }
        file_.write(0, layout.head.data(), layout.head.size());
    }

    safetensors_writer(std::filesystem::path target, const std::vector<tensor_spec>& specs, safetensors_layout layout,
        durability mode, const std::filesystem::path& finished)
        : file_(std::move(target), 0, mode)
        , offsets_(std::move(layout.offsets))
        , size_(layout.size)
        , expected_(layout.size - layout.head.size())
        , written_(layout.size - layout.head.size())
    {
        for (const auto& spec : specs) { sizes_.push_back(spec.bytes()); }
        if (!is_laid_out(finished, layout)) {
            raise<format_error>(
                error_code::file_tensors, "holds other tensors than are to be written", finished.string());
        }
        file_.take(finished);
    }

    atomic_file file_;
    std::vector<std::uint64_t> offsets_, sizes_;
    std::uint64_t size_, expected_;
    std::atomic<std::uint64_t> written_{0};
    bool on_demand_ = false;
    std::atomic<bool> open_{false}; ///< once and for all, where the file is opened on demand
    std::atomic<bool> whole_{false}; ///< every byte has been written, and the file is closed again
    std::atomic_flag busy_;
};

/// Writes a whole model that lies in memory. The tensors must be contiguous host memory.
///
///     taskvec::write_safetensors("model.safetensors", model, {{"step", "100"}});
inline void write_safetensors(const std::filesystem::path& path, const const_model_ref& model,
    metadata_map metadata = {}, durability mode = durability::synchronised)
{
    std::vector<tensor_spec> specs;
    for (const auto& [name, tensor] : model) {
        if (tensor.space != memory_space::host || !tensor.contiguous()) {
            raise<invalid_argument>(
                error_code::tensor_layout, message("tensor '", name, "' is not contiguous host memory; copy it first"));
        }
        if (tensor.source) { detail::refuse_source(name); }
        specs.push_back({name, tensor.dtype, tensor.shape});
    }
    safetensors_writer writer(path, specs, std::move(metadata), mode);
    for (std::size_t i = 0; i < specs.size(); ++i) { writer.write(i, 0, model[i].tensor.data, specs[i].bytes()); }
    writer.commit();
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_SAFETENSORS_HPP

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// One value of a GGUF file's metadata. Arrays are passed over (std::monostate), their bytes checked.
using gguf_value = std::variant<std::monostate, bool, std::uint64_t, std::int64_t, double, std::string>;

/// What stands before the data of a GGUF file, checked.
struct gguf_header {
    std::uint32_t version = 3; ///< of the format
    std::uint64_t alignment = 32; ///< of every tensor's bytes
    std::map<std::string, gguf_value> metadata{}; ///< by key
    safetensors_header tensors{}; ///< extents slowest first, as everywhere here: ggml's in reverse

    /// The text of a key; empty where it is absent or no text.
    [[nodiscard]] std::string text(const std::string& key) const
    {
        const auto place = metadata.find(key);
        const auto* const value = place == metadata.end() ? nullptr : std::get_if<std::string>(&place->second);
        return value ? *value : std::string();
    }
    /// The number of a key; nothing where it is absent or no number.
    [[nodiscard]] std::optional<double> number(const std::string& key) const
    {
        const auto place = metadata.find(key);
        if (place == metadata.end()) { return std::nullopt; }
        if (const auto* const value = std::get_if<double>(&place->second)) { return *value; }
        if (const auto* const value = std::get_if<std::uint64_t>(&place->second)) {
            return static_cast<double>(*value);
        }
        if (const auto* const value = std::get_if<std::int64_t>(&place->second)) { return static_cast<double>(*value); }
        return std::nullopt;
    }
};

/// Whether bytes begin as a GGUF file does.
[[nodiscard]] inline bool is_gguf(std::span<const std::byte> bytes) noexcept
{
    return bytes.size() >= 4 && std::memcmp(bytes.data(), "GGUF", 4) == 0;
}

namespace detail {

/// ggml's types by number: what a file calls them, and the dtype of those that are numbers as they are.
struct ggml_type {
    std::uint32_t number;
    std::string_view name;
    std::optional<taskvec::dtype> stored{};
};
inline constexpr std::array<ggml_type, 22> ggml_types{
    {{0, "F32", dtype::f32}, {1, "F16", dtype::f16}, {2, "Q4_0"}, {3, "Q4_1"}, {6, "Q5_0"}, {7, "Q5_1"}, {8, "Q8_0"},
        {9, "Q8_1"}, {10, "Q2_K"}, {11, "Q3_K"}, {12, "Q4_K"}, {13, "Q5_K"}, {14, "Q6_K"}, {15, "Q8_K"}, {20, "IQ4_NL"},
        {23, "IQ4_XS"}, {24, "I8", dtype::i8}, {25, "I16", dtype::i16}, {26, "I32", dtype::i32},
        {27, "I64", dtype::i64}, {28, "F64", dtype::f64}, {30, "BF16", dtype::bf16}}};

/// Reads numbers and texts one after the other, none beyond the end.
class gguf_cursor {
public:
    gguf_cursor(std::span<const std::byte> bytes, const std::string& label)
        : bytes_(bytes)
        , label_(label)
    { }
    [[nodiscard]] std::uint64_t at() const noexcept { return at_; }
    [[nodiscard]] std::uint64_t left() const noexcept { return bytes_.size() - at_; }

    template <class N>
    [[nodiscard]] N number(std::string_view what)
    {
        need(sizeof(N), what);
        std::array<std::byte, sizeof(N)> raw;
        std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at_), sizeof(N), raw.begin());
        if constexpr (std::endian::native == std::endian::big) { std::reverse(raw.begin(), raw.end()); }
        at_ += sizeof(N);
        return std::bit_cast<N>(raw);
    }
    [[nodiscard]] std::string text(std::string_view what)
    {
        const auto size = number<std::uint64_t>(what);
        need(size, what);
        std::string made(reinterpret_cast<const char*>(bytes_.data()) + at_, static_cast<std::size_t>(size));
        at_ += size;
        return made;
    }
    void skip(std::uint64_t size, std::string_view what)
    {
        need(size, what);
        at_ += size;
    }
    /// A count of things of at least `least` bytes each.
    [[nodiscard]] std::uint64_t count(std::string_view what, std::uint64_t least)
    {
        const auto from = at_;
        const auto many = number<std::uint64_t>(what);
        if (many > left() / least) {
            raise<format_error>(error_code::file_truncated,
                message(what, " is ", many, ", and ", left(),
                    " bytes are left, too few for so many: the file was cut, or is damaged; fetch it again"),
                label_, from);
        }
        return many;
    }
    template <class... Parts>
    [[noreturn]] void refuse(error_code code, std::uint64_t offset, const Parts&... parts) const
    {
        raise<format_error>(code, message(parts...), label_, offset);
    }

private:
    void need(std::uint64_t size, std::string_view what) const
    {
        if (size <= left()) { return; }
        raise<format_error>(error_code::file_truncated,
            message(what, " takes ", size, " bytes, and ", left(),
                " are left: the file was cut, or is damaged; fetch it again"),
            label_, at_);
    }
    std::span<const std::byte> bytes_;
    const std::string& label_;
    std::uint64_t at_ = 0;
};

/// Bytes as a text in quotes where they are printable, otherwise in hexadecimal.
[[nodiscard]] inline std::string shown_bytes(std::span<const std::byte> bytes)
{
    constexpr std::string_view digits = "0123456789abcdef";
    std::string text, numbers;
    for (const auto one : bytes) {
        const auto code = std::to_integer<unsigned>(one);
        text += static_cast<char>(code);
        numbers += std::string(numbers.empty() ? "" : " ") + digits[code / 16] + digits[code % 16];
    }
    const bool printable = std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
    return printable ? "'" + text + "'" : "the bytes " + numbers;
}

/// One value of a key's type, or one that is passed over.
[[nodiscard]] inline gguf_value read_gguf_value(
    gguf_cursor& in, std::uint32_t type, const std::string& key, bool within = false)
{
    const std::string what = "the value of '" + key + "'";
    switch (type) {
    case 0: return std::uint64_t{in.number<std::uint8_t>(what)};
    case 1: return std::int64_t{in.number<std::int8_t>(what)};
    case 2: return std::uint64_t{in.number<std::uint16_t>(what)};
    case 3: return std::int64_t{in.number<std::int16_t>(what)};
    case 4: return std::uint64_t{in.number<std::uint32_t>(what)};
    case 5: return std::int64_t{in.number<std::int32_t>(what)};
    case 6: return static_cast<double>(in.number<float>(what));
    case 7: return in.number<std::uint8_t>(what) != 0;
    case 8: return in.text(what);
    case 10: return in.number<std::uint64_t>(what);
    case 11: return in.number<std::int64_t>(what);
    case 12: return in.number<double>(what);
    case 9:
        if (!within) {
            constexpr std::array<std::uint64_t, 13> sizes{1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};
            const auto from = in.at();
            const auto element = in.number<std::uint32_t>(what);
            if (element >= sizes.size() || element == 9) {
                in.refuse(error_code::header_field, from, what, " is an array of type ", element,
                    element == 9 ? ", of arrays: no adapter has one" : ", which GGUF does not have");
            }
            const auto many = in.count("the length of the array '" + key + "'", sizes[element]);
            if (element == 8) {
                for (std::uint64_t i = 0; i < many; ++i) { (void)in.text(what); }
            }
            else {
                in.skip(many * sizes[element], what);
            }
            return std::monostate{};
        }
        [[fallthrough]];
    default:
        in.refuse(error_code::header_field, in.at(), what, " is of type ", type,
            ", which GGUF does not have: the file is damaged, or newer than version 3");
    }
}

} // namespace detail

/// Reads what stands before the data of a GGUF file of version 2 or 3, little-endian. Throws format_error, with the
/// byte, for another magic or version, a big-endian file, counts, texts and tensors that reach beyond the file, keys or
/// tensors that occur twice, an alignment that is no power of two (0 included), more than four extents or an extent of
/// 0, offsets that are not aligned, tensors that overlap; dtype_mismatch for tensors in quantised or unknown types. No
/// byte of the data is read.
///
///     const mapped_file map("math.gguf");
///     const auto header = parse_gguf(map.bytes(), "math.gguf");
[[nodiscard]] inline gguf_header parse_gguf(std::span<const std::byte> bytes, const std::string& label)
{
    detail::gguf_cursor in(bytes, label);
    gguf_header header;
    if (!is_gguf(bytes)) {
        const auto kind = what_is_this_file(bytes);
        in.refuse(error_code::header_field, 0, "does not begin with 'GGUF', the magic of GGUF files",
            bytes.size() < 4 ? std::string() : message(", but with ", detail::shown_bytes(bytes.first(4))), ": it is ",
            kind ? kind->what + "; " + kind->mend : std::string("damaged, or no GGUF file; fetch it again"));
    }
    in.skip(4, "the magic");
    header.version = in.number<std::uint32_t>("the version");
    if ((header.version & 0xffffu) == 0 && header.version != 0) {
        in.refuse(error_code::header_field, 4,
            "is a big-endian GGUF file: convert it on a machine like this one (without --bigendian)");
    }
    if (header.version != 2 && header.version != 3) {
        in.refuse(error_code::header_field, 4, "is GGUF of version ", header.version,
            "; versions 2 and 3 are read: convert the adapter again with a current llama.cpp");
    }
    constexpr std::uint64_t least_tensor = 8 + 4 + 8 + 4 + 8, least_key = 8 + 4 + 1;
    const auto tensors = in.count("the number of tensors", least_tensor);
    const auto keys = in.count("the number of metadata keys", least_key);
    for (std::uint64_t i = 0; i < keys; ++i) {
        const auto from = in.at();
        auto key = in.text(message("metadata key ", i + 1));
        if (!is_utf8(key)) { in.refuse(error_code::header_field, from, "metadata key ", i + 1, " is no UTF-8"); }
        const auto type = in.number<std::uint32_t>("the type of '" + key + "'");
        auto value = detail::read_gguf_value(in, type, key);
        if (!header.metadata.emplace(key, std::move(value)).second) {
            in.refuse(error_code::header_field, from, "the metadata key '", key, "' stands twice");
        }
    }
    if (const auto place = header.metadata.find("general.alignment"); place != header.metadata.end()) {
        const auto* const given = std::get_if<std::uint64_t>(&place->second);
        if (!given || !std::has_single_bit(*given) || *given > (std::uint64_t{1} << 31)) {
            in.refuse(error_code::header_field, 0, "general.alignment is ",
                given ? message(*given) : std::string("no unsigned number"), "; expected a power of two");
        }
        header.alignment = *given;
    }
    for (std::uint64_t i = 0; i < tensors; ++i) {
        safetensors_entry entry;
        const auto from = in.at();
        entry.name = in.text(message("the name of tensor ", i + 1));
        if (!is_utf8(entry.name)) {
            in.refuse(error_code::header_field, from, "the name of tensor ", i + 1, " is no UTF-8");
        }
        const std::string what = "tensor '" + entry.name + "'";
        const auto rank = in.number<std::uint32_t>(what);
        if (rank < 1 || rank > 4) {
            in.refuse(error_code::header_field, from, what, " has ", rank, " extents; GGUF has 1 to 4");
        }
        std::uint64_t elements = 1;
        for (std::uint32_t k = 0; k < rank; ++k) {
            const auto extent = in.number<std::uint64_t>(what);
            if (extent == 0 || extent > (std::uint64_t{1} << 56) / elements) {
                in.refuse(error_code::header_field, from, what, " has an extent of ", extent,
                    extent == 0 ? ": it is empty" : ": it has more elements than a file can hold");
            }
            elements *= extent;
            entry.shape.insert(entry.shape.begin(), static_cast<std::int64_t>(extent));
        }
        const auto type = in.number<std::uint32_t>(what);
        const auto known = std::find_if(
            detail::ggml_types.begin(), detail::ggml_types.end(), [&](const auto& one) { return one.number == type; });
        if (known == detail::ggml_types.end() || !known->stored) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("'", label, "': ", what, " is of ggml's type ", type,
                    known == detail::ggml_types.end() ? std::string() : message(" (", known->name, ")"),
                    "; F32, F16 and BF16 are read: convert the adapter again with --outtype f16"));
        }
        entry.dtype = *known->stored;
        entry.bytes = elements * (bits_per_element(entry.dtype) / 8);
        entry.offset = in.number<std::uint64_t>(what);
        if (entry.offset % header.alignment != 0) {
            in.refuse(error_code::tensor_offsets, from, what, " begins at byte ", entry.offset,
                " of the data, which is no multiple of the alignment ", header.alignment);
        }
        header.tensors.entries.push_back(std::move(entry));
    }
    const std::uint64_t begin = (in.at() + header.alignment - 1) / header.alignment * header.alignment,
                        room = bytes.size() > begin ? bytes.size() - begin : 0;
    header.tensors.data_offset = std::min<std::uint64_t>(begin, bytes.size());
    for (auto& entry : header.tensors.entries) {
        if (entry.offset > room || entry.bytes > room - entry.offset) {
            in.refuse(error_code::file_truncated, bytes.size(), "tensor '", entry.name, "' takes bytes ", entry.offset,
                " to ", entry.offset + entry.bytes, " of the data, and the file has ", room,
                ": it was cut, or is damaged; fetch it again");
        }
        entry.offset += begin;
    }
    auto& entries = header.tensors.entries;
    std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    for (std::size_t i = 1; i < entries.size(); ++i) {
        if (entries[i].name == entries[i - 1].name) {
            in.refuse(error_code::header_field, 0, "the tensor '", entries[i].name, "' stands twice");
        }
    }
    std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
    for (std::size_t i = 1; i < entries.size(); ++i) {
        if (entries[i].offset < entries[i - 1].offset + entries[i - 1].bytes) {
            in.refuse(error_code::tensor_offsets, entries[i].offset, "the tensors '", entries[i - 1].name, "' and '",
                entries[i].name, "' share bytes");
        }
    }
    return header;
}

/// A GGUF file (version 3, aligned to 32) as one run of bytes: metadata in the order of its keys, after
/// general.architecture; tensors as they are given, extents slowest first. Metadata are texts, unsigned numbers (as
/// u32) and numbers (as f32). Throws dtype_mismatch for a dtype that ggml does not have.
[[nodiscard]] inline std::vector<std::byte> gguf_bytes(const std::map<std::string, gguf_value>& metadata,
    const std::vector<tensor_spec>& specs, const std::vector<std::vector<std::byte>>& data)
{
    constexpr std::uint64_t alignment = 32;
    std::vector<std::byte> out;
    const auto number = [&](auto value) {
        auto raw = std::bit_cast<std::array<std::byte, sizeof value>>(value);
        if constexpr (std::endian::native == std::endian::big) { std::reverse(raw.begin(), raw.end()); }
        out.insert(out.end(), raw.begin(), raw.end());
    };
    const auto text = [&](std::string_view words) {
        number(std::uint64_t{words.size()});
        const auto* const from = reinterpret_cast<const std::byte*>(words.data());
        out.insert(out.end(), from, from + words.size());
    };
    const auto align = [&] { out.resize((out.size() + alignment - 1) / alignment * alignment); };
    const auto key = [&](const std::string& name, const gguf_value& value) {
        text(name);
        if (const auto* const words = std::get_if<std::string>(&value)) {
            number(std::uint32_t{8});
            text(*words);
        }
        else if (const auto* const count = std::get_if<std::uint64_t>(&value)) {
            number(std::uint32_t{4});
            number(static_cast<std::uint32_t>(*count));
        }
        else {
            const auto* const real = std::get_if<double>(&value);
            number(std::uint32_t{6});
            number(static_cast<float>(real ? *real : 0));
        }
    };
    for (const char c : {'G', 'G', 'U', 'F'}) { out.push_back(static_cast<std::byte>(c)); }
    number(std::uint32_t{3});
    number(std::uint64_t{specs.size()});
    number(std::uint64_t{metadata.size()});
    const std::string first = "general.architecture";
    if (const auto place = metadata.find(first); place != metadata.end()) { key(first, place->second); }
    for (const auto& [name, value] : metadata) {
        if (name != first) { key(name, value); }
    }
    std::uint64_t at = 0;
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const auto& spec = specs[i];
        const auto type = std::find_if(detail::ggml_types.begin(), detail::ggml_types.end(),
            [&](const auto& one) { return one.stored == spec.dtype; });
        if (type == detail::ggml_types.end()) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("tensor '", spec.name, "' has dtype ", to_string(spec.dtype), ", which GGUF does not have"));
        }
        text(spec.name);
        number(static_cast<std::uint32_t>(spec.shape.size()));
        for (auto extent = spec.shape.rbegin(); extent != spec.shape.rend(); ++extent) {
            number(static_cast<std::uint64_t>(*extent));
        }
        number(type->number);
        number(at);
        at += (data[i].size() + alignment - 1) / alignment * alignment;
    }
    for (const auto& one : data) {
        align();
        out.insert(out.end(), one.begin(), one.end());
    }
    align();
    return out;
}

/// A language model as llama.cpp knows it: what decides the names and the layout of an adapter for it.
struct gguf_target {
    std::string architecture{}; ///< llama.cpp's word: "llama", "qwen2", "gemma2", "phi3", …
    std::size_t heads = 0, kv_heads = 0; ///< of attention; 0: not known
    bool tied = false; ///< the head is the embedding, and llama.cpp keeps one tensor for both

    /// Whether rows of q and k lie in pairs that rotate together, as llama.cpp keeps them for Llama, Mistral and
    /// Mixtral: row h·d + 2j + s is the model's row h·d + s·d/2 + j, of d rows a head.
    [[nodiscard]] bool pairs_rows() const noexcept { return architecture == "llama"; }
};

namespace detail {

/// A family: transformers' classes, and llama.cpp's word.
struct gguf_family {
    std::string_view transformers, architecture;
};
inline constexpr std::array<gguf_family, 14> gguf_families{
    {{"LlamaForCausalLM", "llama"}, {"MistralForCausalLM", "llama"}, {"MixtralForCausalLM", "llama"},
        {"Qwen2ForCausalLM", "qwen2"}, {"Qwen2MoeForCausalLM", "qwen2moe"}, {"Qwen3ForCausalLM", "qwen3"},
        {"Qwen3MoeForCausalLM", "qwen3moe"}, {"GemmaForCausalLM", "gemma"}, {"Gemma2ForCausalLM", "gemma2"},
        {"Gemma3ForCausalLM", "gemma3"}, {"Gemma3ForConditionalGeneration", "gemma3"}, {"PhiForCausalLM", "phi2"},
        {"Phi3ForCausalLM", "phi3"}, {"Gemma3TextModel", "gemma3"}}};

[[nodiscard]] inline bool is_gguf_architecture(std::string_view word) noexcept
{
    return std::any_of(
        gguf_families.begin(), gguf_families.end(), [&](const auto& one) { return one.architecture == word; });
}
/// "llama, qwen2, …"
[[nodiscard]] inline std::string gguf_architectures()
{
    std::string words;
    std::vector<std::string_view> seen;
    for (const auto& one : gguf_families) {
        if (std::find(seen.begin(), seen.end(), one.architecture) != seen.end()) { continue; }
        seen.push_back(one.architecture);
        words += (words.empty() ? "" : ", ") + std::string(one.architecture);
    }
    return words;
}

/// A module of a layer: transformers' name, and llama.cpp's.
struct gguf_module {
    std::string_view name, stem;
};
[[nodiscard]] constexpr std::array<gguf_module, 9> gguf_modules(std::string_view architecture) noexcept
{
    if (architecture == "phi2") {
        return {{{"self_attn.q_proj", "attn_q"}, {"self_attn.k_proj", "attn_k"}, {"self_attn.v_proj", "attn_v"},
            {"self_attn.dense", "attn_output"}, {"mlp.fc1", "ffn_up"}, {"mlp.fc2", "ffn_down"}, {}, {}, {}}};
    }
    if (architecture == "phi3") {
        return {{{"self_attn.qkv_proj", "attn_qkv"}, {"self_attn.o_proj", "attn_output"},
            {"mlp.gate_up_proj", "ffn_up"}, {"mlp.down_proj", "ffn_down"}, {}, {}, {}, {}, {}}};
    }
    const bool experts = architecture.ends_with("moe"); // whose only dense feed-forward layer is their router
    return {{{"self_attn.q_proj", "attn_q"}, {"self_attn.k_proj", "attn_k"}, {"self_attn.v_proj", "attn_v"},
        {"self_attn.o_proj", "attn_output"}, {"mlp.gate_proj", "ffn_gate"}, {"mlp.up_proj", "ffn_up"},
        {"mlp.down_proj", "ffn_down"},
        experts                       ? gguf_module{"mlp.gate", "ffn_gate_inp"}
            : architecture == "llama" ? gguf_module{"block_sparse_moe.gate", "ffn_gate_inp"}
                                      : gguf_module{},
        {}}};
}

} // namespace detail

/// What a model is for llama.cpp, by its config.json. Throws format_error that names what is missing or unknown.
/// `label` is the configuration's, for messages.
[[nodiscard]] inline gguf_target gguf_target_of(const nlohmann::json& config, const std::string& label)
{
    const auto refuse = [&](const auto&... parts) {
        raise<format_error>(error_code::adapter_unsupported, message(parts...), label);
    };
    const auto text = config.find("text_config");
    const auto& inner = text != config.end() && text->is_object() ? *text : config;
    const auto named = [](const nlohmann::json& from) {
        const auto list = from.find("architectures");
        return list != from.end() && list->is_array() && !list->empty() && list->front().is_string()
            ? list->front().get<std::string>()
            : std::string();
    };
    const auto name = named(inner).empty() ? named(config) : named(inner);
    if (name.empty()) {
        refuse("has no \"architectures\": what llama.cpp calls the tensors depends on it; take the config.json of the "
               "model that the adapter was trained on");
    }
    const auto family = std::find_if(detail::gguf_families.begin(), detail::gguf_families.end(),
        [&](const auto& one) { return one.transformers == name; });
    if (family == detail::gguf_families.end()) {
        refuse("names the architecture ", name,
            ", whose names in GGUF are not known here (known: ", detail::gguf_architectures(),
            "): convert with llama.cpp's convert_lora_to_gguf.py");
    }
    gguf_target target{std::string(family->architecture)};
    const auto count = [&](const char* field) -> std::size_t {
        const auto place = inner.find(field);
        return place != inner.end() && place->is_number_unsigned() ? place->get<std::size_t>() : 0;
    };
    target.heads = count("num_attention_heads");
    target.kv_heads = count("num_key_value_heads");
    if (target.kv_heads == 0) { target.kv_heads = target.heads; }
    const auto tie = inner.find("tie_word_embeddings");
    const auto outer = config.find("tie_word_embeddings");
    target.tied = tie != inner.end() && tie->is_boolean() ? tie->get<bool>()
        : outer != config.end() && outer->is_boolean()    ? outer->get<bool>()
                                                          : target.architecture.starts_with("gemma");
    return target;
}

/// What llama.cpp calls the weight of a module ("blk.3.attn_q.weight"); empty: it has no such weight, or none is known.
[[nodiscard]] inline std::string gguf_tensor_name(std::string_view module, const gguf_target& target)
{
    const auto ends = [&](std::string_view word) {
        return module == word || (module.ends_with(word) && module[module.size() - word.size() - 1] == '.');
    };
    if (ends("embed_tokens")) { return "token_embd.weight"; }
    if (ends("lm_head")) { return "output.weight"; }
    const std::string_view list = "layers.";
    const auto at = module.starts_with(list) ? 0 : module.find(".layers.");
    if (at == module.npos) { return {}; }
    auto rest = module.substr(at + (at == 0 && module.starts_with(list) ? list.size() : list.size() + 1));
    const auto dot = rest.find('.');
    if (dot == rest.npos || dot == 0 || rest.substr(0, dot).find_first_not_of("0123456789") != rest.npos) { return {}; }
    const auto number = rest.substr(0, dot);
    rest.remove_prefix(dot + 1);
    for (const auto& one : detail::gguf_modules(target.architecture)) {
        if (!one.name.empty() && one.name == rest) { return message("blk.", number, ".", one.stem, ".weight"); }
    }
    return {};
}

/// The module of such a name, as transformers' class calls it ("model.layers.3.self_attn.q_proj"); empty: none is
/// known.
[[nodiscard]] inline std::string gguf_module_name(std::string_view tensor, const gguf_target& target)
{
    if (tensor == "token_embd.weight") { return "model.embed_tokens"; }
    if (tensor == "output.weight") { return "lm_head"; }
    constexpr std::string_view block = "blk.", weight = ".weight";
    if (!tensor.starts_with(block) || !tensor.ends_with(weight)) { return {}; }
    tensor = tensor.substr(block.size(), tensor.size() - block.size() - weight.size());
    const auto dot = tensor.find('.');
    if (dot == tensor.npos || dot == 0 || tensor.substr(0, dot).find_first_not_of("0123456789") != tensor.npos) {
        return {};
    }
    for (const auto& one : detail::gguf_modules(target.architecture)) {
        if (!one.name.empty() && one.stem == tensor.substr(dot + 1)) {
            return message("model.layers.", tensor.substr(0, dot), ".", one.name);
        }
    }
    return {};
}

/// The row of a q or k weight that stands at `row` of llama.cpp's (pairs_rows()), of `rows` in `heads` heads.
[[nodiscard]] constexpr std::size_t paired_row(std::size_t row, std::size_t rows, std::size_t heads) noexcept
{
    const std::size_t size = rows / heads, within = row % size;
    return row - within + within % 2 * (size / 2) + within / 2;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_GGUF_HPP

// ---- taskvec/formats/peft.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_PEFT_HPP)
#define TASKVEC_SINGLE_FORMATS_PEFT_HPP
// PEFT's LoRA adapter directories: adapter_config.json and adapter_model.safetensors, read strictly and written so that
// PEFT loads them.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/adapters/adapter.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_ADAPTER_HPP)
#define TASKVEC_SINGLE_ADAPTERS_ADAPTER_HPP
// What every algorithm on LoRA adapters uses: singular triples as updates, dense updates, norms, reports, and updates
// folded into a weight. The type itself is in adapters/lora.hpp.
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

// ---- taskvec/linalg/factored_svd.hpp
#if !defined(TASKVEC_SINGLE_LINALG_FACTORED_SVD_HPP)
#define TASKVEC_SINGLE_LINALG_FACTORED_SVD_HPP
// The SVD of a product left·rightᵀ from its factors: two thin QRs and a small core, never the product itself.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/compiled/linalg.hpp
#if !defined(TASKVEC_SINGLE_COMPILED_LINALG_HPP)
#define TASKVEC_SINGLE_COMPILED_LINALG_HPP
// What taskvec::compiled compiles of linalg/, as lists: EXTERN is `extern` where the library is linked, nothing where
// it is made. SPDX-License-Identifier: Apache-2.0
//
// The headers are the same with and without the library. With TASKVEC_COMPILED defined, which linking taskvec::compiled
// does, they declare these instances to be elsewhere; the files of src/compiled define them. Both hold each other to
// one list, this one. Other types than float and double compile in the caller's file as ever.

#include <cstddef>
#include <memory_resource>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#define TASKVEC_COMPILED_SMALL_MATRICES(EXTERN)                                                                        \
    EXTERN template double detail::cholesky_factor<0>(                                                                 \
        matrix_view<const double>, matrix_view<double>, matrix_view<double>, std::pmr::memory_resource*);              \
    EXTERN template void detail::householder<0>(matrix_view<double>, double*);                                         \
    EXTERN template small_svd_result small_svd<0>(const cpu&, matrix_view<const double>);                              \
    EXTERN template double factor_cholesky<0>(const cpu&, matrix_view<double>);                                        \
    EXTERN template void solve_cholesky<0>(const cpu&, matrix_view<const double>, matrix_view<double>);                \
    EXTERN template bool cholesky_solve<0>(const cpu&, matrix_view<const double>, matrix_view<double>);                \
    EXTERN template matrix<double> small_product<0>(const cpu&, double, const matrix<double>&, const matrix<double>&);

#define TASKVEC_COMPILED_MATRICES(EXTERN, T)                                                                           \
    EXTERN template void detail::multiply_any<T>(T, matrix_view<const T>, matrix_view<const T>, T, matrix_view<T>);    \
    EXTERN template void detail::gram<T>(matrix_view<const T>, matrix_view<double>, std::pmr::memory_resource*);       \
    EXTERN template void gemm<T>(const cpu&, T, matrix_view<const T>, matrix_view<const T>, T, matrix_view<T>);        \
    EXTERN template double squared_norm<T>(const cpu&, matrix_view<const T>);                                          \
    EXTERN template void fill_normal<T>(const cpu&, const random_stream&, matrix_view<T>);                             \
    EXTERN template qr_factors<T> factor_qr<T>(const cpu&, matrix_view<const T>, std::string_view);                    \
    EXTERN template void multiply_q<T>(const cpu&, const qr_factors<T>&, matrix_view<const double>, matrix_view<T>);   \
    EXTERN template void multiply_small<T>(                                                                            \
        const cpu&, matrix_view<const T>, matrix_view<const double>, matrix_view<T>);                                  \
    EXTERN template matrix<T> orthonormal_basis<T>(const cpu&, matrix_view<const T>, std::string_view);

#define TASKVEC_COMPILED_FACTORED_SVD(EXTERN, T)                                                                       \
    EXTERN template class detail::factored_core<T, cpu>;                                                               \
    EXTERN template factored_svd_result<T> detail::factored_core<T, cpu>::finish<small_svd_result>(                    \
        const cpu&, small_svd_result&&, const rank_choice&, detail::factor_place) const;                               \
    EXTERN template factored_svd_result<T> detail::factored_svd_in<T, cpu>(                                            \
        const cpu&, const factor_pair<T>&, const rank_choice&, detail::factor_place);                                  \
    EXTERN template std::vector<factored_svd_result<T>> factored_svd<T, cpu>(                                          \
        const cpu&, std::span<const factor_pair<T>>, const rank_choice&);                                              \
    EXTERN template stacked_factors<T> detail::stack_factors_in<T>(                                                    \
        std::span<const factor_pair<T>>, std::string_view, std::pmr::memory_resource*);

#define TASKVEC_COMPILED_RANDOMIZED_SVD(EXTERN, T)                                                                     \
    EXTERN template randomized_svd_result<T> detail::sampled_svd<T, cpu>(                                              \
        const cpu&, matrix_view<const T>, const randomized_svd_options&, detail::factor_place);

#define TASKVEC_COMPILED_TRUNCATED_SVD(EXTERN, T)                                                                      \
    EXTERN template bool detail::divide_and_conquer<T>(                                                                \
        matrix_view<const T>, matrix<T>&, std::vector<double>&, matrix<T>&, std::pmr::memory_resource*);               \
    EXTERN template truncated_svd_result<T> detail::exact_svd<T>(                                                      \
        const cpu&, matrix_view<const T>, const rank_choice&, std::string_view, detail::factor_place);

#define TASKVEC_COMPILED_LEADING_SVD(EXTERN)                                                                           \
    EXTERN template bool detail::leading_eigenvectors<0>(                                                              \
        matrix_view<const double>, std::size_t, std::vector<double>&, matrix<double>&, std::pmr::memory_resource*);    \
    EXTERN template std::optional<svd_result<float>> detail::lanczos_svd<0>(                                           \
        const cpu&, matrix_view<const float>, std::size_t, double, std::string_view, detail::factor_place);            \
    EXTERN template svd_result<float> detail::few_triples<float>(                                                      \
        const cpu&, matrix_view<const float>, const rank_choice&, std::string_view, detail::factor_place);
#endif // TASKVEC_SINGLE_COMPILED_LINALG_HPP

// ---- taskvec/linalg/svd.hpp
#if !defined(TASKVEC_SINGLE_LINALG_SVD_HPP)
#define TASKVEC_SINGLE_LINALG_SVD_HPP
// What every singular value decomposition here returns, how a rank is chosen, and how an approximation is measured.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/linalg/eigen.hpp
#if !defined(TASKVEC_SINGLE_LINALG_EIGEN_HPP)
#define TASKVEC_SINGLE_LINALG_EIGEN_HPP
// The linear algebra seam (linalg/linalg.hpp) on the CPU: Eigen's products and Cholesky, and loops of our own.
// SPDX-License-Identifier: Apache-2.0
//
// Tall matrices are in the caller's precision; the small square work (triangular factors, cores) is always in f64, so
// there is one instantiation of it and f32 data loses nothing to it. Including this is cheap: Eigen's Cholesky is the
// only decomposition, and everything is a template (some only in name) so that nothing is compiled before it is called.


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

// ---- taskvec/linalg/linalg.hpp
#if !defined(TASKVEC_SINGLE_LINALG_LINALG_HPP)
#define TASKVEC_SINGLE_LINALG_LINALG_HPP
// The linear algebra seam: the operations that the algorithms of linalg/, adapters/, reuse/ and RegMean ask of a
// backend.
// SPDX-License-Identifier: Apache-2.0
//
// A backend supplies the names below, overloaded on its policy and found through it, and says so by specialising
// has_linear_algebra. Three do: linalg/eigen.hpp for taskvec::cpu, whose functions document each operation;
// device/cusolver/linalg.hpp (cuBLAS and cuSOLVER) and device/linalg/host.hpp (Thrust's host systems) for taskvec::gpu.
// The concept linear_algebra_backend lists them all, and check_linear_algebra<P>() says in a sentence which one a
// backend lacks. `tall` matrices are matrix<T, P::space> with T the caller's precision. The type of the small square
// work (triangular factors, cores and what small_svd() returns) is the backend's affair: f64 on the host for Eigen, T
// on the device for cuSOLVER. This header needs no Eigen.


#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What becomes of the columns of A: A = Q·R with Q (m×k) orthonormal, k = min(m, n), R (k×n) in f64; R need not be
/// triangular. Q is kept in whatever form the backend likes (see multiply_q). Refers to A, which must outlive it.
template <arithmetic_element T, memory_space S>
struct qr_factors;

/// A = u·diag(sigma)·vᵀ of a small f64 matrix, sigma descending, u (m×k) and v (n×k) orthonormal, k = min(m, n). u and
/// v lie in the policy's scratch memory.
struct small_svd_result {
    matrix<double> u; ///< m×k
    std::vector<double> sigma; ///< k values, descending
    matrix<double> v; ///< n×k
};

/// Whether a policy's backend supplies the operations of this header: specialised as true in the header that has them,
/// where check_linear_algebra() holds it to that.
///
///     template <>
///     inline constexpr bool has_linear_algebra<my_policy> = true;
template <class P>
inline constexpr bool has_linear_algebra = false;

/// A policy whose backend supplies the operations of this header: cpu; gpu once <taskvec/device/linalg.hpp> is
/// included.
template <class P>
concept linear_algebra_policy = policy<P> && has_linear_algebra<P>;

/// One concept for each operation of the seam. P is the policy, T float or double. m, n, p, q stand for sizes, `c` and
/// `v` for const and mutable views of tall matrices.
namespace linear_algebra {

/// A matrix that is written, where P computes.
template <class P, class T>
using view_in = matrix_view<T, P::space>;
/// A matrix that is read, where P computes.
template <class P, class T>
using const_view_in = matrix_view<const T, P::space>;

/// A matrix of zeros that outlives the call, and one of the policy's scratch memory.
template <class P, class T>
concept holds_matrices = requires(const P& p, std::size_t size, matrix_order order) {
    { result_matrix<T>(p, size, size) } -> std::same_as<matrix<T, P::space>>;
    { result_matrix<T>(p, size, size, order) } -> std::same_as<matrix<T, P::space>>;
    { scratch_matrix<T>(p, size, size) } -> std::same_as<matrix<T, P::space>>;
    { scratch_matrix<T>(p, size, size, order) } -> std::same_as<matrix<T, P::space>>;
};
/// v = c; the orders may differ.
template <class P, class T>
concept copies_matrices = requires(const P& p, const_view_in<P, T> c, view_in<P, T> v) { copy_matrix<T>(p, c, v); };
/// v = c·diag(scale).
template <class P, class T>
concept scales_columns = requires(const P& p, const_view_in<P, T> c, std::span<const double> scale, view_in<P, T> v) {
    scale_columns<T>(p, c, scale, v);
};
/// v = α·a·b + β·v, every operand in either order.
template <class P, class T>
concept multiplies = requires(const P& p, T alpha, const_view_in<P, T> a, const_view_in<P, T> b, view_in<P, T> v) {
    gemm<T>(p, alpha, a, b, alpha, v);
};
/// ‖c‖²_F in f64.
template <class P, class T>
concept measures_norms = requires(const P& p, const_view_in<P, T> c) {
    { squared_norm<T>(p, c) } -> std::same_as<double>;
};
/// Entry (i, j) = stream.normal(j·rows + i), on every backend.
template <class P, class T>
concept draws_normals =
    requires(const P& p, const random_stream& stream, view_in<P, T> v) { fill_normal<T>(p, stream, v); };
/// A stored matrix in its arithmetic type: as it is, or a copy that is kept in the caller's matrix.
template <class P, class T>
concept converts_storage = requires(const P& p, const_view_in<P, T> c, matrix<T, P::space>& copy) {
    { in_arithmetic(p, c, copy) } -> std::same_as<const_view_in<P, T>>;
};
/// nonfinite_error for the first NaN or infinity, if there is one.
template <class P, class T>
concept refuses_nonfinite =
    requires(const P& p, const_view_in<P, T> c, std::string_view what) { refuse_nonfinite(p, c, what); };
/// The thin QR of c: Q in whatever form the backend likes, R as its member r.
template <class P, class T>
concept factors_qr = requires(const P& p, const_view_in<P, T> c, std::string_view what) {
    { factor_qr<T>(p, c, what) } -> std::same_as<qr_factors<T, P::space>>;
};
/// A matrix with a name has a view.
template <class X>
concept shows_view = requires(std::remove_reference_t<X>& x) { x.view(); };
/// weight·Ra·Rbᵀ of two triangular factors: a small matrix.
template <class P, class T>
concept multiplies_triangles = requires(const P& p, double weight, const qr_factors<T, P::space>& f) {
    { small_product(p, weight, f.r, f.r) } -> shows_view;
};
/// The SVD of a small matrix: u, sigma (on the host, descending) and v.
template <class P, class T>
concept decomposes_small = requires(const P& p, const qr_factors<T, P::space>& f) {
    { small_svd(p, f.r.view()).sigma } -> std::convertible_to<std::vector<double>>;
    { small_svd(p, f.r.view()).u } -> shows_view;
    { small_svd(p, f.r.view()).v } -> shows_view;
};
namespace detail {
template <class P, class T>
using small_view = decltype(std::declval<const qr_factors<T, P::space>&>().r.view());
} // namespace detail
/// v = Q·y for the Q of factor_qr() and a small y.
template <class P, class T>
concept multiplies_by_q = requires(const P& p, const qr_factors<T, P::space>& f, detail::small_view<P, T> y,
    view_in<P, T> v) { multiply_q<T>(p, f, y, v); };
/// v = c·y for a tall c and a small y.
template <class P, class T>
concept multiplies_small = requires(
    const P& p, const_view_in<P, T> c, detail::small_view<P, T> y, view_in<P, T> v) { multiply_small<T>(p, c, y, v); };
/// On a device: the SVDs of many small matrices together, and a small matrix as a tall one.
template <class P, class T>
concept decomposes_batches = P::space == memory_space::host
    || requires(
        const P& p, const std::vector<detail::small_view<P, T>>& many, detail::small_view<P, T> y, view_in<P, T> v) {
           small_svds(p, many)[0].sigma;
           keep_small<T>(p, y, v);
       };
/// An orthonormal basis of the columns of c, explicitly.
template <class P, class T>
concept finds_bases = requires(const P& p, const_view_in<P, T> c, std::string_view what) {
    { orthonormal_basis<T>(p, c, what) } -> std::same_as<matrix<T, P::space>>;
};
/// Signs of matching columns so that the largest entry of each of u is positive.
template <class P, class T>
concept orients = requires(const P& p, view_in<P, T> u, view_in<P, T> v) { orient<T>(p, u, v); };
/// G = L·Lᵀ in place, with the least share of a variable's square that the others do not explain; 0 where there is
/// none.
template <class P>
concept factors_cholesky = requires(const P& p, view_in<P, double> g) {
    { factor_cholesky(p, g) } -> std::same_as<double>;
};
/// L·Lᵀ·X = B in place of B.
template <class P>
concept solves_cholesky =
    requires(const P& p, const_view_in<P, double> l, view_in<P, double> b) { solve_cholesky(p, l, b); };
/// G·X = B in place of B; false where G is not positive definite.
template <class P>
concept solves_symmetric = requires(const P& p, const_view_in<P, double> g, view_in<P, double> b) {
    { cholesky_solve(p, g, b) } -> std::same_as<bool>;
};
namespace detail {
// Bodies to ask with: nvcc knows no lambda in a concept.
struct piece {
    template <class P>
    void operator()(const P&, std::size_t) const
    { }
};
struct work {
    template <class P>
    int operator()(const P&) const
    {
        return 0;
    }
};
} // namespace detail
/// body(policy, index) for each index.
template <class P>
concept runs_pieces = requires(const P& p) { for_each_piece(p, std::size_t{}, detail::piece{}); };
/// body(policy) with what many calls share made once.
template <class P>
concept keeps_context = requires(const P& p) {
    { with_context(p, detail::work{}) } -> std::same_as<int>;
};
/// The share of ‖A‖² below which ‖A‖² − Σσ² would cancel.
template <class P, class T>
concept knows_cancellation = requires(const P& p) {
    { cancellation_limit<T>(p) } -> std::same_as<double>;
};

} // namespace linear_algebra

/// A policy with every operation of the seam in one precision, T.
template <class P, class T>
concept linear_algebra_in = linear_algebra::holds_matrices<P, T> && linear_algebra::copies_matrices<P, T>
    && linear_algebra::scales_columns<P, T> && linear_algebra::multiplies<P, T> && linear_algebra::measures_norms<P, T>
    && linear_algebra::draws_normals<P, T> && linear_algebra::converts_storage<P, T>
    && linear_algebra::refuses_nonfinite<P, T> && linear_algebra::factors_qr<P, T>
    && linear_algebra::multiplies_triangles<P, T> && linear_algebra::decomposes_small<P, T>
    && linear_algebra::multiplies_by_q<P, T> && linear_algebra::multiplies_small<P, T>
    && linear_algebra::decomposes_batches<P, T> && linear_algebra::finds_bases<P, T> && linear_algebra::orients<P, T>
    && linear_algebra::factors_cholesky<P> && linear_algebra::solves_cholesky<P> && linear_algebra::solves_symmetric<P>
    && linear_algebra::runs_pieces<P> && linear_algebra::keeps_context<P> && linear_algebra::knows_cancellation<P, T>;

/// A policy with every operation of the seam, in f32 and f64.
template <class P>
concept linear_algebra_backend = linear_algebra_in<P, float> && linear_algebra_in<P, double>;

/// True; where a backend is not complete, the compiler says in a sentence which operation it lacks. Each backend's
/// tests hold it to this.
///
///     static_assert(taskvec::check_linear_algebra<my_policy, double>());
template <class P, class T>
[[nodiscard]] consteval bool check_linear_algebra()
{
    namespace la = linear_algebra;
    static_assert(la::holds_matrices<P, T>, "linear algebra: this policy lacks result_matrix or scratch_matrix");
    static_assert(la::copies_matrices<P, T>, "linear algebra: this policy lacks copy_matrix");
    static_assert(la::scales_columns<P, T>, "linear algebra: this policy lacks scale_columns");
    static_assert(la::multiplies<P, T>, "linear algebra: this policy lacks gemm");
    static_assert(la::measures_norms<P, T>, "linear algebra: this policy lacks squared_norm");
    static_assert(la::draws_normals<P, T>, "linear algebra: this policy lacks fill_normal");
    static_assert(la::converts_storage<P, T>, "linear algebra: this policy lacks in_arithmetic");
    static_assert(la::refuses_nonfinite<P, T>, "linear algebra: this policy lacks refuse_nonfinite");
    static_assert(la::factors_qr<P, T>, "linear algebra: this policy lacks factor_qr, or its qr_factors");
    static_assert(la::multiplies_triangles<P, T>, "linear algebra: this policy lacks small_product");
    static_assert(la::decomposes_small<P, T>, "linear algebra: this policy lacks small_svd");
    static_assert(la::multiplies_by_q<P, T>, "linear algebra: this policy lacks multiply_q");
    static_assert(la::multiplies_small<P, T>, "linear algebra: this policy lacks multiply_small");
    static_assert(la::decomposes_batches<P, T>, "linear algebra: this device policy lacks small_svds or keep_small");
    static_assert(la::finds_bases<P, T>, "linear algebra: this policy lacks orthonormal_basis");
    static_assert(la::orients<P, T>, "linear algebra: this policy lacks orient");
    static_assert(la::factors_cholesky<P>, "linear algebra: this policy lacks factor_cholesky");
    static_assert(la::solves_cholesky<P>, "linear algebra: this policy lacks solve_cholesky");
    static_assert(la::solves_symmetric<P>, "linear algebra: this policy lacks cholesky_solve");
    static_assert(la::runs_pieces<P>, "linear algebra: this policy lacks for_each_piece");
    static_assert(la::keeps_context<P>, "linear algebra: this policy lacks with_context");
    static_assert(la::knows_cancellation<P, T>, "linear algebra: this policy lacks cancellation_limit");
    return linear_algebra_in<P, T>;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_LINALG_LINALG_HPP

#if !__has_include(<Eigen/Core>)
#error "this header of taskvec needs Eigen 3.4 or later (Debian: libeigen3-dev, with -I /usr/include/eigen3)"
#include "taskvec: the error above ends the compilation"
#endif
#include <Eigen/Cholesky>
#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <numeric>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace taskvec::inline TASKVEC_ABI {

template <>
inline constexpr bool has_linear_algebra<cpu> = true;

/// C = alpha·A·B + beta·C.
/// A is m×k, B k×n, C m×n, each in either order; C may not overlap A or B. f32 or f64; every entry is a sum in that
/// type whose order depends on the shapes alone, so the bits do not depend on the number of threads. Throws
/// shape_mismatch. Cost: 2·m·n·k flops.
///
///     gemm(cpu{}, 1.0f, a.view(), b.view(), 0.0f, c.view());
template <arithmetic_element T>
void gemm(const cpu& policy, T alpha, std::type_identity_t<matrix_view<const T>> a,
    std::type_identity_t<matrix_view<const T>> b, std::type_identity_t<T> beta, std::type_identity_t<matrix_view<T>> c);

/// ‖A‖²_F in f64: blocks of fixed size added in order, so the bits do not depend on threads. Relative error ≤ 1e-14
/// (f64 input: unless squares overflow). Cost: one read of A.
template <arithmetic_element T>
[[nodiscard]] double squared_norm(const cpu& policy, matrix_view<const T> a);

/// Standard normal numbers: entry (i, j) is stream.normal(j·rows + i), whatever the order and the number of threads.
template <arithmetic_element T>
void fill_normal(const cpu& policy, const random_stream& stream, matrix_view<T> a);

template <arithmetic_element T>
struct qr_factors<T, memory_space::host> {
    matrix<double> r; ///< k×n

    // How Q is kept: A·inverse (A as given), the matrix itself, or Householder reflectors. An identity needs nothing.
    enum class form : std::uint8_t { scaled, stored, reflectors, identity };
    form kept = form::identity;
    matrix_view<const T> a{};
    matrix<double> q{}; ///< scaled: n×k with Q = A·q; stored: m×k; reflectors: m×k below the diagonal
    matrix<double> tau{}; ///< k×1
};

/// The thin QR of an m×n matrix A, either order; `what` names it in errors.
/// f32 data is factored through its f64 Gram matrix while that is safe (unit-length columns with κ up to 3000), by
/// Cholesky-QR twice (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015) up to κ = 10⁶, and otherwise, or when columns
/// depend on each other, by Householder reflections; always in f64. ‖QᵀQ − I‖ and ‖A − QR‖/‖A‖ stay below 1e-8 for f32
/// data and below n·1e-15 for f64. A wide A (m ≤ n) has Q = I and R = A. Throws nonfinite_error. The factors lie in
/// memory of the policy's resource. Cost: m·n² flops on the first road.
template <arithmetic_element T>
[[nodiscard]] qr_factors<T> factor_qr(
    const cpu& policy, std::type_identity_t<matrix_view<const T>> a, std::string_view what = "A");

/// out = Q·X for the Q of factor_qr(): X is k×p in f64, out m×p. Cost: 2·m·k·p flops.
template <arithmetic_element T>
void multiply_q(const cpu& policy, const qr_factors<T>& f, std::type_identity_t<matrix_view<const double>> x,
    std::type_identity_t<matrix_view<T>> out);

/// The SVD of a small f64 matrix by one-sided Jacobi rotations (Hestenes 1958; de Rijk 1989 for the pivoting).
/// σ to about n·ε·σ₁, u and v orthonormal to n·ε; values below ε·σ₁ count as zero and their u completes a basis. Signs
/// are left as they fall. Throws nonfinite_error. u and v lie in memory of the policy's resource. Cost: about 6·m·n²
/// flops a sweep, 4 to 9 sweeps: meant for n up to a few hundred.
template <int = 0>
[[nodiscard]] small_svd_result small_svd(const cpu& policy, matrix_view<const double> a);

/// Turns the signs of matching columns of u and v so that the entry of largest magnitude of each u is positive (the
/// first one among equals): results then compare across backends and runs.
template <arithmetic_element T>
void orient(const cpu&, std::type_identity_t<matrix_view<T>> u, std::type_identity_t<matrix_view<T>> v);

/// G = L·Lᵀ for a symmetric positive definite G (n×n, f64): L replaces the lower triangle of a column-major G, the
/// upper one is left alone. Returns the least L(i, i)²/G(i, i), the share of its square that a variable does not owe to
/// those before it: near rounding (n·1e-16) G is singular for all purposes, and 0, with G unspecified, says that it is
/// not positive definite. Cost: n³/3 flops.
template <int = 0>
[[nodiscard]] double factor_cholesky(const cpu&, matrix_view<double> g);

/// X with L·Lᵀ·X = B, in place of B (n×p, either order), for the L of factor_cholesky(). Cost: 2·n²·p flops, by pieces
/// of columns in parallel.
template <int = 0>
void solve_cholesky(const cpu& policy, matrix_view<const double> l, matrix_view<double> b);

/// Solves G·X = B for a symmetric positive definite G (n×n, f64) and B (n×p), in place of B, by Cholesky. False, with B
/// unspecified, where G is not numerically positive definite. Cost: n³/3 + 2·n²·p flops, and a copy of G.
template <int = 0>
[[nodiscard]] bool cholesky_solve(const cpu& policy, matrix_view<const double> g, matrix_view<double> b);

// What the algorithms need besides: matrices of the policy's memory, and moves between them.

/// A zero matrix that outlives the call: memory of the default resource.
template <arithmetic_element T>
[[nodiscard]] matrix<T> result_matrix(
    const cpu&, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
{
    return matrix<T>(rows, cols, order);
}

/// A zero matrix of the policy's scratch memory.
template <arithmetic_element T>
[[nodiscard]] matrix<T> scratch_matrix(
    const cpu& policy, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
{
    return matrix<T>(rows, cols, order, memory_of(policy));
}

/// to = from, of the same shape; the orders may differ. Throws shape_mismatch.
template <arithmetic_element T>
void copy_matrix(const cpu&, std::type_identity_t<matrix_view<const T>> from, std::type_identity_t<matrix_view<T>> to);

/// out = x·diag(scale): x and out m×q, q scales. Each product is rounded once.
template <arithmetic_element T>
void scale_columns(const cpu&, std::type_identity_t<matrix_view<const T>> x, std::span<const double> scale,
    std::type_identity_t<matrix_view<T>> out);

/// weight·Ra·Rbᵀ of two triangular factors, in scratch memory.
template <int = 0>
[[nodiscard]] matrix<double> small_product(
    const cpu& policy, double weight, const matrix<double>& a, const matrix<double>& b);

/// out = x·y for a tall x (m×k) and columns y (k×q) of what small_svd() returned, rounded to T before the product.
template <arithmetic_element T>
void multiply_small(const cpu& policy, std::type_identity_t<matrix_view<const T>> x,
    std::type_identity_t<matrix_view<const double>> y, std::type_identity_t<matrix_view<T>> out);

/// An orthonormal basis of the columns of y, m×min(m, n), explicitly, in scratch memory.
template <arithmetic_element T>
[[nodiscard]] matrix<T> orthonormal_basis(
    const cpu& policy, std::type_identity_t<matrix_view<const T>> y, std::string_view what);

/// The matrix in its arithmetic type: as it is, or a converted copy kept in `copy`, in scratch memory.
template <storage_element T>
[[nodiscard]] matrix_view<const arithmetic_type<T>> in_arithmetic(
    const cpu& policy, matrix_view<const T> a, matrix<arithmetic_type<T>>& copy);

/// Raises nonfinite_error for the first NaN or infinity in row-major order; returns if there is none.
template <storage_element T>
void refuse_nonfinite(const cpu& policy, matrix_view<const T> a, std::string_view what);

/// body(inside, index) for each index in [0, count), in parallel where the policy can; `inside` is the policy for the
/// work of one index.
template <class Body>
void for_each_piece(const cpu& policy, std::size_t count, const Body& body)
{
    const cpu inside = sequential(policy);
    for_each_index(policy, count, [&](std::size_t index, std::size_t) { body(inside, index); });
}

/// Calls body with a policy that is ready for many calls: what a backend has to make for each of them is made once.
template <class Body>
decltype(auto) with_context(const cpu& policy, const Body& body)
{
    return body(policy);
}

/// Below this share of ‖A‖² a squared error is measured entry by entry: ‖A‖² − Σσ² would cancel.
template <arithmetic_element T>
[[nodiscard]] constexpr double cancellation_limit(const cpu&)
{
    return 1e-6;
}

namespace detail {

using eigen_index = Eigen::Index;

inline constexpr auto eigen_success = static_cast<Eigen::ComputationInfo>(0); // its name is a macro of X11

template <class T, int Order>
using eigen_map =
    Eigen::Map<Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Order>, Eigen::Unaligned, Eigen::OuterStride<>>;

template <class T, int Order>
using eigen_const_map =
    Eigen::Map<const Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Order>, Eigen::Unaligned, Eigen::OuterStride<>>;

template <int Order, class T>
[[nodiscard]] auto map_as(const matrix_view<const T>& x)
{
    return eigen_const_map<T, Order>(x.data(), static_cast<eigen_index>(x.rows()), static_cast<eigen_index>(x.cols()),
        Eigen::OuterStride<>(static_cast<eigen_index>(x.stride())));
}

/// Keeps Eigen's own OpenMP threads out of a product: the parallelism is over layers and blocks, one thread inside
/// each.
class one_thread_inside {
public:
#if defined(_OPENMP)
    one_thread_inside()
        : threads_(omp_get_max_threads())
    {
        omp_set_num_threads(1);
    }
    ~one_thread_inside() { omp_set_num_threads(threads_); }
    one_thread_inside(const one_thread_inside&) = delete;
    one_thread_inside& operator=(const one_thread_inside&) = delete;

private:
    int threads_;
#else
    one_thread_inside() noexcept { }
#endif
};

/// C (column-major) = alpha·A·B + beta·C on this thread.
template <int OrderA, int OrderB, class T>
TASKVEC_NOINLINE void multiply_block(T alpha, matrix_view<const T> a, matrix_view<const T> b, T beta, matrix_view<T> c)
{
    eigen_map<T, Eigen::ColMajor> out(c.data(), static_cast<eigen_index>(c.rows()), static_cast<eigen_index>(c.cols()),
        Eigen::OuterStride<>(static_cast<eigen_index>(c.stride())));
    if (beta == T(0)) { out.setZero(); }
    else if (beta != T(1)) {
        out *= beta;
    }
    if (a.cols() != 0) { out.noalias() += alpha * (map_as<OrderA>(a) * map_as<OrderB>(b)); }
}

template <class T>
void multiply_any(T alpha, matrix_view<const T> a, matrix_view<const T> b, T beta, matrix_view<T> c)
{
    const bool a_rows = a.order() == matrix_order::row_major, b_rows = b.order() == matrix_order::row_major;
    if (a_rows && b_rows) { multiply_block<Eigen::RowMajor, Eigen::RowMajor>(alpha, a, b, beta, c); }
    else if (a_rows) {
        multiply_block<Eigen::RowMajor, Eigen::ColMajor>(alpha, a, b, beta, c);
    }
    else if (b_rows) {
        multiply_block<Eigen::ColMajor, Eigen::RowMajor>(alpha, a, b, beta, c);
    }
    else {
        multiply_block<Eigen::ColMajor, Eigen::ColMajor>(alpha, a, b, beta, c);
    }
}

/// Sum of squares of a run, in f64, by 8 lanes that are folded at the end.
template <class T>
[[nodiscard]] TASKVEC_NOINLINE double run_of_squares(const T* data, std::size_t size)
{
    using lanes = Eigen::Array<double, 8, 1>;
    using stored = Eigen::Array<T, 8, 1>;
    lanes sum = lanes::Zero();
    std::size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const lanes x = Eigen::Map<const stored>(data + i).template cast<double>();
        sum += x * x;
    }
    double rest = 0;
    for (; i < size; ++i) { rest += static_cast<double>(data[i]) * static_cast<double>(data[i]); }
    return sum.sum() + rest;
}

/// Raises nonfinite_error for the first NaN or infinity in row-major order; returns if there is none.
template <class T>
TASKVEC_COLD void blame_nonfinite(matrix_view<const T> x, std::string_view what)
{
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < x.cols(); ++j) {
            if (!std::isfinite(static_cast<double>(x(i, j)))) {
                raise<nonfinite_error>(error_code::not_finite,
                    message("matrix '", what, "' holds ", std::isnan(static_cast<double>(x(i, j))) ? "NaN" : "infinity",
                        " at row ", i, ", column ", j,
                        "; a decomposition needs finite numbers: repair or leave out this matrix"));
            }
        }
    }
}

/// Uninitialised memory that is aligned as Eigen's own matrices are, so that it computes the same bits in it.
template <class T>
class matrix_room {
public:
    matrix_room(std::size_t size, std::pmr::memory_resource* memory)
        : memory_(memory)
        , bytes_(size * sizeof(T))
        , data_(static_cast<T*>(memory->allocate(bytes_, alignment)))
    { }
    ~matrix_room() { memory_->deallocate(data_, bytes_, alignment); }
    matrix_room(const matrix_room&) = delete;
    matrix_room& operator=(const matrix_room&) = delete;
    [[nodiscard]] T* data() const noexcept { return data_; }

private:
    static constexpr std::size_t alignment = 64;
    std::pmr::memory_resource* memory_;
    std::size_t bytes_;
    T* data_;
};

inline constexpr std::size_t tall_block = 256; // rows that are converted to f64 at a time

/// Copies a block to f64, in the order of the source.
template <class T>
[[nodiscard]] matrix_view<const double> widened(matrix_view<const T> x, std::pmr::vector<double>& scratch)
{
    if constexpr (std::same_as<T, double>) { return x; }
    else {
        const bool by_rows = x.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? x.rows() : x.cols(), length = by_rows ? x.cols() : x.rows();
        scratch.resize(std::max(scratch.size(), x.size()));
        for (std::size_t k = 0; k < runs; ++k) {
            Eigen::Map<Eigen::ArrayXd>(scratch.data() + k * length, static_cast<eigen_index>(length)) =
                Eigen::Map<const Eigen::Array<T, Eigen::Dynamic, 1>>(
                    x.data() + k * x.stride(), static_cast<eigen_index>(length))
                    .template cast<double>();
        }
        return {scratch.data(), x.rows(), x.cols(), x.order()};
    }
}

/// G = AᵀA in f64 (n×n, both triangles).
template <class T>
void gram(matrix_view<const T> a, matrix_view<double> g, std::pmr::memory_resource* memory)
{
    const std::size_t n = a.cols();
    constexpr std::size_t panel = 32;
    std::pmr::vector<double> scratch(memory);
    for (std::size_t i = 0; i < a.rows(); i += tall_block) {
        const auto rows = widened(a.block(i, 0, std::min(tall_block, a.rows() - i), n), scratch);
        for (std::size_t j = 0; j < n; j += panel) { // the lower triangle, by panels of columns
            const std::size_t width = std::min(panel, n - j);
            multiply_any<double>(1.0, rows.block(0, j, rows.rows(), n - j).transposed(),
                rows.block(0, j, rows.rows(), width), i == 0 ? 0.0 : 1.0, g.block(j, j, n - j, width));
        }
    }
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = j + 1; i < n; ++i) { g(j, i) = g(i, j); }
    }
}

/// R with RᵀR = G and its inverse, for a positive definite G. Returns a lower bound of the least eigenvalue of G with
/// its columns scaled to unit length (about 1/κ² of the scaled columns), or 0 where G is not numerically definite.
template <int = 0>
[[nodiscard]] double cholesky_factor(
    matrix_view<const double> g, matrix_view<double> r, matrix_view<double> inverse, std::pmr::memory_resource* memory)
{
    const std::size_t n = g.cols();
    const matrix_room<double> room(n * n, memory);
    eigen_map<double, Eigen::ColMajor> l(room.data(), static_cast<eigen_index>(n), static_cast<eigen_index>(n),
        Eigen::OuterStride<>(static_cast<eigen_index>(n)));
    std::pmr::vector<double> scale(n, memory);
    for (std::size_t j = 0; j < n; ++j) {
        if (!(g(j, j) > 0)) { return 0; }
        scale[j] = std::sqrt(g(j, j));
    }
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < n; ++i) {
            l(static_cast<eigen_index>(i), static_cast<eigen_index>(j)) = g(i, j) / scale[i] / scale[j];
        }
    }
    Eigen::Ref<Eigen::MatrixXd> in_place(l);
    const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> llt(in_place);
    if (llt.info() != eigen_success) { return 0; }
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < n; ++i) {
            r(i, j) = i <= j ? l(static_cast<eigen_index>(j), static_cast<eigen_index>(i)) * scale[j] : 0;
        }
    }
    // The inverse of an upper triangle, column by column.
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < n; ++i) { inverse(i, j) = 0; }
        inverse(j, j) = 1 / r(j, j);
        for (std::size_t i = j; i-- > 0;) {
            double sum = 0;
            for (std::size_t k = i + 1; k <= j; ++k) { sum += r(i, k) * inverse(k, j); }
            inverse(i, j) = -sum / r(i, i);
        }
    }
    double inverse_norm = 0; // ‖scaled R⁻¹‖²_F, at least 1/λ
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i <= j; ++i) { inverse_norm += inverse(i, j) * scale[i] * inverse(i, j) * scale[i]; }
    }
    return 1 / inverse_norm;
}

/// Householder QR in place: reflectors below the diagonal, R above it. Unconditionally stable, any rank; column by
/// column.
template <int = 0>
void householder(matrix_view<double> a, double* tau)
{
    using column = Eigen::Map<Eigen::VectorXd>;
    const std::size_t m = a.rows(), n = a.cols();
    for (std::size_t j = 0; j < std::min(m, n); ++j) {
        column x(&a(j, j), static_cast<eigen_index>(m - j));
        const double largest = x.cwiseAbs().maxCoeff();
        tau[j] = 0;
        if (largest == 0) { continue; }
        const double norm = largest * (x / largest).norm();
        const double alpha = x(0), beta = alpha >= 0 ? -norm : norm;
        tau[j] = (beta - alpha) / beta;
        x /= alpha - beta;
        x(0) = 1;
        for (std::size_t k = j + 1; k < n; ++k) {
            column y(&a(j, k), static_cast<eigen_index>(m - j));
            const double along = tau[j] * x.dot(y);
            y -= along * x;
        }
        x(0) = beta;
    }
}

using jacobi_lanes = Eigen::Array<double, 8, 1>;

template <int = 0>
[[nodiscard]] TASKVEC_NOINLINE double padded_dot(const double* x, const double* y, std::size_t size)
{
    jacobi_lanes sum = jacobi_lanes::Zero();
    for (std::size_t i = 0; i < size; i += 8) {
        sum += Eigen::Map<const jacobi_lanes>(x + i) * Eigen::Map<const jacobi_lanes>(y + i);
    }
    return sum.sum();
}

/// (x, y) ← (c·x − s·y, s·x + c·y)
template <int = 0>
TASKVEC_NOINLINE void padded_rotate(double* x, double* y, std::size_t size, double c, double s)
{
    for (std::size_t i = 0; i < size; i += 8) {
        Eigen::Map<jacobi_lanes> px(x + i), py(y + i);
        const jacobi_lanes a = px, b = py;
        px = c * a - s * b;
        py = s * a + c * b;
    }
}

/// Fills columns [first, cols) of an orthonormal u with unit vectors made orthogonal to all columns before.
template <int = 0>
void complete_basis(matrix_view<double> u, std::size_t first, std::pmr::memory_resource* memory)
{
    const std::size_t m = u.rows();
    std::pmr::vector<double> weight(m, 0.0, memory); // squared length of row i so far: e_i is best where it is least
    for (std::size_t j = 0; j < first; ++j) {
        for (std::size_t i = 0; i < m; ++i) { weight[i] += u(i, j) * u(i, j); }
    }
    for (std::size_t j = first; j < u.cols(); ++j) {
        const auto pick = static_cast<std::size_t>(std::min_element(weight.begin(), weight.end()) - weight.begin());
        Eigen::Map<Eigen::VectorXd> x(&u(0, j), static_cast<eigen_index>(m));
        x.setZero();
        x(static_cast<eigen_index>(pick)) = 1;
        for (int twice = 0; twice < 2; ++twice) {
            for (std::size_t k = 0; k < j; ++k) {
                const Eigen::Map<const Eigen::VectorXd> y(&u(0, k), static_cast<eigen_index>(m));
                const double along = y.dot(x);
                x -= along * y;
            }
        }
        x.normalize();
        for (std::size_t i = 0; i < m; ++i) { weight[i] += u(i, j) * u(i, j); }
    }
}

} // namespace detail

template <arithmetic_element T>
void gemm(const cpu& policy, T alpha, std::type_identity_t<matrix_view<const T>> a,
    std::type_identity_t<matrix_view<const T>> b, std::type_identity_t<T> beta, std::type_identity_t<matrix_view<T>> c)
{
    if (a.rows() != c.rows() || b.cols() != c.cols() || a.cols() != b.rows()) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("gemm: ", a.rows(), "×", a.cols(), " times ", b.rows(), "×", b.cols(), " into ", c.rows(), "×",
                c.cols()));
    }
    if (c.empty()) { return; }
    if (c.order() == matrix_order::row_major) {
        c = c.transposed();
        std::swap(a, b);
        a = a.transposed();
        b = b.transposed();
    }
    // Fixed pieces of the longer side: the same products whatever the number of threads.
    constexpr std::size_t piece = 256;
    const bool by_rows = c.rows() >= c.cols();
    const std::size_t pieces = ((by_rows ? c.rows() : c.cols()) + piece - 1) / piece;
    const bool worth_threads = static_cast<double>(c.size()) * static_cast<double>(a.cols()) > 4e6;
    for_each_index(worth_threads ? policy : sequential(policy), pieces, [&](std::size_t index, std::size_t) {
        const detail::one_thread_inside guard;
        const std::size_t first = index * piece;
        if (by_rows) {
            const std::size_t count = std::min(piece, c.rows() - first);
            detail::multiply_any<T>(
                alpha, a.block(first, 0, count, a.cols()), b, beta, c.block(first, 0, count, c.cols()));
        }
        else {
            const std::size_t count = std::min(piece, c.cols() - first);
            detail::multiply_any<T>(
                alpha, a, b.block(0, first, b.rows(), count), beta, c.block(0, first, c.rows(), count));
        }
    });
}

template <arithmetic_element T>
double squared_norm(const cpu& policy, matrix_view<const T> a)
{
    if (a.empty()) { return 0; }
    if (a.order() == matrix_order::row_major) { a = a.transposed(); }
    constexpr std::size_t piece = 64;
    std::pmr::vector<double> part((a.cols() + piece - 1) / piece, 0.0, memory_of(policy));
    for_each_index(
        a.size() > 1'000'000 ? policy : sequential(policy), part.size(), [&](std::size_t index, std::size_t) {
            for (std::size_t j = index * piece; j < std::min(a.cols(), (index + 1) * piece); ++j) {
                part[index] += detail::run_of_squares(a.data() + j * a.stride(), a.rows());
            }
        });
    return std::accumulate(part.begin(), part.end(), 0.0);
}

template <arithmetic_element T>
void fill_normal(const cpu& policy, const random_stream& stream, matrix_view<T> a)
{
    for_each_index(a.size() > 10'000 ? policy : sequential(policy), a.cols(), [&](std::size_t j, std::size_t) {
        const std::uint64_t first = std::uint64_t{j} * a.rows();
        for (std::size_t i = 0; i < a.rows();) {
            if ((first + i) % 2 == 0 && i + 1 < a.rows()) {
                const auto [even, odd] = stream.normal_pair((first + i) / 2);
                a(i, j) = static_cast<T>(even);
                a(i + 1, j) = static_cast<T>(odd);
                i += 2;
            }
            else {
                a(i, j) = static_cast<T>(stream.normal(first + i));
                ++i;
            }
        }
    });
}

template <arithmetic_element T>
qr_factors<T> factor_qr(const cpu& policy, std::type_identity_t<matrix_view<const T>> a, std::string_view what)
{
    const detail::one_thread_inside guard;
    const std::size_t m = a.rows(), n = a.cols();
    std::pmr::memory_resource* const memory = memory_of(policy);
    qr_factors<T> f;
    f.a = a;
    f.r = matrix<double>(std::min(m, n), n, matrix_order::column_major, memory);
    if (a.empty()) { return f; }
    if (m <= n) { // Q = I
        for (std::size_t j = 0; j < n; ++j) {
            for (std::size_t i = 0; i < m; ++i) { f.r(i, j) = static_cast<double>(a(i, j)); }
        }
        if (!std::isfinite(squared_norm(policy, a))) { detail::blame_nonfinite(a, what); }
        return f;
    }
    matrix<double> g(n, n, matrix_order::column_major, memory), inverse(n, n, matrix_order::column_major, memory);
    detail::gram(a, g.view(), memory);
    double trace = 0;
    for (std::size_t j = 0; j < n; ++j) { trace += g(j, j); }
    if (!std::isfinite(trace)) { detail::blame_nonfinite(a, what); } // returns when only the squares overflow
    const double least = std::isfinite(trace) ? detail::cholesky_factor(g, f.r, inverse, memory) : 0;
    if constexpr (std::same_as<T, float>) {
        if (least >= 1e-7) {
            f.kept = qr_factors<T>::form::scaled;
            f.q = std::move(inverse);
            return f;
        }
    }
    f.q = matrix<double>(m, n, matrix_order::column_major, memory);
    if (least >= 1e-12) { // once more, on the nearly orthonormal A·R⁻¹
        std::pmr::vector<double> scratch(memory);
        matrix<double> once(m, n, matrix_order::column_major, memory), r1(n, n, matrix_order::column_major, memory),
            r2(n, n, matrix_order::column_major, memory);
        std::copy_n(f.r.data(), r1.size(), r1.data());
        for (std::size_t i = 0; i < m; i += detail::tall_block) {
            const std::size_t count = std::min(detail::tall_block, m - i);
            detail::multiply_any<double>(1.0, detail::widened(a.block(i, 0, count, n), scratch), inverse, 0.0,
                once.view().block(i, 0, count, n));
        }
        detail::gram<double>(once.view(), g.view(), memory);
        if (detail::cholesky_factor(g, r2, inverse, memory) * static_cast<double>(n) > 0.5) {
            detail::multiply_any<double>(1.0, once, inverse, 0.0, f.q);
            detail::multiply_any<double>(1.0, r2, r1, 0.0, f.r);
            f.kept = qr_factors<T>::form::stored;
            return f;
        }
    }
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < m; ++i) { f.q(i, j) = static_cast<double>(a(i, j)); }
    }
    f.tau = matrix<double>(std::min(m, n), 1, matrix_order::column_major, memory);
    detail::householder(f.q, f.tau.data());
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < n; ++i) { f.r(i, j) = i <= j ? f.q(i, j) : 0; }
    }
    f.kept = qr_factors<T>::form::reflectors;
    return f;
}

template <arithmetic_element T>
void multiply_q(const cpu& policy, const qr_factors<T>& f, std::type_identity_t<matrix_view<const double>> x,
    std::type_identity_t<matrix_view<T>> out)
{
    using form = typename qr_factors<T>::form;
    const detail::one_thread_inside guard;
    const std::size_t m = f.a.rows(), p = x.cols();
    if (x.rows() != f.r.rows() || out.rows() != m || out.cols() != p) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("multiply_q: Q is ", m, "×", f.r.rows(), ", X ", x.rows(), "×", p, ", the result ", out.rows(), "×",
                out.cols()));
    }
    if (out.empty()) { return; }
    std::pmr::memory_resource* const memory = memory_of(policy);
    if (f.kept == form::identity || f.kept == form::reflectors) {
        matrix<double> y(m, p, matrix_order::column_major, memory);
        for (std::size_t j = 0; j < p; ++j) {
            for (std::size_t i = 0; i < x.rows(); ++i) { y(i, j) = x(i, j); }
            for (std::size_t k = f.tau.size(); k-- > 0;) {
                Eigen::Map<Eigen::VectorXd> tail(&y(k, j), static_cast<Eigen::Index>(m - k));
                const Eigen::Map<const Eigen::VectorXd> reflector(&f.q(k, k), static_cast<Eigen::Index>(m - k));
                const auto below = static_cast<Eigen::Index>(m - k - 1);
                const double along = f.tau(k, 0) * (tail(0) + reflector.tail(below).dot(tail.tail(below)));
                tail(0) -= along;
                tail.tail(below) -= along * reflector.tail(below);
            }
            for (std::size_t i = 0; i < m; ++i) { out(i, j) = static_cast<T>(y(i, j)); }
        }
        return;
    }
    matrix<double> scaled;
    if (f.kept == form::scaled) {
        scaled = matrix<double>(f.a.cols(), p, matrix_order::column_major, memory);
        detail::multiply_any<double>(1.0, f.q, x, 0.0, scaled);
    }
    std::pmr::vector<double> scratch(memory), block(memory);
    for (std::size_t i = 0; i < m; i += detail::tall_block) {
        const std::size_t count = std::min(detail::tall_block, m - i);
        block.resize(count * p);
        const matrix_view<double> y(block.data(), count, p, matrix_order::column_major);
        if (f.kept == form::scaled) {
            detail::multiply_any<double>(
                1.0, detail::widened(f.a.block(i, 0, count, f.a.cols()), scratch), scaled, 0.0, y);
        }
        else {
            detail::multiply_any<double>(1.0, f.q.view().block(i, 0, count, f.q.cols()), x, 0.0, y);
        }
        for (std::size_t j = 0; j < p; ++j) {
            for (std::size_t k = 0; k < count; ++k) { out(i + k, j) = static_cast<T>(y(k, j)); }
        }
    }
}

template <int>
small_svd_result small_svd(const cpu& policy, matrix_view<const double> a)
{
    if (a.rows() < a.cols()) {
        small_svd_result turned = small_svd(policy, a.transposed());
        std::swap(turned.u, turned.v);
        return turned;
    }
    const std::size_t m = a.rows(), n = a.cols();
    std::pmr::memory_resource* const memory = memory_of(policy);
    small_svd_result result{matrix<double>(m, n, matrix_order::column_major, memory), std::vector<double>(n, 0.0),
        matrix<double>(n, n, matrix_order::column_major, memory)};
    if (n == 0) { return result; }
    double largest = 0;
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < m; ++i) {
            if (!std::isfinite(a(i, j))) { detail::blame_nonfinite(a, "the core"); }
            largest = std::max(largest, std::abs(a(i, j)));
        }
    }
    if (largest == 0) {
        for (std::size_t j = 0; j < n; ++j) { result.u(j, j) = result.v(j, j) = 1; }
        return result;
    }
    int exponent = 0;
    std::frexp(largest, &exponent);

    // Columns of w (A·V so far) and v, each padded to whole lanes.
    const auto padded = [](std::size_t size) { return (size + 7) / 8 * 8; };
    const std::size_t wm = padded(m), vn = padded(n);
    std::pmr::vector<double> w(wm * n, 0.0, memory), v(vn * n, 0.0, memory);
    std::pmr::vector<double> squares(n, memory);
    std::pmr::vector<std::size_t> at(n, memory); // column p of the iteration lies at at[p]
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < m; ++i) { w[j * wm + i] = std::ldexp(a(i, j), -exponent); }
        v[j * vn + j] = 1;
        at[j] = j;
    }
    constexpr double epsilon = std::numeric_limits<double>::epsilon();
    constexpr int most_sweeps = 60;
    for (int sweep = 0; sweep < most_sweeps; ++sweep) {
        double top = 0;
        for (std::size_t j = 0; j < n; ++j) {
            squares[j] = detail::padded_dot(&w[j * wm], &w[j * wm], wm);
            top = std::max(top, squares[j]);
        }
        const double negligible = top * epsilon * epsilon;
        std::size_t rotations = 0;
        std::sort(at.begin(), at.end(),
            [&](std::size_t x, std::size_t y) { return squares[x] != squares[y] ? squares[x] > squares[y] : x < y; });
        for (std::size_t p = 0; p + 1 < n; ++p) {
            for (std::size_t q = p + 1; q < n; ++q) {
                if (squares[at[p]] < squares[at[q]]) { std::swap(at[p], at[q]); }
                const std::size_t x = at[p], y = at[q];
                if (squares[y] <= negligible) { continue; }
                const double dot = detail::padded_dot(&w[x * wm], &w[y * wm], wm);
                if (std::abs(dot) <= 4 * epsilon * std::sqrt(squares[x] * squares[y])) { continue; }
                const double zeta = (squares[y] - squares[x]) / (2 * dot);
                const double t = std::copysign(1 / (std::abs(zeta) + std::sqrt(1 + zeta * zeta)), zeta);
                const double c = 1 / std::sqrt(1 + t * t), s = c * t;
                detail::padded_rotate(&w[x * wm], &w[y * wm], wm, c, s);
                detail::padded_rotate(&v[x * vn], &v[y * vn], vn, c, s);
                squares[x] -= t * dot;
                squares[y] = std::max(0.0, squares[y] + t * dot);
                ++rotations;
            }
        }
        if (rotations == 0) { break; }
    }
    for (std::size_t j = 0; j < n; ++j) { squares[j] = detail::padded_dot(&w[j * wm], &w[j * wm], wm); }
    std::sort(at.begin(), at.end(),
        [&](std::size_t x, std::size_t y) { return squares[x] != squares[y] ? squares[x] > squares[y] : x < y; });
    std::size_t rank = n;
    for (std::size_t j = 0; j < n; ++j) {
        const double length = std::sqrt(squares[at[j]]);
        if (rank == n && length <= epsilon * std::sqrt(squares[at[0]])) { rank = j; }
        result.sigma[j] = j < rank ? std::ldexp(length, exponent) : 0;
        for (std::size_t i = 0; i < n; ++i) { result.v(i, j) = v[at[j] * vn + i]; }
        for (std::size_t i = 0; i < m && j < rank; ++i) { result.u(i, j) = w[at[j] * wm + i] / length; }
    }
    detail::complete_basis(result.u, rank, memory);
    return result;
}

template <arithmetic_element T>
void orient(const cpu&, std::type_identity_t<matrix_view<T>> u, std::type_identity_t<matrix_view<T>> v)
{
    for (std::size_t j = 0; j < u.cols(); ++j) {
        T largest = 0;
        for (std::size_t i = 0; i < u.rows(); ++i) {
            if (std::abs(u(i, j)) > std::abs(largest)) { largest = u(i, j); }
        }
        if (largest >= 0) { continue; }
        for (std::size_t i = 0; i < u.rows(); ++i) { u(i, j) = -u(i, j); }
        for (std::size_t i = 0; i < v.rows(); ++i) { v(i, j) = -v(i, j); }
    }
}

template <int>
double factor_cholesky(const cpu& policy, matrix_view<double> g)
{
    if (g.rows() != g.cols() || g.order() != matrix_order::column_major) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("factor_cholesky: G is ", g.rows(), "×", g.cols(), "; expected a square, column-major matrix"));
    }
    if (g.empty()) { return 1; }
    const detail::one_thread_inside guard;
    std::pmr::vector<double> diagonal(g.rows(), memory_of(policy));
    for (std::size_t i = 0; i < diagonal.size(); ++i) {
        diagonal[i] = g(i, i);
        if (!(diagonal[i] > 0)) { return 0; }
    }
    detail::eigen_map<double, Eigen::ColMajor> l(g.data(), static_cast<detail::eigen_index>(g.rows()),
        static_cast<detail::eigen_index>(g.cols()), Eigen::OuterStride<>(static_cast<detail::eigen_index>(g.stride())));
    Eigen::Ref<Eigen::MatrixXd> in_place(l);
    const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> llt(in_place);
    if (llt.info() != detail::eigen_success) { return 0; }
    double least = 1;
    for (std::size_t i = 0; i < diagonal.size(); ++i) {
        const double share = g(i, i) * g(i, i) / diagonal[i];
        least = share < least ? share : least;
    }
    return least;
}

template <int>
void solve_cholesky(const cpu& policy, matrix_view<const double> l, matrix_view<double> b)
{
    if (l.rows() != l.cols() || b.rows() != l.rows() || l.order() != matrix_order::column_major) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("solve_cholesky: L is ", l.rows(), "×", l.cols(), ", B ", b.rows(), "×", b.cols()));
    }
    if (b.empty()) { return; }
    constexpr std::size_t piece = 256;
    const bool worth_threads = static_cast<double>(b.size()) * static_cast<double>(b.rows()) > 4e6;
    for_each_index(worth_threads ? policy : sequential(policy), (b.cols() + piece - 1) / piece,
        [&](std::size_t index, std::size_t) {
            const detail::one_thread_inside guard;
            const auto lower = detail::map_as<Eigen::ColMajor>(l);
            const matrix_view<double> part =
                b.block(0, index * piece, b.rows(), std::min(piece, b.cols() - index * piece));
            const auto rows = static_cast<detail::eigen_index>(part.rows()),
                       cols = static_cast<detail::eigen_index>(part.cols());
            const Eigen::OuterStride<> stride(static_cast<detail::eigen_index>(part.stride()));
            if (part.order() == matrix_order::row_major) {
                detail::eigen_map<double, Eigen::RowMajor> x(part.data(), rows, cols, stride);
                lower.template triangularView<Eigen::Lower>().solveInPlace(x);
                lower.template triangularView<Eigen::Lower>().transpose().solveInPlace(x);
            }
            else {
                detail::eigen_map<double, Eigen::ColMajor> x(part.data(), rows, cols, stride);
                lower.template triangularView<Eigen::Lower>().solveInPlace(x);
                lower.template triangularView<Eigen::Lower>().transpose().solveInPlace(x);
            }
        });
}

template <int>
bool cholesky_solve(const cpu& policy, matrix_view<const double> g, matrix_view<double> b)
{
    if (g.rows() != g.cols() || b.rows() != g.rows()) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("cholesky_solve: G is ", g.rows(), "×", g.cols(), ", B ", b.rows(), "×", b.cols()));
    }
    matrix<double> l(g.rows(), g.cols(), matrix_order::column_major, memory_of(policy));
    for (std::size_t j = 0; j < g.cols(); ++j) {
        for (std::size_t i = j; i < g.rows(); ++i) { l(i, j) = g(i, j); }
    }
    if (factor_cholesky(policy, l.view()) <= 0) { return false; }
    solve_cholesky(policy, l.view(), b);
    return true;
}

template <arithmetic_element T>
void copy_matrix(const cpu&, std::type_identity_t<matrix_view<const T>> from, std::type_identity_t<matrix_view<T>> to)
{
    if (from.rows() != to.rows() || from.cols() != to.cols()) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("copy_matrix: ", from.rows(), "×", from.cols(), " into ", to.rows(), "×", to.cols()));
    }
    if (from.order() != to.order()) {
        for (std::size_t j = 0; j < to.cols(); ++j) {
            for (std::size_t i = 0; i < to.rows(); ++i) { to(i, j) = from(i, j); }
        }
        return;
    }
    const bool by_rows = from.order() == matrix_order::row_major;
    const std::size_t runs = by_rows ? from.rows() : from.cols(), length = by_rows ? from.cols() : from.rows();
    for (std::size_t k = 0; k < runs; ++k) {
        std::copy_n(from.data() + k * from.stride(), length, to.data() + k * to.stride());
    }
}

template <arithmetic_element T>
void scale_columns(const cpu&, std::type_identity_t<matrix_view<const T>> x, std::span<const double> scale,
    std::type_identity_t<matrix_view<T>> out)
{
    for (std::size_t j = 0; j < scale.size(); ++j) {
        for (std::size_t i = 0; i < x.rows(); ++i) {
            out(i, j) = static_cast<T>(static_cast<double>(x(i, j)) * scale[j]);
        }
    }
}

template <int>
matrix<double> small_product(const cpu& policy, double weight, const matrix<double>& a, const matrix<double>& b)
{
    auto core = scratch_matrix<double>(policy, a.rows(), b.rows());
    gemm(policy, weight, a.view(), b.view().transposed(), 0.0, core.view());
    return core;
}

template <arithmetic_element T>
void multiply_small(const cpu& policy, std::type_identity_t<matrix_view<const T>> x,
    std::type_identity_t<matrix_view<const double>> y, std::type_identity_t<matrix_view<T>> out)
{
    auto rounded = scratch_matrix<T>(policy, y.rows(), y.cols());
    for (std::size_t j = 0; j < y.cols(); ++j) {
        for (std::size_t i = 0; i < y.rows(); ++i) { rounded(i, j) = static_cast<T>(y(i, j)); }
    }
    gemm<T>(policy, T(1), x, rounded.view(), T(0), out);
}

template <arithmetic_element T>
matrix<T> orthonormal_basis(const cpu& policy, std::type_identity_t<matrix_view<const T>> y, std::string_view what)
{
    const auto f = factor_qr<T>(policy, y, what);
    const std::size_t k = f.r.rows();
    auto unit = scratch_matrix<double>(policy, k, k);
    for (std::size_t j = 0; j < k; ++j) { unit(j, j) = 1; }
    auto q = scratch_matrix<T>(policy, y.rows(), k);
    multiply_q<T>(policy, f, unit.view(), q);
    return q;
}

template <storage_element T>
matrix_view<const arithmetic_type<T>> in_arithmetic(
    const cpu& policy, matrix_view<const T> a, matrix<arithmetic_type<T>>& copy)
{
    if constexpr (arithmetic_element<T>) { return a; }
    else {
        copy = scratch_matrix<arithmetic_type<T>>(policy, a.rows(), a.cols(), a.order());
        const bool by_rows = a.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? a.rows() : a.cols(), length = by_rows ? a.cols() : a.rows();
        for (std::size_t k = 0; k < runs; ++k) {
            for (std::size_t i = 0; i < length; ++i) {
                copy.data()[k * length + i] = widen<arithmetic_type<T>>(a.data()[k * a.stride() + i]);
            }
        }
        return copy;
    }
}

template <storage_element T>
void refuse_nonfinite(const cpu& policy, matrix_view<const T> a, std::string_view what)
{
    matrix<arithmetic_type<T>> copy;
    detail::blame_nonfinite(in_arithmetic(policy, a, copy), what);
}

static_assert(check_linear_algebra<cpu, float>() && check_linear_algebra<cpu, double>());

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_SMALL_MATRICES(extern)
TASKVEC_COMPILED_MATRICES(extern, float)
TASKVEC_COMPILED_MATRICES(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_LINALG_EIGEN_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How many singular triples are kept: a number, or as many as a share of the energy Σσ² needs. Exactly one is given.
///
///     rank_choice{.rank = 16}      rank_choice{.energy = 0.99}
struct rank_choice {
    std::size_t rank = 0; ///< this many
    double energy = 0; ///< or the smallest rank whose σ² sum to this share of all, 0 < energy ≤ 1
    bool clamp = false; ///< lower a rank above the largest possible one to it; otherwise that is an error

    /// Everything there is.
    [[nodiscard]] static constexpr rank_choice full() noexcept
    {
        return {.rank = std::numeric_limits<std::size_t>::max(), .clamp = true};
    }
};

template <>
struct options_of<rank_choice> {
    static constexpr option_table table{option_row("rank", &rank_choice::rank, "how many singular triples are kept"),
        option_row("energy", &rank_choice::energy, "or the share of the squared singular values to keep",
            {.at_least = 0, .at_most = 1}),
        option_row("clamp", &rank_choice::clamp, "lower a rank that is too high to the highest there is")};
};

/// The best (or, where randomized, a nearly best) rank-q approximation of a matrix A: u·diag(sigma)·vᵀ.
/// The factors are in the memory space that A was in; σ is always on the host.
template <arithmetic_element T, memory_space S>
struct svd_result {
    matrix<T, S> u; ///< m×q, orthonormal columns; the largest entry of each is positive
    std::vector<double> sigma; ///< q values, descending
    matrix<T, S> v; ///< n×q, orthonormal columns
    double squared_norm = 0; ///< ‖A‖²_F
    double squared_error = 0; ///< ‖A − u·diag(sigma)·vᵀ‖²_F

    /// q, the number of triples.
    [[nodiscard]] std::size_t rank() const noexcept { return sigma.size(); }
    /// ‖A − Aq‖_F / ‖A‖_F; 0 for a zero matrix.
    [[nodiscard]] double relative_error() const noexcept
    {
        return squared_norm > 0 ? std::sqrt(squared_error / squared_norm) : 0;
    }
    /// The share of ‖A‖²_F that is kept; 1 for a zero matrix.
    [[nodiscard]] double energy() const noexcept { return squared_norm > 0 ? 1 - squared_error / squared_norm : 1; }
};

/// The smallest rank, at least 1, whose leading σ² sum to `energy` of the total; `sigma` descending. 0 for an empty
/// list.
///
///     rank_for_energy(std::vector{3.0, 1.0}, 0.9) == 1   // 9 of 10
[[nodiscard]] inline std::size_t rank_for_energy(std::span<const double> sigma, double energy)
{
    if (!(energy > 0 && energy <= 1)) {
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("energy is ", energy, "; expected a share above 0 and at most 1"));
    }
    if (sigma.empty()) { return 0; }
    std::vector<double> tail(sigma.size() + 1, 0.0); // tail sums from the small end lose nothing
    for (std::size_t i = sigma.size(); i-- > 0;) { tail[i] = tail[i + 1] + sigma[i] * sigma[i]; }
    const double allowed = energy < 1 ? tail[0] - energy * tail[0] : 0;
    std::size_t rank = 1;
    while (rank < sigma.size() && tail[rank] > allowed) { ++rank; }
    return rank;
}

/// Σσ² beyond the first `rank` values, added from the small end.
[[nodiscard]] inline double energy_beyond(std::span<const double> sigma, std::size_t rank)
{
    double sum = 0;
    for (std::size_t i = sigma.size(); i-- > rank;) { sum += sigma[i] * sigma[i]; }
    return sum;
}

/// ‖A − u·diag(sigma)·vᵀ‖²_F computed entry by entry, block by block: exact to rounding, whatever the factors are.
/// A is m×n, u m×q, v n×q. Cost: one read of A and 2·m·n·q flops; scratch of 256 rows of A for each thread (4,096 on a
/// device).
template <arithmetic_element T, linear_algebra_policy P>
[[nodiscard]] double squared_residual(const P& policy, matrix_view<const T, P::space> a,
    std::type_identity_t<matrix_view<const T, P::space>> u, std::span<const double> sigma,
    std::type_identity_t<matrix_view<const T, P::space>> v);

namespace detail {

/// Checks a choice before any work; `largest` is the highest rank that there is, and `label` and `owner` begin the
/// sentences.
inline void check_rank_of(
    const rank_choice& choice, std::size_t largest, std::string_view label, std::string_view owner)
{
    if (choice.energy != 0) {
        if (choice.rank != 0) {
            raise<invalid_argument>(
                error_code::rank_choice, message(label, ": both a rank and an energy are given; give one of them"));
        }
        if (!(choice.energy > 0 && choice.energy <= 1)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message(label, ": energy is ", choice.energy, "; expected a share above 0 and at most 1"));
        }
        return;
    }
    if (choice.rank == 0) {
        raise<invalid_argument>(error_code::rank_out_of_range,
            message(label, ": rank 0 asked for; give a rank from 1 to ", largest, ", or an energy"));
    }
    if (choice.rank > largest && !choice.clamp) {
        raise<invalid_argument>(error_code::rank_out_of_range,
            message(label, ": rank ", choice.rank, " asked for, but ", owner, " at most ", largest,
                "; ask for less, or for clamping"));
    }
}
/// For one matrix, that may be called `what`.
inline void check_rank(const rank_choice& choice, std::size_t largest, std::string_view what)
{
    check_rank_of(choice, largest, message("'", what, "'"), "its rank is");
}
/// For layers that share a choice: what has a smaller rank than some other layer is kept whole.
inline void check_layer_ranks(const rank_choice& choice, std::size_t largest, std::string_view label)
{
    check_rank_of(choice, largest, label, "the ranks of its layers are");
}

[[nodiscard]] inline std::size_t chosen_rank(const rank_choice& choice, std::span<const double> sigma)
{
    return choice.energy != 0 ? rank_for_energy(sigma, choice.energy) : std::min(choice.rank, sigma.size());
}

/// Where a decomposition puts its factors: in memory of their own, for the caller to keep, or among the policy's
/// scratch, for an algorithm that makes something else of them.
enum class factor_place : std::uint8_t { kept, scratch };

/// A zero matrix there.
template <arithmetic_element T, linear_algebra_policy P>
[[nodiscard]] matrix<T, P::space> placed_matrix(const P& policy, std::size_t rows, std::size_t cols, factor_place place)
{
    return place == factor_place::kept ? result_matrix<T>(policy, rows, cols) : scratch_matrix<T>(policy, rows, cols);
}

/// The first `count` columns of a scratch matrix, as a matrix of its own.
template <arithmetic_element T, linear_algebra_policy P>
[[nodiscard]] matrix<T, P::space> left_part(
    const P& policy, matrix<T, P::space> x, std::size_t count, factor_place place)
{
    if (place == factor_place::scratch && count == x.cols()) { return x; }
    auto part = placed_matrix<T>(policy, x.rows(), count, place);
    copy_matrix<T>(policy, x.view().left_columns(count), part.view());
    return part;
}

} // namespace detail

template <arithmetic_element T, linear_algebra_policy P>
double squared_residual(const P& policy, matrix_view<const T, P::space> a,
    std::type_identity_t<matrix_view<const T, P::space>> u, std::span<const double> sigma,
    std::type_identity_t<matrix_view<const T, P::space>> v)
{
    const std::size_t m = a.rows(), n = a.cols(), q = sigma.size();
    if (u.rows() != m || v.rows() != n || u.cols() != q || v.cols() != q) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("squared_residual: A is ", m, "×", n, ", u ", u.rows(), "×", u.cols(), ", v ", v.rows(), "×",
                v.cols(), ", sigma ", q));
    }
    constexpr std::size_t piece = P::space == memory_space::host ? 256 : 4096;
    std::vector<double> part((m + piece - 1) / piece, 0.0);
    for_each_piece(policy, part.size(), [&](const P& inside, std::size_t index) {
        const std::size_t first = index * piece, count = std::min(piece, m - first);
        auto rest = scratch_matrix<T>(inside, count, n, a.order());
        auto scaled = scratch_matrix<T>(inside, count, q, matrix_order::column_major);
        scale_columns<T>(inside, u.block(first, 0, count, q), sigma, scaled.view());
        copy_matrix<T>(inside, a.block(first, 0, count, n), rest.view());
        gemm<T>(inside, T(-1), scaled.view(), v.transposed(), T(1), rest.view());
        part[index] = squared_norm<T>(inside, rest.view());
    });
    return std::accumulate(part.begin(), part.end(), 0.0);
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_LINALG_SVD_HPP

// ---- taskvec/linalg/wrong_call.hpp
#if !defined(TASKVEC_SINGLE_LINALG_WRONG_CALL_HPP)
#define TASKVEC_SINGLE_LINALG_WRONG_CALL_HPP
// What decompositions take beside views of const elements, and what they say of anything else: one sentence.
// SPDX-License-Identifier: Apache-2.0


#include <type_traits>

namespace taskvec::inline TASKVEC_ABI::detail {

/// The storage type of a matrix of the library in a memory space, a view or an owner; void for anything else.
template <class X, memory_space S>
struct matrix_element {
    using type = void;
};
template <class T, memory_space S>
struct matrix_element<matrix_view<T, S>, S> {
    using type = std::remove_const_t<T>;
};
template <class T, memory_space S>
struct matrix_element<matrix<T, S>, S> {
    using type = T;
};
template <class X, memory_space S>
using matrix_element_of = typename matrix_element<std::remove_cvref_t<X>, S>::type;

/// A matrix in a memory space that is no view of const elements: functions of such views see it as one.
template <class X, memory_space S>
concept other_matrix = !std::is_void_v<matrix_element_of<X, S>>
    && !std::is_same_v<std::remove_cvref_t<X>, matrix_view<const matrix_element_of<X, S>, S>>;

/// What is no matrix in a memory space.
template <class X, memory_space S>
concept no_matrix = std::is_void_v<matrix_element_of<X, S>>;

/// The memory space that a matrix does not lie in, of the two that there are.
template <memory_space S>
inline constexpr memory_space other_space = S == memory_space::host ? memory_space::device : memory_space::host;

/// Refuses an argument that is no matrix where a policy works.
template <policy P, class X>
consteval void refuse_matrix()
{
    static_assert(std::is_void_v<matrix_element_of<X, other_space<P::space>>>,
        "taskvec: a matrix lies in another memory space than the policy works in: host memory with taskvec::cpu, "
        "device memory with taskvec::gpu");
    static_assert(!no_matrix<X, P::space> || !std::is_void_v<matrix_element_of<X, other_space<P::space>>>,
        "taskvec: an argument is no matrix: pass taskvec::matrix_view<const float>(data, rows, cols, order), or "
        "taskvec::as_matrix(x) of an Eigen or xtensor matrix of double, float or 16-bit elements");
}

} // namespace taskvec::inline TASKVEC_ABI::detail
#endif // TASKVEC_SINGLE_LINALG_WRONG_CALL_HPP

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory_resource>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What factored_svd() returns: also all singular values of the product, from which the error is known exactly.
template <arithmetic_element T, memory_space S>
struct factored_svd_result : svd_result<T, S> {
    std::vector<double> spectrum; ///< every singular value that left·rightᵀ can have nonzero, descending
};

/// Σ weightᵢ·leftᵢ·rightᵢᵀ as one pair of factors: the leftᵢ side by side, each times its weight, and the rightᵢ side
/// by side. Exact but for the rounding of weightᵢ·leftᵢ.
template <arithmetic_element T, memory_space S>
struct stacked_factors {
    matrix<T, S> left; ///< m×R, R the sum of the ranks
    matrix<T, S> right; ///< n×R

    /// The two as a product of weight 1. Refers to them.
    [[nodiscard]] factor_pair<T, S> pair(std::string_view name = {}) const
    {
        return {.left = left.view(), .right = right.view(), .name = name};
    }
};

/// The leading singular triples of P = left·rightᵀ, exactly: left = Ql·Rl, right = Qr·Rr, and the SVD of the small core
/// Rl·Rrᵀ. left is m×r, right is n×r, in either order and of the storage types f64, f32, bf16, f16 (16-bit factors are
/// computed in f32). σ is right to e = 2e-7·‖left‖·‖right‖ for f32 (1e-14 for f64; Frobenius norms); u and v are
/// orthonormal to rounding and their spaces right to an angle of 4·e divided by the gap σq − σq+1 (Wedin 1972);
/// squared_error is the tail of σ² (Eckart and Young 1936). The product (m×n) is never formed. Throws shape_mismatch
/// where the inner ranks differ, invalid_argument for a rank of 0 or above min(m, n, r), nonfinite_error. Cost: (m +
/// n)·r² + O(r³) flops, scratch O(r²).
///
///     auto best = factored_svd(cpu{}, left, right, {.rank = 16});
///     double lost = best.relative_error();
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] factored_svd_result<arithmetic_type<T>, P::space> factored_svd(
    const P& policy, const factor_pair<T, P::space>& p, const rank_choice& choice);

/// The same of two views.
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] factored_svd_result<arithmetic_type<T>, P::space> factored_svd(const P& policy,
    matrix_view<const T, P::space> left, std::type_identity_t<matrix_view<const T, P::space>> right,
    const rank_choice& choice);

/// Many layers at once: layer i of the result belongs to pairs[i]. On the CPU layers run in parallel, one thread inside
/// each, and the result does not depend on the number of threads; on a device the cores of equal shape are decomposed
/// together.
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] std::vector<factored_svd_result<arithmetic_type<T>, P::space>> factored_svd(
    const P& policy, std::span<const factor_pair<T, P::space>> pairs, const rank_choice& choice);

/// Stacks pairs of the same m and n; their ranks may differ. Throws shape_mismatch, and invalid_argument for an empty
/// list.
template <storage_element T>
[[nodiscard]] stacked_factors<arithmetic_type<T>> stack_factors(
    std::span<const factor_pair<T>> pairs, std::string_view what = "the sum");

/// The best approximation of Σ weightᵢ·leftᵢ·rightᵢᵀ (ranks may differ) by rank q: the stacked factors through
/// factored_svd(), with the exact error. Same types, errors and cost as factored_svd() with r the sum of the ranks; a
/// rank above that sum, or above m or n, is an error unless clamped.
///
///     std::array pairs{factor_pair<float>{.left = left1, .right = right1, .weight = 0.5},
///         factor_pair<float>{.left = left2, .right = right2, .weight = 0.5}};
///     auto merged = compress_sum(cpu{}, std::span<const factor_pair<float>>(pairs), {.rank = 16});
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] factored_svd_result<arithmetic_type<T>, P::space> compress_sum(const P& policy,
    std::span<const factor_pair<T, P::space>> pairs, const rank_choice& choice, std::string_view what = "the sum");

namespace detail {

/// factored_svd() up to the small SVD, and from there on: a device takes many small SVDs between the two together.
template <storage_element T, linear_algebra_policy P>
class factored_core {
public:
    using element = arithmetic_type<T>;
    using result_type = factored_svd_result<element, P::space>;

    factored_core(const P& policy, const factor_pair<T, P::space>& p, const rank_choice& choice)
        : what_(p.name.empty() ? std::string_view("left·rightᵀ") : p.name)
        , m_(p.left.rows())
        , n_(p.right.rows())
    {
        if (p.left.cols() != p.right.cols()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", what_, "': the left factor is ", m_, "×", p.left.cols(), " and the right one ", n_, "×",
                    p.right.cols(), "; the inner ranks differ"));
        }
        if (!std::isfinite(p.weight)) {
            raise<nonfinite_error>(error_code::scaling_not_finite, message("'", what_, "': its weight is not finite"));
        }
        check_rank(choice, std::min({m_, n_, p.left.cols()}), what_);
        if (p.left.empty() || p.right.empty()) { return; }
        left_ = p.left;
        right_ = p.right;
        left_qr_ = factor_qr<element>(policy, in_arithmetic(policy, p.left, left_copy_), what_);
        right_qr_ = factor_qr<element>(policy, in_arithmetic(policy, p.right, right_copy_), what_);
        product_ = small_product(policy, p.weight, left_qr_.r, right_qr_.r);
    }

    [[nodiscard]] bool empty() const noexcept { return product_.empty(); }
    /// weight·Rl·Rrᵀ
    [[nodiscard]] auto product() const noexcept { return std::as_const(product_).view(); }

    [[nodiscard]] result_type nothing(const P& policy, factor_place place) const
    {
        result_type result;
        result.u = placed_matrix<element>(policy, m_, 0, place);
        result.v = placed_matrix<element>(policy, n_, 0, place);
        return result;
    }

    /// The result, from the SVD of product().
    template <class SmallSvd>
    [[nodiscard]] result_type finish(
        const P& policy, SmallSvd&& core, const rank_choice& choice, factor_place place) const
    {
        if (!std::all_of(core.sigma.begin(), core.sigma.end(),
                [](double x) { return std::isfinite(x); })) { // not found before, on a device
            refuse_nonfinite(policy, left_, what_);
            refuse_nonfinite(policy, right_, what_);
            raise<nonfinite_error>(error_code::result_overflow,
                message("'", what_, "': its singular values overflow; scale it down first"));
        }
        result_type result;
        result.spectrum = std::move(core.sigma);
        const std::size_t q = chosen_rank(choice, result.spectrum);
        result.sigma.assign(result.spectrum.begin(), result.spectrum.begin() + static_cast<std::ptrdiff_t>(q));
        result.squared_norm = energy_beyond(result.spectrum, 0);
        result.squared_error = energy_beyond(result.spectrum, q);
        result.u = placed_matrix<element>(policy, m_, q, place);
        result.v = placed_matrix<element>(policy, n_, q, place);
        multiply_q<element>(policy, left_qr_, std::as_const(core.u).view().left_columns(q), result.u.view());
        multiply_q<element>(policy, right_qr_, std::as_const(core.v).view().left_columns(q), result.v.view());
        orient<element>(policy, result.u.view(), result.v.view());
        return result;
    }

private:
    std::string_view what_;
    std::size_t m_, n_;
    matrix<element, P::space> left_copy_{}, right_copy_{};
    matrix_view<const T, P::space> left_{}, right_{};
    qr_factors<element, P::space> left_qr_{}, right_qr_{};
    std::remove_cvref_t<decltype(small_product(std::declval<const P&>(), 1.0, left_qr_.r, right_qr_.r))> product_{};
};

/// factored_svd(), whose u and v go where it is said.
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] factored_svd_result<arithmetic_type<T>, P::space> factored_svd_in(
    const P& policy, const factor_pair<T, P::space>& p, const rank_choice& choice, factor_place place)
{
    return with_context(policy, [&](const P& ready) {
        const factored_core<T, P> core(ready, p, choice);
        return core.empty() ? core.nothing(ready, place)
                            : core.finish(ready, small_svd(ready, core.product()), choice, place);
    });
}

/// sink(i, result of pairs[i]) for each i, in any order and, on the CPU, from many threads; choice(i) is its rank.
template <storage_element T, class Choice, class Sink>
void for_each_factored_svd(const cpu& policy, std::span<const factor_pair<T>> pairs, factor_place place,
    const Choice& choice, const Sink& sink)
{
    progress_meter meter(policy, "svd", pairs.size(), progress_unit::layers);
    const cpu inside = sequential(policy);
    for_each_index(policy, pairs.size(), [&](std::size_t i, std::size_t) {
        const rank_choice wanted = choice(i);
        const factored_core<T, cpu> core(inside, pairs[i], wanted);
        sink(i,
            core.empty() ? core.nothing(inside, place)
                         : core.finish(inside, small_svd(inside, core.product()), wanted, place));
        if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
    });
}

/// On a device: batches of layers, whose cores are decomposed together by small_svds().
template <storage_element T, linear_algebra_policy P, class Choice, class Sink>
    requires(P::space == memory_space::device)
void for_each_factored_svd(const P& policy, std::span<const factor_pair<T, P::space>> pairs, factor_place place,
    const Choice& choice, const Sink& sink)
{
    constexpr std::size_t batch = 64; // layers whose orthonormal factors are held at a time
    for (std::size_t first = 0; first < pairs.size(); first += batch) {
        const std::size_t count = std::min(batch, pairs.size() - first);
        std::vector<factored_core<T, P>> cores;
        cores.reserve(count);
        std::vector<decltype(cores[0].product())> products;
        for (std::size_t i = 0; i < count; ++i) { cores.emplace_back(policy, pairs[first + i], choice(first + i)); }
        for (const auto& core : cores) { products.push_back(core.product()); }
        auto decomposed = small_svds(policy, products);
        for (std::size_t i = 0; i < count; ++i) {
            sink(first + i,
                cores[i].empty() ? cores[i].nothing(policy, place)
                                 : cores[i].finish(policy, std::move(decomposed[i]), choice(first + i), place));
        }
    }
}

} // namespace detail

template <storage_element T, linear_algebra_policy P>
factored_svd_result<arithmetic_type<T>, P::space> factored_svd(
    const P& policy, const factor_pair<T, P::space>& p, const rank_choice& choice)
{
    return detail::factored_svd_in<T>(policy, p, choice, detail::factor_place::kept);
}

template <storage_element T, linear_algebra_policy P>
factored_svd_result<arithmetic_type<T>, P::space> factored_svd(const P& policy, matrix_view<const T, P::space> left,
    std::type_identity_t<matrix_view<const T, P::space>> right, const rank_choice& choice)
{
    return factored_svd<T>(policy, factor_pair<T, P::space>{.left = left, .right = right}, choice);
}

/// Of a left factor that owns its elements, or a view of mutable ones.
template <linear_algebra_policy P, detail::other_matrix<P::space> X, class Y>
    requires std::is_same_v<detail::matrix_element_of<X, P::space>, detail::matrix_element_of<Y, P::space>>
[[nodiscard]] auto factored_svd(const P& policy, const X& left, const Y& right, const rank_choice& choice)
{
    using T = detail::matrix_element_of<X, P::space>;
    return factored_svd<T>(policy, matrix_view<const T, P::space>(left), right, choice);
}
template <linear_algebra_policy P, class X, class Y>
    requires(!std::is_same_v<detail::matrix_element_of<X, P::space>, detail::matrix_element_of<Y, P::space>>)
    || detail::no_matrix<X, P::space>
auto factored_svd(const P&, const X&, const Y&, const rank_choice&)
{
    detail::refuse_matrix<P, X>();
    detail::refuse_matrix<P, Y>();
    static_assert(std::is_same_v<detail::matrix_element_of<X, P::space>, detail::matrix_element_of<Y, P::space>>,
        "taskvec: the factors of a product are of one storage type: convert one of them");
}

template <storage_element T, linear_algebra_policy P>
std::vector<factored_svd_result<arithmetic_type<T>, P::space>> factored_svd(
    const P& policy, std::span<const factor_pair<T, P::space>> pairs, const rank_choice& choice)
{
    std::vector<factored_svd_result<arithmetic_type<T>, P::space>> results(pairs.size());
    with_context(policy, [&](const P& ready) {
        detail::for_each_factored_svd<T>(
            ready, pairs, detail::factor_place::kept, [&](std::size_t) { return choice; },
            [&](std::size_t i, auto&& result) { results[i] = std::move(result); });
    });
    return results;
}

namespace detail {
/// The sum of the ranks of pairs that can be stacked.
template <storage_element T, memory_space S>
[[nodiscard]] std::size_t stacked_rank(std::span<const factor_pair<T, S>> pairs, std::string_view what)
{
    if (pairs.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, message("'", what, "': no factor pairs to add"));
    }
    const std::size_t m = pairs[0].left.rows(), n = pairs[0].right.rows();
    std::size_t total = 0;
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        const auto& [left, right, weight, name] = pairs[i];
        if (left.rows() != m || right.rows() != n || left.cols() != right.cols()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", what, "': pair ", i, " is ", left.rows(), "×", left.cols(), " and ", right.rows(), "×",
                    right.cols(), "; expected ", m, "×r and ", n, "×r, as in pair 0"));
        }
        if (!std::isfinite(weight)) {
            raise<nonfinite_error>(
                error_code::scaling_not_finite, message("'", what, "': the weight of pair ", i, " is not finite"));
        }
        total += left.cols();
    }
    return total;
}
/// stack_factors() in memory of `memory`.
template <storage_element T>
[[nodiscard]] stacked_factors<arithmetic_type<T>> stack_factors_in(
    std::span<const factor_pair<T>> pairs, std::string_view what, std::pmr::memory_resource* memory)
{
    using E = arithmetic_type<T>;
    const std::size_t total = detail::stacked_rank<T>(pairs, what), m = pairs[0].left.rows(), n = pairs[0].right.rows();
    stacked_factors<E> sum{matrix<E>(m, total, matrix_order::column_major, memory),
        matrix<E>(n, total, matrix_order::column_major, memory)};
    std::size_t at = 0;
    for (const auto& pair : pairs) {
        const E weight = static_cast<E>(pair.weight);
        for (std::size_t k = 0; k < pair.left.cols(); ++k, ++at) {
            for (std::size_t i = 0; i < m; ++i) { sum.left(i, at) = weight * widen<E>(pair.left(i, k)); }
            for (std::size_t i = 0; i < n; ++i) { sum.right(i, at) = widen<E>(pair.right(i, k)); }
        }
    }
    return sum;
}
} // namespace detail

template <storage_element T>
stacked_factors<arithmetic_type<T>> stack_factors(std::span<const factor_pair<T>> pairs, std::string_view what)
{
    return detail::stack_factors_in<T>(pairs, what, std::pmr::get_default_resource());
}

/// The same in the memory space of the policy; on the CPU in memory of the policy's resource.
template <storage_element T>
[[nodiscard]] auto stack_factors(const cpu& policy, std::span<const factor_pair<T>> pairs, std::string_view what)
{
    return detail::stack_factors_in<T>(pairs, what, memory_of(policy));
}
template <storage_element T, linear_algebra_policy P>
    requires(P::space == memory_space::device)
[[nodiscard]] auto stack_factors(
    const P& policy, std::span<const factor_pair<T, P::space>> pairs, std::string_view what)
{
    using E = arithmetic_type<T>;
    const std::size_t total = detail::stacked_rank<T>(pairs, what), m = pairs[0].left.rows(), n = pairs[0].right.rows();
    stacked_factors<E, P::space> sum{result_matrix<E>(policy, m, total), result_matrix<E>(policy, n, total)};
    std::size_t at = 0;
    for (const auto& pair : pairs) {
        const std::size_t r = pair.left.cols();
        matrix<E, P::space> left_copy, right_copy;
        const std::vector<double> weights(r, pair.weight);
        scale_columns<E>(
            policy, in_arithmetic(policy, pair.left, left_copy), weights, sum.left.view().block(0, at, m, r));
        copy_matrix<E>(policy, in_arithmetic(policy, pair.right, right_copy), sum.right.view().block(0, at, n, r));
        at += r;
    }
    return sum;
}

template <storage_element T, linear_algebra_policy P>
factored_svd_result<arithmetic_type<T>, P::space> compress_sum(
    const P& policy, std::span<const factor_pair<T, P::space>> pairs, const rank_choice& choice, std::string_view what)
{
    return with_context(policy, [&](const P& ready) {
        const auto sum = stack_factors<T>(ready, pairs, what);
        return factored_svd(ready, sum.pair(what), choice);
    });
}

// On taskvec::gpu these need <taskvec/device/linalg.hpp>; without it a call says so.
template <detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto factored_svd(const P&, const X&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "factored_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <detail::gpu_without_header<detail::gpu_room::lowrank> P, class X, class Y>
auto factored_svd(const P&, const X&, const Y&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "factored_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <storage_element T, detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto factored_svd(const P&, const X&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "factored_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <storage_element T, detail::gpu_without_header<detail::gpu_room::lowrank> P, class X, class Y>
auto factored_svd(const P&, const X&, const Y&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "factored_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <storage_element T, detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto compress_sum(const P&, const X&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "compress_sum() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_FACTORED_SVD(extern, float)
TASKVEC_COMPILED_FACTORED_SVD(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_LINALG_FACTORED_SVD_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// On which side σ goes when triples become factors.
enum class sigma_side : std::uint8_t {
    both, ///< b = u·√σ, a = √σ·vᵀ: entries of like size on both sides, which 16-bit storage likes
    left ///< b = u·σ, a = vᵀ
};

template <>
struct enum_words<sigma_side> {
    static constexpr std::array words{
        enum_word<sigma_side>{sigma_side::both, "both"}, enum_word<sigma_side>{sigma_side::left, "left"}};
};

/// The update u·diag(σ)·vᵀ with scaling 1. u is out×q, v in×q.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> to_update(const svd_result<T>& s, sigma_side side = sigma_side::both)
{
    const std::size_t q = s.sigma.size();
    lora_update<T> update{
        matrix<T>(s.u.rows(), q, matrix_order::row_major), matrix<T>(q, s.v.rows(), matrix_order::row_major), 1};
    for (std::size_t k = 0; k < q; ++k) {
        const double left = side == sigma_side::both ? std::sqrt(s.sigma[k]) : s.sigma[k],
                     right = side == sigma_side::both ? left : 1;
        for (std::size_t i = 0; i < s.u.rows(); ++i) {
            update.b(i, k) = static_cast<T>(static_cast<double>(s.u(i, k)) * left);
        }
        for (std::size_t i = 0; i < s.v.rows(); ++i) {
            update.a(k, i) = static_cast<T>(static_cast<double>(s.v(i, k)) * right);
        }
    }
    return update;
}

/// The same in the memory space of the policy.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> to_update(const cpu&, const svd_result<T>& s, sigma_side side)
{
    return to_update(s, side);
}

/// The same update once more.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> copy_update(const cpu&, const lora_update<T>& update)
{
    return update;
}

/// On a device: u and v are scaled there, and turned into row-major factors by writing them to transposed views.
template <arithmetic_element T, linear_algebra_policy P>
    requires(P::space == memory_space::device)
[[nodiscard]] lora_update<T, P::space> to_update(const P& policy, const svd_result<T, P::space>& s, sigma_side side)
{
    const std::size_t q = s.sigma.size();
    std::vector<double> left(s.sigma), right(q, 1.0);
    if (side == sigma_side::both) {
        for (std::size_t k = 0; k < q; ++k) { left[k] = right[k] = std::sqrt(s.sigma[k]); }
    }
    lora_update<T, P::space> update{result_matrix<T>(policy, s.u.rows(), q, matrix_order::row_major),
        result_matrix<T>(policy, q, s.v.rows(), matrix_order::row_major), 1};
    auto scaled = scratch_matrix<T>(policy, s.u.rows(), q);
    scale_columns<T>(policy, s.u.view(), left, scaled.view());
    copy_matrix<T>(policy, scaled.view(), update.b.view());
    scaled = scratch_matrix<T>(policy, s.v.rows(), q);
    scale_columns<T>(policy, s.v.view(), right, scaled.view());
    copy_matrix<T>(policy, scaled.view(), update.a.view().transposed());
    return update;
}
template <arithmetic_element T, linear_algebra_policy P>
    requires(P::space == memory_space::device)
[[nodiscard]] lora_update<T, P::space> copy_update(const P& policy, const lora_update<T, P::space>& update)
{
    lora_update<T, P::space> copy{result_matrix<T>(policy, update.b.rows(), update.b.cols(), update.b.order()),
        result_matrix<T>(policy, update.a.rows(), update.a.cols(), update.a.order()), update.scaling};
    copy_matrix<T>(policy, update.b.view(), copy.b.view());
    copy_matrix<T>(policy, update.a.view(), copy.a.view());
    return copy;
}

/// Stacked factors as an update with scaling 1, exactly.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> to_update(const stacked_factors<T>& sum)
{
    lora_update<T> update{matrix<T>(sum.left.rows(), sum.left.cols(), matrix_order::row_major),
        matrix<T>(sum.right.cols(), sum.right.rows(), matrix_order::row_major), 1};
    for (std::size_t k = 0; k < sum.left.cols(); ++k) {
        for (std::size_t i = 0; i < sum.left.rows(); ++i) { update.b(i, k) = sum.left(i, k); }
        for (std::size_t i = 0; i < sum.right.rows(); ++i) { update.a(k, i) = sum.right(i, k); }
    }
    return update;
}

/// out = weight·ΔW, dense (out×in, either order). Cost: 2·out·in·r flops.
template <arithmetic_element T>
void densify(
    const cpu& policy, const lora_update<T>& update, std::type_identity_t<matrix_view<T>> out, double weight = 1)
{
    gemm<T>(policy, static_cast<T>(weight * update.scaling), update.b.view(), update.a.view(), T(0), out);
}

/// ‖ΔW‖²_F from the factors: Σ (bᵀb)∘(a·aᵀ) in f64, times scaling². Cost: (out + in)·r² flops.
template <arithmetic_element T>
[[nodiscard]] double squared_norm(const cpu& policy, const lora_update<T>& update)
{
    const std::size_t r = update.rank();
    if (r == 0 || update.out() == 0 || update.in() == 0) { return 0; }
    auto left = scratch_matrix<double>(policy, r, r), right = scratch_matrix<double>(policy, r, r);
    detail::gram<T>(update.b.view(), left, memory_of(policy));
    detail::gram<T>(update.a.view().transposed(), right, memory_of(policy));
    double sum = 0;
    for (std::size_t i = 0; i < r * r; ++i) { sum += left.data()[i] * right.data()[i]; }
    return (sum < 0 ? 0 : sum) * update.scaling * update.scaling; // NaN stays NaN
}

/// What an algorithm on adapters did to one layer.
struct layer_report {
    std::string name{}; ///< of the module
    std::size_t out = 0, in = 0; ///< shape of ΔW
    std::size_t rank_before = 0; ///< of the adapter, or of all stacked ones together; 0 where the update was dense
    std::size_t rank = 0; ///< what is stored now
    bool whole = false; ///< nothing was cut off: the update is exact
    double squared_norm = 0; ///< ‖ΔW‖²_F before
    double squared_error = 0; ///< ‖ΔW − what is stored‖²_F, before rounding to a storage type

    /// ‖ΔW − what is stored‖_F / ‖ΔW‖_F; 0 for a zero update.
    [[nodiscard]] double relative_error() const noexcept
    {
        return squared_norm > 0 ? std::sqrt(squared_error / squared_norm) : 0;
    }
    /// The share of ‖ΔW‖²_F that is stored, 1 − squared_error / squared_norm; 1 for a zero update.
    [[nodiscard]] double energy() const noexcept { return squared_norm > 0 ? 1 - squared_error / squared_norm : 1; }
    /// Numbers stored: rank·(out + in + 1) with the singular values, rank·(out + in) for a layer that was kept whole.
    [[nodiscard]] std::uint64_t parameters() const noexcept
    {
        return std::uint64_t{rank} * (out + in + (whole ? 0 : 1));
    }
};

/// A new adapter, and what was done for it layer by layer.
template <arithmetic_element T, memory_space S>
struct adapter_result {
    lora_adapter<T, S> adapter; ///< by module
    std::vector<layer_report> layers; ///< in name order

    /// Relative error over all layers together.
    [[nodiscard]] double relative_error() const noexcept
    {
        double norm = 0, error = 0;
        for (const auto& layer : layers) {
            norm += layer.squared_norm;
            error += layer.squared_error;
        }
        return norm > 0 ? std::sqrt(error / norm) : 0;
    }
    /// Numbers stored, over all layers.
    [[nodiscard]] std::uint64_t parameters() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& layer : layers) { total += layer.parameters(); }
        return total;
    }
};

/// A way to decompose a dense matrix: randomized (decompose_randomized, in linalg/randomized_svd.hpp) or exact
/// (decompose_exactly, in linalg/truncated_svd.hpp, which alone pays for compiling a large SVD). u and v of these two
/// lie in memory of the policy's resource: the algorithm that asks makes factors of them.
template <class D, class T>
concept decomposition = arithmetic_element<T>
    && requires(const D& decompose, const cpu& policy, matrix_view<const T> a, const rank_choice& choice) {
           { decompose(policy, a, choice, std::string_view{}) } -> std::convertible_to<svd_result<T>>;
       };

/// weight ← round(weight + factor·ΔW) in place: the adapter folded into a base weight. `weight` is out×in in any
/// storage type and either order (an embedding or a transposed layer passes its transposed view); arithmetic in T, one
/// rounding. Folding out again with −factor gives the former weight up to that rounding; folded_update restores it
/// exactly. Throws shape_mismatch. The bits do not depend on threads. Cost: 2·out·in·r flops, one read and write of the
/// weight.
///
///     fold_update(cpu{}, adapter.at("layers.0.q_proj"), weight);
template <arithmetic_element T, storage_element S>
void fold_update(const cpu& policy, const lora_update<T>& update, matrix_view<S> weight, double factor = 1,
    std::string_view name = "the update")
{
    check_update(update, name);
    if (weight.rows() != update.out() || weight.cols() != update.in()) {
        raise<shape_mismatch>(error_code::adapter_shape,
            message("'", name, "': the update is ", update.out(), "×", update.in(), " and the weight ", weight.rows(),
                "×", weight.cols(), "; this adapter belongs to another base"));
    }
    constexpr std::size_t piece = 64;
    const cpu inside = sequential(policy);
    for_each_index(policy, (weight.rows() + piece - 1) / piece, [&](std::size_t index, std::size_t) {
        const std::size_t first = index * piece, count = std::min(piece, weight.rows() - first);
        matrix<T> delta(count, weight.cols(), weight.order(), memory_of(policy));
        gemm<T>(inside, static_cast<T>(factor * update.scaling), update.b.view().block(first, 0, count, update.rank()),
            update.a.view(), T(0), delta.view());
        const bool by_rows = weight.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? count : weight.cols(), length = by_rows ? weight.cols() : count;
        for (std::size_t k = 0; k < runs; ++k) {
            S* const at = by_rows ? &weight(first + k, 0) : &weight(first, k);
            const T* const add = delta.data() + k * length;
            for (std::size_t i = 0; i < length; ++i) { at[i] = narrow<S>(static_cast<T>(widen<T>(at[i]) + add[i])); }
        }
    });
}

/// An update folded into a weight that can be taken out again bit for bit: it keeps the words that it changed (a copy
/// of the weight, in memory of the policy's resource). Move-only; does nothing on destruction.
///
///     folded_update<float> folded(cpu{}, adapter.at("layers.0.q_proj"), weight);
///     … serve …
///     folded.undo();
template <storage_element S>
class folded_update {
public:
    /// Saves `weight` (out×in, of any storage type) and folds factor·ΔW into it, as fold_update(), whose errors these
    /// are.
    template <arithmetic_element T>
    folded_update(const cpu& policy, const lora_update<T>& update, matrix_view<S> weight, double factor = 1,
        std::string_view name = "the update")
        : weight_(weight)
        , saved_(weight.rows(), weight.cols(), weight.order(), memory_of(policy))
    {
        copy(weight_, saved_.view());
        fold_update(policy, update, weight, factor, name);
    }
    /// A folded update moves: undo() is then the new object's.
    folded_update(folded_update&&) noexcept = default;
    /// The update that was held before stays folded.
    folded_update& operator=(folded_update&&) noexcept = default;

    /// Writes the former words back. A second call changes nothing.
    void undo()
    {
        if (!saved_.empty()) { copy(saved_.view(), weight_); }
        saved_ = {};
    }

private:
    static void copy(matrix_view<const S> from, matrix_view<S> to)
    {
        const bool by_rows = from.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? from.rows() : from.cols(), length = by_rows ? from.cols() : from.rows();
        for (std::size_t k = 0; k < runs; ++k) {
            std::copy_n(from.data() + k * from.stride(), length, to.data() + k * to.stride());
        }
    }

    matrix_view<S> weight_;
    matrix<S> saved_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_ADAPTER_HPP

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

// ---- taskvec/formats/checkpoint.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_CHECKPOINT_HPP)
#define TASKVEC_SINGLE_FORMATS_CHECKPOINT_HPP
// Checkpoints: one safetensors file, or a directory of shards with its index, read and written as one model.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/formats/pytorch.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_PYTORCH_HPP)
#define TASKVEC_SINGLE_FORMATS_PYTORCH_HPP
// PyTorch files (pytorch_model.bin, .pt, .pth), read without Python: a zip archive with a pickle that builds tensors,
// and nothing else. No code runs. SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The largest pickle that is read; tensors' bytes lie beside it.
inline constexpr std::size_t pickle_size_limit = 100'000'000;
/// The most values that a pickle may build: room for 200,000 tensors.
inline constexpr std::size_t pickle_value_limit = 5'000'000;
/// The most bytes, laid out, of a file's tensors that have more elements than their storage (expanded views).
inline constexpr std::uint64_t expanded_bytes_limit = std::uint64_t{1} << 30;

/// What a PyTorch file holds, in the terms of a safetensors header: tensors are ranges of the file's bytes (ranges may
/// be equal: tied weights).
struct pytorch_contents {
    safetensors_header header; ///< names, dtypes, shapes and places of the tensors
    std::vector<std::string> notes{}; ///< what whoever opens it should know
    /// Strides, in elements, of tensors that do not lie row-major in their bytes (transposed, parts of others, or
    /// expanded, whose elements share bytes): lay_out_rows() gives them rows. Every element lies in the file, from the
    /// entry's offset on; the entry's size is that of the rows.
    std::map<std::string, extents> strides{};
};

namespace detail {

/// A zip archive's directory, each entry checked: where its bytes lie, stored as they are.
class zip_directory {
public:
    struct entry {
        std::string_view name;
        std::uint64_t offset = 0, size = 0;
        bool stored = true; ///< neither compressed nor encrypted
    };

    zip_directory(std::string_view bytes, std::string_view file)
        : bytes_(bytes)
        , file_(file)
    {
        read();
    }
    [[nodiscard]] const std::vector<entry>& entries() const noexcept { return entries_; }
    /// The entry of that name, or nullptr.
    [[nodiscard]] const entry* find(std::string_view name) const
    {
        const auto place = std::lower_bound(entries_.begin(), entries_.end(), name,
            [](const entry& one, std::string_view wanted) { return one.name < wanted; });
        return place != entries_.end() && place->name == name ? &*place : nullptr;
    }
    [[nodiscard]] std::string_view content(const entry& one) const
    {
        return bytes_.substr(static_cast<std::size_t>(one.offset), static_cast<std::size_t>(one.size));
    }

private:
    [[noreturn]] void fail(const std::string& what, std::uint64_t at) const
    {
        raise<format_error>(error_code::archive_damaged,
            message("is a damaged PyTorch file (a zip archive): ", what, ": ", fetch_again), std::string(file_), at);
    }
    /// A little-endian number; the place must lie inside the file.
    template <class T>
    [[nodiscard]] T number(std::uint64_t at) const
    {
        if (at > bytes_.size() || bytes_.size() - at < sizeof(T)) { fail("a record runs past its end", at); }
        T value;
        std::memcpy(&value, bytes_.data() + at, sizeof value);
        return value;
    }
    [[nodiscard]] std::string_view text(std::uint64_t at, std::uint64_t size) const
    {
        if (at > bytes_.size() || bytes_.size() - at < size) { fail("a record runs past its end", at); }
        return bytes_.substr(static_cast<std::size_t>(at), static_cast<std::size_t>(size));
    }

    void read()
    {
        constexpr std::uint32_t end_mark = 0x06054b50, end64_mark = 0x06064b50, locator_mark = 0x07064b50,
                                entry_mark = 0x02014b50;
        constexpr std::uint64_t end_size = 22, locator_size = 20;
        std::uint64_t end = bytes_.size();
        for (std::uint64_t comment = 0; comment <= 65535 && comment + end_size <= bytes_.size(); ++comment) {
            const std::uint64_t at = bytes_.size() - end_size - comment;
            if (number<std::uint32_t>(at) == end_mark && number<std::uint16_t>(at + 20) == comment) {
                end = at;
                break;
            }
        }
        if (end == bytes_.size()) { fail("its directory, at its end, is missing", end); }
        std::uint64_t count = number<std::uint16_t>(end + 10), size = number<std::uint32_t>(end + 12),
                      begin = number<std::uint32_t>(end + 16), limit = end;
        if (end >= locator_size && number<std::uint32_t>(end - locator_size) == locator_mark) {
            const auto at = number<std::uint64_t>(end - locator_size + 8);
            if (number<std::uint32_t>(at) != end64_mark) { fail("its 64-bit directory is not where it should be", at); }
            count = number<std::uint64_t>(at + 32);
            size = number<std::uint64_t>(at + 40);
            begin = number<std::uint64_t>(at + 48);
            limit = at;
        }
        if (begin > limit || size > limit - begin) { fail("its directory runs past its end", begin); }
        std::uint64_t at = begin;
        for (std::uint64_t i = 0; i < count; ++i) {
            if (begin + size - at < 46 || number<std::uint32_t>(at) != entry_mark) {
                fail(message("its directory promises ", count, " entries and has ", i), at);
            }
            at = read_entry(at, begin);
            if (at > begin + size) { fail("its directory runs past its end", at); }
        }
        std::sort(entries_.begin(), entries_.end(), [](const entry& a, const entry& b) { return a.name < b.name; });
        for (std::size_t i = 1; i < entries_.size(); ++i) {
            if (entries_[i].name == entries_[i - 1].name) {
                fail(message("'", entries_[i].name, "' occurs twice"), entries_[i].offset);
            }
        }
        auto places = entries_;
        std::sort(places.begin(), places.end(), [](const entry& a, const entry& b) { return a.offset < b.offset; });
        for (std::size_t i = 1; i < places.size(); ++i) {
            if (places[i - 1].size > places[i].offset - places[i - 1].offset) {
                fail(message("'", places[i - 1].name, "' and '", places[i].name, "' share bytes"), places[i].offset);
            }
        }
    }
    /// Reads the entry of the directory at `at`; returns where the next one begins. Entries lie before `begin`.
    [[nodiscard]] std::uint64_t read_entry(std::uint64_t at, std::uint64_t begin)
    {
        constexpr std::uint32_t local_mark = 0x04034b50, wide = 0xffffffff;
        const auto flags = number<std::uint16_t>(at + 8), method = number<std::uint16_t>(at + 10);
        const std::uint64_t name_size = number<std::uint16_t>(at + 28), extra_size = number<std::uint16_t>(at + 30),
                            comment_size = number<std::uint16_t>(at + 32);
        std::uint64_t packed = number<std::uint32_t>(at + 20), size = number<std::uint32_t>(at + 24),
                      local = number<std::uint32_t>(at + 42);
        entry one;
        one.name = text(at + 46, name_size);
        const std::uint64_t extra_end = at + 46 + name_size + extra_size;
        (void)text(at + 46 + name_size, extra_size);
        for (std::uint64_t field = at + 46 + name_size; extra_end - field >= 4;) {
            const auto id = number<std::uint16_t>(field), length = number<std::uint16_t>(field + 2);
            if (length > extra_end - field - 4) { break; }
            std::uint64_t place = field + 4;
            const std::uint64_t field_end = place + length;
            for (auto* value : {&size, &packed, &local}) {
                if (id == 1 && *value == wide && field_end - place >= 8) {
                    *value = number<std::uint64_t>(place);
                    place += 8;
                }
            }
            field = field_end;
        }
        if (local > begin || begin - local < 30 || number<std::uint32_t>(local) != local_mark) {
            fail(message("'", one.name, "' is not where the directory says"), local);
        }
        const std::uint64_t here = number<std::uint16_t>(local + 26);
        one.offset = local + 30 + here + number<std::uint16_t>(local + 28);
        if (here != name_size || text(local + 30, here) != one.name) {
            fail(message("'", one.name, "' has another name where it lies"), local);
        }
        one.stored = method == 0 && (flags & 1u) == 0;
        one.size = one.stored ? size : packed;
        if (one.stored && packed != size) { fail(message("'", one.name, "' has two sizes"), at); }
        if (one.offset > begin || one.size > begin - one.offset) {
            fail(message("'", one.name, "' runs past the end"), one.offset);
        }
        entries_.push_back(one);
        return extra_end + comment_size;
    }

    std::string_view bytes_, file_;
    std::vector<entry> entries_;
};

/// The machine of a pickle, with the instructions that build numbers, strings, lists, tuples, dictionaries and tensors.
/// Whatever else is named, called or built stays a name (`opaque`): nothing of it is known but what it was given.
/// Values lie in one list and refer to each other by place: nothing recurses, whatever is nested.
class pickle_reader {
public:
    using index = std::uint32_t;
    enum class kind : std::uint8_t {
        none,
        number,
        text,
        list,
        tuple,
        dictionary,
        global,
        storage,
        tensor,
        other,
        opaque
    };
    struct value {
        kind what = kind::none;
        bool truth = false; ///< of numbers: True or False
        taskvec::dtype type = taskvec::dtype::f32; ///< of storages and tensors
        std::int64_t number = 0; ///< a number; of storages how many elements, of tensors the first one's place
        std::string_view text{}; ///< a text; a global's name; of storages the entry's key; of the opaque what named it
        /// Of dictionaries keys and values in turn; of tensors the storage, sizes, strides, and what else was said of
        /// it.
        std::vector<index> items{};
    };

    pickle_reader(std::string_view code, std::string_view file)
        : code_(code)
        , file_(file)
    { }
    /// Runs it; the value that it leaves.
    [[nodiscard]] const value& run()
    {
        for (;;) {
            const auto operation = static_cast<unsigned char>(take(1)[0]);
            if (operation == '.') {
                if (!marks_.empty() || stack_.size() != 1) { damaged("leaves no single value"); }
                find_given();
                return values_[stack_.back()];
            }
            step(operation);
        }
    }
    [[nodiscard]] const value& at(index place) const { return values_[place]; }
    /// Whether something opaque was given this value, itself or in others: what it is in the end is not known.
    [[nodiscard]] bool was_given(const value& one) const
    {
        return !reached_.empty() && reached_[static_cast<std::size_t>(&one - values_.data())];
    }
    /// The first name that is none of tensors, in quotes; empty where all are.
    [[nodiscard]] const std::string& first_opaque() const { return first_opaque_; }
    [[noreturn]] void refuse_opaque(std::string_view what) const
    {
        refuse(message(what.starts_with('\'') ? "names " : "builds ", what));
    }

    [[noreturn]] void refuse(const std::string& what) const
    {
        raise<format_error>(error_code::pickle_unsupported,
            message("is a PyTorch file whose pickle ", what,
                ", and builds more than tensors; nothing of it was run: convert it once by transformers' "
                "save_pretrained(), or save the state_dict alone where it was made; torch.load(FILE, "
                "weights_only=True) may refuse it too, and weights_only=False runs what it names: for files that you "
                "trust"),
            std::string(file_), place_);
    }
    [[noreturn]] void damaged(const std::string& what) const
    {
        raise<format_error>(error_code::archive_damaged,
            message("is a damaged PyTorch file: its pickle ", what, ": ", fetch_again), std::string(file_), place_);
    }

private:
    [[nodiscard]] std::string_view take(std::uint64_t size)
    {
        if (size > code_.size() - place_) { damaged("is cut short"); }
        const auto part = code_.substr(place_, static_cast<std::size_t>(size));
        place_ += static_cast<std::size_t>(size);
        return part;
    }
    template <class T>
    [[nodiscard]] T take_number()
    {
        T number;
        std::memcpy(&number, take(sizeof(T)).data(), sizeof(T));
        return number;
    }
    [[nodiscard]] std::string_view take_line()
    {
        const auto end = code_.find('\n', place_);
        if (end == code_.npos) { damaged("is cut short"); }
        const auto line = code_.substr(place_, end - place_);
        place_ = end + 1;
        return line;
    }
    void push(value one)
    {
        if (values_.size() >= pickle_value_limit) {
            refuse(message("builds more than ", pickle_value_limit, " values"));
        }
        values_.push_back(std::move(one));
        stack_.push_back(static_cast<index>(values_.size() - 1));
    }
    void push_number(std::int64_t number, bool truth = false) { push({kind::number, truth, {}, number, {}, {}}); }
    [[nodiscard]] index pop()
    {
        if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) { damaged("takes more values than it has"); }
        const index top = stack_.back();
        stack_.pop_back();
        return top;
    }
    [[nodiscard]] std::vector<index> pop_to_mark()
    {
        if (marks_.empty()) { damaged("has no mark where it takes one"); }
        const auto first = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
        std::vector<index> items(first, stack_.end());
        stack_.erase(first, stack_.end());
        marks_.pop_back();
        return items;
    }
    [[nodiscard]] value& top()
    {
        if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) { damaged("takes more values than it has"); }
        return values_[stack_.back()];
    }
    void put(std::uint64_t slot)
    {
        (void)top();
        memo_[slot] = stack_.back();
    }
    void get(std::uint64_t slot)
    {
        const auto place = memo_.find(slot);
        if (place == memo_.end()) { damaged("asks for a value that it never kept"); }
        stack_.push_back(place->second);
        if (stack_.size() > pickle_value_limit) { refuse("holds too many values at once"); }
    }
    void push_tuple(std::size_t size)
    {
        value tuple{kind::tuple, false, {}, 0, {}, std::vector<index>(size)};
        while (size > 0) { tuple.items[--size] = pop(); }
        push(std::move(tuple));
    }
    void push_opaque(std::string_view name) { push({kind::opaque, false, {}, 0, name, {}}); }
    /// Marks what opaque values were given, and all that this holds.
    void find_given()
    {
        if (given_.empty()) { return; }
        reached_.assign(values_.size(), false);
        while (!given_.empty()) {
            const index one = given_.back();
            given_.pop_back();
            if (reached_[one]) { continue; }
            reached_[one] = true;
            given_.insert(given_.end(), values_[one].items.begin(), values_[one].items.end());
        }
    }
    /// NEWOBJ and NEWOBJ_EX: objects of a class, which only opaque ones are.
    void make_object(std::size_t arguments, unsigned operation)
    {
        for (std::size_t i = 0; i < arguments; ++i) { given_.push_back(pop()); }
        const auto& type = values_[pop()];
        if (type.what != kind::opaque) { refuse(message("has the instruction ", operation)); }
        push_opaque(type.text);
    }
    void append(const std::vector<index>& items, kind to)
    {
        value& collection = top();
        if (collection.what == kind::opaque) {
            given_.insert(given_.end(), items.begin(), items.end());
            return;
        }
        if (collection.what != to || (to == kind::dictionary && items.size() % 2 != 0)) {
            damaged("adds to something that is no collection");
        }
        collection.items.insert(collection.items.end(), items.begin(), items.end());
    }

    void step(unsigned operation)
    {
        switch (operation) {
        case 0x80: // PROTO
            if (const auto version = take_number<std::uint8_t>(); version < 2 || version > 5) {
                refuse(message("is of protocol ", unsigned{version}));
            }
            break;
        case 0x95: (void)take(8); break; // FRAME
        case '(': marks_.push_back(stack_.size()); break;
        case '0': (void)pop(); break;
        case '}': push({kind::dictionary, false, {}, 0, {}, {}}); break;
        case ']': push({kind::list, false, {}, 0, {}, {}}); break;
        case ')': push({kind::tuple, false, {}, 0, {}, {}}); break;
        case 'q': put(take_number<std::uint8_t>()); break;
        case 'r': put(take_number<std::uint32_t>()); break;
        case 0x94: put(memo_.size()); break; // MEMOIZE
        case 'h': get(take_number<std::uint8_t>()); break;
        case 'j': get(take_number<std::uint32_t>()); break;
        case 'X': push_text(take_number<std::uint32_t>()); break;
        case 0x8c: push_text(take_number<std::uint8_t>()); break; // SHORT_BINUNICODE
        case 0x8d: push_text(take_number<std::uint64_t>()); break; // BINUNICODE8
        case 'T': push_text(take_number<std::uint32_t>()); break; // BINSTRING
        case 'U': push_text(take_number<std::uint8_t>()); break; // SHORT_BINSTRING
        case 'J': push_number(take_number<std::int32_t>()); break;
        case 'K': push_number(take_number<std::uint8_t>()); break;
        case 'M': push_number(take_number<std::uint16_t>()); break;
        case 0x8a: push_long(take_number<std::uint8_t>()); break; // LONG1
        case 'G': // BINFLOAT
            (void)take(8);
            push({kind::other, false, {}, 0, {}, {}});
            break;
        case 'C': push_bytes(take_number<std::uint8_t>()); break; // SHORT_BINBYTES
        case 'B': push_bytes(take_number<std::uint32_t>()); break; // BINBYTES
        case 0x8e: // BINBYTES8
        case 0x96: push_bytes(take_number<std::uint64_t>()); break; // BYTEARRAY8
        case 0x81: make_object(1, operation); break;
        case 0x92: make_object(2, operation); break;
        case 0x8f: push_opaque("a set"); break;
        case 0x90: // ADDITEMS
            append(pop_to_mark(), kind::opaque);
            break;
        case 0x91: { // FROZENSET
            const auto items = pop_to_mark();
            given_.insert(given_.end(), items.begin(), items.end());
            push_opaque("a set");
            break;
        }
        case 'N': push({}); break;
        case 0x88: push_number(1, true); break;
        case 0x89: push_number(0, true); break;
        case 't': push({kind::tuple, false, {}, 0, {}, pop_to_mark()}); break;
        case 0x85: push_tuple(1); break;
        case 0x86: push_tuple(2); break;
        case 0x87: push_tuple(3); break;
        case 'a': {
            const index item = pop();
            append({item}, kind::list);
            break;
        }
        case 'e': append(pop_to_mark(), kind::list); break;
        case 's': {
            const index item = pop(), key = pop();
            append({key, item}, kind::dictionary);
            break;
        }
        case 'u': append(pop_to_mark(), kind::dictionary); break;
        case 'c': {
            const auto module = take_line();
            const auto name = take_line();
            push_global(module, name);
            break;
        }
        case 0x93: { // STACK_GLOBAL
            const auto& name = values_[pop()];
            const auto& module = values_[pop()];
            if (name.what != kind::text || module.what != kind::text) { damaged("names something by no text"); }
            push_global(module.text, name.text);
            break;
        }
        case 'Q': push_storage(); break;
        case 'R': call(); break;
        case 'b': { // BUILD: attributes of a dictionary (state_dict's _metadata) say nothing about tensors
            const index given = pop();
            const auto& state = values_[given];
            if (top().what == kind::opaque) {
                given_.push_back(given);
                break;
            }
            if (top().what != kind::dictionary || state.what != kind::dictionary) {
                refuse("sets the state of an object");
            }
            break;
        }
        default:
            refuse(operation >= 0x20 && operation < 0x7f
                    ? message("has the instruction '", std::string(1, static_cast<char>(operation)), "'")
                    : message("has the instruction ", operation));
        }
    }
    void push_text(std::uint64_t size)
    {
        const auto text = take(size);
        push({kind::text, false, {}, 0, text, {}});
    }
    void push_bytes(std::uint64_t size)
    {
        (void)take(size);
        push({kind::other, false, {}, 0, {}, {}});
    }
    void push_long(std::uint64_t size)
    {
        const auto bytes = take(size);
        if (size > 8) { // of a generator of random numbers
            push_opaque("a number above 2^63");
            return;
        }
        std::uint64_t number = 0;
        for (std::size_t i = 0; i < bytes.size(); ++i) {
            number |= static_cast<std::uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
        }
        if (!bytes.empty() && bytes.size() < 8 && (static_cast<unsigned char>(bytes.back()) & 0x80u)) {
            number |= ~std::uint64_t{0} << (8 * bytes.size());
        }
        push_number(static_cast<std::int64_t>(number));
    }

    struct named_type {
        std::string_view module, name;
        taskvec::dtype type;
    };
    [[nodiscard]] static const named_type* type_of(std::string_view module, std::string_view name)
    {
        using enum taskvec::dtype;
        static constexpr named_type types[] = {{"torch", "DoubleStorage", f64}, {"torch", "FloatStorage", f32},
            {"torch", "HalfStorage", f16}, {"torch", "BFloat16Storage", bf16}, {"torch", "LongStorage", i64},
            {"torch", "IntStorage", i32}, {"torch", "ShortStorage", i16}, {"torch", "CharStorage", i8},
            {"torch", "ByteStorage", u8}, {"torch", "BoolStorage", boolean}, {"torch", "ComplexFloatStorage", c64},
            {"torch.storage", "UntypedStorage", u8}, {"torch", "float64", f64}, {"torch", "float32", f32},
            {"torch", "float16", f16}, {"torch", "bfloat16", bf16}, {"torch", "int64", i64}, {"torch", "int32", i32},
            {"torch", "int16", i16}, {"torch", "int8", i8}, {"torch", "uint64", u64}, {"torch", "uint32", u32},
            {"torch", "uint16", u16}, {"torch", "uint8", u8}, {"torch", "bool", boolean}, {"torch", "complex64", c64},
            {"torch", "float8_e4m3fn", f8_e4m3}, {"torch", "float8_e5m2", f8_e5m2},
            {"torch", "float8_e8m0fnu", f8_e8m0}, {"torch", "float8_e4m3fnuz", f8_e4m3fnuz},
            {"torch", "float8_e5m2fnuz", f8_e5m2fnuz}};
        for (const auto& one : types) {
            if (one.module == module && one.name == name) { return &one; }
        }
        return nullptr;
    }
    /// Whether a name is one of those by which pickles run code or reach the system: no data has them.
    [[nodiscard]] static bool runs_commands(std::string_view module, std::string_view name)
    {
        if (module == "builtins" || module == "__builtin__") {
            for (const std::string_view one : {"eval", "exec", "execfile", "compile", "__import__", "open", "getattr",
                     "setattr", "delattr", "globals", "locals", "vars", "input", "breakpoint", "apply", "file"}) {
                if (name == one) { return true; }
            }
            return false;
        }
        const auto package = module.substr(0, module.find('.'));
        for (const std::string_view one : {"os", "posix", "nt", "subprocess", "commands", "sys", "pty", "platform",
                 "shutil", "socket", "ctypes", "_ctypes", "importlib", "imp", "runpy", "pickle", "_pickle", "cPickle",
                 "marshal", "code", "codeop", "pdb", "bdb", "cProfile", "profile", "timeit", "trace", "webbrowser",
                 "urllib", "http", "ftplib", "smtplib", "requests", "multiprocessing", "asyncio", "signal", "tempfile",
                 "pip", "venv", "ensurepip", "pydoc", "distutils", "setuptools"}) {
            if (package == one) { return true; }
        }
        return module == "torch.hub" || (module == "torch" && name == "load") || name == "runstring";
    }
    /// What a global is to call(): of a few names that are known.
    enum callable : std::int64_t { data_type, ordered_dictionary, tensor_v2, tensor_v3, parameter, torch_size };

    void push_global(std::string_view module, std::string_view name)
    {
        value global{kind::global, false, {}, data_type, name, {}};
        if (const auto* const type = type_of(module, name)) { global.type = type->type; }
        else if (module == "collections" && name == "OrderedDict") {
            global.number = ordered_dictionary;
        }
        else if (module == "torch._utils" && (name == "_rebuild_tensor_v2" || name == "_rebuild_tensor")) {
            global.number = tensor_v2;
        }
        else if (module == "torch._utils" && name == "_rebuild_tensor_v3") {
            global.number = tensor_v3;
        }
        else if (module == "torch._utils" && name == "_rebuild_parameter") {
            global.number = parameter;
        }
        else if (module == "torch" && name == "Size") {
            global.number = torch_size;
        }
        else {
            const auto words = message("'", first_words(module, 80), ".", first_words(name, 80), "'");
            if (runs_commands(module, name)) {
                raise<format_error>(error_code::pickle_unsupported,
                    message("is a PyTorch file whose pickle names ", words,
                        ", which no model needs and which would run as the file is loaded; nothing of it was run: do "
                        "not load this file, fetch the model from where you trust it"),
                    std::string(file_), place_);
            }
            if (first_opaque_.empty()) { first_opaque_ = words; }
            push_opaque(*names_.insert(words).first);
            return;
        }
        push(std::move(global));
    }
    void push_storage()
    {
        const auto& id = values_[pop()];
        if (id.what != kind::tuple || id.items.size() != 5) { damaged("has a storage that is none"); }
        const auto& word = values_[id.items[0]];
        const auto& type = values_[id.items[1]];
        const auto& key = values_[id.items[2]];
        const auto& count = values_[id.items[4]];
        if (type.what == kind::opaque) {
            push_opaque(type.text);
            return;
        }
        if (word.what != kind::text || word.text != "storage" || type.what != kind::global || type.number != data_type
            || key.what != kind::text || count.what != kind::number || count.truth || count.number < 0) {
            damaged("has a storage that is none");
        }
        push({kind::storage, false, type.type, count.number, key.text, {}});
    }
    void call()
    {
        const index given = pop(), callee = pop();
        if (values_[callee].what == kind::opaque) {
            given_.push_back(given);
            push_opaque(values_[callee].text);
            return;
        }
        const auto arguments = values_[given].items;
        const value function = values_[callee];
        if (function.what != kind::global || function.number == data_type || values_[given].what != kind::tuple) {
            refuse("calls what is no function of tensors");
        }
        switch (function.number) {
        case ordered_dictionary:
            if (!arguments.empty()) { refuse("fills an OrderedDict by a call"); }
            push({kind::dictionary, false, {}, 0, {}, {}});
            break;
        case torch_size:
            if (arguments.size() != 1 || values_[arguments[0]].what != kind::tuple) {
                damaged("has a size that is none");
            }
            stack_.push_back(arguments[0]);
            break;
        case parameter:
            if (!arguments.empty() && values_[arguments[0]].what == kind::opaque) {
                stack_.push_back(arguments[0]);
                break;
            }
            if (arguments.empty() || values_[arguments[0]].what != kind::tensor) {
                damaged("has a parameter that is no tensor");
            }
            stack_.push_back(arguments[0]);
            break;
        default: push_tensor(arguments, function.number == tensor_v3);
        }
    }
    void push_tensor(const std::vector<index>& arguments, bool typed)
    {
        if (arguments.size() < (typed ? 7u : 4u)) { damaged("has a tensor that is none"); }
        const auto& storage = values_[arguments[0]];
        const auto& offset = values_[arguments[1]];
        const auto& shape = values_[arguments[2]];
        const auto& strides = values_[arguments[3]];
        if (storage.what == kind::opaque || (typed && values_[arguments[6]].what == kind::opaque)) {
            push_opaque(storage.what == kind::opaque ? storage.text : values_[arguments[6]].text);
            return;
        }
        const auto numbers = [&](const value& tuple) {
            return tuple.what == kind::tuple && std::all_of(tuple.items.begin(), tuple.items.end(), [&](index item) {
                return values_[item].what == kind::number && !values_[item].truth && values_[item].number >= 0;
            });
        };
        if (storage.what != kind::storage || offset.what != kind::number || offset.truth || offset.number < 0
            || !numbers(shape) || !numbers(strides) || shape.items.size() != strides.items.size()) {
            damaged("has a tensor that is none");
        }
        value tensor{kind::tensor, false, storage.type, offset.number, {}, {arguments[0], arguments[2], arguments[3]}};
        const std::size_t described = typed ? 7 : 6; // bits that torch keeps beside the bytes
        if (arguments.size() > described) { tensor.items.push_back(arguments[described]); }
        if (typed) {
            const auto& type = values_[arguments[6]];
            if (type.what != kind::global || type.number != data_type) { damaged("has a tensor of no type"); }
            tensor.type = type.type;
        }
        push(std::move(tensor));
    }

    std::string_view code_, file_;
    std::size_t place_ = 0;
    std::vector<value> values_;
    std::vector<index> stack_;
    std::vector<std::size_t> marks_;
    std::map<std::uint64_t, index> memo_;
    std::set<std::string> names_; ///< of opaque values
    std::string first_opaque_;
    std::vector<index> given_; ///< what opaque values were given
    std::vector<bool> reached_; ///< of values_, in the end
};

/// Tensors of a PyTorch file by name, each checked against the archive.
class pytorch_tensors {
public:
    pytorch_tensors(std::string_view bytes, std::string_view file)
        : file_(file)
        , archive_(bytes, file)
    {
        const zip_directory::entry* code = nullptr;
        for (const auto& entry : archive_.entries()) {
            const auto slash = entry.name.find('/');
            if (slash == entry.name.npos || entry.name.substr(slash) != "/data.pkl") { continue; }
            if (code) { fail("holds two pickles"); }
            code = &entry;
            folder_ = std::string(entry.name.substr(0, slash + 1));
        }
        if (!code || archive_.find(folder_ + "constants.pkl")) {
            const auto kind = kind_of_zip(bytes);
            raise<format_error>(error_code::not_safetensors, kind.sentence(), std::string(file));
        }
        if (!code->stored || code->size > pickle_size_limit) {
            fail(code->stored ? "has a pickle of more than 100 MB" : "is compressed, which PyTorch never does");
        }
        if (const auto* const order = archive_.find(folder_ + "byteorder");
            order && archive_.content(*order) != "little") {
            fail("was written by a big-endian machine");
        }
        pickle_reader pickle(archive_.content(*code), file);
        const auto& result = pickle.run();
        read(pickle, result);
    }
    [[nodiscard]] pytorch_contents take() { return std::move(contents_); }

private:
    [[noreturn]] void fail(const std::string& what) const
    {
        raise<format_error>(error_code::pickle_unsupported,
            message("is a PyTorch file that ", what, ": ", convert_to_safetensors), std::string(file_));
    }
    [[noreturn]] void wrong(const std::string& name, const std::string& what) const
    {
        raise<format_error>(error_code::archive_damaged,
            message("tensor '", name, "' ", what, ": the file is damaged; ", fetch_again), std::string(file_));
    }

    using value = pickle_reader::value;

    /// The same for tensors that lie in dictionaries of dictionaries, which safetensors has no names for.
    [[noreturn]] void fail_nested(const std::string& what, const value& key) const
    {
        const auto place =
            key.what == pickle_reader::kind::text ? "'" + first_words(key.text) + "'" : std::string("KEY");
        raise<format_error>(error_code::pickle_unsupported,
            message("is a PyTorch file that ", what,
                ": save the dictionary that is meant by itself, such as by "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True)[",
                place, "], 'model.safetensors')"),
            std::string(file_));
    }
    /// How many values of a dictionary are tensors.
    [[nodiscard]] std::size_t tensors_in(const pickle_reader& pickle, const value& dictionary)
    {
        const auto [place, is_new] = tensors_.try_emplace(&dictionary, 0); // one dictionary may stand in many places
        for (std::size_t i = 1; is_new && i < dictionary.items.size(); i += 2) {
            place->second += pickle.at(dictionary.items[i]).what == pickle_reader::kind::tensor ? 1u : 0u;
        }
        return place->second;
    }
    /// Whether a key of a training checkpoint names what training needs, and no model.
    [[nodiscard]] static bool belongs_to_training(std::string_view key)
    {
        for (const std::string_view word :
            {"optim", "sched", "scaler", "rng", "random", "callback", "hyper", "loops"}) {
            if (key.find(word) != key.npos) { return true; }
        }
        return false;
    }
    /// A dictionary within another, by name.
    struct part {
        std::string_view key;
        const value* content = nullptr;
    };
    /// Whether a dictionary holds tensors, itself or in those within it that belong to a model.
    [[nodiscard]] bool holds_tensors(const pickle_reader& pickle, const value& dictionary, unsigned depth = 0)
    {
        if (tensors_in(pickle, dictionary) > 0) { return true; }
        const auto [known, is_new] = holding_.try_emplace(&dictionary, false); // dictionaries may hold themselves
        if (is_new && depth < 8) {
            const bool holds = !parts_with_tensors(pickle, dictionary, depth + 1).empty();
            holding_[&dictionary] = holds;
            return holds;
        }
        return known->second;
    }
    /// The dictionaries within another that hold tensors.
    [[nodiscard]] std::vector<part> parts_with_tensors(
        const pickle_reader& pickle, const value& dictionary, unsigned depth = 0)
    {
        using kind = pickle_reader::kind;
        std::vector<part> found;
        for (std::size_t i = 0; i < dictionary.items.size(); i += 2) {
            const auto& key = pickle.at(dictionary.items[i]);
            const auto& inner = pickle.at(dictionary.items[i + 1]);
            if (key.what != kind::text || inner.what != kind::dictionary || belongs_to_training(key.text)) { continue; }
            if (holds_tensors(pickle, inner, depth)) { found.push_back({key.text, &inner}); }
        }
        return found;
    }
    /// The model of a training checkpoint: under one of the usual names, or the only dictionary with tensors, down to
    /// the one that has them. What lies beside it is left out, with a note; tensors too, where they are fewer.
    [[nodiscard]] const value* state_dict_in(const pickle_reader& pickle, const value& result)
    {
        using kind = pickle_reader::kind;
        const auto* model = &result;
        std::string way, left;
        for (unsigned depth = 0; depth < 4; ++depth) {
            const std::size_t own = tensors_in(pickle, *model);
            const value* inner = nullptr;
            std::string_view word;
            for (const std::string_view usual : {"state_dict", "model_state_dict", "model", "module", "params_ema",
                     "params", "ema", "net", "network", "weights"}) {
                for (std::size_t i = 0; i < model->items.size() && !inner; i += 2) {
                    const auto& key = pickle.at(model->items[i]);
                    const auto& one = pickle.at(model->items[i + 1]);
                    if (key.what != kind::text || key.text != usual) { continue; }
                    if (own == 0) {
                        if (const auto* const unknown = opaque_in(pickle, one)) { pickle.refuse_opaque(unknown->text); }
                    }
                    const bool holds = one.what == kind::dictionary && holds_tensors(pickle, one);
                    if (!holds || (own > 0 && tensors_in(pickle, one) < own)) { continue; }
                    inner = &one;
                    word = usual;
                }
                if (inner) { break; }
            }
            if (!inner && own == 0) {
                const auto parts = parts_with_tensors(pickle, *model);
                if (parts.size() > 1) {
                    std::string names;
                    for (const auto& one : parts) {
                        names += (names.empty() ? "'" : ", '") + first_words(one.key) + "'";
                    }
                    value key{kind::text, false, {}, 0, parts.front().key, {}};
                    fail_nested("holds several dictionaries of tensors (" + names + ")", key);
                }
                if (parts.size() == 1) {
                    inner = parts.front().content;
                    word = parts.front().key;
                }
            }
            if (!inner) { break; }
            if (own > 0) { left = message("; beside it ", own, own == 1 ? " tensor is" : " tensors are", " left out"); }
            way += (way.empty() ? "" : ".") + first_words(word);
            model = inner;
        }
        if (way.empty()) { return model; }
        const auto& beside = pickle.first_opaque();
        contents_.notes.push_back(message("'", std::string(file_), "': its '", way, "' is taken", left,
            beside.empty() ? std::string() : "; what lies beside it names " + beside + ", and was not built"));
        return model;
    }

    void read(const pickle_reader& pickle, const pickle_reader::value& result)
    {
        using kind = pickle_reader::kind;
        if (result.what != kind::dictionary) { fail("holds no dictionary of tensors (a state_dict)"); }
        const auto* const model = state_dict_in(pickle, result);
        check_known(pickle, *model);
        std::size_t others = 0;
        std::string first_other;
        std::set<std::string_view> seen;
        for (std::size_t i = 0; i < model->items.size(); i += 2) {
            const auto& key = pickle.at(model->items[i]);
            const auto& tensor = pickle.at(model->items[i + 1]);
            if (key.what != kind::text || tensor.what != kind::tensor) {
                if (tensor.what == kind::dictionary && tensors_in(pickle, tensor) > 0) {
                    fail_nested("holds tensors and, under "
                            + (key.what == kind::text ? "'" + first_words(key.text) + "'" : std::string("a number"))
                            + ", more of them",
                        key);
                }
                ++others;
                if (first_other.empty()) { first_other = key.what == kind::text ? first_words(key.text) : "a number"; }
                continue;
            }
            if (!seen.insert(key.text).second) { // as in Python the last one would win: nothing that is saved has two
                fail(message("names tensor '", first_words(key.text), "' twice"));
            }
            add(std::string(key.text), pickle, tensor);
        }
        if (contents_.header.entries.empty() && others > 0) { fail("holds no tensors by name"); }
        if (others > 0) {
            contents_.notes.push_back(message("'", std::string(file_), "': ", others,
                others == 1 ? " value that is no tensor ('" : " values that are no tensors ('", first_other,
                others == 1 ? "') is left out" : "' …) are left out"));
        }
        auto& entries = contents_.header.entries;
        std::stable_sort(
            entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
        contents_.header.metadata.emplace("format", "pt");
    }

    /// The value itself where it is opaque, or the first key or value of a dictionary that is.
    [[nodiscard]] static const pickle_reader::value* opaque_in(
        const pickle_reader& pickle, const pickle_reader::value& one)
    {
        using kind = pickle_reader::kind;
        if (one.what == kind::opaque) { return &one; }
        if (one.what != kind::dictionary) { return nullptr; }
        for (const auto item : one.items) {
            if (pickle.at(item).what == kind::opaque) { return &pickle.at(item); }
        }
        return nullptr;
    }
    /// Refuses a model with values, or dictionaries of values, that nothing is known of, and one that was given to
    /// such.
    static void check_known(const pickle_reader& pickle, const pickle_reader::value& model)
    {
        using kind = pickle_reader::kind;
        if (const auto* const one = opaque_in(pickle, model)) { pickle.refuse_opaque(one->text); }
        bool given = pickle.was_given(model);
        for (const auto item : model.items) {
            const auto& value = pickle.at(item);
            if (const auto* const one = opaque_in(pickle, value)) { pickle.refuse_opaque(one->text); }
            given = given || (value.what == kind::tensor && pickle.was_given(value));
        }
        if (given) {
            const auto& first = pickle.first_opaque();
            pickle.refuse("gives the model's tensors to " + (first.empty() ? std::string("a set") : first));
        }
    }
    void add(std::string name, const pickle_reader& pickle, const pickle_reader::value& tensor)
    {
        if (name.empty() || !is_text(name)) { fail("has a tensor whose name is empty or no UTF-8"); }
        if (tensor.items.size() > 3) { check_metadata(name, pickle, pickle.at(tensor.items[3])); }
        const auto& storage = pickle.at(tensor.items[0]);
        const auto* const entry = archive_.find(folder_ + "data/" + std::string(storage.text));
        if (!entry) { wrong(name, message("lies in 'data/", first_words(storage.text), "', which is not there")); }
        if (!entry->stored) { fail(message("has tensor '", name, "' compressed, which PyTorch never does")); }
        const std::uint64_t width = bits_per_element(tensor.type) / 8;
        const std::uint64_t storage_width = bits_per_element(storage.type) / 8;
        if (static_cast<std::uint64_t>(storage.number) > entry->size / storage_width
            || static_cast<std::uint64_t>(storage.number) * storage_width != entry->size) {
            wrong(name,
                message(
                    "lies in a storage of ", storage.number, " × ", storage_width, " bytes, which has ", entry->size));
        }
        extents shape, strides;
        std::uint64_t count = 1;
        bool empty = false;
        for (const auto item : pickle.at(tensor.items[1]).items) {
            shape.push_back(pickle.at(item).number);
            empty = empty || shape.back() == 0;
        }
        for (const auto item : pickle.at(tensor.items[2]).items) { strides.push_back(pickle.at(item).number); }
        for (const auto extent : shape) {
            if (!empty && detail::product_wraps(count, static_cast<std::uint64_t>(extent), count)) {
                wrong(name, "has a shape whose product is above 2^64-1");
            }
        }
        if (empty) { count = 0; }
        const auto first = static_cast<std::uint64_t>(tensor.number), room = entry->size / width;
        const bool spread = first <= room && count > room - first; // more elements than bytes: expanded, or overlapping
        if (first > room) {
            wrong(name,
                message("of ", to_string(tensor.type), " ", to_string(shape), " runs past the end of its storage"));
        }
        if (const const_tensor_ref view{nullptr, tensor.type, shape, strides};
            !empty && (spread || !view.contiguous())) {
            std::uint64_t last = first, way = 0;
            for (std::size_t d = 0; d < shape.size(); ++d) {
                if (detail::product_wraps(
                        static_cast<std::uint64_t>(shape[d]) - 1, static_cast<std::uint64_t>(strides[d]), way)
                    || detail::sum_wraps(last, way, last) || last >= room) {
                    wrong(name,
                        message("of ", to_string(tensor.type), " ", to_string(shape), " with strides ",
                            to_string(strides), " runs past the end of its storage"));
                }
            }
            if (spread) { // a file of a few bytes must not fill the disk
                if (last >= room || count > (expanded_bytes_limit - expanded_) / width) {
                    fail(message("has tensor '", name, "' of ", to_string(tensor.type), " ", to_string(shape),
                        " expanded from ", room - first, " elements, and more than ", expanded_bytes_limit,
                        " bytes of such tensors"));
                }
                expanded_ += count * width;
            }
            contents_.strides.emplace(name, std::move(strides));
        }
        contents_.header.entries.push_back(
            {std::move(name), tensor.type, std::move(shape), entry->offset + first * width, count * width});
    }
    /// Refuses a tensor whose numbers are others than its bytes: lazily conjugated or negated views have a bit for it.
    void check_metadata(
        const std::string& name, const pickle_reader& pickle, const pickle_reader::value& metadata) const
    {
        using kind = pickle_reader::kind;
        if (metadata.what == kind::none || (metadata.what == kind::number && metadata.number == 0)) { return; }
        if (metadata.what != kind::dictionary) {
            fail(message("says more of tensor '", name, "' than its type, shape and bytes"));
        }
        for (std::size_t i = 0; i < metadata.items.size(); i += 2) {
            const auto& key = pickle.at(metadata.items[i]);
            const auto& said = pickle.at(metadata.items[i + 1]);
            const auto word = key.what == kind::text ? key.text : std::string_view();
            if ((word == "neg" || word == "conj") && said.what == kind::number && said.number == 0) { continue; }
            if (word == "neg" || word == "conj") {
                raise<format_error>(error_code::pickle_unsupported,
                    message("is a PyTorch file whose tensor '", name, "' is a view that is ",
                        word == "neg" ? "negated" : "conjugated", " as it is read (its metadata has '", word,
                        "'), which its bytes do not show: save it with .resolve_conj().resolve_neg()"),
                    std::string(file_));
            }
            fail(message("says '", first_words(word), "' of tensor '", name,
                "', which is neither its type, its shape nor its bytes"));
        }
    }
    /// Whether a name can be a safetensors name: UTF-8.
    [[nodiscard]] static bool is_text(std::string_view text)
    {
        for (std::size_t i = 0; i < text.size();) {
            const auto first = static_cast<unsigned char>(text[i]);
            const std::size_t more = first < 0x80 ? 0
                : first < 0xc2                    ? 4
                : first < 0xe0                    ? 1
                : first < 0xf0                    ? 2
                : first < 0xf5                    ? 3
                                                  : 4;
            if (more == 4 || text.size() - i <= more) { return false; }
            for (std::size_t k = 1; k <= more; ++k) {
                if ((static_cast<unsigned char>(text[i + k]) & 0xc0u) != 0x80u) { return false; }
            }
            const auto second = more > 0 ? static_cast<unsigned char>(text[i + 1]) : 0u;
            if ((first == 0xe0 && second < 0xa0) || (first == 0xed && second > 0x9f) || (first == 0xf0 && second < 0x90)
                || (first == 0xf4 && second > 0x8f)) {
                return false;
            }
            i += more + 1;
        }
        return true;
    }

    std::string_view file_;
    zip_directory archive_;
    std::string folder_;
    std::uint64_t expanded_ = 0; ///< bytes of tensors that have more elements than their storage
    std::map<const value*, std::size_t> tensors_; // in dictionaries
    std::map<const value*, bool> holding_; // of dictionaries: see holds_tensors()
    pytorch_contents contents_;
};

} // namespace detail

/// Reads what a PyTorch file (torch.save() since 1.6) holds: a dictionary from names to tensors, or a training
/// checkpoint with one under `state_dict`, `model` or the like. The pickle is interpreted by a machine that knows
/// numbers, texts, collections and the functions that rebuild tensors and parameters; nothing runs. Anything else that
/// it names is refused by that name where the model holds it or was given to it, and otherwise (the arguments of a
/// training, beside its state_dict) not built, with a note; what else it does is refused. Checked: every record of the
/// archive (64-bit ones too), that entries share no bytes and are neither compressed nor encrypted, storages against
/// their sizes, tensors against their storages. Values that are no tensors are noted. Throws format_error naming `file`
/// and the tensor. Cost: O(pickle); no tensor byte is read.
[[nodiscard]] inline pytorch_contents parse_pytorch(std::span<const std::byte> bytes, std::string_view file)
{
    return detail::pytorch_tensors({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, file).take();
}

namespace detail {

/// Copies a tensor of elements of `Word` to row-major memory, in tiles of its last two dimensions: the columns of a
/// transposed matrix share lines of the cache.
template <class Word>
void copy_rows(const std::byte* from, const extents& shape, const extents& strides, std::byte* to)
{
    constexpr std::int64_t tile = 32;
    const std::size_t rank = shape.size();
    const std::int64_t columns = shape[rank - 1], rows = rank > 1 ? shape[rank - 2] : 1;
    const std::int64_t by_column = strides[rank - 1], by_row = rank > 1 ? strides[rank - 2] : 0;
    std::int64_t outer = 1;
    for (std::size_t d = 0; d + 2 < rank; ++d) { outer *= shape[d]; }
    for (std::int64_t block = 0; block < outer; ++block) {
        std::int64_t begin = 0, rest = block;
        for (std::size_t d = rank; d-- > 2;) {
            begin += rest % shape[d - 2] * strides[d - 2];
            rest /= shape[d - 2];
        }
        std::byte* const out = to + static_cast<std::size_t>(block * rows * columns) * sizeof(Word);
        for (std::int64_t i0 = 0; i0 < rows; i0 += tile) {
            for (std::int64_t j0 = 0; j0 < columns; j0 += tile) {
                for (std::int64_t i = i0; i < std::min(rows, i0 + tile); ++i) {
                    for (std::int64_t j = j0; j < std::min(columns, j0 + tile); ++j) {
                        Word word;
                        std::memcpy(&word,
                            from + static_cast<std::size_t>(begin + i * by_row + j * by_column) * sizeof(Word),
                            sizeof word);
                        std::memcpy(out + static_cast<std::size_t>(i * columns + j) * sizeof(Word), &word, sizeof word);
                    }
                }
            }
        }
    }
}

} // namespace detail

/// Lays the tensors of contents.strides out row-major, one after another, in a file without a name in `folder`, and
/// gives their entries offsets behind the end of `bytes`, as safetensors_file takes them; a note says so. Null where
/// all lie so already. Memory: none but the page cache's. Throws io_error. Cost: one read of these tensors.
[[nodiscard]] inline std::shared_ptr<const std::byte> lay_out_rows(pytorch_contents& contents,
    std::span<const std::byte> bytes, std::string_view file, const std::filesystem::path& folder)
{
    if (contents.strides.empty()) { return nullptr; }
    std::uint64_t total = 0;
    const auto padded = [](std::uint64_t size) { return (size + 63) / 64 * 64; };
    for (const auto& entry : contents.header.entries) {
        if (contents.strides.contains(entry.name)) { total += padded(entry.bytes); }
    }
    auto* const memory =
        static_cast<std::byte*>(detail::map_unnamed_file(folder, total, "tensors that are stored transposed"));
    const auto size = static_cast<std::size_t>(total);
    std::shared_ptr<const std::byte> result(
        memory, [size](const std::byte* data) { detail::system::unmap(data, size); });
    std::uint64_t at = 0;
    for (auto& entry : contents.header.entries) {
        const auto place = contents.strides.find(entry.name);
        if (place == contents.strides.end()) { continue; }
        const auto* const from = bytes.data() + entry.offset;
        switch (bits_per_element(entry.dtype)) {
        case 8: detail::copy_rows<std::uint8_t>(from, entry.shape, place->second, memory + at); break;
        case 16: detail::copy_rows<std::uint16_t>(from, entry.shape, place->second, memory + at); break;
        case 32: detail::copy_rows<std::uint32_t>(from, entry.shape, place->second, memory + at); break;
        default: detail::copy_rows<std::uint64_t>(from, entry.shape, place->second, memory + at);
        }
        entry.offset = bytes.size() + at;
        at += padded(entry.bytes);
    }
    const auto count = contents.strides.size();
    contents.notes.push_back(message("'", std::string(file), "': ", count, count == 1 ? " tensor ('" : " tensors ('",
        contents.strides.begin()->first, count == 1 ? "') does" : "' …) do",
        " not lie row by row there (transposed or expanded, say): laid out in a temporary file of ", total, " bytes"));
    contents.strides.clear();
    return result;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_PYTORCH_HPP

// ---- taskvec/formats/quantised.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_QUANTISED_HPP)
#define TASKVEC_SINGLE_FORMATS_QUANTISED_HPP
// Quantised layers: codes and their scales, recognised by their names, read as one tensor of numbers, and written
// again. SPDX-License-Identifier: Apache-2.0
//
// What is read: FP8 with scales (per tensor, per channel, in blocks; under the names of vLLM and compressed-tensors,
// DeepSeek and ComfyUI), MXFP4 (gpt-oss, compressed-tensors) and NVFP4 (ModelOpt, compressed-tensors). What is only
// recognised: GPTQ, AWQ, bitsandbytes, compressed-tensors' integers, HQQ, Quanto.


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
    /// Does beforehand, on the policy's threads, what the first read would do by itself.
    virtual void prepare(const cpu& /*policy*/) const { }
    /// Gives back what prepare() and reads keep, until the next one. Nobody reads meanwhile.
    virtual void release() const { }
    /// Bits that are read for an element: for progress and reports.
    [[nodiscard]] virtual unsigned stored_bits() const noexcept { return bits_per_element(type()); }
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_MODELS_OPERAND_SOURCE_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <initializer_list>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The schemes that are read.
enum class quantisation : std::uint8_t {
    fp8, ///< one code of 8 bits (E4M3 or E5M2) for each number, one scale for a tensor, a channel or a block
    mxfp4, ///< two codes of 4 bits (E2M1) in a byte, a power of two for each 32 numbers
    nvfp4 ///< two codes of 4 bits in a byte, an E4M3 scale for each 16 numbers, one factor for all
};
/// The name of a scheme, as messages say it.
[[nodiscard]] constexpr std::string_view to_string(quantisation scheme) noexcept
{
    return scheme == quantisation::fp8 ? "scaled FP8" : scheme == quantisation::mxfp4 ? "MXFP4" : "NVFP4";
}

/// A tensor of a file that belongs to a layer: what its name has after the layer's stem ("weight_scale"), and its view.
struct layer_part {
    std::string leaf; ///< its name without the layer's stem
    const_tensor_ref tensor{}; ///< of the file
};

/// How a layer is quantised. A number is its code times its scale (times `factor`), each product rounded to f32.
struct quantised_layer {
    std::string name; ///< of the tensor that it stands for, such as "model.layers.0.mlp.down_proj.weight"
    quantisation scheme = quantisation::fp8; ///< of its codes
    extents shape{}; ///< of the numbers
    extents block{}; ///< for each extent, how many elements share a scale
    extents grid{}; ///< for each extent, how many scales there are
    const_tensor_ref codes{}, scales{}; ///< as they are stored
    float factor = 1; ///< NVFP4: of all scales
    bool powers_of_two = false; ///< scales are powers of two, whatever they are stored as
    bool transposed = false; ///< MXFP4 experts: the last two extents are stored the other way round
    std::vector<layer_part> parts{}; ///< codes, scales, and what belongs to the layer beside them (input scales)

    /// "per tensor", "per channel", "blocks of 128 × 128", …
    [[nodiscard]] std::string granularity() const
    {
        if (element_count(grid) <= 1) { return "per tensor"; }
        std::size_t split = 0;
        for (std::size_t i = 1; i < grid.size(); ++i) { split += grid[i] > 1 ? 1u : 0u; }
        if (block[0] == 1 && split == 0) { return "per channel"; }
        std::string text = "blocks of ";
        for (std::size_t i = 0; i < block.size(); ++i) { text += (i ? " × " : "") + std::to_string(block[i]); }
        return text;
    }
};

/// What stands before a layer's last word: part names are this and their leaves. "a.b.weight" has "a.b.".
[[nodiscard]] inline std::string_view layer_stem(std::string_view name)
{
    const auto dot = name.rfind('.');
    return dot == name.npos ? std::string_view() : name.substr(0, dot + 1);
}

/// A layer that nothing here reads, or that is damaged.
struct unread_layer {
    std::string name; ///< of the layer
    std::string what; ///< "is quantised by GPTQ", "has a scale of shape …"
    std::string mend; ///< "dequantise it first …"
    std::vector<std::string> parts{}; ///< names of its tensors
};

/// What a configuration says about scales beyond their shapes.
struct quantisation_hints {
    extents block{}; ///< quantization_config.weight_block_size; empty: deduced from shapes
    bool powers_of_two = false; ///< scale_fmt "ue8m0"
    std::string file{}; ///< which says so, for messages
};

/// The hints of a config.json; none where it is not there, or says nothing. Throws format_error for block sizes that
/// are none.
[[nodiscard]] inline quantisation_hints read_quantisation_hints(const std::filesystem::path& config)
{
    quantisation_hints hints;
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(config, ignored)) { return hints; }
    const auto json = parse_configuration(read_text_file(config), config.string());
    const nlohmann::json* how = nullptr;
    for (const auto* part : {&json, json.contains("text_config") ? &json["text_config"] : &json}) {
        if (!how && part->is_object() && part->contains("quantization_config")
            && (*part)["quantization_config"].is_object()) {
            how = &(*part)["quantization_config"];
        }
    }
    if (!how) { return hints; }
    hints.file = config.string();
    const auto take = [&](const nlohmann::json& sizes, std::string_view key) {
        bool fits = sizes.is_array() && !sizes.empty();
        for (const auto& size : sizes) {
            fits = fits && size.is_number_unsigned() && size.get<std::uint64_t>() > 0
                && size.get<std::uint64_t>() < (std::uint64_t{1} << 32);
        }
        if (!fits) {
            raise<format_error>(error_code::quantised_layer,
                message("quantization_config has a '", key, "' that is no list of sizes, such as [128, 128]"),
                hints.file);
        }
        hints.block.clear();
        for (const auto& size : sizes) { hints.block.push_back(size.get<std::int64_t>()); }
    };
    if (how->contains("weight_block_size") && !(*how)["weight_block_size"].is_null()) {
        take((*how)["weight_block_size"], "weight_block_size");
    }
    if (how->contains("config_groups") && (*how)["config_groups"].is_object()) {
        for (const auto& group : (*how)["config_groups"]) {
            if (!group.is_object() || !group.contains("weights") || !group["weights"].is_object()) { continue; }
            const auto& weights = group["weights"];
            if (weights.contains("block_structure") && weights["block_structure"].is_array()) {
                take(weights["block_structure"], "block_structure");
            }
        }
    }
    hints.powers_of_two = how->contains("scale_fmt") && (*how)["scale_fmt"] == "ue8m0";
    return hints;
}

namespace detail {

/// The numbers of all codes.
template <class Widen>
[[nodiscard]] constexpr std::array<float, 256> code_table(Widen widen)
{
    std::array<float, 256> table{};
    for (unsigned code = 0; code < 256; ++code) { table[code] = widen(static_cast<std::uint8_t>(code)); }
    return table;
}
inline constexpr auto e4m3_numbers = code_table([](std::uint8_t code) { return e4m3_to_f32(code); });
inline constexpr auto e5m2_numbers = code_table([](std::uint8_t code) { return e5m2_to_f32(code); });
/// Powers of two: 2^(code − 127), 255 is NaN.
inline constexpr auto e8m0_numbers = code_table([](std::uint8_t code) {
    return code == 255 ? reinterpret_bits<float>(std::uint32_t{0x7fc00000u})
        : code == 0    ? 0x1p-127f
                       : reinterpret_bits<float>(static_cast<std::uint32_t>(code) << 23);
});
inline constexpr std::array<float, 16> e2m1_numbers{
    0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

[[nodiscard]] constexpr bool is_scale_dtype(dtype type) noexcept
{
    return type == dtype::f32 || type == dtype::f16 || type == dtype::bf16 || type == dtype::f64
        || type == dtype::f8_e8m0;
}

/// A scale by its place. `type`: that of is_scale_dtype(), f8_e4m3, or u8 for powers of two.
[[nodiscard]] inline float scale_at(const const_tensor_ref& scales, std::uint64_t index) noexcept
{
    const auto* const data = static_cast<const unsigned char*>(scales.data);
    const auto load = [&]<class T>(T value) {
        std::memcpy(&value, data + index * sizeof value, sizeof value);
        return value;
    };
    switch (scales.dtype) {
    case dtype::f32: return load(float{});
    case dtype::f64: return static_cast<float>(load(double{}));
    case dtype::f16: return f16_to_f32(load(std::uint16_t{}));
    case dtype::bf16: return bf16_to_f32(load(std::uint16_t{}));
    case dtype::f8_e4m3: return e4m3_numbers[data[index]];
    default: return e8m0_numbers[data[index]];
    }
}

/// The first scale of a row, a row being all numbers that share the other indices.
[[nodiscard]] inline std::uint64_t first_scale(const quantised_layer& layer, std::uint64_t row) noexcept
{
    std::uint64_t index = 0, stride = layer.grid.empty() ? 1 : static_cast<std::uint64_t>(layer.grid.back());
    for (std::size_t d = layer.shape.size(); d-- > 1;) {
        const auto extent = static_cast<std::uint64_t>(layer.shape[d - 1]);
        index += row % extent / static_cast<std::uint64_t>(layer.block[d - 1]) * stride;
        stride *= static_cast<std::uint64_t>(layer.grid[d - 1]);
        row /= extent;
    }
    return index;
}

} // namespace detail

/// A quantised layer as a tensor: decodes any run of its numbers.
class quantised_tensor final : public operand_source {
public:
    /// A layer that quantised_layers found.
    explicit quantised_tensor(quantised_layer layer)
        : layer_(std::move(layer))
    { }
    /// How the layer is stored.
    [[nodiscard]] const quantised_layer& layer() const noexcept { return layer_; }
    /// The tensor that walks over models are given. Refers to this.
    [[nodiscard]] const_tensor_ref tensor() const&
    {
        return {nullptr, dtype::f32, layer_.shape, {}, memory_space::host, 0, this};
    }
    void tensor() const&& = delete; // name the owner first: its views would dangle
    [[nodiscard]] dtype type() const noexcept override { return dtype::f32; }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return layer_.scheme == quantisation::fp8 ? 8 : 4; }

    void read(std::uint64_t offset, std::size_t count, void* numbers) const override
    {
        auto* out = static_cast<float*>(numbers);
        const std::uint64_t columns = layer_.shape.empty() ? 1 : static_cast<std::uint64_t>(layer_.shape.back());
        while (count > 0) {
            const std::uint64_t row = offset / columns, column = offset % columns;
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(count, columns - column));
            layer_.transposed ? decode_column(row, column, n, out) : decode_row(row, column, n, out);
            offset += n;
            count -= n;
            out += n;
        }
    }

private:
    [[nodiscard]] float scale(std::uint64_t index) const
    {
        const float value = detail::scale_at(layer_.scales, index);
        return layer_.scheme == quantisation::nvfp4 ? value * layer_.factor : value;
    }
    [[nodiscard]] float nibble(std::uint64_t index) const
    {
        const unsigned byte = static_cast<const unsigned char*>(layer_.codes.data)[index / 2];
        return detail::e2m1_numbers[index % 2 ? byte >> 4 : byte & 15u];
    }
    void decode_row(std::uint64_t row, std::uint64_t column, std::size_t n, float* out) const
    {
        const std::uint64_t columns = layer_.shape.empty() ? 1 : static_cast<std::uint64_t>(layer_.shape.back());
        const std::uint64_t width = layer_.shape.empty() ? 1 : static_cast<std::uint64_t>(layer_.block.back());
        const std::uint64_t scales = detail::first_scale(layer_, row), first = row * columns;
        const auto* const codes = static_cast<const unsigned char*>(layer_.codes.data);
        const float* const numbers =
            layer_.codes.dtype == dtype::f8_e5m2 ? detail::e5m2_numbers.data() : detail::e4m3_numbers.data();
        for (std::size_t i = 0; i < n;) {
            const std::uint64_t at = column + i;
            const auto end = static_cast<std::size_t>(std::min<std::uint64_t>(n, i + width - at % width));
            const float factor = scale(scales + at / width);
            if (layer_.scheme == quantisation::fp8) {
                for (; i < end; ++i) { out[i] = numbers[codes[first + column + i]] * factor; }
            }
            else {
                for (; i < end; ++i) { out[i] = nibble(first + column + i) * factor; }
            }
        }
    }
    /// Row and column of the numbers, stored as column and row: shape […, in, out] of codes […, out, in].
    void decode_column(std::uint64_t row, std::uint64_t column, std::size_t n, float* out) const
    {
        const std::size_t rank = layer_.shape.size();
        const auto ins = static_cast<std::uint64_t>(layer_.shape[rank - 2]);
        const auto outs = static_cast<std::uint64_t>(layer_.shape[rank - 1]);
        const auto width = static_cast<std::uint64_t>(layer_.block[rank - 2]);
        const auto groups = static_cast<std::uint64_t>(layer_.grid[rank - 2]);
        const std::uint64_t matrix = row / ins, in = row % ins;
        for (std::size_t i = 0; i < n; ++i) {
            const std::uint64_t stored = matrix * outs + column + i;
            out[i] = nibble(stored * ins + in) * scale(stored * groups + in / width);
        }
    }

    quantised_layer layer_;
};

/// The layers of a model that are quantised, and the model with each of them as one tensor.
///
///     const quantised_layers layers(file.model(), hints);
///     for (const auto& [name, tensor] : layers.model()) { … } // "l.weight", F32; no "l.weight_scale"
///
/// A layer whose scheme is not read, or whose tensors contradict each other (a scale of the wrong shape, NaN, negative
/// or infinite scales, a scale without its weight, FP8 without a scale beside layers with one), is in unread(), and its
/// tensors stay in the model as they are: whoever computes with them asks refuse_unread() first. Views only.
/// Cost: O(names), and one read of all scales.
class quantised_layers {
public:
    /// Where hints come from, asked once and only if they are needed.
    using hint_source = std::function<quantisation_hints()>;

    quantised_layers() = default;
    /// `hints` is asked at most once, and only where scales of blocks have to be understood.
    explicit quantised_layers(const const_model_ref& stored, hint_source hints = {})
        : stored_(&stored)
        , ask_(std::move(hints))
    {
        find_layers();
        stored_ = nullptr;
        ask_ = {};
    }
    quantised_layers(const quantised_layers&) = delete;
    quantised_layers& operator=(const quantised_layers&) = delete;

    /// Whether any layer is quantised, by a scheme that is read or not.
    [[nodiscard]] bool any() const noexcept { return !layers_.empty() || !unread_.empty(); }
    /// The model: every quantised layer is one tensor of numbers, all others are as they are. Refers to this.
    [[nodiscard]] const const_model_ref& model() const& noexcept { return model_; }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// The layers that are read.
    [[nodiscard]] const std::vector<quantised_tensor>& layers() const& noexcept { return layers_; }
    void layers() const&& = delete; // name the owner first: its views would dangle
    /// The layers that are not.
    [[nodiscard]] const std::vector<unread_layer>& unread() const noexcept { return unread_; }
    /// Tensors that are about the quantisation and belong to no one layer (`scaled_fp8`, scales of a KV cache).
    [[nodiscard]] const const_model_ref& beside() const noexcept { return beside_; }
    /// What the configuration said, where it was asked.
    [[nodiscard]] const quantisation_hints& hints() const noexcept { return hints_; }

private:
    using tensor = const const_tensor_ref*;

    [[nodiscard]] tensor find(const std::string& name) const { return stored_->find(name); }
    [[nodiscard]] static bool ends(std::string_view name, std::string_view leaf)
    {
        return name.ends_with(leaf) && (name.size() == leaf.size() || name[name.size() - leaf.size() - 1] == '.');
    }
    void need_hints()
    {
        if (ask_) { hints_ = std::exchange(ask_, {})(); }
    }
    [[nodiscard]] static std::string dequantise_first()
    {
        return "dequantise the model first (transformers' model.dequantize() and save_pretrained(), or take the "
               "weights "
               "that it was made of), or exclude the whole layer";
    }
    [[nodiscard]] static std::string repair() { return "fetch the file again, or exclude the whole layer"; }

    void give_up(const std::string& name, const std::string& what, std::vector<std::string> parts,
        const std::string& mend = dequantise_first())
    {
        for (const auto& part : parts) { taken_.insert(part); }
        unread_.push_back({name, what, mend, std::move(parts)});
    }
    /// Those of some names that the model has, after a stem.
    [[nodiscard]] std::vector<std::string> present(
        const std::string& stem, std::initializer_list<std::string_view> leaves) const
    {
        std::vector<std::string> names;
        for (const auto leaf : leaves) {
            if (auto name = stem + std::string(leaf); find(name)) { names.push_back(std::move(name)); }
        }
        return names;
    }

    void find_layers()
    {
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name)) { find_unread(name, value); }
        }
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name)) { find_fp4(name, value); }
        }
        for (const auto& [name, value] : *stored_) {
            if (!taken_.contains(name) && is_fp8(value.dtype)) { find_fp8(name, value); }
        }
        find_leftovers();
        std::vector<const_model_ref::entry> entries;
        for (const auto& entry : *stored_) {
            if (!read_.contains(entry.name)) { entries.push_back(entry); }
        }
        for (const auto& layer : layers_) { entries.push_back({layer.layer().name, layer.tensor()}); }
        std::stable_sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
        for (std::size_t i = 0; i < entries.size(); ++i) {
            if (i > 0 && entries[i].name == entries[i - 1].name) { continue; } // refused by add()
            model_.insert(entries[i].name, entries[i].tensor);
        }
    }

    void find_unread(const std::string& name, const const_tensor_ref& value)
    {
        const std::string stem(layer_stem(name));
        const auto leaf = std::string_view(name).substr(stem.size());
        const auto module = [&] { return stem.empty() ? name : stem.substr(0, stem.size() - 1); };
        if (leaf == "qweight") {
            auto parts = present(stem, {"qweight", "qzeros", "scales", "g_idx"});
            const auto scales = find(stem + "scales");
            const bool wide =
                scales && scales->shape.size() == 2 && value.shape.size() == 2 && scales->shape[1] != value.shape[1];
            const bool awq = !find(stem + "g_idx") && wide;
            give_up(module(), awq ? "is quantised by AWQ" : "is quantised by GPTQ", std::move(parts));
        }
        else if (leaf == "weight_packed" && value.dtype != dtype::u8) {
            give_up(module(), "is quantised to integers (compressed-tensors)",
                present(stem,
                    {"weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx",
                        "input_scale", "input_zero_point"}));
        }
        else if (leaf == "W_q") {
            give_up(module(), "is quantised by HQQ",
                present(stem, {"W_q", "scale", "zero", "meta", "nbits", "group_size", "shape", "axis", "packing"}));
        }
        else if (name.ends_with("._data") && find(name.substr(0, name.size() - 5) + "_scale")) {
            const auto whole = name.substr(0, name.size() - 6);
            give_up(whole, "is quantised by Quanto", present(whole, {"._data", "._scale", "._shift"}));
        }
        else if (leaf == "SCB" && find(stem + "weight")) {
            give_up(stem + "weight", "is quantised to 8 bits by bitsandbytes",
                present(stem, {"weight", "SCB", "weight_format"}));
        }
        else if (name.ends_with(".absmax") && !name.ends_with(".nested_absmax")) {
            const auto whole = name.substr(0, name.size() - 7);
            auto parts = present(whole, {"", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"});
            std::string kind = "4 bits";
            for (const std::string_view type : {"nf4", "fp4"}) {
                const auto state = whole + ".quant_state.bitsandbytes__" + std::string(type);
                if (find(state)) {
                    parts.push_back(state);
                    kind = type == "nf4" ? "NF4" : "FP4";
                }
            }
            give_up(whole, "is quantised to " + kind + " by bitsandbytes", std::move(parts));
        }
        else if (leaf == "weight" && (value.dtype == dtype::i8 || value.dtype == dtype::i32)
            && (find(name + "_scale") || find(name + "_scales"))) {
            give_up(name, "is quantised to integers",
                present(stem,
                    {"weight", "weight_scale", "weight_scales", "weight_zero_point", "input_scale",
                        "input_zero_point"}));
        }
        else if (value.dtype == dtype::f8_e4m3fnuz || value.dtype == dtype::f8_e5m2fnuz) {
            if (find(name + "_scale") || find(name + "_scale_inv")) {
                give_up(name, message("is quantised to ", to_string(value.dtype)),
                    present(name, {"", "_scale", "_scale_inv"}));
            }
        }
    }

    void find_fp4(const std::string& name, const const_tensor_ref& value)
    {
        const std::string stem(layer_stem(name));
        const auto leaf = std::string_view(name).substr(stem.size());
        if (value.dtype != dtype::u8) { return; }
        constexpr std::string_view blocks = "_blocks";
        if (name.ends_with(blocks)) {
            const auto whole = name.substr(0, name.size() - blocks.size());
            const auto scales = find(whole + "_scales");
            if (scales && scales->dtype == dtype::u8) { add_mxfp4_blocks(whole, name, value, *scales); }
            else if (value.shape.size() > 2 && value.shape.back() == 16) {
                give_up(whole, "has MXFP4 codes ('" + name + "') without scales ('" + whole + "_scales', U8)", {name},
                    repair());
            }
            return;
        }
        if (leaf != "weight_packed" && leaf != "weight") { return; }
        const auto scales = find(stem + "weight_scale");
        if (!scales) {
            if (leaf == "weight_packed") {
                give_up(stem + "weight", "has packed codes without 'weight_scale'", {name}, repair());
            }
            return;
        }
        auto parts = present(stem,
            {leaf, "weight_scale", "weight_scale_2", "weight_global_scale", "input_scale", "input_global_scale",
                "weight_shape"});
        quantised_layer layer;
        layer.name = stem + "weight";
        layer.codes = value;
        layer.scales = *scales;
        const bool powers = scales->dtype == dtype::u8 || scales->dtype == dtype::f8_e8m0;
        const auto factor = find(stem + "weight_scale_2"), divisor = find(stem + "weight_global_scale");
        const auto wrong = [&](const std::string& what, const std::string& mend) {
            give_up(layer.name, what, parts, mend);
        };
        if (!powers && scales->dtype != dtype::f8_e4m3) {
            return wrong("is packed in bytes with scales of " + std::string(to_string(scales->dtype))
                    + ": neither MXFP4 nor NVFP4",
                dequantise_first());
        }
        layer.scheme = powers ? quantisation::mxfp4 : quantisation::nvfp4;
        const std::int64_t group = powers ? 32 : 16;
        if (!powers) {
            const auto global = factor ? factor : divisor;
            if (!global) {
                return wrong("has NVFP4 codes without 'weight_scale_2' or 'weight_global_scale'", repair());
            }
            if (global->dtype != dtype::f32 || global->size() != 1) {
                return wrong("has a global scale of " + std::string(to_string(global->dtype)) + " "
                        + to_string(global->shape) + "; expected one F32",
                    repair());
            }
            layer.factor = detail::scale_at(*global, 0);
            if (!(layer.factor > 0) || !std::isfinite(layer.factor)) {
                return wrong(message("has the global scale ", layer.factor, "; expected a positive number"), repair());
            }
            if (!factor) { layer.factor = 1.0f / layer.factor; }
        }
        if (value.shape.size() < 2) {
            return wrong("has packed codes of shape " + to_string(value.shape) + "; expected [out, in / 2]", repair());
        }
        layer.shape = value.shape;
        layer.shape.back() *= 2;
        auto expected = layer.shape;
        expected.back() = (expected.back() + group - 1) / group;
        if (scales->shape != expected || layer.shape.back() % group != 0) {
            return wrong("has scales of shape " + to_string(scales->shape) + " for numbers of shape "
                    + to_string(layer.shape) + "; expected " + to_string(expected),
                repair());
        }
        layer.block = extents(layer.shape.size(), 1);
        layer.block.back() = group;
        layer.grid = expected;
        add(std::move(layer), parts, stem);
    }

    void add_mxfp4_blocks(const std::string& whole, const std::string& name, const const_tensor_ref& value,
        const const_tensor_ref& scales)
    {
        const std::vector<std::string> parts{name, whole + "_scales"};
        const std::size_t rank = value.shape.size();
        auto expected = value.shape;
        if (rank > 0) { expected.pop_back(); }
        if (rank < 3 || rank > 4 || value.shape.back() != 16 || scales.shape != expected) {
            give_up(whole,
                "has MXFP4 codes of shape " + to_string(value.shape) + " and scales of shape " + to_string(scales.shape)
                    + "; expected [experts, out, in / 32, 16] and [experts, out, in / 32]",
                parts, repair());
            return;
        }
        quantised_layer layer;
        layer.name = whole;
        layer.scheme = quantisation::mxfp4;
        layer.codes = value;
        layer.scales = scales;
        const std::int64_t groups = value.shape[rank - 2], out = value.shape[rank - 3];
        layer.transposed = rank == 4; // experts are multiplied from the right: [experts, in, out]
        if (layer.transposed) {
            layer.shape = {value.shape[0], groups * 32, out};
            layer.block = {1, 32, 1};
            layer.grid = {value.shape[0], groups, out};
        }
        else {
            layer.shape = {out, groups * 32};
            layer.block = {1, 32};
            layer.grid = {out, groups};
        }
        add(std::move(layer), parts, std::string(layer_stem(whole)));
    }

    void find_fp8(const std::string& name, const const_tensor_ref& value)
    {
        const std::string stem(layer_stem(name));
        const auto leaf = std::string_view(name).substr(stem.size());
        if (leaf == "scaled_fp8") { return; }
        std::vector<std::string> scales = present(name, {"_scale", "_scale_inv"});
        if (leaf == "weight" && find(stem + "scale_weight")) { scales.push_back(stem + "scale_weight"); }
        if (scales.empty()) {
            bare_.push_back(name);
            return;
        }
        std::vector<std::string> parts{name, scales[0]};
        for (auto& more : present(stem, {"input_scale", "scale_input", "input_scale_ub"})) {
            if (leaf == "weight") { parts.push_back(std::move(more)); }
        }
        for (auto& more : present(name, {"_input_scale"})) { parts.push_back(std::move(more)); }
        if (scales.size() > 1) {
            parts.insert(parts.end(), scales.begin() + 1, scales.end());
            give_up(name, "has two scales, '" + scales[0] + "' and '" + scales[1] + "'", parts, repair());
            return;
        }
        quantised_layer layer;
        layer.name = name;
        layer.codes = value;
        layer.scales = *find(scales[0]);
        layer.shape = value.shape;
        if (!detail::is_scale_dtype(layer.scales.dtype)) {
            give_up(name,
                "has a scale ('" + scales[0] + "') of dtype " + std::string(to_string(layer.scales.dtype))
                    + "; expected F32, BF16, F16 or F8_E8M0",
                parts, repair());
            return;
        }
        if (const auto wrong = lay_out(layer, scales[0]); !wrong.empty()) {
            give_up(name, wrong, parts, repair());
            return;
        }
        if (element_count(layer.grid) > 1) { need_hints(); }
        layer.powers_of_two = layer.scales.dtype == dtype::f8_e8m0 || hints_.powers_of_two;
        add(std::move(layer), parts, stem);
    }

    /// Blocks and grid from the shapes of codes and scales; what is wrong with them, or nothing.
    [[nodiscard]] std::string lay_out(quantised_layer& layer, const std::string& scale_name)
    {
        const auto& shape = layer.shape;
        const auto& given = layer.scales.shape;
        const std::size_t rank = shape.size();
        layer.block.assign(rank, 1);
        layer.grid.assign(rank, 1);
        for (std::size_t i = 0; i < rank; ++i) { layer.block[i] = std::max<std::int64_t>(1, shape[i]); }
        if (layer.scales.size() == 1) { return {}; }
        const auto wrong = [&](const std::string& expected) {
            return "has a scale ('" + scale_name + "') of shape " + to_string(given) + " for a weight of shape "
                + to_string(shape) + "; expected " + expected;
        };
        const auto ceiling = [](std::int64_t n, std::int64_t by) { return (n + by - 1) / by; };
        std::string choices = "[] for all of it";
        if (rank > 0) { choices += message(", [", shape[0], "] for each channel"); }
        if (rank > 1) {
            need_hints();
            auto sizes = extents(rank, 1);
            const std::int64_t usual = 128;
            const bool told = hints_.block.size() == 2;
            sizes[rank - 2] = told ? hints_.block[0] : usual;
            sizes[rank - 1] = told ? hints_.block[1] : usual;
            auto blocks = shape;
            for (std::size_t i = 0; i < rank; ++i) { blocks[i] = ceiling(shape[i], sizes[i]); }
            choices += message(" or ", to_string(blocks), " for blocks of ", sizes[rank - 2], " × ", sizes[rank - 1],
                told ? " (" + hints_.file + ")" : std::string());
            if (given == blocks) {
                for (std::size_t i = 0; i < rank; ++i) {
                    layer.block[i] = std::min(sizes[i], std::max<std::int64_t>(1, shape[i]));
                }
                layer.grid = given;
                return {};
            }
        }
        if (rank == 0 || layer.scales.size() == 0 || element_count(shape) == 0) { return wrong(choices); }
        auto channel = extents(rank, 1);
        channel[0] = shape[0];
        if (given == extents{shape[0]} || given == channel) {
            layer.block[0] = 1;
            layer.grid = channel;
            return {};
        }
        const bool told = rank == 2 && hints_.block.size() == 2;
        if (given.size() != rank || told || (rank == 2 && given[0] == 1) || given == shape) { return wrong(choices); }
        for (std::size_t i = 0; i < rank; ++i) {
            if (given[i] <= 0 || shape[i] % given[i] != 0) { return wrong(choices); }
            layer.block[i] = shape[i] / given[i];
        }
        layer.grid = given;
        return {};
    }

    void add(quantised_layer layer, const std::vector<std::string>& parts, const std::string& stem)
    {
        const bool signless = layer.scales.dtype == dtype::u8 || layer.scales.dtype == dtype::f8_e8m0;
        const std::uint64_t count = layer.scales.size();
        for (std::uint64_t i = 0; i < count; ++i) {
            const float scale = detail::scale_at(layer.scales, i);
            if (signless ? scale == scale : scale >= 0 && std::isfinite(scale)) { continue; }
            give_up(layer.name,
                message("has the scale ", scale, " (at ", i, " of ", count, "); expected a positive number"), parts,
                repair());
            return;
        }
        if (layer.name != parts[0] && find(layer.name)) {
            give_up(layer.name, "is there twice, as it is and quantised ('" + parts[0] + "')", parts, repair());
            return;
        }
        for (const auto& part : parts) {
            taken_.insert(part);
            read_.insert(part);
            layer.parts.push_back({part.substr(stem.size()), *find(part)});
        }
        layers_.emplace_back(std::move(layer));
    }

    /// Scales without weights, FP8 without scales, and what belongs to no one layer.
    void find_leftovers()
    {
        const bool scaled = !layers_.empty() || find("scaled_fp8");
        for (const auto& name : bare_) {
            if (!scaled) { continue; } // numbers as they are
            give_up(name, "is FP8 without a scale ('" + name + "_scale'), which other layers of the model have", {name},
                repair());
        }
        for (const auto& [name, value] : *stored_) {
            if (taken_.contains(name)) { continue; }
            const std::string stem(layer_stem(name));
            const auto leaf = std::string_view(name).substr(stem.size());
            if (leaf == "weight_scale" || leaf == "weight_scale_inv" || leaf == "scale_weight") {
                const auto weight = find(stem + "weight");
                if (weight && !scaled && is_storage(weight->dtype)) { continue; } // a parameter of that name
                if (weight && is_storage(weight->dtype)) {
                    give_up(stem + "weight",
                        "is " + std::string(to_string(weight->dtype)) + " and has a scale ('" + name
                            + "') all the same",
                        {stem + "weight", name}, repair());
                    continue;
                }
                give_up(
                    stem + "weight", "has a scale ('" + name + "') and no codes that it belongs to", {name}, repair());
                continue;
            }
            if (!scaled) { continue; }
            for (const std::string_view word : {"scaled_fp8", "k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale",
                     "output_scale", "input_scale", "scale_input"}) {
                if (leaf == word) {
                    beside_.insert(name, value);
                    read_.insert(name);
                    break;
                }
            }
        }
    }

    const const_model_ref* stored_ = nullptr;
    hint_source ask_;
    quantisation_hints hints_;
    std::vector<quantised_tensor> layers_;
    std::vector<unread_layer> unread_;
    std::vector<std::string> bare_;
    std::set<std::string> taken_, read_; // names that are settled, and those that the model has no more
    const_model_ref model_, beside_;
};

/// Throws for layers that are not read and take part: format_error by the layer's name, saying what to do; for one of
/// which `include` leaves some tensors and not others, invalid_argument (a layer is excluded whole). `include`: empty
/// where all do. `file`: for messages.
inline void refuse_unread(
    const quantised_layers& layers, const callback<bool(std::string_view)>& include, const std::string& file)
{
    for (const auto& layer : layers.unread()) {
        std::size_t in = 0;
        const std::string* excluded = nullptr;
        for (const auto& part : layer.parts) {
            if (!include || include(part)) { ++in; }
            else {
                excluded = &part;
            }
        }
        if (in == 0) { continue; }
        if (excluded) {
            raise<invalid_argument>(error_code::layer_split,
                message("'", file, "': tensor '", *excluded, "' is excluded, and it is part of layer '", layer.name,
                    "', which ", layer.what, ": exclude the whole layer, or nothing of it"));
        }
        raise<format_error>(
            error_code::quantised_layer, message("layer '", layer.name, "' ", layer.what, ": ", layer.mend), file);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_QUANTISED_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The file names of a checkpoint directory.
inline constexpr std::string_view single_file_name = "model.safetensors";
/// Of the index of a sharded checkpoint.
inline constexpr std::string_view index_file_name = "model.safetensors.index.json";

/// What the names of a checkpoint's files begin with: transformers', and diffusers'. Where a directory holds both, the
/// first is the model.
inline constexpr std::string_view model_stems[] = {"model", "diffusion_pytorch_model"};

/// Whether the tensors of shards have to be those that their index gives them.
enum class index_check : std::uint8_t {
    strict, ///< each of them, and no other
    lenient ///< what is there counts, as for transformers: a note says what differs
};

/// A model on disk: the maps of its files, and the tensors in them by name. Move-only; views stay valid when it moves.
class checkpoint {
public:
    /// `take`: which tensors of which file (by its place in `files`) the model has; all, where it is empty.
    checkpoint(std::filesystem::path path, std::vector<safetensors_file> files,
        const callback<bool(std::size_t, const safetensors_entry&)>& take = {}, std::vector<std::string> notes = {})
        : path_(std::move(path))
        , files_(std::move(files))
        , notes_(std::move(notes))
    {
        struct item {
            const safetensors_file* file;
            const safetensors_entry* entry;
        };
        std::vector<item> sorted;
        for (std::size_t f = 0; f < files_.size(); ++f) {
            const auto& file = files_[f];
            for (const auto& entry : file.entries()) {
                if (take && !take(f, entry)) { continue; }
                sorted.push_back({&file, &entry});
                data_bytes_ += entry.bytes;
            }
            metadata_.insert(file.metadata().begin(), file.metadata().end());
        }
        std::sort(
            sorted.begin(), sorted.end(), [](const item& a, const item& b) { return a.entry->name < b.entry->name; });
        for (std::size_t i = 0; i < sorted.size(); ++i) {
            if (i && sorted[i].entry->name == sorted[i - 1].entry->name) {
                raise<format_error>(error_code::file_tensors,
                    message("tensor '", sorted[i].entry->name, "' is in this file and in '",
                        sorted[i - 1].file->path().string(), "'"),
                    sorted[i].file->path().string());
            }
            model_.insert(sorted[i].entry->name, sorted[i].file->tensor(*sorted[i].entry));
        }
    }

    /// What open_model() was given.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return path_; }
    [[nodiscard]] std::filesystem::path path() && { return path_; }
    /// The mapped files, in the order of their names.
    [[nodiscard]] const std::vector<safetensors_file>& files() const& noexcept { return files_; }
    void files() const&& = delete; // name the owner first: its views would dangle
    /// All tensors as they are stored, views into the files.
    [[nodiscard]] const const_model_ref& model() const& noexcept { return model_; }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// The files' metadata; of a key in several shards, the first shard's value.
    [[nodiscard]] const metadata_map& metadata() const& noexcept { return metadata_; }
    [[nodiscard]] metadata_map metadata() && { return std::move(metadata_); }
    /// Bytes of all tensors.
    [[nodiscard]] std::uint64_t data_bytes() const noexcept { return data_bytes_; }
    /// What whoever opened it should know: sentences without a full stop.
    [[nodiscard]] const std::vector<std::string>& notes() const noexcept { return notes_; }
    /// The same files under other names, or with other views into them: what `model` holds must outlive the checkpoint
    /// (views of its own files do).
    void set_model(const_model_ref model) { model_ = std::move(model); }
    /// Makes model() have quantised layers as tensors of numbers (formats/quantised.hpp). stored() keeps what the files
    /// hold. open_model() has done so.
    void read_layers(quantised_layers::hint_source hints)
    {
        auto layers = std::make_shared<const quantised_layers>(model_, std::move(hints));
        if (!layers->any()) { return; }
        stored_ = std::exchange(model_, layers->model());
        layers_ = std::move(layers);
    }
    /// The tensors of the files: model(), but for quantised layers and names that were changed.
    [[nodiscard]] const const_model_ref& stored() const& noexcept { return layers_ ? stored_ : model_; }
    void stored() const&& = delete; // name the owner first: its views would dangle
    /// The quantised layers; null where no layer is.
    [[nodiscard]] const quantised_layers* layers() const& noexcept { return layers_.get(); }
    void layers() const&& = delete; // name the owner first: its views would dangle

private:
    std::filesystem::path path_;
    std::vector<safetensors_file> files_;
    std::vector<std::string> notes_;
    const_model_ref model_, stored_;
    std::shared_ptr<const quantised_layers> layers_;
    metadata_map metadata_;
    std::uint64_t data_bytes_ = 0;
};

/// Refuses a shard name that could lead out of the checkpoint's directory.
inline void check_shard_name(std::string_view shard, std::string_view index)
{
    if (shard.empty() || shard == "." || shard.find('/') != shard.npos || shard.find('\\') != shard.npos
        || shard.find("..") != shard.npos || shard.find('\0') != shard.npos) {
        raise<format_error>(error_code::index_field,
            message("names the shard '", shard,
                "'; a shard is a file beside its index, with no '/', '\\' or '..' in its name"),
            std::string(index));
    }
}

/// What an index file says: the shard of each tensor. Keys other than `weight_map` are ignored, as transformers does.
/// Throws format_error for JSON that is not an index, or names a shard outside the directory.
[[nodiscard]] inline std::map<std::string, std::string> read_index(const std::filesystem::path& path)
{
    const auto file = path.string();
    const auto json = parse_json(read_text_file(path), file);
    if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
        raise<format_error>(
            error_code::index_field, "has no object 'weight_map'; an index maps each tensor's name to its shard", file);
    }
    std::map<std::string, std::string> result;
    for (const auto& [name, shard] : json["weight_map"].items()) {
        if (!shard.is_string()) {
            raise<format_error>(
                error_code::index_field, message("maps tensor '", name, "' to something that is not a string"), file);
        }
        const auto& text = shard.get_ref<const std::string&>();
        check_shard_name(text, file);
        result.emplace(name, text);
    }
    return result;
}

/// Whether a file's name is that of an index of shards: `model.safetensors.index.json`, another stem, as diffusers has
/// it, or a variant (`….safetensors.index.fp16.json`).
[[nodiscard]] inline bool is_index_name(std::string_view name)
{
    const auto at = name.find(".safetensors.index.");
    return at != name.npos && at > 0 && name.ends_with(".json");
}

/// The same for PyTorch's shards: `pytorch_model.bin.index.json`.
[[nodiscard]] inline bool is_pytorch_index_name(std::string_view name)
{
    const auto at = name.find(".bin.index.");
    return at != name.npos && at > 0 && name.ends_with(".json");
}

/// The parts of a shard's name, such as `model-00001-of-00003.safetensors`.
struct shard_name_parts {
    std::string stem, rest; ///< before the numbers, and what stands after them
    std::size_t number = 0, count = 0; ///< the two numbers
};
/// The parts of a shard's name, which ends as `ending` says; empty for a name that is none.
[[nodiscard]] inline std::optional<shard_name_parts> parse_shard_name(
    std::string_view name, std::string_view ending = ".safetensors")
{
    constexpr std::size_t digits = 5;
    constexpr std::string_view between = "-of-";
    if (!name.ends_with(ending)) { return std::nullopt; }
    for (std::size_t at = name.find('-'); at != name.npos; at = name.find('-', at + 1)) {
        const auto field = name.substr(at + 1);
        if (field.size() < 2 * digits + between.size() + ending.size()
            || field.substr(digits, between.size()) != between) {
            continue;
        }
        std::size_t values[2] = {0, 0};
        bool numbers = true;
        for (std::size_t i = 0; i < 2; ++i) {
            for (const char c : field.substr(i * (digits + between.size()), digits)) {
                numbers = numbers && c >= '0' && c <= '9';
                values[i] = 10 * values[i] + static_cast<std::size_t>(c - '0');
            }
        }
        if (!numbers || values[0] == 0 || values[0] > values[1]) { continue; }
        return shard_name_parts{std::string(name.substr(0, at)), std::string(field.substr(2 * digits + between.size())),
            values[0], values[1]};
    }
    return std::nullopt;
}

namespace detail {

/// What a directory holds that could be a model, by name.
struct model_directory {
    std::vector<std::string> indexes, weights, others, folders;
    std::error_code unreadable; ///< why it could not be looked into

    explicit model_directory(const std::filesystem::path& path)
    {
        std::error_code ignored;
        std::filesystem::directory_iterator it(path, ignored);
        unreadable = ignored;
        for (const std::filesystem::directory_iterator end; !ignored && it != end; it.increment(ignored)) {
            const auto name = it->path().filename().string();
            std::error_code unknown;
            if (it->is_directory(unknown)) { folders.push_back(name); }
            else if (is_index_name(name)) {
                indexes.push_back(name);
            }
            else if (name.ends_with(".safetensors")) {
                weights.push_back(name);
            }
            else {
                others.push_back(name);
            }
        }
        for (auto* list : {&indexes, &weights, &others, &folders}) { std::sort(list->begin(), list->end()); }
    }
};

[[nodiscard]] inline std::string quoted_list(const std::vector<std::string>& names, std::size_t most = 4)
{
    std::string text;
    for (std::size_t i = 0; i < names.size() && i < most; ++i) { text += (i ? ", '" : "'") + names[i] + "'"; }
    return names.size() > most ? text + " and " + std::to_string(names.size() - most) + " more" : text;
}

/// Whether a file's name is one that PyTorch's weights have; not what training keeps beside them.
[[nodiscard]] inline bool may_be_pytorch_weights(std::string_view name)
{
    for (const std::string_view beside : {"training_args.", "optimizer", "scheduler", "scaler", "rng_state",
             "random_states", "trainer_state", "global_step"}) {
        if (name.starts_with(beside)) { return false; }
    }
    for (const std::string_view ending : {".bin", ".pt", ".pth", ".ckpt"}) {
        if (name.ends_with(ending)) { return true; }
    }
    return false;
}

/// The one file of a directory that PyTorch's weights may lie in, by its name and content. Nothing where there are
/// several.
[[nodiscard]] inline std::optional<std::string> only_pytorch_file(
    const std::filesystem::path& directory, const std::vector<std::string>& names)
{
    const auto first = std::find_if(names.begin(), names.end(), may_be_pytorch_weights);
    if (first == names.end() || std::find_if(first + 1, names.end(), may_be_pytorch_weights) != names.end()) {
        return std::nullopt;
    }
    std::error_code ignored;
    if (std::filesystem::file_size(directory / *first, ignored) == 0 || ignored) { return std::nullopt; }
    const mapped_file map(directory / *first);
    const auto kind = what_is_this_file(map.bytes());
    return kind && kind->what == pytorch_archive ? std::optional(*first) : std::nullopt;
}

/// Says of a directory without a model what it holds instead, and what to name.
[[noreturn]] TASKVEC_COLD inline void refuse_directory(const std::filesystem::path& path, const model_directory& found)
{
    const auto fail = [&](const std::string& what) {
        raise<io_error>(error_code::model_not_found, what, path.string());
    };
    if (found.unreadable) { raise_io(path, "cannot be read as a directory", found.unreadable.value()); }
    std::error_code ignored;
    std::vector<std::string> inner;
    for (const auto& folder : found.folders) {
        const model_directory inside(path / folder);
        if (!inside.weights.empty() || !inside.indexes.empty()) { inner.push_back(folder); }
    }
    for (const auto& name : found.weights) {
        if (name == "adapter_model.safetensors") {
            fail("holds an adapter ('adapter_model.safetensors'), not a model: name the model that it was trained on, "
                 "or read it as an adapter");
        }
    }
    if (found.weights.size() > 1) {
        fail(message("holds no '", single_file_name, "', no index, and several files (", quoted_list(found.weights),
            "): name the file that is meant"));
    }
    std::vector<std::string> pytorch;
    std::copy_if(found.others.begin(), found.others.end(), std::back_inserter(pytorch), may_be_pytorch_weights);
    if (pytorch.size() > 1) {
        fail(message("holds no safetensors file, and several of PyTorch's (", quoted_list(pytorch),
            "): name the file that is meant"));
    }
    for (const auto& name : found.others) {
        for (const std::string_view ending :
            {".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl"}) {
            if (!name.ends_with(ending) || name == "training_args.bin" || name == "optimizer.bin"
                || name == "optimizer.pt" || name == "scheduler.pt" || name == "scheduler.bin") {
                continue;
            }
            std::string what = "the weights lie in files of another format";
            std::string mend = std::string(convert_to_safetensors);
            if (std::filesystem::file_size(path / name, ignored) > 0 && !ignored && !name.ends_with(".json")) {
                const mapped_file file(path / name);
                if (const auto kind = what_is_this_file(file.bytes())) {
                    what = "that is " + kind->what;
                    mend = kind->mend;
                }
            }
            fail(message("holds no safetensors file, but '", name, "': ", what, "; ", mend));
        }
    }
    if (!inner.empty()) {
        fail(message("holds no model itself, but its folders do (", quoted_list(inner), "): name one of them"));
    }
    raise<io_error>(error_code::model_not_found,
        message("holds neither '", single_file_name, "' nor '", index_file_name,
            "'; name a checkpoint directory or a .safetensors file"),
        path.string());
}

/// A file of tensors: safetensors, or PyTorch's, as its first bytes say.
[[nodiscard]] inline safetensors_file open_weights(const std::filesystem::path& path, std::vector<std::string>& notes)
{
    mapped_file map(path);
    const auto bytes = map.bytes();
    constexpr std::string_view zip = "PK\x03\x04";
    if (bytes.size() < zip.size() || std::memcmp(bytes.data(), zip.data(), zip.size()) != 0) {
        auto header = parse_safetensors(bytes, path.string());
        return {std::move(map), std::move(header)};
    }
    auto contents = parse_pytorch(bytes, path.string());
    std::error_code unknown;
    auto rows = lay_out_rows(contents, bytes, path.string(), std::filesystem::temp_directory_path(unknown));
    notes.insert(notes.end(), contents.notes.begin(), contents.notes.end());
    return {std::move(map), std::move(contents.header), std::move(rows)};
}

/// Shards of the set that an index's shards belong to (by stem, count, and what stands after the numbers) that it does
/// not name: `listed` has those that it does.
[[nodiscard]] inline std::vector<std::string> shards_beside(
    const std::filesystem::path& directory, const std::map<std::string_view, std::size_t>& listed)
{
    std::vector<std::string> found;
    const std::string_view first = listed.empty() ? std::string_view() : listed.begin()->first;
    for (const std::string_view ending : {".safetensors", ".bin"}) {
        const auto set = parse_shard_name(first, ending);
        if (!set) { continue; }
        std::error_code ignored;
        std::filesystem::directory_iterator it(directory, ignored);
        for (const std::filesystem::directory_iterator end; !ignored && it != end; it.increment(ignored)) {
            auto name = it->path().filename().string();
            const auto parts = parse_shard_name(name, ending);
            if (parts && parts->stem == set->stem && parts->rest == set->rest && parts->count == set->count
                && !listed.contains(name)) {
                found.push_back(std::move(name));
            }
        }
    }
    std::sort(found.begin(), found.end());
    return found;
}

/// The shards that an index names, beside it.
[[nodiscard]] inline checkpoint open_indexed(
    const std::filesystem::path& path, const std::filesystem::path& index_path, index_check how)
{
    const auto directory = directory_of(index_path);
    const auto index_name = index_path.filename().string();
    const auto index = read_index(index_path);
    const bool strict = how == index_check::strict;
    std::vector<safetensors_file> files;
    std::vector<std::string> names, notes;
    std::map<std::string_view, std::size_t> expected;
    for (const auto& [name, shard] : index) { ++expected[shard]; }
    std::error_code ignored;
    for (const auto& [shard, count] : expected) {
        if (!std::filesystem::exists(directory / shard, ignored)) {
            const auto what = message("the shard '", shard, "' of '", index_name, "', with ", count,
                count == 1 ? " tensor" : " tensors", ", is not there");
            if (strict) {
                raise<io_error>(error_code::file_not_found,
                    message(what, ": fetch it, or go on without it (index_check::lenient; the tool: --index lenient)"),
                    path.string());
            }
            notes.push_back(message("'", path.string(), "': ", what));
            continue;
        }
        auto& file = files.emplace_back(open_weights(directory / shard, notes));
        names.emplace_back(shard);
        std::map<std::string_view, bool> present;
        for (const auto& entry : file.entries()) {
            const auto place = index.find(entry.name);
            present[entry.name] = true;
            if (place != index.end() && place->second == shard) { continue; }
            const auto what = message("holds tensor '", entry.name, "', which '", index_name, "' ",
                place == index.end() ? std::string("does not list") : "places in '" + place->second + "'");
            if (strict) {
                raise<format_error>(error_code::file_tensors,
                    what + " (index_check::lenient goes on; in the tool, --index lenient)", file.path().string());
            }
            notes.push_back(message("'", file.path().string(), "' ", what,
                place == index.end() ? ": it is taken" : ": the one there is taken"));
        }
        for (const auto& [name, where] : index) {
            if (where != shard || present.contains(name)) { continue; }
            const auto what = message("lacks tensor '", name, "', which '", index_name, "' places there");
            if (strict) {
                raise<format_error>(error_code::file_tensors,
                    what + " (index_check::lenient goes on; in the tool, --index lenient)", file.path().string());
            }
            notes.push_back(message("'", file.path().string(), "' ", what));
        }
    }
    for (const auto& shard : shards_beside(directory, expected)) {
        const auto what = message("does not list the shard '", shard, "' of the same set, which lies beside it");
        if (strict) {
            raise<format_error>(error_code::file_tensors,
                message(what,
                    ": fetch the index again, or take its tensors too (index_check::lenient; the tool: "
                    "--index lenient)"),
                index_path.string());
        }
        notes.push_back(message("'", index_path.string(), "' ", what, ": its tensors are taken"));
        files.push_back(open_weights(directory / shard, notes));
        names.push_back(shard);
    }
    const auto take = [&](std::size_t f, const safetensors_entry& entry) {
        const auto place = index.find(entry.name);
        return place == index.end() || place->second == names[f];
    };
    return {path, std::move(files), take, std::move(notes)};
}

} // namespace detail

/// The hints of the configuration beside a model.
[[nodiscard]] inline quantised_layers::hint_source hints_beside(const std::filesystem::path& model)
{
    return [model] {
        std::error_code unknown;
        const auto folder = std::filesystem::is_directory(model, unknown) ? model : detail::directory_of(model);
        return read_quantisation_hints(folder / "config.json");
    };
}

/// Opens a model: a safetensors file; an index of shards (any `*.safetensors.index.json`); or a directory. Of what a
/// directory holds, the first of these is the model: `model.safetensors`; `model.safetensors.index.json`; diffusers'
/// `diffusion_pytorch_model` in the same two ways; the only index; a whole set of shards without one (with a note); the
/// only .safetensors file that is neither a delta nor an adapter; where there are none, `pytorch_model.bin` or its
/// index, diffusers', and a whole set of such shards. PyTorch's files are read as formats/pytorch.hpp says, whatever
/// they are called. An index is an allowlist: shards hold exactly the tensors that it gives them, unless `how` is
/// lenient. Quantised layers are tensors of numbers in model() where their scheme is read, and are found in
/// layers()->unread() where it is not. Throws io_error, format_error. Cost: O(headers), and the scales of quantised
/// layers.
///
///     const auto base = taskvec::open_model("base");
///     for (const auto& [name, tensor] : base.model()) { … }
[[nodiscard]] checkpoint open_model(const std::filesystem::path& path, index_check how = index_check::strict);

namespace detail {
[[nodiscard]] inline checkpoint open_stored(const std::filesystem::path& path, index_check how)
{
    std::error_code ignored;
    std::vector<safetensors_file> files;
    const auto single = [&](const std::filesystem::path& file, std::vector<std::string> notes = {}) -> checkpoint {
        files.push_back(detail::open_weights(file, notes));
        return {path, std::move(files), {}, std::move(notes)};
    };
    if (!std::filesystem::is_directory(path, ignored)) {
        const auto name = path.filename().string();
        if (is_index_name(name) || is_pytorch_index_name(name)) { return detail::open_indexed(path, path, how); }
        std::vector<std::string> notes;
        if (const auto parts = parse_shard_name(name); parts && parts->count > 1) {
            notes.push_back(message("'", path.string(), "' is shard ", parts->number, " of ", parts->count,
                ": its directory or its index names the whole model"));
        }
        return single(path, std::move(notes));
    }
    const auto has = [&](std::string_view name) { return std::filesystem::exists(path / name, ignored); };
    for (const std::string_view stem : model_stems) {
        const std::string file = std::string(stem) + ".safetensors", index = file + ".index.json";
        if (has(file)) { return single(path / file); }
        if (has(index)) { return detail::open_indexed(path, path / index, how); }
    }
    const detail::model_directory found(path);
    if (found.indexes.size() == 1) { return detail::open_indexed(path, path / found.indexes.front(), how); }
    if (found.indexes.size() > 1) {
        raise<io_error>(error_code::model_not_found,
            message("holds several indexes (", detail::quoted_list(found.indexes),
                "): name the one that is meant, by its path"),
            path.string());
    }
    using shard_sets = std::map<std::pair<std::string, std::size_t>, std::vector<std::string>>;
    const auto whole_set = [&](const shard_sets& sets) -> checkpoint {
        const auto& [key, names] = *sets.begin();
        if (names.size() != key.second) {
            raise<io_error>(error_code::file_not_found,
                message("holds ", names.size(), " of ", key.second, " shards (", detail::quoted_list(names),
                    ") and no index: fetch the others"),
                path.string());
        }
        std::vector<std::string> notes{
            message("'", path.string(), "' holds no index: all ", names.size(), " shards are taken")};
        for (const auto& name : names) { files.push_back(detail::open_weights(path / name, notes)); }
        return {path, std::move(files), {}, std::move(notes)};
    };
    shard_sets sets; // shards by stem, rest and count
    std::vector<std::string> whole;
    for (const auto& name : found.weights) {
        if (const auto parts = parse_shard_name(name)) {
            sets[{parts->stem + " " + parts->rest, parts->count}].push_back(name);
        }
        else if (!name.ends_with(".delta.safetensors") && name != "adapter_model.safetensors") {
            whole.push_back(name);
        }
    }
    if (sets.size() == 1 && whole.empty()) { return whole_set(sets); }
    if (whole.size() == 1 && sets.empty()) { return single(path / whole.front()); }
    if (whole.empty() && sets.empty()) {
        for (const std::string_view stem : {"pytorch_model", "diffusion_pytorch_model"}) {
            const std::string file = std::string(stem) + ".bin", index = file + ".index.json";
            if (has(file)) { return single(path / file); }
            if (has(index)) { return detail::open_indexed(path, path / index, how); }
        }
        for (const auto& name : found.others) {
            if (const auto parts = parse_shard_name(name, ".bin")) {
                sets[{parts->stem + " " + parts->rest, parts->count}].push_back(name);
            }
        }
        if (sets.size() == 1) { return whole_set(sets); }
        if (const auto file = detail::only_pytorch_file(path, found.others); sets.empty() && file) {
            return single(path / *file,
                {message("'", path.string(), "' holds no safetensors file: '", *file, "' is taken, its only weights")});
        }
    }
    detail::refuse_directory(path, found);
}
} // namespace detail

inline checkpoint open_model(const std::filesystem::path& path, index_check how)
{
    auto model = detail::open_stored(path, how);
    model.read_layers(hints_beside(path));
    return model;
}

/// How a model is split into shards: for each tensor its shard, tensors taken in name order, a new shard begun when the
/// next tensor would take the current one above `shard_size` bytes of data (a larger tensor has a shard of its own).
struct shard_plan {
    std::vector<std::size_t> shard_of; ///< for each spec
    std::size_t shards = 0; ///< how many there are
    std::uint64_t total_bytes = 0; ///< of all tensors
};
/// Splits tensors into shards of at most `shard_size` bytes, as shard_plan says.
[[nodiscard]] inline shard_plan plan_shards(const std::vector<tensor_spec>& specs, std::uint64_t shard_size)
{
    if (shard_size == 0) {
        raise<invalid_argument>(error_code::parameter_out_of_range, "a shard size of 0 bytes; expected at least 1");
    }
    std::vector<std::size_t> order(specs.size());
    for (std::size_t i = 0; i < order.size(); ++i) { order[i] = i; }
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return specs[a].name < specs[b].name; });
    shard_plan plan;
    plan.shard_of.resize(specs.size());
    plan.shards = 1;
    std::uint64_t held = 0;
    for (const auto index : order) {
        const std::uint64_t bytes = specs[index].bytes();
        if (held && bytes > shard_size - std::min(held, shard_size)) {
            ++plan.shards;
            held = 0;
        }
        plan.shard_of[index] = plan.shards - 1;
        held += bytes;
        plan.total_bytes += bytes;
    }
    return plan;
}

namespace detail {
/// The tensors of each shard. `place` receives the place of each tensor in its shard.
[[nodiscard]] inline std::vector<std::vector<tensor_spec>> tensors_of_shards(
    const shard_plan& plan, const std::vector<tensor_spec>& specs, std::vector<std::size_t>& place)
{
    std::vector<std::vector<tensor_spec>> parts(plan.shards);
    place.resize(specs.size());
    for (std::size_t i = 0; i < specs.size(); ++i) {
        auto& part = parts[plan.shard_of[i]];
        place[i] = part.size();
        part.push_back(specs[i]);
    }
    return parts;
}
/// The files of the model that a directory holds, as far as its index can be read.
[[nodiscard]] inline std::vector<std::string> model_files_in(const std::filesystem::path& directory)
{
    std::vector<std::string> result;
    std::error_code ignored;
    for (const std::string_view stem : model_stems) {
        const std::string single = std::string(stem) + ".safetensors", index = single + ".index.json";
        if (std::filesystem::exists(directory / single, ignored)) { result.push_back(single); }
        if (!std::filesystem::exists(directory / index, ignored)) { continue; }
        for (const auto& [name, shard] : read_index(directory / index)) {
            if (std::find(result.begin(), result.end(), shard) == result.end()) { result.push_back(shard); }
        }
        result.push_back(index);
    }
    return result;
}
[[nodiscard]] inline std::string lines_of(const std::vector<std::string>& names)
{
    std::string text;
    for (const auto& name : names) { text += name + '\n'; }
    return text;
}
} // namespace detail

/// The shards that a killed writer gave their names in a directory before their index had its own: what it noted in the
/// lock, less what an index of the directory names by now. Throws format_error for an index that cannot be read.
[[nodiscard]] inline std::vector<std::string> orphan_shards(
    const std::filesystem::path& directory, const directory_lock& lock)
{
    std::vector<std::string> result;
    const std::string text = lock.noted();
    if (text.empty()) { return result; }
    const auto present = detail::model_files_in(directory);
    for (std::size_t at = 0, end = 0; (end = text.find('\n', at)) != text.npos; at = end + 1) {
        auto name = text.substr(at, end - at);
        const bool of_a_model = std::any_of(std::begin(model_stems), std::end(model_stems),
                                    [&](std::string_view stem) { return name.starts_with(std::string(stem) + "-"); })
            && name.ends_with(".safetensors") && name.find('/') == name.npos;
        if (of_a_model && std::find(present.begin(), present.end(), name) == present.end()) {
            result.push_back(std::move(name));
        }
    }
    return result;
}

/// Writes a checkpoint directory: `model-00001-of-000NN.safetensors` … and their index, or `model.safetensors` when one
/// shard is enough. A directory that does not exist appears whole or not at all; in one that does, other files are left
/// alone.
///
/// All shards are complete and on disk under temporary names before the first takes its own; the index (or the single
/// file) takes its name last, and is what decides which model the directory holds. Where a shard's name is taken, by
/// an earlier model in the same directory, the new one is called `model-00001-of-000NN-2.safetensors` and so on, so a
/// crash at any moment leaves the earlier model whole or the new one. Once the new one stands, the earlier one's files
/// are removed, and where a writer is killed before, its own are by the next. As many files are open as are written to
/// at once. One writer at a time has an existing directory: a second one throws io_error (see directory_lock).
///
///     taskvec::sharded_writer out("merged", specs, 5'000'000'000);
///     out.write(index, offset, data, size);
///     out.commit();
class sharded_writer final : public tensor_sink {
public:
    /// `existing`: whether a directory that is there is exchanged for one with the new files and all others, so that
    /// what else is written to folder() changes with them. `finished`: where all shards lie already, in order, for
    /// instance by resumable_shards; then nothing is to be written. `stem`: one of model_stems, for the names.
    sharded_writer(std::filesystem::path directory, const std::vector<tensor_spec>& specs, std::uint64_t shard_size,
        const metadata_map& metadata = {}, durability mode = durability::synchronised,
        existing_directory existing = existing_directory::fill, const std::vector<std::filesystem::path>& finished = {},
        std::string_view stem = model_stems[0])
        : directory_(std::move(directory))
        , stem_(stem)
        , mode_(mode)
        , plan_(plan_shards(specs, shard_size))
    {
        const auto parts = detail::tensors_of_shards(plan_, specs, place_);
        for (const auto& part : parts) {
            (void)layout_safetensors(part, metadata);
        } // whatever is wrong with the specs is wrong before a directory appears
        (void)present_files(); // an index that cannot be read is refused before anything is written
        folder_.emplace(directory_, mode, existing); // from here on nobody else takes names in the directory
        old_ = present_files();
        if (const auto* const lock = folder_->lock()) {
            for (const auto& name : orphan_shards(directory_, *lock)) {
                detail::system::remove_file(directory_ / name);
            }
        }
        const std::size_t generation = plan_.shards == 1 ? 1 : free_generation();
        for (std::size_t i = 0; i < parts.size(); ++i) {
            names_.push_back(plan_.shards == 1 ? single_name() : shard_name(i, generation));
        }
        for (std::size_t i = 0; i < parts.size(); ++i) {
            auto path = folder_->path() / names_[i];
            writers_.push_back(finished.empty()
                    ? std::make_unique<safetensors_writer>(std::move(path), parts[i], metadata, mode)
                    : std::make_unique<safetensors_writer>(std::move(path), parts[i], metadata, mode, finished.at(i)));
            if (parts.size() > 1) { writers_.back()->open_on_demand(); }
        }
        if (plan_.shards > 1) {
            std::string json = "{\n  \"metadata\": {\n    \"total_size\": " + std::to_string(plan_.total_bytes)
                + "\n  },\n  \"weight_map\": {";
            std::map<std::string_view, std::size_t> by_name;
            for (std::size_t i = 0; i < specs.size(); ++i) { by_name[specs[i].name] = plan_.shard_of[i]; }
            if (by_name.size() != specs.size()) {
                raise<invalid_argument>(
                    error_code::tensor_repeated, "a tensor's name occurs twice in the model to be written");
            }
            for (const auto& [name, shard] : by_name) {
                json +=
                    (json.back() == '{' ? "\n    " : ",\n    ") + json_string(name) + ": " + json_string(names_[shard]);
            }
            json += "\n  }\n}\n";
            index_ = std::make_unique<atomic_file>(folder_->path() / index_name(), json.size(), mode);
            index_->write(0, json.data(), json.size());
        }
    }
    sharded_writer(const sharded_writer&) = delete;
    sharded_writer& operator=(const sharded_writer&) = delete;
    ~sharded_writer() override
    {
        // Shards that took their names before a failure belong to no index.
        for (const auto& path : unlisted_) {
            detail::system::remove_file(path);
            detail::temporaries::drop(path);
        }
    }

    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        if (index >= place_.size()) {
            raise<invalid_argument>(
                error_code::index_out_of_range, message("a write to tensor ", index, " of ", place_.size()));
        }
        writers_[plan_.shard_of[index]]->write(place_[index], offset, data, size);
    }

    /// Forces all files to disk, so that commit() only renames.
    void finish()
    {
        for (auto& writer : writers_) { writer->finish(); }
        if (index_) { index_->finish(); }
    }
    /// Gives the files their names; see above for the order.
    void commit()
    {
        finish();
        // Once the index, or the single file, has its name nothing may fail, memory included.
        const bool in_place = folder_->made().empty();
        std::vector<std::string> obsolete;
        for (const auto& name : old_) {
            // An index that somebody else wrote may name any file: only what is called a model's is removed.
            const bool of_a_model = is_index_name(name) || name.ends_with(".safetensors");
            if (of_a_model && std::find(names_.begin(), names_.end(), name) == names_.end()
                && !(index_ && name == index_name())) {
                obsolete.push_back(name);
            }
        }
        std::vector<std::filesystem::path> superseded;
        for (const auto& name : obsolete) { superseded.push_back(directory_ / name); }
        if (index_ && in_place) {
            for (const auto& writer : writers_) { unlisted_.push_back(writer->target()); }
            if (auto* const lock = folder_->lock()) {
                lock->note(detail::lines_of(names_));
                // Also after a power cut the lock is there before the first of the names.
                if (mode_ == durability::synchronised) { detail::synchronise_directory(folder_->path()); }
            }
            for (const auto& path : unlisted_) { detail::temporaries::add(path); }
        }
        for (auto& writer : writers_) { writer->commit(false); }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(folder_->path()); }
        if (index_) { index_->commit(); }
        for (const auto& path : unlisted_) { detail::temporaries::drop(path); }
        unlisted_.clear();
        folder_->commit(obsolete);
        if (!in_place) { return; }
        for (const auto& path : superseded) { detail::system::remove_file(path); }
        // `model.safetensors` comes before an index when a directory is opened, and both before diffusers' files: with
        // them gone, the new model takes effect.
        for (const auto& name : opened_before()) {
            if (detail::system::status status; detail::system::look_at_link(directory_ / name, status)) {
                raise<io_error>(error_code::system_refused,
                    "is an earlier model's and cannot be removed: the new model lies beside it, whole, and takes "
                    "effect once this file is gone",
                    (directory_ / name).string());
            }
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(directory_); }
    }

    /// Where the files are written until commit(): for what is to lie beside them.
    [[nodiscard]] const std::filesystem::path& folder() const noexcept { return folder_->path(); }
    /// The files' names, in shard order.
    [[nodiscard]] const std::vector<std::string>& names() const noexcept { return names_; }
    /// The shards' temporary names, for whoever reads them back between finish() and commit().
    [[nodiscard]] std::vector<std::filesystem::path> shard_temporaries() const
    {
        std::vector<std::filesystem::path> result;
        for (const auto& writer : writers_) { result.push_back(writer->temporary()); }
        return result;
    }
    /// All temporary files, and before them the directories that were made for them, for whoever must remove them when
    /// no destructor can run.
    [[nodiscard]] std::vector<std::filesystem::path> temporaries() const
    {
        auto result = folder_->made();
        if (auto lock = folder_->lock_file(); !lock.empty()) { result.push_back(std::move(lock)); }
        const auto shards = shard_temporaries();
        result.insert(result.end(), shards.begin(), shards.end());
        if (index_) { result.push_back(index_->temporary()); }
        return result;
    }
    /// Bytes of all shards together.
    [[nodiscard]] std::uint64_t file_size() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& writer : writers_) { total += writer->file_size(); }
        return total;
    }

private:
    [[nodiscard]] std::string shard_name(std::size_t index, std::size_t generation) const
    {
        const auto padded = [](std::size_t number) {
            const auto digits = std::to_string(number);
            return std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
        };
        return stem_ + "-" + padded(index + 1) + "-of-" + padded(plan_.shards)
            + (generation > 1 ? "-" + std::to_string(generation) : "") + ".safetensors";
    }
    /// The first generation none of whose shard names is taken.
    [[nodiscard]] std::size_t free_generation() const
    {
        std::error_code ignored;
        for (std::size_t generation = 1;; ++generation) {
            bool taken = false;
            for (std::size_t i = 0; i < plan_.shards && !taken; ++i) {
                taken = std::filesystem::exists(directory_ / shard_name(i, generation), ignored);
            }
            if (!taken) { return generation; }
        }
    }
    [[nodiscard]] std::vector<std::string> present_files() const { return detail::model_files_in(directory_); }
    [[nodiscard]] std::string single_name() const { return stem_ + ".safetensors"; }
    [[nodiscard]] std::string index_name() const { return single_name() + ".index.json"; }
    /// What open_model() would take in place of what is written here.
    [[nodiscard]] std::vector<std::string> opened_before() const
    {
        std::vector<std::string> names;
        for (const std::string_view stem : model_stems) {
            const std::string single = std::string(stem) + ".safetensors";
            if (stem == stem_) {
                if (index_) { names.push_back(single); }
                break;
            }
            names.push_back(single);
            names.push_back(single + ".index.json");
        }
        return names;
    }

    std::filesystem::path directory_;
    std::string stem_;
    std::optional<output_directory> folder_; // before the files in it, so that it outlives them
    durability mode_;
    shard_plan plan_;
    std::vector<std::size_t> place_; // of each tensor within its shard
    std::vector<std::string> names_, old_; // the new files, and those of the model that they replace
    std::vector<std::filesystem::path> unlisted_; // shards with their names whose index has not taken its own
    std::vector<std::unique_ptr<safetensors_writer>> writers_;
    std::unique_ptr<atomic_file> index_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_CHECKPOINT_HPP

// ---- taskvec/formats/name_pattern.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_NAME_PATTERN_HPP)
#define TASKVEC_SINGLE_FORMATS_NAME_PATTERN_HPP
// Regular expressions over tensor names. Both may come from files, so neither may cost more than it says.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cstddef>
#include <iterator>
#include <regex>
#include <string>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// An ECMAScript regular expression that is matched against names of tensors and modules. Where the standard library
/// can, without backtracking: no pattern takes exponential time and no name exhausts the stack; back-references are
/// refused. Patterns have at most 1,000 bytes, names at most 4,096. The time of a match is bounded by the product of
/// the two, times the name's length again where there is a look-ahead such as `(?!lm_head)`: counted repeats such as
/// `x{3}` are written out, and a pattern may have at most 2,000 characters and groups that way; a count has at most
/// four digits; a look-ahead holds no other.
///
///     const name_pattern pattern("layers\\.[0-9]+\\.weight");
///     bool in = pattern.occurs_in("model.layers.3.weight");
class name_pattern {
public:
    /// Bytes of a pattern, bytes of a name, and characters of a pattern with its counted repeats written out.
    static constexpr std::size_t longest_pattern = 1000, longest_name = 4096, largest_expansion = 2000;

    /// Throws invalid_argument for text that is not a regular expression, saying why.
    explicit name_pattern(const std::string& text)
    {
        if (text.size() > longest_pattern) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("a regular expression of ", text.size(), " bytes; expected at most ", longest_pattern));
        }
        check_budget(text);
#if !defined(TASKVEC_NO_EXCEPTIONS)
        try {
            compile(text);
        }
        catch (const std::regex_error& problem) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' is not a regular expression that is understood here: ", problem.what()));
        }
#else
        compile(text);
#endif
    }

    /// Whether the whole name matches. Throws invalid_argument for a name that is too long.
    [[nodiscard]] bool matches(std::string_view name) const
    {
        return std::regex_match(checked(name).begin(), name.end(), expression_);
    }
    /// Whether a part of the name matches. Throws like matches().
    [[nodiscard]] bool occurs_in(std::string_view name) const
    {
#if defined(__GLIBCXX__)
        return std::regex_match(checked(name).begin(), name.end(), within_);
#else
        return std::regex_search(checked(name).begin(), name.end(), expression_);
#endif
    }
    /// The name with each match replaced; `$1` stands for a group, `$&` for the match, as in ECMAScript. Throws like
    /// matches(). What groups hold is kept for this alone, and costs more than matching: not for hostile patterns.
    [[nodiscard]] std::string replaced_in(std::string_view name, const std::string& replacement) const
    {
        std::string result;
        std::regex_replace(
            std::back_inserter(result), checked(name).begin(), name.end(), std::regex(text_, flags), replacement);
        return result;
    }

private:
#if defined(__GLIBCXX__)
    static constexpr auto flags = std::regex::ECMAScript | std::regex::optimize | std::regex_constants::__polynomial;
#else
    static constexpr auto flags = std::regex::ECMAScript | std::regex::optimize;
#endif
    void compile(const std::string& text)
    {
        expression_ = std::regex(text, flags | std::regex::nosubs);
#if defined(__GLIBCXX__)
        // A search would begin anew at every character of the name; this is one walk over it.
        within_ = std::regex("[^]*(?:" + text + ")[^]*", flags | std::regex::nosubs);
#endif
        text_ = text;
    }

    /// Refuses what would take long. What is no pattern passes; the parser refuses it afterwards.
    static void check_budget(std::string_view text)
    {
        struct group {
            std::size_t size = 0; ///< with the repeats written out; never more than what is too large
            bool looks_ahead = false;
        };
        constexpr std::size_t too_large = largest_expansion + 1;
        std::vector<group> open{{}}; // outermost first
        std::size_t last = 0; // the size of what a repeat would repeat
        bool fits = true, nested = false, refers_back = false;
        const auto grow = [&](std::size_t size) { open.back().size = std::min(open.back().size + size, too_large); };
        const auto add = [&](std::size_t size) {
            last = size;
            grow(size);
        };
        for (std::size_t at = 0; at < text.size(); ++at) {
            const char c = text[at];
            if (c == '\\') {
                // Parsers compute the number of a back-reference without looking whether it fits their integers.
                ++at;
                refers_back = refers_back || (at < text.size() && text[at] >= '1' && text[at] <= '9');
                add(1);
            }
            else if (c == '[') {
                at = end_of_class(text, at + 1);
                add(1);
            }
            else if (c == '(') {
                const auto kind = text.substr(at + 1, 2);
                const bool looks = kind == "?=" || kind == "?!";
                nested = nested || (looks && open.back().looks_ahead);
                open.push_back({1, looks || open.back().looks_ahead});
            }
            else if (c == ')' && open.size() > 1) {
                const auto inner = open.back().size;
                open.pop_back();
                add(inner);
            }
            else if (c == '{') {
                std::size_t most = 0, value = 0, digits = 0;
                for (++at; at < text.size() && text[at] != '}'; ++at) {
                    if (text[at] < '0' || text[at] > '9') {
                        value = digits = 0;
                        continue;
                    }
                    fits = fits && ++digits <= 4;
                    value = std::min<std::size_t>(10 * value + static_cast<std::size_t>(text[at] - '0'), 10'000);
                    most = std::max(most, value);
                }
                if (most > 1) {
                    grow(std::min(last * (most - 1), too_large));
                    last = std::min(last * most, too_large);
                }
            }
            else {
                add(1);
            }
        }
        if (refers_back) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' has a back-reference such as '\\1': write out what it refers to"));
        }
        std::size_t total = 0;
        for (const auto& part : open) { total += part.size; }
        if (!fits || total > largest_expansion) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' has more than ", largest_expansion,
                    " characters and groups once its counted repeats are written out: use smaller counts, '*' or '+'"));
        }
        if (nested) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("'", text, "' has a look-ahead within a look-ahead: write one after the other"));
        }
    }
    /// Where the `]` is that ends the class whose inside begins at `at`.
    static std::size_t end_of_class(std::string_view text, std::size_t at)
    {
        for (; at < text.size() && text[at] != ']'; ++at) {
            if (text[at] == '\\') { ++at; }
            else if (text[at] == '[' && at + 1 < text.size()
                && std::string_view(".:=").find(text[at + 1]) != std::string_view::npos) {
                at = std::min(text.find(text[at + 1], at + 2), text.size() - 1) + 1; // [:alpha:], [.hyphen.], [=a=]
            }
        }
        return at;
    }
    static std::string_view checked(std::string_view name)
    {
        if (name.size() > longest_name) {
            raise<invalid_argument>(error_code::pattern_invalid,
                message("tensor '", name.substr(0, 60), "…' has a name of ", name.size(),
                    " bytes; regular expressions are matched against at most ", longest_name));
        }
        return name;
    }
    std::string text_;
    std::regex expression_;
#if defined(__GLIBCXX__)
    std::regex within_; ///< the pattern with anything before and after it
#endif
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_NAME_PATTERN_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The file names of an adapter directory, and what PEFT puts before the names of modules.
inline constexpr std::string_view peft_config_name = "adapter_config.json";
/// Of the file that has the factors.
inline constexpr std::string_view peft_model_name = "adapter_model.safetensors";
/// What PEFT wrote before 2024: read as PyTorch files are (formats/pytorch.hpp).
inline constexpr std::string_view peft_pickle_name = "adapter_model.bin";
/// Stands before the name of every module.
inline constexpr std::string_view peft_prefix = "base_model.model.";

/// A tensor that an adapter carries beside its factors: a bias, or a weight of a module that was trained whole.
struct peft_tensor {
    taskvec::dtype dtype = taskvec::dtype::f32; ///< as it is stored
    extents shape{}; ///< slowest first
    std::vector<std::byte> bytes{}; ///< as they are stored
    friend bool operator==(const peft_tensor&, const peft_tensor&) = default;
};

/// What follows the name of an adapted module in the name of the copy of its base weight that an adapter may carry.
inline constexpr std::string_view peft_base_weight = ".base_layer.weight";

/// An adapter as a PEFT directory holds it. Module names are those of the base model ("layers.0.attn.q_proj").
/// The update of an embedding (entries×dimensions) is kept as PEFT factors it, transposed: out = dimensions, in =
/// entries. The weight of a transposed layer (`fan_in_fan_out`) is in×out, its update here out×in like any other.
template <arithmetic_element T>
struct peft_adapter {
    lora_adapter<T> updates{}; ///< factors in T, scaling from the configuration
    std::set<std::string> embeddings{}; ///< which of the modules are embeddings
    std::map<std::string, dtype> stored{}; ///< the dtype of each module's factors in the file; absent: T
    /// Of the modules that are convolutions: their sides, slowest first. The update's `in` counts the kernel.
    std::map<std::string, extents> kernels{};
    std::map<std::string, peft_tensor>
        others{}; ///< biases, copies of base weights, whole modules: by name in the file without PEFT's prefix
    nlohmann::json config = nlohmann::json::object(); ///< the configuration as it was read
    std::string label{}; ///< names the adapter in messages: its directory
};

/// The narrowest floating storage dtype that holds the values of both.
[[nodiscard]] constexpr dtype wider(dtype a, dtype b) noexcept
{
    return a == b ? a : a == dtype::f64 || b == dtype::f64 ? dtype::f64 : dtype::f32;
}

/// What read_peft() accepts beside plain low-rank updates.
struct peft_read_options {
    /// Accept an adapter that is more than low-rank updates because whole weights come with it (modules_to_save,
    /// embeddings that were saved): they are kept in `others`. By default such an adapter is refused. The copies of
    /// base weights that PEFT stores beside the factors of embed_tokens and lm_head are not meant: they are always
    /// accepted.
    bool whole_modules = false;
    /// What messages call the switch above: the caller's own word for it, such as a flag.
    std::string whole_modules_word = "peft_read_options::whole_modules";
    /// What messages advise for DoRA and lora_bias: the caller's own way from there to a plain low-rank update.
    std::string fold_word = "fold it into its base with PEFT and extract an adapter from the result";
    /// What they advise for AdaLoRA, LoHa and LoKr.
    std::string convert_word = "read_adapter() reads it, and converted_adapter() writes it as the LoRA that it equals";
};

namespace detail {

/// PEFT's rule for rank_pattern and alpha_pattern: the first key, in file order, that as a regular expression matches
/// the module's whole name or a dotted end of it.
class peft_patterns {
public:
    struct pattern {
        std::string key;
        name_pattern matcher;
        double value = 0;
        bool used = false;
    };

    peft_patterns() = default;
    peft_patterns(const nlohmann::ordered_json& object, std::string_view field, const std::string& file)
    {
        if (object.is_null()) { return; }
        if (!object.is_object()) {
            raise<format_error>(error_code::adapter_config, message(field, " is not an object"), file);
        }
        for (const auto& [key, value] : object.items()) {
            if (!value.is_number()) {
                raise<format_error>(error_code::adapter_config,
                    message(field, " gives '", key, "' something that is not a number"), file);
            }
            patterns_.push_back({key, compile(key, field, file), value.template get<double>(), false});
        }
    }
    /// The value for a module, or `otherwise`.
    [[nodiscard]] double find(const std::string& module, double otherwise)
    {
        bool found = false;
        for (auto& one : patterns_) {
            if (!one.matcher.matches(module)) { continue; }
            one.used = true;
            if (!found) {
                otherwise = one.value;
                found = true;
            }
        }
        return otherwise;
    }
    /// A key that matched no module is a mistake that PEFT does not notice.
    void check_used(std::string_view field, const std::string& file) const
    {
        for (const auto& one : patterns_) {
            if (!one.used) {
                raise<format_error>(error_code::adapter_config,
                    message(field, " has the key '", one.key,
                        "', which matches no module of the adapter; remove or correct it"),
                    file);
            }
        }
    }

private:
    static name_pattern compile(const std::string& key, std::string_view field, const std::string& file)
    {
#if !defined(TASKVEC_NO_EXCEPTIONS)
        try {
            return name_pattern("(.*\\.)?(" + key + ")");
        }
        catch (const invalid_argument& problem) {
            raise<format_error>(
                error_code::adapter_config, message(field, " has the key '", key, "': ", problem.what()), file);
        }
#else
        (void)field;
        (void)file;
        return name_pattern("(.*\\.)?(" + key + ")");
#endif
    }
    std::vector<pattern> patterns_;
};

/// Fields of adapter_config.json, read with a complaint that names the file and the field.
class peft_fields {
public:
    peft_fields(const nlohmann::json& config, const std::string& file)
        : config_(config)
        , file_(file)
    { }
    [[nodiscard]] const nlohmann::json* find(const char* field) const
    {
        const auto place = config_.find(field);
        return place == config_.end() || place->is_null() ? nullptr : &*place;
    }
    [[nodiscard]] bool flag(const char* field) const
    {
        const auto* value = find(field);
        if (value && !value->is_boolean()) {
            raise<format_error>(
                error_code::adapter_config, message(field, " is ", shown(*value), "; expected true or false"), file_);
        }
        return value && value->get<bool>();
    }
    /// `otherwise` where the field is absent; null is no number.
    [[nodiscard]] double number(const char* field, double otherwise) const
    {
        const auto value = config_.find(field);
        if (value == config_.end()) { return otherwise; }
        if (!value->is_number()) {
            raise<format_error>(
                error_code::adapter_config, message(field, " is ", shown(*value), "; expected a number"), file_);
        }
        return value->get<double>();
    }
    /// Absent, null, a text or a list of texts, as PEFT names modules.
    void check_names(const char* field) const
    {
        const auto* value = find(field);
        if (!value || value->is_string()) { return; }
        if (!value->is_array()
            || !std::all_of(value->begin(), value->end(), [](const auto& one) { return one.is_string(); })) {
            raise<format_error>(error_code::adapter_config,
                message(field, " is ", shown(*value), "; expected names of modules, or a regular expression"), file_);
        }
    }
    /// A value as JSON, shortened for a message.
    [[nodiscard]] static std::string shown(const nlohmann::json& value)
    {
        const auto text = value.dump(-1, ' ', true);
        return text.size() <= 80 ? text : text.substr(0, 80) + "…";
    }
    /// Present and saying something: not null, false, "", [] or {}.
    [[nodiscard]] bool says_something(const char* field) const
    {
        const auto* value = find(field);
        return value && !(value->is_boolean() && !value->get<bool>())
            && !(value->is_string() && value->get_ref<const std::string&>().empty())
            && !((value->is_array() || value->is_object()) && value->empty());
    }

private:
    const nlohmann::json& config_;
    const std::string& file_;
};

/// Fields of a configuration that, where they say something, make an adapter another thing than a change of each weight
/// by itself, whoever reads it, and what each does.
inline constexpr std::array<std::pair<const char*, std::string_view>, 9> beyond_updates{
    {{"use_qalora", "QA-LoRA pools its input"}, {"use_bdlora", "its factors are block-diagonal"},
        {"alora_invocation_tokens", "aLoRA switches on within the input"},
        {"trainable_token_indices", "single rows of an embedding are replaced"},
        {"target_parameters", "bare parameters are adapted"}, {"layer_replication", "the base's layers are repeated"},
        {"kasa_config", "KaSA changes the base weights"}, {"arrow_config", "adapters are routed"},
        {"monteclora_config", "its factors are random variables"}}};

/// The kind of adapter that a configuration names; LORA where it names none.
[[nodiscard]] inline std::string peft_type_of(const nlohmann::json& config)
{
    const auto type = config.is_object() ? config.find("peft_type") : config.end();
    return type != config.end() && type->is_string() ? type->get<std::string>() : "LORA";
}

/// Refuses an initialisation of LoRA that is not one of those that leave the base as it is (pissa, olora, corda, loftq,
/// lora_ga … change it), by refuse(what, why).
template <class Refuse>
void check_lora_initialization(
    const peft_fields& fields, std::initializer_list<std::string_view> harmless, const Refuse& refuse)
{
    const auto* const init = fields.find("init_lora_weights");
    if (!init || !init->is_string()) { return; }
    const auto& name = init->get_ref<const std::string&>();
    if (std::find(harmless.begin(), harmless.end(), name) == harmless.end()) {
        refuse(message("init_lora_weights is '", name, "'"),
            "such an initialisation changes the base weights, by a residual that the adapter does not hold, so that it "
            "is an "
            "update of another base: save it converted to a plain LoRA, by PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=INITIAL) with what was saved before the training");
    }
}

/// Refuses by name whatever is not a plain low-rank update.
inline void check_plain_lora(const nlohmann::json& config, const std::string& file, const peft_read_options& options)
{
    const peft_fields fields(config, file);
    const auto refuse_to = [&](std::string_view mend, std::string_view what, std::string_view why) {
        raise<format_error>(
            error_code::adapter_unsupported, message(what, ": ", why, ", not a plain low-rank update; ", mend), file);
    };
    const auto refuse = [&](std::string_view what, std::string_view why) {
        refuse_to("fold it into its base with PEFT and extract an adapter from the result", what, why);
    };
    const auto* type = fields.find("peft_type");
    if (!type) {
        raise<format_error>(
            error_code::adapter_config, "has no peft_type; expected the configuration of a LoRA adapter", file);
    }
    if (*type != "LORA") {
        const bool convertible = *type == "ADALORA" || *type == "LOHA" || *type == "LOKR";
        const auto what = "peft_type " + (type->is_string() ? type->get<std::string>() : fields.shown(*type));
        if (convertible) { refuse_to(options.convert_word, what, "another kind of adapter"); }
        refuse(what, "another kind of adapter");
    }

    check_lora_initialization(fields, {"gaussian", "eva", "orthogonal"}, refuse);
    if (fields.says_something("use_dora")) { refuse_to(options.fold_word, "use_dora", "DoRA rescales the weights"); }
    if (fields.says_something("lora_bias")) {
        refuse_to(options.fold_word, "lora_bias", "the update has a bias of its own");
    }
    constexpr std::array<std::pair<const char*, std::string_view>, 4> refused{
        {{"corda_config", "CorDA changes the base weights"}, {"lora_ga_config", "LoRA-GA changes the base weights"},
            {"loftq_config", "LoftQ changes the base weights"},
            {"velora_config", "a configuration that is not known here"}}};
    for (const auto& [field, why] : refused) {
        if (fields.says_something(field)) { refuse(field, why); }
    }
    if (fields.says_something("target_parameters")) {
        refuse_to(options.fold_word, "target_parameters", "bare parameters are adapted");
    }
    for (const auto& [field, why] : beyond_updates) {
        if (fields.says_something(field)) { refuse(field, why); }
    }
    if (fields.says_something("modules_to_save") && !options.whole_modules) {
        raise<format_error>(error_code::adapter_unsupported,
            message("modules_to_save: whole modules (", fields.shown(*fields.find("modules_to_save")),
                ") come with this adapter, which makes it more than a low-rank update; ask for them to "
                "be carried along (",
                options.whole_modules_word, "), or remove them"),
            file);
    }
    for (const char* names : {"target_modules", "exclude_modules", "modules_to_save"}) { fields.check_names(names); }
    (void)fields.flag("fan_in_fan_out");
    constexpr std::array<std::string_view, 3> biases{"none", "all", "lora_only"};
    if (const auto* bias = fields.find("bias");
        bias && std::find(biases.begin(), biases.end(), *bias) == biases.end()) {
        raise<format_error>(error_code::adapter_config,
            message("bias is ", fields.shown(*bias), "; expected \"none\", \"all\" or \"lora_only\""), file);
    }
    if (const double rank = fields.number("r", 8); !(rank >= 1 && rank == std::floor(rank))) {
        raise<format_error>(error_code::adapter_config,
            message("r is ", fields.shown(*fields.find("r")), "; expected a rank, a whole number above 0"), file);
    }
}

/// A stored factor (rows×cols) in T, row-major.
template <class T>
[[nodiscard]] matrix<T> read_factor(const safetensors_file& file, const safetensors_entry& entry)
{
    if (entry.shape.size() != 2) {
        raise<format_error>(error_code::adapter_unsupported,
            message("tensor '", entry.name, "' has shape ", to_string(entry.shape),
                entry.shape.size() > 2 ? ": a convolution's factors are not merged with others; fold each adapter into "
                                         "its base (taskvec fuse, or PEFT's merge_and_unload) and merge the models"
                                       : "; expected a matrix"),
            file.path().string(), entry.offset);
    }
    if (!is_storage(entry.dtype)) {
        raise<dtype_mismatch>(error_code::dtype_unsupported,
            message("'", file.path().string(), "': tensor '", entry.name, "' has dtype ", to_string(entry.dtype),
                "; a factor is ", storage_names(), ": convert the adapter first"));
    }
    matrix<T> x(
        static_cast<std::size_t>(entry.shape[0]), static_cast<std::size_t>(entry.shape[1]), matrix_order::row_major);
    const auto* const from = static_cast<const std::byte*>(file.tensor(entry).data);
    visit_storage(entry.dtype, entry.name, [&]<class S>(std::type_identity<S>) {
        for (std::size_t i = 0; i < x.size(); ++i) {
            S value;
            std::memcpy(&value, from + i * sizeof(S), sizeof(S));
            x.data()[i] = static_cast<T>(widen<arithmetic_type<S>>(value));
        }
    });
    return x;
}

/// True when one of the modules that a configuration lists as saved whole is on the path of this tensor.
[[nodiscard]] inline bool belongs_to_saved_module(std::string_view name, const nlohmann::json& config)
{
    const auto list = config.find("modules_to_save");
    if (list == config.end() || !list->is_array()) { return false; }
    const std::string path = "." + std::string(name);
    for (const auto& module : *list) {
        if (module.is_string() && path.find("." + module.get<std::string>() + ".") != path.npos) { return true; }
    }
    return false;
}

} // namespace detail

/// The file of an adapter's directory that has the factors: PEFT's old one where that is all there is.
[[nodiscard]] inline std::filesystem::path peft_tensor_file(const std::filesystem::path& directory)
{
    std::error_code ignored;
    auto file = directory / peft_model_name;
    const bool old =
        !std::filesystem::exists(file, ignored) && std::filesystem::exists(directory / peft_pickle_name, ignored);
    return old ? directory / peft_pickle_name : file;
}

/// True when some factor of an adapter is stored as F64: it then wants read_peft<double>().
[[nodiscard]] inline bool peft_is_wide(const std::filesystem::path& directory)
{
    std::vector<std::string> notes;
    const safetensors_file file = detail::open_weights(peft_tensor_file(directory), notes);
    return std::any_of(
        file.entries().begin(), file.entries().end(), [](const auto& entry) { return entry.dtype == dtype::f64; });
}

/// Reads an adapter directory that PEFT (or write_peft) wrote. The scaling of a module is α/r, or α/√r with use_rslora,
/// with α and r from alpha_pattern and rank_pattern where these match (as PEFT matches: in file order, the whole name
/// or a dotted end). Throws io_error for a missing file; format_error for what is not a plain LoRA adapter (each by
/// name: DoRA, aLoRA, QA-LoRA, PiSSA, OLoRA, CorDA, LoftQ and the like, lora_bias, trainable tokens, target_parameters,
/// convolutions, other peft types, modules_to_save unless asked for), a half of a pair without the other, ranks that
/// contradict the configuration, patterns that match nothing, tensors with no place in an adapter; dtype_mismatch for
/// factors that are not floating.
///
///     const auto adapter = read_peft("adapter");
///     const auto served = peru_lora(cpu{}, adapter.updates, {.rank = {.rank = 8}});
template <arithmetic_element T = float>
[[nodiscard]] peft_adapter<T> read_peft(const std::filesystem::path& directory, const peft_read_options& options = {})
{
    std::error_code ignored;
    if (!std::filesystem::is_directory(directory, ignored)) {
        raise<io_error>(error_code::file_kind, "is not a directory; expected a PEFT adapter directory",
            directory.string(), ENOTDIR);
    }
    const auto config_path = directory / peft_config_name;
    const std::string config_file = config_path.string();
    const mapped_file configuration(config_path);
    const std::string text = read_text_file(config_path);
    peft_adapter<T> adapter;
    adapter.label = directory.string();
    adapter.config = parse_json(text, config_file);
    if (!adapter.config.is_object()) {
        raise<format_error>(error_code::adapter_config, "is not a JSON object", config_file);
    }
    detail::check_plain_lora(adapter.config, config_file, options);
    std::vector<std::string> reading;
    const auto stored = peft_tensor_file(directory);
    const safetensors_file file = detail::open_weights(stored, reading);
    const std::string model_file = stored.string();

    // Pairs of factors, by module; everything else by name.
    struct halves {
        const safetensors_entry *a = nullptr, *b = nullptr;
        bool embedding = false;
    };
    std::map<std::string, halves> pairs;
    std::map<std::string, const safetensors_entry*> others;
    const detail::peft_fields fields(adapter.config, config_file);
    const auto* bias = fields.find("bias");
    const bool biases = bias && *bias != "none";
    for (const auto& entry : file.entries()) {
        std::string_view name = entry.name;
        if (!name.starts_with(peft_prefix)) {
            raise<format_error>(error_code::adapter_tensors,
                message("tensor '", entry.name, "' does not begin with '", peft_prefix,
                    "' as the names of a PEFT adapter do"),
                model_file);
        }
        name.remove_prefix(peft_prefix.size());
        const auto take = [&](std::string_view suffix, bool is_a, bool embedding) {
            if (!name.ends_with(suffix) || name.size() == suffix.size()) { return false; }
            auto& pair = pairs[std::string(name.substr(0, name.size() - suffix.size()))];
            if (is_a ? pair.a : pair.b) {
                raise<format_error>(error_code::adapter_tensors,
                    message("tensor '", entry.name, "' is the second such factor of its module"), model_file);
            }
            (is_a ? pair.a : pair.b) = &entry;
            if ((pair.a && pair.b) && pair.embedding != embedding) {
                raise<format_error>(error_code::adapter_tensors,
                    message("tensor '", entry.name,
                        "' and its other half are not both factors of an embedding, or of a layer"),
                    model_file);
            }
            pair.embedding = embedding;
            return true;
        };
        if (take(".lora_A.weight", true, false) || take(".lora_B.weight", false, false)
            || take(".lora_embedding_A", true, true) || take(".lora_embedding_B", false, true)) {
            continue;
        }
        if (name.find(".lora_") != name.npos || name.find("lora_") == 0) {
            raise<format_error>(error_code::adapter_tensors,
                message("tensor '", entry.name,
                    "' is not a factor of a plain low-rank update; expected lora_A.weight, lora_B.weight, "
                    "lora_embedding_A and lora_embedding_B"),
                model_file);
        }
        others.emplace(name, &entry);
    }
    if (pairs.empty()) { raise<format_error>(error_code::adapter_tensors, "holds no LoRA factors", model_file); }
    for (const auto& [name, entry] : others) {
        const bool is_bias = biases && name.ends_with(".bias");
        const bool is_copy =
            name.ends_with(peft_base_weight) && pairs.contains(name.substr(0, name.size() - peft_base_weight.size()));
        if (!is_bias && !is_copy
            && !(options.whole_modules
                && (detail::belongs_to_saved_module(name, adapter.config) || name.ends_with(".weight")))) {
            raise<format_error>(error_code::adapter_unsupported,
                message("tensor '", entry->name,
                    "' is neither a factor nor a bias that the configuration announces: this adapter is more than a "
                    "low-rank update; ask for whole weights to be carried along (",
                    options.whole_modules_word, "), or remove it"),
                model_file);
        }
        const auto* const data = static_cast<const std::byte*>(file.tensor(*entry).data);
        adapter.others.emplace(
            name, peft_tensor{entry->dtype, entry->shape, std::vector<std::byte>(data, data + entry->bytes)});
    }

    const auto ordered = nlohmann::ordered_json::parse(text); // in file order, which decides between patterns
    const auto pattern = [&](const char* field) {
        return detail::peft_patterns(
            ordered.contains(field) ? ordered[field] : nlohmann::ordered_json(), field, config_file);
    };
    auto ranks = pattern("rank_pattern"), alphas = pattern("alpha_pattern");
    const double rank = fields.number("r", 8), alpha = fields.number("lora_alpha", 8);
    const bool root = fields.flag("use_rslora");
    for (const auto& [module, pair] : pairs) {
        if (!pair.a || !pair.b) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has ", pair.a ? "lora_A but no lora_B" : "lora_B but no lora_A",
                    ": half of its update is missing"),
                model_file);
        }
        lora_update<T> update{detail::read_factor<T>(file, *pair.b), detail::read_factor<T>(file, *pair.a), 1};
        if (update.b.cols() != update.a.rows()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", model_file, "': module '", module, "': lora_B is ", update.b.rows(), "×", update.b.cols(),
                    " and lora_A ", update.a.rows(), "×", update.a.cols(), "; their ranks differ"));
        }
        const double expected = ranks.find(module, rank), strength = alphas.find(module, alpha);
        if (static_cast<double>(update.rank()) != expected) {
            raise<format_error>(error_code::adapter_tensors,
                message(
                    "module '", module, "' has rank ", update.rank(), " but ", peft_config_name, " says ", expected),
                model_file);
        }
        if (update.rank() == 0) {
            raise<format_error>(error_code::adapter_tensors, message("module '", module, "' has rank 0"), model_file);
        }
        if (const auto copy = others.find(module + std::string(peft_base_weight)); copy != others.end()) {
            const auto out = static_cast<std::int64_t>(update.out()), in = static_cast<std::int64_t>(update.in());
            if (copy->second->shape != extents{out, in} && copy->second->shape != extents{in, out}) {
                raise<format_error>(error_code::adapter_tensors,
                    message("tensor '", copy->second->name, "' has shape ", to_string(copy->second->shape),
                        ", but the update of its module is ", out, "×", in),
                    model_file);
            }
        }
        update.scaling = root ? strength / std::sqrt(expected) : strength / expected;
        check_update(update, module);
        if (pair.embedding) { adapter.embeddings.insert(module); }
        adapter.stored.emplace(module, wider(pair.a->dtype, pair.b->dtype));
        adapter.updates.emplace(module, std::move(update));
    }
    ranks.check_used("rank_pattern", config_file);
    alphas.check_used("alpha_pattern", config_file);
    file.map().check_unchanged();
    configuration.check_unchanged(); // another run may have replaced both files between the two readings
    return adapter;
}

namespace detail {

/// A number as JSON, without a fraction where it has none.
[[nodiscard]] inline nlohmann::json json_number(double x)
{
    if (x == std::floor(x) && std::abs(x) < 9e15) { return static_cast<std::int64_t>(x); }
    return x;
}

/// Key of a pattern that matches one module alone: its name, or, where that would match others too, an anchored
/// expression.
[[nodiscard]] inline std::string exact_pattern(const std::string& module, const std::vector<std::string>& modules)
{
    const bool plain_name =
        module.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == module.npos;
    const bool alone =
        std::none_of(modules.begin(), modules.end(), [&](const auto& other) { // a dot in the name matches any character
            if (other == module || other.size() < module.size()) { return false; }
            const std::size_t head = other.size() - module.size();
            return (head == 0 || other[head - 1] == '.')
                && std::equal(module.begin(), module.end(), other.begin() + static_cast<std::ptrdiff_t>(head),
                    [](char c, char x) { return c == '.' || c == x; });
        });
    if (plain_name && alone) { return module; }
    std::string escaped = "^";
    for (const char c : module) {
        if (std::string_view("\\^$.|?*+()[]{}").find(c) != std::string_view::npos) { escaped += '\\'; }
        escaped += c;
    }
    return escaped;
}

} // namespace detail

/// The configuration with which PEFT gives the updates their ranks and scalings: r and lora_alpha of the largest rank,
/// patterns for what differs, everything that would make PEFT change the base reset. Fields that say which modules are
/// meant (target_modules and the like) are kept when they are there, otherwise every module is listed by its full name.
template <arithmetic_element T>
[[nodiscard]] nlohmann::json peft_config(const peft_adapter<T>& adapter)
{
    nlohmann::json config = adapter.config;
    const nlohmann::json defaults = {{"auto_mapping", nullptr}, {"base_model_name_or_path", nullptr}, {"bias", "none"},
        {"fan_in_fan_out", false}, {"layers_pattern", nullptr}, {"layers_to_transform", nullptr}, {"lora_dropout", 0.0},
        {"modules_to_save", nullptr}, {"revision", nullptr}, {"task_type", nullptr}};
    for (const auto& [key, value] : defaults.items()) {
        if (!config.contains(key)) { config[key] = value; }
    }
    std::size_t rank = 1;
    double alpha = 1;
    std::vector<std::string> modules;
    for (const auto& [module, update] : adapter.updates) {
        modules.push_back(module);
        if (update.rank() > rank || modules.size() == 1) {
            rank = update.rank();
            alpha = update.scaling * static_cast<double>(rank);
        }
    }
    nlohmann::json ranks = nlohmann::json::object(), alphas = nlohmann::json::object();
    for (const auto& [module, update] : adapter.updates) {
        const double own = update.scaling * static_cast<double>(update.rank());
        if (update.rank() != rank) { ranks[detail::exact_pattern(module, modules)] = update.rank(); }
        if (own != alpha) { alphas[detail::exact_pattern(module, modules)] = detail::json_number(own); }
    }
    config["peft_type"] = "LORA";
    config["r"] = rank;
    config["lora_alpha"] = detail::json_number(alpha);
    config["rank_pattern"] = ranks;
    config["alpha_pattern"] = alphas;
    config["use_rslora"] = false;
    config["init_lora_weights"] = true;
    config["inference_mode"] = true;
    if (config.contains("eva_config")) { config["eva_config"] = nullptr; }
    if (!config.contains("target_modules") || config["target_modules"].is_null()) {
        config["target_modules"] = modules;
        config["layers_to_transform"] = nullptr;
        config["layers_pattern"] = nullptr;
    }
    return config;
}

/// The shapes of stored factors: r×in and out×r; of a convolution r×in×kernel and out×r×1…, its `in` without the kernel
/// that the update's counts. Throws shape_mismatch for a kernel that is no divisor of the update's inputs.
template <arithmetic_element T>
[[nodiscard]] std::pair<extents, extents> factor_shapes(
    const lora_update<T>& update, const extents& kernel, std::string_view module)
{
    std::int64_t cells = 1;
    for (const auto side : kernel) { cells *= side; }
    const auto in = static_cast<std::int64_t>(update.in()), rank = static_cast<std::int64_t>(update.rank());
    if (cells < 1 || in % cells != 0) {
        raise<shape_mismatch>(error_code::adapter_shape,
            message("module '", module, "' has ", in, " inputs, which its kernel of ", to_string(kernel),
                " does not divide"));
    }
    extents a{rank, in / cells}, b{static_cast<std::int64_t>(update.out()), rank};
    a.insert(a.end(), kernel.begin(), kernel.end());
    b.insert(b.end(), kernel.size(), 1);
    return {std::move(a), std::move(b)};
}

/// How write_peft() stores factors and writes files.
struct peft_write_options {
    std::optional<dtype> output{}; ///< dtype of all factors; empty: as `stored` says
    durability mode = durability::synchronised; ///< how hard the files are forced to disk
    overflow on_overflow = overflow::error; ///< a factor that its dtype cannot hold
};

/// The two files of an adapter, complete and on disk under temporary names, which take their own on commit(): what
/// write_peft() does, for those who have something to do between the two.
///
///     peft_writer out("adapter-r8", adapter);
///     …
///     out.commit();
class peft_writer {
public:
    /// Throws like write_peft().
    template <arithmetic_element T>
    peft_writer(
        const std::filesystem::path& directory, const peft_adapter<T>& adapter, const peft_write_options& options = {});

    /// Gives the files their names. `obsolete`: names of files that go as they come.
    void commit(const std::vector<std::string>& obsolete = {})
    {
        model_->commit();
        settings_->commit();
        folder_->commit(obsolete);
    }
    /// Where the files are written until commit(): for what is to lie beside them.
    [[nodiscard]] const std::filesystem::path& folder() const noexcept { return folder_->path(); }
    /// Bytes of both files.
    [[nodiscard]] std::uint64_t file_size() const noexcept { return size_; }
    /// Entries of factors that became the largest number of their dtype (overflow::saturate).
    [[nodiscard]] std::uint64_t saturated() const noexcept { return saturated_; }

private:
    std::optional<output_directory> folder_; // before the files in it, so that it outlives them
    std::optional<safetensors_writer> model_;
    std::optional<atomic_file> settings_;
    std::uint64_t size_ = 0, saturated_ = 0;
};

/// Writes an adapter directory that PEFT loads and that gives the same updates (once rounded to the stored dtype). A
/// directory that does not exist appears whole or not at all; one that does is exchanged for one with both new files,
/// in one step where the system can (see output_directory), otherwise the two files are replaced once both are
/// complete, the configuration last. Throws invalid_argument (no module, a rank of 0), dtype_mismatch, nonfinite_error
/// where a factor overflows its dtype, io_error.
///
///     write_peft("adapter-r8", adapter);
template <arithmetic_element T>
void write_peft(
    const std::filesystem::path& directory, const peft_adapter<T>& adapter, const peft_write_options& options = {})
{
    peft_writer(directory, adapter, options).commit();
}

template <arithmetic_element T>
peft_writer::peft_writer(
    const std::filesystem::path& directory, const peft_adapter<T>& adapter, const peft_write_options& options)
{
    if (adapter.updates.empty()) {
        raise<invalid_argument>(error_code::inputs_empty,
            message("'", directory.string(), "': an adapter without a module cannot be written"));
    }
    std::vector<tensor_spec> specs;
    std::vector<std::vector<std::byte>> buffers;
    const auto add = [&](std::string name, const matrix<T>& x, dtype type, extents shape) {
        auto& bytes = buffers.emplace_back();
        visit_storage(type, name, [&]<class S>(std::type_identity<S>) {
            bytes.resize(x.size() * sizeof(S));
            for (std::size_t i = 0; i < x.rows(); ++i) {
                for (std::size_t j = 0; j < x.cols(); ++j) {
                    const S value = narrow_within<S>(x(i, j), options.on_overflow, saturated_, [&] {
                        raise<nonfinite_error>(error_code::result_overflow,
                            message("factor '", name, "' holds ", static_cast<double>(x(i, j)), " at index ",
                                i * x.cols() + j, ", which ", to_string(type), " cannot; ",
                                detail::if_narrow<S>("choose a wider dtype for the adapter, or "),
                                "let it saturate or propagate (overflow)"));
                    });
                    std::memcpy(bytes.data() + (i * x.cols() + j) * sizeof(S), &value, sizeof(S));
                }
            }
        });
        specs.push_back({std::move(name), type, std::move(shape)});
    };
    for (const auto& [module, update] : adapter.updates) {
        check_update(update, module);
        if (update.rank() == 0) {
            raise<invalid_argument>(
                error_code::rank_out_of_range, message("module '", module, "' has rank 0; PEFT has no such adapter"));
        }
        const auto place = adapter.stored.find(module);
        const dtype type = options.output.value_or(place == adapter.stored.end() ? dtype_of<T> : place->second);
        const bool embedding = adapter.embeddings.contains(module);
        const std::string stem = std::string(peft_prefix) + module;
        const auto kernel = adapter.kernels.find(module);
        auto [a_shape, b_shape] =
            factor_shapes(update, kernel == adapter.kernels.end() ? extents() : kernel->second, module);
        add(stem + (embedding ? ".lora_embedding_A" : ".lora_A.weight"), update.a, type, std::move(a_shape));
        add(stem + (embedding ? ".lora_embedding_B" : ".lora_B.weight"), update.b, type, std::move(b_shape));
    }
    const std::string config = peft_config(adapter).dump(2) + "\n";

    folder_.emplace(directory, options.mode, existing_directory::exchange);
    std::vector<tensor_spec> all = specs;
    for (const auto& [name, tensor] : adapter.others) {
        all.push_back({std::string(peft_prefix) + name, tensor.dtype, tensor.shape});
    }
    auto& model = model_.emplace(folder_->path() / peft_model_name, all, metadata_map{}, options.mode);
    for (std::size_t i = 0; i < buffers.size(); ++i) { model.write(i, 0, buffers[i].data(), buffers[i].size()); }
    std::size_t index = buffers.size();
    for (const auto& [name, tensor] : adapter.others) {
        model.write(index++, 0, tensor.bytes.data(), tensor.bytes.size());
    }
    auto& settings = settings_.emplace(folder_->path() / peft_config_name, config.size(), options.mode);
    settings.write(0, config.data(), config.size());
    model.finish();
    settings.finish();
    size_ = model.file_size() + config.size();
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_PEFT_HPP

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Who wrote an adapter, by the names of its tensors.
enum class adapter_dialect : std::uint8_t {
    peft, ///< `MODULE.lora_A.weight`, at times with an adapter's name in it, and PEFT's prefix before it
    kohya, ///< kohya's scripts, A1111, LyCORIS: `lora_unet_MODULE.lora_down.weight`, `.alpha`; dots are underscores
    diffusers, ///< `unet.MODULE.lora.down.weight`, `MODULE_lora.down.weight`, `MODULE.lora_linear_layer.down.weight`,
               ///< and PEFT's names under those of its components
    mlx, ///< `MODULE.lora_a` (in×r) and `MODULE.lora_b` (r×out)
    gguf ///< llama.cpp's: a GGUF file with `blk.N.attn_q.weight.lora_a`, `.lora_b`
};

/// "PEFT", "kohya", "diffusers", "MLX", "GGUF".
[[nodiscard]] constexpr std::string_view to_string(adapter_dialect dialect) noexcept
{
    switch (dialect) {
    case adapter_dialect::peft: return "PEFT";
    case adapter_dialect::kohya: return "kohya";
    case adapter_dialect::diffusers: return "diffusers";
    case adapter_dialect::mlx: return "MLX";
    default: return "GGUF";
    }
}

/// Which of the matrices that a model keeps as one parameter an update is of: experts of a layer, as transformers 5 has
/// them and PEFT adapts them (target_parameters).
struct parameter_slice {
    std::string parameter{}; ///< "layers.0.mlp.experts.down_proj"; empty: the module has a weight of its own
    std::size_t index = 0; ///< of the matrix, along the parameter's first extent
    std::size_t count = 1; ///< how many there are
};

/// What an adapter does to one module.
template <arithmetic_element T>
struct adapted_module {
    lora_update<T>
        update{}; ///< out×in; a convolution's `in` counts its kernel (in·kh·kw), an embedding's is its entries
    extents kernel{}; ///< of a convolution: its sides, {1, 1} included; empty otherwise
    bool paired_rows = false; ///< rows lie as llama.cpp keeps those of q and k: unpair_rows() puts them back
    bool embedding = false; ///< factored as PEFT does it: the weight is entries×dimensions
    std::vector<double> magnitude{}; ///< DoRA's, one for each output; empty: none
    lora_update<T> bias{}; ///< what lora_bias adds to the module's bias, as an update of 1×out; of rank 0: nothing
    dtype stored = dtype_of<T>; ///< of the factors in the file
    std::string kind = "LoRA"; ///< "LoRA", "DoRA", "AdaLoRA", "LoHa" or "LoKr": what the update was made of
    parameter_slice slice{}; ///< of an expert: the parameter that it is part of, and the module's name counts it
};

/// An adapter read from any dialect. Module names are the file's, without prefixes that say nothing of the module;
/// kohya's have underscores for dots: match_modules() finds the weights of a base that they mean. Experts that PEFT
/// adapts as one parameter are a module each, "layers.0.mlp.experts.3.down_proj".
template <arithmetic_element T>
struct adapter_contents {
    std::map<std::string, adapted_module<T>> modules{}; ///< by module
    std::map<std::string, peft_tensor> wholes{}; ///< tensors that were trained whole (modules_to_save, biases), by name
    std::map<std::string, peft_tensor> copies{}; ///< copies of base weights that an adapter carries, by name
    adapter_dialect dialect = adapter_dialect::peft; ///< that it was read from
    bool fan_in_fan_out = false; ///< square weights lie in×out, as its configuration says
    bool tied = false; ///< what it does to the embedding it does to the head tied to it (PEFT's ensure_weight_tying)
    nlohmann::json config = nlohmann::json::object(); ///< adapter_config.json, where there is one
    gguf_target target{}; ///< of a GGUF adapter: the model that it says it is for
    std::vector<std::string> notes{}; ///< what was taken for granted, a sentence each
    std::string label{}; ///< names the adapter in messages: its path
    std::filesystem::path file{}; ///< the tensors
};

namespace detail {

/// What diffusers calls the parts of a pipeline that adapters change: "unet.down_blocks.0.…" is a module of "unet".
inline constexpr std::array<std::string_view, 8> diffusers_components{"unet", "text_encoder", "text_encoder_2",
    "text_encoder_3", "transformer", "transformer_2", "prior", "image_encoder"};
/// The component that a module's name begins with; empty: none.
[[nodiscard]] inline std::string_view component_of(std::string_view module) noexcept
{
    const auto first = module.substr(0, module.find('.'));
    const bool known =
        std::find(diffusers_components.begin(), diffusers_components.end(), first) != diffusers_components.end();
    return known && first.size() < module.size() ? first : std::string_view();
}
/// What kohya's names begin with, and the component of diffusers' that is meant; empty: any.
struct kohya_component {
    std::string_view prefix{}, diffusers{};
};
inline constexpr std::array<kohya_component, 8> kohya_components{{{"lora_unet_", "unet"}, {"lora_te1_", "text_encoder"},
    {"lora_te2_", "text_encoder_2"}, {"lora_te3_", "text_encoder_3"}, {"lora_te_", "text_encoder"},
    {"lora_transformer_", "transformer"}, {"lycoris_", ""}, {"lora_prior_unet_", "prior"}}};
/// The one of a module's name; empty: it has none.
[[nodiscard]] constexpr kohya_component kohya_component_of(std::string_view module) noexcept
{
    for (const auto& one : kohya_components) {
        if (module.starts_with(one.prefix)) { return one; }
    }
    return {};
}
/// Where a module lies in a model's list of layers: "model.layers.3.self_attn.q_proj" in layer 3, as
/// "self_attn.q_proj".
struct layer_place {
    std::optional<std::int64_t> number{}; ///< nothing: it is in no layer
    std::string_view within{}; ///< its name there
    std::string_view list{}; ///< what the list is called: "model.layers"; empty: it is in no layer
};
[[nodiscard]] inline layer_place place_in_layers(std::string_view module)
{
    constexpr std::string_view list = "layers.";
    const auto dotted = module.find(".layers.");
    const auto at = module.starts_with(list) ? list.size()
        : dotted != module.npos              ? dotted + list.size() + 1
                                             : module.npos;
    const auto dot = at == module.npos ? module.npos : module.find('.', at);
    if (dot == module.npos) { return {std::nullopt, module, {}}; }
    std::int64_t number = 0;
    const auto digits = module.substr(at, dot - at);
    const auto [end, problem] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
    if (problem != std::errc() || end != digits.data() + digits.size() || number < 0) {
        return {std::nullopt, module, {}};
    }
    return {number, module.substr(dot + 1), module.substr(0, at - 1)};
}
/// Whether MLX has an embedding under a module's name, whose factors lie entries×r and r×dimensions. No linear layer is
/// called so.
[[nodiscard]] inline bool is_mlx_embedding(std::string_view module) noexcept
{
    const auto last = module.substr(module.rfind('.') == module.npos ? 0 : module.rfind('.') + 1);
    for (const std::string_view name : {"embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings",
             "token_type_embeddings", "tok_embeddings", "embed_in", "embeddings", "embedding", "shared"}) {
        if (last == name) { return true; }
    }
    return false;
}
/// The key in the header of a safetensors file under which diffusers keeps the configurations of what is in it: JSON,
/// each field under its component's name ("unet.lora_alpha").
inline constexpr const char* diffusers_metadata_key = "lora_adapter_metadata";

/// All entries of a stored factor in T, as rows of its first extent.
template <class T>
[[nodiscard]] matrix<T> read_flat_factor(const safetensors_file& file, const safetensors_entry& entry)
{
    safetensors_entry flat = entry;
    std::int64_t rest = 1;
    for (std::size_t i = 1; i < entry.shape.size(); ++i) { rest *= entry.shape[i]; }
    flat.shape = entry.shape.empty() ? extents{1, 1}
        : entry.shape.size() == 1    ? extents{1, entry.shape[0]}
                                     : extents{entry.shape[0], rest};
    return read_factor<T>(file, flat);
}

template <class T>
[[nodiscard]] matrix<T> turned_over(const matrix<T>& x)
{
    matrix<T> y(x.cols(), x.rows(), matrix_order::row_major);
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < x.cols(); ++j) { y(j, i) = x(i, j); }
    }
    return y;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_ADAPTER_CONTENTS_HPP

// ---- taskvec/formats/adapter_convert.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_ADAPTER_CONVERT_HPP)
#define TASKVEC_SINGLE_FORMATS_ADAPTER_CONVERT_HPP
// Adapters written in any dialect, so that what reads that dialect gets the same update.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/formats/adapter_file.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_ADAPTER_FILE_HPP)
#define TASKVEC_SINGLE_FORMATS_ADAPTER_FILE_HPP
// Adapters as people have them: PEFT's directories, files of kohya and A1111, diffusers, MLX and llama.cpp, told apart
// by what they hold, read into one form that folds into a base. SPDX-License-Identifier: Apache-2.0


// ---- taskvec/formats/adapter_gguf.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_ADAPTER_GGUF_HPP)
#define TASKVEC_SINGLE_FORMATS_ADAPTER_GGUF_HPP
// Adapters as llama.cpp loads them: GGUF files with a pair lora_a, lora_b for each weight, in its names and its order
// of rows. SPDX-License-Identifier: Apache-2.0


#include <cmath>
#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Whether a file is for parse_gguf(): it begins as GGUF does, or is called .gguf, so that one with another magic is
/// refused for that. Throws io_error.
[[nodiscard]] inline bool is_gguf_file(const std::filesystem::path& path)
{
    const mapped_file map(path);
    return is_gguf(map.bytes()) || path.extension() == ".gguf";
}

/// A GGUF file as one of tensors, for what reads those.
[[nodiscard]] inline safetensors_file open_gguf(const std::filesystem::path& path)
{
    mapped_file map(path);
    auto header = parse_gguf(map.bytes(), path.string());
    return {std::move(map), std::move(header.tensors)};
}

/// Puts the rows of q and k back into the model's order, from the pairs in which llama.cpp keeps them
/// (gguf_target::pairs_rows()); exact. Does nothing where there are none. Throws format_error for numbers of heads that
/// are not known (0) or do not divide the rows.
template <arithmetic_element T>
void unpair_rows(adapter_contents<T>& adapter, std::size_t heads, std::size_t kv_heads)
{
    for (auto& [module, made] : adapter.modules) {
        if (!made.paired_rows) { continue; }
        const std::size_t count = module.ends_with("k_proj") ? kv_heads : heads, rows = made.update.out();
        if (count == 0 || rows % (2 * count) != 0) {
            raise<format_error>(error_code::adapter_unsupported,
                message("module '", module, "' has its rows in the order of llama.cpp, in pairs within each head, and ",
                    count == 0 ? std::string("nothing says how many heads there are")
                               : message(rows, " rows are no ", count, " heads of an even size"),
                    ": the config.json of the base does (num_attention_heads, num_key_value_heads)"),
                adapter.file.string());
        }
        matrix<T> b(rows, made.update.b.cols(), matrix_order::row_major);
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t k = 0; k < b.cols(); ++k) { b(paired_row(i, rows, count), k) = made.update.b(i, k); }
        }
        made.update.b = std::move(b);
        made.paired_rows = false;
    }
}

/// Reads a GGUF adapter. Modules are called as transformers calls them; the scaling is adapter.lora.alpha/r, and 1
/// where that is 0 or absent, as llama.cpp has it. Rows of q and k are put back where the file gives numbers of heads
/// (those that this library writes do); elsewhere they stay paired until unpair_rows(). Norms that a file carries are
/// left out with a note, since llama.cpp does not apply them. Throws what parse_gguf() throws; format_error for a file
/// that is no LoRA adapter, an architecture whose names are not known, experts, aLoRA, halves without partners, a rank
/// of 0; shape_mismatch.
template <arithmetic_element T = float>
[[nodiscard]] adapter_contents<T> read_gguf_adapter(const std::filesystem::path& path)
{
    const std::string where = path.string();
    mapped_file map(path);
    auto header = parse_gguf(map.bytes(), where);
    adapter_contents<T> adapter;
    adapter.dialect = adapter_dialect::gguf;
    adapter.label = "'" + where + "'";
    adapter.file = path;
    const auto refuse = [&](error_code code, const auto&... parts) {
        raise<format_error>(code, message(parts...), where);
    };
    const auto type = header.text("general.type"), kind = header.text("adapter.type");
    if (type != "adapter" || kind != "lora") {
        refuse(error_code::adapter_unsupported, "is a GGUF file whose ",
            type != "adapter" ? "general.type" : "adapter.type", " is '", type != "adapter" ? type : kind,
            "'; that of an adapter is '", type != "adapter" ? "adapter" : "lora",
            "': name an adapter as llama.cpp's convert_lora_to_gguf.py writes it");
    }
    if (header.metadata.contains("adapter.alora.invocation_tokens")) {
        refuse(error_code::adapter_unsupported,
            "adapter.alora.invocation_tokens: aLoRA switches on within the input, which no weight can say: serve it "
            "with "
            "llama.cpp as it is");
    }
    adapter.target.architecture = header.text("general.architecture");
    const auto& word = adapter.target.architecture;
    if (!detail::is_gguf_architecture(word)) {
        refuse(error_code::adapter_unsupported, "general.architecture is '", word,
            "', whose names are not known here; known are ", detail::gguf_architectures(),
            ": take the adapter that it was converted from");
    }
    const auto heads = header.number(word + ".attention.head_count"),
               kv_heads = header.number(word + ".attention.head_count_kv");
    const auto count_of = [](const std::optional<double>& value) {
        return value && *value >= 1 && *value <= 65536 ? static_cast<std::size_t>(*value) : 0;
    };
    adapter.target.heads = count_of(heads);
    adapter.target.kv_heads = kv_heads ? count_of(kv_heads) : adapter.target.heads;
    double alpha = 0;
    if (header.metadata.contains("adapter.lora.alpha")) {
        const auto given = header.number("adapter.lora.alpha");
        if (!given || !std::isfinite(*given)) {
            refuse(error_code::adapter_tensors, "adapter.lora.alpha is no finite number");
        }
        alpha = *given;
    }
    const safetensors_file file(std::move(map), std::move(header.tensors));
    struct halves {
        const safetensors_entry *a = nullptr, *b = nullptr;
    };
    std::map<std::string, halves> parts;
    std::size_t norms = 0;
    for (const auto& entry : file.entries()) {
        const std::string_view name = entry.name, a_end = ".lora_a", b_end = ".lora_b";
        if (name.ends_with("_norm.weight")) { ++norms; }
        else if (name.ends_with(a_end) || name.ends_with(b_end)) {
            auto& pair = parts[std::string(name.substr(0, name.size() - a_end.size()))];
            (name.ends_with(a_end) ? pair.a : pair.b) = &entry;
        }
        else {
            refuse(error_code::adapter_tensors, "tensor '", name,
                "' is no half of an update (….lora_a, ….lora_b): convert the adapter again");
        }
    }
    if (parts.empty()) { refuse(error_code::adapter_tensors, "holds no factors of an adapter"); }
    if (norms > 0) {
        adapter.notes.push_back(message(adapter.label, " carries ", norms, norms == 1 ? " norm" : " norms",
            " of its own, left out: llama.cpp does not apply them"));
    }
    if (alpha == 0) {
        adapter.notes.push_back(
            message(adapter.label, " gives no alpha: it is taken to be the rank, a scaling of 1, as llama.cpp does"));
    }
    for (const auto& [name, pair] : parts) {
        if (!pair.a || !pair.b) {
            refuse(error_code::adapter_tensors, "'", name, "' has ", pair.a ? "lora_a" : "lora_b", " but no ",
                pair.a ? "lora_b" : "lora_a", ": half of its update is missing");
        }
        for (const auto* half : {pair.a, pair.b}) {
            if (half->shape.size() != 2) {
                refuse(error_code::adapter_unsupported, "tensor '", half->name, "' has shape ", to_string(half->shape),
                    "; expected a matrix: updates of experts are not read, take the adapter that it was converted "
                    "from");
            }
        }
        const auto module = gguf_module_name(name, adapter.target);
        if (module.empty()) {
            refuse(error_code::adapter_unsupported, "tensor '", name, "' is none that is known of the architecture ",
                word, ": take the adapter that it was converted from");
        }
        adapted_module<T> made;
        made.embedding = name == "token_embd.weight";
        made.stored = wider(pair.a->dtype, pair.b->dtype);
        made.update.a = detail::read_factor<T>(file, *pair.a);
        made.update.b = detail::read_factor<T>(file, *pair.b);
        if (made.embedding) { made.update.a = detail::turned_over(made.update.a); }
        if (made.update.a.rows() != made.update.b.cols()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': '", name, "': lora_a has shape ", to_string(pair.a->shape), " and lora_b ",
                    to_string(pair.b->shape), "; their ranks differ"));
        }
        made.update.scaling = alpha == 0 ? 1 : alpha / static_cast<double>(made.update.rank());
        made.bias.scaling = made.update.scaling;
        made.paired_rows = adapter.target.pairs_rows() && (module.ends_with(".q_proj") || module.ends_with(".k_proj"));
        adapter.modules.emplace(module, std::move(made));
    }
    if (adapter.target.heads > 0) { unpair_rows(adapter, adapter.target.heads, adapter.target.kv_heads); }
    file.map().check_unchanged();
    return adapter;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_ADAPTER_GGUF_HPP

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The file of tensors that an adapter's path stands for: itself, or PEFT's, diffusers' or MLX's file in a directory.
/// Throws io_error where there is none.
[[nodiscard]] inline std::filesystem::path adapter_tensor_file(const std::filesystem::path& path)
{
    std::error_code ignored;
    if (!std::filesystem::is_directory(path, ignored)) { return path; }
    for (const std::string_view name : {peft_model_name, std::string_view("pytorch_lora_weights.safetensors"),
             std::string_view("adapters.safetensors"), peft_pickle_name}) {
        if (std::filesystem::exists(path / name, ignored)) { return path / name; }
    }
    raise<io_error>(error_code::model_not_found,
        message("holds no adapter: expected ", peft_model_name,
            " (PEFT), pytorch_lora_weights.safetensors (diffusers) or adapters.safetensors (MLX), or name the file "
            "(kohya's, or a GGUF file)"),
        path.string());
}

namespace detail {

/// One tensor's part in an adapter, from its name.
struct adapter_role {
    enum what {
        whole,
        a,
        b,
        embedding_a,
        embedding_b,
        magnitude,
        bias,
        trained_bias,
        alpha,
        mid,
        base_copy,
        ignored,
        hada_w1_a,
        hada_w1_b,
        hada_w2_a,
        hada_w2_b,
        hada_t1,
        hada_t2,
        lokr_w1,
        lokr_w1_a,
        lokr_w1_b,
        lokr_w2,
        lokr_w2_a,
        lokr_w2_b,
        lokr_t2,
        singular,
        unknown
    } role = whole;
    std::string module{}, adapter{}; ///< the adapter's name, where the key has one
    std::optional<adapter_dialect> dialect{}; ///< nothing: it may be any
};

/// A module as diffusers calls it today: without ".processor", the list that to_out is by its first, and the attention
/// of text encoders as transformers has it.
[[nodiscard]] inline std::string current_module(std::string module)
{
    if (const auto at = module.find(".processor."); at != module.npos) { module.erase(at, 10); }
    const bool encoder = module.starts_with("text_encoder");
    struct projection {
        std::string_view old, unet, text;
    };
    constexpr std::array<projection, 4> projections{{{".to_q", ".to_q", ".q_proj"}, {".to_k", ".to_k", ".k_proj"},
        {".to_v", ".to_v", ".v_proj"}, {".to_out", ".to_out.0", ".out_proj"}}};
    for (const auto& one : projections) {
        if (!module.ends_with(one.old)) { continue; }
        module.replace(module.size() - one.old.size(), one.old.size(), encoder ? one.text : one.unet);
        break;
    }
    return module;
}

[[nodiscard]] inline adapter_role role_of(std::string_view name)
{
    using role = adapter_role;
    using dialect = adapter_dialect;
    struct ending {
        std::string_view text;
        role::what what;
        std::optional<dialect> of;
    };
    static const std::array<ending, 40> endings{{{".lora_E", role::singular, dialect::peft},
        {".lora_A.weight", role::a, dialect::peft}, {".lora_B.weight", role::b, dialect::peft},
        {".lora_embedding_A", role::embedding_a, dialect::peft},
        {".lora_embedding_B", role::embedding_b, dialect::peft}, {".lora_B.bias", role::bias, dialect::peft},
        {".lora_magnitude_vector.weight", role::magnitude, dialect::peft},
        {".lora_magnitude_vector", role::magnitude, dialect::peft}, {".lora_down.weight", role::a, dialect::kohya},
        {".lora_up.weight", role::b, dialect::kohya}, {".lora_mid.weight", role::mid, dialect::kohya},
        {".dora_scale", role::magnitude, dialect::kohya}, {".alpha", role::alpha, {}},
        {".lora.down.weight", role::a, dialect::diffusers}, {".lora.up.weight", role::b, dialect::diffusers},
        {"_lora.down.weight", role::a, dialect::diffusers}, {"_lora.up.weight", role::b, dialect::diffusers},
        {".lora_linear_layer.down.weight", role::a, dialect::diffusers},
        {".lora_linear_layer.up.weight", role::b, dialect::diffusers}, {".lora_a", role::a, dialect::mlx},
        {".lora_b", role::b, dialect::mlx}, {".hada_w1_a", role::hada_w1_a, {}}, {".hada_w1_b", role::hada_w1_b, {}},
        {".hada_w2_a", role::hada_w2_a, {}}, {".hada_w2_b", role::hada_w2_b, {}}, {".lokr_w1", role::lokr_w1, {}},
        {".lokr_w1_a", role::lokr_w1_a, {}}, {".lokr_w1_b", role::lokr_w1_b, {}}, {".lokr_w2", role::lokr_w2, {}},
        {".lokr_w2_a", role::lokr_w2_a, {}}, {".lokr_w2_b", role::lokr_w2_b, {}}, {".hada_t1", role::hada_t1, {}},
        {".hada_t2", role::hada_t2, {}}, {".lokr_t2", role::lokr_t2, {}},
        {".base_layer.weight", role::base_copy, dialect::peft}, {".base_layer.bias", role::trained_bias, dialect::peft},
        {".lora_A", role::a, dialect::peft}, {".lora_B", role::b, dialect::peft},
        {".lora_up.bias", role::bias, dialect::kohya}, {".lora_linear_layer.alpha", role::alpha, dialect::diffusers}}};
    const auto plain = [&](std::string_view text) -> std::optional<role> {
        const ending* best = nullptr;
        for (const auto& one : endings) {
            if (text.size() > one.text.size() && text.ends_with(one.text)
                && (!best || one.text.size() > best->text.size())) {
                best = &one;
            }
        }
        if (!best) { return std::nullopt; }
        return role{best->what, std::string(text.substr(0, text.size() - best->text.size())), {}, best->of};
    };
    if (name.find(".original_module.") != name.npos || name.find(".lora_velora_embed") != name.npos) {
        return {role::ignored, std::string(name), {}, {}};
    }
    if (const auto at = name.find(".modules_to_save."); at != name.npos) {
        const auto rest = name.substr(at + 17);
        const auto dot = rest.find('.');
        return {role::whole,
            std::string(name.substr(0, at + 1)) + std::string(rest.substr(dot == rest.npos ? 0 : dot + 1)),
            std::string(dot == rest.npos ? "" : rest.substr(0, dot)), dialect::peft};
    }
    if (auto found = plain(name)) {
        if (found->dialect == dialect::diffusers) { found->module = current_module(std::move(found->module)); }
        return *found;
    }
    // With the adapter's name in it: MODULE.lora_A.default.weight, MODULE.lora_embedding_A.default, …
    for (const std::string_view part :
        {".lora_A.", ".lora_B.", ".lora_E.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.",
            ".hada_w1_a.", ".hada_w1_b.", ".hada_w2_a.", ".hada_w2_b.", ".lokr_w1.", ".lokr_w1_a.", ".lokr_w1_b.",
            ".lokr_w2.", ".lokr_w2_a.", ".lokr_w2_b.", ".hada_t1.", ".hada_t2.", ".lokr_t2."}) {
        const auto at = name.rfind(part);
        if (at == name.npos) { continue; }
        const auto rest = name.substr(at + part.size());
        const auto dot = rest.find('.');
        const auto without = std::string(name.substr(0, at + part.size() - 1))
            + std::string(dot == rest.npos ? std::string_view() : rest.substr(dot));
        if (auto found = plain(without)) {
            found->adapter = std::string(rest.substr(0, dot));
            return *found;
        }
    }
    const bool like_a_factor = name.find("lora_") != name.npos || name.find(".lora.") != name.npos
        || name.find(".hada_") != name.npos || name.find(".lokr_") != name.npos || name.find(".oft_") != name.npos
        || name.find(".vera_") != name.npos || name.find(".diff") != name.npos;
    if (like_a_factor && !name.starts_with("lora_unet_") && !name.starts_with("lora_te")) {
        return {role::unknown, std::string(name), {}, {}};
    }
    return {like_a_factor ? role::unknown : role::whole, std::string(name), {}, {}};
}

/// The Kronecker product.
template <class T>
[[nodiscard]] matrix<T> kronecker(const matrix<T>& x, const matrix<T>& y)
{
    matrix<T> z(x.rows() * y.rows(), x.cols() * y.cols(), matrix_order::row_major);
    for (std::size_t i = 0; i < z.rows(); ++i) {
        for (std::size_t j = 0; j < z.cols(); ++j) {
            z(i, j) = x(i / y.rows(), j / y.cols()) * y(i % y.rows(), j % y.cols());
        }
    }
    return z;
}
template <class T>
[[nodiscard]] matrix<T> identity_matrix(std::size_t n)
{
    matrix<T> x(n, n, matrix_order::row_major);
    for (std::size_t i = 0; i < n; ++i) { x(i, i) = 1; }
    return x;
}

/// A Tucker core p×q×kernel… times a factor q×n at its second side: p rows of n·kernel entries, the kernel running
/// fastest.
template <class T>
[[nodiscard]] matrix<T> along_core(const matrix<T>& core, const matrix<T>& right)
{
    const std::size_t inner = right.rows(), cells = core.cols() / inner;
    matrix<T> joined(core.rows(), right.cols() * cells, matrix_order::row_major);
    for (std::size_t p = 0; p < core.rows(); ++p) {
        for (std::size_t i = 0; i < right.cols(); ++i) {
            for (std::size_t cell = 0; cell < cells; ++cell) {
                T sum = 0;
                for (std::size_t q = 0; q < inner; ++q) { sum += core(p, q * cells + cell) * right(q, i); }
                joined(p, i * cells + cell) = sum;
            }
        }
    }
    return joined;
}

/// The tensors of one module.
struct adapter_parts {
    std::map<adapter_role::what, const safetensors_entry*> tensors{};
    [[nodiscard]] const safetensors_entry* get(adapter_role::what which) const
    {
        const auto place = tensors.find(which);
        return place == tensors.end() ? nullptr : place->second;
    }
};

/// One module's update, without its scaling. `rank` receives what its α is divided by.
template <class T>
[[nodiscard]] adapted_module<T> read_module(const safetensors_file& file, const std::string& module,
    const adapter_parts& parts, adapter_dialect dialect, std::size_t& rank)
{
    using role = adapter_role;
    const std::string where = file.path().string();
    adapted_module<T> made;
    const auto need = [&](role::what which, std::string_view word, std::string_view other) -> const safetensors_entry& {
        const auto* const found = parts.get(which);
        if (!found) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has ", other, " but no ", word, ": half of its update is missing"),
                where);
        }
        return *found;
    };
    bool any = false;
    const auto factor = [&](const safetensors_entry& entry) {
        made.stored = any ? wider(made.stored, entry.dtype) : entry.dtype;
        any = true;
        return read_flat_factor<T>(file, entry);
    };
    const auto fits = [&](const matrix<T>& b, const matrix<T>& a, std::string_view left, std::string_view right) {
        if (b.cols() != a.rows()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': module '", module, "': ", left, " is ", b.rows(), "×", b.cols(), " and ", right,
                    " ", a.rows(), "×", a.cols(), "; their ranks differ"));
        }
        if (a.rows() == 0) {
            raise<format_error>(error_code::adapter_tensors, message("module '", module, "' has rank 0"), where);
        }
    };
    const auto core_of = [&](role::what which, std::size_t left, std::size_t right) { // of a Tucker decomposition
        const auto& entry = *parts.get(which);
        if (left == 0 || right == 0) {
            raise<format_error>(error_code::adapter_tensors, message("module '", module, "' has rank 0"), where);
        }
        if (entry.shape.size() < 3 || static_cast<std::size_t>(entry.shape[0]) != left
            || static_cast<std::size_t>(entry.shape[1]) != right) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': tensor '", entry.name, "' has shape ", to_string(entry.shape),
                    ", which does not fit between its factors of ranks ", left, " and ", right));
        }
        const extents kernel(entry.shape.begin() + 2, entry.shape.end());
        if (!made.kernel.empty() && made.kernel != kernel) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': tensor '", entry.name, "' has shape ", to_string(entry.shape),
                    ", which is of another kernel than the other core of module '", module, "'"));
        }
        made.kernel = kernel;
        made.stored = wider(made.stored, entry.dtype);
        return read_flat_factor<T>(file, entry);
    };
    const bool is_hada = parts.get(role::hada_w1_a) || parts.get(role::hada_w1_b) || parts.get(role::hada_w2_a)
        || parts.get(role::hada_w2_b) || parts.get(role::hada_t1) || parts.get(role::hada_t2);
    const bool is_lokr = parts.get(role::lokr_w1) || parts.get(role::lokr_w1_a) || parts.get(role::lokr_w1_b)
        || parts.get(role::lokr_w2) || parts.get(role::lokr_w2_a) || parts.get(role::lokr_w2_b)
        || parts.get(role::lokr_t2);
    const bool is_embedding = parts.get(role::embedding_a) || parts.get(role::embedding_b);
    const bool is_lora = parts.get(role::a) || parts.get(role::b);
    if (int{is_hada} + int{is_lokr} + int{is_embedding} + int{is_lora} != 1) {
        raise<format_error>(error_code::adapter_tensors,
            message("module '", module, "' has ",
                is_hada || is_lokr || is_embedding || is_lora ? "factors of more than one kind"
                                                              : "an alpha, a magnitude or a bias but no factors"),
            where);
    }
    for (const auto which : {role::magnitude, role::bias, role::mid, role::singular}) {
        const auto* const beside = is_hada || is_lokr ? parts.get(which) : nullptr;
        if (!beside) { continue; }
        raise<format_error>(error_code::adapter_unsupported,
            message("tensor '", beside->name, "' stands beside the factors of ", is_hada ? "LoHa" : "LoKr",
                " in module '", module,
                "', whose update is another one with it: fold it into its base with what wrote it"),
            where);
    }
    if (is_hada) { // (w1a·w1b)∘(w2a·w2b): an update of rank r1·r2, exactly
        made.kind = "LoHa";
        auto w1a = factor(need(role::hada_w1_a, "hada_w1_a", "other LoHa factors")),
             w1b = factor(need(role::hada_w1_b, "hada_w1_b", "other LoHa factors")),
             w2a = factor(need(role::hada_w2_a, "hada_w2_a", "other LoHa factors")),
             w2b = factor(need(role::hada_w2_b, "hada_w2_b", "other LoHa factors"));
        if (parts.get(role::hada_t1) || parts.get(role::hada_t2)) { // each is t×1 wₐ×2 w_b, and wₐ lies r×out
            (void)need(role::hada_t1, "hada_t1", "hada_t2");
            (void)need(role::hada_t2, "hada_t2", "hada_t1");
            w1b = along_core(core_of(role::hada_t1, w1a.rows(), w1b.rows()), w1b);
            w2b = along_core(core_of(role::hada_t2, w2a.rows(), w2b.rows()), w2b);
            w1a = turned_over(w1a);
            w2a = turned_over(w2a);
        }
        fits(w1a, w1b, "hada_w1_a", "hada_w1_b");
        fits(w2a, w2b, "hada_w2_a", "hada_w2_b");
        if (w1a.rows() != w2a.rows() || w1b.cols() != w2b.cols()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': module '", module, "': the two products of LoHa are ", w1a.rows(), "×",
                    w1b.cols(), " and ", w2a.rows(), "×", w2b.cols()));
        }
        rank = w1b.rows();
        const std::size_t r1 = w1b.rows(), r2 = w2b.rows();
        made.update.b = matrix<T>(w1a.rows(), r1 * r2, matrix_order::row_major);
        made.update.a = matrix<T>(r1 * r2, w1b.cols(), matrix_order::row_major);
        for (std::size_t k = 0; k < r1 * r2; ++k) {
            for (std::size_t i = 0; i < w1a.rows(); ++i) { made.update.b(i, k) = w1a(i, k / r2) * w2a(i, k % r2); }
            for (std::size_t j = 0; j < w1b.cols(); ++j) { made.update.a(k, j) = w1b(k / r2, j) * w2b(k % r2, j); }
        }
        return made;
    }
    if (is_lokr) { // w1 ⊗ w2, as (w1 ⊗ left)·(1 ⊗ right) with w2 = left·right, or the other way round
        made.kind = "LoKr";
        const auto half = [&](role::what whole, role::what left, role::what right, std::string_view name) {
            std::pair<matrix<T>, matrix<T>> found; // left and right; right empty: whole
            if (const auto* const entry = parts.get(whole)) {
                if (whole == role::lokr_w2 && parts.get(role::lokr_t2)) {
                    raise<format_error>(error_code::adapter_tensors,
                        message("module '", module,
                            "' has lokr_w2 whole, and a core lokr_t2 of it: one of the two is "
                            "another module's"),
                        where);
                }
                if (whole == role::lokr_w2 && entry->shape.size() == 3 && dialect == adapter_dialect::peft) {
                    raise<format_error>(error_code::adapter_unsupported,
                        message("tensor '", entry->name, "' has shape ", to_string(entry->shape),
                            ": of a convolution over one side PEFT lays LoKr's product out in another order than the "
                            "weight's, which no update of low rank equals; fold it into its base with PEFT "
                            "(merge_and_unload) and go on with the model"),
                        where);
                }
                found.first = factor(*entry);
                if (whole == role::lokr_w2 && entry->shape.size() > 2) {
                    made.kernel.assign(entry->shape.begin() + 2, entry->shape.end());
                }
                return found;
            }
            found.first = factor(need(left, message(name, " or ", name, "_a"), "other LoKr factors"));
            found.second = factor(need(right, message(name, "_b"), message(name, "_a")));
            if (whole == role::lokr_w2 && parts.get(role::lokr_t2)) { // w2 = t×1 wₐ×2 w_b, and wₐ lies r×out
                found.second =
                    along_core(core_of(role::lokr_t2, found.first.rows(), found.second.rows()), found.second);
                found.first = turned_over(found.first);
            }
            fits(found.first, found.second, message(name, "_a"), message(name, "_b"));
            return found;
        };
        const auto w1 = half(role::lokr_w1, role::lokr_w1_a, role::lokr_w1_b, "lokr_w1"),
                   w2 = half(role::lokr_w2, role::lokr_w2_a, role::lokr_w2_b, "lokr_w2");
        rank = !w2.second.empty() ? w2.second.rows() : !w1.second.empty() ? w1.second.rows() : 0; // 0: no scale
        const std::size_t v = w1.second.empty() ? w1.first.cols() : w1.second.cols();
        const std::size_t inner = w2.second.empty() ? w2.first.rows() : w2.second.rows();
        const auto product = [](const matrix<T>& x, const matrix<T>& y) {
            if (y.empty()) { return x; }
            matrix<T> z(x.rows(), y.cols(), matrix_order::row_major);
            for (std::size_t i = 0; i < x.rows(); ++i) {
                for (std::size_t j = 0; j < y.cols(); ++j) {
                    T sum = 0;
                    for (std::size_t k = 0; k < x.cols(); ++k) { sum += x(i, k) * y(k, j); }
                    z(i, j) = sum;
                }
            }
            return z;
        };
        if (!w1.second.empty() && w1.second.rows() * inner < v * inner) { // the rank of w1 is the smaller one
            made.update.b = kronecker(w1.first, w2.second.empty() ? identity_matrix<T>(inner) : w2.first);
            made.update.a = kronecker(w1.second, w2.second.empty() ? w2.first : w2.second);
        }
        else {
            const auto whole = product(w1.first, w1.second);
            made.update.b = kronecker(whole, w2.second.empty() ? identity_matrix<T>(inner) : w2.first);
            made.update.a = kronecker(identity_matrix<T>(v), w2.second.empty() ? w2.first : w2.second);
        }
        return made;
    }
    const auto& a = is_embedding ? need(role::embedding_a, "lora_A", "lora_B")
                                 : need(role::a, dialect == adapter_dialect::peft ? "lora_A" : "its down factor",
                                       dialect == adapter_dialect::peft ? "lora_B" : "an up factor");
    const auto& b = is_embedding ? need(role::embedding_b, "lora_B", "lora_A")
                                 : need(role::b, dialect == adapter_dialect::peft ? "lora_B" : "its up factor",
                                       dialect == adapter_dialect::peft ? "lora_A" : "a down factor");
    made.embedding = is_embedding || (dialect == adapter_dialect::mlx && is_mlx_embedding(module));
    made.stored = wider(a.dtype, b.dtype);
    for (const auto* entry : {&a, &b}) {
        if (dialect != adapter_dialect::mlx || entry->shape.size() == 2) { continue; }
        raise<format_error>(error_code::adapter_unsupported,
            message("tensor '", entry->name, "' has shape ", to_string(entry->shape),
                "; expected a matrix: updates of experts (MLX's LoRASwitchLinear) are not read, fuse them with "
                "mlx_lm.fuse "
                "and go on with the model"),
            where);
    }
    made.update.a = read_flat_factor<T>(file, a);
    made.update.b = read_flat_factor<T>(file, b);
    if (dialect == adapter_dialect::mlx) {
        made.update.a = turned_over(made.update.a);
        made.update.b = turned_over(made.update.b);
    }
    if (a.shape.size() > 2) { made.kernel.assign(a.shape.begin() + 2, a.shape.end()); }
    for (std::size_t i = 2; i < b.shape.size(); ++i) {
        if (b.shape[i] != 1) {
            raise<format_error>(error_code::adapter_unsupported,
                message("tensor '", b.name, "' has shape ", to_string(b.shape),
                    "; of a convolution's factors only the first has a kernel"),
                where);
        }
    }
    if (const auto* const mid = parts.get(role::mid)) { // up·mid·down, mid with the kernel
        if (std::any_of(made.kernel.begin(), made.kernel.end(), [](auto side) { return side != 1; })) {
            raise<format_error>(error_code::adapter_unsupported,
                message("tensor '", a.name, "' has shape ", to_string(a.shape), "; beside a '", mid->name,
                    "' only that has a kernel"),
                where);
        }
        made.kernel.clear();
        made.update.a = along_core(core_of(role::mid, made.update.b.cols(), made.update.a.rows()), made.update.a);
    }
    fits(made.update.b, made.update.a, dialect == adapter_dialect::peft ? "lora_B" : "the up factor",
        dialect == adapter_dialect::peft ? "lora_A" : "the down factor");
    rank = made.update.a.rows();
    if (const auto* const values = parts.get(role::singular)) { // AdaLoRA: b·diag(e)·a
        made.kind = "AdaLoRA";
        const auto e = read_flat_factor<T>(file, *values);
        if (e.size() != rank) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': tensor '", values->name, "' has shape ", to_string(values->shape),
                    ", and module '", module, "' has rank ", rank));
        }
        for (std::size_t k = 0; k < rank; ++k) {
            for (std::size_t i = 0; i < made.update.a.cols(); ++i) { made.update.a(k, i) *= e.data()[k]; }
        }
    }
    if (const auto* const vector = parts.get(role::magnitude)) {
        made.kind = "DoRA";
        const auto values = read_flat_factor<double>(file, *vector);
        made.magnitude.assign(values.data(), values.data() + values.size());
        const bool by_output = dialect != adapter_dialect::kohya
            || (!vector->shape.empty() && static_cast<std::size_t>(vector->shape[0]) == made.update.out());
        if (made.magnitude.size() != made.update.out() || !by_output) {
            raise<format_error>(error_code::adapter_unsupported,
                message("tensor '", vector->name, "' has shape ", to_string(vector->shape), ", and module '", module,
                    "' has ", made.update.out(),
                    " outputs: DoRA is folded where it has a magnitude for each output; "
                    "fold it into its base with what wrote it"),
                where);
        }
    }
    if (const auto* const bias = parts.get(role::bias)) {
        made.bias.a = read_flat_factor<T>(file, *bias);
        if (made.bias.a.rows() != 1 || made.bias.a.cols() != made.update.out()) {
            raise<format_error>(error_code::adapter_tensors,
                message("tensor '", bias->name, "' has shape ", to_string(bias->shape), ", and module '", module,
                    "' has ", made.update.out(), " outputs"),
                where);
        }
        made.bias.b = identity_matrix<T>(1);
    }
    return made;
}

/// Refuses configurations of PEFT whose update is none that can be folded, each by name.
inline void check_foldable(const nlohmann::json& config, const std::string& file)
{
    const peft_fields fields(config, file);
    const auto refuse = [&](std::string_view what, std::string_view why) {
        raise<format_error>(error_code::adapter_unsupported,
            message(what, ": ", why, "; fold it into its base with PEFT (merge_and_unload) and go on with the model"),
            file);
    };
    if (const auto* type = fields.find("peft_type")) {
        const bool known = *type == "LORA" || *type == "LOHA" || *type == "LOKR" || *type == "ADALORA";
        if (!known) {
            refuse("peft_type " + (type->is_string() ? type->get<std::string>() : fields.shown(*type)),
                "another kind of adapter");
        }
    }
    check_lora_initialization(fields, {"gaussian", "eva", "orthogonal", "mica", "velora"}, refuse);
    for (const auto& [field, why] : beyond_updates) {
        const bool parameters = std::string_view(field) == "target_parameters" && peft_type_of(config) == "LORA";
        if (!parameters && fields.says_something(field)) { refuse(field, why); }
    }
}

/// Refuses a module whose factors are of another kind than the configuration says: the update would be another one.
inline void check_kind(const peft_fields& fields, std::string_view name, const std::string& module,
    std::string_view kind, const std::string& where, bool biased)
{
    const auto wrong = [&](const std::string& what) {
        raise<format_error>(error_code::adapter_tensors, message("module '", module, "' ", what), where);
    };
    const auto* const type = fields.find("peft_type");
    const bool loha = type && *type == "LOHA", lokr = type && *type == "LOKR";
    const bool is_loha = kind == "LoHa", is_lokr = kind == "LoKr";
    if (type && (loha != is_loha || lokr != is_lokr)) {
        wrong(message("has the factors of ", kind, ", but ", name, " says peft_type ",
            type->template get<std::string>(), loha ? ", and its hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b" : "",
            lokr ? ", and its lokr_w1 and lokr_w2" : "", loha || lokr ? " are missing" : "",
            ": correct peft_type, or fetch the file that belongs to it"));
    }
    if (is_loha || is_lokr) { return; }
    if (biased && fields.find("lora_bias") && !fields.says_something("lora_bias")) {
        wrong(message("has a lora_B.bias, but ", name, " says lora_bias false: correct one of them"));
    }
    const bool promised = fields.says_something("use_dora");
    if (promised && kind != "DoRA") {
        wrong(message("has no lora_magnitude_vector, but ", name,
            " says use_dora, which rescales every module by one: save the adapter anew, or set use_dora to false if "
            "it was trained without"));
    }
    if (!promised && fields.find("use_dora") && kind == "DoRA") {
        wrong(message("has a lora_magnitude_vector, but ", name, " says use_dora false: correct one of them"));
    }
}

/// What a configuration of PEFT says of the modules of an adapter: adapter_config.json, or what diffusers keeps of one
/// in the header of its file.
class peft_settings {
public:
    /// `ordered` is the same configuration in file order, which decides between patterns. Messages call it `name`, and
    /// the file that it is in `file`. Throws what check_foldable() throws; format_error for fields of other types.
    peft_settings(
        nlohmann::json config, const nlohmann::ordered_json& ordered, std::string_view name, const std::string& file)
        : config_(std::move(config))
        , name_(name)
        , file_(file)
    {
        check_foldable(config_, file_);
        type_ = peft_type_of(config_);
        const peft_fields fields(config_, file_);
        const auto pattern = [&](const char* field) {
            return peft_patterns(ordered.contains(field) ? ordered[field] : nlohmann::ordered_json(), field, file_);
        };
        if (type_ != "ADALORA") { // whose rank_pattern has masks
            ranks_ = pattern("rank_pattern");
            alphas_ = pattern("alpha_pattern");
        }
        const bool loha_or_lokr = type_ == "LOHA" || type_ == "LOKR";
        rank_ = fields.number("r", 8);
        alpha_ = fields.number(loha_or_lokr ? "alpha" : "lora_alpha", 8);
        if (type_ == "ADALORA") { // it divides by the rank that it began with, whatever was cut, and a little more
            initial_rank_ = fields.number("init_r", 12) + 1e-5;
            if (!(initial_rank_ >= 1)) {
                raise<format_error>(error_code::adapter_config,
                    message("init_r is ", peft_fields::shown(*fields.find("init_r")), "; expected a rank above 0"),
                    file_);
            }
        }
        root_ = !loha_or_lokr && fields.flag("use_rslora");
    }
    [[nodiscard]] const std::string& type() const noexcept { return type_; }
    [[nodiscard]] bool flag(const char* field) const { return peft_fields(config_, file_).flag(field); }
    /// Refuses factors of another kind than it says, of a file of tensors `where`.
    void check(const std::string& module, std::string_view kind, bool biased, const std::string& where) const
    {
        check_kind(peft_fields(config_, file_), name_, module, kind, where, biased);
    }
    /// The rank of a module.
    [[nodiscard]] double rank(const std::string& module) { return ranks_.find(module, rank_); }
    /// The scaling of a module with factors of this rank (0: of none), and an alpha in the file, where it has one.
    [[nodiscard]] double scaling(
        const std::string& module, std::size_t rank, const std::optional<double>& alpha, const std::string& where)
    {
        if (type_ == "ADALORA") { return (alpha_ > 0 ? alpha_ : static_cast<double>(rank)) / initial_rank_; }
        const double expected = ranks_.find(module, rank_), strength = alphas_.find(module, alpha_);
        if (rank > 0 && static_cast<double>(rank) != expected) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has rank ", rank, " but ", name_, " says ", expected), where);
        }
        if (alpha && *alpha != strength) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has the alpha ", *alpha, " but ", name_, " says ", strength,
                    ": correct one of them"),
                where);
        }
        return root_ ? strength / std::sqrt(expected) : strength / expected;
    }
    /// Throws format_error for a pattern that no module had.
    void check_used() const
    {
        ranks_.check_used("rank_pattern", file_);
        alphas_.check_used("alpha_pattern", file_);
    }

private:
    nlohmann::json config_;
    std::string name_, file_, type_;
    peft_patterns ranks_, alphas_;
    double rank_ = 8, alpha_ = 8, initial_rank_ = 0;
    bool root_ = false;
};

/// The configurations that diffusers keeps in the header of a file, by component; "" for one of a single model. `text`
/// is what stands under diffusers_metadata_key. Throws format_error.
[[nodiscard]] inline std::map<std::string, peft_settings> diffusers_settings(
    const std::string& text, const std::string& file)
{
    const std::string place = message(file, ": ", diffusers_metadata_key);
    const auto whole = parse_json(text, place);
    if (!whole.is_object()) { raise<format_error>(error_code::adapter_config, "is not a JSON object", place); }
    const auto ordered = nlohmann::ordered_json::parse(text); // in file order, which decides between patterns
    std::map<std::string, nlohmann::ordered_json> parts;
    for (const auto& [key, value] : ordered.items()) {
        const auto dot = key.find('.');
        parts[key.substr(0, dot == key.npos ? 0 : dot)][dot == key.npos ? key : key.substr(dot + 1)] = value;
    }
    std::map<std::string, peft_settings> settings;
    for (const auto& [component, fields] : parts) {
        settings.emplace(
            component, peft_settings(nlohmann::json::parse(fields.dump()), fields, diffusers_metadata_key, place));
    }
    return settings;
}

/// Which modules MLX's configuration has adapted: those of the last layers, by their names within a layer or the model.
struct mlx_targets {
    std::string_view layers_field = "num_layers"; ///< "lora_layers" of old
    std::optional<std::int64_t> layers{}; ///< how many of the last ones; nothing: all
    std::optional<std::vector<std::string>> keys{}; ///< names; nothing: every module that can be

    /// Throws format_error for fields of other types.
    mlx_targets(const nlohmann::json& config, const std::string& file)
    {
        const peft_fields fields(config, file);
        if (!config.contains("num_layers")) { layers_field = "lora_layers"; }
        if (const auto* const given = fields.find(std::string(layers_field).c_str())) {
            if (!given->is_number_integer()) {
                raise<format_error>(error_code::adapter_config,
                    message(layers_field, " is ", peft_fields::shown(*given),
                        "; expected a whole number, -1 for all layers"),
                    file);
            }
            if (const auto most = given->get<std::int64_t>(); most >= 0) { layers = most; }
        }
        const auto* const parameters = fields.find("lora_parameters");
        if (!parameters || !parameters->is_object()) { return; }
        const auto given = parameters->find("keys");
        if (given == parameters->end() || given->is_null()) { return; }
        if (!given->is_array()
            || !std::all_of(given->begin(), given->end(), [](const auto& one) { return one.is_string(); })) {
            raise<format_error>(error_code::adapter_config,
                message("lora_parameters.keys is ", peft_fields::shown(*given), "; expected a list of names"), file);
        }
        keys = given->template get<std::vector<std::string>>();
    }
    /// Whether a key names a module.
    [[nodiscard]] static bool names(const std::string& key, std::string_view module)
    {
        return key == module || key == place_in_layers(module).within;
    }
};

/// What MLX's configuration says, against what an adapter of it holds. Throws format_error for a number of layers, or
/// keys, that would leave some of the adapter's modules out, as MLX does without a word. Returns the keys that name
/// none of them.
[[nodiscard]] inline std::vector<std::string> check_mlx_targets(
    const nlohmann::json& config, const std::vector<std::string>& modules, const std::string& file)
{
    const mlx_targets targets(config, file);
    std::vector<std::string> idle;
    if (targets.keys) {
        for (const auto& module : modules) {
            if (std::any_of(targets.keys->begin(), targets.keys->end(),
                    [&](const auto& key) { return mlx_targets::names(key, module); })) {
                continue;
            }
            raise<format_error>(error_code::adapter_config,
                message("lora_parameters.keys does not name '", place_in_layers(module).within,
                    "', and the adapter has factors of '", module,
                    "', which MLX would leave out: add the name to keys, or take the module out of the file"),
                file);
        }
        for (const auto& key : *targets.keys) {
            if (std::none_of(modules.begin(), modules.end(),
                    [&](const auto& module) { return mlx_targets::names(key, module); })) {
                idle.push_back(key);
            }
        }
    }
    if (!targets.layers) { return idle; }
    const auto most = *targets.layers;
    std::optional<std::int64_t> first, last;
    for (const auto& module : modules) {
        const auto number = place_in_layers(module).number;
        if (!number) { continue; }
        first = std::min(first.value_or(*number), *number);
        last = std::max(last.value_or(*number), *number);
    }
    if (!first || *last - *first < most) { return idle; }
    raise<format_error>(error_code::adapter_config,
        message(targets.layers_field, " is ", most, ", and the adapter has modules of layers ", *first, " to ", *last,
            ": MLX applies those of the last ", most, " layers alone; correct ", targets.layers_field,
            ", or take the modules of the others out of the file"),
        file);
}

/// The parameters that PEFT adapts whole modules' worth of (target_parameters), by the modules of a file's factors.
/// Factors of several parameters of one module are nested: "experts" has those of the last one, "experts.base_layer"
/// those of the one before it, in the order in which the model has them.
class peft_parameters {
public:
    /// `modules`: all that the file has. Throws format_error for a field of another type.
    peft_parameters(const nlohmann::json& config, const std::vector<std::string>& modules, const std::string& file)
        : file_(file)
        , modules_(modules)
    {
        const auto* const given = peft_fields(config, file).find("target_parameters");
        if (!given) { return; }
        if (!given->is_array()
            || !std::all_of(given->begin(), given->end(), [](const auto& one) { return one.is_string(); })) {
            raise<format_error>(error_code::adapter_config,
                message("target_parameters is ", peft_fields::shown(*given), "; expected names of parameters"), file);
        }
        targets_ = given->template get<std::vector<std::string>>();
    }
    /// The name of the parameter that a module's factors are of; empty: the module's weight. Throws format_error where
    /// nothing says which one of several it is, or factors of one are missing.
    [[nodiscard]] std::string of(const std::string& module)
    {
        constexpr std::string_view nested = ".base_layer";
        std::string_view owner = module;
        std::size_t depth = 0;
        for (; owner.ends_with(nested); ++depth) { owner.remove_suffix(nested.size()); }
        std::vector<std::string> own; // the last segments
        for (const auto& target : targets_) {
            const auto dot = target.rfind('.');
            const auto within = dot == target.npos ? std::string("experts") : target.substr(0, dot);
            const auto last = target.substr(dot == target.npos ? 0 : dot + 1);
            const bool meant = owner == within || owner.ends_with("." + within);
            if (meant) { used_.push_back(target); }
            if (meant && std::find(own.begin(), own.end(), last) == own.end()) { own.push_back(last); }
        }
        if (own.empty()) { return ""; }
        if (own.size() > 1) {
            const std::vector<std::string> known{"gate_up_proj", "down_proj"}; // as every model has them
            if (own.size() != 2 || !std::is_permutation(own.begin(), own.end(), known.begin())) {
                raise<format_error>(error_code::adapter_unsupported,
                    message("target_parameters names '", own[0], "' and '", own[1], "' of module '", owner,
                        "', and which factors are whose is not known here: fold it into its base with PEFT "
                        "(merge_and_unload) and go on with the model"),
                    file_);
            }
            own = known;
        }
        std::string layer(owner);
        for (std::size_t i = 0; i < own.size(); ++i, layer += nested) {
            if (std::find(modules_.begin(), modules_.end(), layer) != modules_.end()) { continue; }
            raise<format_error>(error_code::adapter_tensors,
                message("target_parameters names '", own[own.size() - 1 - i], "' of module '", owner,
                    "', and the adapter has no factors '", layer, ".lora_A' of it: fetch or save it anew"),
                file_);
        }
        if (depth >= own.size()) {
            raise<format_error>(error_code::adapter_tensors,
                message("the adapter has factors of '", module, "', and target_parameters names ", own.size(),
                    " of the parameters of '", owner, "': fetch or save it anew"),
                file_);
        }
        return std::string(owner) + "." + own[own.size() - 1 - depth];
    }
    /// Throws format_error for a name of which the file has no factors.
    void check_used() const
    {
        for (const auto& target : targets_) {
            if (std::find(used_.begin(), used_.end(), target) != used_.end()) { continue; }
            raise<format_error>(error_code::adapter_tensors,
                message("target_parameters names '", target,
                    "', and the adapter has no factors of it: fetch or save it anew, or take the name out"),
                file_);
        }
    }

private:
    std::string file_;
    const std::vector<std::string>& modules_;
    std::vector<std::string> targets_, used_;
};

/// Splits the factors of a parameter of `count` matrices: those of lora_A stand one below the other, those of lora_B's
/// columns alternate. `made` has them as they are stored.
template <class T>
[[nodiscard]] std::vector<lora_update<T>> split_factors(const lora_update<T>& made, std::size_t count)
{
    const std::size_t rank = made.rank() / count;
    std::vector<lora_update<T>> parts;
    for (std::size_t e = 0; e < count; ++e) {
        lora_update<T> one{matrix<T>(made.out(), rank, matrix_order::row_major),
            matrix<T>(rank, made.in(), matrix_order::row_major), made.scaling};
        for (std::size_t k = 0; k < rank; ++k) {
            for (std::size_t i = 0; i < made.out(); ++i) { one.b(i, k) = made.b(i, k * count + e); }
            for (std::size_t j = 0; j < made.in(); ++j) { one.a(k, j) = made.a(e * rank + k, j); }
        }
        parts.push_back(std::move(one));
    }
    return parts;
}

} // namespace detail

/// Reads an adapter of any dialect: a PEFT directory, a directory of diffusers or MLX, or a file (a GGUF file by
/// read_gguf_adapter()). Told apart by the names of its tensors; a file that mixes dialects, or holds several adapters,
/// is refused. Scalings are α/r (α/√r with use_rslora), with α and r from the configuration and its patterns, from
/// those that diffusers keeps in the header of its file (`lora_adapter_metadata`), or from `.alpha` tensors; MLX gives
/// its scale; where nothing gives one α is r, which `notes` says. LoHa, LoKr and Tucker's forms of them become updates
/// of higher rank, exactly but for the rounding of products of factors to T. Factors of convolutions are flattened,
/// with the kernel among the inputs. Throws io_error; format_error for halves without partners, a rank of 0, alphas
/// that contradict each other, factors of another kind than the configuration says (peft_type, use_dora), tensors with
/// no place in an adapter, configurations that no update can say; shape_mismatch; dtype_mismatch.
///
///     const auto adapter = read_adapter("style.safetensors");
template <arithmetic_element T = float>
[[nodiscard]] adapter_contents<T> read_adapter(const std::filesystem::path& path)
{
    using role = detail::adapter_role;
    adapter_contents<T> adapter;
    adapter.label = "'" + path.string() + "'";
    adapter.file = adapter_tensor_file(path);
    if (is_gguf_file(adapter.file)) { return read_gguf_adapter<T>(adapter.file); }
    const safetensors_file file = detail::open_weights(adapter.file, adapter.notes);
    const std::string where = adapter.file.string();

    std::error_code ignored;
    const auto config_path = adapter.file.parent_path() / peft_config_name;
    const std::string config_file = config_path.string();
    const bool may_have_config = std::filesystem::is_directory(path, ignored)
        || adapter.file.filename() == peft_model_name || adapter.file.filename() == peft_pickle_name;
    std::string text;
    std::optional<mapped_file> configuration;
    if (may_have_config && std::filesystem::exists(config_path, ignored)) {
        configuration.emplace(config_path);
        text = read_text_file(config_path);
        adapter.config = parse_json(text, config_file);
        if (!adapter.config.is_object()) {
            raise<format_error>(error_code::adapter_config, "is not a JSON object", config_file);
        }
    }

    std::map<std::string, detail::adapter_parts> parts;
    std::optional<adapter_dialect> dialect;
    std::string first_name, first_adapter;
    bool any_adapter = false;
    std::vector<std::pair<std::string, const safetensors_entry*>> wholes;
    std::size_t prefixed = 0;
    for (const auto& entry : file.entries()) { prefixed += entry.name.starts_with(peft_prefix) ? 1u : 0u; }
    for (const auto& entry : file.entries()) {
        std::string_view name = entry.name;
        if (prefixed > 0) {
            if (!name.starts_with(peft_prefix)) {
                raise<format_error>(error_code::adapter_tensors,
                    message("tensor '", entry.name, "' does not begin with '", peft_prefix, "' as others of it do"),
                    where);
            }
            name.remove_prefix(peft_prefix.size());
        }
        auto found = detail::role_of(name);
        if (found.role == role::ignored) { continue; }
        if (found.role == role::unknown) {
            raise<format_error>(error_code::adapter_unsupported,
                message("tensor '", entry.name,
                    "' is no part of a LoRA, AdaLoRA, DoRA, LoHa or LoKr adapter: fold it into its base with what "
                    "wrote it"),
                where);
        }
        if (found.dialect && found.role != role::whole && found.role != role::base_copy
            && found.role != role::trained_bias) {
            // diffusers writes PEFT's names too, under the names of its components
            const auto of_diffusers = [](adapter_dialect one) {
                return one == adapter_dialect::peft || one == adapter_dialect::diffusers;
            };
            const bool one_file = dialect && of_diffusers(*dialect) && of_diffusers(*found.dialect)
                && !detail::component_of(first_name).empty() && !detail::component_of(entry.name).empty();
            if (one_file) { found.dialect = *dialect == *found.dialect ? *dialect : adapter_dialect::diffusers; }
            else if (dialect && *dialect != *found.dialect) {
                raise<format_error>(error_code::adapter_tensors,
                    message("mixes dialects: '", first_name, "' is ", to_string(*dialect), "'s, and '", entry.name,
                        "' ", to_string(*found.dialect), "'s; split the file, or save it anew"),
                    where);
            }
            if (!dialect) { first_name = entry.name; }
            dialect = found.dialect;
        }
        if (!found.adapter.empty()) {
            if (any_adapter && found.adapter != first_adapter) {
                raise<format_error>(error_code::adapter_tensors,
                    message("holds the adapters '", first_adapter, "' and '", found.adapter,
                        "': save each into a file of its own"),
                    where);
            }
            first_adapter = found.adapter;
            any_adapter = true;
        }
        if (found.role == role::whole) {
            wholes.emplace_back(found.module, &entry);
            continue;
        }
        if (found.role == role::trained_bias) {
            wholes.emplace_back(found.module + ".bias", &entry);
            continue;
        }
        if (found.role == role::base_copy) {
            const auto* const data = static_cast<const std::byte*>(file.tensor(entry).data);
            adapter.copies.emplace(found.module + ".weight",
                peft_tensor{entry.dtype, entry.shape, std::vector<std::byte>(data, data + entry.bytes)});
            continue;
        }
        // Embeddings that PEFT saves whole bring their magnitudes once more, under another name.
        const auto [place, is_first] = parts[found.module].tensors.emplace(found.role, &entry);
        const auto& first = *place->second;
        const bool once_more = !is_first && first.dtype == entry.dtype && first.shape == entry.shape
            && std::memcmp(file.tensor(first).data, file.tensor(entry).data, entry.bytes) == 0;
        if (!is_first && !once_more) {
            raise<format_error>(error_code::adapter_tensors,
                message("tensor '", entry.name, "' is the second such factor of its module"), where);
        }
    }
    const bool underscored = std::any_of(parts.begin(), parts.end(), [](const auto& one) {
        return one.first.starts_with("lora_unet_") || one.first.starts_with("lora_te")
            || one.first.starts_with("lycoris_") || one.first.starts_with("lora_transformer_");
    });
    if (!dialect) { dialect = underscored ? adapter_dialect::kohya : adapter_dialect::peft; } // LoHa and LoKr
    adapter.dialect = *dialect;
    if (*dialect == adapter_dialect::mlx) { // its DoRA keeps the magnitudes of a module as MODULE.m
        std::erase_if(wholes, [&](const auto& one) {
            const auto& name = one.first;
            if (!name.ends_with(".m")) { return false; }
            const auto module = parts.find(name.substr(0, name.size() - 2));
            return module != parts.end() && module->second.tensors.emplace(role::magnitude, one.second).second;
        });
        const auto type = adapter.config.find("fine_tune_type");
        for (const auto& [module, found] : parts) {
            if (type == adapter.config.end() || *type != "dora" || found.get(role::magnitude)) { continue; }
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has no magnitudes ('", module, ".m'), but ", peft_config_name,
                    " says fine_tune_type dora, which rescales every module by them: save the adapter anew"),
                where);
        }
    }
    const bool peft_config = !text.empty() && (*dialect == adapter_dialect::peft);
    if (parts.empty() && adapter.copies.empty()) {
        if (peft_config) { detail::check_foldable(adapter.config, config_file); } // another kind is said by its name
        raise<format_error>(error_code::adapter_tensors, "holds no factors of an adapter", where);
    }

    std::map<std::string, detail::peft_settings> settings; // by component; all are under "" outside diffusers
    const auto kept = file.metadata().find(detail::diffusers_metadata_key);
    if (peft_config) {
        const auto& all = settings
                              .emplace("",
                                  detail::peft_settings(adapter.config, nlohmann::ordered_json::parse(text),
                                      peft_config_name, config_file))
                              .first->second;
        adapter.fan_in_fan_out = all.flag("fan_in_fan_out");
        adapter.tied = all.flag("ensure_weight_tying");
    }
    else if (kept != file.metadata().end()
        && (*dialect == adapter_dialect::peft || *dialect == adapter_dialect::diffusers)) {
        settings = detail::diffusers_settings(kept->second, where);
        adapter.dialect = adapter_dialect::diffusers;
    }
    /// What says the scaling of a module, and what the module is called there.
    const auto settings_of = [&](const std::string& module) {
        const auto component = peft_config ? std::string_view() : detail::component_of(module);
        auto place = settings.find(std::string(component));
        std::string name = component.empty() ? module : module.substr(component.size() + 1);
        if (place == settings.end() && settings.size() == 1 && settings.begin()->first.empty()) {
            place = settings.begin();
            name = module;
        }
        return std::pair(place == settings.end() ? nullptr : &place->second, std::move(name));
    };
    std::optional<double> mlx_scale;
    std::optional<double> mlx_rank;
    if (*dialect == adapter_dialect::mlx) {
        std::vector<std::string> names;
        for (const auto& one : parts) { names.push_back(one.first); }
        for (const auto& key : detail::check_mlx_targets(adapter.config, names, config_file)) {
            adapter.notes.push_back(message(adapter.label, " has no factors of '", key,
                "', which lora_parameters.keys of its ", peft_config_name, " names: it does not change that"));
        }
        const auto given = adapter.config.find("lora_parameters");
        const auto number = [&](const char* field) -> std::optional<double> {
            if (given == adapter.config.end() || !given->is_object()) { return std::nullopt; }
            const auto value = given->find(field);
            return value != given->end() && value->is_number() ? std::optional(value->template get<double>())
                                                               : std::nullopt;
        };
        mlx_scale = number("scale");
        mlx_rank = number("rank");
    }
    std::size_t other_ranks = 0;
    std::size_t without_alpha = 0;
    std::size_t cut_to_nothing = 0;
    std::vector<std::string> stored_modules;
    for (const auto& one : parts) { stored_modules.push_back(one.first); }
    detail::peft_parameters parameters(
        peft_config ? adapter.config : nlohmann::json::object(), stored_modules, config_file);
    for (const auto& [module, found] : parts) {
        std::size_t rank = 0;
        const auto parameter = parameters.of(module);
        const auto said = settings_of(parameter.empty() ? module : parameter);
        const bool adalora = said.first && said.first->type() == "ADALORA";
        if (const auto* const values = found.get(role::singular)) {
            if (!adalora) {
                raise<format_error>(error_code::adapter_tensors,
                    message("tensor '", values->name, "' is AdaLoRA's, ",
                        said.first ? message("but ", peft_config_name, " says peft_type ", said.first->type())
                                   : message("whose scaling is in ", peft_config_name,
                                         ": name the directory that holds both")),
                    where);
            }
            if (values->bytes == 0) { // a module of which AdaLoRA has left nothing
                ++cut_to_nothing;
                continue;
            }
        }
        else if (adalora) {
            raise<format_error>(error_code::adapter_tensors,
                message("module '", module, "' has no lora_E, which every module of AdaLoRA has"), where);
        }
        auto made = detail::read_module<T>(file, module, found, *dialect, rank);
        if (said.first) { said.first->check(module, made.kind, made.bias.rank() > 0, where); }
        std::size_t matrices = 1;
        if (!parameter.empty()) {
            if (made.kind != "LoRA" || made.bias.rank() > 0 || made.embedding || !made.kernel.empty()) {
                raise<format_error>(error_code::adapter_unsupported,
                    message("parameter '", parameter,
                        "' has factors of another kind than those of plain LoRA: fold it into its base with PEFT "
                        "(merge_and_unload) and go on with the model"),
                    where);
            }
            const double expected = said.first->rank(said.second);
            matrices = expected >= 1 ? static_cast<std::size_t>(static_cast<double>(rank) / expected) : 0;
            if (matrices == 0 || static_cast<double>(matrices) * expected != static_cast<double>(rank)) {
                raise<format_error>(error_code::adapter_tensors,
                    message("the factors of parameter '", parameter, "' have rank ", rank, " in all, and ",
                        peft_config_name, " says ", expected, " of each matrix: the one is no multiple of the other"),
                    where);
            }
            rank /= matrices;
        }
        std::optional<double> alpha;
        if (const auto* const entry = found.get(role::alpha)) {
            const auto value = detail::read_flat_factor<double>(file, *entry);
            if (value.size() != 1 || !std::isfinite(value.data()[0])) {
                raise<format_error>(error_code::adapter_tensors,
                    message("tensor '", entry->name, "' of shape ", to_string(entry->shape), " is no finite number"),
                    where);
            }
            alpha = value.data()[0];
        }
        double scaling = 1;
        if (said.first) { scaling = said.first->scaling(said.second, rank, alpha, where); }
        else if (mlx_scale) {
            scaling = *mlx_scale;
        }
        else if (alpha && rank > 0) {
            scaling = *alpha / static_cast<double>(rank);
        }
        else if (rank > 0) {
            ++without_alpha;
        }
        if (mlx_rank && static_cast<double>(rank) != *mlx_rank) { ++other_ranks; }
        made.update.scaling = scaling;
        made.bias.scaling = scaling;
        check_update(made.update, module);
        if (parameter.empty()) {
            adapter.modules.emplace(module, std::move(made));
            continue;
        }
        const auto dot = parameter.rfind('.');
        if (matrices == 1 && parameter.substr(dot) == ".weight") {
            adapter.modules.emplace(parameter.substr(0, dot), std::move(made));
            continue;
        }
        auto updates = detail::split_factors(made.update, matrices);
        for (std::size_t e = 0; e < matrices; ++e) {
            adapted_module<T> one;
            one.update = std::move(updates[e]);
            one.bias.scaling = scaling;
            one.stored = made.stored;
            one.slice = {parameter, e, matrices};
            adapter.modules.emplace(
                parameter.substr(0, dot + 1) + std::to_string(e) + parameter.substr(dot), std::move(one));
        }
    }
    for (const auto& one : settings) { one.second.check_used(); }
    parameters.check_used();
    if (other_ranks > 0) {
        adapter.notes.push_back(message(adapter.label, " has ", other_ranks, " of ", parts.size(),
            " modules of another rank than the ", *mlx_rank, " of ", peft_config_name,
            ": each is taken with its own, as MLX does, whose scale is the same for any rank"));
    }
    if (cut_to_nothing > 0) {
        adapter.notes.push_back(message(adapter.label, " has ", cut_to_nothing, " of ", parts.size(),
            " modules at rank 0, to which AdaLoRA has cut them: they change nothing"));
    }
    if (without_alpha > 0) {
        adapter.notes.push_back(message(adapter.label, " gives no alpha for ", without_alpha, " of ", parts.size(),
            " modules: it is taken to be the rank, a scaling of 1"));
    }
    for (const auto& [name, entry] : wholes) {
        const auto* const data = static_cast<const std::byte*>(file.tensor(*entry).data);
        adapter.wholes.emplace(
            name, peft_tensor{entry->dtype, entry->shape, std::vector<std::byte>(data, data + entry->bytes)});
    }
    file.map().check_unchanged();
    if (configuration) { configuration->check_unchanged(); } // of one pair: another run may have replaced both
    return adapter;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_ADAPTER_FILE_HPP

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How write_adapter() and its parts store factors and write files.
struct adapter_write_options {
    std::optional<dtype> output{}; ///< dtype of all factors; empty: each module's as it was stored
    durability mode = durability::synchronised; ///< how hard the file is forced to disk
    overflow on_overflow = overflow::error; ///< a factor that its dtype cannot hold
    gguf_target target{}; ///< of GGUF: the model, as gguf_target_of() its config.json; empty: what the adapter says
    std::string base_name{}; ///< of PEFT and MLX: base_model_name_or_path, model; empty: what the adapter says
    std::string task_type{}; ///< of PEFT: "CAUSAL_LM", …; empty: what the adapter says
};

/// Something of an adapter that a dialect has no place for.
struct adapter_loss {
    std::string what{}, why{}; ///< "module 'x'" and "it is an embedding", say
};

/// An adapter in a dialect: the tensors of its file, and what stands in adapter_config.json (empty: the dialect has
/// none).
struct written_adapter {
    std::vector<tensor_spec> specs{}; ///< of the file
    std::vector<std::vector<std::byte>> bytes{}; ///< of each tensor
    metadata_map metadata{}; ///< of its header, beside the format
    std::string config{}; ///< text of adapter_config.json
    std::string file_name{}; ///< in a directory; empty: the dialect is a file
    std::vector<std::byte> whole{}; ///< the file, where it is no safetensors file (GGUF)
    std::uint64_t saturated = 0; ///< entries that became the largest number of their dtype (overflow::saturate)
};

namespace detail {

class adapter_writer {
public:
    adapter_writer(written_adapter& out, overflow how)
        : out_(out)
        , how_(how)
    { }

    /// rows×cols entries by value(i, j), as a tensor of `shape`.
    template <class Value>
    void add(const std::string& name, dtype type, extents shape, std::size_t rows, std::size_t cols, const Value& value)
    {
        auto& bytes = out_.bytes.emplace_back();
        visit_storage(type, name, [&]<class S>(std::type_identity<S>) {
            bytes.resize(rows * cols * sizeof(S));
            for (std::size_t i = 0; i < rows; ++i) {
                for (std::size_t j = 0; j < cols; ++j) {
                    const double exact = value(i, j);
                    const auto refuse = [&] {
                        raise<nonfinite_error>(error_code::result_overflow,
                            message("factor '", name, "' would hold ", exact, " at index ", i * cols + j, ", which ",
                                to_string(type), " cannot; ", if_narrow<S>("choose a wider dtype for the adapter, or "),
                                "let it saturate or propagate (overflow)"));
                    };
                    auto rounded = static_cast<arithmetic_type<S>>(exact);
                    if (how_ == overflow::saturate && std::isfinite(exact) && !std::isfinite(rounded)) {
                        rounded = std::numeric_limits<arithmetic_type<S>>::max() * (exact < 0 ? -1 : 1);
                        ++out_.saturated;
                    }
                    const S stored = narrow_within<S>(rounded, how_, out_.saturated, refuse);
                    std::memcpy(bytes.data() + (i * cols + j) * sizeof(S), &stored, sizeof(S));
                }
            }
        });
        out_.specs.push_back({name, type, std::move(shape)});
    }
    void add(const std::string& name, const peft_tensor& tensor)
    {
        out_.bytes.push_back(tensor.bytes);
        out_.specs.push_back({name, tensor.dtype, tensor.shape});
    }

private:
    written_adapter& out_;
    overflow how_;
};

/// Throws nonfinite_error, by the names that the adapter's own file has where it is PEFT's, for a factor with NaN or
/// infinity.
template <arithmetic_element T>
void check_finite_factors(const adapter_contents<T>& adapter)
{
    for (const auto& one : adapter.modules) {
        const auto& module = one.first;
        const auto& made = one.second;
        const auto check = [&](std::size_t rows, std::size_t cols, std::string_view what, std::string_view in_peft,
                               const auto& value) {
            for (std::size_t i = 0; i < rows * cols; ++i) {
                const auto found = static_cast<double>(value(i / cols, i % cols));
                if (std::isfinite(found)) { continue; }
                const bool own = adapter.dialect == adapter_dialect::peft && made.kind != "LoHa" && made.kind != "LoKr";
                raise<nonfinite_error>(error_code::not_finite,
                    message(own ? message("tensor '", peft_prefix, module, in_peft, "'")
                                : message("module '", module, "': ", what),
                        " of ", adapter.label, " holds ", std::isnan(found) ? "NaN" : "infinity", " at index ", i,
                        ": repair the adapter, or let it propagate (overflow)"));
            }
        };
        const auto entry_of = [](const auto& factor) {
            return [&factor](std::size_t i, std::size_t j) { return factor(i, j); };
        };
        const auto &a = made.update.a, &b = made.update.b;
        check(a.rows(), a.cols(), "its factor A", made.embedding ? ".lora_embedding_A" : ".lora_A.weight", entry_of(a));
        check(b.rows(), b.cols(), "its factor B", made.embedding ? ".lora_embedding_B" : ".lora_B.weight", entry_of(b));
        check(1, made.magnitude.size(), "its magnitude", ".lora_magnitude_vector",
            [&](std::size_t, std::size_t o) { return made.magnitude[o]; });
        if (made.bias.rank() > 0) {
            check(made.bias.a.rows(), made.bias.a.cols(), "its bias", ".lora_B.bias", entry_of(made.bias.a));
        }
    }
}

/// Whether a module is called as kohya calls them, dots being underscores.
[[nodiscard]] inline bool is_kohya_name(std::string_view module) noexcept
{
    return module.starts_with("lora_unet_") || module.starts_with("lora_te") || module.starts_with("lycoris_")
        || module.starts_with("lora_transformer_");
}
/// A module's name with its component, for diffusers: that of a UNet where nothing says another.
[[nodiscard]] inline std::string diffusers_name(const std::string& module)
{
    if (!component_of(module).empty()) { return module; }
    return (module.starts_with("text_model.") ? "text_encoder." : "unet.") + module;
}
/// The module's name in its component's model, without what some versions of transformers put before it.
[[nodiscard]] inline std::string name_in_component(const std::string& with_component)
{
    auto name = with_component.substr(component_of(with_component).size() + 1);
    constexpr std::string_view encoder = "text_model.";
    if (name.starts_with(encoder)) { name.erase(0, encoder.size()); }
    return name;
}
/// A module's name for kohya: its component, and underscores.
[[nodiscard]] inline std::string kohya_name(std::string module, bool several_encoders)
{
    if (is_kohya_name(module)) { return module; }
    std::string prefix = "lora_unet_";
    const auto off = [&](std::string_view component, const char* on) {
        if (!module.starts_with(component)) { return false; }
        module.erase(0, component.size());
        prefix = on;
        return true;
    };
    if (!off("unet.", "lora_unet_") && !off("text_encoder_2.", "lora_te2_")
        && !off("text_encoder.", several_encoders ? "lora_te1_" : "lora_te_") && module.starts_with("text_model.")) {
        prefix = "lora_te_";
    }
    std::replace(module.begin(), module.end(), '.', '_');
    return prefix + module;
}

} // namespace detail

/// What of an adapter a dialect has no place for, in the order of its names; empty: it holds all. converted_adapter()
/// refuses the first.
///
///     for (const auto& loss : not_held(adapter, adapter_dialect::mlx)) { std::cout << loss.what << ": " << loss.why; }
template <arithmetic_element T>
[[nodiscard]] std::vector<adapter_loss> not_held(
    const adapter_contents<T>& adapter, adapter_dialect dialect, const adapter_write_options& options = {})
{
    std::vector<adapter_loss> losses;
    const auto lose = [&](std::string what, std::string why) { losses.push_back({std::move(what), std::move(why)}); };
    const bool is_peft = dialect == adapter_dialect::peft, to_gguf = dialect == adapter_dialect::gguf,
               to_mlx = dialect == adapter_dialect::mlx, to_diffusers = dialect == adapter_dialect::diffusers;
    if (adapter.modules.empty()) { lose("an adapter without a module", "there is nothing to write"); }
    if (!is_peft) {
        for (const auto& one : adapter.wholes) {
            lose("'" + one.first + "'", "it was trained whole, and the dialect holds factors alone");
        }
    }
    const gguf_target& target = options.target.architecture.empty() ? adapter.target : options.target;
    const bool known = to_gguf && !target.architecture.empty();
    if (to_gguf && !known) {
        lose("an adapter",
            "nothing says which architecture its model has, on which names there depend; the "
            "config.json of its base does");
    }
    // use_dora holds for all modules of a configuration, and diffusers has one for each component.
    const auto group_of = [&](const std::string& module) {
        return to_diffusers ? std::string(detail::component_of(detail::diffusers_name(module))) : std::string();
    };
    std::set<std::string> rescaled, used;
    for (const auto& one : adapter.modules) {
        if (!one.second.magnitude.empty()) { rescaled.insert(group_of(one.first)); }
    }
    for (const auto& one : adapter.modules) {
        const auto& module = one.first;
        const auto& made = one.second;
        const auto& update = made.update;
        const std::string name = "module '" + module + "'";
        const dtype type = options.output.value_or(made.stored);
        if (detail::is_kohya_name(module) && dialect != adapter_dialect::kohya) {
            lose(name, "its dots are underscores, and nothing says where they were; the base's names do (--base)");
            continue;
        }
        if (!made.slice.parameter.empty()) {
            lose(name,
                "it is one of the experts that are the parameter '" + made.slice.parameter
                    + "', which only PEFT's target_parameters name; a base with a weight for each expert gives it a "
                      "name (--base), and fuse folds it");
            continue;
        }
        if (made.paired_rows && !(to_gguf && adapter.target.architecture == target.architecture)) {
            lose(name,
                "its rows are in the order of llama.cpp, and nothing says how many heads there are; the config.json of "
                "its base does");
        }
        if ((to_diffusers || dialect == adapter_dialect::kohya) && made.embedding) { lose(name, "it is an embedding"); }
        if (!is_peft && made.bias.rank() > 0) { lose("the bias of " + name, "it has no place there"); }
        if (to_gguf && !made.magnitude.empty()) { lose(name, "it is DoRA's"); }
        if (dialect != adapter_dialect::kohya && !to_gguf && made.magnitude.empty()
            && rescaled.contains(group_of(module))) {
            lose(name,
                message("it has no magnitudes, and ", to_mlx ? "fine_tune_type dora" : "use_dora",
                    ", which others need, holds for all"));
        }
        if ((to_mlx || to_gguf) && !made.kernel.empty()) { lose(name, "it is a convolution"); }
        if (adapter.fan_in_fan_out && !is_peft && !to_gguf && !made.embedding && update.out() == update.in()) {
            lose(name,
                "it is square, and lies in×out in its base (fan_in_fan_out), which the dialect has no word for: keep "
                "PEFT's, or fold it into its base");
        }
        if (!known) { continue; }
        const std::string tensor = gguf_tensor_name(module, target);
        if (tensor.empty()) {
            lose(name, message("llama.cpp's architecture ", target.architecture, " has no weight of that name"));
            continue;
        }
        if (tensor == "output.weight" && target.tied) {
            lose(name, "llama.cpp keeps one tensor for it and the embedding that it is tied to");
        }
        if (made.embedding != (tensor == "token_embd.weight")) {
            lose(
                name, made.embedding ? "it is factored as an embedding" : "it is an embedding and not factored as one");
        }
        if (type != dtype::f32 && type != dtype::f16 && type != dtype::bf16) {
            lose(name,
                message("its factors are ", to_string(type), ", and llama.cpp takes F32, F16 and BF16; choose one"));
        }
        if (!used.insert(tensor).second) { lose(name, message("another module is '", tensor, "' too")); }
        const bool q = module.ends_with(".q_proj"), k = module.ends_with(".k_proj");
        if (!target.pairs_rows() || made.paired_rows || !(q || k)) { continue; }
        const std::size_t heads = q ? target.heads : target.kv_heads;
        if (heads == 0 || update.out() % (2 * heads) != 0) {
            lose(name,
                heads == 0 ? std::string("llama.cpp keeps its rows in pairs within each head, and the configuration "
                                         "does not say how many heads there are (num_attention_heads)")
                           : message(update.out(), " rows are no ", heads,
                                 " heads of an even size, in which llama.cpp pairs them"));
        }
    }
    return losses;
}

/// An adapter as the tensors of a dialect. Factors keep their bits in the dtype that they were stored in, and scalings
/// become α = scaling·r where the dialect has an α; MLX has one scale for all modules, and readers of diffusers' files
/// do not all know of an α: there what is left of it goes into the up factors, which is exact for powers of two. LoHa
/// and LoKr are written as the LoRA that they equal. Names need dots: kohya's are resolved before (match_modules()).
/// GGUF has one α, rounded to f32, and llama.cpp's names and order of rows (options.target). MLX has one rank: smaller
/// ones are filled up with zeros. Throws format_error for what the dialect cannot say, by name (not_held()): tensors
/// that were trained whole and biases outside PEFT, embeddings in kohya's files and diffusers', DoRA in GGUF,
/// convolutions in MLX and GGUF, modules that llama.cpp has no name for; nonfinite_error where a factor overflows its
/// dtype, or holds NaN or infinity, unless these propagate (overflow::propagate).
///
///     const auto file = converted_adapter(read_adapter("style.safetensors"), adapter_dialect::diffusers);
template <arithmetic_element T>
[[nodiscard]] written_adapter converted_adapter(
    const adapter_contents<T>& adapter, adapter_dialect dialect, const adapter_write_options& options = {})
{
    if (options.on_overflow != overflow::propagate) { detail::check_finite_factors(adapter); }
    if (const auto losses = not_held(adapter, dialect, options); !losses.empty()) {
        raise<format_error>(error_code::adapter_unsupported,
            message(losses[0].what, " cannot be written as ", to_string(dialect), ": ", losses[0].why,
                losses.size() > 1 ? message(" (and ", losses.size() - 1, " more)") : std::string()),
            adapter.label);
    }
    written_adapter out;
    detail::adapter_writer writer(out, options.on_overflow);
    const bool is_peft = dialect == adapter_dialect::peft;
    const bool several = std::any_of(adapter.modules.begin(), adapter.modules.end(),
        [](const auto& one) { return one.first.starts_with("text_encoder_2."); });
    const auto& leading = adapter.modules.begin()->second.update;
    double mlx_scale = 1;
    std::size_t mlx_rank = 0;
    if (dialect == adapter_dialect::mlx) {
        mlx_scale = leading.scaling;
        for (const auto& [module, made] : adapter.modules) { mlx_rank = std::max(mlx_rank, made.update.rank()); }
        if (mlx_scale == 0) { mlx_scale = 1; }
    }
    const gguf_target& target = options.target.architecture.empty() ? adapter.target : options.target;
    double gguf_alpha = static_cast<float>(leading.scaling * static_cast<double>(leading.rank()));
    if (gguf_alpha == 0 || !std::isfinite(gguf_alpha)) { gguf_alpha = 1; } // 0 is a scaling of 1 to llama.cpp
    peft_adapter<T> for_config;
    std::map<std::string, peft_adapter<T>> components; // of diffusers
    std::set<std::string> mlx_keys;
    bool dora = false, biased = false;
    for (const auto& one : adapter.modules) {
        const auto& module = one.first;
        const auto& made = one.second;
        const auto& update = made.update;
        const dtype type = options.output.value_or(made.stored);
        const auto rank = static_cast<std::int64_t>(update.rank()), out_size = static_cast<std::int64_t>(update.out());
        const auto shapes = factor_shapes(update, made.kernel, module);
        const extents &a_shape = shapes.first, &b_shape = shapes.second;
        double left = 1; // of the scaling, in the up factor
        if (dialect == adapter_dialect::diffusers) { left = update.scaling; }
        if (dialect == adapter_dialect::mlx) {
            left = same_scaling(update.scaling, mlx_scale) ? 1 : update.scaling / mlx_scale;
        }
        const auto down = [&](std::size_t k, std::size_t i) { return static_cast<double>(update.a(k, i)); };
        const auto up = [&](std::size_t o, std::size_t k) { return left * static_cast<double>(update.b(o, k)); };
        const auto add_pair = [&](const std::string& a_name, const std::string& b_name) {
            writer.add(a_name, type, a_shape, update.rank(), update.in(), down);
            writer.add(b_name, type, b_shape, update.out(), update.rank(), up);
        };
        const auto add_magnitude = [&](const std::string& name, extents shape) {
            if (made.magnitude.empty()) { return; }
            writer.add(name, type, std::move(shape), 1, update.out(),
                [&](std::size_t, std::size_t o) { return made.magnitude[o]; });
            dora = true;
        };
        extents as_peft{out_size}; // the shape of its magnitudes: 1×out×1×1 for a convolution
        if (!made.kernel.empty()) {
            as_peft.assign(2 + made.kernel.size(), 1);
            as_peft[1] = out_size;
        }
        switch (dialect) {
        case adapter_dialect::peft: {
            const std::string stem = std::string(peft_prefix) + module;
            if (made.embedding) { add_pair(stem + ".lora_embedding_A", stem + ".lora_embedding_B"); }
            else {
                add_pair(stem + ".lora_A.weight", stem + ".lora_B.weight");
            }
            add_magnitude(stem + ".lora_magnitude_vector", as_peft);
            if (made.bias.rank() > 0) {
                writer.add(stem + ".lora_B.bias", type, {out_size}, 1, update.out(),
                    [&](std::size_t, std::size_t o) { return static_cast<double>(made.bias.a(0, o)); });
                biased = true;
            }
            for_config.updates.emplace(module, update);
            break;
        }
        case adapter_dialect::kohya: {
            const std::string stem = detail::kohya_name(module, several);
            add_pair(stem + ".lora_down.weight", stem + ".lora_up.weight");
            writer.add(stem + ".alpha", dtype::f32, {}, 1, 1,
                [&](std::size_t, std::size_t) { return update.scaling * static_cast<double>(update.rank()); });
            extents shape(2 + made.kernel.size(), 1);
            shape[0] = out_size;
            add_magnitude(stem + ".dora_scale", shape);
            break;
        }
        case adapter_dialect::diffusers: {
            const std::string stem = detail::diffusers_name(module);
            const std::string component(detail::component_of(stem));
            const std::string word = component.starts_with("text_encoder") ? ".lora_linear_layer" : ".lora";
            add_pair(stem + word + ".down.weight", stem + word + ".up.weight");
            add_magnitude(stem + ".lora_magnitude_vector", as_peft);
            auto& part = components[component];
            part.config["use_dora"] = !made.magnitude.empty();
            auto plain = update;
            plain.scaling = 1;
            part.updates.emplace(detail::name_in_component(stem), std::move(plain));
            break;
        }
        case adapter_dialect::gguf: {
            const std::string tensor = gguf_tensor_name(module, target);
            left = update.scaling * static_cast<double>(update.rank()) / gguf_alpha;
            if (std::abs(left - 1) <= 0x1p-23) { left = 1; } // α is an f32
            std::size_t heads = 0;
            if (target.pairs_rows() && !made.paired_rows) {
                heads = module.ends_with(".q_proj") ? target.heads : module.ends_with(".k_proj") ? target.kv_heads : 0;
            }
            if (made.embedding) { // entries×rank
                writer.add(tensor + ".lora_a", type, {a_shape[1], rank}, update.in(), update.rank(),
                    [&](std::size_t i, std::size_t k) { return down(k, i); });
            }
            else {
                writer.add(tensor + ".lora_a", type, a_shape, update.rank(), update.in(), down);
            }
            writer.add(
                tensor + ".lora_b", type, b_shape, update.out(), update.rank(), [&](std::size_t o, std::size_t k) {
                    return up(heads == 0 ? o : paired_row(o, update.out(), heads), k);
                });
            break;
        }
        default: { // of an embedding `in` is its entries, and both lie as a linear layer's
            const auto all = static_cast<std::int64_t>(mlx_rank);
            writer.add(module + ".lora_a", type, {a_shape[1], all}, update.in(), mlx_rank,
                [&](std::size_t i, std::size_t k) { return k < update.rank() ? down(k, i) : 0; });
            writer.add(module + ".lora_b", type, {all, out_size}, mlx_rank, update.out(),
                [&](std::size_t k, std::size_t o) { return k < update.rank() ? up(o, k) : 0; });
            add_magnitude(module + ".m", {out_size});
            mlx_keys.insert(std::string(detail::place_in_layers(module).within));
        }
        }
    }
    const auto given = [&](const char* field) {
        const auto place = adapter.config.find(field);
        return place != adapter.config.end() && place->is_string() ? place->template get<std::string>() : std::string();
    };
    const bool from_mlx = adapter.dialect == adapter_dialect::mlx;
    const std::string base_name =
        options.base_name.empty() ? given(from_mlx ? "model" : "base_model_name_or_path") : options.base_name;
    if (is_peft) {
        for (const auto& [name, tensor] : adapter.wholes) { writer.add(std::string(peft_prefix) + name, tensor); }
        if (adapter.dialect == adapter_dialect::peft && detail::peft_type_of(adapter.config) == "LORA") {
            for_config.config = adapter.config;
        }
        else if (adapter.dialect == adapter_dialect::peft) { // of another kind: what both have
            for (const char* field : {"auto_mapping", "modules_to_save", "revision", "task_type"}) {
                if (adapter.config.contains(field)) { for_config.config[field] = adapter.config[field]; }
            }
        }
        if (!base_name.empty()) { for_config.config["base_model_name_or_path"] = base_name; }
        if (!options.task_type.empty()) { for_config.config["task_type"] = options.task_type; }
        auto config = peft_config(for_config);
        config["fan_in_fan_out"] = adapter.fan_in_fan_out;
        config["use_dora"] = dora;
        config["lora_bias"] = biased;
        out.config = config.dump(2) + "\n";
        out.file_name = std::string(peft_model_name);
    }
    else if (dialect == adapter_dialect::mlx) {
        nlohmann::json config{{"fine_tune_type", dora ? "dora" : "lora"}, {"num_layers", -1},
            {"lora_parameters", {{"rank", mlx_rank}, {"scale", mlx_scale}, {"dropout", 0.0}, {"keys", mlx_keys}}}};
        if (!base_name.empty()) { config["model"] = base_name; }
        out.config = config.dump(2) + "\n";
        out.file_name = "adapters.safetensors";
    }
    else if (dialect == adapter_dialect::gguf) {
        const auto f16 = std::count_if(
                       out.specs.begin(), out.specs.end(), [](const auto& x) { return x.dtype == dtype::f16; }),
                   bf16 = std::count_if(
                       out.specs.begin(), out.specs.end(), [](const auto& x) { return x.dtype == dtype::bf16; });
        std::map<std::string, gguf_value> metadata{{"general.architecture", target.architecture},
            {"general.type", std::string("adapter")}, {"adapter.type", std::string("lora")},
            {"adapter.lora.alpha", gguf_alpha},
            {"general.file_type",
                std::uint64_t{f16 > bf16 ? 1u
                        : bf16 > 0       ? 32u
                                         : 0u}}};
        if (target.pairs_rows() && target.heads > 0) {
            metadata[target.architecture + ".attention.head_count"] = std::uint64_t{target.heads};
            metadata[target.architecture + ".attention.head_count_kv"] = std::uint64_t{target.kv_heads};
        }
        out.whole = gguf_bytes(metadata, out.specs, out.bytes);
    }
    else if (dialect == adapter_dialect::diffusers) {
        out.file_name = "pytorch_lora_weights.safetensors";
        nlohmann::json kept = nlohmann::json::object();
        for (const auto& [component, part] : components) {
            const auto config = peft_config(part);
            for (const auto& [field, value] : config.items()) { kept[component + "." + field] = value; }
        }
        out.metadata[detail::diffusers_metadata_key] = kept.dump(2);
    }
    return out;
}

/// Writes it: a directory for PEFT and MLX, a file for kohya and GGUF, and for diffusers whichever the path's ending
/// says. What is there is replaced once everything is complete, both files together (see output_directory); nothing is
/// left of what fails. Calls `before_commit()` before the files take their names: what that throws leaves all as it
/// was. Throws io_error.
template <std::invocable Call>
void write_adapter(const std::filesystem::path& path, const written_adapter& adapter,
    const adapter_write_options& options, Call&& before_commit)
{
    const auto fill = [&](safetensors_writer& file) {
        for (std::size_t i = 0; i < adapter.bytes.size(); ++i) {
            file.write(i, 0, adapter.bytes[i].data(), adapter.bytes[i].size());
        }
        file.finish();
    };
    if (!adapter.whole.empty()) {
        atomic_file file(path, adapter.whole.size(), options.mode);
        file.write(0, adapter.whole.data(), adapter.whole.size());
        file.finish();
        before_commit();
        file.commit();
        return;
    }
    metadata_map metadata{{"format", "pt"}};
    metadata.insert(adapter.metadata.begin(), adapter.metadata.end());
    if (adapter.file_name.empty() || (adapter.config.empty() && path.extension() == ".safetensors")) {
        safetensors_writer file(path, adapter.specs, metadata, options.mode);
        fill(file);
        before_commit();
        file.commit();
        return;
    }
    output_directory folder(path, options.mode, existing_directory::exchange);
    safetensors_writer file(folder.path() / adapter.file_name, adapter.specs, metadata, options.mode);
    std::optional<atomic_file> settings;
    if (!adapter.config.empty()) {
        settings.emplace(folder.path() / peft_config_name, adapter.config.size(), options.mode);
        settings->write(0, adapter.config.data(), adapter.config.size());
        settings->finish();
    }
    fill(file);
    before_commit();
    file.commit();
    if (settings) { settings->commit(); }
    folder.commit();
}

/// The same, without a call.
inline void write_adapter(
    const std::filesystem::path& path, const written_adapter& adapter, const adapter_write_options& options = {})
{
    write_adapter(path, adapter, options, [] { });
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_ADAPTER_CONVERT_HPP

// ---- taskvec/formats/adapter_names.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_ADAPTER_NAMES_HPP)
#define TASKVEC_SINGLE_FORMATS_ADAPTER_NAMES_HPP
// Which tensors of a base the modules of an adapter mean: prefixes, underscores for dots, names of components.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/adapters/adapted_model.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_ADAPTED_MODEL_HPP)
#define TASKVEC_SINGLE_ADAPTERS_ADAPTED_MODEL_HPP
// What adapters change of a base, by tensor: folded into it, or a task of any merge that is never stored.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/adapters/adapted_weight.hpp
#if !defined(TASKVEC_SINGLE_ADAPTERS_ADAPTED_WEIGHT_HPP)
#define TASKVEC_SINGLE_ADAPTERS_ADAPTED_WEIGHT_HPP
// A weight with adapters added, worked out a block at a time: what folds adapters into a base, and what makes a task of
// an adapter that no file holds. SPDX-License-Identifier: Apache-2.0


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
// run time. SPDX-License-Identifier: Apache-2.0
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
// words. SPDX-License-Identifier: Apache-2.0
//
// 16-bit types are read in words of 32 bits, two entries in each, whose halves come apart and together again by shifts
// and masks: part 0 of such a pack holds the even entries, part 1 the odd ones.


// ---- taskvec/core/pack.hpp
#if !defined(TASKVEC_SINGLE_CORE_PACK_HPP)
#define TASKVEC_SINGLE_CORE_PACK_HPP
// Packs: the few entries that a kernel's body works on at once. A vector on the CPU, a single number on a device, in
// tails and under other compilers than g++ and clang: a body is written once, over packs, and gives the same bits with
// any of them. SPDX-License-Identifier: Apache-2.0
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
};

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
TASKVEC_PACK_BITS(pack_words, +)
TASKVEC_PACK_BITS(pack_words, -)
#undef TASKVEC_PACK_BITS
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
/// Every word plus `y`.
template <arithmetic_element A, int bytes>
[[nodiscard]] TASKVEC_INLINE pack_words<A, bytes> operator+(
    const pack_words<A, bytes>& x, std::type_identity_t<signed_word<A>> y) noexcept
{
    return {x.lanes + y};
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
        using codes = typename taskvec::detail::vector_of<std::uint16_t, bytes / 2>::anywhere;
        using lanes = typename taskvec::detail::vector_of<std::int32_t, bytes>::type;
        return pack_conversion<T>::widen(
            pack_words<A, bytes>{__builtin_convertvector(*reinterpret_cast<const codes*>(from), lanes)});
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
        using numbers = typename taskvec::detail::vector_of<float, bytes / 2>::anywhere;
        return {__builtin_convertvector(*reinterpret_cast<const numbers*>(from), decltype(pack<double, bytes>::lanes))};
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


#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
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
        << 20; ///< bytes of scratch that a pass may take; less means more reads of the inputs, never other bits
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

    /// The same models, handed to threads in other chunks.
    aligned_models(const aligned_models& other, std::size_t chunk)
        : aligned_models(other)
    {
        options_.chunk = chunk;
        cut();
    }

    /// Some of the tensors that take part, by a list of their places in tensors(), ascending: the same outputs, and
    /// nothing that is copied. Model-wide shares are then shares of these.
    aligned_models(const aligned_models& other, std::span<const std::size_t> chosen)
        : aligned_models(other)
    {
        tensors_.clear();
        copied_.clear();
        elements_ = 0;
        any_wide_ = false;
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
    [[nodiscard]] const std::vector<tensor_spec>& outputs() const noexcept { return outputs_; }
    /// The included floating tensors, in name order.
    [[nodiscard]] const std::vector<aligned_tensor>& tensors() const noexcept { return tensors_; }
    /// The tensors that are copied, in name order.
    [[nodiscard]] const std::vector<copied_tensor>& copied() const noexcept { return copied_; }
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
        const std::size_t size = tensor.size(name), output = outputs_.size();
        const bool included = !options_.include || options_.include(name);
        if (!included) {
            outputs_.push_back(
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
            outputs_.push_back({name, tensor.dtype, tensor.shape});
            copied_.push_back({name, output, tensor});
            return;
        }
        aligned.output_dtype =
            options_.output.value_or(is_dequantised(tensor.dtype) ? taskvec::dtype::f32 : tensor.dtype);
        if (!is_storage(aligned.output_dtype)) {
            raise<dtype_mismatch>(error_code::output_dtype,
                message("a merge cannot be stored as ", to_string(aligned.output_dtype), ": choose ", storage_names()));
        }
        outputs_.push_back({name, aligned.output_dtype, tensor.shape});
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
    std::vector<tensor_spec> outputs_;
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
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How an update belongs to its weight.
struct update_place {
    bool transposed = false; ///< the weight is in×out: a Conv1D layer, or an embedding (entries×dimensions)
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
        left_ = right_ = scale_ = {};
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
            kernels::run_widest(kernels::low_rank_rows<A>{
                left_.data() + row * rank_, right_.data(), rank_, rows, column, length, values + at, columns_});
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
        if (!scale_.empty()) {
            for (std::size_t i = 0; i < count; ++i) {
                const auto place =
                    static_cast<std::size_t>(scale_by_column_ ? (offset + i) % columns_ : (offset + i) / columns_);
                out[i] = scale_[place] * out[i];
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
        scale_ = {};
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
        std::vector<double> scale(rescaled ? (scale_by_column_ ? columns_ : rows_) : 0, 1.0);
        constexpr std::size_t width = kernels::panel_width<A>;
        const std::size_t panels = (columns_ + width - 1) / width;
        std::vector<A> left(rows_ * rank_), right(panels * width * rank_);
        std::size_t first = 0;
        for (const auto& change : changes_) {
            if (!change.is_update()) { continue; }
            std::vector<double> gain;
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
                A* const to = left.data() + i * rank_ + first;
                for (std::size_t k = 0; k < change.rank(); ++k) {
                    to[k] = static_cast<A>(turned ? change.a(k, i) : change.b(i, k) * strength(i));
                }
            });
            for_each_index(policy, panels, [&](std::size_t p, std::size_t) {
                for (std::size_t k = 0; k < change.rank(); ++k) {
                    A* const to = right.data() + (p * rank_ + first + k) * width;
                    for (std::size_t c = 0; c < std::min(width, columns_ - p * width); ++c) {
                        const std::size_t j = p * width + c;
                        to[c] = static_cast<A>(turned ? change.b(j, k) * strength(j) : change.a(k, j));
                    }
                }
            });
            first += change.rank();
        }
        left_ = std::move(left);
        right_ = std::move(right);
        scale_.assign(scale.begin(), scale.end());
        ready_.store(true, std::memory_order_release);
    }

    /// ‖θ0 + s·b·a‖ of each output, in f64, in a fixed shape.
    [[nodiscard]] std::vector<double> norms(const cpu& policy, const weight_change& change) const
    {
        weight_change plain = change;
        plain.weight = 1;
        plain.place.magnitude.clear();
        const adapted_weight sum(name_, base_, rows_, columns_, {plain});
        sum.prepare(policy);
        const bool by_column = change.place.transposed;
        std::vector<double> squares(by_column ? columns_ : rows_, 0.0);
        if (!by_column) {
            for_each_index(policy, rows_, [&](std::size_t i, std::size_t) {
                std::vector<A> row(columns_);
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
    mutable std::vector<A> left_, right_, scale_;
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

/// A tensor that is several matrices, one behind the other (experts), each with changes of its own: the entries of
/// adapted_weight, matrix by matrix.
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
    /// matrices (experts×out×in, or experts×in×out) `place` says which one changes. Throws invalid_argument
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
        if (place.slices > 0
            && (to.shape.size() != 3 || static_cast<std::size_t>(to.shape[0]) != place.slices
                || place.slice >= place.slices)) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("tensor '", tensor, "' has shape ", to_string(to.shape), ", and ", label, " changes ",
                    place.slices, " matrices of it: this adapter belongs to another base"));
        }
        const auto [rows, columns] =
            place.slices > 0 ? sides({to.shape[1], to.shape[2]}, to.size(tensor) / place.slices) : sides(to);
        const std::size_t out = place.transposed ? columns : rows, in = place.transposed ? rows : columns;
        if (out != update.out() || in != update.in()) {
            const bool turned = rows == update.in() && columns == update.out();
            raise<shape_mismatch>(error_code::adapter_shape,
                message("tensor '", tensor, "' has shape ", to_string(to.shape), ", but its update in ", label, " is ",
                    update.out(), "×", update.in(), place.transposed ? " (transposed)" : "",
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
                    "; repair the adapter or leave it out (nonfinite::propagate is for numbers of models)"));
        }
    }

    std::map<std::string, std::vector<weight_change>> changes_;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_ADAPTERS_ADAPTED_MODEL_HPP

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The segments that PyTorch's wrappers put into names, anywhere between dots: those of FSDP, torch.compile and
/// activation checkpointing.
inline constexpr std::array<std::string_view, 3> wrapper_segments{
    "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"};

/// A name without the segments of wrappers, wherever they stand in it; itself where it has none.
///
///     without_wrappers("layers.0._checkpoint_wrapped_module.mlp.weight") // "layers.0.mlp.weight"
[[nodiscard]] inline std::string without_wrappers(std::string_view name)
{
    std::string rest;
    for (std::size_t at = 0; at <= name.size();) {
        const auto end = std::min(name.find('.', at), name.size());
        const auto segment = name.substr(at, end - at);
        if (std::find(wrapper_segments.begin(), wrapper_segments.end(), segment) == wrapper_segments.end()) {
            rest += (rest.empty() ? "" : ".") + std::string(segment);
        }
        at = end + 1;
    }
    return rest;
}

/// Modules of an adapter, and the base's tensors that they mean.
struct module_match {
    std::map<std::string, std::string> tensors{}; ///< the module's weight, by the module's name
    std::vector<std::string> unmatched{}; ///< modules without one
    std::map<std::string, std::vector<std::string>>
        doubtful{}; ///< of these, those that several tensors may be meant by
    std::vector<std::string> changes{}; ///< how names were changed, a phrase each: "'model.' put before"

    /// What the adapter calls `name` (a tensor that comes with it whole), called as the base calls it.
    [[nodiscard]] std::string renamed(const std::string& name, const const_model_ref& base) const
    {
        if (base.find(name)) { return name; }
        const auto dot = name.rfind('.');
        if (const auto place = tensors.find(name.substr(0, dot)); place != tensors.end() && dot != name.npos) {
            return place->second.substr(0, place->second.rfind('.')) + name.substr(dot);
        }
        for (const auto& [off, on] : prefixes) {
            if (name.starts_with(off) && base.find(on + name.substr(off.size()))) {
                return on + name.substr(off.size());
            }
        }
        const auto plain = without_wrappers(name);
        if (plain != name) { return renamed(plain, base); }
        for (const auto& entry : base) {
            if (entry.name.size() > plain.size() && without_wrappers(entry.name) == plain) { return entry.name; }
        }
        return name;
    }
    std::vector<std::pair<std::string, std::string>> prefixes{}; ///< taken off, and put before
};

namespace detail {

[[nodiscard]] inline std::string with_underscores(std::string name)
{
    std::replace(name.begin(), name.end(), '.', '_');
    return name;
}
/// A module's name without the name of its component: lora_unet_, lora_te1_, …
[[nodiscard]] inline std::string_view without_component(std::string_view module)
{
    return module.substr(kohya_component_of(module).prefix.size());
}

/// match_modules() of names that no wrapper has changed.
[[nodiscard]] inline module_match match_plain_modules(
    const std::vector<std::string>& modules, const const_model_ref& base, adapter_dialect dialect)
{
    constexpr std::string_view suffix = ".weight";
    module_match match;
    std::vector<std::string> left;
    const auto has = [&](const std::string& module) { return base.find(module + std::string(suffix)) != nullptr; };
    for (const auto& module : modules) {
        if (has(module)) { match.tensors.emplace(module, module + std::string(suffix)); }
        else {
            left.push_back(module);
        }
    }
    if (dialect == adapter_dialect::kohya && !left.empty()) {
        std::vector<std::pair<std::string, std::string>> names; // with underscores, and the module's name
        for (const auto& [name, tensor] : base) {
            if (!name.ends_with(suffix)) { continue; }
            auto module = name.substr(0, name.size() - suffix.size());
            names.emplace_back(detail::with_underscores(module), module);
        }
        std::vector<std::string> still;
        bool components = false;
        for (const auto& module : left) {
            const std::string key = detail::with_underscores(std::string(detail::without_component(module)));
            std::vector<std::string> whole, ending;
            for (const auto& [underscored, name] : names) {
                if (underscored == key) { whole.push_back(name); }
                else if (underscored.size() > key.size() && underscored.ends_with(key)
                    && underscored[underscored.size() - key.size() - 1] == '_') {
                    ending.push_back(name);
                }
            }
            const auto& found = whole.empty() ? ending : whole;
            if (found.size() == 1) {
                match.tensors.emplace(module, found[0] + std::string(suffix));
                components = true;
            }
            else {
                if (!found.empty()) { match.doubtful[module] = found; }
                still.push_back(module);
            }
        }
        if (components) { match.changes.emplace_back("underscores read as the base's dots"); }
        match.unmatched = std::move(still);
        return match;
    }
    // diffusers: components, processors, and the list that to_out is
    std::vector<std::string> still;
    for (const auto& module : left) {
        std::string name = module;
        if (const auto component = detail::component_of(name); !component.empty()) {
            name.erase(0, component.size() + 1);
        }
        if (const auto at = name.find(".processor."); at != name.npos) { name.erase(at, 10); }
        if (!has(name) && name.ends_with(".to_out") && has(name + ".0")) { name += ".0"; }
        if (name != module && has(name)) {
            match.tensors.emplace(module, name + std::string(suffix));
            const std::string change = "names of components and processors left out";
            if (std::find(match.changes.begin(), match.changes.end(), change) == match.changes.end()) {
                match.changes.push_back(change);
            }
        }
        else {
            still.push_back(module);
        }
    }
    left = std::move(still);
    while (!left.empty()) {
        // Prefixes by the first that is left: its longest ending that a tensor of the base has.
        std::string off, on;
        bool found = false;
        const std::string first = left.front() + std::string(suffix);
        for (std::size_t at = 0; !found; ++at) {
            const auto ending = first.substr(at);
            std::vector<std::string> before;
            for (const auto& [name, tensor] : base) {
                const bool whole_there = name.size() == ending.size();
                if (name.size() < ending.size() || !name.ends_with(ending)
                    || (!whole_there && name[name.size() - ending.size() - 1] != '.')
                    || (at > 0 && !whole_there && ending.find('.') == ending.size() - suffix.size())) {
                    continue;
                }
                before.push_back(name.substr(0, name.size() - ending.size()));
            }
            if (before.size() > 1) {
                for (const auto& prefix : before) { match.doubtful[left.front()].push_back(prefix + ending); }
                break;
            }
            if (before.size() == 1) {
                off = first.substr(0, at);
                on = before[0];
                found = true;
                break;
            }
            at = first.find('.', at);
            if (at == first.npos || at + suffix.size() >= first.size()) { break; }
        }
        if (!found) { // it stays unmatched; the others may say more
            match.unmatched.push_back(left.front());
            left.erase(left.begin());
            continue;
        }
        std::vector<std::string> rest;
        for (const auto& module : left) {
            const auto name = module.starts_with(off) ? on + module.substr(off.size()) : "";
            if (!name.empty() && has(name)) { match.tensors.emplace(module, name + std::string(suffix)); }
            else {
                rest.push_back(module);
            }
        }
        match.prefixes.emplace_back(off, on);
        match.changes.push_back(off.empty() ? "'" + on + "' put before"
                : on.empty()                ? "'" + off + "' taken off"
                                            : "'" + on + "' in place of '" + off + "'");
        left = std::move(rest);
    }
    return match;
}

} // namespace detail

/// Finds, for every module of an adapter, the tensor "….weight" of the base that it means: by its own name; without the
/// segments that wrappers put into the names of either (without_wrappers()); where dots are underscores by the one name
/// that has them there; where a file names components (unet., text_encoder.) or diffusers' processors without these;
/// and by prefixes that one of the two puts before its names, where they are the same for all. Nothing is matched where
/// two tensors would do.
[[nodiscard]] inline module_match match_modules(
    const std::vector<std::string>& modules, const const_model_ref& base, adapter_dialect dialect)
{
    std::map<std::string, std::string> module_of, tensor_of; // by the names without wrappers
    bool wrapped = false;
    for (const auto& module : modules) {
        const auto plain = without_wrappers(module);
        wrapped = wrapped || plain != module;
        if (!module_of.emplace(plain, module).second) { return detail::match_plain_modules(modules, base, dialect); }
    }
    for (const auto& [name, tensor] : base) {
        const auto plain = without_wrappers(name);
        wrapped = wrapped || plain != name;
        if (!tensor_of.emplace(plain, name).second) { return detail::match_plain_modules(modules, base, dialect); }
    }
    if (!wrapped) { return detail::match_plain_modules(modules, base, dialect); }
    std::vector<std::string> plain_modules;
    for (const auto& [plain, module] : module_of) { plain_modules.push_back(plain); }
    const_model_ref plain_base;
    for (const auto& [plain, name] : tensor_of) { plain_base.insert(plain, *base.find(name)); }
    const auto found = detail::match_plain_modules(plain_modules, plain_base, dialect);
    module_match match;
    bool differ = false;
    for (const auto& [plain, tensor] : found.tensors) {
        const auto &module = module_of.at(plain), &there = tensor_of.at(tensor);
        differ = differ || (module == plain) != (there == tensor);
        match.tensors.emplace(module, there);
    }
    for (const auto& plain : found.unmatched) { match.unmatched.push_back(module_of.at(plain)); }
    for (const auto& [plain, tensors] : found.doubtful) {
        for (const auto& tensor : tensors) { match.doubtful[module_of.at(plain)].push_back(tensor_of.at(tensor)); }
    }
    match.changes = found.changes;
    if (differ) { match.changes.emplace_back("segments of wrappers (_fsdp_wrapped_module, _orig_mod, …) left out"); }
    match.prefixes = found.prefixes;
    return match;
}
/// The same for the modules of an adapter, among them experts that are part of one parameter, whose tensors are the
/// parameters. In `unmatched` such a parameter stands for all its experts.
template <arithmetic_element T>
[[nodiscard]] module_match match_modules(const adapter_contents<T>& adapter, const const_model_ref& base)
{
    constexpr std::string_view suffix = ".weight";
    std::vector<std::string> names;
    std::map<std::string, std::vector<std::string>> experts; // by parameter
    for (const auto& [module, made] : adapter.modules) {
        if (made.slice.parameter.empty()) { names.push_back(module); }
        else {
            experts[made.slice.parameter].push_back(module);
        }
    }
    if (experts.empty()) { return match_modules(names, base, adapter.dialect); }
    const_model_ref with_parameters = base; // each also as the weight of a module of its name
    for (const auto& [name, tensor] : base) {
        auto called = name + std::string(suffix);
        if (!name.ends_with(suffix) && !base.find(called)) { with_parameters.insert(std::move(called), tensor); }
    }
    for (const auto& one : experts) { names.push_back(one.first); }
    auto match = match_modules(names, with_parameters, adapter.dialect);
    for (const auto& [parameter, modules] : experts) {
        const auto place = match.tensors.find(parameter);
        if (place == match.tensors.end()) { continue; }
        const auto tensor = place->second.substr(0, place->second.size() - suffix.size());
        match.tensors.erase(place);
        for (const auto& module : modules) { match.tensors.emplace(module, tensor); }
    }
    return match;
}

/// Makes the experts of an adapter that are parts of one parameter, as transformers 5 has them in memory, modules of
/// their own where the base stores a weight for each, as files of most models do: rows of gate_up_proj are those of
/// gate_proj and up_proj one behind the other (w1 and w3 of Mixtral, whose w2 is down_proj). Throws shape_mismatch for
/// an odd number of rows, or another number of experts than the base has.
template <arithmetic_element T>
void split_experts(adapter_contents<T>& adapter, const const_model_ref& base)
{
    const auto any = [&](const std::string& ending) {
        return std::any_of(base.begin(), base.end(), [&](const auto& entry) { return entry.name.ends_with(ending); });
    };
    const bool mixtral = any(".experts.0.w1.weight");
    if (!mixtral && !any(".experts.0.down_proj.weight")) { return; }
    const bool sparse = mixtral && any(".block_sparse_moe.experts.0.w1.weight");
    std::map<std::string, adapted_module<T>> split;
    for (auto& [module, made] : adapter.modules) {
        const auto& parameter = made.slice.parameter;
        const bool both = parameter.ends_with(".experts.gate_up_proj"),
                   down = parameter.ends_with(".experts.down_proj");
        if (!both && !down) {
            split.emplace(module, std::move(made));
            continue;
        }
        std::string owner = parameter.substr(0, parameter.rfind('.'));
        if (const auto at = owner.rfind(".mlp.experts"); sparse && at != owner.npos) {
            owner.replace(at + 1, 3, "block_sparse_moe");
        }
        const auto called = [&](std::size_t index, std::string_view word) {
            return owner + "." + std::to_string(index) + "." + std::string(word);
        };
        auto last = called(made.slice.count, mixtral ? "w2.weight" : "down_proj.weight");
        last.erase(0, std::min(last.find("layers."), last.size())); // whatever stands before the layers
        if (!last.empty() && (any("." + last) || base.find(last))) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("parameter '", parameter, "' of ", adapter.label, " is of ", made.slice.count,
                    " experts, and the base has more: this adapter belongs to another base"));
        }
        const auto index = made.slice.index;
        made.slice = {};
        if (down) {
            split.emplace(called(index, mixtral ? "w2" : "down_proj"), std::move(made));
            continue;
        }
        const std::size_t rows = made.update.out() / 2, rank = made.update.rank();
        if (made.update.out() % 2 != 0) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("parameter '", parameter, "' of ", adapter.label, " has ", made.update.out(),
                    " outputs, and those of gate_proj and up_proj are equally many"));
        }
        for (std::size_t half = 0; half < 2; ++half) {
            adapted_module<T> one = made;
            one.update.b = matrix<T>(rows, rank, matrix_order::row_major);
            for (std::size_t i = 0; i < rows; ++i) {
                for (std::size_t k = 0; k < rank; ++k) { one.update.b(i, k) = made.update.b(half * rows + i, k); }
            }
            split.emplace(called(index,
                              half == 0       ? (mixtral ? "w1" : "gate_proj")
                                  : (mixtral) ? "w3"
                                              : "up_proj"),
                std::move(one));
        }
    }
    adapter.modules = std::move(split);
}

/// What MLX's configuration says (num_layers, lora_parameters.keys), against the base of an adapter of it, as matched.
/// Does nothing for other dialects. Throws format_error for more layers than the base has, modules of layers that MLX
/// would leave out, and names of modules that the base has there and the adapter nothing of. `label` names the base in
/// messages; `counted` are the layers that its configuration counts, where it does: files may hold more behind them,
/// which predict further tokens.
template <arithmetic_element T>
void check_mlx_base(const adapter_contents<T>& adapter, const const_model_ref& base, const module_match& match,
    std::string_view label = "the base", std::optional<std::int64_t> counted = std::nullopt)
{
    if (adapter.dialect != adapter_dialect::mlx) { return; }
    constexpr std::string_view suffix = ".weight";
    const std::string file = (adapter.file.parent_path() / peft_config_name).string();
    const detail::mlx_targets targets(adapter.config, file);
    std::map<std::string, std::int64_t, std::less<>> layers; // by list
    std::int64_t most = 0;
    for (const auto& [name, tensor] : base) {
        const auto place = detail::place_in_layers(name);
        if (!place.number) { continue; }
        auto& count = layers[std::string(place.list)];
        count = std::max(count, *place.number + 1);
    }
    for (auto& one : layers) {
        if (counted && *counted > 0) { one.second = std::min(one.second, *counted); }
        most = std::max(most, one.second);
    }
    std::set<std::string, std::less<>> used; // lists
    std::vector<std::string> modules; // as the base calls them
    for (const auto& [module, tensor] : match.tensors) {
        modules.push_back(tensor.substr(0, tensor.size() - suffix.size()));
        const auto place = detail::place_in_layers(modules.back());
        if (!place.number) { continue; }
        used.emplace(place.list);
        const auto count = layers.find(place.list)->second;
        if (!targets.layers || *targets.layers > count || *place.number >= count - *targets.layers) { continue; }
        raise<format_error>(error_code::adapter_config,
            message(targets.layers_field, " is ", *targets.layers, ", and the adapter has factors of '", module,
                "': MLX applies those of the last ", *targets.layers, " of the ", count, " layers of ", label,
                " alone; correct ", targets.layers_field, ", or use the base that it was trained on"),
            file);
    }
    if (!used.empty()) {
        most = 0;
        for (const auto& list : used) { most = std::max(most, layers.find(list)->second); }
    }
    if (targets.layers && most > 0 && *targets.layers > most) {
        raise<format_error>(error_code::adapter_config,
            message(targets.layers_field, " is ", *targets.layers, ", and ", label, " has ", most,
                " layers: use the base that it was trained on, or correct ", targets.layers_field, " (-1 is all)"),
            file);
    }
    if (!targets.keys) { return; }
    for (const auto& key : *targets.keys) {
        const auto named = [&](const std::string& module) { return detail::mlx_targets::names(key, module); };
        if (std::any_of(modules.begin(), modules.end(), named)) { continue; }
        if (std::any_of(
                match.tensors.begin(), match.tensors.end(), [&](const auto& one) { return named(one.first); })) {
            continue;
        }
        for (const auto& [name, tensor] : base) {
            if (!name.ends_with(suffix)) { continue; }
            const auto module = name.substr(0, name.size() - suffix.size());
            const auto place = detail::place_in_layers(module);
            const bool other_list = place.number && !used.empty() && !used.contains(place.list);
            const bool early =
                place.number && targets.layers && *place.number < layers.find(place.list)->second - *targets.layers;
            if (!named(module) || ((other_list || early) && key != module)) { continue; }
            raise<format_error>(error_code::adapter_config,
                message("lora_parameters.keys names '", key, "', which ", label, " has as '", module,
                    "', and the adapter has no factors of any: fetch or save it anew, or take the name out of keys"),
                file);
        }
    }
}

namespace detail {

/// The sides of a kernel without those of 1 at its end, which layers of fewer dimensions do not have.
[[nodiscard]] inline extents kernel_of(extents sides)
{
    while (!sides.empty() && sides.back() == 1) { sides.pop_back(); }
    return sides;
}
/// Refuses factors of a convolution on a weight with another kernel, though it has as many entries. LoHa and LoKr may
/// be stored flat, and then say nothing of a kernel.
template <arithmetic_element T>
void check_kernel(const adapted_module<T>& made, const const_tensor_ref& to, const std::string& tensor,
    const std::string& module, const std::string& label)
{
    const bool flat = made.kernel.empty() && (made.kind == "LoHa" || made.kind == "LoKr");
    const extents there = to.shape.size() > 2 ? kernel_of(extents(to.shape.begin() + 2, to.shape.end())) : extents{},
                  mine = kernel_of(made.kernel);
    if (flat || made.embedding || mine == there) { return; }
    std::int64_t cells = 1;
    for (const auto side : made.kernel) { cells *= side; }
    extents shape{static_cast<std::int64_t>(made.update.out()),
        cells == 0 ? 0 : static_cast<std::int64_t>(made.update.in()) / cells};
    shape.insert(shape.end(), made.kernel.begin(), made.kernel.end());
    raise<shape_mismatch>(error_code::adapter_shape,
        message("tensor '", tensor, "' has shape ", to_string(to.shape), ", but the update of module '", module,
            "' in ", label, " is of shape ", to_string(shape), made.kernel.empty() ? ", a linear layer's" : "",
            ": this adapter belongs to another base"));
}

} // namespace detail

/// Gives a module what its weight in a base says and the file does not: the kernel of factors that are stored flat
/// (LoHa, LoKr), which have none or one with sides of 1 at its end; and that MLX's factors are an embedding's, where
/// they fit the other way round.
template <arithmetic_element T>
void take_shape(adapted_module<T>& made, const const_tensor_ref& to, adapter_dialect dialect)
{
    const auto rank = to.shape.size();
    if (rank > 2) {
        const extents kernel(to.shape.begin() + 2, to.shape.end());
        const bool flat = made.kernel.empty() && (made.kind == "LoHa" || made.kind == "LoKr");
        if (flat || detail::kernel_of(made.kernel) == detail::kernel_of(kernel)) { made.kernel = kernel; }
    }
    if (dialect == adapter_dialect::mlx && rank == 2 && to.shape[0] != to.shape[1]) {
        made.embedding = made.embedding
            || (static_cast<std::size_t>(to.shape[0]) == made.update.in()
                && static_cast<std::size_t>(to.shape[1]) == made.update.out());
    }
}

/// A module's name in its model, with the component that `module` names, as diffusers calls it, before it; none where
/// that names none.
[[nodiscard]] inline std::string with_component_of(std::string_view module, const std::string& name)
{
    const auto own = detail::component_of(module),
               component = own.empty() ? detail::kohya_component_of(module).diffusers : own;
    return component.empty() ? name : std::string(component) + "." + name;
}

/// What add_adapter() is told of a base.
struct adapter_base_traits {
    bool conv1d = false; ///< square weights lie in×out (GPT-2's Conv1D), but for heads and embeddings
    bool holds_adapter = false; ///< the adapter is in it: copies of weights that come with that are those of before
    std::string_view label = "the base"; ///< names it in messages
    std::string_view renaming{}; ///< a caller's word for what gives modules other names, for messages: such as a flag
};

/// Whether an adapter that says fan_in_fan_out is of a base whose linear layers lie out×in, as its modules that are not
/// square tell: PEFT takes the flag for false then.
template <arithmetic_element T>
[[nodiscard]] bool denies_fan_in_fan_out(
    const const_model_ref& base, const adapter_contents<T>& adapter, const module_match& match)
{
    bool plain = false, turned = false;
    for (const auto& [module, made] : adapter.modules) {
        const auto place = match.tensors.find(module);
        if (place == match.tensors.end() || made.embedding || made.update.out() == made.update.in()) { continue; }
        const const_tensor_ref& to = *base.find(place->second);
        if (to.shape.size() != 2) { continue; }
        const auto [rows, columns] = adapted_model::sides(to.shape, to.size(place->second));
        plain = plain || (rows == made.update.out() && columns == made.update.in());
        turned = turned || (rows == made.update.in() && columns == made.update.out());
    }
    return adapter.fan_in_fan_out && plain && !turned;
}

namespace detail {

/// Whether the matrices of a stack of experts lie in×out, as those of gpt-oss and Llama 4 do, by the shapes of
/// gate_up_proj and down_proj beside one another; nothing where they do not tell.
[[nodiscard]] inline std::optional<bool> experts_lie_in_by_out(const const_model_ref& base, const std::string& tensor)
{
    const auto owner = tensor.substr(0, tensor.rfind('.') + 1);
    const auto *const both = base.find(owner + "gate_up_proj"), *const down = base.find(owner + "down_proj");
    if (!both || !down || both->shape.size() != 3 || down->shape.size() != 3) { return std::nullopt; }
    const bool plain = both->shape[2] == down->shape[1] && both->shape[1] == 2 * down->shape[2],
               turned = both->shape[1] == down->shape[2] && both->shape[2] == 2 * down->shape[1];
    return plain == turned ? std::nullopt : std::optional(turned);
}
/// How an expert's update belongs to the parameter that it is part of.
template <arithmetic_element T>
[[nodiscard]] update_place place_of_expert(
    const adapted_module<T>& made, const const_model_ref& base, const std::string& tensor, const std::string& label)
{
    update_place place;
    const const_tensor_ref& to = *base.find(tensor);
    const bool stack = to.shape.size() == 3;
    if (stack || made.slice.count > 1) {
        place.slice = made.slice.index;
        place.slices = made.slice.count;
    }
    if (to.shape.size() < 2) { return place; }
    const auto rows = static_cast<std::size_t>(to.shape[to.shape.size() - 2]),
               columns = static_cast<std::size_t>(to.shape[to.shape.size() - 1]);
    const bool fits = rows == made.update.out() && columns == made.update.in(),
               turned = rows == made.update.in() && columns == made.update.out();
    if (!fits || !turned) {
        place.transposed = turned;
        return place;
    }
    const auto lies = experts_lie_in_by_out(base, tensor);
    if (stack && !lies) {
        raise<shape_mismatch>(error_code::adapter_shape,
            message("tensor '", tensor, "' has shape ", to_string(to.shape), ", and nothing says whether ", label,
                " changes its matrices as they lie or transposed: fold it into its base with PEFT (merge_and_unload) "
                "and go on with the model"));
    }
    place.transposed = lies.value_or(false);
    return place;
}

} // namespace detail

/// Adds weight·(what an adapter does) to `sum`, which refers to the adapter from then on. Where a weight is not square
/// its shape says whether it lies in×out; a square one does where the adapter (fan_in_fan_out) or `traits` say so, and
/// others do not deny it.
/// Throws invalid_argument for modules that `match` has no tensor for, two that have the same, or a copy of a base
/// weight that is another base's; shape_mismatch, for convolutions of another kernel too; nonfinite_error.
template <arithmetic_element T>
void add_adapter(adapted_model& sum, const const_model_ref& base, const adapter_contents<T>& adapter,
    const module_match& match, double weight = 1, const adapter_base_traits& traits = {})
{
    if (!match.unmatched.empty()) {
        const auto& module = match.unmatched.front();
        const auto doubt = match.doubtful.find(module);
        raise<invalid_argument>(error_code::tensor_unexpected,
            message("module '", module, "' of ", adapter.label,
                doubt != match.doubtful.end() && doubt->second.size() > 1
                    ? message(" may mean '", doubt->second[0], "' or '", doubt->second[1], "' of ", traits.label)
                    : message(" is no module of ", traits.label),
                match.unmatched.size() > 1 ? message(", nor are ", match.unmatched.size() - 1, " others clear") : "",
                base.find(module + ".in_proj_weight")
                    ? ", but one of PyTorch's MultiheadAttention, whose three projections are one tensor: fold it into "
                      "its base with PEFT (merge_and_unload) and go on with the model"
                    : message(": use the base that it was trained on, ",
                          traits.renaming.empty() ? ""
                                                  : message("say what it is called there (", traits.renaming, "), "),
                          "or leave such modules out")));
    }
    const bool in_by_out = adapter.fan_in_fan_out && !denies_fan_in_fan_out(base, adapter, match);
    std::map<std::string, std::string> taken; // modules, by the tensors that they mean
    for (const auto& [module, made] : adapter.modules) {
        if (made.paired_rows) {
            raise<invalid_argument>(error_code::call_order,
                message("module '", module, "' of ", adapter.label,
                    " has its rows in the order of llama.cpp: unpair_rows() first"));
        }
        const std::string& tensor = match.tensors.at(module);
        const bool expert = !made.slice.parameter.empty();
        const auto which = expert ? tensor + "[" + std::to_string(made.slice.index) + "]" : tensor;
        if (const auto [other, fresh] = taken.emplace(which, module); !fresh) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message("modules '", other->second, "' and '", module, "' of ", adapter.label, " may both mean '",
                    tensor, "' of ", traits.label,
                    ": leave out the one that is another model's (of another component)"));
        }
        if (expert) {
            sum.add(base, tensor, made.update, weight, detail::place_of_expert(made, base, tensor, adapter.label),
                adapter.label);
            continue;
        }
        const const_tensor_ref& to = *base.find(tensor);
        detail::check_kernel(made, to, tensor, module, adapter.label);
        update_place place;
        place.magnitude = made.magnitude;
        const auto [rows, columns] = adapted_model::sides(to.shape, to.size(tensor));
        const bool fits = rows == made.update.out() && columns == made.update.in(),
                   turned = to.shape.size() == 2 && rows == made.update.in() && columns == made.update.out();
        const bool head =
            tensor.ends_with("head.weight") || tensor.ends_with("wte.weight") || tensor.ends_with("wpe.weight");
        place.transposed = made.embedding || (turned && (!fits || ((in_by_out || traits.conv1d) && !head)));
        sum.add(base, tensor, made.update, weight, std::move(place), adapter.label);
        if (made.bias.rank() > 0) {
            const std::string bias = tensor.substr(0, tensor.size() - 6) + "bias";
            if (!base.find(bias)) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message("module '", module, "' of ", adapter.label, " has a bias of its own (lora_bias), and ",
                        traits.label, " has no '", bias,
                        "' to add it to: fold it with PEFT, which adds the layer's bias"));
            }
            sum.add(base, bias, made.bias, weight, {}, adapter.label);
        }
    }
    for (const auto& [name, stored] : adapter.copies) {
        const auto tensor = match.renamed(name, base);
        const const_tensor_ref* const there = base.find(tensor);
        if (there && !traits.holds_adapter && there->dtype == stored.dtype
            && (there->shape != stored.shape
                || std::memcmp(there->data, stored.bytes.data(), stored.bytes.size()) != 0)) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message(adapter.label, " carries a copy of the weight '", tensor,
                    "' that it was trained on, which is not that of ", traits.label,
                    ": use the base that it was trained on"));
        }
    }
    for (const auto& [name, stored] : adapter.wholes) {
        sum.replace(base, match.renamed(name, base),
            const_tensor_ref{stored.bytes.data(), stored.dtype, stored.shape, {}, memory_space::host, 0}, weight,
            adapter.label);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_ADAPTER_NAMES_HPP

// ---- taskvec/formats/delta.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_DELTA_HPP)
#define TASKVEC_SINGLE_FORMATS_DELTA_HPP
// Deltas on disk: the kept entries of residuals, as a plain safetensors file that any reader can open.
// SPDX-License-Identifier: Apache-2.0


// ---- taskvec/formats/fingerprint.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_FINGERPRINT_HPP)
#define TASKVEC_SINGLE_FORMATS_FINGERPRINT_HPP
// The fingerprint of a model: one 64-bit number over names, dtypes, shapes and bytes.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Bytes that are hashed as one piece.
inline constexpr std::size_t fingerprint_block = std::size_t{1} << 22;

/// The fingerprint of a model, by which a delta knows its base. All hashes are XXH64 with seed 0, all numbers 64-bit
/// little-endian:
///
///     block hash    XXH64 of up to 2^22 bytes of a tensor; a tensor of n bytes has ceil(n / 2^22) blocks
///     tensor hash   XXH64 of: length of the name, name, length of the dtype's name, dtype's name ("BF16"), rank,
///                   extents, the block hashes in order
///     fingerprint   XXH64 of: number of tensors, the tensor hashes in the order of the names' bytes
///
/// A quantised layer counts as the F32 tensor that it stands for.
///
/// Tensors must be contiguous host memory of any dtype and alignment. The value does not depend on the policy, on the
/// order of tensors in a file, or on how they are spread over shards.
/// Throws invalid_argument for a tensor that is not contiguous host memory; cancelled. Cost: one read of all bytes.
[[nodiscard]] inline std::uint64_t fingerprint(const cpu& policy, const const_model_ref& model)
{
    struct block {
        const std::byte* data;
        std::size_t size;
        const operand_source* source;
        std::uint64_t first; ///< of the elements that are decoded
    };
    std::pmr::vector<block> blocks(memory_of(policy));
    std::uint64_t total = 0;
    for (const auto& [name, tensor] : model) {
        if (tensor.space != memory_space::host || !tensor.contiguous()) {
            raise<invalid_argument>(
                error_code::tensor_layout, message("tensor '", name, "' is not contiguous host memory; copy it first"));
        }
        const std::size_t bytes = tensor.bytes(name);
        const auto* data = static_cast<const std::byte*>(tensor.data);
        for (std::size_t at = 0; at < bytes; at += fingerprint_block) {
            const bool decoded = tensor.source != nullptr;
            blocks.push_back({decoded ? nullptr : data + at, std::min(fingerprint_block, bytes - at), tensor.source,
                at / sizeof(float)});
        }
        total += bytes;
    }
    std::pmr::vector<std::uint64_t> hashes(blocks.size(), memory_of(policy));
    detail::progress_meter progress(policy, "fingerprint", total);
    for_each_index(policy, blocks.size(), [&](std::size_t index, std::size_t) {
        xxh64 hash;
        const block& part = blocks[index];
        if (part.source) {
            constexpr std::size_t piece = 65536;
            std::pmr::vector<float> values(std::min(piece, part.size / sizeof(float)), memory_of(policy));
            for (std::size_t at = 0; at < part.size / sizeof(float); at += piece) {
                const std::size_t n = std::min(piece, part.size / sizeof(float) - at);
                part.source->read(part.first + at, n, values.data());
                hash.update(values.data(), n * sizeof(float));
            }
        }
        else {
            hash.update(part.data, part.size);
        }
        hashes[index] = hash.digest();
        if (!progress.advance(blocks[index].size)) { raise<cancelled>(error_code::cancelled); }
    });

    xxh64 whole;
    const auto number = [](xxh64& hash, std::uint64_t value) { hash.update(&value, sizeof value); };
    const auto text = [&](xxh64& hash, std::string_view value) {
        number(hash, value.size());
        hash.update(value);
    };
    number(whole, model.size());
    std::size_t next = 0;
    for (const auto& [label, tensor] : model) {
        xxh64 hash;
        text(hash, label);
        text(hash, to_string(tensor.dtype));
        number(hash, tensor.shape.size());
        for (const auto extent : tensor.shape) { number(hash, static_cast<std::uint64_t>(extent)); }
        const std::size_t bytes = tensor.bytes(label);
        for (std::size_t at = 0; at < bytes; at += fingerprint_block) { number(hash, hashes[next++]); }
        number(whole, hash.digest());
    }
    return whole.digest();
}

/// Bytes at the beginning and at the end of each tensor that a sketch looks at.
inline constexpr std::size_t sketch_bytes = 4096;

/// A fingerprint that costs nothing: as fingerprint(), with the first and the last 4 KiB of each tensor in place of its
/// bytes (all of a tensor of up to 8 KiB). It tells models apart by what training changes, and is no proof that two are
/// equal: fingerprint() is. For records such as model cards.
[[nodiscard]] inline std::uint64_t fingerprint_sketch(const const_model_ref& model)
{
    xxh64 whole;
    const auto number = [&](std::uint64_t value) { whole.update(&value, sizeof value); };
    const auto text = [&](std::string_view value) {
        number(value.size());
        whole.update(value);
    };
    number(model.size());
    for (const auto& [label, tensor] : model) {
        if (tensor.space != memory_space::host || !tensor.contiguous()) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", label, "' is not contiguous host memory; copy it first"));
        }
        text(label);
        text(to_string(tensor.dtype));
        number(tensor.shape.size());
        for (const auto extent : tensor.shape) { number(static_cast<std::uint64_t>(extent)); }
        const std::size_t bytes = tensor.bytes(label);
        if (tensor.source) {
            const std::size_t edge = sketch_bytes / sizeof(float), size = bytes / sizeof(float);
            std::vector<float> values(std::min(size, 2 * edge));
            if (size <= 2 * edge) { tensor.source->read(0, size, values.data()); }
            else {
                tensor.source->read(0, edge, values.data());
                tensor.source->read(size - edge, edge, values.data() + edge);
            }
            whole.update(values.data(), values.size() * sizeof(float));
            continue;
        }
        const std::string_view content(static_cast<const char*>(tensor.data), bytes);
        whole.update(content.substr(0, bytes <= 2 * sketch_bytes ? bytes : sketch_bytes));
        whole.update(content.substr(bytes <= 2 * sketch_bytes ? bytes : bytes - sketch_bytes));
    }
    return whole.digest();
}

/// A fingerprint as files spell it: "xxh64:" and 16 hexadecimal digits.
[[nodiscard]] inline std::string fingerprint_text(std::uint64_t value)
{
    constexpr char digits[] = "0123456789abcdef";
    std::string text = "xxh64:";
    for (int shift = 60; shift >= 0; shift -= 4) { text += digits[(value >> shift) & 15]; }
    return text;
}
/// The fingerprint that fingerprint_text() wrote; empty for any other text.
[[nodiscard]] inline std::optional<std::uint64_t> parse_fingerprint(std::string_view text)
{
    if (!text.starts_with("xxh64:") || text.size() != 22) { return std::nullopt; }
    std::uint64_t value = 0;
    const auto [end, failure] = std::from_chars(text.data() + 6, text.data() + 22, value, 16);
    if (failure != std::errc{} || end != text.data() + 22) { return std::nullopt; }
    return value;
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_FINGERPRINT_HPP

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

/// Receives the kept entries of a model: first how many there are of each included tensor, then the entries, in pieces
/// that come in any order and from several threads at once.
class sparse_sink {
public:
    virtual ~sparse_sink() = default;
    /// kept[i] entries of models.tensors()[i] will follow. Called once, before any write.
    virtual void begin(const aligned_models& models, const std::vector<std::uint64_t>& kept) = 0;
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
    void begin(const aligned_models& models, const std::vector<std::uint64_t>& kept) override
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

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <memory_resource>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The value of the metadata key `schema` that this version writes and reads.
inline constexpr std::string_view delta_schema = "taskvec.delta.1";

/// A model's kept entries, with the fingerprint of the base that they are to be added to.
struct delta {
    sparse_model tensors; ///< by name of the base's tensors
    std::uint64_t base_fingerprint = 0; ///< see fingerprint()
    metadata_map metadata{}; ///< further keys to write; on reading, all keys of the file
};

namespace detail {

/// True when a bit for each element takes less room than four bytes for each kept one.
[[nodiscard]] constexpr bool stored_as_bitmask(std::uint64_t kept, std::uint64_t size) noexcept
{
    return kept > size / 32;
}

} // namespace detail

/// Writes a delta as its entries come, in pieces, in any order and from several threads. For each tensor P: `P.values`
/// (F32, or F64), `P.shape` (I64), and the places of the values as `P.indices` (I32; I64 for tensors of more than
/// 2^31 - 1 elements; ascending, row-major flat) or, where more than 1/32 of the entries are kept, `P.bitmask` (U8,
/// ceil(size / 8) bytes; bit i%8 of byte i/8, least significant first, is set where entry i is kept; the bits beyond
/// the last entry are 0). Metadata: `schema` "taskvec.delta.1", `additive` "true", `fingerprint` of the base (see
/// fingerprint(), "xxh64:" and 16 hexadecimal digits). Atomic like safetensors_writer. Memory: a piece.
///
///     delta_writer out("task.delta.safetensors", fingerprint(cpu{}, base));
///     post_pruning(cpu{}, {.density = 0.1}, models, out);
///     out.commit();
class delta_writer final : public sparse_sink {
public:
    /// What is known of a tensor before its entries come.
    struct part {
        std::string name; ///< of the base's tensor
        extents shape; ///< of the tensor
        std::uint64_t kept = 0; ///< entries
        bool wide = false; ///< f64 values
    };

    /// `path`: the file. Nothing is opened before begin().
    delta_writer(std::filesystem::path path, std::uint64_t base_fingerprint, metadata_map metadata = {},
        durability mode = durability::synchronised)
        : path_(std::move(path))
        , metadata_(std::move(metadata))
        , mode_(mode)
    {
        metadata_["schema"] = delta_schema;
        metadata_["additive"] = "true";
        metadata_["fingerprint"] = fingerprint_text(base_fingerprint);
    }

    /// Where the models are to be finite and overflow is not to pass, entries have to be finite too: models that are
    /// may differ by more than their arithmetic holds. Throws nonfinite_error for one that is not, when it comes.
    void begin(const aligned_models& models, const std::vector<std::uint64_t>& kept) override
    {
        finite_ =
            models.options().on_nonfinite == nonfinite::error && models.options().on_overflow != overflow::propagate;
        std::vector<part> parts;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const auto& tensor = models.tensors()[i];
            parts.push_back({tensor.name, tensor.shape, kept[i], tensor.wide_base()});
        }
        begin(std::move(parts));
    }
    /// Creates the file. Throws invalid_argument, io_error.
    void begin(std::vector<part> parts)
    {
        parts_ = std::move(parts);
        std::vector<tensor_spec> specs;
        for (const auto& [name, shape, kept, wide] : parts_) {
            const std::uint64_t size = element_count(shape, name);
            if (kept > size) {
                raise<invalid_argument>(error_code::delta_entries,
                    message("delta of tensor '", name, "' keeps ", kept, " of ", size, " entries"));
            }
            const auto count = static_cast<std::int64_t>(kept);
            specs.push_back({name + ".values", wide ? dtype::f64 : dtype::f32, {count}});
            specs.push_back({name + ".shape", dtype::i64, {static_cast<std::int64_t>(shape.size())}});
            if (detail::stored_as_bitmask(kept, size)) {
                specs.push_back(
                    {name + ".bitmask", dtype::u8, {static_cast<std::int64_t>(size / 8 + (size % 8 != 0))}});
            }
            else {
                specs.push_back({name + ".indices",
                    size > std::uint64_t{std::numeric_limits<std::int32_t>::max()} ? dtype::i64 : dtype::i32, {count}});
            }
            places_.push_back(specs.back().dtype);
        }
        file_ = std::make_unique<safetensors_writer>(path_, specs, metadata_, mode_);
        for (std::size_t i = 0; i < parts_.size(); ++i) {
            file_->write(3 * i + 1, 0, parts_[i].shape.data(), specs[3 * i + 1].bytes());
        }
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const float* values, std::size_t n) override
    {
        store(tensor, first, from, to, indices, values, n);
    }
    void write(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const double* values, std::size_t n) override
    {
        store(tensor, first, from, to, indices, values, n);
    }
    /// Forces the file to disk, so that commit() only renames.
    void finish() { file().finish(); }
    /// Gives the file its name.
    void commit() { file().commit(); }
    /// The file's path.
    [[nodiscard]] const std::filesystem::path& target() const noexcept { return path_; }
    /// What begin() was told.
    [[nodiscard]] const std::vector<part>& parts() const noexcept { return parts_; }
    /// Entries in all tensors.
    [[nodiscard]] std::uint64_t kept() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& each : parts_) { total += each.kept; }
        return total;
    }
    /// The name that the file has until commit(); empty before begin().
    [[nodiscard]] std::filesystem::path temporary() const
    {
        return file_ ? file_->temporary() : std::filesystem::path();
    }
    /// Bytes of the file; 0 before begin().
    [[nodiscard]] std::uint64_t file_size() const noexcept { return file_ ? file_->file_size() : 0; }

private:
    safetensors_writer& file()
    {
        if (!file_) {
            raise<invalid_argument>(error_code::call_order, message("'", path_.string(), "': no delta was begun"));
        }
        return *file_;
    }
    template <class A>
    void store(std::size_t tensor, std::uint64_t first, std::uint64_t from, std::uint64_t to,
        const std::uint64_t* indices, const A* values, std::size_t n)
    {
        if (parts_[tensor].wide != std::same_as<A, double>) {
            raise<invalid_argument>(error_code::call_order,
                message("delta of tensor '", parts_[tensor].name, "' was begun with other values"));
        }
        for (std::size_t i = 0; finite_ && i < n; ++i) {
            if (std::isfinite(values[i])) { continue; }
            raise<nonfinite_error>(error_code::result_overflow,
                message("tensor '", parts_[tensor].name, "' differs by infinity at index ", indices[i],
                    " though both models are finite there: their difference is beyond ", to_string(dtype_of<A>),
                    "; let it propagate (overflow)"));
        }
        file().write(3 * tensor, first * sizeof(A), values, n * sizeof(A));
        if (places_[tensor] == dtype::u8) {
            std::array<std::uint8_t, 16384> bytes;
            std::size_t i = 0;
            for (std::uint64_t at = from / 8; at * 8 < to; at += bytes.size()) {
                const std::uint64_t length = std::min<std::uint64_t>(bytes.size(), to / 8 + (to % 8 != 0) - at);
                std::fill_n(bytes.begin(), length, std::uint8_t{0});
                for (; i < n && indices[i] / 8 < at + length; ++i) {
                    auto& byte = bytes[indices[i] / 8 - at];
                    byte = static_cast<std::uint8_t>(byte | (1u << (indices[i] % 8)));
                }
                file_->write(3 * tensor + 2, at, bytes.data(), length);
            }
        }
        else if (places_[tensor] == dtype::i32) {
            std::array<std::int32_t, 4096> narrow;
            for (std::size_t at = 0; at < n; at += narrow.size()) {
                const std::size_t length = std::min(narrow.size(), n - at);
                std::transform(indices + at, indices + at + length, narrow.begin(),
                    [](std::uint64_t index) { return static_cast<std::int32_t>(index); });
                file_->write(
                    3 * tensor + 2, (first + at) * sizeof(std::int32_t), narrow.data(), length * sizeof(std::int32_t));
            }
        }
        else {
            file_->write(3 * tensor + 2, first * sizeof(std::int64_t), indices, n * sizeof(std::int64_t));
        }
    }

    std::filesystem::path path_;
    metadata_map metadata_;
    durability mode_;
    std::vector<part> parts_;
    std::vector<dtype> places_;
    bool finite_ = false; ///< entries that are not finite are refused
    std::unique_ptr<safetensors_writer> file_;
};

/// Writes a delta that lies in memory; see delta_writer for the format.
/// Throws invalid_argument for a sparse vector that breaks its own promises; io_error.
inline void write_delta(
    const std::filesystem::path& path, const delta& content, durability mode = durability::synchronised)
{
    std::vector<delta_writer::part> parts;
    for (const auto& [name, tensor] : content.tensors) {
        std::visit(
            [&, &name = name]<class A>(const sparse_vector<A>& sparse) { // clang 14 captures no structured binding
                check_sparse(sparse, name);
                parts.push_back({name, sparse.shape, sparse.kept(), std::same_as<A, double>});
            },
            tensor);
    }
    delta_writer writer(path, content.base_fingerprint, content.metadata, mode);
    writer.begin(std::move(parts));
    std::size_t at = 0;
    for (const auto& [name, tensor] : content.tensors) {
        std::visit(
            [&, &name = name](const auto& sparse) {
                const std::uint64_t size = element_count(sparse.shape, name);
                constexpr std::uint64_t piece = std::uint64_t{1} << 20;
                std::vector<std::uint64_t> places;
                std::size_t first = 0;
                const bool bits = detail::stored_as_bitmask(sparse.kept(), size);
                for (std::uint64_t from = 0; from < size && (bits || first < sparse.kept()); from += piece) {
                    if (!bits) { from = sparse.indices[first] / piece * piece; } // nothing is stored of a run of zeros
                    const std::uint64_t to = from + std::min(size - from, piece);
                    places.clear();
                    for (std::size_t i = first; i < sparse.kept() && sparse.indices[i] < to; ++i) {
                        places.push_back(sparse.indices[i]);
                    }
                    writer.write(at, first, from, to, places.data(), sparse.values.data() + first, places.size());
                    first += places.size();
                }
            },
            tensor);
        ++at;
    }
    writer.commit();
}

/// A delta file, mapped and checked: schema, dtypes, counts that match, indices in range and ascending, zero bits
/// beyond the last entry, no tensor left over. Its entries stay in the file; see delta_writer for the format.
/// Move-only; parts() are views into it. Throws format_error naming the file and the tensor; io_error. Cost: one read
/// of the places, O(tensors) memory and a number for each 65,536 elements of a bitmask.
///
///     const taskvec::delta_file delta("task.delta.safetensors");
///     taskvec::add_delta(cpu{}, models, delta.parts(), 1.0, sink);   // <taskvec/reuse/sparse_addition.hpp>
class delta_file {
public:
    /// What the file holds for one tensor of the base.
    using part = sparse_view;

    /// Maps and checks the file.
    explicit delta_file(std::filesystem::path path)
        : file_(std::move(path))
        , model_(file_.model())
    {
        const auto value = [&](const char* key) {
            const auto place = file_.metadata().find(key);
            return place == file_.metadata().end() ? std::string() : place->second;
        };
        const auto fail_file = [&](const std::string& what) {
            raise<format_error>(error_code::delta_format, what, file_.path().string());
        };
        if (const auto schema = value("schema"); schema != delta_schema) {
            fail_file(schema.empty() ? message("is not a delta: its metadata has no schema '", delta_schema, "'")
                                     : message("has schema '", schema, "'; this version reads '", delta_schema, "'"));
        }
        if (const auto additive = value("additive"); additive != "true") {
            fail_file(message("has additive '", additive, "'; this version reads 'true'"));
        }
        const auto stamp = parse_fingerprint(value("fingerprint"));
        if (!stamp) {
            fail_file(message(
                "has the fingerprint '", value("fingerprint"), "'; expected 'xxh64:' and 16 hexadecimal digits"));
        }
        fingerprint_ = *stamp;
        for (const auto& [label, tensor] : model_) {
            if (label.ends_with(".shape")) { parts_.push_back(read_part(label.substr(0, label.size() - 6), tensor)); }
        }
        std::sort(parts_.begin(), parts_.end(), [](const part& a, const part& b) { return a.name < b.name; });
        if (3 * parts_.size() != model_.size()) { fail_stray(); }
    }

    /// The file's path.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return file_.path(); }
    /// The file's path.
    [[nodiscard]] std::filesystem::path path() && { return file_.path(); }
    /// The file itself.
    [[nodiscard]] const safetensors_file& file() const& noexcept { return file_; }
    void file() const&& = delete; // name the owner first: its views would dangle
    /// All keys of the file's metadata.
    [[nodiscard]] const metadata_map& metadata() const& noexcept { return file_.metadata(); }
    /// All keys of the file's metadata.
    [[nodiscard]] metadata_map metadata() && { return std::move(file_).metadata(); }
    /// Of the base that the delta is to be added to.
    [[nodiscard]] std::uint64_t base_fingerprint() const noexcept { return fingerprint_; }
    /// In name order.
    [[nodiscard]] const std::vector<part>& parts() const& noexcept { return parts_; }
    void parts() const&& = delete; // name the owner first: its views would dangle
    void find(std::string_view) const&& = delete; // name the owner first: its views would dangle
    /// The part of a tensor, or null where the delta leaves it as it is.
    [[nodiscard]] const part* find(std::string_view name) const& noexcept
    {
        const auto place = std::lower_bound(parts_.begin(), parts_.end(), name,
            [](const part& p, std::string_view n) { return std::string_view(p.name) < n; });
        return place != parts_.end() && place->name == name ? &*place : nullptr;
    }
    /// Entries in all tensors.
    [[nodiscard]] std::uint64_t kept() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& each : parts_) { total += each.kept; }
        return total;
    }

private:
    [[noreturn]] void fail(std::string_view stem, const std::string& what) const
    {
        raise<format_error>(
            error_code::delta_format, message("delta of tensor '", stem, "' ", what), file_.path().string());
    }
    [[noreturn]] void fail_stray() const
    {
        for (const auto& [label, tensor] : model_) {
            const auto dot = label.rfind('.');
            const auto role = dot == label.npos ? std::string() : label.substr(dot);
            const bool known = role == ".shape" || role == ".values" || role == ".indices" || role == ".bitmask";
            if (!known || !find(std::string_view(label).substr(0, dot))) {
                raise<format_error>(error_code::delta_format,
                    message("holds '", label,
                        "', which belongs to no delta tensor (there must be P.values, P.shape, and "
                        "P.indices or P.bitmask)"),
                    file_.path().string());
            }
        }
        raise<format_error>(error_code::delta_format, "holds tensors that belong to no delta", file_.path().string());
    }

    [[nodiscard]] part read_part(const std::string& stem, const const_tensor_ref& shape)
    {
        part result;
        result.name = stem;
        const auto* const values = model_.find(stem + ".values");
        if (!values) { fail(stem, message("has '", stem, ".shape' and no '", stem, ".values'")); }
        if (values->dtype != dtype::f32 && values->dtype != dtype::f64) {
            fail(stem, message("has values of dtype ", to_string(values->dtype), "; expected F32 or F64"));
        }
        if (values->shape.size() != 1) {
            fail(stem, message("has values of rank ", values->shape.size(), "; expected 1"));
        }
        result.wide = values->dtype == dtype::f64;
        result.values = static_cast<const std::byte*>(values->data);
        result.kept = values->size();
        read_shape(result, shape);
        const auto* const indices = model_.find(stem + ".indices");
        const auto* const bitmask = model_.find(stem + ".bitmask");
        if (!indices == !bitmask) {
            fail(stem, indices ? "has both indices and a bitmask" : "has neither indices nor a bitmask");
        }
        if (indices) { read_indices(result, *indices); }
        else {
            read_bitmask(result, *bitmask);
        }
        return result;
    }

    void read_shape(part& result, const const_tensor_ref& shape) const
    {
        if (shape.dtype != dtype::i64 || shape.shape.size() != 1) {
            fail(result.name,
                message("has a shape of dtype ", to_string(shape.dtype), " and rank ", shape.shape.size(),
                    "; expected I64 of rank 1"));
        }
        result.shape.resize(shape.size());
        bool empty = false;
        for (std::size_t i = 0; i < result.shape.size(); ++i) {
            const auto extent = detail::load<std::int64_t>(shape.data, i);
            if (extent < 0) { fail(result.name, message("has the negative extent ", extent)); }
            result.shape[i] = extent;
            empty = empty || extent == 0;
        }
        result.size = empty ? 0 : 1;
        for (const auto extent : result.shape) {
            if (!empty
                && (detail::product_wraps(result.size, static_cast<std::uint64_t>(extent), result.size)
                    || result.size > detail::most_elements)) {
                fail(result.name, message("has a shape of more than ", detail::most_elements_text));
            }
        }
    }

    void read_indices(part& result, const const_tensor_ref& tensor) const
    {
        if ((tensor.dtype != dtype::i32 && tensor.dtype != dtype::i64) || tensor.shape.size() != 1) {
            fail(result.name,
                message("has indices of dtype ", to_string(tensor.dtype), " and rank ", tensor.shape.size(),
                    "; expected I32 or I64 of rank 1"));
        }
        if (tensor.size() != result.kept) {
            fail(result.name, message("has ", tensor.size(), " indices for ", result.kept, " values"));
        }
        result.indices = static_cast<const std::byte*>(tensor.data);
        result.wide_indices = tensor.dtype == dtype::i64;
        std::int64_t previous = -1;
        for (std::uint64_t i = 0; i < result.kept; ++i) {
            const std::int64_t index = result.wide_indices ? detail::load<std::int64_t>(tensor.data, i)
                                                           : detail::load<std::int32_t>(tensor.data, i);
            if (index < 0 || static_cast<std::uint64_t>(index) >= result.size) {
                fail(result.name,
                    message("has index ", index, " at position ", i, "; the tensor has ", result.size, " elements"));
            }
            if (index <= previous) {
                fail(result.name,
                    message("has index ", index, " after ", previous, " at position ", i, "; indices must ascend"));
            }
            previous = index;
        }
    }

    void read_bitmask(part& result, const const_tensor_ref& tensor)
    {
        if (tensor.dtype != dtype::u8 || tensor.shape.size() != 1) {
            fail(result.name,
                message("has a bitmask of dtype ", to_string(tensor.dtype), " and rank ", tensor.shape.size(),
                    "; expected U8 of rank 1"));
        }
        const std::uint64_t bytes = tensor.size(), needed = result.size / 8 + (result.size % 8 != 0);
        if (bytes != needed) {
            fail(result.name, message("has a bitmask of ", bytes, " bytes; ", result.size, " elements need ", needed));
        }
        result.bitmask = static_cast<const std::uint8_t*>(tensor.data);
        std::uint64_t set = 0;
        auto& before = before_.emplace_back();
        for (std::uint64_t i = 0; i < bytes; ++i) {
            if (i % (part::run / 8) == 0) { before.push_back(set); }
            set += static_cast<unsigned>(std::popcount(result.bitmask[i]));
        }
        result.before = before;
        if (set != result.kept) { fail(result.name, message("has ", set, " bits set for ", result.kept, " values")); }
        if (result.size % 8 && (result.bitmask[bytes - 1] >> (result.size % 8)) != 0) {
            fail(result.name, "has bits set beyond its last element");
        }
    }

    safetensors_file file_;
    const_model_ref model_;
    std::vector<std::vector<std::uint64_t>> before_; // what the parts' `before` show
    std::vector<part> parts_;
    std::uint64_t fingerprint_ = 0;
};

/// Reads a whole delta into memory, which comes from `memory`. Errors: as delta_file.
[[nodiscard]] inline delta read_delta(
    const std::filesystem::path& path, std::pmr::memory_resource* memory = std::pmr::get_default_resource())
{
    const delta_file file(path);
    delta result;
    result.base_fingerprint = file.base_fingerprint();
    result.metadata = file.metadata();
    for (const auto& part : file.parts()) {
        const auto make = [&]<class A>(std::type_identity<A>) {
            sparse_vector<A> sparse{
                part.shape, index_list(part.kept, part.size, memory), std::pmr::vector<A>(part.kept, memory)};
            part.for_each(0, part.size, [&](std::uint64_t index, std::uint64_t entry) {
                sparse.indices.store(entry, &index, 1);
                sparse.values[entry] = part.template value<A>(entry);
            });
            result.tensors.emplace(part.name, std::move(sparse));
        };
        if (part.wide) { make(std::type_identity<double>{}); }
        else {
            make(std::type_identity<float>{});
        }
    }
    return result;
}

/// Throws invalid_argument unless `base` is the model with this fingerprint. Cost: one read of the base's bytes.
inline void check_base(const cpu& policy, std::uint64_t base_fingerprint, const const_model_ref& base,
    std::string_view delta_name = "delta", std::string_view base_name = "base")
{
    if (const auto found = fingerprint(policy, base); found != base_fingerprint) {
        raise<invalid_argument>(error_code::fingerprint_differs,
            message("'", base_name, "' is not the model that '", delta_name, "' was made for: its fingerprint is ",
                fingerprint_text(found), "; expected ", fingerprint_text(base_fingerprint)));
    }
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_DELTA_HPP

// ---- taskvec/formats/quantising_sink.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_QUANTISING_SINK_HPP)
#define TASKVEC_SINGLE_FORMATS_QUANTISING_SINK_HPP
// Results of quantised layers, written as codes and scales again.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Quantises numbers as a scaled FP8 layer is, with fresh scales: for each group that shares a scale, the largest
/// finite magnitude over the largest number of the codes (448 for E4M3, 57344 for E5M2), rounded to the scale's dtype
/// (up to a power of two where the layer has those); 1 for a group of zeros. A code is the number over the scale as
/// stored, rounded to nearest even and saturated. NaN stays NaN, infinity becomes NaN in E4M3. `out` receives codes as
/// tensor `codes` and scales as tensor `scales`. Throws nonfinite_error for a scale that its dtype cannot hold. Error:
/// at most half a unit of the codes' last place times the scale. Cost: two reads of the numbers.
inline void quantise_fp8(
    const quantised_layer& like, const float* values, tensor_sink& out, std::size_t codes, std::size_t scales);

namespace detail {

/// A power of two that is at least `value`.
[[nodiscard]] inline float power_above(float value) noexcept
{
    int exponent = 0;
    return std::frexp(value, &exponent) == 0.5f ? value : std::ldexp(1.0f, exponent);
}

/// The word of a scale in its dtype, and the number that it then stands for.
struct stored_scale {
    std::uint64_t word = 0;
    float value = 0;
};
[[nodiscard]] inline stored_scale store_scale(dtype type, float scale) noexcept
{
    switch (type) {
    case dtype::f16: {
        const auto word = f32_to_f16(std::max(scale, 0x1p-14f));
        return {word, f16_to_f32(word)};
    }
    case dtype::bf16: {
        const auto word = f32_to_bf16(std::max(scale, 0x1p-126f));
        return {word, bf16_to_f32(word)};
    }
    case dtype::f64: {
        const double value = std::max(scale, 0x1p-126f);
        return {reinterpret_bits<std::uint64_t>(value), static_cast<float>(value)};
    }
    case dtype::f8_e8m0: {
        const float value = power_above(std::max(scale, 0x1p-126f));
        return {reinterpret_bits<std::uint32_t>(value) >> 23, value};
    }
    default: {
        const float value = std::max(scale, 0x1p-126f);
        return {reinterpret_bits<std::uint32_t>(value), value};
    }
    }
}

/// Whether a finite number rounds to none that fp8 holds: beyond the middle between the largest one and what would
/// come next.
[[nodiscard]] inline bool overflows_fp8(float value, bool wide) noexcept
{
    const float magnitude = std::abs(value);
    return wide ? magnitude >= 61440.0f : magnitude > 464.0f;
}
/// What an overflow becomes where it propagates: infinity, or NaN in E4M3, which has none.
[[nodiscard]] inline std::uint8_t fp8_infinity(bool negative, bool wide) noexcept
{
    return static_cast<std::uint8_t>((negative ? 0x80u : 0u) | (wide ? 0x7cu : 0x7fu));
}

} // namespace detail

inline void quantise_fp8(
    const quantised_layer& like, const float* values, tensor_sink& out, std::size_t codes, std::size_t scales)
{
    const std::uint64_t size = element_count(like.shape), groups = element_count(like.grid);
    const std::uint64_t columns = like.shape.empty() ? 1 : static_cast<std::uint64_t>(like.shape.back());
    const std::uint64_t width = like.shape.empty() ? 1 : static_cast<std::uint64_t>(like.block.back());
    const bool wide = like.codes.dtype == dtype::f8_e5m2;
    const auto each_run = [&](const auto& body) { // body(scale, first, count): numbers in a row that share a scale
        for (std::uint64_t row = 0; row * columns < size; ++row) {
            const std::uint64_t first = detail::first_scale(like, row);
            for (std::uint64_t at = 0; at < columns; at += width) {
                body(first + at / width, row * columns + at, std::min(width, columns - at));
            }
        }
    };
    std::vector<float> scale(groups, 0.0f);
    each_run([&](std::uint64_t group, std::uint64_t first, std::uint64_t count) {
        float most = scale[group];
        for (std::uint64_t i = first; i < first + count; ++i) {
            const float magnitude = std::abs(values[i]);
            most = magnitude > most && magnitude <= std::numeric_limits<float>::max() ? magnitude : most;
        }
        scale[group] = most;
    });
    const std::size_t word_bytes = bits_per_element(like.scales.dtype) / 8;
    std::vector<std::byte> words(groups * word_bytes);
    for (std::uint64_t g = 0; g < groups; ++g) {
        float wanted = scale[g] == 0 ? 1.0f : scale[g] / (wide ? 57344.0f : 448.0f);
        if (like.powers_of_two && wanted > 0x1p-126f) { wanted = detail::power_above(wanted); }
        const auto stored = detail::store_scale(like.scales.dtype, wanted);
        if (!std::isfinite(stored.value)) {
            raise<nonfinite_error>(error_code::result_overflow,
                message("layer '", like.name, "' would have the scale ", wanted, ", which ",
                    to_string(like.scales.dtype), " cannot hold: choose a dtype that is not quantised"));
        }
        std::memcpy(words.data() + g * word_bytes, &stored.word, word_bytes);
        scale[g] = stored.value;
    }
    if (!words.empty()) { out.write(scales, 0, words.data(), words.size()); }
    std::vector<std::uint8_t> buffer(static_cast<std::size_t>(std::min<std::uint64_t>(size, 1u << 18)));
    std::uint64_t begin = 0, held = 0;
    each_run([&](std::uint64_t group, std::uint64_t first, std::uint64_t count) {
        const float by = scale[group];
        for (std::uint64_t i = first; i < first + count; ++i) {
            buffer[held++] = wide ? f32_to_e5m2(values[i] / by) : f32_to_e4m3(values[i] / by);
            if (held == buffer.size()) {
                out.write(codes, begin, buffer.data(), held);
                begin += held;
                held = 0;
            }
        }
    });
    if (held > 0) { out.write(codes, begin, buffer.data(), held); }
}

/// What the outputs of aligned models become in a file: numbers, or a layer's codes and scales.
struct quantised_outputs {
    /// What becomes of an output.
    enum class way : std::uint8_t {
        numbers, ///< as the algorithm writes them
        rounded, ///< its numbers, each rounded to fp8 that has no scale
        quantised, ///< quantised again, by the layer's own scheme
        as_stored ///< a layer that takes no part: its tensors as they are
    };
    /// One output of the aligned models.
    struct output {
        way how = way::numbers; ///< what becomes of it
        std::size_t first = 0; ///< its tensor in `specs`, or the first of them (codes; scales come next)
        const quantised_layer* layer = nullptr; ///< of one that is quantised, or as stored
    };
    /// A tensor of the file that comes from elsewhere as it is.
    struct copy {
        std::size_t spec = 0; ///< its place in `specs`
        const_tensor_ref source{}; ///< its bytes
    };
    std::vector<output> outputs; ///< for each of aligned_models::outputs()
    std::vector<tensor_spec> specs; ///< of the file
    std::vector<copy> copies; ///< what the file holds of `specs` as it is
    std::vector<std::string> left_out; ///< tensors about the quantisation that the file has no more
    std::size_t dequantised = 0; ///< layers that become numbers
    std::size_t requantised = 0; ///< layers that are quantised again
    std::size_t rounded = 0; ///< tensors in fp8 without scales that stay it
    overflow on_overflow = overflow::error; ///< what becomes of a number that these cannot hold

    /// Whether the file holds what the algorithm writes, and nothing else.
    [[nodiscard]] bool plain() const noexcept
    {
        return copies.empty() && requantised == 0 && rounded == 0
            && std::all_of(outputs.begin(), outputs.end(), [](const output& one) { return one.how == way::numbers; });
    }
};

/// Plans the outputs of models whose reference (the base, or the first task) has quantised layers, `layers`; null where
/// it has none. `quantise`: whether merged layers are quantised again, and tensors in fp8 without scales are rounded to
/// it again; otherwise they become numbers of the output's dtype. Layers that take no part stay as they are stored,
/// unless the models ask for one dtype throughout. Throws dtype_mismatch for a layer to be quantised again by a scheme
/// that is only read.
[[nodiscard]] inline quantised_outputs plan_outputs(
    const aligned_models& models, const const_model_ref& reference, const quantised_layers* layers, bool quantise)
{
    using way = quantised_outputs::way;
    quantised_outputs plan;
    plan.on_overflow = models.options().on_overflow;
    std::vector<bool> copied(models.outputs().size());
    for (const auto& tensor : models.copied()) { copied[tensor.output] = true; }
    std::map<const operand_source*, const quantised_layer*> by_source;
    if (layers) {
        for (const auto& tensor : layers->layers()) { by_source.emplace(&tensor, &tensor.layer()); }
    }
    bool any_layer = false;
    for (std::size_t i = 0; i < models.outputs().size(); ++i) {
        const auto& spec = models.outputs()[i];
        const auto* const tensor = reference.find(spec.name);
        const auto found = tensor && tensor->source ? by_source.find(tensor->source) : by_source.end();
        const auto* const layer = found != by_source.end() ? found->second : nullptr;
        quantised_outputs::output one{way::numbers, plan.specs.size(), layer};
        if (layer && copied[i] && !models.options().output) { one.how = way::as_stored; }
        if (layer && !copied[i] && quantise) { one.how = way::quantised; }
        if (one.how == way::quantised && layer->scheme != quantisation::fp8) {
            raise<dtype_mismatch>(error_code::output_dtype,
                message("layer '", spec.name, "' is ", to_string(layer->scheme),
                    ", which is read and not written: choose a dtype for the result, f32 or bf16"));
        }
        if (!layer && !copied[i] && quantise && tensor && is_dequantised(tensor->dtype) && spec.dtype == dtype::f32) {
            one.how = way::rounded;
            ++plan.rounded;
            plan.specs.push_back({spec.name, tensor->dtype, spec.shape});
        }
        else if (one.how == way::numbers) {
            plan.specs.push_back(spec);
            plan.dequantised += layer ? 1 : 0;
            if (layer) {
                for (std::size_t p = 2; p < layer->parts.size(); ++p) {
                    plan.left_out.push_back(std::string(layer_stem(spec.name)) + layer->parts[p].leaf);
                }
            }
        }
        else {
            any_layer = true;
            plan.requantised += one.how == way::quantised ? 1 : 0;
            for (std::size_t p = 0; p < layer->parts.size(); ++p) {
                const auto& part = layer->parts[p];
                if (p >= 2 || one.how == way::as_stored) { plan.copies.push_back({plan.specs.size(), part.tensor}); }
                plan.specs.push_back(
                    {std::string(layer_stem(spec.name)) + part.leaf, part.tensor.dtype, part.tensor.shape});
            }
        }
        plan.outputs.push_back(one);
    }
    for (const auto& [name, tensor] : layers ? layers->beside() : const_model_ref()) {
        if (!any_layer) {
            plan.left_out.push_back(name);
            continue;
        }
        plan.copies.push_back({plan.specs.size(), tensor});
        plan.specs.push_back({name, tensor.dtype, tensor.shape});
    }
    return plan;
}

/// The sink between a walk over models and the file that a plan describes. The numbers of a layer that is quantised
/// again are gathered until all are there (in memory up to a MiB, otherwise in a file without a name in `folder`,
/// mapped) and then become codes and scales: a walk that takes tensors in order has few of them open at once, whatever
/// the model's size. What stays fp8 without a scale is rounded as it comes, to nearest even. Each byte has to be
/// written once. finish() writes what is copied. Throws what the file's sink throws, io_error; nonfinite_error for a
/// number that fp8 cannot hold, unless that saturates or propagates.
///
///     const auto plan = plan_outputs(models, base.model(), base.layers(), true);
///     safetensors_writer file(path, plan.specs);
///     quantising_sink out(plan, file, path.parent_path());
///     merge(cpu{}, options, models, out);
///     out.finish();
class quantising_sink final : public tensor_sink {
public:
    /// Between a walk and `out`, the sink of the file that `plan` describes; both outlive it. `folder`: for what is
    /// gathered beyond memory.
    quantising_sink(const quantised_outputs& plan, tensor_sink& out, std::filesystem::path folder)
        : plan_(&plan)
        , out_(&out)
        , folder_(std::move(folder))
    {
        gathered_.resize(plan.outputs.size());
        for (std::size_t i = 0; i < plan.outputs.size(); ++i) {
            if (plan.outputs[i].how == quantised_outputs::way::quantised) {
                gathered_[i] = std::make_unique<gathering>();
            }
        }
    }

    [[nodiscard]] void* direct(std::size_t index) override
    {
        const auto& output = plan_->outputs[index];
        return output.how == quantised_outputs::way::numbers ? out_->direct(output.first) : nullptr;
    }
    /// Not where layers are quantised again: their numbers are gone once all are there.
    [[nodiscard]] bool rewritable() const override
    {
        return out_->rewritable() && plan_->rounded == 0
            && std::all_of(gathered_.begin(), gathered_.end(), [](const auto& layer) { return !layer; });
    }
    [[nodiscard]] bool wants(std::size_t index) const override
    {
        const auto& output = plan_->outputs[index];
        return output.how != quantised_outputs::way::numbers || out_->wants(output.first);
    }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        const auto& output = plan_->outputs[index];
        switch (output.how) {
        case quantised_outputs::way::numbers: out_->write(output.first, offset, data, size); break;
        case quantised_outputs::way::rounded: round(output, offset, data, size); break;
        case quantised_outputs::way::as_stored: break;
        case quantised_outputs::way::quantised: gather(index, offset, data, size); break;
        }
    }
    void write_bounded(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        const auto& output = plan_->outputs[index];
        if (output.how == quantised_outputs::way::numbers) { out_->write_bounded(output.first, offset, data, size); }
        else {
            write(index, offset, data, size);
        }
    }

    /// Numbers that became the largest one of their fp8 (overflow::saturate).
    [[nodiscard]] std::uint64_t saturated() const noexcept { return saturated_.load(); }

    /// Writes what is copied. Throws invalid_argument where a layer was not written whole.
    void finish()
    {
        for (std::size_t i = 0; i < gathered_.size(); ++i) {
            if (!gathered_[i] || gathered_[i]->done) { continue; }
            const auto& output = plan_->outputs[i];
            if (element_count(output.layer->shape) > 0) {
                raise<invalid_argument>(error_code::call_order,
                    message("layer '", output.layer->name, "' is incomplete: ", gathered_[i]->received.load(),
                        " bytes of its numbers were written"));
            }
            quantise_fp8(*output.layer, nullptr, *out_, output.first, output.first + 1);
        }
        for (const auto& [spec, source] : plan_->copies) {
            if (const std::size_t bytes = source.bytes(); bytes > 0) { out_->write(spec, 0, source.data, bytes); }
        }
    }

private:
    /// The numbers of one layer.
    struct gathering {
        std::mutex lock;
        std::vector<float> in_memory;
        float* values = nullptr;
        std::size_t mapped = 0; ///< bytes of the map
        std::atomic<std::uint64_t> received{0};
        bool done = false;

        gathering() = default;
        gathering(const gathering&) = delete;
        gathering& operator=(const gathering&) = delete;
        ~gathering() { release(); }
        void release() noexcept
        {
            if (mapped > 0) { detail::system::unmap(values, mapped); }
            mapped = 0;
            values = nullptr;
            in_memory = {};
        }
    };

    void round(const quantised_outputs::output& output, std::uint64_t offset, const void* data, std::size_t size)
    {
        const tensor_spec& spec = plan_->specs[output.first];
        const bool wide = spec.dtype == dtype::f8_e5m2;
        constexpr std::size_t step = 4096;
        std::array<std::uint8_t, step> codes;
        const auto* const words = static_cast<const std::byte*>(data);
        const std::size_t count = size / sizeof(float);
        const std::uint64_t first = offset / sizeof(float);
        std::uint64_t saturated = 0;
        for (std::size_t at = 0; at < count; at += step) {
            const std::size_t n = std::min(step, count - at);
            for (std::size_t i = 0; i < n; ++i) {
                float value;
                std::memcpy(&value, words + (at + i) * sizeof(float), sizeof(float));
                codes[i] = wide ? f32_to_e5m2(value) : f32_to_e4m3(value);
                if (!std::isfinite(value) || !detail::overflows_fp8(value, wide)) { continue; }
                if (plan_->on_overflow == overflow::error) {
                    raise<nonfinite_error>(error_code::result_overflow,
                        message("tensor '", spec.name, "' would hold ", value, " at index ", first + at + i, ", which ",
                            to_string(spec.dtype),
                            " cannot; choose a wider dtype, or let it saturate or propagate (overflow)"));
                }
                if (plan_->on_overflow == overflow::propagate) { codes[i] = detail::fp8_infinity(value < 0, wide); }
                else {
                    ++saturated;
                }
            }
            out_->write(output.first, first + at, codes.data(), n);
        }
        saturated_.fetch_add(saturated, std::memory_order_relaxed);
    }
    void gather(std::size_t index, std::uint64_t offset, const void* data, std::size_t size)
    {
        auto& mine = *gathered_[index];
        const auto& output = plan_->outputs[index];
        const std::uint64_t whole = std::uint64_t{element_count(output.layer->shape)} * sizeof(float);
        {
            const std::lock_guard hold(mine.lock);
            if (mine.done || size > whole || offset > whole - size) {
                raise<invalid_argument>(error_code::index_out_of_range,
                    message("a write of ", size, " bytes at ", offset, " lies outside layer '", output.layer->name,
                        "', or comes after it is whole"));
            }
            if (!mine.values) { prepare(mine, whole); }
        }
        std::memcpy(reinterpret_cast<std::byte*>(mine.values) + offset, data, size);
        if (mine.received.fetch_add(size, std::memory_order_acq_rel) + size < whole) { return; }
        quantise_fp8(*output.layer, mine.values, *out_, output.first, output.first + 1);
        const std::lock_guard hold(mine.lock);
        mine.done = true;
        mine.release();
    }
    void prepare(gathering& mine, std::uint64_t bytes) const
    {
        if (bytes <= std::uint64_t{1} << 20) {
            mine.in_memory.resize(static_cast<std::size_t>(bytes) / sizeof(float));
            mine.values = mine.in_memory.data();
            return;
        }
        void* const memory = detail::map_unnamed_file(folder_, bytes, "a layer that is quantised again");
        mine.values = static_cast<float*>(memory);
        mine.mapped = static_cast<std::size_t>(bytes);
    }

    const quantised_outputs* plan_;
    tensor_sink* out_;
    std::filesystem::path folder_;
    std::vector<std::unique_ptr<gathering>> gathered_;
    std::atomic<std::uint64_t> saturated_{0};
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_QUANTISING_SINK_HPP

// ---- taskvec/formats/resumable_shards.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_RESUMABLE_SHARDS_HPP)
#define TASKVEC_SINGLE_FORMATS_RESUMABLE_SHARDS_HPP
// Shards that stay when whoever writes them is killed, so that the next one goes on with the rest.
// SPDX-License-Identifier: Apache-2.0


#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A sink whose shards take their names in a directory as each is complete, and are not wanted again by a later sink
/// over the same directory. That all of them are of one model is for the caller to see to. A sharded_writer takes the
/// finished shards into a checkpoint. Throws io_error; format_error for a shard that holds other tensors. Cost: that of
/// a sharded_writer; the space of the model twice where the file system has no hard links.
///
///     resumable_shards shards("work", specs, 5'000'000'000, metadata);
///     merge(cpu{}, options, models, shards);
///     sharded_writer out("merged", specs, 5'000'000'000, metadata, durability::synchronised,
///         existing_directory::exchange, shards.finish());
///     out.commit();
class resumable_shards final : public tensor_sink {
public:
    /// Opens the shards that are there, and begins the others. Throws io_error, format_error, invalid_argument.
    resumable_shards(std::filesystem::path directory, const std::vector<tensor_spec>& specs, std::uint64_t shard_size,
        const metadata_map& metadata = {}, durability mode = durability::synchronised)
        : directory_(std::move(directory))
        , plan_(plan_shards(specs, shard_size))
    {
        const auto parts = detail::tensors_of_shards(plan_, specs, place_);
        std::error_code ignored;
        for (std::size_t s = 0; s < parts.size(); ++s) {
            auto& made = *shards_.emplace_back(std::make_unique<shard>());
            made.path = directory_ / message("shard-", s + 1, "-of-", parts.size(), ".safetensors");
            for (const auto& spec : parts[s]) { made.left += spec.bytes(); }
            if (std::filesystem::exists(made.path, ignored)) {
                if (!is_laid_out(made.path, layout_safetensors(parts[s], metadata))) {
                    raise<format_error>(error_code::file_tensors,
                        "holds other tensors than are to be written: it belongs to another model", made.path.string());
                }
                made.done = true;
                ++found_;
                continue;
            }
            made.writer = std::make_unique<safetensors_writer>(made.path, parts[s], metadata, mode);
            made.writer->open_on_demand();
            if (made.left == 0) { complete(made); }
        }
    }

    [[nodiscard]] bool rewritable() const override { return false; }
    [[nodiscard]] bool wants(std::size_t index) const override { return !shards_[plan_.shard_of[index]]->done; }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        shard& to = *shards_[plan_.shard_of[index]];
        if (!to.writer) { return; } // an earlier run wrote it
        to.writer->write(place_[index], offset, data, size);
        if (to.left.fetch_sub(size, std::memory_order_acq_rel) == size && size) { complete(to); }
    }

    /// How many shards there were when this began.
    [[nodiscard]] std::size_t found() const noexcept { return found_; }
    /// How many the model has.
    [[nodiscard]] std::size_t count() const noexcept { return shards_.size(); }
    /// The shards in order, all of them complete. Throws invalid_argument where one is not.
    [[nodiscard]] std::vector<std::filesystem::path> finish() const
    {
        std::vector<std::filesystem::path> result;
        for (const auto& one : shards_) {
            if (!one->done) {
                raise<invalid_argument>(error_code::call_order,
                    message("'", one->path.string(), "' is incomplete: ", one->left.load(), " bytes were not written"));
            }
            result.push_back(one->path);
        }
        return result;
    }

private:
    struct shard {
        std::filesystem::path path;
        std::unique_ptr<safetensors_writer> writer; ///< none where an earlier run wrote it
        std::atomic<std::uint64_t> left{0}; ///< bytes
        std::atomic<bool> done{false};
    };
    static void complete(shard& one)
    {
        one.writer->commit();
        one.done = true;
    }

    std::filesystem::path directory_;
    shard_plan plan_;
    std::vector<std::size_t> place_; ///< of each spec in its shard
    std::vector<std::unique_ptr<shard>> shards_;
    std::size_t found_ = 0;
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_RESUMABLE_SHARDS_HPP

// ---- taskvec/formats/statistics.hpp
#if !defined(TASKVEC_SINGLE_FORMATS_STATISTICS_HPP)
#define TASKVEC_SINGLE_FORMATS_STATISTICS_HPP
// Statistics on disk: what Fisher merging and RegMean need to know of a task's data, as plain safetensors files.
// SPDX-License-Identifier: Apache-2.0


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
    [[nodiscard]] bool has(std::string_view name) const
    {
        const auto place = std::lower_bound(parameters_.begin(), parameters_.end(), name,
            [](const tensor_spec& spec, std::string_view n) { return spec.name < n; });
        return place != parameters_.end() && place->name == name;
    }
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

// ---- taskvec/statistics/gram_accumulator.hpp
#if !defined(TASKVEC_SINGLE_STATISTICS_GRAM_ACCUMULATOR_HPP)
#define TASKVEC_SINGLE_STATISTICS_GRAM_ACCUMULATOR_HPP
// Gram matrices of a layer's inputs, built from batches: what RegMean needs to know of the data.
// SPDX-License-Identifier: Apache-2.0


#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// G = Σ xᵀx over all rows x that a linear layer was given. Batches are examples×features, of any storage type and
/// order; only the half below the diagonal is summed and held, in f64, 4·n² bytes for n features. Accumulators over
/// parts of the data add up. The bits depend on the batches alone, not on threads. Cost: examples·n² flops.
///
///     gram_accumulator gram(768, "encoder.0.fc1");
///     for (…) { gram.add(cpu{}, matrix_view<const float>(x, examples, 768, matrix_order::row_major)); }
///     matrix<double> g = gram.matrix();
class gram_accumulator {
public:
    /// Of a layer with `features` inputs; `layer` names it in errors. 4·features² bytes.
    explicit gram_accumulator(std::size_t features, std::string layer = "the layer")
        : features_(features)
        , layer_(std::move(layer))
    {
        for (std::size_t j = 0; j < features; j += panel) {
            panels_.emplace_back(features - j, std::min(panel, features - j));
        }
    }

    /// Inputs of the layer.
    [[nodiscard]] std::size_t features() const noexcept { return features_; }
    /// Rows seen: examples, or tokens where each position is a row.
    [[nodiscard]] std::uint64_t examples() const noexcept { return examples_; }

    /// Adds a batch. Throws shape_mismatch; nonfinite_error, with the sums as they were before.
    template <storage_element T>
    void add(const cpu& policy, matrix_view<const T> batch)
    {
        if (batch.cols() != features_) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("a batch of ", batch.rows(), "×", batch.cols(), " was given to the Gram matrix of ", layer_,
                    ", which has ", features_, " inputs: pass examples×features"));
        }
        for (std::size_t i = 0; i < batch.rows(); ++i) {
            for (std::size_t j = 0; j < features_; ++j) {
                if (const double value = widen<double>(batch(i, j)); !std::isfinite(value)) {
                    raise<nonfinite_error>(error_code::statistics_not_finite,
                        message("a batch for ", layer_, " holds ", std::isnan(value) ? "NaN" : "infinity", " at row ",
                            i, ", column ", j, ": leave out this example"));
                }
            }
        }
        taskvec::matrix<double> rows(
            std::min(block, batch.rows()), features_, matrix_order::row_major, memory_of(policy));
        for (std::size_t first = 0; first < batch.rows(); first += block) {
            const std::size_t count = std::min(block, batch.rows() - first);
            for (std::size_t i = 0; i < count; ++i) {
                for (std::size_t j = 0; j < features_; ++j) { rows(i, j) = widen<double>(batch(first + i, j)); }
            }
            const matrix_view<const double> x = std::as_const(rows).view();
            const bool worth_threads =
                static_cast<double>(count) * static_cast<double>(features_) * static_cast<double>(features_) > 4e6;
            for_each_index(
                worth_threads ? policy : sequential(policy), panels_.size(), [&](std::size_t p, std::size_t) {
                    const std::size_t j = p * panel;
                    gemm(sequential(policy), 1.0, x.block(0, j, count, features_ - j).transposed(),
                        x.block(0, j, count, panels_[p].cols()), 1.0, panels_[p].view());
                });
        }
        examples_ += batch.rows();
    }
    template <storage_element T>
    void add(const cpu& policy, matrix_view<T> batch)
    {
        add(policy, matrix_view<const T>(batch));
    }
    /// Adds what was seen elsewhere. Throws shape_mismatch.
    void add(const gram_accumulator& other)
    {
        if (other.features_ != features_) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("the Gram matrix of ", layer_, " has ", features_, " inputs, and that of ", other.layer_,
                    " has ", other.features_));
        }
        for (std::size_t p = 0; p < panels_.size(); ++p) {
            for (std::size_t i = 0; i < panels_[p].size(); ++i) { panels_[p].data()[i] += other.panels_[p].data()[i]; }
        }
        examples_ += other.examples_;
    }

    /// G(i, j).
    [[nodiscard]] double operator()(std::size_t i, std::size_t j) const noexcept
    {
        if (i < j) { std::swap(i, j); }
        return panels_[j / panel](i - j / panel * panel, j % panel);
    }
    /// G, both halves, n×n.
    [[nodiscard]] taskvec::matrix<double> matrix() const
    {
        taskvec::matrix<double> g(features_, features_);
        for (std::size_t j = 0; j < features_; ++j) {
            for (std::size_t i = j; i < features_; ++i) { g(i, j) = g(j, i) = (*this)(i, j); }
        }
        return g;
    }

private:
    static constexpr std::size_t panel = 64, block = 256;

    std::size_t features_;
    std::string layer_;
    std::uint64_t examples_ = 0;
    std::vector<taskvec::matrix<double>> panels_; // columns [64·p, 64·(p + 1)), from their diagonal down
};

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_STATISTICS_GRAM_ACCUMULATOR_HPP

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

#include <algorithm>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The value of the metadata key `schema` that this version writes and reads.
inline constexpr std::string_view statistics_schema = "taskvec.statistics.1";

/// What a statistics file holds.
enum class statistics_kind : std::uint8_t { empirical_fisher, expected_fisher, gram };

/// The word that files have for a kind.
[[nodiscard]] constexpr std::string_view to_string(statistics_kind kind) noexcept
{
    return kind == statistics_kind::gram            ? "gram"
        : kind == statistics_kind::empirical_fisher ? "empirical_fisher"
                                                    : "expected_fisher";
}

/// What a statistics file says about itself.
struct statistics_info {
    statistics_kind kind = statistics_kind::empirical_fisher; ///< what the tensors are
    std::uint64_t examples = 0; ///< how many the statistics come from; of Grams, the rows of the layer that saw most
    std::optional<std::uint64_t> fingerprint{}; ///< of the model that they were collected with
    std::vector<std::string> in_out{}; ///< Grams: the weights that are stored in×out (Conv1D); all others are out×in
    metadata_map metadata{}; ///< further keys to write; on reading, all keys of the file
};

/// Writes statistics. Each tensor has the name of the parameter that it belongs to: a Fisher also its shape, a Gram
/// in×in. Metadata: `schema` "taskvec.statistics.1", `kind` "empirical_fisher", "expected_fisher" or "gram",
/// `examples`, and where known `fingerprint` of the model (see fingerprint()); for Grams of weights that are stored
/// in×out their names, as a JSON list, under `in_out`. Throws invalid_argument, io_error. Written atomically.
inline void write_statistics(const std::filesystem::path& path, const const_model_ref& tensors,
    const statistics_info& info, durability mode = durability::synchronised);

namespace detail {

inline metadata_map statistics_metadata(const statistics_info& info)
{
    metadata_map metadata = info.metadata;
    metadata["schema"] = statistics_schema;
    metadata["kind"] = to_string(info.kind);
    metadata["examples"] = std::to_string(info.examples);
    metadata.erase("fingerprint");
    metadata.erase("in_out");
    if (info.fingerprint) { metadata["fingerprint"] = fingerprint_text(*info.fingerprint); }
    if (!info.in_out.empty()) { metadata["in_out"] = nlohmann::json(info.in_out).dump(); }
    return metadata;
}

/// Writes f64 values as another storage type.
inline void write_narrowed(
    safetensors_writer& writer, std::size_t index, std::uint64_t element, dtype type, std::span<const double> values)
{
    visit_storage(type, "statistics", [&]<class T>(std::type_identity<T>) {
        std::vector<T> stored(values.size());
        kernels::narrow(values.data(), stored.data(), values.size());
        writer.write(index, element * sizeof(T), stored.data(), stored.size() * sizeof(T));
    });
}

/// `count` elements of a tensor from `first` on, in f64.
inline std::vector<double> read_widened(const const_tensor_ref& tensor, std::uint64_t first, std::size_t count)
{
    std::vector<double> raw(block_size), values(count);
    const aligned_tensor::operand from{static_cast<const std::byte*>(tensor.data), tensor.dtype};
    for (std::size_t at = 0; at < count; at += block_size) {
        const std::size_t n = std::min(block_size, count - at);
        with_elements(from, first + at, n, reinterpret_cast<std::byte*>(raw.data()),
            [&](const auto* stored) { (void)kernels::widen(stored, values.data() + at, n); });
    }
    return values;
}

} // namespace detail

inline void write_statistics(
    const std::filesystem::path& path, const const_model_ref& tensors, const statistics_info& info, durability mode)
{
    for (const auto& [label, tensor] : tensors) {
        if (!is_storage(tensor.dtype)) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("statistics of '", label, "' have dtype ", to_string(tensor.dtype), "; expected ",
                    storage_names()));
        }
        if (info.kind == statistics_kind::gram && (tensor.shape.size() != 2 || tensor.shape[0] != tensor.shape[1])) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("the Gram matrix of '", label, "' has shape ", to_string(tensor.shape), "; expected a square"));
        }
    }
    write_safetensors(path, tensors, detail::statistics_metadata(info), mode);
}

/// Writes the Fisher that an accumulator has built, in `storage`.
///
///     write_statistics("a.fisher.safetensors", fisher, fingerprint(cpu{}, model));
inline void write_statistics(const std::filesystem::path& path, const fisher_accumulator& fisher, statistics_kind kind,
    std::optional<std::uint64_t> model = {}, dtype storage = dtype::f32, durability mode = durability::synchronised)
{
    if (kind == statistics_kind::gram) {
        raise<invalid_argument>(error_code::statistics_kind, "a Fisher accumulator holds no Gram matrices");
    }
    if (fisher.examples() == 0) {
        raise<invalid_argument>(
            error_code::inputs_empty, "no example was given: the Fisher information is a mean over examples");
    }
    std::vector<tensor_spec> specs;
    for (const auto& parameter : fisher.parameters()) { specs.push_back({parameter.name, storage, parameter.shape}); }
    safetensors_writer writer(path, specs,
        detail::statistics_metadata(
            {.kind = kind, .examples = fisher.examples(), .fingerprint = model, .in_out = {}, .metadata = {}}),
        mode);
    for (std::size_t i = 0; i < specs.size(); ++i) { detail::write_narrowed(writer, i, 0, storage, fisher.fisher(i)); }
    writer.commit();
}
inline void write_statistics(const std::filesystem::path& path, const empirical_fisher_accumulator& fisher,
    std::optional<std::uint64_t> model = {}, dtype storage = dtype::f32, durability mode = durability::synchronised)
{
    write_statistics(path, fisher, statistics_kind::empirical_fisher, model, storage, mode);
}
inline void write_statistics(const std::filesystem::path& path, const expected_fisher_accumulator& fisher,
    std::optional<std::uint64_t> model = {}, dtype storage = dtype::f32, durability mode = durability::synchronised)
{
    write_statistics(path, fisher, statistics_kind::expected_fisher, model, storage, mode);
}

/// Writes the Grams of a model's layers, by the names of their weights. `in_out` names those stored in×out. f64 by
/// default: what f32 rounds away decides where inputs are nearly dependent.
///
///     const auto of = fingerprint(cpu{}, model);
///     write_statistics("a.gram.safetensors", {{"fc1.weight", gram1}, {"fc2.weight", gram2}}, of);
inline void write_statistics(const std::filesystem::path& path, const std::map<std::string, gram_accumulator>& grams,
    std::optional<std::uint64_t> model = {}, std::vector<std::string> in_out = {}, dtype storage = dtype::f64,
    durability mode = durability::synchronised)
{
    statistics_info info{.kind = statistics_kind::gram,
        .examples = 0,
        .fingerprint = model,
        .in_out = std::move(in_out),
        .metadata = {}};
    std::vector<tensor_spec> specs;
    for (const auto& [label, gram] : grams) {
        const auto n = static_cast<std::int64_t>(gram.features());
        specs.push_back({label, storage, {n, n}});
        info.examples = std::max(info.examples, gram.examples());
    }
    for (const auto& label : info.in_out) {
        if (!grams.contains(label)) {
            raise<invalid_argument>(error_code::tensor_missing,
                message("'", label, "' is said to be stored in×out, and has no Gram matrix here"));
        }
    }
    safetensors_writer writer(path, specs, detail::statistics_metadata(info), mode);
    std::size_t index = 0;
    for (const auto& [label, gram] : grams) {
        std::vector<double> row(gram.features());
        for (std::size_t i = 0; i < row.size(); ++i) {
            for (std::size_t j = 0; j < row.size(); ++j) { row[j] = gram(i, j); }
            detail::write_narrowed(writer, index, i * row.size(), storage, row);
        }
        ++index;
    }
    writer.commit();
}

/// A statistics file, mapped: views into it live as long as this object. A safetensors file without our metadata is
/// taken as it is: then described() is false, and neither its kind nor its model can be checked. Throws format_error
/// for metadata or tensors that break the format, io_error. Cost: O(header); merges check the values that they read.
///
///     const statistics_file fisher("a.fisher.safetensors");
///     fisher.require_fisher();
///     check_statistics(cpu{}, fisher, model, "a.safetensors");
class statistics_file {
public:
    /// Maps and checks the file.
    explicit statistics_file(const std::filesystem::path& path)
        : file_(path)
        , model_(file_.model())
    {
        info_.metadata = file_.metadata();
        const auto value = [&](const char* key) -> const std::string* {
            const auto place = info_.metadata.find(key);
            return place == info_.metadata.end() ? nullptr : &place->second;
        };
        for (const auto& [label, tensor] : model_) {
            if (!is_storage(tensor.dtype)) {
                fail(message(
                    "holds '", label, "' of dtype ", to_string(tensor.dtype), "; statistics are ", storage_names()));
            }
        }
        const auto* const schema = value("schema");
        if (!schema) { return; }
        if (*schema != statistics_schema) {
            fail(message("has schema '", *schema, "'; this version reads '", statistics_schema, "'"));
        }
        described_ = true;
        const auto* const kind = value("kind");
        bool known_kind = false;
        for (const auto known :
            {statistics_kind::empirical_fisher, statistics_kind::expected_fisher, statistics_kind::gram}) {
            if (kind && *kind == to_string(known)) {
                info_.kind = known;
                known_kind = true;
            }
        }
        if (!known_kind) {
            fail(message(
                "has kind '", kind ? *kind : std::string(), "'; expected empirical_fisher, expected_fisher or gram"));
        }
        const auto* const examples = value("examples");
        bool counted = false;
        if (examples) {
            const char* const end = examples->data() + examples->size();
            const auto [stopped, wrong] = std::from_chars(examples->data(), end, info_.examples);
            counted = stopped == end && wrong == std::errc();
        }
        if (!counted) {
            fail(message(
                "has examples '", examples ? *examples : std::string(), "'; expected a count of at most 2^64-1"));
        }
        if (const auto* const stamp = value("fingerprint")) {
            info_.fingerprint = parse_fingerprint(*stamp);
            if (!info_.fingerprint) {
                fail(message("has the fingerprint '", *stamp, "'; expected 'xxh64:' and 16 hexadecimal digits"));
            }
        }
        if (info_.kind != statistics_kind::gram) { return; }
        for (const auto& [label, tensor] : model_) {
            if (tensor.shape.size() != 2 || tensor.shape[0] != tensor.shape[1]) {
                fail(message("holds '", label, "' of shape ", to_string(tensor.shape), "; a Gram matrix is square"));
            }
        }
        if (const auto* const list = value("in_out")) {
            const auto json = parse_json(*list, path.string());
            bool good = json.is_array();
            for (const auto& entry : json) {
                good = good && entry.is_string() && model_.find(entry.get_ref<const std::string&>());
            }
            if (!good) { fail("has an in_out that is no list of its tensors' names"); }
            for (const auto& entry : json) { info_.in_out.push_back(entry.get<std::string>()); }
        }
    }

    /// The file's path.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return file_.path(); }
    /// The file's path.
    [[nodiscard]] std::filesystem::path path() && { return file_.path(); }
    /// The file itself.
    [[nodiscard]] const safetensors_file& file() const& noexcept { return file_; }
    void file() const&& = delete; // name the owner first: its views would dangle
    /// The statistics by name of the model's tensors.
    [[nodiscard]] const const_model_ref& model() const& noexcept { return model_; }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// Whether the file says what it holds; info() means something only then.
    [[nodiscard]] bool described() const noexcept { return described_; }
    /// What the file says about itself.
    [[nodiscard]] const statistics_info& info() const& noexcept { return info_; }
    /// What the file says about itself.
    [[nodiscard]] statistics_info info() && { return std::move(info_); }
    /// How the weight of this name is stored, as the file says; out_in if it says nothing.
    [[nodiscard]] weight_layout layout(std::string_view label) const
    {
        return std::find(info_.in_out.begin(), info_.in_out.end(), label) != info_.in_out.end() ? weight_layout::in_out
                                                                                                : weight_layout::out_in;
    }

    /// Throws invalid_argument if the file says that it holds something else.
    void require_fisher() const { require(info_.kind != statistics_kind::gram, "a diagonal Fisher"); }
    /// The same for Gram matrices.
    void require_gram() const { require(info_.kind == statistics_kind::gram, "Gram matrices"); }

private:
    [[noreturn]] void fail(const std::string& what) const
    {
        raise<format_error>(error_code::statistics_format, what, file_.path().string());
    }
    void require(bool right, std::string_view wanted) const
    {
        if (described_ && !right) {
            raise<invalid_argument>(error_code::statistics_kind,
                message("'", path().string(), "' holds ", to_string(info_.kind), "; expected ", wanted));
        }
    }

    safetensors_file file_;
    const_model_ref model_;
    statistics_info info_;
    bool described_ = false;
};

/// Throws invalid_argument if the file names another model than this one. Cost: one read of the model's bytes.
inline void check_statistics(const cpu& policy, const statistics_file& file, const const_model_ref& model,
    std::string_view model_name = "the model")
{
    if (!file.described() || !file.info().fingerprint) { return; }
    if (const auto found = fingerprint(policy, model); found != *file.info().fingerprint) {
        raise<invalid_argument>(error_code::fingerprint_differs,
            message("'", file.path().string(), "' holds the statistics of another model than '", model_name,
                "': its fingerprint is ", fingerprint_text(*file.info().fingerprint), "; expected ",
                fingerprint_text(found)));
    }
}

namespace detail {

/// Throws invalid_argument or nonfinite_error unless every tensor of a file of Grams is one. Cost: one read of both
/// halves.
inline void check_grams(const statistics_file& file)
{
    std::vector<double> memory(2 * stored_gram::tile * stored_gram::tile), raw(block_size), diagonal;
    for (const auto& [label, tensor] : file.model()) {
        const auto n = static_cast<std::size_t>(tensor.shape[0]);
        diagonal.resize(std::max(diagonal.size(), n));
        const auto where = [&file, &label = label] {
            return message("the Gram matrix of '", label, "' in '", file.path().string(), "'");
        };
        const stored_gram gram(
            {static_cast<const std::byte*>(tensor.data), tensor.dtype}, n, where, diagonal, raw.data());
        for (std::size_t row = 0; row < gram.tile_rows(); ++row) {
            gram.for_each_entry(row, memory.data(), raw.data(), [](std::size_t, std::size_t, double) { });
        }
    }
}

/// Throws nonfinite_error if a total of finite parts is beyond what it will be stored as.
inline void check_total(std::span<const double> total, const tensor_spec& spec, std::size_t first)
{
    visit_storage(spec.dtype, spec.name, [&]<class T>(std::type_identity<T>) {
        for (std::size_t i = 0; i < total.size(); ++i) {
            const auto value = static_cast<arithmetic_type<T>>(total[i]);
            if (std::isfinite(static_cast<double>(widen<arithmetic_type<T>>(narrow<T>(value))))) { continue; }
            raise<nonfinite_error>(error_code::result_overflow,
                message("'", spec.name, "' of all parts together is beyond ", to_string(spec.dtype), " at index ",
                    first + i, ": scale the inputs that these statistics are collected from down"));
        }
    });
}

} // namespace detail

/// Joins statistics of one model over parts of its data into one file, as if they had been collected in one go: Grams
/// add up, Fishers are means weighted by their examples. dtypes are those of the first part. Sums run in f64 in the
/// order of the parts. Throws invalid_argument for parts of different kinds, models or tensors, or without metadata,
/// for a negative Fisher, for more than 2^64-1 examples, and for what is no Gram matrix; shape_mismatch;
/// nonfinite_error, also where a total is beyond its dtype; io_error, also where a part changed meanwhile. Calls
/// `before_commit(info, tensors)` once the file is complete, before it takes its name: what that throws leaves the
/// output as it was.
template <std::invocable<const statistics_info&, std::size_t> Call>
void combine_statistics(const std::vector<std::filesystem::path>& parts, const std::filesystem::path& out,
    durability mode, Call&& before_commit)
{
    if (parts.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, "no statistics were given: at least one file is needed");
    }
    std::vector<statistics_file> files;
    for (const auto& part : parts) { files.emplace_back(part); }
    const statistics_file& first = files.front();
    statistics_info info = first.info();
    info.examples = 0;
    std::vector<double> weights;
    for (const auto& file : files) {
        const auto differ = [&](std::string_view what) {
            raise<invalid_argument>(error_code::statistics_differ,
                message("'", file.path().string(), "' and '", first.path().string(), "' ", what,
                    ": only parts of one collection can be joined"));
        };
        if (!file.described()) {
            raise<invalid_argument>(error_code::statistics_kind,
                message(
                    "'", file.path().string(), "' does not say what it holds (no schema '", statistics_schema, "')"));
        }
        if (file.info().kind != info.kind) { differ("hold different kinds of statistics"); }
        if (file.info().fingerprint != info.fingerprint) { differ("come from different models"); }
        if (file.info().in_out != info.in_out) { differ("disagree about the layout of weights"); }
        if (file.model().size() != first.model().size()) { differ("hold different tensors"); }
        for (const auto& [label, tensor] : file.model()) {
            const auto* const partner = first.model().find(label);
            if (!partner) { differ("hold different tensors"); }
            if (partner->shape != tensor.shape) {
                raise<shape_mismatch>(error_code::statistics_shape,
                    message("'", label, "' has shape ", to_string(tensor.shape), " in '", file.path().string(),
                        "' and ", to_string(partner->shape), " in '", first.path().string(), "'"));
            }
        }
        if (detail::sum_wraps(info.examples, file.info().examples, info.examples)) {
            raise<invalid_argument>(error_code::statistics_invalid,
                message("the parts come from more than 2^64-1 examples together, '", file.path().string(), "' from ",
                    file.info().examples, ": their counts cannot be right"));
        }
        weights.push_back(info.kind == statistics_kind::gram ? 1.0 : static_cast<double>(file.info().examples));
    }
    if (info.kind != statistics_kind::gram) {
        if (info.examples == 0) {
            raise<invalid_argument>(error_code::inputs_empty, "the Fishers to join come from no examples");
        }
        for (double& weight : weights) { weight /= static_cast<double>(info.examples); }
    }
    else {
        for (const auto& file : files) { detail::check_grams(file); }
    }
    std::vector<tensor_spec> specs;
    for (const auto& [label, tensor] : first.model()) { specs.push_back({label, tensor.dtype, tensor.shape}); }
    safetensors_writer writer(out, specs, detail::statistics_metadata(info), mode);
    constexpr std::size_t piece = std::size_t{1} << 18;
    for (std::size_t index = 0; index < specs.size(); ++index) {
        const std::size_t size = specs[index].size();
        for (std::size_t at = 0; at < size; at += piece) {
            const std::size_t n = std::min(piece, size - at);
            std::vector<double> total(n, 0.0);
            for (std::size_t f = 0; f < files.size(); ++f) {
                const auto values = detail::read_widened(files[f].model()[index].tensor, at, n);
                for (std::size_t i = 0; i < n; ++i) {
                    if (!std::isfinite(values[i]) || (info.kind != statistics_kind::gram && values[i] < 0)) {
                        const auto what = message("'", specs[index].name, "' of '", files[f].path().string(),
                            "' holds ", values[i], " at index ", at + i);
                        if (std::isfinite(values[i])) {
                            raise<invalid_argument>(error_code::statistics_invalid,
                                what + ": a diagonal Fisher is a mean of squares and cannot be negative");
                        }
                        raise<nonfinite_error>(error_code::statistics_not_finite, what + ": collect this part again");
                    }
                }
                kernels::accumulate(total.data(), values.data(), weights[f], n);
            }
            detail::check_total(total, specs[index], at);
            detail::write_narrowed(writer, index, at, specs[index].dtype, total);
        }
    }
    writer.finish();
    for (const auto& file : files) { file.file().map().check_unchanged(); }
    before_commit(std::as_const(info), specs.size());
    writer.commit();
}

/// The same, without a call.
inline void combine_statistics(const std::vector<std::filesystem::path>& parts, const std::filesystem::path& out,
    durability mode = durability::synchronised)
{
    combine_statistics(parts, out, mode, [](const statistics_info&, std::size_t) { });
}

} // namespace taskvec::inline TASKVEC_ABI
#endif // TASKVEC_SINGLE_FORMATS_STATISTICS_HPP
