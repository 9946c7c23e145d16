// What a keep rule takes of each task vector's L1 norm, and the factors that give it back: mergekit's `rescale`.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/methods/passes.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For every tensor and task Σ|τ| / Σ|kept τ|, [tensor][task]: in f64 with a fixed shape; 1 where either sum is below
/// 1e-7, as in mergekit. Cost: one read of the models, entry by entry. On the CPU only: invalid_argument elsewhere.
template <class Passes, class Keep>
[[nodiscard]] std::vector<std::vector<double>> l1_factors(Passes& passes, const Keep& keep);

namespace detail {

/// One entry as a keep rule sees it, outside of a merge's kernel.
template <arithmetic_element A>
struct lone_entry {
    using number = A;
    using pack = taskvec::pack<A, 0>;
    using words = typename pack::words;
    using mask = typename pack::mask;
    std::uint64_t place = 0;
    std::uint32_t word = 0; ///< of the rule's stream

    [[nodiscard]] TASKVEC_INLINE bool before(std::uint64_t end) const noexcept { return place < end; }
    [[nodiscard]] TASKVEC_INLINE words draws(std::size_t) const noexcept
    {
        return {static_cast<signed_word<A>>(static_cast<std::int64_t>(word) - (std::int64_t{1} << 31))};
    }
};

/// x as the rule of a tensor keeps it, for the entry `at` of the tensor.
template <arithmetic_element A, class Rule>
[[nodiscard]] A kept_entry(const Rule& rule, std::size_t t, std::uint64_t position, std::uint64_t at, A x)
{
    lone_entry<A> entry{position + at, 0};
    if constexpr (requires { rule.stream(t); }) {
        if (rule.drawing()) { entry.word = rule.stream(t).word(at); }
    }
    return rule(entry, t, pack<A, 0>{x}).lanes;
}

} // namespace detail

template <class Passes, class Keep>
std::vector<std::vector<double>> l1_factors(Passes& passes, const Keep& keep)
{
    if constexpr (Passes::space != memory_space::host) {
        static_cast<void>(keep);
        raise<invalid_argument>(error_code::device_unavailable,
            "L1 norms of what is kept are summed on the CPU: merge there, or do not rescale");
    }
    else {
        const std::size_t tasks = passes.tasks();
        auto sums = tensor_sums<storage_of<Passes>>(
            passes.policy(), passes.models(), 2 * tasks, 0, "norms", [&]<class A>(row_block<A>& rows, double* sum) {
                const auto rule = keep.template get<A>(rows.tensor_index());
                for (std::size_t t = 0; t < tasks; ++t) {
                    const A* const x = rows.delta(t);
                    double all = 0, kept = 0;
                    for (std::size_t i = 0; i < rows.size(); ++i) {
                        const A taken = detail::kept_entry(rule, t, rows.tensor().position, rows.offset() + i, x[i]);
                        all += std::abs(static_cast<double>(x[i]));
                        kept += std::abs(static_cast<double>(taken));
                    }
                    sum[2 * t] = all;
                    sum[2 * t + 1] = kept;
                }
            });
        for (auto& of_tensor : sums) {
            for (std::size_t t = 0; t < tasks; ++t) {
                const double all = of_tensor[2 * t], kept = of_tensor[2 * t + 1];
                of_tensor[t] = all < 1e-7 || kept < 1e-7 ? 1.0 : all / kept;
            }
            of_tensor.resize(tasks);
        }
        return sums;
    }
}

} // namespace taskvec::inline TASKVEC_ABI
