// Average, task arithmetic, DARE: against their definitions; dtypes, missing and excluded tensors, errors.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/random_models.hpp"
#include "../reference/ties.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>

using namespace taskvec;
using reference::product;
using reference::sum;

namespace {

template <class T, class Expected>
void check_bits(const std::vector<T>& found, Expected&& expected)
{
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
        const T want = narrow<T>(expected(i));
        wrong += std::memcmp(&found[i], &want, sizeof(T)) != 0;
    }
    CHECK(wrong == 0);
}

} // namespace

TEST_CASE_TEMPLATE("average and task arithmetic equal their definitions", T, float, double, bf16, f16)
{
    using A = arithmetic_type<T>;
    for (const std::size_t count : {1, 2, 7}) {
        const testing::random_models<T> models({3000, 1, 64, 2048}, count, static_cast<unsigned>(count));
        std::vector<double> weights;
        for (std::size_t t = 0; t < count; ++t) { weights.push_back(0.3 * static_cast<double>(t + 1)); }
        std::vector<T> out;
        merge(cpu{.threads = 2}, average_options{weights}, models.task_models(), models.output(out));
        check_bits(out, [&](std::size_t i) {
            A total = 0, divisor = 0;
            for (std::size_t t = 0; t < count; ++t) {
                total = sum(total, product(static_cast<A>(weights[t]), widen<A>(models.tasks[t][i])));
                divisor = sum(divisor, static_cast<A>(weights[t]));
            }
            return total / divisor;
        });
        merge(cpu{.threads = 3}, task_arithmetic_options{.lambda = -0.4, .weights = weights}, models.model(models.base),
            models.task_models(), models.output(out));
        check_bits(out, [&](std::size_t i) {
            A total = 0;
            const A base = widen<A>(models.base[i]);
            for (std::size_t t = 0; t < count; ++t) {
                total = sum(total, product(static_cast<A>(weights[t]), sum(widen<A>(models.tasks[t][i]), -base)));
            }
            return sum(base, product(A(-0.4), total));
        });
    }
}

TEST_CASE("DARE draws by (seed, task, tensor, index) alone, and rescales")
{
    const testing::random_models<float> models({5000, 77, 4096}, 3, 9);
    const dare_options options{.density = 0.3, .seed = 42, .lambda = 0.8};
    const auto expected = [&](std::size_t i) {
        std::size_t tensor = 0, begin = 0;
        while (i >= begin + models.sizes[tensor]) { begin += models.sizes[tensor++]; }
        float total = 0;
        for (std::uint32_t t = 0; t < 3; ++t) {
            const float delta = sum(models.tasks[t][i], -models.base[i]);
            const bool keep = random_stream(42, t, "t" + std::to_string(tensor)).uniform(i - begin) < 0.3;
            total = sum(total, keep ? delta / 0.3f : 0.0f);
        }
        return sum(models.base[i], product(0.8f, total));
    };
    for (const unsigned threads : {1u, 4u}) {
        for (const std::size_t chunk : {64u, 3000u}) {
            std::vector<float> out;
            model_options how;
            how.chunk = chunk;
            merge(cpu{.threads = threads}, options, models.model(models.base), models.task_models(), models.output(out),
                how);
            check_bits(out, expected);
        }
    }
    std::vector<float> ones(100000, 1.0f), out(ones.size());
    merge(cpu{}, dare_options{.density = 0.3, .seed = 1}, std::vector<float>(ones.size(), 0.0f), std::array{ones}, out);
    double mean = 0;
    for (const float x : out) { mean += x; }
    CHECK(mean / static_cast<double>(ones.size())
        == doctest::Approx(1.0).epsilon(0.02)); // 5 standard deviations: √(0.7/0.3/1e5)·5 = 0.024
    // Everything kept is task arithmetic.
    std::vector<float> kept(models.base.size()), plain(models.base.size());
    merge(cpu{}, dare_options{.density = 1.0, .lambda = 0.5}, models.base, models.tasks, kept);
    merge(cpu{}, task_arithmetic_options{.lambda = 0.5}, models.base, models.tasks, plain);
    CHECK(kept == plain);
}

TEST_CASE("DARE-TIES elects among what was kept")
{
    const testing::random_models<float> models({3000}, 3, 10, 2);
    std::vector<float> out(3000);
    merge(cpu{}, dare_ties_options{.density = 0.4, .seed = 3, .ties = {.lambda = 0.7}}, models.model(models.base),
        models.task_models(), models.output(out));
    std::vector<std::vector<float>> dropped(3, std::vector<float>(3000));
    for (std::uint32_t t = 0; t < 3; ++t) {
        const random_stream stream(3, t, "t0");
        for (std::size_t i = 0; i < 3000; ++i) {
            dropped[t][i] = stream.uniform(i) < 0.4 ? sum(models.tasks[t][i], -models.base[i]) / 0.4f : 0.0f;
        }
    }
    ties_options all{.density = 1.0, .lambda = 0.7};
    const auto change = reference::ties(std::vector<float>(3000, 0.0f), dropped, {3000}, all);
    check_bits(out, [&](std::size_t i) { return sum(models.base[i], change[i]); });
}

TEST_CASE("mixed dtypes, fp8, integers, missing and excluded tensors")
{
    std::vector<float> w0{1, 2}, out_w(2), out_a(1);
    std::vector<bf16> w1{bf16(2.0f), bf16(4.0f)};
    std::vector<double> w2{3, 6};
    std::vector<std::int64_t> step{7}, other{8}, out_step(1);
    std::vector<std::uint8_t> fp8{0x38}; // 1.0 in e4m3
    std::vector<float> a1{3};
    const_tensor_ref steps{step.data(), dtype::i64, {1}}, others{other.data(), dtype::i64, {1}};
    const_model_ref base{
        {"a", {fp8.data(), dtype::f8_e4m3, {1}}}, {"step", steps}, {"w", as_tensor(as_view(std::as_const(w0)))}};
    const_model_ref one{
        {"a", as_tensor(as_view(std::as_const(a1)))}, {"step", steps}, {"w", as_tensor(as_view(std::as_const(w1)))}};
    const_model_ref two{
        {"a", as_tensor(as_view(std::as_const(a1)))}, {"step", steps}, {"w", as_tensor(as_view(std::as_const(w2)))}};
    const model_ref out{{"a", as_tensor(as_view(out_a))}, {"step", {out_step.data(), dtype::i64, {1}}},
        {"w", as_tensor(as_view(out_w))}};
    merge(cpu{}, task_arithmetic_options{.lambda = 1.0}, base, std::vector{one, two}, out);
    CHECK(out_w == std::vector<float>{4, 8});
    CHECK(out_a == std::vector<float>{5}); // 1 + 2 + 2, stored as f32
    CHECK(out_step[0] == 7);

    const_model_ref changed = two;
    CHECK_THROWS_AS(
        merge(cpu{}, average_options{}, base,
            std::vector{one, const_model_ref{{"a", *two.find("a")}, {"step", others}, {"w", *two.find("w")}}}, out),
        dtype_mismatch);
    CHECK_THROWS_WITH_AS(merge(cpu{}, average_options{}, base,
                             std::vector{one, const_model_ref{{"step", steps}, {"w", *two.find("w")}}}, out),
        "tensor 'a' of the base is missing in task 2: add it, or let missing tensors stand for the base's",
        invalid_argument);
    try {
        merge(cpu{}, average_options{}, base, std::vector{one, const_model_ref{{"step", steps}, {"w", *two.find("w")}}},
            out);
        FAIL("accepted");
    }
    catch (const error& failure) {
        CHECK(failure.code() == error_code::tensor_missing);
    }
    model_options how;
    how.on_missing = missing_tensors::base;
    merge(cpu{}, task_arithmetic_options{.lambda = 1.0}, base,
        std::vector{one, const_model_ref{{"step", steps}, {"w", *two.find("w")}}}, out, how);
    CHECK(out_a == std::vector<float>{3});
    CHECK_THROWS_AS(
        merge(cpu{}, average_options{}, base, std::vector{const_model_ref{{"unknown", steps}}}, out), invalid_argument);
    CHECK_THROWS_AS(
        merge(cpu{}, average_options{},
            std::vector<const_model_ref>{one, const_model_ref{{"step", steps}, {"w", *two.find("w")}}}, out, how),
        invalid_argument);

    how = {};
    how.include = [](std::string_view name) { return name == "w"; };
    std::vector<std::uint8_t> kept(1);
    merge(cpu{}, task_arithmetic_options{.lambda = 1.0}, base, std::vector{one},
        model_ref{{"a", {kept.data(), dtype::f8_e4m3, {1}}}, {"step", {out_step.data(), dtype::i64, {1}}},
            {"w", as_tensor(as_view(out_w))}},
        how);
    CHECK(kept[0] == 0x38);
    CHECK(out_w == std::vector<float>{2, 4});
}

TEST_CASE("strided tensors, wrong outputs and misaligned data")
{
    std::vector<float> x{1, 2, 3, 4}, out(4);
    const_model_ref strided{{"x", {x.data(), dtype::f32, {2, 2}, {1, 2}}}};
    CHECK_THROWS_AS(
        merge(cpu{}, average_options{}, std::vector{strided}, model_ref{{"x", as_tensor(as_view(out), {2, 2})}}),
        invalid_argument);
    const_model_ref plain{{"x", as_tensor(as_view(std::as_const(x)))}};
    CHECK_THROWS_AS(merge(cpu{}, average_options{}, std::vector{plain}, model_ref{}), invalid_argument);
    CHECK_THROWS_AS(
        merge(cpu{}, average_options{}, std::vector{plain}, model_ref{{"x", as_tensor(as_view(out), {2, 2})}}),
        shape_mismatch);
    std::vector<bf16> narrow_out(4);
    CHECK_THROWS_AS(
        merge(cpu{}, average_options{}, std::vector{plain}, model_ref{{"x", as_tensor(as_view(narrow_out))}}),
        dtype_mismatch);
    const_model_ref on_device{{"x", {x.data(), dtype::f32, {4}, {}, memory_space::device}}};
    CHECK_THROWS_AS(merge(cpu{}, average_options{}, std::vector{on_device}, model_ref{{"x", as_tensor(as_view(out))}}),
        invalid_argument);
    // Files may place tensors at any byte.
    std::vector<std::byte> bytes(17), written(17);
    std::memcpy(bytes.data() + 1, x.data(), 16);
    const_model_ref odd{{"x", {bytes.data() + 1, dtype::f32, {4}}}};
    merge(cpu{}, task_arithmetic_options{.lambda = 1.0}, odd, std::vector{odd},
        model_ref{{"x", {written.data() + 1, dtype::f32, {4}}}});
    CHECK(std::memcmp(bytes.data() + 1, written.data() + 1, 16) == 0);
}

TEST_CASE("in place over the base, cancelled, and streamed past the cache")
{
    std::vector<float> base(100, 1.0f), task(100, 3.0f);
    merge(cpu{}, task_arithmetic_options{.lambda = 0.5}, base, std::array{task}, base);
    CHECK(base == std::vector<float>(100, 2.0f));
    std::vector<std::string> phases;
    cpu stopping{.threads = 2, .progress = [&](const progress_event& event) {
                     phases.emplace_back(event.phase);
                     return false;
                 }};
    CHECK_THROWS_AS(merge(stopping, average_options{}, std::array{task}, base), cancelled);
    CHECK(phases == std::vector<std::string>{"merge"});
    std::vector<float> large(3u << 20, 1.5f), out(large.size() + 3); // more than 8 MiB: non-temporal stores
    merge(cpu{.threads = 2}, average_options{}, std::vector{large, large},
        host_view<float>{out.data() + 3, large.size()});
    CHECK(std::equal(large.begin(), large.end(), out.begin() + 3));
    CHECK_THROWS_AS(merge(cpu{}, average_options{{1.0, -1.0}}, std::vector{task, task}, base), invalid_argument);
}

TEST_CASE("progress counts the bytes that a walk reads, and those that are copied through")
{
    const testing::random_models<bf16> models({9001, 5000}, 2, 1);
    const std::int32_t number = 7;
    std::vector<bf16> out;
    const_model_ref base = models.model(models.base);
    std::vector<const_model_ref> tasks = models.task_models();
    model_ref merged = models.output(out);
    std::int32_t copied = 0;
    const const_tensor_ref step{&number, dtype::i32, {1}};
    base.insert("step", step);
    for (auto& task : tasks) { task.insert("step", step); }
    merged.insert("step", {&copied, dtype::i32, {1}});
    std::map<std::string, std::uint64_t> totals, reached;
    const cpu told{.threads = 2, .progress = [&](const progress_event& event) {
                       CHECK(event.unit == progress_unit::bytes);
                       totals[std::string(event.phase)] = event.total;
                       reached[std::string(event.phase)] = event.done;
                       return true;
                   }};
    merge(told, ties_options{.zero_sign = zero_sign::none}, base, tasks, merged);
    CHECK(totals
        == std::map<std::string, std::uint64_t>{{"copy", 4}, {"merge", 14001 * 3 * 2}, {"select", 14001 * 3 * 2}});
    CHECK(reached == totals);
    CHECK(copied == 7);
}

TEST_CASE("WiSE-FT goes from the pre-trained model to the fine-tuned one")
{
    const testing::random_models<float> models({500}, 1, 4);
    const std::vector<std::vector<float>> ends{models.base, models.tasks[0]};
    std::vector<float> out(500);
    merge(cpu{}, average_options::wise_ft(0), ends, out);
    CHECK(out == models.base);
    merge(cpu{}, average_options::wise_ft(1), ends, out);
    CHECK(out == models.tasks[0]);
    for (const double alpha : {0.25, 0.3, 0.5, 1.5}) { // past 1 it extrapolates
        merge(cpu{}, average_options::wise_ft(alpha), ends, out);
        double worst = 0;
        for (std::size_t i = 0; i < out.size(); ++i) {
            const double a = ends[0][i], b = ends[1][i];
            worst = std::max(worst, std::abs(out[i] - ((1 - alpha) * a + alpha * b)) / (std::abs(a) + std::abs(b)));
        }
        CHECK(worst < 5e-7);
    }
    for (const double alpha : {std::nan(""), std::numeric_limits<double>::infinity()}) {
        CHECK_THROWS_AS(merge(cpu{}, average_options::wise_ft(alpha), ends, out), invalid_argument);
    }
    CHECK_THROWS_AS(merge(cpu{}, average_options::wise_ft(0.5), std::vector<std::vector<float>>{ends[0]}, out),
        invalid_argument); // one model
}

TEST_CASE("Tasks in braces, as views or models, are merged as a list of them is")
{
    const testing::random_models<float> m({300}, 2, 11);
    const auto first = as_view(m.tasks[0]), second = as_view(m.tasks[1]);
    const task_arithmetic_options options{.lambda = 0.3};
    std::vector<float> listed(300), braced(300);
    merge(cpu{}, options, m.base, m.tasks, listed);
    merge(cpu{}, options, m.base, {first, second}, braced);
    CHECK(braced == listed);
    braced.assign(300, 0.0f);
    merge(cpu{}, options, m.model(m.base), {m.model(m.tasks[0]), m.model(m.tasks[1])}, m.output(braced));
    CHECK(braced == listed);
    merge(cpu{}, average_options{}, m.tasks, listed);
    merge(cpu{}, average_options{}, {first, second}, braced, {.statistics = true});
    CHECK(braced == listed);
}
