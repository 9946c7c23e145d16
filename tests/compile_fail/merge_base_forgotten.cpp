// Task arithmetic without its base.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): this method needs the base of its tasks
// lines: 25
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

using namespace taskvec;

void f([[maybe_unused]] const std::vector<float>& base, [[maybe_unused]] const std::vector<std::vector<float>>& tasks,
    [[maybe_unused]] std::vector<float>& out)
{
    [[maybe_unused]] const task_arithmetic_options options{.lambda = 0.3};
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, tasks, out);
#else
    merge(cpu{}, average_options{}, tasks, out);
#endif
}
