// Words saved into a temporary cannot be put back.
// SPDX-License-Identifier: Apache-2.0
// error: the saved words would be gone before undo
#include <taskvec/select/sparse.hpp>

#include <vector>

void f(const taskvec::sparse_vector<float>& delta, std::vector<float>& live, std::vector<float>& saved)
{
#if defined(TASKVEC_FAULT)
    taskvec::apply(taskvec::cpu{}, delta, live, std::vector<float>(delta.kept()));
#else
    taskvec::apply(taskvec::cpu{}, delta, live, saved);
#endif
}
