// A method of rows as the merge of PERU-FFT.
// SPDX-License-Identifier: Apache-2.0
// needs: thrust
// error: this method does not merge on taskvec::gpu
// lines: 32
#define THRUST_HOST_SYSTEM THRUST_HOST_SYSTEM_CPP
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#include <taskvec/device/methods.hpp>
#include <taskvec/device/reuse.hpp>
#include <taskvec/methods/della.hpp>
#include <taskvec/methods/ties.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const const_model_ref base;
    const std::vector<const_model_ref> tasks(1);
    const model_ref out;
#if defined(TASKVEC_FAULT)
    (void)peru_fft(gpu{}, della_options{}, {.density = 0.1}, base, tasks, out);
#else
    (void)peru_fft(gpu{}, ties_options{}, {.density = 0.1}, base, tasks, out);
#endif
}
