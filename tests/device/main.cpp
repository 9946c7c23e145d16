// The main function of the test programs that run on taskvec::gpu: without a device they say so and are skipped (exit
// 77).
// SPDX-License-Identifier: Apache-2.0
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#if defined(TASKVEC_TEST_CUDA)
#include <cuda_runtime_api.h>
#endif

int main(int argc, char** argv)
{
#if defined(TASKVEC_TEST_CUDA)
    int count = 0;
    const cudaError_t answer = cudaGetDeviceCount(&count);
    if (answer != cudaSuccess || count == 0) {
        std::printf(
            "skipped: compiled, but no CUDA device answers here (cudaGetDeviceCount: code %d, %s; %d devices)\n",
            static_cast<int>(answer), cudaGetErrorString(answer), count);
        return 77;
    }
#endif
    return doctest::Context(argc, argv).run();
}
