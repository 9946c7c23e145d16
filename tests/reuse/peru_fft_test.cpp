// Post-Pruning, PERU-FFT, sparse vectors: what is kept, what it adds up to, and the way back.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/ties.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/reuse/parameter_count.hpp>
#include <taskvec/reuse/peru_fft.hpp>
#include <taskvec/reuse/sparse_addition.hpp>

#include <doctest/doctest.h>

#include <numeric>
#include <string>

using namespace taskvec;

TEST_CASE_TEMPLATE("Post-Pruning keeps the largest nonzero entries of the model", T, float, double, bf16, f16)
{
    using A = arithmetic_type<T>;
    for (const int levels : {0, 2}) {
        const testing::random_models<T> models({700, 3, 0, 5000}, 1, 3, levels);
        for (const double density : {1e-6, 0.1, 0.5, 1.0}) {
            const std::size_t n = models.base.size();
            std::vector<A> delta(n);
            for (std::size_t i = 0; i < n; ++i) { delta[i] = widen<A>(models.tasks[0][i]) - widen<A>(models.base[i]); }
            std::vector<std::size_t> order(n);
            std::iota(order.begin(), order.end(), 0u);
            std::stable_sort(
                order.begin(), order.end(), [&](auto a, auto b) { return std::abs(delta[a]) > std::abs(delta[b]); });
            order.resize(top_k_count(density, n));
            std::erase_if(order, [&](auto i) { return delta[i] == 0; });
            std::sort(order.begin(), order.end());

            model_options how;
            how.chunk = 128;
            const auto pruned = post_pruning(
                cpu{.threads = 2}, {.density = density}, models.model(models.base), models.model(models.tasks[0]), how);
            std::vector<std::size_t> found;
            std::size_t begin = 0;
            bool values_right = true;
            for (std::size_t i = 0; i < models.sizes.size(); ++i) {
                const auto& sparse = std::get<sparse_vector<A>>(pruned.at("t" + std::to_string(i)));
                for (std::size_t e = 0; e < sparse.kept(); ++e) {
                    found.push_back(begin + sparse.indices[e]);
                    values_right = values_right && sparse.values[e] == delta[begin + sparse.indices[e]];
                }
                begin += models.sizes[i];
            }
            CHECK(found == order);
            CHECK(values_right);
            CHECK(kept_entries(pruned) == order.size());
        }
    }
}

TEST_CASE_TEMPLATE("Post-Pruning keeps the next entry and all its equals where it is told to", T, float, bf16)
{
    using A = arithmetic_type<T>;
    const std::vector<float> zeros(10), values{1, 9, 5, 8, 5, 7, 5, 1, 5, 1};
    CHECK(post_pruning(cpu{}, {.density = 0.3}, zeros, values).indices == index_list{1, 3, 5});
    CHECK(post_pruning(cpu{}, post_pruning_options::as_in_ties_merging(), zeros, values).indices == index_list{1, 3});
    const auto next = post_pruning(cpu{}, {.density = 0.3, .trim = trim_rule::reach_next}, zeros, values);
    CHECK(next.indices == index_list{1, 2, 3, 4, 5, 6, 8});
    CHECK(next.values == std::pmr::vector<float>{9, 5, 8, 5, 7, 5, 5});
    for (const int levels : {0, 2}) {
        const testing::random_models<T> models({700, 3, 0, 5000}, 1, 3, levels);
        for (const auto over : {scope::model, scope::tensor}) {
            for (const double density : {1e-6, 0.1, 0.5, 1.0}) {
                const auto pruned =
                    post_pruning(cpu{.threads = 2}, {.density = density, .scope = over, .trim = trim_rule::reach_next},
                        models.model(models.base), models.model(models.tasks[0]));
                std::vector<A> delta(models.base.size());
                for (std::size_t i = 0; i < delta.size(); ++i) {
                    delta[i] = widen<A>(models.tasks[0][i]) - widen<A>(models.base[i]);
                }
                std::size_t begin = 0;
                for (std::size_t i = 0; i < models.sizes.size(); ++i) {
                    const std::size_t first = over == scope::model ? 0 : begin;
                    const std::size_t last = over == scope::model ? delta.size() : begin + models.sizes[i];
                    const std::vector<A> part(
                        delta.begin() + static_cast<long>(first), delta.begin() + static_cast<long>(last));
                    const auto k = std::min<std::uint64_t>(
                        part.size(), static_cast<std::uint64_t>(density * static_cast<double>(part.size())) + 1);
                    const auto kept = reference::top(part, k, true);
                    std::vector<std::uint64_t> expected;
                    for (std::size_t e = 0; e < models.sizes[i]; ++e) {
                        const A value = delta[begin + e];
                        if (value != 0 && kept[begin + e - first]) { expected.push_back(e); }
                    }
                    const auto& sparse = std::get<sparse_vector<A>>(pruned.at("t" + std::to_string(i)));
                    CHECK(std::vector<std::uint64_t>(sparse.indices.begin(), sparse.indices.end()) == expected);
                    begin += models.sizes[i];
                }
            }
        }
    }
    CHECK_THROWS_AS((void)post_pruning(cpu{}, {.density = 20, .trim = trim_rule::reach_next}, zeros, values),
        invalid_argument); // no share, whatever the rule
}

TEST_CASE_TEMPLATE("applied and undone: the very words of before", T, float, double, bf16, f16)
{
    using A = arithmetic_type<T>;
    const testing::random_models<T> models({70000, 9}, 1, 8);
    const auto delta = post_pruning(cpu{}, {.density = 0.3}, models.model(models.base), models.model(models.tasks[0]));
    std::vector<T> live = models.base;
    const model_ref weights = models.output(live);
    live = models.base;
    const auto saved = apply(cpu{.threads = 2}, delta, weights, 0.7);
    std::size_t changed = 0, wrong = 0, at = 0;
    std::vector<A> dense(live.size(), A{0});
    std::size_t begin = 0;
    for (const auto& [name, tensor] : delta) {
        const auto& sparse = std::get<sparse_vector<A>>(tensor);
        for (std::size_t e = 0; e < sparse.kept(); ++e) { dense[begin + sparse.indices[e]] = sparse.values[e]; }
        begin += models.sizes[at++];
    }
    for (std::size_t i = 0; i < live.size(); ++i) {
        volatile A added = static_cast<A>(0.7) * dense[i];
        const T expected = dense[i] == 0 ? models.base[i] : narrow<T>(static_cast<A>(widen<A>(models.base[i]) + added));
        wrong += std::memcmp(&live[i], &expected, sizeof(T)) != 0;
        changed += std::memcmp(&live[i], &models.base[i], sizeof(T)) != 0;
    }
    CHECK(wrong == 0);
    CHECK(changed > 15000);
    undo(cpu{.threads = 3}, delta, saved, weights);
    CHECK(std::memcmp(live.data(), models.base.data(), live.size() * sizeof(T)) == 0);

    // The same through a sink, as the tool does it.
    std::vector<T> out;
    const model_ref target = models.output(out);
    const auto base = models.model(models.base);
    const aligned_models aligned(&base, {&base, 1});
    memory_sink sink({out.data(), out.data() + 70000});
    add_delta(cpu{.threads = 2}, aligned, delta, 0.7, sink);
    (void)apply(cpu{}, delta, weights, 0.7);
    CHECK(std::memcmp(live.data(), out.data(), live.size() * sizeof(T)) == 0);
}

TEST_CASE("PERU-FFT at density 1 serves every task up to rounding, and counts its parameters")
{
    const testing::random_models<float> models({400, 100}, 3, 21);
    std::vector<float> merged;
    const auto tasks = models.task_models();
    const model_ref out = models.output(merged);
    const auto deltas =
        peru_fft(cpu{}, ties_options{.density = 0.2}, {.density = 1.0}, models.model(models.base), tasks, out);
    for (std::size_t t = 0; t < 3; ++t) {
        std::vector<float> live = merged;
        const testing::random_models<float> shape = models;
        std::vector<float> memory;
        const model_ref weights = shape.output(memory);
        memory = live;
        (void)apply(cpu{}, deltas[t], weights);
        for (std::size_t i = 0; i < live.size(); ++i) {
            CHECK(memory[i] == doctest::Approx(models.tasks[t][i]).epsilon(1e-5));
        }
    }
    const auto sparse = peru_fft(cpu{}, average_options{}, {.density = 0.1}, models.model(models.base), tasks, out);
    CHECK(parameter_count(const_model_ref(out)) == 500);
    CHECK(parameter_count(const_model_ref(out), sparse) == 500 + 3 * 50);
    const auto flat = peru_fft(cpu{}, average_options{}, {.density = 0.1}, models.base, models.tasks, merged);
    CHECK(flat.size() == 3);
    CHECK(flat[0].kept() == 50);
}

TEST_CASE("f64 tasks of an f32 model leave f32 values, which can be applied; zeros of rounding are not stored")
{
    const std::vector<float> base{1, 2, 3, 0};
    const std::vector<double> task{1.5, 2, 3 + 0x1p-30, 1e-60};
    const auto delta = post_pruning(cpu{}, {.density = 1.0}, base, task);
    CHECK(delta == sparse_vector<float>{{4}, {0, 2}, {0.5f, 0x1p-30f}});
    std::vector<float> live = base;
    (void)apply(cpu{}, delta, live);
    CHECK(live == std::vector<float>{1.5f, 2, 3, 0});
    std::vector<float> merged(4);
    const auto deltas = peru_fft(cpu{}, average_options{}, {.density = 1.0}, base, std::vector{task, task}, merged);
    CHECK(deltas[0] == sparse_vector<float>{{4}, {2}, {0x1p-30f}}); // what the merge lost by rounding
}

TEST_CASE("PERU-FFT takes a tensor that a task lacks for the base's, not for the merged one")
{
    const std::vector<float> zeros(4, 0.0f), ones(4, 1.0f);
    const_model_ref base, full, lacking;
    for (const char* name : {"a", "b"}) {
        base.insert(name, as_tensor(host_view<const float>(zeros.data(), 4)));
        full.insert(name, as_tensor(host_view<const float>(ones.data(), 4)));
    }
    lacking.insert("a", as_tensor(host_view<const float>(ones.data(), 4)));
    std::vector<float> a(4), b(4);
    model_ref out;
    out.insert("a", as_tensor(host_view<float>(a.data(), 4)));
    out.insert("b", as_tensor(host_view<float>(b.data(), 4)));
    model_options how;
    how.on_missing = missing_tensors::base;
    const auto deltas =
        peru_fft(cpu{}, average_options{}, {.density = 1.0}, base, std::vector{full, lacking}, out, how);
    CHECK(b == std::vector<float>(4, 0.5f));
    CHECK(std::get<sparse_vector<float>>(deltas[1].at("b")).values == std::pmr::vector<float>(4, -0.5f));
    (void)apply(cpu{}, deltas[1], out);
    CHECK(b == zeros);
}

TEST_CASE("bitmask and indices say the same")
{
    sparse_vector<float> sparse{{3, 7}, {0, 7, 8, 20}, {1, 2, 3, 4}};
    const auto masked = to_bitmask(sparse);
    CHECK(masked.bitmask == std::pmr::vector<std::uint8_t>{0x81, 0x01, 0x10});
    CHECK(to_sparse(masked) == sparse);
    auto tail = masked;
    tail.bitmask[2] = 0x30;
    tail.values.push_back(5);
    CHECK_THROWS_AS((void)to_sparse(tail), invalid_argument);
    tail.bitmask.pop_back();
    CHECK_THROWS_AS((void)to_sparse(tail), invalid_argument);
    CHECK_THROWS_AS(check_sparse(sparse_vector<float>{{3}, {1, 1}, {1, 2}}), invalid_argument);
    CHECK_THROWS_AS(check_sparse(sparse_vector<float>{{3}, {3}, {1}}), invalid_argument);
    CHECK_THROWS_AS(check_sparse(sparse_vector<float>{{3}, {0, 1}, {1}}), invalid_argument);
    std::vector<float> live(20);
    CHECK_THROWS_AS((void)apply(cpu{}, sparse, live), shape_mismatch);
    std::vector<double> wide(21);
    sparse_model delta{{"w", sparse}};
    CHECK_THROWS_AS((void)apply(cpu{}, delta, model_ref{{"w", as_tensor(as_view(wide), {3, 7})}}), dtype_mismatch);
    CHECK_THROWS_AS((void)apply(cpu{}, delta, model_ref{}), invalid_argument);
    std::vector<float> right(21);
    CHECK_THROWS_AS((void)apply(cpu{}, delta, model_ref{{"w", as_tensor(as_view(right), {7, 3})}}), shape_mismatch);
    CHECK_THROWS_AS((void)post_pruning(cpu{}, {.density = 0.0}, right, right), invalid_argument);
}
