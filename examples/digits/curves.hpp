// Accuracy against λ, for the merges that have one.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "setting.hpp"

#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

/// Collected over seeds; a curve for each method, in the order in which they were first added.
class lambda_curves {
public:
    /// Measures a merge with this λ on validation and test. Returns its validation accuracy.
    double add(std::string_view method, double lambda, const encoder& model, const setting& s);

    /// What was measured, as CSV; test accuracy as SVG.
    void write(const std::filesystem::path& csv, const std::filesystem::path& svg, const std::string& title) const;

private:
    struct point {
        std::vector<double> validation, test; ///< an element for each seed
    };
    struct curve {
        std::string method;
        std::map<double, point> points;
    };
    std::vector<curve> curves_;
};

} // namespace digits
