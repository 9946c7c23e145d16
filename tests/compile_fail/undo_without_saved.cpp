// What undo() puts back are the words that apply() saved.
// SPDX-License-Identifier: Apache-2.0
// error: undo\(\): the arguments are not those of undo\(policy, delta, saved, live\)
// lines: 30
#include <taskvec/select/sparse.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const std::vector<float> x(3), y(3);
    std::vector<float> out(3);
    const sparse_vector<float> delta;
#if defined(TASKVEC_FAULT)
    undo(cpu{}, delta, out);
#else
    undo(cpu{}, delta, x, out);
#endif
}
