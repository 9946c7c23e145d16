// The papers' claims, each with its place in the paper and measured where it is printed; and what this project observed
// beside them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "table.hpp"

#include <taskvec/core/error.hpp>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

/// P: Jiang et al., "Effective and parameter-efficient reusing fine-tuned models" (2023). L: Tang et al.,
/// "Parameter-efficient multi-task model fusion with partial linearization" (ICLR 2024).
inline constexpr std::string_view papers = "P: Jiang et al. 2023 (PERU). L: Tang et al. 2024 (partial linearization).";

/// A sentence, by how much each seed agrees with it, and the figures that say so.
struct claim {
    std::string text;
    std::string place; ///< in the paper, such as "P Table 1"; empty: an observation that neither paper makes
    std::vector<double> margins; ///< one for each seed; positive: it holds there
    std::string measured;

    [[nodiscard]] bool holds() const { return over_seeds(margins).mean > 0; }
    /// False where the sign hangs on noise: the mean margin is within its deviation over seeds.
    [[nodiscard]] bool decided() const
    {
        const spread margin = over_seeds(margins);
        return margins.size() < 2 || std::abs(margin.mean) > margin.deviation;
    }
};

/// A difference of accuracies in points of percent: "+1.20".
[[nodiscard]] inline std::string points(double fraction)
{
    char buffer[32];
    std::snprintf(buffer, sizeof buffer, "%+.2f", 100.0 * fraction);
    return buffer;
}

/// a − b − more, seed by seed.
[[nodiscard]] inline std::vector<double> minus(
    const std::vector<double>& a, const std::vector<double>& b, double more = 0)
{
    std::vector<double> difference;
    for (std::size_t seed = 0; seed < a.size(); ++seed) { difference.push_back(a[seed] - b[seed] - more); }
    return difference;
}

/// "TIES 70.05, Single-Task 95.77 (-25.73)", with the difference's deviation over seeds where there are several.
[[nodiscard]] inline std::string against(
    std::string_view a, const std::vector<double>& x, std::string_view b, const std::vector<double>& y)
{
    const spread difference = over_seeds(minus(x, y));
    return taskvec::message(a, " ", percent(over_seeds(x).mean), ", ", b, " ", percent(over_seeds(y).mean), " (",
        points(difference.mean), x.size() > 1 ? "±" + percent(difference.deviation) : "", ")");
}

/// What is said of one claim.
[[nodiscard]] inline std::string_view verdict(const claim& c)
{
    if (!c.decided()) { return "within noise    "; }
    if (c.place.empty()) { return c.holds() ? "so it is here   " : "not so here     "; }
    return c.holds() ? "reproduced      " : "NOT reproduced  ";
}

/// The papers' claims first, then the observations.
[[nodiscard]] inline std::string text(const std::vector<claim>& claims)
{
    std::string from_papers, observed;
    for (const auto& c : claims) {
        std::string& out = c.place.empty() ? observed : from_papers;
        out += taskvec::message("  ", verdict(c), c.text, c.place.empty() ? "" : " [" + c.place + "]",
            "\n                  ", c.measured, '\n');
    }
    return from_papers + (observed.empty() ? "" : "  Observed here; neither paper claims it:\n" + observed);
}

} // namespace digits
