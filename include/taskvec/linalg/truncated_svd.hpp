// The exact leading singular triples of a dense matrix, by Eigen's divide-and-conquer SVD.
// SPDX-License-Identifier: Apache-2.0
//
// The one algorithm that compiles a large decomposition, once for f32 and once for f64: about 20 s and 1 GB each with
// g++ 12, paid by a file that calls it, or once in all by linking taskvec::compiled. leading_svd() finds a few triples
// of an f32 matrix as exactly in a fraction of the time; randomized_svd() does, nearly exactly, by shares of the energy
// too, and factored_svd() where the matrix is a product.
#pragma once

#include <taskvec/compiled/linalg.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/linalg/leading_svd.hpp>
#include <taskvec/linalg/svd.hpp>
#include <taskvec/linalg/wrong_call.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <memory_resource>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What truncated_svd() returns: also the singular values that were cut off.
template <arithmetic_element T>
struct truncated_svd_result : svd_result<T> {
    std::vector<double> spectrum; ///< all min(m, n) singular values, descending
};

namespace detail {

/// A = u·σ·vᵀ by divide and conquer; false where Eigen gives up. Defined in compiled/divide_and_conquer.hpp.
template <class T>
bool divide_and_conquer(
    matrix_view<const T> a, matrix<T>& u, std::vector<double>& sigma, matrix<T>& v, std::pmr::memory_resource* memory);

template <storage_element S>
[[nodiscard]] truncated_svd_result<arithmetic_type<S>> exact_svd(
    const cpu& policy, matrix_view<const S> input, const rank_choice& choice, std::string_view what, factor_place place)
{
    using T = arithmetic_type<S>;
    const std::size_t m = input.rows(), n = input.cols(), least = std::min(m, n);
    check_rank(choice, least, what);
    truncated_svd_result<T> result;
    if (least == 0) {
        result.u = placed_matrix<T>(policy, m, 0, place);
        result.v = placed_matrix<T>(policy, n, 0, place);
        return result;
    }
    if (m < n) {
        result = exact_svd(policy, input.transposed(), choice, what, place);
        std::swap(result.u, result.v);
        orient<T>(policy, result.u, result.v);
        return result;
    }
    matrix<T> copy;
    const matrix_view<const T> a = in_arithmetic(policy, input, copy);
    if (!std::isfinite(squared_norm<T>(policy, a))) { blame_nonfinite(a, what); }

    const auto failed = [&] {
        raise<backend_error>(error_code::no_convergence,
            message("no convergence for matrix '", what, "'; try randomized_svd()"), "Eigen::BDCSVD", 1);
    };
    constexpr std::size_t jacobi_limit = 96;
    if (m >= 2 * n || n <= jacobi_limit) {
        const auto f = factor_qr<T>(policy, a, what);
        matrix<double> left, right;
        if (n <= jacobi_limit) {
            small_svd_result core = small_svd(policy, f.r);
            left = std::move(core.u);
            right = std::move(core.v);
            result.spectrum = std::move(core.sigma);
        }
        else {
            auto r = scratch_matrix<T>(policy, f.r.rows(), n);
            matrix<T> u, v;
            std::transform(f.r.data(), f.r.data() + f.r.size(), r.data(), [](double x) { return static_cast<T>(x); });
            if (!divide_and_conquer<T>(r.view(), u, result.spectrum, v, memory_of(policy))) { failed(); }
            left = scratch_matrix<double>(policy, u.rows(), u.cols());
            right = scratch_matrix<double>(policy, v.rows(), v.cols());
            std::copy_n(u.data(), u.size(), left.data());
            std::copy_n(v.data(), v.size(), right.data());
        }
        const std::size_t q = chosen_rank(choice, result.spectrum);
        result.u = placed_matrix<T>(policy, m, q, place);
        result.v = placed_matrix<T>(policy, n, q, place);
        multiply_q<T>(policy, f, std::as_const(left).view().left_columns(q), result.u);
        std::transform(right.data(), right.data() + n * q, result.v.data(), [](double x) { return static_cast<T>(x); });
    }
    else {
        matrix<T> u, v;
        if (!divide_and_conquer<T>(a, u, result.spectrum, v, memory_of(policy))) { failed(); }
        const std::size_t q = chosen_rank(choice, result.spectrum);
        result.u = left_part<T>(policy, std::move(u), q, place);
        result.v = left_part<T>(policy, std::move(v), q, place);
    }
    const std::size_t q = result.u.cols();
    result.sigma.assign(result.spectrum.begin(), result.spectrum.begin() + static_cast<std::ptrdiff_t>(q));
    result.squared_norm = energy_beyond(result.spectrum, 0);
    result.squared_error = energy_beyond(result.spectrum, q);
    orient<T>(policy, result.u, result.v);
    return result;
}

} // namespace detail

/// The leading singular triples of a dense m×n matrix A (either order; f64, f32, bf16 or f16, the 16-bit types
/// converted to f32), exactly: σ to about min(m, n)·ε·σ₁, u and v orthonormal to rounding and their spaces right to
/// about four times that error divided by the gap σq − σq+1 (Wedin 1972), squared_error the tail of σ². A matrix at
/// least twice as tall as wide (or as wide as tall) is first reduced by a thin QR; up to 96 columns the core is then
/// decomposed by one-sided Jacobi. Throws invalid_argument for a rank of 0 or above min(m, n), nonfinite_error,
/// backend_error where Eigen fails. Cost: O(m·n·min(m, n)), about 20 s for 4096×4096 f32 on one core; memory for three
/// copies of A, of which those that Eigen makes come from malloc.
///
///     auto s = truncated_svd(cpu{}, weight, {.energy = 0.9});
template <storage_element S>
[[nodiscard]] truncated_svd_result<arithmetic_type<S>> truncated_svd(
    const cpu& policy, matrix_view<const S> input, const rank_choice& choice, std::string_view what = "A")
{
    return detail::exact_svd(policy, input, choice, what, detail::factor_place::kept);
}

/// The same of a matrix that owns its elements, or of a view of mutable ones.
template <detail::other_matrix<memory_space::host> X>
[[nodiscard]] auto truncated_svd(
    const cpu& policy, const X& input, const rank_choice& choice, std::string_view what = "A")
{
    using S = detail::matrix_element_of<X, memory_space::host>;
    return truncated_svd<S>(policy, matrix_view<const S>(input), choice, what);
}
template <detail::no_matrix<memory_space::host> X>
auto truncated_svd(const cpu&, const X&, const rank_choice&, std::string_view = {})
{
    detail::refuse_matrix<cpu, X>();
}

namespace detail {

/// What truncated_svd() finds, without the spectrum: a few triples of a large f32 matrix by lanczos_svd().
template <storage_element S>
[[nodiscard]] svd_result<arithmetic_type<S>> few_triples(
    const cpu& policy, matrix_view<const S> input, const rank_choice& choice, std::string_view what, factor_place place)
{
    using T = arithmetic_type<S>;
    if constexpr (std::same_as<T, float>) {
        const std::size_t least = std::min(input.rows(), input.cols());
        check_rank(choice, least, what);
        if (choice.energy == 0 && lanczos_sizes(std::min(choice.rank, least), least).fit()) {
            matrix<T> copy;
            const matrix_view<const T> a = in_arithmetic(policy, input, copy);
            const double norm = squared_norm<T>(policy, a);
            if (norm > 0 && std::isfinite(norm)) {
                if (auto found = lanczos_svd<>(policy, a, choice.rank, norm, what, place)) { return *std::move(found); }
            }
        }
    }
    return exact_svd<S>(policy, input, choice, what, place);
}

} // namespace detail

/// The same triples as truncated_svd() of a dense m×n matrix finds, to the same accuracy, without the spectrum: where a
/// rank of up to about min(m, n)/12 less 8 is asked for, f32 and 16-bit matrices take a block Lanczos iteration on
/// every thread of the policy (linalg/leading_svd.hpp), which is several times faster and falls back to the whole
/// decomposition where it does not come to an end; all else takes that at once. squared_error is ‖A‖² − Σσ², or, where
/// that would cancel, the residual itself. Throws what truncated_svd() throws. Cost: 4 to 10 times two products of A
/// with rank + 8 columns where singular values fall, about 28 times on noise; memory for two copies of A at most.
///
///     auto s = leading_svd(cpu{}, weight, {.rank = 16});
template <storage_element S>
[[nodiscard]] svd_result<arithmetic_type<S>> leading_svd(
    const cpu& policy, matrix_view<const S> input, const rank_choice& choice, std::string_view what = "A")
{
    return detail::few_triples<S>(policy, input, choice, what, detail::factor_place::kept);
}

/// The same of a matrix that owns its elements, or of a view of mutable ones.
template <detail::other_matrix<memory_space::host> X>
[[nodiscard]] auto leading_svd(
    const cpu& policy, const X& input, const rank_choice& choice, std::string_view what = "A")
{
    using S = detail::matrix_element_of<X, memory_space::host>;
    return leading_svd<S>(policy, matrix_view<const S>(input), choice, what);
}
template <detail::no_matrix<memory_space::host> X>
auto leading_svd(const cpu&, const X&, const rank_choice&, std::string_view = {})
{
    detail::refuse_matrix<cpu, X>();
}

/// leading_svd() as a way to decompose layers, for algorithms that take one.
struct decompose_exactly {
    /// Leading_svd() with what `choice` asks for, whose factors lie in the policy's scratch memory.
    template <arithmetic_element T>
    [[nodiscard]] svd_result<T> operator()(
        const cpu& policy, matrix_view<const T> a, const rank_choice& choice, std::string_view name) const
    {
        return detail::few_triples<T>(policy, a, choice, name, detail::factor_place::scratch);
    }
};

// Wrong calls, one sentence each; options in braces are of no type that could be asked for.
TASKVEC_WRONG_CALLS(cpu, truncated_svd, any_arguments, "truncated_svd(policy, matrix, {.rank = 16})")
template <detail::no_policy X>
auto truncated_svd(const X&, const rank_choice&)
{
    static_assert(policy<X>,
        "truncated_svd(): the policy is missing before the matrix: truncated_svd(policy, matrix, {.rank = 16})");
    return detail::no_result{};
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_LEADING_SVD(extern)
TASKVEC_COMPILED_TRUNCATED_SVD(extern, float)
TASKVEC_COMPILED_TRUNCATED_SVD(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI

#if !defined(TASKVEC_COMPILED)
#include <taskvec/compiled/divide_and_conquer.hpp>
#include <taskvec/compiled/symmetric_eigen.hpp>
#endif
