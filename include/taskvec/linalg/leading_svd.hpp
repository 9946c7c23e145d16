// The exact leading singular triples of a large f32 matrix without the rest of its spectrum: block Lanczos iteration.
// Golub, Luk, Overton, "A block Lanczos method for computing the singular values and corresponding singular vectors of
// a matrix" (ACM TOMS 1981).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/linalg.hpp>
#include <taskvec/core/random.hpp>
#include <taskvec/linalg/svd.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory_resource>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {

/// The `count` largest eigenvalues of a symmetric k×k matrix, descending, and their vectors (k×count), in `memory`;
/// false where Eigen gives up. Defined in compiled/symmetric_eigen.hpp.
template <int = 0>
bool leading_eigenvectors(matrix_view<const double> g, std::size_t count, std::vector<double>& values,
    matrix<double>& vectors, std::pmr::memory_resource* memory);

/// How large the blocks of the iteration are for the q leading triples, and how large its basis may become. With
/// blocks of at least q columns every copy of a multiple singular value that is among the q is found.
struct lanczos_sizes {
    std::size_t block = 0; ///< columns
    std::size_t most = 0; ///< columns of the basis, after which a full decomposition is cheaper

    lanczos_sizes(std::size_t q, std::size_t least) noexcept
        : block(std::max<std::size_t>(q + 8, 16))
        , most(least / 2)
    { }
    /// Whether there is room for enough blocks to be worth a try.
    [[nodiscard]] bool fit() const noexcept { return 6 * block <= most; }
};

/// The q leading singular triples of A (m×n, finite, not 0), to the accuracy of a full decomposition, or nothing where
/// they do not come out soon enough: the caller then decomposes A in full.
///
/// An orthonormal basis V of the Krylov space of AᵀA and a block of random columns grows by a block a step, each made
/// orthogonal to all before it. The triples are those of A on V, from the leading eigenvectors s of (AV)ᵀ(AV) in f64;
/// their residuals ‖Aᵀu − σv‖ follow from the coupling to the next block, and end the iteration below 16·ε·σ₁.
/// What is returned has its σ and u from A·V·s itself, not from squares. The random columns depend on the name and the
/// sizes alone; the bits do not depend on the number of threads. Cost: a step takes two products of A with a block;
/// 4 to 10 steps where singular values fall, about 28 on noise.
template <int = 0>
[[nodiscard]] std::optional<svd_result<float>> lanczos_svd(const cpu& policy, matrix_view<const float> a, std::size_t q,
    double squared_norm_of_a, std::string_view what, factor_place place)
{
    const std::size_t m = a.rows(), n = a.cols(), least = std::min(m, n);
    const lanczos_sizes sizes(q, least);
    if (!sizes.fit()) { return std::nullopt; }
    const std::size_t b = sizes.block, most = sizes.most / b * b;
    std::pmr::memory_resource* const memory = memory_of(policy);
    auto basis = scratch_matrix<float>(policy, n, most); // V
    auto image = scratch_matrix<double>(policy, m, most); // A·V
    auto square = scratch_matrix<double>(policy, most, most); // (A·V)ᵀ(A·V)
    auto next = scratch_matrix<float>(policy, n, b), product = scratch_matrix<float>(policy, m, b);
    auto along = scratch_matrix<float>(policy, most, b);

    // What is left of `next` beside the first k columns of the basis.
    const auto make_orthogonal = [&](std::size_t k) {
        const auto v = basis.view().left_columns(k);
        const auto c = along.view().block(0, 0, k, b);
        gemm<float>(policy, 1.0F, std::as_const(v).transposed(), next.view(), 0.0F, c);
        gemm<float>(policy, -1.0F, v, c, 1.0F, next.view());
    };

    fill_normal<float>(policy, random_stream(0, 0, what), next.view());
    next = orthonormal_basis<float>(policy, next.view(), what);
    constexpr double tolerance =
        16 * std::numeric_limits<float>::epsilon(); // what rounding in A·V leaves is half of it
    std::vector<double> values;
    matrix<double> vectors;
    double earlier = 0; // the worst residual of the check before
    std::size_t earlier_size = 0, check_at = 4 * b;
    for (std::size_t k = b; k <= most; k += b) {
        copy_matrix<float>(policy, next.view(), basis.view().block(0, k - b, n, b));
        gemm<float>(policy, 1.0F, a, next.view(), 0.0F, product.view());
        const auto fresh = image.view().block(0, k - b, m, b);
        for (std::size_t j = 0; j < b; ++j) {
            for (std::size_t i = 0; i < m; ++i) { fresh(i, j) = static_cast<double>(product(i, j)); }
        }
        gemm<double>(
            policy, 1.0, image.view().left_columns(k).transposed(), fresh, 0.0, square.view().block(0, k - b, k, b));
        for (std::size_t j = k - b; j < k; ++j) {
            for (std::size_t i = 0; i < j; ++i) { square(j, i) = square(i, j); }
        }
        gemm<float>(policy, 1.0F, a.transposed(), product.view(), 0.0F, next.view());
        make_orthogonal(k);
        const bool check = k >= check_at || k + b > most;
        matrix<double> coupling; // of the basis to the next block
        if (check) { coupling = factor_qr<float>(policy, next.view(), what).r; }
        next = orthonormal_basis<float>(policy, next.view(), what);
        make_orthogonal(k); // what rounding left along the basis, which a small remainder magnifies
        next = orthonormal_basis<float>(policy, next.view(), what);
        if (!check) { continue; }

        if (!leading_eigenvectors<>(square.view().block(0, 0, k, k), q, values, vectors, memory)) {
            return std::nullopt;
        }
        if (!(values[0] > 0)) { return std::nullopt; }
        double worst = 0; // of ‖Aᵀu − σv‖, beside σ₁; what rounding makes of σ = 0 stays below the limit
        for (std::size_t j = 0; j < q && values[j] > 4 * tolerance * tolerance * values[0]; ++j) {
            double squares = 0;
            for (std::size_t i = 0; i < b; ++i) {
                double sum = 0;
                for (std::size_t l = 0; l < b; ++l) { sum += coupling(i, l) * vectors(k - b + l, j); }
                squares += sum * sum;
            }
            worst = std::max(worst, std::sqrt(squares / values[j] / values[0]));
        }
        if (worst <= tolerance) {
            const auto v = std::as_const(basis).view().left_columns(k);
            auto right = scratch_matrix<float>(policy, n, q), left = scratch_matrix<float>(policy, m, q);
            multiply_small<float>(policy, v, vectors.view(), right.view());
            gemm<float>(policy, 1.0F, a, right.view(), 0.0F, left.view());
            const auto f = factor_qr<float>(policy, left.view(), what);
            const auto core = small_svd(policy, f.r.view());
            svd_result<float> result;
            result.u = placed_matrix<float>(policy, m, q, place);
            result.v = placed_matrix<float>(policy, n, q, place);
            multiply_q<float>(policy, f, core.u.view(), result.u.view());
            multiply_small<float>(policy, right.view(), core.v.view(), result.v.view());
            result.sigma = core.sigma;
            result.squared_norm = squared_norm_of_a;
            result.squared_error = std::max(0.0, squared_norm_of_a - energy_beyond(result.sigma, 0));
            if (result.squared_error < cancellation_limit<float>(policy) * squared_norm_of_a) {
                result.squared_error =
                    squared_residual<float>(policy, a, result.u.view(), result.sigma, result.v.view());
            }
            orient<float>(policy, result.u.view(), result.v.view());
            return result;
        }
        // Convergence speeds up, to about three times the rate at the beginning: beyond that there is no hope.
        if (earlier_size != 0) {
            const double rate = std::log(earlier / worst) / static_cast<double>(k - earlier_size);
            const double needed = std::log(worst / tolerance) / rate;
            if (!(rate > 0) || static_cast<double>(k) + needed > 3 * static_cast<double>(most)) { return std::nullopt; }
        }
        earlier = worst;
        earlier_size = k;
        check_at = k + std::max(b, k / 3 / b * b);
    }
    return std::nullopt;
}

} // namespace taskvec::inline TASKVEC_ABI::detail
