// A model of const tensors cannot be written.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the output is a model of const tensors: pass a taskvec::model_ref
// lines: 25
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

using namespace taskvec;

void f([[maybe_unused]] const std::vector<float>& base, [[maybe_unused]] const std::vector<std::vector<float>>& tasks,
    [[maybe_unused]] std::vector<float>& out)
{
    [[maybe_unused]] const task_arithmetic_options options{.lambda = 0.3};
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, const_model_ref(), std::vector<const_model_ref>{const_model_ref()}, const_model_ref());
#else
    merge(cpu{}, options, const_model_ref(), std::vector<const_model_ref>{const_model_ref()}, model_ref());
#endif
}
