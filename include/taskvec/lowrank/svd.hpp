// What every singular value decomposition here returns, how a rank is chosen, and how an approximation is measured.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/backend/linalg.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <span>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How many singular triples are kept: a number, or as many as a share of the energy Σσ² needs. Exactly one is given.
///
///     rank_choice{.rank = 16}      rank_choice{.energy = 0.99}
struct rank_choice {
    std::size_t rank = 0; ///< this many
    double energy = 0; ///< or the smallest rank whose σ² sum to this share of all, 0 < energy ≤ 1
    bool clamp = false; ///< lower a rank above the largest possible one to it; otherwise that is an error

    /// Everything there is.
    [[nodiscard]] static constexpr rank_choice full() noexcept { return {.rank = std::numeric_limits<std::size_t>::max(), .clamp = true}; }
};

/// The best (or, where randomized, a nearly best) rank-q approximation of a matrix A: u·diag(sigma)·vᵀ.
template <arithmetic_element T>
struct svd_result {
    matrix<T> u; ///< m×q, orthonormal columns; the largest entry of each is positive
    std::vector<double> sigma; ///< q values, descending
    matrix<T> v; ///< n×q, orthonormal columns
    double squared_norm = 0; ///< ‖A‖²_F
    double squared_error = 0; ///< ‖A − u·diag(sigma)·vᵀ‖²_F

    [[nodiscard]] std::size_t rank() const noexcept { return sigma.size(); }
    /// ‖A − Aq‖_F / ‖A‖_F; 0 for a zero matrix.
    [[nodiscard]] double relative_error() const noexcept { return squared_norm > 0 ? std::sqrt(squared_error / squared_norm) : 0; }
    /// The share of ‖A‖²_F that is kept; 1 for a zero matrix.
    [[nodiscard]] double energy() const noexcept { return squared_norm > 0 ? 1 - squared_error / squared_norm : 1; }
};

/// The smallest rank, at least 1, whose leading σ² sum to `energy` of the total; `sigma` descending. 0 for an empty list.
///
///     rank_for_energy(std::vector{3.0, 1.0}, 0.9) == 1   // 9 of 10
[[nodiscard]] inline std::size_t rank_for_energy(std::span<const double> sigma, double energy)
{
    if (!(energy > 0 && energy <= 1)) { raise<invalid_argument>(message("energy is ", energy, "; expected a share above 0 and at most 1")); }
    if (sigma.empty()) { return 0; }
    std::vector<double> tail(sigma.size() + 1, 0.0); // tail sums from the small end lose nothing
    for (std::size_t i = sigma.size(); i-- > 0;) { tail[i] = tail[i + 1] + sigma[i] * sigma[i]; }
    const double allowed = energy < 1 ? tail[0] - energy * tail[0] : 0;
    std::size_t rank = 1;
    while (rank < sigma.size() && tail[rank] > allowed) { ++rank; }
    return rank;
}

/// Σσ² beyond the first `rank` values, added from the small end.
[[nodiscard]] inline double energy_beyond(std::span<const double> sigma, std::size_t rank)
{
    double sum = 0;
    for (std::size_t i = sigma.size(); i-- > rank;) { sum += sigma[i] * sigma[i]; }
    return sum;
}

namespace detail {

/// Checks a choice before any work; `largest` is the rank that the matrix can have at most.
inline void check_rank(const rank_choice& choice, std::size_t largest, std::string_view what)
{
    if (choice.energy != 0) {
        if (choice.rank != 0) { raise<invalid_argument>(message("'", what, "': both a rank and an energy are given; give one of them")); }
        if (!(choice.energy > 0 && choice.energy <= 1)) {
            raise<invalid_argument>(message("'", what, "': energy is ", choice.energy, "; expected a share above 0 and at most 1"));
        }
        return;
    }
    if (choice.rank == 0) { raise<invalid_argument>(message("'", what, "': rank 0 asked for; give a rank from 1 to ", largest, ", or an energy")); }
    if (choice.rank > largest && !choice.clamp) {
        raise<invalid_argument>(
            message("'", what, "': rank ", choice.rank, " asked for, but its rank is at most ", largest, "; ask for less, or for clamping"));
    }
}

[[nodiscard]] inline std::size_t chosen_rank(const rank_choice& choice, std::span<const double> sigma)
{
    return choice.energy != 0 ? rank_for_energy(sigma, choice.energy) : std::min(choice.rank, sigma.size());
}

/// The matrix in its arithmetic type: as it is, or a converted copy kept in `copy`.
template <storage_element T>
[[nodiscard]] matrix_view<const arithmetic_type<T>> in_arithmetic(matrix_view<const T> a, matrix<arithmetic_type<T>>& copy)
{
    if constexpr (arithmetic_element<T>) { return a; }
    else {
        copy = matrix<float>(a.rows(), a.cols(), a.order());
        const bool by_rows = a.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? a.rows() : a.cols(), length = by_rows ? a.cols() : a.rows();
        for (std::size_t k = 0; k < runs; ++k) {
            for (std::size_t i = 0; i < length; ++i) { copy.data()[k * length + i] = widen<float>(a.data()[k * a.stride() + i]); }
        }
        return copy;
    }
}

/// The first `count` columns of a small f64 matrix.
[[nodiscard]] inline matrix_view<const double> leading(const matrix<double>& x, std::size_t count)
{
    return x.view().left_columns(count);
}

/// The first `count` columns of a column-major matrix.
template <class T>
[[nodiscard]] matrix<T> left_part(matrix<T> x, std::size_t count)
{
    if (count == x.cols()) { return x; }
    matrix<T> part(x.rows(), count);
    std::copy_n(x.data(), part.size(), part.data());
    return part;
}

} // namespace detail

/// ‖A − u·diag(sigma)·vᵀ‖²_F computed entry by entry, block by block: exact to rounding, whatever the factors are.
/// A is m×n, u m×q, v n×q. Cost: one read of A and 2·m·n·q flops; scratch of 256 rows of A for each thread.
template <arithmetic_element T>
[[nodiscard]] double squared_residual(const cpu& policy, matrix_view<const T> a, std::type_identity_t<matrix_view<const T>> u, std::span<const double> sigma,
    std::type_identity_t<matrix_view<const T>> v)
{
    const std::size_t m = a.rows(), n = a.cols(), q = sigma.size();
    if (u.rows() != m || v.rows() != n || u.cols() != q || v.cols() != q) {
        raise<shape_mismatch>(message("squared_residual: A is ", m, "×", n, ", u ", u.rows(), "×", u.cols(), ", v ", v.rows(), "×", v.cols(), ", sigma ", q));
    }
    constexpr std::size_t piece = 256;
    std::vector<double> part((m + piece - 1) / piece, 0.0);
    const cpu inside = sequential(policy);
    for_each_index(policy, part.size(), [&](std::size_t index, std::size_t) {
        const std::size_t first = index * piece, count = std::min(piece, m - first);
        matrix<T> rest(count, n, a.order(), memory_of(policy)), scaled(count, q, matrix_order::column_major, memory_of(policy));
        for (std::size_t j = 0; j < q; ++j) {
            for (std::size_t i = 0; i < count; ++i) { scaled(i, j) = static_cast<T>(static_cast<double>(u(first + i, j)) * sigma[j]); }
        }
        for (std::size_t j = 0; j < (a.order() == matrix_order::row_major ? count : n); ++j) {
            const auto run = a.order() == matrix_order::row_major ? a.block(first + j, 0, 1, n) : a.block(first, j, count, 1);
            std::copy_n(run.data(), run.size(), rest.data() + j * run.size());
        }
        gemm(inside, T(-1), scaled.view(), v.transposed(), T(1), rest.view());
        part[index] = squared_norm<T>(inside, rest.view());
    });
    return std::accumulate(part.begin(), part.end(), 0.0);
}

} // namespace taskvec::inline TASKVEC_ABI
