// The linear algebra seam: the operations that the algorithms of linalg/, adapters/, reuse/ and RegMean ask of a
// backend.
// SPDX-License-Identifier: Apache-2.0
//
// A backend supplies the names below, overloaded on its policy and found through it, and says so by specialising
// has_linear_algebra. Three do: linalg/eigen.hpp for taskvec::cpu, whose functions document each operation;
// device/cusolver/linalg.hpp (cuBLAS and cuSOLVER) and device/linalg/host.hpp (Thrust's host systems) for taskvec::gpu.
// The concept linear_algebra_backend lists them all, and check_linear_algebra<P>() says in a sentence which one a
// backend lacks. `tall` matrices are matrix<T, P::space> with T the caller's precision. The type of the small square
// work (triangular factors, cores and what small_svd() returns) is the backend's affair: f64 on the host for Eigen, T
// on the device for cuSOLVER. This header needs no Eigen.
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/core/policy.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/fwd.hpp>

#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What becomes of the columns of A: A = Q·R with Q (m×k) orthonormal, k = min(m, n), R (k×n) in f64; R need not be
/// triangular. Q is kept in whatever form the backend likes (see multiply_q). Refers to A, which must outlive it.
template <arithmetic_element T, memory_space S>
struct qr_factors;

/// A = u·diag(sigma)·vᵀ of a small f64 matrix, sigma descending, u (m×k) and v (n×k) orthonormal, k = min(m, n). u and
/// v lie in the policy's scratch memory.
struct small_svd_result {
    matrix<double> u; ///< m×k
    std::vector<double> sigma; ///< k values, descending
    matrix<double> v; ///< n×k
};

/// Whether a policy's backend supplies the operations of this header: specialised as true in the header that has them,
/// where check_linear_algebra() holds it to that.
///
///     template <>
///     inline constexpr bool has_linear_algebra<my_policy> = true;
template <class P>
inline constexpr bool has_linear_algebra = false;

/// A policy whose backend supplies the operations of this header: cpu; gpu once <taskvec/device/linalg.hpp> is
/// included.
template <class P>
concept linear_algebra_policy = policy<P> && has_linear_algebra<P>;

/// One concept for each operation of the seam. P is the policy, T float or double. m, n, p, q stand for sizes, `c` and
/// `v` for const and mutable views of tall matrices.
namespace linear_algebra {

/// A matrix that is written, where P computes.
template <class P, class T>
using view_in = matrix_view<T, P::space>;
/// A matrix that is read, where P computes.
template <class P, class T>
using const_view_in = matrix_view<const T, P::space>;

/// A matrix of zeros that outlives the call, and one of the policy's scratch memory.
template <class P, class T>
concept holds_matrices = requires(const P& p, std::size_t size, matrix_order order) {
    { result_matrix<T>(p, size, size) } -> std::same_as<matrix<T, P::space>>;
    { result_matrix<T>(p, size, size, order) } -> std::same_as<matrix<T, P::space>>;
    { scratch_matrix<T>(p, size, size) } -> std::same_as<matrix<T, P::space>>;
    { scratch_matrix<T>(p, size, size, order) } -> std::same_as<matrix<T, P::space>>;
};
/// v = c; the orders may differ.
template <class P, class T>
concept copies_matrices = requires(const P& p, const_view_in<P, T> c, view_in<P, T> v) { copy_matrix<T>(p, c, v); };
/// v = c·diag(scale).
template <class P, class T>
concept scales_columns = requires(const P& p, const_view_in<P, T> c, std::span<const double> scale, view_in<P, T> v) {
    scale_columns<T>(p, c, scale, v);
};
/// v = α·a·b + β·v, every operand in either order.
template <class P, class T>
concept multiplies = requires(const P& p, T alpha, const_view_in<P, T> a, const_view_in<P, T> b, view_in<P, T> v) {
    gemm<T>(p, alpha, a, b, alpha, v);
};
/// ‖c‖²_F in f64.
template <class P, class T>
concept measures_norms = requires(const P& p, const_view_in<P, T> c) {
    { squared_norm<T>(p, c) } -> std::same_as<double>;
};
/// Entry (i, j) = stream.normal(j·rows + i), on every backend.
template <class P, class T>
concept draws_normals =
    requires(const P& p, const random_stream& stream, view_in<P, T> v) { fill_normal<T>(p, stream, v); };
/// A stored matrix in its arithmetic type: as it is, or a copy that is kept in the caller's matrix.
template <class P, class T>
concept converts_storage = requires(const P& p, const_view_in<P, T> c, matrix<T, P::space>& copy) {
    { in_arithmetic(p, c, copy) } -> std::same_as<const_view_in<P, T>>;
};
/// nonfinite_error for the first NaN or infinity, if there is one.
template <class P, class T>
concept refuses_nonfinite =
    requires(const P& p, const_view_in<P, T> c, std::string_view what) { refuse_nonfinite(p, c, what); };
/// The thin QR of c: Q in whatever form the backend likes, R as its member r.
template <class P, class T>
concept factors_qr = requires(const P& p, const_view_in<P, T> c, std::string_view what) {
    { factor_qr<T>(p, c, what) } -> std::same_as<qr_factors<T, P::space>>;
};
/// A matrix with a name has a view.
template <class X>
concept shows_view = requires(std::remove_reference_t<X>& x) { x.view(); };
/// weight·Ra·Rbᵀ of two triangular factors: a small matrix.
template <class P, class T>
concept multiplies_triangles = requires(const P& p, double weight, const qr_factors<T, P::space>& f) {
    { small_product(p, weight, f.r, f.r) } -> shows_view;
};
/// The SVD of a small matrix: u, sigma (on the host, descending) and v.
template <class P, class T>
concept decomposes_small = requires(const P& p, const qr_factors<T, P::space>& f) {
    { small_svd(p, f.r.view()).sigma } -> std::convertible_to<std::vector<double>>;
    { small_svd(p, f.r.view()).u } -> shows_view;
    { small_svd(p, f.r.view()).v } -> shows_view;
};
namespace detail {
template <class P, class T>
using small_view = decltype(std::declval<const qr_factors<T, P::space>&>().r.view());
} // namespace detail
/// v = Q·y for the Q of factor_qr() and a small y.
template <class P, class T>
concept multiplies_by_q = requires(const P& p, const qr_factors<T, P::space>& f, detail::small_view<P, T> y,
    view_in<P, T> v) { multiply_q<T>(p, f, y, v); };
/// v = c·y for a tall c and a small y.
template <class P, class T>
concept multiplies_small = requires(
    const P& p, const_view_in<P, T> c, detail::small_view<P, T> y, view_in<P, T> v) { multiply_small<T>(p, c, y, v); };
/// On a device: the SVDs of many small matrices together, and a small matrix as a tall one.
template <class P, class T>
concept decomposes_batches = P::space == memory_space::host
    || requires(
        const P& p, const std::vector<detail::small_view<P, T>>& many, detail::small_view<P, T> y, view_in<P, T> v) {
           small_svds(p, many)[0].sigma;
           keep_small<T>(p, y, v);
       };
/// An orthonormal basis of the columns of c, explicitly.
template <class P, class T>
concept finds_bases = requires(const P& p, const_view_in<P, T> c, std::string_view what) {
    { orthonormal_basis<T>(p, c, what) } -> std::same_as<matrix<T, P::space>>;
};
/// Signs of matching columns so that the largest entry of each of u is positive.
template <class P, class T>
concept orients = requires(const P& p, view_in<P, T> u, view_in<P, T> v) { orient<T>(p, u, v); };
/// G = L·Lᵀ in place, with the least share of a variable's square that the others do not explain; 0 where there is
/// none.
template <class P>
concept factors_cholesky = requires(const P& p, view_in<P, double> g) {
    { factor_cholesky(p, g) } -> std::same_as<double>;
};
/// L·Lᵀ·X = B in place of B.
template <class P>
concept solves_cholesky =
    requires(const P& p, const_view_in<P, double> l, view_in<P, double> b) { solve_cholesky(p, l, b); };
/// G·X = B in place of B; false where G is not positive definite.
template <class P>
concept solves_symmetric = requires(const P& p, const_view_in<P, double> g, view_in<P, double> b) {
    { cholesky_solve(p, g, b) } -> std::same_as<bool>;
};
namespace detail {
// Bodies to ask with: nvcc knows no lambda in a concept.
struct piece {
    template <class P>
    void operator()(const P&, std::size_t) const
    { }
};
struct work {
    template <class P>
    int operator()(const P&) const
    {
        return 0;
    }
};
} // namespace detail
/// body(policy, index) for each index.
template <class P>
concept runs_pieces = requires(const P& p) { for_each_piece(p, std::size_t{}, detail::piece{}); };
/// body(policy) with what many calls share made once.
template <class P>
concept keeps_context = requires(const P& p) {
    { with_context(p, detail::work{}) } -> std::same_as<int>;
};
/// The share of ‖A‖² below which ‖A‖² − Σσ² would cancel.
template <class P, class T>
concept knows_cancellation = requires(const P& p) {
    { cancellation_limit<T>(p) } -> std::same_as<double>;
};

} // namespace linear_algebra

/// A policy with every operation of the seam in one precision, T.
template <class P, class T>
concept linear_algebra_in = linear_algebra::holds_matrices<P, T> && linear_algebra::copies_matrices<P, T>
    && linear_algebra::scales_columns<P, T> && linear_algebra::multiplies<P, T> && linear_algebra::measures_norms<P, T>
    && linear_algebra::draws_normals<P, T> && linear_algebra::converts_storage<P, T>
    && linear_algebra::refuses_nonfinite<P, T> && linear_algebra::factors_qr<P, T>
    && linear_algebra::multiplies_triangles<P, T> && linear_algebra::decomposes_small<P, T>
    && linear_algebra::multiplies_by_q<P, T> && linear_algebra::multiplies_small<P, T>
    && linear_algebra::decomposes_batches<P, T> && linear_algebra::finds_bases<P, T> && linear_algebra::orients<P, T>
    && linear_algebra::factors_cholesky<P> && linear_algebra::solves_cholesky<P> && linear_algebra::solves_symmetric<P>
    && linear_algebra::runs_pieces<P> && linear_algebra::keeps_context<P> && linear_algebra::knows_cancellation<P, T>;

/// A policy with every operation of the seam, in f32 and f64.
template <class P>
concept linear_algebra_backend = linear_algebra_in<P, float> && linear_algebra_in<P, double>;

/// True; where a backend is not complete, the compiler says in a sentence which operation it lacks. Each backend's
/// tests hold it to this.
///
///     static_assert(taskvec::check_linear_algebra<my_policy, double>());
template <class P, class T>
[[nodiscard]] consteval bool check_linear_algebra()
{
    namespace la = linear_algebra;
    static_assert(la::holds_matrices<P, T>, "linear algebra: this policy lacks result_matrix or scratch_matrix");
    static_assert(la::copies_matrices<P, T>, "linear algebra: this policy lacks copy_matrix");
    static_assert(la::scales_columns<P, T>, "linear algebra: this policy lacks scale_columns");
    static_assert(la::multiplies<P, T>, "linear algebra: this policy lacks gemm");
    static_assert(la::measures_norms<P, T>, "linear algebra: this policy lacks squared_norm");
    static_assert(la::draws_normals<P, T>, "linear algebra: this policy lacks fill_normal");
    static_assert(la::converts_storage<P, T>, "linear algebra: this policy lacks in_arithmetic");
    static_assert(la::refuses_nonfinite<P, T>, "linear algebra: this policy lacks refuse_nonfinite");
    static_assert(la::factors_qr<P, T>, "linear algebra: this policy lacks factor_qr, or its qr_factors");
    static_assert(la::multiplies_triangles<P, T>, "linear algebra: this policy lacks small_product");
    static_assert(la::decomposes_small<P, T>, "linear algebra: this policy lacks small_svd");
    static_assert(la::multiplies_by_q<P, T>, "linear algebra: this policy lacks multiply_q");
    static_assert(la::multiplies_small<P, T>, "linear algebra: this policy lacks multiply_small");
    static_assert(la::decomposes_batches<P, T>, "linear algebra: this device policy lacks small_svds or keep_small");
    static_assert(la::finds_bases<P, T>, "linear algebra: this policy lacks orthonormal_basis");
    static_assert(la::orients<P, T>, "linear algebra: this policy lacks orient");
    static_assert(la::factors_cholesky<P>, "linear algebra: this policy lacks factor_cholesky");
    static_assert(la::solves_cholesky<P>, "linear algebra: this policy lacks solve_cholesky");
    static_assert(la::solves_symmetric<P>, "linear algebra: this policy lacks cholesky_solve");
    static_assert(la::runs_pieces<P>, "linear algebra: this policy lacks for_each_piece");
    static_assert(la::keeps_context<P>, "linear algebra: this policy lacks with_context");
    static_assert(la::knows_cancellation<P, T>, "linear algebra: this policy lacks cancellation_limit");
    return linear_algebra_in<P, T>;
}

} // namespace taskvec::inline TASKVEC_ABI
