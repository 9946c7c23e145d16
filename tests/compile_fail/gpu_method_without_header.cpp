// A merge on the gpu by a method whose header is missing: one sentence says which to include.
// SPDX-License-Identifier: Apache-2.0
// needs: thrust
// error: this method does not merge on taskvec::gpu: include <taskvec/device/methods.hpp>
#define THRUST_HOST_SYSTEM THRUST_HOST_SYSTEM_CPP
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#include <taskvec/device/methods/linear.hpp>
#include <taskvec/methods/ties.hpp>

#include <vector>

void f(taskvec::device_view<const float> base, const std::vector<taskvec::device_view<const float>>& tasks,
    taskvec::device_view<float> out)
{
#if defined(TASKVEC_FAULT)
    taskvec::merge(taskvec::gpu{}, taskvec::ties_options{}, base, tasks, out);
#else
    taskvec::merge(taskvec::gpu{}, taskvec::task_arithmetic_options{}, base, tasks, out);
#endif
}
