// Braces of views of two types.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the tasks in braces are of no one type
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
    [[maybe_unused]] const std::vector<bf16> other(3);
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, base, {as_view(base), as_view(other)}, out);
#else
    merge(cpu{}, options, base, {as_view(base), as_view(tasks[0])}, out);
#endif
}
