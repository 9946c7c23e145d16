// A policy and nothing else.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): expected \(policy, options, base, tasks, output\)
// lines: 30
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const task_arithmetic_options options{.lambda = 0.3};
    const std::vector<float> base(3);
    const std::vector<std::vector<float>> tasks{base};
    [[maybe_unused]] std::vector<float> out(3);
#if defined(TASKVEC_FAULT)
    merge(cpu{});
#else
    merge(cpu{}, options, base, tasks, out);
#endif
}
