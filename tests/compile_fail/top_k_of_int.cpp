// Selection compares magnitudes of floating types.
// SPDX-License-Identifier: Apache-2.0
// error: the elements of an argument are of no storage type
// lines: 25
#include <taskvec/select/top_k.hpp>

#include <vector>

using namespace taskvec;

void f(const std::vector<int>& counts, const std::vector<float>& values)
{
#if defined(TASKVEC_FAULT)
    (void)top_k(cpu{}, counts, 3);
#else
    (void)counts;
    (void)top_k(cpu{}, values, 3);
#endif
}
