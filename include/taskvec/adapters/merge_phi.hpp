// Merging adapters in the space of their own parameters φ = (A, B), for adapters that share their initialisation φ0.
// Tang et al., "Parameter efficient multi-task model fusion with partial linearization" (ICLR 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapter.hpp>
#include <taskvec/methods/merge.hpp>

#include <span>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

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
            raise<invalid_argument>(message("'", name, "': factors must be row-major, as PEFT stores them"));
        }
        model.insert(name + ".lora_A", tensor(update.a));
        model.insert(name + ".lora_B", tensor(update.b));
    }
    return model;
}

} // namespace detail

/// φ* = method(φ0, φ1 … φT): any merge of models, applied to the factors. With task_arithmetic_options it is
/// φ0 + λ·Σ wt·(φt − φ0). All adapters must have the modules, ranks and scalings of `init`, which is what they were
/// trained from (whether they were, the numbers do not tell). Bits, errors and cost: those of the merge; and
/// invalid_argument, shape_mismatch where an adapter does not fit `init`.
///
///     auto merged = merge_in_phi<float>(cpu{}, task_arithmetic_options{.lambda = 0.3}, init, adapters);
template <arithmetic_element T, merge_method Options>
[[nodiscard]] lora_adapter<T> merge_in_phi(const cpu& policy, const Options& options, const lora_adapter<T>& init,
    std::type_identity_t<std::span<const lora_adapter<T>>> adapters, const model_options& how = {},
    merge_report* report = nullptr)
{
    for (std::size_t t = 0; t < adapters.size(); ++t) {
        const std::string label = how.labels.size() == adapters.size() ? how.labels[t] : message("adapter ", t + 1);
        for (const auto& [name, update] : adapters[t]) {
            if (!init.contains(name)) {
                raise<invalid_argument>(message("module '", name, "' of ", label, " is not in the initialisation"));
            }
        }
        for (const auto& [name, start] : init) {
            const auto found = adapters[t].find(name);
            if (found == adapters[t].end()) {
                raise<invalid_argument>(message("module '", name, "' of the initialisation is missing in ", label));
            }
            const auto& update = found->second;
            if (update.out() != start.out() || update.in() != start.in() || update.rank() != start.rank()
                || !same_scaling(update.scaling, start.scaling)) {
                raise<shape_mismatch>(
                    message("module '", name, "' is ", update.out(), "×", update.in(), " of rank ", update.rank(),
                        ", scaling ", update.scaling, " in ", label, " but ", start.out(), "×", start.in(), " of rank ",
                        start.rank(), ", scaling ", start.scaling, " in the initialisation: they do not share it"));
            }
        }
    }
    lora_adapter<T> merged = init;
    const auto base = detail::phi_tensors<const_model_ref>(init);
    std::vector<const_model_ref> tasks;
    for (const auto& adapter : adapters) { tasks.push_back(detail::phi_tensors<const_model_ref>(adapter)); }
    const auto out = detail::phi_tensors<model_ref>(merged);
    merge_report done = merge(policy, options, base, std::span<const const_model_ref>(tasks), out, how);
    if (report) { *report = std::move(done); }
    return merged;
}

} // namespace taskvec::inline TASKVEC_ABI
