// Errors: one base class, one kind a class, and messages that name the tensor, what was found and what to do.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// What went wrong, as a value: the same in an exception and in the no-exceptions handler.
enum class error_kind { invalid_argument, shape_mismatch, dtype_mismatch, nonfinite, format_error, io_error, backend_error, cancelled };

/// Base of everything that the library throws.
class error : public std::runtime_error {
public:
    error(error_kind kind, const std::string& message)
        : std::runtime_error(message)
        , kind_(kind)
    { }
    [[nodiscard]] error_kind kind() const noexcept { return kind_; }

private:
    error_kind kind_;
};

/// A broken precondition: a value outside its range, an empty list, aliased outputs.
class invalid_argument : public error {
public:
    explicit invalid_argument(const std::string& message)
        : error(error_kind::invalid_argument, message)
    { }
};

/// Two tensors that must have the same shape have not.
class shape_mismatch : public error {
public:
    explicit shape_mismatch(const std::string& message)
        : error(error_kind::shape_mismatch, message)
    { }
};

/// A tensor has an element type that the algorithm cannot use, or that differs from its partner's.
class dtype_mismatch : public error {
public:
    explicit dtype_mismatch(const std::string& message)
        : error(error_kind::dtype_mismatch, message)
    { }
};

/// An input holds NaN or infinity and propagation was not asked for.
class nonfinite_error : public error {
public:
    explicit nonfinite_error(const std::string& message)
        : error(error_kind::nonfinite, message)
    { }
};

/// A file does not hold what its format promises. `offset` is the byte at which the fault was seen.
class format_error : public error {
public:
    format_error(const std::string& message, std::string file, std::uint64_t offset = 0)
        : error(error_kind::format_error, file.empty() ? message : file + ": " + message)
        , file_(std::move(file))
        , offset_(offset)
    { }
    [[nodiscard]] const std::string& file() const noexcept { return file_; }
    [[nodiscard]] std::uint64_t offset() const noexcept { return offset_; }

private:
    std::string file_;
    std::uint64_t offset_;
};

/// The operating system refused: `code` is its errno.
class io_error : public error {
public:
    io_error(const std::string& message, std::string file, int code = 0)
        : error(error_kind::io_error, file.empty() ? message : file + ": " + message)
        , file_(std::move(file))
        , code_(code)
    { }
    [[nodiscard]] const std::string& file() const noexcept { return file_; }
    [[nodiscard]] int code() const noexcept { return code_; }

private:
    std::string file_;
    int code_;
};

/// A backend failed: `call` is what was called, `code` what it answered.
class backend_error : public error {
public:
    backend_error(const std::string& message, std::string call, int code)
        : error(error_kind::backend_error, call + ": " + message + " (code " + std::to_string(code) + ")")
        , call_(std::move(call))
        , code_(code)
    { }
    [[nodiscard]] const std::string& call() const noexcept { return call_; }
    [[nodiscard]] int code() const noexcept { return code_; }

private:
    std::string call_;
    int code_;
};

/// The progress callback asked to stop.
class cancelled : public error {
public:
    explicit cancelled(const std::string& message = "cancelled by the progress callback")
        : error(error_kind::cancelled, message)
    { }
};

/// With exceptions off every error goes here; a handler that returns is followed by std::abort().
using error_handler = void (*)(error_kind, const char* message);

namespace detail {
inline void print_error(error_kind, const char* message)
{
    std::fprintf(stderr, "taskvec: error: %s\n", message);
}
inline error_handler& error_handler_slot() noexcept
{
    static error_handler handler = &print_error;
    return handler;
}

inline void append(std::string& text, std::string_view part)
{
    text += part;
}
inline void append(std::string& text, const char* part)
{
    text += part;
}
inline void append(std::string& text, char part)
{
    text += part;
}
template <class Number>
    requires std::is_integral_v<Number>
void append(std::string& text, Number part)
{
    text += std::to_string(part);
}
template <class Number>
    requires std::is_floating_point_v<Number>
void append(std::string& text, Number part)
{
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%.6g", static_cast<double>(part));
    text += buffer;
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
    std::string text;
    (detail::append(text, parts), ...);
    return text;
}

/// Throws Error(arguments…), or hands its message to the handler when exceptions are off. Never returns.
template <class Error, class... Arguments>
[[noreturn, gnu::cold, gnu::noinline]] void raise(Arguments&&... arguments)
{
#if defined(TASKVEC_NO_EXCEPTIONS)
    const Error failure(std::forward<Arguments>(arguments)...);
    detail::error_handler_slot()(failure.kind(), failure.what());
    std::abort();
#else
    throw Error(std::forward<Arguments>(arguments)...);
#endif
}

} // namespace taskvec::inline TASKVEC_ABI
