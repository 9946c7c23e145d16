// Errors: one base class, one kind a class, and messages that name the tensor, what was found and what to do.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

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

[[gnu::cold, gnu::noinline]] inline std::string join(std::initializer_list<message_part> parts)
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
