// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/matrix.hpp>

#include <doctest/doctest.h>

#include <cstddef>

using namespace taskvec;

TEST_CASE("a matrix view reads either order, blocks and transposes without a copy")
{
    const float data[] = {1, 2, 3, 4, 5, 6};
    const matrix_view<const float> rows(data, 2, 3, matrix_order::row_major),
        cols(data, 2, 3, matrix_order::column_major);
    CHECK(rows(1, 0) == 4);
    CHECK(cols(1, 0) == 2);
    CHECK(cols(0, 2) == 5);
    CHECK(rows.transposed()(2, 1) == 6);
    CHECK(rows.transposed().rows() == 3);
    CHECK(rows.block(0, 1, 2, 2)(1, 1) == 6);
    CHECK(cols.block(1, 1, 1, 2)(0, 1) == 6);
    CHECK(rows.left_columns(2)(1, 1) == 5);
    CHECK(rows.size() == 6);
    CHECK(matrix_view<const float>(data, 0, 3, matrix_order::row_major).empty());
}

TEST_CASE("a transposed copy has the entries the other way round, in memory of its own")
{
    matrix<float> x(2, 3);
    for (std::size_t i = 0; i < 2; ++i) {
        for (std::size_t j = 0; j < 3; ++j) { x(i, j) = static_cast<float>(10 * i + j); }
    }
    const auto y = transposed_copy(x);
    CHECK(y.rows() == 3);
    CHECK(y.cols() == 2);
    CHECK(y.order() == matrix_order::row_major);
    CHECK(y(2, 0) == 2);
    CHECK(y(0, 1) == 10);
    CHECK(y(2, 1) == 12);
    CHECK(y.data() != x.data());
    CHECK(transposed_copy(matrix<float>(0, 3)).rows() == 3);
}

TEST_CASE("a mutable view is a view of const elements, and can be copied")
{
    float data[] = {1, 2};
    matrix_view<float> x(data, 1, 2, matrix_order::row_major);
    matrix_view<float> y = x;
    y = x;
    const matrix_view<const float> z = y;
    y(0, 1) = 7;
    CHECK(z(0, 1) == 7);
    static_assert(!std::is_convertible_v<matrix_view<const float>, matrix_view<float>>);
    static_assert(!std::is_convertible_v<matrix_view<float>, device_matrix_view<const float>>);
}

TEST_CASE("an owning matrix starts at zero and copies deeply")
{
    matrix<double> x(3, 2);
    CHECK(x(2, 1) == 0);
    matrix<double> y = x;
    y(2, 1) = 5;
    CHECK(x(2, 1) == 0);
    CHECK(y.view().transposed()(1, 2) == 5);
}
