// Merges three fine-tuned models that lie in the caller's own memory: TIES over flat buffers.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/taskvec.hpp>

#include <cstdio>
#include <vector>

int main()
{
    const std::vector<float> base{0, 0, 0, 0, 0, 0};
    const std::vector<std::vector<float>> tasks{
        {4, 1, 3, 0, -2, 0}, //
        {2, -1, -5, 0, -2, 0},
        {0, -1, 1, 6, -2, 1},
    };
    std::vector<float> merged(base.size());

    // Keep the largest half of each task vector, elect a sign for each entry, average what agrees with it.
    taskvec::merge(
        taskvec::cpu{.threads = 1}, taskvec::ties_options{.density = 0.5, .lambda = 1.0}, base, tasks, merged);

    for (const float value : merged) { std::printf(" %g", value); }
    std::printf("\n");
}
