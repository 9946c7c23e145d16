// Options of no method, on the gpu policy.
// SPDX-License-Identifier: Apache-2.0
// needs: thrust
// error: these are not the options of a merge method
// lines: 30
#define THRUST_HOST_SYSTEM THRUST_HOST_SYSTEM_CPP
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#include <taskvec/device/methods.hpp>
#include <taskvec/methods/average.hpp>

struct own_options { };

int main()
{
    using namespace taskvec;
    const std::vector<const_model_ref> tasks(1);
#ifdef TASKVEC_FAULT
    merge(gpu{}, own_options{}, tasks, model_ref{});
#else
    merge(gpu{}, average_options{}, tasks, model_ref{});
#endif
}
