// What becomes of finite numbers that a storage type cannot hold.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/storage.hpp>

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
