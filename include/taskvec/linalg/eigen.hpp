// The linear algebra seam (linalg/linalg.hpp) on the CPU: Eigen's products and Cholesky, and loops of our own.
// SPDX-License-Identifier: Apache-2.0
//
// Tall matrices are in the caller's precision; the small square work (triangular factors, cores) is always in f64, so
// there is one instantiation of it and f32 data loses nothing to it. Including this is cheap: Eigen's Cholesky is the
// only decomposition, and everything is a template (some only in name) so that nothing is compiled before it is called.
#pragma once

#include <taskvec/compiled/linalg.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/matrix.hpp>
#include <taskvec/core/parallel.hpp>
#include <taskvec/core/policy.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/linalg/linalg.hpp>

#if !__has_include(<Eigen/Core>)
#error "this header of taskvec needs Eigen 3.4 or later (Debian: libeigen3-dev, with -I /usr/include/eigen3)"
#include "taskvec: the error above ends the compilation"
#endif
#include <Eigen/Cholesky>
#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <numeric>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace taskvec::inline TASKVEC_ABI {

template <>
inline constexpr bool has_linear_algebra<cpu> = true;

/// C = alpha·A·B + beta·C.
/// A is m×k, B k×n, C m×n, each in either order; C may not overlap A or B. f32 or f64; every entry is a sum in that
/// type whose order depends on the shapes alone, so the bits do not depend on the number of threads. Throws
/// shape_mismatch. Cost: 2·m·n·k flops.
///
///     gemm(cpu{}, 1.0f, a.view(), b.view(), 0.0f, c.view());
template <arithmetic_element T>
void gemm(const cpu& policy, T alpha, std::type_identity_t<matrix_view<const T>> a,
    std::type_identity_t<matrix_view<const T>> b, std::type_identity_t<T> beta, std::type_identity_t<matrix_view<T>> c);

/// ‖A‖²_F in f64: blocks of fixed size added in order, so the bits do not depend on threads. Relative error ≤ 1e-14
/// (f64 input: unless squares overflow). Cost: one read of A.
template <arithmetic_element T>
[[nodiscard]] double squared_norm(const cpu& policy, matrix_view<const T> a);

/// Standard normal numbers: entry (i, j) is stream.normal(j·rows + i), whatever the order and the number of threads.
template <arithmetic_element T>
void fill_normal(const cpu& policy, const random_stream& stream, matrix_view<T> a);

template <arithmetic_element T>
struct qr_factors<T, memory_space::host> {
    matrix<double> r; ///< k×n

    // How Q is kept: A·inverse (A as given), the matrix itself, or Householder reflectors. An identity needs nothing.
    enum class form : std::uint8_t { scaled, stored, reflectors, identity };
    form kept = form::identity;
    matrix_view<const T> a{};
    matrix<double> q{}; ///< scaled: n×k with Q = A·q; stored: m×k; reflectors: m×k below the diagonal
    matrix<double> tau{}; ///< k×1
};

/// The thin QR of an m×n matrix A, either order; `what` names it in errors.
/// f32 data is factored through its f64 Gram matrix while that is safe (unit-length columns with κ up to 3000), by
/// Cholesky-QR twice (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015) up to κ = 10⁶, and otherwise, or when columns
/// depend on each other, by Householder reflections; always in f64. ‖QᵀQ − I‖ and ‖A − QR‖/‖A‖ stay below 1e-8 for f32
/// data and below n·1e-15 for f64. A wide A (m ≤ n) has Q = I and R = A. Throws nonfinite_error. The factors lie in
/// memory of the policy's resource. Cost: m·n² flops on the first road.
template <arithmetic_element T>
[[nodiscard]] qr_factors<T> factor_qr(
    const cpu& policy, std::type_identity_t<matrix_view<const T>> a, std::string_view what = "A");

/// out = Q·X for the Q of factor_qr(): X is k×p in f64, out m×p. Cost: 2·m·k·p flops.
template <arithmetic_element T>
void multiply_q(const cpu& policy, const qr_factors<T>& f, std::type_identity_t<matrix_view<const double>> x,
    std::type_identity_t<matrix_view<T>> out);

/// The SVD of a small f64 matrix by one-sided Jacobi rotations (Hestenes 1958; de Rijk 1989 for the pivoting).
/// σ to about n·ε·σ₁, u and v orthonormal to n·ε; values below ε·σ₁ count as zero and their u completes a basis. Signs
/// are left as they fall. Throws nonfinite_error. u and v lie in memory of the policy's resource. Cost: about 6·m·n²
/// flops a sweep, 4 to 9 sweeps: meant for n up to a few hundred.
template <int = 0>
[[nodiscard]] small_svd_result small_svd(const cpu& policy, matrix_view<const double> a);

/// Turns the signs of matching columns of u and v so that the entry of largest magnitude of each u is positive (the
/// first one among equals): results then compare across backends and runs.
template <arithmetic_element T>
void orient(const cpu&, std::type_identity_t<matrix_view<T>> u, std::type_identity_t<matrix_view<T>> v);

/// G = L·Lᵀ for a symmetric positive definite G (n×n, f64): L replaces the lower triangle of a column-major G, the
/// upper one is left alone. Returns the least L(i, i)²/G(i, i), the share of its square that a variable does not owe to
/// those before it: near rounding (n·1e-16) G is singular for all purposes, and 0, with G unspecified, says that it is
/// not positive definite. Cost: n³/3 flops.
template <int = 0>
[[nodiscard]] double factor_cholesky(const cpu&, matrix_view<double> g);

/// X with L·Lᵀ·X = B, in place of B (n×p, either order), for the L of factor_cholesky(). Cost: 2·n²·p flops, by pieces
/// of columns in parallel.
template <int = 0>
void solve_cholesky(const cpu& policy, matrix_view<const double> l, matrix_view<double> b);

/// Solves G·X = B for a symmetric positive definite G (n×n, f64) and B (n×p), in place of B, by Cholesky. False, with B
/// unspecified, where G is not numerically positive definite. Cost: n³/3 + 2·n²·p flops, and a copy of G.
template <int = 0>
[[nodiscard]] bool cholesky_solve(const cpu& policy, matrix_view<const double> g, matrix_view<double> b);

// What the algorithms need besides: matrices of the policy's memory, and moves between them.

/// A zero matrix that outlives the call: memory of the default resource.
template <arithmetic_element T>
[[nodiscard]] matrix<T> result_matrix(
    const cpu&, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
{
    return matrix<T>(rows, cols, order);
}

/// A zero matrix of the policy's scratch memory.
template <arithmetic_element T>
[[nodiscard]] matrix<T> scratch_matrix(
    const cpu& policy, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
{
    return matrix<T>(rows, cols, order, memory_of(policy));
}

/// to = from, of the same shape; the orders may differ. Throws shape_mismatch.
template <arithmetic_element T>
void copy_matrix(const cpu&, std::type_identity_t<matrix_view<const T>> from, std::type_identity_t<matrix_view<T>> to);

/// out = x·diag(scale): x and out m×q, q scales. Each product is rounded once.
template <arithmetic_element T>
void scale_columns(const cpu&, std::type_identity_t<matrix_view<const T>> x, std::span<const double> scale,
    std::type_identity_t<matrix_view<T>> out);

/// weight·Ra·Rbᵀ of two triangular factors, in scratch memory.
template <int = 0>
[[nodiscard]] matrix<double> small_product(
    const cpu& policy, double weight, const matrix<double>& a, const matrix<double>& b);

/// out = x·y for a tall x (m×k) and columns y (k×q) of what small_svd() returned, rounded to T before the product.
template <arithmetic_element T>
void multiply_small(const cpu& policy, std::type_identity_t<matrix_view<const T>> x,
    std::type_identity_t<matrix_view<const double>> y, std::type_identity_t<matrix_view<T>> out);

/// An orthonormal basis of the columns of y, m×min(m, n), explicitly, in scratch memory.
template <arithmetic_element T>
[[nodiscard]] matrix<T> orthonormal_basis(
    const cpu& policy, std::type_identity_t<matrix_view<const T>> y, std::string_view what);

/// The matrix in its arithmetic type: as it is, or a converted copy kept in `copy`, in scratch memory.
template <storage_element T>
[[nodiscard]] matrix_view<const arithmetic_type<T>> in_arithmetic(
    const cpu& policy, matrix_view<const T> a, matrix<arithmetic_type<T>>& copy);

/// Raises nonfinite_error for the first NaN or infinity in row-major order; returns if there is none.
template <storage_element T>
void refuse_nonfinite(const cpu& policy, matrix_view<const T> a, std::string_view what);

/// body(inside, index) for each index in [0, count), in parallel where the policy can; `inside` is the policy for the
/// work of one index.
template <class Body>
void for_each_piece(const cpu& policy, std::size_t count, const Body& body)
{
    const cpu inside = sequential(policy);
    for_each_index(policy, count, [&](std::size_t index, std::size_t) { body(inside, index); });
}

/// Calls body with a policy that is ready for many calls: what a backend has to make for each of them is made once.
template <class Body>
decltype(auto) with_context(const cpu& policy, const Body& body)
{
    return body(policy);
}

/// Below this share of ‖A‖² a squared error is measured entry by entry: ‖A‖² − Σσ² would cancel.
template <arithmetic_element T>
[[nodiscard]] constexpr double cancellation_limit(const cpu&)
{
    return 1e-6;
}

namespace detail {

using eigen_index = Eigen::Index;

inline constexpr auto eigen_success = static_cast<Eigen::ComputationInfo>(0); // its name is a macro of X11

template <class T, int Order>
using eigen_map =
    Eigen::Map<Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Order>, Eigen::Unaligned, Eigen::OuterStride<>>;

template <class T, int Order>
using eigen_const_map =
    Eigen::Map<const Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Order>, Eigen::Unaligned, Eigen::OuterStride<>>;

template <int Order, class T>
[[nodiscard]] auto map_as(const matrix_view<const T>& x)
{
    return eigen_const_map<T, Order>(x.data(), static_cast<eigen_index>(x.rows()), static_cast<eigen_index>(x.cols()),
        Eigen::OuterStride<>(static_cast<eigen_index>(x.stride())));
}

/// Keeps Eigen's own OpenMP threads out of a product: the parallelism is over layers and blocks, one thread inside
/// each.
class one_thread_inside {
public:
#if defined(_OPENMP)
    one_thread_inside()
        : threads_(omp_get_max_threads())
    {
        omp_set_num_threads(1);
    }
    ~one_thread_inside() { omp_set_num_threads(threads_); }
    one_thread_inside(const one_thread_inside&) = delete;
    one_thread_inside& operator=(const one_thread_inside&) = delete;

private:
    int threads_;
#else
    one_thread_inside() noexcept { }
#endif
};

/// C (column-major) = alpha·A·B + beta·C on this thread.
template <int OrderA, int OrderB, class T>
TASKVEC_NOINLINE void multiply_block(T alpha, matrix_view<const T> a, matrix_view<const T> b, T beta, matrix_view<T> c)
{
    eigen_map<T, Eigen::ColMajor> out(c.data(), static_cast<eigen_index>(c.rows()), static_cast<eigen_index>(c.cols()),
        Eigen::OuterStride<>(static_cast<eigen_index>(c.stride())));
    if (beta == T(0)) { out.setZero(); }
    else if (beta != T(1)) {
        out *= beta;
    }
    if (a.cols() != 0) { out.noalias() += alpha * (map_as<OrderA>(a) * map_as<OrderB>(b)); }
}

template <class T>
void multiply_any(T alpha, matrix_view<const T> a, matrix_view<const T> b, T beta, matrix_view<T> c)
{
    const bool a_rows = a.order() == matrix_order::row_major, b_rows = b.order() == matrix_order::row_major;
    if (a_rows && b_rows) { multiply_block<Eigen::RowMajor, Eigen::RowMajor>(alpha, a, b, beta, c); }
    else if (a_rows) {
        multiply_block<Eigen::RowMajor, Eigen::ColMajor>(alpha, a, b, beta, c);
    }
    else if (b_rows) {
        multiply_block<Eigen::ColMajor, Eigen::RowMajor>(alpha, a, b, beta, c);
    }
    else {
        multiply_block<Eigen::ColMajor, Eigen::ColMajor>(alpha, a, b, beta, c);
    }
}

/// Sum of squares of a run, in f64, by 8 lanes that are folded at the end.
template <class T>
[[nodiscard]] TASKVEC_NOINLINE double run_of_squares(const T* data, std::size_t size)
{
    using lanes = Eigen::Array<double, 8, 1>;
    using stored = Eigen::Array<T, 8, 1>;
    lanes sum = lanes::Zero();
    std::size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        const lanes x = Eigen::Map<const stored>(data + i).template cast<double>();
        sum += x * x;
    }
    double rest = 0;
    for (; i < size; ++i) { rest += static_cast<double>(data[i]) * static_cast<double>(data[i]); }
    return sum.sum() + rest;
}

/// Raises nonfinite_error for the first NaN or infinity in row-major order; returns if there is none.
template <class T>
TASKVEC_COLD void blame_nonfinite(matrix_view<const T> x, std::string_view what)
{
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < x.cols(); ++j) {
            if (!std::isfinite(static_cast<double>(x(i, j)))) {
                raise<nonfinite_error>(error_code::not_finite,
                    message("matrix '", what, "' holds ", std::isnan(static_cast<double>(x(i, j))) ? "NaN" : "infinity",
                        " at row ", i, ", column ", j,
                        "; a decomposition needs finite numbers: repair or leave out this matrix"));
            }
        }
    }
}

/// Uninitialised memory that is aligned as Eigen's own matrices are, so that it computes the same bits in it.
template <class T>
class matrix_room {
public:
    matrix_room(std::size_t size, std::pmr::memory_resource* memory)
        : memory_(memory)
        , bytes_(size * sizeof(T))
        , data_(static_cast<T*>(memory->allocate(bytes_, alignment)))
    { }
    ~matrix_room() { memory_->deallocate(data_, bytes_, alignment); }
    matrix_room(const matrix_room&) = delete;
    matrix_room& operator=(const matrix_room&) = delete;
    [[nodiscard]] T* data() const noexcept { return data_; }

private:
    static constexpr std::size_t alignment = 64;
    std::pmr::memory_resource* memory_;
    std::size_t bytes_;
    T* data_;
};

inline constexpr std::size_t tall_block = 256; // rows that are converted to f64 at a time

/// Copies a block to f64, in the order of the source.
template <class T>
[[nodiscard]] matrix_view<const double> widened(matrix_view<const T> x, std::pmr::vector<double>& scratch)
{
    if constexpr (std::same_as<T, double>) { return x; }
    else {
        const bool by_rows = x.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? x.rows() : x.cols(), length = by_rows ? x.cols() : x.rows();
        scratch.resize(std::max(scratch.size(), x.size()));
        for (std::size_t k = 0; k < runs; ++k) {
            Eigen::Map<Eigen::ArrayXd>(scratch.data() + k * length, static_cast<eigen_index>(length)) =
                Eigen::Map<const Eigen::Array<T, Eigen::Dynamic, 1>>(
                    x.data() + k * x.stride(), static_cast<eigen_index>(length))
                    .template cast<double>();
        }
        return {scratch.data(), x.rows(), x.cols(), x.order()};
    }
}

/// G = AᵀA in f64 (n×n, both triangles).
template <class T>
void gram(matrix_view<const T> a, matrix_view<double> g, std::pmr::memory_resource* memory)
{
    const std::size_t n = a.cols();
    constexpr std::size_t panel = 32;
    std::pmr::vector<double> scratch(memory);
    for (std::size_t i = 0; i < a.rows(); i += tall_block) {
        const auto rows = widened(a.block(i, 0, std::min(tall_block, a.rows() - i), n), scratch);
        for (std::size_t j = 0; j < n; j += panel) { // the lower triangle, by panels of columns
            const std::size_t width = std::min(panel, n - j);
            multiply_any<double>(1.0, rows.block(0, j, rows.rows(), n - j).transposed(),
                rows.block(0, j, rows.rows(), width), i == 0 ? 0.0 : 1.0, g.block(j, j, n - j, width));
        }
    }
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = j + 1; i < n; ++i) { g(j, i) = g(i, j); }
    }
}

/// R with RᵀR = G and its inverse, for a positive definite G. Returns a lower bound of the least eigenvalue of G with
/// its columns scaled to unit length (about 1/κ² of the scaled columns), or 0 where G is not numerically definite.
template <int = 0>
[[nodiscard]] double cholesky_factor(
    matrix_view<const double> g, matrix_view<double> r, matrix_view<double> inverse, std::pmr::memory_resource* memory)
{
    const std::size_t n = g.cols();
    const matrix_room<double> room(n * n, memory);
    eigen_map<double, Eigen::ColMajor> l(room.data(), static_cast<eigen_index>(n), static_cast<eigen_index>(n),
        Eigen::OuterStride<>(static_cast<eigen_index>(n)));
    std::pmr::vector<double> scale(n, memory);
    for (std::size_t j = 0; j < n; ++j) {
        if (!(g(j, j) > 0)) { return 0; }
        scale[j] = std::sqrt(g(j, j));
    }
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < n; ++i) {
            l(static_cast<eigen_index>(i), static_cast<eigen_index>(j)) = g(i, j) / scale[i] / scale[j];
        }
    }
    Eigen::Ref<Eigen::MatrixXd> in_place(l);
    const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> llt(in_place);
    if (llt.info() != eigen_success) { return 0; }
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < n; ++i) {
            r(i, j) = i <= j ? l(static_cast<eigen_index>(j), static_cast<eigen_index>(i)) * scale[j] : 0;
        }
    }
    // The inverse of an upper triangle, column by column.
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < n; ++i) { inverse(i, j) = 0; }
        inverse(j, j) = 1 / r(j, j);
        for (std::size_t i = j; i-- > 0;) {
            double sum = 0;
            for (std::size_t k = i + 1; k <= j; ++k) { sum += r(i, k) * inverse(k, j); }
            inverse(i, j) = -sum / r(i, i);
        }
    }
    double inverse_norm = 0; // ‖scaled R⁻¹‖²_F, at least 1/λ
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i <= j; ++i) { inverse_norm += inverse(i, j) * scale[i] * inverse(i, j) * scale[i]; }
    }
    return 1 / inverse_norm;
}

/// Householder QR in place: reflectors below the diagonal, R above it. Unconditionally stable, any rank; column by
/// column.
template <int = 0>
void householder(matrix_view<double> a, double* tau)
{
    using column = Eigen::Map<Eigen::VectorXd>;
    const std::size_t m = a.rows(), n = a.cols();
    for (std::size_t j = 0; j < std::min(m, n); ++j) {
        column x(&a(j, j), static_cast<eigen_index>(m - j));
        const double largest = x.cwiseAbs().maxCoeff();
        tau[j] = 0;
        if (largest == 0) { continue; }
        const double norm = largest * (x / largest).norm();
        const double alpha = x(0), beta = alpha >= 0 ? -norm : norm;
        tau[j] = (beta - alpha) / beta;
        x /= alpha - beta;
        x(0) = 1;
        for (std::size_t k = j + 1; k < n; ++k) {
            column y(&a(j, k), static_cast<eigen_index>(m - j));
            const double along = tau[j] * x.dot(y);
            y -= along * x;
        }
        x(0) = beta;
    }
}

using jacobi_lanes = Eigen::Array<double, 8, 1>;

template <int = 0>
[[nodiscard]] TASKVEC_NOINLINE double padded_dot(const double* x, const double* y, std::size_t size)
{
    jacobi_lanes sum = jacobi_lanes::Zero();
    for (std::size_t i = 0; i < size; i += 8) {
        sum += Eigen::Map<const jacobi_lanes>(x + i) * Eigen::Map<const jacobi_lanes>(y + i);
    }
    return sum.sum();
}

/// (x, y) ← (c·x − s·y, s·x + c·y)
template <int = 0>
TASKVEC_NOINLINE void padded_rotate(double* x, double* y, std::size_t size, double c, double s)
{
    for (std::size_t i = 0; i < size; i += 8) {
        Eigen::Map<jacobi_lanes> px(x + i), py(y + i);
        const jacobi_lanes a = px, b = py;
        px = c * a - s * b;
        py = s * a + c * b;
    }
}

/// Fills columns [first, cols) of an orthonormal u with unit vectors made orthogonal to all columns before.
template <int = 0>
void complete_basis(matrix_view<double> u, std::size_t first, std::pmr::memory_resource* memory)
{
    const std::size_t m = u.rows();
    std::pmr::vector<double> weight(m, 0.0, memory); // squared length of row i so far: e_i is best where it is least
    for (std::size_t j = 0; j < first; ++j) {
        for (std::size_t i = 0; i < m; ++i) { weight[i] += u(i, j) * u(i, j); }
    }
    for (std::size_t j = first; j < u.cols(); ++j) {
        const auto pick = static_cast<std::size_t>(std::min_element(weight.begin(), weight.end()) - weight.begin());
        Eigen::Map<Eigen::VectorXd> x(&u(0, j), static_cast<eigen_index>(m));
        x.setZero();
        x(static_cast<eigen_index>(pick)) = 1;
        for (int twice = 0; twice < 2; ++twice) {
            for (std::size_t k = 0; k < j; ++k) {
                const Eigen::Map<const Eigen::VectorXd> y(&u(0, k), static_cast<eigen_index>(m));
                const double along = y.dot(x);
                x -= along * y;
            }
        }
        x.normalize();
        for (std::size_t i = 0; i < m; ++i) { weight[i] += u(i, j) * u(i, j); }
    }
}

} // namespace detail

template <arithmetic_element T>
void gemm(const cpu& policy, T alpha, std::type_identity_t<matrix_view<const T>> a,
    std::type_identity_t<matrix_view<const T>> b, std::type_identity_t<T> beta, std::type_identity_t<matrix_view<T>> c)
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
    // Fixed pieces of the longer side: the same products whatever the number of threads.
    constexpr std::size_t piece = 256;
    const bool by_rows = c.rows() >= c.cols();
    const std::size_t pieces = ((by_rows ? c.rows() : c.cols()) + piece - 1) / piece;
    const bool worth_threads = static_cast<double>(c.size()) * static_cast<double>(a.cols()) > 4e6;
    for_each_index(worth_threads ? policy : sequential(policy), pieces, [&](std::size_t index, std::size_t) {
        const detail::one_thread_inside guard;
        const std::size_t first = index * piece;
        if (by_rows) {
            const std::size_t count = std::min(piece, c.rows() - first);
            detail::multiply_any<T>(
                alpha, a.block(first, 0, count, a.cols()), b, beta, c.block(first, 0, count, c.cols()));
        }
        else {
            const std::size_t count = std::min(piece, c.cols() - first);
            detail::multiply_any<T>(
                alpha, a, b.block(0, first, b.rows(), count), beta, c.block(0, first, c.rows(), count));
        }
    });
}

template <arithmetic_element T>
double squared_norm(const cpu& policy, matrix_view<const T> a)
{
    if (a.empty()) { return 0; }
    if (a.order() == matrix_order::row_major) { a = a.transposed(); }
    constexpr std::size_t piece = 64;
    std::pmr::vector<double> part((a.cols() + piece - 1) / piece, 0.0, memory_of(policy));
    for_each_index(
        a.size() > 1'000'000 ? policy : sequential(policy), part.size(), [&](std::size_t index, std::size_t) {
            for (std::size_t j = index * piece; j < std::min(a.cols(), (index + 1) * piece); ++j) {
                part[index] += detail::run_of_squares(a.data() + j * a.stride(), a.rows());
            }
        });
    return std::accumulate(part.begin(), part.end(), 0.0);
}

template <arithmetic_element T>
void fill_normal(const cpu& policy, const random_stream& stream, matrix_view<T> a)
{
    for_each_index(a.size() > 10'000 ? policy : sequential(policy), a.cols(), [&](std::size_t j, std::size_t) {
        const std::uint64_t first = std::uint64_t{j} * a.rows();
        for (std::size_t i = 0; i < a.rows();) {
            if ((first + i) % 2 == 0 && i + 1 < a.rows()) {
                const auto [even, odd] = stream.normal_pair((first + i) / 2);
                a(i, j) = static_cast<T>(even);
                a(i + 1, j) = static_cast<T>(odd);
                i += 2;
            }
            else {
                a(i, j) = static_cast<T>(stream.normal(first + i));
                ++i;
            }
        }
    });
}

template <arithmetic_element T>
qr_factors<T> factor_qr(const cpu& policy, std::type_identity_t<matrix_view<const T>> a, std::string_view what)
{
    const detail::one_thread_inside guard;
    const std::size_t m = a.rows(), n = a.cols();
    std::pmr::memory_resource* const memory = memory_of(policy);
    qr_factors<T> f;
    f.a = a;
    f.r = matrix<double>(std::min(m, n), n, matrix_order::column_major, memory);
    if (a.empty()) { return f; }
    if (m <= n) { // Q = I
        for (std::size_t j = 0; j < n; ++j) {
            for (std::size_t i = 0; i < m; ++i) { f.r(i, j) = static_cast<double>(a(i, j)); }
        }
        if (!std::isfinite(squared_norm(policy, a))) { detail::blame_nonfinite(a, what); }
        return f;
    }
    matrix<double> g(n, n, matrix_order::column_major, memory), inverse(n, n, matrix_order::column_major, memory);
    detail::gram(a, g.view(), memory);
    double trace = 0;
    for (std::size_t j = 0; j < n; ++j) { trace += g(j, j); }
    if (!std::isfinite(trace)) { detail::blame_nonfinite(a, what); } // returns when only the squares overflow
    const double least = std::isfinite(trace) ? detail::cholesky_factor(g, f.r, inverse, memory) : 0;
    if constexpr (std::same_as<T, float>) {
        if (least >= 1e-7) {
            f.kept = qr_factors<T>::form::scaled;
            f.q = std::move(inverse);
            return f;
        }
    }
    f.q = matrix<double>(m, n, matrix_order::column_major, memory);
    if (least >= 1e-12) { // once more, on the nearly orthonormal A·R⁻¹
        std::pmr::vector<double> scratch(memory);
        matrix<double> once(m, n, matrix_order::column_major, memory), r1(n, n, matrix_order::column_major, memory),
            r2(n, n, matrix_order::column_major, memory);
        std::copy_n(f.r.data(), r1.size(), r1.data());
        for (std::size_t i = 0; i < m; i += detail::tall_block) {
            const std::size_t count = std::min(detail::tall_block, m - i);
            detail::multiply_any<double>(1.0, detail::widened(a.block(i, 0, count, n), scratch), inverse, 0.0,
                once.view().block(i, 0, count, n));
        }
        detail::gram<double>(once.view(), g.view(), memory);
        if (detail::cholesky_factor(g, r2, inverse, memory) * static_cast<double>(n) > 0.5) {
            detail::multiply_any<double>(1.0, once, inverse, 0.0, f.q);
            detail::multiply_any<double>(1.0, r2, r1, 0.0, f.r);
            f.kept = qr_factors<T>::form::stored;
            return f;
        }
    }
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < m; ++i) { f.q(i, j) = static_cast<double>(a(i, j)); }
    }
    f.tau = matrix<double>(std::min(m, n), 1, matrix_order::column_major, memory);
    detail::householder(f.q, f.tau.data());
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < n; ++i) { f.r(i, j) = i <= j ? f.q(i, j) : 0; }
    }
    f.kept = qr_factors<T>::form::reflectors;
    return f;
}

template <arithmetic_element T>
void multiply_q(const cpu& policy, const qr_factors<T>& f, std::type_identity_t<matrix_view<const double>> x,
    std::type_identity_t<matrix_view<T>> out)
{
    using form = typename qr_factors<T>::form;
    const detail::one_thread_inside guard;
    const std::size_t m = f.a.rows(), p = x.cols();
    if (x.rows() != f.r.rows() || out.rows() != m || out.cols() != p) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("multiply_q: Q is ", m, "×", f.r.rows(), ", X ", x.rows(), "×", p, ", the result ", out.rows(), "×",
                out.cols()));
    }
    if (out.empty()) { return; }
    std::pmr::memory_resource* const memory = memory_of(policy);
    if (f.kept == form::identity || f.kept == form::reflectors) {
        matrix<double> y(m, p, matrix_order::column_major, memory);
        for (std::size_t j = 0; j < p; ++j) {
            for (std::size_t i = 0; i < x.rows(); ++i) { y(i, j) = x(i, j); }
            for (std::size_t k = f.tau.size(); k-- > 0;) {
                Eigen::Map<Eigen::VectorXd> tail(&y(k, j), static_cast<Eigen::Index>(m - k));
                const Eigen::Map<const Eigen::VectorXd> reflector(&f.q(k, k), static_cast<Eigen::Index>(m - k));
                const auto below = static_cast<Eigen::Index>(m - k - 1);
                const double along = f.tau(k, 0) * (tail(0) + reflector.tail(below).dot(tail.tail(below)));
                tail(0) -= along;
                tail.tail(below) -= along * reflector.tail(below);
            }
            for (std::size_t i = 0; i < m; ++i) { out(i, j) = static_cast<T>(y(i, j)); }
        }
        return;
    }
    matrix<double> scaled;
    if (f.kept == form::scaled) {
        scaled = matrix<double>(f.a.cols(), p, matrix_order::column_major, memory);
        detail::multiply_any<double>(1.0, f.q, x, 0.0, scaled);
    }
    std::pmr::vector<double> scratch(memory), block(memory);
    for (std::size_t i = 0; i < m; i += detail::tall_block) {
        const std::size_t count = std::min(detail::tall_block, m - i);
        block.resize(count * p);
        const matrix_view<double> y(block.data(), count, p, matrix_order::column_major);
        if (f.kept == form::scaled) {
            detail::multiply_any<double>(
                1.0, detail::widened(f.a.block(i, 0, count, f.a.cols()), scratch), scaled, 0.0, y);
        }
        else {
            detail::multiply_any<double>(1.0, f.q.view().block(i, 0, count, f.q.cols()), x, 0.0, y);
        }
        for (std::size_t j = 0; j < p; ++j) {
            for (std::size_t k = 0; k < count; ++k) { out(i + k, j) = static_cast<T>(y(k, j)); }
        }
    }
}

template <int>
small_svd_result small_svd(const cpu& policy, matrix_view<const double> a)
{
    if (a.rows() < a.cols()) {
        small_svd_result turned = small_svd(policy, a.transposed());
        std::swap(turned.u, turned.v);
        return turned;
    }
    const std::size_t m = a.rows(), n = a.cols();
    std::pmr::memory_resource* const memory = memory_of(policy);
    small_svd_result result{matrix<double>(m, n, matrix_order::column_major, memory), std::vector<double>(n, 0.0),
        matrix<double>(n, n, matrix_order::column_major, memory)};
    if (n == 0) { return result; }
    double largest = 0;
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < m; ++i) {
            if (!std::isfinite(a(i, j))) { detail::blame_nonfinite(a, "the core"); }
            largest = std::max(largest, std::abs(a(i, j)));
        }
    }
    if (largest == 0) {
        for (std::size_t j = 0; j < n; ++j) { result.u(j, j) = result.v(j, j) = 1; }
        return result;
    }
    int exponent = 0;
    std::frexp(largest, &exponent);

    // Columns of w (A·V so far) and v, each padded to whole lanes.
    const auto padded = [](std::size_t size) { return (size + 7) / 8 * 8; };
    const std::size_t wm = padded(m), vn = padded(n);
    std::pmr::vector<double> w(wm * n, 0.0, memory), v(vn * n, 0.0, memory);
    std::pmr::vector<double> squares(n, memory);
    std::pmr::vector<std::size_t> at(n, memory); // column p of the iteration lies at at[p]
    for (std::size_t j = 0; j < n; ++j) {
        for (std::size_t i = 0; i < m; ++i) { w[j * wm + i] = std::ldexp(a(i, j), -exponent); }
        v[j * vn + j] = 1;
        at[j] = j;
    }
    constexpr double epsilon = std::numeric_limits<double>::epsilon();
    constexpr int most_sweeps = 60;
    for (int sweep = 0; sweep < most_sweeps; ++sweep) {
        double top = 0;
        for (std::size_t j = 0; j < n; ++j) {
            squares[j] = detail::padded_dot(&w[j * wm], &w[j * wm], wm);
            top = std::max(top, squares[j]);
        }
        const double negligible = top * epsilon * epsilon;
        std::size_t rotations = 0;
        std::sort(at.begin(), at.end(),
            [&](std::size_t x, std::size_t y) { return squares[x] != squares[y] ? squares[x] > squares[y] : x < y; });
        for (std::size_t p = 0; p + 1 < n; ++p) {
            for (std::size_t q = p + 1; q < n; ++q) {
                if (squares[at[p]] < squares[at[q]]) { std::swap(at[p], at[q]); }
                const std::size_t x = at[p], y = at[q];
                if (squares[y] <= negligible) { continue; }
                const double dot = detail::padded_dot(&w[x * wm], &w[y * wm], wm);
                if (std::abs(dot) <= 4 * epsilon * std::sqrt(squares[x] * squares[y])) { continue; }
                const double zeta = (squares[y] - squares[x]) / (2 * dot);
                const double t = std::copysign(1 / (std::abs(zeta) + std::sqrt(1 + zeta * zeta)), zeta);
                const double c = 1 / std::sqrt(1 + t * t), s = c * t;
                detail::padded_rotate(&w[x * wm], &w[y * wm], wm, c, s);
                detail::padded_rotate(&v[x * vn], &v[y * vn], vn, c, s);
                squares[x] -= t * dot;
                squares[y] = std::max(0.0, squares[y] + t * dot);
                ++rotations;
            }
        }
        if (rotations == 0) { break; }
    }
    for (std::size_t j = 0; j < n; ++j) { squares[j] = detail::padded_dot(&w[j * wm], &w[j * wm], wm); }
    std::sort(at.begin(), at.end(),
        [&](std::size_t x, std::size_t y) { return squares[x] != squares[y] ? squares[x] > squares[y] : x < y; });
    std::size_t rank = n;
    for (std::size_t j = 0; j < n; ++j) {
        const double length = std::sqrt(squares[at[j]]);
        if (rank == n && length <= epsilon * std::sqrt(squares[at[0]])) { rank = j; }
        result.sigma[j] = j < rank ? std::ldexp(length, exponent) : 0;
        for (std::size_t i = 0; i < n; ++i) { result.v(i, j) = v[at[j] * vn + i]; }
        for (std::size_t i = 0; i < m && j < rank; ++i) { result.u(i, j) = w[at[j] * wm + i] / length; }
    }
    detail::complete_basis(result.u, rank, memory);
    return result;
}

template <arithmetic_element T>
void orient(const cpu&, std::type_identity_t<matrix_view<T>> u, std::type_identity_t<matrix_view<T>> v)
{
    for (std::size_t j = 0; j < u.cols(); ++j) {
        T largest = 0;
        for (std::size_t i = 0; i < u.rows(); ++i) {
            if (std::abs(u(i, j)) > std::abs(largest)) { largest = u(i, j); }
        }
        if (largest >= 0) { continue; }
        for (std::size_t i = 0; i < u.rows(); ++i) { u(i, j) = -u(i, j); }
        for (std::size_t i = 0; i < v.rows(); ++i) { v(i, j) = -v(i, j); }
    }
}

template <int>
double factor_cholesky(const cpu& policy, matrix_view<double> g)
{
    if (g.rows() != g.cols() || g.order() != matrix_order::column_major) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("factor_cholesky: G is ", g.rows(), "×", g.cols(), "; expected a square, column-major matrix"));
    }
    if (g.empty()) { return 1; }
    const detail::one_thread_inside guard;
    std::pmr::vector<double> diagonal(g.rows(), memory_of(policy));
    for (std::size_t i = 0; i < diagonal.size(); ++i) {
        diagonal[i] = g(i, i);
        if (!(diagonal[i] > 0)) { return 0; }
    }
    detail::eigen_map<double, Eigen::ColMajor> l(g.data(), static_cast<detail::eigen_index>(g.rows()),
        static_cast<detail::eigen_index>(g.cols()), Eigen::OuterStride<>(static_cast<detail::eigen_index>(g.stride())));
    Eigen::Ref<Eigen::MatrixXd> in_place(l);
    const Eigen::LLT<Eigen::Ref<Eigen::MatrixXd>> llt(in_place);
    if (llt.info() != detail::eigen_success) { return 0; }
    double least = 1;
    for (std::size_t i = 0; i < diagonal.size(); ++i) {
        const double share = g(i, i) * g(i, i) / diagonal[i];
        least = share < least ? share : least;
    }
    return least;
}

template <int>
void solve_cholesky(const cpu& policy, matrix_view<const double> l, matrix_view<double> b)
{
    if (l.rows() != l.cols() || b.rows() != l.rows() || l.order() != matrix_order::column_major) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("solve_cholesky: L is ", l.rows(), "×", l.cols(), ", B ", b.rows(), "×", b.cols()));
    }
    if (b.empty()) { return; }
    constexpr std::size_t piece = 256;
    const bool worth_threads = static_cast<double>(b.size()) * static_cast<double>(b.rows()) > 4e6;
    for_each_index(worth_threads ? policy : sequential(policy), (b.cols() + piece - 1) / piece,
        [&](std::size_t index, std::size_t) {
            const detail::one_thread_inside guard;
            const auto lower = detail::map_as<Eigen::ColMajor>(l);
            const matrix_view<double> part =
                b.block(0, index * piece, b.rows(), std::min(piece, b.cols() - index * piece));
            const auto rows = static_cast<detail::eigen_index>(part.rows()),
                       cols = static_cast<detail::eigen_index>(part.cols());
            const Eigen::OuterStride<> stride(static_cast<detail::eigen_index>(part.stride()));
            if (part.order() == matrix_order::row_major) {
                detail::eigen_map<double, Eigen::RowMajor> x(part.data(), rows, cols, stride);
                lower.template triangularView<Eigen::Lower>().solveInPlace(x);
                lower.template triangularView<Eigen::Lower>().transpose().solveInPlace(x);
            }
            else {
                detail::eigen_map<double, Eigen::ColMajor> x(part.data(), rows, cols, stride);
                lower.template triangularView<Eigen::Lower>().solveInPlace(x);
                lower.template triangularView<Eigen::Lower>().transpose().solveInPlace(x);
            }
        });
}

template <int>
bool cholesky_solve(const cpu& policy, matrix_view<const double> g, matrix_view<double> b)
{
    if (g.rows() != g.cols() || b.rows() != g.rows()) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("cholesky_solve: G is ", g.rows(), "×", g.cols(), ", B ", b.rows(), "×", b.cols()));
    }
    matrix<double> l(g.rows(), g.cols(), matrix_order::column_major, memory_of(policy));
    for (std::size_t j = 0; j < g.cols(); ++j) {
        for (std::size_t i = j; i < g.rows(); ++i) { l(i, j) = g(i, j); }
    }
    if (factor_cholesky(policy, l.view()) <= 0) { return false; }
    solve_cholesky(policy, l.view(), b);
    return true;
}

template <arithmetic_element T>
void copy_matrix(const cpu&, std::type_identity_t<matrix_view<const T>> from, std::type_identity_t<matrix_view<T>> to)
{
    if (from.rows() != to.rows() || from.cols() != to.cols()) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("copy_matrix: ", from.rows(), "×", from.cols(), " into ", to.rows(), "×", to.cols()));
    }
    if (from.order() != to.order()) {
        for (std::size_t j = 0; j < to.cols(); ++j) {
            for (std::size_t i = 0; i < to.rows(); ++i) { to(i, j) = from(i, j); }
        }
        return;
    }
    const bool by_rows = from.order() == matrix_order::row_major;
    const std::size_t runs = by_rows ? from.rows() : from.cols(), length = by_rows ? from.cols() : from.rows();
    for (std::size_t k = 0; k < runs; ++k) {
        std::copy_n(from.data() + k * from.stride(), length, to.data() + k * to.stride());
    }
}

template <arithmetic_element T>
void scale_columns(const cpu&, std::type_identity_t<matrix_view<const T>> x, std::span<const double> scale,
    std::type_identity_t<matrix_view<T>> out)
{
    for (std::size_t j = 0; j < scale.size(); ++j) {
        for (std::size_t i = 0; i < x.rows(); ++i) {
            out(i, j) = static_cast<T>(static_cast<double>(x(i, j)) * scale[j]);
        }
    }
}

template <int>
matrix<double> small_product(const cpu& policy, double weight, const matrix<double>& a, const matrix<double>& b)
{
    auto core = scratch_matrix<double>(policy, a.rows(), b.rows());
    gemm(policy, weight, a.view(), b.view().transposed(), 0.0, core.view());
    return core;
}

template <arithmetic_element T>
void multiply_small(const cpu& policy, std::type_identity_t<matrix_view<const T>> x,
    std::type_identity_t<matrix_view<const double>> y, std::type_identity_t<matrix_view<T>> out)
{
    auto rounded = scratch_matrix<T>(policy, y.rows(), y.cols());
    for (std::size_t j = 0; j < y.cols(); ++j) {
        for (std::size_t i = 0; i < y.rows(); ++i) { rounded(i, j) = static_cast<T>(y(i, j)); }
    }
    gemm<T>(policy, T(1), x, rounded.view(), T(0), out);
}

template <arithmetic_element T>
matrix<T> orthonormal_basis(const cpu& policy, std::type_identity_t<matrix_view<const T>> y, std::string_view what)
{
    const auto f = factor_qr<T>(policy, y, what);
    const std::size_t k = f.r.rows();
    auto unit = scratch_matrix<double>(policy, k, k);
    for (std::size_t j = 0; j < k; ++j) { unit(j, j) = 1; }
    auto q = scratch_matrix<T>(policy, y.rows(), k);
    multiply_q<T>(policy, f, unit.view(), q);
    return q;
}

template <storage_element T>
matrix_view<const arithmetic_type<T>> in_arithmetic(
    const cpu& policy, matrix_view<const T> a, matrix<arithmetic_type<T>>& copy)
{
    if constexpr (arithmetic_element<T>) { return a; }
    else {
        copy = scratch_matrix<arithmetic_type<T>>(policy, a.rows(), a.cols(), a.order());
        const bool by_rows = a.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? a.rows() : a.cols(), length = by_rows ? a.cols() : a.rows();
        for (std::size_t k = 0; k < runs; ++k) {
            for (std::size_t i = 0; i < length; ++i) {
                copy.data()[k * length + i] = widen<arithmetic_type<T>>(a.data()[k * a.stride() + i]);
            }
        }
        return copy;
    }
}

template <storage_element T>
void refuse_nonfinite(const cpu& policy, matrix_view<const T> a, std::string_view what)
{
    matrix<arithmetic_type<T>> copy;
    detail::blame_nonfinite(in_arithmetic(policy, a, copy), what);
}

static_assert(check_linear_algebra<cpu, float>() && check_linear_algebra<cpu, double>());

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_SMALL_MATRICES(extern)
TASKVEC_COMPILED_MATRICES(extern, float)
TASKVEC_COMPILED_MATRICES(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
