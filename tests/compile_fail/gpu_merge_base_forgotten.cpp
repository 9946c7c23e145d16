// A method that needs the base, without it.
// SPDX-License-Identifier: Apache-2.0
// needs: thrust
// error: merge\(\): the arguments are not those of merge\(policy, options, base, tasks, output\)
// lines: 32
#define THRUST_HOST_SYSTEM THRUST_HOST_SYSTEM_CPP
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#include <taskvec/device/methods.hpp>
#include <taskvec/methods/ties.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const device_view<const float> base;
    const std::vector<device_view<const float>> tasks(1);
    const device_view<float> out;
#if defined(TASKVEC_FAULT)
    merge(gpu{}, ties_options{}, tasks, out);
#else
    merge(gpu{}, ties_options{}, base, tasks, out);
#endif
}
