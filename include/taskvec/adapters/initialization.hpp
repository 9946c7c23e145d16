// The initialisation φ0 = (A0, B0) that an adapter was trained from, and the checks that two of them belong together.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/lora.hpp>
#include <taskvec/core/error.hpp>

#include <string>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// What messages call an initialisation and the adapter that was trained from it.
struct initialization_labels {
    std::string initial = "the initialisation", adapter = "the adapter"; ///< in the singular
};

/// Throws unless one module's update can have been trained from `initial`: shape_mismatch for another shape or rank (or
/// factors that make no product), invalid_argument for another scaling, nonfinite_error; `name` is the module's.
/// Whether it was, the numbers do not tell.
template <arithmetic_element T>
void check_trained_from(const lora_update<T>& initial, const lora_update<T>& adapter, std::string_view name,
    const initialization_labels& labels = {})
{
    check_update(initial, name);
    check_update(adapter, name);
    if (adapter.out() != initial.out() || adapter.in() != initial.in() || adapter.rank() != initial.rank()) {
        raise<shape_mismatch>(error_code::adapter_shape,
            message("module '", name, "' is ", adapter.out(), "×", adapter.in(), " of rank ", adapter.rank(), " in ",
                labels.adapter, " but ", initial.out(), "×", initial.in(), " of rank ", initial.rank(), " in ",
                labels.initial, ": this is not what the adapter was trained from"));
    }
    if (!same_scaling(adapter.scaling, initial.scaling)) {
        raise<invalid_argument>(error_code::initialization_differs,
            message("module '", name, "' has scaling ", adapter.scaling, " in ", labels.adapter, " but ",
                initial.scaling, " in ", labels.initial, ": this is not what the adapter was trained from"));
    }
}

/// The same for every module of an adapter; also throws invalid_argument where the two do not have the same modules, or
/// none.
template <arithmetic_element T>
void check_trained_from(
    const lora_adapter<T>& initial, const lora_adapter<T>& adapter, const initialization_labels& labels = {})
{
    if (initial.empty()) {
        raise<invalid_argument>(error_code::initialization_differs,
            message(labels.initial,
                " has no modules: linearized adapters fold, and adapters merge "
                "in phi space, only around their initialisation"));
    }
    for (const auto& [name, update] : initial) {
        if (!adapter.contains(name)) {
            raise<invalid_argument>(error_code::initialization_differs,
                message("module '", name, "' of ", labels.initial, " is missing in ", labels.adapter,
                    ": give the initialisation that it was trained from"));
        }
    }
    for (const auto& [name, update] : adapter) {
        const auto start = initial.find(name);
        if (start == initial.end()) {
            raise<invalid_argument>(error_code::initialization_differs,
                message("module '", name, "' of ", labels.adapter, " is not in ", labels.initial,
                    ": give the initialisation that it was trained from"));
        }
        check_trained_from(start->second, update, name, labels);
    }
}

} // namespace taskvec::inline TASKVEC_ABI
