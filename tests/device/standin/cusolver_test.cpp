// Handles, contexts and errors of device/cusolver, against the stand-in: what each answer of the libraries becomes.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/linalg.hpp>

#include "device/standin/standin.hpp"
#include "reference/random_matrix.hpp"

#include <doctest/doctest.h>

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

using namespace taskvec;
using reference::normal_matrix;

namespace {

struct repaired {
    ~repaired() { standin::repair(); }
};

/// Counts, and may be full.
class counting_memory final : public device_memory_resource {
public:
    void* allocate(std::size_t bytes, void* stream) override
    {
        if (full) { return nullptr; }
        CHECK(stream == expected);
        ++calls;
        held += static_cast<long long>(bytes);
        return ::operator new(bytes);
    }
    void deallocate(void* place, std::size_t bytes, void*) noexcept override
    {
        held -= static_cast<long long>(bytes);
        ::operator delete(place);
    }
    bool full = false;
    int calls = 0;
    long long held = 0;
    void* expected = nullptr;
};

template <class Work>
std::string text_of(int code, const char* call, const Work& work)
{
    try {
        work();
    }
    catch (const backend_error& failure) {
        CHECK(failure.backend_code() == code);
        CHECK(failure.call() == call);
        return failure.what();
    }
    FAIL("no error");
    return {};
}

bool holds(const std::string& text, const char* part)
{
    return text.find(part) != std::string::npos;
}

} // namespace

TEST_CASE("handles are move-only, and give back what they hold once")
{
    static_assert(!std::is_copy_constructible_v<device::cublas_handle>
        && std::is_nothrow_move_constructible_v<device::cublas_handle>);
    static_assert(
        std::is_nothrow_destructible_v<device::cusolver_handle> && !std::is_copy_assignable_v<device::cusolver_handle>);
    static_assert(!std::is_move_constructible_v<gpu_context>); // policies point to it
    const auto before = standin::handles();
    {
        device::cublas_handle one("cublasCreate"), two("cublasCreate");
        device::cublas_handle three(std::move(one));
        CHECK(one.get() == nullptr);
        two = std::move(three);
        CHECK(standin::handles() == before + 2);
    }
    CHECK(standin::handles() == before);
}

TEST_CASE("memory comes from the policy's allocator on its stream, and all of it goes back, after errors too")
{
    const repaired at_the_end;
    int place = 0;
    counting_memory memory;
    memory.expected = &place;
    const auto before = standin::bytes();
    const auto handles = standin::handles();
    const auto host = normal_matrix<float>(20, 4, 1);
    {
        const gpu_context context({.stream = &place, .allocator = &memory});
        const gpu policy = context.policy();
        CHECK(memory.held == (32 << 20));
        const auto a = to_device(policy, host);
        CHECK(factored_svd<float>(policy, a.view(), a.view(), {.rank = 2}).rank() == 2);
        CHECK(memory.calls > 10);
        for (const char* call :
            {"cublasGemm", "cusolverDnGeqrf", "cusolverDnOrgqr", "cusolverDnGesvdj", "cublasIamax", "cublasDgmm"}) {
            standin::fail(call, 7);
            CHECK_THROWS_AS((void)factored_svd<float>(policy, a.view(), a.view(), {.rank = 2}), backend_error);
            standin::repair();
        }
        memory.full = true;
        CHECK(holds(text_of(0, "gpu::allocator->allocate",
                        [&] { (void)factored_svd<float>(policy, a.view(), a.view(), {.rank = 2}); }),
            "no room for"));
        memory.full = false;
        const gpu elsewhere{.stream = nullptr, .allocator = &memory, .context = policy.context};
        CHECK_THROWS_AS((void)factored_svd<float>(elsewhere, a.view(), a.view(), {.rank = 2}), invalid_argument);
        const auto back = to_host(policy, a); // inputs keep their contents
        CHECK(std::equal(host.data(), host.data() + host.size(), back.data()));
    }
    CHECK(memory.held == 0);
    CHECK(standin::bytes() == before);
    CHECK(standin::handles() == handles);
}

TEST_CASE("no device, no driver, wrong architecture, out of memory: named, with the library's code")
{
    const repaired at_the_end;
    standin::fail("cudaGetDeviceCount", cudaErrorNoDevice);
    CHECK(holds(text_of(cudaErrorNoDevice, "cudaGetDeviceCount", [] { const gpu_context context; }),
        "no CUDA device is visible"));
    standin::fail("cudaGetDeviceCount", cudaErrorInsufficientDriver);
    CHECK(holds(text_of(cudaErrorInsufficientDriver, "cudaGetDeviceCount", [] { const gpu_context context; }),
        "driver is missing or older"));
    standin::repair();
    const auto handles = standin::handles();
    standin::fail("cublasCreate", CUBLAS_STATUS_NOT_INITIALIZED);
    CHECK(holds(text_of(CUBLAS_STATUS_NOT_INITIALIZED, "cublasCreate", [] { const gpu_context context; }),
        "no usable device or driver"));
    standin::repair();
    standin::fail("cusolverDnCreate", CUSOLVER_STATUS_ARCH_MISMATCH);
    CHECK(holds(text_of(CUSOLVER_STATUS_ARCH_MISMATCH, "cusolverDnCreate", [] { const gpu_context context; }),
        "does not know the architecture"));
    standin::repair();
    standin::fail("cudaMallocAsync", cudaErrorMemoryAllocation);
    CHECK(holds(text_of(cudaErrorMemoryAllocation, "cudaMallocAsync", [] { const gpu_context context; }),
        "out of device memory"));
    CHECK(standin::handles() == handles); // those made before the error are gone
    standin::repair();
    const auto a = to_device(gpu{}, normal_matrix<float>(8, 3, 1));
    standin::fail("cublasGemm", CUBLAS_STATUS_ALLOC_FAILED);
    CHECK(holds(text_of(CUBLAS_STATUS_ALLOC_FAILED, "cublasGemm",
                    [&] { (void)randomized_svd<float>(gpu{}, a.view(), {.rank = 2}); }),
        "out of device memory"));
}

TEST_CASE("an error that sticks is named by CUDA's own code, whichever library meets it")
{
    const repaired at_the_end;
    const gpu_context context;
    const gpu policy = context.policy();
    const auto a = to_device(policy, normal_matrix<float>(8, 3, 1));
    auto c = to_device(policy, normal_matrix<float>(3, 3, 1));
    standin::sticky = cudaErrorIllegalAddress;
    const auto met = text_of(CUBLAS_STATUS_EXECUTION_FAILED, "cublasGemm",
        [&] { gemm<float>(policy, 1.0f, a.view().transposed(), a.view(), 0.0f, c.view()); });
    CHECK(holds(met, "cudaErrorIllegalAddress (code 700)"));
    CHECK(holds(met, "until the process starts anew"));
    CHECK(holds(text_of(cudaErrorIllegalAddress, "cudaStreamSynchronize", [&] { device::synchronize(policy); }),
        "until the process starts anew"));
}

TEST_CASE("what does not converge goes on by another road, and says so when there is none left")
{
    const repaired at_the_end;
    const gpu_context context;
    const gpu policy = context.policy();
    const auto a = to_device(policy, normal_matrix<double>(9, 5, 1));
    const auto sound = small_svd<double>(policy, a.view());
    standin::fail("gesvdj:info", 1);
    const auto other = small_svd<double>(policy, a.view());
    for (std::size_t i = 0; i < 5; ++i) { CHECK(other.sigma[i] == doctest::Approx(sound.sigma[i])); }
    standin::fail("gesvd:info", 3);
    CHECK(holds(text_of(3, "cusolverDnGesvd", [&] { (void)small_svd<double>(policy, a.view()); }),
        "no convergence for a 9×5 matrix"));
    standin::repair();
    standin::fail("gesvdr:info", 2);
    CHECK(holds(
        text_of(2, "cusolverDnXgesvdr", [&] { (void)randomized_svd_by_gesvdr<double>(policy, a.view(), {.rank = 2}); }),
        "no approximation for 'A'"));
    standin::repair();

    const std::vector<device_matrix_view<const double>> many(4, a.view());
    standin::fail("gesvdjBatched:info", 1); // of the second matrix
    const int before = standin::batches;
    for (const auto& one : small_svds<double>(policy, many)) {
        for (std::size_t i = 0; i < 5; ++i) { CHECK(one.sigma[i] == doctest::Approx(sound.sigma[i])); }
        CHECK(one.u.cols() == 5);
    }
    CHECK(standin::batches == before + 1);
    for (const auto& one : approximate_svds<double>(policy, many)) {
        CHECK(one.sigma[0] == doctest::Approx(sound.sigma[0]));
    }
    const std::vector<device_matrix_view<const double>> wide{a.view().transposed()};
    CHECK_THROWS_AS((void)approximate_svds<double>(policy, wide), shape_mismatch);
}
