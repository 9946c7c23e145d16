// The CPU's elementwise kernels: over rows of one block, each written once over packs.
// SPDX-License-Identifier: Apache-2.0
//
// A block is a few thousand elements: small enough that its rows stay in the first cache levels, large enough that a
// call costs nothing. Every kernel reads few rows and writes one; it is compiled for each instruction set and chosen
// at run time (core/instruction_set.hpp), so that no flag is needed. No kernel fuses a multiply with an add.
#pragma once

#include <taskvec/core/instruction_set.hpp>
#include <taskvec/core/stored_pack.hpp>

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

#if TASKVEC_VECTORS()
#if defined(__x86_64__) && !defined(__clang__) // g++ 12 would convert halves, and put them together
#define TASKVEC_WIDENS_AT_ONCE 1
#else
#define TASKVEC_WIDENS_AT_ONCE 0
#endif
/// 16-bit codes in words of 32 bits, from memory.
template <int bytes>
TASKVEC_INLINE void widen_lanes(const std::uint16_t* from, pack_words<float, bytes>& wide) noexcept
{
    const auto& codes =
        *reinterpret_cast<const typename taskvec::detail::vector_of<std::uint16_t, bytes / 2>::anywhere*>(from);
    if constexpr (TASKVEC_WIDENS_AT_ONCE && bytes > 16) { asm("vpmovzxwd %1, %0" : "=v"(wide.lanes) : "m"(codes)); }
    else { // the baseline has none
        wide.lanes = __builtin_convertvector(codes, decltype(wide.lanes));
    }
}
/// Floats as doubles, from memory.
template <int bytes>
TASKVEC_INLINE void widen_lanes(const float* from, pack<double, bytes>& wide) noexcept
{
    const auto& numbers =
        *reinterpret_cast<const typename taskvec::detail::vector_of<float, bytes / 2>::anywhere*>(from);
    if constexpr (TASKVEC_WIDENS_AT_ONCE && bytes > 16) { asm("vcvtps2pd %1, %0" : "=v"(wide.lanes) : "m"(numbers)); }
    else if constexpr (TASKVEC_WIDENS_AT_ONCE) {
        asm("cvtps2pd %1, %0" : "=x"(wide.lanes) : "m"(numbers));
    }
    else {
        wide.lanes = __builtin_convertvector(numbers, decltype(wide.lanes));
    }
}
#undef TASKVEC_WIDENS_AT_ONCE
#endif

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
        pack_words<A, bytes> words;
        widen_lanes(from, words);
        return pack_conversion<T>::widen(words);
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
        pack<double, bytes> wide;
        widen_lanes(from, wide);
        return wide;
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
