// Seeded adapters for tests, and their dense updates by plain loops.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapter.hpp>

#include "reference/random_matrix.hpp"
#include "reference/svd.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace reference {

template <class T>
taskvec::lora_update<T> normal_update(
    std::size_t out, std::size_t in, std::size_t rank, std::uint64_t seed, double scaling = 1)
{
    return {normal_matrix<T>(out, rank, 2 * seed, taskvec::matrix_order::row_major),
        normal_matrix<T>(rank, in, 2 * seed + 1, taskvec::matrix_order::row_major), scaling};
}

/// scaling·b·a in f64.
template <class T>
plain_matrix dense(const taskvec::lora_update<T>& update)
{
    plain_matrix x = zeros(update.out(), update.in());
    for (std::size_t i = 0; i < update.out(); ++i) {
        for (std::size_t j = 0; j < update.in(); ++j) {
            for (std::size_t k = 0; k < update.rank(); ++k) {
                x[i][j] += static_cast<double>(update.b(i, k)) * static_cast<double>(update.a(k, j));
            }
            x[i][j] *= update.scaling;
        }
    }
    return x;
}

inline void add(plain_matrix& to, const plain_matrix& x, double weight)
{
    for (std::size_t i = 0; i < x.size(); ++i) {
        for (std::size_t j = 0; j < x[i].size(); ++j) { to[i][j] += weight * x[i][j]; }
    }
}

} // namespace reference
