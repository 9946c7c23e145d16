// The walk that merges on taskvec::gpu: the bodies of methods as elementwise functors, an entry at a time.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/pack.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/device/methods/passes.hpp>
#include <taskvec/device/models/elements.hpp>
#include <taskvec/methods/walk.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace elementwise {

/// Where bodies count, tally_slots copies of it: merge_tally::counts, then [slot][task].
inline constexpr std::size_t tally_slots = 64;

/// What the functors of a merge share.
template <arithmetic_element A, class Body>
struct merge_entries_of {
    device_piece piece;
    Body body;
    std::size_t task_slots; ///< 0: tasks are not counted
    counter *tallies, *flag, *flag_beside, *negative_beside;

    static constexpr std::size_t held = 8;

    [[nodiscard]] TASKVEC_HOST_DEVICE std::size_t tally_size() const noexcept
    {
        return merge_tally::slot_count + task_slots * piece.tasks;
    }
    [[nodiscard]] TASKVEC_HOST_DEVICE counter* tally_of(const indices& at) const noexcept
    {
        return tallies + at.worker % tally_slots * tally_size();
    }
};

TASKVEC_KERNELS_BEGIN

/// What a body sees of one entry: the interface of kernels::entries.
template <arithmetic_element A, class Body>
class device_entries {
public:
    using number = A;
    using pack = taskvec::pack<A, 0>;
    using words = pack_words<A, 0>;
    using mask = pack_mask<A, 0>;
    static constexpr std::size_t held = merge_entries_of<A, Body>::held;

    TASKVEC_INLINE device_entries(const merge_entries_of<A, Body>& of, std::uint64_t i, A base, const A* tasks,
        const std::uint32_t* drawn, counter* tally, counter* counts)
        : of_(of)
        , i_(i)
        , base_(base)
        , tasks_(tasks)
        , drawn_(drawn)
        , tally_(tally)
        , counts_(counts)
    { }

    [[nodiscard]] TASKVEC_INLINE std::size_t tasks() const noexcept { return of_.piece.tasks; }
    [[nodiscard]] TASKVEC_INLINE pack base() const noexcept { return {base_}; }
    [[nodiscard]] TASKVEC_INLINE bool has_base() const noexcept { return of_.piece.operands[0].data != nullptr; }
    [[nodiscard]] TASKVEC_INLINE pack task(std::size_t t) const noexcept
    {
        return {t < held ? tasks_[t] : load<A>(of_.piece.operands[1 + t], i_, of_.piece.position + i_, of_.flag)};
    }
    [[nodiscard]] TASKVEC_INLINE pack delta(std::size_t t) const noexcept { return task(t) - base(); }
    [[nodiscard]] TASKVEC_INLINE bool has_beside(std::size_t b) const noexcept { return operand(b).data != nullptr; }
    [[nodiscard]] TASKVEC_INLINE pack beside(std::size_t b) const noexcept
    {
        if constexpr (requires { of_.body.number(b, i_); }) { return {of_.body.number(b, of_.piece.offset + i_)}; }
        else {
            const std::uint64_t place = of_.piece.position + i_;
            const A value = load<A>(operand(b), i_, place, of_.flag_beside);
            if (of_.negative_beside && value < 0) { atomic_min(of_.negative_beside, place); }
            return {value};
        }
    }
    [[nodiscard]] TASKVEC_INLINE words draws(std::size_t t) const noexcept
    {
        std::uint32_t word = 0;
        if constexpr (requires { of_.body.stream(t); }) {
            word = drawn_ && t < held ? drawn_[4 * t] : of_.body.stream(t).word(of_.piece.offset + i_);
        }
        return {static_cast<signed_word<A>>(static_cast<std::int64_t>(word) - (std::int64_t{1} << 31))};
    }
    [[nodiscard]] TASKVEC_INLINE bool before(std::uint64_t place) const noexcept
    {
        return of_.piece.position + i_ < place;
    }
    template <class F>
    [[nodiscard]] TASKVEC_INLINE pack total_of(const F& f) const
    {
        return sum_of(f);
    }
    template <class F>
    [[nodiscard]] TASKVEC_INLINE pack sum_of(const F& f) const
    {
        pack sum{};
        each([&](std::size_t t) TASKVEC_BODY { sum = sum + f(t); });
        return sum;
    }
    template <class F>
    TASKVEC_INLINE void each(const F& f) const
    {
        for (std::size_t t = 0; t < held; ++t) {
            if (t < of_.piece.tasks) { f(t); }
        }
        for (std::size_t t = held; t < of_.piece.tasks; ++t) { f(t); }
    }
    template <class F, class See>
    [[nodiscard]] TASKVEC_INLINE const F& list_of(const F& f, const See& see) const
    {
        each([&](std::size_t t) TASKVEC_BODY { see(t, f(t)); });
        return f;
    }
    TASKVEC_INLINE void count(std::size_t slot, const mask& entry) const noexcept
    {
        counts_[slot] += static_cast<counter>(entry.lanes != 0);
    }
    [[nodiscard]] TASKVEC_INLINE bool counts_tasks() const noexcept { return of_.task_slots != 0; }
    TASKVEC_INLINE void count_of(std::size_t slot, std::size_t t, const mask& entry) const noexcept
    {
        if (entry.lanes != 0) { atomic_add(tally_ + merge_tally::slot_count + slot * of_.piece.tasks + t, 1); }
    }
    /// Every load notes NaN and infinity.
    TASKVEC_INLINE void watch(const pack&) const noexcept { }

private:
    [[nodiscard]] TASKVEC_INLINE const aligned_tensor::operand& operand(std::size_t b) const noexcept
    {
        return of_.piece.operands[1 + of_.piece.tasks + b];
    }

    const merge_entries_of<A, Body>& of_;
    std::uint64_t i_;
    A base_;
    const A* tasks_;
    const std::uint32_t* drawn_;
    counter *tally_, *counts_;
};

/// Merges groups of `group` consecutive entries: 4 where a body draws, as one draw is four words.
template <arithmetic_element A, class Body>
struct merge_entries {
    merge_entries_of<A, Body> of;
    static constexpr bool draws = requires { of.body.stream(std::size_t{}); };
    static constexpr std::size_t group = draws ? 4 : 1, held = merge_entries_of<A, Body>::held;

    /// What the sweep is over.
    [[nodiscard]] static constexpr std::uint64_t groups(std::uint64_t size) noexcept
    {
        return (size + group - 1) / group;
    }

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        counter counts[merge_tally::slot_count]{};
        counter* const tally = of.tally_of(at);
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            [[maybe_unused]] std::uint32_t drawn[4 * held];
            if constexpr (draws) {
                for (std::size_t t = 0; t < held; ++t) {
                    if (t < of.piece.tasks && of.body.drawing()) {
                        const auto four = of.body.stream(t).words((of.piece.offset + 4 * k) / 4);
                        for (std::size_t j = 0; j < 4; ++j) { drawn[4 * t + j] = four[j]; }
                    }
                }
            }
            for (std::size_t j = 0; j < group; ++j) {
                const std::uint64_t i = group * k + j;
                if (i < of.piece.size) { one(i, draws ? drawn + j : nullptr, tally, counts); }
            }
        }
        add(tally, counts);
    }
    static TASKVEC_HOST_DEVICE void add(counter* tally, const counter* counts) noexcept
    {
        for (std::size_t slot = 0; slot < merge_tally::slot_count; ++slot) {
            if (counts[slot] != 0) { atomic_add(tally + slot, counts[slot]); }
        }
    }
    /// Entry i.
    TASKVEC_HOST_DEVICE void one(std::uint64_t i, const std::uint32_t* drawn, counter* tally, counter* counts) const
    {
        const A base = origin<A>(of.piece, i, of.flag);
        A tasks[held];
        for (std::size_t t = 0; t < held; ++t) {
            if (t < of.piece.tasks) { tasks[t] = load<A>(of.piece.operands[1 + t], i, of.piece.position + i, of.flag); }
        }
        device_entries<A, Body> in(of, i, base, tasks, drawn, tally, counts);
        store(of.piece.out, of.piece.out_dtype, i, of.body(in).lanes);
    }
};

/// merge_entries over at most `held` tasks where everything is stored as T, by accesses of 16 bytes.
template <storage_element T, class Body>
struct merge_words16 {
    merge_entries<float, Body> entries;

    [[nodiscard]] static constexpr std::uint64_t groups(std::uint64_t size) noexcept
    {
        return (size + words16<T>::size - 1) / words16<T>::size;
    }

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        constexpr std::size_t held = merge_entries<float, Body>::held, size = words16<T>::size;
        const auto& of = entries.of;
        const device_piece& piece = of.piece;
        counter counts[merge_tally::slot_count]{};
        counter* const tally = of.tally_of(at);
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t begin = k * size;
            if (begin + size > piece.size) {
                for (std::uint64_t i = begin; i < piece.size; ++i) { entries.one(i, nullptr, tally, counts); }
                continue;
            }
            float base[size] = {}, tasks[size][held], value[size];
            if (piece.operands[0].data) { load_pack<T>(piece.operands[0], k, piece.position + begin, of.flag, base); }
            for (std::size_t t = 0; t < held; ++t) {
                if (t < piece.tasks) {
                    load_pack<T>(piece.operands[1 + t], k, piece.position + begin, of.flag, value);
                    for (std::size_t j = 0; j < size; ++j) { tasks[j][t] = value[j]; }
                }
            }
            for (std::size_t j = 0; j < size; ++j) {
                device_entries<float, Body> in(of, begin + j, base[j], tasks[j], nullptr, tally, counts);
                value[j] = of.body(in).lanes;
            }
            store_pack<T>(piece.out, k, value);
        }
        entries.add(tally, counts);
    }
};

TASKVEC_KERNELS_END

} // namespace elementwise

namespace detail {

/// Merges a range of tensors with a prepared method; tallies of all tensors lie behind each other.
template <class Options>
class device_walk {
public:
    device_walk(device_passes& passes, const method<Options>& prepared)
        : passes_(&passes)
        , prepared_(&prepared)
        , task_slots_(passes.models().options().statistics ? method<Options>::task_slots : 0)
        , per_tensor_(elementwise::tally_slots * (merge_tally::slot_count + task_slots_ * passes.tasks()))
        , tallies_(passes.policy(), passes.models().tensors().size() * per_tensor_)
    {
        tallies_.clear();
    }

    void write(tensor_range range)
    {
        device_models& models = passes_->walked();
        models.write(range, [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
            visit_arithmetic(models.models().tensors()[tensor], [&]<class A>(std::type_identity<A>) {
                visit_body<A>(*prepared_, tensor, [&]<class Body>(const Body& body) {
                    elementwise::counter* negative = nullptr;
                    if constexpr (requires { method<Options>::beside_not_negative; }) {
                        negative = passes_->negative_beside();
                    }
                    const elementwise::merge_entries<A, Body> merge{
                        {piece, body, task_slots_, tallies_.data() + tensor * per_tensor_, models.nonfinite_flag(),
                            passes_->nonfinite_beside(), negative}};
                    if constexpr (std::same_as<A, float> && !merge.draws) {
                        const bool done =
                            piece.tasks <= merge.held && visit_packs(piece, [&]<class T>(std::type_identity<T>) {
                                using packs = elementwise::merge_words16<T, Body>;
                                device::sweep(policy, packs::groups(piece.size), packs{merge});
                            });
                        if (done) { return; }
                    }
                    device::sweep(policy, merge.groups(piece.size), merge);
                });
            });
        });
    }
    /// Merges a tensor again.
    void again(std::size_t tensor)
    {
        device::clear(
            passes_->policy(), tallies_.data() + tensor * per_tensor_, per_tensor_ * sizeof(elementwise::counter));
        write({tensor, tensor + 1});
    }
    [[nodiscard]] bool counts_tasks() const noexcept { return task_slots_ > 0; }
    /// What was counted, for each tensor. Waits.
    [[nodiscard]] std::vector<merge_tally> tallies() const
    {
        const std::vector<elementwise::counter> found = tallies_.download();
        const std::size_t size = per_tensor_ / elementwise::tally_slots;
        std::vector<merge_tally> tallies(passes_->models().tensors().size());
        for (auto& tally : tallies) { tally.of_tasks.resize(size - merge_tally::slot_count); }
        for (std::size_t i = 0; i < found.size(); ++i) {
            merge_tally& tally = tallies[i / per_tensor_];
            const std::size_t slot = i % size;
            (slot < merge_tally::slot_count ? tally.counts[slot] : tally.of_tasks[slot - merge_tally::slot_count]) +=
                found[i];
        }
        return tallies;
    }

private:
    device_passes* passes_;
    const method<Options>* prepared_;
    std::size_t task_slots_, per_tensor_;
    device::buffer<elementwise::counter> tallies_;
};

/// Reports the least place of what may not lie beside the models. Waits.
template <class Options>
void check_beside(const device_passes& passes, const method<Options>& prepared)
{
    const device_models& models = passes.walked();
    const std::vector<elementwise::counter> found = passes.flags();
    for (std::size_t which = 0; which < found.size(); ++which) {
        const elementwise::counter place = found[which];
        if (place == device_models::none) { continue; }
        const std::size_t tensor = models.models().tensor_at(place);
        const std::uint64_t index = place - models.models().tensors()[tensor].position;
        for (std::size_t b = 0; b < passes.beside_each(); ++b) {
            const std::size_t operand = 1 + passes.tasks() + b;
            if (!models.operand(tensor, operand).data) { continue; }
            const double stored = models.element(tensor, operand, index);
            const double value =
                models.models().tensors()[tensor].wide ? stored : static_cast<double>(static_cast<float>(stored));
            if (which == 0 ? !std::isfinite(value) : value < 0) {
                prepared.refuse_beside(models.models(), tensor, b, value, index);
            }
        }
    }
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
