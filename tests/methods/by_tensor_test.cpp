// Options that depend on the tensor.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/by_tensor.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#include <doctest/doctest.h>

#include <random>

using namespace taskvec;

namespace {

struct small_models {
    std::vector<std::string> names{"a.weight", "b.weight", "c.bias"};
    std::vector<std::vector<float>> base, first, second;
    const_model_ref base_model;
    std::vector<const_model_ref> tasks{2};

    small_models()
    {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        const auto fill = [&](std::vector<std::vector<float>>& model, const_model_ref& ref) {
            for (std::size_t i = 0; i < names.size(); ++i) {
                model.emplace_back(100 + i);
                for (auto& x : model.back()) { x = normal(random); }
            }
            for (std::size_t i = 0; i < names.size(); ++i) {
                ref.insert(names[i], {model[i].data(), dtype::f32, {static_cast<std::int64_t>(model[i].size())}, {}});
            }
        };
        fill(base, base_model);
        fill(first, tasks[0]);
        fill(second, tasks[1]);
    }
    [[nodiscard]] std::vector<std::vector<float>> room() const { return base; }
};

memory_sink sink_of(std::vector<std::vector<float>>& out)
{
    std::vector<void*> places;
    for (auto& tensor : out) { places.push_back(tensor.data()); }
    return memory_sink(places);
}

} // namespace

TEST_CASE("every tensor has the bits of a merge with its own options")
{
    const small_models m;
    const aligned_models models(&m.base_model, m.tasks);
    const auto lambda_of = [](std::string_view name) { return name == "b.weight" ? 0.25 : 0.75; };
    auto out = m.room();
    auto sink = sink_of(out);
    const auto report = merge_by_tensor<task_arithmetic_options>(
        cpu{}, [&](std::string_view name) { return task_arithmetic_options{.lambda = lambda_of(name)}; }, models, sink);
    CHECK(report.walks == 1);
    for (std::size_t i = 0; i < m.names.size(); ++i) {
        auto expected = m.room();
        auto whole = sink_of(expected);
        merge(cpu{}, task_arithmetic_options{.lambda = lambda_of(m.names[i])}, models, whole);
        CHECK(out[i] == expected[i]);
    }
}

TEST_CASE("equal options are one merge; groups share a model-wide threshold among themselves")
{
    const small_models m;
    const aligned_models models(&m.base_model, m.tasks);
    auto whole = m.room(), same = m.room(), apart = m.room(), alone = m.room();
    auto whole_sink = sink_of(whole), same_sink = sink_of(same), apart_sink = sink_of(apart),
         alone_sink = sink_of(alone);
    merge(cpu{}, ties_options{.density = 0.3}, models, whole_sink);
    merge_by_tensor<ties_options>(
        cpu{}, [](std::string_view) { return ties_options{.density = 0.3}; }, models, same_sink);
    CHECK(same == whole);
    merge_by_tensor<ties_options>(
        cpu{}, [](std::string_view name) { return ties_options{.density = name == "c.bias" ? 0.9 : 0.3}; }, models,
        apart_sink);
    const std::vector<std::size_t> weights{0, 1};
    merge(cpu{}, ties_options{.density = 0.3}, aligned_models(models, weights), alone_sink);
    CHECK(apart[0] == alone[0]);
    CHECK(apart[1] == alone[1]);
    CHECK(apart[2] != whole[2]);
}
