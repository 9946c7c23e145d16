// Device memory is no host memory: a device view does not convert to a host view.
// SPDX-License-Identifier: Apache-2.0
// error: (could not convert|cannot convert|no viable conversion|conversion from)
#include <taskvec/core/view.hpp>

taskvec::host_view<const float> f(taskvec::device_view<float> device, taskvec::host_view<float> host)
{
#if defined(TASKVEC_FAULT)
    (void)host;
    return device;
#else
    (void)device;
    return host;
#endif
}
