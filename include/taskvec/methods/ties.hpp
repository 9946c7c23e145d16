// TIES: trim, elect signs, merge what agrees. Yadav et al., "TIES-Merging" (NeurIPS 2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/sign_election.hpp>
#include <taskvec/select/thresholds.hpp>

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The sign of an entry whose election sum is exactly 0 while some task vector is not: that of the sum of all elected
/// signs in scope, and if that is 0 too none (majority) or minus (majority_or_negative; but none for
/// disjoint_merge::max, as in the code that this follows); plus; or none. An entry without a sign merges to 0.
enum class zero_sign : std::uint8_t { majority, majority_or_negative, positive, none };

template <>
struct enum_words<zero_sign> {
    static constexpr std::array words{enum_word<zero_sign>{zero_sign::majority, "majority"},
        enum_word<zero_sign>{zero_sign::majority_or_negative, "majority-or-negative"},
        enum_word<zero_sign>{zero_sign::positive, "positive"}, enum_word<zero_sign>{zero_sign::none, "none"}};
};

/// θ* = θ0 + λ·τ, where τ merges the trimmed task vectors τ̂t:
///   1. trim: τ̂t keeps the top `density` of τt by magnitude (k = floor(density·n), at least 1), zeroes the rest;
///   2. elect: γ = sign(Σ wt·τ̂t), elementwise;
///   3. merge the entries with sign γ: Σ wt·τ̂t / Σ wt (mean), Σ wt·τ̂t (sum), or the wt·τ̂t of largest magnitude (max).
/// Sums run in f32 (f64 for f64) in task order; every product, sum and quotient rounds; bit-exact for any threads and
/// blocks. Weights: one for each task, or none for all 1; negative ones only under a preset that gives them a meaning.
/// Cost: two reads of the inputs and one write; a little more where the majority decides.
///
///     merge(cpu{}, ties_options{.density = 0.2}, base, tasks, out);
struct ties_options {
    double density = 0.2;
    double lambda = 1.0;
    std::vector<double> weights{};
    taskvec::scope scope = taskvec::scope::model;
    disjoint_merge combine = disjoint_merge::mean;
    taskvec::zero_sign zero_sign = taskvec::zero_sign::majority;
    trim_rule trim = trim_rule::exact;
    bool weighted_election = true; ///< weights count in the election
    bool divide_by_count = false; ///< the mean divides by the number of agreeing tasks, not by the sum of their weights
    bool agree_when_weighted =
        false; ///< an entry agrees by the sign of wt·τ̂t, so that a negative weight turns its task around
    bool negative_weights = false; ///< negative weights are accepted

    /// What the paper's own code does: the trim keeps one entry more than asked and all its equals (all of them at
    /// density 1), the mean divides by the count, and an unresolved zero counts as negative.
    [[nodiscard]] static ties_options as_in_ties_merging()
    {
        ties_options options;
        options.trim = trim_rule::reach_next;
        options.zero_sign = taskvec::zero_sign::majority_or_negative;
        options.weighted_election = false;
        options.divide_by_count = true;
        return options;
    }
    /// What mergekit does in f32, up to its arbitrary choice among equal magnitudes at the threshold: per tensor,
    /// exactly k, a sum of 0 elects plus, weights apply before the election and in the divisor.
    [[nodiscard]] static ties_options as_in_mergekit()
    {
        ties_options options;
        options.scope = taskvec::scope::tensor;
        options.zero_sign = taskvec::zero_sign::positive;
        options.agree_when_weighted = true;
        options.negative_weights = true;
        return options;
    }
    /// What PEFT does (ties, majority sign "total"): per tensor, exactly k, unweighted election, a sum of 0 elects
    /// plus, the weighted sum is divided by the number of agreeing tasks.
    [[nodiscard]] static ties_options as_in_peft()
    {
        ties_options options;
        options.scope = taskvec::scope::tensor;
        options.zero_sign = taskvec::zero_sign::positive;
        options.weighted_election = false;
        options.divide_by_count = true;
        options.negative_weights = true;
        return options;
    }
};

template <>
struct options_of<ties_options> {
    static constexpr option_table table{
        option_row("density", &ties_options::density, "share of entries kept", share_details(common_densities)),
        option_row("lambda", &ties_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&ties_options::weights),
        option_row("scope", &ties_options::scope, "what a density counts over", {.unit = "SCOPE"}),
        option_row("merge-weights", &ties_options::combine, "how TIES joins agreeing entries", {.unit = "HOW"}),
        option_row("zero-sign", &ties_options::zero_sign, "sign of an entry whose election sum is 0", {.unit = "SIGN"}),
        option_row("trim", &ties_options::trim, "keep exactly k entries, or all that reach the next", {.unit = "RULE"}),
        option_row("weighted-election", &ties_options::weighted_election, "let weights count in the election",
            {.negated = "unweighted-election"}),
        option_row("divide-by-count", &ties_options::divide_by_count,
            "divide the mean by the number of agreeing tasks, not by their weights"),
        option_row("agree-when-weighted", &ties_options::agree_when_weighted,
            "let an entry agree by its sign after its task's weight"),
        option_row("negative-weights", &ties_options::negative_weights, "accept negative weights")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<ties_options>{"paper", "the paper", [] { return ties_options{}; }},
        option_preset<ties_options>{"ties-merging", "the paper's own code", &ties_options::as_in_ties_merging},
        option_preset<ties_options>{"mergekit", "mergekit", &ties_options::as_in_mergekit},
        option_preset<ties_options>{"peft", "PEFT", &ties_options::as_in_peft}};
};

namespace detail {

/// What a zero sum elects where the majority decides and the elected signs in scope add up to `sum`.
[[nodiscard]] inline int majority_sign(const ties_options& options, std::int64_t sum) noexcept
{
    if (sum != 0) { return sum > 0 ? 1 : -1; }
    return options.zero_sign == zero_sign::majority || options.combine == disjoint_merge::max ? 0 : -1;
}

/// What a zero sum elects before the majority is known.
[[nodiscard]] inline int provisional_sign(const ties_options& options) noexcept
{
    return options.zero_sign == zero_sign::none ? 0 : 1;
}

/// What zero sums of each tensor elect, from the sums of the signs that each elected; by the majority of the scope.
[[nodiscard]] inline std::vector<int> majority_signs(const ties_options& options, std::vector<std::int64_t> sums)
{
    if (options.scope == scope::model) {
        std::int64_t total = 0;
        for (const auto sum : sums) { total += sum; }
        sums.assign(sums.size(), total);
    }
    std::vector<int> signs;
    for (const auto sum : sums) { signs.push_back(majority_sign(options, sum)); }
    return signs;
}

/// The factors of each task in an election with these options. Errors: invalid_argument (lambda, weights).
[[nodiscard]] inline election_weights election_weights_of(const ties_options& options, std::size_t tasks)
{
    check_factor(options.lambda, "lambda");
    const auto weights = checked_weights(options.weights, tasks, options.negative_weights);
    const std::vector<double> ones(tasks, 1.0);
    return {options.weighted_election ? weights : ones, weights,
        options.combine != disjoint_merge::mean ? std::vector<double>(tasks, 0.0)
            : options.divide_by_count           ? ones
                                                : weights,
        options.agree_when_weighted ? weights : ones};
}

/// Elects and merges the (trimmed, dropped, …) task vectors in a block's rows. Shared by TIES and DARE-TIES.
class election {
public:
    static constexpr std::size_t scratch_rows = election_rows;

    election(const aligned_models& models, const ties_options& options)
        : options_(options)
    {
        weights_ = election_weights_of(options, models.task_count());
        single_ = election_factors<float>(weights_);
        wide_ = election_factors<double>(weights_);
        signs_.assign(models.tensors().size(), provisional_sign(options));
        unit_mean_ = options.combine == disjoint_merge::mean
            && std::all_of(weights_.value.begin(), weights_.value.end(), [](double weight) { return weight == 1.0; });
    }

    /// Rows 0 … T−1 of `rows` hold the task vectors to merge.
    template <arithmetic_element A>
    void operator()(block<A>& rows, A* merged, merge_tally& tally) const
    {
        const std::size_t tasks = rows.task_count(), n = rows.size();
        const A zero = static_cast<A>(signs_[sign_of(rows)]), lambda = static_cast<A>(options_.lambda);
        const A* factors;
        if constexpr (std::same_as<A, double>) { factors = wide_.data(); }
        else {
            factors = single_.data();
        }
        const bool counting = rows.models().options().statistics;
        add(tally,
            elect_rows(rows.row(0), tasks, block_size, factors, options_.combine, zero, rows.base(), lambda, merged,
                rows.scratch(1), n, counting ? &tally.kept : nullptr, counting ? &tally.conflicting : nullptr));
    }

    /// The whole of TIES on a block in one fused kernel, where there is one: the mean with weights of 1 over a few
    /// finite tasks that are stored alike. threshold(t) is that of task t. False, and nothing said, otherwise.
    template <storage_element T, class Threshold>
    bool fused(
        block<float>& rows, const kernels::stored_output<T>& out, merge_tally& tally, Threshold&& threshold) const
    {
        const std::size_t tasks = rows.task_count();
        const storage_word<T>* base = nullptr;
        std::array<const storage_word<T>*, fused_tasks> stored;
        if (!unit_mean_ || rows.models().options().statistics || tasks > fused_tasks
            || !rows.template stored<T>(base, stored)) {
            return false;
        }
        // Along a block the bound changes only where a task's last kept equal entry lies: cut there.
        std::array<top_k_threshold<float>, fused_tasks> thresholds;
        for (std::size_t t = 0; t < tasks; ++t) {
            thresholds[t] = threshold(t);
            if (thresholds[t].magnitude >= exponent_mask<float>) { return false; }
        }
        election_tally seen;
        for (std::size_t at = 0; at < rows.size();) {
            std::size_t end = rows.size();
            std::array<std::int32_t, fused_tasks> least;
            std::array<const storage_word<T>*, fused_tasks> from;
            for (std::size_t t = 0; t < tasks; ++t) {
                const std::uint64_t place = rows.position() + at;
                const bool equal_kept = place < thresholds[t].equal_end;
                if (equal_kept) {
                    end = static_cast<std::size_t>(
                        std::min<std::uint64_t>(end, thresholds[t].equal_end - rows.position()));
                }
                least[t] = std::max(1,
                    static_cast<std::int32_t>(thresholds[t].magnitude) + (equal_kept ? 0 : 1)); // a kept 0 is no entry
                from[t] = stored[t] + at;
            }
            const kernels::stored_output<T> place{out.words + at, out.stream};
            if (!elect_stored<T>(from.data(), tasks, base + at, least.data(), static_cast<float>(signs_[sign_of(rows)]),
                    static_cast<float>(options_.lambda), place, end - at, seen)) {
                return false;
            }
            at = end;
        }
        add(tally, seen);
        return true;
    }

    /// Once every chunk has voted: sets the majority, and names the chunks that must be merged again because they held
    /// a zero sum and the guess was wrong.
    std::vector<std::size_t> settle(const aligned_models& models, const std::vector<merge_tally>& tallies)
    {
        std::vector<std::size_t> again;
        if (options_.zero_sign != zero_sign::majority && options_.zero_sign != zero_sign::majority_or_negative) {
            return again;
        }
        std::vector<std::int64_t> sums(models.tensors().size(), 0);
        for (std::size_t c = 0; c < tallies.size(); ++c) { sums[models.chunks()[c].tensor] += tallies[c].sign_sum; }
        signs_ = majority_signs(options_, std::move(sums));
        for (std::size_t c = 0; c < tallies.size(); ++c) {
            if (tallies[c].unresolved > 0 && signs_[models.chunks()[c].tensor] != provisional_sign(options_)) {
                again.push_back(c);
            }
        }
        return again;
    }

private:
    static void add(merge_tally& tally, const election_tally& seen) noexcept
    {
        tally.sign_sum += seen.sign_sum;
        tally.unresolved += seen.unresolved;
    }

    /// The place in signs_ of a block's tensor.
    template <arithmetic_element A>
    [[nodiscard]] static std::size_t sign_of(const block<A>& rows) noexcept
    {
        return static_cast<std::size_t>(&rows.tensor() - rows.models().tensors().data());
    }

    ties_options options_;
    election_weights weights_;
    std::vector<float> single_;
    std::vector<double> wide_;
    bool unit_mean_ = false;
    std::vector<int> signs_; // for each tensor, what a zero sum elects
};

} // namespace detail

template <>
class detail::merger<ties_options> {
public:
    static constexpr bool needs_base = true, in_place = false;
    static constexpr std::size_t scratch_rows = election::scratch_rows;

    merger(const cpu& policy, const aligned_models& models, const ties_options& options)
        : election_(models, options)
        , thresholds_(policy, models, options.density, options.scope, options.trim)
    { }
    template <arithmetic_element A>
    void operator()(block<A>& rows, A* merged, merge_tally& tally) const
    {
        for (std::size_t t = 0; t < rows.task_count(); ++t) {
            kernels::trim(rows.mutable_delta(t), rows.size(), rows.position(), threshold(rows, t));
        }
        election_(rows, merged, tally);
    }
    template <storage_element T>
    bool fused(block<float>& rows, const kernels::stored_output<T>& out, merge_tally& tally) const
    {
        return election_.fused(rows, out, tally, [&](std::size_t t) { return threshold(rows, t); });
    }
    std::vector<std::size_t> settle(const aligned_models& models, const std::vector<merge_tally>& tallies)
    {
        return election_.settle(models, tallies);
    }
    [[nodiscard]] unsigned walks() const noexcept { return thresholds_.walks(); }

private:
    template <arithmetic_element A>
    [[nodiscard]] top_k_threshold<A> threshold(const block<A>& rows, std::size_t t) const
    {
        return thresholds_.template get<A>(
            static_cast<std::size_t>(&rows.tensor() - rows.models().tensors().data()), t);
    }

    election election_;
    trim_thresholds thresholds_;
};

} // namespace taskvec::inline TASKVEC_ABI
