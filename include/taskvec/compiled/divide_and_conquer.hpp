// Eigen's divide-and-conquer SVD behind truncated_svd(): the body that takes longest to compile, in a header of its
// own, which a program that links taskvec::compiled never reads.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/linalg/eigen.hpp>

#include <Eigen/SVD>

#include <algorithm>
#include <cstddef>
#include <memory_resource>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// A = u·σ·vᵀ by divide and conquer; false where Eigen gives up. See linalg/truncated_svd.hpp.
template <class T>
TASKVEC_NOINLINE bool divide_and_conquer(
    matrix_view<const T> a, matrix<T>& u, std::vector<double>& sigma, matrix<T>& v, std::pmr::memory_resource* memory)
{
    using dense = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic>;
    const one_thread_inside guard;
    // A row-major matrix is the column-major transposed one: decompose that and exchange the sides.
    const bool turned = a.order() == matrix_order::row_major;
    if (turned) { a = a.transposed(); }
#if EIGEN_VERSION_AT_LEAST(3, 4, 90)
    const Eigen::BDCSVD<dense, Eigen::ComputeThinU | Eigen::ComputeThinV> svd(map_as<Eigen::ColMajor>(a));
#else
    const Eigen::BDCSVD<dense> svd(map_as<Eigen::ColMajor>(a), Eigen::ComputeThinU | Eigen::ComputeThinV);
#endif
    if (svd.info() != eigen_success) { return false; }
    const auto k = static_cast<std::size_t>(svd.singularValues().size());
    u = matrix<T>(turned ? a.cols() : a.rows(), k, matrix_order::column_major, memory);
    v = matrix<T>(turned ? a.rows() : a.cols(), k, matrix_order::column_major, memory);
    const dense& left = turned ? svd.matrixV() : svd.matrixU();
    const dense& right = turned ? svd.matrixU() : svd.matrixV();
    std::copy_n(left.data(), u.size(), u.data());
    std::copy_n(right.data(), v.size(), v.data());
    sigma.resize(k);
    for (std::size_t i = 0; i < k; ++i) {
        sigma[i] = static_cast<double>(svd.singularValues()(static_cast<eigen_index>(i)));
    }
    return left.allFinite() && right.allFinite();
}

} // namespace taskvec::inline TASKVEC_ABI::detail
