// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/merge_ties.hpp>
#include <taskvec/linalg/randomized_svd.hpp>

#include "reference/adapters.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

using namespace taskvec;
using reference::normal_update;

namespace {

/// Keeps the merged layers as they are, to compare them, and passes them on.
template <class T>
struct recording {
    std::map<std::string, matrix<T>>* seen;
    svd_result<T> operator()(
        const cpu& policy, matrix_view<const T> a, const rank_choice& choice, std::string_view name) const
    {
        matrix<T> copy(a.rows(), a.cols(), matrix_order::row_major);
        for (std::size_t i = 0; i < a.rows(); ++i) {
            for (std::size_t j = 0; j < a.cols(); ++j) { copy(i, j) = a(i, j); }
        }
        (*seen)[std::string(name)] = std::move(copy);
        return decompose_randomized{}(policy, a, choice, name);
    }
};

template <class T>
std::vector<lora_adapter<T>> some_adapters(bool coarse)
{
    std::vector<lora_adapter<T>> adapters(3);
    adapters[0] = {{"q", normal_update<T>(30, 40, 4, 1, 2)}, {"v", normal_update<T>(10, 40, 4, 2, 2)}};
    adapters[1] = {{"q", normal_update<T>(30, 40, 2, 3, 0.5)}, {"head", normal_update<T>(7, 30, 2, 4, 0.5)}};
    adapters[2] = {{"q", normal_update<T>(30, 40, 1, 5, 1)}, {"v", normal_update<T>(10, 40, 1, 6, 1)}};
    if (coarse) { // few distinct values: ties at every threshold, and sums that are exactly 0
        for (auto& adapter : adapters) {
            for (auto& [name, update] : adapter) {
                update.scaling = 1;
                for (auto* side : {&update.a, &update.b}) {
                    for (std::size_t i = 0; i < side->size(); ++i) { side->data()[i] = std::round(side->data()[i]); }
                }
            }
        }
    }
    return adapters;
}

/// The same merge by the model-wide TIES on dense updates, all in memory.
template <class T>
std::map<std::string, matrix<T>> dense_ties(const std::vector<lora_adapter<T>>& adapters, const ties_options& options)
{
    std::map<std::string, std::pair<std::size_t, std::size_t>> shapes;
    for (const auto& adapter : adapters) {
        for (const auto& [name, update] : adapter) { shapes[name] = {update.out(), update.in()}; }
    }
    const auto model_of = [](auto& tensors) {
        std::conditional_t<std::is_const_v<std::remove_reference_t<decltype(tensors)>>, const_model_ref, model_ref>
            model;
        for (auto& [name, x] : tensors) {
            using element = std::remove_reference_t<decltype(*x.data())>;
            model.insert(name,
                as_tensor(host_view<element>(x.data(), x.size()),
                    {static_cast<std::int64_t>(x.rows()), static_cast<std::int64_t>(x.cols())}));
        }
        return model;
    };
    std::map<std::string, matrix<T>> zeros, out;
    std::vector<std::map<std::string, matrix<T>>> products(adapters.size());
    for (const auto& [name, shape] : shapes) {
        zeros.emplace(name, matrix<T>(shape.first, shape.second, matrix_order::row_major));
        out.emplace(name, matrix<T>(shape.first, shape.second, matrix_order::row_major));
        for (std::size_t t = 0; t < adapters.size(); ++t) {
            auto& x =
                products[t].emplace(name, matrix<T>(shape.first, shape.second, matrix_order::row_major)).first->second;
            if (adapters[t].contains(name)) { densify(cpu{}, adapters[t].at(name), x.view()); }
        }
    }
    std::vector<const_model_ref> tasks;
    for (const auto& p : products) { tasks.push_back(model_of(p)); }
    merge(cpu{}, options, const_model_ref(model_of(std::as_const(zeros))), std::span<const const_model_ref>(tasks),
        model_of(out));
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("TIES on adapters is TIES on their dense updates, bit for bit, however it streams", T, float, double)
{
    std::vector<ties_options> variants(8);
    variants[0].density = 0.2;
    variants[1].density = 0.37, variants[1].scope = scope::tensor;
    variants[2].density = 1, variants[2].combine = disjoint_merge::sum, variants[2].lambda = 0.7;
    variants[3].density = 0.05, variants[3].weights = {1, 0.5, 2};
    variants[4] = ties_options::as_in_peft(), variants[4].density = 0.3;
    variants[5] = ties_options::as_in_mergekit(), variants[5].density = 0.3, variants[5].weights = {1, -0.5, 2};
    variants[6] = ties_options::as_in_ties_merging(), variants[6].density = 0.25;
    variants[7].density = 0.4, variants[7].combine = disjoint_merge::max, variants[7].zero_sign = zero_sign::none;
    for (const bool coarse : {false, true}) {
        const auto adapters = some_adapters<T>(coarse);
        for (std::size_t v = 0; v < variants.size(); ++v) {
            INFO("variant ", v, coarse ? ", coarse" : "");
            const auto expected = dense_ties(adapters, variants[v]);
            for (const unsigned threads : {1u, 3u}) {
                std::map<std::string, matrix<T>> seen;
                const auto merged = merge_ties<T>(
                    cpu{.threads = threads}, adapters, {.ties = variants[v], .rank = {.rank = 5}}, recording<T>{&seen});
                REQUIRE(seen.size() == expected.size());
                for (const auto& [name, x] : expected) {
                    CHECK(std::equal(x.data(), x.data() + x.size(), seen.at(name).data()));
                }
                REQUIRE(merged.layers.size() == 3);
                CHECK(merged.layers[0].name == "head");
                for (const auto& layer : merged.layers) {
                    const double norm = reference::norm(reference::plain<T>(expected.at(layer.name).view()));
                    CHECK(layer.squared_norm == doctest::Approx(norm * norm).epsilon(1e-5));
                    const double apart = reference::distance(reference::dense(merged.adapter.at(layer.name)),
                        reference::plain<T>(expected.at(layer.name).view()));
                    CHECK(std::sqrt(layer.squared_error) == doctest::Approx(apart).epsilon(1e-3));
                }
            }
        }
    }
}

TEST_CASE("TIES on adapters refuses what cannot be")
{
    auto adapters = some_adapters<float>(false);
    const decompose_randomized how;
    CHECK_THROWS_AS((void)merge_ties<float>(cpu{}, adapters, {}, how), invalid_argument); // no rank
    CHECK_THROWS_AS(
        (void)merge_ties<float>(cpu{}, adapters, {.ties = {.density = 0}, .rank = {.rank = 2}}, how), invalid_argument);
    CHECK_THROWS_AS(
        (void)merge_ties<float>(cpu{}, adapters, {.ties = {.weights = {1, 2, -1}}, .rank = {.rank = 2}}, how),
        invalid_argument);
    CHECK_THROWS_AS((void)merge_ties<float>(cpu{}, adapters, {.ties = {.weights = {1}}, .rank = {.rank = 2}}, how),
        invalid_argument);
    CHECK_THROWS_AS((void)merge_ties<float>(cpu{}, adapters, {.rank = {.rank = 31}}, how), invalid_argument);
    adapters[0].at("q").b(3, 1) = std::nanf("");
    CHECK_THROWS_WITH_AS((void)merge_ties<float>(cpu{}, adapters, {.rank = {.rank = 2}}, how),
        "matrix 'q' holds NaN at row 3, column 1; a decomposition needs finite numbers: repair or leave out this "
        "matrix",
        nonfinite_error);
}
