// The low-rank algorithms on taskvec::gpu: factored_svd, compress_sum, randomized_svd, truncated_svd, and peru_lora of
// reuse/.
// SPDX-License-Identifier: Apache-2.0
//
// The algorithms are the CPU's, written once on the linear algebra seam; this header brings the seam's device version:
// cuBLAS and cuSOLVER on CUDA (no kernels: g++ compiles it too; link CUDA::cudart, CUDA::cublas and CUDA::cusolver),
// Eigen where THRUST_DEVICE_SYSTEM names a host system. Matrices are device_matrix_view, in either order; σ comes back
// to the host, for which each decomposition waits. All work of a call is in the caller's precision (f32 for 16-bit
// matrices), where the CPU's small work is f64: for f32 σ is right to about 1e-5·‖A‖·‖B‖ on CUDA.
//
//     taskvec::gpu_context context({.stream = stream});          // handles, made once
//     auto best = factored_svd(context.policy(), a.view(), b.view(), {.rank = 16});
#pragma once

#include <taskvec/linalg/factored_svd.hpp>
#include <taskvec/linalg/randomized_svd.hpp>
#include <taskvec/linalg/svd.hpp>

#include <taskvec/device/linalg/backend.hpp>
#include <taskvec/device/linalg/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {
template <>
inline constexpr bool gpu_header_included<gpu, gpu_room::lowrank> = true;
} // namespace detail

/// What truncated_svd() returns on the device: also the singular values that were cut off.
template <arithmetic_element T>
struct device_truncated_svd_result : svd_result<T, memory_space::device> {
    std::vector<double> spectrum; ///< all min(m, n) singular values, descending
};

/// The exact leading singular triples of a dense m×n matrix on the device, as truncated_svd() on the CPU gives them: a
/// thin QR, the SVD of the triangular factor, and one product. Same checks and errors. Waits.
///
///     auto s = truncated_svd(policy, weight.view(), {.energy = 0.9});
template <storage_element S>
[[nodiscard]] device_truncated_svd_result<arithmetic_type<S>> truncated_svd(
    const gpu& policy, device_matrix_view<const S> input, const rank_choice& choice, std::string_view what = "A")
{
    using T = arithmetic_type<S>;
    const std::size_t m = input.rows(), n = input.cols(), least = std::min(m, n);
    detail::check_rank(choice, least, what);
    return with_context(policy, [&](const gpu& ready) {
        device_truncated_svd_result<T> result;
        if (least == 0) {
            result.u = result_matrix<T>(ready, m, 0);
            result.v = result_matrix<T>(ready, n, 0);
            return result;
        }
        device_matrix<T> copy;
        const auto a = in_arithmetic(ready, input, copy);
        if (!std::isfinite(squared_norm<T>(ready, a))) { refuse_nonfinite(ready, input, what); }
        const bool wide = m < n;
        const auto f = factor_qr<T>(ready, wide ? a.transposed() : a, what);
        auto core = small_svd(ready, f.r.view());
        result.spectrum = std::move(core.sigma);
        const std::size_t q = detail::chosen_rank(choice, result.spectrum);
        auto tall = result_matrix<T>(ready, wide ? n : m, q), square = result_matrix<T>(ready, least, q);
        multiply_q<T>(ready, f, std::as_const(core.u).view().left_columns(q), tall.view());
        keep_small<T>(ready, std::as_const(core.v).view().left_columns(q), square.view());
        result.u = std::move(wide ? square : tall);
        result.v = std::move(wide ? tall : square);
        result.sigma.assign(result.spectrum.begin(), result.spectrum.begin() + static_cast<std::ptrdiff_t>(q));
        result.squared_norm = energy_beyond(result.spectrum, 0);
        result.squared_error = energy_beyond(result.spectrum, q);
        orient<T>(ready, result.u.view(), result.v.view());
        return result;
    });
}

/// truncated_svd() as a way to decompose layers.
struct decompose_exactly_on_device {
    /// Truncated_svd() with what `choice` asks for.
    template <arithmetic_element T>
    [[nodiscard]] svd_result<T, memory_space::device> operator()(
        const gpu& policy, device_matrix_view<const T> a, const rank_choice& choice, std::string_view name) const
    {
        return truncated_svd<T>(policy, a, choice, name);
    }
};

#if TASKVEC_ON_CUDA
/// randomized_svd() by cuSOLVER's own randomized algorithm (cusolverDnXgesvdr) behind the same options: rank,
/// oversampling, power_iterations, name, clamp. Its random numbers are cuSOLVER's, so `seed` has no effect, and a rank
/// is all that it can be asked for (energy and relative_error: invalid_argument). squared_error is measured as there.
/// randomized_svd() is the default because its draws are those of the CPU; which of the two is faster can only be told
/// on a device. A copy of A is made. Waits.
template <storage_element S>
[[nodiscard]] randomized_svd_result<arithmetic_type<S>, memory_space::device> randomized_svd_by_gesvdr(
    const gpu& policy, device_matrix_view<const S> input, const randomized_svd_options& options)
{
    using T = arithmetic_type<S>;
    const std::size_t m = input.rows(), n = input.cols(), least = std::min(m, n);
    const std::string_view what = options.name;
    if (options.energy != 0 || options.relative_error != 0) {
        raise<invalid_argument>(error_code::rank_choice,
            message("'", what,
                "': cusolverDnXgesvdr takes a rank only; use randomized_svd() for an energy or a relative error"));
    }
    detail::check_rank({.rank = options.rank, .energy = 0, .clamp = options.clamp}, least, what);
    return with_context(policy, [&](const gpu& ready) {
        randomized_svd_result<T, memory_space::device> result;
        const std::size_t rank = std::min(options.rank, least), extra = std::min(options.oversampling, least - rank);
        if (least == 0) {
            result.u = result_matrix<T>(ready, m, 0);
            result.v = result_matrix<T>(ready, n, 0);
            return result;
        }
        device_matrix<T> copy;
        const auto a = in_arithmetic(ready, input, copy);
        result.squared_norm = squared_norm<T>(ready, a);
        if (!std::isfinite(result.squared_norm)) {
            refuse_nonfinite(ready, input, what);
            raise<invalid_argument>(
                error_code::norm_overflow, message("'", what, "': its squared norm overflows; scale it down first"));
        }
        device_matrix<T> work_a(ready, m, n), u(ready, m, rank + extra), v(ready, n, rank + extra);
        copy_matrix<T>(ready, a, work_a.view());
        const device::buffer<T> sigma(ready, least);
        const device::buffer<int> info(ready, 1);
        constexpr cudaDataType_t type = detail::cuda_calls<T>::type;
        const auto rows = static_cast<std::int64_t>(m), cols = static_cast<std::int64_t>(n),
                   k = static_cast<std::int64_t>(rank), p = static_cast<std::int64_t>(extra),
                   iterations = static_cast<std::int64_t>(options.power_iterations);
        std::size_t on_device = 0, on_host = 0;
        device::check(cusolverDnXgesvdr_bufferSize(ready.context->solver(), ready.context->settings(), 'S', 'S', rows,
                          cols, k, p, iterations, type, work_a.data(), rows, type, sigma.data(), type, u.data(), rows,
                          type, v.data(), cols, type, &on_device, &on_host),
            "cusolverDnXgesvdr_bufferSize");
        const device::buffer<std::byte> device_work(ready, std::max<std::size_t>(on_device, 1));
        std::vector<std::byte> host_work(on_host);
        device::check(cusolverDnXgesvdr(ready.context->solver(), ready.context->settings(), 'S', 'S', rows, cols, k, p,
                          iterations, type, work_a.data(), rows, type, sigma.data(), type, u.data(), rows, type,
                          v.data(), cols, type, device_work.data(), on_device, host_work.data(), on_host, info.data()),
            "cusolverDnXgesvdr");
        const std::vector<T> values = sigma.download(); // waits, before host_work goes
        if (const int code = info.download()[0]; code != 0) {
            raise<backend_error>(error_code::no_convergence,
                message("no approximation for '", what, "'; try randomized_svd()"), "cusolverDnXgesvdr", code);
        }
        result.sigma.assign(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(rank));
        result.u = detail::left_part<T>(ready, std::move(u), rank, detail::factor_place::kept);
        result.v = detail::left_part<T>(ready, std::move(v), rank, detail::factor_place::kept);
        result.squared_error = std::max(0.0, result.squared_norm - energy_beyond(result.sigma, 0));
        if (result.squared_error < cancellation_limit<T>(ready) * result.squared_norm) {
            result.squared_error = squared_residual<T>(
                ready, a, std::as_const(result.u).view(), result.sigma, std::as_const(result.v).view());
        }
        orient<T>(ready, result.u.view(), result.v.view());
        return result;
    });
}

/// randomized_svd_by_gesvdr() as a way to decompose layers.
struct decompose_by_gesvdr {
    std::size_t oversampling = 10;
    std::size_t power_iterations = 2;

    template <arithmetic_element T>
    [[nodiscard]] svd_result<T, memory_space::device> operator()(
        const gpu& policy, device_matrix_view<const T> a, const rank_choice& choice, std::string_view name) const
    {
        return randomized_svd_by_gesvdr<T>(policy, a,
            {.rank = choice.rank,
                .energy = choice.energy,
                .clamp = choice.clamp,
                .oversampling = oversampling,
                .power_iterations = power_iterations,
                .name = name});
    }
};
#endif

} // namespace taskvec::inline TASKVEC_ABI
