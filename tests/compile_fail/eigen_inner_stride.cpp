// An Eigen map that is known to leave elements out is refused with a sentence.
// SPDX-License-Identifier: Apache-2.0
// error: this Eigen object leaves elements out
#include <taskvec/interop/eigen.hpp>

#if defined(TASKVEC_FAULT)
using vector = Eigen::Map<Eigen::VectorXf, 0, Eigen::InnerStride<2>>;
#else
using vector = Eigen::Map<Eigen::VectorXf, 0, Eigen::InnerStride<1>>;
#endif

taskvec::host_view<float> f(vector& weight)
{
    return taskvec::as_view(weight);
}
