// Multidimensional spans as inputs and outputs without a copy, and the refusal of what is not one row-major run.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/policy.hpp>
#include <taskvec/interop/mdspan.hpp>

#include <doctest/doctest.h>

#include <array>
#include <string>
#include <vector>

#if __has_include(<experimental/mdspan>)
#include <experimental/mdspan>
#define TASKVEC_TEST_EXPERIMENTAL_MDSPAN 1
#endif
#if defined(TASKVEC_TEST_CUDA_MDSPAN)
#include <cuda/std/array>
#include <cuda/std/mdspan>
#endif

using namespace taskvec;

namespace {
// A span of two dimensions with any strides, with the interface that the standard's, Kokkos' and CUDA's share.
struct default_accessor { };
struct layout_stride { };
template <class T>
struct strided {
    using element_type = T;
    using reference = T&;
    using data_handle_type = T*;
    using layout_type = layout_stride;
    using accessor_type = default_accessor;
    struct mapping_type {
        std::size_t span;
        std::size_t required_span_size() const { return span; }
    };
    T* handle;
    std::array<int, 2> size, strides;
    static constexpr std::size_t rank() { return 2; }
    T* data_handle() const { return handle; }
    int extent(std::size_t i) const { return size[i]; }
    int stride(std::size_t i) const { return strides[i]; }
    mapping_type mapping() const { return {required()}; }
    bool is_exhaustive() const { return required() == static_cast<std::size_t>(size[0] * size[1]); }
    bool is_strided() const { return true; }
    std::size_t required() const
    {
        return size[0] * size[1] == 0
            ? 0
            : static_cast<std::size_t>((size[0] - 1) * strides[0] + (size[1] - 1) * strides[1] + 1);
    }
};
} // namespace

TEST_CASE("row-major spans are viewed in place")
{
    std::vector<float> numbers{0, 1, 2, 3, 4, 5};
    const strided<float> rows{numbers.data(), {2, 3}, {3, 1}};
    CHECK(as_view(rows).data() == numbers.data());
    CHECK(as_view(rows).size() == 6);
    as_view(rows)[4] = -1;
    CHECK(numbers[4] == -1);
    CHECK(as_view(strided<const float>{numbers.data(), {1, 3}, {100, 1}}).size() == 3);
    CHECK(as_view(strided<const float>{nullptr, {0, 3}, {3, 1}}).empty());
    CHECK(as_tensor(rows).shape == extents{2, 3});
    CHECK(as_tensor(rows).data == numbers.data());
}

TEST_CASE("constness and element types go through")
{
    static_assert(output_of<strided<float>, cpu> && output_of<const strided<float>&, cpu>);
    static_assert(!output_of<strided<const float>, cpu> && input_of<strided<const float>, cpu>);
    static_assert(viewable<strided<bf16>> && !viewable<strided<int>>);
    static_assert(std::same_as<decltype(as_tensor(std::declval<strided<const double>>())), const_tensor_ref>);
    CHECK(true);
}

TEST_CASE("other layouts are refused with a sentence")
{
    std::vector<float> numbers{0, 1, 2, 3, 4, 5};
    try {
        (void)as_view(strided<float>{numbers.data(), {2, 3}, {1, 2}});
        FAIL("not refused");
    }
    catch (const invalid_argument& problem) {
        CHECK(std::string(problem.what())
            == "a multidimensional span of shape [2, 3] does not hold its elements one after another in row-major "
               "order: copy it into one with layout_right "
               "first");
    }
    CHECK_THROWS_AS((void)as_view(strided<float>{numbers.data(), {2, 2}, {3, 1}}), invalid_argument);
    CHECK_THROWS_AS((void)as_view(strided<float>{numbers.data(), {3, 1}, {2, 1}}), invalid_argument);
}

// A real span, of the standard library (or, where it has none, of tests/interop/standin), of Kokkos, or of CUDA.
#define TASKVEC_TEST_SPANS(name, real)                                                                                 \
    TEST_CASE("spans of " name " are viewed in place")                                                                 \
    {                                                                                                                  \
        std::vector<float> numbers{0, 1, 2, 3, 4, 5};                                                                  \
        using two = real::dextents<int, 2>;                                                                            \
        const real::mdspan<float, two> span(numbers.data(), 2, 3);                                                     \
        CHECK(as_view(span).data() == numbers.data());                                                                 \
        CHECK(as_view(span).size() == 6);                                                                              \
        CHECK(as_tensor(span).shape == extents{2, 3});                                                                 \
        using strided_mapping = real::layout_stride::mapping<two>;                                                     \
        const real::mdspan<float, two, real::layout_stride> run(                                                       \
            numbers.data(), strided_mapping(two(2, 3), real::array<int, 2>{3, 1}));                                    \
        CHECK(as_view(run).size() == 6);                                                                               \
        const real::mdspan<float, two, real::layout_stride> holes(                                                     \
            numbers.data(), strided_mapping(two(2, 2), real::array<int, 2>{3, 1}));                                    \
        CHECK_THROWS_AS((void)as_view(holes), invalid_argument);                                                       \
        const real::mdspan<float, real::dextents<int, 1>, real::layout_left> line(numbers.data(), 6);                  \
        CHECK(as_view(line).size() == 6);                                                                              \
    }

#if defined(__cpp_lib_mdspan)
TASKVEC_TEST_SPANS("the standard library", std)
#endif
#if defined(TASKVEC_TEST_EXPERIMENTAL_MDSPAN)
namespace kokkos {
using namespace std::experimental;
using std::array;
} // namespace kokkos
TASKVEC_TEST_SPANS("Kokkos", kokkos)
#endif
#if defined(TASKVEC_TEST_CUDA_MDSPAN)
TASKVEC_TEST_SPANS("CUDA", cuda::std)
#endif
