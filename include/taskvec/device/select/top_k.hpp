// Exact top-k by magnitude on the gpu policy, over one tensor or a whole model, in one read of the data where it can
// be.
// SPDX-License-Identifier: Apache-2.0
//
// A sample brackets the k-th magnitude of every task vector. One walk counts what lies above the brackets and collects
// what lies inside, with its places, and the answer is chosen from these few, place among equals included. Magnitudes
// that many entries of the sample share are counted instead, in blocks of 4096 elements, of which one is read again.
// Where the sample was wrong, or too much lies inside for the memory there is, the radix select of select/radix.hpp
// finds the same thresholds in four more reads (f64: seven).
#pragma once

#include <taskvec/device/models/device_models.hpp>
#include <taskvec/device/select/bracket_functors.hpp>
#include <taskvec/device/select/radix.hpp>
#include <taskvec/select/thresholds.hpp>

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory_resource>
#include <numeric>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// How device_top_k_search looks. Nothing of it changes what is found.
struct bracket_options {
    std::size_t sample = 0; ///< entries of each task vector to look at first; 0: as many as suit the size of the scope
    std::size_t spare = 0; ///< bytes of device memory for what is collected; 0: device_models::spare()
};

/// Finds thresholds over a range of tensors.
template <arithmetic_element A>
class device_top_k_search {
    using bits = bits_type<A>;
    using bracket = elementwise::magnitude_bracket<A>;
    using lists_type = elementwise::magnitude_lists<A>;
    using range_type = elementwise::list_range<A>;
    static constexpr bits highest = static_cast<bits>(~sign_mask<A>);
    static constexpr std::size_t parts = lists_type::parts;
    static constexpr std::size_t few = 4096; // entries that the host chooses from
    static constexpr std::size_t run_length = elementwise::sample_magnitudes<A, A>::run;

public:
    device_top_k_search(device_models& models, tensor_range range, const bracket_options& options = {})
        : models_(models)
        , range_(range)
        , blocks_(models.models(), range)
        , tasks_(models.models().task_count())
        , sample_(options.sample)
        , spare_(options.spare ? options.spare : models.spare())
    {
        if (range.first < range.last) { begin_ = models.models().tensors()[range.first].position; }
        for (std::size_t i = range.first; i < range.last; ++i) { elements_ += models.models().tensors()[i].size; }
        if (sample_ == 0) { sample_ = std::clamp<std::uint64_t>(elements_ / 2048, 4096, std::uint64_t{1} << 18); }
        sample_ = std::max(sample_ / run_length * run_length, run_length);
    }

    /// counts[t] of task vector t are kept. `walks`: how often the data were read, samples aside.
    [[nodiscard]] std::vector<top_k_threshold<A>> run(std::span<const std::uint64_t> counts, unsigned* walks)
    {
        unsigned reads = 0, more = 0;
        std::vector<top_k_threshold<A>> thresholds(counts.size());
        if (std::any_of(counts.begin(), counts.end(),
                [&](std::uint64_t k) { return k < elements_; })) { // otherwise everything is kept
            const bool bracketed = look_for_brackets(counts);
            reads = bracketed ? 1 : 0;
            if (bracketed && collect(counts)) { choose(thresholds); }
            else {
                thresholds = device_radix_search<A>(models_, range_).run(counts, &more);
            }
        }
        if (walks) { *walks = reads + more; }
        return thresholds;
    }

private:
    template <class Use>
    void for_each_arithmetic(std::size_t tensor, const Use& use) const
    {
        visit_arithmetic(models_.models().tensors()[tensor], [&]<class B>(std::type_identity<B> type) {
            if constexpr (sizeof(B) <= sizeof(A)) { use(type); } // f64 tensors compare in f64
        });
    }

    /// The magnitudes of `size` entries of every task vector, [task][entry], the sign bit set; 0 where the sample has
    /// no entry.
    [[nodiscard]] std::vector<bits> sample(std::size_t size) const
    {
        const std::uint64_t runs = size / run_length, step = elements_ / runs;
        const auto look = [&](std::size_t tensor, const device_piece& piece, bits* out, const auto& sweep) {
            const std::uint64_t first = (piece.position - begin_) / step,
                                last = std::min((piece.position - begin_ + piece.size - 1) / step, runs - 1);
            if (first > last) { return; }
            for_each_arithmetic(tensor, [&]<class B>(std::type_identity<B>) {
                sweep((last - first + 1) * run_length,
                    elementwise::sample_magnitudes<A, B>{piece, begin_, step, first, out, size});
            });
        };
        if (models_.space() == memory_space::device) {
            device::buffer<bits> found(models_.policy(), tasks_ * size);
            found.clear();
            models_.read(range_, [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
                look(tensor, piece, found.data(),
                    [&](std::uint64_t count, const auto& functor) { device::sweep(policy, count, functor); });
            });
            return found.download();
        }
        std::vector<bits> found(tasks_ * size, bits{0}); // on the host the entries are read where they lie
        for (std::size_t i = range_.first; i < range_.last; ++i) {
            const aligned_tensor& tensor = models_.models().tensors()[i];
            if (tensor.size == 0) { continue; }
            std::vector<aligned_tensor::operand> operands{tensor.base};
            operands.insert(operands.end(), tensor.tasks.begin(), tensor.tasks.end());
            look(i, {operands.data(), tasks_, 0, tensor.position, tensor.size}, found.data(),
                [&](std::uint64_t count, const auto& functor) { functor(elementwise::indices{0, count, 1, 0}); });
        }
        return found;
    }

    /// Sets the brackets, and the room for what they will hold. False where there is no memory for it.
    [[nodiscard]] bool look_for_brackets(std::span<const std::uint64_t> counts)
    {
        for (std::size_t size = std::min<std::uint64_t>(sample_, elements_);; size *= 8) {
            brackets_.assign(tasks_, {.low = 0, .high = highest});
            commons_ = 0;
            std::uint64_t largest = size == elements_ ? elements_ : 0; // of all lists; few entries are all collected
            const std::vector<bits> seen = size == elements_ ? std::vector<bits>() : sample(size);
            for (std::size_t t = 0; t < tasks_; ++t) {
                brackets_[t].active = counts[t] < elements_;
                if (!brackets_[t].active || seen.empty()) { continue; }
                const std::size_t each = seen.size() / tasks_;
                largest = std::max(largest,
                    narrow(brackets_[t], static_cast<double>(counts[t]),
                        {seen.begin() + t * each, seen.begin() + (t + 1) * each}));
            }
            const auto part = static_cast<double>(largest) / parts;
            room_ = static_cast<std::uint64_t>(part + 8 * std::sqrt(part)) + 32;
            for (const bracket& one : brackets_) { commons_ = std::max<std::size_t>(commons_, one.commons); }
            const std::uint64_t wanted = parts * room_ * (sizeof(bits) + sizeof(std::uint64_t))
                + commons_ * blocks_.count() * sizeof(elementwise::counter);
            if (tasks_ * wanted <= spare_) { return make_room(); }
            if (8 * size > std::min<std::uint64_t>(elements_ / 64, std::uint64_t{1} << 20)) {
                return false;
            } // a larger sample would not pay
        }
    }

    /// Takes the memory for the lists. False, and none is held, where the device has not as much left.
    [[nodiscard]] bool make_room()
    {
        const gpu& policy = models_.policy();
        const std::size_t listed = tasks_ * parts * room_, equals = tasks_ * commons_ * blocks_.count();
        magnitudes_ = device::buffer<bits>::where_there_is_room(policy, listed);
        places_ = device::buffer<std::uint64_t>::where_there_is_room(policy, listed);
        equal_ = device::buffer<elementwise::counter>::where_there_is_room(policy, equals);
        if (magnitudes_.size() == listed && places_.size() == listed && equal_.size() == equals) { return true; }
        magnitudes_ = {};
        places_ = {};
        equal_ = {};
        return false;
    }

    /// Brackets the k-th magnitude by what a sample shows; returns how many entries its list may get, by the same.
    [[nodiscard]] std::uint64_t narrow(bracket& found, double k, std::vector<bits> seen) const
    {
        std::erase(seen, bits{0});
        for (bits& value : seen) { value &= highest; }
        const auto size = static_cast<double>(seen.size()), share = k / static_cast<double>(elements_);
        const double rank = share * size,
                     margin = 6 * std::sqrt(size * share * (1 - share)) + 2; // entries of a run are alike
        ranking<bits> ranked(seen, 0, highest, std::pmr::get_default_resource());
        const auto at = [&](double place) { return ranked[static_cast<std::size_t>(place) - 1]; };
        if (rank - margin >= 1) { found.high = at(std::floor(rank - margin)); }
        if (rank + margin + 1 <= size) { found.low = at(std::ceil(rank + margin)); }
        std::erase_if(seen, [&](bits value) { return value < found.low || value > found.high; });
        std::sort(seen.begin(), seen.end(), std::greater<>());
        // Common is what a sixteenth of them share: it would take up the list.
        const std::size_t many = std::max<std::size_t>(16, seen.size() / (2 * bracket::most_common));
        std::size_t listed = seen.size();
        for (auto begin = seen.begin(); begin != seen.end();) {
            const auto end = std::upper_bound(begin, seen.end(), *begin, std::greater<>());
            const auto equals = static_cast<std::size_t>(end - begin);
            if (equals >= many && found.commons < bracket::most_common) {
                found.common[found.commons++] = *begin;
                listed -= equals;
            }
            begin = end;
        }
        const auto most = static_cast<double>(listed) + 4 * std::sqrt(static_cast<double>(listed));
        return static_cast<std::uint64_t>(most / std::max(size, 1.0) * static_cast<double>(elements_)) + 1;
    }

    /// The walk. True where the brackets hold the answers, and the lists what lies inside.
    [[nodiscard]] bool collect(std::span<const std::uint64_t> counts)
    {
        const gpu& policy = models_.policy();
        const device::buffer<bracket> brackets(policy, brackets_);
        tallies_ = device::buffer<elementwise::counter>(policy, 2 * tasks_ * parts);
        tallies_.clear();
        equal_.clear();
        models_.read(range_, [&](const gpu& lane, std::size_t tensor, const device_piece& piece) {
            for_each_arithmetic(tensor, [&]<class B>(std::type_identity<B>) {
                using functor = elementwise::count_and_collect<A, B>;
                for (std::size_t first = 0; first < tasks_; first += functor::held) {
                    const functor walk{
                        piece, brackets.data(), lists(), first, blocks_.first(tensor), models_.nonfinite_flag()};
                    if constexpr (std::same_as<A, float>) {
                        const bool done = visit_packs(piece, [&]<class T>(std::type_identity<T>) {
                            using packs = elementwise::count_and_collect_packs<T>;
                            device::sweep(lane, packs::packs(piece.size), packs{walk});
                        });
                        if (done) { continue; }
                    }
                    device::sweep(lane, piece.size, walk);
                }
            });
        });
        const std::vector<elementwise::counter> tallies = tallies_.download();
        for (std::size_t part = 0; part < tasks_ * parts; ++part) {
            if (tallies[tasks_ * parts + part] > room_) { return false; }
        }
        std::vector<elementwise::counter> over(tasks_ * bracket::most_common, 0);
        if (commons_ > 0) {
            device::buffer<elementwise::counter> counted(policy, over.size());
            counted.clear();
            device::sweep(policy, tasks_ * parts * room_,
                elementwise::count_over_common<A>{lists(), brackets.data(), counted.data()});
            over = counted.download();
            equal_counts_ = equal_.download();
        }
        left_.assign(tasks_, {});
        for (std::size_t t = 0; t < tasks_; ++t) {
            if (!brackets_[t].active) { continue; }
            const elementwise::counter *const above = tallies.data() + t * parts,
                                              *const inside = above + tasks_ * parts;
            const std::uint64_t more = std::accumulate(above, above + parts, std::uint64_t{0});
            const std::uint64_t listed = std::accumulate(inside, inside + parts, std::uint64_t{0});
            if (counts[t] <= more || !locate(t, counts[t] - more, listed, over.data() + t * bracket::most_common)) {
                return false;
            }
        }
        return true;
    }

    /// Finds out between which of the common magnitudes the rank-th entry of a bracket is, or at which. listed: entries
    /// of its list; over[c]: those of them that are larger than common magnitude c. False where the bracket has fewer
    /// entries.
    [[nodiscard]] bool locate(std::size_t t, std::uint64_t rank, std::uint64_t listed, const elementwise::counter* over)
    {
        const bracket& found = brackets_[t];
        std::uint64_t high = found.high, passed = 0;
        for (unsigned c = 0; c < found.commons; ++c) {
            const std::uint64_t between = over[c] - passed,
                                equals =
                                    std::accumulate(equal_of(t, c), equal_of(t, c) + blocks_.count(), std::uint64_t{0});
            if (rank <= between) {
                left_[t] = {
                    {.low = std::uint64_t{found.common[c]} + 1, .high = high, .active = true}, rank, between, {}};
                return true;
            }
            rank -= between;
            if (rank <= equals) {
                left_[t] = {{}, rank, 0, c};
                return true;
            }
            rank -= equals;
            passed = over[c];
            high = std::uint64_t{found.common[c]} - 1;
        }
        left_[t] = {{.low = found.low, .high = high, .active = true}, rank, listed - passed, {}};
        return rank <= listed - passed;
    }
    [[nodiscard]] const elementwise::counter* equal_of(std::size_t t, std::size_t c) const noexcept
    {
        return equal_counts_.data() + (t * commons_ + c) * blocks_.count();
    }

    [[nodiscard]] lists_type lists() const noexcept
    {
        return {tallies_.data(), tallies_.data() + tasks_ * parts, magnitudes_.data(), places_.data(), room_,
            equal_.data(), commons_, blocks_.count()};
    }
    [[nodiscard]] device::buffer<range_type> upload() const
    {
        std::vector<range_type> ranges;
        for (const remaining& one : left_) { ranges.push_back(one.range); }
        return {models_.policy(), ranges};
    }

    /// The answers, from the lists.
    void choose(std::vector<top_k_threshold<A>>& thresholds)
    {
        while (std::any_of(left_.begin(), left_.end(), [](const remaining& one) { return one.count > few; })) {
            narrow_ranges();
        }
        const auto ranges = upload();
        device::buffer<elementwise::counter> found(models_.policy(), tasks_);
        found.clear();
        const device::buffer<bits> magnitudes(models_.policy(), tasks_ * few);
        const device::buffer<std::uint64_t> places(models_.policy(), tasks_ * few);
        device::sweep(models_.policy(), tasks_ * parts * room_,
            elementwise::pick_entries<A>{lists(), ranges.data(), few, found.data(), magnitudes.data(), places.data()});
        device::buffer<elementwise::counter> equals(models_.policy(), tasks_);
        equals.clear();
        for (std::size_t t = 0; t < tasks_; ++t) {
            if (const auto c = left_[t].common) {
                blocks_.find<A>(models_, t, brackets_[t].common[*c], left_[t].rank, equal_of(t, *c), equals.data() + t);
            }
        }
        const std::vector<elementwise::counter> last = equals.download();
        const std::vector<bits> values = magnitudes.download();
        const std::vector<std::uint64_t> where = places.download();
        for (std::size_t t = 0; t < tasks_; ++t) {
            if (const auto c = left_[t].common) { thresholds[t] = {brackets_[t].common[*c], last[t] + 1}; }
            if (left_[t].count == 0) { continue; }
            std::vector<std::pair<bits, std::uint64_t>> entries;
            for (std::size_t i = t * few; i < t * few + left_[t].count; ++i) {
                entries.emplace_back(values[i], where[i]);
            }
            const auto answer = entries.begin() + static_cast<std::ptrdiff_t>(left_[t].rank) - 1;
            std::nth_element(entries.begin(), answer, entries.end(), [](const auto& x, const auto& y) {
                return x.first != y.first ? x.first > y.first : x.second < y.second;
            });
            thresholds[t] = {answer->first, answer->second + 1};
        }
    }

    /// Narrows what is left of the long lists by a histogram of its keys: of magnitudes the largest come first, of
    /// places the first.
    void narrow_ranges()
    {
        for (remaining& one : left_) {
            range_type& range = one.range;
            if (one.count > few && range.low == range.high) {
                range = {begin_, begin_ + elements_ - 1, static_cast<bits>(range.low), true, true, 0};
            }
            const unsigned width = static_cast<unsigned>(std::bit_width(range.high - range.low));
            range.shift = width > elementwise::list_bin_bits ? width - elementwise::list_bin_bits : 0;
        }
        const auto ranges = upload();
        device::buffer<elementwise::counter> bins(models_.policy(), tasks_ * elementwise::list_bins);
        bins.clear();
        device::sweep(models_.policy(), tasks_ * parts * room_,
            elementwise::list_histogram<A>{lists(), ranges.data(), bins.data()});
        const std::vector<elementwise::counter> counts = bins.download();
        for (std::size_t t = 0; t < tasks_; ++t) {
            remaining& one = left_[t];
            if (one.count <= few) { continue; }
            const elementwise::counter* const mine = counts.data() + t * elementwise::list_bins;
            std::uint64_t bin = one.range.by_place ? 0 : (one.range.high - one.range.low) >> one.range.shift;
            while (one.rank > mine[bin]) {
                one.rank -= mine[bin];
                one.range.by_place ? ++bin : --bin;
            }
            one.count = mine[bin];
            one.range.low += bin << one.range.shift;
            one.range.high = std::min(one.range.high, one.range.low + ((std::uint64_t{1} << one.range.shift) - 1));
        }
    }

    /// What the answer of a task vector is still chosen from.
    struct remaining {
        range_type range{};
        std::uint64_t rank = 0, count = 0; // the rank-th of `count` entries of its list
        std::optional<unsigned> common{}; // or of those of this common magnitude
    };

    device_models& models_;
    tensor_range range_;
    equal_blocks blocks_;
    std::size_t tasks_, sample_, spare_, commons_ = 0;
    std::uint64_t begin_ = 0, elements_ = 0, room_ = 0;
    std::vector<bracket> brackets_;
    std::vector<remaining> left_;
    device::buffer<elementwise::counter> tallies_; // above, inside
    device::buffer<bits> magnitudes_;
    device::buffer<std::uint64_t> places_;
    device::buffer<elementwise::counter> equal_; // [task][common][block], and on the host
    std::vector<elementwise::counter> equal_counts_;
};

/// trim_thresholds of models that the gpu policy walks over.
[[nodiscard]] inline trim_thresholds thresholds_on_device(
    device_models& models, const task_shares& density, scope over, trim_rule rule = trim_rule::exact)
{
    return trim_thresholds(models.models(), density, over, rule,
        [&]<class A>(std::type_identity<A>, tensor_range range, std::span<const std::uint64_t> counts,
            unsigned* walks) { return device_top_k_search<A>(models, range).run(counts, walks); });
}

/// The same where count(n) entries of n, or count(n, t) of task t, are kept.
template <entry_count Count>
[[nodiscard]] trim_thresholds thresholds_on_device(device_models& models, const Count& count, scope over)
{
    return trim_thresholds(storage_types{}, models.models(), count, over,
        [&]<class A>(std::type_identity<A>, tensor_range range, std::span<const std::uint64_t> counts,
            unsigned* walks) { return device_top_k_search<A>(models, range).run(counts, walks); });
}

/// Thresholds of every tensor in device memory.
class device_thresholds {
public:
    device_thresholds(const gpu& policy, const aligned_models& models, const trim_thresholds& thresholds)
        : tasks_(models.task_count())
    {
        std::vector<top_k_threshold<float>> single;
        std::vector<top_k_threshold<double>> wide;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            for (std::size_t t = 0; t < tasks_; ++t) {
                single.push_back(models.tensors()[i].wide ? top_k_threshold<float>{} : thresholds.get<float>(i, t));
                if (models.any_wide()) {
                    wide.push_back(models.tensors()[i].wide ? thresholds.get<double>(i, t) : top_k_threshold<double>{});
                }
            }
        }
        single_ = device::buffer<top_k_threshold<float>>(policy, single);
        wide_ = device::buffer<top_k_threshold<double>>(policy, wide);
    }
    /// Those of a tensor's task vectors.
    template <arithmetic_element A>
    [[nodiscard]] const top_k_threshold<A>* get(std::size_t tensor) const noexcept
    {
        if constexpr (std::same_as<A, double>) { return wide_.data() + tensor * tasks_; }
        else {
            return single_.data() + tensor * tasks_;
        }
    }

private:
    std::size_t tasks_;
    device::buffer<top_k_threshold<float>> single_;
    device::buffer<top_k_threshold<double>> wide_;
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
