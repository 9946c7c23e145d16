// --method task-arithmetic.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::task_arithmetic_options> task_arithmetic(
    "task-arithmetic", "base + lambda * weighted sum of the task vectors", 20);

} // namespace
