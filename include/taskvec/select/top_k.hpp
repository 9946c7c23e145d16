// Exact top-k by magnitude, over one tensor or a whole model, in constant memory.
// SPDX-License-Identifier: Apache-2.0
//
// Every task vector has a threshold {magnitude, equal_end}: an entry is kept when its magnitude is larger, or equal and
// its place comes before equal_end. So exactly k entries are kept, among equal magnitudes those of lowest index, and
// whoever processes an entry later needs nothing but its value and its place.
//
// The k-th magnitude is found on the bits of |x|, never by a sort: a sample brackets it, one walk over the data counts
// what lies above the bracket and collects what lies inside; an answer outside the bracket, or too much inside, narrows
// the bracket and walks again; what sampling cannot narrow, a histogram does.
#pragma once

#include <taskvec/core/random.hpp>
#include <taskvec/models/block.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace taskvec::inline TASKVEC_ABI {

/// Which entries of a task vector are kept: those with bits of |x| above `magnitude`, and those equal to it whose place
/// in the scope comes before `equal_end`.
template <arithmetic_element A>
struct top_k_threshold {
    bits_type<A> magnitude = 0;
    std::uint64_t equal_end = std::numeric_limits<std::uint64_t>::max();

    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr bool keeps(A value, std::uint64_t place) const noexcept
    {
        const bits_type<A> bits = magnitude_bits(value);
        return bits > magnitude || (bits == magnitude && place < equal_end);
    }
    friend bool operator==(const top_k_threshold&, const top_k_threshold&) = default;
};

/// k(n) = floor(density · n) in double, at least 1 when n > 0. Errors: invalid_argument unless 0 < density ≤ 1.
[[nodiscard]] inline std::uint64_t top_k_count(double density, std::uint64_t n)
{
    if (!(density > 0.0 && density <= 1.0)) {
        raise<invalid_argument>(message("density is ", density, "; expected a share in (0, 1], such as 0.2 for 20%"));
    }
    if (n == 0) { return 0; }
    return std::max<std::uint64_t>(1, static_cast<std::uint64_t>(std::floor(density * static_cast<double>(n))));
}

/// The threshold on f32 values that selects what an f64 threshold selects (f32 values are exact in f64).
template <arithmetic_element To, arithmetic_element From>
[[nodiscard]] top_k_threshold<To> threshold_as(const top_k_threshold<From>& threshold) noexcept
{
    if constexpr (std::same_as<To, From>) { return threshold; }
    else {
        static_assert(std::same_as<To, float>, "a threshold on f32 magnitudes says nothing about f64 ones");
        const double exact = std::bit_cast<double>(threshold.magnitude);
        float below = static_cast<float>(exact);
        if (static_cast<double>(below) > exact) {
            below = std::bit_cast<float>(std::bit_cast<std::uint32_t>(below) - 1);
        }
        if (static_cast<double>(below) == exact || std::isnan(exact)) {
            return {magnitude_bits(below), threshold.equal_end};
        }
        return {magnitude_bits(below), 0}; // between two floats: only larger ones are kept
    }
}

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Elements that are counted together: a run without anything inside the bracket is not looked at again.
inline constexpr std::size_t count_group = 64;

/// Counts magnitudes above `high`, and for each group of 64 those in [low, high] (into `inside`). `largest` receives
/// the largest magnitude bits.
template <arithmetic_element A>
TASKVEC_NOINLINE std::uint32_t count_groups(const A* TASKVEC_RESTRICT x, std::size_t n, bits_type<A> low,
    bits_type<A> high, std::uint8_t* TASKVEC_RESTRICT inside, bits_type<A>& largest)
{
    using word = std::make_signed_t<bits_type<A>>; // magnitudes have no sign bit: signed compares are the cheap ones
    const word lower = static_cast<word>(low), upper = static_cast<word>(high);
    word total = 0, top = 0;
    for (std::size_t begin = 0; begin < n; begin += count_group) {
        const std::size_t length = n - begin < count_group ? n - begin : count_group;
        fetch_ahead<count_group>(x + begin);
        word above = 0, reached = 0;
        for (std::size_t i = 0; i < length; ++i) {
            const word magnitude = static_cast<word>(magnitude_bits(x[begin + i]));
            above += magnitude > upper;
            reached += magnitude >= lower;
            top = magnitude > top ? magnitude : top;
        }
        total += above;
        inside[begin / count_group] = static_cast<std::uint8_t>(reached - above);
    }
    largest = static_cast<bits_type<A>>(top);
    return static_cast<std::uint32_t>(total);
}

/// Appends the magnitudes in [low, high] to `out` (room for n), in order; returns how many.
template <arithmetic_element A>
TASKVEC_NOINLINE std::size_t collect(
    const A* TASKVEC_RESTRICT x, std::size_t n, bits_type<A> low, bits_type<A> high, bits_type<A>* TASKVEC_RESTRICT out)
{
    std::size_t count = 0, i = 0;
#if defined(__AVX512F__)
    if constexpr (std::same_as<A, float>) { // the compiler does not find this instruction by itself
        const __m512i clear = _mm512_set1_epi32(0x7fffffff), lower = _mm512_set1_epi32(static_cast<int>(low)),
                      upper = _mm512_set1_epi32(static_cast<int>(high));
        for (; i + 16 <= n; i += 16) {
            const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(x + i), clear);
            const __mmask16 hit = _mm512_cmpge_epi32_mask(magnitude, lower) & _mm512_cmple_epi32_mask(magnitude, upper);
            _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(hit, magnitude));
            count += static_cast<std::size_t>(__builtin_popcount(hit));
        }
    }
#endif
    for (; i < n; ++i) {
        const bits_type<A> magnitude = magnitude_bits(x[i]);
        out[count] = magnitude;
        count += static_cast<std::size_t>(magnitude >= low) & static_cast<std::size_t>(magnitude <= high);
    }
    return count;
}

/// What a look at stored words finds: magnitudes above a bracket and inside it, and the largest magnitude bits.
struct magnitude_counts {
    std::uint32_t above = 0, inside = 0, largest = 0;
};

/// Counts the magnitudes of x − base (of x when Difference is false) above `high` and in [low, high], over n steps of
/// stored words.
template <storage_element T, bool Difference>
TASKVEC_NOINLINE void count_stored(const step_word* TASKVEC_RESTRICT x, const step_word* TASKVEC_RESTRICT base,
    std::size_t n, std::uint32_t low, std::uint32_t high, magnitude_counts& counts)
{
    TASKVEC_STRICT_FP
    const std::int32_t lower = static_cast<std::int32_t>(low), upper = static_cast<std::int32_t>(high);
    std::int32_t above = 0, reached = 0, top = 0;
    for (std::size_t i = 0; i < n; ++i) {
#pragma GCC unroll 2
        for (std::size_t lane = 0; lane < step_width<T>; ++lane) {
            float value = step_value<T>(x[i], lane);
            if constexpr (Difference) { value = value - step_value<T>(base[i], lane); }
            const std::int32_t magnitude = static_cast<std::int32_t>(magnitude_bits(value));
            above += magnitude > upper ? 1 : 0;
            reached += magnitude >= lower ? 1 : 0;
            top = magnitude > top ? magnitude : top;
        }
    }
    counts.above += static_cast<std::uint32_t>(above);
    counts.inside += static_cast<std::uint32_t>(reached - above);
    counts.largest =
        counts.largest < static_cast<std::uint32_t>(top) ? static_cast<std::uint32_t>(top) : counts.largest;
}

#if defined(__AVX512F__)
/// count_stored() that also appends the magnitudes in [low, high] to `out`, from out[counts.inside] on and in no
/// particular order; out has room for 16 more than there are.
template <storage_element T, bool Difference>
TASKVEC_NOINLINE void collect_stored(const step_word* TASKVEC_RESTRICT x, const step_word* TASKVEC_RESTRICT base,
    std::size_t n, std::uint32_t low, std::uint32_t high, std::uint32_t* TASKVEC_RESTRICT out, magnitude_counts& counts)
{
    const __m512i clear = _mm512_set1_epi32(0x7fffffff), lower = _mm512_set1_epi32(static_cast<int>(low)),
                  upper = _mm512_set1_epi32(static_cast<int>(high)),
                  second = _mm512_set1_epi32(static_cast<int>(0xffff0000u)), one = _mm512_set1_epi32(1);
    const auto value = [&](__m512i steps, std::size_t lane) {
        return sizeof(T) == 4 ? steps : lane == 0 ? _mm512_slli_epi32(steps, 16) : _mm512_and_si512(steps, second);
    };
    __m512i top = _mm512_setzero_si512(), reached_count = top; // of each lane
    const std::size_t begin = counts.inside;
    std::size_t inside = begin;
    const auto take = [&](__mmask16 there, __m512i steps, __m512i origin) {
#pragma GCC unroll 2
        for (std::size_t lane = 0; lane < step_width<T>; ++lane) {
            __m512i found = value(steps, lane);
            if constexpr (Difference) {
                found = _mm512_castps_si512(
                    _mm512_sub_ps(_mm512_castsi512_ps(found), _mm512_castsi512_ps(value(origin, lane))));
            }
            const __m512i magnitude = _mm512_and_si512(found, clear);
            top = _mm512_max_epi32(top, magnitude);
            const __mmask16 reached = _mm512_mask_cmpge_epi32_mask(there, magnitude, lower),
                            hit = _mm512_mask_cmple_epi32_mask(reached, magnitude, upper);
            reached_count = _mm512_mask_add_epi32(reached_count, reached, reached_count, one);
            _mm512_storeu_si512(out + inside, _mm512_maskz_compress_epi32(hit, magnitude));
            inside += static_cast<std::size_t>(__builtin_popcount(hit));
        }
    };
    std::size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        take(0xffff, _mm512_loadu_si512(x + i), Difference ? _mm512_loadu_si512(base + i) : __m512i{});
    }
    if (i < n) {
        const auto there = static_cast<__mmask16>((1u << (n - i)) - 1u);
        take(there, _mm512_maskz_loadu_epi32(there, x + i),
            Difference ? _mm512_maskz_loadu_epi32(there, base + i) : __m512i{});
    }
    counts.inside = static_cast<std::uint32_t>(inside);
    counts.above +=
        static_cast<std::uint32_t>(_mm512_reduce_add_epi32(reached_count)) - static_cast<std::uint32_t>(inside - begin);
    const auto largest = static_cast<std::uint32_t>(_mm512_reduce_max_epi32(top));
    counts.largest = counts.largest < largest ? largest : counts.largest;
}
#endif

/// Zeroes the entries whose magnitude is below `least`.
template <arithmetic_element A>
TASKVEC_NOINLINE void keep_at_least(A* TASKVEC_RESTRICT x, std::size_t n, bits_type<A> least)
{
    using word = std::make_signed_t<bits_type<A>>;
    const word bound = static_cast<word>(least);
    for (std::size_t i = 0; i < n; ++i) { x[i] = static_cast<word>(magnitude_bits(x[i])) >= bound ? x[i] : A{0}; }
}

TASKVEC_KERNELS_END

/// Zeroes the entries of a row that a threshold drops; x[0] has place `place`. Kept entries are unchanged.
template <arithmetic_element A>
void trim(A* x, std::size_t n, std::uint64_t place, const top_k_threshold<A>& threshold)
{
    const std::size_t equal = threshold.equal_end > place
        ? static_cast<std::size_t>(std::min<std::uint64_t>(threshold.equal_end - place, n))
        : 0;
    if (equal > 0 && threshold.magnitude > 0) { keep_at_least(x, equal, threshold.magnitude); }
    if (equal < n) { keep_at_least(x + equal, n - equal, threshold.magnitude + 1); }
}

} // namespace kernels

namespace detail {

/// Entries of a list by their rank, the largest first, for lists that are asked a few times: a histogram tells the bin
/// of a rank, and only that bin's entries are ordered. All entries lie in [low, high].
template <std::unsigned_integral Bits>
class ranking {
public:
    ranking(std::span<const Bits> values, Bits low, Bits high)
        : values_(values)
        , low_(low)
        , shift_(static_cast<unsigned>(
              std::max(0, static_cast<int>(std::bit_width(static_cast<Bits>(high - low))) - bin_bits)))
        , counts_(std::size_t{1} << bin_bits, 0)
    {
        for (const Bits value : values) { ++counts_[bin_of(value)]; }
    }
    /// The entry of rank `rank` < number of entries; rank 0 is the largest.
    [[nodiscard]] Bits operator[](std::size_t rank)
    {
        std::size_t bin = counts_.size() - 1;
        while (counts_[bin] <= rank) { rank -= counts_[bin--]; }
        members_.clear();
        for (const Bits value : values_) {
            if (bin_of(value) == bin) { members_.push_back(value); }
        }
        const auto place = members_.begin() + static_cast<std::ptrdiff_t>(rank);
        std::nth_element(members_.begin(), place, members_.end(), std::greater<>());
        return *place;
    }

private:
    static constexpr int bin_bits = 11;
    [[nodiscard]] std::size_t bin_of(Bits value) const noexcept
    {
        return static_cast<std::size_t>((value - low_) >> shift_);
    }

    std::span<const Bits> values_;
    Bits low_;
    unsigned shift_;
    std::vector<std::size_t> counts_;
    std::vector<Bits> members_;
};

/// Finds the thresholds of several task vectors ("channels") over a range of chunks in common walks.
template <arithmetic_element A>
class top_k_search {
    using bits = bits_type<A>;
    static constexpr bits highest = static_cast<bits>(~sign_mask<A>);
    static constexpr std::uint64_t all = std::numeric_limits<std::uint64_t>::max();

    // What is known of a channel: the answer lies in [low, high], `above` entries lie above it and `inside` within.
    struct channel {
        std::uint64_t k = 0, above = 0, inside = 0;
        bits low = 0, high = highest;
        bool done = false;
        int sampled_rounds = 0;
        top_k_threshold<A> threshold{};
    };
    // What a walk tries: the pivots, and what it saw of them.
    struct attempt {
        bits low = 0, high = 0;
        bool active = false, collecting = false, counting_bins = false;
        unsigned shift = 0;
        std::uint64_t above = 0, inside = 0;
    };
    struct segment {
        std::size_t chunk = 0;
        std::size_t begin = 0, end = 0;
    };
    struct collected {
        std::uint64_t above = 0, inside = 0;
        std::vector<bits> values;
        std::vector<segment> segments;
        std::vector<std::uint64_t> bins;
        bool overflow = false;
    };
    static constexpr unsigned bin_bits = 11;

public:
    top_k_search(const cpu& policy, const aligned_models& models, chunk_range range, std::size_t capacity)
        : policy_(policy)
        , models_(models)
        , range_(range)
        , capacity_(capacity)
        , workspaces_(make_workspaces(policy, models, range.last - range.first, 1))
    {
        for (std::size_t c = range.first; c < range.last; ++c) { elements_ += models.chunks()[c].size; }
        begin_ = range.first < range.last ? place_of(range.first) : 0;
    }

    /// counts[t] of task vector t are kept. `walks` receives how often the data were read from end to end.
    std::vector<top_k_threshold<A>> run(std::span<const std::uint64_t> counts, unsigned* walks)
    {
        channels_.resize(counts.size());
        for (std::size_t t = 0; t < counts.size(); ++t) {
            auto& c = channels_[t];
            c.k = counts[t];
            c.inside = elements_;
            c.done = c.k >= elements_; // everything is kept
        }
        walks_ = 0;
        while (!std::all_of(channels_.begin(), channels_.end(), [](const channel& c) { return c.done; })) { round(); }
        if (walks) { *walks = walks_; }
        std::vector<top_k_threshold<A>> thresholds;
        for (const auto& c : channels_) { thresholds.push_back(c.threshold); }
        return thresholds;
    }

private:
    [[nodiscard]] std::uint64_t place_of(std::size_t chunk) const
    {
        const auto& piece = models_.chunks()[chunk];
        return models_.tensors()[piece.tensor].position + piece.offset;
    }

    void round()
    {
        std::vector<attempt> attempts(channels_.size());
        auto samples = sample();
        for (std::size_t t = 0; t < channels_.size(); ++t) {
            if (!channels_[t].done) { plan(channels_[t], attempts[t], samples[t]); }
        }
        std::vector<std::vector<collected>> seen(workspaces_.size(), std::vector<collected>(channels_.size()));
        std::vector<std::vector<std::uint32_t>> inside_of(channels_.size());
        for (std::size_t t = 0; t < channels_.size(); ++t) {
            if (attempts[t].active) { inside_of[t].assign(range_.last - range_.first, 0); }
        }
        walk(attempts, seen, inside_of);
        ++walks_;
        for (std::size_t t = 0; t < channels_.size(); ++t) {
            if (attempts[t].active) { learn(t, attempts[t], seen, inside_of[t]); }
        }
    }

    /// Magnitudes of entries at places spread over the scope, those inside each channel's bracket.
    std::vector<std::vector<bits>> sample()
    {
        constexpr std::size_t run = 32;
        std::vector<std::vector<bits>> samples(channels_.size());
        const std::uint64_t wanted = std::clamp<std::uint64_t>(elements_ / 512, 1024, 131072), runs = wanted / run;
        bool worth = false;
        for (const auto& c : channels_) {
            worth = worth || (!c.done && c.inside > capacity_ / 16 && c.sampled_rounds < 3);
        }
        if (!worth || elements_ < 8 * wanted) { return samples; }
        const random_stream places(0x746f702d6bull, static_cast<std::uint32_t>(walks_));
        for (std::uint64_t r = 0; r < runs; ++r) {
            const std::uint64_t stratum = elements_ / runs;
            std::uint64_t place = begin_ + r * stratum + places.word(r) % stratum;
            const aligned_tensor& tensor = models_.tensors()[models_.tensor_at(place)];
            const std::uint64_t offset = place - tensor.position;
            const std::size_t n = static_cast<std::size_t>(std::min<std::uint64_t>(run, tensor.size - offset));
            workspaces_[0].with_block(tensor, [&](auto& rows) {
                rows.open(tensor, offset, n);
                for (std::size_t t = 0; t < channels_.size(); ++t) {
                    const auto& c = channels_[t];
                    if (c.done) { continue; }
                    const auto* const values = rows.delta(t);
                    for (std::size_t i = 0; i < n; ++i) {
                        const bits magnitude = magnitude_bits(static_cast<A>(values[i]));
                        if (magnitude >= c.low && magnitude <= c.high) { samples[t].push_back(magnitude); }
                    }
                }
            });
        }
        return samples;
    }

    /// Chooses what the next walk asks of a channel.
    void plan(channel& c, attempt& a, const std::vector<bits>& sample)
    {
        a = {c.low, c.high, true, false, false, 0, 0, 0};
        if (c.low == c.high) { return; }
        if (c.inside <= capacity_ / 16) {
            a.collecting = true;
            return;
        }
        if (sample.size() >= 64 && c.sampled_rounds < 3) {
            ++c.sampled_rounds;
            const double m = static_cast<double>(sample.size()),
                         share = static_cast<double>(c.k - c.above) / static_cast<double>(c.inside);
            // Neighbours are alike, so the sample's rank is a little less certain than that of independent draws.
            const double margin = 3.0 * std::sqrt(m * share * (1.0 - share)) + 4.0;
            const double first = share * m - margin, last = share * m + margin;
            ranking<bits> ranked(sample, c.low, c.high);
            const auto at = [&](double rank) {
                return ranked[static_cast<std::size_t>(std::min(m - 1, std::max(0.0, rank)))];
            };
            a.high = first < 0 ? c.high : at(first);
            a.low = last >= m ? c.low : at(last);
            // One value that fills the bracket and more is looked at alone: its equals are counted, not collected.
            const bits value = at(share * m);
            if (static_cast<double>(std::count(sample.begin(), sample.end(), value)) > margin) {
                a.low = a.high = value;
            }
            a.collecting = true;
            return;
        }
        a.counting_bins = true;
        unsigned width = 0;
        for (bits rest = c.high - c.low; rest; rest >>= 1) { ++width; }
        a.shift = width > bin_bits ? width - bin_bits : 0;
    }

    void walk(const std::vector<attempt>& attempts, std::vector<std::vector<collected>>& seen,
        std::vector<std::vector<std::uint32_t>>& inside_of)
    {
        const std::size_t count = range_.last - range_.first,
                          share = std::max<std::size_t>(1, capacity_ / workspaces_.size());
        progress_meter meter(policy_, "select", bytes_of(models_, range_));
        for_each_index(policy_, count, [&](std::size_t index, std::size_t worker) {
            const chunk& piece = models_.chunks()[range_.first + index];
            const aligned_tensor& tensor = models_.tensors()[piece.tensor];
            workspaces_[worker].with_block(tensor, [&]<class B>(block<B>& rows) {
                for_each_block_of(rows, piece, [&](block<B>& opened) {
                    for (std::size_t t = 0; t < attempts.size(); ++t) {
                        if (!attempts[t].active) { continue; }
                        if constexpr (std::same_as<A, float> && std::same_as<B, float>) {
                            collected& into = seen[worker][t];
                            if (look_stored<float>(attempts[t], opened, t, into, index, share, inside_of[t])
                                || look_stored<bf16>(attempts[t], opened, t, into, index, share, inside_of[t])) {
                                continue;
                            }
                        }
                        const B* const stored = opened.stored_delta(t); // not read yet: counting does it
                        const B* const values = stored ? stored : opened.delta(t);
                        if constexpr (std::same_as<A, B>) {
                            opened.note(
                                look(attempts[t], values, opened.size(), seen[worker][t], index, share, inside_of[t]));
                        }
                        else {
                            // An f32 tensor beside f64 ones: its magnitudes compare as f64, exactly.
                            std::array<A, block_size> wide;
                            for (std::size_t i = 0; i < opened.size(); ++i) { wide[i] = static_cast<A>(values[i]); }
                            if (stored) { opened.note(kernels::largest_magnitude(stored, opened.size())); }
                            (void)look(
                                attempts[t], wide.data(), opened.size(), seen[worker][t], index, share, inside_of[t]);
                        }
                    }
                });
            });
            if (!meter.advance(models_.bytes(piece))) { raise<cancelled>(); }
        });
    }

    /// look() straight at the stored words of task t, where it and the base (if there is one) are stored as T; false
    /// otherwise, and where entries must be binned, or collected without an instruction for it.
    template <storage_element T>
    static bool look_stored(const attempt& a, block<float>& rows, std::size_t t, collected& into, std::size_t index,
        std::size_t share, std::vector<std::uint32_t>& inside_of)
    {
        const storage_word<T>*x = nullptr, *base = nullptr;
        const bool collecting = a.collecting && a.low != a.high && !into.overflow;
        if (a.counting_bins || !rows.template stored_task<T>(t, base, x)) { return false; }
#if !defined(__AVX512F__)
        if (collecting) { return false; }
#endif
        const auto low = static_cast<std::uint32_t>(a.low), high = static_cast<std::uint32_t>(a.high);
        kernels::magnitude_counts counts;
        std::array<std::uint32_t, block_size + 16> values;
        constexpr std::size_t width = kernels::step_width<T>;
        const auto see = [&](const kernels::step_word* from, const kernels::step_word* origin, std::size_t steps) {
#if defined(__AVX512F__)
            if (collecting) {
                return base ? kernels::collect_stored<T, true>(from, origin, steps, low, high, values.data(), counts)
                            : kernels::collect_stored<T, false>(from, origin, steps, low, high, values.data(), counts);
            }
#endif
            return base ? kernels::count_stored<T, true>(from, origin, steps, low, high, counts)
                        : kernels::count_stored<T, false>(from, origin, steps, low, high, counts);
        };
        kernels::for_each_group<T, 1>(&x, 1, base, rows.size(),
            [&](const kernels::step_word* const* from, const kernels::step_word* origin, std::size_t at,
                std::size_t steps) {
                kernels::fetch_ahead<kernels::group_steps>(*from);
                if (origin && t == 0) {
                    kernels::fetch_ahead<kernels::group_steps>(origin);
                } // the other tasks find the base in the cache
                see(*from, origin, steps);
                // The lane beside the last of an odd number of bf16 holds a 0 that is no entry; it comes last.
                if (at + steps * width > rows.size() && low == 0) { --counts.inside; }
            });
        rows.note(counts.largest);
        into.above += counts.above;
        into.inside += counts.inside;
        inside_of[index] += counts.inside;
        if (collecting && counts.inside > 0) { keep(into, index, share, values.data(), counts.inside); }
        return true;
    }

    /// Appends collected magnitudes of a chunk, or gives up collecting when there is no room.
    template <class Magnitude>
    static void keep(collected& into, std::size_t index, std::size_t share, const Magnitude* values, std::size_t count)
    {
        const std::size_t begin = into.values.size(), end = begin + count;
        if (end > share) {
            into.overflow = true;
            into.values = {};
            into.segments = {};
            return;
        }
        into.values.insert(into.values.end(), values, values + count);
        if (!into.segments.empty() && into.segments.back().chunk == index) { into.segments.back().end = end; }
        else {
            into.segments.push_back({index, begin, end});
        }
    }

    /// Counts a row, and collects or bins what lies inside the bracket. Returns the largest magnitude bits.
    static bits look(const attempt& a, const A* row, std::size_t n, collected& into, std::size_t index,
        std::size_t share, std::vector<std::uint32_t>& inside_of)
    {
        std::array<std::uint8_t, block_size / kernels::count_group> groups;
        bits largest = 0;
        into.above += kernels::count_groups(row, n, a.low, a.high, groups.data(), largest);
        const std::size_t group_count = (n + kernels::count_group - 1) / kernels::count_group;
        std::uint32_t inside = 0;
        for (std::size_t g = 0; g < group_count; ++g) { inside += groups[g]; }
        into.inside += inside;
        inside_of[index] += inside;
        if (inside == 0) { return largest; }
        if (a.counting_bins) {
            if (into.bins.empty()) { into.bins.assign(std::size_t{1} << bin_bits, 0); }
            for (std::size_t i = 0; i < n; ++i) {
                const bits magnitude = magnitude_bits(row[i]);
                if (magnitude >= a.low && magnitude <= a.high) {
                    ++into.bins[static_cast<std::size_t>((magnitude - a.low) >> a.shift)];
                }
            }
        }
        if (!a.collecting || a.low == a.high || into.overflow) { return largest; }
        std::array<bits, block_size + kernels::count_group> values;
        std::size_t count = 0;
        for (std::size_t g = 0; g < group_count; ++g) {
            if (groups[g]) {
                const std::size_t at = g * kernels::count_group;
                count += kernels::collect(
                    row + at, std::min(kernels::count_group, n - at), a.low, a.high, values.data() + count);
            }
        }
        keep(into, index, share, values.data(), count);
        return largest;
    }

    void learn(std::size_t t, attempt& a, std::vector<std::vector<collected>>& seen,
        const std::vector<std::uint32_t>& inside_of)
    {
        channel& c = channels_[t];
        bool overflow = false;
        for (const auto& worker : seen) {
            a.above += worker[t].above;
            a.inside += worker[t].inside;
            overflow = overflow || worker[t].overflow;
        }
        if (c.k <= a.above) { // the answer is above the bracket
            c.low = a.high + 1;
            c.inside = a.above - c.above;
            return;
        }
        if (c.k > a.above + a.inside) { // below it
            c.inside -= a.above + a.inside - c.above;
            c.above = a.above + a.inside;
            c.high = a.low - 1;
            return;
        }
        c = {c.k, a.above, a.inside, a.low, a.high, false, c.sampled_rounds, {}};
        if (c.low == c.high) { finish(t, c.low, inside_of); }
        else if (a.counting_bins) {
            for (std::size_t bin = std::size_t{1} << bin_bits; bin-- > 0;) {
                std::uint64_t count = 0;
                for (const auto& worker : seen) { count += worker[t].bins.empty() ? 0 : worker[t].bins[bin]; }
                if (c.k <= c.above + count) {
                    const bits floor = a.low + (static_cast<bits>(bin) << a.shift);
                    c.low = floor;
                    c.high = std::min<bits>(a.high, floor + ((bits{1} << a.shift) - 1));
                    c.inside = count;
                    return;
                }
                c.above += count;
            }
        }
        else if (!overflow) {
            std::vector<bits> values;
            values.reserve(static_cast<std::size_t>(a.inside));
            for (const auto& worker : seen) {
                values.insert(values.end(), worker[t].values.begin(), worker[t].values.end());
            }
            const bits answer = ranking<bits>(values, a.low, a.high)[static_cast<std::size_t>(c.k - c.above - 1)];
            std::vector<std::uint32_t> equal(range_.last - range_.first, 0);
            for (const auto& worker : seen) {
                for (const auto& [index, begin, end] : worker[t].segments) {
                    for (std::size_t i = begin; i < end; ++i) {
                        equal[index] += worker[t].values[i] == answer;
                        c.above += worker[t].values[i] > answer;
                    }
                }
            }
            finish(t, answer, equal);
        }
    }

    /// The answer is known, c.above entries lie above it and equal[chunk] are equal: finds the place where equals end.
    void finish(std::size_t t, bits answer, const std::vector<std::uint32_t>& equal)
    {
        channel& c = channels_[t];
        c.done = true;
        c.threshold = {answer, all};
        std::uint64_t wanted = c.k - c.above;
        std::size_t index = 0;
        while (index < equal.size() && equal[index] < wanted) { wanted -= equal[index++]; }
        if (index == equal.size()) { return; }
        const chunk& piece = models_.chunks()[range_.first + index];
        workspaces_[0].with_block(models_.tensors()[piece.tensor], [&](auto& rows) {
            for_each_block_of(rows, piece, [&](auto& opened) {
                const auto* const values = opened.delta(t);
                for (std::size_t i = 0; i < opened.size() && wanted > 0; ++i) {
                    if (magnitude_bits(static_cast<A>(values[i])) == answer && --wanted == 0) {
                        c.threshold.equal_end = opened.position() + i + 1;
                    }
                }
            });
        });
    }

    const cpu& policy_;
    const aligned_models& models_;
    chunk_range range_;
    std::size_t capacity_;
    std::vector<workspace> workspaces_;
    std::uint64_t elements_ = 0, begin_ = 0;
    std::vector<channel> channels_;
    unsigned walks_ = 0;
};

} // namespace detail

/// The threshold that keeps the counts[t] largest entries of each task vector τt = θt − θ0 (θt when there is no base)
/// over a range of chunks. Exact; the same bits for any threads, chunk and memory. Magnitudes compare in A: use f64
/// when models.any_wide(). `capacity`: entries that may be collected at a time (4 or 8 bytes each), for each task.
/// `walks`: receives how often the data were read from end to end (1 on smooth data; a few at worst).
/// Errors: nonfinite_error (unless propagation was asked for; NaN then counts as larger than infinity).
///
///     auto thresholds = top_k_thresholds<float>(cpu{}, models, all_chunks(models), counts);
template <arithmetic_element A>
[[nodiscard]] std::vector<top_k_threshold<A>> top_k_thresholds(const cpu& policy, const aligned_models& models,
    chunk_range range, std::span<const std::uint64_t> counts, std::size_t capacity = std::size_t{1} << 22,
    unsigned* walks = nullptr)
{
    return detail::top_k_search<A>(policy, models, range, std::max<std::size_t>(1024, capacity)).run(counts, walks);
}

/// The threshold that keeps the k entries of largest magnitude of a flat view, lowest index first among equals.
/// Bit-exact. Errors: invalid_argument unless 0 < k ≤ n (k = 0 only for n = 0); nonfinite_error. Cost: a little more
/// than one read of x.
///
///     std::vector<float> x = …;
///     auto threshold = top_k(cpu{}, x, 100);
///     bool kept = threshold.keeps(x[7], 7);
template <input_of<cpu> X>
[[nodiscard]] auto top_k(const cpu& policy, const X& x, std::uint64_t k, unsigned* walks = nullptr)
{
    const auto values = as_view(x);
    using A = arithmetic_type<element_of<const X>>;
    if (k > values.size() || (k == 0 && !values.empty())) {
        raise<invalid_argument>(message("k is ", k, " for ", values.size(), " entries; expected 1 to ", values.size()));
    }
    const const_model_ref model = detail::flat_model(values);
    const aligned_models models(nullptr, {&model, 1});
    return top_k_thresholds<A>(policy, models, all_chunks(models), std::array{k}, std::size_t{1} << 22, walks)[0];
}

/// The k-th largest magnitude of a flat view.
template <input_of<cpu> X>
[[nodiscard]] auto kth_magnitude(const cpu& policy, const X& x, std::uint64_t k)
{
    using A = arithmetic_type<element_of<const X>>;
    if (k == 0) { raise<invalid_argument>("k is 0; expected at least 1"); }
    return std::bit_cast<A>(top_k(policy, x, k).magnitude);
}

// On taskvec::gpu these live in <taskvec/device/select.hpp>; without it a call says so.
template <detail::gpu_without_header<detail::gpu_room::select> P, class... Arguments>
auto top_k(const P&, Arguments&&...)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::select>,
        "top_k() on taskvec::gpu: include <taskvec/device/select.hpp>");
}
template <detail::gpu_without_header<detail::gpu_room::select> P, class... Arguments>
auto kth_magnitude(const P&, Arguments&&...)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::select>,
        "kth_magnitude() on taskvec::gpu: include <taskvec/device/select.hpp>");
}

} // namespace taskvec::inline TASKVEC_ABI
