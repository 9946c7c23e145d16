// What taskvec::compiled compiles of linalg/, as lists: EXTERN is `extern` where the library is linked, nothing where
// it is made.
// SPDX-License-Identifier: Apache-2.0
//
// The headers are the same with and without the library. With TASKVEC_COMPILED defined, which linking taskvec::compiled
// does, they declare these instances to be elsewhere; the files of src/compiled define them. Both hold each other to
// one list, this one. Other types than float and double compile in the caller's file as ever.
#pragma once

#include <cstddef>
#include <memory_resource>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#define TASKVEC_COMPILED_SMALL_MATRICES(EXTERN)                                                                        \
    EXTERN template double detail::cholesky_factor<0>(                                                                 \
        matrix_view<const double>, matrix_view<double>, matrix_view<double>, std::pmr::memory_resource*);              \
    EXTERN template void detail::householder<0>(matrix_view<double>, double*);                                         \
    EXTERN template small_svd_result small_svd<0>(const cpu&, matrix_view<const double>);                              \
    EXTERN template double factor_cholesky<0>(const cpu&, matrix_view<double>);                                        \
    EXTERN template void solve_cholesky<0>(const cpu&, matrix_view<const double>, matrix_view<double>);                \
    EXTERN template bool cholesky_solve<0>(const cpu&, matrix_view<const double>, matrix_view<double>);                \
    EXTERN template matrix<double> small_product<0>(const cpu&, double, const matrix<double>&, const matrix<double>&);

#define TASKVEC_COMPILED_MATRICES(EXTERN, T)                                                                           \
    EXTERN template void detail::multiply_any<T>(T, matrix_view<const T>, matrix_view<const T>, T, matrix_view<T>);    \
    EXTERN template void detail::gram<T>(matrix_view<const T>, matrix_view<double>, std::pmr::memory_resource*);       \
    EXTERN template void gemm<T>(const cpu&, T, matrix_view<const T>, matrix_view<const T>, T, matrix_view<T>);        \
    EXTERN template double squared_norm<T>(const cpu&, matrix_view<const T>);                                          \
    EXTERN template void fill_normal<T>(const cpu&, const random_stream&, matrix_view<T>);                             \
    EXTERN template qr_factors<T> factor_qr<T>(const cpu&, matrix_view<const T>, std::string_view);                    \
    EXTERN template void multiply_q<T>(const cpu&, const qr_factors<T>&, matrix_view<const double>, matrix_view<T>);   \
    EXTERN template void multiply_small<T>(                                                                            \
        const cpu&, matrix_view<const T>, matrix_view<const double>, matrix_view<T>);                                  \
    EXTERN template matrix<T> orthonormal_basis<T>(const cpu&, matrix_view<const T>, std::string_view);

#define TASKVEC_COMPILED_FACTORED_SVD(EXTERN, T)                                                                       \
    EXTERN template class detail::factored_core<T, cpu>;                                                               \
    EXTERN template factored_svd_result<T> detail::factored_core<T, cpu>::finish<small_svd_result>(                    \
        const cpu&, small_svd_result&&, const rank_choice&, detail::factor_place) const;                               \
    EXTERN template factored_svd_result<T> detail::factored_svd_in<T, cpu>(                                            \
        const cpu&, const factor_pair<T>&, const rank_choice&, detail::factor_place);                                  \
    EXTERN template std::vector<factored_svd_result<T>> factored_svd<T, cpu>(                                          \
        const cpu&, std::span<const factor_pair<T>>, const rank_choice&);                                              \
    EXTERN template stacked_factors<T> detail::stack_factors_in<T>(                                                    \
        std::span<const factor_pair<T>>, std::string_view, std::pmr::memory_resource*);

#define TASKVEC_COMPILED_RANDOMIZED_SVD(EXTERN, T)                                                                     \
    EXTERN template randomized_svd_result<T> detail::sampled_svd<T, cpu>(                                              \
        const cpu&, matrix_view<const T>, const randomized_svd_options&, detail::factor_place);

#define TASKVEC_COMPILED_TRUNCATED_SVD(EXTERN, T)                                                                      \
    EXTERN template bool detail::divide_and_conquer<T>(                                                                \
        matrix_view<const T>, matrix<T>&, std::vector<double>&, matrix<T>&, std::pmr::memory_resource*);               \
    EXTERN template truncated_svd_result<T> detail::exact_svd<T>(                                                      \
        const cpu&, matrix_view<const T>, const rank_choice&, std::string_view, detail::factor_place);

#define TASKVEC_COMPILED_LEADING_SVD(EXTERN)                                                                           \
    EXTERN template bool detail::leading_eigenvectors<0>(                                                              \
        matrix_view<const double>, std::size_t, std::vector<double>&, matrix<double>&, std::pmr::memory_resource*);    \
    EXTERN template std::optional<svd_result<float>> detail::lanczos_svd<0>(                                           \
        const cpu&, matrix_view<const float>, std::size_t, double, std::string_view, detail::factor_place);            \
    EXTERN template svd_result<float> detail::few_triples<float>(                                                      \
        const cpu&, matrix_view<const float>, const rank_choice&, std::string_view, detail::factor_place);
