// Products of the small matrices that adapters keep as factors: Kronecker's and its kin, and those with a Tucker core.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>

#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// n×n: ones on the diagonal.
template <class T>
[[nodiscard]] matrix<T> identity_matrix(std::size_t n)
{
    matrix<T> x(n, n, matrix_order::row_major);
    for (std::size_t i = 0; i < n; ++i) { x(i, i) = 1; }
    return x;
}

/// x·y, each sum in the order of its terms.
template <class T>
[[nodiscard]] matrix<T> matrix_product(const matrix<T>& x, const matrix<T>& y)
{
    matrix<T> z(x.rows(), y.cols(), matrix_order::row_major);
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < y.cols(); ++j) {
            T sum = 0;
            for (std::size_t k = 0; k < x.cols(); ++k) { sum += x(i, k) * y(k, j); }
            z(i, j) = sum;
        }
    }
    return z;
}

/// The Kronecker product.
template <class T>
[[nodiscard]] matrix<T> kronecker(const matrix<T>& x, const matrix<T>& y)
{
    matrix<T> z(x.rows() * y.rows(), x.cols() * y.cols(), matrix_order::row_major);
    for (std::size_t i = 0; i < z.rows(); ++i) {
        for (std::size_t j = 0; j < z.cols(); ++j) {
            z(i, j) = x(i / y.rows(), j / y.cols()) * y(i % y.rows(), j % y.cols());
        }
    }
    return z;
}

/// The face-splitting product: each row is the Kronecker product of the two rows. (x1·y1)∘(x2·y2) is the face-splitting
/// product of x1 and x2 times the Khatri-Rao product of y1 and y2.
template <class T>
[[nodiscard]] matrix<T> face_splitting(const matrix<T>& x, const matrix<T>& y)
{
    matrix<T> z(x.rows(), x.cols() * y.cols(), matrix_order::row_major);
    for (std::size_t i = 0; i < z.rows(); ++i) {
        for (std::size_t j = 0; j < z.cols(); ++j) { z(i, j) = x(i, j / y.cols()) * y(i, j % y.cols()); }
    }
    return z;
}
/// The Khatri-Rao product: each column is the Kronecker product of the two columns.
template <class T>
[[nodiscard]] matrix<T> khatri_rao(const matrix<T>& x, const matrix<T>& y)
{
    matrix<T> z(x.rows() * y.rows(), x.cols(), matrix_order::row_major);
    for (std::size_t i = 0; i < z.rows(); ++i) {
        for (std::size_t j = 0; j < z.cols(); ++j) { z(i, j) = x(i / y.rows(), j) * y(i % y.rows(), j); }
    }
    return z;
}

/// A Tucker core p×q×kernel… times a factor q×n at its second side: p rows of n·kernel entries, the kernel running
/// fastest.
template <class T>
[[nodiscard]] matrix<T> along_core(const matrix<T>& core, const matrix<T>& right)
{
    const std::size_t inner = right.rows(), cells = core.cols() / inner;
    matrix<T> joined(core.rows(), right.cols() * cells, matrix_order::row_major);
    for (std::size_t p = 0; p < core.rows(); ++p) {
        for (std::size_t i = 0; i < right.cols(); ++i) {
            for (std::size_t cell = 0; cell < cells; ++cell) {
                T sum = 0;
                for (std::size_t q = 0; q < inner; ++q) { sum += core(p, q * cells + cell) * right(q, i); }
                joined(p, i * cells + cell) = sum;
            }
        }
    }
    return joined;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
