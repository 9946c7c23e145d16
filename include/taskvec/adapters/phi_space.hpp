// Merging adapters by their own parameters φ = (A, B) rather than by the weights they make: average, task arithmetic,
// TIES, or any other merge method, on adapters that share their initialisation φ0. Tang et al., "Parameter efficient
// multi-task model fusion with partial linearization" (ICLR 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/initialization.hpp>
#include <taskvec/adapters/lora.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/methods/merge.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A fine-tuned adapter φt and the initialisation φ0 that its training started from, as named tensors.
struct initialized_adapter {
    const_model_ref adapter; ///< φt, after training
    const_model_ref initial; ///< φ0, before it
};

namespace detail {

inline std::string phi_label(const model_options& how, std::size_t task)
{
    return task < how.labels.size() ? how.labels[task] : message("adapter ", task + 1);
}
/// Options that call the base what it is here, unless the caller has a name for it.
inline model_options phi_options(model_options how)
{
    if (how.base_label == model_options{}.base_label) { how.base_label = "the initialisation"; }
    return how;
}

/// The factors of an adapter as named tensors: "MODULE.lora_A" and "MODULE.lora_B".
template <class Model, class Adapter>
[[nodiscard]] Model phi_tensors(Adapter& adapter)
{
    Model model;
    for (auto& [name, update] : adapter) {
        const auto tensor = [](auto& x) {
            using T = std::remove_reference_t<decltype(*x.data())>;
            return as_tensor(host_view<T>(x.data(), x.size()),
                {static_cast<std::int64_t>(x.rows()), static_cast<std::int64_t>(x.cols())});
        };
        if (update.a.order() != matrix_order::row_major || update.b.order() != matrix_order::row_major) {
            raise<invalid_argument>(
                error_code::tensor_layout, message("'", name, "': factors must be row-major, as PEFT stores them"));
        }
        model.insert(name + ".lora_A", tensor(update.a));
        model.insert(name + ".lora_B", tensor(update.b));
    }
    return model;
}

} // namespace detail

/// Throws unless all adapters started from the same φ0, bit for bit: invalid_argument names the first tensor that
/// differs, or the tensor of an adapter that has no initialisation. Linearized models add up only around a common φ0,
/// and LoRA factors from different random A0 have nothing in common.
inline void check_shared_initialization(std::span<const initialized_adapter> adapters, const model_options& how = {})
{
    if (adapters.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, "no adapter was given: at least one is needed");
    }
    if (!how.labels.empty() && how.labels.size() != adapters.size()) {
        raise<invalid_argument>(error_code::list_length,
            message(how.labels.size(), " labels for ", adapters.size(), " adapters: give one each, or none"));
    }
    const const_model_ref& first = adapters[0].initial;
    if (first.empty()) {
        raise<invalid_argument>(error_code::initialization_differs,
            message(
                "the initialisation of ", detail::phi_label(how, 0), " has no tensors: merging in phi space needs φ0"));
    }
    for (std::size_t t = 0; t < adapters.size(); ++t) {
        for (const auto& [name, tensor] : adapters[t].adapter) {
            if (!first.find(name)) {
                raise<invalid_argument>(error_code::initialization_differs,
                    message("tensor '", name, "' of ", detail::phi_label(how, t),
                        " has no initialisation: merging in phi space needs the φ0 of every tensor; give the adapter "
                        "that "
                        "its training started from"));
            }
        }
    }
    for (std::size_t t = 1; t < adapters.size(); ++t) {
        const std::string label = detail::phi_label(how, t);
        for (const auto& [name, tensor] : adapters[t].initial) {
            if (!first.find(name)) {
                raise<invalid_argument>(error_code::initialization_differs,
                    message("the initialisation of ", label, " has tensor '", name, "', that of ",
                        detail::phi_label(how, 0), " has not"));
            }
        }
        for (const auto& [name, tensor] : first) {
            const auto* other = adapters[t].initial.find(name);
            if (!other) {
                raise<invalid_argument>(error_code::initialization_differs,
                    message("tensor '", name, "' is missing in the initialisation of ", label));
            }
            if (other->shape != tensor.shape) {
                raise<shape_mismatch>(error_code::tensor_shape,
                    message("tensor '", name, "' of the initialisation of ", label, " has shape ",
                        to_string(other->shape), "; expected ", to_string(tensor.shape)));
            }
            if (other->dtype != tensor.dtype || !other->contiguous() || !tensor.contiguous()
                || std::memcmp(other->data, tensor.data, tensor.bytes(name)) != 0) {
                raise<invalid_argument>(error_code::initialization_differs,
                    message("the initialisation of ", label, " differs from that of ", detail::phi_label(how, 0),
                        " in tensor '", name,
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
    std::vector<const_model_ref> models;
    for (const auto& one : adapters) { models.push_back(one.adapter); }
    const std::span<const const_model_ref> tasks(models);
    const model_options named = detail::phi_options(how);
    if constexpr (!method<Options>::needs_base) { return merge(policy, options, tasks, out, named); }
    else {
        return merge(policy, options, adapters[0].initial, tasks, out, named);
    }
}

/// The same of adapters in memory that were all trained from `init`, which check_trained_from() holds them to.
/// Throws what that and merge() throw, and invalid_argument where factors are column-major.
///
///     auto merged = merge_in_phi_space<float>(cpu{}, task_arithmetic_options{.lambda = 0.3}, init, adapters);
template <arithmetic_element T, merge_method Options>
[[nodiscard]] lora_adapter<T> merge_in_phi_space(const cpu& policy, const Options& options, const lora_adapter<T>& init,
    std::type_identity_t<std::span<const lora_adapter<T>>> adapters, const model_options& how = {},
    merge_report* report = nullptr)
{
    const model_options named = detail::phi_options(how);
    for (std::size_t t = 0; t < adapters.size(); ++t) {
        check_trained_from(init, adapters[t], {.initial = named.base_label, .adapter = detail::phi_label(named, t)});
    }
    lora_adapter<T> merged = init;
    const auto base = detail::phi_tensors<const_model_ref>(init);
    std::vector<const_model_ref> tasks;
    for (const auto& adapter : adapters) { tasks.push_back(detail::phi_tensors<const_model_ref>(adapter)); }
    const auto out = detail::phi_tensors<model_ref>(merged);
    merge_report done = merge(policy, options, base, std::span<const const_model_ref>(tasks), out, named);
    if (report) { *report = std::move(done); }
    return merged;
}

} // namespace taskvec::inline TASKVEC_ABI
