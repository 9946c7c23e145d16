// One vector is no list of tasks.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the tasks are one vector, or none: pass a list
// lines: 25
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <array>
#include <vector>

using namespace taskvec;

void f(const std::vector<float>& base, const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
    [[maybe_unused]] const task_arithmetic_options options{.lambda = 0.3};
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, base, tasks[0], out);
#else
    merge(cpu{}, options, base, std::array{as_view(tasks[0])}, out);
#endif
}
