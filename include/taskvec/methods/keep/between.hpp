// Keeping the entries of middling magnitude of every task vector, without outliers: the masks of Model Breadcrumbs.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/methods/keep/top.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

/// The rule of one tensor: what is among the top entries of `upper`, and not among those of `outliers`.
template <arithmetic_element A>
struct keep_between_of_tensor {
    /// NaN and infinity are outliers, which are dropped.
    static constexpr bool sees_all = false;
    keep_top_of_tensor<A> upper, outliers; ///< what is kept or above it, and what is above it

    /// x where it is kept, 0 where not.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        return select(outliers(in, t, x) == 0, upper(in, t, x), typename In::pack{});
    }
    [[nodiscard]] std::uint64_t constant_until(std::uint64_t place, std::uint64_t end) const noexcept
    {
        return outliers.constant_until(place, upper.constant_until(place, end));
    }
};

/// Of n entries of a task vector (of a tensor, or of all) the floor(gamma·n) largest magnitudes are dropped as
/// outliers, the floor(density·n) below them are kept, and the rest is dropped; where gamma and density leave no room
/// for both, fewer outliers are dropped. Among equals the lowest index counts as the largest. Errors: invalid_argument
/// unless 0 < density ≤ 1 and 0 ≤ gamma < 1 for every task. Cost: about two reads of the models.
class keep_between {
public:
    /// `passes`: of the models that are merged; `over`: what a share counts over.
    template <class Passes>
    keep_between(Passes& passes, const task_shares& density, const task_shares& gamma, scope over)
        : outliers_(
              passes, [&](std::uint64_t n, std::size_t t) { return outlier_count(density.of(t), gamma.of(t), n); },
              over)
        , kept_(
              passes,
              [&](std::uint64_t n, std::size_t t) {
                  return outlier_count(density.of(t), gamma.of(t), n) + share(density.of(t), n);
              },
              over)
    { }
    /// The rule of a tensor, in the arithmetic type A.
    template <arithmetic_element A>
    [[nodiscard]] keep_between_of_tensor<A> get(std::size_t tensor) const noexcept
    {
        return {kept_.get<A>(tensor), outliers_.get<A>(tensor)};
    }
    [[nodiscard]] unsigned walks() const noexcept { return outliers_.walks() + kept_.walks(); }

private:
    [[nodiscard]] static std::uint64_t share(double of, std::uint64_t n)
    {
        return static_cast<std::uint64_t>(std::floor(of * static_cast<double>(n)));
    }
    [[nodiscard]] static std::uint64_t outlier_count(double density, double gamma, std::uint64_t n)
    {
        static_cast<void>(top_k_count(density, n)); // refuses a wrong density
        if (!(gamma >= 0.0 && gamma < 1.0)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("gamma is ", gamma, "; expected a share from 0 to below 1, such as 0.01 for the top 1%"));
        }
        return std::min(share(gamma, n), n - share(density, n));
    }

    keep_top outliers_, kept_;
};

} // namespace taskvec::inline TASKVEC_ABI
