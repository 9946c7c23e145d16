// A merge into a temporary vector would be lost.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the output is a temporary, and the result would be lost with it
// lines: 25
#include <taskvec/methods/average.hpp>

#include <vector>

void f(const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
#if defined(TASKVEC_FAULT)
    taskvec::merge(taskvec::cpu{}, taskvec::average_options{}, tasks, std::vector<float>(3));
#else
    taskvec::merge(taskvec::cpu{}, taskvec::average_options{}, tasks, out);
    taskvec::merge(taskvec::cpu{}, taskvec::average_options{}, tasks, taskvec::as_view(out));
#endif
}
