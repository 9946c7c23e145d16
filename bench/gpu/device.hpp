// What a benchmark on a device needs: its name and software, times by events on a stream, and the copy bandwidth of the
// same run.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/memory.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <vector>

namespace bench {

/// Prints what a figure has to be kept with: device, driver, runtime, commit. False, with a sentence, where no device
/// answers.
inline bool introduce()
{
    int count = 0;
    const cudaError_t answer = cudaGetDeviceCount(&count);
    if (answer != cudaSuccess || count == 0) {
        std::printf("no CUDA device answers here (%s): nothing measured\n", cudaGetErrorName(answer));
        return false;
    }
    cudaDeviceProp device{};
    int driver = 0, runtime = 0;
    taskvec::device::check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
    taskvec::device::check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    taskvec::device::check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
#if !defined(TASKVEC_BENCH_COMMIT)
#define TASKVEC_BENCH_COMMIT "unknown"
#endif
    std::printf("device %s, driver %d, CUDA %d, commit %s\n", device.name, driver, runtime, TASKVEC_BENCH_COMMIT);
    return true;
}

/// Median seconds of work() on the policy's stream, after one run that is not counted.
template <class Work>
double seconds(const taskvec::gpu& policy, const Work& work, int runs = 7)
{
    cudaEvent_t start{}, stop{};
    taskvec::device::check(cudaEventCreate(&start), "cudaEventCreate");
    taskvec::device::check(cudaEventCreate(&stop), "cudaEventCreate");
    std::vector<float> times;
    for (int run = -1; run < runs; ++run) {
        taskvec::device::check(cudaEventRecord(start, taskvec::device::stream_of(policy)), "cudaEventRecord");
        work();
        taskvec::device::check(cudaEventRecord(stop, taskvec::device::stream_of(policy)), "cudaEventRecord");
        taskvec::device::check(cudaEventSynchronize(stop), "cudaEventSynchronize");
        float milliseconds = 0;
        taskvec::device::check(cudaEventElapsedTime(&milliseconds, start, stop), "cudaEventElapsedTime");
        if (run >= 0) { times.push_back(milliseconds); }
    }
    (void)cudaEventDestroy(start);
    (void)cudaEventDestroy(stop);
    std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
    return static_cast<double>(times[static_cast<std::size_t>(runs) / 2]) * 1e-3;
}

/// Bytes a second that a copy within the device moves, read and written bytes together: what streaming work is held to.
inline double copy_bandwidth(const taskvec::gpu& policy, std::size_t bytes = std::size_t{1} << 30)
{
    taskvec::device::buffer<unsigned char> from(policy, bytes), to(policy, bytes);
    from.clear();
    const double time = seconds(policy, [&] { taskvec::device::copy(policy, to.data(), from.data(), bytes); });
    const double rate = 2 * static_cast<double>(bytes) / time;
    std::printf("copy bandwidth %.1f GB/s\n", rate * 1e-9);
    return rate;
}

} // namespace bench
