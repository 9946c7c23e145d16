// An output that may not be written.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the output is const
// lines: 25
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <utility>
#include <vector>

using namespace taskvec;

void f(const std::vector<float>& base, const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
    [[maybe_unused]] const task_arithmetic_options options{.lambda = 0.3};
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, base, tasks, std::as_const(out));
#else
    merge(cpu{}, options, base, tasks, out);
#endif
}
