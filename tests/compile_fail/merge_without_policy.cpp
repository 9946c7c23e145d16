// A merge that is not told where to run.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the policy is missing before the options
// lines: 25
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

using namespace taskvec;

void f(const std::vector<float>& base, const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
    [[maybe_unused]] const task_arithmetic_options options{.lambda = 0.3};
#if defined(TASKVEC_FAULT)
    merge(options, base, tasks, out);
#else
    merge(cpu{}, options, base, tasks, out);
#endif
}
