// Keeping the top entries of every task vector by magnitude: the trim of TIES.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/select/thresholds.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// The rule of one tensor: entries whose magnitude is above a task's threshold, or equal to it and placed before
/// equal_end. A kept 0 is none.
template <arithmetic_element A>
struct keep_top_of_tensor {
    /// NaN and infinity are never dropped: their magnitudes are the largest.
    static constexpr bool sees_all = true;
    /// A task's threshold as a pack compares with it: what is kept is above one of two words.
    struct bounds {
        signed_word<A> before = 0, after = 0; ///< for entries placed before equal_end, and for the others
        std::uint64_t equal_end = 0; ///< place in the scope
        bounds() = default;
        /// From a threshold.
        explicit bounds(const top_k_threshold<A>& threshold) noexcept
            : before(static_cast<signed_word<A>>(threshold.magnitude > 0 ? threshold.magnitude - 1 : 0))
            , after(static_cast<signed_word<A>>(threshold.magnitude))
            , equal_end(threshold.equal_end)
        { }
    };
    const bounds* of_tasks; ///< of each task
    std::size_t tasks; ///< how many

    /// x where it is kept, 0 where not.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        const bounds& bound = of_tasks[t];
        const signed_word<A> below = in.before(bound.equal_end) ? bound.before : bound.after;
        return where(magnitude_of(x) > filled_words<typename In::words>(below), x);
    }
    /// The first place after `place` and up to `end` from which on another rule holds.
    [[nodiscard]] std::uint64_t constant_until(std::uint64_t place, std::uint64_t end) const noexcept
    {
        for (std::size_t t = 0; t < tasks; ++t) {
            if (of_tasks[t].equal_end > place) { end = std::min(end, of_tasks[t].equal_end); }
        }
        return end;
    }
};

/// Keeps the top `density` of every task vector over a scope (see trim_thresholds). Cost: about one read of the models.
class keep_top {
public:
    /// The top `density` of each task over `over`, chosen by `rule`.
    template <class Passes>
    keep_top(Passes& passes, const task_shares& density, scope over, trim_rule rule = trim_rule::exact)
        : keep_top(passes, over, trim_thresholds_of(passes, density, over, rule))
    { }
    /// The same for count(n) entries of n, or count(n, t) of task t.
    template <class Passes, entry_count Count>
    keep_top(Passes& passes, const Count& count, scope over)
        : keep_top(passes, over, trim_thresholds_of(passes, count, over))
    { }
    /// The rule of a tensor, in the arithmetic type A.
    template <arithmetic_element A>
    [[nodiscard]] keep_top_of_tensor<A> get(std::size_t tensor) const noexcept
    {
        const std::size_t row = (per_tensor_ ? tensor : 0) * tasks_;
        if constexpr (std::same_as<A, double>) { return {wide_ + row, tasks_}; }
        else {
            return {single_ + row, tasks_};
        }
    }
    [[nodiscard]] unsigned walks() const noexcept { return walks_; }

private:
    template <arithmetic_element A>
    using bounds = typename keep_top_of_tensor<A>::bounds;

    template <class Passes>
    keep_top(Passes& passes, scope over, const trim_thresholds& found)
        : per_tensor_(over == scope::tensor)
        , tasks_(passes.models().task_count())
    {
        walks_ = found.walks();
        const std::size_t rows = per_tensor_ ? passes.models().tensors().size() : 1;
        call_vector<bounds<float>> single;
        call_vector<bounds<double>> wide;
        for (std::size_t row = 0; row < rows; ++row) {
            for (std::size_t t = 0; t < tasks_; ++t) {
                single.emplace_back(found.get<float>(row, t));
                if (passes.models().any_wide()) { wide.emplace_back(found.get<double>(row, t)); }
            }
        }
        single_ = passes.keep(std::move(single));
        wide_ = passes.keep(std::move(wide));
    }

    bool per_tensor_;
    std::size_t tasks_;
    unsigned walks_ = 0;
    const bounds<float>* single_ = nullptr;
    const bounds<double>* wide_ = nullptr;
};

} // namespace taskvec::inline TASKVEC_ABI
