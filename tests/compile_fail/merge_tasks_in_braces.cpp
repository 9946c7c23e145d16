// Vectors in braces would be copied; views are not.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): tasks in braces would be copied, or are of no one type: pass views
// lines: 25
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

using namespace taskvec;

void f(const std::vector<float>& base, const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
    [[maybe_unused]] const task_arithmetic_options options{.lambda = 0.3};
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, base, {tasks[0], tasks[1]}, out);
#else
    merge(cpu{}, options, base, {as_view(tasks[0]), as_view(tasks[1])}, out);
    merge(cpu{}, average_options{}, {as_view(tasks[0]), as_view(tasks[1])}, out, {.statistics = true});
#endif
}
