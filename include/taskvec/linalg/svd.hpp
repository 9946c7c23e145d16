// What every singular value decomposition here returns, how a rank is chosen, and how an approximation is measured.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/option_table.hpp>
#include <taskvec/fwd.hpp>
#include <taskvec/linalg/eigen.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <string_view>
#include <type_traits>
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
    [[nodiscard]] static constexpr rank_choice full() noexcept
    {
        return {.rank = std::numeric_limits<std::size_t>::max(), .clamp = true};
    }
};

template <>
struct options_of<rank_choice> {
    static constexpr option_table table{option_row("rank", &rank_choice::rank, "how many singular triples are kept"),
        option_row("energy", &rank_choice::energy, "or the share of the squared singular values to keep",
            {.at_least = 0, .at_most = 1}),
        option_row("clamp", &rank_choice::clamp, "lower a rank that is too high to the highest there is")};
};

/// The best (or, where randomized, a nearly best) rank-q approximation of a matrix A: u·diag(sigma)·vᵀ.
/// The factors are in the memory space that A was in; σ is always on the host.
template <arithmetic_element T, memory_space S>
struct svd_result {
    matrix<T, S> u; ///< m×q, orthonormal columns; the largest entry of each is positive
    std::vector<double> sigma; ///< q values, descending
    matrix<T, S> v; ///< n×q, orthonormal columns
    double squared_norm = 0; ///< ‖A‖²_F
    double squared_error = 0; ///< ‖A − u·diag(sigma)·vᵀ‖²_F

    /// q, the number of triples.
    [[nodiscard]] std::size_t rank() const noexcept { return sigma.size(); }
    /// ‖A − Aq‖_F / ‖A‖_F; 0 for a zero matrix.
    [[nodiscard]] double relative_error() const noexcept
    {
        return squared_norm > 0 ? std::sqrt(squared_error / squared_norm) : 0;
    }
    /// The share of ‖A‖²_F that is kept; 1 for a zero matrix.
    [[nodiscard]] double energy() const noexcept { return squared_norm > 0 ? 1 - squared_error / squared_norm : 1; }
};

/// The smallest rank, at least 1, whose leading σ² sum to `energy` of the total; `sigma` descending. 0 for an empty
/// list.
///
///     rank_for_energy(std::vector{3.0, 1.0}, 0.9) == 1   // 9 of 10
[[nodiscard]] inline std::size_t rank_for_energy(std::span<const double> sigma, double energy)
{
    if (!(energy > 0 && energy <= 1)) {
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("energy is ", energy, "; expected a share above 0 and at most 1"));
    }
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

/// ‖A − u·diag(sigma)·vᵀ‖²_F computed entry by entry, block by block: exact to rounding, whatever the factors are.
/// A is m×n, u m×q, v n×q. Cost: one read of A and 2·m·n·q flops; scratch of 256 rows of A for each thread (4,096 on a
/// device).
template <arithmetic_element T, linear_algebra_policy P>
[[nodiscard]] double squared_residual(const P& policy, matrix_view<const T, P::space> a,
    std::type_identity_t<matrix_view<const T, P::space>> u, std::span<const double> sigma,
    std::type_identity_t<matrix_view<const T, P::space>> v);

namespace detail {

/// Checks a choice before any work; `largest` is the highest rank that there is, and `label` and `owner` begin the
/// sentences.
inline void check_rank_of(
    const rank_choice& choice, std::size_t largest, std::string_view label, std::string_view owner)
{
    if (choice.energy != 0) {
        if (choice.rank != 0) {
            raise<invalid_argument>(
                error_code::rank_choice, message(label, ": both a rank and an energy are given; give one of them"));
        }
        if (!(choice.energy > 0 && choice.energy <= 1)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message(label, ": energy is ", choice.energy, "; expected a share above 0 and at most 1"));
        }
        return;
    }
    if (choice.rank == 0) {
        raise<invalid_argument>(error_code::rank_out_of_range,
            message(label, ": rank 0 asked for; give a rank from 1 to ", largest, ", or an energy"));
    }
    if (choice.rank > largest && !choice.clamp) {
        raise<invalid_argument>(error_code::rank_out_of_range,
            message(label, ": rank ", choice.rank, " asked for, but ", owner, " at most ", largest,
                "; ask for less, or for clamping"));
    }
}
/// For one matrix, that may be called `what`.
inline void check_rank(const rank_choice& choice, std::size_t largest, std::string_view what)
{
    check_rank_of(choice, largest, message("'", what, "'"), "its rank is");
}
/// For layers that share a choice: what has a smaller rank than some other layer is kept whole.
inline void check_layer_ranks(const rank_choice& choice, std::size_t largest, std::string_view label)
{
    check_rank_of(choice, largest, label, "the ranks of its layers are");
}

[[nodiscard]] inline std::size_t chosen_rank(const rank_choice& choice, std::span<const double> sigma)
{
    return choice.energy != 0 ? rank_for_energy(sigma, choice.energy) : std::min(choice.rank, sigma.size());
}

/// Where a decomposition puts its factors: in memory of their own, for the caller to keep, or among the policy's
/// scratch, for an algorithm that makes something else of them.
enum class factor_place : std::uint8_t { kept, scratch };

/// A zero matrix there.
template <arithmetic_element T, linear_algebra_policy P>
[[nodiscard]] matrix<T, P::space> placed_matrix(const P& policy, std::size_t rows, std::size_t cols, factor_place place)
{
    return place == factor_place::kept ? result_matrix<T>(policy, rows, cols) : scratch_matrix<T>(policy, rows, cols);
}

/// The first `count` columns of a scratch matrix, as a matrix of its own.
template <arithmetic_element T, linear_algebra_policy P>
[[nodiscard]] matrix<T, P::space> left_part(
    const P& policy, matrix<T, P::space> x, std::size_t count, factor_place place)
{
    if (place == factor_place::scratch && count == x.cols()) { return x; }
    auto part = placed_matrix<T>(policy, x.rows(), count, place);
    copy_matrix<T>(policy, x.view().left_columns(count), part.view());
    return part;
}

} // namespace detail

template <arithmetic_element T, linear_algebra_policy P>
double squared_residual(const P& policy, matrix_view<const T, P::space> a,
    std::type_identity_t<matrix_view<const T, P::space>> u, std::span<const double> sigma,
    std::type_identity_t<matrix_view<const T, P::space>> v)
{
    const std::size_t m = a.rows(), n = a.cols(), q = sigma.size();
    if (u.rows() != m || v.rows() != n || u.cols() != q || v.cols() != q) {
        raise<shape_mismatch>(error_code::matrix_shape,
            message("squared_residual: A is ", m, "×", n, ", u ", u.rows(), "×", u.cols(), ", v ", v.rows(), "×",
                v.cols(), ", sigma ", q));
    }
    constexpr std::size_t piece = P::space == memory_space::host ? 256 : 4096;
    std::vector<double> part((m + piece - 1) / piece, 0.0);
    for_each_piece(policy, part.size(), [&](const P& inside, std::size_t index) {
        const std::size_t first = index * piece, count = std::min(piece, m - first);
        auto rest = scratch_matrix<T>(inside, count, n, a.order());
        auto scaled = scratch_matrix<T>(inside, count, q, matrix_order::column_major);
        scale_columns<T>(inside, u.block(first, 0, count, q), sigma, scaled.view());
        copy_matrix<T>(inside, a.block(first, 0, count, n), rest.view());
        gemm<T>(inside, T(-1), scaled.view(), v.transposed(), T(1), rest.view());
        part[index] = squared_norm<T>(inside, rest.view());
    });
    return std::accumulate(part.begin(), part.end(), 0.0);
}

} // namespace taskvec::inline TASKVEC_ABI
