// A slow, obvious SVD: plane rotations on the columns in long double, and plain loops for products and norms.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace reference {

using plain_matrix = std::vector<std::vector<double>>; // [row][column]

inline plain_matrix zeros(std::size_t rows, std::size_t cols)
{
    return plain_matrix(rows, std::vector<double>(cols, 0.0));
}

template <class T>
plain_matrix plain(taskvec::matrix_view<const T> x)
{
    plain_matrix y = zeros(x.rows(), x.cols());
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < x.cols(); ++j) { y[i][j] = static_cast<double>(x(i, j)); }
    }
    return y;
}

/// A·Bᵀ
inline plain_matrix product_abt(const plain_matrix& a, const plain_matrix& b)
{
    plain_matrix c = zeros(a.size(), b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
        for (std::size_t j = 0; j < b.size(); ++j) {
            for (std::size_t k = 0; k < a[i].size(); ++k) { c[i][j] += a[i][k] * b[j][k]; }
        }
    }
    return c;
}

/// u·diag(sigma)·vᵀ
template <class Result>
plain_matrix composed(const Result& s)
{
    plain_matrix c = zeros(s.u.rows(), s.v.rows());
    for (std::size_t i = 0; i < s.u.rows(); ++i) {
        for (std::size_t j = 0; j < s.v.rows(); ++j) {
            for (std::size_t k = 0; k < s.sigma.size(); ++k) {
                c[i][j] += static_cast<double>(s.u(i, k)) * s.sigma[k] * static_cast<double>(s.v(j, k));
            }
        }
    }
    return c;
}

inline double norm(const plain_matrix& x)
{
    long double sum = 0;
    for (const auto& row : x) {
        for (const double entry : row) { sum += static_cast<long double>(entry) * entry; }
    }
    return static_cast<double>(std::sqrt(sum));
}

inline double distance(const plain_matrix& x, const plain_matrix& y)
{
    plain_matrix d = x;
    for (std::size_t i = 0; i < x.size(); ++i) {
        for (std::size_t j = 0; j < x[i].size(); ++j) { d[i][j] -= y[i][j]; }
    }
    return norm(d);
}

/// max |XᵀX − I|
template <class T>
double departure_from_orthonormal(taskvec::matrix_view<const T> x)
{
    double worst = 0;
    for (std::size_t a = 0; a < x.cols(); ++a) {
        for (std::size_t b = 0; b < x.cols(); ++b) {
            double sum = a == b ? -1 : 0;
            for (std::size_t i = 0; i < x.rows(); ++i) {
                sum += static_cast<double>(x(i, a)) * static_cast<double>(x(i, b));
            }
            worst = std::max(worst, std::abs(sum));
        }
    }
    return worst;
}

/// All min(m, n) singular triples, σ descending; u and v by columns.
struct triples {
    std::vector<double> sigma;
    std::vector<std::vector<double>> u{}, v{};
};

/// Plane rotations on the columns until no two are oblique, in long double. Vectors only for nonzero σ, and only when
/// wanted.
inline triples decomposed(const plain_matrix& a, bool vectors = true)
{
    const std::size_t m = a.size(), n = m ? a[0].size() : 0;
    const bool turned = n > m;
    const std::size_t rows = turned ? n : m, cols = turned ? m : n;
    std::vector<std::vector<long double>> column(cols, std::vector<long double>(rows));
    for (std::size_t i = 0; i < m; ++i) {
        for (std::size_t j = 0; j < n; ++j) { (turned ? column[i][j] : column[j][i]) = a[i][j]; }
    }
    std::vector<std::vector<long double>> turns(
        vectors ? cols : 0, std::vector<long double>(cols)); // what the columns are made of
    for (std::size_t j = 0; j < turns.size(); ++j) { turns[j][j] = 1; }
    const auto dot = [&](std::size_t p, std::size_t q) {
        long double sum = 0;
        for (std::size_t i = 0; i < rows; ++i) { sum += column[p][i] * column[q][i]; }
        return sum;
    };
    for (int sweep = 0; sweep < 60; ++sweep) {
        bool turnedAny = false;
        for (std::size_t p = 0; p < cols; ++p) {
            for (std::size_t q = p + 1; q < cols; ++q) {
                const long double x = dot(p, p), y = dot(q, q), z = dot(p, q);
                if (std::abs(z) <= 1e-18L * std::sqrt(x * y) || z == 0) { continue; }
                turnedAny = true;
                const long double angle = 0.5L * std::atan2(2 * z, x - y), c = std::cos(angle), s = std::sin(angle);
                const auto rotate = [&](std::vector<long double>& left, std::vector<long double>& right) {
                    for (std::size_t i = 0; i < left.size(); ++i) {
                        const long double u = left[i], v = right[i];
                        left[i] = c * u + s * v;
                        right[i] = -s * u + c * v;
                    }
                };
                rotate(column[p], column[q]);
                if (vectors) { rotate(turns[p], turns[q]); }
            }
        }
        if (!turnedAny) { break; }
    }
    std::vector<std::pair<long double, std::size_t>> order;
    for (std::size_t j = 0; j < cols; ++j) { order.emplace_back(std::sqrt(dot(j, j)), j); }
    std::sort(order.rbegin(), order.rend());
    triples result;
    for (const auto& [sigma, j] : order) {
        result.sigma.push_back(static_cast<double>(sigma));
        if (!vectors || sigma == 0) { continue; }
        std::vector<double> long_side, short_side(turns[j].begin(), turns[j].end());
        for (const long double x : column[j]) { long_side.push_back(static_cast<double>(x / sigma)); }
        result.u.push_back(turned ? short_side : long_side);
        result.v.push_back(turned ? long_side : short_side);
    }
    return result;
}

/// All min(m, n) singular values, descending.
inline std::vector<double> singular_values(const plain_matrix& a)
{
    return decomposed(a, false).sigma;
}

/// The sine of the largest angle between the space of the first q of `exact` and the first q columns of x: how long
/// what x has outside that space is at most, by its Frobenius norm.
template <class T>
double sine_between(const std::vector<std::vector<double>>& exact, taskvec::matrix_view<const T> x, std::size_t q)
{
    long double sum = 0;
    for (std::size_t k = 0; k < q; ++k) {
        std::vector<double> rest(x.rows());
        for (std::size_t i = 0; i < x.rows(); ++i) { rest[i] = static_cast<double>(x(i, k)); }
        for (int twice = 0; twice < 2; ++twice) {
            for (std::size_t j = 0; j < q; ++j) {
                double along = 0;
                for (std::size_t i = 0; i < x.rows(); ++i) { along += exact[j][i] * rest[i]; }
                for (std::size_t i = 0; i < x.rows(); ++i) { rest[i] -= along * exact[j][i]; }
            }
        }
        for (const double entry : rest) { sum += static_cast<long double>(entry) * entry; }
    }
    return static_cast<double>(std::sqrt(sum));
}

} // namespace reference
