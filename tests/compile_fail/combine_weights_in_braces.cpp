// Weights in braces have no type.
// SPDX-License-Identifier: Apache-2.0
// error: combine\(\): the weights stand in braces
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
    combine(cpu{}, tasks, {0.5, 0.25}, out);
#else
    combine(cpu{}, tasks, std::vector{0.5}, out);
#endif
}
