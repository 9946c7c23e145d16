// A column-major Eigen matrix is no row-major tensor: its view is refused with a sentence.
// SPDX-License-Identifier: Apache-2.0
// error: a column-major Eigen matrix holds the transposed tensor
#include <taskvec/interop/eigen.hpp>

#if defined(TASKVEC_FAULT)
using matrix = Eigen::MatrixXf;
#else
using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
#endif

taskvec::host_view<float> f(matrix& weight)
{
    return taskvec::as_view(weight);
}
