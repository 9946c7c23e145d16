// PERU-LoRA: fine-tuned adapters reused at a lower rank. Jiang et al., "Effective and Parameter-Efficient Reusing
// Fine-Tuned Models" (2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapter.hpp>
#include <taskvec/compiled/adapters.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/core/wrong_call.hpp>

#include <algorithm>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How peru_lora() cuts ranks.
struct peru_lora_options {
    rank_choice rank{}; ///< q for every layer, or the share of each layer's energy to keep
    sigma_side side = sigma_side::both;
    std::string label = "the adapter"; ///< what messages call it
};

template <>
struct options_of<peru_lora_options> {
    static constexpr option_table table{options_within(&peru_lora_options::rank),
        option_row("sigma", &peru_lora_options::side, "which factor the singular values go to", {.unit = "SIDE"})};
};

/// For each layer of an adapter the best rank-q approximation of its update, by factored_svd() (the product is never
/// formed), with its exact error. A layer whose rank is below q is kept whole, and says so. Parameters: q·(out + in +
/// 1) a layer. Served as θ0 + Uq·Σq·Vqᵀ. Throws invalid_argument for q = 0 or q above every layer's rank (unless
/// clamped), shape_mismatch, nonfinite_error. On the CPU layers run in parallel, one thread inside each; on a device,
/// for an adapter of device matrices, the cores of many layers are decomposed together.
///
///     auto served = peru_lora(cpu{}, adapter, {.rank = {.rank = 8}});
///     double lost = served.relative_error();
template <arithmetic_element T, memory_space S, linear_algebra_policy P>
    requires(P::space == S)
[[nodiscard]] adapter_result<T, S> peru_lora(
    const P& policy, const lora_adapter<T, S>& adapter, const peru_lora_options& options)
{
    std::size_t largest = 0;
    std::vector<const lora_update<T, S>*> before;
    std::vector<factor_pair<T, S>> pairs;
    adapter_result<T, S> result;
    for (const auto& [name, update] : adapter) {
        check_update(update, name);
        largest = std::max(largest, std::min({update.rank(), update.out(), update.in()}));
        before.push_back(&update);
        pairs.push_back(update.factors(1, name));
    }
    detail::check_layer_ranks(options.rank, largest, options.label);
    rank_choice choice = options.rank;
    choice.clamp = true;
    std::vector<lora_update<T, S>> after(pairs.size());
    result.layers.resize(pairs.size());
    with_context(policy, [&](const P& ready) {
        detail::for_each_factored_svd<T>(
            ready, std::span<const factor_pair<T, S>>(pairs), detail::factor_place::scratch,
            [&](std::size_t) { return choice; },
            [&](std::size_t i, const factored_svd_result<T, S>& s) {
                const lora_update<T, S>& update = *before[i];
                layer_report report{std::string(pairs[i].name), update.out(), update.in(), update.rank(), s.rank(),
                    false, s.squared_norm, s.squared_error};
                if (options.rank.energy == 0 && options.rank.rank > update.rank()) {
                    after[i] = copy_update(ready, update);
                    report.rank = update.rank();
                    report.whole = true;
                    report.squared_error = 0;
                }
                else {
                    after[i] = to_update<T>(ready, s, options.side);
                }
                result.layers[i] = std::move(report);
            });
    });
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        result.adapter.emplace(std::string(pairs[i].name), std::move(after[i]));
    }
    return result;
}

// On taskvec::gpu this needs <taskvec/device/linalg.hpp>; without it a call says so.
template <detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto peru_lora(const P&, const X&, const peru_lora_options&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "peru_lora() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}

TASKVEC_WRONG_CALLS(
    cpu, peru_lora, any_arguments, "peru_lora(policy, adapter, {.rank = {.rank = 8}}) of one lora_adapter")

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_PERU_LORA(extern, float)
TASKVEC_COMPILED_PERU_LORA(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
