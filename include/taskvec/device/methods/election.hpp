// What TIES and DARE-TIES share on taskvec::gpu: the factors, the counts, and the second look at zero sums.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/methods/election_functor.hpp>
#include <taskvec/device/methods/merge.hpp>
#include <taskvec/methods/ties.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Elects and merges over all tensors of models, and once more over those where the majority decides otherwise than was
/// guessed.
class device_election {
public:
    device_election(device_models& models, const ties_options& options)
        : options_(options)
        , statistics_(models.models().options().statistics)
        , tasks_(models.models().task_count())
        , tallies_(models.policy(), models.models().tensors().size() * per_tensor())
    {
        const election_weights weights = election_weights_of(options, tasks_);
        single_ = device::buffer<float>(models.policy(), election_factors<float>(weights));
        wide_ = device::buffer<double>(models.policy(), election_factors<double>(weights));
    }

    /// keep(std::type_identity<A>{}, tensor) is what keeps entries of a tensor's task vectors. Waits where zero sums
    /// need the majority.
    template <class Keep>
    void write(device_models& models, merge_report& report, const Keep& keep)
    {
        const auto& tensors = models.models().tensors();
        const int guess = provisional_sign(options_);
        std::vector<int> signs(tensors.size(), guess);
        const auto merge = [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
            visit_arithmetic(tensors[tensor], [&]<class A>(std::type_identity<A> type) {
                const A* factors;
                if constexpr (std::same_as<A, double>) { factors = wide_.data(); }
                else {
                    factors = single_.data();
                }
                using kept = decltype(keep(type, tensor));
                const elementwise::elect_and_merge<A, kept> elect{piece, keep(type, tensor), factors, options_.combine,
                    static_cast<A>(signs[tensor]), static_cast<A>(options_.lambda),
                    tallies_.data() + tensor * per_tensor(), statistics_, models.nonfinite_flag()};
                if constexpr (std::same_as<A, float> && kept::by_packs) {
                    const bool done = tasks_ <= elect.held && visit_packs(piece, [&]<class T>(std::type_identity<T>) {
                        using packs = elementwise::elect_and_merge_packs<T, kept>;
                        device::sweep(policy, packs::packs(piece.size), packs{elect});
                    });
                    if (done) { return; }
                }
                device::sweep(policy, piece.size, elect);
            });
        };
        tallies_.clear();
        models.write(all_tensors(models.models()), merge);
        const bool majority =
            options_.zero_sign == zero_sign::majority || options_.zero_sign == zero_sign::majority_or_negative;
        if (!majority && !statistics_) { return; }
        auto counts = totals(tensors.size());
        if (majority) {
            std::vector<std::int64_t> sums;
            for (const auto& of_tensor : counts) { sums.push_back(static_cast<std::int64_t>(of_tensor[0])); }
            signs = majority_signs(options_, std::move(sums));
            bool again = false;
            for (std::size_t i = 0; i < tensors.size(); ++i) {
                if (counts[i][1] == 0 || signs[i] == guess) { continue; }
                device::clear(
                    models.policy(), tallies_.data() + i * per_tensor(), per_tensor() * sizeof(elementwise::counter));
                models.write({i, i + 1}, merge);
                again = true;
            }
            if (again && statistics_) { counts = totals(tensors.size()); }
        }
        if (!statistics_) { return; }
        report.kept.assign(tasks_, 0);
        report.conflicting.assign(tasks_, 0);
        for (const auto& of_tensor : counts) {
            for (std::size_t t = 0; t < tasks_; ++t) {
                report.kept[t] += of_tensor[2 + t];
                report.conflicting[t] += of_tensor[2 + tasks_ + t];
            }
        }
    }

private:
    [[nodiscard]] std::size_t per_tensor() const noexcept
    {
        return elementwise::tally_slots * elementwise::tally_size(tasks_, statistics_);
    }

    /// What was counted, [tensor][what].
    [[nodiscard]] std::vector<std::vector<elementwise::counter>> totals(std::size_t tensors) const
    {
        const std::vector<elementwise::counter> found = tallies_.download();
        const std::size_t size = elementwise::tally_size(tasks_, statistics_);
        std::vector<std::vector<elementwise::counter>> counts(tensors, std::vector<elementwise::counter>(size, 0));
        for (std::size_t i = 0; i < found.size(); ++i) { counts[i / per_tensor()][i % size] += found[i]; }
        return counts;
    }

    ties_options options_;
    bool statistics_;
    std::size_t tasks_;
    device::buffer<elementwise::counter> tallies_;
    device::buffer<float> single_;
    device::buffer<double> wide_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
