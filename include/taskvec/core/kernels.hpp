// The CPU's elementwise kernels: flat loops over one block, each a function of its own.
// SPDX-License-Identifier: Apache-2.0
//
// A block is a few thousand elements: small enough that its rows stay in the first cache levels, large enough that a
// call costs nothing. Every kernel takes restrict pointers, writes one row and reads few, so that the vectoriser sees
// one simple loop (see docs/design.md, "The shape of the loops"). No kernel fuses a multiply with an add.
#pragma once

#include <taskvec/core/storage.hpp>

#include <algorithm>
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

/// Elements between two calls of fetch_ahead() in a kernel that works a row off in runs, and how many bytes ahead
/// fetches reach. A kernel that does much between two loads asks for its next lines itself: so much work hides what is
/// still to be loaded from the processor.
inline constexpr std::size_t fetch_group = 128, fetch_distance = 4096;

/// Asks for the lines of `count` words that lie fetch_distance bytes ahead. Never faults. Always inlined: g++ takes a
/// call of a function that does nothing but prefetch for one without effect, and leaves it out.
template <std::size_t count = fetch_group, class Word>
[[gnu::always_inline]] inline void fetch_ahead(const Word* words) noexcept
{
    const auto place =
        reinterpret_cast<std::uintptr_t>(words) + fetch_distance; // a number: most lie outside the words' array
#pragma GCC unroll 16
    for (std::size_t line = 0; line < count * sizeof(Word); line += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(place + line), 0, 3);
    }
}

TASKVEC_KERNELS_BEGIN

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
TASKVEC_NOINLINE bits_type<A> subtract(
    const storage_word<T>* TASKVEC_RESTRICT x, const A* TASKVEC_RESTRICT base, A* TASKVEC_RESTRICT out, std::size_t n)
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

/// Whether some entry is below `floor`.
template <arithmetic_element A>
TASKVEC_NOINLINE bool any_below(const A* TASKVEC_RESTRICT x, A floor, std::size_t n)
{
    bits_type<A> found = 0;
    for (std::size_t i = 0; i < n; ++i) { found |= static_cast<bits_type<A>>(x[i] < floor); }
    return found != 0;
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

/// How a fused kernel walks stored words: in steps of 32 bits, one f32 or two bf16, whose halves come apart and
/// together again by shifts and masks alone. step_word reads at any address that suits T.
template <storage_element T>
inline constexpr std::size_t step_width = 4 / sizeof(storage_word<T>);
using step_word = std::uint32_t __attribute__((aligned(2), may_alias));

/// Element `lane` of a step.
template <storage_element T>
[[nodiscard]] inline float step_value(std::uint32_t step, std::size_t lane) noexcept
{
    return reinterpret_bits<float>(sizeof(T) == 4 ? step : lane == 0 ? step << 16 : step & 0xffff0000u);
}
/// Element `lane` rounded to T, in its place in a step; the other bits are 0. Infinities and finite values, and NaN as
/// arithmetic makes it.
template <storage_element T>
[[nodiscard]] inline std::uint32_t step_of_finite(float value, std::size_t lane) noexcept
{
    const auto word = reinterpret_bits<std::uint32_t>(value);
    if constexpr (sizeof(T) == 4) { return word; }
    else {
        const std::uint32_t rounded = word + 0x7fffu + ((word >> 16) & 1u);
        return lane == 0 ? rounded >> 16 : rounded & 0xffff0000u;
    }
}
/// The same for any value.
template <storage_element T>
[[nodiscard]] inline std::uint32_t step_of(float value, std::size_t lane) noexcept
{
    if constexpr (sizeof(T) == 4) { return reinterpret_bits<std::uint32_t>(value); }
    else {
        return static_cast<std::uint32_t>(f32_to_bf16(value)) << (16 * lane);
    }
}

/// Steps that a fused kernel takes of every stream in turn: few enough that its rows stay in the first-level cache.
/// They come in strips of one line of each stream.
inline constexpr std::size_t group_steps = 256, strip_steps = 16;
/// Steps in whole strips.
[[nodiscard]] inline constexpr std::size_t whole_strips(std::size_t steps) noexcept
{
    return (steps + strip_steps - 1) / strip_steps * strip_steps;
}

/// sums[lane][i] += Σ weights[t] · (tasks[t] − base) over the steps of N tasks; without a base when Difference is
/// false. Each product and sum rounds, in task order. sums: step_width rows of group_steps.
template <storage_element T, std::size_t N, bool Difference>
TASKVEC_NOINLINE void add_stored(const step_word* const* tasks, const step_word* TASKVEC_RESTRICT base,
    const float* weights, float* TASKVEC_RESTRICT sums, std::size_t n)
{
    TASKVEC_STRICT_FP
    constexpr std::size_t width = step_width<T>;
    const step_word* x[N];
    float w[N];
    for (std::size_t t = 0; t < N; ++t) {
        x[t] = tasks[t];
        w[t] = weights[t];
    }
    for (std::size_t i = 0; i < n; ++i) {
        float s[width], origin[width];
        for (std::size_t lane = 0; lane < width; ++lane) {
            s[lane] = sums[lane * group_steps + i];
            if constexpr (Difference) { origin[lane] = step_value<T>(base[i], lane); }
        }
#pragma GCC unroll 8
        for (std::size_t t = 0; t < N; ++t) {
            const std::uint32_t step = x[t][i];
#pragma GCC unroll 2
            for (std::size_t lane = 0; lane < width; ++lane) {
                float value = step_value<T>(step, lane);
                if constexpr (Difference) { value = value - origin[lane]; }
                const float product = w[t] * value;
                s[lane] = s[lane] + product;
            }
        }
        for (std::size_t lane = 0; lane < width; ++lane) { sums[lane * group_steps + i] = s[lane]; }
    }
}

/// out = base + factor · sum, or sum / factor when Difference is false. Returns the largest magnitude bits of the sums:
/// NaN and infinity in an input cannot but reach them.
template <storage_element T, bool Difference>
TASKVEC_NOINLINE std::uint32_t finish_stored(const float* TASKVEC_RESTRICT sums, const step_word* TASKVEC_RESTRICT base,
    float factor, std::uint32_t* TASKVEC_RESTRICT out, std::size_t n)
{
    TASKVEC_STRICT_FP
    std::int32_t top = 0;
    for (std::size_t i = 0; i < n; ++i) {
        std::uint32_t step = 0;
#pragma GCC unroll 2
        for (std::size_t lane = 0; lane < step_width<T>; ++lane) {
            const float sum = sums[lane * group_steps + i];
            const std::int32_t magnitude = static_cast<std::int32_t>(magnitude_bits(sum));
            top = magnitude > top ? magnitude : top;
            float result;
            if constexpr (Difference) {
                const float change = factor * sum;
                result = step_value<T>(base[i], lane) + change;
            }
            else {
                result = sum / factor;
            }
            step |= step_of<T>(result, lane);
        }
        out[i] = step;
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
    if ((reinterpret_bits<bits_type<A>>(divisor) & mantissa) == 0
        && (reinterpret_bits<bits_type<A>>(inverse) & mantissa) == 0 && inverse * divisor == A{1}) {
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

/// Where a fused kernel puts the stored words of T that it makes, and whether past the cache.
template <storage_element T>
struct stored_output {
    storage_word<T>* words = nullptr;
    bool stream = false;

    void put(std::size_t at, const void* from, std::size_t count) const
    {
        if (stream) { stream_copy(words + at, from, count * sizeof(T)); }
        else {
            std::memcpy(words + at, from, count * sizeof(T));
        }
    }
};

/// Calls run(step pointers of the tasks, step pointer of the base, first element, steps) for groups of at most
/// group_steps steps of n stored words. The last steps, where they do not fill a strip, come from a copy that zeros
/// fill up to whole strips: so a kernel may work off whole_strips(steps), and bf16 may be odd in number.
template <storage_element T, std::size_t most, class Run>
void for_each_group(
    const storage_word<T>* const* tasks, std::size_t count, const storage_word<T>* base, std::size_t n, Run&& run)
{
    constexpr std::size_t width = step_width<T>, group = group_steps * width, strip = strip_steps * width;
    const step_word* from[most]{};
    const std::size_t whole = n - n % strip;
    for (std::size_t begin = 0; begin < whole; begin += group) {
        for (std::size_t t = 0; t < count; ++t) { from[t] = reinterpret_cast<const step_word*>(tasks[t] + begin); }
        run(static_cast<const step_word* const*>(from),
            base ? reinterpret_cast<const step_word*>(base + begin) : nullptr, begin,
            (begin + group < whole ? group : whole - begin) / width);
    }
    if (whole == n) { return; }
    step_word last[most + 1][strip_steps]{};
    for (std::size_t t = 0; t < count; ++t) {
        std::memcpy(last[t], tasks[t] + whole, (n - whole) * sizeof(T));
        from[t] = last[t];
    }
    if (base) { std::memcpy(last[most], base + whole, (n - whole) * sizeof(T)); }
    run(static_cast<const step_word* const*>(from), base ? last[most] : nullptr, whole,
        (n - whole + width - 1) / width);
}

/// Makes non-temporal stores visible to other threads; called once after a run of stream_copy().
inline void stream_fence() noexcept
{
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

} // namespace taskvec::inline TASKVEC_ABI::kernels
