// Handles of cuBLAS and cuSOLVER, their errors, and the context that keeps them for a policy.
// SPDX-License-Identifier: Apache-2.0
//
// Calls of the libraries' host interface only: any C++20 compiler compiles this, nvcc is not needed.
#pragma once

#include <taskvec/device/memory.hpp>

#if !TASKVEC_ON_CUDA
#error "taskvec/device/cusolver is for CUDA; on a Thrust host system <taskvec/device/linalg/host.hpp> answers instead"
#endif

#include <cublas_v2.h>
#include <cusolverDn.h>

#if CUBLAS_VER_MAJOR < 12
#error "taskvec/device/cusolver needs CUDA 12 or later: its matrices may have more than 2^31 elements"
#endif

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {
namespace device {

/// The name of a cuSOLVER status; cuBLAS has a function for its own.
[[nodiscard]] inline std::string_view name_of(cusolverStatus_t status) noexcept
{
    switch (status) {
    case CUSOLVER_STATUS_SUCCESS: return "CUSOLVER_STATUS_SUCCESS";
    case CUSOLVER_STATUS_NOT_INITIALIZED: return "CUSOLVER_STATUS_NOT_INITIALIZED";
    case CUSOLVER_STATUS_ALLOC_FAILED: return "CUSOLVER_STATUS_ALLOC_FAILED";
    case CUSOLVER_STATUS_INVALID_VALUE: return "CUSOLVER_STATUS_INVALID_VALUE";
    case CUSOLVER_STATUS_ARCH_MISMATCH: return "CUSOLVER_STATUS_ARCH_MISMATCH";
    case CUSOLVER_STATUS_EXECUTION_FAILED: return "CUSOLVER_STATUS_EXECUTION_FAILED";
    case CUSOLVER_STATUS_INTERNAL_ERROR: return "CUSOLVER_STATUS_INTERNAL_ERROR";
    case CUSOLVER_STATUS_NOT_SUPPORTED: return "CUSOLVER_STATUS_NOT_SUPPORTED";
    default: return "a cuSOLVER status";
    }
}

/// What CUDA itself holds against the device now, as a clause; empty where nothing: a library's status says less than
/// the error of earlier work that it met.
[[nodiscard]] inline std::string held_against_the_device()
{
    const vendor::error_type pending = vendor::peek_last_error();
    if (pending == vendor::success) { return {}; }
    return message("; CUDA reports ", vendor::name_of(pending), " (code ", static_cast<int>(pending), "), ",
        vendor::words_of(pending), advice(pending));
}

/// What to do about a status that both libraries have.
[[nodiscard]] inline std::string_view advice(bool not_initialized, bool alloc_failed, bool arch_mismatch) noexcept
{
    if (not_initialized) {
        return ": no usable device or driver answers, or the device failed before; run on taskvec::cpu";
    }
    if (alloc_failed) { return ": out of device memory; use smaller matrices, or free device memory"; }
    if (arch_mismatch) {
        return ": this version of the library does not know the architecture of the device; install another CUDA "
               "toolkit";
    }
    return {};
}

/// The error_code of a status that both libraries have.
[[nodiscard]] inline error_code code_of(bool not_initialized, bool alloc_failed, bool arch_mismatch) noexcept
{
    if (alloc_failed) { return error_code::out_of_memory; }
    return not_initialized || arch_mismatch ? error_code::device_unusable : error_code::device_call;
}

/// Throws backend_error with the library's code, unless a call succeeded.
inline void check(cublasStatus_t status, const char* call)
{
    if (status == CUBLAS_STATUS_SUCCESS) { return; }
    raise<backend_error>(code_of(status == CUBLAS_STATUS_NOT_INITIALIZED, status == CUBLAS_STATUS_ALLOC_FAILED,
                             status == CUBLAS_STATUS_ARCH_MISMATCH),
        message(cublasGetStatusName(status),
            advice(status == CUBLAS_STATUS_NOT_INITIALIZED, status == CUBLAS_STATUS_ALLOC_FAILED,
                status == CUBLAS_STATUS_ARCH_MISMATCH),
            held_against_the_device()),
        call, static_cast<int>(status));
}
inline void check(cusolverStatus_t status, const char* call)
{
    if (status == CUSOLVER_STATUS_SUCCESS) { return; }
    raise<backend_error>(code_of(status == CUSOLVER_STATUS_NOT_INITIALIZED, status == CUSOLVER_STATUS_ALLOC_FAILED,
                             status == CUSOLVER_STATUS_ARCH_MISMATCH),
        message(name_of(status),
            advice(status == CUSOLVER_STATUS_NOT_INITIALIZED, status == CUSOLVER_STATUS_ALLOC_FAILED,
                status == CUSOLVER_STATUS_ARCH_MISMATCH),
            held_against_the_device()),
        call, static_cast<int>(status));
}

/// A library object of type H, made by Create and destroyed by Destroy. Move-only; the constructor throws, the
/// destructor never.
template <class H, auto Create, auto Destroy>
class handle {
public:
    /// Creates the object; `call` is Create's name, for the error.
    explicit handle(const char* call) { check(Create(&handle_), call); }
    handle(handle&& other) noexcept
        : handle_(std::exchange(other.handle_, nullptr))
    { }
    handle& operator=(handle&& other) noexcept
    {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~handle()
    {
        if (handle_) { (void)Destroy(handle_); }
    }
    /// The object, which stays this one's.
    [[nodiscard]] H get() const noexcept { return handle_; }

private:
    H handle_ = nullptr;
};

/// cuBLAS.
using cublas_handle = handle<cublasHandle_t, &cublasCreate_v2, &cublasDestroy_v2>;
/// cuSOLVER.
using cusolver_handle = handle<cusolverDnHandle_t, &cusolverDnCreate, &cusolverDnDestroy>;
/// Settings of Jacobi SVDs.
using jacobi_settings = handle<gesvdjInfo_t, &cusolverDnCreateGesvdjInfo, &cusolverDnDestroyGesvdjInfo>;
/// Settings of cuSOLVER's 64-bit interface.
using cusolver_settings = handle<cusolverDnParams_t, &cusolverDnCreateParams, &cusolverDnDestroyParams>;

} // namespace device

/// What gpu_context takes for itself.
struct gpu_context_options {
    std::size_t blas_workspace = std::size_t{32}
        << 20; ///< bytes that cuBLAS may use, from the policy's allocator; 0: cuBLAS allocates its own
};

/// The handles of one stream, made once and used by every call whose policy points here. Creating them costs
/// milliseconds and device memory, and destroying them waits for the device; a policy without a context pays that in
/// every call. Neither copied nor moved, as policies point to it; one thread at a time, as the handles are. The stream
/// and the allocator of the policy must outlive it. Throws backend_error (no device, no driver, out of memory …).
///
///     taskvec::gpu_context context({.stream = stream});
///     const taskvec::gpu policy = context.policy();
class gpu_context {
public:
    /// On the stream and with the allocator of `policy`.
    explicit gpu_context(const gpu& policy = {}, const gpu_context_options& options = {})
        : policy_{policy.stream, policy.allocator, this}
        , blas_((device::require_device(), "cublasCreate"))
        , solver_("cusolverDnCreate")
        , jacobi_("cusolverDnCreateGesvdjInfo")
        , settings_("cusolverDnCreateParams")
        , workspace_({policy.stream, policy.allocator, nullptr}, options.blas_workspace)
    {
        device::check(cublasSetStream(blas_.get(), device::stream_of(policy)),
            "cublasSetStream"); // forgets a workspace: first this
        if (workspace_.size() > 0) {
            device::check(cublasSetWorkspace(blas_.get(), workspace_.data(), workspace_.size()), "cublasSetWorkspace");
        }
        device::check(cublasSetPointerMode(blas_.get(), CUBLAS_POINTER_MODE_HOST), "cublasSetPointerMode");
        device::check(cusolverDnSetStream(solver_.get(), device::stream_of(policy)), "cusolverDnSetStream");
    }
    gpu_context(const gpu_context&) = delete;
    gpu_context& operator=(const gpu_context&) = delete;

    /// A policy on this context's stream and allocator, which uses its handles.
    [[nodiscard]] gpu policy() const noexcept { return policy_; }
    /// cuBLAS, on this stream.
    [[nodiscard]] cublasHandle_t blas() const noexcept { return blas_.get(); }
    /// cuSOLVER, on this stream.
    [[nodiscard]] cusolverDnHandle_t solver() const noexcept { return solver_.get(); }
    /// Settings of Jacobi SVDs.
    [[nodiscard]] gesvdjInfo_t jacobi() const noexcept { return jacobi_.get(); }
    /// Settings of cuSOLVER's 64-bit interface.
    [[nodiscard]] cusolverDnParams_t settings() const noexcept { return settings_.get(); }

private:
    gpu policy_;
    device::cublas_handle blas_;
    device::cusolver_handle solver_;
    device::jacobi_settings jacobi_;
    device::cusolver_settings settings_;
    device::buffer<std::byte> workspace_;
};

/// Calls body with a policy that has a context: the policy's own, or one that is made for this call.
/// Throws invalid_argument where the context belongs to another stream.
template <class Body>
decltype(auto) with_context(const gpu& policy, const Body& body)
{
    if (policy.context) {
        if (policy.context->policy().stream != policy.stream) {
            raise<invalid_argument>(error_code::context_stream,
                "the context of this gpu policy belongs to another stream; make a context for each "
                "stream, and take its policy()");
        }
        return body(policy);
    }
    const gpu_context context(policy);
    return body(context.policy());
}

} // namespace taskvec::inline TASKVEC_ABI
