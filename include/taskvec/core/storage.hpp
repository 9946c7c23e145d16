// Storage types: what follows from the list of them. How to add one is told in core/storage_traits.hpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/half.hpp>
#include <taskvec/core/storage_traits.hpp>
#include <taskvec/fwd.hpp>

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
