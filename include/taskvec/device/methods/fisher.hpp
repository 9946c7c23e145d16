// Fisher merging on taskvec::gpu. The Fishers are in the same memory as the models.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/methods/fisher_functor.hpp>
#include <taskvec/device/methods/linear.hpp>
#include <taskvec/methods/fisher.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The Fishers of tasks that are flat device views.
template <tasks_of<gpu> Fishers>
[[nodiscard]] std::vector<const_model_ref> flat_fishers(const Fishers& fishers)
{
    return detail::flat_models(fishers);
}

template <>
class detail::device_merger<fisher_options> {
public:
    static constexpr bool needs_base = false, in_place = true;

    [[nodiscard]] static std::vector<aligned_tensor::operand> beside(
        const fisher_options& options, const aligned_models& models, memory_space space)
    {
        return aligned_fishers(models, options.fishers, options.labels, space).operands();
    }

    device_merger(device_models& models, const fisher_options& options)
        : options_(options)
        , weights_(checked_fisher_weights(options, models.models().task_count()))
        , flags_(models.policy(), std::vector(2, device_models::none))
    {
        std::vector<double> factors = weights_;
        if (options.normalize) {
            const auto tasks = static_cast<std::uint32_t>(weights_.size());
            std::vector<operand_pair> squares;
            for (std::uint32_t t = 0; t < tasks; ++t) { squares.push_back({1 + tasks + t, 1 + tasks + t}); }
            factors = normalized_fisher_weights(weights_, tensor_dots(models, squares, false, nonfinite(models)));
        }
        factors.insert(factors.end(), weights_.begin(), weights_.end());
        factors_.emplace(models.policy(), factors);
    }
    void write(device_models& models, merge_report&)
    {
        models.write(
            all_tensors(models.models()), [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
                visit_arithmetic(models.models().tensors()[tensor], [&]<class A>(std::type_identity<A>) {
                    A total = 0;
                    for (const double weight : weights_) { total += static_cast<A>(weight); }
                    device::sweep(policy, piece.size,
                        elementwise::fisher_average<A>{piece, factors_->get<A>(), total, fisher_floor<A>(options_),
                            models.nonfinite_flag(), nonfinite(models), flags_.data() + 1});
                });
            });
        check(models);
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    /// The Fishers are read once to merge, and once for their norms.
    [[nodiscard]] std::uint64_t bytes_beside(const device_models& models) const noexcept
    {
        std::uint64_t once = 0;
        for (std::size_t i = 0; i < models.models().tensors().size(); ++i) {
            for (std::size_t which = 1 + weights_.size(); which < models.operand_count(); ++which) {
                const aligned_tensor::operand& fisher = models.operand(i, which);
                if (fisher.data) { once += byte_count(fisher.dtype, models.models().tensors()[i].size); }
            }
        }
        return options_.normalize ? 2 * once : once;
    }

private:
    [[nodiscard]] elementwise::counter* nonfinite(const device_models& models) const noexcept
    {
        return models.nonfinite_flag() ? flags_.data() : nullptr;
    }

    /// Reports the least place of what no Fisher may hold.
    void check(const device_models& models) const
    {
        const std::vector<elementwise::counter> found = flags_.download();
        const std::size_t tasks = weights_.size();
        for (std::size_t which = 0; which < 2; ++which) {
            const elementwise::counter place = found[which];
            if (place == device_models::none) { continue; }
            const std::size_t tensor = models.models().tensor_at(place);
            const std::uint64_t index = place - models.models().tensors()[tensor].position;
            for (std::size_t t = 0; t < tasks; ++t) {
                if (!models.operand(tensor, 1 + tasks + t).data) { continue; }
                const double stored = models.element(tensor, 1 + tasks + t, index);
                const double value =
                    models.models().tensors()[tensor].wide ? stored : static_cast<double>(static_cast<float>(stored));
                if (which == 0 && !std::isfinite(value)) {
                    refuse_fisher_nonfinite(
                        models.models(), tensor, fisher_label(options_, t, models.models()), value, index);
                }
                if (which == 1 && value < 0) {
                    refuse_fisher_negative(
                        models.models(), tensor, fisher_label(options_, t, models.models()), value, index);
                }
            }
        }
    }

    fisher_options options_;
    std::vector<double> weights_;
    device::buffer<elementwise::counter> flags_; // the least places of NaN and infinity, and of what is negative
    std::optional<device_weights> factors_; // ct or ct/‖Ft‖, then ct
};

} // namespace taskvec::inline TASKVEC_ABI
