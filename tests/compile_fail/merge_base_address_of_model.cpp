// The address of a model is no model.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\): the base is the address of a model
// lines: 30
#include <taskvec/methods/task_arithmetic.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const task_arithmetic_options options{.lambda = 0.3};
    const const_model_ref base;
    const std::vector<const_model_ref> tasks(1);
    const model_ref out;
#if defined(TASKVEC_FAULT)
    merge(cpu{}, options, &base, tasks, out);
#else
    merge(cpu{}, options, base, tasks, out);
#endif
}
