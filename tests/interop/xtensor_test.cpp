// xtensor expressions as inputs and outputs without a copy, and the refusal of what is not one row-major run.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/policy.hpp>
#include <taskvec/interop/xtensor.hpp>
#include <taskvec/linalg/eigen.hpp>
#include <taskvec/linalg/randomized_svd.hpp>
#include <taskvec/linalg/truncated_svd.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/statistics/gram_accumulator.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

using namespace taskvec;

namespace {
// The part of xtensor's interface that the views rely on: tested with or without xtensor.
enum class layout_type { row_major, column_major, dynamic };
struct strided {
    static constexpr layout_type static_layout = layout_type::dynamic;
    float* memory;
    std::size_t offset;
    std::array<std::size_t, 2> extent, stride;
    float* data() { return memory; }
    const float* data() const { return memory; }
    std::size_t data_offset() const { return offset; }
    const std::array<std::size_t, 2>& shape() const { return extent; }
    const std::array<std::size_t, 2>& strides() const { return stride; }
};
} // namespace

TEST_CASE("anything with xtensor's strided interface is a view if it is one run")
{
    std::vector<float> numbers{0, 1, 2, 3, 4, 5};
    strided rows{numbers.data(), 2, {2, 2}, {2, 1}};
    CHECK(as_view(rows).data() == numbers.data() + 2);
    CHECK(as_view(rows).size() == 4);
    strided columns{numbers.data(), 0, {2, 3}, {1, 2}};
    CHECK_THROWS_AS((void)as_view(columns), invalid_argument);
    static_assert(!output_of<const strided&, cpu> && input_of<const strided&, cpu>);
}

TEST_CASE("anything with xtensor's strided interface is a matrix if its rows or columns are contiguous")
{
    std::vector<float> numbers{0, 1, 2, 3, 4, 5};
    const strided left{numbers.data(), 1, {2, 2}, {3, 1}};
    const auto block = as_matrix(left);
    static_assert(std::same_as<decltype(block), const matrix_view<const float>>);
    CHECK(block.order() == matrix_order::row_major);
    CHECK(block.stride() == 3);
    CHECK(block(1, 1) == 5);
    const strided lying{numbers.data(), 0, {2, 3}, {1, 2}};
    const auto columns = as_matrix(lying);
    CHECK(columns.order() == matrix_order::column_major);
    CHECK(columns(1, 2) == 5);
    CHECK(columns(0, 1) == 2);
    const strided overlapping{numbers.data(), 0, {2, 3}, {1, 1}}, backward{numbers.data(), 5, {2, 3}, {3, -1UL}};
    CHECK_THROWS_AS((void)as_matrix(overlapping), invalid_argument);
    CHECK_THROWS_AS((void)as_matrix(backward), invalid_argument);
}

#if defined(TASKVEC_TEST_XTENSOR)

#if __has_include(<xtensor/containers/xarray.hpp>)
#include <xtensor/containers/xadapt.hpp>
#include <xtensor/containers/xarray.hpp>
#include <xtensor/containers/xfixed.hpp>
#include <xtensor/containers/xtensor.hpp>
#include <xtensor/views/xstrided_view.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xadapt.hpp>
#include <xtensor/xarray.hpp>
#include <xtensor/xfixed.hpp>
#include <xtensor/xstrided_view.hpp>
#include <xtensor/xtensor.hpp>
#include <xtensor/xview.hpp>
#endif

TEST_CASE_TEMPLATE("containers are viewed in place, in row-major order", T, double, float, bf16, f16)
{
    xt::xarray<T> array(std::vector<std::size_t>{2, 3});
    for (std::size_t i = 0; i < 6; ++i) { array(i / 3, i % 3) = static_cast<T>(static_cast<float>(i)); }
    const auto flat = as_view(array);
    static_assert(std::same_as<decltype(flat), const host_view<T>>);
    REQUIRE(flat.size() == 6);
    CHECK(flat.data() == array.data());
    for (std::size_t i = 0; i < 6; ++i) { CHECK(static_cast<float>(flat[i]) == static_cast<float>(i)); }
    flat[4] = static_cast<T>(9.0f);
    CHECK(static_cast<float>(array(1, 1)) == 9.0f);
}

TEST_CASE("tensors, fixed tensors and adaptors are viewed in place")
{
    xt::xtensor<float, 3> tensor = xt::zeros<float>({2, 3, 4});
    xt::xtensor_fixed<double, xt::xshape<2, 2>> fixed{{1, 2}, {3, 4}};
    std::vector<float> numbers{1, 2, 3, 4, 5, 6};
    auto adapted = xt::adapt(numbers, std::vector<std::size_t>{3, 2});
    CHECK(as_view(tensor).size() == 24);
    CHECK(as_view(fixed)[2] == 3);
    CHECK(as_view(adapted).data() == numbers.data());
    as_view(adapted)[5] = -1;
    CHECK(numbers[5] == -1);
    xt::xarray<float> scalar(std::vector<std::size_t>{});
    CHECK(as_view(scalar).size() == 1);
    xt::xarray<float> empty(std::vector<std::size_t>{0, 3});
    CHECK(as_view(empty).empty());
}

TEST_CASE("views that are one run are viewed in place, with their offset")
{
    xt::xarray<float> array{{0, 1, 2}, {3, 4, 5}, {6, 7, 8}};
    auto rows = xt::view(array, xt::range(1, 3), xt::all());
    CHECK(as_view(rows).data() == array.data() + 3);
    CHECK(as_view(rows).size() == 6);
    CHECK(as_view(xt::view(array, 2)).data() == array.data() + 6);
    CHECK(as_view(xt::view(array, 1, xt::range(1, 3)))[0] == 4);
    CHECK(as_view(xt::strided_view(array, {xt::range(1, 2), xt::all()})).data() == array.data() + 3);
    as_view(rows)[0] = -3;
    CHECK(array(1, 0) == -3);
}

TEST_CASE("constness goes through")
{
    static_assert(output_of<xt::xarray<float>&, cpu> && !output_of<const xt::xarray<float>&, cpu>
        && input_of<const xt::xarray<float>&, cpu>);
    static_assert(output_of<xt::xtensor<double, 2>&, cpu> && !output_of<const xt::xtensor<double, 2>&, cpu>);
    const xt::xarray<float> array{{0, 1}, {2, 3}};
    static_assert(std::same_as<decltype(as_view(xt::view(array, 1))), host_view<const float>>);
    CHECK(as_view(xt::view(array, 1))[1] == 3);
}

TEST_CASE("expressions and other element types are no views")
{
    using array = xt::xarray<float>;
    static_assert(!viewable<decltype(std::declval<array&>() + std::declval<array&>())>);
    static_assert(!viewable<xt::xarray<int>&>);
    static_assert(!viewable<xt::xarray<bool>&>);
    CHECK(true);
}

TEST_CASE("strides that are not one run are refused with a sentence")
{
    xt::xarray<float> array{{0, 1, 2}, {3, 4, 5}};
    try {
        (void)as_view(xt::view(array, xt::all(), xt::range(0, 2)));
        FAIL("not refused");
    }
    catch (const invalid_argument& problem) {
        CHECK(std::string(problem.what())
            == "an xtensor expression of shape [2, 2] has strides [3, 1], so its elements do not follow one another in "
               "row-major order: "
               "copy it into a row-major container of its own first");
    }
    CHECK_THROWS_AS((void)as_view(xt::view(array, xt::all(), 1)), invalid_argument);
    CHECK_THROWS_AS((void)as_view(xt::strided_view(array, {xt::all(), xt::range(0, 3, 2)})), invalid_argument);
    xt::xarray<float, xt::layout_type::dynamic> columns(std::vector<std::size_t>{2, 3}, xt::layout_type::column_major);
    CHECK_THROWS_AS((void)as_view(columns), invalid_argument);
    xt::xarray<float, xt::layout_type::dynamic> rows(std::vector<std::size_t>{2, 3}, xt::layout_type::row_major);
    CHECK(as_view(rows).size() == 6);
}

TEST_CASE("tensors take the container's shape")
{
    xt::xarray<float> array{{0, 1, 2}, {3, 4, 5}};
    const auto& frozen = array;
    const auto weight = as_tensor(array);
    static_assert(std::same_as<decltype(weight), const tensor_ref>);
    static_assert(std::same_as<decltype(as_tensor(frozen)), const_tensor_ref>);
    CHECK(weight.shape == extents{2, 3});
    CHECK(weight.data == array.data());
    CHECK_THROWS_AS((void)as_tensor(xt::view(array, xt::all(), 1)), invalid_argument);
}

namespace {
template <class E, class F>
std::string refusal(F&& f)
{
    try {
        f();
    }
    catch (const E& problem) {
        return problem.what();
    }
    return {};
}

/// Whether every entry of an expression of two dimensions is that of the view.
template <class X, class T>
bool same(const X& x, matrix_view<const T> y)
{
    bool equal = x.shape()[0] == y.rows() && x.shape()[1] == y.cols();
    for (std::size_t i = 0; equal && i < y.rows(); ++i) {
        for (std::size_t j = 0; equal && j < y.cols(); ++j) { equal = x(i, j) == y(i, j); }
    }
    return equal;
}

template <xt::layout_type L = xt::layout_type::row_major>
xt::xtensor<float, 2, L> counted(std::size_t rows, std::size_t cols)
{
    xt::xtensor<float, 2, L> x(std::array<std::size_t, 2>{rows, cols});
    for (std::size_t i = 0; i < rows; ++i) {
        for (std::size_t j = 0; j < cols; ++j) {
            x(i, j) = static_cast<float>(std::sin(static_cast<double>(3 * i * i + 7 * j + 1)));
        }
    }
    return x;
}

template <class X>
concept has_matrix = requires { as_matrix(std::declval<X>()); };
template <class X>
concept has_xtensor = requires { as_xtensor(std::declval<X>()); };
} // namespace

TEST_CASE("containers of two dimensions are matrices, in either layout, in place")
{
    const auto rows = counted(4, 3);
    const auto columns = counted<xt::layout_type::column_major>(4, 3);
    CHECK(as_matrix(rows).data() == rows.data());
    CHECK(as_matrix(rows).order() == matrix_order::row_major);
    CHECK(same(rows, as_matrix(rows)));
    CHECK(as_matrix(columns).data() == columns.data());
    CHECK(as_matrix(columns).order() == matrix_order::column_major);
    CHECK(same(columns, as_matrix(columns)));
    const xt::xarray<double> array{{0, 1, 2}, {3, 4, 5}};
    CHECK(same(array, as_matrix(array)));
    const xt::xtensor_fixed<float, xt::xshape<2, 3>> fixed{{0, 1, 2}, {3, 4, 5}};
    CHECK(same(fixed, as_matrix(fixed)));
    xt::xarray<float, xt::layout_type::dynamic> dynamic(std::vector<std::size_t>{2, 3}, xt::layout_type::column_major);
    dynamic(1, 2) = 5;
    CHECK(as_matrix(dynamic).order() == matrix_order::column_major);
    CHECK(as_matrix(dynamic)(1, 2) == 5);
    std::vector<float> numbers{1, 2, 3, 4, 5, 6};
    const auto adapted = xt::adapt(numbers, std::vector<std::size_t>{3, 2});
    CHECK(as_matrix(adapted)(2, 0) == 5);
    const xt::xarray<bf16> half{{bf16(1.0f), bf16(2.0f)}};
    static_assert(std::same_as<decltype(as_matrix(half)), matrix_view<const bf16>>);
    CHECK(as_matrix(half)(0, 1) == bf16(2.0f));
}

TEST_CASE("vectors, single rows and columns, and empty matrices are matrices")
{
    xt::xtensor<float, 1> vector{1, 2, 3};
    CHECK(as_matrix(vector).rows() == 3);
    CHECK(as_matrix(vector).cols() == 1);
    CHECK(as_matrix(vector)(2, 0) == 3);
    const auto wide = counted(4, 3);
    CHECK(same(xt::xarray<float>(xt::view(wide, xt::all(), xt::range(1, 2))),
        as_matrix(xt::view(wide, xt::all(), xt::range(1, 2)))));
    CHECK(same(xt::xarray<float>(xt::view(wide, xt::range(2, 3), xt::all())),
        as_matrix(xt::view(wide, xt::range(2, 3), xt::all()))));
    CHECK(as_matrix(xt::view(wide, xt::all(), 1))(3, 0) == wide(3, 1)); // one dimension, with gaps
    for (const auto& [rows, cols] : std::vector<std::pair<std::size_t, std::size_t>>{{0, 3}, {3, 0}, {1, 1}, {1, 3}}) {
        const auto row_major = counted(rows, cols);
        const auto column_major = counted<xt::layout_type::column_major>(rows, cols);
        CHECK(same(row_major, as_matrix(row_major)));
        CHECK(same(column_major, as_matrix(column_major)));
    }
}

TEST_CASE("views with contiguous rows or columns are matrices with a stride")
{
    const auto rows = counted(5, 4);
    const auto columns = counted<xt::layout_type::column_major>(5, 4);
    const auto part = xt::view(rows, xt::range(1, 4), xt::range(1, 3));
    CHECK(as_matrix(part).stride() == 4);
    CHECK(same(xt::xarray<float>(part), as_matrix(part)));
    const auto part_of_columns = xt::view(columns, xt::range(1, 4), xt::range(1, 3));
    CHECK(as_matrix(part_of_columns).stride() == 5);
    CHECK(same(xt::xarray<float>(part_of_columns), as_matrix(part_of_columns)));
    const auto every_other = xt::strided_view(rows, {xt::range(0, 5, 2), xt::all()});
    CHECK(as_matrix(every_other).stride() == 8);
    CHECK(same(xt::xarray<float>(every_other), as_matrix(every_other)));
    const auto transposed = xt::transpose(rows);
    CHECK(as_matrix(transposed).order() == matrix_order::column_major);
    CHECK(same(xt::xarray<float>(transposed), as_matrix(transposed)));
}

TEST_CASE("what is no matrix view is refused with a sentence, and can be evaluated")
{
    const auto rows = counted(5, 4);
    const auto gaps = xt::strided_view(rows, {xt::all(), xt::range(0, 4, 2)});
    CHECK(refusal<invalid_argument>([&] { (void)as_matrix(gaps); })
        == "an xtensor expression of shape [5, 2] has strides [4, 2], so neither its rows nor its columns are "
           "contiguous: evaluate it into a container of its own first");
    const xt::xtensor<float, 2> evaluated = gaps;
    CHECK(same(evaluated, as_matrix(evaluated)));
    const xt::xarray<float> cube = xt::zeros<float>({2, 3, 4});
    CHECK(refusal<shape_mismatch>([&] { (void)as_matrix(cube); })
        == "an xtensor expression of shape [2, 3, 4] is no matrix; expected 2 dimensions: reshape it, or take a view "
           "of two of them");
    CHECK(as_matrix(xt::view(cube, 1)).rows() == 3);
    const xt::xarray<float> scalar(std::vector<std::size_t>{});
    CHECK_THROWS_AS((void)as_matrix(scalar), shape_mismatch);
    static_assert(has_matrix<xt::xarray<float>&> && !has_matrix<xt::xarray<float>> && !has_matrix<xt::xarray<int>&>);
}

TEST_CASE("Gram matrices and decompositions take xtensor's matrices")
{
    const auto rows = counted(9, 4);
    const auto columns = counted<xt::layout_type::column_major>(9, 4);
    const auto part = xt::view(rows, xt::range(0, 9), xt::range(0, 3));
    gram_accumulator from_rows(4), from_columns(4), from_part(3);
    from_rows.add(cpu{}, as_matrix(rows));
    from_columns.add(cpu{}, as_matrix(columns));
    from_part.add(cpu{}, as_matrix(part));
    for (std::size_t i = 0; i < 4; ++i) {
        for (std::size_t j = 0; j < 4; ++j) {
            double sum = 0;
            for (std::size_t k = 0; k < 9; ++k) { sum += double{rows(k, i)} * double{rows(k, j)}; }
            CHECK(from_rows(i, j) == doctest::Approx(sum));
            CHECK(from_columns(i, j) == from_rows(i, j));
            if (i < 3 && j < 3) { CHECK(from_part(i, j) == doctest::Approx(sum)); }
        }
    }
    // The whole decomposition puts the matrix together again; its factors are xtensor's, without a copy.
    const auto exact = truncated_svd(cpu{}, as_matrix(columns), {.rank = 4});
    const auto sampled = randomized_svd(cpu{}, as_matrix(rows), {.rank = 4, .seed = 1});
    const auto u = as_xtensor(exact.u), v = as_xtensor(exact.v);
    const auto sigma = as_xtensor(as_view(exact.sigma));
    CHECK(static_cast<const void*>(u.data()) == exact.u.data());
    REQUIRE(sigma.shape()[0] == 4);
    for (std::size_t i = 0; i < 9; ++i) {
        for (std::size_t j = 0; j < 4; ++j) {
            double sum = 0;
            for (std::size_t k = 0; k < 4; ++k) { sum += double{u(i, k)} * sigma(k) * double{v(j, k)}; }
            CHECK(sum == doctest::Approx(double{rows(i, j)}).epsilon(1e-5));
        }
    }
    for (std::size_t k = 0; k < 4; ++k) { CHECK(sampled.sigma[k] == doctest::Approx(exact.sigma[k]).epsilon(1e-5)); }
}

TEST_CASE("merges take and give xtensor's tensors of any rank")
{
    const auto merged_as = [](const std::vector<std::size_t>& shape) {
        xt::xarray<float> base(shape), out(shape);
        std::vector<xt::xarray<float>> tasks(2, xt::xarray<float>(shape));
        for (std::size_t i = 0; i < base.size(); ++i) {
            base.flat(i) = static_cast<float>(i);
            tasks[0].flat(i) = static_cast<float>(i) + 1;
            tasks[1].flat(i) = static_cast<float>(i) + (i % 3 == 0 ? 3 : -1);
        }
        merge(cpu{}, ties_options{.density = 1.0}, base, tasks, out);
        return std::vector<float>(out.begin(), out.end());
    };
    const auto flat = merged_as({24});
    CHECK(flat[0] == 2);
    CHECK(merged_as({2, 12}) == flat);
    CHECK(merged_as({2, 3, 4}) == flat);
    CHECK(merged_as({1, 2, 3, 4, 1}) == flat);
    xt::xtensor<float, 3> base = xt::zeros<float>({2, 3, 4});
    const std::vector<xt::xtensor<float, 3>> tasks(2, xt::xtensor<float, 3>(xt::ones<float>({2, 3, 4})));
    xt::xtensor<float, 3> out = xt::zeros<float>({2, 3, 4});
    merge(cpu{}, ties_options{.density = 1.0}, base, tasks, xt::view(out, xt::all()));
    CHECK(xt::sum(out)() == 24);
}

TEST_CASE("a view becomes an xtensor adaptor")
{
    std::vector<float> numbers{1, 2, 3, 4, 5, 6};
    as_xtensor(as_view(numbers)) *= 2.0f;
    CHECK(numbers == std::vector<float>{2, 4, 6, 8, 10, 12});
    const auto square = as_xtensor(as_view(numbers), 2, 3);
    CHECK(square(1, 0) == 8);
    auto cube = as_xtensor(as_view(numbers), {1, 3, 2});
    CHECK(cube.dimension() == 3);
    CHECK(cube(0, 2, 1) == 12);
    cube(0, 2, 1) = 1;
    CHECK(numbers[5] == 1);
    const std::vector<float> frozen = numbers;
    CHECK(xt::sum(as_xtensor(as_view(frozen)))() == 31);
    static_assert(std::is_const_v<std::remove_pointer_t<decltype(as_xtensor(as_view(frozen)).data())>>);
    CHECK(refusal<shape_mismatch>([&] { (void)as_xtensor(as_view(numbers), 4, 2); })
        == "a view of 6 elements cannot be a matrix of 4 x 2");
    CHECK(refusal<shape_mismatch>([&] { (void)as_xtensor(as_view(numbers), {5}); })
        == "a view of 6 elements cannot have shape [5]");
    CHECK_THROWS_AS((void)as_xtensor(as_view(numbers), -2, -3), shape_mismatch);
    // And the other way round.
    CHECK(as_view(square).data() == numbers.data());
    CHECK(as_tensor(cube).shape == extents{1, 3, 2});
    const std::vector<bf16> half{bf16(1.5f)};
    CHECK(as_xtensor(as_view(half))(0) == bf16(1.5f));
}

TEST_CASE("an owning matrix of either order is an xtensor adaptor")
{
    for (const auto order : {matrix_order::row_major, matrix_order::column_major}) {
        matrix<double> owner(3, 2, order);
        for (std::size_t i = 0; i < 6; ++i) { owner(i / 2, i % 2) = static_cast<double>(i); }
        auto adaptor = as_xtensor(owner);
        CHECK(adaptor.data() == owner.data());
        CHECK(same(adaptor, matrix_view<const double>(owner)));
        adaptor(2, 1) = -1;
        CHECK(owner(2, 1) == -1);
        const xt::xtensor<double, 2> twice = 2.0 * as_xtensor(std::as_const(owner));
        CHECK(twice(2, 1) == -2);
        CHECK(twice(2, 0) == 8);
        CHECK(as_matrix(adaptor).order() == order);
    }
    static_assert(has_xtensor<matrix<float>&> && has_xtensor<const matrix<float>&> && !has_xtensor<matrix<float>>);
}

#endif
