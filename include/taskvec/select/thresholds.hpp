// Thresholds of every task vector of aligned models, over the whole model or tensor by tensor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/select/top_k.hpp>

#include <limits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Over what the top entries are counted and the majority sign is taken: all tensors together (what the papers mean), or
/// each tensor by itself.
enum class scope : std::uint8_t { model, tensor };

/// Which entries the trim keeps: exactly k, lowest index first among equals; or every entry whose magnitude reaches the
/// (floor(density·n) + 1)-th largest, however many are equal.
enum class trim_rule : std::uint8_t { exact, reach_next };

/// Thresholds of every task vector, over the whole model or for each tensor.
class trim_thresholds {
public:
    trim_thresholds(const cpu& policy, const aligned_models& models, double density, scope over, trim_rule rule = trim_rule::exact)
    {
        if (models.any_wide()) { find<double>(policy, models, density, over, rule, wide_); }
        else {
            find<float>(policy, models, density, over, rule, single_);
        }
        per_tensor_ = over == scope::tensor;
        tasks_ = models.task_count();
    }
    /// The threshold on task t's vector in a tensor, for arithmetic in A.
    template <arithmetic_element A>
    [[nodiscard]] top_k_threshold<A> get(std::size_t tensor, std::size_t t) const
    {
        const std::size_t index = (per_tensor_ ? tensor : 0) * tasks_ + t;
        if constexpr (std::same_as<A, double>) { return wide_[index]; }
        else {
            return wide_.empty() ? single_[index] : threshold_as<float>(wide_[index]);
        }
    }
    [[nodiscard]] unsigned walks() const noexcept { return walks_; }

private:
    template <arithmetic_element A>
    void find(const cpu& policy, const aligned_models& models, double density, scope over, trim_rule rule, std::vector<top_k_threshold<A>>& thresholds)
    {
        const auto add = [&](chunk_range range, std::uint64_t n) {
            std::uint64_t k = top_k_count(density, n);
            if (rule == trim_rule::reach_next) { k = std::min(n, static_cast<std::uint64_t>(std::floor(density * static_cast<double>(n))) + 1); }
            const std::vector<std::uint64_t> counts(models.task_count(), k);
            // Half the budget for what a pass collects, for all tasks together.
            const std::size_t capacity = std::min(std::size_t{1} << 22, models.options().memory / 2 / (models.task_count() * sizeof(A)));
            unsigned walks = 0;
            for (auto threshold : top_k_thresholds<A>(policy, models, range, counts, capacity, &walks)) {
                if (rule == trim_rule::reach_next) { threshold.equal_end = std::numeric_limits<std::uint64_t>::max(); }
                thresholds.push_back(threshold);
            }
            walks_ = std::max(walks_, walks);
        };
        if (over == scope::model) { add(all_chunks(models), models.elements()); }
        else {
            for (std::size_t i = 0; i < models.tensors().size(); ++i) { add(chunks_of(models, i), models.tensors()[i].size); }
        }
    }

    std::vector<top_k_threshold<float>> single_;
    std::vector<top_k_threshold<double>> wide_;
    bool per_tensor_ = false;
    std::size_t tasks_ = 0;
    unsigned walks_ = 0;
};

} // namespace taskvec::inline TASKVEC_ABI
