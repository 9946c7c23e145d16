// Entries are added to weights in place.
// SPDX-License-Identifier: Apache-2.0
// error: apply\(\): an output is const
// lines: 30
#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/select/sparse.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3), y(3);
    std::vector<float> out(3);
    const sparse_vector<float> delta;
#if defined(TASKVEC_FAULT)
    (void)apply(cpu{}, delta, x);
#else
    (void)apply(cpu{}, delta, out);
#endif
}
