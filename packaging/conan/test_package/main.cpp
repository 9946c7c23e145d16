// The same program for every way of using taskvec: prints the version that it was built with.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/taskvec.hpp>

#include <cstdio>

#if defined(WITH_IO)
#include <nlohmann/json.hpp>
#endif

int main()
{
    const auto bits = taskvec::f32_to_bf16(1.0f);
    std::printf("taskvec %d.%d.%d: 1.0 is 0x%04x in bf16\n", TASKVEC_VERSION_MAJOR, TASKVEC_VERSION_MINOR, TASKVEC_VERSION_PATCH, unsigned{bits});
    return bits == 0x3f80 ? 0 : 1;
}
