// DARE and DARE-TIES on taskvec::gpu: the draws of the CPU.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/methods/election.hpp>
#include <taskvec/device/methods/linear.hpp>
#include <taskvec/methods/dare.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// What decides which entries stay, tensor by tensor.
class device_random_drop {
public:
    device_random_drop(const aligned_models& models, double density, std::uint64_t seed)
        : density_(density)
        , bound_(checked_keep_below(density))
    {
        for (const auto& tensor : models.tensors()) { keys_.push_back(hash64(tensor.name, seed)); }
    }
    template <arithmetic_element A>
    [[nodiscard]] elementwise::keep_at_random<A> get(std::size_t tensor) const
    {
        return {keys_[tensor], bound_, static_cast<A>(density_)};
    }

private:
    double density_;
    std::uint64_t bound_;
    std::vector<std::uint64_t> keys_;
};

} // namespace detail

template <>
class detail::device_merger<dare_options> {
public:
    static constexpr bool needs_base = true, in_place = true;

    device_merger(device_models& models, const dare_options& options)
        : drop_(models.models(), options.density, options.seed)
        , lambda_(options.lambda)
        , weights_(models.policy(), checked_weights(options.weights, models.models().task_count()))
    {
        check_factor(lambda_, "lambda");
    }
    void write(device_models& models, merge_report& report) const
    {
        const std::size_t tasks = models.models().task_count();
        device::buffer<elementwise::counter> tallies(
            models.policy(), models.models().options().statistics ? elementwise::tally_slots * tasks : 0);
        tallies.clear();
        models.write(
            all_tensors(models.models()), [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
                visit_arithmetic(models.models().tensors()[tensor], [&]<class A>(std::type_identity<A>) {
                    using functor = elementwise::random_linear_combination<A>;
                    device::sweep(policy, functor::groups(piece.size),
                        functor{piece, drop_.get<A>(tensor), weights_.get<A>(), static_cast<A>(lambda_), tallies.data(),
                            models.nonfinite_flag()});
                });
            });
        if (tallies.size() == 0) { return; }
        const std::vector<elementwise::counter> found = tallies.download();
        report.kept.assign(tasks, 0);
        for (std::size_t i = 0; i < found.size(); ++i) { report.kept[i % tasks] += found[i]; }
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    device_random_drop drop_;
    double lambda_;
    device_weights weights_;
};

template <>
class detail::device_merger<dare_ties_options> {
public:
    static constexpr bool needs_base = true, in_place = false;

    device_merger(device_models& models, const dare_ties_options& options)
        : drop_(models.models(), options.density, options.seed)
        , election_(models, options.ties)
    { }
    void write(device_models& models, merge_report& report)
    {
        election_.write(
            models, report, [&]<class A>(std::type_identity<A>, std::size_t tensor) { return drop_.get<A>(tensor); });
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    device_random_drop drop_;
    device_election election_;
};

} // namespace taskvec::inline TASKVEC_ABI
