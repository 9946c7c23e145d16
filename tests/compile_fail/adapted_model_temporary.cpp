// An adapted model refers to its updates: a temporary one is gone before it is read.
// SPDX-License-Identifier: Apache-2.0
// error: (deleted|name the update first)
#include <taskvec/adapters/adapted_model.hpp>

taskvec::lora_update<float> made();

void f(taskvec::adapted_model& model, const taskvec::const_model_ref& base)
{
#if defined(TASKVEC_FAULT)
    model.add(base, "weight", made());
#else
    static const auto update = made();
    model.add(base, "weight", update);
#endif
}
