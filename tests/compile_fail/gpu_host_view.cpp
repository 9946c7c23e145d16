// Host memory is no device memory: a merge on the gpu takes device views.
// SPDX-License-Identifier: Apache-2.0
// needs: thrust
// error: an argument lies in another memory space than the policy works in
// lines: 25
#define THRUST_HOST_SYSTEM THRUST_HOST_SYSTEM_CPP
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#include <taskvec/device/methods.hpp>

#include <vector>

void f(const std::vector<float>& base, const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
#if defined(TASKVEC_FAULT)
    taskvec::merge(taskvec::gpu{}, taskvec::task_arithmetic_options{}, base, tasks, out);
#else
    taskvec::merge(taskvec::cpu{}, taskvec::task_arithmetic_options{}, base, tasks, out);
#endif
}
