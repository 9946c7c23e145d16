// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/tensor_ref.hpp>

#include <doctest/doctest.h>

#include <cstddef>
#include <limits>
#include <vector>

using namespace taskvec;

TEST_CASE("the number of elements of a shape")
{
    CHECK(element_count({}) == 1);
    CHECK(element_count({3}) == 3);
    CHECK(element_count({2, 0, 5}) == 0);
    CHECK(element_count({2, 3, 4}) == 24);
    CHECK(element_count({0, std::int64_t{1} << 62, 8}) == 0);
    CHECK_THROWS_WITH_AS(
        (void)element_count({2, -1}, "w"), "tensor 'w' has a negative extent in [2, -1]", shape_mismatch);
    CHECK_THROWS_AS((void)element_count({0, -1}), shape_mismatch);
    CHECK_THROWS_AS((void)element_count({std::int64_t{1} << 62, 2}), shape_mismatch);
    const std::int64_t many = std::numeric_limits<std::ptrdiff_t>::max(); // 2^63-1, or 2^31-1 in a 32-bit program
    CHECK(element_count({many, 1}) == static_cast<std::size_t>(many));
    CHECK_THROWS_AS((void)element_count({many / 2 + 1, 2}), shape_mismatch);
    if constexpr (sizeof(std::size_t) < 8) {
        const const_tensor_ref numbers{nullptr, dtype::f32, {many}}, bytes{nullptr, dtype::u8, {many}};
        CHECK_THROWS_WITH_AS((void)numbers.bytes("w"),
            "tensor 'w' of shape [2147483647] and dtype F32 has more bytes than a 32-bit program can address",
            shape_mismatch);
        CHECK(bytes.bytes() == static_cast<std::size_t>(many));
    }
}

TEST_CASE("the number of bytes rounds packed types up")
{
    CHECK(byte_count(dtype::bf16, 3) == 6);
    CHECK(byte_count(dtype::f4, 3) == 2);
    CHECK(byte_count(dtype::f6_e2m3, 4) == 3);
    CHECK(byte_count(dtype::f64, 0) == 0);
}

TEST_CASE("contiguous means row-major without holes; extents of one and empty tensors do not matter")
{
    const auto contiguous = [](extents shape, extents strides) {
        return tensor_ref{nullptr, dtype::f32, std::move(shape), std::move(strides)}.contiguous();
    };
    CHECK(contiguous({2, 3}, {}));
    CHECK(contiguous({2, 3}, {3, 1}));
    CHECK_FALSE(contiguous({2, 3}, {1, 2}));
    CHECK_FALSE(contiguous({2, 3}, {4, 1}));
    CHECK(contiguous({2, 1, 3}, {3, 99, 1}));
    CHECK(contiguous({2, 0}, {7, 7}));
    CHECK(contiguous({}, {}));
}

TEST_CASE("a tensor of a view is a view of a tensor")
{
    std::vector<float> values{1, 2, 3, 4, 5, 6};
    const tensor_ref tensor = as_tensor(as_view(values), {2, 3});
    CHECK(tensor.dtype == dtype::f32);
    CHECK(tensor.bytes() == 24);
    const auto flat = flat_view<float>(tensor, "w");
    CHECK(flat.data() == values.data());
    CHECK(flat.size() == 6);
    CHECK(as_tensor(as_view(std::as_const(values))).shape == extents{6});
    CHECK_THROWS_WITH_AS(
        (void)as_tensor(as_view(values), {2, 2}), "a view of 6 elements cannot have shape [2, 2]", shape_mismatch);
    CHECK_THROWS_WITH_AS(
        (void)flat_view<double>(tensor, "w"), "tensor 'w' has dtype F32; expected F64", dtype_mismatch);
    tensor_ref transposed = tensor;
    transposed.strides = {1, 2};
    CHECK_THROWS_AS((void)flat_view<float>(transposed, "w"), invalid_argument);
    tensor_ref device = tensor;
    device.space = memory_space::device;
    CHECK_THROWS_AS((void)flat_view<float>(device, "w"), invalid_argument);
    CHECK(flat_view<float, memory_space::device>(device, "w").size() == 6);
}

TEST_CASE("a model is sorted by the bytes of its names, and has each once")
{
    float a = 1, b = 2;
    const tensor_ref ta = as_tensor(host_view<float>(&a, 1)), tb = as_tensor(host_view<float>(&b, 1));
    model_ref model{{"b", tb}, {"B", ta}, {"\xc3\xa9", tb}, {"a", ta}};
    REQUIRE(model.size() == 4);
    CHECK(model[0].name == "B");
    CHECK(model[1].name == "a");
    CHECK(model[2].name == "b");
    CHECK(model[3].name == "\xc3\xa9"); // bytes compare unsigned
    REQUIRE(model.find("b") != nullptr);
    CHECK(model.find("b")->data == &b);
    CHECK(model.find("c") == nullptr);
    CHECK_THROWS_WITH_AS(model.insert("a", ta), "tensor 'a' occurs twice in one model", invalid_argument);
    const const_model_ref constant = model;
    CHECK(constant.size() == 4);
    CHECK(constant.find("a")->data == &a);
    CHECK(model_ref{}.empty());
}
