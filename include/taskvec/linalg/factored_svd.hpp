// The SVD of a product left·rightᵀ from its factors: two thin QRs and a small core, never the product itself.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/linalg.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/fwd.hpp>
#include <taskvec/linalg/factor_pair.hpp>
#include <taskvec/linalg/svd.hpp>
#include <taskvec/linalg/wrong_call.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory_resource>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What factored_svd() returns: also all singular values of the product, from which the error is known exactly.
template <arithmetic_element T, memory_space S>
struct factored_svd_result : svd_result<T, S> {
    std::vector<double> spectrum; ///< every singular value that left·rightᵀ can have nonzero, descending
};

/// Σ weightᵢ·leftᵢ·rightᵢᵀ as one pair of factors: the leftᵢ side by side, each times its weight, and the rightᵢ side
/// by side. Exact but for the rounding of weightᵢ·leftᵢ.
template <arithmetic_element T, memory_space S>
struct stacked_factors {
    matrix<T, S> left; ///< m×R, R the sum of the ranks
    matrix<T, S> right; ///< n×R

    /// The two as a product of weight 1. Refers to them.
    [[nodiscard]] factor_pair<T, S> pair(std::string_view name = {}) const
    {
        return {.left = left.view(), .right = right.view(), .name = name};
    }
};

/// The leading singular triples of P = left·rightᵀ, exactly: left = Ql·Rl, right = Qr·Rr, and the SVD of the small core
/// Rl·Rrᵀ. left is m×r, right is n×r, in either order and of the storage types f64, f32, bf16, f16 (16-bit factors are
/// computed in f32). σ is right to e = 2e-7·‖left‖·‖right‖ for f32 (1e-14 for f64; Frobenius norms); u and v are
/// orthonormal to rounding and their spaces right to an angle of 4·e divided by the gap σq − σq+1 (Wedin 1972);
/// squared_error is the tail of σ² (Eckart and Young 1936). The product (m×n) is never formed. Throws shape_mismatch
/// where the inner ranks differ, invalid_argument for a rank of 0 or above min(m, n, r), nonfinite_error. Cost: (m +
/// n)·r² + O(r³) flops, scratch O(r²).
///
///     auto best = factored_svd(cpu{}, left, right, {.rank = 16});
///     double lost = best.relative_error();
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] factored_svd_result<arithmetic_type<T>, P::space> factored_svd(
    const P& policy, const factor_pair<T, P::space>& p, const rank_choice& choice);

/// The same of two views.
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] factored_svd_result<arithmetic_type<T>, P::space> factored_svd(const P& policy,
    matrix_view<const T, P::space> left, std::type_identity_t<matrix_view<const T, P::space>> right,
    const rank_choice& choice);

/// Many layers at once: layer i of the result belongs to pairs[i]. On the CPU layers run in parallel, one thread inside
/// each, and the result does not depend on the number of threads; on a device the cores of equal shape are decomposed
/// together.
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] std::vector<factored_svd_result<arithmetic_type<T>, P::space>> factored_svd(
    const P& policy, std::span<const factor_pair<T, P::space>> pairs, const rank_choice& choice);

/// Stacks pairs of the same m and n; their ranks may differ. Throws shape_mismatch, and invalid_argument for an empty
/// list.
template <storage_element T>
[[nodiscard]] stacked_factors<arithmetic_type<T>> stack_factors(
    std::span<const factor_pair<T>> pairs, std::string_view what = "the sum");

/// The best approximation of Σ weightᵢ·leftᵢ·rightᵢᵀ (ranks may differ) by rank q: the stacked factors through
/// factored_svd(), with the exact error. Same types, errors and cost as factored_svd() with r the sum of the ranks; a
/// rank above that sum, or above m or n, is an error unless clamped.
///
///     std::array pairs{factor_pair<float>{.left = left1, .right = right1, .weight = 0.5},
///         factor_pair<float>{.left = left2, .right = right2, .weight = 0.5}};
///     auto merged = compress_sum(cpu{}, std::span<const factor_pair<float>>(pairs), {.rank = 16});
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] factored_svd_result<arithmetic_type<T>, P::space> compress_sum(const P& policy,
    std::span<const factor_pair<T, P::space>> pairs, const rank_choice& choice, std::string_view what = "the sum");

namespace detail {

/// factored_svd() up to the small SVD, and from there on: a device takes many small SVDs between the two together.
template <storage_element T, linear_algebra_policy P>
class factored_core {
public:
    using element = arithmetic_type<T>;
    using result_type = factored_svd_result<element, P::space>;

    factored_core(const P& policy, const factor_pair<T, P::space>& p, const rank_choice& choice)
        : what_(p.name.empty() ? std::string_view("left·rightᵀ") : p.name)
        , m_(p.left.rows())
        , n_(p.right.rows())
    {
        if (p.left.cols() != p.right.cols()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", what_, "': the left factor is ", m_, "×", p.left.cols(), " and the right one ", n_, "×",
                    p.right.cols(), "; the inner ranks differ"));
        }
        if (!std::isfinite(p.weight)) {
            raise<nonfinite_error>(error_code::scaling_not_finite, message("'", what_, "': its weight is not finite"));
        }
        check_rank(choice, std::min({m_, n_, p.left.cols()}), what_);
        if (p.left.empty() || p.right.empty()) { return; }
        left_ = p.left;
        right_ = p.right;
        left_qr_ = factor_qr<element>(policy, in_arithmetic(policy, p.left, left_copy_), what_);
        right_qr_ = factor_qr<element>(policy, in_arithmetic(policy, p.right, right_copy_), what_);
        product_ = small_product(policy, p.weight, left_qr_.r, right_qr_.r);
    }

    [[nodiscard]] bool empty() const noexcept { return product_.empty(); }
    /// weight·Rl·Rrᵀ
    [[nodiscard]] auto product() const noexcept { return std::as_const(product_).view(); }

    [[nodiscard]] result_type nothing(const P& policy, factor_place place) const
    {
        result_type result;
        result.u = placed_matrix<element>(policy, m_, 0, place);
        result.v = placed_matrix<element>(policy, n_, 0, place);
        return result;
    }

    /// The result, from the SVD of product().
    template <class SmallSvd>
    [[nodiscard]] result_type finish(
        const P& policy, SmallSvd&& core, const rank_choice& choice, factor_place place) const
    {
        if (!std::all_of(core.sigma.begin(), core.sigma.end(),
                [](double x) { return std::isfinite(x); })) { // not found before, on a device
            refuse_nonfinite(policy, left_, what_);
            refuse_nonfinite(policy, right_, what_);
            raise<nonfinite_error>(error_code::result_overflow,
                message("'", what_, "': its singular values overflow; scale it down first"));
        }
        result_type result;
        result.spectrum = std::move(core.sigma);
        const std::size_t q = chosen_rank(choice, result.spectrum);
        result.sigma.assign(result.spectrum.begin(), result.spectrum.begin() + static_cast<std::ptrdiff_t>(q));
        result.squared_norm = energy_beyond(result.spectrum, 0);
        result.squared_error = energy_beyond(result.spectrum, q);
        result.u = placed_matrix<element>(policy, m_, q, place);
        result.v = placed_matrix<element>(policy, n_, q, place);
        multiply_q<element>(policy, left_qr_, std::as_const(core.u).view().left_columns(q), result.u.view());
        multiply_q<element>(policy, right_qr_, std::as_const(core.v).view().left_columns(q), result.v.view());
        orient<element>(policy, result.u.view(), result.v.view());
        return result;
    }

private:
    std::string_view what_;
    std::size_t m_, n_;
    matrix<element, P::space> left_copy_{}, right_copy_{};
    matrix_view<const T, P::space> left_{}, right_{};
    qr_factors<element, P::space> left_qr_{}, right_qr_{};
    std::remove_cvref_t<decltype(small_product(std::declval<const P&>(), 1.0, left_qr_.r, right_qr_.r))> product_{};
};

/// factored_svd(), whose u and v go where it is said.
template <storage_element T, linear_algebra_policy P>
[[nodiscard]] factored_svd_result<arithmetic_type<T>, P::space> factored_svd_in(
    const P& policy, const factor_pair<T, P::space>& p, const rank_choice& choice, factor_place place)
{
    return with_context(policy, [&](const P& ready) {
        const factored_core<T, P> core(ready, p, choice);
        return core.empty() ? core.nothing(ready, place)
                            : core.finish(ready, small_svd(ready, core.product()), choice, place);
    });
}

/// sink(i, result of pairs[i]) for each i, in any order and, on the CPU, from many threads; choice(i) is its rank.
template <storage_element T, class Choice, class Sink>
void for_each_factored_svd(const cpu& policy, std::span<const factor_pair<T>> pairs, factor_place place,
    const Choice& choice, const Sink& sink)
{
    progress_meter meter(policy, "svd", pairs.size(), progress_unit::layers);
    const cpu inside = sequential(policy);
    for_each_index(policy, pairs.size(), [&](std::size_t i, std::size_t) {
        const rank_choice wanted = choice(i);
        const factored_core<T, cpu> core(inside, pairs[i], wanted);
        sink(i,
            core.empty() ? core.nothing(inside, place)
                         : core.finish(inside, small_svd(inside, core.product()), wanted, place));
        if (!meter.advance(1)) { raise<cancelled>(error_code::cancelled); }
    });
}

/// On a device: batches of layers, whose cores are decomposed together by small_svds().
template <storage_element T, linear_algebra_policy P, class Choice, class Sink>
    requires(P::space == memory_space::device)
void for_each_factored_svd(const P& policy, std::span<const factor_pair<T, P::space>> pairs, factor_place place,
    const Choice& choice, const Sink& sink)
{
    constexpr std::size_t batch = 64; // layers whose orthonormal factors are held at a time
    for (std::size_t first = 0; first < pairs.size(); first += batch) {
        const std::size_t count = std::min(batch, pairs.size() - first);
        std::vector<factored_core<T, P>> cores;
        cores.reserve(count);
        std::vector<decltype(cores[0].product())> products;
        for (std::size_t i = 0; i < count; ++i) { cores.emplace_back(policy, pairs[first + i], choice(first + i)); }
        for (const auto& core : cores) { products.push_back(core.product()); }
        auto decomposed = small_svds(policy, products);
        for (std::size_t i = 0; i < count; ++i) {
            sink(first + i,
                cores[i].empty() ? cores[i].nothing(policy, place)
                                 : cores[i].finish(policy, std::move(decomposed[i]), choice(first + i), place));
        }
    }
}

} // namespace detail

template <storage_element T, linear_algebra_policy P>
factored_svd_result<arithmetic_type<T>, P::space> factored_svd(
    const P& policy, const factor_pair<T, P::space>& p, const rank_choice& choice)
{
    return detail::factored_svd_in<T>(policy, p, choice, detail::factor_place::kept);
}

template <storage_element T, linear_algebra_policy P>
factored_svd_result<arithmetic_type<T>, P::space> factored_svd(const P& policy, matrix_view<const T, P::space> left,
    std::type_identity_t<matrix_view<const T, P::space>> right, const rank_choice& choice)
{
    return factored_svd<T>(policy, factor_pair<T, P::space>{.left = left, .right = right}, choice);
}

/// Of a left factor that owns its elements, or a view of mutable ones.
template <linear_algebra_policy P, detail::other_matrix<P::space> X, class Y>
    requires std::is_same_v<detail::matrix_element_of<X, P::space>, detail::matrix_element_of<Y, P::space>>
[[nodiscard]] auto factored_svd(const P& policy, const X& left, const Y& right, const rank_choice& choice)
{
    using T = detail::matrix_element_of<X, P::space>;
    return factored_svd<T>(policy, matrix_view<const T, P::space>(left), right, choice);
}
template <linear_algebra_policy P, class X, class Y>
    requires(!std::is_same_v<detail::matrix_element_of<X, P::space>, detail::matrix_element_of<Y, P::space>>)
    || detail::no_matrix<X, P::space>
auto factored_svd(const P&, const X&, const Y&, const rank_choice&)
{
    detail::refuse_matrix<P, X>();
    detail::refuse_matrix<P, Y>();
    static_assert(std::is_same_v<detail::matrix_element_of<X, P::space>, detail::matrix_element_of<Y, P::space>>,
        "taskvec: the factors of a product are of one storage type: convert one of them");
}

template <storage_element T, linear_algebra_policy P>
std::vector<factored_svd_result<arithmetic_type<T>, P::space>> factored_svd(
    const P& policy, std::span<const factor_pair<T, P::space>> pairs, const rank_choice& choice)
{
    std::vector<factored_svd_result<arithmetic_type<T>, P::space>> results(pairs.size());
    with_context(policy, [&](const P& ready) {
        detail::for_each_factored_svd<T>(
            ready, pairs, detail::factor_place::kept, [&](std::size_t) { return choice; },
            [&](std::size_t i, auto&& result) { results[i] = std::move(result); });
    });
    return results;
}

namespace detail {
/// The sum of the ranks of pairs that can be stacked.
template <storage_element T, memory_space S>
[[nodiscard]] std::size_t stacked_rank(std::span<const factor_pair<T, S>> pairs, std::string_view what)
{
    if (pairs.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, message("'", what, "': no factor pairs to add"));
    }
    const std::size_t m = pairs[0].left.rows(), n = pairs[0].right.rows();
    std::size_t total = 0;
    for (std::size_t i = 0; i < pairs.size(); ++i) {
        const auto& [left, right, weight, name] = pairs[i];
        if (left.rows() != m || right.rows() != n || left.cols() != right.cols()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", what, "': pair ", i, " is ", left.rows(), "×", left.cols(), " and ", right.rows(), "×",
                    right.cols(), "; expected ", m, "×r and ", n, "×r, as in pair 0"));
        }
        if (!std::isfinite(weight)) {
            raise<nonfinite_error>(
                error_code::scaling_not_finite, message("'", what, "': the weight of pair ", i, " is not finite"));
        }
        total += left.cols();
    }
    return total;
}
/// stack_factors() in memory of `memory`.
template <storage_element T>
[[nodiscard]] stacked_factors<arithmetic_type<T>> stack_factors_in(
    std::span<const factor_pair<T>> pairs, std::string_view what, std::pmr::memory_resource* memory)
{
    using E = arithmetic_type<T>;
    const std::size_t total = detail::stacked_rank<T>(pairs, what), m = pairs[0].left.rows(), n = pairs[0].right.rows();
    stacked_factors<E> sum{matrix<E>(m, total, matrix_order::column_major, memory),
        matrix<E>(n, total, matrix_order::column_major, memory)};
    std::size_t at = 0;
    for (const auto& pair : pairs) {
        const E weight = static_cast<E>(pair.weight);
        for (std::size_t k = 0; k < pair.left.cols(); ++k, ++at) {
            for (std::size_t i = 0; i < m; ++i) { sum.left(i, at) = weight * widen<E>(pair.left(i, k)); }
            for (std::size_t i = 0; i < n; ++i) { sum.right(i, at) = widen<E>(pair.right(i, k)); }
        }
    }
    return sum;
}
} // namespace detail

template <storage_element T>
stacked_factors<arithmetic_type<T>> stack_factors(std::span<const factor_pair<T>> pairs, std::string_view what)
{
    return detail::stack_factors_in<T>(pairs, what, std::pmr::get_default_resource());
}

/// The same in the memory space of the policy; on the CPU in memory of the policy's resource.
template <storage_element T>
[[nodiscard]] auto stack_factors(const cpu& policy, std::span<const factor_pair<T>> pairs, std::string_view what)
{
    return detail::stack_factors_in<T>(pairs, what, memory_of(policy));
}
template <storage_element T, linear_algebra_policy P>
    requires(P::space == memory_space::device)
[[nodiscard]] auto stack_factors(
    const P& policy, std::span<const factor_pair<T, P::space>> pairs, std::string_view what)
{
    using E = arithmetic_type<T>;
    const std::size_t total = detail::stacked_rank<T>(pairs, what), m = pairs[0].left.rows(), n = pairs[0].right.rows();
    stacked_factors<E, P::space> sum{result_matrix<E>(policy, m, total), result_matrix<E>(policy, n, total)};
    std::size_t at = 0;
    for (const auto& pair : pairs) {
        const std::size_t r = pair.left.cols();
        matrix<E, P::space> left_copy, right_copy;
        const std::vector<double> weights(r, pair.weight);
        scale_columns<E>(
            policy, in_arithmetic(policy, pair.left, left_copy), weights, sum.left.view().block(0, at, m, r));
        copy_matrix<E>(policy, in_arithmetic(policy, pair.right, right_copy), sum.right.view().block(0, at, n, r));
        at += r;
    }
    return sum;
}

template <storage_element T, linear_algebra_policy P>
factored_svd_result<arithmetic_type<T>, P::space> compress_sum(
    const P& policy, std::span<const factor_pair<T, P::space>> pairs, const rank_choice& choice, std::string_view what)
{
    return with_context(policy, [&](const P& ready) {
        const auto sum = stack_factors<T>(ready, pairs, what);
        return factored_svd(ready, sum.pair(what), choice);
    });
}

// On taskvec::gpu these need <taskvec/device/linalg.hpp>; without it a call says so.
template <detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto factored_svd(const P&, const X&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "factored_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <detail::gpu_without_header<detail::gpu_room::lowrank> P, class X, class Y>
auto factored_svd(const P&, const X&, const Y&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "factored_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <storage_element T, detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto factored_svd(const P&, const X&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "factored_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <storage_element T, detail::gpu_without_header<detail::gpu_room::lowrank> P, class X, class Y>
auto factored_svd(const P&, const X&, const Y&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "factored_svd() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}
template <storage_element T, detail::gpu_without_header<detail::gpu_room::lowrank> P, class X>
auto compress_sum(const P&, const X&, const rank_choice&)
{
    static_assert(detail::gpu_header_included<P, detail::gpu_room::lowrank>,
        "compress_sum() on taskvec::gpu: include <taskvec/device/linalg.hpp>");
}

// Wrong calls, one sentence each; options in braces are of no type that could be asked for.
TASKVEC_WRONG_CALLS(cpu, factored_svd, any_arguments, "factored_svd(policy, left, right, {.rank = 16})")
template <detail::no_policy X, class Y>
auto factored_svd(const X&, const Y&, const rank_choice&)
{
    static_assert(policy<X>,
        "factored_svd(): the policy is missing before the matrix: factored_svd(policy, left, right, {.rank = 16})");
    return detail::no_result{};
}

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_FACTORED_SVD(extern, float)
TASKVEC_COMPILED_FACTORED_SVD(extern, double)
#endif

} // namespace taskvec::inline TASKVEC_ABI
