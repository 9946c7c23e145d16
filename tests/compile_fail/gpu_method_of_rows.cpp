// A method without a body for packs, on the gpu policy.
// SPDX-License-Identifier: Apache-2.0
// needs: thrust
// error: this method does not merge on taskvec::gpu
#define THRUST_HOST_SYSTEM THRUST_HOST_SYSTEM_CPP
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#include <taskvec/device/methods.hpp>
#include <taskvec/reuse/sparse_addition.hpp>

int main()
{
    using namespace taskvec;
    const const_model_ref base;
    const std::vector<const_model_ref> tasks(1);
#ifdef TASKVEC_FAULT
    merge(gpu{}, sparse_addition_options{}, base, tasks, model_ref{});
#else
    merge(cpu{}, sparse_addition_options{}, base, tasks, model_ref{});
#endif
}
