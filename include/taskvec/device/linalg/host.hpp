// The linear algebra seam (linalg/linalg.hpp) on a Thrust host system, whose device memory is host memory: Eigen
// answers.
// SPDX-License-Identifier: Apache-2.0
//
// Every name passes the same memory on to the CPU's version. Results have the CPU's bits and the CPU's bounds; what
// this is for is that the algorithms' device versions run wherever there is no device.
#pragma once

#include <taskvec/device/linalg/matrix.hpp>
#include <taskvec/linalg/eigen.hpp>

#if TASKVEC_ON_DEVICE
#error                                                                                                                 \
    "this header is for Thrust host systems (THRUST_DEVICE_SYSTEM); on a device include <taskvec/device/linalg/backend.hpp>"
#endif

#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

template <arithmetic_element T>
struct qr_factors<T, memory_space::device> : qr_factors<T, memory_space::host> { };

/// Nothing is kept between calls here: a context may be passed as on CUDA, and does nothing.
class gpu_context {
public:
    /// On the stream and with the allocator of `policy`.
    explicit gpu_context(const gpu& policy = {})
        : policy_{policy.stream, policy.allocator, this}
    { }
    gpu_context(const gpu_context&) = delete;
    gpu_context& operator=(const gpu_context&) = delete;
    /// A policy that names this context.
    [[nodiscard]] gpu policy() const noexcept { return policy_; }

private:
    gpu policy_;
};

template <>
inline constexpr bool has_linear_algebra<gpu> = true;

namespace detail {

/// The same memory, called host memory, which it is.
template <class T>
[[nodiscard]] matrix_view<T> here(device_matrix_view<T> x)
{
    return {x.data(), x.rows(), x.cols(), x.order(), x.stride()};
}

} // namespace detail

template <class Body>
decltype(auto) with_context(const gpu& policy, const Body& body)
{
    return body(policy);
}

template <arithmetic_element T>
[[nodiscard]] device_matrix<T> result_matrix(
    const gpu& policy, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
{
    return device_matrix<T>(policy, rows, cols, order);
}
template <arithmetic_element T>
[[nodiscard]] device_matrix<T> scratch_matrix(
    const gpu& policy, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
{
    return device_matrix<T>(policy, rows, cols, order);
}

template <arithmetic_element T>
void gemm(const gpu&, T alpha, std::type_identity_t<device_matrix_view<const T>> a,
    std::type_identity_t<device_matrix_view<const T>> b, std::type_identity_t<T> beta,
    std::type_identity_t<device_matrix_view<T>> c)
{
    gemm<T>(cpu{}, alpha, detail::here(a), detail::here(b), beta, detail::here(c));
}

template <arithmetic_element T>
void copy_matrix(
    const gpu&, std::type_identity_t<device_matrix_view<const T>> from, std::type_identity_t<device_matrix_view<T>> to)
{
    copy_matrix<T>(cpu{}, detail::here(from), detail::here(to));
}

template <arithmetic_element T>
void scale_columns(const gpu&, std::type_identity_t<device_matrix_view<const T>> x, std::span<const double> scale,
    std::type_identity_t<device_matrix_view<T>> out)
{
    scale_columns<T>(cpu{}, detail::here(x), scale, detail::here(out));
}

template <arithmetic_element T>
[[nodiscard]] double squared_norm(const gpu&, device_matrix_view<const T> a)
{
    return squared_norm<T>(cpu{}, detail::here(a));
}

template <arithmetic_element T>
void fill_normal(const gpu&, const random_stream& stream, device_matrix_view<T> a)
{
    fill_normal<T>(cpu{}, stream, detail::here(a));
}

template <storage_element T>
[[nodiscard]] device_matrix_view<const arithmetic_type<T>> in_arithmetic(
    const gpu& policy, device_matrix_view<const T> a, device_matrix<arithmetic_type<T>>& copy)
{
    if constexpr (arithmetic_element<T>) { return a; }
    else {
        matrix<float> wide;
        copy = to_device<float>(policy, in_arithmetic<T>(cpu{}, detail::here(a), wide));
        return std::as_const(copy).view();
    }
}

template <storage_element T>
void refuse_nonfinite(const gpu&, device_matrix_view<const T> a, std::string_view what)
{
    refuse_nonfinite<T>(cpu{}, detail::here(a), what);
}

template <arithmetic_element T>
[[nodiscard]] qr_factors<T, memory_space::device> factor_qr(
    const gpu&, std::type_identity_t<device_matrix_view<const T>> a, std::string_view what = "A")
{
    return {factor_qr<T>(cpu{}, detail::here(a), what)};
}

/// out = Q·x, as on the CPU.
template <arithmetic_element T>
void multiply_q(const gpu&, const qr_factors<T, memory_space::device>& f,
    std::type_identity_t<matrix_view<const double>> x, std::type_identity_t<device_matrix_view<T>> out)
{
    const qr_factors<T, memory_space::host>& same = f;
    multiply_q<T>(cpu{}, same, x, detail::here(out));
}

// The small square work is the CPU's: f64, in host matrices.
/// weight·a·b of small matrices: the CPU's.
template <int = 0>
[[nodiscard]] matrix<double> small_product(const gpu&, double weight, const matrix<double>& a, const matrix<double>& b)
{
    return small_product(cpu{}, weight, a, b);
}
/// The SVD of a small matrix: the CPU's.
template <int = 0>
[[nodiscard]] small_svd_result small_svd(const gpu&, matrix_view<const double> a)
{
    return small_svd(cpu{}, a);
}
/// The same for each of many.
template <int = 0>
[[nodiscard]] std::vector<small_svd_result> small_svds(
    const gpu&, const std::vector<matrix_view<const double>>& matrices)
{
    std::vector<small_svd_result> results;
    for (const auto& one : matrices) { results.push_back(small_svd(cpu{}, one)); }
    return results;
}
/// out = x·y, y small: as on the CPU.
template <arithmetic_element T>
void multiply_small(const gpu&, std::type_identity_t<device_matrix_view<const T>> x,
    std::type_identity_t<matrix_view<const double>> y, std::type_identity_t<device_matrix_view<T>> out)
{
    multiply_small<T>(cpu{}, detail::here(x), y, detail::here(out));
}

/// out = y, rounded to T.
template <arithmetic_element T>
void keep_small(
    const gpu&, std::type_identity_t<matrix_view<const double>> y, std::type_identity_t<device_matrix_view<T>> out)
{
    const auto to = detail::here(out);
    for (std::size_t j = 0; j < y.cols(); ++j) {
        for (std::size_t i = 0; i < y.rows(); ++i) { to(i, j) = static_cast<T>(y(i, j)); }
    }
}

template <arithmetic_element T>
[[nodiscard]] device_matrix<T> orthonormal_basis(
    const gpu& policy, std::type_identity_t<device_matrix_view<const T>> y, std::string_view what)
{
    return to_device<T>(policy, orthonormal_basis<T>(cpu{}, detail::here(y), what));
}

template <arithmetic_element T>
void orient(const gpu&, std::type_identity_t<device_matrix_view<T>> u, std::type_identity_t<device_matrix_view<T>> v)
{
    orient<T>(cpu{}, detail::here(u), detail::here(v));
}

// The symmetric solve is in f64, as on the CPU.
/// As on the CPU.
template <std::same_as<double> T>
[[nodiscard]] double factor_cholesky(const gpu&, device_matrix_view<T> g)
{
    return factor_cholesky(cpu{}, detail::here(g));
}
/// As on the CPU.
template <std::same_as<double> T>
void solve_cholesky(const gpu&, std::type_identity_t<device_matrix_view<const T>> l, device_matrix_view<T> b)
{
    solve_cholesky(cpu{}, detail::here(l), detail::here(b));
}
/// As on the CPU.
template <std::same_as<double> T>
[[nodiscard]] bool cholesky_solve(
    const gpu&, std::type_identity_t<device_matrix_view<const T>> g, device_matrix_view<T> b)
{
    return cholesky_solve(cpu{}, detail::here(g), detail::here(b));
}

template <class Body>
void for_each_piece(const gpu& policy, std::size_t count, const Body& body)
{
    for (std::size_t index = 0; index < count; ++index) { body(policy, index); }
}

template <arithmetic_element T>
[[nodiscard]] constexpr double cancellation_limit(const gpu&)
{
    return cancellation_limit<T>(cpu{});
}

static_assert(check_linear_algebra<gpu, float>() && check_linear_algebra<gpu, double>());

} // namespace taskvec::inline TASKVEC_ABI
