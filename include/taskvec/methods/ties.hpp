// TIES: trim, elect signs, merge what agrees. Yadav et al., "TIES-Merging" (NeurIPS 2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/elect/sign.hpp>
#include <taskvec/methods/keep/all.hpp>
#include <taskvec/methods/keep/l1_factors.hpp>
#include <taskvec/methods/keep/top.hpp>
#include <taskvec/methods/merge.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
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
///      with `densities` each task has its own;
///   2. elect: γ = sign(Σ wt·τ̂t), elementwise;
///   3. merge the entries with sign γ: Σ wt·τ̂t / Σ wt (mean), Σ wt·τ̂t (sum), or the wt·τ̂t of largest magnitude (max).
///
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
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    bool rescale = false; ///< what is kept of a task vector gets its L1 norm back, tensor by tensor: mergekit's rescale

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
        densities_row(&ties_options::densities),
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
        option_row("negative-weights", &ties_options::negative_weights, "accept negative weights"),
        option_row("rescale", &ties_options::rescale,
            "give what is kept of a task vector its L1 norm back, tensor by tensor")};
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

/// What elections go by, of options whose weights and densities have been taken up.
[[nodiscard]] inline ties_options election_rules(const ties_options& options)
{
    ties_options rules;
    rules.lambda = options.lambda;
    rules.scope = options.scope;
    rules.combine = options.combine;
    rules.zero_sign = options.zero_sign;
    return rules;
}

/// What zero sums of each tensor elect, from the sums of the signs that each elected; by the majority of the scope.
[[nodiscard]] inline call_vector<int> majority_signs(const ties_options& options, call_vector<std::int64_t> sums)
{
    if (options.scope == scope::model) {
        std::int64_t total = 0;
        for (const auto sum : sums) { total += sum; }
        sums.assign(sums.size(), total);
    }
    call_vector<int> signs;
    for (const auto sum : sums) { signs.push_back(majority_sign(options, sum)); }
    return signs;
}

/// The weights of TIES, of tasks that label(t) names. Errors: invalid_argument.
template <class Label>
[[nodiscard]] call_vector<double> ties_weights(const ties_options& options, std::size_t tasks, const Label& label)
{
    return labelled_weights(options.weights, tasks, label,
        options.negative_weights ? std::string_view()
                                 : "TIES knows negative weights by the semantics of mergekit and PEFT only; give 0 or "
                                   "more, or accept them (negative_weights)");
}

/// The factors of each task in an election with these options. Errors: invalid_argument (weights).
[[nodiscard]] inline election_weights election_weights_of(const ties_options& options, const aligned_models& models)
{
    const std::size_t tasks = models.task_count();
    const auto weights = ties_weights(options, tasks, [&](std::size_t t) { return models.label(t); });
    const call_vector<double> ones(tasks, 1.0);
    return {options.weighted_election ? weights : ones, weights,
        options.combine != disjoint_merge::mean ? call_vector<double>(tasks, 0.0)
            : options.divide_by_count           ? ones
                                                : weights,
        options.agree_when_weighted ? weights : ones};
}

} // namespace detail

/// Any keep rule × sign election: what TIES and DARE-TIES are. `Keep` prepares a rule for every tensor (keep_top,
/// keep_random, keep_all …); the election is that of `options`, whose densities are not looked at.
template <class Keep>
class sign_election_method : public elementwise_method {
    static_assert(detail::check_keep<Keep>());

public:
    static constexpr bool in_place = false;
    static constexpr std::size_t task_slots = 2;

    /// `keep()` makes the rule, once the options have been checked.
    template <class Passes, class MakeKeep>
    sign_election_method(Passes& passes, const ties_options& options, const MakeKeep& keep)
        : sign_election_method(passes, options, detail::election_weights_of(options, passes.models()), keep)
    { }
    /// Calls use(body) with the body of a tensor.
    template <arithmetic_element A, class Use>
    decltype(auto) with_body(std::size_t tensor, Use&& use) const
    {
        using rule = decltype(keep_.template get<A>(tensor));
        const A lambda = static_cast<A>(options_.lambda);
        if (unit_ && signs_[tensor] != 0) {
            return use(unit_election_body<A, rule>{keep_.template get<A>(tensor), lambda,
                signs_[tensor] > 0 ? 0 : static_cast<signed_word<A>>(sign_mask<A>)});
        }
        return use(body<A>(tensor));
    }
    template <arithmetic_element A>
    [[nodiscard]] auto body(std::size_t tensor) const
    {
        using rule = decltype(keep_.template get<A>(tensor));
        const A* factors;
        if constexpr (std::same_as<A, double>) { factors = wide_ + tensor * stride_; }
        else {
            factors = single_ + tensor * stride_;
        }
        return sign_election_body<A, rule>{keep_.template get<A>(tensor), factors, options_.combine,
            static_cast<A>(signs_[tensor]), static_cast<A>(options_.lambda)};
    }

    /// Sets the majority, once every entry has voted; whether it is another than was guessed somewhere.
    bool settle(std::span<const merge_tally> of_tensors)
    {
        const bool majority =
            options_.zero_sign == zero_sign::majority || options_.zero_sign == zero_sign::majority_or_negative;
        if (!majority) { return false; }
        call_vector<std::int64_t> sums;
        for (const auto& tally : of_tensors) {
            sums.push_back(static_cast<std::int64_t>(
                tally.counts[election_counts::positive] - tally.counts[election_counts::negative]));
        }
        signs_ = detail::majority_signs(options_, std::move(sums));
        return true;
    }
    /// Whether a part of a tensor with this tally was merged with a wrong guess.
    [[nodiscard]] bool again(std::size_t tensor, const merge_tally& part) const
    {
        return part.counts[election_counts::unresolved] > 0 && signs_[tensor] != detail::provisional_sign(options_);
    }
    [[nodiscard]] unsigned walks() const noexcept { return keep_.walks() + (stride_ ? 1u : 0u); }

protected:
    /// The prepared rules, for methods that derive from this.
    [[nodiscard]] const Keep& keep() const noexcept { return keep_; }

private:
    template <class Passes, class MakeKeep>
    sign_election_method(
        Passes& passes, const ties_options& options, const election_weights& weights, const MakeKeep& keep)
        : options_(detail::election_rules(options))
        , keep_(keep())
        , stride_(options.rescale ? 4 * weights.value.size() : 0)
        , unit_(options.combine == disjoint_merge::mean && !options.rescale && !passes.models().options().statistics)
        , signs_(passes.models().tensors().size(), detail::provisional_sign(options))
    {
        for (const auto* list : {&weights.elect, &weights.value, &weights.divide, &weights.agree}) {
            for (const double weight : *list) { unit_ = unit_ && weight == 1.0; }
        }
        auto single = election_factors<float>(weights);
        auto wide = election_factors<double>(weights);
        if (options.rescale) {
            single.clear();
            wide.clear();
            for (const auto& factors : l1_factors(passes, keep_)) {
                election_weights scaled = weights;
                for (std::size_t t = 0; t < factors.size(); ++t) {
                    scaled.elect[t] *= factors[t];
                    scaled.value[t] *= factors[t];
                }
                const auto more = election_factors<float>(scaled);
                const auto more_wide = election_factors<double>(scaled);
                single.insert(single.end(), more.begin(), more.end());
                wide.insert(wide.end(), more_wide.begin(), more_wide.end());
            }
        }
        single_ = passes.keep(std::move(single));
        wide_ = passes.keep(std::move(wide));
    }

    ties_options options_;
    Keep keep_;
    const float* single_ = nullptr;
    const double* wide_ = nullptr;
    std::size_t stride_; // from a tensor's factors to the next's: 0 where all have the same
    bool unit_; // weights of 1 and means, not counted: the short body will do
    call_vector<int> signs_; // for each tensor, what a zero sum elects
};

template <>
class method<ties_options> : public sign_election_method<keep_top> {
public:
    template <class Passes>
    method(Passes& passes, const ties_options& options)
        : sign_election_method(passes, options, [&] {
            return keep_top(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
                options.scope, options.trim);
        })
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const ties_options& options) noexcept
    {
        return options.scope == scope::tensor;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, ties_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
