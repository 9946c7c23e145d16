// An output that cannot be written.
// SPDX-License-Identifier: Apache-2.0
// error: difference\(\): an output is const, or a temporary
// lines: 30
#include <taskvec/arithmetic/task_vector.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3), y(3);
    std::vector<float> out(3);
#if defined(TASKVEC_FAULT)
    difference(cpu{}, x, y, x);
#else
    difference(cpu{}, x, y, out);
#endif
}
