// Uses taskvec's core as one header, with nothing but a compiler; as it is, the source for a compiler on a web page.
//   g++ -std=c++20 -O2 -I single_include packaging/consumers/single_header/main.cpp -pthread
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/taskvec-core.hpp>

#include <cstdio>
#include <vector>

int main()
{
    // A base model of six weights, and what fine-tuning on three tasks made of it.
    const std::vector<float> base{0, 0, 0, 0, 0, 0};
    const std::vector<std::vector<float>> tasks{
        {4, 1, 3, 0, -2, 0}, //
        {2, -1, -5, 0, -2, 0},
        {0, -1, 1, 6, -2, 1},
    };
    std::vector<float> merged(base.size());

    // TIES: keep the largest half of each task vector, elect a sign for each entry, average what agrees with it.
    taskvec::merge(taskvec::cpu{.threads = 1}, taskvec::ties_options{.density = 0.5}, base, tasks, merged);

    for (const float value : merged) { std::printf(" %g", value); }
    std::printf("\n");
    return merged == std::vector<float>{3, -1, -5, 6, -2, 0} ? 0 : 1;
}
