// Linear systems and least squares the slow way: Gaussian elimination with pivoting, and Gram–Schmidt done twice.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace reference {

using rows = std::vector<std::vector<double>>; // a matrix, row by row

/// X with A·X = B.
inline rows solve(rows a, rows b)
{
    const std::size_t n = a.size();
    for (std::size_t k = 0; k < n; ++k) {
        std::size_t pivot = k;
        for (std::size_t i = k; i < n; ++i) { pivot = std::abs(a[i][k]) > std::abs(a[pivot][k]) ? i : pivot; }
        std::swap(a[k], a[pivot]);
        std::swap(b[k], b[pivot]);
        for (std::size_t i = 0; i < n; ++i) {
            if (i == k) { continue; }
            const double factor = a[i][k] / a[k][k];
            for (std::size_t j = k; j < n; ++j) { a[i][j] -= factor * a[k][j]; }
            for (std::size_t j = 0; j < b[i].size(); ++j) { b[i][j] -= factor * b[k][j]; }
        }
    }
    for (std::size_t i = 0; i < n; ++i) {
        for (double& value : b[i]) { value /= a[i][i]; }
    }
    return b;
}

/// The W that minimises ‖X·W − Y‖, by the QR of X: it never squares the condition number.
inline rows least_squares(rows x, rows y)
{
    const std::size_t m = x.size(), n = x[0].size(), p = y[0].size();
    rows r(n, std::vector<double>(n)), w(n, std::vector<double>(p));
    for (std::size_t k = 0; k < n; ++k) {
        for (int twice = 0; twice < 2; ++twice) {
            for (std::size_t j = 0; j < k; ++j) {
                double along = 0;
                for (std::size_t i = 0; i < m; ++i) { along += x[i][j] * x[i][k]; }
                for (std::size_t i = 0; i < m; ++i) { x[i][k] -= along * x[i][j]; }
                r[j][k] += along;
            }
        }
        double square = 0;
        for (std::size_t i = 0; i < m; ++i) { square += x[i][k] * x[i][k]; }
        r[k][k] = std::sqrt(square);
        for (std::size_t i = 0; i < m; ++i) { x[i][k] /= r[k][k]; }
    }
    for (std::size_t c = 0; c < p; ++c) {
        for (std::size_t k = n; k-- > 0;) {
            double value = 0;
            for (std::size_t i = 0; i < m; ++i) { value += x[i][k] * y[i][c]; }
            for (std::size_t j = k + 1; j < n; ++j) { value -= r[k][j] * w[j][c]; }
            w[k][c] = value / r[k][k];
        }
    }
    return w;
}

} // namespace reference
