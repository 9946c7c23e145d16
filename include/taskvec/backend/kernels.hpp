// The CPU's elementwise kernels: flat loops over one block, each a function of its own.
// SPDX-License-Identifier: Apache-2.0
//
// A block is a few thousand elements: small enough that its rows stay in the first cache levels, large enough that a
// call costs nothing. Every kernel takes restrict pointers, writes one row and reads few, so that the vectoriser sees
// one simple loop (see docs/design.md, "The shape of the loops"). No kernel fuses a multiply with an add.
#pragma once

#include <taskvec/core/dtype.hpp>

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

TASKVEC_KERNELS_BEGIN

/// Elements between two calls of fetch_ahead(), and how many bytes ahead it reaches. A kernel that reads many streams asks
/// for their next lines itself, a few at a time: it has more streams than the hardware follows, and other work to do meanwhile.
inline constexpr std::size_t fetch_group = 128, fetch_distance = 4096;

/// Asks for the lines of `count` words that lie fetch_distance bytes ahead. Never faults.
template <std::size_t count = fetch_group, class Word>
inline void fetch_ahead(const Word* words) noexcept
{
    const auto* const place = reinterpret_cast<const char*>(words) + fetch_distance;
#pragma GCC unroll 16
    for (std::size_t line = 0; line < count * sizeof(Word); line += 64) { __builtin_prefetch(place + line, 0, 3); }
}

namespace detail {
template <storage_element T, arithmetic_element A>
TASKVEC_NOINLINE bits_type<A> widen(const storage_word<T>* TASKVEC_RESTRICT x, A* TASKVEC_RESTRICT out, std::size_t n)
{
    TASKVEC_STRICT_FP
    bits_type<A> largest = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const A value = widen_word<A, T>(x[i]);
        out[i] = value;
        const auto magnitude = magnitude_bits(value);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

template <storage_element T, arithmetic_element A>
TASKVEC_NOINLINE bits_type<A> subtract(const storage_word<T>* TASKVEC_RESTRICT x, const A* TASKVEC_RESTRICT base, A* TASKVEC_RESTRICT out, std::size_t n)
{
    TASKVEC_STRICT_FP
    bits_type<A> largest = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const A value = widen_word<A, T>(x[i]) - base[i];
        out[i] = value;
        const auto magnitude = magnitude_bits(value);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

template <storage_element T, arithmetic_element A>
TASKVEC_NOINLINE void narrow(const A* TASKVEC_RESTRICT x, storage_word<T>* TASKVEC_RESTRICT out, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) { out[i] = narrow_word<T>(x[i]); }
}
} // namespace detail

/// out = widen(x). Returns the largest magnitude bits seen, so that the caller learns of NaN and infinity for free.
template <arithmetic_element A, storage_element T>
bits_type<A> widen(const T* x, A* out, std::size_t n)
{
    return detail::widen<T>(words(x), out, n);
}

/// The largest magnitude bits of a row.
template <arithmetic_element A>
TASKVEC_NOINLINE bits_type<A> largest_magnitude(const A* TASKVEC_RESTRICT x, std::size_t n)
{
    bits_type<A> largest = 0;
    for (std::size_t i = 0; i < n; ++i) {
        const auto magnitude = magnitude_bits(x[i]);
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

/// out = widen(x) − base. Returns the largest magnitude bits of the result.
template <arithmetic_element A, storage_element T>
bits_type<A> subtract(const T* x, const A* base, A* out, std::size_t n)
{
    return detail::subtract<T>(words(x), base, out, n);
}

/// out = narrow(x), rounded once to nearest even.
template <storage_element T, arithmetic_element A>
void narrow(const A* x, T* out, std::size_t n)
{
    detail::narrow<T>(x, words(out), n);
}

template <arithmetic_element A>
TASKVEC_NOINLINE void fill(A* TASKVEC_RESTRICT out, A value, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) { out[i] = value; }
}

/// sum += weight · x
template <arithmetic_element A>
TASKVEC_NOINLINE void accumulate(A* TASKVEC_RESTRICT sum, const A* TASKVEC_RESTRICT x, A weight, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A product = weight * x[i];
        sum[i] = sum[i] + product;
    }
}

/// out = 0 + weight · x: the first term of a sum that starts at +0.
template <arithmetic_element A>
TASKVEC_NOINLINE void begin_sum(A* TASKVEC_RESTRICT sum, const A* TASKVEC_RESTRICT x, A weight, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A product = weight * x[i];
        sum[i] = A{0} + product;
    }
}

/// sum += Σ weights[t] · (widen(tasks[t]) − widen(base)) over the stored words of N tasks; without a base when it is null.
/// Each product and sum rounds, in task order. Returns the largest magnitude bits of the sum: NaN and infinity in an input
/// cannot but reach it.
template <storage_element T, std::size_t N, bool Difference>
TASKVEC_NOINLINE std::uint32_t add_stored(
    const storage_word<T>* const* tasks, const storage_word<T>* TASKVEC_RESTRICT base, const float* weights, float* TASKVEC_RESTRICT sum, std::size_t n)
{
    TASKVEC_STRICT_FP
    const storage_word<T>* x[N];
    float w[N];
    for (std::size_t t = 0; t < N; ++t) {
        x[t] = tasks[t];
        w[t] = weights[t];
    }
    std::int32_t top = 0;
    for (std::size_t begin = 0; begin < n; begin += fetch_group) {
        const std::size_t end = begin + fetch_group < n ? begin + fetch_group : n;
        for (std::size_t t = 0; t < N; ++t) { fetch_ahead(x[t] + begin); }
        if constexpr (Difference) { fetch_ahead(base + begin); }
        for (std::size_t i = begin; i < end; ++i) {
            float s = sum[i];
#pragma GCC unroll 4
            for (std::size_t t = 0; t < N; ++t) {
                float value = widen_word<float, T>(x[t][i]);
                if constexpr (Difference) { value = value - widen_word<float, T>(base[i]); }
                const float product = w[t] * value;
                s = s + product;
            }
            sum[i] = s;
            const std::int32_t magnitude = static_cast<std::int32_t>(magnitude_bits(s));
            top = magnitude > top ? magnitude : top;
        }
    }
    return static_cast<std::uint32_t>(top);
}

/// x = base + lambda · x
template <arithmetic_element A>
TASKVEC_NOINLINE void add_scaled(A* TASKVEC_RESTRICT x, const A* TASKVEC_RESTRICT base, A lambda, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A product = lambda * x[i];
        x[i] = base[i] + product;
    }
}

/// out = −x
template <arithmetic_element A>
TASKVEC_NOINLINE void negate(const A* TASKVEC_RESTRICT x, A* TASKVEC_RESTRICT out, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) { out[i] = -x[i]; }
}

/// x = factor · x
template <arithmetic_element A>
TASKVEC_NOINLINE void scale(A* TASKVEC_RESTRICT x, A factor, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) { x[i] = factor * x[i]; }
}

/// x = x / divisor. A divisor whose inverse is exact (a power of two, in range) is multiplied by: the same bits.
template <arithmetic_element A>
TASKVEC_NOINLINE void divide(A* TASKVEC_RESTRICT x, A divisor, std::size_t n)
{
    const A inverse = A{1} / divisor;
    constexpr bits_type<A> mantissa = static_cast<bits_type<A>>(~(sign_mask<A> | exponent_mask<A>));
    if ((reinterpret_bits<bits_type<A>>(divisor) & mantissa) == 0 && (reinterpret_bits<bits_type<A>>(inverse) & mantissa) == 0 && inverse * divisor == A{1}) {
        scale(x, inverse, n);
        return;
    }
    for (std::size_t i = 0; i < n; ++i) { x[i] = x[i] / divisor; }
}

TASKVEC_KERNELS_END

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
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)), b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 16)),
                      c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 32)), d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + 48));
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
