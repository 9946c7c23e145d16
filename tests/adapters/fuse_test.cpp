// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/fuse.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#include "reference/adapters.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <limits>

using namespace taskvec;
using reference::normal_matrix;
using reference::normal_update;

namespace {

template <class S>
const_tensor_ref tensor(const matrix<S>& x, extents shape)
{
    return as_tensor(host_view<const S>(x.data(), x.size()), std::move(shape));
}
template <class S>
tensor_ref tensor(matrix<S>& x, extents shape)
{
    return as_tensor(host_view<S>(x.data(), x.size()), std::move(shape));
}

/// θ0 + Σ over all ranks of (w·s·b)·a, by plain loops that round as the documentation says. (volatile: nothing is
/// fused.)
template <class A, class S>
std::vector<A> sum_of(const matrix<S>& base, const std::vector<std::pair<const lora_update<float>*, double>>& updates,
    bool transposed = false)
{
    std::vector<A> result;
    for (std::size_t i = 0; i < base.rows(); ++i) {
        for (std::size_t j = 0; j < base.cols(); ++j) {
            volatile A sum = 0;
            for (const auto& [update, weight] : updates) {
                const std::size_t output = transposed ? j : i, input = transposed ? i : j;
                for (std::size_t k = 0; k < update->rank(); ++k) {
                    const A factor =
                        static_cast<A>(static_cast<double>(update->b(output, k)) * (weight * update->scaling));
                    volatile A product = factor * static_cast<A>(update->a(k, input));
                    sum = sum + product;
                }
            }
            result.push_back(static_cast<A>(widen<A>(base(i, j)) + sum));
        }
    }
    return result;
}

template <class S, class A>
bool same_words(const matrix<S>& x, const std::vector<A>& values)
{
    for (std::size_t i = 0; i < x.size(); ++i) {
        const S expected = narrow<S>(values[i]);
        if (std::memcmp(&x.data()[i], &expected, sizeof(S)) != 0) { return false; }
    }
    return true;
}

} // namespace

TEST_CASE_TEMPLATE("fused weights are those of plain loops, bit for bit, whatever threads, chunks and instruction sets",
    S, float, double, bf16, f16)
{
    using A = arithmetic_type<S>;
    const auto first = normal_update<float>(37, 150, 5, 1, 0.5), second = normal_update<float>(37, 150, 2, 9, -2);
    const auto base = normal_matrix<S>(37, 150, 4, matrix_order::row_major);
    const auto other = normal_matrix<S>(3, 7, 5, matrix_order::row_major);
    const auto expected = sum_of<A>(base, {{&first, 1.0}, {&second, 0.3}});
    const_model_ref model;
    model.insert("a.weight", tensor(base, {37, 150}));
    model.insert("b.weight", tensor(other, {3, 7}));
    adapted_model changes;
    changes.add(model, "a.weight", first);
    changes.add(model, "a.weight", second, 0.3);
    for (const auto set :
        {instruction_set::scalar, instruction_set::baseline, instruction_set::avx2, instruction_set::avx512}) {
        limit_instruction_set(set);
        for (const std::size_t chunk : {64u, 1000u, 65536u}) {
            matrix<S> out(37, 150, matrix_order::row_major), copied(3, 7, matrix_order::row_major);
            model_ref result;
            result.insert("a.weight", tensor(out, {37, 150}));
            result.insert("b.weight", tensor(copied, {3, 7}));
            fuse(cpu{.threads = chunk == 1000 ? 1u : 3u}, model, changes, result, {.chunk = chunk});
            CHECK(same_words(out, expected));
            CHECK(std::memcmp(copied.data(), other.data(), other.size() * sizeof(S)) == 0);
        }
    }
    limit_instruction_set(instruction_set::avx512);

    matrix<S> typed(37, 150, matrix_order::row_major);
    fuse<cpu, float, S, S>(
        cpu{}, {base.data(), base.size()}, {{first, 1.0}, {second, 0.3}}, {typed.data(), typed.size()});
    CHECK(same_words(typed, expected));
}

TEST_CASE("weights that lie in by out take the transposed update, and the bits of the other layout")
{
    const auto update = normal_update<float>(40, 33, 4, 2, 0.7);
    const auto base = normal_matrix<float>(33, 40, 3, matrix_order::row_major);
    const_model_ref model;
    model.insert("w", tensor(base, {33, 40}));
    adapted_model changes;
    changes.add(model, "w", update, 2, {.transposed = true});
    matrix<float> out(33, 40, matrix_order::row_major);
    model_ref result;
    result.insert("w", tensor(out, {33, 40}));
    fuse(cpu{}, model, changes, result);
    CHECK(same_words(out, sum_of<float>(base, {{&update, 2.0}}, true)));
}

TEST_CASE("DoRA rescales every output by its own norm, in both layouts and beside other updates")
{
    const auto update = normal_update<float>(23, 70, 3, 2, 0.1), plain = normal_update<float>(23, 70, 2, 30, 0.1);
    const auto base = normal_matrix<float>(23, 70, 3, matrix_order::row_major);
    std::vector<double> magnitude;
    for (std::size_t i = 0; i < 23; ++i) { magnitude.push_back(4 + 0.5 * static_cast<double>(i)); }
    const auto delta = reference::dense(update), beside = reference::dense(plain);
    for (const double weight : {1.0, 0.25}) {
        for (const bool turned : {false, true}) {
            matrix<float> stored(turned ? 70 : 23, turned ? 23 : 70, matrix_order::row_major), out = stored;
            for (std::size_t i = 0; i < 23; ++i) {
                for (std::size_t j = 0; j < 70; ++j) { (turned ? stored(j, i) : stored(i, j)) = base(i, j); }
            }
            const extents shape{turned ? 70 : 23, turned ? 23 : 70};
            const_model_ref model;
            model.insert("w", tensor(stored, shape));
            model_ref result;
            result.insert("w", tensor(out, shape));
            adapted_model changes;
            changes.add(model, "w", update, weight, {.transposed = turned, .magnitude = magnitude});
            changes.add(model, "w", plain, 0.5, {.transposed = turned});
            fuse(cpu{.threads = 2}, model, changes, result, {.chunk = 64});
            double worst = 0;
            for (std::size_t i = 0; i < 23; ++i) {
                double norm = 0;
                for (std::size_t j = 0; j < 70; ++j) {
                    const double x = static_cast<double>(base(i, j)) + delta[i][j];
                    norm += x * x;
                }
                norm = std::sqrt(norm);
                for (std::size_t j = 0; j < 70; ++j) {
                    const double before = static_cast<double>(base(i, j));
                    const double dora = magnitude[i] * (before + delta[i][j]) / norm;
                    const double expected = before + weight * (dora - before) + 0.5 * beside[i][j];
                    worst = std::max(worst, std::abs(expected - static_cast<double>(turned ? out(j, i) : out(i, j))));
                }
            }
            CHECK(worst < 5e-6);
            matrix<float> again(out.rows(), out.cols(), matrix_order::row_major);
            model_ref second;
            second.insert("w", tensor(again, shape));
            fuse(cpu{.threads = 1}, model, changes, second);
            CHECK(std::memcmp(again.data(), out.data(), out.size() * sizeof(float)) == 0);
        }
    }
}

TEST_CASE("tensors that were saved whole, vectors, and convolutions")
{
    const auto base = normal_matrix<bf16>(6, 45, 1, matrix_order::row_major),
               saved = normal_matrix<bf16>(6, 45, 2, matrix_order::row_major);
    const auto conv = normal_update<float>(6, 45, 2, 3);
    const auto bias = normal_matrix<float>(1, 6, 4, matrix_order::row_major);
    lora_update<float> shift{matrix<float>(1, 1), normal_matrix<float>(1, 6, 5, matrix_order::row_major), 0.5};
    shift.b(0, 0) = 1;
    const_model_ref model;
    model.insert("bias", tensor(bias, {6}));
    model.insert("conv", tensor(base, {6, 5, 3, 3}));
    model.insert("head", tensor(base, {6, 45}));
    model.insert("half", tensor(base, {6, 45}));
    adapted_model changes;
    changes.add(model, "bias", shift);
    changes.add(model, "conv", conv);
    changes.replace(model, "head", tensor(saved, {6, 45}));
    changes.replace(model, "half", tensor(saved, {6, 45}), 0.5);
    matrix<float> out_bias(1, 6, matrix_order::row_major);
    matrix<bf16> out_conv(6, 45, matrix_order::row_major), head = out_conv, half = out_conv;
    model_ref result;
    result.insert("bias", tensor(out_bias, {6}));
    result.insert("conv", tensor(out_conv, {6, 5, 3, 3}));
    result.insert("head", tensor(head, {6, 45}));
    result.insert("half", tensor(half, {6, 45}));
    fuse(cpu{}, model, changes, result);
    CHECK(same_words(out_conv, sum_of<float>(base, {{&conv, 1.0}})));
    CHECK(std::memcmp(head.data(), saved.data(), 6 * 45 * 2) == 0);
    for (std::size_t i = 0; i < half.size(); ++i) {
        const float before = widen<float>(base.data()[i]);
        const bf16 expected = narrow<bf16>(before + 0.5f * (widen<float>(saved.data()[i]) - before));
        CHECK(widen<float>(half.data()[i]) == widen<float>(expected));
    }
    for (std::size_t i = 0; i < 6; ++i) { CHECK(out_bias(0, i) == bias(0, i) + 0.5f * shift.a(0, i)); }
}

TEST_CASE("a base with an adapter is a task of any merge, with the bits of the fused model stored as F32")
{
    const auto update = normal_update<float>(70, 90, 4, 1, 0.25);
    const auto base = normal_matrix<bf16>(70, 90, 2, matrix_order::row_major),
               task = normal_matrix<bf16>(70, 90, 3, matrix_order::row_major),
               same = normal_matrix<bf16>(1, 10, 4, matrix_order::row_major);
    matrix<float> fused(70, 90, matrix_order::row_major), fused_same(1, 10, matrix_order::row_major);
    const_model_ref model, other, stored;
    model.insert("a", tensor(base, {70, 90}));
    model.insert("b", tensor(same, {10}));
    other.insert("a", tensor(task, {70, 90}));
    other.insert("b", tensor(same, {10}));
    adapted_model changes;
    changes.add(model, "a", update, 1.5);
    model_ref result;
    result.insert("a", tensor(fused, {70, 90}));
    result.insert("b", tensor(fused_same, {10}));
    fuse(cpu{}, model, changes, result, {.output = dtype::f32});
    stored = const_model_ref(result);
    const auto merged_by = [&](const auto& options) {
        matrix<bf16> found(70, 90, matrix_order::row_major), found_same(1, 10, matrix_order::row_major),
            expected = found, expected_same = found_same;
        model_ref to, reference;
        to.insert("a", tensor(found, {70, 90}));
        to.insert("b", tensor(found_same, {10}));
        reference.insert("a", tensor(expected, {70, 90}));
        reference.insert("b", tensor(expected_same, {10}));
        merge(cpu{}, options, model, std::vector{stored, other}, reference);
        const std::vector<const_model_ref> tasks{model, other};
        aligned_models models(&model, tasks);
        const auto sources = changes.attach(models, 0);
        CHECK(sources.size() == 1);
        memory_sink sink = detail::sink_over(models, to);
        merge(cpu{.threads = 3}, options, models, sink);
        CHECK(std::memcmp(found.data(), expected.data(), expected.size() * 2) == 0);
        CHECK(std::memcmp(found_same.data(), expected_same.data(), expected_same.size() * 2) == 0);
        CHECK(std::memcmp(found.data(), base.data(), expected.size() * 2) != 0);
    };
    merged_by(task_arithmetic_options{.lambda = 0.4});
    merged_by(ties_options{.density = 0.3});
}

TEST_CASE("a block of rows of a fused projection takes its own updates, and the others stay")
{
    const auto first = normal_update<float>(6, 35, 3, 1, 0.5), second = normal_update<float>(6, 35, 2, 9, -2);
    const auto base = normal_matrix<float>(18, 35, 4, matrix_order::row_major);
    const auto rows = [&](std::size_t block) {
        matrix<float> part(6, 35, matrix_order::row_major);
        for (std::size_t i = 0; i < 6; ++i) {
            for (std::size_t j = 0; j < 35; ++j) { part(i, j) = base(6 * block + i, j); }
        }
        return part;
    };
    const_model_ref model;
    model.insert("qkv", tensor(base, {18, 35}));
    adapted_model changes;
    changes.add(model, "qkv", first, 1, {.row_blocks = true, .slice = 0, .slices = 3});
    changes.add(model, "qkv", second, 0.3, {.row_blocks = true, .slice = 0, .slices = 3});
    changes.add(model, "qkv", second, 1, {.row_blocks = true, .slice = 2, .slices = 3});
    auto expected = sum_of<float>(rows(0), {{&first, 1.0}, {&second, 0.3}});
    for (const auto& part : {sum_of<float>(rows(1), {}), sum_of<float>(rows(2), {{&second, 1.0}})}) {
        expected.insert(expected.end(), part.begin(), part.end());
    }
    for (const std::size_t chunk : {64u, 65536u}) {
        matrix<float> out(18, 35, matrix_order::row_major);
        model_ref result;
        result.insert("qkv", tensor(out, {18, 35}));
        fuse(cpu{.threads = 2}, model, changes, result, {.chunk = chunk});
        CHECK(same_words(out, expected));
    }
    CHECK_THROWS_WITH_AS(changes.add(model, "qkv", first, 1, {.row_blocks = true, .slice = 0, .slices = 4}),
        doctest::Contains("4 matrices of it"), shape_mismatch);
    CHECK_THROWS_AS(changes.add(model, "qkv", first, 1, {.row_blocks = true, .slice = 3, .slices = 3}), shape_mismatch);
    CHECK_THROWS_AS(changes.add(model, "qkv", first, 1, {.slice = 0, .slices = 3}), shape_mismatch);
    CHECK_THROWS_WITH_AS(changes.add(model, "qkv", first), doctest::Contains("its update"), shape_mismatch);
}

TEST_CASE("updates that do not fit are refused by the name of their tensor")
{
    const auto update = normal_update<float>(8, 5, 2, 1);
    const auto base = normal_matrix<float>(5, 8, 2, matrix_order::row_major);
    const std::vector<std::int64_t> steps{1};
    const_model_ref model;
    model.insert("step", const_tensor_ref{steps.data(), dtype::i64, {1}, {}, memory_space::host, 0});
    model.insert("w", tensor(base, {5, 8}));
    adapted_model changes;
    CHECK_THROWS_WITH_AS(changes.add(model, "w", update), doctest::Contains("fan_in_fan_out"), shape_mismatch);
    CHECK_THROWS_WITH_AS(changes.add(model, "v", update), doctest::Contains("'v'"), invalid_argument);
    CHECK_THROWS_AS(changes.add(model, "step", update), dtype_mismatch);
    CHECK_THROWS_AS(changes.add(model, "w", update, std::nan(""), {.transposed = true}), invalid_argument);
    CHECK_THROWS_WITH_AS(changes.add(model, "w", update, 1, {.transposed = true, .magnitude = {1, 2}}),
        doctest::Contains("2 magnitudes"), shape_mismatch);
    auto broken = update;
    broken.a(1, 2) = std::numeric_limits<float>::infinity();
    CHECK_THROWS_WITH_AS(
        changes.add(model, "w", broken, 1, {.transposed = true}), doctest::Contains("entry 7"), nonfinite_error);
    CHECK(changes.empty());

    changes.add(model, "w", update, 1e38, {.transposed = true});
    matrix<float> out(5, 8, matrix_order::row_major);
    std::vector<std::int64_t> copied(1);
    model_ref result;
    result.insert("step", tensor_ref{copied.data(), dtype::i64, {1}, {}, memory_space::host, 0});
    result.insert("w", tensor(out, {5, 8}));
    adapted_model twice;
    twice.add(model, "w", update, 1e38, {.transposed = true});
    twice.add(model, "w", update, 1e39, {.transposed = true});
    CHECK_THROWS_WITH_AS(fuse(cpu{}, model, twice, result), doctest::Contains("'w'"), nonfinite_error);
    auto damaged = base;
    damaged(2, 3) = std::nanf("");
    const_model_ref wrong;
    wrong.insert("step", const_tensor_ref{steps.data(), dtype::i64, {1}, {}, memory_space::host, 0});
    wrong.insert("w", tensor(damaged, {5, 8}));
    CHECK_THROWS_WITH_AS(
        fuse(cpu{}, wrong, changes, result), doctest::Contains("the base holds NaN at index 19"), nonfinite_error);
    fuse(cpu{}, wrong, adapted_model{}, result, {.on_nonfinite = nonfinite::propagate});
    CHECK(std::isnan(out(2, 3)));
    CHECK(copied[0] == 1);
}
