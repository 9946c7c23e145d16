// The tensors of a checkpoint are views into it: a temporary one is gone before they are read.
// SPDX-License-Identifier: Apache-2.0
// error: name the owner first: its views would dangle
#include <taskvec/formats/checkpoint.hpp>

taskvec::const_model_ref f()
{
#if defined(TASKVEC_FAULT)
    return taskvec::open_model("base").model();
#else
    static const auto base = taskvec::open_model("base");
    return base.model();
#endif
}
