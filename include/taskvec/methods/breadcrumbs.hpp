// Model Breadcrumbs: task vectors without their outliers and without their smallest entries. Davari and Belilovsky,
// "Model Breadcrumbs: scaling multi-task model merging with sparse masks" (ECCV 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/elect/sum.hpp>
#include <taskvec/methods/keep/between.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/ties.hpp>

#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + λ·Σ wt·τ̂t, where τ̂t drops the floor(gamma·n) largest entries of τt by magnitude, keeps the
/// floor(density·n) below them and drops the rest: n counts a tensor (the paper's layers) or the model. With
/// `densities` and `gammas` each task has its own; with `normalize` the sum is divided by Σ wt; with `rescale` τ̂t gets
/// the L1 norm of τt back, tensor by tensor. Bit-exact for any threads and blocks. Cost: about three reads of the
/// models, one more to rescale (on the CPU only).
///
///     merge(cpu{}, breadcrumbs_options{.density = 0.85, .gamma = 0.01}, base, tasks, out);
struct breadcrumbs_options {
    double density = 0.85;
    double gamma = 0.01;
    double lambda = 0.3;
    std::vector<double> weights{};
    taskvec::scope scope = taskvec::scope::tensor;
    bool normalize = false; ///< divide by the sum of the weights
    bool rescale = false; ///< give what is kept of a task vector its L1 norm back
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    std::vector<double> gammas{}; ///< of each task, or none for `gamma` of all

    /// mergekit's: λ is 1 where none is given.
    [[nodiscard]] static breadcrumbs_options as_in_mergekit()
    {
        breadcrumbs_options options;
        options.lambda = 1.0;
        return options;
    }
};

/// Breadcrumbs in place of the trim of TIES: election and disjoint merge over what they keep. `ties.density` is not
/// used, and `ties.scope` counts for the masks as well.
///
///     merge(cpu{}, breadcrumbs_ties_options{.density = 0.85, .gamma = 0.01}, base, tasks, out);
struct breadcrumbs_ties_options {
    double density = 0.85;
    double gamma = 0.01;
    /// Of election and merge.
    ties_options ties = in_tensors();
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    std::vector<double> gammas{}; ///< of each task, or none for `gamma` of all

    /// What mergekit's breadcrumbs_ties does: what agrees is added up, not averaged.
    [[nodiscard]] static breadcrumbs_ties_options as_in_mergekit()
    {
        breadcrumbs_ties_options options;
        options.ties = ties_options::as_in_mergekit();
        options.ties.combine = disjoint_merge::sum;
        return options;
    }

private:
    [[nodiscard]] static ties_options in_tensors()
    {
        ties_options options;
        options.scope = taskvec::scope::tensor;
        return options;
    }
};

template <>
struct options_of<breadcrumbs_options> {
    static constexpr option_table table{
        option_row("density", &breadcrumbs_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&breadcrumbs_options::densities),
        option_row("gamma", &breadcrumbs_options::gamma, "share of the largest entries dropped as outliers",
            {.unit = "D", .at_least = 0, .at_most = 1}),
        option_row("lambda", &breadcrumbs_options::lambda, "scale of the merged task vector", lambda_details()),
        gammas_row(&breadcrumbs_options::gammas), weights_row(&breadcrumbs_options::weights),
        option_row("scope", &breadcrumbs_options::scope, "what a density counts over", {.unit = "SCOPE"}),
        option_row("normalize-weights", &breadcrumbs_options::normalize, "divide by the sum of the weights"),
        option_row("rescale", &breadcrumbs_options::rescale,
            "give what is kept of a task vector its L1 norm back, tensor by tensor")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<breadcrumbs_options>{"paper", "the paper", [] { return breadcrumbs_options{}; }},
        option_preset<breadcrumbs_options>{"mergekit", "mergekit", &breadcrumbs_options::as_in_mergekit}};
};
template <>
struct options_of<breadcrumbs_ties_options> {
    static constexpr option_table table{option_row("density", &breadcrumbs_ties_options::density,
                                            "share of entries kept", share_details(common_densities)),
        option_row("gamma", &breadcrumbs_ties_options::gamma, "share of the largest entries dropped as outliers",
            {.unit = "D", .at_least = 0, .at_most = 1}),
        densities_row(&breadcrumbs_ties_options::densities), gammas_row(&breadcrumbs_ties_options::gammas),
        options_within(&breadcrumbs_ties_options::ties, "density", "densities", "trim")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<breadcrumbs_ties_options>{"paper", "the paper", [] { return breadcrumbs_ties_options{}; }},
        option_preset<breadcrumbs_ties_options>{"mergekit", "mergekit", &breadcrumbs_ties_options::as_in_mergekit}};
};

template <>
class method<breadcrumbs_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const breadcrumbs_options& options)
        : keep_(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
              task_shares(options.gamma, options.gammas, passes.tasks(), "gammas"), options.scope)
        , sum_(passes, options, keep_, options.rescale)
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const breadcrumbs_options& options) noexcept
    {
        return options.scope == scope::tensor;
    }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A, keep_between_of_tensor<A>> body(std::size_t tensor) const
    {
        return sum_.body<A>(keep_.get<A>(tensor), tensor);
    }
    [[nodiscard]] unsigned walks() const noexcept { return keep_.walks() + sum_.walks(); }

private:
    keep_between keep_;
    kept_sum sum_;
};

template <>
class method<breadcrumbs_ties_options> : public sign_election_method<keep_between> {
public:
    template <class Passes>
    method(Passes& passes, const breadcrumbs_ties_options& options)
        : sign_election_method(passes, options.ties, [&] {
            return keep_between(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
                task_shares(options.gamma, options.gammas, passes.tasks(), "gammas"), options.ties.scope);
        })
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const breadcrumbs_ties_options& options) noexcept
    {
        return options.ties.scope == scope::tensor;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, breadcrumbs_options)
TASKVEC_COMPILED_MERGES(extern, breadcrumbs_ties_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
