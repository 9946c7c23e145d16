// The SVD of a product A·Bᵀ from its factors: two thin QRs and a small core, never the product itself.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/lowrank/svd.hpp>

#include <cstddef>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A product weight·A·Bᵀ that is held by its factors: A is m×r, B is n×r.
template <storage_element T, memory_space S = memory_space::host>
struct factor_pair {
    matrix_view<const T, S> a{};
    matrix_view<const T, S> b{};
    double weight = 1;
    std::string_view name{}; ///< for errors
};

/// What factored_svd() returns: also all singular values of the product, from which the error is known exactly.
template <arithmetic_element T>
struct factored_svd_result : svd_result<T> {
    std::vector<double> spectrum; ///< every singular value that A·Bᵀ can have nonzero, descending
};

/// The leading singular triples of P = A·Bᵀ, exactly: A = Qa·Ra, B = Qb·Rb, and the SVD of the small core Ra·Rbᵀ.
/// A is m×r, B is n×r, in either order and of the storage types f64, f32, bf16, f16 (16-bit factors are computed in f32).
/// σ is right to 1e-7·‖A‖·‖B‖ for f32 (1e-14·r for f64); u and v are orthonormal to rounding; squared_error is the tail of
/// σ² (Eckart and Young 1936). The product (m×n) is never formed.
/// Throws shape_mismatch where the inner ranks differ, invalid_argument for a rank of 0 or above min(m, n, r), nonfinite_error.
/// Cost: (m + n)·r² + O(r³) flops, scratch O(r²).
///
///     auto best = factored_svd(cpu{}, a, b, {.rank = 16});
///     double lost = best.relative_error();
template <storage_element T>
[[nodiscard]] factored_svd_result<arithmetic_type<T>> factored_svd(const cpu& policy, const factor_pair<T>& p, const rank_choice& choice)
{
    using A = arithmetic_type<T>;
    const std::string_view what = p.name.empty() ? std::string_view("A·Bᵀ") : p.name;
    const std::size_t m = p.a.rows(), n = p.b.rows();
    if (p.a.cols() != p.b.cols()) {
        raise<shape_mismatch>(message("'", what, "': A is ", m, "×", p.a.cols(), " and B is ", n, "×", p.b.cols(), "; the inner ranks differ"));
    }
    if (!std::isfinite(p.weight)) { raise<nonfinite_error>(message("'", what, "': its weight is not finite")); }
    detail::check_rank(choice, std::min({m, n, p.a.cols()}), what);
    factored_svd_result<A> result;
    if (p.a.empty() || p.b.empty()) {
        result.u = matrix<A>(m, 0);
        result.v = matrix<A>(n, 0);
        return result;
    }
    matrix<A> a_copy, b_copy;
    const auto fa = factor_qr<A>(policy, detail::in_arithmetic(p.a, a_copy), what);
    const auto fb = factor_qr<A>(policy, detail::in_arithmetic(p.b, b_copy), what);
    matrix<double> core(fa.r.rows(), fb.r.rows());
    gemm(policy, p.weight, fa.r.view(), fb.r.view().transposed(), 0.0, core.view());
    small_svd_result small_core = small_svd(policy, core);

    result.spectrum = std::move(small_core.sigma);
    const std::size_t q = detail::chosen_rank(choice, result.spectrum);
    result.sigma.assign(result.spectrum.begin(), result.spectrum.begin() + static_cast<std::ptrdiff_t>(q));
    result.squared_norm = energy_beyond(result.spectrum, 0);
    result.squared_error = energy_beyond(result.spectrum, q);
    result.u = matrix<A>(m, q);
    result.v = matrix<A>(n, q);
    multiply_q<A>(policy, fa, detail::leading(small_core.u, q), result.u);
    multiply_q<A>(policy, fb, detail::leading(small_core.v, q), result.v);
    orient<A>(policy, result.u, result.v);
    return result;
}

template <storage_element T>
[[nodiscard]] auto factored_svd(const cpu& policy, matrix_view<const T> a, std::type_identity_t<matrix_view<const T>> b, const rank_choice& choice)
{
    return factored_svd(policy, factor_pair<T>{.a = a, .b = b}, choice);
}

/// Many layers at once: layer i of the result belongs to pairs[i]. Layers run in parallel, one thread inside each, and
/// the result does not depend on the number of threads.
template <storage_element T>
[[nodiscard]] auto factored_svd(const cpu& policy, std::span<const factor_pair<T>> pairs, const rank_choice& choice)
{
    std::vector<factored_svd_result<arithmetic_type<T>>> results(pairs.size());
    detail::progress_meter meter(policy, "svd", pairs.size());
    const cpu inside = sequential(policy);
    for_each_index(policy, pairs.size(), [&](std::size_t i, std::size_t) {
        results[i] = factored_svd(inside, pairs[i], choice);
        if (!meter.advance(1)) { raise<cancelled>(); }
    });
    return results;
}

/// Σ weightᵢ·Aᵢ·Bᵢᵀ as one pair of factors: the Aᵢ side by side, each times its weight, and the Bᵢ side by side. Exact but for
/// the rounding of weightᵢ·Aᵢ.
template <arithmetic_element T>
struct stacked_factors {
    matrix<T> a; ///< m×R, R the sum of the ranks
    matrix<T> b; ///< n×R

    [[nodiscard]] factor_pair<T> pair(std::string_view name = {}) const { return {.a = a.view(), .b = b.view(), .name = name}; }
};

/// Stacks pairs of the same m and n; their ranks may differ. Throws shape_mismatch, and invalid_argument for an empty list.
template <storage_element T>
[[nodiscard]] stacked_factors<arithmetic_type<T>> stack_factors(std::span<const factor_pair<T>> pairs, std::string_view what = "the sum")
{
    using A = arithmetic_type<T>;
    if (pairs.empty()) { raise<invalid_argument>(message("'", what, "': no factor pairs to add")); }
    const std::size_t m = pairs[0].a.rows(), n = pairs[0].b.rows();
    std::size_t total = 0;
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        const auto& [a, b, weight, name] = pairs[i];
        if (a.rows() != m || b.rows() != n || a.cols() != b.cols()) {
            raise<shape_mismatch>(message("'", what, "': pair ", i, " is ", a.rows(), "×", a.cols(), " and ", b.rows(), "×", b.cols(), "; expected ", m,
                "×r and ", n, "×r, as in pair 0"));
        }
        if (!std::isfinite(weight)) { raise<nonfinite_error>(message("'", what, "': the weight of pair ", i, " is not finite")); }
        total += a.cols();
    }
    stacked_factors<A> sum{matrix<A>(m, total), matrix<A>(n, total)};
    std::size_t at = 0;
    for (const auto& pair : pairs) {
        const A weight = static_cast<A>(pair.weight);
        for (std::size_t k = 0; k < pair.a.cols(); ++k, ++at) {
            for (std::size_t i = 0; i < m; ++i) { sum.a(i, at) = weight * widen<A>(pair.a(i, k)); }
            for (std::size_t i = 0; i < n; ++i) { sum.b(i, at) = widen<A>(pair.b(i, k)); }
        }
    }
    return sum;
}

/// The best approximation of Σ weightᵢ·Aᵢ·Bᵢᵀ (ranks may differ) by rank q: the stacked factors through factored_svd(), with
/// the exact error. Same types, errors and cost as factored_svd() with r the sum of the ranks; a rank above that sum, or
/// above m or n, is an error unless clamped.
///
///     std::array pairs{factor_pair<float>{.a = a1, .b = b1, .weight = 0.5}, factor_pair<float>{.a = a2, .b = b2, .weight = 0.5}};
///     auto merged = compress_sum(cpu{}, std::span<const factor_pair<float>>(pairs), {.rank = 16});
template <storage_element T>
[[nodiscard]] factored_svd_result<arithmetic_type<T>> compress_sum(
    const cpu& policy, std::span<const factor_pair<T>> pairs, const rank_choice& choice, std::string_view what = "the sum")
{
    const auto sum = stack_factors<T>(pairs, what);
    return factored_svd(policy, sum.pair(what), choice);
}

} // namespace taskvec::inline TASKVEC_ABI
