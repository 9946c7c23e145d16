// Factors of two storage types: one sentence; an owner of its elements is a factor as a view is.
// SPDX-License-Identifier: Apache-2.0
// error: the factors of a product are of one storage type
// lines: 12
#include <taskvec/linalg/factored_svd.hpp>

void f(const taskvec::matrix<float>& left, const taskvec::matrix<float>& right, const taskvec::matrix<double>& wide)
{
#if defined(TASKVEC_FAULT)
    (void)taskvec::factored_svd(taskvec::cpu{}, left, wide, {.rank = 2});
#else
    (void)wide;
    (void)taskvec::factored_svd(taskvec::cpu{}, left, right, {.rank = 2});
#endif
}
