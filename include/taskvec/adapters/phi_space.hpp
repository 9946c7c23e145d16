// Merging adapters by their own parameters φ rather than by the weights they make: average, task arithmetic, TIES, or
// any other merge method, on adapters that share their initialisation. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/jvp/linearized_lora.hpp>
#include <taskvec/jvp/parameters.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A fine-tuned adapter φt and the initialisation φ0 that its training started from, as named tensors.
struct initialized_adapter {
    const_model_ref adapter;
    const_model_ref initial;
};

namespace detail {
inline std::string phi_label(const model_options& how, std::size_t task)
{
    return how.labels.empty() ? message("task ", task + 1) : how.labels[task];
}
} // namespace detail

/// Throws unless all adapters started from the same φ0, bit for bit: invalid_argument names the first tensor that
/// differs, or the tensor of an adapter that has no initialisation. Linearized models add up only around a common φ0,
/// and LoRA factors from different random A0 have nothing in common.
inline void check_shared_initialization(std::span<const initialized_adapter> adapters, const model_options& how = {})
{
    if (adapters.empty()) { raise<invalid_argument>("no adapter was given: at least one is needed"); }
    if (!how.labels.empty() && how.labels.size() != adapters.size()) {
        raise<invalid_argument>(
            message(how.labels.size(), " labels for ", adapters.size(), " adapters: give one each, or none"));
    }
    const const_model_ref& first = adapters[0].initial;
    if (first.empty()) {
        raise<invalid_argument>(message(
            "the initialisation of ", detail::phi_label(how, 0), " has no tensors: merging in phi space needs φ0"));
    }
    for (std::size_t t = 0; t < adapters.size(); ++t) {
        for (const auto& [name, tensor] : adapters[t].adapter) {
            if (!first.find(name)) {
                raise<invalid_argument>(message("tensor '", name, "' of ", detail::phi_label(how, t),
                    " has no initialisation: merging in phi space needs the φ0 of every tensor; give the adapter that "
                    "its training started from"));
            }
        }
    }
    for (std::size_t t = 1; t < adapters.size(); ++t) {
        const std::string label = detail::phi_label(how, t);
        for (const auto& [name, tensor] : adapters[t].initial) {
            if (!first.find(name)) {
                raise<invalid_argument>(message("the initialisation of ", label, " has tensor '", name, "', that of ",
                    detail::phi_label(how, 0), " has not"));
            }
        }
        for (const auto& [name, tensor] : first) {
            const auto* other = adapters[t].initial.find(name);
            if (!other) {
                raise<invalid_argument>(message("tensor '", name, "' is missing in the initialisation of ", label));
            }
            if (other->shape != tensor.shape) {
                raise<shape_mismatch>(message("tensor '", name, "' of the initialisation of ", label, " has shape ",
                    to_string(other->shape), "; expected ", to_string(tensor.shape)));
            }
            if (other->dtype != tensor.dtype || !other->contiguous() || !tensor.contiguous()
                || std::memcmp(other->data, tensor.data, tensor.bytes(name)) != 0) {
                raise<invalid_argument>(message("the initialisation of ", label, " differs from that of ",
                    detail::phi_label(how, 0), " in tensor '", name,
                    "': adapters merge in phi space only around one φ0; merge their products instead"));
            }
        }
    }
}

/// φ* = method(φ0; φ1 … φT): any merge method of the library in the adapters' own parameters, after
/// check_shared_initialization(). task_arithmetic_options{.lambda = λ, .weights = w} is φ0 + λ·Σ wt·(φt − φ0), in one
/// fused pass: a LoraHub candidate. `out` holds memory for the adapter's tensors. Bit-exact, errors and cost as
/// merge().
///
///     merge_in_phi_space(cpu{}, task_arithmetic_options{.lambda = 0.3}, adapters, out);
template <merge_method Options>
merge_report merge_in_phi_space(const cpu& policy, const Options& options,
    std::span<const initialized_adapter> adapters, const model_ref& out, const model_options& how = {})
{
    check_shared_initialization(adapters, how);
    std::vector<const_model_ref> tasks;
    for (const auto& one : adapters) { tasks.push_back(one.adapter); }
    model_options named = how;
    if (named.base_label == model_options{}.base_label) { named.base_label = "the initialisation"; }
    if constexpr (detail::merger<Options>::needs_base) {
        return merge(policy, options, adapters[0].initial, tasks, out, named);
    }
    else {
        return merge(policy, options, tasks, out, named);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
