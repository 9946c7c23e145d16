// Keeping entries at random, and dividing them by the density: the drop and rescale of DARE.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/methods/passes.hpp>
#include <taskvec/select/thresholds.hpp>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// The rule of one tensor: entry i of task t is kept, divided by a number, where its word is below `bound`.
template <arithmetic_element A>
struct keep_random_of_tensor {
    static constexpr bool sees_all =
        false; ///< NaN and infinity may be dropped: the walk looks for them in what it reads.
    std::uint64_t key; ///< of random_stream
    const std::uint64_t* bounds; ///< of each task, at most 2³²: everything
    const A* divisors; ///< of each task
    bool draws; ///< whether any task's bound asks for draws

    /// x divided by the task's number where it is kept, 0 where not.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        const std::uint64_t bound = bounds[t];
        if (bound == 0) { return typename In::pack{}; }
        if (bound >> 32 != 0) { return x; } // x / 1 is x
        const auto last = static_cast<signed_word<A>>(static_cast<std::int64_t>(bound) - (std::int64_t{1} << 31));
        return where(in.draws(t) < filled_words<typename In::words>(last), x / divisors[t]);
    }
    /// Whether a body has to draw at all.
    [[nodiscard]] TASKVEC_INLINE bool drawing() const noexcept { return draws; }
    /// The random numbers of task t.
    [[nodiscard]] TASKVEC_HOST_DEVICE random_stream stream(std::size_t t) const noexcept
    {
        return {key, static_cast<std::uint32_t>(t)};
    }
};

/// Keeps each entry with probability `density` (of its task), by draws of (seed, task, tensor name, element index)
/// alone, and divides it by the density unless it is to stay as it is. Errors: invalid_argument unless 0 < density ≤ 1.
class keep_random {
public:
    /// `divided`: what is kept is divided by its density.
    template <class Passes>
    keep_random(Passes& passes, const task_shares& density, std::uint64_t seed, bool divided = true)
        : divisors_(passes, divisors_of(passes.tasks(), density, divided))
    {
        call_vector<std::uint64_t> bounds;
        for (std::size_t t = 0; t < passes.tasks(); ++t) {
            bounds.push_back(keep_below(density.of(t)));
            draws_ = draws_ || (bounds.back() != 0 && bounds.back() >> 32 == 0);
        }
        bounds_ = passes.keep(std::move(bounds));
        for (const auto& tensor : passes.models().tensors()) { keys_.push_back(hash64(tensor.name, seed)); }
    }
    /// The rule of a tensor, in the arithmetic type A.
    template <arithmetic_element A>
    [[nodiscard]] keep_random_of_tensor<A> get(std::size_t tensor) const noexcept
    {
        return {keys_[tensor], bounds_, divisors_.get<A>(), draws_};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    [[nodiscard]] static double checked(double density)
    {
        if (!(density > 0.0 && density <= 1.0)) {
            raise<invalid_argument>(error_code::density_out_of_range,
                message("density is ", density, "; expected a share in (0, 1], such as 0.5"));
        }
        return density;
    }

    [[nodiscard]] static call_vector<double> divisors_of(std::size_t tasks, const task_shares& density, bool divided)
    {
        call_vector<double> divisors;
        for (std::size_t t = 0; t < tasks; ++t) {
            const double share = checked(density.of(t));
            divisors.push_back(divided ? share : 1.0);
        }
        return divisors;
    }

    kept_numbers divisors_;
    const std::uint64_t* bounds_ = nullptr;
    bool draws_ = false;
    call_vector<std::uint64_t> keys_;
};

} // namespace taskvec::inline TASKVEC_ABI
