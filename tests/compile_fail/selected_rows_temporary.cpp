// A tensor that is worked out as it is read refers to what works it out: a temporary is gone before that.
// SPDX-License-Identifier: Apache-2.0
// error: name the owner first: its views would dangle
#include <taskvec/models/selected_rows.hpp>

taskvec::const_model_ref f(const taskvec::const_tensor_ref& rows)
{
#if defined(TASKVEC_FAULT)
    return {{"embedding", taskvec::selected_rows({rows}, {{0, 1, {{0, 0}}}}).tensor(rows.dtype)}};
#else
    static const taskvec::selected_rows first({rows}, {{0, 1, {{0, 0}}}});
    return {{"embedding", first.tensor(rows.dtype)}};
#endif
}
