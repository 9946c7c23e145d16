// What adapters change of a base, by tensor: folded into it, or a task of any merge that is never stored.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapted_weight.hpp>
#include <taskvec/models/aligned_models.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What adapters change of a base: updates, and tensors that were saved whole, by the names of the base's tensors. It
/// refers to the updates. One of these may become a task of aligned models (attach()), which then reads
/// base + Σ weight·ΔW wherever it would read a stored model; or be folded into the base (fuse()).
///
///     adapted_model sum;
///     for (const auto& [module, update] : adapter) { sum.add(base, module + ".weight", update); }
class adapted_model {
public:
    /// Adds weight·ΔW to a tensor of the base: out×in, or in×out where `place` says so; of a convolution
    /// (out×in×kernel…) the update's `in` counts the kernel. A vector takes an update of 1×n. Of a tensor of several
    /// matrices (experts×out×in, experts×in×out, or blocks of rows of one, each out×in) `place` says which one changes.
    /// Throws invalid_argument
    /// for a tensor that the base lacks, dtype_mismatch for one that does not hold floating numbers, shape_mismatch,
    /// nonfinite_error for factors or weights that are not finite.
    template <arithmetic_element T>
    void add(const const_model_ref& base, const std::string& tensor, const lora_update<T>& update, double weight = 1,
        update_place place = {}, std::string_view label = "the adapter")
    {
        weight_change change;
        if constexpr (std::same_as<T, double>) { change.wide = &update; }
        else {
            change.single = &update;
        }
        check_update(update, tensor);
        check_weight(weight, label);
        const const_tensor_ref& to = find(base, tensor, label);
        const bool divides = place.slices == 0
            || (place.row_blocks ? to.shape.size() == 2 && !place.transposed
                        && static_cast<std::size_t>(to.shape[0]) % place.slices == 0
                                 : to.shape.size() == 3 && static_cast<std::size_t>(to.shape[0]) == place.slices);
        if (!divides || place.slice >= std::max<std::size_t>(place.slices, 1)) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("tensor '", tensor, "' has shape ", to_string(to.shape), ", and ", label, " changes ",
                    place.slices, " matrices of it: this adapter belongs to another base"));
        }
        const std::size_t entries = to.size(tensor) / std::max<std::size_t>(place.slices, 1);
        const auto [rows, columns] = place.slices == 0 ? sides(to)
            : place.row_blocks ? sides({to.shape[0] / static_cast<std::int64_t>(place.slices), to.shape[1]}, entries)
                               : sides({to.shape[1], to.shape[2]}, entries);
        const std::size_t out = place.transposed ? columns : rows, in = place.transposed ? rows : columns;
        if (out != update.out() || in != update.in()) {
            const bool turned = rows == update.in() && columns == update.out();
            raise<shape_mismatch>(error_code::adapter_shape,
                message("tensor '", tensor, "' has shape ", to_string(to.shape),
                    place.slices ? message(", one of ", place.slices, " parts is ", rows, "×", columns) : std::string(),
                    ", but its update in ", label, " is ", update.out(), "×", update.in(),
                    place.transposed ? " (transposed)" : "",
                    turned ? ": it fits the other way round (fan_in_fan_out)"
                           : ": this adapter belongs to another base"));
        }
        if (!place.magnitude.empty() && place.magnitude.size() != update.out()) {
            raise<shape_mismatch>(error_code::adapter_shape,
                message("tensor '", tensor, "': ", label, " has ", place.magnitude.size(), " magnitudes (DoRA) for ",
                    update.out(), " outputs"));
        }
        check_finite(update.b.data(), update.b.size(), tensor, "lora_B", label);
        check_finite(update.a.data(), update.a.size(), tensor, "lora_A", label);
        check_finite(place.magnitude.data(), place.magnitude.size(), tensor, "the magnitudes", label);
        change.weight = weight;
        change.place = std::move(place);
        change.label = label;
        auto& list = changes_[tensor];
        for (const auto& other : list) {
            if (other.is_update() && other.place.slices != change.place.slices) {
                raise<shape_mismatch>(error_code::adapter_shape,
                    message("tensor '", tensor, "' is one matrix for ", change.place.slices == 0 ? label : other.label,
                        ", and several for ", change.place.slices == 0 ? other.label : std::string(label),
                        ": the two were made for different layers"));
            }
            if (other.is_update() && other.place.transposed != change.place.transposed) {
                raise<shape_mismatch>(error_code::adapter_shape,
                    message("tensor '", tensor, "' is transposed for ", change.place.transposed ? label : other.label,
                        ", and as it is for ", change.place.transposed ? other.label : std::string(label),
                        ": the two were made for different layers"));
            }
        }
        list.push_back(std::move(change));
    }
    template <arithmetic_element T>
    void add(const const_model_ref&, const std::string&, const lora_update<T>&&, double = 1, update_place = {},
        std::string_view = {}) = delete; // name the update first: it is referred to
    /// Adds weight·(saved − base): a tensor that was trained whole. With weight 1, and nothing else for this tensor, it
    /// takes the base's place.
    void replace(const const_model_ref& base, const std::string& tensor, const const_tensor_ref& saved,
        double weight = 1, std::string_view label = "the adapter")
    {
        check_weight(weight, label);
        const const_tensor_ref& to = find(base, tensor, label);
        if (to.shape != saved.shape) {
            raise<shape_mismatch>(error_code::tensor_shape,
                message("tensor '", tensor, "' has shape ", to_string(to.shape), ", and ", label,
                    " saves it whole with shape ", to_string(saved.shape),
                    ": bring the base to that shape first, or leave the tensor out"));
        }
        if (!is_storage(saved.dtype) && !is_fp8(saved.dtype)) { detail::refuse_storage(saved.dtype, tensor); }
        weight_change change;
        change.saved = saved;
        change.weight = weight;
        change.label = label;
        changes_[tensor].push_back(std::move(change));
    }

    /// What was added, by the name of the tensor, each tensor's changes in the order in which they came.
    [[nodiscard]] const std::map<std::string, std::vector<weight_change>>& changes() const noexcept { return changes_; }
    [[nodiscard]] bool empty() const noexcept { return changes_.empty(); }

    /// The sources of the changed tensors, for task `task` of models that were lined up with the base in its place. It
    /// outlives the models. Tensors that take no part in them are left out.
    [[nodiscard]] std::vector<std::unique_ptr<operand_source>> attach(aligned_models& models, std::size_t task) const
    {
        std::vector<std::unique_ptr<operand_source>> sources;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            const auto place = changes_.find(tensor.name);
            if (place == changes_.end()) { continue; }
            sources.push_back(
                source_of(tensor.name, tensor.tasks[task], sides(tensor.shape, tensor.size), place->second));
            models.compute(task, i, *sources.back());
        }
        return sources;
    }
    /// Makes `model`, the base's tensors, have the changed ones: each names a source that works it out as F32 (F64
    /// where the base or a change is F64) whenever it is read. The sources outlive the model's readers. For algorithms
    /// that read models tensor by tensor, as extract_lora() does.
    [[nodiscard]] std::vector<std::unique_ptr<operand_source>> put_into(const_model_ref& model) const
    {
        std::vector<std::unique_ptr<operand_source>> sources;
        const_model_ref changed;
        for (const auto& [name, tensor] : model) {
            const auto place = changes_.find(name);
            if (place == changes_.end()) {
                changed.insert(name, const_tensor_ref(tensor));
                continue;
            }
            sources.push_back(source_of(name, {static_cast<const std::byte*>(tensor.data), tensor.dtype, tensor.source},
                sides(tensor), place->second));
            changed.insert(
                name, {nullptr, sources.back()->type(), tensor.shape, {}, memory_space::host, 0, sources.back().get()});
        }
        model = std::move(changed);
        return sources;
    }

    /// Rows and columns of a weight: the first extent, and all others together; a vector is one row.
    [[nodiscard]] static std::pair<std::size_t, std::size_t> sides(const extents& shape, std::size_t size)
    {
        const std::size_t rows = shape.size() < 2 ? 1 : static_cast<std::size_t>(shape[0]);
        return {rows, rows == 0 ? 0 : size / rows};
    }

private:
    [[nodiscard]] static std::pair<std::size_t, std::size_t> sides(const const_tensor_ref& tensor)
    {
        return sides(tensor.shape, tensor.size());
    }
    [[nodiscard]] static std::unique_ptr<operand_source> source_of(const std::string& name,
        const aligned_tensor::operand& from, std::pair<std::size_t, std::size_t> size,
        const std::vector<weight_change>& list)
    {
        const bool wide = from.dtype == dtype::f64 || std::any_of(list.begin(), list.end(), [](const auto& change) {
            return change.wide || (!change.is_update() && change.saved.dtype == dtype::f64);
        });
        const auto stack =
            std::find_if(list.begin(), list.end(), [](const weight_change& change) { return change.place.slices > 0; });
        if (stack != list.end()) { // each matrix is as large as its updates
            const bool turned = stack->place.transposed;
            const std::size_t rows = turned ? stack->in() : stack->out(), columns = turned ? stack->out() : stack->in();
            if (wide) {
                return std::make_unique<adapted_stack<double>>(name, from, stack->place.slices, rows, columns, list);
            }
            return std::make_unique<adapted_stack<float>>(name, from, stack->place.slices, rows, columns, list);
        }
        if (wide) { return std::make_unique<adapted_weight<double>>(name, from, size.first, size.second, list); }
        return std::make_unique<adapted_weight<float>>(name, from, size.first, size.second, list);
    }
    [[nodiscard]] static const const_tensor_ref& find(
        const const_model_ref& base, const std::string& tensor, std::string_view label)
    {
        const const_tensor_ref* const found = base.find(tensor);
        if (!found) {
            raise<invalid_argument>(error_code::tensor_unexpected,
                message(label, " changes the tensor '", tensor,
                    "', which the base does not have: use the base that it was trained on"));
        }
        if (!is_storage(found->dtype) && !is_fp8(found->dtype)) { detail::refuse_storage(found->dtype, tensor); }
        return *found;
    }
    static void check_weight(double weight, std::string_view label)
    {
        if (!std::isfinite(weight)) {
            raise<invalid_argument>(
                error_code::parameter_not_finite, message("the weight of ", label, " is not finite"));
        }
    }
    template <class T>
    static void check_finite(
        const T* values, std::size_t size, std::string_view tensor, std::string_view what, std::string_view label)
    {
        for (std::size_t i = 0; i < size; ++i) {
            if (std::isfinite(values[i])) { continue; }
            raise<nonfinite_error>(error_code::not_finite,
                message("tensor '", tensor, "': ", what, " in ", label, " holds ",
                    std::isnan(values[i]) ? "NaN" : "infinity", " at entry ", i,
                    "; repair the adapter or leave it out"));
        }
    }

    std::map<std::string, std::vector<weight_change>> changes_;
};

} // namespace taskvec::inline TASKVEC_ABI
