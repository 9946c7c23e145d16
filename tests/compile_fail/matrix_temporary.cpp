// A view of a temporary matrix would dangle.
// SPDX-License-Identifier: Apache-2.0
// error: name the owner first: its views would dangle
#include <taskvec/core/matrix.hpp>

double f()
{
#if defined(TASKVEC_FAULT)
    const auto view = taskvec::matrix<double>(2, 2).view();
#else
    const taskvec::matrix<double> owner(2, 2);
    const auto view = owner.view();
#endif
    return view(0, 0);
}
