// The CPU's parallel loop over blocks: errors carried across threads, cancellation, progress, one scratch a worker.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/policy.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Number of workers that a policy may use for `count` independent pieces of work.
[[nodiscard]] inline std::size_t worker_count(const cpu& policy, std::size_t count)
{
    const std::size_t wanted = policy.threads ? policy.threads : std::max(1u, std::thread::hardware_concurrency());
    return std::max<std::size_t>(1, std::min(wanted, count));
}

/// The policy's memory resource.
[[nodiscard]] inline std::pmr::memory_resource* memory_of(const cpu& policy) noexcept
{
    return policy.memory ? policy.memory : std::pmr::get_default_resource();
}

/// The same policy on one thread, silent: for work that is already inside a parallel loop.
[[nodiscard]] inline cpu sequential(const cpu& policy)
{
    return {.threads = 1, .executor = {}, .memory = policy.memory, .progress = {}};
}

namespace detail {

/// Counts finished work and asks the callback, one thread at a time, whether to go on.
class progress_meter {
public:
    progress_meter(
        const cpu& policy, std::string_view phase, std::uint64_t total, progress_unit unit = progress_unit::bytes)
        : callback_(policy.progress)
        , phase_(phase)
        , unit_(unit)
        , total_(total)
        , step_(std::max<std::uint64_t>(1, total / 256))
    { }

    /// Adds `amount`; false once the callback has asked to stop.
    bool advance(std::uint64_t amount)
    {
        if (!callback_) { return true; }
        const std::uint64_t before = done_.fetch_add(amount, std::memory_order_relaxed), after = before + amount;
        if (before / step_ != after / step_ || after >= total_) {
            const std::lock_guard lock(mutex_);
            if (!stopped_.load(std::memory_order_relaxed)
                && !callback_({phase_, std::min(after, total_), total_, unit_})) {
                stopped_.store(true, std::memory_order_relaxed);
            }
        }
        return !stopped_.load(std::memory_order_relaxed);
    }

private:
    const progress_callback& callback_;
    std::string_view phase_;
    progress_unit unit_;
    std::uint64_t total_, step_;
    std::atomic<std::uint64_t> done_{0};
    std::atomic<bool> stopped_{false};
    std::mutex mutex_;
};

} // namespace detail

/// Calls body(index, worker) once for each index in [0, count); `worker` < worker_count(policy, count) names a slot
/// that no other call uses at the same time. Indices are handed out in ascending order. The error of the lowest index
/// that failed is rethrown after all workers have stopped; indices above a failed one may be skipped, those below never
/// are: which error is reported does not depend on threads.
inline void for_each_index(
    const cpu& policy, std::size_t count, const std::function<void(std::size_t index, std::size_t worker)>& body)
{
    if (count == 0) { return; }
    const std::size_t workers = worker_count(policy, count);
    if (workers == 1) {
        for (std::size_t index = 0; index < count; ++index) { body(index, std::size_t{0}); }
        return;
    }
    std::atomic<std::size_t> next{0}, first_failed{count};
#if !defined(TASKVEC_NO_EXCEPTIONS)
    std::mutex mutex;
    std::exception_ptr failure;
#endif
    const auto work = [&](std::size_t worker) {
        for (std::size_t index;
            (index = next.fetch_add(1, std::memory_order_relaxed)) < first_failed.load(std::memory_order_relaxed)
            && index < count;) {
#if defined(TASKVEC_NO_EXCEPTIONS)
            body(index, worker);
#else
            try {
                body(index, worker);
            }
            catch (...) {
                const std::lock_guard lock(mutex);
                if (index < first_failed.load(std::memory_order_relaxed)) {
                    first_failed.store(index, std::memory_order_relaxed);
                    failure = std::current_exception();
                }
            }
#endif
        }
    };
    if (policy.executor) { policy.executor(workers, work); }
    else {
        std::vector<std::jthread> threads;
        threads.reserve(workers - 1);
        for (std::size_t worker = 1; worker < workers; ++worker) { threads.emplace_back(work, worker); }
        work(0);
    }
#if !defined(TASKVEC_NO_EXCEPTIONS)
    if (failure) { std::rethrow_exception(failure); }
#endif
}

} // namespace taskvec::inline TASKVEC_ABI
