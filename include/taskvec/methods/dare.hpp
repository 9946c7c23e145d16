// DARE: drop entries at random and rescale the rest. Yu et al., "Language models are super Mario" (ICML 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/option_table.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/ties.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Task arithmetic over task vectors of which each entry is kept with probability `density` and divided by `density`.
/// The draw of an entry is random_stream(seed, task, tensor name).word(flat index) < keep_below(density): a function of
/// these alone, so results do not depend on threads, blocks or the other tensors. Bit-exact.
///
///     merge(cpu{}, dare_options{.density = 0.5, .seed = 7}, base, tasks, out);
struct dare_options {
    double density = 0.5;
    std::uint64_t seed = 0;
    double lambda = 1.0;
    std::vector<double> weights{};
};

/// DARE, then TIES without its trim: election and disjoint merge over what was kept. `ties.density` is not used.
///
///     merge(cpu{}, dare_ties_options{.density = 0.5, .ties = {.lambda = 0.7}}, base, tasks, out);
struct dare_ties_options {
    double density = 0.5;
    std::uint64_t seed = 0;
    ties_options ties{};
};

template <>
struct options_of<dare_options> {
    static constexpr option_table table{
        option_row("density", &dare_options::density, "share of entries kept", share_details(common_densities)),
        option_row("seed", &dare_options::seed, "of random choices"),
        option_row("lambda", &dare_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&dare_options::weights)};
};
template <>
struct options_of<dare_ties_options> {
    static constexpr option_table table{
        option_row("density", &dare_ties_options::density, "share of entries kept", share_details(common_densities)),
        option_row("seed", &dare_ties_options::seed, "of random choices"),
        options_within(&dare_ties_options::ties, "density", "trim")};
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// x = x / density where the element's word is below `bound` (at most 2^32), otherwise 0.
template <arithmetic_element A>
TASKVEC_NOINLINE void drop_and_rescale(
    A* TASKVEC_RESTRICT x, const std::uint32_t* TASKVEC_RESTRICT words, std::uint32_t last, A density, std::size_t n)
{
    for (std::size_t i = 0; i < n; ++i) {
        const A rescaled = x[i] / density;
        x[i] = words[i] <= last ? rescaled : A{0};
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// keep_below(density), at most 2^32. Errors: invalid_argument unless 0 < density ≤ 1.
[[nodiscard]] inline std::uint64_t checked_keep_below(double density)
{
    if (!(density > 0.0 && density <= 1.0)) {
        raise<invalid_argument>(message("density is ", density, "; expected a share in (0, 1], such as 0.5"));
    }
    return keep_below(density);
}

/// Drops entries of the task vectors of a block.
class random_drop {
public:
    random_drop(double density, std::uint64_t seed)
        : density_(density)
        , seed_(seed)
        , bound_(checked_keep_below(density))
    { }
    template <arithmetic_element A>
    A* operator()(block<A>& rows, std::size_t t) const
    {
        A* const values = rows.mutable_delta(t);
        if (bound_ >= std::uint64_t{1} << 32) { return values; } // everything is kept, and x / 1 is x
        if (bound_ == 0) {
            kernels::fill(values, A{0}, rows.size());
            return values;
        }
        const random_stream stream(seed_, static_cast<std::uint32_t>(t), rows.tensor().name);
        std::array<std::uint32_t, block_size> words; // blocks start at multiples of 64: four words at a time
        for (std::size_t i = 0; i < rows.size(); i += 4) {
            const auto four = stream.words((rows.offset() + i) / 4);
            for (std::size_t j = 0; j < 4; ++j) { words[i + j] = four[j]; }
        }
        kernels::drop_and_rescale(
            values, words.data(), static_cast<std::uint32_t>(bound_ - 1), static_cast<A>(density_), rows.size());
        return values;
    }

private:
    double density_;
    std::uint64_t seed_, bound_;
};

} // namespace detail

template <>
class detail::merger<dare_options> {
public:
    static constexpr bool needs_base = true, in_place = true;
    static constexpr std::size_t scratch_rows = 0;

    merger(const cpu&, const aligned_models& models, const dare_options& options)
        : drop_(options.density, options.seed)
        , lambda_(options.lambda)
        , weights_(checked_weights(options.weights, models.task_count()))
    {
        check_factor(lambda_, "lambda");
    }
    template <arithmetic_element A>
    void operator()(block<A>& rows, A* merged, merge_tally& tally) const
    {
        if (rows.models().options().statistics) { tally.kept.resize(weights_.size()); }
        for (std::size_t t = 0; t < weights_.size(); ++t) {
            const A weight = static_cast<A>(weights_[t]);
            const A* const left = drop_(rows, t);
            t == 0 ? kernels::begin_sum(merged, left, weight, rows.size())
                   : kernels::accumulate(merged, left, weight, rows.size());
            if (!tally.kept.empty()) {
                tally.kept[t] += static_cast<std::uint64_t>(
                    std::count_if(left, left + rows.size(), [](A value) { return value != 0; }));
            }
        }
        kernels::add_scaled(merged, rows.base(), static_cast<A>(lambda_), rows.size());
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    random_drop drop_;
    double lambda_;
    std::vector<double> weights_;
};

template <>
class detail::merger<dare_ties_options> {
public:
    static constexpr bool needs_base = true, in_place = false;
    static constexpr std::size_t scratch_rows = election::scratch_rows;

    merger(const cpu&, const aligned_models& models, const dare_ties_options& options)
        : drop_(options.density, options.seed)
        , election_(models, options.ties)
    { }
    template <arithmetic_element A>
    void operator()(block<A>& rows, A* merged, merge_tally& tally) const
    {
        for (std::size_t t = 0; t < rows.task_count(); ++t) { drop_(rows, t); }
        election_(rows, merged, tally);
    }
    std::vector<std::size_t> settle(const aligned_models& models, const std::vector<merge_tally>& tallies)
    {
        return election_.settle(models, tallies);
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    random_drop drop_;
    election election_;
};

} // namespace taskvec::inline TASKVEC_ABI
