// Post-Pruning: each task keeps the largest entries of its task vector beside a shared model. Jiang et al., "Effective
// and Parameter-Efficient Reusing Fine-Tuned Models" (2023).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/select/sparse.hpp>
#include <taskvec/select/thresholds.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What is kept of a task vector: the top `density` by magnitude, over all tensors together or tensor by tensor.
struct post_pruning_options {
    double density = 0.1;
    taskvec::scope scope = taskvec::scope::model;
    trim_rule trim = trim_rule::exact;

    /// What the trim of TIES keeps in its paper's own code: one entry more than asked, and all its equals.
    [[nodiscard]] static post_pruning_options as_in_ties_merging()
    {
        post_pruning_options options;
        options.trim = trim_rule::reach_next;
        return options;
    }
};

template <>
struct options_of<post_pruning_options> {
    static constexpr option_table table{
        option_row("density", &post_pruning_options::density, "share of entries kept", share_details()),
        option_row("scope", &post_pruning_options::scope, "what a density counts over", {.unit = "SCOPE"}),
        option_row("trim", &post_pruning_options::trim, "keep exactly k entries, or all that reach the next",
            {.unit = "RULE"})};
    /// What TIES trims over, in the words of its presets.
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<post_pruning_options>{"paper", "the paper", [] { return post_pruning_options{}; }},
        option_preset<post_pruning_options>{
            "ties-merging", "the paper's own code", &post_pruning_options::as_in_ties_merging},
        option_preset<post_pruning_options>{
            "mergekit", "mergekit", [] { return post_pruning_options{.scope = scope::tensor}; }},
        option_preset<post_pruning_options>{
            "peft", "PEFT", [] { return post_pruning_options{.scope = scope::tensor}; }}};
};

namespace detail {
/// What one worker keeps of a chunk.
struct chunk_entries {
    explicit chunk_entries(std::pmr::memory_resource* memory)
        : indices(memory)
        , single(memory)
        , wide(memory)
    { }
    template <arithmetic_element V>
    [[nodiscard]] std::pmr::vector<V>& values() noexcept
    {
        if constexpr (std::same_as<V, double>) { return wide; }
        else {
            return single;
        }
    }
    std::pmr::vector<std::uint64_t> indices;
    std::pmr::vector<float> single;
    std::pmr::vector<double> wide;
};
} // namespace detail

/// v̂ = top-m% of τ = θ − θ0, for models aligned as base and one task: k = floor(density·n) entries by magnitude (lowest
/// index first among equals; with trim_rule::reach_next one more, and all its equals), of which zeros are not stored.
/// Values are f32, and f64 where the base stores f64. Streams: the entries go to `out` in pieces. Served as θ0 + v̂.
/// With a merged model as the base it is the second half of PERU-FFT. Bit-exact. Errors: invalid_argument,
/// nonfinite_error, cancelled. Cost: three reads of both models.
template <cpu_policy Policy>
void post_pruning(
    const Policy& policy, const post_pruning_options& options, const aligned_models& models, sparse_sink& out)
{
    if (!models.has_base() || models.task_count() != 1) {
        raise<invalid_argument>(error_code::task_count, "pruning takes one base and one task");
    }
    const detail::call_memory memory(policy.memory);
    const trim_thresholds thresholds(policy, models, options.density, options.scope, options.trim);
    // Calls entry(index, value) for what is kept of a block, with values of type V: zeros, also those that V rounds to,
    // are not stored.
    const auto keep = [&]<class V, class A>(
                          std::type_identity<V>, row_block<A>& rows, std::size_t tensor, auto&& entry) {
        const auto threshold = thresholds.get<A>(tensor, 0);
        const A* const values = rows.delta(0);
        for (std::size_t i = 0; i < rows.size(); ++i) {
            const V value = static_cast<V>(values[i]);
            if (value != 0 && threshold.keeps(values[i], rows.position() + i)) { entry(rows.offset() + i, value); }
        }
    };
    const auto visit_values = [&](std::size_t tensor, auto&& then) {
        models.tensors()[tensor].wide_base() ? then(std::type_identity<double>{}) : then(std::type_identity<float>{});
    };
    std::pmr::vector<std::uint64_t> first(models.chunks().size() + 1, 0, memory_of(policy));
    call_vector<std::uint64_t> kept(models.tensors().size(), 0);
    for_each_block(policy, models, all_chunks(models), 0, "count", [&](std::size_t index, std::size_t, auto& rows) {
        std::uint64_t count = 0;
        const std::size_t tensor = models.chunks()[index].tensor;
        visit_values(tensor, [&](auto type) { keep(type, rows, tensor, [&](std::uint64_t, auto) { ++count; }); });
        first[index] += count;
    });
    for (std::size_t index = 0; index < models.chunks().size(); ++index) {
        auto& total = kept[models.chunks()[index].tensor];
        total += std::exchange(first[index], total);
    }
    out.begin(models, kept);
    auto workspaces = make_workspaces(policy, models, models.chunks().size(), 0);
    std::pmr::vector<detail::chunk_entries> entries(memory_of(policy));
    for (std::size_t w = 0; w < workspaces.size(); ++w) { entries.emplace_back(memory_of(policy)); }
    detail::progress_meter meter(policy, "prune", models.bytes());
    for_each_index(policy, models.chunks().size(), [&](std::size_t index, std::size_t worker) {
        const tensor_chunk& piece = models.chunks()[index];
        workspaces[worker].with_block(models.tensors()[piece.tensor], [&](auto& rows) {
            visit_values(piece.tensor, [&]<class V>(std::type_identity<V> type) {
                auto& indices = entries[worker].indices;
                auto& values = entries[worker].template values<V>();
                indices.clear();
                values.clear();
                for_each_block_of(rows, piece, [&](auto& opened) {
                    keep(type, opened, piece.tensor, [&](std::uint64_t place, V value) {
                        indices.push_back(place);
                        values.push_back(value);
                    });
                });
                out.write(piece.tensor, first[index], piece.offset, piece.offset + piece.size, indices.data(),
                    values.data(), indices.size());
            });
        });
        if (!meter.advance(models.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
    });
}

/// Post-Pruning of models in memory. The entries lie in memory of the policy's resource.
///
///     sparse_model delta = post_pruning(cpu{}, {.density = 0.1}, base, task);
///     auto saved = apply(cpu{}, delta, live);   // live == base: now the pruned task
template <cpu_policy Policy>
[[nodiscard]] sparse_model post_pruning(const Policy& policy, const post_pruning_options& options,
    const const_model_ref& base, const const_model_ref& task, const model_options& how = {})
{
    sparse_model_sink sink(memory_of(policy));
    post_pruning(policy, options, aligned_models(&base, {&task, 1}, how), sink);
    return sink.take();
}

/// Post-Pruning of flat views.
template <input_of<cpu> Base, input_of<cpu> Task>
[[nodiscard]] auto post_pruning(const cpu& policy, const post_pruning_options& options, const Base& base,
    const Task& task, const model_options& how = {})
{
    using A = arithmetic_type<element_of<const Base>>;
    sparse_model model =
        post_pruning(policy, options, detail::flat_model(as_view(base)), detail::flat_model(as_view(task)), how);
    return std::get<sparse_vector<A>>(std::move(model.begin()->second));
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(cpu, post_pruning, any_arguments,
    "post_pruning(policy, options, base, task), of flat views or models; or (policy, options, aligned models, sink)")
#if !defined(__CUDACC__)
// Options in braces have no type of their own.
template <cpu_policy P, class... Arguments>
    requires(!detail::cpu_post_pruning_of_any_arguments::take<const P&, const post_pruning_options&, Arguments&...>)
auto post_pruning(const P&, const post_pruning_options&, const Arguments&...)
{
    using calls = detail::cpu_post_pruning_of_any_arguments;
    return calls::explain<detail::flaw_of_call<calls, P, post_pruning_options, Arguments...>(), P>();
}
#endif

// On taskvec::gpu this lives in a header of its own.
TASKVEC_CALLS_NEED_HEADER(post_pruning, reuse, "taskvec/device/reuse.hpp")

} // namespace taskvec::inline TASKVEC_ABI
