// Passes refer to the policy and to the models.
// SPDX-License-Identifier: Apache-2.0
// error: deleted
#include <taskvec/methods/passes.hpp>

std::size_t f(const taskvec::aligned_models& models)
{
#if defined(TASKVEC_FAULT)
    const taskvec::cpu_passes passes(taskvec::cpu{}, models);
#else
    const taskvec::cpu policy;
    const taskvec::cpu_passes passes(policy, models);
#endif
    return passes.tasks();
}
