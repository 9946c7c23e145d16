// Selection within a bracket of magnitudes as elementwise functors: samples, one walk that counts and collects, and
// what narrows a list.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/elements.hpp>
#include <taskvec/models/block.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::elementwise {

/// Where the k-th magnitude of a task vector is looked for: among those with bits in [low, high].
template <arithmetic_element A>
struct magnitude_bracket {
    static constexpr std::size_t most_common = 8;

    bits_type<A> low = 0, high = 0;
    bool active = false; ///< otherwise everything is kept, and nothing is asked
    unsigned commons = 0; ///< so many magnitudes of the bracket are common: their entries are counted, not collected
    bits_type<A> common[most_common] = {}; ///< the largest first
};

/// Lists of the entries inside the brackets, one for each task vector, in `parts` of `room` entries each. An entry's
/// place says which part it goes to, so that workers seldom meet, all parts fill evenly, and whether one overflows does
/// not depend on the workers. Of magnitudes that are common (task vectors of bf16 models have few different ones) no
/// entry is listed, but how many each block holds.
template <arithmetic_element A>
struct magnitude_lists {
    static constexpr std::size_t parts = 256;

    counter* above; ///< [task][part]: entries above the bracket
    counter* inside; ///< [task][part]: entries inside it, those for which there is no room included
    bits_type<A>* magnitudes; ///< [task][part][room]
    std::uint64_t* places; ///< of the same entries, in the concatenation of all tensors
    std::uint64_t room;
    counter* equal; ///< [task][common][block]
    std::size_t commons; ///< of the task that has the most
    std::uint64_t blocks; ///< of all tensors, see equal_blocks

    TASKVEC_HOST_DEVICE void collect(std::size_t task, bits_type<A> magnitude, std::uint64_t place) const noexcept
    {
        const std::size_t part = task * parts + static_cast<std::size_t>(place * 0x9e3779b97f4a7c15u >> 56);
        const counter at = atomic_take(inside + part);
        if (at >= room) { return; }
        magnitudes[part * room + at] = magnitude;
        places[part * room + at] = place;
    }
};

/// What is left of a list to choose from: entries with keys in [low, high]. The key of an entry is its magnitude, or,
/// once that is known to be `magnitude`, its place.
template <arithmetic_element A>
struct list_range {
    std::uint64_t low = 0, high = 0;
    bits_type<A> magnitude = 0;
    bool by_place = false, active = false;
    unsigned shift = 0; ///< keys are told apart by the bits above

    /// Whether an entry is in the range; `key` receives its key.
    [[nodiscard]] TASKVEC_HOST_DEVICE bool holds(
        bits_type<A> found, std::uint64_t place, std::uint64_t& key) const noexcept
    {
        key = by_place ? place : static_cast<std::uint64_t>(found);
        return active && (!by_place || found == magnitude) && key >= low && key <= high;
    }
};

TASKVEC_KERNELS_BEGIN

/// Magnitudes of entries all over the scope: of every `step` entries a run of `run`, which begins at a place of its own
/// among them, so that no period of the data goes along with it. out[t·size + j·run + i] = the magnitude of entry i of
/// run j, with the sign bit set; what lies outside the piece is left alone. The sweep is over the runs from `first` on
/// that meet the piece, `run` entries each.
template <arithmetic_element A, arithmetic_element B>
struct sample_magnitudes {
    static constexpr std::uint64_t run = 8;

    device_piece piece;
    std::uint64_t begin, step, first; // place where the scope begins; entries to a run; the first run
    bits_type<A>* out;
    std::size_t size; // of the sample of one task vector

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t j = first + k / run;
            const std::uint64_t place = begin + j * step + (j * 0x9e3779b97f4a7c15u >> 24) % (step - run + 1) + k % run;
            if (place < piece.position || place - piece.position >= piece.size) { continue; }
            const std::uint64_t i = place - piece.position;
            const B base = origin<B>(piece, i, nullptr);
            for (std::size_t t = 0; t < piece.tasks; ++t) {
                out[t * size + j * run + k % run] =
                    magnitude_bits(static_cast<A>(delta(piece, t, i, base, nullptr))) | sign_mask<A>;
            }
        }
    }
};

/// For the task vectors [first, first + held) counts the entries above their brackets, and collects those inside.
/// Magnitudes compare in A, the tensor computes in B.
template <arithmetic_element A, arithmetic_element B>
struct count_and_collect {
    static constexpr std::size_t held = 8;

    device_piece piece;
    const magnitude_bracket<A>* brackets;
    magnitude_lists<A> lists;
    std::size_t first;
    std::uint64_t first_block; // of the tensor
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        counter above[held] = {};
        for (std::uint64_t i = at.first; i < at.last; i += at.step) { one(i, above); }
        add(at, above);
    }
    /// Element i.
    TASKVEC_HOST_DEVICE void one(std::uint64_t i, counter* above) const
    {
        const B base = origin<B>(piece, i, flag);
        for (std::size_t t = 0; t < held; ++t) {
            if (first + t < piece.tasks) { look(t, delta(piece, first + t, i, base, flag), i, above); }
        }
    }
    /// Entry i of task vector first + t.
    TASKVEC_HOST_DEVICE void look(std::size_t t, B value, std::uint64_t i, counter* above) const noexcept
    {
        const bits_type<A> magnitude = magnitude_bits(static_cast<A>(value));
        const magnitude_bracket<A>& bracket = brackets[first + t];
        if (magnitude < bracket.low || !bracket.active) { return; }
        if (magnitude > bracket.high) {
            ++above[t];
            return;
        }
        for (unsigned c = 0; c < bracket.commons; ++c) {
            if (magnitude == bracket.common[c]) {
                atomic_add(lists.equal + ((first + t) * lists.commons + c) * lists.blocks + first_block
                        + (piece.offset + i) / block_size,
                    1);
                return;
            }
        }
        lists.collect(first + t, magnitude, piece.position + i);
    }
    TASKVEC_HOST_DEVICE void add(const indices& at, const counter* above) const noexcept
    {
        for (std::size_t t = 0; t < held; ++t) {
            if (above[t] != 0) {
                atomic_add(lists.above + (first + t) * lists.parts + at.worker % lists.parts, above[t]);
            }
        }
    }
};

/// count_and_collect where everything is stored as T, by accesses of 16 bytes.
template <storage_element T>
struct count_and_collect_packs {
    count_and_collect<float, float> of_elements;

    /// The sweep is over packs.
    [[nodiscard]] static constexpr std::uint64_t packs(std::uint64_t size) noexcept
    {
        return (size + words16<T>::size - 1) / words16<T>::size;
    }

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        constexpr std::size_t held = count_and_collect<float, float>::held;
        const device_piece& piece = of_elements.piece;
        const bool based = piece.operands[0].data != nullptr;
        counter above[held] = {};
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t begin = k * words16<T>::size;
            if (begin + words16<T>::size > piece.size) {
                for (std::uint64_t i = begin; i < piece.size; ++i) { of_elements.one(i, above); }
                continue;
            }
            float base[words16<T>::size] = {}, value[words16<T>::size];
            if (based) { load_pack<T>(piece.operands[0], k, piece.position + begin, of_elements.flag, base); }
            for (std::size_t t = 0; t < held; ++t) {
                if (of_elements.first + t >= piece.tasks) { continue; }
                load_pack<T>(
                    piece.operands[1 + of_elements.first + t], k, piece.position + begin, of_elements.flag, value);
                for (std::size_t j = 0; j < words16<T>::size; ++j) {
                    of_elements.look(t, based ? difference(value[j], base[j]) : value[j], begin + j, above);
                }
            }
        }
        of_elements.add(at, above);
    }
};

/// over[t·most_common + c] = how many entries of list t are larger than its common magnitude c. The sweep is over the
/// room of all lists.
template <arithmetic_element A>
struct count_over_common {
    magnitude_lists<A> lists;
    const magnitude_bracket<A>* brackets;
    counter* over;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t part = k / lists.room, t = part / lists.parts;
            if (k % lists.room >= lists.inside[part]) { continue; }
            for (unsigned c = 0; c < brackets[t].commons; ++c) {
                if (lists.magnitudes[k] > brackets[t].common[c]) {
                    atomic_add(over + t * magnitude_bracket<A>::most_common + c, 1);
                }
            }
        }
    }
};

/// bins[t·list_bins + b]: how many entries of list t have keys in bin b of their range. The sweep is over the room of
/// all lists.
inline constexpr unsigned list_bin_bits = 11;
inline constexpr std::size_t list_bins = std::size_t{1} << list_bin_bits;
template <arithmetic_element A>
struct list_histogram {
    magnitude_lists<A> lists;
    const list_range<A>* ranges;
    counter* bins;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t part = k / lists.room, t = part / lists.parts;
            std::uint64_t key = 0;
            if (k % lists.room < lists.inside[part] && ranges[t].holds(lists.magnitudes[k], lists.places[k], key)) {
                atomic_add(bins + t * list_bins + ((key - ranges[t].low) >> ranges[t].shift), 1);
            }
        }
    }
};

/// Takes the entries of a range, at most `most` of each list, out of the lists: found[t] of them, in no order.
template <arithmetic_element A>
struct pick_entries {
    magnitude_lists<A> lists;
    const list_range<A>* ranges;
    std::size_t most;
    counter* found;
    bits_type<A>* magnitudes; // [task][most]
    std::uint64_t* places;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t part = k / lists.room, t = part / lists.parts;
            std::uint64_t key = 0;
            if (k % lists.room >= lists.inside[part] || !ranges[t].holds(lists.magnitudes[k], lists.places[k], key)) {
                continue;
            }
            const counter to = t * most + atomic_take(found + t);
            magnitudes[to] = lists.magnitudes[k];
            places[to] = lists.places[k];
        }
    }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI::elementwise
