// An update where the changes of a model are expected: one sentence.
// SPDX-License-Identifier: Apache-2.0
// error: the arguments are not those of fuse\(policy, base, changes, output\)
// lines: 30
#include <taskvec/adapters/fuse.hpp>

void f(const taskvec::const_model_ref& base, const taskvec::lora_update<float>& update, const taskvec::model_ref& out)
{
#if defined(TASKVEC_FAULT)
    taskvec::fuse(taskvec::cpu{}, base, update, out);
#else
    taskvec::adapted_model changes;
    changes.add(base, "weight", update);
    taskvec::fuse(taskvec::cpu{}, base, changes, out);
#endif
}
