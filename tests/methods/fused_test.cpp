// What runs fused, from stored words to stored words, gives the bits of the row-by-row road.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/search/lorahub.hpp>

#include <doctest/doctest.h>

#include <cstring>
#include <limits>
#include <optional>
#include <random>

using namespace taskvec;

namespace {

/// One tensor of a base and of every task at addresses that are `shift` bytes past an aligned one. Odd shifts keep
/// every fused kernel out.
template <class T>
struct shifted_models {
    std::size_t n, shift;
    std::vector<std::vector<std::byte>> memory; // base, tasks …, output
    const_model_ref base;
    std::vector<const_model_ref> tasks;
    model_ref out;

    shifted_models(const std::vector<std::vector<T>>& values, std::size_t shifted)
        : n(values[0].size())
        , shift(shifted)
        , memory(values.size() + 1, std::vector<std::byte>(n * sizeof(T) + 16))
        , tasks(values.size() - 1)
    {
        const extents shape{static_cast<std::int64_t>(n)};
        for (std::size_t m = 0; m < values.size(); ++m) {
            if (n > 0) { std::memcpy(memory[m].data() + shift, values[m].data(), n * sizeof(T)); }
            (m == 0 ? base : tasks[m - 1])
                .insert("w", {memory[m].data() + shift, dtype_of<T>, shape, {}, memory_space::host, 0});
        }
        out.insert("w", {memory.back().data() + shift, dtype_of<T>, shape, {}, memory_space::host, 0});
    }
    [[nodiscard]] bool same_output(const shifted_models& other) const
    {
        return std::memcmp(memory.back().data() + shift, other.memory.back().data() + other.shift, n * sizeof(T)) == 0;
    }
};

/// A base and tasks near it, coarse enough that sums cancel to 0 and magnitudes tie, with values of all sizes among
/// them.
template <class T>
std::vector<std::vector<T>> draw(std::mt19937& generator, std::size_t n, std::size_t tasks)
{
    std::vector<std::vector<T>> values(tasks + 1, std::vector<T>(n));
    std::uniform_int_distribution<int> step(-6, 6), rare(0, 40), exponent(-140, 120);
    for (std::size_t i = 0; i < n; ++i) {
        const float origin = static_cast<float>(step(generator)) * 0.25f;
        values[0][i] = narrow<T>(origin);
        for (std::size_t t = 1; t <= tasks; ++t) {
            values[t][i] =
                narrow<T>(rare(generator) == 0 ? std::ldexp(static_cast<float>(step(generator)), exponent(generator))
                                               : origin + static_cast<float>(step(generator)) * 0.125f);
        }
    }
    return values;
}

} // namespace

TEST_CASE_TEMPLATE("fused merges give the bits of the rows", T, float, bf16)
{
    std::mt19937 generator(11);
    for (const std::size_t n :
        {std::size_t{1}, std::size_t{2}, std::size_t{511}, std::size_t{4097}, std::size_t{12'345}}) {
        for (const std::size_t count : {1u, 2u, 3u, 4u, 5u, 6u, 7u, 8u, 9u, 17u}) {
            const auto values = draw<T>(generator, n, count);
            std::vector<double> weights;
            for (std::size_t t = 0; t < count; ++t) { weights.push_back(0.3 + 0.2 * static_cast<double>(t)); }
            model_options chunks;
            chunks.chunk = 64 * (1 + generator() % 100);
            const cpu policy{.threads = static_cast<unsigned>(1 + generator() % 4)};
            const auto check = [&](const auto& options) {
                shifted_models<T> rows(values, 1);
                limit_instruction_set(instruction_set::scalar);
                merge(cpu{.threads = 1}, options, rows.base, rows.tasks, rows.out);
                for (const auto set : {instruction_set::scalar, instruction_set::baseline, instruction_set::avx2,
                         instruction_set::avx512}) {
                    limit_instruction_set(set);
                    for (const std::size_t shift : {std::size_t{0}, sizeof(T), std::size_t{1}}) {
                        shifted_models<T> stored(values, shift);
                        merge(policy, options, stored.base, stored.tasks, stored.out, chunks);
                        CHECK(stored.same_output(rows));
                    }
                }
            };
            check(average_options{weights});
            check(average_options{});
            check(task_arithmetic_options{.lambda = -0.7, .weights = weights});
            check(detail::combination_options{weights});
            for (const auto zero :
                {zero_sign::majority, zero_sign::majority_or_negative, zero_sign::positive, zero_sign::none}) {
                check(ties_options{.density = 0.3, .lambda = 0.8, .zero_sign = zero});
                check(ties_options{.density = 1.0, .zero_sign = zero});
            }
            check(ties_options{.density = 0.5, .trim = trim_rule::reach_next});
        }
    }
}

TEST_CASE_TEMPLATE("elections count the same votes with packs of any width", T, float, bf16, f16, double)
{
    std::mt19937 generator(12);
    const instruction_set widest = supported_instruction_set();
    for (const std::size_t n : {std::size_t{1}, std::size_t{3}, std::size_t{1001}, std::size_t{4096}}) {
        for (const std::size_t count : {1u, 3u, 4u, 8u}) {
            const auto values = draw<T>(generator, n, count);
            shifted_models<T> models(values, 0);
            model_options spread;
            spread.on_nonfinite = nonfinite::propagate; // draws for f16 overflow
            const aligned_models aligned(&models.base, models.tasks, spread);
            const cpu policy{.threads = 1};
            cpu_passes passes(policy, aligned);
            for (const auto zero : {zero_sign::majority, zero_sign::none}) {
                const method<ties_options> prepared(passes, ties_options{.density = 1.0, .zero_sign = zero});
                const std::size_t chunks[] = {0};
                std::optional<merge_tally> expected;
                for (const auto set : {instruction_set::scalar, instruction_set::baseline, instruction_set::avx2,
                         instruction_set::avx512}) {
                    limit_instruction_set(set);
                    std::vector<T> out(n);
                    memory_sink sink({out.data()});
                    merge_tally tally;
                    detail::merge_chunks<ties_options>(passes, prepared, chunks, sink, {&tally, 1}, "merge");
                    if (!expected) { expected = tally; }
                    CHECK(tally.counts == expected->counts);
                    CHECK(tally.counts[election_counts::positive] + tally.counts[election_counts::negative] <= n);
                }
                CHECK((count > 1 || expected->counts[election_counts::unresolved] == 0));
            }
        }
    }
    limit_instruction_set(widest);
}

TEST_CASE_TEMPLATE("NaN, infinity and sums that overflow are the same in rows and in stored words", T, float, bf16)
{
    std::mt19937 generator(13);
    for (int round = 0; round < 40; ++round) {
        auto values = draw<T>(generator, 700, 3);
        const float largest = std::bit_cast<float>(0x7f000000u);
        for (int i = 0; i < 5; ++i) {
            for (std::size_t m = 1 + generator() % 3; m < 4; ++m) {
                values[m][generator() % 700] = narrow<T>(generator() % 2 ? largest : -largest);
            }
        }
        const bool spoilt = round % 2 == 1;
        if (spoilt) {
            values[generator() % 4][generator() % 700] = narrow<T>(
                generator() % 2 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN());
        }
        for (const auto& options : {ties_options{.density = 1.0}, ties_options{.density = 0.4}}) {
            shifted_models<T> fused(values, 0), rows(values, 1);
            model_options spread;
            spread.on_nonfinite = nonfinite::propagate;
            merge(cpu{.threads = 1}, options, fused.base, fused.tasks, fused.out, spread);
            merge(cpu{.threads = 1}, options, rows.base, rows.tasks, rows.out, spread);
            CHECK(fused.same_output(rows));
            if (spoilt) {
                CHECK_THROWS_AS(merge(cpu{.threads = 1}, options, fused.base, fused.tasks, fused.out), nonfinite_error);
            }
            else {
                CHECK_NOTHROW(merge(cpu{.threads = 1}, options, fused.base, fused.tasks, fused.out));
            }
        }
    }
}
