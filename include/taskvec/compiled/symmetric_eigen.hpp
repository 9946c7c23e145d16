// Eigen's symmetric eigenvalue solver behind leading_svd(), in a header of its own, which a program that links
// taskvec::compiled never reads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/linalg/eigen.hpp>

#include <Eigen/Eigenvalues>

#include <cstddef>
#include <memory_resource>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// The `count` largest eigenvalues of a symmetric matrix, descending, and their vectors; see linalg/leading_svd.hpp.
template <int>
TASKVEC_NOINLINE bool leading_eigenvectors(matrix_view<const double> g, std::size_t count, std::vector<double>& values,
    matrix<double>& vectors, std::pmr::memory_resource* memory)
{
    const one_thread_inside guard;
    const Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd> solver(map_as<Eigen::ColMajor>(g));
    if (solver.info() != eigen_success) { return false; }
    const std::size_t k = g.rows();
    values.resize(count);
    vectors = matrix<double>(k, count, matrix_order::column_major, memory);
    for (std::size_t j = 0; j < count; ++j) {
        const auto from = static_cast<eigen_index>(k - 1 - j); // Eigen's ascend
        values[j] = solver.eigenvalues()(from);
        for (std::size_t i = 0; i < k; ++i) {
            vectors(i, j) = solver.eigenvectors()(static_cast<eigen_index>(i), from);
        }
    }
    return solver.eigenvectors().allFinite();
}

} // namespace taskvec::inline TASKVEC_ABI::detail
