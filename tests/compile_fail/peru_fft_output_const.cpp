// An output that cannot be written; the options stand in braces.
// SPDX-License-Identifier: Apache-2.0
// error: peru_fft\(\): an output is const
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
    (void)peru_fft(cpu{}, task_arithmetic_options{}, {.density = 0.1}, base, tasks, base);
#else
    (void)peru_fft(cpu{}, task_arithmetic_options{}, {.density = 0.1}, base, tasks, out);
#endif
}
