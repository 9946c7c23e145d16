// A randomized decomposition that is not told its rank: one sentence.
// SPDX-License-Identifier: Apache-2.0
// error: the arguments are not those of randomized_svd\(policy, matrix, {.rank = 16}\)
// lines: 30
#include <taskvec/linalg/randomized_svd.hpp>

std::size_t f(const taskvec::matrix<float>& weight)
{
#if defined(TASKVEC_FAULT)
    return taskvec::randomized_svd(taskvec::cpu{}, weight).u.rows();
#else
    return taskvec::randomized_svd(taskvec::cpu{}, weight, {.rank = 1}).u.rows();
#endif
}
