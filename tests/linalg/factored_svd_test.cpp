// SPDX-License-Identifier: Apache-2.0
#include <taskvec/linalg/factored_svd.hpp>

#include "reference/random_matrix.hpp"
#include "reference/svd.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

using namespace taskvec;
using reference::normal_matrix;

namespace {

template <class T>
factor_pair<T> pair_of(const matrix<T>& a, const matrix<T>& b, double weight = 1)
{
    return {.left = a.view(), .right = b.view(), .weight = weight};
}

/// Everything that must hold of a decomposition of `product`, to `bound` relative to `scale` (‖A‖·‖B‖).
template <class Result>
void check_decomposition(
    const Result& s, const reference::plain_matrix& product, std::size_t q, double bound, double scale)
{
    using T = std::remove_cvref_t<decltype(s.u(0, 0))>;
    REQUIRE(s.rank() == q);
    const auto sigma = reference::singular_values(product);
    for (std::size_t i = 0; i < q; ++i) { CHECK(std::abs(s.sigma[i] - sigma[i]) <= bound * scale); }
    const double unit = std::is_same_v<T, float> ? 1e-6 : 1e-13;
    CHECK(reference::departure_from_orthonormal<T>(s.u.view()) <= unit);
    CHECK(reference::departure_from_orthonormal<T>(s.v.view()) <= unit);
    // Eckart and Young: the distance is the tail of σ, and the reported error is that distance.
    const double distance = reference::distance(product, reference::composed(s)),
                 tail = std::sqrt(energy_beyond(sigma, q));
    CHECK(std::abs(distance - tail) <= 4 * bound * scale);
    CHECK(std::abs(std::sqrt(s.squared_error) - tail) <= 4 * bound * scale);
    CHECK(std::abs(std::sqrt(s.squared_norm) - reference::norm(product)) <= 4 * bound * scale);
    for (std::size_t j = 0; j < q; ++j) { // the sign rule
        T largest = 0;
        for (std::size_t i = 0; i < s.u.rows(); ++i) {
            if (std::abs(s.u(i, j)) > std::abs(largest)) { largest = s.u(i, j); }
        }
        CHECK(largest > 0);
    }
}

} // namespace

TEST_CASE_TEMPLATE("factored SVD equals the SVD of the product", T, double, float, bf16, f16)
{
    const double bound = std::is_same_v<T, double> ? 1e-14 : 2e-7;
    struct shape {
        std::size_t m, n, r;
    };
    std::uint64_t seed = 1;
    for (const shape& sizes : {shape{60, 40, 8}, {40, 60, 8}, {30, 30, 30}, {12, 50, 20}, {50, 12, 20}, {9, 9, 1},
             {1, 25, 4}, {25, 1, 4}, {1, 1, 1}, {10, 12, 40}}) {
        for (const auto order : {matrix_order::row_major, matrix_order::column_major}) {
            const std::size_t m = sizes.m, n = sizes.n, r = sizes.r;
            INFO(m, "×", n, ", r ", r);
            const auto a = normal_matrix<T>(m, r, ++seed, order), b = normal_matrix<T>(n, r, ++seed, order);
            auto wide_a = matrix<double>(m, r), wide_b = matrix<double>(n, r);
            for (std::size_t j = 0; j < r; ++j) {
                for (std::size_t i = 0; i < m; ++i) { wide_a(i, j) = static_cast<double>(a(i, j)); }
                for (std::size_t i = 0; i < n; ++i) { wide_b(i, j) = static_cast<double>(b(i, j)); }
            }
            const auto pa = reference::plain<double>(wide_a.view()), pb = reference::plain<double>(wide_b.view());
            const auto product = reference::product_abt(pa, pb);
            const double scale = reference::norm(pa) * reference::norm(pb);
            const std::size_t most = std::min({m, n, r});
            for (const std::size_t q : {std::size_t{1}, (most + 1) / 2, most}) {
                const auto s = factored_svd<T>(cpu{.threads = 1}, a.view(), b.view(), {.rank = q});
                static_assert(std::is_same_v<std::remove_cvref_t<decltype(s.u(0, 0))>, arithmetic_type<T>>);
                check_decomposition(s, product, q, bound, scale);
                CHECK(s.spectrum.size() >= most);
            }
        }
    }
}

TEST_CASE_TEMPLATE(
    "the spaces of the leading vectors are the reference's within the error of sigma over the gap", T, double, float)
{
    const double bound = std::is_same_v<T, double> ? 1e-14 : 2e-7;
    for (const auto& [m, n, seed] :
        {std::tuple<std::size_t, std::size_t, std::uint64_t>{60, 45, 1}, {45, 60, 2}, {50, 50, 3}}) {
        const auto a =
            reference::matrix_with_spectrum<T>(m, 12, {8, 7, 4, 3.5, 1, 0.9, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001}, seed);
        const auto b = normal_matrix<T>(n, 12, seed + 10);
        const auto pa = reference::plain<T>(a.view()), pb = reference::plain<T>(b.view());
        const auto exact = reference::decomposed(reference::product_abt(pa, pb));
        const double scale = reference::norm(pa) * reference::norm(pb);
        for (const std::size_t q : {1u, 2u, 5u, 8u}) {
            CAPTURE(q);
            const auto s = factored_svd<T>(cpu{}, a.view(), b.view(), {.rank = q});
            const double allowed = 4 * bound * scale / (exact.sigma[q - 1] - exact.sigma[q]);
            CHECK(reference::sine_between<T>(exact.u, s.u.view(), q) <= allowed);
            CHECK(reference::sine_between<T>(exact.v, s.v.view(), q) <= allowed);
            CHECK(allowed < 0.1); // else the bound says nothing
        }
    }
}

TEST_CASE_TEMPLATE("rank-deficient and zero factors have full orthonormal bases", T, double, float)
{
    const double bound = std::is_same_v<T, double> ? 1e-14 : 2e-7;
    const auto a = reference::matrix_with_spectrum<T>(50, 10, {3, 1}, 1), b = normal_matrix<T>(40, 10, 2);
    const auto pa = reference::plain<T>(a.view()), pb = reference::plain<T>(b.view());
    const auto s = factored_svd<T>(cpu{}, a.view(), b.view(), {.rank = 6});
    check_decomposition(s, reference::product_abt(pa, pb), 6, bound, reference::norm(pa) * reference::norm(pb));

    const matrix<T> nothing(50, 10);
    const auto z = factored_svd<T>(cpu{}, nothing.view(), b.view(), {.rank = 3});
    CHECK(z.sigma == std::vector<double>{0, 0, 0});
    CHECK(z.relative_error() == 0);
    CHECK(z.energy() == 1);
    CHECK(reference::departure_from_orthonormal<T>(z.u.view()) <= 1e-6);
    CHECK(reference::departure_from_orthonormal<T>(z.v.view()) <= 1e-6);
    CHECK(factored_svd<T>(cpu{}, nothing.view(), b.view(), {.energy = 0.5}).rank() == 1);
}

TEST_CASE("columns that are scaled against each other lose nothing")
{
    // A·Bᵀ is the same when a column of A grows and its partner shrinks; Gram matrices must not notice.
    auto a = normal_matrix<float>(200, 6, 1), b = normal_matrix<float>(150, 6, 2);
    const auto plain = factored_svd<float>(cpu{}, a.view(), b.view(), {.rank = 6});
    for (std::size_t i = 0; i < 200; ++i) { a(i, 2) *= 0x1p40f; }
    for (std::size_t i = 0; i < 150; ++i) { b(i, 2) *= 0x1p-40f; }
    const auto scaled = factored_svd<float>(cpu{}, a.view(), b.view(), {.rank = 6});
    for (std::size_t i = 0; i < 6; ++i) { CHECK(scaled.sigma[i] == doctest::Approx(plain.sigma[i]).epsilon(1e-6)); }
    CHECK(reference::departure_from_orthonormal<float>(scaled.u.view()) <= 1e-6);
}

TEST_CASE("a factor that owns its elements, or may change them, is decomposed as its view is")
{
    auto a = normal_matrix<float>(20, 3, 1);
    const auto b = normal_matrix<float>(15, 3, 2);
    const matrix_view<const float> right = b;
    const auto plain = factored_svd<float>(cpu{}, a.view(), right, {.rank = 2});
    CHECK(factored_svd(cpu{}, a, b, {.rank = 2}).sigma == plain.sigma);
    CHECK(factored_svd(cpu{}, a.view(), right, {.rank = 2}).sigma == plain.sigma);
    CHECK(factored_svd(cpu{}, right, a, {.rank = 2}).sigma
        == factored_svd<float>(cpu{}, right, a.view(), {.rank = 2}).sigma);
}

TEST_CASE("a weight multiplies the spectrum; a negative one turns one side")
{
    const auto a = normal_matrix<double>(20, 3, 1), b = normal_matrix<double>(15, 3, 2);
    const auto one = factored_svd(cpu{}, pair_of(a, b), {.rank = 3}),
               minus = factored_svd(cpu{}, pair_of(a, b, -2), {.rank = 3});
    for (std::size_t k = 0; k < 3; ++k) {
        CHECK(minus.sigma[k] == doctest::Approx(2 * one.sigma[k]).epsilon(1e-13));
        CHECK(minus.u(4, k) == doctest::Approx(one.u(4, k)).epsilon(1e-10));
        CHECK(minus.v(4, k) == doctest::Approx(-one.v(4, k)).epsilon(1e-10));
    }
}

TEST_CASE("rank by energy is the smallest that keeps the share")
{
    CHECK(rank_for_energy(std::vector{3.0, 1.0}, 0.9) == 1);
    CHECK(rank_for_energy(std::vector{3.0, 1.0}, 0.901) == 2);
    CHECK(rank_for_energy(std::vector{3.0, 1.0, 0.0}, 1.0) == 2);
    CHECK(rank_for_energy(std::vector{1.0, 1.0, 1.0, 1.0}, 0.5) == 2);
    CHECK(rank_for_energy(std::vector{0.0, 0.0}, 0.5) == 1);
    CHECK(rank_for_energy(std::vector<double>{}, 0.5) == 0);
    CHECK_THROWS_AS((void)rank_for_energy(std::vector{1.0}, 0.0), invalid_argument);
    CHECK_THROWS_AS((void)rank_for_energy(std::vector{1.0}, 1.5), invalid_argument);
    CHECK_THROWS_AS((void)rank_for_energy(std::vector{1.0}, std::nan("")), invalid_argument);

    const auto a = normal_matrix<float>(60, 8, 1), b = normal_matrix<float>(50, 8, 2);
    for (const double energy : {0.3, 0.8, 0.99, 1.0}) {
        const auto s = factored_svd<float>(cpu{}, a.view(), b.view(), {.energy = energy});
        CHECK(s.energy() >= energy - 1e-12);
        if (s.rank() > 1) { CHECK(1 - energy_beyond(s.spectrum, s.rank() - 1) / s.squared_norm < energy); }
    }
}

TEST_CASE("what cannot be is refused with a sentence")
{
    const auto a = normal_matrix<float>(20, 4, 1), b = normal_matrix<float>(15, 4, 2),
               other = normal_matrix<float>(15, 3, 3);
    CHECK_THROWS_WITH_AS((void)factored_svd<float>(cpu{}, a.view(), other.view(), {.rank = 2}),
        "'left·rightᵀ': the left factor is 20×4 and the right one 15×3; the inner ranks differ", shape_mismatch);
    CHECK_THROWS_WITH_AS((void)factored_svd<float>(cpu{}, a.view(), b.view(), {.rank = 5}),
        "'left·rightᵀ': rank 5 asked for, but its rank is at most 4; ask for less, or for clamping", invalid_argument);
    CHECK_THROWS_AS((void)factored_svd<float>(cpu{}, a.view(), b.view(), {}), invalid_argument);
    CHECK_THROWS_AS((void)factored_svd<float>(cpu{}, a.view(), b.view(), {.rank = 2, .energy = 0.5}), invalid_argument);
    CHECK_THROWS_AS((void)factored_svd<float>(cpu{}, a.view(), b.view(), {.energy = 1.1}), invalid_argument);
    CHECK(factored_svd<float>(cpu{}, a.view(), b.view(), {.rank = 5, .clamp = true}).rank() == 4);
    CHECK(factored_svd<float>(cpu{}, a.view(), b.view(), rank_choice::full()).rank() == 4);

    auto bad = a;
    bad(7, 1) = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_AS((void)factored_svd<float>(cpu{}, bad.view(), b.view(), {.rank = 2}), nonfinite_error);
    const matrix<float> none(0, 4);
    const auto empty = factored_svd<float>(cpu{}, none.view(), b.view(), rank_choice::full());
    CHECK(empty.rank() == 0);
    CHECK(empty.v.rows() == 15);
}

TEST_CASE("many layers: the same bits on any number of threads, and as one by one")
{
    std::vector<matrix<float>> store;
    for (std::uint64_t i = 0; i < 9; ++i) {
        store.push_back(normal_matrix<float>(30 + 5 * i, 4 + i, 2 * i, matrix_order::row_major));
        store.push_back(normal_matrix<float>(50 - 3 * i, 4 + i, 2 * i + 1));
    }
    std::vector<factor_pair<float>> pairs;
    for (std::size_t i = 0; i < store.size(); i += 2) { pairs.push_back(pair_of(store[i], store[i + 1])); }
    const auto one = factored_svd<float>(cpu{.threads = 1}, std::span<const factor_pair<float>>(pairs), {.rank = 4});
    const auto three = factored_svd<float>(cpu{.threads = 3}, std::span<const factor_pair<float>>(pairs), {.rank = 4});
    REQUIRE(one.size() == 9);
    for (std::size_t i = 0; i < one.size(); ++i) {
        const auto alone = factored_svd(cpu{}, pairs[i], {.rank = 4});
        CHECK(one[i].sigma == three[i].sigma);
        CHECK(one[i].sigma == alone.sigma);
        CHECK(std::equal(one[i].u.data(), one[i].u.data() + one[i].u.size(), three[i].u.data()));
        CHECK(std::equal(one[i].v.data(), one[i].v.data() + one[i].v.size(), alone.v.data()));
    }
    const cpu stopping{.threads = 2, .executor = {}, .memory = nullptr, .progress = [](const progress_event& e) {
                           return e.unit == progress_unit::layers && e.total == 9 && e.done < 3;
                       }};
    CHECK_THROWS_AS(
        (void)factored_svd<float>(stopping, std::span<const factor_pair<float>>(pairs), {.rank = 4}), cancelled);
}

TEST_CASE_TEMPLATE("a sum of factor pairs of different ranks is compressed with its exact error", T, double, float)
{
    const double bound = std::is_same_v<T, double> ? 1e-14 : 3e-7;
    const auto a1 = normal_matrix<T>(40, 3, 1, matrix_order::row_major), b1 = normal_matrix<T>(30, 3, 2),
               a2 = normal_matrix<T>(40, 5, 3), b2 = normal_matrix<T>(30, 5, 4, matrix_order::row_major),
               a3 = normal_matrix<T>(40, 1, 5), b3 = normal_matrix<T>(30, 1, 6);
    const std::array pairs{pair_of(a1, b1, 0.5), pair_of(a2, b2, -1.25), pair_of(a3, b3, 3)};
    auto sum = reference::zeros(40, 30);
    double scale = 0;
    for (const auto& p : pairs) {
        const auto pa = reference::plain<T>(p.left), pb = reference::plain<T>(p.right);
        const auto product = reference::product_abt(pa, pb);
        for (std::size_t i = 0; i < 40; ++i) {
            for (std::size_t j = 0; j < 30; ++j) { sum[i][j] += p.weight * product[i][j]; }
        }
        scale += std::abs(p.weight) * reference::norm(pa) * reference::norm(pb);
    }
    for (const std::size_t q : {1u, 4u, 9u}) {
        check_decomposition(
            compress_sum<T>(cpu{}, std::span<const factor_pair<T>>(pairs), {.rank = q}), sum, q, bound, scale);
    }
    CHECK_THROWS_AS(
        (void)compress_sum<T>(cpu{}, std::span<const factor_pair<T>>(pairs), {.rank = 10}), invalid_argument);
    CHECK_THROWS_AS((void)compress_sum<T>(cpu{}, std::span<const factor_pair<T>>{}, {.rank = 1}), invalid_argument);
    const std::array mixed{pair_of(a1, b1), pair_of(b2, b2)};
    CHECK_THROWS_AS((void)compress_sum<T>(cpu{}, std::span<const factor_pair<T>>(mixed), {.rank = 1}), shape_mismatch);

    // Equal adapters: the stack is rank-deficient, its compression exact.
    const std::array same{pair_of(a1, b1, 0.25), pair_of(a1, b1, 0.75)};
    const auto s = compress_sum<T>(cpu{}, std::span<const factor_pair<T>>(same), {.rank = 3});
    CHECK(s.relative_error() <= 1e-6);
    CHECK(reference::distance(reference::composed(s),
              reference::product_abt(reference::plain<T>(a1.view()), reference::plain<T>(b1.view())))
        <= 10 * bound * scale);
}
