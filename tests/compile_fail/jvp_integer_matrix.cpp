// Derivatives are taken of real numbers: an integer matrix is no operand.
// SPDX-License-Identifier: Apache-2.0
// error: (constraints not satisfied|no matching function)
#include <taskvec/jvp/elementwise.hpp>

using namespace taskvec;

row_matrix<double> f(const Eigen::MatrixXi& counts)
{
#if defined(TASKVEC_FAULT)
    return relu(counts);
#else
    return relu(counts.cast<double>());
#endif
}
