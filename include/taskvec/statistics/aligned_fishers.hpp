// The diagonal Fishers of tasks lined up with the models that they belong to, and checked.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/callback.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/companion.hpp>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// What messages call the Fisher of a task.
[[nodiscard]] inline std::string fishers_label(
    const std::vector<std::string>& labels, std::size_t t, const aligned_models& models)
{
    return labels.empty() ? "the Fisher of " + models.label(t) : labels[t];
}

/// The diagonal Fishers of tasks lined up with the models that they belong to. Checked: that each included tensor has
/// one of its shape for every task, and no other tensor, and that it can be read in memory space `space`.
class aligned_fishers {
public:
    aligned_fishers(const aligned_models& models, std::span<const const_model_ref> fishers,
        const std::vector<std::string>& labels, memory_space space = memory_space::host)
    {
        const std::size_t tasks = models.task_count();
        if (fishers.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(fishers.size(), " Fishers for ", tasks, " tasks: give one each, in the order of the tasks"));
        }
        if (!labels.empty() && labels.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(labels.size(), " labels for ", tasks, " Fishers: give one each, or none"));
        }
        for (std::size_t t = 0; t < tasks; ++t) {
            for (const auto& [name, tensor] : fishers[t]) {
                if (!detail::find_by_name(models.outputs(), name)) {
                    raise<invalid_argument>(error_code::tensor_unexpected,
                        message("tensor '", name, "' of ", fishers_label(labels, t, models),
                            " is not in the models: these are the statistics of another model"));
                }
            }
        }
        operands_.resize(models.tensors().size() * tasks);
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            for (std::size_t t = 0; t < tasks; ++t) {
                const const_tensor_ref* const fisher = fishers[t].find(tensor.name);
                if (!fisher) {
                    const bool stands_in = models.options().on_missing == missing_tensors::base
                        && tensor.tasks[t].data == tensor.base.data && tensor.tasks[t].source == tensor.base.source;
                    if (stands_in) { continue; }
                    raise<invalid_argument>(error_code::tensor_missing,
                        message("tensor '", tensor.name, "' is missing in ", fishers_label(labels, t, models),
                            ": collect statistics for every parameter, or exclude the tensor"));
                }
                check_fisher(*fisher, tensor, [&] { return fishers_label(labels, t, models); }, space);
                operands_[i * tasks + t] = {static_cast<const std::byte*>(fisher->data), fisher->dtype};
                companions_.push_back({i, operands_[i * tasks + t].data, byte_count(fisher->dtype, tensor.size)});
            }
        }
    }

    /// Ft of each tensor, [tensor][task]; null data where it counts as 0.
    [[nodiscard]] const call_vector<aligned_tensor::operand>& operands() const noexcept { return operands_; }
    [[nodiscard]] const call_vector<companion>& companions() const noexcept { return companions_; }

private:
    static void check_fisher(const const_tensor_ref& fisher, const aligned_tensor& tensor,
        function_ref<std::string()> where, memory_space space)
    {
        if (fisher.shape != tensor.shape) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("tensor '", tensor.name, "' has shape ", to_string(fisher.shape), " in ", where(), " but ",
                    to_string(tensor.shape), " in the models: these are the statistics of another model"));
        }
        if (!is_storage(fisher.dtype) && !is_fp8(fisher.dtype)) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("tensor '", tensor.name, "' has dtype ", to_string(fisher.dtype), " in ", where(),
                    "; expected ", storage_names(), ": convert it"));
        }
        if (fisher.space != space || !fisher.contiguous() || (!fisher.data && tensor.size > 0)) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", tensor.name, "' of ", where(), " must be contiguous ",
                    space == memory_space::host ? "host" : "device", " memory: copy it first"));
        }
    }

    call_vector<aligned_tensor::operand> operands_;
    call_vector<companion> companions_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
