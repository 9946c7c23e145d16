// A number of threads is no policy.
// SPDX-License-Identifier: Apache-2.0
// error: difference\(\): the first argument is no policy: pass taskvec::cpu
// lines: 30
#include <taskvec/arithmetic/task_vector.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3), y(3);
    std::vector<float> out(3);
#if defined(TASKVEC_FAULT)
    difference(4, x, y, out);
#else
    difference(cpu{.threads = 4}, x, y, out);
#endif
}
