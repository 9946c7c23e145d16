// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/adapter.hpp>

#include "reference/adapters.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

using namespace taskvec;
using reference::dense;
using reference::normal_update;

TEST_CASE("an update made dense, and its norm from the factors")
{
    const auto update = normal_update<float>(300, 70, 5, 1, 0.5);
    const auto expected = dense(update);
    for (const auto order : {matrix_order::row_major, matrix_order::column_major}) {
        matrix<float> out(300, 70, order);
        densify(cpu{}, update, out.view(), -2);
        for (std::size_t i = 0; i < 300; i += 37) {
            for (std::size_t j = 0; j < 70; ++j) {
                CHECK(out(i, j) == doctest::Approx(-2 * expected[i][j]).epsilon(1e-4));
            }
        }
    }
    const double norm = reference::norm(expected);
    CHECK(squared_norm(cpu{}, update) == doctest::Approx(norm * norm).epsilon(1e-6));
    CHECK(squared_norm(cpu{}, lora_update<float>{matrix<float>(4, 0), matrix<float>(0, 3), 1}) == 0);
}

TEST_CASE("triples become factors with sigma on either side")
{
    const auto update = normal_update<double>(12, 9, 4, 2, 3);
    const auto s = factored_svd(cpu{}, update.factors(), {.rank = 4});
    for (const auto side : {sigma_side::both, sigma_side::left}) {
        const auto again = to_update<double>(s, side);
        CHECK(again.scaling == 1);
        CHECK(again.b.order() == matrix_order::row_major);
        CHECK(reference::distance(dense(again), dense(update)) <= 1e-12 * reference::norm(dense(update)));
        double left = 0, right = 0;
        for (std::size_t i = 0; i < 12; ++i) { left += again.b(i, 0) * again.b(i, 0); }
        for (std::size_t j = 0; j < 9; ++j) { right += again.a(0, j) * again.a(0, j); }
        CHECK(left == doctest::Approx(side == sigma_side::both ? s.sigma[0] : s.sigma[0] * s.sigma[0]));
        CHECK(right == doctest::Approx(side == sigma_side::both ? s.sigma[0] : 1));
    }
}

TEST_CASE_TEMPLATE("folding adds the update once rounded, in either order, and comes out again bit for bit", S, float,
    double, bf16, f16)
{
    const auto update = normal_update<float>(130, 33, 3, 3, 0.25);
    const auto delta = dense(update);
    for (const auto order : {matrix_order::row_major, matrix_order::column_major}) {
        const auto base = reference::normal_matrix<S>(130, 33, 9, order);
        auto weight = base, other = base;
        folded_update<S> folded(cpu{.threads = 1}, update, weight.view(), 1.5);
        fold_update(cpu{.threads = 3}, update, other.view(), 1.5);
        CHECK(std::equal(weight.data(), weight.data() + weight.size(), other.data()));
        const double bound = std::is_same_v<S, bf16> ? 0x1p-8 : std::is_same_v<S, f16> ? 0x1p-11 : 1e-6;
        for (std::size_t i = 0; i < 130; ++i) {
            for (std::size_t j = 0; j < 33; ++j) {
                const double expected = static_cast<double>(base(i, j)) + 1.5 * delta[i][j];
                CHECK(std::abs(static_cast<double>(weight(i, j)) - expected) <= bound * (std::abs(expected) + 1));
            }
        }
        folded.undo();
        CHECK(std::equal(weight.data(), weight.data() + weight.size(), base.data()));
        folded.undo();
        fold_update(cpu{}, update, other.view(), -1.5); // near, not equal
        CHECK(std::abs(static_cast<double>(other(5, 5)) - static_cast<double>(base(5, 5)))
            <= 8 * bound * (1 + std::abs(delta[5][5])));
    }
}

TEST_CASE("what does not fit is refused")
{
    auto update = normal_update<float>(8, 6, 2, 1);
    matrix<float> wrong(6, 8);
    CHECK_THROWS_WITH_AS(fold_update(cpu{}, update, wrong.view(), 1, "q"),
        "'q': the update is 8×6 and the weight 6×8; this adapter belongs to another base", shape_mismatch);
    CHECK_NOTHROW(fold_update(cpu{}, update, wrong.view().transposed()));
    update.a = matrix<float>(3, 6);
    CHECK_THROWS_WITH_AS(
        check_update(update, "q"), "'q': lora_B is 8×2 and lora_A 3×6; their ranks differ", shape_mismatch);
}
