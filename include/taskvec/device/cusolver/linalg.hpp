// The linear algebra seam (linalg/linalg.hpp) on a CUDA device: cuBLAS and cuSOLVER.
// SPDX-License-Identifier: Apache-2.0
//
// No kernel of our own: plain g++ compiles it, and only the libraries are linked. Everything is in the caller's
// precision, the small work too. The libraries are column-major. A row-major matrix is the column-major transposed one:
// products take it as an operand to be transposed, a row-major result is computed as (A·B)ᵀ = BᵀAᵀ; only
// factorizations, which work in place, copy. Calls are queued on the policy's stream. Those that have to wait for it,
// to read a number, say so. Memory comes from the policy's allocator. Compiled, not run on a device; docs/gpu.md says
// what that covers.
#pragma once

#include <taskvec/device/cusolver/context.hpp>
#include <taskvec/device/linalg/matrix.hpp>
#include <taskvec/linalg/eigen.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A = Q·R: Q explicitly, column-major.
template <arithmetic_element T>
struct qr_factors<T, memory_space::device> {
    device_matrix<T> q; ///< m×n, of which the first k = min(m, n) columns count
    device_matrix<T> r; ///< k×n
};

/// A = u·diag(sigma)·vᵀ with u (m×k) and v (n×k) on the device, sigma on the host, descending; k = min(m, n).
template <arithmetic_element T>
struct device_svd_result {
    device_matrix<T> u; ///< m×k
    std::vector<double> sigma; ///< k values, descending
    device_matrix<T> v; ///< n×k
};

template <>
inline constexpr bool has_linear_algebra<gpu> = true;

namespace detail {

// The libraries' names by element type.
template <class T>
struct cuda_calls;
template <>
struct cuda_calls<float> {
    static constexpr cudaDataType_t type = CUDA_R_32F;
    static constexpr auto gemm = &cublasSgemm_64;
    static constexpr auto geam = &cublasSgeam_64;
    static constexpr auto dgmm = &cublasSdgmm_64;
    static constexpr auto nrm2 = &cublasSnrm2_64;
    static constexpr auto iamax = &cublasIsamax;
    static constexpr auto geqrf_size = &cusolverDnSgeqrf_bufferSize;
    static constexpr auto geqrf = &cusolverDnSgeqrf;
    static constexpr auto orgqr_size = &cusolverDnSorgqr_bufferSize;
    static constexpr auto orgqr = &cusolverDnSorgqr;
    static constexpr auto gesvd_size = &cusolverDnSgesvd_bufferSize;
    static constexpr auto gesvd = &cusolverDnSgesvd;
    static constexpr auto gesvdj_size = &cusolverDnSgesvdj_bufferSize;
    static constexpr auto gesvdj = &cusolverDnSgesvdj;
    static constexpr auto gesvdj_batched_size = &cusolverDnSgesvdjBatched_bufferSize;
    static constexpr auto gesvdj_batched = &cusolverDnSgesvdjBatched;
    static constexpr auto gesvda_batched_size = &cusolverDnSgesvdaStridedBatched_bufferSize;
    static constexpr auto gesvda_batched = &cusolverDnSgesvdaStridedBatched;
    static constexpr auto potrf_size = &cusolverDnSpotrf_bufferSize;
    static constexpr auto potrf = &cusolverDnSpotrf;
    static constexpr auto potrs = &cusolverDnSpotrs;
};
template <>
struct cuda_calls<double> {
    static constexpr cudaDataType_t type = CUDA_R_64F;
    static constexpr auto gemm = &cublasDgemm_64;
    static constexpr auto geam = &cublasDgeam_64;
    static constexpr auto dgmm = &cublasDdgmm_64;
    static constexpr auto nrm2 = &cublasDnrm2_64;
    static constexpr auto iamax = &cublasIdamax;
    static constexpr auto geqrf_size = &cusolverDnDgeqrf_bufferSize;
    static constexpr auto geqrf = &cusolverDnDgeqrf;
    static constexpr auto orgqr_size = &cusolverDnDorgqr_bufferSize;
    static constexpr auto orgqr = &cusolverDnDorgqr;
    static constexpr auto gesvd_size = &cusolverDnDgesvd_bufferSize;
    static constexpr auto gesvd = &cusolverDnDgesvd;
    static constexpr auto gesvdj_size = &cusolverDnDgesvdj_bufferSize;
    static constexpr auto gesvdj = &cusolverDnDgesvdj;
    static constexpr auto gesvdj_batched_size = &cusolverDnDgesvdjBatched_bufferSize;
    static constexpr auto gesvdj_batched = &cusolverDnDgesvdjBatched;
    static constexpr auto gesvda_batched_size = &cusolverDnDgesvdaStridedBatched_bufferSize;
    static constexpr auto gesvda_batched = &cusolverDnDgesvdaStridedBatched;
    static constexpr auto potrf_size = &cusolverDnDpotrf_bufferSize;
    static constexpr auto potrf = &cusolverDnDpotrf;
    static constexpr auto potrs = &cusolverDnDpotrs;
};

/// A size as cuSOLVER's int. Throws invalid_argument where it does not fit.
[[nodiscard]] inline int as_int(std::size_t size, const char* call)
{
    if (size > static_cast<std::size_t>(std::numeric_limits<int>::max())) {
        raise<invalid_argument>(error_code::size_limit, message(call, " takes sizes up to 2147483647; found ", size));
    }
    return static_cast<int>(size);
}

/// The column-major reading of a view: itself, or the transposed one of a row-major view.
template <class T>
[[nodiscard]] device_matrix_view<T> by_columns(device_matrix_view<T> x)
{
    return x.order() == matrix_order::column_major ? x : x.transposed();
}
template <class T>
[[nodiscard]] std::int64_t leading_dimension(device_matrix_view<T> x)
{
    return static_cast<std::int64_t>(std::max<std::size_t>(1, x.stride()));
}
template <class T>
[[nodiscard]] cublasOperation_t operation(device_matrix_view<T> x)
{
    return x.order() == matrix_order::column_major ? CUBLAS_OP_N : CUBLAS_OP_T;
}

/// Results on the device for as long as it lives; on the host before and after.
class results_on_device {
public:
    explicit results_on_device(cublasHandle_t blas)
        : blas_(blas)
    {
        device::check(cublasSetPointerMode(blas_, CUBLAS_POINTER_MODE_DEVICE), "cublasSetPointerMode");
    }
    ~results_on_device() { (void)cublasSetPointerMode(blas_, CUBLAS_POINTER_MODE_HOST); }
    results_on_device(const results_on_device&) = delete;
    results_on_device& operator=(const results_on_device&) = delete;

private:
    cublasHandle_t blas_;
};

} // namespace detail

/// A zero matrix of the policy's memory.
template <arithmetic_element T>
[[nodiscard]] device_matrix<T> result_matrix(
    const gpu& policy, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
{
    return device_matrix<T>(policy, rows, cols, order);
}
/// A matrix for an algorithm's own use; here of the same memory as results.
template <arithmetic_element T>
[[nodiscard]] device_matrix<T> scratch_matrix(
    const gpu& policy, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
{
    return device_matrix<T>(policy, rows, cols, order);
}

/// C = alpha·A·B + beta·C, by cuBLAS; see gemm() on the CPU. Every order of A, B and C is a combination of operands to
/// be transposed, without a copy. f32 is computed in f32 (no TF32, unless NVIDIA_TF32_OVERRIDE forces it). Does not
/// wait.
template <arithmetic_element T>
void gemm(const gpu& policy, T alpha, std::type_identity_t<device_matrix_view<const T>> a,
    std::type_identity_t<device_matrix_view<const T>> b, std::type_identity_t<T> beta,
    std::type_identity_t<device_matrix_view<T>> c)
{
    if (a.rows() != c.rows() || b.cols() != c.cols() || a.cols() != b.rows()) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("gemm: ", a.rows(), "×", a.cols(), " times ", b.rows(), "×", b.cols(), " into ", c.rows(), "×",
                c.cols()));
    }
    if (c.empty()) { return; }
    if (c.order() == matrix_order::row_major) {
        c = c.transposed();
        std::swap(a, b);
        a = a.transposed();
        b = b.transposed();
    }
    with_context(policy, [&](const gpu& ready) {
        device::check(detail::cuda_calls<T>::gemm(ready.context->blas(), detail::operation(a), detail::operation(b),
                          static_cast<std::int64_t>(c.rows()), static_cast<std::int64_t>(c.cols()),
                          static_cast<std::int64_t>(a.cols()), &alpha, a.data(), detail::leading_dimension(a), b.data(),
                          detail::leading_dimension(b), &beta, c.data(), detail::leading_dimension(c)),
            "cublasGemm");
    });
}

/// to = from, of the same shape; the orders may differ (then by cublasGeam). Does not wait.
template <arithmetic_element T>
void copy_matrix(const gpu& policy, std::type_identity_t<device_matrix_view<const T>> from,
    std::type_identity_t<device_matrix_view<T>> to)
{
    if (from.rows() != to.rows() || from.cols() != to.cols()) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("copy_matrix: ", from.rows(), "×", from.cols(), " into ", to.rows(), "×", to.cols()));
    }
    if (to.empty()) { return; }
    if (to.order() == matrix_order::row_major) {
        from = from.transposed();
        to = to.transposed();
    }
    if (from.order() == matrix_order::column_major) {
        device::check(device::vendor::copy_runs_on_device(to.data(), to.stride() * sizeof(T), from.data(),
                          from.stride() * sizeof(T), to.rows() * sizeof(T), to.cols(), device::stream_of(policy)),
            device::vendor::calls::copy_runs);
        return;
    }
    with_context(policy, [&](const gpu& ready) {
        const T one = 1, zero = 0;
        device::check(detail::cuda_calls<T>::geam(ready.context->blas(), CUBLAS_OP_T, CUBLAS_OP_N,
                          static_cast<std::int64_t>(to.rows()), static_cast<std::int64_t>(to.cols()), &one, from.data(),
                          detail::leading_dimension(from), &zero, to.data(), detail::leading_dimension(to), to.data(),
                          detail::leading_dimension(to)),
            "cublasGeam");
    });
}

/// out = x·diag(scale), the scales rounded to T first. x may be out. Waits for the stream while the scales are
/// uploaded.
template <arithmetic_element T>
void scale_columns(const gpu& policy, std::type_identity_t<device_matrix_view<const T>> x,
    std::span<const double> scale, std::type_identity_t<device_matrix_view<T>> out)
{
    if (out.empty()) { return; }
    with_context(policy, [&](const gpu& ready) {
        if (x.order() != out.order()) {
            copy_matrix<T>(ready, x, out);
            x = out;
        }
        const device::buffer<T> factors(ready, std::vector<T>(scale.begin(), scale.end()));
        const bool by_rows = out.order() == matrix_order::row_major;
        const auto to = detail::by_columns(out);
        const auto from = detail::by_columns(x);
        device::check(detail::cuda_calls<T>::dgmm(ready.context->blas(), by_rows ? CUBLAS_SIDE_LEFT : CUBLAS_SIDE_RIGHT,
                          static_cast<std::int64_t>(to.rows()), static_cast<std::int64_t>(to.cols()), from.data(),
                          detail::leading_dimension(from), factors.data(), 1, to.data(), detail::leading_dimension(to)),
            "cublasDgmm");
    });
}

/// ‖A‖²_F: norms of blocks of 2²⁰ elements in T, by cuBLAS, whose squares are added in f64 on the host. Relative error
/// about 1e-6 for f32, 1e-15 for f64. Waits. A matrix with gaps is copied first.
template <arithmetic_element T>
[[nodiscard]] double squared_norm(const gpu& policy, device_matrix_view<const T> a)
{
    if (a.empty()) { return 0; }
    const auto x = detail::by_columns(a);
    if (x.stride() != x.rows()) {
        device_matrix<T> packed(policy, x.rows(), x.cols());
        copy_matrix<T>(policy, x, packed.view());
        return squared_norm<T>(policy, std::as_const(packed).view());
    }
    return with_context(policy, [&](const gpu& ready) {
        constexpr std::size_t piece = std::size_t{1} << 20;
        const std::size_t pieces = (x.size() + piece - 1) / piece;
        device::buffer<T> norms(ready, pieces);
        {
            const detail::results_on_device mode(ready.context->blas());
            for (std::size_t i = 0; i < pieces; ++i) {
                const std::size_t count = std::min(piece, x.size() - i * piece);
                device::check(detail::cuda_calls<T>::nrm2(ready.context->blas(), static_cast<std::int64_t>(count),
                                  x.data() + i * piece, 1, norms.data() + i),
                    "cublasNrm2");
            }
        }
        double sum = 0;
        for (const T norm : norms.download()) { sum += static_cast<double>(norm) * static_cast<double>(norm); }
        return sum;
    });
}

/// The same normal numbers as on the CPU, bit for bit: drawn there and uploaded. Waits for the stream.
template <arithmetic_element T>
void fill_normal(const gpu& policy, const random_stream& stream, device_matrix_view<T> a)
{
    matrix<T> drawn(a.rows(), a.cols(), a.order());
    fill_normal<T>(cpu{}, stream, drawn.view());
    const device_matrix<T> there = to_device<T>(policy, drawn);
    copy_matrix<T>(policy, there.view(), a);
}

/// The matrix in its arithmetic type: as it is, or a converted copy kept in `copy`. bf16 and f16 are widened by a
/// product with an identity matrix, block by block: one product with 1 and sums with 0, hence exact for finite numbers;
/// storage types that cuBLAS does not know are widened on the host.
template <storage_element T>
[[nodiscard]] device_matrix_view<const arithmetic_type<T>> in_arithmetic(
    const gpu& policy, device_matrix_view<const T> a, device_matrix<arithmetic_type<T>>& copy)
{
    if constexpr (arithmetic_element<T>) { return a; }
    else if constexpr (!std::same_as<T, bf16> && !std::same_as<T, f16>) {
        matrix<arithmetic_type<T>> wide;
        const matrix<T> here = to_host<T>(policy, a);
        copy = to_device<arithmetic_type<T>>(policy, in_arithmetic<T>(cpu{}, here.view(), wide));
        return std::as_const(copy).view();
    }
    else {
        copy = device_matrix<float>(policy, a.rows(), a.cols(), a.order());
        if (a.empty()) { return std::as_const(copy).view(); }
        constexpr std::size_t width = 64;
        constexpr cudaDataType_t type = std::same_as<T, bf16> ? CUDA_R_16BF : CUDA_R_16F;
        with_context(policy, [&](const gpu& ready) {
            std::vector<T> identity(width * width, narrow<T>(0.0f));
            for (std::size_t i = 0; i < width; ++i) { identity[i * width + i] = narrow<T>(1.0f); }
            const device::buffer<T> unit(ready, identity);
            const auto from = detail::by_columns(a);
            const auto to = detail::by_columns(copy.view());
            const float one = 1, zero = 0;
            for (std::size_t j = 0; j < to.cols(); j += width) {
                const auto count = static_cast<std::int64_t>(std::min(width, to.cols() - j));
                device::check(cublasGemmEx_64(ready.context->blas(), CUBLAS_OP_N, CUBLAS_OP_N,
                                  static_cast<std::int64_t>(to.rows()), count, count, &one,
                                  from.data() + j * from.stride(), type, detail::leading_dimension(from), unit.data(),
                                  type, static_cast<std::int64_t>(width), &zero, to.data() + j * to.stride(),
                                  CUDA_R_32F, detail::leading_dimension(to), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                    "cublasGemmEx");
            }
        });
        return std::as_const(copy).view();
    }
}

/// Raises nonfinite_error for the first NaN or infinity in row-major order; returns if there is none. Copies A to the
/// host.
template <storage_element T>
void refuse_nonfinite(const gpu& policy, device_matrix_view<const T> a, std::string_view what)
{
    const matrix<T> here = to_host<T>(policy, a);
    refuse_nonfinite<T>(cpu{}, here.view(), what);
}

/// The thin QR of an m×n matrix A, either order, by Householder reflections (geqrf, orgqr) on a column-major copy; R is
/// QᵀA, upper triangular to rounding. ‖QᵀQ − I‖ and ‖A − QR‖/‖A‖ are of the order of √n·ε of T. NaN and infinity are
/// not found here: they reach the singular values. Does not wait.
template <arithmetic_element T>
[[nodiscard]] qr_factors<T, memory_space::device> factor_qr(const gpu& policy,
    std::type_identity_t<device_matrix_view<const T>> a, [[maybe_unused]] std::string_view what = "A")
{
    using calls = detail::cuda_calls<T>;
    const std::size_t m = a.rows(), n = a.cols(), k = std::min(m, n);
    qr_factors<T, memory_space::device> f;
    f.q = device_matrix<T>(policy, m, n);
    f.r = device_matrix<T>(policy, k, n);
    if (k == 0) { return f; }
    with_context(policy, [&](const gpu& ready) {
        const cusolverDnHandle_t solver = ready.context->solver();
        const int rows = detail::as_int(m, "geqrf"), cols = detail::as_int(n, "geqrf"),
                  rank = static_cast<int>(std::min(rows, cols));
        copy_matrix<T>(ready, a, f.q.view());
        int first = 0, second = 0;
        device::check(calls::geqrf_size(solver, rows, cols, f.q.data(), rows, &first), "cusolverDnGeqrf_bufferSize");
        const device::buffer<T> tau(ready, k);
        device::check(calls::orgqr_size(solver, rows, rank, rank, f.q.data(), rows, tau.data(), &second),
            "cusolverDnOrgqr_bufferSize");
        const device::buffer<T> work(ready, static_cast<std::size_t>(std::max({first, second, 1})));
        const device::buffer<int> info(ready, 1); // tells wrong arguments alone: not read
        device::check(calls::geqrf(solver, rows, cols, f.q.data(), rows, tau.data(), work.data(), first, info.data()),
            "cusolverDnGeqrf");
        device::check(
            calls::orgqr(solver, rows, rank, rank, f.q.data(), rows, tau.data(), work.data(), second, info.data()),
            "cusolverDnOrgqr");
        gemm<T>(ready, T(1), f.q.view().left_columns(k).transposed(), a, T(0), f.r.view());
    });
    return f;
}

/// out = Q·X for the Q of factor_qr(): X is k×p, out m×p. Does not wait.
template <arithmetic_element T>
void multiply_q(const gpu& policy, const qr_factors<T, memory_space::device>& f,
    std::type_identity_t<device_matrix_view<const T>> x, std::type_identity_t<device_matrix_view<T>> out)
{
    gemm<T>(policy, T(1), f.q.view().left_columns(f.r.rows()), x, T(0), out);
}

/// weight·Ra·Rbᵀ of two triangular factors.
template <arithmetic_element T>
[[nodiscard]] device_matrix<T> small_product(
    const gpu& policy, double weight, const device_matrix<T>& a, const device_matrix<T>& b)
{
    device_matrix<T> core(policy, a.rows(), b.rows());
    gemm<T>(policy, static_cast<T>(weight), a.view(), b.view().transposed(), T(0), core.view());
    return core;
}

/// out = x·y for a tall x and columns y of what small_svd() returned.
template <arithmetic_element T>
void multiply_small(const gpu& policy, std::type_identity_t<device_matrix_view<const T>> x,
    std::type_identity_t<device_matrix_view<const T>> y, std::type_identity_t<device_matrix_view<T>> out)
{
    gemm<T>(policy, T(1), x, y, T(0), out);
}

/// out = y, columns of what small_svd() returned.
template <arithmetic_element T>
void keep_small(const gpu& policy, std::type_identity_t<device_matrix_view<const T>> y,
    std::type_identity_t<device_matrix_view<T>> out)
{
    copy_matrix<T>(policy, y, out);
}

/// An orthonormal basis of the columns of y, m×min(m, n).
template <arithmetic_element T>
[[nodiscard]] device_matrix<T> orthonormal_basis(
    const gpu& policy, std::type_identity_t<device_matrix_view<const T>> y, std::string_view what)
{
    auto f = factor_qr<T>(policy, y, what);
    if (f.r.rows() == f.q.cols()) { return std::move(f.q); }
    device_matrix<T> q(policy, y.rows(), f.r.rows());
    copy_matrix<T>(policy, std::as_const(f.q).view().left_columns(f.r.rows()), q.view());
    return q;
}

namespace detail {

/// gesvd for m ≥ n ≥ 1. Returns cuSOLVER's info.
template <class T>
[[nodiscard]] int svd_by_bidiagonalization(
    const gpu& ready, device_matrix_view<const T> a, device_svd_result<T>& result)
{
    using calls = cuda_calls<T>;
    const cusolverDnHandle_t solver = ready.context->solver();
    const int m = as_int(a.rows(), "gesvd"), n = as_int(a.cols(), "gesvd");
    device_matrix<T> work_a(ready, a.rows(), a.cols()), vt(ready, a.cols(), a.cols());
    copy_matrix<T>(ready, a, work_a.view());
    int size = 0;
    device::check(calls::gesvd_size(solver, m, n, &size), "cusolverDnGesvd_bufferSize");
    const device::buffer<T> work(ready, static_cast<std::size_t>(std::max(size, 1))), sigma(ready, a.cols()),
        rest(ready, a.cols());
    const device::buffer<int> info(ready, 1);
    device::check(calls::gesvd(solver, 'S', 'S', m, n, work_a.data(), m, sigma.data(), result.u.data(), m, vt.data(), n,
                      work.data(), size, rest.data(), info.data()),
        "cusolverDnGesvd");
    copy_matrix<T>(ready, std::as_const(vt).view().transposed(), result.v.view());
    const auto values = sigma.download();
    result.sigma.assign(values.begin(), values.end());
    return info.download()[0];
}

/// gesvdj for m ≥ n ≥ 1. Returns cuSOLVER's info.
template <class T>
[[nodiscard]] int svd_by_rotations(const gpu& ready, device_matrix_view<const T> a, device_svd_result<T>& result)
{
    using calls = cuda_calls<T>;
    const cusolverDnHandle_t solver = ready.context->solver();
    const gesvdjInfo_t settings = ready.context->jacobi();
    const int m = as_int(a.rows(), "gesvdj"), n = as_int(a.cols(), "gesvdj");
    constexpr int thin = 1;
    device_matrix<T> work_a(ready, a.rows(), a.cols());
    copy_matrix<T>(ready, a, work_a.view());
    const device::buffer<T> sigma(ready, a.cols());
    const device::buffer<int> info(ready, 1);
    int size = 0;
    device::check(calls::gesvdj_size(solver, CUSOLVER_EIG_MODE_VECTOR, thin, m, n, work_a.data(), m, sigma.data(),
                      result.u.data(), m, result.v.data(), n, &size, settings),
        "cusolverDnGesvdj_bufferSize");
    const device::buffer<T> work(ready, static_cast<std::size_t>(std::max(size, 1)));
    device::check(calls::gesvdj(solver, CUSOLVER_EIG_MODE_VECTOR, thin, m, n, work_a.data(), m, sigma.data(),
                      result.u.data(), m, result.v.data(), n, work.data(), size, info.data(), settings),
        "cusolverDnGesvdj");
    const auto values = sigma.download();
    result.sigma.assign(values.begin(), values.end());
    return info.download()[0];
}

} // namespace detail

/// The SVD of a matrix on the device: gesvdj (one-sided Jacobi) up to 512 columns, gesvd beyond and where gesvdj does
/// not converge. Where the two should change places can only be told on a device. σ to about n·ε·σ₁ in T. Signs are
/// left as they fall. A matrix that is not finite gives σ of NaN. Throws backend_error where gesvd does not converge
/// either. Waits, for σ and `info`.
template <arithmetic_element T>
[[nodiscard]] device_svd_result<T> small_svd(const gpu& policy, device_matrix_view<const T> a)
{
    if (a.rows() < a.cols()) {
        auto turned = small_svd<T>(policy, a.transposed());
        std::swap(turned.u, turned.v);
        return turned;
    }
    device_svd_result<T> result{device_matrix<T>(policy, a.rows(), a.cols()), std::vector<double>(a.cols()),
        device_matrix<T>(policy, a.cols(), a.cols())};
    if (a.cols() == 0) { return result; }
    return with_context(policy, [&](const gpu& ready) {
        constexpr std::size_t most_columns = 512;
        if (a.cols() <= most_columns && detail::svd_by_rotations<T>(ready, a, result) == 0) {
            return std::move(result);
        }
        if (const double norm = squared_norm<T>(ready, a); !std::isfinite(norm)) {
            result.sigma.assign(a.cols(), std::numeric_limits<double>::quiet_NaN());
            return std::move(result);
        }
        const int info = detail::svd_by_bidiagonalization<T>(ready, a, result);
        if (info != 0) {
            raise<backend_error>(error_code::no_convergence,
                message("no convergence for a ", a.rows(), "×", a.cols(), " matrix; try randomized_svd()"),
                "cusolverDnGesvd", info);
        }
        return std::move(result);
    });
}

/// Many small SVDs: result i belongs to matrices[i]. Matrices of one shape with up to 32 rows and columns go together
/// through gesvdjBatched, larger ones and single ones one by one, as do those that do not converge there. Waits.
template <arithmetic_element T>
[[nodiscard]] std::vector<device_svd_result<T>> small_svds(
    const gpu& policy, const std::vector<device_matrix_view<const T>>& matrices)
{
    using calls = detail::cuda_calls<T>;
    constexpr std::size_t most = 32; // cuSOLVER's limit
    std::vector<device_svd_result<T>> results(matrices.size());
    std::map<std::pair<std::size_t, std::size_t>, std::vector<std::size_t>> by_shape;
    for (std::size_t i = 0; i < matrices.size(); ++i) {
        by_shape[{matrices[i].rows(), matrices[i].cols()}].push_back(i);
    }
    with_context(policy, [&](const gpu& ready) {
        for (const auto& [shape, members] : by_shape) {
            const auto [m, n] = shape;
            const std::size_t k = std::min(m, n), count = members.size();
            if (k == 0 || std::max(m, n) > most || count < 2) {
                for (const std::size_t i : members) { results[i] = small_svd<T>(ready, matrices[i]); }
                continue;
            }
            // One after the other without gaps: as a matrix of m rows and n·count columns.
            device_matrix<T> a(ready, m, n * count), u(ready, m, m * count), v(ready, n, n * count);
            for (std::size_t i = 0; i < count; ++i) {
                copy_matrix<T>(ready, matrices[members[i]], a.view().block(0, i * n, m, n));
            }
            const device::buffer<T> sigma(ready, k * count);
            const device::buffer<int> info(ready, count);
            const int rows = static_cast<int>(m), cols = static_cast<int>(n),
                      batch = detail::as_int(count, "gesvdjBatched");
            int size = 0;
            device::check(
                calls::gesvdj_batched_size(ready.context->solver(), CUSOLVER_EIG_MODE_VECTOR, rows, cols, a.data(),
                    rows, sigma.data(), u.data(), rows, v.data(), cols, &size, ready.context->jacobi(), batch),
                "cusolverDnGesvdjBatched_bufferSize");
            const device::buffer<T> work(ready, static_cast<std::size_t>(std::max(size, 1)));
            device::check(calls::gesvdj_batched(ready.context->solver(), CUSOLVER_EIG_MODE_VECTOR, rows, cols, a.data(),
                              rows, sigma.data(), u.data(), rows, v.data(), cols, work.data(), size, info.data(),
                              ready.context->jacobi(), batch),
                "cusolverDnGesvdjBatched");
            const std::vector<T> values = sigma.download();
            const std::vector<int> codes = info.download();
            for (std::size_t i = 0; i < count; ++i) {
                auto& result = results[members[i]];
                if (codes[i] != 0) {
                    result = small_svd<T>(ready, matrices[members[i]]);
                    continue;
                }
                result.sigma.assign(values.begin() + static_cast<std::ptrdiff_t>(i * k),
                    values.begin() + static_cast<std::ptrdiff_t>((i + 1) * k));
                result.u = device_matrix<T>(ready, m, k);
                result.v = device_matrix<T>(ready, n, k);
                copy_matrix<T>(ready, std::as_const(u).view().block(0, i * m, m, k), result.u.view());
                copy_matrix<T>(ready, std::as_const(v).view().block(0, i * n, n, k), result.v.view());
            }
        }
    });
    return results;
}

/// Many SVDs of tall matrices of one shape (m ≥ n, any size), by gesvdaStridedBatched: through the Gram matrix, so σ
/// below √ε·σ₁ are noise (√ε is 3e-4 for f32, 1e-8 for f64). Not what the library takes by itself: for leading triples
/// in f64, or where that is enough. Throws shape_mismatch. Waits.
template <arithmetic_element T>
[[nodiscard]] std::vector<device_svd_result<T>> approximate_svds(
    const gpu& policy, const std::vector<device_matrix_view<const T>>& matrices)
{
    using calls = detail::cuda_calls<T>;
    std::vector<device_svd_result<T>> results(matrices.size());
    if (matrices.empty() || matrices[0].empty()) { return small_svds<T>(policy, matrices); }
    const std::size_t m = matrices[0].rows(), n = matrices[0].cols(), count = matrices.size();
    for (const auto& one : matrices) {
        if (one.rows() != m || one.cols() != n || m < n) {
            raise<shape_mismatch>(error_code::matrix_shape,
                message("approximate_svds: found ", one.rows(), "×", one.cols(), " beside ", m, "×", n,
                    "; expected matrices of one shape with m ≥ n"));
        }
    }
    with_context(policy, [&](const gpu& ready) {
        device_matrix<T> a(ready, m, n * count), u(ready, m, n * count), v(ready, n, n * count);
        for (std::size_t i = 0; i < count; ++i) { copy_matrix<T>(ready, matrices[i], a.view().block(0, i * n, m, n)); }
        const device::buffer<T> sigma(ready, n * count);
        const device::buffer<int> info(ready, count);
        std::vector<double> residuals(count);
        const int rows = detail::as_int(m, "gesvdaStridedBatched"), cols = detail::as_int(n, "gesvdaStridedBatched"),
                  batch = detail::as_int(count, "gesvdaStridedBatched");
        const auto step_a = static_cast<long long>(m * n), step_v = static_cast<long long>(n * n),
                   step_s = static_cast<long long>(n);
        int size = 0;
        device::check(
            calls::gesvda_batched_size(ready.context->solver(), CUSOLVER_EIG_MODE_VECTOR, cols, rows, cols, a.data(),
                rows, step_a, sigma.data(), step_s, u.data(), rows, step_a, v.data(), cols, step_v, &size, batch),
            "cusolverDnGesvdaStridedBatched_bufferSize");
        const device::buffer<T> work(ready, static_cast<std::size_t>(std::max(size, 1)));
        device::check(calls::gesvda_batched(ready.context->solver(), CUSOLVER_EIG_MODE_VECTOR, cols, rows, cols,
                          a.data(), rows, step_a, sigma.data(), step_s, u.data(), rows, step_a, v.data(), cols, step_v,
                          work.data(), size, info.data(), residuals.data(), batch),
            "cusolverDnGesvdaStridedBatched");
        const std::vector<T> values = sigma.download();
        const std::vector<int> codes = info.download();
        for (std::size_t i = 0; i < count; ++i) {
            if (codes[i] != 0) {
                results[i] = small_svd<T>(ready, matrices[i]);
                continue;
            }
            results[i].sigma.assign(values.begin() + static_cast<std::ptrdiff_t>(i * n),
                values.begin() + static_cast<std::ptrdiff_t>((i + 1) * n));
            results[i].u = device_matrix<T>(ready, m, n);
            results[i].v = device_matrix<T>(ready, n, n);
            copy_matrix<T>(ready, std::as_const(u).view().block(0, i * n, m, n), results[i].u.view());
            copy_matrix<T>(ready, std::as_const(v).view().block(0, i * n, n, n), results[i].v.view());
        }
    });
    return results;
}

/// Turns the signs of matching columns of u and v so that the entry of largest magnitude of each u is positive (the
/// first one among equals). Waits twice, for the places and the values of those entries.
template <arithmetic_element T>
void orient(
    const gpu& policy, std::type_identity_t<device_matrix_view<T>> u, std::type_identity_t<device_matrix_view<T>> v)
{
    if (u.empty()) { return; }
    with_context(policy, [&](const gpu& ready) {
        const bool by_rows = u.order() == matrix_order::row_major;
        const std::size_t step = by_rows ? u.stride() : 1, across = by_rows ? 1 : u.stride();
        const device::buffer<int> places(ready, u.cols());
        {
            const detail::results_on_device mode(ready.context->blas());
            for (std::size_t j = 0; j < u.cols(); ++j) {
                device::check(
                    detail::cuda_calls<T>::iamax(ready.context->blas(), detail::as_int(u.rows(), "cublasIamax"),
                        u.data() + j * across, detail::as_int(step, "cublasIamax"), places.data() + j),
                    "cublasIamax");
            }
        }
        const std::vector<int> at = places.download();
        std::vector<T> largest(u.cols());
        for (std::size_t j = 0; j < u.cols(); ++j) { // counted from 1
            const std::size_t row = at[j] > 0 ? static_cast<std::size_t>(at[j]) - 1 : 0;
            device::check(device::vendor::copy_to_host(
                              &largest[j], u.data() + j * across + row * step, sizeof(T), device::stream_of(ready)),
                device::vendor::calls::copy);
        }
        device::synchronize(ready);
        std::vector<double> signs(u.cols());
        std::transform(largest.begin(), largest.end(), signs.begin(), [](T x) { return x < 0 ? -1.0 : 1.0; });
        scale_columns<T>(ready, u, signs, u);
        scale_columns<T>(ready, v, signs, v);
    });
}

/// G = L·Lᵀ for a symmetric positive definite G (potrf), with the answer of factor_cholesky() on the CPU. Waits.
template <arithmetic_element T>
[[nodiscard]] double factor_cholesky(const gpu& policy, device_matrix_view<T> g)
{
    if (g.rows() != g.cols() || g.order() != matrix_order::column_major) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("factor_cholesky: G is ", g.rows(), "×", g.cols(), "; expected a square, column-major matrix"));
    }
    if (g.empty()) { return 1; }
    return with_context(policy, [&](const gpu& ready) {
        using calls = detail::cuda_calls<T>;
        const std::size_t n = g.rows();
        const int order = detail::as_int(n, "potrf"), stride = detail::as_int(g.stride(), "potrf");
        const auto diagonal = [&] {
            std::vector<T> values(n);
            device::check(device::vendor::copy_runs_to_host(values.data(), sizeof(T), g.data(),
                              (g.stride() + 1) * sizeof(T), sizeof(T), n, device::stream_of(ready)),
                device::vendor::calls::copy_runs);
            device::synchronize(ready);
            return values;
        };
        const std::vector<T> before = diagonal();
        if (!std::all_of(before.begin(), before.end(), [](T x) { return x > 0; })) { return 0.0; }
        int size = 0;
        device::check(
            calls::potrf_size(ready.context->solver(), CUBLAS_FILL_MODE_LOWER, order, g.data(), stride, &size),
            "cusolverDnPotrf_bufferSize");
        const device::buffer<T> work(ready, static_cast<std::size_t>(std::max(size, 1)));
        const device::buffer<int> info(ready, 1);
        device::check(calls::potrf(ready.context->solver(), CUBLAS_FILL_MODE_LOWER, order, g.data(), stride,
                          work.data(), size, info.data()),
            "cusolverDnPotrf");
        if (info.download()[0] != 0) { return 0.0; }
        const std::vector<T> after = diagonal();
        double least = 1;
        for (std::size_t i = 0; i < n; ++i) {
            least = std::min(
                least, static_cast<double>(after[i]) * static_cast<double>(after[i]) / static_cast<double>(before[i]));
        }
        return least;
    });
}

/// X with L·Lᵀ·X = B, in place of B (potrs); a row-major B is turned and turned back. Does not wait.
template <arithmetic_element T>
void solve_cholesky(const gpu& policy, std::type_identity_t<device_matrix_view<const T>> l, device_matrix_view<T> b)
{
    if (l.rows() != l.cols() || b.rows() != l.rows() || l.order() != matrix_order::column_major) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("solve_cholesky: L is ", l.rows(), "×", l.cols(), ", B ", b.rows(), "×", b.cols()));
    }
    if (b.empty()) { return; }
    with_context(policy, [&](const gpu& ready) {
        device_matrix<T> turned;
        auto x = b;
        if (b.order() == matrix_order::row_major) {
            turned = device_matrix<T>(ready, b.rows(), b.cols());
            copy_matrix<T>(ready, b, turned.view());
            x = turned.view();
        }
        const device::buffer<int> info(ready, 1); // tells wrong arguments alone: not read
        device::check(
            detail::cuda_calls<T>::potrs(ready.context->solver(), CUBLAS_FILL_MODE_LOWER,
                detail::as_int(l.rows(), "potrs"), detail::as_int(x.cols(), "potrs"), l.data(),
                detail::as_int(l.stride(), "potrs"), x.data(), detail::as_int(x.stride(), "potrs"), info.data()),
            "cusolverDnPotrs");
        if (!turned.empty()) { copy_matrix<T>(ready, x, b); }
    });
}

/// Solves G·X = B for a symmetric positive definite G (n×n) and B (n×p), in place of B. False, with B unspecified,
/// where G is not numerically positive definite. Waits.
template <arithmetic_element T>
[[nodiscard]] bool cholesky_solve(
    const gpu& policy, std::type_identity_t<device_matrix_view<const T>> g, device_matrix_view<T> b)
{
    if (g.rows() != g.cols() || b.rows() != g.rows()) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("cholesky_solve: G is ", g.rows(), "×", g.cols(), ", B ", b.rows(), "×", b.cols()));
    }
    return with_context(policy, [&](const gpu& ready) {
        device_matrix<T> l(ready, g.rows(), g.cols());
        copy_matrix<T>(ready, g, l.view());
        if (factor_cholesky<T>(ready, l.view()) <= 0) { return false; }
        solve_cholesky<T>(ready, std::as_const(l).view(), b);
        return true;
    });
}

/// body(policy, index) for each index, in order: the stream is one.
template <class Body>
void for_each_piece(const gpu& policy, std::size_t count, const Body& body)
{
    for (std::size_t index = 0; index < count; ++index) { body(policy, index); }
}

/// ‖A‖² is known to about 1e-6 of it in f32.
template <arithmetic_element T>
[[nodiscard]] constexpr double cancellation_limit(const gpu&)
{
    return std::same_as<T, float> ? 1e-2 : 1e-6;
}

static_assert(check_linear_algebra<gpu, float>() && check_linear_algebra<gpu, double>());

} // namespace taskvec::inline TASKVEC_ABI
