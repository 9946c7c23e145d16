// A task vector is applied to some extent.
// SPDX-License-Identifier: Apache-2.0
// error: apply\(\): the arguments are not those of apply\(policy, base, vector, lambda, output\)
// lines: 30
#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/select/sparse.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3), y(3);
    std::vector<float> out(3);
#if defined(TASKVEC_FAULT)
    apply(cpu{}, x, y, out);
#else
    apply(cpu{}, x, y, 0.3, out);
#endif
}
