// Packs of stored words: how entries of a storage type become packs of its arithmetic type, and packs become stored
// words.
// SPDX-License-Identifier: Apache-2.0
//
// 16-bit types are read in words of 32 bits, two entries in each, whose halves come apart and together again by shifts
// and masks: part 0 of such a pack holds the even entries, part 1 the odd ones.
#pragma once

#include <taskvec/core/pack.hpp>

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
