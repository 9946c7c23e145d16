// Errors: one base class, one kind a class, one code a subject, and messages that name the tensor, what was found and
// what to do.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

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
