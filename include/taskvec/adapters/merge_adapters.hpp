// Merging LoRA adapters of different ranks and targets: exactly by stacking, compressed to a rank, or factor by factor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapter.hpp>
#include <taskvec/compiled/adapters.hpp>
#include <taskvec/core/option_table.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Weights: one for each adapter, or none for all 1; negative ones subtract.
struct linear_merge_options {
    std::vector<double> weights{};
    double lambda = 1;
    rank_choice rank = rank_choice::full(); ///< full(): the stacked factors, exact
    sigma_side side = sigma_side::both;
};

template <>
struct options_of<linear_merge_options> {
    static constexpr option_table table{weights_row(&linear_merge_options::weights),
        option_row("lambda", &linear_merge_options::lambda, "scale of the merged update"),
        options_within(&linear_merge_options::rank),
        option_row("sigma", &linear_merge_options::side, "which factor the singular values go to", {.unit = "SIDE"})};
};

/// ΔW = λ·Σ wt·ΔWt, module by module over the union of the adapters' modules (an adapter that lacks one adds nothing
/// there); ranks may differ. By default the factors are stacked: exact, of the sum of the ranks. With a rank q or an
/// energy each layer is the best approximation of that sum, and its error is exact; a layer whose ranks sum to no more
/// than q stays stacked. Throws shape_mismatch for adapters of different bases, invalid_argument (weights; a rank of 0,
/// or above every layer's sum unless clamped), nonfinite_error. Layers run in parallel. Cost: see factored_svd().
///
///     std::vector<lora_adapter<float>> adapters = …;
///     auto merged = merge_linear<float>(cpu{}, adapters, {.weights = {0.5, 0.5}, .rank = {.rank = 16}});
template <arithmetic_element T>
[[nodiscard]] adapter_result<T> merge_linear(const cpu& policy,
    std::type_identity_t<std::span<const lora_adapter<T>>> adapters, const linear_merge_options& options = {});

/// The weighted means of the factors themselves: a = Σ wt·at / Σ wt and b likewise. This is not the mean of the
/// updates: it has the cross terms wi·wj·bi·aj, which mean something only for adapters that started from the same
/// factors. For those who ask. All adapters must have the same modules, ranks and scaling; the weights may not sum to
/// 0. Each entry is summed in T in adapter order. Throws invalid_argument, shape_mismatch.
template <arithmetic_element T>
[[nodiscard]] lora_adapter<T> average_factors_separately(
    std::type_identity_t<std::span<const lora_adapter<T>>> adapters, const std::vector<double>& weights = {});

namespace detail {

[[nodiscard]] inline std::vector<double> adapter_weights(
    const std::vector<double>& weights, std::size_t count, double lambda)
{
    if (count == 0) {
        raise<invalid_argument>(error_code::inputs_empty, "no adapter was given: at least one is needed");
    }
    if (!weights.empty() && weights.size() != count) {
        raise<invalid_argument>(error_code::list_length,
            message(weights.size(), " weights for ", count, " adapters: give one each, or none"));
    }
    std::vector<double> factors = weights.empty() ? std::vector<double>(count, 1.0) : weights;
    for (std::size_t i = 0; i < count; ++i) {
        factors[i] *= lambda;
        if (!std::isfinite(factors[i])) {
            raise<invalid_argument>(
                error_code::parameter_not_finite, message("the weight of adapter ", i + 1, " is not finite"));
        }
    }
    return factors;
}

/// One layer of the union of adapters: who has it.
template <class T>
struct shared_layer {
    std::string name;
    std::size_t out = 0, in = 0;
    std::vector<const lora_update<T>*> updates; ///< for each adapter, null where it lacks the layer
    [[nodiscard]] std::size_t total_rank() const
    {
        std::size_t total = 0;
        for (const auto* update : updates) { total += update ? update->rank() : 0; }
        return total;
    }
};

/// The layers of all adapters, in name order, checked to be of one shape.
template <class T>
[[nodiscard]] std::vector<shared_layer<T>> shared_layers(std::span<const lora_adapter<T>> adapters)
{
    std::map<std::string, shared_layer<T>> layers;
    for (std::size_t i = 0; i < adapters.size(); ++i) {
        for (const auto& [name, update] : adapters[i]) {
            check_update(update, name);
            auto& layer = layers[name];
            if (layer.updates.empty()) {
                layer = {name, update.out(), update.in(), std::vector<const lora_update<T>*>(adapters.size(), nullptr)};
            }
            if (layer.out != update.out() || layer.in != update.in()) {
                raise<shape_mismatch>(error_code::adapter_shape,
                    message("module '", name, "' is ", update.out(), "×", update.in(), " in adapter ", i + 1, " but ",
                        layer.out, "×", layer.in, " in an earlier one: these adapters belong to different bases"));
            }
            layer.updates[i] = &update;
        }
    }
    std::vector<shared_layer<T>> result;
    for (auto& [name, layer] : layers) { result.push_back(std::move(layer)); }
    return result;
}

} // namespace detail

template <arithmetic_element T>
adapter_result<T> merge_linear(const cpu& policy, std::type_identity_t<std::span<const lora_adapter<T>>> adapters,
    const linear_merge_options& options)
{
    const auto factors = detail::adapter_weights(options.weights, adapters.size(), options.lambda);
    const auto layers = detail::shared_layers<T>(adapters);
    std::size_t largest = 0;
    for (const auto& layer : layers) {
        largest = std::max(largest, std::min({layer.out, layer.in, layer.total_rank()}));
    }
    detail::check_layer_ranks(options.rank, largest, "the merged adapter");
    std::vector<lora_update<T>> updates(layers.size());
    adapter_result<T> result;
    result.layers.resize(layers.size());
    detail::progress_meter meter(policy, "merge", layers.size(), progress_unit::layers);
    const cpu inside = sequential(policy);
    for_each_index(policy, layers.size(), [&](std::size_t i, std::size_t) {
        const auto& layer = layers[i];
        std::vector<factor_pair<T>> pairs;
        for (std::size_t t = 0; t < adapters.size(); ++t) {
            if (layer.updates[t]) { pairs.push_back(layer.updates[t]->factors(factors[t], layer.name)); }
        }
        const auto stacked = stack_factors<T>(inside, std::span<const factor_pair<T>>(pairs), layer.name);
        const std::size_t total = stacked.left.cols();
        layer_report report{layer.name, layer.out, layer.in, total, total, true, 0, 0};
        if (options.rank.energy == 0 && options.rank.rank >= total) {
            updates[i] = to_update(stacked);
            report.squared_norm = squared_norm(inside, updates[i]);
            if (!std::isfinite(report.squared_norm)) {
                detail::blame_nonfinite<T>(updates[i].b.view(), layer.name);
                detail::blame_nonfinite<T>(updates[i].a.view(), layer.name);
            }
        }
        else {
            rank_choice choice = options.rank;
            choice.clamp = true;
            const auto s =
                detail::factored_svd_in<T>(inside, stacked.pair(layer.name), choice, detail::factor_place::scratch);
            updates[i] = to_update<T>(s, options.side);
            report.rank = s.rank();
            report.whole = false;
            report.squared_norm = s.squared_norm;
            report.squared_error = s.squared_error;
        }
        result.layers[i] = std::move(report);
        if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
    });
    for (std::size_t i = 0; i < layers.size(); ++i) { result.adapter.emplace(layers[i].name, std::move(updates[i])); }
    return result;
}

template <arithmetic_element T>
lora_adapter<T> average_factors_separately(
    std::type_identity_t<std::span<const lora_adapter<T>>> adapters, const std::vector<double>& weights)
{
    const auto factors = detail::adapter_weights(weights, adapters.size(), 1);
    double total = 0;
    for (const double factor : factors) { total += factor; }
    if (total == 0) {
        raise<invalid_argument>(error_code::weights_sum_zero,
            "the weights sum to 0, and an average is divided by that: change one of them");
    }
    lora_adapter<T> result;
    for (const auto& layer : detail::shared_layers<T>(adapters)) {
        const lora_update<T>* first = layer.updates[0];
        for (std::size_t t = 0; t < adapters.size(); ++t) {
            const lora_update<T>* const update = layer.updates[t];
            if (!update || !first) {
                raise<invalid_argument>(error_code::adapters_differ,
                    message("module '", layer.name, "' is missing in adapter ", (update ? 0 : t) + 1,
                        ": factors can only be averaged over the same modules"));
            }
            if (update->rank() != first->rank() || !same_scaling(update->scaling, first->scaling)) {
                raise<shape_mismatch>(error_code::adapter_shape,
                    message("module '", layer.name, "' has rank ", update->rank(), " and scaling ", update->scaling,
                        " in adapter ", t + 1, " but ", first->rank(), " and ", first->scaling,
                        " in the first: factors can only be averaged with equal ranks and scalings; merge the updates "
                        "instead"));
            }
        }
        lora_update<T> mean{matrix<T>(layer.out, first->rank(), matrix_order::row_major),
            matrix<T>(first->rank(), layer.in, matrix_order::row_major), first->scaling};
        const auto add = [&](matrix<T>& to, matrix<T> lora_update<T>::* side) {
            for (std::size_t t = 0; t < adapters.size(); ++t) {
                const T weight = static_cast<T>(factors[t] / total);
                const matrix<T>& from = layer.updates[t]->*side;
                for (std::size_t i = 0; i < to.rows(); ++i) {
                    for (std::size_t j = 0; j < to.cols(); ++j) { to(i, j) += weight * from(i, j); }
                }
            }
        };
        add(mean.b, &lora_update<T>::b);
        add(mean.a, &lora_update<T>::a);
        result.emplace(layer.name, std::move(mean));
    }
    return result;
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGE_ADAPTERS(extern, float)
TASKVEC_COMPILED_MERGE_ADAPTERS(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
