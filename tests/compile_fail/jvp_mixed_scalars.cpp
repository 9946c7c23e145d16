// The operands of an operation have one scalar: f32 weights do not meet f64 inputs without a cast, in values or in
// tangents.
// SPDX-License-Identifier: Apache-2.0
// error: (constraints not satisfied|no matching function)
#include <taskvec/jvp/linear.hpp>

using namespace taskvec;

primal_tangent<double> f(const primal_tangent<double>& x, const row_matrix<float>& w)
{
#if defined(TASKVEC_FAULT)
    return linear(x, w);
#else
    return linear(x, w.cast<double>());
#endif
}
