// The base of aligned models is an address, since there may be none.
// SPDX-License-Identifier: Apache-2.0
// error: aligned_models: the base is the address of a taskvec::const_model_ref
// lines: 30
#include <taskvec/models/aligned_models.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const const_model_ref base;
    const std::vector<const_model_ref> tasks(1);
#if defined(TASKVEC_FAULT)
    const aligned_models models(base, tasks);
#else
    const aligned_models models(&base, tasks);
#endif
}
