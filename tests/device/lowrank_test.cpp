// The linear algebra seam and the low-rank algorithms on taskvec::gpu. One source: Eigen answers on a Thrust host
// system, cuBLAS and cuSOLVER on CUDA, and the stand-in of tests/device/standin for our calls of them. Compiled by the
// host compiler in each case.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/linalg.hpp>
#include <taskvec/reuse/peru_lora.hpp>

#include "reference/random_matrix.hpp"
#include "reference/svd.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

using namespace taskvec;
using reference::normal_matrix;

namespace {

constexpr matrix_order orders[] = {matrix_order::row_major, matrix_order::column_major};

/// What f32 and f64 are held to, relative to the norms of the factors.
template <class T>
constexpr double bound = std::is_same_v<T, double> ? 1e-13 : 1e-5;

template <class Result>
struct on_host {
    using T = std::remove_cvref_t<decltype(*std::declval<Result>().u.data())>;
    matrix<T> u;
    std::vector<double> sigma;
    matrix<T> v;

    on_host(const gpu& policy, const Result& s)
        : u(to_host(policy, s.u))
        , sigma(s.sigma)
        , v(to_host(policy, s.v))
    { }
};

/// Everything that must hold of a decomposition of `product` with the exact leading triples.
template <class Result>
void check_best(const gpu& policy, const Result& s, const reference::plain_matrix& product, std::size_t q, double scale)
{
    const on_host<Result> here(policy, s);
    using T = typename on_host<Result>::T;
    REQUIRE(s.rank() == q);
    const auto sigma = reference::singular_values(product);
    for (std::size_t i = 0; i < q; ++i) { CHECK(std::abs(s.sigma[i] - sigma[i]) <= bound<T> * scale); }
    CHECK(reference::departure_from_orthonormal<T>(here.u.view()) <= bound<T>);
    CHECK(reference::departure_from_orthonormal<T>(here.v.view()) <= bound<T>);
    const double tail = std::sqrt(energy_beyond(sigma, q));
    CHECK(std::abs(reference::distance(product, reference::composed(here)) - tail) <= 10 * bound<T> * scale);
    CHECK(std::abs(std::sqrt(s.squared_error) - tail) <= 10 * bound<T> * scale);
    for (std::size_t j = 0; j < q; ++j) { // the sign rule
        T largest = 0;
        for (std::size_t i = 0; i < here.u.rows(); ++i) {
            if (std::abs(here.u(i, j)) > std::abs(largest)) { largest = here.u(i, j); }
        }
        CHECK(largest > 0);
    }
}

} // namespace

TEST_CASE_TEMPLATE("products in every order, of blocks as of whole matrices", T, float, double)
{
    const gpu_context context;
    for (const gpu& policy : {gpu{}, context.policy()}) {
        for (const auto [m, k, n] : {std::array<std::size_t, 3>{3, 4, 5}, {7, 1, 2}, {1, 9, 1}, {4, 0, 3}}) {
            for (const auto oa : orders) {
                for (const auto ob : orders) {
                    for (const auto oc : orders) {
                        const auto a = normal_matrix<T>(m + 2, k + 1, 1, oa), b = normal_matrix<T>(k + 1, n + 3, 2, ob),
                                   before = normal_matrix<T>(m + 1, n + 2, 3, oc);
                        const auto da = to_device(policy, a), db = to_device(policy, b);
                        auto dc = to_device(policy, before);
                        gemm<T>(policy, T(2), da.view().block(2, 1, m, k), db.view().block(1, 3, k, n), T(-1),
                            dc.view().block(1, 1, m, n));
                        const auto c = to_host(policy, dc);
                        for (std::size_t i = 0; i < m + 1; ++i) {
                            for (std::size_t j = 0; j < n + 2; ++j) {
                                const bool inside = i >= 1 && j >= 1 && j < n + 1;
                                double sum =
                                    inside ? -static_cast<double>(before(i, j)) : static_cast<double>(before(i, j));
                                for (std::size_t p = 0; inside && p < k; ++p) {
                                    sum +=
                                        2 * static_cast<double>(a(i + 1, p + 1)) * static_cast<double>(b(p + 1, j + 2));
                                }
                                CHECK(static_cast<double>(c(i, j)) == doctest::Approx(sum).epsilon(1e-4));
                            }
                        }
                    }
                }
            }
        }
    }
    const auto a = to_device(gpu{}, normal_matrix<T>(3, 4, 1));
    auto c = device_matrix<T>(gpu{}, 3, 3);
    CHECK_THROWS_AS(gemm<T>(gpu{}, T(1), a.view(), a.view(), T(0), c.view()), shape_mismatch);
}

TEST_CASE_TEMPLATE("copies between orders, scaled columns, norms, the CPU's normal numbers", T, float, double)
{
    const gpu policy;
    for (const auto from : orders) {
        for (const auto to : orders) {
            const auto x = normal_matrix<T>(6, 4, 1, from);
            const auto dx = to_device(policy, x);
            device_matrix<T> dy(policy, 7, 5, to);
            copy_matrix<T>(policy, dx.view().block(1, 1, 5, 3), dy.view().block(2, 0, 5, 3));
            const auto y = to_host(policy, dy);
            device_matrix<T> dz(policy, 6, 4, to);
            scale_columns<T>(policy, dx.view(), std::vector<double>{1, -2, 0.5, 0}, dz.view());
            const auto z = to_host(policy, dz);
            for (std::size_t i = 0; i < 5; ++i) {
                for (std::size_t j = 0; j < 3; ++j) { CHECK(y(i + 2, j) == x(i + 1, j + 1)); }
                CHECK(y(i, 4) == 0);
                CHECK(z(i, 1) == T(-2) * x(i, 1));
                CHECK(z(i, 2) == T(0.5) * x(i, 2));
            }
            double sum = 0;
            for (std::size_t i = 0; i < 5; ++i) {
                for (std::size_t j = 0; j < 3; ++j) {
                    sum += static_cast<double>(x(i + 1, j + 1)) * static_cast<double>(x(i + 1, j + 1));
                }
            }
            CHECK(squared_norm<T>(policy, dx.view().block(1, 1, 5, 3)) == doctest::Approx(sum).epsilon(1e-5));
        }
    }
    const random_stream stream(3, 0, "x");
    device_matrix<T> drawn(policy, 5, 3);
    matrix<T> here(5, 3);
    fill_normal<T>(policy, stream, drawn.view());
    fill_normal<T>(cpu{}, stream, here.view());
    const auto back = to_host(policy, drawn);
    CHECK(std::equal(here.data(), here.data() + here.size(), back.data()));
}

TEST_CASE("16-bit matrices are widened exactly")
{
    const gpu policy;
    const auto check = [&]<class S>(S) {
        for (const auto order : orders) {
            auto x = normal_matrix<S>(70, 66, 5, order);
            x(3, 2) = narrow<S>(1e-6f); // subnormal for f16
            const auto dx = to_device(policy, x);
            device_matrix<float> copy;
            const auto wide = to_host<float>(policy, in_arithmetic<S>(policy, dx.view(), copy));
            for (std::size_t i = 0; i < 70; ++i) {
                for (std::size_t j = 0; j < 66; ++j) { CHECK(wide(i, j) == widen<float>(x(i, j))); }
            }
        }
    };
    check(bf16{});
    check(f16{});
}

TEST_CASE("symmetric solve: right, in either order, and it says when it cannot")
{
    const gpu_context context;
    const gpu policy = context.policy();
    const auto x = normal_matrix<double>(30, 8, 1);
    matrix<double> g(8, 8);
    gemm(cpu{}, 1.0, x.view().transposed(), x.view(), 0.0, g.view());
    const auto dg = to_device(policy, g);
    for (const auto order : orders) {
        const auto b = normal_matrix<double>(8, 3, 2, order);
        auto db = to_device(policy, b);
        REQUIRE(cholesky_solve<double>(policy, dg.view(), db.view()));
        const auto solved = to_host(policy, db);
        for (std::size_t i = 0; i < 8; ++i) {
            for (std::size_t j = 0; j < 3; ++j) {
                double sum = 0;
                for (std::size_t p = 0; p < 8; ++p) { sum += g(i, p) * solved(p, j); }
                CHECK(sum == doctest::Approx(b(i, j)).epsilon(1e-10));
            }
        }
    }
    auto l = to_device(policy, g);
    matrix<double> same = g;
    CHECK(factor_cholesky<double>(policy, l.view()) == doctest::Approx(factor_cholesky(cpu{}, same.view())));
    device_matrix<double> singular(policy, 3, 3), rhs(policy, 3, 1);
    CHECK_FALSE(cholesky_solve<double>(policy, std::as_const(singular).view(), rhs.view()));
}

TEST_CASE_TEMPLATE("factored SVD: the best approximation of the product, from either order", T, double, float, bf16)
{
    const gpu_context context;
    const gpu policy = context.policy();
    for (const auto& [m, n, r] :
        {std::array<std::size_t, 3>{40, 30, 6}, {12, 20, 15}, {20, 12, 15}, {9, 9, 1}, {1, 25, 4}}) {
        for (const auto order : orders) {
            const auto a = normal_matrix<T>(m, r, 1, order), b = normal_matrix<T>(n, r, 2, matrix_order::column_major);
            const auto da = to_device(policy, a), db = to_device(policy, b);
            matrix<arithmetic_type<T>> wa, wb;
            const auto pa = reference::plain<arithmetic_type<T>>(in_arithmetic<T>(cpu{}, a.view(), wa)),
                       pb = reference::plain<arithmetic_type<T>>(in_arithmetic<T>(cpu{}, b.view(), wb));
            const std::size_t least = std::min({m, n, r});
            const auto s = factored_svd<T>(policy, da.view(), db.view(), {.rank = (least + 1) / 2});
            CHECK(s.spectrum.size() == least);
            check_best(
                policy, s, reference::product_abt(pa, pb), (least + 1) / 2, reference::norm(pa) * reference::norm(pb));
        }
    }
}

TEST_CASE("many layers are decomposed together, as each by itself")
{
    const gpu_context context;
    const gpu policy = context.policy();
    std::vector<matrix<float>> host;
    std::vector<device_matrix<float>> store;
    for (std::uint64_t i = 0; i < 70; ++i) { // more than a batch; three shapes of core, one of them above 32
        const std::size_t r = i % 10 == 9 ? 35 : i % 2 ? 4 : 6;
        host.push_back(normal_matrix<float>(40, r, 2 * i, matrix_order::row_major));
        host.push_back(normal_matrix<float>(36, r, 2 * i + 1));
    }
    for (const auto& one : host) { store.push_back(to_device(policy, one)); }
    std::vector<factor_pair<float, memory_space::device>> pairs;
    for (std::size_t i = 0; i < store.size(); i += 2) {
        pairs.push_back({.left = std::as_const(store[i]).view(), .right = std::as_const(store[i + 1]).view()});
    }
    const auto all =
        factored_svd<float>(policy, std::span<const factor_pair<float, memory_space::device>>(pairs), {.rank = 3});
    REQUIRE(all.size() == 70);
    for (std::size_t i = 0; i < all.size(); ++i) {
        const auto here = factored_svd<float>(cpu{}, host[2 * i].view(), host[2 * i + 1].view(), {.rank = 3});
        for (std::size_t k = 0; k < 3; ++k) { CHECK(all[i].sigma[k] == doctest::Approx(here.sigma[k]).epsilon(1e-4)); }
    }
    for (const std::size_t i : {0u, 1u, 9u, 69u}) {
        const auto pa = reference::plain<float>(host[2 * i].view()),
                   pb = reference::plain<float>(host[2 * i + 1].view());
        check_best(policy, all[i], reference::product_abt(pa, pb), 3, reference::norm(pa) * reference::norm(pb));
    }
    CHECK(
        factored_svd<float>(policy, std::span<const factor_pair<float, memory_space::device>>{}, {.rank = 3}).empty());
}

TEST_CASE("a sum of factor pairs of different ranks")
{
    const gpu policy;
    const auto a1 = normal_matrix<double>(20, 3, 1, matrix_order::row_major), b1 = normal_matrix<double>(15, 3, 2),
               a2 = normal_matrix<double>(20, 5, 3), b2 = normal_matrix<double>(15, 5, 4);
    const auto da1 = to_device(policy, a1), db1 = to_device(policy, b1), da2 = to_device(policy, a2),
               db2 = to_device(policy, b2);
    const std::array pairs{
        factor_pair<double, memory_space::device>{.left = da1.view(), .right = db1.view(), .weight = 0.5},
        factor_pair<double, memory_space::device>{.left = da2.view(), .right = db2.view(), .weight = -2}};
    auto sum = reference::zeros(20, 15);
    const auto p1 = reference::product_abt(reference::plain<double>(a1.view()), reference::plain<double>(b1.view())),
               p2 = reference::product_abt(reference::plain<double>(a2.view()), reference::plain<double>(b2.view()));
    for (std::size_t i = 0; i < 20; ++i) {
        for (std::size_t j = 0; j < 15; ++j) { sum[i][j] = 0.5 * p1[i][j] - 2 * p2[i][j]; }
    }
    check_best(policy,
        compress_sum<double>(policy, std::span<const factor_pair<double, memory_space::device>>(pairs), {.rank = 4}),
        sum, 4, 300);
}

TEST_CASE_TEMPLATE("truncated SVD: exact leading triples of tall, wide and square matrices", T, double, float)
{
    const gpu policy;
    for (const auto& [m, n] : {std::pair<std::size_t, std::size_t>{30, 12}, {12, 30}, {10, 10}, {1, 5}}) {
        for (const auto order : orders) {
            const auto a = normal_matrix<T>(m, n, 7, order);
            const auto s = truncated_svd<T>(policy, to_device(policy, a), {.rank = (std::min(m, n) + 2) / 3});
            const auto plain = reference::plain<T>(a.view());
            check_best(policy, s, plain, (std::min(m, n) + 2) / 3, reference::norm(plain));
        }
    }
}

TEST_CASE_TEMPLATE("randomized SVD: within 1% of the best error, and it says how far off it is", T, float, double)
{
    const gpu_context context;
    const gpu policy = context.policy();
    std::vector<double> sigma;
    for (int i = 0; i < 50; ++i) { sigma.push_back(std::pow(0.8, i)); }
    for (const auto& [m, n] : {std::pair<std::size_t, std::size_t>{80, 50}, {50, 80}}) {
        const auto a = reference::matrix_with_spectrum<T>(m, n, sigma, 3);
        const auto da = to_device(policy, a);
        const double best = std::sqrt(energy_beyond(sigma, 8));
        const auto check = [&](const auto& s) {
            const on_host<std::remove_cvref_t<decltype(s)>> here(policy, s);
            REQUIRE(s.rank() == 8);
            const double error = reference::distance(reference::plain<T>(a.view()), reference::composed(here));
            CHECK(error <= 1.01 * best);
            CHECK(std::sqrt(s.squared_error) == doctest::Approx(error).epsilon(1e-3));
            CHECK(reference::departure_from_orthonormal<T>(here.u.view()) <= bound<T>);
            CHECK(reference::departure_from_orthonormal<T>(here.v.view()) <= bound<T>);
        };
        check(randomized_svd<T>(policy, da.view(), {.rank = 8, .seed = 5}));
        const auto grown = randomized_svd<T>(policy, da.view(), {.relative_error = 0.02});
        CHECK(grown.reached);
        CHECK(grown.relative_error() <= 0.02);
#if TASKVEC_ON_CUDA
        check(randomized_svd_by_gesvdr<T>(policy, da.view(), {.rank = 8}));
        CHECK_THROWS_AS((void)randomized_svd_by_gesvdr<T>(policy, da.view(), {.energy = 0.9}), invalid_argument);
#endif
    }
}

TEST_CASE("PERU-LoRA over device layers is PERU-LoRA over host layers")
{
    const gpu_context context;
    const gpu policy = context.policy();
    lora_adapter<float> host;
    lora_adapter<float, memory_space::device> device;
    for (std::uint64_t i = 0; i < 5; ++i) {
        const std::size_t r = i == 4 ? 2 : 8;
        const std::string name = "layer." + std::to_string(i);
        host.emplace(name,
            lora_update<float>{normal_matrix<float>(24, r, 2 * i, matrix_order::row_major),
                normal_matrix<float>(r, 20, 2 * i + 1, matrix_order::row_major), 0.5});
        device.emplace(name,
            lora_update<float, memory_space::device>{
                to_device(policy, host.at(name).b), to_device(policy, host.at(name).a), 0.5});
    }
    for (const auto side : {sigma_side::both, sigma_side::left}) {
        const auto there = peru_lora(policy, device, {.rank = {.rank = 4}, .side = side});
        const auto here = peru_lora(cpu{}, host, {.rank = {.rank = 4}, .side = side});
        REQUIRE(there.layers.size() == here.layers.size());
        CHECK(there.parameters() == here.parameters());
        CHECK(there.relative_error() == doctest::Approx(here.relative_error()).epsilon(1e-4));
        for (std::size_t i = 0; i < here.layers.size(); ++i) {
            CHECK(there.layers[i].name == here.layers[i].name);
            CHECK(there.layers[i].whole == here.layers[i].whole);
            const auto& update = there.adapter.at(here.layers[i].name);
            const auto b = to_host(policy, update.b), a = to_host(policy, update.a);
            const auto& wanted = here.adapter.at(here.layers[i].name);
            CHECK(b.order() == matrix_order::row_major);
            CHECK(update.scaling == wanted.scaling);
            double off = 0;
            for (std::size_t k = 0; k < b.size(); ++k) {
                off =
                    std::max(off, std::abs(static_cast<double>(b.data()[k]) - static_cast<double>(wanted.b.data()[k])));
            }
            for (std::size_t k = 0; k < a.size(); ++k) {
                off =
                    std::max(off, std::abs(static_cast<double>(a.data()[k]) - static_cast<double>(wanted.a.data()[k])));
            }
            CHECK(off <= 1e-3);
        }
    }
}

TEST_CASE("bad input is refused as on the CPU")
{
    const gpu policy;
    const auto host = normal_matrix<float>(12, 4, 1);
    const auto a = to_device(policy, host), b = to_device(policy, normal_matrix<float>(10, 4, 2)),
               c = to_device(policy, normal_matrix<float>(10, 3, 2));
    CHECK_THROWS_WITH_AS((void)factored_svd<float>(policy, a.view(), c.view(), {.rank = 2}),
        "'left·rightᵀ': the left factor is 12×4 and the right one 10×3; the inner ranks differ", shape_mismatch);
    CHECK_THROWS_WITH_AS((void)factored_svd<float>(policy, a.view(), b.view(), {.rank = 5}),
        "'left·rightᵀ': rank 5 asked for, but its rank is at most 4; ask for less, or for clamping", invalid_argument);
    CHECK_THROWS_AS((void)truncated_svd<float>(policy, a.view(), {}), invalid_argument);
    CHECK_THROWS_AS((void)randomized_svd<float>(policy, a.view(), {.rank = 2, .energy = 0.5}), invalid_argument);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        auto spoiled = host;
        spoiled(7, 1) = bad;
        const auto there = to_device(policy, spoiled);
        CHECK_THROWS_AS((void)factored_svd<float>(policy, b.view(), there.view(), {.rank = 2}), nonfinite_error);
        CHECK_THROWS_WITH_AS((void)randomized_svd<float>(policy, there.view(), {.rank = 2, .name = "w"}),
            doctest::Contains("at row 7, column 1; a decomposition needs finite numbers"), nonfinite_error);
        CHECK_THROWS_AS((void)truncated_svd<float>(policy, there.view(), {.rank = 2}), nonfinite_error);
    }
    const device_matrix<float> none(policy, 0, 4);
    CHECK(factored_svd<float>(policy, none.view(), b.view(), rank_choice::full()).rank() == 0);
    CHECK(truncated_svd<float>(policy, none.view(), rank_choice::full()).rank() == 0);
}
