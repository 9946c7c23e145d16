// A product without a policy.
// SPDX-License-Identifier: Apache-2.0
// error: dot\(\): the first argument is no policy: pass taskvec::cpu
// lines: 30
#include <taskvec/arithmetic/task_vector.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3), y(3);
#if defined(TASKVEC_FAULT)
    return static_cast<int>(dot(x, y));
#else
    return static_cast<int>(dot(cpu{}, x, y));
#endif
}
