// The same program for every way of using taskvec: merges two small models and prints the version that it was built
// with. SPDX-License-Identifier: Apache-2.0
#if defined(CORE_ONLY)
#include <taskvec/methods/task_arithmetic.hpp>
#else
#include <taskvec/taskvec.hpp>
#endif

#if defined(WITH_IO)
#include <taskvec/formats/safetensors.hpp>
#endif

#include <cstdio>
#include <vector>

int main()
{
    const std::vector<float> base{1, 1};
    const std::vector<std::vector<float>> tasks{{3, 1}, {1, 5}};
    std::vector<float> merged(2);
    taskvec::merge(taskvec::cpu{.threads = 1}, taskvec::task_arithmetic_options{.lambda = 0.5}, base, tasks, merged);
    std::printf("taskvec %d.%d.%d: %g %g\n", TASKVEC_VERSION_MAJOR, TASKVEC_VERSION_MINOR, TASKVEC_VERSION_PATCH,
        merged[0], merged[1]);
    return merged == std::vector<float>{2, 3} ? 0 : 1;
}
