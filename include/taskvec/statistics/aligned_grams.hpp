// The Gram matrices of tasks lined up with the models that they belong to, and checked.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/companion.hpp>
#include <taskvec/models/weight_layout.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// A linear layer that has Gram matrices.
struct gram_layer {
    std::size_t tensor = 0;
    std::size_t in = 0, out = 0;
    weight_layout layout = weight_layout::out_in;
    std::vector<aligned_tensor::operand> grams{}; // of each task
};

/// What messages call the Grams of a task.
[[nodiscard]] inline std::string grams_label(
    const std::vector<std::string>& labels, std::size_t t, const aligned_models& models)
{
    return labels.empty() ? "the Grams of " + models.label(t) : labels[t];
}

/// The linear layers of aligned models that have Gram matrices, a matrix for each task. Checked: that every matrix
/// belongs to a weight of rank 2, is in×in, is there for every task or for none, and can be read in memory space
/// `space`. What the matrices hold is checked by stored_gram, when it is read.
class aligned_grams {
public:
    aligned_grams(const aligned_models& models, std::span<const const_model_ref> grams,
        const std::vector<std::string>& labels, const std::function<weight_layout(std::string_view)>& layout_of,
        memory_space space = memory_space::host)
    {
        const std::size_t tasks = models.task_count();
        if (grams.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(
                    grams.size(), " sets of Grams for ", tasks, " tasks: give one each, in the order of the tasks"));
        }
        if (!labels.empty() && labels.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(labels.size(), " labels for ", tasks, " sets of Grams: give one each, or none"));
        }
        for (std::size_t t = 0; t < tasks; ++t) {
            for (const auto& [name, gram] : grams[t]) {
                if (!detail::find_by_name(models.outputs(), name)) {
                    raise<invalid_argument>(error_code::tensor_unexpected,
                        message("tensor '", name, "' of ", grams_label(labels, t, models),
                            " is not in the models: these are the statistics of another model"));
                }
            }
        }
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            std::size_t present = 0, absent = 0;
            for (std::size_t t = 0; t < tasks; ++t) { grams[t].find(tensor.name) ? ++present : (absent = t); }
            if (present == 0) { continue; }
            if (present < tasks) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message("tensor '", tensor.name, "' is missing in ", grams_label(labels, absent, models),
                        " but not in the other Grams: collect it for every task, or for none"));
            }
            if (tensor.shape.size() != 2) {
                raise<shape_mismatch>(error_code::statistics_shape,
                    message("tensor '", tensor.name, "' of shape ", to_string(tensor.shape),
                        " has a Gram matrix, but only the weight of a linear layer (rank 2) can have one"));
            }
            const weight_layout layout = layout_of ? layout_of(tensor.name) : weight_layout::out_in;
            const bool rows_are_outputs = layout == weight_layout::out_in;
            gram_layer one{i, static_cast<std::size_t>(tensor.shape[rows_are_outputs ? 1 : 0]),
                static_cast<std::size_t>(tensor.shape[rows_are_outputs ? 0 : 1]), layout, {}};
            for (std::size_t t = 0; t < tasks; ++t) {
                one.grams.push_back(
                    check_gram(*grams[t].find(tensor.name), one, tensor, grams_label(labels, t, models), space));
            }
            for (const auto& gram : one.grams) {
                companions_.push_back({i, gram.data, byte_count(gram.dtype, one.in * one.in)});
            }
            if (tensor.size > 0) { layers_.push_back(std::move(one)); }
        }
    }

    /// In the order of tensors().
    [[nodiscard]] const std::vector<gram_layer>& layers() const noexcept { return layers_; }
    [[nodiscard]] const std::vector<companion>& companions() const noexcept { return companions_; }

private:
    static aligned_tensor::operand check_gram(const const_tensor_ref& gram, const gram_layer& one,
        const aligned_tensor& tensor, const std::string& where, memory_space space)
    {
        const auto in = static_cast<std::int64_t>(one.in);
        if (gram.shape != extents{in, in}) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("tensor '", tensor.name, "' has a Gram matrix of shape ", to_string(gram.shape), " in ", where,
                    "; expected ", to_string({in, in}), " for a weight of shape ", to_string(tensor.shape), " stored ",
                    one.layout == weight_layout::out_in ? "out×in (say so if it is in×out)"
                                                        : "in×out (say so if it is out×in)"));
        }
        if (!is_storage(gram.dtype)) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("tensor '", tensor.name, "' has dtype ", to_string(gram.dtype), " in ", where, "; expected ",
                    storage_names(), ": convert it"));
        }
        if (gram.space != space || !gram.contiguous() || (!gram.data && one.in > 0)) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", tensor.name, "' of ", where, " must be contiguous ",
                    space == memory_space::host ? "host" : "device", " memory: copy it first"));
        }
        return {static_cast<const std::byte*>(gram.data), gram.dtype};
    }

    std::vector<gram_layer> layers_;
    std::vector<companion> companions_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
