// What keep rules keep, written out as their definitions read; and plain sums over it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "ties.hpp"

#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

/// Without the floor(gamma·n) largest, the floor(density·n) next largest of every stretch of `sizes`; zeros elsewhere.
template <class A>
std::vector<A> between(const std::vector<A>& x, const std::vector<std::size_t>& sizes, double density, double gamma)
{
    std::vector<A> kept(x.size(), A{0});
    std::size_t begin = 0;
    for (const std::size_t size : sizes) {
        std::vector<std::size_t> order(size);
        std::iota(order.begin(), order.end(), begin);
        std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return std::abs(x[a]) > std::abs(x[b]); });
        const auto take = static_cast<std::size_t>(std::floor(density * static_cast<double>(size)));
        const auto drop =
            std::min(static_cast<std::size_t>(std::floor(gamma * static_cast<double>(size))), size - take);
        for (std::size_t i = drop; i < drop + take; ++i) { kept[order[i]] = x[order[i]]; }
        begin += size;
    }
    return kept;
}

/// kept, times the factor for each stretch that gives it the L1 norm of x back.
template <class A>
std::vector<A> with_l1_of(const std::vector<A>& x, std::vector<A> kept, const std::vector<std::size_t>& sizes)
{
    std::size_t begin = 0;
    for (const std::size_t size : sizes) {
        double all = 0, left = 0;
        for (std::size_t i = begin; i < begin + size; ++i) {
            all += std::abs(static_cast<double>(x[i]));
            left += std::abs(static_cast<double>(kept[i]));
        }
        const double factor = all < 1e-7 || left < 1e-7 ? 1.0 : all / left;
        for (std::size_t i = begin; i < begin + size; ++i) { kept[i] = product(static_cast<A>(factor), kept[i]); }
        begin += size;
    }
    return kept;
}

/// τt of models given as vectors.
template <class A>
std::vector<std::vector<A>> task_vectors(const std::vector<A>& base, const std::vector<std::vector<A>>& tasks)
{
    std::vector<std::vector<A>> deltas = tasks;
    for (auto& delta : deltas) {
        for (std::size_t i = 0; i < base.size(); ++i) { delta[i] = sum(delta[i], -base[i]); }
    }
    return deltas;
}

/// θ0 + λ·(Σ wt·xt / divisor).
template <class A>
std::vector<A> added(const std::vector<A>& base, const std::vector<std::vector<A>>& x,
    const std::vector<double>& weights, double lambda, bool normalize)
{
    std::vector<A> out(base.size());
    A divisor = normalize ? A{0} : A{1};
    for (std::size_t t = 0; normalize && t < x.size(); ++t) { divisor = sum(divisor, static_cast<A>(weights[t])); }
    for (std::size_t i = 0; i < base.size(); ++i) {
        A total = 0;
        for (std::size_t t = 0; t < x.size(); ++t) { total = sum(total, product(static_cast<A>(weights[t]), x[t][i])); }
        out[i] = sum(base[i], product(static_cast<A>(lambda), total / divisor));
    }
    return out;
}

} // namespace reference
