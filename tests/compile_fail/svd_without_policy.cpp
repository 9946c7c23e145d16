// A decomposition without a policy, its choice in braces: one sentence.
// SPDX-License-Identifier: Apache-2.0
// error: the policy is missing before the matrix: truncated_svd\(policy, matrix
// lines: 30
#include <taskvec/linalg/truncated_svd.hpp>

auto f(const taskvec::matrix<float>& weight)
{
#if defined(TASKVEC_FAULT)
    return taskvec::truncated_svd(weight.view(), {.rank = 1}).u.rows();
#else
    return taskvec::truncated_svd(taskvec::cpu{}, weight.view(), {.rank = 1}).u.rows();
#endif
}
