// Seeded matrices for tests: dense, with a chosen spectrum, of any storage type and order.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/core/random.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace reference {

/// Standard normal entries.
template <class T>
taskvec::matrix<T> normal_matrix(std::size_t rows, std::size_t cols, std::uint64_t seed,
    taskvec::matrix_order order = taskvec::matrix_order::column_major, double scale = 1)
{
    const taskvec::random_stream stream(seed, 0, "normal_matrix");
    taskvec::matrix<T> x(rows, cols, order);
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < cols; ++j) {
            const double value = scale * stream.normal(i * cols + j);
            if constexpr (taskvec::arithmetic_element<T>) { x(i, j) = static_cast<T>(value); }
            else {
                x(i, j) = taskvec::narrow<T>(static_cast<float>(value));
            }
        }
    }
    return x;
}

/// rows×k with orthonormal columns: normal columns through Gram and Schmidt, twice.
inline taskvec::matrix<double> orthonormal_matrix(std::size_t rows, std::size_t k, std::uint64_t seed)
{
    auto x = normal_matrix<double>(rows, k, seed);
    for (std::size_t j = 0; j < k; ++j) {
        for (int twice = 0; twice < 2; ++twice) {
            for (std::size_t p = 0; p < j; ++p) {
                double dot = 0;
                for (std::size_t i = 0; i < rows; ++i) { dot += x(i, p) * x(i, j); }
                for (std::size_t i = 0; i < rows; ++i) { x(i, j) -= dot * x(i, p); }
            }
        }
        double sum = 0;
        for (std::size_t i = 0; i < rows; ++i) { sum += x(i, j) * x(i, j); }
        for (std::size_t i = 0; i < rows; ++i) { x(i, j) /= std::sqrt(sum); }
    }
    return x;
}

/// A rows×cols matrix with these singular values (at most min(rows, cols) of them).
template <class T>
taskvec::matrix<T> matrix_with_spectrum(std::size_t rows, std::size_t cols, const std::vector<double>& sigma,
    std::uint64_t seed, taskvec::matrix_order order = taskvec::matrix_order::row_major)
{
    const auto u = orthonormal_matrix(rows, sigma.size(), seed), v = orthonormal_matrix(cols, sigma.size(), seed + 1);
    taskvec::matrix<T> x(rows, cols, order);
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < cols; ++j) {
            double sum = 0;
            for (std::size_t k = 0; k < sigma.size(); ++k) { sum += u(i, k) * sigma[k] * v(j, k); }
            if constexpr (taskvec::arithmetic_element<T>) { x(i, j) = static_cast<T>(sum); }
            else {
                x(i, j) = taskvec::narrow<T>(static_cast<float>(sum));
            }
        }
    }
    return x;
}

} // namespace reference
