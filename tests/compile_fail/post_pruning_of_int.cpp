// Integers are no weights; the options stand in braces.
// SPDX-License-Identifier: Apache-2.0
// error: post_pruning\(\): the elements of an argument are of no storage type
// lines: 30
#include <taskvec/reuse/post_pruning.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3);
    [[maybe_unused]] const std::vector<int> y(3);
#if defined(TASKVEC_FAULT)
    (void)post_pruning(cpu{}, {.density = 0.1}, x, y);
#else
    (void)post_pruning(cpu{}, {.density = 0.1}, x, x);
#endif
}
