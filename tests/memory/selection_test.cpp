// What selection, pruning, deltas and sums take through the policy's memory resource, and around it.
// SPDX-License-Identifier: Apache-2.0
#include "big_models.hpp"
#include "counted.hpp"

#include <taskvec/analysis/norms.hpp>
#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/reuse/peru_fft.hpp>
#include <taskvec/reuse/post_pruning.hpp>
#include <taskvec/reuse/sparse_addition.hpp>
#include <taskvec/select/thresholds.hpp>
#include <taskvec/select/top_k.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

using namespace taskvec;
using testing::big_models, testing::call_memory, testing::check_call, testing::count_memory, testing::counted_memory;

TEST_CASE_TEMPLATE("Selection takes what it collects from the policy's resource", T, float, bf16, double)
{
    const big_models<T> m(1);
    check_call("top_k", 1, [&](const cpu& policy) { return top_k(policy, m.base, 400'000); });
    check_call("kth_magnitude", 1, [&](const cpu& policy) { return kth_magnitude(policy, m.base, 4); });
    const aligned_models models(&m.base_model, m.task_models);
    for (const auto over : {scope::model, scope::tensor}) {
        check_call("thresholds", m.all_tensors(),
            [&](const cpu& policy) { return trim_thresholds(policy, models, 0.1, over); });
    }
    // Few values, all of them often: what sampling does not narrow goes through histograms.
    std::vector<T> levels = m.base;
    for (auto& value : levels) { value = narrow<T>(widen<double>(value) > 0.5 ? 1.0 : 0.25); }
    check_call("top_k of two values", 1, [&](const cpu& policy) { return top_k(policy, levels, 3'000'000); });
}

TEST_CASE("Pruning keeps its entries in memory of the policy's resource, and so does PERU-FFT")
{
    const big_models<float> m(2);
    for (const auto over : {scope::model, scope::tensor}) {
        check_call("Post-Pruning", m.all_tensors(), [&](const cpu& policy) {
            return post_pruning(policy, {.density = 0.1, .scope = over}, m.base_model, m.task_models[0]);
        });
    }
    check_call("Post-Pruning of flat views", 2,
        [&](const cpu& policy) { return post_pruning(policy, {.density = 0.1}, m.base, m.tasks[0]); });
    check_call("PERU-FFT", 2 * m.all_tensors(), [&](const cpu& policy) {
        return peru_fft(
            policy, task_arithmetic_options{.lambda = 0.3}, {.density = 0.1}, m.base_model, m.task_models, m.out_model);
    });
}

TEST_CASE("Deltas go on and off in the caller's memory")
{
    big_models<float> m(1);
    const sparse_model delta = post_pruning(cpu{}, {.density = 0.1}, m.base_model, m.task_models[0]);
    std::vector<double> saved(saved_bytes(delta, m.out_model) / 8);
    check_call("apply and undo", m.all_tensors(), [&](const cpu& policy) {
        const std::span<std::byte> bytes = std::as_writable_bytes(std::span(saved));
        apply(policy, delta, m.out_model, bytes);
        undo(policy, delta, std::span<const std::byte>(bytes), m.out_model);
    });
    check_call("apply", m.all_tensors(), [&](const cpu& policy) { return apply(policy, delta, m.out_model); });
    check_call("add_delta", m.all_tensors(), [&](const cpu& policy) {
        const aligned_models models(&m.base_model, {&m.base_model, 1});
        memory_sink sink = detail::sink_over(models, m.out_model);
        add_delta(policy, models, delta, 1.0, sink);
    });
    const auto entries = post_pruning(cpu{}, {.density = 0.1}, m.base, m.tasks[0]);
    const auto mask = to_bitmask(entries);
    std::vector<float> words(entries.kept());
    const auto on_and_off = [&](const cpu& policy, const auto& sparse) {
        apply(policy, sparse, m.out, words);
        undo(policy, sparse, words, m.out);
    };
    check_call("apply entries", 1, [&](const cpu& policy) { on_and_off(policy, entries); });
    check_call("apply a bitmask", 1, [&](const cpu& policy) { on_and_off(policy, mask); });
    check_call("to_bitmask", 1, [&](const cpu& policy) { return to_bitmask(entries, policy.memory); });
    check_call("to_sparse", 1, [&](const cpu& policy) { return to_sparse(mask, policy.memory); });
}

TEST_CASE("Selection and pruning of models that are lined up already take nothing around the resource")
{
    struct nowhere final : sparse_sink {
        void begin(const aligned_models& /*models*/, std::span<const std::uint64_t> kept) override
        {
            for (const std::uint64_t count : kept) { entries += count; }
        }
        void write(std::size_t, std::uint64_t, std::uint64_t, std::uint64_t, const std::uint64_t*, const float*,
            std::size_t) override
        { }
        void write(std::size_t, std::uint64_t, std::uint64_t, std::uint64_t, const std::uint64_t*, const double*,
            std::size_t) override
        { }
        std::uint64_t entries = 0;
    };
    const big_models<float> m(1, {50'000, 1, 64, 8192, 0});
    const aligned_models models(&m.base_model, m.task_models);
    for (const auto over : {scope::model, scope::tensor}) {
        counted_memory memory;
        const cpu policy{.threads = 1, .memory = &memory};
        nowhere out;
        const auto prune = [&] { post_pruning(policy, {.density = 0.1, .scope = over}, models, out); };
        prune();
        CHECK(out.entries > 0);
        const call_memory taken = count_memory(memory, prune);
        CHECK(taken.around == 0);
        CHECK(taken.received == 0);
        CHECK(taken.fresh == 0);
    }
    counted_memory memory;
    const cpu policy{.threads = 1, .memory = &memory};
    const std::array<std::uint64_t, 1> counts{1000};
    const auto select = [&] { return top_k_thresholds<float>(policy, models, all_chunks(models), counts); };
    static_cast<void>(select());
    const call_memory taken = count_memory(memory, select);
    CHECK(taken.around == 0); // the list that is returned is the caller's
    CHECK(taken.fresh == 0);
}

TEST_CASE("Switching through views allocates nothing")
{
    big_models<float> m(1);
    const sparse_model delta = post_pruning(cpu{}, {.density = 0.1}, m.base_model, m.task_models[0]);
    const auto entries = views(delta);
    std::vector<double> room(saved_bytes(entries, m.out_model) / 8);
    const std::span<std::byte> saved = std::as_writable_bytes(std::span(room));
    counted_memory memory;
    // The caller's own loop, as of a pool: the library's own threads are started anew for every call.
    const cpu policy{.executor =
                         [](std::size_t count, const auto& body) {
                             for (std::size_t i = 0; i < count; ++i) { body(i); }
                         },
        .memory = &memory};
    const call_memory taken = count_memory(memory, [&] {
        apply(policy, entries, m.out_model, saved);
        undo(policy, entries, saved, m.out_model);
    });
    CHECK(taken.through == 0);
    CHECK(taken.around == 0);
    CHECK(taken.received == 0);
}

TEST_CASE("Arithmetic and sums take what grows with the vectors from the policy's resource")
{
    big_models<float> m(2);
    check_call("difference", 2, [&](const cpu& policy) { difference(policy, m.tasks[0], m.base, m.out); });
    check_call("combine", 2, [&](const cpu& policy) { combine(policy, m.tasks, std::vector{0.5, 0.5}, m.out); });
    check_call("dot", 2, [&](const cpu& policy) { return dot(policy, m.base, m.tasks[0]); });
    const aligned_models models(&m.base_model, m.task_models);
    check_call("cosine_matrix", m.all_tensors(), [&](const cpu& policy) { return cosine_matrix(policy, models); });
    check_call("norms_of", m.all_tensors(), [&](const cpu& policy) { return norms_of(policy, models); });
}
