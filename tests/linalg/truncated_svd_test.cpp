// SPDX-License-Identifier: Apache-2.0
#include <taskvec/linalg/truncated_svd.hpp>

#include "capture.hpp"
#include "reference/random_matrix.hpp"
#include "reference/svd.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

using namespace taskvec;
using reference::normal_matrix;

TEST_CASE("truncated SVD agrees with the reference on every road and order")
{
    struct shape {
        std::size_t m, n;
    };
    for (const shape& sizes :
        {shape{40, 40}, {30, 50}, {50, 30}, {130, 110}, {110, 130}, {260, 100}, {100, 260}, {1, 17}, {17, 1}, {1, 1}}) {
        for (const auto order : {matrix_order::row_major, matrix_order::column_major}) {
            const std::size_t m = sizes.m, n = sizes.n;
            INFO(m, "×", n);
            const auto a = normal_matrix<float>(m, n, m + 7 * n, order);
            const auto plain = reference::plain<float>(a.view());
            const auto sigma = reference::singular_values(plain);
            const std::size_t q = (std::min(m, n) + 2) / 3;
            const auto s = truncated_svd<float>(cpu{}, a.view(), {.rank = q});
            REQUIRE(s.rank() == q);
            REQUIRE(s.spectrum.size() == sigma.size());
            const double bound = 2e-6 * sigma[0];
            for (std::size_t i = 0; i < sigma.size(); ++i) { CHECK(std::abs(s.spectrum[i] - sigma[i]) <= bound); }
            CHECK(reference::departure_from_orthonormal<float>(s.u.view()) <= 5e-6);
            CHECK(reference::departure_from_orthonormal<float>(s.v.view()) <= 5e-6);
            const double tail = std::sqrt(energy_beyond(sigma, q));
            CHECK(std::abs(reference::distance(plain, reference::composed(s)) - tail) <= 4 * bound);
            CHECK(std::abs(std::sqrt(s.squared_error) - tail) <= 4 * bound);
            float largest = 0;
            for (std::size_t i = 0; i < m; ++i) {
                if (std::abs(s.u(i, 0)) > std::abs(largest)) { largest = s.u(i, 0); }
            }
            CHECK(largest > 0);
        }
    }
}

TEST_CASE("the spaces of truncated SVD's vectors are the reference's within the error of sigma over the gap")
{
    for (const auto& [m, n] : {std::pair<std::size_t, std::size_t>{130, 110}, {110, 130}, {260, 40}, {40, 30}}) {
        std::vector<double> sigma(30);
        for (std::size_t i = 0; i < sigma.size(); ++i) { sigma[i] = std::pow(0.7, static_cast<double>(i)); }
        const auto a = reference::matrix_with_spectrum<float>(m, n, sigma, m);
        const auto exact = reference::decomposed(reference::plain<float>(a.view()));
        for (const std::size_t q : {1u, 4u, 9u}) {
            CAPTURE(q);
            const auto s = truncated_svd<float>(cpu{}, a.view(), {.rank = q});
            const double allowed = 4 * 2e-6 * exact.sigma[0] / (exact.sigma[q - 1] - exact.sigma[q]);
            CHECK(reference::sine_between<float>(exact.u, s.u.view(), q) <= allowed);
            CHECK(reference::sine_between<float>(exact.v, s.v.view(), q) <= allowed);
            CHECK(allowed < 0.1);
        }
    }
}

TEST_CASE("leading SVD has the triples of known spectra, found without the rest of them")
{
    std::vector<double> falling(60), copies(60, 1.0), few{4, 2, 1};
    for (std::size_t i = 0; i < falling.size(); ++i) { falling[i] = std::pow(0.8, static_cast<double>(i)); }
    std::fill_n(
        copies.begin(), 6, 3.0); // the multiplicity of a group is above the rank that is asked for, or reaches it
    for (const auto& sigma : {falling, copies, few}) {
        for (const auto& [m, n] : {std::pair<std::size_t, std::size_t>{240, 200}, {200, 260}, {230, 230}}) {
            for (const auto order : {matrix_order::row_major, matrix_order::column_major}) {
                const auto a = reference::matrix_with_spectrum<float>(m, n, sigma, 3 * m + n, order);
                const auto plain = reference::plain<float>(a.view());
                for (const std::size_t q : {1u, 4u, 6u, 8u}) {
                    CAPTURE_BOUND(m);
                    CAPTURE_BOUND(n);
                    INFO("q = ", q, ", sigma ends with ", sigma.back());
                    const auto found = detail::lanczos_svd<>(
                        cpu{}, a.view(), q, squared_norm<float>(cpu{}, a.view()), "w", detail::factor_place::kept);
                    REQUIRE(found.has_value());
                    const auto s = leading_svd<float>(cpu{.threads = 2}, a, {.rank = q}, "w");
                    REQUIRE(s.rank() == q);
                    CHECK(std::equal(s.u.data(), s.u.data() + s.u.size(), found->u.data()));
                    CHECK(s.sigma == found->sigma);
                    for (std::size_t i = 0; i < q; ++i) {
                        const double right = i < sigma.size() ? sigma[i] : 0;
                        CHECK(std::abs(s.sigma[i] - right) <= 2e-6 * sigma[0]);
                    }
                    CHECK(reference::departure_from_orthonormal<float>(s.u.view()) <= 5e-6);
                    CHECK(reference::departure_from_orthonormal<float>(s.v.view()) <= 5e-6);
                    const double tail = std::sqrt(energy_beyond(sigma, std::min(q, sigma.size())));
                    CHECK(std::abs(reference::distance(plain, reference::composed(s)) - tail) <= 8e-6 * sigma[0]);
                    CHECK(std::abs(std::sqrt(s.squared_error) - tail) <= 8e-6 * sigma[0]);
                }
            }
        }
    }
}

TEST_CASE("leading SVD of noise, of small matrices, of f64 and of shares of the energy is truncated SVD's")
{
    const auto noise = normal_matrix<float>(250, 240, 5);
    const auto sigma = reference::singular_values(reference::plain<float>(noise.view()));
    const auto s = leading_svd<float>(cpu{}, noise, {.rank = 8});
    for (std::size_t i = 0; i < 8; ++i) { CHECK(std::abs(s.sigma[i] - sigma[i]) <= 2e-6 * sigma[0]); }
    CHECK(s.relative_error() == doctest::Approx(std::sqrt(energy_beyond(sigma, 8) / energy_beyond(sigma, 0))));

    CHECK(leading_svd<float>(cpu{}, noise, {.energy = 0.5}).sigma
        == truncated_svd<float>(cpu{}, noise, {.energy = 0.5}).sigma);
    const auto small = normal_matrix<float>(40, 30, 6);
    CHECK(leading_svd<float>(cpu{}, small, {.rank = 3}).sigma == truncated_svd<float>(cpu{}, small, {.rank = 3}).sigma);
    const auto brief = reference::matrix_with_spectrum<bf16>(220, 210, {8, 4}, 2);
    CHECK(leading_svd<bf16>(cpu{}, brief, {.rank = 1}).sigma[0] == doctest::Approx(8).epsilon(1e-2));
    const matrix<float> zero(220, 210);
    CHECK(leading_svd<float>(cpu{}, zero, {.rank = 2}).sigma == std::vector<double>{0, 0});

    CHECK_THROWS_WITH_AS((void)leading_svd<float>(cpu{}, noise, {.rank = 241}, "w"),
        "'w': rank 241 asked for, but its rank is at most 240; ask for less, or for clamping", invalid_argument);
    auto broken = normal_matrix<float>(220, 210, 1);
    broken(7, 3) = std::numeric_limits<float>::infinity();
    CHECK_THROWS_AS((void)leading_svd<float>(cpu{}, broken, {.rank = 1}), nonfinite_error);
}

TEST_CASE("truncated SVD of deficient, zero, 16-bit and empty matrices")
{
    const auto low = reference::matrix_with_spectrum<float>(150, 140, {4, 2, 1}, 1);
    const auto s = truncated_svd<float>(cpu{}, low.view(), {.rank = 5});
    CHECK(s.sigma[2] == doctest::Approx(1.0).epsilon(1e-5));
    CHECK(s.sigma[4] <= 1e-5);
    CHECK(reference::departure_from_orthonormal<float>(s.u.view()) <= 5e-6);
    CHECK(truncated_svd<float>(cpu{}, low.view(), {.energy = 0.99}).rank() == 3);

    const matrix<float> zero(120, 110), none(0, 4);
    const auto z = truncated_svd<float>(cpu{}, zero.view(), {.rank = 2});
    CHECK(z.sigma == std::vector<double>{0, 0});
    CHECK(z.relative_error() == 0);
    CHECK(truncated_svd<float>(cpu{}, none.view(), rank_choice::full()).rank() == 0);

    const auto brief = reference::matrix_with_spectrum<bf16>(30, 20, {8, 4}, 2);
    CHECK(truncated_svd<bf16>(cpu{}, brief.view(), {.rank = 1}).sigma[0] == doctest::Approx(8).epsilon(1e-2));
}

TEST_CASE("truncated SVD refuses what cannot be")
{
    auto a = normal_matrix<float>(120, 110, 1);
    CHECK_THROWS_WITH_AS((void)truncated_svd<float>(cpu{}, a.view(), {.rank = 111}, "w"),
        "'w': rank 111 asked for, but its rank is at most 110; ask for less, or for clamping", invalid_argument);
    CHECK_THROWS_AS((void)truncated_svd<float>(cpu{}, a.view(), {}), invalid_argument);
    a(5, 6) = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_AS((void)truncated_svd<float>(cpu{}, a.view(), {.rank = 1}), nonfinite_error);
}
