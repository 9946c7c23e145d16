// What every half of the digits example starts from, for one seed: the data of all tasks, the pre-trained network, and
// the way everything is scored.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "network.hpp"
#include "table.hpp"

#include <cstdint>
#include <vector>

namespace digits {

/// Element t of train, validation and test is task t's data. Models are fitted to train, every λ, density and weight is
/// chosen on validation, the tables report test.
struct setting {
    std::uint64_t seed;
    std::vector<dataset> train, validation, test;
    network base;
};

setting make_setting(const dataset& images, std::uint64_t seed);

/// One model's accuracy on every task.
scores evaluate(const encoder& model, const matrix& head, const std::vector<dataset>& data);

/// Task t's own model's accuracy on task t, for every t.
scores evaluate(const std::vector<encoder>& models, const matrix& head, const std::vector<dataset>& data);

/// The candidate with the highest score, the first of equals, and what it scored.
template <class Candidate>
struct choice {
    Candidate best{};
    double score = -1;

    /// True when this candidate is the best so far.
    bool offer(const Candidate& candidate, double value)
    {
        if (value <= score) { return false; }
        best = candidate;
        score = value;
        return true;
    }
};

/// first, first + step … last, without accumulating rounding.
[[nodiscard]] inline std::vector<double> grid(double first, double last, double step)
{
    std::vector<double> values;
    for (int i = 0; first + i * step < last + 0.5 * step; ++i) { values.push_back(first + i * step); }
    return values;
}

} // namespace digits
