// A selection of no number of entries.
// SPDX-License-Identifier: Apache-2.0
// error: top_k\(\): the arguments are not those of top_k\(policy, x, k\)
// lines: 30
#include <taskvec/select/top_k.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3);
#if defined(TASKVEC_FAULT)
    (void)top_k(cpu{}, x);
#else
    (void)top_k(cpu{}, x, 2);
#endif
}
