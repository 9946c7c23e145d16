// A merge without a policy.
// SPDX-License-Identifier: Apache-2.0
// error: peru_fft\(\): the first argument is no policy: pass taskvec::cpu
// lines: 30
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/reuse/peru_fft.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> base(3);
    const std::vector<std::vector<float>> tasks{base};
    [[maybe_unused]] std::vector<float> out(3);
#if defined(TASKVEC_FAULT)
    (void)peru_fft(task_arithmetic_options{}, post_pruning_options{}, base, tasks, out);
#else
    (void)peru_fft(cpu{}, task_arithmetic_options{}, post_pruning_options{}, base, tasks, out);
#endif
}
