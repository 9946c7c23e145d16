// Policies: where an algorithm runs, and how. The first argument of every algorithm, by const reference.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/view.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory_resource>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// What a long-running algorithm reports: `done` of `total` bytes of the phase it is in.
struct progress_event {
    std::string_view phase;
    std::uint64_t done = 0;
    std::uint64_t total = 0;
};

/// Called now and then from one thread at a time; returning false stops the work with taskvec::cancelled.
using progress_callback = std::function<bool(const progress_event&)>;

/// The caller's own parallel loop: calls body(0) … body(count − 1), each once, in any order and on any threads, and
/// returns when all have returned. `body` never throws.
using parallel_for = std::function<void(std::size_t count, const std::function<void(std::size_t)>& body)>;

/// What to do with NaN or infinity in an input: an error that names the tensor and index, or let it spread.
enum class nonfinite : std::uint8_t { error, propagate };

/// Run on the CPU. Results do not depend on any of these members.
///
///     taskvec::cpu policy{.threads = 4};
struct cpu {
    static constexpr memory_space space = memory_space::host;

    unsigned threads = 0; ///< 0: one for each hardware thread
    parallel_for executor{}; ///< empty: std::thread, started for each call
    std::pmr::memory_resource* memory = nullptr; ///< scratch memory; null: std::pmr::get_default_resource()
    progress_callback progress{}; ///< empty: silent
};

namespace detail {
template <class P>
inline constexpr bool is_policy = false;
template <>
inline constexpr bool is_policy<cpu> = true;
} // namespace detail

/// cpu, or gpu once its header is included.
template <class P>
concept policy = detail::is_policy<P>;

/// Something that can be read (as elements of one storage type) in the memory space of policy P.
template <class X, class P>
concept input_of = viewable<const std::remove_reference_t<X>> &&(view_of<const std::remove_reference_t<X>>::space == P::space);

/// Something that can be written in the memory space of policy P.
template <class X, class P>
concept output_of = viewable<X> &&(view_of<X>::space == P::space) && !std::is_const_v<typename view_of<X>::element_type>;

} // namespace taskvec::inline TASKVEC_ABI
