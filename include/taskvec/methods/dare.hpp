// DARE: drop entries at random and rescale the rest. Yu et al., "Language models are super Mario" (ICML 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/elect/sum.hpp>
#include <taskvec/methods/keep/random.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/ties.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What makes up for dropped entries: division by the density; the factor that gives what is kept of a task vector its
/// L1 norm back, tensor by tensor (mergekit's: a read of the models more, on the CPU only); or nothing.
enum class drop_rescale : std::uint8_t { density, l1, none };

template <>
struct enum_words<drop_rescale> {
    static constexpr std::array words{enum_word<drop_rescale>{drop_rescale::density, "density"},
        enum_word<drop_rescale>{drop_rescale::l1, "l1"}, enum_word<drop_rescale>{drop_rescale::none, "none"}};
};

/// Task arithmetic over task vectors of which each entry is kept with probability `density` and divided by `density`.
/// The draw of an entry is random_stream(seed, task, tensor name).word(flat index) < keep_below(density): a function of
/// these alone, so results do not depend on threads, blocks or the other tensors. Bit-exact. With `normalize` the sum
/// is divided by Σ wt, which may not be 0. With `densities` each task has its own.
///
///     merge(cpu{}, dare_options{.density = 0.5, .seed = 7}, base, tasks, out);
struct dare_options {
    double density = 0.5;
    std::uint64_t seed = 0;
    double lambda = 1.0;
    std::vector<double> weights{};
    drop_rescale rescale = drop_rescale::density;
    bool normalize = false; ///< divide by the sum of the weights
    std::vector<double> densities{}; ///< of each task, or none for `density` of all

    /// What mergekit's dare_linear does, up to its random numbers.
    [[nodiscard]] static dare_options as_in_mergekit()
    {
        dare_options options;
        options.rescale = drop_rescale::l1;
        return options;
    }
};

/// DARE, then TIES without its trim: election and disjoint merge over what was kept. `ties.density`, `ties.densities`
/// and `ties.rescale` are not used.
///
///     merge(cpu{}, dare_ties_options{.density = 0.5, .ties = {.lambda = 0.7}}, base, tasks, out);
struct dare_ties_options {
    double density = 0.5;
    std::uint64_t seed = 0;
    ties_options ties{}; ///< of election and merge
    drop_rescale rescale = drop_rescale::density;
    std::vector<double> densities{}; ///< of each task, or none for `density` of all

    /// What ties-merging does with what DARE keeps.
    [[nodiscard]] static dare_ties_options as_in_ties_merging()
    {
        dare_ties_options options;
        options.ties = ties_options::as_in_ties_merging();
        return options;
    }
    /// What mergekit's dare_ties does, up to its random numbers: what agrees is added up, not averaged.
    [[nodiscard]] static dare_ties_options as_in_mergekit()
    {
        dare_ties_options options;
        options.ties = ties_options::as_in_mergekit();
        options.ties.combine = disjoint_merge::sum;
        options.rescale = drop_rescale::l1;
        return options;
    }
    /// What PEFT's dare_ties does, up to its random numbers.
    [[nodiscard]] static dare_ties_options as_in_peft()
    {
        dare_ties_options options;
        options.ties = ties_options::as_in_peft();
        return options;
    }
};

template <>
struct options_of<dare_options> {
    static constexpr option_table table{
        option_row("density", &dare_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&dare_options::densities), option_row("seed", &dare_options::seed, "of random choices"),
        option_row("lambda", &dare_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&dare_options::weights),
        option_row("rescale-by", &dare_options::rescale, "what makes up for dropped entries", {.unit = "HOW"}),
        option_row("normalize-weights", &dare_options::normalize, "divide by the sum of the weights")};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<dare_options>{"paper", "the paper", [] { return dare_options{}; }},
        option_preset<dare_options>{"mergekit", "mergekit", &dare_options::as_in_mergekit}};
};
template <>
struct options_of<dare_ties_options> {
    static constexpr option_table table{
        option_row("density", &dare_ties_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&dare_ties_options::densities), option_row("seed", &dare_ties_options::seed, "of random choices"),
        options_within(&dare_ties_options::ties, "density", "densities", "trim", "rescale"),
        option_row("rescale-by", &dare_ties_options::rescale, "what makes up for dropped entries", {.unit = "HOW"})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<dare_ties_options>{"paper", "the paper", [] { return dare_ties_options{}; }},
        option_preset<dare_ties_options>{
            "ties-merging", "the paper's own code", &dare_ties_options::as_in_ties_merging},
        option_preset<dare_ties_options>{"mergekit", "mergekit", &dare_ties_options::as_in_mergekit},
        option_preset<dare_ties_options>{"peft", "PEFT", &dare_ties_options::as_in_peft}};
};

namespace detail {
/// The options of an election whose kept entries are rescaled by their L1 norm, or are not.
[[nodiscard]] inline ties_options rescaled(ties_options options, bool rescale)
{
    options.rescale = rescale;
    return options;
}
} // namespace detail

template <>
class method<dare_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const dare_options& options)
        : keep_(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"), options.seed,
              options.rescale == drop_rescale::density)
        , sum_(passes, options, keep_, options.rescale == drop_rescale::l1)
    { }
    /// L1 norms are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const dare_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A, keep_random_of_tensor<A>> body(std::size_t tensor) const
    {
        return sum_.body<A>(keep_.get<A>(tensor), tensor);
    }
    [[nodiscard]] unsigned walks() const noexcept { return sum_.walks(); }

private:
    keep_random keep_;
    kept_sum sum_;
};

template <>
class method<dare_ties_options> : public sign_election_method<keep_random> {
public:
    template <class Passes>
    method(Passes& passes, const dare_ties_options& options)
        : sign_election_method(passes, detail::rescaled(options.ties, options.rescale == drop_rescale::l1), [&] {
            return keep_random(passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
                options.seed, options.rescale == drop_rescale::density);
        })
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const dare_ties_options& options) noexcept
    {
        return options.ties.scope == scope::tensor;
    }
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, dare_options)
TASKVEC_COMPILED_MERGES(extern, dare_ties_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
