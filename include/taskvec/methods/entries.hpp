// What a method's body sees of a pack of entries: the base, the tasks and their task vectors, and where to count.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/stored_pack.hpp>
#include <taskvec/methods/method.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace taskvec::inline TASKVEC_ABI {

namespace kernels {

/// A run of consecutive entries of one tensor, stored as T in the base, in every task and in the output.
template <storage_element T>
struct entry_run {
    using number = arithmetic_type<T>;
    const storage_word<T>* base = nullptr; ///< null where there is none
    const void* const* tasks = nullptr; ///< stored words of each
    std::size_t task_count = 0;
    const void* const* beside = nullptr; ///< numbers that lie beside the models; null for those that are not there
    /// Random words for each task, less 2³¹, as signed words of the number's width; of 16-bit types first those of even
    /// entries, and `half_of_draws` words later those of odd ones.
    const void* const* draws = nullptr;
    std::size_t half_of_draws = 0;
    storage_word<T>* out = nullptr; ///< of the first entry of the run
    std::size_t first = 0, size = 0; ///< the run among the entries that the pointers point to
    std::uint64_t place = 0; ///< of the first entry, in the concatenation of all tensors
};

/// What a kernel tells: counts, and the largest magnitude bits of what was watched.
template <arithmetic_element A>
struct run_findings {
    merge_tally* tally = nullptr;
    bits_type<A> largest = 0;
};

TASKVEC_KERNELS_BEGIN

/// The entries that a body is called with. `held` tasks are known when it is compiled (0: any number).
template <storage_element T, int bytes, int held, int part_of_pack>
class entries {
    using stored = stored_pack<T, bytes>;

public:
    using number = arithmetic_type<T>;
    using pack = typename stored::pack_type;
    using words = typename pack::words;
    using mask = typename pack::mask;

    TASKVEC_INLINE entries(const entry_run<T>& run, std::size_t at, const stored& base, const stored* tasks,
        words* counts, words* counts_of_tasks, words& largest) noexcept
        : run_(&run)
        , at_(at)
        , base_(&base)
        , tasks_(tasks)
        , counts_(counts)
        , counts_of_tasks_(counts_of_tasks)
        , largest_(&largest)
    { }

    [[nodiscard]] TASKVEC_INLINE std::size_t tasks() const noexcept
    {
        if constexpr (held > 0) { return held; }
        else {
            return run_->task_count;
        }
    }
    /// θ0; 0 where there is no base.
    [[nodiscard]] TASKVEC_INLINE pack base() const noexcept { return base_->template get<part_of_pack>(); }
    [[nodiscard]] TASKVEC_INLINE bool has_base() const noexcept { return run_->base != nullptr; }
    /// θt.
    [[nodiscard]] TASKVEC_INLINE pack task(std::size_t t) const noexcept
    {
        if constexpr (held > 0) { return tasks_[t].template get<part_of_pack>(); }
        else {
            stored loaded;
            loaded.load(static_cast<const storage_word<T>*>(run_->tasks[t]) + at_);
            return loaded.template get<part_of_pack>();
        }
    }
    /// τt = θt − θ0.
    [[nodiscard]] TASKVEC_INLINE pack delta(std::size_t t) const noexcept { return task(t) - base(); }
    /// Whether operand b beside the models is there for this tensor, and its entries.
    [[nodiscard]] TASKVEC_INLINE bool has_beside(std::size_t b) const noexcept { return run_->beside[b] != nullptr; }
    [[nodiscard]] TASKVEC_INLINE pack beside(std::size_t b) const noexcept
    {
        static_assert(stored::parts == 1, "what lies beside the models is read with rows of the arithmetic type");
        stored_pack<number, bytes> loaded;
        loaded.load(static_cast<const number*>(run_->beside[b]) + at_);
        return loaded.template get<0>();
    }
    /// The random words of task t's entries, less 2³¹ (see random_stream).
    [[nodiscard]] TASKVEC_INLINE words draws(std::size_t t) const noexcept
    {
        using lanes = typename taskvec::detail::vector_of<signed_word<number>, bytes>::anywhere;
        const auto* words_of_task = static_cast<const signed_word<number>*>(run_->draws[t]);
        if constexpr (sizeof(T) == sizeof(number)) { words_of_task += at_; }
        else {
            words_of_task += (bytes == 0 ? at_ % 2 : part_of_pack) * run_->half_of_draws + at_ / 2;
        }
        return {*reinterpret_cast<const lanes*>(words_of_task)};
    }
    /// Whether entries come before a place of the concatenation of all tensors: all of a pack, or none.
    [[nodiscard]] TASKVEC_INLINE bool before(std::uint64_t place) const noexcept { return run_->place < place; }

    /// f(0) + f(1) + … over the tasks, in order. No f(t) is −0: the first is taken as it is.
    template <class F>
    [[nodiscard]] TASKVEC_INLINE pack total_of(const F& f) const
    {
        if constexpr (held > 0) {
            pack sum = f(std::size_t{0});
            TASKVEC_UNROLL(8)
            for (std::size_t t = 1; t < held; ++t) { sum = sum + f(t); }
            return sum;
        }
        else {
            return sum_of(f);
        }
    }
    /// +0 + f(0) + f(1) + … over the tasks, in order.
    template <class F>
    [[nodiscard]] TASKVEC_INLINE pack sum_of(const F& f) const
    {
        pack sum{};
        each([&](std::size_t t) TASKVEC_BODY { sum = sum + f(t); });
        return sum;
    }
    /// f(t) for every task, in order.
    template <class F>
    TASKVEC_INLINE void each(const F& f) const
    {
        if constexpr (held > 0) {
            TASKVEC_UNROLL(8)
            for (std::size_t t = 0; t < held; ++t) { f(t); }
        }
        else {
            const std::size_t count = run_->task_count;
            for (std::size_t t = 0; t < count; ++t) { f(t); }
        }
    }
    /// f as a list that may be asked for each task several times: the first of them kept, in registers where their
    /// number is known, what comes after them computed again. see(t, f(t)) is called for every task, in order.
    template <class F>
    class list {
    public:
        template <class See>
        TASKVEC_INLINE list(const entries& in, const F& f, const See& see)
            : f_(f)
        {
            if constexpr (held > 0) {
                TASKVEC_UNROLL(8)
                for (std::size_t t = 0; t < held; ++t) { see(t, kept_[t] = f(t)); }
            }
            else {
                const std::size_t count = in.tasks() < room ? in.tasks() : room;
                for (std::size_t t = 0; t < count; ++t) { see(t, kept_[t] = f(t)); }
                for (std::size_t t = room; t < in.tasks(); ++t) { see(t, f(t)); }
            }
        }
        [[nodiscard]] TASKVEC_INLINE pack operator()(std::size_t t) const
        {
            if constexpr (held > 0) { return kept_[t]; }
            else {
                return t < room ? kept_[t] : f_(t);
            }
        }

    private:
        static constexpr std::size_t room = held > 0 ? held : 16;
        const F& f_;
        pack kept_[room];
    };
    template <class F, class See>
    [[nodiscard]] TASKVEC_INLINE list<F> list_of(const F& f, const See& see) const
    {
        return list<F>(*this, f, see);
    }

    /// Adds the entries that a mask holds for to a count.
    TASKVEC_INLINE void count(std::size_t slot, const mask& chosen) const noexcept
    {
        counts_[slot].lanes -= chosen.lanes;
    }
    /// Whether statistics are asked for; and a count for each task.
    [[nodiscard]] TASKVEC_INLINE bool counts_tasks() const noexcept
    {
        if constexpr (held > 0) { return false; }
        else {
            return counts_of_tasks_ != nullptr;
        }
    }
    TASKVEC_INLINE void count_of(std::size_t slot, std::size_t t, const mask& chosen) const noexcept
    {
        counts_of_tasks_[slot * run_->task_count + t].lanes -= chosen.lanes;
    }
    /// Tells the walk of a value that NaN and infinity in an input cannot but reach (bodies with `watches`).
    TASKVEC_INLINE void watch(const pack& x) const noexcept { *largest_ = larger(*largest_, magnitude_of(x)); }

private:
    const entry_run<T>* run_;
    std::size_t at_;
    const stored *base_, *tasks_;
    words *counts_, *counts_of_tasks_, *largest_;
};

/// Calls a body for every pack of a run: whole lines of 64 bytes with vectors, any number of entries with scalars.
template <storage_element T, int held, class Body>
struct merge_kernel {
    using number = arithmetic_type<T>;
    static constexpr std::size_t line = 64 / sizeof(T);

    const Body& body;
    const entry_run<T>& run_of;
    run_findings<number>& findings;
    std::int32_t* lanes_of_tasks; ///< room for the lanes of task_slots · tasks counts; null: not counted
    std::size_t task_slots;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        using stored = stored_pack<T, bytes>;
        using words = typename stored::pack_type::words;
        const Body merge = body;
        const entry_run<T> in = run_of;
        constexpr std::size_t group = bytes == 0 ? 1 : line, step = stored::entries;
        words counts[merge_tally::slot_count]{}, largest{};
        words* const of_tasks = reinterpret_cast<words*>(lanes_of_tasks);
        const storage_word<T>* x[held > 0 ? held : 1];
        if constexpr (held > 0) {
            TASKVEC_UNROLL(8)
            for (int t = 0; t < held; ++t) { x[t] = static_cast<const storage_word<T>*>(in.tasks[t]); }
        }
        storage_word<T>* TASKVEC_RESTRICT out = in.out - in.first;
        const std::size_t last = in.first + in.size;
        for (std::size_t i = in.first; i + group <= last; i += group) {
            if constexpr (bytes > 0) {
                if constexpr (held > 0) {
                    TASKVEC_UNROLL(8)
                    for (int t = 0; t < held; ++t) { fetch(x[t] + i); }
                }
                else {
                    for (std::size_t t = 0; t < in.task_count; ++t) {
                        fetch(static_cast<const storage_word<T>*>(in.tasks[t]) + i);
                    }
                }
                if (in.base) { fetch(in.base + i); }
            }
            TASKVEC_UNROLL(1)
            for (std::size_t at = i; at < i + group; at += step) {
                stored base, tasks[held > 0 ? held : 1], made;
                if (in.base) { base.load(in.base + at); }
                else {
                    base.raw = decltype(base.raw){};
                }
                if constexpr (held > 0) {
                    TASKVEC_UNROLL(8)
                    for (int t = 0; t < held; ++t) { tasks[t].load(x[t] + at); }
                }
                {
                    entries<T, bytes, held, 0> part(in, at, base, tasks, counts, of_tasks, largest);
                    watch_inputs(part);
                    made.template put<0>(merge(part));
                }
                if constexpr (stored::parts == 2) {
                    entries<T, bytes, held, 1> part(in, at, base, tasks, counts, of_tasks, largest);
                    watch_inputs(part);
                    made.template put<1>(merge(part));
                }
                made.store(out + at);
            }
        }
        for (std::size_t k = 0; k < merge_tally::slot_count; ++k) { findings.tally->counts[k] += added_up(&counts[k]); }
        findings.largest = largest_lane(&largest, findings.largest);
        if constexpr (held == 0) {
            if (of_tasks) {
                for (std::size_t k = 0; k < task_slots * in.task_count; ++k) {
                    findings.tally->of_tasks[k] += added_up(of_tasks + k);
                    of_tasks[k] = words{};
                }
            }
        }
    }

private:
    template <class Word>
    static TASKVEC_INLINE void fetch(const Word* words) noexcept
    {
        TASKVEC_PREFETCH(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(words) + 4096), 3);
    }
    template <class In>
    static TASKVEC_INLINE void watch_inputs(const In& in) noexcept
    {
        if constexpr (!Body::watches) {
            if (in.has_base()) { in.watch(in.base()); }
            in.each([&](std::size_t t) TASKVEC_BODY { in.watch(in.task(t)); });
        }
    }
    template <class Words>
    static TASKVEC_INLINE std::uint64_t added_up(const Words* words) noexcept
    {
        using word = typename Words::word;
        word lanes[sizeof(Words) / sizeof(word)];
        std::memcpy(lanes, words, sizeof lanes);
        std::uint64_t sum = 0;
        for (const word lane : lanes) { sum += static_cast<std::uint64_t>(lane); }
        return sum;
    }
    template <class Words>
    static TASKVEC_INLINE bits_type<number> largest_lane(const Words* words, bits_type<number> largest) noexcept
    {
        using word = typename Words::word;
        word lanes[sizeof(Words) / sizeof(word)];
        std::memcpy(lanes, words, sizeof lanes);
        for (const word lane : lanes) {
            largest = static_cast<bits_type<number>>(lane) > largest ? static_cast<bits_type<number>>(lane) : largest;
        }
        return largest;
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

} // namespace taskvec::inline TASKVEC_ABI
