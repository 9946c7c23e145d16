// TIES on adapters in the space of their products: layers are formed one at a time, merged, and decomposed again.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/merge_adapters.hpp>
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

} // namespace detail

template <arithmetic_element T, decomposition<T> Decompose>
adapter_result<T> merge_ties(const cpu& policy, std::type_identity_t<std::span<const lora_adapter<T>>> adapters,
    const adapter_ties_options& options, const Decompose& decompose)
{
    const ties_options& how = options.ties;
    check_options(how);
    const std::size_t tasks = adapters.size();
    (void)detail::adapter_weights(how.weights, tasks, 1); // how many there must be
    const auto weights = task_weights(how.weights, tasks, how.negative_weights);
    const auto layers = detail::shared_layers<T>(adapters);
    std::size_t largest_rank = 0, largest_size = 0;
    std::uint64_t elements = 0;
    for (const auto& layer : layers) {
        largest_rank = std::max(largest_rank, std::min(layer.out, layer.in));
        largest_size = std::max(largest_size, layer.out * layer.in);
        elements += layer.out * layer.in;
    }
    detail::check_layer_ranks(options.rank, largest_rank, "the merged adapter");
    const task_shares density(how.density, how.densities, tasks, "densities");
    const auto counts = [&](std::uint64_t n) {
        std::vector<std::uint64_t> kept;
        for (std::size_t t = 0; t < tasks; ++t) {
            kept.push_back(std::min(n, top_k_count(density.of(t), n) + (how.trim == trim_rule::reach_next ? 1 : 0)));
        }
        return kept;
    };
    (void)counts(1);

    const std::vector<double> ones(tasks, 1.0);
    election_weights factors_of{how.weighted_election ? weights : ones, weights, how.divide_by_count ? ones : weights,
        how.agree_when_weighted ? weights : ones};
    if (how.combine != disjoint_merge::mean) { factors_of.divide.assign(tasks, 0.0); }
    const auto factors = election_factors<T>(factors_of);

    std::pmr::memory_resource* const memory = memory_of(policy);
    std::pmr::vector<T> products(tasks * largest_size, memory), merged(largest_size, memory),
        zeros(block_size, T{0}, memory);
    /// Forms the updates of a layer, row t of `products` for adapter t.
    const auto form = [&](const detail::shared_layer<T>& layer) {
        const std::size_t size = layer.out * layer.in;
        for (std::size_t t = 0; t < tasks; ++t) {
            T* const row = products.data() + t * size;
            if (layer.updates[t]) {
                densify(policy, *layer.updates[t], matrix_view<T>(row, layer.out, layer.in, matrix_order::row_major));
            }
            else {
                std::fill_n(row, size, T{0});
            }
            if (!std::isfinite(
                    squared_norm<T>(policy, matrix_view<const T>(row, layer.out, layer.in, matrix_order::row_major)))) {
                detail::blame_nonfinite<T>(layer.updates[t]->b.view(), layer.name);
                detail::blame_nonfinite<T>(layer.updates[t]->a.view(), layer.name);
                raise<nonfinite_error>(error_code::result_overflow,
                    message("'", layer.name, "': the update of adapter ", t + 1, " overflows; scale its factors down"));
            }
        }
        return size;
    };
    /// Zeroes what the trim drops; `left` counts the equals of the threshold that may still be kept.
    struct trimming {
        bits_type<T> magnitude = 0;
        std::uint64_t left = 0;
    };
    const auto trim = [&](std::size_t size, std::vector<trimming>& rules) {
        for (std::size_t t = 0; t < tasks; ++t) {
            T* const row = products.data() + t * size;
            top_k_threshold<T> threshold{rules[t].magnitude, size};
            if (how.trim == trim_rule::exact) {
                std::uint64_t seen = 0;
                for (std::size_t i = 0; i < size; ++i) {
                    if (magnitude_bits(row[i]) == rules[t].magnitude && seen++ == rules[t].left) {
                        threshold.equal_end = i;
                        break;
                    }
                }
                rules[t].left -= std::min(seen, rules[t].left);
            }
            kernels::trim(row, size, 0, threshold);
        }
    };
    /// Elects and merges a layer into `merged`; `zero` is what a sum of 0 elects.
    const auto elect = [&](std::size_t size, int zero) {
        const std::size_t blocks = (size + block_size - 1) / block_size, workers = worker_count(policy, blocks);
        auto tallies = detail::empty_tallies(blocks, memory);
        std::pmr::vector<detail::merge_scratch> scratch(memory);
        for (std::size_t w = 0; w < workers; ++w) { scratch.emplace_back(memory); }
        const sign_election_body<T, keep_all> body{
            {}, factors.data(), how.combine, static_cast<T>(zero), static_cast<T>(how.lambda)};
        for_each_index(policy, blocks, [&](std::size_t index, std::size_t worker) {
            const std::size_t first = index * block_size;
            auto& rows = scratch[worker].tasks;
            rows.resize(tasks);
            for (std::size_t t = 0; t < tasks; ++t) { rows[t] = products.data() + t * size + first; }
            kernels::entry_run<T> run;
            run.base = zeros.data();
            run.tasks = rows.data();
            run.task_count = tasks;
            run.size = std::min(block_size, size - first);
            kernels::run_findings<T> findings{&tallies[index]};
            detail::run_body<T>(
                body, run, scratch[worker], 0, findings, [&](std::size_t at, const T* made, std::size_t n) {
                    std::copy_n(made, n, merged.data() + first + at);
                });
        });
        detail::election_tally total;
        for (const auto& tally : tallies) {
            total.sign_sum += static_cast<std::int64_t>(
                tally.counts[election_counts::positive] - tally.counts[election_counts::negative]);
            total.unresolved += tally.counts[election_counts::unresolved];
        }
        return total;
    };
    const bool by_majority = how.zero_sign == zero_sign::majority || how.zero_sign == zero_sign::majority_or_negative;
    const auto settled = [&](std::int64_t sum) { return detail::majority_sign(how, sum); };
    const int provisional = how.zero_sign == zero_sign::none ? 0 : 1;

    // Thresholds over all layers, and then, where it can matter, the majority sign.
    std::vector<trimming> rules(tasks);
    int model_zero = provisional;
    if (how.scope == scope::model) {
        detail::streamed_top_k<T> search(counts(elements), memory);
        for (int digit = 0; digit < search.digits; ++digit) {
            search.begin(digit);
            for (const auto& layer : layers) {
                const std::size_t size = form(layer);
                for_each_index(policy, tasks,
                    [&](std::size_t t, std::size_t) { search.add(t, products.data() + t * size, size); });
            }
            search.end();
        }
        for (std::size_t t = 0; t < tasks; ++t) { rules[t] = {search.magnitude(t), search.equal(t)}; }
        if (by_majority) {
            detail::election_tally total;
            auto walking = rules;
            for (const auto& layer : layers) {
                const std::size_t size = form(layer);
                trim(size, walking);
                const auto tally = elect(size, provisional);
                total.sign_sum += tally.sign_sum;
                total.unresolved += tally.unresolved;
            }
            model_zero = settled(total.sign_sum);
        }
    }

    adapter_result<T> result;
    detail::progress_meter meter(policy, "merge", layers.size(), progress_unit::layers);
    for (const auto& layer : layers) {
        const std::size_t size = form(layer);
        int zero = model_zero;
        if (how.scope == scope::tensor) {
            detail::streamed_top_k<T> search(counts(size), memory);
            for (int digit = 0; digit < search.digits; ++digit) {
                search.begin(digit);
                for_each_index(policy, tasks,
                    [&](std::size_t t, std::size_t) { search.add(t, products.data() + t * size, size); });
                search.end();
            }
            for (std::size_t t = 0; t < tasks; ++t) { rules[t] = {search.magnitude(t), search.equal(t)}; }
        }
        trim(size, rules);
        auto tally = elect(size, zero);
        if (how.scope == scope::tensor && by_majority && tally.unresolved > 0 && settled(tally.sign_sum) != zero) {
            zero = settled(tally.sign_sum);
            tally = elect(size, zero);
        }
        const matrix_view<const T> dense(merged.data(), layer.out, layer.in, matrix_order::row_major);
        rank_choice choice = options.rank;
        choice.clamp = true;
        const svd_result<T> s = decompose(policy, dense, choice, layer.name);
        result.layers.push_back({layer.name, layer.out, layer.in, 0, s.rank(), false, s.squared_norm, s.squared_error});
        result.adapter.emplace(layer.name, to_update<T>(s, options.side));
        if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
    }
    return result;
}

} // namespace taskvec::inline TASKVEC_ABI
