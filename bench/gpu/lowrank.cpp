// Decompositions on a device: a large matrix by the library's own randomized SVD and by cuSOLVER's, and LoRA layers by
// themselves and together. Beside it: bench/gpu/peers.py. Run by hand; prints what bench/results/ keeps.
// SPDX-License-Identifier: Apache-2.0
#include "device.hpp"

#include <taskvec/device/linalg.hpp>

#include <cstdint>
#include <cstdio>
#include <span>
#include <vector>

using namespace taskvec;

namespace {

device_matrix<float> normal(const gpu& policy, std::size_t rows, std::size_t cols, std::uint64_t seed)
{
    device_matrix<float> x(policy, rows, cols);
    fill_normal<float>(policy, random_stream(seed, 0, "bench"), x.view());
    return x;
}

void report(const char* work, double time, double flops)
{
    std::printf("%-56s %10.3f ms %10.1f GFLOP/s\n", work, time * 1e3, flops / time * 1e-9);
}

} // namespace

int main()
{
    if (!bench::introduce()) { return 77; }
    cudaStream_t stream{};
    device::check(cudaStreamCreate(&stream), "cudaStreamCreate");
    {
        const gpu_context context({.stream = stream});
        const gpu policy = context.policy();
        (void)bench::copy_bandwidth(policy);

        constexpr std::size_t n = 4096, q = 16;
        const auto left = normal(policy, n, 200, 1), right = normal(policy, n, 200, 2);
        auto a = normal(policy, n, n, 3); // a spectrum that falls, and noise
        gemm<float>(policy, 1.0f, left.view(), right.view().transposed(), 0.5f, a.view());
        const auto view = std::as_const(a).view();
        const double products = 6 * 2.0 * n * n * (q + 10);
        report("gemm 4096 x 4096 x 26",
            bench::seconds(policy,
                [&] {
                    auto y = device_matrix<float>(policy, n, q + 10);
                    gemm<float>(policy, 1.0f, view, std::as_const(right).view().left_columns(q + 10), 0.0f, y.view());
                }),
            2.0 * n * n * (q + 10));
        double own = 0, theirs = 0;
        report("randomized_svd 4096 x 4096, rank 16",
            bench::seconds(policy, [&] { own = randomized_svd<float>(policy, view, {.rank = q}).relative_error(); }),
            products);
        report("randomized_svd_by_gesvdr, the same",
            bench::seconds(
                policy, [&] { theirs = randomized_svd_by_gesvdr<float>(policy, view, {.rank = q}).relative_error(); }),
            products);
        std::printf("relative errors: %.6f own, %.6f gesvdr\n", own, theirs);

        for (const std::size_t r : {std::size_t{16}, std::size_t{64}}) {
            constexpr std::size_t layers = 64;
            std::vector<device_matrix<float>> store;
            for (std::size_t i = 0; i < 2 * layers; ++i) { store.push_back(normal(policy, n, r, 10 + i)); }
            std::vector<factor_pair<float, memory_space::device>> pairs;
            for (std::size_t i = 0; i < layers; ++i) {
                pairs.push_back(
                    {.left = std::as_const(store[2 * i]).view(), .right = std::as_const(store[2 * i + 1]).view()});
            }
            const double flops = static_cast<double>(layers) * 2 * 4.0 * n * static_cast<double>(r * r);
            std::printf("64 LoRA layers 4096 x 4096 of rank %zu, to rank 8:\n", r);
            report("  one by one",
                bench::seconds(
                    policy,
                    [&] {
                        for (const auto& pair : pairs) { (void)factored_svd<float>(policy, pair, {.rank = 8}); }
                    },
                    3),
                flops);
            report("  together",
                bench::seconds(
                    policy,
                    [&] {
                        (void)factored_svd<float>(
                            policy, std::span<const factor_pair<float, memory_space::device>>(pairs), {.rank = 8});
                    },
                    3),
                flops);
            std::vector<device_matrix<float>> cores;
            for (std::size_t i = 0; i < layers; ++i) { cores.push_back(normal(policy, r, r, 100 + i)); }
            std::vector<device_matrix_view<const float>> views;
            for (const auto& core : cores) { views.push_back(core.view()); }
            const double core_flops = static_cast<double>(layers) * 22.0 * static_cast<double>(r * r * r);
            report("  their cores: small_svds",
                bench::seconds(policy, [&] { (void)small_svds<float>(policy, views); }, 3), core_flops);
            report("  their cores: approximate_svds",
                bench::seconds(policy, [&] { (void)approximate_svds<float>(policy, views); }, 3), core_flops);
        }
    }
    device::check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}
