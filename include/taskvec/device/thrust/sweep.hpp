// The primitives of the gpu policy: a sweep of a functor over indices, and ordered compaction.
// SPDX-License-Identifier: Apache-2.0
//
// Transforms, reductions and histograms are all sweeps. A sum has its shape in the functor (one worker for each partial
// sum), a count or a histogram is integers, which atomic additions give the same value in any order: nothing depends on
// how many workers there are, so results are the same on every system. A sweep allocates nothing and does not wait.
#pragma once

#include <taskvec/core/rounding.hpp>
#include <taskvec/device/thrust/system.hpp>

#include <thrust/copy.h>
#include <thrust/for_each.h>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/system_error.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

// GNU's libgomp is not instrumented, so that ThreadSanitizer sees neither the start nor the end of a team of threads:
// it is told.
#if defined(__SANITIZE_THREAD__)
#define TASKVEC_WATCHED 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TASKVEC_WATCHED 1
#endif
#endif
#if defined(TASKVEC_WATCHED)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace taskvec::inline TASKVEC_ABI::device {

using elementwise::counter;
using elementwise::indices;

/// Calls functor(indices) so that every index in [0, count) is handed out exactly once. Queued on the policy's stream.
template <class Functor>
void sweep(const gpu& policy, std::uint64_t count, const Functor& functor);

/// Writes those of the indices [0, count) that `keep` says yes to, in ascending order, to `out` (room for all of them);
/// returns how many. Waits for the policy's stream.
template <class Predicate>
[[nodiscard]] std::size_t compact(const gpu& policy, std::uint64_t count, const Predicate& keep, std::uint64_t* out);

namespace detail {

/// What happens before a team of host threads starts is seen by each of its threads, and what they do is seen by
/// whoever goes on.
class team {
#if defined(TASKVEC_WATCHED)
public:
    team() { __tsan_release(&started_); }
    void joined() { __tsan_acquire(&ended_); }
    class member {
    public:
        explicit member(team* of)
            : team_(of)
        {
            __tsan_acquire(&team_->started_);
        }
        ~member() { __tsan_release(&team_->ended_); }

    private:
        team* team_;
    };

private:
    char started_ = 0, ended_ = 0;
#else
public:
    void joined() { }
    struct member {
        TASKVEC_HOST_DEVICE explicit member(team*) { }
    };
#endif
};

/// A functor as workers hold it: a copy on a device, the caller's own on host threads.
template <class Functor>
class handed {
public:
    explicit handed(const Functor& functor)
#if TASKVEC_ON_CUDA
        : functor_(functor)
    { }
    [[nodiscard]] TASKVEC_HOST_DEVICE const Functor& get() const { return functor_; }

private:
    Functor functor_;
#else
        : functor_(&functor)
    { }
    [[nodiscard]] const Functor& get() const { return *functor_; }

private:
    const Functor* functor_;
#endif
};

/// Hands a functor the indices of one worker.
template <class Functor>
struct sweep_worker {
    handed<Functor> functor;
    std::uint64_t count, workers;
    team* of;

    TASKVEC_HOST_DEVICE void operator()(std::uint64_t worker) const
    {
        [[maybe_unused]] const team::member member(of);
#if TASKVEC_ON_CUDA
        functor.get()(indices{worker, count, workers, worker});
#else
        const std::uint64_t run = (count + workers - 1) / workers, first = run * worker;
        if (first < count) { functor.get()(indices{first, first + run < count ? first + run : count, 1, worker}); }
#endif
    }
};

/// Asks a predicate for one index.
template <class Predicate>
struct watched_predicate {
    handed<Predicate> keep;
    team* of;

    TASKVEC_HOST_DEVICE bool operator()(std::uint64_t i) const
    {
        [[maybe_unused]] const team::member member(of);
        return keep.get()(i);
    }
};

#if TASKVEC_ON_CUDA
/// Thrust's own scratch, from the policy's allocator.
class scratch_allocator {
public:
    using value_type = char;
    explicit scratch_allocator(const gpu& policy)
        : policy_(policy)
    { }
    char* allocate(std::ptrdiff_t bytes)
    {
        return static_cast<char*>(device::allocate(policy_, static_cast<std::size_t>(bytes)));
    }
    void deallocate(char* place, std::size_t bytes) { device::deallocate(policy_, place, bytes); }

private:
    gpu policy_;
};
#endif

/// Calls an algorithm of Thrust; its error becomes a backend_error with the vendor's code.
template <class Call>
auto call(const char* name, const Call& algorithm)
{
#if defined(TASKVEC_NO_EXCEPTIONS)
    (void)name;
    return algorithm();
#else
    try {
        return algorithm();
    }
    catch (const thrust::system_error& failure) {
#if TASKVEC_ON_CUDA
        check(static_cast<vendor::error_type>(failure.code().value()), name);
#endif
        raise<backend_error>(error_code::device_call, failure.what(), name, failure.code().value());
    }
#endif
}

} // namespace detail

template <class Functor>
void sweep(const gpu& policy, std::uint64_t count, const Functor& functor)
{
    if (count == 0) { return; }
#if TASKVEC_ON_CUDA
    constexpr std::uint64_t most = std::uint64_t{1} << 18; // more threads than any device runs at once
    const std::uint64_t workers = std::min(count, most);
#else
    const std::uint64_t workers = std::clamp<std::uint64_t>(count / 2048, 1, 256);
    if (workers == 1) { return functor(indices{0, count, 1, 0}); } // not worth a team of threads
#endif
    detail::team team;
    detail::call("thrust::for_each_n", [&] {
        thrust::for_each_n(execution(policy), thrust::counting_iterator<std::uint64_t>(0), workers,
            detail::sweep_worker<Functor>{detail::handed<Functor>(functor), count, workers, &team});
        return 0;
    });
    team.joined();
}

template <class Predicate>
std::size_t compact(const gpu& policy, std::uint64_t count, const Predicate& keep, std::uint64_t* out)
{
    if (count == 0) { return 0; }
    const thrust::counting_iterator<std::uint64_t> first(0), last = first + static_cast<std::ptrdiff_t>(count);
    detail::team team;
    const detail::watched_predicate<Predicate> watched{detail::handed<Predicate>(keep), &team};
    const auto end = detail::call("thrust::copy_if", [&] {
#if TASKVEC_ON_CUDA
        detail::scratch_allocator scratch(policy);
        return thrust::copy_if(thrust::cuda::par(scratch).on(stream_of(policy)), first, last, out, watched);
#else
        return thrust::copy_if(execution(policy), first, last, out, watched);
#endif
    });
    team.joined();
    return static_cast<std::size_t>(end - out);
}

} // namespace taskvec::inline TASKVEC_ABI::device

#undef TASKVEC_WATCHED
