// TIES on adapters in the space of their products: layers are formed one at a time, merged, and decomposed again.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/merge_adapters.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_range.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/keep/all.hpp>
#include <taskvec/methods/ties.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What ties_options means is said there; `rank` (or an energy) is needed, because a merged product has full rank.
struct adapter_ties_options {
    ties_options ties{}; ///< of the updates, entry by entry
    rank_choice rank{}; ///< of each merged update
    sigma_side side = sigma_side::both;
};

template <>
struct options_of<adapter_ties_options> {
    static constexpr option_table table{options_within(&adapter_ties_options::ties),
        options_within(&adapter_ties_options::rank),
        option_row("sigma", &adapter_ties_options::side, "which factor the singular values go to", {.unit = "SIDE"})};
};

/// TIES over the updates ΔWt of adapters, entry by entry over all layers of all adapters together (scope::model) or
/// layer by layer (scope::tensor), and each merged layer decomposed to the asked rank or energy by `decompose`. A
/// module that an adapter lacks is an update of zeros. Products are formed in T, never all at once: the memory is that
/// of the largest layer, T + 3 times; they are formed 2 to 5 times over. The same selection and election, bit for bit,
/// as merge(ties_options) on the dense updates with a base of zeros. The report's errors are those of the
/// decomposition, against the merged layer. Throws what merge_linear() throws, and invalid_argument where no rank and
/// no energy is given.
///
///     auto merged = merge_ties<float>(
///         cpu{}, adapters, {.ties = {.density = 0.2}, .rank = {.rank = 16}}, decompose_randomized{});
template <arithmetic_element T, decomposition<T> Decompose>
[[nodiscard]] adapter_result<T> merge_ties(const cpu& policy,
    std::type_identity_t<std::span<const lora_adapter<T>>> adapters, const adapter_ties_options& options,
    const Decompose& decompose);

namespace detail {

/// What an election over a layer saw.
struct election_tally {
    std::int64_t sign_sum = 0; ///< Σ of the signs of nonzero sums
    std::uint64_t unresolved = 0; ///< entries whose sum is exactly 0 while some task vector's entry is not
};

/// The top-k thresholds of several streams of magnitudes that can be replayed: digit by digit from the top, 16 bits a
/// replay. Exact, in constant memory.
template <arithmetic_element T>
class streamed_top_k {
public:
    using bits = bits_type<T>;
    static constexpr int digits = sizeof(T) / 2;

    streamed_top_k(const std::vector<std::uint64_t>& counts, std::pmr::memory_resource* memory)
        : remaining_(counts)
        , prefix_(counts.size(), 0)
        , histogram_(counts.size(), memory) // its elements take it on
    { }

    /// Begins replay number `digit` (0 … digits − 1).
    void begin(int digit)
    {
        shift_ = 16 * (digits - 1 - digit);
        for (auto& counts : histogram_) { counts.assign(65536, 0); }
    }
    void add(std::size_t stream, const T* x, std::size_t size)
    {
        auto& counts = histogram_[stream];
        const bits wanted = prefix_[stream];
        const bool first = shift_ == 16 * (digits - 1);
        for (std::size_t i = 0; i < size; ++i) {
            const bits magnitude = magnitude_bits(x[i]);
            if (first || (magnitude >> shift_ >> 16) == wanted) {
                ++counts[static_cast<std::size_t>((magnitude >> shift_) & 0xffffu)];
            }
        }
    }
    /// Ends a replay: the digit that holds the k-th largest is fixed.
    void end()
    {
        for (std::size_t stream = 0; stream < histogram_.size(); ++stream) {
            std::size_t digit = 65535;
            while (digit > 0 && histogram_[stream][digit] < remaining_[stream]) {
                remaining_[stream] -= histogram_[stream][digit--];
            }
            prefix_[stream] = static_cast<bits>(prefix_[stream] << 15 << 1) | static_cast<bits>(digit);
        }
    }
    /// After the last replay: the k-th largest magnitude, and how many of that magnitude belong to the top k.
    [[nodiscard]] bits magnitude(std::size_t stream) const noexcept { return prefix_[stream]; }
    [[nodiscard]] std::uint64_t equal(std::size_t stream) const noexcept { return remaining_[stream]; }

private:
    std::vector<std::uint64_t> remaining_;
    std::vector<bits> prefix_;
    std::pmr::vector<std::pmr::vector<std::uint64_t>> histogram_;
    int shift_ = 0;
};

/// TIES of adapters' updates, each layer formed when it is its turn: what merge_ties() does, but for the ranks.
template <arithmetic_element T>
class adapter_ties {
public:
    adapter_ties(const cpu& policy, std::span<const lora_adapter<T>> adapters, const ties_options& how)
        : policy_(policy)
        , how_(how)
        , tasks_(adapters.size())
        , layers_(shared_layers<T>(adapters))
        , density_(how.density, how.densities, tasks_, "densities")
        , factors_(factors(how, tasks_))
        , products_(memory_of(policy))
        , merged_(memory_of(policy))
        , zeros_(block_size, T{0}, memory_of(policy))
        , rules_(tasks_)
    {
        (void)kept_of(1); // throws for densities that are none
        std::size_t largest = 0;
        for (const auto& layer : layers_) { largest = std::max(largest, layer.out * layer.in); }
        products_.resize(tasks_ * largest);
        merged_.resize(largest);
    }

    [[nodiscard]] const std::vector<shared_layer<T>>& layers() const { return layers_; }

    /// Finds what holds for all layers: thresholds over them, and, where it can matter, the majority sign.
    void look_at_model()
    {
        if (how_.scope != scope::model) { return; }
        std::uint64_t elements = 0;
        for (const auto& layer : layers_) { elements += layer.out * layer.in; }
        find_thresholds(elements, layers_);
        if (!by_majority()) { return; }
        election_tally total;
        const auto rules = rules_;
        for (const auto& layer : layers_) {
            const std::size_t size = form(layer);
            trim(size);
            const auto tally = elect(size, zero_);
            total.sign_sum += tally.sign_sum;
        }
        rules_ = rules;
        zero_ = majority_sign(how_, total.sign_sum);
    }
    /// The merged update of a layer, dense; it stays until the next one. Layers come in their order.
    [[nodiscard]] matrix_view<const T> merge(const shared_layer<T>& layer)
    {
        const bool alone = how_.scope == scope::tensor;
        const std::size_t size = layer.out * layer.in;
        if (alone) { find_thresholds(size, std::span(&layer, 1)); }
        else {
            form(layer);
        }
        trim(size);
        const auto tally = elect(size, zero_);
        if (alone && by_majority() && tally.unresolved > 0) {
            if (const int settled = majority_sign(how_, tally.sign_sum); settled != zero_) {
                (void)elect(size, settled);
            }
        }
        return {merged_.data(), layer.out, layer.in, matrix_order::row_major};
    }

private:
    /// What a task's trim keeps.
    struct trimming {
        bits_type<T> magnitude = 0; ///< the threshold
        std::uint64_t left = 0; ///< how many of that magnitude may still be kept
    };

    [[nodiscard]] static call_vector<T> factors(const ties_options& how, std::size_t tasks)
    {
        const auto weights = detail::ties_weights(how, tasks, [](std::size_t t) { return message("adapter ", t + 1); });
        const call_vector<double> ones(tasks, 1.0);
        election_weights factors{how.weighted_election ? weights : ones, weights, how.divide_by_count ? ones : weights,
            how.agree_when_weighted ? weights : ones};
        if (how.combine != disjoint_merge::mean) { factors.divide.assign(tasks, 0.0); }
        return election_factors<T>(factors);
    }
    [[nodiscard]] bool by_majority() const
    {
        return how_.zero_sign == zero_sign::majority || how_.zero_sign == zero_sign::majority_or_negative;
    }
    /// How many of n entries each task keeps.
    [[nodiscard]] std::vector<std::uint64_t> kept_of(std::uint64_t n) const
    {
        std::vector<std::uint64_t> kept;
        for (std::size_t t = 0; t < tasks_; ++t) {
            kept.push_back(std::min(n, top_k_count(density_.of(t), n) + (how_.trim == trim_rule::reach_next ? 1 : 0)));
        }
        return kept;
    }
    /// Forms the updates of a layer, row t of `products_` for adapter t; returns how many entries one has.
    std::size_t form(const shared_layer<T>& layer)
    {
        const std::size_t size = layer.out * layer.in;
        for (std::size_t t = 0; t < tasks_; ++t) {
            T* const row = products_.data() + t * size;
            const matrix_view<T> update(row, layer.out, layer.in, matrix_order::row_major);
            if (layer.updates[t]) { densify(policy_, *layer.updates[t], update); }
            else {
                std::fill_n(row, size, T{0});
            }
            if (!std::isfinite(squared_norm<T>(policy_, matrix_view<const T>(update)))) {
                blame_nonfinite<T>(layer.updates[t]->b.view(), layer.name);
                blame_nonfinite<T>(layer.updates[t]->a.view(), layer.name);
                raise<nonfinite_error>(error_code::result_overflow,
                    message("'", layer.name, "': the update of adapter ", t + 1, " overflows; scale its factors down"));
            }
        }
        return size;
    }
    /// The thresholds of each task over `count` entries, those of these layers, of which the last one stays formed.
    void find_thresholds(std::uint64_t count, std::span<const shared_layer<T>> layers)
    {
        streamed_top_k<T> search(kept_of(count), memory_of(policy_));
        for (int digit = 0; digit < search.digits; ++digit) {
            search.begin(digit);
            for (const auto& layer : layers) {
                const std::size_t size = digit == 0 || layers.size() > 1 ? form(layer) : layer.out * layer.in;
                for_each_index(policy_, tasks_,
                    [&](std::size_t t, std::size_t) { search.add(t, products_.data() + t * size, size); });
            }
            search.end();
        }
        for (std::size_t t = 0; t < tasks_; ++t) { rules_[t] = {search.magnitude(t), search.equal(t)}; }
    }
    /// Zeroes what the trim drops of the updates formed last, and counts the equals of the threshold that it keeps.
    void trim(std::size_t size)
    {
        for (std::size_t t = 0; t < tasks_; ++t) {
            T* const row = products_.data() + t * size;
            auto& rule = rules_[t];
            top_k_threshold<T> threshold{rule.magnitude, size};
            if (how_.trim == trim_rule::exact) {
                std::uint64_t seen = 0;
                for (std::size_t i = 0; i < size; ++i) {
                    if (magnitude_bits(row[i]) == rule.magnitude && seen++ == rule.left) {
                        threshold.equal_end = i;
                        break;
                    }
                }
                rule.left -= std::min(seen, rule.left);
            }
            kernels::trim(row, size, 0, threshold);
        }
    }
    /// Elects and merges the updates formed last into `merged_`; `zero` is what a sum of 0 elects.
    election_tally elect(std::size_t size, int zero)
    {
        auto* const memory = memory_of(policy_);
        const std::size_t blocks = (size + block_size - 1) / block_size, workers = worker_count(policy_, blocks);
        auto tallies = empty_tallies(blocks, memory);
        std::pmr::vector<merge_scratch> scratch(memory);
        for (std::size_t w = 0; w < workers; ++w) { scratch.emplace_back(memory); }
        const sign_election_body<T, keep_all> body{
            {}, factors_.data(), how_.combine, static_cast<T>(zero), static_cast<T>(how_.lambda)};
        for_each_index(policy_, blocks, [&](std::size_t index, std::size_t worker) {
            const std::size_t first = index * block_size;
            auto& rows = scratch[worker].tasks;
            rows.resize(tasks_);
            for (std::size_t t = 0; t < tasks_; ++t) { rows[t] = products_.data() + t * size + first; }
            kernels::entry_run<T> run;
            run.base = zeros_.data();
            run.tasks = rows.data();
            run.task_count = tasks_;
            run.size = std::min(block_size, size - first);
            kernels::run_findings<T> findings{&tallies[index]};
            run_body<T>(body, run, scratch[worker], 0, findings, [&](std::size_t at, const T* made, std::size_t n) {
                std::copy_n(made, n, merged_.data() + first + at);
            });
        });
        election_tally total;
        for (const auto& tally : tallies) {
            total.sign_sum += static_cast<std::int64_t>(
                tally.counts[election_counts::positive] - tally.counts[election_counts::negative]);
            total.unresolved += tally.counts[election_counts::unresolved];
        }
        return total;
    }

    const cpu& policy_;
    const ties_options& how_;
    std::size_t tasks_;
    std::vector<shared_layer<T>> layers_;
    task_shares density_;
    call_vector<T> factors_; ///< of the election
    std::pmr::vector<T> products_, merged_, zeros_;
    std::vector<trimming> rules_; ///< of the layer that comes next
    int zero_ = how_.zero_sign == zero_sign::none ? 0 : 1; ///< what a sum of 0 elects, until the majority is known
};

} // namespace detail

template <arithmetic_element T, decomposition<T> Decompose>
adapter_result<T> merge_ties(const cpu& policy, std::type_identity_t<std::span<const lora_adapter<T>>> adapters,
    const adapter_ties_options& options, const Decompose& decompose)
{
    check_options(options.ties);
    (void)detail::adapter_weights(options.ties.weights, adapters.size(), 1); // how many there must be
    detail::adapter_ties<T> ties(policy, adapters, options.ties);
    std::size_t largest_rank = 0;
    for (const auto& layer : ties.layers()) { largest_rank = std::max(largest_rank, std::min(layer.out, layer.in)); }
    detail::check_layer_ranks(options.rank, largest_rank, "the merged adapter");
    ties.look_at_model();

    adapter_result<T> result;
    detail::progress_meter meter(policy, "merge", ties.layers().size(), progress_unit::layers);
    rank_choice choice = options.rank;
    choice.clamp = true;
    for (const auto& layer : ties.layers()) {
        const svd_result<T> s = decompose(policy, ties.merge(layer), choice, layer.name);
        result.layers.push_back({layer.name, layer.out, layer.in, 0, s.rank(), false, s.squared_norm, s.squared_error});
        result.adapter.emplace(layer.name, to_update<T>(s, options.side));
        if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
    }
    return result;
}

} // namespace taskvec::inline TASKVEC_ABI
