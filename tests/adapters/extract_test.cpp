// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/extract.hpp>
#include <taskvec/linalg/randomized_svd.hpp>

#include "reference/adapters.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

using namespace taskvec;
using reference::normal_matrix;

namespace {

constexpr decompose_randomized thorough{.oversampling = 100}; // as wide as these matrices: exact

struct pair_of_models {
    matrix<float> q0 = normal_matrix<float>(20, 12, 1, matrix_order::row_major), q1 = q0;
    matrix<bf16> v0 = normal_matrix<bf16>(6, 12, 2, matrix_order::row_major), v1 = v0;
    matrix<float> same = normal_matrix<float>(5, 5, 3, matrix_order::row_major), bias0 = normal_matrix<float>(1, 20, 4),
                  bias1 = bias0;
    lora_update<float> change = reference::normal_update<float>(20, 12, 3, 5, 0.01);
    std::int64_t step0 = 1, step1 = 2;

    pair_of_models()
    {
        fold_update(cpu{}, change, q1.view());
        for (std::size_t i = 0; i < v1.size(); ++i) {
            v1.data()[i] = narrow<bf16>(widen<float>(v1.data()[i]) * (1.0f + 0.25f * static_cast<float>(i % 3)));
        }
        bias1(0, 3) += 0.5f;
    }
    template <class X>
    static const_tensor_ref tensor(const matrix<X>& x, extents shape)
    {
        return as_tensor(host_view<const X>(x.data(), x.size()), std::move(shape));
    }
    [[nodiscard]] const_model_ref base() const
    {
        return {{"q.weight", tensor(q0, {20, 12})}, {"v.weight", tensor(v0, {6, 12})},
            {"k.weight", tensor(same, {5, 5})}, {"q.bias", tensor(bias0, {20})},
            {"step", {&step0, dtype::i64, {}, {}, memory_space::host, 0}}};
    }
    [[nodiscard]] const_model_ref tuned() const
    {
        return {{"q.weight", tensor(q1, {20, 12})}, {"v.weight", tensor(v1, {6, 12})},
            {"k.weight", tensor(same, {5, 5})}, {"q.bias", tensor(bias1, {20})},
            {"step", {&step1, dtype::i64, {}, {}, memory_space::host, 0}}};
    }
};

} // namespace

TEST_CASE("a LoRA that was folded in is found again, and what else changed is listed")
{
    const pair_of_models models;
    const auto found =
        extract_lora<float>(cpu{.threads = 2}, models.base(), models.tuned(), {.rank = {.rank = 3}}, thorough);
    REQUIRE(found.adapter.size() == 2);
    CHECK(found.unchanged == std::vector<std::string>{"k.weight"});
    CHECK(found.left_out == std::vector<std::string>{"q.bias", "step"});
    CHECK(found.left_out_squared_norm == doctest::Approx(0.25));
    const auto expected = reference::dense(models.change);
    CHECK(reference::distance(reference::dense(found.adapter.at("q")), expected) <= 1e-4 * reference::norm(expected));
    CHECK(found.layers[0].name == "q");
    CHECK(found.layers[0].relative_error() <= 1e-4);
    // v changed by a matrix of full rank: the error is the tail of its singular values.
    auto delta = reference::zeros(6, 12);
    for (std::size_t i = 0; i < 6; ++i) {
        for (std::size_t j = 0; j < 12; ++j) {
            delta[i][j] = static_cast<double>(models.v1(i, j)) - static_cast<double>(models.v0(i, j));
        }
    }
    const auto sigma = reference::singular_values(delta);
    CHECK(
        std::sqrt(found.layers[1].squared_error) == doctest::Approx(std::sqrt(energy_beyond(sigma, 3))).epsilon(1e-4));
    CHECK(reference::distance(reference::dense(found.adapter.at("v")), delta)
        == doctest::Approx(std::sqrt(energy_beyond(sigma, 3))).epsilon(1e-4));
}

TEST_CASE("layers with less than the asked rank are kept whole; energy chooses for each layer")
{
    const pair_of_models models;
    const auto whole = extract_lora<float>(cpu{}, models.base(), models.tuned(), {.rank = {.rank = 10}}, thorough);
    CHECK(whole.layers[1].whole);
    CHECK(whole.layers[1].rank == 6);
    CHECK(whole.layers[1].relative_error() <= 1e-5);
    CHECK_FALSE(whole.layers[0].whole);
    const auto by_energy =
        extract_lora<float>(cpu{}, models.base(), models.tuned(), {.rank = {.energy = 0.9}}, thorough);
    for (const auto& layer : by_energy.layers) { CHECK(layer.energy() >= 0.9); }
    const auto only = extract_lora<float>(cpu{}, models.base(), models.tuned(),
        {.rank = {.rank = 2}, .include = [](std::string_view name) { return name.starts_with("v."); }}, thorough);
    CHECK(only.adapter.size() == 1);
    CHECK(only.left_out.empty());
}

TEST_CASE("models that do not belong together are refused")
{
    pair_of_models models;
    CHECK_THROWS_AS((void)extract_lora<float>(cpu{}, models.base(), models.tuned(), {}, thorough), invalid_argument);
    CHECK_THROWS_AS((void)extract_lora<float>(cpu{}, models.base(), models.tuned(), {.rank = {.rank = 13}}, thorough),
        invalid_argument);
    const const_model_ref fewer{{"q.weight", pair_of_models::tensor(models.q0, {20, 12})}},
        turned{{"q.weight", pair_of_models::tensor(models.q0, {12, 20})}};
    CHECK_THROWS_AS(
        (void)extract_lora<float>(cpu{}, models.base(), fewer, {.rank = {.rank = 1}}, thorough), invalid_argument);
    CHECK_THROWS_AS(
        (void)extract_lora<float>(cpu{}, fewer, models.tuned(), {.rank = {.rank = 1}}, thorough), invalid_argument);
    CHECK_THROWS_AS((void)extract_lora<float>(cpu{}, fewer, turned, {.rank = {.rank = 1}}, thorough), shape_mismatch);
    const const_model_ref flat{{"bias", pair_of_models::tensor(models.q0, {240})}};
    CHECK_THROWS_AS((void)extract_lora<float>(cpu{}, flat, flat, {.rank = {.rank = 1}}, thorough), invalid_argument);
    models.q1(2, 3) = std::numeric_limits<float>::quiet_NaN();
    CHECK_THROWS_AS((void)extract_lora<float>(cpu{}, models.base(), models.tuned(), {.rank = {.rank = 1}}, thorough),
        nonfinite_error);
}

TEST_CASE("a convolution's update counts its kernel among the inputs; one of a single channel, and what is no layer, "
          "is listed")
{
    auto before = normal_matrix<float>(6, 3 * 2 * 2, 7, matrix_order::row_major), after = before;
    const auto change = reference::normal_update<float>(6, 12, 2, 9, 0.5);
    fold_update(cpu{}, change, after.view());
    auto deep0 = normal_matrix<float>(5, 9, 8, matrix_order::row_major), deep1 = deep0;
    deep1(0, 0) += 1;
    auto table0 = normal_matrix<float>(4, 4, 10, matrix_order::row_major), table1 = table0;
    table1(1, 1) += 2;
    const auto tensor = [](const auto& x, extents shape) { return pair_of_models::tensor(x, std::move(shape)); };
    const const_model_ref base{{"conv.weight", tensor(before, {6, 3, 2, 2})},
        {"deep.weight", tensor(deep0, {5, 1, 3, 3})}, {"table.weight", tensor(table0, {4, 4})}},
        tuned{{"conv.weight", tensor(after, {6, 3, 2, 2})}, {"deep.weight", tensor(deep1, {5, 1, 3, 3})},
            {"table.weight", tensor(table1, {4, 4})}};
    const auto found = extract_lora<float>(cpu{}, base, tuned,
        {.rank = {.rank = 2}, .layers = [](std::string_view name) { return name != "table.weight"; }}, thorough);
    REQUIRE(found.adapter.size() == 1);
    CHECK(found.kernels == std::map<std::string, extents>{{"conv", {2, 2}}});
    const auto expected = reference::dense(change);
    CHECK(
        reference::distance(reference::dense(found.adapter.at("conv")), expected) <= 1e-4 * reference::norm(expected));
    CHECK(found.left_out == std::vector<std::string>{"deep.weight", "table.weight"});
    CHECK(found.left_out_squared_norm == doctest::Approx(5));
}
