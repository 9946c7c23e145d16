// One vector in place of a list.
// SPDX-License-Identifier: Apache-2.0
// error: combine\(\): one vector or model stands where a list of them is expected
// lines: 30
#include <taskvec/arithmetic/task_vector.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> base(3);
    const std::vector<std::vector<float>> tasks{base};
    [[maybe_unused]] std::vector<float> out(3);
    const std::vector<double> weights{0.5};
#if defined(TASKVEC_FAULT)
    combine(cpu{}, base, weights, out);
#else
    combine(cpu{}, tasks, weights, out);
#endif
}
