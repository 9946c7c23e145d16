// DARE: drop entries at random and rescale the rest. Yu et al., "Language models are super Mario" (ICML 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/elect/sum.hpp>
#include <taskvec/methods/keep/random.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/ties.hpp>

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

template <>
class method<dare_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const dare_options& options)
        : keep_(passes, options.density, options.seed)
        , lambda_(options.lambda)
        , weights_(passes, detail::checked_weights(options.weights, passes.tasks()))
    {
        detail::check_factor(lambda_, "lambda");
    }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A, keep_random_of_tensor<A>> body(std::size_t tensor) const
    {
        return {keep_.get<A>(tensor), weights_.get<A>(), static_cast<A>(lambda_)};
    }

private:
    keep_random keep_;
    double lambda_;
    kept_numbers weights_;
};

template <>
class method<dare_ties_options> : public sign_election_method<keep_random> {
public:
    template <class Passes>
    method(Passes& passes, const dare_ties_options& options)
        : sign_election_method(passes, options.ties, [&] { return keep_random(passes, options.density, options.seed); })
    { }
};

} // namespace taskvec::inline TASKVEC_ABI
