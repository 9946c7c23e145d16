// Merges and selection in device memory, beside the device's copy bandwidth measured in the same run. PyTorch's way:
// peers.py.
// SPDX-License-Identifier: Apache-2.0
//
// A share of the copy bandwidth is bytes ÷ time ÷ bandwidth, where bytes are what the passes that were made read and
// write. The target (DESIGN: merges ≥ 85%) is for the merges of one pass.
#include "device.hpp"

#include <taskvec/device/arithmetic.hpp>
#include <taskvec/device/methods.hpp>
#include <taskvec/device/select.hpp>

#include <cstdio>
#include <random>
#include <string>
#include <vector>

namespace {

using namespace taskvec;

constexpr std::size_t count = std::size_t{1} << 26, tasks = 3;

void report(const std::string& name, double seconds, double bytes, double bandwidth)
{
    std::printf(
        "%-56s %10.3f ms %8.1f%% of copy bandwidth\n", name.c_str(), seconds * 1e3, 100 * bytes / seconds / bandwidth);
}

/// Values as weights have them: a base, and tasks near it.
template <class T>
std::vector<T> normal(unsigned seed, const std::vector<T>& around, float deviation)
{
    std::mt19937 generator(seed);
    std::normal_distribution<float> draw(0, deviation);
    std::vector<T> values(count);
    for (std::size_t i = 0; i < count; ++i) {
        values[i] = narrow<T>((around.empty() ? 0.0f : widen<float>(around[i])) + draw(generator));
    }
    return values;
}

template <class T>
void measure_merges(const gpu& policy, const std::string& type, double bandwidth)
{
    const std::vector<T> origin = normal<T>(1, {}, 0.02f);
    const device::buffer<T> base(policy, origin), out(policy, count);
    std::vector<device::buffer<T>> memory;
    std::vector<device_view<const T>> views;
    for (unsigned t = 0; t < tasks; ++t) {
        memory.emplace_back(policy, normal<T>(2 + t, origin, 0.002f));
        views.push_back(memory.back().view());
    }
    const double one = static_cast<double>(count * sizeof(T)), read = (tasks + 1) * one;
    const std::string size = ", 3 x 2^26 " + type;
    const auto merge_by = [&](const std::string& name, const auto& options, double last_pass) {
        merge_report done;
        const double time =
            bench::seconds(policy, [&] { done = merge(policy, options, base.view(), views, out.view()); });
        const std::string passes = done.walks == 1 ? "" : " (" + std::to_string(done.walks) + " passes)";
        report(name + size + passes, time, (done.walks - 1) * read + last_pass, bandwidth);
    };
    merge_by("average", average_options{}, tasks * one + one);
    merge_by("task arithmetic", task_arithmetic_options{}, read + one);
    merge_by("DARE", dare_options{}, read + one);
    merge_by("TIES, density 0.2", ties_options{}, read + one);
    merge_by("TIES, density 1", ties_options{.density = 1.0}, read + one);
    merge_by("Model Stock", model_stock_options{}, read + one);
    const std::vector<T> half(count, narrow<T>(0.5f));
    std::vector<device::buffer<T>> fishers;
    std::vector<device_view<const T>> importance;
    for (std::size_t t = 0; t < tasks; ++t) {
        fishers.emplace_back(policy, half);
        importance.push_back(fishers.back().view());
    }
    merge_by("Fisher", fisher_options{.fishers = flat_fishers(importance)}, 2 * tasks * one + one);

    unsigned passes = 0;
    const double select = bench::seconds(policy, [&] { (void)top_k(policy, base.view(), count / 5, &passes); });
    report("top fifth of 2^26 " + type + " (" + std::to_string(passes) + " passes)", select, passes * one, bandwidth);
    report("dot, 2^26 " + type, bench::seconds(policy, [&] { (void)dot(policy, base.view(), views[0]); }), 2 * one,
        bandwidth);
}

} // namespace

int main()
{
    if (!bench::introduce()) { return 77; }
    const gpu policy;
    const double bandwidth = bench::copy_bandwidth(policy);
    measure_merges<float>(policy, "f32", bandwidth);
    measure_merges<bf16>(policy, "bf16", bandwidth);
    return 0;
}
