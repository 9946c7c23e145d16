// A linear algebra backend without one of the seam's operations: one sentence says which it lacks.
// SPDX-License-Identifier: Apache-2.0
// error: linear algebra: this policy lacks orient
#include <taskvec/linalg/eigen.hpp>

namespace caller {

struct policy {
    static constexpr taskvec::memory_space space = taskvec::memory_space::host;
};

template <class T, class... Rest>
auto result_matrix(const policy& p, Rest... rest) -> taskvec::matrix<T>;
template <class T, class... Rest>
auto scratch_matrix(const policy& p, Rest... rest) -> taskvec::matrix<T>;
template <class T>
void copy_matrix(const policy&, taskvec::matrix_view<const T>, taskvec::matrix_view<T>);
template <class T>
void scale_columns(const policy&, taskvec::matrix_view<const T>, std::span<const double>, taskvec::matrix_view<T>);
template <class T>
void gemm(const policy&, T, taskvec::matrix_view<const T>, taskvec::matrix_view<const T>, T, taskvec::matrix_view<T>);
template <class T>
double squared_norm(const policy&, taskvec::matrix_view<const T>);
template <class T>
void fill_normal(const policy&, const taskvec::random_stream&, taskvec::matrix_view<T>);
template <class T>
taskvec::matrix_view<const T> in_arithmetic(const policy&, taskvec::matrix_view<const T>, taskvec::matrix<T>&);
template <class T>
void refuse_nonfinite(const policy&, taskvec::matrix_view<const T>, std::string_view);
template <class T>
taskvec::qr_factors<T> factor_qr(const policy&, taskvec::matrix_view<const T>, std::string_view);
taskvec::matrix<double> small_product(
    const policy&, double, const taskvec::matrix<double>&, const taskvec::matrix<double>&);
taskvec::small_svd_result small_svd(const policy&, taskvec::matrix_view<const double>);
template <class T>
void multiply_q(
    const policy&, const taskvec::qr_factors<T>&, taskvec::matrix_view<const double>, taskvec::matrix_view<T>);
template <class T>
void multiply_small(
    const policy&, taskvec::matrix_view<const T>, taskvec::matrix_view<const double>, taskvec::matrix_view<T>);
template <class T>
taskvec::matrix<T> orthonormal_basis(const policy&, taskvec::matrix_view<const T>, std::string_view);
#if !defined(TASKVEC_FAULT)
template <class T>
void orient(const policy&, taskvec::matrix_view<T>, taskvec::matrix_view<T>);
#endif
double factor_cholesky(const policy&, taskvec::matrix_view<double>);
void solve_cholesky(const policy&, taskvec::matrix_view<const double>, taskvec::matrix_view<double>);
bool cholesky_solve(const policy&, taskvec::matrix_view<const double>, taskvec::matrix_view<double>);
template <class Body>
void for_each_piece(const policy&, std::size_t, const Body&);
template <class Body>
auto with_context(const policy& p, const Body& body)
{
    return body(p);
}
template <class T>
double cancellation_limit(const policy&);

} // namespace caller

static_assert(taskvec::check_linear_algebra<caller::policy, float>());
