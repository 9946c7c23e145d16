// Keeping entries at random, and dividing them by the density: the drop and rescale of DARE.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/core/random.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The rule of one tensor: entry i of task t is kept, divided by a number, where its word is below `bound`.
template <arithmetic_element A>
struct keep_random_of_tensor {
    static constexpr bool sees_all = false;
    static constexpr bool clears_zeros = false;
    std::uint64_t key; ///< of random_stream
    std::uint64_t bound; ///< at most 2³²: everything
    A divisor;

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        if (!drawing()) { return bound == 0 ? typename In::pack{} : x; } // x / 1 is x
        const auto last = static_cast<signed_word<A>>(static_cast<std::int64_t>(bound) - (std::int64_t{1} << 31));
        return where(in.draws(t) < filled_words<typename In::words>(last), x / divisor);
    }
    [[nodiscard]] TASKVEC_INLINE bool drawing() const noexcept { return bound != 0 && bound >> 32 == 0; }
    [[nodiscard]] TASKVEC_HOST_DEVICE random_stream stream(std::size_t t) const noexcept
    {
        return {key, static_cast<std::uint32_t>(t)};
    }
};

/// Keeps each entry with probability `density`, by draws of (seed, task, tensor name, element index) alone, and divides
/// it by the density unless it is to stay as it is. Errors: invalid_argument unless 0 < density ≤ 1.
class keep_random {
public:
    template <class Passes>
    keep_random(const Passes& passes, double density, std::uint64_t seed, bool divided = true)
        : divisor_(divided ? density : 1.0)
        , bound_(keep_below(checked(density)))
    {
        for (const auto& tensor : passes.models().tensors()) { keys_.push_back(hash64(tensor.name, seed)); }
    }
    template <arithmetic_element A>
    [[nodiscard]] keep_random_of_tensor<A> get(std::size_t tensor) const noexcept
    {
        return {keys_[tensor], bound_, static_cast<A>(divisor_)};
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

    double divisor_;
    std::uint64_t bound_;
    std::vector<std::uint64_t> keys_;
};

} // namespace taskvec::inline TASKVEC_ABI
