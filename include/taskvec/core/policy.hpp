// Policies: where an algorithm runs, and how. The first argument of every algorithm, by const reference.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/callback.hpp>
#include <taskvec/core/view.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <string_view>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// What a progress_event counts: bytes of the inputs that a phase reads, or the layers of a phase whose work is not
/// reading (decompositions, linear systems).
enum class progress_unit : std::uint8_t { bytes, layers };

/// What a long-running algorithm reports: `done` of `total` units of the phase it is in.
struct progress_event {
    std::string_view phase; ///< what is done, such as "merging"; a phase that comes again begins at 0
    std::uint64_t done = 0; ///< units done
    std::uint64_t total = 0; ///< units of the whole phase
    progress_unit unit = progress_unit::bytes; ///< what is counted
};

/// Called now and then from one thread at a time; returning false stops the work with taskvec::cancelled.
using progress_callback = callback<bool(const progress_event&)>;

/// The caller's own parallel loop: calls body(0) … body(count − 1), each once, in any order and on any threads, and
/// returns when all have returned. `body` never throws.
///
///     taskvec::cpu policy{.executor = [&](std::size_t count, const auto& body) { pool.run(count, body); }};
using parallel_for = callback<void(std::size_t count, function_ref<void(std::size_t)> body)>;

/// What to do with NaN or infinity in an input: an error that names the tensor and index, or let it spread.
enum class nonfinite : std::uint8_t { error, propagate };

/// Run on the CPU. Results do not depend on any of these members.
///
/// Memory: what grows with the elements of tensors comes from `memory`, which is asked from several threads at once
/// unless `threads` is 1: hand in a std::pmr::synchronized_pool_resource, or a resource of your own that locks. A
/// second call of the same kind asks for the same again, so that a resource that keeps what it was given back takes
/// nothing more from the system. Around it, from operator new, goes what lines models up by name, less than 2 KB for
/// each tensor of each model: nothing where a call gets aligned_models (merges but RegMean's, SCE's and those that work
/// on some tensors at a time, selection, pruning) on one thread or the caller's; and the singular values of a
/// decomposition. Eigen's products take up to a few MB a thread from malloc, whatever the sizes, and its large SVD
/// (truncated_svd()) takes its work space there. What a call returns: sparse vectors and saved words lie in memory of
/// `memory`, which must outlive them; matrices, adapters, statistics and lists lie in ordinary memory. Readers and
/// writers of files have no policy.
///
///     taskvec::cpu policy{.threads = 4};
struct cpu {
    /// The space of the views that a call with this policy takes.
    static constexpr memory_space space = memory_space::host;

    unsigned threads = 0; ///< 0: one for each hardware thread
    parallel_for executor{}; ///< empty: threads, started for each call
    std::pmr::memory_resource* memory = nullptr; ///< for scratch; null: std::pmr::get_default_resource()
    progress_callback progress{}; ///< empty: silent
};

/// The caller's own device memory, for scratch: ordered on the stream that is passed on (a cudaStream_t).
class device_memory_resource {
public:
    virtual ~device_memory_resource() = default;
    /// At least `bytes` bytes of device memory, aligned to 256; nullptr when there are not so many.
    [[nodiscard]] virtual void* allocate(std::size_t bytes, void* stream) = 0;
    /// Gives back what allocate() returned, on the same stream or one that waits for it.
    virtual void deallocate(void* place, std::size_t bytes, void* stream) noexcept = 0;
};

/// What outlives a call on a stream: library handles. Made and described by device/cusolver.
class gpu_context;

/// Run on the device of a CUDA stream, or, where the code was compiled for a Thrust host system, on the host threads of
/// that system, whose memory then counts as device memory. Results do not depend on any of these members.
///
/// The type is here so that interfaces can name it without a CUDA header. Each room has its gpu versions in a header of
/// their own (<taskvec/device/methods.hpp> and so on; <taskvec/gpu.hpp> includes them all), for nvcc, or for g++ and
/// clang with THRUST_DEVICE_SYSTEM set to a host system (see docs/gpu.md).
///
///     taskvec::gpu policy{.stream = stream};
struct gpu {
    /// The space of the views that a call with this policy takes.
    static constexpr memory_space space = memory_space::device;

    void* stream = nullptr; ///< a cudaStream_t; null: the default stream
    device_memory_resource* allocator = nullptr; ///< scratch on the device; null: cudaMallocAsync
    gpu_context* context = nullptr; ///< handles to reuse; null: made where they are needed, for the one call
};

namespace detail {
template <class P>
inline constexpr bool is_policy = false;
template <>
inline constexpr bool is_policy<cpu> = true;
template <>
inline constexpr bool is_policy<gpu> = true;

/// The rooms whose algorithms have gpu versions.
enum class gpu_room : std::uint8_t { arithmetic, select, merge, lowrank, reuse };
/// True once the gpu header of a room has been included: it specialises this.
template <class P, gpu_room Room>
inline constexpr bool gpu_header_included = false;
/// gpu, in a program that has not included the gpu header of a room: what the overloads match that say so.
template <class P, gpu_room Room>
concept gpu_without_header = std::same_as<P, gpu> && !gpu_header_included<P, Room>;
} // namespace detail

/// cpu or gpu.
template <class P>
concept policy = detail::is_policy<P>;

/// cpu alone. A function that needs no template otherwise is one over its policy, so that its body, and what that would
/// instantiate of Eigen, costs nothing to compile in a program that never calls it.
template <class P>
concept cpu_policy = std::same_as<P, cpu>;

/// Something that can be read (as elements of one storage type) in the memory space of policy P.
template <class X, class P>
concept input_of =
    viewable<const std::remove_reference_t<X>> && (view_of<const std::remove_reference_t<X>>::space == P::space);

/// Something that can be written in the memory space of policy P, and is still there afterwards.
template <class X, class P>
concept output_of = viewable<X> && outlives_the_expression<X> && (view_of<X>::space == P::space)
    && !std::is_const_v<typename view_of<X>::element_type>;

} // namespace taskvec::inline TASKVEC_ABI
