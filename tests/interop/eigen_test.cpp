// Eigen objects as inputs and outputs without a copy, and the refusal of what is not one row-major run.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/policy.hpp>
#include <taskvec/interop/eigen.hpp>

#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

using namespace taskvec;

namespace {
template <class T>
using rows_of = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

rows_of<float> counted(int rows, int cols)
{
    rows_of<float> matrix(rows, cols);
    for (int i = 0; i < rows * cols; ++i) { matrix.data()[i] = static_cast<float>(i); }
    return matrix;
}

template <class F>
std::string refusal(F&& f)
{
    try {
        f();
    }
    catch (const invalid_argument& problem) {
        return problem.what();
    }
    return {};
}

template <class X>
concept has_matrix = requires { as_matrix(std::declval<X>()); };
template <class X>
concept has_eigen = requires { as_eigen(std::declval<X>()); };
} // namespace

TEST_CASE_TEMPLATE("vectors, arrays and row-major matrices are viewed in place, in row-major order", T, double, float,
    Eigen::bfloat16, Eigen::half)
{
    Eigen::Matrix<T, Eigen::Dynamic, 1> column(5);
    Eigen::Matrix<T, 1, 4> row;
    Eigen::Array<T, Eigen::Dynamic, 1> array(3);
    rows_of<T> matrix(3, 2);
    for (int i = 0; i < 6; ++i) { matrix(i / 2, i % 2) = static_cast<T>(static_cast<float>(i)); }
    using S = typename same_bits_as<T>::type;
    CHECK(static_cast<void*>(as_view(column).data()) == column.data());
    CHECK(as_view(column).size() == 5);
    CHECK(as_view(row).size() == 4);
    CHECK(as_view(array).size() == 3);
    const auto flat = as_view(matrix);
    static_assert(std::same_as<decltype(flat), const host_view<S>>);
    REQUIRE(flat.size() == 6);
    for (int i = 0; i < 6; ++i) {
        CHECK(static_cast<float>(flat[static_cast<std::size_t>(i)]) == static_cast<float>(i));
    }
    flat[3] = static_cast<S>(9.0f);
    CHECK(static_cast<float>(matrix(1, 1)) == 9.0f);
}

TEST_CASE("maps and contiguous blocks are viewed in place, as outputs too")
{
    std::vector<float> numbers{0, 1, 2, 3, 4, 5};
    Eigen::Map<rows_of<float>> map(numbers.data(), 2, 3);
    CHECK(as_view(map).data() == numbers.data());
    CHECK(as_view(Eigen::Map<const Eigen::VectorXf>(numbers.data(), 6)).size() == 6);

    auto matrix = counted(4, 3);
    CHECK(as_view(matrix.row(2)).data() == &matrix(2, 0));
    CHECK(as_view(matrix.middleRows(1, 2)).data() == &matrix(1, 0));
    CHECK(as_view(matrix.middleRows(1, 2)).size() == 6);
    CHECK(as_view(matrix.reshaped<Eigen::RowMajor>(12, 1)).size() == 12);
    as_view(matrix.bottomRows(1))[1] = -1;
    CHECK(matrix(3, 1) == -1);
    CHECK(as_view(matrix.block(1, 1, 1, 2)).data() == &matrix(1, 1));

    Eigen::MatrixXf columns = Eigen::MatrixXf::Random(3, 4);
    CHECK(as_view(columns.col(2)).data() == &columns(0, 2));
    CHECK(as_view(columns.transpose()).data() == columns.data()); // row-major, so its run is columns' own
    CHECK(as_view(Eigen::Ref<rows_of<float>>(matrix)).size() == 12);
    CHECK(as_view(matrix.topRows(0)).empty());
    rows_of<float> nothing(0, 3);
    CHECK(as_view(nothing).empty());
    CHECK(as_view(matrix.col(1).head(1)).data() == &matrix(0, 1)); // one element has no stride
}

TEST_CASE("constness goes through")
{
    static_assert(output_of<rows_of<float>&, cpu> && !output_of<const rows_of<float>&, cpu>
        && input_of<const rows_of<float>&, cpu>);
    static_assert(output_of<Eigen::VectorXd&, cpu> && !output_of<const Eigen::VectorXd&, cpu>);
    static_assert(
        !output_of<Eigen::Map<const Eigen::VectorXf>, cpu> && input_of<Eigen::Map<const Eigen::VectorXf>, cpu>);
    static_assert(output_of<Eigen::Map<Eigen::VectorXf>, cpu>);
    CHECK(true);
}

TEST_CASE("expressions and other element types are no views")
{
    static_assert(!viewable<decltype(Eigen::VectorXf() + Eigen::VectorXf())>);
    static_assert(!viewable<decltype(Eigen::VectorXf().cast<double>())>);
    static_assert(!viewable<Eigen::VectorXi&>);
    static_assert(!viewable<Eigen::VectorXcf&>);
    CHECK(true);
}

TEST_CASE("strides that are not one run are refused with a sentence")
{
    auto matrix = counted(4, 3);
    CHECK(refusal([&] { (void)as_view(matrix.leftCols(2)); })
        == "an Eigen block of 4 x 2 has 3 elements from row to row; expected 2: copy it into a matrix of its own, or "
           "pass it row by row");
    CHECK(refusal([&] { (void)as_view(matrix.col(0)); })
        == "an Eigen vector of 4 elements has a stride of 3; expected 1: copy it into a vector of its own first");
    CHECK_THROWS_AS((void)as_view(matrix.diagonal()), invalid_argument);
    CHECK_THROWS_AS((void)as_view(matrix.block(0, 1, 2, 2)), invalid_argument);
    Eigen::MatrixXf columns = Eigen::MatrixXf::Random(3, 4);
    CHECK_THROWS_AS((void)as_view(columns.row(1)), invalid_argument);
    CHECK_THROWS_AS((void)as_view(Eigen::Map<rows_of<float>, 0, Eigen::OuterStride<>>(
                        matrix.data(), 2, 3, Eigen::OuterStride<>(6))),
        invalid_argument);
    CHECK_THROWS_AS(
        (void)as_view(Eigen::Map<Eigen::VectorXf, 0, Eigen::InnerStride<>>(matrix.data(), 3, Eigen::InnerStride<>(2))),
        invalid_argument);
    // The same map with natural strides is one run.
    CHECK(as_view(Eigen::Map<rows_of<float>, 0, Eigen::OuterStride<>>(matrix.data(), 4, 3, Eigen::OuterStride<>(3)))
              .size()
        == 12);
}

TEST_CASE("tensors take the matrix's shape")
{
    auto matrix = counted(4, 3);
    Eigen::VectorXd vector = Eigen::VectorXd::Zero(5);
    const auto weight = as_tensor(matrix);
    static_assert(std::same_as<decltype(weight), const tensor_ref>);
    CHECK(weight.shape == extents{4, 3});
    CHECK(weight.data == matrix.data());
    CHECK(weight.dtype == dtype::f32);
    const auto& frozen = vector;
    const auto bias = as_tensor(frozen);
    static_assert(std::same_as<decltype(bias), const const_tensor_ref>);
    CHECK(bias.shape == extents{5});
    CHECK(bias.dtype == dtype::f64);
    CHECK_THROWS_AS((void)as_tensor(matrix.leftCols(2)), invalid_argument);
}

TEST_CASE("a view becomes an Eigen map")
{
    std::vector<float> numbers{1, 2, 3, 4, 5, 6};
    as_eigen(as_view(numbers)) *= 2.0f;
    CHECK(numbers == std::vector<float>{2, 4, 6, 8, 10, 12});
    const auto matrix = as_eigen(as_view(numbers), 2, 3);
    CHECK(matrix(1, 0) == 8);
    const std::vector<float> frozen = numbers;
    CHECK(as_eigen(as_view(frozen)).sum() == 42);
    CHECK_THROWS_AS((void)as_eigen(as_view(numbers), 4, 2), shape_mismatch);
    CHECK_THROWS_AS((void)as_eigen(as_view(numbers), -2, -3), shape_mismatch);
}

TEST_CASE("Eigen's 16-bit types are views of bf16 and f16 in place, in vectors and ranges too, and back")
{
    std::vector<Eigen::bfloat16> numbers{Eigen::bfloat16(1.5f), Eigen::bfloat16(-2.0f)};
    const host_view<bf16> flat = as_view(numbers);
    CHECK(static_cast<const void*>(flat.data()) == numbers.data());
    CHECK(flat[0] == bf16(1.5f));
    flat[1] = bf16(4.0f);
    CHECK(static_cast<float>(numbers[1]) == 4.0f);
    const std::vector<Eigen::half> frozen{Eigen::half(0.5f)};
    const host_view<const f16> half = as_view(frozen);
    CHECK(half[0] == f16(0.5f));
    CHECK(as_tensor(half).dtype == dtype::f16);
    const std::vector<bf16> own{bf16(3.0f), bf16(5.0f)};
    CHECK(static_cast<float>(as_eigen(as_view(own))(1)) == 5.0f);
    Eigen::Matrix<Eigen::half, 2, 2> square;
    square << Eigen::half(1.0f), Eigen::half(2.0f), Eigen::half(3.0f), Eigen::half(4.0f);
    CHECK(as_matrix(square)(0, 1) == f16(2.0f));
    matrix<f16> owner(1, 2);
    owner(0, 1) = f16(7.0f);
    CHECK(static_cast<float>(as_eigen(owner)(0, 1)) == 7.0f);
}

TEST_CASE("an owning matrix is an Eigen map, where it is column-major")
{
    matrix<double> columns(3, 2);
    columns(2, 1) = 5;
    CHECK(as_eigen(std::as_const(columns))(2, 1) == 5);
    as_eigen(columns) *= 2;
    CHECK(columns(2, 1) == 10);
    const matrix<double> rows(3, 2, matrix_order::row_major);
    CHECK(refusal([&] { (void)as_eigen(rows); })
        == "as_eigen() maps column-major matrices, and this one of 3 x 2 is row-major: see its elements by "
           "as_eigen(view, rows, cols)");
    static_assert(has_eigen<matrix<double>&> && !has_eigen<matrix<double>>);
    static_assert(has_matrix<Eigen::MatrixXf&> && !has_matrix<Eigen::MatrixXf>);
}

TEST_CASE("Eigen matrices, maps and blocks become views")
{
    const Eigen::MatrixXf x = Eigen::MatrixXf::Random(5, 4);
    const Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor> y = x;
    CHECK(as_matrix(x)(3, 2) == x(3, 2));
    CHECK(as_matrix(y)(3, 2) == x(3, 2));
    CHECK(as_matrix(y).order() == matrix_order::row_major);
    CHECK(as_matrix(x.block(1, 1, 3, 2))(2, 1) == x(3, 2));
    const Eigen::Map<const Eigen::MatrixXf, 0, Eigen::Stride<Eigen::Dynamic, 2>> gaps(
        x.data(), 2, 2, Eigen::Stride<Eigen::Dynamic, 2>(5, 2));
    CHECK_THROWS_AS((void)as_matrix(gaps), invalid_argument);
}
