// A base of a type that is not stored.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the elements of the base are of no storage type: expected double, float
// lines: 25
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

using namespace taskvec;

void f(const std::vector<float>& base, const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
    [[maybe_unused]] const task_arithmetic_options options{.lambda = 0.3};
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, std::vector<int>(3), tasks, out);
#else
    merge(cpu{}, options, base, tasks, out);
#endif
}
