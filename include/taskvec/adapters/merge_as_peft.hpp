// Merging LoRA adapters as PEFT's add_weighted_adapter does: the factors themselves, stacked, or their products.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/merge_adapters.hpp>
#include <taskvec/core/float_bits.hpp>
#include <taskvec/core/kernels.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/core/random.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// PEFT's combination types. Those without svd merge the factors, A and B each by itself, which is not the merge of the
/// updates (it has cross terms); those with it merge the updates and decompose the result.
enum class peft_combination : std::uint8_t {
    linear, ///< Σ √|ws|·A with the sign of ws, Σ √|ws|·B
    cat, ///< stacked: the exact sum of the updates, of the sum of the ranks
    svd, ///< the sum of the updates, at a rank
    ties,
    ties_svd,
    dare_linear,
    dare_linear_svd,
    dare_ties,
    dare_ties_svd,
    magnitude_prune,
    magnitude_prune_svd
};

template <>
struct enum_words<peft_combination> {
    using word = enum_word<peft_combination>;
    static constexpr std::array words{word{peft_combination::linear, "linear"}, word{peft_combination::cat, "cat"},
        word{peft_combination::svd, "svd"}, word{peft_combination::ties, "ties"},
        word{peft_combination::ties_svd, "ties-svd"}, word{peft_combination::dare_linear, "dare-linear"},
        word{peft_combination::dare_linear_svd, "dare-linear-svd"}, word{peft_combination::dare_ties, "dare-ties"},
        word{peft_combination::dare_ties_svd, "dare-ties-svd"},
        word{peft_combination::magnitude_prune, "magnitude-prune"},
        word{peft_combination::magnitude_prune_svd, "magnitude-prune-svd"}};
};

/// What merge_as_peft() does: PEFT's arguments, and a factor over all.
struct peft_merge_options {
    peft_combination combination = peft_combination::svd; ///< PEFT's combination_type
    std::vector<double> weights{}; ///< one for each adapter, or none for all 1; negative ones subtract
    double lambda = 1; ///< multiplies all weights; PEFT has none
    double density = 1; ///< share kept of each factor or update, in (0, 1]: of TIES, DARE and magnitude pruning
    bool by_frequency =
        false; ///< TIES elects the sign that more entries have (PEFT's "frequency"), not that of their sum
    std::size_t rank = 0; ///< of the forms with svd; 0: the highest of the adapters
    std::uint64_t seed = 0; ///< of DARE
};

/// Whether a combination type decomposes merged updates.
[[nodiscard]] constexpr bool merges_updates(peft_combination how) noexcept
{
    using enum peft_combination;
    return how == svd || how == ties_svd || how == dare_linear_svd || how == dare_ties_svd
        || how == magnitude_prune_svd;
}
/// Whether it draws at random.
[[nodiscard]] constexpr bool is_random(peft_combination how) noexcept
{
    using enum peft_combination;
    return how == dare_linear || how == dare_linear_svd || how == dare_ties || how == dare_ties_svd;
}
/// Whether it elects signs.
[[nodiscard]] constexpr bool elects_signs(peft_combination how) noexcept
{
    using enum peft_combination;
    return how == ties || how == ties_svd || how == dare_ties || how == dare_ties_svd;
}
/// Whether it prunes, so that it needs a density.
[[nodiscard]] constexpr bool prunes(peft_combination how) noexcept
{
    return how != peft_combination::linear && how != peft_combination::cat && how != peft_combination::svd;
}

/// What PEFT 0.21's add_weighted_adapter(…, combination_type, density, majority_sign_method, svd_rank) makes, module by
/// module, of the adapters that have the module; the result has scaling 1. With wt the weights and st the scalings:
///
/// - linear: A = Σ ±√|wt·st|·At, with the sign of wt·st, and B = Σ √|wt·st|·Bt; ranks must be equal.
/// - cat: A stacks wt·st·At, and B stacks Bt.
/// - svd: the best approximation of Σ wt·ΔWt of the asked rank, B = u·σ.
/// - magnitude-prune: as linear, of factors of which the largest ⌊density·n⌋ entries are kept; ties: these, entries
///   whose sign is that of the unweighted sum (0 is plus; by_frequency: of the sum of signs) summed by weight and
///   divided by how many they are; dare-linear, dare-ties: entries kept at random and divided by the density.
/// - The same with -svd: of the updates ΔWt, by weights wt, then decomposed as svd.
/// - One adapter alone is always linear.
///
/// The factors that are merged by themselves have PEFT's bits in f32 (in f64 too, where PEFT rounds weights to f32), up
/// to its choice among equal magnitudes at a threshold (here: the first), for up to four adapters; products come from
/// another matrix product and differ in the last bits. DARE keeps entry i of adapter t's factor where
/// random_stream(seed, t, "MODULE.lora_A").word(i) < keep_below(density): the distribution is PEFT's, the draws are
/// not. PEFT takes over use_rslora from the first adapter's configuration, which scales its results by √r; this does
/// not. Cost: merged updates are dense, one layer at a time, once for each adapter. Throws invalid_argument for a
/// density outside (0, 1], unequal ranks, weights; shape_mismatch; nonfinite_error.
///
///     auto merged = merge_as_peft<float>(cpu{}, adapters,
///         {.combination = peft_combination::ties, .weights = {1, 0.5}, .density = 0.5}, decompose_exactly{});
template <arithmetic_element T, decomposition<T> Decompose>
[[nodiscard]] adapter_result<T> merge_as_peft(const cpu& policy,
    std::type_identity_t<std::span<const lora_adapter<T>>> adapters, const peft_merge_options& options,
    const Decompose& decompose);

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Merges rows of n entries as PEFT does: out = Σ w·x, or, where signs are elected, of entries whose sign is elected,
/// divided by their number. Every product, sum and quotient rounds by itself.
template <arithmetic_element A>
TASKVEC_NOINLINE void merge_rows_as_peft(
    const A* const* rows, const A* weights, std::size_t count, std::size_t n, bool elect, bool by_frequency, A* out)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        A total = 0, merged = 0, agreeing = 0;
        if (elect) {
            for (std::size_t t = 0; t < count; ++t) {
                const A x = rows[t][i];
                total = total + (by_frequency ? static_cast<A>((x > 0) - (x < 0)) : x);
            }
        }
        for (std::size_t t = 0; t < count; ++t) {
            const A x = rows[t][i];
            if (elect && !(total >= 0 ? x > 0 : x < 0)) { continue; }
            const A product = x * weights[t];
            merged = merged + product;
            agreeing = agreeing + 1;
        }
        out[i] = elect && agreeing > 1 ? merged / agreeing : merged;
    }
}
/// x ← (x·a)·b.
template <arithmetic_element A>
TASKVEC_NOINLINE void scale_twice(A* x, std::size_t n, A a, A b)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const A once = x[i] * a;
        x[i] = once * b;
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// Zeroes all but the ⌊density·n⌋ largest magnitudes; of equals the first stay.
template <class T>
void prune_by_magnitude(T* x, std::size_t n, double density)
{
    if (density >= 1 || n == 0) { return; }
    const auto k = static_cast<std::size_t>(density * static_cast<double>(n));
    std::vector<bits_type<T>> magnitudes(n);
    for (std::size_t i = 0; i < n; ++i) { magnitudes[i] = magnitude_bits(x[i]); }
    bits_type<T> least = std::numeric_limits<bits_type<T>>::max();
    std::size_t equals = 0;
    if (k > 0) {
        auto sorted = magnitudes;
        const auto place = sorted.begin() + static_cast<std::ptrdiff_t>(k - 1);
        std::nth_element(sorted.begin(), place, sorted.end(), std::greater<>());
        least = *place;
        equals = k - static_cast<std::size_t>(std::count_if(magnitudes.begin(), magnitudes.end(), [&](auto one) {
            return one > least;
        }));
    }
    for (std::size_t i = 0; i < n; ++i) {
        const bool kept = magnitudes[i] > least || (magnitudes[i] == least && equals > 0);
        if (kept && magnitudes[i] == least) { --equals; }
        if (!kept) { x[i] = 0; }
    }
}
/// Keeps entries at random, divided by the density.
template <class T>
void drop_at_random(T* x, std::size_t n, double density, const random_stream& stream)
{
    if (density >= 1) { return; }
    const auto below = keep_below(density);
    const T share = static_cast<T>(density);
    for (std::size_t i = 0; i < n; ++i) { x[i] = stream.word(i) < below ? x[i] / share : T{0}; }
}

} // namespace detail

template <arithmetic_element T, decomposition<T> Decompose>
adapter_result<T> merge_as_peft(const cpu& policy, std::type_identity_t<std::span<const lora_adapter<T>>> adapters,
    const peft_merge_options& options, const Decompose& decompose)
{
    const auto factors = detail::adapter_weights(options.weights, adapters.size(), options.lambda);
    const auto how = adapters.size() == 1 ? peft_combination::linear : options.combination;
    if (prunes(how) && !(options.density > 0 && options.density <= 1)) {
        raise<invalid_argument>(error_code::density_out_of_range,
            message("density is ", options.density, "; expected a share in (0, 1]: 0.2 keeps 20%"));
    }
    const auto layers = detail::shared_layers<T>(adapters);
    std::size_t highest = 0;
    for (const auto& layer : layers) {
        for (const auto* update : layer.updates) { highest = update ? std::max(highest, update->rank()) : highest; }
    }
    const std::size_t rank = options.rank == 0 ? highest : options.rank;
    if (how == peft_combination::svd) {
        rank_choice choice{.rank = rank};
        choice.clamp = true;
        return merge_linear<T>(policy, adapters,
            {.weights = options.weights, .lambda = options.lambda, .rank = choice, .side = sigma_side::left});
    }

    /// Prunes rows as the type says, and merges them by weight; `name` is that of the factor, for DARE.
    const auto merge_rows = [&](std::vector<std::vector<T>>& rows, const std::vector<std::size_t>& owners,
                                const std::vector<T>& weights, const std::string& name, T* out) {
        const std::size_t n = rows[0].size();
        std::vector<const T*> places;
        for (std::size_t t = 0; t < rows.size(); ++t) {
            if (is_random(how)) {
                detail::drop_at_random(rows[t].data(), n, options.density,
                    random_stream(options.seed, static_cast<std::uint32_t>(owners[t]), name));
            }
            else if (prunes(how)) {
                detail::prune_by_magnitude(rows[t].data(), n, options.density);
            }
            places.push_back(rows[t].data());
        }
        kernels::merge_rows_as_peft(
            places.data(), weights.data(), places.size(), n, elects_signs(how), options.by_frequency, out);
    };
    const auto check = [&](const auto& layer, const matrix<T>& made, std::string_view what) {
        for (std::size_t i = 0; i < made.size(); ++i) {
            if (std::isfinite(made.data()[i])) { continue; }
            for (const auto* update : layer.updates) {
                if (!update) { continue; }
                detail::blame_nonfinite<T>(update->b.view(), layer.name);
                detail::blame_nonfinite<T>(update->a.view(), layer.name);
            }
            raise<nonfinite_error>(error_code::result_overflow,
                message("'", layer.name, "': ", what, " of the merged adapter overflows; lower the weights"));
        }
    };

    adapter_result<T> result;
    detail::progress_meter meter(policy, "merge", layers.size(), progress_unit::layers);
    for (const auto& layer : layers) {
        std::vector<std::size_t> owners;
        for (std::size_t t = 0; t < adapters.size(); ++t) {
            if (layer.updates[t]) { owners.push_back(t); }
        }
        const auto& first = *layer.updates[owners[0]];
        lora_update<T> made;
        if (merges_updates(how)) {
            std::vector<std::vector<T>> rows;
            std::vector<T> weights;
            for (const auto t : owners) {
                rows.emplace_back(layer.out * layer.in);
                densify(policy, *layer.updates[t],
                    matrix_view<T>(rows.back().data(), layer.out, layer.in, matrix_order::row_major));
                weights.push_back(static_cast<T>(static_cast<float>(factors[t])));
            }
            matrix<T> dense(layer.out, layer.in, matrix_order::row_major);
            merge_rows(rows, owners, weights, layer.name, dense.data());
            rows.clear();
            check(layer, dense, "the update");
            rank_choice choice{.rank = rank};
            choice.clamp = true;
            const svd_result<T> s = decompose(policy, dense.view(), choice, layer.name);
            result.layers.push_back(
                {layer.name, layer.out, layer.in, 0, s.rank(), false, s.squared_norm, s.squared_error});
            result.adapter.emplace(layer.name, to_update<T>(s, sigma_side::left));
            if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
            continue;
        }
        if (how == peft_combination::cat) {
            const std::size_t total = layer.total_rank();
            made = {matrix<T>(layer.out, total, matrix_order::row_major),
                matrix<T>(total, layer.in, matrix_order::row_major), 1};
            std::size_t at = 0;
            for (const auto t : owners) {
                const auto& update = *layer.updates[t];
                T* const to = &made.a(at, 0);
                std::copy_n(update.a.data(), update.a.size(), to);
                kernels::scale_twice(to, update.a.size(), static_cast<T>(factors[t]), static_cast<T>(update.scaling));
                for (std::size_t i = 0; i < layer.out; ++i) {
                    for (std::size_t k = 0; k < update.rank(); ++k) { made.b(i, at + k) = update.b(i, k); }
                }
                at += update.rank();
            }
        }
        else {
            made = {matrix<T>(layer.out, first.rank(), matrix_order::row_major),
                matrix<T>(first.rank(), layer.in, matrix_order::row_major), 1};
            for (const bool left : {false, true}) {
                std::vector<std::vector<T>> rows;
                std::vector<T> weights;
                for (const auto t : owners) {
                    const auto& update = *layer.updates[t];
                    if (update.rank() != first.rank()) {
                        raise<invalid_argument>(error_code::adapters_differ,
                            message("'", layer.name, "' has rank ", update.rank(), " in adapter ", t + 1, " and ",
                                first.rank(), " in adapter ", owners[0] + 1,
                                ": PEFT merges factors of one rank; cat and the types with svd take any"));
                    }
                    const auto& from = left ? update.b : update.a;
                    rows.emplace_back(from.data(), from.data() + from.size());
                    const double strength = factors[t] * update.scaling, root = std::sqrt(std::abs(strength));
                    weights.push_back(static_cast<T>(static_cast<float>(!left && strength < 0 ? -root : root)));
                }
                merge_rows(rows, owners, weights, layer.name + (left ? ".lora_B" : ".lora_A"),
                    (left ? made.b : made.a).data());
            }
        }
        check(layer, made.a, "lora_A");
        check(layer, made.b, "lora_B");
        result.layers.push_back(
            {layer.name, layer.out, layer.in, layer.total_rank(), made.rank(), true, squared_norm(policy, made), 0});
        result.adapter.emplace(layer.name, std::move(made));
        if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
    }
    return result;
}

} // namespace taskvec::inline TASKVEC_ABI
