// A stand-in for the CUDA runtime, cuBLAS and cuSOLVER on the host: the calls that taskvec makes, with the arguments'
// meaning as NVIDIA documents it, in plain loops; "device memory" is malloc. A program linked with it instead of the
// libraries runs our calls (operands, strides, work space, what is read back, what an error becomes) where there is no
// device. It shows that our side of the interface is used as documented. It shows nothing about a device, its rounding,
// its speed or its asynchrony.
// SPDX-License-Identifier: Apache-2.0
#include "standin.hpp"

#include <cublas_v2.h>
#include <cuda_runtime_api.h>
#include <cusolverDn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

struct cublasContext {
    cublasPointerMode_t mode = CUBLAS_POINTER_MODE_HOST;
};
struct cusolverDnContext { };
struct gesvdjInfo { };
struct cusolverDnParams { };

namespace {

std::map<std::string, int> failures; // call: code
cudaError_t last = cudaSuccess;
long long alive = 0, memory = 0;

int failure(const std::string& call)
{
    const auto found = failures.find(call);
    return found == failures.end() ? 0 : found->second;
}
cudaError_t answer(const char* call)
{
    if (standin::sticky != 0) { return last = static_cast<cudaError_t>(standin::sticky); }
    return static_cast<cudaError_t>(failure(call));
}
cublasStatus_t blas(const char* call, bool sound = true)
{
    if (standin::sticky != 0) {
        last = static_cast<cudaError_t>(standin::sticky);
        return CUBLAS_STATUS_EXECUTION_FAILED;
    }
    return sound ? static_cast<cublasStatus_t>(failure(call)) : CUBLAS_STATUS_INVALID_VALUE;
}
cusolverStatus_t solver(const char* call, bool sound = true)
{
    if (standin::sticky != 0) {
        last = static_cast<cudaError_t>(standin::sticky);
        return CUSOLVER_STATUS_EXECUTION_FAILED;
    }
    return sound ? static_cast<cusolverStatus_t>(failure(call)) : CUSOLVER_STATUS_INVALID_VALUE;
}

/// All of the work space is written: who gives too little, or relies on it, is found out.
template <class T>
void spoil(T* work, std::size_t size)
{
    std::fill_n(work, size, std::numeric_limits<T>::quiet_NaN());
}

/// op(A)(i, j) of a column-major matrix.
template <class T>
double at(const T* a, std::int64_t ld, cublasOperation_t op, std::int64_t i, std::int64_t j)
{
    return static_cast<double>(op == CUBLAS_OP_N ? a[i + j * ld] : a[j + i * ld]);
}

template <class T>
cublasStatus_t gemm(cublasOperation_t ta, cublasOperation_t tb, std::int64_t m, std::int64_t n, std::int64_t k, T alpha,
    const T* a, std::int64_t lda, const T* b, std::int64_t ldb, T beta, T* c, std::int64_t ldc)
{
    const bool sound = lda >= std::max<std::int64_t>(1, ta == CUBLAS_OP_N ? m : k)
        && ldb >= std::max<std::int64_t>(1, tb == CUBLAS_OP_N ? k : n) && ldc >= std::max<std::int64_t>(1, m);
    if (const auto status = blas("cublasGemm", sound)) { return status; }
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t i = 0; i < m; ++i) {
            double sum = 0;
            for (std::int64_t p = 0; p < k; ++p) { sum += at(a, lda, ta, i, p) * at(b, ldb, tb, p, j); }
            c[i + j * ldc] = static_cast<T>(static_cast<double>(alpha) * sum
                + (beta == T(0) ? 0.0 : static_cast<double>(beta) * static_cast<double>(c[i + j * ldc])));
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

template <class T>
cublasStatus_t geam(cublasOperation_t ta, cublasOperation_t tb, std::int64_t m, std::int64_t n, T alpha, const T* a,
    std::int64_t lda, T beta, const T* b, std::int64_t ldb, T* c, std::int64_t ldc)
{
    const bool sound = lda >= std::max<std::int64_t>(1, ta == CUBLAS_OP_N ? m : n)
        && ldb >= std::max<std::int64_t>(1, tb == CUBLAS_OP_N ? m : n) && ldc >= std::max<std::int64_t>(1, m) && a != c;
    if (const auto status = blas("cublasGeam", sound)) { return status; }
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t i = 0; i < m; ++i) {
            c[i + j * ldc] = static_cast<T>(static_cast<double>(alpha) * at(a, lda, ta, i, j)
                + (beta == T(0) ? 0.0 : static_cast<double>(beta) * at(b, ldb, tb, i, j)));
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

template <class T>
cublasStatus_t dgmm(cublasSideMode_t side, std::int64_t m, std::int64_t n, const T* a, std::int64_t lda, const T* x,
    std::int64_t step, T* c, std::int64_t ldc)
{
    if (const auto status =
            blas("cublasDgmm", lda >= std::max<std::int64_t>(1, m) && ldc >= std::max<std::int64_t>(1, m))) {
        return status;
    }
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t i = 0; i < m; ++i) {
            c[i + j * ldc] = a[i + j * lda] * x[step * (side == CUBLAS_SIDE_LEFT ? i : j)];
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

template <class T>
cublasStatus_t nrm2(cublasHandle_t handle, std::int64_t n, const T* x, std::int64_t step, T* result)
{
    if (const auto status = blas("cublasNrm2", handle->mode == CUBLAS_POINTER_MODE_DEVICE)) { return status; }
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) { sum += static_cast<double>(x[i * step]) * static_cast<double>(x[i * step]); }
    *result = static_cast<T>(std::sqrt(sum));
    return CUBLAS_STATUS_SUCCESS;
}

template <class T>
cublasStatus_t iamax(cublasHandle_t handle, int n, const T* x, int step, int* result)
{
    if (const auto status = blas("cublasIamax", handle->mode == CUBLAS_POINTER_MODE_DEVICE)) { return status; }
    int best = 0;
    for (int i = 1; i < n; ++i) {
        if (std::abs(x[std::int64_t{i} * step]) > std::abs(x[std::int64_t{best} * step])) { best = i; }
    }
    *result = best + 1;
    return CUBLAS_STATUS_SUCCESS;
}

// LAPACK's Householder QR: H = I − tau·v·vᵀ, v(j) = 1, the rest of v below the diagonal.
constexpr int qr_work = 17;
template <class T>
cusolverStatus_t geqrf(int m, int n, T* a, int lda, T* tau, T* work, int size, int* info)
{
    if (const auto status = solver("cusolverDnGeqrf", lda >= std::max(1, m) && size >= qr_work)) { return status; }
    spoil(work, static_cast<std::size_t>(size));
    *info = 0;
    const auto entry = [&](int i, int j) -> T& { return a[i + std::int64_t{j} * lda]; };
    for (int j = 0; j < std::min(m, n); ++j) {
        double norm = 0;
        for (int i = j; i < m; ++i) { norm += static_cast<double>(entry(i, j)) * static_cast<double>(entry(i, j)); }
        norm = std::sqrt(norm);
        tau[j] = 0;
        if (norm == 0) { continue; }
        const double alpha = entry(j, j), beta = alpha >= 0 ? -norm : norm;
        tau[j] = static_cast<T>((beta - alpha) / beta);
        for (int i = j + 1; i < m; ++i) { entry(i, j) = static_cast<T>(entry(i, j) / (alpha - beta)); }
        entry(j, j) = static_cast<T>(beta);
        for (int k = j + 1; k < n; ++k) {
            double sum = entry(j, k);
            for (int i = j + 1; i < m; ++i) {
                sum += static_cast<double>(entry(i, j)) * static_cast<double>(entry(i, k));
            }
            sum *= tau[j];
            entry(j, k) = static_cast<T>(entry(j, k) - sum);
            for (int i = j + 1; i < m; ++i) { entry(i, k) = static_cast<T>(entry(i, k) - sum * entry(i, j)); }
        }
    }
    return CUSOLVER_STATUS_SUCCESS;
}
template <class T>
cusolverStatus_t orgqr(int m, int n, int k, T* a, int lda, const T* tau, T* work, int size, int* info)
{
    if (const auto status = solver("cusolverDnOrgqr", lda >= std::max(1, m) && n <= m && k <= n && size >= qr_work)) {
        return status;
    }
    spoil(work, static_cast<std::size_t>(size));
    *info = 0;
    std::vector<double> q(static_cast<std::size_t>(m) * static_cast<std::size_t>(n));
    for (int j = 0; j < n; ++j) {
        double* const x = q.data() + std::int64_t{j} * m;
        x[j] = 1;
        for (int r = k; r-- > 0;) {
            double sum = x[r];
            for (int i = r + 1; i < m; ++i) { sum += static_cast<double>(a[i + std::int64_t{r} * lda]) * x[i]; }
            sum *= tau[r];
            x[r] -= sum;
            for (int i = r + 1; i < m; ++i) { x[i] -= sum * a[i + std::int64_t{r} * lda]; }
        }
    }
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < m; ++i) {
            a[i + std::int64_t{j} * lda] = static_cast<T>(q[static_cast<std::size_t>(i + std::int64_t{j} * m)]);
        }
    }
    return CUSOLVER_STATUS_SUCCESS;
}

/// A = u·σ·vᵀ by plane rotations of the columns, m ≥ n; full orthonormal u (m×m) where asked for. False for NaN.
bool rotations(int m, int n, std::vector<double> a, std::vector<double>& u, std::vector<double>& sigma,
    std::vector<double>& v, int u_columns)
{
    const auto dot = [](const double* x, const double* y, int size) { return std::inner_product(x, x + size, y, 0.0); };
    if (!std::all_of(a.begin(), a.end(), [](double x) { return std::isfinite(x); })) { return false; }
    v.assign(static_cast<std::size_t>(n) * static_cast<std::size_t>(n), 0);
    for (int j = 0; j < n; ++j) { v[static_cast<std::size_t>(j * n + j)] = 1; }
    for (int sweep = 0; sweep < 40; ++sweep) {
        bool turned = false;
        for (int p = 0; p < n; ++p) {
            for (int q = p + 1; q < n; ++q) {
                double *const x = &a[static_cast<std::size_t>(p) * m], *const y = &a[static_cast<std::size_t>(q) * m];
                const double xx = dot(x, x, m), yy = dot(y, y, m), xy = dot(x, y, m);
                if (xy == 0 || std::abs(xy) <= 1e-15 * std::sqrt(xx * yy)) { continue; }
                turned = true;
                const double angle = 0.5 * std::atan2(2 * xy, xx - yy), c = std::cos(angle), s = std::sin(angle);
                const auto turn = [&](double* left, double* right, int size) {
                    for (int i = 0; i < size; ++i) {
                        const double l = left[i], r = right[i];
                        left[i] = c * l + s * r;
                        right[i] = c * r - s * l;
                    }
                };
                turn(x, y, m);
                turn(&v[static_cast<std::size_t>(p) * n], &v[static_cast<std::size_t>(q) * n], n);
            }
        }
        if (!turned) { break; }
    }
    std::vector<int> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::vector<double> length(order.size());
    for (int j = 0; j < n; ++j) {
        length[static_cast<std::size_t>(j)] =
            std::sqrt(dot(&a[static_cast<std::size_t>(j) * m], &a[static_cast<std::size_t>(j) * m], m));
    }
    std::stable_sort(order.begin(), order.end(),
        [&](int x, int y) { return length[static_cast<std::size_t>(x)] > length[static_cast<std::size_t>(y)]; });
    u.assign(static_cast<std::size_t>(m) * static_cast<std::size_t>(u_columns), 0);
    sigma.assign(order.size(), 0);
    std::vector<double> sorted(v.size());
    for (int j = 0; j < n; ++j) {
        const auto from = static_cast<std::size_t>(order[static_cast<std::size_t>(j)]);
        sigma[static_cast<std::size_t>(j)] = length[from];
        std::copy_n(&v[from * static_cast<std::size_t>(n)], n, &sorted[static_cast<std::size_t>(j) * n]);
    }
    v = sorted;
    for (int j = 0; j < u_columns; ++j) { // beyond the rank: unit vectors made orthogonal
        double* const x = &u[static_cast<std::size_t>(j) * m];
        const bool known = j < n && sigma[static_cast<std::size_t>(j)] > 1e-14 * sigma[0];
        for (int pick = 0;; ++pick) {
            std::fill_n(x, m, 0.0);
            if (known) {
                const double* const column = &a[static_cast<std::size_t>(order[static_cast<std::size_t>(j)]) * m];
                for (int i = 0; i < m; ++i) { x[i] = column[i] / sigma[static_cast<std::size_t>(j)]; }
                break;
            }
            x[pick] = 1;
            for (int twice = 0; twice < 2; ++twice) {
                for (int k = 0; k < j; ++k) {
                    const double along = dot(&u[static_cast<std::size_t>(k) * m], x, m);
                    for (int i = 0; i < m; ++i) {
                        x[i] -= along * u[static_cast<std::size_t>(k) * m + static_cast<std::size_t>(i)];
                    }
                }
            }
            const double norm = std::sqrt(dot(x, x, m));
            if (norm > 0.1 / std::sqrt(m)) {
                for (int i = 0; i < m; ++i) { x[i] /= norm; }
                break;
            }
        }
    }
    return true;
}

/// Any shape: u m×u_columns, v n×v_columns. False, with NaN everywhere, for an input of NaN.
template <class T>
bool svd(int m, int n, const T* a, std::int64_t lda, T* sigma, T* u, std::int64_t ldu, int u_columns, T* v,
    std::int64_t ldv, int v_columns)
{
    const bool wide = m < n;
    const int tall = wide ? n : m, thin = wide ? m : n;
    std::vector<double> x(static_cast<std::size_t>(m) * static_cast<std::size_t>(n)), left, values, right;
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < m; ++i) {
            x[static_cast<std::size_t>(wide ? j + std::int64_t{i} * n : i + std::int64_t{j} * m)] = a[i + j * lda];
        }
    }
    const bool sound = rotations(tall, thin, x, left, values, right, wide ? v_columns : u_columns);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const std::vector<double>&from_u = wide ? right : left, &from_v = wide ? left : right;
    for (int k = 0; k < thin; ++k) { sigma[k] = static_cast<T>(sound ? values[static_cast<std::size_t>(k)] : nan); }
    for (int k = 0; k < u_columns; ++k) {
        for (int i = 0; i < m; ++i) {
            u[i + k * ldu] = static_cast<T>(sound ? from_u[static_cast<std::size_t>(i + k * m)] : nan);
        }
    }
    for (int k = 0; k < v_columns; ++k) {
        for (int i = 0; i < n; ++i) {
            v[i + k * ldv] = static_cast<T>(sound ? from_v[static_cast<std::size_t>(i + k * n)] : nan);
        }
    }
    return sound;
}

constexpr int svd_work = 23;
template <class T>
cusolverStatus_t gesvd(signed char ju, signed char jv, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* vt,
    int ldvt, T* work, int size, T*, int* info)
{
    const bool sound = ju == 'S' && jv == 'S' && m >= n && lda >= m && ldu >= m && ldvt >= n && size >= svd_work;
    if (const auto status = solver("cusolverDnGesvd", sound)) { return status; }
    spoil(work, static_cast<std::size_t>(size));
    std::vector<T> v(static_cast<std::size_t>(n) * static_cast<std::size_t>(n));
    const bool converged = svd(m, n, a, lda, s, u, ldu, n, v.data(), n, n);
    for (int j = 0; j < n; ++j) {
        for (int i = 0; i < n; ++i) { vt[i + std::int64_t{j} * ldvt] = v[static_cast<std::size_t>(j + i * n)]; }
    }
    *info = failure("gesvd:info") ? failure("gesvd:info") : (converged ? 0 : 1);
    for (int j = 0; j < n; ++j) { spoil(a + std::int64_t{j} * lda, static_cast<std::size_t>(m)); }
    return CUSOLVER_STATUS_SUCCESS;
}
template <class T>
cusolverStatus_t gesvdj(int econ, int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v, int ldv, T* work, int size,
    int* info, gesvdjInfo_t settings)
{
    if (const auto status =
            solver("cusolverDnGesvdj", econ == 1 && settings && lda >= m && ldu >= m && ldv >= n && size >= svd_work)) {
        return status;
    }
    spoil(work, static_cast<std::size_t>(size));
    const int k = std::min(m, n);
    const bool converged = svd(m, n, a, lda, s, u, ldu, k, v, ldv, k) && !failure("gesvdj:info");
    *info = converged ? 0 : k + 1;
    if (!converged) { spoil(s, static_cast<std::size_t>(k)); }
    for (int j = 0; j < n; ++j) { spoil(a + std::int64_t{j} * lda, static_cast<std::size_t>(m)); }
    return CUSOLVER_STATUS_SUCCESS;
}
template <class T>
cusolverStatus_t gesvdj_batched(int m, int n, T* a, int lda, T* s, T* u, int ldu, T* v, int ldv, T* work, int size,
    int* info, gesvdjInfo_t settings, int batch)
{
    const bool sound = settings && m <= 32 && n <= 32 && lda == m && ldu == m && ldv == n && size >= svd_work * batch;
    if (const auto status = solver("cusolverDnGesvdjBatched", sound)) { return status; }
    ++standin::batches;
    spoil(work, static_cast<std::size_t>(size));
    for (int i = 0; i < batch; ++i) { // u is m×m, v n×n
        const bool converged = svd(m, n, a + std::int64_t{i} * lda * n, lda, s + std::int64_t{i} * std::min(m, n),
            u + std::int64_t{i} * ldu * m, ldu, m, v + std::int64_t{i} * ldv * n, ldv, n);
        info[i] = converged && !(i == 1 && failure("gesvdjBatched:info")) ? 0 : std::min(m, n) + 1;
        if (info[i]) { spoil(s + std::int64_t{i} * std::min(m, n), static_cast<std::size_t>(std::min(m, n))); }
    }
    return CUSOLVER_STATUS_SUCCESS;
}
template <class T>
cusolverStatus_t gesvda_batched(int rank, int m, int n, const T* a, int lda, long long step_a, T* s, long long step_s,
    T* u, int ldu, long long step_u, T* v, int ldv, long long step_v, T* work, int size, int* info, double* residual,
    int batch)
{
    const bool sound = m >= n && rank == n && lda >= m && ldu >= m && ldv >= n && residual && size >= svd_work;
    if (const auto status = solver("cusolverDnGesvdaStridedBatched", sound)) { return status; }
    spoil(work, static_cast<std::size_t>(size));
    for (int i = 0; i < batch; ++i) {
        info[i] =
            svd(m, n, a + i * step_a, lda, s + i * step_s, u + i * step_u, ldu, n, v + i * step_v, ldv, n) ? 0 : n + 1;
        residual[i] = 0;
    }
    return CUSOLVER_STATUS_SUCCESS;
}

template <class T>
cusolverStatus_t potrf(cublasFillMode_t fill, int n, T* a, int lda, T* work, int size, int* info)
{
    if (const auto status = solver("cusolverDnPotrf", fill == CUBLAS_FILL_MODE_LOWER && lda >= n && size >= 1)) {
        return status;
    }
    spoil(work, static_cast<std::size_t>(size));
    *info = 0;
    for (int j = 0; j < n; ++j) {
        for (int i = j; i < n; ++i) {
            double sum = a[i + std::int64_t{j} * lda];
            for (int k = 0; k < j; ++k) {
                sum -= static_cast<double>(a[i + std::int64_t{k} * lda])
                    * static_cast<double>(a[j + std::int64_t{k} * lda]);
            }
            if (i == j && !(sum > 0)) {
                *info = j + 1;
                return CUSOLVER_STATUS_SUCCESS;
            }
            a[i + std::int64_t{j} * lda] = static_cast<T>(i == j ? std::sqrt(sum) : sum / a[j + std::int64_t{j} * lda]);
        }
    }
    return CUSOLVER_STATUS_SUCCESS;
}
template <class T>
cusolverStatus_t potrs(cublasFillMode_t fill, int n, int columns, const T* a, int lda, T* b, int ldb, int* info)
{
    if (const auto status = solver("cusolverDnPotrs", fill == CUBLAS_FILL_MODE_LOWER && lda >= n && ldb >= n)) {
        return status;
    }
    *info = 0;
    for (int c = 0; c < columns; ++c) {
        T* const x = b + std::int64_t{c} * ldb;
        for (int i = 0; i < n; ++i) {
            double sum = x[i];
            for (int k = 0; k < i; ++k) {
                sum -= static_cast<double>(a[i + std::int64_t{k} * lda]) * static_cast<double>(x[k]);
            }
            x[i] = static_cast<T>(sum / a[i + std::int64_t{i} * lda]);
        }
        for (int i = n; i-- > 0;) {
            double sum = x[i];
            for (int k = i + 1; k < n; ++k) {
                sum -= static_cast<double>(a[k + std::int64_t{i} * lda]) * static_cast<double>(x[k]);
            }
            x[i] = static_cast<T>(sum / a[i + std::int64_t{i} * lda]);
        }
    }
    return CUSOLVER_STATUS_SUCCESS;
}

template <class H>
int create(H** handle)
{
    *handle = new H{};
    ++alive;
    return 0;
}
template <class H>
int destroy(H* handle)
{
    delete handle;
    --alive;
    return 0;
}

float widened(std::uint16_t word, bool bfloat)
{
    if (bfloat) {
        const std::uint32_t bits = std::uint32_t{word} << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    const int exponent = word >> 10 & 31;
    const float fraction = static_cast<float>(word & 1023) / 1024, sign = word >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return fraction != 0 ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
    }
    return sign * (exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1 + fraction, exponent - 15));
}

} // namespace

namespace standin {
int sticky = 0;
int batches = 0;
void fail(const std::string& call, int code)
{
    failures[call] = code;
}
void repair()
{
    failures.clear();
    sticky = 0;
    last = cudaSuccess;
}
long long handles()
{
    return alive;
}
long long bytes()
{
    return memory;
}
} // namespace standin

extern "C" {

// ---- CUDA runtime ----
cudaError_t cudaGetDeviceCount(int* count)
{
    *count = failure("cudaGetDeviceCount") ? 0 : 1;
    return answer("cudaGetDeviceCount");
}
const char* cudaGetErrorName(cudaError_t code)
{
    return code == cudaErrorMemoryAllocation  ? "cudaErrorMemoryAllocation"
        : code == cudaErrorNoDevice           ? "cudaErrorNoDevice"
        : code == cudaErrorInsufficientDriver ? "cudaErrorInsufficientDriver"
        : code == cudaErrorIllegalAddress     ? "cudaErrorIllegalAddress"
                                              : "cudaError";
}
const char* cudaGetErrorString(cudaError_t)
{
    return "in CUDA's words";
}
cudaError_t cudaGetLastError()
{
    return cudaPeekAtLastError();
}
cudaError_t cudaPeekAtLastError()
{
    return standin::sticky ? static_cast<cudaError_t>(standin::sticky) : last;
}
cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    return answer("cudaStreamSynchronize");
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    const auto code = answer("cudaMemcpyAsync");
    if (code == cudaSuccess) { std::memmove(to, from, bytes); }
    return code;
}
cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch,
    std::size_t width, std::size_t height, cudaMemcpyKind, cudaStream_t)
{
    if (height > 1 && (width > to_pitch || width > from_pitch)) { return cudaErrorInvalidPitchValue; }
    for (std::size_t i = 0; i < height; ++i) {
        std::memmove(static_cast<char*>(to) + i * to_pitch, static_cast<const char*>(from) + i * from_pitch, width);
    }
    return answer("cudaMemcpy2DAsync");
}
cudaError_t cudaMemsetAsync(void* place, int value, std::size_t bytes, cudaStream_t)
{
    std::memset(place, value, bytes);
    return answer("cudaMemsetAsync");
}
cudaError_t cudaMallocAsync(void** place, std::size_t bytes, cudaStream_t)
{
    if (const auto code = answer("cudaMallocAsync"); code != cudaSuccess) { return code; }
    auto* const block = static_cast<std::size_t*>(std::malloc(bytes + 256));
    *block = bytes;
    memory += static_cast<long long>(bytes);
    *place = reinterpret_cast<char*>(block) + 256;
    std::memset(*place, 0xff, bytes);
    return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* place, cudaStream_t)
{
    auto* const block = reinterpret_cast<std::size_t*>(static_cast<char*>(place) - 256);
    memory -= static_cast<long long>(*block);
    std::free(block);
    return cudaSuccess;
}

// ---- cuBLAS ----
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle)
{
    if (const auto status = blas("cublasCreate")) { return status; }
    return static_cast<cublasStatus_t>(create(handle));
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle)
{
    return static_cast<cublasStatus_t>(destroy(handle));
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t, cudaStream_t)
{
    return blas("cublasSetStream");
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void* place, std::size_t)
{
    return blas("cublasSetWorkspace", place != nullptr);
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode)
{
    handle->mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}
const char* cublasGetStatusName(cublasStatus_t status)
{
    return status == CUBLAS_STATUS_ALLOC_FAILED    ? "CUBLAS_STATUS_ALLOC_FAILED"
        : status == CUBLAS_STATUS_NOT_INITIALIZED  ? "CUBLAS_STATUS_NOT_INITIALIZED"
        : status == CUBLAS_STATUS_ARCH_MISMATCH    ? "CUBLAS_STATUS_ARCH_MISMATCH"
        : status == CUBLAS_STATUS_EXECUTION_FAILED ? "CUBLAS_STATUS_EXECUTION_FAILED"
        : status == CUBLAS_STATUS_INVALID_VALUE    ? "CUBLAS_STATUS_INVALID_VALUE"
                                                   : "CUBLAS_STATUS";
}
cublasStatus_t cublasGemmEx_64(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, std::int64_t m,
    std::int64_t n, std::int64_t k, const void* alpha, const void* a, cudaDataType a_type, std::int64_t lda,
    const void* b, cudaDataType b_type, std::int64_t ldb, const void* beta, void* c, cudaDataType c_type,
    std::int64_t ldc, cublasComputeType_t compute, cublasGemmAlgo_t)
{
    const bool bfloat = a_type == CUDA_R_16BF;
    const bool sound = (bfloat || a_type == CUDA_R_16F) && a_type == b_type && c_type == CUDA_R_32F
        && compute == CUBLAS_COMPUTE_32F && ta == CUBLAS_OP_N && tb == CUBLAS_OP_N && lda >= m && ldb >= k && ldc >= m;
    if (const auto status = blas("cublasGemmEx", sound)) { return status; }
    std::vector<float> x(static_cast<std::size_t>(m * k)), y(static_cast<std::size_t>(k * n));
    const auto *const from_a = static_cast<const std::uint16_t*>(a),
                      *const from_b = static_cast<const std::uint16_t*>(b);
    for (std::int64_t j = 0; j < k; ++j) {
        for (std::int64_t i = 0; i < m; ++i) {
            x[static_cast<std::size_t>(i + j * m)] = widened(from_a[i + j * lda], bfloat);
        }
    }
    for (std::int64_t j = 0; j < n; ++j) {
        for (std::int64_t i = 0; i < k; ++i) {
            y[static_cast<std::size_t>(i + j * k)] = widened(from_b[i + j * ldb], bfloat);
        }
    }
    return gemm<float>(ta, tb, m, n, k, *static_cast<const float*>(alpha), x.data(), m, y.data(), k,
        *static_cast<const float*>(beta), static_cast<float*>(c), ldc);
}

// ---- cuSOLVER ----
cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle)
{
    if (const auto status = solver("cusolverDnCreate")) { return status; }
    return static_cast<cusolverStatus_t>(create(handle));
}
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle)
{
    return static_cast<cusolverStatus_t>(destroy(handle));
}
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t, cudaStream_t)
{
    return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnCreateGesvdjInfo(gesvdjInfo_t* info)
{
    return static_cast<cusolverStatus_t>(create(info));
}
cusolverStatus_t cusolverDnDestroyGesvdjInfo(gesvdjInfo_t info)
{
    return static_cast<cusolverStatus_t>(destroy(info));
}
cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* params)
{
    return static_cast<cusolverStatus_t>(create(params));
}
cusolverStatus_t cusolverDnDestroyParams(cusolverDnParams_t params)
{
    return static_cast<cusolverStatus_t>(destroy(params));
}

#define FOR_TYPE(L, l, T)                                                                                              \
    cublasStatus_t cublas##L##gemm_v2_64(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, std::int64_t m,   \
        std::int64_t n, std::int64_t k, const T* alpha, const T* a, std::int64_t lda, const T* b, std::int64_t ldb,    \
        const T* beta, T* c, std::int64_t ldc)                                                                         \
    {                                                                                                                  \
        return gemm<T>(ta, tb, m, n, k, *alpha, a, lda, b, ldb, *beta, c, ldc);                                        \
    }                                                                                                                  \
    cublasStatus_t cublas##L##geam_64(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, std::int64_t m,      \
        std::int64_t n, const T* alpha, const T* a, std::int64_t lda, const T* beta, const T* b, std::int64_t ldb,     \
        T* c, std::int64_t ldc)                                                                                        \
    {                                                                                                                  \
        return geam<T>(ta, tb, m, n, *alpha, a, lda, *beta, b, ldb, c, ldc);                                           \
    }                                                                                                                  \
    cublasStatus_t cublas##L##dgmm_64(cublasHandle_t, cublasSideMode_t side, std::int64_t m, std::int64_t n,           \
        const T* a, std::int64_t lda, const T* x, std::int64_t step, T* c, std::int64_t ldc)                           \
    {                                                                                                                  \
        return dgmm<T>(side, m, n, a, lda, x, step, c, ldc);                                                           \
    }                                                                                                                  \
    cublasStatus_t cublas##L##nrm2_v2_64(cublasHandle_t h, std::int64_t n, const T* x, std::int64_t step, T* result)   \
    {                                                                                                                  \
        return nrm2<T>(h, n, x, step, result);                                                                         \
    }                                                                                                                  \
    cublasStatus_t cublasI##l##amax_v2(cublasHandle_t h, int n, const T* x, int step, int* result)                     \
    {                                                                                                                  \
        return iamax<T>(h, n, x, step, result);                                                                        \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##geqrf_bufferSize(cusolverDnHandle_t, int, int, T*, int, int* size)                 \
    {                                                                                                                  \
        return *size = qr_work, CUSOLVER_STATUS_SUCCESS;                                                               \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##geqrf(                                                                             \
        cusolverDnHandle_t, int m, int n, T* a, int lda, T* tau, T* work, int size, int* info)                         \
    {                                                                                                                  \
        return geqrf<T>(m, n, a, lda, tau, work, size, info);                                                          \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##orgqr_bufferSize(                                                                  \
        cusolverDnHandle_t, int, int, int, const T*, int, const T*, int* size)                                         \
    {                                                                                                                  \
        return *size = qr_work, CUSOLVER_STATUS_SUCCESS;                                                               \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##orgqr(                                                                             \
        cusolverDnHandle_t, int m, int n, int k, T* a, int lda, const T* tau, T* work, int size, int* info)            \
    {                                                                                                                  \
        return orgqr<T>(m, n, k, a, lda, tau, work, size, info);                                                       \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##gesvd_bufferSize(cusolverDnHandle_t, int, int, int* size)                          \
    {                                                                                                                  \
        return *size = svd_work, CUSOLVER_STATUS_SUCCESS;                                                              \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##gesvd(cusolverDnHandle_t, signed char ju, signed char jv, int m, int n, T* a,      \
        int lda, T* s, T* u, int ldu, T* vt, int ldvt, T* work, int size, T* rest, int* info)                          \
    {                                                                                                                  \
        return gesvd<T>(ju, jv, m, n, a, lda, s, u, ldu, vt, ldvt, work, size, rest, info);                            \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##gesvdj_bufferSize(cusolverDnHandle_t, cusolverEigMode_t, int, int, int, const T*,  \
        int, const T*, const T*, int, const T*, int, int* size, gesvdjInfo_t)                                          \
    {                                                                                                                  \
        return *size = svd_work, CUSOLVER_STATUS_SUCCESS;                                                              \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##gesvdj(cusolverDnHandle_t, cusolverEigMode_t, int econ, int m, int n, T* a,        \
        int lda, T* s, T* u, int ldu, T* v, int ldv, T* work, int size, int* info, gesvdjInfo_t settings)              \
    {                                                                                                                  \
        return gesvdj<T>(econ, m, n, a, lda, s, u, ldu, v, ldv, work, size, info, settings);                           \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##gesvdjBatched_bufferSize(cusolverDnHandle_t, cusolverEigMode_t, int, int,          \
        const T*, int, const T*, const T*, int, const T*, int, int* size, gesvdjInfo_t, int batch)                     \
    {                                                                                                                  \
        return *size = svd_work * batch, CUSOLVER_STATUS_SUCCESS;                                                      \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##gesvdjBatched(cusolverDnHandle_t, cusolverEigMode_t, int m, int n, T* a, int lda,  \
        T* s, T* u, int ldu, T* v, int ldv, T* work, int size, int* info, gesvdjInfo_t settings, int batch)            \
    {                                                                                                                  \
        return gesvdj_batched<T>(m, n, a, lda, s, u, ldu, v, ldv, work, size, info, settings, batch);                  \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##gesvdaStridedBatched_bufferSize(cusolverDnHandle_t, cusolverEigMode_t, int, int,   \
        int, const T*, int, long long, const T*, long long, const T*, int, long long, const T*, int, long long,        \
        int* size, int)                                                                                                \
    {                                                                                                                  \
        return *size = svd_work, CUSOLVER_STATUS_SUCCESS;                                                              \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##gesvdaStridedBatched(cusolverDnHandle_t, cusolverEigMode_t, int rank, int m,       \
        int n, const T* a, int lda, long long sa, T* s, long long ss, T* u, int ldu, long long su, T* v, int ldv,      \
        long long sv, T* work, int size, int* info, double* residual, int batch)                                       \
    {                                                                                                                  \
        return gesvda_batched<T>(                                                                                      \
            rank, m, n, a, lda, sa, s, ss, u, ldu, su, v, ldv, sv, work, size, info, residual, batch);                 \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##potrf_bufferSize(cusolverDnHandle_t, cublasFillMode_t, int, T*, int, int* size)    \
    {                                                                                                                  \
        return *size = 5, CUSOLVER_STATUS_SUCCESS;                                                                     \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##potrf(                                                                             \
        cusolverDnHandle_t, cublasFillMode_t fill, int n, T* a, int lda, T* work, int size, int* info)                 \
    {                                                                                                                  \
        return potrf<T>(fill, n, a, lda, work, size, info);                                                            \
    }                                                                                                                  \
    cusolverStatus_t cusolverDn##L##potrs(                                                                             \
        cusolverDnHandle_t, cublasFillMode_t fill, int n, int columns, const T* a, int lda, T* b, int ldb, int* info)  \
    {                                                                                                                  \
        return potrs<T>(fill, n, columns, a, lda, b, ldb, info);                                                       \
    }
FOR_TYPE(S, s, float)
FOR_TYPE(D, d, double)

cusolverStatus_t cusolverDnXgesvdr_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, signed char, signed char,
    std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, cudaDataType, const void*, std::int64_t,
    cudaDataType, const void*, cudaDataType, const void*, std::int64_t, cudaDataType, const void*, std::int64_t,
    cudaDataType, std::size_t* on_device, std::size_t* on_host)
{
    *on_device = 64;
    *on_host = 32;
    return CUSOLVER_STATUS_SUCCESS;
}
cusolverStatus_t cusolverDnXgesvdr(cusolverDnHandle_t, cusolverDnParams_t, signed char ju, signed char jv,
    std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t p, std::int64_t, cudaDataType type, void* a,
    std::int64_t lda, cudaDataType, void* s, cudaDataType, void* u, std::int64_t ldu, cudaDataType, void* v,
    std::int64_t ldv, cudaDataType, void* on_device, std::size_t device_bytes, void* on_host, std::size_t host_bytes,
    int* info)
{
    const bool sound = ju == 'S' && jv == 'S' && k + p <= std::min(m, n) && lda >= m && ldu >= m && ldv >= n
        && device_bytes >= 64 && host_bytes >= 32;
    if (const auto status = solver("cusolverDnXgesvdr", sound)) { return status; }
    std::memset(on_device, 0xff, device_bytes);
    std::memset(on_host, 0xff, host_bytes);
    const auto exactly = [&]<class T>(T*) { // exact instead of randomized
        svd<T>(static_cast<int>(m), static_cast<int>(n), static_cast<T*>(a), lda, static_cast<T*>(s),
            static_cast<T*>(u), ldu, static_cast<int>(k), static_cast<T*>(v), ldv, static_cast<int>(k));
    };
    type == CUDA_R_32F ? exactly(static_cast<float*>(nullptr)) : exactly(static_cast<double*>(nullptr));
    *info = failure("gesvdr:info");
    return CUSOLVER_STATUS_SUCCESS;
}

} // extern "C"
