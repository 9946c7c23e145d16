// Options come after the policy.
// SPDX-License-Identifier: Apache-2.0
// error: post_pruning\(\): the arguments are in another order
// lines: 30
#include <taskvec/reuse/post_pruning.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3), y(3);
#if defined(TASKVEC_FAULT)
    (void)post_pruning(cpu{}, x, y, post_pruning_options{});
#else
    (void)post_pruning(cpu{}, post_pruning_options{}, x, y);
#endif
}
