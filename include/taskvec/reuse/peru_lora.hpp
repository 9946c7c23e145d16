// PERU-LoRA: fine-tuned adapters reused at a lower rank. Jiang et al., "Effective and Parameter-Efficient Reusing Fine-Tuned
// Models" (2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/lowrank/adapter.hpp>

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

struct peru_lora_options {
    rank_choice rank{}; ///< q for every layer, or the share of each layer's energy to keep
    sigma_side side = sigma_side::both;
};

/// For each layer of an adapter the best rank-q approximation of its update, by factored_svd() (the product is never formed),
/// with its exact error. A layer whose rank is below q is kept whole, and says so. Parameters: q·(out + in + 1) a layer.
/// Served as θ0 + Uq·Σq·Vqᵀ. Throws invalid_argument for q = 0 or q above every layer's rank (unless clamped),
/// shape_mismatch, nonfinite_error. Layers run in parallel, one thread inside each.
///
///     auto served = peru_lora(cpu{}, adapter, {.rank = {.rank = 8}});
///     double lost = served.relative_error();
template <arithmetic_element T>
[[nodiscard]] adapter_result<T> peru_lora(const cpu& policy, const lora_adapter<T>& adapter, const peru_lora_options& options)
{
    std::size_t largest = 0;
    std::vector<const typename lora_adapter<T>::value_type*> layers;
    for (const auto& entry : adapter) {
        check_update(entry.second, entry.first);
        largest = std::max(largest, std::min({entry.second.rank(), entry.second.out(), entry.second.in()}));
        layers.push_back(&entry);
    }
    detail::check_rank(options.rank, largest, "every layer");
    std::vector<lora_update<T>> updates(layers.size());
    adapter_result<T> result;
    result.layers.resize(layers.size());
    detail::progress_meter meter(policy, "svd", layers.size());
    const cpu inside = sequential(policy);
    for_each_index(policy, layers.size(), [&](std::size_t i, std::size_t) {
        const auto& [name, update] = *layers[i];
        rank_choice choice = options.rank;
        choice.clamp = true;
        const auto s = factored_svd(inside, update.factors(1, name), choice);
        layer_report report{name, update.out(), update.in(), update.rank(), s.rank(), false, s.squared_norm, s.squared_error};
        if (options.rank.energy == 0 && options.rank.rank > update.rank()) {
            updates[i] = update;
            report.rank = update.rank();
            report.whole = true;
            report.squared_error = 0;
        }
        else {
            updates[i] = to_update<T>(s, options.side);
        }
        result.layers[i] = std::move(report);
        if (!meter.advance(1)) { raise<cancelled>(); }
    });
    for (std::size_t i = 0; i < layers.size(); ++i) { result.adapter.emplace(layers[i]->first, std::move(updates[i])); }
    return result;
}

} // namespace taskvec::inline TASKVEC_ABI
