// The model of quantised layers refers to them: those of a temporary are gone before they are read.
// SPDX-License-Identifier: Apache-2.0
// error: name the owner first: its views would dangle
#include <taskvec/formats/quantised.hpp>

taskvec::const_model_ref f(const taskvec::const_model_ref& stored)
{
#if defined(TASKVEC_FAULT)
    return taskvec::quantised_layers(stored).model();
#else
    static const taskvec::quantised_layers layers(stored);
    return layers.model();
#endif
}
