// Matrices that go to the device and back, from whatever holds them on the host.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/linalg/matrix.hpp>
#include <taskvec/device/thrust/system.hpp>
#include <taskvec/interop/eigen.hpp>

#include <doctest/doctest.h>

#include <cstddef>

using namespace taskvec;

namespace {

/// What comes back has the shape, the order and the numbers of x.
template <class X>
void check_there_and_back(const X& x, matrix_order order)
{
    const gpu policy;
    const auto back = to_host(policy, to_device(policy, x));
    CHECK(back.order() == order);
    REQUIRE(back.rows() == static_cast<std::size_t>(x.rows()));
    REQUIRE(back.cols() == static_cast<std::size_t>(x.cols()));
    for (std::size_t i = 0; i < back.rows(); ++i) {
        for (std::size_t j = 0; j < back.cols(); ++j) {
            const auto expected = x(static_cast<Eigen::Index>(i), static_cast<Eigen::Index>(j));
            CHECK(widen<double>(back(i, j)) == static_cast<double>(expected));
        }
    }
}

} // namespace

TEST_CASE("Eigen's matrices, maps, blocks and vectors of either order go to the device as they are")
{
    const Eigen::MatrixXf a = Eigen::MatrixXf::Random(5, 3);
    const Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> b = Eigen::MatrixXd::Random(4, 6);
    check_there_and_back(a, matrix_order::column_major);
    check_there_and_back(a.block(1, 1, 3, 2), matrix_order::column_major);
    check_there_and_back(b, matrix_order::row_major);
    check_there_and_back(b.middleCols(2, 3), matrix_order::row_major);
    check_there_and_back(Eigen::Map<const Eigen::MatrixXf>(a.data(), 3, 5), matrix_order::column_major);
    const Eigen::VectorXf column = a.col(1);
    check_there_and_back(column, matrix_order::column_major);
    const Eigen::Matrix<Eigen::bfloat16, Eigen::Dynamic, Eigen::Dynamic> rounded = a.cast<Eigen::bfloat16>();
    check_there_and_back(rounded, matrix_order::column_major);
    CHECK_THROWS_WITH_AS((void)to_device(gpu{}, a.row(1)),
        doctest::Contains("leaves 4 elements out between two of a run"), invalid_argument);
}

TEST_CASE("A view of mutable elements goes to the device as one of const ones does")
{
    const gpu policy;
    matrix<float> x(2, 3, matrix_order::row_major);
    x(1, 2) = 5;
    const matrix_view<float> view = x;
    CHECK(to_host(policy, to_device(policy, view))(1, 2) == 5);
}
