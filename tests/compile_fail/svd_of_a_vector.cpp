// A flat vector has no rows and columns: a decomposition says what to pass.
// SPDX-License-Identifier: Apache-2.0
// error: an argument is no matrix: pass taskvec::matrix_view<const float>
// lines: 12
#include <taskvec/linalg/randomized_svd.hpp>

#include <vector>

void f(const std::vector<float>& weight)
{
#if defined(TASKVEC_FAULT)
    (void)taskvec::randomized_svd(taskvec::cpu{}, weight, {.rank = 2});
#else
    const taskvec::matrix_view<const float> matrix(
        weight.data(), 4, weight.size() / 4, taskvec::matrix_order::row_major);
    (void)taskvec::randomized_svd(taskvec::cpu{}, matrix, {.rank = 2});
#endif
}
