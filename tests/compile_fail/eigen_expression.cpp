// An Eigen expression is computed where it is read: it has no view and is no tensor or matrix, which a sentence says.
// SPDX-License-Identifier: Apache-2.0
// error: an Eigen expression has no elements in memory: evaluate it first
#include <taskvec/interop/eigen.hpp>

float f(const Eigen::VectorXf& a, const Eigen::VectorXf& b)
{
#if defined(TASKVEC_FAULT)
    const auto sum = a + b;
    (void)taskvec::as_tensor(sum);
    (void)taskvec::as_matrix(sum);
    taskvec::as_view(sum);
    return 0;
#else
    const Eigen::VectorXf sum = a + b;
    return taskvec::as_view(sum)[0] + taskvec::as_matrix(sum)(0, 0)
        + static_cast<float>(taskvec::as_tensor(sum).shape[0]);
#endif
}
