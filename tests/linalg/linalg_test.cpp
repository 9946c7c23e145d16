// SPDX-License-Identifier: Apache-2.0
#include <taskvec/linalg/eigen.hpp>

#include "reference/random_matrix.hpp"
#include "reference/svd.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <limits>

using namespace taskvec;
using reference::normal_matrix;

namespace {
constexpr matrix_order orders[] = {matrix_order::row_major, matrix_order::column_major};

template <class T>
matrix<T> identity(std::size_t n)
{
    matrix<T> x(n, n);
    for (std::size_t i = 0; i < n; ++i) { x(i, i) = 1; }
    return x;
}
} // namespace

TEST_CASE_TEMPLATE("gemm agrees with plain loops in every order", T, float, double)
{
    const double bound = std::is_same_v<T, float> ? 1e-5 : 1e-13;
    for (const auto [m, k, n] :
        {std::array<std::size_t, 3>{3, 4, 5}, {700, 3, 2}, {2, 600, 530}, {1, 1, 1}, {4, 0, 3}}) {
        for (const auto oa : orders) {
            for (const auto ob : orders) {
                for (const auto oc : orders) {
                    const auto a = normal_matrix<T>(m, k, 1, oa), b = normal_matrix<T>(k, n, 2, ob);
                    auto c = normal_matrix<T>(m, n, 3, oc);
                    const auto before = c;
                    gemm(cpu{.threads = 2}, T(2), a.view(), b.view(), T(-1), c.view());
                    double worst = 0;
                    for (std::size_t i = 0; i < m; ++i) {
                        for (std::size_t j = 0; j < n; ++j) {
                            double sum = -static_cast<double>(before(i, j));
                            for (std::size_t p = 0; p < k; ++p) {
                                sum += 2 * static_cast<double>(a(i, p)) * static_cast<double>(b(p, j));
                            }
                            worst = std::max(worst, std::abs(sum - static_cast<double>(c(i, j))));
                        }
                    }
                    CHECK(worst <= bound * static_cast<double>(k + 1));
                }
            }
        }
    }
}

TEST_CASE("gemm works on blocks, and its bits do not depend on threads")
{
    const auto a = normal_matrix<float>(900, 300, 1, matrix_order::row_major), b = normal_matrix<float>(300, 40, 2);
    matrix<float> one(900, 40), four(900, 40);
    gemm(cpu{.threads = 1}, 1.0f, a.view(), b.view(), 0.0f, one.view());
    gemm(cpu{.threads = 4}, 1.0f, a.view(), b.view(), 0.0f, four.view());
    CHECK(std::equal(one.data(), one.data() + one.size(), four.data()));

    matrix<float> part(10, 5);
    gemm(cpu{}, 1.0f, a.view().block(100, 7, 10, 20), b.view().block(3, 2, 20, 5), 0.0f, part.view());
    double sum = 0;
    for (std::size_t p = 0; p < 20; ++p) {
        sum += static_cast<double>(a(104, 7 + p)) * static_cast<double>(b(3 + p, 4));
    }
    CHECK(part(4, 2) == doctest::Approx(sum).epsilon(1e-5));
    CHECK_THROWS_AS(gemm(cpu{}, 1.0f, a.view(), a.view(), 0.0f, part.view()), shape_mismatch);
}

TEST_CASE("a factor of NaN times zero is not taken: beta 0 overwrites")
{
    const auto a = normal_matrix<double>(2, 2, 1);
    matrix<double> c(2, 2);
    c(0, 0) = std::numeric_limits<double>::quiet_NaN();
    gemm(cpu{}, 1.0, a.view(), a.view(), 0.0, c.view());
    CHECK(std::isfinite(c(0, 0)));
}

TEST_CASE_TEMPLATE("squared_norm is exact to rounding and does not depend on threads", T, float, double)
{
    const auto a = normal_matrix<T>(1500, 801, 4, matrix_order::row_major);
    long double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) { sum += static_cast<long double>(a.data()[i]) * a.data()[i]; }
    const double one = squared_norm<T>(cpu{.threads = 1}, a.view());
    CHECK(one == doctest::Approx(static_cast<double>(sum)).epsilon(1e-13));
    CHECK(one == squared_norm<T>(cpu{.threads = 3}, a.view()));
    CHECK(squared_norm<T>(cpu{}, a.view().block(3, 4, 1, 1))
        == doctest::Approx(static_cast<double>(a(3, 4)) * static_cast<double>(a(3, 4))));
}

TEST_CASE("fill_normal writes the stream's own numbers")
{
    const random_stream stream(7, 0, "x");
    matrix<double> a(5, 3);
    matrix<float> b(5, 3, matrix_order::row_major);
    fill_normal<double>(cpu{}, stream, a);
    fill_normal<float>(cpu{}, stream, b);
    for (std::size_t i = 0; i < 5; ++i) {
        for (std::size_t j = 0; j < 3; ++j) {
            CHECK(a(i, j) == stream.normal(j * 5 + i));
            CHECK(b(i, j) == static_cast<float>(a(i, j)));
        }
    }
}

TEST_CASE_TEMPLATE("thin QR: orthonormal, exact, on every road", T, float, double)
{
    const double bound = std::is_same_v<T, float> ? 3e-7 : 3e-14;
    struct example {
        const char* name;
        matrix<T> a;
    };
    std::vector<example> examples;
    for (const auto order : orders) {
        examples.push_back({"well conditioned", normal_matrix<T>(600, 20, 1, order)});
        examples.push_back({"one column", normal_matrix<T>(300, 1, 2, order)});
        examples.push_back({"square", normal_matrix<T>(30, 30, 3, order)});
        examples.push_back({"wide", normal_matrix<T>(7, 30, 4, order)});
        examples.push_back({"1×n", normal_matrix<T>(1, 9, 5, order)});
        examples.push_back({"zero", matrix<T>(40, 6, order)});
        examples.push_back({"tiny", normal_matrix<T>(50, 4, 6, order, 1e-30)});
    }
    for (const double kappa : {1e2, 1e4, 1e5, 1e7, 1e12}) {
        std::vector<double> sigma;
        for (int i = 0; i < 12; ++i) { sigma.push_back(std::pow(kappa, -i / 11.0)); }
        examples.push_back({"ill conditioned", reference::matrix_with_spectrum<T>(400, 12, sigma, 8)});
    }
    examples.push_back({"rank deficient", reference::matrix_with_spectrum<T>(300, 10, {3, 2, 1}, 9)});
    auto twice = normal_matrix<T>(100, 4, 10);
    std::copy_n(twice.data(), 100, twice.data() + 300); // two equal columns
    examples.push_back({"equal columns", twice});
    auto graded = normal_matrix<T>(100, 4, 11);
    for (std::size_t i = 0; i < 100; ++i) {
        graded(i, 1) *= T(1e-12);
        graded(i, 2) *= T(1e9);
    }
    examples.push_back({"columns of very different length", graded});

    for (const auto& one : examples) {
        const auto& a = one.a;
        CAPTURE(one.name);
        CAPTURE(a.rows());
        CAPTURE(a.cols());
        const auto f = factor_qr<T>(cpu{}, a.view());
        CAPTURE(static_cast<int>(f.kept));
        const std::size_t k = std::min(a.rows(), a.cols());
        REQUIRE(f.r.rows() == k);
        matrix<T> q(a.rows(), k);
        multiply_q<T>(cpu{}, f, identity<double>(k), q);
        CHECK(reference::departure_from_orthonormal<T>(q.view()) <= bound);
        for (std::size_t j = 0; j < a.cols(); ++j) { // column by column: small columns are right too
            double off = 0, size = 0;
            for (std::size_t i = 0; i < a.rows(); ++i) {
                double sum = -static_cast<double>(a(i, j));
                for (std::size_t p = 0; p < k; ++p) { sum += static_cast<double>(q(i, p)) * f.r(p, j); }
                off += sum * sum;
                size += static_cast<double>(a(i, j)) * static_cast<double>(a(i, j));
            }
            CHECK(std::sqrt(off) <= 10 * bound * std::sqrt(size));
        }
    }
}

TEST_CASE("thin QR names the place of a NaN")
{
    auto a = normal_matrix<float>(300, 5, 1);
    a(17, 3) = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_WITH_AS((void)factor_qr<float>(cpu{}, a.view(), "layer.0"),
        "matrix 'layer.0' holds NaN at row 17, column 3; a decomposition needs finite numbers: repair or leave out "
        "this matrix",
        nonfinite_error);
    a(17, 3) = std::numeric_limits<float>::infinity();
    CHECK_THROWS_AS((void)factor_qr<float>(cpu{}, a.view().transposed()), nonfinite_error);
    // Squares that overflow are not a fault of the data.
    auto large = normal_matrix<double>(50, 3, 2, matrix_order::column_major, 1e200);
    const auto f = factor_qr<double>(cpu{}, large.view());
    CHECK(std::isfinite(f.r(0, 0)));
}

TEST_CASE("small SVD agrees with the reference")
{
    std::vector<matrix<double>> examples{normal_matrix<double>(1, 1, 1), normal_matrix<double>(9, 9, 2),
        normal_matrix<double>(20, 7, 3), normal_matrix<double>(7, 20, 4, matrix_order::row_major),
        normal_matrix<double>(1, 12, 5), matrix<double>(5, 3), matrix<double>(3, 0),
        reference::matrix_with_spectrum<double>(12, 12, {5, 5, 5, 1, 1, 1e-9}, 6),
        reference::matrix_with_spectrum<double>(40, 40, {1, 1e-3, 1e-6, 1e-14}, 7),
        normal_matrix<double>(6, 6, 8, matrix_order::row_major, 1e-300),
        normal_matrix<double>(6, 6, 9, matrix_order::row_major, 1e300), normal_matrix<double>(64, 64, 10)};
    for (const auto& a : examples) {
        CAPTURE(a.rows());
        CAPTURE(a.cols());
        const auto s = small_svd(cpu{}, a.view());
        const std::size_t k = std::min(a.rows(), a.cols());
        REQUIRE(s.sigma.size() == k);
        CHECK(reference::departure_from_orthonormal<double>(s.u.view()) <= 1e-13);
        CHECK(reference::departure_from_orthonormal<double>(s.v.view()) <= 1e-13);
        CHECK(std::is_sorted(s.sigma.rbegin(), s.sigma.rend()));
        if (k == 0) { continue; }
        const double top = s.sigma[0];
        if (top < 1e200 && top > 1e-200) {
            const auto expected = reference::singular_values(reference::plain<double>(a.view()));
            for (std::size_t i = 0; i < k; ++i) {
                CHECK(std::abs(s.sigma[i] - expected[i]) <= 1e-14 * static_cast<double>(k + 4) * expected[0]);
            }
        }
        double worst = 0;
        for (std::size_t i = 0; i < a.rows(); ++i) {
            for (std::size_t j = 0; j < a.cols(); ++j) {
                double sum = -a(i, j);
                for (std::size_t p = 0; p < k; ++p) { sum += s.u(i, p) * s.sigma[p] * s.v(j, p); }
                worst = std::max(worst, std::abs(sum));
            }
        }
        CHECK(worst <= 1e-13 * top);
    }
    auto bad = matrix<double>(2, 2);
    bad(1, 0) = std::numeric_limits<double>::infinity();
    CHECK_THROWS_AS((void)small_svd(cpu{}, bad.view()), nonfinite_error);
}

TEST_CASE("orient makes the largest entry of each u positive, the first among equals")
{
    matrix<float> u(3, 2), v(2, 2);
    u(0, 0) = -2, u(1, 0) = 2, u(2, 0) = 1, v(0, 0) = 5;
    u(1, 1) = 3, v(1, 1) = -1;
    orient<float>(cpu{}, u, v);
    CHECK(u(0, 0) == 2);
    CHECK(u(1, 0) == -2);
    CHECK(v(0, 0) == -5);
    CHECK(u(1, 1) == 3);
    CHECK(v(1, 1) == -1);
}

TEST_CASE("cholesky_solve solves, and says when it cannot")
{
    const auto x = normal_matrix<double>(30, 8, 1);
    matrix<double> g(8, 8);
    gemm(cpu{}, 1.0, x.view().transposed(), x.view(), 0.0, g.view());
    for (const auto order : orders) {
        const auto b = normal_matrix<double>(8, 3, 2, order);
        auto solved = b;
        REQUIRE(cholesky_solve(cpu{}, g.view(), solved.view()));
        for (std::size_t i = 0; i < 8; ++i) {
            for (std::size_t j = 0; j < 3; ++j) {
                double sum = 0;
                for (std::size_t p = 0; p < 8; ++p) { sum += g(i, p) * solved(p, j); }
                CHECK(sum == doctest::Approx(b(i, j)).epsilon(1e-10));
            }
        }
    }
    auto l = g;
    CHECK(factor_cholesky(cpu{}, l.view()) > 0.1);
    for (std::size_t i = 0; i < 8; ++i) {
        for (std::size_t j = 0; j <= i; ++j) {
            double sum = 0;
            for (std::size_t p = 0; p <= j; ++p) { sum += l(i, p) * l(j, p); }
            CHECK(sum == doctest::Approx(g(i, j)).epsilon(1e-10));
        }
        CHECK((i == 7 || l(i, i + 1) == g(i, i + 1)));
    }
    auto dependent = x; // the last column is the sum of two others: nothing of it is its own
    for (std::size_t i = 0; i < 30; ++i) { dependent(i, 7) = x(i, 0) + x(i, 1); }
    gemm(cpu{}, 1.0, dependent.view().transposed(), dependent.view(), 0.0, l.view());
    CHECK(factor_cholesky(cpu{}, l.view()) < 1e-14);
    const auto wide = normal_matrix<double>(8, 600, 3);
    auto one = wide, three = wide;
    auto factor = g;
    REQUIRE(factor_cholesky(cpu{}, factor.view()) > 0);
    solve_cholesky(cpu{.threads = 1}, factor.view(), one.view());
    solve_cholesky(cpu{.threads = 3}, factor.view(), three.view());
    CHECK(std::memcmp(one.data(), three.data(), one.size() * sizeof(double)) == 0);
    matrix<double> singular(3, 3), rhs(3, 1);
    CHECK_FALSE(cholesky_solve(cpu{}, singular.view(), rhs.view()));
}
