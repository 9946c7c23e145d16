// What a method may ask for before the walk that merges, on taskvec::gpu: the interface of cpu_passes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/device/methods/vector_dots.hpp>
#include <taskvec/device/models/device_models.hpp>
#include <taskvec/device/models/tensor_dots.hpp>
#include <taskvec/device/select/top_k.hpp>
#include <taskvec/methods/method.hpp>

#include <concepts>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The passes of the gpu policy: tables lie in device memory, sums and thresholds come from there.
class device_passes {
public:
    /// Over models that the device sees, which outlive it.
    explicit device_passes(device_models& models)
        : models_(&models)
        , flags_(models.policy(), std::vector(2, device_models::none))
    { }

    static constexpr memory_space space = memory_space::device; ///< Where tables lie.
    /// The models as the device sees them.
    [[nodiscard]] device_models& walked() const noexcept { return *models_; }
    /// Where the passes run.
    [[nodiscard]] const gpu& policy() const noexcept { return models_->policy(); }
    /// The models that are merged.
    [[nodiscard]] const aligned_models& models() const noexcept { return models_->models(); }
    /// How many tasks there are.
    [[nodiscard]] std::size_t tasks() const noexcept { return models().task_count(); }
    /// Operands beside the models, for each tensor.
    [[nodiscard]] std::size_t beside_each() const noexcept { return models_->operand_count() - 1 - tasks(); }
    [[nodiscard]] const aligned_tensor::operand& beside(std::size_t tensor, std::size_t b) const noexcept
    {
        return models_->operand(tensor, 1 + tasks() + b);
    }
    /// A table where functors can read it; it lives as long as the passes do.
    template <class T, class Allocator>
    [[nodiscard]] const T* keep(const std::vector<T, Allocator>& table)
    {
        const auto kept = std::make_shared<device::buffer<T>>(policy(), table);
        tables_.push_back(kept);
        return kept->data();
    }
    /// Where functors note the least place of NaN or infinity beside the models (null where it may spread), and of what
    /// is negative there.
    [[nodiscard]] elementwise::counter* nonfinite_beside() const noexcept
    {
        return models_->nonfinite_flag() ? flags_.data() : nullptr;
    }
    /// Where functors note the least place that is negative beside the models.
    [[nodiscard]] elementwise::counter* negative_beside() const noexcept { return flags_.data() + 1; }
    /// Both flags, on the host. Waits.
    [[nodiscard]] std::vector<elementwise::counter> flags() const { return flags_.download(); }

private:
    device_models* models_;
    device::buffer<elementwise::counter> flags_;
    std::vector<std::shared_ptr<const void>> tables_;
};

/// As on the CPU, with its bits.
template <std::same_as<device_passes> Passes>
[[nodiscard]] call_vector<call_vector<double>> tensor_dots(
    Passes& passes, std::span<const operand_pair> pairs, bool difference, std::string_view = {})
{
    bool beside = !pairs.empty();
    for (const operand_pair pair : pairs) { beside = beside && pair.first > passes.tasks(); }
    return tensor_dots(
        passes.walked(), pairs, difference, beside ? passes.nonfinite_beside() : passes.walked().nonfinite_flag());
}

template <std::same_as<device_passes> Passes>
[[nodiscard]] call_vector<call_vector<double>> tensor_dots(
    Passes& passes, std::initializer_list<operand_pair> pairs, bool difference, std::string_view phase = {})
{
    return tensor_dots(passes, std::span<const operand_pair>(pairs.begin(), pairs.size()), difference, phase);
}

/// As on the CPU, with its bits.
template <std::same_as<device_passes> Passes>
[[nodiscard]] trim_thresholds trim_thresholds_of(
    Passes& passes, const task_shares& density, scope over, trim_rule rule = trim_rule::exact)
{
    trim_thresholds found = detail::thresholds_on_device(passes.walked(), density, over, rule);
    passes.walked().check_finite(); // the selection has read everything but what it kept whole, and has waited
    return found;
}
/// The same for count(n) entries of n, or count(n, t) of task t.
template <std::same_as<device_passes> Passes, entry_count Count>
[[nodiscard]] trim_thresholds trim_thresholds_of(Passes& passes, const Count& count, scope over)
{
    trim_thresholds found = detail::thresholds_on_device(passes.walked(), count, over);
    passes.walked().check_finite();
    return found;
}

} // namespace taskvec::inline TASKVEC_ABI
