// The lists of aligned models are theirs: those of a temporary are gone before they are read.
// SPDX-License-Identifier: Apache-2.0
// error: deleted
#include <taskvec/models/aligned_models.hpp>

std::size_t f(const taskvec::const_model_ref& base)
{
    const taskvec::const_model_ref* const task = &base;
#if defined(TASKVEC_FAULT)
    const auto& tensors = taskvec::aligned_models(&base, {task, 1}).tensors();
#else
    const taskvec::aligned_models models(&base, {task, 1});
    const auto& tensors = models.tensors();
#endif
    return tensors.size();
}
