// A pointer has no length.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the base is a pointer, which does not say how long it is
// lines: 25
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

using namespace taskvec;

void f(const std::vector<float>& base, const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
    [[maybe_unused]] const task_arithmetic_options options{.lambda = 0.3};
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, base.data(), tasks, out);
#else
    merge(cpu{}, options, host_view<const float>(base.data(), base.size()), tasks, out);
#endif
}
