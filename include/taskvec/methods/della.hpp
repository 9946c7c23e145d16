// DELLA: drop entries at random, small ones more often, rescale the rest and elect signs. Deep, Bhardwaj and Poria,
// "DELLA-Merging: reducing interference in model merging through magnitude-based sampling" (2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/elect/sum.hpp>
#include <taskvec/methods/keep/ranked.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/ties.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Task arithmetic over task vectors of which each entry is kept with a probability that grows with the rank r of its
/// magnitude among the n entries of its row, p = density − epsilon + 2·epsilon·r / (n − 1), and divided by p (MAGPRUNE,
/// as in the authors' code). Draws are those of DARE, functions of (seed, task, tensor, index) alone; with epsilon 0
/// this is DARE, bit for bit. Equal magnitudes: the lowest index ranks highest. Rows of one entry have p = density, as
/// have scalars; density 1 keeps all, whatever epsilon is. With `rescale` l1 what is kept of a task vector gets its L1
/// norm back in place of the division. With `normalize` the sum is divided by Σ wt. With `densities` and `epsilons`
/// each task has its own. Bit-exact for any threads and blocks. Errors: invalid_argument unless density ± epsilon is
/// within (0, 1). Cost: one read of the models, one more for L1 norms, and a sort of every row; memory for each thread:
/// 65,536 entries or one row, 2·T numbers each. On the CPU.
///
///     merge(cpu{}, della_linear_options{.density = 0.5, .epsilon = 0.15, .seed = 7}, base, tasks, out);
struct della_linear_options {
    double density = 0.5;
    double epsilon = 0.15;
    std::uint64_t seed = 0;
    double lambda = 1.0;
    std::vector<double> weights{};
    drop_rescale rescale = drop_rescale::density; ///< density: by each entry's own probability
    bool normalize = false; ///< divide by the sum of the weights
    rank_axis axis = rank_axis::last;
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    std::vector<double> epsilons{}; ///< of each task, or none for `epsilon` of all

    /// What mergekit's della_linear does, up to its random numbers.
    [[nodiscard]] static della_linear_options as_in_mergekit()
    {
        della_linear_options options;
        options.rescale = drop_rescale::l1;
        options.axis = rank_axis::second;
        return options;
    }
};

/// The same drop, then TIES without its trim: election and disjoint merge over what was kept. `ties.density`,
/// `ties.densities` and `ties.rescale` are not used.
///
///     merge(cpu{}, della_options{.density = 0.4, .epsilon = 0.1, .ties = {.lambda = 1.1}}, base, tasks, out);
struct della_options {
    double density = 0.5;
    double epsilon = 0.15;
    std::uint64_t seed = 0;
    ties_options ties{}; ///< of election and merge
    drop_rescale rescale = drop_rescale::density; ///< density: by each entry's own probability
    rank_axis axis = rank_axis::last;
    std::vector<double> densities{}; ///< of each task, or none for `density` of all
    std::vector<double> epsilons{}; ///< of each task, or none for `epsilon` of all

    /// What mergekit's della does, up to its random numbers.
    [[nodiscard]] static della_options as_in_mergekit()
    {
        della_options options;
        options.ties = ties_options::as_in_mergekit();
        options.rescale = drop_rescale::l1;
        options.axis = rank_axis::second;
        return options;
    }
};

template <>
struct options_of<della_linear_options> {
    static constexpr option_table table{
        option_row("density", &della_linear_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&della_linear_options::densities),
        option_row("epsilon", &della_linear_options::epsilon,
            "how far the keep probabilities of a row's smallest and largest entry are from the density",
            {.unit = "X", .at_least = 0}),
        epsilons_row(&della_linear_options::epsilons),
        option_row("seed", &della_linear_options::seed, "of random choices"),
        option_row("lambda", &della_linear_options::lambda, "scale of the merged task vector", lambda_details()),
        weights_row(&della_linear_options::weights),
        option_row("rescale-by", &della_linear_options::rescale, "what makes up for dropped entries", {.unit = "HOW"}),
        option_row("normalize-weights", &della_linear_options::normalize, "divide by the sum of the weights"),
        option_row("rank-axis", &della_linear_options::axis, "along which axis entries are ranked among each other",
            {.unit = "AXIS"})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<della_linear_options>{"paper", "the paper", [] { return della_linear_options{}; }},
        option_preset<della_linear_options>{"mergekit", "mergekit", &della_linear_options::as_in_mergekit}};
};
template <>
struct options_of<della_options> {
    static constexpr option_table table{
        option_row("density", &della_options::density, "share of entries kept", share_details(common_densities)),
        densities_row(&della_options::densities),
        option_row("epsilon", &della_options::epsilon,
            "how far the keep probabilities of a row's smallest and largest entry are from the density",
            {.unit = "X", .at_least = 0}),
        epsilons_row(&della_options::epsilons), option_row("seed", &della_options::seed, "of random choices"),
        options_within(&della_options::ties, "density", "densities", "trim", "rescale"),
        option_row("rescale-by", &della_options::rescale, "what makes up for dropped entries", {.unit = "HOW"}),
        option_row("rank-axis", &della_options::axis, "along which axis entries are ranked among each other",
            {.unit = "AXIS"})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<della_options>{"paper", "the paper", [] { return della_options{}; }},
        option_preset<della_options>{"mergekit", "mergekit", &della_options::as_in_mergekit}};
};

namespace detail {
/// The keep rule of either struct.
template <class Passes, class Options>
[[nodiscard]] keep_ranked ranked_of(Passes& passes, const Options& options)
{
    return {passes, task_shares(options.density, options.densities, passes.tasks(), "densities"),
        task_shares(options.epsilon, options.epsilons, passes.tasks(), "epsilons"), options.seed, options.axis,
        options.rescale == drop_rescale::density};
}
} // namespace detail

template <>
class method<della_linear_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;
    static constexpr bool on_device = false; // rows are sorted on the CPU

    template <class Passes>
    method(Passes& passes, const della_linear_options& options)
        : tasks_(passes.tasks())
        , keep_(detail::ranked_of(passes, options))
        , sum_(passes, options, keep_, options.rescale == drop_rescale::l1)
    { }
    /// Rows and L1 norms are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const della_linear_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A, keep_ranked_of_tensor<A>> body(std::size_t tensor) const
    {
        return sum_.body<A>(keep_.get<A>(tensor), tensor);
    }
    [[nodiscard]] unsigned walks() const noexcept { return sum_.walks(); }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return keep_.pieces(); }
    [[nodiscard]] std::size_t row_numbers() const noexcept { return tasks_; }
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* numbers, detail::piece_memory& memory) const
    {
        keep_.weigh(rows, piece, numbers, memory);
    }

private:
    std::size_t tasks_;
    keep_ranked keep_;
    kept_sum sum_;
};

template <>
class method<della_options> : public sign_election_method<keep_ranked> {
public:
    static constexpr bool on_device = false; // rows are sorted on the CPU

    template <class Passes>
    method(Passes& passes, const della_options& options)
        : sign_election_method(passes, detail::rescaled(options.ties, options.rescale == drop_rescale::l1),
              [&] { return detail::ranked_of(passes, options); })
        , tasks_(passes.tasks())
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const della_options& options) noexcept
    {
        return options.ties.scope == scope::tensor;
    }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return keep().pieces(); }
    [[nodiscard]] std::size_t row_numbers() const noexcept { return tasks_; }
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* numbers, detail::piece_memory& memory) const
    {
        keep().weigh(rows, piece, numbers, memory);
    }

private:
    std::size_t tasks_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MODEL_MERGE(extern, della_linear_options)
TASKVEC_COMPILED_MODEL_MERGE(extern, della_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
