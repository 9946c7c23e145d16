// A merge on the gpu without the header that holds it: one sentence says which to include.
// SPDX-License-Identifier: Apache-2.0
// error: merge\(\) on taskvec::gpu: include <taskvec/device/methods.hpp>
#include <taskvec/methods/average.hpp>

#include <vector>

void f(const std::vector<taskvec::device_view<const float>>& tasks, taskvec::device_view<float> out)
{
#if defined(TASKVEC_FAULT)
    taskvec::merge(taskvec::gpu{}, taskvec::average_options{}, tasks, out);
#else
    (void)tasks;
    (void)out;
#endif
}
