// xtensor expressions as inputs and outputs without a copy, and the refusal of what is not one row-major run.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/policy.hpp>
#include <taskvec/interop/xtensor.hpp>

#include <doctest/doctest.h>

#include <array>
#include <string>
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

#endif
