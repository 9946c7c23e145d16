// SPDX-License-Identifier: Apache-2.0
#include <taskvec/linalg/randomized_svd.hpp>

#include "reference/random_matrix.hpp"
#include "reference/svd.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

using namespace taskvec;
using reference::matrix_with_spectrum;
using reference::normal_matrix;

namespace {

std::vector<double> spectrum(std::size_t count, double (*at)(double))
{
    std::vector<double> sigma;
    for (std::size_t i = 0; i < count; ++i) { sigma.push_back(at(static_cast<double>(i))); }
    return sigma;
}

template <class T>
double true_error(const matrix<T>& a, const randomized_svd_result<T>& s)
{
    return reference::distance(reference::plain<T>(a.view()), reference::composed(s));
}

} // namespace

TEST_CASE_TEMPLATE("on decaying spectra the error is within 1% of the best one", T, float, double)
{
    const auto polynomial = spectrum(90, [](double i) { return 1 / (1 + i); });
    const auto geometric = spectrum(90, [](double i) { return std::pow(0.8, i); });
    for (const auto& sigma : {polynomial, geometric}) {
        for (const auto& [m, n] : {std::pair<std::size_t, std::size_t>{150, 90}, {90, 150}, {90, 90}}) {
            const auto a = matrix_with_spectrum<T>(m, n, sigma, 3);
            for (const std::size_t q : {1u, 8u, 16u}) {
                const auto s = randomized_svd<T>(cpu{}, a.view(), {.rank = q, .seed = 5});
                REQUIRE(s.rank() == q);
                const double best = std::sqrt(energy_beyond(sigma, q)), error = true_error(a, s);
                CHECK(error <= 1.01 * best);
                CHECK(std::sqrt(s.squared_error) == doctest::Approx(error).epsilon(1e-3));
                CHECK(reference::departure_from_orthonormal<T>(s.u.view()) <= 2e-6);
                CHECK(reference::departure_from_orthonormal<T>(s.v.view()) <= 2e-6);
                CHECK(s.sigma[0] == doctest::Approx(sigma[0]).epsilon(1e-4));
            }
        }
    }
}

TEST_CASE_TEMPLATE("on decaying spectra the leading spaces are the reference's", T, float, double)
{
    const auto sigma = spectrum(90, [](double i) { return std::pow(0.6, i); });
    const auto a = matrix_with_spectrum<T>(150, 90, sigma, 3);
    const auto exact = reference::decomposed(reference::plain<T>(a.view()));
    for (const std::size_t q : {1u, 8u}) {
        const auto s = randomized_svd<T>(cpu{}, a.view(), {.rank = q, .seed = 5});
        // What the sample misses is (σ of the first left out / σq)^(2·2 + 1), by ten columns more than q: below 1e-10
        // here.
        const double rounding = (std::is_same_v<T, float> ? 2e-6 : 1e-13) * sigma[0] / (sigma[q - 1] - sigma[q]);
        CHECK(reference::sine_between<T>(exact.u, s.u.view(), q) <= rounding + 1e-10);
        CHECK(reference::sine_between<T>(exact.v, s.v.view(), q) <= rounding + 1e-10);
    }
}

TEST_CASE("on a flat spectrum it says how far off it is")
{
    const auto a = normal_matrix<float>(300, 300, 1, matrix_order::row_major);
    const auto sigma = reference::singular_values(reference::plain<float>(a.view()));
    const auto s = randomized_svd<float>(cpu{}, a.view(), {.rank = 16});
    const double error = true_error(a, s);
    CHECK(std::sqrt(s.squared_error) == doctest::Approx(error).epsilon(1e-4));
    CHECK(error > std::sqrt(energy_beyond(sigma, 16))); // not the optimum, and not claimed to be
    CHECK(s.sigma[0] < sigma[0]);
    const auto more = randomized_svd<float>(cpu{}, a.view(), {.rank = 16, .power_iterations = 12});
    CHECK(more.squared_error < s.squared_error);
    CHECK(more.sigma[0] == doctest::Approx(sigma[0]).epsilon(1e-3));
}

TEST_CASE("small errors are measured, not cancelled away")
{
    const auto a = matrix_with_spectrum<float>(120, 80, {1, 0.5, 0.25, 1e-5, 1e-5}, 7);
    const auto s = randomized_svd<float>(cpu{}, a.view(), {.rank = 3});
    CHECK(std::sqrt(s.squared_error) == doctest::Approx(std::sqrt(2e-10)).epsilon(0.05));
}

TEST_CASE_TEMPLATE("matrices without full rank, thin, zero and empty", T, float, double)
{
    const auto low = matrix_with_spectrum<T>(100, 70, {4, 2, 1}, 1);
    const auto s = randomized_svd<T>(cpu{}, low.view(), {.rank = 8});
    CHECK(s.sigma[2] == doctest::Approx(1.0).epsilon(1e-5));
    CHECK(s.sigma[3] <= 1e-6);
    CHECK(s.relative_error() <= 1e-6);
    CHECK(reference::departure_from_orthonormal<T>(s.u.view()) <= 2e-6);
    CHECK(reference::departure_from_orthonormal<T>(s.v.view()) <= 2e-6);

    const matrix<T> zero(20, 30);
    const auto z = randomized_svd<T>(cpu{}, zero.view(), {.rank = 2});
    CHECK(z.sigma == std::vector<double>{0, 0});
    CHECK(z.relative_error() == 0);

    const auto row = normal_matrix<T>(1, 40, 2);
    const auto r = randomized_svd<T>(cpu{}, row.view(), {.rank = 1});
    CHECK(r.sigma[0] == doctest::Approx(std::sqrt(squared_norm<T>(cpu{}, row.view()))).epsilon(1e-6));
    CHECK(r.u(0, 0) == doctest::Approx(1.0));

    const auto full = normal_matrix<T>(12, 9, 3);
    const auto all = randomized_svd<T>(cpu{}, full.view(), {.rank = 9});
    CHECK(all.relative_error() <= 1e-6);
    const matrix<T> none(0, 5);
    CHECK(randomized_svd<T>(cpu{}, none.view(), {.rank = 3, .clamp = true}).rank() == 0);
}

TEST_CASE("16-bit matrices are computed in f32")
{
    const auto a = matrix_with_spectrum<bf16>(60, 50, {8, 4, 2, 1}, 1);
    matrix<float> wide(60, 50);
    for (std::size_t i = 0; i < 60; ++i) {
        for (std::size_t j = 0; j < 50; ++j) { wide(i, j) = widen<float>(a(i, j)); }
    }
    const auto s = randomized_svd<bf16>(cpu{}, a.view(), {.rank = 4});
    const auto sigma = reference::singular_values(reference::plain<float>(wide.view()));
    for (std::size_t i = 0; i < 4; ++i) { CHECK(s.sigma[i] == doctest::Approx(sigma[i]).epsilon(1e-5)); }
}

TEST_CASE("the rank grows until the asked energy or relative error holds, and no further")
{
    const auto sigma = spectrum(80, [](double i) { return std::pow(0.93, i); });
    const auto a = matrix_with_spectrum<double>(120, 100, sigma, 2);
    const double total = energy_beyond(sigma, 0);
    for (const double wanted : {0.5, 0.1, 0.02, 0.005}) {
        const auto s = randomized_svd<double>(cpu{}, a.view(), {.relative_error = wanted});
        CAPTURE(wanted);
        CHECK(s.reached);
        CHECK(s.relative_error() <= wanted);
        CHECK(true_error(a, s) / std::sqrt(total) <= wanted * (1 + 1e-9));
        std::size_t best = 1;
        while (energy_beyond(sigma, best) > wanted * wanted * total) { ++best; }
        CHECK(s.rank() >= best);
        CHECK(s.rank() <= best + 1);
        const auto e = randomized_svd<double>(cpu{}, a.view(), {.energy = 1 - wanted * wanted});
        CHECK(e.rank() == s.rank());
    }
    const auto limited = randomized_svd<double>(cpu{}, a.view(), {.relative_error = 0.005, .max_rank = 20});
    CHECK_FALSE(limited.reached);
    CHECK(limited.rank() == 20);
    CHECK(std::sqrt(limited.squared_error) == doctest::Approx(true_error(a, limited)).epsilon(1e-6));
}

TEST_CASE("the same seed gives the same bits on any number of threads, another seed others")
{
    const auto a = normal_matrix<float>(700, 520, 1, matrix_order::row_major);
    const auto one = randomized_svd<float>(cpu{.threads = 1}, a.view(), {.rank = 10, .seed = 4});
    const auto four = randomized_svd<float>(cpu{.threads = 4}, a.view(), {.rank = 10, .seed = 4});
    CHECK(one.sigma == four.sigma);
    CHECK(one.squared_error == four.squared_error);
    CHECK(std::equal(one.u.data(), one.u.data() + one.u.size(), four.u.data()));
    CHECK(std::equal(one.v.data(), one.v.data() + one.v.size(), four.v.data()));
    CHECK(randomized_svd<float>(cpu{}, a.view(), {.rank = 10, .seed = 5}).sigma != one.sigma);
    CHECK(randomized_svd<float>(cpu{}, a.view(), {.rank = 10, .seed = 4, .name = "other"}).sigma != one.sigma);
}

TEST_CASE("bad arguments are refused with a sentence")
{
    auto a = normal_matrix<float>(30, 20, 1);
    CHECK_THROWS_WITH_AS((void)randomized_svd<float>(cpu{}, a.view(), {.rank = 21, .name = "w"}),
        "'w': rank 21 asked for, but its rank is at most 20; ask for less, or for clamping", invalid_argument);
    CHECK_THROWS_AS((void)randomized_svd<float>(cpu{}, a.view(), {}), invalid_argument);
    CHECK_THROWS_AS((void)randomized_svd<float>(cpu{}, a.view(), {.rank = 2, .energy = 0.9}), invalid_argument);
    CHECK_THROWS_AS((void)randomized_svd<float>(cpu{}, a.view(), {.relative_error = 1.5}), invalid_argument);
    CHECK_THROWS_AS((void)randomized_svd<float>(cpu{}, a.view(), {.energy = -0.5}), invalid_argument);
    a(3, 4) = std::numeric_limits<float>::infinity();
    CHECK_THROWS_WITH_AS((void)randomized_svd<float>(cpu{}, a.view(), {.rank = 2, .name = "w"}),
        "matrix 'w' holds infinity at row 3, column 4; a decomposition needs finite numbers: repair or leave out this "
        "matrix",
        nonfinite_error);
}
