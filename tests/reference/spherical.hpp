// Means on a sphere, written out over whole vectors in f64.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace reference {

using vectors = std::vector<std::vector<double>>;

inline double dot(const std::vector<double>& a, const std::vector<double>& b)
{
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) { sum += a[i] * b[i]; }
    return sum;
}
inline double length(const std::vector<double>& a)
{
    return std::sqrt(dot(a, a));
}
inline std::vector<double> combined(const vectors& x, const std::vector<double>& factors)
{
    std::vector<double> sum(x[0].size());
    for (std::size_t t = 0; t < x.size(); ++t) {
        for (std::size_t i = 0; i < sum.size(); ++i) { sum[i] += factors[t] * x[t][i]; }
    }
    return sum;
}
inline std::vector<double> times(std::vector<double> x, double factor)
{
    for (double& value : x) { value *= factor; }
    return x;
}

inline std::vector<double> nuslerp(const vectors& x, const std::vector<double>& weights)
{
    const double w0 = weights.empty() ? 1 : weights[0], w1 = weights.empty() ? 1 : weights[1];
    const double t = w0 + w1 == 0 ? 0.5 : w1 / (w0 + w1);
    const double cosine = std::clamp(
        dot(times(x[0], 1 / std::max(length(x[0]), 1e-7)), times(x[1], 1 / std::max(length(x[1]), 1e-7))), -1.0, 1.0);
    if (1 - cosine * cosine <= 1e-14) { return combined(x, {1 - t, t}); }
    const double angle = std::acos(cosine);
    return combined(x, {std::sin((1 - t) * angle) / std::sin(angle), std::sin(t * angle) / std::sin(angle)});
}

/// With its step in the tangent space.
inline std::vector<double> multi_slerp(const vectors& x, std::vector<double> weights, bool normalize)
{
    double total = 0, mean_length = 0;
    for (const double weight : weights) { total += weight; }
    vectors units;
    for (std::size_t t = 0; t < x.size(); ++t) {
        if (normalize) { weights[t] /= total; }
        units.push_back(times(x[t], 1 / (length(x[t]) + 1e-8)));
        mean_length += weights[t] * length(x[t]);
    }
    auto mean = combined(units, weights);
    if (length(mean) < 1e-8) { return combined(x, weights); }
    mean = times(mean, 1 / length(mean));
    vectors tangents;
    for (const auto& unit : units) { tangents.push_back(combined({unit, mean}, {1, -dot(unit, mean)})); }
    const auto tangent = combined(tangents, weights);
    const double step = length(tangent) + 1e-8;
    return times(combined({mean, tangent}, {std::cos(step), std::sin(step) / step}), mean_length);
}

/// A fixed number of steps, however short.
inline std::vector<double> karcher(const vectors& x, std::vector<double> weights, int steps)
{
    double total = 0, mean_length = 0, of_directions = 0;
    for (const double weight : weights) { total += weight; }
    vectors units;
    std::vector<double> shares;
    for (std::size_t t = 0; t < x.size(); ++t) {
        mean_length += weights[t] / total * length(x[t]);
        if (length(x[t]) == 0 || weights[t] == 0) { continue; }
        units.push_back(times(x[t], 1 / length(x[t])));
        shares.push_back(weights[t]);
        of_directions += weights[t];
    }
    if (units.empty()) { return std::vector<double>(x[0].size()); }
    shares = times(shares, 1 / of_directions);
    auto mean = combined(units, shares);
    mean = length(mean) < 1e-13 ? units[0] : times(mean, 1 / length(mean));
    for (int step = 0; step < steps; ++step) {
        std::vector<double> tangent(mean.size());
        for (std::size_t t = 0; t < units.size(); ++t) {
            const double cosine = std::clamp(dot(units[t], mean), -1.0, 1.0), angle = std::acos(cosine);
            if (angle < 1e-13 || std::sin(angle) < 1e-12) { continue; }
            const auto away = combined({units[t], mean}, {1, -cosine});
            tangent = combined({tangent, away}, {1, shares[t] * angle / std::sin(angle)});
        }
        const double angle = length(tangent);
        if (angle < 1e-13) { break; }
        mean = combined({mean, tangent}, {std::cos(angle), std::sin(angle) / angle});
        mean = times(mean, 1 / length(mean));
    }
    return times(mean, mean_length);
}

} // namespace reference
