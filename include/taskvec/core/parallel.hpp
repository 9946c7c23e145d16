// The CPU's parallel loop over blocks: errors carried across threads, cancellation, progress, one scratch a worker.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/policy.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory_resource>
#include <string_view>

// <thread> costs a file a sixth of a second; what is needed of it is a few calls of POSIX.
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#else
#include <thread>
#include <vector>
#endif

namespace taskvec::inline TASKVEC_ABI {

/// Number of workers that a policy may use for `count` independent pieces of work.
[[nodiscard]] inline std::size_t worker_count(const cpu& policy, std::size_t count);

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

/// Calls body(index, worker) once for each index in [0, count); `worker` < worker_count(policy, count) names a slot
/// that no other call uses at the same time. Indices are handed out in ascending order. The error of the lowest index
/// that failed is rethrown after all workers have stopped; indices above a failed one may be skipped, those below never
/// are: which error is reported does not depend on threads.
inline void for_each_index(
    const cpu& policy, std::size_t count, function_ref<void(std::size_t index, std::size_t worker)> body);

namespace detail {

/// How many threads the machine runs at once; at least 1.
[[nodiscard]] inline std::size_t hardware_threads() noexcept
{
#if defined(__unix__) || defined(__APPLE__)
    const long count = sysconf(_SC_NPROCESSORS_ONLN);
    return count > 0 ? static_cast<std::size_t>(count) : 1;
#else
    return std::max<std::size_t>(1, std::thread::hardware_concurrency());
#endif
}

/// Calls body(0) … body(count − 1), each on a thread of its own, body(0) on this one; returns when all have returned.
/// Where the system gives no more threads this one makes their calls. body does not throw.
TASKVEC_NOINLINE inline void run_on_threads(std::size_t count, function_ref<void(std::size_t)> body)
{
#if defined(__unix__) || defined(__APPLE__)
    constexpr std::size_t most = 256;
    if (count > most) { // the last of these threads starts the others
        run_on_threads(most, [&](std::size_t index) {
            if (index + 1 < most) { body(index); }
            else {
                run_on_threads(count - index, [&](std::size_t rest) { body(index + rest); });
            }
        });
        return;
    }
    struct worker {
        const function_ref<void(std::size_t)>* body;
        std::size_t index;
        pthread_t thread;
    };
    const auto run = [](void* argument) -> void* {
        const worker& mine = *static_cast<worker*>(argument);
        (*mine.body)(mine.index);
        return nullptr;
    };
    worker workers[most];
    std::size_t started = 1;
    for (; started < count; ++started) {
        workers[started] = {&body, started, {}};
        if (pthread_create(&workers[started].thread, nullptr, run, &workers[started]) != 0) { break; }
    }
    body(0);
    for (std::size_t index = started; index < count; ++index) { body(index); }
    for (std::size_t index = 1; index < started; ++index) { pthread_join(workers[index].thread, nullptr); }
#else
    std::vector<std::jthread> threads;
    threads.reserve(count - 1);
    for (std::size_t index = 1; index < count; ++index) {
        threads.emplace_back([&body, index] { body(index); });
    }
    body(0);
#endif
}

/// Holds a lock while it lives; what is waited for is short.
class light_lock {
public:
    explicit light_lock(std::atomic_flag& flag) noexcept
        : flag_(flag)
    {
        while (flag_.test_and_set(std::memory_order_acquire)) { flag_.wait(true, std::memory_order_relaxed); }
    }
    ~light_lock()
    {
        flag_.clear(std::memory_order_release);
        flag_.notify_one();
    }
    light_lock(const light_lock&) = delete;
    light_lock& operator=(const light_lock&) = delete;

private:
    std::atomic_flag& flag_;
};

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
            const light_lock lock(busy_);
            const call_memory none(nullptr); // in the caller's code
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
    std::atomic_flag busy_;
};

} // namespace detail

inline std::size_t worker_count(const cpu& policy, std::size_t count)
{
    const std::size_t wanted = policy.threads ? policy.threads : detail::hardware_threads();
    return std::max<std::size_t>(1, std::min(wanted, count));
}

inline void for_each_index(
    const cpu& policy, std::size_t count, function_ref<void(std::size_t index, std::size_t worker)> body)
{
    if (count == 0) { return; }
    const std::size_t workers = worker_count(policy, count);
    if (workers == 1) {
        for (std::size_t index = 0; index < count; ++index) { body(index, std::size_t{0}); }
        return;
    }
    std::atomic<std::size_t> next{0}, first_failed{count};
#if !defined(TASKVEC_NO_EXCEPTIONS)
    std::atomic_flag busy;
    std::exception_ptr failure;
#endif
    std::pmr::memory_resource* const lists = detail::current_call_memory;
    const auto work = [&](std::size_t worker) {
        const detail::call_memory memory(lists);
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
                const detail::light_lock lock(busy);
                if (index < first_failed.load(std::memory_order_relaxed)) {
                    first_failed.store(index, std::memory_order_relaxed);
                    failure = std::current_exception();
                }
            }
#endif
        }
    };
    if (policy.executor) {
        const detail::call_memory none(nullptr); // whatever else the caller's threads do meanwhile
        policy.executor(workers, work);
    }
    else {
        detail::run_on_threads(workers, work);
    }
#if !defined(TASKVEC_NO_EXCEPTIONS)
    if (failure) { std::rethrow_exception(failure); }
#endif
}

} // namespace taskvec::inline TASKVEC_ABI
