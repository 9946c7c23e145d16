// Options of no method, streamed.
// SPDX-License-Identifier: Apache-2.0
// needs: thrust
// error: these are not the options of a merge method
// lines: 32
#define THRUST_HOST_SYSTEM THRUST_HOST_SYSTEM_CPP
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#include <taskvec/device/methods.hpp>
#include <taskvec/methods/ties.hpp>

#include <vector>

using namespace taskvec;

int main()
{
    const const_model_ref base;
    const std::vector<const_model_ref> tasks(1);
    [[maybe_unused]] const aligned_models models(&base, tasks);
    [[maybe_unused]] memory_sink sink({});
#if defined(TASKVEC_FAULT)
    merge_streamed(gpu{}, stream_options{}, models, sink, {});
#else
    merge_streamed(gpu{}, ties_options{}, models, sink, {});
#endif
}
