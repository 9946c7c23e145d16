// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/merge_adapters.hpp>
#include <taskvec/adapters/merge_as_peft.hpp>
#include <taskvec/adapters/phi_space.hpp>
#include <taskvec/linalg/truncated_svd.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#include "reference/adapters.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

using namespace taskvec;
using reference::dense;
using reference::normal_update;

namespace {

/// Three adapters of different ranks and targets.
template <class T>
std::vector<lora_adapter<T>> three_adapters()
{
    std::vector<lora_adapter<T>> adapters(3);
    adapters[0] = {{"q", normal_update<T>(30, 20, 4, 1, 2)}, {"v", normal_update<T>(10, 20, 4, 2, 2)}};
    adapters[1] = {{"q", normal_update<T>(30, 20, 2, 3, 0.5)}, {"head", normal_update<T>(7, 30, 2, 4, 0.5)}};
    adapters[2] = {{"q", normal_update<T>(30, 20, 1, 5, 1)}, {"v", normal_update<T>(10, 20, 1, 6, 1)}};
    return adapters;
}

template <class T>
reference::plain_matrix weighted_sum(
    const std::vector<lora_adapter<T>>& adapters, const std::string& name, const std::vector<double>& weights)
{
    reference::plain_matrix sum;
    for (std::size_t t = 0; t < adapters.size(); ++t) {
        const auto found = adapters[t].find(name);
        if (found == adapters[t].end()) { continue; }
        if (sum.empty()) { sum = reference::zeros(found->second.out(), found->second.in()); }
        reference::add(sum, dense(found->second), weights[t]);
    }
    return sum;
}

} // namespace

TEST_CASE_TEMPLATE("stacked merges are exact over the union of the modules", T, float, double)
{
    const auto adapters = three_adapters<T>();
    const std::vector<double> weights{0.5, -1.5, 2};
    const auto merged = merge_linear<T>(cpu{}, adapters, {.weights = weights, .lambda = 0.5});
    REQUIRE(merged.adapter.size() == 3);
    CHECK(merged.adapter.at("q").rank() == 7);
    CHECK(merged.adapter.at("v").rank() == 5);
    CHECK(merged.adapter.at("head").rank() == 2);
    for (const auto& [name, update] : merged.adapter) {
        const auto sum = weighted_sum(adapters, name, {0.25, -0.75, 1});
        CHECK(reference::distance(dense(update), sum) <= 1e-6 * reference::norm(sum));
    }
    for (const auto& layer : merged.layers) {
        const double norm = reference::norm(weighted_sum(adapters, layer.name, {0.25, -0.75, 1}));
        CHECK(layer.whole);
        CHECK(layer.relative_error() == 0);
        CHECK(layer.squared_norm == doctest::Approx(norm * norm).epsilon(1e-5));
    }
    CHECK(merged.relative_error() == 0);
}

TEST_CASE_TEMPLATE("compressed merges are the best approximation, and small layers stay whole", T, float, double)
{
    const auto adapters = three_adapters<T>();
    const std::vector<double> ones{1, 1, 1};
    const auto merged = merge_linear<T>(cpu{.threads = 2}, adapters, {.rank = {.rank = 3}});
    REQUIRE(merged.layers.size() == 3);
    double error = 0, norm = 0;
    for (const auto& layer : merged.layers) {
        const auto sum = weighted_sum(adapters, layer.name, ones);
        const auto sigma = reference::singular_values(sum);
        CHECK(layer.whole == (layer.name == "head"));
        CHECK(layer.rank == (layer.name == "head" ? 2 : 3));
        const double tail = std::sqrt(energy_beyond(sigma, layer.rank));
        CHECK(std::abs(reference::distance(dense(merged.adapter.at(layer.name)), sum) - tail) <= 1e-5 * sigma[0]);
        CHECK(std::abs(std::sqrt(layer.squared_error) - tail) <= 1e-5 * sigma[0]);
        error += tail * tail;
        norm += energy_beyond(sigma, 0);
    }
    CHECK(merged.relative_error() == doctest::Approx(std::sqrt(error / norm)).epsilon(1e-5));
    CHECK(merged.layers[1].name == "q");
    CHECK(merged.layers[1].rank_before == 7);
    CHECK(merged.layers[1].parameters() == 3 * (30 + 20 + 1));
    CHECK(merged.layers[0].parameters() == 2 * (7 + 30));
    const auto by_energy = merge_linear<T>(cpu{}, adapters, {.rank = {.energy = 0.9}});
    for (const auto& layer : by_energy.layers) { CHECK(layer.energy() >= 0.9 - 1e-9); }
}

TEST_CASE("merges that cannot be are refused")
{
    auto adapters = three_adapters<float>();
    CHECK_THROWS_AS((void)merge_linear<float>(cpu{}, {}), invalid_argument);
    CHECK_THROWS_AS((void)merge_linear<float>(cpu{}, adapters, {.weights = {1, 2}}), invalid_argument);
    CHECK_THROWS_AS((void)merge_linear<float>(cpu{}, adapters, {.weights = {1, 2, std::nan("")}}), invalid_argument);
    CHECK_THROWS_AS((void)merge_linear<float>(cpu{}, adapters, {.rank = {}}), invalid_argument);
    CHECK_THROWS_WITH_AS((void)merge_linear<float>(cpu{}, adapters, {.rank = {.rank = 8}}),
        "the merged adapter: rank 8 asked for, but the ranks of its layers are at most 7; ask for less, or for "
        "clamping",
        invalid_argument);
    adapters[2].at("v") = normal_update<float>(11, 20, 1, 6);
    CHECK_THROWS_WITH_AS((void)merge_linear<float>(cpu{}, adapters),
        "module 'v' is 11×20 in adapter 3 but 10×20 in an earlier one: these adapters belong to different bases",
        shape_mismatch);
    adapters = three_adapters<float>();
    adapters[1].at("q").a(1, 3) = std::numeric_limits<float>::infinity();
    CHECK_THROWS_AS((void)merge_linear<float>(cpu{}, adapters), nonfinite_error);
    CHECK_THROWS_AS((void)merge_linear<float>(cpu{}, adapters, {.rank = {.rank = 2}}), nonfinite_error);
}

TEST_CASE("factors averaged separately are means of the factors, not of the updates")
{
    std::vector<lora_adapter<double>> adapters(2);
    adapters[0] = {{"q", normal_update<double>(5, 4, 2, 1, 2)}};
    adapters[1] = {{"q", normal_update<double>(5, 4, 2, 2, 2)}};
    const auto mean = average_factors_separately<double>(adapters, {3, 1});
    CHECK(mean.at("q").scaling == 2);
    CHECK(mean.at("q").b(3, 1)
        == doctest::Approx(0.75 * adapters[0].at("q").b(3, 1) + 0.25 * adapters[1].at("q").b(3, 1)));
    CHECK(mean.at("q").a(1, 2)
        == doctest::Approx(0.75 * adapters[0].at("q").a(1, 2) + 0.25 * adapters[1].at("q").a(1, 2)));
    CHECK_THROWS_AS((void)average_factors_separately<double>(adapters, {1, -1}), invalid_argument);
    adapters[1].at("q").scaling = 1;
    CHECK_THROWS_AS((void)average_factors_separately<double>(adapters), shape_mismatch);
    adapters[1] = {{"v", normal_update<double>(5, 4, 2, 2, 2)}};
    CHECK_THROWS_AS((void)average_factors_separately<double>(adapters), invalid_argument);
}

TEST_CASE("phi space: the merges of models, on the factors")
{
    const lora_adapter<float> init{
        {"q", normal_update<float>(9, 8, 3, 1, 2)}, {"v", normal_update<float>(5, 8, 3, 2, 2)}};
    std::vector<lora_adapter<float>> adapters{init, init};
    for (std::size_t t = 0; t < 2; ++t) {
        for (auto& [name, update] : adapters[t]) {
            const auto change = normal_update<float>(update.out(), update.in(), 3, 10 + t);
            for (std::size_t i = 0; i < update.b.size(); ++i) { update.b.data()[i] += 0.1f * change.b.data()[i]; }
            for (std::size_t i = 0; i < update.a.size(); ++i) { update.a.data()[i] += 0.1f * change.a.data()[i]; }
        }
    }
    const auto merged =
        merge_in_phi_space<float>(cpu{}, task_arithmetic_options{.lambda = 0.5, .weights = {1, -2}}, init, adapters);
    for (const auto& [name, update] : merged) {
        CHECK(update.scaling == 2);
        for (std::size_t i = 0; i < update.a.size(); ++i) {
            const float start = init.at(name).a.data()[i], one = adapters[0].at(name).a.data()[i],
                        two = adapters[1].at(name).a.data()[i];
            CHECK(update.a.data()[i]
                == doctest::Approx(start + 0.5f * ((one - start) - 2 * (two - start))).epsilon(1e-5));
        }
    }
    // TIES too: bit for bit what it gives on the same tensors by their names.
    const auto ties = merge_in_phi_space<float>(cpu{}, ties_options{.density = 0.3}, init, adapters);
    CHECK(ties.at("q").b.rows() == 9);
    CHECK(std::any_of(ties.at("q").b.data(), ties.at("q").b.data() + 27,
        [&, i = 0](float x) mutable { return x != init.at("q").b.data()[i++]; }));

    auto other = adapters;
    other[1].at("v").scaling = 1;
    CHECK_THROWS_WITH_AS((void)merge_in_phi_space<float>(cpu{}, task_arithmetic_options{}, init, other),
        "module 'v' has scaling 1 in adapter 2 but 2 in the initialisation: this is not what the adapter was trained "
        "from",
        invalid_argument);
    other = adapters;
    other[1].at("v") = normal_update<float>(5, 8, 2, 2, 2);
    CHECK_THROWS_WITH_AS(
        (void)merge_in_phi_space<float>(cpu{}, task_arithmetic_options{}, init, other, {.labels = {"cats", "dogs"}}),
        "module 'v' is 5×8 of rank 2 in dogs but 5×8 of rank 3 in the initialisation: this is not what the adapter was "
        "trained from",
        shape_mismatch);
    other = adapters;
    other[0].erase("v");
    CHECK_THROWS_AS((void)merge_in_phi_space<float>(cpu{}, task_arithmetic_options{}, init, other), invalid_argument);
    other = adapters;
    other[0].emplace("k", normal_update<float>(5, 8, 3, 2, 2));
    CHECK_THROWS_AS((void)merge_in_phi_space<float>(cpu{}, task_arithmetic_options{}, init, other), invalid_argument);
}

TEST_CASE("PEFT's DARE keeps what random_stream draws, of factors and of updates, divided by the density")
{
    std::vector<lora_adapter<double>> adapters(2);
    for (std::size_t t = 0; t < 2; ++t) {
        adapters[t]["q"] = normal_update<double>(12, 9, 3, 50 + t, t == 0 ? 0.5 : 2);
    }
    const std::vector<double> weights{1.5, -0.25};
    const double density = 0.75;
    const auto below = keep_below(density);
    const auto kept = [&](std::size_t t, const std::string& name, std::size_t i, double x) {
        return random_stream(9, static_cast<std::uint32_t>(t), name).word(i) < below ? x / density : 0.0;
    };
    const auto root = [&](std::size_t t, bool left) {
        const double strength = weights[t] * adapters[t].at("q").scaling;
        return double{static_cast<float>(std::sqrt(std::abs(strength)) * (strength < 0 && !left ? -1 : 1))};
    };
    const auto exactly = [](const cpu& policy, matrix_view<const double> x, const rank_choice& choice,
                             std::string_view) { return truncated_svd<double>(policy, x, choice); };
    const auto factors = merge_as_peft<double>(cpu{}, adapters,
        {.combination = peft_combination::dare_linear, .weights = weights, .density = density, .seed = 9}, exactly);
    for (const bool left : {false, true}) {
        const auto& made = left ? factors.adapter.at("q").b : factors.adapter.at("q").a;
        const std::string name = left ? "q.lora_B" : "q.lora_A";
        for (std::size_t i = 0; i < made.size(); ++i) {
            double sum = 0;
            for (std::size_t t = 0; t < 2; ++t) {
                const auto& update = adapters[t].at("q");
                sum += root(t, left) * kept(t, name, i, (left ? update.b : update.a).data()[i]);
            }
            CHECK(made.data()[i] == doctest::Approx(sum).epsilon(1e-14));
        }
    }
    for (const bool elect : {false, true}) {
        const auto products = merge_as_peft<double>(cpu{}, adapters,
            {.combination = elect ? peft_combination::dare_ties_svd : peft_combination::dare_linear_svd,
                .weights = weights,
                .density = density,
                .rank = 9,
                .seed = 9},
            exactly);
        const auto made = dense(products.adapter.at("q"));
        std::vector<reference::plain_matrix> updates{dense(adapters[0].at("q")), dense(adapters[1].at("q"))};
        for (std::size_t i = 0; i < 12 * 9; ++i) {
            const double x = kept(0, "q", i, updates[0][i / 9][i % 9]), y = kept(1, "q", i, updates[1][i / 9][i % 9]);
            double sum = weights[0] * x + weights[1] * y;
            if (elect) {
                const bool plus = x + y >= 0;
                const auto agrees = [&](double one) { return plus ? one > 0 : one < 0; };
                const int count = int{agrees(x)} + int{agrees(y)};
                sum = (weights[0] * x * agrees(x) + weights[1] * y * agrees(y)) / std::max(count, 1);
            }
            CHECK(made[i / 9][i % 9] == doctest::Approx(sum).epsilon(1e-10));
        }
    }
    // The share that is kept, over many entries.
    std::vector<lora_adapter<float>> large(2);
    for (auto& adapter : large) {
        adapter["w"] = normal_update<float>(400, 300, 20, 7);
        adapter["w"].scaling = 1;
    }
    const auto thin = merge_as_peft<float>(cpu{}, large,
        {.combination = peft_combination::dare_linear, .weights = {1, 0}, .density = 0.3, .seed = 1},
        [](const cpu&, matrix_view<const float>, const rank_choice&, std::string_view) { return svd_result<float>(); });
    std::size_t count = 0;
    for (std::size_t i = 0; i < 8000; ++i) { count += thin.adapter.at("w").b.data()[i] != 0 ? 1u : 0u; }
    CHECK(std::abs(static_cast<double>(count) / 8000 - 0.3) < 0.025);
}

TEST_CASE("PEFT's combinations refuse densities outside (0, 1], unequal ranks, and overflow")
{
    const auto adapters = three_adapters<float>();
    const auto none = [](const cpu&, matrix_view<const float>, const rank_choice&, std::string_view) {
        return svd_result<float>();
    };
    for (const double density : {0.0, -1.0, 1.5, std::numeric_limits<double>::quiet_NaN()}) {
        CHECK_THROWS_AS((void)merge_as_peft<float>(
                            cpu{}, adapters, {.combination = peft_combination::ties_svd, .density = density}, none),
            invalid_argument);
    }
    CHECK_THROWS_AS(
        (void)merge_as_peft<float>(cpu{}, adapters, {.combination = peft_combination::linear}, none), invalid_argument);
    CHECK_THROWS_AS((void)merge_as_peft<float>(cpu{}, adapters, {.weights = {1}}, none), invalid_argument);
    CHECK_THROWS_AS((void)merge_as_peft<float>(
                        cpu{}, adapters, {.combination = peft_combination::cat, .weights = {1e38, 1e38, 1e38}}, none),
        nonfinite_error);
}
