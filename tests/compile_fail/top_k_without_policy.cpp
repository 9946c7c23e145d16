// A selection without a policy.
// SPDX-License-Identifier: Apache-2.0
// error: top_k\(\): the first argument is no policy: pass taskvec::cpu
// lines: 30
#include <taskvec/select/top_k.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3);
#if defined(TASKVEC_FAULT)
    (void)top_k(x, 2);
#else
    (void)top_k(cpu{}, x, 2);
#endif
}
