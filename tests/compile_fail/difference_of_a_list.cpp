// A list of vectors in place of one.
// SPDX-License-Identifier: Apache-2.0
// error: difference\(\): a list stands where one vector or model is expected
// lines: 30
#include <taskvec/arithmetic/task_vector.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> base(3);
    const std::vector<std::vector<float>> tasks{base};
    [[maybe_unused]] std::vector<float> out(3);
#if defined(TASKVEC_FAULT)
    difference(cpu{}, tasks, base, out);
#else
    difference(cpu{}, tasks[0], base, out);
#endif
}
