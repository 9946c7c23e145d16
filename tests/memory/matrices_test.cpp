// What adapters, decompositions, RegMean and the accumulators of statistics take through the policy's memory resource,
// and around it.
// SPDX-License-Identifier: Apache-2.0
#include "big_models.hpp"
#include "counted.hpp"

#include <taskvec/adapters/extract.hpp>
#include <taskvec/adapters/fuse.hpp>
#include <taskvec/adapters/merge_adapters.hpp>
#include <taskvec/adapters/merge_ties.hpp>
#include <taskvec/linalg/factored_svd.hpp>
#include <taskvec/linalg/randomized_svd.hpp>
#include <taskvec/linalg/truncated_svd.hpp>
#include <taskvec/methods/regmean.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/reuse/peru_lora.hpp>
#include <taskvec/statistics/fisher_accumulator.hpp>
#include <taskvec/statistics/gram_accumulator.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>
#include <vector>

using namespace taskvec;
using testing::big_models, testing::check_call, testing::draw_numbers;

namespace {

template <class T>
matrix<T> drawn(std::size_t rows, std::size_t cols, std::uint32_t seed, matrix_order order = matrix_order::column_major)
{
    matrix<T> x(rows, cols, order);
    std::vector<T> numbers;
    draw_numbers(numbers, x.size(), 1.0f, seed);
    std::copy(numbers.begin(), numbers.end(), x.data());
    return x;
}

constexpr std::size_t out = 800, in = 600;

template <class T>
lora_adapter<T> drawn_adapter(std::size_t rank, std::uint32_t seed)
{
    lora_adapter<T> adapter;
    for (std::uint32_t i = 0; i < 3; ++i) {
        adapter.emplace("layer" + std::to_string(i),
            lora_update<T>{drawn<T>(out, rank, seed + 2 * i, matrix_order::row_major),
                drawn<T>(rank, in, seed + 2 * i + 1, matrix_order::row_major), 0.5});
    }
    return adapter;
}

template <class T>
bool same_numbers(const matrix<T>& a, const matrix<T>& b)
{
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

} // namespace

TEST_CASE_TEMPLATE("Adapters are merged, compressed and extracted in memory of the policy's resource", T, float, double)
{
    const std::vector<lora_adapter<T>> adapters{drawn_adapter<T>(48, 1), drawn_adapter<T>(64, 50)};
    const std::size_t factors = 3 * 2 * 3;
    check_call(
        "merge_linear", factors, [&](const cpu& policy) { return merge_linear<T>(policy, adapters, {.lambda = 0.5}); });
    check_call("merge_linear to a rank", factors,
        [&](const cpu& policy) { return merge_linear<T>(policy, adapters, {.rank = {.rank = 16}}); });
    check_call("merge_ties", factors, [&](const cpu& policy) {
        return merge_ties<T>(policy, adapters, {.rank = {.rank = 16}}, decompose_randomized{});
    });
    check_call(
        "peru_lora", factors, [&](const cpu& policy) { return peru_lora(policy, adapters[0], {.rank = {.rank = 8}}); });
    const lora_update<T>& update = adapters[0].begin()->second;
    check_call("squared_norm", 2, [&](const cpu& policy) { return squared_norm(policy, update); });
    matrix<T> weight(out, in);
    check_call("fold_update", 3, [&](const cpu& policy) { fold_update(policy, update, weight.view()); });
    check_call("folded_update", 3, [&](const cpu& policy) { folded_update<T>(policy, update, weight.view()).undo(); });

    std::vector<T> before, after;
    draw_numbers(before, out * in, 1.0f, 7);
    draw_numbers(after, out * in, 1.0f, 8);
    const auto model = [](const std::vector<T>& x) {
        return const_model_ref{{"a.weight", as_tensor(host_view<const T>{x.data(), x.size()}, {out, in})}};
    };
    const const_model_ref base = model(before), tuned = model(after);
    check_call("extract_lora", 3, [&](const cpu& policy) {
        return extract_lora<T>(policy, base, tuned, {.rank = {.rank = 16}}, decompose_randomized{});
    });
    check_call("extract_lora exactly", 3, [&](const cpu& policy) {
        return extract_lora<T>(policy, base, tuned, {.rank = {.rank = 16}}, decompose_exactly{});
    });
}

TEST_CASE_TEMPLATE("Adapters are fused, and read as tasks, in memory of the policy's resource", T, float, double)
{
    const lora_adapter<T> adapter = drawn_adapter<T>(128, 1);
    std::vector<T> weights, fused;
    draw_numbers(weights, out * in, 1.0f, 7);
    fused = weights;
    const auto numbers = [](auto& x) { return as_view(x); };
    const const_model_ref base{{"layer0.weight", as_tensor(numbers(std::as_const(weights)), {out, in})}};
    const model_ref result{{"layer0.weight", as_tensor(numbers(fused), {out, in})}};
    for (const bool scaled : {false, true}) { // with DoRA's magnitudes, too
        CAPTURE(scaled);
        adapted_model changes;
        update_place place;
        if (scaled) { place.magnitude.assign(out, 2.0); }
        changes.add(base, "layer0.weight", adapter.at("layer0"), 0.5, place);
        check_call("fuse", 3, [&](const cpu& policy) { return fuse(policy, base, changes, result); });
        aligned_models models(&base, {&base, 1});
        const auto sources = changes.attach(models, 0);
        memory_sink sink = detail::sink_over(models, result);
        testing::counted_memory memory;
        const cpu policy{.threads = 1, .memory = &memory};
        sources[0]->prepare(policy);
        CHECK(memory.in_use() >= 128 * (out + in) * sizeof(T));
        static_cast<void>(merge(policy, task_arithmetic_options{}, models, sink));
        sources[0]->release();
        CHECK(memory.in_use() == 0);
    }
}

TEST_CASE_TEMPLATE("Decompositions work in memory of the policy's resource, with the same bits", T, float, double)
{
    const matrix<T> dense = drawn<T>(out, 240, 3), left = drawn<T>(out, 64, 4), right = drawn<T>(in, 64, 5);
    matrix<T> dependent = left; // its columns 20 to 39 repeat: what reflections are for
    std::copy_n(left.data(), 20 * out, dependent.data() + 20 * out);
    const auto check = [](const char* name, const auto& decompose) {
        check_call(name, 3, decompose);
        testing::counted_memory memory;
        const auto expected = decompose(cpu{}), found = decompose(cpu{.threads = 1, .memory = &memory});
        CHECK(same_numbers(expected.u, found.u));
        CHECK(same_numbers(expected.v, found.v));
        CHECK(expected.sigma == found.sigma);
    };
    check("randomized_svd", [&](const cpu& policy) { return randomized_svd<T>(policy, dense.view(), {.rank = 16}); });
    check("randomized_svd that grows",
        [&](const cpu& policy) { return randomized_svd<T>(policy, dense.view(), {.energy = 0.5}); });
    check("truncated_svd", [&](const cpu& policy) { return truncated_svd<T>(policy, dense.view(), {.rank = 16}); });
    check("truncated_svd that is square",
        [&](const cpu& policy) { return truncated_svd<T>(policy, dense.view().block(0, 0, 240, 240), {.rank = 240}); });
    check("truncated_svd that is narrow",
        [&](const cpu& policy) { return truncated_svd<T>(policy, left.view().transposed(), {.rank = 16}); });
    check("factored_svd",
        [&](const cpu& policy) { return factored_svd<T>(policy, left.view(), right.view(), {.rank = 16}); });
    check("factored_svd of dependent columns",
        [&](const cpu& policy) { return factored_svd<T>(policy, dependent.view(), right.view(), {.rank = 16}); });
    const std::array pairs{factor_pair<T>{.left = left.view(), .right = right.view()},
        factor_pair<T>{.left = dependent.view(), .right = right.view(), .weight = 0.5}};
    check("compress_sum",
        [&](const cpu& policy) { return compress_sum(policy, std::span<const factor_pair<T>>(pairs), {.rank = 16}); });
}

TEST_CASE("16-bit factors are widened in memory of the policy's resource")
{
    const matrix<bf16> left = drawn<bf16>(out, 32, 1), right = drawn<bf16>(in, 32, 2);
    check_call("factored_svd", 3,
        [&](const cpu& policy) { return factored_svd<bf16>(policy, left.view(), right.view(), {.rank = 16}); });
    check_call("randomized_svd", 3,
        [&](const cpu& policy) { return randomized_svd<bf16>(policy, left.view(), {.rank = 16}); });
}

TEST_CASE("A matrix that is moved takes its memory along")
{
    testing::counted_memory memory;
    matrix<double> kept;
    {
        matrix<double> made(30, 40, matrix_order::row_major, &memory);
        made(29, 39) = 7;
        const auto counted = testing::count_memory(memory, [&] { kept = std::move(made); });
        CHECK(counted.through == 0);
        CHECK(counted.around + counted.received == 0);
    }
    CHECK(memory.in_use() == 30 * 40 * sizeof(double));
    CHECK(kept.rows() == 30);
    CHECK(kept.cols() == 40);
    CHECK(kept.order() == matrix_order::row_major);
    CHECK(kept(29, 39) == 7);
    kept = {};
    CHECK(memory.in_use() == 0);
}

TEST_CASE("Statistics are collected, and RegMean solves, in memory of the policy's resource")
{
    const big_models<float> m(2);
    empirical_fisher_accumulator empirical(m.base_model);
    check_call("an empirical Fisher", m.all_tensors(), [&](const cpu& policy) { empirical.add(policy, m.base_model); });
    expected_fisher_accumulator expected(m.base_model);
    check_call("an expected Fisher", m.all_tensors(),
        [&](const cpu& policy) { expected.add(policy, m.task_models, std::vector{0.25, 0.75}); });
    gram_accumulator gram(300);
    const matrix_view<const float> batch(m.base.data(), 6000, 300, matrix_order::row_major);
    check_call("a Gram matrix", 1, [&](const cpu& policy) { gram.add(policy, batch); });

    const matrix<double> g = gram.matrix();
    const const_model_ref grams{{"a", as_tensor(host_view<const double>{g.data(), g.size()}, {300, 300})}};
    std::vector<float> merged(2 * 1000 * 300);
    const auto layers = [&]<class T>(T* data) {
        std::conditional_t<std::is_const_v<T>, const_model_ref, model_ref> model;
        model.insert("a", as_tensor(host_view<T>{data, 300'000}, {1000, 300}));
        model.insert("b", as_tensor(host_view<T>{data + 300'000, 300'000}));
        return model;
    };
    const std::vector<const_model_ref> tasks{layers(m.tasks[0].data()), layers(m.tasks[1].data())};
    const model_ref result = layers(merged.data());
    check_call("RegMean", 10, [&](const cpu& policy) {
        return merge(policy, regmean_options{.grams = {grams, grams}, .ridge = 1e-3}, tasks, result);
    });
}
