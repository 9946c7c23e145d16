// A decomposition on the gpu without the header that brings its linear algebra: one sentence says which to include.
// SPDX-License-Identifier: Apache-2.0
// error: factored_svd\(\) on taskvec::gpu: include <taskvec/device/linalg.hpp>
#include <taskvec/linalg/factored_svd.hpp>

void f(taskvec::device_matrix_view<const float> a)
{
#if defined(TASKVEC_FAULT)
    (void)taskvec::factored_svd<float>(taskvec::gpu{}, a, a, {.rank = 3});
#else
    (void)a;
#endif
}
