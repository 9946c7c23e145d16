// SPDX-License-Identifier: Apache-2.0
#include <taskvec/reuse/peru_lora.hpp>

#include "reference/adapters.hpp"

#include <doctest/doctest.h>

#include <cmath>

using namespace taskvec;
using reference::normal_update;

TEST_CASE_TEMPLATE("each layer is the best of its rank, with its exact error and parameter count", T, float, double)
{
    const lora_adapter<T> adapter{{"a", normal_update<T>(40, 30, 8, 1, 2)}, {"b", normal_update<T>(25, 60, 8, 2, 0.5)},
        {"c", normal_update<T>(10, 12, 3, 3)}};
    double before = 1;
    for (const std::size_t q : {1u, 2u, 4u, 6u}) {
        const auto served = peru_lora(cpu{.threads = 2}, adapter, {.rank = {.rank = q}});
        double error = 0, norm = 0;
        std::uint64_t parameters = 0;
        REQUIRE(served.layers.size() == 3);
        for (const auto& layer : served.layers) {
            const auto full = reference::dense(adapter.at(layer.name));
            const auto sigma = reference::singular_values(full);
            const std::size_t kept = std::min<std::size_t>(q, adapter.at(layer.name).rank());
            CHECK(layer.rank == kept);
            CHECK(layer.whole == (layer.name == "c" && q > 3));
            const double tail = std::sqrt(energy_beyond(sigma, kept));
            CHECK(std::abs(reference::distance(reference::dense(served.adapter.at(layer.name)), full) - tail)
                <= 1e-5 * sigma[0]);
            CHECK(std::abs(std::sqrt(layer.squared_error) - tail) <= 1e-5 * sigma[0]);
            error += tail * tail;
            norm += energy_beyond(sigma, 0);
            parameters += layer.whole ? 3 * (10 + 12) : kept * (layer.out + layer.in + 1);
        }
        CHECK(served.parameters() == parameters);
        CHECK(served.relative_error() == doctest::Approx(std::sqrt(error / norm)).epsilon(1e-4));
        CHECK(served.relative_error() < before);
        before = served.relative_error();
    }
    const auto whole = peru_lora(cpu{}, adapter, {.rank = {.rank = 8}});
    CHECK(whole.relative_error() <= 1e-6);
}

TEST_CASE("the rank by energy is chosen layer by layer")
{
    const lora_adapter<float> adapter{
        {"a", normal_update<float>(40, 30, 8, 1)}, {"b", normal_update<float>(25, 60, 2, 2)}};
    const auto served = peru_lora(cpu{}, adapter, {.rank = {.energy = 0.8}});
    for (const auto& layer : served.layers) {
        const auto sigma = reference::singular_values(reference::dense(adapter.at(layer.name)));
        CHECK(layer.rank == rank_for_energy(sigma, 0.8));
        CHECK(layer.energy() >= 0.8 - 1e-9);
    }
}

TEST_CASE("ranks that no layer has are refused, unless clamped")
{
    const lora_adapter<float> adapter{
        {"a", normal_update<float>(40, 30, 8, 1)}, {"b", normal_update<float>(25, 60, 2, 2)}};
    CHECK_THROWS_WITH_AS((void)peru_lora(cpu{}, adapter, {.rank = {.rank = 9}}),
        "the adapter: rank 9 asked for, but the ranks of its layers are at most 8; ask for less, or for clamping",
        invalid_argument);
    CHECK_THROWS_AS((void)peru_lora(cpu{}, adapter, {}), invalid_argument);
    CHECK(peru_lora(cpu{}, adapter, {.rank = {.rank = 9, .clamp = true}}).adapter.at("a").rank() == 8);
    auto bad = adapter;
    bad.at("b").a(0, 1) = std::nanf("");
    CHECK_THROWS_AS((void)peru_lora(cpu{}, bad, {.rank = {.rank = 2}}), nonfinite_error);
}
