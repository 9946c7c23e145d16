// The merges written out as their definitions read, one element at a time: what the fast paths are held to.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/methods/ties.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace reference {

// Sums and products in A, each rounded: volatile keeps the compiler from fusing or widening them.
template <class A>
A product(A a, A b)
{
    volatile A result = a * b;
    return result;
}
template <class A>
A sum(A a, A b)
{
    volatile A result = a + b;
    return result;
}

/// Keeps the k largest magnitudes, lowest index first among equals, by a stable sort.
template <class A>
std::vector<bool> top(const std::vector<A>& x, std::uint64_t k, bool all_equals)
{
    std::vector<std::size_t> order(x.size());
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return std::abs(x[a]) > std::abs(x[b]); });
    std::vector<bool> kept(x.size(), false);
    for (std::uint64_t i = 0; i < k; ++i) { kept[order[i]] = true; }
    if (all_equals && k > 0) {
        for (std::size_t i = 0; i < x.size(); ++i) { kept[i] = kept[i] || std::abs(x[i]) >= std::abs(x[order[k - 1]]); }
    }
    return kept;
}

/// Task vectors in A of models given as one concatenation with `sizes` of their tensors.
template <class A>
std::vector<A> ties(const std::vector<A>& base, const std::vector<std::vector<A>>& tasks,
    const std::vector<std::size_t>& sizes, const taskvec::ties_options& o)
{
    const std::size_t n = base.size(), T = tasks.size();
    std::vector<A> w(T, A{1});
    for (std::size_t t = 0; t < o.weights.size(); ++t) { w[t] = static_cast<A>(o.weights[t]); }
    std::vector<std::vector<A>> tau(T, std::vector<A>(n));
    const std::vector<std::size_t> scopes = o.scope == taskvec::scope::model ? std::vector<std::size_t>{n} : sizes;
    for (std::size_t t = 0; t < T; ++t) {
        for (std::size_t i = 0; i < n; ++i) { tau[t][i] = sum(tasks[t][i], -base[i]); }
        std::size_t begin = 0;
        for (const std::size_t size : scopes) {
            std::vector<A> part(
                tau[t].begin() + static_cast<long>(begin), tau[t].begin() + static_cast<long>(begin + size));
            auto k = static_cast<std::uint64_t>(
                std::floor((o.densities.empty() ? o.density : o.densities[t]) * static_cast<double>(size)));
            if (o.trim == taskvec::trim_rule::reach_next) { k = std::min<std::uint64_t>(size, k + 1); }
            else {
                k = size ? std::max<std::uint64_t>(1, k) : 0;
            }
            const auto kept = top(part, k, o.trim == taskvec::trim_rule::reach_next);
            for (std::size_t i = 0; i < size; ++i) {
                if (!kept[i]) { tau[t][begin + i] = 0; }
            }
            begin += size;
        }
    }
    std::vector<int> elected(n), majority(n);
    for (std::size_t i = 0; i < n; ++i) {
        A s = 0;
        for (std::size_t t = 0; t < T; ++t) { s = sum(s, product(o.weighted_election ? w[t] : A{1}, tau[t][i])); }
        elected[i] = (s > 0) - (s < 0);
    }
    std::size_t begin = 0;
    for (const std::size_t size : scopes) {
        const long total = std::accumulate(
            elected.begin() + static_cast<long>(begin), elected.begin() + static_cast<long>(begin + size), 0L);
        std::fill_n(majority.begin() + static_cast<long>(begin), size, (total > 0) - (total < 0));
        begin += size;
    }
    std::vector<A> merged(n);
    for (std::size_t i = 0; i < n; ++i) {
        int sign = elected[i];
        if (sign == 0) {
            switch (o.zero_sign) {
            case taskvec::zero_sign::majority: sign = majority[i]; break;
            case taskvec::zero_sign::majority_or_negative:
                sign = majority[i] ? majority[i] : o.combine == taskvec::disjoint_merge::max ? 0 : -1;
                break;
            case taskvec::zero_sign::positive: sign = 1; break;
            case taskvec::zero_sign::none: break;
            }
        }
        A total = 0, divisor = 0, largest = 0;
        for (std::size_t t = 0; t < T; ++t) {
            const A value = product(w[t], tau[t][i]);
            const A side = o.agree_when_weighted ? value : tau[t][i];
            if (sign == 0 || side == 0 || (side > 0) != (sign > 0)) { continue; }
            total = sum(total, value);
            divisor = sum(divisor, o.divide_by_count ? A{1} : w[t]);
            if (std::abs(value) > std::abs(largest)) { largest = value; }
        }
        A result = total;
        if (o.combine == taskvec::disjoint_merge::mean) { result = total / (divisor == 0 ? A{1} : divisor); }
        if (o.combine == taskvec::disjoint_merge::max) { result = largest; }
        merged[i] = sum(base[i], product(static_cast<A>(o.lambda), result));
    }
    return merged;
}

} // namespace reference
