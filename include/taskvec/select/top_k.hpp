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

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/instruction_set.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/core/stored_pack.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/models/block.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory_resource>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which entries of a task vector are kept: those with bits of |x| above `magnitude`, and those equal to it whose place
/// in the scope comes before `equal_end`.
template <arithmetic_element A>
struct top_k_threshold {
    bits_type<A> magnitude = 0; ///< bits of |x|, without the sign
    /// Place in the scope.
    std::uint64_t equal_end = std::numeric_limits<std::uint64_t>::max();

    /// Whether the entry with this value at this place of the scope is kept.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr bool keeps(A value, std::uint64_t place) const noexcept
    {
        const bits_type<A> bits = magnitude_bits(value);
        return bits > magnitude || (bits == magnitude && place < equal_end);
    }
    friend bool operator==(const top_k_threshold&, const top_k_threshold&) = default;
};

/// k(n) = floor(density · n) in double, at least 1 when n > 0, and 0 for a density below 2^-64, of which no model has
/// an entry. Errors: invalid_argument unless 0 < density ≤ 1.
[[nodiscard]] inline std::uint64_t top_k_count(double density, std::uint64_t n)
{
    if (!(density > 0.0 && density <= 1.0)) {
        raise<invalid_argument>(error_code::density_out_of_range,
            message("density is ", density, "; expected a share in (0, 1], such as 0.2 for 20%"));
    }
    if (n == 0 || density < 0x1p-64) { return 0; }
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

/// Consecutive entries whose magnitudes are looked at: those of x − base, of x where there is no base.
template <storage_element T>
struct magnitude_run {
    using bits = bits_type<arithmetic_type<T>>;
    const storage_word<T>*x = nullptr, *base = nullptr;
    std::size_t size = 0; ///< at most a block's
    bits low = 0, high = 0; ///< the bracket
    bits* collected = nullptr; ///< room for `size` magnitudes and a pack; null: they are counted only
};

/// What a look finds: magnitudes above a bracket and inside it, and the largest magnitude bits.
template <arithmetic_element A>
struct magnitude_counts {
    std::uint64_t above = 0, inside = 0;
    bits_type<A> largest = 0;
};

TASKVEC_KERNELS_BEGIN

/// Counts magnitudes above a bracket and inside it, and appends those inside to what is collected, in no particular
/// order.
template <arithmetic_element A, int bytes>
class bracket_counter {
public:
    using words = pack_words<A, bytes>;
    using word = signed_word<A>; // magnitudes have no sign bit: signed compares are the cheap ones

    /// `collected`: room for those inside and a pack; null: they are counted only.
    TASKVEC_INLINE bracket_counter(bits_type<A> low, bits_type<A> high, bits_type<A>* collected)
        : low_(filled_words<words>(static_cast<word>(low)))
        , high_(filled_words<words>(static_cast<word>(high)))
        , out_(reinterpret_cast<word*>(collected))
    { }
    TASKVEC_INLINE void take(const words& magnitude)
    {
        const auto over = magnitude > high_, from_low = magnitude >= low_;
        above_ = added_where(over, above_);
        reached_ = added_where(from_low, reached_);
        top_ = larger(top_, magnitude);
        const auto hit = from_low & ~over;
        if (out_) { out_ += packed_where(hit, magnitude, out_); }
    }
    TASKVEC_INLINE void add_to(magnitude_counts<A>& counts) const
    {
        constexpr int lanes = static_cast<int>(pack_lanes<A, bytes>);
        word over[lanes], from_low[lanes], largest[lanes];
        std::memcpy(over, &above_, sizeof over);
        std::memcpy(from_low, &reached_, sizeof from_low);
        std::memcpy(largest, &top_, sizeof largest);
        for (int lane = 0; lane < lanes; ++lane) {
            counts.above += static_cast<std::uint64_t>(over[lane]);
            counts.inside += static_cast<std::uint64_t>(from_low[lane] - over[lane]);
            const auto found = static_cast<bits_type<A>>(largest[lane]);
            counts.largest = found > counts.largest ? found : counts.largest;
        }
    }

private:
    words low_, high_;
    word* out_;
    words above_{}, reached_{}, top_{};
};

/// Looks at a run, which with vectors is whole lines of 64 bytes.
template <storage_element T, bool difference>
struct look_kernel {
    using number = arithmetic_type<T>;
    static constexpr std::size_t line = 64 / sizeof(T);

    const magnitude_run<T>& run_of;
    magnitude_counts<number>& counts;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        using stored = stored_pack<T, bytes>;
        constexpr std::size_t group = bytes == 0 ? 1 : line;
        const storage_word<T>*const x = run_of.x, *const base = run_of.base;
        const std::size_t n = run_of.size;
        bracket_counter<number, bytes> counter(
            run_of.low, run_of.high, run_of.collected ? run_of.collected + counts.inside : nullptr);
        const auto take = [&](const typename stored::pack_type& value)
                              TASKVEC_BODY { counter.take(magnitude_of(value)); };
        for (std::size_t i = 0; i + group <= n; i += group) {
            if constexpr (bytes > 0) {
                fetch_ahead<line>(x + i);
                if constexpr (difference) { fetch_ahead<line>(base + i); }
            }
            TASKVEC_UNROLL(4)
            for (std::size_t at = i; at < i + group; at += stored::entries) {
                stored entries, origin;
                entries.load(x + at);
                if constexpr (difference) {
                    origin.load(base + at);
                    take(entries.template get<0>() - origin.template get<0>());
                    if constexpr (stored::parts == 2) { take(entries.template get<1>() - origin.template get<1>()); }
                }
                else {
                    take(entries.template get<0>());
                    if constexpr (stored::parts == 2) { take(entries.template get<1>()); }
                }
            }
        }
        counter.add_to(counts);
    }
};

/// Looks at a list of magnitudes.
template <arithmetic_element A>
struct look_again_kernel {
    std::span<const bits_type<A>> list;
    bits_type<A> low, high;
    bits_type<A>* collected;
    magnitude_counts<A>& counts;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t i = 0;
        if constexpr (bytes > 0) { packs_of<bytes>(i); }
        packs_of<0>(i);
    }

private:
    template <int bytes>
    TASKVEC_INLINE void packs_of(std::size_t& i) const
    {
        using words = pack_words<A, bytes>;
        using lanes = typename taskvec::detail::vector_of<signed_word<A>, bytes>::anywhere;
        constexpr std::size_t width = static_cast<std::size_t>(pack_lanes<A, bytes>);
        bracket_counter<A, bytes> counter(low, high, collected ? collected + counts.inside : nullptr);
        for (; i + width <= list.size(); i += width) {
            counter.take(words{*reinterpret_cast<const lanes*>(list.data() + i)});
        }
        counter.add_to(counts);
    }
};

/// Zeroes the entries whose magnitude is below `least`. With vectors the row is whole lines of 64 bytes.
template <arithmetic_element A>
struct keep_kernel {
    A* x;
    std::size_t n;
    bits_type<A> least;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        using stored = stored_pack<A, bytes>;
        using words = typename stored::pack_type::words;
        A* const row = x;
        const std::size_t size = n;
        const words bound = filled_words<words>(static_cast<signed_word<A>>(least));
        for (std::size_t i = 0; i + stored::entries <= size; i += stored::entries) {
            stored entries;
            entries.load(row + i);
            const auto value = entries.template get<0>();
            entries.template put<0>(where(magnitude_of(value) >= bound, value));
            entries.store(row + i);
        }
    }
};

TASKVEC_KERNELS_END

/// Looks at a run of any size.
template <bool difference, storage_element T>
void look(const magnitude_run<T>& run, magnitude_counts<arithmetic_type<T>>& counts)
{
    using kernel = look_kernel<T, difference>;
    magnitude_run<T> part = run;
    part.size = current_instruction_set() == instruction_set::scalar ? 0 : run.size / kernel::line * kernel::line;
    if (part.size > 0) { run_widest(kernel{part, counts}); }
    if (part.size == run.size) { return; }
    part.x += part.size;
    if (part.base) { part.base += part.size; }
    part.size = run.size - part.size;
    run_scalar(kernel{part, counts});
}

/// Looks at a list of magnitudes. `collected`: room for those inside and a pack, or null.
template <arithmetic_element A>
[[nodiscard]] magnitude_counts<A> look_again(
    std::span<const bits_type<A>> list, bits_type<A> low, bits_type<A> high, bits_type<A>* collected = nullptr)
{
    magnitude_counts<A> counts;
    run_widest(look_again_kernel<A>{list, low, high, collected, counts});
    return counts;
}

/// Zeroes the entries of a row whose magnitude is below `least`.
template <arithmetic_element A>
void keep_at_least(A* x, std::size_t n, bits_type<A> least)
{
    constexpr std::size_t line = 64 / sizeof(A);
    const std::size_t whole = current_instruction_set() == instruction_set::scalar ? 0 : n / line * line;
    if (whole > 0) { run_widest(keep_kernel<A>{x, whole, least}); }
    if (whole < n) { run_scalar(keep_kernel<A>{x + whole, n - whole, least}); }
}

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
    ranking(std::span<const Bits> values, Bits low, Bits high, std::pmr::memory_resource* memory)
        : values_(values)
        , low_(low)
        , shift_(static_cast<unsigned>(
              std::max(0, static_cast<int>(std::bit_width(static_cast<Bits>(high - low))) - bin_bits)))
        , counts_(std::size_t{1} << bin_bits, 0, memory)
        , members_(memory)
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
    std::pmr::vector<std::size_t> counts_;
    std::pmr::vector<Bits> members_;
};

/// Where a sample says that the entry lies which a share of all entries is larger than.
template <std::unsigned_integral Bits>
struct sampled_bracket {
    Bits low = 0, high = 0;
    Bits value = 0; ///< the sample's own
    double margin = 0; ///< how many of the sample's ranks it may be off by
};
/// All entries, of the sample too, lie in [low, high].
template <std::unsigned_integral Bits>
[[nodiscard]] sampled_bracket<Bits> bracket_of(
    std::span<const Bits> sample, double share, Bits low, Bits high, std::pmr::memory_resource* memory)
{
    const double m = static_cast<double>(sample.size());
    // Neighbours are alike, so the sample's rank is a little less certain than that of independent draws.
    const double margin = 3.0 * std::sqrt(m * share * (1.0 - share)) + 4.0;
    const double first = share * m - margin, last = share * m + margin;
    ranking<Bits> ranked(sample, low, high, memory);
    const auto at = [&](double rank) { return ranked[static_cast<std::size_t>(std::min(m - 1, std::max(0.0, rank)))]; };
    return {last >= m ? low : at(last), first < 0 ? high : at(first), at(share * m), margin};
}

/// What ranking says of a long list, by looks at it.
template <arithmetic_element A>
[[nodiscard]] bits_type<A> magnitude_of_rank(std::span<const bits_type<A>> list, std::size_t rank, bits_type<A> low,
    bits_type<A> high, std::pmr::memory_resource* memory)
{
    using bits = bits_type<A>;
    constexpr std::size_t short_list = 8192, sampled = 1024;
    if (list.size() > short_list) {
        std::pmr::vector<bits> sample(sampled, memory);
        for (std::size_t i = 0; i < sampled; ++i) { sample[i] = list[i * (list.size() / sampled)]; }
        const auto share = static_cast<double>(rank) / static_cast<double>(list.size());
        const auto bracket = bracket_of<bits>(sample, share, low, high, memory);
        const auto counts = kernels::look_again<A>(list, bracket.low, bracket.high);
        if (counts.above <= rank && rank < counts.above + counts.inside && counts.inside <= list.size() / 2) {
            if (bracket.low == bracket.high) { return bracket.low; }
            std::pmr::vector<bits> inside(static_cast<std::size_t>(counts.inside) + 64 / sizeof(bits), memory);
            (void)kernels::look_again<A>(list, bracket.low, bracket.high, inside.data());
            return magnitude_of_rank<A>(std::span(inside).first(static_cast<std::size_t>(counts.inside)),
                rank - static_cast<std::size_t>(counts.above), bracket.low, bracket.high, memory);
        }
    }
    return ranking<bits>(list, low, high, memory)[rank];
}

/// Finds the thresholds of several task vectors ("channels") over a range of chunks in common walks.
template <arithmetic_element A, class Types = storage_types>
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
        double expected = 0; ///< how many lie inside, as far as is known
    };
    struct segment {
        std::size_t chunk = 0;
        std::size_t begin = 0, end = 0;
    };
    struct collected {
        explicit collected(std::pmr::memory_resource* memory)
            : values(memory)
            , segments(memory)
            , bins(memory)
        { }
        std::uint64_t above = 0, inside = 0;
        std::pmr::vector<bits> values;
        std::pmr::vector<segment> segments;
        std::pmr::vector<std::uint64_t> bins;
        bool overflow = false;
    };
    // What all workers of a walk saw.
    struct seen_of_channels {
        seen_of_channels(
            std::size_t workers, std::size_t channels, std::size_t chunks, std::pmr::memory_resource* memory)
            : by_worker(memory)
            , inside(channels * chunks, 0, memory)
            , channel_count(channels)
            , chunk_count(chunks)
        {
            by_worker.reserve(workers * channels);
            for (std::size_t i = 0; i < workers * channels; ++i) { by_worker.emplace_back(memory); }
        }
        [[nodiscard]] collected& of(std::size_t worker, std::size_t channel) noexcept
        {
            return by_worker[worker * channel_count + channel];
        }
        [[nodiscard]] std::size_t workers() const noexcept { return by_worker.size() / channel_count; }
        /// For each chunk, the entries inside a channel's bracket.
        [[nodiscard]] std::span<std::uint32_t> inside_of(std::size_t channel) noexcept
        {
            return std::span(inside).subspan(channel * chunk_count, chunk_count);
        }
        std::pmr::vector<collected> by_worker; // [worker][channel]
        std::pmr::vector<std::uint32_t> inside; // [channel][chunk]
        std::size_t channel_count, chunk_count;
    };
    static constexpr unsigned bin_bits = 11;

public:
    top_k_search(const cpu& policy, const aligned_models& models, chunk_range range, std::size_t capacity)
        : policy_(policy)
        , models_(models)
        , range_(range)
        , capacity_(capacity)
        , memory_(memory_of(policy))
        , workspaces_(make_workspaces<Types>(policy, models, range.last - range.first, 1))
    {
        for (std::size_t c = range.first; c < range.last; ++c) { elements_ += models.chunks()[c].size; }
        begin_ = range.first < range.last ? place_of(range.first) : 0;
    }

    /// counts[t] of task vector t are kept. `walks` receives how often the data were read from end to end.
    call_vector<top_k_threshold<A>> run(std::span<const std::uint64_t> counts, unsigned* walks)
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
        call_vector<top_k_threshold<A>> thresholds;
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
        call_vector<attempt> attempts(channels_.size());
        auto samples = sample();
        for (std::size_t t = 0; t < channels_.size(); ++t) {
            if (!channels_[t].done) { plan(channels_[t], attempts[t], samples[t]); }
        }
        seen_of_channels seen(workspaces_.size(), channels_.size(), range_.last - range_.first, memory_);
        walk(attempts, seen);
        ++walks_;
        for (std::size_t t = 0; t < channels_.size(); ++t) {
            if (attempts[t].active) { learn(t, attempts[t], seen); }
        }
    }

    /// Magnitudes of entries at places spread over the scope, those inside each channel's bracket.
    std::pmr::vector<std::pmr::vector<bits>> sample()
    {
        constexpr std::size_t run = 32;
        std::pmr::vector<std::pmr::vector<bits>> samples(channels_.size(), memory_); // its elements take it on
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
            with_block_of<Types>(workspaces_[0], tensor, [&](auto& rows) {
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
    void plan(channel& c, attempt& a, std::span<const bits> sample)
    {
        a = {c.low, c.high, true, false, false, 0, 0, 0, static_cast<double>(c.inside)};
        if (c.low == c.high) { return; }
        if (c.inside <= capacity_ / 16) {
            a.collecting = true;
            return;
        }
        if (sample.size() >= 64 && c.sampled_rounds < 3) {
            ++c.sampled_rounds;
            const double share = static_cast<double>(c.k - c.above) / static_cast<double>(c.inside);
            const auto found = bracket_of<bits>(sample, share, c.low, c.high, memory_);
            a.low = found.low;
            a.high = found.high;
            a.collecting = true;
            const auto in_sample = [&](bits low, bits high) {
                return static_cast<double>(kernels::look_again<A>(sample, low, high).inside);
            };
            a.expected = static_cast<double>(c.inside) / static_cast<double>(sample.size()) * in_sample(a.low, a.high);
            // One value that fills the bracket and more, and would not fit, is looked at alone: its equals are counted.
            if (a.expected > static_cast<double>(capacity_) / 2 && in_sample(found.value, found.value) > found.margin) {
                a.low = a.high = found.value;
            }
            return;
        }
        a.counting_bins = true;
        unsigned width = 0;
        for (bits rest = c.high - c.low; rest; rest >>= 1) { ++width; }
        a.shift = width > bin_bits ? width - bin_bits : 0;
    }

    void walk(const call_vector<attempt>& attempts, seen_of_channels& seen)
    {
        const std::size_t count = range_.last - range_.first,
                          share = std::max<std::size_t>(1, capacity_ / workspaces_.size());
        for (std::size_t t = 0; t < attempts.size(); ++t) {
            const attempt& a = attempts[t];
            if (!a.active || !a.collecting || a.low == a.high) { continue; }
            const double each = 1.1 * a.expected / static_cast<double>(seen.workers()) + block_size;
            for (std::size_t w = 0; w < seen.workers(); ++w) {
                seen.of(w, t).values.reserve(static_cast<std::size_t>(std::min(each, static_cast<double>(share))));
            }
        }
        progress_meter meter(policy_, "select", bytes_of(models_, range_));
        for_each_index(policy_, count, [&](std::size_t index, std::size_t worker) {
            const tensor_chunk& piece = models_.chunks()[range_.first + index];
            const aligned_tensor& tensor = models_.tensors()[piece.tensor];
            with_block_of<Types>(workspaces_[worker], tensor, [&]<class B>(row_block<B>& rows) {
                for_each_block_of(rows, piece, [&](row_block<B>& opened) {
                    for (std::size_t t = 0; t < attempts.size(); ++t) {
                        if (!attempts[t].active) { continue; }
                        collected& into = seen.of(worker, t);
                        const std::span<std::uint32_t> inside_of = seen.inside_of(t);
                        if constexpr (std::same_as<A, B>) {
                            if (look_stored(Types{}, attempts[t], opened, t, into, index, share, inside_of)) {
                                continue;
                            }
                            (void)look<A>(
                                attempts[t], opened.delta(t), nullptr, opened.size(), into, index, share, inside_of);
                        }
                        else {
                            // An f32 tensor beside f64 ones: its magnitudes compare as f64, exactly.
                            const B* const values = opened.delta(t);
                            std::array<A, block_size> wide;
                            for (std::size_t i = 0; i < opened.size(); ++i) { wide[i] = static_cast<A>(values[i]); }
                            (void)look<A>(
                                attempts[t], wide.data(), nullptr, opened.size(), into, index, share, inside_of);
                        }
                    }
                });
            });
            if (!meter.advance(models_.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
        });
    }

    /// look() straight at the stored words of task t, where it and the base (if there is one) are stored as the same
    /// type, and aligned; false otherwise.
    template <class... T>
    static bool look_stored(storage_list<T...>, const attempt& a, row_block<A>& rows, std::size_t t, collected& into,
        std::size_t index, std::size_t share, std::span<std::uint32_t> inside_of)
    {
        return (look_stored_as<T>(a, rows, t, into, index, share, inside_of) || ...);
    }
    template <storage_element T>
    static bool look_stored_as(const attempt& a, row_block<A>& rows, std::size_t t, collected& into, std::size_t index,
        std::size_t share, std::span<std::uint32_t> inside_of)
    {
        if constexpr (std::same_as<arithmetic_type<T>, A> && has_pack_conversion<T>) {
            const storage_word<T>*x = nullptr, *base = nullptr;
            if (!rows.template stored_task<T>(t, base, x)) { return false; }
            rows.note(look<T>(a, x, base, rows.size(), into, index, share, inside_of));
            return true;
        }
        else {
            return false;
        }
    }

    /// Appends collected magnitudes of a chunk, or gives up collecting when there is no room.
    template <class Magnitude>
    static void keep(collected& into, std::size_t index, std::size_t share, const Magnitude* values, std::size_t count)
    {
        const std::size_t begin = into.values.size(), end = begin + count;
        if (end > share) {
            into.overflow = true;
            into.values.clear();
            into.values.shrink_to_fit();
            into.segments.clear();
            return;
        }
        into.values.insert(into.values.end(), values, values + count);
        if (!into.segments.empty() && into.segments.back().chunk == index) { into.segments.back().end = end; }
        else {
            into.segments.push_back({index, begin, end});
        }
    }

    /// Counts the magnitudes of x − base (of x where there is no base), and collects or bins what lies inside the
    /// bracket. Returns the largest magnitude bits.
    template <storage_element T>
    static bits look(const attempt& a, const storage_word<T>* x, const storage_word<T>* base, std::size_t n,
        collected& into, std::size_t index, std::size_t share, std::span<std::uint32_t> inside_of)
    {
        const bool collecting = a.collecting && a.low != a.high && !into.overflow;
        std::array<bits, block_size + 64 / sizeof(bits)> values;
        kernels::magnitude_counts<A> counts;
        const kernels::magnitude_run<T> run{
            x, base, n, a.low, a.high, collecting || a.counting_bins ? values.data() : nullptr};
        if (base) { kernels::look<true>(run, counts); }
        else {
            kernels::look<false>(run, counts);
        }
        into.above += counts.above;
        into.inside += counts.inside;
        inside_of[index] += static_cast<std::uint32_t>(counts.inside);
        if (counts.inside == 0) { return counts.largest; }
        const auto inside = static_cast<std::size_t>(counts.inside);
        if (a.counting_bins) {
            if (into.bins.empty()) { into.bins.assign(std::size_t{1} << bin_bits, 0); }
            for (std::size_t i = 0; i < inside; ++i) {
                ++into.bins[static_cast<std::size_t>((values[i] - a.low) >> a.shift)];
            }
        }
        if (collecting) { keep(into, index, share, values.data(), inside); }
        return counts.largest;
    }

    void learn(std::size_t t, attempt& a, seen_of_channels& seen)
    {
        channel& c = channels_[t];
        bool overflow = false;
        for (std::size_t w = 0; w < seen.workers(); ++w) {
            const collected& worker = seen.of(w, t);
            a.above += worker.above;
            a.inside += worker.inside;
            overflow = overflow || worker.overflow;
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
        if (c.low == c.high) { finish(t, c.low, seen.inside_of(t)); }
        else if (a.counting_bins) {
            for (std::size_t bin = std::size_t{1} << bin_bits; bin-- > 0;) {
                std::uint64_t count = 0;
                for (std::size_t w = 0; w < seen.workers(); ++w) {
                    count += seen.of(w, t).bins.empty() ? 0 : seen.of(w, t).bins[bin];
                }
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
            std::pmr::vector<bits> joined(memory_);
            std::span<const bits> values = seen.of(0, t).values;
            if (seen.workers() > 1) {
                joined.reserve(static_cast<std::size_t>(a.inside));
                for (std::size_t w = 0; w < seen.workers(); ++w) {
                    const auto& found = seen.of(w, t).values;
                    joined.insert(joined.end(), found.begin(), found.end());
                }
                values = joined;
            }
            const bits answer =
                magnitude_of_rank<A>(values, static_cast<std::size_t>(c.k - c.above - 1), a.low, a.high, memory_);
            std::pmr::vector<std::uint32_t> equal(range_.last - range_.first, 0, memory_);
            for (std::size_t w = 0; w < seen.workers(); ++w) {
                const collected& worker = seen.of(w, t);
                for (const auto& [index, begin, end] : worker.segments) {
                    const auto counts =
                        kernels::look_again<A>(std::span(worker.values).subspan(begin, end - begin), answer, answer);
                    equal[index] += static_cast<std::uint32_t>(counts.inside);
                    c.above += counts.above;
                }
            }
            finish(t, answer, equal);
        }
    }

    /// The answer is known, c.above entries lie above it and equal[chunk] are equal: finds the place where equals end.
    void finish(std::size_t t, bits answer, std::span<const std::uint32_t> equal)
    {
        channel& c = channels_[t];
        c.done = true;
        c.threshold = {answer, all};
        std::uint64_t wanted = c.k - c.above;
        std::size_t index = 0;
        while (index < equal.size() && equal[index] < wanted) { wanted -= equal[index++]; }
        if (index == equal.size()) { return; }
        const tensor_chunk& piece = models_.chunks()[range_.first + index];
        with_block_of<Types>(workspaces_[0], models_.tensors()[piece.tensor], [&](auto& rows) {
            for_each_block_of(rows, piece, [&](auto& opened) {
                if (wanted == 0) { return; }
                const auto* const values = opened.delta(t);
                if constexpr (std::same_as<std::remove_cvref_t<decltype(*values)>, A>) {
                    kernels::magnitude_counts<A> counts;
                    kernels::look<false>(
                        kernels::magnitude_run<A>{values, nullptr, opened.size(), answer, answer, nullptr}, counts);
                    if (counts.inside < wanted) {
                        wanted -= counts.inside;
                        return;
                    }
                }
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
    std::pmr::memory_resource* memory_;
    std::pmr::vector<block_workspace> workspaces_;
    std::uint64_t elements_ = 0, begin_ = 0;
    call_vector<channel> channels_;
    unsigned walks_ = 0;
};

/// top_k_thresholds(), as a list of the call.
template <arithmetic_element A, class Types>
[[nodiscard]] call_vector<top_k_threshold<A>> found_thresholds(const cpu& policy, const aligned_models& models,
    chunk_range range, std::span<const std::uint64_t> counts, std::size_t capacity, unsigned* walks)
{
    return top_k_search<A, Types>(policy, models, range, std::max<std::size_t>(1024, capacity)).run(counts, walks);
}

} // namespace detail

/// The threshold that keeps the counts[t] largest entries of each task vector τt = θt − θ0 (θt when there is no base)
/// over a range of chunks. Exact; the same bits for any threads, chunk and memory. Magnitudes compare in A: use f64
/// when models.any_wide(). `capacity`: entries that may be collected at a time (4 or 8 bytes each), for each task.
/// `walks`: receives how often the data were read from end to end (1 on smooth data; a few at worst).
/// Errors: nonfinite_error (unless propagation was asked for; NaN then counts as larger than infinity).
///
///     auto thresholds = top_k_thresholds<float>(cpu{}, models, all_chunks(models), counts);
template <arithmetic_element A, class Types = storage_types>
[[nodiscard]] std::vector<top_k_threshold<A>> top_k_thresholds(const cpu& policy, const aligned_models& models,
    chunk_range range, std::span<const std::uint64_t> counts, std::size_t capacity = std::size_t{1} << 22,
    unsigned* walks = nullptr)
{
    const detail::call_memory memory(policy.memory);
    const auto found = detail::found_thresholds<A, Types>(policy, models, range, counts, capacity, walks);
    return {found.begin(), found.end()};
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
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("k is ", k, " for ", values.size(), " entries; expected 1 to ", values.size()));
    }
    const const_model_ref model = detail::flat_model(values);
    const aligned_models models(nullptr, {&model, 1});
    return top_k_thresholds<A, storage_list<element_of<const X>>>(
        policy, models, all_chunks(models), std::array{k}, std::size_t{1} << 22, walks)[0];
}

/// The k-th largest magnitude of a flat view.
template <input_of<cpu> X>
[[nodiscard]] auto kth_magnitude(const cpu& policy, const X& x, std::uint64_t k)
{
    using A = arithmetic_type<element_of<const X>>;
    if (k == 0) { raise<invalid_argument>(error_code::parameter_out_of_range, "k is 0; expected at least 1"); }
    return std::bit_cast<A>(top_k(policy, x, k).magnitude);
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(cpu, top_k, any_arguments, "top_k(policy, x, k) of a flat view, where k counts entries")
TASKVEC_WRONG_CALLS(
    cpu, kth_magnitude, any_arguments, "kth_magnitude(policy, x, k) of a flat view, where k counts entries")

// On taskvec::gpu these live in a header of their own.
TASKVEC_CALLS_NEED_HEADER(top_k, select, "taskvec/device/select.hpp")
TASKVEC_CALLS_NEED_HEADER(kth_magnitude, select, "taskvec/device/select.hpp")

} // namespace taskvec::inline TASKVEC_ABI
