// RegMean as elementwise functors: Gram matrices checked and added up, weights in f64.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/elements.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::elementwise {

TASKVEC_KERNELS_BEGIN

/// sum[k] += weight·x, where x is element runs.at(k) of an operand whose element 0 has a place; NaN and infinity are
/// noted.
struct add_weighted {
    aligned_tensor::operand from;
    strided_runs runs;
    std::uint64_t place;
    double weight;
    double* sum_;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t i = runs.at(k);
            sum_[k] = sum(sum_[k], product(weight, load<double>(from, i, place + i, flag)));
        }
    }
};

/// out[k] = x − mean[k], where x is element runs.at(k) of an operand.
struct deviate {
    aligned_tensor::operand from;
    strided_runs runs;
    const double* mean;
    double* out;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            out[k] = difference(load<double>(from, runs.at(k)), mean[k]);
        }
    }
};

/// out[k] = entry k of an n×n Gram matrix, those off the diagonal times alpha.
struct shrunk_gram {
    aligned_tensor::operand from;
    std::uint64_t n;
    double alpha;
    double* out;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const double value = load<double>(from, k);
            out[k] = k / n == k % n ? value : product(alpha, value);
        }
    }
};

/// diagonal[i] of an n×n matrix of doubles or of a Gram matrix.
struct read_diagonal {
    aligned_tensor::operand from;
    std::uint64_t n;
    double* diagonal;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t i = at.first; i < at.last; i += at.step) { diagonal[i] = load<double>(from, i * n + i); }
    }
};

/// The lower triangle of an n×n column-major system += weight·G̃, where G̃ has the mean of both halves of a Gram matrix,
/// off the diagonal times alpha. *wrong is lowered to i·n + j where the entries (i, j) and (j, i) differ, or exceed
/// what the diagonal allows, by more than tolerated.
struct add_gram {
    aligned_tensor::operand from;
    std::uint64_t n;
    const double* diagonal;
    double tolerance, weight, alpha;
    double* system;
    counter* wrong;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t i = k / n, j = k % n;
            if (j > i) { continue; }
            const double lower = load<double>(from, k), upper = load<double>(from, j * n + i);
            const double bound = product(std::sqrt(diagonal[i]), std::sqrt(diagonal[j]));
            if (!(std::abs(lower - upper) <= product(tolerance, bound))
                || !(std::abs(lower) <= product(1 + 10 * tolerance, bound))) {
                atomic_min(wrong, k);
            }
            const double value = product(0.5, sum(lower, upper));
            double& entry = system[j * n + i];
            entry = sum(entry, product(weight, i == j ? value : product(alpha, value)));
        }
    }
};

/// matrix[i·n + i] += amount
struct lift_diagonal {
    double* matrix;
    std::uint64_t n;
    double amount;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            matrix[i * n + i] = sum(matrix[i * n + i], amount);
        }
    }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI::elementwise
