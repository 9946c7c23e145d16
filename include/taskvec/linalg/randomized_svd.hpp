// Randomized SVD: the leading singular triples of a large matrix from a few products with thin random matrices.
// Halko, Martinsson, Tropp, "Finding structure with randomness" (SIAM Review 2011).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/linalg.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/fwd.hpp>
#include <taskvec/linalg/svd.hpp>
#include <taskvec/linalg/wrong_call.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// One of rank, energy and relative_error is given. With the last two the rank is grown until they hold.
struct randomized_svd_options {
    std::size_t rank = 0; ///< this many triples
    double energy = 0; ///< or enough for this share of ‖A‖²_F, 0 < energy ≤ 1
    double relative_error = 0; ///< or enough for ‖A − Aq‖_F ≤ relative_error·‖A‖_F, 0 < relative_error < 1
    std::size_t max_rank = 0; ///< the growth stops here; 0: min(m, n)
    bool clamp = false; ///< lower a rank above min(m, n) to it; otherwise that is an error
    std::size_t oversampling = 10; ///< further columns of the random sample
    std::size_t power_iterations = 2; ///< products with A·Aᵀ that sharpen the sample, orthonormalised after each factor
    std::uint64_t seed = 0; ///< of the sample
    std::string_view name = "A"; ///< names the matrix in errors and picks its random numbers
};

/// What randomized_svd() returns.
template <arithmetic_element T, memory_space S>
struct randomized_svd_result : svd_result<T, S> {
    bool reached = true; ///< false where max_rank came before the asked energy or relative error
};

/// The leading singular triples of a dense m×n matrix A (either order; f64, f32, bf16 or f16, the 16-bit types
/// converted to f32 first), nearly exactly: sample Y = A·Ω with Ω normal of rank + oversampling columns, sharpen it by
/// power iterations with a QR after every product, and decompose the projection QᵀA. On a spectrum that decays, 2
/// iterations come within 1% of the best error; on a flat one the leading σ fall short by some percent, and more
/// iterations help. squared_error is the true error of what is returned in either case: ‖A‖² − Σσ², or, where that
/// would cancel (relative error below 1e-3; for f32 on a device 0.1), the residual itself, entry by entry. The draw
/// depends on seed, name and shape alone; the result does not depend on the number of threads. Throws invalid_argument,
/// nonfinite_error. Cost: 2 + 2·power_iterations products of A with a thin matrix, one read for ‖A‖.
///
///     auto s = randomized_svd(cpu{}, weight, {.rank = 16, .seed = 1});
template <storage_element S, linear_algebra_policy P>
[[nodiscard]] randomized_svd_result<arithmetic_type<S>, P::space> randomized_svd(
    const P& policy, matrix_view<const S, P::space> input, const randomized_svd_options& options);

namespace detail {

/// randomized_svd(), see there.
template <storage_element S, linear_algebra_policy P>
[[nodiscard]] randomized_svd_result<arithmetic_type<S>, P::space> sampled_svd(
    const P& policy, matrix_view<const S, P::space> input, const randomized_svd_options& options, factor_place place)
{
    using T = arithmetic_type<S>;
    const std::size_t m = input.rows(), n = input.cols(), least = std::min(m, n);
    const std::string_view what = options.name;
    if ((options.rank != 0) + (options.energy != 0) + (options.relative_error != 0) > 1) {
        raise<invalid_argument>(
            error_code::rank_choice, message("'", what, "': give one of rank, energy and relative_error, not several"));
    }
    if (options.relative_error != 0 && !(options.relative_error > 0 && options.relative_error < 1)) {
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("'", what, "': relative_error is ", options.relative_error, "; expected a number between 0 and 1"));
    }
    const bool grows = options.energy != 0 || options.relative_error != 0;
    if (options.relative_error == 0) {
        detail::check_rank({.rank = options.rank, .energy = options.energy, .clamp = options.clamp}, least, what);
    }
    randomized_svd_result<T, P::space> result;
    if (least == 0) {
        result.u = placed_matrix<T>(policy, m, 0, place);
        result.v = placed_matrix<T>(policy, n, 0, place);
        return result;
    }
    matrix<T, P::space> copy;
    const matrix_view<const T, P::space> a = in_arithmetic(policy, input, copy);
    result.squared_norm = squared_norm<T>(policy, a);
    if (!std::isfinite(result.squared_norm)) {
        refuse_nonfinite(policy, input, what);
        raise<invalid_argument>(
            error_code::norm_overflow, message("'", what, "': its squared norm overflows f64; scale it down first"));
    }
    const double allowed = options.energy != 0 ? result.squared_norm - options.energy * result.squared_norm
                                               : options.relative_error * options.relative_error * result.squared_norm;
    const std::size_t most = options.max_rank ? std::min(options.max_rank, least) : least;
    const random_stream stream(options.seed, 0, what);

    std::size_t rank = grows ? std::min<std::size_t>(16, most) : std::min(options.rank, least);
    matrix<T, P::space> known; // right vectors of the round before: a better start than noise
    for (;;) {
        const std::size_t width = std::min(least, rank + options.oversampling);
        auto omega = scratch_matrix<T>(policy, n, width);
        fill_normal<T>(policy, stream, omega.view());
        if (!known.empty()) { copy_matrix<T>(policy, known.view(), omega.view().left_columns(known.cols())); }

        auto y = scratch_matrix<T>(policy, m, width), z = scratch_matrix<T>(policy, n, width);
        gemm<T>(policy, T(1), a, omega.view(), T(0), y.view());
        auto q = orthonormal_basis<T>(policy, y.view(), what);
        for (std::size_t i = 0; i < options.power_iterations; ++i) {
            gemm<T>(policy, T(1), a.transposed(), q.view(), T(0), z.view());
            const auto w = orthonormal_basis<T>(policy, z.view(), what);
            gemm<T>(policy, T(1), a, w.view(), T(0), y.view());
            q = orthonormal_basis<T>(policy, y.view(), what);
        }
        gemm<T>(policy, T(1), a.transposed(), q.view(), T(0), z.view()); // (QᵀA)ᵀ
        const auto fz = factor_qr<T>(policy, z.view(), what);
        const auto core = small_svd(policy, fz.r.view().transposed()); // QᵀA = Rᵀ·Qzᵀ = u·σ·(Qz·v)ᵀ

        std::size_t keep = std::min(grows && width == least ? most : rank, core.sigma.size());
        const factor_place here = grows ? factor_place::scratch : place; // more rounds, or fewer columns, may follow
        result.u = placed_matrix<T>(policy, m, keep, here);
        result.v = placed_matrix<T>(policy, n, keep, here);
        multiply_small<T>(policy, q.view(), core.u.view().left_columns(keep), result.u.view());
        multiply_q<T>(policy, fz, core.v.view().left_columns(keep), result.v.view());
        result.sigma.assign(core.sigma.begin(), core.sigma.begin() + static_cast<std::ptrdiff_t>(keep));
        result.squared_error = std::max(0.0, result.squared_norm - energy_beyond(result.sigma, 0));
        if (result.squared_error < cancellation_limit<T>(policy) * result.squared_norm) {
            result.squared_error = squared_residual<T>(policy, a, result.u.view(), result.sigma, result.v.view());
        }
        if (grows) {
            if (result.squared_error > allowed && keep < most) {
                known = std::move(result.v);
                rank = std::min(most, 2 * rank);
                continue;
            }
            result.reached = result.squared_error <= allowed;
            while (keep > 1) { // no more than asked for
                const double without = result.squared_error + result.sigma[keep - 1] * result.sigma[keep - 1];
                if (without > allowed) { break; }
                result.squared_error = without;
                --keep;
                result.sigma.pop_back();
            }
            result.u = detail::left_part<T>(policy, std::move(result.u), keep, place);
            result.v = detail::left_part<T>(policy, std::move(result.v), keep, place);
        }
        orient<T>(policy, result.u.view(), result.v.view());
        return result;
    }
}

} // namespace detail

template <storage_element S, linear_algebra_policy P>
randomized_svd_result<arithmetic_type<S>, P::space> randomized_svd(
    const P& policy, matrix_view<const S, P::space> input, const randomized_svd_options& options)
{
    return with_context(policy,
        [&](const P& ready) { return detail::sampled_svd<S>(ready, input, options, detail::factor_place::kept); });
}

/// The same of a matrix that owns its elements, or of a view of mutable ones.
template <linear_algebra_policy P, detail::other_matrix<P::space> X>
[[nodiscard]] auto randomized_svd(const P& policy, const X& input, const randomized_svd_options& options)
{
    using S = detail::matrix_element_of<X, P::space>;
    return randomized_svd<S>(policy, matrix_view<const S, P::space>(input), options);
}
template <linear_algebra_policy P, detail::no_matrix<P::space> X>
auto randomized_svd(const P&, const X&, const randomized_svd_options&)
{
    detail::refuse_matrix<P, X>();
}

/// randomized_svd() as a way to decompose layers, for algorithms that take one.
struct decompose_randomized {
    std::size_t oversampling = 10; ///< further columns of the random sample
    std::size_t power_iterations = 2; ///< products with A·Aᵀ
    std::uint64_t seed = 0; ///< of the sample

    /// Randomized_svd() with these and what `choice` asks for.
    template <arithmetic_element T, linear_algebra_policy P>
    [[nodiscard]] svd_result<T, P::space> operator()(
        const P& policy, matrix_view<const T, P::space> a, const rank_choice& choice, std::string_view name) const
    {
        const randomized_svd_options options{.rank = choice.rank,
            .energy = choice.energy,
            .clamp = choice.clamp,
            .oversampling = oversampling,
            .power_iterations = power_iterations,
            .seed = seed,
            .name = name};
        return with_context(policy, [&](const P& ready) -> svd_result<T, P::space> {
            return detail::sampled_svd<T>(ready, a, options, detail::factor_place::scratch);
        });
    }
};

// On taskvec::gpu this needs <taskvec/device/linalg.hpp>; without it a call says so.
template <detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto randomized_svd(const P&, const X&, const randomized_svd_options&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "randomized_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <storage_element T, detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto randomized_svd(const P&, const X&, const randomized_svd_options&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "randomized_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}

// Wrong calls, one sentence each; options in braces are of no type that could be asked for.
TASKVEC_WRONG_CALLS(cpu, randomized_svd, any_arguments, "randomized_svd(policy, matrix, {.rank = 16})")
template <detail::no_policy X>
auto randomized_svd(const X&, const randomized_svd_options&)
{
    static_assert(policy<X>,
        "randomized_svd(): the policy is missing before the matrix: randomized_svd(policy, matrix, {.rank = 16})");
    return detail::no_result{};
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_RANDOMIZED_SVD(extern, float)
TASKVEC_COMPILED_RANDOMIZED_SVD(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
