// Packs: the few entries that a kernel's body works on at once. A vector on the CPU, a single number on a device, in
// tails and under other compilers than g++ and clang: a body is written once, over packs, and gives the same bits with
// any of them.
// SPDX-License-Identifier: Apache-2.0
//
// Every operation rounds by itself (no multiply-add is fused). Comparisons give masks, and masks choose: select(mask,
// yes, no), where(mask, x). A body has no branches on packs: `if (x > y)` does not compile.
#pragma once

#include <taskvec/core/dtype.hpp>
#include <taskvec/core/rounding.hpp>

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
